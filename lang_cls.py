"""CoMC: a multi-label image classifier that is trained on sentences alone.

Liu et al., "Language-driven Cross-modal Classifier for Zero-shot Multi-label Image Recognition",
ICML 2024. CLIP puts texts and images into one space, so that a classifier of text embeddings also
classifies images:

 1. texts: a language model, or a grammar, is told which labels to write about, so that every
    sentence comes with its targets;
 2. classifier: one linear layer on unit-length text embeddings plus Gaussian noise, which makes
    it tolerant of the gap between texts and images;
 3. ranking: every present label above every absent one, the sum over pairs of
    max(0, 1 - l_p + l_n);
 4. mapping: at test time an image embedding e is drawn towards the texts by what it is as a
    mixture of the labels' embeddings M [C, D],
        m(e) = normalise(softmax(e M^T / 0.01) M),   f(e) = 0.7 e + 0.3 m(e);
 5. two streams: the logits of the whole image and of its best locations, averaged.

    python lang_cls.py                                     # toy world, nothing to download
    python lang_cls.py --labels "owl, ice cream, traffic light" --output runs/mine  # no data set
    python lang_cls.py --predict photos/ --checkpoint runs/mine/best.pt
    python lang_cls.py --labels "owl, ice cream" --generate texts.jsonl \\
        --llm-url http://localhost:11434/v1 --llm-model NAME  # then train with --texts texts.jsonl

B images, L locations, C labels, D joint embedding. Targets: +1 present, -1 absent, 0 unknown.

Implementation details
 1. The text tower is frozen: every distinct text is embedded once and kept on disk, and training
    is a linear layer on a matrix.
 2. A ranking pair needs a present label: [present labels, C] margins, never [B, C, C].
 3. All rows of the table are scored in one pass over the images.
Where this differs from the paper
 1. Sentences come from a built-in grammar unless --texts names a file; --generate has a language
    model write one.
 2. The prompt templates are our own, some forty; --templates loads others.
 3. The last epoch is reported; --val-fraction selects on held-out sentences, never on test images.
"""
import argparse
import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import clip_model
import data
import metrics
from data import UserError

# what the paper trains with, and what the toy world's small CLIP asks for (the learning rate was
# chosen on scenes of their own, not on the test scenes)
PAPER = {"clip": "RN50", "epochs": 20, "batch_size": 512, "lr": 1e-3, "noise": 0.1,
         "sentences": 40_000, "workers": 8}
TOY = {"clip": "toy-RN", "epochs": 20, "batch_size": 512, "lr": 5e-3, "noise": 0.1,
       "sentences": 40_000, "workers": 0}
# the labels, by category id, of the classifier that the authors published
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")


# ---------------------------------------------------------------------------------------------
# model

def map_to_text(embeddings, memory, temperature=0.01):
    """Unit-length embeddings [..., D] as mixtures of label embeddings -> [..., D], unit length.

    memory: [M, D], one unit-length text embedding per label. The weights are a softmax over the
    cosines divided by the temperature (Liu et al., 2024, cross-modal mapping)."""
    weights = (embeddings @ memory.T / temperature).softmax(dim=-1)  # [..., M]
    return F.normalize(weights @ memory, dim=-1)



class CoMC(nn.Module):
    """A linear classifier without bias, weight [C, D], beside the labels' embeddings, memory
    [C, D] of unit length."""

    def __init__(self, weight, memory):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("memory", memory)

    def forward(self, embeddings):
        return embeddings @ self.weight.T

    def scores(self, global_, local, mapping_weight=0.3, streams="both"):
        """Unit-length embeddings [B, D] and [B, L, D] -> scores [B, C]: the mean of the whole
        image's and the best location's; streams: "both", or "global" or "local" alone."""
        def logits(embeddings):
            if mapping_weight:
                mapped = map_to_text(embeddings, self.memory)
                embeddings = (1 - mapping_weight) * embeddings + mapping_weight * mapped
            return self(embeddings)

        scores = []
        if streams != "local":
            scores.append(logits(global_))
        if streams != "global":
            scores.append(logits(local).amax(dim=1))  # [B, L, C] -> [B, C]
        return sum(scores) / len(scores)


@torch.no_grad()
def encode(clip, images, args):
    """Images -> unit-length CLIP's own global [B, D], CoMC's global [B, D] and local [B, L, D]
    embeddings. A ResNet pools CoMC's without positional embeddings."""
    images = images.to(args.device, non_blocking=True)
    with autocast(args):
        if isinstance(clip.visual, clip_model.VisionTransformer):
            global_, local = clip.encode_image_dense(images)
            own = global_
        else:  # two poolings of the same features
            features = clip.visual.features(images)
            own = clip.visual.attnpool(features)
            global_, local = clip.visual.attnpool(features, position=False, dense=True)
    return [F.normalize(x.float(), dim=-1) for x in (own, global_, local)]


# ---------------------------------------------------------------------------------------------
# losses

def ranking_loss(logits, targets):
    """Sum over (present p, absent n) of max(0, 1 - l_p + l_n), mean over the batch: a scalar.

    logits: float [B, C]. targets: [B, C] in {+1, -1}; rows without a present or without an absent
    label add nothing. Liu et al. (2024), their ranking loss with margin 1."""
    present = targets > 0
    row, label = present.nonzero(as_tuple=True)  # [P]; B x C x C is never built
    absent = logits.masked_fill(present, -torch.inf)
    margins = 1 - logits[row, label, None] + absent[row]  # [P, C]
    return margins.relu().sum() / len(logits)


# ---------------------------------------------------------------------------------------------
# texts: prompts, a grammar, files, a language model

TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "a photo with a {}.", "a scene with a {}."]
TEMPLATES += [f"a {kind} of a {{}}." for kind in (
    "picture", "snapshot", "close-up", "drawing", "painting", "sketch", "rendering", "cartoon")]
TEMPLATES += [f"a {quality} photo of a {{}}." for quality in (
    "good", "bad", "blurred", "sharp", "dark", "bright", "grainy", "cropped", "faded", "colorful",
    "tilted", "low-resolution", "black-and-white")]
TEMPLATES += [f"a photo of a {{}} {circumstance}." for circumstance in (
    "at night", "by day", "indoors", "outdoors", "in the background", "in the foreground",
    "among other things", "seen from above", "seen from afar", "at the edge", "half hidden")]


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark; UserError names a bad line."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8, save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def load_templates(path):
    """Prompt templates of a file, one a line with {} where the label goes; else UserError."""
    templates = [line.strip() for line in read_text(path).split("\n")]
    for number, template in enumerate(templates, 1):
        if template and "{}" not in template:
            raise UserError(f"{path}, line {number}: there is no {{}} for the label")
    if not any(templates):
        raise UserError(f"{path}: there are no templates")
    return [template for template in templates if template]


def fill_template(template, label):
    """The prompt for a label; "a {}" becomes what is English: an apple, skis, snow, the sky."""
    prompt = re.sub(r"(?i)\ban? \{\}", lambda _: with_article(label), template)
    return prompt.replace("{}", label)


def template_sentences(labels, templates=TEMPLATES):
    """For each label "a photo of a {}." nine times, and every template once (Liu et al., 2024).

    -> sentences list[str], targets int8 [N, C] in {+1, -1}."""
    templates = 9 * TEMPLATES[:1] + list(templates)
    sentences = [fill_template(template, label) for label in labels for template in templates]
    targets = 2 * torch.eye(len(labels), dtype=torch.int8) - 1
    return sentences, targets.repeat_interleave(len(templates), dim=0)


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


def grammar_sentences(labels, count, seed=0):
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


SYNONYMS = [{name.replace("_", " ") for name in group.split()} for group in """
    person man woman boy girl child kid player rider, airplane aeroplane plane jet, boat ship,
    bicycle bike, motorcycle motorbike, car automobile, couch sofa, refrigerator fridge, ocean sea,
    tv television tvmonitor monitor, cell_phone phone smartphone, dining_table diningtable table,
    potted_plant pottedplant plant, donut doughnut, hair_drier hair_dryer hairdryer""".split(",")]
REFUSAL = re.compile(r"((i['’]?m|i am) )?(very |so )?(sorry|unable|not able)|i can ?(not|['’]?t)|"
                     r"i (won['’]?t|apologi)|as an (ai|artificial)|unfortunately|my apolog", re.I)


def read_json(path):
    """The entries of a JSON list or of JSON lines: [(where it is, entry)], else UserError."""
    text, line, entries = read_text(path), 1, []
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}, entry {n}", entry) for n, entry in enumerate(json.loads(text), 1)]
        for line, content in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028
            if content.strip():
                entries.append((f"{path}, line {line}", json.loads(content)))
        return entries
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}, line {line}: not JSON: {error}") from None


def spellings(name, vocabulary):
    """What counts as a mention of a label: plural, singular, synonyms, and the last word of a
    longer name, except other labels of the vocabulary. Everything is as as_words has it."""
    others = {name.rpartition(" ")[2]}.union(*(group for group in SYNONYMS if name in group))
    names = {name, name.replace(" ", "")} | others - vocabulary
    for ending, singular in ("ies$", "y"), ("es$", ""), ("s$", ""):
        names |= {re.sub(ending, singular, word) for word in names}
    return {f" {word} " for word in names | set(map(plural, names))}


def load_texts(path, labels):
    """Sentences with their labels from a file; those of no use are dropped and counted.

    path: a JSON list of {"labels": ["dog", ...], "description": "..."}, or such an object a line.
    labels: C names, in upper or lower case. -> N sentences, targets int8 [N, C] in {+1, -1}, and a
    Counter {reason: number dropped}. UserError names file and line of what cannot be read, and the
    reasons if nothing is left."""
    index_of = {label.strip().lower(): index for index, label in enumerate(labels)}
    names = [as_words(label).strip() for label in labels]
    mentions = [spellings(name, set(names)) for name in names]
    sentences, drawn, dropped, known = [], [], Counter(), set()
    for where, entry in read_json(path):
        try:
            if not isinstance(entry["labels"], list):
                raise TypeError
            chosen = [index_of.get(label.strip().lower()) for label in entry["labels"]]
            sentence = (entry["description"] or "").encode(errors="ignore").decode()  # surrogates
        except (TypeError, KeyError, AttributeError):
            raise UserError(f'{where}: not {{"labels": ["..."], "description": "..."}}') from None
        sentence = " ".join(sentence.split())
        words = as_words(sentence)
        reason = ("no labels" if not chosen else
                  "unknown label" if None in chosen else
                  "empty" if words.isspace() else
                  "refusal" if REFUSAL.match(sentence) else
                  "duplicate" if words in known else
                  "label not mentioned" if not all(any(word in words for word in mentions[index])
                                                   for index in chosen) else None)
        if reason:
            dropped[reason] += 1
        else:
            known.add(words)
            sentences.append(sentence)
            drawn.append(chosen)
    if not sentences:
        raise UserError(f"{path}: no sentence of use, dropped are {dict(dropped)}")
    return sentences, as_targets(drawn, len(labels)), dropped


def draw_labels(labels, seed, index):
    """1 to 5 random labels for a request; the same whenever it is made."""
    generator = random.Random(f"{seed} {index}")
    return generator.sample(labels, generator.randint(1, min(5, len(labels))))


def ask_llm(url, model, labels, key, timeout):
    """The answer of an OpenAI-compatible endpoint asked for a sentence about these labels."""
    prompt = (f"Describe, in one sentence of at most 25 words, a photo that shows: "
              f"{', '.join(labels)}. Use each of these names as it is written here and mention no "
              f"other object. Answer with the sentence only.")
    content = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions",
                                     json.dumps(content).encode(),
                                     {"Content-Type": "application/json"})
    if key:  # unredirected: another host must not get it
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=timeout) as response:
        body = response.read()
    try:
        answer = json.loads(body)["choices"][0]["message"]["content"] or ""
        answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)  # reasoning models
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"not a chat completion: {body}") from None
    return " ".join(answer.split()).strip('" ')


def explain(error):
    """Exception of ask_llm -> message, seconds to wait if the server says so, and what to do:
    "retry" the request, "skip" it, or "stop" because all others would fail too."""
    if not isinstance(error, urllib.error.HTTPError):
        return f"{type(error).__name__}: {error}", None, "retry"
    code, message, wait = error.code, str(error), error.headers.get("Retry-After", "")
    with contextlib.suppress(OSError, http.client.HTTPException):
        message += " " + " ".join(error.read().decode(errors="replace").split())
    try:  # seconds or a date
        date = None if wait.isdigit() else parsedate_to_datetime(wait)
        wait = date.timestamp() - time.time() if date else int(wait)
    except (TypeError, ValueError):
        wait = None
    retry = code in (408, 409, 425, 429) or code >= 500
    return message, wait, "retry" if retry else "stop" if code in (401, 403, 404) else "skip"


def answered_requests(path, labels, seed):
    """Indices of the requests in a file of generate_sentences; a line cut by a kill is removed."""
    if not os.path.isfile(path):
        return set()
    with open(path, "r+b") as file:
        content = file.read()
        end, start = content.rfind(b"\n") + 1, b'{"request": '
        tail = content[end:]
        if tail and (tail.startswith(start) or start.startswith(tail)):
            try:
                json.loads(tail)
                file.write(b"\n")
            except ValueError:
                file.truncate(end)
    requests = set()
    for where, entry in read_json(path):
        if not isinstance(entry, dict) or not isinstance(entry.get("request"), int):
            raise UserError(f"{where}: not written by --generate, choose another file")
        if entry.get("labels") != draw_labels(labels, seed, entry["request"]):
            raise UserError(f"{where}: for other labels or another seed, choose another file")
        requests.add(entry["request"])
    return requests


def generate_sentences(path, labels, count, seed, url, model, requests=8, *, timeout=120,
                       delay=1.0, attempts=8, quiet=False):
    """Have a language model write `count` sentences -> the number of them that is still missing.

    url: base of an OpenAI-compatible endpoint, e.g. http://localhost:11434/v1. A key, if it needs
    one, is taken from the environment variable OPENAI_API_KEY. requests: how many at a time.
    Answers are appended to `path` as they arrive, {"request", "labels", "description"} a line,
    refusals and empty ones too, so that a restart asks only for what is missing. A failed request
    is repeated when the server says, else after `delay` seconds, twice that, and so on; after
    `attempts` it is left to the next start. UserError if the server cannot be found, wants
    another key or model, fails before its first answer, or fails more than `requests` in a row."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError("OPENAI_API_KEY: has characters that no key has")
    if not re.match("https?://.", url):
        raise UserError(f"--llm-url {url}: not an http:// or https:// address")
    lock, stop = threading.Lock(), threading.Event()
    received, failures, resume_at = 0, 0, 0.0  # failures: in a row

    def work(index):
        nonlocal received, failures, resume_at
        chosen = draw_labels(labels, seed, index)
        for attempt in range(attempts):
            if stop.wait(max(0, resume_at - time.monotonic())):
                return
            try:
                answer = ask_llm(url, model, chosen, key, timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                message, wait, action = explain(error)
                message = (message.replace(key, "***") if key else message)[:300]
                # a server that was never there is a wrong address
                if action != "retry" or type(error) is urllib.error.URLError and not received:
                    break
                progress.set_postfix_str(message[:50])
                jitter = random.uniform(0.5, 1.5)
                if wait is None:
                    stop.wait(min(60, delay * 2 ** attempt) * jitter)
                else:  # all of us wait
                    resume_at = max(resume_at, time.monotonic() + min(wait, 3600) + delay * jitter)
                continue
            with lock:
                line = {"request": index, "labels": chosen, "description": answer}
                file.write(json.dumps(line) + "\n")
                file.flush()
                received, failures = received + 1, 0
                progress.update()
            return
        with lock:
            failures += 1
            if action == "stop" or failures > requests or action == "retry" and not received:
                raise UserError(f"{url}: {message}; what was received is in {path}, the same "
                                f"command goes on from there")

    try:
        missing = sorted(set(range(count)) - answered_requests(path, labels, seed))
        with (open(path, "a", encoding="utf-8") as file,
              tqdm(total=count, initial=count - len(missing), disable=quiet or None) as progress,
              ThreadPoolExecutor(requests) as pool):
            try:
                for future in as_completed([pool.submit(work, index) for index in missing]):
                    future.result()
            except BaseException:  # Ctrl-C too: ask no more, but keep the answers in flight
                stop.set()
                progress.set_postfix_str("waiting for the last answers")
                pool.shutdown(cancel_futures=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return len(missing) - received


# ---------------------------------------------------------------------------------------------
# embeddings of the texts

@torch.no_grad()
def embed_texts(clip, texts, device="cpu", quiet=False):
    """Unit-length embeddings of texts, float32 [N, D] on the CPU; too long texts are cut.

    They are kept in $XDG_CACHE_HOME/clip_multilabel (~/.cache/clip_multilabel), under a hash of
    the texts in their order and of CLIP's weights; a damaged file is made anew."""
    unique = list(dict.fromkeys(texts))
    key = hashlib.sha256(json.dumps([clip.fingerprint(), unique]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clip_multilabel"
    cache, embeddings = folder / f"texts-{key[:32]}.pt", None
    with contextlib.suppress(Exception):  # whatever is wrong with the file
        saved = torch.load(cache, weights_only=True)
        if saved["sha256"] == hashlib.sha256(saved["embeddings"].numpy().tobytes()).hexdigest():
            embeddings = saved["embeddings"]
    if embeddings is None:
        tokens = clip.tokenize(unique, truncate=True)
        embeddings = torch.empty(len(unique), clip.text_projection.shape[1])
        by_length = tokens.argmax(dim=1).argsort(stable=True).split(256)  # little padding
        for rows in data.progress(by_length, "embedding texts", quiet):
            embeddings[rows] = F.normalize(clip.encode_text(tokens[rows].to(device)).float(),
                                           dim=-1).cpu()
        digest = hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()
        temporary = f"{cache}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            data.write_file(temporary, {"sha256": digest, "embeddings": embeddings})
            os.replace(temporary, cache)
        except (OSError, UserError) as error:
            print(f"{error}; the next start has to embed the texts again", file=sys.stderr)
    row = {text: index for index, text in enumerate(unique)}
    return embeddings[[row[text] for text in texts]]


def training_texts(labels, args):
    """-> sentences list[str], targets int8 [N, C] of --sources."""
    sentences, targets = [], []
    if args.sources != "templates" and args.texts:
        texts, present, dropped = load_texts(args.texts, labels)
        print(f"{args.texts}: {len(texts):,} sentences"
              + "".join(f", {count:,} dropped: {reason}" for reason, count in dropped.items()))
        sentences, targets = texts[:args.sentences], [present[:args.sentences]]
    elif args.sources != "templates":
        sentences, present = grammar_sentences(labels, args.sentences, args.seed)
        targets = [present]
    if args.sources != "sentences":
        prompts, present = template_sentences(labels, prompt_templates(args))
        sentences, targets = sentences + prompts, [*targets, present]
    return sentences, torch.cat(targets)


def prompt_templates(args):
    return load_templates(args.templates) if args.templates else TEMPLATES


def label_embeddings(clip, labels, templates, args):
    """Mean over the templates of unit-length embeddings, of unit length again: [C, D]."""
    prompts = [fill_template(template, label) for label in labels for template in templates]
    embeddings = embed_texts(clip, prompts, args.device, args.quiet)
    return F.normalize(embeddings.unflatten(0, (len(labels), -1)).mean(dim=1), dim=-1)


# ---------------------------------------------------------------------------------------------
# train

def learning_rate(epoch, peak, epochs):
    """1e-5 in the first epoch, then half a cosine from the peak towards 0, a step an epoch."""
    return 1e-5 if epoch == 0 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def train(model, embeddings, targets, args, state):
    """Embeddings [N, D] with targets [N, C], epoch by epoch, from wherever `state` is.

    Every epoch seeds its own shuffling and noise, so a resumed run repeats the epoch it was
    killed in exactly."""
    embeddings, targets = embeddings.to(args.device), targets.to(args.device)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    held_out, kept = order.tensor_split([math.ceil(args.val_fraction * len(order))])
    if not len(kept):
        raise UserError(f"--val-fraction {args.val_fraction} leaves no sentence to train with")
    optimizer = torch.optim.Adam([model.weight], lr=args.lr)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["epoch"], args.epochs):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        begin, history = time.time(), []
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.lr, args.epochs)
        for rows in kept[torch.randperm(len(kept))].split(args.batch_size):
            batch = embeddings[rows]
            loss = ranking_loss(model(batch + args.noise * torch.randn_like(batch)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach()[None])
        means = data.finite_means(history, ["loss"], f"epoch {epoch + 1}", args.output)
        line = {"epoch": epoch + 1, **means, "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.time() - begin}
        if len(held_out):
            with torch.no_grad():
                line["val_mAP"] = metrics.mean_average_precision(
                    model(embeddings[held_out]), targets[held_out])
        state.update(epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        data.finish_epoch(args.output, state, line, args.quiet)


# ---------------------------------------------------------------------------------------------
# evaluate

@torch.no_grad()
def evaluate(clip, model, dataset, args):
    """The rows of the table: CLIP as it is, CoMC without its parts, CoMC."""
    plain = label_embeddings(clip, dataset.labels, TEMPLATES[:1], args).to(args.device)
    scorers = {}
    for title, texts in ((f'"{TEMPLATES[0]}"', plain), ("mean of templates", model.memory)):
        for stream in ("global", "local", "both"):
            def zero_shot(own, global_, local, index, texts=texts, stream=stream):
                scores = {"global": own @ texts.T, "local": (local @ texts.T).amax(dim=1)}
                scores["both"] = (scores["global"] + scores["local"]) / 2
                return scores[stream][:, index]
            scorers[f"zero-shot, {stream}, {title}"] = zero_shot
    settings = {"CoMC": (args.mapping_weight, args.streams)}
    if args.streams == "both":
        settings = {"CoMC, global alone": (args.mapping_weight, "global"),
                    "CoMC, local alone": (args.mapping_weight, "local"), **settings}
    if args.mapping_weight:
        settings = {"CoMC without mapping": (0.0, args.streams), **settings}
    for name, setting in settings.items():
        scorers[name] = lambda own, global_, local, index, setting=setting: model.scores(
            global_, local, *setting)[:, index]
    loader = data.make_loader(dataset, image_batches(args))
    encoder = torch.compile(encode) if args.compile else encode
    results = metrics.evaluate(
        lambda images: encoder(clip, images, args), scorers,
        data.progress(loader, "evaluating", args.quiet), dataset.targets,
        {"": torch.arange(len(dataset.labels))}, (3, 5))
    kind = {"CoMC": "method", **{name: "ablation" for name in settings if name != "CoMC"}}
    return [{"name": name, "kind": kind.get(name, "zero-shot"), **row}
            for name, row in results.items()]


def image_batches(args):
    """--batch-size counts sentences, of which far more fit than images."""
    return argparse.Namespace(**{**vars(args), "batch_size": min(args.batch_size or 64, 64)})


# ---------------------------------------------------------------------------------------------
# predict

@torch.no_grad()
def predict(args):
    """Print a JSON object per image: its path, and the labels with scores, best first."""
    files = data.image_files(args.predict)
    clip, model, preprocess, state = load_checkpoint(args.checkpoint, args)
    labels, size = state["labels"], image_batches(args).batch_size
    for i in data.progress(range(0, len(files), size), "predicting", args.quiet):
        images = torch.stack([preprocess(data.open_image(file)) for file in files[i:i + size]])
        _, global_, local = encode(clip, images, args)
        scores = model.scores(global_, local, args.mapping_weight, args.streams).cpu()
        for file, row in zip(files[i:], scores):
            ranking = row.argsort(descending=True, stable=True).tolist()
            print(json.dumps({"path": str(file), "labels": [
                {"label": labels[j], "score": round(row[j].item(), 4)} for j in ranking]},
                ensure_ascii=False))


# ---------------------------------------------------------------------------------------------
# arguments

def parse_arguments(arguments=None):
    parser = data.Parser(description="\n\n".join(__doc__.split("\n\n")[:4]),
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    number = data.number

    def add(name, type, text):  # an option whose value the paper and the toy world may differ in
        group.add_argument("--" + name.replace("_", "-"), type=type,
                           help=f"{text} (paper: {PAPER[name]}, toy: {TOY[name]})")

    group = parser.add_argument_group("model")
    add("clip", str, "a name of clip_model.available_models() or a path to weights")
    group.add_argument("--mapping-weight", type=number(float, 0, 1),
                       help="share of the mapped embedding (default: 0.3; 0 leaves mapping out)")
    group.add_argument("--streams", choices=["both", "global", "local"],
                       help="which of the two scores count (default: both)")
    group = parser.add_argument_group("texts")
    group.add_argument("--labels", help='train for these, without a dataset: "owl, ice cream"')
    group.add_argument("--texts", metavar="FILE", help='JSON, a list or one a line, of {"labels": '
                       '["..."], "description": "..."}, instead of the grammar\'s sentences')
    group.add_argument("--sources", choices=["both", "sentences", "templates"], default="both",
                       help="what to train with (default: both)")
    add("sentences", number(int, 1), "how many the grammar writes, or the first of --texts")
    group.add_argument("--templates", metavar="FILE", help="prompts, one a line with {} in it")
    group.add_argument("--generate", metavar="OUT.jsonl", help="have a language model write "
                       "--sentences about the labels, for --texts; a repeated call continues")
    group.add_argument("--llm-url", help="of an OpenAI-compatible server, e.g. "
                       "http://localhost:11434/v1; a key is read from OPENAI_API_KEY")
    group.add_argument("--llm-model", help="the server's name of the language model")
    group.add_argument("--llm-requests", type=number(int, 1, 256), default=8,
                       help="at a time (default: 8)")
    group = parser.add_argument_group("optimization")
    add("epochs", number(int, 1), "of which the first warms up")
    add("batch_size", number(int, 1), "sentences")
    add("lr", number(float, 0), "peak learning rate")
    add("noise", number(float, 0), "standard deviation, added to text embeddings; 0 leaves it out")
    data.add_run_arguments(parser, "lang_cls")
    args = parser.parse_args(arguments)
    if args.predict and not args.checkpoint:
        raise UserError("--predict needs --checkpoint FILE")
    if args.labels is not None:
        args.labels = data.parse_labels(args.labels)
        if args.predict or args.eval:
            raise UserError("--labels are for training: a checkpoint scores its own labels only")
    if args.labels and args.data not in (None, "toy"):
        raise UserError(f"--labels and --data {args.data} both name labels: give one of them")
    if args.generate and not (args.llm_url and args.llm_model):
        raise UserError("--generate needs --llm-url URL and --llm-model NAME")
    if args.texts and args.sources == "templates":
        raise UserError("--texts and --sources templates: the file would not be used")
    return args


def fill_defaults(args):
    if not args.labels:
        args.data = args.data or "toy"
    for name, value in (TOY if args.data == "toy" else PAPER).items():
        if getattr(args, name) is None and not (name == "sentences" and args.texts):
            setattr(args, name, value)
    args.mapping_weight = 0.3 if args.mapping_weight is None else args.mapping_weight
    args.streams = args.streams or "both"
    args.output = args.output or f"runs/lang_cls-{'labels' if args.labels else args.data}"


# ---------------------------------------------------------------------------------------------
# main

def load_checkpoint(path, args):
    """-> (CLIP, CoMC, preprocess, state). UserError for what is no checkpoint or of another CLIP.

    The authors' classifier, {"adapter.0.weight": [80, 1024]} for COCO's labels, loads too.
    --mapping-weight and --streams are the checkpoint's unless given."""
    state = None
    with contextlib.suppress(Exception):  # anything else is read_checkpoint's to explain
        state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and set(state) == {"adapter.0.weight"}:
        return load_published(path, state["adapter.0.weight"], args)
    state = data.read_checkpoint(path, "lang_cls")
    if args.clip not in (None, state["clip"]):
        raise UserError(f"{path} belongs to --clip {state['clip']}, not {args.clip}")
    clip, preprocess = clip_model.load(state["clip"], args.device)
    if clip.fingerprint() != state["clip_fingerprint"]:
        raise UserError(f"{path} belongs to other weights than {state['clip']} has now")
    for name in ("mapping_weight", "streams"):
        if getattr(args, name) is None:
            setattr(args, name, state["args"][name])
    model = CoMC(state["model"]["weight"], state["model"]["memory"]).to(args.device)
    return clip, model, preprocess, state


def load_published(path, weight, args):
    args.clip = args.clip or PAPER["clip"]
    clip, preprocess = clip_model.load(args.clip, args.device)
    expected = [len(COCO), clip.text_projection.shape[1]]
    if list(weight.shape) != expected:
        raise UserError(f"{path}: the classifier is {list(weight.shape)}, --clip {args.clip} and "
                        f"COCO's labels ask for {expected} (the authors' CLIP is RN50)")
    args.mapping_weight = 0.3 if args.mapping_weight is None else args.mapping_weight
    args.streams = args.streams or "both"
    memory = label_embeddings(clip, COCO, prompt_templates(args), args)
    state = {"method": "lang_cls", "data": "coco", "clip": args.clip, "labels": COCO,
             "seconds": 0.0}
    return clip, CoMC(weight.float(), memory).to(args.device), preprocess, state


def autocast(args):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=args.precision != "fp32")


def generate(args):
    """Have a language model write the sentences of --generate."""
    labels = args.labels or data.load_split("test", None, args).labels
    missing = generate_sentences(args.generate, labels, args.sentences, args.seed, args.llm_url,
                                 args.llm_model, args.llm_requests, quiet=args.quiet)
    print(f"{args.generate}: {missing} answers are missing, the same command asks for them again"
          if missing else f"train with --texts {args.generate}")


def run(args):
    """Train, unless --eval, and evaluate -> the results that results.json holds."""
    begin, keep = time.time(), bool(args.output or not args.eval)
    if args.eval:
        data.check_new(args.output)
        clip, model, preprocess, state = load_checkpoint(args.eval, args)
        args.data, args.clip = args.data or state["data"], state["clip"]
        if args.data == "labels":
            raise UserError(f"{args.eval} was trained for --labels: name a dataset with --data")
    fill_defaults(args)
    if not args.labels:
        data.check_root(args.data, args.root)
    if args.generate:
        return generate(args)
    if args.resume:
        clip, model, preprocess, state = load_checkpoint(f"{args.output}/last.pt", args)
        data.check_same(args, state["args"], (*PAPER, *data.SAME, "labels", "texts", "templates",
                                              "sources", "mapping_weight", "streams"))
    elif not args.eval:
        clip, preprocess = clip_model.load(args.clip, args.device)
    test = None if args.labels else data.load_split("test", preprocess, args)
    if not args.eval:
        labels = args.labels or test.labels
        sentences, targets = training_texts(labels, args)
        print(f"{args.clip}: {len(labels)} labels, {len(sentences):,} texts to train with, "
              f"{len(set(sentences)):,} distinct", flush=True)
        embeddings = embed_texts(clip, sentences, args.device, args.quiet)
        digest = hashlib.sha256(json.dumps(sentences).encode()).hexdigest()
        if args.resume and state["texts"] != digest:
            raise UserError(f"--resume: the run in {args.output} was started with other texts")
        if not args.resume:
            torch.manual_seed(args.seed)
            memory = label_embeddings(clip, labels, prompt_templates(args), args)
            weight = nn.Linear(memory.shape[1], len(labels), bias=False).weight.detach()
            model = CoMC(weight, memory).to(args.device)
            state = {"method": "lang_cls", "data": args.data or "labels", "clip": args.clip,
                     "labels": labels, "clip_fingerprint": clip.fingerprint(), "args": vars(args),
                     "texts": digest, "epoch": 0, "optimizer": None, "log": [], "seconds": 0.0}
            data.start_run(args)
        train(model, embeddings, targets, args, state)
        best = data.read_checkpoint(f"{args.output}/best.pt", "lang_cls")
        model.load_state_dict(best["model"])
    rows = []
    if test is not None:
        data.check_labels(test, state)
        rows = evaluate(clip, model, test, args)
        metrics.print_table(rows)
        if test.missing:
            print(f"{test.missing} test images are missing: not comparable with complete results")
    print(f"{time.time() - begin:.0f} s" + f"; results and checkpoints: {args.output}" * keep)
    return data.write_results("lang_cls", args, state, rows, keep)


def main(arguments=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = parse_arguments(arguments)
        return predict(args) if args.predict else run(args)
    except (UserError, clip_model.ClipError) as error:
        print(f"lang_cls.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues after the last finished epoch, the same command "
              "after the last answer to --generate", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
