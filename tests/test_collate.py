"""Outputs put together by `pad`, and what else transformers' callers ask of an extractor and a processor."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_processor import write_processor_files

from qwen2audio_jax import AutoFeatureExtractor, Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

TEXTS = ["hello", "hello the user the system", "what"]
HEARD = "<|audio_bos|><|AUDIO|><|audio_eos|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_processor_files(tmp_path_factory.mktemp("files"), max_frames=300)


@pytest.fixture
def processor(folder):
    return Qwen2AudioProcessor.from_pretrained(folder)


def clip(seconds):
    return np.random.default_rng(int(seconds * 100)).normal(size=int(seconds * 16_000)).astype(np.float32) * 0.1


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert np.array_equal(one[name], other[name]), name
        assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("more", [{}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 50}])
def test_rows_are_padded_as_in_one_call(processor, side, more):
    tokenizer = processor.tokenizer
    tokenizer.padding_side = side
    whole = tokenizer(TEXTS, **more)
    lists = [{"input_ids": tokenizer.encode(text)} for text in TEXTS]
    for given in (
        lists,
        {"input_ids": [row["input_ids"] for row in lists]},
        [tokenizer(text) for text in TEXTS],
        [tokenizer(TEXTS[:2], padding_side="left"), tokenizer(TEXTS[2:])],  # padded already
        [processor(text=text) for text in TEXTS],
    ):
        same(tokenizer.pad(given, **more), whole)
    same(tokenizer.pad({"input_ids": tokenizer.encode("hello")}), tokenizer(["hello"]))


def test_rows_are_those_of_the_reference(processor, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lists = [{"input_ids": processor.tokenizer.encode(text), "attention_mask": None} for text in TEXTS]
    for row in lists:
        row["attention_mask"] = [1] * len(row["input_ids"])
    for side in ("left", "right"):
        theirs.padding_side = processor.tokenizer.padding_side = side
        wanted, got = theirs.pad(lists, return_tensors="np"), processor.tokenizer.pad(lists, return_tensors="np")
        assert all(np.array_equal(got[name], wanted[name]) for name in ("input_ids", "attention_mask"))


def test_clips_and_rows_of_several_calls_are_those_of_one(processor):
    texts, clips = [f"{HEARD}hello", "hello the user", f"{HEARD}{HEARD}what"], [clip(1.0), clip(2.5), clip(0.3)]
    whole = processor(text=texts, audio=clips)
    parts = [processor(text=texts[0], audio=clips[0]), processor(text=texts[1])]
    parts.append(processor(text=texts[2], audio=clips[1:]))
    same(processor.pad(parts), whole)
    assert processor.pad(parts, return_tensors="jax").input_features.shape == (3, 128, 300)
    same(processor.pad([processor(text="hello")]), processor(text="hello"))
    features = processor.feature_extractor(clips)
    alone = [processor.feature_extractor(one) for one in clips]
    same(processor.feature_extractor.pad(alone), features)
    rows = [{"input_features": one.input_features[0], "attention_mask": one.feature_attention_mask[0]} for one in alone]
    same(processor.feature_extractor.pad(rows, padding="max_length", truncation=False), features)
    bare = processor.feature_extractor.pad([{"input_features": row["input_features"].tolist()} for row in rows[:1]])
    assert list(bare) == ["input_features"]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.tokenizer.pad([]), "found nothing"),
        (lambda p: p.tokenizer.pad([[1, 2]]), "mappings with input_ids; found list"),
        (lambda p: p.tokenizer.pad([{"attention_mask": [1]}]), "input_ids is missing; found attention_mask"),
        (lambda p: p.tokenizer.pad([{"input_ids": [1], "labels": [1]}]), "labels is not padded here, only input_ids"),
        (lambda p: p.tokenizer.pad([{"input_ids": [1]}, {"ids": [1]}]), "some have input_ids and some ids"),
        (lambda p: p.tokenizer.pad([{"input_ids": [0.5]}]), "must be whole numbers"),
        (lambda p: p.tokenizer.pad([{"input_ids": [1, 2], "attention_mask": [1]}]), r"\[1\] does not fit input_ids"),
        (
            lambda p: p.tokenizer.pad([{"input_ids": [1, 2]}], padding="max_length", max_length=1),
            "more than max_length",
        ),
        (lambda p: p.feature_extractor.pad([{"input_features": clip(1.0)}]), r"\[16000\] is not \[128, 300\].*samples"),
        (lambda p: p.feature_extractor.pad([{"input_values": clip(1.0)}]), "input_features is missing"),
        (lambda p: p.feature_extractor.pad({"input_features": [np.zeros((128, 300))]}, max_length=9), "longest there"),
        (
            lambda p: p.feature_extractor.pad({"input_features": [np.zeros((128, 300))]}, truncation=True),
            "truncation=True is not",
        ),
        (
            lambda p: p.feature_extractor.pad(
                {"input_features": [np.zeros((128, 300))], "feature_attention_mask": [np.ones((2, 300))]}
            ),
            "1 and 2 clips and masks",
        ),
    ],
)
def test_what_cannot_be_padded_is_named(processor, ask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ask(processor)


def test_settings_as_text_and_files(processor, folder, tmp_path):
    extractor = processor.feature_extractor
    assert json.loads(extractor.to_json_string()) == extractor.to_dict()
    extractor.to_json_file(tmp_path / "settings.json")
    assert Qwen2AudioFeatureExtractor.from_json_file(tmp_path / "settings.json") == extractor
    [saved] = extractor.save_pretrained(tmp_path / "alone")
    assert json.loads(Path(saved).read_text()) == extractor.to_dict()
    for source in (folder, tmp_path / "alone"):
        assert Qwen2AudioFeatureExtractor.from_pretrained(source) == extractor
    assert AutoFeatureExtractor.from_pretrained(folder) == extractor
    settings = json.loads(processor.to_json_string())
    assert settings == processor.to_dict()
    assert (settings["audio_token"], settings["feature_extractor"]) == ("<|AUDIO|>", extractor.to_dict())
    saved = processor.save_pretrained(tmp_path / "whole")
    assert {Path(path).name for path in saved} == {path.name for path in (tmp_path / "whole").iterdir()}
    (tmp_path / "whole" / "processor_config.json").write_text(processor.to_json_string())
    (tmp_path / "whole" / "preprocessor_config.json").unlink()
    again = Qwen2AudioProcessor.from_pretrained(tmp_path / "whole")
    assert (again.feature_extractor, again.to_dict()) == (extractor, processor.to_dict())
    assert len(processor.tokenizer.save_pretrained(tmp_path / "tokenizer")) == 2


def test_an_extractor_is_made_of_the_reference_s_settings():
    made = Qwen2AudioFeatureExtractor(
        feature_size=80, sampling_rate=16_000, hop_length=160, chunk_length=8, n_fft=400, padding_value=0.0
    )
    assert (made.feature_size, made.nb_max_frames) == (80, 800)
    assert made == Qwen2AudioFeatureExtractor.from_dict(made.to_dict())
    assert replace(made, feature_size=128) == Qwen2AudioFeatureExtractor(feature_size=128, chunk_length=8)
    for settings, error, words in (
        ({"sampling_rate": 8000}, ValueError, "sampling_rate is 8000, which is not supported"),
        ({"do_normalize": True}, ValueError, "do_normalize is true"),
        ({"chunk_length": 60}, ValueError, "at most 30 s"),
        ({"n_samples": 3}, ValueError, "make them agree"),
        ({"feature_sise": 80}, TypeError, "no setting 'feature_sise'"),
    ):
        with pytest.raises(error, match=words):
            Qwen2AudioFeatureExtractor(**settings)


def test_attributes_of_the_reference_s_extractor(processor, folder):
    extractor = processor.feature_extractor
    assert (extractor.padding_value, extractor.padding_side, extractor.return_attention_mask) == (0.0, "right", True)
    assert extractor.model_input_names == list(extractor(clip(1.0)))
    assert extractor.mel_filters.shape == (201, 128)
    for name, words in (
        ("zero_mean_unit_var_norm", "not normalised"),
        ("push_to_hub", "hf upload"),
        ("feature_sise", "no attribute 'feature_sise'$"),
    ):
        with pytest.raises(AttributeError, match=words):
            getattr(extractor, name)
    same(extractor(raw_speech=clip(1.0)), extractor(clip(1.0)))
    for arguments in ((), (clip(1.0), clip(1.0))):
        with pytest.raises(TypeError, match="the same argument"):
            extractor(*arguments[:1], raw_speech=arguments[1] if arguments else None)
    with pytest.raises(AttributeError, match="cannot be assigned"):
        extractor.padding_side = "left"
    theirs = pytest.importorskip("transformers").WhisperFeatureExtractor.from_pretrained(folder)
    np.testing.assert_allclose(extractor.mel_filters, theirs.mel_filters, atol=1e-12)
    known = json.loads(theirs.to_json_string())
    mine = json.loads(extractor.to_json_string())
    assert {name: mine[name] for name in known if name in mine and name != "processor_class"} == {
        name: known[name] for name in known if name in mine and name != "processor_class"
    }
