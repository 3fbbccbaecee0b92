"""Model cards: README.md of a folder with weights, for people and for the hub.

`trained_card` shows a training record, the content of the training.json beside it; `exported_card` what the manifest of
a converted checkpoint says. Both begin with the hub's front matter: base model, tags and, with scores, a model-index.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from qwen2audio_jax.storage import hub

CARD = "README.md"
RECORD = "training.json"
TRANSFORMERS, PEFT = "transformers", "peft"
_TASK = "audio-text-to-text"


def trained_card(record: Mapping[str, Any], *, library: str = TRANSFORMERS) -> str:
    """The card of a training run's result.

    Args:
        record: the content of training.json.
        library: "transformers" for the model, "peft" for its adapter alone.
    """
    base, settings, data = record["base_model"], record["settings"], record["data"]
    lora = "lora" in settings
    heading = f"Qwen2-Audio, fine-tuned from {base}" if base else "Qwen2-Audio, trained from freshly drawn weights"
    heading = f"{record['title'] or heading}" + (": adapter" if library == PEFT else "")
    on_hub = base if record["base_model_on_hub"] else None
    relation = "adapter" if library == PEFT else "finetune"
    index = _model_index(heading, _measured(record))
    parts = [_front_matter(on_hub, library=library, relation=relation, tags=["lora"] * lora, index=index)]
    parts.append(f"# {heading}")
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


def exported_card(manifest: Mapping[str, Any]) -> str:
    """The card of an exported checkpoint of which no training record tells.

    Args:
        manifest: the checkpoint's, with its source and the SHA-256 of every parameter.
    """
    source = manifest.get("source") or {}
    name, adapter = str(source.get("source") or ""), source.get("adapter")
    on_hub = name if hub.is_hub_id(name) else None
    relation = "finetune" if adapter else None
    called = on_hub or name.rstrip("/").rpartition("/")[2] or "a checkpoint"
    totals = manifest["totals"]
    rows = {
        "converted from": called,
        "commit": source.get("commit") or source.get("revision"),
        "adapter, merged": str(adapter).rstrip("/").rpartition("/")[2] if adapter else None,
        "weights": f"{totals['parameters']:,} in {totals['tensors']:,} tensors",
        "weights SHA-256": f"`{weights_sha256(manifest)}`",
        "tool": manifest["tool"],
    }
    known = {name: value for name, value in rows.items() if value is not None}
    parts = [
        _front_matter(on_hub, library=TRANSFORMERS, relation=relation, tags=[], index=[]),
        f"# Qwen2-Audio, exported from {called}",
        _usage(None, library=TRANSFORMERS),
        "## Weights\n\n" + _table(("", ""), known),
        "Scores: none were measured on these files.",
    ]
    return "\n\n".join(parts) + "\n"


def weights_sha256(manifest: Mapping[str, Any]) -> str:
    """One SHA-256 of all parameters: that of the lines `NAME SHA256`, sorted by name."""
    lines = sorted(f"{name} {each['sha256']}\n" for name, each in manifest["parameters"].items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def card_of_export(manifest: Mapping[str, Any], record: bytes | None) -> str:
    """The card of an exported checkpoint: by its training record where that is one of ours, else by its manifest."""
    if record is not None:
        try:
            return trained_card(json.loads(record))
        except (KeyError, TypeError, ValueError, AttributeError):
            pass  # a file of another tool under this name
    return exported_card(manifest)


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by the name of their test; those of the last evaluation are of the held-out records."""
    held_out = {
        name: value for name, value in record["metrics"].get("evaluate", {}).items() if name not in ("step", "targets")
    }
    tests: dict[str, Any] = {"held-out records of the training run": held_out}
    for name, value in record["scores"].items():
        if isinstance(value, Mapping):
            tests[name] = dict(_flat(value))
        else:
            tests.setdefault("scores", {})[name] = value
    return tests


def _model_index(title: str, tests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of the hub's model-index: JSON, which is YAML; empty without a finite number."""
    results = []
    for test, scores in tests.items():
        metrics = [
            {"type": name, "name": name.replace("_", " "), "value": value}
            for name, value in scores.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ]
        if metrics:
            dataset = {"name": test, "type": "private"}
            results.append({"task": {"type": _TASK}, "dataset": dataset, "metrics": metrics})
    if not results:
        return []
    lines = [f"  - {json.dumps(result, ensure_ascii=False)}" for result in results]
    return ["model-index:", f"- name: {json.dumps(title, ensure_ascii=False)}", "  results:", *lines]


def _front_matter(base: str | None, *, library: str, relation: str | None, tags: list[str], index: list[str]) -> str:
    lines = ["license: apache-2.0", f"library_name: {library}", f"pipeline_tag: {_TASK}"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
        if relation is not None:
            lines.append(f"base_model_relation: {relation}")
    tags = ["qwen2_audio", "audio", "jax", *tags]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), *index, "---"])


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
