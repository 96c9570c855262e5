"""Run the speed measurements of this folder one after the other and write bench/RESULTS.md.

    python bench/all.py            # ten minutes on two idle cores, with Linux
    python bench/all.py --quick    # tiny sizes, nothing is written: does everything run?

full_size.py, which takes hours, is run by --quick alone; what RESULTS.md has of it stays.

The exit code is 1 if a script failed. toy_table.py and baselines.py, the results of the methods,
are not part of it.
"""
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ["libraries", "training", "gpu"]
LIBRARIES = ["torch", "torchvision", "numpy", "open_clip_torch", "transformers", "scikit-learn"]


def main():
    if sys.argv[1:] not in ([], ["--quick"]):
        sys.exit(__doc__)
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    sections = [f"# Measurements\n\nWritten by `python bench/all.py`, {datetime.date.today()}.",
                f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}. "
                f"Python {platform.python_version()}, {versions}.",
                "A row compares in one process, taking turns; medians; equal results asserted. "
                "Ratio: how many times ours is faster, or needs less memory."]
    failed, results = False, FOLDER / "RESULTS.md"
    _, heading, kept = results.read_text(encoding="utf-8").partition("\n## `python bench/full_size")
    for script in SCRIPTS + ["full_size"] * ("--quick" in sys.argv):
        command = [sys.executable, FOLDER / f"{script}.py", *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # errors are shown
        output = done.stdout.strip()
        if done.returncode:
            output += f"\n\nFailed with exit code {done.returncode}."
            failed = True
        print(f"\n{script}.py\n{output}", flush=True)
        sections.append(f"## `python bench/{script}.py`\n\n{output}")
        if "--quick" not in sys.argv:  # each time: an interrupted run leaves what it has
            text = "\n\n".join(sections) + "\n" + heading + kept
            results.write_text(text, encoding="utf-8")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
