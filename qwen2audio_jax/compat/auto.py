"""The Auto classes of transformers for models: there is one here, so each stands for one class of this package."""

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.source import resolve_processor_files
from qwen2audio_jax.storage.bucket import PathOrUrl

AutoModel = AutoModelForCausalLM = AutoModelForSeq2SeqLM = Qwen2AudioForConditionalGeneration
AutoModelForImageTextToText = AutoModelForMultimodalLM = Qwen2AudioForConditionalGeneration


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
