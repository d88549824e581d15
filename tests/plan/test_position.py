"""Position: which step of a run the logits belong to."""

import re

import pytest
import torch

from fastlogits import Position


def test_host():
    assert Position(9, 10).step == 0
    assert Position(12, 10).step == 3
    assert Position(-1, 0).step == 0


def test_device_scalar_and_per_row(device):
    cache, prompt = torch.tensor([9, 14], device=device), torch.tensor([10, 10], device=device)
    assert Position(cache, prompt).step.tolist() == [0, 5]
    assert Position(cache, 10).step.tolist() == [0, 5]
    assert Position(9, prompt).step.tolist() == [0, 0]
    assert Position(torch.tensor(9, device=device), 10).step.item() == 0
    assert Position(cache.int(), torch.tensor(10, device=device)).step.tolist() == [0, 5]


@pytest.mark.parametrize(
    ("cache_position", "prompt_length", "message"),
    [
        (-2, 0, "cache_position must be at least -1, got -2"),
        (0, -1, "prompt_length must be at least 0, got -1"),
        (1.0, 0, "cache_position must be an integer or an integer tensor, got 1.0"),
        (True, 0, "cache_position must be an integer or an integer tensor, got True"),
        (0, torch.zeros(2), "prompt_length must be an integer tensor of shape () or (B,), got torch.float32"),
        (0, torch.zeros(2, 2, dtype=torch.int64), "shape () or (B,), got torch.int64 of (2, 2)"),
        (torch.tensor([1, 2]), torch.tensor([1]), "cache_position has 2 rows, but prompt_length has 1"),
        (
            torch.tensor([1]),
            torch.empty(1, dtype=torch.int64, device="meta"),
            "cache_position is on cpu, but prompt_length is on meta",
        ),
    ],
)
def test_bad_input(cache_position, prompt_length, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Position(cache_position, prompt_length)
