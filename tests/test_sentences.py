"""data.py: the grammar, sentences from files, and the generator against a local server."""
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

import data
from data import UserError

# names that are plural, uncountable, activities, the only one, or words of the grammar itself
ODD = """birds, boats, buildings, people, police, grass, snow, water, food, dancing, running,
soccer, nighttime, sky, sun, moon, ocean, leaf, fish, whales, street, table, meadow, party, photo,
dusk, crowd, farm, skis, glass, glasses, wedding, hour, unicorn, x-ray machine""".replace(
    "\n", " ").split(", ")


# ---- the grammar

@pytest.mark.parametrize("singular, expected", [pair.split("/") for pair in """
    dog/dogs bus/buses box/boxes bench/benches toothbrush/toothbrushes knife/knives pony/ponies
    monkey/monkeys person/people snowman/snowmen woman/women human/humans mouse/mice tooth/teeth
    bookshelf/bookshelves giraffe/giraffes potato/potatoes piano/pianos sheep/sheep leaf/leaves
    reindeer/reindeer goldfish/goldfish toy/toys vase/vases wine_glass/wine_glasses zebra/zebras
    teddy_bear/teddy_bears Church/Churches fox/foxes cell_phone/cell_phones""".split()])
def test_plural(singular, expected):
    assert data.plural(singular.replace("_", " ")) == expected.replace("_", " ")


def test_grammar_targets_are_the_labels_mentioned():
    # no label is a part of another one here, so that searching for the names is enough
    labels = [label for label in data.COCO_LABELS + ODD if label not in (
        "dog", "bear", "table", "glass", "glasses", "person", "boat", "bird", "skis")]
    sentences, targets = data.grammar_sentences(labels, 3000, seed=1)
    assert targets.dtype == torch.int8 and targets.shape == (3000, len(labels))
    assert targets.unique().tolist() == [-1, 1]
    present = (targets > 0).sum(1)
    assert present.unique().tolist() == [1, 2, 3, 4, 5]
    assert (targets > 0).sum(0).min() > 0.4 * present.sum() / len(labels)
    patterns = [re.compile(rf"\b({re.escape(label)}|{re.escape(data.plural(label))})\b", re.I)
                for label in labels]
    for sentence, target in zip(sentences, targets):
        mentioned = [bool(pattern.search(sentence)) for pattern in patterns]
        assert mentioned == (target > 0).tolist(), sentence


@pytest.mark.parametrize("labels", [data.COCO_LABELS, ODD], ids=["coco", "odd"])
def test_grammar_writes_english(labels):
    sentences, _ = data.grammar_sentences(labels, 20_000, seed=2)
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
    sentences, targets = data.grammar_sentences(data.COCO_LABELS, 10_000, seed=3)
    again, same_targets = data.grammar_sentences(data.COCO_LABELS, 10_000, seed=3)
    assert sentences == again and torch.equal(targets, same_targets)
    assert data.grammar_sentences(data.COCO_LABELS, 10, seed=3)[0] == sentences[:10]
    assert data.grammar_sentences(data.COCO_LABELS, 10, seed=4)[0] != sentences[:10]
    assert len(set(sentences)) > 9000
    assert len({sentence.split(" ")[0] for sentence in sentences}) > 20


def test_grammar_speed_and_few_labels():
    start = time.process_time()
    data.grammar_sentences(data.COCO_LABELS, 20_000)
    assert time.process_time() - start < 1  # 0.25 in fact
    sentences, targets = data.grammar_sentences(["sky"], 50)
    assert (targets == 1).all() and all("he sky" in sentence for sentence in sentences)
    assert data.grammar_sentences(["sky", "dog"], 0)[1].shape == (0, 2)


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
    sentences, targets, dropped = data.load_texts(path, labels)
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
    assert len(data.load_texts(path, labels)[0]) == 1 + mentioned


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
        data.load_texts(path, ["dog"])
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_and_line_separators(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"labels": ["dog"], "description": "A dog \\ud83d."}\n'
                    '{"labels": ["dog"], "description": "Dogs\u2028\u2029run."}\n',
                    encoding="utf-8")
    assert data.load_texts(path, ["dog"])[0] == ["A dog .", "Dogs run."]


def test_load_texts_of_100_000_lines_is_quick_and_keeps_the_grammar(tmp_path):
    sentences, targets = data.grammar_sentences(data.COCO_LABELS, 100_000, seed=5)
    path = tmp_path / "texts.jsonl"
    with open(path, "w") as file:
        for sentence, target in zip(sentences, targets.numpy()):
            labels = [data.COCO_LABELS[label] for label in (target > 0).nonzero()[0]]
            file.write(json.dumps({"labels": labels, "description": sentence}) + "\n")
    start = time.process_time()
    loaded, loaded_targets, dropped = data.load_texts(path, data.COCO_LABELS)
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
        self.times, self.keys, self.in_flight, self.at_once, self.broken = {}, set(), 0, 0, 0
        self.on_request = lambda number: None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        self.broken += 1  # clients that are killed break the connection

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
    return data.generate_sentences(path, LABELS, count, 7, url, "toy-llm", **options)


def prompts(count):
    """The prompts of the first requests, as a well-behaved server sees them."""
    with ChatServer() as server:
        for index in range(count):
            data.ask_llm(server.url, "toy-llm", data.draw_labels(LABELS, 7, index), "", 5)
        return list(server.asked)


def lines(path):
    content = Path(path).read_text()
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def test_draw_labels_depends_on_seed_and_index_alone():
    drawn = [data.draw_labels(LABELS, 0, index) for index in range(300)]
    assert drawn[::-1] == [data.draw_labels(LABELS, 0, index) for index in range(299, -1, -1)]
    assert {len(labels) for labels in drawn} == {1, 2, 3, 4, 5}
    assert all(len(set(labels)) == len(labels) for labels in drawn)
    assert data.draw_labels(LABELS, 1, 0) != drawn[0]
    assert data.draw_labels(["dog"], 0, 3) == ["dog"]


def test_every_trouble_is_survived_and_nothing_is_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    first = prompts(12)
    a_second_later = email.utils.formatdate(time.time() + 1, usegmt=True)
    trouble = [[], [(429, "1")], [500, 503], ["broken"], ["empty"], ["refusal"], ["cut"],
               ["hang up"], ["hang"], [429, 429], ["other", "nothing"],
               [(503, a_second_later), "think"]]
    with ChatServer(trouble=dict(zip(first, map(list, trouble)))) as server:
        assert generate(path, 60, server.url, requests=8) == 0
        assert server.at_once in range(2, 8 + 1)  # several requests at a time, never more
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
        assert entry["labels"] == data.draw_labels(LABELS, 7, index)
    descriptions = [entries[index]["description"] for index in range(12)]
    assert descriptions[4] == descriptions[10] == "" and descriptions[11] == "A photo."
    assert descriptions[5].startswith("I'm sorry") and descriptions[8] == f"Yes: {first[8]}"
    sentences, _, dropped = data.load_texts(path, LABELS)
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
        command = ("import sys, data; data.generate_sentences(sys.argv[1], [f'thing{i}' "
                   "for i in range(500)], 1000, 7, sys.argv[2], 'toy-llm', requests=3)")
        process = subprocess.Popen([sys.executable, "-c", command, path, server.url],
                                   cwd=Path(data.__file__).parent)
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

