"""The processors of the released logits-processor-zoo beside fused ones, and ours of the same names in their place."""

import contextlib

import pytest
import torch
from transformers import LogitsProcessorList

import fastlogits as fl
from tests.engines.companions import assert_same, generate, inputs_of, plain, tiny_model, tiny_tokenizer

theirs = pytest.importorskip(
    "logits_processor_zoo.transformers", reason="needs logits-processor-zoo: make test-engines"
)

PROMPTS = ["Which room?\n1. In\n2. Room\n3. zones\n4. km\n", "It's 1999."]

# What each is asked for; the original also wants to know the batch size where it remembers something for each row.
JOBS = {
    "GenLengthLogitsProcessor": {"boost_factor": 8.0},
    "CiteFromPromptLogitsProcessor": {"boost_factor": 2.0, "conditional_boost_factor": 3.0},
    "MultipleChoiceLogitsProcessor": {"choices": ["1", "2", "3"], "boost_first_words": 0.5},
    "ForceLastPhraseLogitsProcessor": {"phrase": " Room 101.", "batch_size": 2},
    "TriggerPhraseLogitsProcessor": {
        "phrase": " 12 km",
        "trigger_token_phrase": "7",
        "trigger_count": 2,
        "batch_size": 2,
    },
    "PreventHallucinationLogitsProcessor": {"minp": 0.5, "tolerate": 2, "phrase": " zones.", "batch_size": 2},
    "MaxTimeLogitsProcessor": {"max_time": 0.0},
}
# The end of the text has to be likely here for a phrase to come before it, and the trigger to be met.
LIKELIER = {"ForceLastPhraseLogitsProcessor": 2.0, "TriggerPhraseLogitsProcessor": 4.0}

SETTINGS = {
    "greedy": {"do_sample": False},
    "steered": {"do_sample": False, "repetition_penalty": 1.3, "min_length": 1, "bad_words_ids": [[40, 41, 42]]},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def tokenizer():
    # The original of MaxTime takes a prompt that is padded with the end of the text for one that has ended.
    return tiny_tokenizer(pad_token="<|reserved_1|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


def _asked(job, setting, tokenizer):
    """Arguments of ``generate``, which make likely what the job waits for."""
    token = {
        "ForceLastPhraseLogitsProcessor": tokenizer.eos_token_id,
        "TriggerPhraseLogitsProcessor": tokenizer.convert_tokens_to_ids("7"),
    }.get(job)
    bias = {} if token is None else {"sequence_bias": [[[token], LIKELIER[job]]]}
    return SETTINGS[setting] | bias | {"max_new_tokens": 20}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("job", JOBS)
def test_theirs_beside_fused_ones(job, setting, model, tokenizer):
    inputs, asked = inputs_of(tokenizer, PROMPTS), _asked(job, setting, tokenizer)

    def new():
        return getattr(theirs, job)(tokenizer=tokenizer, **JOBS[job])

    expected = plain(model, inputs, [new()], **asked)
    unsteered = plain(model, inputs, **asked)
    assert expected.sequences.tolist() != unsteered.sequences.tolist()  # it does something
    for kind in (LogitsProcessorList, fl.LogitsProcessorList):
        with fl.accelerate(model):
            assert_same(generate(model, inputs, kind([new()]), **asked), expected)
    decoded = []
    for accelerated in (False, True):
        with fl.accelerate(model) if accelerated else contextlib.nullcontext():
            decoded.append(generate(model, inputs, [new()], custom_generate=fl.decode, **asked))
    assert_same(decoded[1], decoded[0])
    if setting != "sampled":
        assert_same(decoded[0], expected)


@pytest.mark.parametrize("job", JOBS)
def test_theirs_in_a_list(job, tokenizer):
    """Step by step, with scores that stay what they were."""
    ids = inputs_of(tokenizer, PROMPTS)["input_ids"]
    original = getattr(theirs, job)(tokenizer=tokenizer, **JOBS[job])
    processors = fl.LogitsProcessorList(
        [
            fl.MinLengthLogitsProcessor(1, tokenizer.eos_token_id),  # nothing to do: the prompt is longer
            getattr(theirs, job)(tokenizer=tokenizer, **JOBS[job]),
            fl.TemperatureLogitsWarper(0.5),
        ]
    )
    torch.manual_seed(0)
    for _ in range(12):
        scores = 4 * torch.randn(2, len(tokenizer))
        given = scores.clone()
        expected = original(ids, scores.clone()) / 0.5
        processed = processors(ids, scores)
        assert torch.equal(processed, expected)
        assert torch.equal(scores, given)
        ids = torch.cat([ids, processed.argmax(-1, keepdim=True)], 1)


# Without the one that reads a clock: two runs don't take the same time.
@pytest.mark.parametrize("setting", ["greedy", "steered"])
@pytest.mark.parametrize("job", [job for job in JOBS if job != "MaxTimeLogitsProcessor"])
def test_ours_in_their_place(job, setting, model, tokenizer):
    """The same tokens where the likeliest is taken; the originals leave a sampler what they don't want."""
    inputs, asked = inputs_of(tokenizer, PROMPTS), _asked(job, setting, tokenizer)
    original = getattr(theirs, job)(tokenizer=tokenizer, **JOBS[job])
    expected = plain(model, inputs, [original], **asked).sequences
    ours = getattr(fl, job)(tokenizer=tokenizer, **JOBS[job])
    processors = fl.LogitsProcessorList([ours])
    assert torch.equal(generate(model, inputs, processors, **asked).sequences, expected)
    with fl.accelerate(model):
        for custom in (None, fl.decode):  # the same object for run after run
            again = generate(model, inputs, [ours], custom_generate=custom, **asked)
            assert torch.equal(again.sequences, expected)
