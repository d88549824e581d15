"""Whether the hooks into transformers and vLLM still hold: each is tried, in transformers with a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from fastlogits.integrations import vllm_hooks
from fastlogits.plan.stages import Rows
from fastlogits.processors.base import LogitsProcessorList, StagedProcessor
from fastlogits.processors.masks import SuppressFirstTokens
from fastlogits.transformers import hooks, loop
from fastlogits.transformers.accelerate import RunList, accelerate
from fastlogits.transformers.attention import grouped
from fastlogits.transformers.decode import decode
from fastlogits.transformers.graphs import GRAPHS
from fastlogits.transformers.hooks import Hook

_V = 32
_PROMPT = torch.tensor([[5, 7, 9, 5, 7, 9, 5, 7]])


class Tried(NamedTuple):
    """What came of trying a hook."""

    hook: Hook
    problem: str | None
    """Why it doesn't hold; None where it does."""


def tried_hooks() -> Iterator[Tried]:
    """Try all hooks into the transformers that is installed, on the CPU, in a second or so."""
    with torch.random.fork_rng(devices=[]):
        model = _tiny_model()
        for hook, test in _TESTS.items():
            try:
                problem = test(model)
            except Exception as error:  # whatever a changed inside raises
                problem = f"{type(error).__name__}: {error}"
            yield Tried(hook, problem)


def transformers_is_seen() -> bool:
    """Whether the hooks have been seen to hold in the transformers that is installed."""
    return transformers.__version__ in hooks.SEEN


def vllm_problems() -> list[str] | None:
    """What no longer stands in the vLLM that is installed; None where none is."""
    folder = vllm_hooks.installed()
    return None if folder is None else list(vllm_hooks.problems(folder))


def vllm_sampler_problems() -> list[str] | None:
    """What the samplers need of the vLLM that is installed and don't find; None where none is."""
    folder = vllm_hooks.installed()
    return None if folder is None else list(vllm_hooks.sampler_problems(folder))


def _tiny_model(**sizes: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, **sizes}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=_V, **sizes, **tokens)).eval()


def _generated(model: Any, **arguments: Any) -> list[int]:
    """The tokens that ``generate`` makes, greedily where the arguments don't say otherwise."""
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **arguments}
    found: list[int] = model.generate(_PROMPT, attention_mask=torch.ones_like(_PROMPT), **asked)[0].tolist()
    return found[_PROMPT.shape[1] :]


def _try_run_start(model: Any) -> str | None:
    allowed = 11
    first = LogitsProcessorList([SuppressFirstTokens([token for token in range(_V) if token != allowed])])
    found = _generated(model, logits_processor=first)
    return None if found[0] == allowed else f"the first token is {found[0]}, though all but {allowed} are forbidden"


def _try_assembled(model: Any) -> str | None:
    given: list[type] = []

    def probe(model: Any, input_ids: Any, logits_processor: Any, *others: Any, **kwargs: Any) -> Any:
        given.append(type(logits_processor))
        return input_ids

    with accelerate(model):
        _generated(model, custom_generate=probe, repetition_penalty=2.0)
    return None if given == [RunList] else "generate assembles a list that accelerate doesn't see"


class _RowsSeen(StagedProcessor):
    """Notes how many rows each call has."""

    def __init__(self) -> None:
        self._rows: list[int] = []

    def stage(self) -> Rows:
        return Rows("opaque", self._note, "notes the number of rows", reads_history=False)

    def _note(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._rows.append(scores.shape[0])
        return scores


def _try_drafts(model: Any) -> str | None:
    seen = _RowsSeen()
    with accelerate(model):
        _generated(model, logits_processor=LogitsProcessorList([seen]), prompt_lookup_num_tokens=2)
    return None if max(seen._rows) > 1 else "candidates are verified one by one"


def _try_continuous(model: Any) -> str | None:
    if not hasattr(model, "init_continuous_batching"):
        return "this transformers has no init_continuous_batching"
    from fastlogits.transformers.continuous import RequestProcessors  # which needs what continuous batching needs

    model = _tiny_model()  # whose attention becomes another one
    with accelerate(model):
        manager = model.init_continuous_batching(GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=1))
    if isinstance(manager.logit_processor, RequestProcessors):
        return None
    return f"its manager keeps a {type(manager.logit_processor).__name__}"


class _Tokens(BaseStreamer):  # type: ignore[misc]
    """Keeps the tokens that a streamer gets, the prompt first."""

    def __init__(self) -> None:
        self.got: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        """Nothing is left to do."""


def _try_decode(model: Any) -> str | None:
    drawn = {"custom_generate": decode, "do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12}
    streamer = _Tokens()
    first = _generated(model, seeds=1, streamer=streamer, **drawn)
    if streamer.got[-len(first) :] != first:
        return "a streamer doesn't get the tokens"
    if _generated(model, seeds=1, **drawn) != first:
        return "the same seed draws other tokens"
    return "other seeds draw the same tokens" if _generated(model, seeds=2, **drawn) == first else None


def _try_loop(model: Any) -> str | None:
    """In versions that lack what it takes, the ordinary loop is taken, and there is nothing to try."""
    asked = {"custom_generate": decode, "do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12, "seeds": 1}
    asked |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(_PROMPT)}
    before = loop.FORCE
    try:
        loop.FORCE = False
        wanted = model.generate(_PROMPT, **asked)
        loop.FORCE = True
        found = model.generate(_PROMPT, **asked)
    finally:
        loop.FORCE = before
        GRAPHS.drop(model)
    if not torch.equal(found.sequences, wanted.sequences):
        return "its step draws other tokens than transformers' own loop"
    close = all(torch.allclose(*pair, atol=1e-5) for pair in zip(found.logits, wanted.logits, strict=True))
    return None if close else "its step makes other logits than transformers' own loop"


class _KeyHeads(TorchFunctionMode):
    """Notes how many heads the keys have that torch's attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def _try_attention(model: Any) -> str | None:
    model = _tiny_model(num_attention_heads=2, num_key_value_heads=1)
    mask = torch.ones_like(_PROMPT)
    mask[:, :2] = 0  # so that attention needs a mask
    with torch.no_grad(), grouped(), _KeyHeads() as heads:
        model(_PROMPT, attention_mask=mask)
    return None if heads.seen == {1} else "keys and values are still repeated for each head"


def _try_tokenizer(model: Any) -> str | None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # transformers finds what a token adds to a text by putting it behind these letters.
    texts = ["abcdef", *(str(token) for token in range(1, _V))]
    words = Tokenizer(models.WordLevel({text: token for token, text in enumerate(texts)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1")
    _generated(model, custom_generate=decode, stop_strings=["7"], tokenizer=tokenizer)
    return None


_TESTS: dict[Hook, Callable[[Any], str | None]] = {
    hooks.RUN_START: _try_run_start,
    hooks.ASSEMBLED: _try_assembled,
    hooks.DRAFTS: _try_drafts,
    hooks.CONTINUOUS: _try_continuous,
    hooks.DECODE: _try_decode,
    hooks.LOOP: _try_loop,
    hooks.ATTENTION: _try_attention,
    hooks.TOKENIZER: _try_tokenizer,
}
