"""Speculative decoding that changes no token: drafts by prompt lookup, checked by one call of ``accept``.

    python examples/speculative_decoding.py

Each request has a seed, penalties and truncations of its own. A row draws with its request's seed and the position of
its token, so a draft is right if it is the token that would have come anyway. The text is the same with drafts as
without, whatever makes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastlogits as fl

DRAFTS, LENGTH, VOCABULARY = 4, 100, 1000


def lookup(text: list[int]) -> list[int]:
    """What followed the last two tokens when they were there before; -1, which is never kept, where nothing did."""
    for at in range(len(text) - 3, -1, -1):
        if text[at : at + 2] == text[-2:]:
            found = text[at + 2 : at + 2 + DRAFTS]
            return found + [-1] * (DRAFTS - len(found))
    return [-1] * DRAFTS


def generate(
    model: Callable[[list[list[int]]], torch.Tensor],
    prompts: list[list[int]],
    params: list[fl.RequestParams],
    drafter: Callable[[list[int]], list[int]] | None,
    device: str,
) -> tuple[list[list[int]], int]:
    """The texts of some requests, and how often the model was called."""
    batch = fl.BatchProcessor(len(prompts), VOCABULARY, device, max_length=1024, max_rows=len(prompts) * (DRAFTS + 1))
    texts, calls = [list(prompt) for prompt in prompts], 0
    running = {batch.add(each, prompt): text for each, prompt, text in zip(params, prompts, texts, strict=True)}
    while running:
        fed = {slot: [text[-1], *(drafter(text) if drafter else [])] for slot, text in running.items()}
        slots = [slot for slot in fed for _ in fed[slot]]
        drafts = [token for each in fed.values() for token in each]
        local = [j for each in fed.values() for j in range(len(each))]
        logits = model([running[slot][:-1] + fed[slot][: j + 1] for slot, j in zip(slots, local, strict=True)])
        out = batch.sample(logits, slots, draft_ids=drafts, local_position=local)
        tokens = batch.accept(out, slots, drafts).tokens.tolist()  # the only place where the host waits
        calls += 1
        for slot, token in zip(slots, tokens, strict=True):
            if token >= 0 and slot in running:
                running[slot].append(token)
                if len(running[slot]) == LENGTH:
                    del running[slot]
                    batch.remove(slot)
    return texts, calls


def toy_model(texts: list[list[int]], device: str) -> torch.Tensor:
    """Logits after each text, float32 ``[rows, VOCABULARY]``: a model that mostly goes round in circles."""
    last = torch.tensor([text[-1] for text in texts])
    noise = [
        torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(int(token))) for token in last.clamp(min=0)
    ]
    logits = torch.stack(noise)
    logits[torch.arange(len(texts)), (7 * last + 3) % 23] += 9
    return logits.to(device)


def main() -> None:
    """Generate with drafts and without, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = [[5, 6, 7, 5, 6], [1, 2, 3], [9, 8, 9, 8]]
    params = [fl.RequestParams(temperature=0.8, top_p=0.95, frequency_penalty=0.1, seed=seed) for seed in range(3)]

    def model(texts: list[list[int]]) -> torch.Tensor:
        return toy_model(texts, device)

    plain, many = generate(model, prompts, params, None, device)
    drafted, few = generate(model, prompts, params, lookup, device)
    assert drafted == plain
    print(f"{len(prompts)} texts of {LENGTH} tokens: {many} calls of the model without drafts, {few} with")
    print("the tokens are the same")


if __name__ == "__main__":
    main()
