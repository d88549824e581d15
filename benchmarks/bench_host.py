"""Host time of an eager call of each workload, as a suite for pytest-benchmark.

    python -m pytest benchmarks/bench_host.py --benchmark-only -k 'chain'
    python -m pytest benchmarks/bench_host.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/bench_host.py --benchmark-only --benchmark-compare

The second line keeps the times of this commit, the third sets those of another beside them. (``--benchmark-only``
overrides the ``--benchmark-skip`` that the project gives to pytest.) On CUDA it is the host's time that counts: the
queue is empty before each call and nobody waits for the GPU after it.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.inputs import Case, random_scores
from benchmarks.run import problem_of
from benchmarks.workloads import WORKLOADS

_CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
_DEVICES = ["cpu", pytest.param("cuda", marks=_CUDA_ONLY)]
_SIZES = [(1, 32000), (8, 128256)]


def _named() -> list[tuple[str, int, str]]:
    """Workload, number of ids and contender, for all that there are on any device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        (name, ids, contender.name)
        for name, workload in WORKLOADS.items()
        for ids in ((10, 1000) if workload.takes_ids else (0,))
        for contender in workload.contenders(Case(device, *_SIZES[0], ids))
    ]


@pytest.mark.parametrize(("name", "ids", "contender"), _named())
@pytest.mark.parametrize(("batch", "vocab"), _SIZES)
@pytest.mark.parametrize("device", _DEVICES)
def test_host_time(
    benchmark: BenchmarkFixture, device: str, batch: int, vocab: int, name: str, ids: int, contender: str
) -> None:
    """One contender of one workload at one size."""
    case, workload = Case(torch.device(device), batch, vocab, ids), WORKLOADS[name]
    found = {each.name: each for each in workload.contenders(case)}
    if contender not in found:
        pytest.skip(f"not measured on {device}")
    original = random_scores(case)
    scores = original.clone()
    benchmark.group = f"{device}, {name}, {case.size}, {case.set_name}"
    with torch.no_grad():
        problem = problem_of(found[contender], scores, original, workload.expected(case, original), workload.rounds)
        assert problem is None
        call = found[contender].bind(scores)
        call()
        if device == "cuda":
            wait = torch.cuda.synchronize
            benchmark.pedantic(call, setup=wait, rounds=200, warmup_rounds=10)  # type: ignore[no-untyped-call]
        else:
            benchmark(call)
