"""NVIDIA's zoo: each job as a loop over the steps of one row, which gets what it needs to know from the step before."""

import copy
import itertools
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastlogits import LogitsProcessorList
from fastlogits.processors import nvidia_zoo as zoo
from tests.models import tiny_llama
from tests.processors.toy import (
    DEVICE,
    DTYPES,
    EOS,
    INF,
    LINE,
    ONE,
    PAD,
    PHRASE,
    STOP,
    TOKENIZER,
    TWO,
    A,
    B,
    C,
    V,
    add,
    as_on_a_device,
    captured,
    only,
    same,
    scores_of,
)  # fmt: skip


def gen_length(factor, p, complete=False, token=EOS):
    def rule(state, prompt, generated, row):
        row, last = row.clone(), (prompt + generated)[-1:]
        if token not in generated and (not complete or last in ([STOP], [LINE])):
            add(row, token, factor * len(generated) ** p / 10**p)
        return row

    return rule


def cite(factor, eos, conditional):
    def rule(state, prompt, generated, row):
        row = row.clone()
        for token in {*prompt, *([EOS] if eos else [])}:
            add(row, token, factor)
        if generated and conditional:
            for token in {b for a, b in itertools.pairwise(prompt) if a == generated[-1]}:
                add(row, token, conditional)
        return row

    return rule


def choose(factor, choices=(ONE, TWO)):
    def rule(state, prompt, generated, row):
        words = []
        for i in range(len(prompt) - 3):
            starts = len(words) < len(choices) and prompt[i : i + 3] == [LINE, choices[len(words)], STOP]
            words += [prompt[i + 3]] if starts else []
        processed = torch.full_like(row, -INF)
        for i, choice in enumerate(choices):
            processed[choice] = row[choice]
            if factor and i < len(words):
                add(processed, choice, factor * float(row[words[i]]))
        return processed

    return rule


def force_last(state, prompt, generated, row):
    said = state.get("said", 0)
    if (said == 0 and row.argmax() == EOS) or 0 < said < len(PHRASE):
        state["said"] = said + 1
        return only(row, PHRASE[said])
    return row


def trigger(count, after):
    def rule(state, prompt, generated, row):
        said, processed = state.get("said"), row
        if state.get("times", 0) >= count:
            return row
        if said is None and row.argmax() == C:
            said = 0
            if not after:
                processed, said = only(row, PHRASE[0]), 1
        elif said is not None:
            processed, said = only(row, PHRASE[said]), said + 1
        if said == len(PHRASE):
            said, state["times"] = None, state.get("times", 0) + 1
        state["said"] = said
        return processed

    return rule


def prevent(minp, tolerate):
    def rule(state, prompt, generated, row):
        said = state.get("said", 0)
        state["unsure"] = state.get("unsure", 0) + bool(row.float().softmax(-1).max() < minp)
        if (said == 0 and state["unsure"] > tolerate) or 0 < said < len(PHRASE):
            state["said"] = said + 1
            return only(row, PHRASE[said])
        if said == len(PHRASE):
            state.clear()
        return row

    return rule


TEXT = "\n a b"
JOBS = {
    "length": (lambda: zoo.GenLengthLogitsProcessor(TOKENIZER, 3.3), gen_length(3.3, 2)),
    "sentences": (
        lambda: zoo.GenLengthLogitsProcessor(TOKENIZER, -1.5, 1.5, True, "c"),
        gen_length(-1.5, 1.5, True, C),
    ),
    "cite": (lambda: zoo.CiteFromPromptLogitsProcessor(TOKENIZER), cite(1.0, True, 0)),
    "cite less": (lambda: zoo.CiteFromPromptLogitsProcessor(TOKENIZER, -2.1, False, 3.7), cite(-2.1, False, 3.7)),
    "cite next": (lambda: zoo.CiteFromPromptLogitsProcessor(TOKENIZER, 0.0, True, -3.5), cite(0.0, True, -3.5)),
    "choose": (lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, ["1", "2"]), choose(0)),
    "choose words": (lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, ["1", "2"], ".", 0.5), choose(0.5)),
    "last": (lambda: zoo.ForceLastPhraseLogitsProcessor(TEXT, TOKENIZER, 4), force_last),
    "trigger": (lambda: zoo.TriggerPhraseLogitsProcessor(TOKENIZER, 4, TEXT, "c", None, 2), trigger(2, False)),
    "after": (
        lambda: zoo.TriggerPhraseLogitsProcessor(TOKENIZER, phrase=TEXT, trigger_token_phrase="c", trigger_after=True),
        trigger(1, True),
    ),
    "prevent": (lambda: zoo.PreventHallucinationLogitsProcessor(TOKENIZER, 4, 0.5, 1, TEXT), prevent(0.5, 1)),
}
each_job = pytest.mark.parametrize("job", list(JOBS))


def replayed(rule, text, prompt_length, dtype=torch.float32):
    """What the loop makes of the scores after a text, having seen all of the run."""
    state, prompt = {}, text[:prompt_length]
    for length in range(prompt_length, len(text)):
        rule(state, prompt, text[prompt_length:length], scores_of(text[:length], dtype))
    return rule(state, prompt, text[prompt_length:], scores_of(text, dtype))


def called(run, texts, dtype=torch.float32, ids=torch.int64):
    """The scores after texts of one length, processed; the input must stay as it is."""
    input_ids = torch.tensor(texts, dtype=ids, device=DEVICE)
    scores = torch.stack([scores_of(text, dtype) for text in texts]).to(DEVICE)
    before = scores.clone()
    processed = run(input_ids, scores)
    assert torch.equal(scores, before)
    return processed


def next_token(draw, row):
    allowed = row.float().isfinite().nonzero().flatten().tolist()
    return int(row.argmax()) if draw(st.integers(0, 2)) else draw(st.sampled_from(allowed))


PROMPTS = st.lists(st.sampled_from([LINE, ONE, TWO, STOP, A, C, 11]), min_size=6, max_size=6)
LISTED = [[LINE, ONE, STOP, A, LINE, TWO, STOP, 12], [LINE, TWO, STOP, A, LINE, ONE, STOP, 12]]


@each_job
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_zoo_whatever_becomes_of_the_rows(job, data):
    """Rows change places, are repeated and dropped; texts are cut back and go on otherwise."""
    draw = data.draw
    make, rule = JOBS[job]
    dtype, ids = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([torch.int32, torch.int64]))
    texts = draw(st.sampled_from([LISTED, None])) or draw(st.lists(PROMPTS, min_size=1, max_size=3))
    texts = [list(text) for text in texts]
    prompt_length = len(texts[0])
    run = make().for_run(prompt_length)
    for _ in range(draw(st.integers(4, 14))):
        processed = called(run, texts, dtype, ids)
        for text, row in zip(texts, processed, strict=True):
            expected = replayed(rule, text, prompt_length, dtype)
            assert same(row, expected), (text, row, expected)
        texts = [[*text, next_token(draw, row)] for text, row in zip(texts, processed, strict=True)]
        match draw(st.sampled_from(["go on"] * 4 + ["beams", "fewer", "back"])):
            case "beams":
                texts = [list(draw(st.sampled_from(texts))) for _ in range(len(texts) + 1)]
            case "fewer":
                texts = texts[-1:]
            case "back":
                length = max(prompt_length, len(texts[0]) - draw(st.integers(1, 3)))
                texts = [text[:length] for text in texts]


@each_job
def test_zoo_a_row_alone_and_rows_at_steps_of_their_own(job):
    """A serving stack's buffer: prompts of different lengths, positions on the device, junk after each text."""
    make, rule = JOBS[job]
    prompts = [[*LISTED[0], A, LINE], LISTED[1], [C, A, B, LINE, C]]
    texts = [list(prompt) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=DEVICE)
    buffer = torch.full((3, 40), EOS, device=DEVICE)
    position = lengths - 1
    run = make().for_run(lengths, position)
    alone = [make().for_run(len(prompt)) for prompt in prompts]
    for _ in range(20):
        for row, text in enumerate(texts):
            buffer[row, : len(text)] = torch.tensor(text, device=DEVICE)
        processed = run(buffer, torch.stack([scores_of(text) for text in texts]).to(DEVICE))
        for text, prompt, row, single in zip(texts, prompts, processed, alone, strict=True):
            assert same(row, replayed(rule, text, len(prompt)))
            assert same(row, called(single, [text])[0])
            text.append(int(row.argmax()))
        position += 1


@each_job
def test_zoo_positions_that_are_one_tensor(job):
    make, rule = JOBS[job]
    texts = [list(LISTED[0]), list(LISTED[1])]
    position = torch.tensor(7, device=DEVICE)
    run = make().for_run(torch.tensor(8, device=DEVICE), position)
    for _ in range(15):
        with as_on_a_device() if job != "choose" else nullcontext():
            processed = called(run, texts)
        for text, row in zip(texts, processed, strict=True):
            assert same(row, replayed(rule, text, 8))
            text.append(int(row.argmax()))
        position += 1


@each_job
def test_zoo_one_object_in_two_threads_and_in_a_second_run(job):
    make, rule = JOBS[job]
    processors = LogitsProcessorList([make()])
    failures = []

    def generate(texts):
        texts = [list(text) for text in texts]
        length = len(texts[0])
        for _ in range(15):
            processed = called(lambda ids, scores: processors(ids, scores, prompt_length=length), texts)
            for text, row in zip(texts, processed, strict=True):
                if not same(row, replayed(rule, text, length)):
                    failures.append(text)
                text.append(int(row.argmax()))

    batches = [LISTED, [[A, *LISTED[1]]], [[*LISTED[0], C]] * 3]
    threads = [threading.Thread(target=generate, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch in batches:
        generate(batch)
    assert not failures


@each_job
@pytest.mark.parametrize("beams", [1, 3])
def test_zoo_in_generate(job, beams, llama):
    make, rule = JOBS[job]
    prompts = torch.tensor(LISTED)
    processors = LogitsProcessorList([copy.deepcopy(pickle.loads(pickle.dumps(make())))])
    arguments = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": EOS, "pad_token_id": PAD}
    result = llama.generate(
        prompts, logits_processor=processors, output_logits=True, output_scores=True, return_dict_in_generate=True,
        **arguments,
    )  # fmt: skip
    again = llama.generate(prompts, logits_processor=processors, **arguments)
    assert torch.equal(again, result.sequences)
    if beams > 1:
        return
    for row, prompt in enumerate(LISTED):
        state, text = {}, result.sequences[row, 8:].tolist()
        for step, (logits, scores) in enumerate(zip(result.logits, result.scores, strict=True)):
            assert same(scores[row], rule(state, prompt, text[:step], logits[row]))
            if text[step] == EOS:
                break


@pytest.mark.parametrize("job", ["length", "last", "trigger", "prevent"])
def test_zoo_in_assisted_decoding(job, llama):
    make, _ = JOBS[job]
    prompt = torch.tensor(LISTED[:1])
    arguments = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    plain = llama.generate(prompt, logits_processor=LogitsProcessorList([make()]), **arguments)
    processors = LogitsProcessorList([make()])
    draft = tiny_llama(seed=1)
    assert torch.equal(llama.generate(prompt, logits_processor=processors, assistant_model=draft, **arguments), plain)


def test_zoo_a_phrase_that_begins_like_the_text_waits_for_the_end():
    run = zoo.ForceLastPhraseLogitsProcessor(TEXT, TOKENIZER).for_run(1)
    scores = torch.zeros(1, V, device=DEVICE)
    scores[0, C] = 1
    text = [A]
    for token in (LINE, A, LINE):  # of the model's own accord
        assert run(torch.tensor([text], device=DEVICE), scores).argmax() == C
        text.append(token)
    scores[0, EOS] = 2
    for token in (*PHRASE, EOS, EOS):
        assert run(torch.tensor([text], device=DEVICE), scores).argmax() == token
        scores[0, EOS] = 2 if token == PHRASE[-1] else scores[0, EOS]
        text.append(token)


def test_zoo_a_run_that_begins_with_what_another_one_wrote():
    """A second turn, whose prompt ends in the middle of the first one's phrase; 64 steps are remembered."""
    processor = zoo.ForceLastPhraseLogitsProcessor(TEXT, TOKENIZER)
    ends = torch.zeros(1, V, device=DEVICE)
    ends[0, EOS] = 1
    text = torch.tensor([[A] * 64 + [LINE]], device=DEVICE)
    assert processor.for_run(1)(text[:, :64], ends).argmax() == LINE
    assert (processor.for_run(65)(text, torch.zeros_like(ends)) == 0).all()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(zoo, "monotonic", clock)
    return clock


def test_max_time(clock):
    processor = zoo.MaxTimeLogitsProcessor(TOKENIZER, 2.0)
    for _ in range(2):  # the clock of a second run starts again
        run = processor.for_run(2)
        texts = [[A, A], [B, B]]
        for seconds, due in ((0.0, []), (1.5, []), (0.4, []), (0.2, [0, 1]), (1.0, [0, 1]), (0.0, [1])):
            clock.now += seconds
            processed = called(run, texts)
            for row, text in enumerate(texts):
                assert same(processed[row], only(processed[row], EOS) if row in due else scores_of(text))
                # Row 0 ends at the fifth token, and what follows is padding.
                text.append(EOS if row == 0 and len(text) == 6 else C)


def test_max_time_after_a_sentence_and_with_another_token(clock):
    run = zoo.MaxTimeLogitsProcessor(TOKENIZER, 1.0, True, "c").for_run(1)
    called(run, [[A], [B]])
    clock.now += 1.5
    texts = [[A, A], [B, STOP]]
    processed = called(run, texts)
    assert same(processed[0], scores_of(texts[0]))
    assert same(processed[1], only(processed[1], C))


def test_max_time_when_rows_join_later(clock):
    run = zoo.MaxTimeLogitsProcessor(TOKENIZER, 1.0).for_run(
        torch.tensor([1, 1], device=DEVICE), position := torch.tensor([3, 0], device=DEVICE)
    )
    ids = torch.full((2, 9), A, device=DEVICE)
    scores = torch.zeros(2, V, device=DEVICE)
    for seconds, due in ((0.0, [False, False]), (0.8, [False, False]), (0.8, [True, True])):
        clock.now += seconds
        processed = run(ids, scores)
        assert [row.tolist() != [0.0] * V for row in processed] == due
        position += 1
    position[1] = 0  # a new request takes the slot
    assert (run(ids, scores)[1] == 0).all()


@pytest.mark.parametrize("after", [False, True])
def test_trigger_time(clock, after):
    processor = zoo.TriggerPhraseLogitsProcessor(
        TOKENIZER, phrase=TEXT, trigger_time=1.0, trigger_count=2, trigger_after=after
    )
    run = processor.for_run(1)
    text, forced = [A], []
    for _ in range(14):
        processed = called(run, [text])
        forced.append(not same(processed[0], scores_of(text)))
        text.append(int(processed.argmax()))
        clock.now += 0.4
    late = [False] if after else []
    # Over 1 s is 3 steps; the clock starts again at the step of the last token, two steps after the first.
    expected = [False] * 3 + late + [True] * 3 + [False] * 2 + late + [True] * 3
    assert forced == (expected + [False] * 14)[:14]


def test_choices_are_found_in_any_spelling(sentencepiece):
    """``"1"`` has a space-prefixed twin and a byte token; the line break is a byte token only."""
    processor = zoo.MultipleChoiceLogitsProcessor(sentencepiece, ["1", "2"], ".", boost_first_words=1.0)
    one, two = processor.choice_tokens
    vocabulary = sentencepiece.get_vocab()
    line, stop = vocabulary["<0x0A>"], vocabulary["."]
    size = len(vocabulary)
    prompt = torch.tensor([[line, vocabulary["▁1"], stop, 300, line, vocabulary["<0x32>"], stop, 301]], device=DEVICE)
    scores = torch.randn(1, size, device=DEVICE)
    processed = processor.for_run(8)(prompt, scores)
    expected = torch.full_like(scores, -INF)
    expected[0, one], expected[0, two] = scores[0, one] + scores[0, 300], scores[0, two] + scores[0, 301]
    assert same(processed, expected)


def test_sentences_end_with_any_token_that_ends_so():
    raw = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, ".": 2, ".\n": 3, "b.c": 4, "\n\n": 5}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    run = zoo.GenLengthLogitsProcessor(tokenizer, 1.0, 0, complete_sentences=True).for_run(1)
    raised = run(torch.tensor([[1, token] for token in range(6)], device=DEVICE), torch.zeros(6, 6, device=DEVICE))
    assert raised[:, 0].tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zoo.GenLengthLogitsProcessor(TOKENIZER, INF), "boost_factor"),
        (lambda: zoo.GenLengthLogitsProcessor(TOKENIZER, 1.0, 33), "p must"),
        (lambda: zoo.GenLengthLogitsProcessor(TOKENIZER, 1.0, boost_token_str="a b"), "boost_token_str.*2 of 'a b'"),
        (lambda: zoo.GenLengthLogitsProcessor(object(), 1.0), "eos_token_id"),
        (lambda: zoo.CiteFromPromptLogitsProcessor(TOKENIZER, "1"), "boost_factor"),
        (lambda: zoo.CiteFromPromptLogitsProcessor(TOKENIZER, conditional_boost_factor=None), "conditional_boost"),
        (lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, []), "choices"),
        (lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, ["a", "a"]), "choices"),
        (lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, ["a", 3]), "choices must be text, got 3"),
        (lambda: zoo.MultipleChoiceLogitsProcessor(TOKENIZER, ["a"], ". ."), "delimiter"),
        (lambda: zoo.ForceLastPhraseLogitsProcessor("", TOKENIZER), "phrase"),
        (lambda: zoo.TriggerPhraseLogitsProcessor(TOKENIZER, 4, "a"), "trigger_token_phrase or trigger_time"),
        (lambda: zoo.TriggerPhraseLogitsProcessor(TOKENIZER, trigger_time=1.0), "phrase"),
        (lambda: zoo.TriggerPhraseLogitsProcessor(TOKENIZER, 4, "a", "b", -1.0), "trigger_time"),
        (lambda: zoo.TriggerPhraseLogitsProcessor(TOKENIZER, 4, "a", "b", trigger_count=-1), "trigger_count"),
        (lambda: zoo.PreventHallucinationLogitsProcessor(TOKENIZER, minp=1.1), "minp"),
        (lambda: zoo.PreventHallucinationLogitsProcessor(TOKENIZER, tolerate=0.5), "tolerate"),
        (lambda: zoo.PreventHallucinationLogitsProcessor(TOKENIZER, phrase=3), "phrase"),
        (lambda: zoo.MaxTimeLogitsProcessor(TOKENIZER, -1.0), "max_time"),
    ],
)
def test_zoo_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each_job
def test_zoo_refuses_tokens_outside_the_vocabulary_and_unknown_starts(job):
    processor = JOBS[job][0]()
    ids = torch.ones(1, 3, dtype=torch.int64, device=DEVICE)
    if job not in ("cite less",):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            processor.for_run(3)(ids, torch.zeros(1, 2, device=DEVICE))
    if job != "choose":
        with pytest.raises(ValueError, match="where the run starts"):
            processor(ids, torch.zeros(1, V, device=DEVICE))


@each_job
def test_zoo_without_a_text(job):
    """``inputs_embeds`` alone: the first step has no ids; and an empty batch."""
    make, rule = JOBS[job]
    run = make().for_run()
    scores = torch.stack([scores_of([]), scores_of([])]).to(DEVICE)
    processed = run(torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), scores)
    assert same(processed[1], rule({}, [], [], scores_of([])))
    empty = make().for_run(1)(torch.zeros(0, 3, dtype=torch.int64, device=DEVICE), torch.zeros(0, V, device=DEVICE))
    assert empty.shape == (0, V)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@each_job
def test_captured_once_and_replayed_without_a_sync(job):
    make, rule = JOBS[job]
    texts = [list(LISTED[0]), list(LISTED[1])]
    length, position = torch.tensor([8, 8], device=DEVICE), torch.tensor([7, 7], device=DEVICE)
    ids, scores = torch.zeros(2, 30, dtype=torch.int64, device=DEVICE), torch.zeros(2, V, device=DEVICE)
    processors = LogitsProcessorList([make()])
    graph, result = captured(lambda: processors(ids, scores, prompt_length=length, cache_position=position))
    for _ in range(15):
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, device=DEVICE)
            scores[row] = scores_of(text).to(DEVICE)
        graph.replay()
        for row, text in enumerate(texts):
            assert same(result[row], replayed(rule, text, 8))
            text.append(int(result[row].argmax()))
        position += 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_clock_can_not_be_captured():
    processors = LogitsProcessorList([zoo.MaxTimeLogitsProcessor(TOKENIZER, 1.0)])
    ids, scores = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), torch.zeros(1, V, device=DEVICE)
    processors(ids, scores, prompt_length=3)
    with pytest.raises(RuntimeError, match="clock"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        processors(ids, scores, prompt_length=3)
