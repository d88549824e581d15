"""Where in its sequence a row of logits stands, and so which step of the run it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from fastlogits.checks import is_integer

Index: TypeAlias = int | torch.Tensor
"""An integer for all rows, on the host; or an integer tensor on the scores' device, ``()`` or one per row ``(B,)``."""


@dataclass(frozen=True, eq=False)
class Position:
    """Position of the logits of one step, on the host or on the device, for all rows or per row.

    Args:
        cache_position: index in the sequence (and in the KV cache) of the token whose logits these are, at least -1;
            -1 where nothing precedes the first generated token, as with ``inputs_embeds``.
        prompt_length: number of tokens of this run's prompt, padding included, at least 0.

    Raises:
        ValueError: not an integer or an integer tensor of at most one dimension; a host value out of range; two
            tensors on different devices or with different numbers of rows.

    Example:
        >>> Position(cache_position=9, prompt_length=10).step
        0
        >>> Position(torch.tensor([9, 14]), prompt_length=10).step
        tensor([0, 5])
    """

    cache_position: Index
    prompt_length: Index

    def __post_init__(self) -> None:
        first = checked_index("cache_position", self.cache_position, at_least=-1)
        second = checked_index("prompt_length", self.prompt_length, at_least=0)
        if first is not self.cache_position or second is not self.prompt_length:  # numpy's integers
            object.__setattr__(self, "cache_position", first)
            object.__setattr__(self, "prompt_length", second)
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
            if first.device != second.device:
                raise ValueError(f"cache_position is on {first.device}, but prompt_length is on {second.device}")
            if first.ndim and second.ndim and first.shape != second.shape:
                raise ValueError(f"cache_position has {len(first)} rows, but prompt_length has {len(second)}")

    @property
    def step(self) -> Index:
        """``cache_position + 1 - prompt_length``: 0 for the first generated token."""
        return self.cache_position + 1 - self.prompt_length


def split(index: Index) -> tuple[int, torch.Tensor | None]:
    """The part of an index that the host knows, and the tensor that is to be added to it, if any."""
    return (index, None) if isinstance(index, int) else (0, index)


def prompt_of(input_ids: torch.Tensor, prompt_length: Index) -> torch.Tensor:
    """The prompt's tokens ``(B, N)`` of the tokens so far; behind a row's own, -1."""
    if isinstance(prompt_length, int):
        return input_ids[:, :prompt_length]
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    return input_ids.masked_fill(column >= prompt_length.reshape(-1, 1), -1)


def checked_index(argument: str, value: object, *, at_least: int) -> Index:
    """``value`` as an ``Index``: numpy's integers become Python's.

    Raises:
        ValueError: it is none, or too small; the message names ``argument``.
    """
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.ndim > 1:
            raise ValueError(
                f"{argument} must be an integer tensor of shape () or (B,), got {value.dtype} of {tuple(value.shape)}"
            )
        return value
    if not is_integer(value):
        raise ValueError(f"{argument} must be an integer or an integer tensor, got {value!r}")
    if value < at_least:  # type: ignore[operator]
        raise ValueError(f"{argument} must be at least {at_least}, got {value}")
    return value if type(value) is int else int(value)  # type: ignore[call-overload]
