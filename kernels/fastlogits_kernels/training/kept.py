"""Token ids of packed sets, in rows of a bounded length or one after the other.

Bytes moved: one read of the bits, and four bytes for each id.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlogits_kernels.pointwise.fold import popcount
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import unpack_bits
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.selection import launch

_OPERATION = Operation("kept")


@triton.jit(do_not_specialize=["W", "most"], do_not_specialize_on_alignment=["kept_bits_ptr", "offsets_ptr"])
def kept_ids_kernel(
    # inputs
    kept_bits_ptr, offsets_ptr,
    # outputs
    ids_ptr, counts_ptr,
    # shapes
    W, most,
    # constants
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The tokens of a row's bits, upward, and how many they are; those beyond the room are counted only."""
    row = tl.program_id(0).to(tl.int64)
    begin, room = row * most, tl.full([], 0, tl.int64) + most
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr + row).to(tl.int64)
        room = tl.load(offsets_ptr + row + 1).to(tl.int64) - begin
    total = tl.full([], 0, tl.int32)
    for start in range(0, W, BLOCK_W):
        index = start + tl.arange(0, BLOCK_W)
        word = tl.load(kept_bits_ptr + row * W + index, mask=index < W, other=0)
        number = popcount(word)
        place = total + tl.cumsum(number, 0) - number
        total += tl.sum(number)
        for _ in range(tl.max(number)):
            # The lowest bit of each word that has any left.
            lowest = word & -word
            token = index * 32 + popcount(lowest - 1)
            tl.store(ids_ptr + begin + place, token, mask=(word != 0) & (place < room))
            place += 1
            word = word & (word - 1)
    tl.store(counts_ptr + row, total)


_ids_launcher = Launcher(kept_ids_kernel, num_warps=4)
_BLOCK_W = 1024


@_OPERATION.falls_back
def _ids(bits: torch.Tensor, vocab_size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not _OPERATION.takes(bits, launch.FORCE_KERNEL):
        return reference_ids(bits, vocab_size, most)
    bits = bits.contiguous()
    B, W = bits.shape
    ids = torch.full((B, most), -1, dtype=torch.int32, device=bits.device)
    counts = torch.empty(B, dtype=torch.int32, device=bits.device)
    if B:
        _ids_launcher((bits.device, False), B, (bits, None, ids, counts, W, most, _BLOCK_W))
    return ids, counts


def reference_ids(bits: torch.Tensor, vocab_size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    mask = unpack_bits(bits, vocab_size)
    place = mask.cumsum(-1) - 1
    ids = torch.full((len(bits), most + 1), -1, dtype=torch.int32, device=bits.device)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=bits.device).expand_as(mask)
    ids.scatter_(1, torch.where(mask & (place < most), place, most), tokens)
    return ids[:, :most].contiguous(), mask.sum(-1, dtype=torch.int32)


def _fake_ids(bits: torch.Tensor, vocab_size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    return bits.new_empty((bits.shape[0], most)), bits.new_empty((bits.shape[0],))


register("kept_ids(Tensor bits, int vocab_size, int most) -> (Tensor, Tensor)", _ids, _fake_ids)


def ids_of_bits(bits: torch.Tensor, vocab_size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of packed sets, int32 ``[B, most]`` upward and -1 behind, and how many there are, int32 ``[B]``.

    A row with more than ``most`` has the lowest of them. Nothing waits for the GPU.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastlogits.kept_ids(bits, vocab_size, most)  # type: ignore[no-any-return]
    return _ids(bits, vocab_size, most)


@_OPERATION.falls_back
def ragged_ids(bits: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of packed sets, one row after the other, int32 ``[total]``, and where each begins, int64 ``[B + 1]``.

    Waits for the GPU, since only there the total is known.
    """
    if not _OPERATION.takes(bits, launch.FORCE_KERNEL):
        mask = unpack_bits(bits, vocab_size)
        ids = mask.nonzero(as_tuple=True)[1].int()
        counts = mask.sum(-1)
        return ids, torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    bits = bits.contiguous()
    B, W = bits.shape
    nothing: Any = torch.empty(0, dtype=torch.int32, device=bits.device)
    counts = torch.empty(B, dtype=torch.int32, device=bits.device)
    if B:
        _ids_launcher((bits.device, False), B, (bits, None, nothing, counts, W, 0, _BLOCK_W))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    ids = torch.empty(int(offsets[-1]), dtype=torch.int32, device=bits.device)
    if B:
        _ids_launcher((bits.device, True), B, (bits, offsets, ids, counts, W, 0, _BLOCK_W))
    return ids, offsets
