"""Training of the three methods, time and memory.

    python bench/training.py            # some minutes on two cores
    python bench/training.py --quick

MKT's steps and ranking loss against straightforward forms: the whole student and the whole teacher
run on every image; every ranking pair is formed, [B, C, C]; prompts have 77 tokens. ViT-B/16 with
random weights; losses and gradients are asserted to be equal.
TRM-ML: one step, 80 labels, encoding and checkpoints included: all shares in one loop, or each in
its own, which is asserted to train the same.
CoMC: the paper's size; embeddings are random, with their labels' directions in them.
"""
import contextlib
import copy
import tempfile

import side_by_side
import torch
import torch.nn.functional as F

import data
import lang_cls
import mkt
import trm_ml

OPTIONS = "--data coco --device cpu --quiet --output".split()
SHARES = "--epochs 1 --workers 0 --partial 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9".split()


def ranking_loss_of_all_pairs(scores, targets):
    targets = targets.to(scores.device)
    present, absent = (targets == 1).to(scores.dtype), (targets == -1).to(scores.dtype)
    margins = (1 + scores[:, None, :] - scores[:, :, None]).clamp(min=0)  # [B, C, C]
    margins = margins * (present[:, :, None] * absent[:, None, :])
    violated = (margins > 0).sum((1, 2)).to(scores.dtype)
    return (margins.sum((1, 2)) / (violated + 1e-8)).mean()


def six_labels(images, labels):
    """Targets with six tags an image, as on NUS-WIDE's average; the others are absent."""
    targets = torch.full((images, labels), -1, dtype=torch.int8)
    return targets.scatter_(1, torch.rand(images, labels).topk(6).indices, 1)


def compare(work, against, straightforward, ours, args, faster, smaller):
    """Two rows, time and memory, of functions that give (loss, gradients)."""
    torch.testing.assert_close(ours(), straightforward(), rtol=1e-3, atol=1e-5)
    torch.set_float32_matmul_precision("high")  # as the scripts do
    forms = (straightforward, ours)
    seconds = side_by_side.alternate(forms, args.repeats, args.device)
    side_by_side.row(work, against, *seconds, faster)
    peaks = [side_by_side.peak_beyond(form, args.device) for form in forms]
    side_by_side.row(f"{work}, peak memory", against, *peaks, smaller, side_by_side.memory)
    torch.set_float32_matmul_precision("highest")


def mkt_ranking_loss(args):
    scores = torch.randn(64, args.seen, requires_grad=True)
    targets = six_labels(64, args.seen)

    def step(function):
        loss = function(scores, targets)
        return loss.detach(), torch.autograd.grad(loss, scores)

    compare(f"MKT ranking loss, forward and backward, 64 x {args.seen}", "all pairs, B x C x C",
            lambda: step(ranking_loss_of_all_pairs), lambda: step(mkt.ranking_loss),
            args, ">= 100", ">= 100")


def mkt_stage_1(args):
    options, _ = mkt.arguments([*OPTIONS, "unused", "--device", args.device])
    model = mkt.MKT(side_by_side.random_clip(args.quick, text_layers=1), options.topk)
    model.to(args.device)
    visual = model.clip.visual
    trained = [*model.blocks.parameters(), *model.ln_post.parameters(), model.proj]
    for parameter in trained:
        parameter.requires_grad_()
    for block in model.blocks:  # where the student is the teacher, |difference| has no gradient
        torch.nn.init.normal_(block.mlp.c_proj.bias, std=0.1)
    student = copy.deepcopy(visual)  # whole, with the weights that are trained
    student.proj, student.ln_post = model.proj, model.ln_post
    student.transformer.resblocks[-2] = model.blocks[0]
    student.transformer.resblocks[-1] = model.blocks[1]
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.randn(args.seen, 512, device=args.device)
    targets = six_labels(args.batch_size, args.seen)

    def step(terms):
        loss = sum(terms)
        return loss.detach(), torch.autograd.grad(loss, trained)

    def straightforward():
        global_, local = student.dense(images)
        with torch.no_grad():
            teacher = visual.dense(images)[0]
        scores = mkt.two_stream_scores(local, global_, labels, options.topk)
        return step([ranking_loss_of_all_pairs(scores, targets), F.l1_loss(global_, teacher)])

    def ours():
        return step(mkt.losses_of_stage_1(model, images, targets, labels, options).values())

    compare(f"MKT stage-1 step, {args.seen} labels, batch {args.batch_size}",
            "whole student and teacher, all pairs", straightforward, ours, args, ">= 1.7", "> 1")


def mkt_stage_2(args):
    options, _ = mkt.arguments([*OPTIONS, "unused"])
    model = mkt.MKT(side_by_side.random_clip(args.quick), options.topk)
    clip, context = model.clip, model.context
    prompts = tokens, ends = model.prompts([f"label {i}" for i in range(args.labels)])
    words = clip.token_embedding(F.pad(tokens, (0, 77 - tokens.shape[1])))
    images = torch.randn(args.batch_size, 3, 224, 224)
    targets = six_labels(args.batch_size, args.labels)

    def step(loss):
        return loss.detach(), torch.autograd.grad(loss, context)

    def straightforward():
        with torch.no_grad():
            global_, local = model(images)
        x = words.clone()
        x[:, :4] = context[:4]
        for i, end in enumerate(ends):
            x[i, end - 3:end + 1] = context[4:]
        x = x + clip.positional_embedding
        for block in clip.transformer.resblocks:
            x = block(x, causal=True)
        labels = clip.ln_final(x)[range(len(x)), ends] @ clip.text_projection
        scores = mkt.two_stream_scores(local, global_, labels, options.topk)
        return step(ranking_loss_of_all_pairs(scores, targets))

    def ours():
        return step(mkt.losses_of_stage_2(model, images, targets, prompts, options)["ranking"])

    compare(f"MKT stage-2 step, {args.labels} labels, batch {args.batch_size}",
            "77 tokens, all pairs", straightforward, ours, args, ">= 3", "> 1")


def trm(args, folder):
    size, images, labels = (64, 8, 6) if args.quick else (448, 32, 80)
    clip = side_by_side.random_clip(args.quick, layers=(3, 4, 23, 3), width=64, patch=None)
    truth = torch.where(torch.rand(images, labels) < 0.1, 1, -1).to(torch.int8)
    dataset = data.MultiLabelDataset([f"label {i}" for i in range(labels)], truth,
                                     torch.randn(images, 3, size, size))

    def plan(name):
        options, _ = trm_ml.arguments([*OPTIONS, f"{folder}/{name}", *SHARES])
        known = [data.keep_partial(truth, share, seed=0) for share in options.partial]
        dataset.full_targets = torch.stack([*known, truth], dim=1)  # [F, R + 1, C]
        with contextlib.redirect_stdout(None):
            return [trm_ml.make_run(i, clip, dataset.labels, targets, options)
                    for i, targets in enumerate(known)], options

    def train(runs, options):
        with contextlib.redirect_stdout(None):
            trm_ml.train(runs, clip, dataset, None, {"method": "trm_ml"}, options)

    (runs, options), (others, _) = plan("together"), plan("alone")
    together = side_by_side.seconds_of(lambda: train(runs, options))
    alone = side_by_side.seconds_of(lambda: [train([run], options) for run in others])
    for run, other in zip(runs, others):
        torch.testing.assert_close(run.model.state_dict(), other.model.state_dict())
    work = f"TRM-ML, nine shares of known labels, RN101 at {size}, batch {images}"
    side_by_side.row(work, "nine commands", alone, together, ">= 4")
    (runs, options), (others, _) = plan("together, memory"), plan("alone, memory")
    one = side_by_side.peak_beyond(lambda: train(others[:1], options))
    nine = side_by_side.peak_beyond(lambda: train(runs, options))
    side_by_side.row(f"{work}, peak memory", "one share", one, nine, text=side_by_side.memory)


def comc(args):
    sentences, labels, size, epochs = (2000, 10, 32, 3) if args.quick else (40_000, 80, 1024, 20)
    present = torch.rand(sentences, labels) < 3 / labels
    directions = F.normalize(torch.randn(labels, size), dim=1)
    noise = 0.02 * torch.randn(sentences, size)
    embeddings = F.normalize(present.float() @ directions + noise, dim=1)
    targets = torch.where(present, 1, -1).to(torch.int8)
    options, _ = lang_cls.arguments([*OPTIONS, "unused", "--epochs", str(epochs)])
    model, log = lang_cls.CoMC(torch.zeros(labels, size), directions), []
    with contextlib.redirect_stdout(None):
        seconds = side_by_side.seconds_of(
            lambda: log.extend(lang_cls.train(model, embeddings, targets, options)))
    assert log[-1]["loss"] < log[0]["loss"], "it does not learn"
    work = f"CoMC training, {sentences:,} sentences, {epochs} epochs, {labels} labels"
    side_by_side.row(work, "the target", 30, seconds, ">= 1")


def main():
    args = side_by_side.start(__doc__)
    args.device, args.batch_size, args.seen, args.labels, args.repeats = "cpu", 16, 925, 100, 3
    if args.quick:
        args.batch_size, args.seen, args.labels, args.repeats = 2, 60, 12, 1
    mkt_stage_1(args)
    mkt_stage_2(args)
    mkt_ranking_loss(args)
    with tempfile.TemporaryDirectory() as folder:
        trm(args, folder)
    comc(args)


if __name__ == "__main__":
    main()
