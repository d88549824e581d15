"""Keep a set of likely tokens in each row and write a fill value everywhere else: where this picks its backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlogits_kernels.rules import CODES, RULES, TIES, Rule, check_rules
from fastlogits_kernels.runtime.backend import has_gradient, wanted_on
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.truncate.cpu import truncate_rows
from fastlogits_kernels.truncate.reference import reference_truncate

_NAMES = tuple(RULES)


def _truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    check_rules(scores, rules)
    if not rules or not scores.numel():
        return scores.clone(memory_format=torch.contiguous_format)
    if scores.is_cuda or wanted_on(scores.device):
        from fastlogits_kernels.selection import launch  # which truncates by this where there is no GPU

        if launch.takes_rules(rules) and launch.takes_scores(scores):
            return launch.select(scores, launch.Selection(rules, scores.shape[1], scores.device))
    return (truncate_rows if scores.device.type == "cpu" else reference_truncate)(scores, rules).contiguous()


def _flattened(rules: Sequence[Rule]) -> list[list[Any]]:
    """Rules as the arguments of the operation: kinds, values, values per row and the other fields."""
    per_row = [rule.value if isinstance(rule.value, torch.Tensor) else None for rule in rules]
    values = [0.0 if isinstance(rule.value, torch.Tensor) else float(rule.value) for rule in rules]
    kinds = [CODES[rule.kind] for rule in rules]
    ties = [TIES.index(rule.ties) for rule in rules]
    keep, fill = [rule.min_tokens_to_keep for rule in rules], [rule.filter_value for rule in rules]
    return [kinds, values, per_row, keep, fill, ties]


def _run(
    scores: torch.Tensor,
    kinds: Sequence[int],
    values: Sequence[float],
    per_row: Sequence[torch.Tensor | None],
    *columns: Sequence[Any],
) -> torch.Tensor:
    each_value = [value if row is None else row for value, row in zip(values, per_row, strict=True)]
    return _truncate(
        scores,
        [
            Rule(_NAMES[kind], value, keep, fill, TIES[ties])
            for kind, value, keep, fill, ties in zip(kinds, each_value, *columns, strict=True)
        ],
    )


register(
    "truncate(Tensor scores, int[] kinds, float[] values, Tensor?[] per_row, int[] min_tokens_to_keep, "
    "float[] filter_values, int[] ties) -> Tensor",
    _run,
    lambda scores, *_: scores.new_empty(scores.shape),
)


def truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """``scores`` ``[B, V]`` with the tokens that a rule drops at its fill value, as a new contiguous tensor.

    Args:
        scores: float32, float16, bfloat16 or float64, any strides; never written.
        rules: applied in order, each to what the one before has left.

    Raises:
        ValueError: values per row that don't fit the scores, or, on the CPU, that are out of range.
    """
    if torch.compiler.is_compiling() and not has_gradient(scores):
        return torch.ops.fastlogits.truncate(scores, *_flattened(rules))  # type: ignore[no-any-return]
    return _truncate(scores, rules)
