"""MKT's training steps and ranking loss against their straightforward forms, in one process.

    python bench/mkt_steps.py     # ViT-B/16 sizes with random weights; minutes on two cores
    python bench/mkt_steps.py --device cuda --batch-size 64

Alternating runs, medians, equality asserted. Straightforward means: the whole student and the
whole teacher run on every image; every ranking pair is formed, [B, C, C]; prompts have 77 tokens.
"""
import argparse
import copy
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model  # noqa: E402
import data  # noqa: E402
import mkt  # noqa: E402


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare(title, forms, device, repeats, target):
    """forms: {name: function}, the straightforward one first -> prints medians and the ratio."""
    seconds = {name: [] for name in forms}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, function in forms.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    medians = [statistics.median(values) for values in seconds.values()]
    shown = "  ".join(f"{name} {1000 * value:.1f} ms" for name, value in zip(forms, medians))
    print(f"{title}: {shown}  ratio {medians[0] / medians[1]:.1f} (target {target})", flush=True)


def ranking_loss_of_all_pairs(scores, targets):
    present, absent = (targets == 1).to(scores.dtype), (targets == -1).to(scores.dtype)
    margins = (1 + scores[:, None, :] - scores[:, :, None]).clamp(min=0)  # [B, C, C]
    margins = margins * (present[:, :, None] * absent[:, None, :])
    violated = (margins > 0).sum((1, 2)).to(scores.dtype)
    return (margins.sum((1, 2)) / (violated + 1e-8)).mean()


def seen_targets(images, labels, device):
    """Six tags an image, as on NUS-WIDE's average; the others absent."""
    targets = torch.full((images, labels), -1, dtype=torch.int8)
    targets.scatter_(1, torch.rand(images, labels).topk(6).indices, 1)
    return targets.to(device)


def bench_ranking_loss(args):
    scores, targets = torch.randn(64, 925, device=args.device), seen_targets(64, 925, args.device)

    def step(function):
        leaf = scores.clone().requires_grad_()
        loss = function(leaf, targets)
        loss.backward()
        return loss, leaf.grad

    straight, ours = step(ranking_loss_of_all_pairs), step(mkt.ranking_loss)
    torch.testing.assert_close(ours, straight, rtol=1e-4, atol=1e-7)
    compare("ranking loss, forward and backward, 64 x 925",
            {"all pairs": lambda: step(ranking_loss_of_all_pairs),
             "ours": lambda: step(mkt.ranking_loss)}, args.device, args.repeats, ">= 50")
    present = int((targets == 1).sum())
    print(f"  largest tensor: {64 * 925 * 925:,} against {present * 925:,} entries "
          f"({64 * 925 * 925 / (present * 925):.0f} times less)")


def bench_stage_1(args):
    torch.manual_seed(0)
    clip = clip_model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 1).initialize_parameters()
    clip.tokenizer = clip_model.load("toy")[0].tokenizer  # any will do: texts are random here
    model = mkt.MKT(clip.to(args.device).eval(), topk=16).to(args.device)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    z, targets = torch.randn(925, 512, device=args.device), seen_targets(args.batch_size, 925,
                                                                         args.device)
    student, options = copy.deepcopy(clip.visual), Namespace(distillation=1.0)
    for block in model.blocks:  # where the student is the teacher, |difference| has no gradient
        for parameter in block.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    for i in (10, 11):
        student.transformer.resblocks[i].load_state_dict(model.blocks[i - 10].state_dict())
        student.transformer.resblocks[i].requires_grad_()
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
        loss = mkt.stage_loss(model, 1, images, targets, z, options)[0]
        loss.backward()
        return loss.item(), model.proj.grad

    torch.testing.assert_close(ours(), straight(), rtol=1e-3, atol=1e-5)
    compare(f"stage 1, ViT-B/16, 925 labels, batch {args.batch_size}",
            {"full student and teacher": straight, "ours": ours}, args.device, args.repeats,
            ">= 1.5")
    if args.device.startswith("cuda"):
        for name, function in (("straightforward", straight), ("ours", ours)):
            torch.cuda.reset_peak_memory_stats()
            function()
            print(f"  {name}: {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB at the peak")


def bench_stage_2(args):
    torch.manual_seed(0)
    clip = clip_model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12).initialize_parameters()
    clip.tokenizer = clip_model.load("toy")[0].tokenizer
    model = mkt.MKT(clip.to(args.device).eval(), topk=16).to(args.device)
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
        global_, local = clip.visual.dense(images)  # nothing is frozen for autograd's eyes
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
        loss = mkt.stage_loss(model, 2, images, targets, prompts, None)[0]
        loss.backward()
        return loss.item(), model.context.grad.clone()

    clip.visual.requires_grad_()
    torch.testing.assert_close(ours(), straight(), rtol=1e-3, atol=1e-5)
    compare(f"stage 2, ViT-B/16, {args.labels} labels, batch {args.batch_size}",
            {"77 tokens, image encoder with gradients": straight, "ours": ours}, args.device,
            max(1, args.repeats // 3), ">= 3")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--labels", type=int, default=100,
                        help="of stage 2 (925 want 30 GB in the straightforward form)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads")
    bench_ranking_loss(arguments)
    bench_stage_1(arguments)
    bench_stage_2(arguments)
