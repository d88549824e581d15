"""What launches hand to the CUDA driver, on a machine without a GPU.

    python -m tests.kernels.driver_calls build FOLDER    # a library that stands in for the driver, into a folder
    python -m tests.kernels.driver_calls compare         # our launches beside those of Triton's launcher

The second in a process without Triton's interpreter, whose ``LD_LIBRARY_PATH`` and ``TRITON_LIBCUDA_PATH`` are that
folder: Triton's launcher is compiled as it is, and links to the library too. Both print JSON.
"""

from __future__ import annotations

import argparse
import ast
import copy
import ctypes
import gc
import json
import re
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import driver as cuda_driver
from fastlogits_kernels.runtime import launcher as runtime
from fastlogits_kernels.runtime.launcher import Launch, Relaunches
from fastlogits_kernels.selection import launch, launchers
from fastlogits_kernels.serving import search, steps

import fastlogits as fl
from tests.campaign.sanitizer_cases import OPERATIONS, Given, forced
from tests.kernels.launches import captured, compile_source, loading, source_of

V = 4096


# -- Launches without a GPU -----------------------------------------------------------------------------------------


def hollow(made: Launch, shared: int) -> Any:
    """What a launch compiles, without its body: the parameters stay, and a launcher asks for nothing else.

    That real bodies take what is launched this way is seen where they are compiled, see ``launches.taken``.
    """
    source = source_of(made)
    tree = ast.parse(source.fn.src)
    tree.body[0].body = [ast.Pass()]  # type: ignore[attr-defined]
    source.fn = copy.copy(source.fn)
    source.fn._unsafe_update_src(ast.unparse(tree))
    compiled = compile_source(source, made, 90)
    compiled.metadata = compiled.metadata._replace(shared=shared)
    compiled.packed_metadata = (*compiled.packed_metadata[:2], shared)
    return compiled


def compile_all(launches: list[Launch]) -> None:
    """Compile and load what some launches need, and give Triton's launcher the same function."""
    from triton.backends.nvidia.driver import CudaLauncher

    for number, each in enumerate(launches, 1):
        if each.key not in each.launcher.compiled:
            compiled = hollow(each, shared=16 * number)
            each.launcher.keep(each.key, compiled)
            compiled._run = CudaLauncher(compiled.src, compiled.metadata)
            compiled.function = each.launcher.entry(each.key).function


@contextmanager
def standing_in(library: Any, stream: Callable[[], int] = lambda: 7) -> Iterator[None]:
    """Launch what is compiled through a library that stands in for the driver, for tensors on the CPU."""
    with ExitStack() as stack:
        for target, name, value in (
            (cuda_driver, "library", lambda: library), (cuda_driver, "objection", lambda device: None),
            (runtime, "current_stream", lambda index: stream()),
            (launchers, "is_portable", lambda device: False), (launchers, "overlaps", lambda device: True),
            (search, "overlaps", lambda device: True),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(forced(True))
        yield


# -- A library that stands in for the driver ------------------------------------------------------------------------

_SOURCE = """
#include <stdint.h>
#include <string.h>
typedef struct { uint32_t grid[3], block[3], shared; uint64_t stream; uint8_t *attributes; uint32_t count; } Config;
typedef struct { uint64_t function; Config config; uint32_t attributes[8]; uint32_t count; uint64_t values[128]; } Made;
static Made made[4096];
static int number, refuse_at = -1, status;
static uint64_t functions[4096];
static uint32_t counts[4096];
static uint8_t sizes[4096][128];
static int known;
static uint64_t loaded;
int cuModuleLoadData(uint64_t *module, const void *code) { *module = 1; return 0; }
int cuModuleGetFunction(uint64_t *function, uint64_t module, const char *name) { *function = 16 * ++loaded; return 0; }
int cuFuncGetAttribute(int *value, int attribute, uint64_t function) { *value = 1024; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 * 1024; return 0; }
void describe(uint64_t function, uint32_t count, const uint8_t *its) {
    functions[known] = function; counts[known] = count; memcpy(sizes[known++], its, count);
}
void refuse(int at, int with) { refuse_at = at; status = with; }
int taken(Made *to) { int all = number; memcpy(to, made, all * sizeof(Made)); number = 0; return all; }
int cuLaunchKernelEx(const Config *config, uint64_t function, void **parameters, void **extra) {
    if (refuse_at == 0) { refuse_at = -1; return status; }
    if (refuse_at > 0) refuse_at--;
    Made *now = &made[number++];
    memset(now, 0, sizeof(Made));
    now->function = function; now->config = *config; now->config.attributes = 0;
    for (uint32_t i = 0; i < config->count; i++) memcpy(&now->attributes[2 * i], config->attributes + 72 * i, 4),
        memcpy(&now->attributes[2 * i + 1], config->attributes + 72 * i + 8, 4);
    for (int k = 0; k < known; k++) if (functions[k] == function) {
        now->count = counts[k];
        for (uint32_t i = 0; i < counts[k]; i++) memcpy(&now->values[i], parameters[i], sizes[k][i]);
        break;
    }
    return extra != 0;
}
int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t pointer) { *found = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = &number; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "a stand-in's refusal"; return 0; }
int cuInit(unsigned flags) { return 100; }
"""


def build(folder: str) -> str:
    """Build it with what else Triton's launcher links to."""
    import triton

    backend = Path(triton.__file__).parent / "backends" / "nvidia"
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\s*\()", (backend / "driver.c").read_text() + _DRIVER))
    names -= set(re.findall(r"\bcu[A-Z]\w+(?=\()", _SOURCE))
    more = "\n".join(f"int {name}{suffix}() {{ return 0; }}" for name in sorted(names) for suffix in ("", "_v2", "_v3"))
    source, target = Path(folder, "libcuda.c"), Path(folder, "libcuda.so.1")
    source.write_text(_SOURCE + more)
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["cc", "-O1", "-w", "-shared", "-fPIC", soname, str(source), "-o", str(target)], check=True)
    return str(target)


_DRIVER = " ".join(f"{name}()" for name in cuda_driver._FUNCTIONS)


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_uint64), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint32),
    ]  # fmt: skip


class _Made(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64), ("config", _Config), ("attributes", ctypes.c_uint32 * 8),
        ("count", ctypes.c_uint32), ("values", ctypes.c_uint64 * 128),
    ]  # fmt: skip


class Made(NamedTuple):
    """A launch as the driver was asked for it."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    attributes: tuple[int, ...]
    values: tuple[int, ...]


class Library:
    """The library, and what it was asked for."""

    def __init__(self, path: str = "libcuda.so.1") -> None:
        self.library = ctypes.CDLL(path)
        self._room = (_Made * 4096)()

    def describe(self, compiled: Any) -> None:
        """Tell it how large the parameters of a kernel are, as its code says."""
        text = compiled.asm["ptx"]
        entry = re.search(r"\.entry [^(]*\(([^)]*)\)", text)
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[1])]  # type: ignore[index]
        self.library.describe(ctypes.c_uint64(compiled.function), len(sizes), bytes(sizes))

    def taken(self) -> list[Made]:
        """The launches since it was asked last."""
        return [
            Made(
                each.function, tuple(each.config.grid), tuple(each.config.block), each.config.shared,
                each.config.stream, tuple(each.attributes[: 2 * each.config.count]), tuple(each.values[: each.count]),
            )
            for each in self._room[: self.library.taken(self._room)]
        ]  # fmt: skip


# -- Against Triton's launcher --------------------------------------------------------------------------------------


def calls() -> list[Callable[[], Any]]:
    """Calls of all ways into a selection, each to be made again and again."""
    cpu = torch.device("cpu")
    ids, longs = torch.zeros(2, 8, dtype=torch.int64), torch.arange(8)
    wide = torch.zeros(2, V + 3)
    warpers = [fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9)]
    found: list[Callable[[], Any]] = []

    def add(processors: list[Any], scores: torch.Tensor) -> None:
        plan = fl.LogitsProcessorList(processors).plan
        found.append(lambda: plan(ids[: len(scores)], scores))

    for scores in (wide[:, :V], wide[:1, 1 : V + 1], wide[:, :V].half()):
        add(warpers, scores)
    add(warpers[::2], wide[:, :V])
    add([fl.RepetitionPenaltyLogitsProcessor(1.2), *warpers], wide[:, :V])
    rows = torch.linspace(0.3, 0.9, 2)
    for sampler in (
        fl.Sampler(temperature=0.7, top_k=50, top_p=0.9), fl.Sampler(temperature=0.7), fl.Sampler(temperature=0.0),
        fl.Sampler(temperature=rows, top_p=rows.clone(), min_p=rows.clone(), logprobs="processed", top_logprobs=2),
    ):  # fmt: skip
        found.append(lambda sampler=sampler: sampler(wide[:, :V], longs[:2], longs[2:4]))
        found.append(lambda sampler=sampler: sampler(wide[:, :V], longs[:4:2], longs[:4:2]))  # one tensor twice
    every = launch.Selection((Rule("typical", 0.9), Rule("top_n_sigma", 1.0)), V, cpu, normalise=True)
    found.append(lambda: launch.select(wide[:, :V], every))
    batch = fl.BatchProcessor(2, V, "cpu", max_length=64, max_logprobs=2)
    slots = [batch.add(fl.RequestParams(logprobs=2, logit_bias={3: 1.0}), [1]) for _ in range(2)]
    found.append(lambda: batch.sample(wide[:, :V], slots, logprobs="processed"))
    found.append(lambda: batch.apply(wide[:, :V], slots))
    found.append(lambda: batch.apply_(wide[:, :V], slots))
    mask, local = torch.full((2, V // 32 + 1), -1, dtype=torch.int32)[:, 1:], torch.zeros(2, dtype=torch.int32)
    given: dict[str, Any] = {"bitmask": mask, "draft_ids": longs[2:4], "local_position": local, "logprobs": "raw"}
    found.append(lambda: batch.sample(wide[:, :V], slots, longs[4:6] * 0, **given))
    return found


def compare() -> dict[str, Any]:
    """Make calls through both launchers; says how many launches were alike, and what wasn't."""
    library = Library()
    different: list[str] = []
    alike = {"laid out": 0, "one by one": 0}

    def hold(what: str, ours: list[Made], theirs: list[Made]) -> None:
        for mine, its in zip(ours, theirs, strict=True):
            if mine == its and its.values:
                alike[what] += 1
            else:
                different.append(f"{what}: {mine}, then {its}")

    made_calls = calls()
    with captured() as made:
        for call in made_calls:
            call()
        for name, operation in OPERATIONS.items():
            if not name.startswith(("select", "draw")):
                operation.run(Given(2, 1000, torch.device("cpu")))
    with standing_in(library.library):
        compile_all(made)
    for compiled in {each.launcher.compiled[each.key].compiled for each in made}:
        library.describe(compiled)

    # One by one: what a launch is given, on a GPU as it would seem.
    for launcher, key, programs, args in made:
        compiled, _, relaunch = launcher.compiled[key]
        on_gpu = _on_gpu(args)
        compiled.run(programs, 1, 1, 7, compiled.function, compiled.packed_metadata, None, None, None, *on_gpu)
        theirs = library.taken()
        with mock.patch.object(cuda_driver, "library", return_value=library.library):
            assert relaunch(0, 7, programs, on_gpu)
        hold("one by one", library.taken(), theirs)

    # Together, as calls make them from the third time on; then by Triton's launcher, with the same tensors.
    ours: list[Made] = []
    together = Relaunches.__call__

    def both(self: Relaunches, index: int, pointers: list[int]) -> bool:
        library.taken()
        assert together(self, index, pointers)
        ours.extend(library.taken())
        return False

    launched = launch.launch_together

    def ordinary(launches: list[Launch]) -> None:
        library.taken()
        launched(launches)
        if ours:
            hold("laid out", ours, library.taken())
            ours.clear()

    with (
        standing_in(library.library),
        mock.patch.object(Relaunches, "__call__", both),
        mock.patch.object(launch, "launch_together", ordinary),
        mock.patch.object(steps, "launch_together", ordinary),
    ):
        for call in made_calls:
            before = alike["laid out"]
            for _ in range(4):
                call()
            assert alike["laid out"] > before, "a call is laid out in the third go"
        alive = _left_alive()
    return {"alike": alike, "different": different, "refused": cuda_driver.refused, "alive": alive}


def _left_alive() -> list[str]:
    """Which tensors of calls that were laid out are still there after the caller has dropped them."""
    sampler = fl.Sampler(temperature=0.7, top_k=50)
    given: dict[str, torch.Tensor] = {}
    for _ in range(4):
        given = {"logits": torch.zeros(2, V), "seeds": torch.arange(2), "positions": torch.arange(2)}
        given["tokens"] = sampler(**given).tokens
    seen = {name: weakref.ref(each) for name, each in given.items()}
    given.clear()
    gc.collect()
    return [name for name, each in seen.items() if each() is not None]


class _OnGPU:
    is_cuda = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.data_ptr = tensor.data_ptr


def _on_gpu(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_on_gpu, argument))
    return _OnGPU(argument) if isinstance(argument, torch.Tensor) else argument


def main() -> None:
    """Run what the command line asks for, and print it as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.driver_calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("folder")
    commands.add_parser("compare")
    options = parser.parse_args()
    if options.command == "build":
        print(json.dumps(build(options.folder)))
        return
    from triton.backends.nvidia.driver import CudaUtils

    with loading(CudaUtils()):
        print(json.dumps(compare()))


if __name__ == "__main__":
    main()
