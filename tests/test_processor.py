"""The processor on raw prompts, its files and its errors, beside the reference's processor."""

import copy
import io
import json
import os
import pickle
import shutil
import threading

import jax
import numpy as np
import pytest
import soundfile
from judge import relative_error
from stand_in import stand_in
from tiny import AUDIO, END_OF_TEXT, IM_END, IM_START
from tiny_processor import CHAT_TEMPLATE, SPECIAL_TOKENS, write_processor_files

from qwen2audio_jax.audio import AudioError
from qwen2audio_jax.processing.chat_template import DEFAULT_CHAT_TEMPLATE
from qwen2audio_jax.processing.end_of_turn import missing_stop
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

RAW_PROMPTS = [
    "hello",
    "  two  spaces and a trailing newline\n\n\n",
    "<|im_start|>user\nhello the user<|im_end|>\n",
    "你好，世界。今天天气怎么样？",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪",
    "cafe\u0301 ﬁ Å \u212b",
    "<|en|><|zh|> <|unknown|> <|im_start|",
    "it's we'll I'D 12345 3.14 $%^&*\t\ttabs\r\nCRLF",
    "\u0000 control \u200b zero width \ufeff",
    "العربية עברית हिन्दी ไทย",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_processor_files(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def resaved(published, tmp_path_factory):
    """The layout of transformers 5: processor_config.json and chat_template.jinja."""
    folder = tmp_path_factory.mktemp("resaved")
    shutil.copy(published / "tokenizer.json", folder)
    tokenizer = json.loads((published / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(tokenizer.pop("chat_template"))
    del tokenizer["added_tokens_decoder"]
    tokenizer["extra_special_tokens"] = tokenizer.pop("additional_special_tokens")
    tokenizer |= {"backend": "tokenizers", "is_local": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    extractor = json.loads((published / "preprocessor_config.json").read_text())
    extractor.pop("processor_class")
    config = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "feature_extractor": extractor | {"dither": 0.0},
        "processor_class": "Qwen2AudioProcessor",
    }
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def processor(published):
    return Qwen2AudioProcessor.from_pretrained(published)


@pytest.fixture(scope="module")
def oracle(published, exact_features):
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen2AudioProcessor.from_pretrained(published)


def sound(seconds, seed=0):
    n = round(seconds * 16_000)
    t = np.arange(n) / 16_000
    noise = np.random.default_rng(seed).normal(size=n)
    return (0.05 * np.sin(2 * np.pi * (200 + 80 * seed) * t) + 0.1 * noise).astype(np.float32)


def settings(folder, name, change):
    path = folder / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def copy_of(published, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    return folder


# --- against the reference ---


@pytest.mark.parametrize("prompt", RAW_PROMPTS)
def test_raw_prompts_encode_as_in_the_reference(processor, oracle, prompt):
    expected = oracle(text=prompt, return_tensors="np")
    actual = processor(text=prompt)
    np.testing.assert_array_equal(actual.input_ids, expected["input_ids"])
    assert sorted(actual) == sorted(expected)
    text = processor.decode(actual.input_ids[0])
    assert text == oracle.decode(expected["input_ids"][0])


@pytest.mark.parametrize("layout", ["published", "resaved"])
def test_clips_and_text_equal_the_reference(layout, request, oracle):
    processor = Qwen2AudioProcessor.from_pretrained(request.getfixturevalue(layout))
    clips = [sound(1.0), sound(0.0211, 1), sound(2.53, 2), sound(30.0, 3)]
    texts = ["<|AUDIO|>你好<|AUDIO|>", "no sound at all", "<|im_start|><|audio_bos|><|AUDIO|><|audio_eos|>x<|AUDIO|>"]
    for side in ("left", "right"):
        expected = oracle(
            text=texts, audio=clips, sampling_rate=16_000, padding=True, padding_side=side, return_tensors="np"
        )
        actual = processor(text=texts, audio=clips, sampling_rate=16_000, padding_side=side)
        assert sorted(actual) == sorted(expected)
        for name in ("input_ids", "attention_mask", "feature_attention_mask"):
            np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
            assert actual[name].dtype == np.int32
        assert relative_error(actual.input_features, expected["input_features"]) < 2e-6
        assert actual.input_features.dtype == np.float32


def test_files_that_the_reference_saves_are_read(processor, oracle, tmp_path):
    oracle.save_pretrained(tmp_path)
    again = Qwen2AudioProcessor.from_pretrained(tmp_path)
    assert again.feature_extractor == processor.feature_extractor
    assert again.tokenizer.control_tokens == processor.tokenizer.control_tokens
    assert again.chat_template == oracle.chat_template


def test_the_reference_reads_what_we_save(processor, oracle, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor.save_pretrained(tmp_path)
    again = transformers.Qwen2AudioProcessor.from_pretrained(tmp_path)
    assert again.tokenizer.get_vocab() == oracle.tokenizer.get_vocab()
    assert again.feature_extractor.to_dict() == oracle.feature_extractor.to_dict()
    assert again.chat_template == processor.chat_template == CHAT_TEMPLATE
    text = "<|im_start|>hello 你好"
    np.testing.assert_array_equal(again(text=text, return_tensors="np")["input_ids"], processor(text=text).input_ids)


def test_tokenizer_equals_the_reference(processor, oracle):
    ours, theirs = processor.tokenizer, oracle.tokenizer
    for name in ("pad", "eos", "bos", "unk"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token"), name
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    assert ours.get_vocab() == theirs.get_vocab()
    assert set(theirs.all_special_tokens) == set(ours.all_special_tokens)
    assert ours.all_special_ids == set(theirs.all_special_ids)
    assert ours.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ours.convert_ids_to_tokens([0, 299, 303]) == theirs.convert_ids_to_tokens([0, 299, 303])


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_the_reference(processor, oracle, skip):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 320, size=(20, 31))  # bytes that are no UTF-8, special tokens, ids beyond the vocabulary
    options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
    assert processor.batch_decode(rows, **options) == oracle.batch_decode(rows, **options)
    assert processor.batch_decode(rows.tolist(), **options) == oracle.batch_decode(rows.tolist(), **options)
    assert processor.batch_decode(jax.numpy.asarray(rows), **options) == oracle.batch_decode(rows, **options)
    assert processor.decode(rows[0], **options) == oracle.decode(rows[0], **options)
    assert processor.decode(72, **options) == oracle.decode(72, **options)
    text = "hello , world . do n't !"
    ids = processor.tokenizer.encode(text)
    for clean in (None, True, False):
        assert processor.decode(ids, clean_up_tokenization_spaces=clean) == text
        assert oracle.decode(ids, clean_up_tokenization_spaces=clean) == text


# --- by itself ---


def test_one_text_one_array(processor):
    inputs = processor(text="<|AUDIO|>hello", audios=sound(1.0))
    assert inputs.input_ids.shape == (1, 25 + 3)
    assert (inputs.input_ids[0, :25] == AUDIO).all()
    assert inputs.input_features.shape == (1, 128, 3000)
    assert inputs["feature_attention_mask"].sum() == 100
    assert set(inputs.keys()) == {"input_ids", "attention_mask", "input_features", "feature_attention_mask"}
    assert dict(**inputs).keys() == inputs.keys()
    assert "input_features: [1, 128, 3000] float32" in repr(inputs)
    for again in (copy.deepcopy(inputs), pickle.loads(pickle.dumps(inputs))):
        np.testing.assert_array_equal(again.input_ids, inputs.input_ids)
    with pytest.raises(AttributeError, match="no entry 'labels'; there are input_ids, attention_mask"):
        _ = inputs.labels


@pytest.mark.smoke
def test_both_layouts_give_the_same(published, resaved):
    first, second = (Qwen2AudioProcessor.from_pretrained(folder) for folder in (published, resaved))
    assert first.chat_template == second.chat_template == CHAT_TEMPLATE
    assert first.tokenizer.control_tokens == second.tokenizer.control_tokens
    assert first.feature_extractor == second.feature_extractor
    assert second.audio_token_id == AUDIO


@pytest.mark.smoke
def test_every_way_to_pass_clips(processor, tmp_path):
    a, b, c = sound(0.5, 1), sound(1.0, 2), sound(1.5, 3)
    path = tmp_path / "b.wav"
    soundfile.write(path, b, 16_000, subtype="FLOAT")
    texts = ["<|AUDIO|>x", "plain", "<|AUDIO|><|AUDIO|>"]
    expected = processor(text=texts, audio=[a, b, c])
    for audio in (
        (a, b, c),
        [[a], [], [b, c]],
        [jax.numpy.asarray(a), str(path), c.tolist()],
        [[a], (), [path.read_bytes(), c]],
        [a, path, c],
        [a, io.BytesIO(path.read_bytes()), c],
    ):
        actual = processor(text=texts, audio=audio)
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], atol=1e-6, err_msg=name)
    one = processor(text="<|AUDIO|>", audio=a)
    for audio in ([a], [[a]], a.tolist(), a.astype(np.float64), jax.numpy.asarray(a)):
        actual = processor("<|AUDIO|>", audio)
        np.testing.assert_array_equal(actual.input_ids, one.input_ids)
        np.testing.assert_allclose(actual.input_features, one.input_features, atol=1e-6)


def test_rows_of_a_batch_are_the_rows_alone(processor):
    texts, clips = ["<|AUDIO|>hello the user", "x", "<|AUDIO|>"], [[sound(0.7, 1)], [], [sound(0.3, 2)]]
    batch = processor(text=texts, audio=clips)
    for i, text in enumerate(texts):
        alone = processor(text=text, audio=clips[i])
        kept = batch.attention_mask[i] == 1
        np.testing.assert_array_equal(batch.input_ids[i][kept], alone.input_ids[0])
        assert (batch.input_ids[i][~kept] == END_OF_TEXT).all()
        assert kept[-1]
    assert "input_features" not in processor(text="x")
    assert "input_features" not in processor(text="x", audio=[])


def test_padding_options(processor):
    texts = ["hello", "hello the user"]
    longest = processor(text=texts, padding="longest").input_ids
    np.testing.assert_array_equal(longest, processor(text=texts).input_ids)
    assert processor(text=texts, padding="max_length", max_length=20).input_ids.shape == (2, 20)
    assert processor(text=texts, pad_to_multiple_of=16).attention_mask.shape == (2, 16)
    right = processor(text=texts, padding_side="right")
    assert right.attention_mask[:, 0].all()
    assert not right.attention_mask[0, -1]
    assert processor(text=["hello", "hello"], padding=False).attention_mask.all()
    for options, message in (
        ({"padding": False}, r"padding=False, but the texts have \[3, 6\] tokens; arrays need padding=True"),
        ({"padding": "shortest"}, r"padding='shortest' is unknown; use True"),
        ({"padding_side": "top"}, r"padding_side='top' is unknown; use \"left\" or \"right\""),
        ({"padding": "max_length"}, r"needs max_length=N"),
        ({"max_length": 4}, r"max_length=4 alone has no meaning.*leave max_length out"),
        ({"padding": "max_length", "max_length": 4}, r"text 1 has 6 tokens, more than max_length=4"),
        ({"pad_to_multiple_of": 0}, r"pad_to_multiple_of=0 must be a whole number"),
        ({"padding": False, "pad_to_multiple_of": 4}, r"pad_to_multiple_of=4 needs padding=True|arrays need padding"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=texts, **options)


def test_return_tensors(processor):
    arrays = processor(text="<|AUDIO|>", audio=sound(0.1), return_tensors="jax")
    assert all(isinstance(value, jax.Array) for value in arrays.values())
    assert all(isinstance(value, np.ndarray) for value in processor(text="x", return_tensors="np").values())
    for other in ("pt", "tf", "torch", True):
        with pytest.raises(ValueError, match=r'return_tensors=.* is not available here; use "np"'):
            processor(text="x", return_tensors=other)


def test_arguments_are_named(processor):
    clip = sound(0.1)
    for arguments, message in (
        ({"text": "x", "audio": clip, "audios": clip}, "audio= and audios= are the same argument; pass audio= alone"),
        ({"text": "x", "sampling_rates": 16_000}, r"unknown argument sampling_rates=; did you mean sampling_rate=\?"),
        ({"text": "x", "sample_rate": 16_000}, r"did you mean sampling_rate=\?"),
        ({"text": "x", "sr": 16_000}, r"did you mean sampling_rate=\?"),
        ({"texts": "x"}, r"unknown argument texts=; did you mean text=\?"),
        ({"text": "x", "raw_speech": clip}, r"did you mean audio=\?"),
        ({"text": "x", "mask": []}, r"unknown argument mask=; it has no meaning here. Known are text, audio"),
        ({"text": "x", "images_kwargs": {}}, r"images_kwargs= is not taken here; pass what it holds"),
        ({"audio": clip}, "text= is missing"),
    ):
        with pytest.raises(TypeError, match=message):
            processor(**arguments)
    for text, message in (
        (3, "text must be a str or a list of str; found int"),
        (["a", b"b"], "found bytes"),
        ([], "text is an empty list"),
        ("", "text 0 is empty"),
        ("half \ud83d", r"half a surrogate pair \(U\+D83D\) at character 5"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=text)


def test_placeholders_are_counted_per_text(processor):
    clip = sound(0.1)
    for text, audio, message in (
        ("<|AUDIO|> what", None, r"text 0 \('<\|AUDIO\|> what'\) has 1 <\|AUDIO\|> placeholder but 0 clips were given"),
        ("what is this", clip, r"text 0 \('what is this'\) has 0 <\|AUDIO\|> placeholders but 1 clip was given; write"),
        ("<|AUDIO|>", [clip, clip], r"has 1 <\|AUDIO\|> placeholder but 2 clips were given"),
        (["<|AUDIO|>", "<|AUDIO|>"], [[clip, clip], []], r"text 0 .* has 1 .* but 2 clips were given"),
        (["<|AUDIO|>", "b"], [clip, clip], r"2 clips for 1 <\|AUDIO\|> placeholders: text 0 .* 1, text 1 \('b'\) 0"),
        (["<|AUDIO|>", "b"], [[clip]], r"audio has 1 lists of clips for 2 texts"),
        (["a", "<|AUDIO|>"], [None, clip], r"audio holds None; pass one list of clips for each text"),
        (["<|AUDIO|>", "<|AUDIO|>"], [[clip], clip], r"audio\[1\] is a clip but others are lists of clips"),
        ("<|AUDIO|>", np.zeros((2, 16_000)), r"audio is one array of shape \[2, 16000\]; pass one clip as \[samples\]"),
        ("<|AUDIO|>" * 65, [clip] * 65, r"has 65 <\|AUDIO\|> placeholders; the limit is 64"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=text, audio=audio)


def test_several_clips_are_heard_in_threads_and_in_order(processor, tmp_path, monkeypatch):
    from qwen2audio_jax.processing import placeholders

    paths = [tmp_path / f"{i}.flac" for i in range(12)]
    for i, path in enumerate(paths):
        soundfile.write(path, sound(0.1 * (i + 1)), 44_100)
    texts = ["<|AUDIO|>"] * len(paths)
    alone = [processor(text="<|AUDIO|>", audio=path).input_features[0] for path in paths]
    monkeypatch.setattr(placeholders, "os", stand_in(os, cpu_count=lambda: 4))
    names: set[str] = set()
    load = Qwen2AudioFeatureExtractor.load_clip
    monkeypatch.setattr(
        Qwen2AudioFeatureExtractor,
        "load_clip",
        lambda self, source, **options: (
            names.add(threading.current_thread().name),
            load(self, source, **options),
        )[1],
    )
    assert np.array_equal(processor(text=texts, audio=paths).input_features, np.stack(alone))
    assert threading.current_thread().name not in names
    names.clear()
    files = [io.BytesIO(path.read_bytes()) for path in paths]
    assert np.array_equal(processor(text=texts, audio=files).input_features, np.stack(alone))
    processor(text="<|AUDIO|>", audio=paths[0])
    assert names == {threading.current_thread().name}
    paths[3].write_bytes(b"no sound")
    paths[7].unlink()
    with pytest.raises(AudioError, match=r"^audio\[3\]: ") as caught:
        processor(text=texts, audio=paths)
    assert caught.value.kind == "format"


def test_clips_that_are_refused_are_named(processor, tmp_path):
    texts = ["<|AUDIO|>", "<|AUDIO|>"]
    nan = sound(0.1)
    nan[7] = np.nan
    for clip, kind in (
        (sound(30.001), "too_long"),
        (np.zeros(320, np.float32), "too_short"),
        (np.zeros(0, np.float32), "empty"),
        (nan, "not_finite"),
        (np.zeros((2, 400), np.float32), "shape"),
        (str(tmp_path / "missing.wav"), "missing"),
        (b"no sound", "format"),
        ((sound(0.1), 16_000.5), "rate"),
    ):
        with pytest.raises(AudioError, match=r"^audio\[1\]: ") as caught:
            processor(text=texts, audio=[sound(0.1), clip])
        assert caught.value.kind == kind
    with pytest.raises(AudioError, match=r"^audio\[0\]\[0\]: .*missing\.wav"):
        processor(text=texts, audio=[[str(tmp_path / "missing.wav")], [sound(0.1)]])
    with pytest.raises(
        AudioError, match=r"sampling_rate=44100, but the model hears 16000 .*load_audio\(samples"
    ) as caught:
        processor(text="<|AUDIO|>", audio=sound(0.1), sampling_rate=44_100)
    assert caught.value.kind == "rate"
    cut = processor(text="<|AUDIO|>", audio=sound(30.5), truncation=True)
    np.testing.assert_array_equal(
        cut.input_features, processor(text="<|AUDIO|>", audio=sound(30.5)[:480_000]).input_features
    )
    assert cut.input_ids.shape == (1, 750)


def test_cut_files_are_heard_if_wanted(processor, tmp_path):
    """The remedy of the refusal works, and the output names the clips; a copy too."""
    file = io.BytesIO()
    soundfile.write(file, np.full(16_000, 0.1), 16_000, format="WAV")
    (tmp_path / "cut.wav").write_bytes(file.getvalue()[:20_000])
    prompt = "<|AUDIO|><|AUDIO|>"
    clips = [np.full(1000, 0.1, np.float32), tmp_path / "cut.wav"]
    with pytest.raises(AudioError, match=r"audio\[1\].*truncated.*allow_truncated=True"):
        processor(text=prompt, audio=clips)
    inputs = processor(text=prompt, audio=clips, allow_truncated=True)
    (missing,) = inputs.truncated_clips
    assert missing.startswith("audio[1]: its header states 32000 bytes of sound and 19956 are there")
    assert pickle.loads(pickle.dumps(inputs)).truncated_clips == copy.deepcopy(inputs).truncated_clips == (missing,)
    assert "truncated_clips" not in dict(inputs)
    assert processor(text="<|AUDIO|>", audio=clips[0], allow_truncated=True).truncated_clips == ()
    chat = [{"role": "user", "content": [{"type": "audio", "audio": clips[1]}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, allow_truncated=True)
    assert inputs.truncated_clips[0].startswith("messages[0]['content'][0]: its header states")
    alone = processor.feature_extractor([clips[1]], allow_truncated=True)
    assert alone.truncated_clips[0].startswith("clips[0]: its header states")
    assert np.array_equal(alone.input_features, inputs.input_features)


def test_files_at_other_rates_are_resampled(processor, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(1.0), 8_000)  # the same samples take two seconds
    assert processor(text="<|AUDIO|>", audio=path, sampling_rate=16_000).input_ids.shape == (1, 50)


def test_feature_extractor_alone(tmp_path):
    folder = write_processor_files(tmp_path, num_mel_bins=80, max_frames=200)
    extractor = Qwen2AudioProcessor.from_pretrained(folder).feature_extractor
    assert (extractor.sampling_rate, extractor.hop_length, extractor.n_fft) == (16_000, 160, 400)
    assert (extractor.feature_size, extractor.n_samples, extractor.nb_max_frames) == (80, 32_000, 200)
    output = extractor([sound(1.0), sound(2.0)], sampling_rate=16_000)
    assert output.input_features.shape == (2, 80, 200)
    np.testing.assert_array_equal(output.feature_attention_mask.sum(-1), [100, 200])
    assert extractor(sound(1.0)).input_features.shape == (1, 80, 200)
    with pytest.raises(AudioError, match="2") as caught:
        extractor(sound(2.01))
    assert caught.value.kind == "too_long"


def test_decode_refuses_what_is_no_id(processor):
    for ids, message in (
        ([5, -100], "-100 is no token id"),
        (1.5, "must be integers"),
        ([[1], [2.5]], "must be integers"),
        (np.zeros((1, 2, 3), int), r"shape \[1, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.decode(ids)
    assert processor.decode([]) == ""
    assert processor.batch_decode([]) == []
    assert processor.batch_decode([65, 66]) == [processor.decode([65, 66])]
    with pytest.raises(ValueError, match=r"'<\|nothing\|>' is not a token"):
        processor.tokenizer.convert_tokens_to_ids("<|nothing|>")
    with pytest.raises(AttributeError, match="no attribute 'sep_token'"):
        _ = processor.tokenizer.sep_token


def test_settings_that_change_the_features_are_refused(published, tmp_path):
    folder = copy_of(published, tmp_path)
    original = (folder / "preprocessor_config.json").read_text()
    for change, message in (
        ({"do_normalize": True}, r"do_normalize is true, which is not supported; supported: false"),
        ({"sampling_rate": 8000}, r"sampling_rate is 8000, which is not supported; supported: 16000"),
        ({"hop_length": 320}, r"hop_length is 320"),
        ({"n_fft": 512}, r"n_fft is 512"),
        ({"dither": 1e-4}, r"dither is 0\.0001"),
        ({"padding_value": 1.0}, r"padding_value is 1\.0"),
        ({"padding_side": "left"}, r"padding_side is \"left\""),
        ({"feature_extractor_type": "Other"}, r"feature_extractor_type is \"Other\""),
        ({"preemphasis": 0.97}, r"preemphasis is 0\.97: this key is not known"),
        ({"feature_size": "128"}, r"feature_size is \"128\"; it must be a number above 0"),
        ({"feature_size": 0}, r"feature_size is 0"),
        ({"chunk_length": 20}, r"n_samples is 480000, but chunk_length 20 s at 16000 Hz makes 320000"),
        ({"chunk_length": 60, "n_samples": 960_000}, r"chunk_length is 60 s; at most 30 s"),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(json.loads(original) | change))
        with pytest.raises(ValueError, match=message):
            Qwen2AudioProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("preprocessor_config.json", {"unsloth_version": "2026.4.2", "auto_map": {"AutoProcessor": "x.Y"}}),
        ("preprocessor_config.json", {"return_tensors": "np", "image_processor_type": "x", "tokenizer_class": "y"}),
        ("preprocessor_config.json", {"device": None, "max_seconds": None, "mel_floor": []}),
        ("processor_config.json", {"unsloth_version": "2026.4.2", "image_processor": {"x": 1}, "swift": {"v": 3}}),
        ("processor_config.json", {"_commit_hash": "0123", "video_processor": None, "audio_tokens_per_clip": None}),
        ("tokenizer_config.json", {"padding_side": "right", "extra_special_tokens": {}, "add_bos_token": False}),
        ("tokenizer_config.json", {"unsloth_version": "x", "max_length": 512, "stride": 0, "is_local": True}),
    ],
)
def test_what_other_tools_leave_in_the_files_changes_nothing(published, tmp_path, name, left):
    folder = copy_of(published, tmp_path)
    before = Qwen2AudioProcessor.from_pretrained(folder)
    data = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**data, **left}))
    after = Qwen2AudioProcessor.from_pretrained(folder)
    assert after.feature_extractor == before.feature_extractor
    text = "<|im_start|>user\nHello <|AUDIO|>"
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert (after.chat_template, after.audio_token) == (before.chat_template, before.audio_token)


def test_missing_and_damaged_files_are_named(published, tmp_path):
    folder = copy_of(published, tmp_path)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Qwen2AudioProcessor.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing \(only vocab\.json were found\)"):
        Qwen2AudioProcessor.from_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    (folder / "preprocessor_config.json").rename(folder / "kept")
    with pytest.raises(ValueError, match=r"neither a preprocessor_config\.json nor a processor_config\.json"):
        Qwen2AudioProcessor.from_pretrained(folder)
    (folder / "kept").rename(folder / "preprocessor_config.json")
    (folder / "processor_config.json").write_text('{"audio_tokens": "<|AUDIO|>"}')
    with pytest.raises(ValueError, match=r"audio_tokens is .*: this key is not known"):
        Qwen2AudioProcessor.from_pretrained(folder)
    (folder / "processor_config.json").write_text('{"audio_token": "<|SOUND|>"}')
    with pytest.raises(ValueError, match=r"the tokenizer has no token '<\|SOUND\|>'"):
        Qwen2AudioProcessor.from_pretrained(folder)
    (folder / "processor_config.json").unlink()
    settings(folder, "tokenizer_config.json", lambda data: data.update(pad_token="<|pad|>"))
    with pytest.raises(ValueError, match=r"pad_token '<\|pad\|>' is not in tokenizer\.json"):
        Qwen2AudioProcessor.from_pretrained(folder)
    settings(folder, "tokenizer_config.json", lambda data: data.update(pad_token=None))
    assert Qwen2AudioProcessor.from_pretrained(folder).tokenizer.pad_token_id == END_OF_TEXT


def test_tokens_declared_in_the_settings_are_added(published, tmp_path):
    folder = copy_of(published, tmp_path)
    token = {"content": "<|yue|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    settings(folder, "tokenizer_config.json", lambda data: data["added_tokens_decoder"].update({"308": token}))
    tokenizer = Qwen2AudioProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.encode("a<|yue|>") == [*tokenizer.encode("a"), 308]
    assert 308 in tokenizer.all_special_ids
    settings(folder, "tokenizer_config.json", lambda data: data["added_tokens_decoder"].update({"400": token}))
    with pytest.raises(ValueError, match=r"gives '<\|yue\|>' the id 400, tokenizer\.json 308"):
        Qwen2AudioProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ([1], r"added_tokens_decoder is \[1\]; it must be an object"),
        ({"x": {"content": "<|a|>"}}, r'added_tokens_decoder has the key "x"; its keys must be ids'),
        ({"-3": {"content": "<|a|>"}}, r'added_tokens_decoder has the key "-3"'),
        ({"9" * 5000: {"content": "<|a|>"}}, r'added_tokens_decoder has the key "999'),
        ({"308": "<|a|>"}, r'added_tokens_decoder\[308\] is "<\|a\|>"; it must be an object with a "content"'),
        ({"308": {"content": None}}, r'added_tokens_decoder\[308\] is \{"content": null\}'),
        ({"308": {"content": 3}}, r"added_tokens_decoder\[308\] is \{.*3\}; it must be a token's string"),
        ({"308": {"content": "<|a|>", "special": "false"}}, r'\[308\]: special is "false"; it must be true or false'),
        ({"308": {"content": "<|a|>", "lstrip": 1}}, r"\[308\]: lstrip is 1; it must be true or false"),
    ],
)
def test_damaged_declarations_of_tokens_are_named(published, tmp_path, declared, said):
    folder = copy_of(published, tmp_path)
    settings(folder, "tokenizer_config.json", lambda data: data.update(added_tokens_decoder=declared))
    with pytest.raises(ValueError, match=f"tokenizer_config.json: .*{said}"):
        Qwen2AudioProcessor.from_pretrained(folder)
    assert missing_stop(folder, stops=[END_OF_TEXT]) is None  # said where the tokenizer is needed


@pytest.mark.parametrize("prefix", ["<|im_end|>", None])
def test_a_tokenizer_at_which_the_library_panics_is_named(published, tmp_path, prefix):
    folder = copy_of(published, tmp_path)

    def damage(data):
        data["model"]["continuing_subword_prefix"] = prefix
        del data["model"]["vocab"]["assistant"]

    settings(folder, "tokenizer.json", damage)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer of the tokenizers library: "):
        Qwen2AudioProcessor.from_pretrained(folder)


def test_where_the_template_comes_from(published, tmp_path):
    folder = copy_of(published, tmp_path)

    def template():
        return Qwen2AudioProcessor.from_pretrained(folder).chat_template

    settings(folder, "tokenizer_config.json", lambda data: data.pop("chat_template"))
    assert template() == DEFAULT_CHAT_TEMPLATE
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    settings(folder, "tokenizer_config.json", lambda data: data.update(chat_template=named))
    assert template() == "b"
    (folder / "chat_template.json").write_text('{"chat_template": "c"}')
    assert template() == "c"
    (folder / "chat_template.jinja").write_text("d\n")
    assert template() == "d\n"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(ValueError, match=r"chat_template\.json: chat_template is 3; it must be a str"):
        template()


def test_special_tokens_by_name(processor):
    assert processor.tokenizer.eos_token_id == IM_END
    assert processor.tokenizer.convert_tokens_to_ids("<|im_start|>") == IM_START
    assert processor.tokenizer.bos_token is None
    assert processor.tokenizer.bos_token_id is None
