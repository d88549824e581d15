"""What truncations keep, row by row in float64, with as much freedom as rounding in float32 takes; and hard rows.

``check_truncation(scores, rules, result)`` is the judge of every backend. A rule cuts a row at one place of an order;
where float32 can't tell on which side of the cut a token lies, either side is right, and nowhere else.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastlogits_kernels.rules import RULES, Rule
from fastlogits_kernels.truncate.reference import reference_truncate

INF = float("inf")
EPS = torch.finfo(torch.float32).eps
MASS = 2e-6
"""How far float32 sums of probabilities may be off."""


class Cut(NamedTuple):
    """What a rule drops of one row, bool ``[V]`` each."""

    exact: torch.Tensor
    least: torch.Tensor
    """What float32 has to drop."""
    most: torch.Tensor
    """What it may drop."""


def is_broken(row: torch.Tensor) -> bool:
    """Whether a row has no distribution: a NaN, a +inf, or nothing but -inf."""
    return bool(row.isnan().any() | (row == INF).any() | (row == -INF).all())


def rules_of_row(rules: Sequence[Rule], row: int) -> list[Rule]:
    """The rules with the values of one row, without those that are off."""
    of_row = []
    for rule in rules:
        if isinstance(rule.value, torch.Tensor):
            value = rule.value[row].item()
            if RULES[rule.kind].range.has(value):
                of_row.append(rule._replace(value=value))
        else:
            of_row.append(rule)
    return of_row


def check_truncation(scores: torch.Tensor, rules: Sequence[Rule], result: torch.Tensor) -> None:
    """Fail unless ``result`` ``[B, V]`` is what the rules leave of ``scores``, up to rounding at the cut-off."""
    assert result.shape == scores.shape
    assert result.dtype == scores.dtype
    scores, result = scores.detach().cpu(), result.detach().cpu()
    for b, (row, found) in enumerate(zip(scores, result, strict=True)):
        mine = rules_of_row(rules, b)
        context = f"row {b} of {len(scores)}, V = {row.shape[0]}, " + ", ".join(rule.describe() for rule in mine)
        possible = possible_rows(row, mine, found)
        allowed = torch.zeros(row.shape, dtype=torch.bool)
        for each in possible:
            allowed |= (found.double() == each) | (found.isnan() & each.isnan())
        if not bool(allowed.all()):
            wrong = (~allowed).nonzero().flatten()
            token = int(wrong[0])
            raise AssertionError(
                f"{context}: {len(wrong)} tokens are wrong; the first, {token}, of {row[token].item()!r}, has become "
                f"{found[token].item()!r}, where only {[each[token].item() for each in possible]} are right"
            )
        if all(map(_goes_by_value, mine)) and not is_broken(row):
            dropped = (found == -INF) & (row > -INF)
            if bool(dropped.any()) and bool((found > -INF).any()):
                least = row[found > -INF].min()
                assert row[dropped].max() <= least, f"{context}: a likelier token goes and a less likely one stays"


def _goes_by_value(rule: Rule) -> bool:
    """Whether a rule keeps the likelier first; to min-p, tokens whose probability is nothing are equal."""
    undecided = rule.kind == "min_p" and rule.min_tokens_to_keep > 1
    return rule.kind != "typical" and rule.filter_value == -INF and not undecided


def check_mass(scores: torch.Tensor, p: float, result: torch.Tensor) -> None:
    """Fail where the nucleus holds less than ``p``, or could do with a token less."""
    mass = scores.detach().cpu().double().softmax(-1)
    kept = result.detach().cpu() > -INF
    held = (mass * kept).sum(-1)
    least = mass.masked_fill(~kept, INF).amin(-1)
    assert bool((held >= p - MASS).all()), f"only {float(held.min())} is held of {p}"
    assert bool(((held - least < p + MASS) | (kept.sum(-1) == 1)).all()), f"a token too many for {p}"


def possible_rows(row: torch.Tensor, rules: Sequence[Rule], found: torch.Tensor) -> list[torch.Tensor]:
    """Rows that may come out, float64 ``[V]``: the exact one, and those with as few and as many tokens as may be.

    Where a rule leaves open which of equal tokens it keeps, they are those of the row that was ``found``.
    """
    wide = row.double()
    if is_broken(wide):
        # Their definition is the reference, which is transformers.
        return [reference_truncate(row[None], rules)[0].double()]
    variants = [wide, wide, wide]
    for rule in rules:
        cuts = [None if is_broken(each) else _cut(each, rule, found.double()) for each in variants]
        exact, fewest, most = (
            each if cut is None else each.masked_fill(drop, rule.filter_value)
            for each, cut, drop in zip(
                variants,
                cuts,
                (cut and getattr(cut, which) for cut, which in zip(cuts, ("exact", "most", "least"), strict=True)),
                strict=True,
            )
        )
        variants = [exact, fewest, most]
    return variants


# -- The rules, of one row in float64 that has a distribution --------------------------------------------------------


def _value(rule: Rule) -> float:
    assert not isinstance(rule.value, torch.Tensor)
    return float(rule.value)


def _kth(row: torch.Tensor, count: int) -> torch.Tensor:
    return row.topk(min(count, row.shape[0])).values[-1]


def _slack(row: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """How far a limit among the scores may be off: by some float32 steps of what it is made of."""
    top = row.max()
    return 1e-6 + 2 * EPS * (top.abs() + (limit - top).abs() + limit.abs())


def _below(row: torch.Tensor, limit: torch.Tensor, slack: torch.Tensor, stay: torch.Tensor) -> Cut:
    """What is below a limit goes, but for what stays anyway."""
    return Cut((row < limit) & ~stay, (row < limit - slack) & ~stay, (row < limit + slack) & ~stay & (row < row.max()))


def _ordered(row: torch.Tensor, lowest: bool) -> torch.Tensor:
    """The tokens, the likeliest first; of equal ones the largest ids first, or the ``lowest``."""
    if lowest:
        return row.sort(descending=True, stable=True).indices
    return row.sort(stable=True).indices.flip(0)


def _top_k(row: torch.Tensor, rule: Rule) -> Cut:
    if rule.ties == "lowest":
        drop = torch.ones(row.shape, dtype=torch.bool)
        drop[_ordered(row, True)[: int(_value(rule))]] = False
        if _kth(row, int(_value(rule))) == -INF:
            drop &= row > -INF  # nothing to choose between
    else:
        drop = row < _kth(row, int(_value(rule)))
    return Cut(drop, drop, drop)


def _top_p(row: torch.Tensor, rule: Rule) -> Cut:
    tokens, value = _ordered(row, rule.ties == "lowest"), _value(rule)
    p = row.softmax(-1)[tokens]
    before = p.cumsum(0) - p
    drops = []
    for limit in (value, value + MASS, value - MASS):
        drop = before >= limit
        drop[: rule.min_tokens_to_keep] = False
        drops.append(torch.zeros_like(drop).scatter(0, tokens, drop))
    return Cut(*drops)


def _min_p(row: torch.Tensor, rule: Rule) -> Cut:
    value = _value(rule)
    limit = row.max() + (math.log(value) if value else -INF)
    p = row.softmax(-1).float()
    p[p < 1e-37] = 0  # what float32 can't tell from it
    kth = _kth(p, rule.min_tokens_to_keep)
    cut = _below(row, limit, _slack(row, limit.clamp(min=-1e30)), p > kth)
    # Which ones of equal tokens make up the least number is left open.
    return Cut(cut.exact & (p < kth), cut.least & (p < kth), cut.most)


def _top_a(row: torch.Tensor, rule: Rule) -> Cut:
    # The largest probability is that of the likeliest token over the mass of all.
    value = _value(rule)
    limit = 2 * row.max() - row.logsumexp(-1) + (math.log(value) if value else -INF)
    return _below(row, limit, _slack(row, limit.clamp(min=-1e30)), row >= _kth(row, rule.min_tokens_to_keep))


def _typical(row: torch.Tensor, rule: Rule) -> Cut:
    value, keep = _value(rule), rule.min_tokens_to_keep
    surprise = -row.log_softmax(-1)
    p = row.softmax(-1)
    entropy = (surprise.masked_fill(p == 0, 0) * p).sum()
    distance = (surprise - entropy).abs()
    order = distance.sort(stable=True).indices
    before = p[order].cumsum(0) - p[order]
    last = []
    for limit in (value, value + MASS, value - MASS):
        count = max(1, keep, int((before < limit).sum()))
        last.append(order[min(count, row.shape[0]) - 1])
    limits = distance[torch.stack(last)]
    slack = 2e-6 * (1 + entropy) + 4 * EPS * (row.max().abs() + limits[0])
    most = distance > limits[2] - slack
    near = row[(distance - limits[2]).abs() <= slack]
    if keep == 1 and bool((near == near[0]).all()):
        most &= row != near[0]  # equal tokens stay together, however their distance is rounded
    return Cut(distance > limits[0], distance > limits[1] + slack, most)


def _epsilon(row: torch.Tensor, rule: Rule) -> Cut:
    limit = row.logsumexp(-1) + math.log(_value(rule))
    return _below(row, limit, _slack(row, limit), row >= _kth(row, rule.min_tokens_to_keep))


def _eta(row: torch.Tensor, rule: Rule) -> Cut:
    logarithm, p = math.log(_value(rule)), row.softmax(-1)
    entropy = -(row.log_softmax(-1).masked_fill(p == 0, 0) * p).sum()
    limit = row.logsumexp(-1) + min(logarithm, float(logarithm / 2 - entropy))
    slack = _slack(row, limit) + 2e-6 * (1 + entropy)
    return _below(row, limit, slack, row >= _kth(row, rule.min_tokens_to_keep))


def _top_h(row: torch.Tensor, rule: Rule, found: torch.Tensor) -> Cut:
    preferred = (found == row).int() * 2 + (found != rule.filter_value)
    order = preferred.sort(descending=True, stable=True).indices
    tokens = order[row[order].sort(descending=True, stable=True).indices[:100]]
    top = row[tokens]
    p = top.softmax(-1)
    terms = -p * p.log()
    entropy = terms.nansum()
    share, slack = entropy * _value(rule), MASS * (1 + entropy) + EPS * row.max().abs()
    drops = []
    # 0 * log(0) is NaN, so that none stays whose probability is nothing in float32; the least ones may be nothing.
    for limit, nothing in ((share, 1e-46), (share + slack, 1e-46), (share - slack, 1e-37)):
        stays = terms.masked_fill(p < nothing, math.nan).cumsum(0) <= limit
        stays[0] = True
        drop = torch.ones(row.shape, dtype=torch.bool)
        drop[tokens[stays]] = False
        drops.append(drop)
    return Cut(*drops)


def _top_n_sigma(row: torch.Tensor, rule: Rule) -> Cut:
    finite = row[row.isfinite()]
    stay = row >= _kth(row, rule.min_tokens_to_keep)
    if len(finite) < 2 or (finite - finite.mean()).square().sum() > torch.finfo(torch.float32).max:
        nothing = torch.zeros(row.shape, dtype=torch.bool)
        return Cut(nothing, nothing, nothing)
    spread = _value(rule) * finite.std()
    limit = row.max() - spread
    return _below(row, limit, _slack(row, limit) + 1e-5 * spread, stay)


_CUTS = {
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "top_a": _top_a,
    "typical": _typical,
    "epsilon": _epsilon,
    "eta": _eta,
    "top_n_sigma": _top_n_sigma,
}


def _cut(row: torch.Tensor, rule: Rule, found: torch.Tensor) -> Cut:
    return _top_h(row, rule, found) if rule.kind == "top_h" else _CUTS[rule.kind](row, rule)


# -- Rows that are made to trip a truncation -------------------------------------------------------------------------


def _spike(V: int, p: float) -> torch.Tensor:
    """One token of probability ``p`` over a flat tail."""
    row = torch.zeros(V)
    row[V // 3] = math.log(p / (1 - p) * max(1, V - 1))
    return row


def hard_rows(V: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows that have a distribution, float32 ``[V]`` each."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(V, generator=generator) * 3
    zipf = -1.5 * torch.log(torch.randperm(V, generator=generator) + 1.0)
    few = torch.full((V,), -INF)
    few[:: max(1, V // 3)] = gauss[:: max(1, V // 3)]
    alone = torch.full((V,), -INF)
    alone[V // 2] = -7.0
    return {
        "gauss": gauss,
        "zipf": zipf,
        "flat": gauss * 0.003,
        "equal": torch.full((V,), 1.5),
        "ties": gauss.bfloat16().float(),
        "two values": (gauss > 0).float(),
        "spike .95": _spike(V, 0.95),
        "spike .50": _spike(V, 0.5),
        "masked": gauss.masked_fill(torch.rand(V, generator=generator) < 0.5, -INF),
        "few": few,
        "alone": alone,
        "far": gauss + 1000,
        "low": gauss - 1e4,
        "wide": gauss * 40,
        "zeros of both signs": torch.where(gauss > 0, 0.0, -0.0),
        "lowest finite": gauss.masked_fill(gauss < 0, torch.finfo(torch.float32).min),
    }


def broken_rows(V: int) -> dict[str, torch.Tensor]:
    """Rows without a distribution, float32 ``[V]`` each."""
    gauss = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 3
    one, all_but, infinite, infinities = (gauss.clone() for _ in range(4))
    one[V // 2] = math.nan
    all_but[: V // 2] = math.nan
    infinite[V // 3] = INF
    infinities[[0, V // 2, V - 1]] = INF
    return {
        "nan": one,
        "half nan": all_but,
        "all nan": torch.full((V,), math.nan),
        "inf": infinite,
        "infs": infinities,
        "all -inf": torch.full((V,), -INF),
    }
