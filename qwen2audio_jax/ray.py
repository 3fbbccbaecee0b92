"""Batch jobs on Ray: actors that each hold a model answer shards, or the blocks of a Ray Data pipeline.

Extra: `ray`. `qwen2audio batch --ray [ADDRESS]` is the command; see docs/batch.md.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from qwen2audio_jax.installed import pip_install

try:
    import ray
    from ray.exceptions import RayError
except ImportError:
    raise ImportError(f"jobs on Ray need the package ray: {pip_install('ray')}") from None

from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.batch.rows import Row
from qwen2audio_jax.batch.run import Task

ATTEMPTS = 3
"""Times that a shard is given out before its records are errors."""


class _Worker:
    """An actor: it keeps what the first task brings, so that a model is loaded once."""

    def __init__(self) -> None:
        self._rows: Any = None

    def run(self, task: Task, rows: Any) -> list[Row]:
        """Answer a task's records, and write its part."""
        if self._rows is None:
            self._rows = rows
        return task.with_rows(self._rows).run()


class Cluster:
    """Actors of a Ray cluster, one for each mesh.

    A shard whose actor is lost is given to another one, `ATTEMPTS` times in all, and a new actor takes the place of the
    lost one; an error that is the same wherever it runs ends the job.
    """

    def __init__(self, address: str | None = None, *, actors: int = 1, resources: Mapping[str, float] | None = None):
        """Connect.

        Args:
            address: of the cluster, as `ray.init` takes it; None: `RAY_ADDRESS`, or one of this machine alone.
            actors: how many models are loaded.
            resources: of each, such as {"TPU": 4} or {"GPU": 1}; None: nothing is reserved.

        Raises:
            ValueError: fewer than one actor, or no cluster there.
        """
        if actors < 1:
            raise ValueError(f"actors={actors}: at least one answers")
        if not ray.is_initialized():
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False)
            except (ConnectionError, RayError, RuntimeError) as error:
                raise ValueError(f"no Ray cluster at {address}: {error}") from None
        wanted = dict(resources or {})
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": wanted.pop("GPU", 0), "resources": wanted}
        # What JAX and the package read from the environment of this process holds for the actors.
        names = ("JAX_PLATFORMS", "XLA_FLAGS", "QWEN2AUDIO_CACHE", "QWEN2AUDIO_COMPILATION_CACHE", "PYTHONPATH")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        self._kind: Any = ray.remote(**options, runtime_env={"env_vars": environment})(_Worker)
        self._count = actors

    def run(self, tasks: Iterator[Task]) -> Iterator[list[Row]]:
        """Give out tasks, one to an actor at a time; what `Task.run` gives of each, as they are done."""
        idle: list[Any] = [self._kind.remote() for _ in range(self._count)]
        running: dict[Any, tuple[Any, Task, int]] = {}
        again: list[tuple[Task, int]] = []
        common = None
        try:
            while True:
                while idle and (found := self._next(tasks, again)) is not None:
                    task, attempt = found
                    if common is None:
                        common = ray.put(task.rows)
                    actor = idle.pop()
                    running[actor.run.remote(task.with_rows(None), common)] = actor, task, attempt
                if not running:
                    return
                [done], _ = ray.wait(list(running), num_returns=1)
                actor, task, attempt = running.pop(done)
                try:
                    rows = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except RayError as error:  # the actor, its host or its result is gone
                    ray.kill(actor)
                    idle.append(self._kind.remote())
                    if attempt < ATTEMPTS:
                        again.append((task, attempt + 1))
                        continue
                    rows = task.given_up(f"its shard was lost {ATTEMPTS} times ({type(error).__name__})")
                else:
                    idle.append(actor)
                yield rows
        finally:
            for actor in [*idle, *(actor for actor, _, _ in running.values())]:
                ray.kill(actor)

    @staticmethod
    def _next(tasks: Iterator[Task], again: list[tuple[Task, int]]) -> tuple[Task, int] | None:
        if again:
            return again.pop(0)
        task = next(tasks, None)
        return None if task is None else (task, 1)


class _Block:
    """An answerer for blocks of a dataset."""

    def __init__(self, answerer: Answerer, audio: str, prompt: str | None, id: str | None):
        self._answerer, self._audio, self._prompt, self._id = answerer, audio, prompt, id

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        records = [self._record(block, index) for index in range(len(block[self._audio]))]
        rows = self._answerer(records)
        return {
            **block,
            "text": [row.get("text") for row in rows],
            "finish_reason": [row.get("finish_reason") for row in rows],
            "error": [row["error"]["message"] if "error" in row else None for row in rows],
        }

    def _record(self, block: dict[str, Any], index: int) -> Record:
        clip = block[self._audio][index]
        prompt = self._prompt if self._prompt not in block else str(block[self._prompt][index])
        id = str(index if self._id is None else block[self._id][index])
        return Record(id, "", prompt=prompt, clips=(bytes(clip) if isinstance(clip, bytes) else str(clip),))


def answer(
    dataset: Any,
    *,
    answerer: Answerer,
    audio: str = "audio",
    prompt: str | None = None,
    id: str | None = None,
    actors: int = 1,
    resources: Mapping[str, float] | None = None,
    batch_size: int = 64,
) -> Any:
    """A Ray dataset with columns `text`, `finish_reason` and `error` added.

    Args:
        dataset: `ray.data.Dataset`.
        answerer: it is sent to the actors, which load the model.
        audio: the column of clips: paths, URLs or bytes.
        prompt: a column, or the text of all prompts; None: the clip is the message.
        id: a column, from which nothing but draws depend; None: the place in the block.
        actors: how many models are loaded.
        resources: of each, as for `Cluster`.
        batch_size: records of a block.
    """
    wanted = dict(resources or {})
    return dataset.map_batches(
        _Block,
        fn_constructor_args=(answerer, audio, prompt, id),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0,  # actors that take every CPU leave none for reading, and all wait for ever
        num_gpus=wanted.pop("GPU", 0),
        resources=wanted,
    )
