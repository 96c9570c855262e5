"""The toy language model: sentences that describe photos, written by a grammar from label names.

    sentences, targets = sentences_about(["dog", "ice cream", "skis"], count=1000, seed=0)
    fill_template("a photo of a {}.", "umbrella")   # "a photo of an umbrella."

A stand-in for the language model that CoMC has write its training texts.
"""
import functools
import random
import re

import numpy as np
import torch

# how English treats a noun follows from its head word; unlisted ones are guessed by their ending
KINDS = {
    "singular": """building wedding ring king wing painting ceiling earring string railing swing
        drawing crossing pudding duckling lens gas canvas christmas atlas series rhinoceros""",
    "plural": "people men women children mice feet teeth geese taxis cacti",
    "crowd": "police cattle",  # plural, but not counted
    "pair": """scissors skis glasses sunglasses eyeglasses goggles binoculars pants trousers jeans
        shorts headphones pliers""",
    "mass": """grass snow water sand food frost fire rain ice fog smoke bread cheese rice milk wine
        beer coffee tea juice meat butter cream broccoli corn spinach pasta furniture luggage
        clothing jewelry graffiti coral mud hay information honey sugar salt oil soup chocolate
        beef seafood hair fur wool cotton leather wood metal steel gold silver plastic soap dust
        soil moss mist steam money equipment music news wildlife traffic weather fauna flora""",
    "bare": """sports soccer tennis football basketball baseball golf yoga exercise nighttime nature
        art fashion travel history culture religion love peace winter summer autumn dusk dawn africa
        america asia europe california london paris berlin rome tokyo england france spain italy
        germany japan china india australia canada mexico brazil""",
    "adjective": """rainy sunny cloudy foggy snowy windy stormy rusty wet dry hot cold wooden golden
        red green blue yellow purple pink brown black white gray colorful bright dark old new young
        ancient modern big small large tall happy cute beautiful abandoned urban rural""",
    "the": "sky sun moon ocean sea horizon ground military surf",
}
KINDS = {word: kind for kind, words in KINDS.items() for word in words.split()}
IRREGULAR = dict(pair.split("/") for pair in """person/people human/humans german/germans man/men
    child/children mouse/mice tooth/teeth foot/feet mongoose/mongooses goose/geese knife/knives
    leaf/leaves wolf/wolves shelf/shelves loaf/loaves calf/calves scarf/scarves thief/thieves
    cactus/cacti ottoman/ottomans talisman/talismans sheep/sheep deer/deer fish/fish elk/elk
    moose/moose series/series aircraft/aircraft""".split())
IRREGULAR_ENDING = re.compile(f"({'|'.join(IRREGULAR)})$", re.I)  # also of bookshelf, reindeer
VOWEL_SOUND = re.compile(
    r"(?!eu|ew|one\b|u\b|u[krst][aeiou]|uni(?!n)|ufo|usb)[aeiou]|hour|heir|honou?r|honest|suv\b|"
    r"8|1[18]\b", re.I)
SPELLED_WITH_VOWEL = set("AEFHILMNORSX8")  # an F, an X
# what follows the head word: cup of tea, man in suit, passer-by
TAIL = re.compile(r" (of|in|on|at|with|for|from|under|by) .+|(?<=er)-(by|on|up)$|-(of|in)-.+")

# group of labels: (the labels, verbs, scenes); a scene needs all labels to be of the group
GROUPS = {
    "people": ("person man woman child boy girl",
               "stands/stand,is standing/are standing,is sitting/are sitting,poses/pose",
               "in a crowd,at a party,in a public square,on the pavement,at an event"),
    "animals": ("""animal bird birds cat dog horse horses sheep cow bear elephant zebra giraffe fox
                tiger lion elk deer rabbit duck goat""",
                "stands/stand,rests/rest,is resting/are resting,walks/walk,waits/wait",
                "in a meadow,in the wild,on a farm,in the countryside"),
    "vehicles": ("bicycle car cars motorcycle motorbike bus truck van taxi vehicle",
                 "is parked/are parked,stands/stand,is waiting/are waiting,stops/stop",
                 "on a busy road,in a city street,in a parking lot,at a crossing"),
    "food": ("""banana apple sandwich orange broccoli carrot pizza donut cake bread cheese bowl cup
             fork knife spoon bottle""", "lies/lie,can be seen/can be seen",
             "on a table,on a kitchen counter,at a picnic,at breakfast,on a tray"),
    "": ("", "can be seen/can be seen,is visible/are visible,is in view/are in view",
         "on a sunny day,on a cloudy day,early in the morning,late in the afternoon,at dusk,"
         "in bright light,in soft light,in dim light,in a quiet place,in a busy place,"
         "in an everyday scene,in a cluttered scene"),
}
SIZES = "a small,a large,one"
COUNTS = "two,three,four,five,several,a few,some,many"
OPENINGS = ("a photo of,a picture of,a snapshot of,a view of,an image with,a scene with,"
            "the photo shows,the picture shows,this is a photo of,someone took a picture of")
POSITIONS = ("next to,beside,near,close to,in front of,behind,to the left of,to the right of,"
             "not far from,across from")
PLACES = ("on the left/on the right,on the right/on the left,in the foreground/in the background,"
          "in front/further back,at the top/at the bottom,in the center/at the edge")
BEHIND = "in the background,behind,nearby,in the distance,to one side,in the same picture"


# ---- nouns

def kind_of(label):
    """How English treats a label: a key of KINDS. A capital at its very start says nothing."""
    head = TAIL.sub("", label).split()[-1]
    has_article = re.match("(the|an?) ", label, re.I)
    inner_capital = re.match("[A-Z][a-z]", head) and re.search("[a-z -][A-Z][a-z]", label)
    if has_article or inner_capital:  # the sea; Eiffel Tower, Statue of Liberty, YouTube
        return "bare"
    word = head.lower()
    if word in KINDS:
        return KINDS[word]
    if re.search("(ing|ics)$", word):
        return "bare"
    return "plural" if re.search("[^sui]s$", word) else "singular"


def plural(label):
    """Plural of a label: two dogs, cups of tea, passers-by; what is not counted stays as it is."""
    if kind_of(label) != "singular":
        return label
    head = TAIL.sub("", label)
    tail = label[len(head):]
    if IRREGULAR_ENDING.search(head):
        return IRREGULAR_ENDING.sub(lambda match: IRREGULAR[match[0].lower()], head) + tail
    if re.search("[^aeiou]y$", head):
        return f"{head[:-1]}ies{tail}"
    return head + ("es" if re.search("(s|x|z|ch|sh|ato|mango|volcano)$", head) else "s") + tail


def with_article(label, kind=None):
    """an apple, a unicorn, a UFO, an MRI scanner, a cup of tea, skis, snow, dancing, the sky"""
    kind = kind or kind_of(label)
    if kind == "the":
        return f"the {label}"
    if kind != "singular":
        return label
    first = re.match(r"\w*", label)[0]
    spelled = first.isupper() or not re.search(r"[aeiouy\d]", first, re.I)  # MRI, tv, x-ray
    vowel = first[:1].upper() in SPELLED_WITH_VOWEL if spelled else VOWEL_SOUND.match(label)
    return f"an {label}" if vowel else f"a {label}"


def fill_template(template, label):
    """The prompt for a label; "a {}" becomes what is English: an apple, skis, snow, the sky.

    "the {}" and "a large {}" lose what a name does not take: Eiffel Tower, the sea."""
    kind = kind_of(label)

    def noun(match):
        article, adjective = match[1].lower(), match[2] or ""
        if kind in ("bare", "adjective"):
            return label
        if article == "the":
            return f"the {adjective}{label}"
        return with_article(adjective + label, kind)

    return re.sub(r"(?i)\b(an?|the) ([\w-]+ )?\{\}", noun, template).replace("{}", label)


def noun_phrases(label, kind, usable):
    """What a sentence may call a label: [(phrase, whether a plural verb follows)]."""
    plain = with_article(label, kind)
    if kind == "singular":
        one = 7 * [plain] + [f"{size} {label}" for size in usable(SIZES)]
        many = [f"{count} {plural(label)}" for count in usable(COUNTS)]
        return [(phrase, False) for phrase in one] + [(phrase, True) for phrase in many]
    if kind in ("plural", "crowd"):
        counts = usable(COUNTS if kind == "plural" else "some,many")
        return 3 * [(plain, True)] + [(f"{count} {label}", True) for count in counts]
    if kind == "pair":
        pairs = usable("a pair of,some")
        return [(f"{pair} {label}", pair == "some") for pair in pairs] + [(plain, True)]
    if kind == "adjective":
        return [(f"something {label}", False)]
    if kind == "mass" and usable("some"):
        return [(plain, False), (f"some {label}", False)]
    return [(plain, False)]


def listing(nouns):
    *others, last = [noun for noun, _ in nouns]
    return f"{', '.join(others)} and {last}" if others else last


# ---- which labels a text mentions

def words_of(text):
    return re.findall(r"[^\W_]+", text.lower())


def stems_of(text):
    """Words without their endings, roughly: walk, walks, walking; sit, sitting; see, seen."""
    words = [re.sub("ies$", "y", word) for word in words_of(text)]
    return [re.sub(r"(?<=..)(.)\1?(ing|ed|es|e|s|n)$", r"\1", word) for word in words]


def index_names(labels, split):
    """Names in the singular and the plural: {first word: [(all words, index of the label)]}."""
    names = {}
    for index, label in enumerate(labels):
        for name in {label, plural(label)}:
            words = split(name)
            if words:  # of an emoji or a sign there are none
                names.setdefault(words[0], []).append((words, index))
    return names


def mentioned(words, names):
    """The indices of the labels whose names are among the words."""
    return {label for start, word in enumerate(words) for name, label in names.get(word, ())
            if words[start:start + len(name)] == name}


# ---- sentences

def sentences_about(labels, count, seed=0):
    """Sentences that describe photos with 1 to 5 random labels, written from the names alone.

    labels: C names. -> sentences list[str] of length count, targets int8 [count, C] in {+1, -1}.
    Every label is written out, in the singular or the plural, and no other one is mentioned, but
    for nested names: who writes of a teddy bear or a dining table also writes "bear" or "table".
    (Words such as "and" cannot be avoided.) The same seed writes the same sentences.

    Where few labels have a capital, it makes a name: Paris takes no article."""
    generator = random.Random(seed)

    def pick(options):  # several times as fast as random.choice
        return options[int(generator.random() * len(options))]

    names = index_names(labels, words_of)
    stems = index_names(labels, stems_of)
    nested = [mentioned(words_of(label), names) for label in labels]

    @functools.cache
    def usable(phrases):  # they must not mention a label, in any form
        return [phrase for phrase in phrases.split(",")
                if not mentioned(stems_of(phrase), stems)]

    openings = usable(OPENINGS) or [""]
    positions = usable(POSITIONS) or ["with"]
    places = usable(PLACES) or ["there/too"]
    behind = usable(BEHIND) or [""]
    scenes, verbs, group_of = {}, {}, {}
    for group, (words, group_verbs, group_scenes) in GROUPS.items():
        scenes[group] = usable(group_scenes) or [""]
        verbs[group] = [verb.split("/") for verb in usable(group_verbs) or ["is there/are there"]]
        group_of.update((word, group) for word in words.split())
    groups = [group_of.get(TAIL.sub("", label.lower()), "") for label in labels]

    kinds = [kind_of(label) for label in labels]
    if 2 * sum(bool(re.match("[A-Z][a-z]", label)) for label in labels) < len(labels):
        kinds = ["bare" if re.match("[A-Z][a-z]+$", label) else kind
                 for label, kind in zip(labels, kinds)]
    phrases = [noun_phrases(label, kind, usable) for label, kind in zip(labels, kinds)]
    is_thing = [kind not in ("bare", "the", "adjective") for kind in kinds]  # beside another

    def sentence(chosen):
        nouns = [pick(phrases[label]) for label in chosen]
        (first, many), rest = nouns[0], nouns[1:]
        things = sum(is_thing[label] for label in chosen)
        group = groups[chosen[0]]
        shared = group if {groups[label] for label in chosen} == {group} else ""
        scene = pick(scenes[pick([shared, ""])]) if generator.random() < 0.6 else ""
        verb, be = pick(verbs[group])[many], "are" if many else "is"
        pattern = generator.random()
        if pattern < 0.25:
            return f"{pick(openings)} {listing(nouns)} {scene}"
        if pattern < 0.65 and things > 1:
            second, others = rest[0][0], rest[1:]
            if pattern < 0.35:
                body = f"{first} {pick(positions)} {second}"
            elif pattern < 0.55:
                body = f"{first} {pick([verb, be])} {pick(positions)} {second}"
            else:
                here, there = pick(places).split("/")
                body = f"{first} {be} {here} and {second} {there}"
            body += f", with {listing(others)} {pick(behind)}" if others else ""
        elif pattern < 0.75 and things and rest:
            body = f"there {be} {first}, with {listing(rest)} {pick(behind)}"
        elif pattern < 0.85 and things:
            body = f"there {be} {listing(nouns)}"
        else:
            body = f"{listing(nouns)} {pick(verbs[shared])[1] if rest else verb}"
        return f"{scene}, {body}" if scene and generator.random() < 0.3 else f"{body} {scene}"

    sentences = []
    targets = np.full((count, len(labels)), -1, dtype=np.int8)
    for row in range(count):
        chosen = generator.sample(range(len(labels)), generator.randint(1, min(5, len(labels))))
        chosen.sort(key=is_thing.__getitem__, reverse=True)  # stable: random but for this
        allowed = set().union(*(nested[label] for label in chosen))
        for _ in range(10):  # words that meet can make a name: "a bus stops", of bus and bus stop
            text = " ".join(sentence(chosen).split())
            if mentioned(words_of(text), names) <= allowed:
                break
        else:
            text = ", ".join(with_article(labels[label], kinds[label]) for label in chosen)
        sentences.append(f"{text[0].upper()}{text[1:]}.")
        targets[row, chosen] = 1
    return sentences, torch.from_numpy(targets)
