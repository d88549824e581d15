"""The campaign's own parts: what it reads, what it makes wrong, and short runs of what takes long."""

import importlib
import pkgutil
import re
import subprocess
import sys

import fastlogits_kernels
import pytest
import torch
from fastlogits_kernels.runtime.launcher import HAS_TRITON, Launcher

from benchmarks.results import read_rows
from tests.campaign import mutations, sanitizer, sanitizer_cases, soak, soak_decode, statistics
from tests.campaign.mutations import Mutation
from tests.campaign.record import ROOT

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
========= Error: Race reported between Write access at refine_kernel+0x1b0 in refine.py:400
=========     and Read access at refine_kernel+0x2d0 in refine.py:404 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "errors", "stopped", "first"),
    [
        (CLEAN, 0, False, ""),
        (OUT_OF_BOUNDS, 3, True, "Invalid __global__ write of size 4 bytes"),
        (RACE, 1, False, "Error: Race reported between Write access at refine_kernel+0x1b0 in refine.py:400"),
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


def test_all_cases_of_an_operation_are_dealt_to_one_process():
    cases = sanitizer_cases.chosen(None)
    assert {case.operation for case in cases} == set(sanitizer_cases.OPERATIONS)
    assert any(case.far for case in cases)
    dealt = sanitizer._dealt(cases, 16)
    assert sorted(case.name for some in dealt for case in some) == sorted(case.name for case in cases)
    of = [(case.operation, number) for number, some in enumerate(dealt) for case in some]
    assert len(set(of)) == len(sanitizer_cases.OPERATIONS)
    with pytest.raises(ValueError, match="no such cases: nothing"):
        sanitizer_cases.chosen(["nothing"])


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.usefixtures("one_thread")
def test_every_kernel_has_a_case_and_stays_within_its_guards(device, monkeypatch):
    torch.utils.deterministic.fill_uninitialized_memory = False
    launched = set()
    launch = Launcher.__call__

    def noted(self, key, programs, args):
        launched.add(self.name)
        return launch(self, key, programs, args)

    monkeypatch.setattr(Launcher, "__call__", noted)
    for operation in sanitizer_cases.OPERATIONS:
        of_it = [case for case in sanitizer_cases.chosen([operation]) if not case.far]
        smallest = next(case for case in of_it if case.B == 3 and case.V >= 32)
        # No rows at first, and where the same kernels have been launched before.
        for case in (next(case for case in of_it if not case.B), smallest, smallest._replace(B=0)):
            sanitizer_cases.run_case(case, torch.device(device), check=True)
    found = pkgutil.walk_packages(fastlogits_kernels.__path__, "fastlogits_kernels.")
    modules = [importlib.import_module(each.name) for each in found]
    of_package = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert len(of_package) > 30
    assert launched == of_package


STAND_IN = """#!/usr/bin/env bash
# Says what compute-sanitizer says, after the command line that follows its own options; of one tool it runs.
[ "$1" = --version ] && printf 'NVIDIA (R) Compute Sanitizer\\nVersion 2026.1.0.0 (build 1) (public-release)\\n' && exit
tool=$2 log=$8 status=0 errors=0
shift 8
if [[ $* == *sanitizer_control* ]]; then
    [ "$tool" = initcheck ] || errors=1
elif [ "$tool" != memcheck ]; then
    echo "done pack_ids-3x32"
else
    "$@"
    status=$?
fi
if [ "$tool" = racecheck ]; then echo "========= Error: Race reported between Write access at a
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)" > "$log"
elif [ "$tool" != synccheck ]; then echo "========= ERROR SUMMARY: $errors errors" > "$log"; fi
exit $status
"""


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="tries the script with Triton's interpreter")
def test_a_tool_in_another_process_says_what_becomes_of_the_cases(tmp_path, monkeypatch):
    """One that finds nothing, one that finds something, one that never does, and one that never says anything."""
    monkeypatch.setattr(sanitizer, "RESULTS", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    given = ["--device", "cpu", "--program", str(program), "--logs", str(tmp_path), "--cases", "pack_ids-3x32"]
    assert sanitizer.main([*given, "--tools", "memcheck", "racecheck", "initcheck", "synccheck"]) == 1
    (written,) = tmp_path.glob("sanitizer-*.csv")
    rows = {row["tool"]: row for row in read_rows(written)}
    assert {tool: (row["done"], row["errors"], row["outcome"]) for tool, row in rows.items()} == {
        "guards": ("1", "0", "clean"),
        "memcheck": ("1", "0", "clean"),
        "racecheck": ("1", "2", "not clean"),
        "initcheck": ("1", "0", "not clean"),
        "synccheck": ("1", "unknown", "not clean"),
    }
    assert rows["racecheck"]["first"] == "Error: Race reported between Write access at a"
    assert rows["initcheck"]["first"].startswith("blind: initcheck finds nothing")
    assert rows["memcheck"]["sanitizer"] == "2026.1.0.0"


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="tries the script with Triton's interpreter")
@pytest.mark.parametrize(("crashes", "outcome"), [(1, "clean"), (2, "not clean")])
def test_a_tool_that_crashes_is_begun_once_more(crashes, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "RESULTS", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    crash = f"""elif [ $(cat {tmp_path}/crashed 2> /dev/null | wc -l) -lt {crashes} ]; then
    echo >> {tmp_path}/crashed; kill -SEGV $$
elif"""
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN.replace("elif", crash, 1))
    program.chmod(0o755)
    given = ["--device", "cpu", "--program", str(program), "--logs", str(tmp_path), "--cases", "pack_ids-3x32"]
    assert sanitizer.main([*given, "--tools", "memcheck"]) == int(outcome != "clean")
    (written,) = tmp_path.glob("sanitizer-*.csv")
    row = next(row for row in read_rows(written) if row["tool"] == "memcheck")
    assert (row["outcome"], row["begun_again"]) == (outcome, "1")


def test_guards_see_what_is_written_beside_an_allocation(device):
    guards = sanitizer_cases.Guards(torch.device(device))
    with guards:
        made = [torch.empty(5, device=device), torch.zeros(3, 2, dtype=torch.int64, device=device)]
    assert not made[1].any()
    guards.check()
    made[0].as_strided((1,), (1,), made[0].storage_offset() + 5).fill_(1.0)
    with pytest.raises(AssertionError, match="beside an allocation of 20 bytes"):
        guards.check()


def test_new_examples_round_after_round():
    """In one process, of a test that is a method: each round makes its class anew."""
    test = "tests/processors/test_audio.py::TestWhisper::test_timestamps"
    command = [
        sys.executable,
        "-c",
        f"from tests.campaign import fuzz; raise SystemExit(fuzz.main('0', {test!r}, least=2))",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    told = re.search(r"([\d,]+) examples in (\d+) round", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert told is not None
    assert int(told[2]) == 2
    assert int(told[1].replace(",", "")) > 2


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
    monkeypatch.setattr("fastlogits.serving.batch.swap_slots", lambda *arguments: None)
    with pytest.raises(AssertionError, match="other"):
        soak.Soak(torch.device("cpu"), size).run(1000)


@pytest.mark.usefixtures("one_thread")
def test_a_short_soak_of_decode_and_one_with_other_seeds(monkeypatch):
    found = soak_decode.run(torch.device("cpu"), 500)
    assert found.steps >= 500
    assert found.looks
    refuse = soak_decode._refuse

    def change_seeds(request):
        request.seeds.add_(1)
        refuse(request)

    monkeypatch.setattr(soak_decode, "_refuse", change_seeds)
    with pytest.raises(AssertionError, match="other tokens"):
        soak_decode.run(torch.device("cpu"), 1500)


# -- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_draws_fit_and_draws_that_come_twice_do_not(monkeypatch, capsys):
    few = {each.how: each for each in statistics.CASES if each.name in ("T k p", "k lowest")}
    assert set(few) == {"sampler", "serving", "processors"}
    monkeypatch.setattr(statistics, "CASES", list(few.values()))
    arguments = ["--device", "cpu", "--draws", "4096", "--no-csv"]
    assert statistics.main(arguments) == 0
    keys = statistics._keys
    monkeypatch.setattr(
        statistics, "_keys", lambda *given: tuple(each[::8].repeat_interleave(8) for each in keys(*given))
    )
    assert statistics.main(arguments) == 1
    assert "DO NOT FIT" in " ".join(capsys.readouterr().out.split())


def test_many_probabilities_together():
    assert statistics.together([0.5]) == (0.5, pytest.approx(0.5))
    assert statistics.together([0.0004, 0.5])[0] == pytest.approx(0.0008)
    even = [(i + 0.5) / 100 for i in range(100)]
    assert statistics.together(even)[1] > 0.3
    assert statistics.together([each / 4 for each in even])[1] < 1e-3
