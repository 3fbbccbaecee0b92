"""Export from Orbax to a Hugging Face folder: safetensors files, their index, and the settings files.

Parameters are read, checked against the manifest, transposed to torch's layout and appended to their file, a few at
once within a bound on memory. A file gets its name when it is complete, and config.json is written last: without it the
folder is not a checkpoint. Training writes its result through the same `plan_files` and `write_folder`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB, THREADS, stream, tensor_bytes
from qwen2audio_jax.checkpoint.disk import check_disk
from qwen2audio_jax.checkpoint.download_checkpoint import local_checkpoint
from qwen2audio_jax.checkpoint.hf_folder import INDEX, WEIGHTS, read_settings
from qwen2audio_jax.checkpoint.mapping import EMBEDDING, HEAD, NAMINGS, Target, expected_tensors, released_name
from qwen2audio_jax.checkpoint.model_card import CARD, RECORD, card_of_export
from qwen2audio_jax.checkpoint.orbax_params import StoredParameters
from qwen2audio_jax.checkpoint.progress import Progress, Report
from qwen2audio_jax.checkpoint.reader import MANIFEST, check_files, read_manifest
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, bits
from qwen2audio_jax.checkpoint.safetensors_writer import Planned, SafetensorsWriter, file_bytes
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.storage.bucket import PathOrUrl, folder_at

from .convert_tensor import reversed_axes
from .export_folder import check_folder, export_folder
from .upload import uploading

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


def export(
    checkpoint: PathOrUrl,
    dst: PathOrUrl,
    *,
    names: str = "hub",
    max_shard_bytes: int = SHARD_BYTES,
    memory_gb: float = MEMORY_GB,
    staging: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write an Orbax checkpoint as a folder that transformers loads; unconverted tensors have their original bytes.

    A model card is beside them: that of a training run where its record came along, else one by the manifest.

    A tied head is written too, as a copy of the embeddings: transformers 5.23 reads the flag and never ties.

    Args:
        checkpoint: a finished checkpoint with its config.json; one at a bucket's URL is copied into the cache folder.
        dst: a folder that does not exist, is empty, or holds this export unfinished; or the URL of one in a bucket, to
            which the local result is uploaded, config.json last: see `upload`.
        names: "hub" (those of the published weights) or "current" (those of the modules in transformers >= 5.10).
        max_shard_bytes: maximum bytes of tensors in one file, unless one alone is larger.
        memory_gb: bound in GB on the memory that is used, beyond what the largest tensor alone needs.
        staging: the folder for results before their upload; default: `uploads` in the cache folder.
        on_progress: called with (bytes done, total bytes), and then with bytes uploaded, if any.

    Raises:
        ValueError: no finished checkpoint, or a damaged one (the parameter is named), or one that does not match its
            config.json, or is int8, or `dst` cannot be used. Nothing is left there.
        OSError: the disk is full or fails, or a bucket does after several attempts. Finished files are kept, and the
            same call resumes from there.
    """
    if names not in NAMINGS:
        raise ValueError(f"names is {names!r}; it must be one of {', '.join(NAMINGS)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    tensor_bytes(memory_gb)  # refuses an invalid bound
    destination = folder_at(dst)
    options = {"names": names, "max_shard_bytes": max_shard_bytes}
    if isinstance(destination, Path):
        if staging is not None:
            raise ValueError(f"staging {os.fspath(staging)!r} goes with a bucket's URL, but {dst} is a local folder")
        check_folder(destination)
        folder = local_checkpoint(checkpoint)
        _export(folder, destination, work=_work(folder, options), memory_gb=memory_gb, on_progress=on_progress)
        return
    with uploading(destination, last="config.json", staging=staging) as upload:
        if upload.is_finished():
            raise ValueError(f"{dst}: already holds a checkpoint; remove it or choose another folder")
        folder = local_checkpoint(checkpoint)
        work = _work(folder, options)
        if upload.made is None:
            _export(folder, upload.folder, work=work, memory_gb=memory_gb, on_progress=on_progress)
            upload.record_made(work)
        elif upload.made != work:
            raise ValueError(
                f"{dst}: is the unfinished upload of another checkpoint, or with other options; finish it as it was "
                f"begun, or remove it and {upload.folder.parent}"
            )
        upload.send(on_progress=on_progress)


def _work(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an export: an unfinished one with the same description can be resumed."""
    read_manifest(folder)  # refuses anything but a finished checkpoint
    return {"manifest": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(), **options}


def _export(
    folder: Path, out: Path, *, work: Mapping[str, Any], memory_gb: float, on_progress: Progress | None
) -> None:
    check_folder(out)
    manifest = read_manifest(folder)
    if any(record["dtype"] == INT8 for record in manifest["parameters"].values()):
        raise ValueError(
            f"{folder}: its weights are int8, which transformers does not read in this form; export the checkpoint "
            "that it was converted from, or convert the source again without --dtype int8"
        )
    check_files(folder, listed=manifest["files"])
    config = Qwen2AudioConfig.from_pretrained(folder)
    listed = manifest["parameters"]
    beside = read_settings(folder)
    card = card_of_export(manifest, beside.get(RECORD)).encode()
    write_folder(
        out,
        plan_files(folder, config=config, listed=listed, names=work["names"], max_shard_bytes=work["max_shard_bytes"]),
        read=StoredParameters(folder, records=listed).read,
        settings={**beside, CARD: card, "config.json": (folder / "config.json").read_bytes()},
        work=work,
        threads=THREADS,
        memory_gb=memory_gb,
        on_progress=on_progress,
    )


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
