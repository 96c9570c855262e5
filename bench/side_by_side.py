"""What the scripts of this folder share: clock, peak memory, one row of a table after another."""
import argparse
import ctypes
import gc
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parser(description):
    """With the flag of every script."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    return parser


def start(device="cpu"):
    """Print what the figures belong to and the head of the table."""
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n\n"
          f"| work | against | theirs | ours | ratio | target |\n|---|---|---|---|---|---|",
          flush=True)


def row(work, against, theirs, ours, ratio, target=""):
    """ratio: how many times ours is better, held against a target "> x" or ">= x", if any."""
    if target and round(ratio, 2) < float(target.split()[1]):
        target += ", **missed**"
    print(f"| {work} | {against} | {theirs} | {ours} | {ratio:.2f} | {target} |", flush=True)


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def memory(size):
    """Bytes -> text."""
    return f"{size / 2 ** 30:.2f} GiB" if size >= 2 ** 30 else f"{size / 2 ** 20:.1f} MiB"


def seconds_of(function, device="cpu"):
    begin = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(functions, repeats, device="cpu", warm_up=True):
    """Call functions {name: function} in turn -> {name: median of the seconds}."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + warm_up):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, device))
    return {name: statistics.median(values[warm_up:]) for name, values in seconds.items()}


def compare(work, against, theirs, ours, repeats, target="", device="cpu", warm_up=True):
    """A row of the table: two functions, medians of their times."""
    seconds = alternate({"theirs": theirs, "ours": ours}, repeats, device, warm_up)
    row(work, against, duration(seconds["theirs"]), duration(seconds["ours"]),
        seconds["theirs"] / seconds["ours"], target)


def resident(field):
    """VmRSS, the process's memory now, or VmHWM, its peak, in bytes; Linux alone has them."""
    # not getrusage: its peak begins with the memory of the process that started this one
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])


def peak_beyond(function, device="cpu"):
    """Bytes that a function needs at its peak beyond what is there before it; on the CPU of
    another system than Linux it is called, and the result is NaN."""
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        function()
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, but kept for later, would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def in_new_process(script, *arguments):
    """The numbers in the last line that a script prints when it is run with these arguments."""
    command = [sys.executable, script, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [float(number) for number in output.splitlines()[-1].split()]


def compare_memory(work, against, theirs, ours, target="", device="cpu"):
    """A row of the table: the peak memory of two functions."""
    theirs, ours = (peak_beyond(function, device) for function in (theirs, ours))
    row(f"{work}, peak memory", against, memory(theirs), memory(ours), theirs / max(1, ours),
        target)


def random_clip(embed_dim=512, layers=12, width=768, patch=16, text_width=512, text_layers=12,
                resolution=224):
    """A CLIP with random weights, a ViT-B/16 by default, and the toy world's tokenizer."""
    import clip_model
    model = clip_model.CLIP(embed_dim, resolution, layers, width, patch, 77, 49408, text_width,
                            text_width // 64, text_layers)
    model.tokenizer = clip_model.load("toy")[0].tokenizer
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays zero: equality is to mean something
            parameter += 0.01 * torch.randn_like(parameter)
    return model.eval()
