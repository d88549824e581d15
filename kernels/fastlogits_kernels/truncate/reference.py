"""What each rule drops, in torch on whole rows: the reference that the CPU path and the kernels are held to.

Also the path of CUDA where the kernels don't take a list: no host sync. A rule's value is a number, or a column
``[B, 1]``. What a rule keeps is what transformers' warper of that name keeps, ties and rows of NaN or -inf included:

    top_k          those not below the k-th largest score: all that tie with it
    top_p          the most likely ones until their mass reaches p; of those that tie at the cut-off as many as it
                   takes, the ones with the largest ids, where transformers has it as its sort comes out
    min_p          those at least ``min_p`` times as likely as the likeliest
    top_a          those of at least ``top_a`` times the square of the largest probability; a rule of our own
    typical        those whose surprise is nearest to the entropy, until their mass reaches the value: all that tie
    epsilon, eta   those at least as likely as a cutoff, fixed or lowered by the entropy
    top_h          of the 100 most likely ones, the first until their share of the entropy reaches the value
    top_n_sigma    those at most n standard deviations below the largest score (arXiv 2411.07641); the deviation is that
                   of the row's finite scores, with N - 1 as in the paper's code; where their squares overflow float32
                   all stay

Where the value of min_p, top_a or epsilon is below the smallest normal float32 number, logits are compared, as kernels
do; transformers keeps there what float32 can't tell from 0.

Where transformers refuses a row (NaN or nothing but -inf, for eta and top_h), the row stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

if TYPE_CHECKING:
    from fastlogits_kernels.rules import Rule

_MINUS_INFINITY = float("-inf")
_TINY = torch.finfo(torch.float32).tiny
TOP_H_TOKENS = 100
"""Of how many tokens, the most likely ones, top-h takes the entropy."""

Value: TypeAlias = "float | torch.Tensor"


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


def of_tied(scores: torch.Tensor, drop: torch.Tensor, cutoff: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``drop``, but of the tokens that tie with the ``cutoff`` ``[B, 1]`` the first ``kept`` ``[B, 1]`` stay."""
    tied = (scores == cutoff) & (cutoff > _MINUS_INFINITY)
    return torch.where(tied, tied.cumsum(-1) > kept, drop)


def first_of_tied(scores: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """As many dropped as in ``drop``, but of those that tie with the least kept one the first ones stay."""
    cutoff = scores.masked_fill(drop, math.inf).amin(-1, keepdim=True)
    return of_tied(scores, drop, cutoff, ((scores == cutoff) & ~drop).sum(-1, keepdim=True))


def drop_top_k(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    V = scores.shape[-1]
    if isinstance(value, torch.Tensor):
        value = value.long().clamp(1, V)
        cutoff = scores.sort(descending=True).values.gather(1, value - 1)
    else:
        cutoff = _smallest_of_top(scores, int(value))
    drop = scores < cutoff
    if rule.ties == "lowest":
        return of_tied(scores, drop, cutoff, value - (~(scores <= cutoff)).sum(-1, keepdim=True))  # NaN is the largest
    return drop


def drop_top_p(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    # In this order and from the small end, as transformers sums them.
    ascending, tokens = scores.sort(stable=True, dim=-1)
    rest = (1 - value.double()).to(scores.dtype) if isinstance(value, torch.Tensor) else 1 - value
    drop = ascending.softmax(-1).cumsum(-1) <= rest
    drop[:, -rule.min_tokens_to_keep :] = False
    drop = drop.scatter(1, tokens, drop)
    return first_of_tied(scores, drop) if rule.ties == "lowest" else drop


def _or_below(
    drop: torch.Tensor, scores: torch.Tensor, value: Value, limit: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """``drop``, but what is below a limit where ``value`` is no probability that the dtype holds.

    Probabilities as small are 0, and none of them is below a cut-off of 0: logits can tell them apart.
    """
    if scores.dtype not in (torch.float32, torch.bfloat16):
        return drop
    if isinstance(value, torch.Tensor):
        return torch.where((value > 0) & (value < _TINY), scores < limit(scores.float(), value), drop)
    return scores < limit(scores.float(), value) if 0 < value < _TINY else drop


def drop_min_p(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    p = scores.softmax(-1)
    drop: torch.Tensor = p < (value * p.amax(-1, keepdim=True)).to(p.dtype)
    drop = _or_below(drop, scores, value, limit_min_p)
    if rule.min_tokens_to_keep > 1:  # the likeliest is never below
        drop.scatter_(1, p.topk(min(rule.min_tokens_to_keep, p.shape[-1])).indices, False)
    return drop


def drop_top_a(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    """Tokens of less than ``value`` times the square of the largest probability (text-generation-webui's ``top_a``)."""
    p = scores.softmax(-1)
    unlikely: torch.Tensor = p < (value * p.amax(-1, keepdim=True).square()).to(p.dtype)
    unlikely = _or_below(unlikely, scores, value, limit_top_a)
    return unlikely & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def drop_typical(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    logarithms = scores.log_softmax(-1)
    entropy = -(logarithms * logarithms.exp()).nansum(-1, keepdim=True)
    distance, tokens = (-logarithms - entropy).abs().sort(stable=True, dim=-1)
    reached = scores.gather(1, tokens).softmax(-1).cumsum(-1)
    last = (reached < _rounded(value, scores)).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(1, last)
    drop[:, : rule.min_tokens_to_keep] = False
    return drop.scatter(1, tokens, drop)


def drop_epsilon(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    unlikely: torch.Tensor = scores.softmax(-1) < _rounded(value, scores)
    unlikely = _or_below(unlikely, scores, value, limit_epsilon)
    return unlikely & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def drop_eta(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    _, entropy = _entropy(scores)
    # transformers has it as a tensor of the scores' dtype. A number's is of the CPU, whatever the scores' device.
    if isinstance(value, torch.Tensor):
        cutoff = torch.minimum(value.double().sqrt().to(scores.dtype) * torch.exp(-entropy), _rounded(value, scores))
    else:
        root = torch.tensor(math.sqrt(value), dtype=scores.dtype).item()
        cutoff = (root * torch.exp(-entropy)).clamp(max=value)
    return (scores.softmax(-1) < cutoff) & (scores < _smallest_of_top(scores, rule.min_tokens_to_keep))


def drop_top_h(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    top, tokens = scores.topk(min(TOP_H_TOKENS, scores.shape[-1]))
    p, entropy = _entropy(top)
    drop = ~((-p * p.log()).cumsum(-1) <= (entropy * value).to(p.dtype))
    drop[:, 0] = False
    drop &= ~entropy.isnan()
    beyond = (~entropy.isnan()).expand(scores.shape)
    return beyond.scatter(1, tokens, drop)


def drop_top_n_sigma(scores: torch.Tensor, value: Value, rule: Rule) -> torch.Tensor:
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    keep = _smallest_of_top(scores, rule.min_tokens_to_keep)
    return (wide < wide.amax(-1, keepdim=True) - value * _deviation(wide)) & (scores < keep)


def _rounded(value: Value, scores: torch.Tensor) -> Any:
    """As a number is rounded that is compared with scores."""
    return value.to(scores.dtype) if isinstance(value, torch.Tensor) else value


def _deviation(scores: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the finite scores of each row ``[B, 1]``; NaN where there are fewer than two."""
    finite = scores.isfinite()
    count = finite.sum(-1, keepdim=True)
    mean = torch.where(finite, scores, 0.0).sum(-1, keepdim=True) / count
    apart = torch.where(finite, scores - mean, 0.0)
    return (apart.square().sum(-1, keepdim=True) / (count - 1)).sqrt()


def reference_truncate(scores: torch.Tensor, rules: Sequence[Rule]) -> torch.Tensor:
    """Rule after rule on whole rows, sorts and all."""
    for rule in rules:
        value = rule.value
        if isinstance(value, torch.Tensor):
            column = value.unsqueeze(1)
            drop = rule.spec.drop(scores, column, rule) & rule.spec.range.has(column)
        else:
            drop = rule.spec.drop(scores, value, rule)
        scores = scores.masked_fill(drop, rule.filter_value)
    return scores


# -- Sums of a row, and the scores below which a rule with a cut-off drops: the CPU path ----------------------------


class Row(NamedTuple):
    """Softmax of whole rows ``[B, V]``, and sums over them, each ``[B, 1]``."""

    p: torch.Tensor
    mass: torch.Tensor
    """Sum of ``p``, all but 1: softmax adds up its denominator element by element, and sum() doesn't."""
    top: torch.Tensor
    total: torch.Tensor
    """Sum of ``exp(score - top)``."""
    mean: torch.Tensor
    """Expectation of ``score - top``; NaN where not asked for."""


def row_of(scores: torch.Tensor, apart: torch.Tensor | None = None) -> Row:
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
    return Row(p, mass, top, mass / p.amax(-1, keepdim=True), mean)


def _logarithm(value: Value) -> Any:
    return value.double().log().float() if isinstance(value, torch.Tensor) else math.log(value)


def limit_min_p(scores: torch.Tensor, value: Value) -> torch.Tensor:
    top: torch.Tensor = scores.amax(-1, keepdim=True)
    limit: torch.Tensor = top + (top - top + _logarithm(value))  # NaN under an infinity, where probabilities are
    return limit


def limit_top_a(scores: torch.Tensor, value: Value) -> torch.Tensor:
    """Scores below which top-a drops: the largest probability is one over the total."""
    row = row_of(scores)
    limit: torch.Tensor = row.top + (_logarithm(value) - row.total.log())
    return limit


def limit_epsilon(scores: torch.Tensor, value: Value) -> torch.Tensor:
    row = row_of(scores)
    limit: torch.Tensor = row.top + (_logarithm(value) + row.total.log())
    return limit


def limit_eta(scores: torch.Tensor, value: float) -> torch.Tensor:
    row = row_of(scores, scores - scores.amax(-1, keepdim=True))
    entropy = row.total.log() - row.mean
    logarithm = math.log(value)
    return row.top + ((logarithm / 2 - entropy).clamp(max=logarithm) + row.total.log())


def limit_top_n_sigma(scores: torch.Tensor, value: float) -> torch.Tensor:
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
