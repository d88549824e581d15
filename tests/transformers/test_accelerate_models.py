"""``accelerate`` and what a model hands its ``generate`` on to, what comes wrapped, and what is made later."""

import contextlib
import copy
import pickle
import threading
import types
import warnings
import weakref

import pytest
import torch
import transformers
from transformers import LogitsProcessorList

import fastlogits as fl
from fastlogits.transformers import accelerate as acceleration
from tests.models import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread", "accelerates_nothing_after")

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61]])
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
PIXELS = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
IMAGE = 63


@contextlib.contextmanager
def lists_called(monkeypatch):
    """The lists of runs whose plans are called."""
    lists = []
    original = acceleration.RunList.__call__

    def call(processors, *arguments, **options):
        if not any(each is processors for each in lists):
            lists.append(processors)
        return original(processors, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(acceleration.RunList, "__call__", call)
        yield lists


# -- Models that hand on ------------------------------------------------------------------------------------------


def blip_text():
    return {"vocab_size": 64, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16} | {
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "sep_token_id": 2, **SPECIAL,
    }  # fmt: skip


def blip(cls=transformers.BlipForConditionalGeneration):
    config = transformers.BlipConfig(text_config=blip_text(), vision_config=VISION)
    inputs = {"pixel_values": PIXELS}
    if cls is transformers.BlipForQuestionAnswering:
        inputs["input_ids"] = PROMPT % 64
    return cls(config), inputs, ["text_decoder"]


def opt():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 16}
    return transformers.OPTConfig(vocab_size=64, hidden_size=16, max_position_embeddings=64, **sizes, **SPECIAL)


def blip2(config=transformers.Blip2Config, cls=transformers.Blip2ForConditionalGeneration, **more):
    qformer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer |= {"encoder_hidden_size": 16, "vocab_size": 64}
    made = config(
        vision_config=VISION, qformer_config=qformer, text_config=opt().to_dict(), num_query_tokens=2,
        image_token_index=IMAGE,
    )  # fmt: skip
    ids = torch.tensor([[IMAGE, IMAGE, 5, 6]])
    return cls(made), {"pixel_values": PIXELS, "input_ids": ids, **more}, ["language_model"]


def instructblip():
    more = {"qformer_input_ids": torch.tensor([[5, 6]])}
    return blip2(transformers.InstructBlipConfig, transformers.InstructBlipForConditionalGeneration, **more)


def kosmos2():
    text = {"vocab_size": 64, "embed_dim": 16, "layers": 1, "ffn_dim": 16, "attention_heads": 2, **SPECIAL}
    text["max_position_embeddings"] = 64
    config = transformers.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=2)
    mask = torch.tensor([[0, 1, 1, 0, 0]])
    inputs = {"pixel_values": PIXELS, "input_ids": torch.tensor([[1, 5, 6, 7, 8]]), "image_embeds_position_mask": mask}
    return transformers.Kosmos2ForConditionalGeneration(config), inputs, ["text_model"]


def rag_sequence():
    question = transformers.DPRConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    generator = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.5,
        max_position_embeddings=128, decoder_start_token_id=2, **sizes, **SPECIAL,
    )  # fmt: skip
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        question, generator, n_docs=2, vocab_size=97, is_encoder_decoder=True, decoder_start_token_id=2, **SPECIAL
    )
    context = PROMPT.repeat(2, 1)
    inputs = {"input_ids": PROMPT, "context_input_ids": context, "context_attention_mask": torch.ones_like(context)}
    inputs |= {"doc_scores": torch.tensor([[0.3, -0.2]]), "n_docs": 2, "num_beams": 1, "input_ids": None}
    return transformers.RagSequenceForGeneration(config), inputs, ["rag.generator"]


def mimi():
    sizes = {"num_filters": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {
        "intermediate_size": 16,
        "codebook_size": 32,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
    }
    return transformers.MimiConfig(
        upsample_groups=1, num_key_value_heads=2, num_quantizers=4, upsampling_ratios=[4, 2], **sizes
    )


def csm():
    shared = {"vocab_size": 35, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    shared |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_size": 32,
        "num_codebooks": 3,
        "initializer_range": 0.4,
    }
    depth = {**shared, "backbone_hidden_size": 32, "max_position_embeddings": 4}
    config = transformers.CsmConfig(
        **shared, text_vocab_size=64, max_position_embeddings=64, codebook_pad_token_id=33, codebook_eos_token_id=34,
        pad_token_id=0, bos_token_id=1, audio_token_id=62, audio_eos_token_id=61, depth_decoder_config=depth,
        codec_config=mimi().to_dict(),
    )  # fmt: skip
    model = transformers.CsmForConditionalGeneration(config)
    model.generation_config.pad_token_id = model.depth_decoder.generation_config.pad_token_id = 33
    return model, {"input_ids": PROMPT % 60}, ["depth_decoder"]


def moshi():
    shared = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "num_codebooks": 2}
    shared |= {"initializer_range": 0.4, "head_dim": 16}
    depth = {**shared, "max_position_embeddings": 4}
    config = transformers.MoshiConfig(
        vocab_size=64, audio_vocab_size=32, max_position_embeddings=64, audio_encoder_config=mimi().to_dict(),
        depth_decoder_config=depth, **shared,
    )  # fmt: skip
    model = transformers.MoshiForConditionalGeneration(config)
    codes = torch.randint(0, 32, (1, 2, 7))
    inputs = {"input_ids": PROMPT % 64, "user_audio_codes": codes, "moshi_audio_codes": codes}
    return model, {**inputs, "return_audio_waveforms": False, "concat_unconditional_inputs": False}, ["depth_decoder"]


def bark():
    shared = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "block_size": 300}
    sizes = {"input_vocab_size": 200, "output_vocab_size": 200}
    fine = {"input_vocab_size": 34, "output_vocab_size": 34, "n_codes_total": 4, "n_codes_given": 1, "block_size": 1024}
    codec = transformers.EncodecConfig(
        num_filters=4,
        hidden_size=16,
        codebook_size=32,
        codebook_dim=16,
        upsampling_ratios=[2, 2],
        num_lstm_layers=1,
        target_bandwidths=[120.0],
    )
    config = transformers.BarkConfig(
        semantic_config={**shared, **sizes}, coarse_acoustics_config={**shared, **sizes},
        fine_acoustics_config={**shared, **fine}, codec_config=codec.to_dict(),
    )  # fmt: skip
    model = transformers.BarkModel(config)
    said = model.generation_config
    said.semantic_config = {"eos_token_id": 100, "text_encoding_offset": 101, "text_pad_token": 190}
    said.semantic_config |= {"semantic_infer_token": 191, "semantic_vocab_size": 100, "max_new_tokens": 6}
    said.semantic_config |= {"max_input_semantic_length": 8}
    said.coarse_acoustics_config = {"coarse_semantic_pad_token": 170, "coarse_infer_token": 171}
    said.coarse_acoustics_config |= {"max_coarse_input_length": 8, "max_coarse_history": 12, "sliding_window_len": 6}
    said.fine_acoustics_config = {"max_fine_history_length": 8, "max_fine_input_length": 16, "n_fine_codebooks": 4}
    said.codebook_size = 32
    ids = torch.arange(3, 11).reshape(1, 8)
    return model, {"input_ids": ids, "min_eos_p": 0.2}, ["semantic", "coarse_acoustics"]


HANDED_ON = {
    "blip": blip,
    "blip for questions": lambda: blip(transformers.BlipForQuestionAnswering),
    "blip-2": blip2,
    "instructblip": instructblip,
    "kosmos-2": kosmos2,
    "rag by sequences": rag_sequence,
    "csm": csm,
    "moshi": moshi,
    "bark": bark,
}


def made(name):
    torch.manual_seed(0)
    model, inputs, inside = HANDED_ON[name]()
    return model.eval(), inputs, [model.get_submodule(path) for path in inside]


def said_by(model, inputs, name, **options):
    torch.manual_seed(0)
    lengths = {} if name == "bark" else {"max_new_tokens": 4}
    said = model.generate(**inputs, do_sample=name == "bark", **lengths, **options)
    return said if isinstance(said, torch.Tensor) else said.sequences


@pytest.mark.filterwarnings("ignore:.*generation_config")
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", HANDED_ON)
def test_what_it_hands_on_to_is_accelerated(monkeypatch, name, everything):
    model, inputs, inside = made(name)
    plain = said_by(model, inputs, name)
    assembled = []
    original = acceleration.RunList.__init__
    with monkeypatch.context() as patch, fl.accelerate(None if everything else model):
        patch.setattr(
            acceleration.RunList, "__init__", lambda self, *rest: assembled.append(1) or original(self, *rest)
        )
        assert torch.equal(said_by(model, inputs, name), plain)
        assert assembled
        if not everything:
            assert all(each in acceleration._state.models for each in inside)


@pytest.mark.filterwarnings("ignore:.*generation_config")
@pytest.mark.parametrize("name", [name for name in HANDED_ON if name not in ("bark", "csm")])
def test_first_steps_where_it_hands_on(name):
    """The run's start is that of the module that generates. The first token that was said is forbidden."""
    model, inputs, _ = made(name)
    plain = said_by(model, inputs, name)
    with fl.accelerate(model):
        first = next(token for token in plain[0, -4:].tolist() if token > 2)
        banned = [fl.SuppressFirstTokens([first], window=4)]
        found = said_by(model, inputs, name, logits_processor=banned)
    assert not (found[0, -4:] == first).any()
    assert not torch.equal(found, plain)


def test_the_depth_decoder_has_a_start_of_its_own():
    model, inputs, _ = made("csm")
    plain = said_by(model, inputs, "csm")
    model.depth_decoder.generation_config.suppress_tokens = [int(plain[0, 0, 1])]
    expected = said_by(model, inputs, "csm")
    assert not torch.equal(expected, plain)
    with fl.accelerate(model):
        assert torch.equal(said_by(model, inputs, "csm"), expected)


def test_what_is_accelerated_is_said():
    model, _, _ = made("blip-2")
    with fl.accelerate(model) as accelerated:
        named = "itself, language_model (OPTForCausalLM)"
        assert repr(accelerated) == f"<Acceleration of Blip2ForConditionalGeneration: {named}>"


def test_what_is_not_accelerated_is_said(recwarn):
    model, _, _ = made("bark")
    with fl.accelerate(model) as accelerated:
        text = repr(accelerated)
    assert "semantic (BarkSemanticModel), coarse_acoustics (BarkCoarseModel); not fine_acoustics (Bark" in text
    assert not [each for each in recwarn if "fastlogits" in str(each.filename)]
    with pytest.warns(UserWarning, match="nothing in BarkFineModel can be accelerated") as seen:
        alone = fl.accelerate(model.fine_acoustics)
    assert len(seen) == 1
    assert repr(alone) == "<Acceleration of BarkFineModel: nothing; not itself>"
    fl.restore(model.fine_acoustics)


# -- Models that come wrapped -------------------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """As PEFT has it: a module with a generate that hands on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": model})

    def generate(self, *arguments, **options):
        return self.base_model["model"].generate(*arguments, **options)


def holder(model):
    return types.SimpleNamespace(model=model)


def pipeline(model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a")), pad_token="<pad>"
    )
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": torch.nn.DataParallel,
    "adapter": Adapter,
    "adapter, compiled": lambda model: torch.compile(Adapter(model), backend="eager"),
    "pipeline": pipeline,
    "holder": holder,
    "holder of a holder": lambda model: holder(holder(model)),
    "holder of an adapter": lambda model: holder(Adapter(model)),
}


@pytest.mark.filterwarnings("ignore:.*generation_config")
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped(monkeypatch, llama, name):
    wrapped = WRAPPED[name](llama)
    with fl.accelerate(wrapped) as accelerated, lists_called(monkeypatch) as lists:
        generate = wrapped if name == "pipeline" else llama.generate
        generate(*(["a"] if name == "pipeline" else [PROMPT]), max_new_tokens=2)
        assert lists
        assert "LlamaForCausalLM)" in repr(accelerated)
        assert f"Acceleration of {type(wrapped).__name__}: " in repr(accelerated)
        fl.restore(wrapped)
        assert llama not in acceleration._state.models
    fl.accelerate(wrapped)
    fl.restore(llama)  # the model itself is what was accelerated


class OfAnotherKind(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(2, 2)


class Endless:
    @property
    def model(self):
        return self


@pytest.mark.parametrize(
    "wrong",
    [OfAnotherKind(), holder(torch.nn.Linear(2, 2)), holder(None), Endless()],
    ids=["a module that holds another", "what holds another", "what holds nothing", "what holds itself"],
)
def test_what_holds_no_model(wrong):
    for switch in (fl.accelerate, fl.restore):
        with pytest.raises(TypeError, match=rf"model must be, or hold, .* got {type(wrong).__name__}: give the model"):
            switch(wrong)


@pytest.mark.parametrize("calls_super", [False, True])
def test_a_class_that_is_made_later(monkeypatch, calls_super):
    """Its list is one plan, whether or not it asks the base class for it."""
    with fl.accelerate():

        class Later(transformers.LlamaForCausalLM):
            def _get_logits_processor(self, *arguments, **options):
                made = super()._get_logits_processor(*arguments, **options) if calls_super else []
                assert type(made) is (LogitsProcessorList if calls_super else list)
                return LogitsProcessorList([*made, *options["logits_processor"]])

        own = Later._get_logits_processor
        model = Later(tiny_llama().config).eval()
        with lists_called(monkeypatch) as lists:
            for _ in range(2):
                model.generate(PROMPT, max_new_tokens=2, logits_processor=[fl.SuppressFirstTokens([5])])
        assert len(lists) == 2
        assert Later._get_logits_processor is not own
    assert Later._get_logits_processor is own


def copies(model):
    return {"deepcopy": copy.deepcopy(model), "copy": copy.copy(model), "pickle": pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("name", ["deepcopy", "copy", "pickle"])
def test_a_copy_is_another_model(monkeypatch, llama, name):
    """It isn't accelerated with the first one, and is where all models are."""
    for everything in (False, True):
        with fl.accelerate(None if everything else llama), lists_called(monkeypatch) as lists:
            copied = copies(llama)[name]
            found = copied.generate(PROMPT, max_new_tokens=3, do_sample=False)
            assert bool(lists) is everything
            assert torch.equal(found, llama.generate(PROMPT, max_new_tokens=3, do_sample=False))
            assert lists
    with fl.accelerate(copied):
        assert llama not in acceleration._state.models


# -- Blocks that overlap ------------------------------------------------------------------------------------------


def is_accelerated(model):
    """Whether a first-step processor in a plain list knows where the run starts."""
    try:
        model.generate(PROMPT, max_new_tokens=1, logits_processor=[fl.SuppressFirstTokens([5])])
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("given", [("model", "model"), ("model", None), (None, None), ("wrapper", "model")], ids=str)
@pytest.mark.parametrize("first_out", [0, 1])
def test_a_block_ends_what_it_has_begun(llama, given, first_out):
    things = {"model": llama, "wrapper": holder(llama), None: None}
    blocks = [fl.accelerate(things[each]) for each in given]
    for block in blocks:
        block.__enter__()
    blocks[first_out].__exit__(None, None, None)
    assert is_accelerated(llama)
    blocks[1 - first_out].__exit__(None, None, None)
    assert not is_accelerated(llama)


def test_one_object_in_several_blocks(llama):
    accelerated = fl.accelerate(llama)
    with accelerated:
        with accelerated:
            assert is_accelerated(llama)
        assert is_accelerated(llama)
    assert not is_accelerated(llama)
    with accelerated:
        assert is_accelerated(llama)
    assert not is_accelerated(llama)


def test_accelerated_without_a_block_stays(llama):
    for _ in range(3):
        fl.accelerate(llama)
    with fl.accelerate(llama):
        pass
    assert is_accelerated(llama)
    fl.restore(llama)
    assert not is_accelerated(llama)


def test_restore_ends_all_blocks_and_they_end_nothing_else(llama):
    with fl.accelerate(llama), fl.accelerate(llama) as inner:
        fl.restore(llama)
        assert not is_accelerated(llama)
        with inner:  # it is open already
            assert not is_accelerated(llama)
        later = fl.accelerate(llama)
    assert is_accelerated(llama)
    with later:
        pass
    assert not is_accelerated(llama)


def test_an_error_ends_a_block(llama):
    with fl.accelerate(llama):
        with pytest.raises(ZeroDivisionError), fl.accelerate(llama):
            raise ZeroDivisionError
        assert is_accelerated(llama)
    assert not is_accelerated(llama)


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_in_threads(llama, shared):
    """Each thread's block holds for as long as it is open, whatever the others do."""
    failed, one = [], fl.accelerate(llama) if shared else None
    barrier = threading.Barrier(4)

    def work(number):
        try:
            for step in range(4):
                with one or fl.accelerate(llama):
                    barrier.wait(60)
                    for _ in range(1 + (number + step) % 3):
                        assert is_accelerated(llama)
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not is_accelerated(llama)


def test_a_block_of_a_model_that_is_gone(llama):
    model = tiny_llama()
    gone = weakref.ref(model)
    block = fl.accelerate(model)
    with block:
        del model
        assert gone() is None
    with block:
        pass
    assert "LlamaForCausalLM" in repr(block)


def test_nothing_is_said_by_the_way(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fl.accelerate(llama), fl.accelerate():
            pass
