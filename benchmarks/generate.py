"""``generate`` of a Llama-shaped model: whole calls, the decode phase apart, and the share of a step in processing.

    python -m benchmarks.generate --device cuda --compiled --deadline 500    all contenders, in nine minutes
    python -m benchmarks.generate --device cuda             about 1.2B parameters at random, bfloat16, vocabulary 128256
    python -m benchmarks.generate --device cpu --tiny       the same code with a model of nothing

The decode phase is what many new tokens take beyond few, by the number of tokens between; prompt and cache are the
same. Medians; the first call of each contender stands beside, compilers and captures included.

Two runs of a large model give the same tokens only where its own forward pass repeats itself to the last bit, which is
asked and printed: on an H100 it doesn't from 8 rows on. So each way of processing is given the logits of one plain run,
step by step: its scores have to be what transformers made of them, or its time is marked and the exit status is 1.
``fl.decode`` draws from the same distribution by another generator: the tokens that it draws while it processes have to
be those that it draws from processed scores. Its captured step has to have drawn, in all steps, what the same
processors draw from the logits that it returns.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from fastlogits_kernels.runtime.launcher import HAS_TRITON, triton
from transformers import LlamaConfig, LlamaForCausalLM

import fastlogits as fl
from benchmarks.folders import LOCAL
from benchmarks.inputs import device_name
from benchmarks.phases import phases_of
from benchmarks.processors import bad_words
from benchmarks.results import commit, slug

COLUMNS = (
    "timestamp", "commit", "torch", "triton", "transformers", "device", "dtype", "vocab", "prompt", "new_tokens",
    "batch", "contender", "same", "first_call_s", "call_s", "tokens_per_s", "decode_tokens_per_s", "decode_step_us",
    "ratio_to_plain", "ratio_to_static", "processing_wall_us", "processing_gpu_us", "share_gpu", "accepted_per_step",
)  # fmt: skip

BARE, PLAIN, ACCELERATED = "greedy, no processors", "transformers", "fl.accelerate"
STATIC = "transformers, static cache, compiled forward"
STATIC_ACCELERATED = "fl.accelerate, static cache, compiled forward"
BATCHED = "generate_batch"
DECODE, DECODE_COMPILED = "custom_generate=fl.decode", "custom_generate=fl.decode, compile=True"
DECODE_BARE = "custom_generate=fl.decode, greedy, no processors"
REPETITIVE, LOOKED_UP = "fl.decode, text that repeats itself", "fl.decode, the same with prompt_lookup_num_tokens=8"
_SEED = 1234


class Size(NamedTuple):
    """A model and what it is asked to say."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    prompt: int
    new_tokens: int

    def model(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model, with random weights."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, intermediate_size=self.intermediate,
            tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)

    def chain_9(self) -> dict[str, Any]:
        """The nine processors, as arguments of ``generate``; no text ends before its time."""
        return {
            "do_sample": True, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3,
            "bad_words_ids": bad_words(self.vocab), "min_new_tokens": self.new_tokens, "eos_token_id": 2,
            "begin_suppress_tokens": list(range(15, 25)), "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05,
        }  # fmt: skip


LARGE = Size(128256, 2048, 16, 32, 8, 8192, 512, 128)
TINY = Size(512, 32, 2, 4, 2, 64, 16, 6)


class Contender(NamedTuple):
    """A way to generate."""

    name: str
    options: dict[str, Any]
    processes: bool = True
    """Whether it runs the processors."""
    accelerated: bool = False
    compiled: bool = False
    """Whether it waits for a compiler of the forward pass."""


def _contenders(compiled: bool, batch: int) -> list[Contender]:
    """The contenders of a run, the cheapest questions first."""
    static, decode = {"cache_implementation": "static"}, {"custom_generate": fl.decode}
    biased = {"logits_processor": fl.LogitsProcessorList([fl.LogitBiasLogitsProcessor({17: 1e4})]), **decode}
    found = [
        Contender(PLAIN, {}),
        Contender(ACCELERATED, {}, accelerated=True),
        Contender(DECODE, decode),
        Contender(BARE, {}, processes=False),
        Contender(DECODE_BARE, decode, processes=False),
        Contender(STATIC, static, compiled=True),
        Contender(STATIC_ACCELERATED, static, accelerated=True, compiled=True),
        Contender(DECODE_COMPILED, {**decode, "compile": True}, compiled=True),
        Contender(BATCHED, {}, compiled=True),
    ]
    if batch == 1:
        found.append(Contender(REPETITIVE, biased, processes=False))
        found.append(Contender(LOOKED_UP, {**biased, "prompt_lookup_num_tokens": 8}, processes=False))
    return [each for each in found if compiled or not each.compiled]


class Row(NamedTuple):
    """What was measured of one contender."""

    batch: int
    contender: str
    same: bool
    first_s: float
    call_s: float
    tokens_per_s: float
    """Of whole calls."""
    step_us: float
    """Of the decode phase."""
    wall_us: float | None
    gpu_us: float | None
    accepted: float | None
    """Drafts that were accepted in a step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report and return the exit status: 1 where results differ or a part has failed."""
    options = _parse(arguments)
    device = torch.device(options.device)
    size = TINY if options.tiny else LARGE
    if options.new_tokens:
        size = size._replace(new_tokens=options.new_tokens)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    model = size.model(device, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    _say(
        started, f"{count / 1e9:.2f}B parameters on {device_name(device)}, prompt {size.prompt}, {size.new_tokens} new"
    )
    rows, failed = [], False
    for batch in options.batch:
        try:
            for row in _measure(model, size, batch, options, started):
                rows.append(row)
                failed |= not row.same
        except Exception:  # the other sizes are worth their figures
            failed = True
            traceback.print_exc()
            _say(started, f"batch {batch}: FAILED")
        fl.decode.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _print(rows)
    if not options.no_csv and rows:
        print(f"wrote {_append(rows, size, device, dtype, options.out)}")
    return int(failed)


# -- One batch size ------------------------------------------------------------------------------------------------


def _measure(model: Any, size: Size, batch: int, options: argparse.Namespace, started: float) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(batch)
    # Of few tokens, so that the history and its n-grams act.
    ids = torch.randint(3, min(size.vocab, 500), (batch, size.prompt), generator=generator).to(model.device)
    chain = size.chain_9()

    def generate(new_tokens: int = size.new_tokens, **more: Any) -> Any:
        torch.manual_seed(_SEED)
        given = {"max_new_tokens": new_tokens, "attention_mask": torch.ones_like(ids)}
        return model.generate(ids, **{**given, **chain, **more})

    same, same_drawn = _checked(model, size, generate, f"batch {batch}", started)
    for contender in _contenders(options.compiled, batch):
        if contender.name in options.without:
            continue
        if time.perf_counter() - started > options.deadline:
            _say(started, f"batch {batch}, {contender.name}: LEFT OUT, it is late")
            continue
        try:
            row = _row(model, size, ids, generate, contender, batch, options.repeats)
        except Exception:
            if contender.name != BATCHED:  # which takes few processors, and not every model
                raise
            traceback.print_exc()
            continue
        drawn = contender.name in (DECODE, DECODE_COMPILED, DECODE_BARE)
        row = row._replace(same=row.same and (same_drawn if drawn else same))
        _say(started, _line(row))
        yield row


def _checked(model: Any, size: Size, generate: Callable[..., Any], where: str, started: float) -> tuple[bool, bool]:
    """Whether ``accelerate`` and ``decode`` say of the same logits what they have to."""
    kept = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    plain = generate(**kept)
    _say(started, f"{where}: plain generate twice, {_compared(plain.sequences, generate())}")
    with fl.accelerate(model):
        processors, _ = _caught(model, generate)
        fast = generate()
    _say(started, f"{where}: accelerated, {_compared(plain.sequences, fast)}")
    steps = [
        (plain.sequences[:, : size.prompt + i], *step)
        for i, step in enumerate(zip(plain.logits, plain.scores, strict=True))
    ]
    same = all(torch.equal(processors(seen, logits), scores) for seen, logits, scores in steps)
    ways = [_caught(model, generate, custom_generate=fl.decode, **more)[0] for more in ({}, kept)]
    drawn = [[way(seen, logits).argmax(-1) for way in ways] for seen, logits, _ in steps]
    same_drawn = all(torch.equal(*tokens) for tokens in drawn)
    _say(started, f"{where}: on the same logits, accelerated {same}, decode {same_drawn}")
    return same, same_drawn


def _row(
    model: Any, size: Size, ids: torch.Tensor, generate: Callable[..., Any], contender: Contender, batch: int,
    repeats: int,
) -> Row:  # fmt: skip
    """Measure one contender."""
    device = model.device
    options = dict(contender.options)
    if not contender.processes:
        nothing = ["repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "begin_suppress_tokens"]
        nothing += ["min_new_tokens", "eos_token_id"]
        options |= {**dict.fromkeys(nothing), "do_sample": False, "temperature": None, "top_k": None}
        options |= {"top_p": None, "min_p": None}
    few = max(1, size.new_tokens // 8)

    def call(new_tokens: int) -> Any:
        if contender.name == BATCHED:
            config = transformers.GenerationConfig(
                do_sample=True, temperature=0.7, top_k=50, top_p=0.9, eos_token_id=-1, pad_token_id=0
            )
            said = model.generate_batch(ids.tolist(), generation_config=config, max_new_tokens=new_tokens)
            if len(said) != batch:
                raise RuntimeError(f"generate_batch has answered {len(said)} of {batch} prompts")
            return None
        return generate(new_tokens, **options)

    with fl.accelerate(model) if contender.accelerated else _nothing():
        first, said = _timed(lambda: call(size.new_tokens), device)
        whole, short = [], []
        for _ in range(repeats):
            whole.append(_timed(lambda: call(size.new_tokens), device)[0])
            short.append(_timed(lambda: call(few), device)[0])
        wall, gpu = None, None
        if contender.processes and not contender.compiled:
            try:
                wall, gpu = _processing(model, generate, contender.name, size)
            except Exception:
                traceback.print_exc()
    same, accepted = True, None
    if contender.name in (DECODE, DECODE_COMPILED, DECODE_BARE):
        same = _captured_right(model, size, generate, options)
    if contender.name == LOOKED_UP:
        more = generate(size.new_tokens, return_dict_in_generate=True, **options)
        accepted = statistics.mean(more.accepted_drafts)
        same = torch.equal(generate(size.new_tokens, **{**options, "prompt_lookup_num_tokens": None}), said)
    seconds = statistics.median(whole)
    step = (seconds - statistics.median(short)) / (size.new_tokens - few)
    tokens = batch * size.new_tokens / seconds
    return Row(batch, contender.name, same, first, seconds, tokens, step * 1e6, wall, gpu, accepted)


def _captured_right(model: Any, size: Size, generate: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether each token of a captured run is what its processors draw from the logits of its step, uncaptured."""
    kept = {"output_logits": True, "return_dict_in_generate": True}
    said = generate(**options, **kept)
    draw, _ = _caught(model, generate, **{name: value for name, value in options.items() if name != "compile"})
    return all(
        torch.equal(draw(said.sequences[:, : size.prompt + i], logits).argmax(-1), said.sequences[:, size.prompt + i])
        for i, logits in enumerate(said.logits)
    )


def _caught(model: Any, generate: Callable[..., Any], **options: Any) -> tuple[Any, torch.Tensor]:
    """What ``generate`` hands to the model's loop: the processors, and the prompt."""
    caught: list[Any] = []

    def catch(model: Any, input_ids: torch.Tensor, logits_processor: Any, **rest: Any) -> torch.Tensor:
        caught.extend((logits_processor, input_ids))
        return input_ids

    type(model)._sample = catch
    try:
        generate(**options)
    finally:
        del type(model)._sample
    return caught[0], caught[1]


def _compared(ids: torch.Tensor, others: torch.Tensor) -> str:
    """Whether two runs have said the same, and from where on not."""
    if torch.equal(ids, others):
        return "same tokens"
    shared = min(ids.shape[1], others.shape[1])
    apart = (ids[:, :shared] != others[:, :shared]).any(0).nonzero()
    return f"OTHER TOKENS from place {int(apart[0]) if len(apart) else shared} on"


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
    _wait(device)
    start = time.perf_counter()
    out = call()
    _wait(device)
    return time.perf_counter() - start, out


def _processing(
    model: Any, generate: Callable[..., torch.Tensor], contender: str, size: Size
) -> tuple[float, float | None]:
    """Microseconds from logits to a token, as ``generate`` does it half-way: of the wall clock, and of the GPU.

    The processors are those that ``generate`` has assembled, on logits of the model's shape. The wall clock is that of
    the host, which lets the GPU run behind where nothing waits for it; the GPU's is the sum of its kernels' times.
    """
    device = model.device
    more = {"custom_generate": fl.decode} if contender == DECODE else {}
    processors, prompt = _caught(model, generate, **more)
    generator = torch.Generator(device).manual_seed(0)
    new = torch.randint(
        3, min(size.vocab, 500), (len(prompt), size.new_tokens // 2), generator=generator, device=device
    )
    ids = torch.cat((prompt, new), 1)
    logits = torch.randn(len(prompt), size.vocab, generator=generator, device=device)

    def step() -> torch.Tensor:
        scores = processors(ids, logits)
        if contender == DECODE:
            return scores.argmax(-1)  # type: ignore[no-any-return]
        return torch.multinomial(scores.softmax(-1), 1)

    for _ in range(3):
        step()
    calls = 3 if device.type == "cpu" else 30
    walls = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        walls.append((time.perf_counter() - start) / calls * 1e6)
        _wait(device)
    return statistics.median(walls), _gpu_us(step) if device.type == "cuda" else None


def _gpu_us(step: Callable[[], torch.Tensor]) -> float | None:
    """Microseconds of a call's kernels and copies on the GPU; None where the profiler isn't allowed to look."""
    return sum(phase.us for phase in phases_of(step, 5)) or None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- What is said --------------------------------------------------------------------------------------------------


def _say(started: float, text: str) -> None:
    print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)


def _line(row: Row) -> str:
    known = f", processing {row.wall_us:.0f} us of the host" if row.wall_us is not None else ""
    known += f" and {row.gpu_us:.0f} us of the GPU" if row.gpu_us is not None else ""
    known += f", {row.accepted:.1f} drafts accepted a step" if row.accepted is not None else ""
    return (
        f"batch {row.batch}, {row.contender}: first call {row.first_s:.1f} s, then {row.call_s:.2f} s "
        f"({row.tokens_per_s:.0f} tokens/s), decode phase {row.step_us:.0f} us a step{known}"
    )


def _ratio(rows: Sequence[Row], row: Row, to: str) -> float | None:
    """How many times as fast as another contender its decode phase is."""
    for other in rows:
        if (other.batch, other.contender) == (row.batch, to):
            return other.step_us / row.step_us
    return None


def _share(row: Row) -> float | None:
    return None if row.gpu_us is None else row.gpu_us / row.step_us


def _print(rows: Sequence[Row]) -> None:
    head = ("batch", "contender", "first s", "call s", "tokens/s", "step us", "x plain", "x static", "GPU us", "GPU %")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        share = _share(row)
        lines.append((
            str(row.batch), row.contender + ("" if row.same else " (OTHER RESULTS)"), f"{row.first_s:.2f}",
            f"{row.call_s:.3f}", f"{row.tokens_per_s:.0f}", f"{row.step_us:.0f}", _number(_ratio(rows, row, PLAIN), 2),
            _number(_ratio(rows, row, STATIC), 2), _number(row.gpu_us, 0), _number(share and share * 100, 1),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _append(rows: Sequence[Row], size: Size, device: torch.device, dtype: torch.dtype, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(device_name(device))}-phases.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        run = (
            now, commit(), torch.__version__, triton.__version__ if HAS_TRITON else "", transformers.__version__,
            device_name(device), str(dtype).removeprefix("torch."), size.vocab, size.prompt, size.new_tokens,
        )  # fmt: skip
        for row in rows:
            writer.writerow((
                *run, row.batch, row.contender, row.same, f"{row.first_s:.4f}", f"{row.call_s:.4f}",
                f"{row.tokens_per_s:.1f}", f"{row.batch / row.step_us * 1e6:.1f}", f"{row.step_us:.1f}",
                _number(_ratio(rows, row, PLAIN), 3), _number(_ratio(rows, row, STATIC), 3), _number(row.wall_us, 1),
                _number(row.gpu_us, 1), _number(_share(row), 4), _number(row.accepted, 2),
            ))  # fmt: skip
    return path


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--new-tokens", type=int, help="tokens to generate; default: 128, of a tiny model 6")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; default: %(default)s")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing more is begun")
    parser.add_argument("--without", nargs="+", default=(), metavar="NAME", help="contenders that are left out")
    parser.add_argument("--compiled", action="store_true", help="what compiles the forward pass besides")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to see that it runs")
    parser.add_argument("--out", type=Path, default=LOCAL / "generate", help="of the CSV file")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
