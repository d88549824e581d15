"""The launches of a call, without making them: what a GPU would compile for each, on a machine that has none.

    python -m tests.kernels.launches keys             # two launches of one key that aren't the same to Triton
    python -m tests.kernels.launches resources 90     # registers, spills and wide accesses, compiled for sm_90
    python -m tests.kernels.launches pairs 90         # the same of each call with one dtype, and each kernel with all
    python -m tests.kernels.launches brief 80         # the same of fewer calls, each kernel once
    python -m tests.kernels.launches smallest 90      # what Triton takes for one row of one token
    python -m tests.kernels.launches amd              # what compiles for gfx942 and gfx950
    python -m tests.kernels.launches clashes          # constants of one name that differ between functions of a kernel
    python -m tests.kernels.launches sources 1        # by what Triton's cache is asked, after kernels in some order

In a process without Triton's interpreter, which compiles nothing. Several commands print one list. All print JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from fastlogits_kernels.parallel import launch as parallel
from fastlogits_kernels.parallel.report import report_of_part
from fastlogits_kernels.rules import RULES, Rule, argument_of
from fastlogits_kernels.runtime import backend, driver, launcher
from fastlogits_kernels.runtime.launcher import Launch, Launcher, triton
from fastlogits_kernels.selection import launch, launchers
from fastlogits_kernels.serving import search
from fastlogits_kernels.training.reference import Task
from fastlogits_kernels.training.ruled_shards import fixed_number_of, ruled_logprobs_of_part
from fastlogits_kernels.training.sets import GivenSets
from fastlogits_kernels.training.shards import Place, logprobs_of_part

import fastlogits as fl
from fastlogits.plan.fusion import parts_of
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.run import Run
from fastlogits.processors.base import member_of
from tests.campaign.sanitizer_cases import CASES, OPERATIONS, Given, forced

V = 128256
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@contextmanager
def captured(hopper: bool = True, amd: bool = False) -> Iterator[list[Launch]]:
    """The launches that calls with tensors on the CPU would make on an NVIDIA GPU, from Hopper on or not, or on AMD."""
    made: list[Launch] = []

    def note(self: Launcher, key: tuple[Any, ...], programs: int, args: tuple[Any, ...]) -> None:
        made.append(Launch(self, key, programs, args))

    with (
        mock.patch.object(Launcher, "__call__", note),
        mock.patch.object(launchers, "is_portable", return_value=amd),
        mock.patch.object(launchers, "overlaps", return_value=hopper),
        mock.patch.object(search, "overlaps", return_value=hopper),
        mock.patch.object(parallel, "overlaps", return_value=hopper),
        forced(True),
    ):
        yield made


def _kind(argument: Any, specialised: bool, aligned: bool) -> Any:
    """What Triton takes an argument for: its type, and what it knows of it beside."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    if isinstance(argument, torch.Tensor):
        known = specialised and aligned and argument.data_ptr() % 16 == 0
        return "*" + _TYPES[argument.dtype], "D" if known else ""
    if isinstance(argument, tuple):
        # Triton asks the decorator of arguments, not of what is in a tuple.
        kinds = [_kind(each, True, aligned) for each in argument]
        return tuple(kind for kind, _ in kinds), tuple(known for _, known in kinds)
    return native_specialize_impl(CUDABackend, argument, False, specialised, aligned)[:2]


def variant(made: Launch) -> dict[str, Any]:
    """What a launch compiles, by the names of its arguments; constants as they are."""
    return {
        parameter.name: argument
        if parameter.is_constexpr
        else _kind(argument, not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment)
        for parameter, argument in zip(made.launcher.kernel.params, made.args, strict=True)
    }


def source_of(made: Launch) -> Any:
    """What Triton is asked to compile for a launch."""
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def walk(kind: Any, known: Any, path: tuple[int, ...]) -> None:
        if isinstance(kind, tuple):
            for index, (inner, of_it) in enumerate(zip(kind, known, strict=True)):
                walk(inner, of_it, (*path, index))
        elif kind == "constexpr":
            constants[path] = known
        elif known and "D" in str(known):
            attributes[path] = [["tt.divisibility", 16]]

    for index, (name, kind) in enumerate(variant(made).items()):
        if made.launcher.kernel.params[index].is_constexpr:
            signature[name], constants[index,] = "constexpr", kind
        else:
            signature[name] = kind[0]
            walk(*kind, (index,))
    return ASTSource(made.launcher.kernel, signature, constants, attributes)


def compile_for(made: Launch, target: int | str) -> Any:
    """A launch compiled for a GPU that need not be there: one of NVIDIA by its capability, or of AMD by its name."""
    return compile_source(source_of(made), made, target)


def compile_source(source: Any, made: Launch, target: int | str) -> Any:
    """The same of a source of one's own, as the launch would have it compiled."""
    from triton.backends.compiler import GPUTarget

    options = made.launcher._options
    if isinstance(target, str):  # which has no limit of registers to give
        options = {name: options[name] for name in ("num_warps", "enable_fp_fusion") if name in options}
        return triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


# -- Two launches of one key ----------------------------------------------------------------------------------------


def _many_calls() -> None:
    """Calls that differ in all that may be told apart."""
    cpu = torch.device("cpu")
    for case in CASES:
        for strided in () if case.far else (False, True):
            OPERATIONS[case.operation].run(Given(case.B, case.V, cpu, strided))
    wide = torch.zeros(40, 2 * 4096 + 3)
    rows = torch.linspace(0.1, 0.9, 41)
    longs = torch.arange(82)
    for B in (1, 2, 16, 17):
        for first, step, width in ((0, 1, 4096), (1, 1, 4096), (0, 2, 4096), (3, 1, 4000), (0, 1, 8195)):
            scores = wide[:B, first : first + step * width : step]
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                given = scores.to(dtype) if dtype != torch.float32 else scores
                for seeds in (3, longs[:B], longs[1 : B + 1], longs[: 2 * B : 2]):
                    for temperature in (0.7, rows[:B], rows[1 : B + 1]):
                        sampler = fl.Sampler(temperature=temperature, top_k=50, top_p=rows[1 : B + 1], logprobs="raw")
                        sampler(given, seeds, seeds)
                for rules in ((Rule("top_k", 50), Rule("top_p", rows[:B])), (Rule("min_p", 0.1),), (Rule("eta", 0.1),)):
                    launch.select(given, launch.Selection(rules, given.shape[1], cpu))
                _train_on(given, rows, longs)


def _train_on(given: torch.Tensor, rows: torch.Tensor, longs: torch.Tensor) -> None:
    """Log-probabilities and their gradients, of what is known in every way."""
    B, V = given.shape
    for options in ({"top_k": 50, "top_p": 0.9}, {"top_p": rows[:B]}, {"typical_p": 0.9}):
        for targets in (longs[:B], longs[1 : B + 1], longs[: 2 * B : 2].int()):
            _backward(given, targets, temperature=rows[1 : B + 1], **options)
    ids = torch.zeros(41, 9, dtype=torch.int64)
    for kept in (
        fl.KeptTokens(V, ids[:B, :7], longs[:B]), fl.KeptTokens(V, ids[1 : B + 1].int(), longs[: 2 * B : 2]),
        fl.KeptTokens(V, ids[0], offsets=longs[: B + 1]), fl.KeptTokens(V, bits=torch.zeros(B, 300, dtype=torch.int32)),
    ):  # fmt: skip
        _backward(given, longs[:B], kept=kept)
        _backward(given, longs[:B], kept=kept, ignore_index=1)
        for first in (0, 1, 48, 2049):
            sets = kept.flat(B)
            _in_part(given, Task(longs[1 : B + 1], rows[1 : B + 1], (), sets, -100), first)
    for first in (1, 17, 48, 2048, 2049):
        _report_of_part(given, longs[:B], first)
        _report_of_part(given, longs[: 2 * B : 2], first)
    for first in (0, 1, 17, 48, 2048, 2049):
        _in_part(given, Task(longs[:B], rows[1 : B + 1], (), None, -100), first, 2 + first % 2)
        _in_part(given, Task(longs[: 2 * B : 2], None, (), None, 1), first)
    _backward(given, longs[:B], ignore_index=-(2**40))
    fl.sample(given, seeds=0, positions=0, top_k=9, logprobs="processed", return_kept=8)


def _in_part(given: torch.Tensor, task: Task, first: int, ranks: int = 2) -> None:
    """Log-probabilities of a part of a vocabulary that begins at ``first``."""
    width = given.shape[1]
    starts, sizes = ([0, first], [first, width]) if first else ([0, width], [width, 1])
    starts, sizes = starts + [first + width] * (ranks - 2), sizes + [5] * (ranks - 2)
    place = Place.of(starts, sizes, 1 if first else 0)
    if task.kept is None and width > 60:
        for ties in ("all", "lowest"):
            rules = (Rule("top_k", 50, ties=ties), Rule("top_p", 0.9, ties=ties))  # type: ignore[arg-type]
            ruled = task._replace(rules=rules)
            step = fixed_number_of(given, ruled, place, width)
            assert step is not None
            ruled_logprobs_of_part(given, ruled, place, step, ties == "all", lambda told: _of_all(told, ranks), clone)
    for entropy in (False, True):
        logprobs_of_part(given, task, place, entropy, lambda told: _of_all(told, ranks), clone)


def _of_all(mine: torch.Tensor, ranks: int) -> torch.Tensor:
    """What ranks tell that all tell the same."""
    return mine.expand(ranks, *mine.shape).contiguous()


def clone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy."""
    return tensor.clone()


def _backward(logits: torch.Tensor, targets: torch.Tensor, **options: Any) -> None:
    leaf = logits.detach().requires_grad_()
    # Nobody runs the launches, so there is a log-probability of anything.
    found = fl.logprobs(leaf, targets.clamp(max=logits.shape[1] - 1), entropy=len(options) > 2, **options)
    total = found if isinstance(found, torch.Tensor) else found.logprobs + found.entropy
    total.sum().backward()  # type: ignore[union-attr]


def keys() -> list[str]:
    """Launches that relaunch a compiled kernel which Triton would have compiled otherwise."""
    with captured() as made:
        _many_calls()
    first: dict[Any, dict[str, Any]] = {}
    found: list[str] = []
    for each in made:
        now = variant(each)
        before = first.setdefault((id(each.launcher), each.key), now)
        found += [
            f"{each.launcher.kernel.__name__}, {name}: {before[name]}, then {now[name]}"
            for name in now
            if before[name] != now[name]
        ]
    assert len(made) > len(first) > 100, "nothing was launched twice"
    return list(dict.fromkeys(found))


# -- What kernels take of a GPU -------------------------------------------------------------------------------------


def _warp(dtype: torch.dtype) -> None:
    warpers = [fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9)]
    plan = fl.LogitsProcessorList(warpers).plan
    plan(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, V, dtype=dtype))


def _draw(dtype: torch.dtype) -> None:
    seeds = torch.arange(2)
    fl.Sampler(temperature=torch.ones(2), top_k=50, top_p=0.9)(torch.zeros(2, V, dtype=dtype), seeds, seeds)


def _typical(dtype: torch.dtype) -> None:
    selection = launch.Selection((Rule("typical", 0.9), Rule("top_n_sigma", 1.0)), V, torch.device("cpu"))
    launch.select(torch.zeros(2, V, dtype=dtype), selection)


def _serve(dtype: torch.dtype) -> None:
    batch = fl.BatchProcessor(2, V, "cpu", max_length=64, max_logprobs=2)
    slots = [batch.add(fl.RequestParams(logprobs=2), [1]) for _ in range(2)]
    logits = torch.zeros(2, V, dtype=dtype)
    batch.sample(logits, slots, logprobs="processed")
    batch.apply(logits, slots)


def _sample(dtype: torch.dtype) -> None:
    fl.Sampler(temperature=0.7)(torch.zeros(2, V, dtype=dtype), 0, 0)


def _train(dtype: torch.dtype) -> None:
    logits, targets = torch.zeros(2, V, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    _backward(logits, targets, temperature=0.7)
    kept = fl.sample(logits, seeds=0, positions=0, top_k=9, logprobs="processed", return_kept=8).kept
    _backward(logits, targets, kept=kept)
    for sets in (None, kept.flat(2), GivenSets(bits=torch.zeros(2, V // 32 + 4, dtype=torch.int32))):
        _in_part(logits, Task(targets, torch.tensor(0.7), (), sets, -100), 48, 4)
    _backward(logits, targets, top_k=50, top_p=0.9)
    _backward(logits, targets, top_p=0.9, temperature=0.7)


def _report_of_part(logits: torch.Tensor, tokens: torch.Tensor, first: int) -> None:
    """Reports on a part of a vocabulary that begins at ``first``."""
    place = Place.of([0, first, first + logits.shape[1]], [first, logits.shape[1], 9], 1)
    for count in (0, 1, 5, 16):
        report_of_part(logits, tokens, count, place, lambda sent: _of_all(sent, 3), clone)


def _folded(logits: torch.Tensor) -> Any:
    """What processors before a sampler bring."""
    processors = fl.RepetitionPenaltyLogitsProcessor(1.2), fl.LogitBiasLogitsProcessor({5: 1.0, 300: -1.0})
    (fold,) = parts_of([member_of(each) for each in processors])
    assert isinstance(fold, Pointwise)
    return fold.inputs(torch.arange(8).expand(2, -1), logits, Run.of(None, None))


def _parts(dtype: torch.dtype) -> None:
    rules, cpu, own = (Rule("top_k", 50), Rule("top_p", 0.9)), torch.device("cpu"), V // 4
    seeds, logits = torch.arange(2), torch.zeros(2, own, dtype=dtype)
    for temperature in (torch.tensor(0.7), torch.ones(2)):
        steps: list[Any] = [parallel.TopShards(rules, 128, V, own, own, cpu), parallel.BestShards(own, own, cpu)]
        for kept in (("top_p", 0.9), ("top_a", 0.1), ("min_p", 0.1)):
            place = Place.of([0, own, 2 * own, 3 * own], [own] * 4, 1)
            steps.append(parallel.FrontShards((Rule(*kept),), place, cpu))
        for step in steps:
            for inputs in ((), _folded(logits)):
                begun = step.begin(logits, seeds, seeds, temperature, *inputs)
                begun.finish(_of_all(begun.sent, 4), clone)
    _report_of_part(logits, seeds, 48)


CALLS: list[tuple[str, Callable[[torch.dtype], None], torch.dtype]] = [
    ("list", _warp, torch.float32), ("list", _warp, torch.bfloat16), ("draw", _draw, torch.float32),
    ("draw", _draw, torch.bfloat16), ("typical", _typical, torch.float32), ("serving", _serve, torch.float32),
    ("sample", _sample, torch.float32), ("sample", _sample, torch.bfloat16), ("train", _train, torch.bfloat16),
    ("parts", _parts, torch.float32), ("parts", _parts, torch.bfloat16),
]  # fmt: skip


BRIEF = (("serving", torch.float32), ("sample", torch.bfloat16), ("parts", torch.float32))
"""Calls that bring each kernel at least once, and all rules."""
PAIRS = (
    ("list", torch.bfloat16), ("draw", torch.float32), ("typical", torch.float32), ("serving", torch.float32),
    ("sample", torch.float32), ("train", torch.bfloat16), ("parts", torch.bfloat16),
)  # fmt: skip
"""Each call, with the dtype that its kernels don't have in another call or in ``BRIEF``."""


def _said_by_ptxas(_: Any, ptx: str, metadata: dict[str, Any], options: Any, capability: int) -> bytes:
    """Stands in for a compiled kernel's code: what ptxas says of it."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)[1]  # type: ignore[index]
        command = [get_ptxas(capability).path, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, check=True).stderr


@contextmanager
def measured() -> Iterator[None]:
    """Kernels that are compiled in here are for ``taken``, in a cache of their own."""
    from triton.backends.nvidia.compiler import CUDABackend

    folder = os.path.join(triton.knobs.cache.dir, "fastlogits-measured")
    with (
        mock.patch.object(CUDABackend, "make_cubin", _said_by_ptxas),
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}),
    ):
        yield


@contextmanager
def loading(utils: Any) -> Iterator[None]:
    """Have Triton's driver for NVIDIA's GPUs without one; ``utils`` is what it loads kernels with."""
    from triton.backends.nvidia.driver import CudaLauncher

    active = mock.Mock(launcher_cls=CudaLauncher, utils=utils)
    active.get_current_device.return_value = 0
    with mock.patch.object(triton.runtime.driver, "_active", active):
        yield


def taken(compiled: Any) -> dict[str, Any]:
    """Registers, bytes spilled and accesses of 16 bytes of a kernel that was compiled where it is ``measured``.

    And what keeps it from being launched through the CUDA driver.
    """
    said = compiled.asm["cubin"].decode()
    utils = mock.Mock()
    utils.get_device_properties.return_value = {"max_shared_mem": compiled.metadata.shared}
    utils.load_binary.return_value = (1, 1, 0, 0, 1024)
    try:
        unfit = ""
        with loading(utils):
            driver.entry_of(compiled)
    except driver.UnfitError as error:
        unfit = str(error)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),  # type: ignore[index]
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),  # type: ignore[index]
        "wide": len(re.findall(r"(?:ld|st)\.global[^\s]*\.v4", compiled.asm["ptx"])),
        "unfit": unfit,
    }


def resources(
    capability: int, calls: Collection[tuple[str, torch.dtype]] = (), once: bool = False
) -> dict[str, dict[str, Any]]:
    """What each kernel of the selection takes, by call, kernel and dtype; of all calls or some, or each kernel once."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for call, run, dtype in CALLS:
        if calls and (call, dtype) not in calls:
            continue
        with captured(hopper=capability >= 90) as made:
            run(dtype)
        for each in made:
            kernel = each.launcher.kernel.__name__.strip("_").removesuffix("_kernel")
            name = f"{kernel} {call} {_TYPES[dtype]}"
            if name not in found and not (once and kernel in seen):
                seen.add(kernel)
                with measured():
                    found[name] = taken(compile_for(each, capability))
    return found


def brief(capability: int) -> dict[str, dict[str, Any]]:
    """The same of a few calls, each kernel once."""
    return resources(capability, BRIEF, once=True)


def pairs(capability: int) -> dict[str, dict[str, Any]]:
    """The same of each call with one dtype."""
    return resources(capability, PAIRS)


def _smallest() -> None:
    """One of everything: a row, a token, a rule of each kind, a request that asks for all."""
    cpu = torch.device("cpu")
    for operation in OPERATIONS.values():
        if operation.least_vocab <= 1:
            operation.run(Given(1, 1, cpu))
    one, seeds = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    for first in (0, 1):
        for sets in (None, GivenSets(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))):
            _in_part(one, Task(seeds, None, (), sets, -100), first)
    _report_of_part(one, seeds, 1)
    values = {kind: 1 if spec.integer else 0.5 for kind, spec in RULES.items()}
    for ties in ("all", "lowest"):
        rules = tuple(Rule(kind, value, ties=ties if kind == "top_k" else "all") for kind, value in values.items())
        launch.select(one, launch.Selection(rules, 1, cpu))
        launch.select_tokens(one, launch.Selection(rules, 1, cpu), seeds, seeds)
    launch.select_tokens(one, launch.Selection((), 1, cpu), seeds, seeds)
    asked = {argument_of(kind): value for kind, value in values.items()}
    asked |= {"temperature": 0.7, "repetition_penalty": 2.0, "dry_multiplier": 1.0, "no_repeat_ngram_size": 2}
    asked |= {"logit_bias": {0: 1.0}, "forced_tokens": [0], "logprobs": 1}
    batch = fl.BatchProcessor(1, 1, cpu, max_length=8, max_logprobs=1)
    slots = [batch.add(fl.RequestParams(**asked), [0, 0])]
    for logprobs in ("raw", "processed"):
        batch.sample(one, slots, logprobs=logprobs)
    batch.apply_(one, slots, bitmask=torch.ones(1, 1, dtype=torch.int32))
    batch.append(slots, [0])


def smallest(capability: int) -> list[str]:
    """Kernels that Triton takes where sizes and strides are 1; the first that it doesn't raises."""
    with captured(hopper=capability >= 90) as made:
        _smallest()
    found: dict[str, Launch] = {}
    for each in made:
        found.setdefault(f"{each.launcher.kernel.__name__} {variant(each)} {each.launcher._options}", each)
    with _read_only():
        for each in found.values():
            compile_for(each, capability)
    return sorted({name.split()[0] for name in found})


@contextmanager
def _read_only() -> Iterator[None]:
    """Kernels that are compiled in here are read and checked by Triton, and become no code: that takes longest."""
    from triton.backends.nvidia.compiler import CUDABackend

    def no_code(_: Any, ir: Any, metadata: dict[str, Any], *options: Any) -> str:
        return metadata.setdefault("name", "")

    folder = os.path.join(triton.knobs.cache.dir, "fastlogits-read")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}))
        stack.enter_context(mock.patch.object(CUDABackend, "make_ttgir", staticmethod(lambda ir, *options: ir)))
        stack.enter_context(mock.patch.object(CUDABackend, "make_llir", no_code))
        stack.enter_context(mock.patch.object(CUDABackend, "make_ptx", no_code))
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", return_value=b""))
        stack.enter_context(mock.patch.object(CUDABackend, "pack_metadata", return_value=None))
        yield


def amd() -> dict[str, list[str]]:
    """Kernels that compile for GPUs of AMD, by their names; the first that doesn't raises.

    Those of a list for one, those of a draw for the other, and for both those that need no rule.
    """
    calls = {"gfx942": ((_warp, torch.float32), (_sample, torch.bfloat16)), "gfx950": ((_draw, torch.bfloat16),)}
    calls["gfx950"] += calls["gfx942"][1:]
    found = {}
    for target, some in calls.items():
        with captured(hopper=False, amd=True) as made:
            for call, dtype in some:
                call(dtype)
        for each in made:
            assert compile_for(each, target).asm["amdgcn"]
        found[target] = sorted({each.launcher.kernel.__name__ for each in made})
    return found


def sources(seed: int) -> dict[str, list[str]]:
    """The hashes of what calls compile, by kernel, where a process compiles them in an order of its own."""
    with captured() as made:
        for _, run, dtype in CALLS:
            run(dtype)
    random.Random(seed).shuffle(made)
    hashed = mock.patch.object(type(made[0].launcher.kernel), "warmup", lambda kernel, *_, **__: kernel.cache_key)
    supported = mock.patch.object(backend, "unsupported", return_value=None)
    with hashed, supported, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: each.launcher.compile(torch.device("cuda"), 1, each.args), made))
    found: dict[str, set[str]] = {}
    for each in made:
        found.setdefault(each.launcher.name, set()).add(source_of(each).hash())
    return {name: sorted(found[name]) for name in sorted(found)}


def clashes() -> list[str]:
    """Constants of one name that differ between functions of one kernel."""
    with captured() as made:
        for _, run, dtype in CALLS:
            run(dtype)
    found = set()
    for kernel in {each.launcher.kernel for each in made}:
        launcher._hash_inside_out(kernel)
        values: dict[str, Any] = {}
        for (name, _), (value, _) in kernel.used_global_vals.items():
            if repr(values.setdefault(name, value)) != repr(value):
                found.add(f"{kernel.__name__}: {name}")
    return sorted(found)


COMMANDS: dict[str, Callable[..., Any]] = {
    "keys": keys, "resources": resources, "brief": brief, "smallest": smallest, "amd": amd, "clashes": clashes,
    "sources": sources, "pairs": pairs,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="+", metavar="command", help=f"{', '.join(COMMANDS)}; each with its number behind it"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run commands, and print what they have found as JSON: one thing, or a list of several."""
    parser = _parser()
    words = parser.parse_args(arguments).words
    starts = [index for index, word in enumerate(words) if word in COMMANDS]
    if not starts or starts[0] or not all(word.isdigit() for word in words if word not in COMMANDS):
        parser.error(f"commands must be {', '.join(COMMANDS)}, each with its number behind it, got {' '.join(words)}")
    found = [
        COMMANDS[words[start]](*map(int, words[start + 1 : stop]))
        for start, stop in zip(starts, [*starts[1:], None], strict=True)
    ]
    print(json.dumps(found if len(found) > 1 else found[0]))


if __name__ == "__main__":
    main()
