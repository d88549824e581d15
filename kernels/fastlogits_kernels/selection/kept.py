"""What a selection keeps of each row, as packed bits: for who needs it once tokens are sampled.

    bits[b, w] has bit i where token 32 * w + i of row b is kept and above -inf

Bytes moved: one read of the logits, and an eighth of a byte for each of them.
"""

from __future__ import annotations

import torch

from fastlogits_kernels.pointwise.fold import Chain
from fastlogits_kernels.pointwise.search import TokenSets
from fastlogits_kernels.runtime.bits import pack_bits, words
from fastlogits_kernels.runtime.launcher import Launcher, launch_key, tl, triton
from fastlogits_kernels.selection.launchers import maps_of
from fastlogits_kernels.selection.layout import Selection
from fastlogits_kernels.selection.row import (
    KEPT_AT,
    MAP_STRIDES,
    MAPS,
    TILE_W,
    Form,
    Maps,
    Scores,
    is_kept,
    load_kept,
    rank_of,
    scaled_logits,
)


@triton.jit(
    do_not_specialize=[*MAP_STRIDES, "W", "parts", "stride_kept"],
    do_not_specialize_on_alignment=[*MAPS, "kept_ptr", "kept_bits_ptr"],
)
def kept_bits_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    kept_ptr,
    # output
    kept_bits_ptr,
    # shapes
    V, W, parts,
    # strides
    stride_row, stride_token, stride_kept,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """What is kept of a part of a row."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    word = (program % parts) * TILE_W + tl.arange(0, TILE_W)
    lane = tl.arange(0, 32)[None, :]
    token = word[:, None] * 32 + lane
    inside = token < V
    x = scaled_logits(
        row, word[:, None], lane, token, inside, Scores(scores_ptr, stride_row, stride_token, V, W, maps),
        Form(OPS, MAX),
    )  # fmt: skip
    stays = is_kept(x, inside, rank_of(token, LOWEST_TIES), load_kept(kept_ptr + row * stride_kept), BANDED)
    stays = stays & (x != float("-inf"))
    packed = tl.sum(tl.where(stays, tl.full([], 1, tl.int32) << lane, 0), 1)
    tl.store(kept_bits_ptr + row * W + word, packed, mask=word < W)


_bits_launcher = Launcher(kept_bits_kernel, num_warps=4, enable_fp_fusion=False)
_FLOAT32_MAX = torch.finfo(torch.float32).max
_NO_CHAIN = Chain()


def launch_kept_bits(
    logits: torch.Tensor,
    selection: Selection,
    work: torch.Tensor,
    bits: torch.Tensor,
    chain: Chain | None = None,
    found: TokenSets | None = None,
    temperature: torch.Tensor | None = None,
) -> None:
    """Write what is kept of each row to ``bits``, contiguous int32 ``[B, W]``: one launch.

    ``work`` is what ``launch_select`` has returned for the other arguments.
    """
    B, V = logits.shape
    chain = chain or _NO_CHAIN
    W, kept = words(V), work[:, KEPT_AT.value :]
    parts = triton.cdiv(W, TILE_W.value)
    temperature_dtype = None if temperature is None else temperature.dtype
    key = (*launch_key(logits), chain.form, temperature_dtype, selection.lowest_ties, selection.banded)
    _bits_launcher(key, B * parts, (
        logits, *maps_of(chain, found, temperature, logits), kept, bits, V, W, parts,
        *logits.stride(), kept.stride(0), chain.flat, _FLOAT32_MAX, selection.lowest_ties, selection.banded,
    ))  # fmt: skip


def bits_of_scores(scores: torch.Tensor) -> torch.Tensor:
    """What is kept of each row where what is dropped is at -inf: int32 ``[B, W]``."""
    return pack_bits(scores != float("-inf"))
