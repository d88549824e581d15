"""OnlyTokensFrom: one set of allowed tokens per row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits import LogitsProcessorList, OnlyTokensFrom, TokenMask

INF = float("inf")


def kept(processed: torch.Tensor) -> list[set[int]]:
    return [set((row > -INF).nonzero()[:, 0].tolist()) for row in processed]


@settings(deadline=None)
@given(
    source=st.lists(st.lists(st.integers(0, 69), max_size=9), min_size=1, max_size=3),
    beams=st.integers(1, 3),
    extra=st.sets(st.integers(0, 69), max_size=3),
    exclude=st.sets(st.integers(0, 69), max_size=3),
    in_place=st.booleans(),
)
def test_a_source_for_each_row(device, source, beams, extra, exclude, in_place):
    processor = OnlyTokensFrom(source, extra, eos_token_id=[5, 6], exclude=exclude, copies=beams)
    scores = torch.randn(len(source) * beams, 70, device=device)
    input_ids = torch.zeros(len(scores), 1, dtype=torch.int64, device=device)
    processed = processor.apply_(input_ids, scores.clone()) if in_place else processor(input_ids, scores)
    for row, allowed in enumerate(kept(processed)):
        assert allowed == (set(source[row // beams]) - exclude) | extra | {5, 6}
    assert torch.equal(processed.clamp(min=-9), torch.where(processed == -INF, -9.0, scores).clamp(min=-9))


def test_one_source_for_all_rows(device):
    for source in ([3, 4, 3], torch.tensor([3, 4]), torch.tensor([[4, 3]], dtype=torch.int32)):
        processed = OnlyTokensFrom(source, eos_token_id=1)(
            torch.zeros(3, 2, dtype=torch.int64, device=device), torch.zeros(3, 40, device=device)
        )
        assert kept(processed) == [{1, 3, 4}] * 3


def test_the_prompt_of_each_row_whatever_comes_after_it(device):
    ids = torch.tensor([[3, 4, 4, 9, 9], [7, 3, 90, 9, 9]], device=device)
    processor = OnlyTokensFrom("prompt", [2], eos_token_id=1, exclude=[3])
    scores = torch.zeros(2, 40, device=device)
    expected = [{1, 2, 4}, {1, 2, 7}]  # 90 is outside the vocabulary: an image placeholder, say
    assert kept(processor.for_run(3)(ids, scores)) == expected
    assert kept(processor.for_run(torch.tensor([3, 3], device=device))(ids, scores)) == expected
    assert kept(processor.for_run(torch.tensor([1, 2], device=device))(ids, scores)) == [{1, 2}, {1, 2, 7}]
    assert kept(LogitsProcessorList([processor])(ids, scores, prompt_length=3)) == expected


def test_the_set_is_built_once_a_run():
    run = OnlyTokensFrom("prompt", eos_token_id=1).for_run(2)
    scores = torch.zeros(1, 40)
    assert kept(run(torch.tensor([[3, 4]]), scores)) == [{1, 3, 4}]
    # Another history of the same run doesn't matter: beams of one prompt change places.
    assert kept(run(torch.tensor([[8, 8, 9]]), scores)) == [{1, 3, 4}]
    # Another number of rows does.
    assert kept(run(torch.tensor([[8, 8], [6, 6]]), torch.zeros(2, 40))) == [{1, 8}, {1, 6}]


def test_masks_as_extra_and_exclude():
    comma = TokenMask.from_ids([9], 40)
    processor = OnlyTokensFrom([3, 4], comma, eos_token_id=(), exclude=TokenMask.from_ids([4], 40))
    assert kept(processor(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 40))) == [{3, 9}]


def test_an_empty_prompt_allows_the_end_only():
    run = OnlyTokensFrom("prompt", eos_token_id=1).for_run()
    assert kept(run(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 40))) == [{1}, {1}]
