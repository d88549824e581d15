"""The campaign's own parts: what it reads, what it makes wrong, and short runs of what takes long."""

import pytest
import torch
from fastlogits_kernels._triton import HAS_TRITON

from tests.campaign import mutations, sanitizer, sanitizer_cases, soak
from tests.campaign.mutations import Mutation

CLEAN = """========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _fold_kernel+0x90 in fold.py:150
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f1a4ac00fc0 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f1a4ac00e00 of size 448 bytes
=========
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at settle_kernel+0x1b0 in settle.py:400
=========     and Read access at settle_kernel+0x2d0 in settle.py:404 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "errors", "stopped", "first"),
    [
        (CLEAN, 0, False, ""),
        (OUT_OF_BOUNDS, 3, True, "Invalid __global__ write of size 4 bytes"),
        (RACE, 1, False, "Error: Race reported between Write access at settle_kernel+0x1b0 in settle.py:400"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, False, ""),
        (CLEAN + OUT_OF_BOUNDS, 3, True, "Invalid __global__ write of size 4 bytes"),
        ("========= COMPUTE-SANITIZER\n========= Error: process did not launch\n", None, True, None),
        ("", None, False, ""),
    ],
)
def test_logs_of_the_sanitizer(text, errors, stopped, first):
    found = sanitizer.read_log(text)
    assert (found.errors, found.stopped) == (errors, stopped)
    assert first is None or found.first == first


def test_cases_say_what_became_of_them():
    seen = sanitizer.read_cases("noise\ndone fold-3x32\nfailed select-3x32: row 1 is wrong\nleft out fold-1x151936\n")
    assert seen == (["fold-3x32"], {"select-3x32": "row 1 is wrong"}, ["fold-1x151936"])


def test_every_tool_has_cases_that_it_can_take():
    cases = sanitizer_cases.chosen(None)
    assert {case.operation for case in cases} == set(sanitizer_cases.OPERATIONS)
    for tool in sanitizer.TOOLS:
        given = sanitizer.cases_for(tool, cases, named=False)
        assert {case.operation for case in given} == set(sanitizer_cases.OPERATIONS)
        assert any(case.far for case in given) == (tool == "memcheck")
        assert tool != "racecheck" or all(case.is_small for case in given)
    dealt = sanitizer._dealt(cases, 16)
    assert sorted(case.name for some in dealt for case in some) == sorted(case.name for case in cases)
    with pytest.raises(ValueError, match="no such cases: nothing"):
        sanitizer_cases.chosen(["nothing"])


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("name", ["mask_tokens", "bitmask", "pack_ids", "fold", "select", "draw", "report", "synthid"])
def test_kernels_stay_within_their_guards(name, device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    for case in sanitizer_cases.chosen([f"{name}-0x1000", f"{name}-3x32"]):
        sanitizer_cases.run_case(case, torch.device(device), check=True)


def test_guards_see_what_is_written_beside_an_allocation(device):
    guards = sanitizer_cases.Guards(torch.device(device))
    with guards:
        made = [torch.empty(5, device=device), torch.zeros(3, 2, dtype=torch.int64, device=device)]
    assert not made[1].any()
    guards.check()
    made[0].as_strided((1,), (1,), made[0].storage_offset() + 5).fill_(1.0)
    with pytest.raises(AssertionError, match="beside an allocation of 20 bytes"):
        guards.check()


def test_mutations_are_of_texts_that_stand_once():
    assert len({each.name for each in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
    for each in mutations.MUTATIONS:
        assert mutations.mutated(each, (mutations.ROOT / each.file).read_text())
    twice = Mutation("twice", "a.py", "x", "y", ())
    with pytest.raises(ValueError, match=r"twice: a\.py holds 2 times"):
        mutations.mutated(twice, "x x")


def test_only_tests_that_ran_and_failed_catch_a_mutation():
    assert mutations.verdict(0, "") == "survived"
    assert mutations.verdict(1, "") == mutations.verdict(-11, "") == "caught"
    with pytest.raises(RuntimeError, match="status 2:\nno such test"):
        mutations.verdict(2, "no such test")


@pytest.mark.usefixtures("one_thread")
def test_a_short_soak_and_one_that_swaps_wrongly(monkeypatch):
    size = soak.SIZES["cpu"]._replace(stretches=2)
    found = soak.Soak(torch.device("cpu"), size).run(250)
    assert found.steps >= 250
    assert found.looks
    assert found.again
    monkeypatch.setattr("fastlogits.serving.swap_slots", lambda *arguments: None)
    with pytest.raises(AssertionError, match="other"):
        soak.Soak(torch.device("cpu"), size).run(1000)
