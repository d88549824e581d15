"""Which tokens were kept where others were sampled: what a trainer renormalises over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.training.kept import ids_of_bits, ragged_ids
from fastlogits_kernels.training.sets import GivenSets

from fastlogits.checks import is_integer

KeptForm: TypeAlias = "int | Literal['bits', 'ids'] | None"
"""How kept tokens are returned: with room for so many in each row, as packed bits, as ids of any number, or not."""


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The tokens of each row that the truncations kept, in one of three forms.

    A sampler returns it where ``return_kept`` asks for it, and ``logprobs(..., kept=...)`` takes it. Leading dimensions
    are those of the sampled tokens: ``(B,)`` of one step, ``(B, T)`` of several that were stacked.

    A row of which nothing was dropped keeps all tokens. Then its count is the size of the vocabulary, whatever room
    there is for ids.

    Args:
        vocab_size: tokens of the vocabulary, V.
        ids: int32 or int64, ``[..., K]`` with ``counts``, or ``[total]`` with ``offsets``; upward in each row, each
            token once. What stands behind a row's count says nothing.
        counts: int32 or int64 ``[...]``: how many tokens a row keeps. More than K, and fewer than V, means that there
            was no room for them: ``check`` says so, and so does ``logprobs``.
        offsets: int32 or int64 ``[N + 1]``: where the ids of each of N rows begin and end.
        bits: int32 ``[..., W]``: bit ``i`` of word ``w`` is token ``32 * w + i``. Bits from V on say nothing: there may
            be more words, and engines fill the last ones.

    Raises:
        ValueError: not one of the three forms, or tensors whose shapes or dtypes don't fit.

    Example:
        >>> kept = KeptTokens(8, ids=torch.tensor([[1, 5, -1]]), counts=torch.tensor([2]))
        >>> kept.mask()
        tensor([[False,  True, False, False, False,  True, False, False]])
    """

    vocab_size: int
    ids: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    bits: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given = tuple(each is not None for each in (self.ids, self.counts, self.offsets, self.bits))
        if given not in ((True, True, False, False), (True, False, True, False), (False, False, False, True)):
            names = [name for name, there in zip(("ids", "counts", "offsets", "bits"), given, strict=True) if there]
            raise ValueError(
                "kept tokens must be ids with counts, ids with offsets, or bits, got " + (" and ".join(names) or "none")
            )
        for name in ("ids", "counts", "offsets", "bits"):
            self._check_dtype(name, getattr(self, name))
        self._check_shapes()

    def _check_dtype(self, name: str, value: torch.Tensor | None) -> None:
        allowed = (torch.int32,) if name == "bits" else (torch.int32, torch.int64)
        if value is not None and (not isinstance(value, torch.Tensor) or value.dtype not in allowed):
            found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{name} of kept tokens must be a tensor of {' or '.join(map(str, allowed))}, got {found}")

    def _check_shapes(self) -> None:
        ids, counts, offsets, bits = self.ids, self.counts, self.offsets, self.bits
        if bits is not None and (bits.ndim < 1 or bits.shape[-1] < words(self.vocab_size)):
            raise ValueError(
                f"bits of kept tokens must have at least {words(self.vocab_size)} words a row for {self.vocab_size} "
                f"tokens, got shape {tuple(bits.shape)}"
            )
        if ids is not None and counts is not None and ids.shape[:-1] != counts.shape:
            raise ValueError(
                f"counts of kept tokens must have the shape of ids {tuple(ids.shape)} without its last dimension, got "
                f"{tuple(counts.shape)}"
            )
        if offsets is not None and (offsets.ndim != 1 or not len(offsets) or ids is None or ids.ndim != 1):
            raise ValueError(
                f"offsets and ids of kept tokens must be of one dimension, got shapes {tuple(offsets.shape)} and "
                f"{None if ids is None else tuple(ids.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """The leading shape: one row for each of its elements."""
        if self.counts is not None:
            return self.counts.shape
        if self.bits is not None:
            return self.bits.shape[:-1]
        assert self.offsets is not None
        return torch.Size((len(self.offsets) - 1,))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        found = self.bits if self.bits is not None else self.ids
        assert found is not None
        return found.device

    def to(self, device: torch.device | str) -> KeptTokens:
        """The same on a device."""
        return self._mapped(lambda each: each.to(device))

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> KeptTokens:
        given = (self.ids, self.counts, self.offsets, self.bits)
        return KeptTokens(self.vocab_size, *(None if each is None else change(each) for each in given))

    def __getitem__(self, rows: Any) -> KeptTokens:
        """Those of some rows; not of ids with offsets.

        Raises:
            ValueError: ids with offsets, which have rows of different lengths.
        """
        if self.offsets is not None:
            raise ValueError("kept tokens as ids with offsets can't be indexed: take ids with counts, or bits")
        return self._mapped(lambda each: each[rows])

    @classmethod
    def stack(cls, steps: Sequence[KeptTokens], dim: int = 1) -> KeptTokens:
        """Those of several steps, each ``[B]``, side by side: ``[B, T]`` with ``dim`` 1, ``[T, B]`` with 0.

        Raises:
            ValueError: no steps, ids with offsets, or steps of different forms.
        """
        if not steps:
            raise ValueError("steps must be kept tokens of at least one step, got none")
        first = steps[0]
        forms = {(each.vocab_size, None if each.ids is None else each.ids.shape[-1]) for each in steps}
        if len(forms) > 1 or any(each.offsets is not None for each in steps):
            raise ValueError(
                "steps must all be ids with counts and one room, or all be bits, of one vocabulary: ids with offsets "
                "can't be stacked"
            )
        shapes = {each.shape for each in steps}
        if len(shapes) > 1:
            raise ValueError(f"steps must all have as many rows, got shapes {', '.join(map(str, map(tuple, shapes)))}")
        if first.bits is not None:
            return cls(first.vocab_size, bits=torch.stack([each.bits for each in steps], dim))  # type: ignore[misc]
        return cls(
            first.vocab_size,
            torch.stack([each.ids for each in steps], dim),  # type: ignore[misc]
            torch.stack([each.counts for each in steps], dim),  # type: ignore[misc]
        )

    def mask(self) -> torch.Tensor:
        """As bool ``[..., V]``."""
        rows = self.shape.numel()
        return self.flat(rows).mask(rows, self.vocab_size)[0].view(*self.shape, self.vocab_size)

    def check(self) -> None:
        """Raise where a row keeps more tokens than there was room for, or one of another vocabulary; waits for the GPU.

        Raises:
            ValueError: it does; the message says how much room it takes, or which token it is.
        """
        outside = self._outside()
        if outside is not None:
            raise ValueError(
                f"kept tokens must be in the vocabulary of {self.vocab_size}, got token {outside}: these are another "
                "model's, or those of a padded vocabulary"
            )
        if self.counts is None or self.ids is None:
            return
        room = self.ids.shape[-1]
        most = torch.where(self.counts >= self.vocab_size, 0, self.counts).amax() if self.counts.numel() else 0
        if most > room:
            raise ValueError(
                f"kept tokens must have room for {int(most)} ids in a row, got room for {room}: sample with "
                f"return_kept={int(most)} or more, or 'bits'"
            )

    def _outside(self) -> int | None:
        """A token that a row keeps, though the vocabulary doesn't have it; None where there is none."""
        if self.ids is None:
            return None
        ids = self.ids.long()
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if self.counts is not None:
            kept = torch.where(self.counts >= self.vocab_size, 0, self.counts).unsqueeze(-1)
            wrong &= torch.arange(ids.shape[-1], device=ids.device) < kept
        return int(ids[wrong][0]) if bool(wrong.any()) else None

    def flat(self, rows: int) -> GivenSets:
        """What the kernels take, of rows one after the other.

        Raises:
            ValueError: another number of rows.
        """
        if self.shape.numel() != rows:
            raise ValueError(f"kept must have {rows} rows, one for each target, got {tuple(self.shape)}")
        if self.bits is not None:
            return GivenSets(bits=self.bits.reshape(rows, self.bits.shape[-1]))
        assert self.ids is not None
        if self.offsets is not None:
            return GivenSets(ids=self.ids.contiguous(), offsets=self.offsets.contiguous())
        assert self.counts is not None
        ids = self.ids.reshape(rows, self.ids.shape[-1])
        return GivenSets(ids=ids if ids.stride(-1) == 1 else ids.contiguous(), counts=self.counts.reshape(rows))


def checked_form(form: KeptForm) -> KeptForm:
    """How kept tokens are asked for.

    Raises:
        ValueError: otherwise than they can be.
    """
    if form is None or form in ("bits", "ids"):
        return form
    if not is_integer(form) or form < 1:  # type: ignore[operator]
        raise ValueError(f"return_kept must be an integer of at least 1, 'bits', 'ids' or None, got {form!r}")
    return int(form)


def kept_of_bits(bits: torch.Tensor, vocab_size: int, form: KeptForm) -> KeptTokens:
    """Packed bits ``[B, W]`` in the form that was asked for."""
    if form == "bits":
        return KeptTokens(vocab_size, bits=bits)
    if form == "ids":
        ids, offsets = ragged_ids(bits, vocab_size)
        return KeptTokens(vocab_size, ids, offsets=offsets)
    assert isinstance(form, int)
    ids, counts = ids_of_bits(bits, vocab_size, form)
    return KeptTokens(vocab_size, ids, counts)
