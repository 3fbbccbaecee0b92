"""Long jobs: how much memory a job takes, whatever its length; decoders against files that were damaged at random.

    python tests/batch_scale.py records --count 100000         # through one process, a stub answering
    python tests/batch_scale.py model --count 10000            # the embedded model answering
    python tests/batch_scale.py manifest --count 10000000      # a manifest alone
    python tests/batch_scale.py damaged --count 5000           # damaged files through worker processes

Each prints a line of JSON.
"""

import argparse
import json
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def open_files() -> int:
    """Files that this process holds open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def flatness(samples: list[int]) -> float:
    """The largest of the samples after the first tenth, divided by what there was then."""
    first = samples[max(len(samples) // 10, 1) - 1]
    return round(max(samples[len(samples) // 10 :]) / first, 4)


def records(folder: Path, count: int, *, answerer: Any = None, line: Any = None) -> dict[str, Any]:
    """A job of so many records."""
    from batch_process import Echo

    from qwen2audio_jax.batch import run_batch

    with (folder / "m.jsonl").open("w") as file:
        for index in range(count):
            file.write(json.dumps({"id": f"r{index}", **(line or {"prompt": "hear"})}) + "\n")
    samples: list[tuple[int, int]] = []
    summary = run_batch(
        [str(folder / "m.jsonl")],
        output=folder / "out",
        answerer=Echo() if answerer is None else answerer,
        on_progress=lambda figures: samples.append((resident(), open_files())),
        quiet=True,
    )
    assert summary.state == "finished"
    memory, files = zip(*samples, strict=True)
    return {
        "records": count,
        "errors": summary.figures["errors"],
        "seconds": summary.figures["seconds"],
        "largest_to_first_tenth": flatness(list(memory)),
        "resident_MiB": max(memory) >> 20,
        "open_files": [min(files), max(files)],
    }


def model(folder: Path, count: int) -> dict[str, Any]:
    """The same with the embedded model, a clip each."""
    from qwen2audio_jax.batch import Answerer
    from qwen2audio_jax.embedded import example

    line = {"audio": str(example("tone")), "prompt": "Which sound is this?", "options": {"max_new_tokens": 4}}
    answerer = Answerer(slots=8, workers=2)
    try:
        return records(folder, count, answerer=answerer, line=line)
    finally:
        answerer.close()


def manifest(folder: Path, count: int) -> dict[str, Any]:
    """A manifest of so many lines, read and checked, and some of its records."""
    from qwen2audio_jax.batch.manifest import Manifest

    path = folder / "m.jsonl"
    with path.open("w") as file:
        for start in range(0, count, 10_000):
            file.writelines(
                f'{{"id": "record-{index}", "audio": "clips/{index}.wav", "prompt": "What is said?"}}\n'
                for index in range(start, min(start + 10_000, count))
            )
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Manifest([str(path)]) as found:
        seconds = time.monotonic() - began
        assert len(found) == count
        for position in np.random.default_rng(0).integers(0, count, 1000).tolist():
            assert found.record(position).id == f"record-{position}"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "lines": count,
        "seconds": round(seconds, 1),
        "most_MiB": most >> 10,
        "most_grown_MiB": (most - before) >> 10,
    }


def damaged(folder: Path, count: int) -> dict[str, Any]:
    """Files of all formats with bytes changed, cut out, doubled and swapped, through worker processes."""
    import threading

    import sounds

    from qwen2audio_jax import Qwen2AudioProcessor
    from qwen2audio_jax.engine.prepare import Hearing, Preparation, Prepared
    from qwen2audio_jax.engine.request import Request

    rng = np.random.default_rng(0)
    kinds = [*sounds.SOUNDFILE_KINDS, *sounds.AV_KINDS]
    whole = {kind: sounds.encode(kind, sounds.speech(16_000), 16_000) for kind in kinds}
    outcomes: Counter[str] = Counter()
    room, lock = threading.Semaphore(64), threading.Lock()
    memory, files = [], []

    def done(result: Any) -> None:
        with lock:
            outcomes["heard" if isinstance(result, Prepared) else result.kind] += 1
        room.release()

    preparation = Preparation(Qwen2AudioProcessor.from_pretrained(), hearing=Hearing(), workers=2, seconds=20.0)
    began = time.monotonic()
    try:
        for index in range(count):
            room.acquire()
            preparation.submit(Request(prompt="x", clips=(spoilt(whole[kinds[index % len(kinds)]], rng),)), done)
            if index % max(count // 100, 1) == 0:
                memory.append(resident())
                files.append(open_files())
        for _ in range(64):
            assert room.acquire(timeout=120)
    finally:
        preparation.close()
    assert sum(outcomes.values()) == count
    return {
        "files": count,
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": dict(outcomes.most_common()),
        "largest_to_first_tenth": flatness(memory),
        "open_files": [min(files), max(files)],
    }


def spoilt(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with some damage."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at, size = int(rng.integers(0, max(len(data), 1))), int(rng.integers(1, 64))
        match int(rng.integers(0, 5)):
            case 0:
                data[at : at + size] = rng.bytes(len(data[at : at + size]))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data = data[: max(at, 1)]
            case _:
                data[at : at + 4] = bytes([255] * len(data[at : at + 4]))
    return bytes(data)


def main() -> None:
    """Run one of them from the command line."""
    parser = argparse.ArgumentParser()
    jobs = {"records": records, "model": model, "manifest": manifest, "damaged": damaged}
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--count", type=int, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"job": arguments.job, **jobs[arguments.job](Path(folder), arguments.count)}))


if __name__ == "__main__":
    main()
