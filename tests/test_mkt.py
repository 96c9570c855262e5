"""mkt.py: scores, losses, steps of training, pixels, the program."""
import copy
import functools
import math
import shutil
import subprocess
import sys

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
from training import ranking_loss_of_all_pairs  # test_bench.py compares it with a loop
from toy import world
from trees import assert_same_weights, checkpoint, predictions, random_targets, results

PROMPT = "There is a {} in the scene"


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

def test_prompts_are_the_sentences_and_eight_embeddings_of_them_are_learned(toy):
    model = mkt.MKT(copy.deepcopy(toy[0]), topk=4)
    clip, labels = model.clip, ["star", "a boat in the moon", "zyxwvut"]
    prompts = model.prompts(labels)
    tokens = clip.tokenize([PROMPT.format(label) for label in labels])
    length = prompts[0].shape[1]
    assert torch.equal(prompts[0], tokens[:, :length]) and not tokens[:, length:].any()
    z = model.label_embeddings(prompts)
    torch.testing.assert_close(z, clip.encode_text(tokens), rtol=1e-4, atol=1e-5)

    assert model.context.shape == (8, clip.token_embedding.embedding_dim)
    model.context.data += torch.randn_like(model.context)
    for label, embedding in zip(labels, model.label_embeddings(prompts)):
        name = clip.token_embedding(torch.tensor(clip.tokenizer.encode(label)))
        # start, there, is, a; in, the, scene, end
        sentence = torch.cat([model.context[:4], name, model.context[4:]])
        expected = clip.encode_prompts(sentence[None], torch.tensor([len(sentence) - 1]))[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(clip_model.ClipError, match="long long"):
        model.prompts(["star", "long " * 80])


def test_chunks_of_labels_that_are_recomputed_change_nothing(toy):
    model = mkt.MKT(copy.deepcopy(toy[0]), topk=4)
    prompts = model.prompts([f"old {label}" for label in world.LABELS[:10]])
    whole, chunked = model.label_embeddings(prompts), model.label_embeddings(prompts, chunk=3)
    torch.testing.assert_close(chunked, whole)
    gradients = [torch.autograd.grad(z.square().sum(), model.context)[0] for z in (whole, chunked)]
    assert gradients[0].abs().amax(dim=1).min() > 0  # every learned embedding matters
    scale = gradients[0].abs().max()  # sums of float32 in another order
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=0, atol=1e-5)


# ---- optimisation

def test_learning_rate_follows_the_formula():
    rate = functools.partial(mkt.learning_rate, peak=1e-3, minimum=1e-6, epochs=20,
                             warmup_epochs=2)
    assert rate(0) == 0 and rate(1) == pytest.approx(5e-4) and rate(2) == pytest.approx(1e-3)
    assert rate(11) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2) and rate(20) == pytest.approx(1e-6)
    assert rate(6.5) == pytest.approx(1e-6 + (1e-3 - 1e-6) * math.cos(math.pi / 8) ** 2)
    assert mkt.learning_rate(0, 1e-3, 1e-8, 4, 0) == 1e-3  # stage 2


LABELS = ["star", "boat", "moon", "red key", "fish", "owl"]
WARMUP = 0.5  # epochs


def train(clip, stage, folder):
    """-> the model, its log, the images and targets: each of three epochs is one batch of six
    random images, whose labels 1 and 4 are unseen."""
    targets = random_targets(6, 6)
    images = np.random.RandomState(0).randint(0, 256, (6, 24, 24, 3)).astype(np.uint8)
    transform = transforms.Compose([transforms.ToTensor(), lambda x: x.to(clip.dtype)])
    dataset = data.MultiLabelDataset(LABELS, targets, tuple(map(Image.fromarray, images)),
                                     transform=transform, unseen=[1, 4])
    args, _ = mkt.arguments(["--output", str(folder), "--topk", "2", "--workers", "0", "--device",
                             "cpu", "--distillation", "0.3", "--warmup-epochs", str(WARMUP)])
    model, state = mkt.MKT(clip, topk=2), {"method": "mkt", "log": []}
    mkt.train(model, stage, 3, dataset, None, state, args)
    return model, state["log"], torch.stack([image for image, _ in dataset]), targets


def seen_texts(clip, context):
    """Embeddings of the seen labels' prompts, read through all 77 tokens; start, end and the six
    words are embedded by the rows of context."""
    tokens = clip.tokenize([PROMPT.format(LABELS[c]) for c in (0, 2, 3, 5)])
    words = [tokens[0, 0], *clip.tokenizer.encode("there is a in the scene"), tokens.max()]
    x = clip.token_embedding(tokens)
    for word, row in zip(words, context):
        x = torch.where((tokens == word)[..., None], row, x)
    x = x + clip.positional_embedding
    for block in clip.transformer.resblocks:
        x = block(x, causal=True)
    x = clip.ln_final(x) @ clip.text_projection
    return x[torch.arange(4), tokens.argmax(dim=1)]


@pytest.mark.parametrize("stage", [1, 2])
def test_steps_of_training_equal_a_straightforward_version(stage, tmp_path):
    """Full student and full teacher, all ordered pairs of labels, 77 tokens."""
    clip = small_clip()
    model, log, images, targets = train(copy.deepcopy(clip), stage, tmp_path)
    start = mkt.MKT(copy.deepcopy(clip), topk=2).state_dict()
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
    for epoch, line in enumerate(log):
        warmup = WARMUP if stage == 1 else 0
        rate = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (3 - warmup)))
        if epoch < warmup:
            rate = epoch / warmup
        for group, scale in zip(optimizer.param_groups, trained.values()):
            group["lr"] = 1e-3 * rate * scale
        global_, local = student.dense(images)
        scores = straightforward_scores(local, global_, seen_texts(clip, context), 2)
        ranking = ranking_loss_of_all_pairs(scores, targets[:, [0, 2, 3, 5]])
        loss = ranking
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
    expected = transforms.Compose([
        transforms.Resize(size, bicubic), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize(*scale)])
    options = ["--preprocess", preprocess, "--output", "unused", "--augment"]
    for augment in ("no", "yes"):
        args, _ = mkt.arguments([*options, augment])
        train, test = mkt.transforms_of(clip_model.preprocess_transform(224), args)
        photo = world.scene("benchmark", 2, 7).resize((96, 80))
        assert torch.equal(test(photo), expected(photo))
        flat = Image.new("RGB", (50, 40), (90, 120, 30))
        torch.manual_seed(0)
        same = [torch.allclose(train(flat), expected(flat), atol=1e-5) for _ in range(16)]
        assert any(same) and all(same) == (augment == "no")


def test_rand_augment_changes_an_image_as_often_and_as_much_as_the_authors():
    photo = world.scene("benchmark", 2, 7).resize((96, 80))
    torch.manual_seed(0)
    draws = np.stack([np.asarray(mkt.rand_augment(photo)).astype(int) for _ in range(400)])
    difference = np.abs(draws - np.asarray(photo)).mean(axis=(1, 2, 3))
    # both draws are passed over in 1/4; some changes leave this or that image as it is
    assert 0.2 < (difference == 0).mean() < 0.36
    assert 0.2 < (difference > 40).mean() < 0.6


# ---- the program

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """20 training and 16 test scenes of the toy world as a folder of one's own images."""
    root = trees.scenes(tmp_path_factory.mktemp("scenes"), train=(20, tuple(world.SEEN)),
                        test=(16, None))
    (root / "labels.txt").write_text("\n".join(world.LABELS))
    (root / "unseen.txt").write_text("\n".join(world.LABELS[c] for c in world.UNSEEN))
    return root


@pytest.fixture(scope="module")
def quick(scenes):
    return ["--data", "folder", "--root", str(scenes), "--clip", "toy-ViT", "--topk", "4",
            "--epochs", "2", "--warmup-epochs", "0.5", "--prompt-epochs", "2", "--batch-size", "8",
            "--prompt-batch-size", "8", "--workers", "0", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):
    """The folder of an uninterrupted run, with augmentation."""
    output = tmp_path_factory.mktemp("mkt") / "run"
    mkt.main([*quick, "--output", str(output)])
    return output


def assert_same_run(folder, other):
    assert results(folder) == results(other)
    for name in ("last.pt", "best.pt"):
        assert_same_weights(folder / name, other / name)


@torch.no_grad()
@pytest.mark.parametrize("preprocess", ["clip", "authors"])
def test_the_rows_are_what_the_pieces_give(preprocess, trained, scenes, toy, tmp_path):
    """Whatever MKT's pixels are, those of zero-shot CLIP are its own."""
    rows = mkt.main(["--eval", str(trained / "best.pt"), "--preprocess", preprocess, "--device",
                     "cpu", "--output", str(tmp_path)])
    assert rows == results(trained)["rows"] or preprocess == "authors"
    assert [row["kind"] for row in rows] == ["zero-shot"] * 3 + ["ablation", "method"]
    clip, clips_own = toy
    model = mkt.MKT(clip, topk=4)
    own_context = model.context.clone()
    model.load_state_dict(checkpoint(trained / "best.pt")["model"], strict=False)
    args, _ = mkt.arguments(["--preprocess", preprocess, "--output", "unused"])
    _, transform = mkt.transforms_of(clips_own, args)
    test = data.load_dataset("folder", scenes, "test")
    texts = F.normalize(clip.encode_text(clip.tokenize(
        [f"a photo of a {label}." for label in test.labels])), dim=-1)
    images = torch.stack([clips_own(image) for image, _ in test])
    expected = {"zero-shot, global": F.normalize(clip.encode_image(images), dim=-1) @ texts.T}
    global_, local = model(torch.stack([transform(image) for image, _ in test]))
    for name, context in (("MKT without prompt tuning", own_context), ("MKT", model.context)):
        z = model.label_embeddings(model.prompts(test.labels), context)[test.unseen]
        expected[name] = torch.zeros(16, len(test.labels))
        expected[name][:, test.unseen] = straightforward_scores(local, global_, z, 4)
    found = {row["name"]: row["zsl_mAP"] for row in rows}
    for name, scores in expected.items():
        mAP = metrics.mean_average_precision(scores[:, test.unseen], test.targets[:, test.unseen])
        assert found[name] == pytest.approx(mAP, abs=1e-4), name


def test_two_processes_end_where_one_does(quick, tmp_path):
    """Resumed after an epoch by one process or by two, with augmentation and a last batch of a
    single image. The first epoch is shared: it starts where the distillation is |0|, whose
    gradient's sign is that of rounding."""
    options = [*quick, "--prompt-epochs", "1", "--limit", "17"]
    mkt.main([*options, "--epochs", "1", "--prompt-epochs", "0", "--output",
              str(tmp_path / "one")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    options += ["--epochs", "2", "--resume"]
    mkt.main([*options, "--output", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "mkt.py", *options, "--output", str(tmp_path / "two")]
    process = subprocess.run(command, cwd=trees.ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("training images") == 1  # rank 0 alone prints
    one, two = (checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert [line["epoch"] for line in two["log"]] == [1, 2, 1]
    for name, weights in one["model"].items():
        torch.testing.assert_close(weights, two["model"][name], rtol=0, atol=1e-4)
    for row, other in zip(results(tmp_path / "one")["rows"], results(tmp_path / "two")["rows"]):
        assert row["name"] == other["name"]
        assert row["gzsl_mAP"] == pytest.approx(other["gzsl_mAP"], abs=0.01)


def test_a_run_killed_in_either_stage_resumes_to_the_same_numbers(trained, quick, tmp_path):
    resume = ["--resume", "--output", str(tmp_path), "--device", "cpu"]
    trees.run_killed("mkt", "log.jsonl", 2, [*quick, "--output", tmp_path])
    assert len(checkpoint(tmp_path / "last.pt")["log"]) == 1  # epoch 2 of stage 1 is lost
    *zero_shot, row = mkt.main(["--eval", str(tmp_path / "last.pt"), "--device", "cpu"])
    assert len(zero_shot) == 3 and row["name"] == "MKT"  # no prompt has been tuned
    trees.run_killed("mkt", "last.pt", 2, resume)
    assert len(checkpoint(tmp_path / "last.pt")["log"]) == 3
    assert not (tmp_path / "results.json").exists()
    mkt.main(resume)
    assert_same_run(tmp_path, trained)


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


def test_under_bf16_scores_are_float32(scenes, toy):
    test = data.load_dataset("folder", scenes, "test", toy[1], limit=1)
    model = mkt.MKT(toy[0], topk=4)
    args, _ = mkt.arguments(["--precision", "bf16", "--output", "unused", "--device", "cpu"])
    labels = model.label_embeddings(model.prompts(test.labels))
    for scores in mkt.evaluate(model, labels, 4, test, args):
        assert scores.dtype == torch.float32 and (scores.bfloat16() != scores).any()


# ---- a trained model

@torch.no_grad()
def test_predict_scores_labels_never_seen(trained, toy, tmp_path, capsys):
    labels = ["blue star", "submarine", "cactus", "ice cream"]
    model = mkt.MKT(copy.deepcopy(toy[0]), topk=4)
    model.load_state_dict(checkpoint(trained / "best.pt")["model"], strict=False)
    z = model.label_embeddings(model.prompts(labels))

    def scores_of(photo):
        global_, local = model(toy[1](photo)[None])
        return straightforward_scores(local, global_, z, 4)[0]

    trees.check_predictions(mkt, capsys, tmp_path, labels, scores_of, "--checkpoint",
                            trained / "best.pt", "--labels", ", ".join(labels))
    line, _ = predictions(mkt, capsys, tmp_path / "photos", "--checkpoint", trained / "best.pt",
                          "--top", "60")
    assert sorted(entry["label"] for entry in line["labels"]) == world.LABELS
