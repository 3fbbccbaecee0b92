"""Merging of a LoRA adapter during conversion: kernel + scale * a . b in float32, then cast back."""

import hashlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint.adapter import CONFIG, WEIGHTS, find_adapter, load_adapter
from qwen2audio_jax.config import Qwen2AudioConfig
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
        self._pairs: dict[str, dict[str, np.ndarray]] = {}
        for (*path, side), array in flatten_dict(tree).items():
            self._pairs.setdefault("/".join([*path, "kernel"]), {})[side] = np.asarray(array, np.float32)
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            digest.update((folder / name).read_bytes())
        self.record: dict[str, Any] = {"source": str(source), "sha256": digest.hexdigest()}
        """The manifest's record of it; the hash is over both of its files."""

    def touches(self, parameter: str) -> bool:
        """Return True if the adapter changes the parameter at this path."""
        return parameter in self._pairs

    def addition(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """The addition to output channels `start` to `stop` of a kernel: float32 [stop - start, in]."""
        a, b = self._pairs[parameter]["lora_a"], self._pairs[parameter]["lora_b"]
        return (np.float32(self._scale) * (a @ b[:, start:stop])).T

    def add(self, parameter: str, kernel: np.ndarray) -> None:
        """Add to a kernel [in, out], in place and in its dtype."""
        a, b = self._pairs[parameter]["lora_a"], self._pairs[parameter]["lora_b"]
        rows = max(1, _BLOCK_BYTES // (4 * kernel.shape[1]))
        for start in range(0, len(kernel), rows):
            block = kernel[start : start + rows]
            with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the sum
                block[...] = block.astype(np.float32) + np.float32(self._scale) * (a[start : start + rows] @ b)
