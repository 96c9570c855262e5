"""lang_cls.py: the method's functions, the texts, and the generator against a local server."""
import email.utils
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clip_model
import data
import lang_cls
import metrics
from data import UserError

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")
# names that are plural, uncountable, activities, the only one, or words of the grammar itself
ODD = """birds, boats, buildings, people, police, grass, snow, water, food, dancing, running,
soccer, nighttime, sky, sun, moon, ocean, leaf, fish, whales, street, table, meadow, party, photo,
dusk, crowd, farm, skis, glass, glasses, wedding, hour, unicorn, x-ray machine""".replace(
    "\n", " ").split(", ")


# ---- the method's functions

def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_map_to_text_is_the_formula():
    torch.manual_seed(0)
    embeddings, memory = unit(2, 3, 8).requires_grad_(), unit(5, 8).requires_grad_()
    mapped = lang_cls.map_to_text(embeddings, memory, temperature=0.1)
    assert mapped.shape == (2, 3, 8)
    for b in range(2):
        for i in range(3):
            weights = [torch.exp(torch.dot(embeddings[b, i], m) / 0.1) for m in memory]
            mixture = sum(w * m for w, m in zip(weights, memory)) / sum(weights)
            torch.testing.assert_close(mapped[b, i], mixture / mixture.pow(2).sum().sqrt())
    assert torch.autograd.gradcheck(lambda e, m: lang_cls.map_to_text(e, m, 0.1),
                                    (embeddings, memory))


def test_map_to_text_at_its_default_temperature_finds_the_nearest_label():
    torch.manual_seed(0)
    memory = torch.linalg.qr(torch.randn(16, 16)).Q  # cosines of different labels are 0
    label = torch.randint(16, (4, 7))
    embeddings = F.normalize(memory[label] + 0.05 * torch.randn(4, 7, 16), dim=-1)
    torch.testing.assert_close(lang_cls.map_to_text(embeddings, memory), memory[label])


def pairwise_ranking_loss(logits, targets):
    pairs = (targets[:, :, None] > 0) & (targets[:, None, :] < 0)  # [B, present, absent]
    margins = (1 - logits[:, :, None] + logits[:, None, :]).clamp(min=0)
    return (margins * pairs).sum() / len(logits)


def random_targets(batch, labels, present):
    targets = torch.full((batch, labels), -1, dtype=torch.int8)
    for row in targets:
        row[torch.randperm(labels)[:torch.randint(1, present + 1, ())]] = 1
    return targets


def test_ranking_loss_and_gradient_equal_the_pairwise_form():
    torch.manual_seed(0)
    targets = random_targets(32, 20, 5)
    targets[3], targets[4] = 1, -1  # nothing absent, nothing present: no pairs
    logits = torch.randn(32, 20, dtype=torch.float64, requires_grad=True)
    loss, expected = lang_cls.ranking_loss(logits, targets), pairwise_ranking_loss(logits, targets)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][3:5].any()


def test_ranking_loss_by_hand():
    logits, targets = torch.tensor([[2.0, 0.5, 1.5]]), torch.tensor([[1, 1, -1]])
    assert lang_cls.ranking_loss(logits, targets) == 0.5 + 2.0
    assert lang_cls.ranking_loss(torch.tensor([[9.0, 0.0]]), torch.tensor([[1, -1]])) == 0


def test_ranking_loss_keeps_no_pair_of_all_labels():
    targets = random_targets(32, 500, 5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t,
                                                  lambda t: t):
        lang_cls.ranking_loss(torch.randn(32, 500, requires_grad=True), targets)
    assert 0 < max(saved) <= 32 * 5 * 500  # and not 32 * 500 * 500


# ---- prompts

def test_templates_are_distinct_and_fit_every_kind_of_label():
    assert len(set(lang_cls.TEMPLATES)) == len(lang_cls.TEMPLATES) >= 24
    assert lang_cls.TEMPLATES[0] == "a photo of a {}."
    for label, expected in {
            "dog": "a photo of a dog.", "apple": "a photo of an apple.",
            "umbrella": "a photo of an umbrella.", "unicycle": "a photo of a unicycle.",
            "hourglass": "a photo of an hourglass.", "tv": "a photo of a tv.",
            "skis": "a photo of skis.", "snow": "a photo of snow.", "birds": "a photo of birds.",
            "sky": "a photo of the sky.", "dancing": "a photo of dancing.",
            "glass": "a photo of a glass.", "orange juice": "a photo of orange juice.",
            "wedding ring": "a photo of a wedding ring.", "bus": "a photo of a bus."}.items():
        assert lang_cls.fill_template("a photo of a {}.", label) == expected
    assert lang_cls.fill_template("An {} or {{}}: {}", "dog") == "a dog or {dog}: dog"


def test_template_sentences_count_and_targets():
    sentences, targets = lang_cls.template_sentences(["dog", "ear"], ["one {}", "two {}"])
    assert sentences == 9 * ["a photo of a dog."] + ["one dog", "two dog"] + \
        9 * ["a photo of an ear."] + ["one ear", "two ear"]
    assert targets.dtype == torch.int8
    assert targets.tolist() == 11 * [[1, -1]] + 11 * [[-1, 1]]


def test_load_templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_bytes("\ufeffa photo of a {}.\r\n\r\nein Foto: {}\r\n".encode())
    assert lang_cls.load_templates(path) == ["a photo of a {}.", "ein Foto: {}"]
    for content, message in {b"a {}\nno place\n": "line 2: .*{}", b"\n": "no templates",
                             b"a {}\nb {}\n\xff {}": "line 3: not UTF-8"}.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            lang_cls.load_templates(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="nowhere.txt: No such file"):
        lang_cls.load_templates("nowhere.txt")


# ---- the grammar

@pytest.mark.parametrize("singular, expected", [pair.split("/") for pair in """
    dog/dogs bus/buses box/boxes bench/benches toothbrush/toothbrushes knife/knives pony/ponies
    monkey/monkeys person/people snowman/snowmen woman/women human/humans mouse/mice tooth/teeth
    bookshelf/bookshelves giraffe/giraffes potato/potatoes piano/pianos sheep/sheep leaf/leaves
    reindeer/reindeer goldfish/goldfish toy/toys vase/vases wine_glass/wine_glasses zebra/zebras
    teddy_bear/teddy_bears Church/Churches fox/foxes cell_phone/cell_phones""".split()])
def test_plural(singular, expected):
    assert lang_cls.plural(singular.replace("_", " ")) == expected.replace("_", " ")


def test_grammar_targets_are_the_labels_mentioned():
    # no label is a part of another one here, so that searching for the names is enough
    labels = [label for label in COCO + ODD if label not in (
        "dog", "bear", "table", "glass", "glasses", "person", "boat", "bird", "skis")]
    sentences, targets = lang_cls.grammar_sentences(labels, 3000, seed=1)
    assert targets.dtype == torch.int8 and targets.shape == (3000, len(labels))
    assert targets.unique().tolist() == [-1, 1]
    present = (targets > 0).sum(1)
    assert present.unique().tolist() == [1, 2, 3, 4, 5]
    assert (targets > 0).sum(0).min() > 0.4 * present.sum() / len(labels)
    patterns = [re.compile(rf"\b({re.escape(label)}|{re.escape(lang_cls.plural(label))})\b", re.I)
                for label in labels]
    for sentence, target in zip(sentences, targets):
        mentioned = [bool(pattern.search(sentence)) for pattern in patterns]
        assert mentioned == (target > 0).tolist(), sentence


@pytest.mark.parametrize("labels", [COCO, ODD], ids=["coco", "odd"])
def test_grammar_writes_english(labels):
    sentences, _ = lang_cls.grammar_sentences(labels, 20_000, seed=2)
    text = "\n".join(sentences)
    singular = "dog|person|knife|wine glass|teddy bear|cup|leaf|unicorn|hour"
    plural = r"people|dogs|knives|mice|wine glasses|teddy bears|leaves|birds|scissors|skis|boats"
    numbers = "two|three|four|five|several|a few|many"
    for mistake in (
            rf"\ban? ({plural})\b", rf"\b({numbers}|some) ({singular})\b", rf"^({singular})\b",
            r"\ban (?!(hour|x-ray|SUV))[^aeiou]", r"\ba (?!(unicorn|one))[aeiou]",
            rf"\bthere (is|'s) ({numbers})\b", r"\bthere are (a|an|one) (?!few)",
            r"\ba( pair of)? (grass|snow|broccoli|water|dancing|sky)\b",
            r"\b(some|one|two|a) (sky|sun|ocean|dancing|running|soccer|nighttime)\b",
            r"\b(two|three|four|five) (scissors|police)\b",
            r"\bthere is (the|dancing|soccer)\b", r"\b(next to|beside|close to) (the sky|dancing)\b",
            r"\b(sky|moon|ocean|dancing)( is)? (next to|beside|close to)\b",
            r"sheeps|peoples|mouses|knifes|fishs|leafs", r"  | [.,]|,,|\.\.|{|}|_|/",
            r"[^.]$", r"^[^A-Z]"):
        found = re.search(mistake, text, re.M | (re.I if mistake[0] == "\\" else 0))
        assert not found, (mistake, text[max(0, found.start() - 60):found.end() + 60])
    # subject and verb: a list of several, or a plural, is followed by "are", one thing by "is"
    for sentence in sentences:
        if match := re.match(r"(An?|One) ([a-z-]+ ){1,3}?(is|are) ", sentence):
            one_subject = " and " not in match[0] and "," not in match[0] and "few" not in match[0]
            assert match[3] == ("is" if one_subject else "are"), sentence
        if match := re.match(rf"({numbers}) [a-z ]+? (is|are) ", sentence, re.I):
            assert match[2] == "are", sentence


def test_grammar_is_seeded_and_varied():
    sentences, targets = lang_cls.grammar_sentences(COCO, 10_000, seed=3)
    again, same_targets = lang_cls.grammar_sentences(COCO, 10_000, seed=3)
    assert sentences == again and torch.equal(targets, same_targets)
    assert lang_cls.grammar_sentences(COCO, 10, seed=3)[0] == sentences[:10]
    assert lang_cls.grammar_sentences(COCO, 10, seed=4)[0] != sentences[:10]
    assert len(set(sentences)) > 9000
    assert len({sentence.split(" ")[0] for sentence in sentences}) > 20


def test_grammar_speed_and_few_labels():
    start = time.process_time()
    lang_cls.grammar_sentences(COCO, 20_000)
    assert time.process_time() - start < 1  # 0.25 in fact
    sentences, targets = lang_cls.grammar_sentences(["sky"], 50)
    assert (targets == 1).all() and all("he sky" in sentence for sentence in sentences)
    assert lang_cls.grammar_sentences(["sky", "dog"], 0)[1].shape == (0, 2)


# ---- sentences from files

ENTRIES = [
    {"labels": ["dog", "Cell Phone"], "description": "Two dogs  look at\na smartphone."},
    {"labels": ["person"], "description": "A woman smiles."},
    {"labels": ["hot dog"], "description": "Hot-dogs on a tray."},
    {"labels": [], "description": "An empty room."},
    {"labels": ["dog", "dragon"], "description": "A dog and a dragon."},
    {"labels": ["dog"], "description": " \n"},
    {"labels": ["dog"], "description": None},
    {"labels": ["dog"], "description": "I'm sorry, I cannot describe a dog."},
    {"labels": ["dog"], "description": "As an AI, I see no dog."},
    {"labels": ["person"], "description": "a woman smiles"},
    {"labels": ["dog", "cat"], "description": "A dog sleeps."},
    {"labels": ["hot dog"], "description": "A dog in the heat."},
    {"labels": ["cat"], "description": "A cathedral."},
]
DROPPED = {"no labels": 1, "unknown label": 1, "empty": 2, "refusal": 2, "duplicate": 1,
           "label not mentioned": 3}


@pytest.mark.parametrize("form", ["list", "indented list", "lines", "lines with BOM and CRLF"])
def test_load_texts_drops_and_counts(tmp_path, form):
    path = tmp_path / "texts"
    lines = "\n".join(map(json.dumps, ENTRIES))
    path.write_bytes({"list": json.dumps(ENTRIES), "indented list": json.dumps(ENTRIES, indent=1),
                      "lines": lines, "lines with BOM and CRLF":
                      "\ufeff" + lines.replace("\n", "\r\n") + "\r\n\r\n"}[form].encode())
    labels = ["person", "dog", "cat", "cell phone", "hot dog"]
    sentences, targets, dropped = lang_cls.load_texts(path, labels)
    assert sentences == ["Two dogs look at a smartphone.", "A woman smiles.",
                         "Hot-dogs on a tray."]
    assert targets.tolist() == [[-1, 1, -1, 1, -1], [1, -1, -1, -1, -1], [-1, -1, -1, -1, 1]]
    assert targets.dtype == torch.int8
    assert dropped == DROPPED


@pytest.mark.parametrize("label, description, mentioned", [
    ("birds", "A bird on a roof.", True), ("knife", "Knives on a board.", True),
    ("tv", "A television in a room.", True), ("sports ball", "A girl kicks a ball.", True),
    ("teddy bear", "A teddy-bear on a bed.", True), ("teddy bear", "A bear on a bed.", False),
    ("bus", "Busy people.", False), ("man", "A woman.", False), ("buses", "A bus.", True),
    ("butterflies", "A butterfly.", True), ("airplane", "A plane in the sky.", True)])
def test_what_counts_as_a_mention(tmp_path, label, description, mentioned):
    path = tmp_path / "texts.jsonl"
    always = {"labels": ["fork"], "description": "A fork."}
    entries = [always, {"labels": [label], "description": description}]
    path.write_text("\n".join(map(json.dumps, entries)))
    labels = [label, "fork", "bear", "woman", "ball game"]
    assert len(lang_cls.load_texts(path, labels)[0]) == 1 + mentioned


@pytest.mark.parametrize("content, message", [
    (b'{"labels": ["dog"], "description": "dog"}\n\n{"labels": \xff}', "line 3: not UTF-8"),
    ('{"labels": ["dog"]}'.encode("utf-16"), "line 1: not UTF-8"),
    (b'{"labels": ["dog"], "description": "dog"}\n{"labels": ["do', "line 2: not JSON"),
    (b'[{"labels": ["dog"], "description": "dog"},\n{"labels": "dog"', "line 2: not JSON"),
    (b"[" * 100_000, "line 1: not JSON"), (b"dog\ncat\n", "line 1: not JSON"),
    (b'{"labels": ["dog"], "description": "dog"}\n7', 'line 2: not {"labels"'),
    (b'{"labels": ["dog"], "text": "dog"}', 'line 1: not {"labels"'),
    (b'[{"labels": ["dog"], "description": "dog"}, {"labels": 3, "description": "dog"}]',
     'entry 2: not {"labels"'), (b'{"labels": "d", "description": "d"}', 'line 1: not {"labels"'),
    (b'{"labels": [3], "description": "dog"}', 'line 1: not {"labels"'),
    (b'{"labels": ["dog"], "description": 3}', 'line 1: not {"labels"'),
    (b"", "no sentence of use"), (b"[]", "no sentence of use"),
    (b'{"labels": ["cow"], "description": "cow"}', "no sentence of use.*'unknown label': 1")])
def test_load_texts_refuses(tmp_path, content, message):
    path = tmp_path / "texts.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"texts.json(, |: ){message}") as error:
        lang_cls.load_texts(path, ["dog"])
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_and_line_separators(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"labels": ["dog"], "description": "A dog \\ud83d."}\n'
                    '{"labels": ["dog"], "description": "Dogs\u2028\u2029run."}\n',
                    encoding="utf-8")
    assert lang_cls.load_texts(path, ["dog"])[0] == ["A dog .", "Dogs run."]


def test_load_texts_of_100_000_lines_is_quick_and_keeps_the_grammar(tmp_path):
    sentences, targets = lang_cls.grammar_sentences(COCO, 100_000, seed=5)
    path = tmp_path / "texts.jsonl"
    with open(path, "w") as file:
        for sentence, target in zip(sentences, targets.numpy()):
            labels = [COCO[label] for label in (target > 0).nonzero()[0]]
            file.write(json.dumps({"labels": labels, "description": sentence}) + "\n")
    start = time.process_time()
    loaded, loaded_targets, dropped = lang_cls.load_texts(path, COCO)
    assert time.process_time() - start < 10  # 1.8 in fact
    assert set(dropped) == {"duplicate"}
    kept = sorted({sentence: i for i, sentence in reversed([*enumerate(sentences)])}.values())
    assert loaded == [sentences[i] for i in kept] and torch.equal(loaded_targets, targets[kept])


# ---- the generator

class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that misbehaves on demand.

    trouble: {prompt: [things to do before it is answered]}; default: what to do with all others.
    asked, answered: Counters {prompt: requests}; at_once: most requests in flight.
    """

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port=0, trouble=None, default=None, delay=0.002):
        super().__init__(("127.0.0.1", port), Handler)
        self.trouble, self.default, self.delay = trouble or {}, default, delay
        self.asked, self.answered, self.lock = Counter(), Counter(), threading.Lock()
        self.times, self.keys, self.in_flight, self.at_once = {}, set(), 0, 0
        self.on_request = lambda number: None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that are killed break the connection

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, code, body, headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/chat/completions"
        content = json.loads(body)
        assert content["model"] == "toy-llm" and content["messages"][0]["role"] == "user"
        prompt = content["messages"][0]["content"]
        with server.lock:
            server.asked[prompt] += 1
            server.times.setdefault(prompt, []).append(time.monotonic())
            server.keys.add(self.headers.get("Authorization"))
            server.in_flight += 1
            server.at_once = max(server.at_once, server.in_flight)
            number = sum(server.asked.values())
            trouble = server.trouble.get(prompt)
            action = trouble.pop(0) if trouble else server.default
        try:
            server.on_request(number)
            time.sleep(server.delay)
            self.act(action, prompt)
        finally:
            with server.lock:
                server.in_flight -= 1

    def act(self, action, prompt):
        answer = {"empty": "", "nothing": None, "refusal": "I'm sorry, I can't help with that.",
                  "think": "<think>dog?\ncat?</think>\n\"A photo.\""}.get(action, f"Yes: {prompt}")
        if isinstance(action, tuple):  # (code, Retry-After)
            self.send(action[0], {"error": "slow down"}, {"Retry-After": action[1]})
        elif isinstance(action, int):
            self.send(action, {"error": f"no, {self.headers.get('Authorization')}"})
        elif action == "broken":
            self.send(200, b'{"choices": [{"mess')
        elif action == "other":
            self.send(200, {"error": "overloaded"})
        elif action == "cut":  # fewer bytes than promised
            self.send_response(200)
            self.send_header("Content-Length", 1000)
            self.end_headers()
            self.wfile.write(b'{"choices"')
        elif action == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif action == "hang":
            time.sleep(1)
        else:
            with self.server.lock:
                self.server.answered[prompt] += 1
            self.send(200, {"choices": [{"message": {"role": "assistant", "content": answer}}]})


LABELS = [f"thing{i}" for i in range(500)]  # so many that no two requests are the same


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")


def generate(path, count, url, **options):
    options = {"delay": 0.01, "timeout": 0.5, "quiet": True, **options}
    return lang_cls.generate_sentences(path, LABELS, count, 7, url, "toy-llm", **options)


def prompts(count):
    """The prompts of the first requests, as a well-behaved server sees them."""
    with ChatServer() as server:
        for index in range(count):
            lang_cls.ask_llm(server.url, "toy-llm", lang_cls.draw_labels(LABELS, 7, index), "", 5)
        return list(server.asked)


def lines(path):
    content = Path(path).read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def test_draw_labels_depends_on_seed_and_index_alone():
    drawn = [lang_cls.draw_labels(LABELS, 0, index) for index in range(300)]
    assert drawn[::-1] == [lang_cls.draw_labels(LABELS, 0, index) for index in range(299, -1, -1)]
    assert {len(labels) for labels in drawn} == {1, 2, 3, 4, 5}
    assert all(len(set(labels)) == len(labels) for labels in drawn)
    assert lang_cls.draw_labels(LABELS, 1, 0) != drawn[0]
    assert lang_cls.draw_labels(["dog"], 0, 3) == ["dog"]


def test_every_trouble_is_survived_and_nothing_is_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    first = prompts(12)
    a_second_later = email.utils.formatdate(time.time() + 1, usegmt=True)
    trouble = [[], [(429, "1")], [500, 503], ["broken"], ["empty"], ["refusal"], ["cut"],
               ["hang up"], ["hang"], [429, 429], ["other", "nothing"],
               [(503, a_second_later), "think"]]
    with ChatServer(trouble=dict(zip(first, map(list, trouble)))) as server:
        assert generate(path, 60, server.url, requests=8) == 0
        assert 1 < server.at_once <= 8
        # once more than there were failures; an empty answer and a refusal are answers
        expected = [1, 2, 3, 2, 1, 1, 2, 2, 2, 3, 2, 2]
        assert [server.asked[prompt] for prompt in first] == expected
        assert set(server.answered.values()) == {1} and len(server.answered) == 60
        asked, answered = server.times[first[1]]
        assert answered - asked >= 1
        assert generate(path, 60, server.url) == 0
        assert sum(server.asked.values()) == 48 + sum(expected)
        assert generate(path, 64, server.url) == 0  # asks only for four more
        assert sum(server.asked.values()) == 52 + sum(expected)
    entries = {entry["request"]: entry for entry in lines(path)}
    assert len(lines(path)) == 64 and set(entries) == set(range(64))
    for index, entry in entries.items():
        assert entry["labels"] == lang_cls.draw_labels(LABELS, 7, index)
    descriptions = [entries[index]["description"] for index in range(12)]
    assert descriptions[4] == descriptions[10] == "" and descriptions[11] == "A photo."
    assert descriptions[5].startswith("I'm sorry") and descriptions[8] == f"Yes: {first[8]}"
    sentences, _, dropped = lang_cls.load_texts(path, LABELS)
    assert len(sentences) == 60
    assert dropped == {"empty": 2, "refusal": 1, "label not mentioned": 1}


def test_retry_after_holds_back_every_request(tmp_path):
    first = prompts(1)[0]
    with ChatServer(trouble={first: [(429, "1")]}, delay=0.05) as server:
        generate(tmp_path / "out.jsonl", 40, server.url, requests=2)
        refused = server.times[first][0]
        others = [moment - refused for times in server.times.values() for moment in times]
    # the other thread may have one request under way when the answer 429 arrives
    assert sum(0.1 < moment < 1 for moment in others) <= 1
    assert sum(moment >= 1 for moment in others) >= 37


def test_a_server_that_dies_half_way(tmp_path):
    path = tmp_path / "out.jsonl"
    with ChatServer(delay=0.01) as server:
        def die(number):
            if number == 30:
                server.default = "hang up"
                server.socket.close()

        server.on_request = die
        with pytest.raises(UserError, match=f"{server.url}: .*out.jsonl") as error:
            generate(path, 60, server.url, requests=4, attempts=3)
        assert "goes on from there" in str(error.value)
        answered = set(server.answered)
    received = lines(path)
    assert 20 <= len(received) < 60
    assert {f"Yes: {prompt}" for prompt in answered} == {e["description"] for e in received}
    with ChatServer() as server:
        assert generate(path, 60, server.url) == 0
        assert not answered & set(server.asked) and set(server.asked.values()) == {1}
    assert lines(path)[:len(received)] == received
    assert sorted(entry["request"] for entry in lines(path)) == list(range(60))


@pytest.fixture
def interruptible():
    """A background job of a shell starts with Ctrl-C ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_keeps_the_answers_in_flight(tmp_path, interruptible):
    path = tmp_path / "out.jsonl"
    with ChatServer(delay=0.1) as server:
        server.on_request = lambda number: number == 20 and signal.pthread_kill(
            threading.main_thread().ident, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            generate(path, 200, server.url, requests=6)
        assert 20 <= len(server.asked) < 40
        assert len(lines(path)) == len(server.answered) == len(server.asked)
        server.on_request, server.delay = lambda number: None, 0
        assert generate(path, 60, server.url) == 0
        assert set(server.asked.values()) == {1} and len(server.asked) == 60


def test_kill_9_and_a_half_written_line(tmp_path):
    path = tmp_path / "out.jsonl"
    killed = threading.Event()
    with ChatServer(delay=0.02) as server:
        server.on_request = lambda number: number == 25 and killed.set()
        command = ("import sys, lang_cls; lang_cls.generate_sentences(sys.argv[1], [f'thing{i}' "
                   "for i in range(500)], 1000, 7, sys.argv[2], 'toy-llm', requests=3)")
        process = subprocess.Popen([sys.executable, "-c", command, path, server.url],
                                   cwd=Path(lang_cls.__file__).parent)
        assert killed.wait(60)
        process.kill()
        process.wait()
    received = lines(path)
    assert len(received) >= 25 - 2 * 3
    for end in (-1, -2, -9, 5):  # no new line; cut in the last line; hardly begun
        content = "".join(json.dumps(entry) + "\n" for entry in received)
        last = json.dumps(received[-1]) + "\n"
        path.write_text(content[:len(content) - len(last)] + last[:end])
        kept = received if end == -1 else received[:-1]
        with ChatServer() as server:
            assert generate(path, 50, server.url) == 0
            asked = 50 - len({entry["request"] for entry in kept} & set(range(50)))
            assert len(server.asked) == asked and set(server.asked.values()) == {1}
        assert lines(path)[:len(kept)] == kept
        assert {entry["request"] for entry in lines(path)} >= set(range(50))


def test_what_cannot_work_stops_at_once(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    start = time.monotonic()
    for url in ("localhost:11434", "file:///etc/hosts", ""):
        with pytest.raises(UserError, match="--llm-url"):
            generate(path, 5, url)
    with ChatServer() as server:
        nobody = server.url
    with pytest.raises(UserError, match=f"{nobody}.*refused"):
        generate(path, 5, nobody, delay=60)
    with ChatServer(default=404) as server, pytest.raises(UserError, match="HTTP Error 404"):
        generate(path, 500, server.url, delay=60)
    assert sum(server.asked.values()) <= 16
    with ChatServer(default=400) as server, pytest.raises(UserError, match="HTTP Error 400"):
        generate(path, 500, server.url, delay=60, requests=2)
    assert 3 <= sum(server.asked.values()) <= 20
    with ChatServer(default="other") as server, pytest.raises(UserError, match="not a chat compl"):
        generate(path, 500, server.url, attempts=2)
    with pytest.raises(UserError, match="No such file or directory"):
        generate(tmp_path / "nowhere" / "out.jsonl", 5, nobody)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        generate(path, 5, nobody)
    assert "two words" not in str(error.value)
    assert time.monotonic() - start < 20 and path.read_text() == ""


def test_requests_that_always_fail_are_left_out(tmp_path):
    path, first = tmp_path / "out.jsonl", prompts(40)
    trouble = {first[0]: 99 * [500], **{prompt: 99 * [400] for prompt in first[10::3]}}
    with ChatServer(trouble=trouble) as server:
        # 11 failures, but with answers in between
        assert generate(path, 40, server.url, requests=2, attempts=3) == 11
        assert server.asked[first[0]] == 3 and server.asked[first[10]] == 1
    left_out = {0, *range(10, 40, 3)}
    assert {entry["request"] for entry in lines(path)} == set(range(40)) - left_out


def test_the_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    path = tmp_path / "out.jsonl"
    with ChatServer() as server:
        generate(path, 3, server.url, quiet=False)
        assert server.keys == {"Bearer sk-secret"}
        server.default = 401  # a server that repeats the key in its message
        with pytest.raises(UserError, match=r"HTTP Error 401.*Bearer \*\*\*") as error:
            generate(path, 20, server.url, quiet=False)
    shown = capfd.readouterr()
    assert "secret" not in path.read_text() + shown.out + shown.err + str(error.value)


def test_the_key_does_not_follow_a_redirect(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    headers = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            headers.append(dict(self.headers))
            self.send_error(404)

        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(UserError, match="404"):
            generate(tmp_path / "out.jsonl", 1, f"http://127.0.0.1:{server.server_port}/v1")
        server.shutdown()
    assert headers and "secret" not in str(headers)


@pytest.mark.parametrize("content, message", [
    ('[{"labels": ["dog"], "description": "A dog."}]', "entry 1: not written by --generate"),
    ('{"labels": ["dog"], "description": "A dog."}\n', "line 1: not written by --generate"),
    ('{"request": 0, "labels": ["dog"], "description": "A dog."}\n', "line 1: for other labels"),
    ('{"request": 0, "la\n{"request": 1}\n', "line 1: not JSON"),
    ("dog\ncat", "line 1: not JSON")])
def test_other_files_are_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=f"out.jsonl, {message}"):
        generate(path, 5, "http://127.0.0.1:9")
    assert path.read_text() == content


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_named():
    with ChatServer() as server, pytest.raises(UserError, match="/dev/full: No space left"):
        generate("/dev/full", 30, server.url)


# ---- classifier, mapping, streams

def random_model(labels=6, width=8):
    torch.manual_seed(0)
    return lang_cls.CoMC(torch.randn(labels, width), unit(labels, width).float())


@pytest.mark.parametrize("mapping_weight", [0.0, 0.3])
def test_scores_equal_a_loop_over_locations(mapping_weight):
    model = random_model()
    global_, local = unit(3, 8).float(), unit(3, 5, 8).float()

    def logits(e):  # one embedding [D]
        weights = ((e @ model.memory.T) / 0.01).softmax(0)
        mapped = sum(w * m for w, m in zip(weights, model.memory))
        mapped = mapped / mapped.norm()
        return model.weight @ ((1 - mapping_weight) * e + mapping_weight * mapped)

    whole = torch.stack([logits(e) for e in global_])
    best = torch.stack([torch.stack([logits(e) for e in image]).max(dim=0).values
                        for image in local])
    for streams, expected in {"global": whole, "local": best, "both": (whole + best) / 2}.items():
        scores = model.scores(global_, local, mapping_weight, streams)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_without_mapping_the_plain_classifier_is_left():
    model, embeddings = random_model(), unit(4, 8).float()
    linear = torch.nn.Linear(8, 6, bias=False)
    linear.weight = model.weight
    scores = model.scores(embeddings, None, mapping_weight=0.0, streams="global")
    torch.testing.assert_close(scores, linear(embeddings))
    torch.testing.assert_close(model(embeddings), linear(embeddings))
    assert not torch.allclose(model.scores(embeddings, None, 0.3, "global"), scores)


@pytest.mark.parametrize("name", ["toy-RN", "toy-ViT"])
def test_encode_gives_what_clip_gives(name):
    clip, preprocess = clip_model.load(name)
    images = torch.stack([preprocess(data.toy_scene("benchmark", 5, i)) for i in range(3)])
    options = lang_cls.parse_arguments(["--device", "cpu"])
    own, global_, local = lang_cls.encode(clip, images, options)
    with torch.no_grad():
        expected = clip.encode_image_dense(images, global_position=False)
        torch.testing.assert_close(own, F.normalize(clip.encode_image(images), dim=-1),
                                   rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(global_, F.normalize(expected[0], dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(local, F.normalize(expected[1], dim=-1), rtol=1e-4, atol=1e-5)
    assert (name == "toy-ViT") == torch.equal(own, global_)


def test_learning_rate():
    rates = [lang_cls.learning_rate(epoch, 1e-3, 20) for epoch in range(20)]
    assert rates[0] == 1e-5 and rates[1] == 1e-3 and rates[11] == pytest.approx(5e-4)
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 5e-5


# ---- embeddings of texts

@pytest.fixture(scope="module")
def toy_resnet():
    return clip_model.load("toy-RN")


@pytest.fixture
def text_calls(toy_resnet, monkeypatch, tmp_path):
    """An empty cache, and the number of texts of every call of the text tower."""
    calls, original = [], clip_model.CLIP.encode_text

    def encode_text(self, tokens):
        calls.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(clip_model.CLIP, "encode_text", encode_text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_embeddings_equal_one_text_at_a_time_and_are_cached(toy_resnet, text_calls, tmp_path):
    clip = toy_resnet[0]
    texts = ["A star and a fish.", "a tree", "A star and a fish.", "Two boats near a large house."]
    embeddings = lang_cls.embed_texts(clip, texts, quiet=True)
    assert sum(text_calls) == 3  # a repeated text is embedded once
    with torch.no_grad():
        one_by_one = torch.cat([clip.encode_text(clip.tokenize(text)) for text in texts])
    torch.testing.assert_close(embeddings, F.normalize(one_by_one, dim=-1), rtol=1e-4, atol=1e-5)
    text_calls.clear()
    assert torch.equal(lang_cls.embed_texts(clip, texts, quiet=True), embeddings)
    assert text_calls == []
    file, = (tmp_path / "cache" / "clip_multilabel").iterdir()  # and no temporary one
    content = file.read_bytes()
    for damaged in (content[:len(content) // 2], b"", content.replace(
            embeddings[0].numpy().tobytes(), embeddings[1].numpy().tobytes())):
        assert damaged != content
        file.write_bytes(damaged)
        assert torch.equal(lang_cls.embed_texts(clip, texts, quiet=True), embeddings)
        assert sum(text_calls) == 3
        text_calls.clear()


def test_the_cache_belongs_to_these_texts_and_weights(toy_resnet, text_calls):
    clip, other = toy_resnet[0], clip_model.load("toy-RN")[0]
    other.text_projection.data *= -1
    first = lang_cls.embed_texts(clip, ["a star", "a tree"], quiet=True)
    lang_cls.embed_texts(clip, ["a star", "a house"], quiet=True)
    swapped = lang_cls.embed_texts(clip, ["a tree", "a star"], quiet=True)
    opposite = lang_cls.embed_texts(other, ["a star", "a tree"], quiet=True)
    assert text_calls == [2, 2, 2, 2]
    torch.testing.assert_close(swapped, first.flip(0))
    torch.testing.assert_close(opposite, -first, rtol=1e-4, atol=1e-5)


def test_a_cache_that_cannot_be_written_is_only_noted(toy_resnet, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert lang_cls.embed_texts(toy_resnet[0], ["a star"], quiet=True).shape == (1, 128)
    assert "again" in capsys.readouterr().err


def test_label_embeddings_are_the_mean_over_templates(toy_resnet, text_calls):
    clip, options = toy_resnet[0], lang_cls.parse_arguments(["--device", "cpu", "--quiet"])
    memory = lang_cls.label_embeddings(clip, ["apple", "star"], ["a {}.", "two {}"], options)
    for row, prompts in zip(memory, (["an apple.", "two apple"], ["a star.", "two star"])):
        with torch.no_grad():
            mean = F.normalize(clip.encode_text(clip.tokenize(prompts)), dim=-1).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)


# ---- the program

QUICK = ["--limit", "48", "--sentences", "300", "--epochs", "3", "--batch-size", "64", "--device",
         "cpu", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quick run on the toy world."""
    output = tmp_path_factory.mktemp("lang_cls") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(output.parent / "cache"))
        lang_cls.main([*QUICK, "--output", str(output)])
    return output


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def rows_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())["rows"]


def test_a_run_writes_its_files(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["method"] == "lang_cls" and results["data"] == "toy"
    assert results["clip"] == "toy-RN" and results["seed"] == 0
    rows = results["rows"]
    assert [row["kind"] for row in rows[-1:]] == ["method"] and rows[-1]["name"] == "CoMC"
    assert sum(row["kind"] == "zero-shot" for row in rows) == 6
    assert {row["name"] for row in rows if row["kind"] == "ablation"} == {
        "CoMC without mapping", "CoMC, global alone", "CoMC, local alone"}
    for row in rows:
        assert {"mAP", "P@3", "R@3", "F1@3"} <= row.keys()
        assert all(0 <= value <= 1 for key, value in row.items() if key not in ("name", "kind"))
    log = lines(trained / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[0]["lr"] == 1e-5
    assert log[2]["loss"] < log[0]["loss"]
    assert json.loads((trained / "args.json").read_text())["sentences"] == 300
    state = torch.load(trained / "best.pt", weights_only=True)
    assert state["method"] == "lang_cls" and state["labels"] == data.TOY_LABELS
    assert state["model"]["weight"].shape == state["model"]["memory"].shape == (56, 128)


def test_the_rows_are_what_the_pieces_give(trained, toy_resnet):
    clip, preprocess = toy_resnet
    test = data.load_dataset("toy", split="test", transform=preprocess)
    images = torch.stack([test[i][0] for i in range(48)])
    state = torch.load(trained / "best.pt", weights_only=True)["model"]
    with torch.no_grad():
        global_, local = (F.normalize(x, dim=-1) for x in clip.encode_image_dense(images, False))
        own = F.normalize(clip.encode_image(images), dim=-1)
        fused = [0.7 * e + 0.3 * lang_cls.map_to_text(e, state["memory"])
                 for e in (global_, local)]
        scores = {"CoMC": (fused[0] @ state["weight"].T
                           + (fused[1] @ state["weight"].T).amax(dim=1)) / 2,
                  "CoMC without mapping": global_ @ state["weight"].T
                  + (local @ state["weight"].T).amax(dim=1),
                  "zero-shot, global, mean of templates": own @ state["memory"].T,
                  "zero-shot, local, mean of templates": (local @ state["memory"].T).amax(dim=1)}
    rows = {row["name"]: row for row in rows_of(trained)}
    for name, values in scores.items():
        expected = metrics.mean_average_precision(values, test.targets[:48])
        assert rows[name]["mAP"] == pytest.approx(expected, abs=1e-3), name


def test_evaluating_the_checkpoint_repeats_the_rows(trained, tmp_path):
    lang_cls.main(["--limit", "48", "--quiet", "--device", "cpu", "--eval",
                   str(trained / "best.pt"), "--output", str(tmp_path)])
    assert rows_of(tmp_path) == rows_of(trained)
    tmp_path = tmp_path / "other"  # results are not written over
    lang_cls.main(["--limit", "48", "--quiet", "--device", "cpu", "--eval",
                   str(trained / "best.pt"), "--output", str(tmp_path), "--mapping-weight", "0",
                   "--streams", "local"])
    assert [row["kind"] for row in rows_of(tmp_path)][-2:] == ["zero-shot", "method"]
    assert rows_of(tmp_path)[-1]["mAP"] != rows_of(trained)[-1]["mAP"]


def test_an_interrupted_run_resumes_to_the_same_numbers(trained, tmp_path, monkeypatch):
    original = data.finish_epoch

    def interrupted(output, state, line, quiet):
        original(output, state, line, quiet)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "finish_epoch", interrupted)
    with pytest.raises(SystemExit) as error:
        lang_cls.main([*QUICK, "--output", str(tmp_path)])
    assert error.value.code == 130 and not (tmp_path / "results.json").exists()
    monkeypatch.setattr(data, "finish_epoch", original)
    torch.manual_seed(99)
    lang_cls.main([*QUICK, "--output", str(tmp_path), "--resume"])
    assert rows_of(tmp_path) == rows_of(trained)
    whole, resumed = (torch.load(folder / "last.pt", weights_only=True)["model"]["weight"]
                      for folder in (trained, tmp_path))
    assert torch.equal(whole, resumed)


def test_a_resumed_run_needs_the_same_options_and_texts(tmp_path, capsys):
    texts, output = tmp_path / "texts.json", tmp_path / "run"
    entries = [{"labels": ["star"], "description": "A star."},
               {"labels": ["moon", "tree"], "description": "The moon over a tree."}]
    texts.write_text(json.dumps(entries))
    arguments = [*QUICK[:2], *QUICK[4:], "--texts", str(texts), "--output", str(output)]
    lang_cls.main(arguments)
    with pytest.raises(SystemExit):
        lang_cls.main([*arguments, "--resume", "--noise", "0.2"])
    assert "--noise 0.1, not 0.2" in capsys.readouterr().err
    texts.write_text(json.dumps(entries[:1]))
    with pytest.raises(SystemExit):
        lang_cls.main([*arguments, "--resume"])
    assert "other texts" in capsys.readouterr().err


@pytest.mark.parametrize("sources, count", [("both", 340), ("sentences", 300), ("templates", 40)])
def test_sources(sources, count, tmp_path):
    (tmp_path / "templates.txt").write_text("one {}\n")
    options = lang_cls.parse_arguments(["--sources", sources, "--sentences", "300", "--templates",
                                        str(tmp_path / "templates.txt")])
    sentences, targets = lang_cls.training_texts(["star", "moon", "fish", "tree"], options)
    assert len(sentences) == len(targets) == count
    assert ("one star" in sentences) == (sources != "sentences")


def test_held_out_sentences_select_the_best_epoch(tmp_path):
    lang_cls.main([*QUICK, "--val-fraction", "0.2", "--output", str(tmp_path)])
    scores = [line["val_mAP"] for line in lines(tmp_path / "log.jsonl")]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert len(best["log"]) == max(i for i, s in enumerate(scores) if s == max(scores)) + 1


def test_labels_without_a_dataset_and_predict(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dataset was loaded")

    monkeypatch.setattr(data, "load_dataset", refuse)
    lang_cls.main([*QUICK[2:], "--labels", "star, moon,fish,house", "--clip", "toy-RN",
                   "--output", str(tmp_path / "mine")])
    best = tmp_path / "mine" / "best.pt"
    assert rows_of(best.parent) == []
    for i in range(2):
        data.toy_scene("benchmark", 7, i).save(tmp_path / f"{i}.png")
    capsys.readouterr()
    lang_cls.main(["--predict", str(tmp_path), "--checkpoint", str(best), "--quiet",
                   "--device", "cpu"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).name for line in printed] == ["0.png", "1.png"]
    clip, preprocess = clip_model.load("toy-RN")
    state = torch.load(best, weights_only=True)["model"]
    for i, line in enumerate(printed):
        assert {entry["label"] for entry in line["labels"]} == {"star", "moon", "fish", "house"}
        image = preprocess(data.open_image(tmp_path / f"{i}.png"))[None]
        with torch.no_grad():
            embeddings = [F.normalize(x, dim=-1) for x in clip.encode_image_dense(image, False)]
            scores = lang_cls.CoMC(state["weight"], state["memory"]).scores(*embeddings)[0]
        found = [entry["score"] for entry in line["labels"]]
        assert found == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-3)
    with pytest.raises(SystemExit):
        lang_cls.main(["--eval", str(best)])
    assert "--data" in capsys.readouterr().err


def test_the_published_classifier_loads(tmp_path, capsys, monkeypatch):
    toy = clip_model.load("toy-RN")[0]
    torch.manual_seed(0)
    clip = clip_model.CLIP(1024, 64, (1, 1, 1, 1), 16, None, 77, len(toy.tokenizer), 64, 1, 1)
    clip.initialize_parameters().eval().tokenizer = toy.tokenizer
    asked = []
    monkeypatch.setattr(clip_model, "load", lambda name, device: asked.append(name) or (
        clip, clip_model.preprocess_transform(64)))
    weight = torch.randn(80, 1024, dtype=torch.float16)
    torch.save({"adapter.0.weight": weight}, tmp_path / "published.pth")
    data.toy_scene("benchmark", 7, 0).save(tmp_path / "photo.png")
    arguments = ["--quiet", "--device", "cpu", "--checkpoint", str(tmp_path / "published.pth")]
    lang_cls.main(["--predict", str(tmp_path / "photo.png"), *arguments])
    line = json.loads(capsys.readouterr().out)
    assert asked == ["RN50"] and lang_cls.COCO == COCO
    assert sorted(entry["label"] for entry in line["labels"]) == sorted(COCO)
    options = lang_cls.parse_arguments(arguments)
    _, model, _, state = lang_cls.load_checkpoint(tmp_path / "published.pth", options)
    assert torch.equal(model.weight, weight.float()) and state["labels"] == COCO
    torch.save({"adapter.0.weight": weight[:, :512]}, tmp_path / "published.pth")
    with pytest.raises(SystemExit):
        lang_cls.main(["--predict", str(tmp_path / "photo.png"), *arguments])
    assert "[80, 512]" in capsys.readouterr().err


def test_generate_writes_a_file_that_texts_reads(tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    with ChatServer() as server:
        lang_cls.main(["--labels", "star,moon,fish", "--generate", str(path), "--llm-url",
                       server.url, "--llm-model", "toy-llm", "--sentences", "7", "--quiet"])
        assert len(server.asked) > 0
    assert len(lines(path)) == 7 and f"--texts {path}" in capsys.readouterr().out
    sentences, _, _ = lang_cls.load_texts(path, ["star", "moon", "fish"])
    assert sentences


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nosuch"], "nosuch"),
    (["--data", "nuswide", "--clip", "toy-RN"], "--root"),
    (["--clip", "ViT-Z/99"], "ViT-Z/99"),
    (["--epochs", "0"], "--epochs"),
    (["--mapping-weight", "1.5"], "--mapping-weight"),
    (["--noise", "-1"], "--noise"),
    (["--streams", "none"], "--streams"),
    (["--labels", " , "], "--labels"),
    (["--labels", ""], "--labels"),
    (["--labels", "owl,cat,owl"], "owl"),
    (["--labels", "owl", "--data", "nuswide"], "--data nuswide"),
    (["--labels", "owl", "--predict", "{image}", "--checkpoint", "{best}"], "--labels"),
    (["--generate", "out.jsonl"], "--llm-url"),
    (["--texts", "{text}"], "text.jpg, line 1: not JSON"),
    (["--texts", "nosuch.json"], "nosuch.json"),
    (["--texts", "{text}", "--sources", "templates"], "--texts"),
    (["--templates", "{text}"], "text.jpg, line 1"),
    (["--resume"], "last.pt"),
    (["--eval", "nosuch.pt"], "nosuch.pt"),
    (["--eval", "{text}"], "not a checkpoint"),
    (["--eval", "{other}"], "mkt"),
    (["--eval", "{labels}"], "labels"),
    (["--eval", "{clip}"], "other weights"),
    (["--eval", "{best}", "--clip", "RN50"], "toy-RN"),
    (["--predict", "{image}"], "--checkpoint"),
    (["--predict", "{text}", "--checkpoint", "{best}"], "text.jpg"),
    (["--predict", "{nothing}", "--checkpoint", "{best}"], "nothing"),
])
def test_bad_input_is_one_line_and_overwrites_nothing(trained, tmp_path, capsys, arguments,
                                                      message):
    best = torch.load(trained / "best.pt", weights_only=True)
    files = {name: tmp_path / file for name, file in {
        "text": "text.jpg", "other": "other.pt", "labels": "labels.pt", "clip": "clip.pt",
        "image": "image.png"}.items()}
    files["text"].write_text("no image, no checkpoint")
    torch.save({**best, "method": "mkt"}, files["other"])
    torch.save({**best, "labels": best["labels"][:-1] + ["owl"]}, files["labels"])
    torch.save({**best, "clip_fingerprint": "0" * 8}, files["clip"])
    data.toy_scene("benchmark", 7, 0).save(files["image"])
    files.update(best=trained / "best.pt", nothing=tmp_path / "nothing")
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as error:
        lang_cls.main([*[argument.format(**files) for argument in arguments], "--output",
                       str(output)])
    printed = capsys.readouterr().err.strip()
    assert error.value.code == 2 and message in printed and "Traceback" not in printed
    assert printed.startswith("lang_cls.py: error: ") and "\n" not in printed
    assert not output.exists()
