"""The README's results on the toy world: every method, ablation and opponent, over seeds.

    python bench/toy_table.py                      # all of it, about 75 minutes on two cores
    python bench/toy_table.py --methods lang_cls --seeds 0

Every run is a subprocess with one thread. Its results.json stays in runs/toy_table, and what is
there is not run again, so an interrupted call goes on. Delete it when the code has changed.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARES = "--partial 0.003 0.01 0.1 0.3 0.5"
BASELINES = f"bench/baselines.py {SHARES}"
MKT_BASELINE = "bench/mkt_baseline.py"
TRM_ML = f"trm_ml.py {SHARES}"
PLAIN, PROBABILITIES = "zero-shot, global + local", "zero-shot, as probabilities"
NORMALISED = "zero-shot, the best of these normalised"
# {title of a line: (command, row)}
MKT = {
    "zero-shot CLIP, global + local": ("mkt.py", PLAIN),
    "zero-shot CLIP, as probabilities": ("mkt.py", PROBABILITIES),
    "zero-shot CLIP, the best normalised": ("mkt.py", NORMALISED),
    "linear map on frozen embeddings": (MKT_BASELINE, "linear map"),
    "residual MLP on frozen embeddings": (MKT_BASELINE, "residual MLP"),
    "**MKT**": ("mkt.py", "MKT"),
    "without prompt tuning": ("mkt.py", "MKT without prompt tuning"),
    "without distillation, `--distillation 0`": ("mkt.py --distillation 0", "MKT"),
    "global stream alone, `--streams global`": ("mkt.py --streams global", "MKT"),
    "local stream alone, `--streams local`": ("mkt.py --streams local", "MKT"),
}
COMC = {
    "zero-shot CLIP, global + local": ("lang_cls.py", PLAIN),
    "zero-shot CLIP, as probabilities": ("lang_cls.py", PROBABILITIES),
    "zero-shot CLIP, the best normalised": ("lang_cls.py", NORMALISED),
    "**CoMC**": ("lang_cls.py", "CoMC"),
    "merged as probabilities": ("lang_cls.py", "CoMC, merged as probabilities"),
    "without mapping": ("lang_cls.py", "CoMC without mapping"),
    "without mapping, merged as probabilities":
        ("lang_cls.py", "CoMC without mapping, merged as probabilities"),
    "global stream alone": ("lang_cls.py", "CoMC, global alone"),
    "local stream alone": ("lang_cls.py", "CoMC, local alone"),
    "without noise, `--noise 0`": ("lang_cls.py --noise 0", "CoMC"),
    "sentences alone, `--sources sentences`": ("lang_cls.py --sources sentences", "CoMC"),
    "templates alone, `--sources templates`": ("lang_cls.py --sources templates", "CoMC"),
}
# here the columns are settings, and {} is one of them
TRM = {
    "zero-shot CLIP, as probabilities": (TRM_ML, PROBABILITIES),
    "logistic regression": (BASELINES, "logistic regression, {}"),
    "text-image matching": (BASELINES, "text-image matching, {}"),
    "text-pixel matching": (BASELINES, "text-pixel matching, {}"),
    "simple head": (BASELINES, "simple head, {}"),
    "simple head + zero-shot CLIP": (BASELINES, "simple head + zero-shot CLIP, {}"),
    "**TRM-ML**": (TRM_ML, "TRM-ML, {}"),
    "without prototypes, `--pseudo 0`": (f"{TRM_ML} --pseudo 0", "TRM-ML, {}"),
}
TABLES = {"mkt": MKT, "lang_cls": COMC, "trm_ml": TRM}
COLUMNS = {
    "mkt": ["zsl_mAP", "zsl_F1@3", "gzsl_mAP", "gzsl_F1@3"],
    "lang_cls": ["mAP", "F1@3"],
    "trm_ml": ["0.3% known", "1% known", "10% known", "30% known", "50% known", "single positive"],
}


def lookup(method, column, command, row):
    """-> (command, name of the row, metric) of a cell."""
    if method != "trm_ml":
        return command, row, column
    if column == "single positive" and command.startswith(TRM_ML):  # a run of its own
        return command.replace(SHARES, "--single-positive"), row.replace(", {}", ""), "mAP"
    return command, row.format(column), "mAP"


def results_of(command, seed):
    """The rows of a run, which is made first if it has not been."""
    folder = ROOT / "runs/toy_table" / command / str(seed)
    path = folder / "results.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call has left
        options = ["--seed", str(seed), "--output", folder]
        subprocess.run([sys.executable, *command.split(), *options],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(path.read_text())["rows"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    for method in args.methods:
        columns = COLUMNS[method]
        table = {title: [lookup(method, column, *line) for column in columns]
                 for title, line in TABLES[method].items()}
        runs = dict.fromkeys((command, seed) for cells in table.values()
                             for command, *_ in cells for seed in args.seeds)
        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(runs, pool.map(results_of, *zip(*runs))))
        print(f"\n{method}.py, seeds {args.seeds}, mean and sample standard deviation (%)\n")
        print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
        for title, cells in table.items():
            texts = []
            for command, name, metric in cells:
                values = [100 * row[metric] for seed in args.seeds
                          for row in found[command, seed] if row["name"] == name]
                text = "-"  # no such row: nothing to train with
                if values:
                    text = f"{statistics.mean(values):.1f}"
                if len(values) > 1 and not name.startswith("zero-shot"):
                    text += f" ± {statistics.stdev(values):.1f}"
                texts.append(text)
            print(f"| {title} | " + " | ".join(texts) + " |", flush=True)


if __name__ == "__main__":
    main()
