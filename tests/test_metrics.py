import doctest
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
from metrics import (average_precision, f1_at_threshold, mean_average_precision,
                     precision_recall_f1_at_k)

NAN = float("nan")


def random_problem(images, labels, seed=0, unknown=0.3, steps=8):
    """Scores on a few values, so that most are tied, and targets in {-1, 0, +1}."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-steps, steps + 1, (images, labels), generator=generator) / steps
    draw = torch.rand(images, labels, generator=generator)
    targets = torch.where(draw < unknown, 0, torch.where(draw < 0.5 + unknown / 2, 1, -1))
    return scores, targets.to(torch.int8)


def average_precision_by_loop(scores, targets):
    """One column, straight from the definition, without a sort."""
    known = [(s, t) for s, t in zip(scores.tolist(), targets.tolist()) if t != 0]
    precisions = []
    for score in (s for s, t in known if t == 1):
        at_least = [t for s, t in known if s >= score]
        precisions.append(at_least.count(1) / len(at_least))
    return sum(precisions) / len(precisions) if precisions else NAN


# ---- average precision

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_average_precision_equals_the_definition(dtype):
    scores, targets = random_problem(60, 25)
    result = average_precision(scores.to(dtype), targets)
    expected = [average_precision_by_loop(scores[:, c], targets[:, c]) for c in range(25)]
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("steps", [2, 20, 10 ** 6])  # nearly all tied ... hardly any
@pytest.mark.parametrize("unknown", [0, 0.5])
def test_average_precision_equals_scikit_learns(steps, unknown):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = (x.numpy() for x in random_problem(700, 12, unknown=unknown, steps=steps))
    expected = []
    for s, t in zip(scores.T, targets.T):
        expected.append(sklearn_metrics.average_precision_score(t[t != 0] == 1, s[t != 0]))
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=1e-12)
    assert mean_average_precision(scores, targets) == pytest.approx(np.mean(expected), rel=1e-12)


def test_average_precision_in_closed_form():
    n = 10
    rising = torch.arange(n, dtype=torch.float32)
    first, last = -torch.ones(n, dtype=torch.int8), -torch.ones(n, dtype=torch.int8)
    first[-3:], last[0] = 1, 1
    scores = torch.stack([rising, rising, torch.zeros(n)], dim=1)
    targets = torch.stack([first, last, first], dim=1)
    # the three positives on top; the only one at the bottom; all tied: the share of positives
    torch.testing.assert_close(average_precision(scores, targets),
                               torch.tensor([1, 1 / n, 3 / n], dtype=torch.float64))


def test_a_label_without_positives_is_nan_and_left_out_of_the_mean():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.2, 0.3, 0.1, 0.5], [0.3, 0.2, 0.2, 0.4]])
    targets = torch.tensor([[1, -1, 0, 1], [-1, -1, 0, 1], [-1, -1, 0, 1]])
    # columns: positive last of three; no positive; all unknown; no negative
    np.testing.assert_allclose(average_precision(scores, targets), [1 / 3, NAN, NAN, 1])
    assert mean_average_precision(scores, targets) == pytest.approx(2 / 3)
    assert math.isnan(mean_average_precision(scores[:, 1:3], targets[:, 1:3]))


def test_sizes_of_one_and_of_none():
    one = torch.ones(1, 1)
    assert average_precision(one, one.int()).tolist() == [1]
    assert average_precision(one, -one.int()).isnan().tolist() == [True]
    assert average_precision(torch.rand(1, 3), torch.tensor([[1, 0, 1]])).shape == (3,)
    assert mean_average_precision(torch.rand(5, 1), torch.ones(5, 1).int()) == 1
    np.testing.assert_allclose(average_precision(SCORES[:0], TARGETS[:0]), [NAN] * 4)
    assert average_precision(torch.rand(3, 0), torch.ones(3, 0).int()).shape == (0,)
    assert math.isnan(mean_average_precision(torch.rand(3, 0), torch.ones(3, 0).int()))


def test_the_order_of_the_images_does_not_matter():
    scores, targets = random_problem(500, 6)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(average_precision(scores[order], targets[order]),
                       average_precision(scores, targets))


def test_unknown_entries_have_no_influence():
    scores, targets = random_problem(200, 6)
    changed = scores.masked_fill(targets == 0, torch.inf)
    assert torch.equal(average_precision(changed, targets), average_precision(scores, targets))
    # not even where the known ones have the lowest score there is
    changed = torch.full_like(scores, -torch.inf)
    share = (targets == 1).sum(0) / (targets != 0).sum(0)
    np.testing.assert_allclose(average_precision(changed, targets), share, rtol=1e-6)


def test_zeros_of_either_sign_are_tied_and_infinities_are_ranked():
    targets = torch.tensor([[1], [-1], [-1], [1]])
    assert average_precision(torch.tensor([[0.0], [-0.0], [-1], [1]]), targets) == (1 + 2 / 3) / 2
    inf = math.inf
    assert average_precision(torch.tensor([[-inf], [inf], [2.0], [inf]]), targets) == 1 / 2


def test_float64_scores_are_not_rounded():
    scores = np.array([[1 + 1e-12], [1.0]])
    assert average_precision(scores, np.array([[1], [-1]])) == 1
    assert average_precision(scores, np.array([[-1], [1]])) == 0.5


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_other_integers_and_numpy_arrays_are_taken(dtype):
    scores, targets = random_problem(50, 4)
    expected = average_precision(scores, targets)
    assert torch.equal(average_precision(scores, targets.to(dtype)), expected)
    assert torch.equal(average_precision(scores.numpy(), targets.to(dtype).numpy()), expected)


@pytest.mark.parametrize("images", [50, 9000])  # 9000: more rows than are transposed at a time
@pytest.mark.parametrize("chunk", [1, 300])
def test_chunks_and_threads_change_nothing(images, chunk, monkeypatch):
    scores, targets = random_problem(images, 7)
    functions = (average_precision, lambda s, t: precision_recall_f1_at_k(s, t, 3),
                 lambda s, t: f1_at_threshold(s, t, 0.25))
    whole = [f(scores, targets) for f in functions]
    monkeypatch.setattr(metrics, "CHUNK", chunk * images)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            parts = [f(scores.clone().t().contiguous().t(), targets) for f in functions]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(parts[0], whole[0]) and parts[1:] == whole[1:]


def test_scores_that_require_grad_are_fine():
    scores, targets = random_problem(20, 3)
    assert not average_precision(scores.requires_grad_(), targets).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_same():
    scores, targets = random_problem(3000, 40)
    assert average_precision(scores.cuda(), targets.cuda()).is_cuda
    torch.testing.assert_close(average_precision(scores.cuda(), targets.cuda()).cpu(),
                               average_precision(scores, targets), rtol=1e-12, atol=0)
    assert precision_recall_f1_at_k(scores.cuda(), targets, 5) == \
        precision_recall_f1_at_k(scores, targets, 5)
    assert f1_at_threshold(scores.cuda(), targets, 0.5) == \
        pytest.approx(f1_at_threshold(scores, targets, 0.5), rel=1e-12)


SIZE_OF_NUS_WIDE = """
import torch, metrics
def peak():  # VmHWM in MB: unlike ru_maxrss it does not start at the parent's peak
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
torch.set_num_threads(2)
scores = torch.rand(107859, 1006)
targets = torch.full(scores.shape, -1, dtype=torch.int8)
targets[::50] = 1
before = peak()
assert abs(metrics.mean_average_precision(scores, targets) - 0.02) < 0.002
metrics.precision_recall_f1_at_k(scores[:20000], targets[:20000], 3)
metrics.f1_at_threshold(scores[:20000], targets[:20000], 0.5)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_at_the_size_of_nus_wide():
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", SIZE_OF_NUS_WIDE], cwd=root, text=True,
                         capture_output=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 120   # MB; the scores alone are 434, a sort of them 1,302


# ---- precision, recall and F1 at k

def f1_at_k_by_loop(scores, targets, k):
    hits = predictions = positives = 0
    for s, t in zip(scores.tolist(), targets.tolist()):
        known = [c for c in range(len(t)) if t[c] != 0]
        predicted = sorted(known, key=lambda c: (-s[c], c))[:k]
        hits += sum(t[c] == 1 for c in predicted)
        predictions += len(predicted)
        positives += t.count(1)
    precision, recall = hits / predictions, hits / positives
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("k", [1, 3, 9, 10])
@pytest.mark.parametrize("unknown", [0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_f1_at_k_equals_a_loop(k, unknown, dtype):
    scores, targets = random_problem(200, 10, unknown=unknown, steps=3)
    scores[scores == -1] = -torch.inf   # the value that no unknown entry may be mistaken for
    expected = f1_at_k_by_loop(scores, targets, k)
    assert precision_recall_f1_at_k(scores.to(dtype), targets, k) == pytest.approx(expected, 1e-12)


def test_f1_at_k_in_closed_form():
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.4], [0.2, 0.2, 0.2, 0.1]])
    targets = torch.tensor([[0, 1, -1, 1], [-1, 1, 1, -1]])
    # k = 2: labels 1 and 3 (0 is unknown), then of three tied ones the two on the left, 0 and 1
    assert precision_recall_f1_at_k(scores, targets, 2) == (3 / 4, 3 / 4, 3 / 4)
    # k = 4: the first image has three known labels only
    assert precision_recall_f1_at_k(scores, targets, 4) == pytest.approx((4 / 7, 1, 8 / 11))


def test_f1_at_k_without_positives_or_images_is_zero():
    scores = torch.rand(3, 4)
    for targets in (-torch.ones(3, 4).int(), torch.zeros(3, 4).int()):
        assert precision_recall_f1_at_k(scores, targets, 2) == (0, 0, 0)
    assert precision_recall_f1_at_k(scores[:0], targets[:0], 2) == (0, 0, 0)


@pytest.mark.parametrize("k", [0, -1, 5, 2.5])
def test_f1_at_an_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"1 to the number of labels, 4; it is {k}"):
        precision_recall_f1_at_k(torch.rand(3, 4), torch.ones(3, 4).int(), k)


# ---- precision, recall and F1 at a threshold

@pytest.mark.parametrize("threshold", [-0.5, 0, 0.75])
def test_f1_at_threshold_equals_scikit_learns(threshold):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = random_problem(300, 9, unknown=0)
    targets[:, 4] = -1   # no positive: in the overall figures only
    actual, predicted = (targets == 1).numpy(), (scores >= threshold).numpy()
    (cp, cr), (op, or_, of1) = (
        sklearn_metrics.precision_recall_fscore_support(
            actual, predicted, average=average, labels=labels, zero_division=0)[:count]
        for average, labels, count in (("macro", [0, 1, 2, 3, 5, 6, 7, 8], 2), ("micro", None, 3)))
    assert f1_at_threshold(scores, targets, threshold) == pytest.approx(
        {"CP": cp, "CR": cr, "CF1": 2 * cp * cr / (cp + cr), "OP": op, "OR": or_, "OF1": of1})


def test_f1_at_threshold_in_closed_form():
    # columns: one hit, one false alarm; a positive never predicted; no positive; unknown
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.9], [0.5, 0.2, 0.2, 0.1], [0.9, 0.9, 0.1, 0.1]])
    targets = torch.tensor([[1, 1, -1, 0], [-1, -1, -1, 0], [0, 0, -1, 0]])
    assert f1_at_threshold(scores, targets, 0.5) == pytest.approx(
        {"CP": 0.25, "CR": 0.5, "CF1": 1 / 3, "OP": 1 / 3, "OR": 0.5, "OF1": 0.4})


def test_f1_at_threshold_is_never_nan():
    zeros = dict.fromkeys(["CP", "CR", "CF1", "OP", "OR", "OF1"], 0)
    scores, ones = torch.rand(3, 4), torch.ones(3, 4).int()
    assert f1_at_threshold(scores, ones, 2) == zeros      # nothing predicted
    assert f1_at_threshold(scores, -ones, 0) == zeros     # no positive
    assert f1_at_threshold(scores, 0 * ones, 0) == zeros  # nothing known
    assert f1_at_threshold(scores[:0], ones[:0], 0) == zeros
    assert f1_at_threshold(scores[:, :0], ones[:, :0], 0) == zeros


# ---- all of them

SCORES, TARGETS = torch.rand(3, 4), torch.ones(3, 4, dtype=torch.int8)
WITH_NAN = torch.tensor([[1, math.inf, 2, 1], [1, -math.inf, NAN, 1], [1, 1, 1, NAN]])


@pytest.mark.parametrize("scores, targets, message", [
    (SCORES, TARGETS.t(), r"\[3, 4\] and \[4, 3\]"),
    (SCORES[0], TARGETS[0], r"\[images, labels\]"),
    (SCORES.long(), TARGETS, "floating point; they are torch.int64"),
    (SCORES, TARGETS.float(), "integers, .* torch.float32"),
    (SCORES, TARGETS.bool(), r"torch.bool .*2 \* t - 1"),
    (SCORES, TARGETS * 2, "from 2 to 2"),
    (SCORES, TARGETS.long() * -257, "from -257 to -257"),
    (WITH_NAN, TARGETS, "NaN in label column 2 .2 such"),
    (WITH_NAN.half(), TARGETS * 0, "NaN in label column 2"),
])
@pytest.mark.parametrize("function", [
    average_precision, mean_average_precision, lambda s, t: precision_recall_f1_at_k(s, t, 2),
    lambda s, t: f1_at_threshold(s, t, 0.5)], ids=["AP", "mAP", "F1@k", "F1"])
def test_bad_input_is_refused(function, scores, targets, message):
    with pytest.raises(ValueError, match=message):
        function(scores, targets)


def test_the_docstrings_example():
    result = doctest.testmod(metrics)
    assert result.attempted and not result.failed


# ---- what the method scripts share

def test_summary_is_the_single_metrics_under_their_names():
    torch.manual_seed(0)
    scores, targets = torch.rand(20, 4), torch.where(torch.rand(20, 4) < 0.4, 1, -1)
    result = metrics.summary(scores, targets, (2, 4, 5), "zsl_")
    assert list(result) == ["zsl_mAP", "zsl_P@2", "zsl_R@2", "zsl_F1@2", "zsl_P@4", "zsl_R@4",
                            "zsl_F1@4"]  # 5 is more than there are labels
    assert result["zsl_mAP"] == mean_average_precision(scores, targets)
    assert result["zsl_R@4"] == 1
    values = tuple(result[f"zsl_{name}@2"] for name in ("P", "R", "F1"))
    assert values == precision_recall_f1_at_k(scores, targets, 2)


def test_evaluate_scores_every_image_once_and_only_the_labels_in_play():
    torch.manual_seed(0)
    images, weight = torch.randn(23, 6), torch.randn(6, 5)
    targets = torch.where(torch.rand(23, 5) < 0.5, 1, -1).to(torch.int8)
    batches = [(part, None) for part in images.split(7)]
    seen = []

    def score(batch):
        seen.append(len(batch))
        return {"plus": batch @ weight, "minus": lambda index: (-batch @ weight)[:, index]}

    results = metrics.evaluate(
        score, batches, targets, {"zsl_": torch.tensor([1, 3]), "gzsl_": torch.arange(5)}, (1,))
    assert seen == [7, 7, 7, 2]
    for name, sign in (("plus", 1), ("minus", -1)):
        scores = sign * images @ weight
        assert results[name] == {
            **metrics.summary(scores[:, [1, 3]], targets[:, [1, 3]], (1,), "zsl_"),
            **metrics.summary(scores, targets, (1,), "gzsl_")}
    with pytest.raises(ValueError, match="14 images for targets of 23"):
        metrics.evaluate(score, batches[:2], targets, {"": torch.arange(5)}, (1,))


def many_scores():
    """Results of evaluate: two ways to score, two settings."""
    torch.manual_seed(0)
    scores = torch.randn(40, 6)
    targets = torch.where(scores + torch.randn(40, 6) > 0, 1, -1).to(torch.int8)
    settings = {"zsl_": torch.tensor([4, 1]), "gzsl_": torch.arange(6)}
    batches = [(part,) for part in scores.split(7)]
    return metrics.evaluate(lambda x: {1: x, -1: -x}, batches, targets, settings, (1, 3))


def test_scores_too_large_for_memory_are_kept_in_files_with_the_same_results(
        monkeypatch, tmp_path):
    expected, sizes = many_scores(), []
    from_file = torch.from_file

    def spy(name, shared, size, dtype):
        assert Path(name).parent == tmp_path and shared
        sizes.append(size)
        return from_file(name, shared, size, dtype=dtype)

    monkeypatch.setattr(torch, "from_file", spy)
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(metrics, "IN_MEMORY", 2 * 4 * 40 * (2 + 6))  # bytes, just what they need
    assert many_scores() == expected and not sizes
    monkeypatch.setattr(metrics, "IN_MEMORY", metrics.IN_MEMORY - 1)
    assert many_scores() == expected and sizes == [80, 240, 80, 240]
    assert not list(tmp_path.iterdir())


def test_scores_stay_in_memory_where_the_disk_is_full(monkeypatch):
    expected = many_scores()
    monkeypatch.setattr(metrics, "IN_MEMORY", 0)
    monkeypatch.setattr(metrics.shutil, "disk_usage", lambda folder: type("", (), {"free": 100}))
    with pytest.warns(UserWarning, match="no room for .* TMPDIR"):
        assert many_scores() == expected


def test_the_table_stars_the_best_zero_shot_row(capsys):
    metrics.print_table([{"name": "a", "kind": "zero-shot", "mAP": 0.25, "F1@3": 0.5},
                         {"name": "bb", "kind": "zero-shot", "mAP": 0.5, "F1@3": 0.125},
                         {"name": "ours", "kind": "method", "mAP": 0.75, "F1@3": 1.0}])
    title, *rows, note = capsys.readouterr().out.strip().splitlines()
    assert title.split() == ["all", "labels", "(%)", "mAP", "F1@3"]
    assert [row.split() for row in rows] == [["a", "25.0", "50.0"], ["bb", "*", "50.0", "12.5"],
                                             ["ours", "75.0", "100.0"]]
    assert note.startswith("*") and len({len(row) for row in rows}) == 1
