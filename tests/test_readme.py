"""README.md: every command of a script runs, in small, and its Python does; nothing is left to do."""
import re
import shlex
from pathlib import Path

import pytest
import torch

import data
import lang_cls
import mkt
import trm_ml
from test_benchmarks import folder_root, vg_root  # noqa: F401
from test_big_benchmarks import cub_root, openimages_root  # noqa: F401
from test_data import nuswide_root  # noqa: F401
from test_pairs import tree
from test_sentences import ChatServer

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SCRIPTS = {"mkt.py": mkt, "lang_cls.py": lang_cls, "trm_ml.py": trm_ml}
# what makes a run small; of these, a command keeps what it names itself
SMALL = {
    "mkt.py": {"--clip": "toy-ViT", "--topk": "4", "--prompt-epochs": "1"},
    "lang_cls.py": {"--clip": "toy-RN", "--sentences": "50"},
    "trm_ml.py": {"--clip": "toy-RN", "--image-size": "128", "--matching": "region"},
}
QUICK = ["--device", "cpu", "--workers", "0", "--quiet"]


def commands():
    """Arguments of the three scripts, in their order; "... --option" is the one before, with it."""
    found, text = [], README.replace("\\\n", " ")
    for script, arguments, more in re.findall(
            r"python (\w+\.py)((?: [^`\n#]*)?)|`\.\.\. ([^`]*)`", text):
        if script in SCRIPTS:
            found.append(f"{script} {arguments.strip()}".strip())
        elif more:
            found.append(f"{found[-1]} {more}")
    return list(dict.fromkeys(found))


def small(command):
    script, *arguments = shlex.split(command)
    named = {argument for argument in arguments if argument.startswith("--")}
    more = [*QUICK]
    for option, value in SMALL[script].items():
        trains = not named & {"--eval", "--predict"}
        if option not in named and (trains or "FILE" in arguments and option == "--clip"):
            more += [option, value]
    if "--data" in named:
        more += ["--epochs", "1", "--batch-size", "4"]
        more += ["--partial", "0.6", "0.9"] if arguments.count("0.3") else []
    elif "--predict" not in named:
        more += ["--limit", "64"] + ["--epochs", "1", "--batch-size", "32"] * (
            "--eval" not in named)
    return script, [*arguments, *more]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the commands find: three trained models, photos, texts, the authors' classifier."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch, ChatServer() as server:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "photos" / "2023").mkdir(parents=True)
        for path in ("scene.png", "photos/scene.png", "photos/2023/garden.jpg"):
            data.toy_scene("benchmark", 2, 7).save(path)
        torch.save({"adapter.0.weight": torch.randn(80, 128)}, "FILE")
        for command in ("mkt.py", "trm_ml.py", 'lang_cls.py --labels "owl, ice cream, traffic '
                        'light" --output runs/mine'):
            script, arguments = small(command)
            SCRIPTS[script].main(arguments)
        yield folder, server


@pytest.mark.parametrize("command", commands())
def test_a_command(command, workspace, request, tmp_path, monkeypatch, capsys):
    folder, server = workspace
    monkeypatch.chdir(folder)
    script, arguments = small(command)
    if command == "mkt.py --help":
        with pytest.raises(SystemExit) as stop:
            mkt.main(["--help"])
        assert stop.value.code == 0
        return
    if "--data" in arguments:
        dataset = arguments[arguments.index("--data") + 1]
        root = tree(dataset + ", zero-shot" * ("--zero-shot" in arguments), request, tmp_path)
        arguments[arguments.index("--root") + 1] = str(root)
    if "--generate" in arguments:
        arguments += ["--llm-url", server.url, "--llm-model", "toy-llm", "--sentences", "3"]
    if "--texts" in arguments:
        Path("texts.jsonl").write_text('{"labels": ["owl"], "description": "An owl."}\n')
    results = SCRIPTS[script].main(arguments)
    printed = capsys.readouterr().out
    if "--predict" in arguments:
        assert printed.count('"path"') == (2 if {"photos", "photos/"} & {*arguments} else 1)
    elif "--generate" in arguments:
        assert "train with --texts texts.jsonl" in printed
    elif "--labels" in arguments:
        assert Path("runs/mine/best.pt").exists()
    else:
        assert results["rows"][-1]["kind"] in ("method", "ablation") and "(%)" in printed
    for option in ("--csv", "--heatmap", "--gallery"):
        if option in arguments:
            assert Path(arguments[arguments.index(option) + 1]).exists()


def test_there_are_commands_of_every_script():
    found = commands()
    assert {command.split()[0] for command in found} == set(SCRIPTS) and len(found) > 40
    assert sum("--data" in command for command in found) > 15


def test_the_python_of_the_readme_runs():
    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(block, names)
    assert names["scores"].shape == (1, 56)


def test_the_one_line_of_python_draws_a_scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, = re.findall(r'python -c "(.*)"', README)
    exec(line)
    assert (tmp_path / "scene.png").exists()


def test_the_sentences_are_what_the_grammar_writes():
    sentences, _ = data.grammar_sentences(data.COCO_LABELS, 20)
    assert "\n".join(sentences) in README


def test_the_files_that_it_links_to_exist_and_nothing_is_left_to_fill_in():
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert links and all((Path(mkt.__file__).parent / link).exists() for link in links)
    assert not re.findall(r"TRM_[A-Z]+|TODO|XXX", README)
