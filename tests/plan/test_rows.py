"""A row of a batch gets what it gets alone; and what has a row for each row of the scores has as many as these."""

import copy

import pytest
import torch
import transformers.generation.logits_process as reference
from fastlogits_kernels.pointwise import fold as fold_kernels
from fastlogits_kernels.pointwise.mask import Bans, mask_tokens, mask_tokens_
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastlogits as fl
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.stages import Ban, Member, Repeated
from fastlogits.processors import nvidia_zoo as zoo
from fastlogits.processors.dry import DRYLogitsProcessor
from tests import entries
from tests.installed import (
    COMPLETES_FROM_ALL_OF_A_TEXT,
    IS_4,
    PENALISES_COPIES,
    TAKES_LENGTHS_OF_ROWS,
    TAKES_ONE_TEXT_FOR_ALL_ROWS,
)
from tests.parity.test_processors import undecided
from tests.processors.test_nvidia_zoo import JOBS, TEXT
from tests.processors.toy import EOS, TOKENIZER, A, C, V, same
from tests.processors.toy import B as OTHER

few = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))

# -- What is carried from step to step ----------------------------------------------------------------------------

CARRYING = ["last", "trigger", "after", "prevent"]
each_job = pytest.mark.parametrize("job", list(JOBS))
each_carrying = pytest.mark.parametrize("job", CARRYING)


def told(seed, steps, rows, prompt=(A, OTHER)):
    """A text that all rows are told to write, and for each step the scores of each row, which differ."""
    torch.manual_seed(seed)
    text = torch.tensor([[*prompt, *torch.randint(3, 10, (steps,)).tolist()]])
    scores = torch.randn(steps, rows, V, device="cpu") * 1.5
    scores[..., [EOS, C]] += 2.0
    return text, scores


def said(run, text, scores, rows, start=2):
    """What a run makes of the scores of some rows, step by step ``[steps, rows, V]``."""
    return [
        run(text[:, : start + step].expand(len(rows), -1), scores[step, rows]).clone() for step in range(len(scores))
    ]


@each_job
def test_rows_of_equal_texts_get_what_they_get_alone(job, device):
    text, scores = (each.to(device) for each in told(0, 24, 5))
    together = said(JOBS[job][0]().for_run(2), text, scores, list(range(5)))
    for row in range(5):
        alone = said(JOBS[job][0]().for_run(2), text, scores, [row])
        for step, (batch, single) in enumerate(zip(together, alone, strict=True)):
            assert same(batch[row], single[0]), (step, row)


@each_carrying
def test_rows_of_equal_texts_at_steps_of_their_own(job, device):
    """A buffer of a serving stack: a prompt comes again in row 1, four steps after it came in row 0."""
    text, scores = (each.to(device) for each in told(1, 16, 2))
    alone = [said(JOBS[job][0]().for_run(2), text, scores, [row]) for row in range(2)]
    position = torch.tensor([1, 1], device=device)
    run = JOBS[job][0]().for_run(torch.tensor([2, 2], device=device), position)
    stranger = torch.full_like(text, A)
    for step in range(16):
        late = step - 4
        position[0], position[1] = 1 + step, 1 + max(0, late)
        ids = torch.cat([text, stranger if late < 0 else text])
        processed = run(ids, torch.stack([scores[step, 0], scores[max(0, late), 1]]))
        assert same(processed[0], alone[0][step][0])
        assert late < 0 or same(processed[1], alone[1][late][0])


@each_carrying
def test_runs_that_alternate_in_one_thread(job, device):
    """Two runs of one object, of the same and of other texts, each with its own rows."""
    processor = JOBS[job][0]()
    given = [told(2, 16, 2), told(2, 16, 3), told(3, 16, 3, (OTHER, OTHER))]
    given[1] = (given[1][0], given[1][1] + 0.1)
    given = [(text.to(device), scores.to(device)) for text, scores in given]
    runs = [processor.for_run(2) for _ in given]
    alone = [said(JOBS[job][0]().for_run(2), text, scores, list(range(scores.shape[1]))) for text, scores in given]
    for step in range(16):
        for run, (text, scores), expected in zip(runs, given, alone, strict=True):
            ids = text[:, : 2 + step].expand(scores.shape[1], -1)
            assert same(run(ids, scores[step]), expected[step])


@each_carrying
def test_a_list_called_between_the_steps_of_a_run(job, device):
    """A look at what a list does (a trace, say) changes nothing for the run that goes on."""
    processors = fl.LogitsProcessorList([JOBS[job][0]()])
    text, scores = (each.to(device) for each in told(4, 16, 2))
    expected = said(JOBS[job][0]().for_run(2), text, scores, [0, 1])
    run = processors.for_run(2)
    for step in range(16):
        ids = text[:, : 2 + step].expand(2, -1)
        assert same(run(ids, scores[step]), expected[step])
        processors(ids, -scores[step], prompt_length=2)


@each_carrying
@pytest.mark.parametrize("how", ["at once", "one by one"])
def test_more_rows_than_before_and_fewer(job, how, device):
    """Rows are repeated beyond any room that there was, change places, and go."""
    text, scores = (each.to(device) for each in told(5, 24, 2))
    other = text.clone()
    other[:, 0] = C
    texts = torch.cat([text, other])
    expected = [
        said(JOBS[job][0]().for_run(2), texts[row : row + 1], scores, [row]) for row in range(2)
    ]  # of each text, by step
    run = JOBS[job][0]().for_run(2)
    rows = torch.tensor([0, 1], device=device)
    for step in range(24):
        processed = run(texts[rows, : 2 + step], scores[step, rows])
        for place, row in enumerate(rows.tolist()):
            assert same(processed[place], expected[row][step][0]), (step, place)
        match step:
            case 5:
                rows = rows.repeat(60) if how == "at once" else rows.repeat(2)
            case 9:
                rows = rows.flip(0)
            case 12:
                rows = rows.repeat(3)
            case 15:
                rows = rows[[3, 0]]
            case 18:
                rows = rows[:1]


@each_carrying
def test_rows_of_equal_texts_that_are_cut_back(job, device):
    """A draft is refused: the texts go back, the same for all rows, and go on otherwise."""
    text, scores = (each.to(device) for each in told(6, 20, 3))
    other, _ = told(7, 20, 3)
    other = torch.cat([text[:, : 2 + 8], other.to(device)[:, 2 + 8 :]], 1)
    expected = said(JOBS[job][0]().for_run(2), other, scores, [0, 1, 2])
    run = JOBS[job][0]().for_run(2)
    said(run, text, scores[:13], [0, 1, 2])
    for step in range(8, 20):
        assert same(run(other[:, : 2 + step].expand(3, -1), scores[step]), expected[step]), step


@each_carrying
def test_a_copy_in_the_middle_of_a_run(job, device):
    text, scores = (each.to(device) for each in told(8, 20, 2))
    run = JOBS[job][0]().for_run(2)
    said(run, text, scores[:9], [0, 1])
    twin = copy.deepcopy(run)
    for step in range(9, 20):
        ids = text[:, : 2 + step].expand(2, -1)
        assert same(run(ids, scores[step]), twin(ids, scores[step]))


@each_carrying
@pytest.mark.parametrize(
    "make", [lambda each: each, lambda each: fl.LogitsProcessorList([each])], ids=["alone", "list"]
)
def test_an_attribute_set_in_the_middle_of_a_run_forgets_nothing(job, make, device):
    text, scores = (each.to(device) for each in told(8, 20, 2))
    expected = said(JOBS[job][0]().for_run(2), text, scores, [0, 1])
    processor = JOBS[job][0]()
    run = make(processor).for_run(2)
    said(run, text, scores[:9], [0, 1])
    for step in range(9, 20):
        processor.phrase_tokens = tuple(processor.phrase_tokens)  # the same, but set
        assert same(run(text[:, : 2 + step].expand(2, -1), scores[step]), expected[step])


def test_rows_without_a_text_get_what_they_get_alone(device):
    """``inputs_embeds``: all rows begin with no ids at all."""
    make = lambda: zoo.ForceLastPhraseLogitsProcessor(TEXT, TOKENIZER).for_run(0)  # noqa: E731
    text, scores = (each.to(device) for each in told(9, 12, 3, ()))
    together = said(make(), text, scores, [0, 1, 2], 0)
    for row in range(3):
        for batch, single in zip(together, said(make(), text, scores, [row], 0), strict=True):
            assert same(batch[row], single[0])


@few
@given(data=st.data(), name=st.sampled_from(["SynthIDTextWatermarkLogitsProcessor", "WatermarkLogitsProcessor"]))
def test_watermarks_of_a_row_are_those_that_it_has_alone(device, data, name):
    case = entries.Case(3, 41, 5, device)
    arguments = entries.ENTRIES[name].draw(data.draw, case)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    text, scores = torch.randint(0, 4, (1, 12), device=device), torch.randn(6, 3, 41, device=device)
    together = said(entries.build(fl, name, arguments), text, scores, [0, 1, 2], 5)
    for row in range(3):
        alone = said(entries.build(fl, name, arguments), text, scores, [row], 5)
        for batch, single in zip(together, alone, strict=True):
            assert torch.allclose(batch[row], single[0], atol=1e-5)


@pytest.mark.parametrize("ngram_len", [2, 3, 5])
def test_synthid_without_a_text_at_first(device, ngram_len):
    """Two calls without a token; then the context is the tokens that came, as it is where each call brings one."""
    options = {"keys": [7, 8, 9], "sampling_table_size": 64, "sampling_table_seed": 0, "context_history_size": 0}
    make = lambda: fl.SynthIDTextWatermarkLogitsProcessor(  # noqa: E731
        ngram_len=ngram_len, device=torch.device(device), **options
    )
    text, scores = torch.randint(0, 9, (2, 7), device=device), torch.randn(2, 9, device=device)
    late, usual = make(), make()
    empty = text[:, :0]
    late(empty, scores)
    assert torch.equal(late(empty, scores), usual(empty, scores))
    for length in range(1, 8):
        assert torch.equal(late(text[:, :length], scores), usual(text[:, :length], scores))
        assert torch.equal(late.state.context, usual.state.context)
    with pytest.raises(RuntimeError, match="2 rows of the run"):
        late(text[:1], scores[:1])


# -- Ids with other rows than the scores --------------------------------------------------------------------------


def goes_on_by_chance(name, arguments, ids):
    """Whether rows without ids get what the broadcast of some intermediate result of transformers makes of them."""
    ignored = arguments.get("prompt_ignore_length")
    if isinstance(ignored, int) and ignored >= ids.shape[1]:
        return True  # nothing is read
    names = ["PrefixConstrainedLogitsProcessor", "WhisperTimeStampLogitsProcessor"]
    if TAKES_ONE_TEXT_FOR_ALL_ROWS or not COMPLETES_FROM_ALL_OF_A_TEXT:
        names += ["SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"]
    if not PENALISES_COPIES:
        names += ["EncoderRepetitionPenaltyLogitsProcessor"]
    return name in names


def outcome(call):
    try:
        return call()
    except Exception as error:
        return error


@pytest.fixture(params=["torch", "kernels"])
def backend(request, monkeypatch):
    if request.param == "kernels" and not HAS_TRITON:
        pytest.skip("needs Triton")
    monkeypatch.setattr(fold_kernels, "FORCE_KERNEL", request.param == "kernels")


# Each class with each shape, by torch and by kernels in turns.
BY_TURNS = [
    (("torch", "kernels")[(index + number) % 2], *shape, name)
    for number, shape in enumerate([(1, 2), (2, 4), (2, 3), (3, 2), (2, 1)])
    for index, name in enumerate(entries.kinds(lambda entry: entry.graph or entry.least_vocab > 1))
]


@pytest.mark.skipif(IS_4, reason="transformers 4 reads rows one by one; we follow 5")
@pytest.mark.parametrize(("backend", "R", "B", "name"), BY_TURNS, indirect=["backend"])
@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ids_of_other_rows_act_as_in_transformers_or_are_refused(backend, device, name, R, B, data):
    arguments = entries.ENTRIES[name].draw(data.draw, entries.Case(B, 41, 6, device))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids, scores = torch.randint(0, 3, (R, 6), device=device), torch.randn(B, 41, device=device)
    assume(not entries.was_corrected(name, arguments, ids, scores))
    expected = outcome(lambda: entries.build(reference, name, arguments)(ids, scores.clone()))
    found = outcome(lambda: entries.build(fl, name, arguments)(ids, scores))
    if isinstance(expected, Exception) or (goes_on_by_chance(name, arguments, ids) and isinstance(found, Exception)):
        assert isinstance(found, (ValueError, type(expected)))
        assert " must " in str(found)
    else:
        right = torch.isclose(expected.nan_to_num(neginf=-9e9), found.nan_to_num(neginf=-9e9), atol=1e-4)
        if not right.all() and entries.ENTRIES[name].agreement == "truncation":
            right |= undecided(name, arguments, ids, scores)
        assert right.all()


READERS = {
    "presence": lambda: fl.PresencePenaltyLogitsProcessor(0.5),
    "frequency": lambda: fl.FrequencyPenaltyLogitsProcessor(0.5),
    "blank": lambda: fl.SuppressFirstTokens([1], blank=[2]),
    "blank in a fold": lambda: fl.LogitsProcessorList(
        [fl.SuppressFirstTokens([1], blank=[2]), fl.TemperatureLogitsWarper(2.0)]
    ),
    "prompt": lambda: fl.OnlyTokensFrom("prompt", eos_token_id=1),
    "prompt in a fold": lambda: fl.LogitsProcessorList(
        [fl.TemperatureLogitsWarper(2.0), fl.OnlyTokensFrom("prompt", eos_token_id=1)]
    ),
    "dry": lambda: fl.LogitsProcessorList([DRYLogitsProcessor(1.0)]),
    **{job: make for job, (make, _) in JOBS.items() if job != "choose"},
}


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize(("R", "B"), [(1, 2), (2, 4), (3, 2)])
def test_ids_of_other_rows_are_refused_by_what_reads_each_row(backend, device, reader, R, B):
    run = READERS[reader]().for_run(2)
    ids = torch.ones(R, 4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=rf"input_ids must have as many rows as scores \({B}\).* got {R}; repeat"):
        run(ids, torch.zeros(B, V, device=device))


def test_what_reads_the_length_alone_takes_ids_of_any_rows(backend, device):
    processors = fl.LogitsProcessorList(
        [
            fl.MinLengthLogitsProcessor(9, 2),
            fl.SuppressFirstTokens([3]),
            fl.SuppressTokensAtBeginLogitsProcessor([4], 4),
            fl.TemperatureLogitsWarper(2.0),
        ]
    )
    ids, scores = torch.ones(1, 4, dtype=torch.int64, device=device), torch.randn(4, V, device=device)
    found = processors(ids, scores, prompt_length=4)
    assert torch.equal(found, processors(ids.expand(4, -1), scores, prompt_length=4))
    assert found[:, 2:5].isneginf().all()


def test_operations_never_read_past_what_they_are_given(backend, device):
    ids, scores = torch.ones(2, 4, dtype=torch.int64, device=device), torch.zeros(3, V, device=device)
    chain = Pointwise([Member("n-grams", Ban(Repeated(2)))]).inputs(ids, scores[:2], None)[0]
    with pytest.raises(ValueError, match="input_ids must have the 3 rows"):
        fold_kernels.fold(scores, chain, fold_kernels.Call(ids, cache_offset=3))
    words = torch.ones(2, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="allowed must have 1 row or the 3 rows"):
        mask_tokens(scores, Bans(allowed=words))
    gate = {"windows": torch.ones(1, dtype=torch.int32, device=device), "blanks": words[:1], "sets": words[:1]}
    with pytest.raises(ValueError, match="input_ids must have the 3 rows"):
        mask_tokens_(scores, Bans(**gate, input_ids=ids))


# -- A source for each row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, 2.0])
def test_a_source_that_divides_the_rows_is_not_taken_for_one_of_each(backend, device, before):
    def processed(rows, **options):
        scale = [] if before is None else [fl.TemperatureLogitsWarper(before)]
        source = fl.OnlyTokensFrom([[3, 4], [5]], eos_token_id=1, **options)
        ids = torch.ones(rows, 2, dtype=torch.int64, device=device)
        return fl.LogitsProcessorList([*scale, source])(ids, torch.zeros(rows, V, device=device))

    def kept(scores):
        return [set(row.isfinite().nonzero().flatten().tolist()) for row in scores]

    assert kept(processed(2)) == [{1, 3, 4}, {1, 5}]
    assert kept(processed(6, copies=3)) == [{1, 3, 4}] * 3 + [{1, 5}] * 3
    for rows, options in ((4, {}), (6, {"copies": 2}), (2, {"copies": 2}), (1, {}), (3, {})):
        with pytest.raises(ValueError, match=rf"source_ids must have .* got 2 rows for {rows} rows.*copies="):
            processed(rows, **options)


def test_encoder_ids_stand_for_neighbours_as_in_transformers(backend, device):
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=device)
    text = torch.full((4, 2), 2, device=device)
    scores = torch.randn(4, V, device=device)
    for name, value in (("EncoderRepetitionPenaltyLogitsProcessor", 2.0), ("EncoderNoRepeatNGramLogitsProcessor", 2)):
        if name == "EncoderRepetitionPenaltyLogitsProcessor" and not PENALISES_COPIES:
            continue  # its penalty reaches the first rows only; we follow the newest
        expected = getattr(reference, name)(value, ids)(text, scores)
        assert torch.allclose(getattr(fl, name)(value, ids)(text, scores), expected)
    with pytest.raises(IndexError, match="encoder_input_ids must have rows of which each stands for as many of the 3"):
        fl.EncoderNoRepeatNGramLogitsProcessor(2, ids)(text[:3], scores[:3])


# -- A value for each row -----------------------------------------------------------------------------------------

PER_ROW = {
    "top_k": lambda: fl.TopKLogitsWarper(torch.tensor([3, 9])),
    "top_p": lambda: fl.TopPLogitsWarper(torch.tensor([0.5, 0.9])),
    "min_p": lambda: fl.MinPLogitsWarper(torch.tensor([0.5, 0.9])),
    "typical_p": lambda: fl.TypicalLogitsWarper(torch.tensor([0.5, 0.9])),
    "epsilon": lambda: fl.EpsilonLogitsWarper(torch.tensor([0.5, 0.9])),
    "eta": lambda: fl.EtaLogitsWarper(torch.tensor([0.5, 0.9])),
    "top_n_sigma": lambda: fl.TopNSigmaLogitsWarper(torch.tensor([0.5, 0.9])),
    "prompt_ignore_length": lambda: fl.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([1, 2])),
    "prompt_length": lambda: fl.SuppressFirstTokens([1]).for_run(torch.tensor([4, 4])),
    "cache_position": lambda: fl.SuppressFirstTokens([1]).for_run(4, torch.tensor([4, 4])),
}


@pytest.mark.parametrize("argument", list(PER_ROW))
@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_values_of_other_rows_say_what_to_do(argument, rows):
    """Rows were multiplied behind their back; the message names both ways in which that happens."""
    if argument == "prompt_ignore_length" and not TAKES_LENGTHS_OF_ROWS:
        pytest.skip("this transformers takes no tensor")
    process = PER_ROW[argument]()
    process(torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, V))
    with pytest.raises(ValueError, match=rf"{argument} must .* value for each .*got 2.*repeat_interleave.*torch\.cat"):
        process(torch.ones(rows, 5, dtype=torch.int64), torch.zeros(rows, V))
