"""One of each class of transformers, from its module or from ours, and the chains that users build."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import transformers.generation.logits_process as theirs

from benchmarks.inputs import HISTORY

Made: TypeAlias = Callable[[Any, torch.Tensor, int], list[Any]]
"""Given the module of the classes, the history ``[B, L]`` and the vocabulary size: processors, to be called in turn."""

DOUBLED = ("ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor")
"""They take two rows of scores for each row of the history."""

STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
)
"""Each call changes what the next one does, so that a captured call can't be checked by replaying it."""

ON_THE_HOST = ("PrefixConstrainedLogitsProcessor",)
"""They ask a Python function at each call, which no graph can hold."""

WRITING = ("DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor")
"""Those of transformers write their input."""


def bad_words(vocab: int) -> list[list[int]]:
    """Ten single tokens and ten triples."""
    ids: list[int] = torch.randint(0, vocab, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return [[token] for token in ids[:10]] + [ids[10 + 3 * i : 13 + 3 * i] for i in range(10)]


def _chain_6(module: Any, ids: torch.Tensor, vocab: int) -> list[Any]:
    L, device = ids.shape[1], str(ids.device)
    return [
        module.RepetitionPenaltyLogitsProcessor(1.1),
        module.NoRepeatNGramLogitsProcessor(3),
        module.NoBadWordsLogitsProcessor(bad_words(vocab)),
        module.MinNewTokensLengthLogitsProcessor(L, 8, [2, 3], device),
        module.SuppressTokensAtBeginLogitsProcessor(range(15, 25), L, device),
        module.TemperatureLogitsWarper(0.7),
    ]


def _chain_9(module: Any, ids: torch.Tensor, vocab: int) -> list[Any]:
    return [
        *_chain_6(module, ids, vocab),
        module.TopKLogitsWarper(50),
        module.TopPLogitsWarper(0.9),
        module.MinPLogitsWarper(0.05),
    ]


def _chain_5(module: Any, ids: torch.Tensor, vocab: int) -> list[Any]:
    return [*_chain_3(module, ids, vocab), module.TopKLogitsWarper(50), module.TopPLogitsWarper(0.9)]


def _chain_3(module: Any, ids: torch.Tensor, vocab: int) -> list[Any]:
    return [
        module.RepetitionPenaltyLogitsProcessor(1.1),
        module.SuppressTokensAtBeginLogitsProcessor(range(15, 25), ids.shape[1], str(ids.device)),
        module.TemperatureLogitsWarper(0.7),
    ]


def _chain_1(module: Any, ids: torch.Tensor, vocab: int) -> list[Any]:
    return [module.TemperatureLogitsWarper(0.7)]


def _after_heat(*warpers: tuple[str, float]) -> Made:
    """A temperature of 0.7, then truncations by name and value."""

    def made(module: Any, ids: torch.Tensor, vocab: int) -> list[Any]:
        return [module.TemperatureLogitsWarper(0.7), *(getattr(module, name)(value) for name, value in warpers)]

    return made


CHAINS: dict[str, Made] = {
    "chain 1": _chain_1,
    "chain 3": _chain_3,
    "chain 5": _chain_5,
    "chain 6": _chain_6,
    "chain 9": _chain_9,
}
"""Chains by their number of processors; chain 6 is chain 9 before its truncations."""
TRUNCATIONS: dict[str, Made] = {
    "T k p": _after_heat(("TopKLogitsWarper", 50), ("TopPLogitsWarper", 0.9)),
    "T p": _after_heat(("TopPLogitsWarper", 0.9)),
    "T min-p": _after_heat(("MinPLogitsWarper", 0.05)),
    "T typical": _after_heat(("TypicalLogitsWarper", 0.9)),
    "T large k": _after_heat(("TopKLogitsWarper", 2000)),
}
"""Truncations after a temperature."""


class _Guide:
    """An unconditional model that costs nothing."""

    def __init__(self, ids: torch.Tensor, vocab: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self._logits = torch.randn(ids.shape[0], 1, vocab, generator=generator).to(ids.device)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        return _Output(self._logits)


class _Output(dict[str, Any]):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(past_key_values=None)
        self.logits = logits


def _no_speech(module: Any, ids: torch.Tensor, vocab: int) -> Any:
    processor = module.WhisperNoSpeechDetection(3, 1)  # which then reads the scores, and asks no model
    processor.set_begin_index(ids.shape[1])
    return processor


def _timestamps(module: Any, ids: torch.Tensor, vocab: int) -> Any:
    config = SimpleNamespace(
        no_timestamps_token_id=vocab - min(1502, vocab // 2), eos_token_id=2, max_initial_timestamp_index=50
    )
    return module.WhisperTimeStampLogitsProcessor(config, 4)


def _channels(ids: torch.Tensor) -> int:
    return math.gcd(ids.shape[0], 8)


_ONE: dict[str, Callable[[Any, torch.Tensor, int], Any]] = {
    "MinLengthLogitsProcessor": lambda m, ids, V: m.MinLengthLogitsProcessor(HISTORY + 9, [2, 3], str(ids.device)),
    "MinNewTokensLengthLogitsProcessor": lambda m, ids, V: m.MinNewTokensLengthLogitsProcessor(
        HISTORY, 8, [2, 3], str(ids.device)
    ),
    "TemperatureLogitsWarper": lambda m, ids, V: m.TemperatureLogitsWarper(0.7),
    "RepetitionPenaltyLogitsProcessor": lambda m, ids, V: m.RepetitionPenaltyLogitsProcessor(1.1),
    "EncoderRepetitionPenaltyLogitsProcessor": lambda m, ids, V: m.EncoderRepetitionPenaltyLogitsProcessor(
        1.5, ids[:, :512]
    ),
    "TopPLogitsWarper": lambda m, ids, V: m.TopPLogitsWarper(0.9),
    "TopKLogitsWarper": lambda m, ids, V: m.TopKLogitsWarper(50),
    "TopHLogitsWarper": lambda m, ids, V: m.TopHLogitsWarper(0.4),
    "MinPLogitsWarper": lambda m, ids, V: m.MinPLogitsWarper(0.05),
    "TypicalLogitsWarper": lambda m, ids, V: m.TypicalLogitsWarper(0.9),
    "EpsilonLogitsWarper": lambda m, ids, V: m.EpsilonLogitsWarper(3e-4),
    "EtaLogitsWarper": lambda m, ids, V: m.EtaLogitsWarper(3e-4, device=str(ids.device)),
    "NoRepeatNGramLogitsProcessor": lambda m, ids, V: m.NoRepeatNGramLogitsProcessor(3),
    "EncoderNoRepeatNGramLogitsProcessor": lambda m, ids, V: m.EncoderNoRepeatNGramLogitsProcessor(3, ids[:, :512]),
    "SequenceBiasLogitsProcessor": lambda m, ids, V: m.SequenceBiasLogitsProcessor(
        {tuple(word): 1.5 for word in bad_words(V)}
    ),
    "NoBadWordsLogitsProcessor": lambda m, ids, V: m.NoBadWordsLogitsProcessor(bad_words(V)),
    "PrefixConstrainedLogitsProcessor": lambda m, ids, V: m.PrefixConstrainedLogitsProcessor(
        lambda batch_id, sent: list(range(0, V, max(1, V // 100))), 1
    ),
    "ForcedBOSTokenLogitsProcessor": lambda m, ids, V: m.ForcedBOSTokenLogitsProcessor(1),
    "ForcedEOSTokenLogitsProcessor": lambda m, ids, V: m.ForcedEOSTokenLogitsProcessor(
        HISTORY + 1, [2], str(ids.device)
    ),
    "InfNanRemoveLogitsProcessor": lambda m, ids, V: m.InfNanRemoveLogitsProcessor(),
    "ExponentialDecayLengthPenalty": lambda m, ids, V: m.ExponentialDecayLengthPenalty((5, 1.1), [2, 3], HISTORY - 50),
    "LogitNormalization": lambda m, ids, V: m.LogitNormalization(),
    "SuppressTokensAtBeginLogitsProcessor": lambda m, ids, V: m.SuppressTokensAtBeginLogitsProcessor(
        range(15, 25), HISTORY, str(ids.device)
    ),
    "SuppressTokensLogitsProcessor": lambda m, ids, V: m.SuppressTokensLogitsProcessor(range(15, 25), str(ids.device)),
    "WhisperTimeStampLogitsProcessor": _timestamps,
    "WhisperNoSpeechDetection": _no_speech,
    "ClassifierFreeGuidanceLogitsProcessor": lambda m, ids, V: m.ClassifierFreeGuidanceLogitsProcessor(3.0),
    "AlternatingCodebooksLogitsProcessor": lambda m, ids, V: m.AlternatingCodebooksLogitsProcessor(
        HISTORY, V // 2, V // 4
    ),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": lambda m, ids, V: (
        m.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, _Guide(ids, V))
    ),
    "BarkEosPrioritizerLogitsProcessor": lambda m, ids, V: m.BarkEosPrioritizerLogitsProcessor(2, 0.2, str(ids.device)),
    "WatermarkLogitsProcessor": lambda m, ids, V: m.WatermarkLogitsProcessor(V, str(ids.device)),
    "SynthIDTextWatermarkLogitsProcessor": lambda m, ids, V: m.SynthIDTextWatermarkLogitsProcessor(
        5, list(range(1, 31)), 2**16, 0, 1024, ids.device
    ),
    "DiaClassifierFreeGuidanceLogitsProcessor": lambda m, ids, V: m.DiaClassifierFreeGuidanceLogitsProcessor(3.0, 50),
    "DiaEOSChannelFilterLogitsProcessor": lambda m, ids, V: m.DiaEOSChannelFilterLogitsProcessor(_channels(ids), V - 4),
    "DiaEOSDelayPatternLogitsProcessor": lambda m, ids, V: m.DiaEOSDelayPatternLogitsProcessor(
        list(range(_channels(ids))), V - 4, HISTORY + 20, str(ids.device)
    ),
}


def _alone(one: Callable[[Any, torch.Tensor, int], Any]) -> Made:
    return lambda module, ids, vocab: [one(module, ids, vocab)]


CLASSES: dict[str, Made] = {
    name: _alone(one) for name, one in _ONE.items() if inspect.isclass(getattr(theirs, name, None))
}
"""All classes that the installed transformers has."""
