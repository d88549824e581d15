"""How well draws fit a distribution."""

import torch

LEAST = 20.0
"""Of which a cell expects fewer draws is pooled with the others of that kind."""


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The probability of a fit no better than that of some draws, if they follow the distribution.

    Args:
        counts: how often each token was drawn, ``[V]``.
        p: the probability of each token, ``[V]``.

    Raises:
        AssertionError: a token was drawn that has none.
    """
    counts, p = counts.double().cpu(), p.double().cpu()
    expected = p * counts.sum()
    assert not bool(counts[p == 0].any()), "a dropped token was drawn"
    common = expected >= LEAST
    cells = [(counts[common], expected[common])]
    if float(expected[~common].sum()) > 0:
        cells.append((counts[~common].sum()[None], expected[~common].sum()[None]))
    found, right = (torch.cat(column) for column in zip(*cells, strict=True))
    statistic = ((found - right).square() / right).sum()
    return tail_of(float(statistic), len(found) - 1)


def tail_of(statistic: float, freedom: int) -> float:
    """The probability that a chi-square of so many degrees of freedom is larger; 1 where there are none."""
    if not freedom:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
