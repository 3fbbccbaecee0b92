"""Command lines with something wrong: exit code 2, and one line with the value, the limit and a remedy that works."""

import functools
import http.server
import json
import shlex
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import sounds

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, embedded
from qwen2audio_jax.cli.main import main

# (what is typed, what the line says: value, limit and remedy)
WRONG = [
    ('generate --audio nofile.wav "x"', ["nofile.wav", "No such file", "check the path"]),
    ('generate --audio aud "x"', ["aud is a folder", "--each aud/*"]),
    ('generate --audio aud/empty.wav "x"', ["empty.wav", "0 bytes", "holds sound"]),
    ('generate --audio aud/text.wav "x"', ["text.wav", "holds text", "Pass a file that holds sound"]),
    ('generate --audio aud/trunc.wav "x"', ["states 64000 bytes", "are there", "pass --allow-truncated to hear"]),
    ('generate --audio aud/nan.wav "x"', ["NaN", "16000 of its 16000", "repair it"]),
    ('generate --audio aud/long.wav "x"', ["40 s", "30 s", "pass --truncation to keep"]),
    ('generate --audio aud/short.wav "x"', ["160 samples", "321", "longer clip"]),
    ('generate --audio aud/rate1.wav "x"', ["1 samples a second", "1000 to 768000", "resample", "sox -r 16000 INPUT"]),
    ('generate --audio http://127.0.0.1:9/x.wav "x"', ["127.0.0.1", "public", "--allow-private-urls where"]),
    ('generate --audio http://169.254.169.254/latest "x"', ["169.254.169.254", "--allow-private-urls where"]),
    ('generate --audio ftp://example.com/x.wav "x"', ["'ftp'", "http, https and data", "local file"]),
    ('generate --audio "data:audio/wav;base64,@@@@" "x"', ["4 characters", "base64"]),
    ('generate --audio example:nope "x"', ["'nope'", "digits-4719"]),
    ("generate", ["no prompt", "--audio FILE"]),
    ('generate --model Qwen/Qwen2-Audio-7B-Instruct --audio example:tone "x"', ["Qwen/Qwen2-Audio-7B-Instruct", "hub"]),
    ('generate --model /nonexistent --audio example:tone "x"', ["/nonexistent", "no such folder", "hub id"]),
    ('generate --model aud --audio example:tone "x"', ["aud: holds neither", "a.aiff, ", "more", "name the folder"]),
    ('generate --audio example:tone --max-new-tokens 0 "x"', ["--max-new-tokens 0", "1..32768"]),
    ('generate --audio example:tone --max-new-tokens abc "x"', ["--max-new-tokens: 'abc'", "a whole number"]),
    ('generate --audio example:tone --max-new-tokens 100000000 "x"', ["--max-new-tokens 100000000", "1..32768"]),
    ('generate --audio example:tone --do-sample --temperature -1 "x"', ["--temperature -1.0", "above 0", "--greedy"]),
    ('generate --audio example:tone --do-sample --top-p 2 "x"', ["--top-p 2.0", "above 0 and at most 1"]),
    (
        'generate --audio example:tone --temperature 0.7 "x"',
        ["--temperature 0.7", "changes nothing", "add --do-sample"],
    ),
    ('generate --audio example:tone --num-return-sequences 3 "x"', ["--num-return-sequences 3", "set --do-sample, or"]),
    ('generate --audio example:tone --dtype float8 "x"', ["'float8'", "bfloat16", "did you mean float32?"]),
    ('generate --audio example:tone --mesh 3x4 "x"', ["--mesh 3x4 takes 12 devices", "there are 8", "--mesh 2x4"]),
    ('generate --audio example:tone --mesh v5e-7 "x"', ["'v5e-7'", "v6e-8", "did you mean v5e-8?"]),
    ('generate --audio example:tone --attention pallas "x"', ["--attention pallas", "'cpu'", "use 'auto', 'xla'"]),
    ('generate --audio example:tone --weights int4 "x"', ["'int4'", "auto, int8", "did you mean int8?"]),
    ('generate --audio example:tone --adapter /nonexistent "x"', ["/nonexistent", "adapter_config.json"]),
    ('generate --audio example:tone --raw "no placeholder"', ["<|AUDIO|>", "1 clip", "<|audio_bos|>"]),
    ('generate --raw "<|AUDIO|> x"', ["1 <|AUDIO|>", "0 clips", "write <|AUDIO|> once"]),
    ('generate --audios example:tone "x"', ["--audios", "no such option", "did you mean --audio?"]),
    ('generate example:tone aud/a.wav "x"', ["'aud/a.wav'", "nothing is expected", "behind --audio"]),
    ("transcribe", ["transcribe"]),
    ("aud/a.wav", ["aud/a.wav", "a command is expected", "qwen2audio generate --audio aud/a.wav"]),
    ("batch", ["INPUT, --output", "as in: qwen2audio batch "]),
    ("plan", ["--topology", "as in: qwen2audio plan --topology v5e:2x4"]),
    ("plan --topology foo", ["'foo'", "v5e:{1x1", "h100"]),
    ("plan --topology v5e:3x3", ["'v5e:3x3'", "1x1, 2x2, 2x4", "name one"]),
    ("convert /nonexistent x1", ["/nonexistent", "no such folder", "owner/name"]),
    ("convert aud x2", ["aud/config.json", "no such file", "the folder holds a.aiff", "copy the whole folder"]),
    ("convert", ["SRC, DST", "as in: qwen2audio convert "]),
    ("train /nonexistent.toml", ["/nonexistent.toml", "No such file", "begin with a copy of ", "train-lora.toml"]),
    ("doctor --model /nonexistent", ["/nonexistent", "no such folder", "hub id"]),
    ("evaluate", ["--data DIR", "--fresh N"]),
    ("evaluate --fresh 0", ["0"]),
    ('generate --audio example:tone --stop "" "x"', ["--stop", "empty", "leave it out"]),
    ('generate --audio example:tone --seed -5 --do-sample "x"', ["--seed -5", "0..4294967295"]),
    ('generate --audio example:tone ""', ['no prompt in ""', "leave it out"]),
    ('generate --model facebook/opt-125m --audio example:tone "x"', ["facebook/opt-125m", "hub"]),
    # Others of their kinds.
    ('generate --audio aud/b.wav "x"', ["aud/b.wav", "did you mean aud/a.wav?"]),
    ("sing", ["'sing'", "generate, chat"]),
    ("genrate x", ["'genrate'", "did you mean generate?"]),
    ("clip.mp3 --json", ["clip.mp3", "generate --audio clip.mp3"]),
    ("chat --max-newtokens 5", ["--max-newtokens", "did you mean --max-new-tokens?"]),
    ("chat hello", ["'hello'", "from the terminal or a pipe"]),
    ("serve --prot 1", ["--prot", "did you mean --port?"]),
    ("models --clear", ["--clear", "did you mean --clean?"]),
    ("convert aud x --dtype float23", ["'float23'", "did you mean float32?"]),
    ("convert verify aud", ["DST", "as in: qwen2audio convert verify "]),
    ("convert inspect aud --jsn", ["--jsn", "did you mean --json?"]),
    ("evaluate --split unseem --fresh 1", ["'unseem'", "did you mean unseen?"]),
    ("batch aud --output o --slots many", ["--slots: 'many'", "a whole number"]),
    ("generate --track", ["--track", "expected one argument"]),
    ('generate --audio example:tone --top-k -1 "x"', ["--top-k -1"]),
    ('generate --audio example:tone --repetition-penalty 0 "x"', ["--repetition-penalty 0"]),
    ("chat --top-p 0.5 --greedy --model aud", ["aud: holds neither"]),
    ("doctor --smoke --model aud", ["--smoke", "leave out --model"]),
    ("--print-completion fish", ["'fish'", "bash, zsh, tcsh"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with the folder aud of sound files, good and bad."""
    Qwen2AudioForConditionalGeneration.from_pretrained()  # whose first conversion is told on stderr
    place = tmp_path_factory.mktemp("typed")
    aud = place / "aud"
    aud.mkdir()
    whole = sounds.encode("wav", sounds.speech(32_000, rate=16_000), 16_000)
    files = {
        "a.wav": whole,
        "empty.wav": b"",
        "text.wav": b"This is a text.\n",
        "trunc.wav": whole[: len(whole) // 2],
        "nan.wav": float_wav(np.full(16_000, np.nan, np.float32)),
        "long.wav": sounds.encode("wav", np.zeros(640_000, np.float32), 16_000),
        "short.wav": sounds.encode("wav", np.zeros(160, np.float32), 16_000),
        "rate1.wav": whole[:24] + struct.pack("<I", 1) + whole[28:],
        "a.m4a": sounds.encode_av("mp4", "aac", sounds.speech(24_000, rate=24_000), 24_000),
        "a.aiff": sounds.encode_av("aiff", "pcm_s16be", sounds.speech(32_000, rate=16_000), 16_000),
    }
    for name, data in files.items():
        (aud / name).write_bytes(data)
    return place


def float_wav(samples: np.ndarray) -> bytes:
    """A WAV file of float32, which can hold what is no number."""
    form = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    data = samples.astype("<f4").tobytes()
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run(line: str) -> int:
    try:
        return main(shlex.split(line))
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
def test_what_is_wrong_is_said_in_a_line(folder, monkeypatch, capsys, line, said):
    monkeypatch.chdir(folder)
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    for part in said:
        assert part in err


# (the line after its remedy was followed, how often its text comes out)
FOLLOWED = [
    ('generate --audio aud/trunc.wav --allow-truncated "x"', 1),
    ('generate --audio aud/long.wav --truncation "x"', 1),
    ('generate --audio aud/a.m4a "Which digits are spoken?"', 1),
    ('generate --audio {url}/aud/a.aiff --allow-private-urls "x"', 1),
    ('generate --audio example:tone --do-sample --temperature 0.7 --seed 1 "x"', 1),
    ('generate --audio example:tone --do-sample --num-return-sequences 3 "x"', 3),
    ('generate --audio example:tone --mesh 8x1 "x"', 1),
    ('generate "x" --each aud/a.wav aud/a.aiff', 2),
    ('generate --audio example:tone --raw "<|audio_bos|><|AUDIO|><|audio_eos|>x"', 1),
    ('generate --audio example:tone --attention xla --dtype float32 --weights int8 "x"', 1),
    ("generate --audio example:tone", 1),
]


@pytest.fixture(scope="module")
def url(folder):
    """The folder, served on this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(("line", "answers"), FOLLOWED, ids=[line for line, _ in FOLLOWED])
def test_the_remedy_works_as_typed(folder, url, monkeypatch, capsys, line, answers):
    monkeypatch.chdir(folder)
    assert run(line.format(url=url) + " --max-new-tokens 2 --quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == answers


@pytest.mark.slow(seconds=40)
def test_remedies_of_other_commands_work_as_typed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run('batch aud --output answers --prompt "Transcribe the speech." --max-new-tokens 2 --quiet') == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert run("plan --topology v5e:2x2 --config tiny --no-search --json") == 0
    assert json.loads(capsys.readouterr().out)
    place = embedded.model_folder()
    assert run(f"convert {place} converted --json --quiet") == 0
    assert json.loads(capsys.readouterr().out)["converted"]
    assert run(f"convert verify {place} converted --json --quiet") == 0
    assert json.loads(capsys.readouterr().out) == {"same": True, "differences": []}
    assert run("convert inspect converted --json") == 0
    assert run("convert export converted back --json --quiet") == 0
    assert run("doctor --model converted --json --quiet") == 0
    assert run("models --json --quiet") == 0
