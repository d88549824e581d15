"""DRY, against a loop over rows and tokens written from its definition."""

import itertools

import pytest
import torch
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits import LogitsProcessorList, TokenMask
from fastlogits.processors.dry import DRYLogitsProcessor
from tests.campaign.sanitizer_cases import forced
from tests.processors.toy import DEVICE, DTYPES, INF, V, add, captured, same, scores_of


def dry_row(ids, row, multiplier, base, allowed, breakers, range_):
    ids, row = ids[-range_:] if range_ else ids, row.clone()
    longest = {}
    for i in range(len(ids) - 1):  # a match ends at i
        n = 0
        while n < 50 and n <= i and ids[i - n] == ids[-1 - n] and ids[i - n] not in breakers:
            n += 1
        longest[ids[i + 1]] = max(n, longest.get(ids[i + 1], 0))
    for token, n in longest.items():
        if n >= max(1, allowed) and token not in breakers and token < len(row):
            add(row, token, -multiplier * base ** (n - allowed))
    return row


def test_what_would_extend_a_repetition_but_is_a_breaker_is_left_alone(device):
    """Also where only the device knows the length, which is found by another way."""
    ids, scores = torch.tensor([[1, 2, 1], [1, 3, 1]], device=device), torch.zeros(2, 10, device=device)
    processor = DRYLogitsProcessor(1.0, 2.0, 1, sequence_breakers=[2])
    newest = torch.tensor(2, device=device)
    for found in (processor(ids, scores), processor.for_run(cache_position=newest)(ids, scores)):
        assert not found[0].any()
        assert found[1, 3] == -1


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_dry(data):
    draw = data.draw
    tokens = draw(st.sampled_from([2, 3, 9, 12]))  # 12: some are outside the vocabulary of 10
    length = draw(st.sampled_from([0, 1, 2, 3, 10, 30, 140]))
    rows = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(0, tokens, (rows, length), dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    if length > 30:  # long repetitions
        ids[0, -draw(st.integers(1, 60)) :] = 1
        ids[-1, 70:] = ids[-1, :70]
    scores = torch.randn(rows, 30)[:, 7:17].to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        scores[0, 3], scores[0, 4] = -INF, float("nan")
    arguments = {
        "multiplier": draw(st.sampled_from([0.0, 0.8, 3.0])),
        "base": draw(st.sampled_from([1.0, 1.75, 4.0])),
        "allowed_length": draw(st.integers(0, 4)),
        "range_": draw(st.sampled_from([0, 0, 1, 5, 20])),
    }
    breakers = draw(st.sets(st.integers(0, 9), max_size=2))
    given_breakers = TokenMask.from_ids(breakers, 10) if draw(st.booleans()) else list(breakers)
    processor = DRYLogitsProcessor(**arguments, sequence_breakers=given_breakers)
    ids, scores = ids.to(DEVICE), scores.to(DEVICE)
    before, seen = scores.clone(), ids.clone()
    processed = processor(ids, scores)
    assert same(scores, before)
    assert torch.equal(ids, seen)
    for row in range(rows):
        expected = dry_row(
            ids[row].tolist(), scores[row], arguments["multiplier"], arguments["base"], arguments["allowed_length"],
            breakers, arguments["range_"],
        )  # fmt: skip
        assert same(processed[row], expected), (ids[row], processed[row], expected)
        assert same(processor(ids[row : row + 1], scores[row : row + 1])[0], processed[row])
    assert same(processor.apply_(ids, scores.clone()), processed)
    if length:  # the same where only the device knows how long the text is
        newest = torch.tensor(length - 1, device=ids.device)
        assert same(processor.for_run(cache_position=newest)(ids, scores), processed)
    if HAS_TRITON and (scores.dtype != torch.bfloat16 or DEVICE == "cuda"):  # which Triton's interpreter truncates
        with forced(True):
            assert same(processor(ids, scores), processed)


def test_dry_length_is_capped():
    processor = DRYLogitsProcessor(1.0, 2.0, 2)
    processed = processor(torch.ones(1, 400, dtype=torch.int64, device=DEVICE), torch.zeros(1, 3, device=DEVICE))
    assert processed.tolist() == [[0.0, -(2.0**48), 0.0]]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("multiplier", -1.0), ("multiplier", INF), ("multiplier", True), ("multiplier", "1"), ("base", 0.9),
        ("base", float("nan")), ("base", 1e9), ("allowed_length", -1), ("allowed_length", 1.5), ("range_", -2),
        ("sequence_breakers", [1.5]), ("sequence_breakers", "abc"),
    ],
)  # fmt: skip
def test_dry_refuses(argument, value):
    with pytest.raises(ValueError, match=argument):
        DRYLogitsProcessor(**{"multiplier": 1.0, argument: value})


def test_dry_refuses_breakers_outside_the_vocabulary():
    processor = DRYLogitsProcessor(1.0, sequence_breakers=[7])
    with pytest.raises(ValueError, match="sequence_breakers: token id 7"):
        processor(torch.ones(1, 3, dtype=torch.int64, device=DEVICE), torch.zeros(1, 5, device=DEVICE))


def test_dry_breaks_the_loop_of_a_model(llama):
    inputs = torch.tensor([[1, 5, 6, 7, 5, 6, 7, 5, 6]])
    processors = LogitsProcessorList([DRYLogitsProcessor(50.0, 4.0, 1)])
    result = llama.generate(
        inputs, logits_processor=processors, max_new_tokens=25, do_sample=False, output_logits=True,
        output_scores=True, return_dict_in_generate=True, eos_token_id=-1,
    )  # fmt: skip
    for step, (logits, scores) in enumerate(zip(result.logits, result.scores, strict=True)):
        ids = result.sequences[0, : inputs.shape[1] + step].tolist()
        assert same(scores[0], dry_row(ids, logits[0], 50.0, 4.0, 1, (), 0))
    pairs = list(itertools.pairwise(result.sequences[0, inputs.shape[1] :].tolist()))
    assert len(set(pairs)) > len(pairs) - 3


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_once_and_replayed_without_a_sync():
    texts = [[4, 5, 3, 7, 4, 6, 3, 12], [4, 6, 3, 7, 4, 5, 3, 12]]
    ids, scores = torch.zeros(2, 30, dtype=torch.int64, device=DEVICE), torch.zeros(2, V, device=DEVICE)
    processors = LogitsProcessorList([DRYLogitsProcessor(1.0, 2.0, 1, [3])])
    graph, result = captured(lambda: processors(ids, scores))
    for _ in range(15):
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, device=DEVICE)
            scores[row] = scores_of(text).to(DEVICE)
        graph.replay()
        for row, text in enumerate(texts):
            assert same(result[row], dry_row(ids[row].tolist(), scores[row], 1.0, 2.0, 1, {3}, 0))
            text.append(int(result[row].argmax()))
