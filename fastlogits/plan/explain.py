"""A plan for people: its parts, what fused with what and why, what a GPU has to do for it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlogits.checks import is_integer, is_number
from fastlogits.plan.part import AnyPlan, Part
from fastlogits.plan.stages import Rows


class Line(NamedTuple):
    """What one processor does in a plan."""

    processor: str
    kind: str
    does: str


class PartText(NamedTuple):
    """One part of a plan."""

    name: str
    lines: tuple[Line, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


class Explanation(str):
    """A plan as text; a notebook shows it as a table.

    Args:
        heading: how many processors and parts there are.
        parts: the parts.
        gpu: what happens on a GPU, a line each.
    """

    heading: str
    parts: tuple[PartText, ...]
    gpu: tuple[str, ...]

    def __new__(cls, heading: str, parts: Sequence[PartText], gpu: Sequence[str]) -> Explanation:
        """Set the text."""
        made = super().__new__(cls, _text(heading, parts, gpu))
        made.heading, made.parts, made.gpu = heading, tuple(parts), tuple(gpu)
        return made

    @property
    def html(self) -> str:
        """The same as a fragment of HTML, without scripts or styles from elsewhere."""
        rows = []
        for number, part in enumerate(self.parts, 1):
            rows.append(f'<tr><th colspan="3" style="text-align:left">{number}. {html.escape(part.name)}</th></tr>')
            rows += [
                "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in line) + "</tr>"
                for line in part.lines
            ]
            rows += [
                f'<tr><td colspan="3" style="text-align:left"><small>{html.escape(note)}</small></td></tr>'
                for note in (*part.reasons, *part.notes)
            ]
        gpu = "".join(f"<li>{html.escape(line)}</li>" for line in self.gpu)
        table = f"<table><caption>{html.escape(self.heading)}</caption>{''.join(rows)}</table>"
        return f'<div class="fastlogits-plan">{table}{f"<ul>{gpu}</ul>" if gpu else ""}</div>'

    def _repr_html_(self) -> str:
        return self.html


def explain(
    plan: AnyPlan,
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    bandwidth: float | None = None,
) -> Explanation:
    """See ``Plan.explain``."""
    is_shape = isinstance(shape, (tuple, list)) and len(shape) == 2
    if shape is not None and not (is_shape and all(is_integer(size) and size >= 0 for size in shape)):
        raise ValueError(f"shape must be (batch, vocabulary), two integers of at least 0, got {shape!r}")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a dtype of torch, such as torch.float32, got {dtype!r}")
    if bandwidth is not None and not (is_number(bandwidth) and 0 < bandwidth < float("inf")):
        raise ValueError(f"bandwidth must be bytes per second, a finite number above 0, got {bandwidth!r}")
    parts = plan.inner_parts
    fused = [part for part in parts if not part.is_barrier]
    count = sum(member.is_first for part in parts for member in part.members)
    title = f"{_plural(count, 'processor')}, {_plural(len(fused), 'fused part')}"
    gpu = _on_a_gpu(plan.parts)
    if shape is not None and parts:
        gpu.append(_limit(plan.parts, shape, dtype, bandwidth))
    return Explanation(title, [_told(part) for part in parts], gpu)


def _told(part: Part) -> PartText:
    name, *notes = part.describe().splitlines()
    lines = []
    for member in part.members:
        stage = member.stage
        lines.append(Line(member.name, stage.acts_as if isinstance(stage, Rows) else stage.kind, stage.describe()))
    return PartText(name, tuple(lines), _reasons(part), tuple(notes))


def _reasons(part: Part) -> tuple[str, ...]:
    """Why the processors of a part may act as one; their names, where it isn't all of them."""
    everyone = None if part.takes_in_others else len(part.members)
    return tuple(
        f"why: {reason}" + ("" if len(names) == everyone else f" ({', '.join(names)})")
        for reason, names in part.merges()
    )


def _on_a_gpu(parts: Sequence[Part]) -> list[str]:
    if not parts:
        return []
    costs = [part.cost() for part in parts]
    launches = sum(cost.launches or 0 for cost in costs)
    others = [part for part, cost in zip(parts, costs, strict=True) if cost.launches is None]
    torch_too = f", and what {_plural(len(others), 'part')} in torch or of your own takes" if others else ""
    values = sum(cost.row_values for cost in costs)
    values_too = f", after small operations of torch for {_plural(values, 'value')} of each row" if values else ""
    lines = [f"at most {_plural(launches, 'launch')}{values_too}{torch_too}"]
    for part in parts:
        if part.takes_in_others:
            lines += [part.describe(), *_reasons(part)]
    return lines


def _limit(parts: Sequence[Part], shape: tuple[int, int], dtype: torch.dtype, bandwidth: float | None) -> str:
    B, V = shape
    size = B * V * dtype.itemsize
    moved = sum(cost.reads + cost.writes for cost in (part.cost() for part in parts)) * size
    at = ""
    if bandwidth is not None:
        at = f", {1e6 * moved / bandwidth:,.1f} us at {bandwidth / 1e9:,.0f} GB/s"
    least = "at least " if any(part.cost().launches is None for part in parts) else ""
    name = str(dtype).removeprefix("torch.")
    return f"{name} logits of {B} x {V}: {least}{_bytes(moved)} to move{at}; a copy of them moves {_bytes(2 * size)}"


def _text(title: str, parts: Sequence[PartText], gpu: Sequence[str]) -> str:
    lines = [title]
    width = max((len(line.processor) for part in parts for line in part.lines), default=0)
    for number, part in enumerate(parts, 1):
        lines.append(f"{number}. {part.name}")
        lines += [f"     {processor:<{width}}  {kind:<9}  {does}" for processor, kind, does in part.lines]
        lines += [f"     {note}" for note in (*part.reasons, *part.notes)]
    if gpu:
        lines += [f"on a GPU: {gpu[0]}", *(f"     {line}" for line in gpu[1:])]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('h') else 's'}"
