"""Drafts of a step: which are kept, and that the text is the same as without them."""

import pytest
import torch
from fastlogits_kernels.serving import steps
from fastlogits_kernels.serving.reference import reference_accept

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

V = 61


@pytest.fixture(params=["torch", "kernels"])
def path(request, monkeypatch):
    """Both ways of the CPU: torch, and the kernels in Triton's interpreter; on a GPU, the kernels."""
    if torch.cuda.is_available():
        if request.param == "torch":
            pytest.skip("on a GPU the kernels run")
    else:
        monkeypatch.setattr(steps, "FORCE_KERNEL", request.param == "kernels")
    return request.param


def batch_of(requests: int, device: str, **options) -> BatchProcessor:
    batch = BatchProcessor(requests, V, device, **{"max_length": 64, "max_rows": 64} | options)
    for slot in range(requests):
        batch.add(RequestParams(seed=slot, repetition_penalty=1.3), [1, 2, slot])
    return batch


def texts(batch: BatchProcessor) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(batch._slots.history, batch.lengths.tolist(), strict=True)]


def test_drafts_are_kept_up_to_the_first_wrong_one(device, path):
    batch = batch_of(4, device)
    slots = [2, 2, 2, 2, 2, -1, 0, 3, 3, 3, -1, -1, 1, 1]
    drafts = [9, 5, 6, 8, 8, 0, 7, 4, 3, 2, 5, 5, 0, -1]  # behind a wrong one a right one counts for nothing
    tokens = [5, 6, 7, 8, 1, 5, 9, 3, 2, 1, 5, 5, 4, 4]
    kept = [5, 6, 7, -1, -1, -1, 9, 3, 2, 1, -1, -1, 4, -1]
    counts = [2, 2, 2, 2, 2, 0, 0, 2, 2, 2, 0, 0, 0, 0]
    out = batch.accept(torch.tensor(tokens, device=device), slots, torch.tensor(drafts, device=device))
    assert isinstance(out, fl.Accepted)
    assert (out.tokens.dtype, out.kept.dtype) == (torch.int64, torch.int32)
    assert out.tokens.tolist() == kept
    assert out.kept.tolist() == counts
    assert texts(batch) == [[1, 2, 0, 9], [1, 2, 1, 4], [1, 2, 2, 5, 6, 7], [1, 2, 3, 3, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_kernel_and_torch_accept_the_same(device, monkeypatch, dtype):
    """Long drafts too, rows of no request, slots beyond the table, and what is fed with strides."""
    monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch, other = batch_of(5, device), batch_of(5, "cpu")
        for each in (batch, other):
            each.remove(3)
        slots, count = [], torch.randint(1, 50, (7,), generator=generator).tolist()
        for slot, rows in zip([4, -1, 0, 7, 3, 1, -2], count, strict=True):
            slots += [slot] * rows
        rows = len(slots)
        tokens = torch.randint(0, 2, (rows,), generator=generator).to(dtype)
        drafts = torch.randint(-1, 2, (rows,), generator=generator).to(dtype)
        drafts[1:] = torch.where(torch.rand(rows - 1, generator=generator) < 0.9, tokens[:-1], drafts[1:])
        of = torch.tensor(slots, dtype=dtype)
        expected = reference_accept(other._slots, of, tokens, drafts, True)
        spread = torch.stack((drafts, drafts), 1).to(device)[:, 0]
        found = steps.accept_drafts(batch._slots, of.to(device), tokens.to(device), spread, True)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), two, rtol=0, atol=0)
        assert texts(batch) == texts(other)


def model(tokens: list[int], seed: int = 0) -> torch.Tensor:
    """Logits that depend on the last two tokens."""
    generator = torch.Generator().manual_seed(seed + 97 * tokens[-1] + (tokens[-2] if len(tokens) > 1 else 0))
    return torch.randn(V, generator=generator) * 3


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_a_text_is_the_same_with_drafts_as_without(device, path, right):
    """Seeds, penalties and n-grams included, and whatever share of the drafts is right."""
    params = RequestParams(temperature=0.8, top_k=12, repetition_penalty=1.2, no_repeat_ngram_size=3, seed=5)
    plain = BatchProcessor(1, V, device, max_length=64)
    slot = plain.add(params, [3, 4])
    length = 6 if path == "kernels" and device == "cpu" else 24
    for _ in range(length):
        out = plain.sample(model(texts(plain)[slot]).unsqueeze(0).to(device), [slot])
        plain.append([slot], out.tokens.cpu())
    wanted = texts(plain)[slot]

    batch = BatchProcessor(2, V, device, max_length=64, max_rows=8)
    slot = batch.add(params, [3, 4], slot=1)
    generator, steps = torch.Generator().manual_seed(2), 0
    while len(text := texts(batch)[slot]) < len(wanted):
        ahead = wanted[len(text) : len(text) + 3]
        drafts = [token if torch.rand((), generator=generator) < right else (token + 1) % V for token in ahead]
        fed = [text[-1], *drafts]
        logits = torch.stack([model(text + drafts[:j]) for j in range(len(fed))]).to(device)
        slots = [slot] * len(fed)
        out = batch.sample(logits, slots, draft_ids=fed, local_position=range(len(fed)))
        batch.accept(out, slots, fed)
        steps += 1
    assert text[: len(wanted)] == wanted
    assert (steps == length) == (right == 0.0)


def test_an_engine_that_has_the_history_appends_itself(device, path):
    tables = (torch.zeros(1, 8, dtype=torch.int32), torch.tensor([2]), torch.tensor([3]))
    batch = BatchProcessor(1, V, device, max_rows=4, history=tuple(each.to(device) for each in tables))
    batch.add(RequestParams())
    out = batch.accept(torch.tensor([4, 5], device=device), [0, 0], [0, 4])
    assert out.tokens.tolist() == [4, 5]
    assert out.kept.tolist() == [1, 1]
    assert batch._slots.history.count_nonzero() == 0


def test_a_full_history_keeps_what_it_has(device, path):
    batch = batch_of(1, device, max_length=5)
    slots, drafts = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 7, 8, 9])
    if device == "cpu":
        with pytest.raises(ValueError, match="at most 5 tokens"):
            batch.accept(torch.tensor([7, 8, 9, 4]), slots, drafts)
        assert texts(batch) == [[1, 2, 0]]
    tables = [each.to(device) for each in (slots, torch.tensor([7, 8, 9, 4]), drafts)]
    kept, counts = steps.accept_drafts(batch._slots, *tables, True)
    assert kept.tolist() == [7, 8, 9, 4]
    assert counts.tolist() == [3] * 4
    assert texts(batch) == [[1, 2, 0, 7, 8]]


def test_a_step_of_no_rows_accepts_nothing(device, path):
    out = batch_of(1, device).accept(torch.zeros(0, dtype=torch.int64, device=device), [], [])
    assert out.tokens.shape == out.kept.shape == (0,)


@pytest.mark.parametrize(
    ("slots", "drafts", "message"),
    [
        ([0, 1], [1, 2, 3], "slots must have one entry for each of 3 rows"),
        ([0, 0, 0], [1], "draft_ids must have one entry for each of 3 rows"),
        ([0, 1, 0], [1, 2, 3], "got slot 0 again in row 2"),
        ([0, 5, 5], [1, 2, 3], "slots must hold requests"),
    ],
)
def test_what_accept_refuses(device, slots, drafts, message):
    batch = batch_of(2, device)
    before = texts(batch)
    with pytest.raises(ValueError, match=message):
        batch.accept(torch.tensor([1, 2, 3], device=device), slots, drafts)
    assert texts(batch) == before
    with pytest.raises(ValueError, match="out must be int32 or int64"):
        batch.accept(torch.zeros(3, device=device), [0, 0, 0], [1, 2, 3])
