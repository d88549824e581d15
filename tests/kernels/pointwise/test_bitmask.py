"""Bitmasks of grammar engines: against a boolean definition, on the CPU's path and in the kernel."""

import warnings

import pytest
import torch
from fastlogits_kernels.pointwise.bitmask import launch_bitmask_, reference_bitmask_
from fastlogits_kernels.runtime import launcher as runtime
from fastlogits_kernels.runtime.bits import pack_bits, words
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits import apply_token_bitmask_inplace
from tests.kernels.pointwise.test_mask import SIZES, bit_equal, odd_scores

NEG = float("-inf")


def by_definition(logits, allowed, vocab_size, pairs):
    """Token by token, as the bitmask is defined; words that the mask lacks allow nothing."""
    expected = logits.clone()
    for row, mask_row in pairs:
        if 0 <= row < logits.shape[0] and 0 <= mask_row < allowed.shape[0]:
            for token in range(vocab_size):
                if token >= allowed.shape[1] or not allowed[mask_row, token]:
                    expected[row, token] = NEG
    return expected


@st.composite
def cases(draw, device):
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, M, V = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from(SIZES))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    W = max(0, words(V) + draw(st.integers(-2, 2)))
    allowed = torch.rand(M, 32 * W) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    # Words allowed or forbidden as a whole are the usual case, and the kernel's own.
    allowed |= (torch.rand(M, W) < 0.3).repeat_interleave(32, 1)
    allowed &= (torch.rand(M, W) < 0.7).repeat_interleave(32, 1)
    wide = torch.full((M, W + 3), 0x55555555, dtype=torch.int32)
    wide[:, 1 : W + 1] = pack_bits(allowed)
    rows = mask_rows = None
    if draw(st.booleans()):
        rows = torch.randperm(B + 2, dtype=index_dtype)[: draw(st.integers(0, B))] - 1
    entries = B if rows is None else len(rows)
    if draw(st.booleans()):
        mask_rows = torch.randint(-1, M + 1, (entries,), dtype=index_dtype)
    pairs = list(
        zip(
            range(B) if rows is None else rows.tolist(),
            range(entries) if mask_rows is None else mask_rows.tolist(),
            strict=True,
        )
    )
    index = [None if index is None else index.to(device) for index in (rows, mask_rows)]
    vocab_size = draw(st.integers(0, V))
    return odd_scores(draw, B, V, dtype, device), allowed, wide.to(device)[:, 1 : W + 1], vocab_size, index, pairs


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_kernel_reference_and_definition_agree(device, data):
    logits, allowed, bitmask, vocab_size, (rows, mask_rows), pairs = data.draw(cases(device))
    expected = by_definition(logits.cpu(), allowed, vocab_size, pairs)
    by_reference = logits.clone()
    reference_bitmask_(by_reference, bitmask, vocab_size, rows, mask_rows)
    assert bit_equal(by_reference.cpu(), expected)
    launch_bitmask_(logits, bitmask, vocab_size, rows, mask_rows)
    assert bit_equal(logits.cpu(), expected)


def test_nothing_beside_the_rows_is_written(device):
    wide = torch.full((5, 200), 7.0, device=device)
    nothing = torch.zeros(3, 4, dtype=torch.int32, device=device)
    apply_token_bitmask_inplace(wide[1:4, 33:133], nothing)
    assert wide[1:4, 33:133].isinf().all()
    assert (wide == 7).sum() == 5 * 200 - 3 * 100


def test_one_row(device):
    bitmask = torch.tensor([0b1001], dtype=torch.int32, device=device)
    for mask in (bitmask, bitmask.unsqueeze(0)):
        for shape in ((5,), (1, 5)):
            logits = torch.zeros(shape, device=device)
            apply_token_bitmask_inplace(logits, mask)
            assert logits.flatten().tolist() == [0, NEG, NEG, 0, NEG]


# A vocabulary, and what xgrammar 0.2.8 made for it of the regular expression [0-9]{2}-[a-d]+ before and after each of
# "1", "2", "-" and "a"; then of the schema {"type": "object", "properties": {"a": {"type": "boolean"}}, "required":
# ["a"]} before and after each of '{"a"', ": ", "true" and "}".
VOCABULARY = ["</s>", *"0123456789", *"abcdefghij", *[f"{tens}{ones}" for tens in range(3) for ones in range(5)]]
VOCABULARY += [' "', '{"', '":', ": ", '"}', "}", " -", "-", "true", "false", '{"a"', '"', "{", "\n", " "]
VOCABULARY += ['a"', ", ", ","]
COMPILED = [
    ([-2095106, 15], [token for token in VOCABULARY if token.isdigit()]),
    ([2046, 0], list("0123456789")),
    ([0, 2048], ["-"]),
    ([30720, 0], list("abcd")),
    ([30721, 0], ["</s>", *"abcd"]),
    ([0, 81952], ['{"', '{"a"', "{"]),
    ([0, 128], [": "]),
    ([65536, 12288], ["f", "true", "false"]),
    ([0, 512], ["}"]),
    ([1, 0], ["</s>"]),
]


def test_masks_that_xgrammar_compiled(device):
    bitmask = torch.tensor([words for words, _ in COMPILED], dtype=torch.int32, device=device)
    logits = torch.zeros(len(COMPILED), len(VOCABULARY), device=device)
    apply_token_bitmask_inplace(logits, bitmask)
    for row, (_, allowed) in zip(logits.tolist(), COMPILED, strict=True):
        assert [token for token, score in zip(VOCABULARY, row, strict=True) if score == 0] == allowed


def test_indices_choose_rows_of_both(device):
    bitmask = pack_bits(torch.eye(4, dtype=torch.bool)).to(device)
    for indices in ([2, 0], torch.tensor([2, 0]), torch.tensor([2, 0], dtype=torch.int32, device=device)):
        logits = torch.zeros(3, 4, device=device)  # fewer rows than the bitmask has
        apply_token_bitmask_inplace(logits, bitmask, indices=indices)
        assert logits.tolist() == [[0, NEG, NEG, NEG], [0, 0, 0, 0], [NEG, NEG, 0, NEG]]


def test_mask_rows_choose_the_mask(device):
    bitmask = pack_bits(torch.eye(4, dtype=torch.bool)).to(device)
    logits = torch.zeros(3, 4, device=device)
    apply_token_bitmask_inplace(logits, bitmask, mask_rows=[3, -1, 3])
    assert logits.tolist() == [[NEG, NEG, NEG, 0], [0, 0, 0, 0], [NEG, NEG, NEG, 0]]
    logits = torch.zeros(3, 4, device=device)
    apply_token_bitmask_inplace(logits, bitmask, indices=[2], mask_rows=[0])
    assert logits.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, NEG, NEG, NEG]]


def test_the_tail(device):
    bitmask = torch.full((2, 1), -1, dtype=torch.int32, device=device)
    logits = torch.zeros(2, 40, device=device)
    with pytest.warns(UserWarning, match="tokens from 32 on stay allowed"):
        apply_token_bitmask_inplace(logits, bitmask)
    assert not logits.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_token_bitmask_inplace(logits, bitmask, vocab_size=32)
        assert not logits.any()
        apply_token_bitmask_inplace(logits, bitmask, mask_tail=True, vocab_size=36)
        assert logits[:, 32:36].isinf().all()
        assert not logits[:, 36:].any()
        apply_token_bitmask_inplace(logits, bitmask, mask_tail=True)
    assert logits[:, 32:].isinf().all()
    assert not logits[:, :32].any()


def test_arguments_are_checked_before_anything_is_written(device):
    logits = torch.zeros(2, 40, device=device)
    bitmask = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for arguments, message in (
        ((logits.double(), bitmask), "float32, float16 or bfloat16 .* got torch.float64"),
        ((logits.view(2, 20, 2), bitmask), r"of shape \(B, V\) or \(V,\), got torch.float32 of \(2, 20, 2\)"),
        ((logits, bitmask.long()), "bitmask must be int32"),
        ((logits, bitmask.view(2, 2, 1)), r"of \(2, 2, 1\)"),
        ((logits, bitmask.to("meta")), "move it with"),
        ((logits, bitmask[:1]), "a row for each of 2 rows of logits, got 1: say with indices or mask_rows"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_token_bitmask_inplace(*arguments)
    for options, message in (
        ({"vocab_size": 41}, "between 0 and 40, got 41"),
        ({"vocab_size": -1}, "got -1"),
        ({"indices": [0, 2]}, "indices must be rows from 0 to 1, got 2"),
        ({"indices": [-1]}, "indices must be rows from 0 to 1, got -1"),
        ({"indices": [[0]]}, r"indices must be integers of shape \(E,\)"),
        ({"indices": torch.tensor([0.0])}, "integers"),
        ({"mask_rows": [0, -2]}, "mask_rows must be rows from -1 to 1, got -2"),
        ({"mask_rows": [0]}, "one entry for each of 2 rows, got 1"),
        ({"indices": [0], "mask_rows": [0, 1]}, "one entry for each of 1 rows, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_token_bitmask_inplace(logits, bitmask, **options)
    with pytest.raises(ValueError, match=r"indices \(which bitmask has to have too\) must be rows from 0 to 0, got 1"):
        apply_token_bitmask_inplace(logits, bitmask[:1], indices=[1])
    assert not logits.any()


def test_nothing_to_do(device):
    for shape, W in (((0, 40), 2), ((2, 0), 0), ((2, 40), 0)):
        logits = torch.zeros(shape, device=device)
        apply_token_bitmask_inplace(logits, torch.zeros(2, W, dtype=torch.int32, device=device), vocab_size=0)
        assert not logits.any()
    logits = torch.zeros(2, 40, device=device)
    apply_token_bitmask_inplace(logits, torch.zeros(2, 2, dtype=torch.int32, device=device), indices=[])
    assert not logits.any()


def test_registered_operation(device):
    logits, bitmask = torch.zeros(3, 40, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
    rows = torch.tensor([0, 2], device=device)
    torch.library.opcheck(torch.ops.fastlogits.apply_bitmask_.default, (logits.clone(), bitmask, 40))
    torch.library.opcheck(torch.ops.fastlogits.apply_bitmask_.default, (logits.clone(), bitmask, 33, rows, rows))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits):
        masked = logits + 1
        apply_token_bitmask_inplace(masked, bitmask, indices=rows)
        return masked

    assert step(logits).isinf().all(1).tolist() == [True, False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_of_the_batch_change_nothing_that_is_compiled_and_nothing_waits():
    from fastlogits_kernels.pointwise.bitmask import _bitmask_launcher as launcher

    bitmask = torch.zeros(64, 32, dtype=torch.int32, device="cuda")
    logits = torch.zeros(64, 1000, device="cuda")
    every = torch.arange(64, device="cuda", dtype=torch.int32)

    def calls():
        for B in (1, 2, 16, 17, 64):
            apply_token_bitmask_inplace(logits[:B], bitmask[: B + 1])
            apply_token_bitmask_inplace(logits, bitmask[1:], indices=every[:B], mask_rows=every[:B])

    before = len(launcher.compiled)
    calls()
    known = len(launcher.compiled)
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launcher.compiled) == known <= before + 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_token_bitmask_inplace(logits, bitmask)
    logits.zero_()
    bitmask.fill_(-1)[3] = 0
    graph.replay()
    assert logits.isinf().all(1).nonzero().flatten().tolist() == [3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_two_to_the_31_elements():
    V, B = 2**17, 2**14 + 3
    logits = torch.zeros(B, V, device="cuda", dtype=torch.float16)
    bitmask = torch.full((1, words(V)), -1, dtype=torch.int32, device="cuda")
    bitmask[0, -1] = ~(1 << 30)
    apply_token_bitmask_inplace(logits, bitmask, mask_rows=torch.zeros(B, dtype=torch.int32, device="cuda"))
    assert (logits[:, V - 2] == NEG).all()
    assert logits.isinf().sum() == B


@pytest.mark.parametrize("V", [1, 4, 31, 32])
def test_one_word_a_row_of_any_stride(V, device):
    words_of_rows = torch.tensor([[5, 3]], dtype=torch.int32, device=device).t()  # contiguous, in torch's words
    scores = torch.zeros(2, V, device=device)
    apply_token_bitmask_inplace(scores, words_of_rows)
    allowed = torch.tensor([[word >> token & 1 for token in range(V)] for word in (5, 3)], device=device).bool()
    assert torch.equal(scores == 0, allowed)
