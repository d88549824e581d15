"""TokenMask: what is in it, in every form, from every source."""

import copy
import itertools
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams, TokenMask, token_mask
from fastlogits.token_text import token_texts

DIGIT = r"\s*\d"


def rows(max_size: int = 200):
    return st.lists(st.booleans(), min_size=0, max_size=max_size)


@given(rows())
def test_forms_agree(row):
    mask = TokenMask(torch.tensor(row, dtype=torch.bool))
    ids = [i for i, inside in enumerate(row) if inside]
    assert list(mask) == mask.ids().tolist() == ids
    assert len(mask) == len(ids)
    assert mask.row().tolist() == row
    words = [word & 0xFFFFFFFF for word in mask.bits().tolist()]
    assert len(words) == -(-len(row) // 32)
    assert [32 * w + i for w, word in enumerate(words) for i in range(32) if word >> i & 1] == ids
    assert mask.row(dtype=torch.float16).tolist() == [float("-inf") if inside else 0.0 for inside in row]
    assert mask.ids(dtype=torch.int32).dtype == torch.int32
    assert TokenMask.from_bitmask(mask.bits(), vocab_size=len(row)) == mask
    assert TokenMask.from_ids(ids, vocab_size=len(row)) == mask


@given(st.integers(1, 130).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 2)))
def test_set_algebra(two):
    a, b = (TokenMask(torch.tensor(row)) for row in two)
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(~a) == set(range(a.vocab_size)) - set(a)
    assert (~~a, a | a, a & a) == (a, a, a)
    # The complement's words have no bits beyond the vocabulary.
    assert TokenMask.from_bitmask((~a).bits(), a.vocab_size) == ~a


def test_digits_of_every_kind_of_tokenizer(tokenizer):
    found = TokenMask.matching(tokenizer, DIGIT)
    texts = token_texts(tokenizer)
    assert {texts[i] for i in found} >= {"1", "7"} or {texts[i] for i in found} >= {" 1", "7"}
    for token, token_id in tokenizer.get_vocab().items():
        bare = token.replace("▁", "").replace("Ġ", "").removeprefix("##")
        byte = re.fullmatch(r"<0x3([0-9])>", token)
        assert (token_id in found) == bool(byte or re.match(r"\d", bare)), token


def test_sentencepiece_twins_and_bytes(sentencepiece):
    found = TokenMask.matching(sentencepiece, DIGIT)
    tokens = set(sentencepiece.convert_ids_to_tokens(list(found)))
    assert tokens >= {"1", "▁1", "<0x31>", "9", "▁9", "<0x39>"}
    # What the naive list of ten ids misses is exactly what a model can answer with.
    assert len(found) >= 30
    assert set(TokenMask.from_strings(sentencepiece, "1")) == {
        sentencepiece.convert_tokens_to_ids(token) for token in ("1", "▁1", "<0x31>")
    }
    assert list(TokenMask.from_strings(sentencepiece, " 1")) == [sentencepiece.convert_tokens_to_ids("▁1")]


class DecodesOnlyIds:
    """As transformers' class for mistral-common: one name stands for all broken texts, and names can't be decoded."""

    pieces = (b"<unk>", b"<s>", b"a", b" 1", b"\xe2", b"\x82", b"2", b" \xe2")
    all_special_ids = (1,)
    unk_token_id = 0

    def __len__(self):
        return len(self.pieces)

    def get_vocab(self):
        return {"<unk>": 0, "<s>": 1, "a": 2, " 1": 3, "\ufffd": 4, "2": 6}

    def added_tokens_decoder(self):
        raise NotImplementedError

    def convert_tokens_to_string(self, tokens):
        raise NotImplementedError

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [self.pieces.index(text.encode())]

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        kept = [token for token in ids if not (skip_special_tokens and token in self.all_special_ids)]
        return b"".join(self.pieces[token] for token in kept).decode(errors="replace")


def test_a_tokenizer_that_decodes_only_ids():
    tokenizer = DecodesOnlyIds()
    assert token_texts(tokenizer) == [None, None, "a", " 1", "\ufffd", "\ufffd", "2", " \ufffd"]
    assert list(TokenMask.matching(tokenizer, DIGIT)) == [3, 6]


def test_special_tokens_have_no_text(tokenizer):
    texts = token_texts(tokenizer)
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert special
    assert not set(TokenMask.matching(tokenizer, r".", how="search")) & set(special)
    assert all(texts[i] is None for i in special)


def test_raw_and_wrapped_tokenizers_agree(raw_tokenizer, tokenizer):
    assert token_texts(raw_tokenizer) == token_texts(tokenizer)


def test_texts_rebuild_the_text(tokenizer):
    text = "Room 101 has 8 chairs"
    ids = tokenizer.encode(text, add_special_tokens=False)
    rebuilt = [token_texts(tokenizer)[i] for i in ids]
    spaced = "".join(rebuilt).replace(" ", "")
    assert spaced == text.replace(" ", "")


def test_matching_is_cached_until_tokens_are_added(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    first = TokenMask.matching(tokenizer, DIGIT)
    assert TokenMask.matching(tokenizer, DIGIT) is first
    assert TokenMask.matching(tokenizer, re.compile(DIGIT)) is first
    assert TokenMask.matching(tokenizer, re.compile(DIGIT, re.IGNORECASE)) is not first
    tokenizer.add_tokens(["12345678"])
    assert len(TokenMask.matching(tokenizer, DIGIT)) == len(first) + 1


def test_how(sentencepiece):
    anywhere = TokenMask.matching(sentencepiece, r"\d", how="search")
    whole = TokenMask.matching(sentencepiece, r"\d", how="fullmatch")
    assert set(whole) < set(anywhere)
    assert TokenMask.from_predicate(sentencepiece, str.isdigit) == TokenMask.matching(
        sentencepiece, r"\d+", how="fullmatch"
    )


def test_masks_of_a_tokenizer_hold_for_padded_vocabularies(sentencepiece):
    digits = TokenMask.matching(sentencepiece, DIGIT)
    wide = digits.fit(digits.vocab_size + 64)
    assert list(wide) == list(digits)
    assert wide.vocab_size == digits.vocab_size + 64
    # A token that the tokenizer doesn't know is in no mask of it, not even in a complement.
    assert max((~digits).fit(digits.vocab_size + 64)) < digits.vocab_size
    narrow = digits.fit(300)
    assert list(narrow) == [i for i in digits if i < 300]
    exact = TokenMask.from_ids([1], vocab_size=digits.vocab_size + 10)
    assert (exact | digits).vocab_size == exact.vocab_size


def test_form_is_kept_per_device_and_dtype():
    mask = TokenMask.from_ids([3], 10)
    assert mask.bits() is mask.bits("cpu")
    assert mask.row() is mask.row()
    assert mask.row(dtype=torch.float32) is not mask.row(dtype=torch.float16)


def test_copies_and_pickles():
    mask = TokenMask.from_ids([3, 5], 10)
    mask.bits()
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert hash(twin) == hash(mask)
    assert mask != TokenMask.from_ids([3], 10)
    assert mask != TokenMask.from_ids([3, 5], 11)
    assert mask != [3, 5]
    assert 3 in mask
    assert 4 not in mask
    assert -7 not in mask


def test_later_writes_to_the_source_change_nothing():
    row = torch.tensor([True, False])
    mask = TokenMask(row)
    row[1] = True
    assert list(mask) == [0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TokenMask.from_ids([1, -2], 10), "ids must be token ids of at least 0, got -2"),
        (lambda: TokenMask.from_ids([1, 10], 10), "ids: token id 10 is outside the vocabulary of 10 tokens"),
        (lambda: TokenMask.from_ids([1.5], 10), "ids must be integer token ids, got 1.5"),
        (lambda: TokenMask.from_ids([True], 10), "ids must be integer token ids, got True"),
        (lambda: TokenMask.from_ids(torch.tensor([1.0]), 10), "got a tensor of torch.float32"),
        (lambda: TokenMask.from_ids("12", 20), "ids must be token ids or a TokenMask, got '12'"),
        (lambda: TokenMask.from_ids(7, 20), "ids must be token ids or a TokenMask, got 7"),
        (lambda: TokenMask.from_ids([1], -1), "vocab_size must be an integer of at least 0, got -1"),
        (lambda: TokenMask.from_ids([1], 10) | TokenMask.from_ids([1], 11), "vocabulary of 11 tokens, but 10"),
        (lambda: TokenMask.from_ids([1], 10) & TokenMask.from_ids([1], 11), "vocabulary of 11 tokens, but 10"),
        (lambda: TokenMask(torch.zeros(3)), "row must be a bool tensor"),
        (lambda: TokenMask.from_bitmask(torch.zeros(2, 2, dtype=torch.int32)), "bitmask must be int32 of shape"),
        (lambda: TokenMask.from_bitmask(torch.zeros(2, dtype=torch.int64)), "bitmask must be int32"),
        (lambda: TokenMask.from_bitmask(torch.zeros(2, dtype=torch.int32), 65), "takes 3 words of 32 bits"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_bad_patterns_and_strings(sentencepiece):
    with pytest.raises(ValueError, match=r"pattern must be a regular expression, got '\[': unterminated"):
        TokenMask.matching(sentencepiece, "[")
    with pytest.raises(ValueError, match="how must be 'match', 'search' or 'fullmatch', got 'find'"):
        TokenMask.matching(sentencepiece, "a", how="find")
    with pytest.raises(ValueError, match=r"strings must each be the text of one token, but \['no such token'\]"):
        TokenMask.from_strings(sentencepiece, ["1", "no such token"])


def test_masks_combine_with_masks_only():
    with pytest.raises(TypeError):
        TokenMask.from_ids([1], 10) | [2]


# -- Regular expressions ------------------------------------------------------------------------------------------


def words_tokenizer(*tokens: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))


@pytest.mark.parametrize("how", ["match", "search", "fullmatch"])
def test_a_pattern_that_backtracks_for_ever_is_refused_in_time(how, monkeypatch):
    monkeypatch.setattr(token_mask, "_SECONDS", 1)
    tokenizer = words_tokenizer("x", "a" * 40 + "b")
    with pytest.raises(ValueError, match=r"pattern '\(a\+\)\+\$' takes more than 1 s over the 2 tokens"):
        TokenMask.matching(tokenizer, r"(a+)+$", how=how)


def test_a_pattern_is_matched_alike_in_both_processes(tokenizer):
    """More than one choice is what sends it to the other; one that matches nothing makes it more."""
    for pattern, flags, how in itertools.product(
        (r"\s*\d", r"[A-Z\ufffd]", r"r|é|\w\d"),
        (0, token_mask.re.IGNORECASE | token_mask.re.ASCII),
        ("match", "search"),
    ):
        here = token_mask.re.compile(pattern, flags)
        there = token_mask.re.compile(f"(?:(?!)|(?!)|{pattern})", flags)
        assert not token_mask._is_linear(there.pattern)
        expected = [text is not None and getattr(here, how)(text) is not None for text in token_texts(tokenizer)]
        assert TokenMask.matching(tokenizer, there, how=how).row().tolist() == expected
        assert TokenMask.matching(tokenizer, here, how=how).row().tolist() == expected


def test_a_pattern_of_bytes_and_a_python_that_is_not_there(sentencepiece, monkeypatch):
    with pytest.raises(ValueError, match="of text, not of bytes"):
        TokenMask.matching(sentencepiece, token_mask.re.compile(rb"\d"))
    monkeypatch.setattr(token_mask, "sys", SimpleNamespace(executable="/nowhere/python"))
    with pytest.raises(RuntimeError, match="from_predicate"):
        TokenMask.matching(sentencepiece, r"(\d+)+9")
    assert len(TokenMask.matching(sentencepiece, r"\d9?"))  # of one choice: it needs none


# -- Vocabularies -------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_holes_in_its_vocabulary(device):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "1": 3, "b2": 40, "7": 90}, unk_token="a"))
    digits = TokenMask.matching(tokenizer, r"\d")
    assert digits.vocab_size == 91
    assert list(digits) == [3, 90]
    # In no set of it, nor in a complement of one: nothing is said of what has no token.
    assert list(TokenMask.from_predicate(tokenizer, lambda text: True)) == [0, 3, 40, 90]
    for width in (91, 128, 60):  # as the tokenizer's, wider as models pad theirs, narrower
        scores = torch.zeros(1, width, device=device)
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        banned = fl.LogitsProcessorList([fl.SuppressFirstTokens(digits)])(ids, scores, prompt_length=2)
        assert banned[0].isinf().nonzero().flatten().tolist() == [token for token in (3, 90) if token < width]
        batch = BatchProcessor(1, width, device, max_length=8)
        batch.add(RequestParams(banned_token_ids=digits))
        assert torch.equal(batch.apply(scores, [0]), banned)


def test_what_is_in_a_mask():
    mask = TokenMask.from_ids([2, 7], 8)
    token = torch.tensor([[2, 3]])
    for number in (2, np.int64(2), np.uint8(7), token[0, 0], torch.tensor(7, dtype=torch.int32)):
        assert number in mask
    for other in (3, np.int32(3), token[0, 1], -1, -6, 8, 2**70, "2", None, 2.0):
        assert other not in mask
    for wrong in (token, torch.tensor(2.0), np.array([2, 7])):
        with pytest.raises(TypeError, match="one token id at a time, an integer"):
            wrong in mask  # noqa: B015


def test_a_token_that_becomes_special_has_no_text_from_then_on():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "1": 1, "2": 2, "a": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert list(TokenMask.matching(tokenizer, DIGIT)) == [1, 2]
    tokenizer.add_special_tokens({"pad_token": "1"})
    for each in (tokenizer, copy.deepcopy(tokenizer)):
        assert list(TokenMask.matching(each, DIGIT)) == [2]
        assert token_texts(each)[1] is None
