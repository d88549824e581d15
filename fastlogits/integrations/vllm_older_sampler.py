"""The sampler of vLLM's older runner: temperature, min-p, top-k, top-p and the draw as one step.

What comes before is vLLM's: bans, bias and penalties, whose tokens the older runner keeps in lists on the host. It
gives a request with a seed a generator of its own in place of the seed, from which each step takes one number: so the
request has the same tokens in every batch, but other ones than in the newer runner. Drafts are verified by vLLM.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.selection.launch import reference_distribution

if TYPE_CHECKING:
    from fastlogits.sampling import Sampler

# vLLM treats lower temperatures as greedy decoding.
_GREEDY = 1e-5


class OlderSampler:
    """Before vLLM's ``Sampler`` of the older runner in a class made of both, whose interface stays."""

    # What vLLM's class has.
    logprobs_mode: str
    apply_temperature: Any
    compute_logprobs: Any

    _tensors: tuple[torch.Tensor | None, ...] = ()
    _drawing: Sampler | None = None

    def sample(
        self, logits: torch.Tensor, sampling_metadata: Any, logprobs_mode_override: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token of each row, int64 ``[B]``, and processed logits or log-probabilities where they are reported.

        Args:
            logits: float32 ``[B, V]``, after bans, bias and penalties. May be written.
            sampling_metadata: vLLM's.
            logprobs_mode_override: in place of the engine's mode.
        """
        metadata = sampling_metadata
        if metadata.all_greedy:
            theirs: Any = super()
            sampled: tuple[torch.Tensor, torch.Tensor | None] = theirs.sample(logits, metadata, logprobs_mode_override)
            return sampled
        temperature, min_p = metadata.temperature, None
        processors = metadata.logitsprocs.argmax_invariant
        if all(type(each).__name__ == "MinPLogitsProcessor" for each in processors):
            min_p = next((each.min_p for each in processors if each.min_p_count), None)
        else:
            logits = self.apply_temperature(logits, temperature, metadata.all_random)
            for each in processors:
                logits = each.apply(logits)
            temperature = torch.where(temperature < _GREEDY, temperature, 1.0)
        tokens = self._sampler(temperature, min_p, metadata)(logits, _seeds(logits, metadata.generators), 0).tokens
        mode = logprobs_mode_override or self.logprobs_mode
        if not mode.startswith("processed") or (metadata.max_num_logprobs is None and not metadata.logprob_token_ids):
            return tokens, None
        given: Any = [("min_p", min_p), ("top_k", metadata.top_k), ("top_p", metadata.top_p)]
        rules = tuple(Rule(name, value) for name, value in given if value is not None)
        processed, _ = reference_distribution(logits, temperature, rules)
        return tokens, processed if mode == "processed_logits" else self.compute_logprobs(processed)

    def _sampler(self, temperature: torch.Tensor, min_p: torch.Tensor | None, metadata: Any) -> Sampler:
        """The sampler of a batch, kept as long as the batch has the same tensors."""
        tensors = (temperature, min_p, metadata.top_k, metadata.top_p)
        kept = self._tensors
        if self._drawing is None or any(a is not b for a, b in zip(tensors, kept, strict=True)):
            from fastlogits.sampling import Sampler

            self._tensors = tensors
            self._drawing = Sampler(
                temperature=torch.where(temperature < _GREEDY, 0.0, temperature),
                min_p=None if min_p is None else min_p.flatten(),
                top_k=metadata.top_k,
                top_p=metadata.top_p,
                order="vllm",
            )
        return self._drawing


def _seeds(logits: torch.Tensor, generators: dict[int, torch.Generator]) -> torch.Tensor:
    """A number for each row, from its own generator if it has one."""
    seeds = torch.empty(len(logits), dtype=torch.int64, device=logits.device).random_()
    for row, generator in generators.items():
        seeds[row].random_(generator=generator)
    return seeds


@lru_cache
def older_sampler(theirs: type) -> type:
    """The class for the older runner, of ours and vLLM's."""
    return type("FastLogitsSampler", (OlderSampler, theirs), {})
