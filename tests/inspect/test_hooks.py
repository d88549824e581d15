"""The hooks into transformers and vLLM: that they hold, and that each test of one fails without it."""

import contextlib
import sys

import pytest
from transformers import GenerationMixin

from fastlogits.inspect import hooks as tried
from fastlogits.inspect.hooks import tried_hooks, vllm_problems
from fastlogits.integrations import vllm_hooks
from fastlogits.processors import base
from fastlogits.transformers import accelerate, caches, decode, hooks


def problems():
    return {each.hook: each.problem for each in tried_hooks() if each.problem is not None}


def test_all_hooks_hold():
    assert problems() == {}


def lose_run_start(monkeypatch):
    monkeypatch.setattr(base, "assembles", lambda frame: False)


def lose_assembled(monkeypatch):
    monkeypatch.delitem(accelerate._WRAPPERS, "_get_logits_processor")


def lose_drafts(monkeypatch):
    monkeypatch.delitem(accelerate._WRAPPERS, "_get_candidate_generator")


def lose_continuous(monkeypatch):
    monkeypatch.delattr(GenerationMixin.__mro__[1], "init_continuous_batching")


def lose_decode(monkeypatch):
    monkeypatch.setattr(decode, "arguments_of_generate", lambda frame, model: {})


def lose_loop(monkeypatch):
    if not caches.has_device_counters():
        pytest.skip("no static cache that counts on the device")
    monkeypatch.setattr(caches.FixedCache, "load", lambda mine, cache: None)


def lose_attention(monkeypatch):
    monkeypatch.setattr(tried, "grouped", contextlib.nullcontext)


def lose_tokenizer(monkeypatch):
    monkeypatch.setattr(hooks, "_callers", lambda frame: iter(()))


LOSSES = {
    hooks.RUN_START: lose_run_start,
    hooks.ASSEMBLED: lose_assembled,
    hooks.DRAFTS: lose_drafts,
    hooks.CONTINUOUS: lose_continuous,
    hooks.DECODE: lose_decode,
    hooks.LOOP: lose_loop,
    hooks.ATTENTION: lose_attention,
    hooks.TOKENIZER: lose_tokenizer,
}


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.purpose)
def test_a_hook_that_is_lost_is_told(hook, monkeypatch):
    LOSSES[hook](monkeypatch)
    assert hook in problems()


def test_the_doctor_says_what_is_lost(capsys, monkeypatch):
    from fastlogits.__main__ import main

    lose_run_start(monkeypatch)
    assert main(["doctor", "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert "7 of 8 hold" in told
    assert "first-step processors raise UnknownRunStartError in generate" in told


def test_every_hook_is_tried():
    assert set(tried._TESTS) == set(hooks.HOOKS)


def test_vllm(tmp_path, monkeypatch):
    """Its sources are read; it is not imported."""
    assert vllm_problems() is None
    package = tmp_path / "vllm"
    for text in vllm_hooks._TEXTS:
        path = tmp_path / text.module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + text.text + "\n")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert vllm_problems() == []
    (tmp_path / vllm_hooks._TEXTS[0].module).write_text("")
    (lost,) = vllm_problems()
    assert "input_processor.py has no self.vllm_config" in lost
    assert "vllm" not in sys.modules
