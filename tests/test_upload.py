"""Uploads to a bucket: every upload fails in turn, no partial result loads, and the same command sends the rest."""

import base64
import hashlib
import json
import re
import shutil
import time
from pathlib import Path

import hf_layout
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from object_store import BUCKET, Store, assert_loads_nowhere, objects, put, staged
from stand_in import stand_in
from test_convert import memory_gb

from qwen2audio_jax.checkpoint.reader import MANIFEST, is_checkpoint, read_manifest
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, export, to_safetensors, upload, verify
from qwen2audio_jax.source import resolve_checkpoint
from qwen2audio_jax.storage import bucket

pytestmark = pytest.mark.usefixtures("object_store")


def begin(layouts: Path, url: str = BUCKET) -> int:
    """Send a finished checkpoint from a staging folder, as `convert` does; how many objects it is."""
    with upload.uploading(bucket.folder_at(url), last=MANIFEST, staging=None) as sending:
        assert not sending.is_finished()
        if not sending.folder.exists():
            shutil.copytree(layouts / "orbax", sending.folder)
        sending.send()
    return len(objects(url))


@pytest.mark.parametrize("how", ["before", "half", "short", "after"])
def test_every_upload_fails_in_turn(layouts, tmp_path, how, monkeypatch):
    monkeypatch.setattr(upload, "_THREADS", 1)
    total = begin(layouts, "store://whole")
    whole = objects("store://whole")
    for n in range(1, total + 1):
        url = f"store://bucket{n}"
        Store.sent.clear()
        Store.fails.update({n: how})
        with pytest.raises(OSError, match=r"cannot be written, tried 1 times: .*; the same command goes on"):
            begin(layouts, url)
        arrived = {name for name, content in objects(url).items() if content == whole[name]}
        assert len(arrived) == (n if how == "after" else n - 1)
        if not (how == "after" and n == total):
            assert_loads_nowhere(url)
        Store.fails.clear()
        Store.sent.clear()
        begin(layouts, url)
        again = {path.removeprefix(f"/bucket{n}/") for path in Store.sent}
        assert again == whole.keys() - arrived
        assert objects(url) == whole
        assert staged(tmp_path) == []


def test_several_fail_at_once(layouts, tmp_path):
    Store.fails.update({3: "half", 4: "before", 6: "after"})
    with pytest.raises(OSError, match="the same command goes on"):
        convert(layouts / "hf", BUCKET)
    assert_loads_nowhere(BUCKET)
    Store.fails.clear()
    assert convert(layouts / "hf", BUCKET)
    assert verify(layouts / "hf", BUCKET) == []
    assert staged(tmp_path) == []


def test_failed_upload_goes_on_without_converting(layouts, tmp_path, made, capfd):
    url = put(layouts / "hf", "memory://a/hf")
    Store.fails.update({5: "before"})
    assert command.main([url, BUCKET, "--staging", str(tmp_path / "disk")]) == 1
    err = capfd.readouterr().err
    assert "python -m convert: failed: store://bucket/" in err
    assert "connection lost; the same command goes on" in err
    assert made
    made.clear()
    Store.fails.clear()
    # Other work cannot take over, nor can this be sent elsewhere by mistake.
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        convert(url, BUCKET, dtype="float32", staging=tmp_path / "disk")
    with pytest.raises(ValueError, match=r"is not empty \(it has .*\) and not this command's unfinished upload"):
        convert(url, BUCKET)  # its staging folder is another
    assert command.main([url, BUCKET, "--staging", str(tmp_path / "disk")]) == 0
    assert made == []
    assert re.search(r"store://bucket: converted \d+ tensors", capfd.readouterr().err)
    assert verify(url, BUCKET) == []
    assert list((tmp_path / "disk").iterdir()) == []
    assert command.main([url, BUCKET]) == 0
    assert "holds this conversion, finished: nothing to do" in capfd.readouterr().err


def test_stopped_conversion_goes_on_in_its_staging_folder(layouts, tmp_path, made):
    def stop(done, total):
        if done > total // 2:
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        convert(layouts / "hf", BUCKET, memory_gb=memory_gb(60_000), on_progress=stop)
    assert objects() == {}
    first = set(made)
    made.clear()
    assert convert(layouts / "hf", BUCKET, memory_gb=memory_gb(60_000))
    assert len(made) < len(read_manifest(BUCKET)["parameters"]) <= len(first) + len(made)
    assert verify(layouts / "hf", BUCKET) == []


def test_failed_export_goes_on(layouts, tmp_path, monkeypatch):
    Store.fails.update({2: "half"})
    with pytest.raises(OSError, match="the same command goes on"):
        export(layouts / "orbax", BUCKET, max_shard_bytes=40_000)
    assert "config.json" not in objects()
    with pytest.raises(ValueError, match="is the unfinished upload of another checkpoint, or with other options"):
        export(layouts / "orbax", BUCKET, max_shard_bytes=40_000, names="current")
    with pytest.raises(ValueError, match="holds neither"):
        resolve_checkpoint(BUCKET)
    Store.fails.clear()
    with monkeypatch.context() as patch:
        patch.setattr(to_safetensors, "write_folder", None)  # it is there already
        export(layouts / "orbax", BUCKET, max_shard_bytes=40_000)
    assert verify(BUCKET, layouts / "orbax") == []
    assert staged(tmp_path) == []
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        export(layouts / "orbax", BUCKET)


class Killed:
    def rmtree(self, path):
        raise KeyboardInterrupt


def test_killed_after_the_last_object(layouts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(upload, "shutil", Killed())
        with pytest.raises(KeyboardInterrupt):
            convert(layouts / "hf", BUCKET)
    assert staged(tmp_path)
    assert is_checkpoint(BUCKET)
    assert not convert(layouts / "hf", BUCKET)
    assert staged(tmp_path) == []


def test_torn_journal(layouts, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_THREADS", 1)
    Store.fails.update({4: "before"})
    with pytest.raises(OSError, match="connection lost"):
        begin(layouts)
    (place,) = staged(tmp_path)
    with open(place / "upload.jsonl", "a") as file:
        file.write('{"arrived": ["para')
    Store.fails.update({8: "before"})
    with pytest.raises(OSError, match="connection lost"):
        begin(layouts)
    assert all(json.loads(line) for line in (place / "upload.jsonl").read_text().splitlines())
    begin(layouts)
    assert read_manifest(BUCKET)


def test_result_made_anew_replaces_what_was_sent(layouts, tmp_path, monkeypatch):
    """A staging folder whose result was lost: what was sent of the old one goes, and nothing else."""
    Store.fails.update({6: "before"})
    with pytest.raises(OSError, match="connection lost"):
        convert(layouts / "hf", BUCKET)
    (place,) = staged(tmp_path)
    shutil.rmtree(place / "result")
    Store.fails.clear()
    assert convert(layouts / "hf", BUCKET)
    assert verify(layouts / "hf", BUCKET) == []
    assert len(objects()) == len(read_manifest(BUCKET)["files"]) + len(list((layouts / "orbax").iterdir())) - 1


def test_transient_failures_are_tried_again(layouts, monkeypatch):
    waits = []
    monkeypatch.setattr(bucket, "RETRY_SECONDS", (1.0, 4.0))
    monkeypatch.setattr(bucket, "time", stand_in(time, sleep=waits.append))
    monkeypatch.setattr(upload, "_THREADS", 1)
    Store.fails.update({2: "half", 3: "before"})
    begin(layouts)
    assert waits == [1.0, 4.0]
    assert read_manifest(BUCKET)
    Store.error = PermissionError("Forbidden")
    Store.sent.clear()
    with pytest.raises(ValueError, match=r"cannot be written: Forbidden; check the URL, and that your credentials"):
        begin(layouts, "store://other")
    assert waits == [1.0, 4.0]


def test_checksums_are_looked_at(layouts, monkeypatch):
    """Where the store tells an MD5, bytes that were changed on their way are noticed."""

    def info(self, path, **options):
        found = MemoryFileSystem.info(self, path, **options)
        if found["type"] == "file":
            digest = hashlib.md5(self.store[self._strip_protocol(path)].getvalue()).digest()
            found["md5Hash"] = base64.b64encode(digest).decode()
        return found

    def put_file(self, lpath, rpath, **options):
        Store.put_file_as_it_is(self, lpath, rpath, **options)
        if rpath.endswith("tokenizer.json"):
            content = self.store[rpath].getvalue()
            self.store.pop(rpath)
            self.pipe_file(rpath, content[:-1] + b" ")

    monkeypatch.setattr(Store, "info", info)
    begin(layouts)
    monkeypatch.setattr(Store, "put_file_as_it_is", Store.put_file, raising=False)
    monkeypatch.setattr(Store, "put_file", put_file)
    with pytest.raises(OSError, match=r"tokenizer.json: cannot be written, .*it did not arrive as it was sent"):
        begin(layouts, "store://other")
    assert_loads_nowhere("store://other")


# What is refused.


def test_destinations(layouts, tmp_path, made):
    fs = Store()
    fs.pipe_file("/bucket/mine/thesis.txt", b"x")
    with pytest.raises(ValueError, match=r"is not empty \(it has thesis.txt\) and not this command's"):
        convert(layouts / "hf", f"{BUCKET}/mine")
    with pytest.raises(ValueError, match=r"is not empty \(it has thesis.txt\)"):
        export(layouts / "orbax", f"{BUCKET}/mine")
    assert made == []
    assert staged(tmp_path) == []
    assert convert(layouts / "hf", f"{BUCKET}/a")
    assert not convert(layouts / "hf", f"{BUCKET}/a")
    for options in ({"dtype": "float32"}, {"non_finite": "allow"}):
        with pytest.raises(ValueError, match="already holds a checkpoint"):
            convert(layouts / "hf", f"{BUCKET}/a", **options)
    hf_layout.write_hf_checkpoint(tmp_path / "other", "gqa", naming="old", dtype="bfloat16", shards=3, seed=9)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        convert(tmp_path / "other", f"{BUCKET}/a")
    with pytest.raises(ValueError, match=r"staging .* goes with a bucket's URL"):
        convert(layouts / "hf", tmp_path / "x", staging=tmp_path)
    fs.rm_file("/bucket/a/" + next(iter(read_manifest(f"{BUCKET}/a")["files"])))
    with pytest.raises(ValueError, match="damaged or not copied whole"):
        convert(layouts / "hf", f"{BUCKET}/a")


def test_somebody_else_writes_there(layouts):
    with upload.uploading(bucket.folder_at(BUCKET), last=MANIFEST, staging=None) as sending:
        assert not sending.is_finished()
        shutil.copytree(layouts / "orbax", sending.folder)
        Store().pipe_file("/bucket/rival", b"x")
        with pytest.raises(ValueError, match=r"rival: is not what was sent: somebody else writes there"):
            sending.send()
    assert objects() == {"rival": b"x"}


def test_one_process_sends(layouts):
    folder = bucket.folder_at(BUCKET)
    with (
        upload.uploading(folder, last=MANIFEST, staging=None),
        pytest.raises(ValueError, match="another process is writing it"),
        upload.uploading(folder, last=MANIFEST, staging=None),
    ):
        pass
