"""What the requests of a serving step do to their logits: one search for all of them, whatever they ask for.

For each row, of the tables in ``slots``:

    bans     the tokens that get -inf: masks, n-grams, bad words, stop tokens that come too early, a grammar's bitmask
    edits    the tokens whose logits change otherwise (biases, penalties), and what they become
    numbers  what the draw takes per row: temperature, parameters of the rules, seed and position

so that the fold which follows is the same for all: a map that replaces, and one that bans. An edited logit is worked
out once, here, in the order that the stack has; the fold finds it by its rank among the edited tokens of its row, and a
selection's sweep in a list of them.

Bytes moved: three bits a logit (bans, edits, and a rank for each word of them), the masks that are in use, and for each
token of the history some 30 bytes. A program owns a range of words of a row, and no program waits for another: ranks of
a row begin where a counter stands that only ever grows, in a ring that holds more than a row can have.
"""

from __future__ import annotations

from typing import Literal

import torch

from fastlogits_kernels.draw import draw
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.pointwise.fold import Chain, Op, popcount
from fastlogits_kernels.pointwise.search import Listed, TokenSets
from fastlogits_kernels.rules import Rule, RuleKind, Ties
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.selection.keep import launch_keep
from fastlogits_kernels.selection.launch import (
    Selection,
    kept_in,
    launch_select,
    reference_distribution,
)
from fastlogits_kernels.selection.launchers import overlaps
from fastlogits_kernels.selection.logprobs import KeptRows, Report, launch_report, report, takes
from fastlogits_kernels.selection.row import TINY_TEMPERATURE, let_next_launch
from fastlogits_kernels.serving.layout import (
    ACTIVE,
    BAN_MASK,
    BAN_PLANE,
    BANS,
    BIASES,
    BITMASK,
    BREAKER_MASK,
    BREAKER_PLANE,
    DRY,
    FIRST_MASK,
    FIRST_PLANE,
    FIRST_WINDOW,
    FIRSTS,
    FLAGS,
    FORCED,
    FREQUENCY,
    INTEGERS,
    LISTS,
    LOGPROBS,
    LONGEST,
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
    STOPS,
    TALLIED,
    TEMPERATURE,
    WIDTH,
    WORDS,
    Numbers,
    Rows,
    Semantics,
    Slots,
    bits_of,
    reference_append,
    reference_slots,
    reference_swap,
)

# Sets of a row.
_BANNED = tl.constexpr(0)
_EDITED = tl.constexpr(1)
_RANKS = tl.constexpr(2)

# What is tallied of an edited token: its occurrences, the longest repetition that it would extend, whether the
# repetition penalty is for it, and whether a lane has taken it on itself to work out its logit.
_DRY_AT = tl.constexpr(24)
_DRY_BITS = tl.constexpr(63)
_COUNT_BITS = tl.constexpr(2**24 - 1)
_REPEATED = tl.constexpr(2**30)
_CLAIMED = tl.constexpr(-(2**31))

_LONGEST = tl.constexpr(LONGEST)
_OFF = tl.constexpr(tuple(value if INTEGERS[i] else bits_of(value) for i, value in enumerate(OFF.values())))
"""As bits."""
_ZERO_OR_ONE = tl.constexpr((bits_of(0.0), bits_of(1.0)))
_N_RULES = tl.constexpr(len(RULE_KINDS))
_BAN_PLANE = tl.constexpr(BAN_PLANE)
_FIRST_PLANE = tl.constexpr(FIRST_PLANE)
_BREAKER_PLANE = tl.constexpr(BREAKER_PLANE)

_UNALIGNED = ["scores_ptr", "slots_ptr", "cache_position_ptr", "local_ptr", "drafts_ptr", "bitmask_ptr", "records_ptr"]
_UNALIGNED += ["masks_ptr", "history_ptr", "lengths_ptr", "prompts_ptr", "bits_ptr", "cursors_ptr", "tallies_ptr"]
_UNALIGNED += ["values_ptr", "listed_ptr", "spans_ptr", "of_rows_ptr", "counts_ptr", "longs_ptr"]
_STEPWISE = ["W", "S", "L", "M", "splits", "stride_row", "stride_slot", "stride_cache", "stride_local", "stride_draft"]
_STEPWISE += ["stride_bitmask", "stride_record", "stride_history", "stride_length", "stride_prompt", "stride_set"]
_STEPWISE += ["stride_span", "stride_numbers"]
_APPEND_UNALIGNED = ["slots_ptr", "tokens_ptr", "records_ptr", "history_ptr", "lengths_ptr"]
_APPEND_STEPWISE = ["N", "S", "L", "stride_slot", "stride_token", "stride_record", "stride_history", "stride_length"]


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _list(record_ptr, active, WHICH: tl.constexpr):
    """Where a list of a record begins, and its length."""
    here = record_ptr + LISTS + 2 * WHICH
    return record_ptr + tl.load(here), tl.where(active, tl.load(here + 1), 0)


@triton.jit
def _narrow(token):
    """Token ids as int32; what it doesn't hold is no token of any vocabulary, and becomes -1."""
    return tl.where(token == token.to(tl.int32), token, -1).to(tl.int32)


@triton.jit
def _token(text, i, inside):
    """Tokens of what a row sees: its history, then its draft tokens; -1 elsewhere."""
    history_ptr, drafts_ptr, stored, stride_draft = text
    token = _narrow(tl.load(history_ptr + i, mask=inside & (i < stored) & (i >= 0), other=-1))
    drafted = inside & (i >= stored)
    draft = _narrow(tl.load(drafts_ptr + (i - stored) * stride_draft, mask=drafted, other=-1))
    return tl.where(drafted, draft, token)


@triton.jit
def _is_mine(token, first, last, V):
    """Whether a token is one of the vocabulary, in this program's range of words."""
    return (token >= 0) & (token < V) & ((token >> 5) >= first) & ((token >> 5) < last)


@triton.jit
def _mark(set_ptr, token, found):
    bit = tl.full(token.shape, 1, tl.int32) << (token & 31)
    tl.atomic_or(set_ptr + (token >> 5), bit, mask=found, sem="relaxed")


@triton.jit
def _mark_list(set_ptr, list_ptr, count, first, last, V, BLOCK: tl.constexpr):
    """Add the tokens of a list to a set."""
    for k in range(0, count, BLOCK):
        entry = k + tl.arange(0, BLOCK)
        token = tl.load(list_ptr + entry, mask=entry < count, other=-1)
        _mark(set_ptr, token, _is_mine(token, first, last, V))


@triton.jit
def _mark_repeated(set_ptr, text, seen, size, first, last, V, BLOCK: tl.constexpr):
    """Add the tokens that would complete an n-gram which is there already."""
    for i in range(size - 1, tl.where((size > 0) & (seen >= size), seen, size - 1), BLOCK):
        column = i + tl.arange(0, BLOCK)
        token = _token(text, column, column < seen)
        found = _is_mine(token, first, last, V)
        for j in range(1, size):
            found &= _token(text, column - j, found) == _token(text, seen - j, seen >= j)
        _mark(set_ptr, token, found)


@triton.jit
def _mark_words(set_ptr, text, seen, least, words_ptr, length, width, first, last, V, BLOCK: tl.constexpr):
    """Add the last tokens of the sequences whose other tokens end the text, not beginning before ``least``."""
    for k in range(0, length // tl.maximum(width, 1), BLOCK):
        entry = k + tl.arange(0, BLOCK)
        here = words_ptr + entry * width
        known = entry * width < length
        token = tl.load(here, mask=known, other=-1)
        prefix = tl.load(here + 1, mask=known, other=0)
        found = _is_mine(token, first, last, V) & (seen - prefix >= tl.where(prefix > 0, least, 0))
        for j in range(width - 2):
            asks = found & (j < prefix)
            found &= (tl.load(here + 2 + j, mask=asks, other=0) == _token(text, seen - 1 - j, seen > j)) | (j >= prefix)
        _mark(set_ptr, token, found)


@triton.jit
def _breaks(breakers_ptr, token, limit):
    """Whether tokens are breakers of repetitions; ids from the limit on are none."""
    asks = (token >= 0) & (token < limit)
    return ((tl.load(breakers_ptr + (token >> 5), mask=asks, other=0) >> (token & 31)) & 1) != 0


@triton.jit
def _place(sets_ptr, stride_set, token, mine, ROOM: tl.constexpr):
    """Where edited tokens are tallied."""
    here = sets_ptr + (token >> 5)
    below = (tl.full(token.shape, 1, tl.int32) << (token & 31)) - 1
    held = tl.load(here + _EDITED * stride_set, mask=mine, other=0)
    return (tl.load(here + _RANKS * stride_set, mask=mine, other=0) + popcount(held & below)) & (ROOM - 1)


@triton.jit
def _tally_repetitions(
    tallies_ptr, sets_ptr, stride_set, text, seen, breakers_ptr, limit, first, last, V,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tally, of each token that follows what the text ends with, how long the longest such match is."""
    for i in range(0, seen - 1, BLOCK):
        at = i + tl.arange(0, BLOCK)
        follower = _token(text, at + 1, at + 1 < seen)
        mine = _is_mine(follower, first, last, V)
        matches = mine
        matched = tl.zeros([BLOCK], tl.int32)
        n = tl.full([], 0, tl.int32)
        while (n < _LONGEST) & (tl.max(matches.to(tl.int32)) > 0):
            # A breaker matches nothing, nor does what lies before the first token.
            wanted = _token(text, seen - 1 - n, seen > n)
            matches &= tl.where(_breaks(breakers_ptr, wanted, limit), at < 0, at >= n)
            matches &= _token(text, at - n, matches) == wanted
            matched += matches.to(tl.int32)
            n += 1
        found = mine & (matched > 0) & (_breaks(breakers_ptr, follower, limit) == 0)
        place = _place(sets_ptr, stride_set, follower, found, ROOM)
        tl.atomic_max(tallies_ptr + place, matched << _DRY_AT, mask=found, sem="relaxed")


@triton.jit
def _edit(
    tallies_ptr, values_ptr, listed_ptr, place, mine, scores_ptr, token, stride_token, numbers, dry_ptr, dry_count,
    BIAS_LAST: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Work out the logits of edited tokens, each once, however often it is named."""
    repetition, presence, frequency = numbers
    one = tl.full(place.shape, _CLAIMED, tl.int32)
    tally = tl.atomic_or(tallies_ptr + place, one, mask=mine, sem="relaxed")
    mine = mine & (tally >= 0)
    x = tl.load(scores_ptr + token.to(tl.int64) * stride_token, mask=mine, other=0.0).to(tl.float32)
    bias = tl.load(values_ptr + place, mask=mine, other=0.0)
    count = tally & _COUNT_BITS
    matched = (tally >> _DRY_AT) & _DRY_BITS
    lowered = tl.load(dry_ptr + matched, mask=mine & (matched < dry_count), other=0).to(tl.float32, bitcast=True)
    if not BIAS_LAST:
        x += bias
        x = tl.where((tally & _REPEATED) != 0, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
    x -= count.to(tl.float32) * frequency
    x -= tl.where(count > 0, presence, 0.0)
    if BIAS_LAST:
        x = tl.where((tally & _REPEATED) != 0, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
    x -= lowered
    if BIAS_LAST:
        x += bias
    if not DRAWS:
        x = x.to(scores_ptr.dtype.element_ty).to(tl.float32)
    tl.store(values_ptr + place, x, mask=mine)
    tl.store(listed_ptr + place, token, mask=mine)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _slot_sets_kernel(
    # inputs
    scores_ptr, slots_ptr, cache_position_ptr, local_ptr, drafts_ptr, bitmask_ptr,
    records_ptr, masks_ptr, history_ptr, lengths_ptr, prompts_ptr,
    # outputs
    bits_ptr, cursors_ptr, tallies_ptr, values_ptr, listed_ptr, spans_ptr, of_rows_ptr, counts_ptr, longs_ptr,
    # shapes
    V, W, S, L, M, splits,
    # strides
    stride_row, stride_token, stride_slot, stride_cache, stride_local, stride_draft, stride_bitmask,
    stride_record, stride_history, stride_length, stride_prompt, stride_set, stride_span, stride_numbers,
    # constants
    DRAWS: tl.constexpr, BIAS_LAST: tl.constexpr, WORDS_IN_OUTPUT: tl.constexpr, ROOM: tl.constexpr,
    BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_launch(PDL)
    program = tl.program_id(0)
    split = program % splits
    row = (program // splits).to(tl.int64)
    range_words = (W + splits - 1) // splits
    first = split * range_words
    last = tl.minimum(first + range_words, W)
    scores_ptr += row * stride_row
    sets_ptr = bits_ptr + row * W
    tallies_ptr += row * ROOM
    values_ptr += row * ROOM
    listed_ptr += row * ROOM

    # The slot; a row of none is one of a request that asks for nothing.
    slot = tl.load(slots_ptr + row * stride_slot).to(tl.int64)
    active = (slot >= 0) & (slot < S)
    slot = tl.where(active, slot, 0)
    record_ptr = records_ptr + slot * stride_record
    flags = tl.load(record_ptr + FLAGS)
    active = active & ((flags & ACTIVE) != 0)
    flags = tl.where(active, flags, 0)
    masks_ptr += slot * stride_record

    # What the row sees.
    known = tl.minimum(tl.maximum(tl.load(lengths_ptr + slot * stride_length).to(tl.int32), 0), L)
    prompt = tl.load(prompts_ptr + slot * stride_prompt).to(tl.int32)
    local = 0
    if local_ptr is not None:
        local = tl.minimum(tl.maximum(tl.load(local_ptr + row * stride_local).to(tl.int32), 0), row.to(tl.int32))
    length = known + local
    if cache_position_ptr is not None:
        length = tl.load(cache_position_ptr + row * stride_cache).to(tl.int32) + 1
    step = length - prompt
    prompt = tl.maximum(prompt, 0)
    stored = tl.minimum(tl.maximum(length - local, 0), known)
    # A tuple holds no None; where there are no drafts, nothing that is seen lies beyond what is stored.
    first_draft = history_ptr
    if drafts_ptr is not None:
        first_draft = drafts_ptr + (row - local + 1) * stride_draft
    else:
        local = 0
    text = (history_ptr + slot * stride_history, first_draft, stored, stride_draft)
    seen = stored + local

    forced_ptr, forced_count = _list(record_ptr, active, FORCED)
    is_forced = (step >= 0) & (step < forced_count)
    forced = tl.load(forced_ptr + step, mask=is_forced, other=0)
    asks = active & (is_forced == 0)  # a forced token leaves nothing else to find
    seen = tl.where(asks, seen, 0)

    biases_ptr, biases = _list(record_ptr, asks, BIASES)
    bans_ptr, bans = _list(record_ptr, asks, BANS)
    stops_ptr, stops = _list(record_ptr, asks & (step < tl.load(record_ptr + MIN_TOKENS)), STOPS)
    in_window = asks & (step < tl.load(record_ptr + FIRST_WINDOW))
    firsts_ptr, firsts = _list(record_ptr, in_window, FIRSTS)
    words_ptr, words_length = _list(record_ptr, asks, WORDS)
    _width_ptr, width = _list(record_ptr, asks, WIDTH)
    dry_ptr, dry_count = _list(record_ptr, asks, DRY)
    ngram = tl.load(record_ptr + NGRAM)
    temperature = _float(tl.load(record_ptr + TEMPERATURE))
    repetition = _float(tl.load(record_ptr + REPETITION))
    presence = _float(tl.load(record_ptr + PRESENCE))
    frequency = _float(tl.load(record_ptr + FREQUENCY))

    # From where on tokens are penalised, and the first of them that is edited.
    repeats_from = tl.where((flags & OUTPUT_REPETITION) != 0, prompt, 0)
    repeats_from = tl.where(((flags & TALLIED) != 0) & (repetition != 1.0), repeats_from, seen)
    counts_from = tl.where((flags & OUTPUT_COUNTS) != 0, prompt, 0)
    counts = (presence != 0.0) | (frequency != 0.0)
    counts_from = tl.where(((flags & TALLIED) != 0) & counts, counts_from, seen)
    edits_from = tl.minimum(tl.minimum(repeats_from, counts_from), tl.where(dry_count > 0, 0, seen))

    # The masks of the range, as far as each holds; no edits.
    last_banned = tl.where(asks & ((flags & BAN_MASK) != 0), last, first)
    last_first = tl.where(in_window & ((flags & FIRST_MASK) != 0), last, first)
    last_obeyed = tl.where(asks & ((flags & BITMASK) != 0), last, first)
    needs_bitmask = asks & ((flags & NEEDS_BITMASK) != 0)
    forced_word = tl.where(is_forced, forced >> 5, -1)
    for start in range(first, last, BLOCK):
        word = start + tl.arange(0, BLOCK)
        inside = word < last
        banned = tl.load(masks_ptr + _BAN_PLANE * W + word, mask=word < last_banned, other=0)
        banned |= tl.load(masks_ptr + _FIRST_PLANE * W + word, mask=word < last_first, other=0)
        if bitmask_ptr is not None:
            here = bitmask_ptr + row * stride_bitmask + word
            allowed = tl.load(here, mask=word < tl.minimum(last_obeyed, M), other=0)
            banned |= tl.where(word < last_obeyed, ~allowed, 0)
        else:
            banned = tl.where(needs_bitmask, -1, banned)
        own = tl.where(word == forced_word, tl.full([BLOCK], 1, tl.int32) << (forced & 31), 0)
        banned = tl.where(is_forced, ~own, banned)
        if DRAWS:
            banned = tl.where(active, banned, -1)
        tl.store(sets_ptr + _BANNED * stride_set + word, banned, mask=inside)
        tl.store(sets_ptr + _EDITED * stride_set + word, own, mask=inside)
    tl.debug_barrier()

    banned_ptr = sets_ptr + _BANNED * stride_set
    edited_ptr = sets_ptr + _EDITED * stride_set
    _mark_list(banned_ptr, bans_ptr, bans, first, last, V, LIST_BLOCK)
    _mark_list(banned_ptr, stops_ptr, stops, first, last, V, LIST_BLOCK)
    _mark_list(banned_ptr, firsts_ptr, firsts, first, last, V, LIST_BLOCK)
    least = 0
    if WORDS_IN_OUTPUT:
        least = prompt
    _mark_words(banned_ptr, text, seen, least, words_ptr, words_length, width, first, last, V, LIST_BLOCK)
    _mark_repeated(banned_ptr, text, seen, ngram, first, last, V, BLOCK)
    _mark_list(edited_ptr, biases_ptr, biases, first, last, V, LIST_BLOCK)
    for i in range(edits_from, seen, BLOCK):
        column = i + tl.arange(0, BLOCK)
        token = _token(text, column, column < seen)
        _mark(edited_ptr, token, _is_mine(token, first, last, V))
    tl.debug_barrier()

    # Ranks of the edited tokens, and clean places for them.
    edits = is_forced | (biases > 0) | (edits_from < seen)
    last_edited = tl.where(edits, last, first)
    total = tl.full([], 0, tl.int32)
    for start in range(first, last_edited, BLOCK):
        word = start + tl.arange(0, BLOCK)
        total += tl.sum(popcount(tl.load(edited_ptr + word, mask=word < last, other=0)))
    base = tl.atomic_add(cursors_ptr + row, total, sem="relaxed")
    tl.store(spans_ptr + row * stride_span + 2 * split, base)
    tl.store(spans_ptr + row * stride_span + 2 * split + 1, total)
    tl.store(listed_ptr + (base & (ROOM - 1)), forced, mask=is_forced & (total > 0))
    before = base
    for start in range(first, last_edited, BLOCK):
        word = start + tl.arange(0, BLOCK)
        held = popcount(tl.load(edited_ptr + word, mask=word < last, other=0))
        tl.store(sets_ptr + _RANKS * stride_set + word, before + tl.cumsum(held) - held, mask=word < last)
        before += tl.sum(held)
    for start in range(0, total, BLOCK):
        place = start + tl.arange(0, BLOCK)
        here = (base + place) & (ROOM - 1)
        tl.store(tallies_ptr + here, 0, mask=place < total)
        tl.store(values_ptr + here, 0.0, mask=place < total)
    tl.debug_barrier()

    _tally_repetitions(
        tallies_ptr, sets_ptr, stride_set, text, tl.where(dry_count > 0, seen, 0), masks_ptr + _BREAKER_PLANE * W,
        tl.where((flags & BREAKER_MASK) != 0, V, 0), first, last, V, ROOM, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    for i in range(tl.minimum(repeats_from, counts_from), seen, BLOCK):
        column = i + tl.arange(0, BLOCK)
        token = _token(text, column, column < seen)
        mine = _is_mine(token, first, last, V)
        here = tallies_ptr + _place(sets_ptr, stride_set, token, mine, ROOM)
        tl.atomic_add(here, tl.full([BLOCK], 1, tl.int32), mask=mine & (column >= counts_from), sem="relaxed")
        tl.atomic_or(here, tl.full([BLOCK], _REPEATED, tl.int32), mask=mine & (column >= repeats_from), sem="relaxed")
    for k in range(0, biases, LIST_BLOCK):
        entry = k + tl.arange(0, LIST_BLOCK)
        token = tl.load(biases_ptr + entry, mask=entry < biases, other=-1)
        mine = _is_mine(token, first, last, V)
        value = _float(tl.load(biases_ptr + biases + entry, mask=entry < biases, other=0))
        tl.store(values_ptr + _place(sets_ptr, stride_set, token, mine, ROOM), value, mask=mine)
    tl.debug_barrier()

    penalties = (repetition, presence, frequency)
    for i in range(edits_from, seen, BLOCK):
        column = i + tl.arange(0, BLOCK)
        token = _token(text, column, column < seen)
        mine = _is_mine(token, first, last, V)
        place = _place(sets_ptr, stride_set, token, mine, ROOM)
        _edit(
            tallies_ptr, values_ptr, listed_ptr, place, mine, scores_ptr, token, stride_token, penalties, dry_ptr,
            dry_count, BIAS_LAST, DRAWS,
        )  # fmt: skip
    for k in range(0, biases, LIST_BLOCK):
        entry = k + tl.arange(0, LIST_BLOCK)
        token = tl.load(biases_ptr + entry, mask=entry < biases, other=-1)
        mine = _is_mine(token, first, last, V)
        place = _place(sets_ptr, stride_set, token, mine, ROOM)
        _edit(
            tallies_ptr, values_ptr, listed_ptr, place, mine, scores_ptr, token, stride_token, penalties, dry_ptr,
            dry_count, BIAS_LAST, DRAWS,
        )  # fmt: skip

    if split == 0:
        # Temperature and parameters as bits.
        idle: tl.constexpr = _ZERO_OR_ONE[0] if DRAWS else _ZERO_OR_ONE[1]
        tl.store(of_rows_ptr + row, tl.where(active, tl.load(record_ptr + TEMPERATURE), idle))
        acts = active & (temperature >= TINY_TEMPERATURE)
        for rule in tl.static_range(_N_RULES):
            value = tl.where(acts, tl.load(record_ptr + RULES + rule), _OFF[rule])
            tl.store(of_rows_ptr + (rule + 1) * stride_numbers + row, value)
        tl.store(counts_ptr + row, tl.where(active, tl.load(record_ptr + LOGPROBS), -1))
        low = tl.load(record_ptr + SEED).to(tl.int64) & 0xFFFFFFFF
        high = tl.load(record_ptr + SEED + 1).to(tl.int64)
        tl.store(longs_ptr + row, (high << 32) | low)
        tl.store(longs_ptr + stride_numbers + row, length.to(tl.int64))


# Words of a set and positions of a history are taken in blocks of this many, entries of lists in smaller ones.
_BLOCK = 1024
_LIST_BLOCK = 128
# As many fit on a GPU at once, with the registers that they take; more for a row would only read its history again.
_PROGRAMS = 264

_slot_sets_launcher = Launcher(_slot_sets_kernel, num_warps=8, enable_fp_fusion=False)


class Step:
    """What the steps of a batch have in common, made once: all that a captured graph reads and writes.

    Args:
        tables: the slots.
        rows: rows that a step may have.
        V: tokens of the vocabulary.
        rules: truncations, in the order in which they act.
        ties: which tokens that tie at an edge they keep.
        semantics: what else all requests have in common.
        listed: words of a slot's lists.
    """

    def __init__(
        self,
        tables: Slots,
        rows: int,
        V: int,
        rules: tuple[RuleKind, ...],
        ties: Ties,
        semantics: Semantics,
        listed: int,
    ) -> None:
        self.slots, self.kinds, self.ties, self.semantics = tables, rules, ties, semantics
        self.V, self.W, self.most_rows = V, words(V), rows
        # As many places as a row may edit tokens: those it sees, and those with a bias.
        most = min(V, tables.history.shape[1] + rows + listed)
        self.room = 1 << max(0, most - 1).bit_length()
        # A program of the search has one list of what it edits, and no fewer words than a block.
        self.lists = -(-self.W // _BLOCK)
        # On a GPU now: what is allocated while a graph is captured lives with that graph.
        self._made = _Workspace(self) if tables.records.is_cuda else None

    @property
    def bytes_per_row(self) -> int:
        """Memory of a row, besides that of the truncations: its sets and its edits."""
        return 4 * (3 * self.W + 3 * self.room + 2 * self.lists) + 4 * (len(RULE_KINDS) + 6)

    def rules(self, numbers: Numbers) -> list[Rule]:
        """The truncations with the numbers of each row."""
        values = numbers.rules
        return [Rule(kind, values[kind], ties=self.ties) for kind in self.kinds]

    @property
    def workspace(self) -> _Workspace:
        """What the kernels write."""
        if self._made is None:
            self._made = _Workspace(self)
        return self._made


class _Workspace:
    """What the kernels of a step write, and what those after them read of it."""

    def __init__(self, step: Step) -> None:
        device, rows = step.slots.records.device, step.most_rows
        self.bits = torch.zeros(3, rows, step.W, dtype=torch.int32, device=device)
        self.cursors = torch.zeros(rows, dtype=torch.int32, device=device)
        self.tallies = torch.zeros(rows, step.room, dtype=torch.int32, device=device)
        self.values = torch.zeros(rows, step.room, dtype=torch.float32, device=device)
        self.listed = torch.zeros(rows, step.room, dtype=torch.int32, device=device)
        self.spans = torch.zeros(rows, step.lists, 2, dtype=torch.int32, device=device)
        self.numbers = Numbers.empty(rows, device)
        self.selection = Selection(step.rules(self.numbers), step.V, device)
        portable = device.type != "cuda" or torch.version.hip is not None
        replace = fold.REPLACE if portable else fold.REPLACE_PTX
        self.chain = Chain([
            Op(replace.value, _EDITED.value, step.room - 1, _RANKS.value), Op(fold.BAN.value, _BANNED.value)
        ])  # fmt: skip


def launch_slot_sets(step: Step, scores: torch.Tensor, rows: Rows, draws: bool) -> TokenSets:
    """Find what the requests of the rows ask for: one launch."""
    made, tables = step.workspace, step.slots
    B, V = scores.shape
    W = step.W
    splits = max(1, min(step.lists, _PROGRAMS // B))
    numbers, given = made.numbers, (rows.cache_position, rows.local_position, rows.draft_ids)
    key = (
        scores.device, scores.dtype, V, step.semantics, draws, step.room, scores.stride(1),
        rows.slots.dtype, rows.bitmask is None, tuple([None if each is None else each.dtype for each in given]),
        tables.history.dtype, tables.lengths.dtype, tables.prompts.dtype,
    )  # fmt: skip
    cache, local, drafts = (0 if each is None else each.stride(0) for each in given)
    bitmask = rows.bitmask
    _slot_sets_launcher(key, B * splits, (
        scores, rows.slots, rows.cache_position, rows.local_position, rows.draft_ids, bitmask,
        tables.records, tables.masks, tables.history, tables.lengths, tables.prompts,
        made.bits, made.cursors, made.tallies, made.values, made.listed, made.spans, numbers.values,
        numbers.counts, numbers.longs,
        V, W, tables.records.shape[0], tables.history.shape[1], 0 if bitmask is None else bitmask.shape[1], splits,
        scores.stride(0), scores.stride(1), rows.slots.stride(0), cache, local, drafts,
        0 if bitmask is None else bitmask.stride(0),
        tables.records.stride(0), tables.history.stride(0), tables.lengths.stride(0), tables.prompts.stride(0),
        made.bits.stride(0), made.spans.stride(0), numbers.values.stride(0),
        draws, step.semantics.bias_last, step.semantics.words_in_output, step.room, _BLOCK, _LIST_BLOCK,
        overlaps(scores.device),
    ))  # fmt: skip
    return TokenSets(made.bits, made.values, listed=Listed(made.listed, made.spans, splits))


# -- Steps ----------------------------------------------------------------------------------------------------------

_OPERATION = Operation("slots")
FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""


def _takes(scores: torch.Tensor) -> bool:
    return _OPERATION.takes(scores, FORCE_KERNEL)


def _reference(step: Step, scores: torch.Tensor, rows: Rows, draws: bool) -> tuple[torch.Tensor, torch.Tensor, Numbers]:
    """Scores after temperature and rules, float32, and which rows are greedy."""
    x, numbers = reference_slots(scores, step.slots, rows, step.semantics, draws)
    return *reference_distribution(x, numbers.temperature, step.rules(numbers)), numbers


def _fitted(processed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits that the dtype holds: float16 ones are scaled where a row's largest would overflow."""
    if dtype != torch.float16:
        return processed
    most = processed.amax(-1, keepdim=True).abs().clamp(min=65504.0)
    return torch.where(most.isfinite(), processed * (65504.0 / most), processed)


@_OPERATION.falls_back
def process_rows(step: Step, scores: torch.Tensor, rows: Rows, out: torch.Tensor) -> torch.Tensor:
    """Write the processed ``scores`` ``[B, V]`` to ``out``, which may be ``scores`` itself; returns ``out``."""
    if not scores.numel():
        return out
    if not _takes(scores):
        processed, _, _ = _reference(step, scores, rows, False)
        return out.copy_(_fitted(processed, out.dtype))
    made = step.workspace
    found = launch_slot_sets(step, scores, rows, False)
    temperature = made.numbers.temperature
    # In place, nothing may be written before all rows are settled.
    to = None if out is scores else out
    work = launch_select(scores, made.selection, made.chain, found, out=to, temperature=temperature)
    if to is None:
        launch_keep(scores, out, made.selection, kept_in(work), made.chain, found, temperature)
    return out


@_OPERATION.falls_back
def sample_rows(
    step: Step, scores: torch.Tensor, rows: Rows, logprobs: Literal["raw", "processed"] | None = None, count: int = 0
) -> tuple[torch.Tensor, Report | None]:
    """A token of each row, int64 ``[B]``, and a report on it in the logits as they are or as they are drawn from.

    There is room for ``count`` of the likeliest tokens.
    """
    if not _takes(scores):
        processed, greedy, numbers = _reference(step, scores, rows, True)
        tokens = draw(processed, numbers.longs[0], numbers.longs[1], greedy)
        if logprobs is None:
            return tokens, None
        return tokens, report(scores if logprobs == "raw" else processed, tokens, count, numbers.counts)
    tokens = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    if not scores.numel():
        return tokens, None if logprobs is None else report(scores, tokens, count)
    made = step.workspace
    numbers, selection = made.numbers, made.selection
    found = launch_slot_sets(step, scores, rows, True)
    work = launch_select(
        scores, selection, made.chain, found, temperature=numbers.temperature, seeds=numbers.longs[0],
        positions=numbers.longs[1], tokens=tokens,
    )  # fmt: skip
    if logprobs is None:
        return tokens, None
    counts = numbers.counts[: len(tokens)]
    if logprobs == "raw":
        return tokens, report(scores, tokens, count, counts)
    if not takes(scores, count):
        processed = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        launch_keep(scores, processed, selection, kept_in(work), made.chain, found, numbers.temperature)
        return tokens, report(processed, tokens, count, counts)
    left = KeptRows(kept_in(work), selection.lowest_ties, selection.banded)
    return tokens, launch_report(scores, tokens, count, counts, made.chain, found, numbers.temperature, left)


# -- Histories ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_APPEND_STEPWISE, do_not_specialize_on_alignment=_APPEND_UNALIGNED)
def _append_kernel(
    # inputs
    slots_ptr, tokens_ptr,
    # outputs
    records_ptr, history_ptr, lengths_ptr,
    # shapes
    N, S, L,
    # strides
    stride_slot, stride_token, stride_record, stride_history, stride_length,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a token's place is the length of its history and the number of earlier tokens for the same slot."""
    for start in range(0, N, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        slot, token = _appended(
            slots_ptr, tokens_ptr, records_ptr, entry, N, S, stride_slot, stride_token, stride_record
        )
        place = tl.load(lengths_ptr + slot.to(tl.int64) * stride_length, mask=slot >= 0, other=0).to(tl.int32)
        for other_start in range(0, start + BLOCK, BLOCK):
            other = other_start + tl.arange(0, BLOCK)
            theirs, _token = _appended(
                slots_ptr, tokens_ptr, records_ptr, other, N, S, stride_slot, stride_token, stride_record
            )
            earlier = (theirs[None, :] == slot[:, None]) & (other[None, :] < entry[:, None])
            place += tl.sum(earlier.to(tl.int32), 1)
        here = history_ptr + slot.to(tl.int64) * stride_history + place
        tl.store(here, token, mask=(slot >= 0) & (place < L))
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        slot, token = _appended(
            slots_ptr, tokens_ptr, records_ptr, entry, N, S, stride_slot, stride_token, stride_record
        )
        one = tl.full([BLOCK], 1, lengths_ptr.dtype.element_ty)
        here = lengths_ptr + slot.to(tl.int64) * stride_length
        length = tl.atomic_add(here, one, mask=slot >= 0, sem="relaxed")
        # One that was too many is taken back: so many tokens leave no more than the limit.
        tl.atomic_add(here, -one, mask=(slot >= 0) & (length >= L), sem="relaxed")


@triton.jit
def _appended(slots_ptr, tokens_ptr, records_ptr, entry, N, S, stride_slot, stride_token, stride_record):
    """Slots and tokens of some entries; the slot is -1 where there is nothing to append."""
    slot = tl.load(slots_ptr + entry * stride_slot, mask=entry < N, other=-1)
    token = tl.load(tokens_ptr + entry * stride_token, mask=entry < N, other=-1)
    there = (slot >= 0) & (slot < S) & (token >= 0)
    slot = slot.to(tl.int32)
    flags = tl.load(records_ptr + slot.to(tl.int64) * stride_record + FLAGS, mask=there, other=0)
    return tl.where(there & ((flags & ACTIVE) != 0), slot, -1), _narrow(token)


_append_launcher = Launcher(_append_kernel, num_warps=4)
_APPEND_BLOCK = 32


@_OPERATION.falls_back
def append_tokens(tables: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot, in their order, as far as there is room: one launch."""
    if not _takes(tables.records):
        reference_append(tables, of, tokens)
    elif len(of):
        _append_launcher((of.device, of.dtype, tokens.dtype), 1, (
            of, tokens, tables.records, tables.history, tables.lengths,
            len(of), tables.records.shape[0], tables.history.shape[1],
            of.stride(0), tokens.stride(0), tables.records.stride(0), tables.history.stride(0),
            tables.lengths.stride(0),
            _APPEND_BLOCK,
        ))  # fmt: skip


# -- Slots that change places ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["a", "b", "N", "stride_row"], do_not_specialize_on_alignment=["table_ptr"])
def _swap_kernel(
    # input and output
    table_ptr, a, b,
    # shapes
    N,
    # strides
    stride_row,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a_ptr = table_ptr + a.to(tl.int64) * stride_row + word
    b_ptr = table_ptr + b.to(tl.int64) * stride_row + word
    of_a = tl.load(a_ptr, mask=word < N)
    of_b = tl.load(b_ptr, mask=word < N)
    tl.store(a_ptr, of_b, mask=word < N)
    tl.store(b_ptr, of_a, mask=word < N)


_swap_launcher = Launcher(_swap_kernel, num_warps=4)
_SWAP_BLOCK = 1024


@_OPERATION.falls_back
def swap_slots(table: torch.Tensor, a: int, b: int) -> None:
    """Exchange two rows of ``table``, int32 ``[S, N]``: one launch, which reads and writes both once."""
    if not _takes(table):
        reference_swap(table, a, b)
        return
    N = table.shape[1]
    _swap_launcher((table.device,), -(-N // _SWAP_BLOCK), (table, a, b, N, table.stride(0), _SWAP_BLOCK))
