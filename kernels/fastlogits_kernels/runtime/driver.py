"""Launches through the CUDA driver, with arguments that were laid out once.

Triton's launcher parses all arguments of a kernel at each launch, and asks the driver about each pointer; the kernel
itself takes the driver two microseconds. Here the arguments of one call, of all its kernels together, lie in one block
of memory: a launch writes what has changed since the last one, mostly pointers, and hands the block over. The driver
copies it before it returns.

What that relies on is looked up for each compiled kernel: which parameters it has, in the code that it was compiled to,
and what Triton's launcher would ask of the driver. A kernel of which anything is unknown is launched by Triton.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch

_ALLOWED = ("auto", "triton")


def _chosen() -> str:
    """What the environment asks for.

    Raises:
        ValueError: something else than the allowed.
    """
    launcher = os.environ.get("FASTLOGITS_LAUNCHER", "auto")
    if launcher not in _ALLOWED:
        raise ValueError(f"FASTLOGITS_LAUNCHER must be one of {', '.join(_ALLOWED)}, got {launcher!r}")
    return launcher


LAUNCHER = _chosen()
_LIBRARY = "libcuda.so.1"
_FUNCTIONS = (
    "cuLaunchKernelEx", "cuGetErrorString", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
)  # fmt: skip
_SERIALIZATION = 6
"""The attribute of a launch that may begin while the one before it runs."""
_MOST_SHARED = 227 * 1024
"""Beyond it a launch needs attributes that are Triton's business."""

# How the driver takes a parameter; floats of 16 bits have no form here, and are Triton's.
_FORMS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
POINTER = "Q"


class UnfitError(Exception):
    """A kernel has to be launched by Triton; the message says why."""


class DriverError(Exception):
    """The driver refused a launch; its cause says why, in the words of Triton's launcher."""

    def __init__(self, number: int) -> None:
        super().__init__(f"launch {number} was refused")
        self.number = number
        """Which of the kernels of the call it was."""


@cache
def library() -> Any:
    """The driver; where it can't be had, or isn't wanted, a string that says why."""
    if LAUNCHER == "triton":
        return "FASTLOGITS_LAUNCHER is triton"
    if torch.version.hip is not None:
        return "the GPU is no NVIDIA GPU"
    try:
        found = ctypes.CDLL(_LIBRARY)
        _ = [getattr(found, name) for name in _FUNCTIONS]
    except (OSError, AttributeError) as error:  # AttributeError: a driver from before CUDA 11.8
        return f"{_LIBRARY} can't be used ({error})"
    return found


def objection(device: torch.device) -> str | None:
    """Why no kernel on a device is launched through the driver; None where they are."""
    if device.type != "cuda":
        return f"{device.type} has no CUDA driver"
    found = library()
    return found if isinstance(found, str) else None


refused: dict[str, str] = {}
"""Kernels that Triton launches all the same, and why."""


class Entry(NamedTuple):
    """A compiled kernel as the driver takes it."""

    compiled: Any
    """Kept, since it owns the function."""
    function: int
    threads: int
    shared: int
    overlaps: bool
    """Whether a launch may begin while the one before it runs."""
    places: tuple[tuple[int, ...], ...]
    """Where among the arguments each parameter stands; of one in a tuple, where it stands there too."""
    forms: str
    """How each is written."""
    pointers: frozenset[int]
    """Which parameters are tensors."""
    scratch: int
    """How many pointers to scratch memory, all of them null, follow."""

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """Those of a launch that are parameters."""
        found = []
        for place in self.places:
            value: Any = args
            for index in place:
                value = value[index]
            found.append(value)
        return found


def entry_of(compiled: Any) -> Entry:
    """What the driver needs to know of a compiled kernel, which is loaded onto the current device.

    Raises:
        UnfitError: it is not what we know how to launch.
        Exception: the device can't take it.
    """
    from triton.runtime import driver  # which may be absent

    try:
        metadata, launcher = compiled.metadata, driver.active.launcher_cls
        if (launcher.__module__, launcher.__name__) != ("triton.backends.nvidia.driver", "CudaLauncher"):
            raise UnfitError("its launcher is not the one that we know")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise UnfitError("it takes scratch memory")
        if getattr(metadata, "tmem_size", None):
            raise UnfitError("it takes tensor memory")
        if getattr(metadata, "instrumentation_mode", ""):
            raise UnfitError("it is instrumented")
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
            raise UnfitError("its blocks are launched in clusters")
        if tuple(compiled.packed_metadata) != (metadata.num_warps, 1, metadata.shared):
            raise UnfitError("how many threads it has is told in a way that we don't know")
        if metadata.shared > _MOST_SHARED:
            raise UnfitError("it takes more shared memory than most GPUs have")
        parameters = list(_parameters(tuple(compiled.src.signature.values())))
        forms = "".join(map(_form, (kind for _, kind in parameters)))
        scratch = _trailing(compiled.asm["ptx"], metadata.name, forms)
        # Where a profiler listens, Triton has loaded it already.
        function = int(compiled.function or _load(compiled, driver.active))
        return Entry(
            compiled, function, 32 * metadata.num_warps, metadata.shared, bool(metadata.launch_pdl),
            tuple(place for place, _ in parameters), forms,
            frozenset(number for number, (_, kind) in enumerate(parameters) if kind[0] == "*"), scratch,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnfitError(f"what we rely on is missing ({type(error).__name__}: {error})") from error


def _load(compiled: Any, active: Any) -> int:
    """The function of a compiled kernel that is loaded as Triton would load it, apart from the launcher.

    It stays loaded as long as the process.
    """
    from triton.runtime.errors import OutOfResources

    metadata, utils, device = compiled.metadata, active.utils, active.get_current_device()
    most = utils.get_device_properties(device)["max_shared_mem"]
    if metadata.shared > most:
        raise OutOfResources(metadata.shared, most, "shared memory")
    _, function, _, _, most = utils.load_binary(compiled.name, compiled.kernel, metadata.shared, device)
    if 32 * metadata.num_warps > most:
        raise OutOfResources(32 * metadata.num_warps, most, "threads")
    return int(function)


def _parameters(kinds: Sequence[Any], at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Where the parameters stand among the arguments, and their types; constants are none."""
    for index, kind in enumerate(kinds):
        if isinstance(kind, tuple):
            yield from _parameters(kind, (*at, index))
        elif kind != "constexpr":
            yield (*at, index), kind


def _form(kind: str) -> str:
    """How a parameter of a type is written."""
    form = POINTER if kind[0] == "*" else _FORMS.get(kind)
    if form is None:
        raise UnfitError(f"it has a parameter of type {kind}")
    return form


def _trailing(ptx: str, name: str, forms: str) -> int:
    """How many pointers of its own the compiler has added to the parameters, which must be what was compiled."""
    found = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if found is None:
        raise UnfitError("its code has no entry of its name")
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)\b", found[1])]
    wanted = [struct.calcsize(f"={form}") for form in forms]
    added = sizes[len(wanted) :]
    if sizes[: len(wanted)] != wanted or "[" in found[1] or len(added) > 2 or any(size != 8 for size in added):
        raise UnfitError(f"its code takes parameters of {sizes} bytes, where its signature says {wanted}")
    return len(added)


class Given(NamedTuple):
    """Stands for a value that each call brings: its number among them."""

    number: int


class _Block:
    """The memory of one call: values, and what the driver is told of each launch."""

    def __init__(self, memory: Any, launches: list[Callable[[], int]], configs: list[int]) -> None:
        self.memory, self.launches, self._configs = memory, launches, configs
        self.stream = 0
        self.programs = 0

    def go_to(self, stream: int) -> None:
        """Launch on another stream from now on."""
        for at in self._configs:
            _STREAM.pack_into(self.memory, at + _STREAM_AT, stream)
        self.stream = stream

    def spread_over(self, programs: int) -> None:
        """Launch another number of programs of the only kernel from now on."""
        _COUNT.pack_into(self.memory, self._configs[0], programs)
        self.programs = programs


_CONFIG = struct.Struct("<7I4xQQI4x")  # CUlaunchConfig
_ATTRIBUTE = struct.Struct("<I4xI60x")  # CUlaunchAttribute
_STREAM, _STREAM_AT, _COUNT = struct.Struct("<Q"), 32, struct.Struct("<I")


class Call:
    """Kernels that are launched one after the other; what they are given alike lies in memory once.

    Args:
        entries: the kernels.
        programs: how many programs of each.
        arguments: for each of them what its parameters are given: a number, a tensor, None, or a ``Given``.
        given: the forms of the values that each call brings, pointers first and smaller ones after larger ones.
    """

    def __init__(
        self, entries: Sequence[Entry], programs: Sequence[int], arguments: Sequence[Sequence[Any]], given: str
    ) -> None:
        self._entries, self._programs = tuple(entries), tuple(programs)
        self._values = struct.Struct(f"<{given}")
        # Where each value of the calls lies, then the constants.
        places = [struct.calcsize(f"<{given[:number]}") for number in range(len(given))]
        constants: dict[bytes, int] = {}
        end = _aligned(self._values.size)
        self._parameters: list[list[int]] = []
        self._tensors = []
        for entry, args in zip(entries, arguments, strict=True):
            parameters = []
            for form, value in zip(entry.forms, args, strict=True):
                if isinstance(value, Given):
                    if given[value.number] != form:
                        raise UnfitError(f"it takes a value as {form} that a call brings as {given[value.number]}")
                    parameters.append(places[value.number])
                    continue
                if isinstance(value, torch.Tensor):
                    self._tensors.append(value)  # those of calls aren't here
                    value = value.data_ptr()
                packed = struct.pack(f"<{form}", 0 if value is None else value).ljust(8, b"\0")
                parameters.append(constants.setdefault(packed, end + 8 * len(constants)))
            null = constants.setdefault(bytes(8), end + 8 * len(constants))
            self._parameters.append([*parameters, *[null] * entry.scratch])
        self._constants = end, b"".join(constants)
        self._free: list[_Block] = []

    def __call__(self, index: int, stream: int, values: Sequence[float], programs: int | None = None) -> None:
        """Launch the kernels.

        Args:
            index: of the device, which is the current one.
            stream: where to.
            values: what the call brings.
            programs: another number of programs of the only kernel, above 0; None for those that were said.

        Raises:
            DriverError: the driver refuses one of them; those before it have been launched.
            struct.error: a value has no place in its form; nothing was launched.
        """
        # Threads, and calls within calls, have a block each.
        try:
            block = self._free.pop()
        except IndexError:
            block = self._block()
        self._values.pack_into(block.memory, 0, *values)
        if stream != block.stream:
            block.go_to(stream)
        if programs is not None and programs != block.programs:
            block.spread_over(programs)
        for launch in block.launches:
            if launch():
                self._go_on(index, block.launches, block.launches.index(launch))
                break
        self._free.append(block)

    def _go_on(self, index: int, launches: list[Callable[[], int]], number: int) -> None:
        """Go on with a launch that was refused: a thread that is new to CUDA has no context yet."""
        _bind(index)
        for each in range(number, len(launches)):
            status = launches[each]()
            if status:
                raise DriverError(each) from RuntimeError(f"Triton Error [CUDA]: {_described(status)}")

    def _block(self) -> _Block:
        """New memory, as it is to be before a call."""
        start, constants = self._constants
        attribute = start + len(constants)
        config = attribute + _ATTRIBUTE.size
        pointers = config + _CONFIG.size * len(self._entries)
        size = pointers + 8 * sum(map(len, self._parameters))
        memory = (ctypes.c_uint64 * (size // 8))()  # of 8 bytes, as all in it is
        base = ctypes.addressof(memory)
        struct.pack_into(f"{len(constants)}s", memory, start, constants)
        _ATTRIBUTE.pack_into(memory, attribute, _SERIALIZATION, 1)
        launch = library().cuLaunchKernelEx
        launches: list[Callable[[], int]] = []
        configs: list[int] = []
        for entry, programs, parameters in zip(self._entries, self._programs, self._parameters, strict=True):
            attributes = (base + attribute, 1) if entry.overlaps else (0, 0)
            _CONFIG.pack_into(memory, config, programs, 1, 1, entry.threads, 1, 1, entry.shared, 0, *attributes)
            struct.pack_into(f"<{len(parameters)}Q", memory, pointers, *(base + place for place in parameters))
            given = (ctypes.c_void_p(each) for each in (base + config, entry.function, base + pointers))
            launches.append(partial(launch, *given, None))
            configs.append(config)
            config += _CONFIG.size
            pointers += 8 * len(parameters)
        block = _Block(memory, launches, configs)
        block.programs = self._programs[0]
        return block


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _bind(index: int) -> None:
    """Make the context of a device current, as the first call of CUDA's runtime would in a thread."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    driver = library()
    if not driver.cuCtxGetCurrent(ctypes.byref(context)) and context.value:
        return
    if not (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    ):
        driver.cuCtxSetCurrent(context)


def _described(status: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorString(status, ctypes.byref(text))
    return (text.value or b"unknown error").decode(errors="replace")


class Relaunch:
    """Another launch of a compiled kernel, whatever its arguments are.

    Args:
        entry: the kernel.
    """

    def __init__(self, entry: Entry) -> None:
        numbers = range(len(entry.forms))
        flat = all(len(place) == 1 for place in entry.places)
        # The parameters are picked where they stand; those of tuples once all have been brought into one.
        self._flatten = None if flat else entry.arguments
        at = [place[0] for place in entry.places] if flat else numbers
        pointers = [number for number in numbers if number in entry.pointers]
        # Larger ones first, so that each is aligned.
        others = sorted(
            {*numbers} - {*pointers}, key=lambda number: (-struct.calcsize(f"={entry.forms[number]}"), number)
        )
        order = {number: Given(place) for place, number in enumerate([*pointers, *others])}
        given = "".join(entry.forms[number] for number in order)
        self._call = Call([entry], [1], [[order[number] for number in numbers]], given)
        self._pointers = _picker([at[number] for number in pointers])
        self._others = _picker([at[number] for number in others])

    def __call__(self, index: int, stream: int, programs: int, args: Sequence[Any]) -> bool:
        """Launch it on the current device; False where that is Triton's business, and nothing was launched.

        Raises:
            DriverError: the driver refuses it.
        """
        if self._flatten is not None:
            args = self._flatten(args)
        # What is on the CPU has no address that can be written, so that Triton may say what is wrong.
        addresses = [each.data_ptr() if each.is_cuda else -1 for each in self._pointers(args) if each is not None]
        try:
            self._call(index, stream, (*addresses, *self._others(args)), programs)
        except (struct.error, OverflowError):  # nor has a number that doesn't fit; an absent tensor is one value less
            return False
        return True


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that picks what stands at some places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[place] for place in places)
