"""What a method must beat: the simplest things to try first, on the same frozen CLIP.

    python bench/baselines.py --partial 0.003 0.01 0.1 0.3 0.5 1
    python bench/baselines.py --single-positive --seed 1

For labels of which only a part is known, on the toy world with toy-RN:
 - logistic regression on the global embedding of the image, its weight decay chosen on a tenth of
   the training images;
 - a simple head: every location through a small MLP, compared with one free vector a label that
   starts at the label's zero-shot text embedding, pooled by a softmax; the loss is TRM-ML's, the
   learning rate is chosen on a tenth of the training images;
 - the same head, every unknown label assumed absent.
Normalised zero-shot CLIP is in the table of every script.
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

    def __init__(self, labels, temperature=100.0):
        super().__init__()
        size = labels.shape[1]
        self.labels = nn.Parameter(labels.clone())
        self.norm = nn.LayerNorm(size)
        self.hidden = nn.Linear(size, size)
        self.last = nn.Linear(size, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.bias = nn.Parameter(torch.full((len(labels),), 0.05).logit())
        self.temperature = temperature

    def forward(self, x):
        x = x[:, 1:]  # locations
        x = F.normalize(x + self.last(F.gelu(self.hidden(self.norm(x)))), dim=-1)
        similarity = x @ self.labels.T  # [B, L, C]; a label's length is its scale
        weights = (self.temperature * similarity).softmax(dim=1)
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


def chosen_head(labels, x, targets, known, seed):
    """The head at the learning rate that does best on the known labels of a tenth of the images,
    trained on all; at the highest where these tell nothing, as with single positives."""
    held_out, best, chosen = len(x) // 10, -1.0, 3e-3
    for lr in (3e-3, 1e-3, 3e-4):
        head = train_head(labels, x[held_out:], targets[held_out:], seed, lr)
        # of all labels together: a few known entries are enough
        scores, truth = score(head, x[:held_out]), known[:held_out]
        value = metrics.mean_average_precision(scores.reshape(-1, 1), truth.reshape(-1, 1))
        if value > best:
            best, chosen = value, lr
    return train_head(labels, x, targets, seed, chosen)


def logistic_regression(x, known, weight_decays, steps=30):
    """Binary cross-entropy of the known entries, all images at once; -> weights [D + 1, C] for
    every weight decay, from the strongest: each starts where the one before has ended."""
    x = F.pad(x, (0, 1), value=1.0)
    weights = torch.zeros(x.shape[1], known.shape[1], requires_grad=True)
    target, mask = (known == 1).float(), (known != 0).float()
    found = []
    for weight_decay in weight_decays:
        optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(x @ weights, target, mask, reduction="sum")
            loss = loss / mask.sum() + weight_decay * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(weights.detach().clone())
    return found


@torch.no_grad()
def score(model, x):
    return torch.cat([model(part.float()) for part in x.split(500)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--partial", type=float, nargs="+", default=[])
    parser.add_argument("--single-positive", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many images of each split")
    parser.add_argument("--output", help="write the rows to this JSON file")
    args = parser.parse_args(argv)
    options, _ = trm_ml.arguments(["--data", "toy", "--quiet"])
    clip, preprocess = clip_model.load("toy-RN")
    train = data.load_dataset("toy", None, "train", preprocess, zero_shot=False, limit=args.limit)
    test = data.load_dataset("toy", None, "test", preprocess, zero_shot=False, limit=args.limit)
    x, test_x = trm_ml.embed(clip, train, options), trm_ml.embed(clip, test, options)
    labels = trm_ml.zero_shot_embeddings(clip, train.labels, trm_ml.TEMPLATES)

    settings = {f"{100 * share:g}% known": data.keep_partial(train.full_targets, share, 0)
                for share in args.partial}
    if args.single_positive:
        settings["single positive"] = data.keep_single_positive(train.full_targets, 1200)
    rows = []
    for setting, known in settings.items():
        known = known[train.rows]

        def add(name, scores):
            result = metrics.mean_average_precision(scores, test.targets)
            rows.append({"name": f"{name}, {setting}", "kind": "baseline", "mAP": result})
            print(f"{rows[-1]['name']:70}{100 * result:6.1f}", flush=True)

        # a tenth of the images selects; unknown is absent where no absent label is known
        usable = known if (known == -1).any() else torch.where(known == 1, 1, -1).char()
        images, held_out = x[:, 0].float(), len(x) // 10
        best, chosen = -1.0, None
        weight_decays = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
        for weights in logistic_regression(images[held_out:], usable[held_out:], weight_decays):
            scores = F.pad(images[:held_out], (0, 1), value=1.0) @ weights
            value = metrics.mean_average_precision(scores, usable[:held_out])
            if value > best:
                best, chosen = value, weights
        add("logistic regression", F.pad(test_x[:, 0].float(), (0, 1), value=1.0) @ chosen)
        if (known == -1).any():
            head = chosen_head(labels, x, known, known, args.seed)
            add("simple head", score(head, test_x))
        assumed = torch.where(known == 0, -1, known).char()
        head = chosen_head(labels, x, assumed, known, args.seed)
        add("simple head, unknown is absent", score(head, test_x))
    if args.output:
        data.write_file(args.output, json.dumps({"rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
