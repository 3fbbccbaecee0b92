"""Programs of few rows, compiled as usual and with Eigen's products, in alternation; see `generation.programs`.

    python benchmarks/few_rows.py

Random weights of configs/mid-size.json in float32: clips, prompts, rests of prompts after 800 cached tokens, and decode
steps at 800 tokens, of several sizes. Medians in milliseconds, and the usual program's time divided by Eigen's: it says
for which rows `programs` should choose Eigen on this processor. Results: results/few_rows.md.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation import decoding, encoding, run
from qwen2audio_jax.generation.programs import ByRows
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.model.qwen2_audio import init_params

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, CAPACITY = 800, 896

Run = Callable[[Any], Any]
"""Runs one of the two programs, once."""


def random(*shape: int) -> jax.Array:
    """Random numbers, float32."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def held_cache(runtime: Runtime, rows: int) -> list[Any]:
    """A cache of random keys and values, in a list: each program takes it and leaves another."""
    cache = run.new_cache(runtime, rows, CAPACITY)
    keys, values = jax.tree.map(lambda array: random(*array.shape), (cache.keys, cache.values))
    return [replace(cache, keys=keys, values=values)]


def cases(runtime: Runtime) -> Iterator[tuple[str, ByRows, Run]]:
    """Names, programs and how each is run."""
    config, params = runtime.config, runtime.params
    width, mels = config.text_config.hidden_size, config.audio_config.num_mel_bins
    named = {"cfg": config, "attention": runtime.attention}
    for frames in (42, 102, 152, 202):
        features, counts = random(1, mels, frames), jnp.asarray([frames])
        yield (
            f"encode {frames} frames",
            encoding.encode_audio,
            lambda program, x=features, n=counts: program(params, x, n, **named),
        )
    for tokens in (16, 32, 48, 64):
        embeddings, counts = random(1, tokens, width), jnp.asarray([tokens])
        yield (
            f"prefill {tokens} tokens",
            run.prefill,
            lambda program, x=embeddings, n=counts: program(params, x, n, cache_dtype="float32", **named),
        )
        held = held_cache(runtime, 1)

        def append(program: Any, held: list[Any] = held, x: jax.Array = embeddings, n: jax.Array = counts) -> Any:
            cache = replace(held[0], lengths=jnp.full(1, CONTEXT))
            logits, held[0] = program(params, x, cache, counts=n, cfg=config, window=CAPACITY)
            return logits

        yield f"append {tokens} tokens", run.append, append
    for rows in (1, 2, 3, 4, 8, 16):
        held = held_cache(runtime, rows)

        def step(program: Any, held: list[Any] = held, rows: int = rows) -> Any:
            cache = replace(held[0], lengths=jnp.full(rows, CONTEXT))
            logits, held[0] = program(runtime.decoder, jnp.zeros(rows, jnp.int32), cache)
            return logits

        yield f"decode {rows} rows", decoding.forward_step, step


def measure(program: ByRows, run_case: Run, rounds: int) -> tuple[float, float]:
    """Median milliseconds of both, after one run of each that is not counted."""
    times: dict[str, list[float]] = {"usual": [], "few": []}
    for turn in range(rounds + 1):
        for name, kept in times.items():
            began = time.perf_counter()
            jax.block_until_ready(run_case(getattr(program, name)))
            if turn:
                kept.append(1000 * (time.perf_counter() - began))
    return statistics.median(times["usual"]), statistics.median(times["few"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mid-size.json", help="of the random model")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    config = Qwen2AudioConfig.from_json_file(options.config)
    model = Qwen2AudioForConditionalGeneration(config, init_params(config, seed=0))
    print(f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}, medians of {options.rounds} rounds\n")
    print("| case | usual, ms | Eigen, ms | usual / Eigen |\n|---|---|---|---|")
    for name, program, run_case in cases(model.runtime):
        usual, few = measure(program, run_case, options.rounds)
        print(f"| {name} | {usual:.0f} | {few:.0f} | {usual / few:.2f} |", flush=True)


if __name__ == "__main__":
    main()
