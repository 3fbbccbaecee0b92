"""Checkpoints on disk: an Orbax parameter tree in `params/`, settings files beside it, and a manifest.

`manifest.json` is written last, so a folder without it is not a checkpoint, whatever stopped its writer; nothing is
renamed into place, which object stores cannot do. Stored shapes are the model's own: a vocabulary is padded for a mesh
when it is restored. `checkpoint_writer` writes checkpoints; `restore_params` reads them.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen2audio_jax.checkpoint.manifest import PARAMS, damaged_entry
from qwen2audio_jax.checkpoint.orbax_params import open_params, place
from qwen2audio_jax.config.strict_json import read_json_object
from qwen2audio_jax.storage.bucket import Folder, PathOrUrl, folder_at

MANIFEST = "manifest.json"
MARKER = ".qwen2audio_jax_incomplete"
"""Marker file in a folder while it is written, locked by its writer; one left by a killed writer is not locked."""

FORMAT = "qwen2audio_jax checkpoint"
VERSION = 2

READ_BYTES = 256 << 20
"""The largest parameter that is read beside others (`THREADS` at once); larger ones are read alone, before them."""

THREADS = 4
"""Parameters read at once."""

PADDED_AXES = {
    "decoder/embed_tokens/embedding": 0,
    "decoder/embed_tokens/scale": 0,
    "decoder/lm_head/kernel": 1,
    "decoder/lm_head/scale": 0,
}
"""Parameters that are padded for a mesh, and their vocabulary axis."""

READ_IN_PLACE = ("gs://",)
"""Buckets that are read directly, each process its devices' shards; checkpoints in others are copied first."""


def is_checkpoint(path: PathOrUrl) -> bool:
    """Return True if `path` is a folder, local or in a bucket, with a finished checkpoint of this package."""
    return _manifest_problem(folder_at(path)) is None


def read_in_place(folder: Folder) -> bool:
    """Return True if a checkpoint is read where it is."""
    return isinstance(folder, Path) or str(folder).startswith(READ_IN_PLACE)


def read_manifest(path: PathOrUrl) -> dict[str, Any]:
    """The manifest of a checkpoint.

    It holds `format`, `version`, `tool` (its writer), `source`, `totals`, `files` (those of `params/` -> bytes) and
    `parameters` (path -> shape, dtype, bytes, sha256 and, if converted, `origin`).

    Raises:
        ValueError: the folder holds no finished checkpoint, or one of a later version.
    """
    folder = folder_at(path)
    problem = _manifest_problem(folder)
    if problem is not None:
        raise ValueError(f"{folder}: {problem}")
    return read_json_object(folder / MANIFEST)


def _manifest_problem(folder: Folder) -> str | None:
    if not folder.is_dir():
        return "no such folder; give a folder that `convert` wrote"
    if not (folder / MANIFEST).is_file():
        if (folder / MARKER).exists():
            return (
                "holds an unfinished checkpoint (its writer was stopped or still runs); run the same conversion again"
            )
        if not isinstance(folder, Path) and (folder / PARAMS).exists():
            return "holds an unfinished upload; run the same conversion again"
        return f"holds no {MANIFEST}, so it is not a finished checkpoint; give a folder that `convert` wrote"
    try:
        manifest = read_json_object(folder / MANIFEST)
    except ValueError as error:
        return f"the manifest cannot be read: {error}"
    if manifest.get("format") != FORMAT:
        return f"its {MANIFEST} is not that of a {FORMAT}; give a folder that `convert` wrote"
    if manifest.get("version") != VERSION:
        return (
            f"is a checkpoint of version {manifest.get('version')!r} and this package reads version {VERSION}; "
            "upgrade qwen2audio-jax or convert again"
        )
    if (name := damaged_entry(manifest)) is not None:
        return f"its {MANIFEST} is damaged at {name}; copy or convert it again"
    return None


def stored_dtypes(path: PathOrUrl) -> dict[str, str]:
    """The stored dtype of every parameter of a checkpoint, by its path; raises as `read_manifest`."""
    return {name: record["dtype"] for name, record in read_manifest(path)["parameters"].items()}


def restore_params(path: PathOrUrl, *, specs: Mapping[str, Any]) -> dict[str, Any]:
    """Read parameters from disk straight onto their devices.

    Args:
        path: a finished checkpoint, local or in a bucket that is read in place (`READ_IN_PLACE`).
        specs: nested dict of `jax.ShapeDtypeStruct`, each with its target `sharding` (None: the default device). It
            may leave out whole top-level parts, such as the decoder, but nothing within a part. Floating dtypes are
            cast, int8 is read as such; a vocabulary (`PADDED_AXES`) longer than the stored one is padded with zeros.

    Returns:
        The tree of `specs` with `jax.Array`s.

    Raises:
        ValueError: not a finished checkpoint, or tree and shapes differ (every difference is listed), or the stored
            data is damaged or incomplete, or lies in another kind of bucket.
    """
    folder = folder_at(path)
    wanted, stored = _checked(folder, specs)
    # The parameters that need the most memory to read go first and alone, while little is held.
    large = sorted(
        (name for name in wanted if _bytes(wanted[name]) > READ_BYTES), key=lambda name: -_bytes(wanted[name])
    )
    params = _read(folder, {name: wanted[name] for name in large}, stored=stored, threads=1)
    rest = {name: leaf for name, leaf in wanted.items() if name not in params}
    return unflatten_dict(params | _read(folder, rest, stored=stored), sep="/")


def restore_groups(path: PathOrUrl, *, specs: Mapping[str, Any], group_bytes: int) -> Iterator[dict[str, jax.Array]]:
    """`restore_params` a few parameters at a time, the largest first.

    Args:
        path: see `restore_params`.
        specs: see `restore_params`.
        group_bytes: parameters in one group, unless one alone is larger.

    Yields:
        Parameters by their path. The caller owns them: those it drops are freed before the next ones are read.

    Raises:
        ValueError: as `restore_params`, before anything is read.
    """
    folder = folder_at(path)
    wanted, stored = _checked(folder, specs)
    group: dict[str, Any] = {}
    held = 0
    for name in sorted(wanted, key=lambda name: (-_bytes(wanted[name]), name)):
        if group and held + _bytes(wanted[name]) > group_bytes:
            yield _read(folder, group, stored=stored)
            group, held = {}, 0
        group[name] = wanted[name]
        held += _bytes(wanted[name])
    if group:
        yield _read(folder, group, stored=stored)


def _bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _checked(folder: Folder, specs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The requested specs and the opened parameters, by path, checked against each other."""
    manifest = read_manifest(folder)
    if not read_in_place(folder):
        raise ValueError(f"{folder}: such a bucket is not read in place; copy the checkpoint to a local folder")
    check_files(folder, listed=manifest["files"])
    listed = manifest["parameters"]
    wanted = flatten_dict(dict(specs), sep="/")
    try:
        stored = open_params(folder, listed, files=manifest["files"])
    except (OSError, ValueError) as error:
        raise _damaged(folder) from error
    _check_quantized(folder, wanted=wanted, listed=listed)
    shapes = {name: tuple(stored[name].shape) if name in stored else None for name in listed}
    _check_tree(folder, wanted=wanted, stored=shapes)
    return wanted, stored


def _read(
    folder: Folder, wanted: Mapping[str, Any], *, stored: Mapping[str, Any], threads: int = THREADS
) -> dict[str, jax.Array]:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(name: str) -> jax.Array:
        leaf = wanted[name]
        return place(stored[name], jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default))

    try:
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(wanted, pool.map(read, wanted), strict=True))
    except (OSError, ValueError) as error:  # those of devices (their memory) pass
        raise _damaged(folder) from error


def check_files(folder: Folder, *, listed: dict[str, int]) -> None:
    """Find missing or cut files before the folder is read, because tensorstore's errors do not name the cause."""
    problems = []
    for name, size in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"missing {name}")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    if problems:
        raise ValueError(
            f"{folder}: damaged or not copied whole; copy or convert it again:\n  " + "\n  ".join(problems)
        )


def _damaged(folder: Folder) -> ValueError:
    return ValueError(f"{folder / PARAMS}: cannot be read: damaged; copy or convert it again")


def _check_quantized(folder: Folder, *, wanted: dict[str, Any], listed: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless int8 parameters, and only those, are requested as int8."""
    for name, leaf in wanted.items():
        dtype = listed.get(name, {}).get("dtype")
        if dtype == "int8" and leaf.dtype != jnp.int8:
            raise ValueError(
                f"{folder}: its weights are int8, which serve to generate and not for this; use the checkpoint that "
                "it was converted from"
            )
        if leaf.dtype == jnp.int8 and dtype not in (None, "int8"):
            raise ValueError(f"{folder}: {name} is stored as {dtype} and cannot be read as int8; quantise it")


def _check_tree(folder: Folder, *, wanted: dict[str, Any], stored: dict[str, tuple[int, ...] | None]) -> None:
    parts = {name.split("/")[0] for name in wanted}
    problems = []
    for name in sorted({*wanted, *(name for name in stored if name.split("/")[0] in parts)}):
        if name not in wanted:
            problems.append(f"unexpected {name} {stored[name]}: the configuration has no such parameter")
        elif name not in stored:
            problems.append(f"missing {name} {wanted[name].shape}")
        elif stored[name] is None:
            problems.append(f"missing {name}: the manifest lists it, but {PARAMS}/ does not hold it")
        elif not _fits(name, stored=stored[name] or (), shape=wanted[name].shape):
            problems.append(f"misshapen {name}: stored {stored[name]}, the configuration needs {wanted[name].shape}")
        elif not jnp.issubdtype(wanted[name].dtype, jnp.floating) and wanted[name].dtype != jnp.int8:
            problems.append(f"{name} cannot be read as {wanted[name].dtype}: ask for a floating dtype")
    if problems:
        raise ValueError(f"{folder}: the checkpoint does not match the configuration:\n  " + "\n  ".join(problems))


def _fits(name: str, *, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if stored == tuple(shape):
        return True
    axis = PADDED_AXES.get(name)
    if axis is None or len(stored) != len(shape) or shape[axis] < stored[axis]:
        return False
    return all(a == b for i, (a, b) in enumerate(zip(stored, shape, strict=True)) if i != axis)
