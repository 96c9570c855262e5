import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import metrics
import trees
from metrics import (ZERO_SHOT, average_precision, best_threshold, draw_curves, draw_heatmaps,
                     f1_at_threshold, in_play, mean_average_precision, normalize_scores,
                     precision_recall_f1_at_k, table_row)

NAN = float("nan")
SCORES, TARGETS = torch.rand(3, 4), torch.ones(3, 4, dtype=torch.int8)


def random_problem(images, labels, seed=0, unknown=0.3, steps=8):
    """Scores on a few values, so that most are tied, and targets in {-1, 0, +1}."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-steps, steps + 1, (images, labels), generator=generator) / steps
    draw = torch.rand(images, labels, generator=generator)
    targets = torch.where(draw < unknown, 0, torch.where(draw < 0.5 + unknown / 2, 1, -1))
    return scores, targets.to(torch.int8)


def labelled(targets, unseen=()):
    """A dataset of these targets, with images that nobody looks at."""
    labels = [chr(ord("a") + column) for column in range(targets.shape[1])]
    return data.MultiLabelDataset(labels, targets, range(len(targets)), unseen=unseen)


def targets_of(*rows):
    return torch.tensor(rows, dtype=torch.int8)


# ---- average precision

def average_precision_by_loop(scores, targets):
    """One column, straight from the definition, without a sort."""
    known = [(s, t) for s, t in zip(scores.tolist(), targets.tolist()) if t != 0]
    precisions = []
    for score in (s for s, t in known if t == 1):
        at_least = [t for s, t in known if s >= score]
        precisions.append(at_least.count(1) / len(at_least))
    return sum(precisions) / len(precisions) if precisions else NAN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [2, 8, 10 ** 6])  # nearly all tied, many, hardly any
def test_average_precision_equals_the_definition(dtype, steps):
    scores, targets = random_problem(60, 25, steps=steps)
    scores = scores.to(dtype)
    scores[scores == -1] = -torch.inf
    scores[3, targets[3] == 0] = torch.inf  # unknown: of no influence
    result = average_precision(scores, targets)
    expected = [average_precision_by_loop(scores[:, c], targets[:, c]) for c in range(25)]
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected, rtol=1e-12)


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


def test_f1_at_threshold_equals_scikit_learns():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    (scores, targets), threshold = random_problem(300, 9, unknown=0), 0.5
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


# ---- the best threshold

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [3, 10 ** 6])  # nearly all tied, hardly any
def test_no_score_is_a_better_threshold_than_the_best(dtype, steps):
    for seed in range(6):
        scores, targets = random_problem(30, 4, seed, steps=steps)
        scores = ((scores + 0.4 * targets).double() / 7).to(dtype)  # not all are a float32
        threshold, of1 = best_threshold(scores, targets)
        of1s = [f1_at_threshold(scores, targets, value)["OF1"] for value in scores.unique()]
        assert f1_at_threshold(scores, targets, threshold)["OF1"] == of1 == max(of1s) < 1


def test_without_a_present_entry_no_threshold_is_the_best():
    for targets in (-TARGETS, 0 * TARGETS):
        assert all(map(math.isnan, best_threshold(SCORES, targets)))


# ---- bad input

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
    lambda s, t: f1_at_threshold(s, t, 0.5), best_threshold],
    ids=["AP", "mAP", "F1@k", "F1", "threshold"])
def test_bad_input_is_refused(function, scores, targets, message):
    with pytest.raises(ValueError, match=message):
        function(scores, targets)
    for k in (0, 5, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to 4.*; it is {k}"):
            precision_recall_f1_at_k(SCORES, TARGETS, k)


# ---- CLIP as it is

def zero_shot_by_loop(embeddings, labels, scale, playing):
    """{name: [B][c]}, straight from the definitions."""
    rows = {name: [] for name in ZERO_SHOT}
    for places in embeddings.tolist():
        cosines = [[sum(a * b for a, b in zip(place, labels[label].tolist())) for label in playing]
                   for place in places]
        odds = [[math.exp(scale * cosine) for cosine in row] for row in cosines]
        chances = [[value / sum(row) for value in row] for row in odds]
        of_label = [[column[0], (column[0] + max(column[1:])) / 2, (p[0] + max(p[1:])) / 2]
                    for column, p in zip(zip(*cosines), zip(*chances))]
        for name, row in zip(ZERO_SHOT, zip(*of_label)):
            rows[name].append(row)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_shot_scores_equal_a_loop_in_float32_whatever_comes_in(dtype):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 6, 8, generator=generator).div(8 ** 0.5).to(dtype)
    labels = torch.randn(5, 8, generator=generator).div(8 ** 0.5).to(dtype)
    playing = in_play(labelled(-torch.ones(4, 5, dtype=torch.int8), unseen=[1, 3]))
    found = metrics.zero_shot_scores(embeddings, labels, torch.tensor(7.0), playing)
    for prefix, columns in (("zsl_", [1, 3]), ("gzsl_", range(5))):
        for name, rows in zero_shot_by_loop(embeddings, labels, 7, columns).items():
            scores = found.pop((name, prefix))
            assert scores.dtype == torch.float32
            np.testing.assert_allclose(scores, rows, rtol=0, atol=1e-6)
    assert not found


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


def test_the_last_zero_shot_row_is_the_best_one_normalised():
    _, targets = random_problem(80, 6)
    dataset = labelled(targets, unseen=[1, 4])
    scores = {}
    for prefix, columns in in_play(dataset).items():
        of_noise = [3, 1, 2] if prefix == "gzsl_" else [3, 3, 0]  # all labels choose the best
        for name, noise in zip(ZERO_SHOT, of_noise):
            known = targets[:, columns].float()
            scores[name, prefix] = known + noise * torch.randn_like(known)
    taken = {("of another method", ""): targets, **scores}
    *rows, last = metrics.zero_shot_rows(taken, dataset, [1])
    assert taken.keys() == {("of another method", "")}  # the others' memory is free
    assert rows == [table_row(name, "zero-shot", scores, dataset, [1]) for name in ZERO_SHOT]
    normalised = {(last["name"], prefix): normalize_scores(scores[ZERO_SHOT[1], prefix])
                  for prefix in ("zsl_", "gzsl_")}
    assert last == table_row(last["name"], "zero-shot", normalised, dataset, [1])


# ---- the table, results.json

def test_a_row_is_the_single_metrics_under_their_names():
    scores, targets = random_problem(20, 4)
    scores = {("ours", "zsl_"): scores[:, [1, 3]], ("ours", "gzsl_"): scores}
    expected = {"name": "ours", "kind": "method"}
    for prefix, columns in (("zsl_", [1, 3]), ("gzsl_", [0, 1, 2, 3])):
        s, t = scores["ours", prefix], targets[:, columns]
        expected[f"{prefix}mAP"] = mean_average_precision(s, t)
        for k in (2, 3)[:len(columns) - 1]:  # 3 is too many for two labels
            names = (f"{prefix}{name}@{k}" for name in ("P", "R", "F1"))
            expected |= zip(names, precision_recall_f1_at_k(s, t, k))
    assert table_row("ours", "method", scores, labelled(targets, [1, 3]), (2, 3, 5)) == expected


def test_what_cannot_be_said_is_nan():
    """Only present entries: no mAP. Nothing unseen is annotated: nothing at all, of it alone."""
    scores = torch.rand(2, 3)
    row = table_row("a", "method", {("a", ""): scores},
                    labelled(targets_of([1, 0, 1], [1, 1, 0])), [1])
    assert math.isnan(row["mAP"]) and row["P@1"] > 0
    scores = {("a", "zsl_"): scores[:, 2:], ("a", "gzsl_"): scores}
    row = table_row("a", "method", scores, labelled(targets_of([1, -1, 0], [-1, 1, 0]), [2]), [1])
    assert {name for name in list(row)[2:] if math.isnan(row[name])} == {
        "zsl_mAP", "zsl_P@1", "zsl_R@1", "zsl_F1@1"}


def test_a_table_a_setting_each_with_its_own_star(capsys):
    metrics.print_table([
        {"name": "a" * 30, "kind": "zero-shot", "zsl_mAP": 0.5, "gzsl_mAP": 0.25, "gzsl_F1@3": 0.5},
        {"name": "b", "kind": "zero-shot", "zsl_mAP": NAN, "gzsl_mAP": 0.5, "gzsl_F1@3": NAN},
        {"name": "ours", "kind": "method", "zsl_mAP": 0.75, "gzsl_mAP": 1.0, "gzsl_F1@3": 0.125}],
        labelled(targets_of([1, -1], [-1, 1]), unseen=[1]))
    table = capsys.readouterr().out.strip().splitlines()
    assert [line.split() for line in table[:9]] == [
        ["ZSL,", "unseen", "labels", "(%)", "mAP"],
        ["a" * 30, "*", "50.0"], ["b", "n/a"], ["ours", "75.0"], [],
        ["GZSL,", "all", "labels", "(%)", "mAP", "F1@3"],
        ["a" * 30, "25.0", "50.0"], ["b", "*", "50.0", "n/a"], ["ours", "100.0", "12.5"]]
    assert len({len(line) for line in table[5:9]}) == 1
    assert table[9:] == ["* the best zero-shot scoring"]


@pytest.mark.parametrize("targets, missing, notes", [
    (targets_of([1, -1], [-1, 1]), 0, []),
    (targets_of([1, -1, 0], [-1, 1, -1]), 0,
     ["mAP averages the 2 of 3 labels with a known present entry"]),
    (targets_of([1, 1, 0, 0], [-1, 0, 1, 0]), 2,
     ["mAP averages the 3 of 4 labels with a known present entry",
      "2 of them without an absent one: AP 1 whatever the scores",
      "2 test images are missing: not comparable with complete results"]),
    (targets_of([1, -1], [1, -1]), 0,
     ["no mAP: no label is known to be present in one image and absent in another"]),
])
def test_under_the_table_is_what_the_map_averages(capsys, targets, missing, notes):
    dataset = labelled(targets)
    dataset.missing = missing
    row = table_row("x", "zero-shot", {("x", ""): torch.rand(targets.shape)}, dataset, [1])
    metrics.print_table([row], dataset)
    _, row, *found = capsys.readouterr().out.strip().splitlines()
    assert ("no mAP" in str(notes)) == ("n/a" in row) == ("*" not in row)
    assert [line for line in found if not line.startswith("*")] == notes


def test_results_are_strict_json_with_every_label_and_the_best_threshold():
    scores, targets = random_problem(30, 5)
    targets[:, 3], targets[:, 4] = -1, 1
    dataset = labelled(targets)
    dataset.missing = 2
    rows = [{"name": "x", "kind": "method", "mAP": NAN, "P@3": 0.5}]
    args = SimpleNamespace(data="folder", clip="toy-RN", seed=7, limit=30)
    text = metrics.results("mkt", rows, scores, dataset, args, 1.6)
    found = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    labels, threshold = found.pop("labels"), found.pop("threshold")
    of1 = f1_at_threshold(scores, targets, threshold)["OF1"]
    assert found == {
        "method": "mkt", "data": "folder", "clip": "toy-RN", "seed": 7, "seconds": 2, "images": 30,
        "missing": 2, "limit": 30, "rows": [{**rows[0], "mAP": None}], "threshold_OF1": of1}
    for column, label in enumerate(labels):
        t = targets[:, column].tolist()
        ap = average_precision_by_loop(scores[:, column], targets[:, column])
        assert label.pop("AP") == (None if column == 3 else pytest.approx(ap))
        assert label == {"label": "abcde"[column], "present": t.count(1), "absent": t.count(-1)}


# ---- predictions

LABELS = ["owl", "cat", "ice cream", "dog", "cup", "key", "猫"]
VALUES = torch.tensor([0.1, 0.7, 0.3, 0.91239, 0.5, 0.2, 0.8])


def write_prediction(path, colour=(9, 9, 9), **options):
    args = SimpleNamespace(**{"top": None, "threshold": None, "heatmap": None, "output": None}
                           | options)
    photo = Image.new("RGB", (40, 40), colour)
    metrics.write_prediction(path, photo, VALUES, torch.zeros(7, 4), LABELS, args)


@pytest.mark.parametrize("options, names", [
    ({}, "dog, 猫, cat, cup, ice cream"), ({"top": 2}, "dog, 猫"),
    ({"threshold": 0.2}, "dog, 猫, cat, cup, ice cream, key"),
    ({"top": 2, "threshold": 0.8}, "dog, 猫"), ({"top": 2, "threshold": 0.9}, "dog"),
    ({"threshold": 1.0}, "")])
def test_a_line_has_the_best_labels_or_those_above_a_threshold(capsys, options, names):
    write_prediction("photos/猫.jpg", **options)
    line, = map(json.loads, capsys.readouterr().out.splitlines())
    assert line.keys() == {"path", "labels"} and line["path"] == "photos/猫.jpg"
    assert ", ".join(entry["label"] for entry in line["labels"]) == names
    scores = dict(zip(LABELS, VALUES.tolist()))
    assert all(entry["score"] == round(scores[entry["label"]], 4) for entry in line["labels"])


def test_output_is_a_file_that_grows_in_plain_utf_8(capsys, tmp_path):
    names = ["a.jpg", "猫.jpg", os.fsdecode(b"caf\xe9.jpg")]  # the last as old archives unpack
    for name in names:
        write_prediction(name, output=tmp_path / "found.jsonl", heatmap=tmp_path / "maps")
    text = (tmp_path / "found.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["path"] for line in text.splitlines()] == names
    assert "猫.jpg" in text and text.count('"猫"') == 3 and not capsys.readouterr().out
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_every_photo_has_its_own_heatmap_in_the_same_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = "é" * 122  # 244 bytes: with .jpg.png and a number too many for a file system
    paths = {"album/a.png": "album/a.png", "album_a.png": "album_a.png", "a.png": "a.png",
             "album/a.jpg": "album/a.jpg.png", "album/a.jpg.png": "album/a.jpg-2.png",
             "../up/b.tif": "up/b.tif.png", "/root/c": "root/c.png", "noend/d.": "noend/d..png",
             f"{long}1.jpg": f"{'é' * 100}.png", f"{long}2.jpg": f"{'é' * 100}-2.png",
             "photo.png": "photo-3.png"}
    for name in ("photo.png", "photo-2.png"):
        trees.write(tmp_path / "maps" / name, name)  # perhaps the photo itself
    for number, path in enumerate(paths):
        write_prediction(path, (20 * number, 0, 0), heatmap="maps")
    found = {str(file.relative_to("maps")): Image.open(file).getpixel((20, 20))[0] / 20
             for file in Path("maps").rglob("*.png") if file.read_bytes() != file.name.encode()}
    assert len(list(Path("maps").rglob("*.png"))) == len(paths) + 2
    assert found == {file: number for number, file in enumerate(paths.values())}


# ---- pictures

def tiles_of(sheet, size):
    """The pictures on a sheet of heatmaps of this size, int [h, w, 3]: the photo, then the maps."""
    pixels = np.asarray(sheet).astype(int)
    return [pixels[16:16 + size[1], x:x + size[0]]
            for x in range(16, sheet.width, max(size[0], 200) + 16)]


@pytest.mark.parametrize("crop", [0, 1.0, 0.5])  # 0: the whole photo
@pytest.mark.parametrize("row, column", [(1, 6), (6, 3)])
def test_a_hot_cell_is_seen_where_it_is_and_the_rest_is_dark(crop, row, column):
    values = torch.zeros(7, 7)
    values[row, column] = 1
    photo = Image.new("RGB", (720, 360), (130, 130, 130))
    plain, tile = tiles_of(draw_heatmaps(photo, [("cup", 0.5, values)], crop), (360, 180))
    width, height = (360, 180) if not crop else (round(crop * 180), round(crop * 180))
    left, top = (360 - width) // 2, (180 - height) // 2
    inside = slice(top, top + height), slice(left, left + width)
    change = np.abs(tile[inside] - 130).sum(axis=-1)
    y, x = np.nonzero(change > change.max() / 2)
    assert change.max() > 150 and (change == 0).mean() > 0.5
    assert abs((x.mean() + 0.5) / width - (column + 0.5) / 7) < 0.03
    assert abs((y.mean() + 0.5) / height - (row + 0.5) / 7) < 0.03
    for pixels in (plain, tile):
        outside = np.ones((180, 360), bool)
        outside[inside] = False
        assert (pixels[outside] < 50).all() and outside.any() == (crop > 0)
    assert (plain[inside] == 130).all()


def test_maps_are_on_one_scale_over_the_grey_photo():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (360, 360, 3), np.uint8))
    maps = [("", 0.5, np.full((2, 2), value)) for value in (0, 0.02, 0.9, NAN)]
    colour, nothing, faint, strong, undefined = tiles_of(draw_heatmaps(photo, maps), (360, 360))
    assert (colour == np.asarray(photo)).all()
    assert (nothing == np.asarray(photo.convert("L"))[..., None]).all()
    assert (undefined == nothing).all()
    assert np.abs(faint - nothing).mean() < 3 and np.abs(strong - nothing).mean() > 50


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
