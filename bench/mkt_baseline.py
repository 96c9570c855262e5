"""The simplest trained opponent of MKT: what is the training of CLIP's own blocks worth?

    python bench/mkt_baseline.py --seed 1

Frozen embeddings of the toy world's scenes by toy-ViT, whole image and patches, pass through a
residual MLP or a linear map, which starts as the identity. Scores, ranking, distillation and the
schedule are MKT's own, of its stage 1; a tenth of the training images chooses the learning rate.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model  # noqa: E402
import data  # noqa: E402
import metrics  # noqa: E402
import mkt  # noqa: E402


class ResidualMLP(nn.Module):
    """Embeddings [..., D] -> [..., D]."""

    def __init__(self, size):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(),
                                 nn.Linear(4 * size, size))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x):
        return x + self.mlp(x)


def linear_map(size):
    layer = nn.Linear(size, size)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def embed(clip, dataset, args):
    """float16 [N, 1 + L, D]: the class token's embedding, then the patches'."""
    images = torch.utils.data.DataLoader(dataset, args.batch_size)
    parts = [clip.encode_image_dense(batch) for batch, _ in images]
    return torch.cat([torch.cat([whole[:, None], local], dim=1).half() for whole, local in parts])


@torch.no_grad()
def score(head, x, z, args):
    parts = [head(part.float()) for part in x.split(500)]
    return torch.cat([mkt.two_stream_scores(part[:, 1:], part[:, 0], z, args.topk)
                      for part in parts])


def train(make, x, targets, z, lr, args):
    """A head on embeddings x with the seen labels' targets [N, C] and embeddings z [C, D]."""
    torch.manual_seed(args.seed)
    head = make(x.shape[-1])
    optimizer = mkt.make_optimizer([[*head.parameters()]], lr)
    steps = -(-len(x) // args.batch_size)
    for epoch in range(args.epochs):
        for step, rows in enumerate(torch.randperm(len(x)).split(args.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = mkt.learning_rate(epoch + step / steps, lr, mkt.MINIMUM_LR_1,
                                                args.epochs, args.warmup_epochs)
            before = x[rows].float()
            after = head(before)
            scores = mkt.two_stream_scores(after[:, 1:], after[:, 0], z, args.topk)
            loss = mkt.ranking_loss(scores, targets[rows])
            loss = loss + args.distillation * F.l1_loss(after[:, 0], before[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many images of each split")
    parser.add_argument("--output", help="write the rows to results.json in this folder")
    options = parser.parse_args()
    args, _ = mkt.arguments(["--data", "toy", "--seed", str(options.seed), "--device", "cpu"])
    clip, preprocess = clip_model.load("toy-ViT")
    train_set, test = (data.load_dataset("toy", None, split, preprocess, limit=options.limit)
                       for split in ("train", "test"))
    train_set = train_set.subset(train_set.shows())
    x, test_x = (embed(clip, dataset, args) for dataset in (train_set, test))
    targets = train_set.targets[:, train_set.seen]
    model = mkt.MKT(clip, args.topk)
    with torch.no_grad():
        z = model.label_embeddings(model.prompts(test.labels))
    seen = z[test.seen]
    held_out = len(x) // 10
    rows = []
    for name, make in (("linear map", linear_map), ("residual MLP", ResidualMLP)):
        def quality(lr):
            head = train(make, x[held_out:], targets[held_out:], seen, lr, args)
            scores = score(head, x[:held_out], seen, args)
            return metrics.mean_average_precision(scores, targets[:held_out])

        lr = max((3e-4, 1e-3, 3e-3), key=quality)
        head = train(make, x, targets, seen, lr, args)
        scores = {(name, prefix): score(head, test_x, z[index], args)
                  for prefix, index in metrics.in_play(test).items()}
        rows.append(metrics.table_row(name, "baseline", scores, test, (3, 5)))
        print(f"{name}, learning rate {lr:g}: unseen labels {100 * rows[-1]['zsl_mAP']:.1f}, "
              f"all labels {100 * rows[-1]['gzsl_mAP']:.1f}", flush=True)
    if options.output:
        data.write_file(f"{options.output}/results.json", json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
