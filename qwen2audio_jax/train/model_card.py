"""Training records: training.json beside a result, from which its model card is made (`checkpoint.model_card`).

Later information (scores, a description) is added to both with `describe_result`. Paths are shortened, because cards
are published.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from qwen2audio_jax._version import __version__
from qwen2audio_jax.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from qwen2audio_jax.checkpoint.model_card import CARD, PEFT, RECORD, TRANSFORMERS, trained_card
from qwen2audio_jax.config.strict_json import read_json_object
from qwen2audio_jax.storage import hub
from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.train.dataset import Dataset
from qwen2audio_jax.train.metrics import METRICS, read_metrics
from qwen2audio_jax.train.settings import TrainSettings
from qwen2audio_jax.train.trained_model import TrainedModel

_PATHS = (("model",), ("data", "train"), ("data", "evaluate"), ("data", "audio_root"))


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run at its end: its settings, the model that it started from, and its data."""

    settings: TrainSettings
    model: TrainedModel
    data: Dataset
    held_out: Dataset | None


def training_record(run: FinishedRun) -> dict[str, Any]:
    """The record of a finished run: the content of training.json."""
    settings, model = run.settings, run.model
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.weights))
    return {
        "tool": f"qwen2audio_jax {__version__}",
        "base_model": None if settings.from_scratch else _shortened(settings.model),
        "base_model_on_hub": hub.is_hub_id(settings.model) and not Path(settings.model).exists(),
        "steps": settings.steps,
        "trained_weights": trained,
        "stored_dtype": model.stored_dtype,
        "data": {
            "sha256": run.data.sha256,
            "records": len(run.data),
            "skipped": len(run.data.skipped),
            "steps_per_epoch": run.data.steps_per_epoch(),
            "evaluated": 0 if run.held_out is None else len(run.held_out),
        },
        "metrics": last_metrics(settings.output),
        "settings": shown_settings(settings),
        "scores": {},
        "title": None,
        "description": None,
    }


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as the bytes of training.json."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def last_metrics(output: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The last line of each kind ("train", "evaluate") in a run's metrics, without `kind`; none without the file."""
    if not Path(output, METRICS).is_file():
        return {}
    return {
        line["kind"]: {name: value for name, value in line.items() if name != "kind"} for line in read_metrics(output)
    }


def shown_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings without the output folder and unset values, paths shortened to their last two parts."""
    shown = json.loads(json.dumps(dataclasses.asdict(settings)))
    del shown["output"]
    for *tables, name in _PATHS:
        place = shown
        for table in tables:
            place = place[table]
        value = place[name]
        place[name] = [_shortened(item) for item in value] if isinstance(value, list) else _shortened(value)
    return _without_none(shown)


def _shortened(path: str | None) -> str | None:
    return "/".join(Path(path).parts[-2:]) if path is not None and Path(path).is_absolute() else path


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }


def describe_result(
    folder: str | os.PathLike[str],
    *,
    scores: Mapping[str, Any] | None = None,
    title: str | None = None,
    description: str | None = None,
) -> None:
    """Add information from after the training to a result's card, and rewrite the card.

    Args:
        folder: the exported model, or its adapter.
        scores: name -> number or text, or a mapping of such under the name of a test; replaces earlier ones.
        title: the card's heading; None keeps it.
        description: Markdown below the heading; None keeps it.

    Raises:
        ValueError: the folder holds no training.json.
    """
    place = Path(folder)
    if not (place / RECORD).is_file():
        raise ValueError(f"{place}: holds no {RECORD}; give the model folder of a finished training run")
    record = read_json_object(place / RECORD)
    added = {"scores": scores, "title": title, "description": description}
    record |= {name: value for name, value in added.items() if value is not None}
    library = PEFT if (place / ADAPTER_CONFIG).is_file() else TRANSFORMERS
    for name, content in ((RECORD, record_bytes(record)), (CARD, trained_card(record, library=library).encode())):
        write_whole(place / name, content)
