"""Orbax checkpoint to Hugging Face folder: safetensors files, their index, and the settings beside them.

One parameter at a time is read, checked against the manifest, laid out as torch has it and appended to its file. A file
gets its name when it is whole, config.json comes last: without it nobody takes the folder for a checkpoint. Training
writes its result through the same `plan_files` and `write_folder`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint import check_files, read_manifest
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model import parameter_specs

from .disk import check_disk
from .hf_folder import INDEX, WEIGHTS, read_settings
from .mapping import EMBEDDING, HEAD, NAMINGS, Target, expected_tensors, released_name
from .safetensors_file import DTYPES
from .safetensors_writer import Planned, SafetensorsWriter
from .stored import read_stored
from .to_orbax import Progress, bits

SHARD_BYTES = 5 * 10**9
"""What transformers took as the largest file when the weights were published."""
BLOCK_BYTES = 1 << 20
"""How much of a tensor is laid out at once."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class TensorExport:
    """A tensor that is to be written, and the parameter that it is read from (`target.parameter`)."""

    planned: Planned
    target: Target


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB", "500MB" or "2GiB".

    Raises:
        ValueError: it is no such size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or int(float(match[1]) * _UNITS[match[2].upper()]) < 1:
        raise ValueError(f"{text!r} is not a size; give one such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def export(
    checkpoint: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    names: str = "hub",
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write an Orbax checkpoint as a folder that transformers loads; what `convert` kept gets its old bytes back.

    A tied head is written too, as a copy of the embeddings: transformers 5.23 reads the flag and never ties.

    Args:
        checkpoint: a finished checkpoint with its config.json.
        dst: a folder that does not exist or is empty.
        names: "hub" (those of the published weights) or "current" (those of the modules in transformers >= 5.10).
        max_shard_bytes: tensors in one file at most, unless one alone is larger.
        progress: told how far it is.

    Raises:
        ValueError: no finished checkpoint, or a damaged one (the parameter is named), or one that does not match its
            config.json, or `dst` cannot be used. Nothing is left there.
        OSError: the disk is full or fails; nothing is left there either.
    """
    if names not in NAMINGS:
        raise ValueError(f"names is {names!r}; it must be one of {', '.join(NAMINGS)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    folder, out = Path(checkpoint), Path(dst)
    if "://" in os.fspath(dst):
        raise ValueError(f"{os.fspath(dst)}: only local folders can be written; write to one and copy it there")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}; choose a new or empty folder")
    manifest = read_manifest(folder)
    check_files(folder, listed=manifest["files"])
    config = Qwen2AudioConfig.from_pretrained(folder)
    settings = read_settings(folder)
    listed = manifest["parameters"]
    shards = plan_files(folder, config=config, listed=listed, names=names, max_shard_bytes=max_shard_bytes)
    write_folder(
        out,
        shards,
        read=lambda name: read_stored(folder, name, record=listed[name]),
        settings={**settings, "config.json": (folder / "config.json").read_bytes()},
        progress=progress,
    )


def plan_files(
    folder: Path,
    *,
    config: Qwen2AudioConfig,
    listed: Mapping[str, Mapping[str, Any]],
    names: str = "hub",
    max_shard_bytes: int = SHARD_BYTES,
) -> list[list[TensorExport]]:
    """Which tensors are written, file by file, in the order in which `write_folder` reads their parameters.

    Args:
        folder: what the parameters are from, for messages.
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
    progress: Progress | None = None,
) -> None:
    """Write planned tensors, their index and the files beside them.

    Args:
        out: a folder that does not exist or is empty.
        shards: from `plan_files`.
        read: gives a parameter by its path, in the planned dtype and the parameter's own shape.
        settings: files beside the weights: name -> content; written in this order, config.json last.
        progress: told how far it is.

    Raises:
        ValueError: the disk has no room for it. Nothing is left there.
        OSError: the disk is full or fails; nothing is left there either.
    """
    total = sum(each.planned.nbytes for shard in shards for each in shard)
    check_disk(out, needed=total + sum(map(len, settings.values())))
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(name: str, fill: Callable[[Path], object]) -> None:
        draft = out / f".{name}.incomplete"
        written.extend((draft, out / name))
        fill(draft)
        os.replace(draft, out / name)

    try:
        done = 0
        weight_map: dict[str, str] = {}
        for k, shard in enumerate(shards):
            name = WEIGHTS if len(shards) == 1 else f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
            tell = None if progress is None else partial(_tell, progress, before=done, total=total)
            write(name, partial(_write_shard, shard=shard, read=read, tell=tell))
            weight_map |= {each.planned.name: name for each in shard}
            done += sum(each.planned.nbytes for each in shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write(INDEX, lambda path: path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8"))
        for name, content in settings.items():
            write(name, partial(_write_bytes, content=content))
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if created:
            with suppress(OSError):  # Somebody else has put something there.
                out.rmdir()
        raise
    if progress is not None:
        progress(total, total)


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
    """Files in the tensors' order; within one, wider numbers first, so that each tensor is aligned to its own."""
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


def _tell(progress: Progress, here: int, *, before: int, total: int) -> None:
    progress(before + here, total)


def _write_shard(
    path: Path,
    *,
    shard: list[TensorExport],
    read: Callable[[str], np.ndarray],
    tell: Callable[[int], None] | None,
) -> None:
    writer = SafetensorsWriter(path, [each.planned for each in shard])
    try:
        done = 0
        for each in shard:
            if tell is not None:
                tell(done)
            writer.write(_rows(read(each.target.parameter), each.target))
            done += each.planned.nbytes
        writer.finish()
    finally:
        writer.close()


def _rows(parameter: np.ndarray, target: Target) -> Iterator[np.ndarray]:
    """The tensor that filled a parameter, in blocks of its rows."""
    view = bits(parameter)
    if target.transform == "reversed":
        view = view.T
    rows = max(1, BLOCK_BYTES // max(1, view[:1].nbytes))
    for start in range(0, len(view), rows):
        yield np.ascontiguousarray(view[start : start + rows])
