"""A grammar's mask in a serving step: one request may say only yes or no, its neighbour is free.

    python examples/grammar.py

The grammar here is a table of four states. An engine such as xgrammar or llguidance fills a bitmask of the same form.
"""

from __future__ import annotations

import torch

import fastlogits as fl

V, YES, NO, BECAUSE, END = 200, 11, 12, 13, 2
ALLOWED = {"answer": [YES, NO], "reason": [BECAUSE, END], "free": None, "done": [END]}
AFTER = {YES: "reason", NO: "reason", BECAUSE: "free", END: "done"}


def mask_of(state: str) -> torch.Tensor:
    """The bits of a state, ``[ceil(V / 32)]``: bit i of word w is token 32 * w + i; 1 allows it."""
    allowed = torch.ones(V, dtype=torch.bool)
    if ALLOWED[state] is not None:
        allowed = torch.zeros(V, dtype=torch.bool)
        allowed[ALLOWED[state]] = True
    bits = torch.nn.functional.pad(allowed, (0, -V % 32)).view(-1, 32).long()
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def main() -> None:
    """Six steps of two requests."""
    torch.manual_seed(0)
    batch = fl.BatchProcessor(max_requests=2, vocab_size=V, device="cpu", max_length=16)
    strict = batch.add(fl.RequestParams(bitmask=True, seed=1), [5])
    free = batch.add(fl.RequestParams(bitmask=False, seed=2), [6])
    state, said = "answer", {strict: [], free: []}
    for _ in range(6):
        bitmask = torch.stack([mask_of(state), torch.full(((V + 31) // 32,), -1, dtype=torch.int32)])
        tokens = batch.sample(torch.randn(2, V), [strict, free], bitmask=bitmask).tokens
        batch.append([strict, free], tokens)
        for slot, token in zip((strict, free), tokens.tolist(), strict=True):
            said[slot].append(token)
        state = AFTER.get(said[strict][-1], state)
    assert said[strict][0] in (YES, NO)
    print("with the grammar:", said[strict])
    print("without:         ", said[free])


if __name__ == "__main__":
    main()
