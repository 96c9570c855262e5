"""Every dataset on a small tree in its official format; expected targets are written by hand."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError, load_dataset


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def save_images(directory, names):
    """Image number i is of colour 20 * i."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(directory / name)


def numbers(dataset):
    return [round(np.asarray(image)[..., 0].mean() / 20) for image, _ in dataset]


def as_windows_writes(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def message_of(*args, **options):
    with pytest.raises(UserError) as error:
        load_dataset(*args, **options)
    return str(error.value)


# ---- cached

def test_cached_while_sources_and_key_stay(tmp_path, cache):
    sources, made = [tmp_path / "a", tmp_path / "b"], []
    for source in sources:
        source.write_text("text")

    def get(key, quiet=True):
        def make():
            made.append(key)
            return {"numbers": np.arange(3) + len(made), "names": np.array(["cat", "d\u00f6g"])}
        return data.cached("name", sources, key, make, quiet)

    for key, makes in ((1, 1), (1, 1), ({"size": [2]}, 2), ({"size": [2]}, 2)):
        arrays = get(key)
        assert arrays["numbers"].tolist() == [makes, 1 + makes, 2 + makes]
        assert arrays["names"].tolist() == ["cat", "d\u00f6g"]
        assert set(arrays) == {"numbers", "names"}
    [file] = cache.iterdir()
    assert file.name.startswith("name-") and file.suffix == ".npz"
    os.utime(sources[1], (1, 1))
    assert get({"size": [2]})["numbers"][0] == 3
    sources[0].write_text("longer text")
    os.utime(sources[0], (1, 1))
    assert get({"size": [2]})["numbers"][0] == 4
    sources.reverse()  # another order is another thing
    assert get({"size": [2]})["numbers"][0] == 5 and len(list(cache.iterdir())) == 2


def test_cached_reads_no_pickle(tmp_path, cache, capsys):
    (tmp_path / "a").write_text("")
    result = data.cached("name", [tmp_path / "a"], 0, lambda: {"x": np.arange(2)}, False)
    [file] = cache.iterdir()
    with np.load(file) as content:
        key = content["key"]
    np.savez(file, key=key, x=np.array([{}], dtype=object))
    again = data.cached("name", [tmp_path / "a"], 0, lambda: {"x": np.arange(2)}, False)
    assert np.array_equal(again["x"], result["x"]) and "made anew" in capsys.readouterr().err


# ---- COCO

CATEGORIES = {1: "person", 3: "car", 13: "stop sign", 17: "cat", 90: "toothbrush"}
COCO_FILES = {57870: 0, 9: 1, 318219: 2, 42: 3, 7: 4}  # image id: number of the image
BOXES = [(7, 13, 0), (9, 90, 0), (57870, 3, 1), (9, 1, 1), (42, 1, 1), (9, 1, 0), (57870, 90, 0)]
COCO_TARGETS = [[-1, 1, -1, -1, 1],
                [1, -1, -1, -1, 1],
                [-1, -1, -1, -1, -1],  # without annotation
                [1, -1, -1, -1, -1],
                [-1, -1, 1, -1, -1]]
WITHOUT_CROWD = [[-1, -1, -1, -1, 1], *COCO_TARGETS[1:3], [-1] * 5, COCO_TARGETS[4]]


def instances(part, files, boxes, categories):
    def outline(is_crowd):
        return ({"counts": [20, 3, 7], "size": [6, 5]} if is_crowd
                else [[510.66, 423.01, 511.72, 420.03, 510.45, 416.0]])

    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": [{"license": 5, "file_name": f"COCO_{part}_{image:012d}.jpg", "height": 480,
                    "width": 640, "id": image} for image in files],
        "licenses": [{"url": "http://example.org", "id": 1, "name": "a license"}],
        "annotations": [{"segmentation": outline(is_crowd), "area": 702.1, "iscrowd": is_crowd,
                         "image_id": image, "bbox": [473.07, 395.93, 38.65, 28.67],
                         "category_id": category, "id": 100 - number}
                        for number, (image, category, is_crowd) in enumerate(boxes)],
        "categories": [{"supercategory": "thing", "id": key, "name": name}
                       for key, name in categories.items()]}


def write_coco(root, part, files=COCO_FILES, boxes=BOXES, categories=CATEGORIES):
    content = instances(part, files, boxes, categories)
    write(root / "annotations" / f"instances_{part}.json", content)
    save_images(root / part, [image["file_name"] for image in content["images"]])
    return content


@pytest.mark.parametrize("split, part", [("train", "train2014"), ("test", "val2014")])
def test_coco(tmp_path, split, part):
    write_coco(tmp_path, part)
    dataset = load_dataset("coco", tmp_path, split)
    assert dataset.labels == ["person", "car", "stop sign", "cat", "toothbrush"]
    assert numbers(dataset) == [0, 1, 2, 3, 4] and not len(dataset.unseen)
    assert dataset.targets.tolist() == COCO_TARGETS and dataset.targets.dtype == torch.int8
    assert f"{part}_000000000009.jpg" in dataset.image_name(1)
    dataset = load_dataset("coco", tmp_path, split, drop_crowd=True)
    assert numbers(dataset) == [0, 1, 2, 3, 4] and dataset.targets.tolist() == WITHOUT_CROWD
    dataset = load_dataset("coco", tmp_path, split, annotated_only=True)
    assert numbers(dataset) == [0, 1, 3, 4]
    assert dataset.targets.tolist() == [COCO_TARGETS[i] for i in (0, 1, 3, 4)]
    dataset = load_dataset("coco", tmp_path, split, annotated_only=True, drop_crowd=True)
    assert numbers(dataset) == [0, 1, 4]
    assert dataset.targets.tolist() == [WITHOUT_CROWD[i] for i in (0, 1, 4)]


def test_coco_columns_follow_the_category_ids(tmp_path):
    write_coco(tmp_path, "val2014", categories=dict(reversed(CATEGORIES.items())))
    dataset = load_dataset("coco", tmp_path, "test")
    assert dataset.labels == list(CATEGORIES.values())
    assert dataset.targets.tolist() == COCO_TARGETS


def test_coco_tells_the_counts(tmp_path, capsys):
    write_coco(tmp_path, "train2014")
    load_dataset("coco", tmp_path, "train")
    message = capsys.readouterr().err
    assert "5 images listed, 82,783 published; WARNING" in message
    assert "4 images listed, 82,081 published; WARNING" in message
    assert "5 categories that are not COCO's 80" in message
    load_dataset("coco", tmp_path, "train", quiet=True)
    assert capsys.readouterr().err == ""


def test_counts_as_published_give_no_warning(capsys):
    for found, warns in ((4952, False), (4951, True)):
        data._note_count("VOC 2007 test", found, 4952, False)
        assert ("WARNING" in capsys.readouterr().err) == warns


def test_coco_is_parsed_once_until_it_changes(tmp_path, cache, monkeypatch):
    content = write_coco(tmp_path, "train2014")
    parse, parsed = data._parse_json, []
    monkeypatch.setattr(data, "_parse_json",
                        lambda path, **options: parsed.append(path) or parse(path, **options))
    for options in ({}, {"drop_crowd": True}, {"annotated_only": True}, {}):
        dataset = load_dataset("coco", tmp_path, "train", **options)
    assert len(parsed) == 1 and dataset.targets.tolist() == COCO_TARGETS
    assert dataset.labels == list(CATEGORIES.values()) and len(list(cache.iterdir())) == 1
    path = tmp_path / "annotations" / "instances_train2014.json"
    content["annotations"][0]["category_id"] = 17  # the same size
    write(path, content)
    os.utime(path, (1, 1))
    changed = load_dataset("coco", tmp_path, "train")
    assert len(parsed) == 2 and changed.targets[4].tolist() == [-1, -1, -1, 1, -1]


NEITHER = {"traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball",
           "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog",
           "potted plant", "dining table", "cell phone", "teddy bear", "hair drier"}
NO_SUCH_ID = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # the gaps of the official ids
OFFICIAL = dict(zip([i for i in range(1, 91) if i not in NO_SUCH_ID], data.COCO_LABELS))


def test_official_category_ids():
    assert (OFFICIAL[17], OFFICIAL[13], OFFICIAL[44], OFFICIAL[90]) == (
        "cat", "stop sign", "bottle", "toothbrush")
    assert len(data.COCO_SEEN) == 48 and len(data.COCO_UNSEEN) == 17
    assert {*data.COCO_SEEN, *data.COCO_UNSEEN} == {*data.COCO_LABELS} - NEITHER


def test_coco_zero_shot(tmp_path):
    person, car, light, cat, dog = 1, 3, 10, 17, 18
    boxes = [(9, person, 0), (9, cat, 0), (7, person, 0), (7, light, 0), (42, dog, 1), (42, car, 0),
             (318219, light, 0)]
    for part in ("train2014", "val2014"):
        write_coco(tmp_path, part, boxes=boxes, categories=OFFICIAL)
    expected = [name for name in OFFICIAL.values() if name not in NEITHER]
    unseen = [expected.index(name) for name in (
        "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard",
        "skateboard", "cup", "knife", "cake", "couch", "keyboard", "sink", "scissors")]

    def present(dataset):
        return [[expected[c] for c in (row == 1).nonzero()[:, 0]] for row in dataset.targets]

    test = load_dataset("coco", tmp_path, "test", zero_shot=True)
    assert test.labels == expected and len(expected) == 65 and test.unseen.tolist() == unseen
    assert numbers(test) == [0, 1, 2, 3, 4]
    assert present(test) == [[], ["person", "cat"], [], ["car", "dog"], ["person"]]
    assert (test.targets != 0).all()
    for drop_crowd in (False, True):  # the crowd of dogs is in the picture nevertheless
        train = load_dataset("coco", tmp_path, "train", zero_shot=True, drop_crowd=drop_crowd)
        assert train.labels == expected and train.unseen.tolist() == unseen
        assert numbers(train) == [0, 2, 4] and present(train) == [[], [], ["person"]]
        assert (train.targets[:, unseen] == 0).all()
        assert (train.targets[:, train.seen] != 0).all() and len(train.seen) == 48
    annotated = load_dataset("coco", tmp_path, "train", zero_shot=True, annotated_only=True)
    assert numbers(annotated) == [4]
    annotated = load_dataset("coco", tmp_path, "test", zero_shot=True, annotated_only=True)
    assert numbers(annotated) == [1, 3, 4]


def test_coco_zero_shot_needs_its_categories(tmp_path):
    write_coco(tmp_path, "val2014")
    assert "zero_shot needs the categories airplane, apple" in message_of(
        "coco", tmp_path, "test", zero_shot=True)


def broken(change):
    content = instances("val2014", COCO_FILES, BOXES, CATEGORIES)
    change(content)
    return content


@pytest.mark.parametrize("content, problem", [
    (json.dumps(broken(lambda content: None), indent=1)[:-9], "not JSON: .* line [1-9]"),
    (b"{}", "not a file of COCO instances: KeyError.'images'"),
    ([1], "not a file of COCO instances"),
    (b'{"images": "\xff"}', "line 1: not UTF-8"),
    (broken(lambda c: c.pop("annotations")), "KeyError.'annotations'"),  # as in image_info files
    (broken(lambda c: c["annotations"][3].pop("category_id")), "KeyError.'category_id'"),
    (broken(lambda c: c["annotations"][2].update(image_id=8)), "annotation 3 is of image 8, "),
    (broken(lambda c: c["annotations"][2].update(category_id=12)), "annotation 3 .* category 12"),
    (broken(lambda c: c["annotations"][2].update(image_id=[])), "not a file of COCO instances"),
    (broken(lambda c: c["images"][1].update(id=7)), "an id comes twice among the images"),
    (broken(lambda c: c["categories"][1].update(id=1)), "twice among the categories"),
    (broken(lambda c: c["categories"][1].update(name="cat")), "labels given more than once: cat"),
])
def test_coco_files_that_are_wrong(tmp_path, content, problem):
    write_coco(tmp_path, "val2014")
    path = tmp_path / "annotations" / "instances_val2014.json"
    write(path, content)
    with pytest.raises(UserError, match=problem) as error:
        load_dataset("coco", tmp_path, "test")
    assert str(path) in str(error.value) or "more than once" in problem


def test_coco_with_a_byte_order_mark(tmp_path):
    write_coco(tmp_path, "val2014")
    as_windows_writes(tmp_path / "annotations" / "instances_val2014.json")
    assert load_dataset("coco", tmp_path, "test").targets.tolist() == COCO_TARGETS


def test_coco_missing_files(tmp_path):
    write_coco(tmp_path, "val2014")
    message = message_of("coco", tmp_path, "train")
    assert "instances_train2014.json not found" in message.partition("\n")[0]
    assert "val2014/COCO_val2014_<number>.jpg" in message
    (tmp_path / "val2014" / "COCO_val2014_000000000009.jpg").unlink()
    assert "1 of 5 images missing, e.g. " in message_of("coco", tmp_path, "test")
    dataset = load_dataset("coco", tmp_path, "test", allow_missing=True)
    assert dataset.missing == 1 and numbers(dataset) == [0, 2, 3, 4]
    assert dataset.targets.tolist() == [COCO_TARGETS[i] for i in (0, 2, 3, 4)]


# ---- VOC 2007

VOC_CLASSES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor""".split()
VOC_FILES = ["000012", "000017", "000023", "000009"]
# image: (class, difficult) of its objects
VOC_OBJECTS = {"000012": [("car", 0), ("car", 1)], "000009": [],
               "000017": [("pottedplant", 1), ("pottedplant", 1), ("person", 0)],
               "000023": [("person", 1), ("dog", 1), ("dog", 0)]}
VOC_CLASS_FILES = {  # the other classes are -1 everywhere
    "car": "000012  1\n000017 -1\n000023 -1\n000009 -1\n",
    "dog": "000012 -1\n000017 -1\n000023  1\n000009 -1\n",
    "person": "000012 -1\n000017  1\n000023  0\n000009 -1\n",
    "pottedplant": "000012 -1\n000017  0\n000023 -1\n000009 -1\n"}
VOC_PRESENT = {("000012", "car"), ("000017", "person"), ("000023", "dog")}
VOC_DIFFICULT = {("000017", "pottedplant"), ("000023", "person")}


def voc_xml(image, objects):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return (f"<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>{image}.jpg</filename>\n"
            "\t<source><database>The VOC2007 Database</database></source>\n"
            "\t<owner><name>someone</name></owner>\n"
            + "".join(f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Rear</pose>\n\t\t<truncated>"
                      f"0</truncated>\n\t\t<difficult>{difficult}</difficult>\n\t\t<bndbox><xmin>15"
                      f"6</xmin></bndbox>\n{part * (name == 'person')}\t</object>\n"
                      for name, difficult in objects) + "</annotation>\n")


def write_voc(voc, class_files=True, annotations=True):
    for part in ("trainval", "test"):
        write(voc / f"ImageSets/Main/{part}.txt", "".join(f"{image}\n" for image in VOC_FILES))
        for name in VOC_CLASSES if class_files else []:
            nowhere = "".join(f"{image} -1\n" for image in VOC_FILES)
            write(voc / f"ImageSets/Main/{name}_{part}.txt", VOC_CLASS_FILES.get(name, nowhere))
    for image, objects in VOC_OBJECTS.items() if annotations else ():
        write(voc / f"Annotations/{image}.xml", voc_xml(image, objects))
    save_images(voc / "JPEGImages", [f"{image}.jpg" for image in VOC_FILES])


def voc_targets(difficult):
    return [[1 if (image, name) in VOC_PRESENT else difficult if (image, name) in VOC_DIFFICULT
             else -1 for name in VOC_CLASSES] for image in VOC_FILES]


@pytest.mark.parametrize("source", ["class_files", "annotations"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_voc2007(tmp_path, source, split):
    write_voc(tmp_path, **{"class_files": False, "annotations": False, source: True})
    dataset = load_dataset("voc2007", tmp_path, split)
    assert [label.replace(" ", "") for label in dataset.labels] == VOC_CLASSES
    assert [label for label in dataset.labels if " " in label] == [
        "dining table", "potted plant", "tv monitor"]
    assert numbers(dataset) == [0, 1, 2, 3] and not len(dataset.unseen)
    assert dataset.targets.tolist() == voc_targets(-1) and dataset.targets.dtype == torch.int8
    for name, value in (("absent", -1), ("unknown", 0), ("present", 1)):
        dataset = load_dataset("voc2007", tmp_path, split, difficult=name)
        assert dataset.targets.tolist() == voc_targets(value)


def test_voc2007_wherever_its_root_is(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2007")
    for root in ("", "VOCdevkit", "VOCdevkit/VOC2007"):
        dataset = load_dataset("voc2007", tmp_path / root, "test")
        assert dataset.targets.tolist() == voc_targets(-1) and numbers(dataset) == [0, 1, 2, 3]


def test_voc2007_written_by_windows(tmp_path, capsys):
    write_voc(tmp_path)
    for path in (tmp_path / "ImageSets" / "Main").iterdir():
        as_windows_writes(path)
    dataset = load_dataset("voc2007", tmp_path, "train")
    assert dataset.targets.tolist() == voc_targets(-1)
    assert "4 images listed, 5,011 published; WARNING" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, problem", [
    ("ImageSets/Main/dog_test.txt", "000012 -1\n000017 -1\n000023  2\n000009 -1\n",
     "line 3: '000023  2' is not an image and 1, -1 or 0"),
    ("ImageSets/Main/dog_test.txt", "000012 -1\n000017\n", "line 2: '000017' is not an image"),
    ("ImageSets/Main/dog_test.txt", "000012 -1 1\n", "line 1: '000012 -1 1' is not an image"),
    ("ImageSets/Main/dog_test.txt", "000012 -1\n000099 -1\n", "line 2: 000099 is not in the list"),
    ("ImageSets/Main/dog_test.txt", "000012 -1\n000012 -1\n", "line 2: 000012 is listed twice"),
    ("ImageSets/Main/dog_test.txt", "000017 -1\n000012  1\n", "2 images of the split are not "
                                                             "listed, e.g. 000023"),
    ("ImageSets/Main/test.txt", "000012\n000017\n000012\n", "line 3: 000012 is listed twice"),
    ("ImageSets/Main/test.txt", "000012\n\n000017\n", "line 2: the line is empty"),
])
def test_voc2007_lists_that_are_wrong(tmp_path, name, content, problem):
    write_voc(tmp_path)
    write(tmp_path / name, content)
    message = message_of("voc2007", tmp_path, "test")
    assert message.startswith(str(tmp_path / name)) and problem in message


@pytest.mark.parametrize("content, problem", [
    ("<annotation>\n<object>\n</annotation>", "not XML: mismatched tag: line 3"),
    ("", "not XML"),
    (voc_xml("000017", [("lamp", 0)]), "'lamp' is not one of the classes aeroplane, "),
    ("<annotation><object/></annotation>", "'' is not one of the classes"),
    ("<?xml version='1.0' encoding='nonsense'?><annotation/>", "not XML"),
])
def test_voc2007_annotations_that_are_wrong(tmp_path, content, problem):
    write_voc(tmp_path, class_files=False)
    write(tmp_path / "Annotations" / "000017.xml", content)
    message = message_of("voc2007", tmp_path, "test")
    assert message.startswith(str(tmp_path / "Annotations" / "000017.xml")) and problem in message


def test_voc2007_missing_files(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "JPEGImages" / "000023.jpg").unlink()
    assert "1 of 4 images missing" in message_of("voc2007", tmp_path, "test")
    (tmp_path / "ImageSets/Main/dog_test.txt").unlink()  # not taken from the XML: one or the other
    assert "dog_test.txt not found" in message_of("voc2007", tmp_path, "test")
    for name in VOC_CLASSES:
        (tmp_path / f"ImageSets/Main/{name}_train.txt").unlink(missing_ok=True)
        (tmp_path / f"ImageSets/Main/{name}_test.txt").unlink(missing_ok=True)
    (tmp_path / "Annotations" / "000012.xml").unlink()
    assert "000012.xml: No such file" in message_of("voc2007", tmp_path, "test")
    message = message_of("voc2007", tmp_path / "JPEGImages", "test")
    assert "VOCdevkit/VOC2007/ImageSets not found" in message.partition("\n")[0]
    assert "VOC2007/JPEGImages/<image>.jpg" in message
    assert "absent, unknown, present, not 'no'" in message_of(
        "voc2007", tmp_path, "test", difficult="no")


# ---- Visual Genome, 200 labels

VG_FILES = ["2386621.jpg", "1.jpg", "713137.jpg", "99.jpg"]
VG_CHOSEN = {"99.jpg": [0], "1.jpg": [2, 0], "713137.jpg": [], "2386621.jpg": [1, 2, 1],
             "5.jpg": [0, 1, 2]}
VG_TARGETS = [[-1, 1, 1], [1, -1, 1], [-1, -1, -1], [1, -1, -1]]


@pytest.fixture
def vg_root(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}_list_500.txt", "\n".join(VG_FILES))
    write(tmp_path / "vg_category_200_labels_index.json", VG_CHOSEN)
    write(tmp_path / "vg_category_200.txt", "traffic light\nman\nsky\n")
    save_images(tmp_path / "VG_100K", VG_FILES)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_vg200(vg_root, split, capsys):
    dataset = load_dataset("vg200", vg_root, split)
    assert dataset.labels == ["traffic light", "man", "sky"] and not len(dataset.unseen)
    assert numbers(dataset) == [0, 1, 2, 3] and dataset.targets.tolist() == VG_TARGETS
    message = capsys.readouterr().err
    published = {"train": "98,249", "test": "10,000"}[split]
    assert f"4 images listed, {published} published; WARNING" in message
    assert "3 names instead of 200" in message


def test_vg200_in_two_folders_and_written_by_windows(vg_root):
    (vg_root / "VG_100K_2").mkdir()
    (vg_root / "VG_100K" / "1.jpg").rename(vg_root / "VG_100K_2" / "1.jpg")
    Image.new("RGB", (8, 8), (200, 0, 0)).save(vg_root / "VG_100K_2" / "99.jpg")  # not this one
    for path in vg_root.glob("*.*"):
        as_windows_writes(path)
    dataset = load_dataset("vg200", vg_root, "test")
    assert dataset.labels == ["traffic light", "man", "sky"]
    assert numbers(dataset) == [0, 1, 2, 3] and dataset.targets.tolist() == VG_TARGETS
    (vg_root / "VG_100K_2" / "1.jpg").unlink()
    assert "1 of 4 images missing, e.g. " in message_of("vg200", vg_root, "test")


def test_vg200_needs_names(vg_root):
    names = vg_root / "vg_category_200.txt"
    names.unlink()
    message = message_of("vg200", vg_root, "test")
    assert "need their names" in message and "vg_category_200.txt" in message
    assert "line 1 is label 0" in message and "\n" not in message
    write(vg_root / "vg_category_200.json", ["traffic light", "man", "sky"])
    dataset = load_dataset("vg200", vg_root, "test")
    assert dataset.labels == ["traffic light", "man", "sky"]
    assert dataset.targets.tolist() == VG_TARGETS


@pytest.mark.parametrize("name, content, problem", [
    ("test_list_500.txt", "1.jpg\n7.jpg\n", "line 2: 7.jpg has no labels in "),
    ("test_list_500.txt", "1.jpg\n1.jpg\n", "line 2: 1.jpg is listed twice"),
    ("vg_category_200.txt", "man\nsky\nman\n", "line 3: man is listed twice"),
    ("vg_category_200.txt", "man\nsky\n", "of 2386621.jpg must be a list of numbers from 0 to 1"),
    ("vg_category_200_labels_index.json", {**VG_CHOSEN, "1.jpg": [-1]}, "the labels of 1.jpg must"),
    ("vg_category_200_labels_index.json", {**VG_CHOSEN, "1.jpg": ["sky"]}, "the labels of 1.jpg"),
    ("vg_category_200_labels_index.json", {**VG_CHOSEN, "1.jpg": 2}, "the labels of 1.jpg must"),
    ("vg_category_200_labels_index.json", {**VG_CHOSEN, "1.jpg": [True]}, "the labels of 1.jpg"),
    ("vg_category_200_labels_index.json", [[1]], "must be {"),
    ("vg_category_200_labels_index.json", "{\n'", "not JSON: "),
])
def test_vg200_files_that_are_wrong(vg_root, name, content, problem):
    write(vg_root / name, content)
    message = message_of("vg200", vg_root, "test")
    assert str(vg_root) in message and problem in message


def test_vg200_names_that_are_wrong_and_missing_files(vg_root):
    (vg_root / "vg_category_200.txt").unlink()
    for content in ({"man": 0}, ["man", 1]):
        write(vg_root / "vg_category_200.json", content)
        assert "must be a JSON list of names" in message_of("vg200", vg_root, "test")
    for name in ("test_list_500.txt", "vg_category_200_labels_index.json"):
        write(vg_root / "vg_category_200.json", ["man", "sky", "sea"])
        (vg_root / name).unlink()
        message = message_of("vg200", vg_root, "test")
        assert f"{name} not found" in message and "VG_100K/<image>.jpg" in message


# ---- a folder of one's own

TRAIN_LINES = ['{"image": "photos/0.png", "present": ["dog", "ice cream"], "absent": ["cat"]}',
               '',
               '{"image": "1.png", "present": [" dog "], "absent": "rest"}',
               '{"absent": ["dog", "dog"], "image": "./photos/../2.png"}']
TEST_LINES = ['{"image": "1.png", "present": ["\u732b"]}', '{"image": "2.png", "absent": "rest"}']


@pytest.fixture
def folder_root(tmp_path):
    write(tmp_path / "train.jsonl", "\n".join(TRAIN_LINES))
    write(tmp_path / "test.jsonl", "\n".join(TEST_LINES) + "\n")
    save_images(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "photos").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "photos" / "0.png")
    return tmp_path


def test_folder(folder_root, capsys):
    train, test = (load_dataset("folder", folder_root, split) for split in ("train", "test"))
    for dataset in (train, test):
        assert dataset.labels == ["cat", "dog", "ice cream", "\u732b"] and not len(dataset.unseen)
    assert numbers(train) == [0, 1, 2] and numbers(test) == [1, 2]
    assert train.targets.tolist() == [[-1, 1, 1, 0], [-1, 1, -1, -1], [0, -1, 0, 0]]
    assert test.targets.tolist() == [[0, 0, 0, 1], [-1, -1, -1, -1]]
    message = capsys.readouterr().err
    assert message.count("WARNING") == 1 and "2 images are in train.jsonl too" in message


def test_folder_with_fixed_and_unseen_labels(folder_root):
    write(folder_root / "labels.txt", "dog\nowl\n\u732b\nice cream\ncat\n")
    write(folder_root / "unseen.txt", "cat\nowl\n")
    for path in [*folder_root.glob("*.jsonl"), *folder_root.glob("*.txt")]:
        as_windows_writes(path)
    train, test = (load_dataset("folder", folder_root, split) for split in ("train", "test"))
    for dataset in (train, test):
        assert dataset.labels == ["dog", "owl", "\u732b", "ice cream", "cat"]
        assert dataset.unseen.tolist() == [1, 4] and dataset.seen.tolist() == [0, 2, 3]
    assert train.targets.tolist() == [[1, 0, 0, 1, 0], [1, 0, -1, -1, 0], [-1, 0, 0, 0, 0]]
    assert test.targets.tolist() == [[0, 0, 1, 0, 0], [-1, -1, -1, -1, -1]]
    (folder_root / "train.jsonl").unlink()  # lang_cls.py trains without images
    assert load_dataset("folder", folder_root, "test").targets.tolist() == test.targets.tolist()


def test_folder_with_absolute_paths_and_as_a_json_list(folder_root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_images(elsewhere, ["a.png", "b.png"])
    write(folder_root / "test.jsonl", json.dumps(
        [{"image": str(elsewhere / "b.png"), "present": ["dog"]},
         {"image": str(elsewhere / "a.png"), "present": ["rest"], "absent": "rest"}], indent=1))
    dataset = load_dataset("folder", folder_root, "test")
    assert dataset.labels == ["cat", "dog", "ice cream", "rest"] and numbers(dataset) == [1, 0]
    assert dataset.targets.tolist() == [[0, 1, 0, 0], [-1, -1, -1, 1]]


@pytest.mark.parametrize("line, problem", [
    ('{"image": "2.png", "present": ["owl"]}', "'owl' is not in "),
    ('{"image": "2.png", "absent": ["dog", "owl"]}', "'owl' is not in "),
    ('{"image": "2.png", "present": ["dog", "cat"], "absent": ["cat"]}',
     "'cat' is both present and absent"),
    ('{"image": "2.png", "present": ["dog "], "absent": [" dog"]}', "'dog' is both"),
    ('{"image": "2.png", "present": "dog"}', '"present" must be a list of labels'),
    ('{"image": "2.png", "present": "rest"}', '"present" must be a list of labels'),
    ('{"image": "2.png", "absent": "dog"}', '"absent" must be a list of labels or "rest"'),
    ('{"image": "2.png", "absent": ["dog", 1]}', '"absent" must be a list of labels'),
    ('{"image": "2.png", "present": [" "]}', '"present" must be a list of labels'),
    ('{"image": "2.png", "present": null}', '"present" must be a list of labels'),
    ('{"image": "2.png", "presnt": ["dog"]}', 'not {"image": "...", "present": [...]'),
    ('["2.png", "dog"]', 'not {"image": "...", "present": [...]'),
    ('"2.png"', 'not {"image": "...", "present": [...]'),
    ('{"present": ["dog"]}', '"image" must be the path of an image'),
    ('{"image": 2, "present": ["dog"]}', '"image" must be the path of an image'),
    ('{"image": "", "present": ["dog"]}', '"image" must be the path of an image'),
    ('{"image": "photos/../1.png", "present": ["dog"]}', "1.png is listed twice"),
    ('{"image": "2.png", "present": ["dog"]', "not JSON"),
])
def test_folder_lines_that_are_wrong(folder_root, line, problem):
    write(folder_root / "labels.txt", "dog\n\u732b\nice cream\ncat\n")
    write(folder_root / "train.jsonl", "\n".join([*TRAIN_LINES[:3], line]))
    message = message_of("folder", folder_root, "train")
    assert message.startswith(f"{folder_root / 'train.jsonl'}, line 4: ") and problem in message


def test_folder_files_that_are_wrong(folder_root):
    unseen, labels = folder_root / "unseen.txt", folder_root / "labels.txt"
    write(unseen, "dog\nowl\n")
    assert f"{unseen}, line 2: there is no label 'owl'" in message_of("folder", folder_root)
    write(unseen, "dog\ncat\nice cream\n\u732b\n")
    assert f"{unseen}: every label is in it" in message_of("folder", folder_root)
    write(labels, "dog\ncat\nice cream\ndog\n")
    assert f"{labels}, line 4: dog is listed twice" in message_of("folder", folder_root)
    for path in (labels, unseen):  # not as if there were none
        write(path, "\n")
        assert message_of("folder", folder_root) == f"{path}: the file is empty"
        path.unlink()
    write(folder_root / "test.jsonl", "\n")
    assert message_of("folder", folder_root).endswith("test.jsonl: there are no images in it")
    for split in ("train", "test"):
        write(folder_root / f"{split}.jsonl", '{"image": "1.png", "absent": "rest"}')
    assert "no label occurs" in message_of("folder", folder_root)
    (folder_root / "train.jsonl").unlink()
    message = message_of("folder", folder_root)
    assert "train.jsonl not found" in message and '"absent": "rest" means all' in message


def test_folder_missing_images(folder_root):
    (folder_root / "photos" / "0.png").unlink()
    assert "1 of 3 images missing, e.g. " in message_of("folder", folder_root)
    assert numbers(load_dataset("folder", folder_root, allow_missing=True)) == [1, 2]


# ---- options on the command line

def arguments_of(*given):
    parser = data.Parser()
    data.add_run_arguments(parser, "mkt")
    return parser.parse_args(["--quiet", *given])


def test_options_reach_the_datasets(tmp_path):
    for part in ("train2014", "val2014"):
        write_coco(tmp_path, part, categories=OFFICIAL)
    write_voc(tmp_path)

    def load(name, *given, split="train"):
        return data.load_split(split, None, arguments_of("--data", name, "--root", str(tmp_path),
                                                         *given))

    assert len(load("coco")) == 5 and len(load("coco").labels) == 80
    assert numbers(load("coco", "--annotated-only")) == [0, 1, 3, 4]
    assert numbers(load("coco", "--annotated-only", "--drop-crowd")) == [0, 1, 4]
    assert len(load("coco", "--zero-shot").labels) == 65
    assert load("voc2007").targets.tolist() == voc_targets(-1)
    for name, value in (("absent", -1), ("unknown", 0), ("present", 1)):
        for split in ("train", "test"):
            dataset = load("voc2007", "--difficult", name, split=split)
            assert dataset.targets.tolist() == voc_targets(value)
    assert len(load("toy", split="test").unseen) == 0
    assert len(load("toy", "--zero-shot", split="test").unseen) == 14
    toy = data.load_split("test", None, arguments_of("--data", "toy"), toy_zero_shot=True)
    assert len(toy.unseen) == 14


@pytest.mark.parametrize("name, given, known", [
    ("voc2007", "--annotated-only", "nuswide81, coco"), ("toy", "--drop-crowd", "coco"),
    ("folder", "--zero-shot", "toy, coco"), ("coco", "--difficult absent", "voc2007")])
def test_options_of_other_datasets_are_refused(tmp_path, name, given, known):
    args = arguments_of("--data", name, "--root", str(tmp_path), *given.split())
    with pytest.raises(UserError) as error:
        data.load_split("train", None, args)
    assert str(error.value) == f"{given.split()[0]} is not for {name}, but for: {known}"


def test_options_stay_the_same_over_resume():
    before = vars(arguments_of("--data", "coco", "--zero-shot", "--output", "runs"))
    args = arguments_of("--data", "coco", "--zero-shot", "--output", "runs")
    data.check_same(args, before, data.SAME)
    for change in (["--zero-shot", "--drop-crowd"], ["--zero-shot", "--annotated-only"], [],
                   ["--zero-shot", "--difficult", "present"]):
        args = arguments_of("--data", "coco", "--output", "runs", *change)
        with pytest.raises(UserError, match="--resume: the run in runs was started with --"):
            data.check_same(args, before, data.SAME)
