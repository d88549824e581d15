"""Prefixes that a function allows, beside transformers' own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits.processors import constrained
from tests.processors.twins import DEVICE, INF, compare, draw_ids, draw_scores


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_prefixes(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch, num_beams, V = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 12
    forms = {
        "list": lambda ids: ids,
        "tensor": lambda ids: torch.tensor(ids),
        "on device": lambda ids: torch.tensor(ids, device=DEVICE),
        "bool": lambda ids: torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor(ids), True),
    }
    form = draw(st.sampled_from(list(forms)))
    count = draw(st.sampled_from([1, 3, V]))

    def allowed(batch_id, sent):
        assert sent.ndim == 1
        assert sent.device.type == DEVICE
        ids = [(int(sent[-1]) * 7 + batch_id + i) % V for i in range(count)]
        return forms[form](ids if form == "bool" else [*ids[:-1], ids[-1] - V])

    calls = []
    for step in range(2):
        scores = draw_scores(draw, batch * num_beams, V)
        if draw(st.booleans()):
            scores[: draw(st.integers(1, batch)) * num_beams] = -INF
        calls.append((draw_ids(draw, batch * num_beams, 2 + step, V), scores))
    arguments = {"prefix_allowed_tokens_fn": allowed, "num_beams": num_beams}
    compare("PrefixConstrainedLogitsProcessor", arguments, calls)


def test_nothing_allowed():
    processor = constrained.PrefixConstrainedLogitsProcessor(lambda batch_id, sent: [], 1)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        processor(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 4))


def test_packed_rows_are_the_rows_one_by_one():
    """What CUDA scores take, whose rows aren't written one by one."""
    lists = [[3], [0, -1, 2], [True, False, False, True]]
    expected, packed = torch.zeros(3, 4), torch.zeros(3, 4)
    for row, ids in zip(expected, lists, strict=True):
        row[ids] = 1
    index = constrained._index([constrained._as_ids(ids) for ids in lists], packed.device)
    packed[index] = 1
    assert torch.equal(packed, expected)
