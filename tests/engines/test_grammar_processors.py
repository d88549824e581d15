"""Processors of grammar engines, in lists and under ``accelerate``: all is as in plain transformers."""

import contextlib
import re

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

import fastlogits as fl
from tests.engines.companions import assert_same, generate, inputs_of, plain, tiny_model, tiny_tokenizer

llguidance = pytest.importorskip("llguidance", reason="needs llguidance: make test-engines")
llguidance_hf = pytest.importorskip("llguidance.hf")
llguidance_torch = pytest.importorskip("llguidance.torch")
outlines = pytest.importorskip("outlines", reason="needs outlines: make test-engines")
backends = pytest.importorskip("outlines.backends")
enforcer = pytest.importorskip("lmformatenforcer", reason="needs lm-format-enforcer: make test-engines")
xgrammar = pytest.importorskip("xgrammar", reason="needs xgrammar: make test-engines")
xgrammar_hf = pytest.importorskip("xgrammar.contrib.hf")

REGEX = r"[0-9]{2} (chairs|books): [a-z]{2,6}\."

# Settings of generate, in whose plan a grammar's processor stands: some change every step, some none.
GREEDY = {"do_sample": False}
STEERED = {"do_sample": False, "repetition_penalty": 1.3, "min_length": 1, "bad_words_ids": [[40, 41, 42]]}
NOTHING_TO_DO = {"do_sample": False, "min_length": 1}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
SETTINGS = {"greedy": GREEDY, "steered": STEERED, "nothing_to_do": NOTHING_TO_DO, "sampled": SAMPLED}


class LLGuidance(LogitsProcessor):
    """llguidance's masks as its own function applies them, in place."""

    def __init__(self, tokens, rows):
        self.matchers = [
            llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_regex(REGEX)) for _ in range(rows)
        ]
        self.bitmask = llguidance_torch.allocate_token_bitmask(rows, tokens.vocab_size)
        self.begun = False

    def __call__(self, input_ids, scores):
        for row, matcher in enumerate(self.matchers):
            if self.begun and not matcher.is_stopped():
                assert matcher.consume_token(int(input_ids[row, -1]))
            llguidance_torch.fill_next_token_bitmask(matcher, self.bitmask, row)
        self.begun = True
        llguidance_torch.apply_token_bitmask_inplace(scores, self.bitmask)
        return scores


def _prefix_function(tokenizer):
    """What ``build_transformers_prefix_allowed_tokens_fn`` makes of a pattern."""
    # Its module for transformers looks for a name where transformers 5 no longer has it.
    import transformers.tokenization_utils

    transformers.tokenization_utils.PreTrainedTokenizerBase = transformers.PreTrainedTokenizerBase
    from lmformatenforcer.integrations.transformers import build_transformers_prefix_allowed_tokens_fn

    return build_transformers_prefix_allowed_tokens_fn(tokenizer, enforcer.RegexParser(REGEX))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def makers(tokenizer, model):
    """By name, what makes a new processor for a number of rows."""
    tokens = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiled = xgrammar.GrammarCompiler(tokens).compile_regex(REGEX)
    for_llguidance = llguidance_hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer))
    steerable = outlines.from_transformers(model, tokenizer)

    def of_outlines(backend):
        return lambda rows: backends.get_regex_logits_processor(backend, steerable, REGEX)

    return {
        "xgrammar": lambda rows: xgrammar_hf.LogitsProcessor(compiled),
        "llguidance": lambda rows: LLGuidance(for_llguidance, rows),
        "outlines_core": of_outlines("outlines_core"),
        "outlines_xgrammar": of_outlines("xgrammar"),
        "outlines_llguidance": of_outlines("llguidance"),
    }


GRAMMARS = ["xgrammar", "llguidance", "outlines_core", "outlines_xgrammar", "outlines_llguidance"]


def _text(tokenizer, output, inputs):
    rows = output.sequences[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_under_accelerate(grammar, setting, prompts, makers, model, tokenizer):
    inputs = inputs_of(tokenizer)
    inputs = {name: value[:prompts] for name, value in inputs.items()}
    asked = SETTINGS[setting] | {"max_new_tokens": 24}
    expected = plain(model, inputs, [makers[grammar](prompts)], **asked)
    assert all(re.fullmatch(REGEX, text) for text in _text(tokenizer, expected, inputs))
    for kind in (LogitsProcessorList, fl.LogitsProcessorList):
        with fl.accelerate(model):
            assert_same(generate(model, inputs, kind([makers[grammar](prompts)]), **asked), expected)
    assert_same(plain(model, inputs, [makers[grammar](prompts)], **asked), expected)  # nothing is left behind


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_in_a_list(grammar, makers, model, tokenizer):
    inputs = inputs_of(tokenizer)
    ours = [
        fl.MinLengthLogitsProcessor(1, tokenizer.eos_token_id),  # nothing to do: the prompt is longer
        fl.SuppressTokensLogitsProcessor([40]),
        fl.RepetitionPenaltyLogitsProcessor(1.3),
    ]
    theirs = [
        transformers.MinLengthLogitsProcessor(1, tokenizer.eos_token_id),  # nothing to do: the prompt is longer
        transformers.SuppressTokensLogitsProcessor([40]),
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
    ]
    asked = {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 24}
    for place in range(4):
        both = []
        for others, run in ((theirs, plain), (ours, generate)):
            processors = list(others)
            processors.insert(place, makers[grammar](2))
            both.append(
                run(model, inputs, fl.LogitsProcessorList(processors) if others is ours else processors, **asked)
            )
        if place:  # generate itself hands its raw logits to what comes first
            assert_same(both[1], both[0])
        assert torch.equal(both[1].sequences, both[0].sequences)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_call_of_a_list(grammar, makers, tokenizer):
    ids = inputs_of(tokenizer)["input_ids"]
    scores = torch.randn(2, len(tokenizer))
    given = scores.clone()
    expected = makers[grammar](2)(ids, scores.clone())
    for before in ([], [fl.MinLengthLogitsProcessor(1, 0)], [fl.SuppressTokensLogitsProcessor([])]):
        processors = fl.LogitsProcessorList([*before, makers[grammar](2)])
        assert torch.equal(processors(ids, scores), expected)
        assert torch.equal(scores, given)
    warped = fl.LogitsProcessorList([makers[grammar](2), fl.TemperatureLogitsWarper(0.5), fl.TopKLogitsWarper(3)])
    by_theirs = transformers.TopKLogitsWarper(3)(ids, transformers.TemperatureLogitsWarper(0.5)(ids, expected))
    assert torch.equal(warped(ids, scores), by_theirs)
    assert torch.equal(scores, given)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_sampled_by_the_allowed_with_raw_logprobs(grammar, makers, tokenizer):
    ids, scores = inputs_of(tokenizer)["input_ids"], torch.randn(2, len(tokenizer))
    given = scores.clone()
    allowed = makers[grammar](2)(ids, scores.clone()).isfinite()
    for before in ([], [fl.MinLengthLogitsProcessor(1, 0)]):
        seeds, positions = torch.tensor([3, 4]), torch.full((2,), ids.shape[1])
        out = fl.sample(
            scores, [*before, makers[grammar](2)], seeds=seeds, positions=positions, input_ids=ids, logprobs="raw"
        )
        assert allowed.gather(1, out.tokens.unsqueeze(1)).all()
        assert torch.equal(scores, given)
        expected = given.log_softmax(-1).gather(1, out.tokens.unsqueeze(1))
        assert torch.allclose(out.logprobs.flatten(), expected.flatten(), atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_with_decode(grammar, setting, makers, model, tokenizer):
    inputs = inputs_of(tokenizer)
    asked = SETTINGS[setting] | {"max_new_tokens": 24}
    expected = plain(model, inputs, [makers[grammar](2)], **asked)
    outputs = []
    for keeps, accelerated in ((True, False), (False, False), (False, True)):
        with fl.accelerate(model) if accelerated else contextlib.nullcontext():
            more = {"output_scores": keeps, "custom_generate": fl.decode}
            outputs.append(generate(model, inputs, LogitsProcessorList([makers[grammar](2)]), **asked | more))
    if setting == "sampled":  # the distribution is that of transformers, the draw is one of our own
        assert all(re.fullmatch(REGEX, text) for text in _text(tokenizer, outputs[0], inputs))
    else:
        assert_same(outputs[0], expected)
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
    for output in outputs:
        assert torch.equal(output.logits[0], expected.logits[0])


WAYS = {
    "greedy": GREEDY,
    "steered": STEERED,
    "sampled": SAMPLED,
    "several": SAMPLED | {"num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled_beams": SAMPLED | {"num_beams": 3},
    "assisted": GREEDY | {"assisted": True},
    "lookup": GREEDY | {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_allowed_by_a_function(way, model, tokenizer):
    """lm-format-enforcer knows a text by its tokens, so that it serves beams and drafts too."""
    function = _prefix_function(tokenizer)
    asked = WAYS[way] | {"max_new_tokens": 24, "prefix_allowed_tokens_fn": function}
    drafts = bool({"assisted", "prompt_lookup_num_tokens"} & set(asked))
    inputs = inputs_of(tokenizer, ["Room 101 has 8 chairs"] if drafts else ["Room 101", "It's 1999"])
    if asked.pop("assisted", False):
        asked["assistant_model"] = tiny_model(tokenizer, hidden_size=16)
    expected = plain(model, inputs, **asked)
    assert all(re.fullmatch(REGEX, text) for text in _text(tokenizer, expected, inputs))
    with fl.accelerate(model):
        assert_same(generate(model, inputs, **asked), expected)
        if way in ("greedy", "steered"):
            assert_same(generate(model, inputs, custom_generate=fl.decode, **asked), expected)
    without = {name: value for name, value in asked.items() if name != "prefix_allowed_tokens_fn"}
    listed = [fl.PrefixConstrainedLogitsProcessor(function, asked.get("num_beams", 1))]
    if way in ("greedy", "sampled", "several", "assisted", "lookup"):
        if "repetition_penalty" in without:  # generate puts its own ahead of one of ours in a list
            assert torch.equal(
                generate(model, inputs, fl.LogitsProcessorList(listed), **without).sequences, expected.sequences
            )
        else:
            assert_same(generate(model, inputs, fl.LogitsProcessorList(listed), **without), expected)


def _generator(backend, model, tokenizer):
    return outlines.Generator(outlines.from_transformers(model, tokenizer), outlines.regex(REGEX), backend=backend)


@pytest.mark.parametrize("backend", ["outlines_core", "xgrammar", "llguidance"])
def test_outlines_generator(backend, model, tokenizer):
    """One generator serves many calls, as its users have it."""
    asked = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3}

    def say(generator, **more):
        torch.manual_seed(0)
        return [generator("Room 101", **asked | more), generator.batch(["Room 101", "It's 1999"], **asked | more)]

    expected = say(_generator(backend, model, tokenizer))
    generator = _generator(backend, model, tokenizer)
    for held in (generator.model, model):
        with fl.accelerate(held):
            assert say(generator) == expected
    with fl.accelerate(model):
        assert say(generator) == expected
        decoded = say(generator, custom_generate=fl.decode)
        assert say(generator, custom_generate=fl.decode) == decoded
    assert say(generator) == expected
    assert all(re.fullmatch(REGEX, text) for text in [decoded[0], *decoded[1]])


def test_logits_wider_than_the_tokenizer(tokenizer):
    model = tiny_model(tokenizer, beyond=45)
    tokens = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer) + 45)
    compiled = xgrammar.GrammarCompiler(tokens).compile_regex(REGEX)
    inputs = inputs_of(tokenizer)
    asked = STEERED | {"max_new_tokens": 24}
    expected = plain(model, inputs, [xgrammar_hf.LogitsProcessor(compiled)], **asked)
    with fl.accelerate(model):
        assert_same(generate(model, inputs, [xgrammar_hf.LogitsProcessor(compiled)], **asked), expected)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_looking_uses_nothing_up(grammar, makers, tokenizer):
    """None of them can be copied, so none is run: it stands at the first token after all."""
    ids, scores = inputs_of(tokenizer)["input_ids"], torch.randn(2, len(tokenizer))
    given = scores.clone()
    processors = fl.LogitsProcessorList([fl.MinLengthLogitsProcessor(1, 0), makers[grammar](2), fl.TopKLogitsWarper(5)])
    name = type(processors[1]).__name__
    assert name in str(processors.explain())
    checked = fl.check(processors, ids, scores)
    assert checked
    assert f"not compared: {name}" in str(checked)
    with pytest.raises(ValueError, match=f"{name}.* can't be copied"):
        processors.trace(ids, scores)
    assert torch.equal(scores, given)
    expected = makers[grammar](2)(ids, scores.clone())
    assert torch.equal(processors[1](ids, scores.clone()), expected)
