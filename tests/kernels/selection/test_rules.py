"""Every rule of the table, everywhere that the table reaches: a rule that one of these doesn't know fails here."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from fastlogits_kernels import draw
from fastlogits_kernels.rules import CODES, ORDERS, RULES, Rule, argument_of
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch, launchers
from fastlogits_kernels.serving import steps
from fastlogits_kernels.serving.layout import OFF
from fastlogits_kernels.truncate.dispatch import truncate
from fastlogits_kernels.truncate.reference import reference_truncate

import fastlogits as fl
from tests.oracle import broken_rows, check_truncation, hard_rows

needs_triton = pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 700
VALUES = {
    "top_n_sigma": 1.0, "top_h": 0.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "top_a": 0.2, "typical": 0.7,
    "epsilon": 0.002, "eta": 0.3,
}  # fmt: skip
WARPERS = {
    "top_n_sigma": "TopNSigma", "top_h": "TopH", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP", "top_a": "TopA",
    "typical": "Typical", "epsilon": "Epsilon", "eta": "Eta",
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", RULES)
# Where the kernels find the tokens of a row: candidates in registers, a list of candidates, the row itself.
PATHS = pytest.mark.parametrize("path", ["registers", "list", "row"])


def scores():
    rows = hard_rows(V)
    return torch.stack([rows["gauss"], rows["ties"], rows["masked"]])


def selection(rules, path):
    """A selection that is held to one path."""
    made = launch.Selection(rules, V, torch.device(DEVICE))
    if path == "row":
        for size, layout in made.layouts.items():
            made.layouts[size] = layout._replace(shape=layout.shape._replace(room=-1.0, capacity=-1.0))
    elif path == "list":
        made.slots = (1,)
    return made


def test_the_table_is_whole():
    """What this file, the sampler, serving and the orders speak of are all rules, each once."""
    assert set(VALUES) == set(WARPERS) == set(RULES) == set(CODES)
    for order in ORDERS.values():
        assert sorted(order) == sorted(RULES)
    arguments = {argument_of(kind) for kind in RULES}
    assert arguments <= {each.name for each in dataclasses.fields(fl.SamplingParams)}
    assert arguments <= {each.name for each in dataclasses.fields(fl.RequestParams)}


@KINDS
def test_reference_and_cpu_keep_what_the_oracle_keeps(kind):
    rules = (Rule(kind, VALUES[kind]),)
    check_truncation(scores(), rules, reference_truncate(scores(), rules))
    warper = getattr(fl, f"{WARPERS[kind]}LogitsWarper", None)
    if warper is None:
        pytest.skip("transformers 4 has no such class")
    check_truncation(scores(), rules, warper(VALUES[kind])(None, scores()))


@needs_triton
@KINDS
@PATHS
def test_kernels_keep_what_the_oracle_keeps(monkeypatch, kind, path):
    """Whole rows and lists block by block, with the rules at run time, and candidates in registers."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    monkeypatch.setattr(launchers, "ROW_BLOCK", 256 if DEVICE == "cpu" else launchers.ROW_BLOCK)
    given = scores().to(DEVICE)
    for rules in ((Rule(kind, VALUES[kind]),), (Rule("top_k", 60), Rule(kind, VALUES[kind]))):
        found = launch.select(given, selection(rules, path))
        check_truncation(given, rules, found)
        seeds = torch.arange(3, device=DEVICE)
        tokens = launch.select_tokens(given, selection(rules, path), seeds, seeds)
        assert torch.equal(tokens, draw.reference_draw(found, seeds, seeds))


@needs_triton
@pytest.mark.parametrize("by_row", [False, True], ids=["", "by row"])
@pytest.mark.parametrize("kind", ["min_p", "top_a", "epsilon"])
@pytest.mark.parametrize("value", [2e-47, 1e-44, 3e-39])
def test_values_that_float32_can_t_tell_from_nothing(monkeypatch, kind, value, by_row):
    """Tokens beside them are told apart by their logits, on each path; as a row's number, if float32 has it."""
    if by_row and not torch.tensor(value).item():
        pytest.skip("a row's value is 0, which is off")
    rows = torch.full((3, 300), -500.0)
    rows[:, 0] = 40.0
    rows[:, 1:200] = 40.0 - torch.linspace(80.0, 119.0, 199)
    rules = [Rule(kind, torch.full((3,), value) if by_row else value)]
    check_truncation(rows, rules, reference_truncate(rows, rules))
    check_truncation(rows, rules, truncate(rows, rules))
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    rows, rules = rows.to(DEVICE), [rules[0]._replace(value=rules[0].value.to(DEVICE))] if by_row else rules
    check_truncation(rows, rules, launch.select(rows, launch.Selection(rules, 300, rows.device)))


@needs_triton
@PATHS
@pytest.mark.parametrize("others", [("eta",), ("top_a",), ("typical",), ("min_p", "top_k"), ("top_k",), ()], ids=str)
def test_a_deviation_behind_what_cannot_act(monkeypatch, others, path):
    """Nothing is likely beside an infinity, but a deviation is: its sums are not those that another rule asked for."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    monkeypatch.setattr(launchers, "ROW_BLOCK", 256 if DEVICE == "cpu" else launchers.ROW_BLOCK)
    given = torch.stack(list(broken_rows(V).values())).to(DEVICE)
    rules = (*(Rule(kind, VALUES[kind]) for kind in others), Rule("top_n_sigma", 1.0), Rule("top_p", 0.8))
    check_truncation(given, rules, launch.select(given, selection(rules, path)))


@KINDS
def test_sampler_and_serving_draw_from_what_is_left(monkeypatch, kind):
    monkeypatch.setattr(launch, "FORCE_KERNEL", launcher.HAS_TRITON)
    monkeypatch.setattr(steps, "FORCE_KERNEL", launcher.HAS_TRITON)
    given, name = scores().to(DEVICE), argument_of(kind)
    kept = reference_truncate(scores(), (Rule(kind, VALUES[kind]),)) > -torch.inf
    seeds = torch.arange(3, device=DEVICE)
    tokens = fl.sample(given, seeds=seeds, positions=seeds, **{name: VALUES[kind]}).tokens
    batch = fl.BatchProcessor(3, V, DEVICE, max_length=4)
    slots = [batch.add(fl.RequestParams(seed=seed, **{name: VALUES[kind]}), [1] * seed) for seed in range(3)]
    assert bool(kept.gather(1, tokens.cpu().unsqueeze(1)).all())
    assert torch.equal(batch.sample(given, slots).tokens, tokens)
    processed = batch.apply(given, slots)
    check_truncation(given, (Rule(kind, VALUES[kind]),), processed)


@KINDS
def test_the_off_value_turns_it_off(kind):
    """In a tensor of one value for each row, and in a record of serving."""
    spec = RULES[kind]
    off = torch.tensor([OFF[kind]] * 3, dtype=torch.int32 if spec.integer else torch.float32)
    assert torch.equal(reference_truncate(scores(), (Rule(kind, off),)), scores())
    batch = fl.BatchProcessor(1, V, "cpu", max_length=4)
    slot = batch.add(fl.RequestParams(**{argument_of(kind): None}), [1])
    assert torch.equal(batch.apply(scores()[:1], [slot]), scores()[:1])


def test_any_number_of_rules():
    """More than there are kinds: none of them sends a list to torch."""
    rules = [Rule("top_p", torch.full((3,), 0.99 - 0.01 * i)) for i in range(20)]
    assert launch.takes_rules(rules)
    check_truncation(scores(), rules, launch.select(scores(), launch.Selection(rules, V, torch.device("cpu"))))


# In a process of its own: a kernel is compiled for what its constants were when it was first asked for.
A_RULE_WITHOUT_BRANCH = """
import sys
import torch
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.rules import CODES, Rule
from fastlogits_kernels.selection import bounds, launch, row

goals = list(row.GOAL.value)
goals[CODES["top_h"]] = row.NO_GOAL.value
for module in (row, bounds):
    module.GOAL = launcher.tl.constexpr(tuple(goals))
scores = torch.zeros(1, 700, device=sys.argv[1])
launch.select(scores, launch.Selection((Rule("top_h", 0.5),), 700, scores.device))
"""


@needs_triton
def test_a_rule_that_no_branch_knows_fails():
    """A rule with a cut-off that ``cutoff`` doesn't know is an error of the compiler, and no other token set."""
    command = [sys.executable, "-W", "ignore", "-c", A_RULE_WITHOUT_BRANCH, DEVICE]
    environment = {**os.environ, "FASTLOGITS_BACKEND": "triton"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    # Which of its kernels is compiled first is left open.
    assert re.search(r"Error: the kernel \w+ can't be", done.stderr), done.stderr
    assert "a rule without a goal has no branch in cutoff()" in done.stderr.splitlines()[-1]
