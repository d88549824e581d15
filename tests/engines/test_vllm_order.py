"""vLLM's two runners call a custom processor at two places: before its penalties, and behind them."""

import pytest
import torch
from transformers import LlamaForCausalLM

import fastlogits as fl
from tests.engines.test_vllm import asks, model, run  # noqa: F401  (a fixture)

pytest.importorskip("vllm", reason="needs vLLM: make test-engines")

# It rewards repetitions, so that the model repeats itself and fastlogits has something to penalise.
PENALTY = 0.5
# What fastlogits is asked for, and what does the same in transformers.
CASES = [
    ({"dry_multiplier": 4.0, "dry_base": 1.2, "dry_allowed_length": 1}, lambda: fl.DRYLogitsProcessor(4.0, 1.2, 1)),
    ({"no_repeat_ngram_size": 2}, lambda: fl.NoRepeatNGramLogitsProcessor(2)),
]
PROMPTS = [[1, 5, 6, 7] * 3, [1, 9, 9, 8] * 3, [1, 7, 6, 7] * 3]
COUNT = 24


@pytest.fixture(scope="module")
def expected(model):  # noqa: F811
    """Tokens of each case and prompt with fastlogits before the penalty, and behind it."""
    llama = LlamaForCausalLM.from_pretrained(model).eval()
    llama.generation_config.eos_token_id = None
    found = {"older": [], "newer": []}
    for runner, tokens in found.items():
        for _, make in CASES:
            for prompt in PROMPTS:
                ids = torch.tensor([prompt])
                chain = [make(), fl.RepetitionPenaltyLogitsProcessor(PENALTY)]
                chain = fl.LogitsProcessorList(chain if runner == "older" else chain[::-1])
                out = llama.generate(ids, max_new_tokens=COUNT, do_sample=False, logits_processor=chain)
                tokens.append(out[0, len(prompt) :].tolist())
    return found


def test_the_order_decides_for_a_bias_and_not_for_a_ban(expected):
    biased, banned = slice(0, len(PROMPTS)), slice(len(PROMPTS), None)
    for before, behind in zip(expected["older"][biased], expected["newer"][biased], strict=True):
        assert before != behind
    assert expected["older"][banned] == expected["newer"][banned]


@pytest.mark.parametrize("runner", ["older", "newer"])
def test_custom_processors_and_penalties(runner, model, installed, expected):  # noqa: F811
    call = [
        {"prompt": prompt, "params": {"max_tokens": COUNT, "repetition_penalty": PENALTY} | asks(**asked)}
        for asked, _ in CASES
        for prompt in PROMPTS
    ]
    (results,) = run(model, [call], runner, installed)["results"]
    assert results == expected[runner]
