"""Training state: trained weights and optimiser state, sharded over the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.parallel.sharding import fully_sharded, named_sharding


@partial(jax.tree_util.register_dataclass, data_fields=("step", "weights", "optimizer", "key"), meta_fields=())
@dataclass(frozen=True)
class TrainState:
    """The state of a run; one pytree, donated to every step.

    Attributes:
        step: [] int32, steps done.
        weights: the trained weights, float32: a part of the parameter tree, or an adapter's.
        optimizer: the optax state.
        key: [2] uint32, from which every step derives its own key.
    """

    # Arrays, or their shapes, or their shardings: trees of the same structure.
    step: Any
    weights: Any
    optimizer: Any
    key: Any


def weight_shardings(weights: Mapping[str, Any], axes: Mapping[str, Any], *, mesh: Mesh, fsdp: bool) -> Any:
    """The sharding of every weight, given the tree of logical axes; with `fsdp` over `data` as well."""

    def place(names: tuple[str | None, ...], weight: Any) -> NamedSharding:
        return fully_sharded(mesh, *names, shape=weight.shape) if fsdp else named_sharding(mesh, *names)

    return jax.tree.map(place, axes, weights, is_leaf=lambda leaf: isinstance(leaf, tuple))


def state_shardings(
    optimizer: optax.GradientTransformation, weights: Mapping[str, Any], shardings: Any, *, mesh: Mesh
) -> TrainState:
    """The shardings of a whole `TrainState`: moments are sharded like their weights, the rest is replicated.

    Args:
        optimizer: the optimiser of the state.
        weights: arrays or `jax.ShapeDtypeStruct`s.
        shardings: of the weights, the same tree.
        mesh: the devices.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The path of a weight's moments ends in the weight's own path.
        for start in range(len(path)):
            name = jax.tree_util.keystr(path[start:])
            if name in by_path and shapes[name] == leaf.shape:
                return by_path[name]
        return whole

    kept = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, weights))
    return TrainState(step=whole, weights=shardings, optimizer=kept, key=whole)


def new_state(
    weights: Mapping[str, Any], *, optimizer: optax.GradientTransformation, shardings: TrainState, seed: int
) -> TrainState:
    """The state before the first step; the weights are cast to float32 and sharded."""

    def make(weights: Mapping[str, Any]) -> TrainState:
        master = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dict(weights))
        return TrainState(jnp.zeros((), jnp.int32), master, optimizer.init(master), jax.random.PRNGKey(seed))

    return jax.jit(make, out_shardings=shardings)(weights)
