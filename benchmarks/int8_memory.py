"""Check that no int8 weight is widened in memory, read from the programs that XLA compiles for TPUs.

    python benchmarks/int8_memory.py --topology v5e:2x4 --mesh 1x8 --layers 2

Compiles the whole decode step, sampler included, and the prefill of the 7B configuration (shapes only) with int8
weights and cache. Needs `libtpu` (x86 Linux) and no TPU; only one process may use it at a time. Prints one JSON
object, which tests/test_tpu_int8.py asserts on.
"""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before jax is imported: the host computes on the CPU, and libtpu is not to ask the network which machine it is on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.parallel.sharding import make_mesh
from qwen2audio_jax.plan.compiling import compile_program
from qwen2audio_jax.plan.program import COLLECTIVES, operations, type_bytes
from qwen2audio_jax.plan.request import Shapes
from qwen2audio_jax.plan.resident import device_bytes
from qwen2audio_jax.plan.stages import Batch, Stage, lower
from qwen2audio_jax.plan.topology import compile_devices, parse_topology

WIDE = ("bf16", "f16", "f32")
STAGES: tuple[Stage, ...] = ("decode", "prefill")


def results(program: str) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """(operation, its arrays as (dtype, shape)) of everything in a compiled program that has memory of its own.

    What a fused computation makes on its way has none; the fusion itself does.
    """
    fused = set(re.findall(r"\bfusion\(.*?calls=%?([\w.-]+)", program))
    inside = False
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            inside = header[1] in fused
        elif not inside and (match := re.match(r"\s+(?:ROOT )?\S+ = (.*?) ([\w-]+)\(", line)):
            arrays = re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", match[1])
            yield match[2], [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in arrays]


def same_values(shape: tuple[int, ...], shards: set[tuple[int, ...]]) -> bool:
    """Return True if an array could be one of the shards, with its axes permuted or a head axis split off."""
    whole = tuple(sorted(size for size in shape if size > 1))
    for shard in shards:
        if whole == tuple(sorted(shard)):
            return True
        if len(whole) == len(shard) + 1 and any(
            sorted([*shard[:k], *shard[k + 1 :], 128, shard[k] // 128]) == list(whole) for k in range(len(shard))
        ):
            return True
    return False


def measure(name: str, lowered: jax.stages.Lowered, *, params: Any, cache: Any) -> dict[str, Any]:
    """Compile, and count the arrays in main memory that are a weight's or the cache's in a wider dtype."""
    compiled = compile_program(lowered)
    weights = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8}
    buffers = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.int8}
    found: dict[str, list[str]] = {"weights_widened": [], "cache_widened": [], "weights_relaid": [], "cache_copies": []}
    for operation, arrays in results(compiled.text):
        for dtype, shape in arrays:
            printed = f"{operation} {dtype}{list(shape)}"
            if same_values(shape, weights):
                if dtype in WIDE:
                    found["weights_widened"].append(printed)
                elif dtype == "s8" and operation == "copy":
                    found["weights_relaid"].append(printed)
            if same_values(shape, buffers):
                if dtype in WIDE:
                    found["cache_widened"].append(printed)
                elif dtype == "s8" and operation == "copy":
                    found["cache_copies"].append(printed)
    # An asynchronous collective is two operations; its start stands for it.
    talk = list(operations(compiled.text, *COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES)))
    return {
        "stage": name,
        "int8_products": len(re.findall(r"= bf16\[[\d,]+\]\S* convert\(", compiled.text)),
        **found,
        "weights": device_bytes(params),
        "codes": device_bytes([leaf for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8]),
        "cache": device_bytes((cache.keys, cache.values)),
        "arguments": compiled.arguments,
        "aliased": compiled.aliased,
        "temporary": compiled.temporary,
        "collectives": dict(Counter(kind.removesuffix("-start") for kind, _, _ in talk)),
        "largest_collective": max((type_bytes(printed) for _, printed, _ in talk), default=0),
        "compile_seconds": round(compiled.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="as `qwen2audio plan` takes it (default %(default)s)")
    parser.add_argument("--mesh", default="1x1", help="DATAxMODEL of its first chips (default %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--capacity", type=int, default=1024, help="cache positions of a row (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt to prefill (default %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: both")
    parser.add_argument("--text", metavar="DIR", type=Path, help="write the compiled programs there")
    arguments = parser.parse_args()
    data, split = map(int, arguments.mesh.split("x"))
    published = Qwen2AudioConfig(dtype="bfloat16")
    batch = Batch(
        replace(published, text_config=replace(published.text_config, num_hidden_layers=arguments.layers)),
        make_mesh(data=data, model=split, devices=compile_devices(parse_topology(arguments.topology))[: data * split]),
        # One clip of 30 s a row.
        Shapes(
            arguments.rows,
            arguments.tokens,
            arguments.capacity,
            clips=arguments.rows,
            frames=published.audio_config.max_frames,
        ),
        "int8",
        weights="int8",
    )
    lowered = {stage: lower(stage, batch, mode="greedy") for stage in arguments.stages}
    report = [measure(name, each, params=batch.params, cache=batch.cache) for name, each in lowered.items()]
    if arguments.text:
        for name, each in lowered.items():
            (arguments.text / f"{name}.txt").write_text(each.compile().as_text())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
