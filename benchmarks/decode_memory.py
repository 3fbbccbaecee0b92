"""What the stages of the 7B model keep in memory on eight TPU v5e chips, read from the compiled programs.

    python benchmarks/decode_memory.py decode --mesh 1x8

Needs `libtpu` (x86 Linux) and no TPU: it compiles ahead of time for the topology v5e:2x4. Only one process may use it
at a time. Prints one JSON object; tests/test_tpu.py asserts on it, decode_memory.md records it.
"""

import argparse
import json
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before jax is imported: the host computes on the CPU, and libtpu is not to ask the network which machine it is on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from filelock import FileLock
from jax.experimental import topologies
from jax.sharding import Mesh

from qwen2audio_jax import generate, model
from qwen2audio_jax.cache import CACHE_AXES, KVCache, write
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation_config import GenerationConfig
from qwen2audio_jax.sampling import SamplerState, sampling_params
from qwen2audio_jax.sharding import make_mesh, named_sharding

TOPOLOGY = "v5e:2x4"
STAGES = ("decode", "prefill", "encode", "scan")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Report:
    """One compiled program; every size is in bytes on one device."""

    stage: str
    mesh: str
    layers: int
    rows: int
    capacity: int
    versions: dict[str, str]
    weights: int
    """All of the model's, also those that this stage does not read: they are resident."""
    cache: int
    arguments: int
    outputs: int
    aliased: int
    """Outputs that are written over a donated argument."""
    temporary: int
    cache_copies: int
    """Copies of a cache buffer from main memory to main memory."""
    cache_staged: int
    """Moves of a whole cache buffer between main memory and the chip's own (VMEM): time, but no main memory."""
    weights_relaid: int
    """Of weights that are copied into another layout each time the program runs."""
    collectives: dict[str, int]
    largest_collective: int
    compile_seconds: float


@dataclass(frozen=True)
class Shapes:
    """Abstract arguments on a mesh."""

    config: Qwen2AudioConfig
    mesh: Mesh
    rows: int
    capacity: int

    def spec(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(self.mesh, *axes))

    @property
    def params(self) -> dict[str, Any]:
        return model.sharded_specs(self.config, mesh=self.mesh)

    @property
    def cache(self) -> KVCache:
        text = self.config.text_config
        shape = (self.rows, text.num_key_value_heads, self.capacity, text.head_dim)
        buffers = (self.spec(shape, jnp.dtype(self.config.dtype), *CACHE_AXES),) * text.num_hidden_layers
        return KVCache(buffers, buffers, self.spec((self.rows,), jnp.int32, "batch"))

    @property
    def sampler(self) -> SamplerState:
        vocab = self.params["decoder"]["embed_tokens"]["embedding"].shape[0]
        rows = (self.rows,)
        return SamplerState(
            seen=self.spec((self.rows, vocab), jnp.bool_, "batch", "vocab"),
            step=self.spec(rows, jnp.int32, "batch"),
            seeds=self.spec(rows, jnp.uint32, "batch"),
            finished=self.spec(rows, jnp.bool_, "batch"),
        )


def lower_decode(shapes: Shapes, *, mode: str) -> jax.stages.Lowered:
    """The step that `generate` runs for every token, sampler and stop checks included."""
    settings = GenerationConfig.from_dict(
        {
            "do_sample": mode == "sample",
            "top_k": 20,
            "top_p": 0.8,
            "temperature": 0.7,
            "repetition_penalty": 1.1,
            "eos_token_id": [151643, 151645],
            "pad_token_id": 151643,
        }
    )
    vocab_size = shapes.config.text_config.vocab_size
    sampling = jax.eval_shape(partial(sampling_params, settings, vocab_size=vocab_size))
    sampling = jax.tree.map(lambda leaf: shapes.spec(leaf.shape, leaf.dtype), sampling)
    tokens = shapes.spec((shapes.rows,), jnp.int32, "batch")
    stopped = shapes.spec((shapes.rows,), jnp.bool_, "batch")
    arguments = (shapes.params, tokens, shapes.cache, shapes.sampler, stopped, sampling)
    return generate.next_step.lower(*arguments, cfg=shapes.config, mode=mode)


def lower_prefill(shapes: Shapes, *, tokens: int) -> jax.stages.Lowered:
    """Prompts of `tokens` tokens, each with one clip of 30 s."""
    text, audio = shapes.config.text_config, shapes.config.audio_config
    vectors = (shapes.rows, audio.max_frames // 4, text.hidden_size)
    prompt = model.Prompt(
        ids=shapes.spec((shapes.rows, tokens), jnp.int32, "batch", "token"),
        lengths=shapes.spec((shapes.rows,), jnp.int32, "batch"),
        audio=shapes.spec(vectors, jnp.dtype(shapes.config.dtype), "clip", "position", "width"),
        slots=shapes.spec((shapes.rows, tokens), jnp.int32, "batch", "token"),
    )
    return generate.prefill.lower(shapes.params, prompt, shapes.cache, cfg=shapes.config, window=tokens)


def lower_encode(shapes: Shapes) -> jax.stages.Lowered:
    """One clip of 30 s a row."""
    audio = shapes.config.audio_config
    features = (shapes.rows, audio.num_mel_bins, audio.max_frames)
    return generate.encode_audio.lower(
        shapes.params,
        shapes.spec(features, jnp.float32, "clip", "mels", "position"),
        shapes.spec((shapes.rows,), jnp.int32, "clip"),
        cfg=shapes.config,
    )


def lower_scan(shapes: Shapes) -> jax.stages.Lowered:
    """What the decoder does not do: the layers' buffers stacked, and one written in each step of a scan."""
    buffers = shapes.cache.keys + shapes.cache.values
    stacked = shapes.spec((len(buffers), *buffers[0].shape), buffers[0].dtype, None, *CACHE_AXES)
    text = shapes.config.text_config
    new = shapes.spec((shapes.rows, text.num_key_value_heads, 1, text.head_dim), buffers[0].dtype, *CACHE_AXES)

    def step(stack: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
        def layer(carry: jax.Array, buffer: jax.Array) -> tuple[jax.Array, jax.Array]:
            written = write(buffer, new + carry, starts=starts)
            return written.sum(2, keepdims=True).astype(new.dtype), written

        return jax.lax.scan(layer, jnp.zeros_like(new), stack)[1]

    starts = shapes.spec((shapes.rows,), jnp.int32, "batch")
    return jax.jit(step, donate_argnums=0).lower(stacked, new, starts)


def operations(program: str, *kinds: str) -> Iterator[tuple[str, str]]:
    """(kind, printed type of the result) of every operation of these kinds in a compiled program's text."""
    pattern = re.compile(r"^\s*(?:ROOT )?\S+ = (.*?) (" + "|".join(kinds) + r")\(", re.MULTILINE)
    for match in pattern.finditer(program):
        yield match[2], match[1]


_SIZES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def type_bytes(printed: str) -> int:
    """Bytes of the largest array in a printed type, without padding."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", printed)
    return max((_SIZES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays))


def cache_moves(program: str, *, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """How often an array of the cache's shape is copied within main memory, and how often to or from the chip's own."""
    array = f"{dtype}[{','.join(map(str, shape))}]"
    found = [printed for _, printed in operations(program, "copy", "copy-start") if array in printed]
    # S(1) in a layout is the memory space of the chip; main memory has no mark.
    staged = sum("S(1)" in printed for printed in found)
    return len(found) - staged, staged


def relaid(program: str, params: Any) -> int:
    """Bytes of the synchronous copies that have the shape of a weight's shard: the same values in another layout."""
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    arrays = [f"[{','.join(map(str, shard))}]" for shard in shards]
    copies = [printed for _, printed in operations(program, "copy")]
    return sum(type_bytes(printed) for printed in copies if any(array in printed for array in arrays))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded specs on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def measure(stage: str, shapes: Shapes, *, mode: str, tokens: int) -> Report:
    """Compile a stage and read its memory and its operations."""
    began = time.monotonic()
    with jax.set_mesh(shapes.mesh):
        if stage == "decode":
            lowered = lower_decode(shapes, mode=mode)
        elif stage == "prefill":
            lowered = lower_prefill(shapes, tokens=tokens)
        elif stage == "encode":
            lowered = lower_encode(shapes)
        else:
            lowered = lower_scan(shapes)
        compiled = lowered.compile()
    seconds = time.monotonic() - began
    memory, program = compiled.memory_analysis(), compiled.as_text()
    buffer = shapes.cache.keys[0]
    shard = buffer.sharding.shard_shape(buffer.shape)
    copies, staged = cache_moves(program, shape=shard, dtype="bf16")
    # An asynchronous collective is two operations; its start stands for it.
    talk = list(operations(program, *COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES)))
    data, split = shapes.mesh.devices.shape
    return Report(
        stage=f"{stage} {mode}" if stage == "decode" else stage,
        mesh=f"{data}x{split}",
        layers=shapes.config.text_config.num_hidden_layers,
        rows=shapes.rows,
        capacity=shapes.capacity,
        versions={name: version(name) for name in ("jax", "libtpu")},
        weights=device_bytes(shapes.params),
        cache=device_bytes((shapes.cache.keys, shapes.cache.values)),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        cache_copies=copies,
        cache_staged=staged,
        weights_relaid=relaid(program, shapes.params),
        collectives=dict(Counter(kind.removesuffix("-start") for kind, _ in talk)),
        largest_collective=max((type_bytes(printed) for _, printed in talk), default=0),
        compile_seconds=round(seconds, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES, help="scan is a decoder's cache as it should not be, to compare")
    parser.add_argument("--mesh", default="1x8", help="DATAxMODEL, 8 devices in all (default %(default)s)")
    parser.add_argument("--mode", choices=("greedy", "sample"), default="greedy")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--capacity", type=int, default=2048, help="cache positions of a row (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=768, help="of a prompt to prefill (default %(default)s)")
    arguments = parser.parse_args()
    data, split = map(int, arguments.mesh.split("x"))
    # libtpu aborts where another process holds it, which each does until it has ended: so the lock is never released.
    lock = FileLock(Path(tempfile.gettempdir()) / "qwen2audio_jax_libtpu.lock")
    lock.acquire()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    published = Qwen2AudioConfig(dtype="bfloat16")
    text = replace(published.text_config, num_hidden_layers=arguments.layers)
    shapes = Shapes(
        config=replace(published, text_config=text),
        mesh=make_mesh(data=data, model=split, devices=devices),
        rows=arguments.rows,
        capacity=arguments.capacity,
    )
    report = measure(arguments.stage, shapes, mode=arguments.mode, tokens=arguments.tokens)
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
