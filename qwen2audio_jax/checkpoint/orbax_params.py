"""Stored parameters of an Orbax checkpoint: opened, and read into host memory or onto devices.

They are read with tensorstore, Orbax's storage layer, from files that are mapped into memory: an array is copied once,
to where JAX takes it over as it lies if its device is a CPU. Orbax copies it three times, into memory that the
system has to find first, and a failing read of its leaves the concurrent ones running.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from qwen2audio_jax.checkpoint.manifest import PARAMS, sha256_of
from qwen2audio_jax.storage.bucket import Folder

ALIGNMENT = 64
"""Bytes that an array's address must be a multiple of, for JAX to take it over on a CPU."""


def open_params(folder: Folder, names: Iterable[str], *, files: Iterable[str]) -> dict[str, Any]:
    """The parameters of a checkpoint as `tensorstore.TensorStore`s, by name; nothing is read.

    Args:
        folder: a finished checkpoint, local or in a bucket that tensorstore reads.
        names: of parameters, as "encoder/conv1/bias"; those that are not stored are left out.
        files: the manifest's.

    Raises:
        ValueError: what describes a parameter cannot be read.
    """
    opening = _opener(folder, files)
    started = {name: opening(name) for name in names}
    return {name: future.result() for name, future in started.items() if not _is_missing(future)}


def _opener(folder: Folder, files: Iterable[str]) -> Callable[[str], Any]:
    """What opens a parameter by its name: a future of tensorstore's."""
    # Orbax stores a tree in a subfolder, beside other items of a checkpoint, and what each process wrote within it.
    roots = [name for name in files if name.endswith("/manifest.ocdbt")]
    root = min(roots, key=lambda name: name.count("/"), default=f"{PARAMS}/manifest.ocdbt").rpartition("/")[0]
    base: Any = f"{folder}/{root}/"
    if isinstance(folder, Path):
        base = {"driver": "file", "path": f"{folder.absolute()}/{root}/"}
    # Chunks are not kept, and few are read at once: each is copied into one array. What lists them is kept.
    context = tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "cache_pool#lists": {"total_bytes_limit": 100 << 20},
            "data_copy_concurrency": {"limit": 2},
            "file_io_mode": {"mode": "memmap"},
        }
    )

    def opening(name: str) -> Any:
        path = f"{name.replace('/', '.')}/"
        store = {"driver": "ocdbt", "base": base, "path": path, "cache_pool": "cache_pool#lists"}
        spec = {"driver": "zarr3", "kvstore": store, "recheck_cached_metadata": False, "recheck_cached_data": False}
        return tensorstore.open(spec, context=context, read=True, open=True)

    return opening


def _is_missing(future: Any) -> bool:
    error = future.exception()
    return error is not None and str(error).startswith("NOT_FOUND")


def place(stored: Any, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """An opened parameter on its devices: each process reads what its own hold.

    Args:
        stored: one of `open_params`.
        spec: its shape (the stored one, or one padded with zeros at the ends), dtype and `sharding`.

    Raises:
        ValueError: it cannot be read.
    """
    parts: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        """What one device holds; devices that hold the same share it."""
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, spec.shape, strict=True))
        if bounds not in parts:
            parts[bounds] = _read_part(stored, bounds, dtype=spec.dtype)
        return parts[bounds]

    return jax.block_until_ready(jax.make_array_from_callback(spec.shape, spec.sharding, part))


def _read_part(stored: Any, bounds: tuple[tuple[int, int], ...], *, dtype: Any) -> np.ndarray:
    shape = tuple(stop - start for start, stop in bounds)
    inside = tuple(
        slice(start, max(start, min(stop, size))) for (start, stop), size in zip(bounds, stored.shape, strict=True)
    )
    found = _aligned(shape, stored.dtype.numpy_dtype)
    target = found[tuple(slice(each.stop - each.start) for each in inside)]
    if target.shape != shape:
        found[...] = 0
    if target.size:
        tensorstore.array(target).write(stored[inside][tensorstore.d[:].translate_to[0]]).result()
    if found.dtype == dtype:
        return found
    cast = _aligned(shape, dtype)
    np.copyto(cast, found, casting="unsafe")
    return cast


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class StoredParameters:
    """The parameters of a finished local checkpoint, read into host memory from any number of threads."""

    def __init__(self, folder: Path, *, records: Mapping[str, Mapping[str, Any]]):
        """`records` are their manifest entries."""
        self._records = records
        files = [path.relative_to(folder).as_posix() for path in (folder / PARAMS).glob("*/manifest.ocdbt")]
        self._opening = _opener(folder, files)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def read(self, name: str) -> np.ndarray:
        """The parameter at path `name` ("encoder/conv1/bias"), as it is stored.

        Raises:
            ValueError: it cannot be read, or its bytes do not match the manifest's sha256.
        """
        record = self._records[name]
        try:
            array = self._opening(name).result().read(order="C").result()
        except Exception as error:
            reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise ValueError(
                f"{name}: cannot be read ({reason}); the checkpoint is damaged: copy or convert it again"
            ) from None
        if (list(array.shape), str(array.dtype)) != (record["shape"], record["dtype"]):
            raise ValueError(
                f"{name}: is {array.dtype} {array.shape}, but the manifest says {record['dtype']} "
                f"{tuple(record['shape'])}; the checkpoint is damaged: copy or convert it again"
            )
        if sha256_of(array) != record["sha256"]:
            raise ValueError(
                f"{name}: its bytes do not have the manifest's sha256; the checkpoint is damaged: copy or convert it "
                "again"
            )
        return array


def read_stored(folder: Path, name: str, *, record: Mapping[str, Any]) -> np.ndarray:
    """One parameter: see `StoredParameters.read`."""
    return StoredParameters(folder, records={name: record}).read(name)
