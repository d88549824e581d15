"""One step of GRPO with top-p: sample a group of answers, score them, and update the model.

    python examples/grpo_step.py

A tiny model of random weights answers a prompt some times. The reward is the share of even tokens. Before the update
the importance ratios are exactly 1, since the trainer computes the log-probabilities of the distribution that was
sampled, with its temperature and its kept tokens. A full-vocabulary softmax would give other numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlogits as fl

VOCAB, ANSWERS, LENGTH = 256, 8, 12
SAMPLING = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
CLIP = 0.2


class Rollout(NamedTuple):
    """Answers to one prompt, and what sampling has said of them."""

    ids: torch.Tensor
    """Prompt and answers, ``[ANSWERS, P + LENGTH]``."""
    logprobs: torch.Tensor
    """Of the answers' tokens, ``[ANSWERS, LENGTH]``."""
    kept: fl.KeptTokens
    """The tokens that could have been sampled in their places."""


def tiny_model() -> LlamaForCausalLM:
    """A model of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def roll_out(model: LlamaForCausalLM, prompt: torch.Tensor) -> Rollout:
    """Sample answers to a prompt ``[P]``: each row has a seed of its own."""
    sampler = fl.Sampler(logprobs="processed", return_kept=SAMPLING["top_k"], ties="lowest", **SAMPLING)
    P = len(prompt)
    # The text in its whole length from the first step on: a product of other shapes may round otherwise, and then the
    # logits of sampling and training differ in their last bits, with any sampler.
    ids = torch.nn.functional.pad(prompt, (0, LENGTH)).repeat(ANSWERS, 1)
    seeds = torch.arange(ANSWERS, device=ids.device)
    steps = []
    for position in range(P, P + LENGTH):
        logits = model(ids).logits[:, position - 1]
        steps.append(sampler(logits, seeds=seeds, positions=position))
        ids[:, position] = steps[-1].tokens
    kept = fl.KeptTokens.stack([step.kept for step in steps])
    return Rollout(ids, torch.stack([step.logprobs for step in steps], 1), kept)


def answer_logits(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The logits that the answers' tokens were sampled from, ``[ANSWERS, LENGTH, V]``."""
    return model(ids).logits[:, -LENGTH - 1 : -1]


def loss_of(model: LlamaForCausalLM, rollout: Rollout, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped loss of GRPO, and the importance ratios ``[ANSWERS, LENGTH]``."""
    answers = rollout.ids[:, -LENGTH:]
    # With the kept tokens of the rollout; top_k and top_p in their place would find them again.
    logits = answer_logits(model, rollout.ids)
    logprobs = fl.logprobs(logits, answers, temperature=SAMPLING["temperature"], kept=rollout.kept)
    ratios = (logprobs - rollout.logprobs).exp()
    each = advantages.unsqueeze(1)
    loss = -torch.minimum(ratios * each, ratios.clamp(1 - CLIP, 1 + CLIP) * each).mean()
    return loss, ratios


def advantages_of(rollout: Rollout) -> torch.Tensor:
    """Rewards of the answers, less their mean and by their deviation."""
    rewards = (rollout.ids[:, -LENGTH:] % 2 == 0).float().mean(1)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def main() -> dict[str, float]:
    """One step; returns what it prints."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rollout = roll_out(model, torch.tensor([1, 17, 99]))
    advantages = advantages_of(rollout)
    loss, ratios = loss_of(model, rollout, advantages)
    logits = answer_logits(model, rollout.ids).detach()
    answers = rollout.ids[:, -LENGTH:]
    full = fl.logprobs(logits, answers, temperature=SAMPLING["temperature"])
    again = fl.logprobs(logits, answers, ties="lowest", outside=True, **SAMPLING)
    loss.backward()
    optimizer.step()
    after, moved = loss_of(model, rollout, advantages)
    told = {
        "largest |ratio - 1| before the update": (ratios - 1).abs().max().item(),
        "the same by a full softmax": ((full - rollout.logprobs).exp() - 1).abs().max().item(),
        "the same by the rules again": ((again.logprobs - rollout.logprobs).exp() - 1).abs().max().item(),
        "tokens that the rules would not have kept": float(again.outside.sum()),
        "largest |ratio - 1| after the update": (moved - 1).abs().max().item(),
        "loss before": loss.item(),
        "loss after": after.item(),
    }
    for name, value in told.items():
        print(f"{name:45} {value:.4g}")
    return told


if __name__ == "__main__":
    main()
