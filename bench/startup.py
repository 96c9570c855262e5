"""Start-up of the large datasets: seconds and peak memory of load_dataset, labels alone.

    python bench/startup.py        # two minutes; 1.1 GB in the temporary folder, removed again

Synthetic label files as large as NUS-WIDE's (269,648 images, 1,000 tags, 81 concepts) and Open
Images' (1,743,042 training images with 9 million verified labels, 125,436 test images with 1.7
million; 19,995 classes). Every start is a process of its own: the first one of a split parses the
files, the second one reads the cache. There are no image files: the search for missing ones is
left out. Memory is the peak beyond Python with torch and data.py.
"""
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import side_by_side
from side_by_side import duration, memory, row

import data

NUSWIDE = {"train": 161_789, "test": 107_859}
OPENIMAGES = {"train": (1_743_042, 9_000_000), "test": (125_436, 1_667_000)}


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
    """-> images, labels, seconds, peak memory in bytes."""
    data.MultiLabelDataset._leave_out_missing = lambda *_: None
    sizes, begin = [], time.perf_counter()

    def begin_with_labels():
        dataset = data.load_dataset(name, root, split, quiet=True)
        sizes.extend((len(dataset), len(dataset.labels), time.perf_counter() - begin))
        if split == "train":
            (dataset.targets[:, dataset.seen] == 1).any(dim=1)  # what mkt.py starts with

    peak = side_by_side.peak_beyond(begin_with_labels)
    return *sizes, peak


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--load", nargs=3, metavar=("NAME", "SPLIT", "ROOT"),
                        help="what the script calls itself with")
    args = parser.parse_args()
    if args.load:
        return print(*load(*args.load))

    def in_new_process(*arguments):
        return side_by_side.in_new_process(__file__, "--load", *arguments)

    start = load if args.quick else in_new_process  # a process takes seconds to begin with
    if args.quick:
        NUSWIDE.update(train=300, test=200)
        OPENIMAGES.update(train=(300, 2000), test=(200, 1000))
    side_by_side.start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for name, writer in (("nuswide", write_nuswide), ("openimages", write_openimages)):
            writer(Path(folder, name), np.random.default_rng(0))
            for split in ("train", "test"):
                first, second = (start(name, split, f"{folder}/{name}") for _ in range(2))
                images, labels, seconds, peak = second
                work = f"{name} {split}, {images:,.0f} x {labels:,.0f}"
                row(f"{work}, start", "the first start", duration(first[2]), duration(seconds),
                    first[2] / seconds)
                row(f"{work}, peak memory", "the first start", memory(first[3]), memory(peak),
                    first[3] / max(1, peak))


if __name__ == "__main__":
    main()
