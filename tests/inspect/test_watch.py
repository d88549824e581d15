"""Whole calls of generate, watched: the same tokens, and the numbers that transformers' own processors give."""

import logging

import pytest
import torch
import transformers
from fastlogits_kernels.selection import launch

import fastlogits as fl
from fastlogits.inspect.candidates import Candidates
from tests.models import tiny_llama

PROMPTS = torch.tensor([[5, 7, 9, 11], [3, 4, 5, 6]])
LENGTH = PROMPTS.shape[1]
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
BANNED_AT_FIRST = [1, 8, 61]


class Lifts(transformers.LogitsProcessor):
    """Unknown to fastlogits; it writes its input."""

    def __call__(self, input_ids, scores):
        scores[:, 5] += 3
        return scores


def custom():
    return fl.LogitsProcessorList([fl.SuppressFirstTokens(BANNED_AT_FIRST), Lifts()])


def generate(model, prompts=PROMPTS, **asked):
    torch.manual_seed(3)
    asked = {"max_new_tokens": 10, "pad_token_id": 0, **asked}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **asked)


def hooks_of(model):
    return {"generate", "_get_logits_processor"} & set(vars(model))


ITSELF = object()
"""Stands for the model that is watched."""


def ways():
    one = {"prompts": PROMPTS[:1]}
    yield "greedy", GREEDY | {"repetition_penalty": 1.2}
    yield "sampled", SAMPLED
    yield "several sequences", SAMPLED | {"num_return_sequences": 2}
    yield "beams", GREEDY | {"num_beams": 3, "repetition_penalty": 1.2}
    yield "beams that end early", GREEDY | {"num_beams": 3, "eos_token_id": list(range(40, 97)), "pad_token_id": 0}
    yield "sampled beams", SAMPLED | {"num_beams": 3}
    yield "prompt lookup", one | GREEDY | {"prompt_lookup_num_tokens": 3}
    yield "an assistant", one | SAMPLED | {"assistant_model": tiny_llama(1)}
    yield "itself as assistant", one | GREEDY | {"assistant_model": ITSELF}
    yield "decode", SAMPLED | {"custom_generate": fl.decode, "seeds": 3}
    yield "decode with drafts", one | GREEDY | {"custom_generate": fl.decode, "prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize(("name", "asked"), list(ways()), ids=[name for name, _ in ways()])
def test_watched_calls_say_the_same_and_every_token_has_its_step(name, asked, accelerated, accelerates_nothing_after):
    model = tiny_llama()
    if asked.get("assistant_model") is ITSELF:
        asked = asked | {"assistant_model": model}

    def run():
        return generate(model, logits_processor=custom(), **asked)

    if accelerated:
        with fl.accelerate(model):
            wanted = run()
            with fl.watch(model) as watched:
                found = run()
    else:
        wanted = run()
        with fl.watch(model) as watched:
            found = run()
    assert torch.equal(found, wanted)
    assert not hooks_of(model)
    (call,) = watched.calls
    assert len(call.rows) == len(found)
    for row, text, prompt in zip(call.rows, found.tolist(), call.prompts, strict=True):
        tokens = [step.token for step in row]
        assert tuple(text[:LENGTH]) == prompt
        assert tokens == text[LENGTH : LENGTH + len(tokens)]
        assert set(text[LENGTH + len(tokens) :]) <= {0, 40}  # beams are filled up with what ends them
        assert [step.number for step in row] == list(range(len(tokens)))
        for step in row:
            assert step.rank is not None, step
            assert 1 <= step.rank <= step.left <= step.candidates
            at = step.tokens.index(step.token)
            assert step.probability == step.probabilities[-1][at] > 0
            assert step.probability_before == step.probabilities[0][at]
            assert (step.rank == 1) == (step.probability == max(step.probabilities[-1]))
            assert (step.rank_before == 1) == (step.probability_before == max(step.probabilities[0]))
            assert len(step.probabilities) == len(step.changes) + 1 == len(step.processors) + 1
        if "beam" not in call.method and not asked["do_sample"]:
            assert all(step.rank == 1 for step in row)
    first = next(step for step in watched.steps)
    assert {"SuppressFirstTokens", "Lifts"} <= {processor.name for processor in first.processors}
    banned = next(change for change in first.changes if change.processor == "SuppressFirstTokens")
    lifted = next(change for change in first.changes if change.processor == "Lifts")
    assert banned.removed == 3
    assert (lifted.raised, lifted.lowered, lifted.moved_most[0][0]) == (1, 0, 5)


def test_the_numbers_are_those_of_transformers_own_processors():
    model = tiny_llama()
    given = transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor([9, 61])])
    with fl.watch(model, top=4) as watched:
        found = generate(model, logits_processor=given, output_logits=True, return_dict_in_generate=True, **SAMPLED)
    chain = [
        transformers.RepetitionPenaltyLogitsProcessor(1.2),
        transformers.SuppressTokensLogitsProcessor([9, 61]),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
    ]
    assert [processor.name for processor in watched.steps[0].processors] == [type(each).__name__ for each in chain]
    for step in watched.steps:
        ids = found.sequences[step.row : step.row + 1, : step.position]
        scores = [found.logits[step.number][step.row : step.row + 1]]
        for processor in chain:
            scores.append(processor(ids, scores[-1]))
        expected = [each[0].double().softmax(-1) for each in scores]
        for probabilities, wanted in zip(step.probabilities, expected, strict=True):
            assert probabilities == pytest.approx([float(wanted[token]) for token in step.tokens], abs=1e-12)
        for number, change in enumerate(step.changes):
            before, after = scores[number][0], scores[number + 1][0]
            was, now = before > -torch.inf, after > -torch.inf
            assert change.removed == int((was & ~now).sum())
            assert change.left == int(now.sum())
            assert change.kept_mass == pytest.approx(float(expected[number][now].sum()))
            assert change.kept_of_start == pytest.approx(float(expected[0][now].sum()))
            both = was & now
            up, down = after > before, after < before
            if type(chain[number]) is transformers.TemperatureLogitsWarper:
                up, down = expected[number + 1] > expected[number], expected[number + 1] < expected[number]
            assert (change.raised, change.lowered) == (int((both & up).sum()), int((both & down).sum()))
            order = expected[number + 1].argsort(descending=True, stable=True)[: min(4, change.left)]
            assert [token for token, _ in change.top_after] == order.tolist()
        assert step.rank == 1 + int((scores[-1][0] > scores[-1][0][step.token]).sum())
        assert step.rank_before == 1 + int((scores[0][0] > scores[0][0][step.token]).sum())
        assert step.kept_mass == step.changes[-1].kept_of_start


def test_nothing_is_left_in_the_model_and_an_error_ends_a_call_where_it_came():
    class Fails(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == LENGTH + 2:
                raise RuntimeError("enough")
            return scores

    model = tiny_llama()
    watched = fl.watch(model)
    with pytest.raises(RuntimeError, match="enough"), watched:
        generate(model, logits_processor=[Fails()], **GREEDY)
    assert not hooks_of(model)
    assert [step.number for step in watched.calls[0].rows[0]] == [0, 1]
    assert watched.steps[1].token is None  # nobody has said which was drawn
    generate(model, **GREEDY)
    assert len(watched.calls) == 1
    with pytest.raises(ValueError, match="there is nothing to show"):
        fl.watch(model).page()


def test_blocks_in_one_another_and_one_after_the_other():
    model = tiny_llama()
    with fl.watch(model) as outer:
        with fl.watch(model) as inner:
            generate(model, **GREEDY)
        generate(model, **GREEDY)
    with inner:
        generate(model, **GREEDY)
    assert (len(outer.calls), len(inner.calls)) == (2, 2)
    assert not hooks_of(model)
    assert outer.calls[0].rows == inner.calls[0].rows


def test_decode_says_that_it_takes_the_ordinary_loop(caplog):
    model = tiny_llama()
    with fl.watch(model), caplog.at_level(logging.INFO, "fastlogits"):
        generate(model, custom_generate=fl.decode, **GREEDY)
    assert "decode takes transformers' own loop, without a CUDA graph: fastlogits.watch notes" in caplog.text


def test_decode_calls_the_list_where_a_kernel_would_draw(monkeypatch, device):
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    model, prompt = tiny_llama().to(device), PROMPTS[:1].to(device)
    with fl.watch(model) as watched:
        found = generate(model, prompt, custom_generate=fl.decode, max_new_tokens=2, do_sample=True, top_k=5)
    assert [step.token for step in watched.steps] == found[0, LENGTH:].tolist()[: len(watched.steps)] != []


def test_attributes_that_are_set_in_the_middle_of_a_run_act():
    warper = fl.TopKLogitsWarper(3)

    class Widens(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            warper.top_k = input_ids.shape[1]
            return scores

    model = tiny_llama()
    with fl.watch(model) as watched:
        generate(model, logits_processor=fl.LogitsProcessorList([Widens(), warper]), min_new_tokens=10, **GREEDY)
    assert [step.left for step in watched.calls[0].rows[0]] == list(range(LENGTH, LENGTH + 10))


def test_encoders_and_prompts_of_embeddings(t5):
    with fl.watch(t5) as watched:
        found = generate(t5, **GREEDY)
    assert [step.token for step in watched.calls[0].rows[1]] == found[1, 1 : 1 + len(watched.calls[0].rows[1])].tolist()
    model = tiny_llama()
    with fl.watch(model) as watched:
        found = model.generate(
            inputs_embeds=model.get_input_embeddings()(PROMPTS), max_new_tokens=4, pad_token_id=0, **GREEDY
        )
    assert [step.token for step in watched.calls[0].rows[0]] == found[0, :2].tolist()


def test_guidance_makes_one_row_of_two():
    model = tiny_llama()
    with fl.watch(model) as watched:
        found = generate(model, guidance_scale=1.5, **GREEDY)
    assert [step.token for step in watched.calls[0].rows[1]] == found[1, LENGTH:].tolist()[
        : len(watched.calls[0].rows[1])
    ]


def test_what_holds_a_model_and_what_holds_none():
    class Holder:
        def __init__(self, model):
            self.model = model

    model = tiny_llama()
    with fl.watch(Holder(model)) as watched:
        generate(model, **GREEDY)
    assert len(watched.calls) == 1
    with pytest.raises(TypeError, match="model must be, or hold, a model"):
        fl.watch(object())
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer"):
        fl.watch(model, "gpt2")
    with pytest.raises(ValueError, match="top must be an integer of at least 1, got 0"):
        fl.watch(model, top=0)


# -- What counts as raised and lowered -------------------------------------------------------------------------------


def moved(processor, scores):
    (change,) = fl.trace([processor], torch.tensor([[0, 1]]), torch.tensor([scores]), top=5)
    return change.raised, change.lowered, [token for token, _, _ in change.moved_most]


def test_raised_and_lowered():
    scores = [2.0, 1.0, 0.5, -1.0]
    assert moved(fl.RepetitionPenaltyLogitsProcessor(2.0), scores) == (0, 2, [0, 1])
    assert moved(fl.SequenceBiasLogitsProcessor({(3,): 1.5, (2,): -1.0}), scores) == (1, 1, [3, 2])
    assert moved(fl.TopKLogitsWarper(2), scores) == (0, 0, [])  # what is left is likelier, but nobody raised it
    assert moved(fl.LogitNormalization(), scores) == (0, 0, [])
    raised, lowered, tokens = moved(fl.TemperatureLogitsWarper(0.5), scores)
    assert (raised, lowered, tokens[0]) == (1, 3, 0)
    # A score of 0 is one that a temperature leaves as it is, and yet it is lowered.
    assert moved(fl.TemperatureLogitsWarper(0.5), [2.0, 1.0, 0.0, -1.0])[:2] == (1, 3)


def test_ranks_count_ties_by_token():
    candidates = Candidates(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]))
    assert [candidates.rank(0, token) for token in (1, 2, 0, 3, 9)] == [1, 2, 3, None, None]
    assert candidates.likeliest(0, 2) == ((1, pytest.approx(0.4683, abs=1e-4)), (2, pytest.approx(0.4683, abs=1e-4)))
