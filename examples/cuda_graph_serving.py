"""A serving step in one CUDA graph, captured once, while requests of all kinds come and go.

    python examples/cuda_graph_serving.py

The graph holds the model, the sampling and the growing histories. It reads which slot each row has, and all parameters,
on the device. So adding, removing and changing requests needs no new graph: write ``slots``, and replay. Without a GPU
the same step runs as it is, and says so.
"""

from __future__ import annotations

import torch

import fastlogits as fl

ROWS, VOCABULARY, WIDTH, LENGTH = 4, 2000, 64, 24


class Step:
    """The step of a batch; its inputs and outputs stay where they are, so that a graph can hold it."""

    def __init__(self, device: torch.device) -> None:
        self.batch = fl.BatchProcessor(ROWS, VOCABULARY, device, max_length=256)
        self.slots = torch.full((ROWS,), -1, device=device)  # -1 for rows of no request
        self.tokens = torch.zeros(ROWS, dtype=torch.int64, device=device)
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator).to(device)
        self.graph = self._captured() if device.type == "cuda" else None

    def _run(self) -> None:
        logits = self.embedding[self.tokens] @ self.embedding.T  # a model of one layer
        drawn = self.batch.sample(logits, self.slots).tokens
        self.batch.append(self.slots, drawn)
        self.tokens.copy_(drawn)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Rows of no request change nothing, so that it may run before there are any."""
        self.batch.warm_up(calls=("sample", "append"), bitmask=False)  # compiles now, several kernels at once
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def __call__(self) -> list[int]:
        """Make a step, and return the token of each row."""
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.tokens.tolist()  # here the host waits

    def begin(self, row: int, params: fl.RequestParams, prompt: list[int]) -> None:
        """Let a request have a row. It takes one copy, which the next replay waits for."""
        self.slots[row] = self.batch.add(params, prompt, slot=row)
        self.tokens[row] = prompt[-1]

    def end(self, row: int) -> None:
        """Free a row."""
        self.batch.remove(row)
        self.slots[row] = -1


def serve(step: Step, requests: list[tuple[fl.RequestParams, list[int]]]) -> list[list[int]]:
    """The tokens of each request: as many run at once as there are rows, and the others wait."""
    said: list[list[int]] = [[] for _ in requests]
    waiting, running = list(range(len(requests))), dict[int, int]()
    while waiting or running:
        for row in set(range(ROWS)) - set(running):
            if waiting:
                running[row] = waiting.pop(0)
                step.begin(row, *requests[running[row]])
        tokens = step()
        for row, number in list(running.items()):
            said[number].append(tokens[row])
            if len(said[number]) == LENGTH + 3 * number:  # texts of several lengths: the mix changes all the time
                step.end(row)
                del running[row]
    return said


def main() -> None:
    """Serve requests that share a batch, then each of them alone, and compare."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    requests = [
        (fl.RequestParams(temperature=0.7, top_k=50, seed=1), [1, 2]),
        (fl.RequestParams(temperature=0.0, repetition_penalty=1.3), [3]),
        (fl.RequestParams(temperature=1.2, min_p=0.05, no_repeat_ngram_size=3, seed=2), [5, 6, 7]),
        (fl.RequestParams(frequency_penalty=0.4, banned_token_ids=[8, 9], seed=3), [8]),
        (fl.RequestParams(top_p=0.9, logit_bias={10: 4.0}, dry_multiplier=0.8, seed=4), [9, 10]),
        (fl.RequestParams(temperature=0.9, forced_tokens=[11, 12], seed=5), [4, 4]),
    ]
    step = Step(device)
    print("one graph serves all steps" if step.graph else "no GPU here: the same step runs without a graph")
    together = serve(step, requests)
    for number, (params, prompt) in enumerate(requests):
        step.begin(0, params, prompt)
        assert [step()[0] for _ in together[number]] == together[number]
        step.end(0)
    print(f"{len(requests)} requests, {sum(map(len, together))} tokens; each got those that it gets alone")


if __name__ == "__main__":
    main()
