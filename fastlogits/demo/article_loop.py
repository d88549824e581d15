"""The published processor, kept as the baseline of the demo, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.generation.logits_process import LogitsProcessor


class ArticleLoop(LogitsProcessor):
    """Forbids tokens at the first step as the article does: it writes its input, with one assignment for each id.

    Args:
        ids: tokens to forbid.
        prompt_length: tokens of the prompt. The published code reads it from a global variable, set before each run.
    """

    def __init__(self, ids: Iterable[int], prompt_length: int) -> None:
        self.ids = list(ids)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` itself, with -inf for the ids at the first step."""
        if input_ids.shape[-1] == self.prompt_length:
            for id_ in self.ids:
                scores[:, id_] = float("-inf")
        return scores
