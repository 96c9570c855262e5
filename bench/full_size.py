"""Whole commands at the published counts, on stand-ins: seconds, and the memory of each process.

    python bench/full_size.py                # hours on two cores; 5 GB of disk, 24 GB of memory
    python bench/full_size.py openimages     # one of nuswide, coco, openimages
    python bench/full_size.py --quick        # a thousandth of the images: does everything run?

Label files are made up, in the published form; images are small JPEGs under hard links; CLIP is a
ViT of 16 patches and three narrow blocks, random. Pixels and activations, the real CLIP's, are the
part of the memory that is not measured here. Seconds are of these images and this CLIP: only those
until the first image is seen, "start", say something about real ones.
Memory is the peak of a process, pages that it shares included; "together" counts each page once, and
"shared memory" is the part of it in which the workers pass their batches (Docker has 64 MB).
Linux alone tells this.
"""
import argparse
import fcntl
import io
import json
import os
import pickle
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import numpy as np
import side_by_side
import torch

import clip_model
import data
from toy import world

SCRIPTS = Path(data.__file__).parent
COUNTS = {"nuswide": (161_789, 107_859), "coco": (82_783, 40_504), "openimages": (5_655_108, 125_436)}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
EPOCH = "--epochs 1 --prompt-epochs 1"
# {data: [(what is run, a step to be interrupted at, targets: seconds of the start, GiB of the first
# process, GiB of the others)]}
COMMANDS = {
    "nuswide": [
        (f"mkt.py {EPOCH} --output A", None, 10, 6, 6),
        ("mkt.py --epochs 0 --prompt-epochs 1 --augment no --limit 9000 --clip 224.pt --workers 8 "
         "--output B", None)],
    "coco": [
        ("lang_cls.py --sources templates --output C", None),
        ("trm_ml.py --partial 0.1 0.5 0.9 --image-size 64 --augment no --epochs 1 --output D", None)],
    "openimages": [
        (f"mkt.py {EPOCH} --output E", 300, None, 16, 2),
        (f"{TORCHRUN} mkt.py {EPOCH} --limit 9000 --output F", None, 15, 16, 2),
        ("mkt.py --eval F/best.pt --limit 999999", None, 15, 16, 2),
        (f"{TORCHRUN} mkt.py --eval F/best.pt --limit 999999", None, 15, 16, 2)]}


# ---- stand-ins

def write_images(paths):
    """JPEGs, all different in size until there are 10,000: then again the same, linked."""
    drawn = []
    for i in range(8):
        jpeg = io.BytesIO()
        world.scene("benchmark", 7, i).resize((64, 64)).save(jpeg, "JPEG")
        drawn.append(jpeg.getvalue())
    for folder in {os.path.dirname(path) for path in paths}:
        os.makedirs(folder, exist_ok=True)
    for i, path in enumerate(paths):
        if i < 10_000:
            Path(path).write_bytes(drawn[i % 8] + bytes(i))
        else:
            os.link(paths[i % 10_000], path)


def write_clip(path, side):
    """Weights of a tiny ViT for images of this many pixels, with the toy world's vocabulary."""
    merges = SCRIPTS / "toy/merges.txt.gz"
    data.write_file(path.with_name(merges.name), merges.read_bytes())
    clip = clip_model.CLIP(64, side, 3, 64, side // 4, 77, len(clip_model.Tokenizer(merges)),
                           64, 1, 1)
    data.write_file(path, clip.state_dict())


def write_nuswide(root, rng, train, test):
    total = train + test
    tags = [f"tag{i}" for i in range(1000)]
    concepts = tags[:75] + [f"concept{i}" for i in range(6)]
    data.write_file(root / "ConceptsList/Concepts81.txt", "\n".join(concepts))
    data.write_file(root / "NUS_WID_Tags/TagList1k.txt", "\n".join(tags))
    images = [f"{i % 700:03d}\\{i:07d}.jpg" for i in range(total)]
    for name, part in (("", images), ("Train", images[:train]), ("Test", images[train:])):
        data.write_file(root / f"ImageList/{name}Imagelist.txt", "\r\n".join(part))
    for concept in concepts:
        entries = np.where(rng.random(total) < 0.02, "1\n", "0\n")
        data.write_file(root / f"Groundtruth/AllLabels/Labels_{concept}.txt", "".join(entries))
    with open(root / "NUS_WID_Tags/AllTags1k.txt", "wb") as file:
        for _ in range(total):
            file.write(b"\t".join(np.where(rng.random(1000) < 0.006, b"1", b"0")) + b"\t\n")
    write_images([f"{root}/Flickr/{path.replace(chr(92), '/')}" for path in images])


def write_coco(root, rng, train, test):
    ids = [int(i) for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    categories = [{"id": i, "name": name} for i, name in zip(ids, data.COCO_LABELS)]
    for part, count in (("train2014", train), ("val2014", test)):
        images = [{"id": i, "file_name": f"COCO_{part}_{i:012d}.jpg"} for i in range(count)]
        boxes = [{"image_id": int(rng.integers(count)), "category_id": ids[int(rng.integers(80))],
                  "iscrowd": 0, "segmentation": [[123.45] * 80]} for _ in range(7 * count)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        data.write_file(root / f"annotations/instances_{part}.json", json.dumps(content))
        write_images([f"{root}/{part}/{image['file_name']}" for image in images])


def write_openimages(root, rng, train, test):
    ids = [f"/m/0{i:05d}" for i in range(7586)]
    names = "".join(f"{name},thing {i}\n" for i, name in enumerate(ids))
    lists = root / "2018_04"
    data.write_file(lists / "class-descriptions.csv", names)
    data.write_file(lists / "classes-trainable.txt", "\n".join(ids[:7186]))
    data.write_file(lists / "unseen_labels.pkl", pickle.dumps(ids[7186:]))
    data.write_file(lists / "top_400_unseen.csv", "\n".join(map(str, range(400))))
    # verified labels; the training split's are 27,894,289
    for split, count, labels, first in (("train", train, 4.9325, 0), ("test", test, 13, 10 ** 9)):
        extra = rng.integers(0, count, int(count * (labels - 1)))
        counts = 1 + np.bincount(extra, minlength=count)
        vocabulary = len(ids) if split == "test" else 7186
        with open(lists / f"{split}-annotations-human-imagelabels.csv", "w") as file:
            file.write("ImageID,Source,LabelName,Confidence\n")
            for image, count in enumerate(counts.tolist(), first):
                found = (vocabulary * rng.random(count) ** 3).astype(int).tolist()
                for label in found:  # few are common; half of them are present
                    file.write(f"{image:016x},verification,{ids[label]},{(image ^ label) % 2}\n")
        write_images([f"{root}/{split}/{first + i:016x}.jpg" for i in range(len(counts))])


# ---- measuring

def children_of(pid):
    """Process ids of a process and of all below it: [(depth, pid)], parents first."""
    found = [(0, pid)]
    for depth, parent in found:  # which grows meanwhile
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            found += [(depth + 1, int(child)) for child in file.read().split()]
    return found


def kilobytes(pid, file, field):
    text = Path(f"/proc/{pid}/{file}").read_text()
    return int((re.search(rf"^{field}:\s+(\d+)", text, re.M) or [0, 0])[1])


def watch(command, folder, last_step, interval):
    """Run a command -> seconds, {bar: [first seen, last seen, steps]}, {(depth, pid): peak bytes},
    the peaks of what all hold together and of shared memory. last_step: there it is
    interrupted."""
    terminal, ours = pty.openpty()  # progress bars say how far it is
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(SCRIPTS)}
    begin = time.time()
    process = subprocess.Popen([sys.executable, *command], stdout=ours, stderr=ours,
                               stdin=subprocess.DEVNULL, cwd=folder, env=environment)
    os.close(ours)
    bars, peaks, together, shared, text, due, is_interrupted = {}, {}, 0, 0, "", 0, False
    while True:
        new = ""
        if select.select([terminal], [], [], interval)[0]:
            try:
                new = os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # nobody writes any more
                break
            text = text[-5000:] + new
        now = time.time() - begin
        for name, step in re.findall(r"(\w[\w ]*): +\d+%\|[^|]*\| *(\d+)/", new):
            bars.setdefault(name, [now, now, 0])[1:] = now, int(step)
            if last_step and int(step) >= last_step and not is_interrupted:
                process.send_signal(signal.SIGINT)
                is_interrupted = True
        if now > due:
            due, pages, passed = now + interval, 0, 0
            for depth, pid in children_of(process.pid):
                try:
                    peaks[depth, pid] = 1024 * kilobytes(pid, "status", "VmHWM")
                    pages += 1024 * kilobytes(pid, "smaps_rollup", "Pss")
                    passed += 1024 * kilobytes(pid, "smaps_rollup", "Pss_Shmem")
                except OSError:  # it has ended
                    pass
            together, shared = max(together, pages), max(shared, passed)
    if process.wait() not in (0, 1 if is_interrupted else 0):
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    return time.time() - begin, bars, peaks, together, shared


def row(command, step, targets, measured):
    seconds, bars, peaks, together, shared = measured
    is_parallel = command.startswith(TORCHRUN)  # which stands above its processes
    first, *others = [peak for (depth, _), peak in sorted(peaks.items()) if depth == is_parallel]
    ranks, workers = (others, [peak for (depth, _), peak in peaks.items() if depth == 2]
                      ) if is_parallel else ([], others)
    memory = side_by_side.memory
    texts = [memory(first), *(f"rank 1 {memory(peak)}" for peak in ranks)]
    texts += [f"a worker {memory(max(workers))}"] if workers else []
    start = min(begun for begun, *_ in bars.values())
    spans = [f"{name} {last - begun:.0f} s, {count:,} steps"
             for name, (begun, last, count) in bars.items()]
    target, found = "", (start, first / 2 ** 30, max([*others, *workers], default=0) / 2 ** 30)
    if targets:
        seconds_of_start, one, each = targets
        target = f"start <= {seconds_of_start} s; " if seconds_of_start else ""
        target += f"<= {one} GiB, others <= {each} GiB"
        if any(limit and value > limit for value, limit in zip(found, targets)):
            target += ", **missed**"
    name = command.replace(TORCHRUN, "torchrun --nproc-per-node 2")
    print(f"| `{name}`{f', until step {step}' if step else ''} | {start:.0f} s | {seconds:.0f} s: "
          f"{'; '.join(spans)} | {', '.join(texts)} | {memory(together)} | {memory(shared)} "
          f"| {target} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="*", help=", ".join(COMMANDS))
    parser.add_argument("--quick", action="store_true", help="a thousandth of the images")
    parser.add_argument("--workers", default="2", help="of each process (2)")
    parser.add_argument("--folder", help="where the stand-ins stay, for the next call")
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| command | start | in all, of it | peak memory of a process | together | shared memory "
          "| target |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        write_clip(folder / "tiny.pt", 64)
        write_clip(folder / "224.pt", 224)
        for name in args.data or COMMANDS:
            root = folder / "data" / name
            if not root.exists():
                counts = [count // 1000 if args.quick else count for count in COUNTS[name]]
                globals()[f"write_{name}"](root, np.random.default_rng(0), *counts)
            for command, step, *targets in COMMANDS[name]:
                if args.quick:
                    step, command = step and 2, command.replace("--limit 9000", "--limit 128")
                before, script, options = re.split(r"(\w+\.py)", command)
                words = [*before.split(), str(SCRIPTS / script), "--data", name, "--device", "cpu",
                         "--clip", "tiny.pt", "--workers", args.workers, *options.split()]
                measured = watch(words, folder, step, 0.1 if args.quick else 2)
                row(command, step, targets, measured)


if __name__ == "__main__":
    main()
