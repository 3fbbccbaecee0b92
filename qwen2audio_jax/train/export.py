"""Export of a run's result as a Hugging Face folder, the last stage of training.

Trained weights are float32, sharded over the mesh and possibly over processes, with a padded vocabulary; they are
written one at a time, gathered and unpadded, in the dtypes of the checkpoint that the run started from. Frozen weights
are read from that checkpoint again, so that they keep their bytes. The folder appears complete or not at all.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from qwen2audio_jax.checkpoint.model_card import CARD, PEFT, RECORD, trained_card
from qwen2audio_jax.checkpoint.reader import read_manifest
from qwen2audio_jax.model.lora import lora_scale, merge_adapter
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.train.model_card import FinishedRun, record_bytes, training_record
from qwen2audio_jax.train.objective import REFERENCE
from qwen2audio_jax.train.settings import LoraSettings, TrainSettings
from qwen2audio_jax.train.trained_model import TrainedModel, exported_folder

if TYPE_CHECKING:
    from qwen2audio_jax.train.state import TrainState

Read = Callable[[str], np.ndarray]


def adapter_folder(settings: TrainSettings) -> Path:
    """The folder for the adapter of a [lora] run, in PEFT's format."""
    return Path(settings.output) / "adapter"


def check_destination(settings: TrainSettings) -> None:
    """Raise a `ValueError` unless the result may be written: nothing is there, or the result of an earlier run."""
    out = exported_folder(settings)
    if Path(settings.model).exists() and Path(settings.model).resolve() == out.resolve():
        raise ValueError(f"{out}: the model to start from is where the result goes; choose another output folder")
    if os.path.lexists(out) and (out.is_symlink() or not (out / RECORD).is_file()):
        raise ValueError(
            f"{out}: is where the result goes, but holds something else (there is no {RECORD}); move it away or choose "
            "another output folder"
        )


def finish(run: FinishedRun, state: "TrainState") -> Path:
    """Write a run's result: the model with its card, and the adapter of a [lora] run. All processes call it.

    Returns:
        The model's folder; the result of an earlier run in it is replaced.

    Raises:
        ValueError: it cannot be written there, or the disk has too little space.
        OSError: the disk fails. An earlier result stays as it was.
    """
    settings, first = run.settings, jax.process_index() == 0
    out = exported_folder(settings)
    record: dict[str, Any] = {}
    with _agreed(out):
        if first:
            check_destination(settings)
            record = training_record(run)
    if settings.lora is not None:
        adapter = unflatten_dict({path: _whole(leaf) for path, leaf in flatten_dict(state.weights).items()})
        with _agreed(out):
            if first:
                _write_adapter(run, adapter, record=record)
    with _agreed(out):
        files = {RECORD: record_bytes(record), CARD: trained_card(record).encode()} if first else {}
        export_result(out, model=run.model, weights=state.weights, settings=settings, files=files)
    return out


def export_result(
    out: Path, *, model: TrainedModel, weights: Mapping[str, Any], settings: TrainSettings, files: Mapping[str, bytes]
) -> None:
    """Write a model in the Hugging Face layout, with the settings, tokenizer and template that the run started from.

    All processes call it; the first one writes.

    Args:
        out: the folder; replaced if it exists.
        model: the model that the run started from.
        weights: the trained weights, like `model.weights`.
        settings: of the run.
        files: extra files for the folder: name -> content.

    Raises:
        ValueError: a weight does not fit its dtype, or the disk has too little space.
        OSError: the disk fails. An earlier result stays as it was.
    """
    from qwen2audio_jax.checkpoint.hf_folder import read_settings
    from qwen2audio_jax.checkpoint.hf_writer import plan_files, write_folder

    start = Path(settings.model) if model.checkpoint is None else model.checkpoint
    shapes = {name: tuple(spec.shape) for name, spec in flatten_dict(parameter_specs(model.config), sep="/").items()}
    if model.checkpoint is None:
        listed = {name: {"shape": shape, "dtype": model.stored_dtype} for name, shape in shapes.items()}
    else:
        listed = read_manifest(model.checkpoint)["parameters"]
    shards = plan_files(start, config=model.config, listed=listed)
    read = _reader(model, weights, lora=settings.lora, shapes=shapes, listed=listed)
    order = [each.target.parameter for shard in shards for each in shard]
    if jax.process_index() != 0:
        for name in order:
            read(name)
        return
    done = 0

    def read_next(name: str) -> np.ndarray:
        nonlocal done
        done += 1
        return read(name)

    draft = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        beside = {**read_settings(start), **files, "config.json": (start / "config.json").read_bytes()}
        write_folder(draft, shards, read=read_next, settings=beside)
    except Exception:
        # The other processes iterate over all weights too, because each gather needs every process.
        for name in order[done:] if jax.process_count() > 1 else ():
            read(name)
        raise
    _replace(out, draft)


def _reader(
    model: TrainedModel,
    weights: Mapping[str, Any],
    *,
    lora: LoraSettings | None,
    shapes: Mapping[str, tuple[int, ...]],
    listed: Mapping[str, Mapping[str, Any]],
) -> Read:
    """A reader of parameters in their stored form; all processes must read the same ones in the same order."""
    from qwen2audio_jax.checkpoint.orbax_params import read_stored

    trained = flatten_dict(dict(weights), sep="/")
    frozen = flatten_dict({name: tree for name, tree in model.frozen.items() if name != REFERENCE}, sep="/")

    def read(name: str) -> np.ndarray:
        if name in trained:
            value = _whole(trained[name])
        elif model.checkpoint is not None:
            value = read_stored(model.checkpoint, name, record=dict(listed[name]))
        else:
            value = _whole(frozen[name])
        value = value[tuple(slice(size) for size in shapes[name])]  # the vocabulary is padded on a mesh
        linear = name.removesuffix("/kernel")
        if lora is not None and f"{linear}/lora_a" in trained:
            addition = {side: _whole(trained[f"{linear}/{side}"]) for side in ("lora_a", "lora_b")}
            value = np.asarray(merge_adapter({"kernel": value}, addition, scale=lora_scale(lora))["kernel"])
        return _as_stored(name, value, dtype=str(listed[name]["dtype"]))

    return read


def _whole(array: jax.Array) -> np.ndarray:
    """An array on the host, gathered from all processes if it is sharded over them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _as_stored(name: str, value: np.ndarray, *, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = value.astype(jax.numpy.dtype(dtype))
    if not np.isfinite(stored.astype(np.float32)).all():
        raise ValueError(
            f"{name} does not fit {dtype}, the dtype of the model that training started from (largest: "
            f"{np.abs(value.astype(np.float32)).max():g}); start from that model converted with --dtype float32"
        )
    return stored


def _write_adapter(run: FinishedRun, adapter: Mapping[str, Any], *, record: Mapping[str, Any]) -> None:
    from qwen2audio_jax.checkpoint.adapter import save_adapter

    settings = run.settings
    assert settings.lora is not None
    place = adapter_folder(settings)
    save_adapter(place, adapter, settings=settings.lora, config=run.model.config, base_model=settings.model)
    (place / RECORD).write_bytes(record_bytes(record))
    (place / CARD).write_text(trained_card(record, library=PEFT), encoding="utf-8")


def _replace(out: Path, draft: Path) -> None:
    """Move a finished folder into place by two renames, so that readers find a complete folder or none."""
    before = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        os.rename(out, before)
    os.rename(draft, out)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _agreed(where: Path) -> Iterator[None]:
    """Raise in all processes if the first one fails in the block, so that none is left waiting."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
        problem = problem or OSError(f"{where}: the first process could not write the result")
    if problem is not None:
        raise problem
