"""Processors that map every logit alike: temperature, the removal of infinities, normalisation."""

from __future__ import annotations

import torch
from fastlogits_kernels.rules import TINY_TEMPERATURE
from transformers.generation import logits_process as theirs

from fastlogits.plan.stages import Clean, Normalise, Scale
from fastlogits.processors.base import StagedProcessor


class TemperatureLogitsWarper(StagedProcessor, theirs.TemperatureLogitsWarper):
    """Divide the scores by a temperature: below 1 the likely tokens become likelier, above 1 less so.

    Args:
        temperature: a float above 0. A lower one than 1e-30 counts as that: the largest logit has all the probability,
            where transformers' quotients overflow and its draw fails.

    Raises:
        ValueError: not a float, or not above 0.

    Example:
        >>> TemperatureLogitsWarper(0.5)(None, torch.tensor([[1.0, -2.0]]))
        tensor([[ 2., -4.]])
    """

    def stage(self) -> Scale:
        """A scale."""
        temperature = float(self.temperature)
        return Scale(TINY_TEMPERATURE if 0 < temperature < TINY_TEMPERATURE else temperature)


class InfNanRemoveLogitsProcessor(StagedProcessor, theirs.InfNanRemoveLogitsProcessor):
    """Write 0 for NaN and the largest finite values for the infinities, so that a broken model can't stop a run.

    Example:
        >>> InfNanRemoveLogitsProcessor()(None, torch.tensor([[float("nan"), 1.0]]))
        tensor([[0., 1.]])
    """

    def stage(self) -> Clean:
        """A map of every logit."""
        return Clean()


class LogitNormalization(StagedProcessor, theirs.LogitNormalization):
    """Turn scores into log-probabilities, as beam search expects them.

    Example:
        >>> LogitNormalization()(None, torch.zeros(1, 4)).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def stage(self) -> Normalise:
        """A normalisation of each row."""
        return Normalise("normalise", _log_softmax, "log-softmax", reads_history=False)


def _log_softmax(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.log_softmax(dim=-1)
