"""The embedded model and its clips: complete, small, loaded without warnings, and the reference's text."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from qwen2audio_jax import (
    Qwen2AudioConfig,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    embedded,
    source,
)
from qwen2audio_jax.checkpoint.reader import is_checkpoint
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.cli.options import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parent.parent
TRANSCRIBE = "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|en|>"
QUESTIONS = ("How many digits are spoken?", "Is this speech, a tone or noise?", None)
"""None: the clip alone is the message."""
LEFT = {"padding": True, "padding_side": "left"}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Qwen2AudioForConditionalGeneration:
    return Qwen2AudioForConditionalGeneration.from_pretrained(cache_dir=tmp_path_factory.mktemp("cache"))


def conversions(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if is_checkpoint(path)]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """The state of a folder, which changes when it is written to."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_what_the_package_carries():
    folder = embedded.model_folder()
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    files = [path for path in embedded.FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    config = Qwen2AudioConfig.from_pretrained(folder)
    assert (config.audio_config.num_mel_bins, config.audio_config.max_source_positions) == (128, 1500)
    for name in ("README.md", "training.json"):
        text = (folder / name).read_text()
        assert not [word for word in ("/work/", "/tmp/", "/home/", "/root/") if word in text]
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_examples():
    clips = embedded.examples()
    assert len(clips) >= 3
    assert {path.suffix for path in (embedded.FOLDER / "examples").iterdir()} == {".wav"}
    for path in clips:
        about = soundfile.info(path)
        assert (about.samplerate, about.channels) == (16000, 1)
        assert 0.3 < about.duration < 30
        assert embedded.example(path.stem) == path
    with pytest.raises(ValueError, match=f"there is no example 'nothing'; there are: {clips[0].stem}, "):
        embedded.example("nothing")


def test_loads_without_a_path_and_converts_once(cache, capfd):
    before = state(embedded.FOLDER)
    loaded = Qwen2AudioForConditionalGeneration.from_pretrained()
    (place,) = conversions(cache)
    assert place.name.startswith("embedded-speech-")
    assert "converting once into" in capfd.readouterr().err
    written = state(place)
    again = Qwen2AudioForConditionalGeneration.from_pretrained()
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    encoder = Qwen2AudioEncoder.from_pretrained()
    jax.tree.map(np.testing.assert_array_equal, encoder.params, loaded.params["encoder"])
    processor = Qwen2AudioProcessor.from_pretrained()
    assert processor.tokenizer.encode("three")
    assert conversions(cache) == [place]
    assert state(place) == written
    assert capfd.readouterr().err == ""
    assert {k: v for k, v in state(embedded.FOLDER).items() if "__pycache__" not in k} == {
        k: v for k, v in before.items() if "__pycache__" not in k
    }
    limited = Qwen2AudioForConditionalGeneration.from_pretrained(dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(limited.params)} == {"bfloat16"}
    assert conversions(cache) == [place]


def test_every_installation_shares_one_conversion(cache, tmp_path, monkeypatch, capfd):
    """Told by what the files hold: neither their place nor their age counts."""
    first = source.resolve_checkpoint(source.EMBEDDED)
    shutil.copytree(embedded.FOLDER, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    monkeypatch.setattr(embedded, "FOLDER", tmp_path / "elsewhere")
    assert source.resolve_checkpoint(source.EMBEDDED) == first
    file = tmp_path / "elsewhere" / "speech" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 5}))
    assert source.resolve_checkpoint(source.EMBEDDED) != first


@pytest.mark.slow(seconds=9)
def test_two_processes_at_once(cache):
    code = "from qwen2audio_jax import source; print(source.resolve_checkpoint(source.EMBEDDED))"
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": places}
    command = [sys.executable, "-c", f"import conftest; {code}"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    (place,) = conversions(cache)
    assert {out.strip() for out, _ in results} == {str(place)}
    assert sum("converting once into" in err for _, err in results) == 1


def test_a_package_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    for load in (Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, Qwen2AudioEncoder):
        with pytest.raises(ValueError, match="built without the embedded model; install the whole package"):
            load.from_pretrained()
    with pytest.raises(ValueError, match="there are: none in this copy"):
        embedded.example("x")


def test_it_has_no_revisions():
    for load in (Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor):
        with pytest.raises(ValueError, match="revision 'main' goes with a hub id, but the model is the embedded one"):
            load.from_pretrained(revision="main")


def test_command_line_without_a_model(cache, capfd):
    clip = embedded.examples()[0]
    assert (
        main(["generate", "--audio", f"example:{clip.stem}", "--max-new-tokens", "32", "How many digits are spoken?"])
        == 0
    )
    out, err = capfd.readouterr()
    assert out.strip()
    assert [line for line in err.splitlines() if "demonstration model answers; --model names another" in line]
    assert main(["generate", "--audio", str(clip), "--max-new-tokens", "32", "How many digits are spoken?"]) == 0
    assert capfd.readouterr().out == out
    assert main(["generate", "--audio", "example:none", "What?"]) == 2
    assert "there is no example 'none'; there are: " in capfd.readouterr().err
    assert main(["generate", "--revision", "main", "What?"]) == 2
    assert "the model is the embedded one" in capfd.readouterr().err


def test_chat_without_a_model(cache, capfd, monkeypatch):
    clip = embedded.examples()[0]
    lines = f"/audio example:{clip.stem}\nHow many digits are spoken?\n/audio example:none\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["chat", "--max-new-tokens", "32"]) == 0
    out, err = capfd.readouterr()
    assert out.strip()
    for said in ("demonstration model answers", "it goes with the next message", "there is no example 'none'"):
        assert said in err


def test_help_names_the_examples(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines break within names too
    assert "example:NAMEisoneofthepackage's:" + ",".join(path.stem for path in embedded.examples()) in text
    assert DEFAULT_MODEL == source.EMBEDDED


@pytest.mark.parametrize("some", [slice(2), pytest.param(slice(2, None), marks=pytest.mark.slow(seconds=12))], ids=str)
def test_transformers_gives_the_same_greedy_text_on_every_clip(model, some):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = embedded.model_folder()
    theirs, info = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    their_processor = transformers.AutoProcessor.from_pretrained(folder)
    processor = Qwen2AudioProcessor.from_pretrained()
    for path in embedded.examples()[some]:
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == their_processor.feature_extractor.sampling_rate
        texts, audio = [TRANSCRIBE], [samples] * (1 + len(QUESTIONS))
        for question in QUESTIONS:
            content = [{"type": "audio", "audio": samples}]
            content += [{"type": "text", "text": question}] if question else []
            chat = [{"role": "user", "content": content}]
            texts.append(their_processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
            assert processor.apply_chat_template(chat, add_generation_prompt=True) == texts[-1]
        inputs = their_processor(text=texts, audio=audio, sampling_rate=rate, return_tensors="pt", **LEFT)
        with torch.no_grad():
            expected = theirs.eval().generate(**inputs, max_new_tokens=32)
        expected = their_processor.batch_decode(expected[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        inputs = processor(text=texts, audio=audio)
        actual = model.generate(**inputs, max_new_tokens=32)[:, inputs.input_ids.shape[1] :]
        assert processor.batch_decode(actual, skip_special_tokens=True) == expected, path.name
