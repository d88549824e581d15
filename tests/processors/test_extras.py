"""Processors that transformers doesn't have, each against a loop over rows and tokens written from its definition."""

import copy
import itertools
import pickle
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastlogits import (
    AllowedTokensLogitsProcessor,
    FrequencyPenaltyLogitsProcessor,
    LogitBiasLogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    PresencePenaltyLogitsProcessor,
    TokenMask,
)
from fastlogits.processors import nvidia_zoo as zoo
from fastlogits.processors.dry import DRYLogitsProcessor
from tests.models import VOCAB_SIZE, tiny_llama

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
few = settings(deadline=None, max_examples=60)

V = 16
PAD, EOS, STOP, LINE, ONE, TWO, A, B, C = 0, 2, 3, 4, 5, 6, 7, 8, 9
VOCABULARY = {"<pad>": PAD, "<s>": 1, "</s>": EOS, ".": STOP, "\n": LINE, "1": ONE, "2": TWO, "a": A, "b": B, "c": C}
PHRASE = (LINE, A, B)  # begins with a token that texts hold anyway


def make_tokenizer():
    rest = {f"w{i}": i for i in range(len(VOCABULARY), V)}
    raw = Tokenizer(models.WordLevel({**VOCABULARY, **rest}, unk_token="w15"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split(Regex(r"\n|\."), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


TOKENIZER = make_tokenizer()


def same(a, b):
    a, b = a.cpu(), b.cpu()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def scores_of(text, dtype=torch.float32):
    """What the model says after a text: a fixed function of it; some tokens are likelier than others."""
    generator = torch.Generator().manual_seed(hash(tuple(text)) % 2**40)
    scores = torch.randn(V, generator=generator) * 2
    scores[[EOS, C, LINE]] += 1.0
    return scores.to(dtype)


def add(row, token, value):
    """Rounded once, to the dtype of the row."""
    row[token] = row[token].to(torch.promote_types(row.dtype, torch.float32)) + value


@contextmanager
def as_on_a_device():
    """Take the ways that are for devices, where nothing may wait."""
    torch.Tensor.is_cpu = False
    try:
        yield
    finally:
        del torch.Tensor.is_cpu


def only(row, token):
    forced = torch.full_like(row, -INF)
    forced[token] = 0
    return forced


# -- DRY ----------------------------------------------------------------------------------------------------------


def dry_row(ids, row, multiplier, base, allowed, breakers, range_):
    ids, row = ids[-range_:] if range_ else ids, row.clone()
    longest = {}
    for i in range(len(ids) - 1):  # a match ends at i
        n = 0
        while n < 50 and n <= i and ids[i - n] == ids[-1 - n] and ids[i - n] not in breakers:
            n += 1
        longest[ids[i + 1]] = max(n, longest.get(ids[i + 1], 0))
    for token, n in longest.items():
        if n >= max(1, allowed) and token not in breakers and token < len(row):
            add(row, token, -multiplier * base ** (n - allowed))
    return row


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_dry(data):
    draw = data.draw
    tokens = draw(st.sampled_from([2, 3, 9, 12]))  # 12: some are outside the vocabulary of 10
    length = draw(st.sampled_from([0, 1, 2, 3, 10, 30, 140]))
    rows = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(0, tokens, (rows, length), dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    if length > 30:  # long repetitions
        ids[0, -draw(st.integers(1, 60)) :] = 1
        ids[-1, 70:] = ids[-1, :70]
    scores = torch.randn(rows, 30)[:, 7:17].to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        scores[0, 3], scores[0, 4] = -INF, float("nan")
    arguments = {
        "multiplier": draw(st.sampled_from([0.0, 0.8, 3.0])),
        "base": draw(st.sampled_from([1.0, 1.75, 4.0])),
        "allowed_length": draw(st.integers(0, 4)),
        "range_": draw(st.sampled_from([0, 0, 1, 5, 20])),
    }
    breakers = draw(st.sets(st.integers(0, 9), max_size=2))
    given_breakers = TokenMask.from_ids(breakers, 10) if draw(st.booleans()) else list(breakers)
    processor = DRYLogitsProcessor(**arguments, sequence_breakers=given_breakers)
    ids, scores = ids.to(DEVICE), scores.to(DEVICE)
    before, seen = scores.clone(), ids.clone()
    processed = processor(ids, scores)
    assert same(scores, before)
    assert torch.equal(ids, seen)
    for row in range(rows):
        expected = dry_row(
            ids[row].tolist(), scores[row], arguments["multiplier"], arguments["base"], arguments["allowed_length"],
            breakers, arguments["range_"],
        )  # fmt: skip
        assert same(processed[row], expected), (ids[row], processed[row], expected)
        assert same(processor(ids[row : row + 1], scores[row : row + 1])[0], processed[row])
    assert same(processor.apply_(ids, scores.clone()), processed)
    with as_on_a_device():
        assert same(processor.stage().function(ids, scores), processed)


def test_dry_length_is_capped():
    processor = DRYLogitsProcessor(1.0, 2.0, 2)
    processed = processor(torch.ones(1, 400, dtype=torch.int64, device=DEVICE), torch.zeros(1, 3, device=DEVICE))
    assert processed.tolist() == [[0.0, -(2.0**48), 0.0]]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("multiplier", -1.0), ("multiplier", INF), ("multiplier", True), ("multiplier", "1"), ("base", 0.9),
        ("base", float("nan")), ("base", 1e9), ("allowed_length", -1), ("allowed_length", 1.5), ("range_", -2),
        ("sequence_breakers", [1.5]), ("sequence_breakers", "abc"),
    ],
)  # fmt: skip
def test_dry_refuses(argument, value):
    with pytest.raises(ValueError, match=argument):
        DRYLogitsProcessor(**{"multiplier": 1.0, argument: value})


def test_dry_refuses_breakers_outside_the_vocabulary():
    processor = DRYLogitsProcessor(1.0, sequence_breakers=[7])
    with pytest.raises(ValueError, match="sequence_breakers: token id 7"):
        processor(torch.ones(1, 3, dtype=torch.int64, device=DEVICE), torch.zeros(1, 5, device=DEVICE))


def test_dry_breaks_the_loop_of_a_model(llama):
    inputs = torch.tensor([[1, 5, 6, 7, 5, 6, 7, 5, 6]])
    processors = LogitsProcessorList([DRYLogitsProcessor(50.0, 4.0, 1)])
    result = llama.generate(
        inputs, logits_processor=processors, max_new_tokens=25, do_sample=False, output_logits=True,
        output_scores=True, return_dict_in_generate=True, eos_token_id=-1,
    )  # fmt: skip
    for step, (logits, scores) in enumerate(zip(result.logits, result.scores, strict=True)):
        ids = result.sequences[0, : inputs.shape[1] + step].tolist()
        assert same(scores[0], dry_row(ids, logits[0], 50.0, 4.0, 1, (), 0))
    pairs = list(itertools.pairwise(result.sequences[0, inputs.shape[1] :].tolist()))
    assert len(set(pairs)) > len(pairs) - 3


# -- The zoo: each job as a loop over the steps of one row, which gets what it needs to know from the step before ---


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


# -- What serving engines have ------------------------------------------------------------------------------------


@few
@given(data=st.data())
def test_serving_engines_processors(data):
    draw = data.draw
    rows, length, dtype = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.sampled_from(DTYPES))
    prompt_length = draw(st.integers(0, length))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(0, V, (rows, length), dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)
    scores = torch.randn(rows, 3 * V, device=DEVICE)[:, V : 2 * V].to(dtype)
    penalty, minimum = draw(st.sampled_from([-1.5, 0.0, 0.7])), draw(st.integers(0, 6))
    bias = draw(st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -INF, 0.3]), max_size=4))
    tokens = draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=4))

    def presence(row, generated):
        for token in set(generated):
            row[token] -= penalty

    def frequency(row, generated):
        for token in set(generated):
            row[token] -= penalty * generated.count(token)

    def biased(row, generated):
        for token, value in bias.items():
            row[token] += value

    def allowed(row, generated):
        for token in set(range(V)) - tokens:
            row[token] = -INF

    def unending(row, generated):
        for token in tokens if len(generated) < minimum else ():
            row[token] = -INF

    text_bias = {str(token): value for token, value in bias.items()}
    cases = [
        (PresencePenaltyLogitsProcessor(penalty), presence),
        (FrequencyPenaltyLogitsProcessor(penalty), frequency),
        (LogitBiasLogitsProcessor(bias), biased),
        (LogitBiasLogitsProcessor(text_bias), biased),
        (AllowedTokensLogitsProcessor(tokens), allowed),
        (AllowedTokensLogitsProcessor(TokenMask.from_ids(tokens, V)), allowed),
        (MinTokensLogitsProcessor(minimum, tokens), unending),
    ]
    before = scores.clone()
    for processor, rule in cases:
        processed = processor.for_run(prompt_length)(ids, scores)
        assert same(scores, before)
        for row in range(rows):
            expected = scores[row].clone()
            rule(expected, ids[row, prompt_length:].tolist())
            # A count times a penalty is rounded once or twice.
            assert torch.allclose(processed[row].cpu(), expected.cpu(), rtol=1e-2 if dtype != torch.float32 else 1e-6)
            alone = processor.for_run(prompt_length)(ids[row : row + 1], scores[row : row + 1])
            assert same(alone[0], processed[row])
        order = torch.randint(0, rows, (rows + 1,), device=DEVICE)
        assert same(processor.for_run(prompt_length)(ids[order], scores[order]), processed[order])


def test_serving_engines_processors_in_generate(llama):
    processors = LogitsProcessorList(
        [
            PresencePenaltyLogitsProcessor(0.5),
            FrequencyPenaltyLogitsProcessor(0.25),
            LogitBiasLogitsProcessor({5: 2.0, 7: -INF}),
            AllowedTokensLogitsProcessor(range(2, 40)),
            MinTokensLogitsProcessor(4, [EOS, 9]),
        ]
    )
    prompt = torch.tensor([[1, 5, 6, 7], [1, 9, 9, 3]])
    result = llama.generate(
        prompt, logits_processor=processors, max_new_tokens=8, do_sample=False, output_logits=True,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for step, (logits, scores) in enumerate(zip(result.logits, result.scores, strict=True)):
        for row in range(2):
            expected = logits[row].clone()
            generated = result.sequences[row, 4 : 4 + step].tolist()
            for token in set(generated):
                expected[token] -= 0.5
                expected[token] -= 0.25 * generated.count(token)
            expected[5] += 2.0
            banned = [7, 0, 1, *range(40, VOCAB_SIZE), *([EOS, 9] if step < 4 else [])]
            expected[banned] = -INF
            assert torch.allclose(scores[row], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PresencePenaltyLogitsProcessor(INF), "penalty"),
        (lambda: FrequencyPenaltyLogitsProcessor("1"), "penalty"),
        (lambda: LogitBiasLogitsProcessor([1]), "logit_bias"),
        (lambda: LogitBiasLogitsProcessor({-1: 1.0}), "logit_bias"),
        (lambda: LogitBiasLogitsProcessor({1: INF}), "logit_bias"),
        (lambda: LogitBiasLogitsProcessor({1.5: 1.0}), "logit_bias"),
        (lambda: AllowedTokensLogitsProcessor([]), "allowed_token_ids"),
        (lambda: AllowedTokensLogitsProcessor([-3]), "allowed_token_ids"),
        (lambda: MinTokensLogitsProcessor(-1, [1]), "min_tokens"),
        (lambda: MinTokensLogitsProcessor(1, [1.5]), "stop_token_ids"),
        (lambda: LogitBiasLogitsProcessor({99: 1.0})(None, torch.zeros(1, V)), "99"),
        (lambda: AllowedTokensLogitsProcessor([99])(None, torch.zeros(1, V)), "allowed_token_ids.*99"),
        (lambda: PresencePenaltyLogitsProcessor(1.0)(torch.ones(1, 1).int(), torch.zeros(1, V)), "run starts"),
        (lambda: MinTokensLogitsProcessor(1, [1])(torch.ones(1, 1).int(), torch.zeros(1, V)), "run starts"),
    ],
)
def test_serving_engines_processors_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- On the GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("job", [*JOBS, "dry"])
def test_captured_once_and_replayed_without_a_sync(job):
    make, rule = JOBS.get(job, (lambda: DRYLogitsProcessor(1.0, 2.0, 1, [3]), None))
    texts = [list(LISTED[0]), list(LISTED[1])]
    length, position = torch.tensor([8, 8], device=DEVICE), torch.tensor([7, 7], device=DEVICE)
    ids, scores = torch.zeros(2, 30, dtype=torch.int64, device=DEVICE), torch.zeros(2, V, device=DEVICE)
    processors = LogitsProcessorList([make()])

    def call():
        if job == "dry":
            return processors(ids, scores)
        return processors(ids, scores, prompt_length=length, cache_position=position)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(15):
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, device=DEVICE)
            scores[row] = scores_of(text).to(DEVICE)
        graph.replay()
        for row, text in enumerate(texts):
            if job == "dry":
                expected = dry_row(ids[row].tolist(), scores[row], 1.0, 2.0, 1, {3}, 0)
            else:
                expected = replayed(rule, text, 8)
            assert same(captured[row], expected)
            text.append(int(captured[row].argmax()))
        position += 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_clock_can_not_be_captured():
    processors = LogitsProcessorList([zoo.MaxTimeLogitsProcessor(TOKENIZER, 1.0)])
    ids, scores = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), torch.zeros(1, V, device=DEVICE)
    processors(ids, scores, prompt_length=3)
    with pytest.raises(RuntimeError, match="clock"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        processors(ids, scores, prompt_length=3)
