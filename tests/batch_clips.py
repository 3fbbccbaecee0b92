"""Many clips through batch jobs of every kind, judged against `generate` alone: the embedded model, real files.

Whole, by hand: `python tests/batch_clips.py --clips 500`. A job is one device, meshes of eight fake ones, three hosts
at once, three that are killed at random and started again, one that is, Ray, and a mesh over two processes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sounds
from processes import free_port

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("Which digits are spoken?", "What is said?", "Repeat after me:", "Which sound is this?")
FORMATS = ("wav", "flac", "mp3", "vorbis", "m4a")
BAD = {
    "missing": "missing",
    "empty": "empty",
    "wrong": "format",
    "nan": "not_finite",
    "long": "too_long",
    "corrupt": "corrupt",
}
JOBS = ("one", "one-killed", "4x2", "8x1", "hosts", "hosts-killed", "ray", "across-2x1", "across-1x2")


def write_clips(folder: Path, count: int, *, longest: float = 30.0) -> list[dict[str, Any]]:
    """Files of all formats and lengths, one in twenty bad, and the records that ask about them."""
    rng = np.random.default_rng(count)
    records = []
    for index in range(count):
        bad = list(BAD)[index // 20 % len(BAD)] if index % 20 == 7 else None
        kind = FORMATS[index % len(FORMATS)]
        path = folder / f"{index:04d}.{'ogg' if kind == 'vorbis' else kind}"
        rate = int(rng.choice([16_000, 24_000, 44_100]))
        seconds = float(np.exp(rng.uniform(np.log(0.3), np.log(longest))))
        if bad is None:
            path.write_bytes(sounds.encode(kind, sounds.speech(int(seconds * rate), rate=rate, seed=index), rate))
        elif bad == "nan":
            path = path.with_suffix(".wav")
            path.write_bytes(sounds.encode("wavfloat", np.full(16_000, np.nan, np.float32), 16_000))
        elif bad == "corrupt":
            path = path.with_suffix(".flac")
            whole = sounds.encode("flac", sounds.speech(16_000, seed=index), 16_000)
            path.write_bytes(whole[:400] + bytes(400) + whole[800:])
        elif bad == "long":
            path.write_bytes(sounds.encode("wav", np.full(31 * 16_000, 0.01, np.float32), 16_000))
        elif bad != "missing":
            path.write_bytes(b"" if bad == "empty" else b"%PDF-1.7 no sound here" * 9)
        record = {"id": f"clip {index}", "audio": path.name, "prompt": QUESTIONS[index % len(QUESTIONS)]}
        records.append({**record, "options": {"max_new_tokens": int(rng.integers(1, 25))}, "meta": {"bad": bad}})
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    return records


def expected(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """The text of each good record by `generate` alone."""
    from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(), Qwen2AudioProcessor.from_pretrained()
    found = {}
    for record in records:
        if record["meta"]["bad"] is None:
            content = [{"type": "audio", "audio": str(folder / record["audio"])}]
            content.append({"type": "text", "text": record["prompt"]})
            messages = [{"role": "user", "content": content}]
            inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
            ids = model.generate(**inputs, **record["options"])
            found[record["id"]] = processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return found


def job(folder: Path, how: str, *, kills: int = 3, pauses: tuple[float, float] = (5, 30)) -> tuple[Path, float]:
    """Run the job in processes of its own; the merged rows, and seconds. `pauses` bounds the seconds before a kill."""
    output, merged = folder / f"out-{how}", folder / f"{how}.jsonl"
    script = "import sys; from qwen2audio_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "batch", str(folder / "m.jsonl"), "--output", str(output), "--quiet"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    hosts = [[*command, "--merge", str(merged)]]
    if how.startswith("across-"):
        address, mesh = f"127.0.0.1:{free_port()}", how.removeprefix("across-")
        command += ["--mesh-across-hosts", "--mesh", mesh, "--coordinator", address, "--num-processes", "2"]
        hosts = [[*command, "--merge", str(merged), "--process-id", str(number)] for number in range(2)]
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    elif "x" in how:
        # On a busy machine eight threads of one process come together late.
        patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {patience}"
        environment["NPROC"] = "16"  # with as many threads as devices, XLA once waited for ever for the eighth of them
        hosts[0] += ["--mesh", how]
    elif how in ("hosts", "hosts-killed"):
        hosts = [[*command, "--shard", f"{host}/3", "--merge", f"{merged}.{host}"] for host in range(3)]
    elif how == "ray":
        hosts[0] += ["--ray", "--ray-actors", "2"]
    began = time.monotonic()
    running = [subprocess.Popen(host, env=environment, stdout=subprocess.DEVNULL) for host in hosts]
    draw = random.Random(0)
    for _ in range(kills if how.endswith("killed") else 0):
        time.sleep(draw.uniform(*pauses))
        victim = draw.randrange(len(running))
        running[victim].kill()
        running[victim].wait()
        running[victim] = subprocess.Popen(hosts[victim], env=environment, stdout=subprocess.DEVNULL)
    codes = [process.wait() for process in running]
    assert codes == [0] * len(running), codes
    if how in ("hosts", "hosts-killed"):
        Path(f"{merged}.0").rename(merged)
    return merged, time.monotonic() - began


def judge(merged: Path, records: list[dict[str, Any]], texts: dict[str, str]) -> dict[str, int]:
    """Each record has its row, in order: the text of `generate`, or the named error."""
    rows = [json.loads(line) for line in merged.read_text().splitlines()]
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    for record, row in zip(records, rows, strict=True):
        if record["meta"]["bad"] is None:
            assert row.get("text") == texts[record["id"]], (record, row)
        else:
            assert row["error"]["kind"] == BAD[record["meta"]["bad"]], (record, row)
    return {"good": len(texts), "bad": len(rows) - len(texts)}


def run(folder: Path, *, clips: int, jobs: tuple[str, ...], longest: float = 30.0) -> Iterator[dict[str, Any]]:
    """The figures of each job."""
    records = write_clips(folder, clips, longest=longest)
    texts = expected(folder, records)
    for how in jobs:
        merged, seconds = job(folder, how)
        yield {"job": how, "seconds": round(seconds, 1), **judge(merged, records, texts)}


def main() -> None:
    """Run jobs from the command line, and print a line of JSON for each."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, where it is installed, is for one process at a time
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for figures in run(Path(folder), clips=arguments.clips, jobs=tuple(arguments.jobs)):
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
