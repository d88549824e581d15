"""The step of a ``Sampler`` whose logits are split over ranks: every rank returns the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlogits.parallel.group import Agreement, Group, Shards
from fastlogits.parallel.rows import some_index, some_rows, takes_some_rows
from fastlogits.plan.position import Index
from fastlogits.sampled import Sample

if TYPE_CHECKING:
    from fastlogits.sampling import Sampler, SamplingParams


class SplitCall(NamedTuple):
    """What a call of a ``Sampler`` brings, checked; the logits are this rank's part."""

    logits: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    input_ids: torch.Tensor | None
    prompt_length: Index | None
    cache_position: Index | None

    def of_rows(self, logits: torch.Tensor, rows: slice) -> SplitCall:
        """The same for some of the rows, whose logits are given."""
        B = len(self.logits)
        return SplitCall(
            logits, self.seeds[rows], self.positions[rows], some_rows(self.input_ids, rows, B),
            some_index(self.prompt_length, rows, B), some_index(self.cache_position, rows, B),
        )  # fmt: skip


class _Way(NamedTuple):
    """How calls of one form are sampled."""

    shards: Shards
    plan: object
    """Of the processors: held, so that no other gets its id."""
    rows: slice | None
    """This rank's rows where the rows are dealt out; None where each rank gets all of them."""
    sampler: Sampler
    """Samples these rows of whole logits."""


class SplitSampler:
    """Samples from logits of which each rank has a part of the vocabulary.

    The ranks exchange their logits so that each has some whole rows. They sample these, and exchange the results. A
    row's result is that of one process, bit for bit, since it is computed in the same way from the same logits. Where
    there are fewer rows than ranks, or a processor has to see all rows, each rank gets all of them.

    Args:
        group: the ranks.
        sampler: samples whole rows.
        make: makes another sampler like it, of other parameters.
        form: the names of its parameters, and what has to be the same of them on all ranks.
    """

    def __init__(
        self,
        group: Any,
        sampler: Sampler,
        make: Callable[[SamplingParams], Sampler],
        form: tuple[tuple[str, Hashable], ...],
    ) -> None:
        self.group = Group.of(group)
        self.sampler = sampler
        self._make = make
        self._form = form
        self._agree = Agreement(self.group)
        self._ways: dict[Hashable, _Way] = {}

    def __call__(self, logits: torch.Tensor, check: Callable[[], SplitCall], plan: Any) -> Sample:
        """The tokens of one call, and what was asked about them.

        Args:
            logits: this rank's part ``[B, width]``, not checked yet.
            check: checks the arguments of the call.
            plan: of the processors, or None.
        """
        try:
            call = check()
        except Exception as error:
            self._agree.refuse(error)
            raise
        key = (logits.shape, logits.dtype, logits.device, id(plan))
        way = self._ways.get(key)
        if way is None:
            way = self._new_way(call, plan)
            sample = self._first(way, call)
            self._ways[key] = way
            return sample
        return self._shared(way, call, self._own(way, call))

    def _new_way(self, call: SplitCall, plan: Any) -> _Way:
        """Compare the arguments with those of the other ranks, and choose a way."""
        shards = self.group.shards(call.logits.shape[1])
        B = len(call.logits)
        members = [] if plan is None else plan.members
        self._agree((
            ("number of rows of logits", B), ("dtype of logits", str(call.logits.dtype)),
            ("kind of device of logits", call.logits.device.type), *self._form,
            ("processors", "; ".join(f"{member.name}: {member.stage.describe()}" for member in members)),
        ))  # fmt: skip
        ids = call.input_ids
        deals = self.group.size < B and takes_some_rows(members) and (ids is None or len(ids) == B)
        if not deals:
            return _Way(shards, plan, None, self.sampler)
        rows = self.group.rows_of(self.group.rank, B)
        return _Way(shards, plan, rows, self._of_rows(rows, B))

    def _of_rows(self, rows: slice, B: int) -> Sampler:
        """A sampler of some rows, which reads their parameters where those of all rows stand."""
        params = self.sampler.params
        own = {
            name: value[rows]
            for name, value in vars(params).items()
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == B
        }
        return self._make(replace(params, **own)) if own else self.sampler  # type: ignore[arg-type]

    def _first(self, way: _Way, call: SplitCall) -> Sample:
        """A call of a new form. If it fails on one rank, all raise."""
        failure: Exception | None = None
        own = None
        try:
            own = self._own(way, call)
        except Exception as error:
            failure = error
        told = self.group.told(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message is not None:
                raise RuntimeError(f"rank {rank} has failed: {message}")
        return self._shared(way, call, own)

    def _own(self, way: _Way, call: SplitCall) -> Sample:
        """What this rank samples itself."""
        if way.rows is None:
            whole = call._replace(logits=self.group.whole_rows(call.logits, way.shards))
        else:
            whole = call.of_rows(self.group.dealt_rows(call.logits, way.shards), way.rows)
        return way.sampler(*whole[:4], prompt_length=whole.prompt_length, cache_position=whole.cache_position)

    def _shared(self, way: _Way, call: SplitCall, own: Any) -> Sample:
        """The samples of all ranks."""
        if way.rows is None:
            return own  # type: ignore[no-any-return]
        return unpacked(self.group.results(packed(own), len(call.logits)), own)


def packed(sample: Sample) -> torch.Tensor:
    """All that a sample says of its rows, int64 ``[rows, N]``."""
    if sample.logprobs is None:
        return sample.tokens.unsqueeze(1)
    columns = [sample.tokens.unsqueeze(1), sample.ranks.unsqueeze(1), _bits(sample.logprobs.unsqueeze(1))]  # type: ignore[union-attr]
    if sample.top_tokens is not None:
        columns += [sample.top_tokens, _bits(sample.top_logprobs)]  # type: ignore[arg-type]
    return torch.cat(columns, 1)


def unpacked(rows: torch.Tensor, like: Sample) -> Sample:
    """What ``packed`` has made of the samples of all rows; ``like`` is any of them."""
    tokens = rows[:, 0].contiguous()
    if like.logprobs is None:
        return Sample(tokens, None, None, None, None)
    ranks, logprobs = rows[:, 1].contiguous(), _floats(rows[:, 2])
    if like.top_tokens is None:
        return Sample(tokens, logprobs, ranks, None, None)
    end = 3 + like.top_tokens.shape[1]
    return Sample(tokens, logprobs, ranks, rows[:, 3:end].contiguous(), _floats(rows[:, end:]))


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.int32).long()


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.int().view(torch.float32)
