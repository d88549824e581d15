"""The loop of ``fl.decode`` whose steps a GPU captures, without a capture: it says what transformers' own loop says."""

import copy
import functools
import gc
import logging

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

import fastlogits as fl
from fastlogits.transformers import caches, loop
from fastlogits.transformers.graphs import GRAPHS, MOST
from tests.models import VOCAB_SIZE, tiny_llama

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not caches.has_device_counters(), reason="no static cache that counts on the device"),
]

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61], [1, 5, 90, 33, 12, 64, 28]])
L = PROMPT.shape[1]
SEEDS = torch.tensor([11, 12])
OUTPUT = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
OURS, ORDINARY = "own loop", "transformers' own loop"


@pytest.fixture(autouse=True)
def _nothing_kept():
    yield
    fl.decode.clear()
    assert not len(GRAPHS)


@pytest.fixture
def both(monkeypatch, caplog):
    """What both loops make of a call, and a check that each was taken."""

    def call(run, expected=OURS):
        caplog.set_level(logging.INFO, logger="fastlogits")
        said = []
        for force in (False, True):
            monkeypatch.setattr(loop, "FORCE", force)
            caplog.clear()
            said.append(run())
            ordinary = any("transformers' own loop" in record.message for record in caplog.records)
            assert ordinary == (not force or expected == ORDINARY), caplog.text
        return said

    return call


def generate(model, ids=PROMPT, **options):
    options = {"max_new_tokens": 8, "do_sample": True, "custom_generate": fl.decode, **options}
    if "inputs_embeds" in options:
        return model.generate(**options)
    return model.generate(input_ids=ids, **{"attention_mask": torch.ones_like(ids), **options})


CHAINS = {
    "nothing": {"top_k": 0},
    "warpers": {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "all": {
        "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 9], [45, 8, 77]], "min_new_tokens": 4,
        "begin_suppress_tokens": [5, 9], "suppress_tokens": [11],
    },
    "greedy": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_length": 12},
    "sequence bias": {"sequence_bias": {(5,): 3.0, (17, 45): -2.0, (33, 12): 4.0}, "top_k": 0},
    "forced": {"forced_eos_token_id": 2, "forced_bos_token_id": 5, "top_k": 0},
    "decay": {"exponential_decay_length_penalty": (2, 1.5), "top_k": 0},
    "typical": {"typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001, "renormalize_logits": True},
    "nan": {"remove_invalid_values": True, "top_k": 0},
}  # fmt: skip


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_same_tokens_and_scores(both, llama, chain, accelerated):
    options = {"seeds": SEEDS, "max_new_tokens": 12, **CHAINS[chain]}
    with fl.accelerate(llama) if accelerated else torch.no_grad():
        one, other = both(lambda: generate(llama, **options))
        assert torch.equal(one, other)
        kept, kept_too = both(lambda: generate(llama, **options, **OUTPUT))
    assert torch.equal(kept.sequences, one)
    assert torch.equal(kept_too.sequences, one)
    assert len(kept.scores) == len(kept_too.scores) == len(kept_too.logits) == one.shape[1] - L
    for name in ("scores", "logits"):
        for mine, theirs in zip(kept[name], kept_too[name], strict=True):
            torch.testing.assert_close(mine, theirs)


RUNS = {
    "first step": lambda: [fl.SuppressFirstTokens(list(range(3, 90)))],
    "first steps": lambda: [fl.SuppressFirstTokens(list(range(3, 90)), window=3, blank=[91, 92])],
    "min tokens": lambda: [fl.MinTokensLogitsProcessor(5, list(range(30, 97)))],
    "presence": lambda: [fl.PresencePenaltyLogitsProcessor(2.0)],
    "frequency": lambda: [fl.FrequencyPenaltyLogitsProcessor(2.0)],
    "prompt only": lambda: [fl.OnlyTokensFrom("prompt", eos_token_id=2)],
    "repetition": lambda: [fl.RepetitionPenaltyLogitsProcessor(1.8), fl.NoRepeatNGramLogitsProcessor(1)],
    "logit bias": lambda: [fl.LogitBiasLogitsProcessor({5: 4.0, 9: -3.0})],
    "top a": lambda: [fl.TopALogitsWarper(0.2), fl.TopNSigmaLogitsWarper(1.5)],
}


@pytest.mark.parametrize("run", RUNS)
def test_processors_of_ours(both, llama, run):
    """Those that read the history, or the step of the run, do it in the buffer as in the text."""
    options = {"seeds": SEEDS, "max_new_tokens": 20, "top_k": 0, "eos_token_id": None}
    one, other = both(lambda: generate(llama, logits_processor=fl.LogitsProcessorList(RUNS[run]()), **options))
    assert torch.equal(one, other)
    plain = generate(llama, **options)
    assert not torch.equal(one, plain)
    one, other = both(lambda: generate(llama, logits_processor=[each.for_run() for each in RUNS[run]()], **options))
    assert torch.equal(one, other)


UNFIT = {
    "function": (lambda: {"logits_processor": [lambda ids, scores: scores.roll(1, -1)]}, "doesn't know"),
    "prefix": (lambda: {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3, 40))}, "on the host"),
    "guidance": (lambda: {"guidance_scale": 1.5}, "on the host"),
    "attentions": (lambda: {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "hidden": (lambda: {"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "no cache": (lambda: {"use_cache": False}, "without a cache"),
    "dynamic": (lambda: {"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
    "another run": (lambda: {"logits_processor": [fl.SuppressFirstTokens([5]).for_run(prompt_length=3)]}, "know"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_takes_the_ordinary_loop(both, llama, caplog, name):
    options, reason = UNFIT[name]
    one, other = both(lambda: generate(llama, seeds=SEEDS, **options()), ORDINARY)
    assert torch.equal(getattr(one, "sequences", one), getattr(other, "sequences", other))
    assert reason in caplog.text


def test_hooks_run_at_each_step(both, llama, caplog):
    seen = []
    handle = llama.model.layers[0].register_forward_hook(lambda *given: seen.append(1))
    one, other = both(lambda: generate(llama, seeds=SEEDS, eos_token_id=None), ORDINARY)
    handle.remove()
    assert torch.equal(one, other)
    assert len(seen) == 2 * 8
    assert "hooks run in model.layers.0" in caplog.text


@pytest.mark.parametrize("do_sample", [False, True])
def test_left_padding(both, llama, do_sample):
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"seeds": SEEDS, "do_sample": do_sample, "attention_mask": mask, "repetition_penalty": 1.2}
    one, other = both(lambda: generate(llama, ids, max_new_tokens=16, **options))
    assert torch.equal(one, other)
    alone = generate(llama, ids[1:, 3:], **{**options, "attention_mask": mask[1:, 3:], "seeds": SEEDS[1:]})
    assert torch.equal(alone[0, 4:], other[1, L : L + alone.shape[1] - 4])


@pytest.mark.parametrize("eos", [2, [*range(40, 60), 2], [*range(3, 97)], None], ids=["one", "many", "most", "none"])
def test_the_end_of_each_text(both, llama, eos):
    """Rows end at their own time; behind the end is padding, and nothing is left of what was too much."""
    for seed in range(4):
        seeds = torch.tensor([seed, seed + 50])
        one, other = both(lambda s=seeds: generate(llama, seeds=s, eos_token_id=eos, max_new_tokens=24, **OUTPUT))
        assert torch.equal(one.sequences, other.sequences)
        assert len(one.scores) == len(other.scores) == len(other.logits)
        assert one.past_key_values.get_seq_length() == other.past_key_values.get_seq_length()


@pytest.mark.parametrize("eos", [[*range(40, 60), 2], None], ids=["ends", "no end"])
@pytest.mark.parametrize("count", [1, 2])
def test_streamers_get_all_tokens_in_order(both, llama, eos, count):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.put_values = []

        def put(self, value):
            self.put_values.append(value.tolist())

        def end(self):
            self.put_values.append("end")

    got = []

    def run():
        got.append(Streamer())
        ids = PROMPT[:count]
        return generate(llama, ids, seeds=SEEDS[:count], streamer=got[-1], eos_token_id=eos, max_new_tokens=20)

    one, other = both(run)
    assert torch.equal(one, other)
    assert got[0].put_values == got[1].put_values
    assert got[1].put_values[-1] == "end"
    assert len(got[1].put_values) == other.shape[1] - L + 2


def test_several_sequences(both, llama):
    one, other = both(lambda: generate(llama, seeds=SEEDS, num_return_sequences=3, temperature=1.5))
    assert len(one) == 6
    assert torch.equal(one, other)


def test_criteria_of_ones_own_are_asked_once_for_each_token(both, llama):
    class Counts(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **options):
            self.seen.append(input_ids)
            return torch.tensor([input_ids.shape[1] >= L + 2, input_ids.shape[1] >= L + 5])

    counts = []

    def run():
        counts.append(Counts())
        return generate(llama, seeds=SEEDS, stopping_criteria=[counts[-1]], max_new_tokens=12)

    for eos in (2, None):
        llama.generation_config.eos_token_id = eos
        one, other = both(run)
        assert torch.equal(one, other)
        assert one.shape[1] == L + 5
        mine, theirs = (each.seen for each in counts[-2:])
        assert len(mine) == len(theirs) == 5
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    llama.generation_config.eos_token_id = 2


def test_time_is_up(both, llama):
    one, other = both(lambda: generate(llama, seeds=SEEDS, max_time=0.0, max_new_tokens=20))
    assert torch.equal(one, other)
    assert one.shape[1] == L + 1


# -- Caches --------------------------------------------------------------------------------------------------------


def states(cache):
    """What a cache holds of each layer."""
    return [caches._Held.of(layer) for layer in cache.layers]


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


def windowed(cls, config, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    shared = {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.4, "max_position_embeddings": 256}
    return cls(config(**sizes, **special, **shared, **changes)).eval()


MODELS = {
    "full": tiny_llama,
    "window": lambda: windowed(MistralForCausalLM, MistralConfig, sliding_window=5),
    "hybrid": lambda: windowed(Gemma2ForCausalLM, Gemma2Config, sliding_window=5),
    "eager": lambda: windowed(Gemma2ForCausalLM, Gemma2Config, sliding_window=5, attn_implementation="eager"),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_caches_that_go_on(both, name, kind):
    """A conversation of three turns: the cache that is handed in holds the same, and so do the tokens."""
    model = MODELS[name]()

    def run():
        cache = CACHES[kind](model.config)
        ids = PROMPT
        for turn in range(3):
            options = {"past_key_values": cache, "seeds": SEEDS + turn, "eos_token_id": None, "max_new_tokens": 6}
            ids = generate(model, ids, **options, **(OUTPUT if turn == 1 else {}))
            ids = getattr(ids, "sequences", ids)
            ids = torch.cat([ids, PROMPT[:, 1:4]], 1)
        return ids, cache

    (one, mine), (other, theirs) = both(run)
    assert torch.equal(one, other)
    for held, too in zip(states(mine), states(theirs), strict=True):
        assert held.length == too.length == one.shape[1] - 4
        torch.testing.assert_close(held.keys, too.keys)
        torch.testing.assert_close(held.values, too.values)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_is_returned(both, name, implementation):
    model = MODELS[name]()
    options = {"seeds": SEEDS, "max_new_tokens": 9, "cache_implementation": implementation, "eos_token_id": None}
    one, other = both(lambda: generate(model, **options, **OUTPUT))
    assert torch.equal(one.sequences, other.sequences)
    assert type(one.past_key_values) is type(other.past_key_values)
    for held, too in zip(states(one.past_key_values), states(other.past_key_values), strict=True):
        assert held.length == too.length
        torch.testing.assert_close(held.keys, too.keys)


def test_a_returned_cache_is_the_callers(both, llama):
    """The next call writes into another one."""
    _, one = both(lambda: generate(llama, seeds=SEEDS, eos_token_id=None, **OUTPUT))
    before = copy.deepcopy(states(one.past_key_values))
    logits = one.logits[-1].clone()
    generate(llama, PROMPT.flip(1), seeds=SEEDS, eos_token_id=None, **OUTPUT)
    for held, now in zip(before, states(one.past_key_values), strict=True):
        assert torch.equal(held.keys, now.keys)
    assert torch.equal(one.logits[-1], logits)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_prompt_in_chunks(both, llama, chunk):
    one, other = both(lambda: generate(llama, seeds=SEEDS, prefill_chunk_size=chunk))
    assert torch.equal(one, other)
    assert torch.equal(one, generate(llama, seeds=SEEDS))


def test_embeddings_as_the_prompt(both, llama):
    embeddings = llama.get_input_embeddings()(PROMPT)
    chain = {"repetition_penalty": 1.3, "logits_processor": fl.LogitsProcessorList([fl.SuppressFirstTokens([5, 9])])}
    one, other = both(lambda: generate(llama, inputs_embeds=embeddings, seeds=SEEDS, **chain))
    assert torch.equal(one, other)


@pytest.mark.parametrize("chain", ["nothing", "all", "greedy", "forced"])
def test_encoder_decoder(both, t5, chain):
    mask = torch.ones_like(PROMPT)
    mask[1, 5:] = 0
    options = {"seeds": SEEDS, "attention_mask": mask, "max_new_tokens": 12, **CHAINS[chain]}
    one, other = both(lambda: generate(t5, **options))
    assert torch.equal(one, other)
    # Another source of the same length, in the same buffers.
    one, other = both(lambda: generate(t5, PROMPT.flip(1), **options))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(both, dtype):
    model = tiny_llama().to(dtype)
    one, other = both(lambda: generate(model, seeds=SEEDS, temperature=0.7, top_p=0.9, max_new_tokens=6))
    assert torch.equal(one, other)


# -- What is kept --------------------------------------------------------------------------------------------------


def test_calls_of_one_kind_share_a_step(both, llama):
    """Other prompts, seeds, masks and lengths that round up to the same; and nothing of a call is left for the next."""
    calls = [
        {"ids": PROMPT, "seeds": SEEDS},
        {"ids": PROMPT.flip(1), "seeds": SEEDS + 5},
        {"ids": PROMPT[:, :5], "seeds": SEEDS, "max_new_tokens": 30},
        {"ids": PROMPT, "seeds": SEEDS, "attention_mask": torch.tensor([[1] * L, [0, 0] + [1] * (L - 2)])},
        {"ids": PROMPT, "seeds": SEEDS, "eos_token_id": [*range(30, 36)]},
    ]
    for call in calls:
        first = fl.LogitsProcessorList([fl.SuppressFirstTokens([5, 9]), fl.PresencePenaltyLogitsProcessor(1.0)])
        prompt = fl.LogitsProcessorList([fl.OnlyTokensFrom("prompt", eos_token_id=2)])
        for run in (first, prompt):
            one, other = both(lambda o={**call, "logits_processor": run}: generate(llama, **o))
            assert torch.equal(one, other)
    assert len(GRAPHS) == 2


def test_other_parameters_are_another_kind(both, llama):
    for temperature in (0.5, 1.5, 0.5):
        one, other = both(lambda t=temperature: generate(llama, seeds=SEEDS, temperature=t))
        assert torch.equal(one, other)
    for processor in (fl.LogitBiasLogitsProcessor({5: 9.0}), fl.LogitBiasLogitsProcessor({6: 9.0})):
        one, other = both(
            lambda p=processor: generate(llama, seeds=SEEDS, logits_processor=fl.LogitsProcessorList([p]))
        )
        assert torch.equal(one, other)


def test_few_steps_are_kept(both, llama):
    for rows in range(1, MOST + 3):
        ids = PROMPT[:1].repeat(rows, 1)
        one, other = both(lambda i=ids: generate(llama, i, seeds=3))
        assert torch.equal(one, other)
        assert len(GRAPHS) == min(rows, MOST)


def test_a_model_takes_its_steps_along(both):
    model = tiny_llama()
    both(functools.partial(generate, model, seeds=SEEDS))
    assert len(GRAPHS) == 1
    del model
    gc.collect()
    assert not len(GRAPHS)


def test_weights_that_have_moved(both, llama):
    model = copy.deepcopy(llama)
    both(lambda: generate(model, seeds=SEEDS))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    one, other = both(lambda: generate(model, seeds=SEEDS))
    assert torch.equal(one, other)
    assert len(GRAPHS) == 2


def test_in_inference_mode_and_out_of_it(both, llama):
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            one, other = both(lambda: generate(llama, seeds=SEEDS))
        assert torch.equal(one, other)


def test_one_call_in_another(both, llama):
    """A criterion that decodes finds the steps in use, and does without."""
    inner = []

    class Decodes(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            inner.append(generate(llama, seeds=SEEDS, max_new_tokens=3))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    loop_before = loop.FORCE
    loop.FORCE = True
    try:
        said = generate(llama, seeds=SEEDS, stopping_criteria=[Decodes()], eos_token_id=None)
    finally:
        loop.FORCE = loop_before
    assert torch.equal(said, generate(llama, seeds=SEEDS, eos_token_id=None))
    assert all(torch.equal(each, inner[0]) for each in inner)
    assert len(GRAPHS) == 1


@pytest.mark.parametrize("of_the_caller", [False, True])
def test_no_memory_for_a_static_cache(monkeypatch, both, llama, of_the_caller):
    def refuse(*given):
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(loop, "Step", refuse)
    cache = (lambda: {"past_key_values": DynamicCache(config=llama.config)}) if of_the_caller else dict
    if of_the_caller:
        with pytest.raises(torch.OutOfMemoryError):
            both(lambda: generate(llama, seeds=SEEDS, **cache()))
        return
    one, other = both(lambda: generate(llama, seeds=SEEDS), ORDINARY)
    assert torch.equal(one, other)


def test_a_failure_leaves_the_steps_free(both, llama):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            raise RuntimeError("on purpose")

    loop.FORCE = True
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(llama, stopping_criteria=[Fails()])
    finally:
        loop.FORCE = False
    one, other = both(lambda: generate(llama, seeds=SEEDS))
    assert torch.equal(one, other)
