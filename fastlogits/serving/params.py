"""The parameters of one request, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from fastlogits_kernels.rules import RULES, Range, RuleKind, argument_of
from fastlogits_kernels.serving import layout

from fastlogits.checks import finite_number, is_integer, is_number, one_of, suggests_fields, whole_number
from fastlogits.representation import arguments, set_fields
from fastlogits.token_mask import TokenMask, checked_set

Scope: TypeAlias = Literal["all", "output"]
"""The tokens that a penalty counts: prompt and output, or the output alone."""

_LARGEST_BASE = torch.finfo(torch.float64).max ** (1 / layout.LONGEST)
_LARGEST = torch.finfo(torch.float32).max


class Biases(Mapping[int, float]):
    """Numbers for token ids, which nobody changes.

    Args:
        of: the numbers.
    """

    def __init__(self, of: Mapping[int, float]) -> None:
        self._of = dict(of)

    def __getitem__(self, token: int) -> float:
        return self._of[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __hash__(self) -> int:
        return hash(frozenset(self._of.items()))

    def __repr__(self) -> str:
        return repr(self._of)


_NO_BIASES = Biases({})


@suggests_fields
@dataclass(frozen=True)
class RequestParams:
    """The parameters of one request; each is off by default. Immutable, and checked when it is made.

    Add one object for many requests where you can: a batch keeps its packed form with it, which saves host time.

    Args:
        temperature: the divisor of the logits, finite and at least 0. 0 is greedy: the request gets its largest logit
            after penalties and masks, whatever the truncations.
        top_k: at least 1; None, 0 or -1 for off, all three kept as None. What this and the other truncations keep is
            said at the warpers of their names.
        top_p: between 0 and 1; 1 or None for off.
        min_p: between 0 and 1; 0 or None for off.
        typical_p: above 0 and at most 1; 1 or None for off.
        epsilon: at least 0 and below 1; 0 or None for off.
        eta: at least 0 and below 1; 0 or None for off.
        top_n_sigma: above 0; inf or None for off.
        top_h: above 0 and at most 1; 1 or None for off.
        top_a: between 0 and 1; 0 or None for off.
        repetition_penalty: above 0 and finite; 1 is off.
        presence_penalty: finite, subtracted from the logit of each token that has occurred; 0 is off.
        frequency_penalty: finite, subtracted once for each time that the token has occurred; 0 is off.
        repetition_scope: the tokens that the repetition penalty counts: ``"all"`` for prompt and output, or only the
            ``"output"``. None follows the semantics of the batch.
        presence_scope: the same for the presence and frequency penalties.
        dry_multiplier: see ``DRYLogitsProcessor``; 0 is off.
        dry_base: see ``DRYLogitsProcessor``.
        dry_allowed_length: see ``DRYLogitsProcessor``.
        dry_breakers: see ``DRYLogitsProcessor``; a ``TokenMask`` or token ids.
        logit_bias: finite or -inf, added to the logits of these token ids. An id may be text of digits, as in OpenAI's
            interface.
        allowed_token_ids: the only allowed tokens, a ``TokenMask`` or token ids; None for all.
        banned_token_ids: tokens that are never allowed, a ``TokenMask`` or token ids.
        bad_words: sequences of token ids, none empty. The last token of a sequence is banned if the others precede it.
        no_repeat_ngram_size: no n-gram of so many tokens may occur twice; 0 is off.
        min_tokens: the ``stop_token_ids`` are banned for so many output tokens.
        stop_token_ids: token ids that end the text.
        first_tokens_suppressed: tokens that are banned at the beginning of the output, a ``TokenMask`` or token ids.
        first_window: how many output tokens that beginning has, at least 1.
        forced_tokens: the first output tokens, which nothing else changes.
        bitmask: None obeys the bitmask of a step if there is one; True requires one, so that a step without is an
            error; False obeys none.
        seed: an integer of up to 64 bits; None for a random one when the request is added.
        logprobs: for how many of the most likely tokens log-probabilities are wanted, besides that of the sampled
            token; None for none at all.

    Numbers may be numpy's scalars, or tensors of no dimension on the CPU; they are kept as Python's.

    Raises:
        ValueError: an argument out of range or of a wrong type; its message names it.

    Example:
        >>> RequestParams(temperature=0.7, top_p=1.5)
        Traceback (most recent call last):
        ValueError: top_p must be between 0 and 1 (1 turns it off), got 1.5
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon: float | None = None
    eta: float | None = None
    top_n_sigma: float | None = None
    top_h: float | None = None
    top_a: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_scope: Scope | None = None
    presence_scope: Scope | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breakers: TokenMask | Sequence[int] = ()
    logit_bias: Mapping[int, float] | Mapping[str, float] = _NO_BIASES
    allowed_token_ids: TokenMask | Sequence[int] | None = None
    banned_token_ids: TokenMask | Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    first_tokens_suppressed: TokenMask | Sequence[int] = ()
    first_window: int = 1
    forced_tokens: Sequence[int] = ()
    bitmask: bool | None = None
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        given = self.__dict__
        for name, default, check in _CHECKED:
            value = given[name]
            if value is not default:
                if isinstance(value, torch.Tensor) and not value.ndim and value.device.type == "cpu":
                    value = value.item()
                given[name] = check(name, value)

    def __repr__(self) -> str:
        return f"RequestParams({arguments(set_fields(self))})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _single(value: float) -> float:
    """A number in float32, as a slot holds it. Rounding may move it out of its range."""
    return c_float(value).value if abs(value) <= _LARGEST else math.nan


def _python(value: Any) -> float | None:
    """A number as Python's; None for anything else."""
    if type(value) in (float, int):
        return value  # type: ignore[no-any-return]
    return float(value) if is_number(value) else None


def _check_number(name: str, value: Any, least: float = -_LARGEST) -> float:
    number = _python(value)  # first: numpy's own smaller floats overflow where they are compared
    return finite_number(name, value if number is None else number, least, _LARGEST)


def _is_in(bounds: Range, value: float) -> bool:
    return value == bounds.off or bool(bounds.has(value))


def _check_rule(name: str, value: Any, kind: RuleKind) -> float:
    bounds = RULES[kind].range
    number = _python(value)
    # Rounding to float32 may move it out of the range.
    if number is None or not _is_in(bounds, number) or not (number == bounds.off or _is_in(bounds, _single(number))):
        raise ValueError(f"{name} must be {bounds.words}, got {value!r}")
    return number


def _check_top_k(name: str, value: Any) -> int | None:
    if not is_integer(value) or value < -1:
        raise ValueError(f"{name} must be an integer of at least 1 (None, 0 or -1 turns it off), got {value!r}")
    return int(value) if value > 0 else None


def _check_repetition(name: str, value: Any) -> float:
    number = _check_number(name, value, 0)
    if _single(number) == 0:
        raise ValueError(f"{name} must be above 0 (1 turns it off), got {value!r}")
    return number


def _check_scope(name: str, value: Any) -> Any:
    one_of(name, value, (*get_args(Scope), None))
    return value


def _check_base(name: str, value: Any) -> float:
    number = _check_number(name, value, 1)
    if number > _LARGEST_BASE:
        raise ValueError(f"{name} must have a finite {layout.LONGEST}th power, got {value!r}")
    return number


def _check_mask_choice(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True, False or None (to obey a bitmask where there is one), got {value!r}")
    return None if value is None else bool(value)


def _sequence(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (list, tuple, Iterable)):
        raise ValueError(f"{name} must be token ids, got {ids!r}")
    found = tuple(ids)
    if not found or (set(map(type, found)) == {int} and min(found) >= 0):
        return found
    for token in found:
        if not is_integer(token) or token < 0:
            raise ValueError(f"{name} must be token ids of at least 0, got {token!r} among them")
    return tuple(map(int, found))


def _check_words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be sequences of token ids, got {value!r}")
    sequences = tuple(_sequence(name, each) for each in value)
    if not all(sequences):
        raise ValueError(f"{name} must be sequences of at least one token id, got an empty one among them")
    return sequences


def _check_bias(name: str, value: Any) -> Biases:
    if isinstance(value, Biases):
        return value
    if not isinstance(value, (dict, Mapping)):
        raise ValueError(f"{name} must be a mapping from token ids to numbers, got {value!r}")
    ids = _sequence(name, [int(key) if isinstance(key, str) and key.isdecimal() else key for key in value])
    biases: dict[int, float] = {}
    for token, bias in zip(ids, value.values(), strict=True):
        number = _python(bias)
        if number is None or not (number == -math.inf or abs(number) <= _LARGEST):
            raise ValueError(f"{name} must be finite numbers or -inf, got {bias!r} for token {token}")
        if token in biases:
            raise ValueError(f"{name} must have each token id once, got {token} as a number and as a text")
        biases[token] = number
    return Biases(biases)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": partial(_check_number, least=0),
    **{argument_of(kind): partial(_check_rule, kind=kind) for kind in layout.RULE_KINDS},
    "top_k": _check_top_k,
    "repetition_penalty": _check_repetition,
    "presence_penalty": _check_number,
    "frequency_penalty": _check_number,
    "repetition_scope": _check_scope,
    "presence_scope": _check_scope,
    "dry_multiplier": partial(_check_number, least=0),
    "dry_base": _check_base,
    "dry_allowed_length": whole_number,
    "dry_breakers": checked_set,
    "logit_bias": _check_bias,
    "allowed_token_ids": checked_set,
    "banned_token_ids": checked_set,
    "bad_words": _check_words,
    "no_repeat_ngram_size": whole_number,
    "min_tokens": whole_number,
    "stop_token_ids": lambda name, value: tuple(checked_set(name, value)),
    "first_tokens_suppressed": checked_set,
    "first_window": partial(whole_number, low=1),
    "forced_tokens": _sequence,
    "bitmask": _check_mask_choice,
    "seed": partial(whole_number, low=-(2**63), high=2**64 - 1),
    "logprobs": whole_number,
}
# A default needs no check, and most parameters of most requests are defaults.
_CHECKED = [(each.name, each.default, _CHECKS[each.name]) for each in fields(RequestParams)]
