"""``fl.decode`` for a very long time: calls of changing kinds, whose tokens are those of transformers' own loop.

    python -m tests.campaign.soak_decode --device cuda --steps 10000
    python -m tests.campaign.soak_decode --device cpu --steps 2000

Prompts, seeds, temperatures, processors, ends and the number of rows change from call to call. There are more kinds of
calls than graphs are kept, so that graphs are dropped and captured again. Every few calls the tokens are compared with
those of transformers' own loop. Memory may not grow once the first third is over. On a CPU the same loop runs without a
capture.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

import fastlogits as fl
from benchmarks.inputs import device_name
from benchmarks.results import read_rows, slug, write_rows
from fastlogits.transformers import loop
from fastlogits.transformers.graphs import GRAPHS
from tests.campaign.record import RESULTS, dated
from tests.campaign.soak import SLACK, memory_of
from tests.models import VOCAB_SIZE, tiny_llama
from tests.transformers.test_loop import CHAINS

_ROWS = (1, 2, 5)
_PROMPTS = (7, 20, 70)
_LOOK = 10
"""Of so many calls one is compared."""


class Found(NamedTuple):
    """What a soak has seen."""

    steps: int
    calls: int
    looks: int
    captured: int
    """Calls after which the graph of their step was there."""
    seconds: float
    rss_start: int
    rss_end: int
    allocated_start: int
    allocated_end: int


class Call(NamedTuple):
    """A call of ``generate``."""

    chain: str
    ids: torch.Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, rng: random.Random, device: torch.device) -> "Call":
        """One at random."""
        rows, length = rng.choice(_ROWS), rng.choice(_PROMPTS)
        ids = torch.tensor([[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(rows)], device=device)
        mask = torch.ones_like(ids)
        padding = rng.randrange(length // 2)
        mask[0, :padding] = 0
        chain = rng.choice(list(CHAINS))
        options = {"do_sample": True, **CHAINS[chain], "max_new_tokens": rng.randint(8, 32), "attention_mask": mask}
        if options["do_sample"]:
            options["seeds"] = torch.tensor([rng.getrandbits(62) for _ in range(rows)], device=device)
            options["temperature"] = rng.choice((0.7, 0.9, 1.3))
        options["eos_token_id"] = rng.choice((2, [2, 9, 33]))
        return cls(chain, ids, options)

    def tokens(self, model: Any) -> torch.Tensor:
        """All tokens, prompts included."""
        found: torch.Tensor = model.generate(self.ids, custom_generate=fl.decode, pad_token_id=0, **self.options)
        return found


def _refuse(request: Any) -> None:
    raise loop.Unfit("on purpose")


def run(device: torch.device, steps: int, seconds: float = float("inf"), seed: int = 0) -> Found:
    """So many steps, or a few more; fewer, where the seconds are over before.

    Raises:
        AssertionError: a call got other tokens, or memory has grown.
    """
    rng, model = random.Random(seed), tiny_llama().to(device)
    start, before = time.perf_counter(), None
    done = calls = looks = captured = 0
    fl.decode.clear()
    with patch.object(loop, "FORCE", True):
        while done < steps and time.perf_counter() - start < seconds:
            if before is None and (done >= steps // 3 or time.perf_counter() - start > seconds / 3):
                before = memory_of(device)
            call = Call.of(rng, device)
            found = call.tokens(model)
            done += found.shape[1] - call.ids.shape[1]
            captured += any(step.graph is not None for step in GRAPHS)
            calls += 1
            if calls % _LOOK == 0:
                with patch.object(loop, "decode", _refuse):
                    expected = call.tokens(model)
                assert torch.equal(found, expected), f"other tokens, call {calls} with {call.chain}: {call.options}"
                looks += 1
    after = memory_of(device)
    before = before or after
    assert after[0] <= before[0] + SLACK, f"the process has grown from {before[0]} to {after[0]} bytes"
    assert after[1] <= before[1] + SLACK, f"the device's memory has grown from {before[1]} to {after[1]} bytes"
    fl.decode.clear()
    took = time.perf_counter() - start
    return Found(done, calls, looks, captured, took, before[0], after[0], before[1], after[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign.soak_decode", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no more calls after so many")
    parser.add_argument("--seed", type=int, default=0, help="of all that is chosen at random; 0")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    found = run(device, given.steps, given.seconds, given.seed)
    row = {"device": device_name(device), "seed": given.seed, **found._asdict(), "seconds": f"{found.seconds:.1f}"}
    path = RESULTS / f"soak-decode-{slug(device_name(device))}.csv"
    write_rows(path, [*read_rows(path), dated(row)])
    table = Table("", "", title=f"decode, {device_name(device)}", title_justify="left", show_header=False)
    for name, value in row.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
