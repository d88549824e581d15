"""Kept sets as they are handed over from sampling to training."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.runtime.bits import WORD_BITS, unpack_bits, words


class GivenSets(NamedTuple):
    """What is kept of each of N rows: token ids in rows of a bounded length or one after the other, or packed bits.

    A row of at least V tokens keeps all of them; then its ids say nothing.
    """

    ids: torch.Tensor | None = None
    """int32 or int64, ``[N, K]`` with ``counts``, or ``[total]`` with ``offsets``."""
    counts: torch.Tensor | None = None
    """int32 or int64 ``[N]``: how many of a row's K are meant. More than K means that there was no room for them."""
    offsets: torch.Tensor | None = None
    """int32 or int64 ``[N + 1]``: where the ids of each row begin and end."""
    bits: torch.Tensor | None = None
    """int32 ``[N, W]``: bit ``i`` of word ``w`` is token ``32 * w + i``."""
    first: int = 0
    """The token of the first logit of a row, where these are a part of the vocabulary."""
    vocab: int | None = None
    """Tokens of the vocabulary then; None for as many as there are logits."""

    def rows(self, begin: int, end: int) -> GivenSets:
        """Those of some of the rows."""
        if self.bits is not None:
            return self._replace(bits=self.bits[begin:end])
        if self.offsets is not None:
            return self._replace(offsets=self.offsets[begin : end + 1])
        assert self.ids is not None
        assert self.counts is not None
        return self._replace(ids=self.ids[begin:end], counts=self.counts[begin:end])

    def mask(self, n: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of V logits of each row, as bool ``[n, V]``; and which of the rows ``[n]`` had room for all of their ids."""
        vocab = V if self.vocab is None else self.vocab
        if self.bits is not None:
            word, bit = divmod(self.first, WORD_BITS)
            mask = unpack_bits(self.bits[:, word : word + words(bit + V)], bit + V)[:, bit:]
            return mask, torch.ones(n, dtype=torch.bool, device=self.bits.device)
        assert self.ids is not None
        ids = self.ids.long() - self.first
        if self.offsets is not None:
            counts = self.offsets.diff()
            which = torch.arange(len(ids), device=ids.device)
            row = torch.searchsorted(self.offsets[1:].long().contiguous(), which, right=True)
            inside = (which >= self.offsets[0]) & (row < n)
            flat, rows = ids[inside], row[inside]
            fits = torch.ones(n, dtype=torch.bool, device=ids.device)
        else:
            assert self.counts is not None
            counts = self.counts
            taken = torch.arange(ids.shape[1], device=ids.device) < counts.unsqueeze(1)
            rows, flat = taken.nonzero(as_tuple=True)[0], ids[taken]
            fits = (counts <= ids.shape[1]) | (counts >= vocab)
        mask = (counts >= vocab).unsqueeze(1).repeat(1, V)
        real = (flat >= 0) & (flat < V)
        mask[rows[real], flat[real]] = True
        return mask, fits
