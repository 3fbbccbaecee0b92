"""Memory of the 7B model's stages on TPUs, by default eight v5e chips, read from the compiled programs.

    python benchmarks/decode_memory.py decode --mesh 1x8

Needs `libtpu` (x86 Linux) and no TPU: it compiles ahead of time. Only one process may use it at a time. Prints a JSON
object, or a list of them; tests/test_tpu.py and tests/test_tpu_attention.py assert on it, decode_memory.md and
attention.md record it.
"""

import argparse
import inspect
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

# Before jax is imported: the host computes on the CPU, and libtpu is not to ask the network which machine it is on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.engine.slots import insert_row, take_row, take_rows
from qwen2audio_jax.generation.decoding import chosen_token, forward_step
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.run import insert
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampling import Mode, NextToken
from qwen2audio_jax.generation.sampling_params import EOS_SLOTS, MIN_CANDIDATES, SamplingParams, row_params
from qwen2audio_jax.model.cache_pieces import PIECE
from qwen2audio_jax.model.kv_cache import CACHE_AXES, moved, write
from qwen2audio_jax.plan.compiling import compile_program
from qwen2audio_jax.plan.program import COLLECTIVES, operations, type_bytes
from qwen2audio_jax.plan.request import Shapes
from qwen2audio_jax.plan.resident import device_bytes
from qwen2audio_jax.plan.stages import Batch, lower
from qwen2audio_jax.plan.topology import compile_mesh, parse_topology

STAGES = ("decode", "prefill", "encode", "scan")
ENGINE_STAGES = ("slots", "choose", "narrow", "copy-rows", "insert", "insert-row", "begin")
"""Those of an engine: the two programs of its step, the copies of a few rows, and what brings a prompt into a slot."""


@dataclass(frozen=True)
class Report:
    """One compiled program; every size is in bytes on one device."""

    stage: str
    topology: str
    mesh: str
    layers: int
    rows: int
    capacity: int
    attention: str
    versions: dict[str, str]
    weights: int
    """All of the model's, also those that this stage does not read: they are resident."""
    cache: int
    arguments: int
    outputs: int
    aliased: int
    """Outputs that are written over a donated argument."""
    temporary: int
    peak: int
    """With weights and cache."""
    kernels: int
    """Calls of Pallas kernels."""
    cache_copies: int
    """Copies of a cache buffer from main memory to main memory."""
    cache_staged: int
    """Moves of a whole cache buffer between main memory and the chip's own (VMEM): time, but no main memory."""
    weights_relaid: int
    """Of weights that are copied into another layout each time the program runs."""
    collectives: dict[str, int]
    largest_collective: int
    compile_seconds: float


def lower_scan(batch: Batch) -> jax.stages.Lowered:
    """The rejected alternative to the decoder: stacked buffers of all layers, one written in each step of a scan."""
    buffers = batch.cache.keys + batch.cache.values
    stacked = batch.spec((len(buffers), *buffers[0].shape), buffers[0].dtype, None, *CACHE_AXES)
    text, rows = batch.config.text_config, batch.shapes.rows
    new = batch.spec((rows, text.num_key_value_heads, 1, text.head_dim), buffers[0].dtype, *CACHE_AXES)

    def step(stack: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
        def layer(carry: jax.Array, buffer: jax.Array) -> tuple[jax.Array, jax.Array]:
            written = write(buffer, new + carry, starts=starts)
            return written.sum(2, keepdims=True).astype(new.dtype), written

        return jax.lax.scan(layer, jax.numpy.zeros_like(new), stack)[1]

    with jax.set_mesh(batch.mesh):
        return jax.jit(step, donate_argnums=0).lower(stacked, new, batch.cache.lengths)


def lower_slots(batch: Batch) -> jax.stages.Lowered:
    """The first program of an engine's step, the model's."""
    runtime = Runtime(batch.params, batch.config, batch.mesh, batch.cache_dtype, batch.chosen_attention)
    step = jax.jit(inspect.unwrap(forward_step), donate_argnames="cache", keep_unused=True)
    return step.lower(runtime, _last(batch).tokens, batch.cache)


def lower_choose(batch: Batch, *, mode: Mode) -> jax.stages.Lowered:
    """The second program: the choice of the tokens, in which every row has settings of its own."""
    last, sampling, rows = _last(batch), _settings(batch), (batch.shapes.rows,)
    sampling = replace(sampling, candidate_count=MIN_CANDIDATES if mode == "sample" else None)
    logits = batch.spec((*rows, batch.config.text_config.vocab_size), jnp.float32, "batch", "vocab")
    choose = jax.jit(inspect.unwrap(chosen_token), static_argnames="mode", keep_unused=True)
    return choose.lower(logits, last.state, batch.spec(rows, jnp.bool_, "batch"), sampling, None, mode=mode)


def lower_narrow(batch: Batch) -> jax.stages.Lowered:
    """Copies of a few rows, with which the steps go on."""
    places = batch.spec((4 * batch.mesh.shape["data"],), jnp.int32, "batch")
    return take_rows.lower((_last(batch), _settings(batch)), batch.cache, places)


def lower_copy_rows(batch: Batch) -> jax.stages.Lowered:
    """Copies of a few rows' beginnings, to be extended."""
    sources = batch.spec((batch.mesh.shape["data"],), jnp.int32, "batch")
    return jax.jit(moved, static_argnames="capacity").lower(
        batch.cache, sources, sources, capacity=batch.shapes.capacity
    )


def lower_insert(batch: Batch) -> jax.stages.Lowered:
    """A piece of one row written into a slot."""
    one = replace(batch, shapes=replace(batch.shapes, rows=1, capacity=PIECE))
    piece = jax.tree.map(lambda leaf: _one_row(batch, leaf), (one.cache.keys, one.cache.values))
    return insert.lower(batch.cache, piece, *_PLACES)


def lower_insert_row(batch: Batch) -> jax.stages.Lowered:
    """One of the rows that extend beginnings written into a slot."""
    rows = replace(batch, shapes=replace(batch.shapes, rows=batch.mesh.shape["data"]))
    return insert_row.lower(batch.cache, rows.cache, *_PLACES)


def lower_begin(batch: Batch) -> jax.stages.Lowered:
    """A row's state and settings put into a slot."""
    rows = replace(batch, shapes=replace(batch.shapes, rows=8 * batch.mesh.shape["data"]))
    whole, new = ((_last(each), _settings(each), each.cache.lengths) for each in (batch, rows))
    return take_row.lower(whole, new, *_PLACES)


_PLACES = (jax.ShapeDtypeStruct((), jnp.int32),) * 2


def _one_row(batch: Batch, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return batch.spec(leaf.shape, leaf.dtype, None, *CACHE_AXES[1 : leaf.ndim])


def _last(batch: Batch) -> NextToken:
    rows = (batch.shapes.rows,)
    arrays: Any = (batch.spec(rows, jnp.int32, "batch"), batch.spec(rows, jnp.float32, "batch"), batch.sampler)
    return NextToken(*arrays)


def _settings(batch: Batch) -> SamplingParams:
    rows, vocab_size = batch.shapes.rows, batch.config.text_config.vocab_size
    params = row_params([GenerationConfig()], rows=rows, stops=EOS_SLOTS, vocab_size=vocab_size)
    return jax.tree.map(lambda leaf: batch.spec(leaf.shape, leaf.dtype, "batch", *[None] * (leaf.ndim - 1)), params)


def cache_moves(program: str, *, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Counts of copies of arrays of the cache's shape: within main memory, and to or from on-chip memory."""
    array = f"{dtype}[{','.join(map(str, shape))}]"
    found = [printed for _, printed, _ in operations(program, "copy", "copy-start") if array in printed]
    # S(1) in a layout is the memory space of the chip; main memory has no mark.
    staged = sum("S(1)" in printed for printed in found)
    return len(found) - staged, staged


def relaid(program: str, params: Any) -> int:
    """Bytes of the synchronous copies that have the shape of a weight's shard: the same values in another layout."""
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    arrays = [f"[{','.join(map(str, shard))}]" for shard in shards]
    copies = [printed for _, printed, _ in operations(program, "copy")]
    return sum(type_bytes(printed) for printed in copies if any(array in printed for array in arrays))


def measure(stage: str, batch: Batch, *, topology: str, mode: Mode) -> Report:
    """Compile a stage and read its memory and its operations."""
    own = {
        "scan": lower_scan,
        "slots": lower_slots,
        "choose": partial(lower_choose, mode=mode),
        "narrow": lower_narrow,
        "copy-rows": lower_copy_rows,
        "insert": lower_insert,
        "insert-row": lower_insert_row,
        "begin": lower_begin,
    }
    with jax.set_mesh(batch.mesh):
        compiled = compile_program(own[stage](batch) if stage in own else lower(stage, batch, mode=mode))
    buffer = batch.cache.keys[0]
    shard = buffer.sharding.shard_shape(buffer.shape)
    copies, staged = cache_moves(compiled.text, shape=shard, dtype="bf16")
    # An asynchronous collective is two operations; its start stands for it.
    talk = list(operations(compiled.text, *COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES)))
    data, split = batch.mesh.devices.shape
    return Report(
        stage=f"{stage} {mode}" if stage in ("decode", "choose") else stage,
        topology=topology,
        mesh=f"{data}x{split}",
        layers=batch.config.text_config.num_hidden_layers,
        rows=batch.shapes.rows,
        capacity=batch.shapes.capacity,
        attention=batch.chosen_attention,
        versions={name: version(name) for name in ("jax", "libtpu")},
        weights=device_bytes(batch.params),
        cache=device_bytes((batch.cache.keys, batch.cache.values)),
        arguments=compiled.arguments,
        outputs=compiled.outputs,
        aliased=compiled.aliased,
        temporary=compiled.temporary,
        peak=compiled.peak,
        kernels=compiled.text.count('custom_call_target="tpu_custom_call"'),
        cache_copies=copies,
        cache_staged=staged,
        weights_relaid=relaid(compiled.text, batch.params),
        collectives=dict(Counter(kind.removesuffix("-start") for kind, _, _ in talk)),
        largest_collective=max((type_bytes(printed) for _, printed, _ in talk), default=0),
        compile_seconds=round(compiled.seconds, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages",
        nargs="+",
        choices=STAGES + ENGINE_STAGES,
        help="scan: a decoder's cache as it should not be, to compare",
    )
    parser.add_argument("--topology", default="v5e:2x4", help="as `qwen2audio plan` takes it (default %(default)s)")
    parser.add_argument("--mesh", default="1x8", help="DATAxMODEL, all chips (default %(default)s)")
    parser.add_argument("--mode", choices=("greedy", "sample"), default="greedy")
    parser.add_argument("--attention", choices=("auto", "xla", "pallas"), default="auto")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--capacity", type=int, default=2048, help="cache positions of a row (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=768, help="of a prompt to prefill (default %(default)s)")
    arguments = parser.parse_args()
    data, split = map(int, arguments.mesh.split("x"))
    published = Qwen2AudioConfig(dtype="bfloat16")
    text = replace(published.text_config, num_hidden_layers=arguments.layers)
    rows = arguments.rows
    batch = Batch(
        replace(published, text_config=text),
        compile_mesh(parse_topology(arguments.topology), data=data, model=split),
        # One clip of 30 s a row.
        Shapes(rows, arguments.tokens, arguments.capacity, clips=rows, frames=published.audio_config.max_frames),
        "bfloat16",
        arguments.attention,
    )
    reports = [
        asdict(measure(stage, batch, topology=arguments.topology, mode=arguments.mode)) for stage in arguments.stages
    ]
    print(json.dumps(reports[0] if len(reports) == 1 else reports))


if __name__ == "__main__":
    main()
