"""Vocabularies of real models, read from the files of two packages, against a second reading of the same files.

``make test-real`` installs what these tests need. The packages' data is found without importing them.
"""

import base64
import json
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import fastlogits as fl
from fastlogits.inspect.watch import Call, Step
from fastlogits.inspect.watch_page import page
from fastlogits.token_text import token_texts

NEEDED = ("dashscope", "jsonschema", "mistral-common", "protobuf", "sentencepiece", "tiktoken", "xgrammar")
if missing := [package for package in NEEDED if not list(metadata.distributions(name=package))]:
    pytest.skip(f"real vocabularies need {', '.join(missing)}: make test-real", allow_module_level=True)

SAYINGS = (
    "Room 101 costs 25 €.",
    "naïve café — 東京で７時, 你好吗？",
    "🤖👩‍🚀 ok\n\nTwo  spaces\tand a tab",
    "ไทย १२३ ӝӟ 𝔘𝔫𝔦",
)
TEKKEN = "mistral_common/data/tekken_240911.json"
LLAMA = "mistral_common/data/tokenizer.model.v1"
MISTRAL = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
ENGLISH_DIGITS = "0123456789"


def file_of(package: str, path: str) -> Path:
    return Path(str(metadata.distribution(package).locate_file(path)))


# -- What the files say: the bytes of each token that isn't special, and how many tokens there are ---------------------


def qwen_tokens() -> tuple[dict[int, bytes], int]:
    """Qwen: 151,643 byte-level tokens, then special ones."""
    lines = file_of("dashscope", "dashscope/resources/qwen.tiktoken").read_text().splitlines()
    tokens = {int(rank): base64.b64decode(token) for token, rank in map(str.split, filter(None, lines))}
    return tokens, len(tokens) + 3


def tekken_tokens() -> tuple[dict[int, bytes], int]:
    """Mistral's Tekken: 1,000 special tokens, then 130,072 byte-level ones."""
    described = json.loads(file_of("mistral-common", TEKKEN).read_text())
    size, first = described["config"]["default_vocab_size"], described["config"]["default_num_special_tokens"]
    pieces = described["vocab"][: size - first]
    return {first + each["rank"]: base64.b64decode(each["token_bytes"]) for each in pieces}, size


def sentencepiece_tokens(path: str) -> tuple[dict[int, bytes], int]:
    """Pieces of SentencePiece, some of them single bytes."""
    from sentencepiece import SentencePieceProcessor

    read = SentencePieceProcessor(model_file=str(file_of("mistral-common", path)))
    tokens = {}
    for token in range(read.get_piece_size()):
        piece = read.id_to_piece(token)
        # transformers makes special what the model's maker has defined, such as references.
        if read.is_control(token) or read.is_unknown(token) or piece.startswith("[REFERENCE_DOC_"):
            continue
        tokens[token] = bytes.fromhex(piece[3:5]) if read.is_byte(token) else piece.replace("\u2581", " ").encode()
    return tokens, read.get_piece_size()


TOKENS = {
    "qwen": qwen_tokens,
    "tekken": tekken_tokens,
    "llama": partial(sentencepiece_tokens, LLAMA),  # 32,000 pieces, as Llama's
    "mistral": partial(sentencepiece_tokens, MISTRAL),  # 32,768 pieces, 768 of them special
}
TOKENS |= {f"mistral-common {name}": TOKENS[name] for name in ("tekken", "llama")}


# -- Tokenizers that transformers makes of the same files -----------------------------------------------------------


def byte_level(name: str, folder: Path) -> PreTrainedTokenizerFast:
    """transformers' conversion of ranks, with the special tokens where the vocabulary has room for them."""
    tokens, size = TOKENS[name]()
    ids, file = list(tokens), folder / "ranks.tiktoken"
    file.write_text(
        "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens.values()))
    )
    described = json.loads(TikTokenConverter(str(file)).converted().to_str())
    special = {f"<|special {token}|>": token for token in range(size) if token not in tokens}
    vocabulary = {name: ids[rank] for name, rank in described["model"]["vocab"].items()}
    described["model"]["vocab"] = vocabulary | special
    raw = Tokenizer.from_str(json.dumps(described))
    raw.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=next(iter(special)))


def of_sentencepiece(path: str, folder: Path) -> Any:
    """transformers' conversion of a model of SentencePiece."""
    (folder / "tokenizer.model").symlink_to(file_of("mistral-common", path))
    return LlamaTokenizerFast.from_pretrained(folder)


def of_mistral_common(path: str, folder: Path) -> Any:
    """transformers' class for mistral-common: one name stands for all tokens whose bytes are the same broken text."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    return MistralCommonBackend(str(file_of("mistral-common", path)))


TOKENIZERS = {
    "qwen": partial(byte_level, "qwen"),
    "tekken": partial(byte_level, "tekken"),
    "llama": partial(of_sentencepiece, LLAMA),
    "mistral": partial(of_sentencepiece, MISTRAL),
    "mistral-common tekken": partial(of_mistral_common, TEKKEN),
    "mistral-common llama": partial(of_mistral_common, LLAMA),
}


class Vocabulary:
    """What a file says, and the tokenizer of it.

    Args:
        name: which one.
        folder: where a tokenizer may be built.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.bytes, self.size = TOKENS[name]()
        self.tokenizer = TOKENIZERS[name](folder)
        self.texts = [
            self.bytes[token].decode(errors="replace") if token in self.bytes else None for token in range(self.size)
        ]

    def where(self, test: Callable[[str], bool]) -> list[int]:
        """The tokens with a text of which something holds."""
        return [token for token, text in enumerate(self.texts) if text is not None and test(text)]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TOKENS])
def real(request, tmp_path_factory):
    return Vocabulary(request.param, tmp_path_factory.mktemp("vocabulary"))


def begins_with_digit(text: str) -> bool:
    text = text.lstrip()
    return bool(text) and unicodedata.decimal(text[0], None) is not None


def test_each_token_has_its_text(real):
    found = token_texts(real.tokenizer)
    assert len(found) == real.size
    different = [token for token in range(real.size) if found[token] != real.texts[token]]
    shown = [(token, found[token], real.texts[token], real.bytes.get(token)) for token in different[:10]]
    assert not different, f"{len(different)} tokens: {shown}"


def test_digits(real):
    """The count is what the file holds; a list of ten ids would miss what else is read as a digit."""
    found = fl.TokenMask.matching(real.tokenizer, r"\s*\d")
    assert list(found) == real.where(begins_with_digit)
    assert len(found) == {"qwen": 22, "tekken": 82, "llama": 21, "mistral": 21}[real.name.split()[-1]]
    texts = [real.texts[token] for token in found]
    assert set(texts) >= set(ENGLISH_DIGITS)
    assert not all(text.isascii() for text in texts)
    ascii_only = fl.TokenMask.matching(real.tokenizer, re.compile(r"\s*\d", re.ASCII))
    assert set(ascii_only) == {token for token in found if real.texts[token].lstrip()[0] in ENGLISH_DIGITS}
    one = fl.TokenMask.from_strings(real.tokenizer, "1")
    assert list(one) == real.where(lambda text: text in ("1", " 1"))


@pytest.mark.parametrize(
    ("pattern", "how", "test"),
    [
        (r"\s+", "fullmatch", str.isspace),
        (r"[\s\S]*[.\n]", "fullmatch", lambda text: text.endswith((".", "\n"))),
        ("\ufffd", "search", lambda text: "\ufffd" in text),
        (r" ", "match", lambda text: text.startswith(" ")),
        (r"[a-z]+(ing|ed)", "fullmatch", lambda text: text.isascii() and text.isalpha() and text.islower()
            and text.endswith(("ing", "ed")) and text not in ("ing", "ed")),
        (r"", "match", lambda text: True),
    ],
    ids=["blank", "ends of sentences", "parts of characters", "begins a word", "in a process of its own", "any"],
)  # fmt: skip
def test_patterns(real, pattern, how, test):
    found = fl.TokenMask.matching(real.tokenizer, pattern, how=how)
    assert list(found) == real.where(test)
    assert 0 < len(found) < real.size


def test_bans_at_the_width_of_a_model(real):
    """Models are often wider than their vocabularies: what no token has stays allowed."""
    width = -(-real.size // 128) * 128 + 128
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens(fl.TokenMask.matching(real.tokenizer, r"\s*\d"))])
    out = processors(torch.tensor([[5, 7]]), torch.zeros(1, width), prompt_length=2)
    assert out[0].isneginf().nonzero().flatten().tolist() == real.where(begins_with_digit)
    part = fl.TokenMask.matching(real.tokenizer, "\ufffd", how="search")
    out = fl.LogitsProcessorList([fl.AllowedTokensLogitsProcessor(part)])(torch.tensor([[5]]), torch.zeros(1, width))
    assert out[0].isfinite().nonzero().flatten().tolist() == real.where(lambda text: "\ufffd" in text)


def test_bad_words(real):
    words = [real.tokenizer.encode(saying, add_special_tokens=False) for saying in SAYINGS]
    assert any("\ufffd" in (real.texts[token] or "") for word in words for token in word)
    ids = torch.tensor([[*word[-6:-1]] for word in words])
    ours, theirs = (library.NoBadWordsLogitsProcessor([word[-6:] for word in words]) for library in (fl, transformers))
    scores = torch.zeros(len(words), real.size)
    out = ours(ids, scores.clone())
    assert torch.equal(out, theirs(ids, scores.clone()))
    assert [row.isneginf().nonzero().flatten().tolist() for row in out] == [[word[-1]] for word in words]


def test_ends_of_sentences_and_choices(real):
    long = fl.GenLengthLogitsProcessor(real.tokenizer, 1.0, complete_sentences=True)
    assert list(long.sentence_ends) == real.where(lambda text: text.endswith((".", "\n")))
    choice = fl.MultipleChoiceLogitsProcessor(real.tokenizer, ["1", "2"], boost_first_words=1.0)
    assert list(choice.new_lines) == real.where(lambda text: text.endswith("\n"))
    for mask, digit in zip(choice.listed_choices, "12", strict=True):
        assert list(mask) == real.where(lambda text, digit=digit: text in (digit, f" {digit}"))


def test_a_watched_text_is_what_the_tokens_say(real):
    """Characters of several tokens are shown once, by the last of them."""
    answers = [real.tokenizer.encode(saying, add_special_tokens=False) for saying in SAYINGS]
    rest = (1.0, 1.0, 1, 1, real.size, (), ())
    rows = tuple(
        tuple(Step(0, row, n, n, token, *rest, (token,), ((1.0,),), ()) for n, token in enumerate(answer))
        for row, answer in enumerate(answers)
    )
    html = page([Call(0, "Model", "sample", tuple(map(tuple, answers)), rows)], real.tokenizer)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    texts = {token: text for token, text, _ in data["tokens"]}
    for saying, answer, sequence in zip(SAYINGS, answers, data["sequences"], strict=True):
        pieces = zip(answer, sequence["pieces"], strict=True)
        said = "".join(texts[token] if piece == 0 else piece for token, piece in pieces)
        assert said.removeprefix(" ") == saying
        parts = {texts[token] for token in answer if "\ufffd" in real.texts[token]}
        assert all(re.fullmatch(r"<[0-9A-F]{2}( [0-9A-F]{2})*>|#\d+", text) for text in parts), parts


def test_stop_strings(tmp_path):
    real = Vocabulary("llama", tmp_path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=real.size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        initializer_range=0.4, bos_token_id=None, eos_token_id=real.size - 1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    asked = {"max_new_tokens": 12, "do_sample": False, "tokenizer": real.tokenizer}
    prompt = real.tokenizer(SAYINGS[0], return_tensors="pt", add_special_tokens=False)

    def said(**more):
        return model.generate(**prompt, **asked, **more)[0, prompt["input_ids"].shape[1] :].tolist()

    plain = said()
    stop = next(text for token in plain[3:] if (text := real.texts[token].strip()).isascii())
    expected = said(stop_strings=[stop])
    assert len(expected) < len(plain)
    assert stop in real.texts[expected[-1]]
    assert said(stop_strings=[stop], custom_generate=fl.decode) == expected


def test_grammar_masks(real):
    import xgrammar

    if real.name.startswith("mistral-common"):
        pytest.skip("xgrammar reads no tokenizer of mistral-common")
    info = xgrammar.TokenizerInfo.from_huggingface(real.tokenizer, vocab_size=real.size)
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_regex("[0-9]+ chairs"))
    bitmask = xgrammar.allocate_token_bitmask(1, real.size)
    matcher.fill_next_token_bitmask(bitmask)
    allowed = real.where(lambda text: text.isascii() and text.isdigit())
    assert list(fl.TokenMask.from_bitmask(bitmask, real.size)) == allowed
    assert list(fl.TokenMask.matching(real.tokenizer, r"[0-9]+", how="fullmatch")) == allowed
    logits = torch.zeros(1, real.size)
    fl.apply_token_bitmask_inplace(logits, bitmask)
    assert logits[0].isfinite().nonzero().flatten().tolist() == allowed
