"""The step of a ``Sampler`` whose logits are split over ranks: every rank returns the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastlogits_kernels.parallel.launch import Begun, BestShards, FrontShards, TopShards, keep_the_first, sent_of
from fastlogits_kernels.parallel.report import report_of_part
from fastlogits_kernels.rules import Rule, is_idle
from fastlogits_kernels.runtime.backend import CompileError
from fastlogits_kernels.runtime.launcher import collected, prepare, table_on
from fastlogits_kernels.selection import launch
from fastlogits_kernels.training.shards import Exchange, Place

from fastlogits.checks import LOGITS_DTYPES
from fastlogits.parallel.group import Agreement, Group, Shards
from fastlogits.parallel.rows import some_index, some_rows, takes_some_rows
from fastlogits.parallel.stages import PartMembers, Piece, members_of_part
from fastlogits.plan.fusion import parts_of
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.position import Index
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member, Truncate
from fastlogits.sampled import Sample

if TYPE_CHECKING:
    from fastlogits.sampling import Sampler, SamplingParams


LEAST_DEALT = 1 << 22
"""Bytes of a part of the logits from which on a report from the parts is quicker than whole rows.

An estimate, by the figures of docs/tensor-parallel.md: two exchanges and eight launches take some 40 us, and to deal
out so much takes about as long.
"""
LEAST_WEIGHED = 3 << 18
"""The same of tokens by rules that keep any number of the first ones.

With 8 rows of 128256 in bfloat16 records were quicker on two ranks (1 MiB a part), and slower on four (0.5 MiB).
"""


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


class Parts(NamedTuple):
    """How tokens are sampled from the parts of the logits: each rank sends what its part may keep, and no more."""

    step: TopShards | BestShards | FrontShards
    own: int
    """Tokens of this rank's part."""
    temperature: torch.Tensor | None
    fold: Pointwise | None
    """The processors, for this rank's part."""
    of: PartMembers
    """What they are there."""
    reported: int | None
    """For how many of the likeliest tokens raw log-probabilities are wanted too; None where not even the token's is."""
    place: Place
    """Where the part is, for these."""

    def is_quicker(self, logits: torch.Tensor) -> bool:
        """Whether this takes less time than whole rows do."""
        least = LEAST_WEIGHED if isinstance(self.step, FrontShards) else 0
        if self.reported is not None:
            least = max(least, LEAST_DEALT)
        return len(logits) * self.place.V * logits.element_size() >= least * self.place.ranks

    def begin(self, call: SplitCall) -> Begun:
        """What this rank does before the exchange."""
        part = call.logits[:, : self.own]
        inputs: Any = ()
        if self.fold is not None:
            inputs = self.fold.inputs(
                self.of.ids(call.input_ids), part, Run.of(call.prompt_length, call.cache_position)
            )
        return self.step.begin(part, call.seeds, call.positions, self.temperature, *inputs)

    def sample(self, begun: Begun, call: SplitCall, gather: Exchange, add: Exchange) -> Sample:
        """The token of each row; if wanted a report on it, which takes two exchanges more."""
        tokens = begun.finish(gather(begun.sent), add)
        if self.reported is None:
            return Sample(tokens, None, None, None, None)
        report = report_of_part(call.logits[:, : self.own], tokens, self.reported, self.place, gather, add)
        return Sample.of(tokens, report, self.reported)


class Draw(NamedTuple):
    """What a sampler does after its processors, where nobody asks for log-probabilities of processed logits."""

    rules: tuple[Rule, ...]
    temperature: float | torch.Tensor | None
    reported: int | None
    """See ``Parts``."""

    def after(self, members: Sequence[Member]) -> tuple[list[Member], tuple[Rule, ...]] | None:
        """The processors before the truncations, and all of these; None where they don't stand in this order."""
        first = next((i for i, member in enumerate(members) if isinstance(member.stage, Truncate)), len(members))
        last = [member.stage for member in members[first:]]
        own = tuple(rule for stage in last if isinstance(stage, Truncate) for rule in stage.rules)
        joins = self.temperature is None and not self.rules and all(isinstance(stage, Truncate) for stage in last)
        if last and not (joins and all(rule.filter_value == -math.inf for rule in own)):
            return None
        return list(members[:first]), own or self.rules


class _Way(NamedTuple):
    """How calls of one form are sampled."""

    shards: Shards
    plan: object
    """Of the processors: held, so that no other gets its id."""
    rows: slice | None
    """This rank's rows where the rows are dealt out; None where each rank gets all of them."""
    sampler: Sampler
    """Samples these rows of whole logits."""
    parts: Parts | None = None
    """Samples from the parts, where their rows needn't be whole."""


class SplitSampler:
    """Samples from logits of which each rank has a part of the vocabulary.

    There are three ways, of which all give the result of one process, bit for bit (but where float32 holds no noise
    beside the logits, see docs/tensor-parallel.md). Which one is taken depends on what the host knows, and is the same
    on all ranks.

    - On a GPU, where processors map each logit by itself: each rank sends the few tokens of its part that may win, and
      finds the token among all that was sent. That is so where no rule drops anything, where a fixed number of the most
      likely tokens is taken before anything is added up, and, with one more exchange, where rules keep the first tokens
      by probability. For raw log-probabilities two more small exchanges follow. Where two exchanges take longer than
      to deal out so few rows, these are dealt out. Log-probabilities of processed logits don't come here.
    - Else the ranks exchange their logits so that each has some whole rows. They sample these, and exchange the
      results.
    - Where there are no more rows than ranks, or a processor has to see all rows, each rank gets all of them.

    Args:
        group: the ranks.
        sampler: samples whole rows.
        make: makes another sampler like it, of other parameters.
        form: the names of its parameters, and what has to be the same of them on all ranks.
        draw: what the sampler does, where that is no more than to draw, and to report on the logits as they are given.
    """

    def __init__(
        self,
        group: Any,
        sampler: Sampler,
        make: Callable[[SamplingParams], Sampler],
        form: tuple[tuple[str, Hashable], ...],
        draw: Draw | None = None,
    ) -> None:
        self.group = Group.of(group)
        self.sampler = sampler
        self._make = make
        self._form = form
        self._plain = draw
        self._agree = Agreement(self.group)
        self._shards: dict[int, Shards] = {}
        self._ways: dict[Hashable, _Way] = {}
        self._made: dict[Hashable, Parts | None] = {}

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
            way, sample = self._first(way, call)
            self._ways[key] = way
            return sample
        if way.parts is not None:
            return self._from_parts(way.parts, way.parts.begin(call), call)
        return self._shared(way, call, self._own(way, call))

    def rehearse(self, call: SplitCall, plan: Any) -> None:
        """Launch what calls with such whole logits launch, where nothing is launched and nothing exchanged.

        The parts are taken for equal ones.
        """
        self.sampler(*call[:4], prompt_length=call.prompt_length, cache_position=call.cache_position)
        B, V = call.logits.shape
        size = self.group.size
        width = -(-V // size)
        shards = Shards.of([width] * size, [None] * size, V)
        some = call._replace(logits=call.logits.new_empty(B, width))
        parts = self._parts(some, shards, [] if plan is None else plan.members)
        if parts is not None:
            self._rehearse_parts(parts, parts.begin(some), some)

    def _shards_of(self, width: int) -> Shards:
        """Which tokens each rank has; told once for this sampler, since others may have another vocabulary."""
        found = self._shards.get(width)
        if found is None:
            found = self._shards[width] = self.group.told_shards(width)
        return found

    def _new_way(self, call: SplitCall, plan: Any) -> _Way:
        """Compare the arguments with those of the other ranks, and choose a way."""
        shards = self._shards_of(call.logits.shape[1])
        B = len(call.logits)
        members = [] if plan is None else plan.members
        self._agree((
            ("number of rows of logits", B), ("dtype of logits", str(call.logits.dtype)),
            ("kind of device of logits", call.logits.device.type), ("kernels", _has_kernels(call.logits)), *self._form,
            ("processors", "; ".join(f"{member.name}: {member.stage.describe()}" for member in members)),
        ))  # fmt: skip
        ids = call.input_ids
        deals = self.group.size < B and takes_some_rows(members) and (ids is None or len(ids) == B)
        # One for all numbers of rows.
        key = (call.logits.shape[1], call.logits.dtype, call.logits.device, id(plan))
        parts = None
        if B:
            parts = self._made[key] = self._made[key] if key in self._made else self._parts(call, shards, members)
        if parts is not None and not parts.is_quicker(call.logits):
            parts = None
        if not deals:
            return _Way(shards, plan, None, self.sampler, parts)
        rows = self.group.rows_of(self.group.rank, B)
        return _Way(shards, plan, rows, self._of_rows(rows, B), parts)

    def _parts(self, call: SplitCall, shards: Shards, members: Sequence[Member]) -> Parts | None:
        """How tokens are sampled from the parts; None where whole rows are needed."""
        if self._plain is None or not _has_kernels(call.logits) or not len(call.logits) or min(shards.sizes) < 2:
            return None
        split = self._plain.after(members)
        # More of the likeliest tokens than there are is an error, which whole rows raise.
        if split is None or (self._plain.reported or 0) > shards.vocab_size:
            return None
        (before, rules), temperature = split, self._plain.temperature
        device, rank = call.logits.device, self.group.rank
        own, first = shards.sizes[rank], shards.starts[rank]
        of = members_of_part(before, Piece(first, first + own, shards.vocab_size))
        folds = None if of is None else parts_of(of.members)
        if of is None or folds is None or len(folds) > 1 or not all(isinstance(fold, Pointwise) for fold in folds):
            return None
        step: TopShards | BestShards | FrontShards
        place = Place.of(shards.starts, shards.sizes, rank)
        sent = sent_of(rules, shards.vocab_size, self.group.size)
        if sent is not None:
            step = TopShards(rules, sent, shards.vocab_size, own, first, device)
        elif all(is_idle(rule, shards.vocab_size) for rule in rules) and not any(at % 8 for at in shards.starts):
            step = BestShards(own, first, device)
        elif keep_the_first(rules, shards.vocab_size) and all(
            FrontShards.fits(Place.of(shards.starts, shards.sizes, each)) for each in range(self.group.size)
        ):
            step = FrontShards(rules, place, device)
        else:
            return None
        if not isinstance(temperature, torch.Tensor) and temperature is not None:
            number = min(temperature, torch.finfo(torch.float32).max)
            temperature = table_on(torch.tensor(number, dtype=torch.float32), device)
        fold: Any = folds[0] if folds else None
        return Parts(step, own, temperature, fold, of, self._plain.reported, place)

    def _of_rows(self, rows: slice, B: int) -> Sampler:
        """A sampler of some rows, which reads their parameters where those of all rows stand."""
        params = self.sampler.params
        own = {
            name: value[rows]
            for name, value in vars(params).items()
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == B
        }
        return self._make(replace(params, **own)) if own else self.sampler  # type: ignore[arg-type]

    def _first(self, way: _Way, call: SplitCall) -> tuple[_Way, Sample]:
        """A call of a new form. If it fails on one rank, all raise; if kernels are missing there, all do without."""
        if way.parts is not None:
            begun, failures = self._tried(lambda: self._begun(way.parts, call))  # type: ignore[arg-type]
            if not any(failures):
                try:
                    return way, self._from_parts(way.parts, begun, call)
                except CompileError:  # as on the other ranks
                    return self._first(way._replace(parts=None), call)
            if not all(each is None or each.startswith(CompileError.__name__) for each in failures):
                raise RuntimeError(_failed(failures))
            way = way._replace(parts=None)
        own, failures = self._tried(lambda: self._own(way, call))
        if any(failures):
            raise RuntimeError(_failed(failures))
        return way, self._shared(way, call, own)

    def _begun(self, parts: Parts, call: SplitCall) -> Begun:
        """A first call's own part; what the exchanges are followed by is compiled, so that it fails before them."""
        begun = parts.begin(call)
        with collected() as launches:
            self._rehearse_parts(parts, begun, call)
        for _, error in prepare(launches):
            if error is not None:
                raise error
        return begun

    def _rehearse_parts(self, parts: Parts, begun: Begun, call: SplitCall) -> None:
        """Launch what follows the exchanges, where launches are collected."""
        size = self.group.size

        def gather(mine: torch.Tensor) -> torch.Tensor:
            return mine.new_empty(size, *mine.shape)

        parts.sample(begun, call, gather, lambda sums: sums)

    def _from_parts(self, parts: Parts, begun: Begun, call: SplitCall) -> Sample:
        return parts.sample(begun, call, self.group.all_gather, self.group.added)

    def _tried(self, run: Callable[[], Any]) -> tuple[Any, list[str | None]]:
        """What a function returns, and how it has failed on each rank. Here it is raised, unless kernels lack."""
        try:
            found, failure = run(), None
        except Exception as error:
            found, failure = None, error
        told = self.group.told(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None and not isinstance(failure, CompileError):
            raise failure
        return found, told

    def _own(self, way: _Way, call: SplitCall) -> Sample:
        """What this rank samples itself."""
        if not len(call.logits):
            whole = call._replace(logits=call.logits.new_empty(0, way.shards.vocab_size))
        elif way.rows is None:
            whole = call._replace(logits=self.group.whole_rows(call.logits, way.shards))
        else:
            whole = call.of_rows(self.group.dealt_rows(call.logits, way.shards), way.rows)
        return way.sampler(*whole[:4], prompt_length=whole.prompt_length, cache_position=whole.cache_position)

    def _shared(self, way: _Way, call: SplitCall, own: Any) -> Sample:
        """The samples of all ranks."""
        if way.rows is None:
            return own  # type: ignore[no-any-return]
        return unpacked(self.group.results(packed(own), len(call.logits)), own)


def _has_kernels(logits: torch.Tensor) -> bool:
    return launch.OPERATION.takes(logits, launch.FORCE_KERNEL) and logits.dtype in LOGITS_DTYPES


def _failed(failures: list[str | None]) -> str:
    rank, message = next((rank, each) for rank, each in enumerate(failures) if each is not None)
    return f"rank {rank} has failed: {message}"


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
