"""TRL's GRPO trainer with the log-probabilities of the distribution that it samples from.

    from fastlogits.integrations.trl import SampledLogProbs

    class Trainer(SampledLogProbs, GRPOTrainer):
        pass

Seen with TRL 1.16, whose trainers ask one method for log-probabilities and entropies.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlogits.processors.penalties import RepetitionPenaltyLogitsProcessor
from fastlogits.training.logprobs import LogProbs, logprobs


class SampledLogProbs:
    """A mixin, in front of ``GRPOTrainer`` or a class like it.

    The trainer's temperature, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty`` count for its
    log-probabilities and entropies as they do where it samples, so that importance ratios don't carry the mass that
    truncation has cut off. Old, new and reference log-probabilities are all of this kind.

    Raises:
        ValueError: inputs of another kind than text, or a mixture-of-experts loss: TRL computes those itself.
    """

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities ``[B, logits_to_keep]`` of the last tokens, entropies if asked for, and no other loss."""
        given = sorted(name for name, value in others.items() if value is not None)
        if compute_aux_loss or given:
            what = "a load-balancing loss" if compute_aux_loss else ", ".join(given)
            raise ValueError(f"SampledLogProbs must be given texts alone, got {what}: use TRL's trainer as it is")
        each = batch_size or len(input_ids)
        found = [
            self._of_some(model, input_ids[at : at + each], attention_mask[at : at + each], logits_to_keep)
            for at in range(0, len(input_ids), each)
        ]
        entropies = torch.cat([each.entropy for each in found]) if compute_entropy else None  # type: ignore[misc]
        return torch.cat([each.logprobs for each in found]), entropies, None

    def _of_some(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int) -> LogProbs:
        trainer: Any = self
        with trainer.accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=count + 1).logits
        # A model may keep those of the whole text. Those of the last position predict what nobody has said.
        logits = logits[:, -count - 1 : -1]
        targets = ids[:, -count:].masked_fill(mask[:, -count:] == 0, -100)
        penalty = getattr(trainer, "repetition_penalty", None)
        processors = None if penalty in (None, 1) else [RepetitionPenaltyLogitsProcessor(float(penalty))]
        found = logprobs(
            logits, targets, entropy=True, temperature=trainer.temperature, top_k=trainer.top_k or None,
            top_p=trainer.top_p, min_p=trainer.min_p, processors=processors,
            input_ids=None if processors is None else ids[:, :-1],
        )  # fmt: skip
        assert isinstance(found, LogProbs)
        return found
