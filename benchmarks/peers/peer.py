"""What a peer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from benchmarks.inputs import Case
from benchmarks.workloads import Contender, is_named


@dataclass(frozen=True)
class Peer:
    """Another package, and what it does of our workloads.

    Args:
        name: for people, for the results and for ``--peers``.
        module: what must be importable.
        workloads: patterns of the workloads' names.
        contenders: given such a name and a case, its ways to do the job.
        devices: the types of devices that it runs on.
        by_default: whether it is measured without being asked for.
    """

    name: str
    module: str
    workloads: Sequence[str]
    contenders: Callable[[str, Case], list[Contender]]
    devices: Sequence[str] = ("cuda",)
    by_default: bool = True

    def takes(self, workload: str, case: Case) -> bool:
        """Whether it does a workload on a device at all."""
        return case.device.type in self.devices and is_named(workload, self.workloads)

    def missing(self) -> str | None:
        """Why it can't be measured here; None where it can."""
        return _missing(self.module)


@cache
def _missing(module: str) -> str | None:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed: no module {error.name}"
    except Exception as error:  # a package that is there and broken is to be told apart
        return f"not importable: {type(error).__name__}: {error}".splitlines()[0][:120]
    return None
