"""Classifier-free guidance: logits move away from those that a model gives without the condition."""

from __future__ import annotations

from functools import partial

import torch
from transformers.generation.logits_process import ClassifierFreeGuidanceLogitsProcessor as _ClassifierFreeGuidance
from transformers.generation.logits_process import (
    UnbatchedClassifierFreeGuidanceLogitsProcessor as _UnbatchedClassifierFreeGuidance,
)

from fastlogits.plan.stages import Mix, Rows
from fastlogits.processors.base import StagedProcessor


class ClassifierFreeGuidanceLogitsProcessor(StagedProcessor, _ClassifierFreeGuidance):
    """Mix conditional and unconditional logits of one batch: ``[2 * B, V]`` to ``[B, V]``.

    Args:
        guidance_scale: weight of the conditional logits, above 1.

    Raises:
        ValueError: ``guidance_scale`` of 1 or less; on a call, scores that don't have twice as many rows as
            ``input_ids``.

    Source: Copet et al., Simple and Controllable Music Generation, 2023 (arXiv 2306.05284).

    Example:
        >>> processor = ClassifierFreeGuidanceLogitsProcessor(3.0)
        >>> processor(torch.tensor([[5, 7]]), torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
        tensor([[ 3., -2.]])
    """

    def stage(self) -> Mix:
        """Two rows become one."""
        return Mix(float(self.guidance_scale))


class UnbatchedClassifierFreeGuidanceLogitsProcessor(StagedProcessor, _UnbatchedClassifierFreeGuidance):
    """Mix the scores with those of the same model, or another one, run on an unconditional or negative prompt.

    The call runs the model once a step. The model's cache is kept from step to step: use one object for one run, and
    don't reorder rows.

    Args:
        guidance_scale: weight of the scores against the unconditional ones; 1 takes the scores alone, less than 1 moves
            towards the unconditional prompt.
        model: the model; it has the vocabulary of the scores.
        unconditional_ids: unconditional prompt, int64 ``(B, L)``; None for the last token of the prompt.
        unconditional_attention_mask: its mask, int64 ``(B, L)``; None for all ones.
        use_cache: whether the model keeps keys and values from step to step.

    Source: Sanchez et al., Stay on topic with Classifier-Free Guidance, 2023 (arXiv 2306.17806).

    Example:
        >>> def model(input_ids, **_):
        ...     from transformers.modeling_outputs import CausalLMOutputWithPast
        ...     return CausalLMOutputWithPast(logits=torch.zeros(*input_ids.shape, 2))
        >>> processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model)
        >>> processor(torch.tensor([[5, 7]]), torch.tensor([[0.75, 0.25]]).log())
        tensor([[ 0.1178, -2.0794]])
    """

    def stage(self) -> Rows:
        """Log-probabilities, mixed with those of a model that the host runs."""
        function = partial(UnbatchedClassifierFreeGuidanceLogitsProcessor._rows, self)
        return Rows("mix", function, f"log-probabilities with and without the prompt, scale {self.guidance_scale:g}")

    def _rows(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        conditional = torch.log_softmax(scores, -1)
        if self.guidance_scale == 1:
            return conditional
        unconditional = torch.log_softmax(self.get_unconditional_logits(input_ids)[:, -1], -1)
        # The two may differ in dtype: only their difference has the wider one.
        mixed: torch.Tensor = (conditional - unconditional).mul_(self.guidance_scale).add_(unconditional)
        return mixed
