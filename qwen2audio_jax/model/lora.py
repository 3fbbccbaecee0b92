"""Low-rank adapters (LoRA): small trainable additions to the linear maps of a model with frozen weights.

An adapter is a tree parallel to the parameter tree, with a pair for every adapted linear map:
`adapter["decoder"]["layers"]["0"]["self_attn"]["q_proj"] = {"lora_a": [in, r], "lora_b": [r, out]}`. `with_adapter`
attaches it to the weights, so that every function of the model computes with it; `merge_adapter` adds it to them
permanently.

Source: LoRA (arXiv 2106.09685); PEFT's `lora.Linear`.
"""

import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.kernel_layout import KERNEL, TURNED
from qwen2audio_jax.model.layers import Params, einsum
from qwen2audio_jax.model.qwen2_audio import parameter_axes, parameter_specs

Path = tuple[str, ...]

ALL_LINEAR = "all-linear"
HEAD = "lm_head"


class Settings(Protocol):
    """The settings of an adapter: `train.settings.LoraSettings`."""

    @property
    def rank(self) -> int:
        """The rank r."""

    @property
    def alpha(self) -> float:
        """The addition is scaled by alpha / rank."""

    @property
    def dropout(self) -> float:
        """Dropout rate of the addition's input in training."""

    @property
    def targets(self) -> tuple[str, ...]:
        """See `target_paths`."""


def linear_shapes(config: Qwen2AudioConfig) -> dict[Path, tuple[int, int]]:
    """(in, out) of every linear map of a model, by its path in the parameter tree ("projector" is itself one)."""
    flat = flatten_dict(parameter_specs(config))
    return {path[:-1]: leaf.shape for path, leaf in flat.items() if path[-1] == "kernel" and len(leaf.shape) == 2}


def target_paths(config: Qwen2AudioConfig, targets: Iterable[str]) -> list[Path]:
    """The paths of the linear maps that targets name.

    Args:
        config: of the model.
        targets: each the name of linear maps ("q_proj", wherever there is one), a part ("encoder", "projector",
            "decoder": all of it but the head), a name within a part ("decoder.q_proj"), or "all-linear" (all three
            parts). The head, if it is not tied, is "lm_head".

    Raises:
        ValueError: a target that matches nothing, or no target.
    """
    names: dict[str, list[Path]] = {ALL_LINEAR: []}
    for path in linear_shapes(config):
        part, name = path[0], path[-1]
        groups = {name} if name == HEAD else {name, part, f"{part}.{name}", ALL_LINEAR}
        for group in groups:
            names.setdefault(group, []).append(path)
    chosen: dict[Path, None] = {}
    for target in targets:
        if target not in names:
            there = sorted({path[-1] for paths in names.values() for path in paths})
            raise ValueError(
                f"lora target {target!r} names no linear layer of this model: there are {', '.join(there)}, each also "
                f"within a part as in decoder.q_proj, the parts encoder, projector and decoder, and {ALL_LINEAR}"
            )
        chosen |= dict.fromkeys(names[target])
    if not chosen:
        raise ValueError(f'lora has no targets: name linear layers, such as q_proj, or "{ALL_LINEAR}"')
    return list(chosen)


def lora_scale(settings: Settings) -> float:
    """The factor of the additions: alpha / rank."""
    return settings.alpha / settings.rank


def lora_specs(config: Qwen2AudioConfig, settings: Settings) -> dict[str, Any]:
    """The tree of an adapter as float32 `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: an unknown target, a rank below 1 or a dropout outside [0, 1).
    """
    if settings.rank < 1:
        raise ValueError(f"lora.rank = {settings.rank}, but it must be at least 1")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"lora.dropout = {settings.dropout}, but it must be from 0 to below 1")
    shapes, flat = linear_shapes(config), {}
    for path in target_paths(config, settings.targets):
        inputs, outputs = shapes[path]
        flat[*path, "lora_a"] = jax.ShapeDtypeStruct((inputs, settings.rank), jnp.float32)
        flat[*path, "lora_b"] = jax.ShapeDtypeStruct((settings.rank, outputs), jnp.float32)
    return unflatten_dict(flat)


def lora_axes(config: Qwen2AudioConfig, settings: Settings) -> dict[str, Any]:
    """The tree of logical axes of an adapter, for the sharding table; the rank is never split."""
    axes, flat = flatten_dict(parameter_axes(config)), {}
    for path in target_paths(config, settings.targets):
        inputs, outputs = axes[*path, "kernel"]
        flat[*path, "lora_a"] = (inputs, None)
        # The vocabulary of weights is padded until it divides over a mesh, that of an adapter never.
        flat[*path, "lora_b"] = (None, None if outputs == "vocab" else outputs)
    return unflatten_dict(flat)


def init_adapter(config: Qwen2AudioConfig, settings: Settings, *, seed: int) -> dict[str, Any]:
    """A new float32 adapter that adds nothing yet: lora_b is zero, lora_a uniform in +-1 / sqrt(in).

    A linear map's values depend only on the seed and its path. Raises as `lora_specs`. Source: PEFT's
    `LoraLayer.reset_lora_parameters` (kaiming_uniform with a = sqrt(5)).
    """
    root = jax.random.PRNGKey(seed)

    def draw(path: Path, spec: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] == "lora_b":
            return jnp.zeros(spec.shape, spec.dtype)
        bound = spec.shape[0] ** -0.5
        return jax.random.uniform(_key(root, path[:-1]), spec.shape, spec.dtype, -bound, bound)

    return unflatten_dict({path: draw(path, spec) for path, spec in flatten_dict(lora_specs(config, settings)).items()})


def _key(root: jax.Array, path: Path) -> jax.Array:
    """A linear map's own PRNG key, independent of the other adapted maps."""
    return jax.random.fold_in(root, zlib.crc32("/".join(path).encode()))


def with_adapter(
    params: Params, adapter: Params, *, scale: float, dropout: float = 0.0, key: jax.Array | None = None
) -> dict[str, Any]:
    """The weights with an adapter attached: linear maps compute y = linear(x) + scale * dropout(x) . a . b.

    Pure, for use inside the function that is differentiated with respect to `adapter`; the sum kernel + a . b is never
    formed. The result is for computation only, not for checkpoints.

    Args:
        params: the weights, or a part of them with all maps that the adapter names.
        adapter: see the module; in any floating dtype, computed in the activations' dtype.
        scale: see `lora_scale`.
        dropout: static, from 0 to below 1.
        key: PRNG key of this call's dropout, from which every linear map derives its own; None: no dropout.
    """
    drop = None if key is None or not dropout else jnp.uint32(round(dropout * 2**32))

    def attach(weights: Params, additions: Params, path: Path) -> dict[str, Any]:
        if "lora_a" not in additions:
            return {**weights, **{name: attach(weights[name], additions[name], (*path, name)) for name in additions}}
        b = additions["lora_b"].astype(jnp.float32) * scale
        # The vocabulary of the head's weights may be padded, that of an adapter never is.
        outputs = weights[KERNEL].shape[1] if KERNEL in weights else weights[TURNED].shape[0]
        b = jnp.pad(b, ((0, 0), (0, outputs - b.shape[1])))
        entry = {"a": additions["lora_a"], "b": b}
        if key is not None and drop is not None:
            entry |= {"key": _key(key, path), "drop": drop}
        return {**weights, "lora": entry}

    return attach(params, adapter, ())


def merge_adapter(params: Params, adapter: Params, *, scale: float) -> dict[str, Any]:
    """The weights with an adapter added, computed in float32, in the weights' own dtype; see `changed`."""
    return _each_parameter(params, adapter, partial(changed, scale=scale))


def merge_adapter_in_place(params: Params, adapter: Params, *, scale: float) -> dict[str, Any]:
    """`merge_adapter` outside jit: weights keep their shardings, and old buffers are donated (turned ones copied)."""
    return _each_parameter(params, adapter, partial(change_in_place, scale=scale))


def by_parameter(adapter: Params, parameters: Container[Path]) -> dict[Path, dict[str, Any]]:
    """What an adapter does to each parameter, by its path.

    Args:
        adapter: a pair of matrices stands at its linear map, or with other changes at a parameter: see `changed`.
        parameters: the paths of all of them.
    """
    found: dict[Path, dict[str, Any]] = {}
    for (*place, kind), array in flatten_dict(dict(adapter)).items():
        path = tuple(place)
        found.setdefault(path if path in parameters else (*path, "kernel"), {})[kind] = array
    return found


def changed(weight: jax.Array, change: Mapping[str, jax.Array], *, scale: float | jax.Array) -> jax.Array:
    """A weight as an adapter changes it, computed in float32, in the weight's dtype.

    Args:
        weight: of any shape; on a mesh its vocabulary may be padded, which stays as it is or becomes 0.
        change: "whole", another weight in its place; "lora_a" and "lora_b", of which scale * a . b is added; "tokens"
            and "values" [n, D], other vectors of n tokens of an embedding [V, D] or a head [D, V].
        scale: see `lora_scale`.
    """
    value = weight.astype(jnp.float32)
    if "whole" in change:
        value = _padded(change["whole"], value)
    if "lora_a" in change:
        product = einsum("ir,ro->io", *(change[side].astype(jnp.float32) for side in ("lora_a", "lora_b")))
        value = value + scale * _padded(product, value)
    if "tokens" in change:
        values = change["values"].astype(jnp.float32)
        if values.shape[1] == value.shape[1]:
            value = value.at[change["tokens"]].set(values)
        else:
            value = value.at[:, change["tokens"]].set(values.T)
    return value.astype(weight.dtype)


def change_in_place(weight: jax.Array, change: Mapping[str, jax.Array], *, scale: float) -> jax.Array:
    """`changed` outside jit: the weight keeps its sharding, and its buffer is donated."""
    return _changed_on_device(weight, change, scale=scale, sharding=weight.sharding)


def _each_parameter(params: Params, adapter: Params, change: Callable[..., jax.Array]) -> dict[str, Any]:
    flat = flatten_dict(dict(params))
    found = {(*path[:-1], KERNEL) if path[-1] == TURNED else path: path for path in flat}
    for name, what in by_parameter(adapter, found).items():
        path = found[name]
        if flat[path].dtype == jnp.int8:
            raise ValueError("an adapter cannot be added to int8 weights: add it before they are quantised")
        flat[path] = change(flat[path], what) if path == name else change(flat[path].T, what).T
    return unflatten_dict(flat)


@partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _changed_on_device(weight: jax.Array, change: Mapping[str, jax.Array], *, scale: float, sharding: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(changed(weight, change, scale=scale), sharding)


def _padded(array: jax.Array, weight: jax.Array) -> jax.Array:
    """Pad an array with zeros at the end for a weight's padding on a mesh (the vocabulary's)."""
    return jnp.pad(array, [(0, there - own) for there, own in zip(weight.shape, array.shape, strict=True)])
