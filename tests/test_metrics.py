import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from metrics import (average_precision, draw_curves, draw_heatmaps, f1_at_threshold,
                     mean_average_precision, normalize_scores, precision_recall_f1_at_k)

NAN = float("nan")
SCORES, TARGETS = torch.rand(3, 4), torch.ones(3, 4, dtype=torch.int8)


def random_problem(images, labels, seed=0, unknown=0.3, steps=8):
    """Scores on a few values, so that most are tied, and targets in {-1, 0, +1}."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-steps, steps + 1, (images, labels), generator=generator) / steps
    draw = torch.rand(images, labels, generator=generator)
    targets = torch.where(draw < unknown, 0, torch.where(draw < 0.5 + unknown / 2, 1, -1))
    return scores, targets.to(torch.int8)


# ---- average precision

def average_precision_by_loop(scores, targets):
    """One column, straight from the definition, without a sort."""
    known = [(s, t) for s, t in zip(scores.tolist(), targets.tolist()) if t != 0]
    precisions = []
    for score in (s for s, t in known if t == 1):
        at_least = [t for s, t in known if s >= score]
        precisions.append(at_least.count(1) / len(at_least))
    return sum(precisions) / len(precisions) if precisions else NAN


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_average_precision_equals_the_definition(dtype):
    scores, targets = random_problem(60, 25)
    scores[scores == -1] = -torch.inf
    scores[3, targets[3] == 0] = torch.inf  # unknown: of no influence
    result = average_precision(scores.to(dtype), targets)
    expected = [average_precision_by_loop(scores[:, c], targets[:, c]) for c in range(25)]
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("steps, unknown", [(2, 0.5), (10 ** 6, 0)])  # nearly all tied, hardly any
def test_average_precision_equals_scikit_learns(steps, unknown):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = (x.numpy() for x in random_problem(700, 12, unknown=unknown, steps=steps))
    expected = []
    for s, t in zip(scores.T, targets.T):
        expected.append(sklearn_metrics.average_precision_score(t[t != 0] == 1, s[t != 0]))
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=1e-12)
    assert mean_average_precision(scores, targets) == pytest.approx(np.mean(expected), rel=1e-12)


def test_a_label_without_positives_is_nan_and_left_out_of_the_mean():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.2, 0.3, 0.1, 0.5], [0.3, 0.2, 0.2, 0.4]])
    targets = torch.tensor([[1, -1, 0, 1], [-1, -1, 0, 1], [-1, -1, 0, 1]])
    # columns: positive last of three; no positive; all unknown; no negative
    np.testing.assert_allclose(average_precision(scores, targets), [1 / 3, NAN, NAN, 1])
    assert mean_average_precision(scores, targets) == pytest.approx(2 / 3)
    assert math.isnan(mean_average_precision(scores[:, 1:3], targets[:, 1:3]))


def test_scores_are_compared_exactly():
    targets = torch.tensor([[1], [-1], [-1], [1]])
    assert average_precision(torch.tensor([[0.0], [-0.0], [-1], [1]]), targets) == (1 + 2 / 3) / 2
    scores = np.array([[1 + 1e-12], [1.0]])  # float64 is not rounded
    assert average_precision(scores, np.array([[1], [-1]])) == 1
    assert average_precision(scores, np.array([[-1], [1]])) == 0.5


def test_chunks_change_nothing(monkeypatch):
    scores, targets = random_problem(50, 7)
    whole = mean_average_precision(scores, targets), precision_recall_f1_at_k(scores, targets, 3)
    for chunk in (1, 150):  # entries
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        assert (mean_average_precision(scores, targets),
                precision_recall_f1_at_k(scores, targets, 3)) == whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gpu_gives_the_same(dtype):
    scores, targets = random_problem(3000, 40)
    scores = scores.masked_fill(scores == -1, -torch.inf).to(dtype)
    targets[:, 3], targets[:, 4] = -1, 0
    on_gpu = average_precision(scores.cuda(), targets.cuda())
    np.testing.assert_allclose(on_gpu.cpu(), average_precision(scores, targets), rtol=1e-12)
    for function in (precision_recall_f1_at_k, f1_at_threshold):
        assert function(scores.cuda(), targets, 1) == pytest.approx(function(scores, targets, 1))


# ---- precision, recall and F1

def f1_at_k_by_loop(scores, targets, k):
    hits = 0
    for s, t in zip(scores.tolist(), targets.tolist()):
        predicted = sorted(range(len(t)), key=lambda c: (-s[c], c))[:k]
        hits += sum(t[c] == 1 for c in predicted)
    precision, recall = hits / (len(scores) * k), hits / targets.flatten().tolist().count(1)
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_f1_at_k_equals_a_loop(k):
    scores, targets = random_problem(200, 10, steps=3)
    scores[scores == -1] = -torch.inf
    expected = f1_at_k_by_loop(scores, targets, k)
    assert precision_recall_f1_at_k(scores, targets, k) == pytest.approx(expected, 1e-12)


@pytest.mark.parametrize("threshold", [-0.5, 0, 0.75])
def test_f1_at_threshold_equals_scikit_learns(threshold):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = random_problem(300, 9, unknown=0)
    targets[:, 4] = -1  # no positive: in the overall figures only
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


def test_f1_is_never_nan():
    for targets in (-TARGETS, 0 * TARGETS):
        assert precision_recall_f1_at_k(SCORES, targets, 2) == (0, 0, 0)
    assert precision_recall_f1_at_k(SCORES[:0], TARGETS[:0], 2) == (0, 0, 0)
    zeros = dict.fromkeys(["CP", "CR", "CF1", "OP", "OR", "OF1"], 0)
    for scores, targets, threshold in (
            (SCORES, TARGETS, 2), (SCORES, -TARGETS, 0), (SCORES, 0 * TARGETS, 0),
            (SCORES[:0], TARGETS[:0], 0), (SCORES[:, :0], TARGETS[:, :0], 0)):
        assert f1_at_threshold(scores, targets, threshold) == zeros


# ---- bad input, normalised scores, the table

WITH_NAN = torch.tensor([[1, math.inf, 2, 1], [1, -math.inf, NAN, 1], [1, 1, 1, NAN]])


@pytest.mark.parametrize("scores, targets, message", [
    (SCORES, TARGETS.t(), r"\[3, 4\] and \[4, 3\]"),
    (SCORES[0], TARGETS[0], r"\[images, labels\]"),
    (SCORES.long(), TARGETS, "floating point.* torch.int64"),
    (SCORES, TARGETS.bool(), "integers.* torch.bool"),
    (SCORES, TARGETS.long() * -257, "present"),
    (WITH_NAN, TARGETS * 0, "NaN"),
])
@pytest.mark.parametrize("function", [
    average_precision, mean_average_precision, lambda s, t: precision_recall_f1_at_k(s, t, 2),
    lambda s, t: f1_at_threshold(s, t, 0.5)], ids=["AP", "mAP", "F1@k", "F1"])
def test_bad_input_is_refused(function, scores, targets, message):
    with pytest.raises(ValueError, match=message):
        function(scores, targets)
    for k in (0, 5, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to 4.*; it is {k}"):
            precision_recall_f1_at_k(SCORES, TARGETS, k)


def test_normalized_scores_equal_a_loop():
    rng = np.random.default_rng(0)
    scores = 0.2 + 0.02 * rng.normal(size=(40, 6)) + 0.1 * rng.normal(size=6)
    expected = scores.copy()
    for column in expected.T:
        column[:] = (column - np.mean(column)) / np.std(column)
    for row in expected:
        row[:] = (row - np.mean(row)) / np.std(row)
    result = normalize_scores(torch.tensor(scores))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_what_does_not_vary_is_normalized_to_zero():
    scores = torch.rand(101, 5, generator=torch.Generator().manual_seed(0))
    scores[:, 3] = 0.1  # for all images, and no float32 mean of it is exact
    others = scores[:, [0, 1, 2, 4]]
    result = normalize_scores(scores)
    assert result.isfinite().all()
    # 0 is below those labels of an image that are above their own mean
    assert torch.equal((result[:, 3:4] < result).sum(1), (others > others.mean(0)).sum(1))
    assert normalize_scores(torch.full((3, 4), 0.1)).eq(0).all()
    assert normalize_scores(torch.rand(1, 4)).eq(0).all()  # nothing to compare it with


def test_a_row_is_the_single_metrics_under_their_names():
    scores, targets = random_problem(20, 4)
    dataset = SimpleNamespace(labels=[*"abcd"], targets=targets, unseen=torch.tensor([1, 3]))
    row = metrics.table_row("ours", "method", scores, dataset, (2, 5))
    expected = {"name": "ours", "kind": "method"}
    for prefix, index in (("zsl_", [1, 3]), ("gzsl_", [0, 1, 2, 3])):  # too few labels for k = 5
        s, t = scores[:, index], targets[:, index]
        expected[f"{prefix}mAP"] = mean_average_precision(s, t)
        names = (f"{prefix}{name}@2" for name in ("P", "R", "F1"))
        expected |= zip(names, precision_recall_f1_at_k(s, t, 2))
    assert row == expected


def test_a_table_a_setting_each_with_its_own_star(capsys):
    metrics.print_table([
        {"name": "a", "kind": "zero-shot", "zsl_mAP": 0.5, "gzsl_mAP": 0.25, "gzsl_F1@3": 0.5},
        {"name": "bb", "kind": "zero-shot", "zsl_mAP": 0.25, "gzsl_mAP": 0.5, "gzsl_F1@3": NAN},
        {"name": "ours", "kind": "method", "zsl_mAP": 0.75, "gzsl_mAP": 1.0, "gzsl_F1@3": 0.125}])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split() for line in lines[:9]] == [
        ["ZSL,", "unseen", "labels", "(%)", "mAP"],
        ["a", "*", "50.0"], ["bb", "25.0"], ["ours", "75.0"], [],
        ["GZSL,", "all", "labels", "(%)", "mAP", "F1@3"],
        ["a", "25.0", "50.0"], ["bb", "*", "50.0", "nan"], ["ours", "100.0", "12.5"]]
    assert lines[9].startswith("*") and len({len(line) for line in lines[6:9]}) == 1
    metrics.print_table([{"name": "a", "kind": "method", "mAP": 0.5}])  # nothing to star
    assert capsys.readouterr().out.split() == ["all", "labels", "(%)", "mAP", "a", "50.0"]


# ---- pictures

GREY = (120, 130, 140)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("row, column", [(1, 6), (6, 3)])
def test_a_hot_cell_is_seen_where_it_is(whole, row, column):
    values = np.zeros((7, 7), np.float16)
    values[row, column] = 1
    sheet = draw_heatmaps(Image.new("RGB", (400, 200), GREY), [("cup", 0.5, values)], whole)
    tile = np.asarray(sheet).astype(int)[16:196, 392:752]  # the second one
    change = np.abs(tile - GREY).sum(axis=-1)
    assert change.max() > 150 and (change < 10).mean() > 0.5
    y, x = np.nonzero(change > change.max() / 2)
    expected = (column + 0.5) / 7
    if not whole:
        expected = 0.25 + expected / 2  # the central square is the middle half
    assert abs((x.mean() + 0.5) / 360 - expected) < 0.03
    assert abs((y.mean() + 0.5) / 180 - (row + 0.5) / 7) < 0.03


def test_a_curve_is_where_its_values_are():
    losses, scores = [1.0, 2.0, 3.5, 4.0, 6.0], [0.8, 0.7, 0.55, 0.5, 0.3]
    log = [{"epoch": i + 1, "loss": 8.0, "ranking": loss, "lr": 99, "seconds": 99,
            "val_mAP": score} for i, (loss, score) in enumerate(zip(losses, scores))]
    sheet = np.asarray(draw_curves(log))
    assert sheet.shape == (380, 1040, 3)
    for left, colour, values in ((0, (230, 159, 0), losses), (520, (0, 0, 0), scores)):
        panel = sheet[90:, left + 60:left + 505]  # without the names and the numbers
        y, x = (panel == colour).all(axis=-1).nonzero()
        columns = np.linspace(x.min() + 2, x.max() - 2, 5).round()
        heights = [-y[x == column].mean() for column in columns]
        assert np.corrcoef(heights, values)[0, 1] > 0.999
        assert np.ptp(heights) > 100


def test_curves_of_gaps_and_single_epochs():
    for value in (0.5, NAN):
        sheet = np.asarray(draw_curves([{"epoch": 1, "loss": value}]))
        assert sheet.shape[1] == 520
        assert (sheet[90:] == 0).all(axis=-1).any() == (value == 0.5)
