"""Released vLLM with the plug-in, engines of both runners: what is steered is as in transformers, the rest as ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlogits as fl

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

V = 1000  # vLLM pads logits to 1024 columns
NAMED = {"logits_processors": ["fastlogits.integrations.vllm:FastLogitsProcessor"]}
# Blocks for about three requests of 60 tokens, and prompts that take several steps.
TIGHT = {"num_gpu_blocks_override": 9, "block_size": 32, "max_num_batched_tokens": 16, "enable_prefix_caching": False}
PHRASE = [5, 6, 7] * 6
LONG = list(range(100, 140))


def asks(**options):
    return {"extra_args": {"fastlogits": options}}


# Prompt, tokens to generate, vLLM's parameters, and what does the same in transformers; None for a request that asks
# fastlogits for nothing.
REQUESTS = [
    ([1, 5, 6, 7], 60, {}, None),
    ([1, 6, 6, 7], 60, asks(no_repeat_ngram_size=1), [lambda n: fl.NoRepeatNGramLogitsProcessor(1)]),
    ([*LONG, 9], 40, {}, None),
    (
        [1, 9],
        50,
        {"extra_args": {"fastlogits": json.dumps({"forced_tokens": PHRASE, "no_repeat_ngram_size": 2})}},
        [lambda n: fl.NoRepeatNGramLogitsProcessor(2), lambda n: forcing(PHRASE, n)],
    ),
    (
        [*LONG, 8],
        30,
        asks(dry_multiplier=9.0, dry_allowed_length=1, banned_token_ids=[545, 735, 919]),
        [lambda n: fl.DRYLogitsProcessor(9.0, 1.75, 1), lambda n: fl.SuppressTokensLogitsProcessor([545, 735, 919])],
    ),
    ([1, 7, 6, 7], 20, {"repetition_penalty": 1.3}, None),
    # Nothing but the likeliest token is left of a distribution, at a temperature that would draw others.
    ([1, 8, 6, 7], 25, {"temperature": 1.5, "seed": 3} | asks(epsilon=0.99), []),
    (
        [1, 225, 6],
        12,
        asks(first_tokens_suppressed=list(range(500)), first_window=3, bad_words=[[541, 326]]),
        [lambda n: fl.SuppressFirstTokens(range(500), 3), lambda n: fl.NoBadWordsLogitsProcessor([[541, 326]])],
    ),
    ([1, 8, 6, 7], 5, {}, None),
]
OUTSIDE = [
    {"forced_tokens": [1, V]}, {"banned_token_ids": [1, V]}, {"bad_words": [[1], [2, V]]}, {"dry_breakers": [V]},
    {"first_tokens_suppressed": [V]},
]  # fmt: skip
CALL = [{"prompt": prompt, "params": {"max_tokens": count, **params}} for prompt, count, params, _ in REQUESTS]
PLAIN = [index for index, request in enumerate(REQUESTS) if request[3] is None]


def forcing(tokens, prompt_length):
    """The first tokens are these."""

    def process(input_ids, scores):
        step = input_ids.shape[1] - prompt_length
        if step >= len(tokens):
            return scores
        forced = torch.full_like(scores, float("-inf"))
        forced[:, tokens[step]] = 0
        return forced

    return process


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.4,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(model) -> dict[int, list[int]]:
    """What transformers generates where fastlogits is asked for something."""
    llama = LlamaForCausalLM.from_pretrained(model).eval()
    llama.generation_config.eos_token_id = None
    found = {}
    for index, (prompt, count, _, processors) in enumerate(REQUESTS):
        if processors is not None:
            ids = torch.tensor([prompt])
            chain = fl.LogitsProcessorList([make(len(prompt)) for make in processors])
            out = llama.generate(
                ids, max_new_tokens=count, do_sample=False, logits_processor=chain, attention_mask=torch.ones_like(ids)
            )
            found[index] = out[0, len(prompt) :].tolist()
    return found


def run(model, calls, runner, path=None, asynchronous=False, **engine):
    """Start an engine, generate, and end it; ``path`` is where fastlogits is installed, None for an engine without."""
    asked = {
        "runner": runner,
        "calls": calls,
        "asynchronous": asynchronous,
        "engine": {"model": str(model), "max_num_seqs": 4, **engine},
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_engine.py"))],
        input=json.dumps(asked),
        env=environment,
        cwd=model,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["asynchronous"] == asynchronous
    return answer


@pytest.fixture(scope="module")
def alone(model):
    """The requests that ask for nothing, in an engine without fastlogits."""
    answer = run(model, [[CALL[index] for index in PLAIN]], "older")
    assert not answer["loaded"]
    return dict(zip(PLAIN, answer["results"][0], strict=True))


def check(results, alone, expected):
    assert [len(tokens) for tokens in results] == [count for _, count, _, _ in REQUESTS]
    for index, tokens in enumerate(results):
        assert tokens == (alone | expected)[index], index


def test_the_requests_tell_a_working_plugin_from_none(model, alone, expected):
    ignored = [{**request, "params": {**request["params"], "extra_args": None}} for request in CALL]
    (results,) = run(model, [ignored], "older")["results"]
    for index, (_, _, params, _) in enumerate(REQUESTS):
        if index in PLAIN:
            assert results[index] == alone[index]
        elif "temperature" not in params:
            assert results[index] != expected[index], index


@pytest.mark.parametrize("runner", ["older", "newer"])
def test_entry_point(model, installed, alone, expected, runner):
    plain = [CALL[index] for index in PLAIN]
    wrong = [
        {"prompt": [1], "params": asks(top_k=5)},
        {"prompt": [1], "params": asks(no_repeat_ngram=5)},
        {"prompt": [1], "params": asks(dry_multiplier=-1.0)},
        {"prompt": [1], "params": {"extra_args": {"fastlogits": "{"}}},
        {"prompt": [1], "params": asks(bad_words=[list(range(100))] * 100)},
        *({"prompt": [1], "params": asks(no_repeat_ngram_size=2, **outside)} for outside in OUTSIDE),
    ]
    calls = [plain, CALL, *[[request] for request in wrong], [CALL[1]], CALL]
    answer = run(model, calls, runner, installed)
    idle, together, *refused, again, last = answer["results"]
    assert answer["loaded"]
    assert answer["working"] == [False] + [True] * (len(calls) - 1)
    assert dict(zip(PLAIN, idle, strict=True)) == alone
    check(together, alone, expected)
    messages = [
        "has 'top_k', which the engine itself applies",
        "has 'no_repeat_ngram', which is unknown; there are banned_token_ids, bad_words",
        "dry_multiplier must be a finite number of at least 0 and at most 3.40282e+38, got -1.0",
        "must be a mapping from names to values, or one in JSON, got '{'",
        "forced_tokens and bad_words take 10100 words",
        *(f"{name} must have token ids of the vocabulary, 0 to {V - 1}, got {V}" for each in OUTSIDE for name in each),
    ]
    for message, refusal in zip(messages, refused, strict=True):
        assert message in refusal
    assert again[0] == expected[1]
    check(last, alone, expected)


@pytest.mark.parametrize("runner", ["older", "newer"])
def test_what_has_acted_before_logits_processors_see_the_logits(model, installed, runner):
    """Bias and bans of vLLM's own come before in both runners; penalties in the newer one, but after in the older."""
    only_the_largest = asks(top_n_sigma=1e-6)
    penalized, biased, allowed = {"repetition_penalty": 5.0}, {"logit_bias": {33: 100.0}}, {"allowed_token_ids": [7, 8]}

    def generate(**params):
        return {"prompt": [1, 5, 6, 7], "params": {"max_tokens": 12, **params}}

    ((first,),) = run(model, [[generate()]], runner, installed)["results"]
    unended = {"min_tokens": 12, "stop_token_ids": first[:1]}
    kinds = [{}, penalized, biased, allowed, unended]
    call = [generate(**kind, **more) for kind in kinds for more in ({}, only_the_largest)]
    results = run(model, [call], runner, installed)["results"][0]
    without, among_largest = results[::2], results[1::2]
    for plain in without[1:]:
        assert plain != without[0]
    seen = without if runner == "newer" else [without[0], without[0], *without[2:]]
    assert among_largest == seen


def test_the_older_runner_refuses_what_speculative_decoding_keeps_from_it(model, installed):
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    answer = run(model, [[CALL[0]], [CALL[1]]], "older", installed, speculative_config=drafting)
    plain, refused = answer["results"]
    assert len(plain[0]) == 60
    assert "must be left out with speculative decoding" in refused


@pytest.mark.parametrize("runner", ["older", "newer"])
def test_preempted_in_chunks_asynchronous_and_named_beside_the_entry_point(model, installed, alone, expected, runner):
    answer = run(model, [CALL, CALL], runner, installed, asynchronous=True, **TIGHT, **NAMED)
    assert answer["preemptions"] > 0
    for results in answer["results"]:
        check(results, alone, expected)


def test_asynchronous_by_entry_point_alone(model, installed, alone, expected):
    """Nothing then tells the older runner to fill in the tokens that requests have generated."""
    (results,) = run(model, [CALL], "older", installed, asynchronous=True)["results"]
    check(results, alone, expected)


def test_named_from_a_checkout(model, alone, expected):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    (results,) = run(model, [CALL], "newer", path, **NAMED)["results"]
    check(results, alone, expected)


def test_draft_tokens(model, installed, alone, expected):
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    answer = run(model, [CALL], "newer", installed, speculative_config=drafting)
    # The forced phrase repeats itself, so that drafts of it are accepted; after it they must not be.
    assert answer["accepted"] >= 9
    assert answer["drafted"] > answer["accepted"]
    check(answer["results"][0], alone, expected)
