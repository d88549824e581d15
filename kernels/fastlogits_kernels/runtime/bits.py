"""Packed token sets: bit ``i`` of int32 word ``w`` is token ``32 * w + i``, as grammar engines have it."""

from __future__ import annotations

from functools import cache

import torch

WORD_BITS = 32


def words(vocab_size: int) -> int:
    """Number of int32 words that hold one bit for each of ``vocab_size`` tokens."""
    return -(-vocab_size // WORD_BITS)


def pack_bits(rows: torch.Tensor) -> torch.Tensor:
    """Pack bool ``[..., V]`` into int32 ``[..., ceil(V / 32)]``; the bits beyond ``V`` are zero."""
    missing = -rows.shape[-1] % WORD_BITS
    lanes = torch.nn.functional.pad(rows, (0, missing)).unflatten(-1, (-1, WORD_BITS))
    weights = torch.ones((), dtype=torch.int64, device=rows.device) << torch.arange(WORD_BITS, device=rows.device)
    # The sum of distinct powers of two is the word; int32 keeps its low 32 bits, the sign bit among them.
    packed: torch.Tensor = (lanes * weights).sum(-1).to(torch.int32)
    return packed


def unpack_bits(bits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Unpack int32 ``[..., W]`` into bool ``[..., vocab_size]``; tokens beyond the last word are False."""
    lanes = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    rows: torch.Tensor = ((bits.unsqueeze(-1) >> lanes) & 1).bool().flatten(-2)
    padded: torch.Tensor = torch.nn.functional.pad(rows, (0, max(0, vocab_size - rows.shape[-1])))
    return padded[..., :vocab_size]


_WIDE_AS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@cache
def _bytes_spread(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, int]:
    """As integers as wide as a dtype: for each byte its eight bits, from the lowest on, all ones or none; and -inf."""
    bits = (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)) & 1
    return -bits.to(_WIDE_AS[dtype]), int(torch.tensor(float("-inf"), dtype=dtype).view(_WIDE_AS[dtype]))


def ban_unset_(rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Set ``rows`` ``[B, V]`` of float32, float16 or bfloat16 to -inf where a bit of int32 ``[B, W]`` is not set.

    Tokens beyond the last word are set too. In integers, since ``masked_fill_`` takes four times as long on a
    CPU; words are read as their bytes, the lowest first.
    """
    spread, nothing = _bytes_spread(rows.dtype, rows.device)
    # One word a row may be contiguous with any stride.
    of_word = bits.reshape(-1).contiguous().view(torch.uint8).int()
    keep = spread.index_select(0, of_word).view(len(bits), bits.shape[1] * WORD_BITS)[:, : rows.shape[1]]
    covered = rows.detach()[:, : keep.shape[1]].view(spread.dtype)
    covered.bitwise_and_(keep).bitwise_or_(keep.bitwise_not().bitwise_and_(nothing))
    rows.detach()[:, keep.shape[1] :].fill_(float("-inf"))
