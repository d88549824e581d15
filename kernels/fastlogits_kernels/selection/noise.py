"""The noise with which a token is sampled: ``fastlogits_kernels.draw`` defines it."""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import HIGHEST, LOG2_E, LOWEST, is_greedy, key_of

_COARSE, _FINE = (tl.constexpr(i) for i in range(2))  # the two calls of the generator


@triton.jit
def _random_words(block, seed, position, CALL: tl.constexpr):
    """Four random words of a block of tokens, of a request's seed and position."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = block * 0
    return tl.philox(
        seed, block.to(tl.uint32), (zero + low).to(tl.uint32), (zero + high).to(tl.uint32), (zero + CALL).to(tl.uint32)
    )


@triton.jit
def coarse_words(octet, seed, position):
    """The first 16 bits of eight tokens each, two in a word, the lower token in the lower half."""
    return _random_words(octet, seed, position, _COARSE)


@triton.jit
def coarse_of(token, words):
    """The first 16 bits of tokens, of the words of their octets."""
    pair = (token >> 1) & 3
    word = tl.where(pair == 0, words[0], tl.where(pair == 1, words[1], tl.where(pair == 2, words[2], words[3])))
    return (word >> (16 * (token & 1)).to(tl.uint32)) & 0xFFFF


@triton.jit
def least_coarse(words):
    """The least 16 bits of the tokens of an octet."""
    low = tl.minimum(tl.minimum(words[0] << 16, words[1] << 16), tl.minimum(words[2] << 16, words[3] << 16))
    high = tl.minimum(tl.minimum(words[0], words[1]), tl.minimum(words[2], words[3]))
    return tl.minimum(low, high) >> 16


@triton.jit
def exponential_of(u, rest):
    """-log(1 - u), where ``rest`` is 1 - u to all its digits."""
    z = u / (2 - u)
    y = z * z
    series = 2 * z * (1 + y * (1.0 / 3 + y * (0.2 + y * (1.0 / 7 + y * (1.0 / 9)))))
    return tl.where(u < 0.25, series, -tl.log(rest))


@triton.jit
def least_perturbed(x, coarse):
    """A lower bound of the perturbed logits of tokens, from the first 16 bits of their noise."""
    most = (coarse.to(tl.float32) + 1) * (2.0**-16)
    return x - tl.log(exponential_of(most, 1 - most))


@triton.jit
def noise_of(token, seed, position):
    """An exponential random number for each token, of a request's seed and position."""
    coarse = coarse_of(token, coarse_words(token >> 3, seed, position))
    words = _random_words(token >> 2, seed, position, _FINE)
    lane = token & 3
    fine = tl.where(lane == 0, words[0], tl.where(lane == 1, words[1], tl.where(lane == 2, words[2], words[3])))
    n = (coarse.to(tl.int64) << 32) | fine.to(tl.int64)
    u = (n.to(tl.float32) + 0.5) * (2.0**-48)
    rest = ((n ^ 0xFFFFFFFFFFFF).to(tl.float32) + 0.5) * (2.0**-48)
    return exponential_of(u, rest)


class WinTest(NamedTuple):
    """Which raw logits may win: see ``may_win``."""

    scale: tl.tensor
    offset: tl.tensor


@triton.jit
def may_win(coarse, x, test):
    """Whether tokens of raw logits may be sampled, by the first 16 bits of their noise.

    A token wins only if its noise is less than exp(x - best), where best is no more than the best key of all; and its
    noise is at least its first 16 bits as a number between 0 and 1. NaN may always.
    """
    return (coarse.to(tl.float32) >= tl.exp2(x * test.scale + test.offset)) == 0


@triton.jit
def load_seed(row, sampling):
    """A request's seed and position."""
    seed = tl.load(sampling.seeds_ptr + row * sampling.stride_seed).to(tl.int64)
    return seed, tl.load(sampling.positions_ptr + row * sampling.stride_position).to(tl.int64)


class Request(NamedTuple):
    """What a token is sampled with."""

    seed: tl.tensor
    position: tl.tensor
    greedy: tl.tensor


@triton.jit
def load_request(row, sampling, maps):
    """The seed and the position of a row, and whether it is greedy; zeros where no token is sampled."""
    greedy = tl.full([], False, tl.int1)
    seed, position = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if sampling.seeds_ptr is not None:
        seed, position = load_seed(row, sampling)
        if maps.temperature_ptr is not None:
            greedy = is_greedy(maps.temperature_ptr + row * maps.stride_temperature)
    return Request(seed, position, greedy)


@triton.jit
def win_test(best, inverse):
    """What ``may_win`` asks for, where ``best`` is at most the best perturbed logit of the row."""
    offset = 16.001 - best * LOG2_E + tl.abs(best) * 1e-6
    # Beside NaN or infinity only such tokens may win, and where nothing is known all but -inf.
    offset = tl.where(best < float("inf"), offset, float("-inf"))
    return WinTest(inverse * LOG2_E, tl.where(best > float("-inf"), offset, tl.where(best == best, 1e30, offset)))


@triton.jit
def perturbed_key(x, token, request):
    """The keys of perturbed logits, x - log(noise); of the logits themselves where the row is greedy."""
    key = key_of(x)
    if request.greedy == 0:
        key = key_of(x - tl.log(noise_of(token, request.seed, request.position)))
    return key


@triton.jit
def best_of(x, valid, token, request):
    """The largest key of perturbed logits, and the lowest token that has it; LOWEST and HIGHEST where there is none."""
    key = tl.where(valid, perturbed_key(x, token, request), LOWEST)
    best = tl.max(key)
    return best, tl.min(tl.where(valid & (key == best), token, HIGHEST))


@triton.jit
def store_token(ptr, token):
    """Write the token of a row: 0 where nothing was above -inf."""
    tl.store(ptr, tl.where(token == HIGHEST, 0, token).to(tl.int64))
