"""Runtime: weights, and everything that decides which programs compute with them."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

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

    @cached_property
    def encoder(self) -> "Runtime":
        """The same with the weights of encoder and projector alone: what a program is given costs time, used or not."""
        return replace(self, params={name: self.params[name] for name in ("encoder", "projector")})

    @cached_property
    def decoder(self) -> "Runtime":
        """The same with the decoder's weights alone."""
        return replace(self, params={"decoder": self.params["decoder"]})
