"""Every dataset on a small tree in its official format; expected targets are written by hand."""
import argparse
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import trees
from data import UserError, load_dataset
from trees import as_windows_writes, make, numbers, write

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # pytest undoes data.py's own filter


def signs(values):
    return torch.from_numpy(np.where(values, 1, -1)).to(torch.int8)


def both_splits(*args, **options):
    return [load_dataset(*args, split=split, **options) for split in ("train", "test")]


def message_of(*args, **options):
    with pytest.raises(UserError) as error:
        load_dataset(*args, **options)
    return str(error.value)


# ---- NUS-WIDE

def test_nuswide(tmp_path):
    seen = ["nature", "blue", "red", "light", "girl", "green"]
    columns = [trees.TAGS.index(tag) for tag in seen]
    make("nuswide", tmp_path)
    for split, dataset in zip(("train", "test"), both_splits("nuswide", tmp_path)):
        rows = trees.NUS_ROWS[split]
        assert dataset.labels == seen + trees.CONCEPTS and numbers(dataset) == rows
        assert dataset.seen.tolist() == [*range(6)] and dataset.unseen.tolist() == [6, 7, 8, 9]
        assert dataset.seen.dtype == dataset.unseen.dtype == torch.int64
        assert torch.equal(dataset.targets[:, :6], signs(trees.HAS_TAG[rows][:, columns]))
        concepts = signs(trees.HAS_CONCEPT[rows])
        assert torch.equal(dataset.targets[:, 6:], concepts * (split == "test"))
        assert dataset.on_error == {"train": "replace", "test": "raise"}[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_nuswide81(tmp_path, split):
    rows = trees.NUS_ROWS[split]
    dataset = load_dataset("nuswide81", str(make("nuswide81", tmp_path)), split)
    assert dataset.labels == trees.CONCEPTS and not len(dataset.unseen)
    assert numbers(dataset) == rows
    assert torch.equal(dataset.targets, signs(trees.HAS_CONCEPT[rows]))
    annotated = load_dataset("nuswide81", tmp_path, split, annotated_only=True)
    kept = [row for row in rows if trees.HAS_CONCEPT[row].any()]
    assert numbers(annotated) == kept and 0 < len(kept) < len(rows)
    assert torch.equal(annotated.targets, signs(trees.HAS_CONCEPT[kept]))
    assert torch.equal(annotated.full_targets, dataset.targets)


def test_nuswide_counts_placeholders(tmp_path, capsys):
    names = [f"{i}.png" for i in range(52)]
    for file in ("Imagelist", "TrainImagelist", "TestImagelist"):
        write(tmp_path / f"ImageList/{file}.txt", "\n".join(names))
    write(tmp_path / "ConceptsList/Concepts81.txt", "dog")
    write(tmp_path / "AllLabels/Labels_dog.txt", "1\n" * 52)
    (tmp_path / "Flickr").mkdir()
    for i, name in enumerate(names):
        colour = (0, 0, 0) if i < 22 else (i, i, 99)
        Image.new("RGB", (8, 6), colour).save(tmp_path / "Flickr" / name)
    load_dataset("nuswide81", tmp_path)
    assert "22 of 52 images are copies of one file" in capsys.readouterr().err


# ---- COCO

COCO_PRESENT = [{"car", "toothbrush"}, {"person", "cat", "toothbrush"}, set(), {"car", "dog"},
                {"person", "stop sign"}]
WITHOUT_CROWD = [{"toothbrush"}, COCO_PRESENT[1], set(), {"car"}, COCO_PRESENT[4]]
NEITHER = {"traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball",
           "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog",
           "potted plant", "dining table", "cell phone", "teddy bear", "hair drier"}


def present(dataset):
    return [{dataset.labels[c] for c in (row == 1).nonzero()[:, 0]} for row in dataset.targets]


def test_coco(tmp_path):
    make("coco", tmp_path)
    ids = trees.CATEGORIES  # the gaps of the official ids, filled from data.COCO_LABELS
    assert (ids[17], ids[13], ids[44], ids[90]) == ("cat", "stop sign", "bottle", "toothbrush")
    for drop_crowd, expected in ((None, COCO_PRESENT), (True, WITHOUT_CROWD)):
        for dataset in both_splits("coco", tmp_path, drop_crowd=drop_crowd):
            assert dataset.labels == list(ids.values()) and not len(dataset.unseen)
            assert numbers(dataset) == [0, 1, 2, 3, 4] and present(dataset) == expected
            assert (dataset.targets != 0).all()
        for dataset in both_splits("coco", tmp_path, drop_crowd=drop_crowd, annotated_only=True):
            assert numbers(dataset) == [0, 1, 3, 4] and len(dataset.full_targets) == 5
            assert present(dataset) == [expected[i] for i in (0, 1, 3, 4)]


def test_coco_zero_shot(tmp_path):
    make("coco", tmp_path)
    expected = [name for name in trees.CATEGORIES.values() if name not in NEITHER]
    unseen = [expected.index(name) for name in (
        "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard",
        "skateboard", "cup", "knife", "cake", "couch", "keyboard", "sink", "scissors")]
    for drop_crowd in (False, True):  # the crowd of dogs is in the picture nevertheless
        train, test = both_splits("coco", tmp_path, zero_shot=True, drop_crowd=drop_crowd)
        for dataset in (train, test):
            assert dataset.labels == expected and dataset.unseen.tolist() == unseen
            assert len(dataset.seen) == 48 and len(dataset.full_targets) == 5
        boxes = WITHOUT_CROWD if drop_crowd else COCO_PRESENT
        assert present(test) == [names - NEITHER for names in boxes] and (test.targets != 0).all()
        assert numbers(train) == [0, 2, 4] and present(train)[1:] == [set(), {"person"}]
        assert (train.targets[:, unseen] == 0).all() and (train.targets[:, train.seen] != 0).all()


@pytest.mark.parametrize("json_folder, image_folder, ending", [
    ("annotations", "{}2017", "2017"), ("annotations", "images/{}", ""),
    ("annotations", "images", "_a"), ("annotations", "annotations", "_default"),
    ("annotations", "", "_x")])
def test_coco_of_another_year_or_tool(tmp_path, capsys, json_folder, image_folder, ending):
    make("coco", tmp_path)
    for part in ("train", "val"):
        path = tmp_path / f"annotations/instances_{part}2014.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 3, "name": "owl"}, {"id": 1, "name": "ice cream"}]
        content["annotations"] = [box for box in content["annotations"]
                                  if box["category_id"] in (1, 3)]
        write(path.with_name(f"instances_{part}{ending}.json"), content)
        path.unlink()
        folder = tmp_path / image_folder.format(part)
        folder.mkdir(parents=True, exist_ok=True)
        for image in (tmp_path / f"{part}2014").iterdir():
            image.rename(folder / image.name)
    for dataset in both_splits("coco", tmp_path):
        assert dataset.labels == ["ice cream", "owl"] and numbers(dataset) == [0, 1, 2, 3, 4]
        assert present(dataset) == [{"owl"}, {"ice cream"}, set(), {"owl"}, {"ice cream"}]
    assert ("5 images listed, 5,000 published" in capsys.readouterr().err) == (ending == "2017")
    write(tmp_path / "annotations/instances_val_more.json", "{}")
    assert "keep one of annotations/instances_val" in message_of("coco", tmp_path, "test")


@pytest.mark.parametrize("key, number, values, message", [
    ("images", 1, {"id": 42}, "ids of images given more than once: 42"),
    ("images", 1, {"file_name": None}, "images, id 9: file_name must be a text, not None"),
    ("images", 1, {"file_name": "COCO_val2014_000000000007.jpg"},
     "file_name of images given more than once: COCO_val2014_000000000007.jpg"),
    ("categories", 0, {"name": 7}, "categories, id 90: name must be a text, not 7"),
    ("categories", 0, {"id": 1}, "ids of categories given more than once: 1"),
    ("annotations", 2, {"image_id": 777}, "annotation 98 is of image 777, category 3"),
    ("annotations", 2, {"category_id": 777}, "annotation 98 is of image 57870, category 777"),
    ("annotations", 2, {"image_id": [1]}, "not a file of COCO instances")])
def test_coco_files_with_faults(tmp_path, key, number, values, message):
    path = make("coco", tmp_path) / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    content[key][number].update(values)
    write(path, content)
    found = message_of("coco", tmp_path, "test")
    assert found.startswith(f"{path}: ") and message in found and "\n" not in found


# ---- VOC, Visual Genome, CUB, Open Images

VOC_PRESENT = {("000012", "car"), ("000017", "person"), ("000023", "dog")}
VOC_DIFFICULT = {("000017", "pottedplant"), ("000023", "person")}


@pytest.mark.parametrize("name, root, difficult, value", [
    ("voc2007", "", None, -1), ("voc2007", "VOCdevkit", "unknown", 0),
    ("voc2007", "VOCdevkit/VOC2007", "present", 1), ("voc2012", "", "unknown", 0)])
def test_voc(tmp_path, name, root, difficult, value):
    make(name, tmp_path)
    expected = [[1 if (image, name) in VOC_PRESENT else value
                 if (image, name) in VOC_DIFFICULT else -1 for name in trees.VOC_CLASSES]
                for image in trees.VOC_FILES]
    for dataset in both_splits(name, tmp_path / root, difficult=difficult):
        assert [label.replace(" ", "") for label in dataset.labels] == trees.VOC_CLASSES
        assert numbers(dataset) == [0, 1, 2, 3] and not len(dataset.unseen)
        assert dataset.targets.tolist() == expected and dataset.targets.dtype == torch.int8
        assert [label for label in dataset.labels if " " in label] == [
            "dining table", "potted plant", "tv monitor"]


def test_vg200(tmp_path):
    make("vg200", tmp_path)
    for path in tmp_path.glob("*.*"):
        as_windows_writes(path)
    for dataset in both_splits("vg200", tmp_path):
        assert dataset.labels == ["traffic light", "man", "sky"] and not len(dataset.unseen)
        assert numbers(dataset) == [0, 1, 2, 3]
        assert dataset.targets.tolist() == [[-1, 1, 1], [1, -1, 1], [-1, -1, -1], [1, -1, -1]]


# absent and unknown, by hand, of the images 1..4
CUB_TARGETS = {"absent": [[-1, 1, -1], [1, -1, 1], [-1, -1, 1], [1, -1, -1]],
               "unknown": [[-1, 1, 0], [1, -1, 1], [-1, 0, 1], [1, 0, -1]]}


@pytest.mark.parametrize("not_visible", [None, "absent", "unknown"])
def test_cub(tmp_path, not_visible):
    make("cub", tmp_path)
    for images, dataset in zip(([1, 2], [0, 3]), both_splits("cub", tmp_path,
                                                             not_visible=not_visible)):
        assert dataset.labels == ["bird with a curved bill", "bird with orange wings",
                                  "very small bird"]
        assert numbers(dataset) == images and not len(dataset.unseen)
        expected = CUB_TARGETS[not_visible or "absent"]
        assert dataset.targets.tolist() == [expected[i] for i in images]


@pytest.mark.parametrize("name, label", [
    ("has_upper_tail_color::iridescent", "bird with an iridescent upper tail"),
    ("has_leg_color::red", "bird with red legs"), ("has_primary_color::blue", "mostly blue bird"),
    ("has_wing_shape::long-wings", "bird with long wings"),
    ("has_bill_length::longer_than_head", "bird with a bill longer than its head"),
    ("has_wing_pattern::multi-colored", "bird with a multi-colored wing pattern"),
    ("has_shape::upright-perching_water-like", "upright-perching water-like bird")])
def test_cub_attributes_become_words(name, label):
    assert data.cub_label(name) == label


OPENIMAGES_LABELS = ["Bat", "Ducks, geese and swans", "Bat (2)", "Satay", "Bat (3)", "Mämmi"]
OPENIMAGES_TARGETS = {
    "train": [[1, 0, -1, -1, 0, 0], [0, -1, 0, 0, 0, 0], [0, -1, 1, 1, 0, 0],
              [0, 0, 1, 0, 0, 0]],  # the last one's /m/06 has two answers
    "test": [[-1, 0, 0, 0, 1, -1], [0, 0, 0, 0, 0, 1]]}


@pytest.mark.parametrize("split, images", [("train", [0, 2, 3, 5]), ("test", [0, 2])])
def test_openimages(tmp_path, split, images, cache):
    make("openimages", tmp_path)
    as_windows_writes(tmp_path / f"2018_04/{split}-annotations-human-imagelabels.csv")
    for _ in range(2):  # the second time from the cache
        dataset = load_dataset("openimages", tmp_path, split)
        assert dataset.labels == OPENIMAGES_LABELS
        assert dataset.seen.tolist() == [0, 1, 2, 3] and dataset.unseen.tolist() == [4, 5]
        assert dataset.targets.tolist() == OPENIMAGES_TARGETS[split]
        assert dataset.targets.dtype == torch.int8 and numbers(dataset) == images
    assert len(list(cache.iterdir())) == 1  # nothing temporary
    assert dataset.full_targets.layout == torch.sparse_csr


# ---- a folder of one's own, the toy world

def test_folder(tmp_path):
    make("folder", tmp_path)
    path = tmp_path / "train.jsonl"  # an export adds keys
    write(path, path.read_text().replace("{", '{"id": 7, "meta": {"by": null}, '))
    train, test = both_splits("folder", tmp_path)
    for dataset in (train, test):
        assert dataset.labels == ["cat", "dog", "ice cream", "\u732b"] and not len(dataset.unseen)
    assert numbers(train) == [0, 1, 2] and numbers(test) == [1, 2]
    assert train.targets.tolist() == [[-1, 1, 1, 0], [-1, 1, -1, -1], [0, -1, 0, 0]]
    assert test.targets.tolist() == [[0, 0, 0, 1], [-1, -1, -1, -1]]


def test_folder_with_fixed_and_unseen_labels(tmp_path):
    make("folder", tmp_path)
    write(tmp_path / "labels.txt", "dog\nowl\n\u732b\nice cream\ncat\n")
    write(tmp_path / "unseen.txt", "cat\nowl\n")
    for path in [*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.txt")]:
        as_windows_writes(path)
    train, test = both_splits("folder", tmp_path)
    for dataset in (train, test):
        assert dataset.labels == ["dog", "owl", "\u732b", "ice cream", "cat"]
        assert dataset.unseen.tolist() == [1, 4] and dataset.seen.tolist() == [0, 2, 3]
    assert train.targets.tolist() == [[1, 0, 0, 1, 0], [1, 0, -1, -1, 0], [-1, 0, 0, 0, 0]]
    assert test.targets.tolist() == [[0, 0, 1, 0, 0], [-1, -1, -1, -1, -1]]
    (tmp_path / "train.jsonl").unlink()  # lang_cls.py trains without images
    assert load_dataset("folder", tmp_path, "test").targets.tolist() == test.targets.tolist()


def test_unseen_labels_that_nothing_is_annotated_with(tmp_path, capsys):
    make("folder", tmp_path)
    write(tmp_path / "unseen.txt", "ice creme\ncat")
    _, test = both_splits("folder", tmp_path)
    assert test.labels == ["cat", "dog", "ice cream", "ice creme", "\u732b"]
    assert test.unseen.tolist() == [0, 3] and test.targets[:, 3].tolist() == [0, -1]
    message = "'ice creme' is no label, but 'ice cream' is"
    assert capsys.readouterr().err.count(f"unseen.txt: {message}; taken as a new one") == 1
    write(tmp_path / "labels.txt", "cat\ndog\nice cream\n\u732b")
    assert message_of("folder", tmp_path) == f"{tmp_path}/unseen.txt: {message}"
    write(tmp_path / "unseen.txt", "cat\ndog\nice cream\n\u732b")
    assert "must not name all of the 4 labels" in message_of("folder", tmp_path)
    (tmp_path / "labels.txt").unlink()
    write(tmp_path / "unseen.txt", "owl\nowls")  # a hint is a label, not another new one
    both_splits("folder", tmp_path)
    assert "'owls' is no label; taken as a new one" in capsys.readouterr().err
    for file in ("train.jsonl", "test.jsonl"):
        write(tmp_path / file, '{"image": "1.png", "absent": "rest"}')
    (tmp_path / "unseen.txt").unlink()
    assert "no image is annotated with a label" in message_of("folder", tmp_path)


def test_folder_with_one_list(tmp_path, capsys):
    photos = [f"{i}.png" for i in range(12)]
    trees.save_images(tmp_path / name for name in photos)
    write(tmp_path / "train.jsonl", "\n".join(
        json.dumps({"image": name, "present": [name], "absent": "rest"}) for name in photos))
    splits = [list(map(numbers, both_splits("folder", tmp_path))) for _ in range(2)]
    assert splits[0] == splits[1] and len(splits[0][1]) == 2
    assert sorted(splits[0][0] + splits[0][1]) == list(range(12))
    assert load_dataset("folder", tmp_path, "train").targets.shape == (10, 12)
    assert capsys.readouterr().err.count("2 of the 12 images of train.jsonl") == 1


def test_toy():
    train, test = both_splits("toy")
    assert (len(train), len(test)) == (10_000, 2_000)
    for dataset in (train, test):
        assert len(dataset.labels) == 56 and len(dataset.unseen) == 14
        assert (dataset.targets[:, dataset.seen] != 0).all()
    assert (train.targets[:, train.unseen] == 0).all()
    assert (test.targets[:, test.unseen] == 1).any(dim=0).all() and (test.targets != 0).all()
    assert not len(load_dataset("toy", split="test", zero_shot=False, limit=9).unseen)
    assert "--root photos: the toy world has no files" in message_of("toy", "photos")


# ---- all of them

def test_unknown_names_and_options(tmp_path, monkeypatch):
    assert "'nus'" in message_of("nus") and "nuswide, nuswide81" in message_of("nus")
    assert "known are: train, test" in message_of("nuswide", tmp_path, "val")
    assert message_of("folder", tmp_path, zero_shot=True) == "--zero-shot is not for folder"
    monkeypatch.chdir(tmp_path)
    for name in ("nuswide81", "voc2007"):
        folder = name.removesuffix("81")
        found = message_of(name)
        assert f"not found in data/{folder} (from {tmp_path};" in found and "--root DIR" in found
        make(name, tmp_path / "data" / folder)
        assert len(load_dataset(name, split="test")) in (3, 4)


def printed(capsys, root, name="folder", with_training=True):
    """What load_splits prints of a dataset."""
    parser = argparse.ArgumentParser()
    data.add_options(parser)
    data.load_splits(parser.parse_args(["--data", name, "--root", str(root)]), with_training)
    return capsys.readouterr().out


def test_what_the_splits_hold_is_printed(tmp_path, capsys):
    make("folder", tmp_path)
    assert printed(capsys, tmp_path).splitlines() == [
        "training: 3 images, 4 labels",
        "  known to be present: 3 entries, of a label at least 0, median 0",
        "    never (2 of the labels): cat, \u732b",
        "  known to be absent: 5 entries, of a label at least 1, median 1",
        "test: 2 images, 4 labels",
        "  known to be present: 1 entries, of a label at least 0, median 0",
        "    never (3 of the labels): cat, dog, ice cream",
        "  known to be absent: 4 entries, of a label at least 1, median 1",
        f"images in both splits: 2, e.g. {tmp_path}/1.png"]
    write(tmp_path / "test.jsonl", '{"image": "1.png", "present": ["dog", "cat"]}\n'
                                   '{"image": "2.png", "absent": ["cat"]}')
    found = printed(capsys, tmp_path, with_training=False)
    assert "known to be absent has AP 1" in found and "both splits" not in found
    write(tmp_path / "test.jsonl", '{"image": "1.png", "present": ["dog", "cat"]}')
    assert "no label has both" in printed(capsys, tmp_path)


def test_damaged_test_photos_are_left_out_at_the_start(tmp_path, capsys):
    trees.scenes(tmp_path, train=(2, None), test=(25, None))
    for path in ("test/3.png", "train/0.png"):
        write(tmp_path / path, "no image")
    train, test = both_splits("folder", tmp_path)
    assert (len(train), train.missing) == (2, 0)
    assert (len(test), test.missing) == (24, 1) and 3 not in test.rows
    assert len(load_dataset("folder", tmp_path, "test", limit=3)) == 3
    assert "images missing or damaged, and left out: 1" in printed(capsys, tmp_path)


def test_splits_of_different_labels_are_refused(tmp_path, capsys):
    root = make("coco", tmp_path)
    path = root / "annotations/instances_val2014.json"
    write(path, path.read_text().replace('"toothbrush"', '"comb"'))
    with pytest.raises(UserError, match="comb, toothbrush"):
        printed(capsys, root, "coco")


@pytest.mark.parametrize("name, file, source", [
    ("nuswide", "Groundtruth/AllLabels/Labels_fire.txt", "nus.edu.sg"),
    ("vg200", "vg_category_200.txt", "visualgenome"), ("cub", "attributes.txt", "caltech"),
    ("coco", "annotations/instances_val2014.json", "cocodataset.org"),
    ("openimages", "2018_04/unseen_labels.pkl", "BiAM"), ("folder", "test.jsonl", "line for each"),
    ("voc2007", "VOCdevkit/VOC2007/Annotations/000023.xml", "ox.ac.uk"),
    ("voc2012", "VOCdevkit/VOC2012/ImageSets/Main/val.txt", "ox.ac.uk")])
def test_a_missing_file_is_named_with_the_layout_and_the_source(tmp_path, name, file, source):
    (make(name, tmp_path) / file).unlink()
    if name == "folder":
        (tmp_path / "train.jsonl").unlink()
        file = "train.jsonl"
    first_line, _, layout = message_of(name, tmp_path, "test").partition("\n")
    assert os.path.basename(file) in first_line and str(tmp_path) in first_line
    assert "/\n" in layout and source in layout and "python " not in layout


@pytest.mark.parametrize("name, file, content, message", [
    ("nuswide", "NUS_WID_Tags/AllTags1k.txt", "0\t1\t" * 31 + "2", "row 7: an entry is not 0 or"),
    ("nuswide", "ImageList/TestImagelist.txt", "zoo\\8.jpg", "not a part of Imagelist.txt: '8"),
    ("coco", "annotations/instances_val2014.json", {"images": []}, "not a file of COCO instances"),
    ("voc2007", "VOCdevkit/VOC2007/Annotations/000017.xml",
     trees.voc_xml("000017", [("lamp", 0)]), "000017.xml: not .* VOC's 20 classes: 'lamp'"),
    ("nuswide", "ImageList/TestImagelist.txt", "a\\8.jpg\nb\\8.jpg", "than once: 8.jpg"),
    ("vg200", "vg_category_200.txt", "man\nsky\n", "2386621.jpg: not a list .* below 2"),
    ("vg200", "vg_category_200_labels_index.json", dict.fromkeys(trees.VG_FILES, [0, -1]),
     "not a list .* below 3: -1"),
    ("cub", "CUB_200_2011/attributes/image_attribute_labels.txt",
     "1 1 0 3 2.0\n1 2 yes 1 1.0\n", "'yes'"),
    ("openimages", "2018_04/test-annotations-human-imagelabels.csv",
     "ImageID\n1a,verification,/m/09,0.7\n", "line 2: .*'0.7'"),
    ("openimages", "2018_04/test-annotations-human-imagelabels.csv",
     f"ImageID\n1a,verification,/m/09,{'1' * 200_000}\n", "line 2: "),
    ("openimages", "2018_04/test-annotations-human-imagelabels.csv", "", "no label of the voc"),
    ("openimages", "2018_04/class-descriptions.csv", "/m/02,Bat\n/m/02,Cat", "once: /m/02"),
    ("openimages", "2018_04/classes-trainable.txt", "/m/02\n/m/x", "descriptions.csv: .*'/m/x'"),
    ("openimages", "2018_04/top_400_unseen.csv", "3\n99", "unseen.csv: not numbers of class ids"),
    ("folder", "test.jsonl", '{"image": "2.png", "presnt": ["dog"]}', "line 1: not {\"image\""),
    ("folder", "test.jsonl", '{"image": "2.png", "present": "dog"}', "line 1: not .*'dog' is no"),
    ("folder", "test.jsonl", '{"image": "2.png", "present": [" "]}', "line 1: .*an empty name"),
    ("folder", "test.jsonl", '{"image": "2.png", "present": ["dog "], "absent": [" dog"]}',
     "'dog' is both present and absent"),
    ("folder", "test.jsonl", '{"image": "2.png", "absent": "rest"}\n' * 2, "line 2: .* twice"),
    ("folder", "labels.txt", "dog\ncat\nice cream", "line 1: .*labels.txt: '\u732b'"),
    ("folder", "labels.txt", "dog\n\ncat", "labels.txt, line 2: the line is empty"),
])
def test_files_that_are_wrong(tmp_path, name, file, content, message, cache):
    write(make(name, tmp_path) / file, content)
    found = message_of(name, tmp_path, "test")
    assert str(tmp_path) in found and re.search(message, found), found
    assert not [path for path in cache.glob("*") if "test" in path.name]
