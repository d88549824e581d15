"""Diverse beam search, for the versions of transformers that still have it (4.57)."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import logits_process

__all__: list[str] = []

_HammingDiversity: Any = getattr(logits_process, "HammingDiversityLogitsProcessor", None)

if _HammingDiversity is not None:
    __all__ += ["HammingDiversityLogitsProcessor"]

    class HammingDiversityLogitsProcessor(_HammingDiversity):
        """Penalise the tokens that earlier beam groups have chosen at this step.

        ``generate`` calls it with two more arguments than other processors, so a plan runs it as it is.

        Args:
            diversity_penalty: subtracted from the score of a token for each earlier choice of it, a float above 0.
            num_beams: number of beams of a sequence, at least 2.
            num_beam_groups: number of groups of beams, from 2 to ``num_beams``.

        Raises:
            ValueError: an argument of another type or out of range.

        Source: Vijayakumar et al., Diverse Beam Search, 2016 (arXiv 1610.02424).

        Example:
            >>> processor = HammingDiversityLogitsProcessor(0.5, num_beams=2, num_beam_groups=2)
            >>> processor(torch.tensor([[5]]), torch.zeros(1, 3), torch.tensor([1, 0]), 1)
            tensor([[ 0.0000, -0.5000,  0.0000]])
        """

        def __call__(
            self, input_ids: torch.Tensor, scores: torch.Tensor, current_tokens: torch.Tensor, beam_group_idx: int
        ) -> torch.Tensor:
            """Process the scores of one beam group; the input is never written.

            Args:
                input_ids: not read.
                scores: scores of the group, ``(batch * beams of the group, V)``.
                current_tokens: tokens chosen at this step, int64 ``(batch * num_beams,)``.
                beam_group_idx: which group it is; groups before it have chosen.

            Returns:
                A new tensor, or ``scores`` itself for the first group.
            """
            start = beam_group_idx * self._num_sub_beams
            if start == 0:
                return scores
            batch = current_tokens.shape[0] // self._num_beams
            beams = min(start + self._num_sub_beams, self._num_beams) - start
            chosen = current_tokens[: batch * self._num_beams].view(batch, self._num_beams)[:, :start]
            times = (chosen.unsqueeze(2) == chosen.unsqueeze(1)).sum(2)  # [batch, start]
            penalty = (self._diversity_penalty * times).repeat_interleave(beams, 0)
            tokens = chosen.repeat_interleave(beams, 0)
            # A token chosen twice is written twice, with the same value.
            penalised = (scores[: batch * beams].gather(1, tokens) - penalty).to(scores.dtype)
            out = scores.clone()
            out[: batch * beams].scatter_(1, tokens, penalised)
            return out
