"""A decoding loop whose logits are split over ranks, as a tensor-parallel ``lm_head`` leaves them.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

It runs on GPUs with NCCL where there are as many as ranks, else on the CPU with gloo. Every rank has the same tokens,
and with another number of ranks they are the same again.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

import fastlogits as fl

VOCAB_SIZE, HIDDEN_SIZE, PROMPTS = 1000, 32, ([11, 12, 13], [21, 22, 23], [31, 32, 33])


class SplitHead:
    """The part of an ``lm_head`` that this rank has: the rows of its weight for some neighbouring tokens."""

    def __init__(self, group: fl.Group, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
        self._embeddings = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator, dtype=torch.float64).to(device)
        each = -(-VOCAB_SIZE // group.size)
        self._weight = weight[group.rank * each : (group.rank + 1) * each].to(device)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logits, ``[B, width]``. A real model would do more before its head."""
        return (self._embeddings[tokens] @ self._weight.T / HIDDEN_SIZE**0.5 * 3).float()


def generate(process_group: Any, device: torch.device, steps: int = 8) -> list[list[int]]:
    """The new tokens of each prompt, the same on every rank."""
    group = fl.Group(process_group)
    head = SplitHead(group, device)
    sampler = fl.Sampler(temperature=0.7, top_k=50, top_p=0.9, group=group)
    ids = torch.tensor(PROMPTS, device=device)
    seeds = torch.arange(len(PROMPTS), device=device)
    for _ in range(steps):
        drawn = sampler(head(ids[:, -1]), seeds, positions=ids.shape[1])
        ids = torch.cat((ids, drawn.tokens.unsqueeze(1)), 1)
    return ids[:, len(PROMPTS[0]) :].tolist()


def serve(process_group: Any, device: torch.device, steps: int = 8) -> list[list[int]]:
    """The same loop in a serving stack: every rank has the same requests, each with its own parameters."""
    batch = fl.BatchProcessor(4, VOCAB_SIZE, device, max_length=64, group=process_group)
    head = SplitHead(fl.Group(process_group), device)
    requests = (
        fl.RequestParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=1),
        fl.RequestParams(temperature=0),
        fl.RequestParams(temperature=1.3, top_k=20, no_repeat_ngram_size=2, seed=3),
    )
    slots = [batch.add(request, prompt) for request, prompt in zip(requests, PROMPTS, strict=True)]
    last = torch.tensor([prompt[-1] for prompt in PROMPTS], device=device)
    new: list[torch.Tensor] = []
    for _ in range(steps):
        last = batch.sample(head(last), slots).tokens
        batch.append(slots, last)
        new.append(last)
    return torch.stack(new, 1).tolist()


def main() -> None:
    """Run as a rank that torchrun has started."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    for run in (generate, serve):
        tokens = run(dist.group.WORLD, device)
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, tokens)
        assert all(each == tokens for each in of_ranks)
        if dist.get_rank() == 0:
            print(f"{run.__name__} on {len(of_ranks)} ranks: {tokens}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
