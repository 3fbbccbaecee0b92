"""The answerer of a batch job: records in, rows out, by an engine that is started at the first call."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.engine.request import Answer, Request, RequestError
from qwen2audio_jax.storage.bucket import PathOrUrl

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
    from qwen2audio_jax.engine import Engine, Handle
    from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

Row = dict[str, Any]
_UNSENT = ("_lock", "_access", "_loaded", "_running", "_failure")
"""What stays behind when an answerer is sent to another process."""


class Answerer:
    """A callable `records -> rows`; picklable, it carries settings alone and loads the model where it is called.

    A row depends on its record and the settings, not on the records beside it: greedy text is that of the model's
    `generate` with this prompt alone, drawn text depends on the record's seed. A record that cannot be answered has an
    error as its row.
    """

    def __init__(
        self,
        model: PathOrUrl = EMBEDDED,
        *,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        truncation: bool = False,
        allow_truncated: bool = False,
        track: int | None = None,
        allow_special: bool = False,
        allow_private_urls: bool = False,
        token_ids: bool = False,
        slots: int | None = None,
        positions: int | None = None,
        workers: int = 0,
        mesh: Mapping[str, Any] | None = None,
        revision: str | None = None,
        adapter: PathOrUrl | None = None,
        **loading: Any,
    ):
        """Keep the settings.

        Args:
            model: as for `from_pretrained`.
            system: system message of records that are no conversations.
            options: of `generate`, for every record that does not state its own.
            seed: for other draws than those of the same job with another one.
            truncation: keep the beginning of clips that are too long instead of refusing them.
            allow_truncated: hear files that are shorter than they say, as far as they go; their rows say so.
            track: number, from 0, of the audio track of files that have several.
            allow_special: let messages write control tokens.
            allow_private_urls: also fetch clips from addresses that are not public.
            token_ids: put the new tokens' ids into the rows.
            slots: prompts that are continued at a time; see `Engine`. Changes no answer.
            positions: of a prompt and its answer together, for which there is room; see `Engine`.
            workers: processes that load clips; see `Engine`.
            mesh: arguments of `make_mesh`; changes no answer.
            revision: as for `from_pretrained`.
            adapter: as for `from_pretrained`.
            **loading: other arguments of `from_pretrained`: dtype, cache_dir, weights_dtype, cache_dtype, attention.

        Raises:
            ValueError: a number out of range.
        """
        for name, value, least in (("slots", slots, 1), ("positions", positions, 1), ("workers", workers, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: at least {least}")
        self._model_source, self._revision, self._adapter, self._mesh = model, revision, adapter, mesh
        self._loading, self._size = loading, {"slots": slots, "positions": positions, "workers": workers}
        self._system, self._options, self._seed = system, dict(options or {}), seed
        self._audio: dict[str, Any] = {
            "truncation": truncation,
            "allow_truncated": allow_truncated,
            "track": track,
            "allow_private_urls": allow_private_urls,
        }
        self._allow_special, self._token_ids = allow_special, token_ids
        self._start()

    def _start(self) -> None:
        self._lock, self._access = threading.Lock(), _Access()
        self._loaded: tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor] | None = None
        self._running: Engine | None = None
        self._failure: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _UNSENT}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def hearing(self) -> dict[str, Any]:
        """The options of `load_audio` with which clips are loaded."""
        return dict(self._audio)

    @property
    def settings(self) -> dict[str, Any]:
        """What changes answers, as plain data: the model by its content, options, dtypes.

        Raises:
            ValueError: there is no such model.
        """
        # Imported here: with another answerer a job needs no model, and no jax.
        from qwen2audio_jax.batch.job import model_digest
        from qwen2audio_jax.checkpoint.adapter import find_adapter
        from qwen2audio_jax.source import resolve_processor_files
        from qwen2audio_jax.storage.resolve_folder import resolve_folder

        source = self._model_source
        folder = resolve_processor_files(source, revision=self._revision)
        # A hub id gives the folder of a commit.
        on_hub = source != EMBEDDED and resolve_folder(source, revision=self._revision) is None
        model = {"content": folder.name if on_hub else model_digest(folder)}  # not its path: hosts may differ in it
        adapter = None if self._adapter is None else model_digest(find_adapter(self._adapter))
        names = ("dtype", "weights_dtype", "cache_dtype")
        return {
            "model": {**model, "adapter": adapter, **{name: self._loading.get(name, "auto") for name in names}},
            "system": self._system,
            "options": self._options,
            "seed": self._seed,
            **{name: self._audio[name] for name in ("truncation", "allow_truncated", "track")},
            "allow_special": self._allow_special,
            "token_ids": self._token_ids,
        }

    def __call__(self, records: Sequence[Record]) -> list[Row]:
        """The rows of some records, in their order. Calls of several threads share the slots.

        Raises:
            ValueError: the model cannot be loaded.
            RuntimeError: the device fails on every record: it is not the records' fault.
        """
        with self._access.shared():
            outcomes = list(self._outcomes(records))
        failed = [index for index, outcome in enumerate(outcomes) if _is_device(outcome)]
        # One record may be more than the device can take, and end all that run beside it: each is tried alone, with
        # no other call's either, before it or the device is blamed.
        for index in failed:
            with self._access.alone():
                [outcomes[index]] = self._outcomes([records[index]])
        if failed and all(map(_is_device, outcomes)):
            raise RuntimeError(f"the model fails on every record: {self._failure}") from self._failure
        return [self._row(record, outcome) for record, outcome in zip(records, outcomes, strict=True)]

    def close(self) -> None:
        """End the engine; records that are under way get an error as their row."""
        with self._lock:
            engine, self._running = self._running, None
        if engine is not None:
            engine.close()

    def _outcomes(self, records: Sequence[Record]) -> Iterator[Answer | RequestError]:
        engine = self._engine()
        handles: list[Handle | RequestError] = []
        for record in records:
            try:
                handles.append(engine.submit(self._request(record)))
            except RuntimeError:  # the engine has failed meanwhile, or was closed
                handles.append(engine.end())
        for handle in handles:
            try:
                yield handle if isinstance(handle, RequestError) else handle.result()
            except RequestError as error:
                yield error
        self._failure = engine.failure or self._failure

    def _engine(self) -> "Engine":
        with self._lock:
            if self._running is not None and self._running.failure is None:
                return self._running
            # Imported here: what carries the settings about needs no jax.
            from qwen2audio_jax.engine import Engine

            model, processor = self._load()
            if self._running is not None:
                self._running.close()
            size: dict[str, Any] = {name: value for name, value in self._size.items() if value is not None}
            self._running = Engine(model, processor, allow_special=self._allow_special, **self._audio, **size)
            return self._running

    def _load(self) -> "tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]":
        if self._loaded is None:
            from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
            from qwen2audio_jax.parallel.sharding import make_mesh
            from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

            processor = Qwen2AudioProcessor.from_pretrained(self._model_source, revision=self._revision)
            model = Qwen2AudioForConditionalGeneration.from_pretrained(
                self._model_source,
                mesh=make_mesh(**self._mesh) if self._mesh else None,
                revision=self._revision,
                adapter=self._adapter,
                **self._loading,
            )
            model.generation_config.updated(**self._options)
            self._loaded = model, processor
        return self._loaded

    def _request(self, record: Record) -> Request:
        options = {**self._options, **record.options}
        if {"max_length", "max_new_tokens"} & set(record.options):
            for name in {"max_length", "max_new_tokens"} - set(record.options):
                options.pop(name, None)  # the record's limit replaces the job's, whichever name each has
        return Request(
            id=record.id,
            prompt=record.prompt,
            messages=record.messages,
            system=self._system if record.messages is None else None,
            clips=record.clips,
            options=options,
            seed=record.seed,
        )

    def _row(self, record: Record, outcome: Answer | RequestError) -> Row:
        if isinstance(outcome, RequestError):
            return {"id": record.id, "error": {"kind": outcome.kind, "message": str(outcome)}}
        mean = float(np.mean(outcome.log_probs))
        return {
            "id": record.id,
            "text": outcome.text,
            "finish_reason": outcome.finish_reason,
            "audio_seconds": outcome.audio_seconds,
            **({"truncated_audio": True} if outcome.truncated_clips else {}),
            "tokens": len(outcome.token_ids),
            "prompt_tokens": outcome.prompt_tokens,
            "mean_log_prob": round(mean, 5) if math.isfinite(mean) else None,
            "seconds": {
                "load": round(outcome.seconds.load, 3),
                "queued": round(outcome.seconds.queued, 3),
                "total": round(outcome.seconds.total, 3),
            },
            **({"token_ids": outcome.token_ids.tolist()} if self._token_ids else {}),
        }


class _Access:
    """Access of several at a time, or of one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._closed = 0, False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be inside, with others; waits while somebody is alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside alone; waits until all others have left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def _is_device(outcome: Answer | RequestError) -> bool:
    return isinstance(outcome, RequestError) and outcome.kind == "device"
