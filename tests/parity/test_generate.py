"""``generate`` with explicit processors: token for token what it says with transformers' own."""

import pytest
import torch
import transformers
import transformers.generation.logits_process as reference

import fastlogits as fl
from tests.installed import IS_4, PENALISES_COPIES, TAKES_LENGTHS_OF_ROWS
from tests.models import VOCAB_SIZE, tiny_llama

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61], [1, 5, 90, 33, 12, 64, 28]])
L = PROMPT.shape[1]


def only_even(batch_id, sent):
    return list(range(0, VOCAB_SIZE, 2))


# Each is a function of the module that the classes come from.
CHAINS = {
    "temperature": lambda m: [m.TemperatureLogitsWarper(0.7)],
    "top-k": lambda m: [m.TopKLogitsWarper(5)],
    "top-p": lambda m: [m.TopPLogitsWarper(0.6)],
    "min-p": lambda m: [m.MinPLogitsWarper(0.1)],
    "typical": lambda m: [m.TypicalLogitsWarper(0.5)],
    "epsilon": lambda m: [m.EpsilonLogitsWarper(0.01)],
    "eta": lambda m: [m.EtaLogitsWarper(0.02)],
    "top-h": lambda m: [m.TopHLogitsWarper(0.4)] if hasattr(reference, "TopHLogitsWarper") else [],
    "repetition": lambda m: [m.RepetitionPenaltyLogitsProcessor(1.8)],
    "2-grams": lambda m: [m.NoRepeatNGramLogitsProcessor(2)],
    "1-grams": lambda m: [m.NoRepeatNGramLogitsProcessor(1)],
    "2-grams of a source": lambda m: [m.EncoderNoRepeatNGramLogitsProcessor(1, PROMPT[:, 1:])],
    "a penalty on a source": lambda m: [
        m.EncoderRepetitionPenaltyLogitsProcessor(0.4, PROMPT),
        m.TemperatureLogitsWarper(1.5),
    ],
    "bias": lambda m: [m.SequenceBiasLogitsProcessor({(7,): 9.0, (7, 8): 20.0, (8, 9, 10): -5.0, (11,): -3.0})],
    "bad words": lambda m: [m.NoBadWordsLogitsProcessor([[token] for token in range(3, 60)] + [[60, 61], [70, 71]], 2)],
    "least length": lambda m: [
        m.MinLengthLogitsProcessor(L + 2, [2, 5, 7, 9]),
        m.MinNewTokensLengthLogitsProcessor(L, 4, list(range(3, 50))),
    ],
    "prefixes": lambda m: [m.PrefixConstrainedLogitsProcessor(only_even, 1)],
    "forced end": lambda m: [m.ForcedEOSTokenLogitsProcessor(L + 5, [2])],
    "forced beginning": lambda m: [m.ForcedBOSTokenLogitsProcessor(9)],
    "clean": lambda m: [m.InfNanRemoveLogitsProcessor()],
    "decay": lambda m: [m.ExponentialDecayLengthPenalty((2, 3.0), [2, 9], L)],
    "normalised": lambda m: [m.LogitNormalization()],
    "suppressed": lambda m: [
        m.SuppressTokensLogitsProcessor(range(3, 40)),
        m.SuppressTokensAtBeginLogitsProcessor(range(40, 80), L),
    ],
    "watermark": lambda m: [m.WatermarkLogitsProcessor(VOCAB_SIZE, "cpu", bias=6.0)],
    "self-hashing watermark": lambda m: [
        m.WatermarkLogitsProcessor(VOCAB_SIZE, "cpu", bias=6.0, seeding_scheme="selfhash", context_width=2)
    ],
    "synthid": lambda m: [
        m.SynthIDTextWatermarkLogitsProcessor(
            3, [3, 1, 4, 1, 5], sampling_table_size=64, sampling_table_seed=0, context_history_size=8, device="cpu"
        )
    ],
    "nine": lambda m: [
        m.RepetitionPenaltyLogitsProcessor(1.1),
        m.NoRepeatNGramLogitsProcessor(3),
        m.NoBadWordsLogitsProcessor([[token] for token in range(3, 13)] + [[i, i + 1, i + 2] for i in range(20, 30)]),
        m.MinNewTokensLengthLogitsProcessor(L, 4, 2),
        m.SuppressTokensAtBeginLogitsProcessor(range(40, 60), L),
        m.TemperatureLogitsWarper(0.7),
        m.TopKLogitsWarper(20),
        m.TopPLogitsWarper(0.9),
        m.MinPLogitsWarper(0.05),
    ],
    "in another order": lambda m: [
        m.LogitNormalization(),
        m.TopKLogitsWarper(30),
        m.RepetitionPenaltyLogitsProcessor(1.5),
        m.TypicalLogitsWarper(0.8),
        m.NoRepeatNGramLogitsProcessor(2),
        m.InfNanRemoveLogitsProcessor(),
        m.TemperatureLogitsWarper(1.4),
    ],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}
pytestmark = pytest.mark.usefixtures("one_thread")

LISTS = [(fl.LogitsProcessorList, fl), (fl.LogitsProcessorList, reference), (transformers.LogitsProcessorList, fl)]
# ``generate`` compares types exactly, so what stands in a list of its own acts beside the same flag, not in its place.
OUR_LISTS = LISTS[:2]
# The rows that they were made for are those of the prompt: beams and several samples have more.
ONE_ROW_EACH = () if PENALISES_COPIES else ("a penalty on a source",)


def generate(model, processors, inputs=None, **options):
    torch.manual_seed(0)
    inputs = {"input_ids": PROMPT} if inputs is None else inputs
    if "attention_mask" not in inputs and "inputs_embeds" not in inputs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(**inputs, logits_processor=processors, **options)


def check(model, chain, inputs=None, lists=LISTS, **options):
    """Token-identical, for a list of ours, for our classes in a list of transformers', and for its classes in ours."""
    expected = generate(model, transformers.LogitsProcessorList(chain(reference)), inputs, **options)
    for made, module in lists:
        found = generate(model, made(chain(module)), inputs, **options)
        assert torch.equal(found, expected), (made.__module__, module.__name__, found, expected)
    return expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHAINS)
def test_modes(llama, name, mode):
    if name in ONE_ROW_EACH and mode not in ("greedy", "sampling"):
        pytest.skip("transformers 4 wants a row of the source for each beam")
    if name == "prefixes" and "beam" in mode:
        pytest.skip("made for one beam: see test_prefixes_with_beams")
    check(llama, CHAINS[name], **MODES[mode])


def test_the_chains_change_what_is_said(llama):
    """Else the tests above would say nothing."""
    modes = [{**MODES[mode], "max_new_tokens": 24} for mode in ("greedy", "sampling")]
    plain = [generate(llama, [], **mode) for mode in modes]
    silent = ("forced beginning", "clean", "normalised")  # no prompt of one token; no NaN; the same choices
    for name, chain in CHAINS.items():
        if name not in silent and chain(reference):
            found = [generate(llama, transformers.LogitsProcessorList(chain(reference)), **mode) for mode in modes]
            changed = [not torch.equal(*pair) for pair in zip(found, plain, strict=True)]
            assert any(changed), name


def test_prefixes_with_beams(llama):

    def chain(module):
        return [module.PrefixConstrainedLogitsProcessor(only_even, 3)]

    check(llama, chain, num_beams=3)


def test_a_prompt_of_one_token(llama):
    check(llama, CHAINS["forced beginning"], {"input_ids": PROMPT[:, :1]})
    check(llama, CHAINS["nine"], {"input_ids": PROMPT[:, :1]}, do_sample=True)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["nine", "repetition", "2-grams", "in another order"])
def test_left_padding(llama, name, options):
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PROMPT], 1)
    mask = (ids != 0).long()
    mask[1, :3] = 1
    ids[1, :3] = torch.tensor([44, 45, 46])
    inputs = {"input_ids": ids, "attention_mask": mask}
    check(llama, CHAINS[name], inputs, **options)
    # Flags beside the processors: generate's own classes stand before and after ours.
    check(llama, CHAINS[name], inputs, lists=OUR_LISTS, repetition_penalty=1.3, no_repeat_ngram_size=2, **options)


@pytest.mark.skipif(not TAKES_LENGTHS_OF_ROWS, reason="this transformers knows no tensor of ignored lengths")
def test_padding_that_the_penalty_ignores(llama):
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PROMPT], 1)
    ids[1, :3] = torch.tensor([44, 45, 46])
    ignored = torch.tensor([3, 0])

    def chain(module):
        return [module.RepetitionPenaltyLogitsProcessor(3.0, ignored)]

    check(llama, chain, {"input_ids": ids, "attention_mask": (ids != 0).long()})


@pytest.mark.parametrize(
    "name", ["nine", "repetition", "2-grams", "bias", "bad words", "least length", "decay", "top-k"]
)
def test_assisted_decoding(llama, name):
    if name == "least length" and IS_4:
        pytest.skip("transformers 4 refuses it")
    draft = tiny_llama(seed=1)
    for options in ({}, {"do_sample": True}):
        check(llama, CHAINS[name], {"input_ids": PROMPT[:1]}, max_new_tokens=12, assistant_model=draft, **options)


@pytest.mark.parametrize("name", ["nine", "repetition", "2-grams", "bias", "bad words", "least length", "decay"])
def test_prompt_lookup(llama, name):
    inputs = {"input_ids": PROMPT[:1].repeat(1, 3)}
    check(llama, CHAINS[name], inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize(
    "name", ["nine", "repetition", "2-grams", "forced beginning", "bias", "in another order", "watermark", "decay"]
)
def test_encoder_decoder(t5, name, options):
    check(t5, CHAINS[name], {"input_ids": PROMPT}, **options)
    check(t5, CHAINS[name], {"input_ids": PROMPT}, encoder_repetition_penalty=1.5, forced_bos_token_id=70, **options)


def test_guidance_without_a_batch(llama):
    def chain(module):
        guide = module.UnbatchedClassifierFreeGuidanceLogitsProcessor
        return [guide(1.5, llama, unconditional_ids=PROMPT[:, :2]), module.TemperatureLogitsWarper(0.7)]

    for options in ({}, {"do_sample": True}, {"use_cache": False}):
        check(llama, chain, **options)


def test_inputs_embeds(llama):
    inputs = {
        "inputs_embeds": llama.get_input_embeddings()(PROMPT).detach(),
        "attention_mask": torch.ones_like(PROMPT),
    }
    for name in ("nine", "repetition", "2-grams", "bad words"):
        check(llama, CHAINS[name], inputs)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_a_processor_beside_the_same_flag_acts_once(llama, options):
    """``generate`` prefers what it is given to what it would build; ours is of another type, and yet it must."""

    def penalised(module):
        return [module.RepetitionPenaltyLogitsProcessor(0.8)]

    with pytest.MonkeyPatch.context() as patch:
        # transformers says at length that it prefers what it is given.
        patch.setattr(transformers.generation.utils.logger, "warning_once", lambda *arguments: None)
        once = generate(llama, transformers.LogitsProcessorList(penalised(reference)), **options)
        twice = generate(
            llama, transformers.LogitsProcessorList(penalised(reference) + penalised(reference)), **options
        )
        assert not torch.equal(once, twice)
        assert torch.equal(check(llama, penalised, lists=OUR_LISTS, repetition_penalty=0.8, **options), once)
        assert torch.equal(check(llama, penalised, lists=OUR_LISTS, repetition_penalty=9.0, **options), once)


FLAGS = {
    "repetition_penalty": (1.8, lambda m: m.RepetitionPenaltyLogitsProcessor(2.5)),
    "no_repeat_ngram_size": (1, lambda m: m.NoRepeatNGramLogitsProcessor(2)),
    "bad_words_ids": ([[7]], lambda m: m.NoBadWordsLogitsProcessor([[token] for token in range(3, 60)])),
    "sequence_bias": ({(7,): 30.0}, lambda m: m.SequenceBiasLogitsProcessor({(8,): 30.0})),
    "suppress_tokens": ([5], lambda m: m.SuppressTokensLogitsProcessor(range(3, 60))),
    "min_new_tokens": (2, lambda m: m.MinNewTokensLengthLogitsProcessor(L, 3, list(range(3, 60)))),
    "exponential_decay_length_penalty": ((2, 1.5), lambda m: m.ExponentialDecayLengthPenalty((1, 4.0), [9], L)),
    "forced_eos_token_id": (2, lambda m: m.ForcedEOSTokenLogitsProcessor(L + 3, [11])),
    "remove_invalid_values": (True, lambda m: m.InfNanRemoveLogitsProcessor()),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_gives_way_to_a_processor_of_its_class(llama, flag):
    value, made = FLAGS[flag]
    check(llama, lambda module: [made(module), module.LogitNormalization()], lists=OUR_LISTS, **{flag: value})
