"""What a selection is: rules as the kernels take them, how a row is cut, and what its workspace holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from fastlogits_kernels.rules import CODES, Rule, is_idle
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import Relaunches, form_of, table_on, triton
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent
from fastlogits_kernels.selection.row import (
    GROUPS,
    LINE,
    PART_WORDS,
    RULE_WORDS,
    RULES_AT,
    RUN,
    SUM_WORDS,
    TILE_W,
    Shape,
)
from fastlogits_kernels.selection.sample_rows import PART_WORDS as SAMPLE_PART_WORDS

# Candidates that are refined in registers: of rules that keep few, of most, of those that keep many.
FEW, SOME, MANY = 512, 1024, 4096
_MARGINS = {FEW: 4.0, SOME: 3.0}
"""By how many standard deviations so much room has to be more than candidates take on average.

Some rows have more: they take several times as long. More room takes a little longer for all rows, the most room more.
"""
SAMPLE = 8192
"""Tokens of a row's sample."""
BLOCK_BYTES = 4096
"""What a program of the filter reads: as much, whatever the logits are."""
SAMPLE_BLOCK = 4096
"""Tokens of a part of a row where no rule drops anything."""
DEVIATIONS, DEVIATIONS_OF_MANY = 4.5, 3.5
"""Standard deviations by which a sample is trusted; of thousands of rows, a few may have to be processed as a whole."""
ROOM = 4096
"""Candidates that a search of full rows collects at most."""
# Batch sizes and layouts whose calls are laid out at a time, a few kilobytes each.
_MOST_CALLS = 256
_MOST_NUMBERS = 256


def takes_rules(rules: Sequence[Rule]) -> bool:
    """Whether the kernels take these rules; what they don't take is rare, and torch's."""
    return (
        # What a rule fills with another value counts for the next one.
        (len(rules) <= 1 or all(rule.filter_value == -math.inf for rule in rules))
        and len({rule.ties for rule in rules if rule.spec.takes_ties}) <= 1
        # One centre is kept of what distances are.
        and sum(rule.spec.goal == "distance" for rule in rules) <= 1
        and not any(_is_number(rule) and rule.spec.keeps_nearly_all(rule.value) for rule in rules if not _off(rule))  # type: ignore[arg-type]
    )


def _off(rule: Rule) -> bool:
    return _is_number(rule) and rule.spec.off_as_number and bool(rule.value == rule.spec.range.off)


def _is_number(rule: Rule) -> bool:
    return not isinstance(rule.value, torch.Tensor)


def _whole_lines(words: int) -> int:
    line: int = LINE.value
    return -(-words // line) * line


class Layout(NamedTuple):
    """How a row of a vocabulary is cut and sampled, and what its workspace holds."""

    shape: Shape
    words_of_row: int
    few: int
    """Of more candidates some are kept for certain."""
    TILES: int
    PARTS: int

    @classmethod
    def of(cls, V: int, rules: int, sums: bool, block: int, most: float = math.inf) -> Layout:
        """That of rows of V logits, of which a program of the filter takes ``block``, with ``most`` candidates."""
        W = words(V)
        tiles, parts = -(-W // TILE_W.value), -(-V // block)
        # Of a flat row a sample leaves open what becomes of a sixteenth. With room for those that a search collects of
        # them again, this is up to a quarter of what the logits of a large vocabulary take.
        slots = int(min(most, max(SOME, V // 12 // 128 * 128)))
        few = min(ROOM, max(SOME, V // 50 // 128 * 128))
        sums_at = RULES_AT.value + RULE_WORDS.value * rules
        parts_at = sums_at + SUM_WORDS.value * tiles
        pairs_at = parts_at + PART_WORDS.value * parts
        pairs = slots + ROOM * (slots > ROOM)
        sample = min(V, SAMPLE)
        shape: Any = Shape(
            W, tiles, parts, slots, sums_at, parts_at, pairs_at, 0.95 * few, 0.95 * slots,
            max(V, SAMPLE) // RUN.value, sample, sample / V,
        )  # fmt: skip
        return cls(
            shape, _whole_lines(pairs_at + max(2 * pairs, SAMPLE * sums)), few, triton.next_power_of_2(tiles),
            triton.next_power_of_2(parts),
        )  # fmt: skip


def _sums_of(rules: Sequence[Rule]) -> int:
    """Which sums over a row anything may read: those of a rule before which nothing may have been dropped."""
    sums = 0
    for rule in rules:
        sums = max(sums, rule.spec.sums)
        if _is_number(rule):
            break
    return sums


def _most_candidates(count: float, V: int, deviations: float, margin: float) -> float:
    """How many candidates the bounds let through where a rule keeps ``count`` tokens, and a margin.

    As the bounds do it: a key that so many of the sample reach, or the groups of it, by their largest keys.
    """
    share = min(V, SAMPLE) / V
    expected = count * share
    reach = min(count, math.ceil(expected + deviations * math.sqrt(expected * (1 - share)) + 3))
    groups: int = GROUPS.value
    if reach <= groups // 2:
        reach = groups * math.log(groups / (groups - reach))
    return (reach + margin * math.sqrt(reach)) / share


def _slots_for(fewest: float, V: int, deviations: float) -> tuple[int, ...]:
    """How many candidates are refined in registers, where a rule keeps ``fewest``: launch after launch."""
    if not fewest:
        return (SOME,)
    for slots, margin in _MARGINS.items():
        if fewest <= slots and _most_candidates(fewest, V, deviations, margin) <= slots:
            return (slots,)
    return (MANY,) if fewest <= MANY else (SOME, MANY)


class Selection:
    """Rules as the kernels take them.

    Args:
        rules: the rules.
        V: tokens of the vocabulary.
        device: where the logits are.
        normalise: whether what stays is normalised, as ``log_softmax`` does it.
        unrounded: whether logits stay float32 between the maps of a chain, as they do where tokens are sampled.
        many_rows: whether there are thousands of rows: then each has a small workspace, and guesses are bolder.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        V: int,
        device: torch.device,
        normalise: bool = False,
        unrounded: bool = False,
        many_rows: bool = False,
    ) -> None:
        self.given = tuple(rules)
        rules = [rule for rule in rules if not is_idle(rule, V)]
        self.rows = [rule.value for rule in rules if isinstance(rule.value, torch.Tensor)]
        self.numbers = _numbers_on(device, *(float(rule.value) if _is_number(rule) else 1.0 for rule in rules))
        self.sums = _sums_of(rules)
        self.may_be_uncut = not any(map(_is_number, rules))
        self.kinds = tuple(CODES[rule.kind] for rule in rules)
        self.leasts = tuple(rule.min_tokens_to_keep for rule in rules)
        per_row = count()
        # Where the value of each rule is: among the numbers, or in a tensor by row.
        self.places = tuple(-1 - index if _is_number(rule) else next(per_row) for index, rule in enumerate(rules))
        self.fill = rules[0].filter_value if rules else -math.inf
        self.lowest_ties = any(rule.ties == "lowest" for rule in rules if rule.spec.takes_ties)
        self.banded = any(rule.spec.goal == "distance" for rule in rules)
        self.normalise, self.unrounded = normalise, unrounded
        # Whether what is kept for certain has to be weighed.
        self.weighed = any(1 <= rule.spec.sums < 3 for rule in rules)
        counted = [float(rule.value) for rule in rules if _is_number(rule) and rule.spec.goal == "count"]
        fewest = min(counted, default=math.inf)
        self.deviations = DEVIATIONS_OF_MANY if many_rows else DEVIATIONS
        self.slots = _slots_for(fewest if rules else 0, V, self.deviations)
        """How many candidates are refined in registers, launch after launch."""
        most = max(self.slots[-1], SOME) if many_rows else math.inf
        self.layouts = {size: Layout.of(V, len(rules), self.sums > 0, BLOCK_BYTES // size, most) for size in (2, 4)}
        # Where no rule keeps more than can be collected, nothing has to be kept for certain.
        self.bracketed = not normalise and not fewest <= 0.6 * self.layouts[4].few
        self.form = form_of((
            self.kinds, self.leasts, self.places, self.fill, self.lowest_ties, normalise, self.bracketed, self.slots,
            unrounded, many_rows,
        ))  # fmt: skip
        self.launches = 3 + len(self.slots) + (self.sums > 0)
        """How many kernels a call launches."""
        self.words_to_sample = _whole_lines(LINE.value + SAMPLE_PART_WORDS.value * -(-V // SAMPLE_BLOCK))
        """Words of a row of the workspace where tokens are sampled and no rule drops anything."""
        self.relaunches: dict[tuple[Any, ...], Relaunches] = {}
        """The launches of calls that have come more than once, laid out."""
        self._seen: set[tuple[Any, ...]] = set()
        self.handle = next(_handles)
        selections[self.handle] = self

    def saw(self, key: tuple[Any, ...], lay_out: Callable[[], Relaunches | None]) -> None:
        """Lay out the launches of a call that comes for the second time; of one for the first time take a note."""
        if key not in self._seen:
            if len(self._seen) >= _MOST_CALLS:
                self._seen.clear()
                self.relaunches.clear()
            self._seen.add(key)
            return
        made = lay_out()
        if made is not None:
            self.relaunches[key] = made


_numbers: dict[tuple[torch.device, tuple[float, ...]], torch.Tensor] = {}
_captured_numbers: list[torch.Tensor] = []


def _numbers_on(device: torch.device, *numbers: float) -> torch.Tensor:
    def make() -> torch.Tensor:
        return table_on(torch.tensor([*numbers, 0.0], dtype=torch.float64), device)

    made = recent(_numbers, (device, numbers), make, _MOST_NUMBERS)
    if is_capturing(device):  # a selection may be made for one call
        hold(_captured_numbers, made)
    return made


_handles = count()
selections: WeakValueDictionary[int, Selection] = WeakValueDictionary()
"""All that there are, by their handles."""
