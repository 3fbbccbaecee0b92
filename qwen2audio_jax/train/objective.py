"""The training objective of a run: SFT or DPO, of the weights themselves or of an adapter.

Trained and frozen weights are separated in `train.model` and combined here.
"""

from collections.abc import Mapping
from typing import Any

import jax

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lora import lora_scale, with_adapter
from qwen2audio_jax.train import parts
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.dpo import dpo_sums
from qwen2audio_jax.train.losses import Sums, sft_sums
from qwen2audio_jax.train.settings import TrainSettings
from qwen2audio_jax.train.step import SumsOf

REFERENCE = "reference"
"""The key, among the frozen weights, of the DPO reference's copy of the trained weights."""


def make_objective(settings: TrainSettings, *, config: Qwen2AudioConfig) -> SumsOf:
    """The objective as a function of (trained weights, frozen weights, batch, key).

    Without an adapter the two make up the parameter tree; DPO's frozen weights also hold the initial trained weights
    under `REFERENCE`. With an adapter only the adapter is trained; the frozen weights are the whole tree, and DPO's
    reference.

    Args:
        settings: of the run.
        config: with the compute dtype.
    """
    objective, lora, remat = settings.objective, settings.lora, settings.machine.remat

    def policy_and_reference(
        weights: Mapping[str, Any], frozen: Mapping[str, Any], key: jax.Array | None
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        if lora is not None:
            return with_adapter(frozen, weights, scale=lora_scale(lora), dropout=lora.dropout, key=key), frozen
        shared = {name: tree for name, tree in frozen.items() if name != REFERENCE}
        return parts.join(weights, shared), parts.join(frozen.get(REFERENCE, {}), shared)

    def sums_of(
        weights: Mapping[str, Any], frozen: Mapping[str, Any], batch: TrainBatch, key: jax.Array | None
    ) -> Sums:
        policy, reference = policy_and_reference(weights, frozen, key)
        if objective.kind == "sft":
            return sft_sums(policy, batch, cfg=config, remat=remat)
        return dpo_sums(
            policy,
            reference,
            batch,
            cfg=config,
            beta=objective.beta,
            label_smoothing=objective.label_smoothing,
            remat=remat,
        )

    return sums_of
