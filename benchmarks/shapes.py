"""What is computed beside what is needed: padded shapes, and FLOPs by XLA's count and by arithmetic.

    python benchmarks/shapes.py --output benchmarks/results/shapes.md

Nothing is run: the shapes are the planner's, and the FLOPs are XLA's cost analysis of the lowered programs of the
published configuration (of lowered ones, because a compiled program's custom calls are not counted, and a loop's body
once). "Exact" is the arithmetic at every clip's and every prompt's own length, "reference" at 3000 frames for every
clip and the batch's longest prompt for every row, as transformers computes it.
"""

import argparse
import platform
import shlex
import sys
import types
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax import Qwen2AudioConfig
from qwen2audio_jax.generation import encoding, run
from qwen2audio_jax.generation.grouping import Group
from qwen2audio_jax.generation.padded_shapes import (
    CAPACITIES,
    FRAMES,
    GROUPS,
    ROWS,
    TOKENS,
    clip_groups,
    prompt_groups,
)
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.plan.work import clip_flops, prompt_flops

CONFIG = Qwen2AudioConfig.from_name("qwen2-audio-7b")
TEXT = 30
"""Text tokens of the requests whose FLOPs are counted."""

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "1 to 20 s": lambda rng, count: rng.uniform(1, 20, count),
    "10 s": lambda rng, count: np.full(count, 10.0),
    "30 s": lambda rng, count: np.full(count, 30.0),
}
REQUESTS = ((1.0,), (5.0,), (10.0,), (30.0,), (1.0, 30.0), (2.0, 5.0, 10.0, 30.0), (30.0,) * 4, (3.0,) * 8)


class Chip(types.SimpleNamespace):
    """A mesh of one device of a platform, for the planner."""

    shape = types.MappingProxyType({"data": 1, "model": 1})
    size = 1
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str):
        super().__init__(devices=np.array([[types.SimpleNamespace(platform=name)]]))


def planned(seconds: np.ndarray, text: np.ndarray, *, mesh: Chip) -> tuple[list[Group], list[Group], np.ndarray]:
    """Groups of clips and of prompts, one clip a prompt, and what is needed: frames and tokens in all."""
    frames = np.ceil(100 * seconds).astype(int)
    tokens = token_count(frames) + text
    clips = clip_groups(frames.tolist(), config=CONFIG.audio_config, mesh=mesh)
    rows = prompt_groups(tokens.tolist(), config=CONFIG, mesh=mesh)
    return clips, rows, np.array([frames.sum(), tokens.sum()])


def area(groups: Sequence[Group]) -> int:
    return sum(group.count * group.width for group in groups)


def waste() -> list[str]:
    """The table of computed / needed."""
    lines = [
        "| platform | clips | rows | frames: mean | worst | row-tokens: mean | worst | calls: encoder | prefill |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("cpu", "tpu"):
        mesh = Chip(name)
        for clips, draw in DISTRIBUTIONS.items():
            for batch in (1, 4, 8):
                rng, sums, worst, calls = np.random.default_rng(0), np.zeros((2, 2)), np.zeros(2), np.zeros(2)
                rounds = 2000 // batch
                for _ in range(rounds):
                    encoded, filled, needed = planned(draw(rng, batch), rng.integers(5, 301, batch), mesh=mesh)
                    computed = np.array([area(encoded), area(filled)])
                    sums += computed, needed
                    worst = np.maximum(worst, computed / needed)
                    calls += len(encoded), len(filled)
                mean = sums[0] / sums[1]
                lines.append(
                    f"| {name} | {clips} | {batch} | {mean[0]:.3f} | {worst[0]:.3f} | {mean[1]:.3f} | {worst[1]:.3f} | "
                    f"{calls[0] / rounds:.1f} | {calls[1] / rounds:.1f} |"
                )
    return lines


@cache
def encode_flops(clips: int, frames: int) -> float:
    """XLA's count for one call of the encoder."""
    spec = jax.ShapeDtypeStruct
    features = spec((clips, CONFIG.audio_config.num_mel_bins, frames), jnp.float32)
    lowered = encoding.encode_audio.lower(parameter_specs(CONFIG), features, spec((clips,), jnp.int32), cfg=CONFIG)
    return lowered.cost_analysis()["flops"]


@cache
def prefill_flops(rows: int, tokens: int) -> float:
    """XLA's count for one prefill."""
    spec = jax.ShapeDtypeStruct
    embeddings = spec((rows, tokens, CONFIG.text_config.hidden_size), jnp.dtype(CONFIG.dtype))
    lengths = spec((rows,), jnp.int32)
    lowered = run.prefill.lower(parameter_specs(CONFIG), embeddings, lengths, cfg=CONFIG, cache_dtype=CONFIG.dtype)
    return lowered.cost_analysis()["flops"]


def work() -> list[str]:
    """The table of FLOPs."""
    lines = [
        "| clips of | encoder calls | prefills | XLA | exact | XLA / exact | reference | reference / XLA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seconds in REQUESTS:
        clips, rows, _ = planned(np.array(seconds), np.full(len(seconds), TEXT), mesh=Chip("tpu"))
        counted = sum(encode_flops(group.count, group.width) for group in clips)
        counted += sum(prefill_flops(group.count, group.width) for group in rows)
        frames = [round(100 * each) for each in seconds]
        tokens = [int(token_count(count)) + TEXT for count in frames]
        exact = sum(clip_flops(CONFIG, frames=count) for count in frames)
        exact += sum(prompt_flops(CONFIG, tokens=count) for count in tokens)
        theirs = clip_flops(CONFIG, frames=CONFIG.audio_config.max_frames) + prompt_flops(CONFIG, tokens=max(tokens))
        theirs *= len(seconds)
        same = len(set(seconds)) == 1 < len(seconds)
        named = f"{len(seconds)} x {seconds[0]:g} s" if same else ", ".join(f"{each:g}" for each in seconds) + " s"
        shapes = (", ".join(f"{group.count} x {group.width}" for group in groups) for groups in (clips, rows))
        lines.append(
            f"| {named} | {' | '.join(shapes)} | {counted / 1e12:.2f} | {exact / 1e12:.2f} | {counted / exact:.2f} | "
            f"{theirs / 1e12:.2f} | {theirs / counted:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the report there")
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/shapes.py", *sys.argv[1:]])
    lists = {"frames": FRAMES, "tokens": TOKENS, "cache positions": CAPACITIES, "rows of a batch": ROWS}
    lists["rows of a prefill, clips of an encoder call"] = GROUPS
    report = [
        "# Shapes and what they cost",
        "",
        f"`{command}`, jax {jax.__version__}, Python {platform.python_version()}; the published configuration.",
        "",
        "## Computed / needed",
        "",
        "One clip and 5 to 300 text tokens a row, 2000 rows of each kind; the planner weighs calls by platform.",
        "",
        *waste(),
        "",
        "## FLOPs of encoder and prefill",
        "",
        f"In TFLOP; {TEXT} text tokens a row, groups as on an accelerator. XLA counts norms, softmax and activation",
        "functions too.",
        "",
        *work(),
        "",
        "## The listed shapes",
        "",
        *[f"- {name} ({len(sizes)}): {', '.join(map(str, sizes))}" for name, sizes in lists.items()],
    ]
    print("\n".join(report))
    if options.output is not None:
        options.output.write_text("\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
