"""vLLM's newer sampler against ours, through its own interface: ``python -m benchmarks.engines``, where vLLM is.

Both are called as vLLM's runner calls them, with the same requests, tokens and logits. What they keep of each row is
compared first, and stands beside the times: of tied tokens at the cut-off of top-k, vLLM's kernel keeps some.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.folders import LOCAL
from benchmarks.inputs import device_name
from benchmarks.results import environment, slug, write_rows
from benchmarks.timing import Bunch, Call, NotCapturableError, ReplayBunch, WallBunch, interleaved
from fastlogits.integrations.vllm_sampler import newer_rejection_sampler, newer_sampler
from fastlogits.integrations.vllm_step import Places, Rows

TEXT = 1024
"""Tokens of each request, half of them its prompt."""

SIZES = ((64, 128256), (256, 151936))
KINDS = ("plain", "temperature", "penalties", "everything", "mixed", "logprobs", "greedy")
"""What the requests of a batch ask for; ``mixed`` is a quarter of each of the first four."""

_GPU = "vllm.v1.worker.gpu"
_COLD_BYTES = 120e6  # inputs that outgrow the L2 together


def missing() -> str | None:
    """Why vLLM's sampler can't be measured here; None where it can."""
    try:
        import_module(f"{_GPU}.sample.sampler")
    except Exception as error:
        return f"vLLM's newer sampler can't be imported ({type(error).__name__}: {error}): install vllm on a GPU"
    return None


def asked(kind: str, number: int, vocab: int) -> dict[str, Any]:
    """The sampling parameters of one request of a batch."""
    made = random.Random(f"{kind} {number}")
    common = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": number, "max_tokens": None, "detokenize": False}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    if kind == "mixed":
        return asked(("plain", "temperature", "penalties", "everything")[number % 4], number, vocab)
    if kind == "temperature":
        return common | {"temperature": 1.0 if number % 2 else 0.8, "top_k": 0, "top_p": 1.0}
    if kind == "greedy":
        return common | {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.2}
    if kind == "penalties":
        return common | penalties
    if kind == "logprobs":
        return common | {"logprobs": 5}
    if kind != "everything":
        return common
    words = [[made.randrange(vocab) for _ in range(1 + n // 10)] for n in range(20)]
    everything = common | penalties | {
        "min_p": 0.02,
        "logit_bias": {made.randrange(vocab): made.uniform(-5, 5) for _ in range(20)},
        "_bad_words_token_ids": words,
        "min_tokens": 4 * TEXT,
        "stop_token_ids": [made.randrange(vocab) for _ in range(4)],
    }  # fmt: skip
    if number % 8 == 0:
        everything |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if number % 8 == 1:
        everything |= {"allowed_token_ids": sorted(made.sample(range(vocab), min(200, vocab // 2)))}
    return everything


class Engine:
    """A sampler with the requests of a batch, and the step that it is called with.

    Args:
        ours: whether it is ours; else vLLM's.
        kind: see ``KINDS``.
        batch: requests.
        vocab: tokens of the vocabulary.
        dtype: of the logits.
        device: where they are.
        drafts: draft tokens of each request.
        mode: vLLM's ``logprobs_mode``.
    """

    def __init__(
        self, ours: bool, kind: str, batch: int, vocab: int, dtype: torch.dtype, device: torch.device, drafts: int = 0,
        mode: str = "raw_logprobs",
    ) -> None:  # fmt: skip
        self.drafts, self.rows = drafts, batch * (1 + drafts)
        self.states = import_module(f"{_GPU}.states").RequestState(
            batch, 2 * TEXT + 64, self.rows, drafts, vocab, device, use_dense_all_token_ids=True
        )
        kind_of = import_module(f"{_GPU}.sample.sampler").Sampler
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_logprobs=20, dtype=dtype), reasoning_config=None, parallel_config=None
        )
        self.sampler: Any = (newer_sampler(kind_of) if ours else kind_of)(
            vllm_config=config, max_num_reqs=batch, vocab_size=vocab, device=device, req_states=self.states,
            logprobs_mode=mode, num_speculative_tokens=1 + drafts,
        )  # fmt: skip
        self.is_ours = ours
        texts = np.random.default_rng(0).integers(0, max(1, vocab // 4), (batch, TEXT)).tolist()
        self.add_us = self._add(kind, texts, vocab)
        self.batch = self._step(texts, vocab, device)
        if drafts:
            spec = SimpleNamespace(
                num_speculative_tokens=drafts, enable_adaptive_verification=False, rejection_sample_method="standard"
            )
            theirs = import_module(f"{_GPU}.spec_decode.rejection_sampler").RejectionSampler
            self.verify: Any = (newer_rejection_sampler(theirs) if ours else theirs)(self.sampler, spec, device)

    def _add(self, kind: str, texts: list[list[int]], vocab: int) -> float:
        """Add the requests, and return the host's microseconds for the parameters of one."""
        params = import_module("vllm.sampling_params").SamplingParams
        made = [params(**asked(kind, number, vocab)) for number in range(len(texts))]
        for number, text in enumerate(texts):
            self.states.add_request(f"{number}", TEXT // 2, text, TEXT - 1, TEXT)
        self.slots = [self.states.req_id_to_index[f"{number}"] for number in range(len(texts))]
        start = time.perf_counter()
        for slot, each in zip(self.slots, made, strict=True):
            self.sampler.add_request(slot, each)
        spent = time.perf_counter() - start
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        # What was given as the text so far has been generated since.
        self.states.prefill_len.np[:] = TEXT // 2
        self.states.prefill_len.copy_to_uva()
        return spent / len(texts) * 1e6

    def _step(self, texts: list[list[int]], vocab: int, device: torch.device) -> Any:
        inputs, each = import_module(f"{_GPU}.input_batch"), 1 + self.drafts
        made = inputs.InputBatch.make_dummy(len(texts), self.rows, inputs.InputBuffers(len(texts), self.rows, device))
        made.idx_mapping_np = np.array(self.slots, dtype=np.intp)
        made.idx_mapping = torch.tensor(self.slots, device=device)
        made.expanded_idx_mapping = made.idx_mapping.repeat_interleave(each)
        made.expanded_local_pos = torch.arange(each, dtype=torch.int32, device=device).repeat(len(texts))
        fed = np.random.default_rng(1).integers(0, max(1, vocab // 4), (len(texts), each))
        fed[:, 0] = [text[-1] for text in texts]
        made.input_ids.copy_(torch.from_numpy(fed.flatten()))
        made.positions.copy_(TEXT - 1 + made.expanded_local_pos)
        made.logits_indices = torch.arange(self.rows, device=device)
        made.cu_num_logits = torch.arange(0, self.rows + 1, each, dtype=torch.int32, device=device)
        made.cu_num_logits_np = np.arange(0, self.rows + 1, each, dtype=np.int32)
        made.seq_lens.fill_(TEXT - 1 + each)
        made.seq_lens_cpu_upper_bound.fill_(TEXT - 1 + each)
        made.num_draft_tokens = self.rows - len(texts)
        return made

    def __call__(self, logits: torch.Tensor) -> Any:
        """One step, as vLLM's runner makes it."""
        return self.verify(logits, self.batch) if self.drafts else self.sampler(logits, self.batch)

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that are drawn from, float32, -inf where a token is dropped."""
        step = self.batch
        if self.is_ours:
            rows = Rows(step.expanded_idx_mapping, Places(step.positions, step.input_ids, step.expanded_local_pos))
            return self.sampler._step.process(logits, rows, None)  # type: ignore[no-any-return]
        return self.sampler.apply_sampling_params(  # type: ignore[no-any-return]
            logits.float(), step.expanded_idx_mapping, step.idx_mapping, step.idx_mapping_np, step.positions,
            step.input_ids, step.expanded_local_pos, step.seq_lens_cpu_upper_bound.numpy(),
        )  # fmt: skip

    @property
    def greedy(self) -> torch.Tensor:
        """Which rows are greedy."""
        temperatures = self.sampler.sampling_states.temperature.np[self.batch.idx_mapping_np]
        return torch.from_numpy(temperatures == 0).repeat_interleave(1 + self.drafts)


class Agreement(NamedTuple):
    """How far two samplers agree."""

    rows: int
    """All rows of logits; with drafts a request has several."""
    same_sets: int
    """Rows that keep the same tokens; of a greedy one its token is asked for instead."""
    kept_theirs: float
    kept_ours: float
    """Tokens that a row keeps on average; NaN where all are greedy."""
    difference: float
    """The largest between logits that both keep."""
    inside: bool
    """Whether our tokens are among those that we keep."""
    logprobs: float | None
    """The largest difference between the reported likeliest ones; None where none are reported."""


def compare(theirs: Engine, ours: Engine, logits: torch.Tensor) -> Agreement:
    """One step of both."""
    a, b = theirs(logits), ours(logits)
    greedy = theirs.greedy.to(logits.device)
    x, y = theirs.processed(logits), ours.processed(logits)
    kept, mine = x > float("-inf"), y > float("-inf")
    same = torch.where(greedy, x.argmax(1) == y.argmax(1), (kept == mine).all(1))
    reported = None
    if a.logprobs_tensors is not None:
        reported = float((a.logprobs_tensors.logprobs[:, 1:] - b.logprobs_tensors.logprobs[:, 1:]).abs().max())
    kept_theirs, kept_ours = (float(each[~greedy].sum(1).float().mean()) for each in (kept, mine))
    first = mine[:: 1 + ours.drafts]  # the row that the first token of each request is drawn from
    return Agreement(
        len(logits), int(same.sum()), kept_theirs, kept_ours,
        float((x - y)[kept & mine].abs().max()) if bool((~greedy).any()) else 0.0,
        bool(first.gather(1, b.sampled_token_ids[:, :1]).all()),
        reported,
    )  # fmt: skip


def _tokens(engine: Engine, logits: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = engine(logits).sampled_token_ids
    return tokens


def timed(engines: dict[str, Engine], logits: torch.Tensor, budget_s: float = 0.6) -> dict[str, Any]:
    """Microseconds of a step, of the GPU and of the host, and whose steps no graph can hold."""
    device = logits.device
    cold = [logits, *[logits.clone() for _ in range(int(_COLD_BYTES // logits.nbytes))]]
    bunches: dict[str, Bunch] = {}
    host: dict[str, Bunch] = {}
    eager: list[str] = []
    for name, engine in engines.items():
        calls: list[Call] = [partial(_tokens, engine, each) for each in cold]
        try:
            bunches[name] = ReplayBunch(calls)
        except NotCapturableError:
            eager.append(name)
            bunches[name] = WallBunch(calls[0], device, wait=True)
        host[name] = WallBunch(calls[0], device)
    out = torch.empty_like(logits)
    bunches["copy"] = ReplayBunch([partial(out.copy_, each) for each in cold])
    bunches["amax"] = ReplayBunch([partial(torch.amax, each, -1) for each in cold])
    on_gpu = {f"{name}_us": round(timing.median, 1) for name, timing in interleaved(bunches, budget_s).items()}
    on_host = {f"{name}_host_us": round(timing.median, 1) for name, timing in interleaved(host, budget_s / 2).items()}
    return on_gpu | on_host | {"not_captured": " ".join(eager)}


class Batch(NamedTuple):
    """What is measured: see ``Engine``."""

    kind: str
    requests: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    drafts: int = 0


BATCHES = (
    *(Batch(kind, *size) for size in SIZES for kind in KINDS),
    *(Batch(kind, *size, torch.float32) for size in SIZES for kind in ("plain", "mixed")),
    Batch("mixed", *SIZES[0], drafts=3),
)
"""What the command line measures."""


def measured(device: torch.device, batches: Sequence[Batch] = BATCHES) -> Iterator[dict[str, Any]]:
    """For each batch: how far the samplers agree, and on a GPU the microseconds of a step."""
    for batch in batches:
        kind, requests, vocab, dtype, drafts = batch
        engines = {
            name: Engine(name == "ours", kind, requests, vocab, dtype, device, drafts) for name in ("vLLM", "ours")
        }
        torch.manual_seed(requests)
        logits = (torch.randn(requests * (1 + drafts), vocab, device=device) * 3).to(dtype)
        agreement = compare(engines["vLLM"], engines["ours"], logits)
        added = {f"{name}_add_us": round(engine.add_us, 1) for name, engine in engines.items()}
        about = batch._asdict() | {"dtype": str(dtype).removeprefix("torch.")}
        yield about | agreement._asdict() | added | (timed(engines, logits) if device.type == "cuda" else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each batch, and write all of them to the file of the device; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines",
        description="Compare vLLM's newer sampler with ours through its own interface, on a GPU with vLLM: what they "
        "keep, then microseconds of the GPU and of the host, a line for each batch. Without either it says what is "
        "missing.",
    )
    parser.add_argument("--out", type=Path, default=LOCAL / "engines", metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    reason = missing() or (None if torch.cuda.is_available() else "a GPU is needed")
    if reason is not None:
        print(reason)
        return 2
    device = torch.device("cuda")
    about = {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment(),
        "vllm": import_module("vllm").__version__,
        "flashinfer_sampler": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", ""),
    }  # fmt: skip
    rows = []
    for found in measured(device):
        rows.append(about | {"device": device_name(device)} | found)
        print(*(f"{name}={value}" for name, value in found.items()), flush=True)
        write_rows(options.out / f"{slug(device_name(device))}.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
