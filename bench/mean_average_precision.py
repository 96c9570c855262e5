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
    args = side_by_side.parser(__doc__).parse_args()
    images, labels = (2000, 40) if args.quick else (107_859, 1006)
    torch.manual_seed(0)
    targets = torch.full((images, labels), -1, dtype=torch.int8)
    for part in targets.split(4096):
        part.masked_fill_(torch.rand(part.shape) < 0.02, 1)
    scores = torch.randn(images, labels) + 0.5 * targets  # better than chance
    columns = list(zip((targets == 1).T.contiguous().numpy(), scores.T.contiguous().numpy()))

    def theirs():
        return [average_precision_score(present, s) for present, s in columns]

    def ours():
        return average_precision(scores, targets)

    side_by_side.start()
    np.testing.assert_allclose(ours(), theirs(), rtol=1e-10)
    side_by_side.compare(f"mAP, {images:,} x {labels:,}", "loop over scikit-learn",
                         theirs, ours, 3, ">= 10", warm_up=False)


if __name__ == "__main__":
    main()
