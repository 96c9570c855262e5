"""The README's results on the toy world: every method and ablation, over seeds, as tables.

    python bench/toy_table.py                      # all of it, 75 minutes on two cores
    python bench/toy_table.py --methods trm_ml     # one method
    python bench/toy_table.py --seeds 0 --jobs 1   # one seed, a run at a time

Every run is a subprocess with one thread. Its results.json stays in --output, and what is there
is not run again: an interrupted call goes on, and more seeds can be added. It stops at a kept run
whose args.json, where it has one, holds other settings than a run of today has, or whose zero-shot
rows, which no option changes, are not the others': another world, CLIP or metrics. What else has
changed in the code it can't see; the dates of the runs stand above the table.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BEST = "best zero-shot"  # the row of that kind with the highest mAP
SETTINGS = {"10%": "--partial 0.1", "30%": "--partial 0.3", "50%": "--partial 0.5",
            "single positive": "--single-positive"}
# title of a line -> (arguments of the run, name of the row)
MKT = {
    "best zero-shot CLIP": ("", BEST),
    "**MKT**": ("", "MKT"),
    "without prompt tuning": ("", "MKT without prompt tuning"),
    "without distillation, `--distillation 0`": ("--distillation 0", "MKT"),
    "global stream alone, `--streams global`": ("--streams global", "MKT"),
    "local stream alone, `--streams local`": ("--streams local", "MKT"),
}
COMC = {
    "best zero-shot CLIP": ("", BEST),
    "**CoMC**": ("", "CoMC"),
    "without mapping": ("", "CoMC without mapping"),
    "mapping weight 0.1, `--mapping-weight 0.1`": ("--mapping-weight 0.1", "CoMC"),
    "mapping weight 0.5, `--mapping-weight 0.5`": ("--mapping-weight 0.5", "CoMC"),
    "global stream alone": ("", "CoMC, global alone"),
    "local stream alone": ("", "CoMC, local alone"),
    "local stream alone, without mapping": ("--streams local --mapping-weight 0", "CoMC"),
    "global stream alone, without mapping": ("--streams global --mapping-weight 0", "CoMC"),
    "without noise, `--noise 0`": ("--noise 0", "CoMC"),
    "sentences alone, `--sources sentences`": ("--sources sentences", "CoMC"),
    "templates alone, `--sources templates`": ("--sources templates", "CoMC"),
    "4,000 sentences, `--sentences 4000`": ("--sentences 4000", "CoMC"),
}
TRM = {
    "best zero-shot CLIP": ("{}", BEST),
    "text-image matching": ("{}", "text-image matching"),
    "text-pixel matching": ("{}", "text-pixel matching"),
    "**TRM-ML**": ("{}", "TRM-ML"),
    "without prototypes, `--pseudo 0`": ("{} --matching region --pseudo 0", "TRM-ML"),
    "without contrastive loss, `--contrastive 0`": (
        "{} --matching region --contrastive 0", "TRM-ML"),
    "without distillation, `--distillation 0`": (
        "{} --matching region --distillation 0", "TRM-ML"),
    "all labels known, `--partial 1`": ("--partial 1 --matching region", "TRM-ML"),
}
# method -> (lines, {column: (what fills {}, metric)})
TABLES = {
    "mkt": (MKT, {"ZSL mAP": ("", "zsl_mAP"), "ZSL F1@3": ("", "zsl_F1@3"),
                  "GZSL mAP": ("", "gzsl_mAP"), "GZSL F1@3": ("", "gzsl_F1@3")}),
    "lang_cls": (COMC, {"mAP": ("", "mAP"), "F1@3": ("", "F1@3")}),
    "trm_ml": (TRM, {name: (arguments, "mAP") for name, arguments in SETTINGS.items()}),
}


def folder(output, method, arguments, seed):
    return output / method / ("-".join(arguments.replace("--", "").split()) or "full") / f"{seed}"


def run(output, method, arguments, seed):
    target = folder(output, method, arguments, seed)
    if (target / "results.json").exists():
        return
    command = [sys.executable, f"{method}.py", *arguments.split(), "--seed", str(seed),
               "--output", str(target.resolve()), "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def check(output, runs):
    """Stop at a kept run with other settings than today's, or of another world than the first."""
    first = {}
    for method, arguments, seed in runs:
        kept = folder(output, method, arguments, seed)
        if not (kept / "results.json").exists():
            continue
        if (kept / "args.json").exists():
            before, script = json.loads((kept / "args.json").read_text()), import_module(method)
            args = script.parse_arguments([*arguments.split(), "--seed", str(seed), "--quiet"])
            script.fill_defaults(args)
            changed = [f"--{name.replace('_', '-')}" for name, now in vars(args).items()
                       if name != "output" and before.get(name) != now
                       and before.get(name) not in (now if isinstance(now, list) else [])]
            if changed:
                sys.exit(f"{kept} was run with another {', '.join(changed)} than a run has now: "
                         f"delete it to run it again")
        rows = json.loads((kept / "results.json").read_text())["rows"]
        maps = [value for row in rows if row["kind"] == "zero-shot"
                for name, value in row.items() if name.endswith("mAP")]
        other, expected = first.setdefault(method, (kept, maps))
        if len(maps) != len(expected) or any(abs(a - b) > 2e-3 for a, b in zip(maps, expected)):
            sys.exit(f"{kept} and {other} differ in their zero-shot rows: delete the older one")


def value(output, method, arguments, seed, row, metric):
    results = json.loads((folder(output, method, arguments, seed) / "results.json").read_text())
    if row == BEST:
        return max(r[metric] for r in results["rows"] if r["kind"] == "zero-shot")
    return next(r[metric] for r in results["rows"] if r["name"] == row)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/toy_table"))
    args = parser.parse_args()
    runs = dict.fromkeys((method, arguments.format(filling), seed)
                         for method in args.methods for seed in args.seeds
                         for filling, _ in TABLES[method][1].values()
                         for arguments, _ in TABLES[method][0].values())
    sys.path.insert(0, str(ROOT))
    check(args.output, runs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, args.output, *each) for each in runs]
        for job in tqdm(jobs, disable=None):
            job.result()
    check(args.output, runs)
    for method in args.methods:
        days = sorted(datetime.date.fromtimestamp(
            (folder(args.output, *each) / "results.json").stat().st_mtime)
            for each in runs if each[0] == method)
        lines, columns = TABLES[method]
        print(f"\n`{method}.py`, {len(args.seeds)} seeds, mean and sample standard deviation, %, "
              f"run from {days[0]} to {days[-1]}\n")
        print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
        for title, (arguments, row) in lines.items():
            cells = []
            for filling, metric in columns.values():
                values = [100 * value(args.output, method, arguments.format(filling), seed, row,
                                      metric) for seed in args.seeds]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread * (row != BEST)}")
            print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
