"""Stored parameters of an Orbax checkpoint, read one by one into host memory, from any number of threads.

They are read with tensorstore, Orbax's storage layer: a read through Orbax itself has 35 ms of overhead, and a failing
one leaves the concurrent ones running.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from qwen2audio_jax.checkpoint.manifest import sha256_of
from qwen2audio_jax.checkpoint.reader import PARAMS


class StoredParameters:
    """The parameters of a finished checkpoint; `records` are their manifest entries."""

    def __init__(self, folder: Path, *, records: Mapping[str, Mapping[str, Any]]):
        self._records = records
        # Orbax stores a tree in a subfolder, beside other items of a checkpoint.
        found = [path.parent for path in (folder.absolute() / PARAMS).glob("*/manifest.ocdbt")]
        self._base = found[0] if len(found) == 1 else folder.absolute() / PARAMS
        # No cache, and few chunks at once: each chunk is read for one array, and copied into it.
        self._context = tensorstore.Context(
            {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}}
        )

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def read(self, name: str) -> np.ndarray:
        """The parameter at path `name` ("encoder/conv1/bias"), as it is stored.

        Raises:
            ValueError: it cannot be read, or its bytes do not match the manifest's sha256.
        """
        record = self._records[name]
        try:
            array = self._read(name)
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

    def _read(self, name: str) -> np.ndarray:
        store = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{self._base}/"},
            "path": f"{name.replace('/', '.')}/",
        }
        opened = tensorstore.open({"driver": "auto", "kvstore": store}, context=self._context, read=True, open=True)
        return opened.result().read(order="C").result()


def read_stored(folder: Path, name: str, *, record: Mapping[str, Any]) -> np.ndarray:
    """One parameter: see `StoredParameters.read`."""
    return StoredParameters(folder, records={name: record}).read(name)
