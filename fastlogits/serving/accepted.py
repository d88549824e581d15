"""What is kept of a step's drafts."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Accepted(NamedTuple):
    """The tokens that a step of drafts gives to each request."""

    tokens: torch.Tensor
    """The token of each row that counts, int64 ``[rows]``; -1 in rows behind a wrong draft, and in rows of no request.
    """
    kept: torch.Tensor
    """How many drafts the row's request keeps, int32 ``[rows]``: the same in all its rows. It gets one token more."""
