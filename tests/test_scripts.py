"""What the three scripts share: every dataset, the results, the command line, README.md."""
import functools
import json
import math
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

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {script.__name__: script for script in (mkt, lang_cls, trm_ml)}
ALL = pytest.mark.parametrize("name", SCRIPTS)
FEW = ["--epochs", "1", "--limit", "8", "--workers", "0", "--device", "cpu", "--quiet"]
SMALL = {"mkt": ["--clip", "toy-ViT", "--topk", "4", "--prompt-epochs", "1"],
         "lang_cls": ["--clip", "toy-RN", "--sentences", "20"],
         "trm_ml": ["--clip", "toy-RN", "--image-size", "64", "--augment", "no", "--matching",
                    "region", "--partial", "1"]}


@pytest.fixture
def small(tmp_path):
    """Arguments of a run of a second, by script."""
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}.\n")
    return {**SMALL, "lang_cls": [*SMALL["lang_cls"], "--templates", str(path)]}


# ---- every script on every dataset

@ALL
@pytest.mark.parametrize("dataset", [*data.DATASETS, "coco --zero-shot"])
def test_a_script_on_a_dataset(name, dataset, small, tmp_path):
    dataset, *options = dataset.split()
    is_toy = dataset == "toy"
    if not is_toy:
        options += ["--root", str(trees.make(dataset, tmp_path / "data"))]
    output = tmp_path / "run"
    rows = SCRIPTS[name].main(["--data", dataset, *options, *small[name], *FEW, "--output",
                               str(output)])
    results = trees.results(output)
    assert results.keys() == {"method", "data", "clip", "seed", "rows"}
    assert (results["method"], results["data"], results["seed"]) == (name, dataset, 0)
    assert [row["kind"] for row in rows[:3]] == ["zero-shot"] * 3
    assert [row["kind"] for row in rows[3:-1]] == ["ablation"] * len(rows[3:-1])
    assert rows[-1]["kind"] == "method" and len({row["name"] for row in rows}) == len(rows)
    prefixes = [""]
    if (dataset in ("nuswide", "openimages") or "--zero-shot" in options
            or name == "mkt" and is_toy):
        prefixes = ["zsl_", "gzsl_"]
    ks = (10, 20) if dataset == "openimages" else (3, 5)
    at_k = {f"{prefix}{metric}@{k}" for prefix in prefixes for metric in ("P", "R", "F1")
            for k in ks}
    for row, saved in zip(rows, results["rows"], strict=True):
        mAPs = {key for key in row if key.endswith("mAP")}
        assert mAPs == {f"{prefix}mAP" for prefix in prefixes}
        others = row.keys() - mAPs - {"name", "kind"}
        assert others <= at_k and (others == at_k or not is_toy)  # k is at most the labels
        values = [row[key] for key in (*mAPs, *others)]
        assert all(0 <= value <= 1 or math.isnan(value) for value in values)
        assert values == pytest.approx([saved[key] for key in (*mAPs, *others)], nan_ok=True)
    assert not math.isnan(rows[-1][f"{prefixes[-1]}mAP"])
    assert len(trees.lines(output / "log.jsonl")) == (2 if name == "mkt" else 1)
    assert json.loads((output / "args.json").read_text())["data"] == dataset
    assert Image.open(output / "curves.png").width > 0
    assert {"best.pt", "last.pt"} < {path.name for path in output.iterdir()}


@ALL
@pytest.mark.parametrize("option", ["--workers 2", "--compile", "--precision bf16"])
def test_options_of_speed_change_no_result(name, option, small, tmp_path, monkeypatch):
    # all of torch.compile but the generation of code, which takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    root = trees.make("folder", tmp_path / "data")
    arguments = ["--data", "folder", "--root", str(root), *small[name], *FEW]
    for output, more in (("plain", ""), ("other", option)):
        SCRIPTS[name].main([*arguments, *more.split(), "--output", str(tmp_path / output)])
    losses, same = [[line["loss"] for line in trees.lines(tmp_path / output / "log.jsonl")]
                    for output in ("plain", "other")]
    assert same == pytest.approx(losses, rel=0.02 if "bf16" in option else 1e-6)
    if "bf16" in option:
        assert (same == losses) == (name == "lang_cls")  # which trains in float32
    else:
        assert trees.results(tmp_path / "other") == trees.results(tmp_path / "plain")
        trees.assert_same_weights(tmp_path / "other/last.pt", tmp_path / "plain/last.pt")


# ---- bad input

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the cases below name."""
    root = tmp_path_factory.mktemp("files")
    trees.make("folder", root / "folder")
    trees.make("voc2007", root / "voc")
    for name in ("text.pt", "text.pth"):
        (root / name).write_text("no weights")
    (root / "lines.jsonl").write_text('{"request": 0, "labels": ["dog"], "description": "A."}\n')
    torch.save({"conv1.weight": torch.zeros(3)}, root / "other.pth")
    torch.save({"state_dict": {"adapter.0.weight": torch.zeros(80, 128)}}, root / "old.pth.tar")
    torch.save(torch.zeros(3, 128), root / "memory.pt")
    mkt.main(["--data", "folder", "--root", str(root / "folder"), *SMALL["mkt"], *FEW, "--output",
              str(root / "run")])
    for key, value in {"method": "trm_ml", "clip_fingerprint": "0"}.items():
        torch.save({**trees.checkpoint(root / "run/best.pt"), key: value}, root / f"{key}.pt")
    return root


@pytest.mark.parametrize("command, message", [
    ("mkt --data nuswide", "--root DIR"),
    ("lang_cls --data coco --root voc", "annotations/instances_val2014.json"),
    ("trm_ml --data voc2007 --root voc --zero-shot", "--zero-shot is not for voc2007"),
    ("lang_cls {folder} --clip ViT-Z/99", "one of toy-RN, toy-ViT, RN50"),
    ("mkt {folder} --clip toy-RN", "ResNet"),
    ("mkt {folder} --clip toy-ViT --topk 4 --workers 0 --lr 1e30 --batch-size 1 --output out",
     "the loss is not finite"),
    ("mkt --epochs 0 --prompt-epochs 0", "nothing to train"),
    ("lang_cls --limit 0", "--limit 0"),
    ("mkt --checkpoint run/best.pt", "go together"),
    ("lang_cls --labels owl,cat,owl", "each once"),
    ("lang_cls --labels a,b --generate lines.jsonl --llm-url http://x --llm-model x",
     "other labels"),
    ("trm_ml {folder} --clip toy-RN --partial 0.000001 --output none", "--partial"),
    ("mkt {folder} --clip toy-ViT --output run", "--resume"),
    ("mkt --resume --output run --epochs 3", "stage 2 has begun"),
    ("lang_cls --eval text.pt", "text.pt is not a checkpoint"),
    ("lang_cls --eval run/best.pt", "a checkpoint of mkt.py"),
    ("trm_ml --eval method.pt --data voc2007 --root voc", "other labels"),
    ("mkt --eval clip_fingerprint.pt", "another CLIP"),
    ("mkt {folder} --clip toy-ViT --topk 4 --eval other.pth", "conv1.weight"),
    ("mkt --predict folder/1.png text.pt --checkpoint run/best.pt", "text.pt: not an image"),
    ("mkt --predict folder/1.png --checkpoint run/best.pt --labels owl", "at least two"),
    ("lang_cls --predict folder/1.png --checkpoint old.pth.tar --clip toy-RN --memory memory.pt",
     "3, 128"),
])
def test_bad_input_is_one_clear_error(files, capsys, monkeypatch, command, message):
    before = {path: path.read_bytes() for path in files.rglob("*.p*")}  # checkpoints and pictures
    monkeypatch.chdir(files)
    name, *arguments = command.format(folder="--data folder --root folder").split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and f"{name}.py: error: " in printed and message in printed
    assert all(path.read_bytes() == content for path, content in before.items())


# ---- README.md and DATASETS.md

def commands():
    """What they tell to type: (script, arguments)"""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "DATASETS.md"))
    found = re.findall(r"(?:python|torchrun \S+ \d+) (mkt|lang_cls|trm_ml)\.py([^`\n#]*)",
                       text.replace("\\\n", " "))
    return sorted({(name, arguments.strip()) for name, arguments in found})


@pytest.mark.parametrize("name, arguments", commands())
def test_a_command_is_accepted(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"method": name, "args": vars(SCRIPTS[name].arguments([])[0])}
    arguments = shlex.split(arguments)
    for path in [f"runs/{name}-toy/last.pt", *arguments]:
        if path.endswith(".pt"):
            data.write_file(path, state)
        if path.endswith((".pth", ".pth.tar")):
            data.write_file(path, {"state_dict": {"adapter.0.weight": torch.zeros(80, 8)}})
    SCRIPTS[name].arguments(arguments)


def test_there_are_commands_of_every_script():
    assert {name for name, _ in commands()} == set(SCRIPTS) and len(commands()) > 20
