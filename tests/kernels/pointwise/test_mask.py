"""Kernels against their torch references: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from fastlogits_kernels.pointwise.mask import Bans, launch_mask_tokens, mask_tokens, mask_tokens_, reference_mask_tokens
from fastlogits_kernels.pointwise.pack_ids import launch_pack_ids, pack_ids, reference_pack_ids
from fastlogits_kernels.runtime import launcher as runtime
from fastlogits_kernels.runtime.bits import pack_bits, unpack_bits, words
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")

SIZES = [1, 31, 32, 33, 64, 100, 1000, 4100]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def odd_scores(draw, B, V, dtype, device):
    """Scores in the layouts that callers have, with odd values among them."""
    values = torch.randn(B, V).masked_fill(torch.rand(B, V) < 0.1, float("nan"))
    values = values.masked_fill(torch.rand(B, V) < 0.1, float("inf")).to(device, dtype)
    layout = draw(st.sampled_from(["contiguous", "last position", "sliced", "unaligned", "column-major"]))
    if layout == "contiguous":
        return values
    if layout == "column-major":
        return values.T.contiguous().T
    L, start = {"last position": (3 * V, 2 * V), "sliced": (V + 24, 8), "unaligned": (V + 3, 1)}[layout]
    wide = torch.full((B, L), 7.0, device=device, dtype=dtype)
    wide[:, start : start + V] = values
    return wide[:, start : start + V]


@st.composite
def cases(draw, device):
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, V, G, L = draw(st.integers(1, 4)), draw(st.sampled_from(SIZES)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    id_dtype = draw(st.sampled_from([torch.int32, torch.int64]))

    def maybe(value):
        return draw(st.sampled_from([value, None]))

    rows = (torch.rand(G, V) < draw(st.sampled_from([0.02, 0.5, 1.0]))).to(device)
    rows[:, draw(st.integers(0, V - 1))] = True
    windows = maybe(torch.randint(1, 4, (G,), dtype=torch.int32, device=device))
    positions = [
        maybe(torch.randint(0, L, shape, dtype=id_dtype, device=device))
        for shape in (draw(st.sampled_from([(), (B,)])), draw(st.sampled_from([(), (B,)])))
    ]
    bans = Bans(
        sets=pack_bits(rows),
        tokens=maybe(rows[0].nonzero().flatten()) if G == 1 else None,
        allowed=maybe(pack_bits(torch.rand(draw(st.sampled_from([1, B])), V) < 0.5).to(device)),
        windows=windows,
        blanks=None if windows is None else maybe(pack_bits(torch.rand(G, V) < 0.7).to(device)),
        input_ids=torch.randint(-1, V + 2, (B, 2 * L), dtype=id_dtype, device=device)[:, ::2],
        cache_position=positions[0],
        prompt_length=positions[1],
        cache_offset=draw(st.integers(0, 3)),
        prompt_offset=draw(st.integers(0, 3)),
    )
    return odd_scores(draw, B, V, dtype, device), bans


def bit_equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=77), b.nan_to_num(nan=77))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_mask_tokens(device, data):
    scores, bans = data.draw(cases(device))
    before = scores.clone()
    expected = reference_mask_tokens(scores, None, bans)
    out = torch.full(scores.shape, float("nan"), dtype=scores.dtype, device=device)
    launch_mask_tokens(scores, out, bans)
    assert bit_equal(out, expected)
    assert bit_equal(scores, before)
    in_place = scores if data.draw(st.booleans()) else scores.clone()
    launch_mask_tokens(in_place, in_place, bans)
    assert bit_equal(in_place, expected)
    assert bit_equal(reference_mask_tokens(before, before, bans), expected)


def test_nothing_beside_the_rows_is_written(device):
    wide = torch.full((5, 200), 7.0, device=device)
    view = wide[1:4, 33:133]
    launch_mask_tokens(view, view, Bans(pack_bits(torch.ones(1, 100, dtype=torch.bool, device=device))))
    assert view.isinf().all()
    assert (wide == 7).sum() == 5 * 200 - 3 * 100


@given(rows=st.lists(st.lists(st.booleans(), min_size=70, max_size=70), min_size=1, max_size=3))
@settings(deadline=None)
def test_bits(rows):
    rows = torch.tensor(rows)
    assert torch.equal(unpack_bits(pack_bits(rows), 70), rows)
    assert unpack_bits(pack_bits(rows), 200)[:, 70:].sum() == 0
    assert words(0) == 0


@settings(deadline=None)
@given(
    B=st.integers(1, 3),
    L=st.integers(0, 600),
    V=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_pack_ids(device, B, L, V, dtype, seed):
    torch.manual_seed(seed)
    ids = torch.randint(-3, V + 5, (B, 2 * L), dtype=dtype, device=device)[:, ::2]
    bits = torch.zeros(B, words(V), dtype=torch.int32, device=device)
    launch_pack_ids(ids, bits, V)
    assert torch.equal(bits, reference_pack_ids(ids, V))
    assert [set(row.nonzero().flatten().tolist()) for row in unpack_bits(bits, V).cpu()] == [
        {i for i in row if 0 <= i < V} for row in ids.tolist()
    ]


def test_registered_operations(device):
    rows = torch.rand(2, 100, device=device) < 0.3
    bans = Bans(pack_bits(rows), None, None, torch.tensor([1, 2], dtype=torch.int32, device=device), cache_offset=3)
    scores = torch.randn(3, 100, device=device)
    for operation in (torch.ops.fastlogits.mask_tokens.default, torch.ops.fastlogits.mask_tokens_.default):
        torch.library.opcheck(operation, (scores.clone(), *bans))
    torch.library.opcheck(torch.ops.fastlogits.pack_ids.default, (torch.randint(0, 9, (2, 3), device=device), 40))
    assert torch.equal(torch.ops.fastlogits.mask_tokens(scores, *bans), mask_tokens(scores, bans))
    in_place = scores.clone()
    mask_tokens_(in_place, bans)
    assert torch.equal(in_place, mask_tokens(scores, bans))


def test_empty_batch(device):
    bans = Bans(torch.ones(1, 2, dtype=torch.int32, device=device))
    assert mask_tokens(torch.zeros(0, 40, device=device), bans).shape == (0, 40)
    mask_tokens_(torch.zeros(0, 40, device=device), bans)
    assert pack_ids(torch.zeros(0, 4, dtype=torch.int64, device=device), 40).shape == (0, 2)


@needs_gpu
def test_more_than_two_to_the_31_elements():
    V, B = 2**17, 2**14 + 3
    scores = torch.zeros(B, V, device="cuda", dtype=torch.float16)
    sets = torch.zeros(1, words(V), dtype=torch.int32, device="cuda")
    sets[0, -1] = 1 << 30
    mask_tokens_(scores, Bans(sets))
    assert (scores[:, V - 2] == float("-inf")).all()
    assert scores.isinf().sum() == B
    out = mask_tokens(scores, Bans(sets, tokens=None))
    assert torch.equal(out, scores)
    del out
    scores.zero_()
    mask_tokens_(scores, Bans(sets, tokens=torch.tensor([V - 2], device="cuda")))
    assert (scores[:, V - 2] == float("-inf")).all()
    assert scores.isinf().sum() == B


@needs_gpu
def test_one_captured_graph_serves_every_step():
    from fastlogits import LogitsProcessorList, OnlyTokensFrom, SuppressFirstTokens

    B, V = 4, 1000
    scores, ids = torch.zeros(B, V, device="cuda"), torch.zeros(B, 16, dtype=torch.int64, device="cuda")
    cache, prompt = torch.zeros(B, dtype=torch.int64, device="cuda"), torch.zeros(B, dtype=torch.int64, device="cuda")
    processors = LogitsProcessorList(
        [
            SuppressFirstTokens([1, 999]),
            SuppressFirstTokens([5], 2, blank=[7]),
            OnlyTokensFrom(range(900), eos_token_id=9),
        ]
    )
    run = processors.for_run(prompt, cache)
    run(ids, scores)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(ids, scores)
    for step in ([0, 1, 2, 3], [2, 0, 1, 0], [3, 3, 3, 3]):
        scores.copy_(torch.randn(B, V))
        prompt.copy_(torch.tensor([3, 4, 5, 6]))
        cache.copy_(prompt + torch.tensor(step, device="cuda") - 1)
        ids.copy_(torch.randint(0, 9, (B, 16)))
        ids[0, 3:6] = 7
        graph.replay()
        assert torch.equal(out, run(ids, scores))
        assert torch.equal(out.cpu(), processors.for_run(prompt.cpu(), cache.cpu())(ids.cpu(), scores.cpu()))


@needs_gpu
def test_no_call_waits_for_the_device():
    from fastlogits import LogitsProcessorList, OnlyTokensFrom, SuppressFirstTokens

    scores, ids = torch.zeros(4, 1000, device="cuda"), torch.zeros(4, 16, dtype=torch.int64, device="cuda")
    start = torch.full((4,), 16, device="cuda")
    processors = LogitsProcessorList(
        [SuppressFirstTokens([1]), SuppressFirstTokens([5], 2, blank=[7]), OnlyTokensFrom("prompt", eos_token_id=9)]
    )
    single = LogitsProcessorList([SuppressFirstTokens([1])])
    runs = [each.for_run(where) for each in (processors, single) for where in (16, start)]
    for run in runs:
        run(ids, scores)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in runs:
            run(ids, scores)
            run.apply_(ids, scores)
        processors.for_run(start)(ids, scores)  # a new run builds its masks
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_positions_and_lengths_compile_nothing_new():
    from fastlogits_kernels.pointwise.mask import _mask_tokens_launcher as launcher

    from fastlogits import SuppressFirstTokens

    scores = torch.zeros(4, 1000, device="cuda")
    processor = SuppressFirstTokens([1], window=40, blank=[5])
    processor.for_run(1)(torch.zeros(4, 1, dtype=torch.int64, device="cuda"), scores)
    known = len(launcher.compiled)
    for length in (1, 2, 15, 16, 17, 32, 48):
        for start in (start for start in (1, 2, 16, 17) if start <= length):
            ids = torch.zeros(4, length, dtype=torch.int64, device="cuda")
            processor.for_run(start)(ids, scores)
            torch.cuda.synchronize()
    assert len(launcher.compiled) == known


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    scores = torch.zeros(2, 100, device="cuda:1")
    bans = Bans(pack_bits(torch.ones(1, 100, dtype=torch.bool)).to("cuda:1"))
    for _ in range(2):
        assert mask_tokens(scores, bans).isinf().all()
