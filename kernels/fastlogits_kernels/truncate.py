"""Keep a set of likely tokens in each row and write a fill value everywhere else.

    scores[b, v] = filter_value   for every token v that a rule drops, rule after rule

Which tokens a rule keeps is what transformers' warper of that name keeps, ties and rows of NaN or -inf included:

    top_k          those not below the k-th largest score: all that tie with it
    top_p          the most likely ones until their mass reaches p; of those that tie at the edge as many as it takes,
                   the ones with the largest ids, where transformers has it as its sort comes out
    min_p          those at least ``min_p`` times as likely as the likeliest
    typical        those whose surprise is nearest to the entropy, until their mass reaches the value: all that tie
    epsilon, eta   those at least as likely as a cutoff, fixed or lowered by the entropy
    top_h          of the 100 most likely ones, the first until their share of the entropy reaches the value
    top_n_sigma    those at most n standard deviations below the largest score (arXiv 2411.07641); the deviation is that
                   of the row's finite scores, with N - 1 as in the paper's code

Where transformers refuses a row (NaN or nothing but -inf, for eta and top_h), the row stays as it is.

Bytes moved on the CPU: one to four reads of the scores and one write, where about a hundred tokens stay; the rules
after the first see only those. Nothing is sorted but them, and where more stay, the neighbourhood of the edge. In
float16 and bfloat16 transformers rounds its sums to that dtype, so there only the selections (top_k, top_h) take this
way. On CUDA each rule is some operations of torch on whole rows, without a host sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from fastlogits_kernels._library import register

RuleKind: TypeAlias = Literal["top_k", "top_p", "min_p", "typical", "epsilon", "eta", "top_h", "top_n_sigma"]
_KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
_MINUS_INFINITY = float("-inf")
_TOP_H_TOKENS = 100


class Rule(NamedTuple):
    """One truncation: what it keeps of the tokens that the rule before it has left."""

    kind: RuleKind
    value: float
    """k, or the parameter that the rule is named for."""
    min_tokens_to_keep: int = 1
    filter_value: float = _MINUS_INFINITY

    def describe(self) -> str:
        """In a few words."""
        return f"{self.kind.replace('_', '-')} {self.value:g}"


# -- Whole rows: what is dropped, bool [B, V]. The reference, and the path of CUDA: no host sync. ------------------


def _smallest_of_top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count``-th largest score of each row ``[B, 1]``; NaN is the largest of all."""
    if count == 1:
        return scores.amax(-1, keepdim=True)
    return scores.topk(min(count, scores.shape[-1])).values[:, -1:]


def _entropy(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities ``[B, V]`` and their entropy ``[B, 1]``, by the operations of ``torch.distributions``."""
    logarithms = scores - scores.logsumexp(-1, keepdim=True)
    p = logarithms.softmax(-1)
    return p, -(logarithms.clamp(min=torch.finfo(scores.dtype).min) * p).sum(-1, keepdim=True)


def _top_k(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    return scores < _smallest_of_top(scores, int(rule.value))


def _top_p(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    # In this order and from the small end, as transformers sums them.
    ascending, tokens = scores.sort(stable=True, dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - rule.value
    drop[:, -rule.min_tokens_to_keep :] = False
    return drop.scatter(1, tokens, drop)


def _min_p(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    p = scores.softmax(-1)
    drop = p < rule.value * p.amax(-1, keepdim=True)
    if rule.min_tokens_to_keep > 1:  # the likeliest is never below
        drop.scatter_(1, p.topk(min(rule.min_tokens_to_keep, p.shape[-1])).indices, False)
    return drop


def _typical(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    logarithms = scores.log_softmax(-1)
    entropy = -(logarithms * logarithms.exp()).nansum(-1, keepdim=True)
    distance, tokens = (-logarithms - entropy).abs().sort(stable=True, dim=-1)
    reached = scores.gather(1, tokens).softmax(-1).cumsum(-1)
    last = (reached < rule.value).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(1, last)
    drop[:, : rule.min_tokens_to_keep] = False
    return drop.scatter(1, tokens, drop)


def _epsilon(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    return (scores.softmax(-1) < rule.value) & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def _eta(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    _, entropy = _entropy(scores)
    # transformers has it as a tensor of the scores' dtype. This one is of the CPU, whatever the device of the scores.
    root = torch.tensor(math.sqrt(rule.value), dtype=scores.dtype).item()
    cutoff = (root * torch.exp(-entropy)).clamp(max=rule.value)
    return (scores.softmax(-1) < cutoff) & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def _top_h(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    top, tokens = scores.topk(min(_TOP_H_TOKENS, scores.shape[-1]))
    p, entropy = _entropy(top)
    drop = ~((-p * p.log()).cumsum(-1) <= entropy * rule.value)
    drop[:, 0] = False
    drop &= ~entropy.isnan()
    beyond = (~entropy.isnan()).expand(scores.shape)
    return beyond.scatter(1, tokens, drop)


def _top_n_sigma(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    keep = _smallest_of_top(scores, rule.min_tokens_to_keep)
    return (wide < wide.amax(-1, keepdim=True) - rule.value * _deviation(wide)) & (scores < keep)


def _deviation(scores: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the finite scores of each row ``[B, 1]``; NaN where there are fewer than two."""
    finite = scores.isfinite()
    count = finite.sum(-1, keepdim=True)
    mean = torch.where(finite, scores, 0.0).sum(-1, keepdim=True) / count
    apart = torch.where(finite, scores - mean, 0.0)
    return (apart.square().sum(-1, keepdim=True) / (count - 1)).sqrt()


_DROPS: dict[RuleKind, Callable[[torch.Tensor, Rule], torch.Tensor]] = {
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical": _typical,
    "epsilon": _epsilon,
    "eta": _eta,
    "top_h": _top_h,
    "top_n_sigma": _top_n_sigma,
}


def reference_truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """Rule after rule on whole rows, sorts and all."""
    for rule in rules:
        scores = scores.masked_fill(_DROPS[rule.kind](scores, rule), rule.filter_value)
    return scores


# -- The CPU: the most likely tokens of each row, in the order of a sorted row's end -------------------------------


def _tail(scores: torch.Tensor, count: int, ordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
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


class _Row(NamedTuple):
    """Softmax of whole rows ``[B, V]``, and sums over them, each ``[B, 1]``."""

    p: torch.Tensor
    mass: torch.Tensor
    """Sum of ``p``, all but 1: softmax adds up its denominator element by element, and sum() doesn't."""
    top: torch.Tensor
    total: torch.Tensor
    """Sum of ``exp(score - top)``."""
    mean: torch.Tensor
    """Expectation of ``score - top``; NaN where not asked for."""


def _row(scores: torch.Tensor, apart: torch.Tensor | None = None) -> _Row:
    """The sums of some rows; the expectation where ``apart``, the scores less the largest, is given."""
    p = scores.softmax(-1)
    mass = p.sum(-1, keepdim=True)
    top = scores.amax(-1, keepdim=True)
    if apart is None:
        mean = top.new_full((), float("nan"))
    else:
        mean = torch.linalg.vecdot(p, apart).unsqueeze(1) / mass
        undefined = mean.isnan().squeeze(1)
        if bool(undefined.any()):  # 0 * -inf
            finite = apart[undefined].clamp_(min=torch.finfo(scores.dtype).min)
            mean[undefined] = torch.linalg.vecdot(p[undefined], finite).unsqueeze(1) / mass[undefined]
    return _Row(p, mass, top, mass / p.amax(-1, keepdim=True), mean)


def _likeness(scores: torch.Tensor) -> tuple[torch.Tensor, _Row]:
    """How near each token's surprise is to the entropy: 0 where it is the same, below 0 elsewhere."""
    apart = scores - scores.amax(-1, keepdim=True)
    row = _row(scores, apart)
    # A token's surprise less the entropy is the expected score less its own.
    return apart.sub_(row.mean).abs_().neg_(), row


def _masses(values: torch.Tensor, row: _Row) -> torch.Tensor:
    """Probabilities of some tokens of each row, in float64."""
    return (values - row.top).double().exp_() / row.total.double()


def _spare(drop: torch.Tensor, rule: Rule) -> torch.Tensor:
    drop[:, -rule.min_tokens_to_keep :] = False
    return drop


def _limit_min_p(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    top: torch.Tensor = scores.amax(-1, keepdim=True)
    return top + (top - top + math.log(rule.value))  # NaN under an infinity, where probabilities are


def _limit_epsilon(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    row = _row(scores)
    return row.top + (math.log(rule.value) + row.total.log())


def _limit_eta(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    row = _row(scores, scores - scores.amax(-1, keepdim=True))
    entropy = row.total.log() - row.mean
    logarithm = math.log(rule.value)
    return row.top + ((logarithm / 2 - entropy).clamp(max=logarithm) + row.total.log())


def _limit_top_n_sigma(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    # torch's own std takes several times as long, and so does leaving out what isn't finite.
    apart = scores - scores.mean(-1, keepdim=True)
    deviation: torch.Tensor = torch.linalg.vector_norm(apart, dim=-1, keepdim=True) / math.sqrt(
        max(1, scores.shape[1] - 1)
    )
    undefined = ~deviation.isfinite().squeeze(1)
    if bool(undefined.any()):
        deviation[undefined] = _deviation(scores[undefined])
    top: torch.Tensor = scores.amax(-1, keepdim=True)
    return top - rule.value * deviation


_LIMITS: dict[RuleKind, Callable[[torch.Tensor, Rule], torch.Tensor]] = {
    "min_p": _limit_min_p,
    "epsilon": _limit_epsilon,
    "eta": _limit_eta,
    "top_n_sigma": _limit_top_n_sigma,
}


class _Tail(NamedTuple):
    """What a rule leaves of some tokens of each row."""

    values: torch.Tensor
    tokens: torch.Tensor
    settled: torch.Tensor
    """The rows ``[B]`` in which it drops all other tokens."""
    limit: torch.Tensor | None
    """In the other rows it drops what is below this ``[B, 1]``; None where that isn't known yet."""


def _apply_to_tail(scores: torch.Tensor, rule: Rule, count: int, ordered: bool) -> _Tail:
    kind, limit = rule.kind, None
    if kind == "typical":
        likeness, row = _likeness(scores)
        likeness, tokens = _tail(likeness, count, False)
        tail = scores.gather(1, tokens)
        last = (_masses(tail, row).flip(1).cumsum(1) < rule.value).sum(1, keepdim=True)
        drop = _spare(likeness < likeness.gather(1, (count - 1 - last).clamp(min=0)), rule)
        settled = drop[:, 0]
        if ordered:
            tokens, order = tokens.sort(1)
            tail, drop = tail.gather(1, order), drop.gather(1, order)
        return _Tail(tail.masked_fill(drop, rule.filter_value), tokens, settled, None)
    tail, tokens = _tail(scores, count, ordered or kind == "top_p")
    if kind == "top_k":
        limit = tail[:, -int(rule.value), None]
        drop = tail < limit
    elif kind == "top_p":
        p = _masses(tail, _row(scores)).flip(1)
        drop = _spare((p.cumsum(1) - p >= rule.value).flip(1), rule)
        # Which of the tied tokens at the edge go is only known where all of them are here.
        drop[:, :1] &= tail[:, :1] < tail.masked_fill(drop, float("inf")).amin(1, keepdim=True)
    elif kind == "top_h":
        drop = _top_h(tail, rule)
    else:
        limit = _LIMITS[kind](scores, rule)
        if kind != "min_p":  # which keeps as many as asked for, the others all that tie with the last of those
            limit = torch.minimum(limit, tail[:, -rule.min_tokens_to_keep, None])
        drop = _spare(tail < limit, rule)
    settled = drop[:, 0]
    if rule.filter_value == _MINUS_INFINITY and not bool(settled.all()):
        settled = settled | (tail[:, 0] == _MINUS_INFINITY)
    return _Tail(tail.masked_fill(drop, rule.filter_value), tokens, settled, limit)


def _tail_size(scores: torch.Tensor, rule: Rule) -> int:
    """How many tokens of a row to look at first; 0 for whole rows."""
    if rule.kind == "top_k":
        return int(rule.value) + max(14, int(rule.value) // 4)  # logits that once were bfloat16 tie a lot
    if rule.kind == "top_h":
        return _TOP_H_TOKENS + 1
    # Where next to nothing is dropped, all depends on how the smallest probabilities are rounded.
    everything = {"top_p": rule.value > 1 - 1e-6, "min_p": rule.value < 1e-30}.get(rule.kind, False)
    if everything or scores.dtype in (torch.float16, torch.bfloat16):
        return 0
    return max(64 if rule.kind in _LIMITS else 128, 2 * rule.min_tokens_to_keep)


def _search(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Top-p or typical where many tokens stay: only those near the edge, as far as a sample tells where, are sorted."""
    B = len(scores)
    typical = rule.kind == "typical"
    rank, row = _likeness(scores) if typical else (scores, _row(scores))
    one_in, heavy = 16, 128
    head, tokens = _tail(scores, heavy, False)
    # A few heavy tokens would mislead the sample, so they are all in it.
    weight = (row.p[:, ::one_in] * one_in).masked_fill_(scores[:, ::one_in] >= head[:, :1], 0.0)
    weight = torch.cat((row.p.gather(1, tokens), weight), 1)
    sample, order = torch.cat((rank.gather(1, tokens), rank[:, ::one_in]), 1).sort(1, descending=True)
    reached = weight.gather(1, order).cumsum(1)
    size = sample.shape[1]
    edge = (reached < rule.value * reached[:, -1:]).sum(1, keepdim=True)
    margin = 4 * math.isqrt(size)
    upper = sample.gather(1, (edge - margin).clamp(min=0)).masked_fill(edge < margin, float("inf"))
    lower = sample.gather(1, (edge + margin).clamp(max=size - 1)).masked_fill(edge + margin >= size, _MINUS_INFINITY)

    above = rank > upper
    near = (rank >= lower.clamp(min=torch.finfo(rank.dtype).min)) & ~above
    rows, tokens = near.nonzero(as_tuple=True)
    count = near.sum(1)
    width = int(count.max())
    place = torch.arange(len(rows)) + (width - count.cumsum(0))[rows]  # each row at the right end of its columns
    candidates = scores.new_full((B, width), _MINUS_INFINITY).index_put_((rows, place), rank[rows, tokens])
    p = scores.new_zeros((B, width)).index_put_((rows, place), row.p[rows, tokens])
    ids = tokens.new_zeros((B, width)).index_put_((rows, place), tokens)
    candidates, order = candidates.sort(stable=True, dim=1)
    p = (p.gather(1, order) / row.mass).double().flip(1)
    over = ((row.p * above).sum(1, keepdim=True) / row.mass).double()
    drop = (over + (p.cumsum(1) - p) >= rule.value).flip(1)
    kept = width - drop.sum(1, keepdim=True)
    last = candidates.gather(1, (width - kept).clamp(max=width - 1)) if width else lower
    found = (over < rule.value) & (kept > 0) & ((kept < count.unsqueeze(1)) | (lower == _MINUS_INFINITY))
    found &= kept + above.sum(1, keepdim=True) >= rule.min_tokens_to_keep

    out = torch.where(rank < last, rule.filter_value, scores)
    if not typical:  # of tied tokens only as many as it takes
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
    elif first.kind in _LIMITS and first.min_tokens_to_keep == 1 and scores.numel() < 1 << 18:
        # Some short passes take less than many small operations; what is kept is the same.
        limit = torch.minimum(_LIMITS[first.kind](scores, first), scores.amax(-1, keepdim=True))
        whole = torch.where(scores < limit, first.filter_value, scores)
    if whole is not None:
        return _truncate_chain(whole, rest) if rest else whole
    tail = _apply_to_tail(scores, first, size, bool(rest))
    if bool(tail.settled.all()):
        return _scattered(scores, tail, first, rest)
    missing = (~tail.settled).nonzero().squeeze(1)
    some = len(missing) < len(scores)
    left = scores[missing] if some else scores
    if tail.limit is not None:
        left = torch.where(left < (tail.limit[missing] if some else tail.limit), first.filter_value, left)
    elif first.kind == "top_h":
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


def _truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    if not rules or not scores.numel():
        return scores.clone(memory_format=torch.contiguous_format)
    return (_truncate_cpu if scores.device.type == "cpu" else reference_truncate)(scores, rules).contiguous()


def _run(scores: torch.Tensor, kinds: Sequence[int], *columns: Any) -> torch.Tensor:
    return _truncate(scores, [Rule(_KINDS[kind], *row) for kind, *row in zip(kinds, *columns, strict=True)])


register(
    "truncate(Tensor scores, int[] kinds, float[] values, int[] min_tokens_to_keep, float[] filter_values) -> Tensor",
    _run,
    lambda scores, *_: scores.new_empty(scores.shape),
)


def truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """``scores`` ``[B, V]`` with the tokens that a rule drops at its fill value, as a new contiguous tensor.

    Args:
        scores: float32, float16, bfloat16 or float64, any strides; never written.
        rules: applied in order, each to what the one before has left.
    """
    if torch.compiler.is_compiling():
        columns = [list(column) for column in zip(*rules, strict=True)] or [[]] * 4
        kinds = [_KINDS.index(kind) for kind in columns[0]]
        return torch.ops.fastlogits.truncate(scores, kinds, *columns[1:])  # type: ignore[no-any-return]
    return _truncate(scores, rules)
