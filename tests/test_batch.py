"""Batch jobs by an answerer without a model: inputs, shards, resuming, several hosts, parts and refusals."""

import gzip
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import object_store as stores
import pytest
import sounds
from batch_process import Echo

from qwen2audio_jax.batch import manifest as manifest_module
from qwen2audio_jax.batch import parts as parts_module
from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.job import model_digest
from qwen2audio_jax.batch.manifest import Manifest
from qwen2audio_jax.batch.quality import Thresholds
from qwen2audio_jax.batch.run import run_batch
from qwen2audio_jax.batch.shards import Host, Shards, find_host, order_of_work, shard_count
from qwen2audio_jax.engine.clips import open_clip

ROOT = Path(__file__).resolve().parent.parent


def write_manifest(path: Path, count: int, **extra) -> Path:
    path.write_text("".join(json.dumps({"id": f"r{i}", "audio": f"{i}.wav", **extra}) + "\n" for i in range(count)))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def do(manifest, output, **options):
    options = {"answerer": Echo(), "prompt": "hear", "quiet": True, **options}
    return run_batch([str(manifest)], output=output, **options)


def start(manifest: Path, output: Path, *, delay: float, **options) -> subprocess.Popen:
    """A job in a process of its own, once it has begun."""
    options = {"output": str(output), "prompt": "hear", "quiet": True, **options}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "batch_process.py", json.dumps([[str(manifest)], delay, options])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "started\n", process.stderr.read()
    return process


def end(process: subprocess.Popen) -> tuple[str, dict]:
    out, err = process.communicate(timeout=120)
    assert process.returncode in (0, 3), err
    return json.loads(out)


@pytest.mark.smoke
def test_each_record_has_its_row_in_input_order(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 300)
    seen = []
    summary = do(manifest, tmp_path / "out", merge=tmp_path / "all.jsonl", on_progress=seen.append, group=7)
    assert summary.state == "finished"
    assert summary.figures["records"] == 300
    rows = read_rows(tmp_path / "all.jsonl")
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(300)]
    assert len({row["text"] for row in rows}) == 300  # each has its own seed
    assert [figures["records"] for figures in seen] == [*range(7, 300, 7), 300]
    # Once more there is nothing to do, and another group gives the same.
    assert do(manifest, tmp_path / "out").figures["records"] == 0
    do(manifest, tmp_path / "other", merge=tmp_path / "other.jsonl", group=64)
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


def test_what_is_wrong_with_a_line_is_its_row(tmp_path):
    lines = [
        {"id": "good", "audio": ["a.wav", "b.wav"], "prompt": "which?", "meta": {"speaker": 3}},
        {"audio": "c.wav"},
        "{broken",
        {"id": "good", "audio": "d.wav"},
        {"id": "x", "audio": 7},
        {"id": "y", "promt": "hello"},
        {"id": "z", "prompt": "fail"},
        {"id": "m", "messages": [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "?"}]}]},
        {"id": 17, "prompt": "no sound"},
        {"id": "deep", "prompt": [[[]]]},
        [1, 2],
    ]
    path = tmp_path / "m.jsonl"
    text = "\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode() + b'\n{"id": "\xff"}')
    summary = do(path, tmp_path / "out", merge=tmp_path / "all.jsonl")
    rows = read_rows(tmp_path / "all.jsonl")
    assert [row["id"] for row in rows] == [
        *("good", "m.jsonl:3", "m.jsonl:5", "m.jsonl:7 (duplicate)", "x", "y", "z", "m", "17", "deep", "m.jsonl:21"),
        "m.jsonl:22",
    ]
    kinds = [row.get("error", {}).get("kind") for row in rows]
    assert kinds == [None, None, "record", "duplicate", "record", "record", "input", "record", None, *["record"] * 3]
    assert summary.figures["error_kinds"] == {"record": 7, "duplicate": 1, "input": 1}
    assert "m.jsonl:5: no JSON" in rows[2]["error"]["message"]
    assert f"{path}:1 too" in rows[3]["error"]["message"]
    assert "'promt'" in rows[5]["error"]["message"]
    assert rows[0]["meta"] == {"speaker": 3}
    assert rows[0]["text"].startswith("which? 2 ")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no record in it"), ("{\n[]\n", r"no record can be used; the first: .*m.jsonl:1: no JSON")],
)
def test_manifests_without_a_record_are_refused(content, message, tmp_path):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        do(tmp_path / "m.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_form_of_input(tmp_path, monkeypatch):
    clip = sounds.encode("wav", sounds.speech(8000), 16_000)
    (tmp_path / "clips" / "deep").mkdir(parents=True)
    for name in ("b.wav", "deep/a.wav", "notes.txt"):
        (tmp_path / "clips" / name).write_bytes(clip)
    plain = write_manifest(tmp_path / "1.jsonl", 2)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b'{"id": "zip", "audio": "clips/b.wav"}\n'))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in (
            ("s/one.wav", clip),
            ("s/one.json", b'{"prompt": "from json", "speaker": 4}'),
            ("s/two.txt", b"from txt\n"),
            ("s/two.0.wav", clip),
            ("s/two.1.wav", clip),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress((tmp_path / "t.tar").read_bytes()))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"id": "in", "prompt": "typed"}')))
    inputs = [str(tmp_path / name) for name in ("*.jsonl", "2.jsonl.gz", "t.tar", "clips", "clips/b.wav")]
    with Manifest([*inputs, "-"], prompt="default") as manifest:
        records = [manifest.record(position) for position in range(len(manifest))]
        assert [record.id for record in records] == [
            *("r0", "r1", "zip", "s/one", "s/two", "b.wav", "deep/a.wav", f"{tmp_path}/clips/b.wav", "in"),
        ]
        assert all(record.problem is None for record in records)
        prompts = ["default", "default", "default", "from json", "from txt", "default", "default", "default", "typed"]
        assert [record.prompt for record in records] == prompts
        assert records[3].meta == {"speaker": 4}
        assert records[0].clips == (str(tmp_path / "0.wav"),)
        heard = [open_clip(piece) for record in records[3:5] for piece in record.clips]
        assert heard == [clip, clip, clip]
        for record in (records[2], *records[5:8]):
            assert Path(record.clips[0]).read_bytes() == clip
    with Manifest([str(tmp_path / "t.tar.gz")]) as packed:
        assert [open_clip(piece) for piece in packed.record(1).clips] == [clip, clip]
    assert not Path(packed.files[0].path).exists()
    for name, message in (("clips/notes.txt", "is no input"), ("none-*.jsonl", "no file matches"), ("none", "no such")):
        with pytest.raises(ValueError, match=message):
            Manifest([str(tmp_path / name)])
    (tmp_path / "bad.tar").write_bytes(clip)
    with pytest.raises(ValueError, match="no whole tar"):
        Manifest([str(tmp_path / "bad.tar")])
    assert plain.exists()


def test_messages_take_their_clips_in_order(tmp_path):
    content = [{"type": "audio", "audio": "own.wav"}, {"type": "text", "text": "and"}, {"type": "audio"}]
    record = {"id": "a", "messages": [{"role": "user", "content": content}], "audio": ["given.wav"]}
    (tmp_path / "m.jsonl").write_text(json.dumps(record))
    with Manifest([str(tmp_path / "m.jsonl")]) as manifest:
        found = manifest.record(0)
    assert found.clips == (str(tmp_path / "own.wav"), str(tmp_path / "given.wav"))
    assert found.messages[0]["content"] == [{"type": "audio"}, {"type": "text", "text": "and"}, {"type": "audio"}]


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "id_hash", lambda id: len(id))
    with Manifest([str(write_manifest(tmp_path / "m.jsonl", 12))]) as manifest:
        assert all(manifest.record(position).problem is None for position in range(12))


def test_shards_divide_the_records():
    hashes = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
    shards = Shards(hashes, count=shard_count(5000))
    together = np.concatenate([shards.positions(shard) for shard in range(shards.count)])
    assert sorted(together.tolist()) == list(range(5000))
    assert shards.sizes().sum() == 5000
    assert (shard_count(1), shard_count(10), shard_count(10**5), shard_count(10**7)) == (1, 10, 781, 16_384)
    orders = [list(order_of_work(64, Host(index, 3, ""), fingerprint="f")) for index in range(3)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert [order[0] for order in orders] == [0, 1, 2]
    assert orders[0][22] != 1  # the others' from somewhere in the middle
    assert list(order_of_work(64, Host(1, 3, ""), fingerprint="f", others=False)) == list(range(1, 64, 3))


@pytest.mark.parametrize(
    ("shard", "environment", "place"),
    [
        (None, {}, (0, 1)),
        ("2/3", {"SLURM_ARRAY_TASK_ID": "0"}, (2, 3)),
        (None, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}, (2, 4)),
        (
            None,
            {f"SLURM_ARRAY_TASK_{key}": value for key, value in zip(("ID", "COUNT", "MIN", "MAX"), "8327", strict=True)}
            | {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MAX": "6"},
            (1, 3),
        ),
        (None, {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "2"}, (1, 2)),
        (
            None,
            {
                "JOB_COMPLETION_INDEX": "1",
                "PROCESSES_IN_JOB": "2",
                "JOB_INDEX": "2",
                "REPLICATED_JOB_REPLICAS": "3",
            },
            (5, 6),
        ),
        (None, {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4"}, (1, 4)),
        (None, {"SKYPILOT_JOB_RANK": "2", "SKYPILOT_NUM_JOBS": "3"}, (2, 3)),
        (None, {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, (1, 2)),
    ],
)
def test_the_place_among_hosts(shard, environment, place):
    host = find_host(shard, environment)
    assert (host.index, host.count) == place


@pytest.mark.parametrize(
    ("shard", "environment", "message"),
    [
        ("3/3", {}, "from 0 to N - 1"),
        ("1", {}, "not I/N"),
        (None, {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS"),
        (None, {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT"),
        (None, {"TPU_WORKER_ID": "x", "TPU_WORKER_HOSTNAMES": "a"}, "no number"),
        (None, {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "2"}, "2 of 2"),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "9",
            },
            None,
        ),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "9",
            },
            "gaps",
        ),
    ],
)
def test_places_that_make_no_sense_are_refused(shard, environment, message):
    if message is None:
        assert find_host(shard, environment).count == 3
        return
    with pytest.raises(ValueError, match=message):
        find_host(shard, environment)


def killed(tmp_path: Path, *, kills: int, delay: float, seed: int) -> None:
    """A job that is killed at random moments ends like one that never was."""
    manifest = write_manifest(tmp_path / "m.jsonl", 400)
    do(manifest, tmp_path / "whole", merge=tmp_path / "whole.jsonl")
    draw = random.Random(seed)
    for _ in range(kills):
        process = start(manifest, tmp_path / "out", delay=delay, group=8)
        time.sleep(draw.uniform(0.0, 400 * delay))
        process.kill()
        process.communicate()
        for part in (tmp_path / "out").glob("part-*"):
            assert (tmp_path / "whole" / part.name).read_bytes() == part.read_bytes()
    summary = do(manifest, tmp_path / "out", merge=tmp_path / "all.jsonl")
    assert summary.state == "finished"
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_killed_job_goes_on(tmp_path):
    killed(tmp_path, kills=3, delay=0.001, seed=0)


@pytest.mark.long_job
@pytest.mark.slow(seconds=15)
def test_a_job_killed_twenty_times_goes_on(tmp_path):
    killed(tmp_path, kills=20, delay=0.002, seed=1)


@pytest.mark.long_job
@pytest.mark.slow(seconds=20)
def test_three_hosts_killed_twenty_times_go_on(tmp_path):
    """Each kill takes one of three that share an output; it starts again at once."""
    manifest, output = write_manifest(tmp_path / "m.jsonl", 1200), tmp_path / "out"
    do(manifest, tmp_path / "whole", merge=tmp_path / "whole.jsonl")

    def host(number):
        merge = str(tmp_path / f"{number}.jsonl")
        return start(manifest, output, delay=0.06, group=8, shard=f"{number}/3", merge=merge)

    hosts = [host(number) for number in range(3)]
    draw, kills = random.Random(2), 0
    while kills < 20:
        time.sleep(draw.uniform(0.0, 0.4))
        victim = draw.randrange(3)
        assert hosts[victim].poll() is None, "the job was over before its last kill"
        hosts[victim].kill()
        hosts[victim].communicate()
        hosts[victim] = host(victim)
        kills += 1
    assert [state for state, _ in map(end, hosts)] == ["finished"] * 3
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [(tmp_path / f"{number}.jsonl").read_bytes() == whole for number in range(3)] == [True] * 3
    assert {part.name: part.read_bytes() for part in output.glob("part-*")} == {
        part.name: part.read_bytes() for part in (tmp_path / "whole").glob("part-*")
    }


def test_three_hosts_of_which_one_dies(tmp_path):
    manifest, output = write_manifest(tmp_path / "m.jsonl", 300), tmp_path / "out"
    hosts = [
        start(manifest, output, delay=0.004, group=8, shard=f"{i}/3", merge=str(tmp_path / f"{i}.jsonl"))
        for i in range(3)
    ]
    while not list(output.glob("part-*")):
        time.sleep(0.01)
    hosts[1].kill()
    hosts[1].communicate()
    results = [end(hosts[0]), end(hosts[2])]
    assert [state for state, _ in results] == ["finished", "finished"]
    assert sum(figures["records"] for _, figures in results) > 200
    merged = read_rows(tmp_path / "0.jsonl")
    assert Counter(row["id"] for row in merged) == Counter(f"r{i}" for i in range(300))
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_folder_that_others_do_not_see_is_refused(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 200)
    with pytest.raises(ValueError, match=r"no trace of another of the 2 hosts \(--shard 0/2\)"):
        do(manifest, tmp_path / "out", shard="0/2", peer_timeout=0.05)
    assert not list((tmp_path / "out").glob("part-*"))
    # Told not to wait, a host does its own; the other one sees its trace and does what is left.
    (tmp_path / "out" / next(path.name for path in (tmp_path / "out").glob("host-0*"))).unlink()
    alone = do(manifest, tmp_path / "out", shard="0/2", peer_timeout=0)
    assert alone.state == "unfinished"
    assert 0 < alone.figures["missing_shards"] <= 32
    assert alone.figures["records"] + alone.figures["left"] <= 200
    assert do(manifest, tmp_path / "out", shard="1/2", peer_timeout=5.0).state == "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_group(number, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 300)
    process = start(manifest, tmp_path / "out", delay=0.01, group=4)
    while not list((tmp_path / "out").glob("part-*")):
        time.sleep(0.01)
    process.send_signal(number)
    state, figures = end(process)
    assert (state, process.returncode) == ("unfinished", 3)
    assert 0 < figures["records"] < 300
    do(manifest, tmp_path / "whole", merge=tmp_path / "whole.jsonl")
    do(manifest, tmp_path / "out", merge=tmp_path / "all.jsonl")
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_second_signal_ends_it_at_once(tmp_path):
    process = start(write_manifest(tmp_path / "m.jsonl", 64), tmp_path / "out", delay=5.0)
    while not list((tmp_path / "out").glob("job-*")):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "stopping after" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "other"}, 'prompt is "other" and was "hear"'),
        ({"answerer": Echo(options={"temperature": 0.2})}, "options.temperature is 0.2 and was null"),
        ({"thresholds": Thresholds(fastest=3.0)}, "suspect.fastest is 3.0 and was 40.0"),
        ({"retry_suspect": True}, "suspect.retried is true and was false"),
    ],
)
def test_changed_settings_are_refused(change, message, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 20)
    do(manifest, tmp_path / "out")
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"belongs to another job: .*{message}"):
        do(manifest, tmp_path / "out", **change)
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_a_changed_manifest_is_refused(tmp_path):
    do(write_manifest(tmp_path / "m.jsonl", 20), tmp_path / "out")
    with pytest.raises(ValueError, match=r"manifest.records is 21 and was 20"):
        do(write_manifest(tmp_path / "m.jsonl", 21), tmp_path / "out")


def test_another_model_under_the_same_name_is_another_job(tmp_path):
    rng = np.random.default_rng(0)
    digests = []
    for _ in range(2):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(rng.bytes(5 << 20))
        digests.append(model_digest(tmp_path))
        assert model_digest(tmp_path) == digests[-1]
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert len({*digests, model_digest(tmp_path)}) == 3


def test_names_that_are_no_parts_do_not_count(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 40)
    do(manifest, tmp_path / "out", merge=tmp_path / "whole.jsonl")
    part = sorted((tmp_path / "out").glob("part-*"))[3]
    content = part.read_bytes()
    part.unlink()
    for name in (
        f"{part.name}.tmp",
        f".{part.name}.incomplete",
        part.name.replace("part-000", "part-"),
        f"old-{part.name}",
    ):
        (part.parent / name).write_bytes(b"not a part")
    part.with_name(part.name.replace(part.name.split(".")[1], "0123456789ab")).write_bytes(b"another job's")
    summary = do(manifest, tmp_path / "out", merge=tmp_path / "all.jsonl")
    assert summary.figures["records"] == len(content.splitlines())
    assert part.read_bytes() == content
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_part_is_named_by_the_merge(damage, tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 200)
    do(manifest, tmp_path / "out")
    part, other = sorted((tmp_path / "out").glob("part-*"))[:2]
    content = {"cut": part.read_bytes()[:-9], "empty": b"", "other": other.read_bytes()}[damage]
    part.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{part.name}: does not hold the records of its shard; remove it"):
        do(manifest, tmp_path / "out", merge=tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()
    part.unlink()
    assert do(manifest, tmp_path / "out", merge=tmp_path / "all.jsonl").state == "finished"
    assert len(read_rows(tmp_path / "all.jsonl")) == 200


def test_a_merge_in_blocks_is_the_same(tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "m.jsonl", 300)
    do(manifest, tmp_path / "out", merge=tmp_path / "one.jsonl")
    monkeypatch.setattr(parts_module, "_BLOCK", 17)
    do(manifest, tmp_path / "out", merge=tmp_path / "many.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "many.jsonl").read_bytes()


def test_too_many_errors_stop_the_run(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 200, prompt="fail")
    summary = do(manifest, tmp_path / "out", max_errors=20, group=8)
    assert summary.state == "too_many_errors"
    assert summary.figures["errors"] == 24
    assert do(manifest, tmp_path / "out").state == "finished"


def test_a_bucket_takes_parts_and_gives_manifests(object_store, tmp_path):
    clip = sounds.encode("wav", sounds.speech(8000), 16_000)
    (tmp_path / "in").mkdir()
    write_manifest(tmp_path / "in" / "m.jsonl", 150)
    (tmp_path / "in" / "0.wav").write_bytes(clip)
    stores.put(tmp_path / "in", "store://bucket/in")
    with Manifest(["store://bucket/in/m.jsonl"]) as manifest:
        assert open_clip(manifest.record(0).clips[0]) == clip
        with pytest.raises(ValueError, match=r"'store://bucket/in/1.wav' is not in its bucket"):
            open_clip(manifest.record(1).clips[0])
    with Manifest(["store://bucket/in"]) as folder:
        assert open_clip(folder.record(0).clips[0]) == clip
    object_store.fails[20] = "before"
    with pytest.raises(OSError, match="connection lost"):
        do("store://bucket/in/m.jsonl", "store://bucket/out")
    kept = {name for name in stores.objects("store://bucket/out") if name.startswith("part-")}
    assert kept
    summary = do("store://bucket/in/m.jsonl", "store://bucket/out", merge=tmp_path / "all.jsonl", shard="1/2")
    assert summary.state == "finished"
    assert summary.figures["records"] < 150
    assert [row["id"] for row in read_rows(tmp_path / "all.jsonl")] == [f"r{i}" for i in range(150)]


def test_signs_of_a_wrong_answer():
    judge = Thresholds.read().judge
    assert judge("The digits are 4 7 1 9.", audio_seconds=2.5, finish_reason="eos")["suspect"] == []
    assert judge("so " * 60, audio_seconds=20.0, finish_reason="length")["suspect"] == ["loop", "cut"]
    assert judge(" ", audio_seconds=2.0, finish_reason="eos")["suspect"] == ["empty"]
    assert judge("x" * 30 + "".join(map(str, range(60))), audio_seconds=1.0, finish_reason="eos")["suspect"] == [
        "too_fast"
    ]
    assert judge("Hm.", audio_seconds=20.0, finish_reason="eos")["suspect"] == ["too_slow"]
    assert judge("Hm.", audio_seconds=0.0, finish_reason="eos")["characters_per_second"] is None
    assert Thresholds().judge("so " * 60, audio_seconds=20.0, finish_reason="eos")["suspect"] == []


def test_suspect_answers_are_asked_once_more(tmp_path):
    class Doubtful(Echo):
        def __call__(self, records):
            rows = super().__call__(records)
            for record, row in zip(records, rows, strict=True):
                if record.id == "r3" and not record.options.get("do_sample"):
                    row["text"] = "so " * 100
                if record.id == "r4":
                    row["text"] = ""
            return rows

    manifest = write_manifest(tmp_path / "m.jsonl", 10)
    do(manifest, tmp_path / "out", answerer=Doubtful(), retry_suspect=True, merge=tmp_path / "all.jsonl")
    rows = read_rows(tmp_path / "all.jsonl")
    assert [row.get("retried") for row in rows] == [None, None, None, True, *[None] * 6]
    assert [row["suspect"] for row in rows] == [[], [], [], [], ["empty"], *[[]] * 5]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_errors_are_tried_again_when_asked(place, tmp_path, object_store):
    asked = []

    class Repaired(Echo):
        def __call__(self, records):
            asked.append([record.id for record in records])
            rows = super().__call__(records)
            if len(asked) == 1:
                rows[2] = {"id": rows[2]["id"], "error": {"kind": "url", "message": "it was away"}}
            return rows

    manifest, output = write_manifest(tmp_path / "m.jsonl", 60), tmp_path / "out"
    output = output if place == "folder" else "store://bucket/out"
    do(manifest, output, answerer=Repaired(), merge=tmp_path / "before.jsonl")
    do(manifest, output, answerer=Repaired())
    assert len(asked) == 1
    do(manifest, output, answerer=Repaired(), retry_errors=True, merge=tmp_path / "after.jsonl")
    assert asked[1:] == [[asked[0][2]]]
    do(manifest, tmp_path / "whole", merge=tmp_path / "whole.jsonl")
    assert "it was away" in (tmp_path / "before.jsonl").read_text()
    assert (tmp_path / "after.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [("fastest = -1", "fastest is -1"), ("slow = 1", "unknown key 'slow'"), ("[", "is no TOML"), (None, "No such")],
)
def test_thresholds_are_checked(text, message, tmp_path):
    if text is not None:
        (tmp_path / "t.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Thresholds.read(tmp_path / "t.toml")


def test_metrics_for_prometheus_and_as_lines(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", 30, prompt="fail")
    do(manifest, tmp_path / "a", metrics=tmp_path / "m.prom")
    assert "qwen2audio_batch_records_total 30\n" in (tmp_path / "m.prom").read_text()
    assert 'qwen2audio_batch_error_kinds_total{kind="input"} 30\n' in (tmp_path / "m.prom").read_text()
    do(manifest, tmp_path / "b", metrics=tmp_path / "m2.jsonl")
    assert read_rows(tmp_path / "m2.jsonl")[-1]["errors"] == 30


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    clip = sounds.encode("wav", sounds.speech(24_000), 16_000)
    for i in range(6):
        (tmp_path / f"{i}.wav").write_bytes(clip if i else b"")
    manifest = write_manifest(tmp_path / "m.jsonl", 6)
    found = do(manifest, tmp_path / "out", dry_run=True).figures
    assert (found["of"], found["left"], found["mean_seconds"], found["sampled"]) == (6, 6, 1.5, 6)
    assert [problem["kind"] for problem in found["problems"]] == ["empty"]
    assert not (tmp_path / "out").exists()
    do(manifest, tmp_path / "out")
    assert do(manifest, tmp_path / "out", dry_run=True).figures["left"] == 0


def test_an_answerer_travels_without_its_model():
    answerer = Answerer(options={"max_new_tokens": 5}, slots=3)
    copy = pickle.loads(pickle.dumps(answerer))
    assert copy.settings == answerer.settings
    assert copy.settings["options"] == {"max_new_tokens": 5}
    assert copy.settings != Answerer(options={"max_new_tokens": 6}).settings
    assert Answerer(slots=4).settings == Answerer(slots=5).settings
