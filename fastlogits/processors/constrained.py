"""Generation that follows a function of the prefix."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from fastlogits_kernels.runtime.launcher import to_device
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor as _PrefixConstrained

from fastlogits.checks import check_rows
from fastlogits.plan.stages import Rows
from fastlogits.processors.base import StagedProcessor


class PrefixConstrainedLogitsProcessor(StagedProcessor, _PrefixConstrained):
    """Allow in each row only the tokens that a Python function returns for its prefix.

    The function runs on the host for every row and step, so a plan with this class can't be captured in a CUDA graph.
    The tokens of all rows are copied to the device at once, and the host doesn't wait for the copy.

    If all allowed tokens are -inf in all beams of a sequence, recent versions of transformers give them a score of 0,
    and older ones leave such rows at -inf. This class does what the installed version does.

    Args:
        prefix_allowed_tokens_fn: called with the index of the sequence in the batch and the row of ``input_ids``
            ``(L,)``; returns the allowed tokens, a list or a tensor.
        num_beams: beams of a sequence, neighbouring rows.

    Raises:
        ValueError: on a call, the function returned no token at all; ``input_ids`` of other rows than the scores, or
            rows that are no multiple of the beams.

    Source: De Cao et al., Autoregressive Entity Retrieval, 2020 (arXiv 2010.00904).

    Example:
        >>> processor = PrefixConstrainedLogitsProcessor(lambda batch_id, sent: [0, sent[-1].item()], num_beams=1)
        >>> processor(torch.tensor([[3, 2], [0, 1]]), torch.ones(2, 4))
        tensor([[1., -inf, 1., -inf],
                [1., 1., -inf, -inf]])
    """

    def stage(self) -> Rows:
        """A mask of its own for each row, built on the host."""
        function = partial(PrefixConstrainedLogitsProcessor._rows, self)
        return Rows("mask", function, f"allow what a function names for each prefix, {self._num_beams} beams")

    def _rows(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_rows("PrefixConstrainedLogitsProcessor", input_ids, scores)
        beams = self._num_beams
        if scores.shape[0] % beams:
            raise ValueError(f"scores must have a multiple of num_beams={beams} rows, got {scores.shape[0]}")
        batch = input_ids.shape[0] // beams
        mask = torch.full_like(scores, -float("inf"))
        allowed: list[torch.Tensor] = []
        for row in range(batch * beams):
            tokens = self._prefix_allowed_tokens_fn(row // beams, input_ids[row])
            if len(tokens) == 0:
                raise ValueError(
                    f"prefix_allowed_tokens_fn returned no tokens for sequence {row // beams} of the batch: it must "
                    "allow at least one"
                )
            if mask.is_cpu:
                mask[row, tokens] = 0
            else:
                allowed.append(_as_ids(tokens))
        if allowed:
            mask[_index(allowed, scores.device)] = 0
        processed = scores + mask
        if not _forces_hopeless():
            return processed
        hopeless = processed.amax(-1).isneginf().view(batch, beams).all(-1, keepdim=True)
        if mask.is_cpu and not hopeless.any():
            return processed
        return torch.where(hopeless.repeat_interleave(beams, 0), mask, processed)


def _as_ids(tokens: Any) -> torch.Tensor:
    """Ids ``(N,)``, from ids or from a boolean row."""
    ids = torch.as_tensor(tokens)
    return ids.nonzero().flatten() if ids.dtype == torch.bool else ids.flatten()


def _index(allowed: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens of all allowed tokens, on the device."""
    rows = torch.repeat_interleave(torch.arange(len(allowed)), torch.tensor([len(ids) for ids in allowed]))
    if all(ids.device == rows.device for ids in allowed):
        return to_device(rows, device), to_device(torch.cat(allowed), device)
    return to_device(rows, device), torch.cat([to_device(ids, device) for ids in allowed])


@cache
def _forces_hopeless() -> bool:
    """Whether the installed transformers forces allowed tokens that are all -inf."""
    processor = _PrefixConstrained(lambda batch_id, sent: [0], 1)
    scores = processor(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 2), -float("inf")))
    return bool(scores[0, 0] == 0)
