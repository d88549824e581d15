"""A million draws for each set of rules, against the probabilities in float64 of what the rules keep.

    python -m tests.campaign.statistics --device cuda
    torchrun --nproc-per-node 4 -m tests.campaign.statistics --device cuda      # and the same tokens from parts

All draws of a set are of one row of logits, each with a seed and a position of its own. A chi-square says how well
they fit; tokens that are expected less than 20 times are one cell. Many sets are looked at, so two numbers are for all
of them together: the smallest probability times the number of sets (Bonferroni), and the probability of the sum of
their logarithms (Fisher). Both have to be above 0.001.

With several processes each of them samples from its part of the vocabulary, too. Those tokens have to be equal to the
ones of one process.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fastlogits_kernels.truncate.dispatch import truncate
from rich.console import Console
from rich.table import Table

import fastlogits as fl
from benchmarks.inputs import device_name
from benchmarks.results import read_rows, slug, write_rows
from tests.campaign.record import RESULTS, dated
from tests.campaign.soak import columns_of, group_of
from tests.chi_square import chi_square, tail_of

LEAST = 1e-3
"""What the probabilities of all sets together have to be above."""
_SLOTS = 64
_PROMPT = 40
_COMPARED = 8  # calls whose tokens are compared with those of ranks


class Size(NamedTuple):
    """How large everything is."""

    vocab: int
    rows: int
    """Draws of a call."""


SIZES = {"cuda": Size(32_000, 8192), "cpu": Size(96, 4096)}

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens by seeds and positions, int64 ``[rows]`` each."""


class Case(NamedTuple):
    """A set of rules and the row that it meets."""

    name: str
    logits: str
    dtype: torch.dtype
    options: dict[str, Any]
    how: str = "sampler"
    """Or ``serving``, or ``processors``: who draws."""


def _cases() -> Iterator[Case]:
    T = {"temperature": 0.7}
    sets: dict[str, dict[str, Any]] = {
        "nothing": {}, "T": T, "T 1.7": {"temperature": 1.7}, "T k p": {**T, "top_k": 50, "top_p": 0.9},
        "T p": {**T, "top_p": 0.9}, "k": {"top_k": 20}, "k 2000": {"top_k": 2000},
        "k lowest": {"top_k": 30, "ties": "lowest"}, "min-p": {"min_p": 0.02}, "top-a": {"top_a": 0.2},
        "typical": {**T, "typical_p": 0.8}, "eta epsilon": {"eta": 1e-3, "epsilon": 3e-4},
        "top-n-sigma": {"top_n_sigma": 1.0}, "top-h": {"top_h": 0.6},
        "vllm": {**T, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "order": "vllm"},
    }  # fmt: skip
    for name, options in sets.items():
        for logits, dtype in (("zipf", torch.float32), ("gauss", torch.bfloat16)):
            yield Case(name, logits, dtype, options)
    yield Case("T p", "flat", torch.float32, sets["T p"])
    yield Case("T", "ties", torch.bfloat16, T)
    for name in ("T", "T p", "T k p", "typical"):
        yield Case(name, "zipf", torch.float32, sets[name], "serving")
    yield Case("T k p", "zipf", torch.float32, sets["T k p"], "processors")


CASES = list(_cases())


def row_of(kind: str, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """The logits that all draws of a case have, ``[V]``."""
    generator = torch.Generator().manual_seed(vocab)
    normal = torch.randn(vocab, generator=generator)
    ranks = torch.randperm(vocab, generator=generator) + 1.0
    kinds = {"zipf": -1.5 * ranks.log(), "gauss": normal * 2, "flat": normal, "ties": normal.round()}
    return kinds[kind].to(dtype)


def _processors(vocab: int) -> fl.LogitsProcessorList:
    return fl.LogitsProcessorList([
        fl.RepetitionPenaltyLogitsProcessor(1.3), fl.NoRepeatNGramLogitsProcessor(2),
        fl.AllowedTokensLogitsProcessor(range(0, vocab, 2)),
    ])  # fmt: skip


def _prompt(vocab: int) -> torch.Tensor:
    return torch.randint(0, min(vocab, 30), (1, _PROMPT), generator=torch.Generator().manual_seed(1))


def probabilities(case: Case, row: torch.Tensor) -> torch.Tensor:
    """What the draws of a case have to follow, float64 ``[V]`` on the CPU.

    The tokens that stay are those of the row's device: which of several tied ones top-h keeps may differ from the CPU.

    Raises:
        AssertionError: on the row's device other logits stay than on the CPU.
    """
    rules = fl.SamplingParams(**case.options).rules
    temperature = case.options.get("temperature", 1.0)
    x = row.float().cpu()[None]
    if case.how == "processors":
        x = _processors(len(row))(_prompt(len(row)), x)
    kept = x[0] > -math.inf
    if rules:
        scaled = x / temperature  # not on a GPU, where torch multiplies by what it has rounded
        here, there = (truncate(scaled.to(device), rules)[0].cpu() for device in ("cpu", row.device))
        assert torch.equal(there.sort().values, here.sort().values), "other logits stay than on the CPU"
        kept = there > -math.inf
    return torch.where(kept, x[0].double() / temperature, -math.inf).softmax(-1)


def _sampler(case: Case, row: torch.Tensor, rows: int, group: Any = None) -> Draw:
    """Draws of one process from the whole row, or of the ranks of a group from its parts."""
    sampler = fl.Sampler(_processors(len(row)) if case.how == "processors" else None, **case.options, group=group)
    named: dict[str, Any] = {}
    if case.how == "processors":
        named["input_ids"] = _prompt(len(row)).to(row.device).expand(rows, -1)
    logits = row[columns_of(group, len(row))].expand(rows, -1)
    return lambda seeds, positions: sampler(logits, seeds, positions, **named).tokens


def _serving(case: Case, row: torch.Tensor, draws: int) -> Draw:
    """Draws of requests of a batch, of one seed each: their positions change. The engine has their histories."""
    device, longest = row.device, draws // _SLOTS + 1
    texts = torch.zeros((_SLOTS, longest), dtype=torch.int32, device=device)
    lengths = torch.full((_SLOTS,), longest, dtype=torch.int32, device=device)
    batch = fl.BatchProcessor(_SLOTS, len(row), device, history=(texts, torch.zeros_like(lengths), lengths))
    for slot in range(_SLOTS):
        batch.add(fl.RequestParams(**case.options, seed=7919 * slot + 2**20 * CASES.index(case)), slot=slot)
    slots = torch.arange(_SLOTS, device=device)
    logits = row.expand(_SLOTS, -1)
    return lambda _, positions: torch.cat([
        batch.sample(logits, slots, at).tokens for at in positions.split(_SLOTS)
    ])  # fmt: skip


def _keys(case: Case, turn: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and positions of the draws of a turn. No others have both, in no case."""
    number = torch.arange(turn * rows, (turn + 1) * rows, device=device)
    return (number % 1000) * 2**33 + CASES.index(case), number // _SLOTS


def together(found: Sequence[float]) -> tuple[float, float]:
    """Two probabilities of many: the smallest times their number, and that of the sum of their logarithms."""
    tiny = sys.float_info.min
    fisher = tail_of(-2 * sum(math.log(max(each, tiny)) for each in found), 2 * len(found))
    return min(1.0, min(found) * len(found)), fisher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 1 where draws don't fit, or ranks draw other tokens."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.statistics", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=SIZES, required=True)
    parser.add_argument("--draws", type=int, default=2**20, help="of each set of rules; 1048576")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many no other set begins")
    parser.add_argument("--no-csv", action="store_true", help="only print")
    given = parser.parse_args(arguments)
    start, size = time.perf_counter(), SIZES[given.device]
    device, group = torch.device(given.device), group_of(given.device)
    is_first = group is None or group.rank() == 0
    rows: list[dict[str, Any]] = []
    left_out = 0
    for case in CASES:
        late = torch.tensor(time.perf_counter() - start > given.seconds, device=device).int()
        if group is not None:
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late:
            left_out += 1
            continue
        rows.append(_row(case, size, device, group, given.draws))
        if is_first:
            print(*rows[-1].values(), flush=True)
    if not rows:
        if is_first:
            print("no set of rules was begun in time")
        return 1
    fits = all(each["same_on_ranks"] != "False" for each in rows) and min(together([e["p"] for e in rows])) > LEAST
    if is_first:
        _say(rows, left_out, device, fits)
        if not given.no_csv:
            path = RESULTS / f"statistics-{slug(device_name(device))}.csv"
            run = {"device": device_name(device), "ranks": 1 if group is None else group.size()}
            write_rows(path, [*read_rows(path), *(dated({**run, **each, "p": f"{each['p']:.3g}"}) for each in rows)])
    if group is not None:
        dist.destroy_process_group()
    return int(not fits)


def _row(case: Case, size: Size, device: torch.device, group: Any, draws: int) -> dict[str, Any]:
    """How the draws of a case fit, and whether ranks draw the same tokens."""
    row = row_of(case.logits, size.vocab, case.dtype).to(device)
    turns = -(-draws // size.rows)
    draw = _serving(case, row, turns * size.rows) if case.how == "serving" else _sampler(case, row, size.rows)
    counts = torch.zeros(size.vocab, dtype=torch.int64, device=device)
    for turn in range(turns):
        counts += torch.bincount(draw(*_keys(case, turn, size.rows, device)), minlength=size.vocab)
    same = ""
    if group is not None and case.how != "serving":
        split = _sampler(case, row, size.rows, group)
        keys = [_keys(case, turn, size.rows, device) for turn in range(min(turns, _COMPARED))]
        alike = torch.tensor(all(torch.equal(split(*each), draw(*each)) for each in keys), device=device).int()
        dist.all_reduce(alike, op=dist.ReduceOp.MIN)
        same = str(bool(alike))
    return {
        "rules": case.name, "logits": case.logits, "dtype": str(case.dtype).removeprefix("torch."), "how": case.how,
        "vocab": size.vocab, "draws": turns * size.rows,
        "p": chi_square(counts, probabilities(case, row)), "same_on_ranks": same,
    }  # fmt: skip


def _say(rows: Sequence[dict[str, Any]], left_out: int, device: torch.device, fits: bool) -> None:
    table = Table("rules", "logits", "who draws", "probability", "same on ranks", title=device_name(device))
    for each in sorted(rows, key=lambda each: each["p"])[:8]:
        shown = f"{each['logits']} {each['dtype']}"
        table.add_row(each["rules"], shown, each["how"], f"{each['p']:.4f}", each["same_on_ranks"])
    smallest, fisher = together([each["p"] for each in rows])
    table.caption = (
        f"the worst of {len(rows)} sets; all together {smallest:.3g} (Bonferroni) and {fisher:.3g} (Fisher): "
        f"{'they fit' if fits else 'THEY DO NOT FIT'}" + (f"; {left_out} LEFT OUT" if left_out else "")
    )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
