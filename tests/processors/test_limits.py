"""Values at the edges of integers and floats, and ids that the logits don't have, on both backends."""

import math

import pytest
import torch
import transformers.generation.logits_process as reference
from fastlogits_kernels.pointwise import fold as fold_kernels
from fastlogits_kernels.runtime.launcher import HAS_TRITON

import fastlogits as fl
from fastlogits.processors import nvidia_zoo as zoo
from fastlogits.processors.dry import DRYLogitsProcessor
from tests.installed import IS_4, TAKES_LENGTHS_OF_ROWS
from tests.processors.toy import TOKENIZER

INF = math.inf
V = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HUGE = [2**31 - 2, 2**31 - 1, 2**31, 2**33, 2**63 - 1, 2**70]


@pytest.fixture(params=["torch", "kernels"])
def backend(request, monkeypatch):
    if request.param == "kernels" and not HAS_TRITON:
        pytest.skip("needs Triton")
    monkeypatch.setattr(fold_kernels, "FORCE_KERNEL", request.param == "kernels")


def in_a_fold(processor):
    """A list that the fold takes, which a mask alone doesn't need."""
    return fl.LogitsProcessorList([fl.TemperatureLogitsWarper(1.0), processor])


# -- Integers beyond int32 ----------------------------------------------------------------------------------------

THEIRS = {
    "decay": lambda module, n: module.ExponentialDecayLengthPenalty((n, 2.0), 1, 0),
    "decay long since": lambda module, n: module.ExponentialDecayLengthPenalty((-n, 1.0), 1, 0),
    "min_length": lambda module, n: module.MinLengthLogitsProcessor(n, 1, DEVICE),
    "min_new_tokens": lambda module, n: module.MinNewTokensLengthLogitsProcessor(n, n, 1, DEVICE),
    "max_length": lambda module, n: module.ForcedEOSTokenLogitsProcessor(n, 1, DEVICE),
    "begin_index": lambda module, n: module.SuppressTokensAtBeginLogitsProcessor([1], n, DEVICE),
    "ngram_size": lambda module, n: module.NoRepeatNGramLogitsProcessor(n),
    "prompt_ignore_length": lambda module, n: module.RepetitionPenaltyLogitsProcessor(2.0, n),
    "prompt_ignore_length per row": lambda module, n: module.RepetitionPenaltyLogitsProcessor(
        2.0, torch.tensor([min(n, 2**63 - 1), 1], device=DEVICE)
    ),
    "input_start_len": lambda module, n: module.AlternatingCodebooksLogitsProcessor(n, 2, 2),
}


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("name", list(THEIRS))
def test_integers_of_any_size_as_in_transformers(backend, device, name, n):
    if name.startswith("prompt_ignore_length") and (IS_4 or ("per row" in name and not TAKES_LENGTHS_OF_ROWS)):
        pytest.skip("this transformers doesn't take it in all forms")
    ids = torch.randint(0, 4, (2, 5), device=device)
    scores = torch.randn(2, V, device=device)
    expected = THEIRS[name](reference, n)(ids, scores.clone())
    assert torch.equal(THEIRS[name](fl, n)(ids, scores), expected)
    assert torch.equal(in_a_fold(THEIRS[name](fl, n))(ids, scores), expected)


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("position", [4, torch.tensor(4), torch.tensor([4, 4])])
def test_windows_of_any_size(backend, device, n, position):
    ids, scores = torch.ones(2, 5, dtype=torch.int64, device=device), torch.randn(2, V, device=device)
    position = position.to(device) if isinstance(position, torch.Tensor) else position
    expected = scores.clone()
    expected[:, 1] = -INF
    for make in (
        lambda: fl.SuppressFirstTokens([1], n),
        lambda: fl.SuppressFirstTokens([1], n, blank=[2]),
        lambda: fl.MinTokensLogitsProcessor(n, [1]),
    ):
        for processors in (fl.LogitsProcessorList([make()]), in_a_fold(make())):
            assert torch.equal(processors(ids, scores, prompt_length=3, cache_position=position), expected)


@pytest.mark.parametrize("n", HUGE)
def test_ranges_of_any_size(device, n, recwarn):
    ids, scores = torch.randint(0, 4, (2, 9), device=device), torch.randn(2, V, device=device)
    assert torch.equal(DRYLogitsProcessor(1.0, range_=n)(ids, scores), DRYLogitsProcessor(1.0)(ids, scores))
    assert DRYLogitsProcessor(1.0, allowed_length=n)(ids, scores).equal(scores)
    assert (
        zoo.PreventHallucinationLogitsProcessor(TOKENIZER, tolerate=n, phrase="a").for_run(9)(ids, scores).equal(scores)
    )
    assert not recwarn.list


@pytest.mark.parametrize("size", [15, 16, 17, 18, 40])
def test_ngrams_of_any_length(backend, device, size):
    """On both sides of the length from which on the kernel compares in a loop."""
    text = torch.arange(45, device=device) % 21 % 16
    ids = torch.stack([text, torch.cat([text[:22], text[:23]])])
    scores = torch.zeros(2, V, device=device)
    expected = reference.NoRepeatNGramLogitsProcessor(size)(ids, scores)
    assert torch.equal(in_a_fold(fl.NoRepeatNGramLogitsProcessor(size))(ids, scores), expected)
    assert expected.isneginf().any() == (size <= 24)


# -- Floats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1.2e-38, 1e-37, 1e-30, 1e30, 3e38, 1e39, 1e300])
@pytest.mark.parametrize("name", ["TemperatureLogitsWarper", "RepetitionPenaltyLogitsProcessor"])
def test_divisors_as_in_torch(backend, device, name, value):
    """A tiny one overflows to infinity and 0 / 0 stays NaN as torch has it, bit for bit; a temperature has a least."""
    scores = torch.tensor([[3.0, -2.0, 0.0, -0.0, 1e-30, -1e-38, 1e38, INF, -INF, math.nan]], device=device)
    ids = torch.arange(10, device=device).unsqueeze(0)
    acts = max(value, 1e-30) if name.startswith("Temp") else value
    expected = getattr(reference, name)(acts)(ids, scores)
    if fold_kernels.FORCE_KERNEL and device == "cpu":
        # The kernels do what torch does on a GPU: it multiplies by the reciprocal, rounded once.
        divided = scores * torch.tensor(1 / acts, dtype=torch.float32)
        expected = divided if name.startswith("Temp") else torch.where(scores < 0, scores * value, divided)
    for processor in (getattr(fl, name)(value), fl.LogitsProcessorList([getattr(fl, name)(value)])):
        found = processor(ids, scores)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


# -- Ids that the logits don't have -------------------------------------------------------------------------------

# Image placeholders, padded embeddings, negative ids; the last token is one that the logits have, or isn't.
BEYOND = [V, V + 1, 31, 32, 33, 1000, 2**31 - 1, 2**31, 2**40, -1, -2, -100, -(2**31), -(2**40)]
READERS = {
    "repetition": lambda: fl.RepetitionPenaltyLogitsProcessor(1.5),
    "repetition, ignored": lambda: fl.RepetitionPenaltyLogitsProcessor(1.5, 1),
    "presence": lambda: fl.PresencePenaltyLogitsProcessor(0.5),
    "frequency": lambda: fl.FrequencyPenaltyLogitsProcessor(0.5),
    "1-grams": lambda: fl.NoRepeatNGramLogitsProcessor(1),
    "n-grams": lambda: fl.NoRepeatNGramLogitsProcessor(2),
    "encoder n-grams": lambda: fl.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([[1, 2, 3, 1000, -5, 2, 4]])),
    "bad words": lambda: fl.NoBadWordsLogitsProcessor([[1, 2], [3]]),
    "sequences": lambda: fl.SequenceBiasLogitsProcessor({(1, 2): 1.0, (2, 3): -1.0, (4,): 2.0}),
    "dry": lambda: DRYLogitsProcessor(1.0, allowed_length=1),
    "blank": lambda: fl.SuppressFirstTokens([1], blank=[2, 3]),
    "prompt": lambda: fl.OnlyTokensFrom("prompt", eos_token_id=2),
    "length": lambda: zoo.GenLengthLogitsProcessor(TOKENIZER, 1.0, complete_sentences=True),
    "cite": lambda: zoo.CiteFromPromptLogitsProcessor(TOKENIZER, 1.0, True, 2.0),
    "choose": lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, ["1", "2"], ".", 0.5),
    "last": lambda: zoo.ForceLastPhraseLogitsProcessor("a b", TOKENIZER),
    "timestamps": lambda: fl.WhisperTimeStampLogitsProcessor(
        fl_config(), begin_index=1, _detect_timestamp_from_logprob=False
    ),
}


def fl_config():
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=2, no_timestamps_token_id=8)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("choose", "timestamps", "length")])
def test_ids_that_the_logits_lack_count_for_nothing(backend, device, reader, alone):
    """What stands beside them counts as it does beside an id that no rule speaks of."""
    text = [3, 1, 2, 4, None, 1, 2, 2, None, 3, 1, 2, 1]
    scores = torch.randn(1, V, device=device)

    def after(other, end):
        # A new one, which remembers no text of before.
        run = (READERS[reader]() if alone else in_a_fold(READERS[reader]())).for_run(5)
        ids = [other if token is None else token for token in text] + ([other] if end else [])
        return run(torch.tensor([ids], device=device), scores)

    for end in (False, True):
        first, *others = [after(other, end) for other in BEYOND]
        assert first.shape == scores.shape
        for other in others:
            assert torch.equal(other, first)
        # With an id that the logits have in their place, only its own score may differ.
        if reader not in ("prompt", "blank"):
            inside = after(11, end)
            same = torch.arange(V, device=device) != 11
            assert torch.equal(inside[:, same], first[:, same])
            assert torch.equal(first[:, 11], scores[:, 11]) or reader in ("last",)


@pytest.mark.parametrize("reader", list(READERS))
def test_ids_that_the_logits_lack_are_no_error(backend, device, reader):
    run = READERS[reader]().for_run(3)
    for dtype in (torch.int64, torch.int32):
        beyond = [other for other in BEYOND if dtype is torch.int64 or -(2**31) <= other < 2**31]
        ids = torch.tensor([beyond, beyond[::-1]], dtype=dtype, device=device)
        processed = run(ids, torch.randn(2, V, device=device))
        assert processed.shape == (2, V)
