"""Processors that treat all logits alike: temperature, the removal of infinities, normalisation."""

from __future__ import annotations

import torch
from fastlogits_kernels.rules import TINY_TEMPERATURE
from transformers.generation import logits_process as theirs

from fastlogits.plan.stages import Clean, Normalise, Scale
from fastlogits.processors.base import StagedProcessor


class TemperatureLogitsWarper(StagedProcessor, theirs.TemperatureLogitsWarper):
    """Divide the scores by a temperature: below 1 likely tokens become more likely, above 1 less likely.

    Args:
        temperature: a float above 0. One below 1e-30 counts as 1e-30: the largest logit then has all the probability.
            In transformers such quotients overflow, and sampling fails.

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
    """Replace NaN by 0 and infinities by the largest finite values, so that a broken model can't stop a run.

    Example:
        >>> InfNanRemoveLogitsProcessor()(None, torch.tensor([[float("nan"), 1.0]]))
        tensor([[0., 1.]])
    """

    def stage(self) -> Clean:
        """A map of every logit."""
        return Clean()


class LogitNormalization(StagedProcessor, theirs.LogitNormalization):
    """Turn scores into log-probabilities, which beam search expects.

    Example:
        >>> LogitNormalization()(None, torch.zeros(1, 4)).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def stage(self) -> Normalise:
        """A normalisation of each row."""
        return Normalise("normalise", _log_softmax, "log-softmax", reads_history=False)


def _log_softmax(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.log_softmax(dim=-1)
