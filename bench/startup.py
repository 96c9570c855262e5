"""Start-up of the large datasets: time and peak memory of load_dataset, labels alone.

    python bench/startup.py           # a few minutes
    python bench/startup.py --full    # Open Images at its real size: five minutes, 50 GB of disk
    python bench/startup.py --quick

Made-up label files of the training splits, in the temporary folder: NUS-WIDE's 161,789 of 269,648
images, 1,000 tags and 81 concepts; Open Images' 5,655,108 images, 27,894,289 verified labels and
7,586 classes, a tenth of the images and labels without --full. There are no image files: the
search for missing ones is left out. Memory is the peak beyond Python with torch and data.py.
"""
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import side_by_side

import data


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_nuswide(root, rng, total, train):
    tags = [f"tag{i}" for i in range(1000)]
    concepts = tags[:75] + [f"concept{i}" for i in range(6)]
    write(root / "ConceptsList/Concepts81.txt", "\n".join(concepts))
    write(root / "NUS_WID_Tags/TagList1k.txt", "\n".join(tags))
    images = [f"actor\\{i:07d}.jpg\n" for i in range(total)]
    write(root / "ImageList/Imagelist.txt", "".join(images))
    write(root / "ImageList/TrainImagelist.txt", "".join(images[:train]))
    for concept in concepts:
        entries = np.where(rng.random(total) < 0.02, "1", "0")
        write(root / f"Groundtruth/AllLabels/Labels_{concept}.txt", "\n".join(entries) + "\n")
    with open(root / "NUS_WID_Tags/AllTags1k.txt", "wb") as file:
        for start in range(0, total, 8192):
            lines = np.full((min(8192, total - start), 2001), ord("\t"), np.uint8)
            lines[:, 0:2000:2] = ord("0") + (rng.random((len(lines), 1000)) < 0.006)
            lines[:, 2000] = ord("\n")
            file.write(lines.tobytes())
    (root / "Flickr").mkdir()


def write_openimages(root, rng, images, labels):
    ids = [f"/m/0{i:05d}" for i in range(7586)]
    lists = root / "2018_04"
    write(lists / "class-descriptions.csv",
          "".join(f"{name},thing {i}\n" for i, name in enumerate(ids)))
    write(lists / "classes-trainable.txt", "\n".join(ids[:7186]))
    write(lists / "unseen_labels.pkl", pickle.dumps(np.array(ids[7186:], dtype=object), 2))
    write(lists / "top_400_unseen.csv", "\n".join(map(str, range(400))))
    (root / "train").mkdir()
    extra = rng.integers(0, images, labels - images)
    counts = 1 + np.bincount(extra, minlength=images)  # verified labels of each image
    with open(lists / "train-annotations-human-imagelabels.csv", "w") as file:
        file.write("ImageID,Source,LabelName,Confidence\n")
        for image, count in enumerate(counts.tolist()):
            for label in (7186 * rng.random(count) ** 3).astype(int).tolist():  # few common ones
                file.write(f"{image:016x},verification,{ids[label]},{label % 2}\n")


def load(name, root):
    """-> (images, labels, seconds, peak memory in bytes)."""
    data.MultiLabelDataset._leave_out_missing = lambda *_: None
    sizes, seconds = [], []

    def start():
        dataset = data.load_dataset(name, root, "train")
        sizes.extend((len(dataset), len(dataset.labels)))

    peak = side_by_side.peak_beyond(lambda: seconds.append(side_by_side.seconds_of(start)))
    return *sizes, *seconds, peak


def main():
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="Open Images at its real size")
    parser.add_argument("--load", nargs=2, help="what the script calls itself with")
    args = parser.parse_args()
    if args.load:
        return print(*load(*args.load))
    nuswide, openimages = (269_648, 161_789), (565_510, 2_789_428)
    share = "a tenth of the real size (--full: all of it), "
    if args.full:
        openimages, share = (5_655_108, 27_894_289), ""
    if args.quick:
        nuswide, openimages, share = (500, 300), (300, 1000), ""
    side_by_side.start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for name, write_files, sizes, size in (("nuswide", write_nuswide, nuswide, ""),
                                               ("openimages", write_openimages, openimages, share)):
            write_files(Path(folder, name), np.random.default_rng(0), *sizes)
            first, second = (side_by_side.in_new_process(__file__, "--load", name,
                                                         f"{folder}/{name}") for _ in range(2))
            images, labels, seconds, peak = second
            work = f"{name} training, {size}{images:,.0f} x {labels:,.0f}: start"
            side_by_side.row(work, "the first start", side_by_side.duration(first[2]),
                             side_by_side.duration(seconds), first[2] / seconds)
            side_by_side.row(f"{work}, peak memory", "the first start",
                             side_by_side.memory(first[3]), side_by_side.memory(peak),
                             first[3] / max(1, peak))


if __name__ == "__main__":
    main()
