"""What the scripts of this folder share: clock, peak memory, one row of a table after another."""
import argparse
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model  # noqa: E402


def start(description, *flags, device="cpu"):
    """Parse --quick and other flags; print what the figures belong to and the table's head."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--quick", *flags):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n\n"
          f"| work | against | theirs | ours | ratio | target |\n|---|---|---|---|---|---|",
          flush=True)
    return args


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def memory(size):
    return f"{size / 2 ** 30:.2f} GiB" if size >= 2 ** 30 else f"{size / 2 ** 20:.1f} MiB"


def row(work, against, theirs, ours, target="", text=duration):
    """theirs, ours: seconds, or bytes with text=memory; their ratio is held against a target
    "> x" or ">= x", if any."""
    ratio = theirs / ours
    if "--quick" in sys.argv:
        target = "not of this size"
    elif target:
        sign, least = target.split()
        if round(ratio, 2) < float(least) or sign == ">" and ratio <= float(least):
            target += ", **missed**"
    print(f"| {work} | {against} | {text(theirs)} | {text(ours)} | {ratio:.2f} | {target} |",
          flush=True)


def seconds_of(function, device="cpu"):
    begin = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(functions, repeats, device="cpu"):
    """Call the functions in turn, after a first call elsewhere -> the median seconds of each."""
    rounds = [[seconds_of(function, device) for function in functions] for _ in range(repeats)]
    return [statistics.median(seconds) for seconds in zip(*rounds)]


def resident(field):
    """VmRSS, the process's memory now, or VmHWM, its peak, in bytes; Linux alone has them."""
    # not getrusage: its peak begins with the memory of the process that started this one
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def peak_beyond(function, device="cpu"):
    """Bytes that a function needs at its peak beyond what is there before it."""
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, but kept for later, would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    function()
    return max(1, resident("VmHWM") - before)  # a ratio is taken of it


def random_clip(quick, layers=12, width=768, patch=16, embed_dim=512, text_layers=12):
    """A CLIP with random weights, a ViT-B/16 by default, and the toy world's tokenizer; if quick,
    of few layers."""
    if quick:
        layers, text_layers = 3 if patch else (1, 1, 1, 1), 2
    model = clip_model.CLIP(embed_dim, 224, layers, width, patch, 77, 49408, 512, 8, text_layers)
    model.tokenizer = clip_model.load("toy")[0].tokenizer
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays zero: equality is to mean something
            parameter += 0.01 * torch.randn_like(parameter)
    return model.eval()
