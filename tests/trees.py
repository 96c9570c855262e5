"""Tiny trees of every dataset in its official format, and what the scripts' tests share.

make(name, root) writes a tree; its image number i, in the order of its lists, is of the colour
(20 * i, 0, 0).
"""
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from toy import world

ROOT = Path(data.__file__).parent


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def save_images(paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * number, 0, 0)).save(path, quality=100)


def numbers(dataset):
    """Which images a dataset has, by their pixels."""
    return [round(np.asarray(image)[..., 0].mean() / 20) for image, _ in dataset]


def as_windows_writes(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


# ---- NUS-WIDE

TAGS = ["nature", "sky", "blue", "water", "red", "dog", "light", "girl", "green"]
CONCEPTS = ["dog", "fire", "sky", "water"]  # fire is no tag, as in the official lists
NUS_IMAGES = ["actor\\0001_21.jpg", "actor\\0002_174174086.jpg", "zoo\\0003_1.jpg",
              "bird house\\0004_99.jpg", "zoo\\0005_7.jpg", "actor\\0006_8.jpg", "zoo\\0007_9.jpg"]
NUS_ROWS = {"train": [4, 0, 6, 2], "test": [3, 5, 1]}  # rows of NUS_IMAGES, not in their order
HAS_TAG = np.array([[(3 * row + 5 * column) % 4 == 0 for column in range(9)] for row in range(7)])
HAS_TAG[2] = False  # an image without tags
HAS_CONCEPT = np.array([[row * column % 3 == 1 for column in range(4)] for row in range(7)])
HAS_CONCEPT[5, 1] = True


def nuswide(root):
    write(root / "ConceptsList/Concepts81.txt", "".join(f"{name}\r\n" for name in CONCEPTS))
    write(root / "NUS_WID_Tags/TagList1k.txt", "\r\n".join(TAGS) + "\r\n")
    write(root / "NUS_WID_Tags/AllTags1k.txt",
          "".join("".join(f"{entry:d}\t" for entry in row) + "\r\n" for row in HAS_TAG))
    for column, name in enumerate(CONCEPTS):
        write(root / f"Groundtruth/AllLabels/Labels_{name}.txt",
              "".join(f"{entry:d} \r\n" for entry in HAS_CONCEPT[:, column]))
    write(root / "ImageList/Imagelist.txt", "".join(f"{path} \r\n" for path in NUS_IMAGES))
    for split, rows in NUS_ROWS.items():
        write(root / f"ImageList/{split.title()}Imagelist.txt",
              "\r\n".join(NUS_IMAGES[row] for row in rows))
    save_images(root / "Flickr" / path.replace("\\", "/") for path in NUS_IMAGES)


# ---- COCO

NO_SUCH_ID = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # the gaps of the official ids
CATEGORIES = dict(zip([i for i in range(1, 91) if i not in NO_SUCH_ID], data.COCO_LABELS))
COCO_FILES = [57870, 9, 318219, 42, 7]
BOXES = [(7, 13, 0), (9, 90, 0), (57870, 3, 1), (9, 1, 1), (42, 18, 1), (9, 17, 0), (9, 1, 0),
         (57870, 90, 0), (42, 3, 0), (7, 1, 0)]  # image, category, crowd


def coco(root):
    for part in ("train2014", "val2014"):
        names = [f"COCO_{part}_{image:012d}.jpg" for image in COCO_FILES]
        content = {
            "info": {"year": 2014},
            "images": [{"file_name": name, "height": 480, "id": image}
                       for image, name in zip(COCO_FILES, names)],
            "annotations": [{"segmentation": [[510.66, 423.01]], "iscrowd": crowd, "bbox": [4.0],
                             "image_id": image, "category_id": category, "id": 100 - number}
                            for number, (image, category, crowd) in enumerate(BOXES)],
            "categories": [{"supercategory": "thing", "id": key, "name": CATEGORIES[key]}
                           for key in reversed(CATEGORIES)]}
        write(root / f"annotations/instances_{part}.json", content)
        save_images(root / part / name for name in names)


# ---- VOC

VOC_CLASSES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor""".split()
VOC_FILES = ["000012", "000017", "000023", "000009"]
# image: (class, difficult) of its objects
VOC_OBJECTS = {"000012": [("car", 0), ("car", 1)], "000009": [],
               "000017": [("pottedplant", 1), ("pottedplant", 1), ("person", 0)],
               "000023": [("person", 1), ("dog", 1), ("dog", 0)]}


def voc_xml(image, objects):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return (f"<annotation>\n\t<filename>{image}.jpg</filename>\n\t<owner><name>someone</name>"
            "</owner>\n" + "".join(
                f"\t<object>\n\t\t<name>{name}</name>\n\t\t<difficult>{difficult}</difficult>\n"
                f"\t\t<bndbox><xmin>156</xmin></bndbox>\n{part}\t</object>\n"
                for name, difficult in objects) + "</annotation>\n")


def voc2007(root, year="2007", parts=("trainval", "test")):
    root = root / f"VOCdevkit/VOC{year}"
    for part in parts:
        write(root / f"ImageSets/Main/{part}.txt", "".join(f"{image}\n" for image in VOC_FILES))
    for image, objects in VOC_OBJECTS.items():
        write(root / f"Annotations/{image}.xml", voc_xml(image, objects))
    save_images(root / f"JPEGImages/{image}.jpg" for image in VOC_FILES)


def voc2012(root):
    voc2007(root, "2012", ("train", "val"))


# ---- Visual Genome, 200 labels

VG_FILES = ["2386621.jpg", "1.jpg", "713137.jpg", "99.jpg"]
VG_INDICES = {"99.jpg": [0], "1.jpg": [2, 0], "713137.jpg": [], "2386621.jpg": [1, 2, 1],
              "5.jpg": [0, 1, 2]}


def vg200(root):
    for split in ("train", "test"):
        write(root / f"{split}_list_500.txt", "\n".join(VG_FILES))
    write(root / "vg_category_200_labels_index.json", VG_INDICES)
    write(root / "vg_category_200.txt", "traffic light\nman\nsky\n")
    save_images(root / "VG_100K" / name for name in VG_FILES)


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


def cub(root):
    """As the archive unpacks: attributes.txt beside the folder with everything else."""
    paths = [f"00{i}.Laysan_Albatross/Laysan_Albatross_000{i}_{i}.jpg" for i in (1, 2, 3, 4)]
    write(root / "attributes.txt",
          "".join(f"{i} {name}\n" for i, name in enumerate(ATTRIBUTES, 1)))
    root = root / "CUB_200_2011"
    write(root / "images.txt", "".join(f"{i} {path}\n" for i, path in enumerate(paths, 1)))
    write(root / "train_test_split.txt", "1 0\n2 1\n3 1\n4 0\n")
    write(root / "attributes/image_attribute_labels.txt", CUB_LINES)
    save_images(root / "images" / path for path in paths)


# ---- Open Images V4

CLASSES = [("/m/01", "Satay"), ("/m/02", "Bat"), ("/m/03", "Chili con carne"),
           ("/m/04", '"Ducks, geese and swans"'), ("/m/05", "Bulbul"), ("/m/06", "Bat"),
           ("/m/0_7", "Mämmi "), ("/m/08", "Oceanic trench"), ("/m/09", "Bat")]
TRAINABLE = ["/m/06", "/m/04", "/m/02", "/m/01"]
UNTRAINABLE = ["/m/03", "/m/0_7", "/m/08", "/m/09"]  # not all, as in the official lists
OPENIMAGES_HEADER = "ImageID,Source,LabelName,Confidence"
OPENIMAGES_LINES = {
    "train": ["0a1,verification,/m/06,1", "0a1,verification,/m/01,0", "0a1,verification,/m/09,1",
              "0a1,verification,/m/02,0",
              "0a2,verification,/m/09,1",  # an unseen label only: left out
              "0b300000000000ff,crowdsource-verification,/m/04,0",
              "0a4,verification,/m/02,1.0", "0a4,verification,/m/04,0.0",
              "0a4,verification,/m/01,1", "0a4,verification,/m/02,1",  # twice
              "0a5,verification,/m/03,1",  # neither seen nor among the unseen: left out
              "0a6,verification,/m/02,1", "0a6,verification,/m/06,1", "0a6,verification,/m/06,0",
              "0a6,verification,/m/0nothing,1"],
    "test": ["1a,verification,/m/09,1", "1a,verification,/m/0_7,0", "1a,verification,/m/06,0",
             "1b,verification,/m/03,1", "1c,verification,/m/0_7,1", "1c,verification,/m/08,1"]}


def openimages(root):
    lists = root / "2018_04"
    write(lists / "class-descriptions.csv", "".join(f"{key},{name}\r\n" for key, name in CLASSES))
    write(lists / "classes-trainable.txt", "".join(f"{name}\n" for name in TRAINABLE))
    write(lists / "unseen_labels.pkl", pickle.dumps(np.array(UNTRAINABLE, dtype=object), 2))
    write(lists / "top_400_unseen.csv", "\ufeff3\r\n1")  # /m/09 and /m/0_7
    for split, lines in OPENIMAGES_LINES.items():
        write(lists / f"{split}-annotations-human-imagelabels.csv",
              "".join(f"{line}\n" for line in [OPENIMAGES_HEADER, *lines]))
        names = dict.fromkeys(line.split(",")[0] for line in lines)
        save_images(root / split / f"{name}.jpg" for name in names)


# ---- a folder of one's own

FOLDER_LINES = {
    "train": ['{"image": "photos/0.png", "present": ["dog", "ice cream"], "absent": ["cat"]}',
              '',
              '{"image": "1.png", "present": [" dog "], "absent": "rest"}',
              '{"absent": ["dog", "dog"], "image": "./photos/../2.png"}'],
    "test": ['{"image": "1.png", "present": ["\u732b"]}',
             '{"image": "ROOT/2.png", "absent": "rest"}']}


def folder(root):
    for split, lines in FOLDER_LINES.items():
        write(root / f"{split}.jsonl", "\n".join(lines).replace("ROOT", str(root.absolute())))
    save_images([root / "photos/0.png", root / "1.png", root / "2.png"])


def make(name, root):
    """Write the tree of a dataset, which may be "nuswide81" too, below a folder."""
    globals()[name.removesuffix("81")](root)
    return root


# ---- targets

def random_targets(images, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (images, labels), generator=generator).to(torch.int8)


def drawn(targets, share, seed=0):
    """Known entries as SST, SARB and HCP draw them; share None: as Cole et al. (2021) do."""
    targets = np.asarray(targets)
    if share is not None:
        return targets * (np.random.RandomState(seed).rand(*targets.shape) < share)
    rng, known = np.random.RandomState(1200), np.zeros_like(targets)
    for row, target in enumerate(targets):
        positives = np.nonzero(target == 1)[0]
        rng.shuffle(positives)
        known[row, positives[:1]] = 1
    return known


# ---- the scripts' runs

def scenes(root, **splits):
    """A folder of scenes of the toy world; splits: {split: (how many, of which things)}."""
    for seed, (split, (count, things)) in enumerate(splits.items(), 1):
        lines = []
        for i in range(count):
            data.write_file(root / split / f"{i}.png", world.scene("benchmark", seed, i, things))
            shown = {thing for thing, *_ in world.scene_objects("benchmark", seed, i, things)}
            lines.append({"image": f"{split}/{i}.png", "absent": "rest",
                          "present": [world.LABELS[thing] for thing in shown]})
        write(root / f"{split}.jsonl", "\n".join(map(json.dumps, lines)))
    return root


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    assert found.pop("seconds") >= 0
    return found


def checkpoint(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(path, expected):
    found, expected = checkpoint(path)["model"], checkpoint(expected)["model"]
    assert found.keys() == expected.keys()
    for name in expected:  # threads may add up gradients in another order
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


def predictions(script, capsys, *arguments):
    capsys.readouterr()
    script.main(["--predict", *map(str, arguments), "--device", "cpu"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def shown(line, labels):
    """The scores of labels in what --predict prints of an image, the best of which come first."""
    scores = {entry["label"]: entry["score"] for entry in line["labels"]}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    return [scores[label] for label in labels]


def check_predictions(script, capsys, folder, labels, scores_of, *arguments):
    """--predict prints scores_of(photo) of every photo; --top, --threshold and --heatmap."""
    photos = [folder / "photos" / name for name in ("b.png", "inner/a.png")]
    for i, path in enumerate(photos):
        data.write_file(path, world.scene("benchmark", 7, i))
    arguments = [folder / "photos", *arguments]
    found = predictions(script, capsys, *arguments, "--heatmap", folder / "maps")
    assert [line["path"] for line in found] == list(map(str, photos))
    maps = (folder / "maps").rglob("*.png")
    assert [Image.open(path).format for path in maps] == ["PNG", "PNG"]
    for path, line in zip(photos, found):
        scores = scores_of(data.open_image(path)).tolist()
        np.testing.assert_allclose(shown(line, labels), scores, rtol=0, atol=1e-3)
    best = found[0]["labels"]
    assert predictions(script, capsys, *arguments, "--top", 2)[0]["labels"] == best[:2]
    least = best[1]["score"] - 1e-4
    chosen = predictions(script, capsys, *arguments, "--threshold", least)[0]["labels"]
    assert chosen == [entry for entry in best if entry["score"] >= least]


KILLED = """
import os, signal, sys
import data, {script}
write_file, written = data.write_file, []

def write_or_die(path, content):
    write_file(path, content)
    written.append(os.path.basename(path))
    if written.count("{file}") == {times}:
        os.kill(os.getpid(), signal.SIGKILL)

data.write_file = write_or_die
{script}.main(sys.argv[1:])
"""


def run_killed(script, file, times, arguments):
    """Run a script that is killed, as by kill -9, when it has written a file so many times."""
    code = KILLED.format(script=script, file=file, times=times)
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT,
                             stdout=subprocess.DEVNULL, timeout=300)
    assert process.returncode == -signal.SIGKILL
