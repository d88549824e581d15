"""Keep what a selection has left of each row, and write the fill value everywhere else: in place, or to another tensor.

    out[b, v] = x[b, v] where v is alive in row b, else the fill value

where x is the logits as chain and temperature make them. A selection that writes the fill value before it has settled
loses what it may yet have to read; this, which comes after it, doesn't.

Bytes moved: one read and one write of the logits.
"""

from __future__ import annotations

import torch

from fastlogits_kernels._triton import Launcher, tl, triton
from fastlogits_kernels.bits import words
from fastlogits_kernels.fold import NO_SETS, Chain, set_strides
from fastlogits_kernels.select import Selection
from fastlogits_kernels.selection import row_logits
from fastlogits_kernels.settle import _alive
from fastlogits_kernels.token_sets import TokenSets

_STEPWISE = ["W", "parts", "stride_alive", "stride_temperature", "stride_set", "stride_bits_row", "stride_plane"]
_STEPWISE += ["stride_values_row"]
_UNALIGNED = ["temperature_ptr", "bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr", "alive_ptr"]


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _keep_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr, alive_ptr,
    # output
    out_ptr,
    # shapes
    V, W, parts,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_alive,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, FIRST: tl.constexpr, BANDED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    word = (program % parts) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane
    inside = token < V
    x = row_logits(row, word, lane, token, inside, V, access, OPS, MAX)
    here = alive_ptr + row * stride_alive
    alive = (tl.load(here), tl.load(here + 1), tl.load(here + 2).to(tl.float32, bitcast=True), tl.load(here + 3))
    rank = token
    if FIRST:
        rank = -token
    kept = tl.where(_alive(x, inside, rank, alive, BANDED), x, FILL)
    here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
    tl.store(here, kept.to(out_ptr.dtype.element_ty), mask=inside)


# Mask words of a program, 32 logits each: as for the fold.
_BLOCK_W = 32

_keep_launcher = Launcher(_keep_kernel, num_warps=4, enable_fp_fusion=False)


def launch_keep(
    scores: torch.Tensor,
    out: torch.Tensor,
    selection: Selection,
    alive: torch.Tensor,
    chain: Chain,
    found: TokenSets | None,
    temperature: torch.Tensor | None,
) -> None:
    """Write what is alive of ``scores`` ``[B, V]`` to ``out``, in place where the two are one tensor: one launch.

    ``alive`` is what ``launch_select`` returned for the other arguments. To an ``out`` of float32 nothing is rounded.
    """
    B, V = scores.shape
    W = words(V)
    parts = -(-W // _BLOCK_W)
    stride_row, stride_token = scores.stride()
    stride_out, stride_out_token = out.stride()
    bits, planes, row_values, _ = found or NO_SETS
    key = (
        scores.device, scores.dtype, out.dtype, V, chain.form, selection.form,
        None if temperature is None else temperature.dtype,
        scores.data_ptr() % 16, stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        out.data_ptr() % 16, stride_out == 1, stride_out % 16, stride_out >> 31, stride_out_token,
    )  # fmt: skip
    _keep_launcher(key, B * parts, (
        scores, temperature, bits, planes, chain.biases, row_values, chain.kernel_numbers(scores.device), alive,
        out,
        V, W, parts,
        stride_row, stride_token, stride_out, stride_out_token, alive.stride(0),
        0 if temperature is None or temperature.ndim == 0 else temperature.stride(0), *set_strides(found, W),
        chain.flat, torch.finfo(out.dtype).max, selection.fill, selection.first, selection.banded, _BLOCK_W,
    ))  # fmt: skip
