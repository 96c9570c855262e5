"""README.md: its commands name options that exist, its Python runs, nothing is left to fill in."""
import re
import shlex
from pathlib import Path

import pytest

import data
import lang_cls
import mkt
import trm_ml

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SCRIPTS = {"mkt.py": mkt, "lang_cls.py": lang_cls, "trm_ml.py": trm_ml}
COMMANDS = sorted(set(re.findall(r"python ((?:mkt|lang_cls|trm_ml)\.py(?:[^`\n#]|\\\n)*)",
                                 README.replace("\\\n", " "))) - {"mkt.py --help"})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "scene.png"):  # what --predict asks for
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "photo.jpg").write_bytes(b"")
    script, *arguments = shlex.split(command)
    SCRIPTS[script].parse_arguments(arguments)


def test_there_are_commands_of_every_script():
    assert {command.split()[0] for command in COMMANDS} == set(SCRIPTS) and len(COMMANDS) > 30


def test_the_python_of_the_readme_runs():
    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(block, names)
    assert names["scores"].shape == (1, 56)


def test_the_sentences_are_what_the_grammar_writes():
    sentences, _ = data.grammar_sentences(data.COCO_LABELS, 20)
    assert "\n".join(sentences) in README


def test_the_files_that_it_links_to_exist_and_nothing_is_left_to_fill_in():
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert links and all((Path(mkt.__file__).parent / link).exists() for link in links)
    assert not re.findall(r"TRM_[A-Z]+|TODO|XXX", README)
