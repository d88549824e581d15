"""As much as a request and a batch may have, and one more."""

import pytest
import torch

from fastlogits import BatchProcessor, RequestParams
from fastlogits.integrations.requests import MAX_LISTED, read_options

pytestmark = pytest.mark.usefixtures("one_thread")

V = 50


def random_scores(B: int, V: int) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(0)) * 3


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
