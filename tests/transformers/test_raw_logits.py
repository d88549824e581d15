"""Raw logits that ``generate`` returns stay raw, whatever writes in place behind a step that changes nothing."""

import contextlib
import functools

import pytest
import torch
import transformers

import fastlogits as fl
from tests.installed import IS_4
from tests.models import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61, 17, 45, 8]])


class InPlace(transformers.LogitsProcessor):
    """As most published ones."""

    def __call__(self, input_ids, scores):
        scores[:, ::3] = -float("inf")
        return scores


FIRST = {
    "it alone": [],
    "least length": [fl.MinLengthLogitsProcessor(1, 2)],
    "words": [transformers.NoBadWordsLogitsProcessor([[33, 62, 1]], 2)],
    "no tokens": [fl.SuppressTokensLogitsProcessor([])],
    "first steps": [fl.SuppressFirstTokens([5], window=1).for_run(3)],
    "another in place": [InPlace()],
}
LISTS = {
    "list": list,
    "theirs": transformers.LogitsProcessorList,
    "ours": fl.LogitsProcessorList,
}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 2, "do_sample": False},
    "draft": {"do_sample": False, "assistant_model": tiny_llama(seed=1)},
    "decode": {"do_sample": False, "custom_generate": fl.decode},
    "decode by drawing": {"do_sample": True, "custom_generate": functools.partial(fl.decode, seeds=3)},
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", LISTS)
@pytest.mark.parametrize("first", FIRST)
def test_raw_logits(llama, first, wrap, way, accelerated):
    ours = accelerated or "decode" in way or (wrap == "ours" and first not in ("it alone", "another in place"))
    if not ours:
        pytest.skip("transformers' own list hands its own tensor on")
    if IS_4 and first == "least length" and way == "draft" and accelerated:
        pytest.skip("transformers 4 refuses a MinLengthLogitsProcessor with a draft")
    made = LISTS[wrap]([*FIRST[first], InPlace()])
    for scores in (False, True):
        options = {"output_logits": True, "output_scores": scores, "return_dict_in_generate": True, **WAYS[way]}
        with fl.accelerate(llama) if accelerated else contextlib.nullcontext():
            out = llama.generate(PROMPT, max_new_tokens=3, pad_token_id=0, logits_processor=made, **options)
        assert all(each.isfinite().all() for each in out.logits)
        if scores:
            assert all(each[:, ::3].isinf().all() for each in out.scores)
