"""trm_ml.py: losses, regions, prototypes, pseudo labels, steps, sweeps, and the program."""
import contextlib
import copy
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import clip_model
import data
import metrics
import trees
import trm_ml
from toy import world
from trees import (assert_same_weights, checkpoint, drawn, predictions, random_targets,
                   results)

LABELS = ["star", "moon", "traffic light", "fish", "a very old house"]
ARGS, _ = trm_ml.arguments(["--device", "cpu"])


@pytest.fixture(scope="module")
def clip():
    return clip_model.load("toy-RN")[0]


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def moved_model(clip, matching="region", per_label_context=False):
    """A TRM none of whose weights is at its start any more."""
    torch.manual_seed(0)
    model = trm_ml.TRM(clip, LABELS, matching, per_label_context)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if matching == "region":
        model.visual.copy_(unit(*model.visual.shape))
    return model


# ---- losses

@pytest.mark.parametrize("setting", [
    {}, {"gamma_pos": 0, "gamma_neg": 4}, {"gamma_pos": 2, "gamma_neg": 1, "clip": 0}])
def test_asymmetric_loss_equals_a_loop_whose_focus_is_constant(setting):
    full = {"gamma_pos": 1, "gamma_neg": 2, "clip": 0.05} | setting
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 9, dtype=torch.float64)).requires_grad_()
    targets = random_targets(7, 9)
    total = 0
    for b in range(7):
        for c in range(9):
            p = 1 / (1 + torch.exp(-logits[b, c]))
            q = (p - full["clip"]).clamp(min=0)
            if targets[b, c] == 1:
                total = total - (1 - p.item()) ** full["gamma_pos"] * torch.log(p)
            elif targets[b, c] == -1:
                total = total - q.item() ** full["gamma_neg"] * torch.log(1 - q)
    loss = trm_ml.asymmetric_loss(logits, targets, **setting)
    torch.testing.assert_close(loss, total / 7)
    gradient, = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(total / 7, logits)[0])
    assert not gradient[targets == 0].any() and gradient[targets == 1].all()


# ---- model

def refined(model, a):
    """normalise(a + MLP(LN(a))) of one vector, written out."""
    norm, hidden, _, last = model.mlp
    z = (a - a.mean()) / (a.var(unbiased=False) + norm.eps).sqrt()
    z = hidden.weight @ (z * norm.weight + norm.bias) + hidden.bias
    z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    z = a + last.weight @ z + last.bias
    return z / z.norm()


@torch.no_grad()
def test_regions_and_saliency_equal_a_loop_over_images_labels_and_heads(clip):
    model, x = moved_model(clip), unit(2, 7, 128)
    features, saliency = model.regions(x)
    size = 128 // trm_ml.HEADS
    for b in range(2):
        key, value = model.key(x[b]), model.value(x[b])
        for c in range(len(LABELS)):
            query, looked, parts = model.query(model.queries[c]), [], []
            for begin in range(0, 128, size):
                head = slice(begin, begin + size)
                weights = (clip.logit_scale.exp() * (key[:, head] @ query[head])).softmax(dim=0)
                looked.append(weights)
                parts.append(sum(w * v for w, v in zip(weights, value[:, head])))
            torch.testing.assert_close(saliency[b, c], sum(looked) / len(looked))
            torch.testing.assert_close(features[b, c], refined(model, model.out(torch.cat(parts))),
                                       rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("matching", ["image", "pixel", "region"])
def test_logits_equal_a_loop(clip, matching):
    model = moved_model(clip, matching)
    x, texts = unit(2, 7, 128), unit(len(LABELS), 128)
    logits = model(x, texts)[0]
    for b in range(2):
        for c in range(len(LABELS)):
            found = torch.stack([refined(model, part) @ texts[c] for part in x[b]])
            weights = torch.exp(clip.logit_scale.exp() * found[1:])
            similarity = {"image": found[0], "pixel": weights @ found[1:] / weights.sum()}
            if matching == "region":
                similarity["region"] = model.regions(x)[0][b, c] @ texts[c]
            expected = torch.exp(model.log_scale) * similarity[matching] + model.bias
            torch.testing.assert_close(logits[b, c], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_label", [False, True])
def test_texts_in_chunks_are_the_same_with_gradients(clip, per_label):
    model = moved_model(clip, per_label_context=per_label)
    direction = torch.randn(len(LABELS), 128)
    whole, parts = model.texts(), model.texts(chunk=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    expected, found = (torch.autograd.grad((texts * direction).sum(), model.context)[0]
                       for texts in (whole, parts))
    assert expected.abs().amax(dim=(0, 2)).min() > 0  # every word matters
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---- prototypes, pseudo labels, steps of training

def test_update_prototypes_is_the_moving_average(clip):
    model = moved_model(clip)
    features, before = unit(6, len(LABELS), 128), model.visual.clone()
    present = random_targets(6, len(LABELS)) == 1
    present[:, 1] = False
    model.update_prototypes(features, present)
    assert torch.equal(model.visual[1], before[1])
    for c in (0, 2, 3, 4):
        mean = sum(features[b, c] for b in range(6) if present[b, c])
        moved = 0.99 * before[c] + 0.01 * mean / mean.norm()
        torch.testing.assert_close(model.visual[c], moved / moved.norm())


@pytest.mark.parametrize("single_positive", [False, True])
def test_calibrate_equals_sorting_a_label_at_a_time(clip, single_positive):
    rng = np.random.RandomState(0)
    if single_positive:
        known = np.zeros((200, 9), np.int8)
        known[np.arange(200), rng.choice([1, 2, 3, 5, 6, 7, 8], 200)] = 1
    else:
        known = rng.choice([-1, 0, 1], (200, 9), p=[0.7, 0.2, 0.1]).astype(np.int8)
        known[:, 0] = np.minimum(known[:, 0], 0)  # no known positive
        known[:, 1] = np.maximum(known[:, 1], 0)  # no known negative
        known[:, 2] = 1  # nothing unknown
        known[:, 4] = 0  # nothing known
    estimates = rng.randn(200, 9).astype(np.float32)
    model = trm_ml.TRM(clip, world.LABELS[:9])
    model.calibrate(torch.from_numpy(estimates), torch.from_numpy(known), expected_positives=2.5)
    pseudo = model.pseudo_labels(torch.from_numpy(estimates), torch.from_numpy(known)).numpy()
    for c in range(9):
        positives, negatives = (known[:, c] == 1).sum(), (known[:, c] == -1).sum()
        ranked = np.sort(estimates[known[:, c] == 0, c])[::-1]
        if not positives or not len(ranked):
            assert not pseudo[:, c].any()
            continue
        if single_positive:  # 500 positives in all, of which 200 are known
            hidden = 300 * positives / 200
        else:
            hidden = len(ranked) * positives / (positives + negatives)
        for threshold, factor in ((model.sure_present, 0.5), (model.sure_absent, 2)):
            ranks = {min(int(factor * hidden + rounding), len(ranked) - 1)
                     for rounding in (1e-4, -1e-4)}
            assert threshold[c].item() in ranked[sorted(ranks)]
    assert (pseudo[:, 5:] == 1).any(axis=0).all() and (pseudo[:, 5:] == -1).any(axis=0).all()


def straightforward_loss(model, x, known, args):
    """Prompts of 77 tokens, every text's similarity with every region, sums over all entries."""
    clip, labels = model.clip, len(LABELS)
    ids = clip.tokenize([f"{label}." for label in LABELS])  # [C, 77]
    words = clip.token_embedding(ids[:, :77 - trm_ml.CONTEXT])
    context = model.context.expand(labels, -1, -1)
    words = torch.cat([words[:, :1], context, words[:, 1:]], dim=1) + clip.positional_embedding
    for block in clip.transformer.resblocks:
        words = block(words, causal=True)
    ends = ids.argmax(dim=1) + trm_ml.CONTEXT
    texts = clip.ln_final(words)[torch.arange(labels), ends] @ clip.text_projection
    texts = texts / texts.norm(dim=1, keepdim=True)
    features, saliency = model.regions(x)
    every = torch.einsum("bcd,kd->bck", features, texts)
    logits = model.log_scale.exp() * every.diagonal(dim1=1, dim2=2) + model.bias
    if args.pseudo:
        model.update_prototypes(features.detach(), known == 1)
    e, contrast, modalities = 0, 0, [model.visual, texts] if args.pseudo else [texts]
    for prototypes in modalities:
        every = torch.einsum("bcd,kd->bck", features, prototypes) / 0.1
        own, share = (y.diagonal(dim1=1, dim2=2) for y in (every, every.log_softmax(dim=2)))
        e = e + (own + share).detach() / len(modalities)
        contrast = contrast - share / len(modalities)
    pseudo = (e > model.sure_present).char() - (e < model.sure_absent).char()
    pseudo[known != 0] = 0
    pseudo = pseudo if args.pseudo else torch.zeros_like(pseudo)
    present = (known == 1) | (pseudo == 1)
    looked_at = torch.stack([torch.stack([
        F.normalize(sum(w * v for w, v in zip(saliency[b, c], x[b])), dim=-1)
        for c in range(labels)]) for b in range(len(x))]).detach()
    return {"known": trm_ml.asymmetric_loss(logits, known),
            "pseudo": args.pseudo * trm_ml.asymmetric_loss(logits, pseudo),
            "contrastive": args.contrastive * (contrast * present).sum() / present.sum(),
            "distillation": args.distillation * (features - looked_at).abs().sum(-1).mean()}


@pytest.mark.parametrize("pseudo_weight", ["0.5", "0"])
def test_steps_equal_the_straightforward_version(clip, pseudo_weight):
    args, _ = trm_ml.arguments(["--pseudo", pseudo_weight, "--contrastive", "2",
                                "--distillation", "3"])
    model = moved_model(clip)
    model.sure_present.fill_(-1)
    model.sure_absent.fill_(-2)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01)
                  for m in (model, plain)]
    for step in range(2):
        x, known = unit(6, 9, 128), random_targets(6, len(LABELS), step)
        terms, estimates = trm_ml.batch_loss(model, x, known, args)
        expected = straightforward_loss(plain, x, known, args)
        if args.pseudo:
            pseudo = model.pseudo_labels(estimates, known)
            assert (pseudo == 1).any() and (pseudo == -1).any()
        else:
            assert estimates is None and expected.pop("pseudo") == 0
        assert {name: value.item() for name, value in terms.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-3)
        for optimizer, total in zip(optimizers, (terms, expected)):
            optimizer.zero_grad()
            sum(total.values()).backward()
            optimizer.step()
        torch.testing.assert_close(model.trained(), plain.trained(), rtol=1e-3, atol=1e-4)
        for name, parameter in model.named_parameters():
            if name.startswith("clip."):
                assert parameter.grad is None
            else:
                assert parameter.grad.any(), f"{name} does not learn"
    model.sure_present.fill_(torch.inf)
    model.sure_absent.fill_(torch.inf)  # as where no absent label is known
    assert torch.equal(model.pseudo_labels(torch.randn(known.shape), known) == -1, known == 0)
    assert trm_ml.batch_loss(model, x, known.clamp(max=0), args)[0]["contrastive"] == 0


def test_augmentation_cuts_a_quarter_out_of_every_other_image():
    torch.manual_seed(0)
    steps = clip_model.preprocess_transform(64).transforms
    augment = trm_ml.augmentation(transforms.Compose([steps[0], *steps[2:]]))
    images = torch.stack([augment(world.scene("benchmark", 7, 0)) for _ in range(60)])
    cut = ((images == 0).all(dim=1).sum(dim=(1, 2)) >= 32 * 32).float().mean()
    assert len(torch.unique(images.flatten(1), dim=0)) > 55 and 0.3 < cut < 0.7


# ---- the program, on images of one's own

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """24 training and 16 test scenes as a folder; of training image 5 nothing is known."""
    root = trees.scenes(tmp_path_factory.mktemp("own"), train=(24, range(10)),
                        test=(16, range(10)))
    lines = (root / "train.jsonl").read_text().splitlines()
    lines[5] = '{"image": "train/5.png"}'
    (root / "train.jsonl").write_text("\n".join(lines))
    (root / "labels.txt").write_text("\n".join(world.LABELS[:10]))
    return root


def flags(root, output, *more):
    return ["--data", "folder", "--root", str(root), "--clip", "toy-RN", "--image-size", "64",
            "--augment", "no", "--workers", "0", "--batch-size", "8", "--epochs", "3",
            "--lr", "1e-3", "--device", "cpu", "--quiet", "--output", str(output), *more]


SWEEP = ["--partial", "0.2", "0.6", "--matching", "pixel", "region"]


@pytest.fixture(scope="module")
def sweep(own, tmp_path_factory):
    """A sweep's folder and what it printed."""
    output, printed = tmp_path_factory.mktemp("trm_ml") / "sweep", io.StringIO()
    with contextlib.redirect_stdout(printed):
        trm_ml.main(flags(own, output, *SWEEP))
    return output, printed.getvalue()


def scores_of(path, images, clip, dtype=torch.float32):
    saved = checkpoint(path)
    model = trm_ml.TRM(copy.deepcopy(clip), saved["labels"], saved["matching"])
    model.load_trained(saved["model"])
    squeezed = [image.resize((64, 64), Image.BICUBIC) for image in images]
    pixels = torch.stack([clip_model.preprocess_transform(64)(image) for image in squeezed])
    with torch.no_grad():
        x = trm_ml.encode(model.clip, pixels, ARGS).to(dtype).float()
        logits, _, saliency = model(x, model.texts())
    return logits, saliency


def test_a_sweeps_files_rows_and_averages(sweep, own, clip):
    output, printed = sweep
    rows = results(output)["rows"][3:]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("text-pixel matching, 20% known", "ablation"), ("TRM-ML, 20% known", "method"),
        ("text-pixel matching, 60% known", "ablation"), ("TRM-ML, 60% known", "method"),
        ("text-pixel matching, average", "ablation"), ("TRM-ML, average", "method")]
    heading, *lines = printed.partition("known labels")[2].splitlines()
    assert heading.split() == ["20%", "60%", "average"]
    for line, (first, second, average) in zip(lines, (rows[0::2], rows[1::2])):
        for metric in first.keys() - {"name", "kind"}:
            assert average[metric] == pytest.approx((first[metric] + second[metric]) / 2)
        assert line.split()[-3:] == [f"{100 * row['mAP']:.1f}" for row in (first, second, average)]
    test = data.load_dataset("folder", own, "test")
    scores = scores_of(output / "partial-0.6/best.pt", [image for image, _ in test], clip)[0]
    expected = metrics.mean_average_precision(scores, test.targets)
    assert rows[3]["mAP"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share", [0.4, None])
def test_training_sees_every_image_with_the_entries_drawn_for_it(own, tmp_path, share):
    """The same as training on a folder that states only these entries, without the missing one."""
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own/train/3.png").unlink()
    known = ["--single-positive"] if share is None else ["--partial", str(share)]
    trm_ml.main(flags(tmp_path / "own", tmp_path / "run", *known))
    targets = data.load_dataset("folder", own, "train").targets
    lines = []
    for i, row in enumerate(drawn(targets, share)):
        if i != 3:
            named = {name: [world.LABELS[c] for c in np.nonzero(row == value)[0]]
                     for name, value in (("present", 1), ("absent", -1))}
            lines.append(json.dumps({"image": f"train/{i}.png", **named}))
    (tmp_path / "own/train.jsonl").write_text("\n".join(lines))
    trm_ml.main(flags(tmp_path / "own", tmp_path / "stated"))
    assert_same_weights(tmp_path / "run/last.pt", tmp_path / "stated/last.pt")


def test_resume_after_kill_with_runs_at_different_epochs(own, tmp_path):
    """With augmentation, by worker processes."""
    known = ["--partial", "0.2", "0.6", "--augment", "yes", "--workers", "2"]
    trm_ml.main(flags(own, tmp_path / "whole", *known))
    killed = tmp_path / "killed"
    trees.run_killed("trm_ml", "curves.png", 4, flags(own, killed, *known))
    assert not (killed / "results.json").exists()
    (killed / "partial-0.2/last.pt").unlink()
    trm_ml.main(["--resume", "--output", str(killed), "--device", "cpu"])
    assert results(killed) == results(tmp_path / "whole")
    for share in ("partial-0.2", "partial-0.6"):
        assert_same_weights(killed / share / "last.pt", tmp_path / "whole" / share / "last.pt")


def test_resume_with_another_share_trains_only_that(sweep, own, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(sweep[0], output)
    (output / "results.json").unlink()
    known = ["--partial", "0.2", "0.4", "0.6"]
    rows = trm_ml.main(["--resume", "--output", str(output), "--device", "cpu", *known])
    trm_ml.main(flags(own, tmp_path / "alone", "--partial", "0.4"))
    assert_same_weights(output / "partial-0.4/last.pt", tmp_path / "alone/last.pt")
    of_share = {row["name"]: row for row in rows}
    before = results(sweep[0])["rows"]
    assert [of_share[row["name"]] for row in before[:7]] == before[:7]


def test_resume_as_another_kind_of_model_is_refused(sweep, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(sweep[0] / "partial-0.6/pixel", output)
    with pytest.raises(data.UserError, match="another kind of model"):
        trm_ml.main(["--resume", "--output", str(output), "--partial", "0.6", "--matching", "region",
                     "--device", "cpu"])


def test_validation_images_select_the_epoch(own, tmp_path, clip):
    more = ["--partial", "0.6", "--val-fraction", "0.5", "--lr", "0.03", "--epochs", "4"]
    row = trm_ml.main(flags(own, tmp_path, *more))[-1]
    lines = trees.lines(tmp_path / "log.jsonl")
    has_pseudo = ["pseudo_recall" in line for line in lines]
    assert not any(has_pseudo[:2]) and has_pseudo[3]  # no thresholds until half of the epochs
    scores = [line["val_mAP"] for line in lines]
    best = checkpoint(tmp_path / "best.pt")["log"][-1]
    assert best["val_mAP"] == max(scores) > scores[-1]  # it is not simply the last one
    train = data.load_dataset("folder", own, "train")
    train.full_targets = torch.from_numpy(drawn(train.targets, 0.6))
    held_out = train.hold_out(0.5, None)[1]
    images = [image for image, _ in held_out]
    logits = scores_of(tmp_path / "best.pt", images, clip, torch.float16)[0]
    expected = metrics.mean_average_precision(logits, held_out.targets)
    assert best["val_mAP"] == pytest.approx(expected, abs=1e-6)
    assert trm_ml.main(["--eval", str(tmp_path / "best.pt"), "--device", "cpu"])[-1] == row


def test_predictions_and_heatmaps(sweep, tmp_path, capsys, clip):
    photo = world.scene("benchmark", 7, 0).resize((160, 100))  # is squeezed, not cropped
    photo.save(tmp_path / "0.png")
    best = sweep[0] / "partial-0.6/best.pt"
    line, = predictions(trm_ml, capsys, tmp_path / "0.png", "--checkpoint", best, "--top", "4",
                        "--heatmap", tmp_path / "maps")
    logits, saliency = scores_of(best, [photo], clip)
    scores, order = logits[0].sigmoid().sort(descending=True)
    labels = [world.LABELS[c] for c in order[:4]]
    assert line["path"] == str(tmp_path / "0.png")
    assert [entry["label"] for entry in line["labels"]] == labels
    found = [entry["score"] for entry in line["labels"]]
    assert found == pytest.approx(scores[:4].tolist(), abs=1e-4)
    shown = [(labels[i], found[i], saliency[0, order[i], 1:].view(2, 2)) for i in range(3)]
    expected = np.asarray(metrics.draw_heatmaps(photo, shown, whole=True)).astype(int)
    picture, = (tmp_path / "maps").iterdir()
    assert np.abs(np.asarray(Image.open(picture)) - expected).max() <= 2
