"""A list of processors compiled into parts: kernels where they can be, the processors themselves where not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from fastlogits_kernels.runtime.backend import has_gradient

from fastlogits.plan.barrier import Barrier
from fastlogits.plan.causes import explain_failure
from fastlogits.plan.explain import Explanation, explain
from fastlogits.plan.fusion import fused_to_logits, parts_of
from fastlogits.plan.part import NO_ARGUMENTS, AnyPlan, Part, apart, placed
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member


class Plan(AnyPlan):
    """Parts that together do what a list of processors does, in its order.

    Args:
        parts: the parts, as ``fusion`` makes them.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.members = sorted((member for part in parts for member in part.members), key=_place)
        self.may_draw = any(member.stage.may_draw for member in self.members)
        """Whether a processor takes random numbers, for all that is known."""
        self._originals = _originals(parts)
        self._pieces: list[Plan | Barrier] | None = None

    @classmethod
    def compile(cls, members: Iterable[Member]) -> Plan:
        """Fuse what may be fused."""
        return cls(fused_to_logits(parts_of(members)))

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Processed scores ``[B, V]``: new ones, or ``scores`` itself where nothing changes it or ``in_place``.

        What may write its input, as processors that fastlogits doesn't know, gets a copy of ``scores`` rather than
        ``scores``, unless it was asked for in place.
        """
        try:
            if scores.ndim != 2 or (input_ids is not None and input_ids.ndim != 2):
                originals = self._originals
                if originals is not None:
                    return self._by_originals(originals, input_ids, scores, run, kwargs, in_place)
            if in_place and has_gradient(scores):
                # What the graph keeps of the scores may not be written.
                return placed(self(input_ids, scores.clone(), run, kwargs), scores, True)
            processed = scores
            for part in self.parts:
                if part.may_write and not in_place:
                    processed = apart(processed, scores)
                processed = part(input_ids, processed, run, kwargs, in_place and processed is scores)
            return placed(processed, scores, True) if in_place else processed
        except Exception as error:
            explain_failure(error, self.members, input_ids, scores)
            raise

    def _by_originals(
        self,
        originals: Sequence[tuple[Callable[..., torch.Tensor], Part]],
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None,
        kwargs: Mapping[str, Any],
        in_place: bool,
    ) -> torch.Tensor:
        """What transformers takes and a plan doesn't: other shapes."""
        processed = scores
        for original, part in originals:
            if not in_place and (part.may_write if part.is_barrier else _writes_its_input(original)):
                processed = apart(processed, scores)
            processed = part(input_ids, processed, run, kwargs) if part.is_barrier else original(input_ids, processed)
        if in_place and processed is not scores:
            processed = apart(processed, scores)
        return placed(processed, scores, in_place)

    @property
    def pieces(self) -> list[Plan | Barrier]:
        """What must be called by itself, and what stands between as a plan of its own: for who calls one by one."""
        if self._pieces is None:
            pieces: list[Plan | Barrier] = []
            between: list[Part] = []
            for part in self.parts:
                if isinstance(part, Barrier) and (part.may_write or part.asks_for_more):
                    if between:
                        pieces.append((_BeforeWriter if part.may_write else Plan)(between))
                    pieces.append(part)
                    between = []
                else:
                    between.append(part)
            if between:
                pieces.append(Plan(between))
            self._pieces = pieces
        return self._pieces

    def explain(
        self,
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        bandwidth: float | None = None,
    ) -> Explanation:
        """The plan for people: parts in order, what each processor does, merges and why each is allowed.

        Args:
            shape: batch size and vocabulary of logits, to tell the bytes that a GPU has to move for them.
            dtype: their dtype.
            bandwidth: bytes per second of the GPU's memory, to tell the time which that takes at least;
                ``python -m fastlogits doctor`` measures it.

        Returns:
            A string to print; its ``html`` is the same as a table, which notebooks show.

        Raises:
            ValueError: a shape that is none, or a bandwidth that isn't positive.
        """
        return explain(self, shape, dtype, bandwidth)


class _BeforeWriter(Plan):
    """A plan whose result may be written by what is called next, and so never is what it was given."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Processed scores ``[B, V]``: new ones, unless ``in_place``."""
        processed = super().__call__(input_ids, scores, run, kwargs, in_place)
        return processed if in_place else apart(processed, scores)


_WRITERS = {
    "RepetitionPenaltyLogitsProcessor", "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor"
}  # fmt: skip
"""The classes of transformers that write their input, some of them for scores of three dimensions only."""


def _writes_its_input(original: Callable[..., torch.Tensor]) -> bool:
    """Whether an implementation of transformers does."""
    processor = getattr(original, "__self__", original)
    return any(cls.__name__ in _WRITERS for cls in type(processor).__mro__)


def _place(member: Member) -> int:
    return member.place


def _originals(parts: Sequence[Part]) -> list[tuple[Callable[..., torch.Tensor], Part]] | None:
    """Transformers' implementations of all processors, each with its part; None where one has none."""
    members = [(member, part) for part in parts for member in part.members if member.is_first]
    whole = [(member.original, part) for member, part in sorted(members, key=lambda each: _place(each[0]))]
    found = [(original, part) for original, part in whole if original is not None]
    return found if len(found) == len(whole) else None
