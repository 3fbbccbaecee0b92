"""The optimiser step as one jitted program: micro-batches, loss over the global batch, clipping, update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.losses import Sums
from qwen2audio_jax.train.state import TrainState

SumsOf = Callable[[Mapping[str, Any], Mapping[str, Any], TrainBatch, jax.Array | None], Sums]
"""The objective: (trained weights, frozen weights, batch, key) to its sums; without a key there is no dropout."""

Metrics = dict[str, jax.Array]


def _micro_batches(batch: TrainBatch, count: int) -> TrainBatch:
    """Split [R, ...] into [count, R / count, ...]; every device splits its own rows, so none move."""
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, count, *x.shape[1:])).swapaxes(0, 1), batch)


def gradients(
    sums_of: SumsOf, weights: Any, frozen: Any, batch: TrainBatch, key: jax.Array, *, accumulation: int
) -> tuple[Any, Metrics]:
    """The gradient of the mean loss over the whole batch, and the means, accumulated over micro-batches in float32."""

    def one(weights: Any, batch: TrainBatch, key: jax.Array) -> tuple[jax.Array, Sums]:
        sums = sums_of(weights, frozen, batch, key)
        return sums.loss, sums

    differentiate = jax.grad(one, has_aux=True)
    if accumulation == 1:
        gradient, sums = differentiate(weights, batch, key)
    else:
        micro = _micro_batches(batch, accumulation)
        keys = jax.random.split(key, accumulation)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(weights, *part)), None

        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(differentiate, weights, jax.tree.map(lambda x: x[0], micro), keys[0]),
        )
        (gradient, sums), _ = jax.lax.scan(add, zero, (micro, keys))
    count = jnp.maximum(sums.count, 1.0)
    means = {"loss": sums.loss / count, **{name: value / count for name, value in sums.extra.items()}}
    return jax.tree.map(lambda g: g / count, gradient), {**means, "targets": sums.count}


def make_step(
    sums_of: SumsOf, *, optimizer: optax.GradientTransformation, schedule: optax.Schedule, accumulation: int
) -> Callable[[TrainState, Any, TrainBatch], tuple[TrainState, Metrics]]:
    """The function to jit, its state donated: (state, frozen weights, batch) to (new state, metrics).

    Metrics: the objective's means, `targets` (the count of the mean), `gradient_norm` before clipping and
    `learning_rate`. A step whose loss or gradient is not finite leaves the weights unchanged.
    """

    def step(state: TrainState, frozen: Any, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradient, metrics = gradients(sums_of, state.weights, frozen, batch, key, accumulation=accumulation)
        norm = optax.tree.norm(gradient)
        updates, kept = optimizer.update(gradient, state.optimizer, state.weights)
        sound = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(sound, new, old)

        weights = jax.tree.map(choose, optax.apply_updates(state.weights, updates), state.weights)
        kept = jax.tree.map(choose, kept, state.optimizer)
        metrics = {**metrics, "gradient_norm": norm, "learning_rate": jnp.asarray(schedule(state.step), jnp.float32)}
        return TrainState(state.step + 1, weights, kept, state.key), metrics

    return step


def make_evaluation(sums_of: SumsOf) -> Callable[[Any, Any, TrainBatch], Sums]:
    """The function to jit for evaluation: (trained, frozen, batch) to the objective's sums."""
    return lambda weights, frozen, batch: sums_of(weights, frozen, batch, None)
