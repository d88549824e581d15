"""Apply a chain of pointwise maps to the logits in one pass, in the order that the user gave them.

    x = scores[b, v];  for op in ops: x = op(x, what the sets and values say of b and v);  out[b, v] = x

Between two maps x is rounded to the dtype of the scores, as it is where each map is a kernel of its own. No product is
contracted with a sum. Bytes moved: one read and one write of the logits, one bit a logit for each set, and 4 bytes for
each token that has a value of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch

from fastlogits_kernels.pointwise.places import Places, find_places, find_row_value
from fastlogits_kernels.pointwise.search import (
    NOTHING,
    Call,
    Search,
    StaticSets,
    TokenSets,
    launch_token_sets,
    planes_of,
)
from fastlogits_kernels.runtime.backend import Operation, has_gradient
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import Launcher, empty_out, form_of, table_on, tl, triton
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.runtime.ptx import for_tokens
from fastlogits_kernels.runtime.rows import check_rows

# Kinds of maps; each is followed by what it does to the tokens of its set, or to all.
BAN = tl.constexpr(0)  # -inf
SINK = tl.constexpr(1)  # x - inf: NaN stays NaN
PENALIZE = tl.constexpr(2)  # x < 0: x * numbers[a]; else x / numbers[a], by way of numbers[b]
SCALE = tl.constexpr(3)  # x / numbers[a], by way of numbers[b]; all tokens
ADD = tl.constexpr(4)  # x + numbers[a]; unless b >= 0, torch may round that to a narrow dtype of x first, on a CPU
ADD_COUNTED = tl.constexpr(5)  # x + numbers[a] * plane b
ADD_PLANE = tl.constexpr(6)  # x + plane b, rounded
ADD_ROW = tl.constexpr(7)  # x + row a of the biases, rounded
GROW = tl.constexpr(8)  # x + |x| * row value a, where x is finite
FORCE = tl.constexpr(9)  # where row value a is 1: 0 in the set, -inf elsewhere
CLEAN = tl.constexpr(10)  # NaN to 0, infinities to the largest finite values; all tokens
ADD_VALUE = tl.constexpr(11)  # x + row value a
REPLACE = tl.constexpr(12)  # the row's value of the token's rank in the set, where that is in a ring of a + 1 of them
REPLACE_PTX = tl.constexpr(13)  # the same in PTX; in both, set b holds the rank at which each word begins
MIX = tl.constexpr(15)  # (x - plane b) * numbers[a] + plane b, rounded after each; all tokens
SUBTRACT = tl.constexpr(14)  # x - plane b, which is not rounded before


class Op(NamedTuple):
    """One map of the chain; ``set`` is -1 where it speaks of all tokens."""

    kind: int
    set: int = -1
    a: int = -1
    b: int = -1


# Where the fields of a map stand in the flat tuple that the kernel is compiled for.
OP_KIND, OP_SET, OP_A, OP_B = (tl.constexpr(i) for i in range(len(Op._fields)))
OP_SIZE = tl.constexpr(len(Op._fields))

FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""

_UNALIGNED = ["bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr"]
_STEPWISE = ["W", "row_blocks", "stride_set", "stride_bits_row", "stride_plane", "stride_values_row"]


class Tokens(NamedTuple):
    """Where logits stand: their row, a scalar; words, lanes and ids, which broadcast to the shape of the logits."""

    row: tl.tensor
    word: tl.tensor
    lane: tl.tensor
    token: tl.tensor
    inside: tl.tensor


class Maps(NamedTuple):
    """What the maps of a chain read: sets, planes of values, biases, values of rows, and parameters."""

    bits_ptr: tl.tensor
    planes_ptr: tl.tensor
    biases_ptr: tl.tensor
    row_values_ptr: tl.tensor
    numbers_ptr: tl.tensor
    stride_set: tl.tensor
    stride_bits_row: tl.tensor
    stride_plane: tl.tensor
    stride_values_row: tl.tensor


@triton.jit
def _plane_values(maps, at, plane: tl.constexpr, found, V):
    """What a plane says of the found tokens; 0 of the others."""
    here = maps.planes_ptr + plane * maps.stride_plane + at.row * V + at.token
    return tl.load(here, mask=at.inside & found, other=0.0)


@triton.jit
def fold_logits(x, at, maps, V, W, dtype: tl.constexpr, OPS: tl.constexpr, MAX: tl.constexpr):
    """The maps of a chain, one after the other, on float32 logits of any shape that are rounded to ``dtype`` between.

    ``maps`` may be any tuple with the fields of ``Maps``; ``MAX`` is the largest number of the dtype.
    """
    bit = 1 << at.lane
    for i in tl.static_range(0, len(OPS), OP_SIZE):
        if OPS[i + OP_SET] >= 0:
            here = maps.bits_ptr + OPS[i + OP_SET] * maps.stride_set + at.row * maps.stride_bits_row + at.word
            held = tl.load(here, mask=at.word < W, other=0)
            found = (held & bit) != 0
        if OPS[i + OP_KIND] == BAN:
            x = tl.where(found, float("-inf"), x)
        if OPS[i + OP_KIND] == SINK:
            x = tl.where(found, x + float("-inf"), x)
        if OPS[i + OP_KIND] == PENALIZE:
            penalty = tl.load(maps.numbers_ptr + OPS[i + OP_A])
            x = tl.where(found, tl.where(x < 0, x * penalty, x * tl.load(maps.numbers_ptr + OPS[i + OP_B])), x)
        if OPS[i + OP_KIND] == SCALE:
            x = x * tl.load(maps.numbers_ptr + OPS[i + OP_B])
        if OPS[i + OP_KIND] == MIX:
            mate = _plane_values(maps, at, OPS[i + OP_B], at.inside, V)
            x = (x - mate).to(dtype).to(tl.float32)
            x = (x * tl.load(maps.numbers_ptr + OPS[i + OP_A])).to(dtype).to(tl.float32) + mate
        if OPS[i + OP_KIND] == ADD:
            x = tl.where(found, x + tl.load(maps.numbers_ptr + OPS[i + OP_A]), x)
        if OPS[i + OP_KIND] == ADD_COUNTED:
            count = _plane_values(maps, at, OPS[i + OP_B], found, V)
            x = tl.where(found, x + count * tl.load(maps.numbers_ptr + OPS[i + OP_A]), x)
        if OPS[i + OP_KIND] == ADD_VALUE:
            value = tl.load(maps.row_values_ptr + at.row * maps.stride_values_row + OPS[i + OP_A])
            x = tl.where(found, x + value, x)
        if OPS[i + OP_KIND] == ADD_PLANE:
            x += _plane_values(maps, at, OPS[i + OP_B], found, V).to(dtype).to(tl.float32)
        if OPS[i + OP_KIND] == SUBTRACT:
            x -= _plane_values(maps, at, OPS[i + OP_B], found, V)
        if OPS[i + OP_KIND] == ADD_ROW:
            bias = tl.load(maps.biases_ptr + OPS[i + OP_A] * V + at.token, mask=at.inside & found, other=0.0)
            x += bias.to(dtype).to(tl.float32)
        if OPS[i + OP_KIND] == GROW:
            factor = tl.load(maps.row_values_ptr + at.row * maps.stride_values_row + OPS[i + OP_A])
            growth = (tl.abs(x) * factor).to(dtype)
            x = tl.where(found & (tl.abs(x) < float("inf")), x + growth.to(tl.float32), x)
        if OPS[i + OP_KIND] == FORCE:
            forced = tl.load(maps.row_values_ptr + at.row * maps.stride_values_row + OPS[i + OP_A]) != 0
            x = tl.where(forced, tl.where(found, 0.0, float("-inf")), x)
        if OPS[i + OP_KIND] == CLEAN:
            x = tl.where(x != x, 0.0, tl.where(x == float("inf"), MAX, tl.where(x == float("-inf"), -MAX, x)))
        if (OPS[i + OP_KIND] == REPLACE) or (OPS[i + OP_KIND] == REPLACE_PTX):
            here = maps.bits_ptr + OPS[i + OP_B] * maps.stride_set + at.row * maps.stride_bits_row + at.word
            rank = tl.load(here, mask=at.word < W, other=0)
            values_ptr = maps.planes_ptr + at.row * maps.stride_plane
            x = _replaced(x, held, bit, rank, values_ptr, OPS[i + OP_A], OPS[i + OP_KIND] == REPLACE_PTX)
        x = x.to(dtype).to(tl.float32)
    return x


# Most threads have no token with a value of its own, and are done with one branch.
_REPLACED, _REPLACED_OPERANDS = for_tokens(
    "out x held bit rank values:l last",
    """
    .reg .pred none, there;
    .reg .b32 some, own<4>, place;
    .reg .b64 from;
    mov.b32 $out#, $x#;
    and.b32 own#, $held#, $bit#;
    or.b32 some, own0, own1; or.b32 some, some, own2; or.b32 some, some, own3;
    setp.eq.s32 none, some, 0;
    @none bra done;
    sub.u32 place, $bit#, 1; and.b32 place, place, $held#; popc.b32 place, place; add.u32 place, place, $rank#; \
    and.b32 place, place, $last; mad.wide.u32 from, place, 4, $values; \
    setp.ne.s32 there, own#, 0; @there ld.global.b32 $out#, [from];
    done:
    """,
    4,
)


@triton.jit
def popcount(x):
    """The number of bits that are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def _replaced(x, held, bit, rank, values_ptr, LAST: tl.constexpr, PTX: tl.constexpr):
    """The values that tokens of a set have in place of their logits, by their words, bits, and the words' ranks."""
    if PTX:
        # Where a thread has fewer than four tokens, the others are anything; what is read for them is in the ring too.
        last = tl.full([], LAST, tl.int32)
        bits = tl.inline_asm_elementwise(
            _REPLACED, _REPLACED_OPERANDS,
            [x.to(tl.int32, bitcast=True), held, bit, rank, values_ptr.to(tl.int64), last],
            dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = tl.load(values_ptr + ((rank + popcount(held & (bit - 1))) & LAST), mask=(held & bit) != 0, other=x)
    return x


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _fold_kernel(
    # inputs
    scores_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    # output
    out_ptr,
    # shapes
    V, W, row_blocks,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_set, stride_bits_row, stride_plane,
    stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // row_blocks).to(tl.int64)
    word = (program % row_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]  # [BLOCK_W, 1]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane  # [BLOCK_W, 32]
    inside = token < V
    dtype = scores_ptr.dtype.element_ty
    x = tl.load(scores_ptr + row * stride_row + token.to(tl.int64) * stride_token, mask=inside).to(tl.float32)

    maps = Maps(
        bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    x = fold_logits(x, Tokens(row, word, lane, token, inside), maps, V, W, dtype, OPS, MAX)
    tl.store(out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token, x.to(dtype), mask=inside)


# Mask words of a program, 32 logits each: as for the masks alone, 16-byte accesses of four warps.
_BLOCK_W = 32

_fold_launcher = Launcher(_fold_kernel, num_warps=4, enable_fp_fusion=False)


@dataclass(eq=False)
class Chain:
    """Maps, and the search for what they speak of; for one vocabulary, batch size and device."""

    ops: list[Op] = field(default_factory=list)
    search: Search = field(default_factory=Search)
    numbers: list[float] = field(default_factory=list)
    """Parameters of the maps."""
    divisors: set[int] = field(default_factory=set)
    """Which of them are followed by room for a reciprocal, rounded once to float32: torch multiplies by it on CUDA."""
    biases: torch.Tensor | None = None
    """Biases for maps of kind ``ADD_ROW``, float32 ``[N, V]``."""

    def __post_init__(self) -> None:
        self.handle = next(_handles)
        _chains[self.handle] = self
        self.flat = tuple(number for op in self.ops for number in op)
        # Chains of one form share their compiled kernel, whatever their parameters are.
        self.form = form_of(self.flat)
        self._numbers: dict[torch.device, torch.Tensor] = {}

    def kernel_numbers(self, device: torch.device) -> torch.Tensor:
        """The parameters as the kernel reads them, float32 ``[N]``."""
        numbers = self._numbers.get(device)
        if numbers is None:
            values = [*self.numbers, 0.0]
            for i in self.divisors:
                values[i + 1] = 1.0 / values[i] if values[i] else float("inf")
            numbers = self._numbers[device] = table_on(torch.tensor(values, dtype=torch.float32), device)
        return numbers

    def is_idle(self, found: StaticSets) -> bool:
        """Whether no map does anything, given masks that hold for all rows."""
        return all(
            (op.kind in _SPARSE and op.set not in found.full) or (op.kind == FORCE.value and op.a not in found.forced)
            for op in self.ops
        )


_handles = count()
_chains: WeakValueDictionary[int, Chain] = WeakValueDictionary()


def chain_of(handle: int) -> Chain:
    """The chain that a registered operation was given by its handle."""
    return _chains[handle]


# Maps that read a value of each token of their set.
_OF_PLANES = tuple(kind.value for kind in (ADD_COUNTED, ADD_PLANE, SUBTRACT))
# Maps that read a value of the row.
_BY_ROW = tuple(kind.value for kind in (GROW, FORCE, ADD_VALUE))
# Maps that do nothing where their set is empty.
_SPARSE = tuple(kind.value for kind in (BAN, SINK, ADD, ADD_ROW))
_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)}


NO_SETS: tuple[None, None, None, None] = (None, None, None, None)


def set_strides(found: TokenSets | None, W: int) -> tuple[int, int, int, int]:
    """By what the kernels step to another set, row of bits, plane and row of values: 0 where all rows share one."""
    if found is None:
        return 0, 0, 0, 0
    bits, planes, row_values, _ = found
    return (
        0 if bits is None else bits.stride(0),
        0 if bits is None or bits.shape[1] == 1 else W,
        0 if planes is None else planes.stride(0),
        0 if row_values is None or row_values.shape[0] == 1 else row_values.stride(0),
    )


def launch_fold(scores: torch.Tensor, out: torch.Tensor, chain: Chain, found: TokenSets | None) -> None:
    """Write the folded ``scores`` to ``out``, in place where the two are one tensor: one launch."""
    B, V = scores.shape
    W = words(V)
    row_blocks = -(-W // _BLOCK_W)
    stride_row, stride_token = scores.stride()
    stride_out, stride_out_token = out.stride()
    bits, planes, row_values, _ = found or NO_SETS
    key = (
        scores.device, scores.dtype, V, chain.form, scores.data_ptr() % 16, out.data_ptr() % 16,
        stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        stride_out == 1, stride_out % 16, stride_out >> 31, stride_out_token,
    )  # fmt: skip
    _fold_launcher(key, B * row_blocks, (
        scores, bits, planes, chain.biases, row_values, chain.kernel_numbers(scores.device),
        out,
        V, W, row_blocks,
        stride_row, stride_token, stride_out, stride_out_token,
        *set_strides(found, W),
        chain.flat, _MAX[scores.dtype], _BLOCK_W,
    ))  # fmt: skip


def run_kernels(
    scores: torch.Tensor,
    out: torch.Tensor | None,
    chain: Chain,
    call: Call,
) -> torch.Tensor:
    """The fold in Triton; ``out`` is ``scores`` itself, or None for a new tensor."""
    B, V = scores.shape
    static = _static_sets(scores, chain, call)
    if static is not None and chain.is_idle(static):
        return scores
    found = find_sets(scores, chain, call)
    if out is None:
        out = empty_out(scores)
    if B and V:
        launch_fold(scores, out, chain, found)
    return out


def find_sets(
    scores: torch.Tensor,
    chain: Chain,
    call: Call,
) -> TokenSets | None:
    """What the tokens of a chain's maps are at a call: a launch, where they aren't the same for all rows."""
    search = chain.search
    if not scores.numel() or not (search.sets or search.planes):
        return None
    if not search.sets:
        return TokenSets(None, planes_of(search, scores, call))
    static = _static_sets(scores, chain, call)
    if static is not None:
        return static.found._replace(planes=planes_of(search, scores, call)) if search.planes else static.found
    check_rows(scores, call.input_ids, call.allowed)
    return launch_token_sets(scores, search, call)


def _static_sets(scores: torch.Tensor, chain: Chain, call: Call) -> StaticSets | None:
    """The sets of a chain at a call, where they are the same for all rows and the host knows which they are."""
    search = chain.search
    on_host = call.cache_position is None and call.prompt_length is None
    return search.static(call, scores.shape[1]) if search.sets and search.is_static and on_host else None


def _scaled(x: torch.Tensor, op: Op, chain: Chain, new: bool) -> torch.Tensor:
    return x / chain.numbers[op.a] if new else x.div_(chain.numbers[op.a])


def _cleaned(x: torch.Tensor, op: Op, chain: Chain, new: bool) -> torch.Tensor:
    limit = torch.finfo(x.dtype).max
    return torch.nan_to_num(x, 0.0, limit, -limit) if new else x.nan_to_num_(0.0, limit, -limit)


def _banned(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> float:
    return float("-inf")


def _sunk(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    return found.take(x) + float("-inf")


def _penalized(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    old, penalty = found.take(x), chain.numbers[op.a]
    return torch.where(old < 0, old * penalty, old / penalty)


def _added(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    wide = x.dtype if op.b < 0 else torch.promote_types(x.dtype, torch.float32)
    return (found.take(x).to(wide) + chain.numbers[op.a]).to(x.dtype)


def _added_counted(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    assert found.values is not None
    return found.take(x) + (found.values * chain.numbers[op.a]).to(x.dtype)


def _added_plane(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    assert found.values is not None
    return found.take(x) + found.values


def _subtracted(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    assert found.values is not None
    return (found.take(x) - found.values).to(x.dtype)


def _added_value(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (found.take(x).to(wide) + found.value_of_rows(value.to(wide))).to(x.dtype)


def _added_row(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    assert chain.biases is not None
    return found.take(x) + found.take(chain.biases[op.a : op.a + 1]).to(x.dtype)


def _grown(x: torch.Tensor, found: Places, op: Op, chain: Chain, value: _RowValue) -> torch.Tensor:
    assert value is not None
    old = found.take(x)
    if isinstance(value, torch.Tensor):
        value = value.to(torch.promote_types(x.dtype, torch.float32))
    growth = (old.abs() * found.value_of_rows(value)).to(x.dtype)
    return old + growth.masked_fill(~old.isfinite(), 0.0)


def _forced(x: torch.Tensor, places: list[Places], value: _RowValue) -> torch.Tensor:
    """Scores ``[B, V]`` of which the tokens that are forced have 0, in the rows where a value says so."""
    forced = torch.full_like(x, float("-inf"), memory_format=torch.contiguous_format)
    for found in places:
        forced = found.put(forced, 0.0)
    return torch.where(value.bool(), forced, x) if isinstance(value, torch.Tensor) else forced


_RowValue: TypeAlias = "float | torch.Tensor | None"
_MAPS_OF_ALL = {SCALE.value: _scaled, CLEAN.value: _cleaned}
"""What each map makes of all scores: a new tensor, or the same one."""
_MAPS_OF_TOKENS: dict[int, Callable[[torch.Tensor, Places, Op, Chain, _RowValue], torch.Tensor | float]] = {
    BAN.value: _banned, SINK.value: _sunk, PENALIZE.value: _penalized, ADD.value: _added,
    ADD_COUNTED.value: _added_counted, ADD_PLANE.value: _added_plane, SUBTRACT.value: _subtracted,
    ADD_ROW.value: _added_row, ADD_VALUE.value: _added_value, GROW.value: _grown,
}  # fmt: skip
"""What each map makes of the scores of some tokens."""


def reference_fold(
    scores: torch.Tensor,
    out: torch.Tensor | None,
    chain: Chain,
    call: Call,
) -> torch.Tensor:
    """The same in torch, and the path of the CPU: a copy of the scores, then each map where its tokens are."""
    check_rows(scores, call.input_ids, call.allowed)
    recorded = has_gradient(scores)
    if out is not None and recorded:
        return out.copy_(reference_fold(scores.clone(), None, chain, call))
    # A new tensor is made by the first map that does something; where a graph records them, by each.
    x, untouched = (scores, True) if out is None else (out, False)
    for op in chain.ops:
        if op.kind == MIX.value:
            assert call.mates is not None  # it comes first
            x = (x - call.mates) * chain.numbers[op.a] + call.mates
            untouched = recorded
            continue
        if op.kind in _MAPS_OF_ALL:
            x = _MAPS_OF_ALL[op.kind](x, op, chain, untouched)
            untouched = recorded
            continue
        value = find_row_value(chain.search, op.a, call) if op.kind in _BY_ROW else None
        if isinstance(value, float) and value == 0.0:
            continue
        if op.kind == FORCE.value and isinstance(value, torch.Tensor) and value.is_cpu and not value.any():
            continue
        places = find_places(chain.search, op.set, x, call)
        if op.kind in _OF_PLANES:
            # What the kernels need beside it to know where the plane is written has no values.
            places = [found for found in places if found.values is not None]
        if recorded:
            places = [found.as_mask(x) for found in places]
        if op.kind == FORCE.value:
            forced = _forced(x, places, value)
            x = forced if untouched else x.copy_(forced)
            untouched = recorded
            continue
        if places and untouched and not recorded:
            x, untouched = scores.clone(memory_format=torch.contiguous_format), False
        # All are made before one is put: a token that is in two places has one value.
        made = [_MAPS_OF_TOKENS[op.kind](x, found, op, chain, value) for found in places]
        for found, values in zip(places, made, strict=True):
            x = found.put(x, values)
    return x


_OPERATION = Operation("fold")


@_OPERATION.falls_back
def _fold(
    scores: torch.Tensor,
    out: torch.Tensor | None,
    chain: Chain,
    call: Call,
) -> torch.Tensor:
    if _OPERATION.takes(scores, FORCE_KERNEL) and scores.dtype in _MAX and not has_gradient(scores):
        return run_kernels(scores, out, chain, call)
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating-point of shape (B, V), got {scores.dtype} of {tuple(scores.shape)}")
    return reference_fold(scores, out, chain, call)


def _call(
    scores: torch.Tensor,
    out: torch.Tensor | None,
    handle: int,
    *call: Any,
) -> torch.Tensor:
    # The dispatcher leaves out what is at its default.
    folded = _fold(scores, out, chain_of(handle), Call(*call))
    # A registered operation may not return what it was given.
    return folded.clone() if folded is scores and out is None else folded


_INPUTS = (
    "int chain, Tensor? input_ids=None, Tensor? allowed=None, SymInt cache_offset=0, SymInt prompt_offset=0, "
    "Tensor? cache_position=None, Tensor? prompt_length=None, Tensor? values=None, Tensor? mates=None"
)
register(
    f"fold(Tensor scores, {_INPUTS}) -> Tensor",
    lambda scores, *inputs: _call(scores, None, *inputs),
    lambda scores, *inputs: scores.new_empty(scores.shape),
)
register(
    f"fold_(Tensor(a!) scores, {_INPUTS}) -> ()",
    lambda scores, *inputs: (_call(scores, scores, *inputs), None)[1],
    lambda scores, *inputs: None,
)


def fold(
    scores: torch.Tensor,
    chain: Chain,
    call: Call = NOTHING,
    in_place: bool = False,
) -> torch.Tensor:
    """Apply a chain to ``scores`` ``[B, V]``: a new tensor, or ``scores`` itself where nothing changes it.

    The one place where this operation is dispatched: a compiler sees the registered operation, which it need not
    look into and which has no derivative; an eager call goes straight to the backend.
    """
    if torch.compiler.is_compiling() and not has_gradient(scores):
        if in_place:
            torch.ops.fastlogits.fold_(scores, chain.handle, *call)
            return scores
        return torch.ops.fastlogits.fold(scores, chain.handle, *call)  # type: ignore[no-any-return]
    return _fold(scores, scores if in_place else None, chain, call)
