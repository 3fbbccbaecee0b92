"""The Auto classes of transformers for text and sound: each stands for one class of this package."""

from typing import Any

from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.processing.tokenizer import Qwen2AudioTokenizer
from qwen2audio_jax.storage.bucket import PathOrUrl

AutoProcessor = Qwen2AudioProcessor


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
