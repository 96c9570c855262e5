"""What a method must beat: the simplest things to try first, on the same frozen CLIP.

    python bench/baselines.py --partial 0.003 0.01 0.1 0.3 0.5 --seed 1
    python bench/baselines.py --partial 0.003 --scenes 3   # to choose by, not the test scenes

For labels of which only a part is known, or a single positive an image, on the toy world, toy-RN:
 - zero-shot CLIP as probabilities, a softmax over the labels, which needs no training;
 - logistic regression on the global embedding of the image;
 - a simple head: every location through a small MLP, compared with one free vector a label that
   starts at the label's zero-shot text embedding, pooled by a softmax; the loss is TRM-ML's;
 - the simple head whose logits have the log-odds of zero-shot CLIP's probabilities added, times
   one learned weight;
 - text-image and text-pixel matching: TRM-ML's learned texts and MLP, without regions and
   without estimates of unknown labels.
With a single positive no absent label is known: all but zero-shot CLIP assume unknown ones absent.
A tenth of the training images chooses weight decay and learning rate; the two matchings have
TRM-ML's rate.
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
from toy import world  # noqa: E402


def use_scenes(dataset, seed):
    """Replace the dataset's scenes and targets by those of another seed."""
    dataset.images = world.Scenes(len(dataset), seed)
    dataset.full_targets.fill_(-1)
    for index, targets in enumerate(dataset.full_targets):
        for thing, *_ in world.scene_objects("benchmark", seed, index):
            targets[thing] = 1


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


class ZeroShotHead(SimpleHead):
    """SimpleHead, its logits added to zero-shot CLIP's log-odds times one learned weight."""

    def __init__(self, labels, scale):
        super().__init__(labels)
        self.zero_shot, self.scale = labels, scale
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        log_odds = trm_ml.clip_log_odds(x, self.zero_shot, self.scale)
        return super().forward(x) + self.weight * log_odds


class Matching(trm_ml.TRM):
    """What both matchings share with TRM-ML: the labels' learned texts and the MLP."""

    def refine(self, x):
        return F.normalize(x + self.mlp(x), dim=-1)


class ImageMatching(Matching):
    """The whole image's embedding through the MLP, matched with the labels' learned texts."""

    def forward(self, x):
        similarity = self.refine(x[:, 0]) @ self.texts().T
        return self.log_scale.exp() * similarity + self.bias


class PixelMatching(Matching):
    """Every location's, weighted by a softmax of their similarities; ours (DualCoOp has another
    temperature, two prompts a label and no MLP)."""

    def forward(self, x):
        similarity = self.refine(x[:, 1:]) @ self.texts().T  # [B, L, C]
        weights = (self.clip.logit_scale.exp() * similarity).softmax(dim=1)
        return self.log_scale.exp() * (weights * similarity).sum(dim=1) + self.bias


def train_head(make_head, x, known, seed, lr, epochs=8, batch_size=128):
    torch.manual_seed(seed)
    head = make_head()
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


def chosen_head(make_head, x, targets, known, seed):
    """The head at the learning rate that does best on the known labels of a tenth of the images,
    trained on all; at the highest where these tell nothing, as with single positives."""
    held_out = len(x) // 10

    def quality(lr):
        head = train_head(make_head, x[held_out:], targets[held_out:], seed, lr)
        # of all labels together: a few known entries are enough
        scores = score(head, x[:held_out]).reshape(-1, 1)
        return metrics.mean_average_precision(scores, known[:held_out].reshape(-1, 1))

    return train_head(make_head, x, targets, seed, max((3e-3, 1e-3, 3e-4), key=quality))


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
    parser.add_argument("--scenes", type=int, metavar="SEED",
                        help="evaluate on scenes of this seed (the test scenes)")
    parser.add_argument("--limit", type=int, help="only so many images of each split")
    parser.add_argument("--output", help="write the rows to results.json in this folder")
    args = parser.parse_args()
    options, _ = trm_ml.arguments(["--data", "toy", "--quiet"])
    clip, preprocess = clip_model.load("toy-RN")
    train = data.load_dataset("toy", None, "train", preprocess, zero_shot=False, limit=args.limit)
    test = data.load_dataset("toy", None, "test", preprocess, zero_shot=False, limit=args.limit)
    if args.scenes is not None:
        use_scenes(test, args.scenes)
    (x, _), (test_x, _) = (trm_ml.embed(clip, part, options) for part in (train, test))
    whole, test_whole = (F.pad(part[:, 0].float(), (0, 1), value=1.0) for part in (x, test_x))
    labels = clip_model.zero_shot_embeddings(clip, train.labels)
    scale = clip.logit_scale.exp().item()

    rows = []

    def report(name, scores):
        result = metrics.mean_average_precision(scores, test.targets)
        rows.append({"name": name, "mAP": result})
        print(f"{name:70}{100 * result:6.1f}", flush=True)

    report("zero-shot, as probabilities", trm_ml.clip_log_odds(test_x.float(), labels, scale))
    settings = {f"{100 * share:g}% known": data.keep_partial(train.full_targets, share, 0)
                for share in args.partial}
    settings["single positive"] = data.keep_single_positive(train.full_targets, 1200)
    for setting, known in settings.items():
        known = known[train.rows]
        targets = known
        if setting == "single positive":
            targets = torch.where(known == 0, -1, known).char()
        report(f"logistic regression, {setting}",
               test_whole @ logistic_regression(whole, targets))
        head = chosen_head(lambda: SimpleHead(labels), x, targets, known, args.seed)
        report(f"simple head, {setting}", score(head, test_x))
        head = chosen_head(lambda: ZeroShotHead(labels, scale), x, targets, known, args.seed)
        report(f"simple head + zero-shot CLIP, {setting}", score(head, test_x))
        for name, matching in (("text-image matching", ImageMatching),
                               ("text-pixel matching", PixelMatching)):
            head = train_head(lambda: matching(clip, train.labels), x, targets, args.seed,
                              options.lr)
            report(f"{name}, {setting}", score(head, test_x))
    if args.output:
        data.write_file(f"{args.output}/results.json", json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
