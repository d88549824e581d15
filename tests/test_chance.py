"""Random numbers of processors: a sampler's by seeds and positions, else a generator's, twice the same in training."""

import pytest
import torch

import fastlogits as fl
from fastlogits.plan import chance

ROW = torch.tensor([[0.5, 0.05, 0.25, 0.2]]).log()


class Noisy:
    """Takes torch's own numbers, and fastlogits doesn't know it."""

    def __call__(self, input_ids, scores):
        return scores * torch.rand_like(scores)


def struck(scores):
    return scores[:, 0] == -torch.inf


def test_a_sampler_draws_by_seed_and_position_alone():
    sampler = fl.Sampler([fl.XTCLogitsProcessor(0.1, 0.5), fl.XTCLogitsProcessor(0.1, 0.5)])
    seeds, logits = torch.arange(64), ROW.expand(64, 4)
    before = torch.get_rng_state()
    first = sampler(logits, seeds, 3).tokens
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(sampler(logits, seeds, 3).tokens, first)
    for row in (0, 9, 63):  # in whatever batch
        assert sampler(ROW, int(seeds[row]), 3).tokens[0] == first[row]
    assert not torch.equal(sampler(logits, seeds, 4).tokens, first)
    assert first.unique().numel() > 1


def test_numbers_by_seeds_are_even_and_of_their_own():
    seeds, zero = torch.arange(20000), torch.tensor(0)
    with chance.by_seeds(seeds, zero):
        one, other = (chance.numbers(20000, seeds.device, None).squeeze(1) for _ in range(2))
    for found in (one, other):
        assert 0 <= found.min() <= found.max() < 1
        counts = torch.histc(found, 10, 0, 1)
        assert ((counts - 2000).abs() < 4.5 * 2000**0.5).all()
    assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 0.03
    # Not the noise of any token.
    assert not torch.isin(one, fl.sample(torch.zeros(1, 4), seeds=0, positions=0).tokens.float()).all()


def test_outside_a_sampler_a_generator_is_asked():
    scores = ROW.expand(200, 4)
    own = fl.XTCLogitsProcessor(0.1, 0.5, generator=torch.Generator().manual_seed(3))
    first, second = struck(own(None, scores)), struck(own(None, scores))
    assert not torch.equal(first, second)
    again = fl.XTCLogitsProcessor(0.1, 0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(struck(again(None, scores)), first)


@pytest.mark.parametrize("processor", [fl.XTCLogitsProcessor(0.1, 0.5), Noisy()], ids=["known", "unknown"])
def test_the_gradient_is_that_of_what_was_drawn(processor):
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        logits = torch.randn(2, 3, 4, generator=generator).requires_grad_()
        ids = torch.zeros(2, 3, dtype=torch.long)
        torch.manual_seed(seed)
        found = fl.logprobs(logits, ids, processors=[processor], input_ids=ids)
        torch.rand(3)  # what others draw between
        then = torch.get_rng_state()
        found.sum().backward()
        assert torch.equal(torch.get_rng_state(), then)
        copy = logits.detach().clone().requires_grad_()
        torch.manual_seed(seed)
        for t in range(3):
            processed = processor(ids[:, : t + 1], copy[:, t])
            processed.log_softmax(-1)[:, 0].sum().backward()
        finite = copy.grad.isfinite()
        assert torch.allclose(logits.grad[finite], copy.grad[finite], atol=1e-6)
        assert finite.any()


@pytest.mark.parametrize("scores", [False, True])
def test_decode_draws_by_its_seeds_and_greedy_runs_by_the_generator(llama, scores):
    options = {"max_new_tokens": 12, "custom_generate": fl.decode, "output_scores": scores}
    options["return_dict_in_generate"] = scores
    options["logits_processor"] = [fl.XTCLogitsProcessor(0.001, 0.5)]
    for do_sample, alike in ((True, True), (False, False)):
        said = []
        for noise in (1, 2, 3):
            torch.manual_seed(noise)
            seeds = {"seeds": 11} if do_sample else {}
            found = llama.generate(torch.tensor([[3, 4, 5]]), do_sample=do_sample, **seeds, **options)
            said.append(found.sequences if scores else found)
        assert all(torch.equal(each, said[0]) for each in said) == alike
