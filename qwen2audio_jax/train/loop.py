"""The training loop: a run from its settings to its last step, which ties all parts together."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen2audio_jax.parallel.sharding import named_sharding
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.checkpoints import Checkpoints
from qwen2audio_jax.train.curve import draw_curve
from qwen2audio_jax.train.dataset import Dataset, open_dataset
from qwen2audio_jax.train.export import check_destination, finish
from qwen2audio_jax.train.extra import require_extras
from qwen2audio_jax.train.metrics import MetricsWriter
from qwen2audio_jax.train.model_card import FinishedRun
from qwen2audio_jax.train.optimizer import learning_rate, make_optimizer
from qwen2audio_jax.train.settings import TrainSettings, check_settings
from qwen2audio_jax.train.state import TrainState, new_state, state_shardings
from qwen2audio_jax.train.step import make_evaluation, make_step
from qwen2audio_jax.train.trained_model import TrainedModel, load_model

Callback = Callable[[int, Mapping[str, float]], None]
"""Called with the step and its metrics, each time that metrics are written."""


class NotFinite(ValueError):
    """Error: the loss or its gradient is NaN or infinite; the message names the step and the records."""


@dataclass
class Interval:
    """Metrics accumulated since they were last written; values stay on the device until then."""

    steps: list[tuple[int, dict[str, jax.Array], list[str]]]
    started: float
    tokens: int = 0

    def read(self) -> dict[str, float]:
        """The means over the interval, weighted by targets.

        Raises:
            NotFinite: naming the first step whose loss or gradient is not finite, and its records.
        """
        fetched = [jax.device_get(metrics) for _, metrics, _ in self.steps]
        for (step, _, records), metrics in zip(self.steps, fetched, strict=True):
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
                raise NotFinite(
                    f"step {step}: loss {metrics['loss']:g}, gradient norm {metrics['gradient_norm']:g}; its records "
                    f"are {', '.join(records)}. Look at these, or lower optimizer.learning_rate; the last checkpoint "
                    "is from before this step"
                )
        counts = np.array([metrics["targets"] for metrics in fetched])
        seconds = max(time.monotonic() - self.started, 1e-9)
        means = {
            name: float(np.average([m[name] for m in fetched], weights=np.maximum(counts, 1))) for name in fetched[0]
        }
        means |= {name: float(fetched[-1][name]) for name in ("learning_rate",)}
        speeds = {"steps_per_second": len(fetched) / seconds, "tokens_per_second": self.tokens / seconds}
        return {**means, "targets": float(counts.sum()), **speeds}


class Run:
    """A prepared run: model, data, optimiser and earlier checkpoints. `advance` makes one step."""

    def __init__(self, settings: TrainSettings):
        check_settings(settings)
        self.settings = settings
        self.model: TrainedModel = load_model(settings)
        self.mesh: Mesh = self.model.mesh
        _check_rows(settings, mesh=self.mesh)
        self.processor = Qwen2AudioProcessor.from_pretrained(settings.model)
        self.data = self._open("train")
        self.held_out = self._open("evaluate") if settings.data.evaluate else None
        self.optimizer = make_optimizer(settings.optimizer, steps=settings.steps)
        schedule = learning_rate(settings.optimizer, steps=settings.steps)
        shardings = state_shardings(self.optimizer, self.model.weights, self.model.shardings, mesh=self.mesh)
        step = make_step(
            self.model.sums_of,
            optimizer=self.optimizer,
            schedule=schedule,
            accumulation=settings.machine.accumulation,
        )
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self._evaluate = jax.jit(make_evaluation(self.model.sums_of))
        self._shardings = shardings

    def _open(self, split: str) -> Dataset:
        settings = self.settings
        return open_dataset(
            settings.data,
            processor=self.processor,
            config=self.model.config,
            seed=settings.seed,
            augment=settings.augment,
            preferences=settings.objective.kind == "dpo",
            split=split,
        )

    def identity(self) -> dict[str, Any]:
        """The values that must be equal in a resumed run and the run that saved."""
        settings = asdict(self.settings)
        # Paths, intervals and the machine may differ.
        for name in ("model", "output", "machine", "log_every", "evaluate_every", "save_every", "keep"):
            del settings[name]
        for name in ("train", "evaluate", "audio_root", "workers"):
            del settings["data"][name]
        settings["weights"] = self.model.identity
        settings["data"]["sha256"] = self.data.sha256
        return settings

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, the target of a restored checkpoint."""
        first = partial(new_state, optimizer=self.optimizer, shardings=self._shardings, seed=self.settings.seed)
        shapes = jax.eval_shape(first, self.model.weights)
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, self._shardings
        )

    def first_state(self) -> TrainState:
        """The state before the first step."""
        with jax.set_mesh(self.mesh):
            return new_state(
                self.model.weights, optimizer=self.optimizer, shardings=self._shardings, seed=self.settings.seed
            )

    def batches(self, *, start: int) -> Iterator[tuple[TrainBatch, list[str]]]:
        """Batches from step `start` to the last, with this process's rows."""
        yield from self.data.batches(
            start=start,
            stop=self.settings.steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def place(self, batch: TrainBatch) -> TrainBatch:
        """Place a process's rows as its share of the global batch, split over the mesh's `data` axis."""
        rows = named_sharding(self.mesh, "batch")
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def advance(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Make one step; the state is donated."""
        with jax.set_mesh(self.mesh):
            return self._step(state, self.model.frozen, self.place(batch))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The objective's means over the held-out records."""
        if self.held_out is None:
            return {}
        total = None
        for batch, _ in self.held_out.batches(
            start=0, stop=None, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            with jax.set_mesh(self.mesh):
                sums = self._evaluate(state.weights, self.model.frozen, self.place(batch))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        if total is None:
            return {}
        read = jax.device_get(total)
        means = {name: float(value / read.count) for name, value in {"loss": read.loss, **read.extra}.items()}
        return {**means, "targets": float(read.count)}


def train(
    settings: TrainSettings, *, callbacks: Sequence[Callback] = (), progress: Callback | None = None
) -> TrainState:
    """Run, or continue, training.

    Args:
        settings: see `settings_file.read_settings`.
        callbacks: called with (step, metrics) whenever metrics are written.
        progress: called with (step, metrics so far) after every step; metrics may be empty.

    Returns:
        The state after the last step, or, after SIGTERM, at the step that was saved then: the same call resumes from
        there. The results are in `settings.output`: `model/` in the Hugging Face layout (and `adapter/` in PEFT's),
        metrics.jsonl, TensorBoard events, loss.png, checkpoints.

    Raises:
        ValueError: settings, data or a checkpoint that cannot be used.
        NotFinite: the loss or its gradient is not finite.
    """
    require_extras()
    check_destination(settings)
    run = Run(settings)
    output = Path(settings.output)
    checkpoints = Checkpoints(output / "checkpoints", keep=settings.keep, every=settings.save_every)
    try:
        identity = run.identity()
        state, done = checkpoints.restore(run.abstract_state(), identity=identity) or (run.first_state(), 0)
        metrics = MetricsWriter(output, start_step=done)
        try:
            state = _steps(run, state, done, checkpoints, metrics, identity, callbacks, progress)
        finally:
            metrics.close()
        if jax.process_index() == 0:
            draw_curve(output)
        if int(state.step) == settings.steps:
            finish(FinishedRun(run.settings, run.model, run.data, run.held_out), state)
        return state
    finally:
        checkpoints.close()


def _steps(
    run: Run,
    state: TrainState,
    done: int,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    identity: Mapping[str, Any],
    callbacks: Sequence[Callback],
    progress: Callback | None,
) -> TrainState:
    settings = run.settings
    interval = Interval([], time.monotonic())
    with _stop_signal() as stopped:
        for batch, records in run.batches(start=done):
            state, values = run.advance(state, batch)
            done += 1
            interval.steps.append((done, values, records))
            interval.tokens += int((batch.segments > 0).sum()) * jax.process_count()
            last = done == settings.steps or stopped()
            due = last or checkpoints.due(done)
            written: Mapping[str, float] = {}
            if done % settings.log_every == 0 or due:
                written = interval.read()
                metrics.write(done, written, kind="train")
                for callback in callbacks:
                    callback(done, written)
                interval = Interval([], time.monotonic())
            asked = settings.evaluate_every and done % settings.evaluate_every == 0
            if run.held_out and (asked or done == settings.steps):
                held_out = run.evaluate(state)
                metrics.write(done, held_out, kind="evaluate")
                for callback in callbacks:
                    callback(done, {f"evaluate_{name}": value for name, value in held_out.items()})
                interval.started = time.monotonic()
            if due:
                checkpoints.save(done, state, identity=identity)
            if progress is not None:
                progress(done, written)
            if last:
                break
    checkpoints.wait()
    return state


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """A check for SIGTERM: a preempted machine leaves time for one more checkpoint.

    Several processes must agree on their last step; for them Orbax handles the signal (`Checkpoints.due`).
    """
    received: list[int] = []
    if jax.process_count() > 1:
        yield lambda: False
        return
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread: signal handling is up to the caller
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_rows(settings: TrainSettings, *, mesh: Mesh) -> None:
    """Raise a ValueError unless every micro-batch divides over the mesh's data axis."""
    parts = settings.machine.accumulation * mesh.shape["data"]
    if settings.data.rows % parts:
        raise ValueError(
            f"data.rows = {settings.data.rows} does not divide into {settings.machine.accumulation} micro-batches over "
            f"data = {mesh.shape['data']} devices; choose a multiple of {parts}"
        )
