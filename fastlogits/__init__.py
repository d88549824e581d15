"""Logits processors at the speed of memory: transformers' names, fused into one or two kernel launches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlogits.inspect.check import Check as Check
    from fastlogits.inspect.check import check as check
    from fastlogits.inspect.trace import Trace as Trace
    from fastlogits.inspect.trace import trace as trace
    from fastlogits.inspect.watch import Watched as Watched
    from fastlogits.inspect.watch import watch as watch
    from fastlogits.integrations.bitmask import apply_token_bitmask_inplace as apply_token_bitmask_inplace
    from fastlogits.kept_tokens import KeptTokens as KeptTokens
    from fastlogits.parallel.group import Group as Group
    from fastlogits.parallel.process import process as process
    from fastlogits.plan.plan import Plan as Plan
    from fastlogits.plan.position import Position as Position
    from fastlogits.plan.run import UnknownRunStartError as UnknownRunStartError
    from fastlogits.processors.audio import AlternatingCodebooksLogitsProcessor as AlternatingCodebooksLogitsProcessor
    from fastlogits.processors.audio import BarkEosPrioritizerLogitsProcessor as BarkEosPrioritizerLogitsProcessor
    from fastlogits.processors.audio import (
        DiaClassifierFreeGuidanceLogitsProcessor as DiaClassifierFreeGuidanceLogitsProcessor,
    )
    from fastlogits.processors.audio import DiaEOSChannelFilterLogitsProcessor as DiaEOSChannelFilterLogitsProcessor
    from fastlogits.processors.audio import DiaEOSDelayPatternLogitsProcessor as DiaEOSDelayPatternLogitsProcessor
    from fastlogits.processors.audio import WhisperNoSpeechDetection as WhisperNoSpeechDetection
    from fastlogits.processors.audio import WhisperTimeStampLogitsProcessor as WhisperTimeStampLogitsProcessor
    from fastlogits.processors.base import LogitsProcessor as LogitsProcessor
    from fastlogits.processors.base import LogitsProcessorList as LogitsProcessorList
    from fastlogits.processors.base import StagedProcessor as StagedProcessor
    from fastlogits.processors.beams import HammingDiversityLogitsProcessor as HammingDiversityLogitsProcessor
    from fastlogits.processors.constrained import PrefixConstrainedLogitsProcessor as PrefixConstrainedLogitsProcessor
    from fastlogits.processors.dry import DRYLogitsProcessor as DRYLogitsProcessor
    from fastlogits.processors.guidance import (
        ClassifierFreeGuidanceLogitsProcessor as ClassifierFreeGuidanceLogitsProcessor,
    )
    from fastlogits.processors.guidance import (
        UnbatchedClassifierFreeGuidanceLogitsProcessor as UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )
    from fastlogits.processors.length import ExponentialDecayLengthPenalty as ExponentialDecayLengthPenalty
    from fastlogits.processors.length import ForcedBOSTokenLogitsProcessor as ForcedBOSTokenLogitsProcessor
    from fastlogits.processors.length import ForcedEOSTokenLogitsProcessor as ForcedEOSTokenLogitsProcessor
    from fastlogits.processors.length import MinLengthLogitsProcessor as MinLengthLogitsProcessor
    from fastlogits.processors.length import MinNewTokensLengthLogitsProcessor as MinNewTokensLengthLogitsProcessor
    from fastlogits.processors.masks import AllowedTokensLogitsProcessor as AllowedTokensLogitsProcessor
    from fastlogits.processors.masks import MinTokensLogitsProcessor as MinTokensLogitsProcessor
    from fastlogits.processors.masks import OnlyTokensFrom as OnlyTokensFrom
    from fastlogits.processors.masks import SuppressFirstTokens as SuppressFirstTokens
    from fastlogits.processors.masks import (
        SuppressSpecificBOSTokenLogitsProcessor as SuppressSpecificBOSTokenLogitsProcessor,
    )
    from fastlogits.processors.masks import SuppressTokensAtBeginLogitsProcessor as SuppressTokensAtBeginLogitsProcessor
    from fastlogits.processors.masks import SuppressTokensLogitsProcessor as SuppressTokensLogitsProcessor
    from fastlogits.processors.nvidia_zoo import CiteFromPromptLogitsProcessor as CiteFromPromptLogitsProcessor
    from fastlogits.processors.nvidia_zoo import ForceLastPhraseLogitsProcessor as ForceLastPhraseLogitsProcessor
    from fastlogits.processors.nvidia_zoo import GenLengthLogitsProcessor as GenLengthLogitsProcessor
    from fastlogits.processors.nvidia_zoo import MaxTimeLogitsProcessor as MaxTimeLogitsProcessor
    from fastlogits.processors.nvidia_zoo import MultipleChoiceLogitsProcessor as MultipleChoiceLogitsProcessor
    from fastlogits.processors.nvidia_zoo import (
        PreventHallucinationLogitsProcessor as PreventHallucinationLogitsProcessor,
    )
    from fastlogits.processors.nvidia_zoo import TriggerPhraseLogitsProcessor as TriggerPhraseLogitsProcessor
    from fastlogits.processors.penalties import (
        EncoderRepetitionPenaltyLogitsProcessor as EncoderRepetitionPenaltyLogitsProcessor,
    )
    from fastlogits.processors.penalties import FrequencyPenaltyLogitsProcessor as FrequencyPenaltyLogitsProcessor
    from fastlogits.processors.penalties import PresencePenaltyLogitsProcessor as PresencePenaltyLogitsProcessor
    from fastlogits.processors.penalties import RepetitionPenaltyLogitsProcessor as RepetitionPenaltyLogitsProcessor
    from fastlogits.processors.scaling import InfNanRemoveLogitsProcessor as InfNanRemoveLogitsProcessor
    from fastlogits.processors.scaling import LogitNormalization as LogitNormalization
    from fastlogits.processors.scaling import TemperatureLogitsWarper as TemperatureLogitsWarper
    from fastlogits.processors.sequences import (
        EncoderNoRepeatNGramLogitsProcessor as EncoderNoRepeatNGramLogitsProcessor,
    )
    from fastlogits.processors.sequences import LogitBiasLogitsProcessor as LogitBiasLogitsProcessor
    from fastlogits.processors.sequences import NoBadWordsLogitsProcessor as NoBadWordsLogitsProcessor
    from fastlogits.processors.sequences import NoRepeatNGramLogitsProcessor as NoRepeatNGramLogitsProcessor
    from fastlogits.processors.sequences import SequenceBiasLogitsProcessor as SequenceBiasLogitsProcessor
    from fastlogits.processors.truncation import EpsilonLogitsWarper as EpsilonLogitsWarper
    from fastlogits.processors.truncation import EtaLogitsWarper as EtaLogitsWarper
    from fastlogits.processors.truncation import MinPLogitsWarper as MinPLogitsWarper
    from fastlogits.processors.truncation import TopALogitsWarper as TopALogitsWarper
    from fastlogits.processors.truncation import TopHLogitsWarper as TopHLogitsWarper
    from fastlogits.processors.truncation import TopKLogitsWarper as TopKLogitsWarper
    from fastlogits.processors.truncation import TopNSigmaLogitsWarper as TopNSigmaLogitsWarper
    from fastlogits.processors.truncation import TopPLogitsWarper as TopPLogitsWarper
    from fastlogits.processors.truncation import TypicalLogitsWarper as TypicalLogitsWarper
    from fastlogits.processors.truncation import XTCLogitsProcessor as XTCLogitsProcessor
    from fastlogits.processors.watermark import (
        SynthIDTextWatermarkLogitsProcessor as SynthIDTextWatermarkLogitsProcessor,
    )
    from fastlogits.processors.watermark import SynthIDTextWatermarkState as SynthIDTextWatermarkState
    from fastlogits.processors.watermark import WatermarkLogitsProcessor as WatermarkLogitsProcessor
    from fastlogits.sampled import Sample as Sample
    from fastlogits.sampling import Sampler as Sampler
    from fastlogits.sampling import SamplingParams as SamplingParams
    from fastlogits.sampling import sample as sample
    from fastlogits.serving import Accepted as Accepted
    from fastlogits.serving import BatchProcessor as BatchProcessor
    from fastlogits.serving import RequestParams as RequestParams
    from fastlogits.token_mask import TokenMask as TokenMask
    from fastlogits.training.logprobs import LogProbs as LogProbs
    from fastlogits.training.logprobs import logprobs as logprobs
    from fastlogits.transformers.accelerate import accelerate as accelerate
    from fastlogits.transformers.accelerate import restore as restore
    from fastlogits.transformers.decode import decode as decode
    from fastlogits.warm_up import WarmUp as WarmUp

__version__ = "0.2.0"

# Where each public name lives. They are imported on first use: importing fastlogits must not import transformers.
# What type checkers read is above; `python -m tests.public_names` writes it from this table.
_HOME = {
    "AllowedTokensLogitsProcessor": "processors.masks",
    "AlternatingCodebooksLogitsProcessor": "processors.audio",
    "BarkEosPrioritizerLogitsProcessor": "processors.audio",
    "BatchProcessor": "serving",
    "Check": "inspect.check",
    "CiteFromPromptLogitsProcessor": "processors.nvidia_zoo",
    "ClassifierFreeGuidanceLogitsProcessor": "processors.guidance",
    "DRYLogitsProcessor": "processors.dry",
    "DiaClassifierFreeGuidanceLogitsProcessor": "processors.audio",
    "DiaEOSChannelFilterLogitsProcessor": "processors.audio",
    "DiaEOSDelayPatternLogitsProcessor": "processors.audio",
    "EncoderNoRepeatNGramLogitsProcessor": "processors.sequences",
    "EncoderRepetitionPenaltyLogitsProcessor": "processors.penalties",
    "EpsilonLogitsWarper": "processors.truncation",
    "EtaLogitsWarper": "processors.truncation",
    "ExponentialDecayLengthPenalty": "processors.length",
    "ForceLastPhraseLogitsProcessor": "processors.nvidia_zoo",
    "ForcedBOSTokenLogitsProcessor": "processors.length",
    "ForcedEOSTokenLogitsProcessor": "processors.length",
    "FrequencyPenaltyLogitsProcessor": "processors.penalties",
    "GenLengthLogitsProcessor": "processors.nvidia_zoo",
    "Group": "parallel.group",
    "HammingDiversityLogitsProcessor": "processors.beams",
    "InfNanRemoveLogitsProcessor": "processors.scaling",
    "KeptTokens": "kept_tokens",
    "LogProbs": "training.logprobs",
    "LogitBiasLogitsProcessor": "processors.sequences",
    "LogitNormalization": "processors.scaling",
    "LogitsProcessor": "processors.base",
    "LogitsProcessorList": "processors.base",
    "MaxTimeLogitsProcessor": "processors.nvidia_zoo",
    "MinLengthLogitsProcessor": "processors.length",
    "MinNewTokensLengthLogitsProcessor": "processors.length",
    "MinPLogitsWarper": "processors.truncation",
    "MinTokensLogitsProcessor": "processors.masks",
    "MultipleChoiceLogitsProcessor": "processors.nvidia_zoo",
    "NoBadWordsLogitsProcessor": "processors.sequences",
    "NoRepeatNGramLogitsProcessor": "processors.sequences",
    "OnlyTokensFrom": "processors.masks",
    "Plan": "plan.plan",
    "Position": "plan.position",
    "PrefixConstrainedLogitsProcessor": "processors.constrained",
    "PresencePenaltyLogitsProcessor": "processors.penalties",
    "PreventHallucinationLogitsProcessor": "processors.nvidia_zoo",
    "RepetitionPenaltyLogitsProcessor": "processors.penalties",
    "Accepted": "serving",
    "RequestParams": "serving",
    "Sample": "sampled",
    "Sampler": "sampling",
    "SamplingParams": "sampling",
    "SequenceBiasLogitsProcessor": "processors.sequences",
    "StagedProcessor": "processors.base",
    "SuppressFirstTokens": "processors.masks",
    "SuppressSpecificBOSTokenLogitsProcessor": "processors.masks",
    "SuppressTokensAtBeginLogitsProcessor": "processors.masks",
    "SuppressTokensLogitsProcessor": "processors.masks",
    "SynthIDTextWatermarkLogitsProcessor": "processors.watermark",
    "SynthIDTextWatermarkState": "processors.watermark",
    "TemperatureLogitsWarper": "processors.scaling",
    "TokenMask": "token_mask",
    "TopALogitsWarper": "processors.truncation",
    "TopHLogitsWarper": "processors.truncation",
    "TopKLogitsWarper": "processors.truncation",
    "TopNSigmaLogitsWarper": "processors.truncation",
    "TopPLogitsWarper": "processors.truncation",
    "Trace": "inspect.trace",
    "TriggerPhraseLogitsProcessor": "processors.nvidia_zoo",
    "TypicalLogitsWarper": "processors.truncation",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "processors.guidance",
    "UnknownRunStartError": "plan.run",
    "WarmUp": "warm_up",
    "Watched": "inspect.watch",
    "WatermarkLogitsProcessor": "processors.watermark",
    "WhisperNoSpeechDetection": "processors.audio",
    "WhisperTimeStampLogitsProcessor": "processors.audio",
    "XTCLogitsProcessor": "processors.truncation",
    "accelerate": "transformers.accelerate",
    "apply_token_bitmask_inplace": "integrations.bitmask",
    "check": "inspect.check",
    "decode": "transformers.decode",
    "logprobs": "training.logprobs",
    "process": "parallel.process",
    "restore": "transformers.accelerate",
    "sample": "sampling",
    "trace": "inspect.trace",
    "watch": "inspect.watch",
}
# Those that not every supported version of transformers has.
_OPTIONAL = ("HammingDiversityLogitsProcessor", "TopHLogitsWarper")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        theirs = import_module("transformers.generation.logits_process")
        return sorted(name for name in _HOME if name not in _OPTIONAL or hasattr(theirs, name))
    if name not in _HOME:
        raise AttributeError(f"module 'fastlogits' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastlogits.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    names: list[str] = __getattr__("__all__")
    return names
