"""What fuses: stages into parts, and parts into the kernels that end in processed logits, or in a token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastlogits_kernels.rules import Rule
from fastlogits_kernels.selection.launch import takes_rules

from fastlogits.plan.barrier import Barrier
from fastlogits.plan.observation import Observation
from fastlogits.plan.part import Part
from fastlogits.plan.pointwise import FOLDED, Pointwise
from fastlogits.plan.rows import RowsPart
from fastlogits.plan.selection import Selection, Truncation
from fastlogits.plan.stages import (
    AllowFrom,
    Clean,
    Force,
    ForceRows,
    Member,
    Mix,
    Observe,
    Opaque,
    Rows,
    Truncate,
    values_keep_notes,
)


def parts_of(members: Iterable[Member]) -> list[Part]:
    """The parts that some processors become: neighbours of one kind are one part."""
    groups: list[list[Member] | Observation] = []
    for place, processor in enumerate(members):
        for member in processor._replace(place=place).expanded():
            last = groups[-1] if groups else None
            if isinstance(member.stage, Observe):
                _observe(groups, member, member.stage)
            elif isinstance(last, list) and _fuses(last, member):
                last.append(member)
            else:
                groups.append([member])
    return [group if isinstance(group, Observation) else _part_of(group) for group in groups]


def _observe(groups: list[list[Member] | Observation], member: Member, stage: Observe) -> None:
    """Put a look before the groups without a state that it stands behind: what follows may fuse with them."""
    pure: list[list[Member]] = []
    for group in reversed(groups):
        if not (isinstance(group, list) and all(map(_is_pure, group))):
            break
        pure.insert(0, group)
    groups.insert(len(groups) - len(pure), Observation(member, stage, [_part_of(list(group)) for group in pure]))


def _is_pure(member: Member) -> bool:
    """Whether a stage may act twice in a call, and nobody can tell."""
    return isinstance(member.stage, (Truncate, *FOLDED)) and not values_keep_notes(member.stage)


def _part_of(group: list[Member]) -> Part:
    first = group[0].stage
    if isinstance(first, Truncate):
        return Truncation(group)
    if isinstance(first, Rows):
        return RowsPart(group[0], first)
    if isinstance(first, Opaque):
        return Barrier(group[0], first.processor)
    if isinstance(first, FOLDED):
        return Pointwise(group)
    raise TypeError(
        f"{group[0].name}.stage() must return a stage of fastlogits.plan.stages, such as Ban or Rows, or a Several of "
        f"them, got {first!r}"
    )


def _fuses(group: list[Member], member: Member) -> bool:
    """Whether a stage goes into one part with those before it."""
    first, stage = group[0].stage, member.stage
    if isinstance(stage, Truncate):
        return isinstance(first, Truncate)
    # What mixes rows has fewer of them behind it than before.
    if not (isinstance(stage, FOLDED) and isinstance(first, FOLDED)) or isinstance(stage, Mix):
        return False
    # A fold reads one set of allowed rows, and bans don't move across what brings a score back from -inf.
    parted = any(isinstance(each.stage, (Clean, Force, ForceRows)) for each in group)
    return not (parted and isinstance(stage, AllowFrom) and any(isinstance(each.stage, AllowFrom) for each in group))


def fused_to_logits(parts: Sequence[Part]) -> list[Part]:
    """The parts that end in logits: truncations take in the fold before them and the normalisation after them."""
    found: list[Part] = []
    number = 0  # of the parts that have been looked at
    while number < len(parts):
        part = parts[number]
        number += 1
        if not (isinstance(part, Truncation) and takes_rules(part.rules)):
            found.append(part)
            continue
        before = _popped_fold(found)
        after = parts[number] if number < len(parts) else None
        if not (isinstance(after, RowsPart) and after.is_normalisation):
            after = None
        found.append(Selection(part, before, after, first=number - (before is not None)))
        number += after is not None
    return found


class Draw(NamedTuple):
    """The parts that end in a token."""

    rest: list[Part]
    """What stands before, and runs by itself."""
    fold: Pointwise | None
    rules: tuple[Rule, ...] | None
    """The truncations that stood last; None where there are none, or they can't join."""


def fused_to_token(parts: Sequence[Part], joins_truncations: bool) -> Draw:
    """The parts that end in a token: the last truncations join the draw, if they may, and the fold before them."""
    rest = list(parts)
    rules = None
    last = rest[-1] if rest else None
    if joins_truncations and isinstance(last, Truncation) and _can_draw(last.rules):
        rules = last.rules
        rest.pop()
    # The rows of what mixes are not those of the seeds.
    mixes = bool(rest) and isinstance(rest[-1], Pointwise) and rest[-1].mixes
    return Draw(rest, None if mixes else _popped_fold(rest), rules)


def _popped_fold(parts: list[Part]) -> Pointwise | None:
    """The last part, taken from the list, where it is a fold."""
    last = parts[-1] if parts else None
    if not isinstance(last, Pointwise):
        return None
    parts.pop()
    return last


def _can_draw(rules: Sequence[Rule]) -> bool:
    """Whether the draw's kernels take some truncations: what those drop must be impossible."""
    return takes_rules(rules) and all(rule.filter_value == -math.inf for rule in rules)
