"""MKT's training steps and ranking loss against straightforward forms, time and memory.

    python bench/mkt_steps.py            # ten minutes on two cores
    python bench/mkt_steps.py --quick

Straightforward means: the whole student and the whole teacher run on every image; every ranking
pair is formed, [B, C, C]; prompts have 77 tokens. ViT-B/16 with random weights; losses and
gradients are asserted to be equal. Memory: the peak beyond what was there before.
"""
import copy

import side_by_side
import torch
import torch.nn.functional as F

import mkt

TOPK = 16


def ranking_loss_of_all_pairs(scores, targets):
    present, absent = (targets == 1).to(scores.dtype), (targets == -1).to(scores.dtype)
    margins = (1 + scores[:, None, :] - scores[:, :, None]).clamp(min=0)  # [B, C, C]
    margins = margins * (present[:, :, None] * absent[:, None, :])
    violated = (margins > 0).sum((1, 2)).to(scores.dtype)
    return (margins.sum((1, 2)) / (violated + 1e-8)).mean()


def six_labels(images, labels):
    """Targets with six tags an image, as on NUS-WIDE's average; the others are absent."""
    targets = torch.full((images, labels), -1, dtype=torch.int8)
    return targets.scatter_(1, torch.rand(images, labels).topk(6).indices, 1)


def random_model(args, **sizes):
    if args.quick:
        sizes = dict(layers=3, width=128, text_width=128, text_layers=2)
    model = mkt.MKT(side_by_side.random_clip(**sizes), TOPK).to(args.device)
    for block in model.blocks:  # where the student is the teacher, |difference| has no gradient
        torch.nn.init.normal_(block.mlp.c_proj.bias, std=0.1)
    return model.requires_grad_(False)


def ranking_loss(args):
    scores = torch.randn(64, args.seen, device=args.device, requires_grad=True)
    targets = six_labels(64, args.seen)
    on_device = targets.to(args.device)

    def step(function, targets):
        loss = function(scores, targets)
        return loss.detach(), torch.autograd.grad(loss, scores)[0]

    return (lambda: step(ranking_loss_of_all_pairs, on_device),
            lambda: step(mkt.ranking_loss, targets))


def stage_1(args):
    model = random_model(args, text_layers=1)
    visual = model.clip.visual
    trained = [*model.blocks.parameters(), *model.ln_post.parameters(), model.proj]
    for parameter in trained:
        parameter.requires_grad_()
    student = copy.deepcopy(visual)  # whole, with the weights that are trained
    student.proj, student.ln_post = model.proj, model.ln_post
    student.transformer.resblocks[-2] = model.blocks[0]
    student.transformer.resblocks[-1] = model.blocks[1]
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.randn(args.seen, 512, device=args.device)
    targets = six_labels(args.batch_size, args.seen)
    on_device = targets.to(args.device)

    def step(global_, local, teacher, loss, targets):
        scores = mkt.two_stream_scores(local, global_, labels, TOPK)
        loss = loss(scores, targets) + F.l1_loss(global_, teacher)
        return loss.detach(), torch.autograd.grad(loss, trained)

    def straightforward():
        global_, local = student.dense(images)
        with torch.no_grad():
            teacher = visual.dense(images)[0]
        return step(global_, local, teacher, ranking_loss_of_all_pairs, on_device)

    def ours():
        tokens = model.trunk(images)
        return step(*model.student(tokens), model.teacher(tokens), mkt.ranking_loss, targets)

    return straightforward, ours


def stage_2(args):
    model = random_model(args)
    model.context.requires_grad_()
    clip, context = model.clip, model.context
    prompts = tokens, ends = model.prompts([f"label {i}" for i in range(args.labels)])
    words = clip.token_embedding(F.pad(tokens, (0, 77 - tokens.shape[1])))
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    targets = six_labels(args.batch_size, args.labels)
    on_device = targets.to(args.device)

    def step(labels, loss, targets):
        with torch.no_grad():
            global_, local = model(images)
        loss = loss(mkt.two_stream_scores(local, global_, labels, TOPK), targets)
        return loss.detach(), torch.autograd.grad(loss, context)[0]

    def straightforward():
        x = words.clone()
        x[:, :4] = context[:4]
        for i, end in enumerate(ends):
            x[i, end - 3:end + 1] = context[4:]
        x = x + clip.positional_embedding
        for block in clip.transformer.resblocks:
            x = block(x, causal=True)
        labels = clip.ln_final(x)[range(len(x)), ends] @ clip.text_projection
        return step(labels, ranking_loss_of_all_pairs, on_device)

    return straightforward, lambda: step(model.label_embeddings(prompts), mkt.ranking_loss, targets)


def bench(work, against, forms, args, faster, smaller):
    """Two rows, time and memory, of forms: (straightforward, ours), -> (loss, gradients)."""
    straightforward, ours = forms
    torch.testing.assert_close(ours(), straightforward(), rtol=1e-3, atol=1e-5)
    torch.set_float32_matmul_precision("high")  # as the scripts do
    side_by_side.compare(work, against, straightforward, ours, args.repeats, faster, args.device)
    side_by_side.compare_memory(work, against, straightforward, ours, smaller, args.device)
    torch.set_float32_matmul_precision("highest")


def bench_stage_1(args):
    bench(f"MKT stage-1 step, {args.seen} labels, batch {args.batch_size}",
          "whole student and teacher, all pairs", stage_1(args), args, ">= 1.7", "> 1")


def main():
    args = side_by_side.parser(__doc__).parse_args()
    args.device, args.batch_size, args.seen, args.labels, args.repeats = "cpu", 16, 925, 100, 3
    if args.quick:
        args.batch_size, args.seen, args.labels, args.repeats = 2, 60, 12, 1
    torch.manual_seed(0)
    side_by_side.start()
    bench_stage_1(args)
    bench(f"MKT stage-2 step, {args.labels} labels, batch {args.batch_size}",
          "77 tokens, all pairs", stage_2(args), args, ">= 3", "> 1")
    bench(f"MKT ranking loss, forward and backward, 64 x {args.seen}", "all pairs, B x C x C",
          ranking_loss(args), args, ">= 100", ">= 100")


if __name__ == "__main__":
    main()
