"""Sample a token of each row of logits, the same one in whatever batch the row stands.

    token[b] = argmax over v of x[b, v] - log(E[b, v]),   E exponential,   the lowest v on ties

which follows the softmax of the row (the Gumbel-max trick). The noise is a function of the request's seed, the position
that the token will take, and the token id alone:

    coarse = philox4x32-10(key = (seed low, seed high), counter = (v // 8, position low, position high, 0))
    fine   = philox4x32-10(key = (seed low, seed high), counter = (v // 4, position low, position high, 1))
    n = (coarse[v % 8 // 2] >> 16 * (v % 2)) % 2**16 * 2**32 + fine[v % 4]
    u = (n + 0.5) * 2**-48;   E = -log1p(-u);   E in float32

where low and high are the 32-bit halves of the integers in two's complement (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011). E is at least 2**-49 and less than 34. A greedy row takes argmax of x itself.

The noise comes in two stages because few tokens can win. One call of the generator gives the first 16 bits of eight
tokens, so that u is known to 2**-16. A token wins only if E < exp(x - best), where best is at most the largest key of
all; and E >= u. Only tokens whose first bits allow it ask for the other 32.

Tokens of -inf are never sampled where there is another. Rows that have no distribution get a defined token, whatever
the noise: the lowest id of NaN where there is one, else the lowest of +inf where there is one, else 0 where all are
-inf.

Bytes moved on the CPU: three reads of the logits; noise is made only for tokens above -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch

from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.truncate.cpu import row_tails

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BITS = 48
_FEW = 64
_CHUNK = 1 << 18
"""Tokens whose noise is made at once on the CPU, so that it stays in the cache."""


# -- The noise -------------------------------------------------------------------------------------------------------


def philox(key: Sequence[torch.Tensor], counter: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The four words of Philox4x32-10 for each of many counters.

    Args:
        key: two int64 tensors of 32-bit words, broadcastable with the counter's.
        counter: four of them.

    Returns:
        Four int64 tensors of 32-bit words.

    Example:
        >>> zero = torch.tensor(0)
        >>> [hex(int(word)) for word in philox((zero, zero), (zero, zero, zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(_ROUNDS):
        # int64 products wrap, and leave all 64 bits as they are in unsigned arithmetic.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (second >> 32) & _MASK ^ b ^ k0, (first >> 32) & _MASK ^ d ^ k1
        b, d = second & _MASK, first & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


def _halves(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = value.long()
    return value & _MASK, (value >> 32) & _MASK


def _exponential(n: torch.Tensor) -> torch.Tensor:
    """``E`` of integers of 48 bits; of 1 - u too all digits count."""
    u, rest = ((each.float() + 0.5) * 2.0**-_BITS for each in (n, n ^ ((1 << _BITS) - 1)))
    return -torch.where(u < 0.5, torch.log1p(-u), rest.log())


def _counter(blocks: torch.Tensor, positions: torch.Tensor, call: int) -> tuple[torch.Tensor, ...]:
    return (blocks, *_halves(positions), torch.full_like(blocks, call))


def exponential_noise(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``E`` of some tokens, float32.

    Args:
        seeds: integers, broadcastable with ``tokens``.
        positions: integers, broadcastable with ``tokens``.
        tokens: token ids, int64.
    """
    coarse = torch.stack(philox(_halves(seeds), _counter(tokens // 8, positions, 0)))
    coarse = coarse.gather(0, (tokens % 8 // 2).unsqueeze(0))[0] >> 16 * (tokens % 2) & 0xFFFF
    fine = torch.stack(philox(_halves(seeds), _counter(tokens // 4, positions, 1)))
    return _exponential(coarse << 32 | fine.gather(0, (tokens % 4).unsqueeze(0))[0])


def _coarse_of_rows(seeds: torch.Tensor, positions: torch.Tensor, V: int) -> torch.Tensor:
    """The first 16 bits of all tokens of some rows, int64 ``[B, V]``: eight from each counter."""
    blocks = torch.arange((V + 7) // 8, device=seeds.device)
    words = torch.stack(philox(_halves(seeds[:, None]), _counter(blocks, positions[:, None], 0)), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, :V]


def _noise_of_rows(seeds: torch.Tensor, positions: torch.Tensor, V: int) -> torch.Tensor:
    """``E`` of all tokens of some rows, ``[B, V]``."""
    blocks = torch.arange((V + 3) // 4, device=seeds.device)
    fine = torch.stack(philox(_halves(seeds[:, None]), _counter(blocks, positions[:, None], 1)), -1).flatten(1)[:, :V]
    return _exponential(_coarse_of_rows(seeds, positions, V) << 32 | fine)


# -- The token --------------------------------------------------------------------------------------------------------


def reference_draw(
    scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, greedy: torch.Tensor | None = None
) -> torch.Tensor:
    """A token of each row ``[B]``, int64, as the module says; no host sync on CUDA.

    Args:
        scores: float32 ``[B, V]`` with V at least 1; what has been dropped is at -inf.
        seeds: integers ``[B]``.
        positions: integers ``[B]``.
        greedy: bool ``[B]``: the rows that take their largest score; None where none does.
    """
    B, V = scores.shape
    if not B:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    # argmax gives the lowest id on ties, and of NaN.
    top = scores.amax(-1)
    argmax_only = ~top.isfinite() if greedy is None else ~top.isfinite() | greedy
    if scores.device.type != "cpu":
        keys = scores - _noise_of_rows(seeds, positions, V).log()
        return torch.where(argmax_only, scores.argmax(-1), keys.argmax(-1))
    if not bool(argmax_only.any()):
        return _sample_rows(scores, seeds, positions)
    tokens = scores.argmax(-1)
    rows = (~argmax_only).nonzero().squeeze(1)
    if len(rows):
        tokens[rows] = _sample_rows(scores[rows], seeds[rows], positions[rows])
    return tokens


def _sample_rows(scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows that have a distribution, on the CPU."""
    V = scores.shape[1]
    if V >= 4 * _FEW:
        values, tokens = row_tails(scores, _FEW, False)
        if bool((values[:, 0] == float("-inf")).all()):  # so that all others are here
            keys = values - exponential_noise(seeds[:, None], positions[:, None], tokens).log()
            return torch.where(keys == keys.amax(1, keepdim=True), tokens, V).amin(1)
    sampled = []
    for some, seed, position in zip(
        *(each.split(max(1, _CHUNK // V)) for each in (scores, seeds, positions)), strict=True
    ):
        sampled.append(_sample_from_many(some, seed, position))
    return torch.cat(sampled)


def _sample_from_many(scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of which more than a few tokens are kept."""
    V = scores.shape[1]
    if V < 8 * _FEW:
        return (scores - _noise_of_rows(seeds, positions, V).log()).argmax(-1)
    coarse = _coarse_of_rows(seeds, positions, V)
    # With all that its noise may come to, a token's key is at least that; the best of these bounds the noise of others.
    best = (scores - _largest_log()[coarse]).amax(-1, keepdim=True)
    limit = (scores - best).mul_(_LOG2_E).add_(_MARGIN).exp2_()
    rows, ids = (coarse < limit).nonzero(as_tuple=True)
    keys = scores[rows, ids] - exponential_noise(seeds[rows], positions[rows], ids).log()
    best = scores.new_full(seeds.shape, float("-inf")).scatter_reduce(0, rows, keys, "amax")
    winners = torch.where(keys == best[rows], ids, V)
    return ids.new_full(seeds.shape, V).scatter_reduce(0, rows, winners, "amin")


_LOG2_E = math.log2(math.e)
_MARGIN = 16.001
"""The first 16 bits as a number, and what exp2 is rounded by."""


@cache
def _largest_log() -> torch.Tensor:
    """The logarithm of the largest noise that tokens of some first 16 bits may have; infinite for the last."""
    return (-torch.log1p(-torch.arange(1, 65537, dtype=torch.float64) / 65536)).log().float()


def _fake_draw(scores: torch.Tensor, *_: object) -> torch.Tensor:
    return scores.new_empty(scores.shape[:1], dtype=torch.int64)


register("draw(Tensor scores, Tensor seeds, Tensor positions, Tensor? greedy) -> Tensor", reference_draw, _fake_draw)


def draw(
    scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, greedy: torch.Tensor | None = None
) -> torch.Tensor:
    """See ``reference_draw``."""
    if torch.compiler.is_compiling():
        return torch.ops.fastlogits.draw(scores, seeds, positions, greedy)  # type: ignore[no-any-return]
    return reference_draw(scores, seeds, positions, greedy)
