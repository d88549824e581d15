"""The draw of continuous batching, with a seed for each request: temperature, truncations and the draw are one step.

transformers draws all rows of a batch from one generator, so that a request's tokens depend on its neighbours. Where
the generation config has a ``seed``, each request has noise of its own instead, which depends on its seed and the
number of tokens generated before alone, as in ``decode``. Its seed is its own ``seed``, or made of the config's and the
request's id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.draw import draw
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.selection import launch
from fastlogits_kernels.selection.logprobs import report, select_and_report

LINES = 2
"""Rows of a batch's table that a seed takes: its low and its high 32 bits."""

_LOW = 2**32 - 1


class Undrawn(NamedTuple):
    """What is left to do for the scores of a batch."""

    temperature: torch.Tensor | None
    """float32 ``[B]``; None for none."""
    rules: Sequence[Rule]
    """Truncations that come after it."""
    seeds: torch.Tensor
    """int64 ``[B]``."""
    positions: torch.Tensor
    """How many tokens each row has generated before, int64 ``[B]``."""


def seed_of(state: Any, seed: int) -> int:
    """The seed of a request: its own, or one that its id makes of the config's."""
    own = state.logit_processor_kwargs.get("seed")
    if own is not None:
        return int(own)
    made = hashlib.blake2b(state.request_id.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(made.digest(), "little")


def table_lines(states: Sequence[Any], seed: int) -> list[torch.Tensor]:
    """The seeds of some requests as lines of the table, int32 ``[N]`` each; of none, the column of no request."""
    seeds = [seed_of(state, seed) for state in states] or [0]
    halves = [(each & _LOW, each >> 32 & _LOW) for each in seeds]
    return list(torch.tensor(halves, dtype=torch.int64).to(torch.int32).T)


def seeds_in(lines: torch.Tensor) -> torch.Tensor:
    """The seeds that ``table_lines`` has written, int64 ``[B]``."""
    low, high = lines.long().unbind()
    return (high << 32) | (low & _LOW)


def drawn(scores: torch.Tensor, left: Undrawn, reported: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens of a batch, int64 ``[B]``, and their log-probabilities in what they are drawn from, if ``reported``.

    Args:
        scores: float32 ``[B, V]``.
        left: what is left to do.
        reported: whether log-probabilities are wanted.
    """
    seeds, positions, rules = left.seeds, left.positions, tuple(left.rules)
    if torch.compiler.is_compiling() or not launch.takes_rules(rules):
        from fastlogits.transformers.continuous import truncated

        processed = truncated(scores, left.temperature, rules)
        tokens = draw(processed, seeds, positions)
        return tokens, report(processed, tokens, 0).logprobs if reported else None
    selection = launch.Selection(rules, scores.shape[1], scores.device)
    if not reported:
        return launch.select_tokens(scores, selection, seeds, positions, left.temperature), None
    tokens, found = select_and_report(scores, selection, seeds, positions, 0, left.temperature)
    return tokens, found.logprobs


def takes_draw(manager: Any) -> bool:
    """Whether a manager makes its runner where ``draw_in`` finds it."""
    from transformers.generation.continuous_batching import model_runner

    runner = getattr(model_runner, "ModelRunner", None)
    return callable(getattr(manager, "_create_batch_processor", None)) and callable(getattr(runner, "_sample", None))


def draw_in(manager: Any, left: Callable[[], Undrawn]) -> None:
    """Let a manager's runner draw here.

    Args:
        manager: whose runner isn't made yet.
        left: what is left to do, asked where the runner samples.
    """
    create = manager._create_batch_processor

    def create_and_take_over() -> Any:
        made = create()
        runner = made.model_runner

        def sample(scores: torch.Tensor, output_ids: torch.Tensor) -> None:
            tokens, logprobs = drawn(scores[0], left(), runner.return_logprobs)
            output_ids[0, : len(tokens)].copy_(tokens)
            if logprobs is not None:
                output_ids[1, : len(tokens)].copy_(logprobs.view(torch.int32))

        runner._sample = sample
        return made

    manager._create_batch_processor = create_and_take_over
