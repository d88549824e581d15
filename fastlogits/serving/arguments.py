"""The arguments of a batch's calls, checked: token ids, slots, positions, and where results go."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from fastlogits_kernels.runtime.launcher import to_device

from fastlogits.checks import is_integer

Ids: TypeAlias = "Sequence[int] | np.ndarray[Any, Any] | torch.Tensor"

NO_IDS: tuple[int, ...] = ()
NO_TOKENS = np.zeros(0, dtype=np.int32)
INDEX_DTYPES = (torch.int32, torch.int64)


class Index(NamedTuple):
    """Integers ``[N]`` of a call; both are None for an argument that is not given."""

    on_device: torch.Tensor | None = None
    on_host: torch.Tensor | None = None
    """None where the host can't know them without waiting for the device."""


NOT_GIVEN = Index()


def read_index(argument: str, value: Ids, device: torch.device) -> Index:
    """Integers ``[N]`` on the device, and on the host where they are known there.

    Raises:
        ValueError: anything but int32 or int64 of one dimension, or a tensor on another device.
    """
    if not isinstance(value, torch.Tensor):
        value = torch.from_numpy(_as_int64(_integers(argument, value)))
    if value.ndim != 1 or value.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"{argument} must be int32 or int64 of one dimension, got {value.dtype} of {tuple(value.shape)}"
        )
    if value.device.type == "cpu":
        return Index(value if device.type == "cpu" else to_device(value, device), value)
    if value.device != device:
        raise ValueError(f"{argument} must be on {device} or on the host, got a tensor on {value.device}")
    return Index(value)


def _integers(argument: str, ids: Ids) -> np.ndarray[Any, Any]:
    """Integers of one dimension on the host."""
    if isinstance(ids, torch.Tensor):
        if ids.device.type != "cpu":
            raise ValueError(
                f"{argument} must be on the host, so that nothing waits for them, got a tensor on {ids.device}"
            )
        ids = ids.numpy()
    try:
        found = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):  # rows of several lengths, say
        found = np.asarray(None)
    if found.ndim == 1 and found.dtype.kind in "iu":
        return found
    if found.ndim == 1 and not len(found):
        return NO_TOKENS
    if isinstance(ids, Sequence) and not isinstance(ids, str) and all(map(is_integer, ids)):
        # Python's integers may be larger than any of numpy's.
        return np.asarray([min(max(int(each), -(2**63)), 2**63 - 1) for each in ids], dtype=np.int64)
    shown = type(ids).__name__ if found.ndim != 1 else f"{found.dtype} of {found.shape}"
    raise ValueError(f"{argument} must be integers of one dimension, got {shown}")


def _as_int64(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers as int64; larger ones become its largest."""
    if found.dtype == np.int64:
        return found
    return (np.minimum(found, np.uint64(2**63 - 1)) if found.dtype == np.uint64 else found).astype(np.int64)


def history_ids(argument: str, ids: Ids) -> np.ndarray[Any, Any]:
    """Token ids as a history keeps them. Those beyond 32 bits belong to no vocabulary, and become -1."""
    if ids is NO_IDS:
        return NO_TOKENS
    if type(ids) is list and ids and type(ids[0]) is int:
        try:  # in a third of the time that numpy takes
            return np.frombuffer(array("i", ids), dtype=np.int32)
        except (TypeError, OverflowError):  # no integers, or large ones
            pass
    found = _integers(argument, ids)
    if found.dtype == np.int32:
        return found
    found = _as_int64(found)
    if len(found) and (found.max() >= 2**31 or found.min() < -(2**31)):
        found = np.where((found >= 2**31) | (found < -(2**31)), -1, found)
    return found


def check_distinct(slots: list[int], positions: list[int] | None) -> None:
    """Refuse a slot that comes twice, at the same position where positions are given."""
    met: set[tuple[int, int]] = set()
    for row, slot in enumerate(slots):
        entry = slot, 0 if positions is None else positions[row]
        if slot >= 0 and entry in met:
            raise ValueError(
                f"slots must be different, got {slot} twice: give draft_ids and local_position for rows of draft "
                "tokens, or another cache_position for each row"
            )
        met.add(entry)


def check_draft_rows(slots: list[int], local: list[int]) -> None:
    """Refuse rows of draft tokens that don't follow one another."""
    for row, (slot, depth) in enumerate(zip(slots, local, strict=True)):
        follows = row > 0 and slots[row - 1] == slot and local[row - 1] == depth - 1
        if slot >= 0 and depth != 0 and not (follows and depth > 0):
            raise ValueError(
                f"local_position must count 0, 1, 2, ... in neighbouring rows of a slot, got {depth} in row {row} of "
                f"slot {slot}"
            )


def check_neighbours(slots: list[int]) -> None:
    """Refuse a slot whose rows aren't neighbours."""
    met: set[int] = set()
    for row, slot in enumerate(slots):
        if slot >= 0 and slot in met and slots[row - 1] != slot:
            raise ValueError(f"slots must have the rows of a request side by side, got slot {slot} again in row {row}")
        met.add(slot)


def check_own_memory(argument: str, tensor: torch.Tensor) -> None:
    """Refuse what can't be written, since several of its elements are one."""
    if 0 in tensor.stride() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ValueError(
            f"{argument} must have memory of its own for each logit, got strides {tensor.stride()}: clone it"
        )


def is_in_place(out: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether ``out`` is the memory of the logits.

    Raises:
        ValueError: another shape, dtype or device than the logits have, or memory that it shares in part.
    """
    if not isinstance(out, torch.Tensor) or (out.shape, out.dtype, out.device) != (
        logits.shape, logits.dtype, logits.device
    ):  # fmt: skip
        shown = f"{out.dtype} of {tuple(out.shape)} on {out.device}" if isinstance(out, torch.Tensor) else repr(out)
        raise ValueError(
            f"out must be as the logits, {logits.dtype} of {tuple(logits.shape)} on {logits.device}, got {shown}"
        )
    check_own_memory("out", out)
    if not out.numel() or out.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
        return False
    if (out.storage_offset(), out.stride()) == (logits.storage_offset(), logits.stride()):
        return True
    _check_rows_apart(out, logits)
    return False


class _RowMemory(NamedTuple):
    """The elements of a storage from the first to the last of a row."""

    begin: int
    end: int
    is_out: bool


def _check_rows_apart(out: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse rows of two tensors of one storage that overlap. Rows of one may lie between those of the other."""
    rows = [
        _RowMemory(begin, begin + (tensor.shape[1] - 1) * tensor.stride(1), tensor is out)
        for tensor in (logits, out)
        for begin in range(
            tensor.storage_offset(), tensor.storage_offset() + len(tensor) * tensor.stride(0), tensor.stride(0)
        )
    ]
    ends = {False: -1, True: -1}
    for row in sorted(rows):
        if row.begin <= ends[not row.is_out]:
            raise ValueError("out must share no memory with the logits, unless it is the logits, got rows that do")
        ends[row.is_out] = max(ends[row.is_out], row.end)


def check_history(history: tuple[torch.Tensor, ...], slots: int, device: torch.device) -> None:
    """Refuse what can't be the history of an engine: token ids, lengths of prompts, and lengths."""
    names = ("token ids", "prompt lengths", "lengths")
    if len(history) != len(names):
        raise ValueError(
            f"history must be three tensors, token ids, prompt lengths and lengths so far, got {len(history)}"
        )
    for name, tensor, dims in zip(names, history, (2, 1, 1), strict=True):
        if tensor.ndim != dims or tensor.shape[0] != slots or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"history must have {name} of int32 or int64, {dims} dimensions and {slots} slots, got {tensor.dtype} "
                f"of {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"history must have {name} on {device}, where the batch is, got them on {tensor.device}")
