"""Triton where it is installed, elsewhere a stand-in that lets the kernel files import; and a fast way to relaunch."""

from __future__ import annotations

import inspect
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.runtime import backend, driver
from fastlogits_kernels.runtime.backend import BACKEND, SWITCH_OFF, CompileError, KernelError

try:
    if BACKEND == "torch":
        raise ImportError("FASTLOGITS_BACKEND is torch")
    import triton
    import triton.language as tl

    HAS_TRITON = True
except Exception as error:  # not installed (macOS, Windows, a CPU alone), or broken, as without its own libraries
    if BACKEND == "triton":
        raise ImportError(f"FASTLOGITS_BACKEND is triton, but Triton can't be imported: {error}") from error
    backend.do_without(
        str(error)
        if BACKEND == "torch"
        else f"Triton can't be imported ({type(error).__name__}: {error}); pip install triton, or {SWITCH_OFF}"
    )

    class _Absent:
        """Stands in for the two modules while kernels are being defined; none is ever launched."""

        class constexpr:  # noqa: N801
            """A constant of the kernels that the host reads too."""

            def __init__(self, value: Any = None) -> None:
                self.value = value

        @staticmethod
        def jit(function: Any = None, **_: Any) -> Any:
            return function if function is not None else _Absent.jit

    triton = tl = _Absent()
    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "Launch",
    "Launcher",
    "Relaunches",
    "cache_folder",
    "collected",
    "empty_out",
    "form_of",
    "is_collecting",
    "launch_key",
    "launch_together",
    "prepare",
    "row_stride",
    "table_on",
    "tl",
    "to_device",
    "triton",
]

_logger = logging.getLogger("fastlogits")
_SLOW_S = 2.0
"""Seconds of compiling from which on it is said."""

# Relaunching relies on how Triton itself launches a compiled kernel; before 3.4 that was another way.
_RELAUNCHES = HAS_TRITON and tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 4)
_knobs: Any = triton.knobs.runtime if _RELAUNCHES else None
_MANY_DEVICES = torch.cuda.device_count() > 1


_forms: dict[Hashable, int] = {}
_numbers = count()


def form_of(what: Hashable) -> int:
    """A number for keys of launchers: the same for what is equal, and nobody else's.

    Not how many there are so far: two threads may read that at once.
    """
    return _forms.setdefault(what, next(_numbers))


class _Loaded(NamedTuple):
    """A compiled kernel on a device."""

    compiled: Any
    """As Triton has it."""
    entry: driver.Entry | None
    """What the driver launches; None where Triton does."""
    relaunch: driver.Relaunch | None


class Launcher:
    """Launches a kernel; without the JIT's binding of arguments, which costs more host time, once it is compiled.

    Args:
        kernel: a ``triton.jit`` function whose last parameters are its constants.
        fills_tables: whether it writes what is kept for later calls: it is launched while launches are collected too.
        options: ``num_warps`` and the like.
    """

    def __init__(self, kernel: Any, fills_tables: bool = False, **options: int) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], _Loaded] = {}
        self._loaded: dict[tuple[torch.device, Any], _Loaded] = {}  # several keys may be one kernel to Triton
        self._fills_tables, self._options = fills_tables, options

    @property
    def name(self) -> str:
        """That of the kernel."""
        return getattr(self.kernel, "__name__", type(self.kernel).__name__)

    def __call__(self, key: tuple[Any, ...], programs: int, args: tuple[Any, ...]) -> None:
        """Launch ``programs`` programs on the device that ``key`` begins with; none for an empty batch.

        The rest of ``key`` is all of ``args`` that a variant of the kernel depends on: constants, dtypes, absent
        arguments, alignments, specialised integers.
        """
        if _collectors and _collection.launches is not None and not self._fills_tables:
            _collection.launches.append(Launch(self, key, programs, args))
            return
        if not programs:
            return
        device = key[0]
        if _MANY_DEVICES and device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(key, programs, args)
            return
        loaded = self.compiled.get(key)
        if loaded is None:
            loaded = self._compile(key, programs, args)
        try:
            if loaded is None:  # the interpreter, and Triton before 3.4
                self.kernel[programs,](*args, **self._options)
            elif _is_heard(_knobs.launch_enter_hook, _knobs.launch_exit_hook):
                _triton_s_launcher(loaded.compiled)
                loaded.compiled[programs, 1, 1](*args)
            else:
                stream, relaunch = current_stream(device.index), loaded.relaunch
                if relaunch is None or not relaunch(device.index, stream, programs, args):
                    compiled = loaded.compiled
                    run = _triton_s_launcher(compiled)
                    # No hooks, so no metadata for them.
                    run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
        except Exception as error:
            raise self.refused(error) from error

    def entry(self, key: tuple[Any, ...]) -> driver.Entry | None:
        """What the driver launches for ``key``; None where that is Triton's business, or nothing is compiled yet."""
        loaded = self.compiled.get(key)
        return None if loaded is None else loaded.entry

    def refused(self, error: Exception) -> KernelError:
        """What is raised where a launch fails."""
        return KernelError(f"{self._failed('launched', error)}; {SWITCH_OFF}")

    def compile(self, device: torch.device, programs: int, args: tuple[Any, ...]) -> Any:
        """Compile the kernel, apart from its launch; None where nothing is compiled.

        Raises:
            CompileError: it can't be had on the device.
        """
        reason = backend.unsupported(device)
        if reason is not None:
            raise CompileError(device, reason)
        warmup = getattr(self.kernel, "warmup", None)
        if warmup is None:  # the interpreter before Triton 3.9
            return None
        try:
            _hash_inside_out(self.kernel)
            compiled = warmup(*args, grid=(programs,), **self._options)
            return compiled.result() if hasattr(compiled, "result") else compiled  # of Triton's AsyncCompileMode
        except Exception as error:
            raise self._not_compiled(device, error) from error

    def _compile(self, key: tuple[Any, ...], programs: int, args: tuple[Any, ...]) -> _Loaded | None:
        """Compile and load the kernel, apart from its launch: where that fails, nothing has been written.

        Raises:
            CompileError: it can't be had on the device.
        """
        start = time.perf_counter()
        self.keep(key, self.compile(key[0], programs, args))
        _say_slow([self], key[0], time.perf_counter() - start)
        return self.compiled.get(key)

    def keep(self, key: tuple[Any, ...], compiled: Any) -> None:
        """Load what ``compile`` has returned onto the current device, and launch it from now on for ``key``.

        Raises:
            CompileError: the device can't take it.
        """
        if compiled is None:
            return
        device = key[0]
        loaded = self._loaded.get((device, compiled))
        if loaded is None:
            try:
                entry = self._entry(device, compiled)
                if entry is None:
                    _triton_s_launcher(compiled)
            except Exception as error:
                raise self._not_compiled(device, error) from error
            loaded = _Loaded(compiled, entry, None if entry is None else driver.Relaunch(entry))
            self._loaded[device, compiled] = loaded
        if _RELAUNCHES:
            self.compiled.setdefault(key, loaded)

    def _entry(self, device: torch.device, compiled: Any) -> driver.Entry | None:
        """A kernel loaded for the driver; None where that is Triton's business."""
        if not _RELAUNCHES or driver.objection(device) is not None:
            return None
        if _is_heard(_knobs.kernel_load_start_hook, _knobs.kernel_load_end_hook):
            _triton_s_launcher(compiled)  # loads it too, and tells who listens
        try:
            return driver.entry_of(compiled)
        except driver.UnfitError as error:
            driver.refused.setdefault(self.name, str(error))
            return None

    def _not_compiled(self, device: torch.device, error: Exception) -> CompileError:
        said = self._failed("compiled", error)
        return CompileError(device, f"{said}; fix what it says (a C compiler?), or {SWITCH_OFF}")

    def _failed(self, what: str, error: BaseException) -> str:
        while error.__cause__ is not None:  # a compiler says last in which call of which call it was
            error = error.__cause__
        return f"the kernel {self.name} can't be {what} ({type(error).__name__}: {str(error).strip()[-500:]})"


_importing = threading.RLock()  # a hook may launch a kernel


def _triton_s_launcher(compiled: Any) -> Any:
    """Triton's launcher of a kernel; the first time it loads both.

    Raises:
        Exception: the device can't take the kernel, or the launcher can't be compiled.
    """
    # Triton 3.6 imports each from a file of its own, all as one module: a thread could take what another imports.
    with _importing:
        return compiled.run


def _hash_inside_out(kernel: Any) -> None:
    """Have Triton hash what a kernel calls before the kernel itself.

    A hash, by which the cache on disk is asked, holds constants of the functions that are called; in Triton 3.6, other
    than 3.9, only of those that were hashed earlier. It would depend on what the process has compiled before, and on
    which of its threads came first, and another process would compile all of it again.
    """
    seen: set[int] = set()

    def visit(function: Any) -> None:
        if id(function) in seen or not hasattr(type(function), "cache_key"):
            return
        seen.add(id(function))
        around = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        for name in function.fn.__code__.co_names:
            visit(around.get(name))
        function.cache_key  # noqa: B018

    visit(kernel)


class Launch(NamedTuple):
    """A launch that is about to be made; see ``Launcher``."""

    launcher: Launcher
    key: tuple[Any, ...]
    programs: int
    args: tuple[Any, ...]


# -- Several at once -------------------------------------------------------------------------------------------------


class _Collection(threading.local):
    """What this thread collects; None where it launches."""

    launches: list[Launch] | None = None


_collection = _Collection()
_collectors = 0
"""How many threads collect: where none does, a launch looks no further."""
_collectors_lock = threading.Lock()


@contextmanager
def collected() -> Iterator[list[Launch]]:
    """Collect the launches of this thread instead of making them, so that nothing is compiled or written.

    What they would have written holds anything then, and must not be read. Kernels that fill tables for later calls are
    launched all the same.
    """
    global _collectors
    before = _collection.launches
    launches: list[Launch] = []
    with _collectors_lock:
        _collectors += 1
    _collection.launches = launches
    try:
        yield launches
    finally:
        _collection.launches = before
        with _collectors_lock:
            _collectors -= 1


def is_collecting() -> bool:
    """Whether this thread's launches are collected: what is no kernel needn't run then either."""
    # A compiler that traces needn't guard what it never meets.
    return not torch.compiler.is_compiling() and _collectors > 0 and _collection.launches is not None


def launch_together(launches: Sequence[Launch]) -> None:
    """Make some launches in their order; those of them that have to be compiled are compiled at once."""
    missing = [each for each in launches if each.programs and each.key not in each.launcher.compiled]
    if len(missing) > 1 and not is_collecting():
        compile_together(missing)
    for launcher, key, programs, args in launches:
        launcher(key, programs, args)


class Relaunches:
    """The launches of one call, through the driver and with arguments that were laid out once.

    Args:
        launchers: of the kernels.
        call: what launches them.
    """

    def __init__(self, launchers: Sequence[Launcher], call: driver.Call) -> None:
        self._launchers, self._call = launchers, call

    @classmethod
    def of(cls, launches: Sequence[Launch], given: int) -> Relaunches | None:
        """Those of some launches, whose arguments hold a ``Given`` in place of each tensor that a call brings.

        None where one of them has to be made by Triton, or isn't compiled yet, and where an empty batch needs none.
        """
        launches = [each for each in launches if each.programs]
        entries = [each.launcher.entry(each.key) for each in launches]
        found = [entry for entry in entries if entry is not None]
        if not entries or len(found) < len(entries):
            return None
        arguments = [entry.arguments(launch.args) for entry, launch in zip(found, launches, strict=True)]
        try:
            call = driver.Call(found, [each.programs for each in launches], arguments, driver.POINTER * given)
        except (driver.UnfitError, struct.error, OverflowError):
            return None
        return cls([each.launcher for each in launches], call)

    def __call__(self, index: int, pointers: list[int]) -> bool:
        """Make them on a device; False where they have to be made one by one, and none was made.

        Raises:
            KernelError: the driver refuses one.
        """
        if (
            (_collectors and _collection.launches is not None)
            or (_MANY_DEVICES and index != torch.cuda.current_device())
            or _is_heard(_knobs.launch_enter_hook, _knobs.launch_exit_hook)
        ):
            return False
        try:
            self._call(index, current_stream(index), pointers)
        except driver.DriverError as error:
            raise self._launchers[error.number].refused(error) from error
        return True


def compile_together(launches: Sequence[Launch]) -> None:
    """Compile several kernels at once.

    Raises:
        CompileError: one of them can't be had on its device.
    """
    if launches[0].key[0].type != "cuda" or not _RELAUNCHES:  # interpreted, or compiled by each launch
        return
    for error in _made_ready(launches):
        if error is not None:
            raise error


def prepare(launches: Sequence[Launch]) -> list[tuple[Launch, CompileError | None]]:
    """Compile and load what some launches on one device need, several kernels at once, and launch nothing.

    Returns:
        One launch of each variant that wasn't there yet, with the reason where it can't be had.
    """
    missing: dict[tuple[int, Any], Launch] = {}
    for each in launches:
        if each.key not in each.launcher.compiled:
            missing.setdefault((id(each.launcher), each.key), each)
    found = list(missing.values())
    return list(zip(found, _made_ready(found), strict=True))


def _made_ready(launches: Sequence[Launch]) -> list[CompileError | None]:
    """Compile and load what launches need, in threads, since most of it happens outside Python; says why not."""
    if not launches:
        return []

    def make_ready(launch: Launch) -> CompileError | None:
        launcher, key, programs, args = launch
        try:
            with _current(key[0]):
                launcher.keep(key, launcher.compile(key[0], programs, args))
        except CompileError as error:
            return error
        return None

    start = time.perf_counter()
    # A call's kernels all at once; of the dozens of a warm-up no more than there are cores for, which all take memory.
    with ThreadPoolExecutor(min(len(launches), max(_CALL, _cores()))) as pool:
        errors = list(pool.map(make_ready, launches))
    _say_slow([launch.launcher for launch in launches], launches[0].key[0], time.perf_counter() - start)
    return errors


_CALL = 8
"""At least as many kernels as one call has."""


def _cores() -> int:
    """How many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _current(device: torch.device) -> Any:
    """Within it a GPU is the current one of the thread: Triton compiles for that, and loads onto it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_said_slow = False


def _say_slow(launchers: Sequence[Launcher], device: torch.device, seconds: float) -> None:
    """Tell that compiling took long, once in a process: the user has waited, and needn't the next time."""
    global _said_slow
    if seconds < _SLOW_S or _said_slow or device.type != "cuda":
        return
    _said_slow = True
    names = ", ".join(dict.fromkeys(each.name for each in launchers))
    _logger.warning(
        "compiled %s for %s in %.1f s. They are kept in %s: set TRITON_CACHE_DIR to a folder that lasts. This "
        "is said once.",
        names, torch.cuda.get_device_name(device), seconds, cache_folder(),
    )  # fmt: skip


def cache_folder() -> str:
    """Where Triton keeps what it has compiled."""
    if hasattr(triton, "knobs"):
        return str(triton.knobs.cache.dir)
    return os.environ.get("TRITON_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".triton", "cache")


def launch_key(scores: torch.Tensor, out: torch.Tensor | None = None) -> tuple[Any, ...]:
    """What a kernel's variant depends on of logits ``[B, V]``, and of another tensor of that shape that it writes.

    A key of launchers begins with it: the device comes first.
    """
    return scores.device, scores.shape[1], *_layout_key(scores), *(() if out is None else _layout_key(out))


def _layout_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    stride_row, stride_token = tensor.stride()
    return (
        tensor.dtype, tensor.data_ptr() % 16, stride_row == 1, stride_row % 16, stride_row >> 31, stride_token
    )  # fmt: skip


def _is_heard(before: Any, after: Any) -> bool:
    """Whether a profiler listens to one of two hooks of Triton's."""
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
"""Where torch launches on a device now."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on the device, without the host waiting for the copy."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def table_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on the device for all calls to come; one on another stream may be next, so the copy is waited for."""
    table = to_device(tensor, device)
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).record_event().synchronize()
    return table


def row_stride(index: torch.Tensor | None) -> int:
    """The stride by which the rows read an index ``[B]``; one of no dimensions, or none, serves all rows."""
    return index.stride(0) if index is not None and index.ndim else 0


def empty_out(scores: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor of the shape of ``scores``."""
    # Of a strided input, empty_like would keep the strides where it can.
    return torch.empty_like(scores) if scores.is_contiguous() else scores.new_empty(scores.shape)
