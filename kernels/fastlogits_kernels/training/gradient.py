"""The gradient of log-probabilities and entropies with respect to the logits: one read, and one write.

    d[b, v] = (g[b] * [v = t] - p[b, v] * (g[b] + h[b] * (log p[b, v] + H[b]))) / T[b]

where p is the softmax over what is kept of row b and its target t, 0 for the other tokens; g and h are the gradients of
the log-probability and of the entropy H. What is kept is constant. A row whose g and h are 0 is not read, and has 0.
Each element is read and written by one thread, so that the gradient may take the place of the logits.

Where token ids are given, only their logits are read, before all of the row becomes 0.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import (
    LOG2_E,
    Kept,
    Maps,
    inverse_of,
    is_kept,
    load_float,
    rank_of,
    scaled,
)
from fastlogits_kernels.training.rows import (
    ABOVE_AT,
    CENTRE_AT,
    CUTOFF_AT,
    ENTROPY_AT,
    FARTHEST_AT,
    FIRST_AT,
    LISTED,
    LOG_MASS_AT,
    PACKED,
    RANK_AT,
    RAW_TOP_AT,
    SELECTED,
    SETS,
    STEPWISE_SETS,
    WORDS,
    Sets,
    in_bits,
    span_of,
)

_LN_2 = tl.constexpr(0.6931471805599453)


class Incoming(NamedTuple):
    """The gradients of a row's log-probability and entropy, its target, and whether it has any gradient."""

    logprob: tl.tensor
    entropy: tl.tensor
    target: tl.tensor
    acts: tl.tensor


class Softmax(NamedTuple):
    """What makes probabilities of raw logits: their largest, a factor, what is subtracted then.

    Then the entropy, and one over the temperature.
    """

    top: tl.tensor
    factor: tl.tensor
    offset: tl.tensor
    entropy: tl.tensor
    inverse: tl.tensor


@triton.jit
def load_incoming(row, grads_ptr, stride_grad, entropies_ptr, stride_entropy, targets_ptr, stride_target, ignore):
    """What comes to a row."""
    g = tl.load(grads_ptr + row * stride_grad).to(tl.float32)
    h = tl.zeros_like(g)
    if entropies_ptr is not None:
        h = tl.load(entropies_ptr + row * stride_entropy).to(tl.float32)
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    return Incoming(g, h, target, ((g != 0) | (h != 0)) & (target != ignore))


@triton.jit
def load_softmax(row, record, maps):
    """The distribution of a row from its record."""
    inverse = inverse_of(row, maps)
    return Softmax(
        load_float(record + RAW_TOP_AT), inverse * LOG2_E, load_float(record + LOG_MASS_AT) * LOG2_E,
        load_float(record + ENTROPY_AT), inverse,
    )  # fmt: skip


@triton.jit
def gradient_of(x, kept, is_target, incoming, softmax, ENTROPY: tl.constexpr):
    """The gradient of raw logits, float32."""
    logarithm = (x - softmax.top) * softmax.factor - softmax.offset
    # A row without a distribution has NaN throughout.
    p = tl.where(kept | is_target, tl.exp2(logarithm), softmax.offset * 0)
    share = tl.zeros_like(p) + incoming.logprob
    if ENTROPY:
        surprise = tl.where(p > 0, logarithm * _LN_2 + softmax.entropy, 0.0)
        share += incoming.entropy * surprise
    return (tl.where(is_target, incoming.logprob, 0.0) - p * share) * softmax.inverse


@triton.jit
def _kept_of_record(x, token, inside, row, record, maps, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr):
    """What is kept of raw logits, by the record of their row."""
    if BANDED:
        kept = Kept(
            tl.load(record + CUTOFF_AT), tl.load(record + RANK_AT), load_float(record + CENTRE_AT),
            tl.load(record + FARTHEST_AT),
        )  # fmt: skip
        stays = is_kept(scaled(x, row, maps), inside, rank_of(token, LOWEST_TIES), kept, True)
    else:
        ranked = rank_of(token, LOWEST_TIES) >= tl.load(record + RANK_AT)
        stays = (x >= load_float(record + ABOVE_AT)) | ((x >= load_float(record + FIRST_AT)) & ranked)
    return stays


_STEPWISE = ["stride_temperature", "stride_target", "stride_grad", "stride_entropy_grad", "parts", *STEPWISE_SETS]
_UNALIGNED = ["temperature_ptr", "targets_ptr", "grads_ptr", "entropy_grads_ptr", "record_ptr", "values_ptr", *SETS]


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def gradient_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, grads_ptr, entropy_grads_ptr, record_ptr,
    ids_ptr, counts_ptr, offsets_ptr, bits_ptr,
    # output
    out_ptr,
    # shapes
    V, parts, most, first, all_tokens,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_target, stride_grad, stride_entropy_grad,
    stride_ids, stride_counts, stride_bits,
    # constants
    SOURCE: tl.constexpr, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of a row; where token ids are given, only of rows that are kept as a whole, else 0."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    token = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    incoming = load_incoming(
        row, grads_ptr, stride_grad, entropy_grads_ptr, stride_entropy_grad, targets_ptr, stride_target, ignore_index
    )  # fmt: skip
    reads = incoming.acts
    if SOURCE == LISTED:
        sets = Sets(
            ids_ptr, counts_ptr, offsets_ptr, bits_ptr, stride_ids, stride_counts, stride_bits, most, first, all_tokens
        )  # fmt: skip
        _begin, _size, whole, _overflows = span_of(row, sets)
        reads = reads & whole
    here = scores_ptr + row * stride_row + token.to(tl.int64) * stride_token
    x = tl.load(here, mask=token < tl.where(reads, V, 0), other=float("-inf")).to(tl.float32)
    record = record_ptr + row * WORDS
    kept = inside
    if SOURCE == SELECTED:
        kept = _kept_of_record(x, token, inside, row, record, maps, LOWEST_TIES, BANDED)
    elif SOURCE == PACKED:
        kept = in_bits(bits_ptr + row * stride_bits, token + first, inside)
    softmax = load_softmax(row, record, maps)
    d = gradient_of(x, kept, token == incoming.target, incoming, softmax, entropy_grads_ptr is not None)
    there = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
    nothing = tl.where(incoming.acts, softmax.offset * 0, 0.0)
    tl.store(there, tl.where(reads, d, nothing).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def listed_gradient_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, grads_ptr, entropy_grads_ptr, record_ptr,
    ids_ptr, counts_ptr, offsets_ptr,
    # output
    values_ptr, own_values_ptr, out_ptr,
    # shapes
    V, most, first, all_tokens,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_target, stride_grad, stride_entropy_grad,
    stride_ids, stride_counts,
    # constants
    PUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits of token ids, into ``values``; or from there to their places in the gradient."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    row = tl.program_id(0).to(tl.int64)
    sets = Sets(ids_ptr, counts_ptr, offsets_ptr, None, stride_ids, stride_counts, 0, most, first, all_tokens)
    begin, size, whole, _overflows = span_of(row, sets)
    begin_of_values = begin
    if offsets_ptr is None:
        begin_of_values = row * most
    incoming = load_incoming(
        row, grads_ptr, stride_grad, entropy_grads_ptr, stride_entropy_grad, targets_ptr, stride_target, ignore_index
    )  # fmt: skip
    softmax = load_softmax(row, record_ptr + row * WORDS, maps)
    size = tl.where(incoming.acts, size, 0)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + begin + place, mask=place < size, other=-1).to(tl.int64) - first
        inside = (token >= 0) & (token < V)
        if PUTS:
            d = tl.load(values_ptr + begin_of_values + place, mask=inside, other=0.0)
            there = out_ptr + row * stride_out + token * stride_out_token
            tl.store(there, d.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            x = tl.load(scores_ptr + row * stride_row + token * stride_token, mask=inside, other=float("-inf"))
            is_target = token == incoming.target
            d = gradient_of(x.to(tl.float32), inside, is_target, incoming, softmax, entropy_grads_ptr is not None)
            tl.store(values_ptr + begin_of_values + place, d, mask=place < size)
    # The target's is the same number where it is one of them.
    known = incoming.acts & (incoming.target >= 0) & (incoming.target < V) & (whole == 0)
    if PUTS:
        there = out_ptr + row * stride_out + incoming.target * stride_out_token
        tl.store(there, tl.load(own_values_ptr + row).to(out_ptr.dtype.element_ty), mask=known)
    else:
        own = tl.load(scores_ptr + row * stride_row + incoming.target * stride_token, mask=known, other=float("-inf"))
        d = gradient_of(own.to(tl.float32), known, known, incoming, softmax, entropy_grads_ptr is not None)
        tl.store(own_values_ptr + row, d)
