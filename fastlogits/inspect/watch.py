"""What processors do during whole calls of ``generate``: noted step by step, for a page or as data."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_not
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessorList as _TransformersList

from fastlogits.checks import whole_number
from fastlogits.inspect.candidates import Candidates, Change, change_of
from fastlogits.plan.plan import Plan
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member, Opaque, Stage
from fastlogits.processors.base import LogitsProcessorList, RunProcessor, StagedProcessor, member_of
from fastlogits.token_text import token_texts
from fastlogits.transformers.accelerate import RunList, generating_models

__all__ = ["Call", "Processor", "Step", "Watched", "watch"]

_ROUND_OF_DRAFTS = 32
"""How many calls of an assisted generation wait for the token that is drawn: a round seldom has more candidates."""


class Processor(NamedTuple):
    """A processor of a call.

    Args:
        name: its class name.
        does: what it does, in a few words; empty where fastlogits doesn't know the class.
    """

    name: str
    does: str


@dataclass(frozen=True)
class Step:
    """One step of one row: what each processor did, and what was drawn.

    Args:
        call: the call of ``generate``, from 0.
        row: the row of the call's result, from 0.
        number: the step, 0 for the first generated token.
        position: number of tokens before it, the prompt included.
        token: the token that was drawn. None where nothing tells: the last one of a call that ended with an error.
        probability: its probability after all processors, from which it was drawn.
        probability_before: its probability before all of them, as the model has it.
        rank: its place among the candidates after all processors, 1 for the likeliest. None where it is no candidate.
        rank_before: its place before all of them.
        candidates: number of candidates before all of them.
        processors: the processors.
        changes: what each of them did.
        tokens: the tokens that are likely, removed or changed most somewhere in this step, and the one drawn.
        probabilities: of each of these tokens, before all processors and after each of them: one tuple more than there
            are processors. 0 is a token that is no candidate.
        moves: for each processor and each of these tokens: 1 where it raised it, -1 where it lowered it, else 0.
    """

    call: int
    row: int
    number: int
    position: int
    token: int | None
    probability: float | None
    probability_before: float | None
    rank: int | None
    rank_before: int | None
    candidates: int
    processors: tuple[Processor, ...]
    changes: tuple[Change, ...]
    tokens: tuple[int, ...]
    probabilities: tuple[tuple[float, ...], ...]
    moves: tuple[tuple[int, ...], ...]

    @property
    def left(self) -> int:
        """Number of candidates after all processors."""
        return self.changes[-1].left if self.changes else self.candidates

    @property
    def kept_mass(self) -> float:
        """Total probability, before all processors, of the candidates that are left."""
        return self.changes[-1].kept_of_start if self.changes else 1.0


@dataclass(frozen=True)
class Call:
    """One call of ``generate``.

    Args:
        number: which call it is, from 0.
        model: the class name of the model.
        method: the decoding method, such as ``"sample"`` or ``"greedy_search"``.
        prompts: the tokens before the first step, for each row of the result.
        rows: the steps of each row, as far as the row goes.
    """

    number: int
    model: str
    method: str
    prompts: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[Step, ...], ...]


class Watched:
    """What ``watch`` notes while its block is entered. A notebook shows the page.

    Args:
        model: see ``watch``, as all that follow.
        tokenizer: None to show ids.
        top: how many likely tokens of each stage to note.
    """

    def __init__(self, model: Any, tokenizer: Any, top: int) -> None:
        self._models = [each for _, each in generating_models(model)]
        self.tokenizer = tokenizer
        """The tokenizer that was given."""
        self._top = whole_number("top", top, 1)
        self._hooks: list[_Hooks] = []
        self._calls: list[Call] = []
        self._entered = 0
        self._lock = threading.RLock()
        self._now = threading.local()

    def __enter__(self) -> Watched:
        with self._lock:
            if not self._entered:
                self._hooks = [_Hooks(model, self) for model in self._models]
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                for hooks in reversed(self._hooks):
                    hooks.remove()
                self._hooks = []

    def __repr__(self) -> str:
        rows = sum(len(call.rows) for call in self.calls)
        return f"<Watched: calls of generate {len(self.calls)}, rows {rows}, steps {len(self.steps)}>"

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of ``generate`` that have ended."""
        return tuple(self._calls)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, by call and row."""
        return tuple(step for call in self.calls for row in call.rows for step in row)

    def page(self) -> str:
        """A page of HTML that needs nothing else: no network, no other file.

        Raises:
            ValueError: no call of ``generate`` has ended yet.
        """
        from fastlogits.inspect.watch_page import page

        if not self._calls:
            raise ValueError(
                "there is nothing to show: no call of generate has ended in the block of watch; call model.generate "
                "of the same model there"
            )
        return page(self.calls, self.tokenizer)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file.

        Args:
            path: where to.

        Returns:
            The path.

        Raises:
            ValueError: no call of ``generate`` has ended yet.
            OSError: the file can't be written.
        """
        path = Path(path)
        path.write_text(self.page(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from html import escape

        if not self._calls:
            return escape(repr(self))
        frame = f'<iframe srcdoc="{escape(self.page())}" title="generation" '
        return frame + 'style="width:100%;height:820px;border:0;border-radius:8px"></iframe>'

    # -- What the hooks of a model ask for ------------------------------------------------------------------------

    def _generate(self, model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``generate``, and note it."""
        calls = self._now.__dict__.setdefault("calls", [])
        call = _Call(model, kwargs)
        calls.append(call)
        output: Any = None
        try:
            output = original(*args, **kwargs)
            return output
        finally:
            calls.pop()
            for recording in call.recordings:
                self._end(recording, output)

    def _assembled(self, model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``_get_logits_processor`` returns, as a list that notes its calls."""
        processors = original(*args, **kwargs)
        calls: list[_Call] = self._now.__dict__.get("calls", [])
        # A draft model generates while the call that it helps goes on: its steps are no steps of that call.
        if not calls or calls[-1].model is not model or any(call.recordings for call in calls[:-1]):
            return processors
        if not isinstance(processors, list) or not all(map(callable, processors)):
            return processors  # the first step says what is wrong
        recording = _Recording(calls[-1].method_of(kwargs.get("generation_config")), model, kwargs, self._top)
        calls[-1].recordings.append(recording)
        if calls[-1].decodes and not isinstance(processors, RunList):
            start = kwargs.get("input_ids_seq_length")
            known = processors.one_by_one.recordings if isinstance(processors, _WatchedList) else []
            processors = RunList(processors, start if isinstance(start, int) else None).in_same_run(_WatchedRun)
            processors.one_by_one.recordings += known
        elif isinstance(processors, RunList):
            processors = processors if processors.is_watched else processors.in_same_run(_WatchedRun)
        elif not isinstance(processors, _WatchedList):
            processors = _WatchedList(processors)
        processors.one_by_one.recordings.append(recording)
        return processors

    def _end(self, recording: _Recording, output: Any) -> None:
        with self._lock:
            call = recording.call(len(self._calls), output)
            if call is not None:
                self._calls.append(call)


def watch(model: Any, tokenizer: Any = None, *, top: int = 10) -> Watched:
    """Watch what processors do: in its block, each ``generate`` of the model notes every step of every row.

    The tokens are those of a ``generate`` that nobody watches. All processors are watched, those that ``generate``
    makes of its arguments, fastlogits' and your own; whether the model is accelerated or not; greedy, sampled, with
    beams or with drafts. They run one by one, so a watched call is slower. ``custom_generate=fastlogits.decode`` takes
    the ordinary loop meanwhile, without drafts, and the logger ``fastlogits`` says so. Outside the block nothing is
    left in the model. Continuous batching (``generate_batch``) is not watched.

    With beams, each row of the result is followed back through the beams that it came from. The scores are
    log-probabilities there, and the token of a step was chosen by the sum over all steps, not by this step alone.

    Args:
        model: a model of transformers that can generate, or what holds one, as ``fastlogits.accelerate`` takes it.
        tokenizer: a tokenizer, to show tokens as text.
        top: how many of the likeliest tokens to note, before and after each processor, at least 1.

    Returns:
        A context manager. During and after its block it has ``steps`` and ``calls`` as data, ``save(path)`` for the
        page, and in a notebook it shows the page.

    Raises:
        TypeError: neither a model that can generate nor something that holds one; or ``tokenizer`` is no tokenizer.
        ValueError: ``top`` below 1.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> with watch(model) as watched:
        ...     out = model.generate(torch.tensor([[5, 7]]), max_new_tokens=3, do_sample=True, top_k=4)
        >>> step = watched.steps[0]
        >>> step.candidates, step.left, step.token == out[0, 2]
        (32, 4, tensor(True))
    """
    if tokenizer is not None:
        token_texts(tokenizer)  # what is none is refused before anything runs
    return Watched(model, tokenizer, top)


class _Hooks:
    """Two methods of one model, wrapped as attributes of that model alone.

    Args:
        model: the model.
        watched: what is called instead; it gets the model and its own method first.
    """

    def __init__(self, model: Any, watched: Watched) -> None:
        self._model = model
        self._before: dict[str, Any] = {}
        self._mine: dict[str, Any] = {}
        for name, instead in (("generate", watched._generate), ("_get_logits_processor", watched._assembled)):
            original = getattr(model, name)
            self._before[name] = vars(model).get(name)
            # Looked up at each call: accelerate may wrap the method of the class meanwhile.
            latest = functools.partial(_latest, model, name, self._before[name])
            self._mine[name] = functools.wraps(original)(functools.partial(_instead, instead, model, latest))
            setattr(model, name, self._mine[name])

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name, mine in self._mine.items():
            if vars(self._model).get(name) is not mine:
                continue  # another has wrapped it since, and ours just calls through
            if self._before[name] is None:
                delattr(self._model, name)
            else:
                setattr(self._model, name, self._before[name])


def _instead(instead: Callable[..., Any], model: Any, latest: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    return instead(model, latest(), *args, **kwargs)


def _latest(model: Any, name: str, own: Any) -> Any:
    return getattr(type(model), name).__get__(model) if own is None else own


class _Call:
    """A call of ``generate`` that goes on.

    Args:
        model: whose it is.
        arguments: those given by name.
    """

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self.model = model
        self._arguments = arguments
        self.recordings: list[_Recording] = []
        """What its lists of processors have noted; a model may assemble several, as Whisper does for each segment."""

    @property
    def decodes(self) -> bool:
        """Whether ``fastlogits.decode`` is the decoding method."""
        method = self._arguments.get("custom_generate")
        if not callable(method):
            return False
        from fastlogits.transformers.decode import decode

        return inspect.unwrap(method) is decode

    def method_of(self, generation_config: Any) -> str:
        """The name of the decoding method."""
        if generation_config is None:
            return "generate"
        return str(generation_config.get_generation_mode(self._arguments.get("assistant_model")).value)


# -- Lists that note their calls ----------------------------------------------------------------------------------


class _WatchedList(_TransformersList):  # type: ignore[misc]
    """The processors of a plain ``generate``: transformers' own classes run as they are."""

    def __init__(self, processors: Iterable[Any]) -> None:
        super().__init__(processors)
        self.one_by_one = _OneByOne(_as_it_is)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Process the scores of one step, and note what each processor does."""
        return self.one_by_one.process(list(self), input_ids, scores, kwargs)


class _WatchedRun(RunList):
    """The processors of an accelerated ``generate``: each is planned by itself."""

    is_watched = True

    def __init__(self, processors: Iterable[Any], prompt_length: int | None) -> None:
        super().__init__(processors, prompt_length)
        self.one_by_one = _OneByOne(functools.partial(_planned, self))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Process the scores of one step, and note what each processor does."""
        return self.one_by_one.process(list(self), input_ids, scores, kwargs)


class _Single:
    """One processor by itself.

    Args:
        plan: its plan as it is now: its attributes may be set in the middle of a run.
        run: the run that it stands in.
    """

    def __init__(self, plan: Callable[[], Plan], run: Run | None = None) -> None:
        self._plan_of_now, self.run = plan, run
        self._known: tuple[Plan, Processor] | None = None

    def look(self) -> tuple[Plan, Processor]:
        """Its plan and what it is."""
        plan = self._plan_of_now()
        if self._known is None or self._known[0] is not plan:
            stages = [_known_stage(member.stage) for member in plan.members]
            does = "; ".join(stage.describe() for stage in stages if not isinstance(stage, Opaque))
            self._known = plan, Processor(plan.members[0].name, does)
        return self._known


def _known_stage(stage: Stage) -> Stage:
    """What is known of a processor that runs as it is."""
    return member_of(stage.processor).stage if isinstance(stage, Opaque) else stage


class _OfRun:
    """The processors for which one was made for a run.

    Args:
        processor: that one.
    """

    def __init__(self, processor: RunProcessor) -> None:
        self._processor = processor
        self._known: tuple[Plan, list[Plan]] | None = None

    def plans(self) -> list[Plan]:
        """A plan for each of them, as they are now."""
        plan = self._processor.plan
        if self._known is None or self._known[0] is not plan:
            members: dict[int, list[Member]] = {}
            for member in plan.members:
                members.setdefault(member.place, []).append(member)
            self._known = plan, [Plan.compile(each) for each in members.values()]
        return self._known[1]

    def singles(self) -> Iterator[_Single]:
        """Each of them by itself."""
        for number in range(len(self.plans())):
            yield _Single(functools.partial(self._plan, number), self._processor.run)

    def _plan(self, number: int) -> Plan:
        return self.plans()[number]


def _as_it_is(processor: Any) -> Iterator[_Single]:
    """A processor of a plain list, or those that stand in it for a run."""
    if isinstance(processor, RunProcessor):
        yield from _OfRun(processor).singles()
    elif isinstance(processor, StagedProcessor) and type(processor).__call__ is StagedProcessor.__call__:
        yield _Single(lambda: processor.plan)
    else:
        plan = Plan.compile([Member(type(processor).__name__, Opaque(processor), processor)])
        yield _Single(lambda: plan)


def _planned(run_list: RunList, processor: Any) -> Iterator[_Single]:
    """The same in an accelerated list, where transformers' own classes are planned too."""
    own = run_list.in_this_run(processor)
    if own is None and isinstance(processor, RunProcessor):
        yield from _OfRun(processor).singles()
    else:
        alone = LogitsProcessorList([processor if own is None else own])
        yield _Single(lambda: alone.plan, run_list.run)


class _OneByOne:
    """Runs the processors of a list one by one, for all that note what they do.

    Args:
        expand: what makes single ones of a processor of the list.
    """

    def __init__(self, expand: Callable[[Any], Iterable[_Single]]) -> None:
        self._expand = expand
        self._known: list[Any] = []
        self._singles: list[_Single] = []
        self.recordings: list[_Recording] = []

    def process(
        self, processors: list[Any], input_ids: torch.Tensor, scores: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The scores after all processors, and a note of what each of them does."""
        if len(processors) != len(self._known) or any(map(is_not, processors, self._known)):
            self._known = processors
            self._singles = [single for each in processors for single in self._expand(each)]
        noted = scores.ndim == 2 and input_ids is not None and input_ids.ndim == 2
        for recording in self.recordings:
            recording.begin(input_ids, scores, noted)
        # Copies: the next processor may write in place, and generate may store its result into the logits.
        stages = [Candidates(scores.detach().clone())] if noted else []
        shown = []
        for single in self._singles:
            plan, processor = single.look()
            scores = plan(input_ids, scores, single.run, kwargs)
            if noted:
                shown.append(processor)
                stages.append(Candidates(scores.detach().clone()))
        if noted:
            for recording in self.recordings:
                recording.note(tuple(shown), stages, input_ids)
        return scores


# -- The notes of one call ----------------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """A token that was drawn from a row."""

    probabilities: tuple[float, ...]
    """Before all processors and after each."""
    moves: tuple[int, ...]
    rank: int | None
    rank_before: int | None


class _Row:
    """What was noted of one row of one step."""

    def __init__(self, processors: tuple[Processor, ...], stages: Sequence[Candidates], row: int, top: int) -> None:
        self.processors, self._stages, self._row = processors, stages, row
        self.candidates = int(stages[0].are[row].sum())
        self.drawn: dict[int, _Drawn] = {}
        found = [
            change_of(number, processor.name, row, stages[0], stages[number], stages[number + 1], top)
            for number, processor in enumerate(processors)
        ]
        self.changes = tuple(change for change, _ in found)
        self._moves = [moves for _, moves in found]
        self.tokens = self._noted(top)
        self.probabilities, self.moves = self._at(self.tokens)

    def _noted(self, top: int) -> tuple[int, ...]:
        """The tokens worth a bar."""
        noted = dict(self._stages[0].likeliest(self._row, top))
        some = max(top // 2, 1)
        for change in self.changes:
            noted |= dict.fromkeys((token for token, _ in change.top_after), 0.0)
            noted |= dict.fromkeys((token for token, _ in change.removed_likeliest[:some]), 0.0)
            noted |= dict.fromkeys((token for token, _, _ in change.moved_most[:some]), 0.0)
        return tuple(noted)

    def _at(self, tokens: Sequence[int]) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[int, ...], ...]]:
        """The probabilities of tokens at each stage, and where they were raised or lowered."""
        at = torch.tensor(tokens, dtype=torch.int64, device=self._stages[0].scores.device)
        probabilities = torch.stack([stage.probabilities[self._row, at] for stage in self._stages]).tolist()
        moves = [(each.raised[at].int() - each.lowered[at].int()).tolist() for each in self._moves]
        return tuple(map(tuple, probabilities)), tuple(map(tuple, moves))

    def draw(self, token: int) -> None:
        """Note that a token was drawn."""
        if token in self.drawn or not 0 <= token < self._stages[0].scores.shape[1]:
            return
        probabilities, moves = self._at([token])
        ranks = (self._stages[-1].rank(self._row, token), self._stages[0].rank(self._row, token))
        self.drawn[token] = _Drawn(tuple(p for (p,) in probabilities), tuple(m for (m,) in moves), *ranks)

    def forget(self) -> None:
        """Let the scores go; what is noted stays."""
        self._stages, self._moves = (), []


class _Noted(NamedTuple):
    """One call of a list of processors."""

    length: int
    """How many tokens each row had."""
    rows: list[_Row]
    by_text: dict[int, list[int]]
    """The rows that have the same text."""


class _Recording:
    """The notes of one list of processors, which serves one run of ``generate``.

    A step belongs to a row of the result if it saw the text that this row begins with. So beams, whose rows change
    places, drafts that are refused, and steps that ``generate`` takes back need nothing of their own.

    Args:
        method: the decoding method.
        model: the model.
        assembled: the arguments by which the list was assembled.
        top: how many likely tokens to note.
    """

    def __init__(self, method: str, model: Any, assembled: dict[str, Any], top: int) -> None:
        self._method, self._model, self._top = method, type(model).__name__, top
        config = assembled.get("generation_config")
        self._ends = _tokens_of(config, "_eos_token_tensor", "eos_token_id")
        self._pads = _tokens_of(config, "_pad_token_tensor", "pad_token_id")
        self._several_ends = "beam" in method  # a beam that ends is never seen again
        self._waiting: deque[_Noted] = deque()
        self._waits = _ROUND_OF_DRAFTS if "assisted" in method else 1
        self._notes: dict[tuple[int, int], tuple[_Noted, list[int]]] = {}
        self._last: torch.Tensor | None = None
        self._prompt_length = 0
        self._has_warned = False

    def begin(self, input_ids: torch.Tensor, scores: torch.Tensor, is_noted: bool) -> None:
        """Be told of a call of the list, before its processors run."""
        if is_noted:
            self._resolve(input_ids)
        elif not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._model} has scores of shape {tuple(scores.shape)}: fastlogits.watch notes those of shape "
                "(B, V), and nothing of these",
                RuntimeWarning,
                stacklevel=2,
            )

    def note(self, processors: tuple[Processor, ...], stages: list[Candidates], input_ids: torch.Tensor) -> None:
        """Note what the processors did: the candidates at first and after each of them."""
        count = min(stages[-1].rows, input_ids.shape[0])
        # Guidance makes one row of two: what it made is compared with the first rows of what it was given.
        stages = [stage if stage.rows == count else stage.first(count) for stage in stages]
        ids = _on_host(input_ids)[:count]
        by_text: dict[int, list[int]] = {}
        for row, text in enumerate(ids):
            by_text.setdefault(_digest(text), []).append(row)
        rows = [_Row(processors, stages, row, self._top) for row in range(count)]
        noted = _Noted(ids.shape[1], rows, by_text)
        for text, same in by_text.items():
            self._notes[noted.length, text] = noted, same
        if self._several_ends:
            for each in rows:
                for token in self._ends:
                    each.draw(token)
        # The shortest: a draft may ask what may follow before the first step.
        self._prompt_length = noted.length if self._last is None else min(self._prompt_length, noted.length)
        self._last = ids
        self._waiting.append(noted)

    def _resolve(self, input_ids: torch.Tensor, ended: bool = False) -> None:
        """Note which tokens were drawn from the rows that wait for it, and let go those that needn't wait."""
        ids = _on_host(input_ids)
        settled = [noted for noted in self._waiting if noted.length < ids.shape[1]]
        for noted in settled:
            for text in ids:
                for row in noted.by_text.get(_digest(text[: noted.length]), ()):
                    noted.rows[row].draw(int(text[noted.length]))
        # Where a text is no longer than the one before, drafts were refused, and what it has is certain.
        rewound = self._waiting and ids.shape[1] <= self._waiting[-1].length
        while self._waiting and (
            ended or len(self._waiting) >= self._waits or (rewound and self._waiting[0].length < ids.shape[1])
        ):
            for each in self._waiting.popleft().rows:
                each.forget()

    def call(self, number: int, output: Any) -> Call | None:
        """What was noted, by the rows of the result; None where no step was."""
        if self._last is None:
            return None
        found = getattr(output, "sequences", output)
        is_result = isinstance(found, torch.Tensor) and found.ndim == 2 and not found.is_floating_point()
        # A call that ended with an error, or whose result is another thing, is known up to its last step.
        ids = _on_host(found) if is_result else self._last
        self._resolve(ids, ended=True)
        start = self._prompt_length
        rows = []
        for row, text in enumerate(ids):
            length = self._length_of(text) + (0 if is_result else 1)
            steps = (self._step(number, row, position, text) for position in range(start, length))
            rows.append(tuple(step for step in steps if step is not None))
        prompts = tuple(tuple(text[:start].tolist()) for text in ids)
        return Call(number, self._model, self._method, prompts, tuple(rows))

    def _length_of(self, text: torch.Tensor) -> int:
        """How many tokens of a row were generated before what fills it up."""
        tokens = text.tolist()
        for position in range(self._prompt_length, len(tokens)):
            if tokens[position] in self._ends:
                return position + 1
        length = len(tokens)
        while length > self._prompt_length and tokens[length - 1] in self._pads:
            length -= 1
        return length

    def _step(self, call: int, row: int, position: int, text: torch.Tensor) -> Step | None:
        noted, same = self._notes.get((position, _digest(text[:position])), (None, []))
        if noted is None:
            return None
        mine = noted.rows[row if row in same else same[0]]
        token = int(text[position]) if position < len(text) else None
        drawn = None if token is None else mine.drawn.get(token)
        tokens, probabilities, moves = mine.tokens, mine.probabilities, mine.moves
        if token is not None and drawn is not None and token not in tokens:
            tokens = (*tokens, token)
            probabilities = tuple((*each, p) for each, p in zip(probabilities, drawn.probabilities, strict=True))
            moves = tuple((*each, move) for each, move in zip(moves, drawn.moves, strict=True))
        return Step(
            call=call,
            row=row,
            number=position - self._prompt_length,
            position=position,
            token=token,
            probability=None if drawn is None else drawn.probabilities[-1],
            probability_before=None if drawn is None else drawn.probabilities[0],
            rank=None if drawn is None else drawn.rank,
            rank_before=None if drawn is None else drawn.rank_before,
            candidates=mine.candidates,
            processors=mine.processors,
            changes=mine.changes,
            tokens=tokens,
            probabilities=probabilities,
            moves=moves,
        )


def _on_host(input_ids: torch.Tensor) -> torch.Tensor:
    return input_ids.detach().to("cpu", torch.int64, copy=True).contiguous()


def _digest(text: torch.Tensor) -> int:
    return hash(text.numpy().tobytes())


def _tokens_of(config: Any, *names: str) -> frozenset[int]:
    """Token ids that a configuration has under one of these names."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, torch.Tensor):
            return frozenset(value.flatten().tolist())
        if value is not None:
            return frozenset([value] if isinstance(value, int) else value)
    return frozenset()
