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
                   of the row's finite scores, with N - 1 as in the paper's code; where their squares overflow float32
                   all stay

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

from fastlogits_kernels._backend import has_gradient, wanted_on
from fastlogits_kernels._library import register
from fastlogits_kernels._rows import HOW_TO_REPEAT

RuleKind: TypeAlias = Literal["top_k", "top_p", "min_p", "typical", "epsilon", "eta", "top_h", "top_n_sigma"]
Ties: TypeAlias = Literal["all", "lowest"]
_KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
_TIES: tuple[Ties, ...] = get_args(Ties)
_MINUS_INFINITY = float("-inf")
_TOP_H_TOKENS = 100


class Rule(NamedTuple):
    """One truncation: what it keeps of the tokens that the rule before it has left."""

    kind: RuleKind
    value: float | torch.Tensor
    """k, or the parameter that the rule is named for: a number, or one for each row ``(B,)`` on the scores' device.

    Such a tensor is float32, or int32 or int64 for ``top_k``. A row whose value is outside these bounds is left as it
    is:

        top_k        1 <= k < V
        top_p        0 <= p < 1
        min_p        0 < min_p <= 1
        typical, epsilon, eta, top_h    0 < value < 1
        top_n_sigma  0 < n < inf

    So V, 1, 0, 1, 0, 0, 1 and inf turn the rules off. What lies beyond those, or is NaN, is refused where the tensor is
    on the CPU; on a device nothing can be raised without waiting for it, and the row is left as it is. A number has the
    meaning that transformers gives it: ``top_p`` 1.0 then drops tokens whose mass rounds to nothing, and ``top_h`` 1.0
    all but the 100 most likely.
    """
    min_tokens_to_keep: int = 1
    filter_value: float = _MINUS_INFINITY
    ties: Ties = "all"
    """Of tokens that tie at the edge, ``top_k`` keeps ``"all"``, and ``top_p`` as many as it takes, the ones with the
    largest ids. With ``"lowest"`` both keep as many as it takes, the ones with the lowest ids: ``top_k`` exactly k;
    tokens at -inf don't count, and stay where they reach the edge. The other rules know no such choice."""

    def describe(self) -> str:
        """In a few words."""
        value = "per row" if isinstance(self.value, torch.Tensor) else f"{self.value:g}"
        ties = ", lowest ids first" if self.ties == "lowest" and self.kind in ("top_k", "top_p") else ""
        return f"{self.kind.replace('_', '-')} {value}{ties}"


class Range(NamedTuple):
    """The values with which a rule acts, in a tensor of one for each row."""

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


_INFINITY = math.inf
RANGES: dict[RuleKind, Range] = {
    "top_k": Range(1, _INFINITY, "low", _INFINITY, "at least 1 (V or more turns it off)"),
    "top_p": Range(0, 1, "low", 1, "from 0 to 1 (1 turns it off)"),
    "min_p": Range(0, 1, "high", 0, "from 0 to 1 (0 turns it off)"),
    "typical": Range(0, 1, "neither", 1, "above 0 and at most 1 (1 turns it off)"),
    "epsilon": Range(0, 1, "neither", 0, "at least 0 and below 1 (0 turns it off)"),
    "eta": Range(0, 1, "neither", 0, "at least 0 and below 1 (0 turns it off)"),
    "top_h": Range(0, 1, "neither", 1, "above 0 and at most 1 (1 turns it off)"),
    "top_n_sigma": Range(0, _INFINITY, "neither", _INFINITY, "above 0 (inf turns it off)"),
}


def argument_of(kind: RuleKind) -> str:
    """What people call the parameter of a rule."""
    return "typical_p" if kind == "typical" else kind


def check_row_values(kind: RuleKind, value: torch.Tensor) -> None:
    """Refuse what can't be the value of a rule for each row.

    Raises:
        ValueError: not of shape ``(B,)``, of another dtype than ``Rule`` asks for, or, where the tensor is on the CPU,
            a value out of range.
    """
    name = argument_of(kind)
    if value.ndim != 1:
        raise ValueError(f"{name} must be a number or a tensor of shape (B,), got one of shape {tuple(value.shape)}")
    allowed = (torch.int32, torch.int64) if kind == "top_k" else (torch.float32,)
    if value.dtype not in allowed:
        one_of = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must be of {one_of} where it is given for each row, got {value.dtype}")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        values = RANGES[kind]
        refused = ~(values.has(value) | (value == values.off))
        if bool(refused.any()):
            row = int(refused.int().argmax())
            raise ValueError(f"{name} must be {values.words}, got {value[row].item():g} in row {row}")


def check_rules(scores: torch.Tensor, rules: Sequence[Rule]) -> None:
    """Refuse values per row that don't fit the scores ``[B, V]``.

    Raises:
        ValueError: see ``check_row_values``; or another number of rows, or another device.
    """
    for rule in rules:
        value = rule.value
        if isinstance(value, torch.Tensor):
            check_row_values(rule.kind, value)
            if len(value) != len(scores):
                raise ValueError(
                    f"{argument_of(rule.kind)} must be a number, or have a value for each of the {len(scores)} rows of "
                    f"scores, got {len(value)} values; {HOW_TO_REPEAT}"
                )
            if value.device != scores.device:
                raise ValueError(
                    f"{argument_of(rule.kind)} must be on {scores.device}, as scores are, got {value.device}; move it "
                    "there once, with .to(scores.device)"
                )


# -- Whole rows: what is dropped, bool [B, V]. The reference, and the path of CUDA: no host sync. ------------------
# A rule's value is a number, or a column [B, 1].

_Value: TypeAlias = "float | torch.Tensor"


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


def _of_tied(scores: torch.Tensor, drop: torch.Tensor, edge: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``drop``, but of the tokens that tie with the ``edge`` ``[B, 1]`` the first ``kept`` ``[B, 1]`` stay."""
    tied = (scores == edge) & (edge > _MINUS_INFINITY)
    return torch.where(tied, tied.cumsum(-1) > kept, drop)


def _first_of_tied(scores: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """As many dropped as in ``drop``, but of those that tie with the least kept one the first ones stay."""
    edge = scores.masked_fill(drop, _INFINITY).amin(-1, keepdim=True)
    return _of_tied(scores, drop, edge, ((scores == edge) & ~drop).sum(-1, keepdim=True))


def _top_k(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    V = scores.shape[-1]
    if isinstance(value, torch.Tensor):
        value = value.long().clamp(1, V)
        edge = scores.sort(descending=True).values.gather(1, value - 1)
    else:
        edge = _smallest_of_top(scores, int(value))
    drop = scores < edge
    if rule.ties == "lowest":
        return _of_tied(scores, drop, edge, value - (~(scores <= edge)).sum(-1, keepdim=True))  # NaN is the largest
    return drop


def _top_p(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    # In this order and from the small end, as transformers sums them.
    ascending, tokens = scores.sort(stable=True, dim=-1)
    rest = (1 - value.double()).to(scores.dtype) if isinstance(value, torch.Tensor) else 1 - value
    drop = ascending.softmax(-1).cumsum(-1) <= rest
    drop[:, -rule.min_tokens_to_keep :] = False
    drop = drop.scatter(1, tokens, drop)
    return _first_of_tied(scores, drop) if rule.ties == "lowest" else drop


def _min_p(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    p = scores.softmax(-1)
    drop: torch.Tensor = p < (value * p.amax(-1, keepdim=True)).to(p.dtype)
    if rule.min_tokens_to_keep > 1:  # the likeliest is never below
        drop.scatter_(1, p.topk(min(rule.min_tokens_to_keep, p.shape[-1])).indices, False)
    return drop


def _typical(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    logarithms = scores.log_softmax(-1)
    entropy = -(logarithms * logarithms.exp()).nansum(-1, keepdim=True)
    distance, tokens = (-logarithms - entropy).abs().sort(stable=True, dim=-1)
    reached = scores.gather(1, tokens).softmax(-1).cumsum(-1)
    last = (reached < _rounded(value, scores)).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(1, last)
    drop[:, : rule.min_tokens_to_keep] = False
    return drop.scatter(1, tokens, drop)


def _epsilon(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    unlikely: torch.Tensor = scores.softmax(-1) < _rounded(value, scores)
    return unlikely & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def _eta(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    _, entropy = _entropy(scores)
    # transformers has it as a tensor of the scores' dtype. A number's is of the CPU, whatever the scores' device.
    if isinstance(value, torch.Tensor):
        cutoff = torch.minimum(value.double().sqrt().to(scores.dtype) * torch.exp(-entropy), _rounded(value, scores))
    else:
        root = torch.tensor(math.sqrt(value), dtype=scores.dtype).item()
        cutoff = (root * torch.exp(-entropy)).clamp(max=value)
    return (scores.softmax(-1) < cutoff) & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def _top_h(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    top, tokens = scores.topk(min(_TOP_H_TOKENS, scores.shape[-1]))
    p, entropy = _entropy(top)
    drop = ~((-p * p.log()).cumsum(-1) <= (entropy * value).to(p.dtype))
    drop[:, 0] = False
    drop &= ~entropy.isnan()
    beyond = (~entropy.isnan()).expand(scores.shape)
    return beyond.scatter(1, tokens, drop)


def _top_n_sigma(scores: torch.Tensor, value: _Value, rule: Rule) -> torch.Tensor:
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    keep = _smallest_of_top(scores, rule.min_tokens_to_keep)
    return (wide < wide.amax(-1, keepdim=True) - value * _deviation(wide)) & (scores < keep)


def _rounded(value: _Value, scores: torch.Tensor) -> Any:
    """As a number is rounded that is compared with scores."""
    return value.to(scores.dtype) if isinstance(value, torch.Tensor) else value


def _deviation(scores: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the finite scores of each row ``[B, 1]``; NaN where there are fewer than two."""
    finite = scores.isfinite()
    count = finite.sum(-1, keepdim=True)
    mean = torch.where(finite, scores, 0.0).sum(-1, keepdim=True) / count
    apart = torch.where(finite, scores - mean, 0.0)
    return (apart.square().sum(-1, keepdim=True) / (count - 1)).sqrt()


_DROPS: dict[RuleKind, Callable[[torch.Tensor, _Value, Rule], torch.Tensor]] = {
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
        value = rule.value
        if isinstance(value, torch.Tensor):
            column = value.unsqueeze(1)
            drop = _DROPS[rule.kind](scores, column, rule) & RANGES[rule.kind].has(column)
        else:
            drop = _DROPS[rule.kind](scores, value, rule)
        scores = scores.masked_fill(drop, rule.filter_value)
    return scores


# -- The CPU: the most likely tokens of each row, in the order of a sorted row's end -------------------------------
# Rows that share their parameters go together, so that a rule's value is a number here.


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


def _limit_min_p(scores: torch.Tensor, value: float) -> torch.Tensor:
    top: torch.Tensor = scores.amax(-1, keepdim=True)
    return top + (top - top + math.log(value))  # NaN under an infinity, where probabilities are


def _limit_epsilon(scores: torch.Tensor, value: float) -> torch.Tensor:
    row = _row(scores)
    return row.top + (math.log(value) + row.total.log())


def _limit_eta(scores: torch.Tensor, value: float) -> torch.Tensor:
    row = _row(scores, scores - scores.amax(-1, keepdim=True))
    entropy = row.total.log() - row.mean
    logarithm = math.log(value)
    return row.top + ((logarithm / 2 - entropy).clamp(max=logarithm) + row.total.log())


def _limit_top_n_sigma(scores: torch.Tensor, value: float) -> torch.Tensor:
    # torch's own std takes several times as long, and so does leaving out what isn't finite.
    apart = scores - scores.mean(-1, keepdim=True)
    deviation: torch.Tensor = torch.linalg.vector_norm(apart, dim=-1, keepdim=True) / math.sqrt(
        max(1, scores.shape[1] - 1)
    )
    undefined = ~deviation.isfinite().squeeze(1)
    if bool(undefined.any()):
        deviation[undefined] = _deviation(scores[undefined])
    top: torch.Tensor = scores.amax(-1, keepdim=True)
    return top - value * deviation


_LIMITS: dict[RuleKind, Callable[[torch.Tensor, float], torch.Tensor]] = {
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
    kind, value, limit = rule.kind, _number(rule), None
    lowest = rule.ties == "lowest"
    if kind == "typical":
        likeness, row = _likeness(scores)
        likeness, tokens = row_tails(likeness, count, False)
        tail = scores.gather(1, tokens)
        last = (_masses(tail, row).flip(1).cumsum(1) < value).sum(1, keepdim=True)
        drop = _spare(likeness < likeness.gather(1, (count - 1 - last).clamp(min=0)), rule)
        settled = drop[:, 0]
        if ordered:
            tokens, order = tokens.sort(1)
            tail, drop = tail.gather(1, order), drop.gather(1, order)
        return _Tail(tail.masked_fill(drop, rule.filter_value), tokens, settled, None)
    tail, tokens = row_tails(scores, count, ordered or kind == "top_p" or lowest)
    if kind == "top_k":
        limit = tail[:, -int(value), None]
        drop = tail < limit
        if lowest:
            settled = drop[:, :1]
            drop = _of_tied(tail, drop, limit, value - (~(tail <= limit)).sum(1, keepdim=True))
            drop[:, :1] &= settled  # else not all that tie are here
            limit = None
    elif kind == "top_p":
        p = _masses(tail, _row(scores)).flip(1)
        drop = _spare((p.cumsum(1) - p >= value).flip(1), rule)
        if lowest:
            drop = _first_of_tied(tail, drop)
        # Which of the tied tokens at the edge go is only known where all of them are here.
        drop[:, :1] &= tail[:, :1] < tail.masked_fill(drop, float("inf")).amin(1, keepdim=True)
    elif kind == "top_h":
        drop = _top_h(tail, value, rule)
    else:
        limit = _LIMITS[kind](scores, value)
        if kind != "min_p":  # which keeps as many as asked for, the others all that tie with the last of those
            limit = torch.minimum(limit, tail[:, -rule.min_tokens_to_keep, None])
        drop = _spare(tail < limit, rule)
    settled = drop[:, 0]
    if rule.filter_value == _MINUS_INFINITY and not bool(settled.all()):
        settled = settled | (tail[:, 0] == _MINUS_INFINITY)
    return _Tail(tail.masked_fill(drop, rule.filter_value), tokens, settled, limit)


def _tail_size(scores: torch.Tensor, rule: Rule) -> int:
    """How many tokens of a row to look at first; 0 for whole rows."""
    value = _number(rule)
    if rule.kind == "top_k":
        return int(value) + max(14, int(value) // 4)  # logits that once were bfloat16 tie a lot
    if rule.kind == "top_h":
        return _TOP_H_TOKENS + 1
    # Where next to nothing is dropped, all depends on how the smallest probabilities are rounded.
    everything = {"top_p": value > 1 - 1e-6, "min_p": value < 1e-30}.get(rule.kind, False)
    if everything or scores.dtype in (torch.float16, torch.bfloat16):
        return 0
    return max(64 if rule.kind in _LIMITS else 128, 2 * rule.min_tokens_to_keep)


def _search(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Top-p or typical where many tokens stay: only those near the edge, as far as a sample tells where, are sorted."""
    B, value = len(scores), _number(rule)
    typical = rule.kind == "typical"
    rank, row = _likeness(scores) if typical else (scores, _row(scores))
    one_in, heavy = 16, 128
    head, tokens = row_tails(scores, heavy, False)
    # A few heavy tokens would mislead the sample, so they are all in it.
    weight = (row.p[:, ::one_in] * one_in).masked_fill_(scores[:, ::one_in] >= head[:, :1], 0.0)
    weight = torch.cat((row.p.gather(1, tokens), weight), 1)
    sample, order = torch.cat((rank.gather(1, tokens), rank[:, ::one_in]), 1).sort(1, descending=True)
    reached = weight.gather(1, order).cumsum(1)
    size = sample.shape[1]
    edge = (reached < value * reached[:, -1:]).sum(1, keepdim=True)
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
    drop = (over + (p.cumsum(1) - p) >= value).flip(1)
    kept = width - drop.sum(1, keepdim=True)
    last = candidates.gather(1, (width - kept).clamp(max=width - 1)) if width else lower
    found = (over < value) & (kept > 0) & ((kept < count.unsqueeze(1)) | (lower == _MINUS_INFINITY))
    found &= kept + above.sum(1, keepdim=True) >= rule.min_tokens_to_keep

    out = torch.where(rank < last, rule.filter_value, scores)
    if not typical:  # of tied tokens only as many as it takes
        if rule.ties == "lowest" and width:
            drop = _first_of_tied(candidates, drop)
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
        limit = torch.minimum(_LIMITS[first.kind](scores, _number(first)), scores.amax(-1, keepdim=True))
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


def _truncate_rows(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """The rows that share the values of their rules together, without those rules that are off."""
    if not any(isinstance(rule.value, torch.Tensor) for rule in rules):
        return _truncate_cpu(scores, rules)
    columns: list[list[float | None]] = []
    for rule in rules:
        if isinstance(rule.value, torch.Tensor):
            values = RANGES[rule.kind]
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


def _truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    check_rules(scores, rules)
    if not rules or not scores.numel():
        return scores.clone(memory_format=torch.contiguous_format)
    if scores.is_cuda or wanted_on(scores.device):
        from fastlogits_kernels import select  # which takes its rules from here

        if select.takes_rules(rules) and select.takes_scores(scores):
            return select.select(scores, select.Selection(rules, scores.shape[1], scores.device))
    return (_truncate_rows if scores.device.type == "cpu" else reference_truncate)(scores, rules).contiguous()


def _flattened(rules: Sequence[Rule]) -> list[list[Any]]:
    """Rules as the arguments of the operation: kinds, values, values per row and the other fields."""
    per_row = [rule.value if isinstance(rule.value, torch.Tensor) else None for rule in rules]
    values = [0.0 if isinstance(rule.value, torch.Tensor) else float(rule.value) for rule in rules]
    kinds = [_KINDS.index(rule.kind) for rule in rules]
    ties = [_TIES.index(rule.ties) for rule in rules]
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
            Rule(_KINDS[kind], value, keep, fill, _TIES[ties])
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
