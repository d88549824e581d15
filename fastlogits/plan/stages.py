"""The algebra: what a processor is, to a plan. A stage holds parameters; it knows no kernel and no scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from fastlogits_kernels.rules import Rule

from fastlogits.checks import is_integer, is_number, one_of, whole_number
from fastlogits.plan.row_values import RowValue
from fastlogits.token_mask import TokenMask, TokenSet, fitted

Kind: TypeAlias = Literal[
    "mask",
    "bias",
    "scale",
    "penalty",
    "clean",
    "truncate",
    "normalise",
    "mix",
    "force",
    "observe",
    "several",
    "opaque",
]


@dataclass(frozen=True)
class When:
    """The calls at which a stage acts: ``start <= index < stop``, at every ``period``-th index from ``start``.

    Args:
        of: what is compared: the ``"step"`` of the run, 0 for its first generated token, or the ``"length"`` of the
            sequence, prompt included.
        start: first index; None for no lower bound.
        stop: the index after the last; None for no upper bound.
        period: with a ``period`` of 2 every other index; reaches below ``start`` where ``start`` is ``phase`` only.
        phase: index from which the period counts.

    Raises:
        ValueError: an argument of another type or out of range.
    """

    of: Literal["step", "length"]
    start: int | None = None
    stop: int | None = None
    period: int = 1
    phase: int = 0

    def __post_init__(self) -> None:
        one_of("of", self.of, ("step", "length"))
        for name in ("start", "stop", "phase"):
            value = getattr(self, name)
            if not is_integer(value) and (value is not None or name == "phase"):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        whole_number("period", self.period, 1)
        if self.start is not None and self.stop is not None and self.stop < self.start:
            raise ValueError(f"stop must be at least start, which is {self.start}, got {self.stop}")

    def describe(self) -> str:
        """In a few words, for ``explain()``."""
        low = "" if self.start is None else f"{self.start} <= "
        high = "" if self.stop is None else f" < {self.stop}"
        if self.start is not None and self.stop == self.start + 1:
            return f"at {self.of} {self.start}"
        period = "" if self.period == 1 else f"at every {self.period}. {self.of} from {self.phase}"
        window = f"while {low}{self.of}{high}" if low or high else ""
        return ", ".join(filter(None, (window, period))) or "always"


# -- Sources: which tokens of a row a stage speaks of -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class History:
    """Tokens of the sequence itself.

    Args:
        span: ``"all"`` of it, its ``"prompt"``, or what was ``"generated"``.
        ignore: number of leading tokens that don't count: an integer, or one for each row ``(B,)``.
    """

    span: Literal["all", "prompt", "generated"] = "all"
    ignore: int | torch.Tensor = 0

    def __post_init__(self) -> None:
        one_of("span", self.span, ("all", "prompt", "generated"))
        if not isinstance(self.ignore, torch.Tensor) and not is_integer(self.ignore):
            raise ValueError(
                f"ignore of a History must be an integer, or a tensor of one for each row, got {self.ignore!r}"
            )

    def describe(self) -> str:
        """In a few words, for ``explain()``."""
        skipped = "" if isinstance(self.ignore, int) and not self.ignore else ", without the first ones"
        return {"all": "the sequence", "prompt": "the prompt", "generated": "the generated text"}[self.span] + skipped


@dataclass(frozen=True, eq=False)
class Given:
    """Tokens of another text.

    Args:
        ids: integer ``(R, L)``, one text for each ``B / R`` neighbouring rows; ids outside the vocabulary don't count.
    """

    ids: torch.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.ids, torch.Tensor):
            raise ValueError(f"ids of a Given must be a tensor of integers of shape (R, L), got {self.ids!r}")

    def describe(self) -> str:
        """In a few words, for ``explain()``."""
        return f"a source of shape {tuple(self.ids.shape)}"


@dataclass(frozen=True, eq=False)
class Repeated:
    """Tokens that would complete an n-gram which the sequence, or another text, already holds.

    Args:
        size: tokens of an n-gram, at least 1.
        text: the text that holds the n-grams; None for the sequence itself.
        span: of the sequence, ``"all"``, or its ``"prompt"``: those n-grams are completed where all that begins them
            was generated.
    """

    size: int
    text: Given | None = None
    span: Literal["all", "prompt"] = "all"

    def __post_init__(self) -> None:
        whole_number("size", self.size, 1)
        one_of("span", self.span, ("all", "prompt"))
        if self.text is not None and not isinstance(self.text, Given):
            raise ValueError(f"text of a Repeated must be a Given or None, got {self.text!r}")

    def describe(self) -> str:
        """In a few words, for ``explain()``."""
        of = History(self.span) if self.text is None else self.text
        return f"{self.size}-grams of {of.describe()}"


Source: TypeAlias = "TokenMask | tuple[int, ...] | History | Given | Repeated"
_ALL_SOURCES = (tuple, TokenMask, History, Given, Repeated)


# -- Stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stage:
    """What one processor does to the logits."""

    kind: ClassVar[Kind]
    """What it may be fused with: stages of kind ``"mask"`` merge; an ``"opaque"`` one is a barrier."""

    @property
    def needs_position(self) -> bool:
        """Whether it asks which step of the run it is in."""
        return False

    @property
    def may_draw(self) -> bool:
        """Whether it takes random numbers, for all that is known."""
        return False

    @property
    def needs_history(self) -> bool:
        """Whether it reads ``input_ids``."""
        return False

    @property
    def keeps_bans(self) -> bool:
        """Whether it leaves a score of -inf as it is, so that a later ban may move before it."""
        return True

    def describe(self) -> str:
        """Its parameters in a few words, for ``explain()``."""
        raise NotImplementedError


class _OfRowValues(Stage):
    """A stage that reads values which torch computes for each row."""

    def _check_value(self, name: str, *others: type) -> None:
        value = getattr(self, name)
        if not isinstance(value, (RowValue, *others)):
            meant = "a RowValue" if not others else "an integer or a RowValue"
            raise ValueError(f"{name} of a {type(self).__name__} must be {meant}, got {value!r}")

    @property
    def values(self) -> tuple[RowValue, ...]:
        """The values that it reads."""
        raise NotImplementedError

    @property
    def needs_position(self) -> bool:
        return any(value.of.positioned for value in self.values)

    @property
    def needs_history(self) -> bool:
        return bool(self.values)


class _OfTokens(Stage):
    """A stage that speaks of some ``tokens``, and may have a gate ``when`` it acts."""

    sources: ClassVar[tuple[type, ...]]
    """What its tokens may be."""
    tokens: Any

    def __post_init__(self) -> None:
        argument, tokens = getattr(self, "argument", "tokens"), self.tokens
        if not isinstance(tokens, self.sources):
            names = ["a tuple of token ids" if each is tuple else f"a {each.__name__}" for each in self.sources]
            meant = ": write tuple(...)" if isinstance(tokens, (list, set, range)) and tuple in self.sources else ""
            raise ValueError(
                f"{argument} of a {type(self).__name__} must be {', '.join(names[:-1])} or {names[-1]}, got a "
                f"{type(tokens).__name__}{meant}"
            )
        if self._gate is not None and isinstance(tokens, (History, Given, Repeated)):
            raise ValueError(f"{argument}: only a mask or token ids can be gated, not {tokens.describe()}")
        wrong = next((t for t in self.tokens if not is_integer(t)), None) if isinstance(self.tokens, tuple) else None
        if wrong is not None:
            raise ValueError(f"{argument} of a {type(self).__name__} must be token ids, got {wrong!r}")

    @property
    def _gate(self) -> When | None:
        return getattr(self, "when", None)

    @property
    def needs_position(self) -> bool:
        asks = isinstance(self.tokens, (History, Repeated)) and self.tokens.span != "all"
        return asks or (self._gate is not None and self._gate.of == "step")

    @property
    def needs_history(self) -> bool:
        return self._gate is not None or isinstance(self.tokens, (History, Repeated))


@dataclass(frozen=True, eq=False)
class Ban(_OfTokens):
    """Tokens that get -inf: always, or while its gate is open.

    Args:
        tokens: the banned tokens.
        when: when the gate is open; None for always.
        blank: tokens that leave the gate open when all tokens generated so far are among them.
        argument: what the processor calls ``tokens``, for error messages.
        lenient: whether ids outside the vocabulary are ignored rather than refused.
        inverted: whether it is all others that are banned.
    """

    kind = "mask"
    sources = _ALL_SOURCES
    tokens: Source
    when: When | None = None
    blank: TokenSet | None = None
    argument: str = "tokens"
    lenient: bool = False
    inverted: bool = False

    def mask(self, vocab_size: int) -> TokenMask:
        """The banned tokens of a vocabulary, where they are a mask or token ids."""
        assert isinstance(self.tokens, (TokenMask, tuple))
        mask = fitted(self.argument, self.tokens, vocab_size, lenient=self.lenient)
        return ~mask if self.inverted else mask

    def describe(self) -> str:
        until = "" if self.blank is None else f", then until a token outside {_words(self.blank)} blank"
        others = "all but " if self.inverted else ""
        return f"ban {others}{_words(self.tokens)} {'always' if self.when is None else self.when.describe()}{until}"


@dataclass(frozen=True, eq=False)
class BanRange(_OfRowValues):
    """Tokens from ``start`` to ``stop``, that excluded, get -inf: in all rows the same, or in each its own.

    Args:
        start: first token, an integer of at least 0, or a value of the row.
        stop: the token after the last; None for the end of the vocabulary. An end outside the vocabulary is moved to
            the nearest one inside; where ``stop`` isn't above ``start``, nothing is banned.
    """

    kind = "mask"
    start: int | RowValue
    stop: int | RowValue | None = None

    def __post_init__(self) -> None:
        self._check_value("start", int)
        self._check_value("stop", int, type(None))

    @property
    def values(self) -> tuple[RowValue, ...]:
        return tuple(end for end in (self.start, self.stop) if isinstance(end, RowValue))

    def describe(self) -> str:
        start, stop = (end.describe() if isinstance(end, RowValue) else end for end in (self.start, self.stop))
        return f"ban tokens from {start} on" + ("" if stop is None else f", below {stop}")


@dataclass(frozen=True, eq=False)
class AllowFrom(Stage):
    """All tokens get -inf but those of a source text, one set per row.

    Args:
        source: token ids ``(L,)`` or ``(R, L)``, padded with -1; or ``"prompt"``, the prompt of the run.
        extra: tokens allowed whatever the source holds.
        eos: tokens that end the text, allowed likewise.
        exclude: tokens of the source that don't count.
        copies: neighbouring rows of the scores that share a row of the source.
    """

    kind = "mask"
    source: torch.Tensor | Literal["prompt"]
    extra: TokenSet
    eos: tuple[int, ...]
    exclude: TokenSet
    copies: int = 1

    @property
    def needs_position(self) -> bool:
        return isinstance(self.source, str)

    @property
    def needs_history(self) -> bool:
        return self.needs_position

    def describe(self) -> str:
        source = "the prompt" if isinstance(self.source, str) else f"a source of shape {tuple(self.source.shape)}"
        return f"allow the tokens of {source}, {_words(self.extra)} extra, {len(self.eos)} to end with"


@dataclass(frozen=True, eq=False)
class Penalize(_OfTokens):
    """Scores of some tokens are divided by the penalty where positive or zero, and multiplied by it where negative."""

    kind = "penalty"
    sources = (History, Given)
    tokens: History | Given
    penalty: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self, "penalty")

    @property
    def keeps_bans(self) -> bool:
        return _keeps_infinity(self.penalty)

    def describe(self) -> str:
        return f"penalise the tokens of {self.tokens.describe()} by {self.penalty:g}"


@dataclass(frozen=True, eq=False)
class Scale(Stage):
    """All scores are divided by the divisor."""

    kind = "scale"
    divisor: float

    def __post_init__(self) -> None:
        _check_number(self, "divisor")

    @property
    def keeps_bans(self) -> bool:
        return _keeps_infinity(self.divisor)

    def describe(self) -> str:
        return f"divide by {self.divisor:g}"


@dataclass(frozen=True, eq=False)
class Bias(_OfTokens):
    """A value is added to the scores of some tokens.

    Args:
        tokens: the tokens.
        value: what is added to each of them.
        counted: what is added to each once for every time that it occurs in ``tokens``, which is a ``History`` then.
        when: when it is added; None for always.
        argument: what the processor calls ``tokens``, for error messages; or ``extra``, where there are some.
        extra: tokens that get ``value`` too, once, whether or not they are among ``tokens``; none with ``counted``.
        rounds_once: whether ``value`` is added as a float32 on a CPU too, where torch may first round it to the dtype
            of the scores.
    """

    kind = "bias"
    sources = _ALL_SOURCES
    tokens: Source
    value: float
    counted: float = 0.0
    when: When | None = None
    argument: str = "tokens"
    extra: tuple[int, ...] = ()
    rounds_once: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("value", "counted"):
            _check_number(self, name)
        if self.counted and (not isinstance(self.tokens, History) or self.extra):
            raise ValueError(
                f"counted must be 0 where {self.argument} aren't a History alone, got {self.counted!r} for "
                f"{_words(self.tokens)}"
            )

    @property
    def keeps_bans(self) -> bool:
        return all(value < math.inf for value in (self.value, self.counted))

    def describe(self) -> str:
        counted = f", {self.counted:+g} for each occurrence" if self.counted else ""
        when = "" if self.when is None else f" {self.when.describe()}"
        extra = f" and {_words(self.extra)}" if self.extra else ""
        return f"add {self.value:+g}{counted} to {_words(self.tokens)}{extra}{when}"


@dataclass(frozen=True, eq=False)
class RowBias(_OfRowValues):
    """A value of its own is added to the scores of some tokens of each row; -0.0 adds nothing.

    Args:
        tokens: the tokens.
        value: what is added to each of them.
        argument: what the processor calls ``tokens``, for error messages.
    """

    kind = "bias"
    tokens: tuple[int, ...]
    value: RowValue
    argument: str = "tokens"

    def __post_init__(self) -> None:
        self._check_value("value")

    @property
    def values(self) -> tuple[RowValue, ...]:
        return (self.value,)

    @property
    def keeps_bans(self) -> bool:
        return False  # the value may be infinite

    def describe(self) -> str:
        return f"add {self.value.describe()} to {_words(self.tokens)}"


@dataclass(frozen=True, eq=False)
class SequenceBias(Stage):
    """A value is added to the last token of each sequence whose other tokens end the history.

    Args:
        sequences: token ids of each sequence, with its value; one of a single token always counts. A token that ends
            several sequences gets their sum, added up in the order of the sequences, shorter prefixes that came first.
    """

    kind = "bias"
    sequences: tuple[tuple[tuple[int, ...], float], ...]

    def outside(self, vocab_size: int) -> list[int]:
        """The token ids that a vocabulary of such a size lacks.

        Before the end of a sequence a negative id is one that no history has, as those of other ranks' parts.
        """
        ends = {ids[-1] for ids, _ in self.sequences if ids[-1] < 0}
        return sorted(ends | {token for ids, _ in self.sequences for token in ids if token >= vocab_size})

    @property
    def needs_history(self) -> bool:
        return any(len(ids) > 1 for ids, _ in self.sequences)

    @property
    def keeps_bans(self) -> bool:
        return all(value < math.inf for _, value in self.sequences)

    def describe(self) -> str:
        values = {value for _, value in self.sequences}
        value = f"{values.pop():+g}" if len(values) == 1 else "a value each"
        return f"add {value} to the ends of {len(self.sequences)} sequences"


@dataclass(frozen=True, eq=False)
class LowerRepetitions(Stage):
    """Tokens that would extend a repetition are lowered: those that follow where the sequence's end occurs before.

    Args:
        penalties: of matches of 0, 1, ... tokens, each no lower than the one before; longer ones get the last.
        breakers: tokens that no match holds, and that get no penalty.
        range_: how many of the last tokens are looked at, at least 1; None for all.
    """

    kind = "bias"
    penalties: tuple[float, ...]
    breakers: TokenSet
    range_: int | None = None

    @property
    def needs_history(self) -> bool:
        return True

    def describe(self) -> str:
        shortest = next((n for n, penalty in enumerate(self.penalties) if penalty), None)
        if shortest is None:
            return "lower no repetitions"
        within = "" if self.range_ is None else f" of the last {self.range_}"
        most = len(self.penalties) - 1
        return (
            f"lower what follows the last {shortest} or more tokens elsewhere{within}, by {self.penalties[shortest]:g}"
            f" to {self.penalties[-1]:g} for {most}"
        )


@dataclass(frozen=True, eq=False)
class Decay(Stage):
    """Scores of the tokens that end the text grow by ``|score| * (factor ** (length - start) - 1)`` beyond ``start``.

    Args:
        tokens: tokens that end the text.
        start: length from which on they grow.
        factor: growth per token.
    """

    kind = "bias"
    tokens: tuple[int, ...]
    start: int
    factor: float

    @property
    def needs_history(self) -> bool:
        return True

    def describe(self) -> str:
        return f"raise {_words(self.tokens)} by a factor of {self.factor:g} a token while length > {self.start}"


@dataclass(frozen=True, eq=False)
class Force(_OfTokens):
    """While its gate is open some tokens get 0 and all others -inf.

    Args:
        tokens: the tokens that get 0; negative ids count from the end of the vocabulary, as in transformers.
        when: when the gate is open.
        argument: what the processor calls ``tokens``, for error messages.
    """

    kind = "force"
    sources = (tuple, TokenMask)
    tokens: TokenSet
    when: When
    argument: str = "tokens"

    @property
    def keeps_bans(self) -> bool:
        return False

    def describe(self) -> str:
        return f"force {_words(self.tokens)} {self.when.describe()}"


@dataclass(frozen=True, eq=False)
class ForceRows(_OfRowValues):
    """In rows whose value isn't 0 some tokens get 0 and all others -inf.

    Args:
        tokens: the tokens that get 0.
        condition: the value.
        argument: what the processor calls ``tokens``, for error messages.
    """

    kind = "force"
    tokens: tuple[int, ...]
    condition: RowValue
    argument: str = "tokens"

    def __post_init__(self) -> None:
        self._check_value("condition")

    @property
    def values(self) -> tuple[RowValue, ...]:
        return (self.condition,)

    @property
    def keeps_bans(self) -> bool:
        return False

    def describe(self) -> str:
        return f"force {_words(self.tokens)} {self.condition.describe()}"


@dataclass(frozen=True, eq=False)
class Clean(Stage):
    """NaN becomes 0, infinities become the largest finite values of their sign."""

    kind = "clean"

    @property
    def keeps_bans(self) -> bool:
        return False

    def describe(self) -> str:
        return "replace NaN and infinities"


@dataclass(frozen=True, eq=False)
class Mix(Stage):
    """Conditional and unconditional scores become one: ``(c - u) * scale + u``, ``[2 * B, V]`` in and ``[B, V]`` out.

    Args:
        scale: weight of the conditional scores, which are the first half of the rows.
    """

    kind = "mix"
    scale: float

    @property
    def needs_history(self) -> bool:
        return True  # how many rows it has

    @property
    def keeps_bans(self) -> bool:
        return False

    def describe(self) -> str:
        return f"conditional and unconditional halves, scale {self.scale:g}"


@dataclass(frozen=True, eq=False)
class Truncate(Stage):
    """Tokens outside a set of likely ones get a fill value: rules in order, each on what the one before has left."""

    kind = "truncate"
    rules: tuple[Rule, ...]

    def describe(self) -> str:
        return ", then ".join(rule.describe() for rule in self.rules)


@dataclass(frozen=True, eq=False)
class Rows(Stage):
    """A function of whole rows, in torch: what needs sums or maxima over the vocabulary, or mixes rows.

    The function takes ``(input_ids, scores)``, and the integers or tensors ``(cache_position, prompt_length)`` too
    where ``positioned``. It returns new scores, never writes what it is given, and never waits for the device.
    One that carries something from call to call gets the ``run`` too, to which that belongs. One that ``draws`` gets
    ``(input_ids, scores, numbers)``, a random number for each row, and is not ``positioned``.

    Args:
        acts_as: the kind of stage that it is.
        function: the function.
        description: its parameters in a few words.
        positioned: whether it asks which step of the run it is in.
        reads_history: whether it reads ``input_ids``.
        keeps_notes: whether it carries something from call to call; of functions that are ``positioned``.
        rehearse: what launches the kernels that the function launches for ``scores``, and touches nothing that the
            function carries on; None where it launches none of ours.
        draws: whether it takes a random number for each row.
        generator: whose number that is, but where a sampler's seeds decide; None for torch's own.
    """

    kind = "normalise"
    acts_as: Kind
    function: Callable[..., torch.Tensor]
    description: str
    positioned: bool = False
    reads_history: bool = True
    keeps_notes: bool = False
    rehearse: Callable[[torch.Tensor], torch.Tensor] | None = None
    draws: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        one_of("acts_as", self.acts_as, get_args(Kind))

    @property
    def may_draw(self) -> bool:
        return self.draws

    @property
    def needs_position(self) -> bool:
        return self.positioned

    @property
    def needs_history(self) -> bool:
        return self.reads_history or self.positioned

    def describe(self) -> str:
        return self.description


class Normalise(Rows):
    """The logarithms of each row's probabilities."""


@dataclass(frozen=True, eq=False)
class Observe(Stage):
    """A look at the scores of one call of a run, which leaves them as they are; other calls don't know of it.

    Args:
        function: takes ``(input_ids, scores)``.
        length: number of tokens in the ``input_ids`` of the call.
        description: what it notes, in a few words.
    """

    kind = "observe"
    function: Callable[[torch.Tensor, torch.Tensor], None]
    length: int
    description: str

    @property
    def needs_history(self) -> bool:
        return True

    def describe(self) -> str:
        return self.description


@dataclass(frozen=True, eq=False)
class Several(Stage):
    """What a processor does that is several stages, one after the other. The plan sees each of them by itself.

    Args:
        stages: the stages; none of them is a ``Several``.
    """

    kind = "several"
    stages: tuple[Stage, ...]

    @property
    def needs_position(self) -> bool:
        return any(stage.needs_position for stage in self.stages)

    @property
    def needs_history(self) -> bool:
        return any(stage.needs_history for stage in self.stages)

    @property
    def keeps_bans(self) -> bool:
        return all(stage.keeps_bans for stage in self.stages)

    def describe(self) -> str:
        return "; ".join(stage.describe() for stage in self.stages)


@dataclass(frozen=True, eq=False)
class Opaque(Stage):
    """A processor that says nothing of itself: it runs as it is, in its place."""

    kind = "opaque"
    processor: Any

    @property
    def may_draw(self) -> bool:
        return True

    def describe(self) -> str:
        return "unknown to fastlogits: runs as it is"


def _check_number(stage: Stage, name: str) -> None:
    value = getattr(stage, name)
    if not is_number(value):
        raise ValueError(f"{name} of a {type(stage).__name__} must be a number, got {value!r}")


def _keeps_infinity(factor: float) -> bool:
    """Whether -inf stays what it is, divided or multiplied by a factor."""
    return 0 < factor < math.inf


def _words(source: Source) -> str:
    if not isinstance(source, (TokenMask, tuple)):
        return source.describe()
    of = f" of {source.vocab_size}" if isinstance(source, TokenMask) else ""
    return f"{len(source)}{of} {'token' if len(source) == 1 and not of else 'tokens'}"


class Member(NamedTuple):
    """One processor of a plan, or one stage of a processor that has several."""

    name: str
    """Its class name, for people."""
    stage: Stage
    original: Callable[..., torch.Tensor] | None = None
    """transformers' own implementation, for what the plan doesn't take; None where there is none."""
    is_first: bool = True
    """Whether it is the whole processor, or its first stage."""
    place: int = 0
    """Which processor of the plan it is."""

    def expanded(self) -> list[Member]:
        """One member for each stage."""
        return [self._replace(stage=stage, is_first=number == 0) for number, stage in enumerate(stages_of(self.stage))]


def stages_of(stage: Stage) -> tuple[Stage, ...]:
    """The stages that a stage stands for: several, or itself."""
    return stage.stages if isinstance(stage, Several) else (stage,)


def values_of(stage: Stage) -> tuple[RowValue, ...]:
    """The values of each row that a stage reads."""
    return stage.values if isinstance(stage, _OfRowValues) else ()


def values_keep_notes(stage: Stage) -> bool:
    """Whether a value of each row that a stage reads carries something from call to call."""
    return any(value.of.keeps_notes for value in values_of(stage))


def has_row_values(stage: Stage) -> bool:
    """Whether a stage was made with a value for each row of a batch."""
    if isinstance(stage, Truncate):
        return any(isinstance(rule.value, torch.Tensor) for rule in stage.rules)
    if isinstance(stage, AllowFrom):
        return isinstance(stage.source, torch.Tensor) and stage.source.shape[0] != 1
    source = getattr(stage, "tokens", None)
    if isinstance(source, Repeated):
        source = source.text
    if isinstance(source, Given):
        return source.ids.shape[0] != 1
    return isinstance(source, History) and isinstance(source.ignore, torch.Tensor)
