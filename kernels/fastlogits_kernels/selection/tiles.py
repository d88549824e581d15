"""What a row comes to as a whole, tile by tile: the mass of each beside its largest logit, and of all of them.

Masses are integers, so that they don't depend on the order in which a kernel adds up, nor on which ranks share a tile.

Bytes moved: one read of the logits, and 12 bytes for each tile of 2048.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import LOG2_E, ONE

_PER_ONE = tl.constexpr(1 / ONE.value)
_UNDEFINED = tl.constexpr(-32768.0)  # sixteen times a tile of the largest probabilities, below 0


class Tile(NamedTuple):
    """The largest logit of a tile before the temperature, its mass, and its mass times distance from there; float32."""

    top: tl.tensor
    mass: tl.tensor
    below: tl.tensor


@triton.jit
def amounts_of(x, top, inverse, BELOW: tl.constexpr):
    """Mass of folded logits beside the largest one of their tile, and mass times distance, as integers.

    Several ranks may add up a tile together. Beside NaN or +inf the mass is below 0, whatever the others are.
    """
    off = (x - tl.where(top > float("-inf"), top, 0.0)) * inverse
    p = tl.exp2(off * LOG2_E)
    amount = tl.sum((tl.where(p == p, p, _UNDEFINED) * ONE).to(tl.int64))
    below = tl.zeros_like(amount)
    if BELOW:
        below = tl.sum(tl.where(p > 0, p * -off * ONE, 0.0).to(tl.int64))
    return amount, below


@triton.jit
def tile_with(top, amount, below):
    """A tile of these sums; its mass is NaN where they are undefined."""
    mass = tl.where(amount < 0, float("nan"), amount.to(tl.float32) * _PER_ONE)
    return Tile(top, mass, below.to(tl.float32) * _PER_ONE)


@triton.jit
def tile_of(x, inverse, BELOW: tl.constexpr):
    """A tile of folded logits; its mass is NaN beside NaN or +inf. A product serves in place of the division."""
    top = tl.max(x)
    amount, below = amounts_of(x, top, inverse, BELOW)
    return tile_with(top, amount, below)


@triton.jit
def joined(tile, top, inverse):
    """What a tile's mass, and its mass times distance, come to beside the largest logit of the row, as integers."""
    there = tile.mass > 0
    apart = tl.where(there, (top - tile.top) * inverse, 0.0)
    share = tl.where(there, tl.exp2(-apart * LOG2_E), 0.0).to(tl.float64) * ONE
    mass = (tl.where(there, tile.mass, 0.0).to(tl.float64) * share).to(tl.int64)
    below = (tl.where(there, tile.below + apart * tile.mass, 0.0).to(tl.float64) * share).to(tl.int64)
    return mass, below
