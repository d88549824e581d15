"""Processed logits of which each rank has its part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from fastlogits.parallel.dtensor import is_split, local_part
from fastlogits.parallel.group import Group, Shards
from fastlogits.parallel.rows import some_index, takes_some_rows
from fastlogits.parallel.stages import PartMembers, Piece, members_of_part
from fastlogits.plan.causes import kind
from fastlogits.plan.plan import Plan
from fastlogits.plan.position import Index
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Rows
from fastlogits.processors.base import LogitsProcessorList


class _Alone(NamedTuple):
    """A plan for a part of the vocabulary, which needs no other part."""

    plan: Plan
    of: PartMembers


_plans: WeakKeyDictionary[Plan, dict[Piece, _Alone | None]] = WeakKeyDictionary()


def _of_part(plan: Plan, ranks: Group, shards: Shards) -> _Alone | None:
    """The plan for this rank's part, if it can be had; the same on all ranks."""
    piece = Piece(shards.starts[ranks.rank], shards.stops[ranks.rank], shards.vocab_size)
    kept = _plans.setdefault(plan, {})
    if piece not in kept:
        members = members_of_part(plan.members, piece)
        kept[piece] = None if members is None else _Alone(Plan.compile(members.members), members)
    return kept[piece]


def _padded(part: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - part.shape[1]
    return torch.nn.functional.pad(part, (0, missing), value=float("-inf")) if missing else part


def process(
    scores: torch.Tensor,
    processors: Iterable[Any],
    input_ids: torch.Tensor | None = None,
    *,
    group: Any = None,
    prompt_length: Index | None = None,
    cache_position: Index | None = None,
) -> torch.Tensor:
    """Process logits of which each rank has a part of the vocabulary; each gets its part of the result.

    Processors that map each logit by itself (masks, penalties, n-grams, biases, forced tokens, temperature) take the
    part alone, and nothing is sent. For others, as truncations, the ranks deal out the rows, so that each has some of
    them whole, process these, and return the parts: two exchanges of all logits. Where there are no more rows than
    ranks, or a processor has to see all rows, each rank gets all of them. To sample a token, don't process the logits
    first: give the processors to a ``Sampler``, which sends less.

    Args:
        scores: this rank's part of the logits, float32, float16 or bfloat16 ``[B, width]``; never written. Or a
            ``DTensor`` that is split over its last dimension.
        processors: a ``LogitsProcessorList``, or any list of processors.
        input_ids: tokens so far, int32 or int64 ``(B, L)``, for processors that read them.
        group: the ranks; see ``Sampler``. None for those of a ``DTensor``, or for one process that has all logits.
        prompt_length: see ``LogitsProcessorList``.
        cache_position: see ``LogitsProcessorList``.

    Returns:
        This rank's part of the processed logits ``[B, width]``, the same that one process would have in these columns;
        -inf in columns of padding.

    Raises:
        ValueError: arguments that aren't alike on all ranks, or what a processor refuses.

    Example:
        >>> import fastlogits as fl
        >>> process(torch.zeros(1, 4), [fl.SuppressTokensLogitsProcessor([1, 3])])
        tensor([[0., -inf, 0., -inf]])
    """
    if is_split(scores):
        scores, own_group = local_part(scores)
        group = own_group if group is None else group
    plan = processors if isinstance(processors, LogitsProcessorList) else LogitsProcessorList(processors)
    ids: Any = input_ids
    if group is None:
        return plan(ids, scores, prompt_length=prompt_length, cache_position=cache_position)
    ranks = Group.of(group)
    members = plan.plan.members
    try:
        if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or not scores.is_floating_point():
            raise ValueError(f"scores must be a floating-point tensor of shape (B, width), got {kind(scores)}")
        for member in members:
            if isinstance(member.stage, Rows) and member.stage.draws and member.stage.generator is None:
                raise ValueError(
                    f"processors must not take torch's own random numbers with a group, got {member.name} without a "
                    "generator: each rank would draw others. Give it a torch.Generator that is seeded alike on all "
                    "ranks, or give the processors to a Sampler, whose seeds decide"
                )
    except ValueError as error:
        ranks.agree.refuse(error)
        raise
    B = len(scores)
    shards = ranks.shards(scores.shape[1])
    ranks.agree((
        ("number of rows of scores", B), ("dtype of scores", str(scores.dtype)), ("input_ids", ids is not None),
        ("processors", "; ".join(f"{member.name}: {member.stage.describe()}" for member in members)),
    ))  # fmt: skip
    alone = _of_part(plan.plan, ranks, shards)
    if alone is not None:
        part = scores[:, : shards.sizes[ranks.rank]]
        run = Run.of(prompt_length, cache_position)
        return _padded(alone.plan(alone.of.ids(ids), part, run) if part.shape[1] else part, scores.shape[1])
    if ranks.size >= B or not takes_some_rows(members) or (ids is not None and len(ids) != B):
        whole = ranks.whole_rows(scores, shards)
        return ranks.part(plan(ids, whole, prompt_length=prompt_length, cache_position=cache_position), shards)
    own = ranks.rows_of(ranks.rank, B)
    rows = ranks.dealt_rows(scores, shards)
    if len(rows):
        some_ids: Any = ids if ids is None else ids[own]
        rows = plan(
            some_ids, rows, prompt_length=some_index(prompt_length, own, B),
            cache_position=some_index(cache_position, own, B),
        )  # fmt: skip
    return ranks.returned_rows(rows, B, shards)
