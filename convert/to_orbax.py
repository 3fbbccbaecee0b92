"""Conversion from Hugging Face to Orbax: match every stored tensor with a parameter, then stream them.

All differences are found from the files' headers, before anything is written. Then tensors are streamed within a bound
on memory: while one is read, checked, cast and laid out into its parameter's array, others are being stored.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB, group_bytes, request_bytes, stream
from qwen2audio_jax.checkpoint.disk import check_disk
from qwen2audio_jax.checkpoint.hf_folder import (
    INDEX,
    SETTINGS,
    StoredTensor,
    check_unchanged,
    inside,
    open_weights,
    read_settings,
)
from qwen2audio_jax.checkpoint.progress import Progress, Report
from qwen2audio_jax.checkpoint.reader import MANIFEST, check_files, read_manifest
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, bits
from qwen2audio_jax.checkpoint.writer import check_destination, new_checkpoint, unfinished_bytes, was_just_finished
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.config.strict_json import inert_values
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.storage import hub
from qwen2audio_jax.storage.bucket import Folder, PathOrUrl, folder_at, is_url
from qwen2audio_jax.storage.resolve_folder import resolve_folder

from .add_adapter import Merge
from .convert_tensor import CASTS, SCHEME, Task, make, stored_dtype
from .dtypes import KEEP, STORED
from .match_tensors import match
from .upload import uploading


@dataclass(frozen=True)
class _Job:
    """A conversion with checked arguments."""

    src: PathOrUrl
    folder: Folder
    config: Qwen2AudioConfig
    dtype: str
    revision: str | None
    merge: Merge | None
    work: Mapping[str, Any]
    memory_gb: float

    def origin(self) -> dict[str, Any]:
        """The manifest's record of its source."""
        at_hand = is_url(self.src) or Path(str(self.src)).is_dir()
        commit = None if at_hand else self.folder.name  # a hub id's snapshot is named after its commit
        origin = {"source": str(self.src), "revision": self.revision, "commit": commit, "dtype": self.dtype}
        if self.dtype == INT8:
            origin["quantized"] = SCHEME
        return origin if self.merge is None else {**origin, "adapter": self.merge.record}


def convert(
    src: PathOrUrl,
    dst: PathOrUrl,
    *,
    dtype: str = KEEP,
    revision: str | None = None,
    non_finite: str = "refuse",
    adapter: PathOrUrl | None = None,
    memory_gb: float = MEMORY_GB,
    staging: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> bool:
    """Convert a checkpoint saved by transformers (old or new tensor names) into an Orbax checkpoint.

    After a signal, a full disk or a crash, the same call resumes: stored parameters are not converted again. An
    unchanged source is recognised by its files' sizes and times, or, where these changed, by hashing its tensors again.

    A source in a bucket is read by ranges. A destination in a bucket is made on the local disk first, which must hold
    one copy of it, and then uploaded, the manifest last: see `upload`.

    Args:
        src: a folder with safetensors weights and config.json, the URL of one in a bucket, or a hub id such as
            "Qwen/Qwen2-Audio-7B".
        dst: a folder that does not exist, is empty, or holds this conversion unfinished; or the URL of one in a bucket.
        dtype: "keep" stores each tensor's own bytes; "bfloat16", "float16" or "float32" casts all; "int8" quantises
            the decoder's weights (see `qwen2audio_jax.model.quantization`) and keeps the bytes of all others.
        revision: branch, tag or commit of a hub id.
        non_finite: "refuse" or "allow" weights that hold NaN or Inf.
        adapter: a LoRA adapter in PEFT's format (folder, URL or hub id) that is added to the weights, in float32; the
            sum is rounded to their dtype, or quantised.
        memory_gb: bound in GB (10^9 bytes) on the memory that is used, beyond what the largest tensor alone needs.
        staging: the folder for results before their upload; default: `uploads` in the cache folder.
        on_progress: called with (bytes of the source done, total bytes), and then with bytes uploaded, if any.

    Returns:
        True if anything was done, False if `dst` holds the finished result of this very conversion.

    Raises:
        ValueError: the source is not a complete, consistent checkpoint (missing, unexpected, duplicate and misshapen
            tensors are all listed), holds NaN or Inf (also from a cast), or the destination cannot be used. Nothing is
            left there. Or the source is not the one that an unfinished conversion began with: that one is kept.
        OSError: the disk is full or fails, or a bucket does after several attempts. Finished work is kept, to resume
            from.
    """
    if dtype not in STORED:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(STORED)}")
    if non_finite not in ("refuse", "allow"):
        raise ValueError(f"non_finite is {non_finite!r}; it must be 'refuse' or 'allow'")
    if non_finite == "allow" and dtype == INT8:
        raise ValueError("NaN and Inf have no int8 codes: convert to another dtype, or without non_finite='allow'")
    group_bytes(memory_gb)  # refuses an invalid bound
    destination = folder_at(dst)
    if staging is not None and isinstance(destination, Path):
        raise ValueError(f"staging {os.fspath(staging)!r} goes with a bucket's URL, but {dst} is a local folder")
    folder = source_folder(src, revision=revision)
    config = Qwen2AudioConfig.from_json_file(inside(folder, "config.json"))
    merge = None if adapter is None else Merge(adapter, config=config)
    work = {
        "dtype": dtype,
        "non-finite weights": non_finite,
        "adapter": None if merge is None else merge.record["sha256"],
    }
    job = _Job(src, folder, config, dtype, revision, merge, work, memory_gb)
    if isinstance(destination, Path):
        return _convert(job, destination, on_progress=on_progress)
    with uploading(destination, last=MANIFEST, staging=staging) as upload:
        if upload.is_finished():
            return _convert(job, destination, on_progress=on_progress)
        _convert(job, upload.folder, on_progress=on_progress)
        upload.send(on_progress=on_progress)
    return True


def _convert(job: _Job, dst: Folder, *, on_progress: Progress | None) -> bool:
    """Run a job; a `dst` in a bucket holds a finished checkpoint. See `convert`."""
    finished = (dst / MANIFEST).exists()
    if isinstance(dst, Path):
        if was_just_finished(dst, work=job.work):
            return True
        if not finished:
            check_destination(dst)
    settings = read_settings(job.folder)
    with open_weights(job.folder, request_bytes=request_bytes(job.memory_gb)) as weights:
        pairs = match(weights, config=job.config, folder=job.folder)
        tasks = [Task(tensor, target, stored_dtype(tensor, target, dtype=job.dtype)) for tensor, target in pairs]
        config = replace(job.config, dtype=config_dtype(job.config, dtype=job.dtype, tasks=tasks))
        if finished:
            _check_same(job, dst, tasks, config=config, settings=settings)
            return False
        assert isinstance(dst, Path)
        _write(job, dst, tasks, config=config, settings=settings, on_progress=on_progress)
    return True


def _write(
    job: _Job,
    dst: Path,
    tasks: Sequence[Task],
    *,
    config: Qwen2AudioConfig,
    settings: Mapping[str, bytes],
    on_progress: Progress | None,
) -> None:
    needed = sum(task.nbytes for task in tasks) + sum(map(len, settings.values()))
    check_disk(dst, needed=max(0, needed - unfinished_bytes(dst)))
    with new_checkpoint(
        dst,
        work=job.work,
        accept=lambda finished: check_source(finished, tasks, dst=dst),
        group_bytes=group_bytes(job.memory_gb),
    ) as writer:
        left = [task for task in tasks if not task.parts.keys() <= writer.finished.keys()]
        total = sum(task.tensor.entry.nbytes for task in tasks)
        report = Report(on_progress, total, done=total - sum(task.tensor.entry.nbytes for task in left))
        for task, made in stream(
            left,
            lambda task: make(task, non_finite=job.work["non-finite weights"], merge=job.merge),
            memory_gb=job.memory_gb,
            held=lambda: writer.held_bytes,
            wait=writer.wait,
        ):
            for name in [name for name in made.parameters if name not in writer.finished]:
                parameter, sha256 = made.parameters.pop(name)
                writer.add(
                    name,
                    parameter,
                    origin=_origin(task.tensor, sha256=made.source_sha256),
                    sha256=sha256,
                    note=task.tensor.file.stamp,
                )
                del parameter
            del made
            report.add(task.tensor.entry.nbytes)
        files = {task.tensor.file.path.name: task.tensor.file for task in tasks}
        check_unchanged(job.folder, files.values())
        config.save_pretrained(writer.folder)
        for name, content in settings.items():
            (writer.folder / name).write_bytes(content)
        writer.source = {
            **job.origin(),
            "non_finite": job.work["non-finite weights"],
            "stamps": {name: file.stamp for name, file in files.items()},
        }
    report.finish()


def source_folder(src: PathOrUrl, *, revision: str | None) -> Folder:
    """The folder of a source: the folder itself, or the hub's snapshot; see `convert`."""
    if (folder := resolve_folder(src, revision=revision)) is not None:
        return folder
    if not isinstance(src, str) or not hub.is_hub_id(src):
        raise ValueError(f"{src}: no such folder, nor a hub id of the form owner/name")
    patterns = ["config.json", *SETTINGS, "model*.safetensors", INDEX]
    return hub.download(src, revision=revision, patterns=patterns)


def _origin(tensor: StoredTensor, *, sha256: str) -> dict[str, Any]:
    """The manifest's record of a parameter's source tensor."""
    entry = tensor.entry
    return {
        "file": tensor.file.path.name,
        "tensor": tensor.name,
        "shape": list(entry.shape),
        "dtype": str(DTYPES[entry.dtype]),
        "sha256": sha256,
    }


def check_source(finished: Mapping[str, Mapping[str, Any]], tasks: Sequence[Task], *, dst: object) -> None:
    """Raise a `ValueError` unless the finished parameters are those that the source gives now."""
    left = dict(finished)
    for task, name in ((each, part) for each in tasks for part in each.parts):
        record = left.pop(name, None)
        if record is None:
            continue
        shape, dtype = task.parts[name]
        made = (list(shape), str(dtype), task.tensor.file.path.name, task.tensor.name)
        origin = record["origin"]
        unchanged = (record["shape"], record["dtype"], origin["file"], origin["tensor"]) == made
        stamp = task.tensor.file.stamp  # None: only the bytes tell whether they changed
        same_file = stamp is not None and record.get("note") == stamp
        if unchanged and (same_file or _sha256(task.tensor) == origin["sha256"]):
            continue
        raise ValueError(
            f"{task.tensor.file.path}: {task.tensor.name} is not what it was when the conversion into {dst} began; "
            f"bring the source back, or remove {dst} to convert the new one"
        )
    if left:
        raise ValueError(
            f"{dst}: its unfinished checkpoint has {next(iter(left))}, which the source does not have; it is another "
            f"model's: remove {dst}, or choose another folder"
        )


def _check_same(
    job: _Job, dst: Folder, tasks: Sequence[Task], *, config: Qwen2AudioConfig, settings: Mapping[str, bytes]
) -> None:
    """Raise a `ValueError` unless the finished checkpoint at `dst` is complete and this conversion's result."""
    refusal = ValueError(f"{dst}: already holds a checkpoint; remove it or choose another folder")
    manifest = read_manifest(dst)
    source, adapter = manifest["source"], job.merge and job.merge.record["sha256"]
    stated = (source.get("dtype"), source.get("non_finite"), source.get("adapter", {}).get("sha256"))
    if stated != (job.dtype, job.work["non-finite weights"], adapter):
        raise refusal
    stamps, parameters = source["stamps"], manifest["parameters"]
    theirs = Qwen2AudioConfig.from_pretrained(dst)
    if (
        len(parameters) != sum(len(task.parts) for task in tasks)
        or theirs.to_dict() != config.to_dict()
        or read_settings(dst) != settings
    ):
        raise refusal
    finished = {name: {**each, "note": stamps.get(each["origin"]["file"])} for name, each in parameters.items()}
    try:
        check_source(finished, tasks, dst=dst)
    except ValueError:
        raise refusal from None
    check_files(dst, listed=manifest["files"])


def _sha256(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for _, block in tensor.blocks():
        digest.update(bits(block).reshape(-1))
    return digest.hexdigest()


def config_dtype(config: Qwen2AudioConfig, *, dtype: str, tasks: Sequence[Task]) -> str:
    """The dtype for config.json: the cast's, else the one that the source states, else that of its weights."""
    if dtype in CASTS:
        return dtype
    stored = {str(DTYPES[task.tensor.entry.dtype] if dtype == INT8 else task.dtype) for task in tasks}
    text = inert_values(config.text_config.inert)
    states_none = "dtype" in config.omitted and not (text.get("dtype") or text.get("torch_dtype"))
    return stored.pop() if states_none and len(stored) == 1 else config.dtype
