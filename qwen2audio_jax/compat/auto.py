"""The Auto classes of transformers: there is one model here, so each stands for one class of this package."""

from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.processing.tokenizer import Qwen2AudioTokenizer
from qwen2audio_jax.source import resolve_processor_files
from qwen2audio_jax.storage.bucket import PathOrUrl

AutoProcessor = Qwen2AudioProcessor
AutoModel = AutoModelForCausalLM = AutoModelForSeq2SeqLM = Qwen2AudioForConditionalGeneration
AutoModelForImageTextToText = AutoModelForMultimodalLM = Qwen2AudioForConditionalGeneration


class AutoTokenizer:
    """The tokenizer of a checkpoint's processor."""

    @staticmethod
    def from_pretrained(source: PathOrUrl = EMBEDDED, **options: Any) -> Qwen2AudioTokenizer:
        """Read it; arguments and errors as `Qwen2AudioProcessor.from_pretrained`."""
        return Qwen2AudioProcessor.from_pretrained(source, **options).tokenizer


class AutoFeatureExtractor:
    """The feature extractor of a checkpoint's processor."""

    @staticmethod
    def from_pretrained(source: PathOrUrl = EMBEDDED, **options: Any) -> Qwen2AudioFeatureExtractor:
        """Read it; arguments and errors as `Qwen2AudioProcessor.from_pretrained`."""
        return Qwen2AudioProcessor.from_pretrained(source, **options).feature_extractor


class AutoConfig:
    """The configuration of a checkpoint."""

    @staticmethod
    def from_pretrained(
        source: PathOrUrl = EMBEDDED, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> Qwen2AudioConfig:
        """Read config.json of a folder, a URL, a hub id or the embedded model.

        Raises:
            ValueError: none of these, or a configuration that is not supported.
        """
        return Qwen2AudioConfig.from_pretrained(resolve_processor_files(source, revision=revision))
