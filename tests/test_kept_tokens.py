"""What a sampler says was kept, in each form, from kernels and from torch."""

from contextlib import nullcontext

import pytest
import torch
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.runtime.bits import pack_bits
from fastlogits_kernels.selection import launch
from fastlogits_kernels.serving import steps
from fastlogits_kernels.training.kept import ids_of_bits, ragged_ids, reference_ids

import fastlogits as fl
from tests.oracle import hard_rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
kernel = pytest.param("kernel", marks=pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"))
V = 700


@pytest.fixture(params=["torch", kernel])
def backend(request, monkeypatch):
    """Both ways of the operations, wherever the tensors are."""
    if request.param == "torch" and GPU:
        pytest.skip("the kernels are tested on a GPU")
    for module in (launch, steps):
        monkeypatch.setattr(module, "FORCE_KERNEL", request.param == "kernel")
    return request.param


def some_rows():
    rows = hard_rows(V)
    return torch.stack([rows[name] for name in ("gauss", "ties", "masked", "spike .95")]).to(DEVICE)


@pytest.mark.parametrize("form", ["bits", "ids", 400, 5])
@pytest.mark.parametrize("options", [{"top_k": 20, "temperature": 0.7}, {"typical_p": 0.9}, {"temperature": 0.0}, {}])
def test_a_sampler_says_what_it_has_kept(backend, form, options):
    logits = some_rows()
    listed = [fl.SuppressTokensLogitsProcessor([3, 5, 600])]
    sampler = fl.Sampler(listed, return_kept=form, **options)
    sample = sampler(logits, seeds=1, positions=2)
    sampler._processors, plain = None, listed[0](None, logits.float())
    processed, _ = sampler._distribution(plain.cpu() if not GPU else plain)
    wanted = (processed > -torch.inf).to(DEVICE)
    assert len(sample) == 5  # as a tuple it is as it ever was
    assert sample.kept.vocab_size == V
    if form == 5:
        assert sample.kept.counts.tolist() == wanted.sum(1).tolist()
        first = [row.nonzero()[:5, 0].tolist() for row in wanted]
        assert sample.kept.ids.tolist() == [row + [-1] * (5 - len(row)) for row in first]
        lacking = (sample.kept.counts > 5) & (sample.kept.counts < V)
        said = pytest.raises(ValueError, match=r"must have room for \d+ ids in a row, got room for 5")
        with said if bool(lacking.any()) else nullcontext():
            sample.kept.check()
        return
    if form != 400 or bool((wanted.sum(1) <= 400).all()):
        assert torch.equal(sample.kept.mask(), wanted)
    assert wanted.gather(1, sample.tokens.unsqueeze(1)).all()
    without = fl.sample(logits, listed, seeds=1, positions=2, **options)
    assert torch.equal(without.tokens, sample.tokens)
    assert without.kept is None


def test_a_serving_batch_says_what_it_has_kept(backend):
    batch = fl.BatchProcessor(3, V, DEVICE, max_length=8)
    slots = [batch.add(fl.RequestParams(top_k=k, banned_token_ids=[2, 9]), [1]) for k in (5, 40)]
    logits = some_rows()[:2]
    sample = batch.sample(logits, slots, return_kept=64)
    masked = logits.clone()
    masked[:, [2, 9]] = -torch.inf
    for row, k in enumerate((5, 40)):
        kept = masked[row] >= masked[row].topk(k).values[-1]
        assert torch.equal(sample.kept.mask()[row], kept)
    assert torch.equal(batch.sample(logits, slots).tokens, sample.tokens)
    assert batch.sample(logits, slots, return_kept="bits").kept.bits.shape == (2, 22)


def test_ids_of_bits(backend):
    size = 70001 if backend == "torch" or GPU else 33000
    mask = torch.rand(4, size, generator=torch.Generator().manual_seed(0)) < 0.002
    mask[1], mask[2] = False, True
    bits = pack_bits(mask).to(DEVICE)
    for most in (1, 100):
        ids, counts = ids_of_bits(bits, size, most)
        right, numbers = reference_ids(bits, size, most)
        assert torch.equal(ids, right)
        assert torch.equal(counts, numbers)
    ids, offsets = ragged_ids(bits, size)
    assert ids.tolist() == mask.nonzero()[:, 1].tolist()
    assert offsets.diff().tolist() == mask.sum(1).tolist()


def test_stacked_and_indexed():
    steps = [fl.KeptTokens(9, torch.full((2, 3), t), torch.tensor([1, t])) for t in range(3)]
    kept = fl.KeptTokens.stack(steps)
    assert kept.shape == (2, 3)
    assert kept[1].counts.tolist() == [0, 1, 2]
    assert kept.to("cpu").ids[0, 2].tolist() == [2, 2, 2]
    assert fl.KeptTokens.stack(steps, 0).shape == (3, 2)
    bits = fl.KeptTokens(40, bits=torch.tensor([[1, 2], [0, 0]], dtype=torch.int32))
    assert bits.mask().nonzero().tolist() == [[0, 0], [0, 33]]
    ragged = fl.KeptTokens(9, torch.tensor([4, 5, 6]), offsets=torch.tensor([0, 1, 3]))
    assert ragged.mask().nonzero().tolist() == [[0, 4], [1, 5], [1, 6]]
    with pytest.raises(ValueError, match="ids with offsets can't be indexed"):
        ragged[0]


def test_what_cant_be_is_said():
    ids, counts = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for message, make in {
        "kept tokens must be ids with counts, ids with offsets, or bits, got ids$": lambda: fl.KeptTokens(9, ids),
        "ids of kept tokens must be a tensor of torch.int32 or torch.int64, got torch.float32": (
            lambda: fl.KeptTokens(9, ids.float(), counts)
        ),
        r"counts of kept tokens must have the shape of ids \(2, 3\) without its last": (
            lambda: fl.KeptTokens(9, ids, counts[:1])
        ),
        "bits of kept tokens must have at least 2 words a row for 40 tokens": lambda: fl.KeptTokens(
            40, bits=ids[:, :1]
        ),
        "return_kept must be an integer of at least 1, 'bits', 'ids' or None, got 0": (
            lambda: fl.Sampler(return_kept=0)
        ),
        "steps must be kept tokens of at least one step, got none": lambda: fl.KeptTokens.stack([]),
        r"steps must all have as many rows, got shapes \(\d,\), \(\d,\)": lambda: fl.KeptTokens.stack(
            [fl.KeptTokens(9, ids, counts), fl.KeptTokens(9, ids[:1], counts[:1])]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("V", [8, 32, 40, 64])
def test_what_another_vocabulary_has_is_found(V):
    rows = torch.arange(V).expand(2, V)
    fl.KeptTokens(V, rows, torch.tensor([V - 1, 2])).check()
    fl.KeptTokens(V, bits=torch.full((2, 4), -1, dtype=torch.int32)).check()
    for token in (-1, V, V + 1, V + 31):
        ids = rows.clone()
        ids[1, 1] = token
        fl.KeptTokens(V, ids, torch.tensor([2, 1])).check()  # behind the row's count
        with pytest.raises(ValueError, match=f"in the vocabulary of {V}, got token {token}"):
            fl.KeptTokens(V, ids, torch.tensor([0, 2])).check()
    kept = fl.KeptTokens(V, torch.tensor([[1, V]]), torch.tensor([2]))
    with pytest.raises(ValueError, match=f"got token {V}"):
        fl.logprobs(torch.zeros(1, V), torch.tensor([1]), kept=kept, strict=True)


def test_a_sample_with_other_fields_keeps_what_was_kept():
    drawn = fl.sample(torch.zeros(2, 8), seeds=0, positions=0, top_k=3, return_kept="bits")
    other = drawn._replace(tokens=drawn.tokens + 1)
    assert other.kept is drawn.kept
    assert torch.equal(other.tokens, drawn.tokens + 1)
    assert torch.equal(other._replace(logprobs=None).tokens, other.tokens)
    assert fl.sample(torch.zeros(2, 8), seeds=0, positions=0)._replace(tokens=drawn.tokens).kept is None
