"""From logits to tokens: processors, temperature, truncations, and noise that depends on the request alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeGuard, get_args

import torch
from fastlogits_kernels.draw import draw
from fastlogits_kernels.pointwise.search import NOTHING
from fastlogits_kernels.rules import (
    ORDERS,
    RULES,
    TINY_TEMPERATURE,
    Order,
    Rule,
    RuleKind,
    Ties,
    argument_of,
    check_row_values,
    check_rules,
)
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import table_on
from fastlogits_kernels.selection import launch
from fastlogits_kernels.selection.kept import bits_of_scores
from fastlogits_kernels.selection.logprobs import MOST, Report, report, select_and_report
from fastlogits_kernels.truncate.dispatch import truncate

from fastlogits import warm_up as warming
from fastlogits.checks import finite_number, is_integer, is_number, one_of, suggests_fields, whole_number
from fastlogits.kept_tokens import KeptForm, KeptTokens, checked_form, kept_of_bits
from fastlogits.parallel.dtensor import is_split, local_part
from fastlogits.plan import chance
from fastlogits.plan.causes import checked_processors, explain_failure, kind
from fastlogits.plan.fusion import fused_to_logits, fused_to_token
from fastlogits.plan.part import NO_ARGUMENTS
from fastlogits.plan.plan import Plan
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.position import Index
from fastlogits.plan.run import Run
from fastlogits.processors.base import LogitsProcessorList, positions_for_others
from fastlogits.representation import arguments, set_fields
from fastlogits.sampled import Distribution, Sample
from fastlogits.warm_up import WarmUp

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlogits.parallel.sampling import SplitSampler


_ARGUMENTS = {order: [(name, argument_of(name)) for name in names] for order, names in ORDERS.items()}
"""The rules of each order, with the names of their parameters."""


class SamplingOptions(TypedDict, total=False):
    """The fields of ``SamplingParams``, as keyword arguments of ``Sampler`` and ``sample``."""

    temperature: float | torch.Tensor | None
    top_k: int | torch.Tensor | None
    top_p: float | torch.Tensor | None
    min_p: float | torch.Tensor | None
    typical_p: float | torch.Tensor | None
    epsilon: float | torch.Tensor | None
    eta: float | torch.Tensor | None
    top_h: float | torch.Tensor | None
    top_n_sigma: float | torch.Tensor | None
    top_a: float | torch.Tensor | None
    order: Order
    ties: Ties


@suggests_fields
@dataclass(frozen=True, eq=False)
class SamplingParams:
    """The temperature and the truncations of a sampler; each is off by default. Checked when it is made.

    Each parameter is a number for all rows, or a tensor ``(B,)`` on the device of the logits: float32, or int32 or
    int64 for ``top_k``. Such a tensor is read at each call. A value out of range raises if it is a number or on the
    CPU. On a device nothing can be raised without waiting for it: there such a truncation is off for that row, and such
    a temperature makes the row greedy.

    Args:
        temperature: the divisor of the logits, finite and at least 0; None for 1. Below 1e-30 it counts as 0, which is
            greedy.
        top_k: at least 1; V or more turns it off, and as a number 0 or -1 does too. What this and the other
            truncations keep is said at the warpers of their names.
        top_p: between 0 and 1; 1 turns it off.
        min_p: between 0 and 1; 0 turns it off.
        typical_p: above 0 and at most 1; 1 turns it off.
        epsilon: at least 0 and below 1; 0 turns it off.
        eta: at least 0 and below 1; 0 turns it off.
        top_h: above 0 and at most 1; 1 turns it off.
        top_n_sigma: above 0; inf turns it off.
        top_a: between 0 and 1; 0 turns it off.
        order: the order of the truncations, each of which acts on what the one before has left. ``"transformers"`` is
            top-n-sigma, top-h, top-k, top-p, min-p, top-a, typical, epsilon, eta. ``"vllm"`` is top-n-sigma, min-p,
            top-k, top-p, then the others as above. ``"sglang"`` is top-n-sigma, top-p, top-k, min-p, then the others.
        ties: which of the tokens that tie at the cut-off of top-k or top-p are kept. ``"all"`` follows transformers:
            top-k keeps all of them, top-p as many as it needs, those with the largest ids. With ``"lowest"`` both keep
            as many as they need, those with the lowest ids.

    Numbers may be numpy's scalars, and are kept as Python's. A truncation that is off is kept as None.

    Raises:
        ValueError: an argument out of range or of a wrong type; its message names it.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=1.5)
        Traceback (most recent call last):
        ValueError: top_p must be between 0 and 1 (1 turns it off), got 1.5
        >>> params = SamplingParams(temperature=0.7, top_k=1)
        >>> Sampler(params=params)(torch.tensor([[1.0, 3.0, 2.0]]), seeds=7, positions=5).tokens
        tensor([1])
    """

    temperature: float | torch.Tensor | None = None
    top_k: int | torch.Tensor | None = None
    top_p: float | torch.Tensor | None = None
    min_p: float | torch.Tensor | None = None
    typical_p: float | torch.Tensor | None = None
    epsilon: float | torch.Tensor | None = None
    eta: float | torch.Tensor | None = None
    top_h: float | torch.Tensor | None = None
    top_n_sigma: float | torch.Tensor | None = None
    top_a: float | torch.Tensor | None = None
    order: Order = "transformers"
    ties: Ties = "all"

    def __post_init__(self) -> None:
        one_of("order", self.order, tuple(ORDERS))
        one_of("ties", self.ties, get_args(Ties))
        given = self.__dict__
        given["temperature"] = _checked_temperature(self.temperature)
        for name, argument in _ARGUMENTS["transformers"]:
            if given[argument] is not None:
                given[argument] = _checked_rule(name, given[argument])

    def __repr__(self) -> str:
        return f"SamplingParams({arguments(set_fields(self))})"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The truncations that are on, in their order."""
        given = self.__dict__
        acting = [(name, given[argument]) for name, argument in _ARGUMENTS[self.order]]
        return tuple([Rule(name, value, ties=self.ties) for name, value in acting if value is not None])


class Sampler:
    """Samples a token for each row of logits. What doesn't change from step to step is prepared here, once.

    A row's token depends on its own logits, parameters, seed and position, and on nothing else: not on the batch, its
    place there, or the step before. It is ``argmax(x - log(E))`` over the kept tokens, the lowest id on ties. ``x`` are
    the processed logits in float32. ``E`` is exponential noise from Philox4x32-10, a counter-based generator (Salmon et
    al., SC 2011): its key is the seed, its counter the token id and the position. So the token is drawn from the
    softmax of ``x``. The noise has 48 bits; ``fastlogits_kernels.draw`` defines it.

    The logits become float32, then pass the processors, the temperature and the truncations.

    A row of temperature 0 is greedy: it takes its largest logit after the processors, the lowest id on ties. Neither
    temperature nor truncations count for it, in its log-probabilities either. A row with NaN gets the lowest id of NaN.
    A row with +inf and no NaN gets the lowest id of +inf. A row of nothing but -inf gets token 0.

    Args:
        processors: a ``LogitsProcessorList``, or any list of processors, applied first; None for none.
        params: temperature and truncations; None for none.
        logprobs: ``"raw"`` for log-probabilities of the logits as they are given, ``"processed"`` for those of the
            distribution that is sampled; None for none.
        top_logprobs: for how many of the most likely tokens log-probabilities are wanted too. Up to 32 cost two
            launches that read the logits once, the token's own included; for more of them the logits are sorted.
        return_kept: how the tokens that the truncations kept of each row are returned too, as ``KeptTokens``: an
            integer K for ids with room for K in each row, ``"bits"`` for packed bits, ``"ids"`` for ids of any number,
            which waits for the GPU; None for not at all. It reads the logits once more. Tokens at -inf are not kept;
            of a greedy row all others are. ``logprobs(kept=...)`` takes them.
        group: the ranks of which each has a part of the vocabulary: a process group of ``torch.distributed``, a
            ``DeviceMesh`` of one dimension, or a ``fastlogits.Group``, which says where the parts begin if they don't
            follow each other. Then all ranks make the same calls, each with its part of the logits, and get the same
            result: that of one process with all of the logits. The ranks compare the arguments once for each shape.
        options: fields of ``SamplingParams``, which replace those of ``params``.

    Raises:
        ValueError: an argument out of range or of a wrong type; a class among the processors.
        AttributeError: something among the processors that can't be called, as transformers' lists raise at a call.

    Example:
        >>> sampler = Sampler(temperature=torch.tensor([0.0, 0.7]), top_k=2, logprobs="raw")
        >>> logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
        >>> sampler(logits, seeds=torch.tensor([7, 10]), positions=5).tokens
        tensor([1, 2])
    """

    params: SamplingParams
    """Temperature and truncations."""

    def __init__(
        self,
        processors: Iterable[Any] | None = None,
        params: SamplingParams | None = None,
        *,
        logprobs: Distribution | None = None,
        top_logprobs: int = 0,
        return_kept: KeptForm = None,
        group: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> None:
        self.params = _with_options(params, options)
        one_of("logprobs", logprobs, (None, *get_args(Distribution)))
        top_logprobs = whole_number("top_logprobs", top_logprobs)
        if top_logprobs and logprobs is None:
            raise ValueError(
                f"logprobs must be 'raw' or 'processed' where top_logprobs is {top_logprobs}, got None: it says whose "
                "log-probabilities are meant"
            )
        if processors is not None and not isinstance(processors, LogitsProcessorList):
            processors = LogitsProcessorList(processors)
        for _ in checked_processors(processors or ()):
            pass  # the list is compiled at the first call; what is no processor is said now
        self._processors: LogitsProcessorList | None = processors
        temperature = self.params.temperature
        is_greedy = isinstance(temperature, (int, float)) and temperature < TINY_TEMPERATURE
        self._temperature = 0.0 if is_greedy else temperature
        self._rules = self.params.rules
        self._logprobs = logprobs
        self._top_logprobs = top_logprobs
        self._return_kept = checked_form(return_kept)
        self._fuses = launch.takes_rules(self._rules)
        self._fused: FusedDraw | None = None
        self._split = None if group is None else self._splitting(group)
        self._splits: dict[Any, SplitSampler] = {}  # for the groups that DTensors bring along

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SamplingParams.__dataclass_fields__ or (name == "params" and name in self.__dict__):
            raise AttributeError(
                f"a Sampler doesn't change, got {name} = {value!r}: make another one, and call that. For a parameter "
                "that changes from step to step give a tensor of one value for each row, and write to it"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        given: dict[str, Any] = {} if self._processors is None else {"processors": list(self._processors)}
        given |= set_fields(self.params)
        given |= {"logprobs": self._logprobs} if self._logprobs is not None else {}
        given |= {"top_logprobs": self._top_logprobs} if self._top_logprobs else {}
        return f"Sampler({arguments(given)})"

    def __call__(
        self,
        logits: torch.Tensor,
        seeds: Index,
        positions: Index,
        input_ids: torch.Tensor | None = None,
        *,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
    ) -> Sample:
        """Draw the tokens of one step.

        Args:
            logits: float32, float16 or bfloat16 ``[B, V]`` of any strides, V at least 1; never written. With a
                ``group`` this rank's part of them, ``[B, width]``. A ``DTensor`` that is split over its last dimension
                brings its group along.
            seeds: the seed of each request: an integer of up to 64 bits for all rows, or an integer tensor ``(B,)``.
            positions: the position in its sequence of the token that is drawn, of the same forms. Any number serves
                that a request doesn't use twice.
            input_ids: tokens so far, int32 or int64 ``(B, L)``, for processors that read them.
            prompt_length: see ``LogitsProcessorList``.
            cache_position: see ``LogitsProcessorList``.

        Raises:
            ValueError: an argument of another shape, dtype or device than is said here or at the class, or out of
                range; or what a processor refuses.
        """
        if self._split is not None or is_split(logits):
            return self._sample_split(logits, seeds, positions, input_ids, prompt_length, cache_position)
        if (
            not isinstance(logits, torch.Tensor)
            or logits.ndim != 2
            or not logits.is_floating_point()
            or not logits.shape[1]
        ):
            raise ValueError(
                f"logits must be a floating-point tensor of shape (B, V) with V at least 1, got {kind(logits)}"
            )
        self._check_vocabulary(logits.shape[1])
        rows = self._checked_rows(logits, seeds, positions, input_ids)
        try:
            given = logits.detach() if logits.requires_grad else logits
            return self._draw(given, *rows, input_ids, prompt_length, cache_position)
        except Exception as error:
            members = [] if self._processors is None else self._processors.plan.members
            explain_failure(error, members, input_ids, logits)
            raise

    def _check_vocabulary(self, V: int) -> None:
        if self._top_logprobs > V:
            raise ValueError(f"top_logprobs must be at most {V}, the size of the vocabulary, got {self._top_logprobs}")

    def _checked_rows(
        self, logits: torch.Tensor, seeds: Index, positions: Index, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Seeds and positions of each row; what else belongs to the rows of a call is checked."""
        if isinstance(self._temperature, torch.Tensor):
            _check_rows("temperature", self._temperature, logits)
            _check_temperatures(self._temperature)
        if input_ids is None and self._processors is not None:
            self._check_need_no_history(self._processors)
        return _for_rows("seeds", seeds, logits), _for_rows("positions", positions, logits)

    def _splitting(self, group: Any) -> SplitSampler:
        """What samples from the parts of the logits that the ranks of a group have."""
        from fastlogits.parallel.sampling import Draw, SplitSampler  # imports torch.distributed

        if self._return_kept is not None:
            raise ValueError(
                f"return_kept must be None with a group, got {self._return_kept!r}: no rank has whole rows"
            )

        def like(params: SamplingParams) -> Sampler:
            return Sampler(self._processors, params, logprobs=self._logprobs, top_logprobs=self._top_logprobs)

        parameters = vars(self.params).items()
        form = (*((name, _form_of(value)) for name, value in parameters), ("logprobs", self._logprobs))
        form = (*form, ("top_logprobs", self._top_logprobs))
        plain = None
        if self._logprobs != "processed" and self._top_logprobs <= MOST:
            greedy = not isinstance(self._temperature, torch.Tensor) and self._temperature == 0
            reported = None if self._logprobs is None else self._top_logprobs
            plain = Draw(() if greedy else self._rules, self._temperature, reported)
        return SplitSampler(group, like(self.params), like, form, plain)

    def _sample_split(
        self,
        logits: Any,
        seeds: Index,
        positions: Index,
        input_ids: torch.Tensor | None,
        prompt_length: Index | None,
        cache_position: Index | None,
    ) -> Sample:
        """What a call does with this rank's part of the logits."""
        from fastlogits.parallel.sampling import SplitCall

        split = self._split
        if is_split(logits):
            logits, group = local_part(logits)
            if split is None:
                split = self._splits[group] = self._splits.get(group) or self._splitting(group)
        assert split is not None

        def check() -> SplitCall:
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or not logits.is_floating_point():
                raise ValueError(
                    "logits must be a floating-point tensor of shape (B, width), this rank's part of the vocabulary, "
                    f"got {kind(logits)}"
                )
            rows = self._checked_rows(logits, seeds, positions, input_ids)
            check_rules(logits, self._rules)
            given = logits.detach() if logits.requires_grad else logits
            return SplitCall(given, *rows, input_ids, prompt_length, cache_position)

        return split(logits, check, None if self._processors is None else self._processors.plan)

    def warm_up(
        self,
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        *,
        batch: int | None = None,
        device: torch.device | str | None = None,
        row_stride: int | None = None,
        seeds: Index = 0,
        positions: Index = 0,
        input_ids: torch.Tensor | None = None,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
    ) -> WarmUp:
        """Compile now, and at once, what calls with such logits launch; else the first of them does it, and waits.

        A call is rehearsed: its launches are collected, compiled side by side and loaded, and none is made. See
        ``LogitsProcessorList.warm_up`` for what that leaves alone, and what changes nothing of what is compiled.

        Args:
            vocab_size: tokens of the vocabulary, V.
            dtype: of the logits: float32, float16 or bfloat16.
            batch: rows of the logits; None for the length of a parameter that is a tensor, else 1.
            device: where the logits are; None for that of a parameter that is a tensor, else the current GPU where
                there is one, else the CPU.
            row_stride: ``logits.stride(0)``, where logits are a part of wider ones; None for contiguous ones.
            seeds: as calls have them. Of a tensor the dtype is what counts; an integer stands for int64.
            positions: likewise.
            input_ids: likewise, for processors that read them; None for int64.
            prompt_length: as calls have it, where that is a tensor on the device; None for integers, or none at all.
            cache_position: likewise.

        Returns:
            What was compiled, in how many seconds, and what was not rehearsed: see ``WarmUp``.

        Raises:
            ValueError: an argument out of range or of a wrong type, or what a call refuses.
            RuntimeError: a CUDA graph is being captured.

        Example:
            >>> Sampler(temperature=0.7, top_k=50).warm_up(128256, torch.bfloat16, device="cpu").kernels
            ()
        """
        own = [each for each in (self._temperature, *(rule.value for rule in self._rules)) if _is_tensor(each)]
        where = own[0].device if device is None and own else warming.checked_device(device)
        from fastlogits.parallel.sampling import SplitCall

        rows = len(own[0]) if batch is None and own else whole_number("batch", 1 if batch is None else batch, 1)
        logits = warming.dummy_logits(rows, vocab_size, dtype, where, row_stride)
        ids = warming.dummy_ids(input_ids, rows, where)
        for argument, value in (("seeds", seeds), ("positions", positions)):
            _for_rows(argument, value, logits)
        if isinstance(self._temperature, torch.Tensor):
            _check_rows("temperature", self._temperature, logits)
        check_rules(logits, self._rules)
        plan = None if self._processors is None else self._processors.plan

        def rehearse_call(start: Index | None, at: Index | None) -> None:
            if self._split is None:
                self(logits, seeds, positions, ids, prompt_length=start, cache_position=at)
                return
            rows = self._checked_rows(logits, seeds, positions, ids)
            self._split.rehearse(SplitCall(logits, *rows, ids, start, at), plan)

        def rehearse() -> None:
            if prompt_length is not None or cache_position is not None:
                rehearse_call(prompt_length, cache_position)
                return
            for at, start in warming.host_positions(plan):
                rehearse_call(start, at)

        return warming.warmed(where, rehearse, warming.not_rehearsed(plan))

    def _draw(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        prompt_length: Index | None,
        cache_position: Index | None,
    ) -> Sample:
        """What a call does with arguments that have been checked."""
        fuses = self._fuses and launch.takes_scores(logits) and not torch.compiler.is_compiling()
        # More of the likeliest tokens than the kernels look for are sorted out of processed logits.
        if fuses and not (self._logprobs == "processed" and self._top_logprobs > MOST):
            if self._fused is None:
                self._fused = FusedDraw(self._processors, self._temperature, self._rules)
            run, kwargs = None, NO_ARGUMENTS
            if prompt_length is not None or cache_position is not None:
                run = Run.of(prompt_length, cache_position)
                kwargs = positions_for_others(prompt_length, cache_position)
            reported = self._top_logprobs if self._logprobs == "processed" else None
            bits = None
            if self._return_kept is not None:
                bits = torch.empty((len(logits), words(logits.shape[1])), dtype=torch.int32, device=logits.device)
            tokens, found = self._fused(logits, seeds, positions, input_ids, run, reported, kwargs, bits)
            if self._logprobs == "raw":
                found = report(logits, tokens, self._top_logprobs)
            return Sample.of(tokens, found, self._top_logprobs, self._kept(bits, logits))
        raw = logits.float()
        plain = raw
        if self._processors is not None:
            ids: Any = input_ids
            with chance.by_seeds(seeds, positions) if self._processors.plan.may_draw else nullcontext():
                plain = self._processors(ids, raw, prompt_length=prompt_length, cache_position=cache_position)
        scores, greedy = self._distribution(plain)
        tokens = draw(scores, seeds, positions, greedy)
        found = None
        if self._logprobs is not None:
            found = report(raw if self._logprobs == "raw" else scores, tokens, self._top_logprobs)
        bits = None if self._return_kept is None else bits_of_scores(scores)
        return Sample.of(tokens, found, self._top_logprobs, self._kept(bits, logits))

    def _kept(self, bits: torch.Tensor | None, logits: torch.Tensor) -> KeptTokens | None:
        return None if bits is None else kept_of_bits(bits, logits.shape[1], self._return_kept)

    def _distribution(self, plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits that are drawn from, after temperature and truncations, and which rows are greedy."""
        temperature = self._temperature
        if isinstance(temperature, torch.Tensor):
            return launch.reference_distribution(plain, temperature, self._rules)
        if temperature == 0:
            return plain, torch.ones(len(plain), dtype=torch.bool, device=plain.device)
        if temperature is None:
            return self._truncated(plain), None
        # Of a number, torch would multiply by its rounded reciprocal on a GPU; the kernels divide.
        divisor = torch.full((), temperature, dtype=plain.dtype, device=plain.device)
        return self._truncated(plain / divisor), None

    def _truncated(self, scores: torch.Tensor) -> torch.Tensor:
        return truncate(scores, self._rules) if self._rules else scores

    @staticmethod
    def _check_need_no_history(processors: LogitsProcessorList) -> None:
        for member in processors.plan.members:
            if member.stage.needs_history:
                raise ValueError(
                    f"input_ids must be the tokens so far, integers of shape (B, L), got None: {member.name} reads "
                    "them, or asks how many there are"
                )


class _Joined(NamedTuple):
    """A plan whose last parts have been taken into the draw."""

    plan: Plan | None
    first: Plan | None
    """What can't be taken, and runs before."""
    fold: Pointwise | None
    rules: tuple[Rule, ...]
    by_row: bool
    """Whether one of them has a value for each row."""
    kept: dict[tuple[int, torch.device], tuple[launch.Selection, torch.Tensor | None]]
    """The rules for a vocabulary and a device; with a temperature that is a number."""


class FusedDraw:
    """Tokens from kernels that read the logits once, and write nothing else.

    What stands last in the plan of the processors joins the draw: truncations where none are given here, and a fold or
    masks before those. What stands before them runs as it does without a draw.

    Args:
        processors: applied first; None for none.
        temperature: see ``Sampler``.
        rules: truncations after the temperature.
        seeded: whether processors that take random numbers get them by seeds and positions too.
    """

    def __init__(
        self,
        processors: LogitsProcessorList | None,
        temperature: float | torch.Tensor | None = None,
        rules: tuple[Rule, ...] = (),
        seeded: bool = True,
    ) -> None:
        self._processors, self._seeded = processors, seeded
        self._temperature = temperature if isinstance(temperature, torch.Tensor) else None
        # A number is a tensor of no dimensions to the kernels: no pass of its own, and the same tokens as by row.
        self._number = None if isinstance(temperature, torch.Tensor) or temperature in (None, 1) else temperature
        self._rules = () if self._number == 0 else rules
        self._joins_truncations = temperature is None and not rules
        # One object, made before it is put here: another thread may call meanwhile.
        self._joined = self._join(None)

    def __call__(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        run: Run | None,
        top_logprobs: int | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        kept_bits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Report | None]:
        """The tokens of one call; and where a number of ``top_logprobs`` is given, a report on them.

        ``kwargs`` are for processors of more than two parameters; what is kept is written to ``kept_bits``.
        """
        plan = None if self._processors is None else self._processors.plan
        joined = self._joined
        if plan is not joined.plan:
            joined = self._joined = self._join(plan)
        if joined.first is not None:
            ids: Any = input_ids
            draws = self._seeded and joined.first.may_draw
            with chance.by_seeds(seeds, positions) if draws else nullcontext():
                logits = joined.first(ids, logits.float(), run, kwargs)
        selection, temperature = self._selection(joined, logits)
        temperature = self._temperature if temperature is None else temperature
        if joined.by_row:
            check_rules(logits, joined.rules)
        given: Any = input_ids
        chain, call = (None, NOTHING) if joined.fold is None else joined.fold.inputs(given, logits, run)
        if top_logprobs is None:
            tokens = launch.select_tokens(
                logits, selection, seeds, positions, temperature, chain, call, kept_bits=kept_bits
            )
            return tokens, None
        return select_and_report(
            logits, selection, seeds, positions, top_logprobs, temperature, chain, call, kept_bits=kept_bits
        )

    def _selection(self, joined: _Joined, logits: torch.Tensor) -> tuple[launch.Selection, torch.Tensor | None]:
        """The rules as the kernels take them, and a temperature that is a number."""
        key = (logits.shape[1], logits.device)
        kept = joined.kept.get(key)
        if kept is None:
            number = None
            if self._number is not None:
                largest = torch.finfo(torch.float32).max
                number = table_on(torch.tensor(min(self._number, largest), dtype=torch.float32), logits.device)
            kept = joined.kept[key] = (launch.Selection(joined.rules, *key), number)
        return kept

    def operands(self, logits: torch.Tensor) -> tuple[Pointwise | None, launch.Selection] | None:
        """The fold and the rules that draw from such logits, where nothing stands before them; else None."""
        plan = None if self._processors is None else self._processors.plan
        if plan is not self._joined.plan:
            self._joined = self._join(plan)
        joined = self._joined
        return None if joined.first is not None else (joined.fold, self._selection(joined, logits)[0])

    def _join(self, plan: Plan | None) -> _Joined:
        """Take the last parts of a plan into the draw."""
        draw = fused_to_token([] if plan is None else plan.inner_parts, self._joins_truncations)
        rules = self._rules if draw.rules is None else draw.rules
        by_row = any(isinstance(rule.value, torch.Tensor) for rule in rules)
        first = Plan(fused_to_logits(draw.rest)) if draw.rest else None
        return _Joined(plan, first, draw.fold, rules, by_row, {})


def sample(
    logits: torch.Tensor,
    processors: Iterable[Any] | None = None,
    *,
    seeds: Index,
    positions: Index,
    input_ids: torch.Tensor | None = None,
    prompt_length: Index | None = None,
    cache_position: Index | None = None,
    params: SamplingParams | None = None,
    logprobs: Distribution | None = None,
    top_logprobs: int = 0,
    return_kept: KeptForm = None,
    group: Any = None,
    **options: Unpack[SamplingOptions],
) -> Sample:
    """Sample a token for each row of logits, once. In a loop over steps, make a ``Sampler`` and call that.

    Args:
        logits: float32, float16 or bfloat16 ``[B, V]``; never written.
        processors: applied first.
        seeds: the seed of each request, an integer or an integer tensor ``(B,)``.
        positions: the position of the token that is sampled, of the same forms.
        input_ids: tokens so far ``(B, L)``, for processors that read them.
        prompt_length: see ``LogitsProcessorList``.
        cache_position: see ``LogitsProcessorList``.
        params: see ``Sampler``.
        logprobs: see ``Sampler``.
        top_logprobs: see ``Sampler``.
        return_kept: see ``Sampler``.
        group: see ``Sampler``.
        options: fields of ``SamplingParams``, which replace those of ``params``.

    Raises:
        ValueError: see ``Sampler``.

    Example:
        >>> logits = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]).log()
        >>> sample(logits, seeds=torch.tensor([7, 11]), positions=5, top_p=0.6, logprobs="processed").logprobs
        tensor([0., 0.])
        >>> sample(logits, seeds=0, positions=0, temperature=0.0).tokens
        tensor([2, 0])
    """
    reported: Any = {"logprobs": logprobs, "top_logprobs": top_logprobs, "return_kept": return_kept}
    sampler = Sampler(processors, params, group=group, **reported, **options)
    return sampler(logits, seeds, positions, input_ids, prompt_length=prompt_length, cache_position=cache_position)


def _with_options(params: SamplingParams | None, options: SamplingOptions) -> SamplingParams:
    if params is None:
        return SamplingParams(**options)
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams or None, got {params!r}")
    return replace(params, **options) if options else params


def _checked_rule(kind: RuleKind, value: float | torch.Tensor) -> float | torch.Tensor | None:
    """The parameter of a rule; None where it is off for all rows."""
    if isinstance(value, torch.Tensor):
        check_row_values(kind, value)
        return value
    bounds = RULES[kind].range
    if RULES[kind].integer:
        if not is_integer(value) or value < -1:
            raise ValueError(f"top_k must be an integer of at least 1 (V or more, 0 and -1 turn it off), got {value!r}")
        return int(value) if value > 0 else None
    if not is_number(value) or not (bounds.has(value) or value == bounds.off):
        raise ValueError(f"{argument_of(kind)} must be {bounds.words}, got {value!r}")
    return float(value) if bounds.has(value) else None


def _checked_temperature(temperature: float | torch.Tensor | None) -> float | torch.Tensor | None:
    if temperature is None:
        return None
    if not isinstance(temperature, torch.Tensor):
        return finite_number("temperature", temperature, 0)
    if temperature.ndim != 1 or temperature.dtype != torch.float32:
        raise ValueError(
            "temperature must be a number or a float32 tensor of shape (B,), got a tensor of "
            f"{temperature.dtype} of {tuple(temperature.shape)}"
        )
    _check_temperatures(temperature)
    return temperature


def _form_of(value: object) -> Hashable:
    """What has to be the same on all ranks: a number, or that it is a tensor of some dtype."""
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else value


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _check_temperatures(temperature: torch.Tensor) -> None:
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        refused = ~((temperature >= 0) & (temperature < math.inf))
        if bool(refused.any()):
            row = int(refused.int().argmax())
            raise ValueError(f"temperature must be finite and at least 0, got {temperature[row].item():g} in row {row}")


def _check_rows(argument: str, value: torch.Tensor, logits: torch.Tensor) -> None:
    if value.ndim != 1 or value.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{argument} must be a number for all rows or a tensor of shape ({len(logits)},), one for each row of "
            f"logits, got one of {tuple(value.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(
            f"{argument} must be on {logits.device}, as the logits are, got a tensor on {value.device}: move it there "
            "once"
        )


_INTEGERS = (torch.int64, torch.int32)
"""What integers mostly are."""


def _for_rows(argument: str, value: Index, logits: torch.Tensor) -> torch.Tensor:
    """An integer for each row."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in _INTEGERS and (
            value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        ):
            raise ValueError(f"{argument} must be an integer or a tensor of integers, got a tensor of {value.dtype}")
        _check_rows(argument, value, logits)
        return value
    if not is_integer(value) or not -(2**63) <= value < 2**64:
        raise ValueError(f"{argument} must be an integer of at most 64 bits or a tensor of integers, got {kind(value)}")
    signed = int(value) - 2**64 if value >= 2**63 else int(value)
    return torch.full(logits.shape[:1], signed, dtype=torch.int64, device=logits.device)
