"""What nobody should send: numbers at the edge of floats, ids from nowhere, lists and histories without end."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
import transformers.generation.logits_process as reference
from fastlogits_kernels.pointwise import fold
from tokenizers import Tokenizer, models

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams, TokenMask, token_mask
from fastlogits.integrations.requests import MAX_LISTED, read_options
from fastlogits.token_text import token_texts

pytestmark = pytest.mark.usefixtures("one_thread")

INF = float("inf")
V = 50


def one_by_one(processors, ids, scores):
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def random_ids(B: int, L: int, most: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, most, (B, L), generator=torch.Generator().manual_seed(seed))


def random_scores(B: int, V: int) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(0)) * 3


# -- Scores --------------------------------------------------------------------------------------------------------


def test_subnormal_scores_are_numbers_like_others(device):
    """NaN and infinities are in the tests of each family; nothing may take these for zero either."""
    ids = random_ids(3, 9, V).to(device)
    scores = (random_scores(3, V).double() * 2.0**-140).float().to(device)
    assert bool((scores.abs() < torch.finfo(torch.float32).tiny).all())
    assert int(scores.unique().numel()) > V
    links = [
        ("RepetitionPenaltyLogitsProcessor", (1.5,)), ("TemperatureLogitsWarper", (0.5,)), ("TopKLogitsWarper", (7,)),
    ]  # fmt: skip
    ours, theirs = ([getattr(module, name)(*given) for name, given in links] for module in (fl, reference))
    assert torch.equal(fl.LogitsProcessorList(ours)(ids, scores), one_by_one(theirs, ids, scores))


# -- Ids -----------------------------------------------------------------------------------------------------------

WILD = [3, -1, V, 2**40, -(2**40), 3, 5, -7, 3, 2**62, -(2**63), V + 1]
READERS = {
    "repetition": lambda: fl.RepetitionPenaltyLogitsProcessor(1.5),
    "presence": lambda: fl.PresencePenaltyLogitsProcessor(0.5),
    "frequency": lambda: fl.FrequencyPenaltyLogitsProcessor(0.5),
    "unigrams": lambda: fl.NoRepeatNGramLogitsProcessor(1),
}
PATHS = ["torch", "kernels"]


@pytest.fixture
def path(request, monkeypatch, device):
    if device == "cpu" and request.param == "kernels":
        monkeypatch.setattr(fold, "FORCE_KERNEL", True)
    if device == "cuda" and request.param == "torch":
        pytest.skip("on a GPU the kernels run")


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("what", READERS)
def test_ids_outside_the_vocabulary_count_for_nothing(what, path, device):
    """transformers refuses some of them, with an error of torch; on a GPU that ends the process."""
    processors, scores = fl.LogitsProcessorList([READERS[what]()]), random_scores(1, V).to(device)
    wild = torch.tensor([WILD], device=device)
    inside = wild[(wild >= 0) & (wild < V)][None]
    assert torch.equal(processors(wild, scores, prompt_length=0), processors(inside, scores, prompt_length=0))


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_ids_outside_the_vocabulary_are_told_apart_in_sequences(path, device):
    """The 32 low bits of an id are not the id."""
    fake = 2**32
    ids = torch.tensor([[7, 8, 9, 7 + fake, 8 + fake]], device=device)
    scores = torch.zeros(1, V, device=device)
    for name, arguments in {
        "NoRepeatNGramLogitsProcessor": (3,),
        "NoBadWordsLogitsProcessor": ([[7, 8, 9], [8, 4]],),
        "SequenceBiasLogitsProcessor": ({(7, 8, 9): 1.0, (8, 4): 2.0},),
    }.items():
        ours, theirs = (getattr(module, name)(*arguments)(ids, scores) for module in (fl, reference))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_sequences_where_nothing_is_generated_yet(path, device):
    ids, scores = torch.zeros(2, 0, dtype=torch.int64, device=device), random_scores(2, V).to(device)
    source = random_ids(1, 9, V).to(device)
    expected, processors = (
        [
            module.SequenceBiasLogitsProcessor({(1, 2): 1.0, (3,): 2.0}),
            module.EncoderNoRepeatNGramLogitsProcessor(2, source),
            module.NoRepeatNGramLogitsProcessor(2),
        ]
        for module in (reference, fl)
    )
    expected, processors = one_by_one(expected, ids, scores), fl.LogitsProcessorList(processors)
    for cache_position in (None, -1, torch.tensor(-1, device=device), torch.tensor([-1, -1], device=device)):
        assert torch.equal(processors(ids, scores, prompt_length=0, cache_position=cache_position), expected)


def test_a_history_of_padding(device):
    """Left padding as long as the text, and rows of nothing else."""
    pad, eos = 0, 1
    ids = random_ids(3, 40, V).to(device)
    ids[0, :30] = pad
    ids[1] = pad
    scores = random_scores(3, V).to(device)
    made = [
        [
            module.RepetitionPenaltyLogitsProcessor(1.3),
            module.NoRepeatNGramLogitsProcessor(3),
            module.NoBadWordsLogitsProcessor([[pad, pad, 5], [pad, 6], [pad]], eos),
            module.MinLengthLogitsProcessor(41, eos, device),
        ]
        for module in (fl, reference)
    ]
    assert torch.equal(fl.LogitsProcessorList(made[0])(ids, scores), one_by_one(made[1], ids, scores))


# -- Sizes ---------------------------------------------------------------------------------------------------------


def test_a_history_of_a_million_tokens(device):
    L, wide = 1_000_000, 1000
    ids = random_ids(1, L, wide - 10).to(device)
    ids[:, -3:] = torch.tensor([5, 6, 7])
    scores = random_scores(1, wide).to(device)
    ours = fl.LogitsProcessorList(
        [
            fl.RepetitionPenaltyLogitsProcessor(1.3),
            fl.FrequencyPenaltyLogitsProcessor(1e-3),
            fl.NoBadWordsLogitsProcessor([[5, 6, 7, 8]]),
            fl.NoRepeatNGramLogitsProcessor(3),
        ]
    )
    found = ours(ids, scores, prompt_length=0)
    counts = torch.bincount(ids[0], minlength=wide)
    penalized = torch.where(scores > 0, scores / 1.3, scores * 1.3)
    expected = torch.where(counts > 0, penalized, scores) - 1e-3 * counts
    text = ids[0].tolist()
    banned = {8, *(c for a, b, c in zip(text, text[1:], text[2:], strict=False) if (a, b) == (6, 7))}
    expected[0, sorted(banned)] = -INF
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"])
def test_ten_thousand_sequences(name, device):
    wide, most = 12_000, 10_000
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 5, (most,), generator=generator).tolist()
    words = [(*torch.randint(0, 12, (n - 1,), generator=generator).tolist(), i) for i, n in enumerate(lengths)]
    argument = dict.fromkeys(words, 0.5) if name.startswith("Sequence") else [list(word) for word in words]
    ids, scores = random_ids(2, 30, 12).to(device), random_scores(2, wide).to(device)
    ours, theirs = (getattr(module, name)(argument)(ids, scores) for module in (fl, reference))
    assert bool((ours != scores).any())
    assert torch.equal(ours, theirs)


def test_ten_thousand_biases_of_tokens(device):
    wide, most = 12_000, 10_000
    bias = {token: token / most for token in range(most)}
    scores = random_scores(1, wide).to(device)
    expected = scores + torch.tensor([bias.get(token, 0.0) for token in range(wide)], device=device)
    listed = fl.LogitsProcessorList([fl.LogitBiasLogitsProcessor(bias)])
    assert torch.equal(listed(random_ids(1, 3, 9).to(device), scores), expected)
    batch = BatchProcessor(1, wide, device, max_length=8, max_listed=2 * most)
    batch.add(RequestParams(logit_bias=bias))
    assert torch.equal(batch.apply(scores, [0]), expected)


# -- Regular expressions -------------------------------------------------------------------------------------------


def words_tokenizer(*tokens: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))


@pytest.mark.parametrize("how", ["match", "search", "fullmatch"])
def test_a_pattern_that_backtracks_for_ever_is_refused_in_time(how, monkeypatch):
    monkeypatch.setattr(token_mask, "_SECONDS", 1)
    tokenizer = words_tokenizer("x", "a" * 40 + "b")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"pattern '\(a\+\)\+\$' takes more than 1 s over the 2 tokens"):
        TokenMask.matching(tokenizer, r"(a+)+$", how=how)
    assert time.monotonic() - began < 30


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


# -- Vocabularies --------------------------------------------------------------------------------------------------


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


# -- Limits --------------------------------------------------------------------------------------------------------


def test_as_many_tokens_as_a_request_may_have_and_one_more(device):
    batch = BatchProcessor(2, V, device, max_length=5)
    slot = batch.add(RequestParams(repetition_penalty=2.0), [1, 2, 3], [4, 5])
    assert batch.apply(torch.ones(1, V, device=device), [slot]).lt(1).sum() == 5
    with pytest.raises(ValueError, match=r"at most 5 tokens together.* got 6"):
        batch.add(RequestParams(), [1, 2, 3], [4, 5, 6])


LISTED = {
    "logit_bias": (dict.fromkeys(range(6), 1.0), 12),
    "stop_token_ids": (range(7), 7),
    "forced_tokens": ([1] * 9, 9),
    "bad_words": ([[1], [2, 3, 4], [5]], 3 * 4),
    "banned_token_ids": (range(8), 8),
    "first_tokens_suppressed": (range(8), 8),
    "dry_multiplier": (1.0, 51),
}


@pytest.mark.parametrize("name", LISTED)
def test_as_many_words_as_a_request_may_list_and_one_more(name):
    value, takes = LISTED[name]
    params = RequestParams(**{name: value})
    BatchProcessor(1, V, "cpu", max_length=8, max_listed=takes).add(params)
    with pytest.raises(ValueError, match=f"take {takes} words"):
        BatchProcessor(1, V, "cpu", max_length=8, max_listed=takes - 1).add(params)


def test_up_to_64_tokens_are_listed_and_more_are_a_mask(device):
    wide = 200
    for count, room in ((64, 64), (65, 0)):
        batch = BatchProcessor(1, wide, device, max_length=8, max_listed=room)
        batch.add(RequestParams(banned_token_ids=range(count)))
        assert int(batch.apply(torch.zeros(1, wide, device=device), [0]).isinf().sum()) == count
    with pytest.raises(ValueError, match="take 64 words"):
        BatchProcessor(1, wide, device, max_length=8, max_listed=63).add(RequestParams(banned_token_ids=range(64)))


def test_a_log_probability_for_each_token_and_one_more(device):
    batch = BatchProcessor(1, V, device, max_length=8, max_logprobs=V)
    batch.add(RequestParams(logprobs=V))
    found = batch.sample(random_scores(1, V).to(device), [0], logprobs="raw")
    assert sorted(found.top_tokens[0].tolist()) == list(range(V))
    with pytest.raises(ValueError, match="max_logprobs"):
        BatchProcessor(1, V, device, max_length=8, max_logprobs=3).add(RequestParams(logprobs=4))


@pytest.mark.parametrize("count", [32, 33, V])
def test_top_logprobs_around_what_the_kernels_look_for(count, device):
    logits = random_scores(2, V).to(device)
    found = fl.Sampler(temperature=0.0, logprobs="raw", top_logprobs=count)(logits, seeds=1, positions=0)
    expected = torch.sort(logits.log_softmax(-1), -1, descending=True)
    assert torch.equal(found.top_tokens, expected.indices[:, :count])
    torch.testing.assert_close(found.top_logprobs, expected.values[:, :count])


def test_no_more_top_logprobs_than_tokens(device):
    sampler = fl.Sampler(logprobs="raw", top_logprobs=V + 1)
    with pytest.raises(ValueError, match=f"top_logprobs must be at most {V}, the size of the vocabulary, got {V + 1}"):
        sampler(random_scores(2, V).to(device), seeds=1, positions=0)


@pytest.mark.parametrize(
    ("name", "limit", "beyond"),
    [
        ("seed", 2**64 - 1, 2**64), ("seed", -(2**63), -(2**63) - 1), ("top_p", 1.0, 1.0 + 1e-9),
        ("typical_p", 1.0, 1.0 + 1e-9), ("min_p", 1.0, 1.0 + 1e-9), ("eta", 0.0, -1e-9),
        # What a slot holds is float32, and there these are 1, 0 and infinity.
        ("epsilon", 1.0 - 1e-7, 1.0 - 1e-9), ("eta", 1.0 - 1e-7, 1.0 - 1e-9), ("typical_p", 1e-45, 1e-50),
        ("repetition_penalty", 1e-30, 1e-50), ("top_n_sigma", 3e38, 1e39), ("top_n_sigma", 1.0, 10**400),
        ("min_p", 1e-50, -1e-50), ("temperature", torch.finfo(torch.float32).max, 1e39),
        ("presence_penalty", -3e38, -1e39),
        ("dry_base", 1.4e6, 1.6e6), ("first_window", 1, 0), ("top_k", 1, -2),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # penalties of DRY that are infinite
def test_a_parameter_at_its_limit_and_beyond(name, limit, beyond, device):
    batch = BatchProcessor(1, V, device, max_length=8)
    batch.add(RequestParams(**{"dry_multiplier": 1.0, name: limit}), [1, 2, 1])
    assert not batch.apply(random_scores(1, V).to(device), [0]).isnan().any()
    with pytest.raises(ValueError, match=rf"\b{name} must"):
        RequestParams(**{name: beyond})


def test_as_much_as_an_engines_request_may_list_and_one_more():
    most = MAX_LISTED - 256
    for count, refused in ((most, False), (most + 1, True)):
        given = {"forced_tokens": [1] * count}
        if refused:
            with pytest.raises(ValueError, match=f"take {count} words .* but may take {most}"):
                read_options(given, given, "extra_args", 1.0)
        else:
            params = read_options(given, given, "extra_args", 1.0).edits
            BatchProcessor(1, V, "cpu", max_length=8, max_listed=MAX_LISTED).add(params)
