"""Scaled dot-product attention over grouped key/value heads: the one function that encoder and decoder call.

Callers state which keys a query may attend to. Plain XLA turns that into a mask; the flash kernels (`flash_attention`),
which never hold a row's scores in memory, take lengths and a causal flag.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.model.flash_attention import LANES, cudnn_attention, pallas_attention
from qwen2audio_jax.model.kv_cache import Buffer, Int8Buffer
from qwen2audio_jax.model.plain_attention import plain_attention
from qwen2audio_jax.parallel.sharding import partition_spec

AUTO, XLA, CUDNN, PALLAS = "auto", "xla", "cudnn", "pallas"

_KERNELS: dict[str, Callable[..., jax.Array]] = {CUDNN: cudnn_attention, PALLAS: pallas_attention}
_OF_PLATFORM = {"gpu": CUDNN, "tpu": PALLAS}

_CUDNN_HEAD_DIM = 128
_CUDNN_CAPABILITY = (8, 0)
"""The oldest NVIDIA GPUs that cuDNN's flash attention runs on: Ampere."""


def check_attention(attention: str, *, mesh: Mesh) -> None:
    """Raise a `ValueError` unless it is "auto" or an implementation that the devices of the mesh can run."""
    if attention not in (AUTO, XLA, CUDNN, PALLAS):
        raise ValueError(f"attention={attention!r} is not one of 'auto', 'xla', 'cudnn', 'pallas'")
    platform = mesh.devices.flat[0].platform
    if attention in (AUTO, XLA, _OF_PLATFORM.get(platform)):
        return
    works = ", ".join(repr(name) for name in (AUTO, XLA, _OF_PLATFORM.get(platform)) if name)
    needs = "NVIDIA GPUs" if attention == CUDNN else "TPUs"
    raise ValueError(
        f"attention={attention!r} needs {needs}, but the devices are of the platform {platform!r}: use {works}"
    )


def choose_attention(attention: str, *, mesh: Mesh, dtype: str, head_dims: Sequence[int]) -> str:
    """Choose the implementation of attention over whole prompts and clips: "xla", "cudnn" or "pallas".

    Args:
        attention: the choice, or "auto": the flash kernel of the mesh's devices where it is usable, else plain XLA.
        mesh: the devices that will compute, not necessarily those of this process's default backend.
        dtype: of the computation.
        head_dims: H of every attention of the model.

    Raises:
        ValueError: the implementation asked for does not exist, or cannot run on the mesh or in the dtype.
    """
    check_attention(attention, mesh=mesh)
    device: Any = mesh.devices.flat[0]
    if attention == AUTO:
        kernel = _OF_PLATFORM.get(device.platform, XLA)
        # float32 guarantees the reference's numbers to 1e-5, and the plain form is tested against that: the kernels sum
        # in block order, cuDNN has no float32, and on TPUs a float32 product takes several bfloat16 passes.
        return XLA if dtype == "float32" or _refusal(kernel, device, dtype, head_dims) else kernel
    if refusal := _refusal(attention, device, dtype, head_dims):
        raise ValueError(f"attention={attention!r}: {refusal}; use 'auto' or 'xla'")
    return attention


def _refusal(attention: str, device: Any, dtype: str, head_dims: Sequence[int]) -> str | None:
    """The reason why a kernel cannot be used on a device of its platform; None if it can."""
    if attention == PALLAS and dtype == "float16":
        return "the TPU kernel computes in bfloat16 or float32, and the dtype is 'float16'"
    if attention != CUDNN:
        return None
    if dtype == "float32":
        return "cuDNN's flash attention computes in bfloat16 or float16, and the dtype is 'float32'"
    for size in head_dims:
        if size % 8 or size > _CUDNN_HEAD_DIM:
            return f"cuDNN takes heads of a multiple of 8 up to {_CUDNN_HEAD_DIM}, and the model has {size}"
    # Other vendors write the compute capability differently ("gfx90a"), or not at all.
    capability = str(getattr(device, "compute_capability", ""))
    numbers = tuple(int(part) if part.isdigit() else -1 for part in capability.split("."))
    if numbers < _CUDNN_CAPABILITY:
        return f"cuDNN's flash attention needs NVIDIA's compute capability 8.0, and the GPU has {capability or 'none'}"
    return None


@partial(jax.tree_util.register_dataclass, data_fields=("lengths", "starts", "segments"), meta_fields=("causal",))
@dataclass(frozen=True)
class Seen:
    """Which keys a query attends to.

    Attributes:
        causal: whether only the keys up to its own position.
        lengths: [B] int32, valid keys of each row; None: all. A row without keys gets a finite but meaningless result.
        starts: [B] int32, position of each row's first query among the keys; None: 0.
        segments: [B, T] int32: only keys of the query's own segment.
    """

    causal: bool
    lengths: jax.Array | None = None
    starts: jax.Array | None = None
    segments: jax.Array | None = None

    def mask(self, tokens: int, keys: int) -> jax.Array:
        """Which of the keys [B or 1, T or 1, S] the queries of so many positions attend to."""
        mask = jnp.ones((1, 1, keys), bool)
        if self.lengths is not None:
            mask = jnp.arange(keys) < jnp.maximum(self.lengths, 1)[:, None, None]
        if self.causal:
            first = 0 if self.starts is None else self.starts[:, None]
            positions = jnp.atleast_2d(first + jnp.arange(tokens))
            mask = mask & (jnp.arange(keys) <= positions[:, :, None])
        if self.segments is not None:
            mask = mask & (self.segments[:, :, None] == self.segments[:, None, :])
        return mask


def attend(q: jax.Array, k: Buffer, v: Buffer, seen: Seen, *, axes: tuple[str, str, str], attention: str) -> jax.Array:
    """Scaled dot-product attention of every query over its permitted keys; softmax in float32.

    Args:
        q: [B, T, N, H], already scaled.
        k: [B, K, S, H]; query head n reads key head n // (N / K).
        v: [B, K, S, H].
        seen: the keys of each query.
        axes: the logical axes of the rows, the heads and the key/value heads.
        attention: "xla", "cudnn" or "pallas", static. The kernels handle queries and keys of the same positions;
            unsupported cases (`starts`, `segments`, on TPUs less than a block of queries) fall back to plain XLA.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    tokens = q.shape[1]
    whole = seen.starts is None and seen.segments is None
    # Below a block the scores are smaller than the operands padded to one.
    suits = attention != XLA and whole and not (attention == PALLAS and tokens < LANES)
    if suits and not isinstance(k, Int8Buffer) and not isinstance(v, Int8Buffer):
        return _on_each_device(partial(_KERNELS[attention], causal=seen.causal), q, k, v, seen.lengths, axes=axes)
    return plain_attention(q, k, v, seen.mask(tokens, k.shape[2]), causal=seen.causal and seen.starts is None)


def _on_each_device(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: Any,
    v: Any,
    lengths: jax.Array | None,
    *,
    axes: tuple[str, str, str],
) -> jax.Array:
    """Run a kernel on each device's own rows and heads: XLA cannot split a kernel as it splits its own operations."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, lengths=lengths)
    rows, heads, kv_heads = axes
    queries, keys = partition_spec(rows, None, heads, None), partition_spec(rows, kv_heads, None, None)
    operands = (q, k, v) if lengths is None else (q, k, v, lengths)

    def own(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        return kernel(q, k, v, lengths=lengths)

    specs = (queries, keys, keys, partition_spec(rows))[: len(operands)]
    return jax.shard_map(own, in_specs=specs, out_specs=queries, check_vma=False)(*operands)
