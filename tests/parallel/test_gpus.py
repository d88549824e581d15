"""The same on GPUs, where there are several: NCCL, the kernels, and captured graphs."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

import fastlogits as fl
from fastlogits.parallel import sampling
from tests.parallel.ranks import MOST, Ranks, same
from tests.parallel.test_group import part_of

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

V = 32064
CASES = [
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 40, "top_p": 0.6, "min_p": 0.02, "ties": "lowest", "order": "vllm"},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "typical_p": 0.9, "logprobs": "raw", "top_logprobs": 3},
    {"temperature": 0.7, "top_k": 50, "logprobs": "processed", "top_logprobs": 3},
    {"temperature": 0.7, "logprobs": "raw", "top_logprobs": 3},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "logprobs": "raw", "top_logprobs": 20},
]
BY_ROWS = (5, 6)
"""Cases whose rows are dealt out; the others go by parts."""


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    made = Ranks("nccl", min(GPUS, MOST))
    yield made
    made.close()


def on_gpus(process_group, case, dtype):
    """Whether the ranks sample what one GPU samples, called and replayed, and in the way that is expected."""
    with patch.multiple(sampling, LEAST_DEALT=0, LEAST_WEIGHED=0):
        return _on_gpus(process_group, case, dtype)


def _on_gpus(process_group, case, dtype):
    rank, size, options = process_group.rank(), process_group.size(), CASES[case]
    generator = torch.Generator().manual_seed(3)
    rows = (torch.randn(3, 9, V, generator=generator) * 3).to(dtype).cuda()
    rows[0, 1], rows[0, 2] = 0.0, (rows[0, 2] * 2).round() / 2
    seeds, positions = torch.arange(9, device="cuda"), torch.arange(9, device="cuda") + 5
    one, split = fl.Sampler(**options), fl.Sampler(**options, group=process_group)
    part = part_of(rows[0], rank, size)
    found = [same(split(part, seeds, positions), one(rows[0], seeds, positions))]
    (way,) = split._split._ways.values()
    found.append((way.parts is None) == (case in BY_ROWS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = split(part, seeds, positions)
    for logits in rows[1:]:
        part.copy_(part_of(logits, rank, size))
        seeds += 1
        graph.replay()
        found.append(same(sampled, one(logits, seeds, positions)))
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_ranks_on_gpus_sample_what_one_gpu_samples(gpus, case, dtype, size):
    if size > GPUS:
        pytest.skip(f"needs {size} GPUs")
    assert all(gpus.alike(on_gpus, size, case, dtype))


def trained_on_gpus(process_group, options, dtype):
    """Whether log-probabilities of parts are those of one GPU, called and replayed; and so their gradients, nearly."""
    rank, size = process_group.rank(), process_group.size()
    generator = torch.Generator().manual_seed(3)
    rows = (torch.randn(3, 9, V, generator=generator) * 3).to(dtype).cuda()
    targets = torch.arange(9, device="cuda") * 3000
    options = dict(options)
    if "kept" in options:
        options["kept"] = fl.sample(rows[0], seeds=0, positions=0, top_k=40, return_kept=options["kept"]).kept
    part = part_of(rows[0], rank, size)

    def step(logits, **more):
        leaf = logits.detach().requires_grad_()
        found = fl.logprobs(leaf, targets, temperature=0.7, entropy=True, **options, **more)
        (gradient,) = torch.autograd.grad((found.logprobs + found.entropy).sum(), leaf)
        return found.logprobs.detach(), found.entropy.detach(), gradient

    def is_right(found, logits):
        right = step(logits)
        close = torch.allclose(found[2].float(), part_of(right[2], rank, size).float(), 1e-2, 1e-6)
        return same(found[:2], right[:2]) and close

    found = [is_right(step(part, group=process_group), rows[0])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(part, group=process_group)
    for logits in rows[1:]:
        part.copy_(part_of(logits, rank, size))
        graph.replay()
        found.append(is_right(captured, logits))
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"kept": 64}, {"kept": "bits"}, {"top_k": 50, "top_p": 0.9}])
def test_ranks_on_gpus_train_as_one_gpu_does(gpus, options, dtype, size):
    if size > GPUS:
        pytest.skip(f"needs {size} GPUs")
    assert all(gpus.alike(trained_on_gpus, size, options, dtype))
