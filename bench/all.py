"""Run the speed measurements of this folder one after the other and write bench/RESULTS.md.

    python bench/all.py            # half an hour on two idle cores
    python bench/all.py --quick    # tiny sizes, nothing is written: does everything run?

The exit code is 1 if a script failed. toy_table.py and baselines.py, the results of the methods,
are not part of it.
"""
import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ["clip_towers", "mkt_steps", "mean_average_precision", "trm_steps", "lang_cls_training",
           "startup", "gpu"]
LIBRARIES = ["torch", "torchvision", "numpy", "open_clip_torch", "transformers", "scikit-learn"]


def machine():
    """CPU, cores and GPU, in one line."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(": ")[2]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--full", action="store_true", help="startup.py at the real size too")
    args = parser.parse_args()
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    sections = [f"# Measurements\n\nWritten by `python bench/all.py`, {datetime.date.today()}.",
                f"{machine()}. Python {platform.python_version()}, {versions}.",
                "A row compares in one process, taking turns; medians; equal results asserted. "
                "Ratio: how many times ours is faster, or needs less memory."]
    failed = False
    for script in SCRIPTS:
        command = [sys.executable, FOLDER / f"{script}.py"]
        if args.quick:
            command.append("--quick")
        if args.full and script == "startup":
            command.append("--full")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # errors are shown
        output = done.stdout.strip()
        if done.returncode:
            output += f"\n\nFailed with exit code {done.returncode}."
            failed = True
        print(f"\n{script}.py\n{output}", flush=True)
        sections.append(f"## `python bench/{script}.py`\n\n{output}")
        if not args.quick:  # after every script: an interrupted run leaves what it has
            (FOLDER / "RESULTS.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
