"""The kind of a checkpoint, told from its files: its weights are not read, and no jax is needed."""

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import resolve_processor_files
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.tasks.task import kind_of


def checkpoint_kind(source: PathOrUrl, *, revision: str | None = None) -> str:
    """The kind of a checkpoint: "base", "instruct" or "embedded"; see `task.kind_of`.

    Raises:
        ValueError: there is no such checkpoint, or its files cannot be read.
    """
    folder = resolve_processor_files(source, revision=revision)
    config = Qwen2AudioConfig.from_json_file(folder / "config.json")
    settings = folder / "generation_config.json"
    stops = GenerationConfig.from_json_file(settings).eos_token_id if settings.exists() else ()
    return kind_by(Qwen2AudioProcessor.from_pretrained(folder), config, stops, source=source)


def kind_by(
    processor: Qwen2AudioProcessor, config: Qwen2AudioConfig, stops: tuple[int, ...], *, source: object = ""
) -> str:
    """The kind of a checkpoint whose files have been read; `stops` are the ids that end its answers."""
    turn = processor.tokenizer.control_tokens.get("<|im_end|>")
    ends = turn is not None and turn.id in stops
    return kind_of(source, vocabulary=config.text_config.vocab_size, stops_at_turn=ends)
