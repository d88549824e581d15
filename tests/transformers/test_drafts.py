"""Candidates of a draft: results are stored into the memory that they came from, and a row stands for one request."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastlogits as fl
from fastlogits.plan.stages import Rows
from fastlogits.transformers import accelerate as acceleration
from tests.installed import IS_4, TAKES_LENGTHS_OF_ROWS
from tests.models import VOCAB_SIZE, tiny_llama

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*generation_config")]

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61, 17, 45, 8]])
L = PROMPT.shape[1]


def alike():
    """A draft whose candidates are often right, and not always."""
    draft = tiny_llama()
    with torch.no_grad():
        draft.lm_head.weight += 0.1 * torch.randn(
            draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    return draft


DRAFTS = {
    "itself": lambda: {"assistant_model": tiny_llama()},
    "alike": lambda: {"assistant_model": alike()},
    "another": lambda: {"assistant_model": tiny_llama(seed=1)},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "early exit": lambda: {"assistant_early_exit": 1},
}


def generate(model, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)


def same(model, draft, **options):
    """What a draft's model says, plainly and accelerated, in a dictionary or not."""
    wanted = generate(model, **options, **draft())
    with fl.accelerate(model):
        found = generate(model, **options, **draft())
        assert torch.equal(found, wanted)
        kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        found = generate(model, **options, **kept, **draft())
    wanted = generate(model, **options, **kept, **draft())
    for name in ("scores", "logits"):
        assert all(torch.equal(*pair) for pair in zip(found[name], wanted[name], strict=True)), name
    return wanted


# -- A result that is the input -----------------------------------------------------------------------------------


class View(fl.StagedProcessor):
    """Its result is another tensor in the same memory."""

    def stage(self):
        return Rows("bias", lambda ids, scores: scores[:, :], "nothing", reads_history=False)


class Same(fl.StagedProcessor):
    """Its result is what it is given."""

    def stage(self):
        return Rows("bias", lambda ids, scores: scores, "nothing")


NOTHING = {
    "words that hardly come": {"bad_words_ids": [[33, 62, 1]]},
    "n-grams that don't come again": {"no_repeat_ngram_size": 9},
    "no tokens": {"suppress_tokens": []},
    "sequences": {"sequence_bias": {(33, 62, 1): 2.0}},
    "what is over": {"begin_suppress_tokens": [5]},
    "a view": {"logits_processor": [View()]},
    "the same": {"logits_processor": [Same()]},
    "something": {"repetition_penalty": 1.3},
    "something, then a view": {"repetition_penalty": 1.3, "logits_processor": [View()]},
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("nothing", NOTHING)
def test_a_step_that_changes_nothing(llama, nothing, draft):
    same(llama, DRAFTS[draft], **NOTHING[nothing])


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_step_that_changes_some_positions_only(llama, draft):
    """The result of a position isn't computed from what a position before it was replaced by."""
    for size in (1, 2):
        same(llama, DRAFTS[draft], no_repeat_ngram_size=size, logits_processor=[fl.SuppressFirstTokens([8]).for_run(L)])


class InPlace(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, ::3] -= 2.0
        return scores


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_processor_in_place(llama, draft):
    """Raw logits stay raw: transformers has copied them before."""
    same(llama, DRAFTS[draft], logits_processor=[InPlace()], repetition_penalty=1.3)


KEYS = {"keys": [1, 2, 3, 4], "ngram_len": 3}
CARRIED = {
    "synthid": lambda: {"watermarking_config": transformers.SynthIDTextWatermarkingConfig(**KEYS)},
    "watermark": lambda: {"watermarking_config": transformers.WatermarkingConfig()},
    "guidance": lambda: {"guidance_scale": 1.7, "negative_prompt_ids": PROMPT.flip(1)},
    "prefixes": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3, 40))},
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", CARRIED)
def test_what_carries_something_from_call_to_call(llama, name, do_sample):
    """It is called at each position, in order, as often as transformers calls it."""
    for draft in ("itself", "alike", "prompt lookup"):
        same(llama, DRAFTS[draft], do_sample=do_sample, **CARRIED[name]())


@pytest.mark.parametrize("changes", [False, True])
def test_results_are_the_row_itself_or_memory_of_their_own(changes):
    made = [transformers.RepetitionPenaltyLogitsProcessor(1.3)] if changes else [View()]
    run = acceleration.RunList(made, 3)
    candidates = torch.tensor([[1, 17, 45, 8, 77]])
    base = torch.randn(1, 3, VOCAB_SIZE)
    expected = [made[0](candidates[:, : 3 + i], base[:, i].clone()) for i in range(3)]
    run.expect(candidates, 3)
    with torch.no_grad():
        for i in range(3):
            scores = base[:, i, :]
            result = run(candidates[:, : 3 + i], scores)
            assert torch.equal(result, expected[i])
            shared = result.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
            assert shared is not changes or result is scores or not shared
            base[:, i, :] = result
            base[:, i, :] = 0.0  # whatever is stored there, the positions behind it have their results


def test_candidates_of_before_are_forgotten(llama, monkeypatch):
    """A draft that calls the list itself gets what it asks for, also where its scores lie where others lay."""
    run = acceleration.RunList([transformers.RepetitionPenaltyLogitsProcessor(1.3)], 3)
    ids = torch.tensor([[1, 17, 45, 8, 77]])
    base = torch.randn(1, 3, VOCAB_SIZE)

    class Generator:
        def get_candidates(self, input_ids):
            found.append(run(ids[:, :4], base[:, 1, :]))
            return ids, None

    found = []
    generator = acceleration._with_candidates(lambda model, **options: Generator())(None, logits_processor=run)
    for _ in range(2):
        base.normal_()
        generator.get_candidates(ids[:, :3])
        expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids[:, :4], base[:, 1].clone())
        assert torch.equal(found[-1], expected)
        run(ids[:, :3], base[:, 0, :])


# -- A draft of another tokenizer ---------------------------------------------------------------------------------


def tokenizer_of(letters):
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def of_vocabulary(size, seed):
    config = tiny_llama().config
    config.vocab_size = size
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}], ids=str)
def test_a_draft_of_another_tokenizer(options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = of_vocabulary(len(tokenizer_of(alphabet)), 0)

    def draft():  # new ones: transformers cuts the head to the tokens that both have, and remembers that
        first, second = tokenizer_of(alphabet), tokenizer_of([*reversed(alphabet), "ab"])
        draft = of_vocabulary(len(second), 1)
        return {"assistant_model": draft, "tokenizer": first, "assistant_tokenizer": second}

    def said(**flags):
        for _ in range(5):
            try:
                return generate(model, **flags, **options, **draft()).tolist()
            except RuntimeError as error:  # noqa: PERF203 -- a row of NaN, in plain transformers too
                failure = str(error)
        return failure

    for flags in ({"suppress_tokens": []}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        wanted = said(**flags)
        with fl.accelerate(model):
            assert said(**flags) == wanted


# -- Values that belong to a row ----------------------------------------------------------------------------------

OF_A_ROW = {
    "top_k": lambda: fl.TopKLogitsWarper(torch.tensor([5])),
    "top_p": lambda: fl.TopPLogitsWarper(torch.tensor([0.5])),
    "min_p": lambda: fl.MinPLogitsWarper(torch.tensor([0.2])),
    "typical": lambda: fl.TypicalLogitsWarper(torch.tensor([0.5])),
    "epsilon": lambda: fl.EpsilonLogitsWarper(torch.tensor([0.01])),
    "eta": lambda: fl.EtaLogitsWarper(torch.tensor([0.01])),
    "top_n_sigma": lambda: fl.TopNSigmaLogitsWarper(torch.tensor([1.0])),
    "source": lambda: fl.OnlyTokensFrom([list(range(3, 60))], eos_token_id=2),
    "encoder ids": lambda: fl.EncoderRepetitionPenaltyLogitsProcessor(1.7, PROMPT),
    "encoder n-grams": lambda: fl.EncoderNoRepeatNGramLogitsProcessor(2, PROMPT),
    "prompt length": lambda: fl.SuppressFirstTokens(list(range(3, 90)), window=3).for_run(torch.tensor([L])),
}
if not IS_4:  # which doesn't have it
    OF_A_ROW["top_h"] = lambda: fl.TopHLogitsWarper(torch.tensor([0.4]))
if TAKES_LENGTHS_OF_ROWS:
    OF_A_ROW["ignored prompt"] = lambda: fl.RepetitionPenaltyLogitsProcessor(
        1.7, prompt_ignore_length=torch.tensor([3])
    )


@pytest.mark.parametrize(
    ("name", "draft", "do_sample"),
    [
        (name, draft, (index + number) % 2 == 0)
        for index, name in enumerate(OF_A_ROW)
        for number, draft in enumerate(("itself", "alike", "prompt lookup"))
    ],
)
def test_a_value_of_a_row_follows_it(llama, name, draft, do_sample):
    options = {"logits_processor": fl.LogitsProcessorList([OF_A_ROW[name]()])}
    alone = generate(llama, **options)
    with fl.accelerate(llama):
        assert torch.equal(generate(llama, **options, **DRAFTS[draft]()), alone)
    if draft != "prompt lookup":  # which proposes other candidates, where tokens tie
        same(llama, DRAFTS[draft], do_sample=do_sample, **options)


OF_TWO_ROWS = {
    "top_p": lambda: fl.TopPLogitsWarper(torch.tensor([0.5, 0.9])),
    "source": lambda: fl.OnlyTokensFrom([[3, 4], [5, 6]], eos_token_id=2),
    "encoder ids": lambda: fl.EncoderRepetitionPenaltyLogitsProcessor(1.7, PROMPT.repeat(2, 1)),
    "encoder n-grams": lambda: fl.EncoderNoRepeatNGramLogitsProcessor(2, PROMPT.repeat(2, 1)),
    "guidance": lambda: fl.ClassifierFreeGuidanceLogitsProcessor(2.0),
}
if TAKES_LENGTHS_OF_ROWS:
    ignored = torch.tensor([3, 1])
    OF_TWO_ROWS["ignored"] = lambda: fl.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=ignored)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", OF_TWO_ROWS)
def test_positions_of_a_row_are_not_rows(name, count):
    """What is meant for two rows is refused for one, however many candidates there are: as it is without a draft."""
    made = OF_TWO_ROWS[name]()
    candidates = torch.randint(3, 90, (1, 4 + count))
    base = torch.randn(1, count + 1, VOCAB_SIZE)
    run = acceleration.RunList([made], 4)
    with pytest.raises((ValueError, RuntimeError)) as alone:
        run(candidates[:, :4], base[:, 0, :].clone())
    run.expect(candidates, 4)
    with pytest.raises(alone.type), torch.no_grad():
        run(candidates[:, :4], base[:, 0, :])
