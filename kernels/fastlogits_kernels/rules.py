"""The rules of truncation: one row of a table for each, from which everything else derives.

A row says what the rule is called, which values it takes, what it needs to know of a row of logits, and what it drops.
Validation, the order of each stack, the records of serving, the CPU path, the kernels and their compile-time checks,
and the tests read it from here. To add a rule: a row, its functions in ``truncate/reference.py``, and on the device one
branch of ``selection.row.cutoff`` where it drops what is below a cut-off. A rule that keeps the most likely tokens up
to a new goal needs that goal in ``selection.bounds``, ``selection.goals`` and both refinements. A kernel
without the branch fails to compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from fastlogits_kernels.runtime.rows import HOW_TO_REPEAT
from fastlogits_kernels.truncate import reference

RuleKind: TypeAlias = str
"""The name of a rule: a key of ``RULES``."""
Ties: TypeAlias = Literal["all", "lowest"]
Order: TypeAlias = Literal["transformers", "vllm", "sglang"]
TIES: tuple[Ties, ...] = ("all", "lowest")
TINY_TEMPERATURE = 1e-30
"""Of a lower temperature a row is greedy: what it divides could overflow."""

_INFINITY = math.inf


class Range(NamedTuple):
    """The values with which a rule acts."""

    low: float
    high: float
    inside: Literal["low", "high", "neither"]
    """Which of the two ends belongs to them."""
    off: float
    """The value that turns the rule off."""
    words: str

    def has(self, value: Any) -> Any:
        """Whether a value is in the range, or which of a tensor's are; NaN never is."""
        above = value >= self.low if self.inside == "low" else value > self.low
        return above & (value <= self.high if self.inside == "high" else value < self.high)


Goal: TypeAlias = Literal["none", "count", "mass", "distance", "entropy"]


@dataclass(frozen=True)
class RuleSpec:
    """A row of the table.

    Args:
        name: of the rule.
        range: the values with which it acts, in a tensor of one for each row.
        drop: what it drops of whole rows: ``(scores [B, V], value, rule) -> bool [B, V]``. The reference.
        goal: it keeps the most likely tokens up to a ``"count"``, a ``"mass"``, a mass of those nearest to the entropy
            (``"distance"``), or a share of the ``"entropy"`` of the first hundred; ``"none"``: what is below a cut-off
            goes.
        limit: of a rule with a cut-off, the scores below which it drops: ``(scores, value) -> [B, 1]``.
        sums: which sums over the row it needs: 1 for its mass, 2 for its entropy too, 3 for its deviation too.
        argument: what people call its parameter; by default the name.
        integer: whether the parameter is an integer.
        takes_ties: whether it knows a choice among tokens that tie at its cut-off.
        spares_fewest: whether ``min_tokens_to_keep`` is a number of tokens, rather than all that tie with the last.
        off_as_number: whether the range's off-value turns it off as a number too.
        keeps_nearly_all: whether a value drops next to nothing, where all depends on how the smallest probabilities
            are rounded: such a rule is left to torch.
    """

    name: RuleKind
    range: Range
    drop: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    goal: Goal = "none"
    limit: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    sums: int = 0
    argument: str = ""
    integer: bool = False
    takes_ties: bool = False
    spares_fewest: bool = False
    off_as_number: bool = True
    keeps_nearly_all: Callable[[float], bool] = lambda value: False


_ABOVE_0 = Range(0, 1, "neither", 1, "above 0 and at most 1 (1 turns it off)")
_BELOW_1 = Range(0, 1, "neither", 0, "at least 0 and below 1 (0 turns it off)")
_FROM_0 = Range(0, 1, "high", 0, "between 0 and 1 (0 turns it off)")

_TABLE = (
    RuleSpec(
        "top_n_sigma", Range(0, _INFINITY, "neither", _INFINITY, "above 0 (inf turns it off)"),
        reference.drop_top_n_sigma, limit=reference.limit_top_n_sigma, sums=3,
    ),
    RuleSpec("top_h", _ABOVE_0, reference.drop_top_h, "entropy", off_as_number=False),
    RuleSpec(
        "top_k", Range(1, _INFINITY, "low", _INFINITY, "at least 1 (V or more turns it off)"),
        reference.drop_top_k, "count", integer=True, takes_ties=True,
    ),
    RuleSpec(
        "top_p", Range(0, 1, "low", 1, "between 0 and 1 (1 turns it off)"), reference.drop_top_p, "mass", sums=1,
        takes_ties=True, spares_fewest=True, off_as_number=False, keeps_nearly_all=lambda value: value > 1 - 1e-6,
    ),
    RuleSpec(
        "min_p", _FROM_0, reference.drop_min_p, limit=reference.limit_min_p, spares_fewest=True,
        keeps_nearly_all=lambda value: value < 1e-30,
    ),
    RuleSpec(
        "top_a", _FROM_0, reference.drop_top_a, limit=reference.limit_top_a, sums=1,
        keeps_nearly_all=lambda value: value < 1e-30,
    ),
    RuleSpec("typical", _ABOVE_0, reference.drop_typical, "distance", sums=2, argument="typical_p"),
    RuleSpec("epsilon", _BELOW_1, reference.drop_epsilon, limit=reference.limit_epsilon, sums=1),
    RuleSpec("eta", _BELOW_1, reference.drop_eta, limit=reference.limit_eta, sums=2),
)  # fmt: skip

RULES: dict[RuleKind, RuleSpec] = {spec.name: spec for spec in _TABLE}
"""All rules by name, in the order in which transformers lets them act."""
CODES: dict[RuleKind, int] = {name: code for code, name in enumerate(RULES)}
"""The number of each rule on the device."""

# The rules that a stack puts in another order come first; the others follow as in the table.
_FIRST: dict[Order, tuple[RuleKind, ...]] = {
    "transformers": (),
    "vllm": ("top_n_sigma", "min_p", "top_k", "top_p"),
    "sglang": ("top_n_sigma", "top_p", "top_k", "min_p"),
}
ORDERS: dict[Order, tuple[RuleKind, ...]] = {
    stack: (*first, *(name for name in RULES if name not in first)) for stack, first in _FIRST.items()
}
"""In which order the rules act, by the stack that has it."""


class Rule(NamedTuple):
    """One truncation: what it keeps of the tokens that the rule before it has left."""

    kind: RuleKind
    value: float | torch.Tensor
    """k, or the parameter that the rule is named for: a number, or one for each row ``(B,)`` on the scores' device.

    Such a tensor is float32, or int32 or int64 for ``top_k``. A row whose value is out of the rule's range (see
    ``RULES``) is left as it is. The off-value turns a rule off. What lies beyond range and off-value, or is NaN, is
    refused where the tensor is on the CPU; on a device nothing can be raised without waiting for it, and the row is
    left as it is. A number has the meaning that transformers gives it: ``top_p`` 1.0 then drops tokens whose mass
    rounds to nothing, and ``top_h`` 1.0 all but the 100 most likely.
    """
    min_tokens_to_keep: int = 1
    filter_value: float = -_INFINITY
    ties: Ties = "all"
    """Which tokens that tie at the cut-off are kept.

    With ``"all"`` ``top_k`` keeps all of them, and ``top_p`` as many as it takes, those with the largest ids. With
    ``"lowest"`` both keep as many as it takes, those with the lowest ids, so ``top_k`` exactly k; tokens at -inf don't
    count, and stay where the cut-off is -inf. The other rules know no such choice.
    """

    @property
    def spec(self) -> RuleSpec:
        """Its row of the table."""
        return RULES[self.kind]

    def describe(self) -> str:
        """In a few words."""
        value = "per row" if isinstance(self.value, torch.Tensor) else f"{self.value:g}"
        ties = ", lowest ids first" if self.ties == "lowest" and self.spec.takes_ties else ""
        return f"{self.kind.replace('_', '-')} {value}{ties}"


def argument_of(kind: RuleKind) -> str:
    """What people call the parameter of a rule."""
    return RULES[kind].argument or kind


def is_idle(rule: Rule, V: int) -> bool:
    """Whether a rule of one parameter for all rows drops nothing of a vocabulary."""
    value, spec = rule.value, rule.spec
    if isinstance(value, torch.Tensor):
        return False
    return bool(value == spec.range.off and spec.off_as_number) or (spec.goal == "count" and value >= V)


def check_row_values(kind: RuleKind, value: torch.Tensor) -> None:
    """Refuse what can't be the value of a rule for each row.

    Raises:
        ValueError: not of shape ``(B,)``, of another dtype than ``Rule`` asks for, or, where the tensor is on the CPU,
            a value out of range.
    """
    name, spec = argument_of(kind), RULES[kind]
    if value.ndim != 1:
        raise ValueError(f"{name} must be a number or a tensor of shape (B,), got one of shape {tuple(value.shape)}")
    allowed = (torch.int32, torch.int64) if spec.integer else (torch.float32,)
    if value.dtype not in allowed:
        one_of = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must be of {one_of} where it is given for each row, got {value.dtype}")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        refused = ~(spec.range.has(value) | (value == spec.range.off))
        if bool(refused.any()):
            row = int(refused.int().argmax())
            raise ValueError(f"{name} must be {spec.range.words}, got {value[row].item():g} in row {row}")


def check_rules(scores: torch.Tensor, rules: Sequence[Rule]) -> None:
    """Refuse values per row that don't fit the scores ``[B, V]``.

    Raises:
        ValueError: see ``check_row_values``; or another number of rows, or another device.
    """
    for rule in rules:
        value = rule.value
        if isinstance(value, torch.Tensor):
            check_row_values(rule.kind, value)
            name = argument_of(rule.kind)
            if len(value) != len(scores):
                raise ValueError(
                    f"{name} must be a number, or have a value for each of the {len(scores)} rows of scores, got "
                    f"{len(value)} values; {HOW_TO_REPEAT}"
                )
            if value.device != scores.device:
                raise ValueError(
                    f"{name} must be on {scores.device}, as scores are, got {value.device}; move it there once, with "
                    ".to(scores.device)"
                )
