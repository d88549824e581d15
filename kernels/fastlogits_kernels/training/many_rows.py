"""Select, and add up what is kept, where there are many rows: one program does all of a row.

With a thousand rows and more, each phase of a row (its bounds, the read of its logits, the rules) can run beside other
phases of other rows, so that the memory is never idle. The phases are those of a selection, and so are their functions;
a row that its candidates don't decide is left open for the kernel that processes full rows.

Bytes moved: one read of the logits; a sample of a 37th of them; the candidates.
"""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.bounds import Known, _bounds, _raw_range, _store_bounds, _store_certain
from fastlogits_kernels.selection.collect import Collection, Excluded, collect, collect_between, load_candidates
from fastlogits_kernels.selection.goals import below_of
from fastlogits_kernels.selection.masses import KeptSums, inverse_divisor, log_of
from fastlogits_kernels.selection.refine import Candidates, _apply_all
from fastlogits_kernels.selection.row import (
    BRACKET,
    COLLECTED,
    COUNT_AT,
    DONE_AT,
    FULL_ROW,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    OCTET,
    RAW_CERTAIN_AT,
    ROW_SUMS_AT,
    RULES_AT,
    STATE_AT,
    STEPWISE,
    UNALIGNED,
    UNCUT,
    Certain,
    Form,
    Maps,
    RowSums,
    Scores,
    Shape,
    all_kept,
    divisor_of,
    inverse_of,
    is_candidate,
    is_certain,
    is_greedy,
    is_kept,
    key_of,
    load_float,
    number_of,
    rank_of,
    raw_scores,
    scaled,
    store_kept,
    weight_of,
)
from fastlogits_kernels.selection.row_sums import load_sums, sampled, store_row_sums, sums_asked
from fastlogits_kernels.training.rows import (
    BEGINS_ANYWHERE,
    FINISHED,
    Results,
    entropy_of,
    kept_in_raw,
    load_own,
    store_row,
)

_GROUPS = tl.constexpr(64)  # of a sample, as where its bounds are found
_CERTAIN = tl.constexpr(2048)  # tokens that are looked at at a time where some are kept for certain: four a thread


@triton.jit
def _known_of(
    row, shape, scores, form, values, work,
    KINDS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr, SAMPLE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A sample of a row, and its sums where a launch before has added them up."""
    nothing = tl.full([], 0.0, tl.float64)
    sums = RowSums(nothing, nothing, nothing, nothing)
    summed = tl.full([], False, tl.int1)
    top_key = tl.full([], LOWEST, tl.int32)
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * _GROUPS + tl.arange(0, _GROUPS)[None, :]
    x = sampled(row, flat, shape, scores, form, SAMPLE) * inverse_of(row, scores.maps)
    top = tl.max(x)
    if SUMS >= 1:
        asked = sums_asked(row, scores.V, values, scores.maps, KINDS, PLACES, False)
        summed = asked > 0
        if summed:
            top, sums = load_sums(work + shape.sums_at, shape.tiles, asked, SUMS, TILES)
            store_row_sums(work + ROW_SUMS_AT, sums)
            top_key = tl.where(top == float("inf"), KEY_OF_INFINITY, HIGHEST)
            top_key = tl.where(sums.mass == sums.mass, key_of(top), top_key)
    return Known(x, key_of(x), top, sums, summed, top_key)


@triton.jit
def _read_row(row, state, low, up, scores, to, BLOCK: tl.constexpr, PORTABLE: tl.constexpr):
    """Collect the candidates of a row between two raw logits."""
    for start in range(0, tl.where(state == COLLECTED, scores.V, 0), BLOCK):
        octet = start // OCTET + tl.arange(0, BLOCK // OCTET)[:, None]
        token = octet * OCTET + tl.arange(0, OCTET)[None, :]
        x = raw_scores(row, token, token < scores.V, scores)
        collect_between(x, token, scores.V, low, up, Excluded(None, None), to, PORTABLE)


@triton.jit
def _read_certain(
    row, state, low, up, top, scores, form, work, to, WEIGHED: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    """Sum up what is kept for certain of a row, and collect what is below it."""
    first, last = load_float(work + RAW_CERTAIN_AT), load_float(work + RAW_CERTAIN_AT + 1)
    count = tl.zeros([_CERTAIN // OCTET, OCTET], tl.int32)
    largest = tl.full([_CERTAIN // OCTET, OCTET], float("-inf"), tl.float32)
    mass = count.to(tl.int64)
    for start in range(0, tl.where(state == BRACKET, scores.V, 0), _CERTAIN):
        octet = start // OCTET + tl.arange(0, _CERTAIN // OCTET)[:, None]
        token = octet * OCTET + tl.arange(0, OCTET)[None, :]
        inside = token < scores.V
        x = raw_scores(row, token, inside, scores).to(tl.float32)
        certain = inside & (x >= first) & (x <= last)
        chosen = inside & ((x < low) == 0) & ((x > up) == 0) & (certain == 0)
        collect(chosen, x, token, to, PORTABLE)
        count += certain.to(tl.int32)
        largest = tl.maximum(largest, tl.where(certain, x, float("-inf")))
        if WEIGHED:
            mass += tl.where(certain, weight_of(scaled(x, row, scores.maps), top), 0)
    number = tl.sum(count)
    largest_key = tl.where(number > 0, key_of(scaled(tl.max(largest), row, scores.maps)), LOWEST)
    return number, tl.sum(mass), largest_key


@triton.jit
def _load_some(row, found, bounds, certain, known, scores, work, pairs, LOWEST_TIES: tl.constexpr, SLOTS: tl.constexpr):
    """The candidates of a row, raw and as the rules take them."""
    raw, valid, token = load_candidates(pairs, found, SLOTS)
    x = scaled(raw, row, scores.maps)
    beside = valid & is_certain(raw, work)
    valid = valid & is_candidate(x, number_of(bounds.low), bounds.banded, bounds.centre, False) & (beside == 0)
    some = Candidates(
        x, valid, beside, token, rank_of(token, LOWEST_TIES), certain, bounds.low, known.sums, scores.V, token,
    )  # fmt: skip
    return some, raw


@triton.jit
def _sums_of_some(row, some, raw, kept, own, joins, certain, known, maps, BELOW: tl.constexpr):
    """The sums of what is kept of candidates, of what was kept for certain, and of a target that joins them."""
    stays = is_kept(some.x, some.valid, some.rank, kept, False)
    raw_key = tl.max(tl.where(stays, key_of(raw), LOWEST))
    raw_key = tl.maximum(raw_key, tl.where(joins, key_of(own.raw), LOWEST))
    raw_top = number_of(raw_key)
    top = scaled(raw_top, row, maps)
    beyond = (certain.number > 0) & (known.top > top)
    raw_top = tl.where(beyond, known.top / inverse_divisor(row, maps), raw_top)
    top = tl.where(certain.number > 0, known.top, top)
    mass = tl.sum(tl.where(stays, weight_of(some.x, top), 0)) + certain.mass
    mass += tl.where(joins, weight_of(own.x, top), 0)
    below = tl.full([], 0, tl.int64)
    if BELOW:
        below += tl.sum(below_of(some.x, top, stays)) + tl.where(joins, below_of(own.x, top, joins), 0)
    return KeptSums(raw_top, top, mass, below)


@triton.jit
def _row_of_many(
    row, scores, values, targets_ptr, stride_target, ignore_index, work, shape, results,
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr,
    WEIGHED: tl.constexpr, LOWEST_TIES: tl.constexpr, BELOW: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr,
    TILES: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """All of a row, if its candidates decide it; else it is left open."""
    maps = scores.maps
    own = load_own(row, targets_ptr, stride_target, ignore_index, scores, Form((), 0.0))
    known = _known_of(row, shape, scores, Form((), 0.0), values, work, KINDS, PLACES, SUMS, SAMPLE, TILES)
    state, bounds = _bounds(
        row, known, shape, scores.V, values, work + RULES_AT, KINDS, LEASTS, PLACES, SUMS, BRACKETED, BITS
    )  # fmt: skip
    idle = own.ignored
    if maps.temperature_ptr is not None:
        idle = idle | is_greedy(maps.temperature_ptr + row * maps.stride_temperature)
    state = _store_certain(row, tl.where(idle, UNCUT, state), bounds, maps, work, BRACKETED)
    _store_bounds(row, state, bounds, known, maps, work)
    tl.debug_barrier()
    low, up = _raw_range(bounds, divisor_of(row, maps))
    to = Collection(work + COUNT_AT, work + shape.pairs_at, shape.slots)
    _read_row(row, state, low, up, scores, to, BLOCK, PORTABLE)
    none, nothing = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    certain = Certain(none, nothing, none + LOWEST, none + HIGHEST)
    if BRACKETED:
        number, mass, largest = _read_certain(
            row, state, low, up, known.top, scores, Form((), 0.0), work, to, WEIGHED, PORTABLE
        )  # fmt: skip
        certain = Certain(number, mass, largest, tl.where(state == BRACKET, bounds.high, HIGHEST))
    tl.debug_barrier()
    found = tl.load(work + COUNT_AT, volatile=True)
    listed = ((state == COLLECTED) | (state == BRACKET)) & (found <= tl.minimum(shape.slots, SLOTS))
    found = tl.where(listed, found, 0)
    pairs = (work + shape.pairs_at).to(tl.pointer_type(tl.int64))
    some, raw = _load_some(row, found, bounds, certain, known, scores, work, pairs, LOWEST_TIES, SLOTS)
    complete = (found >= scores.V) & (bounds.low == KEY_OF_MINUS_INFINITY)
    kept, _top_key, done = _apply_all(
        some, work + RULES_AT, complete, known.top_key, KINDS, LEASTS, SUMS, False, LOWEST_TIES
    )  # fmt: skip
    # NaN is no candidate beside tokens that were kept for certain.
    most = tl.max(tl.where(some.valid, key_of(some.x), LOWEST))
    done = done & listed & ((certain.number == 0) | (most <= KEY_OF_INFINITY))
    # What was kept for certain is weighed beside the largest logit only where that is known, and never for an entropy.
    done = done & ((certain.number == 0) | known.summed)
    if BELOW:
        done = done & (certain.number == 0)
    stays = is_kept(own.x, own.known, rank_of(own.token, LOWEST_TIES), kept, False)
    joins = own.known & (stays == 0) & (own.x == own.x)
    sums = _sums_of_some(row, some, raw, kept, own, joins, certain, known, maps, BELOW)
    if done:
        log_mass = log_of(sums.mass, sums.top, sums.mass > 0)
        store_row(
            row, own, joins, kept_in_raw(row, kept, maps), sums.raw_top, sums.top, log_mass, entropy_of(sums, log_mass),
            results,
        )  # fmt: skip
    # What follows takes only rows that are open, and from all of their logits.
    if state == UNCUT:
        kept = all_kept()
    store_kept(work, kept)
    tl.store(work + DONE_AT, (done | (state == UNCUT)).to(tl.int32))
    tl.store(work + STATE_AT, tl.where(done, FINISHED, tl.where(state == UNCUT, UNCUT, FULL_ROW)))


@triton.jit(
    do_not_specialize=[*STEPWISE, "stride_target", "rows", "stride_list"],
    do_not_specialize_on_alignment=[*UNALIGNED, *BEGINS_ANYWHERE],
)
def many_rows_kernel(
    # inputs
    scores_ptr, values, temperature_ptr, stride_temperature, targets_ptr, work_ptr,
    # outputs
    logprobs_ptr, entropy_ptr, outside_ptr, record_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share, rows,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_work, stride_list,
    # constants
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr,
    WEIGHED: tl.constexpr, LOWEST_TIES: tl.constexpr, BELOW: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr,
    TILES: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Rows one after the other; the lists of a program's candidates stand behind the workspace of all rows."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    results = Results(logprobs_ptr, entropy_ptr, outside_ptr, record_ptr)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + index
        pairs_of_row = (rows - row) * stride_work + tl.program_id(0) * stride_list
        shape = Shape(
            W, tiles, parts, slots, sums_at, parts_at, pairs_of_row, capacity, room, runs, sample_size, share
        )  # fmt: skip
        _row_of_many(
            row, scores, values, targets_ptr, stride_target, ignore_index, work_ptr + row * stride_work, shape, results,
            KINDS, LEASTS, PLACES, SUMS, BRACKETED, WEIGHED, LOWEST_TIES, BELOW, SAMPLE, BITS, TILES, SLOTS, BLOCK,
            PORTABLE,
        )  # fmt: skip
        # Other threads may still read the list.
        tl.debug_barrier()
