"""A list of stages compiled into launches: which of them merge, in what order they run, on which tables."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, TypeAlias

import torch
from fastlogits_kernels.bits import unpack_bits
from fastlogits_kernels.mask_tokens import Bans, mask_tokens, mask_tokens_
from fastlogits_kernels.pack_ids import pack_ids

from fastlogits.position import Index, Position
from fastlogits.stages import AllowFrom, Ban, Opaque, Stage
from fastlogits.token_mask import TokenMask, fitted

NamedStage: TypeAlias = tuple[str, Stage]
"""A processor's class name, for people, and what it does."""

_NONE: Mapping[str, Any] = {}
_ALWAYS = torch.iinfo(torch.int32).max


class UnknownRunStartError(ValueError):
    """A first-step processor was called where nothing says at which length the run began."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} can't know which step this is: nothing says where the run starts. Give it in one of three ways: "
            "(1) model.generate(logits_processor=fastlogits.LogitsProcessorList([...])) finds it by itself; "
            "(2) processor.for_run(prompt_length=input_ids.shape[1]), made anew for each run, goes into any list; "
            "(3) processors(input_ids, scores, prompt_length=...), where processors is a "
            "fastlogits.LogitsProcessorList that you call yourself."
        )


class Run:
    """One generation, from its prompt to its end: where it starts, and what is built once for it.

    Args:
        prompt_length: tokens of the prompt; None takes the length of the first ``input_ids`` seen.
        cache_position: index of the newest token; None takes it from the length of ``input_ids``.
    """

    def __init__(self, prompt_length: Index | None = None, cache_position: Index | None = None) -> None:
        Position(-1 if cache_position is None else cache_position, 0 if prompt_length is None else prompt_length)
        self._prompt_length = prompt_length
        self._cache_position = cache_position
        self._on_device = [
            (argument, index)
            for argument, index in (("prompt_length", prompt_length), ("cache_position", cache_position))
            if isinstance(index, torch.Tensor)
        ]
        self._first_lengths: dict[int, int] = {}
        # What was built for this run, with the launch, rows and tables that it was built for.
        self.allowed: dict[tuple[Any, ...], torch.Tensor] = {}
        self._placed: tuple[int, _MaskTables, Bans] | None = None

    def locate(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[Index, Index]:
        """``cache_position`` and ``prompt_length`` of a call."""
        for argument, index in self._on_device:
            if index.device != scores.device:
                raise ValueError(f"{argument} is on {index.device}, but scores are on {scores.device}")
            if index.ndim and index.shape[0] != scores.shape[0]:
                raise ValueError(f"{argument} has {index.shape[0]} rows, but scores have {scores.shape[0]}")
        length = input_ids.shape[1]
        cache_position, prompt_length = self._cache_position, self._prompt_length
        if prompt_length is None:
            # In assisted decoding one processor serves a draft model too, whose tokenizer may count another length.
            prompt_length = self._first_lengths.setdefault(scores.shape[1], length)
        return length - 1 if cache_position is None else cache_position, prompt_length

    def bans(self, tables: _MaskTables, input_ids: torch.Tensor, scores: torch.Tensor) -> Bans | None:
        """What is banned at a call, as far as it doesn't depend on the row's allowed set."""
        if not self._on_device and not tables.has_blanks:
            cache_position, prompt_length = self.locate(input_ids, scores)
            return tables.at_step(cache_position + 1 - prompt_length)  # type: ignore[arg-type]
        placed = self._placed
        if placed is not None and placed[1] is tables and placed[0] == scores.shape[0]:
            return placed[2]
        if tables.gated is None:
            return None
        bans = _at_position(tables.gated, input_ids, *self.locate(input_ids, scores))
        if self._cache_position is not None and self._prompt_length is not None and not tables.has_blanks:
            # Nothing here changes from call to call but the contents of the tensors.
            self._placed = (scores.shape[0], tables, bans)
        return bans


@dataclass(frozen=True, eq=False)
class _AllowTables:
    """What an ``AllowFrom`` reads, for one vocabulary size and device: words int32 ``[W]`` and ids ``[R, L]``."""

    source: torch.Tensor | None
    always: torch.Tensor
    counted: torch.Tensor

    @classmethod
    def of(cls, stage: AllowFrom, vocab_size: int, device: torch.device) -> _AllowTables:
        source = None
        if isinstance(stage.source, torch.Tensor):
            if stage.source.numel() and stage.source.max() >= vocab_size:
                raise ValueError(
                    f"source_ids: token id {stage.source.max()} is outside the vocabulary of {vocab_size} tokens"
                )
            source = stage.source.to(device)
        always = fitted("extra", stage.extra, vocab_size) | fitted("eos_token_id", stage.eos, vocab_size)
        return cls(source, always.bits(device), ~fitted("exclude", stage.exclude, vocab_size).bits(device))

    def rows(self, input_ids: torch.Tensor, batch_size: int, vocab_size: int, prompt_length: Index) -> torch.Tensor:
        """Words int32 ``[B or 1, W]`` of the allowed tokens; launches only, so that a new run waits for nothing."""
        if self.source is not None:
            source = self.source
            if batch_size % source.shape[0]:
                raise ValueError(
                    f"source_ids has {source.shape[0]} rows, which don't divide the {batch_size} rows of scores"
                )
        elif isinstance(prompt_length, int):
            source = input_ids[:, :prompt_length]
        else:
            column = torch.arange(input_ids.shape[1], device=input_ids.device)
            source = input_ids.masked_fill(column >= prompt_length.reshape(-1, 1), -1)
        rows = pack_ids(source, vocab_size) & self.counted | self.always
        # Beams and returned sequences of one source are neighbours; a single source broadcasts.
        return rows if rows.shape[0] == 1 else rows.repeat_interleave(batch_size // max(1, rows.shape[0]), 0)


class _MaskTables:
    """What a mask launch reads, for one vocabulary size and device."""

    def __init__(self, bans: Sequence[Ban], allows: Sequence[AllowFrom], vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.allows = [_AllowTables.of(stage, vocab_size, device) for stage in allows]
        # Bans behind the same gate are one set; gates that close sooner come first.
        gates: dict[tuple[int, TokenMask | None], TokenMask] = {}
        for stage in bans:
            tokens = fitted(stage.argument, stage.tokens, vocab_size)
            blank = None if stage.blank is None else fitted("blank", stage.blank, vocab_size)
            gate = (_ALWAYS if stage.window is None else stage.window, blank)
            if len(tokens):
                gates[gate] = gates[gate] | tokens if gate in gates else tokens
        self._gates = sorted(gates.items(), key=lambda item: item[0][0])
        self.has_blanks = any(blank is not None for (_, blank), _ in self._gates)

    @cached_property
    def _by_step(self) -> list[tuple[int, Bans]]:
        """Where the step is known on the host, what is banned below each window: one set that needs no gate."""
        found: list[tuple[int, Bans]] = []
        for i, ((window, _), merged) in enumerate(self._gates):
            for _, later in self._gates[i + 1 :]:
                merged = merged | later
            if not found or found[-1][0] != window:
                found.append((window, self._bans([merged])))
        return found

    @cached_property
    def gated(self) -> Bans | None:
        """What is banned where the step is known on the device only: a set for each gate; None where nothing is."""
        if not self._gates:
            return None
        windows = torch.tensor([window for (window, _), _ in self._gates], dtype=torch.int32, device=self.device)
        blanks = None
        if self.has_blanks:
            none = TokenMask.from_ids([], self.vocab_size)
            blanks = self._sets([none if blank is None else blank for (_, blank), _ in self._gates])
        return self._bans([mask for _, mask in self._gates])._replace(windows=windows, blanks=blanks)

    def at_step(self, step: int) -> Bans | None:
        """What is banned at one step, without gates; None where nothing is."""
        for window, bans in self._by_step:
            if step < window:
                return bans
        return None

    def _bans(self, masks: list[TokenMask]) -> Bans:
        # Writing ids one by one beats a pass over the row: always on the CPU, and on the GPU for up to one token in
        # eight, measured on an H200.
        few = self.device.type == "cpu" or len(masks[0]) <= self.vocab_size // 8
        return Bans(self._sets(masks), masks[0].ids(self.device) if few and len(masks) == 1 else None)

    def _sets(self, masks: list[TokenMask]) -> torch.Tensor:
        return torch.stack([mask.row() if self.device.type == "cpu" else mask.bits() for mask in masks]).to(self.device)


class MaskLaunch:
    """Mask stages, in one launch: the law is mask . mask = mask (or)."""

    law: ClassVar[str] = "mask . mask = mask (or)"

    def __init__(self, named: Sequence[NamedStage]) -> None:
        self.named = tuple(named)
        self._bans = [stage for _, stage in named if isinstance(stage, Ban)]
        self._allows = [stage for _, stage in named if isinstance(stage, AllowFrom)]
        self._needs_position = any(stage.needs_position for _, stage in named)
        self._kept: dict[tuple[int, torch.device], _MaskTables] = {}
        self._kept_allowed: dict[tuple[Any, ...], torch.Tensor] = {}
        self._last: _MaskTables | None = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = _NONE,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Mask the scores of one step."""
        tables, device = self._last, scores.device
        if (
            tables is None
            or scores.ndim != 2
            or scores.shape[1] != tables.vocab_size
            or device != tables.device
            or not scores.is_floating_point()
        ):
            tables = self._tables(scores)
        if input_ids.device != device:
            raise ValueError(f"input_ids is on {input_ids.device}, but scores are on {device}")
        if not self._needs_position:
            bans = tables.at_step(0)
        elif run is not None:
            bans = run.bans(tables, input_ids, scores)
        else:
            raise UnknownRunStartError(next(name for name, stage in self.named if stage.needs_position))
        if self._allows:
            bans = (bans or Bans())._replace(allowed=self._allowed(tables, input_ids, scores, run))
        if bans is None:
            return scores
        if in_place:
            mask_tokens_(scores, bans)
            return scores
        return mask_tokens(scores, bans)

    def describe(self) -> str:
        """The launch in a line, for ``explain()``."""
        if len(self.named) > 1:
            return f"mask_tokens: {len(self.named)} masks in one ({self.law})"
        return "mask_tokens"

    def _tables(self, scores: torch.Tensor) -> _MaskTables:
        if scores.ndim != 2 or not scores.is_floating_point():
            raise ValueError(
                f"scores must be floating-point of shape (B, V), got {scores.dtype} of {tuple(scores.shape)}"
            )
        key = (scores.shape[1], scores.device)
        tables = self._kept.get(key)
        if tables is None:
            tables = self._kept[key] = _MaskTables(self._bans, self._allows, *key)
        self._last = tables
        return tables

    def _allowed(
        self, tables: _MaskTables, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None
    ) -> torch.Tensor:
        """Allowed tokens ``[B or 1, ..]``, built once a run, or once for all where they don't depend on the run."""
        B, V = scores.shape
        key = (self, B, V, scores.device)
        of_run = run if self._needs_position else None
        kept = self._kept_allowed if of_run is None else of_run.allowed
        rows = kept.get(key)
        if rows is None:
            prompt_length = 0 if of_run is None else of_run.locate(input_ids, scores)[1]
            rows = tables.allows[0].rows(input_ids, B, V, prompt_length)
            for allow in tables.allows[1:]:
                rows = rows & allow.rows(input_ids, B, V, prompt_length)
            if scores.device.type == "cpu":
                rows = unpack_bits(rows, V)
            if of_run is None:
                kept.clear()  # it would otherwise grow with every batch size seen
            kept[key] = rows
        return rows


def _at_position(bans: Bans, input_ids: torch.Tensor, cache_position: Index, prompt_length: Index) -> Bans:
    """``bans`` with the position that its gates compare, on the host or on the device."""
    cache, cache_offset = (None, cache_position) if isinstance(cache_position, int) else (cache_position, 0)
    prompt, prompt_offset = (None, prompt_length) if isinstance(prompt_length, int) else (prompt_length, 0)
    ids = None if bans.blanks is None else input_ids
    return Bans(
        bans.sets, bans.tokens, None, bans.windows, bans.blanks, ids, cache, prompt, cache_offset, prompt_offset
    )


class Barrier:
    """A processor that fastlogits doesn't know: it runs as it is, and nothing merges across it."""

    def __init__(self, name: str, processor: Any) -> None:
        self.named: tuple[NamedStage, ...] = ((name, Opaque(processor)),)
        self.processor = processor
        parameters = list(inspect.signature(processor.__call__).parameters)
        self._parameters, self._extra = parameters, parameters[2:]

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = _NONE,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Run the processor as ``LogitsProcessorList`` of transformers does."""
        if self._extra:
            if not all(argument in kwargs for argument in self._extra):
                raise ValueError(
                    f"Make sure that all the required parameters: {self._parameters} for "
                    f"{type(self.processor)} are passed to the logits processor."
                )
            processed = self.processor(input_ids, scores, **{name: kwargs[name] for name in self._extra})
        else:
            processed = self.processor(input_ids, scores)
        if in_place and processed is not scores:
            scores.copy_(processed)
            return scores
        return processed  # type: ignore[no-any-return]

    def describe(self) -> str:
        """The barrier in a word, for ``explain()``."""
        return "barrier"


class Plan:
    """Launches and barriers that together do what a list of processors does, in its order."""

    def __init__(self, steps: Sequence[MaskLaunch | Barrier]) -> None:
        self.steps = steps

    @classmethod
    def compile(cls, named: Iterable[NamedStage]) -> Plan:
        """Merge what the laws allow, given the name and the stage of each processor."""
        steps: list[MaskLaunch | Barrier] = []
        for is_opaque, group in groupby(named, key=lambda each: isinstance(each[1], Opaque)):
            if is_opaque:
                steps += [Barrier(name, stage.processor) for name, stage in group if isinstance(stage, Opaque)]
            else:
                steps.append(MaskLaunch(list(group)))
        return cls(steps)

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = _NONE,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Processed scores ``[B, V]``: new ones, or ``scores`` itself where nothing changes it or ``in_place``."""
        for step in self.steps:
            scores = step(input_ids, scores, run, kwargs, in_place)
        return scores

    def explain(self) -> str:
        """The plan as text: its launches and barriers in order, and what each processor does in them."""
        count = sum(len(step.named) for step in self.steps)
        launches = sum(isinstance(step, MaskLaunch) for step in self.steps)
        lines = [f"{_plural(count, 'processor')}, {_plural(launches, 'launch')}"]
        width = max((len(name) for step in self.steps for name, _ in step.named), default=0)
        for number, step in enumerate(self.steps, 1):
            lines.append(f"{number}. {step.describe()}")
            lines += [f"     {name:<{width}}  {stage.kind:<6}  {stage.describe()}" for name, stage in step.named]
            if isinstance(step, MaskLaunch):
                lines.append("     moves: one read and one write of the logits; in place, the banned words only")
        return "\n".join(lines)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('h') else 's'}"
