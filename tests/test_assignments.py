"""Assignments that users of transformers write: each has its effect, or is refused with what to use instead."""

import copy

import numpy as np
import pytest
from tiny_processor import write_processor_files

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, SamplingParams, Session
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_processor_files(tmp_path_factory.mktemp("processor"))


@pytest.fixture
def processor(folder):
    return Qwen2AudioProcessor.from_pretrained(folder)


def test_the_tokenizer_s_padding_side(processor):
    texts = ["hello", "hello the user the system"]
    left = processor(text=texts)
    processor.tokenizer.padding_side = "right"
    right = processor(text=texts)
    assert left.attention_mask[0, 0] == right.attention_mask[0, -1] == 0
    assert left.attention_mask[0, -1] == right.attention_mask[0, 0] == 1
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert processor.apply_chat_template(chats, tokenize=True).attention_mask[0, -1] == 0
    told = processor(text=texts, padding_side="left")
    assert np.array_equal(told.input_ids, left.input_ids)
    with pytest.raises(ValueError, match='"left" or "right"'):
        processor.tokenizer.padding_side = "both"
    assert processor.tokenizer.padding_side == "right"


def test_the_padding_token_by_string_and_by_id(processor, tmp_path):
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", end)
    assert processor(text=["hello", "hello the user"]).input_ids[0, 0] == end
    processor.save_pretrained(tmp_path)
    assert Qwen2AudioProcessor.from_pretrained(tmp_path).tokenizer.pad_token_id == end
    tokenizer.pad_token_id = np.int64(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    assert tokenizer.pad_token == "<|endoftext|>"
    tokenizer.bos_token_id = end
    assert tokenizer.bos_token == "<|im_end|>"
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("pad_token", "no token"), ("pad_token", None), ("pad_token_id", -1), ("eos_token_id", 10**6), ("eos_token", 7)],
)
def test_tokens_that_do_not_exist_are_refused(name, value, processor):
    before = getattr(processor.tokenizer, name)
    with pytest.raises(ValueError, match="vocabulary"):
        setattr(processor.tokenizer, name, value)
    assert getattr(processor.tokenizer, name) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chat_template", "assign it to the processor"),
        ("model_max_length", "max_length="),
        ("padding_sid", "padding_side"),
        ("vocab_size", "pad_token"),
        ("all_special_ids", "pad_token"),
        ("control_tokens", "pad_token"),
    ],
)
def test_other_attributes_of_the_tokenizer_refuse(name, words, processor):
    with pytest.raises(AttributeError, match=words):
        setattr(processor.tokenizer, name, "right")


def test_the_processor_s_template_and_its_other_attributes(processor):
    processor.chat_template = "{{ messages[0].content }}!"
    assert processor.apply_chat_template([{"role": "user", "content": "hello"}]) == "hello!"
    with pytest.raises(ValueError, match="not valid jinja2"):
        processor.chat_template = "{% for"
    with pytest.raises(AttributeError, match="to its tokenizer"):
        processor.padding_side = "right"
    for name in ("audio_token", "audio_token_id", "feature_extractor", "tokenizer", "sampling_rate"):
        with pytest.raises(AttributeError, match=r"make another with Qwen2AudioProcessor\("):
            setattr(processor, name, 3)


def test_entries_of_the_inputs(processor):
    inputs = processor(text="hello the user the system")
    inputs.input_ids = inputs.input_ids[:, -2:]
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    assert dict(**inputs)["input_ids"].shape == inputs["attention_mask"].shape == inputs.attention_mask.shape == (1, 2)
    inputs.labels = [1]
    assert inputs["labels"] == [1]
    assert repr(inputs).endswith("labels: list)")
    assert inputs.pop("labels") == [1]
    del inputs.attention_mask
    assert list(inputs) == ["input_ids"]
    inputs.update(attention_mask=np.ones((1, 2)))
    other = copy.copy(inputs)
    del other["input_ids"]
    assert list(inputs) == ["input_ids", "attention_mask"]
    for name in ("items", "_arrays", "keys"):
        with pytest.raises(AttributeError, match="no entry's name"):
            setattr(inputs, name, 1)
    with pytest.raises(AttributeError, match="there are input_ids"):
        del inputs.labels
    with pytest.raises(TypeError, match="not int"):
        inputs[0] = 1


def test_a_copy_of_a_tokenizer_keeps_its_own_assignments(processor):
    other = copy.copy(processor.tokenizer)
    other.padding_side, other.pad_token = "right", "<|im_end|>"
    assert (processor.tokenizer.padding_side, processor.tokenizer.pad_token) == ("left", "<|endoftext|>")
    assert processor.tokenizer.settings["pad_token"] == "<|endoftext|>"


def test_options_of_generation_name_the_argument():
    config = GenerationConfig()
    with pytest.raises(AttributeError, match=r"generate\(temperature=\.\.\.\)"):
        config.temperature = 0.5
    with pytest.raises(AttributeError, match=r"generate\(num_beams=\.\.\.\)"):
        config.num_beams = 4
    assert config == GenerationConfig()
    assert config.updated(max_new_tokens=7).max_new_tokens == 7


@pytest.mark.parametrize("name", ["dtype", "temperature", "device", "max_new_tokens", "generation_confg"])
def test_other_attributes_of_the_model_refuse(name):
    model = Qwen2AudioForConditionalGeneration.__new__(Qwen2AudioForConditionalGeneration)
    with pytest.raises(AttributeError, match=r"from_pretrained"):
        setattr(model, name, 1)
    with pytest.raises(TypeError, match="from_dict"):
        model.generation_config = {"temperature": 0.5}
    model.generation_config = GenerationConfig(top_k=3)
    assert model.generation_config.top_k == 3


def test_configurations_name_what_to_write(processor):
    config = Qwen2AudioConfig()
    for owner, name in ((config, "dtype"), (config.text_config, "rope_theta"), (config.audio_config, "d_model")):
        before = getattr(owner, name)
        with pytest.raises(AttributeError, match=rf"{name} cannot be assigned: .*dtype= .*replace\(config, {name}="):
            setattr(owner, name, 1)
        assert getattr(owner, name) == before
    with pytest.raises(AttributeError, match=r"sampling_rate cannot be assigned: .*load_audio\(samples"):
        processor.feature_extractor.sampling_rate = 8000
    with pytest.raises(AttributeError, match="pass options to its generate"):
        Session.__new__(Session).generation_config = GenerationConfig()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("use_cache", "there is always one"),
        ("pad_token_id", r"model\.generation_config\.updated\(pad_token_id=\.\.\.\)"),
        ("eos_token_id", r"model\.generation_config\.updated\(eos_token_id=\.\.\.\)"),
        ("_attn_implementation", "attention= to from_pretrained"),
        ("torch_dtype", "dtype= to from_pretrained"),
        ("output_attentions", "not computed"),
        ("vocab_sise", "no such field"),
    ],
)
def test_what_transformers_keeps_in_a_configuration(name, words):
    config = Qwen2AudioConfig()
    for owner in (config, config.text_config):
        with pytest.raises(AttributeError, match=rf"^{name} cannot be assigned: .*{words}"):
            setattr(owner, name, 1)
    assert GenerationConfig().updated(pad_token_id=1, eos_token_id=[2]).pad_token_id == 1


def test_vllm_s_parameters_are_assigned():
    params = SamplingParams()
    params.temperature, params.max_tokens = 0.0, 3
    assert params.options(stops=[7]) | {"do_sample": False, "max_new_tokens": 3} == params.options(stops=[7])
    params.presence_penalty = 1.0
    with pytest.raises(ValueError, match="use repetition_penalty"):
        params.options(stops=[])


def test_parts_of_a_processor_are_saved_alone(processor, tmp_path):
    processor.tokenizer.pad_token = "<|im_end|>"
    processor.tokenizer.save_pretrained(tmp_path)
    processor.feature_extractor.save_pretrained(tmp_path)
    again = Qwen2AudioProcessor.from_pretrained(tmp_path)
    assert again.model_input_names == list(again(text="<|AUDIO|>", audio=np.zeros(4000, np.float32)))
    assert again.tokenizer.pad_token == "<|im_end|>"
    assert again.feature_extractor == processor.feature_extractor
    assert again.tokenizer.tokenize("hello the user") == processor.tokenizer.tokenize("hello the user")
