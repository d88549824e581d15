"""Truncation on the CPU: only the most likely tokens of each row are looked at, as long as they suffice.

    scores[b, v] = filter_value   for every token v that a rule drops, rule after rule

Bytes moved: one to four reads of the scores and one write, where about a hundred tokens stay; the rules after the first
see only those. Nothing is sorted but them, and where more stay, the neighbourhood of the cut-off. In float16 and
bfloat16 transformers rounds its sums to that dtype, so there only the selections (top_k, top_h) take this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlogits_kernels.rules import Rule
from fastlogits_kernels.truncate.reference import (
    TOP_H_TOKENS,
    Row,
    drop_top_h,
    first_of_tied,
    of_tied,
    reference_truncate,
    row_of,
)

_MINUS_INFINITY = float("-inf")


def _number(rule: Rule) -> float:
    assert not isinstance(rule.value, torch.Tensor)
    return rule.value


def row_tails(scores: torch.Tensor, count: int, ordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The last ``count`` scores ``[B, count]`` of each row sorted upward, and their tokens.

    Ties stand in the order of their tokens where ``ordered``. Of what ties with the smallest, some may be missing.
    """
    V = scores.shape[1]
    # The top of a row lies in as many of its groups as it has tokens: those with the largest maxima. Group j holds the
    # tokens j, j + groups, ...: such maxima are taken by vectors. torch's topk costs ten times as much per element as
    # they do. Measured: 16 is as large as pays, the square root of V / count where that is less.
    size = min(16, 1 << (V // count).bit_length() // 2)
    if size < 4:
        top, tokens = scores.topk(count)
    else:
        groups = V // size
        maxima = scores[:, : groups * size].unflatten(1, (size, groups)).amax(1)
        found = maxima.topk(count, sorted=False).indices  # [B, count]
        tokens = (torch.arange(0, groups * size, groups).view(1, -1, 1) + found.unsqueeze(1)).flatten(1)
        if groups * size < V:
            tokens = torch.cat((tokens, torch.arange(groups * size, V).expand(len(tokens), -1)), 1)
        top, chosen = scores.gather(1, tokens).topk(count)
        tokens = tokens.gather(1, chosen)
    top, tokens = top.flip(1), tokens.flip(1)
    if ordered and bool((top[:, 1:] == top[:, :-1]).any()):
        tokens, order = tokens.sort(1)
        top, ascending = top.gather(1, order).sort(stable=True, dim=1)
        tokens = tokens.gather(1, ascending)
    return top, tokens


def _likeness(scores: torch.Tensor) -> tuple[torch.Tensor, Row]:
    """How near each token's surprise is to the entropy: 0 where it is the same, below 0 elsewhere."""
    apart = scores - scores.amax(-1, keepdim=True)
    row = row_of(scores, apart)
    # A token's surprise less the entropy is the expected score less its own.
    return apart.sub_(row.mean).abs_().neg_(), row


def _masses(values: torch.Tensor, row: Row) -> torch.Tensor:
    """Probabilities of some tokens of each row, in float64."""
    return (values - row.top).double().exp_() / row.total.double()


def _spare(drop: torch.Tensor, rule: Rule) -> torch.Tensor:
    drop[:, -rule.min_tokens_to_keep :] = False
    return drop


class _Tail(NamedTuple):
    """What a rule leaves of some tokens of each row."""

    values: torch.Tensor
    tokens: torch.Tensor
    complete: torch.Tensor
    """The rows ``[B]`` in which it drops all other tokens."""
    limit: torch.Tensor | None
    """In the other rows it drops what is below this ``[B, 1]``; None where that isn't known yet."""


def _apply_to_tail(scores: torch.Tensor, rule: Rule, count: int, ordered: bool) -> _Tail:
    kind, value, limit = rule.kind, _number(rule), None
    lowest = rule.ties == "lowest"
    if kind == "typical":
        likeness, row = _likeness(scores)
        likeness, tokens = row_tails(likeness, count, False)
        tail = scores.gather(1, tokens)
        last = (_masses(tail, row).flip(1).cumsum(1) < value).sum(1, keepdim=True)
        drop = _spare(likeness < likeness.gather(1, (count - 1 - last).clamp(min=0)), rule)
        complete = drop[:, 0]
        if ordered:
            tokens, order = tokens.sort(1)
            tail, drop = tail.gather(1, order), drop.gather(1, order)
        return _Tail(tail.masked_fill(drop, rule.filter_value), tokens, complete, None)
    tail, tokens = row_tails(scores, count, ordered or kind == "top_p" or lowest)
    if kind == "top_k":
        limit = tail[:, -int(value), None]
        drop = tail < limit
        if lowest:
            complete = drop[:, :1]
            drop = of_tied(tail, drop, limit, value - (~(tail <= limit)).sum(1, keepdim=True))
            drop[:, :1] &= complete  # else not all that tie are here
            limit = None
    elif kind == "top_p":
        p = _masses(tail, row_of(scores)).flip(1)
        drop = _spare((p.cumsum(1) - p >= value).flip(1), rule)
        if lowest:
            drop = first_of_tied(tail, drop)
        # Which of the tied tokens at the cut-off go is only known where all of them are here.
        drop[:, :1] &= tail[:, :1] < tail.masked_fill(drop, float("inf")).amin(1, keepdim=True)
    elif kind == "top_h":
        drop = drop_top_h(tail, value, rule)
    else:
        assert rule.spec.limit is not None
        limit = rule.spec.limit(scores, value)
        if not rule.spec.spares_fewest:  # all that tie with the last of those asked for stay
            limit = torch.minimum(limit, tail[:, -rule.min_tokens_to_keep, None])
        drop = _spare(tail < limit, rule)
    complete = drop[:, 0]
    if rule.filter_value == _MINUS_INFINITY and not bool(complete.all()):
        complete = complete | (tail[:, 0] == _MINUS_INFINITY)
    return _Tail(tail.masked_fill(drop, rule.filter_value), tokens, complete, limit)


def _tail_size(scores: torch.Tensor, rule: Rule) -> int:
    """How many tokens of a row to look at first; 0 for whole rows."""
    value = _number(rule)
    if rule.kind == "top_k":
        return int(value) + max(14, int(value) // 4)  # logits that once were bfloat16 tie a lot
    if rule.kind == "top_h":
        return TOP_H_TOKENS + 1
    if rule.spec.keeps_nearly_all(value) or scores.dtype in (torch.float16, torch.bfloat16):
        return 0
    return max(64 if rule.spec.limit else 128, 2 * rule.min_tokens_to_keep)


def _search(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Top-p or typical where many tokens stay: only those that a sample puts near the cut-off are sorted."""
    B, value = len(scores), _number(rule)
    typical = rule.kind == "typical"
    rank, row = _likeness(scores) if typical else (scores, row_of(scores))
    one_in, heavy = 16, 128
    head, tokens = row_tails(scores, heavy, False)
    # A few heavy tokens would mislead the sample, so they are all in it.
    weight = (row.p[:, ::one_in] * one_in).masked_fill_(scores[:, ::one_in] >= head[:, :1], 0.0)
    weight = torch.cat((row.p.gather(1, tokens), weight), 1)
    sample, order = torch.cat((rank.gather(1, tokens), rank[:, ::one_in]), 1).sort(1, descending=True)
    reached = weight.gather(1, order).cumsum(1)
    size = sample.shape[1]
    middle = (reached < value * reached[:, -1:]).sum(1, keepdim=True)
    margin = 4 * math.isqrt(size)
    upper = sample.gather(1, (middle - margin).clamp(min=0)).masked_fill(middle < margin, float("inf"))
    lower = sample.gather(1, (middle + margin).clamp(max=size - 1))
    lower = lower.masked_fill(middle + margin >= size, _MINUS_INFINITY)

    above = rank > upper
    between = (rank >= lower.clamp(min=torch.finfo(rank.dtype).min)) & ~above
    rows, tokens = between.nonzero(as_tuple=True)
    count = between.sum(1)
    width = int(count.max())
    place = torch.arange(len(rows)) + (width - count.cumsum(0))[rows]  # each row at the right end of its columns
    candidates = scores.new_full((B, width), _MINUS_INFINITY).index_put_((rows, place), rank[rows, tokens])
    p = scores.new_zeros((B, width)).index_put_((rows, place), row.p[rows, tokens])
    ids = tokens.new_zeros((B, width)).index_put_((rows, place), tokens)
    candidates, order = candidates.sort(stable=True, dim=1)
    p = (p.gather(1, order) / row.mass).double().flip(1)
    over = ((row.p * above).sum(1, keepdim=True) / row.mass).double()
    drop = (over + (p.cumsum(1) - p) >= value).flip(1)
    kept = width - drop.sum(1, keepdim=True)
    last = candidates.gather(1, (width - kept).clamp(max=width - 1)) if width else lower
    found = (over < value) & (kept > 0) & ((kept < count.unsqueeze(1)) | (lower == _MINUS_INFINITY))
    found &= kept + above.sum(1, keepdim=True) >= rule.min_tokens_to_keep

    out = torch.where(rank < last, rule.filter_value, scores)
    if not typical:  # of tied tokens only as many as it takes
        if rule.ties == "lowest" and width:
            drop = first_of_tied(candidates, drop)
        tied = (drop & (candidates == last)).nonzero(as_tuple=True)
        out[tied[0], ids.gather(1, order)[tied]] = rule.filter_value
    if not bool(found.all()):
        lost = (~found).nonzero()[:, 0]
        out[lost] = reference_truncate(scores[lost], (rule,))
    return out


def _truncate_chain(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """All rules in order; unless it is the only rule, the fill value of each is -inf."""
    first, rest = rules[0], rules[1:]
    size = _tail_size(scores, first)
    whole = None
    if not 0 < 2 * size <= scores.shape[1]:
        whole = reference_truncate(scores, rules[:1])
    elif first.spec.limit and first.min_tokens_to_keep == 1 and scores.numel() < 1 << 18:
        # Some short passes take less than many small operations; what is kept is the same.
        limit = torch.minimum(first.spec.limit(scores, _number(first)), scores.amax(-1, keepdim=True))
        whole = torch.where(scores < limit, first.filter_value, scores)
    if whole is not None:
        return _truncate_chain(whole, rest) if rest else whole
    tail = _apply_to_tail(scores, first, size, bool(rest))
    if bool(tail.complete.all()):
        return _scattered(scores, tail, first, rest)
    missing = (~tail.complete).nonzero().squeeze(1)
    some = len(missing) < len(scores)
    left = scores[missing] if some else scores
    if tail.limit is not None:
        left = torch.where(left < (tail.limit[missing] if some else tail.limit), first.filter_value, left)
    elif first.kind in ("top_k", "top_h"):
        left = reference_truncate(left, (first,))
    else:
        left = _search(left, first)
    left = _truncate_chain(left, rest) if rest else left
    return _scattered(scores, tail, first, rest).index_copy_(0, missing, left) if some else left


def _scattered(scores: torch.Tensor, tail: _Tail, first: Rule, rest: Sequence[Rule]) -> torch.Tensor:
    """Whole rows from the ends that ``first`` has left, after the other rules."""
    # All other tokens of the row are at -inf now and change no sum.
    values = reference_truncate(tail.values, rest)
    return scores.new_full(scores.shape, first.filter_value).scatter_(1, tail.tokens, values)


def _truncate_cpu(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    while rules:
        # What a rule writes is seen by the next one, so only -inf lets them share their survivors.
        together = 0
        while together < len(rules) and rules[together].filter_value == _MINUS_INFINITY:
            together += 1
        together = max(1, together)
        scores, rules = _truncate_chain(scores, rules[:together]), rules[together:]
    return scores


def truncate_rows(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """The rows that share the values of their rules together, without those rules that are off."""
    if not any(isinstance(rule.value, torch.Tensor) for rule in rules):
        return _truncate_cpu(scores, rules)
    columns: list[list[float | None]] = []
    for rule in rules:
        if isinstance(rule.value, torch.Tensor):
            values = rule.spec.range
            columns.append([each if values.has(each) else None for each in rule.value.tolist()])
        else:
            columns.append([rule.value] * len(scores))
    rows_of: dict[tuple[float | None, ...], list[int]] = {}
    for row, key in enumerate(zip(*columns, strict=True)):
        rows_of.setdefault(key, []).append(row)
    out = torch.empty(0)
    for key, rows in rows_of.items():
        theirs = [rule._replace(value=each) for rule, each in zip(rules, key, strict=True) if each is not None]
        if len(rows_of) == 1:
            return _truncate_cpu(scores, theirs) if theirs else scores.clone()
        if not len(out):
            out = torch.empty_like(scores, memory_format=torch.contiguous_format)
        out[rows] = _truncate_cpu(scores[rows], theirs)
    return out
