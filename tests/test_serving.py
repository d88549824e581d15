"""Requests in a batch of their own parameters, beside the processors, and beside each of them alone."""

import pytest
import torch
from fastlogits_kernels import _triton, slot_sets

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams, TokenMask

V = 101
INF = float("inf")


def logits_of(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def history_of(length: int, seed: int = 0, most: int = 12) -> list[int]:
    return torch.randint(0, most, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT, OUTPUT = history_of(20, 1), history_of(9, 2)


def chain(*processors):
    """The processors as a list for a run, given what has been generated already."""
    return fl.LogitsProcessorList(list(processors))


FEATURES = {
    "nothing": ({}, []),
    "temperature": ({"temperature": 0.7}, [lambda: fl.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 5}, [lambda: fl.TopKLogitsWarper(5)]),
    "top_k beyond V": ({"top_k": 500}, []),
    "top_p": ({"top_p": 0.8}, [lambda: fl.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, [lambda: fl.MinPLogitsWarper(0.1)]),
    "typical": ({"typical_p": 0.7}, [lambda: fl.TypicalLogitsWarper(0.7)]),
    "epsilon": ({"epsilon": 0.01}, [lambda: fl.EpsilonLogitsWarper(0.01)]),
    "eta": ({"eta": 0.01}, [lambda: fl.EtaLogitsWarper(0.01, device="cpu")]),
    "top_n_sigma": ({"top_n_sigma": 1.0}, [lambda: fl.TopNSigmaLogitsWarper(1.0)]),
    "repetition": ({"repetition_penalty": 1.3}, [lambda: fl.RepetitionPenaltyLogitsProcessor(1.3)]),
    "presence": ({"presence_penalty": 0.4}, [lambda: fl.PresencePenaltyLogitsProcessor(0.4)]),
    "frequency": ({"frequency_penalty": -0.3}, [lambda: fl.FrequencyPenaltyLogitsProcessor(-0.3)]),
    "dry": (
        {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_breakers": (3, 4)},
        [lambda: fl.DRYLogitsProcessor(0.8, 1.5, 1, (3, 4))],
    ),
    "bias": ({"logit_bias": {4: 1.5, 90: -2.0}}, [lambda: fl.LogitBiasLogitsProcessor({4: 1.5, 90: -2.0})]),
    "allowed": ({"allowed_token_ids": range(0, V, 3)}, [lambda: fl.AllowedTokensLogitsProcessor(range(0, V, 3))]),
    "banned": ({"banned_token_ids": [5, 7]}, [lambda: fl.SuppressTokensLogitsProcessor([5, 7], "cpu")]),
    "many banned": ({"banned_token_ids": range(80)}, [lambda: fl.SuppressTokensLogitsProcessor(range(80), "cpu")]),
    "bad words": (
        {"bad_words": [[7], [OUTPUT[-1], 9], [*OUTPUT[-2:], 11], [90, 91]]},
        [lambda: fl.NoBadWordsLogitsProcessor([[7], [OUTPUT[-1], 9], [*OUTPUT[-2:], 11], [90, 91]])],
    ),
    "ngram": ({"no_repeat_ngram_size": 2}, [lambda: fl.NoRepeatNGramLogitsProcessor(2)]),
    "unigram": ({"no_repeat_ngram_size": 1}, [lambda: fl.NoRepeatNGramLogitsProcessor(1)]),
    "min tokens": (
        {"min_tokens": 10, "stop_token_ids": [1, 2]},
        [lambda: fl.MinNewTokensLengthLogitsProcessor(len(PROMPT), 10, [1, 2], "cpu")],
    ),
    "enough tokens": ({"min_tokens": 9, "stop_token_ids": [1, 2]}, []),
    "first tokens": (
        {"first_tokens_suppressed": [8, 9], "first_window": 10},
        [lambda: fl.SuppressFirstTokens([8, 9], window=10)],
    ),
    "many first tokens": (
        {"first_tokens_suppressed": TokenMask.from_ids(range(90), V), "first_window": 10},
        [lambda: fl.SuppressFirstTokens(range(90), window=10)],
    ),
    "later": ({"first_tokens_suppressed": [8, 9], "first_window": 9}, []),
    "penalties": (
        {
            "logit_bias": {3: 0.7}, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.2,
            "no_repeat_ngram_size": 3, "temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02,
        },
        [
            lambda: fl.LogitBiasLogitsProcessor({3: 0.7}),
            lambda: fl.RepetitionPenaltyLogitsProcessor(1.2),
            lambda: fl.FrequencyPenaltyLogitsProcessor(0.1),
            lambda: fl.PresencePenaltyLogitsProcessor(0.2),
            lambda: fl.NoRepeatNGramLogitsProcessor(3),
            lambda: fl.TemperatureLogitsWarper(1.7),
            lambda: fl.TopKLogitsWarper(40),
            lambda: fl.TopPLogitsWarper(0.9),
            lambda: fl.MinPLogitsWarper(0.02),
        ],
    ),
}  # fmt: skip


@pytest.fixture(params=["torch", "kernels"])
def path(request, monkeypatch):
    """Both ways of the CPU: torch, and the kernels in Triton's interpreter; on a GPU, the kernels."""
    if torch.cuda.is_available():
        if request.param == "torch":
            pytest.skip("on a GPU the kernels run")
    elif request.param == "kernels":
        if not _triton.HAS_TRITON:
            pytest.skip("needs Triton")
        monkeypatch.setattr(slot_sets, "FORCE_KERNEL", True)
    return request.param


@pytest.mark.parametrize("feature", FEATURES)
def test_a_request_gets_what_the_processors_of_its_parameters_give(feature, device, path):
    arguments, made = FEATURES[feature]
    batch = BatchProcessor(3, V, device, max_length=64)
    slot = batch.add(RequestParams(**arguments), PROMPT, OUTPUT, slot=1)
    logits = logits_of(1).to(device)
    ids = torch.tensor([PROMPT + OUTPUT], device=device)
    expected = logits.clone()
    if made:
        expected = chain(*(make() for make in made))(ids, expected, prompt_length=len(PROMPT))
    processed = batch.apply(logits, [slot])
    torch.testing.assert_close(processed, expected, rtol=1e-5, atol=1e-5)
    assert batch.apply_(logits, [slot]) is logits
    assert torch.equal(logits, processed)
