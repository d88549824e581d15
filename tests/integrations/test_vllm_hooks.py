"""Where the samplers stand in for vLLM's own: asked for, and only in a vLLM that has what they need."""

import importlib
import logging
import sys

import pytest

from fastlogits.inspect.hooks import vllm_sampler_problems
from fastlogits.integrations import vllm_hooks as hooks
from fastlogits.integrations import vllm_older_sampler, vllm_sampler

RUNNERS = (hooks._NEWER, hooks._OLDER)
OURS = (vllm_sampler.__name__, vllm_older_sampler.__name__)  # imported before there is a vLLM


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Sources that say what is looked for, and do nothing but define the names in the runners' modules."""
    sources = {}
    for members in hooks._MEMBERS:
        sources.setdefault(members.path, []).extend(f'_ = """{text}"""' for text in members.texts)
    for wanted in hooks._SIGNATURES:
        owner, _, name = wanted.name.rpartition(".")
        lines = [f"def {name}({', '.join(wanted.arguments)}):", "    pass"]
        lines = [f"class {owner}:", *(f"    {line}" for line in lines)] if owner else lines
        sources.setdefault(wanted.path, []).extend(lines)
    for module in RUNNERS:
        path = f"{module.replace('.', '/')}.py"
        sources[path].append("class Sampler:\n    pass\nclass RejectionSampler:\n    pass\n")
    for name, lines in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    for folder in {parent for name in sources for parent in (tmp_path / name).parents if tmp_path in parent.parents}:
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def test_nothing_is_done_unless_it_is_asked_for(vllm, monkeypatch):
    for value in (None, "", "0"):
        monkeypatch.delenv(hooks.SWITCH, raising=False)
        if value is not None:
            monkeypatch.setenv(hooks.SWITCH, value)
        finders = list(sys.meta_path)
        hooks.register()
        assert sys.meta_path == finders
    assert importlib.import_module(RUNNERS[0]).Sampler.__module__ == RUNNERS[0]


def test_the_places_are_taken_when_a_runner_is_imported(vllm, monkeypatch, caplog):
    monkeypatch.setenv(hooks.SWITCH, "1")
    caplog.set_level(logging.WARNING, logger="fastlogits")
    for _ in range(2):  # in the front end and in the engine
        hooks.register()
    assert not set(RUNNERS) & set(sys.modules)
    newer, older = map(importlib.import_module, RUNNERS)
    assert newer.__spec__.name == RUNNERS[0]
    theirs = newer.Sampler.__mro__[2]
    assert (theirs.__name__, theirs.__module__) == ("Sampler", RUNNERS[0])
    assert [each.__module__ for each in (newer.Sampler, newer.RejectionSampler, older.Sampler)] == [
        OURS[0], OURS[0], OURS[1]
    ]  # fmt: skip
    # It has its drafts verified by itself.
    assert older.RejectionSampler.__module__ == RUNNERS[1]
    hooks.register()
    assert importlib.import_module(RUNNERS[0]).Sampler.__mro__[2] is theirs
    assert not caplog.records


def test_the_places_are_taken_in_runners_that_are_imported_already(vllm, monkeypatch):
    newer = importlib.import_module(RUNNERS[0])
    monkeypatch.setenv(hooks.SWITCH, "1")
    hooks.register()
    assert newer.Sampler.__module__ == OURS[0]


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        (
            hooks._SAMPLER,
            "def add_request(self, req_idx, ",
            "def add_request(self, index, ",
            "has no Sampler.add_request(",
        ),
        (hooks._SAMPLER, "self.thinking_budget_state = ", "self.budgets = ", "has no 'self.thinking_budget_state = '"),
        ("vllm/v1/worker/gpu/input_batch.py", "logits_indices: ", "indices: ", "has no 'logits_indices: '"),
    ],
)
def test_another_vllm_keeps_its_own_sampler(vllm, monkeypatch, caplog, path, old, new, message):
    source = (vllm / path).read_text()
    assert old in source
    (vllm / path).write_text(source.replace(old, new))
    monkeypatch.setenv(hooks.SWITCH, "1")
    with caplog.at_level(logging.WARNING):
        hooks.register()
    newer, older = map(importlib.import_module, RUNNERS)
    assert newer.Sampler.__module__ == RUNNERS[0]
    assert older.Sampler.__module__ == OURS[1]
    (record,) = caplog.records
    assert f"vLLM's own sampler runs in {RUNNERS[0]}" in record.getMessage()
    assert message in record.getMessage()


def test_what_the_doctor_says(vllm):
    assert vllm_sampler_problems() == []
    (vllm / hooks._REJECTION).unlink()
    assert len(vllm_sampler_problems()) == 2


def test_without_vllm(monkeypatch, caplog):
    monkeypatch.setenv(hooks.SWITCH, "1")
    with caplog.at_level(logging.WARNING):
        hooks.register()
    assert "vLLM isn't found" in caplog.text
    assert vllm_sampler_problems() is None
