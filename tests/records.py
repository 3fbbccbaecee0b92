"""Small data sets on disk for the tests of training data: clips, JSONL files and a dataset over them."""

import json

import numpy as np
import sounds
import tiny
from tiny_processor import write_processor_files

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.train.dataset import open_dataset
from qwen2audio_jax.train.settings import DataSettings

CONFIG = Qwen2AudioConfig.from_dict(tiny.CONFIGS["base"])
RAW = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def make_processor(folder, **options) -> Qwen2AudioProcessor:
    return Qwen2AudioProcessor.from_pretrained(write_processor_files(folder, **options))


def write_clip(path, samples: int, *, seed: int = 0):
    path.write_bytes(sounds.encode("wav", sounds.speech(samples, seed=seed), 16_000))
    return path


def write_records(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def chat(question, answer, *audios, **more):
    """A record of one question in the form with markers."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"audios": list(audios)} if audios else {}), **more}


def open_records(folder, records, *, processor, config=CONFIG, seed=3, **options):
    """A dataset over records that are written to `folder`; `options` are settings or `open_dataset`'s."""
    path = write_records(folder / "records.jsonl", records)
    own = {name: options.pop(name) for name in ("augment", "preferences", "split") if name in options}
    settings = {"rows": 4, "max_tokens": 160, "max_clips": 4} | options
    return open_dataset(
        DataSettings(train=(str(path),), evaluate=(str(path),), **settings),
        processor=processor,
        config=config,
        seed=seed,
        cache_dir=folder / "cache",
        **own,
    )


def unpack(batch, row: int) -> list[dict[str, np.ndarray]]:
    """The sequences of a row: their ids, targets and, for each audio position, the features its clip begins with."""
    sequences = []
    for segment in range(1, int(batch.segments[row].max()) + 1):
        at = np.flatnonzero(batch.segments[row] == segment)
        assert np.array_equal(at, np.arange(at[0], at[0] + len(at)))
        assert np.array_equal(batch.positions[row, at], np.arange(len(at)))
        sequences.append({"ids": batch.ids[row, at], "targets": batch.targets[row, at], "slots": batch.slots[row, at]})
    return sequences
