"""tools/: answers of language models, a server that misbehaves, the authors' releases."""
import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import clip_model
import data
import lang_cls
import mkt
import trees
from data import UserError, clean_sentence
from tools import convert_release, generate_texts
from toy import world
from toy.grammar import fill_template
from trees import checkpoint, lines, predictions

# ---- what an answer says

S = "A red owl sits beside a traffic light: it is dusk."
T = "The user wants: one sentence.\n\nA dog? No, only the given names.\n"


@pytest.mark.parametrize("answer", [
    S, f"\n “{S}” ", f"**{S}**", f'"{S}"\n\n(11 words)', S.replace(" a ", "\n a **"),
    f'Here is a sentence:\n\n"{S}"', f"Sure! Here's one description of the photo: {S}",
    f"Sentence: {S}", f"Sure! I can help with that.\n\n{S}", f"**Final answer:** {S}",
    f"Of course. This may be what you want:\n{S}", f"- {S}",
    # reasoning
    f"<think>{T}</think>\n\n{S}", f"{T}</think>\n\n{S}", f"<thought>{T}</thought>\n{S}",
    f"<seed:think>{T}</seed:think>{S}", f"<think>{T}</think><think>{T}</think><answer>{S}</answer>",
    f"[THINK]{T}[/THINK]{S}", f"◁think▷{T}◁/think▷{S}",
    f"<|START_THINKING|>{T}<|END_THINKING|><|START_RESPONSE|>{S}<|END_RESPONSE|>",
    f"<|begin_of_thought|>{T}<|end_of_thought|><|begin_of_solution|>{S}<|end_of_solution|>",
    f"<|channel|>analysis<|message|>{T}<|end|><|start|>assistant<|channel|>final<|message|>{S}",
    f"analysis{T}assistantfinal{S}", f"<|channel>thought\n{T}<channel|>{S}",
    # tokens of the chat template
    f"{S}<|im_end|>\n<|im_start|>user\n{T}", f"{S}<|endoftext|>Human: {T}", f"<|endoftext|>{S}",
    f"<s> {S}</s>", f"{S}<end_of_turn>", f"<|im_start|>assistant\n{S}<|im_end|>"])
def test_a_sentence_is_what_an_answer_says(answer):
    assert clean_sentence(answer) == S


@pytest.mark.parametrize("answer", [
    "", " \n", "...", "**", f"<think>{T}", f"<think>{T}</think>", f"<thought>{T}", f"[THINK]{T}",
    f"◁think▷{T}", f"<|channel|>analysis<|message|>{T}", f"analysis{T}",
    f"<|START_THINKING|>{T}", f"<|channel>thought\n{T}",
    # refusals
    "I will not describe this.", "I must decline to write about this.", "I'm sorry, but no.",
    "Sure. I’m unable to do that.", "I am not able to see photos.", "I can't do that.",
    "I cannot do that.", "Sorry, but I won't.", "I apologize, this is not possible.",
    "Unfortunately, I do not see a photo.", "As an AI, I see no dog.", '"I\'m very sorry."'])
def test_no_sentence(answer):
    assert clean_sentence(answer) == ""


@pytest.mark.parametrize("sentence", [
    "I can tell that an owl sits there.", "I can note an owl.", "I can taste the owl's soup.",
    "Sorry-looking owl on a post.", "Unable to fly, an owl sits on a post.", "Surely an owl sits.",
    "As an artificial light shines, an owl sleeps.", "Unfortunately, the owl has gone: it is dusk.",
    "Two owls, at 5:30 in the morning.", "フクロウが一羽いる。"])
def test_no_refusal(sentence):
    assert clean_sentence(sentence) == sentence


# ---- the server

class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible server. troubles: {number of a request, from 0: what happens instead of
    an answer, the bytes to send or a function of the handler}."""
    daemon_threads = True

    def __init__(self, troubles=None):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.troubles = troubles or {}
        self.prompts, self.headers = [], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def handle_error(self, *_):
        """Clients that are interrupted break connections: no word of it on the terminal."""

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class ChatHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            trouble = self.server.troubles.get(len(self.server.prompts))
            self.server.prompts.append(prompt)
            self.server.headers.append(str(self.headers))
        if callable(trouble):
            trouble = trouble(self)
        if trouble is None:
            trouble = reply(f"{body['model']} says {prompt.partition(': ')[2]}")
        self.wfile.write(trouble)

    def do_GET(self):  # where a redirect leads
        self.server.headers.append(str(self.headers))
        self.wfile.write(b"HTTP/1.0 404 Not Found\r\n\r\n")


OK = b"HTTP/1.0 200 OK\r\n\r\n"
FAILED = b"HTTP/1.0 500 Internal Server Error\r\n\r\n"


def reply(content, finish="stop", **more):
    message = {"role": "assistant", "content": content, **more}
    return OK + json.dumps({"choices": [{"finish_reason": finish, "message": message}]}).encode()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key of the user's; retries at once, and a time-out of a fraction of a second."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(generate_texts, "WAITS", 4 * [0])
    monkeypatch.setattr(generate_texts, "TIMEOUT", 0.5)


def ask(server):
    return generate_texts.ask(server.url, "llm", ["red owl", "ice cream"], threading.Event())


@pytest.mark.parametrize("trouble", [
    b"HTTP/1.0 429 Too Many Requests\r\nRetry-After: 0\r\n\r\n",
    FAILED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    OK[:-2] + b"Content-Length: 99\r\n\r\n{\"choices\": [{",
    OK + b'{"error": {"code": 503, "message": "overloaded"}}', b"", lambda _: time.sleep(1)])
def test_every_trouble_is_survived(trouble):
    with ChatServer({0: trouble, 1: trouble}) as server:
        answer, end = ask(server)
        assert answer.startswith("llm says red owl, ice cream. ") and end == "stop"
        assert len(server.prompts) == 3 and len(set(server.prompts)) == 1


@pytest.mark.parametrize("trouble, words, attempts", [
    (FAILED + b"no\n memory", "HTTP 500 Internal Server Error: no memory", 4),
    (b"HTTP/1.0 404 Not Found\r\n\r\nno model llm", "404 Not Found: no model llm", 1),
    (OK + b'{"error": {"code": 402, "message": "no credits"}}', "no credits", 1),
    (OK + b"<html>Welcome</html>", "<html>Welcome", 1), (OK + b'{"choices": []}', '"choices"', 1)])
def test_the_servers_own_words_are_shown(trouble, words, attempts):
    with ChatServer(dict.fromkeys(range(9), trouble)) as server:
        with pytest.raises(UserError) as error:
            ask(server)
    assert f"{server.url}: " in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value) and len(server.prompts) == attempts


def test_retry_after_is_heeded():
    waits = []
    stop = SimpleNamespace(wait=waits.append)
    slow = b"HTTP/1.0 429 Slow\r\nRetry-After: 7\r\n\r\n"
    with ChatServer({0: slow, 1: FAILED}) as server:
        generate_texts.ask(server.url, "llm", ["red owl"], stop)
    assert waits == [0, 7, 0]  # it is of one answer


def test_where_no_server_is_none_is_waited_for(monkeypatch):
    monkeypatch.setattr(generate_texts, "WAITS", (0, None))  # to wait once more would hang
    server = ChatServer()
    server.server_close()
    with pytest.raises(UserError, match="refused"):
        ask(server)
    server.url = "http://localhost:port/v1"
    with pytest.raises(UserError, match="nonnumeric port"):
        ask(server)


def test_the_parts_of_an_answer_that_are_text_are_joined():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": T}]},
             {"type": "text", "text": S[:9]}, {"type": "text", "text": S[9:]}]
    with ChatServer({0: reply(parts), 1: reply(None, "length", reasoning_content=T)}) as server:
        assert ask(server) == (S, "stop")
        assert ask(server) == ("", "length")


def test_the_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    # the key lies where a long message may be cut
    refusal = f"HTTP/1.0 401 Unauthorized\r\n\r\n{253 * '.'} no such key: sk-secret".encode()
    path = tmp_path / "out.jsonl"
    with ChatServer(dict.fromkeys(range(3, 99), refusal)) as server:
        with pytest.raises(UserError, match="HTTP 401 Unauthorized") as error:
            generate(path, server.url, 50, "--requests", "1")
        assert len(set(server.prompts)) == len(server.prompts) < 50  # none is tried again
        assert all("Authorization: Bearer sk-secret" in headers for headers in server.headers)
    shown = capfd.readouterr()
    assert len(lines(path)) == 3 and "no such key: ***" in str(error.value)
    assert "sk-" not in path.read_text() + shown.out + shown.err + str(error.value)


def test_the_key_does_not_follow_a_redirect(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ChatServer() as server:
        elsewhere = f"http://localhost:{server.server_port}/"
        server.troubles[0] = f"HTTP/1.0 302 Found\r\nLocation: {elsewhere}\r\n\r\n".encode()
        with pytest.raises(UserError, match="404"):
            ask(server)
        assert "sk-secret" in server.headers[0] and "sk-" not in server.headers[1]


# ---- the file of sentences

THINGS = [f"thing{i}" for i in range(300)]  # so many that no two requests are the same


def generate(path, url, count, *arguments):
    generate_texts.main([str(path), "--labels", ",".join(THINGS), "--url", url, "--model", "llm",
                         "--count", str(count), "--quiet", *arguments])


def test_answers_are_kept_when_another_request_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_texts, "TIMEOUT", 20)
    path = tmp_path / "out.jsonl"
    everyone = threading.Barrier(3)  # three requests at a time

    def refuse(handler):
        everyone.wait(20)
        return b"HTTP/1.0 400 Bad Request\r\n\r\n"

    def answer_late(handler):
        everyone.wait(20)
        time.sleep(0.3)

    with ChatServer({5: refuse, 6: answer_late, 7: answer_late}) as server:
        with pytest.raises(UserError, match="HTTP 400.*same command goes on"):
            generate(path, server.url, 20, "--requests", "3")
    assert len(lines(path)) == 7


def test_a_killed_calls_cut_line_is_asked_for_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with ChatServer() as server:
        generate(path, server.url, 6)
        *others, last = path.read_text().splitlines(keepends=True)
        path.write_text("".join(others) + last[:5])
        generate(path, server.url, 8)
    (_, count), *once = Counter(server.prompts).most_common()
    assert count == 2 and len(once) == 7 and {count for _, count in once} == {1}
    assert path.read_text().startswith("".join(others))
    assert sorted(line["request"] for line in lines(path)) == [*range(8)]
    sentences, targets, _ = lang_cls.load_texts(path, THINGS)
    assert len(sentences) == 8 and all(1 <= count <= 5 for count in (targets == 1).sum(dim=1))


def test_what_is_no_sentence_is_asked_for_again_and_reported(tmp_path, capsys):
    path, cut, refusal = tmp_path / "out.jsonl", reply(S, "length"), reply("I cannot do that.")
    with ChatServer({0: cut, 1: refusal, 2: reply(None), **dict.fromkeys(range(4, 8), refusal)}
                    ) as server:
        generate(path, server.url, 3, "--requests", "1")
        assert len(server.prompts) == 4 + 4 + 1
        assert [len(set(server.prompts[:i])) for i in (4, 8, 9)] == [1, 2, 3]
        shown, kept = capsys.readouterr(), lines(path)
        assert [line["request"] for line in kept] == [0, 2] and "2 sentences" in shown.out
        named = server.prompts[4].partition(": ")[2].partition(".")[0]
        assert f"in 4 answers: 1, the last about {named}: 'I cannot do that.' (stop)" in shown.err
        generate(path, server.url, 3)
        assert lines(path)[:2] == kept and lines(path)[2]["request"] == 1


def test_refusals_of_earlier_calls_do_not_stop_the_others(tmp_path, capsys):
    path, refusal = tmp_path / "out.jsonl", reply("I cannot do that.")
    with ChatServer(dict.fromkeys(range(40), refusal)) as server:
        with pytest.raises(UserError, match="without a sentence"):
            generate(path, server.url, 50, "--requests", "1")
        generate(path, server.url, 12, "--requests", "1")  # all of which is written
        server.troubles = dict.fromkeys(range(len(server.prompts), 999), refusal)
        generate(path, server.url, 23, "--requests", "1")
    assert len(lines(path)) == 12 and "in 4 answers: 11, the last" in capsys.readouterr().err


def test_a_file_that_is_whole_is_not_replaced(tmp_path):
    path = tmp_path / "out.jsonl"
    with ChatServer() as server:
        generate(path, server.url, 2)
        before = path.stat().st_ino
        generate(path, server.url, 4)
    assert path.stat().st_ino == before and len(lines(path)) == 4  # two may write to it


def test_a_model_that_writes_no_sentence_is_not_asked_forever(tmp_path):
    with ChatServer(dict.fromkeys(range(999), reply(f"<think>{T}", "length"))) as server:
        with pytest.raises(UserError, match=r"without a sentence.*: 10, .*\(length\)"):
            generate(tmp_path / "out.jsonl", server.url, 500, "--requests", "1")
        assert len(server.prompts) < 50


def test_ctrl_c_ends_at_once_and_says_how_to_go_on(tmp_path):
    path, end = tmp_path / "out.jsonl", threading.Event()
    with ChatServer(dict.fromkeys(range(2, 99), lambda _: end.wait())) as server:
        process = subprocess.Popen(  # pytest itself may run where Ctrl-C is ignored
            [sys.executable, "tools/generate_texts.py", path, "--labels", "owl,cat", "--url",
             server.url, "--model", "llm"], cwd=trees.ROOT, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while len(server.prompts) < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)  # though no answer comes
        end.set()
    assert process.returncode == 1 and len(lines(path)) == 2
    assert shown.splitlines()[-1] == "interrupted; the same command goes on"


def test_labels_of_a_file_or_of_a_dataset(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("owl, brown\nice cream\n")
    root = trees.make("voc2007", tmp_path / "voc")
    voc = data.load_dataset("voc2007", root, "test")
    with ChatServer() as server:
        for what, names in ((["--labels", str(labels)], {"owl, brown", "ice cream"}),
                            (["--data", "voc2007", "--root", str(root)], {*voc.labels})):
            path = tmp_path / f"{len(names)}.jsonl"
            generate_texts.main([str(path), *what, "--url", server.url, "--model", "llm",
                                 "--count", "30", "--quiet"])
            assert {name for line in lines(path) for name in line["labels"]} <= names
            assert len({tuple(line["labels"]) for line in lines(path)}) > 3


@pytest.mark.parametrize("arguments, message", [
    (["none/out.jsonl"], "none/out.jsonl"), (["other.jsonl"], "other labels or another seed"),
    (["text.jsonl"], "not written by this program"), (["new", "--requests", "0"], "0 is below 1"),
    (["new", "--root", "x"], "--data"), (["new", "--url", "localhost"], "http"),
    (["new", "--labels", ""], "empty name")])
def test_what_cannot_be_is_refused_before_anything_is_asked(tmp_path, monkeypatch, capsys,
                                                            arguments, message):
    monkeypatch.chdir(tmp_path)
    trees.write(tmp_path / "other.jsonl", '{"request": 0, "labels": ["x"], "description": "A."}\n')
    trees.write(tmp_path / "text.jsonl", "A.\n")
    with ChatServer() as server, pytest.raises((UserError, OSError, SystemExit)) as error:
        generate(arguments[0], server.url, 9, *arguments[1:])
    assert message in str(error.value) + capsys.readouterr().err and not server.prompts
    assert not (tmp_path / "new").exists()


# ---- the authors' releases

@pytest.fixture
def photo(tmp_path):
    data.write_file(tmp_path / "photo.png", world.scene("benchmark", 7, 0))
    return tmp_path / "photo.png"


def convert(folder, *arguments):
    """-> the path of what convert_release.py makes of files in a folder."""
    output = folder / f"{len(list(folder.iterdir()))}.pt"
    files = [str(folder / x) if (folder / x).is_file() else x for x in arguments]
    convert_release.main([*files, "--output", str(output)])
    return output


@pytest.fixture
def trained_mkt(tmp_path):
    """A model whose weights are no longer CLIP's, its files as MKT's authors release theirs."""
    torch.manual_seed(0)
    model = mkt.MKT(clip_model.load("toy-ViT")[0], topk=16)
    for parameter in (*model.blocks.parameters(), *model.ln_post.parameters(), model.proj,
                      model.context):
        parameter.data += 0.02 * torch.randn_like(parameter)
    image, trained = model.clip.visual.state_dict(), model.state_dict()
    last = len(model.clip.visual.transformer.resblocks) - 1
    for name in trained.keys() - {"context", "proj"}:
        theirs = name.replace("blocks.0.", f"transformer.resblocks.{last - 1}.")
        image[theirs.replace("blocks.1.", f"transformer.resblocks.{last}.")] = trained[name]
    del image["proj"]
    image |= {"projection_dist": model.proj, "projection.fc1.weight": torch.randn(4, 4)}
    text = {name: value.clone() for name, value in model.clip.state_dict().items()
            if not name.startswith("visual.") and name != "logit_scale"}
    text["token_embedding.weight"] += 1  # of all tokens; those of labels do not count
    text["token_embedding.weight"][model.context_ids] = model.context
    torch.save(image, tmp_path / "STAGE1.pth")
    torch.save({f"module.{name}": value for name, value in text.items()}, tmp_path / "STAGE2.pth")
    return model


@torch.no_grad()
def test_mkt_as_released(trained_mkt, tmp_path, photo, capsys):
    both = convert(tmp_path, "mkt", "STAGE1.pth", "STAGE2.pth", "--clip", "toy-ViT")
    first = convert(tmp_path, "mkt", "STAGE1.pth", "--clip", "toy-ViT")
    clip, preprocess = clip_model.load("toy-ViT")
    clips_own = mkt.MKT(clip, topk=16).context
    for path, context in (both, trained_mkt.context), (first, clips_own):
        found, expected = checkpoint(path)["model"], trained_mkt.state_dict() | {"context": context}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    args = checkpoint(both)["args"]
    assert (args["preprocess"], args["data"], args["clip"]) == ("authors", "nuswide", "toy-ViT")
    labels = ["star", "blue boat", "owl"]
    z = trained_mkt.label_embeddings(trained_mkt.prompts(labels))
    global_, local = trained_mkt(preprocess(data.open_image(photo))[None])
    scores = mkt.two_stream_scores(local, global_, z, 16)[0]
    line, = predictions(mkt, capsys, photo, "--checkpoint", both, "--labels", ",".join(labels),
                        "--preprocess", "clip")
    assert trees.shown(line, labels) == pytest.approx(scores.tolist(), abs=2e-4)
    rows = mkt.main(["--eval", str(both), "--data", "toy", "--limit", "8", "--workers", "0",
                     "--device", "cpu"])
    assert rows[-1]["name"] == "MKT" and 0 < rows[-1]["zsl_mAP"] <= 1


def test_another_file_or_clip_than_mkts_is_refused(trained_mkt, tmp_path):
    image = checkpoint(tmp_path / "STAGE1.pth")
    for message, changed in (
            ("visual.conv1.weight", {"conv1.weight": 1.01 * image["conv1.weight"]}),
            ("visual.proj", {"projection_dist": image["projection_dist"][:, :9]}),
            ("visual.fc.bias", {"fc.bias": torch.zeros(2)})):
        torch.save(image | changed, tmp_path / "OTHER.pth")
        with pytest.raises(UserError, match=f"OTHER.pth: {message} is not that"):
            convert(tmp_path, "mkt", "OTHER.pth", "--clip", "toy-ViT")
    text = checkpoint(tmp_path / "STAGE2.pth")
    del text["module.ln_final.bias"]
    torch.save(text, tmp_path / "OTHER.pth")
    with pytest.raises(UserError, match="OTHER.pth lacks ln_final.bias"):
        convert(tmp_path, "mkt", "STAGE1.pth", "OTHER.pth", "--clip", "toy-ViT")
    with pytest.raises(UserError, match="ResNet"):
        convert(tmp_path, "mkt", "STAGE1.pth", "--clip", "toy-RN")


def write_comc(path, weight, weights=None, **more):
    """A file like theirs: with the state of an optimiser and a pickled scheduler."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    torch.save({"state_dict": {"adapter.0.weight": weight, **(weights or {})}, "epoch": 20,
                "val_result": None, "optimizer": optimizer.state_dict(), "scheduler": scheduler,
                **more}, path)


@torch.no_grad()
def test_comc_as_released(tmp_path, photo, capsys):
    clip, preprocess = clip_model.load("toy-RN")
    torch.manual_seed(0)
    weight, memory = torch.randn(80, 128), F.normalize(torch.randn(80, 128), dim=-1).half()
    with torch.enable_grad():
        write_comc(tmp_path / "model.tar", weight)
    torch.save(memory, tmp_path / "memory.pt")
    prompts = [fill_template(template, label) for label in data.COCO_LABELS
               for template in lang_cls.TEMPLATES]
    ours = F.normalize(clip.encode_text(clip.tokenize(prompts)), dim=-1)
    ours = ours.view(80, -1, 128).mean(dim=1)
    images = preprocess(data.open_image(photo))[None]
    global_, local = clip.encode_image_dense(images, global_position=False)
    x = F.normalize(torch.cat([global_[:, None], local], dim=1), dim=-1)
    for more, labels in ([], ours), (["--memory", "memory.pt"], memory.float()):
        path = convert(tmp_path, "comc", "model.tar", *more, "--clip", "toy-RN")
        model = lang_cls.CoMC(weight, F.normalize(labels, dim=-1))
        expected = lang_cls.merge(model(x, mapping_weight=0.3))[0]
        line, = predictions(lang_cls, capsys, photo, "--checkpoint", path, "--top", 80)
        found = trees.shown(line, data.COCO_LABELS)
        assert found == pytest.approx(expected.tolist(), abs=2e-3)
    root = trees.make("coco", tmp_path / "coco")
    rows = lang_cls.main(["--eval", str(path), "--root", str(root), "--workers", "0", "--device",
                          "cpu"])
    assert rows[-1]["name"] == "CoMC" and 0 < rows[-1]["mAP"] <= 1


def test_another_file_than_comcs_is_refused(tmp_path):
    weight = torch.randn(80, 128)
    write_comc(tmp_path / "model.tar", weight)
    write_comc(tmp_path / "bias.tar", weight, {"adapter.0.bias": torch.randn(80)})
    torch.save(torch.randn(3, 128), tmp_path / "memory.pt")
    for files, message in (("bias.tar", "bias.tar is not"),
                           ("model.tar --memory memory.pt", r"memory.pt has \[3, 128\]"),
                           ("memory.pt", "memory.pt is not"),
                           ("model.tar --memory model.tar", "model.tar is not"),
                           ("none.tar", "none.tar: there is no such file")):
        with pytest.raises(UserError, match=message):
            convert(tmp_path, "comc", *files.split(), "--clip", "toy-RN")
    output = tmp_path / "memory.pt"
    with pytest.raises(UserError, match="memory.pt is there already"):
        convert_release.main(["comc", str(tmp_path / "model.tar"), "--output", str(output)])


class Malicious(functools.partial):
    def __reduce__(self):  # pickled as the call of a function
        return self.func, self.args


def test_nothing_that_is_pickled_in_a_release_is_executed(tmp_path):
    path, harm = tmp_path / "model.tar", tmp_path / "harm"
    write_comc(path, torch.randn(80, 128), extra=Malicious(open, str(harm), "w"))
    torch.load(path, weights_only=False)
    assert harm.exists()  # what the file does to whoever is careless
    harm.unlink()
    convert(tmp_path, "comc", "model.tar", "--clip", "toy-RN")
    assert not harm.exists()
