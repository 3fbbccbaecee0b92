"""Direct preference optimisation: chosen over rejected answers, relative to a frozen reference model.

Source: DPO (arXiv 2305.18290), equation 7; label smoothing as in "A note on DPO with noisy preferences" (cDPO) and in
trl's `DPOTrainer` with loss type "sigmoid".
"""

from functools import partial

import jax
import jax.numpy as jnp

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.forward import hidden_states, target_log_probs
from qwen2audio_jax.train.losses import Sums

Number = float | jax.Array


def answer_log_probs(params: Params, batch: TrainBatch, *, cfg: Qwen2AudioConfig, remat: str = "none") -> jax.Array:
    """Log-probability of every answer, the sum over its target tokens: float32 [R, T // 2, 2], chosen before rejected.

    A row of T tokens has room for T // 2 pairs; the values of absent pairs are 0.
    """
    hidden = hidden_states(params, batch, cfg=cfg, remat=remat)
    log_probs = target_log_probs(params, hidden, jnp.asarray(batch.targets), cfg=cfg)
    pairs = log_probs.shape[1] // 2
    total = jax.vmap(partial(jax.ops.segment_sum, num_segments=2 * pairs + 1))
    answers = total(log_probs, jnp.asarray(batch.segments))[:, 1:]  # segment 0 is padding
    return answers.reshape(-1, pairs, 2)


def dpo_sums(
    params: Params,
    reference_params: Params,
    batch: TrainBatch,
    *,
    cfg: Qwen2AudioConfig,
    beta: Number,
    label_smoothing: Number = 0.0,
    remat: str = "none",
) -> Sums:
    """The DPO loss of rows of preference pairs.

    With margin = beta * (log-ratio of the chosen answer - that of the rejected one), each ratio policy to reference, a
    pair's loss is -(1 - label_smoothing) * log sigmoid(margin) - label_smoothing * log sigmoid(-margin).

    Args:
        params: the policy's weights.
        reference_params: the reference's weights, the same tree; they get no gradient. Arrays shared with the policy
            are not duplicated, nor is their computation: an encoder that is not trained runs once.
        batch: rows of pairs, see `TrainBatch.segments`.
        cfg: static.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: assumed share of swapped pairs, from 0 to below 0.5.
        remat: of the policy; the reference has no backward pass.

    Returns:
        Sums over pairs. Besides the loss: `accuracy` (the chosen answer has the higher reward), `chosen_reward`,
        `rejected_reward` (beta * log-ratio) and `margin` (their difference).
    """
    policy = answer_log_probs(params, batch, cfg=cfg, remat=remat)
    reference = answer_log_probs(jax.lax.stop_gradient(reference_params), batch, cfg=cfg)
    rewards = beta * (policy - reference)  # [R, T / 2, 2]
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    held = jnp.arange(margin.shape[1]) < jnp.asarray(batch.segments).max(1, keepdims=True) // 2

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(held, values, 0.0).sum()

    extra = {
        "accuracy": total((chosen > rejected).astype(jnp.float32)),
        "chosen_reward": total(chosen),
        "rejected_reward": total(rejected),
        "margin": total(margin),
    }
    return Sums(total(losses), held.sum().astype(jnp.float32), extra)
