"""The real chat model, where its packages are installed, as ``make test-real`` does: see docs/watch.md."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

import fastlogits as fl
from fastlogits.demo import real_model

pytestmark = pytest.mark.xdist_group(real_model.NAME)  # one process loads it
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real():
    try:
        return real_model.load_real()
    except real_model.NotInstalledError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def inputs(real):
    chat = [{"role": "user", "content": real_model.PROMPT}]
    return real[1].apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def answer(real, inputs, **asked):
    model, tokenizer = real
    said = model.generate(**inputs, do_sample=False, **asked)
    return tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_before_and_after_are_as_the_documents_show(real, inputs):
    digits = fl.TokenMask.matching(real[1], r"\s*\d")
    assert len(digits) == 10
    before = answer(real, inputs, max_new_tokens=40)
    after = answer(real, inputs, max_new_tokens=40, logits_processor=[fl.SuppressFirstTokens(digits).for_run()])
    page = re.sub(r"[\s>]+", " ", (ROOT / "docs" / "watch.md").read_text())
    assert f"*As it is:* {' '.join(before.split())}" in page
    assert f"*No digit first:* {' '.join(after.split())} ..." in page


def test_a_watched_run_says_the_same_and_its_page_is_small(real, inputs):
    model, tokenizer = real
    asked = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}
    asked |= {"max_new_tokens": 20, "no_repeat_ngram_size": 3}
    torch.manual_seed(0)
    start = time.perf_counter()
    wanted = model.generate(**inputs, **asked)
    alone = time.perf_counter() - start
    torch.manual_seed(0)
    start = time.perf_counter()
    with fl.watch(model, tokenizer) as watched:
        found = model.generate(**inputs, **asked)
    print(f"{alone:.2f} s alone, {time.perf_counter() - start:.2f} s watched")
    assert torch.equal(found, wanted)
    data = json.loads(re.search(r'id="data">(.*?)</script>', watched.page(), re.DOTALL)[1])
    steps = data["sequences"][0]["steps"]
    assert len(json.dumps(steps, separators=(",", ":"))) / len(steps) < 3000
