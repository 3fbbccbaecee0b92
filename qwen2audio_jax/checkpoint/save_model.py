"""Saving a loaded model as a Hugging Face folder, which this package and transformers read."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from qwen2audio_jax.checkpoint.hf_folder import looks_like_hf_folder
from qwen2audio_jax.checkpoint.hf_writer import parse_size, plan_files, write_folder
from qwen2audio_jax.checkpoint.reader import is_checkpoint
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.generation_config import FILE, GenerationConfig
from qwen2audio_jax.model.kernel_layout import turned_name
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.parallel.process_rows import share_of

CONFIG = "config.json"


def save_model(
    folder: str | os.PathLike[str],
    *,
    params: Mapping[str, Any],
    config: Qwen2AudioConfig,
    generation_config: GenerationConfig,
    mesh: Mesh,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write weights, config.json and generation_config.json; `processor.save_pretrained` writes what is beside them.

    Args:
        folder: may hold other files, but no checkpoint; config.json comes last, and makes it one.
        params: the weights, written in the dtype that they have on the devices.
        config: of the model.
        generation_config: the defaults of its `generate`.
        mesh: where the weights are.
        max_shard_size: bytes of a file at most, unless one tensor alone is larger, or a text such as "5GB".

    Raises:
        ValueError: weights that are int8, a mesh over several processes, a checkpoint in the folder, or no room.
        OSError: the disk fails; nothing is left.
    """
    out = Path(folder)
    if not share_of(mesh).alone:
        raise ValueError("save_pretrained runs in one process, and this model's mesh spans several: use convert export")
    if out.exists() and (not out.is_dir() or looks_like_hf_folder(out) or is_checkpoint(out)):
        raise ValueError(f"{out}: {'holds a checkpoint' if out.is_dir() else 'is a file'}; choose another folder")
    stored = flatten_dict(dict(params), sep="/")
    shapes = {name: tuple(spec.shape) for name, spec in flatten_dict(parameter_specs(config), sep="/").items()}
    if any(str(array.dtype) == INT8 for array in stored.values()):
        raise ValueError("its weights are int8, which transformers does not read in this form: load it as it is stored")
    arrays = {name: stored[name if name in stored else turned_name(name)] for name in shapes}
    listed = {name: {"shape": shape, "dtype": str(arrays[name].dtype)} for name, shape in shapes.items()}
    size = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size

    def read(name: str) -> np.ndarray:
        array = arrays[name] if name in stored else arrays[name].T
        # The vocabulary is padded on a mesh.
        return np.asarray(array)[tuple(slice(length) for length in shapes[name])]

    settings = {FILE: generation_config.to_json().encode(), CONFIG: config.to_json().encode()}
    shards = plan_files(out, config=config, listed=listed, max_shard_bytes=size)
    draft = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        write_folder(draft, shards, read=read, settings=settings)
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
