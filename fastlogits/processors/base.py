"""What all processors share: the list that runs as one plan, and the base of processors that say what they are."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.logits_process import LogitsProcessorList as _TransformersList

from fastlogits.plan import Barrier, Plan, Run
from fastlogits.stages import Opaque, Stage

if TYPE_CHECKING:
    from fastlogits.position import Index

__all__ = ["LogitsProcessor", "LogitsProcessorList", "StagedProcessor"]


class RunProcessor(LogitsProcessor):
    """A plan at work in one run: a processor of two parameters for any list, to be dropped with its run."""

    def __init__(self, plan: Plan, run: Run) -> None:
        self._plan, self._run = plan, run
        # Most plans are one launch, which then needs no loop around it.
        self._process = plan.steps[0] if len(plan.steps) == 1 else plan

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Processed scores ``[B, V]``, see ``StagedProcessor``."""
        return self._process(input_ids, scores, self._run)

    def apply_(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The same in place."""
        return self._process(input_ids, scores, self._run, in_place=True)

    def explain(self) -> str:
        """The plan as text."""
        return self._plan.explain()


class _Planned:
    """What a processor and a list of them have in common: a plan, and the ways to run it."""

    @property
    def plan(self) -> Plan:
        """The compiled plan."""
        raise NotImplementedError

    def for_run(self, prompt_length: Index | None = None, cache_position: Index | None = None) -> RunProcessor:
        """A processor of two parameters for one run, whose start it knows; it goes into any list.

        Args:
            prompt_length: number of tokens of the run's prompt, padding included: an integer, or an integer tensor
                ``()`` or ``(B,)`` on the device of the scores, which is then read there at each call. None takes
                the length of the first ``input_ids`` that the processor is called with.
            cache_position: index of the token whose logits are processed, of the same forms. None takes it from
                the length of ``input_ids`` at each call.

        Raises:
            ValueError: not an integer or integer tensor, or out of range.
        """
        return RunProcessor(self.plan, Run(prompt_length, cache_position))

    def explain(self) -> str:
        """What becomes of the processors, as text: launches, merges and the law that allows them, barriers."""
        return self.plan.explain()


class StagedProcessor(_Planned, LogitsProcessor):
    """Base of processors that say which stage they are and leave the rest to the plan.

    A subclass defines ``stage()``, with a stage of ``fastlogits.stages``; calling it, merging it with its neighbours
    and running it in place follow.

    Example:
        >>> from fastlogits.stages import Ban
        >>> class NoThree(StagedProcessor):
        ...     def stage(self):
        ...         return Ban((3,))
        >>> NoThree()(torch.tensor([[1, 2]]), torch.zeros(1, 4))
        tensor([[0., 0., 0., -inf]])
    """

    supports_continuous_batching: ClassVar[bool | None] = False

    def stage(self) -> Stage:
        """What this processor does; asked once."""
        raise NotImplementedError(f"{type(self).__name__} must define stage()")

    @cached_property
    def plan(self) -> Plan:
        """The compiled plan of this processor alone."""
        return Plan.compile([(type(self).__name__, self.stage())])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Process the scores of one step; the input is never written.

        Args:
            input_ids: tokens so far, int32 or int64 ``(B, L)``.
            scores: logits, float32, float16 or bfloat16 ``(B, V)`` of any row stride.

        Returns:
            Processed scores ``(B, V)`` of the same dtype: a new tensor, or ``scores`` itself where nothing changes.

        Raises:
            ValueError: scores of another shape or dtype; tensors on different devices; a token id or mask that
                doesn't fit the vocabulary; or a first-step processor that can't know where the run starts.
        """
        return self.plan(input_ids, scores)

    def apply_(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The same in place; returns ``scores``."""
        return self.plan(input_ids, scores, in_place=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "plan"}


class LogitsProcessorList(_Planned, _TransformersList):
    """``LogitsProcessorList`` of transformers that runs as one plan.

    Given to ``model.generate(logits_processor=...)``, it tells its first-step processors where each run starts:
    ``generate`` iterates the list once a run, before the first step, and gets processors made for that run.

    Example:
        >>> processors = LogitsProcessorList([])
        >>> processors(torch.tensor([[1, 2]]), torch.zeros(1, 3))
        tensor([[0., 0., 0.]])
    """

    _planned: tuple[tuple[Any, ...], Plan] | None = None

    @property
    def plan(self) -> Plan:
        """The compiled plan of the processors that the list holds now."""
        processors = tuple(super().__iter__())
        if self._planned is not None:
            known, plan = self._planned
            if len(known) == len(processors) and all(map(operator.is_, processors, known)):
                return plan
        plan = Plan.compile((type(processor).__name__, _stage_of(processor)) for processor in processors)
        self._planned = (processors, plan)
        return plan

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        *,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Process the scores of one step with all processors in order.

        Args:
            input_ids: tokens so far, int32 or int64 ``(B, L)``.
            scores: logits ``(B, V)``; never written.
            prompt_length: number of tokens of the run's prompt; see ``for_run``. First-step processors need it.
            cache_position: index of the newest token; by default from the length of ``input_ids``.
            **kwargs: what processors with more than two parameters ask for, as in transformers.

        Raises:
            ValueError: see ``StagedProcessor``; or an argument that a processor asks for is missing.
        """
        run = None if prompt_length is None else Run(prompt_length, cache_position)
        if prompt_length is not None:
            kwargs["prompt_length"] = prompt_length
        if cache_position is not None:
            kwargs["cache_position"] = cache_position
        return self.plan(input_ids, scores, run, kwargs)

    def apply_(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        *,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
    ) -> torch.Tensor:
        """The same in place; returns ``scores``."""
        run = None if prompt_length is None else Run(prompt_length, cache_position)
        return self.plan(input_ids, scores, run, in_place=True)

    def __iter__(self) -> Iterator[Any]:
        if _is_transformers(sys._getframe(1)):
            return self._for_generate()
        return iter(super().__iter__())

    def _for_generate(self) -> Iterator[Any]:
        """The processors of one run: a fresh one for each launch, what fastlogits doesn't know as it is."""
        for step in self.plan.steps:
            if isinstance(step, Barrier):
                yield step.processor
            else:
                yield RunProcessor(Plan([step]), Run())  # the launch and its tables serve all runs

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_planned"}


def _is_transformers(frame: FrameType) -> bool:
    """Whether the code of a frame is transformers' own, or that of a model's remote code under it."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("transformers", "transformers_modules")


def _stage_of(processor: Any) -> Stage:
    # A subclass that overrides the call does more than its stage says.
    if isinstance(processor, StagedProcessor) and type(processor).__call__ is StagedProcessor.__call__:
        return processor.stage()
    return Opaque(processor)
