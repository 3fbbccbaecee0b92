"""Objects that carry samples and their rate: heard as the same samples are, or refused with what they are."""

import io
from collections import UserDict
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import sounds
from tiny_processor import write_processor_files

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.processing.conversation import read_conversation
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

RATE = 22_050
CLIP = sounds.speech(RATE, rate=RATE)
STEREO = np.stack([CLIP, CLIP[::-1]])
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>what"


def wav(samples=CLIP) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


class Decoder:
    """As torchcodec's AudioDecoder, which `datasets` hands out."""

    def __init__(self, data, seconds=None):
        self.data_of, self.metadata, self.asked = data, SimpleNamespace(duration_seconds=seconds), None

    def get_all_samples(self):
        self.asked = "all"
        return SimpleNamespace(data=self.data_of, sample_rate=RATE)

    def get_samples_played_in_range(self, start, stop):
        self.asked = (start, stop)
        return SimpleNamespace(data=self.data_of[:, int(start * RATE) : int(stop * RATE)], sample_rate=RATE)


def segment(samples, width):
    """As pydub's AudioSegment: integers with the channels interleaved."""
    scale = 1 << 8 * width - 1
    whole = np.round(samples.T.reshape(-1) * scale).astype({1: np.int8, 2: np.int16, 4: np.int32}[width])
    channels = 1 if samples.ndim == 1 else len(samples)
    return SimpleNamespace(
        get_array_of_samples=whole.tolist, frame_rate=RATE, channels=channels, sample_width=width, raw_data=b""
    )


SIXTEEN = np.round(CLIP * 32768).astype(np.int16)
SOURCES = {
    "a row of datasets": ({"array": CLIP, "sampling_rate": RATE, "path": None}, CLIP),
    "a row with a list": ({"path": "gone.wav", "array": CLIP.tolist(), "sampling_rate": np.int64(RATE)}, CLIP),
    "a row of a pipeline": ({"raw": CLIP, "sampling_rate": float(RATE)}, CLIP),
    "a row with bytes": ({"bytes": wav(), "path": None}, CLIP),
    "bytes before the path": ({"bytes": wav(), "path": "gone.wav"}, CLIP),
    "a lazy row": (UserDict(array=CLIP, sampling_rate=RATE), CLIP),
    "a decoder": (Decoder(CLIP[None]), CLIP),
    "a decoder of two channels": (Decoder(STEREO, seconds=1.0), STEREO.mean(0)),
    "a decoder's samples": (Decoder(STEREO).get_all_samples(), STEREO.mean(0)),
    "rate and int16": ((RATE, SIXTEEN), SIXTEEN / np.float32(32768)),
    "rate and int16 of two channels": ((RATE, np.stack([SIXTEEN] * 2, 1)), SIXTEEN / np.float32(32768)),
    "rate and int32": ((RATE, SIXTEEN.astype(np.int32) << 16), SIXTEEN / np.float32(32768)),
    "rate and uint8": ((RATE, (SIXTEEN // 256 + 128).astype(np.uint8)), (SIXTEEN // 256) / np.float32(128)),
    "rate and floats": ((np.int64(RATE), CLIP), CLIP),
    "floats and rate": ((CLIP, RATE), CLIP),
    "floats and rate of two channels": ((np.stack([CLIP] * 2, 1), np.int64(RATE)), CLIP),
    "floats and a rate that is one": ((CLIP, float(RATE)), CLIP),
    "channels first, as torchaudio gives them": ((STEREO, RATE), STEREO.mean(0)),
    "one channel first": ((CLIP[None], RATE), CLIP),
    "a list and rate": ((CLIP.tolist(), RATE), CLIP),
    "a pair in a list": ([RATE, CLIP], CLIP),
    "a segment of 16 bits": (segment(CLIP, 2), SIXTEEN / np.float32(32768)),
    "a segment of two channels": (segment(STEREO, 4), STEREO.mean(0)),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Qwen2AudioProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("processor")))


@pytest.mark.parametrize("name", SOURCES)
def test_objects_are_heard_at_their_own_rate(name):
    source, samples = SOURCES[name]
    got, wanted = load_audio(source), load_audio(samples.astype(np.float32), sampling_rate=RATE)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() < 1e-6
    if not isinstance(source, dict) or "bytes" not in source:
        with pytest.raises(AudioError, match="leave sampling_rate away") as error:
            load_audio(source, sampling_rate=16_000)
        assert error.value.kind == "rate"


@pytest.mark.parametrize("name", ["a row of datasets", "a decoder", "rate and int16", "a pair in a list", "a lazy row"])
def test_every_door_takes_them(name, processor):
    source, _samples = SOURCES[name]
    wanted = processor(text=PROMPT, audio=[load_audio(source)]).input_features
    chat = [{"role": "user", "content": [{"type": "audio", "audio": source}]}]
    for found in (
        processor(text=PROMPT, audio=source),
        processor(text=PROMPT, audio=[source]),
        processor(text=[PROMPT], audio=[[source]], sampling_rate=16_000),
        processor.apply_chat_template(chat, tokenize=True),
        processor.feature_extractor(source),
        processor.feature_extractor([source]),
    ):
        assert np.array_equal(found.input_features, wanted)
    assert len(processor(text=PROMPT * 2, audio=[source, source]).input_features) == 2


def test_a_path_in_a_row(tmp_path, processor):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    assert np.array_equal(load_audio({"bytes": None, "path": str(path)}), load_audio(wav()))
    assert np.array_equal(
        processor.feature_extractor(path).input_features, processor.feature_extractor([path])["input_features"]
    )
    with pytest.raises(AudioError, match=r"not public|not reachable|address"):
        load_audio({"path": "http://127.0.0.1/a.wav"})


def test_a_decoder_of_a_long_file_decodes_what_is_heard():
    long = Decoder(np.zeros((1, RATE * 40), np.float32), seconds=40.0)
    with pytest.raises(AudioError, match="lasts 40 s") as error:
        load_audio(long)
    assert (error.value.kind, long.asked) == ("too_long", None)
    assert len(load_audio(long, truncation=True)) == 480_000
    assert long.asked == (0.0, 31.0)


def test_tensors_and_other_floats():
    samples = sounds.speech(1000)
    rounded = np.asarray(jnp.asarray(samples, jnp.bfloat16).astype(jnp.float32))
    assert np.array_equal(load_audio(jnp.asarray(samples, jnp.bfloat16)), rounded)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(samples)
    assert np.array_equal(load_audio(tensor.bfloat16()), rounded)
    assert np.array_equal(load_audio(tensor.bfloat16().requires_grad_()), rounded)
    assert np.array_equal(load_audio(tensor.double().requires_grad_()), samples)
    assert np.array_equal(load_audio((16_000, tensor)), samples)
    assert np.array_equal(load_audio({"array": tensor.half(), "sampling_rate": 16_000}), samples.astype(np.float16))
    with pytest.raises(AudioError, match="divide it by 32768"):
        load_audio((tensor * 32767).short())


class Upload:
    """As an upload of an asynchronous server."""

    async def read(self, size):
        return b""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"array": CLIP}, "'array' and no 'sampling_rate'"),
        ({"sampling_rate": RATE, "array": None}, "dict with 'sampling_rate', 'array' and no sound in it: pass"),
        ({}, "dict with no key"),
        ({"array": CLIP, "sampling_rate": "fast"}, "rate is 'fast', not a whole number"),
        ({"array": STEREO, "sampling_rate": RATE}, r"shape \(2, 22050\).*mean"),
        ((RATE, np.zeros((65, RATE), np.float32)), "22050 channels, not 1 to 64"),
        ((RATE, SIXTEEN.astype(np.int64)), "int64, not a float"),
        ((CLIP, 16_000.5), "rate is 16000.5, not a whole number"),
        (SIXTEEN.tolist(), "int64, not a float: divide it by 32768 to"),
        ((SIXTEEN.astype(np.int32) << 8), "int32, not a float: divide it by 8388608 to"),
        ((SIXTEEN.astype(np.int32) << 16), "int32, not a float: divide it by 2147483648 to"),
        (io.TextIOWrapper(io.BytesIO(wav())), "is open as text: open it in binary mode"),
        (Upload(), r"await file.read\(\)"),
        (SimpleNamespace(content=b""), "an object of type SimpleNamespace, no sound"),
        (None, "is None, no sound"),
    ],
)
def test_what_is_refused_is_named(source, words):
    with pytest.raises(AudioError, match=words):
        load_audio(source)


def test_an_open_sound_file_is_named():
    with soundfile.SoundFile(io.BytesIO(wav())) as file:
        with pytest.raises(AudioError, match=r"open SoundFile that gives samples.*file\.read\(\)"):
            load_audio(file)
        file.seek(0)
        assert np.array_equal(load_audio(file.read(), sampling_rate=file.samplerate), load_audio(wav()))


def test_items_of_a_conversation():
    row = {"array": CLIP, "sampling_rate": RATE}
    (clip,) = read_conversation([{"role": "user", "content": [{"type": "audio", "audio": row}]}]).clips
    assert np.array_equal(load_audio(clip.source), load_audio(row))
    with pytest.raises(ValueError, match="dict without a url"):
        read_conversation([{"role": "user", "content": [{"type": "audio_url", "audio_url": row}]}])
