"""Optax optimisers and learning-rate schedules by name."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from qwen2audio_jax.train.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, *, steps: int) -> optax.Schedule:
    """The learning-rate schedule as a function of the update's index, from 0 to `steps` - 1."""
    peak, warmup = settings.learning_rate, min(settings.warmup_steps, steps)
    last, rest = peak * settings.final_share, max(steps - warmup, 1)
    if settings.schedule == "constant":
        body: optax.Schedule = optax.constant_schedule(peak)
    elif settings.schedule == "linear":
        body = optax.linear_schedule(peak, last, rest)
    elif settings.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_share)
    else:
        falling = max(int(steps * settings.decay_share), 1)
        body = optax.linear_schedule(peak, last, falling, transition_begin=max(rest - falling, 0))
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), body], [warmup])


def _is_kernel(params: Mapping[str, Any]) -> Any:
    def kernel(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(kernel, params)


def make_optimizer(settings: OptimizerSettings, *, steps: int) -> optax.GradientTransformation:
    """Clipping, then the named optimiser; weight decay is decoupled and scaled by the learning rate, as in torch."""
    rate = learning_rate(settings, steps=steps)
    b1, b2 = settings.betas
    decayed = {"weight_decay": settings.weight_decay, "mask": None if settings.decay == "all" else _is_kernel}
    if settings.name == "adamw":
        update = optax.adamw(rate, b1=b1, b2=b2, eps=settings.eps, **decayed)
    elif settings.name == "lion":
        update = optax.lion(rate, b1=b1, b2=b2, **decayed)
    elif settings.name == "muon":
        update = _muon(settings, rate)
    else:
        scale = {
            "adam": lambda: optax.scale_by_adam(b1=b1, b2=b2, eps=settings.eps),
            "adafactor": lambda: optax.scale_by_factored_rms(),
            "sgd": lambda: optax.trace(decay=b1),
        }[settings.name]()
        update = optax.chain(scale, optax.add_decayed_weights(**decayed), optax.scale_by_learning_rate(rate))
    if not settings.clip_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)


def _muon(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for the rest: embeddings, head, convolutions, biases and norms.

    Both with Nesterov's momentum. The root mean square of Muon's update is 0.2 of the learning rate, about AdamW's, so
    that AdamW's learning rates carry over.
    Source: Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2.
    """

    def hidden(params: Mapping[str, Any]) -> Any:
        def dimensions(path: tuple[Any, ...], x: jax.Array) -> MuonDimensionNumbers | None:
            inside = path[-1].key in ("kernel", "lora_a", "lora_b") and not any(p.key == "lm_head" for p in path)
            return MuonDimensionNumbers() if inside and x.ndim == 2 else None

        return jax.tree_util.tree_map_with_path(dimensions, params)

    b1, b2 = settings.betas
    return muon(
        rate,
        beta=0.95,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=settings.weight_decay if settings.decay == "all" else 0.0,
        weight_decay_mask=None if settings.decay == "all" else _is_kernel,
        muon_weight_dimension_numbers=hidden,
        consistent_rms=0.2,
    )
