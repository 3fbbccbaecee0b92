"""Arguments that are written for transformers' processors: the same arrays, or what to write instead."""

import inspect

import numpy as np
import pytest
from tiny_processor import write_processor_files

from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

HEARD = "<|audio_bos|><|AUDIO|><|audio_eos|>"
TEXTS = [f"hello {HEARD}", f"{HEARD} hello the user the system", "what"]
CLIPS = [np.random.default_rng(samples).normal(size=samples).astype(np.float32) / 9 for samples in (8_000, 16_000)]
GIVEN = {"text": TEXTS, "audio": CLIPS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_processor_files(tmp_path_factory.mktemp("files"), max_frames=300)


@pytest.fixture(scope="module")
def processor(folder):
    return Qwen2AudioProcessor.from_pretrained(folder)


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize(
    ("grouped", "flat"),
    [
        ({"text_kwargs": {"padding": "max_length", "max_length": 76}}, {"padding": "max_length", "max_length": 76}),
        ({"text_kwargs": {"padding_side": "right", "truncation": False}}, {"padding_side": "right"}),
        (
            {"common_kwargs": {"return_tensors": "np"}, "text_kwargs": {"pad_to_multiple_of": 8}},
            {"pad_to_multiple_of": 8},
        ),
        ({"audio_kwargs": {"padding": "max_length", "sampling_rate": 16_000}}, {}),
        ({"audio_kwargs": {"truncation": True, "do_normalize": False, "max_length": None}}, {"truncation": True}),
        ({"processor_kwargs": {"text_kwargs": {"pad_to_multiple_of": 8}}}, {"pad_to_multiple_of": 8}),
        ({"text_kwargs": {}, "audio_kwargs": None, "images_kwargs": None}, {}),
    ],
)
def test_groups_of_arguments(processor, grouped, flat):
    same(processor(**GIVEN, **grouped), processor(**GIVEN, **flat))
    chat = [{"role": "user", "content": [{"type": "audio", "audio": CLIPS[0]}, {"type": "text", "text": "hello"}]}]
    options = {"tokenize": True, "add_generation_prompt": True}
    same(
        processor.apply_chat_template(chat, **options, **grouped),
        processor.apply_chat_template(chat, **options, **flat),
    )


@pytest.mark.parametrize(
    "words",
    [
        {"add_special_tokens": False, "return_token_type_ids": False, "verbose": True},
        {"return_attention_mask": True, "do_normalize": False, "dither": 0.0, "device": "cpu"},
        {"images": None, "videos": [], "load_audio_from_video": False, "return_mm_token_type_ids": None},
    ],
)
def test_words_that_change_nothing(processor, words):
    same(processor(**GIVEN, **words), processor(**GIVEN))
    same(processor.tokenizer(TEXTS, **words, truncation=False), processor.tokenizer(TEXTS))


def test_max_length_pads_texts_and_leaves_clips_whole(processor):
    longest, filled = processor(**GIVEN), processor(**GIVEN, padding="max_length", max_length=300)
    before = 300 - longest.input_ids.shape[1]
    assert (filled.input_ids[:, :before] == processor.tokenizer.pad_token_id).all()
    assert not filled.attention_mask[:, :before].any()
    same(
        {
            name: filled[name][:, before:] if name in ("input_ids", "attention_mask") else filled[name]
            for name in filled
        },
        longest,
    )


def test_max_length_is_the_reference_s_for_texts(processor, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2AudioProcessor.from_pretrained(folder)
    theirs.tokenizer.padding_side = "left"
    groups = {"text_kwargs": {"padding": "max_length", "max_length": 120}, "common_kwargs": {"return_tensors": "np"}}
    expected, found = theirs(**GIVEN, **groups), processor(**GIVEN, **groups)
    assert sorted(found) == sorted(expected)
    for name in ("input_ids", "attention_mask", "feature_attention_mask"):
        assert np.array_equal(found[name], expected[name]), name
    np.testing.assert_allclose(found.input_features, expected["input_features"], atol=2e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"text_kwargs": {"padding": "max_length"}, "padding": "max_length"},
            "padding= is given twice, in text_kwargs",
        ),
        ({"text_kwargs": {"truncation": True}}, "truncation=True is not supported: texts are never cut"),
        ({"audio_kwargs": {"max_length": 300}}, "max_length=300 is not supported: every clip is padded"),
        ({"return_attention_mask": False}, "attention_mask is always there"),
        ({"return_mm_token_type_ids": True}, "input_ids == processor.audio_token_id"),
        ({"images": np.zeros((3, 3))}, "this model hears, and sees nothing"),
        ({"do_normalize": True}, "a model trained on other features"),
    ],
)
def test_what_would_change_something(processor, words, said):
    with pytest.raises(ValueError, match=said):
        processor(**GIVEN, **words)


def test_the_tokenizer_and_the_extractor_alone(processor):
    with pytest.raises(ValueError, match="truncation=True is not supported: texts are never cut"):
        processor.tokenizer(TEXTS, truncation=True, max_length=2)
    with pytest.raises(TypeError, match=r"unknown argument paddin=; did you mean padding=\?"):
        processor.tokenizer(TEXTS, paddin=True)
    extractor = processor.feature_extractor
    whole = extractor(CLIPS, dither=0.0)
    same(extractor.pad([whole], padding=True), whole)
    same(extractor.pad([whole], padding="longest"), whole)
    for padding in (True, "longest"):  # the reference gives features of another length
        with pytest.raises(ValueError, match=r"every clip is padded to the longest there may be.*leave it out"):
            extractor(CLIPS, padding=padding)


def test_the_signature_stays(processor):
    assert "padding" in inspect.signature(processor.__call__).parameters
    assert "tokenize" in inspect.signature(processor.apply_chat_template).parameters
