"""The decoding loop of ``fl.decode``: the prompt in an ordinary forward pass, then a step after the other on buffers.

On a GPU a step is a CUDA graph. The host hears late, and without waiting, which rows have finished: what is beyond the
end is cut off. On a CPU nothing is captured, and transformers' own loop is as good; ``FORCE`` takes this one.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache, GenerationMixin
from transformers.generation import stopping_criteria as criteria
from transformers.generation import utils

from fastlogits.plan.barrier import Barrier
from fastlogits.plan.plan import Plan
from fastlogits.plan.stages import Mix, Observe, Rows, stages_of, values_keep_notes
from fastlogits.processors.base import RunProcessor
from fastlogits.sampling import Sampler
from fastlogits.transformers import caches
from fastlogits.transformers.accelerate import RunList
from fastlogits.transformers.graphs import GRAPHS, kind_of, kind_of_plan, state_of
from fastlogits.transformers.step import Chooser, Start, Step, on_side_stream, watched

logger = logging.getLogger("fastlogits")

FORCE = False
"""Whether a CPU takes this loop too, without a capture."""

LAG = 2
"""How many steps the host runs ahead of what it knows of them."""

_WARM_UP = 2
"""Steps that are taken before the step is captured: they compile, and the last of them is watched for waits."""


class Request(NamedTuple):
    """A call of ``decode``."""

    model: Any
    input_ids: torch.Tensor
    processors: RunList
    stopping_criteria: Any
    config: Any
    streamer: Any
    do_sample: bool
    seeds: torch.Tensor
    """The seed of each row, ``[B]``."""
    starts: torch.Tensor
    """Where its positions start, ``[B]``."""
    compiled: bool
    """Whether the forward pass of a step is compiled."""
    model_kwargs: dict[str, Any]


class Unfit(Exception):  # noqa: N818 - nothing has gone wrong
    """A call that goes through the ordinary loop, and why."""


def decode(request: Request) -> Any:
    """What ``generate`` returns for a call.

    Raises:
        Unfit: the call has to go through the ordinary loop; nothing has been done yet.
    """
    reason = reason_of(request)
    if reason is not None:
        raise Unfit(reason)
    plan = plan_of(request.processors, request.input_ids.shape[1])
    reason = reason_of_plan(plan)
    if reason is not None:
        raise Unfit(reason)
    kind = (kind_of_plan(plan), request.do_sample, request.compiled)
    known = GRAPHS.refused(request.model, kind)
    if known is not None:
        raise Unfit(known)
    with GRAPHS.reserved(request.model.device) as mine:
        if not mine:
            raise Unfit("another call decodes at the moment")
        return _Loop(request, plan, kind).run()


# -- What has to go through the ordinary loop ----------------------------------------------------------------------

_AT_EACH_STEP = {"use_cache", "logits_to_keep", "encoder_outputs", "return_dict", "output_router_logits"}
_HANDLED = {caches.NAME, "attention_mask", "decoder_attention_mask", "position_ids", "inputs_embeds"}
_AT_FIRST = set(getattr(utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ()))


def reason_of(request: Request) -> str | None:
    """Why a call can't be captured, from what is known before it has begun."""
    model, config, given = request.model, request.config, request.model_kwargs
    device = model.device
    if device.type != "cuda" and not (FORCE and device.type == "cpu"):
        return f"the model is on {device}, where no step is captured"
    if not hasattr(GenerationMixin, "_prefill") or not caches.has_device_counters():
        return f"transformers {transformers.__version__} has no static cache that counts on the device"
    if request.input_ids.device != device or len(_devices(model)) > 1:
        return "the model and its input are on several devices"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if request.stopping_criteria.max_length is None:
        return "nothing says how long the text may become"
    if config.output_attentions or config.output_hidden_states:
        return "output_attentions and output_hidden_states are asked for"
    if config.cache_implementation not in (None, "static"):
        return f"cache_implementation={config.cache_implementation!r} is asked for"
    cache = given.get(caches.NAME)
    if cache is None or not given.get("use_cache"):
        return "the model runs without a cache that fastlogits knows"
    return caches.unfit(cache) or reason_of_model(model) or _reason_of_inputs(model, given)


def _devices(model: Any) -> set[Any]:
    return set((getattr(model, "hf_device_map", None) or {}).values())


def reason_of_model(model: Any) -> str | None:
    """Why the steps of a model can't be captured."""
    cls = type(model)
    for name in ("_sample", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
        if getattr(cls, name) is not getattr(GenerationMixin, name) or name in vars(model):
            return f"{cls.__name__} has a {name} of its own"
    config = model.config.get_text_config(decoder=True)
    # The masks of eager attention are made of a number that is copied from the host, which a capture refuses.
    if config._attn_implementation not in (("sdpa",) if model.device.type == "cuda" else ("sdpa", "eager")):
        return f"the attention is {config._attn_implementation}, whose masks are made on the host"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if layers or getattr(config, "attention_chunk_size", None) is not None or getattr(model, "_is_stateful", False):
        return f"{cls.__name__} has layers of {', '.join(sorted(layers)) or 'a state of its own'}"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own stay once attentions or hidden states have been asked for, and do nothing otherwise.
        if hasattr(module, "_hf_hook") or not all(_is_of_transformers(hook) for hook in hooks):
            return f"hooks run in {name or cls.__name__} at each step"
    return None


def _is_of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")


def _reason_of_inputs(model: Any, given: dict[str, Any]) -> str | None:
    """Why what a model is given can't be in buffers."""
    position_ids = given.get("position_ids")
    if position_ids is not None and position_ids.ndim != 2:
        return "position_ids have more than two dimensions"
    crossed = model.config.is_encoder_decoder
    mask = given.get("decoder_attention_mask" if crossed else "attention_mask")
    if mask is not None and mask.ndim != 2:
        return "the attention mask has more than two dimensions"
    for name, value in given.items():
        if name in _HANDLED or name in _AT_EACH_STEP or name in _AT_FIRST:
            continue
        if value is not None and not isinstance(value, (bool, int, float, str)):
            return f"the model is given {name} at each step"
    return None


def plan_of(processors: RunList, prompt_length: int) -> Plan:
    """The plan of a run's processors, with those that were made for this run as if they stood there themselves."""
    members = []
    each: Iterator[Any] = list.__iter__(processors)
    for processor in each:
        if isinstance(processor, RunProcessor) and processor.starts_at(prompt_length):
            members += processor.plan.members
        else:
            members.append(processors._member_of(processor))
    return Plan.compile(members)


def reason_of_plan(plan: Plan) -> str | None:
    """Why processors can't run on a history in a buffer, whose length only the device knows."""
    for part in plan.inner_parts:
        for member in part.members:
            if isinstance(part, Barrier):
                return f"{member.name} is a processor that fastlogits doesn't know"
            for stage in stages_of(member.stage):
                if isinstance(stage, Observe) or (
                    isinstance(stage, Rows) and stage.needs_history and not stage.positioned
                ):
                    return f"{member.name} reads the text on the host"
                if isinstance(stage, Mix):
                    return f"{member.name} makes one row of two"
                if values_keep_notes(stage):
                    return f"{member.name} carries something from step to step"
    return None


# -- The loop ------------------------------------------------------------------------------------------------------


class _Loop:
    """One call.

    Args:
        request: the call.
        plan: its processors.
        kind: what tells calls apart that can't share a step, as far as it is known before the prompt is read.
    """

    def __init__(self, request: Request, plan: Plan, kind: Hashable) -> None:
        self._request, self._plan, self._kind = request, plan, kind
        self._model, self._config = request.model, request.config
        self._crossed = bool(self._model.config.is_encoder_decoder)
        returned = bool(self._config.return_dict_in_generate)
        self._keeps_scores = bool(returned and self._config.output_scores)
        self._keeps_logits = bool(returned and self._config.output_logits)
        self._prompt_length = int(request.input_ids.shape[1])
        self._limit = max(1, int(request.stopping_criteria.max_length) - self._prompt_length)
        self._scores: tuple[torch.Tensor, ...] = ()
        self._logits: tuple[torch.Tensor, ...] = ()
        self._call = self._model.__call__
        if request.compiled:
            # Graphs of the compiler's own can't be in ours.
            compiling = transformers.CompileConfig(mode="default", fullgraph=False, dynamic=False)
            self._call = self._model.get_compiled_call(compiling)
        # Processors may be set to something else while they run; then the step is no longer what was captured.
        self._plans = plans_of(request.processors)
        self._changed = False
        self._step: Step

    def run(self) -> Any:
        """Decode, and make of it what ``generate`` returns."""
        request, model = self._request, self._model
        model_kwargs = dict(request.model_kwargs)
        outputs = model._prefill(request.input_ids, self._config, model_kwargs, is_first_iteration=True)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=self._crossed
        )
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        del outputs
        cache = model_kwargs[caches.NAME]
        cached = int(cache.get_seq_length())
        try:
            self._begin(start_of(request, model_kwargs), cached, logits)
        except torch.OutOfMemoryError:
            self._give_up(cache, cached)
        count = self._decode(logits)
        sequences = self._step.history[:, : self._prompt_length + count].clone()
        if self._config.return_dict_in_generate or getattr(cache, "_is_user_defined", False):
            self._step.append_to(cache, cached, cached + count - 1)
        scores = self._scores[:count] if self._keeps_scores else None
        return output_of(request, sequences, scores, self._logits[:count] if self._keeps_logits else None, cache)

    def _give_up(self, cache: Any, cached: int) -> None:
        """Leave the call to the ordinary loop, which has no second cache; a cache that is the caller's holds too much.

        Raises:
            Unfit: as a rule.
        """
        GRAPHS.drop()
        of_the_caller = getattr(cache, "_is_user_defined", False) or cached != self._prompt_length
        if of_the_caller or type(cache) is not DynamicCache:
            raise
        fresh = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        self._request.model_kwargs[caches.NAME] = fresh
        raise Unfit("there is no memory for a static cache") from None

    def _begin(self, start: Start, cached: int, logits: torch.Tensor) -> None:
        """Find the step for this kind of call, or make it, and give it what the call brings."""
        history = rounded(self._prompt_length + self._limit)
        cache_length = rounded(cached + self._limit)
        kept = (self._keeps_scores, self._keeps_logits)
        chooser = Chooser(self._plan, self._request.do_sample, self._keeps_scores)
        values = chooser.values(logits)
        kind = self._kind if values is None else (values.form, self._request.do_sample, self._request.compiled)
        key = key_of(self._model, start, kind, *kept, history, cache_length)
        step = GRAPHS.get(self._model, key)
        if step is None:
            with torch.inference_mode(False), torch.no_grad():
                step = Step(start, history, cache_length, chooser, self._keeps_logits, masked_of(self._model))
            GRAPHS.keep(self._model, key, step)
        step.choose_by(chooser, values)
        step.begin(start)
        self._step = step

    def _decode(self, logits: torch.Tensor) -> int:
        """Take steps until all rows have finished; how many tokens that are."""
        step, request = self._step, self._request
        rest = rest_of(request.stopping_criteria)
        # What fastlogits doesn't know is asked once for each token, and no more.
        lag = LAG if all(type(each) in _LATE for each in rest) else 0
        reports = _Reports(step.tokens, lag + 1)
        streamer = request.streamer
        count = 0

        def hear(most: int) -> bool:
            """Take reports until ``most`` are left; whether one says that all has been said."""
            nonlocal count
            while len(reports) > most:
                done, tokens = reports.take()
                count += 1
                if streamer is not None:
                    streamer.put(tokens)
                if done:
                    return True
            return False

        optimised = getattr(self._model, "_optimize_model_for_decode", contextlib.nullcontext)
        with optimised():
            for number in range(self._limit):
                self._take(number, logits)
                length = self._prompt_length + number + 1
                if rest:
                    seen = step.history[:, :length].clone()
                    stop = criteria.StoppingCriteriaList(rest)(seen, self._scores if self._keeps_scores else None)
                    step.finished.logical_or_(stop)
                    step.done.copy_(step.finished.all())
                reports.put(step.done, step.tokens)
                if hear(lag):
                    break
            else:
                hear(0)
        if streamer is not None:
            streamer.end()
        return count

    def _take(self, number: int, logits: torch.Tensor) -> None:
        """Take a step; the first from the prompt's logits."""
        step = self._step
        if self._changed or plans_of(self._request.processors) != self._plans:
            self._changed = True
            self._take_changed(number, logits)
        elif number == 0:
            step.take(logits)
        elif step.graph is not None or step.tokens.device.type != "cuda":
            step.advance(self._model, self._call)
        else:
            advance(step, self._model, self._call, number, self._kind)
        if self._keeps_scores and step.scores is not None:
            self._scores += (step.scores.clone(),)
        if self._keeps_logits and step.logits is not None:
            self._logits += (step.logits.clone(),)

    def _take_changed(self, number: int, logits: torch.Tensor) -> None:
        """Take a step with processors that are no longer what they were at the beginning."""
        step, request = self._step, self._request
        if number:
            logits = step.forward(self._model, self._call)
        seen = step.history[:, : self._prompt_length + number]
        scores = request.processors(seen, logits)
        if request.do_sample:
            tokens = Sampler()(scores, request.seeds, request.starts + number).tokens
        else:
            tokens = scores.argmax(-1)
        step.append(tokens)
        step.logits, step.scores = logits, scores


def advance(step: Step, model: Any, call: Any, number: int, kind: Hashable) -> None:
    """Take a step of a GPU: by its graph, or one of the first, which go before the capture; ``number`` is from 1 on."""
    if step.graph is not None or number < _WARM_UP or GRAPHS.refused(model, kind) is not None:
        with contextlib.nullcontext() if step.graph is not None else on_side_stream(step.tokens.device):
            step.advance(model, call)
        return
    if number == _WARM_UP:
        with on_side_stream(step.tokens.device), watched() as waits:
            step.advance(model, call)
        if waits.place is not None:
            _refuse(model, kind, f"the host waits for the GPU in {waits.place}")
        return
    try:
        GRAPHS.capture(step, model, call)
    except Exception as error:  # whatever it is: without a graph it works as it did
        _refuse(model, kind, f"the step could not be captured: {error}")
        torch.cuda.synchronize()
    step.advance(model, call)


def _refuse(model: Any, kind: Hashable, reason: str) -> None:
    GRAPHS.refuse(model, kind, reason)
    logger.info("decode goes on without a CUDA graph: %s", reason)


def output_of(
    request: Request,
    sequences: torch.Tensor,
    scores: tuple[torch.Tensor, ...] | None,
    logits: tuple[torch.Tensor, ...] | None,
    cache: Any,
) -> Any:
    """What ``generate`` returns: the sequences, or what was asked for with them."""
    if not request.config.return_dict_in_generate:
        return sequences
    crossed = request.model.config.is_encoder_decoder
    made = utils.GenerateEncoderDecoderOutput if crossed else utils.GenerateDecoderOnlyOutput
    return made(sequences=sequences, scores=scores, logits=logits, **{caches.NAME: cache})


def start_of(request: Request, model_kwargs: dict[str, Any]) -> Start:
    """What a call brings to a step, once its prompt has been read."""
    crossed = bool(request.model.config.is_encoder_decoder)
    B, device = request.input_ids.shape[0], request.input_ids.device
    ends = [each for each in request.stopping_criteria if type(each) is criteria.EosTokenCriteria]
    eos = torch.full((max(8, sum(each.eos_token_id.numel() for each in ends)),), -1, device=device)
    if ends:
        given = torch.cat([each.eos_token_id.flatten().to(device) for each in ends])
        eos[: given.numel()] = given
    pads = any(hasattr(each, "eos_token_id") for each in request.stopping_criteria)
    others = {name: value for name, value in model_kwargs.items() if name not in _HANDLED | _AT_FIRST}
    if crossed and model_kwargs.get("attention_mask") is not None:
        others["attention_mask"] = model_kwargs["attention_mask"]
    position_ids = None if crossed else model_kwargs.get("position_ids")
    return Start(
        request.input_ids,
        model_kwargs[caches.NAME],
        model_kwargs.get(masked_of(request.model)),
        None if position_ids is None else position_ids[:, -1:].expand(B, 1),
        others,
        request.seeds,
        request.starts,
        eos,
        request.config._pad_token_tensor.to(device) if pads else None,
    )


def masked_of(model: Any) -> str:
    """What the model calls the mask of cached tokens."""
    return "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"


def key_of(model: Any, start: Start, *others: Hashable) -> Hashable:
    """What calls have in common that share a step."""
    return (
        others, start.input_ids.shape[0], start.input_ids.device, caches.FixedCache.shape_of(start.cache),
        start.eos.numel(), None if start.position_ids is None else start.position_ids.dtype, _shapes(start.others),
        state_of(model),
    )  # fmt: skip


def plans_of(processors: RunList) -> list[Plan]:
    """The plans of a run's processors as they are now, to be compared."""
    each: Iterator[Any] = list.__iter__(processors)
    return [processors.plan, *(processor.plan for processor in each if isinstance(processor, RunProcessor))]


_LATE = (criteria.MaxTimeCriteria, criteria.StopStringCriteria)
"""Criteria that may be asked about tokens that are cut off again."""


def rest_of(given: Sequence[Any]) -> list[Any]:
    """The criteria that a step doesn't know of."""
    return [each for each in given if type(each) not in (criteria.MaxLengthCriteria, criteria.EosTokenCriteria)]


def rounded(length: int) -> int:
    """A length with some room, so that calls of similar lengths share a step."""
    block = 128 if length <= 2048 else 512
    return -(-length // block) * block


def _shapes(value: Any) -> Hashable:
    """What values have in common that fit into the same buffers."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return type(value), tuple((name, _shapes(each)) for name, each in value.items())
    return kind_of(value)


class _Reports:
    """What the host hears of each step, in the order of the steps: whether all is done, and the tokens.

    Args:
        tokens: the tokens of a step, ``[B]``.
        most: how many steps may be under way.
    """

    def __init__(self, tokens: torch.Tensor, most: int) -> None:
        self._on_gpu = tokens.device.type == "cuda"

        def slot() -> tuple[torch.Tensor, torch.Tensor, Any]:
            done = torch.zeros((), dtype=torch.bool, pin_memory=self._on_gpu)
            said = torch.zeros(tokens.shape, dtype=tokens.dtype, pin_memory=self._on_gpu)
            event = torch.cuda.Event(blocking=True) if self._on_gpu else None  # type: ignore[no-untyped-call]
            return done, said, event

        self._free = deque(slot() for _ in range(most))
        self._used: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()

    def __len__(self) -> int:
        return len(self._used)

    def put(self, done: torch.Tensor, tokens: torch.Tensor) -> None:
        """Have something of a step reported, once the GPU gets there."""
        slot = self._free.popleft()
        slot[0].copy_(done, non_blocking=True)
        slot[1].copy_(tokens, non_blocking=True)
        if slot[2] is not None:
            slot[2].record()
        self._used.append(slot)

    def take(self) -> tuple[bool, torch.Tensor]:
        """The oldest report that hasn't been taken; waits for it."""
        slot = self._used.popleft()
        if slot[2] is not None:
            slot[2].synchronize()
        self._free.append(slot)
        return bool(slot[0]), slot[1].clone()
