"""Training losses as sums over rows, which the step divides by the count over the whole global batch.

So neither micro-batches, nor data parallelism, nor packing changes a loss or a gradient.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.forward import hidden_states, target_log_probs


@partial(jax.tree_util.register_dataclass, data_fields=("loss", "count", "extra"), meta_fields=())
@dataclass(frozen=True)
class Sums:
    """Sums over some rows.

    Attributes:
        loss: [] float32, to be divided by `count`.
        count: [] float32, the number of target tokens (SFT) or pairs (DPO) that the loss is averaged over.
        extra: further sums by name, each averaged over `count` too.
    """

    loss: jax.Array
    count: jax.Array
    extra: dict[str, jax.Array]


def sft_sums(params: Params, batch: TrainBatch, *, cfg: Qwen2AudioConfig, remat: str = "none") -> Sums:
    """Cross-entropy of the answers' tokens.

    Source: `Qwen2AudioForConditionalGeneration.forward` with labels.
    """
    targets = jnp.asarray(batch.targets)
    log_probs = target_log_probs(params, hidden_states(params, batch, cfg=cfg, remat=remat), targets, cfg=cfg)
    return Sums(-log_probs.sum(), (targets >= 0).sum().astype(jnp.float32), {})
