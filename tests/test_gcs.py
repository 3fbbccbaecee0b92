"""gs:// through an emulator of Google's storage: uploads by the converter, and in-place reads."""

import os
import socket
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.checkpoint import reader
from qwen2audio_jax.convert import convert, verify
from qwen2audio_jax.source import resolve_checkpoint

# Newer releases ask a second, gRPC interface what kind of bucket it is, which the emulator does not have.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
server = pytest.importorskip("gcp_storage_emulator.server")
gcsfs = pytest.importorskip("gcsfs")

BUCKET = "gs://a-bucket"


@pytest.fixture
def gcs(monkeypatch):
    """An empty bucket, which both gcsfs and tensorstore are led to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, url)
    # gcsfs ends the lines between the parts of an upload with LF; the emulator would take a CR before it, which is the
    # last byte of one file in 256, for its line's end.
    read = server._decode_raw_data
    monkeypatch.setattr(
        server,
        "_decode_raw_data",
        lambda *request: (read(*request) or b"").replace(b"\n--==0==--", b"\r\n--==0==--") or None,
    )
    emulator = server.create_server("127.0.0.1", port, in_memory=True)
    emulator.start()
    gcsfs.GCSFileSystem.clear_instance_cache()
    fs = fsspec.filesystem("gs", token="anon", endpoint_url=url)
    fs.mkdir("a-bucket")
    yield fs
    emulator.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r", b"--==0=="], ids=repr)
def test_the_emulator_keeps_every_byte(gcs, tmp_path, end):
    (tmp_path / "file").write_bytes(data := bytes(range(256)) * 2 + end)
    gcs.put_file(str(tmp_path / "file"), f"{BUCKET}/file")
    assert gcs.cat_file(f"{BUCKET}/file") == data


def test_convert_to_it_and_read_there(gcs, layouts, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    url = f"{BUCKET}/models/tiny"
    assert convert(layouts / "hf", url)
    assert not convert(layouts / "hf", url)
    assert str(resolve_checkpoint(url)) == url
    mesh = make_mesh(data=1, model=2, devices=jax.devices()[:2])
    near = Qwen2AudioForConditionalGeneration.from_pretrained(layouts / "orbax", mesh=mesh)
    far = Qwen2AudioForConditionalGeneration.from_pretrained(url, mesh=mesh)
    for a, b in zip(jax.tree.leaves(near.params), jax.tree.leaves(far.params), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["uploads"]
    assert verify(layouts / "hf", url) == []


def test_damage_is_named(gcs, layouts, monkeypatch):
    url = f"{BUCKET}/broken"
    gcs.put(str(layouts / "orbax"), url, recursive=True)

    def place(*_):
        raise ValueError("DATA_LOSS: Error reading local file")  # as tensorstore does of a flipped byte there

    with monkeypatch.context() as patch:
        patch.setattr(reader, "place", place)
        with pytest.raises(ValueError, match=r"broken/params: cannot be read: damaged"):
            Qwen2AudioForConditionalGeneration.from_pretrained(url)
    gcs.rm_file(next(name for name in gcs.find(f"{url}/params") if Path(name).parent.name == "d"))
    gcs.invalidate_cache()
    with pytest.raises(ValueError, match=r"gs://a-bucket/broken: damaged or not copied whole; .*\n *missing params/"):
        Qwen2AudioForConditionalGeneration.from_pretrained(url)


@pytest.mark.usefixtures("object_store")
def test_other_buckets_are_refused_by_restore(layouts):
    fsspec.filesystem("memory").put(str(layouts / "orbax"), "/elsewhere", recursive=True)
    with pytest.raises(ValueError, match="such a bucket is not read in place; copy the checkpoint"):
        reader.restore_params("memory://elsewhere", specs={})
