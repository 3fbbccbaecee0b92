"""Writer of Hugging Face folders: which tensor goes into which safetensors file, the files, their index and settings.

A file gets its name when it is complete, and config.json is written last: without it the folder is not a checkpoint.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB, stream
from qwen2audio_jax.checkpoint.disk import check_disk
from qwen2audio_jax.checkpoint.export_folder import export_folder
from qwen2audio_jax.checkpoint.hf_folder import INDEX, WEIGHTS
from qwen2audio_jax.checkpoint.mapping import (
    EMBEDDING,
    HEAD,
    Target,
    expected_tensors,
    released_name,
)
from qwen2audio_jax.checkpoint.progress import Progress, Report
from qwen2audio_jax.checkpoint.reversed_axes import reversed_axes
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, bits
from qwen2audio_jax.checkpoint.safetensors_writer import Planned, SafetensorsWriter, file_bytes
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.qwen2_audio import parameter_specs

SHARD_BYTES = 5 * 10**9
"""The default shard size of transformers when the weights were published."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class TensorExport:
    """A tensor to be written, and its source parameter (`target.parameter`)."""

    planned: Planned
    target: Target

    @property
    def nbytes(self) -> int:
        """Its bytes, both stored and written."""
        return 2 * self.planned.nbytes


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB", "500MB" or "2GiB".

    Raises:
        ValueError: the text is not a size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or int(float(match[1]) * _UNITS[match[2].upper()]) < 1:
        raise ValueError(f"{text!r} is not a size; give one such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def plan_files(
    folder: Path,
    *,
    config: Qwen2AudioConfig,
    listed: Mapping[str, Mapping[str, Any]],
    names: str = "hub",
    max_shard_bytes: int = SHARD_BYTES,
) -> list[list[TensorExport]]:
    """The tensors to write, file by file, in the order in which `write_folder` reads their parameters.

    Args:
        folder: the source of the parameters, for messages.
        config: of the model.
        listed: path -> `shape` and `dtype` of every parameter.
        names: as for `export`.
        max_shard_bytes: as for `export`.

    Raises:
        ValueError: the parameters are not those of the configuration (all differences are listed).
    """
    return _shards(_plan(folder, config=config, listed=listed, names=names), limit=max_shard_bytes)


def write_folder(
    out: Path,
    shards: list[list[TensorExport]],
    *,
    read: Callable[[str], np.ndarray],
    settings: Mapping[str, bytes],
    work: Mapping[str, Any] | None = None,
    threads: int = 1,
    memory_gb: float = MEMORY_GB,
    on_progress: Progress | None = None,
) -> None:
    """Write planned tensors, their index and the files beside them.

    Args:
        out: a folder that does not exist, is empty, or holds the same work unfinished.
        shards: from `plan_files`.
        read: returns a parameter by its path, in the planned dtype and the parameter's own shape.
        settings: files beside the weights: name -> content; written in this order, config.json last.
        work: the description of the work, as JSON values, if it may be resumed after an interruption.
        threads: number of threads that call `read`; with one, the calls are in the planned order.
        memory_gb: as for `export`.
        on_progress: called with (bytes done, bytes in all).

    Raises:
        ValueError: the disk has too little space, or `out` cannot be used, or `read` raises it. Nothing is left there.
        OSError: the disk is full or fails. Without `work`, nothing is left there either.
    """
    total = sum(each.planned.nbytes for shard in shards for each in shard)
    there = sum(path.stat().st_size for path in out.glob("*.safetensors")) if out.is_dir() else 0
    check_disk(out, needed=max(0, total + sum(map(len, settings.values())) - there))
    with export_folder(out, work=work) as target:
        files = {
            WEIGHTS if len(shards) == 1 else f"model-{k + 1:05}-of-{len(shards):05}.safetensors": shard
            for k, shard in enumerate(shards)
        }
        left = {
            name: shard
            for name, shard in files.items()
            if target.finished.get(name) != file_bytes([each.planned for each in shard])
        }
        done = sum(each.planned.nbytes for name, shard in files.items() if name not in left for each in shard)
        report = Report(on_progress, total, done=done)

        def tensor(each: TensorExport) -> np.ndarray:
            values = bits(read(each.target.parameter))
            return reversed_axes(values) if each.target.transform == "reversed" else values

        for name, shard in left.items():
            tensors = stream(shard, tensor, memory_gb=memory_gb, threads=threads)
            target.write(name, partial(_write_shard, shard=shard, tensors=tensors, report=report))
        if len(shards) > 1:
            weight_map = {each.planned.name: name for name, shard in files.items() for each in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            target.write(INDEX, lambda path: path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8"))
        for name, content in settings.items():
            target.write(name, partial(_write_bytes, content=content))
    report.finish()


def _plan(
    folder: Path, *, config: Qwen2AudioConfig, listed: Mapping[str, Mapping[str, Any]], names: str
) -> list[TensorExport]:
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten_dict(parameter_specs(config), sep="/").items()}
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in listed]
    for name, record in listed.items():
        shape = tuple(record["shape"])
        if name not in shapes:
            problems.append(f"unexpected {name} {shape}")
        elif shapes[name] != shape:
            problems.append(f"misshapen {name}: stored {shape}, the configuration needs {shapes[name]}")
        elif record["dtype"] not in map(str, DTYPES.values()):
            problems.append(f"{name} is stored as {record['dtype']}, which cannot be written")
    if problems:
        raise ValueError(f"{folder}: the checkpoint does not match its config.json:\n  " + "\n  ".join(problems))
    targets = expected_tensors({name: shapes[name] for name in listed})
    if HEAD not in targets:
        targets[HEAD] = targets[EMBEDDING]
    return [
        TensorExport(
            Planned(
                released_name(name, naming=names), np.dtype(listed[target.parameter]["dtype"]), target.stored_shape
            ),
            target,
        )
        for name, target in targets.items()
    ]


def _shards(exports: list[TensorExport], *, limit: int) -> list[list[TensorExport]]:
    """Split tensors into files, in order; within a file, wider dtypes first, so that each tensor is aligned."""
    shards: list[list[TensorExport]] = [[]]
    size = 0
    for each in exports:
        if shards[-1] and size + each.planned.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.planned.nbytes
    return [sorted(shard, key=lambda each: -each.planned.dtype.itemsize) for shard in shards]


def _write_bytes(path: Path, *, content: bytes) -> None:
    path.write_bytes(content)


def _write_shard(
    path: Path, *, shard: list[TensorExport], tensors: Iterator[tuple[TensorExport, np.ndarray]], report: Report
) -> None:
    writer = SafetensorsWriter(path, [each.planned for each in shard])
    try:
        for each, tensor in tensors:
            writer.write([tensor])
            report.add(each.planned.nbytes)
        writer.finish()
    finally:
        writer.close()
