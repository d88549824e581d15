"""Every processor of transformers: what to construct it with at random, and what of its result must agree.

``ENTRIES[name]`` says it for the class of that name. Arguments come as a dictionary, to be copied for each side:
``build(module, name, arguments)`` does both.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import transformers.generation.logits_process as reference
from hypothesis import strategies as st

from tests.installed import (
    COMPLETES_FROM_ALL_OF_A_TEXT,
    DECAYS_NO_BAN,
    FORCES_WHAT_IS_BANNED,
    IS_4,
    PENALISES_COPIES,
    TAKES_LENGTHS_OF_ROWS,
)

NEGATIVE_INFINITY = -float("inf")


@dataclass(frozen=True)
class Case:
    """The sizes that a processor will be called with: ``B`` rows of ``V`` scores after ``L`` tokens."""

    B: int
    V: int
    L: int
    device: str = "cpu"


@dataclass(frozen=True)
class Entry:
    """What the tests know of one class.

    Args:
        draw: given ``(draw, case)``, the constructor's arguments.
        agreement: ``"exact"``: equal in every bit. ``"close"``: sums are involved, whose order may differ.
            ``"truncation"``: kept scores are equal in every bit, and which are kept may differ within rounding of
            ``boundary``.
        boundary: the argument whose rounding decides what is kept.
        rows: rows of scores to each row of ``input_ids``.
        least_vocab: the smallest vocabulary that transformers' class can work with.
        stateful: whether a call changes what the next one does.
        reads: attributes that a call sets for others to read.
        nan: whether transformers takes NaN in the scores.
        graph: whether it can be captured: it asks no Python function of the user, and no model that keeps a cache.
        ulps: units in the last place by which kernels may be off. Triton's interpreter truncates to bfloat16 where a
            GPU rounds, each time anew.
    """

    draw: Callable[[Callable[..., Any], Case], dict[str, Any]]
    agreement: Literal["exact", "close", "truncation"] = "exact"
    boundary: str = ""
    rows: int = 1
    least_vocab: int = 1
    stateful: bool = False
    reads: tuple[str, ...] = ()
    nan: bool = True
    graph: bool = True
    ulps: float = 1


class UnconditionalModel:
    """What ``UnbatchedClassifierFreeGuidance`` asks for logits; they depend on the last token alone."""

    def __init__(self, V: int, device: str) -> None:
        generator = torch.Generator().manual_seed(V)
        self.table = (torch.randn(V, V, generator=generator) * 2).to(device)

    def __call__(self, input_ids, attention_mask=None, use_cache=None, past_key_values=None):
        logits = self.table[input_ids % len(self.table)]

        class Output(dict):
            pass

        output = Output(past_key_values=None)
        output.logits = logits
        return output


class SpeechModel:
    """What ``WhisperNoSpeechDetection`` asks for logits."""

    def __init__(self, B: int, V: int, device: str) -> None:
        generator = torch.Generator().manual_seed(B * V)
        self.logits = torch.randn(B, 4, V, generator=generator).to(device)

    def prepare_inputs_for_generation(self, **inputs):
        return inputs

    def forward(self, input_features=None, decoder_input_ids=None):
        return SimpleNamespace(logits=self.logits)

    __call__ = forward


class AllowedByLength:
    """A function for ``PrefixConstrained``: which tokens are allowed depends on the row and on its tokens."""

    def __init__(self, V: int, seed: int) -> None:
        self.V, self.seed = V, seed

    def __call__(self, batch_id: int, sent: torch.Tensor) -> list[int]:
        last = int(sent[-1]) if len(sent) else 0
        generator = torch.Generator().manual_seed(self.seed + 31 * batch_id + last)
        return torch.randint(0, self.V, (max(1, self.V // 3),), generator=generator).tolist()


def build(module: Any, name: str, arguments: dict[str, Any]) -> Any:
    """An instance of a class of ``module``, from copies of the arguments."""
    return getattr(module, name)(**copy.deepcopy(arguments))


def names() -> list[str]:
    """The classes of the installed transformers, but one that 5.x dropped and whose call takes other arguments."""
    return [
        name
        for name, value in vars(reference).items()
        if inspect.isclass(value) and issubclass(value, reference.LogitsProcessor)
        if value is not reference.LogitsProcessor and name != "HammingDiversityLogitsProcessor"
    ]


def kinds(chosen: Callable[[Entry], bool]) -> list[str]:
    """The names of ``ENTRIES`` that this transformers has and that ``chosen`` takes."""
    return [name for name in names() if name in ENTRIES and chosen(ENTRIES[name])]


def was_corrected(name: str, arguments: dict[str, Any], ids: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether a newer transformers than the one installed makes something else of these; we follow the newest."""
    if name == "MinPLogitsWarper":  # the tokens to keep: those of the largest scores, not probabilities
        return IS_4 and arguments["min_tokens_to_keep"] > 1
    if not COMPLETES_FROM_ALL_OF_A_TEXT and name in ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"):
        # No sequence was matched against a history one token shorter; biases were added in another order.
        key = "sequence_bias" if name.startswith("Sequence") else "bad_words_ids"
        pairs = arguments[key]
        sequences = [pair[0] for pair in pairs] if key == "sequence_bias" and isinstance(pairs, list) else list(pairs)
        ends = [sequence[-1] for sequence in sequences]
        return any(len(each) == ids.shape[1] + 1 for each in sequences) or len(set(ends)) < len(ends)
    if not DECAYS_NO_BAN and name == "ExponentialDecayLengthPenalty":  # -inf grew to NaN
        return not bool(scores.isfinite().all())
    if not FORCES_WHAT_IS_BANNED and name == "PrefixConstrainedLogitsProcessor":
        # Nothing was forced where nothing was allowed, and rows that are no multiple of the beams were taken.
        return not bool(scores.isfinite().all()) or len(scores) % arguments["num_beams"] != 0
    if not PENALISES_COPIES and name == "EncoderRepetitionPenaltyLogitsProcessor":  # other rows stayed as they were
        return len(arguments["encoder_input_ids"]) != len(scores)
    return False


# -- Parts of arguments --------------------------------------------------------------------------------------------


def _ids(draw, V, least=1, most=6):
    return draw(st.lists(st.integers(0, V - 1), min_size=least, max_size=most))


def _eos(draw, case):
    """An id, a list of ids or a tensor of them."""
    form = draw(st.sampled_from(["int", "list", "tensor"]))
    if form == "int":
        return draw(st.integers(0, case.V - 1))
    ids = _ids(draw, case.V, most=3)
    return ids if form == "list" else torch.tensor(ids, device=case.device)


def _source(draw, case, most=12, shared=True):
    """Ids of an encoder's input: a row for each row, or for each group of neighbouring rows."""
    rows = draw(st.sampled_from([rows for rows in range(1, case.B + 1) if case.B % rows == 0])) if shared else case.B
    length = draw(st.integers(1, most))
    alphabet = draw(st.integers(1, case.V))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, alphabet, (rows, length), generator=generator).to(case.device)


def _near(draw, length):
    """A length at which something changes, at or near the one that will be seen."""
    return draw(st.integers(max(0, length - 2), length + 3))


def _fill(draw):
    return draw(st.sampled_from([NEGATIVE_INFINITY, NEGATIVE_INFINITY, -1e4, 0.0, -2.5]))


def _keep(draw, case):
    return draw(st.sampled_from([1, 1, 2, 3, case.V, case.V + 3]))


# -- Classes -------------------------------------------------------------------------------------------------------


def _min_length(draw, case):
    return {"min_length": _near(draw, case.L), "eos_token_id": _eos(draw, case), "device": case.device}


def _min_new_tokens(draw, case):
    skipped = draw(st.integers(0, case.L + 1))
    new = _near(draw, max(0, case.L - skipped))
    return {
        "prompt_length_to_skip": skipped,
        "min_new_tokens": new,
        "eos_token_id": _eos(draw, case),
        "device": case.device,
    }


def _temperature(draw, case):
    return {"temperature": draw(st.sampled_from([0.7, 1.0, 1.3, 0.1, 3.0]) | st.floats(0.05, 20))}


def _repetition(draw, case):
    ignore = draw(st.sampled_from(["none", "int", "tensor"]))
    arguments = {"penalty": draw(st.sampled_from([1.1, 1.0, 0.8, 2.0]) | st.floats(0.1, 10))}
    if ignore == "int":
        arguments["prompt_ignore_length"] = draw(st.integers(0, case.L))
    if ignore == "tensor" and TAKES_LENGTHS_OF_ROWS:
        ignored = draw(st.lists(st.integers(0, case.L), min_size=case.B, max_size=case.B))
        arguments["prompt_ignore_length"] = torch.tensor(ignored, device=case.device)
    return arguments


def _encoder_repetition(draw, case):
    return {"penalty": draw(st.floats(0.1, 10)), "encoder_input_ids": _source(draw, case, shared=PENALISES_COPIES)}


def _top_p(draw, case):
    top_p = draw(st.sampled_from([0.9, 0.5, 0.0, 1.0, 1e-6]) | st.floats(0, 1))
    return {"top_p": top_p, "filter_value": _fill(draw), "min_tokens_to_keep": _keep(draw, case)}


def _top_k(draw, case):
    top_k = draw(st.sampled_from([1, 2, case.V, case.V + 5]) | st.integers(1, case.V))
    return {"top_k": top_k, "filter_value": _fill(draw), "min_tokens_to_keep": _keep(draw, case)}


def _top_h(draw, case):
    return {"top_h": draw(st.sampled_from([0.4, 1.0]) | st.floats(0.01, 1)), "filter_value": _fill(draw)}


def _min_p(draw, case):
    min_p = draw(st.sampled_from([0.05, 0.0, 1.0]) | st.floats(0, 1))
    return {"min_p": min_p, "filter_value": _fill(draw), "min_tokens_to_keep": _keep(draw, case)}


def _typical(draw, case):
    return {"mass": draw(st.floats(0.01, 0.99)), "filter_value": _fill(draw), "min_tokens_to_keep": _keep(draw, case)}


def _epsilon(draw, case):
    epsilon = draw(st.sampled_from([1e-4, 9e-4, 0.02]) | st.floats(1e-6, 0.9))
    return {"epsilon": epsilon, "filter_value": _fill(draw), "min_tokens_to_keep": _keep(draw, case)}


def _eta(draw, case):
    return {**_epsilon(draw, case), "device": case.device}


def _ngram(draw, case):
    return {"ngram_size": draw(st.integers(1, 4))}


def _encoder_ngram(draw, case):
    return {"encoder_ngram_size": draw(st.integers(1, 3)), "encoder_input_ids": _source(draw, case, most=20)}


def _sequences(draw, V):
    """Sequences that random histories of few different tokens end with."""
    token = st.integers(0, min(V, 4) - 1) | st.integers(0, V - 1)
    return draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=8))


def _sequence_bias(draw, case):
    value = st.sampled_from([1.5, -2.0, 0.1, NEGATIVE_INFINITY, 100.0]) | st.floats(-20, 20)
    bias = {tuple(sequence): draw(value) for sequence in _sequences(draw, case.V)}
    # transformers 4 takes no token 0 in lists.
    as_list = draw(st.booleans()) and all(0 not in sequence for sequence in bias)
    return {"sequence_bias": [[list(ids), value] for ids, value in bias.items()] if as_list else bias}


def _bad_words(draw, case):
    words = _sequences(draw, case.V)
    eos = draw(st.none() | st.just("some"))
    eos = None if eos is None else _eos(draw, case)
    if eos is not None:
        # Something must be left once the words that end the text are taken out.
        words.append([0, 0])
    return {"bad_words_ids": words, "eos_token_id": eos}


def _prefix(draw, case):
    beams = draw(st.sampled_from([beams for beams in range(1, case.B + 1) if case.B % beams == 0]))
    return {"prefix_allowed_tokens_fn": AllowedByLength(case.V, draw(st.integers(0, 99))), "num_beams": beams}


def _forced_bos(draw, case):
    return {"bos_token_id": draw(st.integers(0, case.V - 1))}


def _forced_eos(draw, case):
    return {"max_length": _near(draw, case.L), "eos_token_id": _eos(draw, case), "device": case.device}


def _nothing(draw, case):
    return {}


def _decay(draw, case):
    prompt = draw(st.integers(0, case.L))
    start = draw(st.integers(-2, max(0, case.L - prompt) + 2))
    factor = draw(st.sampled_from([1.2, 1.0, 0.8]) | st.floats(0.5, 2))
    return {
        "exponential_decay_length_penalty": (start, factor),
        "eos_token_id": _eos(draw, case),
        "input_ids_seq_length": prompt,
    }


def _begin(draw, case):
    return {
        "begin_suppress_tokens": _ids(draw, case.V + 2),
        "begin_index": _near(draw, case.L),
        "device": case.device,
    }


def _suppress(draw, case):
    return {"suppress_tokens": _ids(draw, case.V + 2), "device": case.device}


def _timestamps(draw, case):
    no_timestamps = draw(st.integers(max(0, case.V // 4 - 1), max(0, case.V // 2 - 1)))
    config = SimpleNamespace(
        no_timestamps_token_id=no_timestamps,
        eos_token_id=draw(st.integers(1, max(1, no_timestamps))),
        bos_token_id=1,
        max_initial_timestamp_index=draw(st.none() | st.integers(0, case.V)),
    )
    detect = draw(st.sampled_from([None, True, False]))
    return {
        "generate_config": config,
        "begin_index": draw(st.integers(0, case.L + 1)),
        "_detect_timestamp_from_logprob": detect,
    }


def _no_speech(draw, case):
    return {
        "no_speech_token": draw(st.integers(0, case.V - 1)),
        "begin_index": draw(st.sampled_from([0, 1, case.L, case.L + 1])),
        "scores_is_logprobs": draw(st.booleans()),
    }


def _guidance(draw, case):
    return {"guidance_scale": draw(st.sampled_from([1.5, 3, 7.5]) | st.floats(1.01, 10))}


def _dia_guidance(draw, case):
    return {**_guidance(draw, case), "guidance_top_k": draw(st.none() | st.integers(1, case.V))}


def _codebooks(draw, case):
    semantic = draw(st.integers(0, case.V))
    return {
        "input_start_len": draw(st.integers(0, case.L + 1)),
        "semantic_vocab_size": semantic,
        "codebook_size": draw(st.integers(0, case.V)),
    }


def _unbatched_guidance(draw, case):
    ids = draw(st.booleans())
    length = draw(st.integers(1, 4))
    return {
        "guidance_scale": draw(st.sampled_from([1, 1.5, 0.5, 3.0])),
        "model": UnconditionalModel(case.V, case.device),
        "unconditional_ids": torch.zeros(case.B, length, dtype=torch.int64, device=case.device) if ids else None,
        "use_cache": draw(st.booleans()),
    }


def _bark(draw, case):
    return {
        "eos_token_id": _eos(draw, case),
        "min_eos_p": draw(st.sampled_from([None, 0.2, 1e-3, 0.9])),
        "device": case.device,
    }


def _watermark(draw, case):
    scheme = draw(st.sampled_from(["lefthash", "selfhash"]))
    return {
        "vocab_size": case.V,
        "device": case.device,
        "greenlist_ratio": draw(st.sampled_from([0.25, 0.5, 0.9])),
        "bias": draw(st.sampled_from([2.0, 0.5, -1.0])),
        "hashing_key": draw(st.sampled_from([15485863, 7, 2**40])),
        "seeding_scheme": scheme,
        "context_width": draw(st.integers(1, 4)),
    }


def _synthid(draw, case):
    return {
        "ngram_len": draw(st.integers(2, 5)),
        "keys": draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6)),
        "sampling_table_size": draw(st.sampled_from([16, 2**10, 1000])),
        "sampling_table_seed": draw(st.integers(0, 5)),
        "context_history_size": draw(st.sampled_from([1, 4, 32])),
        "device": case.device,
        "skip_first_ngram_calls": draw(st.booleans()),
        "debug_mode": draw(st.sampled_from([False, False, True])),
    }


def _channels(draw, case):
    return draw(st.sampled_from([channels for channels in range(1, case.B + 1) if case.B % channels == 0]))


def _dia_filter(draw, case):
    return {"num_channels": _channels(draw, case), "eos_token_id": draw(st.integers(1, case.V - 1))}


def _dia_delay(draw, case):
    channels = _channels(draw, case)
    delays = draw(st.lists(st.integers(0, 3), min_size=channels, max_size=channels))
    return {
        "delay_pattern": delays,
        "eos_token_id": draw(st.integers(0, case.V - 1)),
        "max_generation_len": case.L + max(delays) + 1 + draw(st.integers(0, 2)),
        "device": case.device,
    }


ENTRIES: dict[str, Entry] = {
    "MinLengthLogitsProcessor": Entry(_min_length),
    "MinNewTokensLengthLogitsProcessor": Entry(_min_new_tokens),
    "TemperatureLogitsWarper": Entry(_temperature),
    "RepetitionPenaltyLogitsProcessor": Entry(_repetition),
    "EncoderRepetitionPenaltyLogitsProcessor": Entry(_encoder_repetition),
    "TopPLogitsWarper": Entry(_top_p, "truncation", "top_p"),
    "TopKLogitsWarper": Entry(_top_k),
    "TopHLogitsWarper": Entry(_top_h, "truncation", "top_h", nan=False),
    "MinPLogitsWarper": Entry(_min_p, "truncation", "min_p"),
    "TypicalLogitsWarper": Entry(_typical, "truncation", "mass"),
    "EpsilonLogitsWarper": Entry(_epsilon, "truncation", "epsilon"),
    "EtaLogitsWarper": Entry(_eta, "truncation", "epsilon", nan=False),
    "NoRepeatNGramLogitsProcessor": Entry(_ngram),
    "EncoderNoRepeatNGramLogitsProcessor": Entry(_encoder_ngram),
    "SequenceBiasLogitsProcessor": Entry(_sequence_bias),
    "NoBadWordsLogitsProcessor": Entry(_bad_words),
    "PrefixConstrainedLogitsProcessor": Entry(_prefix, graph=False),
    "ForcedBOSTokenLogitsProcessor": Entry(_forced_bos),
    "ForcedEOSTokenLogitsProcessor": Entry(_forced_eos),
    "InfNanRemoveLogitsProcessor": Entry(_nothing),
    "ExponentialDecayLengthPenalty": Entry(_decay),
    "LogitNormalization": Entry(_nothing, "close"),
    "SuppressTokensAtBeginLogitsProcessor": Entry(_begin),
    "SuppressTokensLogitsProcessor": Entry(_suppress),
    "WhisperTimeStampLogitsProcessor": Entry(_timestamps, least_vocab=4),
    "WhisperNoSpeechDetection": Entry(_no_speech, reads=("no_speech_prob",), graph=False),
    "ClassifierFreeGuidanceLogitsProcessor": Entry(_guidance, rows=2, ulps=8),
    "AlternatingCodebooksLogitsProcessor": Entry(_codebooks),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": Entry(_unbatched_guidance, "close", stateful=True, graph=False),
    "BarkEosPrioritizerLogitsProcessor": Entry(_bark, "truncation", "min_eos_p"),
    "WatermarkLogitsProcessor": Entry(_watermark, least_vocab=40, graph=False),
    "SynthIDTextWatermarkLogitsProcessor": Entry(_synthid, "close", stateful=True, graph=False),
    "DiaClassifierFreeGuidanceLogitsProcessor": Entry(_dia_guidance, rows=2),
    "DiaEOSChannelFilterLogitsProcessor": Entry(_dia_filter, least_vocab=2),
    "DiaEOSDelayPatternLogitsProcessor": Entry(_dia_delay, stateful=True, graph=False),
}
