"""Log-probabilities for training, against their definition in float64 and against what a sampler reports."""

import math

import pytest
import torch
from fastlogits_kernels.runtime import backend as registry
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch
from fastlogits_kernels.training import logprobs as kernels

import fastlogits as fl
from tests.oracle import broken_rows, hard_rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
kernel = pytest.param("kernel", marks=pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"))
V = 700


@pytest.fixture(params=["torch", kernel])
def backend(request, monkeypatch):
    """Both ways of the operations, wherever the tensors are."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", request.param == "kernel")
    if request.param == "torch" and GPU:
        lost = torch.device("cuda", torch.cuda.current_device())
        for operation in registry._operations:
            monkeypatch.setitem(operation.lost, lost, "for this test")
    return request.param


RULES = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "k p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "lowest": {"top_k": 20, "top_p": 0.9, "ties": "lowest"},
    "p": {"top_p": 0.8, "temperature": 1.3},
    "min_p": {"min_p": 0.05},
    "typical": {"typical_p": 0.8, "temperature": 0.9},
    "greedy": {"temperature": 0.0, "top_k": 3},
    "rows": {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 2.0, 1.0, 0.4]),
        "top_p": torch.tensor([0.9, 0.9, 1.0, 0.5, 0.99, 1.0]),
        "top_k": torch.tensor([5, 50, 700, 3, 699, 900]),
    },
}


def spared(backend, dtype, options, taken):
    """Skip what is slow in the interpreter: of most rules one dtype is enough."""
    if backend == "kernel" and not GPU and dtype != taken and options not in ("k p", "temperature"):
        pytest.skip("slow in the interpreter")


def on_device(options):
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in options.items()}


def some_rows(dtype=torch.float32):
    rows = hard_rows(V)
    return torch.stack([rows[name] for name in ("gauss", "ties", "zipf", "masked", "spike .95", "gauss")]).to(dtype)


def some_targets(logits):
    """Tokens that a sampler draws, and in two rows such as it wouldn't."""
    targets = fl.sample(logits.float(), seeds=3, positions=1, temperature=1.0).tokens
    targets[1] = logits[1].argmin()
    targets[4] = logits[4].argmin()
    return targets


def defined(logits, targets, options):
    """By the definition, in float64: processed logits as the sampler has them, and the target with them."""
    logits = logits.detach().cpu().float()
    sampler = fl.Sampler(**{name: value.cpu() if torch.is_tensor(value) else value for name, value in options.items()})
    processed, greedy = sampler._distribution(logits)
    temperature = torch.as_tensor(1.0 if sampler._temperature is None else sampler._temperature).expand(len(logits))
    divisor = torch.where(temperature > 0, temperature, 1.0)
    if greedy is not None:
        divisor = torch.where(greedy, 1.0, divisor)
    kept = processed > -math.inf
    own = targets.cpu().unsqueeze(1)
    outside = ~kept.gather(1, own).squeeze(1)
    kept.scatter_(1, own, True)
    x = (logits.double() / divisor.double().unsqueeze(1)).masked_fill(~kept, -math.inf)
    return x, kept, divisor, outside


def oracle(logits, targets, options, weights, entropy_weights):
    """Log-probabilities, entropies, what is outside, and the gradient of a weighted sum of the first two."""
    _, kept, divisor, outside = defined(logits, targets, options)
    leaf = logits.detach().cpu().double().requires_grad_()
    x = (leaf / divisor.double().unsqueeze(1)).masked_fill(~kept, -math.inf)
    logarithms = x.log_softmax(-1)
    found = logarithms.gather(1, targets.cpu().unsqueeze(1)).squeeze(1)
    p = logarithms.exp()
    entropy = -torch.where(p > 0, p * logarithms.masked_fill(p == 0, 0.0), 0.0).sum(-1)
    finite = torch.where(found.isfinite(), found, 0.0)
    ((finite * weights.cpu()).sum() + (entropy * entropy_weights.cpu()).sum()).backward()
    return found.detach(), entropy.detach(), outside, leaf.grad


WEIGHTS = torch.tensor([1.0, -2.0, 3.0, 0.5, 1.0, 0.0], device=DEVICE)
ENTROPY_WEIGHTS = torch.tensor([0.1, 0.0, -0.2, 0.3, 0.0, 0.0], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", RULES)
def test_is_what_it_is_defined_to_be(backend, options, dtype):
    spared(backend, dtype, options, torch.bfloat16)
    logits = some_rows(dtype).to(DEVICE)
    targets = some_targets(logits)
    given = on_device(RULES[options])
    found, entropy, outside, gradient = oracle(logits, targets, given, WEIGHTS, ENTROPY_WEIGHTS)
    leaf = logits.clone().requires_grad_()
    mine = fl.logprobs(leaf, targets, entropy=True, outside=True, **given)
    torch.testing.assert_close(mine.logprobs.detach().cpu().double(), found, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(mine.entropy.detach().cpu().double(), entropy, atol=3e-5, rtol=1e-5)
    assert mine.outside.tolist() == (outside | (found == -math.inf)).tolist()
    assert mine.logprobs.dtype == torch.float32
    ((mine.logprobs.nan_to_num(0, 0, 0) * WEIGHTS).sum() + (mine.entropy * ENTROPY_WEIGHTS).sum()).backward()
    rounding = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(leaf.grad.cpu().double(), gradient, atol=rounding, rtol=rounding)
    assert not leaf.grad[5].any()  # nothing came
    alone = fl.logprobs(logits, targets, **given)
    assert torch.equal(alone, mine.logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", RULES)
def test_is_what_the_sampler_reports_bit_for_bit(backend, options, dtype):
    """Whatever the batch, the strides, and what the kept tokens are known from."""
    spared(backend, dtype, options, torch.float32)
    logits = some_rows(dtype).to(DEVICE)
    given = on_device(RULES[options])
    drawn = fl.sample(logits, seeds=11, positions=4, logprobs="processed", return_kept="bits", **given)
    again = fl.logprobs(logits, drawn.tokens, outside=True, **given)
    assert torch.equal(again.logprobs, drawn.logprobs)
    assert not again.outside.any()
    wide = torch.full((6, 2 * V + 5), math.nan, dtype=dtype, device=DEVICE)
    wide[:, 5::2] = logits
    assert torch.equal(fl.logprobs(wide[:, 5::2], drawn.tokens, **given), drawn.logprobs)
    rows = torch.tensor([4, 1], device=DEVICE)
    some = {name: value[rows] if torch.is_tensor(value) else value for name, value in given.items()}
    assert torch.equal(fl.logprobs(logits[rows], drawn.tokens[rows], **some), drawn.logprobs[rows])
    beside = {"temperature": given["temperature"]} if "temperature" in given else {}
    of_sets = fl.logprobs(logits, drawn.tokens, kept=drawn.kept, outside=True, **beside)
    # Where masks are all that dropped anything, sums are of other parts.
    masked = torch.isneginf(logits).any(1)
    assert torch.equal(of_sets.logprobs[~masked], drawn.logprobs[~masked])
    torch.testing.assert_close(of_sets.logprobs, drawn.logprobs, atol=1e-6, rtol=1e-6)
    assert not of_sets.outside.any()


def test_long_rows_whose_candidates_are_a_part_of_them(backend):
    """A vocabulary of which a selection collects candidates, keeps some for certain, or processes all."""
    size = 40000 if GPU or backend == "torch" else 9000
    generator = torch.Generator().manual_seed(5)
    gauss = torch.randn(3, size, generator=generator) * torch.tensor([[3.0], [1.5], [3.0]])
    flat = torch.randn(1, size, generator=generator) * 0.01
    zipf = (-1.5 * torch.arange(1, size + 1).float().log())[torch.randperm(size, generator=generator)].unsqueeze(0)
    logits = torch.cat((gauss, flat, zipf)).to(DEVICE)
    for options in ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"top_k": 2000, "temperature": 0.8}):
        drawn = fl.sample(logits, seeds=1, positions=2, logprobs="processed", **options)
        leaf = logits.clone().requires_grad_()
        found = fl.logprobs(leaf, drawn.tokens, entropy=True, **options)
        assert torch.equal(found.logprobs, drawn.logprobs)
        # What was kept for certain is weighed where no entropy is asked for.
        assert torch.equal(fl.logprobs(logits, drawn.tokens, **options), drawn.logprobs)
        weights = torch.ones(5, device=DEVICE)
        wanted, entropy, _, gradient = oracle(logits, drawn.tokens, options, weights, 0 * weights)
        torch.testing.assert_close(found.logprobs.cpu().double(), wanted, atol=3e-5, rtol=1e-5)
        torch.testing.assert_close(found.entropy.cpu().double(), entropy, atol=3e-5, rtol=3e-5)
        found.logprobs.sum().backward()
        torch.testing.assert_close(leaf.grad.cpu().double(), gradient, atol=3e-5, rtol=1e-4)


@pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    "options", [{"top_k": 50, "top_p": 0.9, "temperature": 0.7}, {"top_p": torch.tensor([0.9, 1.0, 0.5, 0.9, 0.3])}]
)
def test_rows_in_parts_are_as_all_at_once(monkeypatch, options):
    """However many parts there are, and whether they divide the rows or not."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    rows = hard_rows(9000)
    logits = torch.stack([rows[name] for name in ("gauss", "zipf", "masked", "equal", "spike .95")])
    logits[0] /= 2  # a nucleus of thousands, most of them kept for certain
    logits, given = logits.bfloat16().to(DEVICE), on_device(options)
    targets = logits.argmax(-1)
    targets[1], targets[4] = 77, -100
    sizes = []
    launch_part = kernels._launch_selected

    def noted(part, task, selection, into):
        sizes.append(len(part))
        launch_part(part, task, selection, into)

    monkeypatch.setattr(kernels, "_launch_selected", noted)

    def results(most):
        monkeypatch.setattr(kernels, "SHARE", 0)
        monkeypatch.setattr(kernels, "_LEAST_ROWS", most)
        sizes.clear()
        leaf = logits.clone().requires_grad_()
        found = fl.logprobs(leaf, targets, outside=True, **given)
        found.logprobs.sum().backward()
        return [*sizes], (found.logprobs, found.outside, leaf.grad)

    at_once, expected = results(5)
    assert at_once == [5]
    for most, parts in ((4, [2, 2, 1]), (2, [1] * 5)):
        found, outcome = results(most)
        assert found == parts
        assert all(map(torch.equal, outcome, expected))


FORMS = ["bits", "ids", 300]


@pytest.mark.parametrize("form", FORMS)
def test_kept_sets_in_each_form(backend, form):
    """They say what is kept, and a target that isn't among them counts as kept; a row may keep all tokens."""
    logits = some_rows()[[0, 2, 5]].to(DEVICE)
    top_k = torch.tensor([20, V, 300], device=DEVICE)
    drawn = fl.sample(logits, seeds=1, positions=0, top_k=top_k, logprobs="processed", return_kept=form)
    kept = torch.stack([row >= row.topk(int(k)).values[-1] for row, k in zip(logits, top_k, strict=True)])
    assert torch.equal(drawn.kept.mask(), kept)
    targets = torch.stack((drawn.tokens[0], drawn.tokens[1], logits[2].argmin()))
    leaf = logits.clone().requires_grad_()
    found = fl.logprobs(leaf, targets, temperature=0.7, kept=drawn.kept, entropy=True, outside=True)
    assert found.outside.tolist() == [False, False, True]
    kept[2, targets[2]] = True
    other = logits.double().clone().requires_grad_()
    x = (other / 0.7).masked_fill(~kept, -math.inf).log_softmax(-1)
    right = x.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.logprobs.double(), right, atol=1e-5, rtol=1e-5)
    right.sum().backward()
    found.logprobs.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), other.grad, atol=1e-5, rtol=1e-5)
    # In the memory of the logits.
    memory = logits.clone().requires_grad_()
    product = memory * 1.0
    fl.logprobs(product, targets, temperature=0.7, kept=drawn.kept, inplace_backward=True).sum().backward()
    torch.testing.assert_close(product.detach(), leaf.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(memory.grad, leaf.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", ["bits", 40])
def test_a_kept_set_is_that_of_a_greedy_row_too(backend, form):
    """Though sampling itself keeps all tokens of a greedy row."""
    V = 300
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    kept = fl.sample(logits, seeds=0, positions=0, top_k=20, return_kept=form).kept
    targets = logits.argmax(-1)
    temperature = torch.tensor([0.0, 0.5, 0.0], device=DEVICE)
    found = fl.logprobs(logits, targets, kept=kept, temperature=temperature)
    divided = torch.where(kept.mask(), logits / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1), -math.inf)
    expected = divided.double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_there_are_no_second_derivatives(backend, in_place):
    leaf = torch.randn(3, 40, device=DEVICE, requires_grad=True)
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    value = fl.logprobs(leaf * 1, targets, inplace_backward=in_place).sum() + leaf.pow(3).sum()
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), leaf)


def test_no_room_for_kept_ids(backend):
    logits = some_rows()[:3].to(DEVICE)
    kept = fl.sample(logits, seeds=0, positions=0, top_k=40, return_kept=30).kept
    assert kept.counts.tolist() == [40] * 3 or kept.counts.min() >= 40  # ties
    targets = logits.argmax(-1)
    assert fl.logprobs(logits, targets, kept=kept).isnan().all()
    with pytest.raises(ValueError, match=r"room for \d+ ids in a row, got room for 30"):
        fl.logprobs(logits, targets, kept=kept, strict=True)


def test_rows_without_a_distribution(backend):
    rows = broken_rows(V)
    logits = torch.stack([*rows.values()]).to(DEVICE).requires_grad_()
    targets = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    right = logits.detach().cpu().double().log_softmax(-1)[:, 0]
    for options in ({}, {"top_k": 7}, {"temperature": 0.5, "top_p": 0.9}):
        found = fl.logprobs(logits, targets, **options)
        assert found[right.isnan().to(DEVICE)].isnan().all()
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient[found.isnan()].isnan().all()
    (gradient,) = torch.autograd.grad((fl.logprobs(logits, targets) * 0).nan_to_num(0).sum(), logits)
    assert not gradient.any()


def test_targets_that_are_left_out(backend):
    logits = some_rows().to(DEVICE).requires_grad_()
    targets = some_targets(logits.detach())
    whole = fl.logprobs(logits, targets, top_k=20, entropy=True)
    targets[[0, 3]] = -7
    some = fl.logprobs(logits, targets, top_k=20, entropy=True, outside=True, ignore_index=-7)
    assert some.logprobs[[0, 3]].tolist() == some.entropy[[0, 3]].tolist() == [0, 0]
    assert torch.equal(some.logprobs[[1, 2, 4, 5]], whole.logprobs[[1, 2, 4, 5]])
    assert some.outside.tolist() == [False, True, False, False, False, False]
    (gradient,) = torch.autograd.grad(some.logprobs.sum(), logits)
    assert not gradient[[0, 3]].any()
    assert gradient[[1, 2]].any(1).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}, {"typical_p": 0.9}])
def test_texts_of_any_strides(backend, options):
    """[B, T, V] without its last position, which is no view of rows; the gradient in place of the logits too."""
    logits = torch.randn(2, 4, V, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 2
    targets = torch.randint(V, (2, 3), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    leaf = logits.clone().requires_grad_()
    found = fl.logprobs(leaf[:, :-1], targets, **options)
    flat = fl.logprobs(logits[:, :-1].reshape(6, V), targets.view(6), **options)
    assert torch.equal(found.detach().view(6), flat)
    found.sum().backward()
    memory = logits.clone().requires_grad_()
    product = memory * 1.0
    fl.logprobs(product[:, :-1], targets, inplace_backward=True, **options).sum().backward()
    assert torch.equal(product[:, :-1].detach(), leaf.grad[:, :-1])
    assert torch.equal(product[:, -1], logits[:, -1])
    assert torch.equal(memory.grad, leaf.grad)


@pytest.mark.parametrize("options", RULES)
def test_gradcheck(options, one_thread):
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(6, 12, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    targets = torch.randint(12, (6,), generator=generator)
    given = RULES[options]
    if options == "rows":
        given = given | {"top_k": torch.tensor([5, 4, 12, 3, 11, 900])}

    def both(x):
        return fl.logprobs(x, targets, entropy=True, **given)[:2]

    assert torch.autograd.gradcheck(both, (logits,), eps=1e-7, atol=1e-5)


def test_gradcheck_of_kept_sets(one_thread):
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(3, 12, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    kept = fl.KeptTokens(12, torch.tensor([[1, 2, 3], [0, 0, 0], [4, 5, 6]]), torch.tensor([3, 12, 2]))
    targets = torch.tensor([2, 7, 11])
    assert torch.autograd.gradcheck(lambda x: fl.logprobs(x, targets, kept=kept, temperature=0.6), (logits,))


# -- With the rest of torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_compiled_checkpointed_and_under_autocast(backend, options):
    logits = some_rows().to(DEVICE)
    targets = some_targets(logits)

    def loss(x):
        found = fl.logprobs(x * 1.5, targets, entropy=True, **options)
        return found.logprobs.sum() + found.entropy.mean()

    def gradient(function):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        return leaf.grad

    right = gradient(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), right)
    checkpointed = gradient(lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False))
    assert torch.equal(checkpointed, right)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fl.logprobs(logits.bfloat16(), targets, **options).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"kept": True}])
def test_opcheck(backend, options):
    logits = some_rows().to(DEVICE).requires_grad_()
    targets = some_targets(logits.detach())
    task = kernels.Task(targets, None, (), None, -100)
    if "top_k" in options:
        task = task._replace(rules=fl.SamplingParams(top_k=20).rules)
    if "kept" in options:
        task = task._replace(kept=fl.sample(logits, seeds=0, positions=0, top_k=9, return_kept=40).kept.flat(6))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (logits, targets, *kernels.flattened(task), True)
    torch.library.opcheck(torch.ops.fastlogits.logprobs.default, given, test_utils=tests)


def test_empty(backend):
    logits = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    found = fl.logprobs(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), top_k=2, entropy=True)
    assert found.logprobs.shape == found.entropy.shape == (0,)
    found.logprobs.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_a_vocabulary_of_one_token(backend):
    logits = torch.zeros(2, 1, device=DEVICE, requires_grad=True)
    found = fl.logprobs(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), temperature=0.5)
    found.sum().backward()
    assert not found.any()
    assert not logits.grad.any()


@gpu
@pytest.mark.parametrize("most", [256, 4], ids=["at once", "in parts"])
@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}])
def test_captured_and_without_waiting(monkeypatch, options, most):
    """One graph serves other logits and targets, forward and backward; also with parts on two streams."""
    monkeypatch.setattr(kernels, "SHARE", 0)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", most)
    logits = torch.randn(9, 32000, device=DEVICE).bfloat16().requires_grad_()
    targets = torch.randint(32000, (9,), device=DEVICE)

    def step():
        found = fl.logprobs(logits, targets, **options)
        return found, torch.autograd.grad(found.sum(), logits)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for scale in range(1, 4):
        with torch.no_grad():
            logits.normal_().mul_(scale)
        targets.random_(32000)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, step()))


# -- What is refused --------------------------------------------------------------------------------------------------


def test_what_cant_be_done_is_said():
    logits, targets = torch.zeros(2, 5), torch.tensor([1, 4])
    kept = fl.KeptTokens(5, bits=torch.ones(2, 1, dtype=torch.int32))
    for message, call in {
        r"logits must be float32, bfloat16 or float16 of shape \(N, V\) or \(B, T, V\), got torch.int64": (
            lambda: fl.logprobs(logits.long(), targets)
        ),
        r"targets must be tokens from 0 to 4, or the ignore_index -100, got 5": (
            lambda: fl.logprobs(logits, targets + 1)
        ),
        r"targets must be of shape \(2,\)": lambda: fl.logprobs(logits, targets[:1]),
        r"targets must be a tensor of int64 or int32, got torch.float32": lambda: fl.logprobs(logits, targets.float()),
        r"top_p must be between 0 and 1 \(1 turns it off\), got 1.5": lambda: fl.logprobs(logits, targets, top_p=1.5),
        r"temperature must be a number or have a value for each of 2 targets, got 3": (
            lambda: fl.logprobs(logits, targets, temperature=torch.ones(3))
        ),
        r"kept must be None where truncations are given, got kept tokens beside top-k 2": (
            lambda: fl.logprobs(logits, targets, kept=kept, top_k=2)
        ),
        r"kept must be of the 5 tokens of the logits, got kept tokens of 6": (
            lambda: fl.logprobs(logits, targets, kept=fl.KeptTokens(6, bits=kept.bits))
        ),
        r"kept must have 2 rows, one for each target, got \(1,\)": lambda: fl.logprobs(logits, targets, kept=kept[:1]),
        r"targets must be among the kept tokens with strict=True, got 1 of 2 outside, the first in row 1": (
            lambda: fl.logprobs(logits, targets, kept=fl.KeptTokens(5, bits=kept.bits * 2), strict=True)
        ),
        r"logits must have memory of their own for inplace_backward": (
            lambda: fl.logprobs(torch.zeros(1, 5).expand(2, 5), targets, inplace_backward=True)
        ),
        r"ignore_index must be an integer, got None": lambda: fl.logprobs(logits, targets, ignore_index=None),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
