import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_the_straightforward_ranking_loss_is_a_loop_over_pairs():
    torch.manual_seed(0)
    scores, targets = torch.randn(3, 5), torch.randint(-1, 2, (3, 5))
    total = 0
    for s, t in zip(scores.tolist(), targets.tolist()):
        margins = [1 + s[n] - s[p] for p in range(5) for n in range(5) if t[p] == 1 and t[n] == -1]
        violated = [margin for margin in margins if margin > 0]
        total += sum(violated) / max(1, len(violated))
    loss = training.ranking_loss_of_all_pairs(scores, targets)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


def test_without_a_gpu_there_is_nothing_to_measure():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "no GPU\n"
