"""One generation: where it starts, where each call of it stands, and what is built once for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fastlogits_kernels.runtime.rows import HOW_TO_REPEAT

from fastlogits.plan.position import Index, Position
from fastlogits.plan.stages import Member


class PositionError(ValueError):
    """What a call tells of its position can't be, or isn't enough."""


class UnknownRunStartError(PositionError):
    """A first-step processor was called where nothing says at which length the run began."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} can't know which step this is: nothing says where the run starts. Give it in one of three ways: "
            "(1) prompt_length=..., where you call fastlogits' LogitsProcessorList, Sampler, sample, logprobs or check "
            "yourself; (2) model.generate(logits_processor=fastlogits.LogitsProcessorList([...])) finds it, as does a "
            "plain list under fastlogits.accelerate(model); (3) processor.for_run(prompt_length=...), made anew for "
            "each run, goes into any list."
        )


class Run:
    """One generation, from its prompt to its end: where it starts, and what is built once for it.

    Args:
        prompt_length: tokens of the prompt. Where neither position is given, None takes the length of the first
            ``input_ids`` seen; beside ``cache_position``, nobody knows where the run starts.
        cache_position: index of the newest token; None takes it from the length of ``input_ids``.

    Raises:
        ValueError: not an integer or integer tensor, or out of range.
    """

    def __init__(self, prompt_length: Index | None = None, cache_position: Index | None = None) -> None:
        position = Position(
            -1 if cache_position is None else cache_position, 0 if prompt_length is None else prompt_length
        )
        self._prompt_length = prompt_length = None if prompt_length is None else position.prompt_length
        self._cache_position = cache_position = None if cache_position is None else position.cache_position
        self.knows_start = prompt_length is not None or cache_position is None
        """Whether it can tell which step a call is."""
        self._on_device = [
            (argument, index)
            for argument, index in (("prompt_length", prompt_length), ("cache_position", cache_position))
            if isinstance(index, torch.Tensor)
        ]
        self.on_device = len(self._on_device) > 0
        """Whether a position of it is a tensor, and so known on the device only."""
        self._first_lengths: dict[int, int] = {}
        self._kept: dict[object, dict[Any, Any]] = {}

    @classmethod
    def of(cls, prompt_length: Index | None, cache_position: Index | None) -> Run | None:
        """The run that a single call tells of by its arguments; None where it gives neither.

        One call can't tell whether it is the first, so the length of its ``input_ids`` is never taken for the prompt.
        """
        if prompt_length is None and cache_position is None:
            return None
        return cls(prompt_length, cache_position)

    def kept_for(self, owner: object) -> dict[Any, Any]:
        """What a part of a plan or a processor carries from call to call of this run, which ends with it."""
        return self._kept.setdefault(owner, {})

    def forget(self, kind: type) -> None:
        """Drop what owners of a kind carry: another prompt is put into the same buffers, whose run this is."""
        for owner in [owner for owner in self._kept if isinstance(owner, kind)]:
            del self._kept[owner]

    def starts_at(self, prompt_length: int) -> bool:
        """Whether it starts after so many tokens, as far as it has begun, and takes each position from the ids."""
        if self._cache_position is not None:
            return False
        if self._prompt_length is not None:
            return isinstance(self._prompt_length, int) and self._prompt_length == prompt_length
        return all(length == prompt_length for length in self._first_lengths.values())

    @property
    def is_fixed(self) -> bool:
        """Whether nothing of its positions changes from call to call but the contents of tensors."""
        return self._cache_position is not None and self._prompt_length is not None

    def locate(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[Index, Index]:
        """``cache_position`` and ``prompt_length`` of a call; for the latter 0 where nobody knows it.

        Raises:
            ValueError: a tensor on another device than the scores, or of another number of rows; or a prompt that is
                longer than the ``input_ids`` from which the position is taken.
        """
        for argument, index in self._on_device:
            if index.device != scores.device:
                raise PositionError(f"{argument} must be on {scores.device}, as scores are, got it on {index.device}")
            if index.ndim and index.shape[0] != scores.shape[0]:
                raise PositionError(
                    f"{argument} must be a number, or have a value for each of the {scores.shape[0]} rows of scores, "
                    f"got {index.shape[0]} values; {HOW_TO_REPEAT}"
                )
        length = input_ids.shape[1]
        cache_position, prompt_length = self._cache_position, self._prompt_length
        if prompt_length is None:
            # In assisted decoding one processor serves a draft model too, whose tokenizer may count another length.
            prompt_length = self._first_lengths.setdefault(scores.shape[1], length) if self.knows_start else 0
        elif cache_position is None and isinstance(prompt_length, int) and prompt_length > length:
            raise PositionError(
                f"prompt_length must be at most {length}, the number of tokens in input_ids, got {prompt_length}: "
                "where input_ids leave out tokens that came before, give cache_position too"
            )
        return length - 1 if cache_position is None else cache_position, prompt_length


def known(run: Run | None, members: Iterable[Member]) -> Run:
    """The run of a call of some processors, whose start is known.

    Raises:
        UnknownRunStartError: it isn't; the message names the first processor that asks for it.
    """
    if run is None or not run.knows_start:
        raise UnknownRunStartError(next(member.name for member in members if member.stage.needs_position))
    return run
