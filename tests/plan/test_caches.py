"""What is kept from call to call is bounded, whatever callers bring; what a captured graph reads stays."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.runtime.recent import MOST, recent
from fastlogits_kernels.selection import launch, layout
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import fastlogits as fl
from fastlogits import token_mask, token_text
from fastlogits.plan import allowed, pointwise
from fastlogits.plan import masks as mask_launch
from fastlogits.plan import selection as truncate_launch

V = 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sizes(B, V):
    ids = torch.arange(3 * B, device=DEVICE).view(B, 3) % 7
    return ids, torch.arange(float(B * V), device=DEVICE).view(B, V).cos()


# Each: processors, and the batch sizes or vocabularies that make something new of them.
BY_ROWS = {
    "fold": lambda: [fl.EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.tensor([[1, 2, 3]], device=DEVICE))],
    "ignored": lambda: [fl.RepetitionPenaltyLogitsProcessor(1.5, 1)],
    "allowed": lambda: [fl.OnlyTokensFrom([1, 2, 3], eos_token_id=0)],
}
BY_VOCABULARY = {
    "fold": lambda: [fl.TemperatureLogitsWarper(0.5), fl.SuppressTokensLogitsProcessor([1])],
    "masks": lambda: [fl.SuppressTokensLogitsProcessor([1])],
    "allowed": lambda: [fl.OnlyTokensFrom([1, 2, 3], eos_token_id=0)],
    "selection": lambda: [fl.TopKLogitsWarper(3)],
}
CASES = [(name, make, (range(1, MOST + 4), [V])) for name, make in BY_ROWS.items()]
CASES += [(name, make, ([2], range(V, V + MOST + 3))) for name, make in BY_VOCABULARY.items()]
IDS = [f"{name} by {'rows' if len(sides[0]) > 1 else 'vocabulary'}" for name, _, sides in CASES]
each_case = pytest.mark.parametrize(("name", "make", "sides"), CASES, ids=IDS)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Selections are made where kernels run."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", HAS_TRITON)


def kept_by(processors, name):
    """The dictionary that a case fills."""
    if name == "selection":
        return step_of(processors, name)._kept
    part = processors.plan.inner_parts[0]
    filled = part if part._masks is None else part._masks
    return filled._allowed._kept if name == "allowed" else filled._kept


def step_of(processors, name):
    return processors.plan.parts[0] if name == "selection" else processors


@each_case
def test_as_many_are_kept_as_are_at_work(name, make, sides):
    processors = fl.LogitsProcessorList(make())
    call = step_of(processors, name)
    for B in sides[0]:
        for size in sides[1]:
            ids, scores = sizes(B, size)
            assert torch.equal(call(ids, scores), step_of(fl.LogitsProcessorList(make()), name)(ids, scores))
    assert 1 < len(kept_by(processors, name)) <= MOST


@each_case
@pytest.mark.parametrize("captured", [False, True])
def test_what_a_captured_graph_reads_stays(name, make, sides, captured, monkeypatch):
    """The capture is played: there is none on a CPU."""
    processors = fl.LogitsProcessorList(make())
    call = step_of(processors, name)
    first, *others = [(B, size) for B in sides[0] for size in sides[1]]
    call(*sizes(*first))
    with monkeypatch.context() as played:
        for module in (pointwise, mask_launch, allowed, truncate_launch):
            played.setattr(module, "is_capturing", lambda device: captured)
        call(*sizes(*first))
    made = weakref.ref(next(iter(kept_by(processors, name).values())))
    for each in others:
        call(*sizes(*each))
    gc.collect()
    assert (made() is not None) == captured


def test_what_is_asked_for_again_and_again_stays():
    made = {}
    for n in range(200):
        assert recent(made, n, lambda n=n: [n], 8) == [n]
        assert recent(made, 0, lambda: pytest.fail("made again"), 8) == [0]
    assert len(made) == 8
    assert 0 in made


def test_threads_that_ask_for_more_than_is_kept(one_thread):
    """Each gets what is right for its own."""
    processors = fl.LogitsProcessorList(BY_ROWS["fold"]())
    expected = [fl.LogitsProcessorList(BY_ROWS["fold"]())(*sizes(B, V)) for B in range(1, 2 * MOST)]

    def run(start):
        for n in range(2 * MOST - 1):
            B = (n * start) % (2 * MOST - 1)
            assert torch.equal(processors(*sizes(1 + B, V)), expected[B])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, (1, 2, 5, 11)))


def tokenizer_of(vocabulary):
    """One of transformers: those of ``tokenizers`` before 0.23 can't be kept with."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary))))


def test_patterns_from_outside():
    tokenizer = tokenizer_of({f"{i}": i for i in range(50)})
    often = fl.TokenMask.matching(tokenizer, "1")
    for n in range(3 * token_mask._MOST_MASKS):
        assert list(fl.TokenMask.matching(tokenizer, f"{n % 50}$" + "\\b" * (n // 50))) == [n % 50]
        assert fl.TokenMask.matching(tokenizer, "1") is often
    assert len(token_text.kept_with(tokenizer).masks) <= token_mask._MOST_MASKS


def test_texts_of_a_tokenizer_that_grows():
    tokenizer = tokenizer_of({"a": 0})
    for n in range(5):
        assert len(token_text.token_texts(tokenizer)) == 1 + n
        tokenizer.add_tokens([f"b{n}"])
    assert len(token_text.kept_with(tokenizer).texts) == 5


def test_ids_on_a_device():
    for n in range(2 * token_mask._MOST_IDS):
        assert token_mask.ids_on(torch.device("cpu"), (n, 3)).tolist() == [n, 3]
    assert len(token_mask._ids) <= token_mask._MOST_IDS


def test_numbers_of_selections():
    for n in range(2 * layout._MOST_NUMBERS):
        assert layout._numbers_on(torch.device("cpu"), n / 7).tolist() == [n / 7, 0.0]
    assert len(layout._numbers) <= layout._MOST_NUMBERS
