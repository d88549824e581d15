"""A vocabulary that is split over ranks: results and gradients of the whole one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.runtime.bits import pack_bits
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch
from fastlogits_kernels.training.shards import Place

import fastlogits as fl
from fastlogits.parallel.group import Group
from tests.parallel.ranks import Ranks, same

# A rank that has seen a width takes the others' for known: no rank has the same one in two splits of one size.
SPLITS = {
    "borders in tiles": (3000, 1500, 600),
    "all in one tile": (100, 1, 50, 1500),
    "at tiles": (2048, 2052),
    "beside tiles": (2049, 2047, 10),
    "one rank": (2100,),
}
TARGETS = [5, -100, 1640, 100, 101, 50, 1600, 149, 1, 3]
N = len(TARGETS)
interpreted = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter; on GPUs see parallel/test_gpus.py"
)
in_kernels = pytest.param(True, marks=interpreted)
TEMPERATURES = torch.tensor([0.7, 1.3, 0.0, 1e-31, 1.0, 0.7, 2.0, 0.01, 5.0, 1.0])
IN_SMALL = ("plain", "T by row", "one T, entropy", "ids", "offsets", "bits")
DEALT = ("k p", "lowest", "p by row", "kept of a draw")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


def hard_logits(V: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of all kinds: NaN, infinities, nothing but -inf, one token, ties, numbers far apart."""
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(V)) * 4
    logits[2] = (logits[2] * 2).round() / 2
    logits[3, V // 2], logits[4, V - 1] = float("nan"), float("inf")
    logits[5] = float("-inf")
    logits[6] = float("-inf")
    logits[6, [101, V - 3]] = 2.5
    logits[7, 149] = float("-inf")
    logits[8] *= 40
    return logits.to(dtype)


def sets_of(case: str, V: int) -> fl.KeptTokens:
    """Some tokens of each row, and all of some rows."""
    keeps = torch.rand(N, V, generator=torch.Generator().manual_seed(1)) < 0.1
    keeps[:, 5] = True
    keeps[8] = keeps[2] = True
    counts = keeps.sum(1)
    if case == "bits":
        return fl.KeptTokens(V, bits=pack_bits(keeps))
    ids = [row.nonzero().squeeze(1) for row in keeps]
    if case == "offsets":
        return fl.KeptTokens(
            V, torch.cat(ids), offsets=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        )
    room = torch.zeros(N, V // 5, dtype=torch.int64)
    for row, each in zip(room, ids, strict=True):
        row[: len(each)] = each[: len(row)]
    counts[9] = V // 5 + 1  # no room
    return fl.KeptTokens(V, room, counts)


def options_of(case: str, logits: torch.Tensor) -> dict[str, Any]:
    V = logits.shape[1]
    return {
        "plain": {},
        "T by row": {"temperature": TEMPERATURES, "entropy": True, "outside": True},
        "one T, entropy": {"temperature": 0.8, "entropy": True},
        "k p": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "entropy": True, "outside": True},
        "lowest": {"top_k": 60, "ties": "lowest", "outside": True},
        "p by row": {"top_p": torch.linspace(0.1, 1, N), "entropy": True},
        "kept of a draw": {"temperature": 1.3, "entropy": True, "outside": True},
    }.get(case, {"temperature": TEMPERATURES, "entropy": True, "outside": True}) | (
        {"kept": sets_of(case, V)} if case in ("ids", "offsets", "bits") else {}
    )


def results(logits: torch.Tensor, targets: torch.Tensor, **options: Any) -> tuple[list[Any], torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    own = leaf * 1 if options.get("inplace_backward") else leaf
    found = fl.logprobs(own, targets, **options)
    columns = [found] if isinstance(found, torch.Tensor) else list(found)
    weights = torch.arange(1.0, targets.numel() + 1).view(targets.shape)
    total = columns[0] if len(columns) == 1 or columns[1] is None else columns[0] + 0.1 * columns[1]
    (total * weights).sum().backward()
    return [None if each is None else each.detach() for each in columns], leaf.grad


def compared(group, widths, case, dtype, kernels, more):
    """Results of the ranks against those of one process, and how the ranks exchange."""
    logits, targets = hard_logits(sum(widths), dtype), torch.tensor(TARGETS)
    start = sum(widths[: group.rank()])
    own = logits[:, start : start + widths[group.rank()]]
    options = options_of(case, logits) | more
    dealt = []
    deals = Group.dealt_rows
    Group.dealt_rows = lambda *given: (dealt.append(1), deals(*given))[1]
    launch.FORCE_KERNEL = kernels
    try:
        right, gradient = results(logits, targets, **options)
        found, own_gradient = results(own, targets, group=group, **options)
    finally:
        Group.dealt_rows, launch.FORCE_KERNEL = deals, False
    torch.testing.assert_close(
        own_gradient, gradient[:, start : start + own.shape[1]], atol=1e-6, rtol=1e-2, equal_nan=True
    )
    return all(same(*pair) for pair in zip(found, right, strict=True) if pair[0] is not None), len(dealt)


def of_other_sets(group, vocab):
    """What a rank says of kept tokens of another vocabulary."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(group.rank()))
    ids = fl.KeptTokens(vocab, torch.zeros(2, 3).long(), torch.ones(2).long())
    kept = ids if vocab < 100 else fl.KeptTokens(vocab, bits=torch.zeros(2, 10).int())
    with pytest.raises(ValueError, match="kept must be") as error:
        fl.logprobs(logits, torch.tensor([1, 2]), kept=kept, group=group)
    return str(error.value)


@pytest.mark.parametrize("vocab", [7, 300])
def test_sets_of_another_vocabulary(ranks, vocab):
    said = f"kept must be of the 100 tokens of the logits, got kept tokens of {vocab}"
    assert ranks.alike(of_other_sets, 2, vocab) == said


def run(ranks, split, *given):
    return ranks.alike(compared, len(SPLITS[split]), SPLITS[split], *given)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", IN_SMALL)
def test_two_small_exchanges_have_what_the_whole_has(ranks, split, case):
    assert run(ranks, split, case, torch.float32, False, {}) == (True, 0)


@interpreted
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", IN_SMALL)
def test_kernels_have_what_the_whole_has(ranks, split, case):
    assert run(ranks, split, case, torch.bfloat16, True, {"inplace_backward": case == "ids"}) == (True, 0)


@pytest.mark.parametrize("case", DEALT)
@pytest.mark.parametrize("kernels", [False, in_kernels])
def test_rules_have_what_the_whole_has(ranks, case, kernels):
    assert run(ranks, "all in one tile", case, torch.float32, kernels, {})[0]


def own_part(group, logits: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    start = sum(widths[: group.rank()])
    return logits[..., start : start + widths[group.rank()]]


def of_other_forms(group):
    """Whether float64, no rows, texts of any strides, and targets that are none are as in one process."""
    widths = (60, 41)
    logits = torch.randn(3, 4, 101, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 101, (3, 4), generator=torch.Generator().manual_seed(1))
    found = []
    for given, where in (
        (logits.double(), targets), (logits[:0], targets[:0]), (logits[0][:0], targets[0][:0]),
        (logits.transpose(0, 1), targets.T.contiguous()), (logits[::2, 1:], targets[::2, 1:]),
        (logits[:1, :1], targets[:1, :1]),
    ):  # fmt: skip
        for options in ({"temperature": 0.7, "entropy": True}, {"top_k": 5}, {"top_k": 200, "entropy": True}):
            right, gradient = results(given, where, **options)
            mine, own_gradient = results(own_part(group, given, widths), where, group=group, **options)
            found.append(same(mine, right))
            torch.testing.assert_close(own_gradient, own_part(group, gradient, widths), atol=1e-6, rtol=1e-4)
    for kernels in (False, HAS_TRITON and not torch.cuda.is_available()):
        launch.FORCE_KERNEL = kernels
        try:
            none = fl.logprobs(own_part(group, logits[0], widths), torch.tensor([101, -1, 5, 100]), group=group)
        finally:
            launch.FORCE_KERNEL = False
        found.append(none.isnan().tolist() == [True, True, False, False])
    return found


def test_other_forms(ranks):
    assert all(ranks.alike(of_other_forms, 2))


def behind_processors(group, kernels):
    """Results behind processors that map each logit by itself, of texts and of single positions."""
    widths, B, T = (60, 41, 30), 2, 4
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(B, T, 131, generator=generator) * 3
    ids = torch.randint(40, 80, (B, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[1, 2] = -100
    listed = [
        fl.RepetitionPenaltyLogitsProcessor(1.5), fl.SuppressFirstTokens([1, 70, 130], 2),
        fl.NoRepeatNGramLogitsProcessor(2), fl.LogitBiasLogitsProcessor({70: 2.0, 100: 1.0}),
        fl.TemperatureLogitsWarper(0.8),
    ]  # fmt: skip
    sets = fl.KeptTokens(131, bits=pack_bits(torch.rand(B, T, 131, generator=generator) < 0.3))
    seen = {"input_ids": ids[:, :-1], "prompt_length": 2}
    found = []
    for own in (fold, launch):
        own.FORCE_KERNEL = kernels
    try:
        for processors, options in (
            (listed, {"entropy": True, "outside": True}), (listed, {"kept": sets}),
            ([*listed, fl.TopKLogitsWarper(7)], {}), (listed, {"top_p": 0.8, "entropy": True}),
        ):  # fmt: skip
            given = {"processors": processors, **seen, **options}
            right, gradient = results(logits, targets, **given)
            mine, own_gradient = results(own_part(group, logits, widths), targets, group=group, **given)
            found.append(same(mine, right))
            torch.testing.assert_close(own_gradient, own_part(group, gradient, widths), atol=1e-5, rtol=1e-3)
        last = {"processors": listed, **seen}
        one = fl.logprobs(own_part(group, logits[:, -1], widths), targets[:, -1], group=group, **last)
        found.append(same(one, fl.logprobs(logits[:, -1], targets[:, -1], **last)))
    finally:
        for own in (fold, launch):
            own.FORCE_KERNEL = False
    with pytest.raises(ValueError, match="processors must map each logit by itself where the vocabulary is split"):
        fl.logprobs(own_part(group, logits, widths), targets, group=group, processors=[fl.LogitNormalization()], **seen)
    return found


@pytest.mark.parametrize("kernels", [False, in_kernels])
def test_processors_take_their_parts(ranks, kernels):
    assert all(ranks.alike(behind_processors, 3, kernels))


def of_groups(group):
    """A mesh, a ``DTensor``, and a ``Group`` that knows which columns are padding."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    logits, targets = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 99, 50, 0])
    part = own_part(group, logits, (50, 50))
    mesh = DeviceMesh.from_group(group, "cpu")
    right = fl.logprobs(logits, targets)
    padded = torch.nn.functional.pad(part, (0, 7), value=9.0)
    placed = fl.Group(group, vocab_start=50 * group.rank(), vocab_size=100)
    found = [
        fl.logprobs(DTensor.from_local(part, mesh, [Shard(1)]), targets), fl.logprobs(part, targets, group=mesh),
        fl.logprobs(padded, targets, group=placed),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="logits must be a DTensor that is split over its last dimension alone"):
        fl.logprobs(DTensor.from_local(logits, mesh, [Replicate()]), targets)
    with pytest.raises(ValueError, match=r"each rank at least one token, got parts of \(50, 0\) tokens"):
        fl.logprobs(part, targets, group=fl.Group(group, vocab_size=50))
    with pytest.raises(ValueError, match="kept must have the 4 words of the whole vocabulary, got 2 words"):
        fl.logprobs(part, targets, kept=torch.zeros(4, 2, dtype=torch.int32), group=group)
    return [torch.equal(each, right) for each in found]


def test_groups_of_every_kind(ranks):
    assert all(ranks.alike(of_groups, 2))


def bytes_sent(group, V, kernels):
    """What the ranks exchange of each row, in both ways."""
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    sent = []
    kept = dist.all_reduce, dist.all_gather_into_tensor, dist.all_to_all_single
    launch.FORCE_KERNEL = kernels
    from fastlogits.parallel import group as exchanges

    gathers = exchanges._gather
    dist.all_reduce = lambda mine, **given: (sent.append(mine.nbytes), kept[0](mine, **given))
    dist.all_to_all_single = lambda *given, **named: sent.append(None)
    exchanges._gather = lambda out, mine, **given: (sent.append(mine.nbytes), gathers(out, mine, **given))
    try:
        own = own_part(group, logits, (V // 2, V - V // 2))
        fl.logprobs(own, torch.arange(8), temperature=0.7, entropy=True, group=group)
    finally:
        dist.all_reduce, _, dist.all_to_all_single = kept
        exchanges._gather, launch.FORCE_KERNEL = gathers, False
    return sent


@pytest.mark.parametrize("kernels", [False, in_kernels])
def test_what_is_sent_does_not_depend_on_the_vocabulary(ranks, kernels):
    assert ranks.alike(bytes_sent, 2, 3000, kernels) == ([8 * 24, 8 * 48] if kernels else [8 * 12, 8 * 16])
    assert Place.of([0, 1500], [1500, 1500], 0).sent == 24 + 48
    assert ranks.alike(bytes_sent, 2, 9000, kernels) == ([8 * 24, 8 * 48] if kernels else [8 * 12, 8 * 16])


def test_places():
    place = Place.of([0, 100, 101, 151], [100, 1, 50, 1500], 1)
    assert (place.slots, place.shared, place.offset, place.tiles) == (((-1, 0), (0, -1), (0, -1), (0, -1)), 1, 100, 1)
    place = Place.of([0, 3000, 4500], [3000, 1500, 600], 1)
    assert (place.slots, place.shared, place.offset, place.tiles) == (((-1, 0), (0, 1), (1, -1)), 2, 952, 2)
    assert Place.of([0, 2048], [2048, 100], 0).shared == 0


def test_what_cant_be_done_is_said():
    logits, targets = torch.zeros(1, 5), torch.tensor([2])
    with pytest.raises(ValueError, match=r"group must be a process group of .* or a DeviceMesh, got str"):
        fl.logprobs(logits, targets, group="all")


RULES = {
    "k": {"top_k": 9},
    "k p": {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "k p by row, T by row": {"temperature": TEMPERATURES, "top_k": 20, "top_p": torch.linspace(0.1, 1, N)},
    "lowest": {"top_k": 30, "top_p": 0.8, "ties": "lowest", "order": "vllm"},
    "min p first": {"top_k": 40, "min_p": 0.05, "order": "sglang"},
    "at least": {"top_k": 5, "epsilon": 0.3},
}


@interpreted
@pytest.mark.parametrize("widths", [SPLITS["borders in tiles"], (2057, 2039, 201), SPLITS["one rank"]])
@pytest.mark.parametrize("case", RULES)
def test_a_fixed_number_of_the_likeliest_tokens_has_what_the_whole_has(ranks, widths, case):
    options = {**RULES[case], "entropy": True, "outside": True}
    assert ranks.alike(compared, len(widths), widths, "plain", torch.bfloat16, True, options) == (True, 0)


def of_ties(group, widths):
    """Rows of which many tokens tie at the cut-off, where a rule takes some of them: to the very token."""
    V = sum(widths)
    logits = torch.zeros(8, V)
    logits[4:, [7, V // 2, V - 2]] = 1.0
    logits[6:, ::2] = -1.0
    # Of equal tokens the largest ids stay, as many as make up the probability.
    keeps = -(-V // 2)
    targets = torch.tensor([V - keeps, V - keeps - 1, 0, V - 1, V - keeps, 3, 1, V // 4])
    start, launch.FORCE_KERNEL = sum(widths[: group.rank()]), True
    found = []
    try:
        for options in ({"top_p": 0.5}, {"top_p": torch.linspace(0.1, 0.9, 8), "temperature": 0.5}, {"min_p": 0.5}):
            options |= {"top_k": 9, "entropy": True, "outside": True}
            right, gradient = results(logits, targets, **options)
            mine, own_gradient = results(own_part(group, logits, widths), targets, group=group, **options)
            found.append(same(mine, right))
            gradient = gradient[:, start : start + widths[group.rank()]]
            found.append(torch.equal(own_gradient != 0, gradient != 0))  # the same tokens are kept
            torch.testing.assert_close(own_gradient, gradient, atol=1e-6, rtol=1e-4)
        outside = fl.logprobs(logits, targets, top_k=9, top_p=0.5, outside=True).outside
        found.append(outside[:3].tolist() == [False, True, True])
    finally:
        launch.FORCE_KERNEL = False
    return found


@interpreted
@pytest.mark.parametrize("widths", [(1501, 901, 607), (1601, 1303)])
def test_some_of_many_tokens_that_tie(ranks, widths):
    assert all(ranks.alike(of_ties, len(widths), widths))
