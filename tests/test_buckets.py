"""Folders in buckets, for which fsspec's in-memory file system stands: read by ranges, copied, refused by name."""

import json
import sys
from collections import Counter
from pathlib import Path

import fsspec
import hf_layout
import jax
import numpy as np
import pytest
from adapters import config_of, random_adapter, settings_of
from fsspec.implementations.memory import MemoryFileSystem
from object_store import BUCKET, Store, assert_loads_nowhere, objects, put, staged
from prompts import random_inputs
from safetensors.numpy import load_file
from test_convert import memory_gb

from qwen2audio_jax import Qwen2AudioEncoder, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.checkpoint import download_checkpoint, ranges
from qwen2audio_jax.checkpoint.adapter import save_adapter
from qwen2audio_jax.checkpoint.bounded_pool import request_bytes
from qwen2audio_jax.checkpoint.reader import MANIFEST, check_files, is_checkpoint, read_manifest
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, export, inspect, to_orbax, verify
from qwen2audio_jax.convert.list_checkpoint import as_table
from qwen2audio_jax.source import resolve_checkpoint
from qwen2audio_jax.storage import bucket

pytestmark = pytest.mark.usefixtures("object_store")


@pytest.mark.parametrize("scheme", ["memory", "store"])
def test_there_and_back(layouts, tmp_path, scheme):
    hf, orbax, back = (f"{scheme}://bucket/{name}" for name in ("hf", "orbax", "back"))
    put(layouts / "hf", hf)
    assert convert(hf, orbax)
    assert staged(tmp_path) == []
    assert verify(hf, orbax) == verify(layouts / "hf", orbax) == verify(hf, layouts / "orbax") == []
    manifest = read_manifest(orbax)
    check_files(bucket.folder_at(orbax), listed=manifest["files"])
    assert manifest["source"]["source"] == hf
    assert inspect(orbax)["parameters"] == inspect(layouts / "orbax")["parameters"]
    export(orbax, back)
    export(orbax, tmp_path / "back")
    export(layouts / "orbax", f"{back}2")
    expected = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in hf_tensors(layouts / "hf").items():
        assert expected[name].tobytes() == tensor.tobytes()
    there = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert objects(back) == objects(f"{back}2") == there
    assert staged(tmp_path) == []


def hf_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_local_to_bucket_is_what_local_to_local_is(layouts):
    convert(layouts / "hf", BUCKET)
    ours, theirs = read_manifest(BUCKET), read_manifest(layouts / "orbax")
    assert {**ours, "files": None} == {**theirs, "files": None}
    beside = {path.name for path in (layouts / "orbax").iterdir() if path.is_file()}
    assert objects().keys() == ours["files"].keys() | beside
    assert Store.sent[-1] == "/bucket/manifest.json"
    assert Counter(Store.sent).most_common(1)[0][1] == 1


def test_models_load_from_urls(layouts, tmp_path, capfd):
    inputs = random_inputs("gqa", seed=3)
    at_home = Qwen2AudioForConditionalGeneration.from_pretrained(layouts / "orbax")
    expected = at_home(**inputs).logits
    encoder_at_home = Qwen2AudioEncoder.from_pretrained(layouts / "orbax")
    hf, orbax = put(layouts / "hf", "memory://a/hf"), put(layouts / "orbax", "memory://a/orbax")
    for url, what in ((hf, "converting once into"), (orbax, "copying once into")):
        assert what in load(url, inputs, expected, capfd)
        assert load(url, inputs, expected, capfd) == ""  # from the cache
        encoder = Qwen2AudioEncoder.from_pretrained(url)
        jax.tree.map(np.testing.assert_array_equal, encoder.params, encoder_at_home.params)
        processor = Qwen2AudioProcessor.from_pretrained(url)
        assert processor.tokenizer.to_json() == Qwen2AudioProcessor.from_pretrained(layouts / "hf").tokenizer.to_json()
    # Another state of the same source with the same weights.
    put(layouts / "hf", hf)
    assert "its weights were converted before" in load(hf, inputs, expected, capfd)
    for url in (hf, orbax):
        with pytest.raises(ValueError, match=r"revision 'main' goes with a hub id, but memory://.* is a bucket's URL"):
            resolve_checkpoint(url, revision="main")


def load(url: str, inputs, expected, capfd) -> str:
    model = Qwen2AudioForConditionalGeneration.from_pretrained(url)
    np.testing.assert_array_equal(model(**inputs).logits, expected)
    return capfd.readouterr().err


def test_adapters_load_from_urls(layouts, tmp_path):
    settings, config = settings_of(), config_of("gqa")
    adapter = random_adapter("gqa", settings)
    save_adapter(tmp_path / "adapter", adapter, settings=settings, config=config, base_model="x")
    url = put(tmp_path / "adapter", "memory://a/adapter")
    convert(layouts / "hf", tmp_path / "a", adapter=tmp_path / "adapter")
    assert convert(layouts / "hf", BUCKET, adapter=url)
    assert verify(layouts / "hf", BUCKET, adapter=url) == []
    assert inspect(BUCKET)["parameters"] == inspect(tmp_path / "a")["parameters"]
    ours, theirs = (
        Qwen2AudioForConditionalGeneration.from_pretrained(layouts / "orbax", adapter=place).params
        for place in (url, tmp_path / "adapter")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_tensors_are_read_by_ranges(layouts, tmp_path, monkeypatch):
    """No request is long, no byte is asked for twice, and nothing is written on the way but the result."""
    monkeypatch.setattr(to_orbax, "request_bytes", lambda memory_gb: 1000)
    put(layouts / "hf", BUCKET)
    convert(BUCKET, tmp_path / "a")
    assert verify(layouts / "hf", tmp_path / "a") == []
    weights = [each for each in Store.asked if each[0].endswith(".safetensors")]
    assert max(length for _, _, length in weights) == 1000
    assert sum(length for _, _, length in weights) == sum(
        path.stat().st_size for path in (layouts / "hf").glob("*.safetensors")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_requests_are_long_where_memory_allows():
    assert request_bytes(2.0) == ranges.REQUEST_BYTES
    assert request_bytes(0.5) < ranges.REQUEST_BYTES
    assert request_bytes(0.1) == 1 << 18


# What is refused.


def test_urls_that_are_none(layouts, tmp_path, monkeypatch):
    for url, message in (
        ("memry://a/b", "fsspec knows no scheme 'memry'"),
        ("gs://", "is no URL of a bucket"),
        ("s3:///a", "is no URL of a bucket"),
        ("simplecache::memory://a", "is no URL of a bucket"),
        ("https://huggingface.co/Qwen/Qwen2-Audio-7B", "is a web address, which has no listing"),
        ("file:///tmp", "is a local folder: give its path"),
        (Path("gs://bucket/a"), "a path, made from a URL it seems; give the URL itself"),
        ("memory://nowhere", "there is no such folder, nor such a bucket"),
    ):
        for use in (resolve_checkpoint, Qwen2AudioProcessor.from_pretrained, lambda url: convert(url, tmp_path / "x")):
            with pytest.raises(ValueError, match=message):
                use(url)
        if "nowhere" not in str(url):
            with pytest.raises(ValueError, match=message):
                convert(layouts / "hf", url)
    assert command.main(["memry://a", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


def test_without_the_extra(monkeypatch):
    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec, "get_filesystem_class", missing)
        with pytest.raises(ValueError, match=r"gs:// needs a package \(Please install gcsfs.*\[buckets\]'"):
            resolve_checkpoint("gs://bucket/a")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"buckets need fsspec: .*pip install .*\[buckets\]"):
        resolve_checkpoint("gs://bucket/a")


class DefaultCredentialsError(Exception):
    pass


def test_credentials_and_buckets_that_are_missing(layouts, tmp_path, monkeypatch):
    def fail(error):
        def ls(self, path, **options):
            raise error

        return ls

    with monkeypatch.context() as patch:
        patch.setattr(Store, "ls", fail(DefaultCredentialsError("no default credentials were found")))
        for run in (lambda: resolve_checkpoint(BUCKET), lambda: convert(layouts / "hf", BUCKET)):
            with pytest.raises(ValueError, match="cannot be listed: no default credentials were found; check the URL"):
                run()
        patch.setattr(Store, "ls", fail(FileNotFoundError("bucket")))
        patch.setattr(Store, "root_marker", "")
        patch.setattr(Store, "_strip_protocol", classmethod(lambda cls, path: path.removeprefix("store://")))
        with pytest.raises(ValueError, match="there is no bucket 'bucket'; check its name, or make it"):
            convert(layouts / "hf", f"{BUCKET}/a")
        patch.setattr(Store, "ls", fail(ConnectionError("reset by peer")))
        with pytest.raises(OSError, match="cannot be listed, tried 1 times: reset by peer"):
            resolve_checkpoint(BUCKET)
    assert staged(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'}, "only plain names of files"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, "b.safetensors: no such object"),
        ({"model-00001-of-00003.safetensors": b"\xff" * 64}, "states a header of"),
        ({"model-00001-of-00003.safetensors": (2**40).to_bytes(8, "little") + b"{}"}, "states a header of"),
        ({"model-00001-of-00003.safetensors": b""}, "too few for a header"),
        ({"model.safetensors.index.json": None, "pytorch_model.bin": b"x"}, "its weights are pickled"),
        ({"model.safetensors.index.json": None}, "holds neither model.safetensors nor"),
        ({"config.json": None}, "config.json: no such object"),
        ({"config.json": b"{"}, "config.json"),
        ({"tokenizer.json": b" " * ((64 << 20) + 1)}, "at most"),
    ],
)
def test_hostile_sources(layouts, tmp_path, change, message):
    put(layouts / "hf", "memory://bad")
    fs = MemoryFileSystem()
    for name, content in change.items():
        fs.rm_file(f"/bad/{name}") if content is None else fs.pipe_file(f"/bad/{name}", content)
    with pytest.raises(ValueError, match=message):
        convert("memory://bad", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_source_that_changes(layouts, tmp_path):
    """Before a conversion goes on, its bytes tell; while it reads, the objects' own notes do."""
    put(layouts / "hf", BUCKET)

    def stop_at(share):
        def stop(done, total):
            if done > share * total:
                raise OSError("disk on fire")

        return stop

    def rewrite(done, total):
        if done > total // 2 and not changed:
            changed.append(put(layouts / "hf", BUCKET))

    options = {"memory_gb": memory_gb(60_000)}
    with pytest.raises(OSError, match="disk on fire"):
        convert(BUCKET, tmp_path / "a", on_progress=stop_at(0.5), **options)
    put(layouts / "hf", BUCKET)  # written again, the same bytes
    with pytest.raises(OSError, match="disk on fire"):
        convert(BUCKET, tmp_path / "a", on_progress=stop_at(0.8), **options)
    hf_layout.write_hf_checkpoint(tmp_path / "other", "gqa", naming="old", dtype="bfloat16", shards=3, seed=9)
    put(tmp_path / "other", BUCKET)
    with pytest.raises(ValueError, match=r"is not what it was when the conversion into .* began"):
        convert(BUCKET, tmp_path / "a", **options)
    put(layouts / "hf", BUCKET)
    assert convert(BUCKET, tmp_path / "a", **options)
    assert verify(BUCKET, tmp_path / "a") == []
    changed = []
    with pytest.raises(ValueError, match="was changed while it was read"):
        convert(BUCKET, tmp_path / "b", on_progress=rewrite, **options)
    assert not (tmp_path / "b").exists()


# Copies of checkpoints.


def test_stopped_copy_goes_on(layouts, tmp_path, monkeypatch):
    put(layouts / "orbax", BUCKET)
    monkeypatch.setattr(download_checkpoint, "_THREADS", 1)
    monkeypatch.setattr(download_checkpoint, "REQUEST_BYTES", 1000)
    cat_file = Store.cat_file

    def fail(self, path, start=None, end=None, **options):
        if len(Store.asked) > 40:
            raise OSError("connection lost")
        return cat_file(self, path, start, end, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "cat_file", fail)
        with pytest.raises(OSError, match="cannot be read, tried 1 times: connection lost"):
            resolve_checkpoint(BUCKET)
    (place,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert not is_checkpoint(place)
    whole = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json"} <= whole
    Store.asked.clear()
    assert resolve_checkpoint(BUCKET) == place
    assert max(length for path, _, length in Store.asked if not path.endswith(MANIFEST)) <= 1000
    assert not any(path.endswith("tokenizer.json") for path, _, _ in Store.asked)
    assert verify(layouts / "hf", place) == []
    assert not [path for path in place.rglob(".*")]


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "params/../../escaped", "a\\b"])
def test_copy_stays_in_its_folder(layouts, tmp_path, name):
    put(layouts / "orbax", BUCKET)
    manifest = json.loads((layouts / "orbax" / MANIFEST).read_text())
    Store().pipe_file("/bucket/manifest.json", json.dumps({**manifest, "files": {name: 1}}).encode())
    with pytest.raises(ValueError, match=r"names the file .*; only files within it are copied"):
        resolve_checkpoint(BUCKET)
    assert not any("escaped" in path.name for path in tmp_path.rglob("*"))


def test_incomplete_checkpoint_in_a_bucket(layouts):
    put(layouts / "orbax", BUCKET)
    name = next(iter(read_manifest(BUCKET)["files"]))
    Store().rm_file(f"/bucket/{name}")
    with pytest.raises(ValueError, match=rf"damaged or not copied whole; copy or convert it again:\s+missing {name}"):
        resolve_checkpoint(BUCKET)
    Store().rm_file("/bucket/manifest.json")
    assert_loads_nowhere(BUCKET)


def test_commands(layouts, tmp_path, capfd):
    """As a user types them, in this process: another one's memory is not this one's."""
    hf, orbax, back = "memory://a/hf", "memory://a/orbax", "memory://a/back"
    put(layouts / "hf", hf)
    for arguments in (
        [hf, orbax, "--quiet"],
        ["verify", hf, orbax, "--quiet"],
        ["export", orbax, back, "--quiet", "--staging", str(tmp_path / "disk")],
    ):
        assert command.main(arguments) == 0
        assert capfd.readouterr().out == ""
    assert command.main(["inspect", orbax]) == 0
    assert capfd.readouterr().out == f"{as_table(inspect(layouts / 'orbax'))}\n"
    assert command.main(["verify", back, orbax]) == 0
    assert "every bit as in memory://a/back" in capfd.readouterr().err
    assert command.main(["inspect", hf]) == 2
    assert "memory://a/hf: holds no manifest.json" in capfd.readouterr().err


def test_doctor_and_generate_take_urls(layouts, capsys):
    url = put(layouts / "orbax", "memory://a/orbax")
    assert main(["doctor", "--model", url, "--quiet"]) == 0
    assert "PROBLEM" not in capsys.readouterr().out
    hf = put(layouts / "hf", "memory://a/hf")
    assert main(["generate", "--model", hf, "--raw", "hello", "--max-new-tokens", "2"]) == 0
