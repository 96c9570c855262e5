"""Whole commands at the published counts, on stand-ins: seconds, and the memory of each process.

    python bench/full_size.py                # hours on two cores; 5 GB of disk, 24 GB of memory
    python bench/full_size.py openimages     # one of nuswide, coco, openimages
    python bench/full_size.py --quick        # a thousandth of the images: does everything run?

Label files are made up, in the published form; images are small JPEGs under hard links; CLIP is a
random ViT of 16 patches and three narrow blocks, for images of 64 pixels or (224.pt) of 224. So
seconds say something of real runs only until the first image is asked for, "start" (in brackets
the processor's, of all processes); and a real CLIP's weights and activations come to the memory.
Memory is the peak of a process, with pages that it shares; "together" counts each page once, and
"shared memory" is the part by which workers pass batches (Docker has 64 MB). Linux alone tells.
"""
import argparse
import contextlib
import fcntl
import io
import json
import os
import pickle
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import side_by_side
import torch

import clip_model
import data
from toy import world

SCRIPTS = Path(data.__file__).parent
COUNTS = {"nuswide": (161_789, 107_859), "coco": (82_783, 40_504),
          "openimages": (5_655_108, 125_436)}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
BARS = "embedding|stage|epoch|scoring"  # of what looks at images, and of texts
EPOCH = "--epochs 1 --prompt-epochs 1"
# {data: [(what is run; a step to be interrupted at, 0: --until's alone; targets: seconds of the
# start, GiB of the first process, GiB of each other one)]}
COMMANDS = {
    "nuswide": [
        (f"mkt.py {EPOCH} --output A", 0, 10, 6, 6),
        ("mkt.py --epochs 0 --prompt-epochs 1 --augment no --limit 9000 --clip 224.pt --workers 8 "
         "--output B", None)],
    "coco": [
        ("lang_cls.py --sources templates --output C", None),
        ("trm_ml.py --partial 0.1 0.5 0.9 --image-size 64 --augment no --epochs 1 --output D",
         None)],
    "openimages": [
        (f"mkt.py {EPOCH} --output E", 300, None, 16, 2),
        (f"{TORCHRUN} mkt.py {EPOCH} --limit 9000 --output F", None, 15, 16, 2),
        ("mkt.py --eval F/best.pt --limit 999999", None, 15, 16, 2),
        (f"{TORCHRUN} mkt.py --eval F/best.pt --limit 999999", None, 15, 16, 2)]}


# ---- stand-ins

def write_images(paths):
    """10,000 JPEGs of different sizes, as photos have; the others are links to them."""
    drawn = []
    for i in range(8):
        jpeg = io.BytesIO()
        world.scene("benchmark", 7, i).resize((64, 64)).save(jpeg, "JPEG")
        drawn.append(jpeg.getvalue())
    for folder in {os.path.dirname(path) for path in paths}:
        os.makedirs(folder, exist_ok=True)
    for i, path in enumerate(paths):
        if i < 10_000:
            Path(path).write_bytes(drawn[i % 8].ljust(4000 + i, b"\0"))
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
    # verified labels, on average of an image; of the training split they are 27,894,289
    for split, count, labels, first in (("train", train, 4.9325, 0), ("test", test, 13, 10 ** 9)):
        vocabulary = len(ids) if split == "test" else 7186
        names = [f"{image:016x}" for image in range(first, first + count)]
        with open(lists / f"{split}-annotations-human-imagelabels.csv", "w") as file:
            file.write("ImageID,Source,LabelName,Confidence\n")
            for part in range(0, count, 100_000):
                images = [name for name, times in zip(names[part:part + 100_000], rng.poisson(
                    labels - 1, 100_000).tolist()) for _ in range(1 + times)]
                columns = vocabulary * rng.random(len(images)) ** 3  # few labels are common
                present = rng.integers(2, size=len(images))
                lines = zip(images, columns.astype(int).tolist(), present.tolist())
                file.writelines(f"{image},verification,{ids[column]},{present}\n"
                                for image, column, present in lines)
        write_images([f"{root}/{split}/{name}.jpg" for name in names])


# ---- measuring

def tree_of(pid):
    """A process and all below it: [(depth, pid)], parents first."""
    found = [(0, pid)]
    for depth, parent in found:  # which grows meanwhile
        with contextlib.suppress(OSError):  # it has ended
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
            found += [(depth + 1, int(child)) for child in children.split()]
    return found


def seconds_of_cpu(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid, file, field):
    """Bytes, as a file of Linux's in /proc says."""
    text = Path(f"/proc/{pid}/{file}").read_text()
    return 1024 * int((re.search(rf"^{field}:\s+(\d+)", text, re.M) or [0, 0])[1])


@dataclass
class Measured:
    seconds: float = 0
    cpu: float = 0  # seconds of all processes until the first image
    bars: dict = field(default_factory=dict)  # {what: [first seen, last seen, steps]}
    peaks: dict = field(default_factory=dict)  # {(depth, pid): bytes}
    together: int = 0  # bytes, at the peak
    shared: int = 0


def watch(command, folder, last_step, interval):
    """Run a command, which is interrupted at last_step, if given -> Measured."""
    terminal, ours = pty.openpty()  # where there is one, progress bars say how far it is
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(SCRIPTS)}
    found, begin, text, due, is_interrupted = Measured(), time.time(), "", 0, False
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=ours, stderr=ours, cwd=folder,
        env=environment,  # and what is in the background would ignore an interrupt
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    os.close(ours)
    while True:
        new = ""
        if select.select([terminal], [], [], interval)[0]:
            try:
                new = os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # nobody writes any more
                break
            text = text[-5000:] + new
        found.seconds = time.time() - begin
        tree = tree_of(process.pid)
        for name, step in re.findall(rf"((?:{BARS})[\w ]*): +\d+%\|[^|]*\| *(\d+)/", new):
            found.cpu = found.cpu or sum(seconds_of_cpu(pid) for _, pid in tree)
            times = found.bars.setdefault(name, [found.seconds, 0, 0])
            times[1:] = found.seconds, int(step)
            if last_step and int(step) >= last_step and not is_interrupted:
                process.send_signal(signal.SIGINT)
                is_interrupted = True
        if found.seconds < due:
            continue
        due, together, shared = found.seconds + interval, 0, 0
        for depth, pid in tree:
            with contextlib.suppress(OSError):
                peak = memory_of(pid, "status", "VmHWM")  # 0 as it ends
                found.peaks[depth, pid] = max(peak, found.peaks.get((depth, pid), 0))
                together += memory_of(pid, "smaps_rollup", "Pss")
                shared += memory_of(pid, "smaps_rollup", "Pss_Shmem")
        found.together, found.shared = max(found.together, together), max(found.shared, shared)
    if process.wait() != is_interrupted:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    return found


def row(command, step, targets, found):
    is_parallel = command.startswith(TORCHRUN)  # which stands above its processes
    first, *others = [peak for (depth, _), peak in sorted(found.peaks.items())
                      if depth == is_parallel]
    workers = [peak for (depth, _), peak in found.peaks.items() if depth > is_parallel]
    memory = side_by_side.memory
    peaks = [memory(first)]
    if is_parallel:
        peaks.append(f"rank 1 {memory(others[0])}")
    if workers:
        peaks.append(f"a worker {memory(max(workers))}")
    start = min(begun for begun, *_ in found.bars.values())
    spans = [f"{name} {last - begun:.0f} s, {count:,} steps"
             for name, (begun, last, count) in found.bars.items()]
    values = start, first / 2 ** 30, max([*others, *workers], default=0) / 2 ** 30
    names = ("start <=", "s"), ("memory <=", "GiB"), ("the others' <=", "GiB")
    target = [f"{what} {limit} {unit}{', **missed**' if value > limit else ''}"
              for (what, unit), value, limit in zip(names, values, targets) if limit]
    name = command.replace(TORCHRUN, "torchrun --nproc-per-node 2")
    print(f"| `{name}`{f', until step {step}' if step else ''} | {start:.0f} s ({found.cpu:.0f} s) "
          f"| {found.seconds:.0f} s: {'; '.join(spans)} | {', '.join(peaks)} "
          f"| {memory(found.together)} | {memory(found.shared)} | {'; '.join(target)} |",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="*", help=", ".join(COMMANDS))
    parser.add_argument("--quick", action="store_true", help="a thousandth of the images")
    parser.add_argument("--workers", default="2", help="of each process (2)")
    parser.add_argument("--folder", help="where the stand-ins stay, for the next call")
    parser.add_argument("--until", type=int, help="interrupt whole epochs at this step")
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| command | start (processor) | in all, of it | peak memory of a process | together "
          "| shared memory | target |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        write_clip(folder / "tiny.pt", 64)
        write_clip(folder / "224.pt", 224)
        if not {*args.data} <= COMMANDS.keys():
            parser.error(f"data: {', '.join(COMMANDS)}")
        for name in args.data or COMMANDS:
            root = folder / "data" / name
            if not root.exists():
                counts = [count // 1000 if args.quick else count for count in COUNTS[name]]
                globals()[f"write_{name}"](root, np.random.default_rng(0), *counts)
            for command, step, *targets in COMMANDS[name]:
                if args.until and step is not None:
                    step = args.until
                if args.quick:
                    step, command = step and 2, command.replace("--limit 9000", "--limit 128")
                before, script, options = re.split(r"(\w+\.py)", command)
                if "--output" in options:  # of an earlier call
                    shutil.rmtree(folder / options.split()[-1], ignore_errors=True)
                words = [*before.split(), str(SCRIPTS / script), "--data", name, "--device", "cpu",
                         "--clip", "tiny.pt", "--workers", args.workers, *options.split()]
                measured = watch(words, folder, step, 0.1 if args.quick else 2)
                row(command, step, [] if args.quick else targets, measured)


if __name__ == "__main__":
    main()
