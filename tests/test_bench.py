import json
import subprocess
import sys

import mkt
import pytest
import side_by_side
import toy_table


@pytest.mark.parametrize("ratio, target, missed, marked", [
    (19.99, ">= 20", False, True), (20.0, ">= 20", False, False), (0.997, ">= 1", False, False),
    (0.9, "> 1", False, True), (float("nan"), "> 1", False, False), (0.5, "", False, False),
    (2.0, "< 60 s", True, True), ("exponent 1.20", "about 1, or less", True, True)])
def test_a_missed_target_is_marked(ratio, target, missed, marked, capsys):
    side_by_side.row("work", "against", "2 s", "1 s", ratio, target, missed)
    cells = [cell.strip() for cell in capsys.readouterr().out.split("|")[1:-1]]
    assert len(cells) == 6 and cells[5] == target + marked * ", **missed**"


def test_notes_stand_under_the_table_by_number(capsys, monkeypatch):
    monkeypatch.setattr(side_by_side, "NOTES", [])
    for work, note in (("a", "why"), ("b", ""), ("c", "how")):
        side_by_side.row(work, "", "", "", note=note)
    side_by_side.print_notes()
    a, b, c, *notes = capsys.readouterr().out.splitlines()
    assert "| a [1] |" in a and "| b |" in b and "| c [2] |" in c
    assert notes == ["", "[1] why", "", "[2] how"]


def test_the_toy_table_is_of_runs_that_belong_together(tmp_path):
    runs = [("mkt", "", 0), ("mkt", "", 1), ("mkt", "--streams global", 0)]
    settings, results = {}, {}
    for method, arguments, seed in runs[:2]:  # the third one has not been run yet
        kept = toy_table.folder(tmp_path, method, arguments, seed)
        kept.mkdir(parents=True)
        args = mkt.parse_arguments(["--seed", str(seed), "--quiet", "--output", str(kept)])
        mkt.fill_defaults(args)
        settings[seed], results[seed] = kept / "args.json", kept / "results.json"
        settings[seed].write_text(json.dumps(vars(args)))
        results[seed].write_text(json.dumps({"rows": [
            {"kind": "zero-shot", "zsl_mAP": 0.3}, {"kind": "method", "zsl_mAP": 0.4 + seed}]}))
    toy_table.check(tmp_path, runs)
    kept = settings[1].read_text()
    settings[1].write_text(kept.replace('"lr": 0.001', '"lr": 0.002', 1))
    with pytest.raises(SystemExit, match="1 was run with another --lr than"):
        toy_table.check(tmp_path, runs)
    settings[1].unlink()  # without it, only the zero-shot rows can tell
    toy_table.check(tmp_path, runs)
    results[1].write_text(results[1].read_text().replace("0.3", "0.31"))
    with pytest.raises(SystemExit, match="1 and .*0 differ in their zero-shot rows"):
        toy_table.check(tmp_path, runs)


@pytest.mark.parametrize("arguments", [["--quick"], ["--scripts", "text"]])
def test_results_of_less_than_everything_are_not_written_over_the_complete_ones(arguments):
    script = toy_table.ROOT / "bench" / "all.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and "need --output" in done.stderr
