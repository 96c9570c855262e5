"""What the three scripts share: every dataset, the results, the command line, README.md."""
import functools
import json
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


# ---- every script on every dataset

@ALL
@pytest.mark.parametrize("dataset", [*data.DATASETS, "coco --zero-shot"])
def test_a_script_on_a_dataset(name, dataset, small, tmp_path, run):
    if (name, dataset) == ("trm_ml", "openimages"):
        assert run("trm_ml --data openimages")[0] == 2  # too many known labels
        return
    dataset, *options = dataset.split()
    is_toy = dataset == "toy"
    if not is_toy:
        options += ["--root", str(trees.make(dataset, tmp_path / "data"))]
    output = tmp_path / "run"
    rows = SCRIPTS[name].main(["--data", dataset, *options, *small[name], *FEW, "--output",
                               str(output)])
    kinds = [row["kind"] for row in rows]
    ablations = {"mkt": 1, "lang_cls": 5, "trm_ml": 0}[name]
    assert kinds == ["zero-shot"] * 4 + ["ablation"] * ablations + ["method"]
    assert len({row["name"] for row in rows}) == len(rows)
    prefixes = [""]
    if (dataset in ("nuswide", "openimages") or "--zero-shot" in options
            or name == "mkt" and is_toy):
        prefixes = ["zsl_", "gzsl_"]
    ks = (10, 20) if dataset == "openimages" else (3, 5)
    at_k = {f"{prefix}{metric}@{k}" for prefix in prefixes for metric in ("P", "R", "F1")
            for k in ks}
    results = trees.results(output)
    assert results["rows"] == json.loads(json.dumps(rows), parse_constant=lambda _: None)
    for row in results["rows"]:
        metrics = row.keys() - {"name", "kind"}
        mAPs = {f"{prefix}mAP" for prefix in prefixes}
        assert mAPs <= metrics <= mAPs | at_k
        assert metrics == mAPs | at_k or not is_toy  # k is at most the labels
        assert all(row[key] is None or 0 <= row[key] <= 1 for key in metrics)
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
    """mkt.py's toy world has unseen labels: its rows of all labels count."""
    found = {}
    for name, script in SCRIPTS.items():
        if (name, clip) == ("mkt", "toy-RN"):  # which has no blocks to tune
            continue
        options = ["--image-size", "128"] if name == "trm_ml" else []
        rows = script.main([*small[name], *FEW, "--limit", "20", "--clip", clip, *options,
                            "--output", str(tmp_path / name)])
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
    root = tmp_path / "data"
    trees.make("folder", root)
    for split in ("train", "test"):
        lines = [{"image": "1.png", "present": ["dog"]}, {"image": "2.png", "present": ["cat"]}]
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
    # settings
    ("lang_cls {folder} --clip ViT-Z/99", "one of toy-RN, toy-ViT, RN50"),
    ("mkt {folder} --clip toy-RN", "ResNet"),
    ("mkt {folder} --clip other.pth", "other.pth"),
    ("mkt --epochs 0 --prompt-epochs 0", "nothing to train"),
    ("mkt {folder} --clip toy-ViT --topk 4 --workers 0 --lr 1e30 --batch-size 1 --output out",
     "the loss is not finite"),
    ("trm_ml {folder} --clip toy-RN --partial 0.000001 --output none", "--partial"),
    ("trm_ml --workers -1", "--workers: -1"),
    # other runs
    ("mkt {folder} --clip toy-ViT --output run", "run/last.pt is another run's"),
    ("mkt --eval run/best.pt --output run", "run/last.pt is another run's"),
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
    ("mkt", "--checkpoint x, --top 3, --threshold 1, --threshold best, --heatmap x, --labels x"),
    ("lang_cls", "--checkpoint x, --top 3, --threshold 1, --heatmap x"),
    ("lang_cls --labels x", "--data coco, --root x, --limit 3"),
    ("lang_cls --texts x", "--sentences 3, --sources templates"),
    ("trm_ml", "--checkpoint x, --top 3, --threshold 1, --heatmap x"),
    # of a trained model
    ("mkt --eval x", "--checkpoint x, --top 3, --threshold 1, --heatmap x, --labels x, --epochs 3, "
                     "--lr 1, --augment no, --val-fraction 0.1, --resume, --seed 3, --streams x"),
    ("lang_cls --eval x", "--checkpoint x, --top 3, --heatmap x, --labels x, --epochs 3, --seed 3, "
                          "--noise 0, --texts x, --templates x, --batch-size 3"),
    ("trm_ml --eval x", "--checkpoint x, --top 3, --heatmap x, --epochs 3, --partial 0.5, "
                        "--single-positive, --pseudo 0, --resume, --seed 3"),
    # of photos
    ("mkt --predict x --checkpoint x", "--eval x, --data coco, --root x, --limit 3, --epochs 3, "
                                       "--workers 2, --seed 3, --compile, --resume"),
    ("mkt --predict x --labels x", "--topk 3, --streams global, --preprocess authors"),
    ("lang_cls --predict x --checkpoint x", "--eval x, --data coco, --limit 3, --epochs 3, "
                                            "--workers 2, --seed 3, --labels x, --sentences 3"),
    ("trm_ml --predict x --checkpoint x", "--eval x, --root x, --drop-crowd, --partial 0.5, "
                                          "--workers 2, --seed 3, --batch-size 3, --resume"),
])
def test_an_option_without_effect_is_refused(command, options, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an empty folder: what x is does not matter
    for option in options.split(", "):
        code, printed = run(f"{command} {option}")
        assert code == 2 and option.split()[0] in printed.splitlines()[-1], (option, printed)


# ---- what is around a run

@ALL
def test_an_interrupted_run_says_how_to_go_on_and_does(name, small, tmp_path, run, monkeypatch):
    """By Ctrl-C before the first epoch is saved, then in the second epoch; TRM-ML in a sweep."""
    root = trees.make("folder", tmp_path / "data")
    output = tmp_path / "run"
    sweep = ["--partial", "0.9", "1"] if name == "trm_ml" else []
    command = shlex.join([name, "--data", "folder", "--root", str(root), *small[name], *FEW,
                          "--epochs", "2", *sweep, "--output", str(output)])
    write_file = data.write_file

    def write_or_stop(path, content):
        nonlocal left
        left -= path.endswith("curves.png")
        if left == 0:
            raise KeyboardInterrupt
        write_file(path, content)

    monkeypatch.setattr(data, "write_file", write_or_stop)
    left = 1
    code, printed = run(command)
    assert "interrupted" in code and not printed and not [*output.rglob("last.pt")]
    if name == "lang_cls":  # which trains for seconds: there is nothing to go on from
        left = -1
        assert run(command)[0] == 0
        return
    assert "start again" in code
    left = 3 if sweep else 2
    code, _ = run(command)
    assert "--resume" in code and [*output.rglob("last.pt")]
    left = -1
    assert run(f"{name} --resume --output {output}")[0] == 0
    assert trees.results(output)["rows"]


@pytest.mark.parametrize("command", [
    "mkt {folder} --clip toy-ViT --topk 4 --epochs 1 --prompt-epochs 0 --workers 0 --output piped",
    "mkt --eval run/last.pt", "mkt --predict folder/1.png --checkpoint run/last.pt",
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


def test_several_processes_take_torchrun(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
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
