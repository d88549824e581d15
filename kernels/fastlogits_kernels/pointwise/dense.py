"""What an engine has put together as whole rows of numbers and bits, applied to the logits in one pass, in place.

    x = logits[b, v] + added[b // repeat, v]
    x = x * scales[b // repeat, v] where x < 0, else x / scales[b // repeat, v]
    x = -inf  for every v whose bit is not set in bitmask[b]
    logits[b, v] = x + biases[b // repeat, v]

Any of the four may be absent. After each of them x is rounded to the dtype of the logits, as if each were a kernel of
its own. ``repeat`` rows of a request share its numbers, for drafts. Bytes moved: one read and one write of the logits,
4 bytes for each number, one bit a logit for the bitmask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import WORD_BITS, ban_unset_, words
from fastlogits_kernels.runtime.launcher import Launcher, launch_key, row_stride, tl, triton

FORCE_KERNEL = False
"""Take the kernel for tensors on the CPU too; for tests, with Triton's interpreter."""

_OPERATION = Operation("edit_densely_")
# Words of 32 logits of a program: 16-byte accesses of four warps.
_BLOCK_W = 32
_STEPWISE = ["W", "row_blocks", "repeat", "stride_added", "stride_scales", "stride_mask", "stride_biases"]
_UNALIGNED = ["added_ptr", "scales_ptr", "bitmask_ptr", "biases_ptr"]


class DenseEdits(NamedTuple):
    """What is applied; None for nothing. Contiguous in their last dimension, on the device of the logits."""

    added: torch.Tensor | None = None
    """float32 ``[B / repeat, V]``."""
    scales: torch.Tensor | None = None
    """float32 ``[B / repeat, V]``."""
    bitmask: torch.Tensor | None = None
    """int32 ``[B, W]``: bit ``i`` of word ``w`` is set where token ``32 * w + i`` is allowed; ``W`` covers them all."""
    biases: torch.Tensor | None = None
    """float32 ``[B / repeat, V]``."""


@triton.jit
def _row_of(ptr, row, stride, token, inside):
    return tl.load(ptr + row * stride + token, mask=inside, other=0.0)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _dense_kernel(
    # inputs
    added_ptr, scales_ptr, bitmask_ptr, biases_ptr,
    # output
    logits_ptr,
    # shapes
    V, W, row_blocks, repeat,
    # strides
    stride_row, stride_token, stride_added, stride_scales, stride_mask, stride_biases,
    # constants
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // row_blocks).to(tl.int64)
    request = row // repeat
    word = (program % row_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]  # [BLOCK_W, 1]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane  # [BLOCK_W, 32]
    inside = token < V
    here = logits_ptr + row * stride_row + token.to(tl.int64) * stride_token
    dtype = logits_ptr.dtype.element_ty
    x = tl.load(here, mask=inside).to(tl.float32)
    if added_ptr is not None:
        x = (x + _row_of(added_ptr, request, stride_added, token, inside)).to(dtype).to(tl.float32)
    if scales_ptr is not None:
        scale = _row_of(scales_ptr, request, stride_scales, token, inside)
        x = tl.where(x < 0, x * scale, tl.div_rn(x, scale)).to(dtype).to(tl.float32)
    if bitmask_ptr is not None:
        allowed = tl.load(bitmask_ptr + row * stride_mask + word, mask=word < W, other=0)
        x = tl.where(((allowed >> lane) & 1) != 0, x, float("-inf"))
    if biases_ptr is not None:
        x = x + _row_of(biases_ptr, request, stride_biases, token, inside)
    tl.store(here, x.to(dtype), mask=inside)


_dense_launcher = Launcher(_dense_kernel, num_warps=4, enable_fp_fusion=False)


def launch_dense_(logits: torch.Tensor, edits: DenseEdits, repeat: int) -> None:
    """Apply the edits in place: one launch."""
    B, V = logits.shape
    row_blocks = triton.cdiv(words(V), _BLOCK_W)
    given = (edits.added, edits.scales, edits.bitmask, edits.biases)
    W = 0 if edits.bitmask is None else edits.bitmask.shape[1]
    key = (*launch_key(logits), tuple([each is None for each in given]))
    _dense_launcher(key, B * row_blocks, (
        *given, logits, V, W, row_blocks, repeat,
        *logits.stride(), *map(row_stride, given),
        _BLOCK_W,
    ))  # fmt: skip


def reference_dense_(logits: torch.Tensor, edits: DenseEdits, repeat: int) -> None:
    """The same in torch, and the path of the CPU."""
    added, scales, biases = (
        None if rows is None else rows.repeat_interleave(repeat, 0)
        for rows in (edits.added, edits.scales, edits.biases)
    )
    if added is not None:
        logits.add_(added)
    if scales is not None:
        logits.copy_(torch.where(logits < 0, logits * scales, logits / scales))
    if edits.bitmask is not None:
        ban_unset_(logits, edits.bitmask)
    if biases is not None:
        logits.add_(biases)


@_OPERATION.falls_back
def edit_densely_(logits: torch.Tensor, edits: DenseEdits, repeat: int = 1) -> torch.Tensor:
    """Apply an engine's edits to ``logits`` in place, and return them.

    Args:
        logits: ``[B, V]`` of any strides; float32, float16 or bfloat16.
        edits: see there.
        repeat: how many rows in a row share the numbers of a request.

    Raises:
        ValueError: edits that don't fit the logits.
    """
    B, V = logits.shape
    for name, each in edits._asdict().items():
        if each is None:
            continue
        rows, width = (B, each.shape[-1]) if name == "bitmask" else (B // repeat, V)
        dtype = torch.int32 if name == "bitmask" else torch.float32
        fits = each.shape == (rows, width) and (name != "bitmask" or width * WORD_BITS >= V)
        if not fits or each.dtype != dtype or (V > 1 and each.stride(1) != 1):
            raise ValueError(
                f"{name} must be {dtype} of {rows} rows that cover {V} tokens, contiguous in each, got {each.dtype} of "
                f"{tuple(each.shape)} and strides {each.stride()}"
            )
    if logits.numel() and any(each is not None for each in edits):
        apply = launch_dense_ if _OPERATION.takes(logits, FORCE_KERNEL) else reference_dense_
        apply(logits, edits, repeat)
    return logits
