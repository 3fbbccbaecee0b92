"""Processor files of a checkpoint, in the published layout and in that of transformers 5."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2audio_jax.config.strict_json import describe, present, read_json_object
from qwen2audio_jax.config.unknown_keys import could_matter
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.bpe_files import MERGES, VOCAB, has_bpe_files, read_bpe_files
from qwen2audio_jax.storage.bucket import Folder
from qwen2audio_jax.storage.write_whole import write_whole

KNOWN_KEYS = frozenset(
    (
        "feature_extractor",
        "chat_template",
        "audio_token",
        "audio_bos_token",
        "audio_eos_token",
        "processor_class",
        "auto_map",
        "transformers_version",
    )
)
PLACEHOLDERS = re.compile(
    r"audio|clip|feature|frame|length|max_|patch|pool|rate|ratio|sampl|stride|template|time|token"
)
"""Words of settings that change how some processor expands a clip's placeholder."""
DEFAULT_AUDIO_TOKEN = "<|AUDIO|>"


@dataclass(frozen=True)
class ProcessorFiles:
    """The contents of the processor files.

    Attributes:
        tokenizer_json: the text of tokenizer.json.
        tokenizer_config: tokenizer_config.json without its template.
        feature_extractor: preprocessor_config.json, or that part of processor_config.json.
        chat_template: the checkpoint's template, or None.
        audio_token: the placeholder of a clip.
    """

    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    feature_extractor: dict[str, Any]
    chat_template: str | None = None
    audio_token: str = DEFAULT_AUDIO_TOKEN


def read_processor_files(folder: Folder) -> ProcessorFiles:
    """Read a folder in either layout.

    The template is that of chat_template.jinja, else chat_template.json, else processor_config.json, else
    tokenizer_config.json. (The reference's processor does not read the last one.)

    Raises:
        ValueError: a file is missing, damaged or has unsupported content; the message names it.
    """
    processor_config = present(_read_optional(folder / "processor_config.json"))
    for key, value in processor_config.items():
        if key not in KNOWN_KEYS and could_matter(key, value, known=KNOWN_KEYS, words=PLACEHOLDERS):
            raise ValueError(
                f"{folder / 'processor_config.json'}: {key} is {describe(value)}: this key is not known, so its "
                f"effect is not either. Check its spelling; delete it if it changes nothing"
            )
    tokenizer_json, tokenizer_config = _read_tokenizer(folder)
    in_tokenizer = tokenizer_config.pop("chat_template", None)
    audio_token = processor_config.get("audio_token", DEFAULT_AUDIO_TOKEN)
    if not isinstance(audio_token, str):
        raise ValueError(
            f"{folder / 'processor_config.json'}: audio_token is {describe(audio_token)}; it must be a str"
        )
    return ProcessorFiles(
        tokenizer_json=tokenizer_json,
        tokenizer_config=tokenizer_config,
        feature_extractor=read_extractor_settings(folder, processor_config),
        chat_template=_read_template(folder, processor_config.get("chat_template"), in_tokenizer),
        audio_token=audio_token,
    )


def read_extractor_settings(folder: Folder, processor_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The feature extractor's settings, of processor_config.json (or of what was read of it) or of their own file.

    Raises:
        ValueError: neither file has them, or one is damaged.
    """
    if processor_config is None:
        processor_config = present(_read_optional(folder / "processor_config.json"))
    extractor = processor_config.get("feature_extractor")
    if extractor is None:
        if not (folder / "preprocessor_config.json").is_file():
            raise ValueError(
                f"{folder}: the feature extractor's settings are missing; there is neither a preprocessor_config.json "
                f"nor a processor_config.json with a feature_extractor. Take it from the published checkpoint"
            )
        extractor = read_json_object(folder / "preprocessor_config.json")
    if not isinstance(extractor, Mapping):
        raise ValueError(f"{folder / 'processor_config.json'}: feature_extractor must be a JSON object")
    return dict(extractor)


def _read_tokenizer(folder: Folder) -> tuple[str, dict[str, Any]]:
    """The text of tokenizer.json, or of what vocab.json and merges.txt amount to, and tokenizer_config.json."""
    settings = _read_optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        return _read_text(folder / "tokenizer.json", LIMITS.json_bytes), settings
    if has_bpe_files(folder):
        return read_bpe_files(folder, settings=settings)
    there = [name for name in (VOCAB, MERGES) if (folder / name).is_file()]
    found = f"only {' and '.join(there)} were found" if there else "no tokenizer was found"
    raise ValueError(
        f"{folder}: tokenizer.json is missing ({found}); take it from the published checkpoint, or vocab.json and "
        "merges.txt together"
    )


def write_processor_files(folder: Path, files: ProcessorFiles) -> list[Path]:
    """Write the files so that `read_processor_files` and transformers read them back; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"tokenizer_config.json": files.tokenizer_config, "preprocessor_config.json": files.feature_extractor}
    if files.audio_token != DEFAULT_AUDIO_TOKEN:
        data["processor_config.json"] = {"audio_token": files.audio_token, "processor_class": "Qwen2AudioProcessor"}
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in data.items()}
    texts["tokenizer.json"] = files.tokenizer_json
    if files.chat_template is not None:
        texts["chat_template.jinja"] = files.chat_template
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    return [folder / name for name in texts]


def _read_template(folder: Folder, in_processor: Any, in_tokenizer: Any) -> str | None:
    raw, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    if raw.is_file():
        return _read_text(raw, 4 * LIMITS.template_chars)
    places = [(str(legacy), read_json_object(legacy).get("chat_template"))] if legacy.is_file() else []
    places += [("processor_config.json", in_processor), ("tokenizer_config.json", in_tokenizer)]
    for where, value in places:
        if value is None:
            continue
        if isinstance(value, list):  # several, by name: [{"name", "template"}]
            named = {part.get("name"): part.get("template") for part in value if isinstance(part, Mapping)}
            value = named.get("default", value)
        if not isinstance(value, str):
            raise ValueError(
                f'{where}: chat_template is {describe(value)}; it must be a str, or a list with one "default"'
            )
        return value
    return None


def _read_optional(path: Folder) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _read_text(path: Folder, limit: int) -> str:
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path}: {size} bytes; it has at most {limit}")
    try:
        # Not read_text, which would convert a template's carriage returns.
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
