"""Parquet files with a column of sounds, as `datasets` and others write them: a line for each row.

Sounds that the file holds are unpacked once into one local file, of which clips are pieces: records are taken in
another order than they are stored in, and a row of a Parquet file costs reading its whole row group. Extra: `parquet`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen2audio_jax.installed import pip_install

KEYS = ("id", "prompt", "messages", "options", "meta")
ROWS = 256
"""Rows that are read at a time."""


def parquet_lines(source: Path, unpacked: Path, *, name: str) -> Iterator[dict[str, Any]]:
    """The records of a Parquet file.

    The sounds are in the column `audio`, or else in the only one that holds bytes or {"bytes", "path"}: bytes, paths,
    or structs of both. Columns of a record's keys are its own, plain ones of other names become its `meta`.

    Args:
        source: the local file.
        unpacked: where the sounds' bytes go.
        name: of the input, for messages.

    Raises:
        ValueError: pyarrow is missing, the file cannot be read, or no column holds sounds.
    """
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError:
        raise ValueError(f"{name}: Parquet is read with pyarrow: {pip_install('parquet')}") from None
    try:
        with pq.ParquetFile(source) as table, unpacked.open("wb") as file:
            column = _audio_column(table.schema_arrow, name)
            for batch in table.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    yield _record(row, column=column, file=file, unpacked=unpacked, root=source.parent)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{name}: is no whole Parquet file ({type(error).__name__}); copy it again") from None


def _audio_column(schema: Any, name: str) -> str:
    from pyarrow import types

    def sounds(kind: Any) -> bool:
        if types.is_struct(kind):
            return "bytes" in {kind.field(index).name for index in range(kind.num_fields)}
        return types.is_binary(kind) or types.is_large_binary(kind)

    names = [field.name for field in schema]
    if "audio" in names:
        return "audio"
    found = [field.name for field in schema if sounds(field.type)]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{name}: {'no column holds' if not found else ' and '.join(found) + ' both hold'} sounds (of "
        f"{', '.join(names)}); call the one with the clips 'audio'"
    )


def _record(row: Mapping[str, Any], *, column: str, file: BinaryIO, unpacked: Path, root: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"audio": [_clip(row[column], file=file, unpacked=unpacked, root=root)]}
    record |= {key: row[key] for key in KEYS if row.get(key) is not None}
    if "meta" not in record:
        others = {key: value for key, value in row.items() if key not in KEYS and key != column and _plain(value)}
        record |= {"meta": others} if others else {}
    return record


def _clip(value: Any, *, file: BinaryIO, unpacked: Path, root: Path) -> Any:
    """A piece of the unpacked file, or the path that stands instead; other values are refused with their row."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        start = file.tell()
        file.write(value)
        return {"file": str(unpacked), "offset": start, "size": len(value)}
    if isinstance(value, str) and "://" not in value:
        return os.path.join(root, value)
    return value


def _plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return value is not None
