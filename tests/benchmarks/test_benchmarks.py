"""The benchmarks: what a run leaves behind, and that a wrong result is never given a time."""

import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from fastlogits_kernels.runtime.bits import unpack_bits
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as cli
from benchmarks import documents, folders, inputs, plots, publish, results, workloads
from benchmarks.__main__ import main
from benchmarks.catalogue import catalogue, uncatalogued
from benchmarks.folders import PUBLISHED
from benchmarks.inputs import Case, random_scores
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.handwritten import HANDWRITTEN
from benchmarks.phases import phases_of
from benchmarks.processors import CHAINS, CLASSES, TRUNCATIONS
from benchmarks.targets import verdicts
from benchmarks.timing import ReplayBunch, Timing
from benchmarks.workloads import (
    COPY,
    DRAWS,
    EMPTY,
    FAST,
    FAST_,
    FIRST_STEP,
    LATER_STEP,
    LOOP,
    THEIRS,
    TRANSFORMERS,
    WORKLOADS,
    Contender,
    drawn_from,
)
from tests import entries

ROOT = Path(__file__).parents[2]
_TINY = ["--device", "cpu", "--quick", "--vocab", "64", "--batch", "1", "--ids", "3"]


_COMMANDS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "tests/campaign", "tests/kernels")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.stem != "compiling"  # which calls itself for one case
]
"""Files that are run by their name."""


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """A run of seconds that writes to a folder of its own."""
    monkeypatch.setattr("benchmarks.__main__.SHORT_BUDGET_S", dict.fromkeys(("cpu_us", "gpu_us", "host_us"), 0.0))
    monkeypatch.setattr("benchmarks.run.bandwidth", lambda device: 1e10)
    monkeypatch.setattr("benchmarks.timing._BUNCH_US", 1.0)
    return lambda *more: main([*_TINY, "--out", str(tmp_path), *more])


def _rows(folder):
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_prints_tables_and_leaves_a_csv(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    assert tiny_run("--batch", "1", "2", "--ids", "3", "12", "--targets") == 0
    printed = capsys.readouterr().out
    assert "first step, 3 ids, gauss float32, warm: wall time" in printed
    assert "later step, 12 ids, gauss float32, warm: wall time" in printed
    assert "memory-bandwidth limit" in printed
    assert f"{torch.get_num_threads()} threads" in printed
    assert "CPU never slower than transformers, first step" in printed
    rows = _rows(tmp_path)
    assert {row["workload"] for row in rows} >= {FIRST_STEP, LATER_STEP, *CHAINS, *TRUNCATIONS, *DRAWS}
    assert not {row["workload"] for row in rows} & set(CLASSES)
    assert {row["dtype"] for row in rows if row["workload"] == "draw T p"} == {"float32", "bfloat16"}
    rows = [row for row in rows if row["workload"] in (FIRST_STEP, LATER_STEP)]
    assert tuple(rows[0]) == results.COLUMNS
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert {row["metric"] for row in rows} == {"cpu_us"}
    assert {(row["batch"], row["ids"]) for row in rows} == {("1", "3"), ("1", "12"), ("2", "3"), ("2", "12")}
    fast = next(row for row in rows if row["contender"] == FAST_)
    assert fast["in_place"] == "True"
    assert float(fast["p10"]) <= float(fast["median"]) <= float(fast["p90"])
    assert float(fast["limit_us"]) == pytest.approx(2 * 1 * 64 * 4 / 1e10 * 1e6, abs=1e-3)
    assert (fast["logits"], fast["cache"], fast["remark"]) == ("gauss", "warm", "")
    assert results.read_csv(next(tmp_path.glob("*.csv")))[0].median > 0


def test_a_second_run_appends_to_the_csv(tiny_run, tmp_path):
    tiny_run()
    first = _rows(tmp_path)
    tiny_run()
    both = _rows(tmp_path)
    assert both[: len(first)] == first
    assert len(both) == 2 * len(first)


def test_a_csv_with_other_columns_is_left_alone(tiny_run, tmp_path):
    path = tmp_path / f"{results.slug(inputs.device_name(torch.device('cpu')))}.csv"
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        tiny_run()
    assert path.read_text() == "other,columns\n"


def test_no_csv_leaves_nothing_behind(tiny_run, tmp_path):
    assert tiny_run("--no-csv") == 0
    assert not list(tmp_path.iterdir())


def _forgets_one(scores):
    processed = scores.clone()
    processed[:, 1] = float("-inf")
    return processed


def _raises(scores):
    raise NotImplementedError("not yet")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Contender("wrong one", lambda scores: partial(_forgets_one, scores)), "differs from plain torch"),
        (Contender("wrong one", lambda scores: partial(_raises, scores)), "raised NotImplementedError: not yet"),
        (Contender("wrong one", lambda scores: scores.double), "differs from plain torch"),
    ],
)
@pytest.mark.parametrize("name", [FAST, "another's"])
def test_a_wrong_contender_gets_no_time(tiny_run, tmp_path, capsys, monkeypatch, wrong, reason, name):
    first_step = workloads.WORKLOADS[FIRST_STEP]

    def joined(case):
        return [*(each for each in first_step.contenders(case) if each.name != name), replace(wrong, name=name)]

    monkeypatch.setitem(workloads.WORKLOADS, FIRST_STEP, replace(first_step, contenders=joined))
    assert tiny_run("--workload", FIRST_STEP) == (name == FAST)
    printed = capsys.readouterr().out
    assert f"not timed: first step, cpu, 1 x 64, 3 ids, gauss float32, warm: {name} {reason}" in printed
    assert ("WRONG" in printed) is (name == FAST)
    rows = {row["contender"]: row for row in _rows(tmp_path) if row["workload"] == FIRST_STEP}
    assert rows[name]["median"] == ""
    assert rows[name]["remark"].endswith(reason)
    assert all(rows[other]["median"] for other in (LOOP, FAST, FAST_) if other != name)


def test_a_contender_that_writes_its_input_must_say_so(tiny_run, capsys, monkeypatch):
    first_step = workloads.WORKLOADS[FIRST_STEP]

    def unsaid(case):
        return [replace(contender, in_place=False) for contender in first_step.contenders(case)]

    monkeypatch.setitem(workloads.WORKLOADS, FIRST_STEP, replace(first_step, contenders=unsaid))
    assert tiny_run("--no-csv") == 1
    assert f"{FAST_} wrote its input" in capsys.readouterr().out


def test_every_class_is_measured_and_right(tiny_run, tmp_path, capsys):
    """All of them at a small size, against transformers' own."""
    assert tiny_run("--workload", "*", "--batch", "8", "--vocab", "2000", "--targets") == 0, capsys.readouterr().out
    rows = _rows(tmp_path)
    assert {row["workload"] for row in rows} >= set(CLASSES) | set(CHAINS)
    assert {row["contender"] for row in rows if row["workload"] == "TopPLogitsWarper"} >= {THEIRS, FAST}
    assert "CPU: no class slower than that of transformers" in capsys.readouterr().out
    assert set(CLASSES) == set(entries.names())


def test_only_some_workloads(tiny_run, tmp_path):
    assert tiny_run("--workload", "chain 9") == 0
    assert {row["workload"] for row in _rows(tmp_path)} == {"chain 9"}


def test_rounding_is_right_only_where_a_workload_rounds(tiny_run, monkeypatch):
    chain = WORKLOADS["chain 9"]

    def rounded(by):
        made = lambda scores: chain.contenders(Case(scores.device, *scores.shape, 0))[1].bind(scores)  # noqa: E731
        return lambda case: [Contender(FAST, lambda scores: lambda: made(scores)() * (1 + by))]

    for by, status in ((1e-7, 0), (1e-3, 1)):
        monkeypatch.setitem(workloads.WORKLOADS, "chain 9", replace(chain, contenders=rounded(by)))
        assert tiny_run("--no-csv", "--workload", "chain 9") == status


@pytest.mark.parametrize(
    "more",
    [
        ["--ids", "100"],
        ["--size", "8by9"],
        ["--peers", "nobody"],
        ["--logits", "noise"],
        ["--workload", "chain 10"],
        ["--ids", "some"],
        ["--batch", "0"],
        ["--device", "tpu"],
    ],
)
def test_bad_options_are_refused(tiny_run, more, capsys):
    with pytest.raises(SystemExit, match="2"):
        tiny_run(*more)
    assert "error: " in capsys.readouterr().err


def _results(metric, batch, vocab, ids, **medians):
    case = Case(torch.device("cpu"), batch, vocab, ids)
    names = {"fast": FAST, "fast_": FAST_, "loop": LOOP, "theirs": TRANSFORMERS, "copy": COPY, "empty": EMPTY}
    return [
        results.Result(FIRST_STEP, case, names[name], False, metric, Timing(us, us, us)) for name, us in medians.items()
    ]


def test_targets_are_judged_where_they_are_hardest_to_meet():
    found = results.Results(
        [
            *_results("gpu_us", 1, 32000, 10, fast=5.0, fast_=5.1, copy=5.0, empty=5.0),
            *_results("gpu_us", 64, 128256, 10, fast=30.0, fast_=5.9, copy=20.0, empty=5.0),
            *_results("gpu_us", 256, 151936, 10, fast=80.0, fast_=50.0, copy=78.0, empty=5.0),
            *_results("cpu_us", 8, 128256, 10, fast_=10.0, loop=49.0, theirs=900.0),
        ]
    )
    judged = {verdict.target: verdict for verdict in verdicts(found)}
    in_place = judged["GPU time in place, to 64 x 128256: empty kernel + 1 us"]
    assert in_place.met
    assert in_place.measured.startswith("5.90 us, empty kernel 5.00 us")
    out_of_place = judged["GPU time out of place <= 1.15 x copy_"]
    assert not out_of_place.met
    assert out_of_place.measured.startswith("1.50 x (30.00 / 20.00 us)")
    loop = judged["CPU in place, 10 ids: >= 5 x faster than the loop"]
    assert not loop.met
    assert loop.measured.startswith("4.9 x faster (10.00 / 49.00 us)")
    assert "host time in place <= 3 x add_" not in judged


def test_the_commit_can_be_given_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("FASTLOGITS_COMMIT", "abc1234")
    assert results.commit() == "abc1234"
    monkeypatch.delenv("FASTLOGITS_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert results.commit() == "unknown"


def test_peers_that_are_missing_are_told(tiny_run, tmp_path, capsys):
    absent = Peer("nobody's", "no_such_module_at_all", ("chain *",), lambda name, case: [], devices=("cpu",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEERS, "nobody's", absent)
        assert tiny_run("--workload", "chain 1", "T p", "--peers", "nobody's") == 0
    printed = capsys.readouterr().out
    assert printed.count("nobody's: not installed: no module no_such_module_at_all") == 1
    assert {row["contender"] for row in _rows(tmp_path)} & {"nobody's"} == set()


def test_a_peer_is_measured_beside_the_others(tiny_run, tmp_path, monkeypatch):
    fast = WORKLOADS["chain 1"]

    def contenders(name, case):
        return [replace(fast.contenders(case)[0], name="a peer")]

    monkeypatch.setitem(PEERS, "there", Peer("there", "torch", ("chain 1",), contenders, devices=("cpu",)))
    assert tiny_run("--workload", "chain *", "--peers", "there") == 0
    assert [row["workload"] for row in _rows(tmp_path) if row["contender"] == "a peer"] == ["chain 1"]


def test_compiled_transformers_are_a_peer(tiny_run, tmp_path, monkeypatch):
    """Without a compiler it fails, which is told and isn't our fault; here it stops at the graph."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert tiny_run("--workload", "chain 1", "--peers", "compiled") == 0
    (row,) = (row for row in _rows(tmp_path) if row["contender"] == "transformers, compiled")
    assert row["median"] or row["remark"].startswith("failed: ")


def test_what_many_write_by_hand_is_a_peer(tiny_run, tmp_path):
    """It is right, where tokens don't tie at the cut-off."""
    name = HANDWRITTEN.name
    assert tiny_run("--size", "8x4096", "--workload", *HANDWRITTEN.workloads, "--peers", name, "--logits", "gauss") == 0
    rows = [row for row in _rows(tmp_path) if row["contender"] == name]
    assert {row["workload"] for row in rows} == set(HANDWRITTEN.workloads)
    assert all(row["median"] for row in rows if row["dtype"] == "float32")


def test_only_ours_leaves_the_others_out(tiny_run, tmp_path):
    tiny_run("--workload", "chain 1", "T p", "--only-ours")
    assert not {row["contender"] for row in _rows(tmp_path)} & {THEIRS, LOOP}


def test_a_run_that_takes_too_long_keeps_what_it_has(tiny_run, tmp_path, capsys):
    tiny_run("--workload", "chain *", "--minutes", "0")
    assert re.search(r"stopped after 0 minutes: \d+ cases left out", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_a_main_run_holds_four_sizes_and_the_widths():
    options = cli._parse(["--main", "--device", "cpu"])
    cases = cli._cases(options, torch.device("cpu"), "chain 9")
    assert [case.size for case in cases][:4] == ["1 x 128256", "8 x 128256", "64 x 128256", "256 x 151936"]
    assert len({case.vocab for case in cases if case.batch == 64}) == 3
    assert {workload.main for name, workload in WORKLOADS.items() if name in CLASSES} == {False}


# -- Inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(inputs.LOGITS))
def test_logits_are_the_same_each_time_and_of_their_kind(kind):
    case = Case(torch.device("cpu"), 8, 4000, logits=kind)
    logits = random_scores(case)
    assert torch.equal(logits, random_scores(case))
    heaviest = logits.softmax(-1).max(-1).values
    if kind == "mixture":
        assert bool((heaviest[[0, 1, 2, 4, 5, 6]] > 0.5).all())
        assert bool((heaviest[[3, 7]] < 0.05).all())
    elif kind == "flat":
        assert bool((heaviest < 0.05).all())
        assert float(logits.std()) == pytest.approx(1, rel=0.05)
    elif kind == "gauss":
        assert float(logits.std()) == pytest.approx(3, rel=0.05)
    else:
        expected = -1.5 * torch.arange(1, 4001).log()
        assert torch.allclose(logits.sort(descending=True).values, expected.expand(8, -1))
        assert not torch.equal(logits[0], logits[1])


def test_a_mixture_needs_rows():
    assert all(logits != "mixture" for logits, _ in WORKLOADS["T p"].kinds(1))
    assert any(logits == "mixture" for logits, _ in WORKLOADS["T p"].kinds(8))


def test_drawn_tokens_are_checked_against_what_is_kept():
    scores = random_scores(Case(torch.device("cpu"), 4, 300))
    best, worst = scores.argmax(-1), scores.argmin(-1)
    agrees = drawn_from("draw T k p")
    assert agrees(scores, best.int(), best)
    assert not agrees(scores, torch.cat((best[:3], worst[3:])), best)
    assert not agrees(scores, best[:3], best)
    ours = drawn_from("draw T k p", same=True)
    second = scores.topk(2).indices[:, 1]
    assert agrees(scores, second, best)
    assert not ours(scores, second, best[:2])
    assert ours(scores, torch.cat((best[:2], second[2:])), best[:2])


def test_a_grammar_allows_half_of_the_tokens():
    allowed = unpack_bits(workloads.grammar(Case(torch.device("cpu"), 4, 1000)), 1000)
    assert 0.4 < float(allowed.float().mean()) < 0.6


# -- Plots, report and documents ----------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """A folder with a results file of made-up times, in which the measured times are the size."""
    made = []
    for name, metric in (("chain 1", "gpu_us"), ("chain 5", "gpu_us"), ("chain 9", "gpu_us"), ("T p", "gpu_us")):
        for batch, vocab in ((1, 128256), (8, 128256), (64, 32000), (64, 128256), (64, 262144), (256, 151936)):
            for contender, factor in ((THEIRS, 10.0), (FAST, 1.5), (COPY, 1.0), ("a rival", 1.2)):
                case = Case(torch.device("cpu"), batch, vocab)
                us = factor * batch * vocab * 8 / 4e6
                result = results.Result(
                    name, case, contender, False, metric, Timing(us, us * 0.9, us * 1.1), "", 1 << 20, us / factor
                )
                made.append(replace(results.records_of([result])[0], device="Some GPU", timestamp="2026-01-02"))
    refused = results.Result(
        "T p", Case(torch.device("cpu"), 1, 128256), "a liar", False, "gpu_us", None, "wrong: differs"
    )
    made.append(replace(results.records_of([refused])[0], device="Some GPU", timestamp="2026-01-02"))
    results.append_csv(made, tmp_path / "some-gpu.csv")
    return tmp_path


def test_what_is_older_than_the_last_day_is_not_shown(measured):
    first = results.read_folder(measured)[0]
    again = replace(first, median=7.0, timestamp="2026-01-03")
    forgotten = replace(first, contender="a forgotten rival", timestamp="2025-12-31")
    elsewhere = replace(forgotten, device="An older GPU")
    found = results.newest([first, forgotten, elsewhere, again])
    assert found == [again, elsewhere]


def test_plots_are_drawn_from_the_files_and_reported(measured, capsys):
    assert main(["plots", "--results", str(measured)]) == 0
    names = {path.name for path in measured.glob("*.svg")}
    assert names == {
        f"some-gpu-{name}-gpu.svg" for name in ("headline", "speed-up", "memory-limit", "chain-length", "vocabulary")
    }
    first = (measured / "some-gpu-speed-up-gpu.svg").read_bytes()
    assert (measured / "some-gpu-speed-up-gpu.png").read_bytes().startswith(b"\x89PNG")
    main(["plots", "--results", str(measured)])
    assert (measured / "some-gpu-speed-up-gpu.svg").read_bytes() == first
    assert "wrote" in capsys.readouterr().out
    check_report(measured)


def shown_labels(axis):
    """The labels of an axis that lie between its ends."""
    low, high = sorted(axis.get_view_interval())
    return [label.get_text() for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            if label.get_text() and low <= at <= high]  # fmt: skip


@pytest.mark.parametrize("name", plots._PLOTS)
def test_plots_say_what_they_show(measured, name):
    """Plain names, at least three labels of each axis, a unit, and what is better."""
    records = [record for record in results.newest(results.read_folder(measured)) if record.median is not None]
    figure = plots._PLOTS[name](records)
    figure.canvas.draw()
    assert ("higher is better" if name == "speed-up" else "lower is better") in figure.get_suptitle()
    said = [figure.get_suptitle()]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert len(shown_labels(axis)) >= 3, (name, axes.get_title(), shown_labels(axis))
            said += shown_labels(axis)
        said += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        is_bars = name in ("headline", "chain-length")
        assert axes.get_xlabel()
        assert is_bars or axes.get_ylabel()
        assert not (is_bars and axes.lines)  # a line would join what has no order
    said += [text.get_text() for legend in figure.legends for text in legend.texts]
    codes = [each for each in said if re.search(r"chain \d|\bT [a-z]|\bdraw\b|copy_|_\(|10\^|\\math", each)]
    assert not codes


def test_points_below_the_memory_limit_have_a_reason(measured):
    records = [record for record in results.read_folder(measured) if record.median is not None]
    assert "Below the limit" not in plots.against_memory_limit(records).get_suptitle()
    faster = [replace(record, median=record.median / 4) for record in records]
    assert "Below the limit" in plots.against_memory_limit(faster).get_suptitle()


@given(st.floats(-3, 6), st.floats(0, 6))
def test_marks_of_an_axis_hold_what_it_shows(power, span):
    low, high = 10.0**power, 10.0 ** (power + span)
    marks = plots._marks(low, high)
    assert len(marks) >= 3
    assert marks[0] <= low <= high <= marks[-1]
    assert marks == sorted(set(marks))
    assert len(marks) <= 3 * plots._DECADES


def test_main_workloads_have_plain_names():
    assert {name for name, workload in WORKLOADS.items() if workload.main} <= set(documents.MEANS)


def check_report(measured):
    """It holds the plots, tables and refusals."""
    main(["report", "--results", str(measured)])
    page = (measured / "report.html").read_text()
    assert page.count("<svg") == 5
    assert all(f"<li>{kind}: " in page for kind in inputs.MEANINGS)
    assert page.index("<svg") < page.index("<table")
    assert "<h2 id='some-gpu'>Some GPU</h2>" in page
    assert page.index("href='#some-gpu'") < page.index("<svg")
    assert all(f"id='{link}'" in page for link in re.findall(r"href='#([^']+)'", page))
    assert "title='wrong: differs'>wrong</span>" in page
    assert "peak memory 1.0 MiB" in page
    assert not re.search(r"(src|href)=['\"]http", page)


def test_documents_are_filled_from_the_files(measured, tmp_path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    mark = "a\n<!-- benchmarks: {} -->\nold\n<!-- /benchmarks -->\nb\n"
    (root / "README.md").write_text(mark.format("gpu-all") + mark.format("plot"))
    for name in documents.DOCUMENTS[1:]:
        (root / name).write_text("nothing\n")
    assert documents.fill(measured, write=False, root=root) == [root / "README.md"]
    assert "old" in (root / "README.md").read_text()
    documents.fill(measured, root=root)
    assert documents.fill(measured, root=root) == []
    text = (root / "README.md").read_text()
    assert "old" not in text
    chain_9 = [line for line in text.splitlines() if "min-p 0.05 |" in line and "transformers" in line]
    assert chain_9 == [f"| {documents.MEANS['chain 9']} | transformers | 2.6 | 21 | 164 | 778 |"]
    assert "|  | **fastlogits** | 0.4 | 3.1 | 25 | 117 |" in text
    assert "|  | a rival | 0.3 | 2.5 | 20 | 93 |" in text
    assert "/benchmarks/results/some-gpu-headline-gpu.png)" in text
    (root / "README.md").write_text(mark.format("weather"))
    with pytest.raises(ValueError, match="no region 'weather'"):
        documents.fill(measured, root=root)


def test_the_table_holds_every_processor():
    assert uncatalogued() == set()
    rows = catalogue().splitlines()[2:]
    assert len(rows) == len({row.split("|")[1] for row in rows})
    costs = {row.split("|")[1].strip(" `"): row.split("|")[4].strip() for row in rows}
    assert costs["TemperatureLogitsWarper"] == "the shared pass"
    assert costs["NoRepeatNGramLogitsProcessor"] == "the shared pass, the shared search before it"
    assert costs["TopKLogitsWarper"] == "the shared selection"
    assert costs["TopPLogitsWarper"] == "the shared selection, where it comes first a read more"


@pytest.mark.skipif(transformers.__version__ < "5", reason="the documents' table is that of the newest transformers")
def test_the_documents_are_up_to_date():
    assert documents.fill(PUBLISHED, write=False) == [], "run python -m benchmarks readme"


def test_the_files_are_of_one_schema():
    assert results.read_folder(PUBLISHED)
    for record in results.read_folder(PUBLISHED):
        assert (record.median is None) == bool(record.remark)


# -- Another commit -----------------------------------------------------------------------------------------------


def test_a_base_is_measured_in_turns(tmp_path):
    """In a repository of two commits, the second of which is slower."""
    clone = tmp_path / "clone"
    clone.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(clone)]
    for part in ("fastlogits", "kernels", "benchmarks"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    slow = clone / "fastlogits" / "processors" / "scaling.py"
    slow.write_text(
        slow.read_text().replace("        return Scale(", "        __import__('time')\n        return Scale(")
    )
    assert "__import__('time')" in slow.read_text()
    code = (
        "import sys; from rich.console import Console; from benchmarks.base import compare;"
        "sys.exit(compare('HEAD', sys.argv[1:], Console(width=200), turns=1))"
    )
    arguments = ["--quick", "--device", "cpu", "--size", "1x300", "--workload", "chain 1", "--base", "HEAD"]
    environment = {k: v for k, v in os.environ.items() if k != "FASTLOGITS_COMMIT"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (clone, clone / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert f"turn 1 of 1: base, {head}" in done.stdout
    assert f"{head}+dirty beside {head}" in done.stdout
    assert re.search(
        r"chain 1 .* fastlogits .* 1 x 300 .* gauss float32, warm .* cpu .* \d+\.\d+ .* \d+\.\d+", done.stdout
    )
    assert (
        subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout.count("\n") == 1
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_call_keeps_what_its_graph_reads():
    """Also tensors that nothing but the call holds: their memory isn't given to others."""

    def call(parameter: torch.Tensor) -> torch.Tensor:
        return parameter * 2

    replays = ReplayBunch([partial(call, torch.full((1 << 16,), 3.0, device="cuda"))])
    others = [torch.zeros(1 << 16, device="cuda") for _ in range(64)]
    assert torch.equal(replays.once(), torch.full_like(others[0], 6.0))


def test_what_a_first_call_waits_for_is_kept_with_what_it_was_measured_on(tmp_path, capsys, monkeypatch):
    from benchmarks import compiling

    chosen = ["--workload", "draw T", "--device", "cpu", "--batch", "1", "--vocab", "64", "--out", str(tmp_path)]
    assert main(["compile", *chosen]) == 0
    monkeypatch.setattr(compiling, "first_calls", lambda *_: {FAST: compiling.First(12.25, 0.5, 6)})
    assert main(["compile", *chosen]) == 0
    measured, made_up = _rows(tmp_path)
    assert (measured["workload"], measured["contender"], measured["vocab"]) == ("draw T", FAST, "64")
    assert all(0 < float(measured[seconds]) < 60 for seconds in ("cold_s", "cached_s"))
    assert measured["kernels"] == "0"  # a CPU compiles nothing
    assert (made_up["kernels"], made_up["cold_s"], made_up["cached_s"]) == ("6", "12.250", "0.500")
    assert {"commit", "torch", "triton", "device", "cores", "dtype"} < set(measured)
    assert "12.25 s   0.50 s" in capsys.readouterr().out


def test_a_first_call_that_fails_and_what_is_not_there(tmp_path, capsys, monkeypatch):
    from benchmarks import compiling

    def fails(*arguments):
        raise RuntimeError("draw T: the process of a first call failed: no ptxas")

    monkeypatch.setattr(compiling, "first_calls", fails)
    assert main(["compile", "--workload", "draw T", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "no ptxas" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["compile", "--workload", "draw X", "--device", "cpu"])
    assert "nothing is called ['draw X']" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["compile"])
        assert "nothing is compiled here" in capsys.readouterr().err


def test_cliffs_are_looked_for_everywhere():
    """Every rule has a value that it is measured with, every kind of logits is what it says."""
    from fastlogits_kernels.rules import RULES

    from benchmarks import cliffs

    assert set(cliffs.VALUES) == set(RULES)
    sets = cliffs.rule_sets(alone=False)
    assert len(sets) == len(set(sets)) == len(RULES) * (len(RULES) + 1) // 2
    case = Case(torch.device("cpu"), 4, 1000)
    made = {name: make(case) for name, make in cliffs.LOGITS.items()}
    assert all(scores.shape == (4, 1000) and scores.dtype == torch.float32 for scores in made.values())
    assert (made["half -inf"] == -float("inf")).sum() == 2000
    assert (made["spike"].softmax(-1).amax(-1) > 0.9).all()
    assert made["ties"].unique().numel() < made["gauss"].unique().numel()
    if not torch.cuda.is_available():
        assert cliffs.main([]) == 2


# -- Publishing ----------------------------------------------------------------------------------------------------


def _publish(tmp_path, *arguments):
    folders = ("--local", str(tmp_path / "local"), "--published", str(tmp_path / "published"))
    return publish.main([*arguments, *folders])


def test_a_run_is_published_whole(tiny_run, tmp_path, capsys):
    """Documents show one run; one that lacks what they show is refused, and nothing changes."""
    for name, measured_ones in (("first", ("chain 1", "T p")), ("second", ("chain 1", "T p")), ("less", ("chain 1",))):
        assert main([*_TINY, "--out", str(tmp_path / "local" / name), "--workload", *measured_ones]) == 0
    assert _publish(tmp_path) == 0
    assert capsys.readouterr().out.split()[-3:] == ["first", "less", "second"]
    assert _publish(tmp_path, "first") == 0
    (path,) = (tmp_path / "published").glob("*.csv")
    first = path.read_text()
    assert _publish(tmp_path, "second") == 0
    assert path.read_text() != first
    assert len(path.read_text().splitlines()) == len(first.splitlines())
    second = path.read_text()
    assert _publish(tmp_path, "less") == 1
    told = capsys.readouterr().out
    assert "published figures are not in this run" in told
    assert "T p, 1 x 64" in told
    assert path.read_text() == second
    assert _publish(tmp_path, "less", "--force") == 0
    assert {record.workload for record in results.read_csv(path)} == {"chain 1"}
    with pytest.raises(SystemExit):
        _publish(tmp_path, "none")


def test_a_run_writes_to_a_folder_that_git_ignores():
    made = cli._parse([]).out
    assert made.parent == folders.LOCAL
    ignored = subprocess.run(["git", "check-ignore", "-q", str(made)], cwd=folders.ROOT, check=False)
    assert ignored.returncode in (0, 128)  # there may be no git


def test_a_run_says_how_long_it_takes_and_who_is_not_there(tiny_run, capsys):
    tiny_run("--workload", "T p", "--peers", "FlashInfer")
    told = capsys.readouterr().out
    assert re.search(r"\d+ cases, about \d+ min", told)
    assert "FlashInfer: doesn't run on cpu" in told


def test_targets_are_told_where_asked_for(tiny_run, capsys):
    tiny_run("--batch", "1")
    assert "Targets" not in capsys.readouterr().out


def test_phases_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["phases", "--workload", "draw T", "--size", "2x64"]) == 2
    assert "there is none here" in capsys.readouterr().out
    for wrong, message in (
        (["--workload", "X"], "nothing is called"),
        (["--workload", "draw T", "--size", "3"], "64x"),
    ):
        with pytest.raises(SystemExit):
            main(["phases", *wrong])
        assert message in capsys.readouterr().err


def test_kernels_of_a_call_by_what_the_profiler_saw(monkeypatch):
    seen = [SimpleNamespace(key=name, count=n, self_device_time_total=us) for name, n, us in (
        ("filter_kernel", 20, 60.0), ("Activity Buffer Request", 1, 0), ("refine_kernel", 40, 90.0)
    )]  # fmt: skip

    class Profile:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            return seen

    calls = []
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert phases_of(lambda: calls.append(1), 20) == [("refine_kernel", 2.0, 4.5), ("filter_kernel", 1.0, 3.0)]
    assert len(calls) == 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_phases_of_a_sampler(tmp_path, capsys):
    assert main(["phases", "--workload", "draw T k p", "--size", "2x4096", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert {"bounds_kernel", "filter_kernel", "refine_kernel"} <= {row["kernel"] for row in results.read_rows(path)}
    assert "by graph replay" in capsys.readouterr().out


# -- Command lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _COMMANDS)
def test_a_command_says_what_it_does(path, monkeypatch, capsys):
    """``--help`` runs nothing, and says more than the arguments."""
    monkeypatch.setenv("FASTLOGITS_FUZZ", os.environ.get("FASTLOGITS_FUZZ", ""))  # which one of them sets
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert left.value.code == 0
    assert usage.startswith(("usage: python ", "usage: torchrun "))
    assert not rest.startswith(("positional", "options"))
