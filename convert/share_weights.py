"""Conversions of weights that were converted before: the new checkpoint links to the parameters of the earlier one.

What tells whether weights are the same is their bytes alone: neither the names and times of files nor the settings
beside them, which the new checkpoint has as they are now.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2audio_jax.checkpoint.hf_folder import inside, open_weights, read_settings
from qwen2audio_jax.checkpoint.reader import MANIFEST, PARAMS, read_manifest
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.storage.bucket import Folder

from .convert_tensor import Task, stored_dtype
from .dtypes import KEEP
from .match_tensors import match
from .to_orbax import check_source, config_dtype


def share(folder: Folder, place: Path, *, among: Iterable[Path]) -> Path | None:
    """Make the checkpoint of a Hugging Face folder out of an earlier conversion of the same weights.

    Args:
        folder: the source.
        place: to be made, beside the earlier conversions; what is there unfinished is replaced.
        among: finished checkpoints of this package with parameters of their own, of any source.

    Returns:
        The one whose parameters it shares; None, and nothing made, if none has these weights.

    Raises:
        ValueError: the source is not a complete, consistent checkpoint.
    """
    config = Qwen2AudioConfig.from_json_file(inside(folder, "config.json"))
    settings = read_settings(folder)
    with open_weights(folder) as weights:
        tasks = [
            Task(tensor, target, stored_dtype(tensor, target, dtype=KEEP))
            for tensor, target in match(weights, config=config, folder=folder)
        ]
        tasks.sort(key=lambda task: task.nbytes)  # other weights show in the smallest
        for other in among:
            manifest = read_manifest(other)
            if not _has_weights(manifest, tasks, folder=folder, other=other):
                continue
            stamps = {task.tensor.file.path.name: task.tensor.file.stamp for task in tasks}
            source = {**manifest["source"], "source": str(folder), "stamps": stamps}
            draft = place.with_name(f"{place.name}.new")
            for old in (draft, place):
                shutil.rmtree(old, ignore_errors=True)
            draft.mkdir()
            (draft / PARAMS).symlink_to(Path("..", other.name, PARAMS), target_is_directory=True)
            replace(config, dtype=config_dtype(config, dtype=KEEP, tasks=tasks)).save_pretrained(draft)
            for name, content in settings.items():
                (draft / name).write_bytes(content)
            (draft / MANIFEST).write_text(json.dumps({**manifest, "source": source}, indent=1), encoding="utf-8")
            os.replace(draft, place)
            return other
    return None


def _has_weights(manifest: Mapping[str, Any], tasks: list[Task], *, folder: Folder, other: Path) -> bool:
    source, parameters = manifest["source"], manifest["parameters"]
    kept = (source.get("dtype"), source.get("non_finite"), source.get("adapter")) == (KEEP, "refuse", None)
    if not kept or len(parameters) != sum(len(task.parts) for task in tasks):
        return False
    # The files' stamps save reading them again, but only in their own folder.
    same = os.path.realpath(str(source.get("source"))) == os.path.realpath(str(folder))
    stamps = source.get("stamps") or {} if same else {}
    finished = {name: {**each, "note": stamps.get(each["origin"]["file"])} for name, each in parameters.items()}
    try:
        check_source(finished, tasks, dst=other)
    except ValueError:
        return False
    return True
