import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import UserError, MultiLabelDataset, load_dataset


def save(path, colour=(200, 30, 40), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


# ---- MultiLabelDataset

def dataset_of(images, **options):
    """Labels "0".."3"; image i has the target row that spells i in binary, as +1 and -1."""
    bits = [[1 if i >> b & 1 else -1 for b in range(4)] for i in range(len(images))]
    return MultiLabelDataset(["0", "1", "2", "3"], torch.tensor(bits, dtype=torch.int8), images,
                             **options)


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{i % 3}" / f"{i}.png", colour=(i, 0, 0)) for i in range(10)]


def image_number(image):
    return image.getpixel((0, 0))[0]


def to_number(image):
    return torch.tensor(image_number(image))


def test_items_and_label_split(files):
    dataset = dataset_of(files, unseen=[3, 1])
    assert len(dataset) == 10 and dataset.missing == dataset.replaced == 0
    assert dataset.seen.tolist() == [0, 2] and dataset.unseen.tolist() == [1, 3]
    assert dataset.seen.dtype == dataset.unseen.dtype == torch.int64
    for i in range(10):
        image, target = dataset[i]
        assert image_number(image) == i and torch.equal(target, dataset.targets[i])
        assert dataset.image_name(i) == files[i]
    assert image_number(dataset[-1][0]) == 9
    with pytest.raises(IndexError):
        dataset[10]
    assert len(list(dataset)) == 10


def test_images_from_an_object():
    class Scenes:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.new("RGB", (2, 2), (i, 0, 0))

    dataset = dataset_of(Scenes(), transform=to_number, name="scenes")
    assert [int(image) for image, _ in dataset] == [0, 1, 2]
    assert dataset.image_name(2) == "scenes image 2"
    assert [int(image) for image, _ in dataset.subset([2, 0])] == [2, 0]


def test_subset(files):
    dataset = dataset_of(files, transform=to_number)
    subset = dataset.subset([7, 2])
    assert [(int(image), target.tolist()) for image, target in subset] == [
        (7, [1, 1, 1, -1]), (2, [-1, 1, -1, -1])]
    assert subset.image_name(0) == files[7]
    assert [int(image) for image, _ in subset.subset(torch.tensor([False, True]))] == [2]
    assert [int(image) for image, _ in dataset.subset(range(3))] == [0, 1, 2]
    subset.transform, subset.on_error = None, "replace"
    assert dataset.transform is to_number and dataset.on_error == "raise"
    with pytest.raises(UserError, match="no images"):
        dataset.subset(torch.zeros(10, dtype=torch.bool))


@pytest.mark.parametrize("labels, targets, message", [
    ([], torch.zeros(2, 0, dtype=torch.int8), "no labels"),
    (["cat", " cat", "dog"], torch.zeros(2, 3, dtype=torch.int8), "more than once: cat"),
    (["cat", " "], torch.zeros(2, 2, dtype=torch.int8), "label 1"),
    (["cat", "dog"], torch.zeros(2, 3, dtype=torch.int8), r"\[2, 2\].*\[2, 3\]"),
    (["cat", "dog"], torch.zeros(3, 2, dtype=torch.int8), r"\[2, 2\].*\[3, 2\]"),
    (["cat", "dog"], torch.zeros(2, dtype=torch.int8), r"\[2, 2\].*\[2\]"),
    (["cat", "dog"], torch.zeros(2, 2), "int8"),
    (["cat", "dog"], torch.tensor([[1, 2], [0, 0]], dtype=torch.int8), r"\+1 \(present\)"),
    (["cat", "dog"], torch.tensor([[1, -2], [0, 0]], dtype=torch.int8), r"\+1 \(present\)"),
])
def test_what_does_not_fit_together(files, labels, targets, message):
    with pytest.raises(UserError, match=message):
        MultiLabelDataset(labels, targets, files[:2])


def test_labels_that_differ_in_case_are_different(files):
    dataset = MultiLabelDataset(["Turkey", "turkey "], torch.zeros(10, 2, dtype=torch.int8), files)
    assert dataset.labels == ["Turkey", "turkey"]


def test_no_images_and_unknown_on_error(files):
    with pytest.raises(UserError, match="no images"):
        dataset_of([], unseen=[])
    with pytest.raises(UserError, match="on_error"):
        dataset_of(files, on_error="ignore")


def test_missing_files(files, tmp_path, capsys):
    many = [save(tmp_path / "many" / f"{i}.png", colour=(i, 0, 0)) for i in range(40)]
    targets = (torch.arange(40) % 3 - 1).to(torch.int8)[:, None]
    for i in (5, 6):  # exactly 5%
        os.remove(many[i])
    dataset = MultiLabelDataset(["a"], targets, many, transform=to_number)
    assert dataset.missing == 2 and len(dataset) == 38
    assert f"2 of 40 images missing, e.g. {many[5]}" in capsys.readouterr().err
    numbers = [int(image) for image, _ in dataset]
    assert numbers == [i for i in range(40) if i not in (5, 6)]
    assert [int(target) for _, target in dataset] == [i % 3 - 1 for i in numbers]
    assert dataset.image_name(5) == many[7]

    os.remove(many[20])
    with pytest.raises(UserError, match="3 of 40 .*--allow-missing"):
        MultiLabelDataset(["a"], targets, many)
    allowed = MultiLabelDataset(["a"], targets, many, allow_missing=True, quiet=True)
    assert allowed.missing == 3 and len(allowed) == 37
    assert capsys.readouterr().err == ""

    with pytest.raises(UserError, match="10 of 10"):
        dataset_of([str(tmp_path / "nowhere" / f"{i}.png") for i in range(10)], allow_missing=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_in_evaluation_stops_with_its_name(files, workers):
    Path(files[4]).write_bytes(b"")
    dataset = dataset_of(files, transform=to_number)
    with pytest.raises(UserError) as error:
        list(DataLoader(dataset, batch_size=2, num_workers=workers))
    assert str(error.value) == f"{files[4]}: the file is empty"  # without the worker's traceback


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_in_training_is_replaced_named_once_and_counted(files, workers, capfd):
    for i in (2, 3, 9):
        Path(files[i]).write_bytes(b"")
    dataset = dataset_of(files, transform=to_number, on_error="replace")
    shown = [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    for _ in range(2):
        batches = list(DataLoader(dataset, batch_size=5, num_workers=workers))
        assert torch.cat([images for images, _ in batches]).tolist() == shown
        targets = torch.cat([targets for _, targets in batches])
        assert torch.equal(targets, dataset.targets[shown])
        assert dataset.replaced == 3
    messages = capfd.readouterr().err
    assert all(messages.count(files[i]) == 1 for i in (2, 3, 9)), messages
    assert dataset.subset(range(5)).replaced == 2


def test_training_stops_when_nothing_can_be_read(tmp_path):
    files = [str(tmp_path / f"{i}.jpg") for i in range(16)]
    for path in files:
        Path(path).touch()
    dataset = dataset_of(files, on_error="replace")
    with pytest.raises(UserError, match="3.jpg"):
        dataset[3]
    assert dataset.replaced == 10


def test_train_transform():
    transform = data.train_transform(32)
    rng = np.random.RandomState(0)
    image = Image.fromarray(rng.randint(0, 256, (50, 70, 3), np.uint8))
    first, second = transform(image), transform(image)
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    # black and white are fixed by the normalisation: 0 -> -mean / std, 1 -> (1 - mean) / std
    mean, std = torch.tensor(data.CLIP_MEAN), torch.tensor(data.CLIP_STD)
    low, high = (-mean / std)[:, None, None], ((1 - mean) / std)[:, None, None]
    assert (first >= low - 1e-4).all() and (first <= high + 1e-4).all()
    plain = data.train_transform(8, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert 0 <= plain.min() and plain.max() <= 1


# ---- partial labels

def random_targets(images, labels, seed=0):
    values = np.random.RandomState(seed).randint(-1, 2, (images, labels))
    return torch.from_numpy(values).to(torch.int8)


def test_keep_partial_is_the_published_convention():
    targets = random_targets(5000, 7)  # more rows than are drawn at a time
    mask = np.random.RandomState(3).rand(5000, 7) < 0.3
    expected = np.where(mask, targets.numpy(), 0)
    before = targets.clone()
    kept = data.keep_partial(targets, 0.3, seed=3)
    assert kept.dtype == torch.int8 and np.array_equal(kept.numpy(), expected)
    assert torch.equal(targets, before)
    assert torch.equal(data.keep_partial(targets, 1.0, seed=3), targets)


def test_keep_partial_grows_with_the_proportion():
    targets = random_targets(300, 20)
    smaller = None
    for proportion in (0.1, 0.3, 0.5, 0.9):
        kept = data.keep_partial(targets, proportion, seed=0)
        assert ((kept == targets) | (kept == 0)).all()
        if smaller is not None:
            assert (kept[smaller != 0] == smaller[smaller != 0]).all()
            assert (kept != 0).sum() > (smaller != 0).sum()
        smaller = kept
    assert not torch.equal(data.keep_partial(targets, 0.5, 0), data.keep_partial(targets, 0.5, 1))


@pytest.mark.parametrize("proportion", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_keep_partial_refuses(proportion):
    with pytest.raises(ValueError, match="proportion"):
        data.keep_partial(random_targets(2, 2), proportion, seed=0)


def test_keep_single_positive():
    targets = random_targets(200, 6)
    targets[17] = -1
    before = targets.clone()
    kept = data.keep_single_positive(targets, seed=1200)
    assert kept.dtype == torch.int8 and torch.equal(targets, before)
    assert torch.equal(kept.sum(1), (targets > 0).any(1).long())
    assert ((kept == 0) | ((kept == 1) & (targets == 1))).all()
    assert torch.equal(kept, data.keep_single_positive(targets, seed=1200))
    assert not torch.equal(kept, data.keep_single_positive(targets, seed=1))


def test_keep_single_positive_is_uniform():
    targets = torch.tensor([[1, -1, 1, 0, 1]], dtype=torch.int8).repeat(30000, 1)
    counts = data.keep_single_positive(targets, seed=0).sum(0, dtype=torch.int64)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert (counts[[0, 2, 4]] - 10000).abs().max() < 5 * (30000 * 2 / 9) ** 0.5  # 5 deviations


def test_partial_labels_of_any_shape():
    for seed in range(40):
        rng = np.random.RandomState(seed)
        images, labels, proportion = rng.randint(0, 30), rng.randint(1, 30), 1 - rng.rand()
        targets = random_targets(images, labels, seed)
        if seed % 2:
            targets = random_targets(labels, images, seed).T  # not contiguous
        kept = data.keep_partial(targets, proportion, seed)
        draw = np.random.RandomState(seed).rand(images, labels)
        assert kept.shape == targets.shape and kept.dtype == torch.int8
        for i in range(images):
            for j in range(labels):
                assert kept[i, j] == (targets[i, j] if draw[i, j] < proportion else 0)
        single = data.keep_single_positive(targets, seed)
        assert single.shape == targets.shape and single.dtype == torch.int8
        for i in range(images):
            positives = [j for j in range(labels) if targets[i, j] == 1]
            chosen = [j for j in range(labels) if single[i, j] != 0]
            assert len(chosen) == min(1, len(positives)) and set(chosen) <= set(positives)
            assert all(single[i, j] == 1 for j in chosen)


# ---- load_dataset

def test_unknown_names_are_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="'nus'.*nuswide, nuswide81"):
        load_dataset("nus", tmp_path)
    with pytest.raises(UserError, match="'val'.*train, test"):
        load_dataset("nuswide", tmp_path, split="val")
    with pytest.raises(UserError, match="'annotated'.*annotated_only, allow_missing, quiet"):
        load_dataset("nuswide81", tmp_path, annotated=True)
    with pytest.raises(UserError, match="--root"):
        load_dataset("nuswide")
    with pytest.raises(UserError, match="no such directory: .*nowhere"):
        load_dataset("nuswide", tmp_path / "nowhere")


# ---- NUS-WIDE

TAGS = ["nature", "sky", "blue", "water", "red", "dog", "light", "girl", "green"]
CONCEPTS = ["dog", "fire", "sky", "water"]  # fire is no tag, as in the official lists
SEEN = ["nature", "blue", "red", "light", "girl", "green"]
IMAGES = ["actor\\0001_2124494179.jpg", "actor\\0002_174174086.jpg", "zoo\\0003_1.jpg",
          "bird house\\0004_99.jpg", "zoo\\0005_7.jpg", "actor\\0006_8.jpg", "zoo\\0007_9.jpg"]
TRAIN, TEST = [4, 0, 6, 2], [3, 5, 1]  # rows of IMAGES, not in their order
HAS_TAG = np.array([[(3 * row + 5 * column) % 4 == 0 for column in range(9)] for row in range(7)])
HAS_TAG[2] = False  # an image without tags
HAS_CONCEPT = np.array([[row * column % 3 == 1 for column in range(4)] for row in range(7)])
HAS_CONCEPT[5, 1] = True


def write_nuswide(root):
    def write(path, text):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())

    write("ConceptsList/Concepts81.txt", "".join(f"{name}\r\n" for name in CONCEPTS))
    write("NUS_WID_Tags/TagList1k.txt", "\r\n".join(TAGS) + "\r\n")
    write("NUS_WID_Tags/AllTags1k.txt",
          "".join("".join(f"{entry:d}\t" for entry in row) + "\r\n" for row in HAS_TAG))
    for column, name in enumerate(CONCEPTS):
        lines = "".join(f"{entry:d} \r\n" for entry in HAS_CONCEPT[:, column])
        write(f"Groundtruth/AllLabels/Labels_{name}.txt", lines)
    write("ImageList/Imagelist.txt", "".join(f"{path} \r\n" for path in IMAGES))
    write("ImageList/TrainImagelist.txt", "".join(f"{IMAGES[row]}\r\n" for row in TRAIN))
    write("ImageList/TestImagelist.txt", "\r\n".join(IMAGES[row] for row in TEST))
    for row, path in enumerate(IMAGES):
        save(root / "Flickr" / path.replace("\\", "/"), colour=(40 * row, 0, 0), size=(40, 40))


@pytest.fixture
def nuswide_root(tmp_path):
    write_nuswide(tmp_path / "nus")
    return tmp_path / "nus"


def signs(values):
    return torch.from_numpy(np.where(values, 1, -1)).to(torch.int8)


def rows_of(dataset):
    """Which row of IMAGES every image of the dataset is, by its pixels."""
    return [round(np.asarray(image)[..., 0].mean() / 40) for image, _ in dataset]


def test_nuswide(nuswide_root):
    columns = [TAGS.index(tag) for tag in SEEN]
    train = load_dataset("nuswide", nuswide_root, "train")
    test = load_dataset("nuswide", str(nuswide_root), "test")
    for dataset in (train, test):
        assert dataset.labels == SEEN + CONCEPTS
        assert dataset.seen.tolist() == [0, 1, 2, 3, 4, 5]
        assert dataset.unseen.tolist() == [6, 7, 8, 9]
    assert rows_of(train) == TRAIN and rows_of(test) == TEST
    assert torch.equal(train.targets[:, :6], signs(HAS_TAG[TRAIN][:, columns]))
    assert (train.targets[:, 6:] == 0).all()
    assert torch.equal(test.targets[:, :6], signs(HAS_TAG[TEST][:, columns]))
    assert torch.equal(test.targets[:, 6:], signs(HAS_CONCEPT[TEST]))
    assert train.on_error == "replace" and test.on_error == "raise"


def test_nuswide81(nuswide_root):
    for split, rows in (("train", TRAIN), ("test", TEST)):
        dataset = load_dataset("nuswide81", nuswide_root, split)
        assert dataset.labels == CONCEPTS and not len(dataset.unseen)
        assert rows_of(dataset) == rows
        assert torch.equal(dataset.targets, signs(HAS_CONCEPT[rows]))
        annotated = [row for row in rows if HAS_CONCEPT[row].any()]
        assert 0 < len(annotated) < len(rows)
        dataset = load_dataset("nuswide81", nuswide_root, split, annotated_only=True)
        assert rows_of(dataset) == annotated
        assert torch.equal(dataset.targets, signs(HAS_CONCEPT[annotated]))


def test_nuswide_in_the_other_layout(nuswide_root, cache):
    before = load_dataset("nuswide", nuswide_root, "test")
    (nuswide_root / "ConceptsList/Concepts81.txt").rename(nuswide_root / "Concepts81.txt")
    (nuswide_root / "Groundtruth/AllLabels").rename(nuswide_root / "AllLabels")
    tags = nuswide_root / "NUS_WID_Tags/TagList1k.txt"
    tags.write_bytes(b"\xef\xbb\xbf" + tags.read_bytes())  # a byte-order mark
    after = load_dataset("nuswide", nuswide_root, "test")
    assert after.labels == before.labels and torch.equal(after.targets, before.targets)
    assert len(list(cache.iterdir())) == 3  # the tags, and the concepts of both places


def test_nuswide_tells_the_counts(nuswide_root, capsys):
    load_dataset("nuswide", nuswide_root, "train")
    message = capsys.readouterr().err
    assert "4 images listed, 161,789 published" in message and "WARNING" in message
    load_dataset("nuswide", nuswide_root, "test", quiet=True)
    assert capsys.readouterr().err == ""


def test_nuswide_counts_placeholders(tmp_path, capsys):
    paths = [save(tmp_path / f"{i}.png") for i in range(22)]
    paths += [save(tmp_path / f"other{i}.png", colour=(i, i, 99)) for i in range(30)]
    dataset = MultiLabelDataset(["a"], torch.zeros(52, 1, dtype=torch.int8), paths)
    data._note_placeholders(dataset, quiet=False)
    assert "22 of 52 images are copies of 1 file" in capsys.readouterr().err
    data._note_placeholders(dataset.subset(range(3, 52)), quiet=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", [
    "ConceptsList/Concepts81.txt", "NUS_WID_Tags/TagList1k.txt", "NUS_WID_Tags/AllTags1k.txt",
    "Groundtruth/AllLabels/Labels_fire.txt", "ImageList/Imagelist.txt",
    "ImageList/TestImagelist.txt"])
def test_nuswide_missing_file(nuswide_root, path):
    (nuswide_root / path).unlink()
    with pytest.raises(UserError) as error:
        load_dataset("nuswide", nuswide_root, "test")
    first_line, _, layout = str(error.value).partition("\n")
    assert path.rsplit("/", 1)[-1] in first_line and str(nuswide_root) in first_line
    assert "Flickr/<directory>/<image>.jpg" in layout


def test_nuswide_missing_images(nuswide_root):
    (nuswide_root / "Flickr" / "zoo" / "0003_1.jpg").unlink()
    with pytest.raises(UserError, match="1 of 4 images missing, e.g. .*zoo/0003_1.jpg"):
        load_dataset("nuswide", nuswide_root, "train")
    dataset = load_dataset("nuswide", nuswide_root, "train", allow_missing=True)
    assert dataset.missing == 1 and rows_of(dataset) == [4, 0, 6]


def replace_line(path, number, line):
    lines = path.read_bytes().split(b"\r\n")
    lines[number - 1] = line
    path.write_bytes(b"\r\n".join(lines))


TAG_FILE = "NUS_WID_Tags/AllTags1k.txt"


@pytest.mark.parametrize("line, problem", [
    (b"0\t1\t2\t0\t0\t0\t0\t0\t0\t", "'2' is not 0 or 1"),
    (b"0\t1\t-1\t0\t0\t0\t0\t0\t0\t", "'-1' is not 0 or 1"),
    (b"0\t01\t0\t0\t0\t0\t0\t0\t0\t", "'01' is not 0 or 1"),
    (b"0\t01\t0\t0\t0\t0\t0\t0\t", "'01' is not 0 or 1"),  # nine digits, but eight entries
    (b"0\t1\tx\t0\t0\t0\t0\t0\t0\t", "'x' is not 0 or 1"),
    (b"0\t1\0\t0\t0\t0\t0\t0\t0\t0", "is not 0 or 1"),
    (b"0\t1\t0\t0\t0\t0\t0\t0\t", "8 entries instead of 9"),
    (b"0\t1\t0\t0\t0\t0\t0\t0\t0\t0", "10 entries instead of 9"),
])
def test_nuswide_bad_entry(nuswide_root, line, problem, cache):
    replace_line(nuswide_root / TAG_FILE, 5, line)
    with pytest.raises(UserError) as error:
        load_dataset("nuswide", nuswide_root, "train")
    assert f"{nuswide_root / TAG_FILE}, line 5: " in str(error.value)
    assert problem in str(error.value)
    assert not cache.exists()


def test_nuswide_bad_entry_in_a_label_file(nuswide_root):
    path = nuswide_root / "Groundtruth/AllLabels/Labels_sky.txt"
    replace_line(path, 7, b"yes")
    with pytest.raises(UserError) as error:
        load_dataset("nuswide81", nuswide_root, "train")
    assert str(error.value) == f"{path}, line 7: 'yes' is not 0 or 1"


def test_bad_entry_far_into_a_large_file(tmp_path):
    rows = np.random.RandomState(0).rand(30000, 100) < 0.1  # 6 MB, several blocks
    text = np.full((30000, 202), ord("\t"), np.uint8)
    text[:, 0:200:2] = ord("0") + rows
    text[:, 200:] = [13, 10]
    path = tmp_path / "table.txt"
    path.write_bytes(text.tobytes())
    bits = data._read_bits(path, 100, True)
    assert np.array_equal(np.unpackbits(bits, axis=1, count=100), rows)
    text[23456, 50] = ord("7")
    path.write_bytes(text.tobytes())
    with pytest.raises(UserError, match="line 23457: '7'"):
        data._read_bits(path, 100, True)


@pytest.mark.parametrize("change", ["one less", "one more", "blank lines", "spaces",
                                    "no last newline"])
def test_nuswide_number_of_rows(nuswide_root, change):
    path = nuswide_root / TAG_FILE
    text = path.read_bytes()
    lines = text.split(b"\r\n")[:-1]
    path.write_bytes({
        "one less": b"\r\n".join(lines[:-1]), "one more": text + lines[0],
        "blank lines": text + b"\r\n \r\n", "spaces": text.replace(b"\t", b"  "),
        "no last newline": text.rstrip().replace(b"\r\n", b"\n")}[change])
    if change.startswith("one"):
        count = 6 if change == "one less" else 8
        with pytest.raises(UserError, match=f"AllTags1k.txt: {count} rows for 7 images"):
            load_dataset("nuswide", nuswide_root, "train")
    else:
        targets = load_dataset("nuswide", nuswide_root, "train").targets
        columns = [TAGS.index(tag) for tag in SEEN]
        assert torch.equal(targets[:, :6], signs(HAS_TAG[TRAIN][:, columns]))


def test_nuswide_image_lists_that_disagree(nuswide_root):
    path = nuswide_root / "ImageList/TrainImagelist.txt"
    text = path.read_bytes()
    path.write_bytes(text + b"zoo\\0008_5.jpg\r\n")
    with pytest.raises(UserError, match="1 images are not in Imagelist.txt, e.g. 0008_5.jpg"):
        load_dataset("nuswide", nuswide_root, "train")
    path.write_bytes(text + b"elsewhere/0003_1.jpg\r\n")
    with pytest.raises(UserError, match="TrainImagelist.txt, line 5: 0003_1.jpg is listed twice"):
        load_dataset("nuswide", nuswide_root, "train")
    path.write_bytes(text.replace(b"zoo\\0007_9.jpg", b""))
    with pytest.raises(UserError, match="TrainImagelist.txt, line 3: the line is empty"):
        load_dataset("nuswide", nuswide_root, "train")


def test_nuswide_cache(nuswide_root, cache, monkeypatch, capsys):
    first = load_dataset("nuswide", nuswide_root, "test").targets
    assert len(list(cache.iterdir())) == 2  # tags and concepts, nothing temporary
    read, reads = data._read_bits, []
    monkeypatch.setattr(data, "_read_bits", lambda *args: reads.append(args[0]) or read(*args))
    assert torch.equal(load_dataset("nuswide", nuswide_root, "test").targets, first)
    assert reads == []

    path = nuswide_root / TAG_FILE
    row = TEST[1]
    replace_line(path, row + 1, b"\t".join(b"%d" % entry for entry in ~HAS_TAG[row]) + b"\t")
    os.utime(path, (1, 1))
    second = load_dataset("nuswide", nuswide_root, "test").targets
    assert torch.equal(second[1, :6], -first[1, :6])
    assert torch.equal(second[[0, 2]], first[[0, 2]])
    assert reads == [str(path)]

    capsys.readouterr()
    for damage in (lambda content: b"", lambda content: content[:len(content) // 2],
                   lambda content: b"\x80\x04." + content, flip_a_bit):
        reads.clear()
        for file in cache.iterdir():
            file.write_bytes(damage(file.read_bytes()))
        assert torch.equal(load_dataset("nuswide", nuswide_root, "test").targets, second)
        assert len(reads) == 5 and "made anew" in capsys.readouterr().err
    reads.clear()
    load_dataset("nuswide", nuswide_root, "test")
    assert reads == []


def flip_a_bit(content):
    """A bit of the array "bits" in the archive, 130 bytes after the start of its npy header."""
    start = content.index(b"\x93NUMPY", content.index(b"bits.npy")) + 130
    return content[:start] + bytes([content[start] ^ 1]) + content[start + 1:]


def test_nuswide_without_a_place_for_the_cache(nuswide_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    dataset = load_dataset("nuswide81", nuswide_root, "test")
    assert torch.equal(dataset.targets, signs(HAS_CONCEPT[TEST]))
    assert "cannot be written" in capsys.readouterr().err


# ---- a run: its options and files

def arguments_of(tmp_path, *given):
    parser = data.Parser()
    data.add_run_arguments(parser, "mkt")
    args = parser.parse_args(["--data", "toy", "--output", str(tmp_path), *given])
    args.batch_size, args.workers = 4, args.workers or 0
    return args


def test_write_file_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.write_file(path, "old")
    for content in (b"new", {"tensor": torch.arange(3)}):
        data.write_file(path, content)
    assert torch.load(path, weights_only=True)["tensor"].tolist() == [0, 1, 2]
    data.write_file(path, "old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full_disk)
    with pytest.raises(data.UserError, match="file: No space left"):
        data.write_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_start_run_moves_earlier_runs_aside_and_nothing_else(tmp_path):
    args = arguments_of(tmp_path / "run")
    for number in (1, 2, 3):
        data.start_run(args)
        (tmp_path / "run" / "last.pt").write_text(str(number))
        (tmp_path / "run" / "notes.txt").write_text("mine")
    earlier = [tmp_path / "run" / f"previous-{i}" / "last.pt" for i in (1, 2)]
    assert [file.read_text() for file in earlier] == ["1", "2"]
    assert (tmp_path / "run" / "notes.txt").exists()
    assert json.loads((tmp_path / "run" / "args.json").read_text())["data"] == "toy"


def test_finish_epoch_keeps_the_epoch_with_the_best_validation(tmp_path, capsys):
    state = {"method": "mkt", "log": [], "seconds": 0.0}
    for epoch, score in enumerate([0.2, 0.5, 0.4], 1):
        line = {"epoch": epoch, "val_mAP": score, "seconds": 2.0}
        data.finish_epoch(tmp_path, state, line, False)
    assert len(data.read_checkpoint(tmp_path / "best.pt", "mkt")["log"]) == 2
    assert len(data.read_checkpoint(tmp_path / "last.pt", "mkt")["log"]) == 3
    assert state["seconds"] == 6 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert "val_mAP 0.5" in capsys.readouterr().out
    data.finish_epoch(tmp_path, state, {"epoch": 4, "seconds": 1.0}, True)  # none: the last
    assert len(data.read_checkpoint(tmp_path / "best.pt", "mkt")["log"]) == 4
    with pytest.raises(data.UserError, match="mkt.py, not of trm_ml.py"):
        data.read_checkpoint(tmp_path / "best.pt", "trm_ml")


def test_finite_means_names_the_first_bad_step():
    history = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert data.finite_means(history, ["loss", "ranking"], "epoch 1", "runs") == {
        "loss": 2.0, "ranking": 3.0}
    history.append(torch.tensor([1.0, torch.inf]))
    with pytest.raises(data.UserError, match=r"epoch 1, step 3 \(loss 1, ranking inf\).*runs/last"):
        data.finite_means(history, ["loss", "ranking"], "epoch 1", "runs")


def test_options_have_limits_and_errors_are_one_line(tmp_path):
    number = data.number(float, 0, 1)
    assert number("0.5") == 0.5 and data.number(int, 1)("7") == 7
    for text in ("-0.1", "1.5", "nan", "inf"):
        with pytest.raises(data.argparse.ArgumentTypeError):
            number(text)
    for given in (["--limit", "0"], ["--seed", "x"], ["--precision", "fp8"], ["--nosuch"]):
        with pytest.raises(data.UserError, match=given[0]):
            arguments_of(tmp_path, *given)


def test_load_split_limits_and_hold_out_divides(tmp_path):
    args = arguments_of(tmp_path, "--limit", "10")
    dataset = data.load_split("test", None, args)
    assert len(dataset) == 10
    rest, validation = data.hold_out(dataset, 0.3, "transform")
    assert len(validation) == 3 and len(rest) == 7 and validation.transform == "transform"
    assert rest.transform is None
    assert sorted([*rest.indices.tolist(), *validation.indices.tolist()]) == list(range(10))
    assert data.hold_out(dataset, 0, None) == (dataset, None)
    dataset.transform = lambda image: torch.zeros(1)
    assert [len(images) for images, _ in data.make_loader(dataset, args)] == [4, 4, 2]


def test_check_same_and_check_labels(tmp_path):
    args = arguments_of(tmp_path)
    data.check_same(args, vars(args), data.SAME)
    with pytest.raises(data.UserError, match="--seed 3, not 0"):
        data.check_same(args, {**vars(args), "seed": 3}, data.SAME)
    dataset = data.load_split("test", None, args)
    data.check_labels(dataset, {"labels": list(data.TOY_LABELS), "data": "toy"})
    with pytest.raises(data.UserError, match="1 labels of toy; toy has 56"):
        data.check_labels(dataset, {"labels": ["owl"], "data": "toy"})


def test_check_weights():
    clip, state = argparse.Namespace(fingerprint=lambda: "abc"), {"clip": "RN50"}
    data.check_weights("best.pt", {**state, "clip_fingerprint": "abc"}, clip)
    with pytest.raises(data.UserError, match="best.pt belongs to other weights than RN50"):
        data.check_weights("best.pt", {**state, "clip_fingerprint": "abd"}, clip)


def test_fill_defaults_keeps_what_was_given():
    def filled(**given):
        args = argparse.Namespace(**{"data": "toy", "eval": None, "output": None, "lr": None,
                                     "topk": 0, **given})
        data.fill_defaults(args, "method", {"lr": 1, "topk": 2}, {"lr": 3, "topk": 4})
        return args.lr, args.topk, args.output

    assert filled() == (3, 0, "runs/method-toy")
    assert filled(data="coco", topk=None, output="here") == (1, 2, "here")
    assert filled(data=None, lr=5) == (5, 0, "runs/method-toy")
    assert filled(data=None, labels=["a", "b"]) == (1, 0, "runs/method-labels")
    assert filled(eval="best.pt") == (3, 0, None)


def test_command_line_ends_in_one_line(capsys):
    for raised, code, printed in (
            (data.UserError("no such file: a"), 2, "script.py: error: no such file: a\n"),
            (LookupError("no weights"), 2, "script.py: error: no weights\n"),
            (KeyboardInterrupt(), 130, "interrupted")):
        with pytest.raises(SystemExit) as error, data.command_line("script.py", LookupError):
            raise raised
        assert error.value.code == code and printed in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), data.command_line("script.py"):  # a defect is not hidden
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as error, data.command_line("script.py"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.code == 130


def test_a_closed_pipe_ends_quietly():
    program = ("import data\nwith data.command_line('script.py'):\n"
               "    for i in range(100_000): print(i)")
    with subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=Path(data.__file__).parent) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_write_results_says_where_and_what_is_missing(tmp_path, capsys):
    args = argparse.Namespace(data="coco", clip="RN50", seed=1, output=str(tmp_path / "run"))
    rows = [{"name": "a", "kind": "method", "mAP": 0.5, "F1@3": float("nan")}]
    tested = argparse.Namespace(missing=7, targets=torch.tensor([[1, 0, -1], [1, 1, 0]]))
    results = data.write_results("mkt", args, 2.04, rows, tested, time.time())
    rows = [{"name": "a", "kind": "method", "mAP": 0.5, "F1@3": None}]
    assert results == {"method": "mkt", "data": "coco", "clip": "RN50", "seed": 1, "seconds": 2.0,
                       "rows": rows}
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    assert printed.startswith("7 test images are missing") and str(tmp_path / "run") in printed
    assert "\n1 labels that no test image shows" in printed
    args.output = None
    assert data.write_results("mkt", args, 2.04, rows, None, time.time() - 3) == results
    assert capsys.readouterr().out == "3 s\n"


def test_image_files_and_label_lists(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.JPG", "inner/a.png", "notes.txt"):
        (tmp_path / name).touch()
    files = data.image_files([str(tmp_path), str(tmp_path / "notes.txt")])
    assert [file.name for file in files] == ["b.JPG", "a.png", "notes.txt"]  # what is named, counts
    for paths in (["/no/such"], [str(tmp_path / "inner" / "nothing")]):
        with pytest.raises(data.UserError, match="no such"):
            data.image_files(paths)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError, match="no images"):
        data.image_files([tmp_path / "empty"])
    assert data.parse_labels(" owl, ice cream,") == ["owl", "ice cream"]
    for text in ("", " , ", "owl,cat,owl"):
        with pytest.raises(data.UserError, match="--labels"):
            data.parse_labels(text)


def test_progress_yields_everything_and_is_silent_without_a_terminal(capsys):
    assert list(data.progress(range(3), "three")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_files_of_a_run_go_where_none_are_and_an_unusable_output_is_named(tmp_path):
    args = argparse.Namespace(output=str(tmp_path / "run"))
    (tmp_path / "run" / "previous-2").mkdir(parents=True)  # previous-1 was deleted by hand
    for _ in range(3):
        data.start_run(args)
    assert sorted(path.name for path in (tmp_path / "run").glob("previous-*")) == [
        "previous-1", "previous-2", "previous-3"]
    assert list((tmp_path / "run" / "previous-2").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(data.UserError, match="--output"):
        data.start_run(argparse.Namespace(output=str(tmp_path / "file")))


def test_a_strip_is_refused_before_it_becomes_huge(tmp_path):
    Image.new("RGB", (3, 600)).save(tmp_path / "strip.png")
    with pytest.raises(data.UserError, match="3 x 600 is too long"):
        data.open_image(tmp_path / "strip.png")
    Image.new("RGB", (6, 600)).save(tmp_path / "long.png")
    assert data.open_image(tmp_path / "long.png").size == (6, 600)


def test_an_evaluation_scores_what_the_training_saw():
    args = argparse.Namespace(data=None, clip=None, output=None,
                              **dict.fromkeys(data.DATASET_OPTIONS))
    args.not_visible = "unknown"
    data.same_dataset(args, {"data": "voc2007", "clip": "RN50", "args": {
        "difficult": "unknown", "not_visible": "absent"}})
    assert (args.data, args.clip) == ("voc2007", "RN50")
    assert args.difficult == "unknown" and args.not_visible == "unknown"
    args.difficult = None
    data.same_dataset(args, {"data": "coco", "clip": "RN50", "args": {"difficult": "unknown"}})
    assert args.data == "voc2007" and args.difficult is None


def test_evaluation_settings():
    dataset = data.load_dataset("toy", split="test")
    settings, ks = data.evaluation(dataset)
    assert settings.keys() == {"zsl_", "gzsl_"} and ks == (3, 5)
    assert torch.equal(settings["zsl_"], dataset.unseen) and len(settings["gzsl_"]) == 56
    assert data.evaluation(data.load_dataset("toy", split="test", zero_shot=False))[0].keys() == {""}
