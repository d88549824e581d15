"""Watermarks: text that a detector recognises and a reader doesn't."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.synthid import bit_table, synthid
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor as _SynthIDTextWatermark
from transformers.generation.logits_process import SynthIDTextWatermarkState
from transformers.generation.logits_process import WatermarkLogitsProcessor as _Watermark

from fastlogits.checks import check_rows
from fastlogits.plan.stages import Rows
from fastlogits.processors.base import StagedProcessor

__all__ = ["SynthIDTextWatermarkLogitsProcessor", "SynthIDTextWatermarkState", "WatermarkLogitsProcessor"]

_logger = logging.getLogger(__name__)


_drawing = Lock()


class _Recent:
    """What was drawn for the seeds used last; the oldest is forgotten first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._drawn: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def get(self, key: Hashable, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What was drawn for a key, or is drawn now: by one thread at a time, since a draw seeds a generator."""
        with _drawing:
            drawn = self._drawn.get(key)
            if drawn is None:
                drawn = self._drawn[key] = draw()
                if len(self._drawn) > self._capacity:
                    self._drawn.popitem(last=False)
            else:
                self._drawn.move_to_end(key)
            return drawn


# Bytes of green lists that one processor keeps, as float32 rows: 130 of a vocabulary of 128 thousand.
_KEPT_BYTES = 64 << 20
# Verdicts on single tokens that it keeps.
_KEPT_VERDICTS = 1 << 16
# Candidates of a row in "selfhash", as in the original implementation.
_CANDIDATES = 40


class WatermarkLogitsProcessor(StagedProcessor, _Watermark):
    """Add a bias to a pseudo-random "green" part of the vocabulary, drawn anew for each context.

    ``torch.randperm`` draws the green list on the device of ``input_ids``, from a seed that the host sets. It is the
    list of transformers, token for token. So the host waits for the device once a step, for the seeds of all rows, and
    a second time if a tie decides which candidates are the 40 best. Such a plan can't be captured in a CUDA graph. The
    latest green lists are kept, in at most about 64 MiB: a context that comes again needs no new one.

    Args:
        vocab_size: number of tokens from which the list is drawn, at most the vocabulary of the scores.
        device: device of ``input_ids`` and scores.
        greenlist_ratio: share of the vocabulary that is green, above 0 and below 1.
        bias: what is added to the scores of green tokens.
        hashing_key: the key of the watermark.
        seeding_scheme: ``"lefthash"`` takes the seed from the last token; ``"selfhash"`` from ``context_width`` tokens
            up to the candidate itself, and only the 40 best candidates of a row can be green. A row without a green
            candidate doesn't change; transformers fails there.
        context_width: number of tokens that the seed depends on; a shorter sequence gets no watermark, with a warning.

    Raises:
        ValueError: ``seeding_scheme`` is neither of the two, or ``greenlist_ratio`` is out of range.
        IndexError: on a call, scores of fewer than ``vocab_size`` tokens with ``"lefthash"``.

    Source: Kirchenbauer et al., A Watermark for Large Language Models, 2023 (arXiv 2301.10226), and On the Reliability
    of Watermarks for Large Language Models, 2023 (arXiv 2306.04634).

    Example:
        >>> processor = WatermarkLogitsProcessor(vocab_size=8, device="cpu", greenlist_ratio=0.5)
        >>> scores = processor(torch.tensor([[1, 2]]), torch.zeros(1, 8))
        >>> scores.sum(), scores.max()
        (tensor(8.), tensor(2.))
    """

    def stage(self) -> Rows:
        """A bias whose tokens the host draws."""
        lists = max(1, _KEPT_BYTES // (4 * max(1, self.vocab_size)))
        recent = _Recent(_KEPT_VERDICTS if self.seeding_scheme == "selfhash" else lists)
        description = f"add {self.bias:+g} to {self.greenlist_size} green tokens, seeded by {self.seeding_scheme}"
        return Rows("bias", partial(WatermarkLogitsProcessor._rows, self, recent), description)

    def _rows(self, recent: _Recent, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length, width = input_ids.shape[1], self.context_width
        if length < width:
            _logger.warning("input_ids hold %d tokens but context_width is %d: no watermark here", length, width)
            return scores
        if not scores.shape[0]:
            return scores.clone()
        biased = _bias_candidates if self.seeding_scheme == "selfhash" else _bias_lists
        R, B = input_ids.shape[0], scores.shape[0]
        if 0 < R < B:  # as in transformers: ids of fewer rows are those of the first
            return torch.cat((biased(self, recent, input_ids, scores[:R]), scores[R:]))
        check_rows("WatermarkLogitsProcessor", input_ids, scores)
        return biased(self, recent, input_ids, scores)


def _draw(processor: Any, seed: int, device: torch.device) -> torch.Tensor:
    """The green list of a seed."""
    processor.rng.manual_seed(seed % (2**64 - 1))
    drawn = torch.randperm(processor.vocab_size, device=device, generator=processor.rng)
    return drawn[: processor.greenlist_size]


def _bias_lists(processor: Any, recent: _Recent, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    V = scores.shape[1]
    if processor.vocab_size > V:
        raise IndexError(f"vocab_size is {processor.vocab_size}, but scores have {V} tokens")
    dtype = torch.promote_types(scores.dtype, torch.float32)

    def draw(seed: int) -> torch.Tensor:
        # Adding -0.0 changes no score, not even one of -0.0.
        row = torch.full((V,), -0.0, dtype=dtype, device=scores.device)
        return row.index_fill_(0, _draw(processor, seed, input_ids.device), processor.bias)

    seeds = [processor.hash_key * token for token in input_ids[:, -1].tolist()]
    bias = torch.stack([recent.get((seed, V, dtype), partial(draw, seed)) for seed in seeds])
    if scores.dtype == dtype:
        return bias.add_(scores)
    # In a shorter dtype torch rounds the number before it adds it, on the CPU.
    return torch.where(bias != 0, scores + processor.bias, scores)


def _bias_candidates(processor: Any, recent: _Recent, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    best = scores.topk(min(_CANDIDATES, scores.shape[1]))
    candidates = best.indices
    # Which of two equal scores comes first is up to the sort that the definition speaks of. NaN comes before all.
    tied = (~(scores < best.values.amin(1, keepdim=True))).sum(1) > _CANDIDATES
    drawn = torch.cat((tied.unsqueeze(1), _seeds(processor, input_ids, candidates), candidates), 1).tolist()
    if any(row[0] for row in drawn):
        candidates = candidates.clone()
        for b, row in enumerate(drawn):
            if row[0]:
                candidates[b] = scores[b].sort(descending=True).indices[:_CANDIDATES]
        drawn = torch.cat((tied.unsqueeze(1), _seeds(processor, input_ids, candidates), candidates), 1).tolist()

    def draw(seed: int, token: int) -> torch.Tensor:
        return (_draw(processor, seed, input_ids.device) == token).any()

    count = candidates.shape[1]
    verdicts = [
        recent.get((seed, token), partial(draw, seed, token))
        for row in drawn
        for seed, token in zip(row[1 : 1 + count], row[1 + count :], strict=True)
    ]
    green = torch.stack(verdicts).view_as(candidates)
    known = scores.gather(1, candidates)
    return scores.scatter(1, candidates, torch.where(green, known + processor.bias, known))


def _seeds(processor: Any, input_ids: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The seed of each candidate ``[B, 40]``, int64: the smallest product over its context and itself."""
    B, L = input_ids.shape
    context = input_ids[:, max(0, L + 1 - processor.context_width) :]  # [B, width - 1]
    tokens = torch.cat((context.unsqueeze(1).expand(B, candidates.shape[1], -1), candidates.unsqueeze(2)), 2)
    table, size = processor.fixed_table, processor.table_size
    # In this order, since products wrap around.
    keyed = processor.hash_key * (table[tokens % size] + 1)
    seeds: torch.Tensor = (keyed * (table[candidates % size] + 1).unsqueeze(2)).amin(2)
    return seeds


# The generator that hashes contexts, modulo 2**64.
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1


class _Hash(NamedTuple):
    """A SynthID hash, for one device and vocabulary size, as linear as it is in what it is a hash of."""

    factors: torch.Tensor
    """Of the context's tokens in its hash, int64 ``[ngram_len - 1]``; ``start`` is its constant."""
    start: int
    scale: int
    """Of the context's hash in the offsets of ``synthid``; ``constants`` ``[depth]`` hold what the keys add."""
    constants: torch.Tensor
    table: torch.Tensor
    multiplier: int

    @classmethod
    def of(cls, processor: Any, vocab_size: int, device: torch.device) -> _Hash:
        count, M = processor.ngram_len - 1, _MULTIPLIER
        factors = torch.tensor([_wrapped(M**i) for i in range(count, 0, -1)], dtype=torch.int64, device=device)
        start = M**count + _INCREMENT * sum(M**i for i in range(count))
        # A token and a key more: ((hash + token) * M + 1 + key) * M + 1.
        constants = processor.keys.to(device).long() * M + _wrapped(_INCREMENT * (M + 1))
        table = processor.sampling_table.to(device)
        N = table.shape[0]
        if N & (N - 1):
            return cls(factors, _wrapped(start), _wrapped(M * M), constants, table.to(torch.uint8), _wrapped(M * M))
        table, inverse = bit_table(table, M * M, vocab_size)
        return cls(factors, _wrapped(start), 1, constants * inverse, table, 1)

    def offsets(self, context_hash: torch.Tensor, table_size: int) -> torch.Tensor:
        """Of each row and depth, int64 ``[B, depth]``, from the hash of the row's context ``[B, 1]``."""
        offsets = context_hash * self.scale + self.constants
        return offsets & (table_size - 1) if self.multiplier == 1 else offsets


def _wrapped(value: int) -> int:
    """An integer modulo 2**64, as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


class SynthIDTextWatermarkLogitsProcessor(StagedProcessor, _SynthIDTextWatermark):
    """Let tokens with a pseudo-random bit of 1 win a tournament of several rounds, which keeps the mean distribution.

    The bits are those of transformers. Probabilities are the same bit for bit on the CPU, and within float32 rounding
    of sums on CUDA: about 1e-6 of the row's whole probability. The result are logarithms of probabilities, and the
    lowest finite value where a probability is zero.

    ``state`` holds the context from call to call, as in transformers: use one object for one run, and don't reorder
    rows. Its tensors are updated in place, so that a captured graph goes on. ``skip_first_ngram_calls`` counts calls on
    the host; a graph doesn't.

    Args:
        ngram_len: number of tokens that a hash depends on, candidate included.
        keys: a key for each depth.
        sampling_table_size: size of the table of bits; a power of two is several times faster.
        sampling_table_seed: seed of the table.
        context_history_size: how many contexts of a row are kept; a context that comes again gets no watermark.
        device: device of ``input_ids`` and scores.
        skip_first_ngram_calls: whether the first ``ngram_len - 1`` calls change nothing.
        debug_mode: whether all scores are taken as 1.

    Raises:
        ValueError: on a call, ``input_ids`` that are not two-dimensional, or of other rows than the scores.
        RuntimeError: on a call, scores that have another number of rows than in the calls before.

    Source: Dathathri et al., Scalable watermarking for identifying large language model outputs, Nature 634, 2024.

    Example:
        >>> processor = SynthIDTextWatermarkLogitsProcessor(
        ...     ngram_len=3, keys=[7, 8, 9], sampling_table_size=64, sampling_table_seed=0, context_history_size=4,
        ...     device=torch.device("cpu"),
        ... )
        >>> scores = processor(torch.tensor([[1, 2]]), torch.zeros(1, 8))
        >>> torch.allclose(scores.exp().sum(), torch.ones(()))
        True
    """

    def stage(self) -> Rows:
        """A function of whole rows that also reads what earlier calls left in ``state``."""
        hashes: dict[tuple[int, torch.device], _Hash] = {}
        description = f"SynthID tournament of {len(self.keys)} depths over {self.ngram_len}-grams"
        rehearse = partial(SynthIDTextWatermarkLogitsProcessor._rehearsed, self, hashes)
        function = partial(SynthIDTextWatermarkLogitsProcessor._rows, self, hashes)
        return Rows("mix", function, description, rehearse=rehearse)

    def _rehearsed(self, hashes: dict[tuple[int, torch.device], _Hash], scores: torch.Tensor) -> torch.Tensor:
        """The launches of a call, without its state."""
        B, V = scores.shape
        key = V, scores.device
        if key not in hashes:
            hashes[key] = _Hash.of(self, *key)
        hashed = hashes[key]
        offsets = torch.zeros(B, len(self.keys), dtype=torch.int64, device=scores.device)
        skip = torch.zeros(B, 1, dtype=torch.bool, device=scores.device)
        return synthid(scores, hashed.table, offsets, skip, hashed.multiplier)

    def _rows(
        self, hashes: dict[tuple[int, torch.device], _Hash], input_ids: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        self._check_input_ids_shape(input_ids)
        B, V = scores.shape
        key = V, scores.device
        if key not in hashes:  # at the first call, whether that is skipped or not: building them waits for the GPU
            hashes[key] = _Hash.of(self, V, scores.device)
        if self.debug_mode:
            scores = torch.ones_like(scores)
        state: Any = self.state
        if state is None:
            state = SynthIDTextWatermarkState(B, self.ngram_len, self.context_history_size, self.device)
            # Not by assignment, which has the stage asked anew: it doesn't read this one.
            self.__dict__["state"] = state
        elif state.context.shape[0] != B:
            raise RuntimeError(
                f"scores must have the {state.context.shape[0]} rows of the run that state belongs to, got {B}: one "
                "object serves one run, so make another for the next"
            )
        elif input_ids.shape[1]:  # without a text no token has come to the context
            check_rows("SynthIDTextWatermarkLogitsProcessor", input_ids, scores)
            state.context.copy_(torch.cat((state.context, input_ids[:, -1:]), 1)[:, 1:])
        state.num_calls += 1
        if self.skip_first_ngram_calls and state.num_calls < self.ngram_len:
            return scores
        hashed = hashes[key]
        context = (state.context * hashed.factors).sum(1, keepdim=True) + hashed.start  # [B, 1]
        repeated = (state.context_history == context).any(1, keepdim=True)
        state.context_history.copy_(torch.cat((context, state.context_history), 1)[:, :-1])
        offsets = hashed.offsets(context, self.sampling_table.shape[0])
        return synthid(scores, hashed.table, offsets, repeated, hashed.multiplier)
