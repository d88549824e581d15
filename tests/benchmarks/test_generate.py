"""The benchmark of whole ``generate`` calls, with a model of nothing."""

import csv

import pytest

from benchmarks.generate import ACCELERATED, BARE, COLUMNS, DECODE, PLAIN, main
from fastlogits.transformers.accelerate import RunList

TINY = ["--device", "cpu", "--tiny", "--new-tokens", "3", "--repeats", "1", "--batch", "1", "2"]


def test_a_run_leaves_a_csv(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert "batch 2, eager: accelerated, same tokens" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["batch"], row["contender"]) for row in rows] == [
        (batch, contender) for batch in "12" for contender in (BARE, PLAIN, ACCELERATED, DECODE)
    ]
    for row in rows:
        assert row["same"] == "True"
        assert float(row["tokens_per_s"]) > 0
        assert (row["processing_wall_us"] == "") == (row["contender"] == BARE)


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
