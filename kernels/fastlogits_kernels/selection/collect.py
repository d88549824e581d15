"""Collect the tokens of a row that pass a test: the candidates."""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.runtime.ptx import check_tokens, for_tokens, logits_of
from fastlogits_kernels.selection.noise import coarse_of, may_win


class Collection(NamedTuple):
    """Where tokens are collected: a counter, and room for ``slots`` of them, each with its logit."""

    counter: tl.tensor
    pairs: tl.tensor
    slots: tl.tensor


class Excluded(NamedTuple):
    """Two sets of tokens, as bits, that are not collected; None for none."""

    edited_ptr: tl.tensor
    banned_ptr: tl.tensor


# Hardly any thread has a candidate: one test serves all tokens of its 16 bytes, and a warp without any takes one
# branch. Triton itself would make an atomic addition and a store for each token, longer than the rest of the filter.
_BETWEEN = """
    setp.geu.f32 some, largest, $low; vote.sync.any.pred some, some, 0xffffffff;
    @!some bra done;
    setp.geu.f32 asks#, value#, $low; setp.leu.and.f32 asks#, value#, $up, asks#; \
    setp.lt.and.s32 asks#, $token#, $end, asks#;
"""
# The largest logit and the least noise of an octet serve all its tokens.
_MAY_WIN = """
    .reg .f32 limit, coarse;
    .reg .b32 least, pair, word;
    .reg .pred is;
    mov.b32 least, $least0;
    min.u32 least, least, $least#;
    fma.rn.f32 limit, largest, $scale, $offset; ex2.approx.f32 limit, limit; cvt.rn.f32.u32 coarse, least;
    setp.ltu.f32 some, coarse, limit; vote.sync.any.pred some, some, 0xffffffff;
    @!some bra done;
    and.b32 pair, $token#, 6; setp.eq.b32 is, pair, 0; selp.b32 word, $aa#, $bb#, is; \
    setp.eq.b32 is, pair, 4; selp.b32 word, $cc#, word, is; setp.eq.b32 is, pair, 6; selp.b32 word, $dd#, word, is; \
    and.b32 pair, $token#, 1; shl.b32 pair, pair, 4; shr.u32 word, word, pair; and.b32 word, word, 65535; \
    cvt.rn.f32.u32 coarse, word; fma.rn.f32 limit, value#, $scale, $offset; ex2.approx.f32 limit, limit; \
    setp.ltu.f32 asks#, coarse, limit; setp.lt.and.s32 asks#, $token#, $end, asks#;
"""
# Tokens that were chosen before.
_CHOSEN = """
    .reg .f32 value<4>;
    setp.ne.s32 asks#, $candidate#, 0; mov.f32 value#, $x#;
"""
# Tokens of neither of two sets.
_NOT_EXCLUDED = """
    .reg .b32 place, plain, hidden;
    .reg .b64 from;
    mov.b32 plain, 0; mov.b32 hidden, 0; shr.u32 place, $token#, 5; mad.wide.u32 from, place, 4, $edited; \
    @asks# ld.global.b32 plain, [from]; mad.wide.u32 from, place, 4, $banned; @asks# ld.global.b32 hidden, [from]; \
    or.b32 plain, plain, hidden; and.b32 place, $token#, 31; shr.u32 plain, plain, place; and.b32 plain, plain, 1; \
    setp.eq.and.b32 asks#, plain, 0, asks#;
"""
# A warp asks for room once.
_STORE = """
    .reg .b32 count, free, lane, below, votes<8>, mine<8>;
    .reg .b64 to;
    .reg .pred first;
    vote.sync.ballot.b32 votes#, asks#, 0xffffffff;
    mov.b32 count, 0;
    popc.b32 mine#, votes#; add.u32 count, count, mine#;
    setp.eq.s32 first, count, 0;
    @first bra done;
    mov.u32 lane, %laneid; mov.u32 below, %lanemask_lt; mov.b32 free, 0; setp.eq.u32 first, lane, 0;
    @first atom.relaxed.gpu.global.add.u32 free, [$counter], count;
    shfl.sync.idx.b32 free, free, 0, 31, 0xffffffff;
    and.b32 lane, votes#, below; popc.b32 lane, lane; add.u32 lane, lane, free; \
    setp.lt.and.u32 asks#, lane, $slots, asks#; mad.wide.u32 to, lane, 8, $pairs; \
    @asks# st.global.v2.b32 [to], {value#, $token#}; add.u32 free, free, mine#;
    done:
"""

_START = ".reg .pred some, asks<8>;"
_COLLECT_ONE, _COLLECT_ONE_OPERANDS = for_tokens(
    "out:b candidate x token counter:l pairs:l slots", f"{_START}\nmov.b32 $out0, 0;\n" + _CHOSEN + _STORE, 4
)


def _collecting(dtype: str, wins: bool, excludes: bool) -> tuple[tl.constexpr, tl.constexpr]:
    """PTX that collects tokens of 16 bytes: those between two logits, or those that may win; none of two sets."""
    wide = dtype != "fp32"
    operands = f"out:b x{':h' if wide else ''} token end counter:l pairs:l slots"
    operands += " least aa bb cc dd scale offset" if wins else " low up"
    operands += " edited:l banned:l" if excludes else ""
    outputs = "mov.b32 $out0, 0;" + " mov.b32 $out1, 0;" * wide
    body = (
        f"{_START}\n{outputs}\n"
        + logits_of(dtype)
        + (_MAY_WIN if wins else _BETWEEN)
        + (_NOT_EXCLUDED if excludes else "")
    )
    return for_tokens(operands, body + _STORE, 8 if wide else 4)


_DTYPES = ("fp32", "bf16", "fp16")
_MADE = [
    _collecting(dtype, wins, excludes) for dtype in _DTYPES for wins in (False, True) for excludes in (False, True)
]
_COLLECTING = tl.constexpr(tuple(text.value for text, _ in _MADE))
_COLLECTING_OPERANDS = tl.constexpr(tuple(operands.value for _, operands in _MADE))
_BF16, _FP16 = tl.constexpr(_DTYPES.index("bf16")), tl.constexpr(_DTYPES.index("fp16"))


@triton.jit
def collect(candidate, x, token, to, PORTABLE: tl.constexpr):
    """Collect candidates of float32 logits, each as 64 bits: its token above its logit."""
    if PORTABLE:
        # The interpreter may hold what was combined as something else than booleans.
        candidate = candidate.to(tl.int32) != 0
        place = tl.atomic_add(to.counter + tl.zeros_like(token), 1, mask=candidate, sem="relaxed")
        here = to.pairs + 2 * place
        tl.store(here, x.to(tl.int32, bitcast=True), mask=candidate & (place < to.slots))
        tl.store(here + 1, token, mask=candidate & (place < to.slots))
    else:
        check_tokens(x, 4)
        tl.inline_asm_elementwise(
            _COLLECT_ONE, _COLLECT_ONE_OPERANDS,
            [candidate.to(tl.int32), x, token, to.counter.to(tl.int64), to.pairs.to(tl.int64), to.slots],
            dtype=tl.int8, is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def _collect_tested(x, token, end, tests, excluded, to, WINS: tl.constexpr):
    """Collect tokens by PTX; ``tests`` are the operands of the test."""
    KIND: tl.constexpr = _BF16 if x.dtype == tl.bfloat16 else (_FP16 if x.dtype == tl.float16 else 0)
    TOKENS: tl.constexpr = 4 if KIND == 0 else 8
    EXCLUDES: tl.constexpr = excluded.edited_ptr is not None
    WHICH: tl.constexpr = 4 * KIND + 2 * WINS + EXCLUDES
    check_tokens(x, TOKENS)
    sets = (excluded.edited_ptr.to(tl.int64), excluded.banned_ptr.to(tl.int64)) if EXCLUDES else ()
    tl.inline_asm_elementwise(
        _COLLECTING[WHICH], _COLLECTING_OPERANDS[WHICH],
        (x, token, end, to.counter.to(tl.int64), to.pairs.to(tl.int64), to.slots) + tests + sets,  # noqa: RUF005
        dtype=tl.int8, is_pure=False, pack=TOKENS,
    )  # fmt: skip


@triton.jit
def _collect_chosen(candidate, x, token, end, excluded, to):
    """Collect candidates without PTX, those before ``end`` that are not excluded."""
    candidate = candidate & (token < end)
    if excluded.edited_ptr is not None:
        bits = tl.load(excluded.edited_ptr + (token >> 5), mask=candidate, other=0)
        bits |= tl.load(excluded.banned_ptr + (token >> 5), mask=candidate, other=0)
        candidate = candidate & (((bits >> (token & 31)) & 1) == 0)
    collect(candidate, x, token, to, True)


@triton.jit
def collect_between(x, token, end, low, up, excluded, to, PORTABLE: tl.constexpr):
    """Collect tokens before ``end`` with logits from ``low`` to ``up``, of any dtype, and NaN."""
    if PORTABLE:
        x = x.to(tl.float32)
        _collect_chosen(((x < low) == 0) & ((x > up) == 0), x, token, end, excluded, to)
    else:
        _collect_tested(x, token, end, (low, up), excluded, to, False)


@triton.jit
def collect_winners(x, token, end, words, least, test, excluded, to, PORTABLE: tl.constexpr):
    """Collect tokens before ``end`` that ``may_win``; ``words`` and ``least`` are the noise of their octets."""
    if PORTABLE:
        x = x.to(tl.float32)
        _collect_chosen(may_win(coarse_of(token, words), x, test), x, token, end, excluded, to)
    else:
        noise = (
            least.to(tl.int32, bitcast=True), words[0].to(tl.int32, bitcast=True),
            words[1].to(tl.int32, bitcast=True), words[2].to(tl.int32, bitcast=True),
            words[3].to(tl.int32, bitcast=True), test.scale, test.offset,
        )  # fmt: skip
        _collect_tested(x, token, end, noise, excluded, to, True)


@triton.jit
def load_candidates(pairs, found, SLOTS: tl.constexpr):
    """Logits, whether they are there, and tokens of what was collected."""
    slot = tl.arange(0, SLOTS)
    valid = slot < found
    # From L2: this multiprocessor may hold what stood there before.
    pair = tl.load(pairs + slot, mask=valid, other=0, volatile=True)
    return pair.to(tl.int32).to(tl.float32, bitcast=True), valid, (pair >> 32).to(tl.int32)
