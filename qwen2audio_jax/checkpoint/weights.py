"""Weight loading: a checkpoint's weights onto a mesh, optionally with an adapter added and quantised to int8.

Weights that are quantised here are read a few at a time, and each float array is freed once it is quantised: a device
never holds the whole float model.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from qwen2audio_jax.checkpoint.reader import restore_groups, restore_params, stored_dtypes
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lora import by_parameter, change_in_place, merge_adapter_in_place
from qwen2audio_jax.model.quantization import INT8, channel_axis, quantize, scale_name
from qwen2audio_jax.model.qwen2_audio import sharded_specs
from qwen2audio_jax.storage.bucket import PathOrUrl

AUTO = "auto"

GROUP_BYTES = 512 << 20
"""Bytes of float weights on the devices at once, unless one alone is larger."""

Adapter = tuple[Mapping[str, Any], float]
"""A LoRA adapter and its scale: see `lora`."""


def check_storage(*, weights: str, cache: str) -> None:
    """Raise a `ValueError` unless both are "auto" or "int8"."""
    for name, value in (("weights_dtype", weights), ("cache_dtype", cache)):
        if value not in (AUTO, INT8):
            raise ValueError(f"{name}={value!r} is not one of 'auto', 'int8'")


def load_weights(
    path: PathOrUrl,
    *,
    config: Qwen2AudioConfig,
    mesh: Mesh,
    weights: str = AUTO,
    adapter: Adapter | None = None,
) -> dict[str, Any]:
    """The weights of a checkpoint.

    Args:
        path: a finished Orbax checkpoint: see `restore_params`.
        config: of the model; weights that are not int8 get its `dtype`.
        mesh: the target devices.
        weights: "auto" (int8 if stored as int8) or "int8": the decoder's are quantised from the stored values.
        adapter: added to the weights: in float32 to those that are quantised, else rounded to `config.dtype`.

    Returns:
        The tree of `sharded_specs(config, mesh=mesh, weights=...)` with `jax.Array`s.

    Raises:
        ValueError: not a finished checkpoint, or one that does not fit the configuration, or an adapter for weights
            that are int8 already.
    """
    dtypes = stored_dtypes(path)
    if INT8 in dtypes.values():
        if adapter is not None:
            raise ValueError(
                f"{path}: its weights are int8 and an adapter is added before they are: load the checkpoint that it "
                "was converted from with adapter= and weights='int8', or convert that with --adapter and --dtype int8"
            )
        return restore_params(path, specs=sharded_specs(config, mesh=mesh, weights=INT8))
    if weights == INT8:
        return _quantized(path, dtypes, config=config, mesh=mesh, adapter=adapter)
    params = restore_params(path, specs=sharded_specs(config, mesh=mesh))
    return params if adapter is None else merge_adapter_in_place(params, adapter[0], scale=adapter[1])


def _quantized(
    path: PathOrUrl,
    dtypes: Mapping[str, str],
    *,
    config: Qwen2AudioConfig,
    mesh: Mesh,
    adapter: Adapter | None,
) -> dict[str, Any]:
    specs = flatten_dict(sharded_specs(config, mesh=mesh), sep="/")
    found = {} if adapter is None else by_parameter(adapter[0], {tuple(name.split("/")) for name in specs})
    changes = {"/".join(path): change for path, change in found.items()}
    shardings = {
        name: spec.sharding
        for name, spec in flatten_dict(sharded_specs(config, mesh=mesh, weights=INT8), sep="/").items()
    }

    def as_read(name: str, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The spec for reading: weights to quantise keep their stored dtype, so that codes do not depend on `dtype`."""
        if channel_axis(name) is None:
            return spec
        dtype = jnp.float32 if name in changes else dtypes.get(name, spec.dtype)
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=spec.sharding)

    wanted = unflatten_dict({name: as_read(name, spec) for name, spec in specs.items()}, sep="/")
    params: dict[str, jax.Array] = {}
    for group in restore_groups(path, specs=wanted, group_bytes=GROUP_BYTES):
        for name in list(group):
            weight = group.pop(name)
            if name in changes and adapter is not None:
                weight = change_in_place(weight, changes[name], scale=adapter[1])
            axis = channel_axis(name)
            if axis is None:
                params[name] = weight
                continue
            scales = scale_name(name)
            made = _quantize(weight, axis=1 - axis, shardings=(shardings[name], shardings[scales]))
            # Free this one before the next one is read.
            del weight
            params[name], params[scales] = jax.block_until_ready(made)
    return unflatten_dict(params, sep="/")


@partial(jax.jit, static_argnames=("axis", "shardings"))
def _quantize(weight: jax.Array, *, axis: int, shardings: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    return jax.lax.with_sharding_constraint(quantize(weight, axis=axis), shardings)
