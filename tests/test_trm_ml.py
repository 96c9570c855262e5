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
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torchvision import transforms

import clip_model
import data
import metrics
import trees
import trm_ml
from toy import world
from trees import assert_same_weights, checkpoint, drawn, random_targets, results

LABELS = ["star", "moon", "traffic light", "fish", "very old house"]
DIM = 128  # of toy-RN's joint embedding
ARGS, _ = trm_ml.arguments(["--device", "cpu"])


@pytest.fixture(scope="module")
def clip():
    return clip_model.load("toy-RN")[0]


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def moved_model(clip, per_label_context=False):
    """A TRM none of whose weights is at its start any more."""
    torch.manual_seed(0)
    model = trm_ml.TRM(clip, LABELS, per_label_context)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.visual.copy_(unit(*model.visual.shape))
    return model


@pytest.mark.parametrize("name", sorted(data.DATASETS.keys() - {"openimages"}))
def test_a_benchmarks_expected_positives(name):
    args, _ = trm_ml.arguments(["--data", name, "--single-positive"])
    assert args.expected_positives == {"voc2007": 1.5, "voc2012": 1.5, "coco": 2.9, "cub": 31.4,
                                       "nuswide81": 1.9, "toy": 2.7}.get(name, 3)


# ---- losses

@pytest.mark.parametrize("setting", [
    {}, {"gamma_pos": 0, "gamma_neg": 4}, {"gamma_pos": 2, "gamma_neg": 1, "clip": 0}])
def test_asymmetric_loss_is_its_formula_whose_focus_is_constant(setting):
    full = {"gamma_pos": 1, "gamma_neg": 2, "clip": 0.05} | setting
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 9, dtype=torch.float64)).requires_grad_()
    targets = random_targets(7, 9)
    p = 1 / (1 + torch.exp(-logits))
    q = (p - full["clip"]).clamp(min=0)
    present = (1 - p.detach()) ** full["gamma_pos"] * torch.log(p)
    absent = q.detach() ** full["gamma_neg"] * torch.log(1 - q)
    total = -present[targets == 1].sum() - absent[targets == -1].sum()
    loss = trm_ml.asymmetric_loss(logits, targets, **setting)
    torch.testing.assert_close(loss, total / 7)
    gradient, = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(total / 7, logits)[0])
    assert not gradient[targets == 0].any() and gradient[targets == 1].all()


# ---- model

def prompts_of(clip):
    """CLIP's own embeddings of the labels."""
    tokens = clip.tokenize([f"a photo of a {label}." for label in LABELS])
    return F.normalize(clip.encode_text(tokens), dim=-1).detach()


@torch.no_grad()
def test_attention_starts_as_clips_own_matching_in_each_head(clip):
    model, x, start = trm_ml.TRM(clip, LABELS), unit(3, 7, DIM), prompts_of(clip)
    torch.testing.assert_close(model.queries, start, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.visual, model.queries)
    heads = [(clip.logit_scale.exp() * part @ own.T).softmax(dim=1).transpose(1, 2) @ part
             for part, own in zip(x.chunk(4, dim=-1), start.chunk(4, dim=-1))]
    expected = F.normalize(torch.cat(heads, dim=-1), dim=-1)
    logits, query_level, _ = model(x, start)
    torch.testing.assert_close(query_level, expected, rtol=1e-3, atol=1e-4)
    expected = 10 * torch.einsum("bcd,cd->bc", expected, start) - math.log(19)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert model.context.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.pseudo_labels(torch.randn(3, 5), torch.zeros(3, 5)).any()


@pytest.mark.parametrize("per_label", [False, True])
def test_texts_in_chunks_are_the_same_with_gradients(clip, per_label, monkeypatch):
    model = moved_model(clip, per_label)
    direction = torch.randn(len(LABELS), DIM)
    whole = model.texts()
    monkeypatch.setattr(clip_model.in_chunks, "__defaults__", (2,))
    parts = model.texts()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    expected, found = (torch.autograd.grad((texts * direction).sum(), model.context)[0]
                       for texts in (whole, parts))
    assert expected.abs().amax(dim=(0, 2)).min() > 0  # every word matters
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert trm_ml.ESTIMATED == 20_000  # as memory allows


# ---- prototypes, estimates, pseudo labels

def test_log_odds_are_of_the_mean_probability_of_the_whole_image_and_its_best_location(clip):
    x, prompts = unit(3, 7, DIM), prompts_of(clip)
    x[0, 0] = prompts[1]  # of one label there is no doubt
    found = trm_ml.clip_log_odds(x, prompts, 25)
    for image, row in zip(x, found):
        probabilities = torch.stack([torch.exp(25 * e @ prompts.T) for e in image])
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        p = (probabilities[0] + probabilities[1:].max(dim=0).values) / 2
        torch.testing.assert_close(row, torch.log(p / (1 - p)), rtol=1e-3, atol=1e-3)
    certain = trm_ml.clip_log_odds(prompts[[0, 0]][None], prompts, 1e4)
    assert certain.abs().max() == pytest.approx(math.log(1e6), rel=0.01)


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
        if not len(ranked):
            assert model.sure_present[c] == torch.inf and model.sure_absent[c] == -torch.inf
            continue
        if single_positive:  # 500 positives in all, of which 200 are known; one more a label
            hidden = 300 * (positives + 1) / (200 + 9)
        else:  # one positive more, among as many entries as have one on average
            average = (known != 0).sum() / (known == 1).sum()
            hidden = len(ranked) * (positives + 1) / (positives + negatives + average)
        for threshold, factor in ((model.sure_present, 0.5), (model.sure_absent, 2)):
            ranks = {min(int(factor * hidden + rounding), len(ranked) - 1)
                     for rounding in (1e-4, -1e-4)}
            assert threshold[c].item() in ranked[sorted(ranks)]
    assert (pseudo[:, 5:] == 1).any(axis=0).all() and (pseudo[:, 5:] == -1).any(axis=0).all()


# ---- steps of training

def straightforward_losses(model, x, known, log_odds, args):
    """-> {term: value} and the estimates: prompts of 77 tokens, every text's similarity with every
    region, sums over all entries."""
    clip, labels = model.clip, len(LABELS)
    ids = clip.tokenize([f"{label}." for label in LABELS])  # [C, 77]
    words = clip.token_embedding(ids[:, :77 - 16])
    context = model.context.expand(labels, -1, -1)
    words = torch.cat([words[:, :1], context, words[:, 1:]], dim=1) + clip.positional_embedding
    for block in clip.transformer.resblocks:
        words = block(words, causal=True)
    ends = ids.argmax(dim=1) + 16
    texts = clip.ln_final(words)[torch.arange(labels), ends] @ clip.text_projection
    texts = texts / texts.norm(dim=1, keepdim=True)
    scale = clip.logit_scale.exp() * math.sqrt(DIM / 4)  # torch divides by the root
    images = x.transpose(0, 1)  # [1 + L, B, D]
    attended, saliency = F.multi_head_attention_forward(
        model.queries[:, None].expand(-1, len(x), -1), images, images, DIM, 4,
        torch.cat([scale * model.query.weight, model.key.weight, model.value.weight]),
        torch.cat([scale * model.query.bias, model.key.bias, model.value.bias]),
        None, None, False, 0, model.out.weight, model.out.bias)
    norm, hidden, _, last = model.mlp
    mlp = last(F.gelu(hidden(F.layer_norm(attended, (DIM,), norm.weight, norm.bias))))
    features = F.normalize(attended + mlp, dim=-1).transpose(0, 1)  # [B, C, D]
    every = torch.einsum("bcd,kd->bck", features, texts)
    logits = model.log_scale.exp() * every.diagonal(dim1=1, dim2=2) + model.bias
    for c in range(labels):  # a running mean of the features of known positives
        mean = features[known[:, c] == 1, c].detach().sum(dim=0)
        if args.pseudo and mean.any():
            moved = 0.9 * model.visual[c] + 0.1 * mean / mean.norm()
            model.visual[c] = moved / moved.norm()
    e, contrast, modalities = log_odds, 0, [model.visual, texts] if args.pseudo else [texts]
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
    terms = {"known": trm_ml.asymmetric_loss(logits, known),
             "pseudo": args.pseudo * trm_ml.asymmetric_loss(logits, pseudo),
             "contrastive": args.contrastive * (contrast * present).sum() / present.sum(),
             "distillation": args.distillation * (features - looked_at).abs().sum(-1).mean()}
    return {"loss": sum(terms.values()), **terms}, e


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
        x, known = unit(6, 9, DIM), random_targets(6, len(LABELS), step)
        log_odds = 3 * torch.randn(known.shape)
        terms, estimates = trm_ml.losses_of(model, x, known, log_odds, args)
        expected, expected_estimates = straightforward_losses(plain, x, known, log_odds, args)
        if args.pseudo:
            torch.testing.assert_close(estimates, expected_estimates, rtol=1e-3, atol=1e-3)
            pseudo = model.pseudo_labels(estimates, known)
            assert (pseudo == 1).any() and (pseudo == -1).any()
        else:
            assert estimates is None and expected.pop("pseudo") == 0
        assert {name: value.item() for name, value in terms.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-3)
        for optimizer, losses in zip(optimizers, (terms, expected)):
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
        for name, parameter in model.named_parameters():
            assert parameter.grad.any(), f"{name} does not learn"
        assert all(parameter.grad is None for parameter in model.clip.parameters())
    model.sure_present.fill_(torch.inf)  # where nothing is present there is no contrast
    terms, _ = trm_ml.losses_of(model, x, known.clamp(max=0), log_odds, args)
    assert terms["contrastive"] == 0


def test_where_no_label_is_known_absent_all_others_are_at_first(clip):
    args, _ = trm_ml.arguments(["--single-positive", "--output", "unused"])
    known = random_targets(6, len(LABELS)).clamp(min=0)
    run = trm_ml.make_run(0, clip, LABELS, known, args)
    assert torch.equal(run.model.pseudo_labels(torch.randn(known.shape), known), known - 1)


def test_pseudo_labels_are_judged_by_the_hidden_truth():
    pseudo, hidden = random_targets(40, 5), random_targets(40, 5, seed=1)
    entries = list(zip(pseudo.flatten().tolist(), hidden.flatten().tolist()))
    hits, misses = entries.count((1, 1)), entries.count((1, -1))
    positives = sum(truth == 1 for _, truth in entries)
    assert trm_ml.quality_of(pseudo, hidden) == pytest.approx({
        "pseudo_precision": hits / (hits + misses), "pseudo_recall": hits / positives})
    assert trm_ml.quality_of(pseudo.clamp(max=0), hidden) == {}
    assert trm_ml.quality_of(pseudo, 0 * hidden) == {}


def test_images_are_squeezed_and_in_training_flipped_changed_and_cut():
    args = copy.copy(ARGS)
    args.image_size, args.augment = 48, "yes"
    training, test = trm_ml.transforms_of(args)
    resize = transforms.Resize((48, 48), transforms.InterpolationMode.BICUBIC)
    to_tensor = clip_model.preprocess_transform(64).transforms[3:]
    augmented = transforms.Compose([
        resize, transforms.RandomHorizontalFlip(0.5), transforms.RandAugment(2, 9), *to_tensor,
        transforms.RandomErasing(0.5, (0.25, 0.25), (1, 1), 0)])
    photo = world.scene("benchmark", 7, 0).resize((160, 100))
    assert torch.equal(test(photo), transforms.Compose([resize, *to_tensor])(photo))
    for seed in range(40):
        pixels = []
        for transform in (training, augmented):
            torch.manual_seed(seed)
            pixels.append(transform(photo))
        assert torch.equal(*pixels)
    args.augment = "no"
    assert len(set(trm_ml.transforms_of(args))) == 1


# ---- the program, on images of one's own

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """24 training and 16 test scenes as a folder; of training image 5 nothing is known."""
    root = trees.scenes(tmp_path_factory.mktemp("own"), train=(24, range(10)),
                        test=(16, range(10)))
    lines = (root / "train.jsonl").read_text().splitlines()
    lines[5] = '{"image": "train/5.png", "present": []}'
    (root / "train.jsonl").write_text("\n".join(lines))
    (root / "labels.txt").write_text("\n".join(world.LABELS[:10]))
    return root


def flags(root, output, *more):
    return ["--data", "folder", "--root", str(root), "--clip", "toy-RN", "--image-size", "64",
            "--augment", "no", "--workers", "0", "--batch-size", "8", "--epochs", "2",
            "--lr", "1e-3", "--device", "cpu", "--quiet", "--output", str(output), *more]


@pytest.fixture(scope="module")
def sweep(own, tmp_path_factory):
    """A sweep's folder and what it printed."""
    output, printed = tmp_path_factory.mktemp("trm_ml") / "sweep", io.StringIO()
    with contextlib.redirect_stdout(printed):
        trm_ml.main(flags(own, output, "--partial", "0.2", "0.6"))
    return output, printed.getvalue()


@torch.no_grad()
def scores_of(path, images, clip, dtype=torch.float32):
    """Logits and saliency of images by the model of a checkpoint, by a new one if path is None, and
    the embeddings they are of, rounded to dtype."""
    saved = checkpoint(path) if path else {"labels": LABELS, "model": {}}
    model = trm_ml.TRM(copy.deepcopy(clip), saved["labels"])
    model.load_state_dict(saved["model"], strict=False)
    squeezed = [image.resize((64, 64), Image.BICUBIC) for image in images]
    pixels = torch.stack([clip_model.preprocess_transform(64)(image) for image in squeezed])
    x = trm_ml.encode(model.clip, pixels, ARGS).to(dtype).float()
    logits, _, saliency = model(x, model.texts())
    return logits, saliency, x


def test_a_sweeps_files_rows_and_average(sweep, own, clip):
    output, printed = sweep
    *zero_shot, first, second, average = results(output)["rows"]
    assert [row["name"] for row in (first, second, average)] == [
        "TRM-ML, 20% known", "TRM-ML, 60% known", "TRM-ML, average"]
    assert [row["kind"] for row in zero_shot] == ["zero-shot"] * 4
    for metric in average.keys() - {"name", "kind"}:
        assert average[metric] == pytest.approx((first[metric] + second[metric]) / 2)
    heading, line = printed.partition("known labels")[2].splitlines()[:2]
    assert heading.split() == ["20%", "60%", "average"]
    assert line.split() == ["TRM-ML"] + [f"{100 * row['mAP']:.1f}" for row in
                                         (first, second, average)]
    assert results(output / "partial-0.2")["rows"] == [*zero_shot, first]
    assert results(output / "partial-0.6")["rows"] == [*zero_shot, second]
    test = data.load_dataset("folder", own, "test")
    images = [image for image, _ in test]
    logits, _, x = scores_of(output / "partial-0.6/best.pt", images, clip)
    texts = clip_model.zero_shot_embeddings(clip, test.labels)
    for row, scores in ((second, logits), (zero_shot[0], x[:, 0] @ texts.T)):
        expected = metrics.mean_average_precision(scores, test.targets)
        assert row["mAP"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share, pseudo", [(0.4, 0.1), (None, 0.1), (None, 0)])
def test_training_sees_every_image_with_the_entries_drawn_for_it(own, tmp_path, share, pseudo):
    """The same as training on a folder that states only these entries, without the missing one."""
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own/train/3.png").unlink()
    known = ["--single-positive"] if share is None else ["--partial", str(share)]
    more = ["--seed", "1", "--pseudo", str(pseudo)]
    trm_ml.main(flags(tmp_path / "own", tmp_path / "run", *known, *more))
    entries = drawn(data.load_dataset("folder", own, "train").targets, share)
    if share is None and not pseudo:
        entries[entries == 0] = -1  # nothing estimates them
    lines = []
    for i, row in enumerate(entries):
        if i != 3:
            named = {name: [world.LABELS[c] for c in np.nonzero(row == value)[0]]
                     for name, value in (("present", 1), ("absent", -1))}
            lines.append(json.dumps({"image": f"train/{i}.png", **named}))
    (tmp_path / "own/train.jsonl").write_text("\n".join(lines))
    trm_ml.main(flags(tmp_path / "own", tmp_path / "stated", *more))
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
    known = ["--partial", "0.2", "0.4", "0.6"]
    rows = trm_ml.main(["--resume", "--output", str(output), "--device", "cpu", *known])
    alone = trm_ml.main(flags(own, tmp_path / "alone", "--partial", "0.4"))[-1]
    assert_same_weights(output / "partial-0.4/last.pt", tmp_path / "alone/last.pt")
    zero_shot, first, second = (results(sweep[0])["rows"][part] for part in (slice(4), 4, 5))
    assert rows[:-1] == [*zero_shot, first, {**alone, "name": "TRM-ML, 40% known"}, second]


@pytest.mark.parametrize("known, message", [
    (["--partial", "0.6", "--per-label-context"], "another kind of model"),
    (["--partial", "0.5"], "another share"), (["--single-positive"], "another share")])
def test_resume_as_another_model_is_refused(sweep, tmp_path, known, message):
    shutil.copytree(sweep[0] / "partial-0.6", tmp_path / "run")
    with pytest.raises(data.UserError, match=message):
        trm_ml.main(["--resume", "--output", str(tmp_path / "run"), "--device", "cpu", *known])


def test_a_share_for_a_resumed_run_with_single_positives_is_refused(sweep, tmp_path, capsys):
    saved = trees.checkpoint(sweep[0] / "partial-0.6/last.pt")
    saved["args"]["single_positive"] = True
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(SystemExit):
        trm_ml.arguments(["--resume", "--output", str(tmp_path), "--partial", "0.6"])
    assert "--partial: the run to resume" in capsys.readouterr().err


def test_an_epoch_is_seeded_shuffled_logged_and_calibrates_the_next(own, tmp_path, clip,
                                                                    monkeypatch):
    losses_of, seen, calibrated, steps = trm_ml.losses_of, [], [], []

    def spy(model, x, known, log_odds, args):
        terms, estimates = losses_of(model, x, known, log_odds, args)
        seen.append((x, known, log_odds, terms["loss"].item(), model.context.clone()))
        return terms, estimates

    def calibrate(model, estimates, known, expected_positives):
        calibrated.append((len(seen), known, expected_positives))

    def step(optimizer, *_):
        assert isinstance(optimizer, torch.optim.AdamW)
        steps.append({(round(group["lr"], 12), group["weight_decay"], parameter.ndim > 1)
                      for group in optimizer.param_groups for parameter in group["params"]})

    monkeypatch.setattr(trm_ml, "losses_of", spy)
    monkeypatch.setattr(trm_ml, "ESTIMATED", 16)
    monkeypatch.setattr(trm_ml.TRM, "calibrate", calibrate)
    hook = register_optimizer_step_pre_hook(step)
    trm_ml.main(flags(own, tmp_path, "--partial", "0.5", "1", "--seed", "5", "--epochs", "3"))
    hook.remove()

    train = data.load_dataset("folder", own, "train")
    torch.manual_seed(5)  # each run starts as if it were alone
    context = trm_ml.TRM(clip, train.labels).context
    assert all(torch.equal(seen[i][4], context) for i in range(2))
    known = [torch.from_numpy(drawn(train.targets, share)) for share in (0.5, 1)]
    _, _, x = scores_of(None, [image for image, _ in train], clip, torch.float16)
    prompts = clip_model.zero_shot_embeddings(clip, train.labels)
    log_odds = trm_ml.clip_log_odds(x, prompts, clip.logit_scale.exp())
    lines = trees.lines(tmp_path / "partial-1/log.jsonl")
    for epoch in range(3):
        torch.manual_seed(1_000_003 * 5 + epoch)
        batches, losses = list(DataLoader(range(24), 8, shuffle=True)), []
        for step, rows in enumerate(batches):
            rate = round(1e-3 * (1 + math.cos(math.pi * (epoch + step / 3) / 3)) / 2, 12)
            for i in range(2):
                assert steps.pop(0) == {(rate, 0.01, True), (rate, 0, False)}
                found, targets, found_odds, loss, _ = seen[(3 * epoch + step) * 2 + i]
                torch.testing.assert_close(found, x[rows], rtol=0, atol=1e-3)
                torch.testing.assert_close(found_odds, log_odds[rows], rtol=1e-2, atol=1e-2)
                assert torch.equal(targets, known[i][rows])
            losses.append(loss)
        assert lines[epoch]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
        for i in range(2):
            after, targets, expected_positives = calibrated.pop(0)
            assert after == 6 * (epoch + 1) and expected_positives == 3
            assert torch.equal(targets, known[i][torch.cat(batches)[:16]])
    assert not steps and not calibrated


def test_validation_is_by_known_labels_of_images_held_out(own, tmp_path, clip):
    trm_ml.main(flags(own, tmp_path, "--partial", "0.6", "--val-fraction", "0.5"))
    lines = trees.lines(tmp_path / "log.jsonl")
    assert ["pseudo_recall" in line for line in lines] == [False, True]
    train = data.load_dataset("folder", own, "train")
    train.full_targets = torch.from_numpy(drawn(train.targets, 0.6))
    held_out = train.hold_out(0.5, None)[1]
    images = [image for image, _ in held_out]
    logits = scores_of(tmp_path / "last.pt", images, clip, torch.float16)[0]
    expected = metrics.mean_average_precision(logits, held_out.targets)
    assert lines[-1]["val_mAP"] == pytest.approx(expected, abs=1e-6)


def test_predictions_and_their_maps(sweep, tmp_path, clip, monkeypatch):
    photo = world.scene("benchmark", 7, 0).resize((160, 100))  # is squeezed, not cropped
    path = tmp_path / "0.png"
    photo.save(path)
    best, written = sweep[0] / "partial-0.6/best.pt", []
    monkeypatch.setattr(metrics, "write_prediction", lambda *prediction, crop: written.append(
        (*prediction, crop)))
    trm_ml.main(["--predict", str(path), "--checkpoint", str(best), "--device", "cpu"])
    (name, shown, scores, maps, labels, _, crop), = written
    assert (name, shown.size, labels, crop) == (path, photo.size, world.LABELS[:10], 0)
    logits, saliency, _ = scores_of(best, [photo], clip)
    torch.testing.assert_close(scores, logits[0].sigmoid(), rtol=0, atol=1e-4)
    for score, looked, looked_at in zip(scores, maps, saliency[0, :, 1:]):
        # as bright as likely, where it looked most
        torch.testing.assert_close(looked, score * looked_at / looked_at.max(),
                                   rtol=1e-3, atol=1e-4)
