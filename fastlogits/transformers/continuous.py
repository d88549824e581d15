"""Continuous batching of transformers: each request processed with its own history, position and sampling values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.rules import TINY_TEMPERATURE, Rule
from fastlogits_kernels.runtime.launcher import to_device
from fastlogits_kernels.selection import launch
from fastlogits_kernels.truncate.dispatch import truncate
from transformers.generation import logits_process as theirs
from transformers.utils import logging

from fastlogits.checks import is_integer, is_number, whole_number
from fastlogits.plan.plan import Plan
from fastlogits.plan.pointwise import FOLDED
from fastlogits.plan.run import Run
from fastlogits.plan.stages import (
    AllowFrom,
    Ban,
    Decay,
    Force,
    History,
    Member,
    Mix,
    Repeated,
    Rows,
    SequenceBias,
    Stage,
    Truncate,
    When,
    has_row_values,
    values_of,
)
from fastlogits.processors.base import member_of
from fastlogits.processors.length import ids_of
from fastlogits.transformers import continuous_draw as drawing

logger = logging.get_logger(__name__)

# Rows of the table of a batch: index of the newest token, tokens of the prompt, and how many the request may generate.
_NEWEST, _PROMPT, _LIMIT, _POSITIONS = 0, 1, 2, 3
_NO_LIMIT = 2**30
_MOST_REQUESTS = 256
# How many buffers of a manager have histories: two that take turns, and those of before it was started again.
_MOST_BUFFERS = 4
# A prompt length that transformers' processors are made with, and that is taken off them again.
_MADE_FOR = 2


class _Value(NamedTuple):
    """A sampling value that each request may have for itself."""

    allowed: str
    is_allowed: Callable[[Any], bool]
    dtype: torch.dtype
    least: float
    """Lower ones count as this."""


_VALUES = {
    "temperature": _Value("a number above 0", lambda value: 0 < value < math.inf, torch.float32, TINY_TEMPERATURE),
    "top_k": _Value("an integer of at least 1", lambda value: 1 <= value < 2**31, torch.int32, 1),
    "top_p": _Value("a number above 0, at most 1", lambda value: 0 < value <= 1, torch.float32, 0),
}
_IGNORED = ("filter_value", "min_tokens_to_keep")


class _Assembled(theirs.LogitsProcessor):  # type: ignore[misc]
    """What ``_get_logits_processor`` gives a manager that is being made: the whole list, to be taken over."""

    supports_continuous_batching = True

    def __init__(self, processors: Sequence[Any], width: int, seed: int | None) -> None:
        self.processors, self.width, self.seed = processors, width, seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "this manager was made without model.init_continuous_batching(), so that its processors can't see the "
            "requests: make it by that, or by model.generate_batch()"
        )


def assemble_for_requests(model: Any, assemble: Callable[..., Any], generation_config: Any) -> Any:
    """The processors of a generation config, as one that ``take_over`` finds.

    transformers makes them as for a single ``generate``: with the tokens that end a text, and for a prompt.
    """
    config = copy.deepcopy(generation_config)
    if config.eos_token_id == -1:  # none, to a manager
        config.eos_token_id = None
    if config.max_length is None:  # here each request has a limit of its own
        config.max_length = _NO_LIMIT
    model._prepare_special_tokens(config, True, device=model.device)
    processors = assemble(config, input_ids_seq_length=_MADE_FOR)
    width = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**15
    seed = getattr(generation_config, "seed", None) if config.do_sample else None
    if seed is not None:
        seed = whole_number("seed of a generation config", seed, -(2**63), 2**64 - 1)
    needed = len(processors) > 0 or seed is not None
    return type(processors)([_Assembled(list(processors), width, seed)] if needed else [])


def take_over(manager: Any) -> Any:
    """Give a manager that was just made processors that know its requests."""
    made = list(manager.logit_processor.logits_processor)
    if len(made) == 1 and isinstance(made[0], _Assembled):
        config, device, width = manager.continuous_batching_config, manager.model.device, made[0].width

        def stream() -> torch.cuda.Stream | None:
            if device.type != "cuda" or manager.batch_processor is None:
                return None
            return manager.batch_processor.inputs_and_outputs.compute_stream  # type: ignore[no-any-return]

        def histories() -> _Histories:
            # Asked at the first batch: until then the configuration may change.
            return _Histories(device, config.max_requests_per_batch or _MOST_REQUESTS, width, stream)

        seed = made[0].seed
        if seed is not None and not drawing.takes_draw(manager):
            logger.warning("the seed of the generation config is ignored: this version of transformers draws elsewhere")
            seed = None
        processors = RequestProcessors(made[0].processors, config.drop_unsupported_processors, histories, seed)
        manager.logit_processor = processors
        if seed is not None:
            drawing.draw_in(manager, processors.undrawn)
    return manager


class RequestProcessors:
    """Processors of a batch of requests, each with its own history and position, fused as in a list.

    It stands where a manager has its ``ContinuousBatchingLogitsProcessorList``, and has its methods.

    Args:
        processors: as made for a prompt of ``_MADE_FOR`` tokens.
        drop_unsupported: whether those that can't work here are dropped rather than kept, with a warning either way.
        histories: makes the buffers of a batch's tokens.
        seed: of the generation config, for requests that have none of their own; None where transformers draws.
    """

    def __init__(
        self,
        processors: Sequence[Any],
        drop_unsupported: bool,
        histories: Callable[[], _Histories],
        seed: int | None = None,
    ) -> None:
        self._seed = seed
        self._undrawn: drawing.Undrawn | None = None
        self.logits_processor = theirs.LogitsProcessorList()
        self._defaults: dict[str, float] = {}
        self._parts: list[_Part] = []
        self._reads_tokens = False
        self._make_histories = histories
        self._histories: dict[int, _Histories] = {}
        self._current: _Histories | None = None
        group: list[Member] = []
        for processor in processors:
            part = self._part(processor, group, drop_unsupported)
            if part is not None:
                self._close(group)
                if isinstance(part, _Sample) and self._parts and isinstance(self._parts[-1], _Sample):
                    self._parts[-1].add(part)
                else:
                    self._parts.append(part)
        self._close(group)
        self.tensors_required = _POSITIONS + len(self._defaults) + (0 if seed is None else drawing.LINES)
        self.do_processing = len(self._parts) > 0 or seed is not None

    def _part(self, processor: Any, group: list[Member], drop_unsupported: bool) -> _Part | None:
        """A part of its own, or None where the processor has joined the group or been dropped."""
        member = member_of(processor)
        stage: Stage = member.stage
        if has_row_values(stage):
            raise ValueError(
                f"{member.name} must have one value for all requests of a batch, got one for each row: requests come "
                "and go, so give a request its own temperature, top_k or top_p when you add it"
            )
        name = _SAMPLED.get(type(processor))
        part: _Part | None = None
        if name is not None:
            self._defaults[name] = getattr(processor, name)
            part = _Sample([(name, processor)])
        elif isinstance(stage, Truncate):
            part = _Sample([(None, rule) for rule in stage.rules])
        elif isinstance(processor, theirs.ExponentialDecayLengthPenalty):
            assert isinstance(stage, Decay)
            part = _OnClock(
                [Member(member.name, Decay(stage.tokens, stage.start - _MADE_FOR, stage.factor))], _generated
            )
        elif isinstance(processor, theirs.ForcedEOSTokenLogitsProcessor):
            forced = Force(ids_of(processor.eos_token_id), When("length", start=-1, stop=0), "eos_token_id")
            part = _OnClock([Member(member.name, forced)], _left)
        elif isinstance(processor, theirs.MinNewTokensLengthLogitsProcessor):
            until = When("step", stop=processor.min_new_tokens)
            group.append(Member(member.name, Ban(ids_of(processor.eos_token_id), until, lenient=True)))
        elif isinstance(processor, theirs.SuppressTokensAtBeginLogitsProcessor):
            at_first = When("step", stop=1)
            group.append(Member(member.name, Ban(ids_of(processor.begin_suppress_tokens), at_first, lenient=True)))
        elif _joins(stage):
            group.append(member._replace(original=None))
        elif not self._keeps(processor, drop_unsupported):
            return None
        else:
            part = _AsItIs(processor)
        self.logits_processor.append(processor)
        return part

    @staticmethod
    def _keeps(processor: Any, drop_unsupported: bool) -> bool:
        """Whether a processor that fastlogits can't give a request's history stays, as transformers decides it."""
        name, supported = type(processor).__name__, getattr(processor, "supports_continuous_batching", None)
        if supported is None:
            logger.warning(f"{name} is unknown to continuous batching: it runs as it is, and sees the last tokens only")
        elif not supported:
            logger.warning(
                f"{name} can't work with continuous batching: it is "
                + ("dropped" if drop_unsupported else "kept, since drop_unsupported_processors is False")
            )
        return supported is None or bool(supported) or not drop_unsupported

    def _close(self, group: list[Member]) -> None:
        if group:
            self._parts.append(_OnClock(group, _sequence))
            self._reads_tokens |= any(_reads_tokens(member.stage) for member in group)
            group.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[type(each).__name__ for each in self.logits_processor]})"

    def clear(self) -> None:
        """Hold no processors."""
        self.logits_processor, self._parts = theirs.LogitsProcessorList(), []
        self._defaults, self.tensors_required = {}, _POSITIONS + (0 if self._seed is None else drawing.LINES)
        self._reads_tokens = False
        self.do_processing = self._seed is not None

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse what a request can't have for itself.

        Raises:
            ValueError: an argument that no processor of this run takes, or a value out of range.
            TypeError: a value of another type.
        """
        for name, value in kwargs.items():
            if name == "seed" and self._seed is not None:
                whole_number("seed of a request", value, -(2**63), 2**64 - 1)
            elif name in self._defaults:
                known = _VALUES[name]
                text = f"{name} of a request must be {known.allowed}, got {value!r}"
                if not (is_integer if known.dtype == torch.int32 else is_number)(value):
                    raise TypeError(text)
                if not known.is_allowed(value):
                    raise ValueError(text)
            elif name in _IGNORED:
                logger.warning(f"{name} of a request is ignored: the processors keep that of the generation config")
            else:
                raise ValueError(
                    f"{name} of a request must be left out, got {value!r}: a request may have its own "
                    f"{', '.join(_VALUES)}, seed, each where the generation config has a value that acts (with "
                    f"do_sample=True); in this run: {', '.join(self._defaults) or 'none'}"
                )

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Write the table's column of a row without a request, int32 ``[tensors_required, 1]``."""
        int32_tensor.copy_(self._table([]))

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Fill the table of a batch, int32 ``[tensors_required, N]``, and the histories beside it."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        table = self._table([]).repeat(1, arg_storage.shape[1])
        table[:, : len(states)] = self._table(states)
        arg_storage.copy_(table)
        if self._reads_tokens:
            # Each pair of buffers that takes turns has histories of its own, as it has captured graphs.
            key = arg_storage.data_ptr()
            self._current = self._histories.pop(key, None) or self._make_histories()
            self._histories[key] = self._current
            if len(self._histories) > _MOST_BUFFERS:
                del self._histories[next(iter(self._histories))]  # the one whose last use is longest ago
            self._current.write(states)
        return arg_storage

    def _table(self, states: Sequence[Any]) -> torch.Tensor:
        """The table of some requests; of none, the column of a row without one: a prompt of one token."""
        positions = [_position(state) for state in states] or [(0, 1, _NO_LIMIT)]
        lines = list(torch.tensor(positions, dtype=torch.int32).T)
        own = [state.logit_processor_kwargs for state in states] or [{}]
        for name, default in self._defaults.items():
            known = _VALUES[name]
            values = torch.tensor([each.get(name, default) for each in own], dtype=known.dtype)
            lines.append(values.clamp_(min=known.least).view(torch.int32))
        if self._seed is not None:
            lines += drawing.table_lines(states, self._seed)
        return torch.stack(lines)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """Process the scores of a batch.

        Args:
            input_ids: the newest token of each row, int32 or int64 ``(B,)``.
            scores: logits ``(B, V)``.
            logits_processor_args: the table that ``prepare_tensor_args`` has filled, ``(tensors_required, B)``.
        """
        table = logits_processor_args[:, : scores.shape[0]]
        if self._reads_tokens:
            assert self._current is not None
            ids = self._current.read(input_ids, table[_NEWEST])
        else:
            ids = input_ids.unsqueeze(1)
        own = {name: table[_POSITIONS + i].view(_VALUES[name].dtype) for i, name in enumerate(self._defaults)}
        given, parts = scores, self._parts
        joins = self._seed is not None and len(parts) > 0 and isinstance(parts[-1], _Sample)
        for part in parts[:-1] if joins else parts:
            if scores is given and isinstance(part, _AsItIs):
                scores = given.clone()  # which it may write
            scores = part(ids, scores, table, own, input_ids)
        if self._seed is not None:
            last = parts[-1] if joins else _Sample([])
            assert isinstance(last, _Sample)
            scores, temperature, rules = last.left(scores, own)
            seeds = drawing.seeds_in(table[_POSITIONS + len(self._defaults) :])
            self._undrawn = drawing.Undrawn(temperature, rules, seeds, (table[_NEWEST] + 1 - table[_PROMPT]).long())
        return scores

    def undrawn(self) -> drawing.Undrawn:
        """What the last call has left to the draw."""
        assert self._undrawn is not None
        return self._undrawn


_SAMPLED = {
    theirs.TemperatureLogitsWarper: "temperature",
    theirs.TopKLogitsWarper: "top_k",
    theirs.TopPLogitsWarper: "top_p",
}


def _position(state: Any) -> tuple[int, int, int]:
    """The rows of the table for a request, which may have been taken up again behind what it had generated."""
    start = len(state.initial_tokens)
    prompt = state._true_initial_tokens or start
    limit = _NO_LIMIT if state.max_new_tokens is None else state.max_new_tokens + start - prompt
    return state.position_offset - 1, prompt, min(limit, _NO_LIMIT)


class _Part:
    """Some processors of a batch that follow each other."""

    def __call__(
        self,
        ids: torch.Tensor,
        scores: torch.Tensor,
        table: torch.Tensor,
        own: Mapping[str, torch.Tensor],
        newest: torch.Tensor,
    ) -> torch.Tensor:
        """Process the scores of one call; none of the tensors is written."""
        raise NotImplementedError


def _sequence(table: torch.Tensor) -> Run:
    """Lengths count the whole sequence, as in a list."""
    return Run(table[_PROMPT], table[_NEWEST])


def _generated(table: torch.Tensor) -> Run:
    """Lengths count what was generated."""
    return Run(0, table[_NEWEST] - table[_PROMPT])


def _left(table: torch.Tensor) -> Run:
    """Lengths count back from the request's last token: -1 where it comes next."""
    return Run(0, table[_NEWEST] - table[_PROMPT] - table[_LIMIT])


class _OnClock(_Part):
    """Stages that a plan fuses, with positions of their own kind."""

    def __init__(self, members: Iterable[Member], clock: Callable[[torch.Tensor], Run]) -> None:
        self._plan, self._clock = Plan.compile(members), clock

    def __call__(
        self,
        ids: torch.Tensor,
        scores: torch.Tensor,
        table: torch.Tensor,
        own: Mapping[str, torch.Tensor],
        newest: torch.Tensor,
    ) -> torch.Tensor:
        return self._plan(ids, scores, self._clock(table))


class _Sample(_Part):
    """Temperature and truncations: values of each request, or rules for all; truncations that follow are one launch."""

    def __init__(self, parts: list[tuple[str | None, Any]]) -> None:
        self._parts_in_order = parts

    def add(self, other: _Sample) -> None:
        """Append what follows."""
        self._parts_in_order += other._parts_in_order

    def __call__(
        self,
        ids: torch.Tensor,
        scores: torch.Tensor,
        table: torch.Tensor,
        own: Mapping[str, torch.Tensor],
        newest: torch.Tensor,
    ) -> torch.Tensor:
        return truncated(*self.left(scores, own))

    def left(
        self, scores: torch.Tensor, own: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[Rule]]:
        """Scores, with the temperature and the truncations that are left to apply at once."""
        rules: list[Rule] = []
        temperature = None
        for name, processor in self._parts_in_order:
            if name is None:
                rules.append(processor)
            elif name == "temperature":
                scores, rules = truncated(scores, temperature, rules), []
                temperature = own[name]
            elif name == "top_k":
                k = own[name].clamp(processor.min_tokens_to_keep, scores.shape[1])
                rules.append(Rule("top_k", k, 1, processor.filter_value))
            else:
                rules.append(Rule("top_p", own[name], processor.min_tokens_to_keep, processor.filter_value))
        return scores, temperature, rules


@launch.OPERATION.falls_back
def truncated(scores: torch.Tensor, temperature: torch.Tensor | None, rules: Sequence[Rule]) -> torch.Tensor:
    """Scores divided by a temperature of each row, and what rules keep of them; on a GPU as they are read."""
    if rules and launch.takes_scores(scores) and launch.takes_rules(rules) and not torch.compiler.is_compiling():
        out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        if out.numel():
            selection = launch.Selection(rules, scores.shape[1], scores.device)
            launch.launch_select(scores, selection, out=out, temperature=temperature)
        return out
    if temperature is not None:
        scores = scores / temperature.unsqueeze(1)
    return truncate(scores, tuple(rules)) if rules else scores


class _AsItIs(_Part):
    """A processor that fastlogits can't help: it sees the newest token of each row, as in transformers."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(
        self,
        ids: torch.Tensor,
        scores: torch.Tensor,
        table: torch.Tensor,
        own: Mapping[str, torch.Tensor],
        newest: torch.Tensor,
    ) -> torch.Tensor:
        return self._processor(newest, scores)  # type: ignore[no-any-return]


class _Histories:
    """The tokens of the requests of a batch, one row each, behind which anything may stand.

    On the CPU it grows with its requests. Elsewhere it stays where it is, since captured graphs read it, and what it
    lacks is sent along the stream that computes the batch: nothing waits.

    Args:
        device: device of the scores.
        rows: how many requests a batch may hold, elsewhere.
        width: how many tokens a request may hold, elsewhere.
        stream: says which stream computes the batch; None, or where it says None, for the current one.
    """

    def __init__(
        self, device: torch.device, rows: int, width: int, stream: Callable[[], torch.cuda.Stream | None] | None = None
    ) -> None:
        self._device = device
        self._grows = device.type == "cpu"
        self._stream = stream
        with self._computing():
            self._ids = torch.zeros((1, 64) if self._grows else (rows, width), dtype=torch.int32, device=device)
        self._longest = 1
        # Of each request of the last batch: its row, and how many of its tokens stand there once that is computed.
        self._held: dict[int, tuple[Any, int, int]] = {}

    def write(self, states: Sequence[Any]) -> None:
        """Bring the rows up to date but for the newest tokens, which ``read`` adds.

        Where batches overlap those are on the device only. Most rows lack nothing else, or one token.
        """
        self._longest = max([state.position_offset for state in states], default=1)
        self._fit(len(states), self._longest)
        sources, lacking = list(range(len(states))), []
        for row, state in enumerate(states):
            _, sources[row], count = self._held.get(id(state), (state, row, 0))
            lacking.append((row, count, state.position_offset - 1, state))
        self._held = {id(state): (state, row, state.position_offset) for row, state in enumerate(states)}
        places: list[int] = []
        tokens: list[int] = []
        for row, start, stop, state in lacking:
            places += range(row * self._ids.shape[1] + start, row * self._ids.shape[1] + stop)
            first = len(state.initial_tokens)
            tokens += state.initial_tokens[start:stop]
            tokens += state.generated_tokens[max(0, start - first) : max(0, stop - first)]
        moved = sources if sources != list(range(len(states))) else []
        if places or moved:
            with self._computing():
                if moved:
                    rows = self._ids[: len(states), : self._longest]
                    rows.copy_(self._ids[to_device(torch.tensor(moved), self._device), : self._longest])
                if places:
                    both = to_device(torch.tensor([places, tokens]), self._device)
                    self._ids.view(-1).scatter_(0, both[0], both[1].int())

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The stream that computes the batch; where it isn't known, that computes later."""
        stream = None if self._stream is None else self._stream()
        if stream is not None:
            with torch.cuda.stream(stream):
                yield
            return
        yield
        if not self._grows:
            torch.accelerator.current_stream(self._device).synchronize()

    def read(self, newest: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The histories ``[B, L]`` of a call, with the newest tokens ``[B]`` at their positions."""
        B = newest.shape[0]
        if self._grows:
            self._fit(B, self._longest)
        ids = self._ids[:B, : self._longest] if self._grows else self._ids[:B]
        return ids.scatter_(1, position.long().unsqueeze(1), newest.int().unsqueeze(1))

    def _fit(self, rows: int, width: int) -> None:
        most_rows, most = self._ids.shape
        if rows <= most_rows and width <= most:
            return
        if not self._grows:
            argument, least, value = ("max_requests_per_batch", rows, most_rows)
            if rows <= most_rows:
                argument, least, value = ("max_position_embeddings of the model's config", width, most)
            raise ValueError(
                f"{argument} must be at least {least} for this batch, got {value}: set it before the manager is made"
            )
        larger = torch.zeros(max(rows, most_rows), max(width, 2 * most if width > most else most), dtype=torch.int32)
        larger[:most_rows, :most] = self._ids
        self._ids = larger


def _joins(stage: Stage) -> bool:
    """Whether a stage needs no more of a request than a fold is given."""
    if isinstance(stage, FOLDED):
        return not values_of(stage) and not isinstance(stage, Mix)
    return isinstance(stage, Rows) and not stage.needs_history


def _reads_tokens(stage: Stage) -> bool:
    """Whether a stage reads tokens of the history, not only how many there are."""
    if isinstance(stage, SequenceBias):
        return stage.needs_history
    if isinstance(stage, AllowFrom):
        return isinstance(stage.source, str)
    return isinstance(getattr(stage, "tokens", None), (History, Repeated)) or getattr(stage, "blank", None) is not None
