"""``accelerate``: everything ``generate`` does says the same, token for token, and runs as one plan."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import transformers
import transformers.generation.logits_process as reference
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import fastlogits as fl
from fastlogits.plan import selection as truncate_launch
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.selection import Truncation
from fastlogits.transformers import accelerate as acceleration
from tests.installed import IS_4, PENALISES_COPIES
from tests.models import VOCAB_SIZE, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread", "accelerates_nothing_after")

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61], [1, 5, 90, 33, 12, 64, 28]])
L = PROMPT.shape[1]
BANNED = list(range(3, VOCAB_SIZE, 2))

# What people give to generate: together all processors that it builds for a model of text.
FLAGS = {
    "none": {},
    "warpers": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "truncations": {"typical_p": 0.8, "epsilon_cutoff": 0.003, "eta_cutoff": 0.005},
    "history": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9], [11]]},
    "length": {
        "min_new_tokens": 3,
        "exponential_decay_length_penalty": (3, 1.3),  # earlier, transformers 4 would make NaN of what is banned
        "forced_eos_token_id": 2,
        "begin_suppress_tokens": list(range(40, 80)),
        "suppress_tokens": list(range(3, 30)),
    },
    "rest": {
        "sequence_bias": {(30,): 5.0, (31, 32): 9.0, (33,): -4.0},
        "remove_invalid_values": True,
        "renormalize_logits": True,
        "min_length": 9,
    },
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [8, 9]],
        "min_new_tokens": 4,
        "suppress_tokens": [50, 51],
        "begin_suppress_tokens": list(range(40, 60)),
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.95,
    },
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture
def quiet(monkeypatch):
    """Without what transformers says at length: that it prefers what it is given."""
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", lambda *arguments: None)


def generate(model, inputs=None, **options):
    torch.manual_seed(0)
    inputs = {"input_ids": PROMPT} if inputs is None else inputs
    if "attention_mask" not in inputs and "input_ids" in inputs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    return model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, **options})


def check(model, inputs=None, **options):
    """Token-identical with and without; what was said."""
    expected = generate(model, inputs, **options)
    with fl.accelerate(model), counted() as calls:
        found = generate(model, inputs, **options)
    assert torch.equal(found, expected)
    assert calls, "no plan of a run was called"
    return expected


class counted:  # noqa: N801
    """The calls of plans that ``generate`` makes, as (ids shape, scores shape)."""

    def __enter__(self):
        self.calls, self.lists, self._original = [], [], acceleration.RunList.__call__

        def call(processors, input_ids, scores, **kwargs):
            self.calls.append((tuple(input_ids.shape), tuple(scores.shape)))
            if not any(each is processors for each in self.lists):
                self.lists.append(processors)
            return self._original(processors, input_ids, scores, **kwargs)

        acceleration.RunList.__call__ = call
        return self

    def __exit__(self, *error):
        acceleration.RunList.__call__ = self._original

    def __bool__(self):
        return bool(self.calls)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flags", FLAGS)
def test_modes(llama, flags, mode):
    check(llama, **FLAGS[flags], **MODES[mode])


def test_the_flags_change_what_is_said(llama):
    """Else the tests above would say nothing."""
    for mode in ({}, {"do_sample": True}):
        plain = generate(llama, **mode, max_new_tokens=16)
        for name, flags in FLAGS.items():
            if name != "none" and (mode or name not in ("warpers", "truncations")):
                assert not torch.equal(generate(llama, **mode, **flags, max_new_tokens=16), plain), name


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_left_padding(llama, options):
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PROMPT], 1)
    ids[1, :3] = torch.tensor([44, 45, 46])
    mask = (ids != 0).long()
    for flags in ("history", "all"):
        check(llama, {"input_ids": ids, "attention_mask": mask}, **FLAGS[flags], **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("flags", ["warpers", "history", "length", "all"])
def test_encoder_decoder(t5, flags, options):
    check(t5, {"input_ids": PROMPT}, **FLAGS[flags], **options)
    # Elsewhere only the first beams are penalised; we follow the newest.
    penalty = {"encoder_repetition_penalty": 1.5} if PENALISES_COPIES or "num_beams" not in options else {}
    check(
        t5,
        {"input_ids": PROMPT},
        **penalty,
        encoder_no_repeat_ngram_size=2,
        forced_bos_token_id=70,
        **FLAGS[flags],
        **options,
    )


@pytest.mark.filterwarnings("ignore:Passing")
def test_inputs_embeds(llama):
    embeds = llama.get_input_embeddings()(PROMPT).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(PROMPT)}
    for flags in ("history", "length", "all"):
        check(llama, inputs, **FLAGS[flags], do_sample=True)


def test_compiled_forward_with_a_static_cache():
    model = tiny_llama()
    model.forward = torch.compile(model.forward, backend="eager")
    check(model, cache_implementation="static", disable_compile=True, do_sample=True, **FLAGS["all"])


def test_chat_with_a_reused_cache(llama):
    said = []
    for accelerated in (False, True):
        history, cache = PROMPT, DynamicCache(config=llama.config)
        if accelerated:
            fl.accelerate(llama)
        for _ in range(3):
            options = {"do_sample": True, "logits_processor": [fl.SuppressFirstTokens(BANNED)] if accelerated else None}
            if not accelerated:
                options["logits_processor"] = [fl.SuppressFirstTokens(BANNED).for_run(history.shape[1])]
            inputs = {"input_ids": history, "past_key_values": cache}
            history = torch.cat([generate(llama, inputs, **FLAGS["all"], **options), PROMPT[:, 1:4]], 1)
        said.append(history)
    fl.restore(llama)
    assert torch.equal(*said)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_scores_and_logits(llama, options):
    options = {**options, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = generate(llama, **FLAGS["all"], **options)
    with fl.accelerate(llama):
        found = generate(llama, **FLAGS["all"], **options)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert all(torch.equal(*pair) for pair in zip(found[name], expected[name], strict=True))


def test_streamers(llama):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.put_in, self.ended = [], False

        def put(self, value):
            self.put_in.append(value.tolist())

        def end(self):
            self.ended = True

    streamers = [Streamer(), Streamer()]
    options = {"do_sample": True, **FLAGS["all"]}
    generate(llama, {"input_ids": PROMPT[:1]}, streamer=streamers[0], **options)
    with fl.accelerate(llama):
        generate(llama, {"input_ids": PROMPT[:1]}, streamer=streamers[1], **options)
    assert streamers[0].put_in == streamers[1].put_in
    assert streamers[1].ended


# -- Candidates of a draft ----------------------------------------------------------------------------------------

DRAFT_FLAGS = ["warpers", "history", "rest", "all"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("flags", DRAFT_FLAGS)
def test_assisted_decoding(llama, flags, options, both):
    if IS_4 and flags in ("all", "rest"):
        pytest.skip("transformers 4 refuses min_new_tokens with a draft")
    if flags == "warpers" and not options:
        pytest.skip("greedy decoding has none")
    draft = tiny_llama(seed=1)
    options = {**options, "assistant_model": draft, "max_new_tokens": 14, **FLAGS[flags]}
    if both:
        fl.accelerate(draft)
    check(llama, {"input_ids": PROMPT[:1]}, **options)
    fl.restore(draft)


def test_a_padded_prompt_with_a_draft(llama):
    """The penalty leaves out the padding, which is a number of the row's own."""
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), PROMPT[:1]], 1)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    check(llama, inputs, assistant_model=tiny_llama(seed=1), max_new_tokens=14, do_sample=True, **FLAGS["history"])


@pytest.mark.parametrize("flags", DRAFT_FLAGS)
def test_prompt_lookup(llama, flags):
    inputs = {"input_ids": PROMPT[:1].repeat(1, 3)}
    for options in ({}, {"do_sample": True}):
        check(llama, inputs, max_new_tokens=14, prompt_lookup_num_tokens=3, **options, **FLAGS[flags])


def test_all_candidates_are_processed_in_one_call(llama, monkeypatch):
    """A draft that is the model itself proposes what is accepted; each round is one launch for all positions."""
    shapes = []
    truncate = truncate_launch.truncate
    monkeypatch.setattr(
        truncate_launch, "truncate", lambda scores, rules: shapes.append(tuple(scores.shape)) or truncate(scores, rules)
    )
    draft = copy.deepcopy(llama)
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    options = {
        "assistant_model": draft,
        "do_sample": True,
        "max_new_tokens": 12,
        "top_k": 20,
        "repetition_penalty": 1.2,
    }
    expected = generate(llama, {"input_ids": PROMPT[:1]}, **options)
    with fl.accelerate(llama), counted() as calls:
        found = generate(llama, {"input_ids": PROMPT[:1]}, **options)
    assert torch.equal(found, expected)
    assert max(shapes) == (6, VOCAB_SIZE)
    assert len(shapes) * 3 < len(calls.calls)


def test_candidates_with_processors_that_need_each_position(llama):
    """A processor of the user sees one position after the other; rows that belong to a run too."""
    seen = []

    class Unknown(reference.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(tuple(input_ids.shape))
            assert scores.shape[0] == input_ids.shape[0]
            return scores * (1 + input_ids[:, -1:] % 3)

    class Row(fl.StagedProcessor):
        def stage(self):
            from fastlogits.plan.stages import Rows

            return Rows("bias", lambda ids, scores: scores * (1 + ids[:, -1:] % 3), "a function of the last token")

    options = {"max_new_tokens": 14, "do_sample": True, "repetition_penalty": 1.3}
    rows = fl.OnlyTokensFrom([list(range(3, 60))], eos_token_id=2)
    # One draft is hardly ever right, the other one always, so that all its candidates count.
    for draft in (tiny_llama(seed=1), tiny_llama()):
        for made in ([Unknown()], [Row()], [rows]):
            check(llama, {"input_ids": PROMPT[:1]}, logits_processor=made, assistant_model=draft, **options)
    assert {rows for rows, _ in seen} == {1}


def test_candidates_without_views(llama):
    """In inference mode a tensor doesn't know what it is a view of: position by position, then."""
    options = {"assistant_model": tiny_llama(seed=1), "max_new_tokens": 14, "do_sample": True, **FLAGS["history"]}
    with torch.inference_mode():
        check(llama, {"input_ids": PROMPT[:1]}, **options)


@pytest.mark.parametrize("window", [1, 2])
def test_first_steps_with_candidates(llama, window):
    draft = tiny_llama(seed=1)
    for inputs, options in (
        (PROMPT[:1], {"assistant_model": draft}),
        (PROMPT[:1].repeat(1, 3), {"prompt_lookup_num_tokens": 3}),
    ):
        processor = fl.SuppressFirstTokens(BANNED, window=window)
        expected = generate(llama, {"input_ids": inputs}, logits_processor=[processor.for_run(inputs.shape[1])])
        with fl.accelerate(llama):
            found = generate(llama, {"input_ids": inputs}, logits_processor=[processor], **options)
        assert torch.equal(found, expected)


# -- Processors of the user ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [list, transformers.LogitsProcessorList, fl.LogitsProcessorList])
def test_first_steps_in_any_list(llama, wrap, mode):
    mode = MODES[mode]
    plain = generate(llama, **mode)
    banned = sorted({*BANNED, *plain[:, L].tolist()})
    processor = fl.SuppressFirstTokens(banned)
    expected = generate(llama, logits_processor=[processor.for_run(L)], **mode)
    assert not torch.equal(expected, plain)
    with fl.accelerate(llama):
        assert torch.equal(generate(llama, logits_processor=wrap([processor]), **mode), expected)


class Halve(reference.LogitsProcessor):
    """One of the user's own, whose place shows: it does not commute with a penalty on what is below zero."""

    def __call__(self, input_ids, scores):
        return scores * 0.5 + 3.0


@pytest.mark.parametrize("wrap", [list, transformers.LogitsProcessorList, fl.LogitsProcessorList])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_processors_of_the_user_keep_their_place(llama, options, wrap):
    def made(module):
        return [module.RepetitionPenaltyLogitsProcessor(1.9), Halve(), module.TopKLogitsWarper(9), Halve()]

    options = {**options, **FLAGS["warpers"], "no_repeat_ngram_size": 2}
    expected = generate(llama, logits_processor=transformers.LogitsProcessorList(made(reference)), **options)
    with fl.accelerate(llama), counted() as calls:
        for module in (fl, reference):
            assert torch.equal(generate(llama, logits_processor=wrap(made(module)), **options), expected)
    names = [type(processor).__name__ for processor in calls.lists[0]]
    assert names[:5] == [
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "Halve",
        "TopKLogitsWarper",
        "Halve",
    ]


@pytest.mark.parametrize("wrap", [list, transformers.LogitsProcessorList, fl.LogitsProcessorList])
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_acts_twice(llama, quiet, wrap, count):
    """Beside the same flag a processor counts instead of it, in its place, as one of transformers' own does."""

    def made(module):
        return [Halve(), *(module.RepetitionPenaltyLogitsProcessor(0.7 + i / 2) for i in range(count))]

    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = generate(llama, logits_processor=transformers.LogitsProcessorList(made(reference)), **options)
    with fl.accelerate(llama), counted() as calls:
        assert torch.equal(generate(llama, logits_processor=wrap(made(fl)), **options), expected)
    assert sum("Repetition" in type(processor).__name__ for processor in calls.lists[0]) == count


def test_one_object_twice_in_a_list_acts_once(llama):
    ours, theirs = fl.RepetitionPenaltyLogitsProcessor(1.3), reference.RepetitionPenaltyLogitsProcessor(1.3)
    expected = generate(llama, logits_processor=[theirs, theirs])
    with fl.accelerate(llama), counted() as calls:
        assert torch.equal(generate(llama, logits_processor=[ours, ours]), expected)
    assert len(calls.lists[0]) == 1


def test_the_warning_of_precedence_is_kept(llama, monkeypatch):
    said = []
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", lambda text, *rest: said.append(text))
    for accelerated, module in ((False, reference), (True, fl)):
        if accelerated:
            fl.accelerate(llama)
        generate(llama, logits_processor=[module.RepetitionPenaltyLogitsProcessor(1.3)], repetition_penalty=1.5)
    fl.restore(llama)
    said = [text for text in said if "RepetitionPenalty" in text]
    assert len(said) == 2
    assert said[0] == said[1]


def test_what_is_read_and_set_from_outside(llama):
    """The list holds transformers' own types, and what is set on a processor counts from the next step on."""
    with fl.accelerate(llama), counted() as calls:
        generate(llama, do_sample=True, **FLAGS["all"], min_length=3)
    run = calls.lists[0]
    assert isinstance(run, transformers.LogitsProcessorList)
    found = {type(processor): processor for processor in run}
    assert found[reference.SuppressTokensLogitsProcessor].suppress_tokens.tolist() == [50, 51]
    assert found[reference.TopKLogitsWarper].top_k == 30
    assert found[reference.TopPLogitsWarper].filter_value == -float("inf")
    assert any(isinstance(processor, reference.MinLengthLogitsProcessor) for processor in run)
    ids, scores = PROMPT, torch.randn(2, VOCAB_SIZE)
    before = run(ids, scores)
    found[reference.TemperatureLogitsWarper].temperature = 0.4
    run.insert(0, Halve())
    expected = scores
    for processor in list(run):
        expected = processor(ids, expected)
    assert torch.equal(run(ids, scores), expected)
    assert not torch.equal(before, expected)


def test_a_run_is_few_launches(llama):
    with fl.accelerate(llama), counted() as calls:
        generate(llama, do_sample=True, **FLAGS["all"], logits_processor=[fl.SuppressFirstTokens([5])])
    plan = calls.lists[0].plan
    assert sum(len(step.members) for step in plan.inner_parts) == 11
    assert [type(step) for step in plan.inner_parts] == [Pointwise, Truncation]


NO_PROCESSORS = {
    "their list": lambda: transformers.LogitsProcessorList([reference.TopKLogitsWarper(3)]),
    "our list": lambda: fl.LogitsProcessorList([fl.TopKLogitsWarper(3)]),
    "empty list of ours": lambda: fl.LogitsProcessorList([]),
    "a list": lambda: [reference.TopKLogitsWarper(3)],
    "None": lambda: None,
    "a class": lambda: reference.TopKLogitsWarper,
}


@pytest.mark.parametrize("wrap", [list, transformers.LogitsProcessorList])
@pytest.mark.parametrize("name", NO_PROCESSORS)
def test_what_is_no_processor(llama, recwarn, name, wrap):
    """The error that transformers has: ValueError for a list inside a list."""
    given = [reference.RepetitionPenaltyLogitsProcessor(1.3), NO_PROCESSORS[name]()]
    with pytest.raises((ValueError, AttributeError)) as plain:
        generate(llama, logits_processor=wrap(given))
    if "list" in name and name != "a list":
        assert plain.type is ValueError
    with fl.accelerate(llama), pytest.raises(plain.type):
        generate(llama, logits_processor=wrap(given))
    assert not [each for each in recwarn if "assembles its processors" in str(each.message)]


def at_length(length, change):
    """Something that happens between two steps."""

    class Changes(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == length:
                change()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return transformers.StoppingCriteriaList([Changes()])


SET = {
    "their temperature": (lambda: reference.TemperatureLogitsWarper(5.0), "temperature", 0.1),
    "our temperature": (lambda: fl.TemperatureLogitsWarper(5.0), "temperature", 0.1),
    "top_k": (lambda: fl.TopKLogitsWarper(60), "top_k", 1),
    "penalty": (lambda: fl.PresencePenaltyLogitsProcessor(0.0), "penalty", 50.0),
    "window": (lambda: fl.SuppressFirstTokens(BANNED, window=1), "window", 9),
}


@pytest.mark.parametrize("name", SET)
def test_what_is_set_between_two_steps(llama, name):
    """It counts from the next step on, also where the processor stands in its run."""
    make, attribute, value = SET[name]
    of_run = name in ("window", "penalty")

    def said(accelerated, changed):
        processor = make()
        given = processor if accelerated or not of_run else processor.for_run(L)
        change = at_length(L + 3, (lambda: setattr(processor, attribute, value)) if changed else lambda: None)
        options = {"do_sample": not of_run, "logits_processor": [given], "stopping_criteria": change}
        with fl.accelerate(llama) if accelerated else contextlib.nullcontext():
            return generate(llama, **options)[:, L:]

    unchanged, changed = said(True, False), said(True, True)
    assert torch.equal(unchanged, said(False, False))
    assert torch.equal(unchanged[:, :3], changed[:, :3])
    assert not torch.equal(unchanged, changed)
    if not of_run:  # a plain list is given a plan of the run, made once
        assert torch.equal(changed, said(False, True))


# -- Switching ----------------------------------------------------------------------------------------------------


def test_twice_is_once_and_restoring_is_harmless(llama):
    fl.restore(llama)
    fl.restore()
    outer = fl.accelerate(llama)
    with fl.accelerate(llama) as inner:
        assert "accelerated before" in repr(inner)
    with counted() as calls:
        generate(llama)
        assert calls, "the inner block ended what it had not begun"
        fl.restore(llama)
        fl.restore(llama)
        before = len(calls.calls)
        generate(llama)
        assert len(calls.calls) == before
    assert repr(outer) == "<Acceleration of LlamaForCausalLM>"


def test_only_that_model(llama):
    other = tiny_llama(seed=1)
    with fl.accelerate(llama), counted() as calls:
        generate(other, **FLAGS["all"])
        assert not calls
        with fl.accelerate(other):
            generate(other, **FLAGS["all"])
        assert calls


def test_the_whole_process(llama, t5):
    expected = [generate(llama, **FLAGS["all"]), generate(t5, {"input_ids": PROMPT}, **FLAGS["all"])]
    with fl.accelerate() as everything, counted() as calls:
        assert "every model" in repr(everything)
        made_later = tiny_llama()
        found = [generate(made_later, **FLAGS["all"]), generate(t5, {"input_ids": PROMPT}, **FLAGS["all"])]
        assert len(calls.lists) == 2
        with fl.accelerate(made_later):
            pass
        generate(made_later)
        assert len(calls.lists) == 3
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with counted() as calls:
        generate(llama)
        assert not calls


def test_a_model_is_not_kept_alive():
    model = tiny_llama()
    fl.accelerate(model)
    generate(model, max_new_tokens=2)
    reference_to_it = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference_to_it() is None
    finally:
        gc.enable()
    fl.restore()


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), "llama", object()], ids=lambda wrong: type(wrong).__name__)
def test_not_a_generation_model(wrong):
    for switch in (fl.accelerate, fl.restore):
        with pytest.raises(TypeError, match=f"model must be.* can generate, got {type(wrong).__name__}: give"):
            switch(wrong)


def test_a_compiled_model(llama):
    compiled = torch.compile(llama, backend="eager")
    with fl.accelerate(compiled), counted() as calls:
        generate(compiled, max_new_tokens=2)
        assert calls


# -- Models that assemble or call the list in their own way -------------------------------------------------------


def both(model, inputs, **options):
    """What a model says plainly, and accelerated alone and with the process; the calls of the latter."""
    said = []
    for acceleration_of in (None, model, ...):
        torch.manual_seed(0)
        if acceleration_of is None:
            said.append(model.generate(**inputs, **options))
            continue
        with fl.accelerate(None if acceleration_of is ... else model), counted() as calls:
            said.append(model.generate(**inputs, **options))
    return said, calls


def check_both(model, inputs, **options):
    said, calls = both(model, inputs, **options)
    assert calls
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])
    return calls


def whisper():
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    config = transformers.WhisperConfig(
        vocab_size=120,
        d_model=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        decoder_start_token_id=3,
        init_std=0.5,
        **sizes,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    said = model.generation_config
    said.bos_token_id, said.eos_token_id, said.pad_token_id, said.decoder_start_token_id = 1, 2, 2, 3
    said.no_timestamps_token_id, said.is_multilingual, said.max_initial_timestamp_index = 90, False, 10
    # Without the first timestamps, at which a model of random weights would stay for ever.
    said.suppress_tokens, said.begin_suppress_tokens = [5, 6, 7, *range(91, 100)], [8, 9]
    return model


WHISPER = {
    "text": {},
    "timestamps": {"return_timestamps": True},
    "sampled": {"return_timestamps": True, "do_sample": True, "temperature": 0.9},
    "with fallbacks": {
        "return_timestamps": True,
        "logprob_threshold": -1.0,
        "compression_ratio_threshold": 1.35,
        "no_speech_threshold": 0.6,
        "temperature": (0.0, 0.5),
        "condition_on_prev_tokens": False,
    },
}


@pytest.mark.parametrize("name", WHISPER)
def test_whisper(name):
    model = whisper()
    long = name == "with fallbacks"
    inputs = {"input_features": torch.randn(1 if long else 2, 8, 150 if long else 60)}
    if long:
        inputs["attention_mask"] = torch.ones(1, 150, dtype=torch.int64)
    calls = check_both(model, inputs, max_new_tokens=10, **WHISPER[name])
    names = {type(processor).__name__ for processor in calls.lists[0]}
    assert {"SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor"} <= names
    assert ("WhisperTimeStampLogitsProcessor" in names) is (name != "text")
    assert ("WhisperNoSpeechDetection" in names) is long


def dia():
    from transformers.models.dia.configuration_dia import DiaDecoderConfig, DiaEncoderConfig

    shared = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    shared |= {"num_hidden_layers": 1, "intermediate_size": 32, "initializer_range": 0.4}
    special = {"pad_token_id": 65, "eos_token_id": 64, "bos_token_id": 66}
    encoder = DiaEncoderConfig(vocab_size=64, max_position_embeddings=32, **shared)
    cross = {"cross_num_attention_heads": 2, "cross_head_dim": 16, "cross_num_key_value_heads": 2}
    decoder = DiaDecoderConfig(
        vocab_size=70,
        max_position_embeddings=64,
        num_channels=3,
        cross_hidden_size=32,
        **cross,
        **shared,
        **({} if IS_4 else special),
    )
    config = transformers.DiaConfig(encoder_config=encoder, decoder_config=decoder, delay_pattern=[0, 2, 3], **special)
    model = transformers.DiaForConditionalGeneration(config).eval()
    for name, token in special.items():
        setattr(model.generation_config, name, token)
    model.generation_config.decoder_start_token_id = 66
    return model


@pytest.mark.skipif(IS_4, reason="transformers 4 builds another Dia")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "guidance_scale": 3.0},
        {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_dia(options):
    """It looks for transformers' types in the list, sets an attribute, and puts others before and behind."""
    torch.manual_seed(0)
    check_both(dia(), {"input_ids": torch.randint(3, 60, (1, 8))}, max_new_tokens=8, **options)


@pytest.mark.skipif(not hasattr(transformers, "HiggsAudioV2ForConditionalGeneration"), reason="new in transformers 5")
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 10, "temperature": 0.8, "top_p": 0.9}], ids=str)
def test_higgs(options):
    """It copies the list behind one of its own that changes the shape of the scores."""
    torch.manual_seed(0)
    config = transformers.HiggsAudioV2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_codebooks=2,
        codebook_size=34,
        audio_token_id=90,
        audio_bos_token_id=91,
        audio_delay_token_id=92,
        audio_stream_bos_id=32,
        audio_stream_eos_id=33,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    model = transformers.HiggsAudioV2ForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 5, 6, 7, 91]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check_both(model, inputs, max_new_tokens=6, **options)
    with fl.accelerate(model), pytest.raises(ValueError, match="not compatible"):
        model.generate(**inputs, max_new_tokens=2, repetition_penalty=1.3)


@pytest.mark.skipif(IS_4, reason="transformers 4 builds another Janus")
@pytest.mark.parametrize("options", [{"generation_mode": "image", "guidance_scale": 2}, {"generation_mode": "text"}])
def test_janus(options):
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "projection_dim": 32}
    vision = JanusVisionConfig(
        hidden_size=32, num_attention_heads=2, image_size=8, patch_size=4, mlp_ratio=1, num_image_tokens=4, **sizes
    )
    images = JanusVQVAEConfig(
        embed_dim=16,
        num_embeddings=40,
        latent_channels=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_patches=2,
        image_token_embed_dim=32,
        **sizes,
    )
    config = transformers.JanusConfig(
        text_config=tiny_llama().config, vision_config=vision, vq_config=images, image_token_id=90
    )
    model = transformers.JanusForConditionalGeneration(config).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = 0, 1
    inputs = {"input_ids": PROMPT[:1], "attention_mask": torch.ones_like(PROMPT[:1])}
    options = {"do_sample": True, "top_k": 10, "temperature": 0.9, "max_new_tokens": 4, **options}
    try:
        model.generate(**inputs, **options)
    except TypeError as error:
        pytest.skip(f"this transformers can't, plain too: {error}")
    check_both(model, inputs, **options)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_rag(num_beams):
    """It has a generate of its own, which assembles the list and calls the decoding loops."""
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
    question = transformers.DPRConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    generator = transformers.BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        init_std=0.5,
        max_position_embeddings=128,
        **sizes,
        **special,
    )
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        question, generator, n_docs=2, vocab_size=97, is_encoder_decoder=True, **special
    )
    context = torch.randint(3, 97, (2, 9))
    inputs = {"context_input_ids": context, "context_attention_mask": torch.ones_like(context)}
    inputs |= {"doc_scores": torch.randn(1, 2), "n_docs": 2}
    options = {"num_beams": num_beams, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    check_both(transformers.RagTokenForGeneration(config).eval(), inputs, max_new_tokens=8, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20, "temperature": 0.8}], ids=str)
def test_musicgen(options):
    """It adds guidance of its own and expects what it said to come back in codebooks."""
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    torch.manual_seed(0)
    decoder = MusicgenDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        ffn_dim=32,
        num_attention_heads=2,
        num_codebooks=2,
        bos_token_id=64,
        pad_token_id=64,
        max_position_embeddings=64,
        initializer_factor=0.5,
    )
    text = transformers.T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    audio = transformers.EncodecConfig(
        num_filters=4,
        hidden_size=16,
        codebook_size=64,
        codebook_dim=16,
        upsampling_ratios=[2, 2],
        num_lstm_layers=1,
        target_bandwidths=[72.0],
    )
    config = transformers.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict()
    )
    model = transformers.MusicgenForConditionalGeneration(config).eval()
    said = model.generation_config
    said.decoder_start_token_id = said.bos_token_id = said.pad_token_id = 64
    said.guidance_scale = 3.0
    inputs = {"input_ids": PROMPT[:1], "attention_mask": torch.ones_like(PROMPT[:1])}
    check_both(model, inputs, max_new_tokens=6, **{"do_sample": False, **options})


def test_a_model_with_another_kind_of_list_is_left_alone():
    class Own(transformers.LlamaForCausalLM):
        def _get_logits_processor(self, *arguments, **options):
            processors = super()._get_logits_processor(*arguments, **options)
            return lambda ids, scores: processors(ids, scores) + 0.0

    model = Own(tiny_llama().config).eval()
    expected = generate(model, repetition_penalty=1.3)
    with fl.accelerate(model), pytest.warns(UserWarning, match=r"Own assembles its processors in a function") as seen:
        assert torch.equal(generate(model, repetition_penalty=1.3), expected)
    assert len([each for each in seen if "fastlogits" in str(each.message)]) == 1


def test_a_model_that_wraps_the_list_of_its_base_class():
    class Own(transformers.LlamaForCausalLM):
        def _get_logits_processor(self, *arguments, **options):
            processors = super()._get_logits_processor(*arguments, **options)
            assert type(processors) is transformers.LogitsProcessorList
            return transformers.LogitsProcessorList([Halve(), *processors])

    model = Own(tiny_llama().config).eval()
    check_both(model, {"input_ids": PROMPT}, max_new_tokens=6, **FLAGS["history"])


# -- Compilers ----------------------------------------------------------------------------------------------------


def test_forward_and_processors_are_one_graph(llama):
    made = [
        reference.RepetitionPenaltyLogitsProcessor(1.3),
        reference.NoRepeatNGramLogitsProcessor(2),
        fl.SuppressFirstTokens([4]),
        reference.TemperatureLogitsWarper(0.7),
        reference.TopKLogitsWarper(20),
        reference.TopPLogitsWarper(0.9),
    ]
    run = acceleration.RunList(made, L)

    def step(ids):
        return run(ids, llama(ids).logits[:, -1].float()) * 2

    with torch.no_grad():
        expected = step(PROMPT)
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(PROMPT), expected)
