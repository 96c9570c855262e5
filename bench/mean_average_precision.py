"""Speed of metrics.average_precision beside a loop over scikit-learn's average_precision_score.

    python bench/mean_average_precision.py                     # about two minutes on two cores
    python bench/mean_average_precision.py --sklearn-labels 1006    # all of them, ten minutes

The size is that of NUS-WIDE's test set with seen and unseen labels, every entry known. scikit-learn
is run on every n-th label, as its time is a label's times their number, and the results of these
are asserted to be equal.
"""
import side_by_side
import numpy as np
import torch
from sklearn.metrics import average_precision_score

from metrics import average_precision


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--images", type=int, default=107_859)
    parser.add_argument("--labels", type=int, default=1006)
    parser.add_argument("--sklearn-labels", type=int, default=100,
                        help="that scikit-learn is run on")
    parser.add_argument("--positives", type=float, default=0.02, help="share of the entries")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.images, args.labels, args.sklearn_labels = 2000, 40, 20

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(args.images, args.labels, generator=generator)
    targets = torch.full(scores.shape, -1, dtype=torch.int8)
    for part_of_scores, part in zip(scores.split(4096), targets.split(4096)):
        part.masked_fill_(torch.rand(part.shape, generator=generator) < args.positives, 1)
        part_of_scores += 0.5 * part  # better than chance
    columns = torch.linspace(0, args.labels - 1, args.sklearn_labels).round().long()
    some = [(t == 1, s) for t, s in zip(targets[:, columns].T.contiguous().numpy(),
                                        scores[:, columns].T.contiguous().numpy())]

    def theirs():
        return [average_precision_score(present, s) for present, s in some]

    side_by_side.start()
    np.testing.assert_allclose(average_precision(scores, targets)[columns], theirs(), rtol=1e-10)
    seconds = side_by_side.alternate(
        {"theirs": theirs, "ours": lambda: average_precision(scores, targets)}, args.repeats,
        warm_up=False)
    whole = seconds["theirs"] * args.labels / len(columns)
    side_by_side.row(f"mAP, {args.images:,} x {args.labels:,}",
                     f"loop over scikit-learn ({len(columns)} of the labels, scaled up)",
                     side_by_side.duration(whole), side_by_side.duration(seconds["ours"]),
                     whole / seconds["ours"], ">= 20", note="About half of our time is torch's "
                     "radix sort, the fastest exact one at hand (NumPy's takes three times as "
                     "long), a fifth the transposition of the matrix: without compiled code of "
                     "our own little is left to gain.")
    side_by_side.print_notes()


if __name__ == "__main__":
    main()
