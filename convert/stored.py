"""One parameter of an Orbax checkpoint at a time, read from disk into host memory."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from qwen2audio_jax.checkpoint import PARAMS, READ_BYTES, quiet
from qwen2audio_jax.manifest import sha256_of


def read_stored(folder: Path, name: str, *, record: dict[str, Any]) -> np.ndarray:
    """A parameter of a finished checkpoint, as it is stored.

    Args:
        folder: the checkpoint.
        name: the parameter's path ("encoder/conv1/bias").
        record: what the manifest says of it: shape, dtype and sha256.

    Raises:
        ValueError: it cannot be read, or its bytes are not those that the manifest's sha256 was made from.
    """
    dtype = np.dtype(record["dtype"])
    abstract = unflatten_dict({name: np.empty(record["shape"], dtype)}, sep="/")
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    # A parameter may be larger than the bound on what is read at once, and Orbax refuses to read beyond it.
    context.memory_options.read_concurrent_bytes = max(READ_BYTES, 2 * record["bytes"] + 1)
    try:
        with context, quiet():
            loaded = ocp.load(folder.absolute() / PARAMS, abstract)
        array = np.asarray(flatten_dict(loaded, sep="/")[name])
    except Exception as error:  # Damage reaches Orbax as many kinds of errors; whichever it is, this parameter is lost.
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise ValueError(
            f"{name}: cannot be read ({reason}); the checkpoint is damaged: copy or convert it again"
        ) from None
    if sha256_of(array) != record["sha256"]:
        raise ValueError(f"{name}: its bytes do not have the manifest's sha256; damaged: copy or convert it again")
    return array
