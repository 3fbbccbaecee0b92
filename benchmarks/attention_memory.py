"""Memory of one attention on a TPU, compiled with and without the flash kernel, for several lengths.

    python benchmarks/attention_memory.py v5e:2x4 v6e:2x2 --encoder 1500 --prefill 1024

Published shapes, bfloat16, on the mesh of all chips (one clip of the encoder a chip; 8 rows of a prefill, heads split).
Needs `libtpu` (x86 Linux) and no TPU; only one process may use it at a time. Prints one JSON object;
tests/test_tpu_attention.py asserts on it, attention.md records it. These are properties of programs: nothing here is a
time on a TPU.
"""

import argparse
import json
import os
from functools import partial
from typing import Any

# Before jax is imported: the host computes on the CPU, and libtpu is not to ask the network which machine it is on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.attention import Seen, attend
from qwen2audio_jax.parallel.sharding import named_sharding
from qwen2audio_jax.plan.compiling import compile_program
from qwen2audio_jax.plan.topology import compile_mesh, parse_topology

AXES = {"encoder": ("clip", "audio_heads", "audio_heads"), "prefill": ("batch", "heads", "kv_heads")}


def measure(stage: str, attention: str, *, tokens: int, kv_heads: int | None, mesh: Mesh) -> dict[str, Any]:
    """Compile the attention of one layer; sizes are in bytes on one chip."""
    config = Qwen2AudioConfig(dtype="bfloat16")
    encoder = stage == "encoder"
    heads = config.audio_config.encoder_attention_heads if encoder else config.text_config.num_attention_heads
    size = config.head_dims[0 if encoder else 1]
    count = mesh.size if encoder else 8
    rows_axis, heads_axis, kv_axis = AXES[stage]

    def spec(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))

    keys = spec((count, heads if encoder else kv_heads or heads, tokens, size), jnp.bfloat16, rows_axis, kv_axis)
    queries = spec((count, tokens, heads, size), jnp.bfloat16, rows_axis, None, heads_axis)
    lengths = spec((count,), jnp.int32, rows_axis) if encoder else None
    step = jax.jit(partial(attend, axes=AXES[stage], attention=attention))
    with jax.set_mesh(mesh):
        program = compile_program(step.lower(queries, keys, keys, Seen(not encoder, lengths)))
    return {
        "stage": stage,
        "tokens": tokens,
        "heads": queries.shape[2],
        "kv_heads": keys.shape[1],
        "attention": attention,
        "kernels": program.text.count('custom_call_target="tpu_custom_call"'),
        "queries": queries.size * 2 // mesh.size,
        "temporary": program.temporary,
        "compile_seconds": round(program.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="+", metavar="TOPOLOGY", help="as `qwen2audio plan` takes it")
    parser.add_argument("--encoder", type=int, nargs="*", default=[], metavar="T", help="positions; 30 s are 1500")
    parser.add_argument("--prefill", type=int, nargs="*", default=[], metavar="T", help="tokens of a row")
    parser.add_argument("--kv-heads", type=int, help="of the prefill (default: the published model's 32)")
    arguments = parser.parse_args()
    report: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.topologies:
        topology = parse_topology(name)
        mesh = compile_mesh(topology, data=1, model=topology.chips)
        report[topology.name] = [
            measure(stage, attention, tokens=tokens, kv_heads=arguments.kv_heads, mesh=mesh)
            for stage, lengths in (("encoder", arguments.encoder), ("prefill", arguments.prefill))
            for tokens in lengths
            for attention in ("xla", "pallas")
        ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
