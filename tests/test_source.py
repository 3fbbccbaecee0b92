"""Sources: Orbax checkpoints, folders and hub ids, each converted once into the cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hf_layout
import jax
import pytest
import tiny

from qwen2audio_jax import Qwen2AudioEncoder, Qwen2AudioForConditionalGeneration
from qwen2audio_jax.checkpoint.reader import MARKER, is_checkpoint, read_manifest, restore_params
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.convert import verify
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.source import default_cache_dir, resolve_checkpoint, resolve_processor_files
from qwen2audio_jax.storage import hub

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)


@pytest.fixture
def hf(tmp_path) -> Path:
    hf_layout.write_hf_checkpoint(tmp_path / "my model", "tied", naming="old")
    return tmp_path / "my model"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def conversions(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_folder_is_converted_once(hf, cache, capfd):
    place = resolve_checkpoint(hf)
    assert place.parent == cache
    assert place.name.startswith("my--model-")
    assert "converting once into" in capfd.readouterr().err
    manifest = (place / "manifest.json").stat()
    assert resolve_checkpoint(str(hf)) == place
    assert capfd.readouterr().err == ""
    assert (place / "manifest.json").stat().st_mtime_ns == manifest.st_mtime_ns
    assert resolve_checkpoint(place) == place
    assert conversions(cache) == [place]
    config = Qwen2AudioConfig.from_pretrained(place)
    assert jax.tree.leaves(restore_params(place, specs=parameter_specs(config)))
    for name in SETTINGS[1:]:
        assert (place / name).read_bytes() == (hf / name).read_bytes()


def test_sharded_folder(tmp_path, cache):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", shards=3)
    assert is_checkpoint(resolve_checkpoint(tmp_path / "hf"))


def test_changed_weights_are_converted_anew(hf, cache, capfd):
    first = resolve_checkpoint(hf)
    capfd.readouterr()
    hf_layout.write_tensors(hf, hf_layout.random_tensors(tiny.CONFIGS["tied"], seed=99))
    second = resolve_checkpoint(hf)
    assert second != first
    assert f"{first}: from an earlier state of the same source; qwen2audio models removes it" in capfd.readouterr().err
    assert verify(hf, second) == []
    assert [(place / "params").is_symlink() for place in conversions(cache)] == [False, False]


def touch(folder):
    for file in folder.iterdir():
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))


def edit(name, **changes):
    def change(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **changes}))

    return change


def another_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def replaced_by_a_copy(folder):
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copy)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def without_a_settings_file(folder):
    (folder / "generation_config.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        touch,
        another_template,
        edit("generation_config.json", max_new_tokens=7),
        edit("tokenizer_config.json", padding_side="right"),
        edit("config.json", unsloth_version="2026.4.2"),
        replaced_by_a_copy,
        without_a_settings_file,
    ],
)
def test_what_is_not_weights_converts_nothing_again(hf, cache, made, change, capfd):
    first = resolve_checkpoint(hf)
    made.clear()
    change(hf)
    second = resolve_checkpoint(hf)
    assert made == []
    assert f"its weights were converted before, into {first}" in capfd.readouterr().err
    assert (second / "params").resolve() == first / "params"
    assert verify(hf, second) == []
    for path in hf.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (second / path.name).read_bytes() == path.read_bytes()
    assert not (second / "generation_config.json").exists() or (hf / "generation_config.json").exists()
    config = Qwen2AudioConfig.from_pretrained(second)
    assert jax.tree.leaves(restore_params(second, specs=parameter_specs(config)))
    assert resolve_checkpoint(hf) == second
    assert (resolve_checkpoint(hf), made) == (second, [])


def test_a_copy_of_another_name_shares_the_weights(hf, cache, made, tmp_path):
    first = resolve_checkpoint(hf)
    made.clear()
    shutil.copytree(hf, tmp_path / "other")
    second = resolve_checkpoint(tmp_path / "other")
    assert made == []
    assert second.name.startswith("other-")
    assert (second / "params").resolve() == first / "params"
    # Without the first there are no weights: they are converted, and what linked to them is made anew.
    shutil.rmtree(first)
    assert resolve_checkpoint(tmp_path / "other") == second
    assert made
    assert not (second / "params").is_symlink()


def test_settings_that_would_be_refused_are_so_before_weights_are_converted(hf, cache, made):
    load = Qwen2AudioForConditionalGeneration.from_pretrained
    good = (hf / "generation_config.json").read_text()
    edit("generation_config.json", typical_p=0.9)(hf)
    with pytest.raises(ValueError, match=r"typical_p=0\.9 is not supported") as refusal:
        load(hf)
    assert str(refusal.value).startswith(f"{hf / 'generation_config.json'}: ")
    assert made == []
    assert not cache.exists()
    (hf / "generation_config.json").write_text(good)
    load(hf)
    made.clear()
    edit("generation_config.json", num_beams=4)(hf)
    with pytest.raises(ValueError, match=r"my model/generation_config\.json: num_beams=4 is not supported"):
        load(hf)
    edit("generation_config.json", num_beams=1)(hf)
    edit("config.json", attention_scale=2.0)(hf)
    with pytest.raises(ValueError, match=r"my model/config\.json: attention_scale is 2\.0"):
        load(hf)
    assert made == []


def test_what_generates_nothing_needs_no_generation_settings(hf, cache):
    edit("generation_config.json", typical_p=0.9)(hf)
    assert Qwen2AudioEncoder.from_pretrained(hf).params
    with pytest.raises(ValueError, match=r"my model/generation_config\.json: typical_p=0.9"):
        Qwen2AudioForConditionalGeneration.from_pretrained(hf)


def test_cache_dir(hf, tmp_path, monkeypatch):
    assert resolve_checkpoint(hf, cache_dir=tmp_path / "here").parent == tmp_path / "here"
    monkeypatch.delenv("QWEN2AUDIO_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "qwen2audio_jax"


def test_cache_that_cannot_be_written(hf, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"the cache folder cannot be written .*QWEN2AUDIO_CACHE"):
        resolve_checkpoint(hf, cache_dir=tmp_path / "ro")


def test_what_is_no_source(tmp_path, hf, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, message in (
        (tmp_path / "none", "no such folder, nor a hub id of the form owner/name; give"),
        ("none", "no such folder, nor a hub id"),
        ("a/b/c", "no such folder, nor a hub id"),
        ("../b", "no such folder, nor a hub id"),
        ("", "the path is empty"),
        ("a" * 300, r"'a{80}' is no path \(300 characters are too many\)"),
        ("a/" * 3000, r"is no path \(6000 characters are too many\)"),
        ("a\0b", r"'a\\x00b' is no path \(embedded null byte\)"),
        (tmp_path, r"holds neither an Orbax checkpoint \(manifest.json\) nor a Hugging Face one"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_checkpoint(source)
    with pytest.raises(ValueError, match="nor a hub id"):
        resolve_processor_files(tmp_path / "none")
    for resolve in (resolve_checkpoint, resolve_processor_files):
        with pytest.raises(ValueError, match=r"revision 'main' goes with a hub id, but .* is a local folder"):
            resolve(hf, revision="main")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights are pickled"):
        resolve_checkpoint(hf)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / MARKER).touch()
    with pytest.raises(ValueError, match="holds an unfinished checkpoint"):
        resolve_checkpoint(unfinished)


def test_failed_conversion_leaves_nothing(hf, cache):
    config = json.loads((hf / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 60
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="misshapen"):
        resolve_checkpoint(hf)
    assert conversions(cache) == []


def test_processor_files_of_a_folder(hf):
    assert resolve_processor_files(hf) == hf
    assert resolve_processor_files(str(hf)) == hf


CONVERT = """
import os, sys, time
sys.path.insert(0, {root!r})
import qwen2audio_jax
qwen2audio_jax.__path__.append({root!r})
from qwen2audio_jax.convert import convert_tensor
from qwen2audio_jax.source import resolve_checkpoint
read_parameter = convert_tensor.read_parameter
def read(*args, **kwargs):
    os.write(1, b"reading\\n")  # at once, or two threads would mix their lines
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
    return read_parameter(*args, **kwargs)
convert_tensor.read_parameter = read
print(resolve_checkpoint({source!r}))
"""


def start(source: Path, *, gate: Path) -> subprocess.Popen:
    """A process that converts, but stands still within it until the file `gate` exists."""
    code = CONVERT.format(root=str(ROOT), source=str(source), gate=str(gate))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow(seconds=10)
def test_two_processes_convert_once(hf, cache, tmp_path):
    first = start(hf, gate=tmp_path / "gate")
    assert first.stdout.readline() == "reading\n"
    second = start(hf, gate=tmp_path / "gate")
    assert "another process is converting it; waiting" in second.stderr.readline()
    (tmp_path / "gate").touch()
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert "reading" not in outputs[1][0]
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert len(conversions(cache)) == 1


def test_killed_conversion_is_done_again_and_tidied(hf, cache, tmp_path):
    process = start(hf, gate=tmp_path / "gate")
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = conversions(cache)
    assert (partial / MARKER).exists()
    stale = partial.with_name(partial.name[:-12] + "0" * 12)
    shutil.copytree(partial, stale)
    assert resolve_checkpoint(hf) == partial
    assert conversions(cache) == [partial]
    assert is_checkpoint(partial)


# The hub, from its own cache: HF_HUB_OFFLINE is set for all tests.


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def add_to_hub_cache(folder: Path, cache: Path, repo_id: str, commit: str, *, ref: str = "main") -> Path:
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    for file in folder.iterdir():
        blob = f"{commit[:4]}{file.name}"
        shutil.copy(file, repo / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot


def test_hub_id(hf, cache, hub_cache, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = add_to_hub_cache(hf, hub_cache, "owner/name", commit)
    place = resolve_checkpoint("owner/name")
    assert place.name.startswith("owner--name-")
    assert read_manifest(place)["parameters"]
    assert resolve_checkpoint("owner/name", revision="main") == place
    assert resolve_checkpoint("owner/name", revision=commit) == place
    assert resolve_processor_files("owner/name") == snapshot
    (snapshot / "model.safetensors").unlink()
    assert resolve_checkpoint("owner/name") == place  # converted: the weights need not stay in the hub's cache
    hf_layout.write_hf_checkpoint(tmp_path / "other", "tied", seed=1)
    other = "1123456789abcdef0123456789abcdef01234567"
    add_to_hub_cache(tmp_path / "other", hub_cache, "owner/name", other, ref="v2")
    assert resolve_checkpoint("owner/name", revision="v2") != place


def test_hub_id_that_is_not_there(cache, hub_cache):
    for resolve in (resolve_checkpoint, resolve_processor_files):
        with pytest.raises(
            ValueError, match=r"owner/name@v1: no such folder, and the hub did not give it .*HF_HUB_OFFLINE"
        ):
            resolve("owner/name", revision="v1")


def test_command_takes_a_hub_id(hf, hub_cache, tmp_path):
    from qwen2audio_jax.convert import convert

    add_to_hub_cache(hf, hub_cache, "owner/name", "0" * 40)
    convert("owner/name", tmp_path / "orbax", revision="main")
    assert is_checkpoint(tmp_path / "orbax")


def test_hub_id_without_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub: .*pip install .*\[hub\]"):
        resolve_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("owner/name", True),
        ("Qwen/Qwen2-Audio-7B", True),
        ("name", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./a", False),
        ("a b/c", False),
    ],
)
def test_hub_id_form(text, is_id):
    assert hub.is_hub_id(text) == is_id
    assert not hub.is_hub_id(Path(text))
