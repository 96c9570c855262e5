"""The scripts of bench/ run, at tiny sizes, and print their tables."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py")
                 if path.stem not in ("all", "side_by_side", "toy_table"))


def load_all():
    spec = importlib.util.spec_from_file_location("bench_all", BENCH / "all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_a_table(script, tmp_path):
    if script == "mean_average_precision":
        pytest.importorskip("sklearn")
    device = ["--device", "cpu"] * (script == "gpu")
    done = subprocess.run(
        [sys.executable, BENCH / f"{script}.py", "--quick", *device], capture_output=True,
        text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    head, _, *body = rows(done.stdout)
    assert head == ["work", "against", "theirs", "ours", "ratio", "target"]
    assert body and all(len(row) == 6 and row[0] and row[3] for row in body)
    assert not list(tmp_path.iterdir())


def test_all_runs_every_script():
    assert sorted(load_all().SCRIPTS) == SCRIPTS


def test_all_reports_what_fails_and_what_lacks_a_library(tmp_path, monkeypatch, capsys):
    table = "torch 1\n\n| work | ours |\n|---|---|\n| {} | 1 s |"
    for name, code in {
            "good": f"import sys; print('''{table}'''.format(sys.argv[1:]))",
            "lacking": f"print('''{table}''')\nimport surely_no_such_library",
            "broken": "print('| a row |', flush=True)\nassert 1 == 2, 'not equal'"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    module = load_all()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "SCRIPTS", ["good", "lacking", "broken"])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["all.py", "--output", str(tmp_path / "R.md"), *arguments])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code, (tmp_path / "R.md").read_text()

    code, report = run("--quick")
    assert code == 1
    assert "## `python bench/good.py --quick`\n\ntorch 1\n\n| work | ours |" in report
    assert "| ['--quick'] | 1 s |" in report and f"{os.cpu_count()} cores" in report
    assert "Left out: No module named 'surely_no_such_library'." in report
    assert "Failed with exit code 1:" in report and "AssertionError: not equal" in report
    assert "1 s |" in capsys.readouterr().out  # printed as it comes
    code, report = run("--scripts", "good", "lacking")
    assert code == 0 and "| [] | 1 s |" in report
