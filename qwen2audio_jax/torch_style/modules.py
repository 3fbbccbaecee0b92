"""Methods of torch's modules that code written for transformers calls on a model: where it is, and to move it."""

import logging
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.torch_style.attributes import no_attribute
from qwen2audio_jax.torch_style.loading_options import DTYPES, dtype_name

LOG = logging.getLogger(__name__)

_ADAPTER = "from_pretrained(..., adapter=folder) merges an adapter while it loads"
_ONLY_ANSWERS = "a loaded model only answers, and qwen2audio train trains one"
_PARAMS = "model.params is a nested dict of all weights"
_INSTEAD = {
    **dict.fromkeys(("disable_adapter", "load_adapter", "merge_and_unload", "set_adapter"), _ADAPTER),
    **dict.fromkeys(("print_trainable_parameters", "requires_grad_", "train", "training", "zero_grad"), _ONLY_ANSWERS),
    **dict.fromkeys(("children", "modules", "named_modules", "named_parameters", "parameters", "state_dict"), _PARAMS),
    **dict.fromkeys(("get_input_embeddings", "get_output_embeddings", "language_model", "lm_head"), _PARAMS),
    **dict.fromkeys(("audio_tower", "get_audio_features", "multi_modal_projector"), "model.encode_audio encodes clips"),
    "enable_input_require_grads": _ONLY_ANSWERS,
    "forward": "call the model itself, model(**inputs)",
    "gradient_checkpointing_disable": _ONLY_ANSWERS,
    "hf_device_map": "model.mesh says on which devices it is",
    "load_state_dict": "Qwen2AudioForConditionalGeneration(config, params) takes weights",
    "tie_weights": "config.text_config.tie_word_embeddings says whether they are",
    "bfloat16": "load it with dtype='bfloat16'",
    "chat": "apply_chat_template(conversation, tokenize=True) makes the inputs of generate",
    "compile": "everything is compiled already; model.warmup(...) does it ahead",
    "float": "load it with dtype='float32'",
    "gradient_checkpointing_enable": _ONLY_ANSWERS,
    "half": "load it with dtype='float16'",
    "push_to_hub": "save_pretrained(folder), and `hf upload` sends it",
    "resize_token_embeddings": "the vocabulary is the checkpoint's",
}


class ModuleMethods:
    """Attributes and methods of torch's modules and of transformers' models that have a meaning for a loaded model."""

    config: Qwen2AudioConfig
    mesh: Mesh

    def __getattr__(self, name: str) -> Any:
        """Nothing; the error names what to use instead of a method of torch's or transformers'."""
        raise no_attribute("model", name, _INSTEAD)

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
