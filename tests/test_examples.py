"""Every example runs as it stands, on a CPU, in seconds."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
OF_SEVERAL_PROCESSES = {"tensor_parallel.py"}
"""Those that are started by torchrun, and tested with what they show."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in OF_SEVERAL_PROCESSES])
def test_it_runs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    state = torch.get_rng_state()
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    torch.set_rng_state(state)
    assert capsys.readouterr().out


def test_the_first_token_is_no_digit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["no_digit_first.py"])
    runpy.run_path(str(ROOT / "examples" / "no_digit_first.py"), run_name="__main__")
    plain, processed = capsys.readouterr().out.splitlines()
    assert plain.split(": ")[1][0].isdigit()
    assert not processed.split(": ")[1][0].isdigit()
