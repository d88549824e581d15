"""Processors that make tokens more or less likely because they have occurred."""

from __future__ import annotations

from transformers.generation import logits_process as theirs

from fastlogits.checks import finite_number
from fastlogits.plan.stages import Bias, Given, History, Penalize
from fastlogits.processors.base import StagedProcessor


class RepetitionPenaltyLogitsProcessor(StagedProcessor, theirs.RepetitionPenaltyLogitsProcessor):
    """Penalise tokens that the sequence, prompt included, already holds.

    Positive scores are divided by the penalty, negative scores are multiplied by it (arXiv 1909.05858).

    Args:
        penalty: a float above 0; a penalty above 1 discourages repetition, one below 1 rewards it.
        prompt_ignore_length: number of leading tokens that don't count: an integer, or an integer tensor ``(B,)`` for
            prompts with padding on the left.

    Raises:
        ValueError: a penalty that is not a float above 0; a negative length, or a tensor that doesn't have one
            dimension; on a call, a tensor of another batch size.

    Example:
        >>> import torch
        >>> RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[0, 1]]), torch.tensor([[1.0, -1.0, 1.0]]))
        tensor([[ 0.5000, -2.0000,  1.0000]])
    """

    def stage(self) -> Penalize:
        """A penalty on the history."""
        ignore = getattr(self, "prompt_ignore_length", None)
        return Penalize(History("all", 0 if ignore is None else ignore), float(self.penalty))


class EncoderRepetitionPenaltyLogitsProcessor(StagedProcessor, theirs.EncoderRepetitionPenaltyLogitsProcessor):
    """Reward tokens of the encoder's input, against hallucination: the inverse of the repetition penalty.

    Args:
        penalty: a float above 0; a penalty above 1 rewards the tokens of the input.
        encoder_input_ids: integer ``(R, L)``; beams and returned sequences of one input are neighbouring rows.

    Raises:
        ValueError: a penalty that is not a float above 0.

    Example:
        >>> import torch
        >>> processor = EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor([[0, 1]]))
        >>> processor(torch.tensor([[5]]), torch.tensor([[1.0, -1.0, 1.0]]))
        tensor([[ 2.0000, -0.5000,  1.0000]])
    """

    def stage(self) -> Penalize:
        """A penalty on another text."""
        return Penalize(Given(self.encoder_input_ids), float(self.penalty))


class _OutputPenalty(StagedProcessor):
    """A penalty on what was generated."""

    supports_continuous_batching = False

    def __init__(self, penalty: float) -> None:
        self.penalty = float(finite_number("penalty", penalty))


class PresencePenaltyLogitsProcessor(_OutputPenalty):
    """Subtract a penalty once from the score of each token that this run has generated.

    OpenAI's definition: the prompt doesn't count. Where the run starts must be known; see ``for_run``.

    Args:
        penalty: a finite number, in OpenAI's interface from -2 to 2; positive values discourage repetition.

    Raises:
        ValueError: not a finite number; on a call, a run whose start isn't known.

    Example:
        >>> import torch
        >>> run = PresencePenaltyLogitsProcessor(0.5).for_run(prompt_length=1)
        >>> run(torch.tensor([[0, 1, 1]]), torch.zeros(1, 3))
        tensor([[ 0.0000, -0.5000,  0.0000]])
    """

    def stage(self) -> Bias:
        """A bias on what was generated."""
        return Bias(History("generated"), -self.penalty)


class FrequencyPenaltyLogitsProcessor(_OutputPenalty):
    """Subtract a penalty from the score of a token for every time that this run has generated it.

    OpenAI's definition: the prompt doesn't count. Where the run starts must be known; see ``for_run``.

    Args:
        penalty: a finite number, in OpenAI's interface from -2 to 2; positive values discourage repetition.

    Raises:
        ValueError: not a finite number; on a call, a run whose start isn't known.

    Example:
        >>> import torch
        >>> run = FrequencyPenaltyLogitsProcessor(0.5).for_run(prompt_length=1)
        >>> run(torch.tensor([[0, 1, 1]]), torch.zeros(1, 3))
        tensor([[ 0., -1.,  0.]])
    """

    def stage(self) -> Bias:
        """A bias for each occurrence in what was generated."""
        return Bias(History("generated"), 0.0, counted=-self.penalty)
