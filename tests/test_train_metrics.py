"""Metrics of a run: metrics.jsonl, TensorBoard events, the loss curve and the progress display."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen2audio_jax.train import extra
from qwen2audio_jax.train.curve import draw_curve
from qwen2audio_jax.train.metrics import METRICS, MetricsWriter, read_metrics
from qwen2audio_jax.train.progress import training_progress

pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, *, start_step: int, steps, value: float = 1.0) -> None:
    metrics = MetricsWriter(folder, start_step=start_step)
    for step in steps:
        metrics.write(step, {"loss": value / step, "learning_rate": 1e-3 * step}, kind="train")
        if step % 2 == 0:
            metrics.write(step, {"loss": 2 * value / step}, kind="evaluate")
    metrics.close()


def events(folder: Path) -> list:
    """What all event files of a run say, in TensorBoard's order; each record's checksums are compared."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found = []
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length, rest = data[:8], data[8:]
            size = int.from_bytes(length, "little")
            assert int.from_bytes(rest[:4], "little") == masked(length)
            record, data = rest[4 : 4 + size], rest[8 + size :]
            assert int.from_bytes(rest[4 + size : 8 + size], "little") == masked(record)
            found.append(Event.FromString(record))
    return found


def test_lines_and_events(tmp_path):
    metrics = MetricsWriter(tmp_path / "new" / "run", start_step=0)
    metrics.write(10, {"loss": jnp.float32(0.5), "targets": np.int64(7)}, kind="train")
    # Both are there before the file is closed: a run may be killed at any time.
    lines = (tmp_path / "new" / "run" / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 10, "kind": "train", "loss": 0.5, "targets": 7.0}]
    assert events(tmp_path / "new" / "run")[-1].summary.value[0].tag == "train/loss"
    metrics.write(10, {"loss": 0.25}, kind="evaluate")
    metrics.close()
    first, start, *points = events(tmp_path / "new" / "run")
    assert first.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (1, 1)
    assert [(p.step, {v.tag: v.simple_value for v in p.summary.value}) for p in points] == [
        (10, {"train/loss": 0.5, "train/targets": 7.0}),
        (10, {"evaluate/loss": 0.25}),
    ]


def test_values_that_are_not_finite_leave_valid_json(tmp_path):
    metrics = MetricsWriter(tmp_path, start_step=0)
    metrics.write(1, {"loss": float("nan"), "gradient_norm": np.float32("inf"), "x": 1}, kind="train")
    metrics.close()

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert line == {"step": 1, "kind": "train", "loss": None, "gradient_norm": None, "x": 1.0}
    loss, norm, _ = events(tmp_path)[-1].summary.value
    assert math.isnan(loss.simple_value)
    assert norm.simple_value == math.inf


def test_a_continued_run_tells_of_every_step_once(tmp_path):
    write(tmp_path, start_step=0, steps=range(1, 8))
    write(tmp_path, start_step=4, steps=range(5, 11), value=3.0)
    entries = read_metrics(tmp_path)
    assert [e["step"] for e in entries if e["kind"] == "train"] == [*range(1, 11)]
    assert [e["step"] for e in entries if e["kind"] == "evaluate"] == [2, 4, 6, 8, 10]
    assert [e["loss"] for e in entries if e["kind"] == "train"][3:5] == [1 / 4, 3 / 5]
    # TensorBoard hides what an earlier file says of the step of a session's start and later ones.
    starts = [event.step for event in events(tmp_path) if event.session_log.status]
    assert starts == [1, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, "tensorboard"]


def test_a_run_that_never_saved_begins_anew(tmp_path):
    write(tmp_path, start_step=0, steps=range(1, 4))
    write(tmp_path, start_step=0, steps=range(1, 3))
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2, 2]


def test_a_torn_last_line_is_left_out(tmp_path):
    write(tmp_path, start_step=0, steps=range(1, 4))
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 2, "kind": "tr')
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2, 2, 3]
    write(tmp_path, start_step=3, steps=[5])
    assert [e["step"] for e in read_metrics(tmp_path)] == [1, 2, 2, 3, 5]


@pytest.mark.parametrize("line", ["no JSON", '{"loss": 1}', '{"step": "x", "kind": "train"}', "[]"])
def test_a_foreign_line_is_named(line, tmp_path):
    write(tmp_path, start_step=0, steps=[1])
    with open(tmp_path / METRICS, "a") as file:
        file.write(line + "\n")
    before = (tmp_path / METRICS).read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a line of metrics; remove it or choose another"):
        MetricsWriter(tmp_path, start_step=0)
    assert (tmp_path / METRICS).read_text() == before


def test_a_killed_writer_loses_nothing_written(tmp_path):
    code = f"""
from qwen2audio_jax.train.metrics import MetricsWriter
metrics = MetricsWriter({str(tmp_path)!r}, start_step=0)
for step in range(1, 100000):
    metrics.write(step, {{"loss": 1.0}}, kind="train")
    print(step, flush=True)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        said = [int(process.stdout.readline()) for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout]
    steps = [entry["step"] for entry in read_metrics(tmp_path)]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) in (said[-1], said[-1] + 1)
    MetricsWriter(tmp_path, start_step=2).close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_the_curve_is_a_picture(tmp_path):
    pyplot = "matplotlib.pyplot" in sys.modules
    write(tmp_path, start_step=0, steps=range(1, 30))
    metrics = MetricsWriter(tmp_path, start_step=29)
    metrics.write(30, {"loss": float("nan")}, kind="train")
    metrics.close()
    path = draw_curve(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = pytest.importorskip("PIL.Image").open(path)
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # Training loss, evaluation loss and learning rate are there, each in its colour.
    for colour in ((31, 119, 180), (255, 127, 14), (127, 127, 127)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 8).sum() > 50, colour
    # pyplot chooses a backend for the whole process.
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", METRICS, "tensorboard"]


def test_the_curve_of_a_run_without_evaluation(tmp_path):
    metrics = MetricsWriter(tmp_path, start_step=0)
    metrics.write(1, {"loss": 1.0}, kind="train")
    metrics.close()
    assert draw_curve(tmp_path).stat().st_size > 1000


def test_no_metrics_no_curve(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in .*; give the output folder of a training run"):
        draw_curve(tmp_path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write(tmp_path / "run", start_step=0, steps=range(1, 3))
    assert not (tmp_path / "run").exists()
    stream = io.StringIO()
    with training_progress(10, stream=stream) as show:
        show(1, {"loss": 1.0})
    assert stream.getvalue() == ""


@pytest.mark.parametrize("name", extra.PACKAGES)
def test_a_missing_package_names_the_extra(name, tmp_path, monkeypatch):
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)

    class Missing:
        @staticmethod
        def find_spec(module, path=None, target=None):
            if module.partition(".")[0] == name:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    said = rf"training needs {name}; install it with: .*pip install .*\[train\]"
    with pytest.raises(ValueError, match=said):
        extra.import_extra(f"{name}.some.part")
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == name else object())
    with pytest.raises(ValueError, match=said):
        extra.require_extras()


def test_progress_is_a_line_a_minute_where_there_is_no_terminal():
    stream, now = io.StringIO(), [0.0]
    with training_progress(1000, stream=stream, clock=lambda: now[0]) as show:
        for step in range(401, 1001):
            show(step, {"loss": step / 1000, "tokens_per_second": 12345.6} if step % 10 == 0 else {})
            now[0] += 0.5
    assert stream.getvalue().splitlines() == [
        "step 401/1000",
        "step 521/1000, loss 0.52, tokens/s 12,346, 2 steps/s, 0:04:00 left",
        "step 641/1000, loss 0.64, tokens/s 12,346, 2 steps/s, 0:03:00 left",
        "step 761/1000, loss 0.76, tokens/s 12,346, 2 steps/s, 0:02:00 left",
        "step 881/1000, loss 0.88, tokens/s 12,346, 2 steps/s, 0:01:00 left",
        "step 1000/1000, loss 1, tokens/s 12,346, 2 steps/s, 0:00:00 left",
    ]


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with training_progress(20, stream=stream) as show:
        for step in range(6, 21):
            show(step, {"loss": 0.125, "tokens_per_second": 1e6})
    assert "20/20" in stream.getvalue()
    assert "loss=0.125, tokens/s=1,000,000" in stream.getvalue()
