"""Models with adapters: what ``generate`` gives without fastlogits, while adapters come, go and change."""

import copy
from contextlib import nullcontext

import pytest
import torch

import fastlogits as fl
from tests.engines.companions import assert_same, generate, inputs_of, plain, tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft", reason="needs peft: make test-engines")

GREEDY = {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "max_new_tokens": 12}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "max_new_tokens": 12}
SETTINGS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "beams": GREEDY | {"num_beams": 3},
    "several": SAMPLED | {"num_return_sequences": 2},
}


class Forbid:
    """A processor of one's own that writes in place."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        scores[:, self.tokens] = -float("inf")
        return scores


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def _lora(**changes):
    # Adapters that begin as nothing would change no token.
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 64, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | changes)


def _adapted(tokenizer, kind="lora"):
    model = tiny_model(tokenizer)
    torch.manual_seed(1)
    if kind == "lora":
        return peft.get_peft_model(model, _lora()).eval()
    if kind == "ia3":
        config = peft.IA3Config(init_ia3_weights=False, task_type="CAUSAL_LM")
    elif kind == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    else:
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


# What people hold in their hands: the wrapper, or the model in it.
HOLDS = {
    "the_wrapper": lambda model: model,
    "the_model_in_it": lambda model: model.get_base_model(),
    "all": lambda _: None,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("held", HOLDS)
def test_lora(held, setting, tokenizer):
    model, inputs, asked = _adapted(tokenizer), inputs_of(tokenizer), SETTINGS[setting]
    expected = plain(model, inputs, [Forbid(40, 41)], **asked)
    without = plain(model.get_base_model(), inputs, [Forbid(40, 41)], **asked)
    with model.disable_adapter():
        unadapted = plain(model, inputs, [Forbid(40, 41)], **asked)
    assert expected.sequences.tolist() == without.sequences.tolist() != unadapted.sequences.tolist()
    accelerated = HOLDS[held](model)
    with fl.accelerate(accelerated):
        assert_same(generate(model, inputs, [Forbid(40, 41)], **asked), expected)
        with model.disable_adapter():
            assert_same(generate(model, inputs, [Forbid(40, 41)], **asked), unadapted)
        assert_same(generate(model, inputs, [Forbid(40, 41)], **asked), expected)
        if setting == "greedy":
            assert_same(generate(model, inputs, [Forbid(40, 41)], custom_generate=fl.decode, **asked), expected)
    assert_same(plain(model, inputs, [Forbid(40, 41)], **asked), expected)


@pytest.mark.parametrize("kind", ["ia3", "prompt", "prefix"])
def test_other_adapters(kind, tokenizer):
    """Those that put tokens of their own before the prompt count on positions and lengths of the text alone."""
    model, inputs = _adapted(tokenizer, kind), inputs_of(tokenizer)
    for asked in (GREEDY, SAMPLED):
        expected = plain(model, inputs, **asked)
        with fl.accelerate(model):
            assert_same(generate(model, inputs, **asked), expected)
    first = expected.sequences[:, inputs["input_ids"].shape[1]].tolist()
    forbidding = [fl.SuppressFirstTokens(first)]
    told = generate(model, inputs, fl.LogitsProcessorList(forbidding), **GREEDY)
    with fl.accelerate(model):
        assert_same(generate(model, inputs, forbidding, **GREEDY), told)
        assert_same(generate(model, inputs, forbidding, custom_generate=fl.decode, **GREEDY), told)


def test_it_is_accelerated(tokenizer):
    """A first-step processor in a plain list works under ``accelerate`` alone: it knows where the run starts."""
    model, inputs = _adapted(tokenizer), inputs_of(tokenizer)
    first = plain(model, inputs, **GREEDY).sequences[:, inputs["input_ids"].shape[1]].tolist()
    with pytest.raises(ValueError, match="prompt_length"):
        generate(model, inputs, [fl.SuppressFirstTokens(first)], **GREEDY)
    for held in HOLDS.values():
        with fl.accelerate(held(model)):
            output = generate(model, inputs, [fl.SuppressFirstTokens(first)], **GREEDY)
        assert not set(output.sequences[:, inputs["input_ids"].shape[1]].tolist()) & set(first)
    fl.accelerate(model)
    fl.restore(model)
    with pytest.raises(ValueError, match="prompt_length"):
        generate(model, inputs, [fl.SuppressFirstTokens(first)], **GREEDY)


def test_adapters_that_change(tokenizer):
    """Accelerated once; then adapters are added, chosen, merged and taken out."""
    inputs, expected = inputs_of(tokenizer), []

    def life(accelerated):
        model = tiny_model(tokenizer)
        with fl.accelerate(model) if accelerated else nullcontext():
            torch.manual_seed(1)
            adapted = peft.get_peft_model(model, _lora())
            adapted.add_adapter("second", _lora(r=2))
            yield generate(adapted.eval(), inputs, **GREEDY)
            adapted.set_adapter("second")
            yield generate(adapted, inputs, **GREEDY)
            yield generate(adapted, inputs, **SAMPLED)
            yield generate(adapted.merge_and_unload(), inputs, **GREEDY)

    expected, ours = list(life(False)), list(life(True))
    assert len({str(output.sequences.tolist()) for output in expected[:2]}) == 2
    for mine, other in zip(ours, expected, strict=True):
        assert_same(mine, other)


def test_drafts_by_the_model_without_its_adapter(tokenizer):
    model, draft = _adapted(tokenizer), tiny_model(tokenizer)
    inputs = inputs_of(tokenizer, ["Room 101 has 8 chairs"])
    asked = {"do_sample": False, "max_new_tokens": 12, "assistant_model": draft, "repetition_penalty": 1.3}
    expected = plain(model, inputs, **asked)
    with fl.accelerate(model):
        assert_same(generate(model, inputs, **asked), expected)


def test_a_copy(tokenizer):
    """A copy of an accelerated model generates as it does without fastlogits."""
    model, inputs = _adapted(tokenizer), inputs_of(tokenizer)
    expected = plain(model, inputs, **GREEDY)
    with fl.accelerate(model):
        copied = copy.deepcopy(model)
        assert_same(generate(copied, inputs, **GREEDY), expected)
    assert_same(generate(copied, inputs, **GREEDY), expected)
