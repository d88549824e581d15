"""First-step processors through ``model.generate`` on an untouched transformers, wherever a run can start."""

import threading

import pytest
import torch
import transformers
from transformers import DynamicCache, SuppressTokensLogitsProcessor
from transformers.generation.logits_process import LogitsProcessor

import fastlogits as fl
from fastlogits.plan import masks as mask_launch
from tests.models import VOCAB_SIZE, tiny_llama

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61], [1, 5, 90, 33, 12, 64, 28]])
# Half the vocabulary: greedy decoding wants some of it at almost every step, so a ban at a wrong step shows.
BANNED = list(range(3, VOCAB_SIZE, 2))


class KnownStart(LogitsProcessor):
    """The reference: told from outside where the run starts, one row and one token at a time."""

    def __init__(self, banned, prompt_length, window=1):
        self.banned, self.prompt_length, self.window = banned, prompt_length, window

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] - self.prompt_length < self.window:
            for row in range(scores.shape[0]):
                for token in self.banned:
                    scores[row, token] = float("-inf")
        return scores


def ours(window=1, banned=BANNED):
    return fl.LogitsProcessorList([fl.SuppressFirstTokens(banned, window=window)])


def generate(model, processors, inputs=None, *, seed=0, **options):
    torch.manual_seed(seed)
    inputs = {"input_ids": PROMPT} if inputs is None else inputs
    if "input_ids" in inputs and "attention_mask" not in inputs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(**inputs, logits_processor=processors, **options)


def check(model, prompt_length, inputs=None, window=1, **options):
    """Token-identical to the reference; and the ban shows, since it holds what the model would have said first."""
    plain = generate(model, [], inputs, **options)
    banned = sorted({*BANNED, *plain[:, prompt_length].tolist()})
    expected = generate(model, [KnownStart(banned, prompt_length, window)], inputs, **options)
    found = generate(model, ours(window, banned), inputs, **options)
    assert torch.equal(found, expected)
    assert not set(found[:, prompt_length].tolist()) & set(banned)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "min_new_tokens": 4},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_modes(llama, options, window):
    check(llama, PROMPT.shape[1], window=window, **options)


def test_left_padding(llama):
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PROMPT], 1)
    mask = (ids != 0).long()
    mask[1, :3] = 1
    ids[1, :3] = torch.tensor([44, 45, 46])
    check(llama, ids.shape[1], {"input_ids": ids, "attention_mask": mask}, repetition_penalty=1.2)


@pytest.mark.parametrize("window", [1, 2])
def test_assisted_decoding(llama, window):
    draft = tiny_llama(seed=1)
    inputs = {"input_ids": PROMPT[:1]}
    plain = generate(llama, ours(window), inputs, max_new_tokens=12)
    assisted = generate(llama, ours(window), inputs, max_new_tokens=12, assistant_model=draft)
    assert torch.equal(assisted, plain)
    check(llama, PROMPT.shape[1], inputs, window, max_new_tokens=12, assistant_model=draft)


@pytest.mark.parametrize("window", [1, 2])
def test_prompt_lookup(llama, window):
    inputs = {"input_ids": PROMPT[:1].repeat(1, 3)}
    plain = generate(llama, ours(window), inputs, max_new_tokens=12)
    assert torch.equal(generate(llama, ours(window), inputs, max_new_tokens=12, prompt_lookup_num_tokens=3), plain)


def test_encoder_decoder(t5):
    check(t5, 1, {"input_ids": PROMPT}, window=2)
    check(t5, 1, {"input_ids": PROMPT}, num_beams=2)
    decoder = torch.tensor([[0, 9, 11], [0, 30, 31]])
    check(t5, 3, {"input_ids": PROMPT, "decoder_input_ids": decoder})


def test_inputs_embeds(llama):
    embeds = llama.get_input_embeddings()(PROMPT).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(PROMPT)}
    check(llama, 0, inputs, window=2)


def test_compiled_forward_with_a_static_cache():
    model = tiny_llama()
    model.forward = torch.compile(model.forward, backend="eager")
    check(model, PROMPT.shape[1], cache_implementation="static", window=2, disable_compile=True)


def test_chat_whose_prompt_is_the_whole_history(llama):
    processors, history = ours(), PROMPT
    for _ in range(3):
        expected = generate(llama, [KnownStart(BANNED, history.shape[1])], {"input_ids": history})
        found = generate(llama, processors, {"input_ids": history})
        assert torch.equal(found, expected)
        assert not set(found[:, history.shape[1]].tolist()) & set(BANNED)
        history = torch.cat([found, PROMPT[:, 1:4]], 1)


def test_second_turn_with_a_reused_cache(llama):
    processors, history, cache = ours(), PROMPT, DynamicCache(config=llama.config)
    for _ in range(2):
        found = generate(llama, processors, {"input_ids": history, "past_key_values": cache})
        assert torch.equal(found, generate(llama, [KnownStart(BANNED, history.shape[1])], {"input_ids": history}))
        history = torch.cat([found, PROMPT[:, 1:4]], 1)


def test_second_turn_with_only_the_new_ids(llama):
    new = PROMPT[:, 2:6]

    def turns(processors):
        cache = DynamicCache(config=llama.config)
        first = generate(llama, processors, {"input_ids": PROMPT, "past_key_values": cache})
        mask = torch.ones(2, cache.get_seq_length() + new.shape[1], dtype=torch.int64)
        return first, generate(llama, processors, {"input_ids": new, "past_key_values": cache, "attention_mask": mask})

    try:
        turns([])
    except (IndexError, RuntimeError, ValueError) as error:
        pytest.skip(f"transformers {transformers.__version__} doesn't take this itself: {error}")
    first, second = turns(ours())
    assert not set(first[:, PROMPT.shape[1]].tolist()) & set(BANNED)
    assert not set(second[:, new.shape[1]].tolist()) & set(BANNED)
    assert set(second[:, new.shape[1] + 1 :].flatten().tolist()) & set(BANNED)


def test_each_prompt_one_token_longer_and_one_new_token_at_a_time(llama):
    processors, ids = ours(), PROMPT
    for _ in range(4):
        found = generate(llama, processors, {"input_ids": ids}, max_new_tokens=1)
        assert found.shape[1] == ids.shape[1] + 1
        # Each call is a run of its own, so each of its first tokens is banned.
        assert not set(found[:, -1].tolist()) & set(BANNED)
        ids = found


def test_masks_are_built_once_for_all_runs(llama, monkeypatch):
    built, tables = [], mask_launch._MaskTables
    monkeypatch.setattr(mask_launch, "_MaskTables", lambda *arguments: built.append(1) or tables(*arguments))
    processors = ours()
    for _ in range(3):
        generate(llama, processors, max_new_tokens=2)
    assert len(built) == 1


def test_one_object_in_two_lists_and_two_batch_sizes(llama):
    processor = fl.SuppressFirstTokens(BANNED)
    first, second = fl.LogitsProcessorList([processor]), fl.LogitsProcessorList([processor])
    for processors, rows in ((first, 2), (second, 1), (first, 1), (second, 2)):
        inputs = {"input_ids": PROMPT[:rows]}
        expected = generate(llama, [KnownStart(BANNED, PROMPT.shape[1])], inputs)
        assert torch.equal(generate(llama, processors, inputs), expected)


def test_one_object_in_two_threads(llama):
    processors, results = ours(), {}
    barrier = threading.Barrier(2, timeout=60)

    class Meet(LogitsProcessor):
        """Makes the two runs take every step side by side."""

        def __call__(self, input_ids, scores):
            barrier.wait()
            return scores

    prompts = {"short": PROMPT[:, :3], "long": PROMPT}
    lists = {name: fl.LogitsProcessorList([Meet(), *processors]) for name in prompts}

    def run(name):
        results[name] = llama.generate(
            input_ids=prompts[name],
            attention_mask=torch.ones_like(prompts[name]),
            logits_processor=lists[name],
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )

    threads = [threading.Thread(target=run, args=(name,)) for name in prompts]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for name, prompt in prompts.items():
        known = [KnownStart(BANNED, prompt.shape[1])]
        assert torch.equal(
            results[name], generate(llama, known, {"input_ids": prompt}, max_new_tokens=6, min_new_tokens=6)
        )


def test_a_run_inside_a_run(llama):
    """A processor that generates with the very list it is in, in the same thread."""
    processors = ours()

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] < PROMPT.shape[1] + 3:
                longer = torch.cat([input_ids, PROMPT], 1)
                inner = generate(llama, ours_only, {"input_ids": longer}, max_new_tokens=2)
                assert not set(inner[:, longer.shape[1]].tolist()) & set(BANNED)
            return scores

    ours_only = fl.LogitsProcessorList(list(processors))
    found = generate(llama, fl.LogitsProcessorList([Nested(), *processors]))
    assert torch.equal(found, generate(llama, [KnownStart(BANNED, PROMPT.shape[1])]))


def test_blank_tokens_through_generate(llama):
    """Blank is what the model answers first, so the ban must outlive the first step, for each beam by itself."""
    first = generate(llama, [])[:, PROMPT.shape[1]].tolist()
    banned = [token for token in range(3, VOCAB_SIZE) if token not in first and token % 3]
    processor = fl.SuppressFirstTokens(banned, blank=first)
    for options in ({}, {"num_beams": 3}):
        found = generate(llama, fl.LogitsProcessorList([processor]), **options)
        for row in found[:, PROMPT.shape[1] :].tolist():
            visible = next(token for token in row if token not in first)
            assert visible not in banned
        assert not torch.equal(found, generate(llama, [], **options))


def test_unknown_processors_run_in_their_place(llama):
    calls = []

    class Unknown(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append((input_ids.shape[1], bool((scores[:, BANNED[0]] == float("-inf")).all())))
            return scores

    mine = fl.SuppressFirstTokens(BANNED)
    found = generate(llama, fl.LogitsProcessorList([Unknown(), mine, Unknown()]), max_new_tokens=2)
    length = PROMPT.shape[1]
    assert calls == [(length, False), (length, True), (length + 1, False), (length + 1, False)]
    assert torch.equal(found, generate(llama, [KnownStart(BANNED, length)], max_new_tokens=2))


def test_a_class_that_generate_builds_too_is_applied_once(llama):
    """``generate`` prefers a custom processor to its own of the same type; our list must not confuse it."""
    suppress = SuppressTokensLogitsProcessor([7, 8, 9])
    custom = fl.LogitsProcessorList([suppress, fl.SuppressFirstTokens(BANNED)])
    found = generate(llama, custom, suppress_tokens=[10])
    known = [suppress, KnownStart(BANNED, PROMPT.shape[1])]
    assert torch.equal(found, generate(llama, known, suppress_tokens=[10]))


def test_kept_scores_and_logits_stay_as_they_were(llama):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = generate(llama, [], **options, max_new_tokens=1)
    found = generate(llama, ours(), **options)
    assert torch.equal(found.logits[0], plain.logits[0])
    assert found.logits[0].isfinite().all()
    assert (found.scores[0][:, BANNED] == float("-inf")).all()
    assert all(scores.isfinite().all() for scores in found.scores[1:])


@pytest.mark.parametrize("wrap", [list, transformers.LogitsProcessorList])
def test_a_bare_list_raises(llama, wrap):
    with pytest.raises(ValueError, match="can't know which step this is"):
        generate(llama, wrap([fl.SuppressFirstTokens(BANNED)]))
    # A list of ours that was copied into another no longer marks the start, and must not remember an old one.
    processors = ours()
    generate(llama, processors)
    with pytest.raises(ValueError, match="can't know which step this is"):
        generate(llama, wrap(processors))


def test_a_bare_list_with_a_known_start(llama):
    run = fl.SuppressFirstTokens(BANNED).for_run(prompt_length=PROMPT.shape[1])
    assert torch.equal(generate(llama, [run]), generate(llama, [KnownStart(BANNED, PROMPT.shape[1])]))


def test_the_articles_code_with_one_changed_import(llama):
    from fastlogits import LogitsProcessorList, SuppressSpecificBOSTokenLogitsProcessor

    logits_processor = LogitsProcessorList([SuppressSpecificBOSTokenLogitsProcessor(BANNED)])
    assert torch.equal(generate(llama, logits_processor), generate(llama, [KnownStart(BANNED, PROMPT.shape[1])]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_only_tokens_from_the_prompt(llama, options):
    processors = fl.LogitsProcessorList([fl.OnlyTokensFrom("prompt", [50], eos_token_id=2, exclude=[1, 0])])
    found = generate(llama, processors, **options)
    rows = found.shape[0] // PROMPT.shape[0]
    for i, row in enumerate(found[:, PROMPT.shape[1] :].tolist()):
        allowed = (set(PROMPT[i // rows].tolist()) | {50, 2}) - {1, 0}
        assert set(row) - {0} <= allowed
    longer = torch.cat([PROMPT, PROMPT + 1], 1)
    again = generate(llama, processors, {"input_ids": longer[:1]}, **options)
    assert set(again[0, longer.shape[1] :].tolist()) <= set(longer[0].tolist()) | {50, 2, 0}


def test_only_tokens_from_a_source(llama):
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        source = fl.OnlyTokensFrom([[40, 41, 42], [60, 61]], eos_token_id=2, copies=2 if options else 1)
        processors = fl.LogitsProcessorList([source])
        found = generate(llama, processors, **options)[:, PROMPT.shape[1] :]
        half = found.shape[0] // 2
        assert set(found[:half].flatten().tolist()) <= {40, 41, 42, 2, 0}
        assert set(found[half:].flatten().tolist()) <= {60, 61, 2, 0}
