"""null is absent: in items, messages, records and settings, as tables of data fill up what a row does not have."""

import inspect
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from tiny_processor import write_processor_files

from qwen2audio_jax.batch.records import read_record as batch_record
from qwen2audio_jax.compat.vllm import SamplingParams
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.processing.conversation import read_conversation
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.serve.protocol import IGNORED, NEUTRAL, read_chat
from qwen2audio_jax.train.records import read_record

CLIP = np.zeros(4000, np.float32)
TEXT, AUDIO = {"type": "text", "text": "what?"}, {"type": "audio", "audio": CLIP}
FULL = dict.fromkeys(("type", "text", "audio", "audio_url", "path", "url", "input_audio", "image", "video", "uuid"))
DATA = {"data": "UklGRg==", "format": "wav"}


@pytest.mark.parametrize(
    "item",
    [
        {**FULL, **AUDIO},
        {**FULL, **TEXT},
        {**FULL, "text": "what?"},
        {**FULL, "audio": CLIP},
        {**FULL, "type": "audio"},
        {**FULL, "type": "audio_url", "audio_url": {"url": "a.wav", "detail": None, "path": None}},
        {**FULL, "type": "input_audio", "input_audio": {**DATA, "id": None}},
        {**FULL, "type": "input_audio", "input_audio": {"data": DATA["data"], "format": None}},
    ],
    ids=lambda item: ",".join(f"{key}" for key, value in item.items() if value is not None),
)
def test_an_item_is_the_one_without_nulls(item):
    bare = {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in item.items()
        if value is not None
    }
    one, two = (read_conversation([{"role": "user", "content": [value, TEXT]}]) for value in (item, bare))
    assert one.messages == two.messages
    assert [clip.where for clip in one.clips] == [clip.where for clip in two.clips]


def test_a_key_of_a_server_s_cache_changes_nothing():
    chat = read_conversation([{"role": "user", "content": [{**AUDIO, "uuid": "x"}, {**TEXT, "uuid": "y"}]}])
    assert chat.messages == read_conversation([{"role": "user", "content": [AUDIO, TEXT]}]).messages


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"type": "text", "text": None}, "has the text null"),
        ({"type": None, "text": None}, "neither a type nor text nor audio; it has 'type', 'text'"),
        ({**AUDIO, "audoi": "a.wav"}, "unknown key 'audoi'"),
        ({**AUDIO, "text": ""}, "text and sound"),
        ({"type": "audio_url", "audio_url": {"url": None}}, "dict without a url"),
    ],
)
def test_what_is_missing_is_still_named(item, words):
    with pytest.raises(ValueError, match=words):
        read_conversation([{"role": "user", "content": [item]}])


def test_null_keys_of_messages_reach_no_template(tmp_path):
    processor = Qwen2AudioProcessor.from_pretrained(write_processor_files(tmp_path))
    chat = [{"role": "user", "content": "hello", "name": None, "tool_calls": None}]
    template = "{% for message in messages %}{{ 'name' in message }} {{ 'tool_calls' in message }}{% endfor %}"
    assert processor.apply_chat_template(chat, chat_template=template) == "False False"
    with pytest.raises(ValueError, match="content is missing"):
        read_conversation([{"role": "user", "content": None}])


def records():
    item = {**FULL, "type": "audio"}
    chat = [{"role": "user", "content": [item, {**FULL, **TEXT}], "name": None}, {"role": "assistant", "content": "4"}]
    yield {"messages": chat, "audios": ["a.wav"], "prompt": None, "response": None, "chosen": None, "id": None}, False
    yield {"messages": None, "audios": None, "prompt": "a", "response": "b", "solution": None}, False
    yield {"messages": chat[:1], "audios": ["a.wav"], "chosen": "a", "rejected": "b", "response": None}, True
    text = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": None, "weight": None}
    yield {"messages": [*text], "audios": None, "videos": None, "tools": None}, False
    own = {**FULL, "type": "audio", "audio": "b.wav"}
    yield {"messages": [{"role": "user", "content": [own]}, chat[1]], "audios": []}, False


def without(value):
    if isinstance(value, dict):
        return {key: without(part) for key, part in value.items() if part is not None}
    return [without(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("record", "preferences"), list(records()))
def test_a_record_is_the_one_without_nulls(record, preferences):
    one, two = (
        read_record(json.dumps(value).encode(), where="f:1", audio_root="/x", preferences=preferences)
        for value in (record, without(record))
    )
    assert one == two


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a", "audio": "a.wav", "prompt": None, "messages": None, "options": None, "meta": None},
        {"id": "a", "audio": None, "prompt": "why?", "messages": None, "reference": None},
        {"id": None, "prompt": "why?", "options": {"max_new_tokens": 3}},
        {"id": "a", "messages": [{"role": "user", "content": [{**FULL, **TEXT}]}], "audio": None, "prompt": None},
        {"id": "a", "audio": ["a.wav"], "messages": [{"role": "user", "content": [{**FULL, "type": "audio"}, TEXT]}]},
    ],
)
def test_a_record_of_a_batch_job_is_the_one_without_nulls(record):
    one, two = (
        batch_record(json.dumps(value).encode(), id="a", where="f:1", root="/x", prompt=None)
        for value in (record, without(record))
    )
    assert one == two
    assert one.problem is None


def test_a_request_to_the_server_is_the_one_without_nulls():
    """Clients of OpenAI's protocol send every parameter that they know, and back what an answer held."""
    chat = [
        {"role": "user", "content": [{**FULL, **TEXT}], "name": None},
        {"role": "assistant", "content": "4", "refusal": None, "audio": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {**DATA, "id": None}, "uuid": "x"}]},
    ]
    names = (*NEUTRAL, *IGNORED, "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "n")
    names += (
        "stop",
        "seed",
        "stream",
        "stream_options",
        "logprobs",
        "response_format",
        "guided_json",
        "repetition_penalty",
    )
    full = read_chat(
        {"model": "m", "messages": chat, **dict.fromkeys(names), "a_new_one": None}, model="m", kind="base"
    )
    bare = [{key: value for key, value in message.items() if value not in (None, [])} for message in without(chat)]
    bare[2]["content"][0].pop("uuid")
    assert full == read_chat({"model": "m", "messages": bare}, model="m", kind="base")


def test_arguments(tmp_path):
    processor = Qwen2AudioProcessor.from_pretrained(write_processor_files(tmp_path))
    text, chat = "<|audio_bos|><|AUDIO|><|audio_eos|>hello", [{"role": "user", "content": [AUDIO, TEXT]}]
    calls = {
        processor: {"text": text, "audio": CLIP},
        processor.apply_chat_template: {"conversation": chat, "tokenize": True, "return_dict": True},
        processor.feature_extractor: {"clips": [CLIP]},
        processor.tokenizer: {"text": text},
    }
    for call, given in calls.items():
        wanted = call(**given)
        parameters = inspect.signature(call).parameters.values()
        names = [each.name for each in parameters if each.kind == each.KEYWORD_ONLY and each.name not in given]
        assert len(names) >= 5
        for name in names:
            got = call(**given, **{name: None})
            assert all(np.array_equal(got[key], wanted[key]) for key in wanted), name


def test_options():
    nulls = {field.name: None for field in fields(GenerationConfig)}
    assert GenerationConfig(**nulls) == GenerationConfig.from_dict(nulls) == GenerationConfig()
    assert GenerationConfig(**nulls, num_beams=None).stated == frozenset()
    assert GenerationConfig(top_k=3).updated(generation_config=GenerationConfig(**nulls)).top_k == 3
    params = SamplingParams(**{field.name: None for field in fields(SamplingParams)})
    made, wanted = (GenerationConfig().updated(**each.options(stops=[3])) for each in (params, SamplingParams()))
    assert made == replace(wanted, max_new_tokens=None)


def test_settings(tmp_path):
    plain = {"feature_size": 128, "sampling_rate": 16000}
    nulls = dict.fromkeys(("chunk_length", "n_samples", "hop_length", "padding_side", "dither", "some_new_key"))
    assert Qwen2AudioFeatureExtractor.from_dict({**plain, **nulls}) == Qwen2AudioFeatureExtractor.from_dict(plain)
    assert GenerationConfig.from_dict({"top_k": None, "a_new_option": None, "num_beams": None}) == GenerationConfig()
    with pytest.raises(TypeError, match="no option 'temprature'"):
        GenerationConfig().updated(temprature=None)
    config = Qwen2AudioConfig.from_dict(
        {"model_type": "qwen2_audio", "a_new_key": None, "text_config": {"another": None}}
    )
    assert config.text_config.hidden_size == Qwen2AudioConfig().text_config.hidden_size
    folder = write_processor_files(tmp_path)
    wanted = Qwen2AudioProcessor.from_pretrained(folder)
    (folder / "processor_config.json").write_text('{"audio_token": null, "feature_extractor": null, "new_key": null}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for token in settings["added_tokens_decoder"].values():
        token |= {"lstrip": None, "normalized": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    got = Qwen2AudioProcessor.from_pretrained(folder)
    assert got.feature_extractor == wanted.feature_extractor
    assert got.tokenizer.encode("hello <|im_end|>") == wanted.tokenizer.encode("hello <|im_end|>")
