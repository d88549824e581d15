"""Log-probabilities where the vocabulary is split over ranks.

Results are those of one GPU, bit for bit. There are two ways, chosen by what the host knows, alike on all ranks:

- All tokens count, or sets say which do; or, on GPUs, a fixed number of the likeliest ones. Each rank adds up its own
  logits, and two small exchanges make one sum of them. See ``fastlogits_kernels.training.shards`` and
  ``ruled_shards``.
- Other rules say what is kept, or the logits are float64. Some rows at a time are dealt out: each rank gets the whole
  logits of its share of them, and computes what it would on one GPU. What a row comes to, some numbers, goes back to
  all.

The backward pass needs the rank's own logits and these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fastlogits_kernels.rules import Rule, is_idle
from fastlogits_kernels.runtime.bits import pack_bits, unpack_bits, words
from fastlogits_kernels.training import logprobs as kernels
from fastlogits_kernels.training.reference import Task, rows_of, scores_of
from fastlogits_kernels.training.rows import RANK_AT
from fastlogits_kernels.training.ruled_shards import fixed_number_of, ruled_logprobs_of_part
from fastlogits_kernels.training.sets import GivenSets
from fastlogits_kernels.training.shards import NO_TOKEN, Place, logprobs_of_part

from fastlogits.parallel.group import Group, Shards

# What is dealt out at a time takes a small part of the logits' memory; fewer rows than that wait more than they send.
_SHARE = 32
_LEAST_ROWS = 64
_LOWEST = -(2**31)


def local_logits(logits: Any, group: Any) -> tuple[Any, Any]:
    """This rank's part of the logits, and the group over which the vocabulary is split; None where it isn't.

    Raises:
        ValueError: a ``DTensor`` that is split otherwise than over its last dimension; a group that is none, or one of
            whose ranks has padding alone.
    """
    if type(logits) is not torch.Tensor and hasattr(logits, "placements") and hasattr(logits, "to_local"):
        split = [dim for dim, placement in enumerate(logits.placements) if not placement.is_replicate()]
        if len(split) != 1 or not logits.placements[split[0]].is_shard(logits.ndim - 1):
            raise ValueError(
                "logits must be a DTensor that is split over its last dimension alone, got placements "
                f"{logits.placements}: redistribute it with Shard({logits.ndim - 1})"
            )
        return logits.to_local(), logits.device_mesh.get_group(split[0])
    if group is None or not isinstance(logits, torch.Tensor) or not logits.ndim:  # which is refused later
        return logits, group
    if isinstance(group, Group):  # which knows which columns are padding
        shards = group.shards(logits.shape[-1])
        if not all(shards.sizes):  # as all ranks see it
            raise ValueError(f"group must leave each rank at least one token, got parts of {shards.sizes} tokens")
        return logits[..., : shards.sizes[group.rank]], Ranks(group, shards._replace(widths=shards.sizes))
    if hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group()
    if not dist.is_initialized() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group of torch.distributed or a DeviceMesh, got {type(group).__name__}"
        )
    return logits, group


class Numbers(NamedTuple):
    """What the backward pass needs of each row."""

    record: torch.Tensor
    """int32 ``[N, WORDS]`` of the kernels, or float ``[N, 3]``: the largest logit, the log-mass and the entropy."""
    bits: torch.Tensor | None
    """What is kept of this rank's tokens, packed, where neither the record nor a set that is given says it."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the vocabulary, and which tokens each has."""

    group: Group
    shards: Shards

    @classmethod
    def of(cls, group: Any, logits: torch.Tensor) -> Ranks:
        """``group`` itself, or the ranks of a process group, of which this one has such logits ``[..., width]``."""
        if isinstance(group, Ranks):
            return group
        ranks = Group.of(group)
        return cls(ranks, ranks.shards(logits.shape[-1]))

    def agree(self, logits: torch.Tensor, task: Task) -> None:
        """Compare with the other ranks, once, what says how they exchange.

        Raises:
            ValueError: it is another on one of them.
        """
        self.group.agree((
            ("dtype of logits", str(logits.dtype)), ("kernels", kernels.takes(logits, task, self.place.V)),
        ))  # fmt: skip

    @property
    def place(self) -> Place:
        """Where this rank's tokens are."""
        return Place.of(self.shards.starts, self.shards.sizes, self.group.rank)

    def forward(
        self, local: torch.Tensor, task: Task, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Numbers]:
        """Log-probabilities, entropies if asked for, and what is outside; and what the backward pass needs."""
        logprobs, entropies, outside, numbers = _forward(local, task, entropy, self)
        return logprobs, entropies if entropy else None, outside, numbers

    def backward(
        self, local: torch.Tensor, task: Task, came: kernels.Incoming, bits: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Write the gradient of this rank's logits to ``out``, which may be these, without any exchange."""
        place = self.place
        own = _own_task(task, place, bits)
        # Chosen as in the forward pass, which has made the record: not by what the kernels take of this part alone.
        gradient: Any = _gradient_in_torch
        if came.record.dtype == torch.int32:
            gradient = kernels._launch_gradient
            came = came._replace(record=_own_record(came.record, task.rules, place.first))
        pairs = zip(kernels.rows_in_parts(local), kernels._views_like(out, local), strict=True)
        for (part, begin, end), into in pairs:
            gradient(part, own.rows(begin, end), came.rows(begin, end), into, place.V)


def _forward_of_some(
    local: torch.Tensor, task: Task, entropy: bool, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Numbers]:
    """Log-probabilities, entropies, and what is outside, of some rows that are dealt out.

    And what the backward pass needs.
    """
    n, group, place = len(local), ranks.group, ranks.place
    own = group.rows_of(group.rank, n)
    whole, mine = group.dealt_rows(local, ranks.shards), task.rows(own.start, own.stop)
    if kernels.takes(whole, mine):
        found = kernels._forward(whole, mine, entropy)
        numbers = torch.stack((found.logprobs, found.logprobs if found.entropy is None else found.entropy), 1)
        told = torch.cat((numbers.view(torch.int32), found.outside.int().unsqueeze(1), found.record), 1)
        told = group.results(told, n)
        floats = told[:, :2].contiguous().view(torch.float32)
        return floats[:, 0], floats[:, 1], told[:, 2] != 0, Numbers(told[:, 3:].contiguous(), None)
    rows = rows_of(whole, mine)
    ignored = (mine.targets == mine.ignore_index).unsqueeze(1)
    logprob = torch.where(rows.of.known, rows.of.own - rows.top - rows.log_mass, torch.nan).masked_fill(ignored, 0)
    entropies = rows.entropy()
    # A target that is none makes its whole row undefined.
    log_mass = torch.where(rows.of.known, rows.log_mass, torch.nan)
    outside = rows.of.outside & ~ignored
    columns = (logprob, entropies.masked_fill(ignored, 0), outside, rows.top, log_mass, entropies)
    told = group.results(torch.cat([each.to(logprob.dtype) for each in columns], 1), n)
    kept = unpack_bits(group.results(pack_bits(rows.of.scores != -torch.inf), n), place.V)
    bits = pack_bits(kept[:, place.first : place.first + place.width])
    return told[:, 0], told[:, 1], told[:, 2] != 0, Numbers(told[:, 3:].contiguous(), bits)


def _forward_of_dealt(
    local: torch.Tensor, task: Task, entropy: bool, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Numbers]:
    """The same of all rows, some at a time."""
    most = max(_LEAST_ROWS, len(task.targets) // _SHARE)
    found = [
        _forward_of_some(part, task.rows(begin, end), entropy, ranks)
        for part, begin, end in kernels.rows_in_parts(local, most)
    ]
    if not found:
        found = [_forward_of_some(local.flatten(0, -2), task, entropy, ranks)]
    logprobs, entropies, outside = (torch.cat(column) for column in list(zip(*found, strict=True))[:3])
    numbers = [each[3] for each in found]
    bits = None if numbers[0].bits is None else torch.cat([each.bits for each in numbers])  # type: ignore[misc]
    return logprobs, entropies, outside, Numbers(torch.cat([each.record for each in numbers]), bits)


@kernels.OPERATION.falls_back
def _forward(
    local: torch.Tensor, task: Task, entropy: bool, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Numbers]:
    """The same, with two small exchanges where that is possible."""
    place, exchanges = ranks.place, (ranks.group.all_gather, ranks.group.added)
    if not _drops(task, place.V) and local.dtype != torch.float64:
        found = logprobs_of_part(local, task._replace(rules=()), place, entropy, *exchanges)
    else:
        asked = len(task.targets) > 0 and task.kept is None
        step = fixed_number_of(local, task, place, min(ranks.shards.sizes)) if asked else None
        if step is None:
            return _forward_of_dealt(local, task, entropy, ranks)
        found = ruled_logprobs_of_part(local, task, place, step, entropy, *exchanges)
    entropies = found.logprobs if found.entropy is None else found.entropy
    return found.logprobs, entropies, found.outside, Numbers(found.record, None)


def _drops(task: Task, V: int) -> bool:
    """Whether rules may drop something."""
    return task.kept is None and any(not is_idle(rule, V) for rule in task.rules)


def _own_task(task: Task, place: Place, bits: torch.Tensor | None) -> Task:
    """What is asked of this rank's tokens, counted from its first."""
    own = place.task(task, NO_TOKEN)
    return own if bits is None else own._replace(kept=GivenSets(bits=bits), rules=())


def _own_record(record: torch.Tensor, rules: Any, start: int) -> torch.Tensor:
    """A record whose ranks of tokens that tie count from this rank's first."""
    record, rank = record.clone(), record[:, RANK_AT.value].long()
    lowest = any(rule.ties == "lowest" for rule in rules if isinstance(rule, Rule) and rule.spec.takes_ties)
    moved = (rank + start if lowest else rank - start).clamp(min=_LOWEST)
    record[:, RANK_AT.value] = torch.where(rank == _LOWEST, _LOWEST, moved).int()
    return record


def _gradient_in_torch(local: torch.Tensor, task: Task, came: kernels.Incoming, out: torch.Tensor, _vocab: int) -> None:
    """The gradient of this rank's logits where torch has done the forward pass."""
    of = scores_of(local, task)
    g = came.grads.to(of.scores.dtype).unsqueeze(1)
    top, log_mass, entropy = came.record.split(1, 1)  # type: ignore[no-untyped-call]
    logarithms = of.scores - top - log_mass
    p = logarithms.exp()
    h = torch.zeros_like(g) if came.entropy_grads is None else came.entropy_grads.to(p.dtype).unsqueeze(1)
    d = 0.0 - p * (g + h * torch.where(p > 0, logarithms + entropy, 0.0))
    target = torch.where(of.known, task.targets.unsqueeze(1), 0)
    d.scatter_add_(1, target, torch.where(of.known, g, 0.0))
    if of.divisor is not None:
        d = d / of.divisor
    acts = ((g != 0) | (h != 0)) & (task.targets != task.ignore_index).unsqueeze(1)
    out.copy_(torch.where(acts, d, 0.0))


class _Sharded(torch.autograd.Function):
    """Log-probabilities of a vocabulary that is split over ranks."""

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, task: Task, entropy: bool, in_place: bool, ranks: Ranks
    ) -> tuple[Any, ...]:
        """Log-probabilities, entropies and what is outside."""
        logprobs, entropies, outside, numbers = ranks.forward(local.detach(), task, entropy)
        ctx.save_for_backward(local, *numbers)
        ctx.given = (task, entropy, in_place, ranks)
        ctx.mark_non_differentiable(outside)
        return logprobs, logprobs.new_empty(0) if entropies is None else entropies, outside

    @staticmethod
    def backward(ctx: Any, *came: Any) -> tuple[Any, ...]:
        """The gradient of this rank's logits, without any exchange."""
        local, record, bits = ctx.saved_tensors
        task, entropy, in_place, ranks = ctx.given
        given, local = local, local.detach()
        incoming = kernels.Incoming(came[0].contiguous(), came[1].contiguous() if entropy else None, record)
        out = local if in_place else torch.empty(local.shape, dtype=local.dtype, device=local.device)
        ranks.backward(local, task, incoming, bits, out)
        return kernels.once_only(out, given), None, None, None, None


def check_sets(task: Task, V: int) -> None:
    """Refuse sets that are of another vocabulary, or packed ones of fewer tokens.

    Raises:
        ValueError: these are such.
    """
    if task.kept is not None and task.kept.vocab not in (None, V):
        raise ValueError(f"kept must be of the {V} tokens of the logits, got kept tokens of {task.kept.vocab}")
    if task.kept is not None and task.kept.bits is not None and task.kept.bits.shape[1] < words(V):
        raise ValueError(
            f"kept must have the {words(V)} words of the whole vocabulary, got {task.kept.bits.shape[1]} words"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sharded_logprobs(
    logits: torch.Tensor, task: Task, entropy: bool, in_place: bool, group: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities of targets of a vocabulary that is split over a group, entropies, and what is outside."""
    ranks = Ranks.of(group, logits)
    check_sets(task, ranks.place.V)
    ranks.agree(logits, task)
    apply: Any = _Sharded.apply
    found, entropies, outside = apply(logits, task, entropy, in_place, ranks)
    return found, entropies if entropy else None, outside
