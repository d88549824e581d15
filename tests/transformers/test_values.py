"""The numbers of a list, put into what a graph has captured: it then draws as a list with those numbers does."""

import pytest
import torch
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch

import fastlogits as fl
from fastlogits.plan.run import Run
from fastlogits.transformers.accelerate import RunList
from fastlogits.transformers.loop import plan_of
from fastlogits.transformers.step import Chooser
from tests.installed import TAKES_LENGTHS_OF_ROWS
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

B, L, PROMPT_LENGTH = 2, 12, 7
IGNORED = torch.tensor([0, 3])


def ngrams(size):
    return [fl.NoRepeatNGramLogitsProcessor(size)]


# A list, and others of its form.
SAME = {
    "temperature": [
        [fl.TemperatureLogitsWarper(t), fl.TopKLogitsWarper(k), fl.TopPLogitsWarper(p), fl.MinPLogitsWarper(m)]
        for t, k, p, m in ((0.7, 20, 0.9, 0.05), (0.1, 5, 0.99, 0.2))
    ],
    "penalties": [
        [fl.RepetitionPenaltyLogitsProcessor(a), fl.PresencePenaltyLogitsProcessor(b), fl.TemperatureLogitsWarper(a)]
        for a, b in ((1.3, 0.5), (0.5, -2.0))
    ],
    "frequency": [[fl.FrequencyPenaltyLogitsProcessor(a), fl.TopKLogitsWarper(9)] for a in (0.5, 30.0)],
    "lengths": [
        [fl.MinLengthLogitsProcessor(n, [2, 5, 9, *range(30, 60)]), fl.SuppressFirstTokens([*range(60, 90)], window=w)]
        for n, w in ((8, 1), (L + 5, 9), (L, 5))
    ],
    "decay": [[fl.ExponentialDecayLengthPenalty((s, f), [2, 5], PROMPT_LENGTH)] for s, f in ((1, 1.5), (4, 3.0))],
    "forced": [[fl.ForcedEOSTokenLogitsProcessor(n, 5)] for n in (L, L + 1, L + 2)],
    "sources": [
        [fl.EncoderRepetitionPenaltyLogitsProcessor(50.0, ids), fl.EncoderNoRepeatNGramLogitsProcessor(1, ids + 1)]
        for ids in (torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[50, 60, 7], [80, 90, 9]]))
    ],
}  # fmt: skip
OTHER = {
    "a rule less": ([fl.TopKLogitsWarper(5), fl.TopPLogitsWarper(0.9)], [fl.TopKLogitsWarper(5)]),
    "another size": (ngrams(2), ngrams(3)),
    "other tokens": ([fl.SuppressTokensLogitsProcessor([5])], [fl.SuppressTokensLogitsProcessor([6])]),
    "other gated tokens": ([fl.SuppressFirstTokens([5])], [fl.SuppressFirstTokens([6])]),
    "other words": ([fl.NoBadWordsLogitsProcessor([[5, 6]])], [fl.NoBadWordsLogitsProcessor([[5, 7]])]),
    "other ends": ([fl.ForcedEOSTokenLogitsProcessor(L, 5)], [fl.ForcedEOSTokenLogitsProcessor(L, 6)]),
    "nothing added": ([fl.PresencePenaltyLogitsProcessor(0.0)], [fl.PresencePenaltyLogitsProcessor(0.5)]),
    "other penalties of repetitions": ([fl.DRYLogitsProcessor(0.8)], [fl.DRYLogitsProcessor(0.9)]),
    "another part that is looked at": ([fl.DRYLogitsProcessor(0.8)], [fl.DRYLogitsProcessor(0.8, range_=5)]),
    "many kept": ([fl.TopKLogitsWarper(5)], [fl.TopKLogitsWarper(3000)]),
}
if TAKES_LENGTHS_OF_ROWS:
    SAME["padding"] = [
        [fl.RepetitionPenaltyLogitsProcessor(0.01, prompt_ignore_length=ignored)] for ignored in (IGNORED, IGNORED + 5)
    ]
    OTHER["by row or not"] = (
        [fl.RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=IGNORED)],
        [fl.RepetitionPenaltyLogitsProcessor(3.0)],
    )


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def moved(processors, device):
    for processor in processors:
        for name, value in vars(processor).items():
            if isinstance(value, torch.Tensor):
                setattr(processor, name, value.to(device))
    return processors


def chooser(processors, device, do_sample=True):
    plan = plan_of(RunList(moved(processors, device), PROMPT_LENGTH), PROMPT_LENGTH)
    return Chooser(plan, do_sample, False)


class Drawn:
    """What choosers say of the same logits."""

    def __init__(self, device, vocab=VOCAB_SIZE):
        generator = torch.Generator().manual_seed(0)
        self.logits = [(torch.randn(B, vocab, generator=generator) * 3).to(device) for _ in range(4)]
        self.ids = torch.randint(0, 97, (B, L + 8), generator=generator).to(device)
        self.at = torch.tensor(L - 1, device=device)
        self.run = Run(torch.tensor(PROMPT_LENGTH, device=device), self.at)
        self.seeds = torch.arange(B, device=device)

    def by(self, choose):
        said = []
        for step, logits in enumerate(self.logits):
            self.at.fill_(L - 2 + step)
            said.append(choose(self.ids, logits, self.seeds, self.seeds + step, self.run)[0].tolist())
        return said


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_numbers_that_are_put_in(name, do_sample, device):
    drawn = Drawn(device)
    first = chooser(SAME[name][0], device, do_sample)
    captured = first.values(drawn.logits[0])
    if captured is None:
        pytest.skip("the likeliest token is found behind the truncations")
    before = drawn.by(first)
    said = []
    for processors in [*SAME[name][1:], SAME[name][0]]:
        other = chooser(processors, device, do_sample)
        values = other.values(drawn.logits[0])
        assert values.form == captured.form
        wanted = drawn.by(other)
        values.put_into(captured)
        said.append(drawn.by(first))
        assert said[-1] == wanted
    assert said[-1] == before
    if do_sample and name != "frequency":  # of few tokens, which are hardly drawn again
        assert any(each != before for each in said)


@pytest.mark.parametrize("name", OTHER)
def test_lists_of_another_form(name, device):
    logits = torch.zeros(B, 4000, device=device)
    one, other = (chooser(list(processors), device).values(logits) for processors in OTHER[name])
    assert one.form != other.form


def test_what_has_more_than_numbers(device):
    """Processors that run before the draw, and scores that somebody asks for, which other kernels write."""
    logits = torch.zeros(B, VOCAB_SIZE, device=device)
    assert chooser([fl.TopKLogitsWarper(5), fl.TemperatureLogitsWarper(0.5)], device).values(logits) is None
    plan = plan_of(RunList([fl.TopKLogitsWarper(5)], PROMPT_LENGTH), PROMPT_LENGTH)
    assert Chooser(plan, True, True).values(logits) is None


def test_nobody_elses_numbers_are_written(device):
    drawn = Drawn(device)
    bystander = fl.Sampler([fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(20)])
    wanted = bystander(drawn.logits[0], 3, 4).tokens
    first, other = (
        chooser([fl.TemperatureLogitsWarper(t), fl.TopKLogitsWarper(k)], device) for t, k in ((0.7, 20), (5.0, 40))
    )
    other.values(drawn.logits[0]).put_into(first.values(drawn.logits[0]))
    assert torch.equal(bystander(drawn.logits[0], 3, 4).tokens, wanted)
    assert drawn.by(first) == drawn.by(other)
