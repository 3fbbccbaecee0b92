"""Generation options: accepted and refused values, and the reference's reading of written files."""

import json
import re

import numpy as np
import pytest

from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.limits import LIMITS

PUBLISHED = {
    "chat_format": "chatml",
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "max_new_tokens": 2048,
    "pad_token_id": 151643,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.5,
    "transformers_version": "4.38.1",
}


def test_reads_the_published_file(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(PUBLISHED))
    assert GenerationConfig.from_json_file(path) == GenerationConfig(
        do_sample=True,
        eos_token_id=(151645, 151643),
        max_new_tokens=2048,
        pad_token_id=151643,
        repetition_penalty=1.1,
        temperature=0.7,
        top_k=20,
        top_p=0.5,
    )


def test_defaults_are_the_reference_s():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig._get_default_generation_params()
    ours = GenerationConfig()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences"):
        assert getattr(ours, name) == theirs[name], name
    assert ours.new_token_budget(100) == theirs["max_length"] == 20


def test_is_read_by_the_reference_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = GenerationConfig.from_dict(PUBLISHED).updated(stop_strings=["\n", "你"], min_new_tokens=2)
    (tmp_path / "generation_config.json").write_text(ours.to_json(), encoding="utf-8")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    for name, value in ours.to_dict().items():
        assert getattr(theirs, name) == value, name
    for written in (theirs.to_dict(), theirs.to_diff_dict(), ours.to_dict()):
        assert GenerationConfig.from_dict(written) == ours
    theirs.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_json_file(tmp_path / "again" / "generation_config.json") == ours
    assert GenerationConfig.from_dict(transformers.GenerationConfig().to_dict()) == GenerationConfig()
    everything = transformers.GenerationConfig._get_default_generation_params()
    del everything["max_length"]
    assert GenerationConfig.from_dict(everything) == GenerationConfig()


def test_every_option_of_the_reference_is_known():
    """Kept, refused or dropped on purpose: nothing that transformers would act on is called unknown."""
    transformers = pytest.importorskip("transformers")
    for name in transformers.GenerationConfig().to_dict():
        try:
            GenerationConfig().updated(**{name: object()})
        except ValueError as error:
            assert name in str(error)  # noqa: PT017


def test_ids_are_an_int_or_a_list():
    assert GenerationConfig.from_dict({"eos_token_id": 5}).eos_token_id == (5,)
    assert GenerationConfig.from_dict({"eos_token_id": [5, 6, 5]}).eos_token_id == (5, 6)
    assert GenerationConfig().updated(eos_token_id=np.int64(7)).eos_token_id == (7,)
    assert GenerationConfig().updated(eos_token_id=np.array([7, 8])).eos_token_id == (7, 8)
    assert GenerationConfig.from_dict({"eos_token_id": None}).eos_token_id == ()
    for value in (True, "5", [1, "2"], -1, [0.5]):
        with pytest.raises(ValueError, match="eos_token_id"):
            GenerationConfig().updated(eos_token_id=value)


def test_finished_rows_are_filled_up_with_the_padding_or_the_first_stop_id():
    assert GenerationConfig(pad_token_id=3, eos_token_id=[4]).filler_token_id == 3
    assert GenerationConfig(eos_token_id=[4, 5]).filler_token_id == 4
    assert GenerationConfig().filler_token_id == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is out of range: give a number above 0, or do_sample=False"),
        ({"temperature": -1}, "temperature=-1 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"temperature": True}, "temperature=True is not a number"),
        ({"top_p": 0}, "top_p=0 is out of range: give a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01 is out of range"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"top_k": 2.0}, "top_k=2.0 is not an int"),
        ({"top_k": True}, "top_k=True is not an int"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is out of range"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf is out of range"),
        ({"max_new_tokens": 0}, f"max_new_tokens=0 is out of range: give an int in 1..{LIMITS.new_tokens}"),
        ({"max_new_tokens": 10**9}, f"give an int in 1..{LIMITS.new_tokens}"),
        ({"max_length": 0}, "max_length=0 is out of range"),
        ({"min_new_tokens": -2}, "min_new_tokens=-2 is out of range"),
        ({"pad_token_id": -1}, "pad_token_id=-1 is out of range"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 is out of range"),
        ({"num_return_sequences": 1000}, f"give an int in 1..{LIMITS.sequences_per_prompt}"),
        ({"do_sample": "yes"}, "do_sample='yes' is not a bool"),
        ({"do_sample": False, "num_return_sequences": 2}, "num_return_sequences=2 without sampling"),
        ({"stop_strings": [""]}, "empty string"),
    ],
)
def test_values_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerationConfig(do_sample=True).updated(**options)


def test_what_filters_and_bans_have_bounds():
    """A huge n-gram would make each step of a server slow for everybody."""
    for name, value in (("no_repeat_ngram_size", LIMITS.ngram + 1), ("no_repeat_ngram_size", -1), ("min_p", 1.01)):
        with pytest.raises(ValueError, match=rf"{name}={value} is out of range"):
            GenerationConfig(**{name: value})
    assert GenerationConfig(no_repeat_ngram_size=LIMITS.ngram, min_p=1).min_p == 1.0
    for name in ("min_p", "no_repeat_ngram_size"):
        with pytest.raises(ValueError, match=f"{name}=True is not"):
            GenerationConfig(**{name: True})


def test_temperature_zero_is_accepted_where_it_is_not_used():
    assert GenerationConfig().updated(temperature=0).mode == "greedy"
    with pytest.raises(ValueError, match="temperature=0"):
        GenerationConfig(temperature=0.0).updated(do_sample=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("penalty_alpha", 0.6),
        ("typical_p", 0.9),
        ("encoder_no_repeat_ngram_size", 3),
        ("eta_cutoff", 0.05),
        ("guidance_scale", 1.5),
        ("assistant_model", object()),
        ("prompt_lookup_num_tokens", 10),
        ("min_length", 5),
        ("bad_words_ids", [[1]]),
        ("suppress_tokens", [1]),
        ("forced_eos_token_id", 0),
        ("logits_processor", [len]),
        ("stopping_criteria", [len]),
        ("streamer", object()),
        ("return_dict_in_generate", True),
        ("output_scores", True),
        ("remove_invalid_values", True),
        ("encoder_repetition_penalty", 1.2),
    ],
)
def test_options_that_are_not_built_are_refused_by_name(name, value):
    for read in (
        lambda: GenerationConfig.from_dict({name: value}),
        lambda: GenerationConfig().updated(**{name: value}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}=.* is not supported: \w+"):
            read()


def test_options_that_are_not_built_are_accepted_where_they_do_nothing():
    neutral = {
        "num_beams": 1,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
        "guidance_scale": None,
        "return_dict_in_generate": False,
        "use_cache": True,
        "length_penalty": 1.0,
        "early_stopping": False,
        "streamer": None,
    }
    assert GenerationConfig().updated(**neutral) == GenerationConfig.from_dict(neutral) == GenerationConfig()


def test_unknown_options_are_refused_with_the_nearest():
    with pytest.raises(TypeError, match="no option 'max_new_token': the nearest is 'max_new_tokens'"):
        GenerationConfig().updated(max_new_token=3)
    with pytest.raises(ValueError, match=r"generation_config\.json has no option 'temprature': .*'temperature'"):
        GenerationConfig.from_dict({"temprature": 1.0})


@pytest.mark.parametrize(
    "left",
    [
        {"trust_remote_code": True, "unsloth_version": "2026.4.2"},
        {"suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}},
        {"return_dict_in_generate": False, "output_scores": None, "cache_config": {"x": 1}},
        {"presence_penalty": 0.0, "dry_multiplier": 0, "forced_decoder_ids": [], "min_p": 0.0},
        {"swift_version": "3.8", "system_prompt": "x", "tp_plan": None, "_attn_implementation": "sdpa"},
        {"num_beams": 1, "early_stopping": False, "length_penalty": 1.0, "watermarking_config": {}},
    ],
    ids=lambda left: next(iter(left)),
)
def test_what_other_tools_leave_in_a_file_changes_nothing(left):
    assert GenerationConfig.from_dict({**PUBLISHED, **left}) == GenerationConfig.from_dict(PUBLISHED)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"typical_p": 0.9}, "typical_p=0.9 is not supported"),
        ({"suppress_tokens": [5]}, r"suppress_tokens=\[5\] is not supported"),
        ({"presence_penalty": 1.5}, "no option 'presence_penalty'"),
        ({"dry_multiplier": 0.8}, "no option 'dry_multiplier'"),
        ({"repetition_penalti": 1.2}, "no option 'repetition_penalti': the nearest is 'repetition_penalty'"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
    ],
)
def test_what_would_change_a_token_is_refused_in_a_file(stated, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig.from_dict({**PUBLISHED, **stated})


def test_none_in_a_call_takes_an_option_away():
    config = GenerationConfig.from_dict(PUBLISHED)
    without = config.updated(
        top_k=None, top_p=None, temperature=None, repetition_penalty=None, eos_token_id=None, max_new_tokens=None
    )
    assert without == GenerationConfig(do_sample=True, top_k=0, pad_token_id=151643)


def test_none_in_a_file_is_the_default():
    assert GenerationConfig.from_dict({"top_k": None, "do_sample": None, "eos_token_id": None}) == GenerationConfig()


def test_new_token_budget():
    assert GenerationConfig(max_new_tokens=7).new_token_budget(100) == 7
    assert GenerationConfig(max_length=107).new_token_budget(100) == 7
    limited = GenerationConfig(max_new_tokens=7)
    assert limited.updated(max_length=300).new_token_budget(100) == 200
    assert limited.updated(max_length=300, max_new_tokens=None).new_token_budget(100) == 200
    with pytest.raises(ValueError, match=r"max_length=300 .* and max_new_tokens=9 are two limits: give one"):
        limited.updated(max_length=300, max_new_tokens=9)
    for prompt in (107, 200):
        with pytest.raises(ValueError, match=f"max_length=107 counts the prompt, which has {prompt} tokens: raise it"):
            GenerationConfig(max_length=107).new_token_budget(prompt)
    with pytest.raises(ValueError, match=r"min_new_tokens=30 is more than the 20 new tokens allowed \(the default\)"):
        GenerationConfig(min_new_tokens=30).new_token_budget(5)
    with pytest.raises(ValueError, match=f"are more than {LIMITS.new_tokens}: ask for fewer"):
        GenerationConfig(max_length=10**6).new_token_budget(5)


@pytest.mark.parametrize("text", ["[]", "{", '{"top_k": -3}', '"x"', "[" * 100_000])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        GenerationConfig.from_json_file(path)


def test_a_file_that_an_editor_began_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(PUBLISHED), encoding="utf-8")
    assert GenerationConfig.from_json_file(tmp_path / "x.json") == GenerationConfig.from_dict(PUBLISHED)


def test_is_hashable_and_frozen():
    assert hash(GenerationConfig.from_dict(PUBLISHED)) == hash(GenerationConfig.from_dict(PUBLISHED))
    with pytest.raises(AttributeError):
        GenerationConfig().top_k = 3
