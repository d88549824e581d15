"""What a rank sends of a row: a head of four words, then entries of two words each.

An entry is a token that the rank's part of the row keeps, with its logit; or one of many tokens that tie, with its
place among them. After the last entry there are zeros.
"""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl

HEAD = tl.constexpr(4)
TOKENS_AT = tl.constexpr(0)  # how many entries are tokens with their logits, float32
RECORDS_AT = tl.constexpr(1)  # how many entries after these are tokens that tie, each with its place
TIE_AT = tl.constexpr(2)  # the logit of those
TIED_AT = tl.constexpr(3)  # how many tie

NOBODY = tl.constexpr(-(2**63))
"""Below each number of 64 bits that stands for a token."""
RECORDS = 64
"""Room for tokens that tie. Of a million, more than that are needed once in 10**20 rows."""


def capacity_of(k: int) -> int:
    """Entries of a row where its ``k`` most likely tokens are sent: a power of two."""
    return 1 << (k + RECORDS - 2).bit_length()


def words_of(capacity: int) -> int:
    """Words of 32 bits of a row of so many entries."""
    head: int = HEAD.value
    return head + 2 * capacity
