"""Export from Orbax to a Hugging Face folder: safetensors files, their index, and the settings files.

Parameters are read, checked against the manifest, transposed to torch's layout and appended to their file, a few at
once within a bound on memory; see `checkpoint.hf_writer`.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB, THREADS, tensor_bytes
from qwen2audio_jax.checkpoint.download_checkpoint import local_checkpoint
from qwen2audio_jax.checkpoint.export_folder import check_folder
from qwen2audio_jax.checkpoint.hf_folder import read_settings
from qwen2audio_jax.checkpoint.hf_writer import SHARD_BYTES, plan_files, write_folder
from qwen2audio_jax.checkpoint.mapping import NAMINGS
from qwen2audio_jax.checkpoint.model_card import CARD, RECORD, card_of_export
from qwen2audio_jax.checkpoint.orbax_params import StoredParameters
from qwen2audio_jax.checkpoint.progress import Progress
from qwen2audio_jax.checkpoint.reader import MANIFEST, check_files, read_manifest
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.storage.bucket import PathOrUrl, folder_at

from .upload import uploading


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
