"""base64 sound: every form that writers give is the same clip, and what is damaged is refused."""

import base64
import io
import urllib.parse
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio.data_url import decode_base64
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.conversation import read_conversation


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(3).uniform(-0.5, 0.5, 4000), 16000, format="WAV", subtype="PCM_16")
    return file.getvalue()


CONTENT = wav()
while len(CONTENT) % 3 != 1:  # so that there are two characters of padding
    CONTENT += b"\0"
TEXT = base64.b64encode(CONTENT).decode()
FORMS = {
    "plain": TEXT,
    "without padding": TEXT.rstrip("="),
    "half of the padding": TEXT[:-1],
    "lines of 76": base64.encodebytes(CONTENT).decode(),
    "lines of 64 with CRLF": "\r\n".join(TEXT[i : i + 64] for i in range(0, len(TEXT), 64)) + "\r\n",
    "indented lines": "\n\t  ".join(TEXT[i : i + 100] for i in range(0, len(TEXT), 100)),
    "URL-safe alphabet": base64.urlsafe_b64encode(CONTENT).decode(),
    "URL-safe without padding": base64.urlsafe_b64encode(CONTENT).decode().rstrip("="),
    "a space before the padding": TEXT.rstrip("=") + " ==",
}


def test_the_forms_differ():
    assert "+" in TEXT
    assert "/" in TEXT
    assert TEXT.endswith("==")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_clip(form):
    text, wanted = FORMS[form], load_audio(CONTENT)
    assert decode_base64(text, name="it", kind="url") == CONTENT
    for url in (
        f"data:audio/wav;base64,{text}",
        f"data:;base64,{text}",
        f"Data:audio/x-wav;charset=utf-8;BASE64,{text}",
        f"data:audio/wav;base64 ,{text}",
        f"data:audio/wav;base64,{urllib.parse.quote(text)}",
    ):
        assert np.array_equal(load_audio(url), wanted)
    for data in (text, f"data:;base64,{text}", f"\n data:audio/wav;base64,{text}"):
        item = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        (clip,) = read_conversation([{"role": "user", "content": [item]}]).clips
        assert np.array_equal(load_audio(clip.source), wanted)


def test_around_a_url_in_a_line_of_text():
    wanted = load_audio(CONTENT)
    for around in ("{}\n", "  {}", "\t{}\r\n", "\ufeff{}"):
        assert np.array_equal(load_audio(around.format(f"data:audio/wav;base64,{TEXT}")), wanted)
        with pytest.raises(AudioError, match="not a public address"):
            load_audio(around.format("http://127.0.0.1/a.wav"))
        assert open_clip(around.format("https://example.com/a.wav")) == "https://example.com/a.wav"


def item_of(data):
    return [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]}]


def test_what_input_audio_holds():
    """Bytes as b64encode returns them, the sound itself, and an address as DashScope's clients write it."""
    wanted = load_audio(CONTENT)
    for data in (base64.b64encode(CONTENT), f"data:;base64,{TEXT}".encode(), CONTENT):
        (clip,) = read_conversation(item_of(data)).clips
        assert np.array_equal(load_audio(clip.source), wanted)
    (clip,) = read_conversation(item_of("https://example.com/a.wav")).clips
    assert clip.source == "https://example.com/a.wav"
    for path in ("file:///etc/passwd", "gs://bucket/a.wav"):
        with pytest.raises(AudioError, match="not valid base64"):
            read_conversation(item_of(path))
    (clip,) = read_conversation(item_of("/etc/passwd")).clips  # no path: eight bytes in base64
    assert clip.source == base64.b64decode("/etc/passwd=")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TEXT, "write 'data:;base64,' in front of it"),
        (base64.urlsafe_b64encode(CONTENT).decode(), "write 'data:;base64,' in front of it"),
        (TEXT.encode(), r"holds base64 text, .* Pass the bytes of base64.b64decode\(it\)"),
        (f"data:audio/wav,{TEXT}", "holds base64 text"),
        (f"data:audio/wav;base64,{TEXT.encode()}", r"base64.b64encode\(...\).decode\(\)"),
        ("no such folder/no such file of a talk on the seventh of November at four.wav", "check the path"),
        (b"This is a text of some words, and no base64 at all, however long it may become.", "holds text,"),
    ],
)
def test_base64_in_another_place_is_told_apart(source, words):
    with pytest.raises(AudioError, match=words):
        load_audio(source)


def test_the_remedy_is_followed():
    assert np.array_equal(load_audio("data:;base64," + TEXT), load_audio(base64.b64decode(TEXT.encode())))


@pytest.mark.parametrize(
    "text", ["$$$$", "UklG*Rg=", "A", "AAAAA", "AA=A", "====", "AAA====", "é" * 8, "UklG\0", "=AAA", "data:AAAA"]
)
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(AudioError, match="not valid base64") as error:
        decode_base64(text, name="it", kind="corrupt")
    assert error.value.kind == "corrupt"


def test_a_size_beyond_the_limit_is_refused():
    few = replace(LIMITS, file_bytes=1000)
    for text in FORMS.values():
        with pytest.raises(AudioError, match="1000 are read at most") as error:
            decode_base64(text, name="it", kind="url", limits=few)
        assert error.value.kind == "too_large"
    item = {"type": "input_audio", "input_audio": {"data": TEXT}}
    with pytest.raises(AudioError, match=r"messages\[0\].*1000 are read at most"):
        read_conversation([{"role": "user", "content": [item]}], limits=few)
    exact = replace(LIMITS, file_bytes=len(CONTENT))
    assert decode_base64(FORMS["lines of 76"], name="it", kind="url", limits=exact) == CONTENT
