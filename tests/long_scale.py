"""A long recording without rest: memory, and what was said and when.

    python tests/long_scale.py --hours 2 --folder /tmp/long

Strings of digits with pauses of 0.7 to 3 s, in pieces of five minutes that are made once and kept in the folder. One
process transcribes the first piece and then all of them as one file, and says what memory it had in between. With
`--warm-up` it compiles every program before the first of them.
"""

import argparse
import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
from long_sounds import RATE, spoken

PIECE = 300
TRANSCRIBE = """
import json, resource, sys, time
from qwen2audio_jax.tasks import Tasks, Transcribing, find_task
from qwen2audio_jax.tasks.transcribe import transcribe
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Tasks.from_pretrained() as tasks:
    how = Transcribing(task=find_task("transcribe", kind=tasks.kind), detector=sys.argv[3])
    if sys.argv[4:]:
        tasks.engine.warmup()
    for _ in transcribe(tasks.engine, [("piece", sys.argv[1])], how):  # compiled, and all that stays is there
        pass
    mib, began = {0: memory()}, time.monotonic()
    noted = lambda name, segment: mib.__setitem__(int(segment.end // 900) + 1, memory())
    [found] = transcribe(tasks.engine, [("all", sys.argv[2])], how, on_segment=noted)
    segments = [(segment.start, segment.end, segment.text) for segment in found.spoken]
    memories = [mib[key] for key in sorted(mib)]
    print(json.dumps({"memories": memories, "seconds": time.monotonic() - began, "segments": segments}))
"""


def main() -> None:
    """Print a line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--detector", default="energy")
    parser.add_argument("--warm-up", action="store_true", help="compile everything before the first piece")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    count = round(options.hours * 3600 / PIECE)
    said = [_piece(options.folder, number) for number in range(count)]
    whole = options.folder / f"{count}.wav"
    if not whole.exists():
        write(whole, (_samples(options.folder / f"piece-{number}.wav") for number in range(count)))
    strings = [(PIECE * i + start, PIECE * i + end, text) for i, piece in enumerate(said) for start, end, text in piece]
    command = [sys.executable, "-c", TRANSCRIBE, str(options.folder / "piece-0.wav"), str(whole), options.detector]
    command += ["warm-up"] * options.warm_up
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(json.dumps({"hours": options.hours, "detector": options.detector, **judged(found, strings)}))


def judged(found: dict, strings: list[tuple[float, float, str]]) -> dict:
    """The figures of a transcript against what was said."""
    from qwen2audio_jax.speech.scoring import edit_distance

    segments = found["segments"]
    text = " ".join(text for _, _, text in segments).split()
    truth = " ".join(text for _, _, text in strings).split()
    paired = list(zip(segments, strings, strict=True)) if len(segments) == len(strings) else []
    return {
        "strings": len(strings),
        "segments": len(segments),
        "digits": len(truth),
        "digit_errors": sum(edit_distance(said.split(), heard.split()) for (_, _, heard), (_, _, said) in paired)
        if paired
        else edit_distance(truth, text),
        "worst_seconds": max((max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in paired), default=None),
        "mib_after_a_piece_and_each_quarter_of_an_hour": [round(value / 1024) for value in found["memories"]],
        "seconds": round(found["seconds"], 1),
    }


def _piece(folder: Path, number: int) -> list[tuple[float, float, str]]:
    """What is said in a piece, which is made if it is not there."""
    text = folder / f"piece-{number}.json"
    if not text.exists():
        samples, strings = spoken(PIECE, seed=number)
        write(folder / f"piece-{number}.wav", [samples])
        text.write_text(json.dumps(strings))
    return json.loads(text.read_text())


def _samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(32768)


def write(path: Path, pieces) -> None:
    """Write pieces of samples as one wav file."""
    partial = path.with_suffix(".partial")
    with wave.open(str(partial), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        for piece in pieces:
            file.writeframes((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
    partial.rename(path)


if __name__ == "__main__":
    main()
