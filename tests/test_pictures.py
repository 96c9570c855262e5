"""Heatmaps, curves and galleries, and --predict, which draws some of them."""
import csv
import io
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw

import data
import lang_cls
import mkt
from data import UserError

GREY = (120, 130, 140)


def corner_map(size=7):
    values = np.zeros((size, size), np.float32)
    values[0, 0] = 1
    return values


def pixels_of(image, colour, tolerance=60):
    """bool [H, W]: where an image has about this colour."""
    difference = np.asarray(image).astype(int) - ImageColor.getrgb(colour)
    return np.abs(difference).sum(axis=-1) < tolerance


# ---- heatmaps

@pytest.mark.parametrize("size, shown", [
    ((64, 64), (360, 360)), ((4000, 3000), (360, 270)), ((700, 1400), (180, 360)),
    ((64, 3000), (180, 360)), ((3000, 400), (360, 180))])  # of long strips the middle
def test_one_hot_corner_colours_this_corner_of_the_central_square(size, shown):
    width, height = shown
    sheet = np.asarray(data.draw_heatmaps(Image.new("RGB", size, GREY),
                                          [("cup", 0.5, corner_map())])).astype(int)
    cell, side = max(width, 240), min(shown)
    assert sheet.shape[1] == 16 + 2 * (cell + 16)
    assert (sheet[16:16 + height, 16:16 + width] == GREY).all()  # the photo as it is
    tile = sheet[16:16 + height, 32 + cell:32 + cell + width]
    left, top = (width - side) // 2, (height - side) // 2
    change = np.abs(tile - GREY).sum(axis=-1)
    square = change[top + 2:top + side - 2, left + 2:left + side - 2]
    assert (square[side // 2:, side // 2:] == 0).all()
    assert square[side // 20, side // 20] > 150
    # smooth: the edges of the map's cells would be steps of some 200
    assert np.abs(np.diff(square, axis=0)).max() < 50 > np.abs(np.diff(square, axis=1)).max()
    change[top:top + side, left:left + side] = 0
    assert (change == 0).all()


def test_only_the_ends_of_a_strip_that_no_map_covers_are_left_out():
    strip = Image.new("RGB", (3000, 400), "red")
    strip.paste(GREY, (1100, 0, 1900, 400))
    maps = [("cup", 0.5, corner_map())]
    assert not pixels_of(data.draw_heatmaps(strip, maps), "red").any()
    whole = data.draw_heatmaps(strip, maps, whole=True).crop((16, 16, 376, 16 + 48))
    assert pixels_of(whole, "red").mean() == pytest.approx(2200 / 3000, abs=0.02)


@pytest.mark.parametrize("ground", ["white", "black", "#808080"])
def test_the_edge_of_a_map_is_seen_on_any_ground(ground):
    sheet = data.draw_heatmaps(Image.new("RGB", (200, 100), ground), [("cup", 0.5, corner_map())])
    row = np.asarray(sheet.convert("L")).astype(int)[16 + 150, 392:752]
    edges = np.flatnonzero(np.abs(row - row[0]) > 60)
    assert len(edges) and {int(edge) // 90 for edge in edges} == {1, 2}
    assert all(abs(edge - 90) < 3 or abs(edge - 270) < 3 for edge in edges)


def test_heatmaps_are_relative_to_their_own_range_and_flat_ones_show_the_photo():
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (90, 90, 3), np.uint8))
    values = rng.random((4, 6))
    flat = np.full((3, 3), 0.7, np.float16)
    maps = [("a", 1, values), ("b", 1, 50 * values - 9), ("c", 1, flat)]
    sheet = data.draw_heatmaps(photo, maps)
    shown, one, same, constant = (
        np.asarray(sheet.crop((16 + 376 * i, 16, 376 + 376 * i, 376))).astype(int)
        for i in range(4))
    assert np.abs(one - same).max() <= 2 and np.abs(one - shown).max() > 50
    assert (constant == shown).all()
    nothing = data.draw_heatmaps(photo, [("a", 1, np.full((2, 2), np.nan))])
    assert (np.asarray(nothing)[16:376, 392:752] == shown).all()
    # a small photo is enlarged smoothly
    halves = Image.new("RGB", (64, 64))
    halves.paste("white", (32, 0, 64, 64))
    row = np.asarray(data.draw_heatmaps(halves, []))[100, 16:376, 0]
    assert len(np.unique(row)) > 5 and (row[:170] < 20).all() and (row[190:] > 235).all()


def test_the_palette_is_sequential_and_the_photo_stays_visible():
    ramp = np.linspace(0, 1, 101)
    colours = data._palette(ramp)
    assert colours.dtype == np.uint8 and colours.shape == (101, 3)
    lightness = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0.2).all()
    checks = Image.fromarray(np.tile(np.uint8([[0, 255]]), (101, 1))[..., None].repeat(3, axis=2))
    over = np.asarray(data._overlay(checks, np.stack([ramp, ramp], axis=1))).astype(int)
    contrast = (over[:, 1] - over[:, 0]).mean(axis=1)  # of black and white under the map
    assert contrast[0] == 255 and (np.diff(contrast) <= 1).all() and contrast[-1] > 50


def test_tiles_wrap_and_labels_of_any_kind_stay_in_their_tile():
    photo = Image.new("RGB", (80, 60), GREY)
    labels = ["a very long label that goes on " * 20, "Äpfel, ö", "猫と犬", "two\nlines\tand\x00",
              "مرحبا", "\ud800", "🐈", "W" * 5000, ""]
    for count, columns, rows in ((0, 1, 1), (3, 4, 1), (4, 4, 2), (9, 4, 3)):
        sheet = data.draw_heatmaps(photo, [(label, -12.3456, corner_map()) for label in
                                           labels[:count]])
        assert sheet.mode == "RGB"
        assert sheet.size == (16 + columns * 376, 16 + rows * (270 + 36 + 16))
        pixels = np.asarray(sheet)
        for column in range(columns + 1):  # nothing reaches the gaps between tiles
            assert (pixels[:, 376 * column:376 * column + 16] == 255).all()
        captions = pixels[16 + 270:16 + 270 + 36]
        assert count == 0 or (captions[:, 392:752] < 80).any()


def test_texts_become_smaller_and_are_cut_where_they_have_to_be():
    def fit(text, size, width):
        text, font = data._fit_text(text, size, width)
        assert font.getlength(text) <= width
        return text, font.size

    assert fit("cup", 17, 100) == ("cup", 17)
    assert fit("  Äpfel \n café ", 17, 300) == ("Apfel cafe", 17)
    length = data._font(17).getlength("traffic light at the corner")
    assert fit("traffic light at the corner", 17, 0.9 * length) == (
        "traffic light at the corner", 14)
    cut, size = fit("traffic light at the corner", 17, 100)
    assert cut.endswith("…") and "traffic light at the corner".startswith(cut[:-1])
    assert size == 14 and 70 < data._font(14).getlength(cut)


def test_letters_that_the_font_lacks_come_from_another_one():
    if data._font(17, False).getname() == data._font(17).getname():
        pytest.skip("this system has none of OTHER_FONTS")
    boxes = [bytes(data._fit_text(text, 17, 200)[1].getmask(text)) for text in ("кошка", "собак")]
    assert boxes[0] != boxes[1]  # Pillow's font has a box for each of their five letters


# ---- curves

def test_ticks_are_round_evenly_spaced_and_enclose_the_values():
    rng = np.random.default_rng(0)
    cases = [(0, 0), (5, 5), (-3, -3), (0, 1), (0.1, 0.3), (0, 20), (1e-9, 2e-9), (-1e6, 1e6)]
    cases += [sorted(rng.normal(size=2) * 10 ** rng.uniform(-5, 5)) for _ in range(200)]
    for low, high in cases:
        ticks, digits = data._ticks(low, high, 5)
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-5 * step and ticks[-1] >= high - 1e-5 * step
        assert 2 <= len(ticks) <= 8 and np.allclose(np.diff(ticks), step)
        assert float(f"{step:.0e}"[0]) in (1, 2, 5) and step == pytest.approx(float(f"{step:.0e}"))
        labels = [float(f"{tick:.{digits}f}") for tick in ticks]
        assert labels == pytest.approx(ticks, abs=1e-3 * step)


def curve(sheet, colour, panel=0):
    """{x: mean y} of a line's pixels in the plot area of a panel."""
    area = pixels_of(sheet, colour, 40)
    area[:64] = area[:, :panel * 520 + 62] = area[:, (panel + 1) * 520 - 20:] = False
    return {int(x): float(np.flatnonzero(area[:, x]).mean())
            for x in np.flatnonzero(area.any(axis=0))}


def test_a_curve_is_where_its_values_are():
    values = [1.0, 2.0, 3.5, 4.0, 6.0]
    log = [{"epoch": i + 1, "loss": 8.0, "ranking": value, "lr": 1, "seconds": 1,
            "val_mAP": 0.9 - value / 10} for i, value in enumerate(values)]
    sheet = data.draw_curves(log)
    assert sheet.mode == "RGB" and sheet.width == 1040
    rising = curve(sheet, data.LINE_COLOURS[1])
    columns = np.linspace(min(rising) + 2, max(rising) - 2, 5).round().astype(int)
    heights = [-rising[x] for x in columns]
    assert np.corrcoef(heights, values)[0, 1] > 0.9995
    assert rising[columns[0]] - rising[columns[-1]] > 100
    falling = curve(sheet, data.LINE_COLOURS[0], panel=1)
    assert falling[min(falling)] + 100 < falling[max(falling)]


def test_curves_say_what_they_show_and_scores_are_in_percent(monkeypatch):
    texts, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, string, *more, **options:
                        (texts.append(string), text(draw, place, string, *more, **options)))
    data.draw_curves([{"epoch": i, "loss": 2.0 - i, "pseudo_recall": 0.2, "val_mAP": 0.2 * i}
                      for i in (1, 2)])
    assert texts.count("epoch") == 2 and "Loss" in texts
    scores = texts[texts.index("Scores (%)"):]
    assert {"20", "25", "30", "35", "40"} <= {*scores}
    # the one that the best epoch is selected by comes first, as the widest line
    assert scores.index("val_mAP") < scores.index("pseudo_recall")


def test_stages_share_an_axis_and_a_line_is_broken_between_them():
    log = [{"stage": 1, "epoch": i, "loss": 1.0, "ranking": 2.0 - i} for i in (1, 2, 3)]
    log += [{"stage": 2, "epoch": i, "loss": 1.0, "ranking": 0.5 * i} for i in (1, 2)]
    columns = np.array(sorted(curve(data.draw_curves(log), data.LINE_COLOURS[1])))
    gaps = np.diff(columns)
    assert (gaps > 20).sum() == 1 and gaps.max() == pytest.approx((columns[-1] - columns[0]) / 4,
                                                                  rel=0.2)
    boundary = columns[gaps.argmax()] + gaps.max() / 2
    assert (boundary - columns[0]) / (columns[-1] - columns[0]) == pytest.approx(2.5 / 4, abs=0.02)


def test_curves_of_short_long_and_incomplete_logs():
    one = data.draw_curves([{"epoch": 1, "loss": 0.5, "ranking": 0.7, "lr": 1, "seconds": 2}])
    assert one.width == 520 and curve(one, data.LINE_COLOURS[1])  # a marker
    incomplete = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": float("nan"), "val_mAP": 0.2},
                  {"epoch": 3, "loss": 0.25, "unreadable_images": 3}]
    both = data.draw_curves(incomplete)
    assert both.width == 1040 and curve(both, data.LINE_COLOURS[0], panel=1)
    assert data.draw_curves([{"epoch": 1, "loss": float("nan")}]).width == 520
    many = [{"epoch": i, **{f"term_{k}": i + k for k in range(9)}} for i in range(1, 500)]
    sheet = data.draw_curves(many)
    assert all(pixels_of(sheet, colour).any() for colour in data.LINE_COLOURS)
    # antialiased: shades between the line and the white beside it
    assert len(np.unique(np.asarray(one).reshape(-1, 3), axis=0)) > 30


# ---- gallery

def test_marks_differ_in_shape_not_only_in_colour():
    shapes = []
    for kind in ("correct", "false", "missed"):
        image = Image.new("RGB", (24, 24), "white")
        data._mark(ImageDraw.Draw(image), kind, 1, 1)
        shapes.append(np.asarray(image.convert("L")) < 200)
    for i in range(3):
        for other in shapes[:i]:
            assert (shapes[i] & other).sum() < 0.6 * (shapes[i] | other).sum()


def marks(sheet, x, top):
    """The kinds of mark in a column of the sheet, from top to bottom."""
    kinds = {"correct": data.CORRECT, "false": data.FALSE, "missed": data.GREY}
    found = {}
    for kind, colour in kinds.items():
        rows = np.flatnonzero(pixels_of(sheet.crop((x, 0, x + 13, sheet.height)), colour)[top:]
                              .any(axis=1))
        for first in rows[np.insert(np.diff(rows) > 5, 0, True)] if len(rows) else ():
            found[int(first)] = kind
    return [found[row] for row in sorted(found)]


def test_gallery_marks_correct_false_and_missed_labels():
    images = [Image.new("RGB", size, GREY) for size in ((64, 64), (400, 300), (90, 800))]
    truths = [["cup", "key"], ["moon"], []]
    predictions = [[("cup", 0.9), ("fish", 0.5)], [("moon", 2.0)], [("moon", -1.0), ("猫", -2.0)]]
    sheet = data.draw_gallery(images, truths, predictions)
    pixels = np.asarray(sheet)
    top = int(np.flatnonzero((pixels[:, 100] == GREY).all(axis=1))[0])
    for i in range(3):
        x = 16 + 176 * i
        assert (pixels[top:top + 160, x:x + 160] == GREY).all()
        assert (pixels[top:top + 160, x - 16:x] == 255).all()
        assert marks(sheet, x, top + 165) == [["correct", "false", "missed"], ["correct"],
                                              ["false", "false"]][i]
    assert marks(sheet, 16, 0)[0] == "correct"  # the legend
    rows = data.draw_gallery(8 * images[:1], 8 * truths[:1], 8 * predictions[:1])
    assert rows.width == 16 + 6 * 176 and rows.height > 2 * 220
    many = data.draw_gallery(images[:1], [["key"]], [[(f"label {i}", 0.5) for i in range(99)]])
    assert many.height < 600 and marks(many, 16, top + 165) == 11 * ["false"]


def test_write_gallery_shows_as_many_predictions_as_labels(tmp_path):
    dataset = data.load_dataset("toy", split="test", transform=lambda image: torch.zeros(3, 2, 2))
    dataset = dataset.subset(range(0, 300, 2))
    dataset.images = 2000 * [Image.new("RGB", (32, 32), "white")]  # nothing that looks like a mark
    rows = torch.linspace(0, 149, 24).long()

    def perfect(images):
        assert images.shape == (24, 3, 2, 2)
        return dataset.targets[rows].float(), None

    args = Namespace(gallery=str(tmp_path / "sheet.png"), top=None, threshold=None)
    data.write_gallery(dataset, perfect, args)
    with Image.open(args.gallery) as sheet:
        assert marks(sheet, 16, 60) and set(marks(sheet, 16, 60)) == {"correct"}
    args.top = 1
    data.write_gallery(dataset, lambda images: (-dataset.targets[rows].float(), None), args)
    with Image.open(args.gallery) as sheet:
        assert marks(sheet, 16, 60)[:2] == ["false", "missed"]
    assert dataset.transform is not None
    # unknown labels are neither right nor wrong: they are not shown
    dataset.targets[dataset.targets == -1] = 0
    args.top = 5
    data.write_gallery(dataset, lambda images: (torch.randn(24, 56), None), args)
    with Image.open(args.gallery) as sheet:
        assert set(marks(sheet, 16, 60)) == {"correct"}


# ---- what --predict is made of

def test_patterns_are_expanded_in_order_and_files_come_once(tmp_path):
    for name in ("b.png", "a.png", "inner/c.png", "inner/d.txt", "odd[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns):
        return [file.name for file in data.image_files([f"{tmp_path}/{p}" for p in patterns])]

    assert names("*.png") == ["a.png", "b.png", "odd[1].png"]
    assert names("**/*.png") == ["a.png", "b.png", "c.png", "odd[1].png"]
    assert names("odd[1].png", "inn*") == ["odd[1].png", "c.png"]
    assert names("b.png", "?.png", "") == ["b.png", "a.png", "c.png", "odd[1].png"]
    with pytest.raises(UserError, match=r"\*\.jpg"):
        names("a.png", "*.jpg")


def test_best_labels():
    scores, labels = torch.tensor([0.1, 0.69999999, -2.0, 0.7]), ["a", "b", "c", "d"]

    def best(top=None, threshold=None):
        return data.best_labels(scores, labels, Namespace(top=top, threshold=threshold))

    assert best() == [("b", 0.7), ("d", 0.7), ("a", 0.1), ("c", -2.0)]
    assert best(top=1) == [("b", 0.7)] and best(threshold=5.0) == []
    assert best(threshold=0.7) == [("b", 0.7), ("d", 0.7)]
    assert best(top=3, threshold=-9.0) == best()[:3]


def test_heatmaps_of_different_images_are_different_files(tmp_path):
    names = ["a/x.png", "a/x.jpg", "a/x-2.png", "b/x.png", "b/X.JPG", "c/v.2.png"]
    pictures = data.heatmap_files([tmp_path / name for name in names], tmp_path / "maps")
    found = [str(path.relative_to(tmp_path / "maps")) for path in pictures.values()]
    assert found == ["a/x.png", "a/x-2.png", "a/x-2-2.png", "b/x.png", "b/X-2.png", "c/v.2.png"]
    assert data.heatmap_files([tmp_path / "a/x.jpg"], "maps") == {
        tmp_path / "a/x.jpg": Path.cwd() / "maps/x.png"}
    # photos are not written over where maps go to the photos' folder
    files = [tmp_path / "x.png", tmp_path / "y.jpg"]
    assert [p.name for p in data.heatmap_files(files, tmp_path).values()] == ["x-2.png", "y.png"]


def test_csv_rows_leave_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), data.csv_rows(path) as table:
        table.writerow(["half"])
        raise KeyboardInterrupt
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with data.csv_rows(path) as table:
        table.writerow(["a,b", 'say "owl"', 1.5])
    assert list(csv.reader(path.open())) == [["a,b", 'say "owl"', "1.5"]]
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="out.csv/x"), data.csv_rows(path / "x.csv"):
        raise AssertionError("it starts work before it knows")
    with data.csv_rows(None) as table:
        assert table is None


def test_predict_draws_the_maps_it_is_given_in_batches_of_any_size(tmp_path, capsys):
    for i, x in enumerate((0, 50, 0)):  # a white square in a corner of each
        image = Image.new("RGB", (100, 100), (60, 60, 60))
        image.paste("white", (x, x, x + 50, x + 50))
        image.save(tmp_path / f"{i}.png")
    seen = []

    def score(images):
        seen.append(len(images))
        maps = F.avg_pool2d(images[:, :1], 5)  # [B, 1, 2, 2]
        return torch.tensor([[0.5, 0.25]]).expand(len(images), 2), maps.repeat(1, 2, 1, 1)

    def preprocess(image):
        return torch.from_numpy(np.asarray(image.resize((10, 10)), np.float32)).permute(2, 0, 1)

    args = Namespace(predict=data.image_files([tmp_path]), batch_size=2, workers=0, csv=None,
                     heatmap=str(tmp_path / "deep" / "maps"), top=1, threshold=None, quiet=True)
    data.predict(score, ["owl", "cat"], preprocess, args)
    assert seen == [2, 1]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"path": str(tmp_path / f"{i}.png"), "labels": [
        {"label": "owl", "score": 0.5}]} for i in range(3)]
    for i in range(3):
        with Image.open(tmp_path / "deep" / "maps" / f"{i}.png") as sheet:
            assert sheet.width == 16 + 2 * 376
            pixels = np.asarray(sheet)[16:376].astype(int)
        change = np.abs(pixels[:, 392:752] - pixels[:, 16:376]).sum(axis=-1)
        corners = [change[60, 60], change[300, 300]]
        assert corners[i % 2] > 100 and corners[1 - i % 2] < 10


def predict_png(name, csv=None, score=1.0):
    """data.predict of one label, which has this score, and one image."""
    args = Namespace(predict=[name], batch_size=1, workers=1, csv=csv, heatmap=None, top=None,
                     threshold=None, quiet=True)
    data.predict(lambda images: (torch.full((1, 1), score), None), ["owl"],
                 lambda image: torch.zeros(3, 2, 2), args)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_not_printed(tmp_path, capsys, score):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png.*--precision fp32"):
        predict_png(tmp_path / "x.png", score=score)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_any_file_name_is_printed_as_json_that_gives_it_back(tmp_path, monkeypatch, encoding):
    name, table = os.fsdecode(bytes(tmp_path) + b"/\xe9 \xe7\x8c\xab.png"), tmp_path / "out.csv"
    try:
        Image.new("RGB", (4, 4)).save(name, "PNG")
    except OSError:
        pytest.skip("this file system has no such names")
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding))
    predict_png(name, csv=table)
    path = json.loads(printed.getvalue().decode("utf-8"))["path"]
    assert os.fsencode(path) == os.fsencode(name)
    rows = list(csv.reader(open(table, encoding="utf-8", newline="")))
    assert rows == [["path", "label", "score"],
                    [str(tmp_path / "\\udce9 猫.png"), "owl", "1.0"]]


def test_predictions_that_nobody_reads_end_quietly(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit) as stop:
            predict_png(tmp_path / "x.png", csv=tmp_path / "out.csv")
        stdout.flush()  # as Python does when it ends
    assert stop.value.code == 141 and capsys.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]  # no half of a table


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk to print to")
def test_predictions_that_cannot_be_printed_stop_with_the_reason(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with open("/dev/full", "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        with pytest.raises(UserError, match="cannot print.*space"):
            predict_png(tmp_path / "x.png", csv=tmp_path / "out.csv")
        stdout.flush()


# ---- the command line

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{method: folder of a run}."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        mkt.main(["--limit", "32", "--epochs", "1", "--prompt-epochs", "0", "--quiet", "--output",
                  str(folder / "mkt"), "--gallery", str(folder / "sheet.png")])
        lang_cls.main(["--clip", "toy-RN", "--labels", "star,moon,fish,house", "--sentences", "99",
                       "--epochs", "2", "--quiet", "--output", str(folder / "lang_cls")])
    return {"mkt": folder / "mkt", "lang_cls": folder / "lang_cls"}


METHODS = pytest.mark.parametrize("script, method", [(mkt, "mkt"), (lang_cls, "lang_cls")],
                                  ids=["mkt", "lang_cls"])


@METHODS
def test_training_leaves_curves(trained, script, method):
    with Image.open(trained[method] / "curves.png") as image:
        assert image.width == 520 and pixels_of(image.convert("RGB"), data.LINE_COLOURS[0]).any()
    assert method == "lang_cls" or (trained[method].parent / "sheet.png").exists()


@METHODS
def test_predict_goes_on_after_a_broken_image(trained, tmp_path, capsys, script, method):
    photos = tmp_path / "photos"
    for i, name in enumerate(["a/x.png", "b/x.png", "b/x.bmp"]):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        data.toy_scene("benchmark", 7, i).save(photos / name)
    (photos / "broken.png").write_bytes(b"\x89PNG and nothing else")
    arguments = ["--checkpoint", str(trained[method] / "best.pt"), "--device", "cpu", "--quiet"]
    with pytest.raises(SystemExit) as stop:
        script.main(["--predict", f"{photos}/*.png", f"{photos}/?", *arguments, "--csv",
                     str(tmp_path / "out.csv"), "--heatmap", str(tmp_path / "maps"), "--top", "2"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.count("\n") == 1 and "broken.png" in err
    printed = [json.loads(line) for line in out.splitlines()]
    names = ["a/x.png", "b/x.bmp", "b/x.png"]
    assert [line["path"] for line in printed] == [str(photos / name) for name in names]
    assert all(len(line["labels"]) == 2 for line in printed)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "label", "score"]] + [
        [line["path"], entry["label"], str(entry["score"])]
        for line in printed for entry in line["labels"]]
    maps = sorted(str(path.relative_to(tmp_path / "maps"))
                  for path in (tmp_path / "maps").rglob("*.*"))
    assert maps == ["a/x.png", "b/x-2.png", "b/x.png"]
    contents = {(tmp_path / "maps" / name).read_bytes() for name in maps}
    assert len(contents) == 3
    # --threshold, and the scores do not depend on what else is predicted
    threshold = printed[0]["labels"][0]["score"]
    script.main(["--predict", str(photos / "a/x.png"), *arguments, "--threshold", str(threshold)])
    alone = json.loads(capsys.readouterr().out)
    assert alone["labels"] == [entry for entry in printed[0]["labels"]
                               if entry["score"] >= threshold]
    script.main(["--predict", str(photos / "a"), *arguments, "--threshold", "1e9"])
    assert json.loads(capsys.readouterr().out)["labels"] == []


@METHODS
def test_maps_are_what_the_local_scores_are_made_of(trained, script, method):
    image, best = data.toy_scene("benchmark", 7, 0), trained[method] / "best.pt"
    args = script.parse_arguments(["--device", "cpu"])
    with torch.no_grad():
        if method == "mkt":
            model, preprocess, state = mkt.load_checkpoint(best, args)
            model.streams, labels = "local", state["labels"][:5]
            score = mkt.scorer(model, labels, args)
        else:
            clip, model, preprocess, _ = lang_cls.load_checkpoint(best, args)
            args.streams = "local"
            score = lang_cls.scorer(clip, model, args)
        images = preprocess(image)[None]
        assert score(images)[1] is None  # they cost something
        args.heatmap = "maps"
        scores, maps = score(images)
    assert maps.shape[:2] == scores.shape and maps.shape[2] == maps.shape[3] > 1
    count = model.topk if method == "mkt" else 1
    expected = maps.flatten(2).sort(dim=2, descending=True).values[:, :, :count].mean(dim=2)
    if method == "mkt":
        expected = expected / expected.norm()
    torch.testing.assert_close(scores, expected)


@METHODS
def test_a_heatmap_follows_the_thing_across_the_image(trained, script, method):
    """A shift by whole cells of the grid shifts the map of an otherwise empty image."""
    args = script.parse_arguments(["--device", "cpu"])
    args.heatmap = "maps"
    loaded = script.load_checkpoint(trained[method] / "best.pt", args)
    preprocess, state = loaded[-2:]
    score = (mkt.scorer(loaded[0], state["labels"], args) if method == "mkt"
             else lang_cls.scorer(loaded[0], loaded[1], args))
    thing = Image.new("RGB", (32, 32), (200, 30, 30))
    found = []
    for x, y in ((0, 0), (96, 0), (0, 96), (96, 96)):
        image = Image.new("RGB", (128, 128), (225, 225, 225))
        image.paste(thing, (x, y))
        with torch.no_grad():
            maps = score(preprocess(image)[None])[1][0]
        maps = F.interpolate((maps - maps.mean(dim=(1, 2), keepdim=True)).abs()[None], (4, 4),
                             mode="area")[0].sum(dim=0)
        row, column = divmod(int(maps.argmax()), 4)
        found.append((column >= 2, row >= 2))
    assert found == [(False, False), (True, False), (False, True), (True, True)]


@METHODS
@pytest.mark.parametrize("arguments, message", [
    (["--predict", "{photos}/*.jpg", "--checkpoint", "{best}"], "*.jpg"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--csv", "{photos}/no/x.csv"],
     "photos/no: No such file or directory"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--csv", "{photos}"],
     "photos is a folder"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--csv", "/proc/x.csv"], "/proc"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--csv", ""], "--csv"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--heatmap", "{best}"], "best.pt"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--heatmap", "{best}/a/b"], "best.pt"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--gallery", "sheet.png"], "--gallery"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--top", "0"], "--top"),
    (["--predict", "{photos}", "--checkpoint", "{best}", "--threshold", "nan"], "--threshold"),
    (["--checkpoint", "{best}"], "--checkpoint needs --predict"),
    (["--csv", "out.csv"], "--csv needs --predict"),
    (["--heatmap", "maps"], "--heatmap needs --predict"),
    (["--top", "3"], "--top needs --predict"),
    (["--gallery", "sheet.jpg"], "sheet.jpg"),
    (["--gallery", "{photos}/no/sheet.png"], "photos/no"),
    (["--gallery", "{best}/sheet.png"], "best.pt"),
])
def test_options_that_do_not_fit_are_refused(trained, tmp_path, capsys, script, method, arguments,
                                             message):
    (tmp_path / "photos").mkdir()
    data.toy_scene("benchmark", 7, 0).save(tmp_path / "photos" / "x.png")
    with pytest.raises(SystemExit) as stop:
        script.main([argument.format(photos=tmp_path / "photos", best=trained[method] / "best.pt")
                     for argument in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith(f"{method}.py: error: ") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*.*")] == ["x.png"]


def test_gallery_with_eval_and_without_a_dataset(trained, tmp_path, capsys):
    mkt.main(["--eval", str(trained["mkt"] / "best.pt"), "--limit", "8", "--quiet", "--gallery",
              str(tmp_path / "sheet.png"), "--top", "1"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(marks(sheet, 16, 60)) >= 2  # a prediction and a row below it
    with pytest.raises(SystemExit):
        lang_cls.main(["--labels", "star,moon", "--gallery", str(tmp_path / "sheet.png")])
    assert "--gallery" in capsys.readouterr().err


def test_a_map_of_a_squeezed_image_covers_the_whole_photo():
    photo, values = Image.new("RGB", (400, 200), "white"), np.zeros((4, 4), np.float32)
    values[:, 0] = 1  # the left edge of what the map covers
    for whole, expected in ((True, 0), (False, 0.25)):
        sheet = np.asarray(data.draw_heatmaps(photo, [("left", 1.0, values)], whole), np.int32)
        tile = sheet[40:180, 16 + 360 + 16:16 + 360 + 16 + 360]  # the second of two, 360 wide
        coloured = np.abs(tile - 255).sum(axis=(0, 2)).astype(float)
        assert abs(coloured.argmax() / 360 - expected) < 0.06
