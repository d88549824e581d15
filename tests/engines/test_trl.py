"""Two steps of TRL's GRPO trainer: generation, log-probabilities and updates with and without ``accelerate``."""

import warnings
from contextlib import nullcontext

import pytest
import torch

import fastlogits as fl
from fastlogits.transformers.accelerate import RunList
from tests.engines.companions import tiny_model, tiny_tokenizer

pytest.importorskip("trl", reason="needs TRL: make test-engines")
datasets = pytest.importorskip("datasets")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it names the versions of vLLM that it was tried with
    from trl import GRPOConfig, GRPOTrainer

PROMPTS = ["Room 101 has", "It's 1999", "In 1990", "and 10 20"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Watch:
    """A reward, the share of digits, that remembers what it was shown."""

    __name__ = "digits"

    def __init__(self):
        self.completions = []

    def __call__(self, completions, **kwargs):
        self.completions += completions
        return [sum(letter.isdigit() for letter in text) / (1 + len(text)) for text in completions]


def _train(tokenizer, folder, accelerated, peft_config=None, **asked):
    """Two steps; completions, losses and weights after them."""
    reward, saved = Watch(), folder / "model"  # from where the trainer also reads the model that it starts from
    tiny_model(tokenizer).save_pretrained(saved)
    settings = {
        "output_dir": str(folder / "trained"),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "beta": 0.04,
        "seed": 3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model=str(saved),
        reward_funcs=reward,
        args=GRPOConfig(**settings | asked),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    with fl.accelerate(trainer.model) if accelerated else nullcontext():
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return reward.completions, losses, weights


def _assert_same(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert torch.equal(ours[2][name], value), name


def _changed(weights, tokenizer):
    return any(not torch.equal(weights[name], value) for name, value in tiny_model(tokenizer).named_parameters())


@pytest.fixture
def steps(monkeypatch):
    """How many steps of generation ran as a plan."""
    counted, call = [], RunList.__call__

    def count(self, *arguments, **kwargs):
        counted.append(self)
        return call(self, *arguments, **kwargs)

    monkeypatch.setattr(RunList, "__call__", count)
    return counted


@pytest.mark.parametrize("loss", [{}, {"num_iterations": 2}, {"beta": 0.0}])
def test_two_steps(loss, tokenizer, tmp_path, steps):
    theirs = _train(tokenizer, tmp_path, False, **loss)
    assert len(theirs[0]) == 8 // loss.get("num_iterations", 1)
    assert len(theirs[1]) == 2
    assert _changed(theirs[2], tokenizer)
    assert not steps
    _assert_same(_train(tokenizer, tmp_path, True, **loss), theirs)
    assert steps


def test_two_steps_with_an_adapter(tokenizer, tmp_path, steps):
    peft = pytest.importorskip("peft")

    def adapter():
        return peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=True, task_type="CAUSAL_LM")

    theirs = _train(tokenizer, tmp_path, False, adapter())
    _assert_same(_train(tokenizer, tmp_path, True, adapter()), theirs)
    assert steps


def test_two_steps_with_all_models_accelerated(tokenizer, tmp_path, steps):
    theirs = _train(tokenizer, tmp_path, False)
    with fl.accelerate():
        _assert_same(_train(tokenizer, tmp_path, False), theirs)
    assert steps


def test_two_steps_whose_tokens_decode_draws(tokenizer, tmp_path, monkeypatch):
    """Tokens that are other ones of the same distribution: training goes on with them."""

    def run():
        model_class = type(tiny_model(tokenizer))
        generate = model_class.generate
        with monkeypatch.context() as patch:
            patch.setattr(
                model_class,
                "generate",
                lambda self, *a, **k: generate(self, *a, custom_generate=fl.decode, seeds=5, **k),
            )
            return _train(tokenizer, tmp_path, False)

    ours = run()
    assert len(ours[0]) == 8
    assert all(torch.isfinite(value).all() for value in ours[2].values())
    assert _changed(ours[2], tokenizer)
    _assert_same(run(), ours)


def test_importance_ratios_are_of_what_was_sampled(tokenizer, tmp_path, monkeypatch):
    """The mixin's log-probabilities are those of the trainer's own distribution, and training goes on with them."""
    from fastlogits.integrations.trl import SampledLogProbs

    class Trainer(SampledLogProbs, GRPOTrainer):
        """GRPO whose log-probabilities are those of what it samples from."""

    monkeypatch.setitem(_train.__globals__, "GRPOTrainer", Trainer)
    seen = []
    method = SampledLogProbs._of_some

    def noted(self, model, ids, mask, count):
        found = method(self, model, ids, mask, count)
        seen.append((ids, mask, count, found, model(input_ids=ids, attention_mask=mask).logits.detach()))
        return found

    monkeypatch.setattr(SampledLogProbs, "_of_some", noted)
    completions, losses, weights = _train(tokenizer, tmp_path, False)
    assert len(completions) == 8
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert _changed(weights, tokenizer)
    assert seen
    # What TRL generates is what transformers' processors leave: each token with its own history.
    ids, mask, count, found, logits = seen[0]
    listed = fl.LogitsProcessorList(
        [
            fl.RepetitionPenaltyLogitsProcessor(1.2),
            fl.TemperatureLogitsWarper(0.9),
            fl.TopKLogitsWarper(20),
            fl.TopPLogitsWarper(0.9),
        ]
    )
    for t in range(count):
        at = ids.shape[1] - count + t
        right = listed(ids[:, :at], logits[:, at - 1].float()).log_softmax(-1).gather(1, ids[:, at : at + 1])[:, 0]
        meant = (mask[:, at] == 1) & right.isfinite()
        torch.testing.assert_close(found.logprobs[meant, t], right[meant], atol=1e-4, rtol=1e-4)
    assert not any(loss != loss for loss in losses)
