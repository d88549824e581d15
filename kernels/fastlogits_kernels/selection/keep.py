"""Keep what a selection keeps of each row, and write the fill value everywhere else: in place, or to another tensor.

    out[b, v] = x[b, v] where v is kept in row b, else the fill value

where x is the logits as chain and temperature make them. A selection that writes the fill value before it is done
loses what it may yet have to read; this, which comes after it, doesn't.

Bytes moved: one read and one write of the logits.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlogits_kernels.pointwise.fold import Chain
from fastlogits_kernels.pointwise.search import TokenSets
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import Launch, Launcher, launch_key, tl, triton
from fastlogits_kernels.selection.goals import fitted
from fastlogits_kernels.selection.launchers import maps_of
from fastlogits_kernels.selection.layout import Selection
from fastlogits_kernels.selection.row import (
    KEPT_AT,
    MAP_STRIDES,
    MAPS,
    TOP_AT,
    Form,
    Maps,
    Scores,
    is_kept,
    load_float,
    load_kept,
    rank_of,
    scaled_logits,
)

_STEPWISE = ["W", "parts", "stride_kept", *MAP_STRIDES]
_UNALIGNED = [*MAPS, "kept_ptr"]


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _keep_kernel(
    # inputs
    scores_ptr, kept_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # output
    out_ptr,
    # shapes
    V, W, parts,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_kept,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    word = (program % parts) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane
    inside = token < V
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    x = scaled_logits(row, word, lane, token, inside, scores, Form(OPS, MAX))
    here = kept_ptr + row * stride_kept
    stays = is_kept(x, inside, rank_of(token, LOWEST_TIES), load_kept(here), BANDED)
    if maps.temperature_ptr is not None:
        x = fitted(x, load_float(here + TOP_AT - KEPT_AT), out_ptr)
    there = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
    tl.store(there, tl.where(stays, x, FILL).to(out_ptr.dtype.element_ty), mask=inside)


# Mask words of a program, 32 logits each: as for the fold.
_BLOCK_W = 32

_keep_launcher = Launcher(_keep_kernel, num_warps=4, enable_fp_fusion=False)


def launch_keep(
    scores: torch.Tensor,
    out: torch.Tensor,
    selection: Selection,
    kept: torch.Tensor,
    chain: Chain,
    found: TokenSets | None,
    temperature: torch.Tensor | None,
) -> None:
    """Write what is kept of ``scores`` ``[B, V]`` to ``out``, in place where the two are one tensor: one launch.

    ``kept`` is what ``kept_in`` says of the workspace of ``launch_select`` for the other arguments. To an ``out`` of
    float32 nothing is rounded.
    """
    launcher, key, programs, args = keep_launch(
        scores, out, selection, kept.stride(0), chain, found, temperature, (scores, kept, out)
    )
    launcher(key, programs, args)


def keep_launch(
    scores: torch.Tensor,
    out: torch.Tensor,
    selection: Selection,
    stride_kept: int,
    chain: Chain,
    found: TokenSets | None,
    temperature: torch.Tensor | None,
    given: tuple[Any, Any, Any],
) -> Launch:
    """The launch of ``launch_keep``; ``given`` is what the kernel is given of ``scores``, ``kept`` and ``out``."""
    B, V = scores.shape
    W = words(V)
    parts = -(-W // _BLOCK_W)
    key = (*launch_key(scores, out), chain.form, selection.form, None if temperature is None else temperature.dtype)
    return Launch(_keep_launcher, key, B * parts, (
        *given[:2], *maps_of(chain, found, temperature, scores), given[2], V, W, parts,
        *scores.stride(), *out.stride(), stride_kept,
        chain.flat, torch.finfo(out.dtype).max, selection.fill, selection.lowest_ties, selection.banded, _BLOCK_W,
    ))  # fmt: skip
