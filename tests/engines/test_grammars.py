"""Masks that xgrammar and llguidance compile, applied as they apply them."""

import random
import warnings

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastlogits import TokenMask, apply_token_bitmask_inplace
from tests.models import byte_level

xgrammar = pytest.importorskip("xgrammar", reason="needs xgrammar: make test-engines")
llguidance = pytest.importorskip("llguidance", reason="needs llguidance: make test-engines")
llguidance_hf = pytest.importorskip("llguidance.hf")
llguidance_torch = pytest.importorskip("llguidance.torch")

REGEX = r"[0-9]{2} (chairs|books): [a-z ]+\."
SCHEMA = """{"type": "object", "properties": {"room": {"type": "integer"}, "zone": {"enum": ["In", "Room 101"]}},
"required": ["room", "zone"]}"""


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|end|>")


class XGrammar:
    """xgrammar's masks; the tail beyond them stays allowed."""

    mask_tail = False

    def __init__(self, tokenizer, vocab_size, kind):
        compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size))
        compiled = compiler.compile_regex(REGEX) if kind == "regex" else compiler.compile_json_schema(SCHEMA)
        self.matcher = xgrammar.GrammarMatcher(compiled)
        self.vocab_size = vocab_size

    def mask(self):
        bitmask = xgrammar.allocate_token_bitmask(1, self.vocab_size)
        self.matcher.fill_next_token_bitmask(bitmask)
        return bitmask

    def accept(self, token):
        assert self.matcher.accept_token(token)

    def is_over(self):
        return self.matcher.is_terminated()

    apply = staticmethod(xgrammar.apply_token_bitmask_inplace)


class LLGuidance:
    """llguidance's masks; it forbids the tail beyond them."""

    mask_tail = True

    def __init__(self, tokenizer, vocab_size, kind):
        matcher = llguidance.LLMatcher
        grammar = matcher.grammar_from_regex(REGEX) if kind == "regex" else matcher.grammar_from_json_schema(SCHEMA)
        self.matcher = matcher(llguidance_hf.from_tokenizer(tokenizer, n_vocab=vocab_size), grammar)
        self.vocab_size = vocab_size

    def mask(self):
        bitmask = llguidance_torch.allocate_token_bitmask(1, self.vocab_size)
        llguidance_torch.fill_next_token_bitmask(self.matcher, bitmask)
        return bitmask

    def accept(self, token):
        assert self.matcher.consume_token(token)

    def is_over(self):
        return self.matcher.is_stopped()

    apply = staticmethod(llguidance_torch.apply_token_bitmask_inplace)


@pytest.mark.parametrize("kind", ["regex", "schema"])
@pytest.mark.parametrize("engine", [XGrammar, LLGuidance])
def test_along_a_text(engine, kind, tokenizer, device):
    random.seed(0)
    padded = len(tokenizer) + 45
    grammar = engine(tokenizer, padded, kind)
    masks, text = [], []
    while not grammar.is_over() and len(text) < 60:
        masks.append(grammar.mask())
        allowed = list(TokenMask.from_bitmask(masks[-1][0], padded))
        assert allowed
        text.append(random.choice(allowed))
        grammar.accept(text[-1])
    assert len(masks) > 3
    bitmask = torch.cat(masks)
    assert not torch.equal(bitmask[0], bitmask[2])
    for dtype in (torch.float32, torch.bfloat16):
        for width in (padded, padded + 64, 32 * bitmask.shape[1] - 40):
            wide = torch.randn(len(masks), width + 24).to(dtype)
            expected = wide[:, :width].float().contiguous()
            if engine is LLGuidance and width < 32 * bitmask.shape[1]:
                # llguidance's own function wants logits that are no narrower than its mask.
                expected[~torch.stack([TokenMask.from_bitmask(row).row()[:width] for row in bitmask])] = float("-inf")
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    grammar.apply(expected, bitmask)
            logits = wide.to(device)[:, :width]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                apply_token_bitmask_inplace(logits, bitmask.to(device), mask_tail=grammar.mask_tail)
            assert torch.equal(logits.cpu(), expected.to(dtype))


def test_indices_mean_what_they_mean_in_xgrammar(tokenizer, device):
    grammar = XGrammar(tokenizer, len(tokenizer), "schema")
    bitmask = grammar.mask().repeat(4, 1)
    bitmask[1::2] = ~bitmask[1::2]
    expected = torch.randn(5, len(tokenizer))
    logits = expected.to(device)
    xgrammar.apply_token_bitmask_inplace(expected, bitmask, indices=[3, 0], vocab_size=200)
    apply_token_bitmask_inplace(logits, bitmask.to(device), indices=[3, 0], vocab_size=200)
    assert torch.equal(logits.cpu(), expected)
