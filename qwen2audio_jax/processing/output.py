"""The processor's output: a mapping of named arrays."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from qwen2audio_jax.torch_style.tensors import LOG, NO_MOVE, tensor_like


class ProcessorOutput(MutableMapping[str, Any]):
    """Arrays by name: a mapping that unpacks with **; its entries are attributes too, and both may be assigned.

    Numpy arrays in it also answer to `size(1)` and `to(...)`: see `TensorLike`.

    Entries of `Qwen2AudioProcessor`, under the names of the reference (`transformers.BatchFeature`):
        input_ids: [B, T] int32.
        attention_mask: [B, T] int32, 1 for tokens, 0 for padding.
        input_features: [A, M, L] float32, the clips of all rows in order; absent without clips.
        feature_attention_mask: [A, L] int32, 1 for valid frames; absent without clips.
    """

    def __init__(self, arrays: Mapping[str, Any], *, truncated_clips: tuple[str, ...] = ()):
        self.__dict__["_arrays"], self.__dict__["_truncated_clips"] = dict(arrays), truncated_clips

    @property
    def truncated_clips(self) -> tuple[str, ...]:
        """Clips that were heard in part (`allow_truncated=True`): position and what is missing, for messages."""
        return self.__dict__.get("_truncated_clips", ())

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"an entry's name is a str, not {type(name).__name__}")
        self._arrays[name] = value

    def __delitem__(self, name: str) -> None:
        del self._arrays[name]

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            raise AttributeError(f"{name!r} is no entry's name; write output[{name!r}] = ... if it is meant to be one")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self._arrays:
            raise AttributeError(f"no entry {name!r}; there are {', '.join(self._arrays) or 'none'}")
        del self[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": dict(self._arrays), "_truncated_clips": self.truncated_clips}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def to(self, *_: Any, **__: Any) -> "ProcessorOutput":
        """These arrays: the model's calls take them to its devices, so that nothing is to be moved before."""
        LOG.debug(NO_MOVE)
        return self

    def __repr__(self) -> str:
        entries = ", ".join(f"{name}: {_describe(value)}" for name, value in self.items())
        return f"ProcessorOutput({entries})"


def _describe(value: Any) -> str:
    return f"{list(np.shape(value))} {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def check_return_tensors(return_tensors: str | None) -> None:
    """Raise a ValueError unless `return_tensors` is None, "np" or "jax"."""
    if return_tensors not in (None, "np", "jax"):
        raise ValueError(
            f'return_tensors={return_tensors!r} is not available here; use "np" (the default) for numpy arrays or '
            '"jax" '
            f"for JAX arrays"
        )


def to_output(
    arrays: Mapping[str, np.ndarray], *, return_tensors: str | None, truncated_clips: tuple[str, ...] = ()
) -> ProcessorOutput:
    """Numpy arrays as they are (None, "np") or as JAX arrays ("jax"), and which clips were heard in part."""
    check_return_tensors(return_tensors)
    if return_tensors == "jax":
        # Imported here: processing audio and text needs no accelerator.
        import jax.numpy as jnp

        converted = {name: jnp.asarray(value) for name, value in arrays.items()}
        return ProcessorOutput(converted, truncated_clips=truncated_clips)
    arrays = {name: tensor_like(value) for name, value in arrays.items()}
    return ProcessorOutput(arrays, truncated_clips=truncated_clips)
