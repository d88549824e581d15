"""The benchmark of whole ``generate`` calls, with a model of nothing."""

import csv

import pytest

from benchmarks.generate import COLUMNS, LOOKED_UP, PLAIN, Row, _contenders, _ratio, main
from fastlogits.transformers.accelerate import RunList

TINY = ["--device", "cpu", "--tiny", "--new-tokens", "3", "--repeats", "1", "--batch", "1", "2"]


def test_a_run_leaves_a_csv(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert "batch 2: accelerated, same tokens" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    wanted = [(str(batch), each.name, each.processes) for batch in (1, 2) for each in _contenders(False, batch)]
    assert [(row["batch"], row["contender"]) for row in rows] == [each[:2] for each in wanted]
    for row, (_, contender, processes) in zip(rows, wanted, strict=True):
        assert row["same"] == "True"
        assert float(row["tokens_per_s"]) > 0
        assert float(row["first_call_s"]) > 0
        assert (row["processing_wall_us"] != "") == processes
        assert (row["accepted_per_step"] != "") == (contender == LOOKED_UP)
        assert row["ratio_to_static"] == ""


def test_what_is_late_is_left_out(capsys):
    assert main([*TINY, "--no-csv", "--deadline", "0"]) == 0
    assert "LEFT OUT" in capsys.readouterr().out


def test_the_decode_phases_are_compared():
    rows = [Row(8, name, True, 1.0, 1.0, 100.0, us, None, None, None) for name, us in ((PLAIN, 800.0), ("it", 100.0))]
    assert _ratio(rows, rows[1], PLAIN) == 8.0
    assert _ratio(rows, rows[1], "nobody") is None


@pytest.mark.parametrize("broken", ["other scores", "an error"])
def test_other_scores_and_errors_are_no_success(tmp_path, capsys, monkeypatch, broken):
    def process(self, ids, scores, **options):
        if broken == "an error":
            raise ValueError("broken")
        return -scores

    monkeypatch.setattr(RunList, "__call__", process)
    assert main([*TINY, "--no-csv"]) == 1
    said = capsys.readouterr()
    assert ("OTHER RESULTS" in said.out) if broken == "other scores" else ("FAILED" in said.out)
