"""The processor's output: a read-only mapping of named arrays."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class ProcessorOutput(Mapping[str, Any]):
    """Arrays by name: a read-only mapping that unpacks with ** and has its entries as attributes too.

    Entries of `Qwen2AudioProcessor`, under the names of the reference (`transformers.BatchFeature`):
        input_ids: [B, T] int32.
        attention_mask: [B, T] int32, 1 for tokens, 0 for padding.
        input_features: [A, M, L] float32, the clips of all rows in order; absent without clips.
        feature_attention_mask: [A, L] int32, 1 for valid frames; absent without clips.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling access attributes before __init__ has run.
        arrays = self.__dict__.get("_arrays", {})
        if name in arrays:
            return arrays[name]
        raise AttributeError(f"no entry {name!r}; there are {', '.join(arrays) or 'none'}")

    def __repr__(self) -> str:
        entries = ", ".join(f"{name}: {list(np.shape(value))} {value.dtype}" for name, value in self.items())
        return f"ProcessorOutput({entries})"


def check_return_tensors(return_tensors: str | None) -> None:
    """Raise a ValueError unless `return_tensors` is None, "np" or "jax"."""
    if return_tensors not in (None, "np", "jax"):
        raise ValueError(
            f'return_tensors={return_tensors!r} is not available here; use "np" (the default) for numpy arrays or '
            '"jax" '
            f"for JAX arrays"
        )


def to_output(arrays: Mapping[str, np.ndarray], *, return_tensors: str | None) -> ProcessorOutput:
    """Numpy arrays as they are (None, "np") or as JAX arrays ("jax")."""
    check_return_tensors(return_tensors)
    if return_tensors == "jax":
        # Imported here: processing audio and text needs no accelerator.
        import jax.numpy as jnp

        return ProcessorOutput({name: jnp.asarray(value) for name, value in arrays.items()})
    return ProcessorOutput(arrays)
