"""How time and memory grow with the number of labels and of images.

    python bench/growth.py            # a minute
    python bench/growth.py --quick

A row: three sizes, each ten times the one before, and the exponent of the power of the size that
fits them best (least squares of the logarithms). 1 is linear, and nothing here should be above it;
below it, what costs the same at every size still counts. Memory under 1 MiB counts as 1 MiB.
"""
import math

import side_by_side
import torch
from side_by_side import duration, memory, row

import metrics
import mkt


def exponent(sizes, values):
    """Slope of log value over log size, least squares."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return (sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
            / sum((a - mean_x) ** 2 for a in x))


def problem(images, labels):
    """Random scores, and targets with 1 label in 20 present."""
    scores = torch.randn(images, labels)
    return scores, torch.where(torch.rand(images, labels) < 0.05, 1, -1).to(torch.int8)


def mean_average_precision(images, labels):
    scores, targets = problem(images, labels)
    return lambda: metrics.mean_average_precision(scores, targets)


def f1_at_k(images, labels):
    scores, targets = problem(images, labels)
    return lambda: metrics.precision_recall_f1_at_k(scores, targets, 3)


def ranking_loss(images, labels):
    """Six labels an image, however many there are, as people tag."""
    scores = torch.randn(images, labels, requires_grad=True)
    targets = torch.full(scores.shape, -1, dtype=torch.int8)
    targets.scatter_(1, torch.rand(images, labels).topk(6, dim=1).indices, 1)
    return lambda: torch.autograd.grad(mkt.ranking_loss(scores, targets), scores)


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    labels, images, batches = (100, 1000, 10_000), (1000, 10_000, 100_000), (64, 640, 6400)
    if args.quick:
        labels, images, batches, args.repeats = (10, 30, 90), (10, 30, 90), (2, 4, 8), 1
    side_by_side.start()
    for name, make, numbers in (("mAP", mean_average_precision, images),
                                ("precision, recall, F1 at 3", f1_at_k, images),
                                ("MKT ranking loss, forward and backward", ranking_loss, batches)):
        for what, sizes in (
                (f"labels, {numbers[0]:,} images", [(numbers[0], count) for count in labels]),
                (f"images, {labels[0]:,} labels", [(count, labels[0]) for count in numbers])):
            counts = labels if what.startswith("labels") else numbers
            seconds, peaks = [], []
            for size in sizes:
                function = make(*size)
                seconds.append(side_by_side.alternate({"": function}, args.repeats)[""])
                peaks.append(max(2 ** 20, side_by_side.peak_beyond(function)))  # noise below it
            work = f"{name}, {' / '.join(f'{count:,}' for count in counts)} {what}"
            for title, values, shown in (("time", seconds, duration), ("memory", peaks, memory)):
                power = exponent(counts, values)
                row(f"{work}: {title}", "their number", "", " / ".join(map(shown, values)),
                    f"exponent {power:.2f}", "about 1, or less", missed=power > 1.1)


if __name__ == "__main__":
    main()
