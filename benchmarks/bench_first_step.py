"""Host time of forbidding tokens at the first step, as a suite for pytest-benchmark.

    python -m pytest benchmarks/bench_first_step.py --benchmark-only
    python -m pytest benchmarks/bench_first_step.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/bench_first_step.py --benchmark-only --benchmark-compare

The second line keeps the times of this commit, the third sets those of another beside them. (``--benchmark-only``
overrides the ``--benchmark-skip`` that the project gives to pytest.) On CUDA it is the host's time that counts: the
queue is empty before each call and nobody waits for the GPU after it.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.workloads import (
    ADD,
    FAST,
    FAST_,
    FAST_DEVICE,
    FAST_DEVICE_,
    FILL,
    FILL_,
    FIRST_STEP,
    LOOP,
    TRANSFORMERS,
    WORKLOADS,
    Case,
    random_scores,
)

_CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
_DEVICES = ["cpu", pytest.param("cuda", marks=_CUDA_ONLY)]
_SIZES = [(1, 32000), (8, 128256), (64, 128256)]
_CONTENDERS = [LOOP, TRANSFORMERS, FILL, FILL_, FAST, FAST_, FAST_DEVICE, FAST_DEVICE_, ADD]


@pytest.mark.parametrize("contender", _CONTENDERS)
@pytest.mark.parametrize("ids", [10, 1000])
@pytest.mark.parametrize(("batch", "vocab"), _SIZES)
@pytest.mark.parametrize("device", _DEVICES)
def test_first_step(benchmark: BenchmarkFixture, device: str, batch: int, vocab: int, ids: int, contender: str) -> None:
    """One contender at one size."""
    case = Case(torch.device(device), batch, vocab, ids)
    found = {each.name: each for each in WORKLOADS[FIRST_STEP].contenders(case)}
    if contender not in found:
        pytest.skip(f"not measured on {device}")
    scores = random_scores(case)
    expected = WORKLOADS[FIRST_STEP].expected(case, scores)
    call = found[contender].bind(scores)
    benchmark.group = f"{device}, {case.size}, {case.set_name}"
    with torch.no_grad():
        result = call()
        if not found[contender].yardstick:
            assert torch.equal(result, expected)
        if device == "cuda":
            wait = torch.cuda.synchronize
            benchmark.pedantic(call, setup=wait, rounds=200, warmup_rounds=10)  # type: ignore[no-untyped-call]
        else:
            benchmark(call)
