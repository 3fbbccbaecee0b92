"""Whole runs from a configuration file: killed and continued, with bad numbers, and what they leave behind."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hf_layout import write_hf_checkpoint
from xla_flags import quick_flags

from qwen2audio_jax.cli.main import main
from qwen2audio_jax.train.loop import NotFinite, Run, train
from qwen2audio_jax.train.metrics import read_metrics
from qwen2audio_jax.train.settings_file import read_settings

STEPS = 12
CONFIG = f"""
model = "model"
output = "run"
steps = {STEPS}
log_every = 1
save_every = 3
evaluate_every = 6
[data]
train = ["train.jsonl"]
evaluate = ["held_out.jsonl"]
rows = 4
max_tokens = 128
max_clips = 3
frames = [80]
[augment]
gain_db = [-6, 6]
noise_probability = 0.5
time_masks = 1
[optimizer]
learning_rate = 3e-3
warmup_steps = 2
[machine]
data = 1
dtype = "float32"
remat = "none"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny checkpoint, 40 records and their clips, and a configuration."""
    folder = tmp_path_factory.mktemp("training")
    write_hf_checkpoint(folder / "model", "gqa", layers=1)
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("held_out", 6)):
        lines = []
        for index in range(count):
            clip = f"{name}{index}.wav"
            soundfile.write(folder / clip, rng.normal(size=rng.integers(4000, 12000)) * 0.1, 16000)
            answer = " ".join(rng.choice(["hello", "what", "the", "audio"], 3))
            content = [{"type": "audio", "audio": clip}, {"type": "text", "text": "what"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"id": f"{name}-{index}", "messages": messages}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def settings(place):
    return read_settings(place / "run.toml", overrides={"output": str(place / "whole")})


def losses(folder, kind="train"):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if line["kind"] == kind}


@pytest.fixture(scope="module")
def whole(settings):
    """The curve of a run that nothing interrupted."""
    seen = []
    train(settings, callbacks=[lambda step, metrics: seen.append(step)])
    assert set(range(1, STEPS + 1)) <= set(seen)
    return losses(settings.output), losses(settings.output, "evaluate")


def command(place, output, *options):
    """The command line in a process of its own, on one device."""
    environment = {**os.environ, "XLA_FLAGS": quick_flags(devices=1), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qwen2audio_jax", "train", str(place / "run.toml"), "--output", str(output), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_writes_its_curve_and_its_result(whole, settings):
    curve, held_out = whole
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert sorted(held_out) == [6, STEPS]
    assert curve[STEPS] < curve[1]
    assert held_out[STEPS] < held_out[6] < curve[1]


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow(seconds=45))])
def test_killed_at_any_moment_it_continues_with_the_same_losses(place, whole, tmp_path, times):
    """Killed while it starts, steps, saves or ends, over and over; then the same command goes through, in here."""
    output, rng, kills = tmp_path / "run", random.Random(0), 0
    for _ in range(times):
        process = command(place, output)
        started = time.monotonic()
        reach = rng.randrange(1, STEPS)
        metrics = output / "metrics.jsonl"
        while process.poll() is None and time.monotonic() - started < 120:
            done = metrics.read_text().count('"train"') if metrics.exists() else 0
            if done >= reach:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.02)
        process.kill()
        said = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), said
        kills += process.returncode != 0
    assert kills
    assert main(["train", str(place / "run.toml"), "--output", str(output)]) == 0
    curve, held_out = losses(output), losses(output, "evaluate")
    assert sorted(curve) == list(range(1, STEPS + 1))
    for step, loss in whole[0].items():
        assert curve[step] == pytest.approx(loss, rel=1e-5), step
    assert held_out == pytest.approx(whole[1], rel=1e-5)


def test_told_to_end_it_saves_first_and_continues_with_the_same_losses(settings, whole, tmp_path):
    """As a machine that is taken away tells it; not even the step of the signal is lost."""
    settings = replace(settings, output=str(tmp_path / "run"), save_every=STEPS)
    state = train(settings, callbacks=[lambda step, metrics: step == 4 and os.kill(os.getpid(), signal.SIGTERM)])
    assert int(state.step) == 5
    assert int(train(settings).step) == STEPS
    curve = losses(settings.output)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert [curve[step] for step in whole[0]] == pytest.approx(list(whole[0].values()), rel=1e-5)
    assert [line["step"] for line in read_metrics(settings.output) if line["kind"] == "train"] == list(curve)


@pytest.mark.slow(seconds=15)
def test_the_command_told_to_end_saves_first(place, tmp_path):
    output = tmp_path / "run"
    process = command(place, output, "--set", "steps=4000", "--set", "save_every=4000", "--set", "evaluate_every=0")
    metrics = output / "metrics.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (metrics.exists() and metrics.read_text().count('"train"') >= 3):
            break
        time.sleep(0.02)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert any(path.name.isdigit() for path in (output / "checkpoints").iterdir()), said


def test_another_configuration_is_not_continued(place, whole, settings):
    changed = replace(settings, optimizer=replace(settings.optimizer, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"learning_rate was 0.003 and is now 1.0.*another output folder"):
        train(changed)


def test_a_loss_that_is_not_finite_stops_with_step_and_records(settings, tmp_path, monkeypatch):
    def place(run, batch):
        places.append(batch)
        return whole(run, replace(batch, features=batch.features * np.nan) if len(places) == 3 else batch)

    whole, places = Run.place, []
    monkeypatch.setattr(Run, "place", place)
    with pytest.raises(NotFinite, match=r"step 3: loss nan.*train-\d+"):
        train(replace(settings, output=str(tmp_path / "run")))
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_rows_must_divide_over_the_mesh(settings):
    wide = replace(settings, machine=replace(settings.machine, data=8))
    with pytest.raises(ValueError, match=r"data.rows = 4 does not divide into 1 micro-batches over data = 8"):
        train(wide)


TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.train.loop import train
from qwen2audio_jax.train.settings_file import read_settings
state = train(read_settings(sys.argv[3], overrides={"output": sys.argv[4], "model": sys.argv[5], "machine.data": "2"}))
print("steps", int(state.step))
"""


@pytest.mark.slow(seconds=50)
def test_two_processes_train_one_model(place, whole, tmp_path):
    """Each reads its own rows and holds its own half of weights and moments; together they make the same curve."""
    from qwen2audio_jax.convert import convert

    checkpoint = tmp_path / "checkpoint"
    convert(place / "model", checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": quick_flags(devices=1)}
    arguments = [address, str(place / "run.toml"), str(tmp_path / "run"), str(checkpoint)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(index), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all(f"steps {STEPS}" in text for text in said)
    curve, held_out = losses(tmp_path / "run"), losses(tmp_path / "run", "evaluate")
    for step, loss in whole[0].items():
        assert curve[step] == pytest.approx(loss, rel=1e-4), step
    assert held_out == pytest.approx(whole[1], rel=1e-4)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
