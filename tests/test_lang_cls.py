"""lang_cls.py: the method's formulas, its texts, and the program."""
import json
from collections import Counter
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import clip_model
import data
import lang_cls
import metrics
import trees
from data import UserError
from trees import checkpoint, lines, results


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# ---- the method's formulas

def mixture(embedding, memory, temperature):
    weights = [torch.exp(torch.dot(embedding, m) / temperature) for m in memory]
    mixed = sum(w * m for w, m in zip(weights, memory))
    return mixed / mixed.norm()


def test_map_to_text_is_a_mixture_of_the_labels():
    torch.manual_seed(0)
    embeddings, memory = unit(2, 3, 8), unit(5, 8)
    mapped = lang_cls.map_to_text(embeddings, memory)
    for row, expected in zip(mapped.flatten(0, 1), embeddings.flatten(0, 1)):
        torch.testing.assert_close(row, mixture(expected, memory, 0.01))
    inputs = [embeddings.requires_grad_(), memory.requires_grad_(), 0.1]
    assert torch.autograd.gradcheck(lang_cls.map_to_text, inputs)


def test_ranking_loss_and_its_gradient_equal_a_loop_over_pairs():
    torch.manual_seed(0)
    targets = torch.randint(-1, 2, (16, 12), dtype=torch.int8)
    targets[3] = 1  # nothing absent: no pairs
    targets[4] = -1  # nothing present
    logits = torch.randn(16, 12, dtype=torch.float64, requires_grad=True)
    expected = 0
    for row, target in zip(logits, targets):
        for p in range(12):
            for n in range(12):
                if target[p] == 1 and target[n] == -1:
                    expected = expected + (1 - row[p] + row[n]).clamp(min=0) / 16
    loss = lang_cls.ranking_loss(logits, targets)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mapping_weight", [0.0, 0.3])
def test_scores_equal_a_loop_over_locations(mapping_weight):
    torch.manual_seed(0)
    weight, memory = torch.randn(6, 8).double(), unit(6, 8)
    global_, local = unit(3, 8), unit(3, 5, 8)
    model = lang_cls.CoMC(weight, memory)

    def logits(e):  # one embedding [8] -> [6]
        mapped = mixture(e, memory, 0.01)
        return weight @ ((1 - mapping_weight) * e + mapping_weight * mapped)

    whole = torch.stack([logits(e) for e in global_])
    best = torch.stack([torch.stack([logits(e) for e in image]).max(dim=0).values
                        for image in local])
    for streams, expected in (("global", whole), ("local", best), ("both", (whole + best) / 2)):
        scores = model.scores(global_, local, mapping_weight, streams)
        torch.testing.assert_close(scores, expected)


# ---- training

def train(model, embeddings, targets, folder, **options):
    args = {"output": folder, "lr": 1e-3, "noise": 0.0, "seed": 0, "epochs": 4, "device": "cpu",
            "batch_size": len(targets), "val_fraction": 0.0, **options}
    state = {"method": "lang_cls", "log": []}
    lang_cls.train(model, embeddings, targets, state, SimpleNamespace(**args))
    return state["log"]


def test_learning_rate():
    rates = [lang_cls.learning_rate(epoch, 1e-3, 20) for epoch in range(21)]
    assert rates[0] == 1e-5 and rates[1] == 1e-3 and rates[11] == pytest.approx(5e-4)
    # where the scheduler stands in the authors' release, after 20 epochs
    assert rates[20] == pytest.approx(6.15582970243117e-06)


def test_training_is_adam_with_weight_decay(tmp_path):
    torch.manual_seed(0)
    embeddings = unit(30, 8).float()
    targets = 2 * torch.randint(0, 2, (30, 5), dtype=torch.int8) - 1
    expected = (3 * torch.randn(5, 8)).requires_grad_()
    model = lang_cls.CoMC(expected.detach().clone(), unit(5, 8).float())
    train(model, embeddings, targets, tmp_path, epochs=6, lr=0.1)
    optimizer = torch.optim.Adam([expected], weight_decay=5e-4)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = lang_cls.learning_rate(epoch, 0.1, 6)
        expected.grad, = torch.autograd.grad(
            lang_cls.ranking_loss(embeddings @ expected.T, targets), expected)
        optimizer.step()
    torch.testing.assert_close(model.weight, expected, rtol=1e-4, atol=1e-4)


def test_noise_has_its_standard_deviation(tmp_path):
    # texts at the origin: the margin 1 - (w_p - w_n) x is normal, of mean 1 and deviation 2
    weight = torch.zeros(2, 16)
    weight[0, :4] = 10.0
    targets = torch.tensor([[1, -1]], dtype=torch.int8).repeat(50_000, 1)
    log = train(lang_cls.CoMC(weight, unit(2, 16).float()), torch.zeros(50_000, 16), targets,
                tmp_path, noise=0.1, epochs=1)
    expected = NormalDist().cdf(0.5) + 2 * NormalDist().pdf(0.5)
    assert log[0]["loss"] == pytest.approx(expected, rel=0.02)


def test_a_text_is_held_out_wherever_it_occurs(tmp_path):
    # texts at right angles, no noise, weights from zero: the columns of trained texts move
    embeddings = torch.eye(10).repeat(3, 1)
    targets = (2 * torch.eye(10, dtype=torch.int8) - 1).repeat(3, 1)
    model = lang_cls.CoMC(torch.zeros(10, 10), torch.eye(10))
    log = train(model, embeddings, targets, tmp_path, val_fraction=0.25, batch_size=4)
    is_held_out = (model.weight == 0).all(dim=0)
    assert is_held_out.sum() == 3  # of 10, and with each its two repetitions
    assert all("val_mAP" in line for line in log)


# ---- texts and their embeddings

def test_templates_count_and_targets():
    args = SimpleNamespace(sources="templates", texts=None, sentences=9, seed=0)
    sentences, targets = lang_cls.training_texts(["dog", "ear"], ["one {}", "two {}"], args)
    assert sentences == (9 * ["a photo of a dog."] + ["one dog", "two dog"]
                         + 9 * ["a photo of an ear."] + ["one ear", "two ear"])
    assert targets.dtype == torch.int8
    assert targets.tolist() == 11 * [[1, -1]] + 11 * [[-1, 1]]
    assert len(set(lang_cls.TEMPLATES)) == len(lang_cls.TEMPLATES)


TEXTS = [  # labels, a description, and what is present or why it is dropped
    (["dog", "Cell Phone "], "Two dogs  look at\na smartphone.", {"dog", "cell phone"}),
    (["man"], "A skateboarder in the air.", {"person"}),
    (["motor bike", "motorbike"], "It is parked.", {"motorcycle"}),
    (["aeroplane"], "A jet takes off.", {"airplane"}),
    (["dog", "dragon"], "A dog and a dragon.", "no or unknown label"),
    (["dog"], " \n", "empty or refusal"),
    (["dog"], "As an AI, I see no dog.", "empty or refusal"),
    (["dog"], "A Skateboarder in the air.", "duplicate"),
]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_load_texts_drops_and_counts(tmp_path, form):
    path = tmp_path / "texts"
    entries = [{"labels": labels, "description": text} for labels, text, _ in TEXTS]
    if form == "list":
        path.write_text(json.dumps(entries, indent=1))
    else:
        path.write_text("\r\n".join(map(json.dumps, entries)))
    sentences, targets, dropped = lang_cls.load_texts(path, data.COCO_LABELS)
    kept = {" ".join(text.split()): what for _, text, what in TEXTS if isinstance(what, set)}
    assert sentences == list(kept)
    for row, present in zip(targets.tolist(), kept.values()):
        assert row == [1 if label in present else -1 for label in data.COCO_LABELS]
    assert dropped == Counter(what for *_, what in TEXTS if isinstance(what, str))
    for wrong, message in (([3], 'texts, line 1: not {"labels"'), (["cow"], "no sentence of use")):
        path.write_text(json.dumps({"labels": wrong, "description": "dog"}))
        with pytest.raises(UserError, match=message):
            lang_cls.load_texts(path, ["dog"])


ARGS = SimpleNamespace(device="cpu", quiet=True)


@pytest.fixture(scope="module")
def toy_resnet():
    return clip_model.load("toy-RN")


def test_texts_are_embedded_as_if_one_by_one(toy_resnet):
    clip = toy_resnet[0]
    texts = ["a star and a fish", "a tree", 99 * "two boats, ", "a star and a fish", "a big house"]
    embeddings = lang_cls.embed_texts(clip, texts, ARGS)
    with torch.no_grad():
        expected = torch.cat([clip.encode_text(clip.tokenize(x, truncate=True)) for x in texts])
    torch.testing.assert_close(embeddings, F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)


def test_embeddings_are_kept_on_disk_for_these_texts_and_weights():
    clip, other = clip_model.load("toy-RN")[0], clip_model.load("toy-ViT")[0]
    texts = ["a star", "a tree", "a star"]
    embeddings = lang_cls.embed_texts(clip, texts, ARGS)
    clip.encode_text = other.encode_text = None  # cannot embed any more
    assert torch.equal(lang_cls.embed_texts(clip, texts, ARGS), embeddings)
    for another, changed in ((clip, ["a star", "a house"]), (other, texts)):
        with pytest.raises(TypeError):
            lang_cls.embed_texts(another, changed, ARGS)


# ---- the program

@torch.no_grad()
def embed(clip, images):
    return [F.normalize(x, dim=-1) for x in clip.encode_image_dense(images, global_position=False)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Arguments of a run of few seconds."""
    path = tmp_path_factory.mktemp("quick") / "templates.txt"
    path.write_text("a photo of a {}.\na scene with a {}.\n")
    return ["--sentences", "300", "--epochs", "4", "--batch-size", "64", "--device", "cpu",
            "--quiet", "--lr", "0.005", "--templates", str(path)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):
    """The folder of a quick run on the toy world."""
    folder = tmp_path_factory.mktemp("lang_cls")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        lang_cls.main([*quick, "--limit", "32", "--output", str(folder / "run")])
    return folder / "run"


def test_the_rows_are_what_the_pieces_give(trained, toy_resnet):
    rows = {row["name"]: row for row in results(trained)["rows"] if row["kind"] != "zero-shot"}
    assert len(rows) == 4
    clip, preprocess = toy_resnet
    test = data.load_dataset("toy", None, "test", preprocess, limit=32)
    embeddings = embed(clip, torch.stack([image for image, _ in test]))
    model = lang_cls.CoMC(**checkpoint(trained / "best.pt")["model"])
    for name, *setting in (("CoMC", 0.3, "both"), ("CoMC without mapping", 0.0, "both"),
                           ("CoMC, global alone", 0.3, "global"),
                           ("CoMC, local alone", 0.3, "local")):
        scores = model.scores(*embeddings, *setting).detach()
        mAP = metrics.mean_average_precision(scores, test.targets)
        assert rows[name]["mAP"] == pytest.approx(mAP, abs=1e-3), name


def test_eval_repeats_the_rows_and_heeds_what_is_typed(trained, tmp_path):
    arguments = ["--eval", str(trained / "best.pt"), "--device", "cpu", "--output"]
    lang_cls.main([*arguments, str(tmp_path)])
    assert results(tmp_path) == results(trained)
    *zero_shot, row = lang_cls.main([*arguments, str(tmp_path / "other"), "--streams", "local"])
    assert row["mAP"] == results(tmp_path)["rows"][-2]["mAP"]  # of "CoMC, local alone"


def test_a_run_resumes_after_kill_9_to_the_same_numbers(trained, quick, tmp_path):
    trees.run_killed("lang_cls", "best.pt", 4, [*quick, "--limit", "32", "--output", tmp_path])
    assert not (tmp_path / "results.json").exists()
    torch.manual_seed(99)
    lang_cls.main(["--resume", "--output", str(tmp_path), "--device", "cpu"])
    assert results(tmp_path) == results(trained)
    for name in ("best.pt", "last.pt"):
        trees.assert_same_weights(tmp_path / name, trained / name)


def test_labels_without_a_dataset_and_predict(quick, tmp_path, capsys, toy_resnet):
    clip, preprocess = toy_resnet
    run, labels = tmp_path / "run", ["star", "moon", "fish", "house"]
    lang_cls.main([*quick, "--labels", ", ".join(labels), "--clip", "toy-RN", "--output", str(run),
                   "--val-fraction", "0.2"])
    scores = [line["val_mAP"] for line in lines(run / "log.jsonl")]
    best = checkpoint(run / "best.pt")
    assert results(run)["rows"] == [] and scores[len(best["log"]) - 1] == max(scores)
    model = lang_cls.CoMC(**best["model"])
    trees.check_predictions(
        lang_cls, capsys, tmp_path, labels, lambda photo: model.scores(
            *embed(clip, preprocess(photo)[None]))[0], "--checkpoint", run / "best.pt")
