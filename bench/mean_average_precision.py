"""Speed of metrics.average_precision beside a loop over scikit-learn's average_precision_score.

    python bench/mean_average_precision.py                 # about a minute on two cores
    python bench/mean_average_precision.py --labels 100    # a tenth of that

The size is that of NUS-WIDE's test set with seen and unseen labels, every entry known. The two
take turns in one process on the same scores, the median of the rounds counts, and the results are
asserted to be equal.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from metrics import average_precision

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=107859)
parser.add_argument("--labels", type=int, default=1006)
parser.add_argument("--positives", type=float, default=0.02, help="share of the entries")
parser.add_argument("--rounds", type=int, default=3)
args = parser.parse_args()

generator = torch.Generator().manual_seed(0)
scores = torch.randn(args.images, args.labels, generator=generator)
targets = torch.full(scores.shape, -1, dtype=torch.int8)
targets.masked_fill_(torch.rand(scores.shape, generator=generator) < args.positives, 1)
scores += 0.5 * targets   # better than chance


def scikit_learn():
    return [average_precision_score(t == 1, s) for s, t in zip(scores.numpy().T, targets.numpy().T)]


seconds = {"metrics.py": [], "scikit-learn": []}
for _ in range(args.rounds):
    begin = time.perf_counter()
    ours = average_precision(scores, targets)
    middle = time.perf_counter()
    theirs = scikit_learn()
    seconds["metrics.py"].append(middle - begin)
    seconds["scikit-learn"].append(time.perf_counter() - middle)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)

print(f"average precision, {args.images:,} images x {args.labels:,} labels, "
      f"{torch.get_num_threads()} threads, median of {args.rounds}")
for name, times in seconds.items():
    print(f"{name:14}{statistics.median(times):8.2f} s   ({min(times):.2f} - {max(times):.2f})")
ratio = statistics.median(seconds["scikit-learn"]) / statistics.median(seconds["metrics.py"])
print(f"{ratio:.1f} times as fast")
