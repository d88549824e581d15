"""Attention in groups: what transformers' own does, with no copies of keys and values."""

import threading

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastlogits.inspect.hooks import _KeyHeads
from fastlogits.transformers.attention import grouped

B, KV_HEADS, N, D = 3, 2, 24, 8


def inputs(groups, L, dtype=torch.float32):
    torch.manual_seed(groups * 10 + L)
    query = torch.randn(B, KV_HEADS * groups, L, D, dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = torch.randn(2, B, KV_HEADS, N, D, dtype=dtype)
    mask = torch.arange(N) < torch.randint(1, N - L, (B, 1, 1, 1)) + torch.arange(L).unsqueeze(1)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module, query, key, value, mask


def attend(*args, **options):
    with _KeyHeads() as heads:
        attended, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **options)
    assert weights is None
    return attended, heads.seen


@pytest.mark.parametrize("L", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mask_kind", ["bool", "added", "none", "by head"])
def test_the_same_attention(groups, L, mask_kind):
    module, query, key, value, mask = inputs(groups, L)
    if mask_kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask_kind == "by head":
        mask = mask.repeat(1, KV_HEADS * groups, 1, 1)
        mask[:, ::2, :, 0] = True
    elif mask_kind == "none":
        mask = None
    wanted, _ = attend(module, query, key, value, mask, scaling=0.3)
    with grouped():
        found, heads = attend(module, query, key, value, mask, scaling=0.3)
    assert found.shape == (B, L, KV_HEADS * groups, D)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted)
    if mask_kind in ("bool", "added"):
        assert heads == {KV_HEADS}


def test_a_row_that_may_attend_to_nothing():
    module, query, key, value, mask = inputs(4, 2)
    mask[1] = False
    wanted, _ = attend(module, query, key, value, mask)
    with grouped():
        found, _ = attend(module, query, key, value, mask)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_what_is_left_behind():
    """After an error too; an attention that somebody has put there stays."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with grouped(), grouped():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain
    with pytest.raises(ZeroDivisionError), grouped():
        1 / 0  # noqa: B018
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    own = object()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with grouped():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_several_threads_at_once():
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    failed = []

    def enter_and_leave():
        try:
            for _ in range(2000):
                with grouped():
                    pass
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
