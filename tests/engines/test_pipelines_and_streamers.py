"""Pipelines, and streamers that another thread reads: they give what they give without fastlogits."""

import asyncio
import functools
import io
import threading
from contextlib import nullcontext, redirect_stdout

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer, pipeline

import fastlogits as fl
from tests.engines.companions import in_thread, inputs_of, tiny_model, tiny_tokenizer

PROMPT = "Room 101 has 8 chairs"
GREEDY = {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_new_tokens": 3}
SETTINGS = {"greedy": GREEDY, "sampled": SAMPLED}


class Forbid:
    """A processor of one's own that writes in place, as most published ones do."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        scores[:, self.tokens] = -float("inf")
        return scores


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def pipe(model, tokenizer):
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


def _say(pipe, prompts=PROMPT, seed=0, **asked):
    torch.manual_seed(seed)
    said = pipe(prompts, max_new_tokens=16, return_full_text=False, **asked)
    said = said if isinstance(prompts, list) else [said]
    return [[each["generated_text"] for each in row] for row in said]


def _own():
    return [Forbid(40, 41)]


# -- Pipelines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", ["one", "batch", "several"])
def test_pipeline(how, setting, pipe):
    prompts = PROMPT if how == "one" else [PROMPT, "It's 1999", "In"]
    asked = SETTINGS[setting] | {"batch": {"batch_size": 2}, "one": {}, "several": {"num_return_sequences": 2}}[how]
    if how == "several" and setting == "greedy":
        asked["num_beams"] = 2
    expected = _say(pipe, prompts, logits_processor=_own(), **asked)
    for accelerated in (pipe, pipe.model):
        with fl.accelerate(accelerated):
            assert _say(pipe, prompts, logits_processor=_own(), **asked) == expected
            assert _say(pipe, prompts, logits_processor=fl.LogitsProcessorList(_own()), **asked) == expected
    assert _say(pipe, prompts, logits_processor=_own(), **asked) == expected
    if setting == "greedy" and how != "several":
        assert _say(pipe, prompts, custom_generate=fl.decode, logits_processor=_own(), **asked) == expected


def test_pipeline_with_first_step_processors(pipe, tokenizer):
    (text,) = _say(pipe, do_sample=False)[0]
    first = tokenizer(text)["input_ids"][0]
    given = [fl.SuppressFirstTokens([first])]
    expected = _say(pipe, do_sample=False, logits_processor=fl.LogitsProcessorList(given))
    assert expected != [[text]]
    with fl.accelerate(pipe):
        assert _say(pipe, do_sample=False, logits_processor=given) == expected


def test_pipeline_with_decode_and_seeds(pipe):
    asked = SAMPLED | {"custom_generate": fl.decode}
    first = _say(pipe, seeds=7, **asked)
    assert first == _say(pipe, seed=1, seeds=7, **asked) != _say(pipe, seeds=8, **asked)
    with fl.accelerate(pipe):
        assert first == _say(pipe, seeds=7, **asked)


@pytest.mark.parametrize("how", [None, fl.decode])
def test_stop_strings(how, pipe, model, tokenizer):
    prompt = "and 10 20"
    inputs = inputs_of(tokenizer, [prompt])
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    said = [tokenizer.decode(token) for token in whole[0, inputs["input_ids"].shape[1] :]]
    stop = next(text for i, text in enumerate(said) if i > 4 and text.isalnum() and text not in said[:i])
    asked = {"do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    expected = model.generate(**inputs, max_new_tokens=16, **asked)
    assert expected.shape[1] < whole.shape[1]
    text = "".join(said[: said.index(stop) + 1])
    for accelerated in (False, True):
        with fl.accelerate(pipe) if accelerated else nullcontext():
            assert torch.equal(model.generate(**inputs, max_new_tokens=16, custom_generate=how, **asked), expected)
            assert _say(pipe, prompt, custom_generate=how, **asked) == [[text]]


def test_a_decoding_method_of_ones_own_takes_what_ours_takes(pipe, tokenizer):
    @functools.wraps(fl.decode)
    def method(*arguments, **kwargs):
        return fl.decode(*arguments, **kwargs)

    whole = _say(pipe, custom_generate=fl.decode, **SAMPLED | {"seeds": 7})[0][0]
    stop = whole[len(whole) // 2]
    asked = SAMPLED | {"seeds": 7, "stop_strings": [stop], "tokenizer": tokenizer}
    said = _say(pipe, custom_generate=fl.decode, **asked)
    assert (
        said
        == _say(pipe, custom_generate=method, **asked)
        != _say(pipe, custom_generate=method, **asked | {"seeds": 8})
    )
    assert stop in said[0][0]
    assert len(said[0][0]) < len(whole)
    assert whole.startswith(said[0][0])


# -- Streamers ----------------------------------------------------------------------------------------------------


def _within(*arguments, **kwargs):
    """A decoding method of one's own that hands on to ours."""
    return fl.decode(*arguments, **kwargs)


HOWS = {
    "accelerate": (True, None),
    "decode": (False, fl.decode),
    "decode_and_accelerate": (True, fl.decode),
}


def _generate_in_thread(model, streamer, **asked):
    """A thread that generates, as the documents of transformers have it, and the error that ended it."""
    failed = []

    def work():
        torch.manual_seed(0)
        try:
            model.generate(streamer=streamer, max_new_tokens=16, **asked)
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, failed


def _read(model, tokenizer, **asked):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    thread, failed = _generate_in_thread(model, streamer, **inputs_of(tokenizer, [PROMPT]), **asked)
    pieces = list(streamer)
    thread.join(30)
    if failed:
        raise failed[0]
    return pieces


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", HOWS)
def test_iterator_in_a_thread(how, setting, model, tokenizer):
    accelerated, custom = HOWS[how]
    asked = SETTINGS[setting] | {"custom_generate": custom}
    expected = _read(model, tokenizer, **SETTINGS[setting])
    assert len(expected) > 3
    with fl.accelerate(model) if accelerated else nullcontext():
        pieces = _read(model, tokenizer, logits_processor=[Forbid()], **asked)
        if custom is None or setting == "greedy":
            assert pieces == expected
        torch.manual_seed(0)
        whole = model.generate(**inputs_of(tokenizer, [PROMPT]), max_new_tokens=16, **asked)
    said = tokenizer.decode(whole[0, inputs_of(tokenizer, [PROMPT])["input_ids"].shape[1] :])
    assert "".join(pieces) == said


@pytest.mark.parametrize("how", HOWS)
def test_two_threads_at_once(how, model, tokenizer):
    accelerated, custom = HOWS[how]
    expected = _read(model, tokenizer, **GREEDY)
    results = [None, None]

    def reader(i):
        with fl.accelerate(model) if accelerated else nullcontext():
            results[i] = _read(model, tokenizer, custom_generate=custom, **GREEDY)

    threads = [threading.Thread(target=reader, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [expected, expected]


def test_decode_inside_a_method_of_ones_own(model, tokenizer):
    """The reader gets the tokens, though ``generate`` hands a streamer on to no decoding method."""
    expected = _read(model, tokenizer, **GREEDY)
    assert in_thread(lambda: _read(model, tokenizer, custom_generate=_within, **GREEDY)) == expected
    streamer = TextIteratorStreamer(tokenizer, timeout=10)  # generate, which doesn't know it, gives it no prompt

    def with_streamer(*arguments, **kwargs):
        return fl.decode(*arguments, streamer=streamer, **kwargs)

    model.generate(**inputs_of(tokenizer, [PROMPT]), max_new_tokens=16, custom_generate=with_streamer, **GREEDY)
    assert list(streamer) == expected


@pytest.mark.parametrize("how", HOWS)
def test_asynchronous_iterator(how, model, tokenizer):
    accelerated, custom = HOWS[how]

    async def read():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
        asked = GREEDY | {"custom_generate": custom}
        thread, failed = _generate_in_thread(model, streamer, **inputs_of(tokenizer, [PROMPT]), **asked)
        pieces = [piece async for piece in streamer]
        thread.join(30)
        assert not failed
        return pieces

    with fl.accelerate(model) if accelerated else nullcontext():
        assert asyncio.run(read()) == _read(model, tokenizer, **GREEDY)


@pytest.mark.parametrize("how", HOWS)
def test_printed_and_through_a_pipeline(how, pipe, model, tokenizer):
    accelerated, custom = HOWS[how]

    def printed(**asked):
        text = io.StringIO()
        with redirect_stdout(text):
            _say(pipe, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY | asked)
        return text.getvalue()

    expected = printed()
    assert len(expected) > 3
    with fl.accelerate(pipe) if accelerated else nullcontext():
        assert printed(custom_generate=custom) == expected
