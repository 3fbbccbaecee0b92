"""The command line as a user types it: answers on stdout, messages on stderr, exit codes 0, 1 and 2."""

import io
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import hf_layout
import jax
import numpy as np
import pytest
import sounds

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, api
from qwen2audio_jax.cli import chat as chat_module
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.convert import convert
from qwen2audio_jax.generation import encoding, run
from qwen2audio_jax.generation.session import Session

ROOT = Path(__file__).resolve().parent.parent
# What the installed command does, in a checkout too, where convert/ and configs/ stand beside the package.
COMMAND = """
import sys
from qwen2audio_jax.cli import status
from qwen2audio_jax.cli.main import main
status.LOG_SECONDS = 1e6  # on a slow machine lines about what takes long would come in between
sys.exit(main(sys.argv[1:]))
"""
ENVIRONMENT = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), **os.environ, "PYTHONPATH": str(ROOT)}
# Enough for random weights to say something visible.
TALK = ("--max-new-tokens", "12", "--repetition-penalty", "1.3")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf")
    hf_layout.write_hf_checkpoint(folder, "base", seed=6)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    """The same, converted."""
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert(source, folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder of sound files, good and bad."""
    folder = tmp_path_factory.mktemp("clips")
    for kind, rate, channels in (("wav", 16_000, 1), ("flac", 44_100, 2), ("mp3", 24_000, 1)):
        data = sounds.encode(kind, sounds.speech(2 * rate, rate=rate, channels=channels), rate)
        (folder / f"speech.{kind}").write_bytes(data)
    whole = (folder / "speech.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.wav").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "long.wav").write_bytes(sounds.encode("wav", np.full(31 * 16_000, 0.01, np.float32), 16_000))
    (folder / "blip.wav").write_bytes(sounds.encode("wav", np.full(320, 0.01, np.float32), 16_000))
    return folder


def command(*arguments, stdin: str = "", cwd=None, cache=None) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        cwd=cwd,
        env=ENVIRONMENT | ({} if cache is None else {"QWEN2AUDIO_CACHE": str(cache)}),
        timeout=300,
        check=False,
    )


def call(*arguments) -> int:
    """Run the command in this process and return its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def refusal(capsys, *arguments) -> str:
    """The one line that bad input gets."""
    code = call(*arguments)
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    return err


def library_answer(checkpoint, messages, **options) -> tuple[np.ndarray, str]:
    """New ids and text by the Python calls that the README shows."""
    processor = Qwen2AudioProcessor.from_pretrained(checkpoint)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    ids = model.generate(**inputs, max_new_tokens=12, repetition_penalty=1.3, **options)
    ids = ids[0, inputs.input_ids.shape[1] :]
    return ids, processor.decode(ids, skip_special_tokens=True)


def message(text: str | None, *paths) -> dict:
    content = [{"type": "audio", "audio": str(path)} for path in paths]
    content += [] if text is None else [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


CUT = "(cut by the limit of new tokens: --max-new-tokens raises it)\n"
"""What random weights, which never stop by themselves, always end in."""


@pytest.mark.smoke
def test_generate_as_typed(checkpoint, clips):
    """Three formats, rates and channel counts in one prompt, in a process of its own."""
    files = [clips / f"speech.{kind}" for kind in ("wav", "flac", "mp3")]
    options = [part for path in files for part in ("--audio", path)]
    run = command("generate", "--model", checkpoint, *options, *TALK, "Which is the loudest?")
    assert run.returncode == 0, run.stderr
    _, text = library_answer(checkpoint, [message("Which is the loudest?", *files)])
    assert text.strip()
    assert run.stdout.decode() == text + "\n"
    assert run.stderr.decode() == CUT


def test_hugging_face_folder_as_typed(source, checkpoint, clips, tmp_path, capsys):
    """Converted on first use: words about it on stderr, the answer alone on stdout; the second time no words."""
    arguments = ("generate", "--model", source, "--audio", clips / "speech.wav", *TALK, "What is it?")
    first = command(*arguments, cache=tmp_path)
    assert first.returncode == 0, first.stderr
    assert b"converting once" in first.stderr
    _, text = library_answer(checkpoint, [message("What is it?", clips / "speech.wav")])
    assert first.stdout.decode() == text + "\n"
    assert call(*arguments, "--cache-dir", tmp_path) == 0
    assert capsys.readouterr() == (text + "\n", CUT)


def test_convert_as_typed(source, tmp_path, capsys):
    run = command("convert", source, tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == b""
    assert call("generate", "--model", tmp_path / "out", "hello") == 0
    capsys.readouterr()
    assert "qwen2audio convert" in refusal(capsys, "convert", tmp_path / "none", tmp_path / "other")


def test_bad_input_as_typed(checkpoint, clips):
    run = command("generate", "--model", checkpoint, "--audio", clips / "long.wav", "What is it?")
    assert (run.returncode, run.stdout) == (2, b"")
    assert run.stderr.count(b"\n") == 1
    assert b"31 s" in run.stderr
    assert b"30 s" in run.stderr


def test_reader_that_leaves(checkpoint):
    """A pipe that is closed early ends the command without a traceback."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "generate", "--model", str(checkpoint), *TALK, "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=300) == 1
    assert errors == b""


@pytest.mark.smoke
def test_voice_chat(checkpoint, clips, capsys):
    """Without a prompt the clip is the message."""
    assert call("generate", "--model", checkpoint, "--audio", clips / "speech.wav", *TALK) == 0
    _, text = library_answer(checkpoint, [message(None, clips / "speech.wav")])
    assert capsys.readouterr() == (text + "\n", CUT)


def test_json_and_system(checkpoint, clips, capsys):
    wav = clips / "speech.wav"
    arguments = ("--model", checkpoint, "--audio", wav, "--system", "Be brief.", *TALK, "--json", "你好?")
    assert call("generate", *arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    answer = json.loads(out)
    ids, text = library_answer(checkpoint, [{"role": "system", "content": "Be brief."}, message("你好?", wav)])
    assert (answer["ids"], answer["text"]) == (ids.tolist(), text)
    assert (answer["tokens"], answer["finish_reason"]) == (12, "length")
    assert answer["mean_log_prob"] < 0
    assert answer["prompt_tokens"] > 50


def test_each_of_several_files_is_answered_by_itself(checkpoint, clips, capsys):
    paths = [str(clips / name) for name in ("speech.wav", "speech.flac", "missing.wav", "speech.mp3")]
    arguments = ("generate", "--model", checkpoint, "What is said?", *TALK)
    assert call(*arguments, "--each", *paths) == 1
    shown = capsys.readouterr()
    assert "missing.wav" in shown.err
    answers = []
    for path in (paths[0], paths[1], paths[3]):
        assert call(*arguments, "--audio", path) == 0
        answers.append(f"{path}: {capsys.readouterr().out}")
    assert shown.out == "".join(answers)
    assert call(*arguments, "--json", "--each", *paths[:1], *paths[2:3]) == 1
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert (good["audio"], f"{paths[0]}: {good['text']}\n") == (paths[0], answers[0])
    assert bad["error"]["kind"] == "missing"
    for more, said in (
        (("--audio", paths[0]), "give one of them"),
        (("--num-return-sequences", "2", "--do-sample"), "one answer a file"),
        (("--raw",), "into the prompt"),
    ):
        assert said in refusal(capsys, *arguments, "--each", paths[0], *more)
    assert "on standard input" in refusal(capsys, *arguments, "--each", "-")


def test_raw(checkpoint, clips, capsys):
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
    arguments = ("generate", "--model", checkpoint, "--raw", "--audio", clips / "speech.mp3", "--max-length", "100")
    assert call(*arguments, "--json", prompt) == 0
    answer = json.loads(capsys.readouterr().out)
    processor = Qwen2AudioProcessor.from_pretrained(checkpoint)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor(text=prompt, audio=str(clips / "speech.mp3"))
    expected = model.generate(**inputs, max_length=100)[0, inputs.input_ids.shape[1] :]
    assert answer["ids"] == expected.tolist()
    assert answer["prompt_tokens"] + answer["tokens"] == 100
    problem = refusal(capsys, *arguments, "Generate the caption in English:")
    assert "<|audio_bos|><|AUDIO|><|audio_eos|>" in problem
    assert "2 clips" in refusal(capsys, *arguments, "--audio", clips / "speech.wav", prompt)
    assert "--system" in refusal(capsys, *arguments, "--system", "x", prompt)
    assert "no prompt" in refusal(capsys, *arguments)


def test_sampling(checkpoint, capsys):
    arguments = ("generate", "--model", checkpoint, "--max-new-tokens", "8", "--do-sample", "--json", "hello")
    assert call(*arguments, "--seed", "7", "--num-return-sequences", "2") == 0
    first, second = [json.loads(line)["ids"] for line in capsys.readouterr().out.splitlines()]
    assert first != second
    assert call(*arguments, "--seed", "8") == 0
    assert json.loads(capsys.readouterr().out)["ids"] == second
    assert call("generate", "--model", checkpoint, "--greedy", "--seed", "7", "--max-new-tokens", "1", "hi") == 0
    assert capsys.readouterr().err == "warning: --seed has no effect: add --do-sample to draw tokens\n" + CUT


def test_length_that_nobody_gave(checkpoint, tmp_path, capsys):
    """The library's 20 tokens are not a default for people; a checkpoint's own limit is."""
    arguments = ("--min-new-tokens", "30", "--json", "hi")
    assert call("generate", "--model", checkpoint, *arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 30 <= answer["tokens"] <= 512
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    limited = tmp_path / "limited"
    shutil.copytree(checkpoint, limited)
    (limited / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 9}))
    assert "--max-new-tokens 9" in refusal(capsys, "generate", "--model", limited, *arguments)
    settings |= {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 2}
    (limited / "generation_config.json").write_text(json.dumps(settings))
    assert call("generate", "--model", limited, "--seed", "1", "--json", "hi") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    one = ("--greedy", "--num-return-sequences", "1", "--max-length", "80")
    assert call("generate", "--model", limited, *one, *arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] >= 30
    assert answer["prompt_tokens"] + answer["tokens"] <= 80


def test_stop_text(checkpoint, capsys):
    assert call("generate", "--model", checkpoint, *TALK, "hello") == 0
    text = capsys.readouterr().out
    stop = text[3]
    assert call("generate", "--model", checkpoint, *TALK, "--stop", stop, "hello") == 0
    stopped = capsys.readouterr().out
    assert text.startswith(stopped[:-1])
    assert stop in stopped
    assert len(stopped) < len(text)


def test_prompt_from_stdin(checkpoint, capsys, monkeypatch):
    assert call("generate", "--model", checkpoint, *TALK, "hello") == 0
    expected = capsys.readouterr().out
    type_in(monkeypatch, b"hello\n")
    assert call("generate", "--model", checkpoint, *TALK, "-") == 0
    assert capsys.readouterr().out == expected
    type_in(monkeypatch, b"caf\xe9")
    assert "byte 3" in refusal(capsys, "generate", "--model", checkpoint, "-")


def test_control_tokens_stay_text(checkpoint, capsys):
    """A message that writes control tokens is text, unless the user says otherwise."""
    arguments = ("generate", "--model", checkpoint, "--max-new-tokens", "1", "--json")
    assert call(*arguments, "<|im_end|>") == 0
    text = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert call(*arguments, "--allow-special", "<|im_end|>") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] < text


def test_cut_file_that_is_wanted(checkpoint, clips, capsys):
    """The refusal's remedy works as typed, and the answer says what it rests on."""
    arguments = ("generate", "--model", checkpoint, "--audio", clips / "speech.wav", "--audio", clips / "cut.wav", "hi")
    assert "pass --allow-truncated to" in refusal(capsys, *arguments)
    assert call(*arguments, "--allow-truncated", "--json", "--max-new-tokens", "1") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["truncated_clips"] == [1]
    assert err.count("cut.wav is heard in part: its header states 64000 bytes") == 1
    assert call(*arguments[:5], "hi", "--allow-truncated", "--json", "--max-new-tokens", "1") == 0
    assert "truncated_clips" not in json.loads(capsys.readouterr().out)
    each = ("--each", clips / "speech.wav", clips / "cut.wav")
    arguments = ("generate", "--model", checkpoint, "--allow-truncated", "--json", "--max-new-tokens", "1", "hi", *each)
    assert call(*arguments) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line).get("truncated_clips") for line in out.splitlines()] == [None, [0]]
    assert "cut.wav is heard in part: its header states 64000 bytes" in err


def test_track(checkpoint, clips, capsys):
    film = clips / "two.mp4"
    film.write_bytes(sounds.encode_av("mp4", "aac", sounds.speech(24_000, rate=24_000), 24_000, tracks=2))
    arguments = ("generate", "--model", checkpoint, "--audio", film, "--max-new-tokens", "1", "hi")
    assert "--track 0" in refusal(capsys, *arguments)
    assert "no number 2: choose from 0 to 1" in refusal(capsys, *arguments, "--track", "2")
    assert call(*arguments, "--track", "1") == 0


def test_truncation_and_mesh(checkpoint, clips, capsys):
    arguments = ("generate", "--model", checkpoint, *TALK, "hello", "--audio")
    assert call(*arguments, clips / "long.wav", "--truncation", "--mesh", "2x4") == 0
    assert capsys.readouterr().out.strip()


def test_what_is_cut_away_is_said(checkpoint, clips, capsys):
    arguments = ("--model", checkpoint, "--max-new-tokens", "1", "--truncation")
    assert call("generate", *arguments, "hi", "--audio", clips / "long.wav") == 0
    assert "long.wav: its first 30 s are heard, the other 1 s of its 31 s left out" in capsys.readouterr().err
    assert call("generate", *arguments, "hi", "--each", clips / "long.wav", clips / "speech.wav") == 0
    assert capsys.readouterr().err.count("are heard, the other 1 s of its 31 s left out") == 1
    assert call("generate", *arguments, "hi", "--audio", clips / "speech.wav") == 0
    assert "heard" not in capsys.readouterr().err
    assert call("generate", *arguments, "--quiet", "hi", "--audio", clips / "long.wav") == 0
    assert capsys.readouterr().err == ""


def test_stats(checkpoint, clips, capsys):
    arguments = ("generate", "--model", checkpoint, *TALK, "--stats", "--audio", clips / "speech.wav", "What is it?")
    assert call(*arguments) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("loaded in ", "first token after ", "tokens/s", "2 s of sound in ", "times real time"):
        assert part in line
    assert call(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)["stats"]
    assert err == ""
    assert figures["audio_seconds"] == 2.0
    assert figures["times_real_time"] == pytest.approx(2 / figures["answer_seconds"], rel=0.05)
    assert figures["load_seconds"] > 0
    assert 0 < figures["first_token_seconds"] <= figures["answer_seconds"]


def test_an_empty_answer_is_said(checkpoint, capsys, monkeypatch):
    """Once the stop token is what the model would say first, the answer has no text."""
    assert call("generate", "--model", checkpoint, "--json", "--max-new-tokens", "1", "hello") == 0
    [token] = json.loads(capsys.readouterr().out)["ids"]
    stops = {"eos_token_id": token}
    read = api.default_generation
    monkeypatch.setattr(api, "default_generation", lambda *a, **k: read(*a, **k).updated(**stops))
    for options, shown in (((), "\n"), (("--json",), None)):
        assert call("generate", "--model", checkpoint, *options, "hello") == 0
        out, err = capsys.readouterr()
        assert shown in (None, out)
        assert "the answer is empty" in err
        assert call("generate", "--model", checkpoint, *options, "--quiet", "hello") == 0
        assert capsys.readouterr() == (out, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--audio", "{clips}/none.wav", "hi"], ["none.wav", "No such file"]),
        (["--audio", "{clips}/long.wav", "hi"], ["long.wav", "31 s", "30 s", "truncation"]),
        (["--audio", "{clips}/blip.wav", "hi"], ["blip.wav", "320"]),
        (["--audio", "{clips}/cut.wav", "hi"], ["cut.wav", "truncated"]),
        (["--audio", "{clips}/garbage.wav", "hi"], ["garbage.wav"]),
        (["--audio", "{clips}/empty.wav", "hi"], ["empty.wav", "empty"]),
        (["--audio", "{clips}/speech.wav", "--audio", "{clips}/cut.wav", "hi"], ["cut.wav"]),
        (["--audio", "http://127.0.0.1/a.wav", "hi"], ["127.0.0.1"]),
        (["--temperature", "-1", "--do-sample", "hi"], ["temperature", "-1"]),
        (["--temperature", "warm", "hi"], ["--temperature", "warm", "--help"]),
        (["--top-p", "1.5", "hi"], ["--top-p 1.5"]),
        (["--max-new-tokens", "0", "hi"], ["--max-new-tokens 0"]),
        (["--max-new-tokens", "5000", "hi"], ["5000", "2048"]),
        (["--max-new-tokens", "5", "--max-length", "9", "hi"], ["--max-length", "--max-new-tokens"]),
        (["--max-length", "3", "hi"], ["--max-length 3", "prompt"]),
        (["--num-return-sequences", "2", "hi"], ["--num-return-sequences 2", "--do-sample"]),
        (["--do-sample", "--seed", "-5", "hi"], ["seed", "-5"]),
        (["--do-sample", "--greedy", "hi"], ["--greedy", "--do-sample"]),
        (["--stop", "", "hi"], ["empty"]),
        (["--dtype", "int3", "hi"], ["dtype", "int3", "bfloat16"]),
        (["--mesh", "2 by 4", "hi"], ["2 by 4", "--mesh 2x4", "data=2,model=4", "v5e-8"]),
        (["--mesh", "v5e-16", "hi"], ["v5e-16", "16", "8"]),
        (["--mesh", "data=3,model=5", "hi"], ["15", "8"]),
        (["--mesh", "model=16", "hi"], ["16"]),
        (["--revision", "main", "hi"], ["revision", "main"]),
        (["--beams", "4", "hi"], ["--beams"]),
        (["one", "two"], ["two"]),
        ([], ["no prompt", "--audio"]),
        ([""], ["no prompt"]),
        (["half \udcff a character"], ["surrogate"]),
    ],
)
def test_bad_input(checkpoint, clips, capsys, arguments, said):
    arguments = [part.format(clips=clips) for part in arguments]
    problem = refusal(capsys, "generate", "--model", checkpoint, *arguments)
    for part in said:
        assert part in problem


def test_bad_model(tmp_path, checkpoint, capsys):
    assert "nowhere" in refusal(capsys, "generate", "--model", tmp_path / "nowhere", "hi")
    assert str(tmp_path) in refusal(capsys, "generate", "--model", tmp_path, "hi")
    settled = tmp_path / "beams"
    shutil.copytree(checkpoint, settled)
    (settled / "generation_config.json").write_text('{"num_beams": 4}')
    assert "num_beams" in refusal(capsys, "generate", "--model", settled, "hi")


def test_no_command(capsys):
    assert "COMMAND" in refusal(capsys)
    assert "'sing'" in refusal(capsys, "sing")


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("chat", "--help"), ("convert", "--help")])
def test_help(capsys, arguments):
    assert call(*arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: qwen2audio")
    assert err == ""


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == "qwen2audio 0.2.0\n"


def test_failure(checkpoint, capsys, monkeypatch):
    """Failures that are not the user's fault: exit code 1 and one line."""

    def broken(*arguments, **options):
        raise RuntimeError("out of memory\nwhile trying")

    monkeypatch.setattr(Qwen2AudioForConditionalGeneration, "from_pretrained", broken)
    assert call("generate", "--model", checkpoint, "hi") == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "qwen2audio generate: failed: RuntimeError: out of memory while trying\n")


def test_interruption(checkpoint, capsys, monkeypatch):
    """One word; where it came from only when asked."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen2AudioForConditionalGeneration, "from_pretrained", interrupted)
    assert call("generate", "--model", checkpoint, "hi") == 1
    assert capsys.readouterr() == ("", "qwen2audio generate: interrupted\n")
    monkeypatch.setenv("QWEN2AUDIO_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        call("generate", "--model", checkpoint, "hi")


def test_terminal_is_not_commanded(monkeypatch):
    """Control characters in an answer reach a terminal as numbers, and a file as they are."""
    from qwen2audio_jax.cli import output

    for terminal, expected in ((True, "a\\x1b[2Jb\tc\n"), (False, "a\x1b[2Jb\tc\n")):
        stdout = io.StringIO()
        stdout.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stdout", stdout)
        output.write("a\x1b[2Jb\tc\n")
        assert stdout.getvalue() == expected


def type_in(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_chat_as_typed(checkpoint, clips):
    """Several turns, each answered over the whole conversation; a bad clip and a bad command change nothing."""
    lines = [
        "hello",
        "/audio speech.wav",
        "what is it?",
        "/audio none.wav",
        "/sing",
        "/audio 'speech.mp3'",
        "",
        "/quit",
    ]
    run = command("chat", "--model", checkpoint, *TALK, stdin="\n".join(lines) + "\n", cwd=clips)
    assert run.returncode == 0, run.stderr
    history, expected = [], ""
    for turn in (
        message("hello"),
        message("what is it?", clips / "speech.wav"),
        message(None, clips / "speech.mp3"),
    ):
        _, text = library_answer(checkpoint, [*history, turn])
        history += [turn, {"role": "assistant", "content": text}]
        expected += text + "\n"
    assert run.stdout.decode() == expected
    said = [line for line in run.stderr.decode().splitlines() if line != CUT.strip()]
    assert len(said) == 4
    assert said[0].startswith("clip 1: 2.0 s")
    assert "none.wav" in said[1]
    assert "/sing" in said[2]
    assert said[3].startswith("clip 1: ")


def test_chat_computes_each_turn_once(checkpoint, clips, capsys, monkeypatch):
    """Later turns read what is new alone, and encode the clip that they add; the answers are those from scratch."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint)
    read, encoded, answered = [], [], []
    prefill, append, encode, stream = run.prefill, run.append, encoding.encode_audio, Session.stream

    def counting_prefill(params, embeddings, lengths, **more):
        read.append(int(lengths[0]))
        return prefill(params, embeddings, lengths, **more)

    def counting_append(*arguments, counts, **more):
        read.append(int(counts[0]))
        return append(*arguments, counts=counts, **more)

    def counting_encode(params, features, frames, **more):
        encoded.append(int((frames > 0).sum()))
        return encode(params, features, frames, **more)

    def seen(session, *, input_ids, **more):
        text = yield from stream(session, input_ids=input_ids, **more)
        answered.append((input_ids.shape[1], int(session.reused[0])))
        return text

    monkeypatch.setattr(run, "prefill", counting_prefill)
    monkeypatch.setattr(run, "append", counting_append)
    monkeypatch.setattr(encoding, "encode_audio", counting_encode)
    monkeypatch.setattr(Session, "stream", seen)
    monkeypatch.setattr(chat_module, "load_model", lambda options: model)
    questions = [("what is it?", "wav"), ("hello", None), ("what the", "mp3")]
    lines = [line for text, kind in questions for line in ([f"/audio {clips}/speech.{kind}"] if kind else []) + [text]]
    type_in(monkeypatch, "\n".join(lines).encode())
    assert call("chat", "--model", checkpoint, *TALK) == 0
    history, answers = [], capsys.readouterr().out
    assert encoded == [1, 1]
    assert read == [length - reused for length, reused in answered]
    assert answered[0][1] == 0
    for (before, _), (length, reused) in pairwise(answered):
        assert before <= reused < length
    assert max(read[1:]) < read[0]
    expected = ""
    for text, kind in questions:
        history.append(message(text, *([clips / f"speech.{kind}"] if kind else [])))
        _, answer = library_answer(checkpoint, history)
        history.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert answers == expected


class FakeModel:
    """Answers each prompt with fixed pieces, or does what a piece that is an exception says; its own session too."""

    def __init__(self, *answers):
        self.answers, self.prompts, self.sessions = iter(answers), [], []

    def session(self):
        self.sessions.append("open")
        return self

    def close(self):
        self.sessions[-1] = "closed"

    def stream(self, *, input_ids, tokenizer, **options):
        self.prompts.append(tokenizer.decode(input_ids[0]))
        for piece in next(self.answers):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def chat_with(monkeypatch, checkpoint, model: FakeModel, lines: str) -> int:
    monkeypatch.setattr(chat_module, "load_model", lambda options: model)
    type_in(monkeypatch, lines.encode())
    return call("chat", "--model", checkpoint, "--system", "Be kind.")


def test_chat_system_and_reset(checkpoint, capsys, monkeypatch):
    model = FakeModel(["one"], ["two"], ["three"], ["four"])
    lines = "a\n/system Be rude.\nb\n/reset\nc\n/system\n//d\n/help\n"
    assert chat_with(monkeypatch, checkpoint, model, lines) == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\nfour\n"
    assert err == chat_module.HELP + "\n"
    assert model.sessions == ["closed", "open"]

    def said(*turns: tuple[str, str]) -> str:
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return text + "<|im_start|>assistant\n"

    assert model.prompts == [
        said(("system", "Be kind."), ("user", "a")),
        said(("system", "Be rude."), ("user", "a"), ("assistant", "one"), ("user", "b")),
        said(("system", "Be rude."), ("user", "c")),
        said(("system", "You are a helpful assistant."), ("user", "c"), ("assistant", "three"), ("user", "/d")),
    ]


def test_chat_in_json(checkpoint, clips, capsys, monkeypatch):
    model = FakeModel(["on", "e"], ["par", KeyboardInterrupt()])
    monkeypatch.setattr(chat_module, "load_model", lambda options: model)
    type_in(monkeypatch, f"/audio {clips}/speech.wav\na\nb\n".encode())
    assert call("chat", "--model", checkpoint, "--json", "--quiet", "--stats") == 0
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert (first["text"], second["text"], second["finish_reason"]) == ("one", "par", "stopped")
    assert first["stats"]["audio_seconds"] == 2.0
    assert err == " (stopped)\n"


def test_chat_stopped(checkpoint, capsys, monkeypatch):
    """Ctrl-C ends an answer and not the program: what was read stays, a turn without answer goes."""
    model = FakeModel([KeyboardInterrupt()], ["par", KeyboardInterrupt()], ["end"])
    assert chat_with(monkeypatch, checkpoint, model, "a\nb\nc\n") == 0
    out, err = capsys.readouterr()
    assert out == "par\nend\n"
    assert err.splitlines() == ["(stopped; the message is taken back)", " (stopped)"]
    assert "user\na<" not in model.prompts[1]
    assert "assistant\npar<|im_end|>" in model.prompts[2]


def test_chat_refusals(checkpoint, clips, capsys, monkeypatch):
    """Lines that cannot be done are told one by one; what was said and added before stays."""
    model = FakeModel(["one"], [ValueError("too long")], ["two"])
    audio = [f"/audio {clips}/{name}" for name in ("speech.wav", "long.wav", "speech.mp3")]
    lines = "\n".join(["/adio", "a", audio[0], "b", "/audio", audio[1], "/quit now", "", audio[2], ""])
    assert chat_with(monkeypatch, checkpoint, model, lines) == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    said = err.splitlines()
    for line, part in zip(
        said,
        ("did you mean /audio?", "clip 1", "too long", "/audio needs", "31 s", "/quit now", "clip 1", "1 clip"),
        strict=True,
    ):
        assert part in line
    assert "user\nb" not in model.prompts[2]
    assert "Audio 1: " in model.prompts[2]


@pytest.fixture
def compiled_anew():
    """Programs that were compiled and stored by older code lack newer scopes, which are no part of their key."""
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.usefixtures("compiled_anew")
def test_profile(checkpoint, clips, tmp_path, capsys, monkeypatch):
    """The trace names the stages and their layers, for one prompt and for a conversation."""
    folder = tmp_path / "new" / "traces"
    options = ("--model", checkpoint, "--max-new-tokens", "3", "--profile")
    assert call("generate", *options, folder, "--audio", clips / "speech.wav", "What?") == 0
    assert f"profile: {folder}" in capsys.readouterr().err
    (trace,) = folder.rglob("*.xplane.pb")
    scopes = ("encode/encoder_layer_0/", "prefill/decoder_layer_1/", "decode_step/", "sample/")
    said = trace.read_bytes()
    assert all(f"/{scope}".encode() in said for scope in scopes)
    type_in(monkeypatch, b"Hello\n")
    assert call("chat", *options, tmp_path / "chat") == 0
    (trace,) = (tmp_path / "chat").rglob("*.xplane.pb")
    assert b"/decode_step/" in trace.read_bytes()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    for command in "generate", "chat":
        said = refusal(capsys, command, *options, tmp_path / "file" / "traces", *["What?"] * (command == "generate"))
        assert f"--profile {tmp_path / 'file' / 'traces'}: Not a directory; name a folder that can be written" in said


def test_chat_not_utf8(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(chat_module, "load_model", lambda options: FakeModel(["one"]))
    type_in(monkeypatch, b"a\ncaf\xe9\n")
    assert call("chat", "--model", checkpoint) == 2
    out, err = capsys.readouterr()
    assert out == "one\n"
    assert "line 2" in err


@pytest.mark.parametrize(("given", "used"), [(None, "false"), ("true", "true")])
def test_a_gpus_memory_is_not_reserved_unless_asked_for(monkeypatch, given, used):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # restored at the end
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    if given:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", given)
    assert main(["evaluate"]) == 2
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == used
