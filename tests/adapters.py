"""Random adapters for the tiny models."""

import copy

import jax
import numpy as np
import tiny

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lora import lora_specs
from qwen2audio_jax.train.settings import LoraSettings

EVERYTHING = ("all-linear", "lm_head")
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj out_proj fc1 fc2".split()  # noqa: SIM905


def config_of(name):
    return Qwen2AudioConfig.from_dict(copy.deepcopy(tiny.CONFIGS[name]))


def settings_of(targets=EVERYTHING, **changes):
    return LoraSettings(**{"rank": 3, "alpha": 4.0, "targets": targets, **changes})


def random_adapter(name, settings, *, seed=0):
    """An adapter that changes much, but lets no activation grow: both matrices are random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: (rng.standard_normal(spec.shape) * 0.5 / spec.shape[0] ** 0.5).astype(np.float32),
        lora_specs(config_of(name), settings),
    )
