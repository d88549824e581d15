"""The examples run, and show what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_step_of_grpo(capsys):
    told = runpy.run_path(str(EXAMPLES / "grpo_step.py"))["main"]()
    assert told["largest |ratio - 1| before the update"] == 0
    assert told["the same by the rules again"] == 0
    assert told["tokens that the rules would not have kept"] == 0
    assert told["the same by a full softmax"] > 0.1
    assert told["largest |ratio - 1| after the update"] > 0
    assert told["loss after"] < told["loss before"]
    assert "before the update" in capsys.readouterr().out
