"""Where the processor and the samplers for vLLM depend on the inside of vLLM.

The processor depends on the frames that call it and on an attribute. The samplers stand in the place of names in the
runners' modules; what they call, and what they read of the objects that they are given, is here.

``problems`` and ``sampler_problems`` read vLLM's sources, without importing vLLM, and say what no longer stands there;
``python -m fastlogits doctor`` tells it. A sampler is left to vLLM where anything of it is missing.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from fastlogits.integrations.vllm_step import Places

logger = logging.getLogger(__name__)

SEEN = ("0.32.0",)
"""The versions of vLLM in which all of this has been seen to hold."""

# Between vLLM's input processor and a logits processor there are two calls.
_CALLERS = 4


def config_of_caller() -> Any:
    """The configuration of the engine that checks a request; None for a caller that has none.

    vLLM hands it to no processor where requests come in, but the object that calls them there holds it.
    """
    frame = sys._getframe(2)
    for _ in range(_CALLERS):
        config = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if config is not None:
            return config
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def keep_outputs() -> None:
    """Ask the batch of the older runner, which calls ``update_state``, to fill in output tokens.

    Under asynchronous scheduling it does so for penalties, for bad words and where a logits processor was named when
    the engine started, but not for an entry point, whose lists would hold -1 for every token.
    """
    batch = sys._getframe(2).f_locals.get("self")
    if getattr(batch, _WANTS_OUTPUTS, None) is False:
        setattr(batch, _WANTS_OUTPUTS, True)


_WANTS_OUTPUTS = "logitsprocs_need_output_token_ids"


class _Text(NamedTuple):
    """What must stand in a module of vLLM, and what is lost where it doesn't."""

    module: str
    text: str
    without: str


_TEXTS = (
    _Text(
        "vllm/v1/engine/input_processor.py",
        "self.vllm_config",
        "requests with forbidden combinations are refused in the worker, by a warning, and not where they come in",
    ),
    _Text(
        "vllm/v1/worker/gpu_input_batch.py",
        f"self.{_WANTS_OUTPUTS}",
        "under asynchronous scheduling the older runner shows no generated tokens to the processors",
    ),
    _Text(
        "vllm/v1/worker/gpu_input_batch.py",
        ".update_state(",
        "the older runner's batch isn't found, and shows no generated tokens to the processors",
    ),
)


def problems(folder: Path) -> Iterator[str]:
    """What of the inside of vLLM is no longer there, and what is lost by it.

    Args:
        folder: the folder that holds the package ``vllm``.
    """
    for each in _TEXTS:
        path = folder / each.module
        if not path.is_file():
            yield f"{each.module} is gone: {each.without}"
        elif each.text not in path.read_text():
            yield f"{each.module} has no {each.text}: {each.without}"


def installed() -> Path | None:
    """The folder that holds the package ``vllm``; None where it isn't installed. vLLM is not imported."""
    spec = find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


# -- The samplers: installation ---------------------------------------------------------------------------------------

SWITCH = "FASTLOGITS_VLLM_SAMPLER"
"""The environment variable that asks for the samplers."""


class _Place(NamedTuple):
    """A name in a runner's module that one of our classes takes."""

    module: str
    name: str
    where: str
    ours: str
    """The function that makes our class of vLLM's, and the module in this folder that has it."""


_NEWER, _OLDER = "vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu_model_runner"
_PLACES = (
    _Place(_NEWER, "Sampler", "vllm_sampler", "newer_sampler"),
    _Place(_NEWER, "RejectionSampler", "vllm_sampler", "newer_rejection_sampler"),
    _Place(_OLDER, "Sampler", "vllm_older_sampler", "older_sampler"),
)


def register() -> None:
    """Put the samplers in the places of vLLM's, if the environment asks for it: an entry point, which vLLM calls."""
    if os.environ.get(SWITCH, "0") in ("", "0"):
        return
    folder = installed()
    for module in (_NEWER, _OLDER):
        missing = ["vLLM isn't found"] if folder is None else list(sampler_problems(folder, module))
        if missing:
            logger.warning("vLLM's own sampler runs in %s: %s", module, "; ".join(missing))
        elif module in sys.modules:
            _put_ours(sys.modules[module])
        elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(module))


def _put_ours(module: ModuleType) -> None:
    for place in _PLACES:
        theirs = getattr(module, place.name) if place.module == module.__name__ else None
        if theirs is not None and not theirs.__module__.startswith("fastlogits."):
            ours = getattr(import_module(f"fastlogits.integrations.{place.where}"), place.ours)
            setattr(module, place.name, ours(theirs))
            logger.info("%s of %s samples with fastlogits", place.name, place.module)


class _Finder(MetaPathFinder):
    """Waits for a runner's module, which takes seconds to import and may never be needed in a process."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that puts our classes in their places."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """A module's loader; after it our classes are put in their places."""

    def __init__(self, theirs: Loader) -> None:
        self._theirs = theirs

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does it."""
        return self._theirs.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader does it, and then ours."""
        self._theirs.exec_module(module)
        _put_ours(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


# -- The samplers: what they depend on --------------------------------------------------------------------------------

BUILT_IN_PROCESSORS = 3
"""The first of a sampler's processors are vLLM's own: bias, penalties and bad words, which the step does itself."""

_SAMPLER = "vllm/v1/worker/gpu/sample/sampler.py"
_REJECTION = "vllm/v1/worker/gpu/spec_decode/rejection_sampler.py"


class _Signature(NamedTuple):
    """A function or method of vLLM's, and the arguments that it must have."""

    runner: str
    path: str
    name: str
    arguments: tuple[str, ...]


class _Members(NamedTuple):
    """What the source of a module of vLLM's must say."""

    runner: str
    path: str
    texts: tuple[str, ...]


_SIGNATURES = (
    _Signature(_NEWER, _SAMPLER, "Sampler.add_request", ("self", "req_idx", "sampling_params")),
    _Signature(_NEWER, _SAMPLER, "Sampler.apply_staged_writes", ("self",)),
    _Signature(_NEWER, _SAMPLER, "Sampler.get_logprobs_dims", ("self", "idx_mapping_np", "include_token_ids")),
    _Signature(_NEWER, _SAMPLER, "Sampler.__call__", ("self", "logits", "input_batch")),
    _Signature(
        _NEWER, _REJECTION, "RejectionSampler.__call__",
        ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
    ),
    _Signature(
        _NEWER, "vllm/v1/worker/gpu/input_batch.py", "get_num_sampled_and_rejected",
        ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
    ),
    _Signature(
        _NEWER, "vllm/v1/worker/gpu/sample/logprob.py", "compute_topk_scores",
        ("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits", "logprob_token_ids_state",
         "expanded_idx_mapping", "max_per_req_token_ids", "logits_mode"),
    ),
    _Signature(_NEWER, "vllm/v1/worker/gpu/metrics/logits.py", "get_num_nans", ("logits",)),
    _Signature(_NEWER, "vllm/v1/worker/gpu/sample/thinking_budget.py", "ThinkingBudgetState.apply",
               ("self", "logits", "ctx")),
    _Signature(_OLDER, "vllm/v1/sample/sampler.py", "Sampler.sample",
               ("self", "logits", "sampling_metadata", "logprobs_mode_override")),
)  # fmt: skip

_MEMBERS = (
    _Members(_NEWER, "vllm/v1/worker/gpu/model_runner.py", (
        "import Sampler\n", "RejectionSampler,", "self.sampler = Sampler(",
        "self.rejection_sampler = RejectionSampler(",
    )),
    _Members(_NEWER, _SAMPLER, (
        "self.sampling_states = ", "self.logits_processors: list[LogitsProcessor] = [\n            logit_bias_state,\n"
        "            self.penalties_state,\n            bad_words_state,\n            *custom_logits_processors,",
        "self.thinking_budget_state = ", "self.trace_replay_state = ", "self.return_sampling_mask = ",
        "self.num_speculative_tokens = ", "self.logprob_token_ids_state = ", "self.compute_nans = ",
        "self.logprobs_mode = ", "self.req_states = ",
    )),
    _Members(_NEWER, _REJECTION, (
        "self.sampler = ", "self.num_speculative_steps = ", "self.synthetic_conditional_rates",
        "self.enable_adaptive_verification = ",
    )),
    _Members(_NEWER, "vllm/v1/worker/gpu/sample/states.py", ("self.seeds = ", "self.max_num_reqs = ",
                                                             "self.vocab_size = ", "def max_num_logprobs(")),
    _Members(_NEWER, "vllm/v1/worker/gpu/states.py", ("self.all_token_ids = ", "self.total_len = ",
                                                      "self.prompt_len = ", "self.prefill_len = ")),
    _Members(_NEWER, "vllm/v1/worker/gpu/input_batch.py", (
        "expanded_idx_mapping: ", "expanded_local_pos: ", "idx_mapping_np: ", "logits_indices: ", "cu_num_logits_np: ",
        "cu_num_logits: ", "seq_lens_cpu_upper_bound: ", "num_reqs: ",
    )),
    _Members(_NEWER, "vllm/v1/worker/gpu/sample/output.py", ("class SamplerOutput:", "num_nans: ", "num_rejected: ",
                                                             "num_sampled: ", "logprobs_tensors: ")),
    _Members(_NEWER, "vllm/v1/outputs.py", ("class LogprobsTensors(", "selected_token_ranks: ",
                                            "cu_num_generated_tokens_tensor: ")),
    _Members(_NEWER, "vllm/v1/worker/gpu/sample/logits_processor/interface.py", (
        "class LogitsContext:", "expanded_idx_mapping: ", "seq_lens_upper_bound_np: ", "input_ids: ", "pos: ",
    )),
    _Members(_OLDER, "vllm/v1/worker/gpu_model_runner.py", ("import Sampler\n", "self.sampler = Sampler(")),
    _Members(_OLDER, "vllm/v1/sample/sampler.py", ("self.topk_topp_sampler", "argmax_invariant", "def greedy_sample(",
                                                   "def compute_logprobs(")),
    _Members(_OLDER, "vllm/v1/sample/metadata.py", ("temperature: ", "all_greedy: ", "all_random: ", "top_p: ",
                                                    "top_k: ", "generators: ")),
)  # fmt: skip


def sampler_problems(folder: Path, runner: str | None = None) -> Iterator[str]:
    """What the samplers need of vLLM and don't find.

    Args:
        folder: the folder that holds the package ``vllm``.
        runner: of which runner's module; None for both.
    """
    trees: dict[Path, Any] = {}
    for members in _MEMBERS:
        path = folder / members.path
        if runner not in (None, members.runner):
            continue
        source = path.read_text() if path.is_file() else ""
        missing = [text for text in members.texts if text not in source]
        if missing:
            yield f"{members.path} has no {', '.join(map(repr, missing))}"
    for wanted in _SIGNATURES:
        path = folder / wanted.path
        if runner in (None, wanted.runner):
            if path not in trees:
                trees[path] = _functions(path) if path.is_file() else {}
            if trees[path].get(wanted.name) != wanted.arguments:
                yield f"{wanted.path} has no {wanted.name}({', '.join(wanted.arguments)})"


def _functions(path: Path) -> dict[str, tuple[str, ...]]:
    """The arguments of the functions and methods of a module, by name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        inside = [(f"{node.name}.", each) for each in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for prefix, each in inside:
            if isinstance(each, ast.FunctionDef):
                of = each.args
                found[prefix + each.name] = tuple(arg.arg for arg in (*of.posonlyargs, *of.args, *of.kwonlyargs))
    return found


def reason_for_vllm(sampler: Any) -> str | None:
    """Why an engine keeps vLLM's own sampler of the newer runner; None where it doesn't."""
    if sampler.trace_replay_state is not None:
        return "the engine may replay traces (enable_trace_replay)"
    if sampler.return_sampling_mask:
        return "the engine reports which tokens are kept (return_sampling_mask)"
    return None


def shares_batches(config: Any) -> bool:
    """Whether each rank of an engine samples a part of the batch."""
    parallel = getattr(config, "parallel_config", None)
    return bool(getattr(parallel, "enable_batch_sharded_sampling", False))


def number_of_nans(logits: torch.Tensor) -> torch.Tensor:
    """NaN in each row, for vLLM's report."""
    from vllm.v1.worker.gpu.metrics.logits import get_num_nans

    counts: torch.Tensor = get_num_nans(logits)
    return counts


def sampler_output(
    tokens: torch.Tensor, logprobs: Any, nans: Any, counts: torch.Tensor, input_batch: Any, req_states: Any
) -> Any:
    """Make the ``SamplerOutput`` of a step.

    Args:
        tokens: int64 ``[requests, most]``.
        logprobs: vLLM's ``LogprobsTensors`` or None.
        nans: see ``number_of_nans``.
        counts: how many of the tokens each request takes, int32 ``[requests]``; 0 is written for unfinished prompts.
        input_batch: vLLM's.
        req_states: vLLM's.
    """
    from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    taken, rejected = get_num_sampled_and_rejected(
        counts, input_batch.seq_lens, input_batch.cu_num_logits, input_batch.idx_mapping, req_states.prefill_len.gpu
    )
    return SamplerOutput(
        sampled_token_ids=tokens, logprobs_tensors=logprobs, num_nans=nans, num_sampled=taken, num_rejected=rejected
    )


def logprobs_tensors(tokens: torch.Tensor, logprobs: torch.Tensor, ranks: torch.Tensor, bounds: Any) -> Any:
    """Make ``LogprobsTensors``: the token of each row first, then the most likely ones."""
    from vllm.v1.outputs import LogprobsTensors

    on_device = hasattr(bounds, "device")
    return LogprobsTensors(
        tokens, logprobs, ranks,
        cu_num_generated_tokens=None if on_device else bounds,
        cu_num_generated_tokens_tensor=bounds if on_device else None,
    )  # fmt: skip


def scores_by_vllm(
    sampler: Any, logits: torch.Tensor, tokens: torch.Tensor, dims: tuple[int, int], input_batch: Any, bounds: Any
) -> Any:
    """``LogprobsTensors`` as vLLM's own functions make them: of named tokens, of many tokens, or logits themselves."""
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    return compute_topk_scores(
        logits, dims[0], tokens, bounds,
        logprob_token_ids_state=sampler.logprob_token_ids_state,
        expanded_idx_mapping=input_batch.expanded_idx_mapping,
        max_per_req_token_ids=dims[1],
        logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
    )  # fmt: skip


def logits_context(slots: torch.Tensor, places: Places, input_batch: Any) -> Any:
    """Make the ``LogitsContext`` of a step."""
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

    return LogitsContext(
        expanded_idx_mapping=slots,
        idx_mapping=input_batch.idx_mapping,
        idx_mapping_np=input_batch.idx_mapping_np,
        expanded_local_pos=places.local_position,
        input_ids=places.input_ids,
        pos=places.positions,
        seq_lens_upper_bound_np=input_batch.seq_lens_cpu_upper_bound.numpy(),
    )


def drafts_to_verify(slots: torch.Tensor, places: Places, prefill_lengths: torch.Tensor) -> torch.Tensor:
    """The token that each row was fed with, ``[rows]``; -1 where it holds the place of a draft that was never made.

    No drafts are made before a request has sampled a token, though a step within its prompt may have rows for them.
    """
    begins = places.positions - places.local_position
    placeholder = (places.local_position > 0) & (begins < prefill_lengths.index_select(0, slots))
    return places.input_ids.masked_fill(placeholder, -1)
