"""Log-probabilities behind processors: each position of a text with its own history, as where it was sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from fastlogits_kernels.training import logprobs as kernels
from fastlogits_kernels.training.reference import Task
from fastlogits_kernels.training.sets import GivenSets

from fastlogits.plan import chance
from fastlogits.plan.causes import kind
from fastlogits.plan.fusion import fused_to_logits, fused_to_token
from fastlogits.plan.plan import Plan
from fastlogits.plan.position import Index
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member, Truncate
from fastlogits.processors.base import LogitsProcessorList

if TYPE_CHECKING:
    from fastlogits_kernels.rules import Rule
    from fastlogits_kernels.training.shards import Place


class _Process(NamedTuple):
    """What is applied to the logits of each position, and to which of them."""

    plan: Plan
    input_ids: torch.Tensor
    prompt_length: Index | None
    T: int

    def __call__(self, logits: torch.Tensor, t: int) -> torch.Tensor:
        """The processed logits ``[B, V]`` of a position, float32, or float64 where they are that."""
        x = logits if logits.dtype == torch.float64 else logits.float()
        seen = self.input_ids[:, : self.input_ids.shape[1] - self.T + t + 1]
        start = self.prompt_length
        if isinstance(start, torch.Tensor):
            start = start.clamp(max=seen.shape[1])
        elif start is not None:
            start = min(start, seen.shape[1])
        return self.plan(seen, x, None if start is None else Run.of(start, None), {})

    def noted(self, device: torch.device) -> AbstractContextManager[chance.Noted | None]:
        """Note what the processors draw within it, if they may draw anything."""
        return chance.noted(device) if self.plan.may_draw else nullcontext()

    def again(self, drawn: chance.Noted | None) -> AbstractContextManager[None]:
        """Let them draw the same."""
        return nullcontext() if drawn is None else chance.again(drawn)


def _steps(logits: torch.Tensor, task: Task) -> Iterator[tuple[int, torch.Tensor, Task]]:
    """The logits ``[B, V]`` of each position, and what is asked of them."""
    B, T = logits.shape[:2]

    def column(value: Any, t: int) -> Any:
        return value.view(B, T, *value.shape[1:])[:, t] if isinstance(value, torch.Tensor) and value.ndim else value

    for t in range(T):
        rules = [rule._replace(value=column(rule.value, t)) for rule in task.rules]
        rules = [
            rule._replace(value=rule.value.contiguous()) if isinstance(rule.value, torch.Tensor) else rule
            for rule in rules
        ]
        kept = None if task.kept is None else GivenSets(*(column(each, t) for each in task.kept))
        yield t, logits[:, t], Task(
            column(task.targets, t), column(task.temperature, t), rules, kept, task.ignore_index
        )  # fmt: skip


Found: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, tuple[torch.Tensor, torch.Tensor | None]]
"""Log-probabilities, entropies if asked for, and what is outside; the record, and what is kept if that lacks it."""


class Way(Protocol):
    """How rows that have been processed come to log-probabilities: in one process, or in several together."""

    def forward(self, local: torch.Tensor, task: Task, entropy: bool) -> Found:
        """What rows come to."""

    def backward(
        self, local: torch.Tensor, task: Task, came: kernels.Incoming, bits: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Write the gradient of the processed logits to ``out``."""


class _Whole:
    """Rows of the whole vocabulary."""

    def forward(self, local: torch.Tensor, task: Task, entropy: bool) -> Found:
        found = kernels._forward(local, task, entropy)
        return found.logprobs, found.entropy, found.outside, (found.record, None)

    def backward(
        self, local: torch.Tensor, task: Task, came: kernels.Incoming, bits: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        kernels._backward_(local, task, came, out)


class _Processed(torch.autograd.Function):
    """Log-probabilities behind processors; in the backward pass these run once more, in torch, and draw the same."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, task: Task, entropy: bool, process: _Process, way: Way
    ) -> tuple[Any, ...]:
        """Log-probabilities, entropies and what is outside, each ``[B, T]``."""
        found, drawn = [], []
        for t, each, of_it in _steps(logits.detach(), task):
            with process.noted(each.device) as its:
                processed = process(each, t)
            drawn.append(its)
            found.append(way.forward(processed, of_it, entropy))
        logprobs, entropies, outsides, numbers = zip(*found, strict=True)
        ctx.save_for_backward(logits, *(each for of_position in numbers for each in of_position))
        ctx.task, ctx.entropy, ctx.process, ctx.way, ctx.drawn = task, entropy, process, way, drawn
        outside = torch.stack(outsides, 1)
        ctx.mark_non_differentiable(outside)
        result = torch.stack(logprobs, 1)
        return result, torch.stack(entropies, 1) if entropy else result.new_empty(0), outside

    @staticmethod
    def backward(ctx: Any, *came: Any) -> tuple[Any, ...]:
        """The gradient of the logits."""
        logits, *numbers = ctx.saved_tensors
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for t, each, of_it in _steps(logits.detach(), ctx.task):
            # As in the forward pass, to the last bit; the pass that torch records may round otherwise.
            with ctx.process.again(ctx.drawn[t]):
                same = ctx.process(each, t)
            own = torch.empty(same.shape, dtype=same.dtype, device=same.device)
            entropy_grads = came[1][:, t].contiguous() if ctx.entropy else None
            incoming = kernels.Incoming(came[0][:, t].contiguous(), entropy_grads, numbers[2 * t])
            ctx.way.backward(same, of_it, incoming, numbers[2 * t + 1], own)
            with torch.enable_grad(), ctx.process.again(ctx.drawn[t]):
                leaf = each.detach().clone().requires_grad_()
                processed = ctx.process(leaf, t)
            if processed.requires_grad:
                (found,) = torch.autograd.grad(processed, leaf, own)
            else:  # a processor has made them anew
                found = torch.zeros_like(leaf)
            gradient[:, t] = found
        return kernels.once_only(gradient, logits), None, None, None, None


def _of_part(
    members: Sequence[Member], input_ids: torch.Tensor, joins: bool, place: Place
) -> tuple[Plan, torch.Tensor, tuple[Rule, ...]]:
    """The plan of a part of the vocabulary, the tokens as it reads them, and the truncations behind it if these join.

    Raises:
        ValueError: a processor needs more than the part.
    """
    from fastlogits.parallel.stages import Piece, members_of_part

    last = len(members)
    while joins and last and isinstance(members[last - 1].stage, Truncate):
        last -= 1
    rules = tuple(rule for member in members[last:] for rule in member.stage.rules)  # type: ignore[attr-defined]
    if any(rule.filter_value != -math.inf for rule in rules):
        raise ValueError(
            "processors that truncate must have filter_value=-inf where the vocabulary is split, got "
            f"{', '.join(str(rule.filter_value) for rule in rules)}"
        )
    part = members_of_part(members[:last], Piece(place.first, place.first + place.width, place.V))
    if part is None and any(isinstance(member.stage, Truncate) for member in members) and not joins:
        raise ValueError(
            "processors must not truncate where the vocabulary is split and temperature, truncations or kept are given "
            f"beside them, got {', '.join(member.name for member in members)}"
        )
    if part is None:
        raise ValueError(
            "processors must map each logit by itself where the vocabulary is split, with truncations last if at all, "
            f"got {', '.join(member.name for member in members)}"
        )
    return Plan.compile(part.members), part.ids(input_ids), rules


@torch.compiler.disable  # type: ignore[untyped-decorator]
def processed_logprobs(
    logits: torch.Tensor,
    task: Task,
    entropy: bool,
    processors: Iterable[Any],
    input_ids: torch.Tensor | None,
    prompt_length: Index | None,
    group: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities of targets behind processors, entropies if asked for, and which targets are outside.

    Raises:
        ValueError: ``input_ids`` that don't fit the logits; kept ids with offsets; with a group, processors that need
            more than this rank's part of the logits.
    """
    listed = processors if isinstance(processors, LogitsProcessorList) else LogitsProcessorList(processors)
    whole = logits if logits.ndim == 3 else logits.unsqueeze(1)
    B, T = whole.shape[:2]
    if input_ids is None:
        needing = [member.name for member in listed.plan.members if member.stage.needs_history]
        if needing:
            raise ValueError(
                f"input_ids must be the tokens that the model has seen, got None: {needing[0]} reads them, or asks how "
                "many there are"
            )
        input_ids = torch.zeros((B, T), dtype=torch.int64, device=logits.device)
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.dtype not in (torch.int32, torch.int64)
        or input_ids.ndim != 2
        or input_ids.shape[0] != B
        or input_ids.shape[1] < T - 1
    ):
        raise ValueError(
            f"input_ids must be int32 or int64 of shape ({B}, L), L at least {max(0, T - 1)}, got {kind(input_ids)}"
        )
    if input_ids.device != logits.device:
        raise ValueError(f"input_ids must be on {logits.device}, as logits are, got them on {input_ids.device}")
    if not T:  # no position, no process
        nothing = whole.sum(-1).reshape(-1).to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        return nothing, nothing if entropy else None, nothing != nothing
    if task.kept is not None and task.kept.offsets is not None:
        raise ValueError("kept must be ids with counts or bits where processors are given, got ids with offsets")
    joins = not task.rules and task.temperature is None and task.kept is None
    way: Way = _Whole()
    if group is None:
        draw = fused_to_token(listed.plan.inner_parts, joins)
        plan = Plan(fused_to_logits([*draw.rest, *([] if draw.fold is None else [draw.fold])]))
        rules = draw.rules or ()
    else:
        from fastlogits.training.shards import Ranks, check_sets

        way = ranks = Ranks.of(group, logits)
        check_sets(task, ranks.place.V)
        ranks.agree(whole, task)
        plan, input_ids, rules = _of_part(listed.plan.members, input_ids, joins, ranks.place)
    if rules:
        task = task._replace(rules=rules)
    process = _Process(plan, input_ids, prompt_length, T)
    apply: Any = _Processed.apply
    found, entropies, outside = apply(whole, task, entropy, process, way)
    return found.reshape(-1), entropies.reshape(-1) if entropy else None, outside.reshape(-1)
