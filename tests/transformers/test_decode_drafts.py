"""Drafts under ``fl.decode``: they act, and the tokens are those that come without them."""

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import fastlogits as fl
from fastlogits.transformers import caches, drafters, loop
from fastlogits.transformers.graphs import GRAPHS
from fastlogits.transformers.step import Verification
from tests.models import VOCAB_SIZE, tiny_llama
from tests.transformers.test_loop import CHAINS, MODELS, OUTPUT, RUNS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not caches.has_device_counters(), reason="no static cache that counts on the device"),
    pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="caches take nothing back"),
]

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61, 17, 45, 8, 90, 12, 17, 45]])
L = PROMPT.shape[1]
SEED = torch.tensor([11])


STEPS, DRAFTED = ("as they are", "as a GPU captures them"), ("lookup", "model")


@pytest.fixture(autouse=True, params=STEPS)
def steps(monkeypatch, request):
    """All tests, with steps as they are and with those that a GPU captures."""
    monkeypatch.setattr(loop, "FORCE", request.param != "as they are")
    yield request.param
    fl.decode.clear()


def nearly(model):
    """A model that says nearly the same."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return other


def generate(model, ids=PROMPT, **options):
    given = {"max_new_tokens": 24, "do_sample": True, "custom_generate": fl.decode, "seeds": SEED, **options}
    return model.generate(input_ids=ids, **{"attention_mask": torch.ones_like(ids), **given})


@pytest.fixture(scope="module")
def draft(llama):
    return nearly(llama)


@pytest.fixture(params=DRAFTED)
def drafted(request, draft):
    """The arguments that ask for drafts."""
    return {"prompt_lookup_num_tokens": 4} if request.param == "lookup" else {"assistant_model": draft}


def in_pairs(argument, names):
    """Each name with each kind of steps and with each kind of drafts, and these with each other: half of the cases."""
    cases = [
        (name, STEPS[number], DRAFTED[(index + number) % 2]) for index, name in enumerate(names) for number in (0, 1)
    ]
    return pytest.mark.parametrize((argument, "steps", "drafted"), cases, indirect=["steps", "drafted"])


@in_pairs("chain", CHAINS)
def test_the_same_tokens_and_scores(llama, drafted, chain, steps):
    options = {**CHAINS[chain], **OUTPUT}
    wanted = generate(llama, **options)
    said = generate(llama, **options, **drafted)
    assert torch.equal(said.sequences, wanted.sequences)
    assert torch.equal(generate(llama, **CHAINS[chain], **drafted), wanted.sequences)
    for name in ("scores", "logits"):
        for mine, theirs in zip(said[name], wanted[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    assert any(isinstance(step, Verification) for step in GRAPHS) == (steps != "as they are")
    count = wanted.sequences.shape[1] - L
    assert sum(said.accepted_drafts) + len(said.accepted_drafts) + 1 == count
    assert said.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()


@in_pairs("run", RUNS)
def test_processors_of_ours(llama, drafted, run):
    options = {"top_k": 0, "eos_token_id": None}
    wanted = generate(llama, logits_processor=fl.LogitsProcessorList(RUNS[run]()), **options)
    said = generate(llama, logits_processor=fl.LogitsProcessorList(RUNS[run]()), **options, **drafted)
    assert torch.equal(said, wanted)


def test_processors_that_are_not_known_are_called_as_without(llama, drafted):
    """Once for each token, in order, with its text."""
    seen = []

    def turn(ids, scores):
        seen.append(ids.tolist())
        return scores.roll(1, -1)

    wanted = generate(llama, logits_processor=[turn, fl.DRYLogitsProcessor(2.0)])
    first = list(seen)
    seen.clear()
    assert torch.equal(generate(llama, logits_processor=[turn, fl.DRYLogitsProcessor(2.0)], **drafted), wanted)
    assert seen == first


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_draft_model_is_believed(llama, draft, do_sample):
    """Nearly the same model with the same noise draws nearly the same; the model itself draws just the same."""
    options = {"do_sample": do_sample, "top_k": 0, "eos_token_id": None, "max_new_tokens": 40, **OUTPUT}
    for model, least in ((llama, 39), (draft, 10)):
        model.generation_config.num_assistant_tokens = 4
        said = generate(llama, assistant_model=model, **options)
        assert sum(said.accepted_drafts) + len(said.accepted_drafts) == 39
        assert len(said.accepted_drafts) <= 39 - least * 0.6


def test_the_steps_of_the_draft_model_are_captured_too(llama, draft, steps):
    """Where it says what another model doesn't, it takes its own steps back."""
    options = {"top_k": 0, "eos_token_id": None, "max_new_tokens": 40, **OUTPUT}
    draft.generation_config.num_assistant_tokens = 4
    said = generate(llama, assistant_model=draft, **options)
    assert torch.equal(said.sequences, generate(llama, **options).sequences)
    assert 0 < sum(said.accepted_drafts) < 4 * len(said.accepted_drafts)
    widths = sorted(len(step.drawn) for step in GRAPHS if isinstance(step, Verification))
    assert widths == ([] if steps == "as they are" else [1, 17])


def test_a_text_that_repeats_itself_is_looked_up(llama, caplog):
    caplog.set_level(logging.INFO, logger="fastlogits")
    again = [fl.LogitBiasLogitsProcessor({17: 60.0, 45: 60.0})]
    options = {"logits_processor": fl.LogitsProcessorList(again), "do_sample": False, "eos_token_id": None}
    wanted = generate(llama, **options, **OUTPUT)
    said = generate(llama, **options, **OUTPUT, prompt_lookup_num_tokens=5)
    assert torch.equal(said.sequences, wanted.sequences)
    assert sum(said.accepted_drafts) > 5
    assert f"drafts: {sum(said.accepted_drafts)} accepted" in caplog.text


@in_pairs("name", MODELS)
def test_windows_and_turns(name, drafted):
    """A cache goes on to the next turn, and takes back what was too much, within a window and beyond it."""
    model = MODELS[name]()
    given = {"assistant_model": nearly(model)} if "assistant_model" in drafted else drafted

    def run(**more):
        cache, ids = DynamicCache(config=model.config), PROMPT
        for turn in range(2):
            ids = generate(model, ids, past_key_values=cache, seeds=SEED + turn, eos_token_id=None, **more)
            ids = torch.cat([ids, PROMPT[:, 1:4]], 1)
        return ids, cache

    (wanted, theirs), (said, mine) = run(), run(**given)
    assert torch.equal(said, wanted)
    for layer, other in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eos", [2, [*range(40, 60), 2], [*range(3, 97)]], ids=["one", "many", "most"])
def test_the_end_of_the_text(llama, drafted, eos):
    for seed in range(3):
        seeds = torch.tensor([seed])
        wanted = generate(llama, seeds=seeds, eos_token_id=eos)
        assert torch.equal(generate(llama, seeds=seeds, eos_token_id=eos, **drafted), wanted)


def test_streamers_and_criteria(llama, drafted):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.got.append("end")

    class Stops(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **options):
            self.seen.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= L + 11])

    results = []
    for more in ({}, drafted):
        streamer, stops = Streamer(), Stops()
        said = generate(llama, streamer=streamer, stopping_criteria=[stops], eos_token_id=None, **more)
        results.append((said.tolist(), streamer.got, stops.seen))
    assert results[0] == results[1]


def test_left_padding_and_embeddings(llama, drafted):
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[0, :3], mask[0, :3] = 0, 0
    wanted = generate(llama, ids, attention_mask=mask)
    assert torch.equal(generate(llama, ids, attention_mask=mask, **drafted), wanted)
    options = {"inputs_embeds": llama.get_input_embeddings()(PROMPT), "max_new_tokens": 9, "do_sample": True}
    options |= {"seeds": SEED, "custom_generate": fl.decode}
    if "assistant_model" not in drafted:
        assert torch.equal(llama.generate(**options, **drafted), llama.generate(**options))


def test_encoder_decoder(t5):
    for chain in ("nothing", "all", "greedy"):
        wanted = generate(t5, **CHAINS[chain])
        assert torch.equal(generate(t5, **CHAINS[chain], prompt_lookup_num_tokens=3), wanted)


def test_a_processor_that_changes(llama, drafted):
    """What is set while it runs counts from the next token on."""

    def run(**more):
        warper = fl.TemperatureLogitsWarper(0.7)

        class Sets(StoppingCriteria):
            def __call__(self, input_ids, scores, **options):
                if input_ids.shape[1] == L + 9:
                    warper.temperature = 1e-4
                return torch.zeros(1, dtype=torch.bool)

        options = {"top_k": 0, "eos_token_id": None, "stopping_criteria": [Sets()], "logits_processor": [warper]}
        return generate(llama, **options, **OUTPUT, **more)

    wanted, said = run(), run(**drafted)
    assert torch.equal(said.sequences, wanted.sequences)
    assert len(said.past_key_values.layers[0].keys[0, 0]) == said.sequences.shape[1] - 1


def test_what_is_looked_up():
    lookup = drafters.PromptLookup(3, 2)
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2], 9) == [3, 4, 5]
    assert lookup.propose([1, 2, 3, 1, 2, 7, 8, 1, 2], 9) == [7, 8, 1]
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2], 1) == [3]
    assert lookup.propose([9, 2, 3, 1, 2], 9) == [3, 1, 2]
    assert lookup.propose([5, 7, 7, 7, 7, 7, 7], 9) == [7, 7, 7]
    assert lookup.propose([7, 7, 7], 9) == [7]
    assert lookup.propose([1, 2, 1, 2, 1, 2], 9) == [1, 2, 1]
    assert lookup.propose([1, 2, 3], 9) == lookup.propose([], 9) == lookup.propose([1], 9) == []


def test_bad_input(llama, t5):
    two = PROMPT.repeat(2, 1)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens takes one row at a time, got 2: leave"):
        generate(llama, two, seeds=3, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="assistant_model takes one row at a time, got 2: leave"):
        generate(llama, two, seeds=3, assistant_model=llama)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens needs a cache that takes tokens back"):
        generate(llama, prompt_lookup_num_tokens=3, cache_implementation="static")
    other = tiny_llama()
    other.config.vocab_size = VOCAB_SIZE + 1
    with pytest.raises(ValueError, match=f"of {VOCAB_SIZE + 1} tokens for LlamaForCausalLM of {VOCAB_SIZE}"):
        generate(llama, assistant_model=other)
    with pytest.raises(ValueError, match="assistant_early_exit must be None"):
        generate(llama, prompt_lookup_num_tokens=3, assistant_early_exit=1)
    cache = generate(llama, two, seeds=3, **OUTPUT).past_key_values
    with pytest.raises(ValueError, match=r"(past_key_values|cache) must hold 1 rows.* got a cache of 2"):
        generate(llama, torch.cat([PROMPT, PROMPT, PROMPT], 1), past_key_values=cache)
