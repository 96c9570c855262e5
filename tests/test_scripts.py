"""What the three scripts share: defaults, datasets, results, the command line, README.md."""
import copy
import functools
import io
import json
import math
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import lang_cls
import metrics
import mkt
import trees
import trm_ml
from tools import convert_release, generate_texts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {script.__name__: script for script in (mkt, lang_cls, trm_ml)}
ALL = pytest.mark.parametrize("name", SCRIPTS)
FEW = ["--epochs", "1", "--limit", "8", "--workers", "0", "--device", "cpu", "--quiet"]
SMALL = {"mkt": ["--clip", "toy-ViT", "--topk", "4", "--prompt-epochs", "1"],
         "lang_cls": ["--clip", "toy-RN", "--sentences", "20"],
         "trm_ml": ["--clip", "toy-RN", "--image-size", "64", "--augment", "no", "--partial", "1"]}


@pytest.fixture
def small(tmp_path):
    """Arguments of a run of a second, by script."""
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}.\n")
    return {**SMALL, "lang_cls": [*SMALL["lang_cls"], "--templates", str(path)]}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line as a shell does -> its exit code and what it prints on stderr."""
    def run_command(command):
        name, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run_command


# ---- defaults

# on the benchmarks, and where the toy world wants another, that too
DEFAULTS = {
    "mkt": {
        "clip": ["ViT-B/16", "toy-ViT"], "topk": [16, 4], "streams": ["both"], "epochs": [20, 4],
        "preprocess": ["clip"], "prompt_epochs": [4, 1], "batch_size": [64], "lr": [1e-3],
        "prompt_batch_size": [512], "warmup_epochs": [2, 1], "distillation": [1.0, 0.1],
        "augment": ["yes", "no"], "val_fraction": [0.0], "compile": [False], "resume": [False]},
    "lang_cls": {
        "clip": ["RN50", "toy-RN"], "mapping_weight": [0.3], "streams": ["both"], "epochs": [20],
        "sources": ["both"], "sentences": [40_000], "batch_size": [512], "lr": [1e-3, 5e-3],
        "noise": [0.1], "texts": [None], "templates": [None], "labels": [None],
        "zero_shot": [None, False]},
    "trm_ml": {
        "clip": ["RN101", "toy-RN"], "image_size": [448, 128], "partial": [[1.0], [0.3]],
        "epochs": [20, 8], "batch_size": [32, 128], "lr": [1e-4, 1e-3], "pseudo": [0.1],
        "contrastive": [0.2], "distillation": [0.01], "augment": ["yes", "no"],
        "val_fraction": [0.0], "single_positive": [False], "per_label_context": [False],
        "compile": [False], "resume": [False], "zero_shot": [None, False]}}


@ALL
def test_defaults(name):
    for column, world in enumerate(["coco", "toy"]):
        args, saved = SCRIPTS[name].arguments(["--data", world])
        assert saved is None and args.output == f"runs/{name}-{world}"
        assert (args.seed, args.precision) == (0, "fp32")
        assert args.workers == [min(8, os.cpu_count()), 0][column]
        for option, values in DEFAULTS[name].items():
            assert getattr(args, option) == values[min(column, len(values) - 1)], option
    assert SCRIPTS[name].arguments([])[0].data == "toy"
    assert SCRIPTS[name].arguments(["--lr", "9"])[0].lr == 9  # what is typed wins


# ---- every script on every dataset

@pytest.mark.parametrize("name, dataset", [
    (name, dataset) for name in SCRIPTS for dataset in [*data.DATASETS, "coco --zero-shot"]
    if (name, dataset) != ("trm_ml", "openimages")])
def test_a_script_on_a_dataset(name, dataset, small, tmp_path):
    dataset, *options = dataset.split()
    if dataset != "toy":
        options += ["--root", str(trees.make(dataset, tmp_path / "data"))]
    output = tmp_path / "run"
    rows = SCRIPTS[name].main(["--data", dataset, *options, *small[name], *FEW, "--output",
                               str(output)])
    ablations = {"mkt": 1, "lang_cls": 5, "trm_ml": 0}[name]
    assert [row["kind"] for row in rows] == [
        *["zero-shot"] * 4, *["ablation"] * ablations, "method"]
    assert len({row["name"] for row in rows}) == len(rows)
    prefixes = [""]
    if (dataset in ("nuswide", "openimages") or "--zero-shot" in options
            or (name, dataset) == ("mkt", "toy")):
        prefixes = ["zsl_", "gzsl_"]
    mAPs = {f"{prefix}mAP" for prefix in prefixes}
    ks = (10, 20) if dataset == "openimages" else (3, 5)
    at_k = {f"{prefix}{metric}@{k}" for prefix in prefixes for metric in ("P", "R", "F1")
            for k in ks}
    results = trees.results(output)
    assert results["rows"] == json.loads(json.dumps(rows), parse_constant=lambda _: None)
    for row in results["rows"]:
        found = row.keys() - {"name", "kind"}
        assert mAPs <= found <= mAPs | at_k
        assert found == mAPs | at_k or dataset != "toy"  # k is at most the labels
        assert all(row[key] is None or 0 <= row[key] <= 1 for key in found)
    assert results["rows"][-1][f"{prefixes[-1]}mAP"] is not None
    assert (results["method"], results["data"], results["seed"]) == (name, dataset, 0)
    assert results["clip"] == ("toy-ViT" if name == "mkt" else "toy-RN")
    assert (results["missing"], results["limit"]) == (0, 8) and 0 < results["images"] <= 8
    assert 0 < results["threshold_OF1"] <= 1 and isinstance(results["threshold"], float)
    known = [label["present"] + label["absent"] for label in results["labels"]]
    assert 0 < max(known) <= results["images"]
    assert len(trees.lines(output / "log.jsonl")) == (2 if name == "mkt" else 1)
    assert json.loads((output / "args.json").read_text())["data"] == dataset
    assert Image.open(output / "curves.png").width > 0
    checkpoints = {path.name for path in output.glob("*.pt")}
    assert checkpoints == {"last.pt"} | ({"best.pt"} if name != "lang_cls" else set())


@pytest.mark.parametrize("clip", ["toy-RN", "toy-ViT"])
def test_zero_shot_clip_is_the_same_in_every_script(clip, small, tmp_path):
    """mkt.py's toy world has unseen labels: its rows of all labels count. Whatever MKT's pixels
    are, those of zero-shot CLIP are its own."""
    found = {}
    for name, script in SCRIPTS.items():
        if (name, clip) == ("mkt", "toy-RN"):  # which has no blocks to tune
            continue
        options = {"trm_ml": ["--image-size", "128"], "mkt": ["--preprocess", "authors"]}
        rows = script.main([*small[name], *FEW, "--limit", "20", "--clip", clip,
                            *options.get(name, []), "--output", str(tmp_path / name)])
        found[name] = [{key.removeprefix("gzsl_"): value for key, value in row.items()
                        if not key.startswith("zsl_")} for row in rows[:4]]
    for name, rows in found.items():
        for row, expected in zip(rows, found["lang_cls"], strict=True):
            assert row == pytest.approx(expected, abs=1e-6), name


@ALL
def test_options_of_speed_change_no_result(name, small, tmp_path, monkeypatch):
    # all of torch.compile but the generation of code, which takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    root = trees.make("folder", tmp_path / "data")
    arguments = ["--data", "folder", "--root", str(root), *small[name], *FEW]
    plain, losses = tmp_path / "plain", {}
    for option in ("", "--workers 2", "--precision bf16", "--compile"):
        if (name, option) == ("lang_cls", "--compile"):  # which trains for seconds
            continue
        output = tmp_path / option if option else plain
        SCRIPTS[name].main([*arguments, *option.split(), "--output", str(output)])
        losses[option] = [line["loss"] for line in trees.lines(output / "log.jsonl")]
        if option == "--precision bf16":
            assert losses[option] == pytest.approx(losses[""], rel=0.02)
            assert (losses[option] == losses[""]) == (name == "lang_cls")  # trained in float32
        else:
            assert losses[option] == pytest.approx(losses[""], rel=1e-6), option
            assert trees.results(output) == trees.results(plain), option
            trees.assert_same_weights(output / "last.pt", plain / "last.pt")


@ALL
def test_only_present_labels_are_no_evidence(name, small, tmp_path, run, capsys):
    root = trees.make("folder", tmp_path / "data")
    for split in ("train", "test"):
        lines = [{"image": f"{i}.png", "present": [label]} for i, label in ((1, "dog"), (2, "cat"))]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--data", "folder", "--root", str(root), *small[name], *FEW, "--output",
                 str(tmp_path / "run")]
    if name == "mkt":  # every pair of its loss needs both
        code, printed = run(f"mkt {shlex.join(arguments)}")
        assert code == 2 and "present in one training image and absent in another" in printed
        return
    SCRIPTS[name].main(arguments)
    printed = capsys.readouterr().out
    assert "n/a" in printed and "no mAP" in printed and "*" not in printed
    results = trees.results(tmp_path / "run")
    assert all(row["mAP"] is None for row in results["rows"])
    assert [label["absent"] for label in results["labels"]] == [0, 0]


@ALL
def test_the_best_threshold_predicts_what_results_say(name, small, tmp_path, capsys):
    root = trees.scenes(tmp_path / "data", train=(32, range(8)), test=(24, range(8)))
    options = ["--epochs", "3", "--lr", "1e-3", "--image-size", "128"] if name == "trm_ml" else []
    SCRIPTS[name].main(["--data", "folder", "--root", str(root), *small[name], *FEW, "--limit",
                        "99", *options, "--output", str(tmp_path / "run")])
    lines = trees.predictions(SCRIPTS[name], capsys, root / "test", "--checkpoint",
                              tmp_path / "run/last.pt", "--threshold", "best")
    predicted = {(str(Path(line["path"]).relative_to(root)), entry["label"])
                 for line in lines for entry in line["labels"]}
    present = {(line["image"], label) for line in trees.lines(root / "test.jsonl")
               for label in line["present"]}
    of1 = 2 * len(predicted & present) / (len(predicted) + len(present))
    # batches of another size may move the one score that is the threshold
    assert of1 == pytest.approx(trees.results(tmp_path / "run")["threshold_OF1"], abs=0.02)
    assert len(predicted) < 24 * 8  # and not all


@pytest.mark.parametrize("name, scores, best", [
    ("mkt", [0.9, 0.2, 0.3, math.nan], [0, 0, 2, 3]),  # two epochs a stage
    ("trm_ml", [0.3, math.nan, 0.9, 0.5], [0, 1, 2, 2])])
def test_the_best_epoch_is_kept_and_evaluated(name, scores, best, small, tmp_path, monkeypatch):
    """By made-up scores of held-out images; where one is NaN, the last epoch is the best."""
    root = trees.scenes(tmp_path / "data", train=(16, range(8)), test=(8, range(8)))
    write_file, mAP, left = data.write_file, metrics.mean_average_precision, iter(scores)
    kept = {"best.pt": [], "last.pt": []}

    def keep(path, content):
        write_file(path, content)
        if path.endswith(".pt"):
            kept[Path(path).name].append(copy.deepcopy(content["model"]))

    monkeypatch.setattr(data, "write_file", keep)
    monkeypatch.setattr(metrics, "mean_average_precision", lambda *x: next(left, None) or mAP(*x))
    epochs = ["--epochs", "4"] if name == "trm_ml" else ["--epochs", "2", "--prompt-epochs", "2"]
    rows = SCRIPTS[name].main([
        "--data", "folder", "--root", str(root), *small[name], *FEW, *epochs, "--lr", "0.01",
        "--limit", "99", "--val-fraction", "0.25", "--output", str(tmp_path / "run")])
    for found, epoch in zip(kept["best.pt"], best, strict=True):
        torch.testing.assert_close(found, kept["last.pt"][epoch], rtol=0, atol=0)
    first, second, third, _ = kept["last.pt"]
    tuned = "proj" if name == "mkt" else "queries"
    assert not torch.equal(first[tuned], second[tuned])
    if name == "mkt":  # stage 2 starts from the best of stage 1
        assert torch.equal(third["proj"], first["proj"])
    again = SCRIPTS[name].main(["--eval", str(tmp_path / "run/best.pt"), "--device", "cpu"])
    assert again == rows
    assert "NaN" not in (tmp_path / "run/log.jsonl").read_text()  # which is no JSON
    *_, option, count = epochs
    SCRIPTS[name].main(["--resume", "--output", str(tmp_path / "run"), "--device", "cpu", option,
                        str(int(count) + 1), "--val-fraction", "0"])
    torch.testing.assert_close(kept["best.pt"][-1], kept["last.pt"][-1], rtol=0, atol=0)


# ---- bad input

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the cases below name."""
    root = tmp_path_factory.mktemp("files")
    trees.make("folder", root / "folder")
    trees.make("voc2007", root / "voc")
    (root / "text.pt").write_text("no weights")
    (root / "results.json").write_text('{"threshold": 0.5}')  # of no checkpoint here
    torch.save({"conv1.weight": torch.zeros(3)}, root / "other.pth")
    mkt.main(["--data", "folder", "--root", str(root / "folder"), *SMALL["mkt"], *FEW, "--output",
              str(root / "run")])
    for key, value in {"method": "trm_ml", "clip_fingerprint": "0"}.items():
        torch.save({**trees.checkpoint(root / "run/best.pt"), key: value}, root / f"{key}.pt")
    return root


@pytest.mark.parametrize("command, message", [
    # data and labels
    ("mkt --data nuswide", "--root DIR"),
    ("lang_cls --root folder", "--root folder"),  # the toy world has no files
    ("lang_cls --data coco --root voc", "annotations/instances_val2014.json"),
    ("trm_ml --data voc2007 --root voc --zero-shot", "--zero-shot is not for voc2007"),
    ("lang_cls --limit 0", "--limit: 0"),
    ("lang_cls --labels owl,cat,owl", "more than once: owl"),
    ("lang_cls --labels owl", "two or more"),
    ("lang_cls --labels Dog,dog --clip toy-RN", "Dog"),  # of the same tokens
    ("mkt --predict folder/1.png --clip toy-ViT --labels owl,cat,Owl", "'owl' and 'Owl'"),
    ("trm_ml --data openimages", "43 GB"),  # of known labels
    # settings
    ("lang_cls {folder} --clip ViT-Z/99", "one of toy-RN, toy-ViT, RN50"),
    ("mkt {folder} --clip toy-RN", "ResNet"),
    ("mkt {folder} --clip other.pth", "other.pth"),
    ("mkt {folder} --clip toy-ViT --topk 65", "1..64"),
    ("mkt --epochs 0 --prompt-epochs 0", "nothing to train"),
    ("mkt --val-fraction 1", "below 1"),
    ("trm_ml --val-fraction 1", "below 1"),
    ("trm_ml --single-positive --val-fraction 0.1", "no absent label"),
    ("trm_ml --single-positive --partial 0.5", "not allowed with"),
    ("trm_ml --partial 0 0.5", "shares above 0"),
    ("trm_ml --partial 0.5 1.1", "up to 1"),
    ("trm_ml --partial 0.5 0.50", "every share once"),
    ("lang_cls --mapping-weight 1.1", "from 0 to 1"),
    ("mkt {folder} --clip toy-ViT --topk 4 --workers 0 --lr 1e30 --batch-size 1 --output out",
     "the loss is not finite"),
    ("trm_ml {folder} --clip toy-RN --image-size 64 --augment no --workers 0 --lr 1e39 --epochs 2 "
     "--output out2", "the loss is not finite"),
    ("lang_cls --labels owl,cat --clip toy-RN --sources templates --noise 3e38 --output out3",
     "the loss is not finite"),
    ("trm_ml {folder} --clip toy-RN --partial 0.000001 --output none", "--partial"),
    ("trm_ml --workers -1", "--workers: -1"),
    # other runs
    ("mkt {folder} --clip toy-ViT --output run", "run/last.pt is another run's: --resume it or"),
    ("mkt --eval run/best.pt --output run", "run/last.pt is another run's: name another --output"),
    ("lang_cls {folder} --clip toy-RN --output run", "another run's: name another --output"),
    ("mkt --resume --output none", "none/last.pt: there is no such checkpoint"),
    ("mkt --resume --output run --epochs 3", "stage 2 has begun"),
    ("lang_cls --eval none.pt", "none.pt: there is no such checkpoint"),
    ("lang_cls --eval text.pt", "text.pt is not a checkpoint"),
    ("lang_cls --eval run/best.pt", "a checkpoint of mkt.py"),
    ("trm_ml --eval method.pt --data voc2007 --root voc",
     "new: aeroplane, bicycle, bird, boat, bottle, ...; gone: ice cream, 猫"),
    ("mkt --eval clip_fingerprint.pt", "another CLIP"),
    # predictions
    ("lang_cls --predict folder/1.png", "needs a --checkpoint"),
    ("trm_ml --predict folder/1.png", "needs a --checkpoint"),
    ("mkt --predict folder/1.png", "--labels: at least two"),
    ("mkt --predict none.png --labels owl,cat --clip toy-ViT", "none.png"),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --labels owl", "at least two"),
    ("mkt --predict folder/1.png text.pt --checkpoint run/best.pt", "text.pt: not an image"),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --output run", "run: "),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --output no/lines", "no/lines"),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --heatmap text.pt", "text.pt"),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --top 0", "--top"),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --threshold nan", "a number or best"),
    ("mkt --predict folder/1.png --labels owl,cat --clip toy-ViT --threshold best", "--checkpoint"),
])
def test_bad_input_is_one_clear_error(files, run, monkeypatch, command, message):
    before = {path: path.read_bytes() for path in files.rglob("*.p*")}  # checkpoints and pictures
    monkeypatch.chdir(files)
    name = command.split()[0]
    code, printed = run(command.format(folder="--data folder --root folder"))
    assert code == 2 and message in printed
    assert printed.count(f"{name}.py: error: ") == 1 and "Traceback" not in printed
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("command, options", [
    # in training
    ("mkt", "--checkpoint x, --top 3, --threshold best, --heatmap x, --labels x"),
    ("lang_cls", "--checkpoint x, --top 3, --threshold 1, --heatmap x"),
    ("lang_cls --labels x", "--data toy, --root x, --limit 3"),
    ("lang_cls --texts x", "--sentences 3, --sources templates"),
    ("trm_ml", "--checkpoint x, --top 3, --threshold 1, --heatmap x"),
    # of a trained model
    ("mkt --eval x", "--checkpoint x, --labels x, --prompt-epochs 3, --lr 1, --augment no, "
                     "--val-fraction 0.1, --resume, --seed 3, --streams x"),
    ("lang_cls --eval x", "--top 3, --labels x, --noise 0, --texts x, --batch-size 3"),
    ("trm_ml --eval x", "--heatmap x, --epochs 3, --partial 0.5, --single-positive, --resume"),
    # of photos
    ("mkt --predict x --checkpoint x", "--eval x, --data coco, --limit 3, --lr 3, --workers 2"),
    ("mkt --predict x --labels x", "--topk 3, --streams global, --preprocess authors"),
    ("lang_cls --predict x --checkpoint x", "--eval x, --data coco, --labels x, --sentences 3"),
    ("trm_ml --predict x --checkpoint x", "--drop-crowd, --partial 0.5, --compile, --resume"),
])
def test_an_option_without_effect_is_refused(command, options, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an empty folder: what x is does not matter
    for option in options.split(", "):
        code, printed = run(f"{command} {option}")
        assert code == 2 and option.split()[0] in printed.splitlines()[-1], (option, printed)


# ---- what is around a run

def interrupted(*_):
    raise KeyboardInterrupt


@ALL
def test_a_run_interrupted_before_its_first_checkpoint_starts_again(name, small, tmp_path, run,
                                                                    monkeypatch):
    root, output = trees.make("folder", tmp_path / "data"), tmp_path / "run"
    command = shlex.join([name, "--data", "folder", "--root", str(root), *small[name], *FEW,
                          "--output", str(output)])
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "draw_curves", interrupted)
        code, printed = run(command)
    assert "interrupted" in code and not printed and not [*output.rglob("last.pt")]
    assert "start again" in code or name == "lang_cls"  # which trains for seconds
    assert run(command)[0] == 0 and trees.results(output)["rows"]


@pytest.mark.parametrize("command", [
    "mkt {folder} --clip toy-ViT --topk 4 --epochs 1 --prompt-epochs 0 --workers 0 --output piped",
    "mkt --predict folder/1.png --checkpoint run/last.pt",
    "lang_cls --labels owl,cat --clip toy-RN --epochs 1 --sentences 20 --sources sentences",
    "trm_ml {folder} --clip toy-RN --image-size 64 --augment no --epochs 1 --workers 0"])
def test_a_closed_pipe_ends_a_run_quietly(files, run, monkeypatch, command):
    monkeypatch.chdir(files)
    read, write = os.pipe()
    os.close(read)  # as head does when it has its lines
    with monkeypatch.context() as patch, open(write, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        code, printed = run(command.format(folder="--data folder --root folder"))
        pipe.flush()  # as Python does at its end
    assert code in (0, 1) and "rror" not in printed


def test_labels_are_printed_where_the_terminal_is_for_ascii(files, run, monkeypatch):
    monkeypatch.chdir(files)
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        code, _ = run("mkt --predict folder/1.png --checkpoint run/last.pt --labels owl,猫")
    assert code == 0 and '"猫"' in stdout.buffer.getvalue().decode()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_several_processes_take_torchrun(name, run, monkeypatch):
    monkeypatch.setenv(name, "2")
    code, printed = run("mkt --limit 4")
    assert code == 2 and "torchrun" in printed and printed.count("\n") == 1


def test_a_user_without_a_home_directory_can_train(tmp_path, run, monkeypatch):
    """As in a container with --user: nobody with this number is in /etc/passwd."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    for path in ROOT.glob("*.py"):  # as if imported
        runpy.run_path(str(path))
    code, printed = run("lang_cls --labels owl,cat --clip toy-RN --epochs 1 --sentences 20 "
                        "--sources sentences --output run")
    assert code == 0, printed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # and none that is named ~


# ---- what the texts tell to type

README = (ROOT / "README.md").read_text()


def commands():
    """In README.md, DATASETS.md and the docstrings: (what Python runs, arguments)"""
    text = README + (ROOT / "DATASETS.md").read_text()
    for script in (*SCRIPTS.values(), convert_release, generate_texts):
        text += script.__doc__
    found = re.findall(r"(?:python3?|torchrun \S+ \d+) ([^`\n#]*)", text.replace("\\\n", " "))
    return sorted({tuple(command.strip().partition(" ")[::2]) for command in found})


@pytest.mark.parametrize("file, arguments", commands())
def test_a_command_is_accepted(file, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, name = shlex.split(arguments), file.removesuffix(".py")
    if name in SCRIPTS:
        state = {"method": name, "args": vars(SCRIPTS[name].arguments([])[0])}
        for path in [f"runs/{name}-toy/last.pt", *arguments]:
            if path.endswith(".pt"):
                data.write_file(path, state)
                data.write_file(Path(path).with_name("results.json"), '{"threshold": 0.5}')
        SCRIPTS[name].arguments(arguments)
        assert name != "lang_cls" or "best.pt" not in " ".join(arguments)  # it has none
    elif name == "tools/generate_texts":
        monkeypatch.setattr(generate_texts, "generate", lambda path, labels, args: None)
        generate_texts.main(arguments)
    elif name == "tools/convert_release":
        monkeypatch.setattr(convert_release.clip_model, "load", lambda clip: sys.exit("accepted"))
        with pytest.raises(SystemExit, match="accepted"):
            convert_release.main(arguments)
    elif file == "-c":
        exec(arguments[0])
    elif file == "-m":
        assert arguments[0] == "pytest"
    else:  # measurements: they are not run
        source = (ROOT / file).read_text()
        assert all(option in source for option in arguments if option.startswith("--"))


def test_there_are_commands_of_every_script():
    assert {f"{name}.py" for name in SCRIPTS} < {file for file, _ in commands()}
    assert len(commands()) > 20


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
