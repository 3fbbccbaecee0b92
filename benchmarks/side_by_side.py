"""Speed beside transformers: the same random weights, inputs, threads and dtype, measured in alternation.

    python benchmarks/side_by_side.py --output benchmarks/results/side_by_side

Needs the extra `test` (torch and transformers) and about 12 GB of memory for the mid-size configuration. Both run in
one process, one after the other, each case `--rounds` times; a first token is that of a process of its own, loading
included, with the compilation cache empty (cold) and full (warm). The table gives medians in milliseconds and the time
of the reference divided by ours. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png; cases that OUTPUT.json holds from
another run on the same machine and versions stay in it unless they are measured again.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
from qwen2audio_jax.audio import log_mel
from qwen2audio_jax.generation.decoding import next_step
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.run import new_cache, sampler_state
from qwen2audio_jax.generation.sampling import NextToken
from qwen2audio_jax.generation.sampling_params import sampling_params
from qwen2audio_jax.model.lengths import token_count

SETTINGS = {"do_sample": False, "eos_token_id": [], "pad_token_id": 0}
RATE = 16_000
CONTEXT, STEPS = 800, 8
"""Tokens in the cache before the decode steps that are timed, and the number of these."""
PAUSE = 0.1
"""Seconds before each timed run."""

PARTS = "commands", "rounds", "medians_ms"
"""What a report has of each case."""

FIRST_TOKEN = {
    "theirs": """
import sys, numpy, torch, transformers
folder, inputs, dtype = sys.argv[1], dict(numpy.load(sys.argv[2])), sys.argv[3]
model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder + "/hf", dtype=getattr(torch, dtype))
tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
with torch.inference_mode():
    model.generate(**tensors, max_new_tokens=1, do_sample=False)
""",
    "ours": """
import sys, numpy
from qwen2audio_jax import Qwen2AudioForConditionalGeneration
folder, inputs, dtype = sys.argv[1], dict(numpy.load(sys.argv[2])), sys.argv[3]
model = Qwen2AudioForConditionalGeneration.from_pretrained(folder + "/hf", dtype=dtype, cache_dir=folder + "/cache")
model.generate(**inputs, max_new_tokens=1, do_sample=False)
""",
}
"""Programs that load a model of a folder and make one token of a clip of 5 s."""

Run = Callable[[], Any]


def prepare(name: str, dtype: str, folder: Path) -> tuple[Any, Any]:
    """The reference and our model, of the same random weights."""
    config = transformers.Qwen2AudioConfig.from_dict(Qwen2AudioConfig.from_name(name).to_dict())
    torch.manual_seed(0)
    theirs = transformers.Qwen2AudioForConditionalGeneration(config).to(getattr(torch, dtype)).eval()
    theirs.save_pretrained(folder / "hf")
    ours = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "hf", dtype=dtype, cache_dir=folder / "cache")
    return theirs, ours


def inputs_of(config: Qwen2AudioConfig, seconds: tuple[float, ...], text: int) -> dict[str, np.ndarray]:
    """One clip and `text` tokens a row, padded on the left."""
    rng = np.random.default_rng(0)
    audio = config.audio_config
    frames = [round(100 * each) for each in seconds]
    rows = [
        np.concatenate(
            [
                np.full(token_count(count), config.audio_token_index),
                rng.integers(0, min(1000, config.audio_token_index), text),
            ]
        )
        for count in frames
    ]
    width = max(map(len, rows))
    features = np.zeros((len(rows), audio.num_mel_bins, audio.max_frames), np.float32)
    for row, count in zip(features, frames, strict=True):
        row[:, :count] = rng.normal(size=(audio.num_mel_bins, count))
    return {
        "input_ids": np.stack([np.pad(row, (width - len(row), 0)) for row in rows]),
        "attention_mask": np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64),
        "input_features": features,
        "feature_attention_mask": (np.arange(audio.max_frames) < np.array(frames)[:, None]).astype(np.int64),
    }


def first_token(whose: str, folder: Path, dtype: str, *, cold: bool = False) -> Run:
    """A process that loads a model and makes one token; `cold` empties the compilation cache before."""
    compiled = folder / "compiled"
    environment = {**os.environ, "QWEN2AUDIO_COMPILATION_CACHE": str(compiled)}

    def run() -> None:
        if cold:
            shutil.rmtree(compiled, ignore_errors=True)
        arguments = [str(folder), str(folder / "inputs.npz"), dtype]
        subprocess.run([sys.executable, "-c", FIRST_TOKEN[whose], *arguments], env=environment, check=True)

    return run


def decode_steps(theirs: Any, ours: Any, rows: int) -> tuple[Run, Run]:
    """`STEPS` decode steps after `CONTEXT` tokens of random keys and values."""
    text, runtime = ours.config.text_config, ours.runtime
    torch_dtype = getattr(torch, ours.config.dtype)
    shape = rows, text.num_key_value_heads, CONTEXT, text.head_dim
    their_cache = transformers.DynamicCache()
    for layer in range(text.num_hidden_layers):
        their_cache.update(torch.randn(shape).to(torch_dtype), torch.randn(shape).to(torch_dtype), layer)

    def their_steps() -> None:
        if their_cache.get_seq_length() > CONTEXT:
            their_cache.crop(-STEPS)
        ids = torch.zeros(rows, 1, dtype=torch.long)
        for _ in range(STEPS):
            hidden = theirs.model.language_model(input_ids=ids, past_key_values=their_cache).last_hidden_state
            ids = theirs.lm_head(hidden).argmax(-1)

    padded = max(rows, 1 if ours.config.dtype == "float32" else 2)
    cache = new_cache(runtime, padded, 1024)
    normal = np.random.default_rng(0).normal
    keys, values = jax.tree.map(
        lambda array: jnp.asarray(normal(size=array.shape), array.dtype), (cache.keys, cache.values)
    )
    state = sampler_state(runtime, [np.zeros(1, np.int32)] * padded, rows=padded)
    sampling = sampling_params(GenerationConfig.from_dict(SETTINGS), vocab_size=text.vocab_size)
    held = [replace(cache, keys=keys, values=values)]

    def our_steps() -> None:
        cache = replace(held[0], lengths=jnp.full(padded, CONTEXT, jnp.int32))
        last = NextToken(jnp.zeros(padded, jnp.int32), jnp.zeros(padded, jnp.float32), state)
        for _ in range(STEPS):
            last, cache = next_step(runtime.decoder, last, cache, state.finished, sampling, mode="greedy")
        held[0] = jax.block_until_ready(cache)

    return their_steps, our_steps


def cases(theirs: Any, ours: Any, folder: Path, dtype: str) -> dict[str, Callable[[], tuple[Run, Run]]]:
    """Name -> a function that prepares what the reference runs, and what we run."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    config = ours.config

    def mel(seconds: int) -> tuple[Run, Run]:
        samples = np.random.default_rng(0).normal(0, 0.1, seconds * RATE).astype(np.float32)
        return (
            lambda: extractor(samples, sampling_rate=RATE, return_attention_mask=True, return_tensors="np"),
            lambda: log_mel(samples),
        )

    def encode(seconds: int) -> tuple[Run, Run]:
        inputs = inputs_of(config, (seconds,), 1)
        features, mask = inputs["input_features"], inputs["feature_attention_mask"]
        tensor = torch.from_numpy(features).to(getattr(torch, dtype))
        return (
            lambda: theirs.model.audio_tower(tensor),
            lambda: jax.block_until_ready(ours.encode_audio(features, mask)),
        )

    def generate(seconds: tuple[float, ...], tokens: int, text: int = 30) -> tuple[Run, Run]:
        inputs = inputs_of(config, seconds, text)
        if not any(seconds):
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        if "input_features" in tensors:
            tensors["input_features"] = tensors["input_features"].to(getattr(torch, dtype))
        options = {**SETTINGS, "max_new_tokens": tokens, "min_new_tokens": tokens}
        theirs_options = {**options, "eos_token_id": None}
        return lambda: theirs.generate(**tensors, **theirs_options), lambda: ours.generate(**inputs, **options)

    def load() -> tuple[Run, Run]:
        their_class, our_class = transformers.Qwen2AudioForConditionalGeneration, type(ours)
        places = {"dtype": dtype, "cache_dir": folder / "cache"}
        return (
            lambda: their_class.from_pretrained(folder / "hf", dtype=getattr(torch, dtype)),
            lambda: jax.block_until_ready(our_class.from_pretrained(folder / "hf", **places).params),
        )

    def first(*, cold: bool) -> tuple[Run, Run]:
        np.savez(folder / "inputs.npz", **inputs_of(config, (5,), 30))
        return first_token("theirs", folder, dtype), first_token("ours", folder, dtype, cold=cold)

    found = {f"log-mel {seconds} s": partial(mel, seconds) for seconds in (30, 5)}
    found |= {f"encode {seconds} s": partial(encode, seconds) for seconds in (30, 10, 5, 3, 1)}
    found["prefill of 780 tokens"] = partial(generate, (0,), 1, 780)
    for rows in (1, 4, 8):
        found[f"{STEPS} decode steps of {rows} at {CONTEXT} tokens"] = partial(decode_steps, theirs, ours, rows)
    for count in (1, 4, 8):
        found[f"{count} x 30 s + 1 token"] = partial(generate, (30,) * count, 1)
        found[f"{count} x 30 s + 32 tokens"] = partial(generate, (30,) * count, 32)
        found[f"{count} x 5 s + 32 tokens"] = partial(generate, (5,) * count, 32)
    found["8 clips of 1 to 10 s + 32 tokens"] = partial(generate, (1, 2, 3, 4, 5.5, 7, 8.5, 10), 32)
    found["load"] = load
    found["first token, cold"] = partial(first, cold=True)
    found["first token, warm"] = partial(first, cold=False)
    return found


def measure(pair: tuple[Run, Run], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in alternation, after one run of each that is not counted.

    Threads of OpenMP wait for more work for some 10 ms in a loop that takes a core; before each run they are let sleep.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for run, kept in zip(pair, times, strict=True):
            time.sleep(PAUSE)
            start = time.perf_counter()
            with torch.inference_mode():
                run()
            if turn:
                kept.append(time.perf_counter() - start)
    return times


def machine() -> dict[str, Any]:
    """Hardware and versions, as they stand beside the figures."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("jax", "flax", "torch", "transformers", "numpy")
    return {
        "date": date.today().isoformat(),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }


def kept(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """An earlier report, if it is of the same machine, versions, configuration and dtype; else an empty one."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(name) == report[name] for name in ("machine", "config", "dtype"))
    return earlier if same else {}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    commands = list(dict.fromkeys(report["commands"].values()))
    lines = [
        f"{report['config']} in {report['dtype']}, medians; {facts['date']}, {facts['cores']} cores of "
        f"{facts['processor']}, {versions}. The commands:",
        "",
        *(f"{number}. `{command}`" for number, command in enumerate(commands, start=1)),
        "",
        "| case | command | rounds | transformers, ms | qwen2audio_jax, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, (a, b) in report["medians_ms"].items():
        number = commands.index(report["commands"][name]) + 1
        lines.append(f"| {name} | {number} | {report['rounds'][name]} | {a:.1f} | {b:.1f} | {a / b:.2f} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """The ratios as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report["medians_ms"])[::-1]
    ratios = [report["medians_ms"][name][0] / report["medians_ms"][name][1] for name in names]
    figure, axes = pyplot.subplots(figsize=(7, 0.32 * len(names) + 1))
    axes.barh(names, ratios, color=["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as transformers")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Run the cases and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mid-size", help="a configuration of the package")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    parser.add_argument("--output", type=Path, default=Path("side_by_side"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        theirs, ours = prepare(arguments.config, arguments.dtype, Path(scratch))
        command = " ".join(["python", "benchmarks/side_by_side.py", *map(shlex.quote, sys.argv[1:])])
        report: dict[str, Any] = {"machine": machine(), "config": arguments.config, "dtype": arguments.dtype}
        earlier = kept(arguments.output.with_suffix(".json"), report)
        report |= {part: earlier.get(part, {}) for part in PARTS}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        found = cases(theirs, ours, Path(scratch), arguments.dtype)
        for name, prepare_case in found.items():
            if not re.search(arguments.only, name):
                continue
            rounds = min(arguments.rounds, 3) if name == "first token, cold" else arguments.rounds
            medians = [1000 * statistics.median(times) for times in measure(prepare_case(), rounds)]
            report["commands"][name], report["rounds"][name], report["medians_ms"][name] = command, rounds, medians
            print(f"{name:36}{medians[0]:10.1f}{medians[1]:10.1f}{medians[0] / medians[1]:8.2f}", flush=True)
            report |= {part: {each: report[part][each] for each in found if each in report[part]} for part in PARTS}
            arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table(report))
    plot(report, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
