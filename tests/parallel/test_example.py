"""The example runs, and samples the same tokens on any number of ranks."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tensor_parallel.py"


def of_example(process_group, name):
    return runpy.run_path(str(EXAMPLE))[name](process_group, torch.device("cpu"))


@pytest.mark.parametrize("name", ["generate", "serve"])
def test_any_number_of_ranks_samples_the_same(ranks, name):
    alone = ranks.alike(of_example, 1, name)
    assert [len(tokens) for tokens in alone] == [8, 8, 8]
    for size in (2, 4):
        assert ranks.alike(of_example, size, name) == alone


def test_torchrun_runs_it():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT)
    assert re.findall(r"(\w+) on 2 ranks", done.stdout) == ["generate", "serve"]
