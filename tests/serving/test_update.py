"""Other parameters for a request that runs: as if it had come with them, with the same text."""

import dataclasses
import random

import pytest
import torch
from fastlogits_kernels.serving import steps

from fastlogits import BatchProcessor, RequestParams
from tests.serving.test_batch import bitmask_of, random_params

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

V = 67


def batch_of(device, max_length=96):
    return BatchProcessor(4, V, device, max_length=max_length, max_listed=256, max_logprobs=2)


def token_of(batch, slot, logits, mask):
    asked = batch._reported
    return batch.sample(logits, [slot], bitmask=mask, logprobs="raw" if slot in asked else None).tokens


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_as_if_it_had_come_with_them(device, monkeypatch, kernels):
    if kernels and not torch.cuda.is_available():
        monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    rng = random.Random(5)
    for trial in range(3 if kernels else 25):
        generator = torch.Generator().manual_seed(trial)
        before, after = random_params(rng, V), random_params(rng, V)
        text = torch.randint(0, 20, (12,), generator=generator).tolist()
        changed, fresh = batch_of(device), batch_of(device)
        slot = changed.add(before, text[:4])
        changed.append([slot] * 8, text[4:])
        changed.update(slot, after)
        same = fresh.add(after, text[:4], text[4:])
        mask = bitmask_of(1, trial, V).to(device)
        for _ in range(2):
            logits = torch.randn(1, V, generator=generator).to(device)
            assert torch.equal(
                changed.apply(logits, [slot], bitmask=mask), fresh.apply(logits, [same], bitmask=mask)
            ), (before, after)
            token = token_of(changed, slot, logits, mask)
            assert torch.equal(token, token_of(fresh, same, logits, mask))
            changed.append([slot], token)
            fresh.append([same], token)


def test_a_long_history_has_its_index_made_anew(device, monkeypatch):
    """That of 3-grams is no help for 2-grams."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    text = torch.randint(0, 9, (5000,), generator=torch.Generator().manual_seed(1)).tolist()
    changed, fresh = (batch_of(device, max_length=9000) for _ in range(2))
    slot = changed.add(RequestParams(temperature=0, no_repeat_ngram_size=4), text[:10])
    changed.append([slot] * 4990, text[10:])
    params = RequestParams(temperature=0, no_repeat_ngram_size=3, repetition_penalty=1.2)
    changed.update(slot, params)
    same = fresh.add(params, text[:10], text[10:])
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2)).to(device)
    for _ in range(3):
        assert torch.equal(changed.apply(logits, [slot]), fresh.apply(logits, [same]))
        for batch, of in ((changed, slot), (fresh, same)):
            batch.append([of], [3])


def test_the_seed_stays_where_none_is_given(device):
    logits = torch.zeros(1, V, device=device)
    batch = batch_of(device)
    drawn = {}
    for name, seed in (("random", None), ("given", 7)):
        slot = batch.add(RequestParams(seed=seed), [1])
        before = int(batch.sample(logits, [slot]).tokens)
        batch.update(slot, RequestParams(repetition_penalty=1.0))
        drawn[name] = int(batch.sample(logits, [slot]).tokens) == before
        batch.update(slot, RequestParams(seed=11))
        drawn[name, "other"] = int(batch.sample(logits, [slot]).tokens)
    assert drawn["random"]
    assert drawn["given"]
    assert drawn["random", "other"] == drawn["given", "other"]


def test_what_a_step_needs_follows(device):
    batch = batch_of(device)
    slot = batch.add(RequestParams(temperature=0), [1])
    logits = torch.zeros(1, V, device=device)
    batch.update(slot, RequestParams(temperature=0, bitmask=True, logprobs=1))
    with pytest.raises(ValueError, match="bitmask"):
        batch.sample(logits, [slot], logprobs="raw")
    batch.update(slot, dataclasses.replace(RequestParams(temperature=0), top_k=3))
    batch.sample(logits, [slot])


def test_bad_input(device):
    batch = batch_of(device)
    slot = batch.add(RequestParams(banned_token_ids=[2]), [1])
    before = batch._table.clone()
    for wrong, message in (
        ({"slot": 3, "params": RequestParams()}, "slot must hold a request, got 3|slot"),
        ({"slot": slot, "params": {"top_k": 3}}, "params must be RequestParams"),
        ({"slot": slot, "params": RequestParams(banned_token_ids=[V])}, "token ids of the vocabulary|vocabulary"),
        ({"slot": slot, "params": RequestParams(logprobs=9)}, "logprobs must be at most 2"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.update(**wrong)
    assert torch.equal(batch._table, before)
