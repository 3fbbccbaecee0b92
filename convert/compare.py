"""Verification of a converted checkpoint: source and result are read again and compared bit for bit.

Few parameters are in memory at a time, within the same bound as in a conversion.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB, request_bytes, stream, tensor_bytes
from qwen2audio_jax.checkpoint.download_checkpoint import local_checkpoint
from qwen2audio_jax.checkpoint.hf_folder import StoredTensor, inside, open_weights, read_settings
from qwen2audio_jax.checkpoint.mapping import EMBEDDING, HEAD, IGNORED, Target, canonical_name, expected_tensors
from qwen2audio_jax.checkpoint.orbax_params import StoredParameters
from qwen2audio_jax.checkpoint.progress import Progress, Report
from qwen2audio_jax.checkpoint.reader import check_files, read_manifest
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, bits
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.quantization import INT8, channel_axis, scale_name
from qwen2audio_jax.storage.bucket import Folder, PathOrUrl

from .add_adapter import Merge
from .convert_tensor import quantize_parameter, read_parameter
from .dtypes import KEEP
from .match_tensors import same_values
from .to_orbax import source_folder

_STATED_DTYPES = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class _Pair:
    name: str
    record: dict[str, Any]
    target: Target
    tensor: StoredTensor

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return self.record["bytes"]


def verify(
    src: PathOrUrl,
    dst: PathOrUrl,
    *,
    revision: str | None = None,
    adapter: PathOrUrl | None = None,
    memory_gb: float = MEMORY_GB,
    on_progress: Progress | None = None,
) -> list[str]:
    """Compare a converted checkpoint with its source.

    Every stored parameter must have the source tensor's bits, after the cast that the manifest states if it states one,
    and the manifest's sha256, or be its int8 codes and scales; where an adapter was added, the last bit of the sum (or
    code) may differ. The settings files must be identical, and config.json must be equivalent.

    Args:
        src: the source: a folder with safetensors weights (local, or the URL of one in a bucket), or a hub id.
        dst: the checkpoint, local or the URL of one in a bucket, which is copied into the cache folder once.
        revision: branch, tag or commit of a hub id.
        adapter: the adapter that was added to the weights, if any.
        memory_gb: bound in GB on the memory that is used, beyond what the largest tensor alone needs.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        A message for every difference, with its tensor or file; none if the checkpoint is correct.

    Raises:
        ValueError: `src` holds no readable weights, or `dst` no finished checkpoint.
    """
    tensor_bytes(memory_gb)  # refuses an invalid bound
    ours = local_checkpoint(dst)
    manifest = read_manifest(ours)
    folder = source_folder(src, revision=revision)
    differences = _compare_settings(folder, ours)
    try:
        check_files(ours, listed=manifest["files"])
    except ValueError as error:
        differences.append(" ".join(str(error).split()))
    stated = manifest.get("source", {}).get("dtype", KEEP)
    merge = _merge(adapter, manifest=manifest, dst=ours)
    with open_weights(folder, request_bytes=request_bytes(memory_gb)) as weights:
        differences += weights.problems
        pairs, unpaired = _pair(weights.tensors, manifest["parameters"])
        differences += unpaired
        total = sum(pair.tensor.entry.nbytes for pair in pairs)
        report = Report(on_progress, total)
        stored = StoredParameters(ours, records=manifest["parameters"])
        for pair, found in stream(
            pairs, lambda pair: _compare(pair, stored, stated=stated, merge=merge), memory_gb=memory_gb
        ):
            differences += found
            report.add(pair.tensor.entry.nbytes)
        report.finish()
    return differences


def _pair(tensors: list[StoredTensor], parameters: dict[str, Any]) -> tuple[list[_Pair], list[str]]:
    """The pairs of source tensor and parameter, and messages about those without a counterpart."""
    differences = []
    targets: dict[str, Target] = {}
    scales = {scale_name(name) for name, record in parameters.items() if record["dtype"] == INT8}
    differences += [f"missing {name}: the scales of an int8 parameter" for name in sorted(scales - set(parameters))]
    for name, record in parameters.items():
        if name in scales:  # compared together with their codes
            continue
        try:
            targets |= expected_tensors({name: tuple(record["shape"])})
        except LookupError:
            differences.append(f"extra {name} {tuple(record['shape'])}: no such parameter in this architecture")
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        name = canonical_name(tensor.name)
        if any(pattern.fullmatch(name) for pattern in IGNORED):
            continue
        if name in found:
            differences.append(f"duplicate {name}: the source stores it as {found[name].name} and as {tensor.name}")
        elif name in targets or name == HEAD:
            found[name] = tensor
        else:
            differences.append(f"missing {name} {tensor.entry.shape}: the source has it, the checkpoint does not")
    if HEAD in found and HEAD not in targets:
        # A checkpoint with a tied head stores only the embeddings.
        head = found.pop(HEAD)
        if EMBEDDING not in found or head.entry.shape != found[EMBEDDING].entry.shape:
            differences.append(f"missing {HEAD} {head.entry.shape}: the source has it, the checkpoint does not")
        elif not same_values(head, found[EMBEDDING]):
            differences.append(
                f"missing {HEAD}: the checkpoint ties it to the embeddings, the source's differs from them"
            )
    pairs = []
    for name, target in targets.items():
        record = parameters[target.parameter]
        if name not in found:
            differences.append(f"extra {target.parameter} {target.shape}: the source has no {name}")
        elif found[name].entry.dtype not in DTYPES:
            differences.append(f"{target.parameter}: the source stores it as {found[name].entry.dtype}")
        elif found[name].entry.shape != target.stored_shape:
            differences.append(
                f"{target.parameter}: stored {target.shape}, so the source's should be {target.stored_shape}, "
                f"but it is {found[name].entry.shape}"
            )
        else:
            pairs.append(_Pair(target.parameter, record, target, found[name]))
    return pairs, differences


def _compare(pair: _Pair, parameters: StoredParameters, *, stated: str, merge: Merge | None) -> list[str]:
    source = DTYPES[pair.tensor.entry.dtype]
    quantized = stated == INT8 and channel_axis(pair.name) is not None
    expected = stated if quantized or stated not in (KEEP, INT8) else str(source)
    if pair.record["dtype"] != expected:
        how = "no cast" if expected == str(source) else f"a cast to {stated}"
        return [f"{pair.name}: stored as {pair.record['dtype']} from {source}, but the manifest states {how}"]
    differences = []
    try:
        stored = bits(parameters.read(pair.name))
    except ValueError as error:
        return [str(error)]
    digest = hashlib.sha256()
    if quantized:
        try:
            unequal = _count_unequal_codes(pair, stored, parameters, digest=digest, merge=merge)
        except ValueError as error:
            return [str(error)]
    elif merge is not None and merge.touches(pair.name):
        made = read_parameter(pair.tensor, pair.target, dtype=np.dtype(expected), non_finite="allow", digest=digest)
        merge.add(pair.name, made)
        # Another CPU may sum the product in another order: the last bit may differ.
        unequal = sum(
            int(np.count_nonzero(np.abs(ours.astype(np.int64) - theirs.astype(np.int64)) > 1))
            for ours, theirs in zip(stored, bits(made), strict=True)
        )
    else:
        unequal = _count_unequal(pair, stored, dtype=expected, digest=digest)
    if unequal:
        differences.append(
            f"{pair.name}: {unequal} of {stored.size} values differ from the source's {pair.tensor.name}"
        )
    recorded = pair.record.get("origin", {}).get("sha256")
    if recorded not in (None, digest.hexdigest()):
        differences.append(f"{pair.name}: the source's {pair.tensor.name} is not the one that was converted (sha256)")
    return differences


def _count_unequal(pair: _Pair, stored: np.ndarray, *, dtype: str, digest: "hashlib._Hash") -> int:
    """The number of unequal values of a parameter without an adapter."""
    unequal = 0
    for start, block in pair.tensor.blocks():
        digest.update(bits(block).reshape(-1))
        with np.errstate(over="ignore"):
            rows = bits(block.astype(dtype, copy=False))
        if pair.target.transform == "reversed":
            unequal += int(np.count_nonzero(stored[..., start : start + len(rows)] != rows.T))
        else:
            unequal += int(np.count_nonzero(stored[start : start + len(rows)] != rows))
    return unequal


def _count_unequal_codes(
    pair: _Pair, stored: np.ndarray, parameters: StoredParameters, *, digest: "hashlib._Hash", merge: Merge | None
) -> int:
    """The number of unequal codes and scales of a quantised parameter."""
    codes, scales = quantize_parameter(pair.tensor, pair.target, digest=digest, merge=merge)
    if scale_name(pair.name) not in parameters:
        return scales.size
    found = parameters.read(scale_name(pair.name))
    if found.shape != scales.shape:
        return scales.size
    # Where an adapter was added, another processor may sum the product in another order.
    free = 1 if merge is not None and merge.touches(pair.name) else 0
    steps = np.abs(bits(found).astype(np.int64) - bits(scales).astype(np.int64))
    unequal = int(np.count_nonzero(steps > 8 * free))
    for ours, theirs in zip(stored.view(np.int8), codes, strict=True):
        unequal += int(np.count_nonzero(np.abs(ours.astype(np.int16) - theirs) > free))
    return unequal


def _merge(adapter: PathOrUrl | None, *, manifest: dict[str, Any], dst: Path) -> Merge | None:
    """The adapter that was merged into a checkpoint."""
    stated = manifest.get("source", {}).get("adapter")
    if adapter is None and stated is None:
        return None
    if stated is None:
        raise ValueError(f"{dst}: was converted without an adapter, but {adapter} is given")
    if adapter is None:
        raise ValueError(f"{dst}: was converted with the adapter {stated['source']}; give it, by adapter= (--adapter)")
    merge = Merge(adapter, config=Qwen2AudioConfig.from_pretrained(dst))
    if merge.record["sha256"] != stated["sha256"]:
        raise ValueError(f"{adapter}: is not the adapter that {dst} was converted with (sha256)")
    return merge


def _compare_settings(folder: Folder, ours: Path) -> list[str]:
    differences = []
    theirs, copied = read_settings(folder), read_settings(ours)
    for name in sorted({*theirs, *copied}):
        if name not in copied:
            differences.append(f"missing {name}: the source has it, the checkpoint does not")
        elif name not in theirs:
            differences.append(f"extra {name}: the source has no such file")
        elif theirs[name] != copied[name]:
            differences.append(f"{name}: differs from the source's")
    a, b = (Qwen2AudioConfig.from_json_file(inside(place, "config.json")).to_dict() for place in (folder, ours))
    for values in (a, b):  # The converter records the weights' own dtype.
        for part in (values, values["text_config"], values["audio_config"]):
            for key in _STATED_DTYPES:
                part.pop(key, None)
    if a != b:
        differences.append("config.json: does not mean what the source's does")
    return differences
