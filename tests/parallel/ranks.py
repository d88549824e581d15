"""Processes that are the ranks of process groups: made once for a module of tests, and given many things to do."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST = 4
SECONDS = 600
"""A rank that takes longer hangs: on a busy machine a test of a second may take a hundred."""


class Ranks:
    """Some processes, of which the first ones do what a test asks for, as the ranks of a group of gloo or NCCL."""

    def __init__(self, backend: str = "gloo", most: int = MOST) -> None:
        # A fork has all modules at once; behind a GPU's driver it can't be made.
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        self._folder = tempfile.TemporaryDirectory(prefix="fastlogits-")  # a port might be taken by somebody else
        meeting = (Path(self._folder.name) / "meeting").as_uri()
        self._pipes, self._processes = [], []
        for rank in range(most):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, meeting, there, backend, most), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def each(self, function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
        """What ``function(process_group, *arguments)`` returns on each of ``size`` ranks; an exception is returned."""
        for pipe in self._pipes[:size]:
            pipe.send_bytes(pickle.dumps((function, size, arguments)))
        return [self._received(pipe) for pipe in self._pipes[:size]]

    def alike(self, function: Callable[..., Any], size: int, *arguments: Any) -> Any:
        """The same where no rank raises, and all return equal results: that one."""
        found = self.each(function, size, *arguments)
        for each in found:
            if isinstance(each, Exception):
                raise each
        for each in found[1:]:
            assert same(each, found[0]), (each, found[0])
        return found[0]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send_bytes(b"")
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def _received(self, pipe: Any) -> Any:
        if not pipe.poll(SECONDS):
            raise TimeoutError(f"a rank has not answered for {SECONDS} s")
        return pickle.loads(pipe.recv_bytes())


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, bit for bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _serve(rank: int, meeting: str, pipe: Any, backend: str, most: int) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group(backend, rank=rank, world_size=most, init_method=meeting, timeout=timeout)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, most + 1)}
    while True:
        asked = pipe.recv_bytes()
        if not asked:
            return
        function, size, arguments = pickle.loads(asked)
        try:
            found = function(groups[size], *arguments)
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note("".join(traceback.format_exception(error)))
            found = error
        try:
            sent = pickle.dumps(found)
        except Exception:
            sent = pickle.dumps(RuntimeError(repr(found)))
        pipe.send_bytes(sent)
