"""Qwen2-Audio in JAX and Flax: speech, sound and music in, text out, on TPUs, GPUs and CPUs.

The three nouns to know: a `Qwen2AudioProcessor` turns text and sound into arrays, a
`Qwen2AudioForConditionalGeneration` turns those arrays into token ids, and a `Qwen2AudioConfig` says which model it is.

One alphabet of dimension letters is used everywhere, in einsums and in shape comments:

    B batch rows    T query tokens   S cache positions   D width   F ffn     V vocabulary
    N query heads   K key/value heads   H head dim       A clips   M mels    L mel frames

A name is imported when it is first used, so that what needs no accelerator does not load JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen2audio_jax._version import __version__

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
    from qwen2audio_jax.audio import AudioError, load_audio
    from qwen2audio_jax.audio_encoder import EncoderOutput, Qwen2AudioEncoder
    from qwen2audio_jax.compat.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
    )
    from qwen2audio_jax.compat.auto_processing import AutoFeatureExtractor, AutoProcessor, AutoTokenizer
    from qwen2audio_jax.compat.pipeline import pipeline
    from qwen2audio_jax.compat.vllm import LLM, SamplingParams
    from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioTextConfig
    from qwen2audio_jax.generation.generation_config import GenerationConfig
    from qwen2audio_jax.generation.outputs import GenerateOutput, ModelOutput
    from qwen2audio_jax.generation.session import Session
    from qwen2audio_jax.generation.streamers import TextIteratorStreamer, TextStreamer
    from qwen2audio_jax.model.qwen2_audio import AudioFeatures
    from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset
    from qwen2audio_jax.parallel.sharding import make_mesh
    from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
    from qwen2audio_jax.processing.output import ProcessorOutput
    from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
    from qwen2audio_jax.processing.tokenizer import Qwen2AudioTokenizer

_PLACES = {
    "AudioError": "audio",
    "AudioFeatures": "model.qwen2_audio",
    "AutoConfig": "compat.auto",
    "AutoFeatureExtractor": "compat.auto_processing",
    "AutoModel": "compat.auto",
    "AutoModelForCausalLM": "compat.auto",
    "AutoModelForImageTextToText": "compat.auto",
    "AutoModelForMultimodalLM": "compat.auto",
    "AutoModelForSeq2SeqLM": "compat.auto",
    "AutoProcessor": "compat.auto_processing",
    "AutoTokenizer": "compat.auto_processing",
    "EncoderOutput": "audio_encoder",
    "GenerateOutput": "generation.outputs",
    "GenerationConfig": "generation.generation_config",
    "LLM": "compat.vllm",
    "ModelOutput": "generation.outputs",
    "ProcessorOutput": "processing.output",
    "Qwen2AudioConfig": "config",
    "Qwen2AudioEncoder": "audio_encoder",
    "Qwen2AudioEncoderConfig": "config",
    "Qwen2AudioFeatureExtractor": "processing.feature_extractor",
    "Qwen2AudioForConditionalGeneration": "api",
    "Qwen2AudioProcessor": "processing.processor",
    "Qwen2AudioTextConfig": "config",
    "Qwen2AudioTokenizer": "processing.tokenizer",
    "SamplingParams": "compat.vllm",
    "Session": "generation.session",
    "TextIteratorStreamer": "generation.streamers",
    "TextStreamer": "generation.streamers",
    "load_audio": "audio",
    "load_mesh_preset": "parallel.mesh_presets",
    "make_mesh": "parallel.sharding",
    "pipeline": "compat.pipeline",
}
_ROOMS = (
    "audio",
    "checkpoint",
    "config",
    "embedded",
    "engine",
    "generation",
    "model",
    "parallel",
    "processing",
    "storage",
)
"""Folders that an `import qwen2audio_jax` alone gives access to."""
_MODEL = "Qwen2AudioForConditionalGeneration is the model, and AutoModel another name of it"
_ENGINE = "qwen2audio_jax.engine.Engine answers many requests at once, and qwen2audio serve over HTTP"
_TRAIN = "qwen2audio train trains"
_INSTEAD = {
    **dict.fromkeys(("AsyncLLM", "AsyncLLMEngine", "LLMEngine"), _ENGINE),
    **dict.fromkeys(("DataCollatorForSeq2Seq", "LoraConfig", "Seq2SeqTrainer", "Seq2SeqTrainingArguments"), _TRAIN),
    **dict.fromkeys(("SFTConfig", "SFTTrainer", "Trainer", "TrainingArguments", "get_peft_model"), _TRAIN),
    **dict.fromkeys(("AsyncEngineArgs", "EngineArgs"), "LLM(...) takes them as arguments"),
    **dict.fromkeys(("Qwen2AudioModel", "Qwen2AudioPreTrainedModel"), _MODEL),
    "WhisperProcessor": "AutoProcessor, or Qwen2AudioProcessor",
    "AutoModelForSpeechSeq2Seq": _MODEL,
    "AutoPeftModelForCausalLM": "from_pretrained(..., adapter=folder) merges an adapter while it loads",
    "BatchFeature": "ProcessorOutput is what the processor returns",
    "BitsAndBytesConfig": "from_pretrained(weights_dtype='int8') quantises weights",
    "LogitsProcessorList": "generate(logits_processor=) takes a function, or a list of them",
    "PeftModel": "from_pretrained(..., adapter=folder) merges an adapter while it loads",
    "Qwen2Tokenizer": "AutoTokenizer, or Qwen2AudioTokenizer",
    "Qwen2TokenizerFast": "AutoTokenizer, or Qwen2AudioTokenizer",
    "StoppingCriteria": "generate(stopping_criteria=) takes a function, or a list of them",
    "StoppingCriteriaList": "generate(stopping_criteria=) takes a function, or a list of them",
    "WhisperFeatureExtractor": "AutoFeatureExtractor, or Qwen2AudioFeatureExtractor",
    "infer_device": "make_mesh() has all devices, and a model without mesh= is on the first",
    "set_seed": "generate(seed=1) makes a draw repeatable",
}
"""Names of transformers that are not here, and what to use instead."""

__all__ = [
    "LLM",
    "AudioError",
    "AudioFeatures",
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoProcessor",
    "AutoTokenizer",
    "EncoderOutput",
    "GenerateOutput",
    "GenerationConfig",
    "ModelOutput",
    "ProcessorOutput",
    "Qwen2AudioConfig",
    "Qwen2AudioEncoder",
    "Qwen2AudioEncoderConfig",
    "Qwen2AudioFeatureExtractor",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2AudioProcessor",
    "Qwen2AudioTextConfig",
    "Qwen2AudioTokenizer",
    "SamplingParams",
    "Session",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
    "load_audio",
    "load_mesh_preset",
    "make_mesh",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(f"qwen2audio_jax.{_PLACES[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"qwen2audio_jax.{name}")
    if name in _INSTEAD:
        # An ImportError, as `from qwen2audio_jax import ...` says nothing of what another error does.
        raise ImportError(f"qwen2audio_jax has no {name}: {_INSTEAD[name]}")
    raise AttributeError(f"module 'qwen2audio_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
