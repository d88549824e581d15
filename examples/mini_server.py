"""A small server with continuous batching: requests come and go, each with its own parameters.

    python examples/mini_server.py

The model is a tiny Llama with random weights, without a cache, so that the loop stays short. The last lines show that
each request got, in the crowd, the tokens that it gets alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlogits as fl

V, END, MOST = 300, 2, 4


@dataclass
class Request:
    """What one client wants, and what it got."""

    arrives: int
    prompt: list[int]
    params: fl.RequestParams
    most_tokens: int
    said: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether the text has ended."""
        return len(self.said) >= self.most_tokens or self.said[-1:] == [END]


class Server:
    """A model, and the requests that are running."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.batch = fl.BatchProcessor(max_requests=MOST, vocab_size=V, device="cpu", max_length=64)
        self.running: dict[int, Request] = {}

    def serve(self, requests: list[Request]) -> None:
        """Run until all requests are done."""
        waiting, step = deque(sorted(requests, key=lambda request: request.arrives)), 0
        while waiting or self.running:
            while waiting and waiting[0].arrives <= step and len(self.running) < MOST:
                request = waiting.popleft()
                self.running[self.batch.add(request.params, request.prompt)] = request
            if self.running:
                self.step()
            step += 1

    def step(self) -> None:
        """One token for each running request."""
        slots = list(self.running)
        tokens = self.batch.sample(self.logits(slots), slots).tokens
        self.batch.append(slots, tokens)
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            request = self.running[slot]
            request.said.append(token)
            if request.is_done:
                self.batch.remove(slot)
                del self.running[slot]

    def logits(self, slots: list[int]) -> torch.Tensor:
        """The logits behind each text, row by row, so that a row's bits don't depend on its neighbours."""
        texts = [[*self.running[slot].prompt, *self.running[slot].said] for slot in slots]
        with torch.no_grad():
            return torch.cat([self.model(torch.tensor([text])).logits[:, -1] for text in texts])


def requests() -> list[Request]:
    """Six clients that want different things."""
    wanted = [
        fl.RequestParams(temperature=0.8, top_p=0.9, seed=1),
        fl.RequestParams(temperature=0.0, repetition_penalty=1.3),
        fl.RequestParams(temperature=1.2, min_p=0.02, no_repeat_ngram_size=2, seed=3),
        fl.RequestParams(temperature=0.7, top_k=20, logit_bias={7: 4.0}, seed=4),
        fl.RequestParams(temperature=0.7, min_tokens=6, stop_token_ids=[END], seed=5),
        fl.RequestParams(temperature=0.9, forced_tokens=[11, 12], seed=6),
    ]
    return [Request(number, [5 + number, 6, 7], params, 8 + number) for number, params in enumerate(wanted)]


def main() -> None:
    """Serve all together, then each alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).eval()
    together, alone = requests(), requests()
    Server(model).serve(together)
    for request in alone:
        Server(model).serve([request])
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.said == other.said
        print(f"request {number}: {one.said}")


if __name__ == "__main__":
    main()
