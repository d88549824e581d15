"""Set the logits of banned tokens to -inf: any number of static and per-row masks, gated by step, in one launch.

A token is banned in a row where the mask of an open gate holds it, or where the row's allowed set lacks it:

    step[b]    = cache_position[b] + 1 - prompt_length[b]
    open[b, g] = step[b] < windows[g]  or  every token that row b has generated so far is in blanks[g]
    out[b, v]  = -inf  if any_g(open[b, g] and bans[g, v]) or not allowed[b, v]  else  scores[b, v]

Bytes moved: out of place one read and one write of the logits; in place one write of each 32-token word that is
banned as a whole, a read and a write of one that is banned in part, nothing for the others. The masks add one bit a
logit, which all rows but the first read from the L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.history import Text, holds_all, index_at
from fastlogits_kernels.pointwise.columns import fill_columns
from fastlogits_kernels.runtime.backend import Operation, has_gradient, wanted_on
from fastlogits_kernels.runtime.bits import unpack_bits, words
from fastlogits_kernels.runtime.launcher import Launcher, empty_out, row_stride, tl, triton
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.runtime.rows import check_rows

# What changes from step to step (positions, lengths, the strides of a growing history) must not make a new variant
# of a kernel, nor must the alignment of what is read one element at a time.
_STEPWISE = ["cache_position", "prompt_length", "L", "W", "row_blocks"]
_STEPWISE += ["stride_allowed", "stride_ids_row", "stride_id", "stride_cache", "stride_prompt"]
_UNALIGNED = ["bans_ptr", "windows_ptr", "blanks_ptr", "allowed_ptr", "ids_ptr", "cache_position_ptr"]
_UNALIGNED += ["prompt_length_ptr"]


class Bans(NamedTuple):
    """What is banned, and when. Token sets are int32 words ``[.., ceil(V / 32)]`` (see ``bits``) or bool ``[.., V]``.

    ``sets`` is needed wherever ``tokens`` is given: which of the two is read depends on the device and the variant.
    Triton reads words only. All tensors are on the device of the scores.
    """

    sets: torch.Tensor | None = None
    """Banned tokens of each gate, ``[G, ..]``."""
    tokens: torch.Tensor | None = None
    """The same as distinct ids below V, int64 ``[N]``, where that is the faster form and there is one gate."""
    allowed: torch.Tensor | None = None
    """Allowed tokens of each row, ``[B, ..]``, or of all rows, ``[1, ..]``."""
    windows: torch.Tensor | None = None
    """Steps for which each gate stays open, int32 ``[G]``; None where all gates are open."""
    blanks: torch.Tensor | None = None
    """Tokens that don't yet close each gate, ``[G, ..]``; None where no gate has any."""
    input_ids: torch.Tensor | None = None
    """Tokens so far, int32 or int64 ``[B, L]``; read with ``blanks`` only."""
    cache_position: torch.Tensor | None = None
    """Index of the newest token, integer ``[]`` or ``[B]``; ``cache_offset`` is added to it, or stands for it."""
    prompt_length: torch.Tensor | None = None
    """Tokens of the prompt, integer ``[]`` or ``[B]``; ``prompt_offset`` is added to it, or stands for it."""
    cache_offset: int = 0
    prompt_offset: int = 0


@triton.jit
def _is_open(
    window_ptr, blank_ptr, ids_ptr, cache_position_ptr, prompt_length_ptr,
    L, W, stride_id, cache_position, prompt_length,
):  # fmt: skip
    """Whether a gate is open in a row; the pointers are those of the gate and of the row."""
    length = index_at(cache_position_ptr, cache_position) + 1
    start = index_at(prompt_length_ptr, prompt_length)
    is_open = length - start < tl.load(window_ptr)
    if blank_ptr is not None:
        is_open = is_open | holds_all(blank_ptr, Text(ids_ptr, stride_id, L), start, length, W * 32)
    return is_open


@triton.jit
def _minus_infinity(like):
    """-inf of the dtype of ``like``; the interpreter of Triton before 3.9 has no constants of bfloat16."""
    return tl.full([], float("-inf"), tl.float32).to(like.dtype)


@triton.jit
def ban_words(row_ptr, banned, word, V, stride_token):
    """Write -inf to the banned tokens of some words of a row; ``banned`` and ``word`` are ``[BLOCK_W, 1]``."""
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane  # [BLOCK_W, 32]
    inside = (token < V) & (banned != 0)
    here = row_ptr + token.to(tl.int64) * stride_token
    # A mask that is constant over a word keeps the accesses 16 bytes wide, whatever the bits are.
    scores = tl.load(here, mask=inside & (banned != -1), other=float("-inf"))
    tl.store(here, tl.where(((banned >> lane) & 1) != 0, _minus_infinity(scores), scores), mask=inside)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _mask_tokens_kernel(
    # inputs
    scores_ptr, bans_ptr, windows_ptr, blanks_ptr, allowed_ptr, ids_ptr, cache_position_ptr, prompt_length_ptr,
    # output
    out_ptr,
    # shapes
    V, W, L, row_blocks,
    # strides
    stride_row, stride_token, stride_out, stride_allowed, stride_ids_row, stride_id, stride_cache, stride_prompt,
    # position
    cache_position, prompt_length,
    # constants
    GATES: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // row_blocks).to(tl.int64)
    word = (program % row_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]  # [BLOCK_W, 1]

    banned = tl.zeros([BLOCK_W, 1], tl.int32)
    for gate in tl.static_range(GATES):
        mask_word = tl.load(bans_ptr + gate * W + word, mask=word < W, other=0)
        if windows_ptr is not None:
            is_open = _is_open(
                windows_ptr + gate,
                None if blanks_ptr is None else blanks_ptr + gate * W,
                None if ids_ptr is None else ids_ptr + row * stride_ids_row,
                None if cache_position_ptr is None else cache_position_ptr + row * stride_cache,
                None if prompt_length_ptr is None else prompt_length_ptr + row * stride_prompt,
                L, W, stride_id, cache_position, prompt_length,
            )  # fmt: skip
            mask_word = tl.where(is_open, mask_word, 0)
        banned |= mask_word
    if allowed_ptr is not None:
        banned |= ~tl.load(allowed_ptr + row * stride_allowed + word, mask=word < W, other=0)

    if IN_PLACE:
        ban_words(scores_ptr + row * stride_row, banned, word, V, stride_token)
    else:
        lane = tl.arange(0, 32)[None, :]
        token = word * 32 + lane  # [BLOCK_W, 32]
        inside = token < V
        scores = tl.load(scores_ptr + row * stride_row + token.to(tl.int64) * stride_token, mask=inside)
        is_banned = ((banned >> lane) & 1) != 0
        tl.store(out_ptr + row * stride_out + token, tl.where(is_banned, _minus_infinity(scores), scores), mask=inside)


@triton.jit(do_not_specialize=["N", *_STEPWISE], do_not_specialize_on_alignment=["tokens_ptr", *_UNALIGNED])
def _mask_listed_tokens_kernel(
    # inputs
    tokens_ptr, windows_ptr, blanks_ptr, ids_ptr, cache_position_ptr, prompt_length_ptr,
    # output
    scores_ptr,
    # shapes
    N, W, L, row_blocks,
    # strides
    stride_row, stride_token, stride_ids_row, stride_id, stride_cache, stride_prompt,
    # position
    cache_position, prompt_length,
    # constants
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // row_blocks).to(tl.int64)
    entry = (program % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    token = tl.load(tokens_ptr + entry, mask=entry < N, other=0).to(tl.int64)
    if windows_ptr is not None:
        is_open = _is_open(
            windows_ptr,
            blanks_ptr,
            None if ids_ptr is None else ids_ptr + row * stride_ids_row,
            None if cache_position_ptr is None else cache_position_ptr + row * stride_cache,
            None if prompt_length_ptr is None else prompt_length_ptr + row * stride_prompt,
            L, W, stride_id, cache_position, prompt_length,
        )  # fmt: skip
        N = tl.where(is_open, N, 0)
    tl.store(scores_ptr + row * stride_row + token * stride_token, float("-inf"), mask=entry < N)


# Token ids of a program, and mask words of a program (32 logits each). Measured on an H200, batch 1 to 256: larger
# programs only pay in place, where most words are skipped.
_BLOCK_N = 128
_COPY_BLOCK_W, IN_PLACE_BLOCK_W = 32, 64

_mask_tokens_launcher = Launcher(_mask_tokens_kernel, num_warps=4)
_mask_listed_tokens_launcher = Launcher(_mask_listed_tokens_kernel, num_warps=4)


def takes_bits(device: torch.device) -> bool:
    """Whether sets have to be packed on a device: kernels read no others; on a CPU, torch is faster with Booleans."""
    return device.type != "cpu" or wanted_on(device)


def launch_mask_tokens(scores: torch.Tensor, out: torch.Tensor, bans: Bans) -> None:
    """Write ``scores`` with its banned tokens at -inf to ``out``, in place where the two are one tensor: one launch."""
    B, V = scores.shape
    if B == 0 or V == 0:
        return
    sets, tokens, allowed, windows, blanks, input_ids, cache_position, prompt_length, cache_offset, prompt_offset = bans
    stride_row, stride_token = scores.stride()
    W = words(V)
    if blanks is None or input_ids is None:
        input_ids, L, stride_ids_row, stride_id = None, 0, 0, 0
    else:
        L = input_ids.shape[1]
        stride_ids_row, stride_id = input_ids.stride()
    stride_cache, stride_prompt = row_stride(cache_position), row_stride(prompt_length)
    key: tuple[object, ...] = (
        scores.device, scores.dtype, scores.data_ptr() % 16, V,
        stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        windows is None, blanks is None, input_ids is None or input_ids.dtype,
        cache_position is None or cache_position.dtype, prompt_length is None or prompt_length.dtype,
    )  # fmt: skip
    in_place = out is scores
    if tokens is not None and allowed is None and in_place:
        N = tokens.shape[0]
        row_blocks = -(-N // _BLOCK_N)
        _mask_listed_tokens_launcher(key, B * row_blocks, (
            tokens, windows, blanks, input_ids, cache_position, prompt_length,
            scores,
            N, W, L, row_blocks,
            stride_row, stride_token, stride_ids_row, stride_id, stride_cache, stride_prompt,
            cache_offset, prompt_offset,
            _BLOCK_N,
        ))  # fmt: skip
        return
    gates = 0 if sets is None else sets.shape[0]
    block_w = IN_PLACE_BLOCK_W if in_place else _COPY_BLOCK_W
    stride_out = out.stride(0)
    row_blocks = -(-W // block_w)
    key += (gates, in_place, allowed is None, out.data_ptr() % 16, stride_out % 16, stride_out >> 31)
    _mask_tokens_launcher(key, B * row_blocks, (
        scores, sets, windows, blanks, allowed, input_ids, cache_position, prompt_length,
        out,
        V, W, L, row_blocks,
        stride_row, stride_token, stride_out, 0 if allowed is None or allowed.shape[0] == 1 else allowed.stride(0),
        stride_ids_row, stride_id, stride_cache, stride_prompt,
        cache_offset, prompt_offset,
        gates, in_place, block_w,
    ))  # fmt: skip


def _rows(sets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token sets as bool ``[.., V]``, from packed words or as they are."""
    return sets if sets.dtype == torch.bool else unpack_bits(sets, vocab_size)


def _open_gates(bans: Bans, windows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which gates are open in which rows, bool ``[B or 1, G]``."""
    cache_position = bans.cache_offset if bans.cache_position is None else bans.cache_position + bans.cache_offset
    prompt_length = bans.prompt_offset if bans.prompt_length is None else bans.prompt_length + bans.prompt_offset
    start = torch.as_tensor(prompt_length, device=windows.device).reshape(-1, 1)
    end = torch.as_tensor(cache_position, device=windows.device).reshape(-1, 1) + 1
    is_open = end - start < windows
    if bans.blanks is not None and bans.input_ids is not None:
        ids = bans.input_ids.long()
        column = torch.arange(ids.shape[1], device=ids.device)
        generated = (column >= start) & (column < end)  # [B or 1, L]
        known = (ids >= 0) & (ids < vocab_size)
        blank = _rows(bans.blanks, vocab_size)[:, ids.clamp(0, vocab_size - 1)] & known  # [G, B, L]
        is_open = is_open | (blank | ~generated).all(-1).T
    return is_open


def reference_mask_tokens(scores: torch.Tensor, out: torch.Tensor | None, bans: Bans) -> torch.Tensor:
    """The same in torch, and the path of the CPU; ``out`` is ``scores`` itself, or None for a new tensor."""
    V = scores.shape[1]
    tokens = bans.tokens
    if tokens is not None and bans.windows is None and bans.allowed is None:
        return fill_columns(scores.clone() if out is None else out, tokens, float("-inf"))
    banned = torch.zeros(1, 1, dtype=torch.bool, device=scores.device)
    if bans.sets is not None:
        banned = _rows(bans.sets, V)  # [G, V]
        if bans.windows is not None:
            banned = (_open_gates(bans, bans.windows, V).unsqueeze(-1) & banned).any(1)  # [B or 1, V]
        elif banned.shape[0] > 1:
            banned = banned.any(0, keepdim=True)
    if bans.allowed is not None:
        banned = banned | ~_rows(bans.allowed, V)  # [B, V]
    return torch.where(banned, float("-inf"), scores) if out is None else out.masked_fill_(banned, float("-inf"))


_OPERATION = Operation("mask_tokens")


@_OPERATION.falls_back
def _copying(scores: torch.Tensor, bans: Bans) -> torch.Tensor:
    check_rows(scores, None if bans.blanks is None else bans.input_ids, bans.allowed)
    if not _OPERATION.takes(scores) or has_gradient(scores):
        return reference_mask_tokens(scores, None, bans)
    out = empty_out(scores)
    launch_mask_tokens(scores, out, bans)
    return out


@_OPERATION.falls_back
def _in_place(scores: torch.Tensor, bans: Bans) -> None:
    check_rows(scores, None if bans.blanks is None else bans.input_ids, bans.allowed)
    if _OPERATION.takes(scores) and not has_gradient(scores):
        launch_mask_tokens(scores, scores, bans)
    else:
        reference_mask_tokens(scores, scores, bans)


_BANS = (
    "Tensor? sets=None, Tensor? tokens=None, Tensor? allowed=None, Tensor? windows=None, Tensor? blanks=None, "
    "Tensor? input_ids=None, Tensor? cache_position=None, Tensor? prompt_length=None, "
    "SymInt cache_offset=0, SymInt prompt_offset=0"
)
register(
    f"mask_tokens(Tensor scores, {_BANS}) -> Tensor",
    lambda scores, *bans: _copying(scores, Bans(*bans)),
    lambda scores, *bans: scores.new_empty(scores.shape),
)
register(
    f"mask_tokens_(Tensor(a!) scores, {_BANS}) -> ()",
    lambda scores, *bans: _in_place(scores, Bans(*bans)),
    lambda scores, *bans: None,
)


def mask_tokens(scores: torch.Tensor, bans: Bans) -> torch.Tensor:
    """``scores`` ``[B, V]`` of any row stride, with banned tokens at -inf, as a new contiguous tensor.

    The one place where this operation is dispatched: a compiler sees the registered operation, which it need not
    look into and which has no derivative; an eager call goes straight to the backend.
    """
    if torch.compiler.is_compiling() and not has_gradient(scores):
        return torch.ops.fastlogits.mask_tokens(scores, *bans)  # type: ignore[no-any-return]
    return _copying(scores, bans)


def mask_tokens_(scores: torch.Tensor, bans: Bans) -> None:
    """``mask_tokens`` in place."""
    if torch.compiler.is_compiling() and not has_gradient(scores):
        torch.ops.fastlogits.mask_tokens_(scores, *bans)
    else:
        _in_place(scores, bans)
