import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError, load_dataset


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (20 * number, 0, 0)).save(path, quality=100)


def numbers(dataset):
    """Which images the dataset has, by their pixels."""
    return [round(image.getpixel((1, 1))[0] / 20) for image, _ in dataset]


# ---- CUB-200-2011

ATTRIBUTES = ["has_bill_shape::curved_(up_or_down)", "has_wing_color::orange",
              "has_size::very_small_(3_-_5_in)"]
CUB_LINES = """1 1 0 3 27.7080
1 2 1 4 27.7080
1 3 0 1 27.7080
2 1 1 2 1.0
2 2  0 4 0 3.5
2 3 1 3 2.5 7 8
4 1 1 4 5.5
4 2 1 1 5.5
4 3 0 4 5.5
3 1 0 2 9.1
3 2 0 1 9.1
3 3 1 4 9.1
"""  # image 2 as a few lines of the original are: two spaces, too many entries
# absent and unknown, by hand, of the images 1..4
CUB_ABSENT = [[-1, 1, -1], [1, -1, 1], [-1, -1, 1], [1, -1, -1]]
CUB_UNKNOWN = [[-1, 1, 0], [1, -1, 1], [-1, 0, 1], [1, 0, -1]]


@pytest.fixture
def cub_root(tmp_path):
    """As the archive unpacks: attributes.txt beside the folder with everything else."""
    root = tmp_path / "cub" / "CUB_200_2011"
    paths = [f"00{i}.Laysan_Albatross/Laysan_Albatross_000{i}_{i}.jpg" for i in (1, 2, 3, 4)]
    write(root.parent / "attributes.txt",
          "".join(f"{i} {name}\n" for i, name in enumerate(ATTRIBUTES, 1)))
    write(root / "images.txt", "".join(f"{i} {path}\n" for i, path in enumerate(paths, 1)))
    write(root / "train_test_split.txt", "1 0\n2 1\n3 1\n4 0\n")
    write(root / "attributes/image_attribute_labels.txt", CUB_LINES)
    for i, path in enumerate(paths, 1):
        write_image(root / "images" / path, i)
    return root


@pytest.mark.parametrize("place", ["outer folder", "inner folder", "attributes inside",
                                   "attributes deeper"])
def test_cub(cub_root, place):
    outer = cub_root.parent
    if place == "attributes inside":
        (outer / "attributes.txt").rename(cub_root / "attributes.txt")
    if place == "attributes deeper":
        (outer / "attributes.txt").rename(cub_root / "attributes/attributes.txt")
    root = outer if place == "outer folder" else cub_root
    for split, images in (("train", [2, 3]), ("test", [1, 4])):
        dataset = load_dataset("cub", root, split)
        assert dataset.labels == ["bird with a curved bill", "bird with orange wings",
                                  "very small bird"]
        assert numbers(dataset) == images and not len(dataset.unseen)
        assert dataset.targets.dtype == torch.int8
        assert dataset.targets.tolist() == [CUB_ABSENT[i - 1] for i in images]
        unknown = load_dataset("cub", root, split, not_visible="unknown")
        assert unknown.targets.tolist() == [CUB_UNKNOWN[i - 1] for i in images]


def test_cub_in_another_order_and_with_other_line_ends(cub_root):
    lines = CUB_LINES.splitlines()
    write(cub_root / "attributes/image_attribute_labels.txt",
          "\ufeff" + "\r\n".join(lines[7:] + [""] + lines[:7]))
    for name in ("images.txt", "train_test_split.txt"):
        text = (cub_root / name).read_text().replace("\n", "\r\n")
        write(cub_root / name, "\ufeff" + text.rstrip())
    assert load_dataset("cub", cub_root, "train").targets.tolist() == CUB_ABSENT[1:3]
    assert load_dataset("cub", cub_root, "test").targets.tolist() == CUB_ABSENT[::3]


def test_cub_counts_and_missing_lines(cub_root, capsys):
    load_dataset("cub", cub_root, "train")
    message = capsys.readouterr().err
    assert "CUB train: 2 images listed, 5,994 published; WARNING" in message
    write(cub_root / "attributes/image_attribute_labels.txt", CUB_LINES.replace(
        "3 2 0 1 9.1\n", ""))
    dataset = load_dataset("cub", cub_root, "train")
    assert dataset.targets.tolist() == [[1, -1, 1], [-1, 0, 1]]
    assert "1 entries have no line" in capsys.readouterr().err
    load_dataset("cub", cub_root, "train", quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", [
    "2 2 2 4 3.5", "2 2 0 5 3.5", "2 2 0 0 3.5", "2 2 0", "2", "2 x 0 4", "2 -2 0 4", "2 2.0 0 4",
    "5 2 0 4 1.0", "0 2 0 4 1.0", "2 4 0 4 1.0", "2 0 0 4 1.0", "99999999999999999999 2 0 4 1"])
def test_cub_wrong_line(cub_root, line, cache):
    path = cub_root / "attributes/image_attribute_labels.txt"
    write(path, CUB_LINES.replace("2 2  0 4 0 3.5", line))
    with pytest.raises(UserError) as error:
        load_dataset("cub", cub_root, "train")
    assert str(error.value).startswith(f"{path}, line 5: '{line}' is not")
    assert not cache.exists()


def test_cub_wrong_line_far_into_the_file(tmp_path):
    images, attributes = list(range(1, 2001)), list(range(1, 101))
    marks = np.random.RandomState(0).randint(2, 10, (2000, 100))  # 2 * certainty + present
    lines = [f"{i} {a} {mark % 2} {mark // 2} 1.25"
             for i, row in zip(images, marks) for a, mark in zip(attributes, row)]
    path = tmp_path / "labels.txt"
    write(path, "\n".join(lines))
    assert path.stat().st_size > 1 << 21  # more than a block
    assert np.array_equal(data._read_cub(path, images, attributes, True), marks)
    lines[180_000] = "1801 1 yes 1 1.25"
    write(path, "\n".join(lines))
    with pytest.raises(UserError, match="line 180001: '1801 1 yes 1 1.25'"):
        data._read_cub(path, images, attributes, True)


@pytest.mark.parametrize("name, content, message", [
    ("images.txt", "1 a.jpg\ntwo b.jpg\n", "images.txt, line 2: 'two b.jpg' is not a number"),
    ("images.txt", "1 a.jpg\n1 b.jpg\n", "images.txt, line 2: 1 is listed twice"),
    ("images.txt", "1 a.jpg\n2\n", "images.txt, line 2: '2' is not a number and a text"),
    ("train_test_split.txt", "1 0\n2 1\n3 1\n", "no line `4 0` or `4 1`"),
    ("train_test_split.txt", "1 0\n2 2\n3 1\n4 0\n", "no line `2 0` or `2 1`"),
])
def test_cub_wrong_lists(cub_root, name, content, message):
    write(cub_root / name, content)
    with pytest.raises(UserError, match=message):
        load_dataset("cub", cub_root, "train")


@pytest.mark.parametrize("name", ["images.txt", "train_test_split.txt", "../attributes.txt",
                                  "attributes/image_attribute_labels.txt"])
def test_cub_missing_file(cub_root, name):
    (cub_root / name).unlink()
    with pytest.raises(UserError) as error:
        load_dataset("cub", cub_root.parent, "train")
    assert name.rsplit("/", 1)[-1] in str(error.value).splitlines()[0]
    assert "images/<class>/<image>.jpg" in str(error.value)


def test_cub_option(cub_root):
    with pytest.raises(UserError, match="not_visible must be 'absent' or 'unknown', not 'no'"):
        load_dataset("cub", cub_root, "train", not_visible="no")


def test_cub_cache(cub_root, cache, monkeypatch):
    first = load_dataset("cub", cub_root, "train").targets
    assert len(list(cache.iterdir())) == 1
    read, reads = data._read_cub, []
    monkeypatch.setattr(data, "_read_cub", lambda *args: reads.append(args[0]) or read(*args))
    assert torch.equal(load_dataset("cub", cub_root, "train").targets, first)
    load_dataset("cub", cub_root, "test", not_visible="unknown")  # both options, both splits
    assert reads == []
    path = cub_root / "attributes/image_attribute_labels.txt"
    write(path, CUB_LINES.replace("2 1 1 2 1.0", "2 1 0 2 1.0"))
    os.utime(path, (1, 1))
    assert load_dataset("cub", cub_root, "train").targets.tolist() == [[-1, -1, 1], [-1, -1, 1]]
    assert reads == [str(path)]
    # the same lines, other numbers
    write(cub_root.parent / "attributes.txt", "".join(
        f"{i} {name}\n" for i, name in zip((2, 1, 3), ATTRIBUTES)))
    assert load_dataset("cub", cub_root, "train").targets.tolist() == [[-1, -1, 1], [-1, -1, 1]]
    assert len(reads) == 2


COLORS = ("blue brown iridescent purple rufous grey yellow olive green pink orange black white "
          "red buff")
PATTERN = "solid spotted striped multi-colored"
CUB_NAMES = {  # all 312
    "bill_shape": "curved_(up_or_down) dagger hooked needle hooked_seabird spatulate all-purpose "
                  "cone specialized",
    "tail_shape": "forked_tail rounded_tail notched_tail fan-shaped_tail pointed_tail squared_tail",
    "head_pattern": "spotted malar crested masked unique_pattern eyebrow eyering plain eyeline "
                    "striped capped",
    "bill_length": "about_the_same_as_head longer_than_head shorter_than_head",
    "wing_shape": "rounded-wings pointed-wings broad-wings tapered-wings long-wings",
    "size": "large_(16_-_32_in) small_(5_-_9_in) very_large_(32_-_72_in) medium_(9_-_16_in) "
            "very_small_(3_-_5_in)",
    "shape": "upright-perching_water-like chicken-like-marsh long-legged-like duck-like owl-like "
             "gull-like hummingbird-like pigeon-like tree-clinging-like hawk-like sandpiper-like "
             "upland-ground-like swallow-like perching-like",
    "eye_color": COLORS.replace("iridescent ", ""),
    **{f"{part}_pattern": PATTERN for part in "breast back tail belly wing".split()},
    **{f"{part}_color": COLORS for part in "wing upperparts underparts back upper_tail breast "
       "throat forehead under_tail nape belly primary leg bill crown".split()}}


def test_cub_labels_are_distinct_words():
    names = [f"has_{part}::{value}" for part, values in CUB_NAMES.items()
             for value in values.split()]
    labels = [data.cub_label(name) for name in names]
    assert len(set(names)) == len(set(labels)) == 312
    for label in labels:
        assert "bird" in label.split() and not set("_:()") & set(label)
        assert not any(a == b for a, b in zip(label.split(), label.split()[1:])), label
    for name, label in [
            ("has_upper_tail_color::iridescent", "bird with an iridescent upper tail"),
            ("has_upperparts_color::grey", "bird with grey upperparts"),
            ("has_leg_color::red", "bird with red legs"),
            ("has_primary_color::blue", "mostly blue bird"),
            ("has_tail_shape::fan-shaped_tail", "bird with a fan-shaped tail"),
            ("has_wing_shape::long-wings", "bird with long wings"),
            ("has_bill_shape::all-purpose", "bird with an all-purpose bill"),
            ("has_bill_length::longer_than_head", "bird with a bill longer than its head"),
            ("has_head_pattern::unique_pattern", "bird with a unique head pattern"),
            ("has_wing_pattern::multi-colored", "bird with a multi-colored wing pattern"),
            ("has_shape::upright-perching_water-like", "upright-perching water-like bird")]:
        assert data.cub_label(name) == label


# ---- Open Images

CLASSES = [("/m/01", "Satay"), ("/m/02", "Bat"), ("/m/03", "Chili con carne"),
           ("/m/04", '"Ducks, geese and swans"'), ("/m/05", "Bulbul"), ("/m/06", "Bat"),
           ("/m/0_7", "Mämmi "), ("/m/08", "Oceanic trench"), ("/m/09", "Bat")]
TRAINABLE = ["/m/06", "/m/04", "/m/02", "/m/01"]
# rows of the classes that are not trainable: 03, 05, 0_7, 08, 09
UNSEEN_ROWS = "4\r\n2"
OPENIMAGES_LABELS = ["Bat", "Ducks, geese and swans", "Bat (2)", "Satay", "Bat (3)", "Mämmi"]
HEADER = "ImageID,Source,LabelName,Confidence"
TRAIN_LINES = [
    "0a1,verification,/m/06,1", "0a1,verification,/m/01,0", "0a1,verification,/m/09,1",
    "0a2,verification,/m/09,1",  # an unseen label only: left out
    "0b300000000000ff,crowdsource-verification,/m/04,0",
    "0a4,verification,/m/02,1.0", "0a4,verification,/m/04,0.0", "0a4,verification,/m/01,1",
    "0a5,verification,/m/03,1",  # neither seen nor among the unseen: left out
    "0a1,verification,/m/02,0",  # not with the image's other lines
    "0a4,verification,/m/02,1",  # twice
    "0a6,verification,/m/02,1", "0a6,verification,/m/06,1", "0a6,verification,/m/06,0",
    "0a4,verification,/m/0nothing,1"]
TRAIN_IMAGES = ["0a1", "0b300000000000ff", "0a4", "0a6"]
TRAIN_TARGETS = [[1, 0, -1, -1, 0, 0], [0, -1, 0, 0, 0, 0], [0, -1, 1, 1, 0, 0],
                 [0, 0, 1, 0, 0, 0]]  # the last one's 06 has two answers
TEST_LINES = ["1a,verification,/m/09,1", "1a,verification,/m/0_7,0", "1a,verification,/m/06,0",
              "1b,verification,/m/03,1", "1c,verification,/m/0_7,1", "1c,verification,/m/08,1"]
TEST_TARGETS = [[-1, 0, 0, 0, 1, -1], [0, 0, 0, 0, 0, 1]]


@pytest.fixture
def openimages_root(tmp_path):
    root = tmp_path / "openimages"
    write(root / "class-descriptions.csv",
          "".join(f"{name},{text}\r\n" for name, text in CLASSES))
    write(root / "classes-trainable.txt", "".join(f"{name}\n" for name in TRAINABLE))
    write(root / "top_400_unseen.csv", "\ufeff" + UNSEEN_ROWS)
    for split, lines in (("train", TRAIN_LINES), ("test", TEST_LINES)):
        write(root / f"{split}-annotations-human-imagelabels.csv",
              "".join(f"{line}\n" for line in [HEADER, *lines]))
        names = dict.fromkeys(line.split(",")[0] for line in lines)
        for i, name in enumerate(names):
            write_image(root / split / f"{name}.jpg", i)
    return root


def test_openimages(openimages_root, capsys):
    train = load_dataset("openimages", openimages_root, "train")
    test = load_dataset("openimages", openimages_root, "test")
    for dataset in (train, test):
        assert dataset.labels == OPENIMAGES_LABELS
        assert dataset.seen.tolist() == [0, 1, 2, 3] and dataset.unseen.tolist() == [4, 5]
        assert dataset.targets.dtype == torch.int8 and dataset.name == "openimages"
    assert train.targets.tolist() == TRAIN_TARGETS and test.targets.tolist() == TEST_TARGETS
    assert [os.path.basename(train.image_name(i))[:-4] for i in range(4)] == TRAIN_IMAGES
    assert numbers(train) == [0, 2, 3, 5] and numbers(test) == [0, 2]
    message = capsys.readouterr().err
    assert "Open Images train: 6 images with verified labels" in message  # not all of them seen
    assert "Open Images test: 3 images listed, 125,436 published; WARNING" in message
    assert "4 seen and 2 unseen labels listed, 7,186 and 400 published; WARNING" in message


@pytest.mark.parametrize("change", ["CRLF", "byte-order mark, no last newline", "2018_04",
                                    "folders of splits"])
def test_openimages_in_other_forms(openimages_root, change):
    files = [openimages_root / f"{split}-annotations-human-imagelabels.csv"
             for split in ("train", "test")]
    for file in files:
        text = file.read_text()
        if change == "CRLF":
            write(file, text.replace("\n", "\r\n") + "\r\n")
        elif change.startswith("byte-order"):
            write(file, "\ufeff" + text.rstrip())
        elif change.startswith("folders"):
            file.rename(file.parent / file.name.split("-")[0] / file.name)
    if change == "2018_04":
        (openimages_root / "2018_04").mkdir()
        for file in openimages_root.glob("*.*"):
            file.rename(openimages_root / "2018_04" / file.name)
    train = load_dataset("openimages", openimages_root, "train")
    assert train.targets.tolist() == TRAIN_TARGETS and numbers(train) == [0, 2, 3, 5]
    assert load_dataset("openimages", openimages_root, "test").targets.tolist() == TEST_TARGETS


def write_annotations(root, split, lines):
    path = root / f"{split}-annotations-human-imagelabels.csv"
    write(path, "\n".join([HEADER, *lines]))
    return path


def test_openimages_unseen_labels_that_are_not_frequent(openimages_root, capsys):
    lines = [f"{i},verification,{name},{present}" for i in range(60)
             for name, present in (("/m/05", 1), ("/m/08", int(i < 40)), ("/m/0_7", 0),
                                   ("/m/09", int(i < 39)), ("/m/01", 1))]
    write_annotations(openimages_root, "test", lines)
    for i in range(60):
        write_image(openimages_root / "test" / f"{i}.jpg", 0)
    # 39 of 100 are less than half: not the most frequent labels, whatever the file counts
    test = load_dataset("openimages", openimages_root, "test")
    assert test.labels[4:] == ["Bulbul", "Oceanic trench"]
    assert (test.targets[:, 4] == 1).all() and (test.targets[:, 5] == 1).sum() == 40
    assert (test.targets[:, [0, 1, 2]] == 0).all() and (test.targets[:, 3] == 1).all()
    assert load_dataset("openimages", openimages_root, "train").labels == test.labels
    assert "have 39 test annotations, the 2 most frequent unseen labels 100" in (
        capsys.readouterr().err)
    # class ids are meant as they are
    write(openimages_root / "top_400_unseen.csv", "/m/0_7\r\n/m/09")
    test = load_dataset("openimages", openimages_root, "test")
    assert test.labels[4:] == ["Mämmi", "Bat (3)"] and (test.targets[:, 4] == -1).all()
    # 55 of 100
    write(openimages_root / "top_400_unseen.csv", UNSEEN_ROWS)
    lines = [line.replace("/m/0_7,0", "/m/0_7,1") if int(line.split(",")[0]) < 16 else line
             for line in lines]
    write_annotations(openimages_root, "test", lines)
    test = load_dataset("openimages", openimages_root, "test")
    assert test.labels[4:] == ["Bat (3)", "Mämmi"] and (test.targets[:, 5] == 1).sum() == 16


@pytest.mark.parametrize("line", [
    "0a4,verification,/m/02", "0a4,verification,/m/02,1,1", "0a4,verification,/m/02,0.7",
    "0a4,verification,/m/02,", ",verification,/m/02,1", "0a4 verification /m/02 1",
    f"{'a' * 65},verification,/m/02,1", "0a4,verification,/m/02,10"])
def test_openimages_wrong_line(openimages_root, line, cache):
    lines = list(TRAIN_LINES)
    lines[5] = line
    path = write_annotations(openimages_root, "train", lines)
    with pytest.raises(UserError) as error:
        load_dataset("openimages", openimages_root, "train")
    assert str(error.value).startswith(f"{path}, line 7: '{line[:60]}' is not")
    assert not any("train" in file.name for file in cache.iterdir())


def test_openimages_header_and_empty_files(openimages_root):
    path = openimages_root / "train-annotations-human-imagelabels.csv"
    for content, message in [("\n".join(TRAIN_LINES), "line 1: '0a1,verification,/m/06,1' is not "
                              "the header"), ("", "no annotations"), (HEADER, "no annotations"),
                             (f"{HEADER}\n0a2,verification,/m/09,1\n", "none of the labels")]:
        write(path, content)
        with pytest.raises(UserError, match=message):
            load_dataset("openimages", openimages_root, "train")


@pytest.mark.parametrize("name, content, message", [
    ("class-descriptions.csv", "/m/01,Satay\n/m/02\n", "line 2: '/m/02' is not `class id,name`"),
    ("class-descriptions.csv", "/m/01,Satay\n/m/01,Bat\n", "line 2: /m/01 is listed twice"),
    ("classes-trainable.txt", "/m/01\n/m/99\n", "line 2: '/m/99' is not in .*class-desc"),
    ("classes-trainable.txt", "/m/01\n/m/02\n/m/02\n", "line 3: /m/02 is listed twice"),
    ("top_400_unseen.csv", "", "the file is empty"),
    ("top_400_unseen.csv", "\ufeff \r\n\r\n", "the file is empty"),
    ("top_400_unseen.csv", "1\n5\n", "line 2: '5' is neither a number below 5 nor"),
    ("top_400_unseen.csv", "1\n/m/01\n", "line 2: '/m/01' is neither"),
    ("top_400_unseen.csv", "1\n1\n", "line 2: /m/05 is listed twice"),
])
def test_openimages_wrong_lists(openimages_root, name, content, message):
    write(openimages_root / name, content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        load_dataset("openimages", openimages_root, "test")


@pytest.mark.parametrize("name", [
    "class-descriptions.csv", "classes-trainable.txt", "top_400_unseen.csv",
    "train-annotations-human-imagelabels.csv", "test-annotations-human-imagelabels.csv"])
def test_openimages_missing_file(openimages_root, name):
    (openimages_root / name).unlink()
    with pytest.raises(UserError) as error:
        load_dataset("openimages", openimages_root, "train")
    assert name in str(error.value).splitlines()[0]
    assert "train/<ImageID>.jpg" in str(error.value)


def test_openimages_missing_images(openimages_root, capsys):
    (openimages_root / "train/0a4.jpg").unlink()
    dataset = load_dataset("openimages", openimages_root, "train", allow_missing=True)
    assert dataset.missing == 1 and numbers(dataset) == [0, 2, 5]
    assert dataset.targets.tolist() == [TRAIN_TARGETS[i] for i in (0, 1, 3)]


def test_openimages_cache(openimages_root, cache, monkeypatch):
    first = load_dataset("openimages", openimages_root, "train").targets
    assert len(list(cache.iterdir())) == 2
    read, reads = data._read_openimages, []
    monkeypatch.setattr(data, "_read_openimages",
                        lambda *args: reads.append(args[0]) or read(*args))
    assert torch.equal(load_dataset("openimages", openimages_root, "train").targets, first)
    load_dataset("openimages", openimages_root, "test")
    write(openimages_root / "top_400_unseen.csv", "0\n1")  # read anew at every start
    assert load_dataset("openimages", openimages_root, "test").labels[4:] == [
        "Chili con carne", "Bulbul"]
    assert reads == []
    path = write_annotations(openimages_root, "train",
                             [line.replace("06,1", "06,0") for line in TRAIN_LINES])
    assert load_dataset("openimages", openimages_root, "train").targets[0].tolist() == [
        -1, 0, -1, -1, 0, 0]
    assert reads == [str(path)]


def test_openimages_reads_what_a_loop_reads(tmp_path):
    rng = np.random.RandomState(0)
    ids = [f"/m/{i:x}" for i in rng.permutation(3000)[:500]]
    # images of several blocks, in no order, with names of several lengths
    drawn = [(f"{image:x}", ids[column], present) for image, column, present in zip(
        rng.randint(0, 20_000, 90_000), rng.randint(0, 500, 90_000), rng.randint(0, 2, 90_000))]
    write(tmp_path / "a.csv", "\n".join([HEADER] + [
        f"{image},verification,{label},{present}" for image, label, present in drawn]))
    assert (tmp_path / "a.csv").stat().st_size > 1 << 21
    answers = {}
    for image, label, present in drawn:
        answers.setdefault(image, {}).setdefault(label, set()).add(present)
    entries = data._read_openimages(tmp_path / "a.csv", ids, True)
    assert [name.decode() for name in entries["images"]] == list(answers)
    for i, wanted in enumerate(answers.values()):
        part = slice(*entries["starts"][i:i + 2])
        found = {ids[c]: v for c, v in zip(entries["columns"][part], entries["values"][part])}
        assert found == {label: 1 if present == {1} else -1
                         for label, present in wanted.items() if len(present) == 1}


# ---- SparseTargets

def sparse_and_dense(rows=40, columns=9, seed=0):
    """The same targets twice; 15% of the entries are known, some rows are empty."""
    rng = np.random.RandomState(seed)
    dense = torch.from_numpy(rng.choice([-1, 0, 1], (rows, columns), p=[0.1, 0.85, 0.05]))
    dense = dense.to(torch.int8)
    dense[rows // 2] = 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    column = dense.nonzero()[:, 1]
    return data.SparseTargets(starts, column.int(), dense[dense != 0], columns), dense


def test_sparse_targets_are_what_the_tensor_is(monkeypatch):
    for seed in range(10):
        sparse, dense = sparse_and_dense(seed=seed)
        assert sparse.shape == dense.shape and sparse.dtype == dense.dtype and len(sparse) == 40
        assert (sparse.min(), sparse.max()) == (dense.min(), dense.max())
        assert all(torch.equal(sparse[i], dense[i]) for i in range(40))
        rng = np.random.RandomState(seed)
        rows, mask = torch.from_numpy(rng.randint(0, 40, 55)), torch.from_numpy(rng.rand(40) < 0.5)
        columns = torch.from_numpy(rng.permutation(9)[:4])
        for limit in (0, 1 << 31):  # sparse in, sparse out; or a tensor out
            monkeypatch.setattr(data, "DENSE_ENTRIES", limit)
            for index in (rows, mask, slice(3, 30, 2)):
                part = sparse[index]
                assert isinstance(part, data.SparseTargets if limit == 0 else torch.Tensor)
                assert part.shape == dense[index].shape and part.dtype == torch.int8
                assert all(torch.equal(part[i], row) for i, row in enumerate(dense[index]))
        for value in (1, -1):
            present = (sparse[:, columns] == value).any(dim=1)
            assert torch.equal(present, (dense[:, columns] == value).any(dim=1))
    empty = sparse[:, torch.tensor([], dtype=torch.int64)]
    assert not (empty == 1).any(dim=1).any() and (empty.min(), empty.max()) == (0, 0)


def test_large_datasets_are_sparse_and_work_the_same(openimages_root, monkeypatch):
    dense = load_dataset("openimages", openimages_root, "train")
    monkeypatch.setattr(data, "DENSE_ENTRIES", 12)  # two images
    sparse = load_dataset("openimages", openimages_root, "train")
    assert isinstance(sparse.targets, data.SparseTargets)
    assert [t.tolist() for _, t in sparse] == TRAIN_TARGETS
    wanted = (dense.targets[:, dense.seen] == 1).any(dim=1)  # as mkt.py asks for
    assert torch.equal((sparse.targets[:, sparse.seen] == 1).any(dim=1), wanted)
    part = sparse.subset(wanted)
    assert isinstance(part.targets, data.SparseTargets) and numbers(part) == [0, 3, 5]
    assert [t.tolist() for _, t in part] == [TRAIN_TARGETS[i] for i in (0, 2, 3)]
    for function in (lambda: data.keep_partial(sparse.targets, 0.5, 0),
                     lambda: data.keep_single_positive(sparse.targets, 0)):
        with pytest.raises(UserError, match="4 x 6 targets are too many .*--limit"):
            function()
    small = sparse.subset([2, 0])
    assert small.targets.tolist() == [TRAIN_TARGETS[2], TRAIN_TARGETS[0]]
    assert data.keep_partial(small.targets, 1.0, 0).tolist() == small.targets.tolist()
    (openimages_root / "train/0a4.jpg").unlink()
    sparse = load_dataset("openimages", openimages_root, "train", allow_missing=True)
    assert [t.tolist() for _, t in sparse] == [TRAIN_TARGETS[i] for i in (0, 1, 3)]
    with pytest.raises(ValueError, match="0"):
        sparse.targets == 0
