"""Values that people pass: numpy's scalars for Python's, text for ids, and what is refused."""

import numpy as np
import pytest
import torch

import fastlogits as fl
from fastlogits.processors import nvidia_zoo as zoo
from fastlogits.processors.dry import DRYLogitsProcessor
from tests.processors.toy import TOKENIZER

V = 16
Z = zoo

# Each of ours: what makes it of a number, a number, and the attribute that keeps it.
NUMBERS = {
    "window": (lambda n: fl.SuppressFirstTokens([1], n), 2, "window"),
    "min_tokens": (lambda n: fl.MinTokensLogitsProcessor(n, [1]), 2, "min_tokens"),
    "presence": (lambda x: fl.PresencePenaltyLogitsProcessor(x), 0.5, "penalty"),
    "frequency": (lambda x: fl.FrequencyPenaltyLogitsProcessor(x), 0.5, "penalty"),
    "top_n_sigma": (lambda x: fl.TopNSigmaLogitsWarper(x), 0.5, "top_n_sigma"),
    "filter_value": (lambda x: fl.TopNSigmaLogitsWarper(1.0, x), -4.0, "filter_value"),
    "min_tokens_to_keep": (lambda n: fl.TopNSigmaLogitsWarper(1.0, min_tokens_to_keep=n), 2, "min_tokens_to_keep"),
    "threshold": (lambda x: fl.XTCLogitsProcessor(x, 1.0), 0.25, "threshold"),
    "probability": (lambda x: fl.XTCLogitsProcessor(0.1, x), 1.0, "probability"),
    "removed": (lambda x: fl.XTCLogitsProcessor(0.1, 1.0, filter_value=x), -4.0, "filter_value"),
    "multiplier": (lambda x: DRYLogitsProcessor(x), 0.5, "multiplier"),
    "base": (lambda x: DRYLogitsProcessor(1.0, x), 1.5, "base"),
    "allowed_length": (lambda n: DRYLogitsProcessor(1.0, allowed_length=n), 1, "allowed_length"),
    "range_": (lambda n: DRYLogitsProcessor(1.0, range_=n), 4, "range_"),
    "copies": (lambda n: fl.OnlyTokensFrom([[1]], eos_token_id=2, copies=n), 2, "copies"),
    "boost_factor": (lambda x: Z.GenLengthLogitsProcessor(TOKENIZER, x), 0.5, "boost_factor"),
    "p": (lambda x: Z.GenLengthLogitsProcessor(TOKENIZER, 1.0, x), 1.5, "p"),
    "cited": (lambda x: Z.CiteFromPromptLogitsProcessor(TOKENIZER, x), 0.5, "boost_factor"),
    "conditional": (
        lambda x: Z.CiteFromPromptLogitsProcessor(TOKENIZER, 1.0, True, x), 0.5, "conditional_boost_factor",
    ),
    "boost_first_words": (
        lambda x: Z.MultipleChoiceLogitsProcessor(TOKENIZER, ["a", "b"], boost_first_words=x), 0.5, "boost_first_words",
    ),
    "trigger_count": (
        lambda n: Z.TriggerPhraseLogitsProcessor(TOKENIZER, None, "a", "b", trigger_count=n), 2, "trigger_count",
    ),
    "trigger_time": (
        lambda x: Z.TriggerPhraseLogitsProcessor(TOKENIZER, None, "a", trigger_time=x), 4.0, "trigger_time",
    ),
    "minp": (lambda x: Z.PreventHallucinationLogitsProcessor(TOKENIZER, minp=x, phrase="a"), 0.5, "minp"),
    "tolerate": (lambda n: Z.PreventHallucinationLogitsProcessor(TOKENIZER, tolerate=n, phrase="a"), 2, "tolerate"),
    "max_time": (lambda x: Z.MaxTimeLogitsProcessor(TOKENIZER, x), 4.0, "max_time"),
}  # fmt: skip


def processed(processor):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (2, 8), generator=generator)
    torch.manual_seed(1)
    return processor.for_run(5)(ids, torch.randn(2, V, generator=generator) * 3)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", list(NUMBERS))
def test_numpy_scalars_are_numbers(name, kind):
    make, value, attribute = NUMBERS[name]
    whole = isinstance(value, int)
    if whole != issubclass(kind, np.integer):
        if whole:  # half a step is no step
            with pytest.raises(ValueError, match=" must be an integer of at least"):
                make(kind(value))
        return
    processor = make(kind(value))
    assert type(getattr(processor, attribute)) in (int, float)
    assert getattr(processor, attribute) == value
    assert torch.equal(processed(processor), processed(make(value)))


@pytest.mark.parametrize("wrong", ["1", None, True, float("nan"), [1], 1j])
@pytest.mark.parametrize("name", list(NUMBERS))
def test_what_is_no_number_is_refused_in_one_wording(name, wrong):
    make, _, attribute = NUMBERS[name]
    if (name == "filter_value" and wrong != wrong) or (name == "trigger_time" and wrong is None):
        return  # NaN may be written, and no time is a choice
    if name == "removed" and wrong != wrong:
        return
    with pytest.raises(ValueError, match=r"must .*, got ") as refused:
        make(wrong)
    assert attribute in str(refused.value) or "trigger_t" in str(refused.value)


# transformers' own constructors refuse other numpy scalars than float64, which is a float: ours keep that.
THEIRS = {
    "temperature": lambda x: fl.TemperatureLogitsWarper(x),
    "penalty": lambda x: fl.RepetitionPenaltyLogitsProcessor(x),
    "top_p": lambda x: fl.TopPLogitsWarper(x),
    "min_p": lambda x: fl.MinPLogitsWarper(x),
    "typical": lambda x: fl.TypicalLogitsWarper(x),
    "epsilon": lambda x: fl.EpsilonLogitsWarper(x),
    "eta": lambda x: fl.EtaLogitsWarper(x),
    "filter_value": lambda x: fl.TopKLogitsWarper(3, -x),
}


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("name", list(THEIRS))
def test_numpy_scalars_that_transformers_takes(name, kind):
    try:
        processor = THEIRS[name](kind(0.5))
    except ValueError:
        assert kind is np.float32
        assert name in ("temperature", "penalty")
        return
    assert torch.equal(processed(processor), processed(THEIRS[name](0.5)))
    assert all(type(rule.value) in (int, float) for rule in getattr(processor.stage(), "rules", ()))


def test_ids_of_any_kind():
    scores = torch.zeros(1, V)
    expected = fl.LogitBiasLogitsProcessor({3: 1.0, 5: -2.0})(None, scores)
    for keys in (["3", "5"], [np.int64(3), np.int32(5)], ["3", 5]):
        for values in ((1.0, -2.0), (np.float32(1.0), np.float64(-2.0)), (1, -2), (np.int64(1), np.int8(-2))):
            processor = fl.LogitBiasLogitsProcessor(dict(zip(keys, values, strict=True)))
            assert torch.equal(processor(None, scores), expected)
            assert all(type(key) is int and type(value) is float for key, value in processor.logit_bias.items())
    for ids in (
        [1, 2],
        (1, 2),
        {1, 2},
        np.array([1, 2]),
        torch.tensor([1, 2]),
        [np.int64(1), np.uint8(2)],
        range(1, 3),
    ):
        for make in (
            lambda ids: fl.SuppressFirstTokens(ids),
            lambda ids: fl.AllowedTokensLogitsProcessor(ids),
            lambda ids: fl.MinTokensLogitsProcessor(2, ids),
            lambda ids: fl.OnlyTokensFrom([4], ids, eos_token_id=np.int64(3)),
            lambda ids: fl.OnlyTokensFrom(np.array([4, 5]), exclude=ids, eos_token_id=ids),
            lambda ids: fl.OnlyTokensFrom(np.array([[4, 5], [6, 7]]), eos_token_id=ids),
        ):
            assert torch.equal(processed(make(ids)), processed(make([1, 2])))


@pytest.mark.parametrize(
    "wrong", [{"a": 1.0}, {"-1": 1.0}, {1.5: 1.0}, {True: 1.0}, {1: "x"}, {1: float("inf")}, {1: True}]
)
def test_a_bias_that_is_none(wrong):
    with pytest.raises(ValueError, match=r"logit_bias must .*got"):
        fl.LogitBiasLogitsProcessor(wrong)
