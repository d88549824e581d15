"""The benchmarks: what a run leaves behind, and that a wrong result is never given a time."""

import csv
from dataclasses import replace
from functools import partial

import pytest
import torch
import zoo

from benchmarks import results, workloads
from benchmarks.__main__ import main
from benchmarks.processors import CHAINS, CLASSES, DRAWS
from benchmarks.targets import verdicts
from benchmarks.timing import Timing
from benchmarks.workloads import (
    COPY,
    EMPTY,
    FAST,
    FAST_,
    FIRST_STEP,
    LATER_STEP,
    LOOP,
    THEIRS,
    TRANSFORMERS,
    WORKLOADS,
    Case,
    Contender,
)

_TINY = ["--device", "cpu", "--quick", "--vocab", "64", "--batch", "1", "--ids", "3"]


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """A run of seconds that writes to a folder of its own."""
    monkeypatch.setattr("benchmarks.__main__._QUICK_BUDGET_S", 0.0)
    monkeypatch.setattr("benchmarks.timing._BUNCH_US", 1.0)
    return lambda *more: main([*_TINY, "--out", str(tmp_path), *more])


def _rows(folder):
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_prints_tables_and_leaves_a_csv_and_a_plot(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    assert tiny_run("--batch", "1", "2", "--ids", "3", "12") == 0
    printed = capsys.readouterr().out
    assert "first step, 3 ids: wall time" in printed
    assert "later step, 12 ids: wall time" in printed
    assert "CPU never slower than transformers, first step" in printed
    rows = _rows(tmp_path)
    assert {row["workload"] for row in rows} == {FIRST_STEP, LATER_STEP, *CHAINS, *DRAWS}
    rows = [row for row in rows if row["workload"] in (FIRST_STEP, LATER_STEP)]
    assert tuple(rows[0]) == results.COLUMNS
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert {row["metric"] for row in rows} == {"cpu_us"}
    assert {(row["batch"], row["ids"]) for row in rows} == {("1", "3"), ("1", "12"), ("2", "3"), ("2", "12")}
    fast = next(row for row in rows if row["contender"] == FAST_)
    assert fast["in_place"] == "True"
    assert float(fast["p10"]) <= float(fast["median"]) <= float(fast["p90"])
    assert all(float(fast[f"ratio_to_{name}"]) > 0 for name in ("loop", "copy", "add"))
    svg, png = (next(tmp_path.glob(f"*-first-step.{form}")).read_bytes() for form in ("svg", "png"))
    assert b"<svg" in svg
    assert png.startswith(b"\x89PNG")


def test_a_second_run_appends_to_the_csv(tiny_run, tmp_path):
    tiny_run()
    first = _rows(tmp_path)
    tiny_run()
    both = _rows(tmp_path)
    assert both[: len(first)] == first
    assert len(both) == 2 * len(first)


def test_a_csv_with_other_columns_is_left_alone(tiny_run, tmp_path):
    path = tmp_path / f"{results.slug(torch.device('cpu'))}.csv"
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        tiny_run()
    assert path.read_text() == "other,columns\n"


def test_no_csv_leaves_nothing_behind(tiny_run, tmp_path):
    assert tiny_run("--no-csv") == 0
    assert not list(tmp_path.iterdir())


def _forgets_one(scores):
    processed = scores.clone()
    processed[:, 1] = float("-inf")
    return processed


def _raises(scores):
    raise NotImplementedError("not yet")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Contender("wrong one", lambda scores: partial(_forgets_one, scores)), "differs from plain torch"),
        (Contender("wrong one", lambda scores: partial(_raises, scores)), "raised NotImplementedError: not yet"),
        (Contender("wrong one", lambda scores: scores.double), "differs from plain torch"),
    ],
)
def test_a_wrong_contender_gets_no_time(tiny_run, tmp_path, capsys, monkeypatch, wrong, reason):
    first_step = workloads.WORKLOADS[FIRST_STEP]
    joined = replace(first_step, contenders=lambda case: [*first_step.contenders(case), wrong])
    monkeypatch.setitem(workloads.WORKLOADS, FIRST_STEP, joined)
    assert tiny_run() == 1
    printed = capsys.readouterr().out
    assert f"WRONG, not timed: first step, cpu, 1 x 64, 3 ids: wrong one {reason}" in printed
    contenders = {row["contender"] for row in _rows(tmp_path)}
    assert "wrong one" not in contenders
    assert {LOOP, FAST, FAST_} <= contenders


def test_a_contender_that_writes_its_input_must_say_so(tiny_run, capsys, monkeypatch):
    first_step = workloads.WORKLOADS[FIRST_STEP]

    def unsaid(case):
        return [replace(contender, in_place=False) for contender in first_step.contenders(case)]

    monkeypatch.setitem(workloads.WORKLOADS, FIRST_STEP, replace(first_step, contenders=unsaid))
    assert tiny_run("--no-csv") == 1
    assert f"3 ids: {FAST_} wrote its input" in capsys.readouterr().out


def test_every_class_is_measured_and_right(tiny_run, tmp_path, capsys):
    """All of them at a small size, against transformers' own."""
    assert tiny_run("--workload", "*", "--batch", "8", "--vocab", "2000") == 0, capsys.readouterr().out
    rows = _rows(tmp_path)
    assert {row["workload"] for row in rows} >= set(CLASSES) | set(CHAINS)
    assert {row["contender"] for row in rows if row["workload"] == "TopPLogitsWarper"} >= {THEIRS, FAST}
    assert "CPU: no class slower than that of transformers" in capsys.readouterr().out
    assert set(CLASSES) == set(zoo.names())


def test_only_some_workloads(tiny_run, tmp_path):
    assert tiny_run("--workload", "chain 9") == 0
    assert {row["workload"] for row in _rows(tmp_path)} == {"chain 9"}


def test_rounding_is_right_only_where_a_workload_rounds(tiny_run, monkeypatch):
    chain = WORKLOADS["chain 9"]

    def rounded(by):
        made = lambda scores: chain.contenders(Case(scores.device, *scores.shape, 0))[1].bind(scores)  # noqa: E731
        return lambda case: [Contender("rounded", lambda scores: lambda: made(scores)() * (1 + by))]

    for by, status in ((1e-7, 0), (1e-3, 1)):
        monkeypatch.setitem(workloads.WORKLOADS, "chain 9", replace(chain, contenders=rounded(by)))
        assert tiny_run("--no-csv", "--workload", "chain 9") == status


@pytest.mark.parametrize(
    "more", [["--ids", "100"], ["--workload", "chain 10"], ["--ids", "some"], ["--batch", "0"], ["--device", "tpu"]]
)
def test_bad_options_are_refused(tiny_run, more, capsys):
    with pytest.raises(SystemExit, match="2"):
        tiny_run(*more)
    assert "error: " in capsys.readouterr().err


def _results(metric, batch, vocab, ids, **medians):
    case = Case(torch.device("cpu"), batch, vocab, ids)
    names = {"fast": FAST, "fast_": FAST_, "loop": LOOP, "theirs": TRANSFORMERS, "copy": COPY, "empty": EMPTY}
    return [
        results.Result(FIRST_STEP, case, names[name], False, metric, Timing(us, us, us)) for name, us in medians.items()
    ]


def test_targets_are_judged_where_they_are_hardest_to_meet():
    found = results.Results(
        [
            *_results("gpu_us", 1, 32000, 10, fast=5.0, fast_=5.1, copy=5.0, empty=5.0),
            *_results("gpu_us", 64, 128256, 10, fast=30.0, fast_=5.9, copy=20.0, empty=5.0),
            *_results("gpu_us", 256, 151936, 10, fast=80.0, fast_=50.0, copy=78.0, empty=5.0),
            *_results("cpu_us", 8, 128256, 10, fast_=10.0, loop=49.0, theirs=900.0),
        ]
    )
    judged = {verdict.target: verdict for verdict in verdicts(found)}
    in_place = judged["GPU time in place, to 64 x 128256: empty kernel + 1 us"]
    assert in_place.met
    assert in_place.measured.startswith("5.90 us, empty kernel 5.00 us")
    out_of_place = judged["GPU time out of place <= 1.15 x copy_"]
    assert not out_of_place.met
    assert out_of_place.measured.startswith("1.50 x (30.00 / 20.00 us)")
    loop = judged["CPU in place, 10 ids: >= 5 x faster than the loop"]
    assert not loop.met
    assert loop.measured.startswith("4.9 x faster (10.00 / 49.00 us)")
    assert "host time in place <= 3 x add_" not in judged


def test_the_commit_can_be_given_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    assert results.commit() == "abc1234"
    monkeypatch.delenv("FASTLOGITS_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert results.commit() == "unknown"
