"""mkt.py: scores, losses, model, steps of training, augmentation, the program, predictions."""
import copy
import functools
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import clip_model
import data
import metrics
import mkt
import trees
from toy import world
from training import ranking_loss_of_all_pairs  # test_bench.py compares it with a loop
from trees import assert_same_weights, checkpoint, predictions, random_targets, results

PROMPT = "There is a {} in the scene"
LABELS = ["star", "boat", "moon", "red key", "fish", "owl"]
SEEN = [0, 2, 3, 5]


@pytest.fixture(scope="module")
def toy():
    return clip_model.load("toy-ViT")


def small_clip():
    """A random ViT with 9 patches whose norms and biases are not at their trivial start."""
    torch.manual_seed(0)
    tokenizer = clip_model.load("toy-ViT")[0].tokenizer
    clip = clip_model.CLIP(64, 24, 4, 64, 8, 77, len(tokenizer), 64, 1, 2)
    for parameter in clip.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    clip.tokenizer = tokenizer
    return clip.double().eval()


# ---- scores and losses

def straightforward_scores(local, global_, z, topk, streams="both"):
    rows = []
    for patches, whole in zip(local, global_):
        a = torch.stack([(patches @ label).sort().values[-topk:].mean() for label in z])
        g = torch.stack([whole @ label for label in z])
        a, g = a / a.square().sum().sqrt(), g / g.square().sum().sqrt()
        rows.append({"both": (a + g) / 2, "global": g, "local": a}[streams])
    return torch.stack(rows)


@pytest.mark.parametrize("streams", ["both", "global", "local"])
def test_two_stream_scores_equal_a_loop(streams):
    torch.manual_seed(0)
    local, global_, z = torch.randn(3, 7, 5), torch.randn(3, 5), torch.randn(4, 5)
    scores = mkt.two_stream_scores(local, global_, z, 3, streams)
    torch.testing.assert_close(scores, straightforward_scores(local, global_, z, 3, streams))


@pytest.mark.parametrize("scale", [0.01, 1, 5])
def test_ranking_loss_equals_all_pairs_with_gradient(scale):
    torch.manual_seed(1)
    scores = (scale * torch.randn(9, 13, dtype=torch.float64)).requires_grad_()
    targets = random_targets(9, 13)
    targets[0], targets[1], targets[2] = 0, -1, 1  # all unknown, none present, none absent
    losses = mkt.ranking_loss(scores, targets), ranking_loss_of_all_pairs(scores, targets)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


# ---- model

@pytest.mark.parametrize("prompt", [PROMPT, "{} here", "one more photo of the {}"])
def test_prompts_are_sentences_whose_words_around_the_label_are_learned(prompt, toy, monkeypatch):
    if prompt != PROMPT:
        monkeypatch.setattr(mkt, "PROMPT", prompt)
    model = mkt.MKT(copy.deepcopy(toy[0]), topk=4)
    clip, labels = model.clip, ["star", "a boat in the moon", "zyxwvut"]
    prompts = model.prompts(labels)
    tokens = clip.tokenize([prompt.format(label) for label in labels])
    length = prompts[0].shape[1]
    assert torch.equal(prompts[0], tokens[:, :length]) and not tokens[:, length:].any()
    z = model.label_embeddings(prompts)
    torch.testing.assert_close(z, clip.encode_text(tokens), rtol=1e-4, atol=1e-5)

    before, after = (1 + len(clip.tokenizer.encode(part)) for part in prompt.split("{}"))
    assert len(model.context) == before + after  # with start and end of text
    model.context.data += torch.randn_like(model.context)
    for label, embedding in zip(labels, model.label_embeddings(prompts)):
        name = clip.token_embedding(torch.tensor(clip.tokenizer.encode(label)))
        sentence = torch.cat([model.context[:before], name, model.context[before:]])
        expected = clip.encode_prompts(sentence[None], torch.tensor([len(sentence) - 1]))[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(clip_model.ClipError, match="long long"):
        model.prompts(["star", "long " * 80])


def test_chunks_of_labels_that_are_recomputed_change_nothing(toy, monkeypatch):
    model = mkt.MKT(copy.deepcopy(toy[0]), topk=4)
    prompts = model.prompts([f"old {label}" for label in world.LABELS[:10]])
    encode_prompts, encoded = model.clip.encode_prompts, []

    def encode(x, ends):
        encoded.append(len(x))
        return encode_prompts(x, ends)

    monkeypatch.setattr(model.clip, "encode_prompts", encode)
    whole, chunked = model.label_embeddings(prompts), model.label_embeddings(prompts, chunk=3)
    torch.testing.assert_close(chunked, whole)
    gradients = [torch.autograd.grad(z.square().sum(), model.context)[0] for z in (whole, chunked)]
    assert gradients[0].abs().amax(dim=1).min() > 0  # every learned embedding matters
    scale = gradients[0].abs().max()  # sums of float32 in another order
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=0, atol=1e-5)
    assert sorted(encoded) == [1, 1, 3, 3, 3, 3, 3, 3, 10]  # the whole is not recomputed

    encoded.clear()
    monkeypatch.setattr(model.clip, "encode_prompts",
                        lambda x, _: encoded.append(len(x)) or x[:, 0])
    for count in (1024, 1025):
        model.label_embeddings([x[:1].expand(count, *x.shape[1:]) for x in prompts])
    assert encoded == [1024, 1024, 1]


# ---- steps of training

def test_learning_rate_follows_the_formula():
    rate = functools.partial(mkt.learning_rate, peak=1e-3, minimum=1e-6, epochs=20,
                             warmup_epochs=2)
    assert rate(0) == 0 and rate(1) == pytest.approx(5e-4) and rate(2) == pytest.approx(1e-3)
    assert rate(11) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2) and rate(20) == pytest.approx(1e-6)
    assert rate(6.5) == pytest.approx(1e-6 + (1e-3 - 1e-6) * math.cos(math.pi / 8) ** 2)
    assert mkt.learning_rate(0, 1e-3, 1e-8, 4, 0) == 1e-3  # stage 2


def prepare(clip, images, transform, folder, *options):
    """-> a model, a dataset of six labels, two of them unseen, arguments: stages of 3 epochs."""
    args, _ = mkt.arguments(["--topk", "2", "--epochs", "3", "--prompt-epochs", "3", "--device",
                             "cpu", "--quiet", "--output", str(folder), *options])
    dataset = data.MultiLabelDataset(LABELS, random_targets(len(images), 6), images, unseen=[1, 4],
                                     transform=transform)
    return mkt.MKT(clip, args.topk), dataset, args


def train_on_nothing(number, folder, *options):
    """8 images in batches of 3 for 3 epochs, in stage 2 in batches of 5 for 2 epochs, and a loss
    that is always 0 -> the stage, its parameters' values before and after, every batch: of each of
    its images the number and a random draw."""
    model, dataset, args = prepare(
        small_clip(), torch.arange(8.0), lambda x: torch.stack([x, torch.rand(())]), folder,
        "--warmup-epochs", "0.5", "--batch-size", "3", "--prompt-batch-size", "5",
        "--prompt-epochs", "2", *options)
    stage = mkt.make_stages(model, dataset, args)[number - 1]
    parameters = [parameter for layer in stage.layers for parameter in layer]
    before, batches = [parameter.detach().clone() for parameter in parameters], []

    def nothing(model, images, targets, labels, args):
        assert torch.equal(targets, dataset.targets[images[:, 0].long()][:, SEEN])
        batches.append([tuple(image) for image in images.tolist()])
        return {"nothing": 0 * sum(parameter.sum() for parameter in parameters)}

    mkt.train(model, stage._replace(losses=nothing), dataset, None, {"method": "mkt", "log": []},
              args)
    return stage, before, parameters, batches


def test_every_epoch_shuffles_and_augments_anew(tmp_path):
    epochs = []
    for number, seed in ((1, 0), (2, 0), (1, 1), (1, 0)):
        *_, batches = train_on_nothing(number, tmp_path, "--seed", str(seed))
        sizes = 3 * [3, 3, 2] if number == 1 else 2 * [5, 3]
        assert [len(batch) for batch in batches] == sizes
        images = sum(batches, [])
        epochs += [images[i:i + 8] for i in range(0, len(images), 8)]
    assert epochs[8:] == epochs[:3]  # the same seed
    for epoch in epochs:
        assert sorted(i for i, _ in epoch) == [*range(8)]  # every image once
    orders = {tuple(i for i, _ in epoch) for epoch in epochs}
    draws = {draw for epoch in epochs for _, draw in epoch}
    assert len(orders) == 8 and len(draws) == 8 * 8


@pytest.mark.parametrize("number, scales, epochs, warmup, minimum", [
    (1, [1, 0.65, 0.65 ** 2], 3, 0.5, 1e-6), (2, [1], 2, 0, 1e-8)])
def test_rates_and_weight_decay_in_closed_form(number, scales, epochs, warmup, minimum, tmp_path):
    """Where the gradient is 0 AdamW multiplies a matrix with 1 - rate * 0.05 and does no more."""
    stage, before, after, batches = train_on_nothing(number, tmp_path, "--lr", "1e-4")
    steps = len(batches) // epochs
    for value, parameter in zip(before, after):
        layer = [any(parameter is other for other in layer) for layer in stage.layers].index(True)
        factor = 1
        for step in range(len(batches)):
            epoch = step / steps
            angle = math.pi * (epoch - warmup) / (epochs - warmup)
            rate = minimum + (1e-4 - minimum) * (1 + math.cos(angle)) / 2
            if epoch < warmup:
                rate = 1e-4 * epoch / warmup
            if parameter.ndim > 1:
                factor *= 1 - 0.05 * rate * scales[layer]
        torch.testing.assert_close(parameter.detach(), factor * value, rtol=1e-13, atol=0)
    groups = [(group["scale"], group["weight_decay"], len(group["params"]))
              for group in mkt.make_optimizer(stage.layers, 1e-3).param_groups]
    if number == 2:
        assert groups == [(1, 0.05, 1), (1, 0, 0)]
    else:  # ln_post and the projection, the last block, the one below it
        assert groups == [(1, 0.05, 1), (1, 0, 2), (0.65, 0.05, 4), (0.65, 0, 8),
                          (0.65 ** 2, 0.05, 4), (0.65 ** 2, 0, 8)]


def seen_texts(clip, context):
    """Embeddings of the seen labels' prompts, read through all 77 tokens; start, end and the six
    words are embedded by the rows of context."""
    tokens = clip.tokenize([PROMPT.format(LABELS[c]) for c in SEEN])
    words = [tokens[0, 0], *clip.tokenizer.encode("there is a in the scene"), tokens.max()]
    x = clip.token_embedding(tokens)
    for word, row in zip(words, context):
        x = torch.where((tokens == word)[..., None], row, x)
    x = x + clip.positional_embedding
    for block in clip.transformer.resblocks:
        x = block(x, causal=True)
    x = clip.ln_final(x) @ clip.text_projection
    return x[torch.arange(4), tokens.argmax(dim=1)]


@pytest.mark.parametrize("stage, streams", [(1, "both"), (2, "both"), (1, "local"), (2, "global")])
def test_steps_of_training_equal_a_straightforward_version(stage, streams, tmp_path):
    """Three epochs of one batch: full student and teacher, all pairs of labels, 77 tokens."""
    clip = small_clip()
    pixels = np.random.RandomState(0).randint(0, 256, (6, 24, 24, 3)).astype(np.uint8)
    transform = transforms.Compose([transforms.ToTensor(), lambda x: x.to(clip.dtype)])
    model, dataset, args = prepare(
        copy.deepcopy(clip), tuple(map(Image.fromarray, pixels)), transform, tmp_path,
        "--warmup-epochs", "0.5", "--distillation", "0.3", "--streams", streams)
    start, state = copy.deepcopy(model.state_dict()), {"method": "mkt", "log": []}
    mkt.train(model, mkt.make_stages(model, dataset, args)[stage - 1], dataset, None, state, args)

    images, targets = torch.stack([image for image, _ in dataset]), dataset.targets[:, SEEN]
    student, teacher = copy.deepcopy(clip).visual, clip.visual
    context = start["context"].clone().requires_grad_()
    if stage == 1:
        *_, block, last = student.transformer.resblocks
        trained = {p: 0.65 ** 2 for p in block.parameters()}
        trained |= {p: 0.65 for p in last.parameters()}
        trained |= {p: 1 for p in (*student.ln_post.parameters(), student.proj)}
        found = [*model.blocks.parameters(), *model.ln_post.parameters(), model.proj]
    else:
        trained, found = {context: 1}, [model.context]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW([
        {"params": [p], "weight_decay": 0.05 if p.ndim > 1 else 0} for p in trained])
    for epoch, line in enumerate(state["log"]):
        warmup = 0.5 if stage == 1 else 0
        rate = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (3 - warmup)))
        if epoch < warmup:
            rate = epoch / warmup
        for group, scale in zip(optimizer.param_groups, trained.values()):
            group["lr"] = 1e-3 * rate * scale
        global_, local = student.dense(images)
        scores = straightforward_scores(local, global_, seen_texts(clip, context), 2, streams)
        loss = ranking = ranking_loss_of_all_pairs(scores, targets)
        if stage == 1:
            loss = ranking + 0.3 * (global_ - teacher(images).detach()).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert line["ranking"] == pytest.approx(ranking.item(), rel=1e-5)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for mine, plain, old in zip(found, trained, before):
        largest = plain.grad.abs().max()
        assert largest > 0
        torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=1e-3 * largest.item())
        assert (mine - plain).abs().mean() < 1e-3 * (plain - old).abs().mean()
    changed = {name for name, value in model.state_dict().items()
               if not torch.equal(value, start[name])}
    assert changed == ({"context"} if stage == 2 else model.trained().keys() - {"context"})


# ---- pixels

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIPS_OWN = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("preprocess, size, scale", [
    ("clip", 224, CLIPS_OWN), ("authors", 256, IMAGENET)])
def test_pixels_are_clips_own_or_the_authors(preprocess, size, scale):
    bicubic = transforms.InterpolationMode.BICUBIC
    to_tensor = [transforms.ToTensor(), transforms.Normalize(*scale)]
    expected = transforms.Compose([transforms.Resize(size, bicubic), transforms.CenterCrop(224),
                                   *to_tensor])
    augmented = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.08, 1), (3 / 4, 4 / 3), bicubic),
        transforms.RandomHorizontalFlip(0.5), mkt.rand_augment, *to_tensor])
    photo = world.scene("benchmark", 2, 7).resize((96, 80))
    for augment, of_training in (("no", expected), ("yes", augmented)):
        args, _ = mkt.arguments(["--preprocess", preprocess, "--augment", augment])
        train, test = mkt.transforms_of(clip_model.preprocess_transform(224), args)
        assert torch.equal(test(photo), expected(photo))
        for seed in range(4):
            pixels = []
            for transform in (train, of_training, mkt.pixels_of(train)):
                torch.manual_seed(seed)
                pixels.append(transform(photo))
            assert torch.equal(*pixels[:2])
            assert pixels[2].dtype == torch.uint8  # what the workers pass
            assert torch.equal(mkt.normalized(pixels[2][None], preprocess)[0], pixels[0])


def resampled(pixels, a, b, c, d, e, f):
    """Pixels [h, w, 3] at (a x + b y + c, d x + e y + f) of pixel centres (x, y), bicubic (Keys,
    1981, with -1); the corners that come from outside are of ImageNet's mean colour."""
    height, width, _ = pixels.shape
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)

    def weight(t):
        t = np.abs(t)
        return np.where(t < 1, t ** 3 - 2 * t ** 2 + 1, -t ** 3 + 5 * t ** 2 - 8 * t + 4)

    x, y, total = x - 0.5, y - 0.5, 0
    for i in range(-1, 3):
        for j in range(-1, 3):
            row, column = np.floor(y).astype(int) + i, np.floor(x).astype(int) + j
            near = pixels[row.clip(0, height - 1), column.clip(0, width - 1)]
            total = total + (weight(y - row) * weight(x - column))[..., None] * near
    return np.where(outside[..., None], (124, 116, 104), total)


def rotated(pixels, degrees):
    """Counter-clockwise, around the centre."""
    (height, width, _), angle = pixels.shape, math.radians(degrees)
    x, y, cos, sin = width / 2, height / 2, math.cos(angle), math.sin(angle)
    return resampled(pixels, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def equalized(channel):
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (counts.sum() - counts[channel.max()]) // 255
    return ((step // 2 + counts.cumsum() - counts) // step)[channel]


def smooth(pixels):
    kernel, mean = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13, pixels.copy()  # borders stay
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(0, 1))
    mean[1:-1, 1:-1] = (windows * kernel).sum(axis=(-2, -1))
    return mean


def away_from(base, pixels, amount):
    return base + (1 + 0.9 * amount) * (pixels - base)


def per_channel(function, pixels):
    return np.stack([function(pixels[..., i]) for i in range(3)], axis=-1)


GREY = np.array([0.299, 0.587, 0.114])
# (pixels float64 [h, w, 3], amount) -> pixels; beside each the name that timm has for it
READINGS = {
    "auto-contrast": ("AutoContrast", lambda x, amount: per_channel(
        lambda x: (x - x.min()) * 255 / (x.max() - x.min()), x)),
    "equalize": ("Equalize", lambda x, amount: per_channel(equalized, x.astype(int))),
    "invert": ("Invert", lambda x, amount: 255 - x),
    # a bit stays at 1: none, as timm has it, is what newer versions of Pillow refuse
    "posterize": ("PosterizeIncreasing", lambda x, amount: x // (n := 2 ** min(
        7, 4 + math.floor(4 * abs(amount)))) * n),
    "solarize": ("SolarizeIncreasing", lambda x, amount: np.where(
        x < 256 - math.floor(256 * abs(amount)), x, 255 - x)),
    "solarize-add": ("SolarizeAdd", lambda x, amount: x + np.where(
        x < 128, math.floor(110 * abs(amount)), 0)),
    "rotate": ("Rotate", lambda x, amount: rotated(x, 30 * amount)),
    "color": ("ColorIncreasing", lambda x, amount: away_from((x @ GREY)[..., None], x, amount)),
    "contrast": ("ContrastIncreasing", lambda x, amount: away_from(
        round((x @ GREY).mean()), x, amount)),
    "brightness": ("BrightnessIncreasing", lambda x, amount: away_from(0, x, amount)),
    "sharpness": ("SharpnessIncreasing", lambda x, amount: away_from(smooth(x), x, amount)),
    "shear x": ("ShearX", lambda x, amount: resampled(x, 1, 0.3 * amount, 0, 0, 1, 0)),
    "shear y": ("ShearY", lambda x, amount: resampled(x, 1, 0, 0, 0.3 * amount, 1, 0)),
    "translate x": ("TranslateXRel", lambda x, amount: resampled(
        x, 1, 0, 0.45 * amount * x.shape[1], 0, 1, 0)),
    "translate y": ("TranslateYRel", lambda x, amount: resampled(
        x, 1, 0, 0, 0, 1, 0.45 * amount * x.shape[0]))}
AMOUNTS = [-1, -0.9, -0.37, 0.0, 0.2, 0.85, 1]


def noise():
    pixels = np.random.RandomState(0).randint(20, 220, (40, 50, 3))
    pixels[..., 1] = pixels[..., 1] // 2
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("name", READINGS)
def test_a_change_of_rand_augment_equals_its_formula(name):
    for amount in AMOUNTS:
        found = np.asarray(mkt.AUGMENTATIONS[name](Image.fromarray(noise()), amount), float)
        expected = READINGS[name][1](noise().astype(float), amount).clip(0, 255)
        # Pillow cuts off or rounds, here and there an intermediate result too
        assert np.abs(found - expected).max() < 1.5, amount


@pytest.mark.parametrize("name", READINGS)
def test_a_change_of_rand_augment_equals_timms(name, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    theirs, image = READINGS[name][0], Image.fromarray(noise())
    for amount in AMOUNTS[1:-1]:
        # they draw the sign where they make an argument of the amount
        monkeypatch.setattr(timm.random, "random", lambda: float(amount < 0))
        to_arguments = timm.LEVEL_TO_ARG[theirs] or (lambda level, _: ())
        expected = timm.NAME_TO_OP[theirs](
            image, *to_arguments(10 * abs(amount), {}), fillcolor=(124, 116, 104),
            resample=Image.Resampling.BICUBIC)
        assert mkt.AUGMENTATIONS[name](image, amount) == expected, amount


def test_rand_augment_draws_what_the_authors_does(monkeypatch):
    """Twice a change with probability 1/2, of N(9, 0.5) tenths and either sign."""
    assert mkt.AUGMENTATIONS.keys() == READINGS.keys()
    monkeypatch.setattr(mkt, "AUGMENTATIONS", {
        name: lambda drawn, amount, name=name: [*drawn, (name, amount)] for name in READINGS})
    torch.manual_seed(0)
    images = [mkt.rand_augment([]) for _ in range(5000)]
    share = [count / 5000 for _, count in sorted(Counter(map(len, images)).items())]
    assert share == pytest.approx([1 / 4, 1 / 2, 1 / 4], abs=0.03)
    drawn = sum(images, [])
    times = Counter(name for name, _ in drawn)
    assert [times[name] / len(drawn) for name in READINGS] == pytest.approx(
        [1 / 15] * 15, abs=0.015)
    amounts = torch.tensor([amount for _, amount in drawn])
    assert (amounts > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    size = amounts.abs()
    assert size.max() == 1  # what is drawn beyond is cut off
    assert (size == 1).float().mean() == pytest.approx(0.0228, abs=0.008)
    assert size.median() == pytest.approx(0.9, abs=0.003)
    assert (size < 0.85).float().mean() == pytest.approx(0.1587, abs=0.02)


# ---- the command line

# what the authors' code has; where the toy world wants it otherwise, that too
DEFAULTS = {
    "clip": ["ViT-B/16", "toy-ViT"], "topk": [16, 4], "streams": ["both"], "preprocess": ["clip"],
    "epochs": [20, 4], "prompt_epochs": [4, 1], "batch_size": [64], "prompt_batch_size": [512],
    "lr": [1e-3], "warmup_epochs": [2, 1], "distillation": [1.0, 0.1], "augment": ["yes", "no"],
    "val_fraction": [0.0], "compile": [False], "resume": [False], "precision": ["fp32"],
    "seed": [0], "workers": [min(8, os.cpu_count()), 0],
    "output": ["runs/mkt-coco", "runs/mkt-toy"]}


def test_defaults_are_the_authors_or_the_toy_worlds():
    for column, name in enumerate(["coco", "toy"]):
        args, saved = mkt.arguments(["--data", name])
        assert saved is None
        for option, values in DEFAULTS.items():
            assert getattr(args, option) == values[min(column, len(values) - 1)], option
    assert mkt.arguments([])[0].data == "toy"
    assert mkt.arguments(["--epochs", "9"])[0].epochs == 9  # what is typed wins
    assert mkt.arguments(["--predict", "a.jpg", "--labels", "owl"])[0].clip == "ViT-B/16"


@pytest.mark.parametrize("command, message", [
    ("--predict PHOTO --clip toy-ViT", "at least two"),
    ("--predict PHOTO --clip toy-ViT --labels owl", "at least two"),
    ("--predict PHOTO --clip toy-ViT --labels owl,cat,Owl", "'owl' and 'Owl'"),
    ("--predict PHOTO --labels owl,cat --lr 1", "--lr has no effect with --predict"),
    ("--predict PHOTO --labels owl,cat --topk 3", "--topk"),
    ("--eval best.pt --prompt-epochs 1", "--prompt-epochs has no effect with --eval"),
    ("--labels owl,cat", "--labels has no effect in training"),
    ("--epochs 0 --prompt-epochs 0", "nothing to train"),
    ("--val-fraction 1", "below 1"),
    ("--data folder --root FOLDER --clip toy-RN", "ResNet"),
    ("--data folder --root FOLDER --clip toy-ViT --topk 65", "1..64"),
])
def test_what_has_no_effect_or_no_meaning_is_refused(command, message, scenes, tmp_path, capsys,
                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"PHOTO": str(scenes / "test/0.png"), "FOLDER": str(scenes)}
    command = [names.get(word, word) for word in command.split()]
    with pytest.raises((data.UserError, clip_model.ClipError, SystemExit)) as error:
        mkt.main([*command, "--device", "cpu"])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_only_torchrun_starts_several_processes(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(mkt, "WORLD", 2)
    with pytest.raises(data.UserError, match="torchrun"):
        mkt.main([*quick, "--output", str(tmp_path)])


def test_no_image_with_a_present_and_an_absent_label_is_nothing_to_rank(tmp_path):
    lines = ['{"image": "0.png", "present": ["dog"]}', '{"image": "1.png", "absent": ["dog"]}',
             '{"image": "2.png", "present": ["cat"]}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    trees.save_images(tmp_path / f"{i}.png" for i in range(3))
    args, _ = mkt.arguments(["--data", "folder", "--root", str(tmp_path), "--output", "unused"])
    with pytest.raises(data.UserError, match="no training image has both"):
        mkt.load_training(args)


def test_images_that_show_no_seen_label_are_left_out(tmp_path):
    trees.folder(tmp_path)
    (tmp_path / "unseen.txt").write_text("ice cream")
    args, _ = mkt.arguments(["--data", "folder", "--root", str(tmp_path)])
    assert trees.numbers(mkt.load_training(args)) == [0, 1]
    (tmp_path / "train.jsonl").write_text('{"image": "1.png", "present": ["dog", "ice cream"]}')
    with pytest.raises(data.UserError, match="nothing to rank"):
        mkt.load_training(args)


# ---- the program

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """20 training and 15 test scenes of the toy world as a folder of one's own images."""
    root = trees.scenes(tmp_path_factory.mktemp("scenes"), train=(20, tuple(world.SEEN)),
                        test=(15, None))
    (root / "labels.txt").write_text("\n".join(world.LABELS))
    (root / "unseen.txt").write_text("\n".join(world.LABELS[c] for c in world.UNSEEN))
    return root


@pytest.fixture(scope="module")
def quick(scenes):
    return ["--data", "folder", "--root", str(scenes), "--clip", "toy-ViT", "--topk", "4",
            "--epochs", "2", "--warmup-epochs", "0.5", "--prompt-epochs", "2", "--batch-size", "4",
            "--prompt-batch-size", "8", "--workers", "0", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):
    """The folder of an uninterrupted run, with augmentation."""
    output = tmp_path_factory.mktemp("mkt") / "run"
    mkt.main([*quick, "--output", str(output)])
    return output


def trained_model(trained, clip):
    model = mkt.MKT(copy.deepcopy(clip), topk=4)
    model.load_state_dict(checkpoint(trained / "best.pt")["model"], strict=False)
    return model


def unit(x):
    return F.normalize(x, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("preprocess", ["clip", "authors"])
def test_the_rows_are_what_the_pieces_give(preprocess, trained, scenes, toy, tmp_path):
    """Whatever MKT's pixels are, those of zero-shot CLIP are its own."""
    rows = mkt.main(["--eval", str(trained / "best.pt"), "--preprocess", preprocess, "--device",
                     "cpu", "--output", str(tmp_path)])
    assert rows == results(trained)["rows"] or preprocess == "authors"
    assert [row["kind"] for row in rows] == ["zero-shot"] * 4 + ["ablation", "method"]
    clip, clips_own = toy
    model = trained_model(trained, clip)
    args, _ = mkt.arguments(["--preprocess", preprocess])
    _, transform = mkt.transforms_of(clips_own, args)
    test = data.load_dataset("folder", scenes, "test")
    texts = unit(clip.encode_text(clip.tokenize(
        [f"a photo of a{'n' * (label[0] in 'aeiou')} {label}." for label in test.labels])))
    global_, local = clip.encode_image_dense(torch.stack([clips_own(image) for image, _ in test]))
    cosines = unit(global_) @ texts.T, (unit(local) @ texts.T).amax(dim=1)
    expected = {"zero-shot, global": cosines[0],
                "zero-shot, global + local": (cosines[0] + cosines[1]) / 2}
    global_, local = model(torch.stack([transform(image) for image, _ in test]))
    contexts = {"MKT": model.context, "MKT without prompt tuning": mkt.MKT(clip, topk=4).context}
    for name, context in contexts.items():
        z = model.label_embeddings(model.prompts(test.labels), context)[test.unseen]
        expected[name] = torch.zeros(15, len(test.labels))
        expected[name][:, test.unseen] = straightforward_scores(local, global_, z, 4)
    found = {row["name"]: row["zsl_mAP"] for row in rows}
    for name, scores in expected.items():
        mAP = metrics.mean_average_precision(scores[:, test.unseen], test.targets[:, test.unseen])
        assert found[name] == pytest.approx(mAP, abs=1e-4), name


def test_two_processes_end_where_one_does(quick, tmp_path):
    """Resumed after an epoch by one process or by two, with augmentation, a last batch of a single
    image, held-out images, and an odd number of test images. The first epoch is shared: it starts
    where the distillation is |0|, whose gradient's sign is that of rounding."""
    options = [*quick, "--prompt-epochs", "1", "--limit", "17", "--val-fraction", "0.25"]
    mkt.main([*options, "--epochs", "1", "--prompt-epochs", "0", "--output",
              str(tmp_path / "one")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    options += ["--epochs", "2", "--resume"]
    mkt.main([*options, "--output", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "mkt.py", *options, "--output", str(tmp_path / "two")]
    process = subprocess.run(command, cwd=trees.ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("training: 17 images") == 1  # rank 0 alone prints
    one, two = (checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert [line["epoch"] for line in two["log"]] == [1, 2, 1]
    for line, other in zip(one["log"], two["log"]):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert line["val_mAP"] == pytest.approx(other["val_mAP"], abs=0.01)
    for name, weights in one["model"].items():
        torch.testing.assert_close(weights, two["model"][name], rtol=0, atol=1e-4)
    rows = [results(tmp_path / name)["rows"] for name in ("one", "two")]
    for row, other in zip(*rows, strict=True):
        assert row["name"] == other["name"]
        # the images in their order: those of zero-shot CLIP are in other batches
        tolerance = 1e-6 if row["kind"] == "zero-shot" else 0.01
        assert row["gzsl_mAP"] == pytest.approx(other["gzsl_mAP"], abs=tolerance)


def test_a_run_stopped_in_either_stage_resumes_to_the_same_numbers(trained, quick, tmp_path,
                                                                   monkeypatch):
    resume = ["--resume", "--output", str(tmp_path), "--device", "cpu"]
    trees.run_killed("mkt", "log.jsonl", 2, [*quick, "--output", tmp_path])
    assert len(checkpoint(tmp_path / "last.pt")["log"]) == 1  # epoch 2 of stage 1 is lost
    *zero_shot, row = mkt.main(["--eval", str(tmp_path / "last.pt"), "--device", "cpu"])
    assert len(zero_shot) == 4 and row["name"] == "MKT"  # no prompt has been tuned
    write_file = data.write_file

    def write_or_stop(path, content):
        write_file(path, content)
        if path.endswith("last.pt") and len(content["log"]) == 3:  # epoch 1 of stage 2
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        patch.setattr(data, "write_file", write_or_stop)
        mkt.main(resume)
    assert not (tmp_path / "results.json").exists()
    mkt.main(resume)
    assert results(tmp_path) == results(trained)
    for name in ("last.pt", "best.pt"):
        assert_same_weights(tmp_path / name, trained / name)


def test_the_best_epoch_of_a_stage_is_selected(quick, tmp_path, monkeypatch):
    """By scores of held-out images that are made up: the first epoch of stage 1 is the better one,
    and both of stage 2 are worse than it."""
    made_up, states = iter([0.9, 0.2, 0.3, 0.5]), []
    write_file = data.write_file

    def keep(path, content):
        write_file(path, content)
        if path.endswith("last.pt"):
            states.append(copy.deepcopy(content["model"]))

    monkeypatch.setattr(mkt.metrics, "mean_average_precision", lambda *_: next(made_up, 0.0))
    monkeypatch.setattr(data, "write_file", keep)
    mkt.main([*quick, "--val-fraction", "0.25", "--output", str(tmp_path)])
    first, second, third, fourth = states
    assert not torch.equal(first["proj"], second["proj"])
    assert torch.equal(third["proj"], first["proj"])  # stage 2 starts from the best of stage 1
    best = checkpoint(tmp_path / "best.pt")
    assert [line["val_mAP"] for line in best["log"]] == [0.9, 0.2, 0.3, 0.5]
    assert torch.equal(best["model"]["context"], fourth["context"])


# ---- predictions

def drawn_predictions(monkeypatch, *arguments):
    """What --predict gives to be written: (scores [C], maps [C, L], crop) of every image."""
    found = []

    def keep(path, photo, scores, maps, labels, args, crop):
        found.append((scores, maps, crop))

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "write_prediction", keep)
        mkt.main(["--predict", *map(str, arguments), "--device", "cpu"])
    return found


@torch.no_grad()
def test_predict_scores_labels_never_seen(trained, toy, tmp_path, capsys):
    labels = ["blue star", "submarine", "cactus", "ice cream"]
    model = trained_model(trained, toy[0])
    z = model.label_embeddings(model.prompts(labels))

    def scores_of(photo):
        global_, local = model(toy[1](photo)[None])
        return straightforward_scores(local, global_, z, 4)[0]

    trees.check_predictions(mkt, capsys, tmp_path, labels, scores_of, "--checkpoint",
                            trained / "best.pt", "--labels", ", ".join(labels))
    line, _ = predictions(mkt, capsys, tmp_path / "photos", "--checkpoint", trained / "best.pt",
                          "--top", "60")
    assert sorted(entry["label"] for entry in line["labels"]) == world.LABELS


@torch.no_grad()
@pytest.mark.parametrize("preprocess, crop", [("clip", 1), ("authors", 224 / 256)])
def test_heatmaps_show_what_a_label_has_beyond_the_others(preprocess, crop, trained, scenes, toy,
                                                          monkeypatch):
    photo, labels = scenes / "test/0.png", ["blue star", "owl", "cactus"]
    (_, maps, covered), = drawn_predictions(
        monkeypatch, photo, "--labels", ",".join(labels), "--checkpoint", trained / "best.pt",
        "--preprocess", preprocess)
    assert covered == crop
    model = trained_model(trained, toy[0])
    _, transform = mkt.transforms_of(toy[1], mkt.arguments(["--preprocess", preprocess])[0])
    _, local = model(transform(data.open_image(photo))[None])
    products = local[0] @ model.label_embeddings(model.prompts(labels)).T  # [L, C]
    expected = torch.stack([(of_patch - of_patch.mean()).clamp(min=0) for of_patch in products])
    torch.testing.assert_close(maps, expected.T / expected.max(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy-ViT", "toy-RN"])
def test_without_a_checkpoint_clip_predicts_as_it_is(name, scenes, monkeypatch):
    photos = [scenes / f"test/{i}.png" for i in range(2)]
    found = drawn_predictions(monkeypatch, *photos, "--labels", "blue star, owl, hour", "--clip",
                              name)
    clip, preprocess = clip_model.load(name)
    texts = unit(clip.encode_text(clip.tokenize(
        ["a photo of a blue star.", "a photo of an owl.", "a photo of an hour."])))
    for photo, (scores, maps, crop) in zip(photos, found, strict=True):
        global_, local = clip.encode_image_dense(preprocess(data.open_image(photo))[None])
        whole, *patches = [(clip.logit_scale.exp() * (unit(x) @ texts.T)).softmax(dim=0)
                           for x in (global_[0], *local[0])]
        best = torch.stack(patches).amax(dim=0)
        torch.testing.assert_close(scores, (whole + best) / 2, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(maps.T, torch.stack(patches), rtol=1e-3, atol=1e-4)
        assert crop == 1


def test_under_bf16_scores_are_float32(trained, scenes, monkeypatch):
    (scores, _, _), = drawn_predictions(monkeypatch, scenes / "test/0.png", "--checkpoint",
                                        trained / "best.pt", "--precision", "bf16")
    assert scores.dtype == torch.float32 and (scores.bfloat16() != scores).any()
