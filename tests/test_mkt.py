import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_model
import data
import mkt

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--limit", "96", "--batch-size", "32", "--quiet"]


@pytest.fixture(scope="module")
def toy():
    return clip_model.load("toy")


def small_clip(layers=4, seed=0):
    """A random ViT with 9 patches whose norms and biases are not at their trivial start."""
    torch.manual_seed(seed)
    clip = clip_model.CLIP(64, 24, layers, 64, 8, 77, 600, 64, 1, 2).initialize_parameters()
    for parameter in clip.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    clip.tokenizer = clip_model.load("toy")[0].tokenizer
    clip.token_embedding = torch.nn.Embedding(len(clip.tokenizer), 64)
    return clip.double().eval()


def random_targets(images, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (images, labels), generator=generator).to(torch.int8)


# ---- scores and losses

@pytest.mark.parametrize("streams", ["both", "global", "local"])
def test_two_stream_scores_equal_a_loop(streams):
    torch.manual_seed(0)
    local, global_, z = torch.randn(3, 7, 5), torch.randn(3, 5), torch.randn(4, 5)
    scores = mkt.two_stream_scores(local, global_, z, 3, streams)
    for b in range(3):
        a = [sum(sorted((local[b] @ z[c]).tolist())[-3:]) / 3 for c in range(4)]
        g = [float(global_[b] @ z[c]) for c in range(4)]
        a, g = ([x / math.sqrt(sum(y * y for y in v)) for x in v] for v in (a, g))
        expected = {"both": [(x + y) / 2 for x, y in zip(a, g)], "global": g, "local": a}[streams]
        assert scores[b].tolist() == pytest.approx(expected, abs=1e-6)


def ranking_loss_of_all_pairs(scores, targets):
    """B x C x C: every ordered pair of labels, masked."""
    present, absent = targets == 1, targets == -1
    margins = (1 + scores[:, None, :] - scores[:, :, None]).clamp(min=0)  # [b, p, n]
    margins = margins * (present[:, :, None] & absent[:, None, :])
    violated = (margins > 0).sum((1, 2)).to(scores.dtype)
    return (margins.sum((1, 2)) / (violated + 1e-8)).mean()


@pytest.mark.parametrize("scale", [0.01, 1, 5])
def test_ranking_loss_equals_all_pairs_with_gradient(scale):
    torch.manual_seed(1)
    scores = (scale * torch.randn(9, 13, dtype=torch.float64)).requires_grad_()
    targets = random_targets(9, 13)
    targets[0], targets[1], targets[2] = 0, -1, 1  # all unknown, none present, none absent
    loss, expected = mkt.ranking_loss(scores, targets), ranking_loss_of_all_pairs(scores, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(x, scores)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_ranking_loss_by_hand():
    scores = torch.tensor([[2.0, 0.5, 1.5, 9.0]])
    targets = torch.tensor([[1, -1, -1, 0]])  # margins 1 + 0.5 - 2 < 0 and 1 + 1.5 - 2 = 0.5
    assert mkt.ranking_loss(scores, targets).item() == pytest.approx(0.5)
    assert mkt.ranking_loss(scores, torch.zeros(1, 4)).item() == 0


# ---- model

def test_student_and_teacher_start_as_clip():
    clip = small_clip()
    model, images = mkt.MKT(clip, topk=2), torch.randn(3, 3, 24, 24).double()
    tokens = model.trunk(images)
    global_, local = model.student(tokens)
    expected_global, expected_local = clip.encode_image_dense(images)
    torch.testing.assert_close(global_, expected_global)
    torch.testing.assert_close(local, expected_local)
    torch.testing.assert_close(model.teacher(tokens), expected_global)


def test_stage_1_equals_full_student_and_full_teacher_with_gradients():
    clip = small_clip()
    model, images = mkt.MKT(clip, topk=2), torch.randn(5, 3, 24, 24).double()
    for parameter in model.blocks.parameters():  # a student that has moved away from the teacher
        parameter.data += 0.02 * torch.randn_like(parameter)
    z, targets = torch.randn(11, 64).double(), random_targets(5, 11)
    loss, terms = mkt.batch_loss(model, 1, images, targets, z, Namespace(distillation=0.3))
    loss.backward()

    student, teacher = copy.deepcopy(clip), copy.deepcopy(clip)
    for i in (-2, -1):
        student.visual.transformer.resblocks[i] = copy.deepcopy(model.blocks[i])
    for parameter in student.parameters():
        parameter.requires_grad_(True).grad = None
    global_, local = student.encode_image_dense(images)
    ranking = ranking_loss_of_all_pairs(mkt.two_stream_scores(local, global_, z, 2), targets)
    distillation = (global_ - teacher.encode_image(images).detach()).abs().mean()
    expected = ranking.float() + 0.3 * distillation.float()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["ranking"].item() == pytest.approx(ranking.item(), rel=1e-6)
    pairs = [(model.proj, student.visual.proj)]
    pairs += zip(model.ln_post.parameters(), student.visual.ln_post.parameters())
    for mine, full in zip(model.blocks, student.visual.transformer.resblocks[-2:]):
        pairs += zip(mine.parameters(), full.parameters())
    for mine, full in pairs:
        assert full.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, full.grad, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in clip.parameters())


def test_prompts_are_the_tokens_of_the_sentence(toy):
    labels = ["star", "traffic light", "zyxwvut"]
    prompts = mkt.Prompts(toy[0], labels)
    tokens = toy[0].tokenize([f"There is a {label} in the scene" for label in labels])
    length = prompts.tokens.shape[1]
    assert torch.equal(prompts.tokens, tokens[:, :length]) and not tokens[:, length:].any()
    words = toy[0].tokenizer.encode("there is a in the scene")
    for row, slots in zip(prompts.tokens, prompts.slots):
        assert slots[slots > 0].tolist() == [1, 2, 3, 4, 5, 6]
        assert row[slots > 0].tolist() == words == prompts.context.tolist()
    assert prompts.eot.tolist() == tokens.argmax(dim=1).tolist()
    with pytest.raises(clip_model.ClipError, match="long long"):
        mkt.Prompts(toy[0], ["star", "long " * 80])


def test_label_embeddings_start_as_clips_and_only_the_context_learns(toy):
    model = mkt.MKT(copy.deepcopy(toy[0]), topk=4)
    labels = [f"{a} {b}" for a in ("red", "old") for b in data.TOY_LABELS[:5]]
    prompts = mkt.Prompts(model.clip, labels)
    tokens = model.clip.tokenize([f"There is a {label} in the scene" for label in labels])
    whole = model.label_embeddings(prompts)
    torch.testing.assert_close(whole, model.clip.encode_text(tokens), rtol=1e-4, atol=1e-5)
    chunked = model.label_embeddings(prompts, chunk=3)
    torch.testing.assert_close(chunked, whole)
    gradients = [torch.autograd.grad(z.square().sum(), model.context)[0] for z in (whole, chunked)]
    assert gradients[0].abs().amax(dim=1).min() > 0  # every context word matters
    scale = gradients[0].abs().max()  # sums of float32 in another order
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in model.clip.parameters())


def test_a_resnet_and_an_impossible_topk_are_refused(toy):
    with pytest.raises(mkt.UserError, match="ResNet"):
        mkt.MKT(clip_model.load("toy-RN")[0])
    for topk in (0, 65):
        with pytest.raises(mkt.UserError, match=r"1\.\.64"):
            mkt.MKT(toy[0], topk=topk)


# ---- optimisation

def test_layer_wise_learning_rate_decay():
    model = mkt.MKT(small_clip(layers=12), topk=2)
    groups = mkt.parameter_groups(model, 0.05)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)  # none twice
    expected = {id(model.proj): 13, **{id(p): 13 for p in model.ln_post.parameters()},
                **{id(p): 11 for p in model.blocks[0].parameters()},  # block 10 has id 11
                **{id(p): 12 for p in model.blocks[1].parameters()}}
    assert found.keys() == expected.keys()
    for parameter in (*model.blocks.parameters(), *model.ln_post.parameters(), model.proj):
        group = found[id(parameter)]
        assert group["scale"] == pytest.approx(0.65 ** (13 - expected[id(parameter)]))
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0)


def test_learning_rate_follows_the_formula():
    rate = lambda epoch: mkt.learning_rate(epoch, 1e-3, 1e-6, 20, 2)  # noqa: E731
    assert rate(0) == 0 and rate(1) == pytest.approx(5e-4) and rate(2) == pytest.approx(1e-3)
    assert rate(11) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2) and rate(20) == pytest.approx(1e-6)
    assert rate(6.5) == pytest.approx(1e-6 + (1e-3 - 1e-6) * math.cos(math.pi / 8) ** 2)
    assert mkt.learning_rate(0, 1e-3, 1e-8, 4, 0) == 1e-3


# ---- the program

def rows_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quick run: two epochs of stage 1, one of stage 2."""
    output = tmp_path_factory.mktemp("mkt") / "run"
    mkt.main([*QUICK, "--epochs", "2", "--prompt-epochs", "1", "--output", str(output)])
    return output


def test_a_run_writes_its_files_and_changes_what_it_should(trained, toy):
    results = json.loads((trained / "results.json").read_text())
    assert results["method"] == "mkt" and results["data"] == "toy" and results["clip"] == "toy-ViT"
    rows = results["rows"]
    assert [row["kind"] for row in rows[-2:]] == ["ablation", "method"]
    assert sum(row["kind"] == "zero-shot" for row in rows) >= 4
    keys = {f"{setting}_{metric}" for setting in ("zsl", "gzsl") for metric in (
        "mAP", "P@3", "R@3", "F1@3", "P@5", "R@5", "F1@5")}
    for row in rows:
        assert keys <= row.keys() and all(0 <= row[key] <= 1 for key in keys)
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in log] == [(1, 1), (1, 2), (2, 1)]
    assert all({"loss", "ranking", "lr", "seconds"} <= line.keys() for line in log)
    assert json.loads((trained / "args.json").read_text())["epochs"] == 2
    state = torch.load(trained / "best.pt", weights_only=True)
    start = mkt.MKT(toy[0], topk=4).trained()
    assert state["model"].keys() == start.keys()
    for name, value in state["model"].items():
        assert not torch.equal(value, start[name]), f"{name} did not train"


def test_stage_1_does_not_touch_the_context(tmp_path, toy):
    mkt.main([*QUICK, "--epochs", "1", "--prompt-epochs", "0", "--output", str(tmp_path)])
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert torch.equal(state["model"]["context"], mkt.MKT(toy[0], topk=4).context)
    assert [row["kind"] for row in rows_of(tmp_path)].count("ablation") == 0


def test_evaluating_the_checkpoint_repeats_the_final_row(trained, tmp_path):
    mkt.main([*QUICK, "--eval", str(trained / "best.pt"), "--output", str(tmp_path)])
    assert rows_of(tmp_path)[-1] == rows_of(trained)[-1]


def test_zero_shot_rows_equal_a_plain_computation(trained, toy):
    clip, preprocess = toy
    test = data.load_dataset("toy", split="test", transform=preprocess).subset(range(96))
    images = torch.stack([test[i][0] for i in range(96)])
    texts = clip.encode_text(clip.tokenize([f"a photo of a {label}." for label in test.labels]))
    cosines = F.normalize(clip.encode_image(images)) @ F.normalize(texts).T
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    present = (test.targets[:, test.unseen] == 1).numpy()
    kept = present.any(axis=0)
    expected = sklearn_metrics.average_precision_score(
        present[:, kept], cosines[:, test.unseen].detach().numpy()[:, kept], average="macro")
    row = next(row for row in rows_of(trained) if row["name"].startswith('zero-shot, global, "a p'))
    assert row["zsl_mAP"] == pytest.approx(expected, abs=1e-4)


def test_killed_in_an_epoch_and_resumed_gives_the_same_numbers(tmp_path):
    command = [sys.executable, str(ROOT / "mkt.py"), "--limit", "320", "--batch-size", "16",
               "--epochs", "3", "--prompt-epochs", "1"]
    # one thread, and the same in both: sums in another order are not the same to the last bit
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, env=environment,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = subprocess.Popen([*command, "--output", str(tmp_path / "killed")], env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists():  # one epoch is done, the next has 20 steps to go
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert len(log.read_text().splitlines()) < 4
    assert not (tmp_path / "killed" / "results.json").exists()
    subprocess.run([*command, "--output", str(tmp_path / "killed"), "--resume"], check=True,
                   env=environment, stdout=subprocess.DEVNULL)
    whole, resumed = (json.loads((tmp_path / name / "results.json").read_text())
                      for name in ("whole", "killed"))
    del whole["seconds"], resumed["seconds"]
    assert resumed == whole
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
              for name in ("whole", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resuming_a_finished_run_repeats_its_results(trained):
    rows, weights = rows_of(trained), (trained / "last.pt").read_bytes()
    mkt.main([*QUICK, "--epochs", "2", "--prompt-epochs", "1", "--output", str(trained),
              "--resume"])
    assert rows_of(trained) == rows and (trained / "last.pt").read_bytes() == weights


def test_a_second_run_sets_the_first_aside(tmp_path):
    arguments = [*QUICK, "--epochs", "1", "--prompt-epochs", "0", "--output", str(tmp_path)]
    mkt.main(arguments)
    first = (tmp_path / "last.pt").read_bytes()
    mkt.main([*arguments, "--seed", "1"])
    assert (tmp_path / "previous-1" / "last.pt").read_bytes() == first
    assert (tmp_path / "last.pt").read_bytes() != first


def test_validation_images_are_held_out_and_select_the_best_epoch(tmp_path):
    mkt.main([*QUICK, "--epochs", "2", "--prompt-epochs", "1", "--val-fraction", "0.25",
              "--output", str(tmp_path)])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = [line["val_mAP"] for line in log]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert len(best["log"]) == scores.index(max(scores)) + 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(trained, capsys, tmp_path,
                                                                     monkeypatch):
    calls, original = [], mkt.batch_loss

    def batch_loss(*arguments):
        calls.append(1)
        loss, terms = original(*arguments)
        return (loss * float("nan") if len(calls) == 5 else loss), terms

    monkeypatch.setattr(mkt, "batch_loss", batch_loss)
    with pytest.raises(SystemExit) as error:
        mkt.main([*QUICK, "--epochs", "3", "--output", str(tmp_path)])  # 3 steps an epoch
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "stage 1, epoch 2, step 2" in message and "ranking" in message and "last.pt" in message
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["model"].values())


def test_predict_takes_any_labels(trained, tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    for i, name in enumerate(["b.png", "inner/a.JPG"]):
        data.toy_scene("benchmark", 7, i).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    mkt.main(["--predict", str(tmp_path), "--checkpoint", str(trained / "best.pt"), "--labels",
              "blue star, submarine,cactus", "--quiet"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["b.png", "a.JPG"]
    for line in lines:
        scores = [label["score"] for label in line["labels"]]
        assert {label["label"] for label in line["labels"]} == {"blue star", "submarine", "cactus"}
        assert scores == sorted(scores, reverse=True)
    # the same numbers as the pieces give
    options = mkt.parse_arguments(["--device", "cpu"])
    model, preprocess, _ = mkt.load_checkpoint(trained / "best.pt", options)
    image = preprocess(Image.open(tmp_path / "b.png"))[None]
    with torch.no_grad():
        z = model.label_embeddings(mkt.Prompts(model.clip, ["blue star", "submarine", "cactus"]))
        scores = model.scores(*model.student(model.trunk(image)), z)[0]
    assert scores.max().item() == pytest.approx(lines[0]["labels"][0]["score"], abs=1e-3)
    mkt.main(["--predict", str(tmp_path / "b.png"), "--checkpoint", str(trained / "best.pt")])
    line = json.loads(capsys.readouterr().out)
    assert sorted(label["label"] for label in line["labels"]) == data.TOY_LABELS


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nosuch"], "nosuch"),
    (["--data", "nuswide"], "--root"),
    (["--data", "nuswide", "--root", "/no/such/folder", "--clip", "toy"], "/no/such/folder"),
    (["--clip", "ViT-Z/99"], "ViT-Z/99"),
    (["--clip", "toy-RN"], "ResNet"),
    (["--topk", "65"], "--topk 65"),
    (["--epochs", "-1"], "--epochs"),
    (["--lr", "nan"], "--lr"),
    (["--batch-size", "0"], "--batch-size"),
    (["--val-fraction", "1.5"], "--val-fraction"),
    (["--epochs", "0", "--prompt-epochs", "0"], "nothing to train"),
    (["--resume"], "last.pt"),
    (["--eval", "nosuch.pt"], "nosuch.pt"),
    (["--eval", "{text}"], "not a checkpoint"),
    (["--eval", "{pickle}"], "not a checkpoint"),
    (["--eval", "{other}"], "trm"),
    (["--eval", "{labels}"], "labels"),
    (["--eval", "{clip}"], "other weights"),
    (["--eval", "{best}", "--clip", "ViT-B/16"], "toy-ViT"),
    (["--predict", "{image}"], "--checkpoint"),
    (["--predict", "{text}", "--checkpoint", "{best}"], "text.jpg"),
    (["--predict", "{nothing}", "--checkpoint", "{best}"], "nothing"),
    (["--predict", "{image}", "--checkpoint", "{best}", "--labels", " , "], "--labels"),
    (["--predict", "{image}", "--checkpoint", "{best}", "--labels", "owl,cat,owl"], "owl"),
    (["--predict", "{image}", "--checkpoint", "{best}", "--labels", "owl"], "at least two"),
    (["--labels", "owl,cat"], "--predict"),
    (["--eval", "{best}", "--resume"], "--resume: give one of them"),
    (["--eval", "{best}", "--topk", "3"], "--topk 4"),
    (["--eval", "{best}", "--normalization", "imagenet"], "--normalization clip"),
    (["--eval", "{damaged}"], "damaged"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "nosuch"], "--device nosuch"),
    (["--seed", "5000000000"], "--seed"),
    (["--limit", "1", "--val-fraction", "0.5"], "--val-fraction 0.5"),
])
def test_bad_input_is_one_line_and_overwrites_nothing(trained, tmp_path, capsys, arguments,
                                                      message):
    best = torch.load(trained / "best.pt", weights_only=True)
    files = {name: tmp_path / file for name, file in {
        "text": "text.jpg", "pickle": "pickle.pt", "other": "other.pt", "labels": "labels.pt",
        "clip": "clip.pt", "damaged": "damaged.pt", "image": "image.png"}.items()}
    files["text"].write_text("no image, no checkpoint")
    torch.save([Path("a")], files["pickle"])
    torch.save({**best, "method": "trm_ml"}, files["other"])
    torch.save({**best, "labels": best["labels"][:-1] + ["owl"]}, files["labels"])
    torch.save({**best, "clip_fingerprint": "0" * 8}, files["clip"])
    torch.save({**best, "model": {"proj": best["model"]["proj"]}}, files["damaged"])
    Image.new("RGB", (40, 30)).save(files["image"])
    files.update(best=trained / "best.pt", nothing=tmp_path / "nothing")
    output = tmp_path / "output"
    before = {file: file.read_bytes() for file in trained.iterdir()}
    arguments = [argument.format(**files) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        mkt.main([*arguments, "--output", str(output)])
    printed = capsys.readouterr().err.strip()
    assert error.value.code == 2 and message in printed and "Traceback" not in printed
    assert printed.startswith("mkt.py: error: ")
    assert not output.exists()
    assert before == {file: file.read_bytes() for file in trained.iterdir()}


def test_resume_with_other_settings_is_refused(trained, capsys):
    with pytest.raises(SystemExit):
        mkt.main([*QUICK, "--epochs", "5", "--prompt-epochs", "1", "--output", str(trained),
                  "--resume"])
    assert "--epochs 2, not 5" in capsys.readouterr().err


def test_nuswide_from_its_official_files(tmp_path, monkeypatch, capsys):
    """Both stages with the paper's settings but for their length, on a tree of six images."""
    from test_data import CONCEPTS, SEEN, write_nuswide
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_nuswide(tmp_path / "nus")
    arguments = ["--data", "nuswide", "--root", str(tmp_path / "nus"), "--clip", "toy-ViT",
                 "--workers", "0", "--output", str(tmp_path / "run"), "--quiet"]
    mkt.main([*arguments, "--epochs", "1", "--prompt-epochs", "1"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"] == "nuswide"
    assert {"zsl_mAP", "gzsl_mAP", "zsl_F1@3", "gzsl_F1@5"} <= results["rows"][-1].keys()
    state = data.read_checkpoint(tmp_path / "run" / "best.pt", "mkt")
    assert state["labels"] == SEEN + CONCEPTS
    options = json.loads((tmp_path / "run" / "args.json").read_text())
    assert options["topk"] == 16 and options["augment"] == "yes" and options["distillation"] == 1
    with pytest.raises(SystemExit):  # it would write over the run's results
        mkt.main([*arguments, "--eval", str(tmp_path / "run" / "best.pt")])
    assert "results.json" in capsys.readouterr().err
    mkt.main([*arguments, "--eval", str(tmp_path / "run" / "best.pt"),
              "--output", str(tmp_path / "evaluated")])
    assert rows_of(tmp_path / "evaluated")[-1] == results["rows"][-1]


def test_half_precision_trains_and_ranks_about_the_same(trained, tmp_path):
    mkt.main([*QUICK, "--epochs", "2", "--prompt-epochs", "1", "--precision", "bf16",
              "--output", str(tmp_path)])
    for half, full in zip(rows_of(tmp_path), rows_of(trained)):
        assert half["gzsl_mAP"] == pytest.approx(full["gzsl_mAP"], abs=0.03)
