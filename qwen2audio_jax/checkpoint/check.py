"""Integrity check of a checkpoint without its source: files, names, shapes, and every stored byte."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB, stream, tensor_bytes
from qwen2audio_jax.checkpoint.download_checkpoint import local_checkpoint
from qwen2audio_jax.checkpoint.manifest import totals
from qwen2audio_jax.checkpoint.orbax_params import StoredParameters
from qwen2audio_jax.checkpoint.progress import Progress, Report
from qwen2audio_jax.checkpoint.reader import check_files, read_manifest
from qwen2audio_jax.checkpoint.safetensors_file import check_finite
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.storage.bucket import PathOrUrl


@dataclass(frozen=True)
class Finding:
    """The result of one check, passed if there are no problems."""

    checked: str
    problems: list[str]


@dataclass(frozen=True)
class _Stored:
    name: str
    nbytes: int


def check(checkpoint: PathOrUrl, *, memory_gb: float = MEMORY_GB, on_progress: Progress | None = None) -> list[Finding]:
    """Check a finished checkpoint.

    Args:
        checkpoint: the folder; one at a bucket's URL is copied into the cache folder.
        memory_gb: bound in GB on the memory that is used, beyond what the largest tensor alone needs.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        One finding each for: files, names and shapes against config.json, stored bytes against their SHA-256, finite
        weights.

    Raises:
        ValueError: `checkpoint` holds no finished checkpoint, or its config.json cannot be used.
    """
    tensor_bytes(memory_gb)  # refuses an invalid bound
    folder = local_checkpoint(checkpoint)
    manifest = read_manifest(folder)
    records = manifest["parameters"]
    config = Qwen2AudioConfig.from_pretrained(folder)
    total = totals(records)
    findings = [
        Finding(f"files: all {len(manifest['files'])} there, whole", _lines(partial(_files, folder, manifest))),
        Finding(
            f"names and shapes: {total['tensors']} tensors, {total['parameters']} weights, as config.json has them",
            _name_problems(records, config),
        ),
    ]
    damaged: list[str] = []
    wild: list[str] = []
    parameters = StoredParameters(folder, records=records)
    report = Report(on_progress, total["bytes"])
    tasks = [_Stored(name, record["bytes"]) for name, record in records.items()]
    for task, (damage, strange) in stream(tasks, lambda task: _read(task.name, parameters), memory_gb=memory_gb):
        damaged += damage
        wild += strange
        report.add(task.nbytes)
    findings.append(Finding("bytes: every parameter has its SHA-256", damaged))
    findings.append(Finding("values: all finite", wild))
    return findings


def _lines(run: Callable[[], object]) -> list[str]:
    try:
        run()
    except ValueError as error:
        return [" ".join(str(error).split())]
    return []


def _files(folder: Path, manifest: dict[str, Any]) -> None:
    check_files(folder, listed=manifest["files"])


def _name_problems(records: dict[str, Any], config: Qwen2AudioConfig) -> list[str]:
    weights = INT8 if any(record["dtype"] == INT8 for record in records.values()) else "float"
    specs = flatten_dict(parameter_specs(config, weights=weights), sep="/")
    shapes = {name: list(leaf.shape) for name, leaf in specs.items()}
    missing = [f"missing {name} {tuple(shape)}" for name, shape in shapes.items() if name not in records]
    unexpected = [f"unexpected {name}" for name in records if name not in shapes]
    misshapen = [
        f"misshapen {name}: {tuple(records[name]['shape'])}, config.json needs {tuple(shape)}"
        for name, shape in shapes.items()
        if name in records and records[name]["shape"] != shape
    ]
    return missing + unexpected + misshapen


def _read(name: str, parameters: StoredParameters) -> tuple[list[str], list[str]]:
    try:
        array = parameters.read(name)
    except ValueError as error:
        return [str(error)], []
    try:
        check_finite(array, what=name)
    except ValueError:
        return [], [f"{name} holds NaN or Inf"]
    return [], []
