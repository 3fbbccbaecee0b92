"""The model's configuration: frozen, hashable values that every jitted function takes as a static argument.

The fields have the reference's names (`transformers.Qwen2AudioConfig`) and default to the published 7B model. Reading a
config.json is strict (`config_json`): absent keys take the reference's class defaults, and stated values that this
package does not implement are errors. Equality and hash cover only the fields that affect the computation.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from qwen2audio_jax.config import strict_json
from qwen2audio_jax.config.encoder import Qwen2AudioEncoderConfig
from qwen2audio_jax.config.frozen import REMEDY, refuses_assignment
from qwen2audio_jax.config.strict_json import Inert
from qwen2audio_jax.config.text import Qwen2AudioTextConfig
from qwen2audio_jax.storage.bucket import PathOrUrl, folder_at
from qwen2audio_jax.storage.write_whole import write_whole

__all__ = ["Qwen2AudioConfig", "Qwen2AudioEncoderConfig", "Qwen2AudioTextConfig"]

_IGNORE_INDEX = -100


@refuses_assignment(REMEDY)
@dataclass(frozen=True, kw_only=True)
class Qwen2AudioConfig:
    """The whole model (reference: transformers.Qwen2AudioConfig).

    Raises:
        ValueError: dtype is not "float32", "bfloat16" or "float16", or audio_token_index is outside the vocabulary.
    """

    audio_config: Qwen2AudioEncoderConfig = field(default_factory=Qwen2AudioEncoderConfig)
    text_config: Qwen2AudioTextConfig = field(default_factory=Qwen2AudioTextConfig)
    audio_token_index: int = 151646
    """Id of the placeholder `<|AUDIO|>`, one for each audio token."""
    ignore_index: int = _IGNORE_INDEX
    """Label that the loss ignores."""
    dtype: str = "bfloat16"
    """Dtype of the computation and of the parameters on the device."""
    inert: Inert = field(
        default=(("architectures", '["Qwen2AudioForConditionalGeneration"]'),), compare=False, repr=False
    )
    """Keys of the file that change no output, written back by `to_dict`."""
    omitted: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Optional keys that the file left out; `to_dict` leaves them out too while their value is the implied one."""

    def __post_init__(self) -> None:
        for name, kind in (("audio_config", Qwen2AudioEncoderConfig), ("text_config", Qwen2AudioTextConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}; from_dict reads one from a dict")
        strict_json.check_token_id(
            self.audio_token_index, where="audio_token_index", vocab_size=self.text_config.vocab_size
        )
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index is {strict_json.describe(self.ignore_index)}; it must be a whole number")
        strict_json.check_dtype(self.dtype, where="dtype")

    @property
    def head_dims(self) -> tuple[int, int]:
        """H of the encoder's attention and of the decoder's."""
        return self.audio_config.head_dim, self.text_config.head_dim

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Qwen2AudioConfig":
        """Read the content of a config.json, as published or as re-saved by any release of transformers.

        text_config.vocab_size takes precedence over the top-level one. Embeddings are tied only if text_config or the
        top level says so. dtype is the top level's, else text_config's, else float32.

        Raises:
            ValueError: a key is unknown, or a value unsupported, of the wrong type, out of range or contradicted.
        """
        data = dict(data)
        if "model_type" not in data:
            raise ValueError('model_type is missing; it must be "qwen2_audio"')
        audio = Qwen2AudioEncoderConfig.from_dict(strict_json.section_of(data, "audio_config"))
        text_data = strict_json.section_of(data, "text_config")
        for key in ("vocab_size", "tie_word_embeddings"):
            if data.get(key) is not None:
                text_data.setdefault(key, data[key])
        text = Qwen2AudioTextConfig.from_dict(text_data)
        if data.get("tie_word_embeddings") not in (None, text.tie_word_embeddings):
            raise ValueError(
                f"tie_word_embeddings is {strict_json.describe(data['tie_word_embeddings'])} but "
                f"text_config.tie_word_embeddings is {strict_json.describe(text.tie_word_embeddings)}; make them the "
                f"same: true only if the checkpoint has no lm_head of its own"
            )
        strict_json.pop_alias(data, where="", alias="audio_token_id", key="audio_token_index")
        values, inert = strict_json.split_inert(
            {key: value for key, value in data.items() if key not in ("audio_config", "text_config")},
            where="",
            fixed={"model_type": ("qwen2_audio",)},
            inert=("eos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size", *_repeated(data, text)),
            fields={"audio_token_index", "ignore_index"},
        )
        stated = _stated_dtype(inert)
        omitted = tuple(
            key for key, given in (("dtype", stated), ("ignore_index", values.get("ignore_index"))) if given is None
        )
        dtype = stated or _stated_dtype(text.inert) or "float32"
        return cls(**values, audio_config=audio, text_config=text, dtype=dtype, inert=inert, omitted=omitted)

    @classmethod
    def from_json_file(cls, path: PathOrUrl) -> "Qwen2AudioConfig":
        """Read a config.json.

        Raises:
            ValueError: see `from_dict`; the message names the file.
        """
        data = strict_json.read_json_object(folder_at(path))
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: PathOrUrl) -> "Qwen2AudioConfig":
        """Read the config.json of a checkpoint folder, local or in a bucket.

        Raises:
            ValueError: see `from_dict`; the message names the file.
        """
        return cls.from_json_file(folder_at(folder) / "config.json")

    @classmethod
    def from_name(cls, name: str) -> "Qwen2AudioConfig":
        """One of the configurations that come with the package: "qwen2-audio-7b", "qwen2-audio-7b-instruct", "tiny".

        Raises:
            ValueError: there is none of that name; the message lists them.
        """
        folder = resources.files("qwen2audio_jax.configs")
        names = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
        if name not in names:
            raise ValueError(f"there is no configuration named {name!r}; there are: {', '.join(names)}")
        return cls.from_dict(json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """The content of a complete config.json, which the reference reads like the file this came from."""
        result = {
            "model_type": "qwen2_audio",
            **strict_json.inert_values(self.inert),
            "audio_config": self.audio_config.to_dict(),
            "text_config": self.text_config.to_dict(),
            "audio_token_index": self.audio_token_index,
        }
        if "tie_word_embeddings" in result:
            result["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        if "ignore_index" not in self.omitted or self.ignore_index != _IGNORE_INDEX:
            result["ignore_index"] = self.ignore_index
        if "dtype" not in self.omitted or self.dtype != (_stated_dtype(self.text_config.inert) or "float32"):
            for key in {"dtype", "torch_dtype"}.intersection(result) or {"dtype"}:
                result[key] = self.dtype
        return result

    def to_json(self) -> str:
        """The text of a complete config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `to_dict()` atomically as config.json into `folder` (created if missing) and return its path."""
        path = Path(folder, "config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.to_json().encode())
        return path


def _repeated(data: Mapping[str, Any], text: Qwen2AudioTextConfig) -> list[str]:
    """Keys of the top level that say once more what text_config says: trainers look for sizes there."""
    known = {field.name for field in fields(text)}
    return [key for key, value in data.items() if key in known and strict_json.same(value, getattr(text, key))]


def _stated_dtype(inert: Inert) -> str | None:
    values = strict_json.inert_values(inert)
    return values.get("dtype") or values.get("torch_dtype")
