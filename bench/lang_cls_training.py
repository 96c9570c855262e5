"""CoMC's training on embeddings that are given, its grammar and the cache of text embeddings.

    python bench/lang_cls_training.py          # three minutes on two cores
    python bench/lang_cls_training.py --quick

Training: lang_cls.train, checkpoints and curves included, beside a straightforward loop: a
DataLoader over a TensorDataset, and every ranking pair formed, B x C x C. The size is
the paper's, 40,000 sentences, 80 labels, 1,024 dimensions, batches of 512; the straightforward
loop is run for a few batches, its 20 epochs are scaled up. Both losses of the first batches are
asserted to be equal. Embeddings are random, with their labels' directions in them.
"""
import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import side_by_side
import torch
from side_by_side import duration, row
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import clip_model
import data
import lang_cls


def embedded_sentences(count, labels, size):
    """Unit-length embeddings [N, D] of 1 to 5 labels each, targets int8 [N, C]."""
    targets = torch.full((count, labels), -1, dtype=torch.int8)
    order = torch.rand(count, labels).argsort(dim=1)[:, :5]
    for number in range(1, 6):  # every fifth sentence has this many
        rows = torch.arange(number - 1, count, 5)
        targets[rows[:, None], order[rows, :number]] = 1
    directions = F.normalize(torch.randn(labels, size), dim=1)
    mixed = (targets == 1).float() @ directions + 0.02 * torch.randn(count, size)
    return F.normalize(mixed, dim=1), targets


def ranking_loss_of_all_pairs(logits, targets):
    present, absent = (targets > 0).float(), (targets < 0).float()
    margins = (1 - logits[:, :, None] + logits[:, None, :]).clamp(min=0)  # [B, C, C]
    return (margins * present[:, :, None] * absent[:, None, :]).sum((1, 2)).mean()


def straightforward(embeddings, targets, weight, noise, lr, steps):
    """A few steps in the dataset's order -> their losses."""
    weight = nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([weight], lr=lr)
    losses = []
    loader = DataLoader(TensorDataset(embeddings, targets), batch_size=512,
                        generator=torch.Generator())  # it takes nothing from the noise's
    for batch, labels in loader:
        optimizer.zero_grad()
        noisy = batch + noise * torch.randn_like(batch)
        loss = ranking_loss_of_all_pairs(noisy @ weight.T, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == steps:
            break
    return losses


def bench_training(args, folder):
    torch.manual_seed(0)
    embeddings, targets = embedded_sentences(args.sentences, args.labels, args.size)
    weight = nn.Linear(args.size, args.labels, bias=False).weight.detach()
    options = Namespace(device="cpu", val_fraction=0.0, lr=1e-3, epochs=args.epochs, seed=0,
                        batch_size=512, noise=0.1, output=folder, quiet=True)

    def new_state():
        return {"epoch": 0, "optimizer": None, "log": [], "seconds": 0.0}

    def ours(embeddings, targets, **changes):
        state, model = new_state(), lang_cls.CoMC(weight.clone(), embeddings[:1])
        lang_cls.train(model, embeddings, targets, Namespace(**{**vars(options), **changes}), state)
        return state["log"]

    # the same batches, noise and learning rate: an epoch of two batches, in lang_cls's order
    two = min(1024, args.sentences)
    torch.manual_seed(0)  # as lang_cls.train seeds its first epoch
    kept = torch.randperm(two, generator=torch.Generator().manual_seed(0))
    order = kept[torch.randperm(two)]
    losses = straightforward(embeddings[order], targets[order], weight, 0.1, 1e-5, 2)
    log = ours(embeddings[:two], targets[:two], epochs=1)
    torch.testing.assert_close(sum(losses) / 2, log[0]["loss"], rtol=1e-5, atol=0)

    steps, begin = -(-args.sentences // 512), time.perf_counter()
    log = ours(embeddings, targets)
    seconds = time.perf_counter() - begin
    assert log[-1]["loss"] < log[0]["loss"], "it does not learn"
    few, begin = min(args.steps, steps), time.perf_counter()
    straightforward(embeddings, targets, weight, 0.1, 1e-3, few)
    theirs = (time.perf_counter() - begin) * steps / few * args.epochs
    row(f"CoMC training, {args.sentences:,} sentences, {args.epochs} epochs, {args.labels} labels",
        f"B x C x C, DataLoader ({few} steps, scaled up)", duration(theirs), duration(seconds),
        theirs / seconds, "< 60 s", missed=seconds >= 60)
    batch, labels = embeddings[:512] @ weight.T, targets[:512]

    def loss_of(function):
        leaf = batch.clone().requires_grad_()
        function(leaf, labels).backward()
        return leaf.grad

    work, forms = f"CoMC ranking loss, forward and backward, 512 x {args.labels}", (
        lambda: loss_of(ranking_loss_of_all_pairs), lambda: loss_of(lang_cls.ranking_loss))
    torch.testing.assert_close(*(form() for form in forms))
    side_by_side.compare(work, "B x C x C", *forms, args.repeats)
    side_by_side.compare_memory(work, "B x C x C", *forms)


def bench_grammar(args):
    begin = time.perf_counter()
    sentences, _ = data.grammar_sentences(data.COCO_LABELS, args.sentences)
    seconds = time.perf_counter() - begin
    row(f"grammar, {len(sentences):,} sentences, {len(data.COCO_LABELS)} labels", "", "",
        duration(seconds), f"{len(sentences) / seconds:,.0f} a second")
    return sentences


def bench_embedding_cache(sentences, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    clip, _ = clip_model.load("toy-RN")

    def embed():
        begin = time.perf_counter()
        embeddings = lang_cls.embed_texts(clip, sentences, quiet=True)
        return embeddings, time.perf_counter() - begin

    (first, theirs), (second, ours) = embed(), embed()
    assert torch.equal(first, second)
    row(f"embed_texts, {len(sentences):,} sentences, toy-RN", "the first call",
        duration(theirs), duration(ours), theirs / ours)


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--sentences", type=int, default=40_000)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--size", type=int, default=1024, help="of an embedding")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="of the straightforward loop")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.sentences, args.labels, args.size, args.epochs, args.steps = 2000, 10, 32, 3, 2
        args.repeats = 2
    side_by_side.start()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run").mkdir()
        bench_training(args, f"{folder}/run")
        bench_embedding_cache(bench_grammar(args)[:100 if args.quick else 5000], folder)


if __name__ == "__main__":
    main()
