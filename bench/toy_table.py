"""The README's results on the toy world: every method, ablation and opponent, over seeds.

    python bench/toy_table.py                      # all of it, about 75 minutes on two cores
    python bench/toy_table.py --methods lang_cls --seeds 0

Every run is a subprocess with one thread. Its results.json stays in --output, and what is there is
not run again, so an interrupted call goes on. Delete the folder when the code has changed.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARES = "0.003 0.01 0.1 0.3 0.5"
REGION = f"--partial {SHARES} --matching region"
SINGLE = "--single-positive --matching region"
# table: {title of a line: (script, its arguments, row)}
MKT = {
    "zero-shot CLIP, global + local": ("mkt.py", "", "zero-shot, global + local"),
    "zero-shot CLIP, normalised": ("mkt.py", "", "zero-shot, the better one normalised"),
    "**MKT**": ("mkt.py", "", "MKT"),
    "without prompt tuning": ("mkt.py", "", "MKT without prompt tuning"),
    "without distillation, `--distillation 0`": ("mkt.py", "--distillation 0", "MKT"),
    "global stream alone, `--streams global`": ("mkt.py", "--streams global", "MKT"),
    "local stream alone, `--streams local`": ("mkt.py", "--streams local", "MKT"),
}
COMC = {
    "zero-shot CLIP, global + local": ("lang_cls.py", "", "zero-shot, global + local"),
    "zero-shot CLIP, normalised": ("lang_cls.py", "", "zero-shot, the better one normalised"),
    "**CoMC**": ("lang_cls.py", "", "CoMC"),
    "without mapping": ("lang_cls.py", "", "CoMC without mapping"),
    "global stream alone": ("lang_cls.py", "", "CoMC, global alone"),
    "local stream alone": ("lang_cls.py", "", "CoMC, local alone"),
    "without noise, `--noise 0`": ("lang_cls.py", "--noise 0", "CoMC"),
    "sentences alone, `--sources sentences`": ("lang_cls.py", "--sources sentences", "CoMC"),
    "templates alone, `--sources templates`": ("lang_cls.py", "--sources templates", "CoMC"),
}
BASELINES = f"--partial {SHARES} --single-positive"
# of TRM-ML the columns are settings: {} is "0.3% known", ..., "single positive"
TRM = {
    "zero-shot CLIP, normalised": ("trm_ml.py", REGION, "zero-shot, the better one normalised"),
    "logistic regression": ("bench/baselines.py", BASELINES, "logistic regression, {}"),
    "simple head": ("bench/baselines.py", BASELINES, "simple head, {}"),
    "simple head, unknown is absent": (
        "bench/baselines.py", BASELINES, "simple head, unknown is absent, {}"),
    "**TRM-ML**": ("trm_ml.py", REGION, "TRM-ML, {}"),
    "without prototypes, `--pseudo 0`": ("trm_ml.py", f"{REGION} --pseudo 0", "TRM-ML, {}"),
}
COLUMNS = {
    "mkt": ["zsl_mAP", "zsl_F1@3", "gzsl_mAP", "gzsl_F1@3"],
    "lang_cls": ["mAP", "F1@3"],
    "trm_ml": [f"{100 * float(share):g}% known" for share in SHARES.split()] + ["single positive"],
}
TABLES = {"mkt": MKT, "lang_cls": COMC, "trm_ml": TRM}


def lookup(method, column, arguments, row):
    """-> (arguments of the run, name of the row, metric) of a cell."""
    if method != "trm_ml":
        return arguments, row, column
    if column == "single positive" and REGION in arguments:
        return arguments.replace(REGION, SINGLE), row.replace(", {}", ""), "mAP"
    return arguments, row.format(column), "mAP"


def results_of(output, script, arguments, seed):
    """The rows of a run, which is made first if it has not been."""
    name = "-".join(arguments.replace("--", "").split()) or "full"
    folder = output / Path(script).stem / name / str(seed)
    path = folder / "results.json"
    if not path.exists():
        target = path if "baselines" in script else folder
        command = [sys.executable, script, *arguments.split(), "--seed", str(seed), "--output",
                   str(target.resolve())]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(path.read_text())["rows"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/toy_table"))
    args = parser.parse_args()
    for method in args.methods:
        lines, columns = TABLES[method], COLUMNS[method]
        runs = {}
        for script, arguments, row in lines.values():
            for column in columns:
                for seed in args.seeds:
                    runs[script, lookup(method, column, arguments, row)[0], seed] = None
        with ThreadPoolExecutor(args.jobs) as pool:
            found = dict(zip(runs, pool.map(lambda run: results_of(args.output, *run), runs)))
        print(f"\n{method}.py, seeds {args.seeds}, mean and sample standard deviation (%)\n")
        print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
        for title, (script, arguments, row) in lines.items():
            cells = []
            for column in columns:
                run_arguments, name, metric = lookup(method, column, arguments, row)
                values = [100 * x[metric] for seed in args.seeds
                          for x in found[script, run_arguments, seed] if x["name"] == name]
                cell = "-"  # no such row: nothing to train with
                if values:
                    cell = f"{statistics.mean(values):.1f}"
                if len(values) > 1 and not name.startswith("zero-shot"):
                    cell += f" ± {statistics.stdev(values):.1f}"
                cells.append(cell)
            print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
