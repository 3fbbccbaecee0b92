"""A batch job on one mesh over several processes, for models that one host cannot hold.

Process 0 has the job: its input, its parts, its progress. What its answerer is asked, the others are told, and compute
with it; so all make the same calls, however uneven the input is. Each group of processes along `data` loads and answers
records of its own.
"""

import base64
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.batch.signals import first_signal_ignored
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.engine.clips import Clip, FilePiece
from qwen2audio_jax.engine.prepare import Hearing, Preparation, Prepared
from qwen2audio_jax.engine.request import Answer, RequestError, Timings, as_request_error
from qwen2audio_jax.engine.work import FRAME_SECONDS
from qwen2audio_jax.generation.arguments import Arguments
from qwen2audio_jax.generation.call import check_call
from qwen2audio_jax.generation.outputs import GenerateOutput
from qwen2audio_jax.parallel.process_rows import from_first, hear_all, share_of

Row = dict[str, Any]
ROWS = 8
"""Rows that a group of processes computes at a time, unless `slots` says another number."""


@dataclass(frozen=True)
class _Loaded:
    """A record, loaded: its arrays, its own limit of new tokens, its other options and its seed."""

    prepared: Prepared
    budget: int
    options: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """Equal for records that one call can answer."""
        return json.dumps(self.options, sort_keys=True)


@dataclass(frozen=True)
class _Group:
    """Records that are answered together, and the arrays of this process's own, by index, as they are loaded."""

    records: Sequence[Record]
    arriving: Mapping[int, Future[Prepared | RequestError]]


class _Left(RuntimeError):
    """Error: the records under way are given up."""


class MeshAnswerer(Answerer):
    """An answerer on a mesh that has devices of every process of this run; settings and rows as `Answerer`'s.

    Process 0 calls it and lets the others go at the end; they call `follow`. Between two calls of the model it tells
    them what has come in meanwhile, whose clips are then loaded while the devices compute, and whether to go on. When
    one process dies, JAX ends the others; the same command goes on with the job.
    """

    def _start(self) -> None:
        super()._start()
        self._turn = threading.Lock()  # the calls of all processes have one order
        self._preparation: Preparation | None = None
        self._numbers = itertools.count()
        self._announced: deque[tuple[int, Sequence[Record]]] = deque()
        self._groups: dict[int, _Group] = {}
        self._closed = threading.Event()
        self._gone = False

    def __call__(self, records: Sequence[Record]) -> list[Row]:
        """The rows of some records, in their order; in process 0.

        Raises:
            ValueError: the model cannot be loaded.
            RuntimeError: it is closed, by now or before they are all answered.
        """
        number = next(self._numbers)
        self._announced.append((number, records))
        with self._turn:
            if self._closed.is_set():
                raise _Left("the answerer is closed")
            self._heed(self._message(answer=number))
            return self._rows(number)

    def follow(self) -> int:
        """Compute with process 0 until it lets go; in every other process. Returns what it said then.

        The first SIGTERM or SIGINT is left to process 0, which ends the job in order.
        """
        with first_signal_ignored():
            while (told := self._heed(None))["code"] is None:
                with suppress(_Left):
                    self._rows(told["answer"])
        self._end()
        return int(told["code"])

    def close(self) -> None:
        """Give up the records that are under way, once the model's present call is over; in process 0."""
        self._closed.set()
        with self._turn:
            pass

    def let_go(self, code: int = 0) -> None:
        """Close, and let the other processes go, with a number; in process 0."""
        self.close()
        if not self._gone:
            self._gone = True
            _tell({"load": [], "answer": None, "go": False, "code": code})
            self._end()

    def _end(self) -> None:
        if self._preparation is not None:
            self._preparation.close()

    def _message(self, answer: int | None = None) -> dict[str, Any]:
        """What process 0 has to tell now: the records that came in, and whether to go on."""
        load = []
        while self._announced:
            number, records = self._announced.popleft()
            load.append([number, [_encoded(record) for record in records]])
        return {"load": load, "answer": answer, "go": not self._closed.is_set(), "code": None}

    def _heed(self, message: Mapping[str, Any] | None) -> dict[str, Any]:
        """Hear what process 0 tells, which gives the message, and begin to load what it names."""
        told = _tell(message)
        if told["load"]:
            try:
                self._load()
            except Exception:  # as in every process: nobody listens any more
                self._gone = True
                raise
        for number, encoded in told["load"]:
            self._groups[number] = self._begin([_decoded(fields) for fields in encoded])
        return told

    def _go_on(self) -> None:
        """Between two calls of the model; raises `_Left` in all processes if process 0 is closed."""
        if not self._heed(None if jax.process_index() else self._message())["go"]:
            raise _Left("the answerer was closed")

    def _rows(self, number: int) -> list[Row]:
        (model, _), group = self._load(), self._groups.pop(number)
        records, share = group.records, share_of(model.mesh)
        loaded = {index: self._checked(records[index], future.result()) for index, future in group.arriving.items()}
        outcomes: dict[int, Answer | RequestError] = {
            index: value for index, value in loaded.items() if isinstance(value, RequestError)
        }
        good = {index: value for index, value in loaded.items() if isinstance(value, _Loaded)}
        keys = self._agreed({index: good[index].key if index in good else None for index in loaded})
        failed: list[int] = []
        for key in dict.fromkeys(keys.values()):
            same = [index for index in keys if keys[index] == key]
            parts = [[index for index in same if index % share.groups == place] for place in range(share.groups)]
            size = self._size["slots"] or ROWS
            # Prompts of similar length together; the other groups have their own order.
            mine = sorted(parts[share.group], key=lambda index: len(good[index].prepared.ids))
            for start in range(0, max(map(len, parts)), size):
                self._go_on()
                failed += self._answer(mine[start : start + size], good, json.loads(key), outcomes)
        # Beside one that cannot be answered others may be sound: each is tried alone in the mesh.
        for index in sorted({index for said in self._hear(failed) for index in said}):
            self._go_on()
            self._answer([index] if index in good else [], good, json.loads(keys[index]), outcomes)
        said = self._hear({index: self._row(records[index], outcome) for index, outcome in outcomes.items()})
        rows = {int(index): row for part in reversed(said) for index, row in part.items()}
        return [rows[index] for index in range(len(records))]

    def _begin(self, records: Sequence[Record]) -> _Group:
        """Begin to load those of some records that are this process's."""
        model, processor = self._load()
        share = share_of(model.mesh)
        if self._preparation is None:
            hearing = Hearing(**self._audio, allow_special=self._allow_special)
            self._preparation = Preparation(processor, hearing=hearing, workers=self._size["workers"] or 0)
        arriving: dict[int, Future[Prepared | RequestError]] = {}
        for index in range(share.group, len(records), share.groups):
            future = arriving[index] = Future[Prepared | RequestError]()
            try:
                self._preparation.submit(self._request(records[index]), future.set_result)
            except Exception as error:  # one record's fault is its own
                future.set_result(as_request_error(error))
        return _Group(records, arriving)

    def _checked(self, record: Record, prepared: Prepared | RequestError) -> "_Loaded | RequestError":
        if isinstance(prepared, RequestError):
            return prepared
        model, processor = self._load()
        options = dict(self._request(record).options)
        try:
            arguments = Arguments(**_inputs([prepared], model.config), tokenizer=processor, options=options)
            call = check_call(arguments, defaults=model.generation_config, config=model.config)
            if call.copies != 1:
                raise ValueError(f"num_return_sequences={call.copies}: a record has one answer")
            needed, room = len(prepared.ids) + call.budget - 1, self._size["positions"]
            if room is not None and needed > room:
                raise ValueError(f"prompt and answer take {needed} positions, and the job has {room}: raise positions")
        except Exception as error:
            return as_request_error(error)
        rest = {name: value for name, value in options.items() if name not in ("max_length", "max_new_tokens")}
        return _Loaded(prepared, call.budget, rest, record.seed)

    def _answer(
        self,
        indices: Sequence[int],
        loaded: Mapping[int, _Loaded],
        options: Mapping[str, Any],
        outcomes: dict[int, Answer | RequestError],
    ) -> list[int]:
        """Put the outcomes of some rows of this process (or of none) in; returned are those that failed, together."""
        model, processor = self._load()
        rows, began = [loaded[index] for index in indices], time.monotonic()
        try:
            output = model.generate(
                **_inputs([row.prepared for row in rows], model.config),
                seed=[row.seed for row in rows] or [0],
                tokenizer=processor,
                return_dict_in_generate=True,
                max_new_tokens=max((row.budget for row in rows), default=1),
                **options,
            )
        except ValueError as error:
            outcomes.update(dict.fromkeys(indices, as_request_error(error)))
            return list(indices)
        seconds = time.monotonic() - began
        for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
            answer = _answer_of(output, place, row, seconds=seconds, audio_token_id=model.config.audio_token_index)
            outcomes[index] = replace(answer, text=processor.decode(answer.token_ids, skip_special_tokens=True))
        return []

    def _agreed(self, keys: Mapping[int, str | None]) -> dict[int, str]:
        """The keys of the records that every process which has them could load, in their order."""
        said = [(int(index), key) for part in self._hear(keys) for index, key in part.items()]
        failed = {index for index, key in said if key is None}
        return {index: key for index, key in sorted(said) if key is not None and index not in failed}

    def _hear(self, said: Any) -> list[Any]:
        """What every process says, by process."""
        model, _ = self._load()
        return [json.loads(text) for text in hear_all(model.mesh, json.dumps(said))]


def _tell(message: Mapping[str, Any] | None) -> dict[str, Any]:
    """The message of process 0, in all processes; the others give None."""
    told: dict[str, Any] = json.loads(from_first(json.dumps(message).encode()))
    return told


def _encoded(record: Record) -> dict[str, Any]:
    def plain(clip: Clip) -> Any:
        if isinstance(clip, bytes):
            return {"base64": base64.b64encode(clip).decode()}
        return asdict(clip) if isinstance(clip, FilePiece) else clip

    names = ("id", "where", "prompt", "messages", "options", "seed")
    return {**{name: getattr(record, name) for name in names}, "clips": [plain(clip) for clip in record.clips]}


def _decoded(fields: Mapping[str, Any]) -> Record:
    def clip(plain: Any) -> Clip:
        if isinstance(plain, str):
            return plain
        return base64.b64decode(plain["base64"]) if "base64" in plain else FilePiece(**plain)

    return Record(**{**fields, "clips": tuple(map(clip, fields["clips"]))})


def _inputs(prompts: Sequence[Prepared], config: Qwen2AudioConfig) -> dict[str, Any]:
    """Arguments of `generate` for some prompts; of none, those of a row that is computed for nothing."""
    width = max((len(prompt.ids) for prompt in prompts), default=1)
    ids = np.zeros((max(len(prompts), 1), width), np.int32)
    mask = np.zeros_like(ids)
    mask[0, 0] = 1
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)], mask[row, : len(prompt.ids)] = prompt.ids, 1
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    clips = [clip for prompt in prompts for clip in zip(prompt.features, prompt.frames, strict=True)]
    if clips:
        audio = config.audio_config
        features = np.zeros((len(clips), audio.num_mel_bins, audio.max_frames), np.float32)
        valid = np.zeros((len(clips), audio.max_frames), np.int32)
        for place, (clip, frames) in enumerate(clips):
            features[place, :, : clip.shape[1]], valid[place, :frames] = clip, 1
        found.update(input_features=features, feature_attention_mask=valid)
    return found


def _answer_of(output: GenerateOutput, place: int, row: _Loaded, *, seconds: float, audio_token_id: int) -> Answer:
    """A row's answer without its text, cut at its own limit; those beside it may have had a larger one."""
    count = min(int(output.lengths[place]), row.budget)
    start = output.sequences.shape[1] - output.log_probs.shape[1]
    whole = count == output.lengths[place]
    return Answer(
        id="",
        text="",
        token_ids=output.sequences[place, start : start + count],
        log_probs=output.log_probs[place, :count],
        finish_reason=output.finish_reasons[place] if whole else "length",
        prompt_tokens=len(row.prepared.ids),
        audio_tokens=int((row.prepared.ids == audio_token_id).sum()),
        reused_tokens=0,
        audio_seconds=round(sum(row.prepared.frames) * FRAME_SECONDS, 2),
        truncated_clips=row.prepared.truncated_clips,
        seconds=Timings(
            load=row.prepared.seconds, queued=0.0, first_token=seconds, total=row.prepared.seconds + seconds
        ),
    )
