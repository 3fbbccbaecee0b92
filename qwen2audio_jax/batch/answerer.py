"""The answerer of a batch job: records in, rows out, by a model that is loaded at the first call."""

import json
import math
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2audio_jax.audio import AudioError
from qwen2audio_jax.batch.clips import open_clip
from qwen2audio_jax.batch.records import Problem, Record
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.storage.bucket import PathOrUrl

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
    from qwen2audio_jax.processing.output import ProcessorOutput
    from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

Row = dict[str, Any]

FRAME_SECONDS = 0.01
"""A frame of log-mel features."""
THREADS = 8
"""Most clips that are loaded at a time."""
_OWN = str(Path(__file__).resolve().parent.parent)
_LIBRARY = "the processor or the model failed ({})"


@dataclass(frozen=True)
class Prepared:
    """A record as the model takes it: arrays of one row, and what the row is called with.

    Attributes:
        ids: [T] int32.
        features: [A, M, L] float32 and [A, L] int32; None without clips.
        options: generation options.
        audio_seconds: of all clips, to 10 ms.
        truncated: whether a clip is heard in part.
        load_seconds: what preparing it took.
    """

    record: Record
    ids: np.ndarray
    features: tuple[np.ndarray, np.ndarray] | None
    options: Mapping[str, Any]
    audio_seconds: float
    truncated: bool
    load_seconds: float

    @property
    def key(self) -> str:
        """Records with the same one can share a call: the same options and, where that counts, the same length."""
        width = len(self.ids) if "max_length" in self.options else 0
        return f"{json.dumps(self.options, sort_keys=True)} {width}"


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
        rows: int = 16,
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
            rows: prompts of one call of the model; changes no answer.
            mesh: arguments of `make_mesh`; changes no answer.
            revision: as for `from_pretrained`.
            adapter: as for `from_pretrained`.
            **loading: other arguments of `from_pretrained`: dtype, cache_dir, weights_dtype, cache_dtype, attention.

        Raises:
            ValueError: `rows` is below 1.
        """
        if rows < 1:
            raise ValueError(f"rows={rows}: a call of the model takes at least one prompt")
        self._model_source, self._revision, self._adapter, self._mesh = model, revision, adapter, mesh
        self._loading, self._rows = loading, rows
        self._system, self._options, self._seed = system, dict(options or {}), seed
        self._audio: dict[str, Any] = {
            "truncation": truncation,
            "allow_truncated": allow_truncated,
            "track": track,
            "allow_private_urls": allow_private_urls,
        }
        self._allow_special, self._token_ids = allow_special, token_ids
        self._loaded: tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

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
        """The rows of some records, in their order.

        Raises:
            ValueError: the model cannot be loaded.
            RuntimeError: the model fails on every record of a call: it is not the records' fault.
        """
        self._load()
        rows: list[Row | None] = [None] * len(records)
        waiting: dict[str, list[tuple[int, Prepared]]] = {}
        threads = min(len(records), os.cpu_count() or 1, THREADS)
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            for index, prepared in enumerate(pool.map(self._prepare, records)):
                if isinstance(prepared, Problem):
                    rows[index] = _error_row(records[index], prepared)
                    continue
                group = waiting.setdefault(prepared.key, [])
                group.append((index, prepared))
                if len(group) == self._rows:
                    self._answer(waiting.pop(prepared.key), rows)
        for group in waiting.values():
            self._answer(group, rows)
        assert None not in rows
        return rows  # type: ignore[return-value]

    def _load(self) -> "tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]":
        if self._loaded is None:
            # Imported here: what carries the settings about needs no jax.
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

    def _prepare(self, record: Record) -> Prepared | Problem:
        """A record's arrays, or what is wrong with it."""
        began = time.monotonic()
        try:
            options = self._checked_options(record)
            inputs = self._inputs(record)
            self._check_length(inputs["input_ids"].shape[1], options)
        except Exception as error:  # one record's fault is its own, whichever library noticed it
            return _problem(error)
        features, seconds = None, 0.0
        if "input_features" in inputs:
            features = inputs["input_features"], inputs["feature_attention_mask"]
            seconds = round(float(features[1].sum()) * FRAME_SECONDS, 2)
        return Prepared(
            record=record,
            ids=inputs["input_ids"][0],
            features=features,
            options=options,
            audio_seconds=seconds,
            truncated=bool(inputs.truncated_clips),
            load_seconds=time.monotonic() - began,
        )

    def _checked_options(self, record: Record) -> dict[str, Any]:
        model, _ = self._load()
        options = {**self._options, **record.options}
        if {"max_length", "max_new_tokens"} & set(record.options):
            for name in {"max_length", "max_new_tokens"} - set(record.options):
                options.pop(name, None)  # the record's limit replaces the job's, whichever name each has
        try:
            settings = model.generation_config.updated(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options: {error}") from None
        if settings.num_return_sequences != 1:
            raise ValueError("options: num_return_sequences must be 1, as a record has one answer")
        if settings.max_length is not None and settings.max_new_tokens is None:
            options["max_length"] = settings.max_length  # stated, as it makes a call's width count
        return options

    def _check_length(self, prompt: int, options: Mapping[str, Any]) -> None:
        """Refuse what would fail a whole call: more tokens than the model has positions."""
        from qwen2audio_jax.generation.call import check_positions

        model, _ = self._load()
        budget = model.generation_config.updated(**options).new_token_budget(prompt)
        check_positions(prompt, budget, config=model.config)

    def _inputs(self, record: Record) -> "ProcessorOutput":
        _, processor = self._load()
        clips = [open_clip(clip) for clip in record.clips]
        if record.prompt is not None and processor.audio_token in record.prompt:
            return processor(text=record.prompt, audio=clips or None, **self._audio)
        if record.messages is not None:
            rest = iter(clips)
            messages = [
                message
                if isinstance(message["content"], str)
                else {
                    **message,
                    "content": [
                        item if item["type"] == "text" else {"type": "audio", "audio": next(rest)}
                        for item in message["content"]
                    ],
                }
                for message in record.messages
            ]
        else:
            content: list[dict[str, Any]] = [{"type": "audio", "audio": clip} for clip in clips]
            content += [{"type": "text", "text": record.prompt}] if record.prompt else []
            messages = [{"role": "user", "content": content}]
            if self._system is not None:
                messages.insert(0, {"role": "system", "content": self._system})
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, allow_special=self._allow_special, **self._audio
        )

    def _answer(self, group: Sequence[tuple[int, Prepared]], rows: list[Row | None]) -> None:
        """Fill in the rows of records that share a call; if that fails, each is tried alone."""
        found = self._try([prepared for _, prepared in group])
        if isinstance(found, Exception) and len(group) > 1:
            failures = []
            for index, prepared in group:
                alone = self._try([prepared])
                failures += [alone] if isinstance(alone, Exception) and not _is_own(alone) else []
                rows[index] = _error_row(prepared.record, _problem(alone)) if isinstance(alone, Exception) else alone[0]
            if len(failures) == len(group):
                raise RuntimeError(f"the model fails on every record: {failures[-1]}") from failures[-1]
            return
        for position, (index, prepared) in enumerate(group):
            rows[index] = (
                _error_row(prepared.record, _problem(found)) if isinstance(found, Exception) else found[position]
            )

    def _try(self, group: Sequence[Prepared]) -> list[Row] | Exception:
        try:
            return list(self._generate(group))
        except Exception as error:  # an error of the device may have any type
            return error

    def _generate(self, group: Sequence[Prepared]) -> Iterator[Row]:
        from qwen2audio_jax.processing.padding import pad_rows

        model, processor = self._load()
        began = time.monotonic()
        inputs = pad_rows([prepared.ids for prepared in group], pad_id=processor.tokenizer.pad_token_id)
        heard = [prepared.features for prepared in group if prepared.features is not None]
        if heard:
            inputs["input_features"] = np.concatenate([features for features, _ in heard])
            inputs["feature_attention_mask"] = np.concatenate([mask for _, mask in heard])
        result = model.generate(
            **inputs,
            **group[0].options,
            seed=[prepared.record.seed for prepared in group],
            tokenizer=processor,
            return_dict_in_generate=True,
        )
        width, seconds = inputs["input_ids"].shape[1], time.monotonic() - began
        for row, prepared in enumerate(group):
            length = int(result.lengths[row])
            ids = result.sequences[row, width : width + length]
            mean = float(np.mean(result.log_probs[row, :length]))
            yield {
                "id": prepared.record.id,
                "text": processor.decode(ids, skip_special_tokens=True),
                "finish_reason": result.finish_reasons[row],
                "audio_seconds": prepared.audio_seconds,
                **({"truncated_audio": True} if prepared.truncated else {}),
                "tokens": length,
                "prompt_tokens": len(prepared.ids),
                "mean_log_prob": round(mean, 5) if math.isfinite(mean) else None,
                "seconds": {
                    "load": round(prepared.load_seconds, 3),
                    "generate": round(seconds, 3),
                    "together": len(group),
                },
                **({"token_ids": ids.tolist()} if self._token_ids else {}),
            }


def _error_row(record: Record, problem: Problem) -> Row:
    return {"id": record.id, "error": {"kind": problem.kind, "message": problem.message}}


def _problem(error: Exception) -> Problem:
    """An error in our words: its own if this package raised it, else its type alone, as libraries tell addresses."""
    if not _is_own(error):
        return Problem("failed", _LIBRARY.format(type(error).__name__))
    return Problem(error.kind if isinstance(error, AudioError) else "input", str(error))


def _is_own(error: Exception) -> bool:
    """Return True for an error of input that a module of this package raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return (
        isinstance(error, ValueError | TypeError) and bool(frames) and frames[-1][0].f_code.co_filename.startswith(_OWN)
    )
