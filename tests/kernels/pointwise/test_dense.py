"""Edits that an engine has put together as whole rows: in torch, one after the other, and in the kernel."""

import itertools

import pytest
import torch
from fastlogits_kernels.pointwise import dense
from fastlogits_kernels.pointwise.dense import DenseEdits, edit_densely_
from fastlogits_kernels.runtime.bits import pack_bits, words

NEG = float("-inf")
# Triton's interpreter truncates to bfloat16, where the GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def edits_of(B, V, repeat, given, device):
    torch.manual_seed(V + repeat)
    R, W = B // repeat, words(V)
    added, scales, biases = torch.randn(R, V), 1 + torch.rand(R, V), torch.randn(R, V)
    added[:, ::7], scales[:, ::3] = NEG, 1.0
    bits = pack_bits(torch.rand(B, 32 * (W + 1)) < 0.5)
    every = [added, scales, bits, biases]
    return DenseEdits(*[each.to(device) if held else None for each, held in zip(every, given, strict=True)])


def one_by_one(logits, edits, repeat):
    """What an engine does without this kernel."""
    x = logits.clone()
    added, scales, biases = (
        None if each is None else each.repeat_interleave(repeat, 0)
        for each in (edits.added, edits.scales, edits.biases)
    )
    if added is not None:
        x = (x.float() + added).to(x.dtype)
    if scales is not None:
        x = torch.where(x < 0, x.float() * scales, x.float() / scales).to(x.dtype)
    if edits.bitmask is not None:
        token = torch.arange(x.shape[1], device=x.device)
        x[((edits.bitmask[:, token // 32] >> (token % 32).int()) & 1) == 0] = NEG
    return x if biases is None else (x.float() + biases).to(x.dtype)


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "V"), [(1, 33), (3, 1100)])
def test_all_and_any_of_them(repeat, V, dtype, kernel, device, monkeypatch):
    monkeypatch.setattr(dense, "FORCE_KERNEL", kernel)
    B = 2 * repeat
    wide = torch.randn(B, V + 5, device=device).mul_(4).to(dtype)
    wide[0, 3], wide[1, 4] = float("nan"), NEG
    for given in itertools.product([True, False], repeat=4):
        logits = wide.clone()[:, 2 : V + 2]
        edits = edits_of(B, V, repeat, given, device)
        expected = one_by_one(logits, edits, repeat)
        found = edit_densely_(logits, edits, repeat)
        assert found is logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit(device):
    logits = torch.zeros(4, 40, device=device)
    for edits, repeat in (
        (DenseEdits(added=torch.zeros(4, 41, device=device)), 1),
        (DenseEdits(scales=torch.ones(4, 40, device=device)), 2),
        (DenseEdits(bitmask=torch.zeros(4, 1, dtype=torch.int32, device=device)), 1),
        (DenseEdits(biases=torch.zeros(40, 4, device=device).t()), 1),
        (DenseEdits(biases=torch.zeros(4, 40, dtype=torch.float64, device=device)), 1),
    ):
        with pytest.raises(ValueError, match="must be torch"):
            edit_densely_(logits, edits, repeat)
    assert not logits.any()
