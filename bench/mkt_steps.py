"""MKT's training steps and ranking loss against their straightforward forms, time and memory.

    python bench/mkt_steps.py     # ViT-B/16 sizes with random weights; five minutes on two cores
    python bench/mkt_steps.py --device cuda --batch-size 64 --labels 925 --repeats 10

Alternating runs, medians, equality asserted; memory: the peak of a step beyond what was there
before it. Straightforward means: the whole student and the whole teacher run on every image; every
ranking pair is formed, [B, C, C]; prompts have 77 tokens.
"""
import copy
from argparse import Namespace

import side_by_side
import torch
import torch.nn.functional as F
from side_by_side import compare, compare_memory

import data
import mkt


def ranking_loss_of_all_pairs(scores, targets):
    present, absent = (targets == 1).to(scores.dtype), (targets == -1).to(scores.dtype)
    margins = (1 + scores[:, None, :] - scores[:, :, None]).clamp(min=0)  # [B, C, C]
    margins = margins * (present[:, :, None] * absent[:, None, :])
    violated = (margins > 0).sum((1, 2)).to(scores.dtype)
    return (margins.sum((1, 2)) / (violated + 1e-8)).mean()


def seen_targets(images, labels, device):
    """Six tags an image, as on NUS-WIDE's average; the others absent."""
    targets = torch.full((images, labels), -1, dtype=torch.int8)
    targets.scatter_(1, torch.rand(images, labels).topk(min(6, labels // 2)).indices, 1)
    return targets.to(device)


def random_clip(args, text_layers):
    sizes = dict(layers=3, width=128, text_width=128) if args.quick else {}
    model = side_by_side.random_clip(text_layers=text_layers, **sizes)
    return model.to(args.device)


# Each of these gives the two forms of a step, functions -> (loss, gradient).

def ranking_loss_forms(args):
    scores = torch.randn(64, args.seen, device=args.device)
    targets = seen_targets(64, args.seen, args.device)

    def form(function):
        def step():
            leaf = scores.clone().requires_grad_()
            loss = function(leaf, targets)
            loss.backward()
            return loss.item(), leaf.grad
        return step

    return form(ranking_loss_of_all_pairs), form(mkt.ranking_loss)


def stage_1_forms(args):
    clip = random_clip(args, text_layers=1)
    model = mkt.MKT(clip, topk=16)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    z, targets = (torch.randn(args.seen, 512, device=args.device),
                  seen_targets(args.batch_size, args.seen, args.device))
    student, options = copy.deepcopy(clip.visual), Namespace(distillation=1.0)
    for block in model.blocks:  # where the student is the teacher, |difference| has no gradient
        torch.nn.init.normal_(block.mlp.c_proj.bias, std=0.1)
    for block, own in zip(student.transformer.resblocks[-2:], model.blocks):
        block.load_state_dict(own.state_dict())
        block.requires_grad_()
    student.ln_post.requires_grad_()
    student.proj.requires_grad_()

    def straight():
        student.zero_grad()
        global_, local = student.dense(images)
        scores = mkt.two_stream_scores(local, global_, z, 16)
        with torch.no_grad():
            teacher = clip.visual.dense(images)[0]
        loss = ranking_loss_of_all_pairs(scores, targets) + F.l1_loss(global_, teacher)
        loss.backward()
        return loss.item(), student.proj.grad

    def ours():
        model.zero_grad()
        loss = mkt.batch_loss(model, 1, images, targets, z, options)[0]
        loss.backward()
        return loss.item(), model.proj.grad

    return straight, ours


def stage_2_forms(args):
    clip = random_clip(args, text_layers=2 if args.quick else 12)
    model = mkt.MKT(clip, topk=16)
    model.requires_grad_(False)
    model.context.requires_grad_()
    labels = [f"{a} {b}" for a in data.TOY_LABELS for b in data.TOY_LABELS][:args.labels]
    prompts = mkt.Prompts(clip, labels)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    targets = seen_targets(args.batch_size, args.labels, args.device)
    long = copy.copy(prompts)  # the same prompts, padded to the whole context
    padding = (0, 77 - prompts.tokens.shape[1])
    long.tokens, long.slots = F.pad(prompts.tokens, padding), F.pad(prompts.slots, padding)

    def straight():
        model.zero_grad()
        with torch.no_grad():
            global_, local = clip.visual.dense(images)
        slots, context = long.slots.to(args.device), model.context
        x = clip.token_embedding(long.tokens.to(args.device)).masked_fill(slots[..., None] > 0, 0)
        x = x + torch.cat([torch.zeros_like(context[:1]), context])[slots]
        x = x + clip.positional_embedding
        for block in clip.transformer.resblocks:
            x = block(x, causal=True)
        x = clip.ln_final(x)[torch.arange(len(x)), long.eot] @ clip.text_projection
        loss = ranking_loss_of_all_pairs(mkt.two_stream_scores(local, global_, x, 16), targets)
        loss.backward()
        return loss.item(), context.grad.clone()

    def ours():
        model.zero_grad()
        loss = mkt.batch_loss(model, 2, images, targets, prompts, None)[0]
        loss.backward()
        return loss.item(), model.context.grad.clone()

    return straight, ours


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--labels", type=int, default=100,
                        help="of stage 2 (925 want 30 GB in the straightforward form)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.seen = 60 if args.quick else 925
    if args.quick:
        args.batch_size, args.labels, args.repeats = 2, 12, 1
    torch.manual_seed(0)
    side_by_side.start(args.device)
    for forms, work, against, repeats, faster, smaller in (
            (ranking_loss_forms, f"MKT ranking loss, forward and backward, 64 x {args.seen}",
             "all pairs, B x C x C", 3 * args.repeats, ">= 50", ">= 100"),
            (stage_1_forms, f"MKT stage 1 step, {args.seen} labels, batch {args.batch_size}",
             "whole student and teacher, all pairs", args.repeats, ">= 1.5", "> 1"),
            (stage_2_forms, f"MKT stage 2 step, {args.labels} labels, batch {args.batch_size}",
             "77 tokens, all pairs", args.repeats, ">= 3", "> 1")):
        straight, ours = forms(args)
        torch.testing.assert_close(ours(), straight(), rtol=1e-3, atol=1e-5)  # also warms up
        compare(work, against, straight, ours, repeats, faster, args.device, warm_up=False)
        compare_memory(work, against, straight, ours, smaller, args.device)


if __name__ == "__main__":
    main()
