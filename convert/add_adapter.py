"""Merging of a LoRA adapter during conversion: its changes in float32, then cast back; see `model.lora.changed`."""

import hashlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint.adapter import CONFIG, WEIGHTS, find_adapter, load_adapter
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.lora import by_parameter
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.storage.bucket import PathOrUrl

_BLOCK_BYTES = 8 << 20
"""Bytes of a kernel in float32 at once."""


class Merge:
    """An adapter in PEFT's format: a folder, the URL of one in a bucket, or a hub id.

    Raises:
        ValueError: see `adapter.load_adapter`.
    """

    def __init__(self, source: PathOrUrl, *, config: Qwen2AudioConfig):
        folder = find_adapter(source)
        tree, self._scale = load_adapter(folder, config=config)
        changes = by_parameter(tree, flatten_dict(parameter_specs(config)))
        self._changes = {"/".join(path): change for path, change in changes.items()}
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update((folder / name).read_bytes())
        self.record: dict[str, Any] = {"source": str(source), "sha256": digest.hexdigest()}
        """The manifest's record of it; the hash is over both of its files."""

    def touches(self, parameter: str) -> bool:
        """Return True if the adapter changes the parameter at this path."""
        return parameter in self._changes

    def rows(self, parameter: str, block: np.ndarray, start: int) -> np.ndarray:
        """Rows of a stored tensor, from `start` on, as the adapter changes them: float32.

        A kernel's rows are its output channels, those of an embedding its tokens.
        """
        change, stop, kernel = self._changes[parameter], start + len(block), parameter.endswith("/kernel")
        rows = block.astype(np.float32)
        if "whole" in change:
            rows = np.array((change["whole"].T if kernel else change["whole"])[start:stop], np.float32)
        if "lora_a" in change:
            a, b = change["lora_a"], change["lora_b"]
            product = (a @ b[:, start:stop]).T if kernel else a[start:stop] @ b
            rows = rows + np.float32(self._scale) * product
        if "tokens" in change:
            here = (change["tokens"] >= start) & (change["tokens"] < stop)
            rows[change["tokens"][here] - start] = change["values"][here]
        return rows

    def add(self, parameter: str, array: np.ndarray) -> None:
        """Change a parameter, in place and in its dtype."""
        change = self._changes[parameter]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the sum
            if "whole" in change:
                array[...] = change["whole"]
            if "lora_a" in change:
                a, b = change["lora_a"], change["lora_b"]
                size = max(1, _BLOCK_BYTES // (4 * array.shape[1]))
                for start in range(0, len(array), size):
                    block = array[start : start + size]
                    block[...] = block.astype(np.float32) + np.float32(self._scale) * (a[start : start + size] @ b)
            if "tokens" in change:
                vectors = array.T if parameter.endswith("/kernel") else array
                vectors[change["tokens"]] = change["values"]
