"""trm_ml.py: losses, regions, prototypes, pseudo labels, kept embeddings, and the program."""
import copy
import json
import math
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip_model
import data
import metrics
import trm_ml

LABELS = ["star", "moon", "traffic light", "fish", "a very old house"]
QUICK = ["--limit", "64", "--batch-size", "32", "--epochs", "2", "--device", "cpu", "--quiet"]
REGION = [*QUICK, "--matching", "region"]
QUICKEST = [*REGION, "--limit", "32", "--epochs", "1"]  # a step


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "clip_multilabel"


@pytest.fixture(scope="module")
def toy():
    return clip_model.load("toy-RN")


def options(*arguments):
    args = trm_ml.parse_arguments(["--device", "cpu", "--quiet", *arguments])
    trm_ml.fill_defaults(args)
    return args


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def random_targets(images, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (images, labels), generator=generator).to(torch.int8)


def moved_model(clip, matching="region", **extra):
    """A TRM none of whose weights is at its start any more."""
    torch.manual_seed(0)
    model = trm_ml.TRM(clip, LABELS, matching, **extra)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if matching == "region":
        model.visual.copy_(unit(*model.visual.shape))
    return model


# ---- losses

def asymmetric_loss_of_entries(logits, targets, gamma_pos, gamma_neg, clip):
    total = 0.0
    for row, known in zip(logits.tolist(), targets.tolist()):
        for z, y in zip(row, known):
            p = 1 / (1 + math.exp(-z))
            q = max(p - clip, 0)
            if y == 1:
                total -= (1 - p) ** gamma_pos * math.log(p)
            elif y == -1:
                total -= q ** gamma_neg * math.log(1 - q)
    return total / len(logits)


@pytest.mark.parametrize("setting", [(1, 2, 0.05), (0, 4, 0.05), (2, 1, 0.2), (1, 2, 0),
                                     (0, 0, 0), (0, 0, 0.05)])
def test_asymmetric_loss_equals_a_loop_over_entries(setting):
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 9, dtype=torch.float64)).requires_grad_()
    targets = random_targets(7, 9)
    loss = trm_ml.asymmetric_loss(logits, targets, *setting)
    assert loss.item() == pytest.approx(asymmetric_loss_of_entries(logits, targets, *setting))
    assert torch.autograd.gradcheck(
        lambda z: trm_ml.asymmetric_loss(z, targets, *setting), logits)
    gradient, = torch.autograd.grad(loss, logits)
    assert not gradient[targets == 0].any() and gradient[targets == 1].all()


def test_asymmetric_loss_has_the_usual_defaults():
    logits, targets = torch.randn(4, 6, dtype=torch.float64), random_targets(4, 6)
    assert trm_ml.asymmetric_loss(logits, targets).item() == pytest.approx(
        asymmetric_loss_of_entries(logits, targets, gamma_pos=1, gamma_neg=2, clip=0.05))


def test_asymmetric_loss_without_focus_and_clip_is_binary_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 8, requires_grad=True), random_targets(5, 8)
    known = targets != 0
    loss = trm_ml.asymmetric_loss(logits, targets, 0, 0, 0)
    expected = F.binary_cross_entropy_with_logits(
        logits[known], (targets[known] == 1).float(), reduction="sum") / 5
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


def test_asymmetric_loss_of_nothing_known_and_of_huge_logits():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = trm_ml.asymmetric_loss(logits, torch.zeros(3, 4, dtype=torch.int8))
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()
    for setting in ((1, 2, 0.05), (0, 0, 0), (1, 2, 0)):
        logits = torch.tensor([[80.0, -80.0, 80.0, -80.0]], requires_grad=True)
        loss = trm_ml.asymmetric_loss(logits, torch.tensor([[1, 1, -1, -1]]), *setting)
        gradient, = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and loss > 79 and gradient.isfinite().all()
    assert gradient[0, 1] < -0.9  # it still pulls


@pytest.mark.parametrize("modalities", [1, 2])
def test_contrastive_loss_equals_a_loop_over_present_entries(modalities):
    torch.manual_seed(0)
    regions, prototypes = unit(4, 6, 8).requires_grad_(), unit(modalities, 6, 8)
    present = random_targets(4, 6) == 1
    total = []
    for b, c in present.nonzero().tolist():
        near = prototypes @ regions[b, c].detach() / trm_ml.TEMPERATURE
        for of_modality in near.tolist():
            shares = [math.exp(x) for x in of_modality]
            total.append(-math.log(shares[c] / sum(shares)))
    loss = trm_ml.contrastive_loss(regions, present, prototypes)
    assert loss.item() == pytest.approx(sum(total) / len(total), rel=1e-5)
    gradient, = torch.autograd.grad(loss, regions)
    assert gradient[present].any(dim=1).all() and not gradient[~present].any()


def test_contrastive_loss_falls_towards_the_own_prototypes_and_may_have_nothing():
    torch.manual_seed(0)
    regions, prototypes, present = unit(4, 6, 8), unit(2, 6, 8), random_targets(4, 6) == 1
    losses = [trm_ml.contrastive_loss(
        F.normalize((1 - near) * regions + near * prototypes.mean(dim=0), dim=-1), present,
        prototypes).item() for near in (0, 0.3, 0.6, 1)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] + 0.5
    regions.requires_grad_()
    nothing = trm_ml.contrastive_loss(regions, torch.zeros(4, 6, dtype=torch.bool), prototypes)
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, regions)[0].any()


# ---- model

def refined(model, a):
    """normalise(a + MLP(LN(a))) of one vector, written out."""
    z = (a - a.mean()) / (a.var(unbiased=False) + model.norm.eps).sqrt()
    z = model.hidden.weight @ (z * model.norm.weight + model.norm.bias) + model.hidden.bias
    z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    z = a + model.last.weight @ z + model.last.bias
    return z / z.norm()


@torch.no_grad()
def test_regions_equal_a_loop_over_labels_and_heads(toy):
    model, x = moved_model(toy[0]), unit(2, 7, 128)
    regions, attention = model.regions(x)
    scale, size = model.clip.logit_scale.exp(), 128 // trm_ml.HEADS
    for b in range(2):
        key, value = model.key(x[b]), model.value(x[b])
        for c in range(len(LABELS)):
            query, looked, parts = model.query(model.queries[c]), [], []
            for begin in range(0, 128, size):
                head = slice(begin, begin + size)
                weights = (scale * (key[:, head] @ query[head])).softmax(dim=0)
                looked.append(weights)
                parts.append(sum(w * v for w, v in zip(weights, value[:, head])))
            torch.testing.assert_close(attention[b, c], sum(looked) / len(looked))
            torch.testing.assert_close(regions[b, c], refined(model, model.out(torch.cat(parts))),
                                       rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, len(LABELS)))
    torch.testing.assert_close(regions.norm(dim=-1), torch.ones(2, len(LABELS)))


@torch.no_grad()
def test_attention_starts_as_the_softmax_matching_of_clip(toy):
    torch.manual_seed(0)
    clip, x = toy[0], unit(3, 6, 128)
    model = trm_ml.TRM(clip, LABELS)
    start = trm_ml.zero_shot_embeddings(clip, LABELS, trm_ml.TEMPLATES)
    torch.testing.assert_close(model.visual, start)
    parts, looked = [], []
    for q, v in zip(start.chunk(trm_ml.HEADS, dim=1), x.chunk(trm_ml.HEADS, dim=2)):
        looked.append((clip.logit_scale.exp() * q @ v.transpose(1, 2)).softmax(dim=-1))
        parts.append(looked[-1] @ v)
    regions, attention = model.regions(x)
    torch.testing.assert_close(attention, torch.stack(looked).mean(dim=0))
    torch.testing.assert_close(regions, F.normalize(torch.cat(parts, dim=-1), dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("matching", ["image", "pixel", "region"])
def test_forward_equals_a_loop(toy, matching):
    model = moved_model(toy[0], matching)
    x, texts = unit(2, 7, 128), unit(len(LABELS), 128)
    logits, regions, attention = model(x, texts)
    assert (regions is None) == (attention is None) == (matching != "region")
    for b in range(2):
        for c in range(len(LABELS)):
            if matching == "region":
                similarity = model.regions(x)[0][b, c] @ texts[c]
            elif matching == "image":
                similarity = refined(model, x[b, 0]) @ texts[c]
            else:
                found = torch.stack([refined(model, location) @ texts[c] for location in x[b, 1:]])
                weights = torch.exp(model.clip.logit_scale.exp() * found)
                similarity = (weights * found).sum() / weights.sum()
            expected = torch.exp(model.log_scale) * similarity + model.bias
            torch.testing.assert_close(logits[b, c], expected, rtol=1e-4, atol=1e-4)


def test_texts_are_the_prompts_that_clip_would_read(toy):
    clip = toy[0]
    model = trm_ml.TRM(clip, LABELS)
    words = "a photo of the scene with one red star and two of a blue old fish".split()
    ids = clip.tokenizer.encode(" ".join(words))
    assert len(ids) == trm_ml.CONTEXT  # a word each
    model.context.data[0] = clip.token_embedding(torch.tensor(ids))
    tokens = clip.tokenize([" ".join([*words, label]) + "." for label in LABELS])
    expected = F.normalize(clip.encode_text(tokens), dim=-1)
    torch.testing.assert_close(model.texts(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_label", [False, True])
def test_texts_in_chunks_are_the_same_with_gradients(toy, per_label):
    model = moved_model(toy[0], per_label_context=per_label)
    assert model.context.shape == (len(LABELS) if per_label else 1, trm_ml.CONTEXT, 128)
    direction = torch.randn(len(LABELS), 128)
    whole = model.texts()
    expected, = torch.autograd.grad((whole * direction).sum(), model.context)
    assert expected.abs().amax(dim=(0, 2)).min() > 0  # every word matters
    for chunk in (1, 2, 3, 4):
        texts = model.texts(chunk=chunk)
        torch.testing.assert_close(texts, whole, rtol=1e-4, atol=1e-5)
        gradient, = torch.autograd.grad((texts * direction).sum(), model.context)
        torch.testing.assert_close(gradient / expected.abs().max(),
                                   expected / expected.abs().max(), rtol=0, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model.texts(chunk=chunk), whole, rtol=1e-4, atol=1e-5)
    model.texts(chunk=2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["context"]


def test_a_label_has_a_context_of_its_own_if_asked(toy):
    model = moved_model(toy[0], per_label_context=True)
    gradient, = torch.autograd.grad((model.texts()[3] * torch.randn(128)).sum(), model.context)
    assert gradient[3].any() and not gradient[[0, 1, 2, 4]].any()


def test_a_label_that_is_too_long_is_named(toy):
    fits, over = (" ".join(["fish"] * count) for count in (57, 60))
    assert trm_ml.TRM(toy[0], ["star", fits]).texts().isfinite().all()
    with pytest.raises(data.UserError, match="fish fish"):
        trm_ml.TRM(toy[0], ["star", over])


@torch.no_grad()
def test_zero_shot_embeddings_are_the_mean_over_templates(toy):
    clip, labels = toy[0], [f"{x} {y}" for x in ("red", "old") for y in data.TOY_LABELS]
    labels = (3 * labels)[:300]  # more than a chunk
    texts = trm_ml.zero_shot_embeddings(clip, labels, ["a {}.", "two {}"])
    for i in (0, 55, 255, 256, 299):
        mean = F.normalize(clip.encode_text(clip.tokenize(
            [f"a {labels[i]}.", f"two {labels[i]}"])), dim=-1).mean(dim=0)
        torch.testing.assert_close(texts[i], mean / mean.norm(), rtol=1e-4, atol=1e-5)


# ---- prototypes and pseudo labels

def test_update_prototypes_is_the_moving_average(toy):
    model = moved_model(toy[0])
    regions, before = unit(6, len(LABELS), 128), model.visual.clone()
    present = random_targets(6, len(LABELS)) == 1
    present[:, 1], present[2, 0], present[:, 3] = False, True, False
    present[4, 3] = True  # a single one
    model.update_prototypes(regions, present)
    for c in range(len(LABELS)):
        if not present[:, c].any():
            assert torch.equal(model.visual[c], before[c])
            continue
        mean = sum(regions[b, c] for b in range(6) if present[b, c])
        moved = trm_ml.MOMENTUM * before[c] + (1 - trm_ml.MOMENTUM) * mean / mean.norm()
        torch.testing.assert_close(model.visual[c], moved / moved.norm())
    assert torch.equal(model.visual[1], before[1]) and not torch.equal(model.visual[3], before[3])
    torch.testing.assert_close(model.visual.norm(dim=1), torch.ones(len(LABELS)))
    after = model.visual.clone()
    model.update_prototypes(regions, torch.zeros_like(present))
    assert torch.equal(model.visual, after)


def test_estimates_equal_a_loop(toy):
    model = moved_model(toy[0])
    regions, texts = unit(3, len(LABELS), 128), unit(len(LABELS), 128)
    estimates = model.estimates(regions, texts)
    for b in range(3):
        for c in range(len(LABELS)):
            of_modality = []
            for prototypes in (model.visual, texts):
                near = [float(regions[b, c] @ p) / trm_ml.TEMPERATURE for p in prototypes]
                share = math.exp(near[c]) / sum(map(math.exp, near))
                of_modality.append(near[c] + math.log(share))
            assert estimates[b, c].item() == pytest.approx(sum(of_modality) / 2, abs=1e-4)


def calibration(images=200):
    """Estimates and known targets of labels known in every way that there is."""
    rng = np.random.RandomState(0)
    known = rng.choice([-1, 0, 1], (images, 12), p=[0.7, 0.2, 0.1]).astype(np.int8)
    known[:, 0] = np.where(known[:, 0] == 1, 0, known[:, 0])  # no known positive
    known[:, 1] = np.where(known[:, 1] == -1, 0, known[:, 1])  # no known negative
    known[:, 2] = np.where(known[:, 2] == 0, 1, known[:, 2])  # nothing unknown
    known[:, 3] = 1  # all present, nothing unknown
    known[:, 4] = 0  # nothing known
    known[:, 5], known[7, 5] = 0, 1  # a single positive
    known[:, 6] = 1
    known[11, 6] = 0  # one unknown
    known[:, 7] = np.where(rng.rand(images) < 0.9, 1, 0)  # more than half, no negative
    return rng.randn(images, 12).astype(np.float32), known


def test_calibrate_does_not_take_what_somebody_marked_for_a_random_sample(toy):
    """Mostly present labels are marked: their share among known entries says nothing."""
    model = trm_ml.TRM(toy[0], data.TOY_LABELS[:3])
    known = torch.zeros(2000, 3, dtype=torch.int8)
    known[:50], known[50] = 1, -1  # 50 present, a single absent one
    estimates = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    model.calibrate(estimates, known)
    given = (model.pseudo_labels(estimates, known) == 1).sum(dim=0)
    assert ((given > 20) & (given < 100)).all()


def test_calibrate_equals_sorting_a_label_at_a_time(toy):
    torch.manual_seed(0)
    model = trm_ml.TRM(toy[0], data.TOY_LABELS[:12])
    estimates, known = calibration()
    model.calibrate(torch.from_numpy(estimates), torch.from_numpy(known))
    pseudo = model.pseudo_labels(torch.from_numpy(estimates), torch.from_numpy(known)).numpy()
    for c in range(12):
        positives, negatives = (known[:, c] == 1).sum(), (known[:, c] == -1).sum()
        ranked = np.sort(estimates[known[:, c] == 0, c])[::-1]
        if not positives or not len(ranked):
            assert model.sure_present[c] == math.inf and model.sure_absent[c] == -math.inf
            assert not pseudo[:, c].any()
            continue
        assert (known == -1).sum() > (known == 1).sum()  # or no share would be trusted
        share = (positives / (positives + negatives) if negatives
                 else trm_ml.HIDDEN * positives / len(known))
        for threshold, factor in ((model.sure_present, trm_ml.SURE_PRESENT),
                                  (model.sure_absent, trm_ml.SURE_ABSENT)):
            expected = factor * share * len(ranked)
            ranks = {min(int(expected + rounding), len(ranked) - 1) for rounding in (1e-4, -1e-4)}
            assert threshold[c].item() in ranked[sorted(ranks)]
        # so many of the unknown ones are above, and so many below
        assert (pseudo[:, c] == 1).sum() <= trm_ml.SURE_PRESENT * share * len(ranked) + 1e-4
        assert (pseudo[:, c] == -1).sum() == (ranked < model.sure_absent[c].item()).sum()
    assert (pseudo[:, 8:] == 1).any(axis=0).all() and (pseudo[:, 5] == -1).any()


def test_pseudo_labels_never_touch_a_known_entry(toy):
    torch.manual_seed(0)
    model = trm_ml.TRM(toy[0], LABELS)
    assert not model.pseudo_labels(torch.randn(9, 5), torch.zeros(9, 5, dtype=torch.int8)).any()
    seen = set()
    for seed in range(50):
        torch.manual_seed(seed)
        estimates, known = torch.randn(9, 5), random_targets(9, 5, seed)
        model.sure_absent.copy_(torch.randn(5))
        model.sure_present.copy_(model.sure_absent + torch.rand(5))
        pseudo = model.pseudo_labels(estimates, known)
        assert pseudo.dtype == torch.int8 and not pseudo[known != 0].any()
        for b in range(9):
            for c in range(5):
                sure = int(estimates[b, c] > model.sure_present[c]) - int(
                    estimates[b, c] < model.sure_absent[c])
                assert pseudo[b, c] == (0 if known[b, c] else sure)
        seen |= set(pseudo.flatten().tolist())
    assert seen == {-1, 0, 1}


def test_pseudo_label_counts_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    truth = random_targets(40, 9, 1)
    known = truth * (torch.rand(40, 9, generator=generator) < 0.3)
    pseudo = random_targets(40, 9, 2) * (known == 0)
    expected = [0] * 5
    for k, t, p in zip(*(x.flatten().tolist() for x in (known, truth, pseudo))):
        if k or not t:
            continue
        for i, condition in enumerate((p == t == 1, p == 1, t == 1, p == t == -1, p == -1)):
            expected[i] += condition
    assert trm_ml.pseudo_label_counts(pseudo, known, truth).tolist() == expected
    assert min(expected) > 0


# ---- the loss of a batch

def test_the_loss_is_the_sum_of_its_terms(toy):
    model, x = moved_model(toy[0]), unit(6, 9, 128)
    known = random_targets(6, len(LABELS))
    model.sure_present.fill_(-1)
    model.sure_absent.fill_(-4)
    args = options("--pseudo", "0.5", "--contrastive", "2", "--distillation", "3")
    before = copy.deepcopy(model)
    loss, terms, pseudo, estimates = trm_ml.batch_loss(model, x, known, args)
    texts = before.texts()
    logits, regions, attention = before(x, texts)
    before.update_prototypes(regions, known == 1)
    assert torch.equal(before.visual, model.visual)
    torch.testing.assert_close(estimates, before.estimates(regions, texts))
    assert torch.equal(pseudo, before.pseudo_labels(estimates, known)) and pseudo.any()
    looked_at = torch.stack([torch.stack([
        F.normalize(sum(w * v for w, v in zip(attention[b, c], x[b])), dim=-1)
        for c in range(len(LABELS))]) for b in range(6)]).detach()
    expected = {
        "known": trm_ml.asymmetric_loss(logits, known),
        "pseudo": 0.5 * trm_ml.asymmetric_loss(logits, pseudo),
        "contrastive": 2 * trm_ml.contrastive_loss(
            regions, (known == 1) | (pseudo == 1), torch.stack([before.visual, texts])),
        "distillation": 3 * (regions - looked_at).abs().sum() / (6 * len(LABELS))}
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, sum(expected.values()), rtol=1e-4, atol=1e-5)
    loss.backward()
    sum(expected.values()).backward()
    for (name, mine), plain in zip(model.named_parameters(), before.parameters()):
        if name.startswith("clip."):
            assert mine.grad is None and not mine.requires_grad
            continue
        assert mine.grad.any(), f"{name} does not learn"
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-3, atol=1e-5)


def test_a_weight_of_0_leaves_a_term_out(toy):
    model, x = moved_model(toy[0]), unit(4, 6, 128)
    known = random_targets(4, len(LABELS))
    for name in ("pseudo", "contrastive", "distillation"):
        before = model.visual.clone()
        _, terms, pseudo, _ = trm_ml.batch_loss(model, x, known, options(f"--{name}", "0"))
        assert terms.keys() == {"known", "pseudo", "contrastive", "distillation"} - {name}
        assert (pseudo is None) == torch.equal(model.visual, before) == (name == "pseudo")
    texts, regions = model.texts(), model.regions(x)[0]  # the texts alone are the prototypes
    _, terms, _, _ = trm_ml.batch_loss(model, x, known, options("--pseudo", "0"))
    torch.testing.assert_close(terms["contrastive"], 0.2 * trm_ml.contrastive_loss(
        regions, known == 1, texts[None]))


def test_warm_up_has_prototypes_and_no_pseudo_labels(toy):
    model, x = moved_model(toy[0]), unit(4, 6, 128)
    known, before = random_targets(4, len(LABELS)), model.visual.clone()
    model.sure_present.fill_(-100)  # all unknown ones would be present
    _, terms, pseudo, estimates = trm_ml.batch_loss(model, x, known, options(), True)
    assert terms["pseudo"] == 0 and not pseudo.any() and estimates is None
    assert not torch.equal(model.visual, before)
    pseudo = trm_ml.batch_loss(model, x, known, options())[2]
    assert torch.equal(pseudo == 1, known == 0)


def test_with_all_labels_known_there_are_no_pseudo_labels(toy):
    model, x = moved_model(toy[0]), unit(6, 9, 128)
    known = torch.where(random_targets(6, len(LABELS)) == 1, 1, -1).to(torch.int8)
    for _ in range(2):
        _, terms, pseudo, estimates = trm_ml.batch_loss(model, x, known, options())
        assert terms["pseudo"].item() == 0 and not pseudo.any()
        model.calibrate(estimates, known)


@pytest.mark.parametrize("matching", ["image", "pixel", "region"])
def test_a_batch_of_which_nothing_is_known_breaks_no_weight(toy, matching):
    model = moved_model(toy[0], matching)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    nothing = torch.zeros(3, len(LABELS), dtype=torch.int8)
    loss, terms, _, _ = trm_ml.batch_loss(model, unit(3, 6, 128), nothing, options())
    assert terms["known"].item() == 0
    loss.backward()
    optimizer.step()
    assert all(value.isfinite().all() for name, value in model.trained().items()
               if not name.startswith("sure_"))


def test_learning_rate_is_half_a_cosine():
    rates = [trm_ml.learning_rate(step / 12, 0.5) for step in range(13)]
    assert rates[0] == 0.5 and rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[3] == pytest.approx(0.5 * math.cos(math.pi / 8) ** 2)
    assert rates[6] == pytest.approx(0.25) and rates[4] == pytest.approx(0.375)


# ---- embeddings of images

def toy_images(count=64, **arguments):
    """The test split's first scenes, as the program reads them."""
    clip, preprocess = trm_ml.build({"clip": "toy-RN", "image_size": 128, **arguments}, "cpu")
    return clip, data.load_dataset("toy", split="test", transform=preprocess,
                                   zero_shot=False).subset(range(count))


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy-RN", "toy-ViT"])
def test_encode_gives_what_clip_gives(name):
    clip, dataset = toy_images(3, clip=name)
    images = torch.stack([image for image, _ in dataset])
    found = trm_ml.encode(clip, images, options())
    global_, local = clip.encode_image_dense(images, value_path=name == "toy-ViT")
    torch.testing.assert_close(found[:, 0], F.normalize(clip.encode_image(images), dim=-1),
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 0], F.normalize(global_, dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1:], F.normalize(local, dim=-1), rtol=1e-4, atol=1e-5)
    if name == "toy-ViT":
        other = F.normalize(clip.encode_image_dense(images)[1], dim=-1)
        assert not torch.allclose(found[:, 1:], other, atol=1e-2)
    kept = found.half()
    passed = trm_ml.encode(clip, kept, options())
    assert passed.dtype == torch.float32 and torch.equal(passed, kept.float())


@pytest.fixture
def encoded(monkeypatch):
    """The number of images of every call of the image tower."""
    calls, original = [], clip_model.CLIP.encode_image_dense

    def encode_image_dense(self, images, *arguments, **extra):
        calls.append(len(images))
        return original(self, images, *arguments, **extra)

    monkeypatch.setattr(clip_model.CLIP, "encode_image_dense", encode_image_dense)
    return calls


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clip_multilabel"


def test_embeddings_in_memory_and_on_disk_are_the_same(empty_cache, encoded):
    clip, dataset = toy_images(40)
    arguments = ["--batch-size", "16", "--cache-features"]
    with torch.no_grad():
        expected = trm_ml.encode(clip, torch.stack([image for image, _ in dataset]),
                                 options()).half()
    assert trm_ml.kept_embeddings(clip, dataset, options(*arguments, "no")) is None
    memory = trm_ml.kept_embeddings(clip, dataset, options(*arguments, "memory"))
    assert memory.dtype == torch.float16 and not empty_cache.exists()
    torch.testing.assert_close(memory, expected, rtol=1e-2, atol=1e-3)
    encoded.clear()
    disk = trm_ml.kept_embeddings(clip, dataset, options(*arguments, "disk"))
    assert torch.equal(disk, memory) and sum(encoded) >= 40
    encoded.clear()
    again = trm_ml.kept_embeddings(clip, dataset, options(*arguments, "disk"))
    assert torch.equal(again, memory) and sum(encoded) <= 1  # one may tell the shape
    file, = empty_cache.iterdir()  # and no temporary one
    content = file.read_bytes()
    del disk, again  # they are mapped from it
    for damaged in (content[:len(content) // 2], b"", content + b"\0\0"):
        file.write_bytes(damaged)
        encoded.clear()
        assert torch.equal(trm_ml.kept_embeddings(clip, dataset, options(*arguments, "disk")),
                           memory)
        assert sum(encoded) >= 40 and file.read_bytes() == content


def test_kept_embeddings_belong_to_these_images_size_weights_and_precision(empty_cache, encoded):
    disk = ["--cache-features", "disk"]
    clip, dataset = toy_images(8)
    first = trm_ml.kept_embeddings(clip, dataset, options(*disk)).clone()
    other = copy.deepcopy(clip)
    other.visual.attnpool.c_proj.weight.data *= -1
    clip_96, dataset_96 = toy_images(8, image_size=96)
    train = data.load_dataset("toy", split="train", transform=dataset.transform,
                              zero_shot=False).subset(range(8))
    for differing in ((other, dataset), (clip_96, dataset_96), (clip, train),
                      (clip, dataset.subset(range(4, 8))),
                      (clip, dataset.subset(range(7, -1, -1)))):
        encoded.clear()
        kept = trm_ml.kept_embeddings(*differing, options(*disk))
        assert sum(encoded) >= len(differing[1])
        assert kept.shape != first.shape or not torch.equal(kept, first)
    torch.testing.assert_close(kept, first.flip(0), rtol=1e-2, atol=1e-3)
    encoded.clear()
    trm_ml.kept_embeddings(clip, dataset, options(*disk, "--precision", "bf16"))
    assert sum(encoded) >= 8


def test_embeddings_that_cannot_be_kept_are_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as error:
        trm_ml.main([*REGION, "--output", str(tmp_path / "run")])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and printed.startswith("trm_ml.py: error: ")
    assert str(tmp_path / "file") in printed and not (tmp_path / "run").exists()


def test_a_full_disk_is_a_user_error_and_leaves_nothing(empty_cache):
    clip, dataset = toy_images(20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(data.UserError, match=str(empty_cache)):
            trm_ml.kept_embeddings(clip, dataset, options("--cache-features", "disk"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(empty_cache.iterdir())


# ---- the program

def rows_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())["rows"]


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def weights_of(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)["model"]


def content_of(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def toy_truth(count=64):
    return data.load_dataset("toy", split="train", zero_shot=False).targets[:count]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quick run of all three matchings."""
    output = tmp_path_factory.mktemp("trm_ml") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        trm_ml.main([*QUICK, "--output", str(output)])
    return output


def test_a_run_writes_its_files(trained, toy):
    results = json.loads((trained / "results.json").read_text())
    assert results.keys() == {"method", "data", "clip", "seed", "seconds", "rows"}
    assert (results["method"], results["data"], results["clip"], results["seed"]) == (
        "trm_ml", "toy", "toy-RN", 0) and results["seconds"] > 0
    rows = results["rows"]
    assert [(row["name"], row["kind"]) for row in rows[-3:]] == [
        ("text-image matching", "ablation"), ("text-pixel matching", "ablation"),
        ("TRM-ML", "method")]
    assert [row["kind"] for row in rows[:-3]] == 6 * ["zero-shot"]
    assert len({row["name"] for row in rows}) == 9
    keys = {"name", "kind", "mAP", "P@3", "R@3", "F1@3", "P@5", "R@5", "F1@5"}
    for row in rows:
        assert row.keys() == keys
        assert all(0 <= row[key] <= 1 for key in keys - {"name", "kind"})
    for folder, matching in ((trained, "region"), (trained / "image", "image"),
                             (trained / "pixel", "pixel")):
        assert {file.name for file in folder.iterdir() if file.is_file()} - {"results.json"} == {
            "args.json", "known.pt", "log.jsonl", "best.pt", "last.pt", "curves.png"}
        args = json.loads((folder / "args.json").read_text())
        assert (args["matching"], args["partial"], args["epochs"]) == (matching, 0.3, 2)
        log = log_of(folder)
        terms = {"known", "pseudo", "contrastive", "distillation"}
        terms = terms if matching == "region" else {"known"}
        assert [line["epoch"] for line in log] == [1, 2]
        for line in log:
            assert terms | {"loss", "lr", "seconds"} <= line.keys()
            assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-4)
        assert log[1]["known"] < log[0]["known"]
        assert ("pseudo_precision" in log[-1]) == (matching == "region")
        state = torch.load(folder / "best.pt", weights_only=True)
        assert state["method"] == "trm_ml" and state["labels"] == data.TOY_LABELS
        torch.manual_seed(0)
        start = trm_ml.TRM(toy[0], data.TOY_LABELS, matching).trained()
        assert state["model"].keys() == start.keys()
        for name, value in state["model"].items():
            assert not torch.equal(value, start[name]), f"{name} did not train"
    assert 0 <= log_of(trained)[-1]["pseudo_precision"] <= 1


def test_the_rows_are_what_the_pieces_give(trained):
    clip, test = toy_images(64)
    images = torch.stack([image for image, _ in test])
    with torch.no_grad():
        x = trm_ml.encode(clip, images, options())
        texts = F.normalize(clip.encode_text(clip.tokenize(
            [f"a photo of a {label}." for label in test.labels])), dim=-1)
        both = (x[:, 0] @ texts.T + (x[:, 1:] @ texts.T).amax(dim=1)) / 2
        scores = {'zero-shot, global, "a photo of a {}."': x[:, 0] @ texts.T,
                  'zero-shot, local, "a photo of a {}."': (x[:, 1:] @ texts.T).amax(dim=1),
                  'zero-shot, both, "a photo of a {}."': both}
        for name, folder in (("TRM-ML", "."), ("text-pixel matching", "pixel"),
                             ("text-image matching", "image")):
            model, _, _ = trm_ml.load_checkpoint(trained / folder / "best.pt", options())
            scores[name] = model(x, model.texts())[0]
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    present = (test.targets == 1).numpy()
    shown = present.any(axis=0)
    rows = {row["name"]: row for row in rows_of(trained)}
    for name, values in scores.items():
        expected = sklearn_metrics.average_precision_score(
            present[:, shown], values.numpy()[:, shown], average="macro")
        # half precision swaps a few neighbours
        assert rows[name]["mAP"] == pytest.approx(expected, abs=3e-3), name


def test_clips_weights_do_not_change_in_training(tmp_path, monkeypatch):
    clip, preprocess = clip_model.load("toy-RN")
    before = copy.deepcopy(clip.state_dict())
    monkeypatch.setattr(clip_model, "load", lambda name, device="cpu": (clip, preprocess))
    trm_ml.main([*REGION, "--output", str(tmp_path)])
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in clip.parameters())


def test_evaluating_the_checkpoint_repeats_the_row(trained, tmp_path, capsys):
    arguments = [*QUICK, "--eval", str(trained / "best.pt")]
    trm_ml.main([*arguments, "--output", str(tmp_path / "evaluated")])
    assert rows_of(tmp_path / "evaluated")[-1] == rows_of(trained)[-1]
    assert rows_of(tmp_path / "evaluated")[:6] == rows_of(trained)[:6]
    assert [file.name for file in (tmp_path / "evaluated").iterdir()] == ["results.json"]
    before = content_of(trained)
    with pytest.raises(SystemExit):
        trm_ml.main([*arguments, "--output", str(trained)])
    assert "results.json" in capsys.readouterr().err and content_of(trained) == before
    trm_ml.main([*QUICK, "--eval", str(trained / "pixel" / "best.pt"), "--output",
                 str(tmp_path / "pixel")])
    assert rows_of(tmp_path / "pixel")[-1]["mAP"] == rows_of(trained)[-2]["mAP"]


def test_an_evaluated_baseline_does_not_bear_the_methods_name(trained, tmp_path):
    trm_ml.main([*QUICK, "--eval", str(trained / "image" / "best.pt"), "--output",
                 str(tmp_path / "evaluated")])
    assert rows_of(tmp_path / "evaluated")[-1]["name"] != "TRM-ML"


# ---- which entries are known

def test_the_known_entries_are_the_same_for_every_model_and_seed(trained, tmp_path):
    trm_ml.main([*REGION, "--epochs", "1", "--seed", "1", "--pseudo", "0", "--output",
                 str(tmp_path)])
    expected = data.keep_partial(toy_truth(), 0.3, 0) != 0
    for folder in (trained, trained / "image", trained / "pixel", tmp_path):
        assert torch.equal(torch.load(folder / "known.pt", weights_only=True), expected)
    assert not torch.equal(weights_of(tmp_path)["context"], weights_of(trained)["context"])


@pytest.mark.parametrize("setting", [["--partial", "0.4"], ["--single-positive"],
                                     ["--partial", "0.4", "--cache-features", "no"]])
def test_training_sees_every_image_with_its_known_labels(tmp_path, monkeypatch, setting):
    batches, truths = [], []
    originals = trm_ml.batch_loss, trm_ml.pseudo_label_counts

    def batch_loss(model, x, known, *more):
        batches.append((x, known))
        return originals[0](model, x, known, *more)

    def pseudo_label_counts(pseudo, known, truth):
        truths.append(truth)
        return originals[1](pseudo, known, truth)

    monkeypatch.setattr(trm_ml, "batch_loss", batch_loss)
    monkeypatch.setattr(trm_ml, "pseudo_label_counts", pseudo_label_counts)
    trm_ml.main([*REGION, "--limit", "40", "--epochs", "2", "--output", str(tmp_path), *setting])
    x, known = map(torch.cat, zip(*batches))
    truth = toy_truth(40)
    expected = (data.keep_single_positive(truth, 1200) if "--single-positive" in setting
                else data.keep_partial(truth, 0.4, 0))
    clip, test = toy_images(1)
    train = data.load_dataset("toy", split="train", transform=test.transform, zero_shot=False)
    with torch.no_grad():
        embeddings = trm_ml.encode(clip, torch.stack([train[i][0] for i in range(40)]), options())
    image = torch.stack([(row - embeddings).square().sum(dim=(1, 2)).argmin() for row in x])
    assert image[:40].sort().values.tolist() == image[40:].sort().values.tolist() == list(range(40))
    assert image[:40].tolist() != image[40:].tolist()  # another order
    torch.testing.assert_close(x, embeddings[image], rtol=0, atol=1e-3)
    assert torch.equal(known, expected[image]) and torch.equal(torch.cat(truths), truth[image])
    assert torch.equal(torch.load(tmp_path / "known.pt", weights_only=True), expected != 0)
    if "--single-positive" in setting:
        assert (known.sum(dim=1) == (truth[image] == 1).any(dim=1)).all()
        assert known.min() == 0


def test_labels_without_a_known_positive_are_named(tmp_path, capsys):
    known = data.keep_partial(toy_truth(60), 0.1, 0)
    without = [data.TOY_LABELS[i] for i in range(56) if not (known[:, i] == 1).any()]
    trm_ml.main([*REGION, "--limit", "60", "--epochs", "2", "--partial", "0.1", "--output",
                 str(tmp_path)])
    printed = capsys.readouterr().err
    assert f"{len(without)} labels" in printed and f"'{without[0]}'" in printed
    model, index = weights_of(tmp_path), data.TOY_LABELS.index(without[0])
    assert model["sure_present"][index] == math.inf and rows_of(tmp_path)[-1]["mAP"] > 0.05
    assert model["sure_present"].isfinite().sum() == 56 - len(without)


# ---- resuming

@pytest.mark.parametrize("epochs", [1, 4, 5, 6])
def test_an_interrupted_run_resumes_to_the_same_numbers(trained, tmp_path, monkeypatch, epochs):
    """Interrupted in the first model; between two models; in the last one; after it."""
    original, calls = data.finish_epoch, []

    def interrupted(*arguments):
        original(*arguments)
        calls.append(1)
        if len(calls) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "finish_epoch", interrupted)
    with pytest.raises(SystemExit) as error:
        trm_ml.main([*QUICK, "--output", str(tmp_path)])
    assert error.value.code == 130 and not (tmp_path / "results.json").exists()
    monkeypatch.setattr(data, "finish_epoch", original)
    torch.manual_seed(99)
    trm_ml.main([*QUICK, "--output", str(tmp_path), "--resume"])
    assert rows_of(tmp_path) == rows_of(trained)
    for folder in ("image", "pixel", "."):
        assert [line["epoch"] for line in log_of(tmp_path / folder)] == [1, 2]
        whole, resumed = (weights_of(parent / folder) for parent in (trained, tmp_path))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list(tmp_path.rglob("previous-*"))


def test_a_run_over_an_earlier_one_can_be_resumed_too(trained, tmp_path, monkeypatch):
    trm_ml.main([*QUICK, "--epochs", "1", "--output", str(tmp_path)])
    original = data.finish_epoch

    def interrupted(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "finish_epoch", interrupted)
    with pytest.raises(SystemExit):
        trm_ml.main([*QUICK, "--output", str(tmp_path)])
    monkeypatch.setattr(data, "finish_epoch", original)
    trm_ml.main([*QUICK, "--output", str(tmp_path), "--resume"])
    assert rows_of(tmp_path) == rows_of(trained)


def test_resuming_a_finished_run_repeats_its_results(trained):
    rows, weights = rows_of(trained), (trained / "last.pt").read_bytes()
    trm_ml.main([*QUICK, "--output", str(trained), "--resume"])
    assert rows_of(trained) == rows and (trained / "last.pt").read_bytes() == weights


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "5"], "--epochs 2, not 5"),
    (["--lr", "0.01"], "--lr"),
    (["--seed", "1"], "--seed 0, not 1"),
    (["--partial", "0.4"], "--partial 0.3, not 0.4"),
    (["--single-positive"], "--resume"),
    (["--matching", "pixel"], "--matching region, not pixel"),
    (["--pseudo", "0"], "--pseudo 0.1, not 0"),
    (["--limit", "63"], "--limit 64, not 63"),
    (["--per-label-context"], "--per-label-context"),
])
def test_resume_with_other_options_is_refused(trained, capsys, arguments, message):
    before = content_of(trained)
    with pytest.raises(SystemExit) as error:
        trm_ml.main([*QUICK, "--output", str(trained), "--resume", *arguments])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and message in printed and content_of(trained) == before


def test_a_second_run_sets_the_first_aside(tmp_path):
    arguments = [*QUICKEST, "--matching", "image", "region", "--output", str(tmp_path)]
    trm_ml.main(arguments)
    first = content_of(tmp_path)
    trm_ml.main([*arguments, "--seed", "1"])
    for name in ("last.pt", "results.json", "known.pt", "image/last.pt"):
        file = tmp_path / name
        assert (file.parent / "previous-1" / file.name).read_bytes() == first[file]


# ---- several models

def test_a_sweep_has_a_run_each_and_their_average(tmp_path, capsys):
    trm_ml.main([*QUICK, "--epochs", "1", "--matching", "image", "region", "--partial", "0.2",
                 "0.5", "--output", str(tmp_path)])
    rows = rows_of(tmp_path)[6:]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("text-image matching, 20% known", "ablation"), ("TRM-ML, 20% known", "method"),
        ("text-image matching, 50% known", "ablation"), ("TRM-ML, 50% known", "method"),
        ("text-image matching, average", "ablation"), ("TRM-ML, average", "method")]
    for first, second, average in (rows[0::2], rows[1::2]):
        assert first.keys() == average.keys() and first["mAP"] != second["mAP"]
        for metric in first.keys() - {"name", "kind"}:
            assert average[metric] == pytest.approx((first[metric] + second[metric]) / 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "partial-0.2", "partial-0.5", "args.json", "results.json"}
    for share in (0.2, 0.5):
        for folder in (tmp_path / f"partial-{share}", tmp_path / f"partial-{share}" / "image"):
            assert torch.equal(torch.load(folder / "known.pt", weights_only=True),
                               data.keep_partial(toy_truth(), share, 0) != 0)
            assert json.loads((folder / "args.json").read_text())["partial"] == share
    line = next(line for line in capsys.readouterr().out.splitlines()
                if line.startswith("TRM-ML  ") and len(line.split()) == 4)
    assert line.split()[1:] == [f"{100 * row['mAP']:.1f}" for row in rows[1::2]]
    trm_ml.main([*QUICK, "--epochs", "1", "--eval", str(tmp_path / "partial-0.5" / "best.pt"),
                 "--output", str(tmp_path / "evaluated")])
    assert rows_of(tmp_path / "evaluated")[-1]["mAP"] == rows[3]["mAP"]


def test_a_sweep_resumes_too(tmp_path, monkeypatch):
    arguments = [*REGION, "--limit", "32", "--partial", "0.2", "0.5", "--output"]
    trm_ml.main([*arguments, str(tmp_path / "whole")])
    original, calls = data.finish_epoch, []

    def interrupted(*values):
        original(*values)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "finish_epoch", interrupted)
    with pytest.raises(SystemExit):
        trm_ml.main([*arguments, str(tmp_path / "killed")])
    monkeypatch.setattr(data, "finish_epoch", original)
    trm_ml.main([*arguments, str(tmp_path / "killed"), "--resume"])
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "killed")


def test_shares_that_round_to_the_same_percent_are_different_runs(tmp_path):
    trm_ml.main([*QUICKEST, "--partial", "0.201", "0.204", "--output", str(tmp_path)])
    names = [row["name"] for row in rows_of(tmp_path) if row["kind"] == "method"]
    assert len(names) == len(set(names)) == 3


@pytest.mark.parametrize("setting", [[], ["--single-positive"]])
def test_the_upper_bound_knows_all_labels(tmp_path, setting):
    trm_ml.main([*QUICKEST, "--upper-bound", "--output", str(tmp_path), *setting])
    rows = rows_of(tmp_path)[6:]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("TRM-ML", "method"), ("upper bound (all labels known)", "ablation")]
    assert torch.load(tmp_path / "upper-bound" / "known.pt", weights_only=True).all()
    assert log_of(tmp_path / "upper-bound")[-1]["pseudo"] == 0
    assert not torch.load(tmp_path / "known.pt", weights_only=True).all()


def test_the_upper_bound_of_a_sweep_has_no_average(tmp_path):
    trm_ml.main([*QUICKEST, "--upper-bound", "--partial", "0.2", "0.5", "--output",
                 str(tmp_path)])
    names = [row["name"] for row in rows_of(tmp_path) if row["kind"] != "zero-shot"]
    assert sorted(names) == sorted(["TRM-ML, 20% known", "TRM-ML, 50% known", "TRM-ML, average",
                                    "upper bound (all labels known)"])


def test_region_matching_alone(trained, tmp_path):
    trm_ml.main([*REGION, "--cache-features", "memory", "--output", str(tmp_path)])
    assert rows_of(tmp_path)[:6] == rows_of(trained)[:6]
    assert rows_of(tmp_path)[6:] == rows_of(trained)[-1:]
    assert not list(path for path in tmp_path.iterdir() if path.is_dir())


def test_half_precision_trains_and_ranks_about_the_same(trained, tmp_path):
    trm_ml.main([*REGION, "--precision", "bf16", "--output", str(tmp_path)])
    whole = rows_of(trained)
    for half, full in zip(rows_of(tmp_path), [*whole[:6], whole[-1]]):
        assert half["name"] == full["name"]
        assert half["mAP"] == pytest.approx(full["mAP"], abs=0.03)


def test_validation_images_are_held_out_and_select_the_best_epoch(tmp_path):
    trm_ml.main([*REGION, "--val-fraction", "0.25", "--output", str(tmp_path)])
    scores = [line["val_mAP"] for line in log_of(tmp_path)]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    epoch = len(best["log"])
    assert scores[epoch - 1] == max(scores)
    known = torch.load(tmp_path / "known.pt", weights_only=True)
    assert len(known) == 64
    # the score of the images that are left, by their known labels alone
    clip, test = toy_images(1)
    whole = data.load_dataset("toy", split="train", transform=test.transform,
                              zero_shot=False).subset(range(64))
    whole.targets = data.keep_partial(whole.targets, 0.3, 0)
    train, validation = data.hold_out(whole, 0.25, whole.transform)
    assert torch.equal(whole.targets != 0, known)
    model, _, _ = trm_ml.load_checkpoint(tmp_path / "best.pt", options())
    with torch.no_grad():
        x = trm_ml.encode(clip, torch.stack([image for image, _ in validation]), options())
        logits = model(x, model.texts())[0]
    assert max(scores) == pytest.approx(
        metrics.mean_average_precision(logits, validation.targets), abs=0.02)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch,
                                                                     capsys):
    calls, original = [], trm_ml.batch_loss

    def batch_loss(*arguments):
        calls.append(1)
        loss, *others = original(*arguments)
        return (loss * float("nan") if len(calls) == 4 else loss), *others

    monkeypatch.setattr(trm_ml, "batch_loss", batch_loss)
    with pytest.raises(SystemExit) as error:
        trm_ml.main([*REGION, "--output", str(tmp_path)])  # 2 steps an epoch
    message = capsys.readouterr().err
    assert error.value.code == 2 and "epoch 2, step 2" in message and "known" in message
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and state["model"]["context"].isfinite().all()
    assert not (tmp_path / "results.json").exists()


# ---- prediction

def test_predict_prints_what_the_pieces_give(trained, tmp_path, capsys):
    for i in range(2):
        data.toy_scene("benchmark", 7, i).save(tmp_path / f"{i}.png")
    capsys.readouterr()
    trm_ml.main(["--predict", str(tmp_path), "--checkpoint", str(trained / "best.pt"), "--quiet",
                 "--device", "cpu", "--top", "4", "--heatmap", str(tmp_path / "maps")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["0.png", "1.png"]
    model, preprocess, state = trm_ml.load_checkpoint(trained / "best.pt", options())
    for i, line in enumerate(lines):
        image = preprocess(data.open_image(tmp_path / f"{i}.png"))[None]
        with torch.no_grad():
            logits = model(trm_ml.encode(model.clip, image, options()), model.texts())[0][0]
        scores, order = (1 / (1 + torch.exp(-logits))).sort(descending=True)
        assert [entry["label"] for entry in line["labels"]] == [
            state["labels"][j] for j in order[:4].tolist()]
        assert [entry["score"] for entry in line["labels"]] == pytest.approx(
            scores[:4].tolist(), abs=1e-3)
        with data.Image.open(tmp_path / "maps" / f"{i}.png") as picture:
            assert picture.width > 128  # the photo and its maps side by side
    trm_ml.main(["--predict", str(tmp_path / "0.png"), "--checkpoint",
                 str(trained / "pixel" / "best.pt"), "--quiet", "--device", "cpu"])
    line = json.loads(capsys.readouterr().out)
    assert sorted(entry["label"] for entry in line["labels"]) == data.TOY_LABELS


def test_the_heatmap_is_the_attention_over_locations(trained, monkeypatch, tmp_path):
    shown, original = [], data.draw_heatmaps

    def draw_heatmaps(photo, maps, whole):
        assert whole  # the image is squeezed, not cropped
        shown.extend(maps)
        return original(photo, maps, whole)

    monkeypatch.setattr(data, "draw_heatmaps", draw_heatmaps)
    data.toy_scene("benchmark", 7, 0).save(tmp_path / "0.png")
    trm_ml.main(["--predict", str(tmp_path / "0.png"), "--checkpoint", str(trained / "best.pt"),
                 "--quiet", "--device", "cpu", "--heatmap", str(tmp_path / "maps")])
    model, preprocess, state = trm_ml.load_checkpoint(trained / "best.pt", options())
    image = preprocess(data.open_image(tmp_path / "0.png"))[None]
    with torch.no_grad():
        x = trm_ml.encode(model.clip, image, options())
        attention = model.regions(x)[1][0]
        grid = model.clip.visual.features(image).shape[2:]
    assert len(shown) == 3 and attention.shape[1] == 1 + grid[0] * grid[1]
    for label, _, values in shown:
        expected = attention[state["labels"].index(label), 1:].view(grid)
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments, message", [
    (["--partial", "0"], "--partial 0"),
    (["--partial", "0.5", "0"], "--partial 0"),
    (["--partial", "1.5"], "--partial"),
    (["--partial", "nan"], "--partial"),
    (["--partial", "-1"], "--partial"),
    (["--partial", "abc"], "--partial"),
    (["--partial", "0.5", "--single-positive"], "--single-positive"),
    (["--partial", "0.000001"], "--partial"),
    (["--labels", "owl"], "--labels"),
    (["--predict", "{image}", "--checkpoint", "{best}", "--labels", "owl"], "--labels"),
    (["--cache-features", "disk", "--augment", "yes"], "--augment"),
    (["--cache-features", "tape"], "--cache-features"),
    (["--augment", "maybe"], "--augment"),
    (["--matching", "words"], "--matching"),
    (["--data", "nosuch"], "nosuch"),
    (["--data", "coco", "--clip", "toy-RN"], "--root"),
    (["--data", "coco", "--root", "/no/such/folder"], "/no/such/folder"),
    (["--clip", "ViT-Z/99"], "ViT-Z/99"),
    (["--image-size", "8"], "--image-size"),
    (["--epochs", "0"], "--epochs"),
    (["--lr", "nan"], "--lr"),
    (["--pseudo", "-1"], "--pseudo"),
    (["--contrastive", "inf"], "--contrastive"),
    (["--batch-size", "0"], "--batch-size"),
    (["--val-fraction", "1.5"], "--val-fraction"),
    (["--eval", "nosuch.pt"], "nosuch.pt"),
    (["--eval", "{text}"], "not a checkpoint"),
    (["--eval", "{other}"], "mkt"),
    (["--eval", "{labels}"], "labels"),
    (["--eval", "{clip}"], "other weights"),
    (["--eval", "{best}", "--clip", "RN50"], "toy-RN"),
    (["--predict", "{image}"], "--checkpoint"),
    (["--predict", "{image}", "--checkpoint", "{other}"], "mkt"),
    (["--predict", "{text}", "--checkpoint", "{best}"], "text.jpg"),
    (["--predict", "{nothing}", "--checkpoint", "{best}"], "nothing"),
    (["--heatmap", "{nothing}"], "--predict"),
    (["--predict", "{image}", "--checkpoint", "{of_images}", "--heatmap", "{nothing}"],
     "--matching image"),
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
    files.update(best=trained / "best.pt", of_images=trained / "image" / "best.pt",
                 nothing=tmp_path / "nothing")
    before, output = content_of(trained), tmp_path / "output"
    with pytest.raises(SystemExit) as error:
        trm_ml.main(["--limit", "16", "--quiet", "--output", str(output),
                     *[argument.format(**files) for argument in arguments]])
    printed = capsys.readouterr().err.strip()
    assert error.value.code == 2 and message in printed and "Traceback" not in printed
    assert printed.startswith("trm_ml.py: error: ") and "\n" not in printed
    assert not output.exists() and not files["nothing"].exists()
    assert content_of(trained) == before


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit) as error:
        trm_ml.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert error.value.code == 0 and "--single-positive" in printed
    for name, value in trm_ml.BENCHMARK.items():
        assert f"--{name.replace('_', '-')}" in printed
        if not isinstance(value, list):
            assert f"default: {value}, toy: {trm_ml.TOY[name]}" in printed


# ---- images of one's own

OWN_LABELS = data.TOY_LABELS[:10]


@pytest.fixture
def own(tmp_path):
    """24 training and 16 test scenes as PNG files; a third of the training entries unknown."""
    rng = np.random.RandomState(3)
    things = list(range(10))
    for split, count, seed in (("train", 24, 11), ("test", 16, 12)):
        (tmp_path / "own" / split).mkdir(parents=True)
        with open(tmp_path / "own" / f"{split}.jsonl", "w") as file:
            for i in range(count):
                data.toy_scene("benchmark", seed, i, things).save(
                    tmp_path / "own" / split / f"{i}.png")
                shown = {entry[0] for entry in data.toy_objects("benchmark", seed, i, things)}
                known = [c for c in things if split == "test" or rng.rand() < 2 / 3]
                known = [] if (split, i) == ("train", 5) else known
                file.write(json.dumps({
                    "image": f"{split}/{i}.png",
                    "present": [OWN_LABELS[c] for c in known if c in shown],
                    "absent": [OWN_LABELS[c] for c in known if c not in shown]}) + "\n")
    (tmp_path / "own" / "labels.txt").write_text("\n".join(OWN_LABELS) + "\n")
    return tmp_path / "own"


def own_arguments(own, *more):
    return ["--data", "folder", "--root", str(own), "--clip", "toy-RN", "--image-size", "128",
            "--workers", "0", "--batch-size", "8", "--epochs", "2", "--lr", "1e-3", "--device",
            "cpu", "--quiet", *more]


@pytest.mark.parametrize("setting, seen", [
    (["--augment", "yes"], 2 * 24 + 16), (["--augment", "no"], 24 + 16),
    (["--augment", "no", "--cache-features", "no"], 2 * 24 + 16),
    (["--augment", "no", "--cache-features", "memory"], 24 + 16),
    (["--augment", "no", "--cache-features", "disk"], 24 + 16)])
def test_a_folder_of_own_images(own, tmp_path, encoded, empty_cache, setting, seen):
    trm_ml.main(own_arguments(own, *setting, "--output", str(tmp_path / "run")))
    assert seen <= sum(encoded) <= seen + 2  # one of each split may tell the shape
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"] == "folder" and results["clip"] == "toy-RN"
    assert [row["kind"] for row in results["rows"]] == 6 * ["zero-shot"] + ["method"]
    truth = data.load_dataset("folder", own, "train").targets
    known = torch.load(tmp_path / "run" / "known.pt", weights_only=True)
    assert torch.equal(known, truth != 0) and 0.5 < known.float().mean() < 0.8
    assert not known[5].any()
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["labels"] == OWN_LABELS
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["augment"], args["partial"], args["matching"]) == (setting[1], 1.0, "region")
    # truth that nobody knows is not counted: what is unknown here has no precision
    assert "pseudo_precision" not in log_of(tmp_path / "run")[-1]
    trm_ml.main(own_arguments(own, "--eval", str(tmp_path / "run" / "best.pt"), "--output",
                              str(tmp_path / "evaluated"), *setting))
    assert rows_of(tmp_path / "evaluated")[-1] == results["rows"][-1]


def test_own_images_with_a_part_of_their_labels(own, tmp_path):
    trm_ml.main(own_arguments(own, "--augment", "no", "--cache-features", "memory", "--partial",
                              "0.5", "--batch-size", "1", "--epochs", "1", "--output",
                              str(tmp_path / "run")))
    expected = data.keep_partial(data.load_dataset("folder", own, "train").targets, 0.5, 0)
    known = torch.load(tmp_path / "run" / "known.pt", weights_only=True)
    assert torch.equal(known, expected != 0) and not known[5].any()  # a batch without anything
    for name, value in weights_of(tmp_path / "run").items():
        assert name.startswith("sure_") or value.isfinite().all(), name


def test_resume_with_other_known_entries_is_refused(own, tmp_path, capsys):
    arguments = own_arguments(own, "--augment", "no", "--output", str(tmp_path / "run"))
    trm_ml.main(arguments)
    trm_ml.main([*arguments, "--resume"])
    lines = (own / "train.jsonl").read_text().splitlines(keepends=True)
    entry = json.loads(lines[3])
    entry["absent"] = entry["absent"][1:]  # is unknown now
    (own / "train.jsonl").write_text("".join([*lines[:3], json.dumps(entry) + "\n", *lines[4:]]))
    before = content_of(tmp_path / "run")
    with pytest.raises(SystemExit) as error:
        trm_ml.main([*arguments, "--resume"])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and printed.startswith("trm_ml.py: error: --resume: ")
    assert str(tmp_path) in printed and content_of(tmp_path / "run") == before


def test_augmented_images_differ_every_time_and_test_images_never(own, tmp_path, monkeypatch):
    batches, original = [], clip_model.CLIP.encode_image_dense

    def encode_image_dense(self, images, *arguments, **extra):
        batches.append(images)
        return original(self, images, *arguments, **extra)

    monkeypatch.setattr(clip_model.CLIP, "encode_image_dense", encode_image_dense)
    trm_ml.main(own_arguments(own, "--augment", "yes", "--output", str(tmp_path / "run")))
    images = torch.cat(batches)
    train, test = images[:48].flatten(1), images[48:]
    assert len(torch.unique(train, dim=0)) == 48
    _, preprocess = trm_ml.build({"clip": "toy-RN", "image_size": 128}, "cpu")
    dataset = data.load_dataset("folder", own, "test", preprocess)
    assert torch.equal(test, torch.stack([image for image, _ in dataset]))
    plain = data.load_dataset("folder", own, "train", preprocess)
    plain = torch.stack([image for image, _ in plain]).flatten(1)
    alike = (torch.cdist(train, plain) == 0).any(dim=1)
    assert alike.float().mean() < 0.5


def test_augmented_embeddings_are_never_kept(own, tmp_path, capsys):
    """--cache-features alone: refused, or without the augmentation that is the default."""
    try:
        trm_ml.main(own_arguments(own, "--cache-features", "memory", "--output",
                                  str(tmp_path / "run")))
    except SystemExit as error:
        assert error.code == 2 and "--augment" in capsys.readouterr().err
    else:
        args = json.loads((tmp_path / "run" / "args.json").read_text())
        assert args["augment"] == "no" or args["cache_features"] == "no"


def test_an_image_that_changed_is_embedded_anew(own, empty_cache, encoded):
    clip, preprocess = trm_ml.build({"clip": "toy-RN", "image_size": 128}, "cpu")
    dataset = data.load_dataset("folder", own, "test", preprocess)
    disk = options("--cache-features", "disk")
    first = trm_ml.kept_embeddings(clip, dataset, disk).clone()
    data.toy_scene("benchmark", 13, 0).save(own / "test" / "3.png")
    os.utime(own / "test" / "3.png", ns=(0, 0))
    encoded.clear()
    second = trm_ml.kept_embeddings(clip, dataset, disk)
    assert sum(encoded) >= 16
    changed = (first != second).any(dim=(1, 2)).nonzero()[:, 0].tolist()
    assert changed == [3]


@pytest.mark.parametrize("keep", ["no", "memory", "disk"])
def test_an_unreadable_image_lends_its_labels_to_no_other(own, tmp_path, keep,
                                                                      monkeypatch, capsys):
    (own / "train" / "7.png").write_bytes(b"no image")
    seen, original = [], trm_ml.batch_loss

    def batch_loss(model, x, known, *more):
        seen.extend(zip(x, known))
        return original(model, x, known, *more)

    monkeypatch.setattr(trm_ml, "batch_loss", batch_loss)
    trm_ml.main(own_arguments(own, "--augment", "no", "--cache-features", keep, "--epochs", "1",
                              "--output", str(tmp_path / "run")))
    assert capsys.readouterr().err.count("7.png") == 1
    assert [line["unreadable_images"] for line in log_of(tmp_path / "run")] == [1]
    _, preprocess = trm_ml.build({"clip": "toy-RN", "image_size": 128}, "cpu")
    clip, dataset = toy_images(1)[0], data.load_dataset("folder", own, "train", preprocess)
    readable = [i for i in range(24) if i != 7]
    with torch.no_grad():
        embeddings = trm_ml.encode(clip, torch.stack([dataset[i][0] for i in readable]), options())
    assert len(seen) == (24 if keep == "no" else 23)  # another image takes its place, or none
    for x, known in seen:
        image = readable[int((x - embeddings).square().sum(dim=(1, 2)).argmin())]
        assert torch.equal(known, dataset.targets[image]), f"image {image} has another's labels"


def test_an_unreadable_test_image_stops_even_if_its_embedding_was_kept(own, tmp_path, capsys):
    """The images are the same in training, where it was left out, and so is the kept file."""
    (own / "train" / "7.png").write_bytes(b"no image")
    (own / "test.jsonl").write_text((own / "train.jsonl").read_text())
    with pytest.raises(SystemExit) as error:
        trm_ml.main(own_arguments(own, "--augment", "no", "--epochs", "1", "--output",
                                  str(tmp_path / "run")))
    assert error.value.code == 2 and (tmp_path / "run" / "best.pt").exists()
    assert "7.png: cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_nothing_known_at_all_is_a_user_error(own, tmp_path, capsys):
    lines = [json.loads(line) for line in (own / "train.jsonl").read_text().splitlines()]
    (own / "train.jsonl").write_text("".join(json.dumps({"image": line["image"]}) + "\n"
                                             for line in lines))
    with pytest.raises(SystemExit) as error:
        trm_ml.main(own_arguments(own, "--output", str(tmp_path / "run")))
    printed = capsys.readouterr().err.strip()
    assert error.value.code == 2 and "known" in printed and "\n" not in printed
    assert not (tmp_path / "run").exists()
