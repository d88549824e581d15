"""Looking inside: what a plan says of itself, traces, checks, and the command line."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from fastlogits_kernels.runtime import backend
from fastlogits_kernels.runtime.launcher import Launcher
from fastlogits_kernels.selection import launch
from transformers import PreTrainedTokenizerFast

import fastlogits as fl
from fastlogits.__main__ import main
from fastlogits.inspect import doctor
from fastlogits.plan.stages import Ban, Scale
from tests.models import BUILDERS

V = 200
INF = float("inf")
IDS = torch.tensor([[5, 6, 5, 6, 5], [9, 8, 7, 9, 8]])


def scores(rows=2, vocab=V):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3


class Add(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + 1


class Heats(fl.StagedProcessor, transformers.TemperatureLogitsWarper):
    """A stage that isn't what the call of its base says."""

    def stage(self):
        return Scale(self.temperature * 1.001)


TOP = scores().argmax(-1).tolist()
"""The likeliest token of each row."""


class BansAnother(fl.StagedProcessor, transformers.SuppressTokensLogitsProcessor):
    def stage(self):
        return Ban((TOP[1],))


def _chain():
    return [
        fl.RepetitionPenaltyLogitsProcessor(1.1),
        fl.NoRepeatNGramLogitsProcessor(2),
        fl.TemperatureLogitsWarper(0.7),
        fl.SuppressTokensLogitsProcessor([3, 4]),
    ]


# -- explain ------------------------------------------------------------------------------------------------------


def test_explain_names_the_law_of_each_merge():
    explanation = fl.LogitsProcessorList([*_chain(), fl.TopKLogitsWarper(50), fl.LogitNormalization()]).explain()
    fold, truncation, _ = explanation.parts
    bans = "NoRepeatNGramLogitsProcessor, SuppressTokensLogitsProcessor"
    assert fold.reasons == (
        f"why: mask . mask = mask (or) ({bans})",
        "why: a mask commutes with every map that keeps -inf (SuppressTokensLogitsProcessor)",
        "why: pointwise maps compose, in their order",
    )
    assert truncation.reasons == ()
    assert explanation.gpu == (
        "at most 5 launches",
        "parts 1, 2 and 3 share one read and one write of the logits, after a look at a sample of each row",
        "why: a pointwise map is done wherever a logit is read (part 1, part 2)",
        "why: the sum over a row is that over the tokens kept (part 2, part 3)",
    )
    assert all(line in explanation for line in (*fold.reasons, *explanation.gpu))


@pytest.mark.parametrize(
    ("between", "merges"),
    [(fl.TemperatureLogitsWarper(0.5), True), (fl.InfNanRemoveLogitsProcessor(), False)],
)
def test_a_mask_is_said_to_move_only_where_it_does(between, merges):
    banning = fl.SuppressTokensLogitsProcessor([1]), fl.NoRepeatNGramLogitsProcessor(2)
    processors = fl.LogitsProcessorList([banning[0], between, banning[1]])
    assert ("a mask commutes" in processors.explain()) is merges
    (step,) = processors.plan.inner_parts
    chain = step.inputs(IDS, scores(), None)[0]
    assert (chain.search.sets == 1) is merges


def test_sources_that_are_searched_for_once():
    twice = [fl.RepetitionPenaltyLogitsProcessor(1.1), fl.RepetitionPenaltyLogitsProcessor(1.2)]
    assert "why: the same tokens are searched for once" in fl.LogitsProcessorList(twice).explain()
    other = [fl.RepetitionPenaltyLogitsProcessor(1.1), fl.RepetitionPenaltyLogitsProcessor(1.2, 2)]
    assert "searched for once" not in fl.LogitsProcessorList(other).explain()


def test_explain_tells_bytes_and_the_least_time():
    explain = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.7), Add()]).plan.explain
    assert "logits of" not in explain()
    size = 64 * 128256 * 2
    line = explain((64, 128256), torch.bfloat16, bandwidth=4e12).gpu[-1]
    least = f"at least {4 * size / 1e6:.1f} MB to move, {1e6 * 4 * size / 4e12:.1f} us at 4,000 GB/s"
    assert line == f"bfloat16 logits of 64 x 128256: {least}; a copy of them moves {2 * size / 1e6:.1f} MB"
    with pytest.raises(ValueError, match="shape must be"):
        explain((1, 2, 3))
    with pytest.raises(ValueError, match="bandwidth must be"):
        explain((1, 2), bandwidth=0.0)


def test_explain_as_html_is_whole_and_escaped():
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens([1], window=2), fl.TopPLogitsWarper(0.9)])
    html = processors.explain()._repr_html_()
    assert "ban 1 token while step &lt; 2" in html
    assert html.count("<tr>") == html.count("</tr>") == 5
    assert "TopPLogitsWarper" in html


@pytest.mark.parametrize(
    "processors",
    [
        [fl.TemperatureLogitsWarper(0.7)],
        [fl.RepetitionPenaltyLogitsProcessor(1.1)],
        [fl.TopKLogitsWarper(5)],
        [fl.TopPLogitsWarper(0.9)],
        [fl.RepetitionPenaltyLogitsProcessor(1.1), fl.MinPLogitsWarper(0.1), fl.TypicalLogitsWarper(0.9)],
        [fl.TypicalLogitsWarper(0.9), fl.LogitNormalization()],
        [fl.SuppressTokensLogitsProcessor([3]), fl.TopKLogitsWarper(5)],
    ],
)
def test_no_more_launches_than_explain_says(processors, monkeypatch, device):
    plan = fl.LogitsProcessorList(processors).plan
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    launched = []
    call = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: launched.append(self) or call(self, *args))
    scored = scores().to(device)
    for step in plan.parts:
        launched.clear()
        scored = step(IDS.to(device), scored, None)
        # On the CPU only a selection runs its kernels, and finds its tokens in torch.
        if device == "cuda" or step.takes_in_others:
            assert step.cost().launches - step.cost().launches // 4 <= len(launched) <= step.cost().launches


# -- trace --------------------------------------------------------------------------------------------------------


def test_trace_tells_what_each_processor_removed():
    processors = [fl.SuppressTokensLogitsProcessor([3, 4]), fl.TemperatureLogitsWarper(0.5), fl.TopKLogitsWarper(10)]
    found = fl.trace(processors, IDS, scores())
    assert [(change.processor, change.row) for change in found] == [
        (type(processor).__name__, row) for processor in processors for row in (0, 1)
    ]
    banned, heated, kept = found[0], found[2], found[4]
    probabilities = scores()[0].double().softmax(-1)
    assert (banned.removed, banned.left, banned.changed) == (2, V - 2, 0)
    assert {token for token, _ in banned.removed_likeliest} == {3, 4}
    assert banned.kept_mass == pytest.approx(float(1 - probabilities[[3, 4]].sum()))
    assert (heated.removed, heated.changed, heated.kept_mass) == (0, V - 2, pytest.approx(1))
    assert (kept.removed, kept.left) == (V - 12, 10)
    before = scores()[0].clone()
    before[[3, 4]] = -INF
    sharp = (before.double() / 0.5).softmax(-1).sort(descending=True)
    assert kept.kept_mass == pytest.approx(float(sharp.values[:10].sum()))
    assert kept.top_before == kept.top_before[:3]
    assert [token for token, _ in kept.top_before] == sharp.indices[:3].tolist()
    assert [p for _, p in kept.top_after] == pytest.approx((sharp.values[:3] / sharp.values[:10].sum()).tolist())
    assert [token for token, _ in kept.removed_likeliest] == sharp.indices[10:13].tolist()
    assert torch.equal(found.scores, fl.LogitsProcessorList(processors)(IDS, scores()))


def test_trace_leaves_processors_and_scores_alone():
    given = scores()
    processor = fl.WhisperNoSpeechDetection(3, 1, scores_is_logprobs=False)
    processor.set_begin_index(IDS.shape[1])
    before = dict(vars(processor))
    fl.trace([processor, fl.TopKLogitsWarper(3)], IDS, given)
    assert vars(processor) == before
    assert torch.equal(given, scores())


def test_trace_of_rows_that_are_mixed_forced_or_empty():
    guided = fl.trace([fl.ClassifierFreeGuidanceLogitsProcessor(2.0)], IDS[:1], scores())
    assert [change.row for change in guided] == [0]
    forced = fl.trace([fl.TopKLogitsWarper(1), fl.ForcedBOSTokenLogitsProcessor(3)], IDS[:, :1], scores())
    assert (forced[2].left, forced[2].added, forced[2].removed) == (1, 1, 1)
    assert forced[2].top_after == ((3, 1.0),)
    nothing = fl.trace([fl.SuppressTokensLogitsProcessor(range(V))], IDS, scores())
    assert (nothing[0].left, nothing[0].kept_mass, nothing[0].top_after) == (0, 0.0, ())


def test_trace_as_text_table_html_and_plot(tokenizer, tmp_path):
    digits = fl.TokenMask.matching(tokenizer, r"\s*\d")
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens(digits), fl.TopKLogitsWarper(3)])
    found = processors.trace(IDS, scores(vocab=len(tokenizer)), tokenizer, prompt_length=5, top=2)
    lines = str(found).splitlines()
    for heading in ("processor", "removed", "raised", "lowered", "kept mass", "changed most", "top now"):
        assert heading in lines[0]
    assert len(lines) == 1 + 4
    token = found[2].top_after[0][0]
    assert found.text(token) in lines[3]
    assert found.text(10**6) == "1000000"
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    assert "SuppressFirstTokens" in console.export_text()
    assert found._repr_html_().count("<tr>") == 5
    pytest.importorskip("matplotlib")
    check_plot(found.plot(tmp_path / "trace.svg", row=1))
    assert "<svg" in (tmp_path / "trace.svg").read_text()
    with pytest.raises(ValueError, match="row must be a row that was traced, 0 to 1"):
        found.plot(row=2)


def check_plot(figure):
    """Numbers of a unit with at least three labels; bars for what has no order."""
    figure.canvas.draw()
    for panel in figure.axes:
        low, high = sorted(panel.get_xlim())
        marks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
        assert len([label for at, label in marks if label.get_text() and low <= at <= high]) >= 3, panel.get_title()
        assert panel.get_xlabel() in ("tokens", "probability", "share of the probability")
        assert all(line.get_linestyle() == "None" for line in panel.lines)
        assert panel.patches or panel.lines


@pytest.mark.parametrize(("rows", "vocab", "left"), [(1, 8, 3), (2, 8, 8), (20, 40, 11), (3, 128, 100)])
def test_plots_of_a_trace_fit_what_they_show(rows, vocab, left):
    pytest.importorskip("matplotlib")
    traced = fl.trace([fl.TopKLogitsWarper(left)], torch.zeros(rows, 1, dtype=torch.int64), scores(rows, vocab))
    figure = traced.plot()
    check_plot(figure)
    shown = figure.axes[1]
    assert shown.get_xlim()[1] >= left
    wanted = rows if rows <= 12 else 0
    assert [patch.get_width() for patch in shown.patches] == [left] * wanted
    assert len(shown.lines) == rows - wanted


def test_tokens_that_are_part_of_a_character_are_told_apart():
    pytest.importorskip("matplotlib")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BUILDERS["byte_level"]())
    first, second = tokenizer.convert_tokens_to_ids(["\u0120", "\u00e2"])  # a space, the byte E2
    third = tokenizer.convert_tokens_to_ids("\u00c3")
    logits = torch.zeros(1, len(tokenizer))
    logits[0, [first, second, third]] = torch.tensor([9.0, 8.0, 7.0])
    traced = fl.trace([fl.TopKLogitsWarper(3)], torch.tensor([[0]]), logits, tokenizer)
    assert [traced.text(token) for token in (first, second, third)] == ["' '", "<E2>", "<C3>"]
    legend = traced.plot().axes[3].get_legend()
    assert [text.get_text() for text in legend.texts] == ["' '", "<E2>", "<C3>"]


def test_trace_shows_what_stays_and_changes():
    found = fl.trace([fl.RepetitionPenaltyLogitsProcessor(1.3), fl.TemperatureLogitsWarper(0.5)], IDS, scores(), top=2)
    penalty, heat = found[0], found[2]
    assert (penalty.removed, penalty.raised, penalty.lowered, penalty.changed) == (0, 0, 2, 2)
    before = scores()[0].double().softmax(-1)
    assert {token: was for token, was, _ in penalty.moved_most} == pytest.approx(
        {token: float(before[token]) for token in (5, 6)}
    )
    assert heat.raised + heat.lowered == V
    assert heat.raised > 0
    token, was, now = heat.moved_most[0]
    assert (token, was, now) == (heat.top_after[0][0], heat.top_before[0][1], heat.top_after[0][1])
    assert f"{was:.3f} -> {now:.3f}" in str(found).splitlines()[3]


def test_trace_as_a_frame():
    pytest.importorskip("pandas")
    frame = fl.trace([fl.TopKLogitsWarper(3)], IDS, scores()).frame()
    assert frame["left"].tolist() == [3, 3]


def test_trace_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="top must be an integer of at least 1, got 0"):
        fl.trace([], IDS, scores(), top=0)
    with pytest.raises(ValueError, match=r"scores must be floating-point of shape \(B, V\)"):
        fl.trace([], IDS, scores()[0])
    with pytest.raises(ValueError, match="SuppressFirstTokens"):
        fl.trace([fl.SuppressFirstTokens([1])], IDS, scores())


# -- check --------------------------------------------------------------------------------------------------------


def test_check_says_what_was_compared_and_why_not(device):
    processors = [*_chain(), Add(), fl.SuppressFirstTokens([1]), fl.TopKLogitsWarper(20)]
    outcome = fl.check(processors, IDS.to(device), scores().to(device), prompt_length=5)
    assert outcome
    assert outcome.compared == (*(type(each).__name__ for each in _chain()), "TopKLogitsWarper")
    assert [name for name, _ in outcome.not_compared] == ["Add", "SuppressFirstTokens"]
    assert str(outcome).startswith("the same: 5 compared with transformers")
    assert "not compared: Add: fastlogits runs it as it is" in str(outcome)


@pytest.mark.parametrize("front", [[], [fl.TopKLogitsWarper(50)], [Add(), fl.TopPLogitsWarper(0.9)]])
def test_check_finds_the_processor_row_and_token(front):
    ids, given = IDS, scores()
    outcome = fl.check([*front, BansAnother([TOP[0]]), fl.TemperatureLogitsWarper(0.5), Add()], ids, given)
    assert not outcome
    found = outcome.difference
    before = transformers.LogitsProcessorList(front)(ids, given)
    wrong = [(row, token) for row in (0, 1) for token in sorted(TOP) if before[row, token] > -INF]
    assert (found.number, found.processor, (found.row, found.token)) == (len(front), "BansAnother", wrong[0])
    expected = -INF if wrong[0][1] == TOP[0] else float(before[wrong[0]])
    assert (found.expected, found.count) == (expected, len(wrong))
    assert f"BansAnother (processor {len(front) + 1}): row {wrong[0][0]}, token {wrong[0][1]}" in str(outcome)


def test_check_sees_a_value_that_is_off():
    outcome = fl.check([fl.TopKLogitsWarper(50), Heats(0.5)], IDS, scores())
    assert outcome.difference.processor == "Heats"
    assert outcome.difference.found == pytest.approx(outcome.difference.expected / 1.001)
    assert fl.check([fl.TopKLogitsWarper(50), Heats(0.5)], IDS, scores(), tolerance=0.01)
    with pytest.raises(ValueError, match="tolerance must be a finite number of at least 0, got -1"):
        fl.check([], IDS, scores(), tolerance=-1.0)


def test_check_of_processors_that_carry_a_state():
    watermark = fl.SynthIDTextWatermarkLogitsProcessor(3, [1, 2, 3, 4], 64, 0, 16, torch.device("cpu"))
    assert fl.check([watermark, fl.TopKLogitsWarper(40)], IDS, scores())
    assert watermark.state is None


def test_check_where_both_raise_and_where_one_does():
    both = fl.check([fl.TopKLogitsWarper(4), fl.ForcedBOSTokenLogitsProcessor(V + 1), Add()], IDS[:, :1], scores())
    assert both
    assert both.compared == ("TopKLogitsWarper",)
    assert [name for name, _ in both.not_compared] == ["ForcedBOSTokenLogitsProcessor", "Add"]
    assert "raises IndexError" in both.not_compared[0][1]

    class Raises(fl.StagedProcessor, transformers.TemperatureLogitsWarper):
        def stage(self):
            return Ban((V + 1,))

    one = fl.check([Raises(0.5)], IDS, scores())
    assert "fastlogits raised ValueError" in str(one)


# -- The command line ---------------------------------------------------------------------------------------------


def test_explain_on_the_command_line(capsys, tmp_path):
    text = "TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)"
    assert main(["explain", text, "--batch", "8", "--vocab", "1000", "--html", str(tmp_path / "plan.html")]) == 0
    printed = capsys.readouterr().out
    assert "2 processors, 2 fused parts" in printed
    assert "float32 logits of 8 x 1000: 64.0 kB to move" in printed
    assert "TopKLogitsWarper" in (tmp_path / "plan.html").read_text()


def test_check_on_the_command_line(capsys, tmp_path):
    small = ["--vocab", "300", "--batch", "2", "--device", "cpu"]
    assert main(["check", "RepetitionPenaltyLogitsProcessor(1.2), TopPLogitsWarper(0.9)", *small]) == 0
    assert "the same: 2 compared" in capsys.readouterr().out
    torch.save((IDS, scores()), tmp_path / "inputs.pt")
    module = f"{__name__}:wrong_ones"
    assert main(["check", module, "--inputs", str(tmp_path / "inputs.pt"), "--device", "cpu"]) == 1
    assert "different, first in Heats" in capsys.readouterr().out


def wrong_ones():
    return [Heats(0.5)]


@pytest.mark.parametrize("text", ["TopQ(3)", "fastlogits:nothing_there", "1 +"])
def test_processors_that_are_none(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["explain", text])
    assert "processors must be an expression or module:name, got" in capsys.readouterr().err


def test_doctor(capsys, device, monkeypatch):
    assert main(["doctor", "--device", device]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed
    assert "path: " in printed
    assert printed.count("self-test: ") == printed.count(": right, ") == 4
    monkeypatch.setattr(fl.TopKLogitsWarper, "stage", lambda self: Scale(1.0))
    assert main(["doctor", "--device", device]) == 1
    assert "WRONG  self-test: truncations against transformers: different, first in TopKLogitsWarper" in (
        capsys.readouterr().out
    )


def test_doctor_says_why_a_path_is_taken(monkeypatch):
    assert doctor.path(torch.device("cpu")).startswith("torch: the kernels are for CUDA")
    monkeypatch.setattr(backend, "_absence", "Triton can't be imported")
    assert doctor.path(torch.device("cuda")).endswith("Triton can't be imported")


def test_help_needs_no_torch():
    code = "import sys, fastlogits.__main__ as m; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


SMALL = ["--vocab", "50", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "3"], "processors must be callable with (input_ids, scores), got 3"),
        (["explain", "None"], "processors must be callable with (input_ids, scores), got None"),
        (["explain", "'TopKLogitsWarper(3)'"], "processors must be callable with (input_ids, scores), got 'T'"),
        (["explain", "TopKLogitsWarper"], "got the class TopKLogitsWarper (number 1): write TopKLogitsWarper(...)"),
        (["check", "TopKLogitsWarper(3), TopPLogitsWarper", *SMALL], "got the class TopPLogitsWarper (number 2)"),
        (["explain", "os:nothing_there"], "got 'os:nothing_there': AttributeError"),
        (["explain", "no.such.module:name"], "got 'no.such.module:name': ModuleNotFoundError"),
        (["explain", "TopKLogitsWarper(0)"], "got 'TopKLogitsWarper(0)': ValueError"),
        (["explain", "TopKLogitsWarper(3)", "--vocab", "0"], "--vocab: must be an integer of at least 1, got '0'"),
        (["explain", "TopKLogitsWarper(3)", "--batch", "-1"], "--batch: must be an integer of at least 1, got '-1'"),
        (["explain", "TopKLogitsWarper(3)", "--batch", "2.5"], "--batch: must be an integer of at least 1, got '2.5'"),
        (["explain", "TopKLogitsWarper(3)", "--bandwidth", "0"], "--bandwidth: must be GB/s, a finite number above 0"),
        (["explain", "TopKLogitsWarper(3)", "--bandwidth", "nan"], "--bandwidth: must be GB/s"),
        (["explain", "TopKLogitsWarper(3)", "--html", "/nope/x.html"], "--html must be a file that can be written"),
        (["check", "TopKLogitsWarper(3)", "--history", "-1"], "--history: must be an integer of at least 0, got '-1'"),
        (
            ["check", "TopKLogitsWarper(3)", "--prompt-length", "-1"],
            "--prompt-length: must be an integer of at least 0",
        ),
        (["check", "TopKLogitsWarper(3)", "--seed", "x"], "--seed: must be an integer of at least 0"),
        (["check", "TopKLogitsWarper(3)", "--inputs", "/nope"], "two tensors as torch.save wrote them, got '/nope'"),
        (["check", "TopKLogitsWarper(3)", "--device", "gpu"], "--device must be a device that torch can use here"),
        (["check", "TopKLogitsWarper(3)", "--device", "cuda:99"], "got 'cuda:99'"),
        (["doctor", "--device", "cuda:99"], "--device must be a device that torch can use here"),
        (["demo", "--device", "cuda:99"], "--device must be a device that torch can use here"),
        (["demo", "--model", "/nope"], "--model must be a path or hub id of a causal LM, got '/nope'"),
        (["check", "SuppressFirstTokens([1])", *SMALL], "--prompt-length must say where the run starts, got none"),
        (
            ["check", "SuppressFirstTokens([1]), TopKLogitsWarper(3)", *SMALL, "--prompt-length", "65"],
            "prompt_length must be at most 64",
        ),
        (["check", "[]", *SMALL], "nothing was compared: there are no processors"),
        (["check", "TopNSigmaLogitsWarper(1.0)", *SMALL], "nothing was compared; not compared: TopNSigmaLogitsWarper"),
    ],
)
def test_a_command_that_cannot_run_says_why_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("content", [3, (1, 2), [IDS], {"scores": IDS}, (IDS, IDS)])
def test_inputs_of_another_content(content, capsys, tmp_path):
    torch.save(content, tmp_path / "inputs.pt")
    with pytest.raises(SystemExit, match="2"):
        main(["check", "TopKLogitsWarper(3)", "--inputs", str(tmp_path / "inputs.pt"), "--device", "cpu"])
    printed = capsys.readouterr().err
    assert "--inputs must be a file with (input_ids, scores)" in printed or "scores must be floating-point" in printed
    assert printed.count("\n") == 1


def test_inputs_that_are_no_tensors(capsys, tmp_path):
    (tmp_path / "inputs.pt").write_text("no tensors")
    with pytest.raises(SystemExit, match="2"):
        main(["check", "TopKLogitsWarper(3)", "--inputs", str(tmp_path / "inputs.pt"), "--device", "cpu"])
    assert "--inputs must be a file with (input_ids, scores)" in capsys.readouterr().err


one_of_theirs = transformers.TopKLogitsWarper(3)


def test_a_processor_that_a_module_holds(capsys):
    assert main(["explain", f"{__name__}:one_of_theirs"]) == 0
    assert "1 processor, 1 fused part" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["check", "TopKLogitsWarper(5)", "--vocab", "100"], ["doctor"]])
def test_a_reader_that_leaves_is_no_difference(arguments):
    command = [sys.executable, "-m", "fastlogits", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert b"Error" not in error


def test_a_terminal_that_lacks_the_letters(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import fastlogits as fl\nclass Überblick(fl.TopKLogitsWarper):\n    pass\nprocessors = [Überblick(3)]\n",
        "utf-8",
    )
    page = tmp_path / "x.html"
    command = [sys.executable, "-m", "fastlogits", "explain", "mine:processors", "--html", str(page)]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    plain = {
        "PYTHONPATH": path,
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "?berblick" in done.stdout
    assert "Überblick" in page.read_text("utf-8")
