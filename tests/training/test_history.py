"""Log-probabilities behind processors: each position as where it was sampled, and the gradient through them."""

import pytest
import torch
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch

import fastlogits as fl

V, B, L, PROMPT = 60, 2, 6, 3
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
kernel = pytest.param("kernel", marks=pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"))


@pytest.fixture(params=["torch", kernel])
def backend(request, monkeypatch):
    """Both ways of the operations, wherever the tensors are."""
    if request.param == "torch" and GPU:
        pytest.skip("the kernels are tested on a GPU")
    for module in (fold, launch):
        monkeypatch.setattr(module, "FORCE_KERNEL", request.param == "kernel")
    return request.param


def processors():
    return [
        fl.RepetitionPenaltyLogitsProcessor(1.5),
        fl.SuppressFirstTokens([1, 2, 3], 2),
        fl.NoRepeatNGramLogitsProcessor(2),
        fl.TemperatureLogitsWarper(0.8),
    ]


def text():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, L, V, generator=generator) * 3
    ids = torch.randint(V, (B, L + 1), generator=generator)
    return logits.to(DEVICE), ids.to(DEVICE)


def test_each_position_is_as_it_was_sampled(backend):
    """Bit for bit: a loop that samples, and the trainer that sees the whole text at once."""
    logits, ids = text()
    ids = ids[:, :PROMPT]
    listed = fl.LogitsProcessorList(processors())
    sampler = fl.Sampler(listed, top_k=10, top_p=0.9, logprobs="processed", return_kept=16)
    drawn = []
    for t in range(PROMPT - 1, L):
        sample = sampler(logits[:, t], seeds=torch.arange(B, device=DEVICE), positions=t + 1, input_ids=ids,
                         prompt_length=PROMPT)  # fmt: skip
        drawn.append(sample)
        ids = torch.cat((ids, sample.tokens.unsqueeze(1)), 1)
    right = torch.stack([sample.logprobs for sample in drawn], 1)
    some = {"processors": listed, "input_ids": ids[:, :-1], "prompt_length": PROMPT}
    seen = logits[:, PROMPT - 1 :]
    targets = ids[:, PROMPT:]
    found = fl.logprobs(seen, targets, top_k=10, top_p=0.9, outside=True, **some)
    assert torch.equal(found.logprobs, right)
    assert not found.outside.any()
    kept = fl.KeptTokens.stack([sample.kept for sample in drawn])
    assert kept.shape == targets.shape
    assert torch.equal(fl.logprobs(seen, targets, kept=kept, **some), right)
    # Of one position, as a sampler is called.
    last = fl.logprobs(seen[:, -1], targets[:, -1], top_k=10, top_p=0.9, **some)
    assert torch.equal(last, right[:, -1])


def test_truncations_of_the_list_count_as_given(backend):
    logits, ids = text()
    listed = [fl.RepetitionPenaltyLogitsProcessor(1.5), fl.TemperatureLogitsWarper(0.8), fl.TopKLogitsWarper(4)]
    targets = ids[:, 1:].clone()
    targets[0, 0] = logits[0, 0].argmin()  # it counts as kept all the same
    found = fl.logprobs(logits, targets, processors=listed, input_ids=ids[:, :-1], outside=True)
    assert found.outside[0, 0]
    assert found.logprobs.isfinite().all()
    apart = fl.logprobs(logits, targets, processors=listed[:2], input_ids=ids[:, :-1], top_k=4)
    assert torch.equal(found.logprobs, apart)


def test_gradients_go_through_the_processors(backend):
    """Those of torch's own composition."""
    logits, ids = text()
    targets = ids[:, 1:]
    seen = ids[:, :-1]
    weights = torch.arange(1.0, B * L + 1, device=DEVICE).view(B, L)
    other = logits.double().requires_grad_()
    listed = fl.LogitsProcessorList(processors())
    columns = []
    for t in range(L):
        x = listed(seen[:, : t + 1], other[:, t], prompt_length=min(PROMPT, t + 1))
        kept = x >= x.topk(10).values[:, -1:]
        kept.scatter_(1, targets[:, t : t + 1], True)
        columns.append(x.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(1, targets[:, t : t + 1]).squeeze(1))
    right = torch.stack(columns, 1)
    possible = right.isfinite()
    torch.where(possible, right * weights, 0.0).sum().backward()
    leaf = logits.clone().requires_grad_()
    found = fl.logprobs(leaf, targets, processors=processors(), input_ids=seen, prompt_length=PROMPT, top_k=10)
    torch.testing.assert_close(found.double(), right.detach(), atol=1e-5, rtol=1e-5)
    torch.where(possible, found * weights, 0.0).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), other.grad, atol=1e-4, rtol=1e-4)


def test_what_cant_be_done_is_said():
    logits, ids = text()
    targets = ids[:, 1:]
    with pytest.raises(ValueError, match="input_ids must be the tokens that the model has seen, got None: Repetition"):
        fl.logprobs(logits, targets, processors=processors())
    with pytest.raises(ValueError, match=r"input_ids must be int32 or int64 of shape \(2, L\), L at least 5, got"):
        fl.logprobs(logits, targets, processors=processors(), input_ids=ids[:, :3])
    offsets = torch.zeros(B * L + 1, dtype=torch.int64)
    kept = fl.KeptTokens(V, torch.zeros(3, dtype=torch.int32), offsets=offsets).to(logits.device)
    with pytest.raises(ValueError, match="kept must be ids with counts or bits where processors are given"):
        fl.logprobs(logits, targets, processors=[], kept=kept)
    with pytest.raises(ValueError, match=r"input_ids must be int32 or int64 of shape .* got torch.float32"):
        fl.logprobs(logits, targets, processors=processors(), input_ids=ids.float())


def test_no_positions_are_no_log_probabilities():
    nothing = torch.zeros(2, 0, V, requires_grad=True)
    found = fl.logprobs(
        nothing, torch.zeros(2, 0, dtype=torch.int64), processors=[fl.TopKLogitsWarper(3)], entropy=True
    )
    assert found.logprobs.shape == found.entropy.shape == (2, 0)
    found.logprobs.sum().backward()
    assert nothing.grad.shape == nothing.shape
