"""Host time of each class of transformers and of the chains, as a suite for pytest-benchmark.

    python -m pytest benchmarks/bench_processors.py --benchmark-only -k 'chain'
    python -m pytest benchmarks/bench_processors.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/bench_processors.py --benchmark-only --benchmark-compare

The second line keeps the times of this commit, the third sets those of another beside them. On CUDA it is the host's
time that counts, as in ``bench_first_step.py``.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.processors import CHAINS, CLASSES
from benchmarks.workloads import FAST, THEIRS, WORKLOADS, Case, random_scores

_CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("contender", [THEIRS, FAST])
@pytest.mark.parametrize(("batch", "vocab"), [(1, 32000), (8, 128256)])
@pytest.mark.parametrize("name", [*CHAINS, *CLASSES])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_CUDA_ONLY)])
def test_processors(
    benchmark: BenchmarkFixture, device: str, name: str, batch: int, vocab: int, contender: str
) -> None:
    """One contender of one workload at one size."""
    case = Case(torch.device(device), batch, vocab, 0)
    found = {each.name: each for each in WORKLOADS[name].contenders(case)}
    call = found[contender].bind(random_scores(case))
    benchmark.group = f"{device}, {name}, {case.size}"
    with torch.no_grad():
        call()
        if device == "cuda":
            wait = torch.cuda.synchronize
            benchmark.pedantic(call, setup=wait, rounds=200, warmup_rounds=10)  # type: ignore[no-untyped-call]
        else:
            benchmark(call)
