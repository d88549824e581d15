"""The benchmark of training's log-probabilities, on rows of nothing."""

import csv

import pytest
import torch
from fastlogits_kernels.training.logprobs import OPERATION

import fastlogits as fl
from benchmarks import training
from benchmarks.training import CHECKED, OPTIONS, TINY, main, sorted_logprobs


@pytest.fixture
def tiny_run(monkeypatch, tmp_path, one_thread):
    """A run of a second that writes to a folder of its own."""
    monkeypatch.setattr(training, "_TURNS_S", 0.0)
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    return lambda *more: main(["--tiny", "--device", "cpu", "--out", str(tmp_path), *more])


def _rows(folder):
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_checks_and_leaves_a_csv(tiny_run, tmp_path, capsys):
    assert tiny_run() == 0
    said = capsys.readouterr().out
    assert "WRONG" not in said
    assert all(f"ok    {kind} {name}: many rows equal the sampler, off in 0" in said for kind, name in CHECKED)
    rows = _rows(tmp_path)
    timed = {row["what"] for row in rows if int(row["rows"]) == TINY.rows}
    assert timed >= {"read", "copy_", *(f"forward {name}" for name in OPTIONS), "backward p", "backward kept ids"}
    assert any(row["what"].startswith("forward sorted") for row in rows)
    assert {(row["commit"], row["torch"]) for row in rows} == {("abc1234", torch.__version__)}
    assert all(row["device"] and float(row["us"]) > 0 for row in rows)


def test_what_is_late_is_left_out(tiny_run, tmp_path, capsys):
    assert tiny_run("--deadline", "0") == 0
    assert "LEFT OUT, it is late: check gauss k p" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["other results", "an error", "no kernels"])
def test_wrong_results_errors_and_lost_kernels_are_no_success(tiny_run, capsys, monkeypatch, broken):
    right = fl.logprobs

    def wrong(*arguments, **options):
        if broken == "an error":
            raise ValueError("broken")
        # The rule goes unheeded, so that results differ by the kept mass.
        return right(*arguments, **{name: value for name, value in options.items() if name != "top_p"})

    monkeypatch.setattr(training, "CHECKED", (("gauss", "k p"),))
    for part in ("time_rules", "time_kept", "time_peers"):
        monkeypatch.setattr(training, part, lambda *arguments: None)
    if broken == "no kernels":
        monkeypatch.setitem(OPERATION.lost, torch.device("cpu"), "no compiler")
    else:
        monkeypatch.setattr(fl, "logprobs", wrong)
    assert tiny_run() == 1
    wanted = {"other results": "WRONG gauss k p: few rows", "an error": "FAILED", "no kernels": "logprobs has fallen"}
    assert wanted[broken] in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.9}])
def test_the_sorted_composition_computes_the_same(options):
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 3
    targets = logits.argmax(-1)
    torch.testing.assert_close(sorted_logprobs(logits, targets, **options), fl.logprobs(logits, targets, **options))
