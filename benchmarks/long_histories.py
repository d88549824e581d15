"""Requests that have come far: penalties, 3-grams, bad words and DRY over histories of 1,024 to 131,072 tokens.

A step of a batch reads of its histories what an index says, which ``append`` keeps up to date. A list of processors is
given the whole history at each call, and has to read it.

    python -m benchmarks --device cuda --workload 'serving, 32768 tokens' 'list, 32768 tokens'

This module makes those workloads and times nothing itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache

import torch

import fastlogits as fl
from benchmarks.processors import bad_words
from fastlogits import BatchProcessor, RequestParams

LENGTHS = (1024, 32_768, 131_072)
ROWS = 64
CHECKED = 2
"""Rows that are compared with those of the CPU, where DRY takes long."""


def text(rows: int, vocab: int, length: int) -> torch.Tensor:
    """Token ids int64 ``[rows, length]``, as often as words are: the n-th of a language 1 / n of the time."""
    generator = torch.Generator().manual_seed(length)
    ranks = torch.rand(rows, length, generator=generator).mul_(math.log(vocab)).exp_()
    return ranks.long().sub_(1).clamp_(0, vocab - 1)


def params(vocab: int, seed: int) -> RequestParams:
    """A request that looks back in every way."""
    return RequestParams(
        temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
        no_repeat_ngram_size=3, bad_words=bad_words(vocab), dry_multiplier=0.8, seed=seed,
    )  # fmt: skip


def batch(rows: int, vocab: int, length: int, device: torch.device) -> BatchProcessor:
    """Requests with histories of so many tokens, a quarter of them output; the last came by ``append``."""
    made = BatchProcessor(rows, vocab, device, max_length=length + 1024)
    ids = text(rows, vocab, length)
    for seed, tokens in enumerate(ids.numpy()):
        made.add(params(vocab, seed), tokens[: -length // 4], tokens[-length // 4 : -1])
    made.append(torch.arange(rows, device=device), ids[:, -1].to(device))
    return made


@cache
def step(rows: int, vocab: int, length: int, device: torch.device) -> tuple[BatchProcessor, torch.Tensor]:
    """Such a batch, and the slots of a step's rows. The last one that was asked for is kept."""
    step.cache_clear()
    return batch(rows, vocab, length, device), torch.arange(rows, device=device)


def tokens_of(scores: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens of the first rows, by torch on the CPU."""
    made = batch(CHECKED, scores.shape[1], length, torch.device("cpu"))
    # The texts of fewer rows are the first of more: each row is drawn after the other.
    return made.sample(scores[:CHECKED].cpu(), torch.arange(CHECKED)).tokens


def processors(vocab: int, length: int) -> fl.LogitsProcessorList:
    """The same as a list."""
    return fl.LogitsProcessorList([
        fl.RepetitionPenaltyLogitsProcessor(1.1), fl.FrequencyPenaltyLogitsProcessor(0.1),
        fl.PresencePenaltyLogitsProcessor(0.2), fl.DRYLogitsProcessor(0.8), fl.NoRepeatNGramLogitsProcessor(3),
        fl.NoBadWordsLogitsProcessor(bad_words(vocab)), fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(50),
        fl.TopPLogitsWarper(0.9),
    ])  # fmt: skip


def processed(scores: torch.Tensor, length: int) -> torch.Tensor:
    """The processed logits of the first rows, by torch on the CPU."""
    few = scores[:CHECKED].cpu()
    chain = processors(few.shape[1], length)
    found: torch.Tensor = chain(text(CHECKED, few.shape[1], length), few, prompt_length=length - length // 4)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, which has only ``--help``: the workloads are timed by ``python -m benchmarks``."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.long_histories",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)


if __name__ == "__main__":
    main()
