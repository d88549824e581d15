"""Log-probabilities in training: right against torch and the sampler, then times, memory, and what is used today.

    python -m benchmarks.training --device cuda
    python -m benchmarks.training --tiny            a few short rows, to see that it runs: seconds on a CPU

Checked are few rows and many, which kernels of their own process: against the sampler bit for bit, against float64, and
their gradients, in place and of strided logits. Then come times and memory of the forward and the backward pass, beside
one read and one copy of the logits, and beside what trainers write in torch. On a GPU steps are also captured, and
compiled by torch. All kernels are compiled first, side by side.

The exit status is 1 where something is wrong, or where an operation has lost its kernels and torch runs instead.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.runtime.launcher import collected, tl, triton

import fastlogits as fl
from benchmarks.folders import LOCAL
from benchmarks.inputs import device_name
from benchmarks.session import Session
from benchmarks.timing import peak_bytes

GAUSS, ZIPF = "gauss", "zipf"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "T": {"temperature": 0.7}, "k p": {"top_k": 50, "top_p": 0.9},
    "T k p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9}, "p": {"top_p": 0.9},
    "T p": {"temperature": 0.7, "top_p": 0.9}, "min_p": {"min_p": 0.05}, "typical": {"typical_p": 0.9},
}  # fmt: skip
"""Truncations by name."""
CHECKED = ((GAUSS, "k p"), (GAUSS, "plain"), (ZIPF, "T p"), (GAUSS, "min_p"), (ZIPF, "typical"), (ZIPF, "T"))
_ROOM = 64
"""Ids that sampling returns of a row."""
_IGNORED = -100
_ORDERS = 4
_PERMUTED = 64
_FEWEST_TURNS, _MOST_TURNS, _TURNS_S = 3, 9, 0.4
_CYCLES_OF_US, _AHEAD_US = 2000, 200.0
"""A GPU waits so long that the host has launched all: two calls' host time and a little."""
_READ_BLOCK = 8192
_OF_PEERS = 8
"""Packages that need much memory get one row in so many, and so does fastlogits beside them."""


class Size(NamedTuple):
    """Rows and vocabulary of what is timed, and rows of what is checked: all, and those that are sampled."""

    rows: int
    vocab: int
    checked: int
    sampled: int


LARGE, TINY = Size(4096, 151936, 600, 256), Size(16, 512, 12, 6)


class Training:
    """The logits and options of a run.

    Args:
        size: how much is checked and timed.
        session: where results go.
    """

    def __init__(self, size: Size, session: Session) -> None:
        self.size = size
        self.session = session
        self.device = session.device
        self.is_cuda = self.device.type == "cuda"

    def logits(self, kind: str, rows: int, seed: int = 0) -> torch.Tensor:
        """bfloat16 ``[rows, vocab]``: normal with deviation 3, or -1.5 ln(rank) as a model's fall."""
        generator = torch.Generator(self.device).manual_seed(seed)
        V = self.size.vocab
        if kind == GAUSS:
            return torch.randn(rows, V, generator=generator, device=self.device, dtype=torch.bfloat16) * 3
        ranked = (-1.5 * torch.arange(1, V + 1, device=self.device).float().log()).bfloat16()
        out = torch.empty(rows, V, device=self.device, dtype=torch.bfloat16)
        for number, part in enumerate(out.split(_PERMUTED)):  # type: ignore[no-untyped-call]
            if number < _ORDERS:  # as many permutations are enough
                order = torch.rand(len(part), V, generator=generator, device=self.device).argsort(-1)
            part.copy_(ranked[order[: len(part)]])
        return out

    def targets(self, rows: int) -> torch.Tensor:
        """Token ids int64 ``[rows]``, of any token."""
        return torch.randint(0, self.size.vocab, (rows,), device=self.device)


def _found(*arguments: Any, **options: Any) -> Any:
    """What ``fl.logprobs`` returns, whatever is asked for."""
    return fl.logprobs(*arguments, **options)


# -- Compiled first --------------------------------------------------------------------------------------------------


def compile_all(run: Training) -> None:
    """Make all calls once without their launches, and compile what these need."""
    rows, V, device = run.size.checked, run.size.vocab, run.device
    x = torch.zeros(rows, V, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    sets = [
        fl.KeptTokens(V, torch.zeros(rows, _ROOM, dtype=torch.int32, device=device), torch.ones_like(targets)),
        fl.KeptTokens(V, bits=torch.zeros(rows, -(-V // 32), dtype=torch.int32, device=device)),
    ]
    few = min(32, run.size.sampled)
    # The backward pass runs in this thread, which collects its launches.
    with torch.autograd.set_multithreading_enabled(False), collected() as launches:
        for options in [*OPTIONS.values(), *({"kept": kept, **more} for kept in sets for more in ({}, OPTIONS["T"]))]:
            for n in (rows,) if "kept" in options else (rows, few):
                _found(x[:n].clone().requires_grad_(), targets[:n], **options).sum().backward()
        both = _found(x.clone().requires_grad_(), targets, entropy=True, **OPTIONS["k p"])
        (both.logprobs.sum() + both.entropy.sum()).backward()
        for options in OPTIONS.values():
            for form in (_ROOM, "bits"):
                fl.sample(x[:few], seeds=1, positions=1, logprobs="processed", return_kept=form, **options)
    run.session.compile(launches)


# -- Checks ----------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Logits and targets; the first were drawn from them, and ``sampled`` says what the sampler knows about these."""

    logits: torch.Tensor
    targets: torch.Tensor
    sampled: Any
    options: dict[str, Any]

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return float(self.options.get("temperature", 1.0))

    @property
    def beside(self) -> dict[str, float]:
        """The options that act where it is known what is kept."""
        return {"temperature": self.temperature} if "temperature" in self.options else {}


def check(run: Training, kind: str, name: str) -> None:
    """Many rows and few against the sampler, torch in float64 and each other, with their gradients."""
    drawn = _drawn(run, kind, OPTIONS[name])
    weights = torch.linspace(-1, 1, len(drawn.logits), device=run.device)
    leaf = drawn.logits.clone().requires_grad_()
    many = _found(leaf, drawn.targets, outside=True, **drawn.options)
    (gradient,) = torch.autograd.grad((many.logprobs * weights).sum(), leaf)
    said = f"{kind} {name}:"
    for right, what in (
        *_against_sampler(drawn, many),
        *_against_float64(drawn, gradient, weights),
        *_against_itself(drawn, many.logprobs, gradient, weights),
    ):
        run.session.check(right, f"{said} {what}")


def _drawn(run: Training, kind: str, options: dict[str, Any]) -> Drawn:
    """Tokens of the sampler, then any; one of these is ignored."""
    logits = run.logits(kind, run.size.checked, seed=3)
    few = run.size.sampled
    sampled = fl.sample(logits[:few], seeds=5, positions=9, logprobs="processed", return_kept="bits", **options)
    targets = run.targets(len(logits))
    targets[:few] = sampled.tokens
    targets[few] = _IGNORED
    return Drawn(logits, targets, sampled, options)


def _against_sampler(drawn: Drawn, many: Any) -> Iterator[tuple[bool, str]]:
    sampled = drawn.sampled.logprobs
    n = len(sampled)
    logits, targets = drawn.logits[:n], drawn.targets[:n]
    few = _found(logits, targets, **drawn.options)
    of_sets = _found(logits, targets, kept=drawn.sampled.kept, **drawn.beside)
    for what, its in (("few rows", few), ("many rows", many.logprobs[:n]), ("kept bits", of_sets)):
        yield torch.equal(its, sampled), f"{what} equal the sampler, off in {int((its != sampled).sum())}"
    yield not many.outside[:n].any(), "nothing sampled is outside"


def _against_float64(drawn: Drawn, gradient: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[bool, str]]:
    sampled = drawn.sampled.logprobs
    n = len(sampled)
    at = drawn.targets[:n, None]
    x = (drawn.logits[:n].double() / drawn.temperature).masked_fill(~drawn.sampled.kept.mask(), -math.inf)
    x = x.log_softmax(-1)
    error = float((x.gather(1, at).squeeze(1) - sampled.double()).abs().max())
    yield error < 2e-5, f"float64 within {error:.1e}"
    weight = weights[:n, None].double()
    wanted = (-x.exp() * weight).scatter_add_(1, at, weight) / drawn.temperature
    # The gradient is rounded to bfloat16.
    off = float(((gradient[:n].double() - wanted).abs() - wanted.abs() * 2**-8).max())
    yield off < 1e-5, f"gradient within a rounding and {off:.1e}"
    yield not gradient[n].any(), "an ignored row has gradient 0"


def _against_itself(
    drawn: Drawn, logprobs: torch.Tensor, gradient: torch.Tensor, weights: torch.Tensor
) -> Iterator[tuple[bool, str]]:
    memory = drawn.logits.clone().requires_grad_() * 1.0
    (_found(memory, drawn.targets, inplace_backward=True, **drawn.options) * weights).sum().backward()
    yield torch.equal(memory.detach(), gradient), "in place"
    n, V = drawn.logits.shape
    wide = torch.empty(n, V + 7, dtype=drawn.logits.dtype, device=drawn.logits.device)
    wide[:, 7:] = drawn.logits
    strided = _found(wide[:, 7:], drawn.targets, **drawn.options)
    yield torch.equal(strided, logprobs), f"strided, off in {int((strided != logprobs).sum())}"


def check_captured(run: Training, name: str) -> None:
    """A step never waits for the GPU; a captured one and a compiled one give what an eager one gives."""
    logits = run.logits(GAUSS, run.size.checked).requires_grad_()
    targets, options = run.targets(run.size.checked), OPTIONS[name]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        found = _found(logits, targets, **options)
        return found, torch.autograd.grad(found.sum(), logits)[0]

    _without_waiting(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.normal_().mul_(2)
    targets.random_(run.size.vocab)
    graph.replay()
    torch.cuda.synchronize()
    eager = step()
    run.session.check(all(map(torch.equal, captured, eager)), f"captured {name}")

    def total(x: torch.Tensor) -> Any:
        return _found(x * 1.0, targets, **options).sum()

    leaf = logits.detach().clone().requires_grad_()
    torch.compile(total)(leaf).backward()
    run.session.check(leaf.grad is not None and torch.equal(leaf.grad, eager[1]), f"compiled {name}")


def _without_waiting(step: Callable[[], object]) -> None:
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_captured_sampling(run: Training) -> None:
    """Sampling that returns the ids it kept, captured."""
    sampler = fl.Sampler(logprobs="processed", return_kept=_ROOM, **OPTIONS["k p"])
    x = run.logits(GAUSS, _ROOM)
    at = run.targets(_ROOM)

    def call() -> Any:
        return sampler(x, at, at)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    eager = call()
    same = torch.equal(captured.kept.ids, eager.kept.ids) and torch.equal(captured.logprobs, eager.logprobs)
    run.session.check(same, "sampling with kept ids, captured")


# -- Times -----------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(x_ptr, out_ptr, V, parts, stride_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One read of the logits, as fast as it can be."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    token = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_row + token, mask=token < V, other=float("-inf"))
    tl.store(out_ptr + program, tl.max(x.to(tl.float32)))


def _read(x: torch.Tensor) -> Callable[[], object]:
    if x.device.type != "cuda":
        return lambda: x.amax(-1)
    N, V = x.shape
    parts = -(-V // _READ_BLOCK)
    out = torch.empty(N * parts, device=x.device)
    return lambda: _read_kernel[(N * parts,)](x, out, V, parts, x.stride(0), BLOCK=_READ_BLOCK, num_warps=8)


def _once_us(call: Callable[[], object], device: torch.device, host_us: float) -> float:
    """Microseconds of two calls in a row, each: by events on a GPU whose host is ahead, else by the clock."""
    if device.type != "cuda":
        start = time.perf_counter_ns()
        call()
        call()
        return (time.perf_counter_ns() - start) / 2e3
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(int(_CYCLES_OF_US * (_AHEAD_US + 2 * host_us)))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    call()
    end.record()
    torch.cuda.synchronize()
    elapsed_ms: float = begin.elapsed_time(end)
    return elapsed_ms * 1e3 / 2


def _host_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds for which a call keeps the host busy, which launches on a GPU and doesn't wait for it."""
    found = []
    for _ in range(_FEWEST_TURNS):
        start = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - start) / 1e3)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(found)


def _times_us(call: Callable[[], object], device: torch.device, host_us: float) -> list[float]:
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < _FEWEST_TURNS or (len(found) < _MOST_TURNS and time.perf_counter() - start < _TURNS_S):
        found.append(_once_us(call, device, host_us))
    return found


def _time(run: Training, what: str, logits: torch.Tensor, kind: str, call: Callable[[], object]) -> None:
    """Time a call on logits, and note the most memory that it takes."""
    call()
    if run.is_cuda:
        torch.cuda.synchronize()
    peak = peak_bytes(call, run.device)  # type: ignore[arg-type]
    host_us = _host_us(call, run.device)
    found = _times_us(call, run.device, host_us)
    deciles = statistics.quantiles(found, n=10, method="inclusive")
    us = statistics.median(found)
    share = None if peak is None else peak / logits.nbytes
    run.session.rows.append({
        "logits": kind, "what": what, "rows": len(logits), "vocab": logits.shape[1], "dtype": "bfloat16",
        "us": f"{us:.1f}", "p10": f"{deciles[0]:.1f}", "p90": f"{deciles[-1]:.1f}", "host_us": f"{host_us:.1f}",
        "peak_bytes": "" if peak is None else peak, "peak_share": "" if share is None else f"{share:.4f}",
    })  # fmt: skip
    run.session.say(f"{kind:5} {len(logits):5} {what:42} {us:10.0f} us{_in_reads(run, len(logits), us)}{_shown(share)}")


def _in_reads(run: Training, rows: int, us: float) -> str:
    """A time as a multiple of one read of so many rows, and of one copy."""
    base = {row["what"]: float(row["us"]) for row in run.session.rows if row["rows"] == rows}
    return "".join(f"  {us / base[name]:6.2f} x {name}" for name in ("read", "copy_") if name in base)


def _shown(share: float | None) -> str:
    return "" if share is None else f"  peak {100 * share:6.2f} %"


def _attempt(run: Training, what: str, logits: torch.Tensor, kind: str, call: Callable[[], object]) -> None:
    """Time a call; where it fails, the others are timed all the same."""
    run.session.attempt(f"{kind} {what}", _time, run, what, logits, kind, call)


def _time_forward(run: Training, what: str, x: torch.Tensor, kind: str, call: Callable[[], object]) -> None:
    with torch.no_grad():
        _attempt(run, f"forward {what}", x, kind, call)


def _time_backward(
    run: Training, what: str, x: torch.Tensor, kind: str, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Time the backward pass alone of a function of the logits."""
    if run.session.is_late(f"{kind} backward {what}"):
        return
    leaf = x.detach().requires_grad_()
    found = function(leaf)
    ones = torch.ones_like(found)
    _attempt(run, f"backward {what}", x, kind, lambda: torch.autograd.grad(found, leaf, ones, retain_graph=True))


def time_yardsticks(run: Training, rows: int) -> None:
    """One read and one copy of so many rows."""
    x = run.logits(GAUSS, rows)
    _attempt(run, "read", x, GAUSS, _read(x))
    out = torch.empty_like(x)
    _attempt(run, "copy_", x, GAUSS, lambda: out.copy_(x))


def time_rules(run: Training, kind: str) -> None:
    """Forward and backward with each truncation."""
    x, targets = run.logits(kind, run.size.rows), run.targets(run.size.rows)
    forward = list(OPTIONS) if kind == GAUSS else ["k p", "T k p", "p", "T p"]
    backward = ["plain", "k p", "p"] if kind == GAUSS else ["k p", "p"]
    for name in forward:
        options = OPTIONS[name]
        _time_forward(run, name, x, kind, lambda options=options: _found(x, targets, **options))  # type: ignore[misc]
    for name in backward:
        options = OPTIONS[name]
        _time_backward(run, name, x, kind, lambda y, options=options: _found(y, targets, **options))  # type: ignore[misc]
    _time_forward(run, "k p, entropy", x, kind, lambda: _found(x, targets, entropy=True, **OPTIONS["k p"]))


def time_kept(run: Training) -> None:
    """Sets that sampling has returned, and the gradient in the memory of the logits."""
    rows = run.size.rows
    x, targets = run.logits(ZIPF, rows), run.targets(rows)
    forms: tuple[tuple[str, Any], ...] = (("kept ids", _ROOM), ("kept bits", "bits"))
    for what, form in forms:
        kept: Any = fl.sample(x, seeds=1, positions=1, return_kept=form, **OPTIONS["k p"]).kept
        _time_forward(run, what, x, ZIPF, lambda kept=kept: _found(x, targets, kept=kept))  # type: ignore[misc]
        if form == _ROOM:
            _time_backward(run, what, x, ZIPF, lambda y, kept=kept: _found(y, targets, kept=kept))  # type: ignore[misc]
    memory, ones = x.clone().requires_grad_(), torch.ones(rows, device=run.device)

    def both() -> object:
        memory.data.copy_(x)  # where the last gradient is
        found = _found(memory, targets, inplace_backward=True, **OPTIONS["k p"])
        return torch.autograd.grad(found, memory, ones)

    _attempt(run, "copy_, forward and backward k p, in place", x, ZIPF, both)


# -- What is used today ----------------------------------------------------------------------------------------------


def sorted_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Log-probabilities after truncation by a sort, a cumulative sum and a mask, in float32."""
    x = logits.float() / temperature
    own = x.gather(1, targets[:, None])
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        ascending, order = x.sort(dim=-1, stable=True)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        x = x.masked_fill(drop.scatter(1, order, drop), -math.inf)
    x = x.scatter(1, targets[:, None], own)
    return (own - x.logsumexp(-1, keepdim=True)).squeeze(1)


def _of_log_softmax(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return x.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _of_logsumexp(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return x.float().gather(1, targets[:, None]).squeeze(1) - x.float().logsumexp(-1)


def time_peers(run: Training) -> None:
    """Torch's own operations beside fastlogits, on fewer rows."""
    rows = max(1, run.size.rows // _OF_PEERS)
    x, targets = run.logits(GAUSS, rows), run.targets(rows)
    time_yardsticks(run, rows)
    for name in ("k p", "p"):
        options = OPTIONS[name]
        for who, function in (("sorted", sorted_logprobs), ("fastlogits", _found)):
            _time_forward(
                run, f"{who}: {name}", x, GAUSS,
                lambda function=function, options=options: function(x, targets, **options),  # type: ignore[misc]
            )  # fmt: skip
    for who, of in (("log_softmax and gather", _of_log_softmax), ("gather less logsumexp", _of_logsumexp)):
        _time_both(run, f"{who}, eager", x, targets, of)
        if run.is_cuda:
            _time_both(run, f"{who}, compiled", x, targets, torch.compile(of))
    _time_both(run, "fastlogits: plain", x, targets, _found)


def _time_both(run: Training, who: str, x: torch.Tensor, targets: torch.Tensor, function: Callable[..., Any]) -> None:
    _time_forward(run, who, x, GAUSS, lambda: function(x, targets))
    _time_backward(run, who, x, GAUSS, lambda y: function(y, targets))


# -- The run ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, write, and return the exit status: 1 where something is wrong."""
    options = _parse(arguments)
    device = torch.empty(0, device=options.device).device  # with its index
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = TINY if options.tiny else LARGE
    size = size._replace(rows=options.rows or size.rows, vocab=options.vocab or size.vocab)
    run = Training(size, Session(device, options.deadline))
    run.session.say(f"{size.rows} x {size.vocab} on {device_name(device)}, torch {torch.__version__}")
    for what, part, *given in _parts(run):
        run.session.attempt(what, part, run, *given)
        if run.is_cuda:
            torch.cuda.empty_cache()
    return run.session.finish(device_name(device), options.out)


def _parts(run: Training) -> Iterator[tuple[Any, ...]]:
    """What is done, in order: its name, and what to call besides the run."""
    if run.is_cuda:
        yield "compile", compile_all
    for kind, name in CHECKED:
        yield f"check {kind} {name}", check, kind, name
    yield "time yardsticks", time_yardsticks, run.size.rows
    for kind in (GAUSS, ZIPF):
        yield f"time {kind}", time_rules, kind
    yield "time kept", time_kept
    yield "time peers", time_peers
    if run.is_cuda:
        for name in ("plain", "T k p", "p"):
            yield f"check captured {name}", check_captured, name
        yield "check captured sampling", check_captured_sampling


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    said = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=said)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--rows", type=int, help=f"that are timed; default: {LARGE.rows}, tiny {TINY.rows}")
    parser.add_argument("--vocab", type=int, help=f"default: {LARGE.vocab}, tiny {TINY.vocab}")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing more is begun")
    parser.add_argument("--tiny", action="store_true", help="a few short rows, to see that it runs")
    parser.add_argument("--out", type=Path, default=LOCAL / "training", metavar="DIR", help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
