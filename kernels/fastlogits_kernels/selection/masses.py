"""The mass of what is kept of each row: of what a distribution's probabilities are shares.

    log_mass[b] = log(sum over the kept v of exp(x[b, v] - top[b])),   top[b] the largest x of what is kept

A sampler that reports log-probabilities and a trainer that computes them again get the same number, bit for bit, since
both add up the same integers, and integers have one sum in any order:

- Of a row of which rules may drop something, probabilities in units of the largest one (``weight_of``). The candidates
  of a selection are at hand, so next to nothing is read again; a row that was processed as a whole is read twice more.
- Of a row that is kept as a whole, the same tile by tile (``tiles``): one read.

Bytes moved: the candidates of each row, 8 bytes each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.pointwise.fold import Chain
from fastlogits_kernels.pointwise.search import TokenSets
from fastlogits_kernels.runtime.launcher import Launcher, launch_key, tl, triton
from fastlogits_kernels.selection.goals import below_of, load_certain
from fastlogits_kernels.selection.launchers import maps_of
from fastlogits_kernels.selection.layout import Selection
from fastlogits_kernels.selection.row import (
    BRACKET,
    COLLECTED,
    COUNT_AT,
    DONE_AT,
    KEPT_AT,
    LOWEST,
    ONE,
    STATE_AT,
    STEPWISE,
    TOP_AT,
    TOP_KEY_AT,
    UNALIGNED,
    Form,
    Maps,
    Scores,
    Shape,
    folded_logits,
    is_certain,
    is_greedy,
    is_kept,
    key_of,
    load_float,
    load_kept,
    number_of,
    rank_of,
    scaled,
    weight_of,
)

_ONE = ONE.value
_PER_ONE = tl.constexpr(1 / _ONE)
BLOCK = 1024
"""Tokens that a program looks at at once."""


# -- A row that is kept as a whole ------------------------------------------------------------------------------------


@triton.jit
def log_of(mass, top, defined):
    """The logarithm of a mass, float32; NaN where the largest logit is no finite number, or nothing is defined."""
    log_mass = tl.log((mass.to(tl.float64) * _PER_ONE).to(tl.float32))
    return tl.where(defined & (tl.abs(top) < float("inf")), log_mass, float("nan"))


# -- What a selection keeps ------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the tokens of a row are looked at: in a list of candidates, or in the row; and how many."""

    listed: tl.tensor
    pairs: tl.tensor
    size: tl.tensor
    work: tl.tensor


class KeptSums(NamedTuple):
    """The largest logit of what is kept, before and after the temperature; mass and mass times distance, int64."""

    raw_top: tl.tensor
    top: tl.tensor
    mass: tl.tensor
    below: tl.tensor


@triton.jit
def is_whole(row, kept, maps):
    """Whether a row is kept as a whole: no rule has dropped anything, or it is greedy."""
    whole = (kept.cutoff == LOWEST) & (kept.farthest == LOWEST)
    if maps.temperature_ptr is not None:
        whole = whole | is_greedy(maps.temperature_ptr + row * maps.stride_temperature)
    return whole


@triton.jit
def source_of(work, shape, whole, V, CERTAIN: tl.constexpr):
    """Where what is kept of a row is found, and whether tokens beside a list were kept for certain.

    A list that was refined in registers holds all that isn't. ``CERTAIN`` where the filter has weighed those; else a
    row that has any is looked at itself.
    """
    state, found = tl.load(work + STATE_AT), tl.load(work + COUNT_AT)
    certain = state == BRACKET
    listed = state == COLLECTED
    if CERTAIN:
        # They were weighed beside the largest logit of the row where its sums are known.
        listed = listed | (certain & (tl.load(work + TOP_KEY_AT) > LOWEST))
    listed = listed & (found <= shape.slots) & (tl.load(work + DONE_AT) != 0)
    pairs = (work + shape.pairs_at).to(tl.pointer_type(tl.int64))
    size = tl.where(whole, 0, tl.where(listed, found, V))
    return Source(listed, pairs, size, work), certain & listed


@triton.jit
def _load_block(start, row, source, scores, form, BLOCK: tl.constexpr):
    """Folded logits, whether they are there, and tokens."""
    place = start + tl.arange(0, BLOCK)
    inside = place < source.size
    if source.listed:
        pair = tl.load(source.pairs + place, mask=inside, other=0)
        token = (pair >> 32).to(tl.int32)
        x = pair.to(tl.int32).to(tl.float32, bitcast=True)
        # What may be sampled and is kept for certain was collected too.
        inside = inside & (is_certain(x, source.work) == 0)
    else:
        token = place
        x = folded_logits(row, token >> 5, token & 31, token, inside, scores, form)
    return x, inside, token


@triton.jit
def sums_of_kept(
    row, source, kept, beside, shape, own, own_joins, scores, form,
    LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr, CERTAIN: tl.constexpr, BELOW: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of what is kept of a row, and of a token of folded logit ``own`` where that ``own_joins`` it.

    ``beside`` says whether tokens were kept for certain beside a list.
    """
    top_key = tl.where(own_joins, key_of(own), LOWEST)
    for start in range(0, source.size, BLOCK):
        x, inside, token = _load_block(start, row, source, scores, form, BLOCK)
        stays = is_kept(scaled(x, row, scores.maps), inside, rank_of(token, LOWEST_TIES), kept, BANDED)
        top_key = tl.maximum(top_key, tl.max(tl.where(stays, key_of(x), LOWEST)))
    raw_top = number_of(top_key)
    top = scaled(raw_top, row, scores.maps)
    mass = tl.where(own_joins, weight_of(scaled(own, row, scores.maps), top), tl.full([], 0, tl.int64))
    below = tl.full([], 0, tl.int64)
    if CERTAIN:
        if beside:
            known = load_float(source.work + TOP_AT)
            raw_top = tl.where(known > top, known / inverse_divisor(row, scores.maps), raw_top)
            top = known
            mass = tl.where(own_joins, weight_of(scaled(own, row, scores.maps), top), mass)
            mass += load_certain(source.work, shape, tl.full([], BRACKET, tl.int32), PARTS).mass
    if BELOW:
        below += tl.where(own_joins, below_of(scaled(own, row, scores.maps), top, own_joins), 0)
    for start in range(0, source.size, BLOCK):
        x, inside, token = _load_block(start, row, source, scores, form, BLOCK)
        x = scaled(x, row, scores.maps)
        stays = is_kept(x, inside, rank_of(token, LOWEST_TIES), kept, BANDED)
        mass += tl.sum(tl.where(stays, weight_of(x, top), 0))
        if BELOW:
            below += tl.sum(below_of(x, top, stays))
    return KeptSums(raw_top, top, mass, below)


@triton.jit
def inverse_divisor(row, maps):
    """One over what divides the logits of a row, for numbers that may be a little off."""
    inverse = tl.full([], 1.0, tl.float32)
    if maps.temperature_ptr is not None:
        here = maps.temperature_ptr + row * maps.stride_temperature
        inverse = tl.where(is_greedy(here), 1.0, 1.0 / tl.load(here).to(tl.float32))
    return inverse


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def masses_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    work_ptr,
    # output
    masses_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # strides
    stride_row, stride_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr, CERTAIN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit of what is kept of a row, and the logarithm of its mass; NaN for a row that is kept whole."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    kept = load_kept(work + KEPT_AT)
    whole = is_whole(row, kept, maps)
    source, beside = source_of(work, shape, whole, V, CERTAIN)
    nothing, no = tl.full([], 0.0, tl.float32), tl.full([], False, tl.int1)
    sums = sums_of_kept(
        row, source, kept, beside, shape, nothing, no, scores, Form(OPS, MAX),
        LOWEST_TIES, BANDED, CERTAIN, False, PARTS, BLOCK,
    )  # fmt: skip
    log_mass = log_of(sums.mass, sums.top, sums.mass > 0)
    tl.store(masses_ptr + 2 * row, tl.where(whole, float("nan"), sums.top))
    tl.store(masses_ptr + 2 * row + 1, tl.where(whole, float("nan"), log_mass))


# -- The host --------------------------------------------------------------------------------------------------------

_launcher = Launcher(masses_kernel, num_warps=4, enable_fp_fusion=False)
_FLOAT32_MAX = torch.finfo(torch.float32).max


def weighs_certain(selection: Selection) -> bool:
    """Whether what a selection keeps for certain is weighed, where it keeps any."""
    return selection.bracketed and selection.weighed and not selection.banded


def launch_masses(
    logits: torch.Tensor,
    selection: Selection,
    work: torch.Tensor,
    chain: Chain,
    found: TokenSets | None,
    temperature: torch.Tensor | None,
) -> torch.Tensor | None:
    """The largest logit and the log-mass of what is kept of each row, float32 ``[B, 2]``: one launch.

    NaN for rows that are kept as a whole; None where all are. ``work`` is what ``launch_select`` has returned for the
    other arguments.
    """
    if not selection.kinds:
        return None
    masses = torch.empty((len(logits), 2), dtype=torch.float32, device=logits.device)
    layout = selection.layouts[logits.element_size()]
    temperature_dtype = None if temperature is None else temperature.dtype
    key = (*launch_key(logits), chain.form, selection.form, temperature_dtype)
    _launcher(key, len(logits), (
        logits, *maps_of(chain, found, temperature, logits), work, masses,
        logits.shape[1], *layout.shape, *logits.stride(), work.stride(0),
        chain.flat, _FLOAT32_MAX, selection.lowest_ties, selection.banded, weighs_certain(selection),
        layout.PARTS, BLOCK,
    ))  # fmt: skip
    return masses


def reference_mass(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The mass of float32 ``scores`` ``[B, V]`` beside their largest ``[B, 1]``, int64 in the units of the kernels.

    An integer, so that it depends on nothing but the scores, and may be added up in parts; the exponential in float64,
    since that of float32 depends on where a number stands in memory.
    """
    mass = (scores - top).double().exp_().mul_(_ONE).nan_to_num_(0.0, 0.0, 0.0)
    return mass.long().sum(-1, keepdim=True)


def reference_below(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The same of mass times distance from the largest score."""
    off = (top - scores).double()
    below = off.neg().exp_().mul_(_ONE).mul_(off).nan_to_num_(0.0, 0.0, 0.0)
    return below.long().sum(-1, keepdim=True)


def reference_log_of(mass: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The logarithm of a mass; NaN where the largest score is not finite."""
    return torch.where(top.isfinite(), (mass.double() / _ONE).float().log(), float("nan"))


def reference_log_mass(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mass of ``scores`` ``[B, V]`` beside their largest ``[B, 1]``; NaN where that is not finite.

    Scores of float64 are added up as they are.
    """
    if scores.dtype == torch.float64:
        return torch.where(top.isfinite(), (scores - top).logsumexp(-1, keepdim=True), float("nan"))
    return reference_log_of(reference_mass(scores, top), top)
