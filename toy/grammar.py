"""The toy language model: sentences that describe photos, written by a grammar from label names.

    sentences, targets = sentences_about(["dog", "ice cream", "skis"], count=1000, seed=0)
    fill_template("a photo of a {}.", "umbrella")   # "a photo of an umbrella."

A stand-in for the language model that CoMC has write its training texts.
"""
import random
import re

import torch

# what is written about a label follows from its last word; unlisted nouns are singular, or plural
KINDS = {
    "singular": """building wedding ring king wing painting ceiling earring string railing swing
        drawing crossing pudding lens gas canvas christmas""",
    "plural": "people men women children mice feet teeth geese taxis",
    "crowd": "police cattle",  # plural, but not counted
    "pair": """scissors skis glasses sunglasses eyeglasses goggles binoculars pants trousers jeans
        shorts headphones""",
    "mass": """grass snow water sand food frost fire rain ice fog smoke bread cheese rice milk wine
        beer coffee tea juice meat butter cream broccoli corn spinach pasta furniture luggage
        clothing jewelry graffiti coral mud hay""",
    "bare": "sports soccer tennis football basketball baseball golf nighttime nature art fashion",
    "the": "sky sun moon ocean sea horizon ground military surf",
}
KINDS = {word: kind for kind, words in KINDS.items() for word in words.split()}
IRREGULAR = dict(pair.split("/") for pair in """person/people man/men human/humans child/children
    mouse/mice tooth/teeth foot/feet goose/geese mongoose/mongooses knife/knives leaf/leaves
    wolf/wolves shelf/shelves loaf/loaves calf/calves scarf/scarves thief/thieves cactus/cacti
    sheep/sheep deer/deer fish/fish elk/elk moose/moose aircraft/aircraft""".split())
IRREGULAR_ENDING = re.compile(f"({'|'.join(IRREGULAR)})$", re.I)  # also of bookshelf, reindeer
VOWEL_SOUND = re.compile(r"(?!eu|ew|one\b|u[knrst][aeiou])[aeiou]|hour|heir|x-?ray|suv\b", re.I)

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
COUNTS = "two,three,four,five,several,a few,some,many".split(",")
OPENINGS = ("a photo of,a picture of,a snapshot of,a view of,an image with,a scene with,"
            "the photo shows,the picture shows,this is a photo of,someone took a picture of")
POSITIONS = ("next to,beside,near,close to,in front of,behind,to the left of,to the right of,"
             "not far from,across from")
PLACES = ("on the left/on the right,on the right/on the left,in the foreground/in the background,"
          "in front/further back,at the top/at the bottom,in the center/at the edge")
BEHIND = "in the background,behind,nearby,in the distance,to one side,in the same picture"


def plural(label):
    """Plural of a singular noun; of several words, the last one is inflected."""
    if IRREGULAR_ENDING.search(label):
        return IRREGULAR_ENDING.sub(lambda match: IRREGULAR[match[0].lower()], label)
    if re.search(r"[^aeiou]y$", label):
        return f"{label[:-1]}ies"
    return label + ("es" if re.search(r"(s|x|z|ch|sh|ato|mango|volcano)$", label) else "s")


def kind_of(label):
    """How English treats a noun: a value of KINDS."""
    word = label.lower().split()[-1]
    guess = ("bare" if re.search(r"(ing|ics)$", word) else
             "plural" if re.search(r"[^suia]s$", word) else "singular")
    return KINDS.get(word, guess)


def with_article(label):
    """an apple, a unicorn, skis, snow, dancing, the sky"""
    article = {"singular": "an " if VOWEL_SOUND.match(label) else "a ", "the": "the "}
    return article.get(kind_of(label), "") + label


def noun_phrases(label):
    """What a sentence may call a label: [(phrase, whether a plural verb follows)]."""
    kind, plain = kind_of(label), with_article(label)
    if kind == "singular":
        one = 7 * [plain] + [f"{article} {label}" for article in ("a small", "a large", "one")]
        many = plural(label)
        return [(noun, False) for noun in one] + [(f"{count} {many}", True) for count in COUNTS]
    if kind in ("plural", "crowd"):
        counts = COUNTS if kind == "plural" else ["some", "many"]
        return 3 * [(plain, True)] + [(f"{count} {label}", True) for count in counts]
    if kind == "pair":
        return [(f"a pair of {label}", False), (f"some {label}", True), (plain, True)]
    return [(plain, False)] + [(f"some {label}", False)] * (kind == "mass")


# prompt templates of our own


def fill_template(template, label):
    """The prompt for a label; "a {}" becomes what is English: an apple, skis, snow, the sky."""
    prompt = re.sub(r"(?i)\ban? \{\}", lambda _: with_article(label), template)
    return prompt.replace("{}", label)


def listing(nouns):
    *others, last = [noun for noun, _ in nouns]
    return f"{', '.join(others)} and {last}" if others else last


def as_words(text):
    """Lower-case words between single spaces, with one at each end; punctuation is dropped."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


def as_targets(chosen, count):
    """List of N lists of label indices -> int8 [N, count], +1 for these and -1 elsewhere."""
    targets = torch.full((len(chosen), count), -1, dtype=torch.int8)
    rows = [row for row, indices in enumerate(chosen) for _ in indices]
    targets[rows, [index for indices in chosen for index in indices]] = 1
    return targets


def sentences_about(labels, count, seed=0):
    """Sentences that describe photos with 1 to 5 random labels, written from the names alone.

    labels: C names. -> sentences list[str] of length count, targets int8 [count, C] in {+1, -1}.
    Every label is written out, in the singular or the plural, and no other one is mentioned. The
    same seed writes the same sentences."""
    generator = random.Random(seed)

    def pick(options):  # several times as fast as random.choice
        return options[int(generator.random() * len(options))]

    names = {as_words(name) for label in labels for name in (label, plural(label))}

    def usable(phrases):  # they must not mention a label that is not a target
        phrases = {phrase: as_words(phrase) for phrase in phrases.split(",")}
        return ([phrase for phrase, words in phrases.items()
                 if not any(name in words for name in names)] or list(phrases))

    openings, positions, places, behind = map(usable, (OPENINGS, POSITIONS, PLACES, BEHIND))
    scenes = {group: usable(scenes) for group, (_, _, scenes) in GROUPS.items()}
    verbs = {group: [verb.split("/") for verb in verbs.split(",")]
             for group, (_, verbs, _) in GROUPS.items()}
    group_of = {word: group for group, (words, _, _) in GROUPS.items() for word in words.split()}
    groups = [group_of.get(label.lower(), "") for label in labels]
    phrases = [noun_phrases(label) for label in labels]
    is_thing = [kind_of(label) not in ("bare", "the") for label in labels]  # can be beside another

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

    sentences, drawn = [], []
    for _ in range(count):
        chosen = generator.sample(range(len(labels)), generator.randint(1, min(5, len(labels))))
        chosen.sort(key=is_thing.__getitem__, reverse=True)  # stable: random but for this
        text = sentence(chosen).strip()
        sentences.append(f"{text[0].upper()}{text[1:]}.")
        drawn.append(chosen)
    return sentences, as_targets(drawn, len(labels))
