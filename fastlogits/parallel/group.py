"""The ranks that share a vocabulary: which tokens each has, what they agree on, and what they exchange.

All that goes from rank to rank goes through here. Every exchange has a size that the host knows, so a CUDA graph may
hold it. Nothing is sent where there is one rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from fastlogits_kernels.runtime.recent import is_capturing

from fastlogits.checks import whole_number

# The older name is deprecated where there is this one.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shards(NamedTuple):
    """Which tokens of a vocabulary each rank has: those from its start to below its stop.

    Columns of a rank's logits beyond its stop are padding.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    widths: tuple[int, ...]
    """Columns of each rank's logits, padding included."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the whole vocabulary, V."""
        return self.stops[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each rank has."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @classmethod
    def of(cls, widths: list[int], starts: list[int | None], vocab_size: int | None) -> Shards:
        """The shards of ranks whose logits have so many columns.

        Raises:
            ValueError: the parts have gaps, overlap, or don't fit the vocabulary; the message names the rank.
        """
        given = [start is not None for start in starts]
        if any(given) and not all(given):
            rank = given.index(False)
            raise ValueError(f"vocab_start must be given on all ranks or on none, but rank {rank} has none")
        first = [start or 0 for start in starts] if all(given) else [0, *accumulate(widths)][: len(widths)]
        V = first[-1] + widths[-1] if vocab_size is None else vocab_size
        stops: list[int] = []
        for rank, (start, width) in enumerate(zip(first, widths, strict=True)):
            # Of equal parts that are padded, the last ones may have padding only.
            start = first[rank] = min(start, V)
            stop = V if rank == len(first) - 1 else min(first[rank + 1], V)
            if rank == 0 and start:
                raise ValueError(f"vocab_start must be 0 on rank 0, got {start}")
            if not start <= stop <= start + width:
                raise ValueError(
                    f"the logits of rank {rank} must have the tokens from {start} to below {stop} of a vocabulary of "
                    f"{V}, but have {width} columns: give vocab_start on each rank, or the vocab_size"
                )
            stops.append(stop)
        return cls(tuple(first), tuple(stops), tuple(widths))


class Group:
    """The ranks of a process group whose logits are parts of one vocabulary, and what they exchange.

    The ranks tell each other once how many columns they have, and each knows the others' by its own from then on. So
    ``logprobs`` and ``process`` need a ``Group`` for each vocabulary, where ranks have logits of two.

    Args:
        process_group: of ``torch.distributed``, with NCCL for GPUs or gloo for CPUs; None for all ranks. Or a
            one-dimensional ``DeviceMesh``.
        vocab_start: the first token of this rank's logits. None on all ranks: the parts follow each other in the order
            of the ranks, each as wide as its logits.
        vocab_size: tokens of the whole vocabulary. Columns beyond it are padding. None: there is no padding behind the
            last rank's part.

    Raises:
        ValueError: an argument out of range; ``torch.distributed`` is not initialised; this process is no member.

    Example:
        >>> import os
        >>> os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        >>> dist.init_process_group("gloo", rank=0, world_size=1)
        >>> Group(vocab_size=5).shards(8).sizes
        (5,)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, process_group: Any = None, *, vocab_start: int | None = None, vocab_size: int | None = None
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("group must be a process group: call torch.distributed.init_process_group() before")
        if hasattr(process_group, "mesh_dim_names"):
            if process_group.ndim != 1:
                raise ValueError(f"group must be a DeviceMesh of one dimension, got {process_group.ndim} of them")
            process_group = process_group.get_group()
        members: Any = dist.group.WORLD if process_group is None else process_group
        if not isinstance(members, dist.ProcessGroup):
            raise ValueError(
                f"group must be a ProcessGroup of which this process is a member, a DeviceMesh or a Group, got "
                f"{type(process_group).__name__}"
            )
        # torch.distributed keeps it until it is destroyed. What outlives that can't end its threads.
        self._members = ref(members)
        self.rank: int = dist.get_rank(members)
        self.size: int = dist.get_world_size(members)
        self._start = None if vocab_start is None else whole_number("vocab_start", vocab_start)
        self._vocab_size = None if vocab_size is None else whole_number("vocab_size", vocab_size, 1)
        self._shards: dict[int, Shards] = {}
        self.agree = Agreement(self)
        """What the ranks have found to be alike in calls that keep nothing themselves."""

    @property
    def process_group(self) -> Any:
        """The process group.

        Raises:
            RuntimeError: it has been destroyed.
        """
        members = self._members()
        if members is None:
            raise RuntimeError("the process group of this Group has been destroyed")
        return members

    @classmethod
    def of(cls, group: Any) -> Group:
        """``group`` itself, or a ``Group`` of a process group or mesh: of each always the same one."""
        if isinstance(group, Group):
            return group
        try:
            made = _groups.get(group)
        except TypeError:  # which has no weak references, so it is no group
            return cls(group)
        if made is None:
            made = _groups[group] = cls(group)
        return made

    def of_vocabulary(self, vocab_size: int) -> Group:
        """The same ranks, for a vocabulary of so many tokens.

        Raises:
            ValueError: this is the group of another vocabulary.
        """
        if self._vocab_size not in (None, vocab_size):
            raise ValueError(f"group must be of a vocabulary of {vocab_size} tokens, got one of {self._vocab_size}")
        return Group(self.process_group, vocab_start=self._start, vocab_size=vocab_size)

    # -- What ranks agree on ---------------------------------------------------------------------------------------

    def shards(self, width: int) -> Shards:
        """Which tokens each rank has, where this one's logits have ``width`` columns.

        The ranks tell each other once for each width, by way of the host: not while a graph is captured. So a group is
        of one vocabulary: where a rank has as many columns of two, it would take the parts of one for those of the
        other.
        """
        found = self._shards.get(width)
        if found is None:
            found = self._shards[width] = self.told_shards(width)
        return found

    def told_shards(self, width: int) -> Shards:
        """The same, told by all ranks now, and kept by nobody; all of them ask at the same place."""
        told = self.told({"width": width, "vocab_start": self._start, "vocab_size": self._vocab_size})
        self.check_refused(told)
        for rank, each in enumerate(told):
            if each["vocab_size"] != told[0]["vocab_size"]:
                raise ValueError(_differs("vocab_size", told, rank))
        return Shards.of([e["width"] for e in told], [e["vocab_start"] for e in told], self._vocab_size)

    def vocab_start(self, width: int) -> int:
        """The first token of this rank's logits of so many columns."""
        return self.shards(width).starts[self.rank]

    def told(self, mine: Any) -> list[Any]:
        """What each rank tells the others, by way of the host.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        if torch.cuda.is_available() and is_capturing(torch.device("cuda")):
            raise RuntimeError(
                "the ranks must compare arguments that they haven't seen yet, which a CUDA graph can't hold: make one "
                "such call before the capture"
            )
        if self.size == 1:
            return [mine]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, mine, self.process_group)
        return told

    def check_refused(self, told: list[Mapping[str, Any]]) -> None:
        """Raise where another rank has told that it refuses its arguments.

        Raises:
            ValueError: the message names the rank.
        """
        for rank, each in enumerate(told):
            if "error" in each and rank != self.rank:
                raise ValueError(f"rank {rank} has refused its arguments: {each['error']}")

    # -- What they exchange ----------------------------------------------------------------------------------------

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, ``[ranks, *shape]``, in their order; of one shape and dtype everywhere."""
        if self.size == 1:
            return mine.unsqueeze(0)
        mine = mine.contiguous()
        found = torch.empty((self.size, *mine.shape), dtype=mine.dtype, device=mine.device)
        _gather(found.view(-1), mine.view(-1), group=self.process_group)
        return found

    def added(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all ranks, of one shape and dtype everywhere; it may take the place of ``mine``."""
        if self.size > 1:
            dist.all_reduce(mine, group=self.process_group)
        return mine

    def all_to_all(self, mine: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """What each rank has for this one, one after the other: a flat tensor of ``sum(received)`` elements.

        Args:
            mine: a flat tensor: what this rank has for each, one after the other.
            sent: how many elements that is for each.
            received: how many elements come from each.
        """
        if self.size == 1:
            return mine
        found = torch.empty(sum(received), dtype=mine.dtype, device=mine.device)
        dist.all_to_all_single(found, mine, received, sent, group=self.process_group)
        return found

    def rows_of(self, rank: int, rows: int) -> slice:
        """The rows of a batch that a rank has where the rows are dealt out: neighbours, and as many each."""
        each = -(-rows // self.size)
        return slice(min(rank * each, rows), min((rank + 1) * each, rows))

    def whole_rows(self, logits: torch.Tensor, shards: Shards) -> torch.Tensor:
        """All rows ``[B, V]``, from this rank's part ``[B, width]``: one exchange of all logits."""
        if len(set(shards.widths)) == 1:
            parts = list(self.all_gather(logits))
        else:  # shorter parts are sent as wide as the widest
            wide = torch.nn.functional.pad(logits, (0, max(shards.widths) - logits.shape[1]))
            parts = list(self.all_gather(wide))
        return _side_by_side([part[:, :size] for part, size in zip(parts, shards.sizes, strict=True)])

    def dealt_rows(self, logits: torch.Tensor, shards: Shards) -> torch.Tensor:
        """This rank's rows ``[rows, V]`` of all, from its part ``[B, width]``: each logit is sent to one rank."""
        B = len(logits)
        own = self.rows_of(self.rank, B)
        mine = own.stop - own.start
        counts = [(rows.stop - rows.start) * logits.shape[1] for rows in self._all_rows(B)]
        # The rows of a rank are neighbours, so that nothing is copied before it is sent.
        found = self.all_to_all(logits.contiguous().view(-1), counts, [mine * width for width in shards.widths])
        parts = torch.split(found, [mine * width for width in shards.widths])
        each = zip(parts, shards.widths, shards.sizes, strict=True)
        return _side_by_side([part.view(mine, width)[:, :size] for part, width, size in each])

    def part(self, logits: torch.Tensor, shards: Shards) -> torch.Tensor:
        """This rank's part ``[B, width]`` of whole rows ``[B, V]``; -inf in columns of padding."""
        start, stop, width = (each[self.rank] for each in shards)
        return torch.nn.functional.pad(logits[:, start:stop], (0, width - (stop - start)), value=float("-inf"))

    def returned_rows(self, rows: torch.Tensor, B: int, shards: Shards) -> torch.Tensor:
        """This rank's part ``[B, width]`` of all rows, from its own rows ``[rows, V]``; -inf in columns of padding."""
        mine = len(rows)
        blocks = []
        for start, stop, width in zip(*shards, strict=True):
            padding = (0, width - (stop - start))
            blocks.append(torch.nn.functional.pad(rows[:, start:stop], padding, value=float("-inf")).flatten())
        width = shards.widths[self.rank]
        counts = [(own.stop - own.start) * width for own in self._all_rows(B)]
        found = self.all_to_all(torch.cat(blocks), [mine * each for each in shards.widths], counts)
        return found.view(B, width)

    def results(self, own: torch.Tensor, B: int) -> torch.Tensor:
        """The results of all rows ``[B, N]``, from those of this rank's rows ``[rows, N]``."""
        each = -(-B // self.size)
        if len(own) < each:
            own = torch.nn.functional.pad(own, (0, 0, 0, each - len(own)))
        return self.all_gather(own).flatten(0, 1)[:B]

    def _all_rows(self, B: int) -> list[slice]:
        return [self.rows_of(rank, B) for rank in range(self.size)]


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of rows next to each other, as a new tensor."""
    dtype = parts[0].dtype
    each = 8 // parts[0].element_size()
    if each > 1 and all(part.shape[1] % each == 0 and part.stride(0) % each == 0 for part in parts):
        # Words of 64 bits are fewer than logits of 16, and are copied by the number.
        words = [part.view(torch.int64) for part in parts if part.storage_offset() % each == 0]
        if len(words) == len(parts):
            return torch.cat(words, 1).view(dtype)
    return torch.cat(parts, 1)


_groups: WeakKeyDictionary[Any, Group] = WeakKeyDictionary()


class Agreement:
    """What the ranks have found to be alike in the arguments of their calls, so that none waits for another in vain.

    The ranks compare arguments of a form that they haven't seen yet: once for each form, by way of the host.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._known: set[Hashable] = set()

    def __call__(self, form: tuple[tuple[str, Hashable], ...]) -> bool:
        """Compare the arguments of a call; whether they are of a new form.

        Args:
            form: the names of what has to be the same on all ranks, and what this rank has.

        Raises:
            ValueError: they differ, or another rank has refused its own; the message names the rank.
        """
        if form in self._known:
            return False
        self.check(self.group.told({"form": dict(form)}))
        self._known.add(form)
        return True

    def refuse(self, error: Exception) -> None:
        """Tell the others that this rank has refused its arguments, if they are waiting to compare them.

        They are for sure before the first form; later nobody knows, and they are left to the group's timeout.
        """
        if not self._known and self.group.size > 1:
            self.group.told({"error": f"{type(error).__name__}: {error}"})

    def check(self, told: list[Mapping[str, Any]]) -> None:
        """Raise where what the ranks have told isn't alike."""
        self.group.check_refused(told)
        forms = [each["form"] for each in told]
        for rank, form in enumerate(forms):
            names = [*forms[0], *(name for name in form if name not in forms[0])]
            for name in names:
                if form.get(name) != forms[0].get(name):
                    raise ValueError(_differs(name, forms, rank))


def _differs(name: str, told: list[Any], rank: int) -> str:
    """That one rank has something else than rank 0, or that rank 0 has something else than all others."""
    values = [each.get(name) for each in told]
    if len(values) > 2 and all(value == values[rank] for value in values[1:]):
        rank, other = 0, 1
    else:
        other = 0
    return (
        f"{name} must be the same on all ranks, but rank {rank} has {values[rank]!r} where rank {other} has "
        f"{values[other]!r}"
    )
