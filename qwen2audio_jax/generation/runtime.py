"""Runtime: weights, and everything that decides which programs compute with them."""

from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.layers import Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params",),
    meta_fields=("config", "mesh", "cache_dtype", "attention"),
)
@dataclass(frozen=True)
class Runtime:
    """What every call of one model shares. Another value of any field but `params` compiles other programs.

    Attributes:
        params: the weights, on `mesh`.
        config: the model's configuration; its `dtype` is the compute dtype.
        mesh: the devices, with axes `data` and `model`.
        cache_dtype: dtype of keys and values: a float dtype's name or "int8".
        attention: implementation for whole prompts and clips: "xla", "cudnn" or "pallas".
    """

    params: Params
    config: Qwen2AudioConfig
    mesh: Mesh
    cache_dtype: str
    attention: str
