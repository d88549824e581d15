"""Whole ``generate`` calls of a Llama-shaped model: tokens per second, and the share of a step spent in processing.

    python -m benchmarks.generate --device cuda             about 1.2B parameters at random, bfloat16, vocabulary 128256
    python -m benchmarks.generate --device cuda --compiled  with a static cache and a compiled forward too
    python -m benchmarks.generate --device cpu --tiny       the same code with a tiny model

Two runs of a large model give the same tokens only if its forward pass gives the same bits twice; that is tested and
printed. So each way of processing gets the logits of one plain run, step by step. Its scores must be those of
transformers, or its time is marked and the exit status is 1. ``fl.decode`` samples the same distribution with another
generator: it must sample the same tokens from the logits as from processed scores.
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
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from fastlogits_kernels.runtime.launcher import HAS_TRITON, triton
from transformers import LlamaConfig, LlamaForCausalLM

import fastlogits as fl
from benchmarks.inputs import device_name
from benchmarks.processors import bad_words
from benchmarks.results import commit, slug

COLUMNS = (
    "timestamp", "commit", "torch", "triton", "transformers", "device", "dtype", "vocab", "prompt", "new_tokens",
    "batch", "forward", "contender", "same", "tokens_per_s", "ratio_to_plain", "step_us", "processing_wall_us",
    "processing_gpu_us", "share_wall", "share_gpu",
)  # fmt: skip

BARE, PLAIN, ACCELERATED, DECODE = "greedy, no processors", "transformers", "fl.accelerate", "custom_generate=fl.decode"
_SEED = 1234


class Size(NamedTuple):
    """A model, and the lengths of its prompt and output."""

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
        """The nine processors, as arguments of ``generate``."""
        return {
            "do_sample": True, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3,
            "bad_words_ids": bad_words(self.vocab), "min_new_tokens": min(8, self.new_tokens),
            "begin_suppress_tokens": list(range(15, 25)), "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05,
        }  # fmt: skip


LARGE = Size(128256, 2048, 16, 32, 8, 8192, 512, 128)
TINY = Size(512, 32, 2, 4, 2, 64, 16, 6)


class Row(NamedTuple):
    """The measurements of one way of processing."""

    batch: int
    forward: str
    contender: str
    same: bool
    tokens_per_s: float
    step_us: float
    wall_us: float | None
    gpu_us: float | None


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
    for forward in ["eager", *(["compiled"] if options.compiled else [])]:
        for batch in options.batch:
            try:
                for row in _measure(model, size, batch, forward, options.repeats, started):
                    rows.append(row)
                    failed |= not row.same
            except Exception:  # the other sizes are still to be measured
                failed = True
                traceback.print_exc()
                _say(started, f"batch {batch}, {forward}: FAILED")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    _print(rows)
    if not options.no_csv and rows:
        print(f"wrote {_append(rows, size, device, dtype, options.out)}")
    return int(failed)


# -- One batch size ------------------------------------------------------------------------------------------------


def _measure(model: Any, size: Size, batch: int, forward: str, repeats: int, started: float) -> Iterator[Row]:
    job = _Job(model, size, batch, forward, lambda text: _say(started, f"batch {batch}, {forward}: {text}"))
    same, same_sampled = job.compared()
    job.bare()
    for contender, call, is_same in (
        (BARE, job.bare, True),
        (PLAIN, job.generate, True),
        (ACCELERATED, job.generate, same),
        (DECODE, job.decode, same_sampled),
    ):
        with fl.accelerate(model) if contender == ACCELERATED else nullcontext():
            step = statistics.median(job.step_seconds(call) for _ in range(repeats))
            wall, gpu = (None, None) if contender == BARE else job.processing(contender)
        row = Row(batch, forward, contender, is_same, batch / step, step * 1e6, wall, gpu)
        _say(started, _line(row))
        yield row


class _Same(NamedTuple):
    """Whether ways of processing give what transformers gives on the same logits."""

    accelerated: bool
    decode: bool


class _Job:
    """What all ways of processing do for one batch size."""

    def __init__(self, model: Any, size: Size, batch: int, forward: str, say: Callable[[str], None]) -> None:
        self._model, self._size, self._say = model, size, say
        generator = torch.Generator().manual_seed(batch)
        # Of few tokens, so that the history and its n-grams act.
        ids = torch.randint(3, min(size.vocab, 500), (batch, size.prompt), generator=generator)
        self._ids = ids.to(model.device)
        self._given: dict[str, Any] = {
            "attention_mask": torch.ones_like(self._ids), "max_new_tokens": size.new_tokens,
            "cache_implementation": "static" if forward == "compiled" else None,
        }  # fmt: skip

    def generate(self, **more: Any) -> Any:
        torch.manual_seed(_SEED)
        return self._model.generate(self._ids, **self._given, **self._size.chain_9(), **more)

    def decode(self, **more: Any) -> Any:
        return self.generate(custom_generate=fl.decode, **more)

    def bare(self) -> torch.Tensor:
        return self._model.generate(self._ids, **self._given, do_sample=False, eos_token_id=None)  # type: ignore[no-any-return]

    def compared(self) -> _Same:
        kept = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        plain = self.generate(**kept)
        self._say(f"plain generate twice, {_compared(plain.sequences, self.generate())}")
        with fl.accelerate(self._model):
            processors, _ = _caught(self._model, self.generate)
            fast = self.generate()
        self._say(f"accelerated, {_compared(plain.sequences, fast)}")
        steps = [
            (plain.sequences[:, : self._size.prompt + i], *step)
            for i, step in enumerate(zip(plain.logits, plain.scores, strict=True))
        ]
        same = all(torch.equal(processors(seen, logits), scores) for seen, logits, scores in steps)
        self.decode()  # the first run compiles
        to_tokens, to_scores = (_caught(self._model, self.decode, **more)[0] for more in ({}, kept))
        same_sampled = all(
            torch.equal(to_tokens(seen, logits).argmax(-1), to_scores(seen, logits).argmax(-1))
            for seen, logits, _ in steps
        )
        self._say(f"on the same logits, accelerated {same}, decode {same_sampled}")
        return _Same(same, same_sampled)

    def step_seconds(self, call: Callable[[], torch.Tensor]) -> float:
        seconds, out = _timed(call, self._model.device)
        return seconds / (out.shape[1] - self._size.prompt)

    def processing(self, contender: str) -> tuple[float | None, float | None]:
        """Microseconds of a step's processing, of the wall clock and of the GPU; None where they can't be taken."""
        try:
            return _processing(self._model, self.generate, contender, self._size)
        except Exception:  # the rest of the row is worth having
            traceback.print_exc()
            return None, None


def _caught(model: Any, generate: Callable[..., Any], **options: Any) -> tuple[Any, torch.Tensor]:
    """What ``generate`` gives the model's loop: the processors, and the prompt."""
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
    """Whether two runs gave the same tokens, and where they begin to differ."""
    if torch.equal(ids, others):
        return "same tokens"
    shared = min(ids.shape[1], others.shape[1])
    apart = (ids[:, :shared] != others[:, :shared]).any(0).nonzero()
    return f"OTHER TOKENS from place {int(apart[0]) if len(apart) else shared} on"


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


def _gpu_us(step: Callable[[], torch.Tensor], calls: int = 5) -> float | None:
    """Microseconds of a call's kernels and copies on the GPU, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first recording starts the profiler, which loses events
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                step()
            torch.cuda.synchronize()
    total: float = sum(event.self_device_time_total for event in profile.key_averages())
    return total / calls or None  # a profiler that isn't allowed to look says nothing


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- What is said --------------------------------------------------------------------------------------------------


def _say(started: float, text: str) -> None:
    print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)


def _line(row: Row) -> str:
    known = f", processing {row.wall_us:.0f} us of the host" if row.wall_us is not None else ""
    known += f" and {row.gpu_us:.0f} us of the GPU" if row.gpu_us is not None else ""
    return f"batch {row.batch}, {row.forward}, {row.contender}: {row.tokens_per_s:.0f} tokens/s{known}"


def _ratio(rows: Sequence[Row], row: Row) -> float | None:
    for other in rows:
        if (other.batch, other.forward, other.contender) == (row.batch, row.forward, PLAIN):
            return row.tokens_per_s / other.tokens_per_s
    return None


def _share(row: Row, us: float | None) -> float | None:
    return None if us is None else us / row.step_us


def _print(rows: Sequence[Row]) -> None:
    head = ("batch", "forward", "contender", "tokens/s", "x plain", "step us", "host us", "GPU us", "host %", "GPU %")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        shares = [_share(row, us) for us in (row.wall_us, row.gpu_us)]
        lines.append((
            str(row.batch), row.forward, row.contender + ("" if row.same else " (OTHER RESULTS)"),
            f"{row.tokens_per_s:.0f}", _number(_ratio(rows, row), 2), f"{row.step_us:.0f}", _number(row.wall_us, 0),
            _number(row.gpu_us, 0), *(_number(share and share * 100, 1) for share in shares),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _append(rows: Sequence[Row], size: Size, device: torch.device, dtype: torch.dtype, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(device_name(device))}.csv"
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
                *run, row.batch, row.forward, row.contender, row.same, f"{row.tokens_per_s:.1f}",
                _number(_ratio(rows, row), 3), f"{row.step_us:.1f}", _number(row.wall_us, 1), _number(row.gpu_us, 1),
                _number(_share(row, row.wall_us), 4), _number(_share(row, row.gpu_us), 4),
            ))  # fmt: skip
    return path


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--new-tokens", type=int, help="tokens to generate; default: 128, of a tiny model 6")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each; default: %(default)s")
    parser.add_argument("--compiled", action="store_true", help="a static cache and a compiled forward besides")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "generate", help="of the CSV file"
    )
    parser.add_argument("--no-csv", action="store_true", help="print only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
