"""What the requests of a serving step do to their logits: one search for all of them, whatever they ask for.

For each row, of the tables in ``layout``:

    bans     the tokens that get -inf: masks, n-grams, sequences, stop tokens that come too early, a grammar's bitmask
    edits    the tokens whose logits change otherwise (biases, penalties), and what they become
    numbers  what a sample takes per row: temperature, parameters of the rules, seed and position

Bytes moved: three bits a logit (bans, edits, and a rank for each word of them), the masks that are in use, some 30
bytes for each token of the history that no index covers, and some 40 for each edited token. A program owns some words
of a row, and no program waits for another. The README of this folder says how edits are stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlogits_kernels.history import (
    LONGEST,
    OwnWords,
    Text,
    holds,
    is_mine,
    mark,
    mark_endings,
    mark_text,
    match_length,
    own_count,
    splits_of,
    token_at,
    word_at,
)
from fastlogits_kernels.pointwise.fold import popcount
from fastlogits_kernels.pointwise.search import Listed, TokenSets
from fastlogits_kernels.runtime.bits import words as words_of
from fastlogits_kernels.runtime.launcher import Launch, Launcher, tl, triton
from fastlogits_kernels.selection.launchers import overlaps
from fastlogits_kernels.selection.row import TINY_TEMPERATURE, let_next_launch
from fastlogits_kernels.serving.index import counts_in, covered_of, spans_of
from fastlogits_kernels.serving.layout import (
    ACTIVE,
    BAN_MASK,
    BAN_PLANE,
    BANS,
    BIASES,
    BITMASK,
    BREAKER_MASK,
    BREAKER_PLANE,
    CARRY,
    COUNT_PLANES,
    DRY,
    FIRST_MASK,
    FIRST_PLANE,
    FIRST_WINDOW,
    FIRSTS,
    FLAGS,
    FORCED,
    FREQUENCY,
    GRAM,
    INTEGERS,
    LISTS,
    LOGPROBS,
    MIN_TOKENS,
    NEEDS_BITMASK,
    NGRAM,
    OFF,
    OUTPUT_COUNTS,
    OUTPUT_REPETITION,
    PRESENCE,
    REPETITION,
    RULE_KINDS,
    RULES,
    SEED,
    SEQUENCE_WIDTH,
    SEQUENCES,
    STOPS,
    TALLIED,
    TEMPERATURE,
    Numbers,
    Semantics,
    Slots,
    StepRows,
    bits_of,
)

# Sets of a row.
BANNED = tl.constexpr(0)
EDITED = tl.constexpr(1)
RANKS = tl.constexpr(2)  # at which rank the edited tokens of each word begin
SETS = 3

# What is tallied of an edited token: its occurrences, the longest repetition that it would extend, and whether the
# repetition penalty is for it.
_DRY_AT = tl.constexpr(24)
_DRY_BITS = tl.constexpr(63)
_COUNT_BITS = tl.constexpr(2**24 - 1)
_REPEATED = tl.constexpr(2**30)

_TURN = tl.constexpr(1024)  # places of a text that are looked at at a time: more of them take too many registers
_LONGEST = tl.constexpr(LONGEST)
_OFF = tl.constexpr(tuple(value if INTEGERS[i] else bits_of(value) for i, value in enumerate(OFF.values())))
"""As bits."""
_GREEDY = tl.constexpr(bits_of(0.0))
_UNSCALED = tl.constexpr(bits_of(1.0))
_N_RULES = tl.constexpr(len(RULE_KINDS))
_BAN_PLANE = tl.constexpr(BAN_PLANE)
_FIRST_PLANE = tl.constexpr(FIRST_PLANE)
_BREAKER_PLANE = tl.constexpr(BREAKER_PLANE)

_UNALIGNED = ["scores_ptr", "slots_ptr", "cache_position_ptr", "local_ptr", "drafts_ptr", "bitmask_ptr", "records_ptr"]
_UNALIGNED += ["masks_ptr", "history_ptr", "lengths_ptr", "prompts_ptr", "bits_ptr", "cursors_ptr", "tallies_ptr"]
_UNALIGNED += ["values_ptr", "listed_ptr", "spans_ptr", "index_ptr", "of_rows_ptr", "counts_ptr", "longs_ptr"]
_STEPWISE = ["W", "S", "L", "M", "splits", "stride_row", "stride_slot", "stride_cache", "stride_local", "stride_draft"]
_STEPWISE += ["stride_bitmask", "stride_record", "stride_history", "stride_length", "stride_prompt", "stride_set"]
_STEPWISE += ["stride_span", "stride_numbers", "planes_at", "shift", "index_span"]


class _Histories(NamedTuple):
    """The histories of all slots, and how many tokens of each are there, and are the prompt."""

    history_ptr: tl.tensor
    lengths_ptr: tl.tensor
    prompts_ptr: tl.tensor
    L: tl.tensor
    stride_history: tl.tensor
    stride_length: tl.tensor
    stride_prompt: tl.tensor


class _Drafts(NamedTuple):
    """What the rows of a step say of their drafts; None where they have none."""

    cache_position_ptr: tl.tensor
    local_ptr: tl.tensor
    drafts_ptr: tl.tensor
    stride_cache: tl.tensor
    stride_local: tl.tensor
    stride_draft: tl.tensor


class _Place(NamedTuple):
    """Where a row stands: the length of its sequence, the tokens of the prompt, and the step of the run.

    It sees ``stored`` tokens of the history, and ``local`` drafts.
    """

    length: tl.tensor
    prompt: tl.tensor
    step: tl.tensor
    stored: tl.tensor
    local: tl.tensor


class _Request(NamedTuple):
    """What a row's slot says: where its record and masks begin, and its flags.

    ``active`` is whether there is a request; ``asks`` whether it asks for anything but a forced token; ``in_window``
    whether its first window is open. ``forced`` is the forced token where ``is_forced``.
    """

    record_ptr: tl.tensor
    masks_ptr: tl.tensor
    flags: tl.tensor
    active: tl.tensor
    asks: tl.tensor
    in_window: tl.tensor
    is_forced: tl.tensor
    forced: tl.tensor


class _Covered(NamedTuple):
    """What a row takes from the index of its slot, in the place of the first ``tokens`` of its history.

    ``spans`` says in which spans the last tokens of the text may stand too. Pointers are None where there is nothing.
    """

    seen_ptr: tl.tensor
    planes_ptr: tl.tensor
    carries_ptr: tl.tensor
    tokens: tl.tensor
    spans: tl.tensor
    span: tl.tensor
    W: tl.tensor


class _End(NamedTuple):
    """How the text of a row ends: the ``last`` token, and the one ``before`` it.

    A place is like the end where the last ``known`` tokens are the same, 0 to 2. ``size`` is that of the n-grams that
    may not repeat, 0 for none; ``lowers`` whether DRY acts, whose breakers are the tokens of a set below ``limit``.
    """

    size: tl.tensor
    known: tl.tensor
    last: tl.tensor
    before: tl.tensor
    lowers: tl.tensor
    breakers_ptr: tl.tensor
    limit: tl.tensor


class _Edits(NamedTuple):
    """Where the edited tokens of a row are: their set, ranks and, by rank in a ring, tallies, values and ids."""

    edited_ptr: tl.tensor
    ranks_ptr: tl.tensor
    tallies_ptr: tl.tensor
    values_ptr: tl.tensor
    listed_ptr: tl.tensor


class _Penalties(NamedTuple):
    """The penalties of a request, and from which tokens on they hold that the index doesn't cover.

    ``first`` is the first of those. ``repeats`` and ``counts`` are whether the index has what they ask for.
    """

    repetition: tl.tensor
    presence: tl.tensor
    frequency: tl.tensor
    dry_ptr: tl.tensor
    dry_count: tl.tensor
    repeats_from: tl.tensor
    counts_from: tl.tensor
    first: tl.tensor
    repeats: tl.tensor
    counts: tl.tensor


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _list(record_ptr, active, WHICH: tl.constexpr):
    """Where a list of a record begins, and its length."""
    here = record_ptr + LISTS + 2 * WHICH
    return record_ptr + tl.load(here), tl.where(active, tl.load(here + 1), 0)


@triton.jit
def _place_in(row, slot, histories, drafts):
    """Where a row stands."""
    known = tl.load(histories.lengths_ptr + slot * histories.stride_length).to(tl.int32)
    known = tl.minimum(tl.maximum(known, 0), histories.L)
    prompt = tl.load(histories.prompts_ptr + slot * histories.stride_prompt).to(tl.int32)
    local = 0
    if drafts.local_ptr is not None:
        local = tl.load(drafts.local_ptr + row * drafts.stride_local).to(tl.int32)
        local = tl.minimum(tl.maximum(local, 0), row.to(tl.int32))
    length = known + local
    if drafts.cache_position_ptr is not None:
        length = tl.load(drafts.cache_position_ptr + row * drafts.stride_cache).to(tl.int32) + 1
    stored = tl.minimum(tl.maximum(length - local, 0), known)
    return _Place(length, tl.maximum(prompt, 0), length - prompt, stored, local)


@triton.jit
def _request_of(record_ptr, masks_ptr, active, step):
    """What a record says of a step."""
    flags = tl.load(record_ptr + FLAGS)
    active = active & ((flags & ACTIVE) != 0)
    forced_ptr, forced_count = _list(record_ptr, active, FORCED)
    is_forced = (step >= 0) & (step < forced_count)
    asks = active & (is_forced == 0)  # a forced token leaves nothing else to find
    return _Request(
        record_ptr, masks_ptr, tl.where(active, flags, 0), active, asks,
        asks & (step < tl.load(record_ptr + FIRST_WINDOW)),
        is_forced, tl.load(forced_ptr + step, mask=is_forced, other=0),
    )  # fmt: skip


@triton.jit
def _penalties_of(request, place, seen, covered):
    """The penalties of a request; those that don't act begin behind what is seen."""
    record_ptr, flags = request.record_ptr, request.flags
    repetition = _float(tl.load(record_ptr + REPETITION))
    presence = _float(tl.load(record_ptr + PRESENCE))
    frequency = _float(tl.load(record_ptr + FREQUENCY))
    dry_ptr, dry_count = _list(record_ptr, request.asks, DRY)
    repeats = ((flags & TALLIED) != 0) & (repetition != 1.0)
    repeats_from = tl.where((flags & OUTPUT_REPETITION) != 0, place.prompt, 0)
    repeats_from = tl.where(repeats, tl.maximum(repeats_from, covered.tokens), seen)
    counts = ((flags & TALLIED) != 0) & ((presence != 0.0) | (frequency != 0.0))
    counts_from = tl.where((flags & OUTPUT_COUNTS) != 0, place.prompt, 0)
    counted = covered.tokens * 0
    if covered.planes_ptr is not None:
        counted = covered.tokens
    counts_from = tl.where(counts, tl.maximum(counts_from, counted), seen)
    return _Penalties(
        repetition, presence, frequency, dry_ptr, dry_count, repeats_from, counts_from,
        tl.minimum(repeats_from, counts_from), repeats & (covered.tokens > 0), counts & (counted > 0),
    )  # fmt: skip


@triton.jit
def _begin_sets(
    banned_ptr, edited_ptr, request, bitmask_ptr, penalties, covered, words, W, M,
    DRAWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Begin the bans of a program's words with its masks, as far as each holds, and the edits with what is known."""
    flags = request.flags
    has_bans, has_first = request.asks & ((flags & BAN_MASK) != 0), request.in_window & ((flags & FIRST_MASK) != 0)
    obeys = request.asks & ((flags & BITMASK) != 0)
    needs_bitmask = request.asks & ((flags & NEEDS_BITMASK) != 0)
    forced_word = tl.where(request.is_forced, request.forced >> 5, -1)
    for start in range(0, own_count(words), BLOCK):
        word = word_at(words, start + tl.arange(0, BLOCK))
        inside = word < W
        banned = tl.load(request.masks_ptr + _BAN_PLANE * W + word, mask=inside & has_bans, other=0)
        banned |= tl.load(request.masks_ptr + _FIRST_PLANE * W + word, mask=inside & has_first, other=0)
        if bitmask_ptr is not None:
            allowed = tl.load(bitmask_ptr + word, mask=obeys & (word < tl.minimum(W, M)), other=0)
            banned |= tl.where(obeys, ~allowed, 0)
        else:
            banned = tl.where(needs_bitmask, -1, banned)
        own = tl.where(word == forced_word, tl.full([BLOCK], 1, tl.int32) << (request.forced & 31), 0)
        banned = tl.where(request.is_forced, ~own, banned)
        if DRAWS:
            banned = tl.where(request.active, banned, -1)
        tl.store(banned_ptr + word, banned, mask=inside)
        edited = own
        if covered.seen_ptr is not None:
            edited |= tl.load(covered.seen_ptr + word, mask=inside & penalties.repeats, other=0)
        if covered.planes_ptr is not None:
            for plane in tl.static_range(COUNT_PLANES):
                edited |= tl.load(covered.planes_ptr + plane * W + word, mask=inside & penalties.counts, other=0)
        tl.store(edited_ptr + word, edited, mask=inside)


@triton.jit
def _mark_bans(
    banned_ptr, request, text, place, words, WORDS_IN_OUTPUT: tl.constexpr, LIST_BLOCK: tl.constexpr
):  # fmt: skip
    """Ban listed tokens, and those that would complete a sequence."""
    record_ptr = request.record_ptr
    bans_ptr, bans = _list(record_ptr, request.asks, BANS)
    mark_text(banned_ptr, Text(bans_ptr, 1, bans), 0, bans, words, LIST_BLOCK)
    stops_ptr, stops = _list(record_ptr, request.asks & (place.step < tl.load(record_ptr + MIN_TOKENS)), STOPS)
    mark_text(banned_ptr, Text(stops_ptr, 1, stops), 0, stops, words, LIST_BLOCK)
    firsts_ptr, firsts = _list(record_ptr, request.in_window, FIRSTS)
    mark_text(banned_ptr, Text(firsts_ptr, 1, firsts), 0, firsts, words, LIST_BLOCK)
    least = 0
    if WORDS_IN_OUTPUT:
        least = place.prompt
    sequences_ptr, numbers = _list(record_ptr, request.asks, SEQUENCES)
    _no_tokens_ptr, width = _list(record_ptr, request.asks, SEQUENCE_WIDTH)
    count = numbers // tl.maximum(width, 1)
    mark_endings(banned_ptr, text, least, sequences_ptr, count, width, words, LIST_BLOCK)


@triton.jit
def _bits_below_lowest(word):
    """How many bits lie below the lowest one that is set, of unsigned words."""
    return popcount((word ^ (word - 1)) >> 1).to(tl.int32)


@triton.jit
def _turn(covered, spans, within, rest, stop, BLOCK: tl.constexpr):
    """One turn over a text: of the spans that are left, or what the index doesn't cover from ``rest`` to ``stop``.

    Returns the places of the turn, which of them count, and where the next turn is.
    """
    in_span = spans != 0
    number = _bits_below_lowest(spans)
    begin = number * covered.span + within
    end = tl.minimum((number + 1) * covered.span, covered.tokens)
    at = tl.where(in_span, begin, rest) + tl.arange(0, BLOCK)
    inside = at < tl.where(in_span, tl.minimum(end, stop), stop)
    ends = begin + BLOCK >= end
    next_spans = tl.where(in_span & ends, spans & (spans - 1), spans)
    next_within = tl.where(in_span, tl.where(ends, 0, within + BLOCK), within)
    return at, inside, next_spans, next_within, tl.where(in_span, rest, rest + BLOCK)


@triton.jit
def _end_of(request, text, penalties, words, W):
    """How a text ends, and what is asked of the places that are like its end."""
    size = tl.load(request.record_ptr + NGRAM)
    known = tl.minimum(tl.load(request.record_ptr + GRAM), 2)
    last = token_at(text, text.length - 1, text.length > 0)
    before = token_at(text, text.length - 2, text.length > 1)
    breakers_ptr = request.masks_ptr + _BREAKER_PLANE * W
    limit = tl.where((request.flags & BREAKER_MASK) != 0, words.V, 0)
    broken = holds(breakers_ptr, last, limit) | ((known > 1) & holds(breakers_ptr, before, limit))
    # Where no token may come twice, all that DRY could lower is banned.
    lowers = (penalties.dry_count > 0) & (broken == 0) & (size != 1)
    return _End(tl.where(text.length >= size - 1, size, 0), known, last, before, lowers, breakers_ptr, limit)


@triton.jit
def _places_like_end(text, at, inside, every, end, words):
    """Which places end like the text, or ``every`` one, and the token behind those; of this program's tokens alone."""
    token = token_at(text, at, inside & (at >= 0))
    is_like = inside & (at >= end.known - 1) & ((end.known < 1) | (token == end.last))
    # What follows is loaded where it counts, which is nearly nowhere.
    previous = token_at(text, at - 1, is_like & (at >= 1) & (end.known > 1))
    is_like = is_like & ((end.known < 2) | (previous == end.before))
    found = (is_like | every) & inside
    follower = token_at(text, at + 1, found)
    return follower, found & is_mine(follower, words)


@triton.jit
def _mark_repeated(banned_ptr, edited_ptr, text, end, covered, words, BLOCK: tl.constexpr):
    """Ban the tokens that would complete an n-gram, and mark as edited those that DRY may lower.

    Returns the spans that have any of the latter, and whether what no span covers has.
    """
    every = end.size == 1  # no token may come twice
    walks = (end.size > 0) | end.lowers
    spans = tl.where(walks & (every == 0), covered.spans, covered.spans * 0)
    rest = tl.where(every, -1, covered.tokens)
    stop = tl.where(walks, text.length - 1, -1)
    within, rest_lowers = covered.tokens * 0, covered.tokens * 0
    lowering = spans * 0
    while (spans != 0) | (rest < stop):
        span = spans ^ (spans & (spans - 1))
        # Places are those of the last token before one that is banned or lowered.
        at, inside, spans, within, rest = _turn(covered, spans, within, rest, stop, BLOCK)
        follower, found = _places_like_end(text, at, inside, every, end, words)
        if tl.max(found.to(tl.int32)) > 0:
            banned = found & (end.size > 0) & (at >= end.size - 2)
            for j in range(end.known + 1, end.size):
                banned &= token_at(text, at + 1 - j, banned) == token_at(text, text.length - j, text.length >= j)
            mark(banned_ptr, follower, banned)
            lowered = found & end.lowers
            lowered = lowered & (holds(end.breakers_ptr, follower, tl.where(end.lowers, end.limit, 0)) == 0)
            mark(edited_ptr, follower, lowered)
            any_lowered = tl.max(lowered.to(tl.int32))
            lowering |= tl.where(any_lowered > 0, span, span * 0)
            rest_lowers = tl.maximum(rest_lowers, tl.where(span == 0, any_lowered, 0))
    return lowering, rest_lowers > 0


@triton.jit
def _rank_edits(edits, cursor_ptr, span_ptr, any_edits, words, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """Give each edited token of a program a place in the row's ring, list it there, and clear what else is there.

    Returns where the places begin, and how many there are.
    """
    total = tl.full([], 0, tl.int32)
    for start in range(0, tl.where(any_edits, own_count(words), 0), BLOCK):
        word = word_at(words, start + tl.arange(0, BLOCK))
        total += tl.sum(popcount(tl.load(edits.edited_ptr + word, mask=word < words.W, other=0)))
    base = tl.atomic_add(cursor_ptr, total, sem="relaxed")
    tl.store(span_ptr, base)
    tl.store(span_ptr + 1, total)
    before = base
    for start in range(0, tl.where(total > 0, own_count(words), 0), BLOCK):
        word = word_at(words, start + tl.arange(0, BLOCK))
        held = tl.load(edits.edited_ptr + word, mask=word < words.W, other=0)
        count = popcount(held)
        rank = before + tl.cumsum(count) - count
        tl.store(edits.ranks_ptr + word, rank, mask=word < words.W)
        before += tl.sum(count)
        left = held.to(tl.uint32, bitcast=True)
        for _ in range(tl.max(count)):  # nothing but stores, which nobody waits for
            token = word * 32 + _bits_below_lowest(left)
            tl.store(edits.listed_ptr + (rank & (ROOM - 1)), token, mask=left != 0)
            left &= left - 1
            rank += 1
    for start in range(0, total, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = (base + place) & (ROOM - 1)
        tl.store(edits.tallies_ptr + here, 0, mask=place < total)
        tl.store(edits.values_ptr + here, 0.0, mask=place < total)
    return base, total


@triton.jit
def _place_of(edits, token, mine, ROOM: tl.constexpr):
    """Where edited tokens are tallied."""
    below = (tl.full(token.shape, 1, tl.int32) << (token & 31)) - 1
    held = tl.load(edits.edited_ptr + (token >> 5), mask=mine, other=0)
    return (tl.load(edits.ranks_ptr + (token >> 5), mask=mine, other=0) + popcount(held & below)) & (ROOM - 1)


@triton.jit
def _tally_repetitions(
    edits, text, end, spans, rest_lowers, covered, words, ROOM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Tally how long the longest repetition is that each token would extend, in the places where there are any."""
    stop = text.length - 1
    rest = tl.where(rest_lowers, covered.tokens, tl.maximum(covered.tokens, stop))
    within = covered.tokens * 0
    no = tl.full([], 0, tl.int1)
    while (spans != 0) | (rest < stop):
        at, inside, spans, within, rest = _turn(covered, spans, within, rest, stop, BLOCK)
        follower, found = _places_like_end(text, at, inside, no, end, words)
        found = found & (holds(end.breakers_ptr, follower, tl.where(found, end.limit, 0)) == 0)
        matched = match_length(text, at, found, end.known, end.breakers_ptr, end.limit, _LONGEST)
        place = _place_of(edits, follower, found, ROOM)
        tl.atomic_max(edits.tallies_ptr + place, matched << _DRY_AT, mask=found, sem="relaxed")


@triton.jit
def _tally(
    edits, text, penalties, biases, covered, words, ROOM: tl.constexpr, BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr
):  # fmt: skip
    """Tally what is penalised, and put the biases of edited tokens where their values will be."""
    for i in range(penalties.first, text.length, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token = token_at(text, at, at < text.length)
        mine = is_mine(token, words)
        here = edits.tallies_ptr + _place_of(edits, token, mine, ROOM)
        one = tl.full([BLOCK], 1, tl.int32)
        tl.atomic_add(here, one, mask=mine & (at >= penalties.counts_from), sem="relaxed")
        repeated = tl.full([BLOCK], _REPEATED, tl.int32)
        tl.atomic_or(here, repeated, mask=mine & (at >= penalties.repeats_from), sem="relaxed")
    if covered.carries_ptr is not None:
        carried = _carried(penalties, covered)
        for i in range(0, carried, BLOCK):
            entry = i + tl.arange(0, BLOCK)
            token = tl.load(covered.carries_ptr + 1 + entry, mask=entry < carried, other=-1)
            mine = is_mine(token, words)
            many = tl.full([BLOCK], CARRY, tl.int32)
            tl.atomic_add(edits.tallies_ptr + _place_of(edits, token, mine, ROOM), many, mask=mine, sem="relaxed")
    for k in range(0, biases.length, LIST_BLOCK):
        entry = k + tl.arange(0, LIST_BLOCK)
        token = token_at(biases, entry, entry < biases.length)
        mine = is_mine(token, words)
        value = _float(tl.load(biases.ptr + biases.length + entry, mask=entry < biases.length, other=0))
        tl.store(edits.values_ptr + _place_of(edits, token, mine, ROOM), value, mask=mine)


@triton.jit
def _carried(penalties, covered):
    """How many carries of counts there are that a row asks for."""
    return tl.load(covered.carries_ptr, mask=penalties.counts, other=0)


@triton.jit
def _edited(x, tally, bias, lowered, penalties, BIAS_LAST: tl.constexpr):
    """Logits with the biases and penalties of a request, in the order of its engine."""
    repetition = penalties.repetition
    count = tally & _COUNT_BITS
    if not BIAS_LAST:
        x += bias
        x = tl.where((tally & _REPEATED) != 0, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
    x -= count.to(tl.float32) * penalties.frequency
    x -= tl.where(count > 0, penalties.presence, 0.0)
    if BIAS_LAST:
        x = tl.where((tally & _REPEATED) != 0, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
    x -= lowered
    if BIAS_LAST:
        x += bias
    return x


@triton.jit
def _edit(
    edits, base, total, scores_ptr, stride_token, penalties, covered,
    BIAS_LAST: tl.constexpr, DRAWS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Work out the logits of the edited tokens."""
    for i in range(0, total, BLOCK):
        rank = i + tl.arange(0, BLOCK)
        inside = rank < total
        place = (base + rank) & (ROOM - 1)
        token = tl.load(edits.listed_ptr + place, mask=inside, other=0)
        tally = tl.load(edits.tallies_ptr + place, mask=inside, other=0)
        if covered.seen_ptr is not None:
            word = tl.load(covered.seen_ptr + (token >> 5), mask=rank < tl.where(penalties.repeats, total, 0), other=0)
            tally |= tl.where(((word >> (token & 31)) & 1) != 0, _REPEATED, 0)
        if covered.planes_ptr is not None:
            tally += counts_in(covered, token, rank < tl.where(penalties.counts, total, 0), covered.W)
        x = tl.load(scores_ptr + token.to(tl.int64) * stride_token, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(edits.values_ptr + place, mask=inside, other=0.0)
        matched = (tally >> _DRY_AT) & _DRY_BITS
        lowered = _float(tl.load(penalties.dry_ptr + matched, mask=inside & (matched < penalties.dry_count), other=0))
        x = _edited(x, tally, bias, lowered, penalties, BIAS_LAST)
        if not DRAWS:
            x = x.to(scores_ptr.dtype.element_ty).to(tl.float32)
        tl.store(edits.values_ptr + place, x, mask=inside)


@triton.jit
def _write_numbers(request, row, length, of_rows_ptr, counts_ptr, longs_ptr, stride_numbers, DRAWS: tl.constexpr):
    """Write what a sample takes of a row: temperature and parameters as bits."""
    record_ptr, active = request.record_ptr, request.active
    idle: tl.constexpr = _GREEDY if DRAWS else _UNSCALED
    temperature = tl.load(record_ptr + TEMPERATURE)
    tl.store(of_rows_ptr + row, tl.where(active, temperature, idle))
    acts = active & (_float(temperature) >= TINY_TEMPERATURE)
    for rule in tl.static_range(_N_RULES):
        value = tl.where(acts, tl.load(record_ptr + RULES + rule), _OFF[rule])
        tl.store(of_rows_ptr + (rule + 1) * stride_numbers + row, value)
    tl.store(counts_ptr + row, tl.where(active, tl.load(record_ptr + LOGPROBS), -1))
    low = tl.load(record_ptr + SEED).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(record_ptr + SEED + 1).to(tl.int64)
    tl.store(longs_ptr + row, (high << 32) | low)
    tl.store(longs_ptr + stride_numbers + row, length.to(tl.int64))


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _slot_sets_kernel(
    # inputs
    scores_ptr, slots_ptr, cache_position_ptr, local_ptr, drafts_ptr, bitmask_ptr,
    records_ptr, masks_ptr, history_ptr, lengths_ptr, prompts_ptr, index_ptr,
    # outputs
    bits_ptr, cursors_ptr, tallies_ptr, values_ptr, listed_ptr, spans_ptr, of_rows_ptr, counts_ptr, longs_ptr,
    # shapes
    V, W, S, L, M, splits, planes_at, shift, index_span,
    # strides
    stride_row, stride_token, stride_slot, stride_cache, stride_local, stride_draft, stride_bitmask,
    stride_record, stride_history, stride_length, stride_prompt, stride_set, stride_span, stride_numbers,
    # constants
    DRAWS: tl.constexpr, BIAS_LAST: tl.constexpr, WORDS_IN_OUTPUT: tl.constexpr, COUNTS: tl.constexpr,
    ROOM: tl.constexpr, BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_launch(PDL)
    program = tl.program_id(0)
    split = program % splits
    row = (program // splits).to(tl.int64)
    words = OwnWords(split, splits, W, V)

    # A row of no slot is one of a request that asks for nothing.
    slot = tl.load(slots_ptr + row * stride_slot).to(tl.int64)
    in_table = (slot >= 0) & (slot < S)
    slot = tl.where(in_table, slot, 0)
    histories = _Histories(history_ptr, lengths_ptr, prompts_ptr, L, stride_history, stride_length, stride_prompt)
    drafts = _Drafts(cache_position_ptr, local_ptr, drafts_ptr, stride_cache, stride_local, stride_draft)
    place = _place_in(row, slot, histories, drafts)
    request = _request_of(records_ptr + slot * stride_record, masks_ptr + slot * stride_record, in_table, place.step)
    seen, first_draft_ptr = place.stored, None
    if drafts_ptr is not None:
        seen = place.stored + place.local
        first_draft_ptr = drafts_ptr + (row - place.local + 1) * stride_draft
    here = history_ptr + slot * stride_history
    text = Text(here, 1, tl.where(request.asks, seen, 0), place.stored, first_draft_ptr, stride_draft, True)
    covered_tokens = tl.full([], 0, tl.int32)
    spans = tl.full([], 0, tl.uint32)
    seen_ptr, planes_ptr, carries_ptr = None, None, None
    if index_ptr is not None:
        seen_ptr = index_ptr + slot * stride_record
        covered_tokens = covered_of(request.record_ptr, request.asks, place.stored)
        spans = spans_of(request.record_ptr, seen_ptr + W, text, covered_tokens, shift)
        if COUNTS:
            planes_ptr = seen_ptr + planes_at
            carries_ptr = planes_ptr + COUNT_PLANES * W
    covered = _Covered(seen_ptr, planes_ptr, carries_ptr, covered_tokens, spans, index_span, W)
    penalties = _penalties_of(request, place, text.length, covered)
    biases_ptr, bias_count = _list(request.record_ptr, request.asks, BIASES)
    biases = Text(biases_ptr, 1, bias_count)

    banned_ptr = bits_ptr + BANNED * stride_set + row * W
    edits = _Edits(
        bits_ptr + EDITED * stride_set + row * W, bits_ptr + RANKS * stride_set + row * W,
        tallies_ptr + row * ROOM, values_ptr + row * ROOM, listed_ptr + row * ROOM,
    )  # fmt: skip
    row_bitmask_ptr = None if bitmask_ptr is None else bitmask_ptr + row * stride_bitmask
    _begin_sets(
        banned_ptr, edits.edited_ptr, request, row_bitmask_ptr, penalties, covered, words, W, M, DRAWS, BLOCK
    )  # fmt: skip
    tl.debug_barrier()
    _mark_bans(banned_ptr, request, text, place, words, WORDS_IN_OUTPUT, LIST_BLOCK)
    end = _end_of(request, text, penalties, words, W)
    lowering, rest_lowers = _mark_repeated(banned_ptr, edits.edited_ptr, text, end, covered, words, _TURN)
    mark_text(edits.edited_ptr, biases, 0, biases.length, words, LIST_BLOCK)
    mark_text(edits.edited_ptr, text, penalties.first, text.length, words, BLOCK)
    if carries_ptr is not None:
        carries = Text(carries_ptr + 1, 1, _carried(penalties, covered))
        mark_text(edits.edited_ptr, carries, 0, carries.length, words, BLOCK)
    tl.debug_barrier()

    span_ptr = spans_ptr + row * stride_span + 2 * split
    any_edits = request.is_forced | (biases.length > 0) | (penalties.first < text.length) | (penalties.dry_count > 0)
    any_edits = any_edits | penalties.repeats | penalties.counts
    base, total = _rank_edits(edits, cursors_ptr + row, span_ptr, any_edits, words, ROOM, BLOCK)
    tl.debug_barrier()
    _tally_repetitions(edits, text, end, lowering, rest_lowers, covered, words, ROOM, _TURN)
    tl.debug_barrier()  # then counts are added to the same words
    _tally(edits, text, penalties, biases, covered, words, ROOM, BLOCK, LIST_BLOCK)
    tl.debug_barrier()
    # A forced token has 0, as its value is cleared.
    total = tl.where(request.is_forced, 0, total)
    scores_ptr += row * stride_row
    _edit(edits, base, total, scores_ptr, stride_token, penalties, covered, BIAS_LAST, DRAWS, ROOM, BLOCK)
    if split == 0:
        _write_numbers(request, row, place.length, of_rows_ptr, counts_ptr, longs_ptr, stride_numbers, DRAWS)


# Words of a set and positions of a history are taken in blocks of this many, entries of lists in smaller ones.
_BLOCK = 1024
_LIST_BLOCK = 128
# As many fit on a GPU at once, with the registers that they take; more for a row would only read its history again.
_PROGRAMS = 264
# The candidates of a list of edits that may be longer than this are found by several programs.
_PIECE = 2048
_MOST_PIECES = 16

_slot_sets_launcher = Launcher(_slot_sets_kernel, num_warps=8, enable_fp_fusion=False)


class Sizes(NamedTuple):
    """What the search of a step needs room for."""

    rows: int
    """Rows that a step may have."""
    W: int
    """Words of a set."""
    room: int
    """Places of a row's ring of edits, a power of two."""
    lists: int
    """Lists of the edits of a row: one for each program of the search."""

    @classmethod
    def of(cls, tables: Slots, rows: int, V: int, listed: int) -> Sizes:
        """Sizes for so many rows, and slots whose lists have so many words."""
        # As many places as a row may edit tokens: those it sees, and those with a bias.
        most = min(V, tables.history.shape[1] + rows + listed)
        W = words_of(V)
        return cls(rows, W, 1 << max(0, most - 1).bit_length(), splits_of(W, _PROGRAMS))

    @property
    def bytes_per_row(self) -> int:
        """Memory of a row."""
        return 4 * (SETS * self.W + 3 * self.room + 2 * self.lists) + 4 * (len(RULE_KINDS) + 6)


class Workspace:
    """What the search of a step writes, and what those after it read of it."""

    def __init__(self, tables: Slots, sizes: Sizes, semantics: Semantics) -> None:
        device, rows = tables.records.device, sizes.rows
        self.tables, self.sizes, self.semantics = tables, sizes, semantics
        self.bits = torch.zeros(SETS, rows, sizes.W, dtype=torch.int32, device=device)
        self.cursors = torch.zeros(rows, dtype=torch.int32, device=device)
        self.tallies = torch.zeros(rows, sizes.room, dtype=torch.int32, device=device)
        self.values = torch.zeros(rows, sizes.room, dtype=torch.float32, device=device)
        self.listed = torch.zeros(rows, sizes.room, dtype=torch.int32, device=device)
        self.spans = torch.zeros(rows, sizes.lists, 2, dtype=torch.int32, device=device)
        self.numbers = Numbers.empty(rows, device)

    def splits(self, B: int) -> int:
        """Programs that share the search of each of so many rows."""
        return splits_of(self.sizes.W, _PROGRAMS // max(1, B))

    def pieces(self, B: int) -> int:
        """Programs that share a list of edits."""
        return max(1, min(_MOST_PIECES, self.sizes.room // (self.splits(B) * _PIECE)))

    def found(self, B: int) -> TokenSets:
        """What the search of so many rows writes."""
        listed = Listed(self.listed, self.spans, self.splits(B), self.pieces(B))
        return TokenSets(self.bits, self.values, listed=listed)


def launch_slot_sets(made: Workspace, scores: torch.Tensor, rows: StepRows, draws: bool) -> TokenSets:
    """Find what the requests of the rows ask for: one launch.

    Args:
        made: what it reads and writes.
        scores: logits ``[B, V]``.
        rows: the slot of each, and what the rows of drafts see.
        draws: whether a token is drawn; then rows of no request are banned whole, and edits are not rounded.
    """
    launcher, key, programs, args = slot_sets_launch(made, scores, rows, draws, scores, rows)
    launcher(key, programs, args)
    return made.found(len(scores))


def slot_sets_launch(
    made: Workspace, scores: torch.Tensor, rows: StepRows, draws: bool, given_scores: Any, given: StepRows
) -> Launch:
    """The launch of ``launch_slot_sets``; the kernel is given ``given_scores`` and ``given`` of scores and rows."""
    tables, (_, W, room, _), semantics = made.tables, made.sizes, made.semantics
    B, V = scores.shape
    splits = made.splits(B)
    numbers, indices = made.numbers, (rows.cache_position, rows.local_position, rows.draft_ids)
    key = (
        scores.device, scores.dtype, V, semantics, draws, room, scores.stride(1),
        rows.slots.dtype, rows.bitmask is None, tuple([None if each is None else each.dtype for each in indices]),
        tables.history.dtype, tables.lengths.dtype, tables.prompts.dtype, tables.indices.memory is None,
        tables.indices.sizes.carries > 0,
    )  # fmt: skip
    cache, local, drafts = (0 if each is None else each.stride(0) for each in indices)
    bitmask = rows.bitmask
    return Launch(_slot_sets_launcher, key, B * splits, (
        given_scores, given.slots, given.cache_position, given.local_position, given.draft_ids, given.bitmask,
        tables.records, tables.masks, tables.history, tables.lengths, tables.prompts, tables.indices.memory,
        made.bits, made.cursors, made.tallies, made.values, made.listed, made.spans, numbers.values,
        numbers.counts, numbers.longs,
        V, W, tables.records.shape[0], tables.history.shape[1], 0 if bitmask is None else bitmask.shape[1], splits,
        *tables.indices.arguments[:3],
        scores.stride(0), scores.stride(1), rows.slots.stride(0), cache, local, drafts,
        0 if bitmask is None else bitmask.stride(0),
        tables.records.stride(0), tables.history.stride(0), tables.lengths.stride(0), tables.prompts.stride(0),
        made.bits.stride(0), made.spans.stride(0), numbers.values.stride(0),
        draws, semantics.bias_last, semantics.words_in_output, tables.indices.sizes.carries > 0,
        room, _BLOCK, _LIST_BLOCK,
        overlaps(scores.device),
    ))  # fmt: skip
