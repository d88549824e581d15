"""Attention of a step's few new tokens, without copies of the cache for heads that share keys and values.

Where several heads read the same keys and values and there is a mask, transformers repeats keys and values for each
head: a static cache of 64 rows is then copied twice in every layer. Here the queries of such heads become more queries
of one head, which is the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa"

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@contextmanager
def grouped() -> Iterator[None]:
    """Let models that ask transformers for ``sdpa`` attend in groups.

    What other threads attend to meanwhile may be grouped too, with the same result up to rounding.
    """
    plain: Attention = ALL_ATTENTION_FUNCTIONS[_NAME]
    if plain is _grouped or _NAME in ALL_ATTENTION_FUNCTIONS._local_mapping:
        yield  # somebody has put an attention of their own there
        return
    ALL_ATTENTION_FUNCTIONS[_NAME] = _grouped
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop(_NAME, None)


def _grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers' ``sdpa`` does, for queries ``[B, H, L, D]`` and keys and values ``[B, H / groups, N, D]``."""
    groups = getattr(module, "num_key_value_groups", 1)
    extras = {name for name in ("softcap", "position_bias", "cache", "s_aux") if others.get(name) is not None}
    if groups == 1 or attention_mask is None or attention_mask.ndim != 4 or attention_mask.shape[1] != 1 or extras:
        plain: Attention = ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME]
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )  # fmt: skip
    B, H, L, D = query.shape
    mask = attention_mask.unsqueeze(2).expand(-1, 1, groups, -1, -1).flatten(2, 3)  # [B, 1, groups * L, N]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(B, H // groups, groups * L, D), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(B, H, L, -1).transpose(1, 2).contiguous(), None
