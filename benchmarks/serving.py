"""A serving step with every feature in use by some request; ``python -m benchmarks.serving`` times its upkeep."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from fastlogits_kernels.runtime.bits import pack_bits

from benchmarks.inputs import HISTORY, history
from benchmarks.processors import bad_words
from fastlogits import BatchProcessor, RequestParams, TokenMask

_OUTPUT = HISTORY // 4


class Step(NamedTuple):
    """What a step of a batch takes besides the logits."""

    batch: BatchProcessor
    slots: torch.Tensor
    bitmask: torch.Tensor


def requests(count: int, vocab: int, logprobs: int | None = None) -> list[RequestParams]:
    """Parameters of so many requests: each feature is in use by one in eight or so, most requests use several."""
    even = TokenMask.from_ids(range(0, vocab, 2), vocab)
    biases = {token: 0.5 + token % 7 for token in range(0, min(vocab, 600), 2)}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 0.0, "bad_words": bad_words(vocab), "min_tokens": 2 * HISTORY, "stop_token_ids": [2, 3]},
        {"temperature": 0.8, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.2, "bitmask": True},
        {"temperature": 1.2, "top_k": 40, "no_repeat_ngram_size": 3, "logit_bias": biases},
        {"temperature": 0.9, "top_k": 100, "dry_multiplier": 0.8, "dry_breakers": even, "top_n_sigma": 1.5},
        {"temperature": 0.6, "min_p": 0.1, "typical_p": 0.9, "allowed_token_ids": even},
        {"temperature": 0.7, "epsilon": 3e-4, "banned_token_ids": range(15, 25), "first_tokens_suppressed": even},
        {"temperature": 0.7, "eta": 3e-4, "top_k": 64, "repetition_penalty": 1.2, "first_window": 2 * HISTORY},
        {"temperature": 0.5, "top_p": 0.95, "top_k": 20, "repetition_scope": "output", "repetition_penalty": 1.3},
        {"temperature": 1.0, "forced_tokens": range(min(vocab, 300)), "frequency_penalty": 0.1},
        {"temperature": 0.7, "top_k": 50, "bitmask": True, "bad_words": bad_words(vocab)},
    ]
    return [RequestParams(**kinds[i % len(kinds)], seed=i, logprobs=logprobs) for i in range(count)]


@cache
def step(rows: int, vocab: int, device: torch.device, logprobs: int | None = None) -> Step:
    """A batch of so many requests with histories of ``HISTORY`` tokens, a quarter of it output, and the step's rows.

    ``logprobs`` is for how many of the likeliest tokens they want log-probabilities.
    """
    batch = BatchProcessor(rows, vocab, device, max_length=2 * HISTORY, max_logprobs=logprobs or 0)
    ids: np.ndarray[Any, Any] = history(rows, vocab, torch.device("cpu")).numpy()
    for params, tokens in zip(requests(rows, vocab, logprobs), ids, strict=True):
        batch.add(params, tokens[:-_OUTPUT], tokens[-_OUTPUT:])
    allowed = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(rows)) < 0.5
    return Step(batch, torch.arange(rows, device=device), pack_bits(allowed).to(device))


def processed(scores: torch.Tensor) -> torch.Tensor:
    """The processed logits, by torch on the CPU."""
    made = step(*scores.shape, torch.device("cpu"))
    return made.batch.apply(scores.cpu(), made.slots, bitmask=made.bitmask).to(scores.device)


def tokens(scores: torch.Tensor) -> torch.Tensor:
    """The tokens, by torch on the CPU."""
    made = step(*scores.shape, torch.device("cpu"))
    return made.batch.sample(scores.cpu(), made.slots, bitmask=made.bitmask).tokens.to(scores.device)


def _common() -> RequestParams:
    return RequestParams(temperature=0.7, top_k=50, repetition_penalty=1.1, logit_bias={1: 2.0, 3: 4.0})


def upkeep(device: torch.device, rows: int = 64, vocab: int = 128256, rounds: int = 500) -> dict[str, float]:
    """Microseconds of the host, medians, that requests take to come, go and move; the device is waited for in between.

    The prompt has ``HISTORY`` tokens. Parameters are new each time, or the same object.
    """
    made = step(rows, vocab, device).batch
    prompt = np.arange(HISTORY)
    same = _common()
    free = rows - 1
    made.remove(free)
    tokens, slots = torch.zeros(rows, dtype=torch.int64, device=device), torch.full((rows,), -1, device=device)
    times: dict[str, list[float]] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter_ns()
        found = call()
        times.setdefault(what, []).append((time.perf_counter_ns() - start) / 1e3)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    for _ in range(rounds):
        params = timed("RequestParams", _common)
        timed("add, new parameters", partial(made.add, params, prompt))
        timed("swap", lambda: made.swap(0, free))
        timed("swap", lambda: made.swap(0, free))
        timed("remove", lambda: made.remove(free))
        timed("add, known parameters", lambda: made.add(same, prompt))
        timed("append", lambda: made.append(slots, tokens))
        made.remove(free)
        timed("move", lambda: made.move(0, free))
        made.move(free, 0)
    step.cache_clear()
    return {what: statistics.median(each) for what, each in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what requests take to come, go and move, on the GPU if there is one."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Time what requests of a BatchProcessor take the host to come, go and move: medians in "
        "microseconds of 500 rounds, 64 requests, 128256 tokens, on the GPU if there is one. A step itself is a "
        "workload of python -m benchmarks.",
    ).parse_args(arguments)
    for what, us in upkeep(torch.device("cuda" if torch.cuda.is_available() else "cpu")).items():
        print(f"{what:24} {us:8.1f} us")


if __name__ == "__main__":
    main()
