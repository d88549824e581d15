"""The benchmark of logits that are split, with a group of this process alone."""

import csv

import pytest
import torch
import torch.distributed as dist

import fastlogits as fl
from benchmarks import parallel
from benchmarks.parallel import CHECKED, TIMED, TINY, is_same, main


@pytest.fixture
def one_rank():
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def tiny_run(monkeypatch, tmp_path, one_rank, one_thread):
    """A run of seconds that writes to a folder of its own."""
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    return lambda *more: main(["--tiny", "--device", "cpu", "--out", str(tmp_path), *more])


def test_a_run_checks_and_leaves_a_csv(tiny_run, tmp_path, capsys):
    assert tiny_run() == 0
    said = capsys.readouterr().out
    assert "WRONG" not in said
    assert all(f"ok    {name}, bfloat16, by " in said for name in CHECKED)
    assert all(
        f"ok    {what}" in said for what in ("processors", "serving, sample", "serving, apply", "process, whole")
    )
    (path,) = tmp_path.glob("*-x1.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(int(row["rows"]), int(row["vocab"])) for row in rows} == set(TINY.timed)
    assert {row["what"] for row in rows} >= {"gather, reorder", "serving: split", *(f"{name}: split" for name in TIMED)}
    assert {(row["commit"], row["torch"], row["ranks"]) for row in rows} == {("abc1234", torch.__version__, "1")}
    assert all(row["device"] and float(row["us"]) > 0 for row in rows)


def test_what_is_late_is_left_out(tiny_run, tmp_path, capsys):
    assert tiny_run("--deadline", "0") == 0
    assert "LEFT OUT, it is late: check T k p" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_other_results_are_no_success(tiny_run, capsys, monkeypatch):
    process = fl.process
    monkeypatch.setattr(parallel, "_samplers", lambda: iter(()))
    monkeypatch.setattr(parallel, "time_size", lambda *arguments: None)
    monkeypatch.setattr(fl, "process", lambda *arguments, **options: process(*arguments, **options) + 1)
    assert tiny_run() == 1
    assert "WRONG process, whole rows" in capsys.readouterr().out


def test_a_process_of_its_own_is_told_to_use_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        main(["--tiny", "--device", "cpu"])
    assert "must be started by torchrun" in capsys.readouterr().err


def test_same_means_bit_for_bit():
    x = torch.tensor([1.0, float("nan")])
    assert is_same((x, None), (x.clone(), None))
    assert not is_same((x, None), (x, x))
    assert not is_same(x, torch.tensor([1.0, 2.0]))
    assert not is_same(x, x[:1])
