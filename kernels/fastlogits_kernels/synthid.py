"""Watermark each row by a tournament: at every depth the tokens of bit 1 win what those of bit 0 lose.

    g[b, v, d]  = table[(v * multiplier + offsets[b, d]) mod N]
    p[b, v, 0]  = softmax(scores[b])[v]
    p[b, v, d+1] = p[b, v, d] * (1 + g[b, v, d] - mass[b, d])   where   mass[b, d] = sum_v g[b, v, d] * p[b, v, d]
    out[b, v]   = scores[b, v]  if skip[b]  else  log p[b, v, D], or the lowest finite value where that is not finite

Each mass needs the one before it, but a few depths share one pass: the sums of p over the tokens of each pattern of
their bits hold all their masses. ``GROUP`` depths a launch make ``ceil(D / GROUP) + 1`` launches, in each of which p
is read and written once; no bit is ever stored.
"""

from __future__ import annotations

import torch

from fastlogits_kernels.runtime.backend import Operation, has_gradient
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.runtime.library import register

# Depths of one launch: one more halves the passes left to save and doubles the sums.
GROUP = 3
# Tokens of a program: small enough that one row keeps 60 multiprocessors busy at a vocabulary of 128 thousand.
_BLOCK_V = 2048


def bit_table(table: torch.Tensor, multiplier: int, vocab_size: int) -> tuple[torch.Tensor, int]:
    """A table in which the bits of neighbouring tokens are neighbours, and the factor that takes offsets to it.

    For ``N`` a power of two an odd multiplier has an inverse: with ``u = offset * inverse mod N`` the bits of a row
    are ``table'[u + v]``, a window of ``vocab_size`` values, where ``table'[j] = table[j * multiplier mod N]``.

    Args:
        table: 0 and 1, ``[N]``; N a power of two.
        multiplier: an odd integer.
        vocab_size: tokens of a row.

    Returns:
        ``table'``, uint8 ``[N + vocab_size]``, and the inverse.
    """
    N = table.shape[0]
    order = torch.arange(N + vocab_size, device=table.device) * (multiplier % N) % N
    return table[order].to(torch.uint8), pow(multiplier, -1, N)


@triton.jit
def _bit(table_ptr, offset, token, inside, N, multiplier, WRAPS: tl.constexpr):
    """The bits of some tokens at one depth, int32."""
    if WRAPS:
        index = (token.to(tl.int64) * multiplier + offset) % N
        index = tl.where(index < 0, index + N, index)  # the remainder has the sign of the hash
    else:
        index = token + offset
    return tl.load(table_ptr + index, mask=inside, other=0).to(tl.int32)


@triton.jit(
    do_not_specialize=["N", "D", "depth"],
    do_not_specialize_on_alignment=["table_ptr", "offsets_ptr", "skip_ptr", "top_ptr", "sums_ptr", "next_sums_ptr"],
)
def _synthid_kernel(
    # inputs
    scores_ptr, table_ptr, offsets_ptr, skip_ptr, top_ptr, sums_ptr,
    # outputs
    out_ptr, next_sums_ptr,
    # shapes
    V, N, D, blocks,
    # strides
    stride_row, stride_token,
    # position
    multiplier, depth,
    # constants
    DONE: tl.constexpr, NEXT: tl.constexpr, FROM_SCORES: tl.constexpr, WRAPS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Take ``DONE`` depths up to ``depth`` from the sums of the last launch; sum for the ``NEXT`` depths from there."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    token = (program % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    inside = token < V
    offsets_ptr += row * D + depth
    here = out_ptr + row * V + token
    if FROM_SCORES:
        p = tl.load(scores_ptr + row * stride_row + token.to(tl.int64) * stride_token, mask=inside, other=-float("inf"))
    else:
        p = tl.load(here, mask=inside, other=0.0)

    if DONE == 0:
        # Relative to the block's largest score; the next launch knows the row's.
        top = tl.max(p, 0)
        tl.store(top_ptr + program, top)
        p = tl.exp(p - tl.where(top == -float("inf"), 0.0, top))
    else:
        block = tl.arange(0, BLOCKS)  # [BLOCKS]
        pattern = tl.arange(0, 1 << DONE)  # [1 << DONE]
        sums = tl.load(
            sums_ptr + (row * blocks + block[:, None]) * WIDTH + pattern[None, :], mask=block[:, None] < blocks, other=0
        )
        if FROM_SCORES:
            tops = tl.load(top_ptr + row * blocks + block, mask=block < blocks, other=-float("inf"))
            top = tl.max(tops, 0)
            mass_of = tl.sum(sums * tl.exp(tops - top)[:, None], 0)
            total = tl.sum(mass_of, 0)
            mass_of /= total
            p = tl.exp(p - top) / total
        else:
            mass_of = tl.sum(sums, 0)  # [1 << DONE], of each pattern of bits
        for i in tl.static_range(DONE):
            wins = (pattern >> i) & 1
            mass = tl.sum(tl.where(wins == 1, mass_of, 0.0), 0)
            mass_of *= 1 + wins - mass
            g = _bit(table_ptr, tl.load(offsets_ptr + (i - DONE)), token, inside, N, multiplier, WRAPS)
            p *= 1 + g - mass

    if NEXT == 0:
        # A mass that rounding took above 1 makes a probability negative: that one has no logarithm either.
        logs = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)), -3.4028234663852886e38)
        stays = token < tl.where(tl.load(skip_ptr + row) != 0, V, 0)
        scores = tl.load(scores_ptr + row * stride_row + token.to(tl.int64) * stride_token, mask=stays, other=0.0)
        tl.store(here, tl.where(stays, scores, logs), mask=inside)
    else:
        code = tl.zeros([BLOCK_V], tl.int32)
        for i in tl.static_range(NEXT):
            code |= _bit(table_ptr, tl.load(offsets_ptr + i), token, inside, N, multiplier, WRAPS) << i
        for i in tl.static_range(1 << NEXT):
            tl.store(next_sums_ptr + program.to(tl.int64) * WIDTH + i, tl.sum(tl.where(code == i, p, 0.0), 0))
        if DONE > 0:
            tl.store(here, p, mask=inside)


_synthid_launcher = Launcher(_synthid_kernel, num_warps=4)


def launch_synthid(
    scores: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, skip: torch.Tensor, multiplier: int
) -> torch.Tensor:
    """See ``synthid``; float32 scores, two tokens and one depth at least. ``ceil(D / GROUP) + 1`` launches."""
    B, V = scores.shape
    D = offsets.shape[1]
    out = scores.new_empty(B, V)
    if B == 0 or V == 0:
        return out
    blocks = -(-V // _BLOCK_V)
    stride_row, stride_token = scores.stride()
    wraps = multiplier != 1
    groups = [min(GROUP, D - depth) for depth in range(0, D, GROUP)]
    width = 1 << GROUP
    top = scores.new_empty(B, blocks)
    sums, next_sums = scores.new_empty(2, B, blocks, width)
    key = (
        scores.device, scores.data_ptr() % 16, V, stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        multiplier, table.dtype,
    )  # fmt: skip
    depth = 0
    for launch, (done, following) in enumerate(zip([0, *groups], [*groups, 0], strict=True)):
        constants = (done, following, launch < 2, wraps, width, triton.next_power_of_2(blocks), _BLOCK_V)
        _synthid_launcher((*key, *constants), B * blocks, (
            scores, table, offsets, skip, top, sums,
            out, next_sums,
            V, table.shape[0], D, blocks,
            stride_row, stride_token,
            multiplier, depth,
            *constants,
        ))  # fmt: skip
        sums, next_sums = next_sums, sums
        depth += following
    return out


def reference_synthid(
    scores: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, skip: torch.Tensor, multiplier: int
) -> torch.Tensor:
    """The same in torch, and the path of the CPU: depth by depth, rounded to the dtype of the scores each time."""
    B, V = scores.shape
    if B == 0 or V == 0:
        return scores.new_empty(B, V)
    values = table.to(scores.dtype)
    windows = values.unfold(0, V, 1) if multiplier == 1 else None
    hashes = None if multiplier == 1 else torch.arange(V, device=scores.device) * multiplier
    probs = torch.softmax(scores, 1).contiguous()
    lowest = torch.finfo(scores.dtype).min
    recorded = has_gradient(scores)
    g, won = torch.empty_like(probs), torch.empty_like(probs)
    for offset in offsets.unbind(1):
        if windows is not None:
            torch.index_select(windows, 0, offset, out=g)
        elif hashes is not None:
            torch.take(values, (hashes + offset.unsqueeze(1)).remainder_(table.shape[0]), out=g)
        if recorded:
            # The graph keeps what is multiplied.
            probs = probs * (g + 1 - (g * probs).sum(1, keepdim=True))
            g = torch.empty_like(g)
            continue
        mass = torch.mul(g, probs, out=won).sum(1, keepdim=True)
        probs.mul_(g.add_(1).sub_(mass))
    if recorded:
        return torch.where(skip, scores, probs.log().nan_to_num(nan=lowest, posinf=lowest, neginf=lowest))
    return torch.where(skip, scores, probs.log_().nan_to_num_(nan=lowest, posinf=lowest, neginf=lowest))


_OPERATION = Operation("synthid")


@_OPERATION.falls_back
def _synthid(
    scores: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, skip: torch.Tensor, multiplier: int
) -> torch.Tensor:
    # A size of 1 is compiled as a constant, for which Triton 3.6 reads beyond it (seen on an H200).
    fits = scores.dtype == torch.float32 and scores.shape[1] > 1 and offsets.shape[1] > 0
    if fits and _OPERATION.takes(scores) and not has_gradient(scores):
        return launch_synthid(scores, table, offsets, skip, multiplier)
    return reference_synthid(scores, table, offsets, skip, multiplier)


register(
    "synthid(Tensor scores, Tensor table, Tensor offsets, Tensor skip, int multiplier) -> Tensor",
    _synthid,
    lambda scores, *_: scores.new_empty(scores.shape),
)


def synthid(
    scores: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, skip: torch.Tensor, multiplier: int
) -> torch.Tensor:
    """Scores ``[B, V]`` of any row stride after the tournament, as a new tensor of their dtype.

    The kernel's sums run in another order than torch's, and those of a group of depths over patterns: probabilities
    differ from the reference's by float32 rounding, bits never. Only float32 takes the kernel, since in a shorter
    dtype the definition rounds at every depth.

    Args:
        scores: logits ``[B, V]``.
        table: 0 and 1, uint8 ``[N]``; of ``bit_table`` where ``multiplier`` is 1, which needs no ``mod N``.
        offsets: int64 ``[B, D]``, contiguous; with ``multiplier`` 1 at least 0 and at most ``N - V``.
        skip: rows that stay as they are, bool ``[B, 1]``.
        multiplier: what a token id is multiplied by, modulo 2**64.
    """
    if torch.compiler.is_compiling() and not has_gradient(scores):
        return torch.ops.fastlogits.synthid(scores, table, offsets, skip, multiplier)  # type: ignore[no-any-return]
    return _synthid(scores, table, offsets, skip, multiplier)
