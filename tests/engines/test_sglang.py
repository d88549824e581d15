"""The released SGLang's own requests, batches, samplers and plug-in loader, with fastlogits in their places."""

import contextlib
import importlib.machinery
import logging
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastlogits as fl

pytest.importorskip("sglang", reason="needs SGLang: make test-engines")

# SGLang imports torchvision for pictures, whose wheels are for builds of torch with CUDA.
if importlib.util.find_spec("torchvision") is None:
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()  # transformers has looked before there is a stand-in
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.InterpolationMode = SimpleNamespace(BICUBIC=None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

from fastlogits_kernels.runtime.bits import pack_bits
from sglang.srt.constrained import base_grammar_backend as base
from sglang.srt.layers import sampler as theirs
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.sampling import sampling_batch_info as batch_info
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative import eagle_utils as eagle

from fastlogits.integrations import sglang as ours
from fastlogits.integrations import sglang_sampler as backends
from fastlogits.integrations.sglang import FastLogitsProcessor, NoRepeatNGramLogitProcessor

V = 50
NEG = float("-inf")


@contextlib.contextmanager
def server(**arguments):
    """What SGLang reads of its server's arguments."""
    arguments = {"disable_overlap_schedule": True, "enable_custom_logit_processor": True, **arguments}
    ours._overlaps.cache_clear()
    ours.say_once.cache_clear()
    with get_context().override_server_args(device="cpu", **arguments):
        yield
    ours._overlaps.cache_clear()


@pytest.fixture(autouse=True)
def _server():
    with server():
        yield


def request(rid, prompt, processor=None, options=None, **sampling):
    if options is not None:
        sampling["custom_params"] = (processor or FastLogitsProcessor).params(**options)
        processor = processor or FastLogitsProcessor
    params = SamplingParams(**sampling)
    params.normalize(None)
    return Req(rid, "", prompt, params, custom_logit_processor=processor and processor.to_str(), vocab_size=V)


class Batch:
    """What a batch's sampling information is made from."""

    def __init__(self, *requests):
        self.reqs, self.device = list(requests), "cpu"


def info(*requests):
    return SamplingBatchInfo.from_schedule_batch(Batch(*requests), V)


def processed(logits, *requests, times=1):
    out = logits.clone()
    for _ in range(times):
        theirs.apply_custom_logit_processor(out, info(*requests))
    return out


def by_transformers(request, row, *processors):
    ids = torch.tensor([[*request.origin_input_ids, *request.output_ids]])
    return fl.LogitsProcessorList(processors)(ids, row[None], prompt_length=len(request.origin_input_ids))[0]


@pytest.mark.parametrize("name", ["FastLogitsProcessor", "NoRepeatNGramLogitProcessor", "DRYLogitProcessor",
                                  "FirstTokensLogitProcessor", "BannedTokensLogitProcessor"])  # fmt: skip
def test_processors_travel_as_text(name):
    made = CustomLogitProcessor.from_str(getattr(ours, name).to_str())
    assert type(made) is getattr(ours, name)
    assert isinstance(made, CustomLogitProcessor)


def test_a_batch_step_by_step():
    torch.manual_seed(0)
    plain = request("plain", [1, 2, 3])
    ngram = request("ngram", [1, 2, 3, 1], NoRepeatNGramLogitProcessor, {"no_repeat_ngram_size": 2})
    dry = request(
        "dry", [4, 5, 4], options={"dry_multiplier": 2.0, "dry_allowed_length": 1, "banned_token_ids": [7, 9]}
    )
    first = request("first", [4], options={"first_tokens_suppressed": [1, 2], "first_window": 2})
    likeliest = request("cut", [8], options={"epsilon": 0.999}, temperature=0.5)
    greedy = request("greedy", [8], options={"epsilon": 0.999}, temperature=0)
    requests = [plain, ngram, dry, first, likeliest, greedy]
    for step in range(12):
        # Twice a step, as for log-probabilities; in another order and company each time.
        order = requests[step % 6 :] + requests[: step % 6]
        logits = torch.randn(len(order), V) * 3
        out = processed(logits, *order, times=1 + step % 2)
        found = dict(zip([each.rid for each in order], zip(logits, out, strict=True), strict=True))
        for rid in ("plain", "greedy"):
            assert torch.equal(*found[rid])
        row, got = found["ngram"]
        assert torch.equal(got, by_transformers(ngram, row, fl.NoRepeatNGramLogitsProcessor(2)))
        row, got = found["dry"]
        if step % 2 == 0:
            chain = fl.DRYLogitsProcessor(2.0, 1.75, 1), fl.SuppressTokensLogitsProcessor([7, 9], "cpu")
            torch.testing.assert_close(got, by_transformers(dry, row, *chain))
        row, got = found["first"]
        assert torch.equal(got, by_transformers(first, row, fl.SuppressFirstTokens([1, 2], 2)))
        row, got = found["cut"]
        assert (got > NEG).nonzero().item() == row.argmax()
        for each in requests:
            each.output_ids.append(int(torch.randint(0, 6, ())))


def test_what_a_request_has_said_is_taken_back():
    req = request("again", [1, 2], options={"no_repeat_ngram_size": 1})
    logits = torch.zeros(1, V)
    req.output_ids.extend([3, 4])
    assert processed(logits, req).isinf().nonzero()[:, 1].tolist() == [1, 2, 3, 4]
    del req.output_ids[-1]
    assert processed(logits, req).isinf().nonzero()[:, 1].tolist() == [1, 2, 3]
    # A request that is aborted and starts anew has another list.
    req.output_ids = type(req.output_ids)("q", [9])
    assert processed(logits, req).isinf().nonzero()[:, 1].tolist() == [1, 2, 9]
    # Another one comes by the same name.
    other = request("again", [5], options={"no_repeat_ngram_size": 1})
    assert processed(logits, other).isinf().nonzero()[:, 1].tolist() == [5]


def test_more_requests_than_there_was_room_for():
    options = {"no_repeat_ngram_size": 1}
    many = [request(f"many {i}", [i % V, (i + 1) % V], NoRepeatNGramLogitProcessor, options) for i in range(150)]
    late = request("long", [3] * 9000, NoRepeatNGramLogitProcessor, options)
    for group in (many[:40], many[40:80], many, [late], many[::2]):
        banned = processed(torch.zeros(len(group), V), *group).isinf()
        for row, req in zip(banned, group, strict=True):
            assert row.nonzero().flatten().tolist() == sorted({*req.origin_input_ids})


def test_bad_wishes_are_refused_at_the_client_and_hurt_nobody_at_the_server(caplog):
    for options, message in (
        ({"top_k": 3}, "which the engine itself applies"),
        ({"ngram": 3}, "'ngram', which is unknown"),
        ({"epsilon": 3.0}, "epsilon must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FastLogitsProcessor.params(**options)
    with pytest.raises(ValueError, match="NoRepeatNGramLogitProcessor has 'epsilon'"):
        NoRepeatNGramLogitProcessor.params(epsilon=0.1)
    good = request("good", [1], options={"no_repeat_ngram_size": 1})
    wrong, outside, nothing = (request(name, [1], FastLogitsProcessor) for name in ("wrong", "outside", "nothing"))
    wrong.sampling_params.custom_params = {"fastlogits": "[", "__req__": wrong}
    outside.sampling_params.custom_params = {"fastlogits": {"banned_token_ids": [4, V]}, "__req__": outside}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = processed(torch.zeros(4, V), wrong, outside, nothing, good)
            assert out.isinf().nonzero().tolist() == [[1, 4], [3, 1]]
    assert len(caplog.records) == 2
    assert "must be a mapping from names to values, or one in JSON" in caplog.text
    assert f"banned_token_ids must have token ids of the vocabulary, 0 to {V - 1}, got {V}" in caplog.text


UNUSABLE = {
    "an id outside the vocabulary": ({"forced_tokens": [V]}, "forced_tokens must have token ids of the vocabulary"),
    "a value out of range": ({"epsilon": 3.0}, "epsilon must be"),
    "of a wrong type": ({"bad_words": "no"}, "bad_words must be"),
    "unknown": ({"ngrams": 3}, "'ngrams', which is unknown"),
    "the engine's own": ({"top_k": 3}, "'top_k', which the engine itself applies"),
    "a list that is too long": ({"forced_tokens": [1] * 5000}, "forced_tokens and bad_words take 5000 words"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_option_that_cannot_be_honoured_leaves_the_others(kind, caplog):
    wrong, message = UNUSABLE[kind]
    req = request(kind, [1, 2], FastLogitsProcessor)
    options = {"no_repeat_ngram_size": 1, "banned_token_ids": [3], **wrong}
    req.sampling_params.custom_params = {"fastlogits": options, "__req__": req}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert processed(torch.zeros(1, V), req).isinf().nonzero()[:, 1].tolist() == [1, 2, 3]
    assert [message in record.getMessage() for record in caplog.records] == [True]


def test_forced_tokens_beside_a_grammar(caplog):
    req = request("grammar", [1], options={"forced_tokens": [5], "banned_token_ids": [3]}, regex="a+")
    with caplog.at_level(logging.WARNING):
        assert processed(torch.zeros(1, V), req).isinf().nonzero()[:, 1].tolist() == [3]
    assert "forced_tokens must be left out beside a grammar" in caplog.text


def test_placeholders_of_images_in_a_prompt():
    req = request("pictures", [V, 4, V + 7, 2**31 + 5, -1, 4], options={"no_repeat_ngram_size": 1})
    assert processed(torch.zeros(1, V), req).isinf().nonzero()[:, 1].tolist() == [4]


def test_overlapped_steps_hide_the_newest_token(caplog, monkeypatch):
    options = [{"no_repeat_ngram_size": 1}, {"banned_token_ids": [9]}]
    both = {"no_repeat_ngram_size": 1, "forced_tokens": [4], "bad_words": [[7], [1, 8]], "banned_token_ids": [9]}
    with server(disable_overlap_schedule=False), caplog.at_level(logging.ERROR):
        requests = [request(f"overlapped {i}", [1], options=each) for i, each in enumerate([*options, both])]
        assert processed(torch.zeros(3, V), *requests).isinf().nonzero().tolist() == [[1, 9], [2, 7], [2, 9]]
    assert "SGLANG_ENABLE_DELAY_SAMPLE=1" in caplog.text
    assert "no_repeat_ngram_size, bad_words, forced_tokens of requests are not honoured" in caplog.text
    monkeypatch.setenv("SGLANG_ENABLE_DELAY_SAMPLE", "1")
    with server(disable_overlap_schedule=False):
        requests = [request(f"delayed {i}", [1], options=each) for i, each in enumerate(options)]
        assert processed(torch.zeros(2, V), *requests).isinf().nonzero().tolist() == [[0, 1], [1, 9]]


def test_a_request_that_is_over():
    batch = info(request("over", [1], options={"no_repeat_ngram_size": 1}))
    logits = torch.zeros(1, V)
    theirs.apply_custom_logit_processor(logits, batch)
    assert not logits.any()


def test_rows_of_draft_tokens(caplog):
    requests = [request("drafted", [1], options={"no_repeat_ngram_size": 1}), request("beside", [2])]
    batch = info(*requests)
    logits = torch.zeros(6, V)
    with caplog.at_level(logging.ERROR):
        theirs.apply_custom_logit_processor(logits, batch, num_tokens_in_batch=3)
    assert logits.isinf().nonzero().tolist() == [[0, 1]]
    assert "draft tokens are not steered" in caplog.text


# -- The sampling backend ---------------------------------------------------------------------------------------------


@pytest.fixture
def backend(installed, monkeypatch):
    """The backend by the way that SGLang takes: entry point, choice of the command line, factory."""
    from sglang.srt import plugins
    from sglang.srt.server_args import SAMPLING_BACKEND_CHOICES

    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    SAMPLING_BACKEND_CHOICES.discard("fastlogits")
    theirs._CUSTOM_SAMPLER_FACTORIES.clear()
    plugins.load_plugins()
    assert "fastlogits" in SAMPLING_BACKEND_CHOICES
    with (
        server(sampling_backend="fastlogits"),
        get_parallel().override(tp_group=SimpleNamespace(device_group=None), tp_size=1),
    ):
        yield theirs.create_sampler()


def sampled(sampler, logits, batch, positions=None, return_logprob=False):
    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    if positions is None:
        positions = torch.arange(len(logits))
    B = len(logits)
    return sampler(output, batch, return_logprob, [3] * B, [None] * B, positions), output


KINDS = [
    {"temperature": 0},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 1.1, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.2},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.7, "min_p": 0.05},
]


def test_the_distribution_is_sglangs(backend):
    torch.manual_seed(0)
    N = 4000
    row = torch.randn(V) * 2
    for kind in KINDS[1:]:
        batch = info(*[request(str(i), [1], **kind) for i in range(N)])
        assert batch.need_min_p_sampling == ("min_p" in kind)
        tokens, _ = sampled(backend, row.repeat(N, 1), batch)
        probabilities = torch.softmax(row / kind["temperature"], dim=-1).repeat(N, 1)
        reference = theirs.top_k_top_p_min_p_sampling_from_probs_torch(
            probabilities[:1], batch.top_ks[:1], batch.top_ps[:1], batch.min_ps[:1], True, None, None,
            return_filtered_probs=True,
        )  # fmt: skip
        _, weights, ids, _ = reference
        exact = torch.zeros(V).scatter(0, ids[0].long(), weights[0] / weights.sum())
        counts = torch.bincount(tokens.long(), minlength=V)
        assert not counts[exact == 0].any()
        frequent = exact * N > 5
        squares = (counts[frequent] - N * exact[frequent]) ** 2 / (N * exact[frequent])
        assert squares.sum() < 3 * frequent.sum() + 20


def test_a_mixed_batch_with_processors_seeds_and_logprobs(backend):
    torch.manual_seed(0)
    logits = torch.randn(len(KINDS), V) * 2
    requests = [request(f"mixed {i}", [1], **kind) for i, kind in enumerate(KINDS)]
    requests[1] = request("mixed 1", [3], options={"banned_token_ids": range(1, V)}, temperature=0.6)
    batch = info(*requests)
    tokens, output = sampled(backend, logits, batch, return_logprob=True)
    assert tokens[0] == logits[0].argmax()
    assert tokens[1] == 0
    processed_logits = logits.clone()
    processed_logits[1, 1:] = NEG
    expected = torch.log_softmax(processed_logits / batch.temperatures, dim=-1)
    torch.testing.assert_close(output.next_token_logprobs, expected.gather(1, tokens[:, None].long())[:, 0])
    assert len(output.next_token_top_logprobs_val[2]) == 3


def test_a_draw_with_seeds_does_not_depend_on_the_batch(backend):
    torch.manual_seed(0)
    logits, positions = torch.randn(len(KINDS), V) * 2, torch.arange(len(KINDS)) + 9
    with server(sampling_backend="fastlogits", enable_deterministic_inference=True):
        requests = [request(str(i), [1], sampling_seed=i + 5, **kind) for i, kind in enumerate(KINDS)]
        together, _ = sampled(backend, logits, info(*requests), positions)
        for i, req in enumerate(requests):
            one, _ = sampled(backend, logits[i : i + 1], info(req), positions[i : i + 1])
            assert one[0] == together[i]
        draws = {tuple(sampled(backend, logits, info(*requests), positions + n)[0].tolist()) for n in range(20)}
    assert len(draws) > 5


def test_what_stays_with_sglang(backend):
    torch.manual_seed(0)
    logits = torch.randn(3, V)
    greedy, _ = sampled(backend, logits, info(*[request(str(i), [1], temperature=0) for i in range(3)]))
    assert torch.equal(greedy, logits.argmax(-1))
    requests = [request(str(i), [1], temperature=1.0, top_k=2) for i in range(3)]
    requests[1].return_sampling_mask = True
    tokens, output = sampled(backend, logits, info(*requests))
    kept = output.sampling_mask_output.token_ids[0].tolist()
    assert sorted(kept[:2]) == sorted(logits[1].topk(2).indices.tolist())
    assert tokens[1] in kept[:2]


# -- Edits in one launch, and drafts -----------------------------------------------------------------------------------

PENALIZED = [
    {"frequency_penalty": 0.7, "presence_penalty": -0.3},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.2},
    {"logit_bias": {"3": 2.5, "7": -100.0}, "repetition_penalty": 0.8},
    {},
]


class Grammar:
    """Bits of allowed tokens, as grammar backends have them, or truth values as another has."""

    def __init__(self, packed):
        self.packed, self.calls = packed, 0

    def mask(self, rows):
        torch.manual_seed(rows)
        allowed = torch.rand(rows, 64) < 0.6
        allowed[-1] = True
        return base.GrammarMask(self, pack_bits(allowed) if self.packed else ~allowed[:, :V])

    def apply_vocab_mask(self, logits, vocab_mask):
        self.calls += 1
        logits.masked_fill_(vocab_mask, NEG)


def with_outputs(kinds=PENALIZED):
    """Sampling information of requests that have generated some tokens."""
    batch = Batch(*[request(f"edited {i}", [1], **kind) for i, kind in enumerate(kinds)])
    made = SamplingBatchInfo.from_schedule_batch(batch, V)
    for tokens in ([4, 3, 3, 9], [4, 5, 7, 9]):
        made.penalizer_orchestrator.cumulate_output_tokens(torch.tensor(tokens))
    return made, batch


@pytest.fixture
def uncompiled(monkeypatch):
    """SGLang's penalties without torch's compiler."""
    for module in (batch_info, sys.modules[batch_info.apply_scaling_penalties.__module__]):
        plain = getattr(module.apply_scaling_penalties, "_torchdynamo_orig_callable", module.apply_scaling_penalties)
        monkeypatch.setattr(module, "apply_scaling_penalties", plain)


def original(function):
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize("grammar", [None, True, False], ids=["no_grammar", "packed", "truth_values"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_edits_are_sglangs(overlaps, grammar, backend, uncompiled):
    assert SamplingBatchInfo.apply_logits_bias is not original(SamplingBatchInfo.apply_logits_bias)
    made, _batch = with_outputs()
    # Without overlap SGLang applies its penalties in the order of a set; with it, additive ones come first.
    expected_of = made.copy_for_forward()
    made = expected_of if overlaps else made
    if not overlaps:
        made.acc_additive_penalties = made.acc_scaling_penalties = None
    logits, rule = torch.randn(4, V) * 3, None if grammar is None else Grammar(grammar)
    if rule is not None:
        made.grammar_mask = expected_of.grammar_mask = rule.mask(4)
    expected = logits.clone()
    if grammar:
        expected_of.grammar_mask = None
        original(SamplingBatchInfo.apply_logits_bias)(expected_of, expected)
        mask = rule.mask(4).vocab_mask
        token = torch.arange(V)
        expected.masked_fill_(((mask[:, token // 32] >> (token % 32).int()) & 1) == 0, NEG)
        made.grammar_mask = rule.mask(4)
    else:
        original(SamplingBatchInfo.apply_logits_bias)(expected_of, expected)
    calls = 0 if rule is None else rule.calls
    found = logits.clone()
    made.apply_logits_bias(found)
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits)
    if rule is not None:
        assert rule.calls - calls == (0 if grammar else 1)


def test_named_tokens_and_many_of_the_likeliest(backend):
    torch.manual_seed(0)
    logits = torch.randn(3, V) * 2
    batch = info(*[request(str(i), [1], temperature=0.7) for i in range(3)])
    reports = []
    for named, tops in (([None] * 3, [3, 0, 2]), ([None, [4, 5], None], [3, 0, 2]), ([None] * 3, [40, 0, 2])):
        torch.manual_seed(1)
        output = LogitsProcessorOutput(next_token_logits=logits.clone())
        tokens = backend(output, batch, True, tops, named, torch.arange(3))
        reports.append((tokens, output))
    for tokens, output in reports:
        assert torch.equal(tokens, reports[0][0])
        torch.testing.assert_close(output.next_token_logprobs, reports[0][1].next_token_logprobs)
        for row, count in ((0, 3), (2, 2)):
            values, first = output.next_token_top_logprobs_val[row], reports[0][1].next_token_top_logprobs_val[row]
            torch.testing.assert_close(values[:count], first)
            assert output.next_token_top_logprobs_idx[row][:count].tolist() == (
                reports[0][1].next_token_top_logprobs_idx[row].tolist()
            )
    named = torch.log_softmax(logits / 0.7, -1)[1, [4, 5]]
    torch.testing.assert_close(reports[1][1].next_token_token_ids_logprobs_val[1], named)


def follow_trees(predicts, accept_index, accept_token_num, candidates, retrieve_index, retrieve_next_token,
                 retrieve_next_sibling, target_predict, topk=-1):  # fmt: skip
    """From each request's root to the child that is what was drawn there, as long as there is one."""
    for row in range(len(candidates)):
        node, found = 0, 0
        accept_index[row, 0] = retrieve_index[row, 0]
        while True:
            predicts[retrieve_index[row, node]] = target_predict[row, node]
            child = int(retrieve_next_token[row, node])
            while child >= 0 and candidates[row, child] != target_predict[row, node]:
                child = int(retrieve_next_sibling[row, child])
            if child < 0:
                break
            node, found = child, found + 1
            accept_index[row, found] = retrieve_index[row, node]
        accept_token_num[row] = found
    return predicts, accept_index, accept_token_num


# Two children of the root, of which the first goes on with two more, the second with one.
CHILDREN = {"chain": [1, 2, 3, -1], "tree": [1, 3, -1, -1, -1]}
SIBLINGS = {"chain": [-1, -1, -1, -1], "tree": [-1, 2, -1, -1, -1]}
DEPTHS = {"chain": [0, 1, 2, 3], "tree": [0, 1, 1, 2, 2]}
PARENTS = {"chain": [0, 0, 1, 2], "tree": [0, 0, 0, 1, 2]}


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_drafts_never_change_a_token(shape, backend, monkeypatch, uncompiled):
    torch.manual_seed(0)
    monkeypatch.setattr(eagle, "verify_tree_greedy_func", follow_trees)
    monkeypatch.setattr(backends, "_tensor_parallel_group", lambda: SimpleNamespace(world_size=1))
    table, B, N = torch.randn(V, V) * 1.5, 4, 24  # the model: what follows each token
    nodes = len(CHILDREN[shape])
    children = CHILDREN[shape] if shape == "chain" else [1, 3, 4, -1, -1]
    kinds = [{"temperature": 0}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 6},
             {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05}]  # fmt: skip
    with server(sampling_backend="fastlogits", enable_deterministic_inference=True):
        batch = info(*[request(str(i), [1], sampling_seed=i + 5, **kind) for i, kind in enumerate(kinds)])
        expected = [[i + 1] for i in range(B)]
        for at in range(N):
            logits = table[torch.tensor([tokens[-1] for tokens in expected])]
            drawn, _ = sampled(backend, logits, batch, torch.full((B,), at))
            for tokens, token in zip(expected, drawn.tolist(), strict=True):
                tokens.append(token)
        found, accepted = [[i + 1] for i in range(B)], 0
        while min(map(len, found)) < N:
            fed = torch.zeros(B, nodes, dtype=torch.int64)
            for row, tokens in enumerate(found):
                fed[row, 0] = tokens[-1]
                for node in range(1, nodes):  # often right, the second child never
                    at = len(tokens) - 1 + DEPTHS[shape][node]
                    right = expected[row][at] if at <= N else 0
                    wrong = shape == "tree" and node in (2, 4)
                    fed[row, node] = (right + 1) % V if wrong or torch.rand(()) < 0.3 else right
            at = torch.tensor([[len(tokens) - 1 + depth for depth in DEPTHS[shape]] for tokens in found])
            verify = SimpleNamespace(
                draft_token=fed.flatten(), draft_token_num=nodes, positions=at.flatten(), max_tree_depth=4, tree_topk=2,
                retrieve_index=torch.arange(B * nodes).view(B, nodes),
                retrieve_next_token=torch.tensor([children] * B),
                retrieve_next_sibling=torch.tensor([SIBLINGS[shape]] * B),
            )  # fmt: skip
            step = SimpleNamespace(
                seq_lens=torch.tensor([len(tokens) for tokens in found]), sampling_info=batch, device="cpu",
                forward_mode=SimpleNamespace(is_idle=lambda: False),
            )  # fmt: skip
            output = LogitsProcessorOutput(next_token_logits=table[fed.flatten()].clone())
            predict, counts, index = eagle.eagle_sample(verify, step, output)
            for row, tokens in enumerate(found):
                taken = [int(predict[node]) for node in index[row, : counts[row]]]
                tokens.extend(taken)
                accepted += len(taken) - 1
    assert accepted > N
    for mine, tokens in zip(found, expected, strict=True):
        assert mine[:N] == tokens[:N]


def test_drafts_that_stay_with_sglang(monkeypatch):
    made = SimpleNamespace(is_all_greedy=True, has_watermark_candidates=False)
    step = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: False), sampling_info=made)
    assert backends.eagle_sample(lambda *given, **named: "theirs", None, step, None) == "theirs"


def test_functions_that_changed_are_left_to_sglang(caplog, monkeypatch):
    hooks = [
        ("sglang.srt.nowhere", "gone", None, ()),
        (backends._INFO, "SamplingBatchInfo.update_penalties", None, ("self", "else")),
    ]
    monkeypatch.setattr(backends, "_HOOKS", tuple(hooks))
    with caplog.at_level(logging.WARNING):
        backends.install()
    assert "own gone runs" in caplog.text
    assert "own SamplingBatchInfo.update_penalties runs: it takes self, not self, else" in caplog.text


def test_the_table_of_the_documents_names_every_field():
    table = (Path(__file__).parents[2] / "docs" / "migration.md").read_text().partition("From SGLang's")[2]
    made = ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
    fields = [name for name in SamplingParams.__struct_fields__ if name not in (*made, "ebnf_full_assistant")]
    assert [name for name in fields if f"`{name}`" not in table] == []
