"""Methods of torch's modules that code written for transformers calls on a model: where it is, and to move it."""

import logging
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.torch_style.loading_options import DTYPES, dtype_name

LOG = logging.getLogger(__name__)

_INSTEAD = {
    "bfloat16": "load it with dtype='bfloat16'",
    "chat": "apply_chat_template(conversation, tokenize=True) makes the inputs of generate",
    "compile": "everything is compiled already; model.warmup(...) does it ahead",
    "float": "load it with dtype='float32'",
    "gradient_checkpointing_enable": "qwen2audio train trains it",
    "half": "load it with dtype='float16'",
    "named_parameters": "model.params is a nested dict of all weights",
    "parameters": "model.params is a nested dict of all weights",
    "push_to_hub": "save_pretrained(folder), and `hf upload` sends it",
    "resize_token_embeddings": "the vocabulary is the checkpoint's",
    "state_dict": "model.params is a nested dict of all weights",
    "train": "qwen2audio train trains it; a loaded model only answers",
}


class ModuleMethods:
    """Attributes and methods of torch's modules and of transformers' models that have a meaning for a loaded model."""

    config: Qwen2AudioConfig
    mesh: Mesh

    def __getattr__(self, name: str) -> Any:
        """Nothing; the error names what to use instead of a method of torch's or transformers'."""
        remedy = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise AttributeError(f"the model has no attribute {name!r}{remedy}")

    @property
    def device(self) -> jax.Device:
        """The first device of the mesh."""
        return self.mesh.devices.flat[0]

    @property
    def dtype(self) -> Any:
        """The compute dtype, a numpy dtype."""
        return jnp.dtype(self.config.dtype)

    def eval(self) -> Self:
        """The model itself, which only ever answers: there is no training mode to leave."""
        return self

    def to(self, *places: Any, **more: Any) -> Self:
        """The model itself, where it is: `from_pretrained(mesh=...)` puts it on devices, and nothing moves it.

        Raises:
            ValueError: another dtype than its own, which would change its answers.
        """
        for place in (*places, *more.values()):
            if (asked := _dtype(place)) not in (None, self.config.dtype):
                raise ValueError(f"the model computes in {self.config.dtype}: load it with dtype={asked!r}")
        LOG.debug("the model stays on the devices of its mesh: from_pretrained(mesh=...) chooses them")
        return self

    cuda = cpu = to


def _dtype(place: Any) -> str | None:
    """The name of a dtype among the arguments of `to`; None of a device."""
    try:
        name = dtype_name(place)
    except ValueError:
        return None
    return name if name in DTYPES else None
