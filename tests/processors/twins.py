"""A processor of ours beside that of transformers with its name: the same calls, the same results."""

import copy

import pytest
import torch
import transformers.generation.logits_process as theirs
from hypothesis import settings
from hypothesis import strategies as st

from fastlogits.plan.plan import Plan
from fastlogits.plan.stages import Member
from fastlogits.processors import audio, beams, constrained, guidance, watermark

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (audio, beams, constrained, guidance, watermark)
INF = float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
few = settings(deadline=None, max_examples=40)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def ours(name):
    return next(getattr(module, name) for module in MODULES if name in vars(module))


def bit_equal(a, b):
    same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)
    return same and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def close(a, b):
    """Equal but for the order of sums: in probability, since a tournament may take one to almost zero."""
    return a.dtype == b.dtype and torch.allclose(
        a.double().exp(), b.double().exp(), rtol=1e-4, atol=2e-6, equal_nan=True
    )


def draw_scores(draw, B, V, dtype=None, odd=True):
    """Scores in the layouts that callers have; ties, NaN and infinities among them."""
    values = torch.randn(B, V) * draw(st.sampled_from([0.5, 3.0, 20.0]))
    if draw(st.booleans()):
        values = values.round()
    if odd and draw(st.booleans()):
        for value in (float("nan"), INF, -INF, -INF, -0.0):
            values[draw(st.integers(0, B - 1)), draw(st.integers(0, V - 1))] = value
    if odd and draw(st.integers(0, 5)) == 0:
        values[draw(st.integers(0, B - 1))] = -INF
    values = values.to(DEVICE, dtype or draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["plain", "last position", "sliced", "column-major"]))
    if layout == "plain":
        return values
    if layout == "column-major":
        return values.T.contiguous().T
    wide = values.new_zeros(B, 3 * V + 5)
    start = 2 * V if layout == "last position" else 5
    wide[:, start : start + V] = values
    return wide[:, start : start + V]


def draw_ids(draw, B, L, high):
    dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.int32]))
    return torch.randint(0, high, (B, 2 * L), dtype=dtype, device=DEVICE)[:, ::2]


def compare(name, arguments, calls, equal=bit_equal, reads=()):
    """Call both classes, and the fast stage of transformers' own object, step by step."""
    cls = ours(name)
    expecting = getattr(theirs, name)(**copy.deepcopy(arguments))
    fast = cls(**copy.deepcopy(arguments))
    twin = getattr(theirs, name)(**copy.deepcopy(arguments))
    functions = {fast: fast, twin: Plan.compile([Member(name, cls.stage(twin))])}
    for ids, scores in calls:
        # Two of transformers' classes write what they are given.
        expected = expecting(ids.clone(), scores.clone())
        for processor, function in functions.items():
            seen_ids, seen = ids.clone(), scores.clone()
            result = function(ids, scores)
            assert equal(result, expected), (name, result, expected)
            assert bit_equal(scores, seen)
            assert torch.equal(ids, seen_ids)
            for attribute in reads:
                a, b = getattr(processor, attribute), getattr(expecting, attribute)
                assert bit_equal(a, b) if isinstance(a, torch.Tensor) else a == b
