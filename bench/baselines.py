"""What a method must beat: the simplest things to try first, on the same frozen CLIP.

    python bench/baselines.py --partial 0.003 0.01 0.1 0.3 0.5 --seed 1

For labels of which only a part is known, or a single positive an image, on the toy world, toy-RN:
 - logistic regression on the global embedding of the image;
 - a simple head: every location through a small MLP, compared with one free vector a label that
   starts at the label's zero-shot text embedding, pooled by a softmax; the loss is TRM-ML's;
 - the same head, every unknown label assumed absent.
A tenth of the training images chooses weight decay and learning rate.
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
import trm_ml  # noqa: E402


class SimpleHead(nn.Module):
    """Embeddings x [B, 1 + L, D] -> logits [B, C]; labels: zero-shot embeddings [C, D]."""

    def __init__(self, labels):
        super().__init__()
        size = labels.shape[1]
        self.labels = nn.Parameter(labels.clone())
        self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(),
                                 nn.Linear(size, size))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        self.bias = nn.Parameter(torch.full((len(labels),), 0.05).logit())

    def forward(self, x):
        x = x[:, 1:]  # locations
        x = F.normalize(x + self.mlp(x), dim=-1)
        similarity = x @ self.labels.T  # [B, L, C]; a label's length is its scale
        weights = (100 * similarity).softmax(dim=1)
        return 10 * (weights * similarity).sum(dim=1) + self.bias


def train_head(labels, x, known, seed, lr, epochs=8, batch_size=128):
    torch.manual_seed(seed)
    head = SimpleHead(labels)
    useful = known.any(dim=1)  # without a known label an image teaches nothing
    x, known = x[useful], known[useful]
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            loss = trm_ml.asymmetric_loss(head(x[rows].float()), known[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


@torch.no_grad()
def score(head, x):
    return torch.cat([head(part.float()) for part in x.split(500)])


def chosen_head(labels, x, targets, known, seed):
    """The head at the learning rate that does best on the known labels of a tenth of the images,
    trained on all; at the highest where these tell nothing, as with single positives."""
    held_out = len(x) // 10

    def quality(lr):
        head = train_head(labels, x[held_out:], targets[held_out:], seed, lr)
        # of all labels together: a few known entries are enough
        scores = score(head, x[:held_out]).reshape(-1, 1)
        return metrics.mean_average_precision(scores, known[:held_out].reshape(-1, 1))

    return train_head(labels, x, targets, seed, max((3e-3, 1e-3, 3e-4), key=quality))


def logistic_regression(x, known):
    """Weights [D + 1, C] for binary cross-entropy on the known entries of nine tenths of the
    images; of the weight decays the one that does best on the others."""
    held_out = len(x) // 10
    weights = torch.zeros(x.shape[1], known.shape[1], requires_grad=True)
    target, mask = (known[held_out:] == 1).float(), (known[held_out:] != 0).float()
    found = []
    for weight_decay in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):  # each starts where the last ended
        optimizer = torch.optim.LBFGS([weights], max_iter=30, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = x[held_out:] @ weights
            loss = F.binary_cross_entropy_with_logits(logits, target, mask, reduction="sum")
            loss = loss / mask.sum() + weight_decay * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(weights.detach().clone())
    return max(found, key=lambda weights: metrics.mean_average_precision(
        x[:held_out] @ weights, known[:held_out]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--partial", type=float, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many images of each split")
    parser.add_argument("--output", help="write the rows to results.json in this folder")
    args = parser.parse_args()
    options, _ = trm_ml.arguments(["--data", "toy", "--quiet"])
    clip, preprocess = clip_model.load("toy-RN")
    train = data.load_dataset("toy", None, "train", preprocess, zero_shot=False, limit=args.limit)
    test = data.load_dataset("toy", None, "test", preprocess, zero_shot=False, limit=args.limit)
    (x, _), (test_x, _) = (trm_ml.embed(clip, part, options) for part in (train, test))
    whole, test_whole = (F.pad(part[:, 0].float(), (0, 1), value=1.0) for part in (x, test_x))
    labels = trm_ml.zero_shot_embeddings(clip, train.labels, trm_ml.TEMPLATES)

    settings = {f"{100 * share:g}% known": data.keep_partial(train.full_targets, share, 0)
                for share in args.partial}
    settings["single positive"] = data.keep_single_positive(train.full_targets, 1200)
    rows = []
    for setting, known in settings.items():
        known = known[train.rows]
        assumed = torch.where(known == 0, -1, known).char()
        some_absent = (known == -1).any()
        weights = logistic_regression(whole, known if some_absent else assumed)
        scores = {"logistic regression": test_whole @ weights}
        if some_absent:
            scores["simple head"] = score(chosen_head(labels, x, known, known, args.seed), test_x)
        head = chosen_head(labels, x, assumed, known, args.seed)
        scores["simple head, unknown is absent"] = score(head, test_x)
        for name, matrix in scores.items():
            result = metrics.mean_average_precision(matrix, test.targets)
            rows.append({"name": f"{name}, {setting}", "mAP": result})
            print(f"{rows[-1]['name']:70}{100 * result:6.1f}", flush=True)
    if args.output:
        data.write_file(f"{args.output}/results.json", json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
