"""Ids that the logits don't have, in the histories of requests: placeholders, padded embeddings, negatives."""

import numpy as np
import pytest
import torch

from fastlogits import BatchProcessor, RequestParams
from fastlogits.integrations.requests import EDITS, TRUNCATIONS, LiveBatch, LiveRequest, read_options
from tests.serving.test_batch import V, logits_of, path  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# Where ids are cut to 32 bits, 2**40 + 5 and -(2**40) + 5 are token 5, which the text has.
FOREIGN = {
    "a placeholder": V, "of a padded embedding": V + 27, "the largest of 32 bits": 2**31 - 1, "of 33 bits": 2**32 + 5,
    "of 41 bits": 2**40 + 5, "the largest of 64 bits": 2**63 - 1, "negative": -1, "the least of 32 bits": -(2**31),
    "less than 32 bits hold": -(2**40) + 5,
}  # fmt: skip
ONCE = 77  # a token of the vocabulary that comes nowhere else
TEXT = [5, 3, 6, 3, ONCE, 3, 6, 8, ONCE, 4, 3, 6]
LOOKING_BACK = {
    "penalties and bans": {
        "repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "presence_scope": "all",
        "no_repeat_ngram_size": 2, "bad_words": [[3, 6, 9], [6, 10]], "seed": 1,
    },
    # Of the repetitions of "3 6" one follows a breaker, one such an id.
    "repetitions": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": (4, 5), "seed": 1},
}  # fmt: skip
WAYS = ["prompt and output", "array", "tensor", "append", "append of a tensor", "draft", "int32", "int64"]


def by(way, tokens, device, params):
    """A batch that has been given texts in some way, which differ in a token, and the rest of what its step takes."""
    texts = [[token if each == ONCE else each for each in TEXT] for token in tokens]
    count, slots = len(texts), list(range(1, len(texts) + 1))
    if way in ("int32", "int64"):
        kept = torch.tensor([[9] * 16, *([*text, 3, 3, 3, 3] for text in texts)], device=device)
        if way == "int32":
            kept = torch.where(kept == kept.int(), kept, -1).int()
        sizes = (torch.tensor([0, *[n] * count], dtype=torch.int32, device=device) for n in (4, len(TEXT)))
        batch = BatchProcessor(count + 1, V, device, history=(kept, *sizes))
        for slot in slots:
            batch.add(params, slot=slot)
        return batch, slots, {}
    batch = BatchProcessor(count + 1, V, device, max_length=32, max_rows=3 * count)
    kind = {"array": np.asarray, "tensor": torch.tensor}.get(way, list)
    given = {}
    for slot, text in zip(slots, texts, strict=True):
        at_once = {"append": 0, "append of a tensor": 0, "draft": 4}.get(way, 8)
        batch.add(params, kind(text[:4]), kind(text[4 : 4 + at_once]), slot=slot)
        if way == "append":
            batch.append([slot] * 8, text[4:])
        elif way == "append of a tensor":
            batch.append(torch.tensor([slot] * 8, device=device), torch.tensor(text[4:], device=device))
        elif way == "draft":
            given.setdefault("draft_ids", []).extend([7, *text[8:10]])
            given.setdefault("local_position", []).extend(range(3))
    return batch, [slot for slot in slots for _ in range(3 if way == "draft" else 1)], given


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("looks", LOOKING_BACK)
def test_such_ids_count_for_nothing(looks, way, device, path):  # noqa: F811
    params = RequestParams(**LOOKING_BACK[looks])
    # Where they are appended, negative ids take no place.
    kinds = [kind for kind, token in FOREIGN.items() if token >= 0 or not way.startswith("append")]
    if path == "kernels" and device == "cpu":  # a second a row
        if way in ("array", "tensor", "append"):
            pytest.skip("the kernels see the same as of a list")
        kinds = [kind for kind in kinds if kind in ("a placeholder", "of 41 bits", "the least of 32 bits")]
    batch, slots, given = by(way, [ONCE, *(FOREIGN[kind] for kind in kinds)], device, params)
    logits = logits_of(1, 3).repeat(len(slots), 1)
    # Other memory stands around the rows, which nothing may be written to.
    around = torch.full((len(slots) + 2, V + 64), 5.0, device=device)
    rows = around[1:-1, 32 : 32 + V]
    rows.copy_(logits)
    batch.apply_(rows, slots, **given)
    processed = rows.cpu().clone().unflatten(0, (len(kinds) + 1, -1))
    rows.fill_(5.0)
    assert bool((around == 5.0).all())
    expected = processed[0].clone()
    assert bool((expected != logits[0]).any())
    expected[:, ONCE] = logits[0, ONCE]  # which does count
    for kind, found in zip(kinds, processed[1:], strict=True):
        assert torch.equal(found, expected), kind
    if path == "torch" or device != "cpu":
        assert all(0 <= token < V for token in batch.sample(logits.to(device), slots, **given).tokens.tolist())


@pytest.mark.parametrize("token", [V, 2**31 - 1, 2**31, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_appended_they_take_their_place_but_negative_ones_do_not(kind, token, device, path):  # noqa: F811
    batch = BatchProcessor(1, V, device, max_length=8)
    batch.add(RequestParams(), [1])
    for each in (token, -1, -(2**31), -(2**32) + 5, 2):
        of, given = [0], [each]
        batch.append(*((of, given) if kind == "list" else (torch.tensor(x, device=device) for x in (of, given))))
    assert batch.lengths.tolist() == [3]
    assert batch._slots.history[0, :3].tolist() == [1, token if token < 2**31 else -1, 2]


@pytest.mark.parametrize("ids", [[2**64, 1, -(2**70)], [2**63, -1], np.asarray([2**64 - 1, 1], dtype=np.uint64)])
def test_integers_of_any_size_in_a_prompt(ids):
    batch = BatchProcessor(1, V, "cpu", max_length=8)
    batch.add(RequestParams(no_repeat_ngram_size=1), ids)
    expected = [each for each in map(int, ids) if 0 <= each < V]
    assert batch.apply(logits_of(1), [0]).isinf().nonzero()[:, 1].tolist() == expected


def test_a_step_counts_them_as_tokens(device, path):  # noqa: F811
    """They are no tokens to penalise, but they are tokens of the output."""
    batch = BatchProcessor(1, V, device, max_length=8)
    batch.add(RequestParams(min_tokens=2, stop_token_ids=[9]), [V, V], [V])
    logits = logits_of(1).to(device)
    assert batch.apply(logits, [0]).isinf().nonzero()[:, 1].tolist() == [9]
    batch.append([0], [V + 1])
    assert torch.equal(batch.apply(logits, [0]), logits)


def test_in_an_engines_lists(device):
    """The prompt of a request with an image, and what it says, as the plug-ins see them."""
    batch = LiveBatch(V, torch.device(device), 2, 32, "vllm")
    live = LiveRequest(
        read_options({"no_repeat_ngram_size": 1}, EDITS + TRUNCATIONS, "here", 0.7), [V, 4, V + 7, 2**40 + 3, -1], [6]
    )
    for outputs in ([], [V], [8]):
        live.outputs.extend(outputs)
        banned = batch.process_(torch.zeros(1, V, device=device), [live]).isinf().nonzero()[:, 1].tolist()
        assert banned == sorted({4, *(each for each in live.outputs if each < V)})
