"""Hugging Face checkpoint to Orbax checkpoint: match every stored tensor with a parameter, then stream them over.

All differences are found from the files' headers, before anything is written. Then one tensor at a time passes through:
its rows are read, checked, cast and laid out into the parameter's array, which the writer stores in groups.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax import hub
from qwen2audio_jax.checkpoint import check_destination, new_checkpoint
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.config_json import inert_values
from qwen2audio_jax.model import parameter_specs

from .disk import check_disk
from .hf_folder import INDEX, SETTINGS, StoredTensor, StoredWeights, inside, open_weights, read_settings
from .mapping import EMBEDDING, HEAD, IGNORED, Target, canonical_name, expected_tensors
from .safetensors_file import DTYPES

KEEP = "keep"
CASTS = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""All exponent bits: Inf and NaN have every one of them set, finite numbers do not."""

_STRIP_ROWS = 16
"""Rows transposed at once: few enough that the strip's cache lines stay in cache while its columns are written."""

Progress = Callable[[int, int], None]
"""Called with (bytes of the source done, bytes in all)."""


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str = KEEP,
    revision: str | None = None,
    non_finite: str = "refuse",
    progress: Progress | None = None,
) -> None:
    """Convert a checkpoint saved by transformers (old or new tensor names) into an Orbax checkpoint.

    Args:
        src: a folder with safetensors weights and config.json, or a hub id such as "Qwen/Qwen2-Audio-7B".
        dst: a folder that does not exist or is empty; see `checkpoint.new_checkpoint`.
        dtype: "keep" stores each tensor's own bytes; "bfloat16", "float16" or "float32" casts all.
        revision: branch, tag or commit of a hub id.
        non_finite: "refuse" or "allow" weights that hold NaN or Inf.
        progress: told how far it is.

    Raises:
        ValueError: the source is not a complete, consistent checkpoint (missing, unexpected, duplicate and misshapen
            tensors are all listed), holds NaN or Inf (also from a cast), or the destination cannot be used. Nothing is
            left there.
        OSError: the disk is full or fails.
    """
    if dtype != KEEP and dtype not in CASTS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join([KEEP, *CASTS])}")
    if non_finite not in ("refuse", "allow"):
        raise ValueError(f"non_finite is {non_finite!r}; it must be 'refuse' or 'allow'")
    check_destination(dst)
    folder = source_folder(src, revision=revision)
    config = Qwen2AudioConfig.from_json_file(inside(folder, "config.json"))
    settings = read_settings(folder)
    with open_weights(folder) as weights:
        pairs = match(weights, config=config, folder=folder)
        sizes = [tensor.entry.nbytes for tensor, _ in pairs]
        casts = [CASTS.get(dtype, DTYPES[tensor.entry.dtype]) for tensor, _ in pairs]
        needed = sum(
            size // DTYPES[tensor.entry.dtype].itemsize * cast.itemsize
            for (tensor, _), size, cast in zip(pairs, sizes, casts, strict=True)
        )
        check_disk(Path(dst), needed=needed + sum(map(len, settings.values())))
        config = replace(config, dtype=_config_dtype(config, dtype=dtype, stored={str(cast) for cast in casts}))
        with new_checkpoint(dst) as writer:
            for i, ((tensor, target), cast) in enumerate(zip(pairs, casts, strict=True)):
                if progress is not None:
                    progress(sum(sizes[:i]), sum(sizes))
                digest = hashlib.sha256()
                parameter = read_parameter(tensor, target, dtype=cast, non_finite=non_finite, digest=digest)
                writer.add(target.parameter, parameter, origin=_origin(tensor, sha256=digest.hexdigest()))
            config.save_pretrained(writer.folder)
            for name, content in settings.items():
                (writer.folder / name).write_bytes(content)
            commit = None if Path(src).is_dir() else folder.name  # a hub id's snapshot is named for its commit
            writer.source = {"source": os.fspath(src), "revision": revision, "commit": commit, "dtype": dtype}
            if progress is not None:
                progress(sum(sizes), sum(sizes))


def source_folder(src: str | os.PathLike[str], *, revision: str | None) -> Path:
    """The local folder of a source: itself, or the snapshot that the hub gives; see `convert`."""
    if Path(src).is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} goes with a hub id, but {os.fspath(src)} is a local folder")
        return Path(src)
    if not hub.is_hub_id(src):
        raise ValueError(f"{os.fspath(src)}: no such folder, nor a hub id of the form owner/name")
    patterns = ["config.json", *SETTINGS, "model*.safetensors", INDEX]
    return hub.download(os.fspath(src), revision=revision, patterns=patterns)


def match(weights: StoredWeights, *, config: Qwen2AudioConfig, folder: Path) -> list[tuple[StoredTensor, Target]]:
    """Pair every stored tensor with the parameter that it fills, in the order in which they lie on disk.

    Raises:
        ValueError: listing every tensor that is missing, unexpected, duplicate, misshapen or of another dtype, and a
            head that differs from the embeddings it is tied to.
    """
    shapes = {name: leaf.shape for name, leaf in flatten_dict(parameter_specs(config), sep="/").items()}
    targets = expected_tensors(shapes)
    tied = HEAD not in targets
    problems = list(weights.problems)
    found: dict[str, StoredTensor] = {}
    for tensor in weights.tensors:
        name = canonical_name(tensor.name)
        if any(pattern.fullmatch(name) for pattern in IGNORED):
            continue
        if name in found:
            if found[name].name != tensor.name:
                problems.append(f"duplicate {name}: stored as {found[name].name} and as {tensor.name}")
            continue
        found[name] = tensor
        if name not in targets and not (tied and name == HEAD):
            problems.append(f"unexpected {tensor.name} {tensor.entry.shape}: the configuration has no such parameter")
            continue
        expected = targets[EMBEDDING if name not in targets else name].stored_shape
        if tensor.entry.shape != expected:
            problems.append(f"misshapen {tensor.name}: stored {tensor.entry.shape}, the configuration needs {expected}")
        if tensor.entry.dtype not in DTYPES:
            problems.append(
                f"{tensor.name} is stored as {tensor.entry.dtype}; weights are read from {', '.join(DTYPES)}"
            )
    for name, target in targets.items():
        if name not in found:
            hint = ", and the configuration does not tie it to the embeddings" if name == HEAD else ""
            problems.append(f"missing {name} {target.stored_shape}{hint}")
    if tied and not problems and HEAD in found and not same_values(found[HEAD], found[EMBEDDING]):
        problems.append(
            f"{found[HEAD].name} differs from {found[EMBEDDING].name}, but the configuration says "
            "tie_word_embeddings: set it to false, or drop the head if it is not meant"
        )
    if problems:
        raise ValueError(f"{folder}: the weights do not match config.json:\n  " + "\n  ".join(problems))
    pairs = [(found[name], target) for name, target in targets.items()]
    return sorted(pairs, key=lambda pair: (pair[0].file.path, pair[0].entry.offset))


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of one shape are the same bit for bit."""
    return a.entry.dtype == b.entry.dtype and all(
        np.array_equal(bits(block), bits(other)) for (_, block), (_, other) in zip(a.blocks(), b.blocks(), strict=True)
    )


def _origin(tensor: StoredTensor, *, sha256: str) -> dict[str, Any]:
    """What the manifest records of the tensor that a parameter was made from."""
    entry = tensor.entry
    return {
        "file": tensor.file.path.name,
        "tensor": tensor.name,
        "shape": list(entry.shape),
        "dtype": str(DTYPES[entry.dtype]),
        "sha256": sha256,
    }


def read_parameter(
    tensor: StoredTensor, target: Target, *, dtype: np.dtype, non_finite: str, digest: "hashlib._Hash"
) -> np.ndarray:
    """Read a tensor into a parameter's array.

    Args:
        tensor: what to read.
        target: what it fills.
        dtype: of the result; bytes are unaltered where it is the tensor's own.
        non_finite: "refuse" or "allow".
        digest: takes in the tensor's bytes as they are read.

    Raises:
        ValueError: it holds NaN or Inf, or a value that is Inf after the cast.
    """
    parameter = np.empty(target.shape, dtype)
    reverse = target.transform == "reversed"
    # Plain integers of the same width: numpy copies its own types several times faster than bfloat16.
    view = bits(parameter)
    for start, block in tensor.blocks():
        digest.update(bits(block).reshape(-1))
        if non_finite == "refuse":
            _check_finite(tensor, block, kind=tensor.entry.dtype)
        if block.dtype != dtype:
            with np.errstate(over="ignore"):
                block = block.astype(dtype)
            if non_finite == "refuse":
                _check_finite(tensor, block, kind=next(kind for kind, each in DTYPES.items() if each == dtype))
        rows = bits(block)
        if not reverse:
            view[start : start + len(rows)] = rows
            continue
        for first in range(0, len(rows), _STRIP_ROWS):
            strip = rows[first : first + _STRIP_ROWS]
            view[..., start + first : start + first + len(strip)] = strip.T
    return parameter


def _check_finite(tensor: StoredTensor, block: np.ndarray, *, kind: str) -> None:
    mask = _EXPONENTS[kind]
    values = bits(block)
    if values.size and int((values & values.dtype.type(mask)).max()) == mask:
        cast = "" if kind == tensor.entry.dtype else f" after the cast from {tensor.entry.dtype} to {kind}"
        raise ValueError(
            f"{tensor.file.path}: {tensor.name} holds NaN or Inf{cast}; mend the checkpoint, or allow it with "
            "non_finite='allow' (--allow-non-finite)"
        )


def bits(array: np.ndarray) -> np.ndarray:
    """A view of an array as plain integers of the same width."""
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def _config_dtype(config: Qwen2AudioConfig, *, dtype: str, stored: set[str]) -> str:
    """What config.json records: the cast's dtype, else what the source states, else what its weights have."""
    if dtype != KEEP:
        return dtype
    text = inert_values(config.text_config.inert)
    states_none = "dtype" in config.omitted and not (text.get("dtype") or text.get("torch_dtype"))
    return stored.pop() if states_none and len(stored) == 1 else config.dtype
