"""Next-token cross-entropy, as the reference defines it."""

import jax
import jax.numpy as jnp


def next_token_loss(logits: jax.Array, labels: jax.Array, mask: jax.Array, *, ignore_index: int) -> jax.Array:
    """Mean cross-entropy of every kept label given the position before it.

    A label counts when it is not `ignore_index` and neither it nor the position before it is padding. (The reference
    also counts the first token of a left-padded row, predicted from a padding position, unless its label is ignored.)

    Args:
        logits: [B, T, V] float32.
        labels: [B, T] int32, unshifted: the shift by one happens here.
        mask: [B, T] bool, false on padding.
        ignore_index: label that is ignored.

    Returns:
        [] float32; NaN when no label is kept, as in the reference.
    """
    kept = (labels[:, 1:] != ignore_index) & mask[:, 1:] & mask[:, :-1]
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.where(kept, labels[:, 1:], 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(kept, chosen, 0.0).sum() / kept.sum()
