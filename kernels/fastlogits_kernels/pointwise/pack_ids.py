"""The set of the tokens that occur in each row, as packed bits: the allowed words of ``mask_tokens``.

    bits[b, v // 32] |= 1 << (v % 32)   for every v = ids[b, i] with 0 <= v < V

Bytes moved: the ids once and ``V / 8`` bytes a row; ids outside the vocabulary, padding among them, are left out.
"""

from __future__ import annotations

import torch

from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import pack_bits, words
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.runtime.library import register

_BLOCK_L = 256


@triton.jit(
    do_not_specialize=["V", "W", "L", "row_blocks", "stride_row", "stride_id"],
    do_not_specialize_on_alignment=["ids_ptr"],
)
def _pack_ids_kernel(
    # inputs
    ids_ptr,
    # output
    bits_ptr,
    # shapes
    V, W, L, row_blocks,
    # strides
    stride_row, stride_id,
    # constants
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // row_blocks).to(tl.int64)
    column = (program % row_blocks) * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    here = ids_ptr + row * stride_row + column.to(tl.int64) * stride_id
    token = tl.load(here, mask=column < L, other=-1)
    known = (token >= 0) & (token < V)
    bit = tl.full([BLOCK_L], 1, tl.int32) << (token % 32).to(tl.int32)
    tl.atomic_or(bits_ptr + row * W + token // 32, bit, mask=known, sem="relaxed")


# Its bits become tables of a chain, or the allowed rows of a processor.
_pack_ids_launcher = Launcher(_pack_ids_kernel, fills_tables=True, num_warps=4)


def launch_pack_ids(ids: torch.Tensor, bits: torch.Tensor, vocab_size: int) -> None:
    """Add the tokens of ``ids`` ``[B, L]`` to the contiguous ``bits`` ``[B, W]``."""
    B, L = ids.shape
    if B == 0 or L == 0:
        return
    row_blocks = -(-L // _BLOCK_L)
    args = (ids, bits, vocab_size, bits.shape[1], L, row_blocks, *ids.stride(), _BLOCK_L)
    _pack_ids_launcher((ids.device, ids.dtype), B * row_blocks, args)


def reference_pack_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The same in torch, and the path of the CPU."""
    known = (ids >= 0) & (ids < vocab_size)
    # One column more than the vocabulary takes what is not in it.
    rows = torch.zeros(ids.shape[0], vocab_size + 1, dtype=torch.bool, device=ids.device)
    rows.scatter_(1, torch.where(known, ids, vocab_size).long(), True)
    return pack_bits(rows[:, :-1])


_OPERATION = Operation("pack_ids")


@_OPERATION.falls_back
def _pack_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    if not _OPERATION.takes(ids):
        return reference_pack_ids(ids, vocab_size)
    bits = torch.zeros(ids.shape[0], words(vocab_size), dtype=torch.int32, device=ids.device)
    launch_pack_ids(ids, bits, vocab_size)
    return bits


register(
    "pack_ids(Tensor ids, SymInt vocab_size) -> Tensor",
    _pack_ids,
    lambda ids, vocab_size: ids.new_empty((ids.shape[0], words(vocab_size)), dtype=torch.int32),
)


def pack_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Packed words int32 ``[B, ceil(V / 32)]`` of the tokens that occur in each row of ``ids`` ``[B, L]``."""
    if torch.compiler.is_compiling():
        return torch.ops.fastlogits.pack_ids(ids, vocab_size)  # type: ignore[no-any-return]
    return _pack_ids(ids, vocab_size)
