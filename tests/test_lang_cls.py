"""lang_cls.py: prompts, the classifier, and the program."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clip_model
import data
import lang_cls
import metrics
from data import UserError
from test_sentences import ChatServer, lines


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
    assert len(set(data.TEMPLATES)) == len(data.TEMPLATES) >= 24
    assert data.TEMPLATES[0] == "a photo of a {}."
    for label, expected in {
            "dog": "a photo of a dog.", "apple": "a photo of an apple.",
            "umbrella": "a photo of an umbrella.", "unicycle": "a photo of a unicycle.",
            "hourglass": "a photo of an hourglass.", "tv": "a photo of a tv.",
            "skis": "a photo of skis.", "snow": "a photo of snow.", "birds": "a photo of birds.",
            "sky": "a photo of the sky.", "dancing": "a photo of dancing.",
            "glass": "a photo of a glass.", "orange juice": "a photo of orange juice.",
            "wedding ring": "a photo of a wedding ring.", "bus": "a photo of a bus."}.items():
        assert data.fill_template("a photo of a {}.", label) == expected
    assert data.fill_template("An {} or {{}}: {}", "dog") == "a dog or {dog}: dog"


def test_template_sentences_count_and_targets():
    sentences, targets = lang_cls.template_sentences(["dog", "ear"], ["one {}", "two {}"])
    assert sentences == 9 * ["a photo of a dog."] + ["one dog", "two dog"] + \
        9 * ["a photo of an ear."] + ["one ear", "two ear"]
    assert targets.dtype == torch.int8
    assert targets.tolist() == 11 * [[1, -1]] + 11 * [[-1, 1]]


def test_load_templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_bytes("\ufeffa photo of a {}.\r\n\r\nein Foto: {}\r\n".encode())
    assert data.load_templates(path) == ["a photo of a {}.", "ein Foto: {}"]
    for content, message in {b"a {}\nno place\n": "line 2: .*{}", b"\n": "no templates",
                             b"a {}\nb {}\n\xff {}": "line 3: not UTF-8"}.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            data.load_templates(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="nowhere.txt: No such file"):
        data.load_templates("nowhere.txt")


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
    assert lang_cls.embed_texts(toy_resnet[0], ["a star"]).shape == (1, 128)
    assert "cannot be written" in capsys.readouterr().err


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
    lang_cls.main(["--predict", f"{tmp_path}/*.png", "--checkpoint", str(best), "--quiet",
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
    assert asked == ["RN50"]
    assert sorted(entry["label"] for entry in line["labels"]) == sorted(data.COCO_LABELS)
    options = lang_cls.parse_arguments(arguments[:3])
    _, model, _, state = lang_cls.load_checkpoint(tmp_path / "published.pth", options)
    assert torch.equal(model.weight, weight.float()) and state["labels"] == data.COCO_LABELS
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
    sentences, _, _ = data.load_texts(path, ["star", "moon", "fish"])
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
    (["--labels", "owl", "--clip", "toy-RN"], "at least two"),
    (["--labels", "owl,cat", "--data", "toy"], "--data toy"),
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
