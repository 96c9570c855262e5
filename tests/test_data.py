"""Images of every kind, the dataset, partial labels, files; test_datasets.py has the datasets."""
import argparse
import importlib.util
import json
import os
import struct
import sys
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

import data
from data import MultiLabelDataset, UserError, open_image
from trees import drawn, random_targets, write

# pytest undoes data.py's own filter
pytestmark = [pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
              pytest.mark.filterwarnings("ignore:Sparse")]


# ---- images

def test_upright_whatever_the_exif_orientation_says(tmp_path):
    corners = np.zeros((20, 30, 3), np.uint8)
    corners[:10, :15] = 255  # the upper left quarter is white
    for orientation, turn in ((6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name, options in (("a.png", {}), ("a.jpg", {"quality": 100})):
            Image.fromarray(corners).transpose(turn).save(tmp_path / name, exif=exif, **options)
            opened = np.asarray(open_image(tmp_path / name)).astype(int)
            assert opened.shape == (20, 30, 3)
            assert abs(opened - corners).mean() < 8, (orientation, name)


@pytest.mark.parametrize("mode, colour, expected", [
    ("1", 1, (255, 255, 255)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("LA", (0, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # a fifth red on white
    ("I;16", 257 * 100, (100, 100, 100)), ("I;16", 1000, (4, 4, 4)),  # not clipped to white
    ("I", 257 * 100, (100, 100, 100))])
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / {"CMYK": "a.tif", "I": "a.pgm"}.get(mode, "a.png")
    Image.new(mode, (4, 3), colour).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert np.abs(np.subtract(image.getpixel((1, 1)), expected)).max() <= 1


def test_a_long_comment_harms_no_pixel(tmp_path):
    comment = PngImagePlugin.PngInfo()
    comment.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=comment)
    assert open_image(tmp_path / "a.png").getpixel((3, 2)) == (1, 2, 3)


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch):
    calls = []
    fake = SimpleNamespace(register_heif_opener=lambda: calls.append("registered"))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    spec = importlib.util.spec_from_file_location("data_again", data.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert calls == ["registered"]


@pytest.mark.parametrize("name, options", [
    ("a.jpg", {"progressive": True}), ("a.png", {}), ("a.gif", {})])
def test_truncated_photos_are_used_as_far_as_they_go(tmp_path, monkeypatch, capsys, name, options):
    noise = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).resize((240, 160), Image.Resampling.BICUBIC).save(path, **options)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    images = [np.asarray(open_image(path)) for _ in range(2)]
    assert capsys.readouterr().err == f"{path}: truncated, used as far as it goes\n"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # Pillow's own way
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(images[0], expected) and np.array_equal(images[1], expected)


def png_without_pixels(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("content, reason", [
    (b"", "the file is empty"), (b"<html>404 not found</html>", "not an image"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC: convert it to JPEG"),
    (b"\xff\x0a" + bytes(40), "JPEG XL"), (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
    (png_without_pixels(8, 8), "truncated before its first pixels"),
    (png_without_pixels(20000, 20000), "exceeds limit of 200000000 pixels"),
    (png_without_pixels(3, 600), "3 x 600 is too long"),
    ("I", "32-bit"), ("F", "32-bit")])  # pixels without a range
def test_unreadable_files_are_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.tif"
    if isinstance(content, str):
        Image.new(content, (4, 3), 200).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_image_files(tmp_path):
    accents = {"composed": "\u00e9", "apart": "e\u0301"}
    links = [f"links [1]/{accents['apart']}/a.png", f"{accents['composed']}/b.png"]
    for name in ("b.JPG", "inner/a.avif", "notes.txt", ".hidden.jpg", ".git/a.jpg", *links):
        write(tmp_path / name, "")
    folder = tmp_path / "links [1]"
    (folder / "loop").symlink_to(tmp_path / accents["composed"])
    (tmp_path / accents["composed"] / "back").symlink_to(folder)
    (folder / "nowhere.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    (tmp_path / "empty").mkdir()
    for paths, expected in (
            (["notes.txt", "inner"], ["notes.txt", "inner/a.avif"]),
            (["*.JPG", ".hidden.jpg", "b.JPG"], ["b.JPG", ".hidden.jpg"]),
            (["links [1]/n*.png"], ["links [1]/nowhere.png"]),
            (["links [1]"], ["links [1]/nowhere.png", links[0], "links [1]/loop/b.png"])):
        found = data.image_files([str(tmp_path / path) for path in paths])
        assert found == [tmp_path / name for name in expected]
    other, = data.image_files([f"{folder}/{accents['composed']}/a.png"])
    assert other.is_file()
    for path, reason in (("no/such", "no such"), ("empty", "no files")):
        with pytest.raises(UserError, match=f"--predict: {reason}.*"):
            data.image_files([str(tmp_path / path)])


def predicted(paths, output=None):
    """[(path, red of its photo)] of what photo_batches yields for paths, which may raise."""
    args = argparse.Namespace(predict=paths, output=output, quiet=True)
    for paths, photos, images in data.photo_batches(args, to_number):
        assert images.tolist() == [photo.getpixel((0, 0))[0] for photo in photos]
        assert len(paths) == len(photos) <= 16
        yield from zip(map(str, paths), images.tolist())


def test_photo_batches_in_order_and_what_cannot_be_read_is_named(tmp_path, capsys):
    paths = [save(tmp_path / f"{i:03}.png", i) for i in range(100)]
    Path(paths[3]).write_bytes(b"")
    readable = [(path, i) for i, path in enumerate(paths) if i != 3]
    assert list(predicted([tmp_path])) == readable
    messages = capsys.readouterr().err
    assert f"{paths[3]}: the file is empty\n" in messages and "1 of 100 files could" in messages
    for named in (paths[2:5], [f"{tmp_path}/003*"]):  # by name, and nothing else
        with pytest.raises(UserError, match=f"1 of {len(named)} files could not be read"):
            list(predicted(named))


def test_batches_of_large_photos_are_small(monkeypatch, tmp_path):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(5)]
    photo = SimpleNamespace(width=10_000, height=6_000)
    monkeypatch.setattr(data, "open_image", lambda path: photo)
    args = argparse.Namespace(predict=paths, output=None, quiet=True)
    batches = data.photo_batches(args, lambda photo: torch.zeros(1))
    assert [len(photos) for _, photos, _ in batches] == [2, 2, 1]


def test_photo_batches_go_on_where_a_killed_run_stopped(tmp_path, capsys):
    paths = [save(tmp_path / "photos" / f"{i}\u2028.png", i) for i in range(5)]
    output = tmp_path / "out.jsonl"
    lines = [json.dumps({"path": path}, ensure_ascii=False) + "\n" for path in paths]
    write(output, lines[0] + lines[3] + lines[4][:-5])
    assert list(predicted([tmp_path / "photos"], output)) == [(paths[i], i) for i in (1, 2, 4)]
    assert output.read_text() == lines[0] + lines[3]
    write(output, "".join(lines))
    assert not list(predicted(paths, output))
    assert "5 of 5 are in" in capsys.readouterr().err
    for damaged in ("[]\ncut", "{\n"):
        write(output, damaged)
        with pytest.raises(UserError, match="out.jsonl: not a file of predictions"):
            list(predicted(paths, output))
        assert output.read_text() == damaged


# ---- the dataset

def save(path, number):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6), (number, 0, 0)).save(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{i % 3}" / f"{i}.png", i) for i in range(10)]


def to_number(image):
    return torch.tensor(image.getpixel((0, 0))[0])


def dataset_of(images, **options):
    """Labels "0".."5"; image i has the target row that spells i in binary, as +1 and -1."""
    bits = [[1 if i >> b & 1 else -1 for b in range(6)] for i in range(len(images))]
    return MultiLabelDataset(["0", " 1", *"2345"], torch.tensor(bits, dtype=torch.int8), images,
                             **{"transform": to_number, **options})


def items(dataset):
    """What number each image shows, checked against its target."""
    for image, target in dataset:
        assert sum(2 ** b for b in range(6) if target[b] == 1) == image
    return [int(image) for image, _ in dataset]


def test_rows_subsets_and_label_split(files):
    dataset = dataset_of(files, unseen=[3, 1])
    assert items(dataset) == list(range(10)) and len(dataset) == 10
    assert dataset.missing == dataset.replaced == 0 and dataset.labels == [*"012345"]
    assert dataset.seen.tolist() == [0, 2, 4, 5] and dataset.unseen.tolist() == [1, 3]
    assert dataset.targets.tolist() == [target.tolist() for _, target in dataset]
    subset = dataset.subset([7, 2])
    assert items(subset) == [7, 2] and items(dataset.subset(range(3))) == [0, 1, 2]
    assert items(subset.subset(torch.tensor([False, True]))) == [2]
    subset.transform, subset.on_error = None, "replace"
    assert dataset.transform is to_number and dataset.on_error == "raise"
    with pytest.raises(UserError, match="no images"):
        dataset.subset(torch.zeros(10, dtype=torch.bool))
    scenes = tuple(Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(4))
    dataset = dataset_of(scenes, rows=[0, 2, 3])
    assert items(dataset) == dataset.rows.tolist() == [0, 2, 3] and len(dataset.full_targets) == 4
    assert dataset.subset([2, 0]).rows.tolist() == [3, 0]


def test_hold_out(files):
    dataset = dataset_of(files, on_error="replace", transform="training")
    rest, held_out = dataset.hold_out(0.3, "test")
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    assert held_out.rows.tolist() == order[:3] and rest.rows.tolist() == order[3:]
    assert (held_out.transform, held_out.on_error) == ("test", "raise")
    assert (rest.transform, rest.on_error) == ("training", "replace")
    assert dataset.hold_out(0, None) == (dataset, None)
    assert len(dataset.hold_out(0.01, None)[1]) == 1
    dataset.allow_missing = True
    Path(files[order[1]]).write_bytes(b"")
    assert dataset.hold_out(0.3, None)[1].rows.tolist() == [order[0], order[2]]


@pytest.mark.parametrize("labels, targets, message", [
    (["cat", " cat", "dog"], torch.zeros(2, 3, dtype=torch.int8), "more than once: cat"),
    (["cat", "dog"], torch.zeros(3, 2, dtype=torch.int8), r"\[2, 2\].*\[3, 2\]"),
    (["cat", "dog"], torch.zeros(2, 2), "int8"),
    (["cat", "dog"], torch.tensor([[1, -2], [0, 0]], dtype=torch.int8), "1, -1, 0, not .*-2"),
    (["cat"], torch.tensor([[2], [0]], dtype=torch.int8).to_sparse_csr(), "1, -1, 0, not .*2")])
def test_what_does_not_fit_together(files, labels, targets, message):
    with pytest.raises(UserError, match=message):
        MultiLabelDataset(labels, targets, files[:2])


def test_missing_and_damaged_files_are_left_out_and_counted(tmp_path, capsys):
    files = [save(tmp_path / "many" / f"{i}.png", i) for i in range(40)]
    dataset = dataset_of(files)
    dataset.leave_out_damaged()
    assert len(dataset) == 40 and not capsys.readouterr().err
    os.remove(files[5])
    dataset = dataset_of(files)
    assert f"1 of 40 images missing or damaged: {files[5]}: no such" in capsys.readouterr().err
    Path(files[30]).write_bytes(b"")
    dataset.leave_out_damaged()
    assert f"1 of 39 images missing or damaged: {files[30]}: the" in capsys.readouterr().err
    expected = [i for i in range(40) if i not in (5, 30)]
    assert items(dataset) == expected == dataset.rows.tolist() and dataset.missing == 2
    for i in (6, 7):  # 5% are the limit
        os.remove(files[i])
    os.symlink("nowhere", files[6])
    with pytest.raises(UserError, match="3 of 40 .*--allow-missing"):
        dataset_of(files)
    dataset = dataset_of(files, allow_missing=True)
    assert len(dataset) == 37
    for i in (8, 9):
        Path(files[i]).write_bytes(b"")
    dataset.allow_missing = False
    with pytest.raises(UserError, match="3 of 37 .*--allow-missing"):
        dataset.leave_out_damaged()


def test_names_in_the_other_unicode_form_are_found(tmp_path):
    for there, listed in (("\u00e9", "e\u0301"), ("e\u0301", "\u00e9")):
        root = tmp_path / str(len(there))
        root.mkdir()
        save(root / f"in {there}" / f"{there}.png", 1)
        dataset = dataset_of([str(root / f"in {listed}" / f"{listed}.png")])
        assert dataset.missing == 0 and dataset[0][0] == 1
        assert len(data.image_files([f"{root}/in {listed}/"])) == 1
        write(root / f"in {there}" / f"{there}.png", "")
        named = [root / f"in {listed}" / f"{listed}.png", save(root / "a.png", 2)]
        with pytest.raises(UserError, match="1 of 2 files"):
            list(predicted(named))


def test_folders_of_many_files_are_looked_through_when_they_change(tmp_path, cache, monkeypatch):
    files = 99_999 * [save(tmp_path / "a.png", 0)] + [save(tmp_path / "b.png", 0)]
    targets, scanned, scandir = torch.zeros(len(files), 1, dtype=torch.int8), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: scanned.append(folder) or scandir(folder))
    assert [MultiLabelDataset(["0"], targets, files).missing for _ in range(2)] == [0, 0]
    assert len(scanned) == 1
    os.unlink(files[-1])
    dataset = MultiLabelDataset(["0"], targets, files)
    assert dataset.missing == 1 and dataset.rows[-1] == 99_998 and len(scanned) == 2


@pytest.mark.parametrize("damaged, found", [([], 0), ([1], 0), ([1, 6, 5999], 3)])
def test_damage_in_a_sample_of_many_files_is_searched_in_all(tmp_path, damaged, found):
    files = [save(tmp_path / "a.png", 0)] * 6000
    write(tmp_path / "b.png", "")
    for i in damaged:
        files[i] = str(tmp_path / "b.png")
    targets = torch.zeros(6000, 1, dtype=torch.int8)
    dataset = MultiLabelDataset(["0"], targets, files)
    dataset.leave_out_damaged()  # which looks at 0, 6, 12, ... first
    assert dataset.missing == found


def test_unreadable_image_in_evaluation_stops_with_its_name(files):
    Path(files[4]).write_bytes(b"")
    batches = iter(DataLoader(dataset_of(files), batch_size=2, num_workers=1))
    next(batches), next(batches)
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == (  # without the worker's traceback
        f"{files[4]}: the file is empty; remove the file, then --eval the checkpoint")
    list(batches)  # lets the worker end


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_in_training_are_named_once(files, workers, capfd):
    for i in (2, 3, 9):
        Path(files[i]).write_bytes(b"")
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    pixels[0, 0, 0] = 5
    Image.fromarray(pixels).save(files[5])
    Path(files[5]).write_bytes(Path(files[5]).read_bytes()[:-4000])
    dataset = dataset_of(files, on_error="replace")
    shown = [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    for _ in range(2):
        # forked: other workers may write where pytest's earlier tests did
        batches = list(DataLoader(dataset, batch_size=5, num_workers=workers,
                                  multiprocessing_context="fork" if workers else None))
        assert torch.cat([images for images, _ in batches]).tolist() == shown
        targets = torch.cat([targets for _, targets in batches])
        assert torch.equal(targets, dataset.targets[shown])
        assert dataset.replaced == 3
    messages = capfd.readouterr().err
    assert all(messages.count(files[i]) == 1 for i in (2, 3, 5, 9)), messages
    for file in files:
        Path(file).write_bytes(b"")
    with pytest.raises(UserError, match="empty$"):  # of ten in a row, which is a damaged disk
        dataset[0]


@pytest.mark.parametrize("rows", [None, [4, 0, 7, 2]])
def test_sparse_targets_are_the_dense_ones(rows):
    dense = random_targets(9, 5)
    dense[4] = 0
    dense[:, 3] = -dense[:, 3].abs()
    scenes = tuple(Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(9))
    expected = dense if rows is None else dense[rows]
    for targets in (dense, dense.to_sparse_csr()):
        dataset = MultiLabelDataset([*"abcde"], targets, scenes, transform=to_number, rows=rows)
        assert torch.equal(dataset.targets, expected) and dataset.targets.dtype == torch.int8
        spawned = DataLoader(dataset, 5, num_workers=1, multiprocessing_context="spawn")
        for loader in (dataset, spawned) if targets.is_sparse_csr and rows else (dataset,):
            found = [target.view(-1, 5) for _, target in loader]
            assert torch.equal(torch.cat(found), expected)
        present, absent = dataset.counts()
        assert present.tolist() == [int((column == 1).sum()) for column in expected.T]
        assert absent.tolist() == [int((column == -1).sum()) for column in expected.T]
        assert dataset.shows().tolist() == [1 in row for row in expected.tolist()]


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_csr])
def test_a_process_that_is_not_forked_shares_targets_and_paths(layout, files):
    targets = random_targets(2000, 200)
    if layout == torch.sparse_csr:
        targets = targets.to_sparse_csr()
    dataset = MultiLabelDataset(map(str, range(200)), targets, 2000 * [str(files[0])])
    pickled = ForkingPickler.dumps(dataset)  # what every worker is sent
    assert len(pickled) < 10_000
    again = ForkingPickler.loads(pickled)
    assert again[1999][0] == dataset[1999][0] and torch.equal(again[1999][1], dataset[1999][1])


# ---- partial labels

@pytest.mark.parametrize("images, share", [(5000, 0.3), (0, 0.5), (40, 1.0), (200, None)])
def test_known_entries_are_drawn_as_published(images, share):
    targets = random_targets(images, 7)
    targets[17:18] = -1
    before = targets.clone()
    if share is None:
        kept = data.keep_single_positive(targets, seed=1200)
    else:
        kept = data.keep_partial(targets, share, seed=3)
    assert kept.dtype == torch.int8 and torch.equal(targets, before)
    assert np.array_equal(kept, drawn(before, share, seed=3))
    for wrong in (0, 1.01, float("nan")):
        with pytest.raises(UserError, match="proportion"):
            data.keep_partial(targets, wrong, seed=3)


# ---- files

def test_write_file_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "folder" / "file"
    for content in ("old", b"new", {"tensor": torch.arange(3)}):
        data.write_file(path, content)
    assert torch.load(path, weights_only=True)["tensor"].tolist() == [0, 1, 2]
    data.write_file(path, Image.new("RGB", (2, 3), (1, 2, 3)))
    assert Image.open(path).format == "PNG" and open_image(path).size == (2, 3)
    data.write_file(path, "\u732b")
    with pytest.raises(TypeError):
        data.write_file(path, {"not": (i for i in "saved")})
    with pytest.raises(UserError, match="cannot write .*file/below: "):
        data.write_file(path / "below", "new")
    assert data.read_text(path) == "\u732b" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_read_json(tmp_path):
    path = tmp_path / "a"
    path.write_text('\ufeff{"a": 1}\n\n"b\u2028c"\n', encoding="utf-8")
    assert data.read_json(path) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", "b\u2028c")]
    path.write_text('[1,\n "a"]')
    assert data.read_json(path) == [(f"{path}, entry 1", 1), (f"{path}, entry 2", "a")]
    for content, message in ((b'"a"\n{', ", line 2: not JSON"), (b"[1,\n x]", ": not JSON"),
                             (b"\xff", ": not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}{message}"):
            data.read_json(path)


def test_cached_while_sources_and_key_stay(tmp_path, cache, monkeypatch):
    source, made = tmp_path / "a", []
    source.write_text("text")

    def get(key):
        def make():
            made.append(key)
            return {"count": np.array(len(made)), "names": np.array(["cat", "d\u00f6g"])}
        arrays = data.cached("name", [source], key, make)
        assert arrays["names"].tolist() == ["cat", "d\u00f6g"] and len(arrays) == 2
        return int(arrays["count"])

    assert [get(key) for key in (1, 1, {"size": [2]}, {"size": [2]}, 1)] == [1, 1, 2, 2, 1]
    os.utime(source, (1, 1))
    assert get(1) == 3
    for damaged in (b"", next(cache.iterdir()).read_bytes()[:-40], b"\x80\x04."):
        for file in cache.iterdir():
            file.write_bytes(damaged)
        assert get(1) == len(made) == get(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file: nothing can be kept
    assert get(1) == len(made) == 7


# ---- the command line

def test_parse_says_what_is_typed_and_load_splits_heeds_it(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    for title in ("a trained model", "model"):
        parser.add_argument_group(title)
    data.add_options(parser)
    parser.set_defaults(predict=None, eval=None, checkpoint=None, threshold=None)
    argv = ["--data", "toy", "--no-zero-shot", "--limit=3", "--workers", "4", "--output", "none"]
    args, saved, typed = data.parse(parser, argv, "mkt", "--seed 7")
    assert typed == {"data", "zero_shot", "limit", "workers", "output"} and saved is None
    assert (args.workers, args.seed) == (4, 7)
    training, test = data.load_splits(args)
    assert len(test) == 3 and not len(test.unseen) and training.on_error == "replace"
    assert data.load_splits(args, with_training=False)[0] is None
    assert data.parse(parser, [], "mkt", "")[0].output == "runs/mkt-toy"
    saved = {"method": "mkt", "args": {**vars(args), "data": "coco", "root": "x", "seed": 7}}
    torch.save(saved, tmp_path / "run.pt")
    parser.set_defaults(eval=tmp_path / "run.pt")
    for name, root in ("coco", "x"), ("folder", None):  # options of coco's are not of another
        args, _, _ = data.parse(parser, ["--data", name], "mkt", "")
        assert (args.data, args.root, args.limit, args.seed) == (name, root, 3 if root else None, 7)
    with pytest.raises(SystemExit):
        parser.parse_args(["--workers", "-1"])


def test_read_labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffice cream, melted\r\n\r\n \u732b \r\n-".encode())
    assert data.read_labels(str(path)) == ["ice cream, melted", "\u732b", "-"]
    assert data.read_labels(" owl,ice cream ") == ["owl", "ice cream"]
    for text, message in (("owl, cat,", "--labels: an empty name"), ("", "an empty name"),
                          ("owl, cat,owl ", "more than once: owl"), ("no.txt", "no file no.txt")):
        with pytest.raises(UserError, match=message):
            data.read_labels(text)


def test_scores_of_all_images_are_those_of_each(tmp_path):
    dataset = data.load_dataset("toy", split="test", limit=5, transform=ToTensor())
    args = argparse.Namespace(workers=0, device="cpu", quiet=True)

    def score(images):
        return {"mean": images.mean(dim=(2, 3)), ("first", ""): images[:, 0, 0, 0].half()}

    scores = data.score_images(score, dataset, 2, args)
    images = torch.stack([dataset[i][0] for i in range(5)])
    assert torch.equal(scores["mean"], images.mean(dim=(2, 3)))
    assert torch.equal(scores["first", ""], images[:, 0, 0, 0].half().float())
