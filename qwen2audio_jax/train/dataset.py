"""Data loading: records on disk to the batches of every step, prefetched in the background."""

import threading
from collections.abc import Iterator
from functools import partial
from os import PathLike
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.audio.mel import HOP, log_mel
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import default_cache_dir
from qwen2audio_jax.train.augment import augment_samples, mask_features
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.encoding import expand
from qwen2audio_jax.train.extra import import_extra
from qwen2audio_jax.train.index import Index, build_index, read_clip
from qwen2audio_jax.train.packing import Lengths, Step, frame_buckets, longest_clip, plan_epoch
from qwen2audio_jax.train.settings import AugmentSettings, DataSettings

THREADS = 2
READ_AHEAD = 4
"""Number of prefetched batches."""
PLANS_KEPT = 2
"""Cached epoch plans: prefetching spans at most two epochs at once."""
NAMED_PROBLEMS = 5
"""Maximum of bad records quoted in an error."""


class Dataset:
    """The batches of a run; made by `open_dataset`. A worker process gets a copy of it.

    Attributes:
        sha256: hex, over the records and their clips' bytes.
        skipped: a message for each skipped record, beginning with "file:line".
    """

    def __init__(
        self,
        index: Index,
        settings: DataSettings,
        *,
        config: Qwen2AudioConfig,
        seed: int,
        augment: AugmentSettings | None,
        shuffle: bool,
    ):
        self._index, self._settings, self._config = index, settings, config
        self._seed, self._augment, self._shuffle = seed, augment, shuffle
        limit = config.audio_config.max_frames
        self._buckets = frame_buckets(settings, limit=limit)
        lengths = _lengths(index)
        problems = _too_large(index, lengths, settings, longest=longest_clip(self._buckets, limit=limit))
        self._examples = np.array([n for n in range(len(index)) if n not in problems], np.int64)
        self._lengths = Lengths(*(part[self._examples] for part in (lengths.tokens, lengths.clips, lengths.frames)))
        self.skipped = [*index.problems, *problems.values()]
        self.sha256 = index.sha256
        self._plans: dict[int, list[Step]] = {}
        self._starts = [0]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of records in use."""
        return len(self._examples)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Number of steps of an epoch; it varies slightly, because each epoch is packed differently."""
        with self._lock:
            return len(self._plan(epoch))

    def batches(
        self, *, start: int = 0, stop: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[TrainBatch, list[str]]]:
        """Batches from step `start` to before step `stop`, read ahead in the background.

        Args:
            start: the first step, over all epochs.
            stop: the end; None: training continues forever, an evaluation covers the data once.
            process_index: index of this process.
            process_count: number of processes; the rows are divided equally among them.

        Yields:
            The process's rows as numpy arrays, and the ids of their records. The shapes are the same in all processes.

        Raises:
            ValueError: the rows do not divide by the processes, grain is not installed, or a clip changed since it was
                indexed and can no longer be read.
        """
        rows = self._settings.rows
        if rows % process_count:
            raise ValueError(f"data.rows = {rows} does not divide by {process_count} processes; choose a multiple")
        if stop is None:
            stop = 2**62 if self._shuffle else self.steps_per_epoch()
        share = rows // process_count
        read = partial(self._read, rows=slice(process_index * share, (process_index + 1) * share))
        grain = import_extra("grain")
        workers = self._settings.workers
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=READ_AHEAD)
        steps = grain.MapDataset.range(start, max(start, stop)).map(read).to_iter_dataset(options)
        if workers:
            _parse_flags()
            steps = steps.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
        return _closing(iter(steps), copy=workers > 0)

    def _plan(self, epoch: int) -> list[Step]:
        """The epoch's steps; `_starts[epoch]` is the number of the first. Called with the lock held."""
        # The preceding epochs determine its first step.
        for number in (*range(len(self._starts) - 1, epoch), epoch):
            if number not in self._plans:
                self._plans[number] = plan_epoch(
                    self._lengths,
                    self._settings,
                    buckets=self._buckets,
                    seed=self._seed,
                    epoch=number,
                    shuffle=self._shuffle,
                )
                if number == len(self._starts) - 1:
                    self._starts.append(self._starts[-1] + len(self._plans[number]))
        plan = self._plans[epoch] = self._plans.pop(epoch)  # now the newest
        for old in list(self._plans)[:-PLANS_KEPT]:
            del self._plans[old]
        return plan

    def _find(self, number: int) -> tuple[int, Step]:
        """The epoch of a global step, and the step."""
        with self._lock:
            while self._starts[-1] <= number:
                self._plan(len(self._starts) - 1)
            epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
            return epoch, self._plan(epoch)[number - self._starts[epoch]]

    def _read(self, number: int, *, rows: slice) -> tuple[TrainBatch, list[str]]:
        epoch, step = self._find(number)
        mine = step.rows[rows]
        batch = _empty(len(mine), step, num_mel_bins=self._config.audio_config.num_mel_bins)
        ids = []
        for r, row in enumerate(mine):
            at, clips, segments = 0, 0, 0
            for number in row:
                example = int(self._examples[number])
                at, clips, segments = self._place(batch, r, example, at=at, clips=clips, segments=segments, epoch=epoch)
                ids.append(self._index.ids[example])
        return batch, ids

    def _place(
        self, batch: TrainBatch, r: int, example: int, *, at: int, clips: int, segments: int, epoch: int
    ) -> tuple[int, int, int]:
        """Write an example into a row; returns the start of the next one: its token, clip and segment."""
        index = self._index
        used = index.clips[index.clip_starts[example] : index.clip_starts[example + 1]]
        frames = index.frames[used]
        self._place_clips(batch, r, example, used, first=clips, epoch=epoch)
        width = batch.features.shape[-1] // 4
        counts = token_count(frames)
        slots = [(clips + i) * width + np.arange(count) for i, count in enumerate(counts)]
        for segment in range(index.segment_starts[example], index.segment_starts[example + 1]):
            tokens = slice(index.token_starts[segment], index.token_starts[segment + 1])
            ids, targets, places = expand(
                index.token_ids[tokens],
                index.learnt[tokens],
                frames,
                audio_token_id=self._config.audio_token_index,
            )
            segments += 1
            here = slice(at, at + len(ids))
            batch.ids[r, here] = ids
            batch.targets[r, here] = targets
            batch.segments[r, here] = segments
            batch.positions[r, here] = np.arange(len(ids))
            if slots:
                batch.slots[r, here][places] = np.concatenate(slots)
            at += len(ids)
        return at, clips + len(used), segments

    def _place_clips(
        self, batch: TrainBatch, r: int, example: int, used: np.ndarray, *, first: int, epoch: int
    ) -> None:
        rng = np.random.default_rng((self._seed, epoch, example)) if self._augment else None
        mels, length = batch.features.shape[2:]
        for i, clip in enumerate(used):
            where, path = self._index.where[example], self._index.paths[clip]
            try:
                samples, _ = read_clip(path)
            except ValueError as error:
                raise ValueError(f"{where}: since the data was indexed, a clip has gone bad: {error}") from None
            frames = -(-len(samples) // HOP)
            if frames != self._index.frames[clip]:
                raise ValueError(
                    f"{where}: '{path}' has {frames} frames, and had {self._index.frames[clip]} when the data was "
                    "indexed; start the run again, and leave the data alone while it lasts"
                )
            if rng is not None and self._augment is not None:
                samples = augment_samples(samples, self._augment, rng)
            features, _ = log_mel(samples, num_mel_bins=mels, max_frames=length)
            if rng is not None and self._augment is not None:
                mask_features(features, frames=frames, settings=self._augment, rng=rng)
            batch.features[r, first + i] = features
            batch.frames[r, first + i] = frames


def open_dataset(
    settings: DataSettings,
    *,
    processor: Qwen2AudioProcessor,
    config: Qwen2AudioConfig,
    seed: int,
    augment: AugmentSettings | None = None,
    preferences: bool = False,
    split: str = "train",
    cache_dir: str | PathLike[str] | None = None,
) -> Dataset:
    """Check all records and clips, and open the data set at any step.

    Args:
        settings: [data].
        processor: encodes the records; its placeholder must be the model's.
        config: the model's.
        seed: of the order and of augmentation.
        augment: augmentation of training clips; evaluation clips are not augmented.
        preferences: records are pairs, chosen and rejected.
        split: which of the settings' files. "evaluate" covers them once, unshuffled.
        cache_dir: the folder for cached indexes; default: `training` in the cache folder ($QWEN2AUDIO_CACHE, else
            ~/.cache/qwen2audio_jax).

    Raises:
        ValueError: settings that do not fit the model; no records; and, unless they are to be skipped, bad records:
            the first ones are named by file and line.
    """
    if split not in ("train", "evaluate"):
        raise ValueError(f"split={split!r}; it must be 'train' or 'evaluate'")
    files = settings.train if split == "train" else settings.evaluate
    if not files:
        raise ValueError(f"data.{split} names no file")
    positions = config.text_config.max_position_embeddings
    if settings.max_tokens > positions:
        raise ValueError(f"data.max_tokens = {settings.max_tokens}, but the model has {positions} positions; lower it")
    if processor.audio_token_id != config.audio_token_index:
        raise ValueError(
            f"{processor.audio_token} is token {processor.audio_token_id} of the tokenizer and "
            f"{config.audio_token_index} of the model; take both from the same checkpoint"
        )
    training = split == "train"
    index = build_index(
        files,
        processor=processor,
        audio_root=settings.audio_root,
        preferences=preferences,
        cache_dir=default_cache_dir() / "training" if cache_dir is None else cache_dir,
    )
    dataset = Dataset(
        index, settings, config=config, seed=seed, augment=augment if training else None, shuffle=training
    )
    if dataset.skipped and settings.on_bad_record == "stop":
        shown, more = dataset.skipped[:NAMED_PROBLEMS], len(dataset.skipped) - NAMED_PROBLEMS
        rest = f"\n... and {more} more" if more > 0 else ""
        raise ValueError(
            f"{len(dataset.skipped)} bad record{'s' * (len(dataset.skipped) > 1)}; mend them, or leave them out with "
            'data.on_bad_record = "skip":\n' + "\n".join(shown) + rest
        )
    if not len(dataset):
        raise ValueError(f"data.{split}: {', '.join(map(str, files))}: no record that can be used")
    return dataset


def _lengths(index: Index) -> Lengths:
    sequences = np.diff(index.segment_starts)
    texts = np.diff(index.token_starts[index.segment_starts])
    clips = np.diff(index.clip_starts)
    frames = index.frames[index.clips]
    # The tokens that a clip adds to each of its sequences: its vectors instead of one placeholder.
    added = np.concatenate([np.zeros(1, np.int64), np.cumsum(token_count(frames) - 1)])
    added = added[index.clip_starts[1:]] - added[index.clip_starts[:-1]]
    longest = np.zeros(len(index), np.int64)
    np.maximum.at(longest, np.repeat(np.arange(len(index)), clips), frames)
    return Lengths(tokens=texts + sequences * added, clips=clips, frames=longest)


def _too_large(index: Index, lengths: Lengths, settings: DataSettings, *, longest: int) -> dict[int, str]:
    """Messages for valid records that exceed the settings, by index."""
    limits = (
        ("tokens", lengths.tokens, settings.max_tokens, "data.max_tokens"),
        ("clips", lengths.clips, settings.max_clips, "data.max_clips"),
        ("frames in its longest clip", lengths.frames, longest, "data.frames"),
    )
    problems: dict[int, str] = {}
    for name, values, limit, setting in limits:
        for n in np.flatnonzero(values > limit).tolist():
            problems.setdefault(
                n, f"{index.where[n]}: {values[n]} {name}; {setting} allows {limit}. Raise it, or shorten the record"
            )
    return problems


def _empty(rows: int, step: Step, *, num_mel_bins: int) -> TrainBatch:
    text = (rows, step.tokens)
    return TrainBatch(
        ids=np.zeros(text, np.int32),
        targets=np.full(text, -100, np.int32),
        segments=np.zeros(text, np.int32),
        positions=np.zeros(text, np.int32),
        slots=np.full(text, -1, np.int32),
        features=np.zeros((rows, step.clips, num_mel_bins, step.frames), np.float32),
        frames=np.zeros((rows, step.clips), np.int32),
    )


def _parse_flags() -> None:
    """Parse absl's flags, which Grain's worker processes read, and which must be parsed first."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _closing(steps: Any, *, copy: bool) -> Iterator[tuple[TrainBatch, list[str]]]:
    """The same items; the threads and processes behind them end with the loop that reads them.

    With `copy`, they are not in memory shared with a worker process, which lives as long as its array.
    """
    try:
        for batch, ids in steps:
            yield (jax.tree.map(np.array, batch) if copy else batch), ids
    finally:
        steps.close()
