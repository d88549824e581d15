"""One generation: where it starts, where each call of it stands, and what is built once for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fastlogits_kernels._rows import HOW_TO_REPEAT

from fastlogits.position import Index, Position
from fastlogits.stages import Member


class UnknownRunStartError(ValueError):
    """A first-step processor was called where nothing says at which length the run began."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} can't know which step this is: nothing says where the run starts. Give it in one of three ways: "
            "(1) model.generate(logits_processor=fastlogits.LogitsProcessorList([...])) finds it by itself; "
            "(2) processor.for_run(prompt_length=input_ids.shape[1]), made anew for each run, goes into any list; "
            "(3) processors(input_ids, scores, prompt_length=...), where processors is a "
            "fastlogits.LogitsProcessorList that you call yourself."
        )


class Run:
    """One generation, from its prompt to its end: where it starts, and what is built once for it.

    Args:
        prompt_length: tokens of the prompt; None takes the length of the first ``input_ids`` seen.
        cache_position: index of the newest token; None takes it from the length of ``input_ids``.
    """

    def __init__(self, prompt_length: Index | None = None, cache_position: Index | None = None) -> None:
        Position(-1 if cache_position is None else cache_position, 0 if prompt_length is None else prompt_length)
        self._prompt_length = prompt_length
        self._cache_position = cache_position
        self._on_device = [
            (argument, index)
            for argument, index in (("prompt_length", prompt_length), ("cache_position", cache_position))
            if isinstance(index, torch.Tensor)
        ]
        self.on_device = len(self._on_device) > 0
        """Whether a position of it is a tensor, and so known on the device only."""
        self._first_lengths: dict[int, int] = {}
        self.allowed: dict[Any, torch.Tensor] = {}
        """Allowed rows that were built for this run."""
        self.noted: dict[Any, Any] = {}
        """What processors carry from call to call."""
        self.placed: tuple[Any, ...] | None = None
        """What a launch of masks has built for it: tables, rows and bans."""

    @property
    def is_fixed(self) -> bool:
        """Whether nothing of its positions changes from call to call but the contents of tensors."""
        return self._cache_position is not None and self._prompt_length is not None

    def locate(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[Index, Index]:
        """``cache_position`` and ``prompt_length`` of a call."""
        for argument, index in self._on_device:
            if index.device != scores.device:
                raise ValueError(f"{argument} is on {index.device}, but scores are on {scores.device}")
            if index.ndim and index.shape[0] != scores.shape[0]:
                raise ValueError(
                    f"{argument} must be a number, or have a value for each of the {scores.shape[0]} rows of scores, "
                    f"got {index.shape[0]} values; {HOW_TO_REPEAT}"
                )
        length = input_ids.shape[1]
        cache_position, prompt_length = self._cache_position, self._prompt_length
        if prompt_length is None:
            # In assisted decoding one processor serves a draft model too, whose tokenizer may count another length.
            prompt_length = self._first_lengths.setdefault(scores.shape[1], length)
        return length - 1 if cache_position is None else cache_position, prompt_length


def known(run: Run | None, members: Iterable[Member]) -> Run:
    """The run of a call of some processors.

    Raises:
        UnknownRunStartError: there is none; the message names the first processor that asks for its start.
    """
    if run is None:
        raise UnknownRunStartError(next(member.name for member in members if member.stage.needs_position))
    return run
