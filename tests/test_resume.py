"""Resumed conversions: an interrupted one resumes, its partial result does not load, and nothing is stored twice."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_layout
import numpy as np
import pytest
from test_convert import assert_same, expected_parameters, memory_gb, restore

from qwen2audio_jax.checkpoint import journal, reader, writer
from qwen2audio_jax.convert import __main__ as command
from qwen2audio_jax.convert import convert, verify

ROOT = Path(__file__).resolve().parent.parent
SMALL = memory_gb(30_000)  # groups of 15 kB: about six in the tiny model
SOURCE = {"layers": 1, "naming": "old", "dtype": "bfloat16", "shards": 3}


@pytest.fixture
def hf(tmp_path) -> Path:
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", **SOURCE)
    return tmp_path / "hf"


class Stopped(OSError):
    pass


def stop_at(share: float):
    def on_progress(done, total):
        if done > share * total:
            raise Stopped("disk on fire")

    return on_progress


def stop(src, dst, *, share=0.5, **options) -> dict[str, dict]:
    """Convert until `share` is done and fail; what is finished then."""
    with pytest.raises(Stopped):
        convert(src, dst, memory_gb=SMALL, on_progress=stop_at(share), **options)
    assert not reader.is_checkpoint(dst)
    with pytest.raises(ValueError, match=r"unfinished checkpoint .*run the same conversion again"):
        reader.restore_params(dst, specs={})
    return entries(dst)


def entries(dst) -> dict[str, dict]:
    found = {}
    for line in (dst / journal.NAME).read_text().splitlines():
        found |= json.loads(line).get("parameters", {})
    return found


def assert_whole(src, dst) -> None:
    """It is what an uninterrupted conversion gives, with nothing beside it."""
    assert verify(src, dst) == []
    convert(src, dst.with_name("straight"))
    assert_same(restore(dst), restore(dst.with_name("straight")))
    straight, resumed = (reader.read_manifest(path) for path in (dst.with_name("straight"), dst))
    assert {**resumed, "files": None} == {**straight, "files": None}
    names = [{path.name for path in folder.iterdir()} for folder in (dst, dst.with_name("straight"))]
    assert names[0] == names[1]
    assert not any(".pending" in path.name or ".partial" in path.name for path in dst.rglob("*"))
    shutil.rmtree(dst.with_name("straight"))


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_goes_on_and_makes_nothing_twice(hf, tmp_path, made, dtype):
    done = stop(hf, tmp_path / "a", share=0.3, dtype=dtype)
    assert 3 < len(done) < 20
    more = stop(hf, tmp_path / "a", share=0.7, dtype=dtype)
    assert set(done) < set(more)
    made.clear()
    seen = []
    convert(
        hf, tmp_path / "a", dtype=dtype, memory_gb=SMALL, on_progress=lambda done, total: seen.append((done, total))
    )
    parameters = reader.read_manifest(tmp_path / "a")["parameters"]
    assert sorted(made) == sorted(parameters.keys() - more.keys())
    finished = sum(np.prod(each["origin"]["shape"]) * 2 for each in more.values())
    assert seen[0] == (finished, seen[-1][1])
    assert verify(hf, tmp_path / "a") == []
    assert all("note" not in each for each in parameters.values())
    if dtype == "keep":
        assert_whole(hf, tmp_path / "a")


def test_early_failure_leaves_nothing(hf, tmp_path):
    for place in (tmp_path / "new", tmp_path / "empty"):
        if place.name == "empty":
            place.mkdir()
        with pytest.raises(Stopped):
            convert(hf, place, on_progress=stop_at(-1))
        assert not place.exists() or list(place.iterdir()) == []


def test_bad_weights_leave_nothing_even_late(tmp_path):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", layers=1)
    tensors["model.multi_modal_projector.linear.bias"][0] = np.nan
    hf_layout.write_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        convert(tmp_path / "hf", tmp_path / "a", memory_gb=SMALL)
    assert not (tmp_path / "a").exists()


def test_changed_source_is_refused_and_costs_nothing(hf, tmp_path, made):
    done = stop(hf, tmp_path / "a")
    origin = next(iter(done.values()))["origin"]
    file = hf / origin["file"]
    content, times = file.read_bytes(), file.stat()
    value = checkpoint_tensor(file, origin["tensor"])
    place = content.index(value)
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same length and time: the hash tells
    message = f"{origin['tensor']} is not what it was when the conversion .* began; bring the source back"
    with pytest.raises(ValueError, match=message):
        convert(hf, tmp_path / "a")
    assert entries(tmp_path / "a").keys() == done.keys()
    file.write_bytes(content)
    made.clear()
    convert(hf, tmp_path / "a")
    assert not made or not set(made) & set(done)
    assert_whole(hf, tmp_path / "a")


def checkpoint_tensor(file: Path, name: str) -> bytes:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        return opened.get_tensor(name).tobytes()


def test_other_work_is_refused(hf, tmp_path):
    done = stop(hf, tmp_path / "a")
    with pytest.raises(ValueError, match="unfinished checkpoint with dtype 'keep' instead of 'float16'; finish it as"):
        convert(hf, tmp_path / "a", dtype="float16")
    with pytest.raises(ValueError, match="with non-finite weights 'refuse' instead of 'allow'"):
        convert(hf, tmp_path / "a", non_finite="allow")
    hf_layout.write_hf_checkpoint(
        tmp_path / "other", "gqa", layers=1, naming="old", dtype="bfloat16", shards=3, seed=99
    )
    with pytest.raises(ValueError, match="is not what it was when the conversion"):
        convert(tmp_path / "other", tmp_path / "a")
    hf_layout.write_hf_checkpoint(tmp_path / "third", "gqa", layers=1)
    with pytest.raises(ValueError, match="is not what it was when the conversion"):
        convert(tmp_path / "third", tmp_path / "a")
    assert entries(tmp_path / "a").keys() == done.keys()
    shutil.move(hf, tmp_path / "moved")
    convert(tmp_path / "moved", tmp_path / "a")  # the same bytes from another place
    assert_whole(tmp_path / "moved", tmp_path / "a")


@pytest.mark.parametrize(
    "damage", ["torn line", "half a line", "group gone", "group cut", "version", "rubbish", "no journal"]
)
def test_damaged_remains_are_made_again(hf, tmp_path, made, damage):
    stop(hf, tmp_path / "a")
    path = tmp_path / "a" / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    group = next(iter(json.loads(lines[2])["groups"]))
    folder = tmp_path / "a" / "params.partial_save" / group
    if damage == "torn line":
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-1])
    elif damage == "half a line":
        path.write_bytes(b"".join(lines) + lines[-1][:100])
    elif damage == "group gone":
        shutil.rmtree(folder)
    elif damage == "group cut":
        file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "version":
        path.write_bytes(b'{"version": 0, "work": {}}\n' + b"".join(lines[1:]))
    elif damage == "rubbish":
        path.write_bytes(b"\0" * 50)
    else:
        path.unlink()
    (tmp_path / "a" / "params.partial_save" / "unnamed.pending_group").mkdir()
    made.clear()
    convert(hf, tmp_path / "a")
    if damage in ("torn line", "half a line"):
        assert len(made) < 39
    assert_whole(hf, tmp_path / "a")


@pytest.mark.parametrize("where", ["begin", "merge", "rename", "joined", "manifest", "last"])
def test_stopped_while_the_groups_are_joined(hf, tmp_path, monkeypatch, made, where):
    """Whatever point of the end is reached, no parameter is made again."""

    def stopped(*args, **kwargs):
        raise Stopped("disk on fire")

    with monkeypatch.context() as patch:
        if where == "begin":
            patch.setattr(writer.shutil, "copytree", stopped)
        elif where == "merge":
            from orbax.checkpoint.experimental.v1._src.partial import saving

            patch.setattr(saving, "_merge_checkpoint_metadata", stopped)
        elif where == "joined":
            patch.setattr(journal.Journal, "join", stopped)
        elif where == "manifest":
            patch.setattr(writer.json, "dump", stopped)
        else:
            replace = os.replace

            last = reader.PARAMS if where == "rename" else reader.MANIFEST

            def fail_last(source, target):
                stopped() if Path(target).name == last else replace(source, target)

            patch.setattr(writer.os, "replace", fail_last)
        with pytest.raises(OSError, match="disk on fire"):
            convert(hf, tmp_path / "a", memory_gb=SMALL)
    assert not reader.is_checkpoint(tmp_path / "a")
    made.clear()
    convert(hf, tmp_path / "a", memory_gb=SMALL)
    assert made == []
    assert_whole(hf, tmp_path / "a")


def test_stopped_after_the_manifest(hf, tmp_path, monkeypatch):
    """It is a checkpoint already; the same command says nothing else, another finds it there."""
    with monkeypatch.context() as patch:
        unlink = Path.unlink

        def fail(path, missing_ok=False):
            if path.name == journal.NAME:
                raise Stopped("disk on fire")
            unlink(path, missing_ok=missing_ok)

        patch.setattr(Path, "unlink", fail)
        with pytest.raises(Stopped):
            convert(hf, tmp_path / "a")
    assert reader.is_checkpoint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    convert(hf, tmp_path / "a")
    assert_whole(hf, tmp_path / "a")
    for _ in range(2):
        with pytest.raises(ValueError, match="already holds a checkpoint"):
            convert(hf, tmp_path / "b", dtype="float32")
    assert verify(hf, tmp_path / "b") == []
    assert not {journal.NAME, reader.MARKER} & {path.name for path in (tmp_path / "b").iterdir()}


def test_file_systems_without_links(hf, tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError("no links here")

    monkeypatch.setattr(writer.os, "link", no_links)
    stop(hf, tmp_path / "a")
    convert(hf, tmp_path / "a", memory_gb=SMALL)
    assert_whole(hf, tmp_path / "a")


STARTED = """
import resource, sys
sys.path.insert(0, {root!r})
import qwen2audio_jax
qwen2audio_jax.__path__.append({root!r})
from qwen2audio_jax.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
def told(done, total):
    print(done, total, flush=True)
    if {hang} and done > total // 2:
        sys.stdin.read()
convert({src!r}, {dst!r}, memory_gb={memory_gb!r}, on_progress=told)
"""


def start(src, dst, *, hang: bool, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    code = STARTED.format(root=str(ROOT), src=str(src), dst=str(dst), hang=hang, memory_gb=SMALL, limit=limit)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_killed_conversion_goes_on(hf, tmp_path, made):
    process = start(hf, tmp_path / "a", hang=True)
    for line in process.stdout:
        done, total = map(int, line.split())
        if done > total // 2:
            break
    with pytest.raises(ValueError, match="another process is writing this checkpoint"):
        convert(hf, tmp_path / "a")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not reader.is_checkpoint(tmp_path / "a")
    finished = entries(tmp_path / "a")
    assert finished
    convert(hf, tmp_path / "a")
    assert set(made) == reader.read_manifest(tmp_path / "a")["parameters"].keys() - finished.keys()
    assert_whole(hf, tmp_path / "a")


def test_disk_that_fails_below_orbax(tmp_path):
    """Files may not grow beyond a limit in that process: writes fail as on a full disk, in tensorstore's threads."""
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "mels80")
    limit = max(value.nbytes for value in tensors.values()) - 1000
    limited = start(tmp_path / "hf", tmp_path / "a", hang=False, limit=limit)
    _, err = limited.communicate(timeout=120)
    assert limited.returncode == 1
    assert f"OSError: {tmp_path / 'a'}: cannot be written: " in err
    assert not reader.is_checkpoint(tmp_path / "a")
    convert(tmp_path / "hf", tmp_path / "a")
    assert_same(restore(tmp_path / "a"), expected_parameters(tensors))


def test_command_says_that_it_goes_on(hf, tmp_path, capfd, monkeypatch):
    stop(hf, tmp_path / "a")
    assert command.main([str(hf), str(tmp_path / "a"), "--memory-gb", "0.5"]) == 0
    err = capfd.readouterr().err
    assert re.search(r"a: converted \d+ tensors, 187kB \([\d.]+kB of it were there already\) in ", err)


@pytest.mark.slow(seconds=8)
def test_killed_at_random_moments(hf, tmp_path):
    """The short form of benchmarks/convert_kills.py; the last kills fall among the joining of the groups."""
    rng = np.random.default_rng(7)
    for share in (0.2, 0.6, 1.0, 1.0):
        process = start(hf, tmp_path / "a", hang=False)
        for line in process.stdout:
            done, total = map(int, line.split())
            if done >= share * total:
                break
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if reader.is_checkpoint(tmp_path / "a"):
            break
        with pytest.raises(ValueError, match="unfinished checkpoint"):
            reader.restore_params(tmp_path / "a", specs={})
        assert entries(tmp_path / "a")
    if not reader.is_checkpoint(tmp_path / "a"):
        convert(hf, tmp_path / "a", memory_gb=SMALL)
    assert verify(hf, tmp_path / "a") == []
