"""lang_cls.py: the method's formulas, training, texts and their embeddings, and the program."""
import json
from collections import Counter
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
from toy import world
from toy.grammar import fill_template, sentences_about
from trees import checkpoint, predictions, results

ARGS, _ = lang_cls.arguments(["--device", "cpu", "--quiet"])


@pytest.fixture(scope="module")
def toy():
    return clip_model.load("toy-RN")


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# ---- the method's formulas

@pytest.mark.parametrize("streams, merged", [
    ("global", [3.0, 0.0]), ("local", [2.0, 5.0]), ("both", [2.5, 2.5])])
def test_merge_takes_the_whole_image_and_the_best_location(streams, merged):
    scores = torch.tensor([[[3.0, 0.0], [1.0, 5.0], [2.0, 1.0]]])  # the whole image's come first
    assert lang_cls.merge(scores, streams).tolist() == [merged]


def test_map_to_text_is_a_mixture_of_the_labels():
    torch.manual_seed(0)
    embeddings, memory = unit(2, 3, 8), unit(5, 8)
    mapped = lang_cls.map_to_text(embeddings, memory)
    for row, embedding in zip(mapped.flatten(0, 1), embeddings.flatten(0, 1)):
        mixture = sum(torch.exp(torch.dot(embedding, m) / 0.01) * m for m in memory)
        torch.testing.assert_close(row, mixture / mixture.norm())
    inputs = [embeddings.requires_grad_(), memory.requires_grad_(), 0.1]
    assert torch.autograd.gradcheck(lang_cls.map_to_text, inputs)


def test_ranking_loss_and_its_gradient_equal_a_loop_over_pairs():
    torch.manual_seed(0)
    targets = torch.randint(-1, 2, (16, 12), dtype=torch.int8)
    targets[3] = 1  # nothing absent: no pairs
    targets[4] = -1  # nothing present
    logits = torch.randn(16, 12, dtype=torch.float64, requires_grad=True)
    expected = sum((1 - p + n).clamp(min=0) / 16 for row, target in zip(logits, targets)
                   for p in row[target == 1] for n in row[target == -1])
    loss = lang_cls.ranking_loss(logits, targets)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def scores_of(model, x, mapping_weight=0.3, streams="both", softmax=False):
    """Embeddings of the whole image and of its locations [B, 1 + L, D] -> scores [B, C] in float64,
    by a loop over images."""
    memory, weight, rows = model.memory.double(), model.weight.detach().double(), []
    for e in x.double():
        mixture = torch.exp(e @ memory.T / 0.01) @ memory  # [1 + L, D]
        mixture /= mixture.norm(dim=1, keepdim=True)
        logits = ((1 - mapping_weight) * e + mapping_weight * mixture) @ weight.T
        if softmax:
            logits = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        whole, best = logits[0], logits[1:].max(dim=0).values
        rows.append({"global": whole, "local": best, "both": (whole + best) / 2}[streams])
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy-RN", "toy-ViT"])
def test_encode_gives_clips_own_embeddings_and_comcs_without_positions(name):
    clip, _ = clip_model.load(name)
    images = torch.randn(2, 3, 64, 64)
    for position, found in zip((True, False), lang_cls.encode(clip, images, ARGS)):
        global_, local = clip.encode_image_dense(images, global_position=position)
        expected = torch.cat([global_[:, None], local], dim=1)
        torch.testing.assert_close(found, F.normalize(expected, dim=-1))


# ---- training

def train(model, embeddings, targets, **options):
    args = {"lr": 1e-3, "noise": 0.1, "seed": 0, "epochs": 1, "device": "cpu",
            "batch_size": len(targets), **options}
    return lang_cls.train(model, embeddings, targets, SimpleNamespace(**args))


def test_learning_rate():
    rates = [lang_cls.learning_rate(epoch, 1e-3, 20) for epoch in range(21)]
    assert rates[0] == 1e-5 and rates[1] == 1e-3 and rates[11] == pytest.approx(5e-4)
    # where the scheduler stands in the authors' release, after 20 epochs
    assert rates[20] == pytest.approx(6.15582970243117e-06)


def test_training_is_adam_with_weight_decay_on_shuffled_noisy_batches():
    torch.manual_seed(0)
    embeddings = unit(30, 8).float()
    targets = 2 * torch.randint(0, 2, (30, 5), dtype=torch.int8) - 1
    weight = (3 * torch.randn(5, 8)).requires_grad_()
    model = lang_cls.CoMC(weight.detach().clone(), unit(5, 8).float())
    log = train(model, embeddings, targets, epochs=6, lr=0.1, batch_size=8, seed=3)
    optimizer = torch.optim.Adam([weight], weight_decay=5e-4)
    for epoch, line in enumerate(log):
        optimizer.param_groups[0]["lr"] = lang_cls.learning_rate(epoch, 0.1, 6)
        torch.manual_seed(1_000_003 * 3 + epoch)
        losses = []
        for rows in torch.randperm(30).split(8):
            noisy = embeddings[rows] + 0.1 * torch.randn(len(rows), 8)
            loss = lang_cls.ranking_loss(noisy @ weight.T, targets[rows])
            weight.grad, = torch.autograd.grad(loss, weight)
            optimizer.step()
            losses.append(loss.item())
        assert line["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    torch.testing.assert_close(model.weight, weight, rtol=1e-4, atol=1e-4)


# ---- texts

def test_templates_count_and_targets():
    args = SimpleNamespace(sources="templates", texts=None)
    sentences, targets = lang_cls.training_texts(["dog", "ear"], ["one {}", "two {}"], args)
    assert sentences == (9 * ["a photo of a dog."] + ["one dog", "two dog"]
                         + 9 * ["a photo of an ear."] + ["one ear", "two ear"])
    assert targets.dtype == torch.int8
    assert targets.tolist() == 11 * [[1, -1]] + 11 * [[-1, 1]]
    assert len(set(lang_cls.TEMPLATES)) == 36
    assert all(template.count("a {}") + template.count("the {}") == 1
               for template in lang_cls.TEMPLATES)


def test_sources_are_joined_and_a_file_of_texts_is_used_as_a_whole(tmp_path, capsys):
    labels, path = ["dog", "ear"], tmp_path / "texts"
    args = SimpleNamespace(sources="sentences", texts=None, sentences=7, seed=4)
    sentences, targets = lang_cls.training_texts(labels, [], args)
    expected, expected_targets = sentences_about(labels, 7, seed=4)
    assert sentences == expected and torch.equal(targets, expected_targets)
    entries = [{"labels": ["dog"], "description": f"Dog {i}."} for i in range(50)]
    path.write_text("\n".join(map(json.dumps, [*entries, {"labels": [], "description": "."}])))
    args.texts, args.sources = str(path), "both"
    sentences, targets = lang_cls.training_texts(labels, ["one {}"], args)
    assert sentences[:51] == [*(f"Dog {i}." for i in range(50)), "a photo of a dog."]
    assert len(sentences) == len(targets) == 70 and targets[:59].tolist() == 59 * [[1, -1]]
    assert "50 sentences; dropped: 1 without a label" in capsys.readouterr().out


SYNONYMS = {"human": "person", "jet": "airplane", "ship": "boat", "bike": "bicycle",
            "motor cycle": "motorcycle", "automobile": "car", "sofa": "couch",
            "fridge": "refrigerator", "sea": "ocean", "television": "tv", "phone": "cell phone",
            "table": "dining table", "pottedplant": "potted plant", "doughnut": "donut",
            "hair dryer": "hair drier", "people": "person", "buses": "bus", "sofas": "couch"}


def test_names_are_labels_their_plurals_and_synonyms_that_are_theirs_alone():
    labels = [*data.COCO_LABELS, "ocean"]
    names = lang_cls.names_of(labels)
    assert {name: labels[names[name]] for name in SYNONYMS} == SYNONYMS
    assert all(names[label] == column for column, label in enumerate(labels))
    every = [name for group in lang_cls.SYNONYMS for name in group]
    assert len(lang_cls.SYNONYMS) == 15 and len(every) == len(set(every))
    assert lang_cls.names_of(["Bike", "bicycle", "glasses", "glass"]) == {
        "bike": 0, "bikes": 0, "bicycle": 1, "bicycles": 1, "glasses": 2, "glass": 3}


TEXTS = [  # labels, a description, and what is present or why it is dropped
    (["dogs", "Cell  Phone "], "Two dogs  look at\na smartphone.", {"dog", "cell phone"}),
    (["man"], "A skateboarder in the air.", {"person"}),
    (["motor bike", "motorbike"], "It is parked.", {"motorcycle"}),
    (["cat"], "<think>A cat?</think>Here is a sentence: **A cat.**", {"cat"}),
    (["dog", "dragon", "dwarf"], "A dog and a dragon.", "of no label: 'dragon'"),
    (["dragon"], "A dragon.", "of no label: 'dragon'"),
    ([], "Nothing.", "without a label"),
    (["dog"], " \n", "empty or a refusal"),
    (["dog"], None, "empty or a refusal"),
    (["dog"], "As an AI, I see no dog.", "empty or a refusal"),
    (["dog"], "A Skateboarder in the air.", "said before"),
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
    assert sentences == ["Two dogs look at a smartphone.", "A skateboarder in the air.",
                         "It is parked.", "A cat."]
    for row, (_, _, present) in zip(targets.tolist(), TEXTS):
        assert row == [1 if label in present else -1 for label in data.COCO_LABELS]
    assert dropped == Counter(what for *_, what in TEXTS if isinstance(what, str))
    for wrong, message in (([3], 'texts, line 1: not {"labels"'),
                           (["cow"], "no sentence of use; dropped: 1 of no label: 'cow'")):
        path.write_text(json.dumps({"labels": wrong, "description": "dog"}))
        with pytest.raises(UserError, match=message):
            lang_cls.load_texts(path, ["dog"])


def test_the_most_frequent_reasons_are_named():
    reasons = Counter({f"of no label: '{i}'": 2000 - i for i in range(13)})
    line = lang_cls.described(reasons)
    assert line.startswith("2,000 of no label: '0', 1,999 of no label: '1'")
    assert line.endswith("'11', ...") and lang_cls.described(Counter()) == "none"
    del reasons["of no label: '12'"]
    assert lang_cls.described(reasons).endswith("'11'")


# ---- their embeddings

def test_texts_are_embedded_as_if_one_by_one(toy):
    clip = toy[0]
    texts = ["a star and a fish", "a tree", 99 * "two boats, ", "a star and a fish", "a big house"]
    embeddings = lang_cls.embed_texts(clip, texts, ARGS)
    with torch.no_grad():
        expected = torch.cat([clip.encode_text(clip.tokenize(x, truncate=True)) for x in texts])
    torch.testing.assert_close(embeddings, F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)


def test_embeddings_are_kept_on_disk_for_these_texts_and_weights():
    clip, other = clip_model.load("toy-RN")[0], clip_model.load("toy-ViT")[0]
    embeddings = lang_cls.embed_texts(clip, ["a star", "a tree"], ARGS)
    clip.encode_text = other.encode_text = None  # cannot embed any more
    assert torch.equal(lang_cls.embed_texts(clip, ["a star", "a tree"], ARGS), embeddings)
    for another, texts in ((clip, ["a star", "a house"]), (other, ["a star", "a tree"])):
        with pytest.raises(TypeError):
            lang_cls.embed_texts(another, texts, ARGS)


# ---- the program

TEMPLATES = ["a photo of a {}.", "a scene with a {}."]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Arguments of a run of few seconds."""
    path = tmp_path_factory.mktemp("quick") / "templates.txt"
    path.write_text("\n".join(TEMPLATES) + "\n")
    return ["--sentences", "300", "--epochs", "4", "--batch-size", "64", "--device", "cpu",
            "--quiet", "--lr", "0.005", "--templates", str(path)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):
    """The folder of a quick run on the toy world."""
    folder = tmp_path_factory.mktemp("lang_cls")
    templates = folder / "templates.txt"
    templates.write_text("a photo of a {}.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        lang_cls.main([*quick, "--templates", str(templates), "--limit", "32", "--output",
                       str(folder / "run")])
    templates.unlink()  # what is trained needs them no more
    return folder / "run"


def saved_model(folder):
    return lang_cls.CoMC(**checkpoint(folder / "last.pt")["model"])


@pytest.mark.parametrize("options, weight, streams", [
    ("--no-zero-shot", 0.3, "both"), ("--zero-shot --streams local --mapping-weight 0.6", 0.6,
                                      "local")])
def test_the_rows_are_what_the_pieces_give(trained, toy, options, weight, streams):
    """The same, trained or evaluated, of all labels or of the unseen ones alone."""
    rows = lang_cls.main(["--eval", str(trained / "last.pt"), "--device", "cpu", *options.split()])
    assert rows == results(trained)["rows"] or streams == "local"
    clip, preprocess = toy
    test = data.load_dataset("toy", None, "test", preprocess, limit=32,
                             zero_shot=streams == "local")
    clips_own, x = lang_cls.encode(clip, torch.stack([image for image, _ in test]), ARGS)
    model = saved_model(trained)
    found = {row["name"]: row for row in rows}
    for prefix, columns in metrics.in_play(test).items():
        labels = clip_model.zero_shot_embeddings(clip, test.labels)
        expected = {"zero-shot, global": (clips_own[:, 0] @ labels.T)[:, columns]}
        settings = {
            "CoMC": (weight, streams), "CoMC without mapping": (0, streams),
            "CoMC, global alone": (weight, "global"), "CoMC, local alone": (weight, "local")}
        # the mapping is a mixture of all labels, whichever are in play
        in_play = lang_cls.CoMC(model.weight.detach()[columns], model.memory)
        for name, setting in settings.items():
            expected[name] = scores_of(model, x, *setting)[:, columns]
            if "alone" not in name:
                merged = scores_of(in_play, x, *setting, softmax=True)
                expected[f"{name}, merged as probabilities"] = merged
        for name, scores in expected.items():
            mAP = metrics.mean_average_precision(scores, test.targets[:, columns])
            assert found[name][f"{prefix}mAP"] == pytest.approx(mAP, abs=1e-3), name
    assert len(found) == 10 and found.keys() > expected.keys()


def test_labels_without_a_dataset_and_predict(quick, tmp_path, capsys, toy, monkeypatch):
    clip, preprocess = toy
    run, labels = tmp_path / "run", ["star", "moon", "fish", "house"]
    lang_cls.main([*quick, "--labels", ", ".join(labels), "--clip", "toy-RN", "--output", str(run)])
    assert not (run / "results.json").exists()
    model = saved_model(run)
    plain = ["--checkpoint", run / "last.pt"]
    best = [*plain, "--streams", "local", "--mapping-weight", "0.6"]

    def embeddings(photo):
        return lang_cls.encode(clip, preprocess(photo)[None], ARGS)[1]

    for options, *setting in (plain, 0.3, "both"), (best, 0.6, "local"):
        trees.check_predictions(lang_cls, capsys, tmp_path / setting[1], labels,
                                lambda photo: scores_of(model, embeddings(photo), *setting)[0],
                                *options)
    # a location of a heatmap is as bright as the label is likely there, among all labels
    written = []
    monkeypatch.setattr(metrics, "write_prediction", lambda *prediction: written.append(prediction))
    predictions(lang_cls, capsys, tmp_path / "local/photos", *best)
    for _, photo, _, maps, names, _ in written:
        local = embeddings(photo)[0, 1:]  # [L, D]
        expected = scores_of(model, torch.stack([local, local], dim=1), 0.6, softmax=True)
        torch.testing.assert_close(maps, expected.T.float(), rtol=1e-3, atol=1e-4)
        assert names == labels
    assert len(written) == 2


def test_a_classifier_of_ones_own_labels_is_evaluated_on_a_dataset(quick, tmp_path):
    root = trees.scenes(tmp_path, test=(4, range(3)))
    (root / "labels.txt").write_text("\n".join(world.LABELS[:3]))
    lang_cls.main([*quick, "--labels", str(root / "labels.txt"), "--clip", "toy-RN", "--output",
                   str(tmp_path / "run")])
    rows = lang_cls.main(["--eval", str(tmp_path / "run/last.pt"), "--data", "folder", "--root",
                          str(root), "--device", "cpu"])
    assert rows[-1]["name"] == "CoMC"


def test_a_run_starts_from_its_seed_and_the_labels_templates(quick, tmp_path, toy):
    lang_cls.main([*quick, "--labels", "star,ear", "--clip", "toy-RN", "--seed", "4", "--epochs",
                   "1", "--sources", "templates", "--output", str(tmp_path)])
    model, clip = saved_model(tmp_path), toy[0]
    torch.manual_seed(4)
    start = torch.nn.Linear(128, 2, bias=False).weight
    torch.testing.assert_close(model.weight, start, rtol=0, atol=1e-3)  # but for the warm-up
    prompts = [fill_template(template, label) for label in ("star", "ear")
               for template in TEMPLATES]
    with torch.no_grad():
        embeddings = F.normalize(clip.encode_text(clip.tokenize(prompts)), dim=-1)
    expected = F.normalize(embeddings.view(2, 2, 128).mean(dim=1), dim=-1)
    torch.testing.assert_close(model.memory, expected, rtol=1e-4, atol=1e-5)
