"""The demo: a two-turn chat without and with the first-step processor, what it does at each step, what it costs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import LogitsProcessor

from fastlogits import LogitsProcessorList, Position, SuppressSpecificBOSTokenLogitsProcessor, TokenMask
from fastlogits.demo.article_loop import ArticleLoop
from fastlogits.demo.corpus import FIRST_REQUEST, NEXT_REQUEST, sample_article
from fastlogits.demo.tiny_model import DIGITS, load_or_train

MAX_NEW_TOKENS = 80
TIMED_CALLS = 100


class Watch(LogitsProcessor):
    """Notes what each call sees. fastlogits doesn't know the class, so it runs as it is, in its place."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.calls: list[tuple[int, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` as they are."""
        position = Position(cache_position=input_ids.shape[1] - 1, prompt_length=self.prompt_length)
        self.calls.append((int(position.step), int(scores.isinf().sum())))
        return scores


def load(model_name: str) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        model_name: path or hub id of a causal language model with a chat template.

    Raises:
        OSError, ValueError: there is none of that name, or it is another kind of model.
    """
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    if tokenizer.chat_template is None:
        raise ValueError("its tokenizer has no chat template")
    return model, tokenizer


def show(loaded: tuple[Any, Any] | None, device: str, requests: Sequence[str] | None = None) -> None:
    """Run the demo on the terminal.

    Args:
        loaded: a model and its tokenizer; None trains tiny ones.
        device: where the model runs.
        requests: what the user says in each turn; None for two articles to summarise.
    """
    console = Console(highlight=False)
    model, tokenizer = load_or_train(console=console) if loaded is None else loaded
    model = model.to(device).eval()

    digits = TokenMask.matching(tokenizer, DIGITS)
    processors = LogitsProcessorList([SuppressSpecificBOSTokenLogitsProcessor(digits)])
    texts = [Text(tokenizer.convert_ids_to_tokens(token_id)) for token_id in list(digits)[:8]]
    console.print(
        f"[bold]{len(digits)}[/bold] of {len(tokenizer)} tokens begin with a digit:", Text(" ").join(texts), "..."
    )
    if requests is None:
        rng = random.Random(1)
        articles = [sample_article(rng, held_out=True).text for _ in range(2)]
        requests = FIRST_REQUEST + articles[0], NEXT_REQUEST + articles[1]
    for name, chosen in (("without the processor", LogitsProcessorList()), ("with the processor", processors)):
        _chat(console, name, model, tokenizer, requests, chosen)
    console.print(Panel(Text(processors.explain()), title="the plan", title_align="left"))
    vocab_size = model.config.get_text_config().vocab_size
    console.print(_times(list(digits.fit(vocab_size)), vocab_size, torch.device(device)))


def _chat(
    console: Console, name: str, model: Any, tokenizer: Any, requests: Sequence[str], processors: LogitsProcessorList
) -> None:
    """Hold one chat. The prompt of a turn is the whole history, so its length doesn't tell the step."""
    console.rule(name)
    history: list[dict[str, str]] = []
    for request in requests:
        history.append({"role": "user", "content": request})
        inputs = tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        prompt_length = inputs["input_ids"].shape[1]
        watch = Watch(prompt_length)
        output = model.generate(
            **inputs,
            logits_processor=LogitsProcessorList([*processors, watch]),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        answer = tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True).strip()
        history.append({"role": "assistant", "content": answer})
        console.print(Text("user   ", "dim"), Text(history[-2]["content"]))
        console.print(Text("model  ", "dim"), Text(answer, "bold"))
        console.print(Text(f"       prompt of {prompt_length} tokens", "dim"))
        tokens = tokenizer.convert_ids_to_tokens(output[0, prompt_length:].tolist())
        steps = [f"{step} bans {banned} -> {token}" for (step, banned), token in zip(watch.calls, tokens, strict=False)]
        console.print(Text(f"       step {'; '.join(steps[:3])}; ... {steps[-1]}", "dim"))


def _times(digits: list[int], vocab_size: int, device: torch.device) -> Table:
    """The loop against fastlogits: one call at the first step, like with like."""
    table = Table(
        title=f"one call at the first step on {device.type}, median of {TIMED_CALLS}, in microseconds",
        caption="The loop writes its input. On a copy, both leave the input as it is, and a copy of all logits takes "
        "most of the time where few tokens are forbidden.",
        caption_justify="left",
    )
    for heading in ("logits", "tokens", "", "the loop", "fastlogits", "loop / fastlogits"):
        table.add_column(heading, justify="right")
    many = torch.randperm(128256)[:1000].tolist()
    for batch, vocab, ids in ((1, vocab_size, digits), (8, 128256, many[:10]), (8, 128256, many)):
        times = _time(batch, vocab, ids, device)
        for way, loop, new in zip(("in place", "on a copy"), times[::2], times[1::2], strict=True):
            table.add_row(
                f"{batch} x {vocab}", str(len(ids)), way, f"{loop:,.0f}", f"{new:,.0f}", f"{loop / new:,.1f} x"
            )
    return table


def _time(batch: int, vocab: int, ids: list[int], device: torch.device) -> list[float]:
    """Median times of the loop and of fastlogits: both in place, then both on a copy."""
    scores = torch.randn(batch, vocab, device=device)
    input_ids = torch.zeros(batch, 4, dtype=torch.int64, device=device)
    loop = ArticleLoop(ids, prompt_length=4)
    fast = LogitsProcessorList([SuppressSpecificBOSTokenLogitsProcessor(ids)]).for_run(prompt_length=4)
    written = scores.clone()
    if not torch.equal(fast(input_ids, scores), loop(input_ids, written)):
        raise RuntimeError(f"fastlogits and the loop differ on logits of {batch} x {vocab} with {len(ids)} tokens")
    return _medians(
        device,
        lambda: loop(input_ids, written),
        lambda: fast.apply_(input_ids, written),
        lambda: loop(input_ids, scores.clone()),
        lambda: fast(input_ids, scores),
    )


def _medians(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    """Median wall time of each call in microseconds, taken in turn."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(TIMED_CALLS):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(times) for times in taken]
