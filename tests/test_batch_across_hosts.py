"""A job on one mesh over several processes: what they tell each other. What they compute: test_batch_command.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from processes import free_port
from tiny_processor import write_processor_files

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.batch.across_hosts import MeshAnswerer, _decoded, _encoded
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.engine.clips import FilePiece
from qwen2audio_jax.engine.prepare import Preparation
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.outputs import GenerateOutput
from qwen2audio_jax.parallel.process_rows import from_first
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor


def test_a_record_arrives_as_it_was_sent():
    clips = ("a.wav", b"RIFF\0\xff", FilePiece("b.tar", 512, 99))
    record = Record("7", "m.jsonl:3", prompt="Wer spricht? \N{SNOWMAN}", clips=clips, options={"top_k": 3}, seed=5)
    assert _decoded(_encoded(record)) == record
    chat = Record("8", "m.jsonl:4", messages=[{"role": "user", "content": [{"type": "audio"}]}], clips=clips[:1])
    assert _decoded(_encoded(chat)) == chat


def test_one_process_tells_itself():
    assert from_first(b"abc") == b"abc"


ROOT = Path(__file__).resolve().parent.parent


class Model:
    """A model that answers with two tokens; `on_call` is called with the number of each call's first row."""

    def __init__(self, on_call):
        self.config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
        self.mesh, self.generation_config = make_mesh(data=1, model=1, devices=jax.devices()[:1]), GenerationConfig()
        self.calls, self.on_call = 0, on_call

    def generate(self, *, input_ids, **_):
        self.calls += 1
        self.on_call(self.calls)
        new = np.tile([40, 41], (len(input_ids), 1))
        rows = len(input_ids)
        return GenerateOutput(
            sequences=np.concatenate([input_ids, new], axis=1),
            lengths=np.full(rows, 2),
            finish_reasons=("length",) * rows,
            log_probs=np.full((rows, 2), -0.5, np.float32),
        )


@pytest.fixture
def answerer(tmp_path):
    def make(on_call):
        found = MeshAnswerer(slots=2)
        processor = Qwen2AudioProcessor.from_pretrained(write_processor_files(tmp_path))
        found._loaded = Model(on_call), processor
        return found

    return make


def asked(name, count):
    options = {"max_new_tokens": 2}
    return [Record(f"{name}{i}", f"m.jsonl:{i}", prompt="hello", options=options) for i in range(count)]


def test_what_comes_in_is_loaded_while_the_model_computes(answerer, monkeypatch):
    loaded, second = threading.Event(), SimpleNamespace(thread=None, rows=None)
    submit = Preparation.submit

    def noted(self, request, done):
        def over(prepared):
            done(prepared)
            if request.id == "b2":
                loaded.set()

        return submit(self, request, over)

    def on_call(number):
        if number == 1:  # another group comes in
            second.thread = threading.Thread(target=lambda: setattr(second, "rows", under_way(asked("b", 3))))
            second.thread.start()
            while not under_way._announced:
                threading.Event().wait(0.01)
        elif number == 2:  # still of the first group
            assert loaded.wait(60)

    monkeypatch.setattr(Preparation, "submit", noted)
    under_way = answerer(on_call)
    rows = under_way(asked("a", 4))
    second.thread.join(60)
    assert [row["id"] for row in rows] == ["a0", "a1", "a2", "a3"]
    assert [row["id"] for row in second.rows] == ["b0", "b1", "b2"]
    assert all(row["tokens"] == 2 for row in rows + second.rows)
    under_way.let_go(0)


def test_closing_ends_after_the_present_call_of_the_model(answerer):
    threads = []

    def on_call(number):
        threads.append(threading.Thread(target=under_way.close))
        threads[-1].start()
        assert under_way._closed.wait(60)

    under_way = answerer(on_call)
    with pytest.raises(RuntimeError, match="closed"):
        under_way(asked("a", 20))
    threads[0].join(60)
    assert under_way._loaded[0].calls == 1
    with pytest.raises(RuntimeError, match="closed"):
        under_way(asked("b", 1))
    under_way.let_go(3)
    under_way.let_go(0)  # nothing more is told


@pytest.mark.slow(seconds=90)
def test_a_signal_ends_all_processes_and_the_same_command_goes_on(tmp_path):
    """The embedded model in two processes; each is told to stop while they compute."""
    records = [{"id": f"r{i}", "prompt": f"Say {i}.", "options": {"max_new_tokens": 12}} for i in range(256)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    script = "import sys; from qwen2audio_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    environment["QWEN2AUDIO_CACHE"] = str(tmp_path / "cache")
    Qwen2AudioForConditionalGeneration.from_pretrained(cache_dir=tmp_path / "cache")  # several do not convert together

    def start():
        command = [sys.executable, "-c", script, "batch", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "out")]
        command += ["--mesh-across-hosts", "--mesh", "2x1", "--coordinator", f"127.0.0.1:{free_port()}", "--quiet"]
        command += ["--slots", "4", "--merge", str(tmp_path / "all.jsonl"), "--num-processes", "2", "--process-id"]
        return [
            subprocess.Popen([*command, str(place)], env=environment, stdout=subprocess.PIPE, text=True)
            for place in range(2)
        ]

    hosts = start()
    while not list((tmp_path / "out").glob("part-*")):
        assert hosts[0].poll() is None
        time.sleep(0.05)
    for host in hosts:
        host.send_signal(signal.SIGTERM)
    outs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [3, 3]
    told = json.loads(outs[0])
    assert (told["state"], outs[1]) == ("unfinished", "")
    hosts = start()
    for host in hosts:
        host.communicate(timeout=300)
    assert [host.returncode for host in hosts] == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert all("text" in row for row in rows)


@pytest.mark.slow(seconds=15)
def test_a_model_that_cannot_be_loaded_ends_every_process(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "a", "prompt": "Say it."}))
    (tmp_path / "model").mkdir()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    command = [sys.executable, "-m", "qwen2audio_jax", "batch", str(tmp_path / "m.jsonl"), "--output"]
    command += [str(tmp_path / "out"), "--mesh-across-hosts", "--mesh", "2x1", "--model", str(tmp_path / "model")]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    hosts = [
        subprocess.Popen([*command, str(place)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for place in range(2)
    ]
    said = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], said
    assert [out for out, _ in said] == [b"", b""]
