"""Batches of requests whose logits are split over ranks, against one process."""

import random

import pytest
import torch
from fastlogits_kernels.runtime.bits import pack_bits

import fastlogits as fl
from tests.parallel.ranks import same
from tests.parallel.test_group import part_of

V = 101


def random_request(rng):
    def some(value):
        return value if rng.random() < 0.3 else None

    offered = {
        "temperature": some(rng.choice([0, 0.5, 1.3])),
        "top_k": some(rng.choice([1, 3, 20])),
        "top_p": some(rng.choice([0.3, 0.9])),
        "min_p": some(0.05),
        "typical_p": some(0.8),
        "repetition_penalty": some(1.2),
        "presence_penalty": some(0.7),
        "dry_multiplier": some(0.9),
        "logit_bias": some({3: -3.0, 90: 4.0}),
        "banned_token_ids": some([5, 50, 100]),
        "bad_words": some([[7], [3, 4]]),
        "no_repeat_ngram_size": some(2),
        "min_tokens": some(3),
        "stop_token_ids": [1],
        "forced_tokens": some([8, 9]),
        "bitmask": rng.choice([None, False]),
        "logprobs": some(2),
        "seed": rng.getrandbits(63) if rng.random() < 0.5 else None,
    }
    return fl.RequestParams(**{name: value for name, value in offered.items() if value is not None})


def batches(process_group, seed):
    """A batch of one process and one of the ranks, of the same requests."""
    both = []
    for group in (None, process_group):
        batch = fl.BatchProcessor(8, V, "cpu", max_length=40, max_rows=12, max_logprobs=2, group=group)
        batch._seeds.seed(seed)
        rng = random.Random(seed)
        for _ in range(6):
            batch.add(random_request(rng), [rng.randrange(12) for _ in range(9)], [rng.randrange(12)])
        both.append(batch)
    return both


def stepped(process_group, seed, drafts, padded):
    whole, split = batches(process_group, seed)
    generator = torch.Generator().manual_seed(seed)
    rank, size = process_group.rank(), process_group.size()
    slots = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, 5] if drafts else [3, 0, 5, 1, -1, 2, 4])
    rows = len(slots)
    arguments = {}
    if drafts:
        arguments["local_position"] = torch.tensor([0, 0, 1, 2, 0, 0, 1, 0, 0])
        arguments["draft_ids"] = torch.randint(0, 12, (rows,), generator=generator)
    elif seed % 2:
        arguments["cache_position"] = torch.tensor([9] * rows)
    allowed = torch.rand(rows, V, generator=generator) < 0.7
    found = []
    for _ in range(2):
        logits = torch.randn(rows, V, generator=generator) * 3
        # Parts that begin at a multiple of 32, as their bitmasks have to.
        each = 32 * -(-V // (32 * size))
        part = logits[:, rank * each : (rank + 1) * each]
        words = pack_bits(allowed[:, rank * each : (rank + 1) * each]) if seed % 3 == 1 else pack_bits(allowed)
        end = part.shape[1]
        if padded:
            part = torch.nn.functional.pad(part, (0, each - end), value=1e4)
        masks = ({}, {}) if seed % 3 == 0 else ({"bitmask": pack_bits(allowed)}, {"bitmask": words})
        for logprobs in ("raw", "processed"):
            expected = whole.sample(logits, slots, **arguments, **masks[0], logprobs=logprobs)
            found.append(same(split.sample(part, slots, **arguments, **masks[1], logprobs=logprobs), expected))
        expected_logits = whole.apply(logits, slots, **arguments, **masks[0])[:, rank * each : (rank + 1) * each]
        processed = split.apply(part, slots, **arguments, **masks[1])
        found.append(same(processed[:, :end], expected_logits) and processed.shape == part.shape)
        assert split.apply_(part, slots, **arguments, **masks[1]) is part
        found.append(same(part[:, :end], expected_logits))
        whole.append(slots, expected.tokens)
        split.append(slots, expected.tokens)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_steps_are_those_of_one_process(ranks, size, drafts):
    for seed in range(6):
        # One word of four ranks each has 101 tokens as 32, 32, 32 and 5.
        assert all(ranks.alike(stepped, size, seed, drafts, seed == 4 or size == 3))


def refused(process_group, which):
    odd = process_group.rank() == 1
    batch = fl.BatchProcessor(8, V, "cpu", max_length=41 if odd and which == "settings" else 40, group=process_group)
    if odd and which == "requests":
        batch = fl.BatchProcessor(8, V, "cpu", max_rows=5, max_length=40, group=process_group)
    slot = batch.add(fl.RequestParams(seed=3), [1, 2])
    logits = part_of(torch.zeros(1, V), process_group.rank(), process_group.size())
    if which == "own" and odd:
        return batch.sample(logits, [slot, slot])
    mask = torch.zeros(1, 1, dtype=torch.int32) if which == "bitmask" else None
    return batch.sample(logits, [slot], bitmask=mask).tokens


def test_seeds_that_no_request_brings_are_alike(ranks):
    assert isinstance(ranks.alike(without_seeds, 3), torch.Tensor)


def without_seeds(process_group):
    batch = fl.BatchProcessor(8, V, "cpu", max_length=40, group=process_group)
    slots = [batch.add(fl.RequestParams(), [1, 2]) for _ in range(8)]
    return batch.sample(part_of(torch.zeros(8, V), process_group.rank(), process_group.size()), slots).tokens


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("own", "rank 1 has refused its arguments: ValueError: slots must have one entry for each of 1 rows"),
        ("bitmask", "bitmask must have the 4 words of the whole vocabulary, or those of this rank's part where all"),
    ],
)
def test_the_error_says_what_is_wrong(ranks, which, message):
    found = ranks.each(refused, 2, which)
    assert message in str(found[0])


def of_other_settings(process_group):
    return fl.BatchProcessor(8, V, "cpu", max_length=40, max_logprobs=process_group.rank(), group=process_group)


def test_settings_must_be_alike(ranks):
    for each in ranks.each(of_other_settings, 2):
        assert "max_logprobs must be the same on all ranks, but rank 1 has 1 where rank 0 has 0" in str(each)
