"""Return values of the model's calls."""

from dataclasses import dataclass

import jax
import numpy as np


@dataclass(frozen=True)
class ModelOutput:
    """The return value of a forward call of the model.

    Attributes:
        logits: [B, T, V] float32, at the input's own positions; 0 where the input is padding.
        loss: [] float32, or None when no labels were given.
    """

    logits: jax.Array
    loss: jax.Array | None


@dataclass(frozen=True)
class GenerateOutput:
    """The return value of `generate(..., return_dict_in_generate=True)`.

    Attributes:
        sequences: [B', T + new] int32: each prompt as given, its new tokens, then padding.
        lengths: [B'] int32, new tokens of each row, its stop token included.
        log_probs: [B', new] float32, of each new token under the model's own distribution (before penalty, temperature
            and filters); 0 after a row's end.
        finish_reasons: for each row "eos", "stop_string" or "length".
    """

    sequences: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    finish_reasons: tuple[str, ...]
