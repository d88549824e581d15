"""Log-probabilities where the vocabulary is split over ranks.

Some rows at a time are dealt out: each rank gets the whole logits of its share of them, and computes what it would on
one GPU. What a row comes to, some numbers, goes back to all. So results are those of one GPU, bit for bit, whatever the
rules. The backward pass needs the rank's own logits and these numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime.bits import pack_bits, unpack_bits
from fastlogits_kernels.training import logprobs as kernels
from fastlogits_kernels.training.reference import Task, rows_of
from fastlogits_kernels.training.rows import RANK_AT
from fastlogits_kernels.training.sets import GivenSets

# What is dealt out at a time takes a small part of the logits' memory; fewer rows than that wait more than they send.
_SHARE = 32
_LEAST_ROWS = 64
_NONE = -(2**62)
"""The target of a row that is left out, where tokens are counted from a rank's first."""
_LOWEST = -(2**31)


def local_logits(logits: Any, group: Any) -> tuple[Any, Any]:
    """This rank's part of the logits, and the group over which the vocabulary is split; None where it isn't.

    Raises:
        ValueError: a ``DTensor`` that is split otherwise than over its last dimension; a group that is none.
    """
    if type(logits) is not torch.Tensor and hasattr(logits, "placements") and hasattr(logits, "to_local"):
        split = [dim for dim, placement in enumerate(logits.placements) if not placement.is_replicate()]
        if len(split) != 1 or not logits.placements[split[0]].is_shard(logits.ndim - 1):
            raise ValueError(
                "logits must be a DTensor that is split over its last dimension alone, got placements "
                f"{logits.placements}: redistribute it with Shard({logits.ndim - 1})"
            )
        return logits.to_local(), logits.device_mesh.get_group(split[0])
    if group is None:
        return logits, None
    if hasattr(group, "shards"):  # a fastlogits.parallel.Group, which knows which columns are padding
        logits = logits[..., : group.shards(logits.shape[-1]).sizes[group.rank]]
        group = group.process_group
    if hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group()
    if not dist.is_initialized() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group of torch.distributed or a DeviceMesh, got {type(group).__name__}"
        )
    return logits, group


class _Ranks(NamedTuple):
    """The ranks of a group, and how many tokens each has."""

    group: Any
    rank: int
    widths: tuple[int, ...]

    @property
    def start(self) -> int:
        """The first token of this rank."""
        return sum(self.widths[: self.rank])

    @property
    def width(self) -> int:
        """How many tokens this rank has."""
        return self.widths[self.rank]

    def share(self, rank: int, rows: int) -> tuple[int, int]:
        """The rows that a rank processes, of so many."""
        each = -(-rows // len(self.widths))
        return min(rank * each, rows), min((rank + 1) * each, rows)

    def dealt(self, local: torch.Tensor) -> torch.Tensor:
        """The whole logits of this rank's share of some rows, of which all have their part ``[n, width]``."""
        n = len(local)
        shares = [end - begin for begin, end in (self.share(rank, n) for rank in range(len(self.widths)))]
        mine = shares[self.rank]
        sent = [rows * self.width for rows in shares]
        received = [mine * width for width in self.widths]
        found = torch.empty(sum(received), dtype=local.dtype, device=local.device)
        dist.all_to_all_single(found, local.contiguous().view(-1), received, sent, group=self.group)
        parts = found.split(received)  # type: ignore[no-untyped-call]
        return torch.cat([part.view(mine, width) for part, width in zip(parts, self.widths, strict=True)], 1)

    def gathered(self, mine: torch.Tensor, rows: int) -> torch.Tensor:
        """What all ranks say of their shares of some rows, ``[rows, n]``; of this one ``mine``."""
        each = -(-rows // len(self.widths))
        padded = torch.nn.functional.pad(mine, (0, 0, 0, each - len(mine))).contiguous()
        found = [torch.empty_like(padded) for _ in self.widths]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat(found)[:rows]


_known: WeakKeyDictionary[Any, dict[int, _Ranks]] = WeakKeyDictionary()


def _ranks(group: Any, width: int) -> _Ranks:
    """The ranks of a group, which tell each other their widths once, by way of the host."""
    known = _known.setdefault(group, {})
    if width not in known:
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, width, group=group)
        known[width] = _Ranks(group, dist.get_rank(group), tuple(told))
    return known[width]


class _Numbers(NamedTuple):
    """What the backward pass needs of each row."""

    record: torch.Tensor
    """int32 ``[N, WORDS]`` of the kernels, or float ``[N, 3]``: the largest logit, the log-mass and the entropy."""
    bits: torch.Tensor | None
    """What is kept of this rank's tokens, packed, where the record doesn't say it."""


def _forward_of_some(
    local: torch.Tensor, task: Task, entropy: bool, ranks: _Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Numbers]:
    """Log-probabilities, entropies, and what is outside, of some rows; and what the backward pass needs."""
    n = len(local)
    begin, end = ranks.share(ranks.rank, n)
    whole, mine = ranks.dealt(local), task.rows(begin, end)
    if kernels.takes(local, task):
        found = kernels._forward(whole, mine, entropy)
        numbers = torch.stack((found.logprobs, found.logprobs if found.entropy is None else found.entropy), 1)
        told = torch.cat((numbers.view(torch.int32), found.outside.int().unsqueeze(1), found.record), 1)
        told = ranks.gathered(told, n)
        bits = None
        if task.kept is not None:
            kept = task.kept.mask(n, sum(ranks.widths))[0]
            bits = pack_bits(kept[:, ranks.start : ranks.start + ranks.width])
        floats = told[:, :2].contiguous().view(torch.float32)
        return floats[:, 0], floats[:, 1], told[:, 2] != 0, _Numbers(told[:, 3:].contiguous(), bits)
    of_rows = rows_of(whole, mine)
    ignored = (mine.targets == mine.ignore_index).unsqueeze(1)
    logprob = torch.where(of_rows.known, of_rows.own - of_rows.top - of_rows.log_mass, torch.nan).masked_fill(
        ignored, 0
    )
    entropies = of_rows.entropy()[0]
    # A target that is none makes its whole row undefined.
    log_mass = torch.where(of_rows.known, of_rows.log_mass, torch.nan)
    columns = (logprob, entropies.masked_fill(ignored, 0), of_rows.outside & ~ignored, of_rows.top, log_mass, entropies)
    told = ranks.gathered(torch.cat([each.to(logprob.dtype) for each in columns], 1), n)
    kept = ranks.gathered(pack_bits(of_rows.scores != -torch.inf), n)
    kept = unpack_bits(kept, sum(ranks.widths))[:, ranks.start : ranks.start + ranks.width]
    return told[:, 0], told[:, 1], told[:, 2] != 0, _Numbers(told[:, 3:].contiguous(), pack_bits(kept))


def _own_task(task: Task, ranks: _Ranks, bits: torch.Tensor | None) -> Task:
    """What is asked of this rank's tokens, counted from its first."""
    targets = torch.where(task.targets == task.ignore_index, _NONE, task.targets.long() - ranks.start)
    kept = None if bits is None else GivenSets(bits=bits)
    return task._replace(targets=targets, kept=kept, ignore_index=_NONE)


def _own_record(record: torch.Tensor, rules: Any, start: int) -> torch.Tensor:
    """A record whose ranks of tokens that tie count from this rank's first."""
    record, rank = record.clone(), record[:, RANK_AT.value].long()
    lowest = any(rule.ties == "lowest" for rule in rules if isinstance(rule, Rule) and rule.spec.takes_ties)
    moved = (rank + start if lowest else rank - start).clamp(min=_LOWEST)
    record[:, RANK_AT.value] = torch.where(rank == _LOWEST, _LOWEST, moved).int()
    return record


def _gradient_in_torch(
    local: torch.Tensor, task: Task, came: kernels.Incoming, bits: torch.Tensor, out: torch.Tensor
) -> None:
    """The gradient of this rank's logits where torch has done the forward pass."""
    x = local if local.dtype == torch.float64 else local.float()
    n, width = x.shape
    divisor = torch.ones(n, 1, dtype=x.dtype, device=x.device)
    if task.temperature is not None:
        sampled = (task.temperature >= 1e-30) & task.temperature.isfinite()
        divisor = torch.where(sampled, task.temperature, 1.0).expand(n).to(x.dtype).unsqueeze(1)
    top, log_mass, entropy = came.record.split(1, 1)  # type: ignore[no-untyped-call]
    logarithms = x / divisor - top - log_mass
    p = torch.where(unpack_bits(bits, width), logarithms.exp(), log_mass * 0)
    g = came.grads.to(x.dtype).unsqueeze(1)
    h = torch.zeros_like(g) if came.entropy_grads is None else came.entropy_grads.to(x.dtype).unsqueeze(1)
    d = 0.0 - p * (g + h * torch.where(p > 0, logarithms + entropy, 0.0))
    target = task.targets.unsqueeze(1)
    inside = (target >= 0) & (target < width)
    d.scatter_add_(1, torch.where(inside, target, 0), torch.where(inside, g, 0.0))
    acts = ((g != 0) | (h != 0)) & (target != task.ignore_index)
    out.copy_(torch.where(acts, d / divisor, 0.0))


class _Sharded(torch.autograd.Function):
    """Log-probabilities of a vocabulary that is split over ranks."""

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, task: Task, entropy: bool, in_place: bool, group: Any
    ) -> tuple[Any, ...]:
        """Log-probabilities, entropies and what is outside."""
        ranks = _ranks(group, local.shape[-1])
        most = max(_LEAST_ROWS, len(task.targets) // _SHARE)
        found = [
            _forward_of_some(part, task.rows(begin, end), entropy, ranks)
            for part, begin, end in kernels._parts(local.detach(), most)
        ]
        logprobs, entropies, outside = (torch.cat(column) for column in list(zip(*found, strict=True))[:3])
        numbers = [each[3] for each in found]
        ctx.has_bits = numbers[0].bits is not None
        bits = torch.cat([each.bits for each in numbers]) if ctx.has_bits else None  # type: ignore[misc]
        ctx.save_for_backward(local, torch.cat([each.record for each in numbers]), bits)
        ctx.given = (task, entropy, in_place, ranks)
        ctx.mark_non_differentiable(outside)
        return logprobs, entropies if entropy else logprobs.new_empty(0), outside

    @staticmethod
    def backward(ctx: Any, *came: Any) -> tuple[Any, ...]:
        """The gradient of this rank's logits, without any exchange."""
        local, record, bits = ctx.saved_tensors
        task, entropy, in_place, ranks = ctx.given
        local = local.detach()
        own = _own_task(task, ranks, bits)
        incoming = kernels.Incoming(came[0].contiguous(), came[1].contiguous() if entropy else None, record)
        out = local if in_place else torch.empty(local.shape, dtype=local.dtype, device=local.device)
        if kernels.takes(local, task):
            incoming = incoming._replace(record=_own_record(record, task.rules, ranks.start))
            kernels._backward_(local, own, incoming, out)
        else:
            pairs = zip(kernels._parts(local), kernels._views_like(out, local), strict=True)
            for (part, begin, end), into in pairs:
                some = bits[begin:end]
                _gradient_in_torch(part, own.rows(begin, end), incoming.rows(begin, end), some, into)
        return out, None, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sharded_logprobs(
    logits: torch.Tensor, task: Task, entropy: bool, in_place: bool, group: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities of targets of a vocabulary that is split over a group, entropies, and what is outside."""
    apply: Any = _Sharded.apply
    found, entropies, outside = apply(logits, task, entropy, in_place, group)
    return found, entropies if entropy else None, outside
