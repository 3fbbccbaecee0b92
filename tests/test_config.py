"""Configuration: config.json read strictly, written back, and the reference's reading of it."""

import ast
import copy
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import tiny

import qwen2audio_jax
from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioTextConfig

AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layerdrop": 0.0,
    "d_model": 1280,
    "activation_function": "gelu",
    "scale_embedding": False,
    "max_source_positions": 1500,
}
TEXT = {
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "intermediate_size": 11008,
    "max_position_embeddings": 8192,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-5,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "vocab_size": 156032,
}
# The layout of the two published files: most sizes of the decoder are left to class defaults.
PUBLISHED = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "model_type": "qwen2_audio",
    "audio_token_index": 151646,
    "ignore_index": -100,
    "vocab_size": 156032,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.1",
    "audio_config": AUDIO,
    "text_config": TEXT,
}


class DELETE:
    """In place of a value: the key goes."""


def edited(base: dict, **edits) -> dict:
    """A copy with keys set or deleted; `text_config__rope_theta` is a key of a section."""
    data = copy.deepcopy(base)
    for name, value in edits.items():
        *path, key = name.split("__")
        place = data
        for step in path:
            place = place[step]
        if value is DELETE:
            del place[key]
        else:
            place[key] = value
    return data


BASE = tiny.CONFIGS["base"]
ORIGINALS = {
    "published": PUBLISHED,
    "published, bare": edited(PUBLISHED, torch_dtype=DELETE, ignore_index=DELETE, vocab_size=DELETE),
    "audio_config names only its type": edited(PUBLISHED, audio_config={"model_type": "qwen2_audio_encoder"}),
    "no audio_config": edited(PUBLISHED, audio_config=DELETE),
    "rope_theta dropped": edited(PUBLISHED, text_config__rope_theta=DELETE),
    "rope_parameters": edited(
        PUBLISHED,
        text_config__rope_theta=DELETE,
        text_config__rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
    ),
    "rope_parameters and flat": edited(
        PUBLISHED, text_config__rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}
    ),
    "rope_parameters without a type": edited(
        PUBLISHED, text_config__rope_theta=DELETE, text_config__rope_parameters={"rope_theta": 50000.0}
    ),
    "rope_scaling null": edited(PUBLISHED, text_config__rope_scaling=None),
    "rope_scaling default": edited(PUBLISHED, text_config__rope_scaling={"type": "default"}),
    "dtype beside text_config's": edited(PUBLISHED, torch_dtype=DELETE, dtype="float16"),
    "dtype null": edited(PUBLISHED, torch_dtype=None, text_config__torch_dtype=DELETE),
    "head_dim": edited(PUBLISHED, text_config__head_dim=128),
    "audio_token_id": edited(PUBLISHED, audio_token_index=DELETE, audio_token_id=77),
    "eos list": edited(PUBLISHED, text_config__eos_token_id=[151645, 151643]),
    "layer_types": edited(PUBLISHED, text_config__layer_types=["full_attention"] * 32),
    "kv heads null": edited(PUBLISHED, text_config__num_key_value_heads=None),
    "aliases": edited(PUBLISHED, audio_config__num_hidden_layers=32, audio_config__hidden_size=1280),
    "inert keys": edited(
        PUBLISHED,
        pad_token_id=151643,
        use_cache=False,
        temperature=0.3,
        text_config__max_window_layers=21,
        text_config__attention_dropout=0.1,
        text_config__use_cache=False,
        text_config__use_sliding_window=False,
        text_config__id2label={"0": "a", "1": "b"},
        audio_config__dropout=0.25,
        audio_config__initializer_range=0.5,
    ),
    "another vocabulary above": edited(PUBLISHED, vocab_size=151936),
    **{f"tiny {name}": data for name, data in tiny.CONFIGS.items()},
    "tied, said twice": edited(tiny.CONFIGS["tied"], tie_word_embeddings=True),
    "untied, said twice": edited(BASE, tie_word_embeddings=False),
}


def as_reference_reads(data: dict, folder: Path) -> dict:
    """A config.json as read by transformers, without the names of the folder and the release."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    result = transformers.Qwen2AudioConfig.from_pretrained(folder).to_dict()
    for section in (result, result["audio_config"], result["text_config"]):
        section.pop("_name_or_path", None)
        section.pop("transformers_version", None)
    return result


@pytest.mark.parametrize("name", ORIGINALS)
def test_reference_reads_what_is_written_as_it_reads_the_original(name, tmp_path):
    config = Qwen2AudioConfig.from_dict(ORIGINALS[name])
    written = json.loads(config.save_pretrained(tmp_path / "written").read_text())
    expected = as_reference_reads(ORIGINALS[name], tmp_path / "original")
    assert as_reference_reads(written, tmp_path / "read") == expected
    assert Qwen2AudioConfig.from_pretrained(tmp_path / "written") == config


@pytest.mark.parametrize("name", ORIGINALS)
def test_values_are_those_the_reference_uses(name, tmp_path):
    expected = as_reference_reads(ORIGINALS[name], tmp_path)
    config = Qwen2AudioConfig.from_dict(ORIGINALS[name])
    audio, text = expected["audio_config"], expected["text_config"]
    for field in dataclasses.fields(Qwen2AudioEncoderConfig):
        if field.compare:
            assert getattr(config.audio_config, field.name) == audio[field.name], field.name
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    text["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    if isinstance(text["eos_token_id"], list):
        text["eos_token_id"] = tuple(text["eos_token_id"])
    for field in dataclasses.fields(Qwen2AudioTextConfig):
        if field.compare:
            assert getattr(config.text_config, field.name) == text[field.name], field.name
    assert config.audio_token_index == expected["audio_token_index"]
    assert config.ignore_index == expected.get("ignore_index", -100)
    assert config.dtype == (expected["dtype"] or text["dtype"] or "float32")


@pytest.mark.parametrize("name", ORIGINALS)
def test_file_that_the_reference_saved_again_means_the_same(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = Qwen2AudioConfig.from_dict(ORIGINALS[name])
    reference = transformers.Qwen2AudioConfig.from_dict(copy.deepcopy(ORIGINALS[name]))
    reference.save_pretrained(tmp_path)
    again = Qwen2AudioConfig.from_pretrained(tmp_path)
    assert again == config
    reference.to_json_file(tmp_path / "full.json", use_diff=False)
    assert Qwen2AudioConfig.from_json_file(tmp_path / "full.json") == config
    saved = json.loads((tmp_path / "config.json").read_text())
    assert as_reference_reads(again.to_dict(), tmp_path / "a") == as_reference_reads(saved, tmp_path / "b")


def test_classes_default_to_the_published_model():
    assert Qwen2AudioConfig.from_dict(PUBLISHED) == Qwen2AudioConfig()
    assert hash(Qwen2AudioConfig.from_dict(PUBLISHED)) == hash(Qwen2AudioConfig())
    assert Qwen2AudioConfig.from_dict(Qwen2AudioConfig().to_dict()) == Qwen2AudioConfig()
    config = Qwen2AudioConfig()
    assert (config.audio_config.head_dim, config.audio_config.max_frames, config.audio_config.max_tokens) == (
        64,
        3000,
        750,
    )
    assert (config.text_config.num_key_value_heads, config.text_config.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("name", "original"), [("qwen2-audio-7b", PUBLISHED), ("qwen2-audio-7b-instruct", PUBLISHED), ("tiny", BASE)]
)
def test_packaged_configurations(name, original, tmp_path):
    config = Qwen2AudioConfig.from_name(name)
    assert config == Qwen2AudioConfig.from_dict(original)
    written = Path(__file__).parent.parent / "configs" / f"{name}.json"
    data = json.loads(written.read_text())
    assert data == config.to_dict()
    # Complete: nothing that decides the computation is left to a default.
    for section, kind in (("audio_config", Qwen2AudioEncoderConfig), ("text_config", Qwen2AudioTextConfig)):
        missing = {field.name for field in dataclasses.fields(kind) if field.compare} - data[section].keys()
        assert missing <= {"head_dim"}
    assert as_reference_reads(data, tmp_path / "a") == as_reference_reads(original, tmp_path / "b")


def test_unknown_packaged_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'7b'; there are: mid-size, qwen2-audio-7b, qwen2-audio-7b-instruct, tiny"):
        Qwen2AudioConfig.from_name("7b")


def test_defaults_of_the_reference_never_win_over_the_file():
    text = Qwen2AudioConfig.from_dict(PUBLISHED).text_config
    assert (text.intermediate_size, text.vocab_size, text.rms_norm_eps) == (11008, 156032, 1e-5)
    assert text.max_position_embeddings == 8192
    # The top-level vocabulary counts only where the text section has none.
    assert Qwen2AudioConfig.from_dict(edited(PUBLISHED, vocab_size=5)).text_config.vocab_size == 156032
    top_only = edited(PUBLISHED, text_config__vocab_size=DELETE, vocab_size=160000)
    assert Qwen2AudioConfig.from_dict(top_only).text_config.vocab_size == 160000


@pytest.mark.parametrize(
    ("above", "text", "tied"),
    [
        (DELETE, DELETE, False),
        (DELETE, True, True),
        (DELETE, False, False),
        (True, DELETE, True),
        (False, DELETE, False),
        (None, True, True),
    ],
)
def test_tied_only_where_the_file_says_so(above, text, tied):
    data = copy.deepcopy(BASE)
    for place, value in ((data, above), (data["text_config"], text)):
        if value is not DELETE:
            place["tie_word_embeddings"] = value
    config = Qwen2AudioConfig.from_dict(data)
    assert config.text_config.tie_word_embeddings is tied
    assert config.to_dict()["text_config"]["tie_word_embeddings"] is tied
    other = dataclasses.replace(config.text_config, tie_word_embeddings=not tied)
    changed = dataclasses.replace(config, text_config=other)
    assert Qwen2AudioConfig.from_dict(changed.to_dict()) == changed


def test_head_dim_null_means_the_even_share():
    # The reference keeps the null and then cannot build its attention, so it has no reading to agree with.
    config = Qwen2AudioConfig.from_dict(edited(BASE, text_config__head_dim=None))
    assert config == Qwen2AudioConfig.from_dict(BASE)
    assert "head_dim" not in config.to_dict()["text_config"]


def test_inert_keys_survive_verbatim_and_do_not_distinguish():
    original = edited(ORIGINALS["inert keys"], torch_dtype="float16")
    config = Qwen2AudioConfig.from_dict(original)
    written = config.to_dict()
    assert written["architectures"] == original["architectures"]
    assert written["transformers_version"] == "4.38.1"
    assert written["torch_dtype"] == "float16"
    assert "dtype" not in written
    assert written["text_config"]["id2label"] == {"0": "a", "1": "b"}
    assert written["text_config"]["sliding_window"] == 32768
    assert written["audio_config"]["dropout"] == 0.25
    assert config == Qwen2AudioConfig(dtype="float16", text_config=config.text_config)
    assert len({config, Qwen2AudioConfig(dtype="float16")}) == len({config.text_config, Qwen2AudioTextConfig()})


@pytest.mark.parametrize("name", ["published", "published, bare", "dtype null", "tiny base"])
def test_a_changed_dtype_is_written(name):
    config = Qwen2AudioConfig.from_dict(ORIGINALS[name])
    for dtype in ("float32", "bfloat16", "float16"):
        changed = dataclasses.replace(config, dtype=dtype)
        assert Qwen2AudioConfig.from_dict(changed.to_dict()) == changed


def test_a_changed_field_is_written_to_every_place_that_holds_it():
    config = Qwen2AudioConfig.from_dict(ORIGINALS["rope_parameters"])
    text = dataclasses.replace(config.text_config, rope_theta=7.0, hidden_size=2048, num_hidden_layers=3)
    written = dataclasses.replace(config, text_config=text, ignore_index=-1).to_dict()
    assert written["text_config"]["rope_parameters"] == {"rope_theta": 7.0, "rope_type": "default"}
    assert written["text_config"]["rope_theta"] == 7.0
    assert written["text_config"]["head_dim"] == 128
    assert Qwen2AudioConfig.from_dict(written).text_config == text
    assert Qwen2AudioConfig.from_dict(written).ignore_index == -1


REFUSED = [
    # (edits of the tiny base, words of the message)
    (dict(text_config__use_sliding_window=True), "text_config.use_sliding_window is true, .*supported: false"),
    (
        dict(text_config__layer_types=["full_attention", "sliding_attention"]),
        r'text_config.layer_types\[1\] is "sliding_attention"; supported: "full_attention"',
    ),
    (dict(text_config__layer_types=["full_attention"]), "names 1 layers but text_config.num_hidden_layers is 2"),
    (dict(text_config__layer_types="full_attention"), "must be a list of strings or null"),
    (dict(text_config__rope_scaling={"type": "linear", "factor": 2.0}), 'rope_scaling.type is "linear"'),
    (
        dict(text_config__rope_scaling={"type": "default", "mrope_section": [16]}),
        r"rope_scaling.mrope_section is \[16\]",
    ),
    (dict(text_config__rope_scaling={"rope_type": "yarn"}), 'rope_scaling.rope_type is "yarn"; supported: "default"'),
    (dict(text_config__rope_scaling="x"), 'rope_scaling is "x"; it must be a JSON object or null'),
    (dict(text_config__rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0}), 'rope_type is "dynamic"'),
    (
        dict(text_config__rope_parameters={"full_attention": {"rope_theta": 1.0}}),
        "rope_parameters.full_attention is .*supported there: rope_theta",
    ),
    (
        dict(text_config__rope_parameters={"rope_theta": 5.0}),
        "text_config.rope_theta is 10000.0 but text_config.rope_parameters.rope_theta is 5.0",
    ),
    (dict(text_config__use_mrope=True), "text_config.use_mrope is true"),
    (dict(text_config__use_mrope=0), "text_config.use_mrope is 0, .*supported: false"),
    (dict(text_config__hidden_act="gelu"), 'text_config.hidden_act is "gelu", .*supported: "silu"'),
    (dict(audio_config__activation_function="gelu_new"), 'activation_function is "gelu_new", .*supported: "gelu"'),
    (dict(audio_config__scale_embedding=True), "audio_config.scale_embedding is true, .*supported: false"),
    (dict(model_type="qwen2_5_omni"), 'model_type is "qwen2_5_omni", .*supported: "qwen2_audio"'),
    (dict(model_type=DELETE), 'model_type is missing; it must be "qwen2_audio"'),
    (dict(text_config__model_type="qwen2_moe"), 'text_config.model_type is "qwen2_moe", .*supported: "qwen2"'),
    (dict(audio_config__model_type="whisper"), 'audio_config.model_type is "whisper"'),
    (dict(quantization_config={"bits": 4}), "quantization_config is .*supported: null"),
    (dict(text_config__quantization_config={}), "text_config.quantization_config is {}"),
    (dict(text_config__per_layer_config={"0": {}}), "text_config.per_layer_config is"),
    (dict(text_config__num_key_value_heads=3), "num_attention_heads 8 is not divisible by .*num_key_value_heads 3"),
    (dict(audio_config__encoder_attention_heads=5), "d_model 32 is not divisible by .*encoder_attention_heads 5"),
    (dict(text_config__hidden_size=65), "hidden_size 65 is not divisible by .*state text_config.head_dim"),
    (dict(text_config__head_dim=7), "text_config.head_dim is 7; rotary positions need an even one"),
    (dict(text_config__head_dim=0), "text_config.head_dim is 0; it must lie between 1"),
    (dict(text_config__num_hidden_layers=0), "num_hidden_layers is 0; it must lie between 1"),
    (dict(audio_config__d_model=-32), "audio_config.d_model is -32; it must lie between 1"),
    (dict(audio_config__encoder_layers=1 << 31), "encoder_layers is 2147483648; .*2147483647"),
    (dict(text_config__vocab_size="320"), 'vocab_size is "320"; it must be a whole number without quotes'),
    (dict(text_config__hidden_size="64"), 'hidden_size is "64"; it must be a whole number'),
    (dict(text_config__intermediate_size=96.0), "intermediate_size is 96.0; it must be a whole number"),
    (dict(audio_config__encoder_layers=True), "encoder_layers is true; it must be a whole number"),
    (dict(audio_config__num_mel_bins=None), "num_mel_bins is null; it must be a whole number"),
    (dict(text_config__rms_norm_eps=float("nan")), "rms_norm_eps is NaN; it must be finite"),
    (dict(text_config__rms_norm_eps=0), "rms_norm_eps is 0; it must be finite and above 0"),
    (dict(text_config__rms_norm_eps="1e-5"), "rms_norm_eps is .*must be a number without quotes"),
    (dict(text_config__rope_theta=float("inf")), "rope_theta is Infinity; it must be finite"),
    (dict(text_config__rope_theta=10**400), "rope_theta is 1000.*; it must be finite"),
    (dict(text_config__rope_theta=True), "rope_theta is true; it must be a number"),
    (dict(text_config__tie_word_embeddings="no"), "tie_word_embeddings is .*must be true or false"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is .*must be true or false"),
    (
        dict(tie_word_embeddings=True, text_config__tie_word_embeddings=False),
        "tie_word_embeddings is true but text_config.tie_word_embeddings is false; make them the same",
    ),
    (dict(audio_token_index=320), "audio_token_index is 320; with text_config.vocab_size 320 the ids go from 0 to 319"),
    (dict(audio_token_index=-1), "audio_token_index is -1"),
    (dict(audio_token_index="303"), 'audio_token_index is "303"; it must be a token id'),
    (dict(audio_token_index=None), "audio_token_index is null; it must be a token id"),
    (dict(audio_token_id=5), "audio_token_index is 303 but audio_token_id, its other name, is 5"),
    (
        dict(audio_config__hidden_size=5),
        "audio_config.d_model is 32 but audio_config.hidden_size, its other name, is 5",
    ),
    (dict(ignore_index=1.5), "ignore_index is 1.5; it must be a whole number"),
    (dict(text_config__eos_token_id=[302, 999]), "text_config.eos_token_id is 999"),
    (dict(text_config__eos_token_id="x"), 'text_config.eos_token_id is "x"; it must be a token id'),
    (dict(text_config__pad_token_id=-1), "text_config.pad_token_id is -1"),
    (dict(torch_dtype="int8"), 'torch_dtype is "int8"; supported: "float32", "bfloat16", "float16"'),
    (dict(torch_dtype=["float32"]), "torch_dtype is"),
    (dict(text_config__torch_dtype="float64"), 'text_config.torch_dtype is "float64"'),
    (dict(text_config__hiden_size=64), "text_config.hiden_size is 64: this key is not known.*Check its spelling"),
    (dict(text_config__attention_scale=2.0), "text_config.attention_scale is 2.0: this key is not known"),
    (dict(text_config__final_logit_softcapping=30.0), "final_logit_softcapping is 30.0: this key is not known"),
    (dict(quantization={"bits": 4}), "quantization is .*: this key is not known"),
    (dict(text_config__use_qk_norm=True), "use_qk_norm is true: this key is not known"),
    (dict(text_config__num_experts=8), "num_experts is 8: this key is not known"),
    (dict(text_config__query_pre_attn_scalar=256), "query_pre_attn_scalar is 256: this key is not known"),
    (dict(text_config__residual_multiplier=0.2), "residual_multiplier is 0.2: this key is not known"),
    (dict(audio_token_indx=7), "audio_token_indx is 7: this key is not known.*Check its spelling"),
    (dict(audio_config__layer_norm_eps=1e-5), "audio_config.layer_norm_eps is 1e-05: this key is not known"),
    (dict(audio_config=[]), r"audio_config is \[\]; it must be a JSON object"),
    (dict(text_config="qwen2"), 'text_config is "qwen2"; it must be a JSON object'),
]


LEFT_BY_OTHERS = [
    {"unsloth_version": "2026.4.2", "unsloth_fixed": True},
    {"auto_map": {}, "vision_config": None, "special_tokens": {}},
    {"swift_version": "3.8.1", "keys_to_ignore_at_inference": ["past_key_values"]},
    {"llamafactory_version": "0.9.4", "train_dataset": "mine", "lora_rank": 8, "freeze_audio_tower": True},
    {"peft_config": {"r": 8}, "_flash_attn_2_enabled": True, "use_flash_attention_2": True},
    {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048, "rope_theta": 10000},
    {"text_config__unsloth_version": "x", "audio_config__attention_probs_dropout_prob": 0.1},
    {"audio_bos_token_id": 301, "audio_eos_token_id": 302, "mask_token_id": 5},
    {"trust_remote_code": True, "model_max_length": 2048, "best_metric": 0.25, "license": "apache-2.0"},
    {"logging_steps": 10, "random_state": 3407, "conversation_style": "qwen", "per_device_train_batch_size": 4},
    {"tensor_parallel_size": 2, "num_workers": 8, "num_epochs": 3, "deepspeed_config": {"zero": 3}},
    {"output_router_logits": False, "_moe_implementation": None, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("edits", LEFT_BY_OTHERS, ids=lambda edits: next(iter(edits)))
def test_notes_of_other_tools_are_kept_and_change_nothing(edits):
    data = edited(BASE, **edits)
    config = Qwen2AudioConfig.from_dict(data)
    assert config == Qwen2AudioConfig.from_dict(BASE)
    kept = config.to_dict()
    for key, value in edits.items():
        section, _, name = key.rpartition("__")
        assert (kept[section] if section else kept)[name] == value
    assert Qwen2AudioConfig.from_dict(kept) == config


def test_a_file_that_an_editor_began_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(BASE, indent=1).replace("\n", "\r\n").encode())
    assert Qwen2AudioConfig.from_pretrained(tmp_path) == Qwen2AudioConfig.from_dict(BASE)


def test_a_size_of_the_top_level_that_contradicts_is_refused():
    with pytest.raises(ValueError, match="hidden_size is 65: this key is not known"):
        Qwen2AudioConfig.from_dict(edited(BASE, hidden_size=65))


def test_code_of_the_checkpoint_is_named_and_not_run(caplog):
    Qwen2AudioConfig.from_dict(edited(BASE, auto_map={"AutoModel": "theirs.Model"}))
    assert (
        "auto_map names code of the checkpoint's own ({'AutoModel': 'theirs.Model'}), which is not run" in caplog.text
    )


@pytest.mark.parametrize(("edits", "message"), REFUSED, ids=[str(list(edits.items()))[:60] for edits, _ in REFUSED])
def test_unsupported_values_are_named(edits, message):
    with pytest.raises(ValueError, match=message):
        Qwen2AudioConfig.from_dict(edited(BASE, **edits))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"[]", r"holds \[\]; a configuration is a JSON object"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"model_type": "qwen2"}', 'model_type is "qwen2"'),
        (None, "cannot be read .No such file or directory.; give a folder that holds a config.json"),
    ],
    ids=["cut", "list", "bytes", "nan", "twice", "deep", "other model", "missing"],
)
def test_unreadable_files_are_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Qwen2AudioConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_values_are_checked_however_they_come():
    with pytest.raises(ValueError, match=r"dtype is .*int4.*; supported"):
        dataclasses.replace(Qwen2AudioConfig(), dtype="int4")
    with pytest.raises(ValueError, match="num_key_value_heads 5"):
        Qwen2AudioTextConfig(num_key_value_heads=5)
    with pytest.raises(ValueError, match="text_config must be a Qwen2AudioTextConfig"):
        Qwen2AudioConfig(text_config={"vocab_size": 3})
    with pytest.raises(TypeError):
        Qwen2AudioTextConfig(320)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Qwen2AudioConfig().dtype = "float32"


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = Qwen2AudioConfig().save_pretrained(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        Qwen2AudioConfig(dtype="float16").save_pretrained(tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["config.json"]


# What a configuration is called where one is read.
NAMES = {"config", "cfg", "audio_config", "text_config", "audio", "text"}


def attributes_read(path: Path, names: set[str]) -> set[str]:
    """The attributes that a module reads from anything called by one of `names`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
            if name in names:
                found.add(node.attr)
    return found


def properties_of(path: Path) -> dict[str, set[str]]:
    """Each property of the classes in a module, with the attributes of self that it reads."""
    result = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "property" for d in node.decorator_list):
            inner = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
            result[node.name] = {part.attr for part in inner if getattr(part.value, "id", None) == "self"}
    return result


@pytest.mark.smoke
@pytest.mark.parametrize("kind", [Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioTextConfig])
def test_every_field_is_read(kind):
    package = Path(qwen2audio_jax.__file__).parent
    sources = [
        path for path in package.rglob("*.py") if not path.name.startswith(("config", "generation_config", "sampling"))
    ]
    read = set().union(*(attributes_read(path, NAMES) for path in sources))
    for name, through in properties_of(Path(sys.modules[kind.__module__].__file__)).items():
        if name in read:
            read |= through
    unread = {field.name for field in dataclasses.fields(kind) if field.compare} - read
    assert not unread, f"no module reads {sorted(unread)} of {kind.__name__}: use them or make them inert"
