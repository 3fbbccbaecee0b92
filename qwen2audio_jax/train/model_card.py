"""Model card of a result: README.md for people and the hub, generated from training.json beside it.

Later information (scores, a description) is added to both with `describe_result`. Paths are shortened, because cards
are published.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from qwen2audio_jax._version import __version__
from qwen2audio_jax.config.strict_json import read_json_object
from qwen2audio_jax.storage import hub
from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.train.dataset import Dataset
from qwen2audio_jax.train.metrics import METRICS, read_metrics
from qwen2audio_jax.train.settings import TrainSettings
from qwen2audio_jax.train.trained_model import TrainedModel

CARD = "README.md"
RECORD = "training.json"
TRANSFORMERS, PEFT = "transformers", "peft"

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
        folder: the exported model.
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
    for name, content in ((RECORD, record_bytes(record)), (CARD, card(record).encode())):
        write_whole(place / name, content)


def card(record: Mapping[str, Any], *, library: str = TRANSFORMERS) -> str:
    """The text of README.md.

    Args:
        record: the content of training.json.
        library: "transformers" for the model, "peft" for its adapter alone.
    """
    base, settings, data = record["base_model"], record["settings"], record["data"]
    lora = "lora" in settings
    parts = [_front_matter(base if record["base_model_on_hub"] else None, library=library, lora=lora)]
    heading = f"Qwen2-Audio, fine-tuned from {base}" if base else "Qwen2-Audio, trained from freshly drawn weights"
    parts.append(f"# {record['title'] or heading}" + (": adapter" if library == PEFT else ""))
    if record["description"]:
        parts.append(record["description"].strip())
    parts.append(_usage(base, library=library))
    trained = "a LoRA adapter" if lora else ", ".join(settings["train"])
    rows = {
        "base model": base or "none: drawn with seed " + str(settings["seed"]),
        "objective": settings["objective"]["kind"].upper(),
        "trained": f"{trained} ({record['trained_weights']:,} weights)",
        "steps": f"{record['steps']:,} of {settings['data']['rows']} rows ({data['steps_per_epoch']:,} an epoch)",
        "records": f"{data['records']:,} trained on, {data['skipped']:,} skipped, {data['evaluated']:,} held out",
        "data SHA-256": f"`{data['sha256']}`",
        "stored as": record["stored_dtype"],
        "tool": record["tool"],
    }
    parts.append("## Training\n\n" + _table(("", ""), rows))
    for kind, name in (("train", "Last training metrics"), ("evaluate", "Last evaluation")):
        if kind in record["metrics"]:
            parts.append(f"## {name}\n\n" + _table(("metric", "value"), record["metrics"][kind]))
    if record["scores"]:
        parts.append("## Scores\n\n" + _table(("score", "value"), dict(_flat(record["scores"]))))
    parts.append(f"## Configuration\n\n```toml\n{toml(settings)}```")
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str | None, *, library: str, lora: bool) -> str:
    lines = ["license: apache-2.0", f"library_name: {library}", "pipeline_tag: audio-text-to-text"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
        lines.append(f"base_model_relation: {'adapter' if library == PEFT else 'finetune'}")
    tags = ["qwen2_audio", "audio", "jax", *(["lora"] if lora else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _usage(base: str | None, *, library: str) -> str:
    if library == PEFT:
        return (
            "Add it to its base model, with `DIR` this folder:\n\n```python\nfrom qwen2audio_jax import "
            "Qwen2AudioForConditionalGeneration\n\nmodel = Qwen2AudioForConditionalGeneration.from_pretrained("
            f'{json.dumps(base)}, adapter="DIR")\n```'
        )
    return (
        "transformers and qwen2audio-jax load it, with `DIR` this folder:\n\n```sh\nqwen2audio generate --model DIR "
        '--audio clip.wav "What is said?"\n```'
    )


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    if value is None:
        return "not finite"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _flat(scores: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}, ")
        else:
            yield above + name, value


def toml(tables: Mapping[str, Any], above: str = "") -> str:
    """A nested dict of strings, numbers, booleans and lists of them as TOML."""
    lines = [f"{name} = {_value(value)}" for name, value in tables.items() if not isinstance(value, Mapping)]
    inside = [
        f"\n[{above}{name}]\n" + toml(value, f"{above}{name}.")
        for name, value in tables.items()
        if isinstance(value, Mapping)
    ]
    return "".join(f"{line}\n" for line in lines) + "".join(inside)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
