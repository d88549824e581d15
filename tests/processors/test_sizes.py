"""Numbers at the limits of floats, ids from nowhere, long histories and long lists."""

import pytest
import torch
import transformers.generation.logits_process as reference
from fastlogits_kernels.pointwise import fold

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams

pytestmark = pytest.mark.usefixtures("one_thread")

INF = float("inf")
V = 50


def one_by_one(processors, ids, scores):
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def random_ids(B: int, L: int, most: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, most, (B, L), generator=torch.Generator().manual_seed(seed))


def random_scores(B: int, V: int) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(0)) * 3


# -- Scores -------------------------------------------------------------------------------------------------------


def test_subnormal_scores_are_numbers_like_others(device):
    """NaN and infinities are in the tests of each family; nothing may take these for zero either."""
    ids = random_ids(3, 9, V).to(device)
    scores = (random_scores(3, V).double() * 2.0**-140).float().to(device)
    assert bool((scores.abs() < torch.finfo(torch.float32).tiny).all())
    assert int(scores.unique().numel()) > V
    links = [
        ("RepetitionPenaltyLogitsProcessor", (1.5,)), ("TemperatureLogitsWarper", (0.5,)), ("TopKLogitsWarper", (7,)),
    ]  # fmt: skip
    ours, theirs = ([getattr(module, name)(*given) for name, given in links] for module in (fl, reference))
    assert torch.equal(fl.LogitsProcessorList(ours)(ids, scores), one_by_one(theirs, ids, scores))


# -- Ids ----------------------------------------------------------------------------------------------------------

WILD = [3, -1, V, 2**40, -(2**40), 3, 5, -7, 3, 2**62, -(2**63), V + 1]
READERS = {
    "repetition": lambda: fl.RepetitionPenaltyLogitsProcessor(1.5),
    "presence": lambda: fl.PresencePenaltyLogitsProcessor(0.5),
    "frequency": lambda: fl.FrequencyPenaltyLogitsProcessor(0.5),
    "unigrams": lambda: fl.NoRepeatNGramLogitsProcessor(1),
}
PATHS = ["torch", "kernels"]


@pytest.fixture
def path(request, monkeypatch, device):
    if device == "cpu" and request.param == "kernels":
        monkeypatch.setattr(fold, "FORCE_KERNEL", True)
    if device == "cuda" and request.param == "torch":
        pytest.skip("on a GPU the kernels run")


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("what", READERS)
def test_ids_outside_the_vocabulary_count_for_nothing(what, path, device):
    """transformers refuses some of them, with an error of torch; on a GPU that ends the process."""
    processors, scores = fl.LogitsProcessorList([READERS[what]()]), random_scores(1, V).to(device)
    wild = torch.tensor([WILD], device=device)
    inside = wild[(wild >= 0) & (wild < V)][None]
    assert torch.equal(processors(wild, scores, prompt_length=0), processors(inside, scores, prompt_length=0))


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_ids_outside_the_vocabulary_are_told_apart_in_sequences(path, device):
    """The 32 low bits of an id are not the id."""
    fake = 2**32
    ids = torch.tensor([[7, 8, 9, 7 + fake, 8 + fake]], device=device)
    scores = torch.zeros(1, V, device=device)
    for name, arguments in {
        "NoRepeatNGramLogitsProcessor": (3,),
        "NoBadWordsLogitsProcessor": ([[7, 8, 9], [8, 4]],),
        "SequenceBiasLogitsProcessor": ({(7, 8, 9): 1.0, (8, 4): 2.0},),
    }.items():
        ours, theirs = (getattr(module, name)(*arguments)(ids, scores) for module in (fl, reference))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_sequences_where_nothing_is_generated_yet(path, device):
    ids, scores = torch.zeros(2, 0, dtype=torch.int64, device=device), random_scores(2, V).to(device)
    source = random_ids(1, 9, V).to(device)
    expected, processors = (
        [
            module.SequenceBiasLogitsProcessor({(1, 2): 1.0, (3,): 2.0}),
            module.EncoderNoRepeatNGramLogitsProcessor(2, source),
            module.NoRepeatNGramLogitsProcessor(2),
        ]
        for module in (reference, fl)
    )
    expected, processors = one_by_one(expected, ids, scores), fl.LogitsProcessorList(processors)
    for cache_position in (None, -1, torch.tensor(-1, device=device), torch.tensor([-1, -1], device=device)):
        assert torch.equal(processors(ids, scores, prompt_length=0, cache_position=cache_position), expected)


def test_a_history_of_padding(device):
    """Left padding as long as the text, and rows of nothing else."""
    pad, eos = 0, 1
    ids = random_ids(3, 40, V).to(device)
    ids[0, :30] = pad
    ids[1] = pad
    scores = random_scores(3, V).to(device)
    made = [
        [
            module.RepetitionPenaltyLogitsProcessor(1.3),
            module.NoRepeatNGramLogitsProcessor(3),
            module.NoBadWordsLogitsProcessor([[pad, pad, 5], [pad, 6], [pad]], eos),
            module.MinLengthLogitsProcessor(41, eos, device),
        ]
        for module in (fl, reference)
    ]
    assert torch.equal(fl.LogitsProcessorList(made[0])(ids, scores), one_by_one(made[1], ids, scores))


# -- Sizes --------------------------------------------------------------------------------------------------------


def test_a_history_of_a_million_tokens(device):
    L, wide = 1_000_000, 1000
    ids = random_ids(1, L, wide - 10).to(device)
    ids[:, -3:] = torch.tensor([5, 6, 7])
    scores = random_scores(1, wide).to(device)
    ours = fl.LogitsProcessorList(
        [
            fl.RepetitionPenaltyLogitsProcessor(1.3),
            fl.FrequencyPenaltyLogitsProcessor(1e-3),
            fl.NoBadWordsLogitsProcessor([[5, 6, 7, 8]]),
            fl.NoRepeatNGramLogitsProcessor(3),
        ]
    )
    found = ours(ids, scores, prompt_length=0)
    counts = torch.bincount(ids[0], minlength=wide)
    penalized = torch.where(scores > 0, scores / 1.3, scores * 1.3)
    expected = torch.where(counts > 0, penalized, scores) - 1e-3 * counts
    text = ids[0].tolist()
    banned = {8, *(c for a, b, c in zip(text, text[1:], text[2:], strict=False) if (a, b) == (6, 7))}
    expected[0, sorted(banned)] = -INF
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"])
def test_ten_thousand_sequences(name, device):
    wide, most = 12_000, 10_000
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 5, (most,), generator=generator).tolist()
    words = [(*torch.randint(0, 12, (n - 1,), generator=generator).tolist(), i) for i, n in enumerate(lengths)]
    argument = dict.fromkeys(words, 0.5) if name.startswith("Sequence") else [list(word) for word in words]
    ids, scores = random_ids(2, 30, 12).to(device), random_scores(2, wide).to(device)
    ours, theirs = (getattr(module, name)(argument)(ids, scores) for module in (fl, reference))
    assert bool((ours != scores).any())
    assert torch.equal(ours, theirs)


def test_ten_thousand_biases_of_tokens(device):
    wide, most = 12_000, 10_000
    bias = {token: token / most for token in range(most)}
    scores = random_scores(1, wide).to(device)
    expected = scores + torch.tensor([bias.get(token, 0.0) for token in range(wide)], device=device)
    listed = fl.LogitsProcessorList([fl.LogitBiasLogitsProcessor(bias)])
    assert torch.equal(listed(random_ids(1, 3, 9).to(device), scores), expected)
    batch = BatchProcessor(1, wide, device, max_length=8, max_listed=2 * most)
    batch.add(RequestParams(logit_bias=bias))
    assert torch.equal(batch.apply(scores, [0]), expected)


@pytest.mark.parametrize(
    "make", [fl.SuppressTokensLogitsProcessor, lambda mask: fl.SuppressTokensAtBeginLogitsProcessor(mask, 1)]
)
def test_a_mask_of_another_vocabulary_is_refused_where_ids_are_ignored(make):
    ids, scores = torch.tensor([[1]]), torch.zeros(1, 6)
    assert torch.equal(make([3, 50])(ids, scores), make(fl.TokenMask.from_ids([3], 6))(ids, scores))
    for processors in (
        make(fl.TokenMask.from_ids([50], 64)),
        fl.LogitsProcessorList([make(fl.TokenMask.from_ids([5], 9))]),
    ):
        with pytest.raises(ValueError, match=r"suppress_tokens: the mask has a vocabulary of \d+ tokens, but 6 are"):
            processors(ids, scores)
