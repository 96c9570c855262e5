"""Start-up of the large datasets: seconds and peak memory of load_dataset, labels alone.

    python bench/startup.py        # writes 1.1 GB to the temporary folder and removes it

Synthetic label files as large as NUS-WIDE's (269,648 images, 1,000 tags, 81 concepts) and Open
Images' (1,743,042 training images with 9 million verified labels, 125,436 test images with 1.7
million; 19,995 classes). Every start is a process of its own: the first one of a split parses the
files, the second one reads the cache. There are no image files: the search for missing ones is
left out. Peak memory includes Python with torch, which is printed first.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NUSWIDE = {"train": 161_789, "test": 107_859}
OPENIMAGES = {"train": (1_743_042, 9_000_000), "test": (125_436, 1_667_000)}


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # GiB, on Linux


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_nuswide(root, rng):
    total, tags = sum(NUSWIDE.values()), [f"tag{i}" for i in range(1000)]
    concepts = tags[:75] + [f"concept{i}" for i in range(6)]
    write(root / "ConceptsList/Concepts81.txt", "\r\n".join(concepts))
    write(root / "NUS_WID_Tags/TagList1k.txt", "\r\n".join(tags))
    images = [f"actor\\{i:07d}.jpg\r\n" for i in range(total)]
    write(root / "ImageList/Imagelist.txt", "".join(images))
    write(root / "ImageList/TrainImagelist.txt", "".join(images[:NUSWIDE["train"]]))
    write(root / "ImageList/TestImagelist.txt", "".join(images[NUSWIDE["train"]:]))
    for concept in concepts:
        lines = np.full((total, 3), ord("\n"), np.uint8)
        lines[:, 0], lines[:, 1] = ord("0") + (rng.random(total) < 0.02), ord("\r")
        write(root / f"Groundtruth/AllLabels/Labels_{concept}.txt", lines.tobytes())
    (root / "Flickr").mkdir()
    with open(root / "NUS_WID_Tags/AllTags1k.txt", "wb") as file:
        for start in range(0, total, 8192):
            lines = np.full((min(8192, total - start), 2002), ord("\t"), np.uint8)
            lines[:, 0:2000:2] = ord("0") + (rng.random((len(lines), 1000)) < 0.006)
            lines[:, 2000:] = list(b"\r\n")
            file.write(lines.tobytes())


def write_openimages(root, rng):
    ids = np.array([b"/m/0%05d" % i for i in range(19_995)])
    seen = np.sort(rng.permutation(len(ids))[:7_186])
    write(root / "class-descriptions.csv",
          "".join(f"{name.decode()},thing {i}\r\n" for i, name in enumerate(ids)))
    write(root / "classes-trainable.txt", b"\n".join(ids[seen]))
    write(root / "top_400_unseen.csv", "\ufeff" + "\r\n".join(map(str, range(400))))
    by_frequency = np.concatenate([rng.permutation(seen), np.setdiff1d(np.arange(len(ids)), seen)])
    for split, (images, rows) in OPENIMAGES.items():
        (root / split).mkdir()
        which = np.sort(np.concatenate([np.arange(images),
                                        rng.integers(0, images, rows - images)]))
        with open(root / f"{split}-annotations-human-imagelabels.csv", "wb") as file:
            file.write(b"ImageID,Source,LabelName,Confidence\n")
            for part in np.array_split(which, 20):
                # commoner classes first, as in nature
                label = by_frequency[(len(ids) * rng.random(len(part)) ** 3).astype(int)]
                lines = np.empty((len(part), 42), np.uint8)
                digits = part[:, None] >> (4 * np.arange(15, -1, -1)) & 15
                lines[:, :16] = np.frombuffer(b"0123456789abcdef", np.uint8)[digits]
                lines[:, 16:30] = list(b",verification,")
                lines[:, 30:39] = ids[label].view(np.uint8).reshape(-1, 9)
                lines[:, 39] = ord(",")
                lines[:, 40] = ord("0") + (rng.random(len(part)) < 0.5)
                lines[:, 41] = ord("\n")
                file.write(lines.tobytes())


def load(name, split, root):
    sys.path.insert(0, str(ROOT))
    import data
    data.MultiLabelDataset._leave_out_missing = lambda *_: None
    before, begin = peak_memory(), time.perf_counter()
    dataset = data.load_dataset(name, root, split, quiet=True)
    seconds, peak = time.perf_counter() - begin, peak_memory()
    present = (dataset.targets[:, dataset.seen] == 1).any(dim=1)  # what mkt.py starts with
    print(f"{len(dataset):,} images x {len(dataset.labels):,} labels: {seconds:.1f} s, peak "
          f"{peak:.2f} GiB (before: {before:.2f}), images with a seen label "
          f"{int(present.sum()):,}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--load", nargs=3, metavar=("NAME", "SPLIT", "ROOT"),
                        help="what the script calls itself with")
    arguments = parser.parse_args()
    if arguments.load:
        load(*arguments.load)
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        for name, writer in (("nuswide", write_nuswide), ("openimages", write_openimages)):
            writer(Path(folder, name), np.random.default_rng(0))
            for split in ("train", "test"):
                for start in ("first", "second"):
                    print(f"{name} {split}, {start} start: ", end="", flush=True)
                    subprocess.run([sys.executable, __file__, "--load", name, split,
                                    f"{folder}/{name}"], env=environment, check=True)
