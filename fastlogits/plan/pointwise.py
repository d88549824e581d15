"""Pointwise stages of any kind in one pass over the logits, after a search for the tokens that they speak of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from fastlogits_kernels.pointwise import fold as ops
from fastlogits_kernels.pointwise import search as tasks
from fastlogits_kernels.pointwise.fold import Chain, Op, fold
from fastlogits_kernels.pointwise.pack_ids import pack_ids
from fastlogits_kernels.pointwise.search import (
    NOTHING,
    Call,
    Gate,
    Operands,
    Repetitions,
    Search,
    Sequences,
    Task,
    Texts,
    endings,
    sums,
)
from fastlogits_kernels.runtime.bits import pack_bits
from fastlogits_kernels.runtime.launcher import is_collecting, table_on
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent
from fastlogits_kernels.runtime.rows import HOW_TO_REPEAT

from fastlogits.checks import check_rows
from fastlogits.compilers import constant
from fastlogits.plan.allowed import AllowedRows
from fastlogits.plan.causes import kind
from fastlogits.plan.masks import Masks, is_plain_mask
from fastlogits.plan.part import NO_ARGUMENTS, Cost, Merge, Part
from fastlogits.plan.position import split
from fastlogits.plan.row_values import CallRows, RowValue, RowValues
from fastlogits.plan.run import Run, known
from fastlogits.plan.stages import (
    AllowFrom,
    Ban,
    BanRange,
    Bias,
    Clean,
    Decay,
    Force,
    ForceRows,
    Given,
    History,
    LowerRepetitions,
    Member,
    Mix,
    Penalize,
    Repeated,
    RowBias,
    Scale,
    SequenceBias,
    Source,
    Stage,
    When,
    values_of,
)
from fastlogits.token_mask import TokenMask, fitted

FOLDED = (
    AllowFrom, Ban, BanRange, Bias, Clean, Decay, Force, ForceRows, LowerRepetitions, Penalize, RowBias, Scale,
    Mix, SequenceBias,
)  # fmt: skip
"""The stages that map each logit by itself."""

_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MASKS_MERGE = "mask . mask = mask (or)"


class Pointwise(Part):
    """Stages that map each logit by itself, folded into one pass in the user's order.

    Masks that are known beforehand need no arithmetic: where there is nothing else, ``Masks`` takes their place.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self._stages = [member.stage for member in members]
        self.mixes = isinstance(self._stages[0], Mix)
        """Whether it makes one row of two."""
        allows = [stage for stage in self._stages if isinstance(stage, AllowFrom)]
        self._allowed = AllowedRows(allows) if allows else None
        self._needs_position = any(stage.needs_position for stage in self._stages)
        self._needs_history = any(stage.needs_history for stage in self._stages)
        self._of_rows = [member for member in members if values_of(member.stage)]
        self._values = list(dict.fromkeys(value.of for stage in self._stages for value in values_of(stage)))
        self._readers = [member for member in members if _reads_tokens(member.stage)]
        self._ignored = [ignore for stage in self._stages if (ignore := _ignored_by_row(stage)) is not None]
        self._by_row = any(map(_differs_by_row, self._stages))
        self.searches = self._by_row or any(stage.needs_history for stage in self._stages[self.mixes :])
        """Whether a launch goes before the pass, to find the tokens that the stages speak of."""
        self._kept: dict[tuple[Any, ...], Chain] = {}
        self._captured: list[Chain] = []
        self._last: tuple[int, torch.device, int, Chain] | None = None
        self._masks = Masks(self.members) if all(map(is_plain_mask, self._stages)) else None

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Fold the scores of one call."""
        if self._masks is not None:
            return self._masks(input_ids, scores, run, in_place)
        if self.mixes:
            scores, mates = self.halves(input_ids, scores)
            return fold(scores, *self.inputs(input_ids, scores, run, mates=mates))
        return fold(scores, *self.inputs(input_ids, scores, run), in_place)

    def chain_for(self, scores: torch.Tensor) -> Chain:
        """The chain alone, for scores of such a shape."""
        return self._chain(scores)

    def halves(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows that it maps, and those that it mixes into them, if any.

        Raises:
            ValueError: there aren't two rows for each row of ``input_ids``.
        """
        if not self.mixes:
            return scores, None
        if is_collecting():  # how many rows there are changes no kernel
            return scores, scores
        return split_halves(input_ids, scores)

    def inputs(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None,
        capturing: bool | None = None,
        mates: torch.Tensor | None = None,
    ) -> tuple[Chain, Call]:
        """What the operation takes besides the scores: the chain, and what a call tells it.

        ``capturing`` says whether a graph captures the call, where that has been asked already; ``mates`` are the rows
        that are mixed into ``scores``.
        """
        device = scores.device
        B, V = scores.shape
        last = None if torch.compiler.is_compiling() else self._last
        if last is not None and last[0] == V and last[1] == device and (last[2] == B or not self._by_row):
            chain = last[3]
        else:
            chain = self._chain(scores)
        if is_capturing(device) if capturing is None else capturing:
            hold(self._captured, chain)
        call = NOTHING
        if self._needs_history:
            call = self._at(input_ids, scores, run)
        if self._allowed is not None:
            call = call._replace(allowed=self._allowed(input_ids, scores, run))
        return chain, call if mates is None else call._replace(mates=mates)

    def _at(self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None) -> Call:
        """The tokens of a call, where its rows stand, and the values of each."""
        if input_ids.device != scores.device:
            raise ValueError(f"input_ids is on {input_ids.device}, but scores are on {scores.device}")
        ids = None
        if self._readers:
            if input_ids.dtype not in _ID_DTYPES:
                name = self._readers[0].name
                raise ValueError(f"input_ids must be int32 or int64, since {name} reads tokens, got {kind(input_ids)}")
            ids = input_ids if input_ids.shape[0] == scores.shape[0] else self._of_all_rows(input_ids, scores)
        for ignore in self._ignored:
            if ignore.shape[0] != input_ids.shape[0]:
                raise ValueError(_incompatible(ignore, input_ids.shape[0], "input_ids have"))
        if self._needs_position:
            run = known(run, self.members)
        cache_position, prompt_length = (input_ids.shape[1] - 1, 0) if run is None else run.locate(input_ids, scores)
        cache_offset, cache = split(cache_position)
        prompt_offset, prompt = split(prompt_length)
        values = None
        if self._values:
            rows = CallRows.of(input_ids, scores, cache_position, prompt_length, run)
            values = self._computed(rows, scores)
        return Call(ids, None, cache_offset, prompt_offset, cache, prompt, values)

    def _computed(self, rows: CallRows, scores: torch.Tensor) -> torch.Tensor:
        """The values of each row that the stages read, float64 ``[B, N]``."""
        for member in self._of_rows:
            check_rows(member.name, rows.input_ids, scores)
        B = scores.shape[0]
        if is_collecting():  # launches, none of which is made: nothing may count as a step
            return scores.new_zeros(B, sum(values.count for values in self._values), dtype=torch.float64)
        found = [values.function(rows).reshape(B, values.count).double() for values in self._values]
        return torch.cat(found, 1) if len(found) > 1 else found[0].contiguous()

    def _of_all_rows(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Ids ``[B, L]`` from those of fewer rows, or of more, for stages that know what that means.

        Raises:
            ValueError: a stage doesn't.
        """
        R, B = input_ids.shape[0], scores.shape[0]
        for name, stage, *_ in self._readers:
            if not (_acts_on_first_rows(stage) if R < B else _reads_another_text(stage)):
                check_rows(name, input_ids, scores)
        # A row without tokens; no token has a negative id.
        return input_ids[:B] if R > B else torch.nn.functional.pad(input_ids, (0, 0, 0, B - R), value=-1)

    def describe(self) -> str:
        """The pass in a line, for ``explain()``."""
        if self._masks is not None:
            merged = f": {len(self.members)} masks in one" if len(self.members) > 1 else ""
            return f"mask_tokens{merged}\nmoves: one read and one write of the logits; in place, the banned words only"
        values = "values of each row in torch, " if self._values else ""
        search = "a search for their tokens, then " if self.searches else ""
        count = f"{len(self.members)} stages in one pass" if len(self.members) > 1 else "one pass"
        return f"fold: {values}{search}{count}\nmoves: one read and one write of the logits"

    def merges(self) -> list[Merge]:
        """What its stages share: a set of bans, the tokens of a history, the pass."""
        if self._masks is not None:
            return [Merge(_MASKS_MERGE, tuple(member.name for member in self.members))] if self.members[1:] else []
        found: list[Merge] = []
        bans: list[str] = []
        moved: list[str] = []
        parted = False

        def close() -> None:
            if len(bans) > 1:
                found.append(Merge(_MASKS_MERGE, tuple(bans)))
            if moved:
                found.append(Merge("a mask commutes with every map that keeps -inf", tuple(moved)))
            bans.clear()
            moved.clear()

        shared: dict[tuple[Any, ...], list[str]] = {}
        for name, stage, *_ in self.members:
            if not stage.keeps_bans:
                close()
            if isinstance(stage, (AllowFrom, Ban, BanRange)):
                if bans and parted:
                    moved.append(name)
                bans.append(name)
                parted = False if len(bans) == 1 else parted
            else:
                parted = True
            if (
                isinstance(stage, (Penalize, Bias))
                and isinstance(stage.tokens, (Given, History))
                and not (isinstance(stage, Bias) and stage.extra)
            ):
                shared.setdefault(_key(stage.tokens), []).append(name)
        close()
        found += [
            Merge("the same tokens are searched for once", tuple(names)) for names in shared.values() if names[1:]
        ]
        if len(self.members) > 1:
            found.append(Merge("pointwise maps compose, in their order", tuple(member.name for member in self.members)))
        return found

    def cost(self) -> Cost:
        """A pass, and a search before it where what is searched for isn't known beforehand."""
        values = sum(values.count for values in self._values)
        return Cost(1 if self._masks is not None else 1 + self.searches, row_values=values)

    def _chain(self, scores: torch.Tensor) -> Chain:
        B, V = scores.shape
        key = (V, scores.device, B if self._by_row else 0)
        if not scores.is_floating_point():
            raise ValueError(f"scores must be floating-point of shape (B, V), got {scores.dtype}")
        self._make_chain(*key)
        chain = self._kept.get(key)
        while chain is None:  # other threads have made many meanwhile
            self._make_chain(*key)
            chain = self._kept.get(key)
        if not torch.compiler.is_compiling():
            self._last = (V, scores.device, B, chain)
        return chain

    @constant
    def _make_chain(self, V: int, device: torch.device, B: int) -> None:
        def make() -> Chain:
            builder = _Builder(B, V, device, self._values)
            for stage in self._stages:
                builder.add(stage)
            return builder.chain()

        recent(self._kept, (V, device, B), make)


def split_halves(input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of scores ``[2 * B, V]``, with the condition and without it.

    Raises:
        ValueError: there aren't two rows for each row of ``input_ids``.
    """
    B = input_ids.shape[0]
    if scores.shape[0] != 2 * B:
        raise ValueError(
            f"scores must have two rows for each row of input_ids, all conditional ones first: got {scores.shape[0]} "
            f"rows for {B} rows of input_ids"
        )
    return scores[:B], scores[B:]


def _reads_tokens(stage: Stage) -> bool:
    """Whether a stage reads the tokens of each row, and not only how many there are."""
    if isinstance(stage, (SequenceBias, LowerRepetitions)):
        return stage.needs_history
    return getattr(stage, "blank", None) is not None or isinstance(getattr(stage, "tokens", None), (History, Repeated))


def _acts_on_first_rows(stage: Stage) -> bool:
    """Whether ids of fewer rows than the scores are those of the first rows, as transformers has it."""
    tokens = getattr(stage, "tokens", None)
    if isinstance(stage, Penalize):
        return isinstance(tokens, History) and tokens.span == "all"
    return isinstance(tokens, Repeated) and tokens.text is None


def _reads_another_text(stage: Stage) -> bool:
    """Whether ids of more rows than the scores may stand there, as transformers has it."""
    tokens = getattr(stage, "tokens", None)
    return isinstance(tokens, Repeated) and tokens.text is not None


def _ignored_by_row(stage: Stage) -> torch.Tensor | None:
    """How many leading tokens of each row don't count, where that differs."""
    ignore = getattr(getattr(stage, "tokens", None), "ignore", None)
    return ignore if isinstance(ignore, torch.Tensor) else None


def _incompatible(ignore: torch.Tensor, rows: int, what: str) -> str:
    return (
        f"prompt_ignore_length must have a value for each row, got {ignore.shape[0]} where {what} {rows} (Incompatible "
        "`prompt_ignore_length` batch size); " + HOW_TO_REPEAT
    )


def _differs_by_row(stage: Stage) -> bool:
    """Whether a stage brings something of its own for each row of the batch."""
    source = getattr(stage, "tokens", None)
    if isinstance(source, History):
        return isinstance(source.ignore, torch.Tensor) or source.ignore > 0
    return isinstance(source, Given) or (isinstance(source, Repeated) and source.text is not None)


class _Builder:
    """Lowers stages to maps and tasks, for one batch size, vocabulary and device."""

    def __init__(self, B: int, V: int, device: torch.device, values: Sequence[RowValues]) -> None:
        self.B, self.V, self.device = B, V, device
        # The columns of each; the next free one comes last.
        self._columns = dict(zip(values, accumulate((each.count for each in values), initial=0), strict=False))
        self._values = sum(each.count for each in values)
        self.ops: list[Op] = []
        self.tasks: list[Task] = []
        self.numbers: list[float] = []
        self.divisors: set[int] = set()
        self.sets = self.planes = self.row_values = 0
        self._ban_set: int | None = None
        self._histories: dict[tuple[Any, ...], int] = {}
        self._gates: dict[Gate, int] = {}
        self._masks: list[TokenMask] = []
        # Masks behind the same gate are one.
        self._static: dict[tuple[int, int, int], TokenMask] = {}
        self._rows: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._starts: list[torch.Tensor] = []
        self._table: list[int] = []
        self._table_numbers: list[float] = []
        self._sequences: dict[int, Sequences] = {}
        self._decays: dict[int, tuple[int, float]] = {}
        self._ends: dict[int, int] = {}
        self._repetitions: dict[int, Repetitions] = {}
        self._biases: list[torch.Tensor] = []

    def add(self, stage: Stage) -> None:
        """Lower one stage, after those before it."""
        if not stage.keeps_bans:
            self._ban_set = None
        if isinstance(stage, Ban):
            tokens = stage.tokens
            if isinstance(tokens, (TokenMask, tuple)):
                tokens = stage.mask(self.V)
                if not len(tokens):
                    return
            blank = -1 if stage.blank is None else self._mask(fitted("blank", stage.blank, self.V))
            self._find(self._banned(), tokens, stage.when, blank)
        elif isinstance(stage, AllowFrom):
            self.tasks.append(Task(tasks.ALLOWED.value, self._banned()))
        elif isinstance(stage, BanRange):
            start, stop = (self._end_of_range(end) for end in (stage.start, stage.stop))
            self.tasks.append(Task(tasks.RANGE.value, self._banned(), -1, start, stop))
        elif isinstance(stage, Penalize):
            if isinstance(stage.tokens, Given):
                self._check_inside(stage.tokens.ids)
            at = self._divisor(stage.penalty)
            self.ops.append(Op(ops.PENALIZE.value, self._found(stage.tokens), at, at + 1))
        elif isinstance(stage, Mix):
            self.ops.append(Op(ops.MIX.value, -1, self._number(stage.scale), self._plane()))
        elif isinstance(stage, Scale):
            at = self._divisor(stage.divisor)
            self.ops.append(Op(ops.SCALE.value, -1, at, at + 1))
        elif isinstance(stage, Bias):
            self._add_bias(stage)
        elif isinstance(stage, RowBias):
            found, value = self._set(), self._given_value(stage.value)
            self._find(found, stage.tokens, None, argument=stage.argument)
            self.ops.append(Op(ops.ADD_VALUE.value, found, value))
        elif isinstance(stage, SequenceBias):
            self._add_sequences(stage)
        elif isinstance(stage, LowerRepetitions):
            self._lower_repetitions(stage)
        elif isinstance(stage, Decay):
            value = self._row_value()
            # So far below, the kernel's int32 could not hold how far beyond it a length is.
            beyond = max(_as_int32(stage.start), tasks.NO_START // 2)
            start = self._in_table([beyond])
            factor = self._in_numbers([float(stage.factor)])
            found = self._set()
            self._find(found, _indexed("eos_token_id", stage.tokens, self.V), None)
            self._decays[start] = (beyond, float(stage.factor))
            self.tasks.append(Task(tasks.DECAY.value, -1, -1, start, factor, value))
            self.ops.append(Op(ops.GROW.value, found, value))
        elif isinstance(stage, Force):
            value, found = self._row_value(), self._set()
            tokens = stage.tokens
            if isinstance(tokens, tuple):
                tokens = _indexed(stage.argument, tokens, self.V)
            self._find(found, tokens, None, argument=stage.argument)
            self.tasks.append(Task(tasks.GATE.value, -1, self._gate(stage.when), plane=value))
            self.ops.append(Op(ops.FORCE.value, found, value))
        elif isinstance(stage, ForceRows):
            found, value = self._set(), self._given_value(stage.condition)
            self._find(found, stage.tokens, None, argument=stage.argument)
            self.ops.append(Op(ops.FORCE.value, found, value))
        elif isinstance(stage, Clean):
            self.ops.append(Op(ops.CLEAN.value))

    def chain(self) -> Chain:
        """What the stages have become."""
        V, device = self.V, self.device
        static = [
            Task(tasks.STATIC.value, found, gate, self._mask(mask), blank)
            for (found, gate, blank), mask in self._static.items()
            if len(mask)
        ]
        all_tasks = static + self.tasks
        sources = None
        if self._sources:
            longest = max(source.shape[1] for source in self._sources)
            sources = torch.stack(
                [torch.nn.functional.pad(source, (0, longest - source.shape[1]), value=-1) for source in self._sources]
            ).int()
        gates = list(self._gates)
        operands = Operands(
            masks=self._put([pack_bits(mask.row()) for mask in self._masks]),
            rows=self._put([pack_ids(rows, V) for rows in self._rows]),
            sources=sources,
            starts=self._put(self._starts),
            gates=self._put([torch.tensor(gate, dtype=torch.int32) for gate in gates]),
            table=table_on(torch.tensor(self._table, dtype=torch.int32), device) if self._table else None,
            numbers=table_on(torch.tensor(self._table_numbers, dtype=torch.float64), device),
        )
        texts = Texts(
            [mask.ids(device) for mask in self._masks],
            [row.long() for row in self._rows],
            self._sequences,
            self._decays,
            self._ends,
            self._repetitions,
        )
        search = Search(all_tasks, gates, self.sets, self.planes, self.row_values, self._values, operands, texts)
        return Chain(self.ops, search, self.numbers, self.divisors, self._put(self._biases))

    def _put(self, tensors: list[torch.Tensor]) -> torch.Tensor | None:
        return table_on(torch.stack(tensors), self.device) if tensors else None

    def _set(self) -> int:
        self.sets += 1
        return self.sets - 1

    def _row_value(self) -> int:
        self.row_values += 1
        return self.row_values - 1

    def _given_value(self, value: RowValue) -> int:
        """The row value that is one that torch computes."""
        at = self._row_value()
        self.tasks.append(Task(tasks.VALUE.value, -1, -1, self._column(value), plane=at))
        return at

    def _column(self, value: RowValue) -> int:
        return self._columns[value.of] + value.index

    def _end_of_range(self, end: int | RowValue | None) -> int:
        """An end of a range as a task has it."""
        if isinstance(end, RowValue):
            return self._column(end)
        fixed = tasks.NO_STOP if end is None else _as_int32(end)
        at = self._in_table([fixed])
        self._ends[at] = fixed
        return -1 - at

    def _plane(self) -> int:
        self.planes += 1
        return self.planes - 1

    def _in_table(self, numbers: list[int]) -> int:
        self._table += numbers
        return len(self._table) - len(numbers)

    def _in_numbers(self, numbers: list[float]) -> int:
        self._table_numbers += numbers
        return len(self._table_numbers) - len(numbers)

    def _number(self, value: float) -> int:
        self.numbers.append(value)
        return len(self.numbers) - 1

    def _divisor(self, value: float) -> int:
        at = self._number(value)
        self._number(0.0)  # its reciprocal in the kernels
        self.divisors.add(at)
        return at

    def _mask(self, mask: TokenMask) -> int:
        self._masks.append(mask)
        return len(self._masks) - 1

    def _banned(self) -> int:
        """The set of bans that later ones join: bans commute with all that keeps -inf."""
        if self._ban_set is None:
            self._ban_set = self._set()
            self.ops.append(Op(ops.BAN.value, self._ban_set))
        return self._ban_set

    def _gate(self, when: When | None) -> int:
        if when is None:
            return -1
        gate = Gate(
            tasks.STEP if when.of == "step" else tasks.LENGTH,
            tasks.NO_START if when.start is None else _as_int32(when.start),
            tasks.NO_STOP if when.stop is None else _as_int32(when.stop),
            when.period,
            when.phase % when.period,
        )
        return self._gates.setdefault(gate, len(self._gates))

    def _given(self, given: Given, *, divides: bool = False) -> torch.Tensor:
        """A text for each row, ``[B, L]``: neighbouring rows share one, and rows beyond the last have none.

        As in transformers, which knows no number of beams either; ``divides`` where it fails on rows beyond the last.
        """
        ids, B = given.ids.to(self.device), self.B
        R = ids.shape[0]
        if R > B > 0:
            raise RuntimeError(f"encoder_input_ids must have at most the {B} rows of scores, got {R} rows")
        if divides and R and B % R:
            raise IndexError(
                f"encoder_input_ids must have rows of which each stands for as many of the {B} rows of scores, got "
                f"{R} rows"
            )
        each = ids.repeat_interleave(B // R, 0) if R else ids
        return torch.nn.functional.pad(each, (0, 0, 0, B - each.shape[0]), value=-1)

    def _check_inside(self, ids: torch.Tensor) -> None:
        """Refuse ids outside the vocabulary, where asking costs no wait; on a GPU they are ignored."""
        if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= 0 and ids.max() < self.V):
            raise RuntimeError(
                f"the source has token ids from {int(ids.min())} to {int(ids.max())}, but the vocabulary has {self.V} "
                f"tokens (0 to {self.V - 1})"
            )

    def _found(self, source: History | Given) -> int:
        """The set of a history or text, which all stages that speak of it share."""
        key = _key(source)
        if key not in self._histories:
            self._histories[key] = self._set()
            self._find(self._histories[key], source, None)
        return self._histories[key]

    def _start(self, source: History) -> int:
        if isinstance(source.ignore, torch.Tensor):
            missing = self.B - source.ignore.shape[0]
            if missing < 0:
                raise ValueError(_incompatible(source.ignore, self.B, "scores have"))
            # Rows without ids, which the call has compared with these, have nothing that is ignored.
            ignore = source.ignore.to(self.device).clamp(max=tasks.NO_STOP).int()
            self._starts.append(torch.nn.functional.pad(ignore, (0, missing)))
        elif source.ignore:
            self._starts.append(torch.full((self.B,), _as_int32(source.ignore), dtype=torch.int32, device=self.device))
        else:
            return -1
        return len(self._starts) - 1

    def _find(
        self,
        found: int,
        source: Source,
        when: When | None,
        blank: int = -1,
        argument: str = "tokens",
    ) -> None:
        """Add to a set the tokens of a source."""
        if isinstance(source, (TokenMask, tuple)):  # no other source has a gate
            mask = fitted(argument, source, self.V)
            key = (found, self._gate(when), blank)
            self._static[key] = self._static[key] | mask if key in self._static else mask
            return
        if isinstance(source, History):
            span = {"all": tasks.ALL, "prompt": tasks.PROMPT, "generated": tasks.GENERATED}[source.span].value
            self.tasks.append(Task(tasks.HISTORY.value, found, -1, span, self._start(source)))
        elif isinstance(source, Given):
            self._rows.append(self._given(source))
            self.tasks.append(Task(tasks.ROWS.value, found, -1, len(self._rows) - 1))
        elif source.text is None:
            span = tasks.PROMPT.value if source.span == "prompt" else -1
            self.tasks.append(Task(tasks.REPEATED.value, found, -1, _as_int32(source.size), span))
        else:
            self._sources.append(self._given(source.text, divides=True))
            size, block = _as_int32(source.size), len(self._sources) - 1
            self.tasks.append(Task(tasks.REPEATED_FROM.value, found, -1, size, block))

    def _add_bias(self, stage: Bias) -> None:
        source = stage.tokens
        if stage.counted:
            found, plane = self._set(), self._plane()
            self._find(found, source, None)
            history = self.tasks.pop()
            self.tasks.append(history._replace(kind=tasks.COUNTS.value, plane=plane))
            self.ops.append(Op(ops.ADD_COUNTED.value, found, self._number(stage.counted), plane))
        elif isinstance(source, (History, Given)) and not stage.extra:
            found = self._found(source)
        else:
            found = self._set()
            self._find(found, source, stage.when, argument=stage.argument)
            if stage.extra:
                self._find(found, stage.extra, stage.when, argument=stage.argument)
        if stage.value == -math.inf:
            self.ops.append(Op(ops.SINK.value, found))
        elif stage.value:
            self.ops.append(Op(ops.ADD.value, found, self._number(stage.value), 0 if stage.rounds_once else -1))

    def _lower_repetitions(self, stage: LowerRepetitions) -> None:
        found, plane = self._set(), self._plane()
        breakers = fitted("sequence_breakers", stage.breakers, self.V)
        range_ = tasks.NO_STOP if stage.range_ is None else _as_int32(stage.range_)
        at = self._in_table([range_, self._mask(breakers)])
        numbers = self._in_numbers(list(stage.penalties))
        self._repetitions[at] = Repetitions(range_, breakers.row(self.device), stage.penalties)
        self.tasks.append(Task(tasks.REPETITIONS.value, found, -1, at, numbers, plane))
        self.ops.append(Op(ops.SUBTRACT.value, found, b=plane))

    def _add_sequences(self, stage: SequenceBias) -> None:
        beyond = stage.outside(self.V)
        if beyond:
            raise ValueError(
                f"the vocabulary has {self.V} tokens (0 to {self.V - 1}), but token ids {beyond} were to be biased"
            )
        single = {ids[0]: value for ids, value in stage.sequences if len(ids) == 1}
        longer = [(ids, value) for ids, value in stage.sequences if len(ids) > 1]
        if all(value == -math.inf for _, value in stage.sequences):
            found = self._set()
            self._find(found, tuple(single), None)
            if longer:
                at = self._in_table(endings([ids for ids, _ in longer]))
                self._sequences[at] = Sequences.of([ids for ids, _ in longer], None, {}, self.device)
                self.tasks.append(Task(tasks.ENDINGS.value, found, -1, at))
            self.ops.append(Op(ops.SINK.value, found))
            return
        ends = {ids[-1] for ids, _ in longer}
        alone = {token: value for token, value in single.items() if token not in ends}
        if alone:
            found = self._set()
            self._find(found, tuple(alone), None)
            bias = torch.zeros(self.V)
            bias[list(alone)] = torch.tensor(list(alone.values()))
            self._biases.append(bias)
            self.ops.append(Op(ops.ADD_ROW.value, found, len(self._biases) - 1))
        if longer:
            found, plane = self._set(), self._plane()
            self._find(found, tuple(sorted(ends)), None)
            by_end = sorted(longer, key=lambda each: each[0][-1])  # stable: the order of the sums stays
            at = self._in_table(sums([ids for ids, _ in by_end]))
            begin = [single.get(token, 0.0) for token in sorted(ends)]
            numbers = self._in_numbers([*begin, *(value for _, value in by_end)])
            self._sequences[at] = Sequences.of(
                [ids for ids, _ in longer], [value for _, value in longer], single, self.device
            )
            self.tasks.append(Task(tasks.SUMS.value, found, -1, at, numbers, plane))
            self.ops.append(Op(ops.ADD_PLANE.value, found, b=plane))


def _as_int32(length: int) -> int:
    """A length as the kernels hold it; no sequence is longer."""
    return max(tasks.NO_START, min(tasks.NO_STOP, length))


def _key(source: History | Given) -> tuple[Any, ...]:
    """What sources of the same tokens have in common."""
    if isinstance(source, Given):
        return (id(source.ids),)
    return (source.span, id(source.ignore) if isinstance(source.ignore, torch.Tensor) else source.ignore)


def _indexed(argument: str, ids: tuple[int, ...], V: int) -> tuple[int, ...]:
    """Ids that index the vocabulary.

    Raises:
        IndexError: one of them is outside it, as torch has it.
    """
    for token in ids:
        if not -V <= token < V:
            raise IndexError(f"`{argument}`: token id {token} is outside the vocabulary of {V} tokens (0 to {V - 1})")
    return tuple(token % V for token in ids)
