"""Parameters of an Orbax checkpoint, read from disk into host memory, several at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from qwen2audio_jax.checkpoint import PARAMS, READ_BYTES, quiet
from qwen2audio_jax.manifest import sha256_of

Records = Mapping[str, Mapping[str, Any]]


def groups_of(names: Sequence[str], records: Records, *, limit: int) -> Iterator[list[str]]:
    """The names in runs of at most `limit` bytes, unless one alone has more: a read by Orbax takes 35 ms to begin."""
    run: list[str] = []
    held = 0
    for name in names:
        if run and held + records[name]["bytes"] > limit:
            yield run
            run, held = [], 0
        run.append(name)
        held += records[name]["bytes"]
    if run:
        yield run


def read_group(folder: Path, names: Sequence[str], records: Records) -> dict[str, np.ndarray | ValueError]:
    """Parameters of a finished checkpoint, as they are stored; for one that is damaged, the error that says so.

    Args:
        folder: the checkpoint.
        names: paths of parameters ("encoder/conv1/bias").
        records: what the manifest says of them.
    """
    try:
        return dict(_load(folder, names, records))
    except Exception as error:
        if len(names) > 1:  # one of them is damaged: which?
            return {name: read_group(folder, [name], records)[name] for name in names}
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        return {names[0]: _damaged(names[0], f"cannot be read ({reason})")}


def check_hash(name: str, array: np.ndarray, records: Records) -> None:
    """Raise a `ValueError` unless a parameter's bytes are those that the manifest's sha256 was made from."""
    if sha256_of(array) != records[name]["sha256"]:
        raise _damaged(name, "its bytes do not have the manifest's sha256")


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(f"{name}: {what}; the checkpoint is damaged: copy or convert it again")


def _load(folder: Path, names: Sequence[str], records: Records) -> dict[str, np.ndarray]:
    abstract = {name: np.empty(records[name]["shape"], np.dtype(records[name]["dtype"])) for name in names}
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    # A parameter may be larger than the bound on what is read at once, and Orbax refuses to read beyond it.
    largest = max(records[name]["bytes"] for name in names)
    context.memory_options.read_concurrent_bytes = max(READ_BYTES, 2 * largest + 1)
    with context, quiet():
        loaded = ocp.load(folder.absolute() / PARAMS, unflatten_dict(abstract, sep="/"))
    return {name: np.asarray(array) for name, array in flatten_dict(loaded, sep="/").items()}
