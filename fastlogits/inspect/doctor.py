"""What this machine runs: versions, devices, the path that calls take and why, and a self-test of a few seconds."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.draw import draw
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import driver as cuda_driver
from fastlogits_kernels.runtime.backend import BACKEND, INTERPRETED, absence, lost_on, unsupported
from fastlogits_kernels.runtime.launcher import triton
from fastlogits_kernels.truncate.reference import reference_truncate

import fastlogits as fl
from fastlogits.inspect.check import check
from fastlogits.inspect.hooks import transformers_is_seen, tried_hooks, vllm_problems, vllm_sampler_problems

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "rich", "matplotlib", "pandas")
_B, _V, _L = 4, 32003, 64


class Finding(NamedTuple):
    """One line of the report."""

    subject: str
    found: str
    good: bool = True


def findings(device: torch.device) -> Iterator[Finding]:
    """The report on a device, line by line."""
    yield Finding("fastlogits", fl.__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from (Finding(name, _version(name)) for name in _PACKAGES)
    yield Finding("device", _described(device))
    yield Finding("path", path(device))
    yield Finding("bandwidth", f"{bandwidth(device) / 1e9:,.0f} GB/s, as a copy moves")
    for subject, test in _TESTS.items():
        start = time.perf_counter()
        try:
            problem = test(device)
        except Exception as error:  # a broken installation may raise anything
            problem = f"{type(error).__name__}: {error}"
        took = f"{time.perf_counter() - start:.1f} s"
        yield Finding(f"self-test: {subject}", f"right, {took}" if problem is None else problem, problem is None)
    yield from _hooks()
    yield Finding("launcher", launcher(device))
    for name, reason in lost_on(device).items():  # which the tests have found
        yield Finding(f"kernels of {name}", f"torch instead: {reason}", False)


def _hooks() -> Iterator[Finding]:
    """Whether what depends on the inside of transformers and vLLM still holds."""
    tried = list(tried_hooks())
    broken = [each for each in tried if each.problem is not None]
    installed = f"transformers {_version('transformers')}"
    seen = "" if transformers_is_seen() else "; no test has seen this version"
    yield Finding("hooks", f"{len(tried) - len(broken)} of {len(tried)} hold in {installed}{seen}", not broken)
    for hook, problem in broken:
        yield Finding(
            f"hook of {hook.purpose}", f"{problem}. It depends on this: {hook.depends_on}. {hook.without}", False
        )
    for lost in vllm_problems() or ():
        yield Finding("hook into vLLM", lost, False)
    missing = vllm_sampler_problems()
    if missing is not None:
        fits = "fits; FASTLOGITS_VLLM_SAMPLER=1 puts it in the place of vLLM's own"
        unfit = f"vLLM's own is left in its place: {'; '.join(missing)}"
        yield Finding("sampler for vLLM", unfit if missing else fits, not missing)


def path(device: torch.device) -> str:
    """Which code a call with scores on the device runs, and why."""
    if device.type != "cuda":
        if BACKEND == "triton" and INTERPRETED:
            return "Triton's interpreter, which is slow: FASTLOGITS_BACKEND is triton; auto runs torch"
        if BACKEND == "triton":
            return f"none: FASTLOGITS_BACKEND is triton, and scores on {device.type} have no kernels; auto runs torch"
        return f"torch: the kernels are for CUDA; scores on {device.type} take the reference code in torch"
    reason = absence() or unsupported(device)
    if reason is not None:
        return f"torch, with some operations for each stage: {reason}"
    if INTERPRETED:
        return "Triton's interpreter, a thousand times slower than a GPU: TRITON_INTERPRET is set, unset it"
    return f"kernels: CUDA, and Triton {triton.__version__}; torch runs what they don't take (gradients, other shapes)"


def launcher(device: torch.device) -> str:
    """What launches the kernels on the device, and why."""
    if device.type != "cuda" or absence() or unsupported(device):
        return "none: no kernel is launched"
    reason = cuda_driver.objection(device)
    if reason is not None:
        return f"Triton's, which takes the host longer: {reason}"
    found = "the CUDA driver, with arguments laid out once; FASTLOGITS_LAUNCHER=triton switches it off"
    if cuda_driver.refused:
        others = ", ".join(f"{name} ({why})" for name, why in cuda_driver.refused.items())
        found += f". Triton's for {others}"
    return found


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes on the device."""
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return "not installed"


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB"
        return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def _inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(_B, _V, generator=generator) * 3
    return torch.randint(0, 200, (_B, _L), generator=generator).to(device), scores.to(device)


def _test_masks(device: torch.device) -> str | None:
    ids, scores = _inputs(device)
    banned = list(range(5, _V, 7))
    first = fl.SuppressFirstTokens(banned).for_run(prompt_length=torch.full((_B,), _L, device=device))
    expected = scores.clone()
    expected[:, banned] = float("-inf")
    return (
        None if torch.equal(first(ids, scores), expected) else "a mask at the first step differs from an indexed fill"
    )


def _test_fold(device: torch.device) -> str | None:
    return _checked(device, _pointwise(device))


def _test_truncations(device: torch.device) -> str | None:
    rules = [fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9)]
    return _checked(device, [*_pointwise(device), *rules]) or _checked(device, [fl.TopPLogitsWarper(0.9)])


def _test_sampling(device: torch.device) -> str | None:
    _, scores = _inputs(device)
    seeds = torch.arange(_B)
    params = fl.SamplingParams(temperature=0.7, top_k=50, top_p=0.9)
    here = fl.sample(scores, seeds=seeds.to(device), positions=seeds.to(device), params=params).tokens
    # By the reference functions: with FASTLOGITS_BACKEND=triton the operations have no others on the CPU.
    kept = reference_truncate(scores.cpu() / 0.7, [Rule("top_k", 50), Rule("top_p", 0.9)])
    if not bool(kept.gather(1, here.cpu().unsqueeze(1)).isfinite().all()):
        return "a token was sampled that the truncations drop"
    on_cpu = draw(kept, seeds, seeds)
    if not torch.equal(here.cpu(), on_cpu):
        return f"sampled {here.tolist()}, where the CPU samples {on_cpu.tolist()} from the same logits and seeds"
    greedy = fl.sample(scores, seeds=seeds.to(device), positions=seeds.to(device), temperature=0.0).tokens
    return None if torch.equal(greedy, scores.argmax(-1)) else "a greedy row did not get its most likely token"


def _pointwise(device: torch.device) -> list[Any]:
    return [
        fl.RepetitionPenaltyLogitsProcessor(1.1),
        fl.NoRepeatNGramLogitsProcessor(3),
        fl.NoBadWordsLogitsProcessor([[5], [6, 7]]),
        fl.MinNewTokensLengthLogitsProcessor(_L, 8, [2, 3], str(device)),
        fl.SuppressTokensAtBeginLogitsProcessor(range(15, 25), _L, str(device)),
        fl.TemperatureLogitsWarper(2.0),  # flat enough for each truncation to drop something
    ]


def _checked(device: torch.device, processors: list[Any]) -> str | None:
    outcome = check(processors, *_inputs(device))
    return None if outcome else str(outcome)


_TESTS: dict[str, Callable[[torch.device], str | None]] = {
    "masks against an indexed fill": _test_masks,
    "penalties, bans and temperature against transformers": _test_fold,
    "truncations against transformers": _test_truncations,
    "sampling against the CPU": _test_sampling,
}
