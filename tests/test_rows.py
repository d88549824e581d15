"""A row of a batch gets what it gets alone; and what has a row for each row of the scores has as many as these."""

import copy

import pytest
import torch
from test_extras import EOS, JOBS, TEXT, TOKENIZER, A, B, C, V, same

import fastlogits as fl
from fastlogits.processors import zoo

INF = float("inf")

# -- What is carried from step to step ----------------------------------------------------------------------------

CARRYING = ["last", "trigger", "after", "prevent"]
each_job = pytest.mark.parametrize("job", list(JOBS))
each_carrying = pytest.mark.parametrize("job", CARRYING)


def told(seed, steps, rows, prompt=(A, B)):
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
    given = [told(2, 16, 2), told(2, 16, 3), told(3, 16, 3, (B, B))]
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


def test_rows_without_a_text_get_what_they_get_alone(device):
    """``inputs_embeds``: all rows begin with no ids at all."""
    make = lambda: zoo.ForceLastPhraseLogitsProcessor(TEXT, TOKENIZER).for_run(0)  # noqa: E731
    text, scores = (each.to(device) for each in told(9, 12, 3, ()))
    together = said(make(), text, scores, [0, 1, 2], 0)
    for row in range(3):
        for batch, single in zip(together, said(make(), text, scores, [row], 0), strict=True):
            assert same(batch[row], single[0])
