"""Default options of a checkpoint: its generation_config.json, else what its config.json says of tokens."""

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.generation_config import FILE, GenerationConfig
from qwen2audio_jax.storage.bucket import Folder


def default_generation(folder: Folder, *, config: Qwen2AudioConfig) -> GenerationConfig:
    """The options of a checkpoint's generation_config.json; without one: greedy, with the stop ids of config.json."""
    if (found := read_generation(folder)) is not None:
        return found
    text = config.text_config
    return GenerationConfig.from_dict({"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id})


def read_generation(folder: Folder) -> GenerationConfig | None:
    """The options of a folder's generation_config.json; None if it has none.

    Raises:
        ValueError: an option is not supported; the message names the file.
    """
    settings = folder / FILE
    return GenerationConfig.from_json_file(settings) if settings.exists() else None
