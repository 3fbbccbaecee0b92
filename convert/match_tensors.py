"""Matching of stored tensors with parameters: all differences are found from the files' headers alone."""

import numpy as np
from flax.traverse_util import flatten_dict

from qwen2audio_jax.checkpoint.hf_folder import StoredTensor, StoredWeights
from qwen2audio_jax.checkpoint.mapping import EMBEDDING, HEAD, IGNORED, Target, canonical_name, expected_tensors
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, bits
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.storage.bucket import Folder


def match(weights: StoredWeights, *, config: Qwen2AudioConfig, folder: Folder) -> list[tuple[StoredTensor, Target]]:
    """Pair every stored tensor with the parameter that it fills, in their order on disk.

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
    """Return True if two tensors of the same shape are bitwise equal."""
    return a.entry.dtype == b.entry.dtype and all(
        np.array_equal(bits(block), bits(other)) for (_, block), (_, other) in zip(a.blocks(), b.blocks(), strict=True)
    )
