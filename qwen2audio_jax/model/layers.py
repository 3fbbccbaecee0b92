"""Layers shared by encoder and decoder: linear maps, norms, rotary positions, and the binding of weights to modules.

Modules use only the pure subset of Flax NNX: `__init__` declares every weight once (shape, logical axes, initial
values) and `__call__` is the forward equation. Nothing is assigned in `__call__`; `bind` builds a module from a plain
dict of arrays inside a jitted function.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Params = Mapping[str, Any]
"""A nested dict of arrays, the same tree as the checkpoint's."""

Axis = tuple[str, int]
"""A logical axis (a name in the sharding table) and its size."""

M = TypeVar("M", bound=nnx.Module)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of products in `dtype`: full float32 for float32, even where the default is lower."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, accumulated and returned in float32."""
    return jnp.einsum(equation, x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def weight(init: Callable[..., jax.Array], axes: tuple[Axis, ...], *, rngs: nnx.Rngs | None) -> nnx.Param:
    """Declare one weight: its shape and its logical axes."""
    shape = tuple(size for _, size in axes)
    # A model that is only declared needs no initial values, which take seconds to trace.
    value = jnp.zeros(shape) if rngs is None else init(rngs.params(), shape)
    return nnx.Param(value, axes=tuple(name for name, _ in axes))


class LowRank(nnx.Module):
    """The low-rank term of an adapted linear map: dropout(x) . a . b; a [in, r], b [r, out].

    A model declares none: `bind` adds one to each `Linear` whose weights hold the entry `lora`, set by
    `lora.with_adapter`. Dropout uses its own key and a threshold in units of 2^-32, both stored like weights.

    Source: LoRA (arXiv 2106.09685); PEFT's `lora.Linear`.
    """

    def __init__(self, inputs: int, outputs: int, *, dropout: bool):
        self.a = nnx.Param(jnp.zeros((inputs, 1)))
        self.b = nnx.Param(jnp.zeros((1, outputs)))
        self.key = nnx.Param(jnp.zeros(2, jnp.uint32)) if dropout else None
        self.drop = nnx.Param(jnp.zeros((), jnp.uint32)) if dropout else None

    def narrow(self, x: jax.Array) -> jax.Array:
        """dropout(x) . a: [..., in] -> [..., r]."""
        if self.key is not None and self.drop is not None:
            kept = jax.random.bits(self.key[...], x.shape, jnp.uint32) >= self.drop[...]
            share = 1 - self.drop[...].astype(jnp.float32) * 2.0**-32
            x = jnp.where(kept, (x.astype(jnp.float32) / share).astype(x.dtype), 0)
        return einsum("...i,ir->...r", x, self.a[...].astype(x.dtype)).astype(x.dtype)


class Linear(nnx.Module):
    """Linear map y = x . kernel + bias, plus an adapter's term; kernel [in, out], accumulated in float32.

    An int8 kernel comes with `scale` [out], which `bind` finds among the weights: y = (x . kernel) * scale + bias; and
    instead of a kernel it may find `turned_kernel` [out, in]: see `kernel_layout`.
    """

    def __init__(self, inputs: Axis, outputs: Axis, *, bias: bool, rngs: nnx.Rngs | None):
        self.kernel = weight(nnx.initializers.lecun_normal(), (inputs, outputs), rngs=rngs)
        self.bias = weight(nnx.initializers.zeros, (outputs,), rngs=rngs) if bias else None
        self.turned_kernel: nnx.Param | None = nnx.data(None)
        self.scale: nnx.Param | None = nnx.data(None)
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wide(x).astype(x.dtype)

    def wide(self, x: jax.Array) -> jax.Array:
        """The float32 result before it is rounded to x's dtype."""
        if self.turned_kernel is None:
            y = einsum("...i,io->...o", x, self.kernel[...].astype(x.dtype))
        else:
            y = einsum("...i,oi->...o", x, self.turned_kernel[...].astype(x.dtype))
        if self.scale is not None:
            y = y * self.scale[...]
        if self.lora is not None:
            y = y + einsum("...r,ro->...o", self.lora.narrow(x), self.lora.b[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y

    def split(self, x: jax.Array, heads: int) -> jax.Array:
        """[..., in] -> [..., heads, out / heads], by splitting the kernel instead of the product."""
        if self.turned_kernel is None:
            y = einsum("...i,inh->...nh", x, split_heads(self.kernel[...].astype(x.dtype), heads))
        else:
            kernel = self.turned_kernel[...].astype(x.dtype)
            y = einsum("...i,nhi->...nh", x, kernel.reshape(heads, -1, kernel.shape[1]))
        if self.scale is not None:
            y = y * split_heads(self.scale[...], heads)
        if self.lora is not None:
            b = split_heads(self.lora.b[...].astype(x.dtype), heads)
            y = y + einsum("...r,rnh->...nh", self.lora.narrow(x), b)
        if self.bias is not None:
            y = y + split_heads(self.bias[...], heads).astype(jnp.float32)
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias; statistics in float32."""

    def __init__(self, axis: Axis, *, eps: float, rngs: nnx.Rngs | None):
        self.eps = eps
        self.scale = weight(nnx.initializers.ones, (axis,), rngs=rngs)
        self.bias = weight(nnx.initializers.zeros, (axis,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with scale, in float32; the result has the dtype of the weights.

    Source: `Qwen2RMSNorm`.
    """

    def __init__(self, axis: Axis, *, eps: float, rngs: nnx.Rngs | None):
        self.eps = eps
        self.scale = weight(nnx.initializers.ones, (axis,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...]
        return (y * scale.astype(jnp.float32)).astype(scale.dtype)


class Embedding(nnx.Module):
    """Embedding table [rows, width]; an int8 one comes with `scale` [rows]: see `Linear`."""

    def __init__(
        self,
        rows: Axis,
        width: Axis,
        *,
        rngs: nnx.Rngs | None,
        init: Callable[..., jax.Array] = nnx.initializers.normal(0.02),  # noqa: B008 (a pure function)
    ):
        self.embedding = weight(init, (rows, width), rngs=rngs)
        self.scale: nnx.Param | None = nnx.data(None)

    def __call__(self, ids: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
        vectors = self.embedding[...][ids]
        if self.scale is not None:
            return (vectors.astype(jnp.float32) * self.scale[...][ids][..., None]).astype(dtype)
        return vectors.astype(dtype)

    def scores(self, x: jax.Array) -> jax.Array:
        """Products with every vector, as in a tied head: [..., width] -> float32 [..., rows]."""
        y = einsum("...d,vd->...v", x, self.embedding[...].astype(x.dtype))
        return y if self.scale is None else y * self.scale[...]


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[..., N * H] -> [..., N, H]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., N, H] -> [..., N * H]."""
    return x.reshape(*x.shape[:-2], -1)


def rotate(x: jax.Array, positions: jax.Array, *, theta: float) -> jax.Array:
    """Rotary position embedding of queries or keys, the rotate-half form; angles and rotation in float32.

    Args:
        x: [B, T, heads, H], H even.
        positions: [B, T] int32.
        theta: base of the frequencies theta^(-2i/H).

    Source: RoFormer (arXiv 2104.09864); `Qwen2RotaryEmbedding`, rope type "default".
    """
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
