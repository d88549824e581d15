"""Launches through the CUDA driver: what it is handed, when Triton's launcher is taken instead, and several at once."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import driver as cuda_driver
from fastlogits_kernels.runtime import launcher as runtime
from fastlogits_kernels.runtime.backend import CompileError, KernelError
from fastlogits_kernels.runtime.driver import Call, Given, Relaunch, UnfitError, entry_of
from fastlogits_kernels.runtime.launcher import Launch, Launcher, Relaunches, collected, launch_together, prepare
from fastlogits_kernels.selection import launch, layout

from fastlogits.inspect import doctor
from tests.kernels.launches import loading

needs_relaunches = pytest.mark.skipif(not runtime._RELAUNCHES, reason="needs a Triton whose kernels are relaunched")
CPU = torch.device("cpu")
KINDS = ("*fp32", "constexpr", "i32", "*i64", "fp32", "i64", "i1", "constexpr")
CODE = ".u64 .ptr .global .align 1", ".u32", ".u64 .ptr .global .align 1", ".f32", ".u64", ".u8"


class OnGPU:
    """A tensor, as far as a launch asks."""

    is_cuda = True

    def __init__(self, address):
        self.data_ptr = lambda: address


def ptx(types, name="kernel"):
    return (
        f".version 8.7\n.visible .entry {name}(\n" + ",\n".join(f"\t.param {each} p" for each in types) + "\n)\n{ret;}"
    )


class Compiled:
    """What Triton makes of a kernel, as far as we look; notes who asks for its launcher, and what that launches."""

    name = "kernel"

    def __init__(self, kinds=KINDS, code=(*CODE, ".u64", ".u64"), function=4096, overlaps=True, **changes):
        metadata = {"num_warps": 4, "num_ctas": 1, "shared": 1024, "name": "kernel", "launch_pdl": overlaps}
        metadata |= {"launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0}
        self.metadata = SimpleNamespace(**metadata | changes.pop("metadata", {}))
        self.packed_metadata, self.src = (4, 1, 1024), SimpleNamespace(signature=dict(enumerate(kinds)))
        self.asm, self.kernel, self.function = {"ptx": ptx(code)}, function, None
        self.asked, self.launched = 0, []
        self.__dict__ |= changes

    @property
    def run(self):
        self.asked += 1
        self.function = self.kernel + 1
        return lambda *args: self.launched.append(args)

    def __getitem__(self, grid):
        return lambda *args: self.launched.append(args) if self.function is not None else self.run(*args)


class Utils:
    """What Triton loads kernels with: the code of one stands for its function."""

    def __init__(self):
        self.loaded, self.most_shared, self.most_threads, self.error = [], 4096, 1024, None

    def get_device_properties(self, device):
        return {"max_shared_mem": self.most_shared}

    def load_binary(self, name, kernel, shared, device):
        if self.error is not None:
            raise self.error
        function = kernel + device
        self.loaded.append((name, kernel, shared, device))
        return 1, function, 0, 0, self.most_threads


@pytest.fixture(autouse=True)
def utils():
    made = Utils()
    with loading(made) if runtime._RELAUNCHES else nullcontext():
        yield made


class Library:
    """Stands in for the driver: what it is asked for is read as the driver would."""

    def __init__(self, sizes, wait=0.0):
        self.made, self.sizes, self.refusals, self.bound, self._wait = [], sizes, [], [], wait
        kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
        self.cuLaunchKernelEx = kind(self._launch)
        self.cuCtxGetCurrent = lambda context: 1
        self.cuDeviceGet = lambda device, index: self.bound.append(index) or 0
        self.cuDevicePrimaryCtxRetain = self.cuCtxSetCurrent = lambda *_: 0
        self.cuGetErrorString = self._text

    def _launch(self, config, function, parameters, extra):
        if self.refusals:
            return self.refusals.pop(0)
        count, block = ctypes.c_uint32 * 3, ctypes.c_uint32 * 4
        stream, attributes = (ctypes.c_uint64 * 2).from_address(config + 32)
        pointers = (ctypes.c_uint64 * len(self.sizes)).from_address(parameters)
        early = ()
        if ctypes.c_uint32.from_address(config + 48).value:
            early = ctypes.c_uint32.from_address(attributes).value, ctypes.c_int.from_address(attributes + 8).value
        values = []
        for pointer, size in zip(pointers, self.sizes, strict=True):
            values.append(ctypes.string_at(pointer, size))
            time.sleep(self._wait)
        grid, threads = tuple(count.from_address(config)), tuple(block.from_address(config + 12))
        self.made.append((function, grid, threads, stream, early, tuple(values)))
        return 0

    @staticmethod
    def _text(status, text):
        text._obj.value = b"out of resources"


SIZES = (8, 4, 8, 4, 8, 1, 8, 8)


@pytest.fixture
def library(monkeypatch):
    made = Library(SIZES)
    monkeypatch.setattr(cuda_driver, "library", lambda: made)
    monkeypatch.setattr(cuda_driver, "objection", lambda device: None)
    monkeypatch.setattr(cuda_driver, "refused", {})
    monkeypatch.setattr(runtime, "current_stream", lambda index: 7)
    return made


def packed(pointer, number, other, share, wide, flag):
    integers = [(pointer, 8), (number, 4), (other, 8)]
    found = [value.to_bytes(size, "little", signed=value < 0) for value, size in integers]
    return (
        *found, bytes(ctypes.c_float(share)), wide.to_bytes(8, "little", signed=True), bytes([flag]), bytes(8), bytes(8)
    )  # fmt: skip


# -- What the driver is handed ---------------------------------------------------------------------------------------


@needs_relaunches
def test_a_relaunch_hands_over_what_it_is_given(library):
    relaunch = Relaunch(entry_of(Compiled()))
    for stream, programs, values in (
        (7, 3, (1 << 40, -5, 1 << 41, 0.1, 1 << 33, True)), (7, 3, (1 << 42, 2**31 - 1, 1, -0.0, -1, False)),
        (9, 70000, (16, 0, 32, float("inf"), 0, True)),
    ):  # fmt: skip
        pointer, number, other, *rest = values
        assert relaunch(0, stream, programs, (OnGPU(pointer), 128, number, OnGPU(other), *rest, (1, 2)))
        made = library.made.pop()
        assert made == (4096, (programs, 1, 1), (128, 1, 1, 1024), stream, (6, 1), packed(*values))
    assert not library.made


@needs_relaunches
def test_a_kernel_that_waits_for_the_one_before_says_so(library):
    assert Relaunch(entry_of(Compiled(overlaps=False)))(0, 7, 1, (OnGPU(1), 0, 2, OnGPU(3), 0.0, 4, True, 0))
    assert library.made[0][4] == ()


@needs_relaunches
@pytest.mark.parametrize("wrong", [torch.zeros(1), None, 2**31, 1.5])
def test_what_a_relaunch_leaves_to_triton(library, wrong):
    """A tensor on the CPU, one that is absent, numbers that don't fit: Triton says what is wrong with them."""
    is_number = isinstance(wrong, (int, float))
    args = (OnGPU(1) if is_number else wrong, 0, wrong if is_number else 2, OnGPU(3), 0.5, 4, True, 0)
    assert not Relaunch(entry_of(Compiled()))(0, 7, 1, args)
    assert not library.made


@needs_relaunches
def test_a_number_beyond_float32_is_left_to_triton_too(library):
    assert not Relaunch(entry_of(Compiled()))(0, 7, 1, (OnGPU(1), 0, 2, OnGPU(3), 1e39, 4, True, 0))
    assert not library.made


IN_TUPLES = ("*fp32", "constexpr", "i32"), "*i64", "constexpr", ("fp32", ("i64", "i1"), "constexpr")


@needs_relaunches
def test_a_relaunch_takes_what_stands_in_tuples(library):
    relaunch = Relaunch(entry_of(Compiled(IN_TUPLES)))
    for values in ((1 << 40, -5, 1 << 41, 0.1, 1 << 33, True), (16, 7, 32, -2.0, -1, False)):
        pointer, number, other, share, wide, flag = values
        args = (OnGPU(pointer), 9, number), OnGPU(other), 8, (share, (wide, flag), (1, 2))
        assert relaunch(0, 7, 3, args)
        assert library.made.pop() == (4096, (3, 1, 1), (128, 1, 1, 1024), 7, (6, 1), packed(*values))
    assert not relaunch(0, 7, 3, ((torch.zeros(1), *args[0][1:]), *args[1:]))
    assert not library.made


@needs_relaunches
def test_kernels_of_one_call_share_what_they_are_given_alike(library):
    entries = [entry_of(Compiled(function=number)) for number in (1, 2)]
    first = (Given(0), 3, Given(1), -0.0, 5, True)
    second = (Given(1), 4, None, 0.0, 5, False)
    call = Call(entries, (10, 20), (first, second), "QQ")
    for addresses in ((1 << 40, 1 << 41), (1 << 42, 1 << 43)):
        call(0, 7, addresses)
        (*one, values), (*other, others) = library.made[-2:]
        assert one == [1, (10, 1, 1), (128, 1, 1, 1024), 7, (6, 1)]
        assert other == [2, (20, 1, 1), (128, 1, 1, 1024), 7, (6, 1)]
        assert values == packed(addresses[0], 3, addresses[1], -0.0, 5, True)
        assert others == packed(addresses[1], 4, 0, 0.0, 5, False)


@needs_relaunches
def test_a_value_of_another_form_is_no_call():
    with pytest.raises(UnfitError, match="takes a value as i"):
        Call([entry_of(Compiled())], [1], [(Given(0), Given(1), None, 0.0, 0, True)], "QQ")


@needs_relaunches
@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("scratch", {"metadata": {"global_scratch_size": 8}}),
        ("scratch", {"metadata": {"profile_scratch_size": 8}}),
        ("tensor memory", {"metadata": {"tmem_size": 64}}),
        ("instrumented", {"metadata": {"instrumentation_mode": "gsan"}}),
        ("clusters", {"metadata": {"num_ctas": 2}}),
        ("clusters", {"metadata": {"launch_cooperative_grid": True}}),
        ("how many threads", {"packed_metadata": (4, 1, 1024, 1)}),
        ("how many threads", {"packed_metadata": (8, 1, 1024)}),
        ("shared memory", {"metadata": {"shared": 2**18}, "packed_metadata": (4, 1, 2**18)}),
        ("of type fp16", {"kinds": ("*fp32", "fp16")}),
        ("of type nvTmaDesc", {"kinds": ("nvTmaDesc",)}),
        ("parameters of", {"kinds": KINDS[:-2]}),
        ("parameters of", {"code": (*CODE[:1], ".u64", *CODE[2:])}),
        ("parameters of", {"code": (*CODE, ".u64", ".u64", ".u64")}),
        ("parameters of", {"code": (*CODE, ".u32")}),
        ("no entry", {"asm": {"ptx": ptx(CODE, "another")}}),
        ("is missing", {"asm": {}}),
        ("is missing", {"src": None}),
        ("is missing", {"kernel": None}),
        ("is missing", {"metadata": {"name": None}}),
    ],
)
def test_a_kernel_that_is_not_as_we_know_them_is_triton_s(utils, reason, changes):
    with pytest.raises(UnfitError, match=reason):
        entry_of(Compiled(**changes))
    assert not utils.loaded


@needs_relaunches
def test_what_another_launcher_launches_is_triton_s(utils):
    runtime.triton.runtime.driver.active.launcher_cls = type("CudaLauncher", (), {})
    with pytest.raises(UnfitError, match="not the one that we know"):
        entry_of(Compiled())
    assert not utils.loaded


@pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs a C compiler and Python's headers",
)
@needs_relaunches
def test_the_driver_is_asked_for_what_triton_s_launcher_asks_for(tmp_path):
    """Calls of all kinds, compiled for sm_90, parameter by parameter; and nobody keeps a tensor of theirs."""

    def told(*command):
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(tmp_path)}
        environment |= {"LD_LIBRARY_PATH": str(tmp_path)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.driver_calls", *command]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3], check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    told("build", str(tmp_path))
    found = told("compare")
    assert not found["different"]
    assert not found["refused"]
    assert found["alike"]["laid out"] > 100
    assert found["alike"]["one by one"] > 20
    assert not found["alive"]


# -- When Triton's launcher is taken ---------------------------------------------------------------------------------


class Kernel:
    """A kernel that Triton has compiled, or compiles when it is asked to; nobody launches it by the JIT."""

    __name__ = "_kernel"

    def __init__(self, made=Compiled, **changes):
        self.compiled = made(**changes)

    def warmup(self, *args, grid, **options):
        return self.compiled


KEY = (torch.device("cuda", 0), 3)


def launcher_of(kernel):
    launcher = Launcher(kernel)
    launcher.keep(KEY, kernel.compiled)
    return launcher


ARGS = OnGPU(1), 0, 2, OnGPU(3), 0.5, 4, True, 0


@pytest.fixture
def one_device(monkeypatch):
    """A GPU that kernels are compiled for, as it seems."""
    monkeypatch.setattr(runtime, "_MANY_DEVICES", False)
    monkeypatch.setattr(runtime.backend, "unsupported", lambda device: None)
    monkeypatch.setattr(runtime, "_current", lambda device: nullcontext())


@needs_relaunches
def test_a_launcher_relaunches_through_the_driver(library, one_device):
    kernel = Kernel()
    launcher = launcher_of(kernel)
    for _ in range(2):
        launcher(KEY, 5, ARGS)
    assert [made[1] for made in library.made] == [(5, 1, 1)] * 2
    launcher(KEY, 5, (torch.zeros(1), *ARGS[1:]))
    assert (len(library.made), len(kernel.compiled.launched)) == (2, 1)


@needs_relaunches
def test_nothing_is_launched_for_no_rows(library, one_device):
    """Neither at first, nor where a kernel is relaunched; in a call that was laid out the others are."""
    kernel = Kernel()
    launcher = launcher_of(kernel)
    for programs in (0, 5, 0, 5, 0, 3):
        launcher(KEY, programs, ARGS)
    assert not kernel.compiled.launched
    assert [made[1] for made in library.made] == [(5, 1, 1), (5, 1, 1), (3, 1, 1)]
    library.made.clear()
    args = Given(0), 0, 2, Given(1), 0.5, 4, True, 0
    none, some = Launch(launcher, KEY, 0, args), Launch(launcher, KEY, 6, args)
    assert Relaunches.of([none, none], 2) is None
    assert Relaunches.of([none, some], 2)(0, [16, 32])
    assert [made[1] for made in library.made] == [(6, 1, 1)]


@needs_relaunches
@pytest.mark.parametrize("why", ["objection", "unfit"])
def test_a_launcher_launches_by_triton_what_is_triton_s(library, one_device, monkeypatch, why):
    if why == "objection":
        monkeypatch.setattr(cuda_driver, "objection", lambda device: "FASTLOGITS_LAUNCHER is triton")
    kernel = Kernel(kinds=("fp16",) if why == "unfit" else KINDS)
    launcher = Launcher(kernel)
    for _ in range(2):
        launcher(KEY, 5, ARGS)
    assert kernel.compiled.launched == 2 * [(5, 1, 1, 7, 4097, (4, 1, 1024), None, None, None, *ARGS)]
    assert not library.made
    assert ("_kernel" in cuda_driver.refused) == (why == "unfit")


@needs_relaunches
def test_with_the_driver_nobody_asks_for_triton_s_launcher(library, one_device, utils):
    """Not even in the first call, which compiles: alone, beside others, in a warm-up, and again."""
    kernels = [Kernel(function=16 * number) for number in range(1, 6)]
    launchers = [Launcher(kernel) for kernel in kernels]
    launches = [Launch(each, KEY, number, ARGS) for number, each in enumerate(launchers, 1)]
    launchers[0](KEY, 1, ARGS)
    launch_together(launches[1:3])
    assert [error for _, error in prepare(launches)] == [None, None]
    launch_together(launches)
    given = Given(0), 0, 2, Given(1), 0.5, 4, True, 0
    assert Relaunches.of([launch._replace(args=given) for launch in launches], 2)(0, [1, 3])
    assert [(made[0], made[1][0]) for made in library.made] == [
        (16 * number, number) for number in (1, 2, 3, *range(1, 6), *range(1, 6))
    ]
    assert sorted(utils.loaded) == [("kernel", 16 * number, 1024, 0) for number in range(1, 6)]
    assert not any(kernel.compiled.asked for kernel in kernels)


class Importing(Compiled):
    """One whose launcher takes a while to be had."""

    inside, most = 0, 0

    @property
    def run(self):
        kind = type(self)
        kind.inside += 1
        kind.most = max(kind.most, kind.inside)
        time.sleep(0.005)
        kind.inside -= 1
        return super().run


@needs_relaunches
@pytest.mark.parametrize("why", ["objection", "unfit", "compiled together", "CPU", "hook", "hook of loads"])
def test_threads_ask_for_triton_s_launchers_one_by_one(library, one_device, monkeypatch, why):
    kind = type("Importing", (Importing,), {})
    kernels = [Kernel(kind, kinds=("fp16",) if why == "unfit" else KINDS) for _ in range(6)]
    launchers, args = [Launcher(kernel) for kernel in kernels], ARGS
    if why in ("objection", "compiled together"):
        monkeypatch.setattr(cuda_driver, "objection", lambda device: "FASTLOGITS_LAUNCHER is triton")
    elif why == "CPU":
        args = (torch.zeros(1), *ARGS[1:])
    elif why == "hook":
        monkeypatch.setattr(runtime.triton.knobs.runtime, "launch_enter_hook", print)
    elif why == "hook of loads":
        monkeypatch.setattr(runtime.triton.knobs.runtime, "kernel_load_end_hook", print)
    if why == "compiled together":
        launch_together([Launch(launcher, KEY, 5, args) for launcher in launchers])
    else:
        barrier = threading.Barrier(len(launchers), timeout=60)

        def call(launcher):
            barrier.wait()
            launcher(KEY, 5, args)

        with ThreadPoolExecutor(len(launchers)) as pool:
            list(pool.map(call, launchers))
    assert kind.most == 1
    by_driver = why == "hook of loads"
    assert [len(kernel.compiled.launched) for kernel in kernels] == 6 * [0 if by_driver else 1]
    assert [made[0] for made in library.made] == (6 * [4097] if by_driver else [])  # the function that Triton loaded


@needs_relaunches
@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (r"OutOfResources: .*shared memory, Required: 1024, Hardware limit: 512", {"most_shared": 512}),
        (r"OutOfResources: .*threads, Required: 128, Hardware limit: 64", {"most_threads": 64}),
        (
            r"RuntimeError: Triton Error \[CUDA\]: out of memory",
            {"error": RuntimeError("Triton Error [CUDA]: out of memory")},
        ),
    ],
)
def test_a_kernel_that_the_device_can_t_take(library, one_device, utils, reason, changes):
    vars(utils).update(changes)
    launchers = [Launcher(Kernel()) for _ in range(2)]
    launches = [Launch(each, KEY, 5, ARGS) for each in launchers]
    for call in (lambda: launchers[0](KEY, 5, ARGS), lambda: launch_together(launches)):
        with pytest.raises(CompileError, match=rf"_kernel can't be compiled \({reason}"):
            call()
    assert all("_kernel can't be compiled" in str(error) for _, error in prepare(launches))
    assert not library.made
    assert not any(each.kernel.compiled.asked for each in launchers)


@needs_relaunches
def test_a_kernel_is_loaded_once_on_each_device(library, one_device, utils):
    """Several keys may be one kernel to Triton; what is loaded on one GPU is nothing to another."""
    launcher, active = Launcher(Kernel()), runtime.triton.runtime.driver.active
    keys = [(torch.device("cuda", index), variant) for index in (0, 1) for variant in (1, 2)]
    for key in keys * 2:
        active.get_current_device.return_value = key[0].index
        launcher(key, 5, ARGS)
    assert [load[-1] for load in utils.loaded] == [0, 1]
    assert [made[0] for made in library.made] == [4096, 4096, 4097, 4097] * 2


@needs_relaunches
def test_a_kernel_that_is_still_being_compiled_is_waited_for(library, one_device):
    kernel = Kernel()
    kernel.warmup = lambda *args, **options: SimpleNamespace(result=lambda: kernel.compiled)  # in AsyncCompileMode
    Launcher(kernel)(KEY, 5, ARGS)
    assert len(library.made) == 1


def laid_out(kernel):
    launcher = launcher_of(kernel)
    args = Given(0), 0, 2, Given(1), 0.5, 4, True, 0
    return Relaunches.of([Launch(launcher, KEY, 5, args), Launch(launcher, KEY, 6, args)], 2)


@needs_relaunches
def test_launches_that_are_collected_are_not_made(library, one_device):
    relaunches = laid_out(Kernel())
    with collected():
        assert not relaunches(0, [1, 2])
    assert not library.made
    assert relaunches(0, [1, 2])
    assert [made[1] for made in library.made] == [(5, 1, 1), (6, 1, 1)]


@needs_relaunches
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_gets_triton_s_launches(library, one_device, monkeypatch, hook):
    relaunches = laid_out(Kernel())
    monkeypatch.setattr(runtime.triton.knobs.runtime, hook, print)
    assert not relaunches(0, [1, 2])
    assert not library.made


@needs_relaunches
def test_a_device_that_is_not_the_current_one_is_made_it_first(library, monkeypatch):
    monkeypatch.setattr(runtime, "_MANY_DEVICES", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not laid_out(Kernel())(0, [1, 2])
    assert laid_out(Kernel())(1, [1, 2])


@needs_relaunches
def test_what_is_not_compiled_yet_is_not_laid_out(library):
    assert Relaunches.of([Launch(Launcher(Kernel()), KEY, 5, ARGS)], 0) is None
    kernel = Kernel(kinds=("fp16",))
    assert Relaunches.of([Launch(launcher_of(kernel), KEY, 5, ARGS)], 0) is None


def test_the_environment_names_the_launcher(monkeypatch):
    monkeypatch.setenv("FASTLOGITS_LAUNCHER", "triton")
    assert cuda_driver._chosen() == "triton"
    monkeypatch.setenv("FASTLOGITS_LAUNCHER", "cuda")
    with pytest.raises(ValueError, match="FASTLOGITS_LAUNCHER must be one of auto, triton, got 'cuda'"):
        cuda_driver._chosen()


@pytest.fixture
def asked_again():
    cuda_driver.library.cache_clear()
    yield
    cuda_driver.library.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("LAUNCHER", "triton", "FASTLOGITS_LAUNCHER is triton"),
        ("_LIBRARY", "libcuda_of_nobody.so.1", "libcuda_of_nobody.so.1 can't be used"),
        ("_LIBRARY", "libc.so.6", "libc.so.6 can't be used"),
    ],
)
@pytest.mark.usefixtures("asked_again")
def test_why_there_is_no_driver(monkeypatch, name, value, reason):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda_driver, name, value)
    assert cuda_driver.objection(torch.device("cuda", 0)).startswith(reason)
    monkeypatch.setattr(doctor, "unsupported", lambda device: None)
    monkeypatch.setattr(doctor, "absence", lambda: None)
    assert doctor.launcher(torch.device("cuda", 0)).startswith(f"Triton's, which takes the host longer: {reason}")


@pytest.mark.usefixtures("asked_again")
def test_amd_has_no_cuda_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda_driver.objection(torch.device("cuda", 0)) == "the GPU is no NVIDIA GPU"
    assert cuda_driver.objection(CPU) == "cpu has no CUDA driver"


def test_doctor_names_the_launcher(library, monkeypatch):
    monkeypatch.setattr(doctor, "unsupported", lambda device: None)
    monkeypatch.setattr(doctor, "absence", lambda: None)
    assert doctor.launcher(CPU) == "none: no kernel is launched"
    assert doctor.launcher(torch.device("cuda", 0)).startswith("the CUDA driver")
    cuda_driver.refused["_fold_kernel"] = "it takes scratch memory"
    assert doctor.launcher(torch.device("cuda", 0)).endswith("Triton's for _fold_kernel (it takes scratch memory)")


# -- Refusals and threads --------------------------------------------------------------------------------------------


@needs_relaunches
def test_a_launch_that_is_refused_says_which(library, one_device):
    relaunches = laid_out(Kernel())
    library.refusals = [701, 701]
    with pytest.raises(KernelError, match=r"_kernel can't be launched \(RuntimeError: Triton Error \[CUDA\]: out of"):
        relaunches(0, [1, 2])
    assert relaunches(0, [1, 2])
    launcher = launcher_of(Kernel())
    library.refusals = [701, 701]
    with pytest.raises(KernelError, match=r"out of resources\); set the environment variable FASTLOGITS_BACKEND=torch"):
        launcher(KEY, 5, ARGS)


@needs_relaunches
def test_a_thread_without_a_context_gets_one(library, one_device):
    relaunches = laid_out(Kernel())
    library.refusals = [201]
    assert relaunches(0, [1, 2])
    assert library.bound == [0]
    assert [made[1] for made in library.made] == [(5, 1, 1), (6, 1, 1)]


@needs_relaunches
def test_threads_hand_over_their_own(library, one_device, monkeypatch):
    """Each with its stream, while the driver still reads what the others have handed over."""
    slow = Library(SIZES, wait=0.0005)
    monkeypatch.setattr(cuda_driver, "library", lambda: slow)
    own = threading.local()
    monkeypatch.setattr(runtime, "current_stream", lambda index: own.stream)
    relaunches = laid_out(Kernel())

    def call(stream):
        own.stream = stream
        for number in range(10):
            assert relaunches(0, [stream << 20 | number, stream << 30 | number])

    threads = [threading.Thread(target=call, args=(stream,)) for stream in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted((made[3], made[1][0], made[5][0], made[5][2]) for made in slow.made)
    assert found == sorted(
        (stream, programs, (stream << 20 | number).to_bytes(8, "little"), (stream << 30 | number).to_bytes(8, "little"))
        for stream in range(1, 7) for number in range(10) for programs in (5, 6)
    )  # fmt: skip


# -- Which calls are laid out ----------------------------------------------------------------------------------------


def test_a_call_is_laid_out_when_it_comes_again(monkeypatch):
    monkeypatch.setattr(layout, "_MOST_CALLS", 3)
    selection = launch.Selection((Rule("top_k", 5),), 100, CPU)
    asked = []

    def made(key):
        return asked.append(key) or key

    for key in ("a", "a", "b", "c", "c"):
        selection.saw(key, lambda key=key: made(key))
    assert asked == ["a", "c"]
    assert selection.relaunches == {"a": "a", "c": "c"}
    selection.saw("d", lambda: made("d"))  # as many as there may be: from the start
    assert not selection.relaunches
    selection.saw("d", lambda: None)
    assert not selection.relaunches
