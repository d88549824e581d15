"""Packed token sets: bit ``i`` of int32 word ``w`` is token ``32 * w + i``, as grammar engines have it."""

from __future__ import annotations

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
