"""Released vLLM with fastlogits' samplers: a request's tokens are its own, whatever the engine does around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engines.companions import tiny_model, tiny_tokenizer

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

HERE = Path(__file__).parent
BEYOND = 24  # logits that the tokenizer has no tokens for
# Blocks for a few requests only, prompts that take several steps, and prompts that others begin with.
TIGHT = {
    "num_gpu_blocks_override": 6, "block_size": 32, "max_model_len": 96, "max_num_batched_tokens": 24, "max_num_seqs": 6
}  # fmt: skip
DRAFTS = {
    "speculative_config": {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1
    }
}  # fmt: skip
LONG = list(range(40, 76))


def asks(**options):
    return {"extra_args": {"fastlogits": options}}


# What a request may ask for; each gets its own prompt, seed and length.
KINDS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 1.2},
    "likeliest": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "min_p": {"temperature": 1.4, "min_p": 0.02, "top_p": 0.95},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.4},
    "greedy_penalties": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "bias": {"temperature": 1.0, "logit_bias": {35: 3.0, 70: -100.0}},
    "allowed": {"temperature": 1.5, "allowed_token_ids": list(range(30, 90, 2))},
    "bad_words": {"temperature": 1.0, "bad_words": ["7", "ab", "e"]},
    "unended": {"temperature": 1.3, "min_tokens": 5, "stop_token_ids": list(range(20, 140))},
    "logprobs": {"temperature": 0.8, "logprobs": 4},
    "named_logprobs": {"temperature": 0.8, "logprob_token_ids": [5, 90, 41]},
    "prompt_logprobs": {"temperature": 0.8, "prompt_logprobs": 2, "logprobs": 0},
    "several": {"temperature": 1.1, "n": 3, "top_k": 30},
    "grammar": {"temperature": 1.0, "structured_outputs": {"regex": "[a-f]{4,9}"}, "ignore_eos": False},
    "unended_grammar": {
        "temperature": 1.0, "structured_outputs": {"choice": ["ab", "cad"]}, "min_tokens": 9, "ignore_eos": False
    },
    "options": {"temperature": 1.2, **asks(no_repeat_ngram_size=2, epsilon=1e-3, banned_token_ids=[60, 61])},
    "forced": {"temperature": 1.0, **asks(forced_tokens=[80, 81, 80, 81, 80, 81, 80, 81], dry_multiplier=2.0)},
}  # fmt: skip
COUNT = 50


def requests(kinds=KINDS, count=COUNT):
    """Requests of all kinds, with prompts of their own or shared ones, long and short."""
    made = []
    for index in range(count):
        name = list(kinds)[index % len(kinds)]
        prompt = [*LONG, 30 + index] if index % 4 == 0 else [31 + index, *[45, 46] * 11, 45]
        params = {"seed": index, "max_tokens": 8 + index % 9, "ignore_eos": True, **kinds[name]}
        made.append({"kind": name, "prompt": prompt, "params": params})
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    tiny_model(tokenizer, BEYOND, **sizes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(model, calls, runner, installed, switch="1", **engine):
    """Start an engine with the samplers, serve, and end it."""
    asked = {
        "runner": runner,
        "calls": calls,
        "serves": True,
        "engine": {"model": str(model), "skip_tokenizer_init": False, **engine},
    }
    path = os.pathsep.join([str(installed), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_engine.py")],
        input=json.dumps(asked),
        env=os.environ | {"PYTHONPATH": path, "FASTLOGITS_VLLM_SAMPLER": switch},
        cwd=model,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stdout + done.stderr}


def assert_same(found, expected):
    """Tokens, and log-probabilities as far as batches of other sizes round alike."""
    assert found["tokens"] == expected["tokens"]
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = flat(found[name]), flat(expected[name])
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == pytest.approx(theirs[key], abs=1e-3), key


def flat(value, key=()):
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, list):
        value = enumerate(value)
    else:
        return {key: value}
    return {at: number for name, each in value for at, number in flat(each, (*key, str(name))).items()}


@pytest.fixture(scope="module")
def alone(model, installed):
    """Each request by itself: one at a time, without drafts, in an engine that never preempts."""
    answer = run(model, [requests()], "newer", installed, max_num_seqs=1, enable_prefix_caching=False)
    assert answer["samplers"] == ["fastlogits.integrations.vllm_sampler"]
    assert answer["preemptions"] == 0
    return answer["results"][0]


@pytest.mark.parametrize("drafts", [{}, DRAFTS], ids=["plain", "drafts"])
def test_alone_and_together(drafts, model, installed, alone):
    call = requests()
    if drafts:
        # vLLM refuses these two with drafts.
        call = [request for request in call if request["kind"] not in ("min_p", "bias")]
        alone = [found for request, found in zip(requests(), alone, strict=True) if request in call]
    leaving = [3, 17, 30, 40]
    for index in leaving:
        call[index]["abort_after"] = 2 + index // 3
    answer = run(model, [call], "newer", installed, enable_prefix_caching=True, **TIGHT, **drafts)
    assert answer["preemptions"] > 0
    assert set(answer["samplers"]) == {"fastlogits.integrations.vllm_sampler"}
    assert answer["places"]["rows"] > (0 if drafts else 100)
    assert answer["places"]["elsewhere"] == 0
    if drafts:
        assert answer["drafted"] > answer["accepted"] > 10
    for index, (request, found, expected) in enumerate(zip(call, answer["results"][0], alone, strict=True)):
        if found is None:
            assert index in leaving
        else:
            assert_same(found, expected)
            assert len(expected["tokens"]) == request["params"].get("n", 1)


def test_requests_get_what_they_ask_for(alone, tokenizer):
    for request, found in zip(requests(), alone, strict=True):
        kind, params, outputs = request["kind"], request["params"], found["tokens"]
        if kind == "allowed":
            assert set(outputs[0]) <= set(params["allowed_token_ids"])
        elif kind == "unended":
            assert not set(outputs[0][:5]) & set(params["stop_token_ids"])
        elif kind == "logprobs":
            assert all(len(step) in (4, 5) for step in found["logprobs"][0])
        elif kind == "named_logprobs":
            assert all(set(step) >= {"5", "90", "41"} for step in found["logprobs"][0])
        elif kind == "several":
            assert len({tuple(tokens) for tokens in outputs}) == 3
        elif kind == "grammar":
            assert set(found["texts"][0]) <= set("abcdef")
        elif kind == "unended_grammar":
            assert found["texts"][0] in ("ab", "cad")
        elif kind == "options":
            pairs = list(zip(request["prompt"] + outputs[0], (request["prompt"] + outputs[0])[1:], strict=False))
            assert not set(outputs[0]) & {60, 61}
            assert all(pair not in pairs[:at] for at, pair in enumerate(pairs) if at >= len(request["prompt"]))
        elif kind == "forced":
            assert outputs[0][:8] == [80, 81] * 4


def test_the_table_of_the_documents_names_every_field():
    from vllm import SamplingParams

    table = (HERE.parents[1] / "docs" / "migration.md").read_text()
    assert [name for name in SamplingParams.__struct_fields__ if name[0] != "_" and f"`{name}`" not in table] == []


def test_greedy_requests_get_what_vllm_gives_them(model, installed, alone):
    """Penalties included; the older runner's own sampler runs on a CPU."""
    greedy = [index for index, request in enumerate(requests()) if request["params"]["temperature"] == 0]
    call = [requests()[index] for index in greedy]
    answer = run(model, [call], "older", installed, switch="0")
    assert answer["samplers"] == ["vllm.v1.sample.sampler"]
    for found, index in zip(answer["results"][0], greedy, strict=True):
        assert found["tokens"] == alone[index]["tokens"]


# -- What runs beside it ----------------------------------------------------------------------------------------------

PREFER = {"logits_processors": ["vllm_foreign:Prefer"]}
AMONG_OTHERS = {
    "plain": {"temperature": 1.1, "top_k": 30},
    "preferring": {"temperature": 1.1, "top_k": 30, "extra_args": {"prefer": 2.0}},
    "preferring_much": {"temperature": 0, "repetition_penalty": 1.5, "extra_args": {"prefer": 50.0}},
    "grammar": {"temperature": 1.0, "structured_outputs": {"regex": "[a-f]{4,9}"}, "ignore_eos": False},
}


def test_processors_of_others(model, installed, alone):
    """Between penalties and temperature; a request that doesn't ask for them has the tokens that it ever has."""
    call = requests(AMONG_OTHERS, 12)
    single = [request | {"params": request["params"] | {"extra_args": None}} for request in call]
    ours = run(model, [call, *[[request] for request in call[:4]], single], "newer", installed, **PREFER)
    together, *each, without = ours["results"]
    assert ours["samplers"] == ["fastlogits.integrations.vllm_sampler"]
    for index, found in enumerate(each):
        assert_same(together[index], found[0])
    for request, found, plain in zip(call, together, without, strict=True):
        if "preferring" in request["kind"]:
            assert found["tokens"] != plain["tokens"]
        else:
            assert_same(found, plain)
        if request["kind"] == "preferring_much":
            assert all(token % 3 == 0 for token in found["tokens"][0])


REPORTING = {
    "plain": {"temperature": 0.7, "top_k": 3},
    "logprobs": {"temperature": 0.7, "top_k": 3, "logprobs": 4},
    "greedy": {"temperature": 0, "logprobs": 2, "logit_bias": {40: -100.0}},
    "named": {"temperature": 0.9, "logprob_token_ids": [40, 41]},
}


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits", "raw_logits"])
def test_what_is_reported(mode, model, installed):
    call = requests(REPORTING, 8)
    ours = run(model, [call, *[[request] for request in call[:4]]], "newer", installed, logprobs_mode=mode)
    together, *each = ours["results"]
    for index, found in enumerate(each):
        assert_same(together[index], found[0])
    for request, found in zip(call, together, strict=True):
        steps = found["logprobs"][0]
        assert (steps is None) is (request["kind"] == "plain")
        if request["kind"] == "logprobs" and mode == "processed_logprobs":
            for token, step in zip(found["tokens"][0], steps, strict=True):
                assert len(step) <= 3  # no more are left
                assert sum(torch.tensor([value for value, _ in step.values()]).exp()) == pytest.approx(1, abs=1e-4)
                assert str(token) in step
        if request["kind"] == "greedy":
            assert all(step[str(token)][1] == 1 for token, step in zip(found["tokens"][0], steps, strict=True))


# -- The older runner -------------------------------------------------------------------------------------------------

# What it refuses, or can't give a request by itself, is left out.
OLDER = {name: params for name, params in KINDS.items() if name not in ("unended_grammar", "named_logprobs")}


def test_the_older_runner(model, installed):
    call = requests(OLDER, 40)
    # On a CPU vLLM can't take a prompt with a seed in pieces.
    whole = TIGHT | {"max_num_batched_tokens": 512}
    together = run(model, [call], "older", installed, enable_prefix_caching=True, **whole)
    single = run(model, [call], "older", installed, max_num_seqs=1, enable_prefix_caching=False)
    assert together["samplers"] == single["samplers"] == ["fastlogits.integrations.vllm_older_sampler"]
    assert together["preemptions"] > single["preemptions"] == 0
    for found, expected in zip(together["results"][0], single["results"][0], strict=True):
        assert_same(found, expected)


# -- Neighbours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runner", "switch"), [("older", "1"), ("newer", "1"), ("older", "0")])
def test_neighbours_are_drawn_from_their_own_distribution(runner, switch, model, installed, tokenizer):
    """Without a seed, beside requests that ask for much: as often as the model and the truncation say."""
    count, prompt, temperature, top_k = 400, [33, 45, 46], 1.3, 8
    asking = requests(OLDER, 16)
    plain = {"temperature": temperature, "top_k": top_k, "max_tokens": 1, "n": count // 4}
    call = [*asking[:8], *[{"prompt": prompt, "params": plain} for _ in range(4)], *asking[8:]]
    answer = run(model, [call], runner, installed, switch=switch, max_num_seqs=64)
    tokens = [each[0] for found in answer["results"][0][8:12] for each in found["tokens"]]
    assert len(tokens) == count
    llama = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = llama(torch.tensor([prompt])).logits[0, -1]
    kept = logits.topk(top_k)
    share = torch.softmax(kept.values / temperature, 0)
    counts = torch.tensor([tokens.count(token) for token in kept.indices.tolist()])
    assert counts.sum() == count
    frequent = share * count >= 5
    squares = ((counts - share * count) ** 2 / (share * count))[frequent]
    assert frequent.sum() > 3
    assert squares.sum() < 30  # of chi-square with at most 7 degrees of freedom, more in 1 of 10,000


def test_neighbours_of_the_processor_alone(model, installed):
    """With vLLM's own sampler they get what vLLM gives them, seeds included, whatever requests beside them ask for."""
    seeded = [
        {"prompt": [33 + i, 45, 46], "params": {"temperature": 1.2, "top_p": 0.95, "seed": i, "max_tokens": 12}}
        for i in range(8)
    ]
    asking = requests({name: KINDS[name] for name in ("options", "forced")}, 8)
    mixed = [each for pair in zip(seeded, asking, strict=True) for each in pair]
    without = run(model, [seeded], "older", model, switch="0")
    beside = run(model, [mixed], "older", installed, switch="0")
    assert [without["loaded"], beside["loaded"]] == [False, True]
    assert without["samplers"] == beside["samplers"] == ["vllm.v1.sample.sampler"]
    found, expected = beside["results"][0][::2], without["results"][0]
    assert [each["tokens"] for each in found] == [each["tokens"] for each in expected]
