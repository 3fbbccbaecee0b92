"""How much of a batch keeps its tokens in bfloat16: rows whose greedy tokens equal those of the same row alone.

    python benchmarks/bf16_rows.py --model embedded --clips 500 --tokens 40
    python benchmarks/bf16_rows.py --model mid-size --clips 500 --tokens 8

In float32 every row keeps its tokens; in bfloat16 rounding differs with the shapes, so close calls fall either way.
Counted for batches of 1, 8 and 32 on one device and on two meshes of fake ones, beside the same count for
transformers on the same weights and clips: each against its own tokens at batch 1. `embedded` is the trained model of
the package with cuts of its clips in noise, 0.3 to 5 s long. A configuration's name is a random model, whose closest
calls are many, with clips of 0.3 to 1 s; its encoder has no positions after that second, since the reference computes
all that there are for every clip. Needs the extra `test`. All is done for 32 clips before the next 32 are begun, and
what is done is kept in --state, so that a run goes on where it was stopped (--seconds stops one), on another machine
too: tokens are compared with those of the same kind of machine; where the model's code has changed, begin a new one.
All cases stay loaded, which takes 16 GB for the mid-size model; its 500 clips take two and a half hours on two cores.
Writes results/bf16_rows_MODEL.json and .md of the groups that are whole.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices of one process take turns on a few cores: more threads than devices, and patience where they meet.
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import numpy as np
import torch
import transformers
from side_by_side import machine

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, make_mesh
from qwen2audio_jax.audio import load_audio
from qwen2audio_jax.embedded import examples, model_folder
from qwen2audio_jax.model.lengths import token_count

RESULTS = Path(__file__).resolve().parent / "results"
QUESTIONS = ("Which digits are spoken?", "Is it a high voice or a low one?", "What do you hear?")
THEIRS = "transformers"
ALONE = "1 x 1"
BATCHES = (1, 8, 32)
GROUP = max(BATCHES)
POSITIONS = 50
"""Of a random model's encoder: 1 s."""
WORDS = 10
"""Token ids after the clip of a random row."""
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What decides how a CPU's libraries compute, and so how they round."""

Row = tuple[np.ndarray, np.ndarray, int]
"""Token ids [T], features [M, max_frames] and valid frames of one clip and its question."""
Generate = Callable[[dict[str, np.ndarray]], np.ndarray]


def embedded_row(number: int, processor: Qwen2AudioProcessor) -> Row:
    """A cut of a clip of the package, quieter or louder, in noise."""
    rng = np.random.default_rng(number)
    clips = examples()
    samples = load_audio(clips[number % len(clips)])
    length = int(rng.uniform(0.3, 1) * len(samples))
    start = int(rng.integers(0, len(samples) - length + 1))
    silence = np.zeros(int(rng.uniform(0, 2) * 16_000), np.float32)
    heard = np.concatenate([samples[start : start + length], silence]) * 10 ** rng.uniform(-1, 0)
    heard += rng.normal(0, 10 ** rng.uniform(-4, -2), len(heard))
    content = [{"type": "audio", "audio": heard.astype(np.float32)}]
    content.append({"type": "text", "text": QUESTIONS[int(rng.integers(len(QUESTIONS)))]})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    return inputs.input_ids[0], inputs.input_features[0], int(inputs.feature_attention_mask.sum())


def random_row(number: int, config: Qwen2AudioConfig) -> Row:
    """A random clip of 0.3 s to all that the encoder takes, and random tokens."""
    rng, audio = np.random.default_rng(number), config.audio_config
    frames = int(rng.integers(30, audio.max_frames + 1))
    features = np.zeros((audio.num_mel_bins, audio.max_frames), np.float32)
    features[:, :frames] = rng.normal(size=(audio.num_mel_bins, frames))
    clip = np.full(token_count(frames), config.audio_token_index)
    return np.concatenate([clip, rng.integers(0, 200, WORDS)]), features, frames


def batch_of(rows: list[Row]) -> dict[str, np.ndarray]:
    """The inputs of rows, padded on the left."""
    width = max(len(ids) for ids, *_ in rows)
    features = np.stack([clip for _, clip, _ in rows])
    frames = np.array([count for *_, count in rows])
    return {
        "input_ids": np.stack([np.pad(ids, (width - len(ids), 0)) for ids, *_ in rows]).astype(np.int64),
        "attention_mask": np.stack([np.arange(width) >= width - len(ids) for ids, *_ in rows]).astype(np.int64),
        "input_features": features,
        "feature_attention_mask": (np.arange(features.shape[-1]) < frames[:, None]).astype(np.int64),
    }


def our_generate(folder: Path, *, data: int, model: int, tokens: int, cache: Path) -> Generate:
    """Greedy tokens of this package on a mesh of fake devices; one device alone is the default one."""
    devices = data * model
    mesh = make_mesh(data=data, model=model, devices=jax.devices()[:devices]) if devices > 1 else None
    loaded = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype="bfloat16", mesh=mesh, cache_dir=cache)
    return lambda inputs: np.asarray(loaded.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0))


def their_generate(folder: Path, *, tokens: int) -> Generate:
    """Greedy tokens of transformers."""
    loaded = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        tensors["input_features"] = tensors["input_features"].to(torch.bfloat16)
        return loaded.generate(**tensors, do_sample=False, max_new_tokens=tokens, pad_token_id=0).numpy()

    return generate


def runs(
    folder: Path, config: Qwen2AudioConfig, *, copies: int, tokens: int, cache: Path
) -> Iterator[tuple[str, int, Callable[[], Generate]]]:
    """(by whom and on what, batch, what loads it): one device, a mesh that splits weights, one of `copies` of them."""
    text = config.text_config
    split = next(size for size in (4, 2, 1) if text.num_attention_heads % size == text.num_key_value_heads % size == 0)
    meshes = [(1, 1, BATCHES), (8 // split, split, BATCHES[1:]), (copies, 1, BATCHES[1:])]
    for data, model, batches in meshes:
        load = partial(our_generate, folder, data=data, model=model, tokens=tokens, cache=cache)
        yield from ((f"{data} x {model}", batch, load) for batch in batches)
    for batch in BATCHES:
        yield THEIRS, batch, partial(their_generate, folder, tokens=tokens)


def rounding() -> str:
    """The kind of machine, by what decides how it rounds."""
    facts = machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    versions = (f"{name} {facts['versions'][name]}" for name in ("jax", "torch", "transformers"))
    return ", ".join([*(flag for flag in INSTRUCTIONS if flag in flags), *versions])


class Tokens:
    """Greedy tokens of clips, by the kind of machine, by whom and at which batch; kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: dict[tuple[str, str, int], dict[int, list[int]]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            *key, first, rows = json.loads(line)
            self._keep(*key, first, rows)

    def _keep(self, kind: str, by: str, batch: int, first: int, rows: list[list[int]]) -> None:
        self._rows.setdefault((kind, by, batch), {}).update({first + i: row for i, row in enumerate(rows)})

    def add(self, kind: str, by: str, batch: int, first: int, rows: list[list[int]]) -> None:
        """Keep the tokens of the clips from `first` on."""
        self._keep(kind, by, batch, first, rows)
        with self._path.open("a") as file:
            file.write(json.dumps([kind, by, batch, first, rows]) + "\n")

    def have(self, kind: str, by: str, batch: int, clips: range) -> bool:
        """Whether all these clips are there."""
        return all(clip in self._rows.get((kind, by, batch), {}) for clip in clips)

    def whole(self, clips: range, cases: list[tuple[str, int]]) -> str | None:
        """A kind of machine that has all cases of these clips."""
        kinds = dict.fromkeys(kind for kind, *_ in self._rows)
        return next((kind for kind in kinds if all(self.have(kind, *case, clips) for case in cases)), None)

    def of(self, kind: str, by: str, batch: int, clip: int) -> list[int]:
        """The tokens of a clip."""
        return self._rows[kind, by, batch][clip]


def groups(clips: int) -> list[range]:
    """The clips, by groups that are whole batches of any size."""
    return [range(first, min(first + GROUP, clips)) for first in range(0, clips, GROUP)]


def missing(
    cases: list[tuple[str, int, Callable[[], Generate]]], tokens: Tokens, kind: str, clips: range
) -> Iterator[tuple[str, int, Callable[[], Generate], range]]:
    """(by whom and on what, batch, what loads it, clips of one batch) of what a group still needs."""
    for by, batch, load in cases:
        for first in range(clips.start, clips.stop, batch):
            numbers = range(first, min(first + batch, clips.stop))
            if not tokens.have(kind, by, batch, numbers):
                yield by, batch, load, numbers


def share(tokens: Tokens, by: str, batch: int, whole: list[tuple[str, range]]) -> dict[str, Any]:
    """How many rows are equal to the same alone, and after how many tokens the others part."""
    alone = by if by == THEIRS else ALONE
    pairs = [
        (tokens.of(kind, alone, 1, clip), tokens.of(kind, by, batch, clip)) for kind, clips in whole for clip in clips
    ]
    parted = [
        next(step for step, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
        for pair in pairs
        if pair[0] != pair[1]
    ]
    equal = len(pairs) - len(parted)
    return {
        "rows": len(pairs),
        "equal": equal,
        "share": equal / len(pairs) if pairs else None,
        "median_equal_tokens_of_others": float(np.median(parted)) if parted else None,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"`{report['command']}`, {facts['date']}, {facts['cores']} cores of {facts['processor']}, {versions}; "
        f"{report['model']} in bfloat16, {report['tokens']} new tokens at most; each row beside itself alone on a CPU "
        f"of the same kind: {'; '.join(report['kinds'])}",
        "",
        "| by, on a mesh (data x model) | batch | rows | with the tokens of batch 1 | the others part after |",
        "|---|---|---|---|---|",
    ]
    for one in report["runs"]:
        if one["batch"] == 1:
            continue
        who = one["by"] if one["by"] == THEIRS else f"qwen2audio_jax, {one['by']}"
        part = one["median_equal_tokens_of_others"]
        said = "-" if part is None else f"{part:g} tokens (median)"
        lines.append(f"| {who} | {one['batch']} | {one['rows']} | {one['share']:.1%} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, or a configuration of the package")
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, between two batches")
    parser.add_argument("--state", type=Path, help="tokens so far (default: results/bf16_rows_MODEL_TOKENS.jsonl)")
    parser.add_argument("--output", type=Path, help="default: results/bf16_rows_MODEL")
    arguments = parser.parse_args()
    name, began, kind = arguments.model, time.monotonic(), rounding()
    tokens = Tokens(arguments.state or RESULTS / f"bf16_rows_{name}_{arguments.tokens}.jsonl")
    output = arguments.output or RESULTS / f"bf16_rows_{name}"
    with tempfile.TemporaryDirectory() as scratch:
        if name == "embedded":
            folder, config = model_folder(), Qwen2AudioConfig.from_pretrained(model_folder())
            processor = Qwen2AudioProcessor.from_pretrained(folder)
        else:
            folder, whole_window = Path(scratch) / "hf", Qwen2AudioConfig.from_name(name)
            audio = dataclasses.replace(whole_window.audio_config, max_source_positions=POSITIONS)
            config = dataclasses.replace(whole_window, audio_config=audio)
            torch.manual_seed(0)
            theirs = transformers.Qwen2AudioConfig.from_dict(config.to_dict())
            transformers.Qwen2AudioForConditionalGeneration(theirs).to(torch.bfloat16).save_pretrained(folder)
        copies = 8 if name == "embedded" else 2  # a large model's copies share few cores
        found = list(runs(folder, config, copies=copies, tokens=arguments.tokens, cache=Path(scratch) / "orbax"))
        cases = [(by, batch) for by, batch, _ in found]

        def row(number: int) -> Row:
            return embedded_row(number, processor) if name == "embedded" else random_row(number, config)

        loaded: dict[str, Generate] = {}

        def do(clips: range) -> bool:
            """Do what is missing of a group; False: the time is over."""
            for by, batch, load, numbers in missing(found, tokens, kind, clips):
                if time.monotonic() - began > arguments.seconds:
                    print(f"stopped in {by}, batch {batch}, at clip {numbers.start}; the same command goes on")
                    return False
                if by not in loaded:
                    loaded[by] = load()
                inputs = batch_of([row(number) for number in numbers])
                new = loaded[by](inputs)[:, inputs["input_ids"].shape[1] :]
                new = np.pad(new, ((0, 0), (0, arguments.tokens - new.shape[1])))
                tokens.add(kind, by, batch, numbers.start, new.tolist())
                print(f"{by}, batch {batch}, clips to {numbers.stop}: {time.monotonic() - began:.0f} s", flush=True)
            return True

        for clips in groups(arguments.clips):
            if tokens.whole(clips, cases) is None and not do(clips):
                break
            print(f"{clips.stop} of {arguments.clips} clips, {time.monotonic() - began:.0f} s", flush=True)
    whole = [(known, clips) for clips in groups(arguments.clips) if (known := tokens.whole(clips, cases)) is not None]
    report = {
        "command": " ".join(["python", "benchmarks/bf16_rows.py", *sys.argv[1:]]),
        "machine": machine(),
        "model": name,
        "tokens": arguments.tokens,
        "clips": arguments.clips,
        "kinds": sorted({known for known, _ in whole}),
        "runs": [{"by": by, "batch": batch, **share(tokens, by, batch, whole)} for by, batch in cases],
    }
    if not whole:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
