"""What a batch is asked for and can't do: refused where the host knows, defined where only the device does."""

import copy
import pickle

import numpy as np
import pytest
import torch
from fastlogits_kernels.serving import steps
from fastlogits_kernels.serving.layout import StepRows

from fastlogits import BatchProcessor, RequestParams, TokenMask
from tests.serving.test_batch import V, logits_of, path  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INF = float("inf")
ALL_ALLOWED = -1


def batch_of(device, *params, **more):
    batch = BatchProcessor(max(4, len(params)), V, device, **{"max_length": 8, "max_logprobs": 2, "max_rows": 8} | more)
    for each in params:
        batch.add(RequestParams(**each), [1, 2])
    return batch


def known_to_the_host(slots):
    """Slots in all ways in which the host knows them."""
    return [slots, tuple(slots), np.asarray(slots), np.asarray(slots, dtype=np.int16), torch.tensor(slots)]


def tables_of(batch):
    return [table.clone() for table in batch._slots[:5]]


def assert_unchanged(batch, before):
    assert all(torch.equal(now, then) for now, then in zip(batch._slots[:5], before, strict=True))


# -- Bitmasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["apply_", "apply", "sample"])
def test_a_request_that_requires_a_bitmask_is_refused_without(call, device):
    batch = batch_of(device, {"bitmask": True}, {}, {"bitmask": False})
    logits, mask = logits_of(2).to(device), torch.full((2, 4), ALL_ALLOWED, dtype=torch.int32, device=device)
    for slots in known_to_the_host([1, 0]):
        with pytest.raises(ValueError, match="bitmask must be given, got None, but the request of slot 0 has"):
            getattr(batch, call)(logits.clone(), slots)
        getattr(batch, call)(logits.clone(), slots, bitmask=mask)
    getattr(batch, call)(logits.clone(), [1, 2])
    # It goes where the request goes.
    batch.swap(0, 2)
    getattr(batch, call)(logits.clone(), [1, 0])
    with pytest.raises(ValueError, match="slot 2"):
        getattr(batch, call)(logits.clone(), [1, 2])
    batch.remove(2)
    batch.add(RequestParams(), slot=2)
    getattr(batch, call)(logits.clone(), [1, 2])


def test_where_only_the_device_knows_a_required_bitmask_that_is_missing_allows_nothing(device, path):  # noqa: F811
    batch = batch_of(device, {"bitmask": True, "temperature": 0.0}, {}, {"bitmask": True, "forced_tokens": [5]})
    logits, rows = logits_of(4).to(device), StepRows(torch.tensor([0, 1, -1, 2], device=device))
    processed = steps.process_rows(batch._step, logits, rows, torch.empty_like(logits))
    assert bool((processed[0] == -INF).all())
    assert torch.equal(processed[1:3], logits[1:3])
    assert processed[3].isfinite().nonzero().tolist() == [[5]]
    tokens, report = steps.sample_rows(batch._step, logits, rows, "processed", 1)
    assert tokens[[0, 2, 3]].tolist() == [0, 0, 5]
    assert bool(report.logprobs[0].isnan())


def test_one_step_with_a_bitmask_serves_every_choice(device, path):  # noqa: F811
    batch = batch_of(device, {"bitmask": True}, {"bitmask": None}, {"bitmask": False}, {"temperature": 0.0})
    mask = torch.zeros(5, 4, dtype=torch.int32, device=device)
    mask[:, 0] = 1 << 3
    logits, rows = logits_of(5).to(device), torch.tensor([0, 1, 2, 3, -1], device=device)
    left = [row.isfinite().nonzero().flatten().tolist() for row in batch.apply(logits, rows, bitmask=mask)]
    assert left == [[3], [3], list(range(V)), [3], list(range(V))]
    assert batch.sample(logits, rows, bitmask=mask).tokens[[0, 1, 3]].tolist() == [3, 3, 3]


# -- Log-probabilities ------------------------------------------------------------------------------------------------


def test_log_probabilities_that_only_one_side_asks_for(device):
    batch = batch_of(device, {"logprobs": 0}, {}, {"logprobs": 2}, {})
    logits = logits_of(2).to(device)
    for slots in known_to_the_host([1, 0]):
        with pytest.raises(ValueError, match=r"logprobs must be 'raw' or 'processed', got None, .* of slot 0"):
            batch.sample(logits, slots)
    for slots in known_to_the_host([1, 3]):
        with pytest.raises(ValueError, match="logprobs must be None where no request wants them, got 'raw'"):
            batch.sample(logits, slots, logprobs="raw")
    # Some of the requests, or none at all: an engine's ordinary steps.
    assert batch.sample(logits, [1, 2], logprobs="raw").logprobs.isnan().tolist() == [True, False]
    assert batch.sample(logits, [-1, -1], logprobs="raw").logprobs.isnan().all()
    assert batch.sample(logits, [1, 3]).logprobs is None
    assert batch.apply(logits, [0, 2]).shape == logits.shape
    batch.move(2, 2)
    batch.swap(2, 3)
    assert batch.sample(logits, [1, 2]).logprobs is None
    with pytest.raises(ValueError, match="of slot 3"):
        batch.sample(logits, [1, 3])


def test_where_only_the_device_knows_who_asked_for_log_probabilities(device, path):  # noqa: F811
    batch = batch_of(device, {"logprobs": 1}, {})
    logits = logits_of(2).to(device)
    rows = StepRows(torch.tensor([1, 1], device=device))
    _, report = steps.sample_rows(batch._step, logits, rows, "raw", 2)
    assert bool(report.logprobs.isnan().all())
    assert report.ranks.tolist() == [0, 0]
    if device == "cuda":
        assert batch.sample(logits, torch.tensor([0, 1], device=device)).logprobs is None


# -- Histories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(5))
def test_a_full_history_refuses_tokens_that_the_host_knows(which, device):
    batch = batch_of(device, {"seed": 1}, {"seed": 2}, max_length=4)
    batch.append([0, 1], [3, 3])
    before = tables_of(batch)
    for slots, tokens in (([0, 0], [4, 5]), ([1, 0, 1, 0], [4, 4, 5, 5])):
        given = known_to_the_host(slots)[which], known_to_the_host(tokens)[which]
        with pytest.raises(ValueError, match="must leave each history at most 4 tokens, the max_length of the batch"):
            batch.append(*given)
        assert_unchanged(batch, before)
    batch.append(known_to_the_host([0, -1, 0])[which], known_to_the_host([4, 4, -1])[which])
    assert batch.lengths.tolist() == [4, 3, 0, 0]
    with pytest.raises(ValueError, match="slot 0"):
        batch.append([0], [5])
    # The count goes where the request goes, and begins anew with another.
    batch.swap(0, 1)
    batch.append([0], [5])
    with pytest.raises(ValueError, match="slot 1"):
        batch.append([1], [5])
    batch.remove(1)
    batch.add(RequestParams(), [7], slot=1)
    batch.append([1] * 3, [5] * 3)
    assert batch.lengths.tolist() == [4, 4, 0, 0]


def test_lengths_tell_of_a_history_that_the_device_has_filled(device, path):  # noqa: F811
    batch = batch_of(device, {}, {}, max_length=4)
    slots, tokens = torch.tensor([0, 0, 0, 1], device=device), torch.tensor([3, 4, 5, 6], device=device)
    steps.append_tokens(batch._slots, slots, tokens)  # on a GPU, append() is just that
    assert batch.lengths.tolist() == [4, 3, 0, 0]
    assert (batch.lengths == batch.max_length).tolist() == [True, False, False, False]
    assert batch._slots.history[0, :4].tolist() == [1, 2, 3, 4]
    assert batch.lengths.device.type == device


def test_lengths_of_an_engines_history(device):
    lengths = torch.tensor([5], device=device)
    batch = BatchProcessor(
        1, V, device, history=(torch.zeros(1, 9, dtype=torch.int64, device=device), lengths, lengths)
    )
    assert batch.lengths is lengths


# -- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["apply_", "apply", "sample"])
def test_a_slot_that_comes_twice(call, device):
    batch = batch_of(device, {}, {})
    logits = logits_of(3).to(device)
    run = getattr(batch, call)
    for slots in known_to_the_host([1, 0, 1]):
        with pytest.raises(ValueError, match="slots must be different, got 1 twice"):
            run(logits.clone(), slots)
        with pytest.raises(ValueError, match="slots must be different, got 1 twice"):
            run(logits.clone(), slots, [1, 1, 1])
        run(logits.clone(), slots, [0, 1, 1])  # two positions of one request
    run(logits.clone(), [-1, 0, -1])
    run(logits.clone(), [1, 1, 0], draft_ids=[2, 3, 2], local_position=[0, 1, 0])


@pytest.mark.parametrize(
    ("slots", "local"),
    [
        ([0, 1, 0], [0, 0, 1]), ([0, 0, 1], [0, 2, 0]), ([0, 0, 1], [1, 2, 0]), ([0, 0, 1], [1, 0, 0]),
        ([0, 0, 1], [0, -1, 0]), ([0, -1, 0], [0, 1, 2]), ([0, 1, 1], [0, 1, 2]),
    ],
)  # fmt: skip
def test_rows_of_draft_tokens_out_of_order(slots, local, device):
    batch = batch_of(device, {}, {})
    logits = logits_of(3).to(device)
    with pytest.raises(ValueError, match="local_position must count 0, 1, 2"):
        batch.apply(logits, slots, draft_ids=[2, 3, 4], local_position=local)
    batch.apply(logits, [0, 0, -1], draft_ids=[2, 3, 4], local_position=[0, 1, 5])


LOOKS_BACK = [
    {"repetition_penalty": 1.2}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"no_repeat_ngram_size": 2},
    {"dry_multiplier": 1.0}, {"bad_words": [[1, 2]]},
]  # fmt: skip


@pytest.mark.parametrize("params", LOOKS_BACK)
def test_a_position_beyond_the_history_of_what_looks_back(params, device):
    batch = batch_of(device, params, {"min_tokens": 3, "stop_token_ids": [1], "bad_words": [[4]]})
    logits = logits_of(2).to(device)
    batch.apply(logits, [1, 0], [40, 1])  # the other only asks for the number of tokens
    with pytest.raises(ValueError, match=r"cache_position must be at most 1 in row 1, .* has 2 tokens .*, got 2"):
        batch.apply(logits, [1, 0], [40, 2])
    batch.append([0], [5])
    batch.apply(logits, [1, 0], [40, 2])
    batch.apply(logits, [0, 0], [2, 3], draft_ids=[5, 6], local_position=[0, 1])
    with pytest.raises(ValueError, match="at most 3 in row 1"):
        batch.apply(logits, [0, 0], [2, 4], draft_ids=[5, 6], local_position=[0, 1])
    with pytest.raises(ValueError, match="cache_position must be at least -1, got -2 in row 0"):
        batch.apply(logits, [1, 0], [-2, 2])
    batch.apply(logits, [1, -1], [-1, -9])


WRONG_INDICES = [[0.0, 1.0], [0.5, 1], [True, False], ["0", "1"], [None, 1], [[0], [1]], [[0], [1, 2]], "01", 3, None]


@pytest.mark.parametrize("wrong", WRONG_INDICES, ids=str)
def test_what_are_no_integers(wrong, device):
    batch = batch_of(device, {}, {})
    logits = logits_of(2).to(device)
    calls = {
        "slots": lambda: batch.apply(logits, wrong),
        "draft_ids": lambda: batch.apply(logits, [0, 1], draft_ids=wrong, local_position=[0, 0]),
        "local_position": lambda: batch.apply(logits, [0, 1], draft_ids=[1, 1], local_position=wrong),
        "token_ids": lambda: batch.append([0, 1], wrong),
        "prompt_ids": lambda: batch.add(RequestParams(), wrong),
        "output_ids": lambda: batch.add(RequestParams(), [1], wrong),
    }
    if wrong is not None:
        calls["cache_position"] = lambda: batch.apply(logits, [0, 1], wrong)
    else:
        del calls["draft_ids"], calls["local_position"]
    before = tables_of(batch)
    for argument, call in calls.items():
        with pytest.raises(ValueError, match=f"{argument} must be .*integers|{argument} must be int32 or int64"):
            call()
    assert_unchanged(batch, before)
    assert len(batch) == 2


def test_logits_and_masks_that_are_none(device):
    batch = batch_of(device, {}, {})
    for wrong in (logits_of(2).numpy(), logits_of(2).tolist(), None):
        with pytest.raises(ValueError, match="logits must be a tensor"):
            batch.apply(wrong, [0, 1])
        with pytest.raises(ValueError, match="bitmask must be int32 of shape"):
            batch.apply(logits_of(2).to(device), [0, 1], bitmask=[[1]] if wrong is None else wrong)
        with pytest.raises(ValueError, match="out must be as the logits"):
            batch.apply(logits_of(2).to(device), [0, 1], out=[[1]] if wrong is None else wrong)
    with pytest.raises(ValueError, match=r"logits must have memory of its own for each logit"):
        batch.apply_(logits_of(1).to(device).expand(2, V), [0, 1])


@pytest.mark.parametrize("edits", [{"banned_token_ids": [5]}, {"top_k": 3, "logit_bias": {4: 9.0}}])
def test_out_that_shares_memory_with_the_logits(edits, device, path):  # noqa: F811
    batch = batch_of(device, edits, {"seed": 1})
    given = logits_of(2).to(device)
    expected = batch.apply(given, [0, 1])
    whole = torch.zeros(4 * V + 8, device=device)

    def view(offset, stride, rows=2):
        return whole.as_strided((rows, V), (stride, 1), offset)

    logits = view(0, 2 * V)
    for offset, stride in ((1, 2 * V), (V // 2, 2 * V), (2 * V, V), (V - 1, 2 * V)):
        with pytest.raises(ValueError, match="out must share no memory with the logits"):
            batch.apply(logits, [0, 1], out=view(offset, stride))
    with pytest.raises(ValueError, match="out must have memory of its own"):
        batch.apply(logits, [0, 1], out=view(V, 0))
    for offset, stride in ((V, 2 * V), (0, 2 * V)):  # between its rows, and the logits themselves
        logits.copy_(given)
        out = view(offset, stride)
        assert batch.apply(logits, [0, 1], out=out) is out
        assert torch.equal(out, expected)
    logits.copy_(given)
    assert batch.apply(logits, [0, 1], out=logits) is logits
    assert torch.equal(logits, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"device must be a device that torch can use here .* got '{name}'"):
        BatchProcessor(1, V, name, max_length=8)


# -- Values -----------------------------------------------------------------------------------------------------------

FULL = {
    "temperature": 0.5, "top_k": 5, "top_p": 0.75, "min_p": 0.25, "typical_p": 0.5, "epsilon": 0.125, "eta": 0.25,
    "top_n_sigma": 1.5, "top_h": 0.5, "top_a": 0.25, "repetition_penalty": 1.5, "presence_penalty": -0.5,
    "frequency_penalty": 0.25, "repetition_scope": "output", "presence_scope": "all", "dry_multiplier": 2.0,
    "dry_base": 1.5, "dry_allowed_length": 3, "dry_breakers": (3,), "logit_bias": {3: 1.5},
    "allowed_token_ids": (1, 2, 3), "banned_token_ids": (4,), "bad_words": ((5, 6),), "no_repeat_ngram_size": 3,
    "min_tokens": 2,
    "stop_token_ids": (7,), "first_tokens_suppressed": (8,), "first_window": 2, "forced_tokens": (9,),
    "bitmask": True, "seed": 11, "logprobs": 2,
}  # fmt: skip
NUMBERS = [name for name, value in FULL.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]


def scalars(value):
    """A number as numpy and torch have it."""
    if isinstance(value, int):
        return [
            *(kind(value) for kind in (np.int8, np.int32, np.int64, np.uint64)),
            *(torch.tensor(value, dtype=dtype) for dtype in (torch.int32, torch.int64)),
        ]
    return [
        *(kind(value) for kind in (np.float16, np.float32, np.float64)),
        *(torch.tensor(value, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64)),
    ]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.filterwarnings("error")
def test_scalars_of_numpy_and_torch_are_numbers(name):
    for value in scalars(FULL[name]):
        made = getattr(RequestParams(**{name: value}), name)
        assert made == FULL[name]
        assert type(made) is type(FULL[name])


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "wrong", ["1", True, np.bool_(True), None, [1], torch.tensor([1]), torch.tensor(True), 1j, object()]
)
def test_what_is_no_number(name, wrong):
    if wrong is None and name not in ("temperature", "repetition_penalty", "min_tokens", "first_window", "dry_base"):
        return  # off
    if wrong is None and RequestParams.__dataclass_fields__[name].default is None:
        return
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        RequestParams(**{name: wrong})


def test_numpys_integers_where_slots_and_sizes_are_asked_for(device):
    batch = BatchProcessor(np.int64(3), np.int32(V), device, max_length=np.int64(8), max_logprobs=np.int8(2))
    slot = batch.add(RequestParams(), np.asarray([1, 2]), slot=np.int64(2))
    assert (slot, type(slot)) == (2, int)
    assert np.int64(2) in batch
    batch.move(np.int64(2), np.int32(0))
    batch.swap(np.int64(0), np.int64(1))
    batch.remove(np.int64(1))
    assert len(batch) == 0


def test_tokens_of_numpy_in_every_list():
    ids = {name: value for name, value in FULL.items() if isinstance(value, tuple) and name != "bad_words"}
    for name, value in ids.items():
        for given in (np.asarray(value), [np.int64(each) for each in value], torch.tensor(value)):
            assert tuple(getattr(RequestParams(**{name: given}), name)) == value
    words = RequestParams(bad_words=[np.asarray([5, 6]), torch.tensor([7])]).bad_words
    assert words == ((5, 6), (7,))
    assert set(map(type, words[0])) == {int}


@pytest.mark.parametrize("key", ["3", 3, np.int64(3)])
def test_keys_of_a_bias(key, device):
    params = RequestParams(logit_bias={key: np.float32(1.5), 4: -INF})
    assert params.logit_bias == {3: 1.5, 4: -INF}
    assert set(map(type, params.logit_bias)) == {int}
    batch = batch_of(device)
    logits = logits_of(1).to(device)
    changed = batch.apply(logits, [batch.add(params)])
    assert (changed[0, 3] - logits[0, 3]).item() == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize("key", ["-3", "3.0", " 3", "three", "", 3.0, None, b"3"])
def test_what_is_no_key_of_a_bias(key):
    with pytest.raises(ValueError, match="logit_bias must be"):
        RequestParams(logit_bias={key: 1.0})


def test_a_token_biased_twice():
    with pytest.raises(ValueError, match="logit_bias must have each token id once, got 3"):
        RequestParams(logit_bias={"3": 1.0, 3: 2.0})


@pytest.mark.parametrize("off", [None, 0, -1, np.int64(-1), torch.tensor(0)])
def test_top_k_that_is_off(off, device):
    params = RequestParams(top_k=off)
    assert params == RequestParams()
    batch = batch_of(device)
    logits = logits_of(1).to(device)
    assert torch.equal(batch.apply(logits, [batch.add(params)]), logits)


@pytest.mark.parametrize("wrong", [-2, 0.5, 5.0, "5"])
def test_top_k_that_is_nothing(wrong):
    with pytest.raises(ValueError, match=r"top_k must be an integer of at least 1 \(None, 0 or -1 turns it off\), got"):
        RequestParams(top_k=wrong)


def test_full_parameters_are_copied_and_travel():
    params = RequestParams(**FULL | {"banned_token_ids": TokenMask.from_ids([4], V)})
    assert set(FULL) == set(RequestParams.__dataclass_fields__)
    BatchProcessor(1, V, "cpu", max_length=8, max_logprobs=2).add(params)
    for made in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), copy.copy(params)):
        assert made == params


# -- A vocabulary of one token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["transformers", "vllm", "sglang"])
def test_a_vocabulary_of_one_token(semantics, device, path):  # noqa: F811
    batch = BatchProcessor(4, 1, device, max_length=8, semantics=semantics, max_logprobs=1)
    asked = [
        {"temperature": 0.0, "logprobs": 1},
        {"temperature": 0.7, "top_k": 1, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "epsilon": 0.1, "eta": 0.1,
         "top_n_sigma": 1.0, "repetition_penalty": 2.0, "logit_bias": {0: 1.0}, "logprobs": 1, "seed": 1},
        {"banned_token_ids": [0], "logprobs": 1, "seed": 2},
        {"forced_tokens": [0], "allowed_token_ids": [0], "dry_multiplier": 1.0, "no_repeat_ngram_size": 2, "seed": 3},
    ]  # fmt: skip
    slots = [batch.add(RequestParams(**each), [0, 0]) for each in asked]
    logits = torch.tensor([[4.0], [-2.0], [1.0], [3.0]], device=device)
    processed = batch.apply(logits, slots).flatten().tolist()
    penalised = -2.0 if semantics == "sglang" else -1.0 * 2.0
    expected = penalised + 1.0 if semantics == "sglang" else penalised
    assert processed == [4.0, pytest.approx(expected / 0.7), -INF, 0.0]
    for logprobs in ("raw", "processed"):
        drawn = batch.sample(logits, slots, logprobs=logprobs)
        assert drawn.tokens.tolist() == [0, 0, 0, 0]
        assert drawn.logprobs[:2].tolist() == [0.0, 0.0]
    for word, token in ((1, [4.0, -INF]), (0, [-INF, -INF])):
        mask = torch.full((2, 1), word, dtype=torch.int32, device=device)
        assert batch.apply(logits[[0, 2]], [0, 2], bitmask=mask).flatten().tolist() == token
    batch.append(slots, [0, 0, 0, 0])
    assert batch.lengths.tolist() == [3, 3, 3, 3]
    batch.swap(0, 3)
    assert batch.apply_(logits, [3, -1, -1, -1]) is logits


def test_rows_without_end(device):
    """More slots than rows, and the reverse."""
    batch = batch_of(device, {}, {}, {}, {})
    for slots, rows in (([0, 1, 2], 2), ([0], 2), ([], 1)):
        with pytest.raises(ValueError, match=f"slots must have one entry for each of {rows} rows"):
            batch.apply(logits_of(rows).to(device), slots)
    with pytest.raises(ValueError, match="logits must have at most 8 rows, the max_rows of the batch, got 9"):
        batch.apply(logits_of(9).to(device), [-1] * 9)
    assert batch.apply(logits_of(0).to(device), []).shape == (0, V)
