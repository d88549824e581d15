"""SuppressFirstTokens: which steps, which tokens, on the host and on the device."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SuppressTokensAtBeginLogitsProcessor

from fastlogits import (
    LogitsProcessorList,
    OnlyTokensFrom,
    SuppressFirstTokens,
    SuppressSpecificBOSTokenLogitsProcessor,
    TokenMask,
)
from fastlogits.demo.article_loop import ArticleLoop

INF = float("inf")


@settings(deadline=None)
@given(
    batch=st.integers(0, 4),
    vocab=st.integers(2, 200),
    step=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    id_dtype=st.sampled_from([torch.int64, torch.int32]),
    strided=st.booleans(),
    data=st.data(),
)
def test_same_as_the_loop_and_as_transformers(batch, vocab, step, dtype, id_dtype, strided, data):
    ids = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=12))
    scores = torch.randn(batch, 3 * vocab).to(dtype)
    scores = scores[:, vocab : 2 * vocab] if strided else scores[:, :vocab].contiguous()
    input_ids = torch.zeros(batch, 5 + step, dtype=id_dtype)
    before = scores.clone()
    expected = ArticleLoop(ids, prompt_length=5)(input_ids, scores.clone())
    assert torch.equal(SuppressTokensAtBeginLogitsProcessor(ids, 5)(input_ids, scores), expected)

    for processor in (SuppressFirstTokens(ids), SuppressSpecificBOSTokenLogitsProcessor(ids)):
        processed = LogitsProcessorList([processor])(input_ids, scores, prompt_length=5)
        assert processed.dtype == dtype
        assert torch.equal(processed, expected)
        assert torch.equal(scores, before)
        in_place = scores.clone()
        assert processor.for_run(prompt_length=5).apply_(input_ids, in_place) is in_place
        assert torch.equal(in_place, expected)


def test_window_and_the_input_itself_after_it():
    run = SuppressFirstTokens([1], window=2).for_run(prompt_length=3)
    scores = torch.zeros(1, 4)
    for length, banned in ((3, True), (4, True), (5, False), (3, True), (9, False)):
        processed = run(torch.zeros(1, length, dtype=torch.int64), scores)
        assert (processed[0, 1] == -INF) == banned
        assert (processed is scores) == (not banned)
    assert torch.equal(scores, torch.zeros(1, 4))


def test_start_is_the_first_length_seen_where_none_is_given():
    run = SuppressFirstTokens([1]).for_run()
    assert run(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 4))[0, 1] == -INF
    assert run(torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 4))[0, 1] == 0
    # A draft model with another vocabulary counts by itself.
    assert run(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 5))[0, 1] == -INF
    assert run(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 4))[0, 1] == -INF


def positions(per_row: bool, device: str):
    if per_row:
        return st.lists(st.integers(0, 12), min_size=3, max_size=3).map(lambda p: torch.tensor(p, device=device))
    return st.integers(0, 12) | st.integers(0, 12).map(lambda p: torch.tensor(p, device=device))


@settings(deadline=None)
@given(data=st.data(), cache_per_row=st.booleans(), prompt_per_row=st.booleans(), window=st.integers(1, 4))
def test_positions_on_the_device_and_per_row(device, data, cache_per_row, prompt_per_row, window):
    cache = data.draw(positions(cache_per_row, device))
    prompt = data.draw(positions(prompt_per_row, device))
    step = (torch.as_tensor(cache).cpu() + 1 - torch.as_tensor(prompt).cpu()).expand(3)
    scores = torch.randn(3, 70, device=device)
    run = SuppressFirstTokens([0, 33, 69], window=window).for_run(prompt, cache)
    expected = scores.clone()
    for row in range(3):
        if step[row] < window:
            expected[row, [0, 33, 69]] = -INF
    input_ids = torch.zeros(3, 1, dtype=torch.int64, device=device)
    assert torch.equal(run(input_ids, scores), expected)
    assert torch.equal(run.apply_(input_ids, scores.clone()), expected)


@settings(deadline=None)
@given(
    generated=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=2),
    step=st.integers(0, 4),
    window=st.integers(1, 3),
    on_device=st.booleans(),
)
def test_blank_tokens_keep_the_ban(device, generated, step, window, on_device):
    """Banned while step < window, and then while all generated tokens are blank; per row."""
    prompt = torch.full((2, 3), 5)
    input_ids = torch.cat([prompt, torch.tensor(generated)], 1)[:, : 3 + step].to(device)
    processor = SuppressFirstTokens([1, 2], window=window, blank=[0, 3])
    start = torch.tensor([3, 3], device=device) if on_device else 3
    scores = torch.zeros(2, 40, device=device)
    processed = processor.for_run(prompt_length=start)(input_ids, scores)
    in_place = processor.for_run(prompt_length=start).apply_(input_ids, scores.clone())
    for row in range(2):
        banned = step < window or all(token in (0, 3) for token in generated[row][:step])
        assert (processed[row, 1] == -INF) == banned
        assert torch.equal(processed[row], in_place[row])


def test_a_bare_space_first(sentencepiece):
    """With the bare space blank, a digit is still forbidden as the first visible token."""
    digits = TokenMask.matching(sentencepiece, r"\s*\d")
    space = TokenMask.matching(sentencepiece, r"\s+", how="fullmatch")
    assert len(space)
    run = SuppressFirstTokens(digits, blank=space).for_run(prompt_length=2)
    scores = torch.zeros(1, len(sentencepiece))
    digit, bare, word = next(iter(digits)), next(iter(space)), sentencepiece.convert_tokens_to_ids("r")
    for history, banned in (([], True), ([bare], True), ([bare, bare], True), ([bare, word], False), ([word], False)):
        assert (run(torch.tensor([[1, 1, *history]]), scores)[0, digit] == -INF) == banned


@pytest.mark.parametrize("value", [float("nan"), INF, -INF, 0.0])
def test_odd_scores(value, device):
    scores = torch.full((2, 33), value, device=device)
    processed = SuppressFirstTokens([0, 32]).for_run(3)(torch.zeros(2, 3, dtype=torch.int64, device=device), scores)
    assert (processed[:, [0, 32]] == -INF).all()
    assert torch.equal(processed[:, 1:32], scores[:, 1:32]) or (value != value and processed[:, 1:32].isnan().all())


def test_padded_vocabulary(sentencepiece):
    digits = TokenMask.matching(sentencepiece, r"\s*\d")
    scores = torch.zeros(1, len(sentencepiece) + 64)
    processed = SuppressFirstTokens(digits).for_run(1)(torch.zeros(1, 1, dtype=torch.int64), scores)
    assert (processed == -INF).nonzero()[:, 1].tolist() == list(digits)


def test_empty_set_warns_once_and_does_nothing():
    with pytest.warns(UserWarning, match="mask_or_ids is empty: SuppressFirstTokens does nothing") as seen:
        processor = SuppressFirstTokens([])
    scores = torch.zeros(1, 4)
    assert processor.for_run(1)(torch.zeros(1, 1, dtype=torch.int64), scores) is scores
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="bad_bos_token_id_list is empty"):
        SuppressSpecificBOSTokenLogitsProcessor([])
    with pytest.warns(UserWarning, match="mask_or_ids is empty"):
        SuppressFirstTokens(TokenMask.from_ids([], 10))


def one(length=1):
    return torch.zeros(1, length, dtype=torch.int64)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: SuppressFirstTokens([-1]), "mask_or_ids must be token ids of at least 0, got -1"),
        (lambda: SuppressFirstTokens(["1"]), "mask_or_ids must be integer token ids, got '1'"),
        (lambda: SuppressFirstTokens([0.5]), "mask_or_ids must be integer token ids, got 0.5"),
        (lambda: SuppressFirstTokens("123"), "mask_or_ids must be token ids or a TokenMask, got '123'"),
        (lambda: SuppressFirstTokens([1], window=0), "window must be an integer of at least 1, got 0"),
        (lambda: SuppressFirstTokens([1], window=True), "window must be an integer of at least 1, got True"),
        (lambda: SuppressFirstTokens([1], window=1.5), "window must be an integer of at least 1, got 1.5"),
        (lambda: SuppressFirstTokens([1], blank=[-3]), "blank must be token ids of at least 0, got -3"),
        (
            lambda: SuppressSpecificBOSTokenLogitsProcessor([-1]),
            "bad_bos_token_id_list must be token ids of at least 0, got -1",
        ),
        (
            lambda: SuppressFirstTokens([4]).for_run(1)(one(), torch.zeros(1, 4)),
            "mask_or_ids: token id 4 is outside the vocabulary of 4 tokens (0 to 3)",
        ),
        (
            lambda: SuppressSpecificBOSTokenLogitsProcessor([4]).for_run(1)(one(), torch.zeros(1, 4)),
            "bad_bos_token_id_list: token id 4 is outside the vocabulary of 4 tokens (0 to 3)",
        ),
        (
            lambda: SuppressFirstTokens([1], blank=[7]).for_run(1)(one(), torch.zeros(1, 4)),
            "blank: token id 7 is outside the vocabulary of 4 tokens (0 to 3)",
        ),
        (
            lambda: SuppressFirstTokens(TokenMask.from_ids([1], 5)).for_run(1)(one(), torch.zeros(1, 4)),
            "mask_or_ids: the mask has a vocabulary of 5 tokens, but 4 are needed here",
        ),
        (
            lambda: SuppressFirstTokens([1]).for_run(1)(one(), torch.zeros(4)),
            "scores must be floating-point of shape (B, V), got torch.float32 of (4,)",
        ),
        (
            lambda: SuppressFirstTokens([1]).for_run(1)(one(), torch.zeros(1, 4, dtype=torch.int64)),
            "scores must be floating-point of shape (B, V), got torch.int64 of (1, 4)",
        ),
        (
            lambda: SuppressFirstTokens([1]).for_run(1)(one().to("meta"), torch.zeros(1, 4)),
            "input_ids is on meta, but scores are on cpu",
        ),
        (
            lambda: SuppressFirstTokens([1]).for_run(one()[0].to("meta"))(one(), torch.zeros(1, 4)),
            "prompt_length must be on cpu, as scores are, got it on meta",
        ),
        (
            lambda: SuppressFirstTokens([1]).for_run(torch.tensor([1, 1]))(one(), torch.zeros(1, 4)),
            "prompt_length must be a number, or have a value for each of the 1 rows of scores, got 2 values",
        ),
        (lambda: SuppressFirstTokens([1]).for_run(-1), "prompt_length must be at least 0, got -1"),
        (
            lambda: LogitsProcessorList([SuppressFirstTokens([1])])(one(), torch.zeros(1, 4), prompt_length="1"),
            "prompt_length must be an integer or an integer tensor, got '1'",
        ),
        (
            lambda: OnlyTokensFrom("promt", eos_token_id=1),
            "source_ids must be token ids or 'prompt', got 'promt'",
        ),
        (lambda: OnlyTokensFrom([-1], eos_token_id=1), "source_ids must be token ids of at least 0, got -1"),
        (lambda: OnlyTokensFrom(3, eos_token_id=1), "source_ids must be token ids or 'prompt', got 3"),
        (lambda: OnlyTokensFrom([3], eos_token_id=-1), "eos_token_id must be token ids of at least 0, got -1"),
        (lambda: OnlyTokensFrom([3], [-2], eos_token_id=1), "extra must be token ids of at least 0, got -2"),
        (lambda: OnlyTokensFrom(torch.zeros(1, 1, 1).int(), eos_token_id=1), "source_ids must be of shape (L,) or"),
        (
            lambda: OnlyTokensFrom([9], eos_token_id=1)(one(), torch.zeros(1, 4)),
            "source_ids: token id 9 is outside the vocabulary of 4 tokens",
        ),
        (
            lambda: OnlyTokensFrom([1], eos_token_id=9)(one(), torch.zeros(1, 4)),
            "eos_token_id: token id 9 is outside the vocabulary of 4 tokens",
        ),
        (
            lambda: OnlyTokensFrom([[1], [2]], eos_token_id=0)(one(), torch.zeros(1, 4)),
            "source_ids must have 1 row, or one for each row of scores, got 2 rows for 1 rows of scores",
        ),
    ],
)
def test_bad_input(attempt, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attempt()


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: SuppressFirstTokens([1])(one(), torch.zeros(1, 4)),
        lambda: LogitsProcessorList([SuppressFirstTokens([1])])(one(), torch.zeros(1, 4)),
        lambda: OnlyTokensFrom("prompt", eos_token_id=1)(one(), torch.zeros(1, 4)),
        lambda: SuppressFirstTokens([1]).apply_(one(), torch.zeros(1, 4)),
    ],
)
def test_an_unknown_start_names_the_three_ways(attempt):
    with pytest.raises(ValueError, match="can't know which step this is") as error:
        attempt()
    for way in ("fastlogits.LogitsProcessorList([...])", "for_run(prompt_length=", "(1) prompt_length=..., where you"):
        assert way in str(error.value)
