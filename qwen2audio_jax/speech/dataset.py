"""Data set writer: examples to a folder of wav files, records.jsonl and manifest.json."""

import hashlib
import json
import multiprocessing
import wave
from collections import Counter
from os import PathLike
from pathlib import Path

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.speech import espeak
from qwen2audio_jax.speech.tasks import example

SPLITS = ("train", "test", "unseen")
# espeak-ng's noise generator keeps state between calls, so a block of examples in a new process is reproducible.
BLOCK = 20
_FOLDER = 1000


def write_dataset(out: str | PathLike[str], *, clips: int, seed: int, split: str = "train", workers: int = 2) -> dict:
    """Write `clips` examples; example i depends only on `seed`, `split` and i.

    Returns:
        the manifest.

    Raises:
        ValueError: an argument is out of range, the folder has records already, or espeak-ng is missing.
    """
    out = Path(out)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if clips < 1 or seed < 0 or workers < 1:
        raise ValueError(f"clips={clips} and workers={workers} must be at least 1, and seed={seed} at least 0")
    if (out / "records.jsonl").exists():
        raise ValueError(f"{out} has a records.jsonl already; remove it or write elsewhere")
    version = espeak.version()
    for folder in range((clips - 1) // _FOLDER + 1):
        (out / f"{folder:03d}").mkdir(parents=True, exist_ok=True)
    blocks = [(out, seed, split, i, min(i + BLOCK, clips)) for i in range(0, clips, BLOCK)]
    tasks: Counter[str] = Counter()
    digest, seconds, files = hashlib.sha256(), 0.0, 0
    partial = out / "records.jsonl.partial"
    # Each block runs in a new process, forked from one that has loaded this module but used neither espeak-ng nor JAX.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(workers, maxtasksperchild=1) as pool, partial.open("wb") as file:
        for records in pool.imap(_write_block, blocks, chunksize=1):
            for record in records:
                line = (json.dumps(record) + "\n").encode()
                file.write(line)
                digest.update(line)
                tasks[record["task"]] += 1
                seconds += sum(clip["seconds"] for clip in record["meta"]["clips"])
                files += len(record["meta"]["clips"])
            file.flush()
    manifest = {
        "seed": seed,
        "split": split,
        "examples": clips,
        "clips": files,
        "seconds": round(seconds, 1),
        "tasks": dict(sorted(tasks.items())),
        "espeak_ng": version,
        "records_sha256": digest.hexdigest(),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    partial.rename(out / "records.jsonl")
    return manifest


def _write_block(block: tuple[Path, int, str, int, int]) -> list[dict]:
    out, seed, split, start, stop = block
    records = []
    for index in range(start, stop):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        record, clips = example(rng, split)
        names = [f"{index // _FOLDER:03d}/{index:06d}{'ab'[i]}.wav" for i in range(len(clips))]
        meta = []
        for name, clip in zip(names, clips, strict=True):
            data = write_wav(out / name, clip.samples)
            meta.append(
                {
                    **clip.meta,
                    "pitch_hz": clip.pitch_hz,
                    "seconds": round(len(clip.samples) / SAMPLING_RATE, 3),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
        if "prompt" in record:
            record["audios"] = names
        else:
            items = iter(names)
            for message in record["messages"]:
                for part in message["content"] if isinstance(message["content"], list) else ():
                    if part["type"] == "audio":
                        part["audio"] = next(items)
        records.append({"id": f"{split}-{seed}-{index:06d}", **record, "meta": {"clips": meta}})
    return records


def write_wav(path: Path, samples: np.ndarray) -> bytes:
    """Write samples [n] float within -1..1 as 16-bit PCM at 16 kHz, and return the PCM bytes."""
    data = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(data)
    return data


def clips_in_both(a: str | PathLike[str], b: str | PathLike[str]) -> list[str]:
    """The sha256 sums of clips that two data folders share."""
    sums = []
    for folder in (a, b):
        with (Path(folder) / "records.jsonl").open() as lines:
            sums.append({clip["sha256"] for line in lines for clip in json.loads(line)["meta"]["clips"]})
    return sorted(sums[0] & sums[1])
