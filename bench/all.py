"""Run the comparisons of this folder one after the other and write bench/RESULTS.md.

    python bench/all.py                             # a quarter of an hour on two cores
    python bench/all.py --quick --output quick.md   # tiny sizes: does everything run?

A script that fails, or lacks a library, is reported in its place, and the exit code is 1 if one
failed. toy_table.py, the results of the methods, is not part of it.
"""
import argparse
import datetime
import importlib.metadata
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ["mean_average_precision", "growth", "mkt_steps", "lang_cls_training", "trm_steps",
           "clip_towers", "text", "images", "startup", "gpu"]
LIBRARIES = ["torch", "torchvision", "numpy", "pillow", "open_clip_torch", "transformers",
             "scikit-learn"]


def machine():
    """CPU, cores and GPU, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
               platform.processor() or platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}"


def version(library):
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{library} not installed"


def run(script, arguments):
    """-> (exit code, lines that it printed), printed as they come."""
    command = [sys.executable, "-u", FOLDER / f"{script}.py", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, lines


def section(script, arguments, code, lines):
    """What RESULTS.md says of a script: what it printed, or why there is nothing."""
    lines = [line for line in lines if line]
    if code and lines and "No module named" in lines[-1]:
        blocks = [f"Left out: {lines[-1].partition(': ')[2]}."]
    elif code:
        blocks = [f"Failed with exit code {code}:", "\n".join(f"    {x}" for x in lines[-5:])]
    else:
        blocks = ["\n".join(block) for _, block in itertools.groupby(
            lines, key=lambda line: line.startswith("|"))]  # tables apart from text
    return "\n\n".join([f"## `python {' '.join([f'bench/{script}.py', *arguments])}`", *blocks])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--output", help="default: bench/RESULTS.md, for a complete run alone")
    args = parser.parse_args()
    if args.output is None:
        if args.quick or args.scripts != SCRIPTS:
            parser.error("--quick and --scripts need --output: RESULTS.md is of a complete run")
        args.output = FOLDER / "RESULTS.md"
    arguments = ["--quick"] * args.quick
    head = (f"# Measurements\n\nWritten by `python bench/all.py`, {datetime.date.today()}.\n\n"
            f"{'Tiny sizes: the ratios mean nothing. ' * args.quick}"
            f"Machine: {machine()}. Python {platform.python_version()}, "
            f"{', '.join(map(version, LIBRARIES))}.\n\n"
            f"A row compares in one process, taking turns (what loads: a process each); medians; "
            f"equal results asserted. Ratio: how many times ours is faster, or needs less memory. "
            f"A target that was not reached is marked: **missed**.")
    sections, failed = [], False
    for script in args.scripts:
        print(f"\n{script}.py", flush=True)
        code, lines = run(script, arguments)
        sections.append(section(script, arguments, code, lines))
        failed |= "\n\nFailed with exit code" in sections[-1]
        # after every script: an interrupted run leaves what it has
        Path(args.output).write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
