"""Steps that come again: their launches are laid out once, and a step brings nothing but addresses.

All that a batch keeps stays where it is: tables, sets, edits, numbers. What a step brings are the logits, a few indices
and room for its results. So the launches of the search and of the selection after it are one call of the driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.runtime.driver import Given
from fastlogits_kernels.runtime.launcher import Launch, Relaunches, is_collecting
from fastlogits_kernels.selection.row import KEPT_AT
from fastlogits_kernels.serving.layout import StepRows

_MOST_STEPS = 1024
"""Kinds of steps that are kept laid out: batch sizes, dtypes and strides."""
_KEPT_BYTES: int = 4 * KEPT_AT.value
_ALIGNMENT = 16
"""Bytes; Triton compiles for addresses that are a multiple of this, and for others."""


class StepTensors(NamedTuple):
    """What a step brings, or what stands for it."""

    scores: Any
    rows: StepRows
    work: Any
    """The workspace of the selection, int32 ``[B, words]``."""
    out: Any
    """Where processed logits go; None for tokens, and where that is not known yet."""
    tokens: Any
    """Where tokens go; None for logits."""
    kept: Any = None
    """Where the workspace says what is kept, in steps in place."""


class Signature(NamedTuple):
    """What the launches of a step depend on, and the addresses that it brings."""

    key: tuple[Any, ...]
    pointers: list[int]
    in_place: bool


def signature(scores: torch.Tensor, rows: StepRows, out: torch.Tensor | None, in_place: bool) -> Signature:
    """That of a step. It runs at each step, before anything is launched."""
    address, slots = scores.data_ptr(), rows.slots
    key: tuple[Any, ...] = (
        scores.shape, scores.stride(), scores.dtype, address % _ALIGNMENT, slots.dtype, slots.stride(), in_place
    )  # fmt: skip
    pointers = [address, slots.data_ptr()]
    for name, index in enumerate(rows[1:]):
        if index is not None:
            key += (name, index.dtype, index.shape, index.stride())
            pointers.append(index.data_ptr())
    if out is not None:
        out_address = out.data_ptr()
        key += (out.stride(), out_address % _ALIGNMENT)
        pointers.append(out_address)
    return Signature(key, pointers, in_place)


def stand_ins(given: StepTensors) -> tuple[StepTensors, int]:
    """What stands for the tensors of a step, in the order of its addresses, and how many there are."""
    numbers = iter(range(2 + len(StepRows._fields) + 3))

    def stand_in(tensor: Any) -> Any:
        return None if tensor is None else Given(next(numbers))

    scores, slots = stand_in(given.scores), stand_in(given.rows.slots)
    rows: Any = (slots, *[stand_in(index) for index in given.rows[1:]])
    out, work, tokens = stand_in(given.out), stand_in(given.work), stand_in(given.tokens)
    kept = stand_in(given.kept)
    return StepTensors(scores, StepRows(*rows), work, out, tokens, kept), next(numbers)


class PreparedSteps:
    """The steps of a batch that are laid out, by what they depend on.

    Args:
        device: of the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._index = device, -1 if device.type != "cuda" else device.index or 0
        self._made: dict[tuple[Any, ...], Relaunches | None] = {}  # None where Triton makes the launches
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, step: Signature, work: torch.Tensor, tokens: torch.Tensor | None) -> bool:
        """Launch such a step; False where it isn't laid out, and nothing was launched."""
        relaunches = self._made.get(step.key)
        if relaunches is None:
            return False
        pointers = step.pointers
        pointers.append(work.data_ptr())
        if tokens is not None:
            pointers.append(tokens.data_ptr())
        if step.in_place:
            pointers.append(pointers[-1] + _KEPT_BYTES)
        return relaunches(self._index, pointers)

    def saw(self, step: Signature, given: StepTensors, launches_of: Callable[[StepTensors], list[Launch]]) -> None:
        """Lay out a step that has been launched for the second time; of the first time take a note.

        ``launches_of`` makes its launches, of what stands for what it brings.
        """
        if is_collecting() or step.key in self._made:
            return
        if step.key not in self._seen:
            if len(self._seen) >= _MOST_STEPS:
                self._seen.clear()
                self._made.clear()
            self._seen.add(step.key)
            return
        if any(each is not None and each.device != self._device for each in (*given[:1], *given.rows, *given[2:5])):
            return  # pinned memory, of which Triton asks whether it is
        stand_in, count = stand_ins(given)
        self._made[step.key] = Relaunches.of(launches_of(stand_in), count)
