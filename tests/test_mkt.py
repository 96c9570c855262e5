"""mkt.py: scores, losses, training, augmentation, the program, predictions."""
import copy
import json
import math
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
from trees import assert_same_weights, checkpoint, random_targets, results

PROMPT = "There is a {} in the scene"


@pytest.fixture(scope="module")
def toy():
    return clip_model.load("toy-ViT")


# ---- the method, straightforwardly

def scores_of(local, global_, z, topk, streams="both"):
    rows = []
    for patches, whole in zip(local, global_):
        a = torch.stack([(patches @ label).sort().values[-topk:].mean() for label in z])
        g = torch.stack([whole @ label for label in z])
        a, g = a / a.square().sum().sqrt(), g / g.square().sum().sqrt()
        rows.append({"both": (a + g) / 2, "global": g, "local": a}[streams])
    return torch.stack(rows)


def prompt_ids(clip):
    """Start of text, the six words of the prompt, end of text."""
    start, end, *_ = clip.tokenize([""])[0].tolist()
    return [start, *clip.tokenizer.encode("there is a in the scene"), end]


def label_embeddings(clip, labels, context=None):
    """Embeddings of the labels' prompts, read through all 77 tokens; the rows of context, by
    default CLIP's own, embed the prompt."""
    ids = prompt_ids(clip)
    context = clip.token_embedding.weight[ids] if context is None else context
    tokens = clip.tokenize([PROMPT.format(label) for label in labels])
    x = clip.token_embedding(tokens)
    for word, row in zip(ids, context, strict=True):
        x = torch.where((tokens == word)[..., None], row, x)
    x = x + clip.positional_embedding
    for block in clip.transformer.resblocks:
        x = block(x, causal=True)
    x = clip.ln_final(x) @ clip.text_projection
    return x[torch.arange(len(x)), tokens.argmax(dim=1)]


def trained_weights(visual, context):
    """What training changes, by its name in a checkpoint."""
    *_, block, last = visual.transformer.resblocks
    weights = {"proj": visual.proj, "context": context}
    for part, module in (("blocks.0", block), ("blocks.1", last), ("ln_post", visual.ln_post)):
        weights |= {f"{part}.{name}": value for name, value in module.named_parameters()}
    return weights


def student_of(path, clip):
    """CLIP's image encoder with the weights of a checkpoint at their places; the context."""
    saved, visual = checkpoint(path)["model"], copy.deepcopy(clip.visual)
    for name, weights in trained_weights(visual, torch.empty_like(saved["context"])).items():
        weights.data.copy_(saved[name])
    return visual, saved["context"]


CLIPS_OWN = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels_of(preprocess, size):
    """-> the transform of images for a CLIP of this size."""
    resized, scale = size, CLIPS_OWN
    if preprocess == "authors":
        resized, scale = size * 256 // 224, IMAGENET
    return transforms.Compose([
        transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(*scale)])


# ---- scores, losses, prompts

@pytest.mark.parametrize("streams", ["both", "global", "local"])
def test_two_stream_scores_equal_a_loop(streams):
    torch.manual_seed(0)
    local, global_, z = torch.randn(3, 7, 5), torch.randn(3, 5), torch.randn(4, 5)
    scores = mkt.two_stream_scores(local, global_, z, 3, streams)
    torch.testing.assert_close(scores, scores_of(local, global_, z, 3, streams))


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


@pytest.mark.parametrize("prompt", [PROMPT, "{} here", "one more photo of the {}"])
def test_the_words_around_a_label_are_learned_in_chunks_too(prompt, toy, monkeypatch):
    monkeypatch.setattr(mkt, "PROMPT", prompt)
    model, labels = mkt.MKT(copy.deepcopy(toy[0]), topk=4), ["star", "a boat in the moon", "zyx"]
    clip, prompts = model.clip, model.prompts(labels)
    plain = clip.encode_text(clip.tokenize([prompt.format(label) for label in labels]))
    z = model.label_embeddings(prompts)
    torch.testing.assert_close(z, plain, rtol=1e-4, atol=1e-5)
    before, after = (1 + len(clip.tokenizer.encode(part)) for part in prompt.split("{}"))
    assert len(model.context) == before + after  # with start and end of text
    model.context.data += torch.randn_like(model.context)
    whole = model.label_embeddings(prompts)
    monkeypatch.setattr(clip_model.in_chunks, "__defaults__", (2,))
    chunked = model.label_embeddings(prompts)
    torch.testing.assert_close(chunked, whole)
    gradients = [torch.autograd.grad(z.sum(), model.context)[0] for z in (whole, chunked)]
    assert gradients[0].abs().amax(dim=1).min() > 0  # every learned embedding matters
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    for label, embedding in zip(labels, whole):
        name = clip.token_embedding(torch.tensor(clip.tokenizer.encode(label)))
        sentence = torch.cat([model.context[:before], name, model.context[before:]])
        expected = clip.encode_prompts(sentence[None], torch.tensor([len(sentence) - 1]))[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


# ---- training, of a random ViT with 9 patches in float64

LABELS = ["star", "boat", "moon", "key", "fish", "owl"]
SEEN = [0, 2, 3, 5]


@pytest.fixture
def small(tmp_path, monkeypatch, toy):
    """The CLIP, whose norms and biases are not at their trivial start; 8 images as it takes them,
    their targets of the seen labels, and the command line that trains on them."""
    torch.manual_seed(0)
    clip = clip_model.CLIP(64, 24, 4, 64, 8, 77, len(toy[0].tokenizer), 64, 1, 2).double().eval()
    for parameter in clip.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    clip.tokenizer = toy[0].tokenizer
    preprocess = clip_model.preprocess_transform(24)
    monkeypatch.setattr(clip_model, "load", lambda *_: (copy.deepcopy(clip), preprocess))
    pixels = np.random.RandomState(0).randint(0, 256, (8, 24, 24, 3)).astype(np.uint8)
    images, targets, lines = [*map(Image.fromarray, pixels)], random_targets(8, 6), []
    for i, target in enumerate(targets):
        target[SEEN[i % 4]] = 1
        data.write_file(tmp_path / f"{i}.png", images[i])
        present, absent = ([LABELS[c] for c in range(6) if target[c] == value] for value in (1, -1))
        lines.append({"image": f"{i}.png", "present": present, "absent": absent})
    assert len(targets[:, SEEN].unique(dim=0)) == 8
    for split in ("train", "test"):
        trees.write(tmp_path / f"{split}.jsonl", "\n".join(map(json.dumps, lines)))
    trees.write(tmp_path / "labels.txt", "\n".join(LABELS))
    trees.write(tmp_path / "unseen.txt", "boat\nfish")
    return clip, torch.stack([*map(preprocess, images)]).double(), targets[:, SEEN], [
        "--data", "folder", "--root", str(tmp_path), "--topk", "2", "--warmup-epochs", "0.5",
        "--augment", "no", "--workers", "0", "--device", "cpu", "--quiet"]


@pytest.mark.parametrize("streams", ["both", "local", "global"])
def test_training_equals_a_straightforward_version(streams, small, tmp_path, monkeypatch):
    """Three epochs of one batch in each stage: full student and teacher, all pairs, 77 tokens."""
    clip, images, targets, command = small
    output, init = tmp_path / "run", mkt.MKT.__init__
    noise = 0.01 * torch.randn_like(clip.visual.proj)

    def apart(model, *args):  # where student and teacher are equal, rounding says which is higher
        init(model, *args)
        model.proj.data += noise

    monkeypatch.setattr(mkt.MKT, "__init__", apart)
    mkt.main([*command, "--epochs", "3", "--prompt-epochs", "3", "--distillation", "0.3",
              "--streams", streams, "--output", str(output)])
    log = trees.lines(output / "log.jsonl")

    student, teacher = copy.deepcopy(clip.visual), clip.visual
    student.proj.data += noise
    context = clip.token_embedding.weight[prompt_ids(clip)].detach().requires_grad_()
    start = copy.deepcopy(trained_weights(student, context))
    *_, block, last = student.transformer.resblocks
    layers = [[*student.ln_post.parameters(), student.proj], [*last.parameters()],
              [*block.parameters()]]
    for number, layers, warmup in ((1, layers, 0.5), (2, [[context]], 0)):
        optimizer = torch.optim.AdamW([
            {"params": [p], "scale": 0.65 ** depth, "weight_decay": 0.05 if p.ndim > 1 else 0}
            for depth, layer in enumerate(layers) for p in layer])
        for epoch in range(3):
            rate = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (3 - warmup)))
            if epoch < warmup:
                rate = epoch / warmup
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * rate * group["scale"]
            global_, local = student.dense(images)
            z = label_embeddings(clip, [LABELS[c] for c in SEEN], context)
            expected = {"ranking": ranking_loss_of_all_pairs(
                scores_of(local, global_, z, 2, streams), targets)}
            if number == 1:
                difference = global_ - teacher(images).detach()
                expected["distillation"] = 0.3 * difference.abs().mean()
            expected["loss"] = sum(expected.values())
            optimizer.zero_grad()
            expected["loss"].backward()
            optimizer.step()
            line = log.pop(0)
            assert (line["stage"], line["epoch"]) == (number, epoch + 1)
            for name, value in expected.items():
                assert line[name] == pytest.approx(value.item(), rel=1e-3), name
    assert not log
    found = checkpoint(output / "last.pt")["model"]
    assert found.keys() == start.keys()
    for name, plain in trained_weights(student, context).items():
        moved = (plain - start[name]).abs().mean()
        assert (found[name] - plain).abs().mean() < 1e-3 * moved, name


@pytest.fixture
def train_on_nothing(small, tmp_path, monkeypatch):
    """Trains by a loss that is always 0, in batches of 3 for 3 epochs, then of 5 for 2 -> the
    folder; of every batch the targets; of every image a draw of its augmentation."""
    *_, command = small

    def train(name, *options):
        batches, draws = [], []

        def nothing(scores, targets):
            batches.append([tuple(target) for target in targets.tolist()])
            return 0 * scores.sum()

        def draw(image):
            draws.append(torch.rand(()).item())
            return image

        monkeypatch.setattr(mkt, "ranking_loss", nothing)
        monkeypatch.setattr(mkt, "rand_augment", draw)
        mkt.main([*command, "--epochs", "3", "--prompt-epochs", "2", "--distillation", "0",
                  "--batch-size", "3", "--prompt-batch-size", "5", "--augment", "yes", *options,
                  "--output", str(tmp_path / name)])
        return tmp_path / name, batches, draws

    return train


def test_every_epoch_shuffles_and_augments_anew(train_on_nothing, small):
    epochs = []
    for number, seed in enumerate("010"):
        _, batches, draws = train_on_nothing(f"run{number}", "--seed", seed)
        assert [len(batch) for batch in batches] == 3 * [3, 3, 2] + 2 * [5, 3]
        images = [*zip(sum(batches, []), draws, strict=True)]
        epochs += [images[i:i + 8] for i in range(0, 40, 8)]
    assert epochs[10:] == epochs[:5]  # the same seed
    orders = {tuple(target for target, _ in epoch) for epoch in epochs}
    assert {frozenset(order) for order in orders} == {frozenset(map(tuple, small[2].tolist()))}
    assert len(orders) == 10 and len({draw for epoch in epochs for _, draw in epoch}) == 10 * 8


def test_rates_and_weight_decay_in_closed_form(train_on_nothing, small):
    """Where the gradient is 0 AdamW multiplies a matrix with 1 - rate * 0.05 and does no more."""
    output, *_ = train_on_nothing("run", "--lr", "1e-4")
    found, clip = checkpoint(output / "last.pt")["model"], small[0]
    context = clip.token_embedding.weight[prompt_ids(clip)]
    for name, before in trained_weights(clip.visual, context).items():
        scale = {"blocks.0": 0.65 ** 2, "blocks.1": 0.65}.get(name[:8], 1)
        epochs, steps, warmup, minimum = 3, 3, 0.5, 1e-6
        if name == "context":
            epochs, steps, warmup, minimum = 2, 2, 0, 1e-8
        for epoch in torch.arange(0, epochs, 1 / steps, dtype=torch.float64).tolist():
            angle = math.pi * (epoch - warmup) / (epochs - warmup)
            rate = minimum + (1e-4 - minimum) * (1 + math.cos(angle)) / 2
            if epoch < warmup:
                rate = 1e-4 * epoch / warmup
            if before.ndim > 1:
                before = before * (1 - 0.05 * rate * scale)
        torch.testing.assert_close(found[name], before.detach(), rtol=1e-13, atol=0)


# ---- pixels

@pytest.mark.parametrize("preprocess", ["clip", "authors"])
def test_pixels_are_clips_own_or_the_authors(preprocess):
    expected = pixels_of(preprocess, 224)
    augmented = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.08, 1), (3 / 4, 4 / 3),
                                     transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(0.5), mkt.rand_augment, *expected.transforms[-2:]])
    photo = world.scene("benchmark", 2, 7).resize((96, 80))
    for augment, of_training in (("no", expected), ("yes", augmented)):
        args, _ = mkt.arguments(["--preprocess", preprocess, "--augment", augment])
        test = mkt.test_pixels(224, preprocess)
        for transform, plain in (mkt.training_pixels(224, args), of_training), (test, expected):
            for seed in range(4):
                torch.manual_seed(seed)
                pixels = transform(photo)
                assert pixels.dtype == torch.uint8  # what the workers pass
                torch.manual_seed(seed)
                assert torch.equal(mkt.normalized(pixels[None], preprocess)[0], plain(photo))


TIMMS = {  # the authors' changes, by our names
    "auto-contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing",
    "solarize-add": "SolarizeAdd", "rotate": "Rotate", "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear x": "ShearX", "shear y": "ShearY",
    "translate x": "TranslateXRel", "translate y": "TranslateYRel"}


@pytest.mark.parametrize("name", TIMMS)
def test_a_change_of_rand_augment_equals_timms(name, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    pixels = np.random.RandomState(0).randint(20, 220, (40, 50, 3))
    image = Image.fromarray((pixels // (1, 2, 1)).astype(np.uint8))
    for amount in (-0.9, -0.37, 0.0, 0.2, 0.85):
        # they draw the sign where they make an argument of the amount
        monkeypatch.setattr(timm.random, "random", lambda: float(amount < 0))
        to_arguments = timm.LEVEL_TO_ARG[TIMMS[name]] or (lambda level, _: ())
        expected = timm.NAME_TO_OP[TIMMS[name]](
            image, *to_arguments(10 * abs(amount), {}), fillcolor=(124, 116, 104),
            resample=Image.Resampling.BICUBIC)
        assert mkt.AUGMENTATIONS[name](image, amount) == expected, amount
    changed = [mkt.AUGMENTATIONS[name](image, amount) != image for amount in (-1, 1)]
    assert changed == [True, True]  # even without timm


def test_rand_augment_draws_what_the_authors_does(monkeypatch):
    """Twice a change with probability 1/2, of N(9, 0.5) tenths and either sign."""
    assert mkt.AUGMENTATIONS.keys() == TIMMS.keys()
    monkeypatch.setattr(mkt, "AUGMENTATIONS", {
        name: lambda drawn, amount, name=name: [*drawn, (name, amount)] for name in TIMMS})
    torch.manual_seed(0)
    images = [mkt.rand_augment([]) for _ in range(5000)]
    share = [count / 5000 for _, count in sorted(Counter(map(len, images)).items())]
    assert share == pytest.approx([1 / 4, 1 / 2, 1 / 4], abs=0.03)
    drawn = sum(images, [])
    times = Counter(name for name, _ in drawn)
    assert [times[name] / len(drawn) for name in TIMMS] == pytest.approx([1 / 15] * 15, abs=0.015)
    amounts = torch.tensor([amount for _, amount in drawn])
    assert (amounts > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    size = amounts.abs()
    assert size.max() == 1  # what is drawn beyond is cut off
    assert (size == 1).float().mean() == pytest.approx(0.0228, abs=0.008)
    assert size.median() == pytest.approx(0.9, abs=0.003)
    assert (size < 0.85).float().mean() == pytest.approx(0.1587, abs=0.02)


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


@torch.no_grad()
@pytest.mark.parametrize("preprocess, streams", [("clip", "both"), ("authors", "local")])
def test_the_rows_are_what_the_pieces_give(preprocess, streams, trained, scenes, toy, tmp_path):
    rows = mkt.main(["--eval", str(trained / "best.pt"), "--preprocess", preprocess, "--streams",
                     streams, "--device", "cpu", "--output", str(tmp_path)])
    assert rows == results(trained)["rows"] or preprocess == "authors"
    visual, learned = student_of(trained / "best.pt", toy[0])
    test = data.load_dataset("folder", scenes, "test", pixels_of(preprocess, 128))
    global_, local = visual.dense(torch.stack([image for image, _ in test]))
    for row, context in zip(rows[4:], (None, learned), strict=True):
        z = label_embeddings(toy[0], test.labels, context)
        for metric, columns in (("gzsl_mAP", slice(None)), ("zsl_mAP", test.unseen)):
            scores = scores_of(local, global_, z[columns], 4, streams)
            mAP = metrics.mean_average_precision(scores, test.targets[:, columns])
            assert row[metric] == pytest.approx(mAP, abs=1e-4)
    assert [row["name"] for row in rows[4:]] == ["MKT without prompt tuning", "MKT"]


def test_validation_is_of_the_seen_labels_of_images_held_out(quick, scenes, toy, tmp_path):
    mkt.main([*quick, "--epochs", "1", "--prompt-epochs", "0", "--val-fraction", "0.5", "--output",
              str(tmp_path)])
    visual, context = student_of(tmp_path / "last.pt", toy[0])
    train = data.load_dataset("folder", scenes, "train")
    held_out = train.hold_out(0.5, toy[1])[1]
    global_, local = visual.dense(torch.stack([image for image, _ in held_out]))
    z = label_embeddings(toy[0], [train.labels[c] for c in train.seen], context)
    scores = scores_of(local, global_, z, 4).detach()
    expected = metrics.mean_average_precision(scores, held_out.targets[:, train.seen])
    line, = trees.lines(tmp_path / "log.jsonl")
    assert line["val_mAP"] == pytest.approx(expected, abs=1e-4)


def test_only_images_that_show_a_seen_label_are_ranked(tmp_path):
    trees.folder(tmp_path)
    (tmp_path / "unseen.txt").write_text("ice cream")
    first = '{"image": "photos/0.png", "present": ["dog"], "absent": ["cat"]}'
    second = '{"image": "1.png", "present": ["cat", "ice cream"], "absent": ["dog"]}'
    third = '{"image": "2.png", "present": ["ice cream"], "absent": ["dog"]}'
    (tmp_path / "train.jsonl").write_text(f"{first}\n{second}\n{third}")
    assert trees.numbers(mkt.images_to_rank(data.load_dataset("folder", tmp_path))) == [0, 1]
    for lines in first, f"{first}\n{third}", third:  # what is known of the third does not count
        (tmp_path / "train.jsonl").write_text(lines)
        with pytest.raises(data.UserError, match="nothing to rank: a seen label"):
            mkt.images_to_rank(data.load_dataset("folder", tmp_path))


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
    for line, other in zip(one["log"], two["log"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert line["val_mAP"] == pytest.approx(other["val_mAP"], abs=0.01)
    for name, weights in one["model"].items():
        torch.testing.assert_close(weights, two["model"][name], rtol=0, atol=1e-4)
    rows = [results(tmp_path / name)["rows"] for name in ("one", "two")]
    for row, other in zip(*rows, strict=True):
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


# ---- predictions

def drawn_predictions(monkeypatch, *arguments):
    """What --predict gives to be written: (scores [C], maps [C, L], crop) of every image."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "write_prediction",
                      lambda path, photo, scores, maps, labels, args, crop: found.append(
                          (scores, maps, crop)))
        mkt.main(["--predict", *map(str, arguments), "--device", "cpu"])
    return found


@torch.no_grad()
@pytest.mark.parametrize("preprocess, covered, streams", [
    ("clip", 1, "both"), ("authors", 224 / 256, "global")])
def test_predictions_of_labels_never_seen_and_heatmaps(preprocess, covered, streams, trained,
                                                       scenes, toy, monkeypatch):
    """A heatmap shows what a label has beyond the others."""
    photo, labels = scenes / "test/0.png", ["blue star", "submarine", "cactus", "ice cream"]
    (scores, maps, crop), = drawn_predictions(
        monkeypatch, photo, "--labels", ", ".join(labels), "--checkpoint", trained / "best.pt",
        "--preprocess", preprocess, "--streams", streams)
    visual, context = student_of(trained / "best.pt", toy[0])
    z = label_embeddings(toy[0], labels, context)
    global_, local = visual.dense(pixels_of(preprocess, 128)(data.open_image(photo))[None])
    expected = scores_of(local, global_, z, 4, streams)[0]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-3)
    products = local[0] @ z.T  # [L, C]
    expected = torch.stack([(of_patch - of_patch.mean()).clamp(min=0) for of_patch in products])
    torch.testing.assert_close(maps, expected.T / expected.max(), rtol=1e-3, atol=1e-4)
    assert crop == covered


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy-ViT", "toy-RN"])
def test_without_a_checkpoint_clip_predicts_as_it_is(name, scenes, monkeypatch):
    photos = [scenes / f"test/{i}.png" for i in range(2)]
    found = drawn_predictions(monkeypatch, *photos, "--labels", "blue star, owl, hour", "--clip",
                              name)
    clip, preprocess = clip_model.load(name)
    texts = F.normalize(clip.encode_text(clip.tokenize(
        ["a photo of a blue star.", "a photo of an owl.", "a photo of an hour."])), dim=-1)
    for photo, (scores, maps, crop) in zip(photos, found, strict=True):
        global_, local = clip.encode_image_dense(preprocess(data.open_image(photo))[None])
        embeddings = F.normalize(torch.cat([global_, local[0]]), dim=-1)
        whole, *patches = [(clip.logit_scale.exp() * (e @ texts.T)).softmax(dim=0)
                           for e in embeddings]
        best = torch.stack(patches).amax(dim=0)
        torch.testing.assert_close(scores, (whole + best) / 2, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(maps.T, torch.stack(patches), rtol=1e-3, atol=1e-4)
        assert crop == 1


def test_under_bf16_scores_are_float32(trained, scenes, monkeypatch):
    (scores, _, _), = drawn_predictions(monkeypatch, scenes / "test/0.png", "--checkpoint",
                                        trained / "best.pt", "--precision", "bf16")
    assert scores.dtype == torch.float32 and (scores.bfloat16() != scores).any()
