"""Speed of metrics.average_precision beside a loop over scikit-learn's average_precision_score.

    python bench/mean_average_precision.py            # two minutes on two cores
    python bench/mean_average_precision.py --quick

The size is that of NUS-WIDE's test set with seen and unseen labels, every entry known. The loop
has every label's scores and targets contiguous beforehand; the results are asserted to be equal.
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
    parser.add_argument("--positives", type=float, default=0.02, help="share of the entries")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.images, args.labels = 2000, 40

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(args.images, args.labels, generator=generator)
    targets = torch.full(scores.shape, -1, dtype=torch.int8)
    for part_of_scores, part in zip(scores.split(4096), targets.split(4096)):
        part.masked_fill_(torch.rand(part.shape, generator=generator) < args.positives, 1)
        part_of_scores += 0.5 * part  # better than chance
    columns = list(zip((targets == 1).T.contiguous().numpy(), scores.T.contiguous().numpy()))

    def theirs():
        return [average_precision_score(present, s) for present, s in columns]

    def ours():
        return average_precision(scores, targets)

    side_by_side.start()
    np.testing.assert_allclose(ours(), theirs(), rtol=1e-10)
    side_by_side.compare(f"mAP, {args.images:,} x {args.labels:,}", "loop over scikit-learn",
                         theirs, ours, args.repeats, ">= 10", warm_up=False)


if __name__ == "__main__":
    main()
