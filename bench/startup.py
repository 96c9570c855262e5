"""Start-up of the large datasets: time and peak memory of load_dataset, labels alone.

    python bench/startup.py           # a few minutes, Open Images at a tenth of its size
    python bench/startup.py --full    # at its real size: three minutes, 50 GB of disk
    python bench/startup.py --quick

Made-up label files of the training splits, in the temporary folder; there are no image files, and
what looks at them is left out. Memory is the peak beyond Python with torch and data.py.
"""
import os
import pickle
import tempfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import side_by_side

import data


def write_nuswide(root, rng, total, train):
    tags = [f"tag{i}" for i in range(1000)]
    concepts = tags[:75] + [f"concept{i}" for i in range(6)]
    data.write_file(root / "ConceptsList/Concepts81.txt", "\n".join(concepts))
    data.write_file(root / "NUS_WID_Tags/TagList1k.txt", "\n".join(tags))
    images = [f"actor\\{i:07d}.jpg\n" for i in range(total)]
    data.write_file(root / "ImageList/Imagelist.txt", "".join(images))
    data.write_file(root / "ImageList/TrainImagelist.txt", "".join(images[:train]))
    for concept in concepts:
        entries = np.where(rng.random(total) < 0.02, "1\n", "0\n")
        data.write_file(root / f"Groundtruth/AllLabels/Labels_{concept}.txt", "".join(entries))
    with open(root / "NUS_WID_Tags/AllTags1k.txt", "wb") as file:
        for _ in range(total):
            file.write(b"\t".join(np.where(rng.random(1000) < 0.006, b"1", b"0")) + b"\t\n")
    (root / "Flickr").mkdir()


def write_openimages(root, rng, images, labels):
    ids = [f"/m/0{i:05d}" for i in range(7586)]
    names = "".join(f"{name},thing {i}\n" for i, name in enumerate(ids))
    lists = root / "2018_04"
    data.write_file(lists / "class-descriptions.csv", names)
    data.write_file(lists / "classes-trainable.txt", "\n".join(ids[:7186]))
    data.write_file(lists / "unseen_labels.pkl", pickle.dumps(ids[7186:]))
    data.write_file(lists / "top_400_unseen.csv", "\n".join(map(str, range(400))))
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
    data.MultiLabelDataset._leave_out_missing = data._note_placeholders = lambda *_: None
    found = []

    def start():
        dataset = data.load_dataset(name, root, "train")
        found.extend((len(dataset), len(dataset.labels)))

    peak = side_by_side.peak_beyond(lambda: found.append(side_by_side.seconds_of(start)))
    return *found, peak


def main():
    args = side_by_side.start(__doc__, "--full")
    nuswide = (269_648, 161_789)
    openimages = (5_655_108, 27_894_289) if args.full else (565_510, 2_789_428)
    if args.quick:
        nuswide, openimages = (500, 300), (300, 1000)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for name, write, sizes in (("nuswide", write_nuswide, nuswide),
                                   ("openimages", write_openimages, openimages)):
            root = Path(folder, name)
            write(root, np.random.default_rng(0), *sizes)
            starts = []
            for _ in range(2):
                with get_context("spawn").Pool(1) as new_process:
                    starts.append(new_process.apply(load, (name, root)))
            (*_, first_seconds, first_peak), (images, labels, seconds, peak) = starts
            work = f"{name} training, {images:,} x {labels:,}: start"
            side_by_side.row(work, "the first start", first_seconds, seconds)
            side_by_side.row(f"{work}, peak memory", "the first start", first_peak, peak,
                             text=side_by_side.memory)


if __name__ == "__main__":
    main()
