"""Qwen2-Audio in JAX and Flax: speech, sound and music in, text out, on TPUs, GPUs and CPUs.

The three nouns to know: a `Qwen2AudioProcessor` turns text and sound into arrays, a
`Qwen2AudioForConditionalGeneration` turns those arrays into token ids, and a `Qwen2AudioConfig` says which model it is.

One alphabet of dimension letters is used everywhere, in einsums and in shape comments:

    B batch rows    T query tokens   S cache positions   D width   F ffn     V vocabulary
    N query heads   K key/value heads   H head dim       A clips   M mels    L mel frames
"""

from qwen2audio_jax._version import __version__
from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio_encoder import EncoderOutput, Qwen2AudioEncoder
from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioTextConfig
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.outputs import GenerateOutput, ModelOutput
from qwen2audio_jax.generation.session import Session
from qwen2audio_jax.model.qwen2_audio import AudioFeatures
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset
from qwen2audio_jax.parallel.sharding import make_mesh
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.output import ProcessorOutput
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.processing.tokenizer import Qwen2AudioTokenizer

__all__ = [
    "AudioError",
    "AudioFeatures",
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
    "Session",
    "__version__",
    "load_audio",
    "load_mesh_preset",
    "make_mesh",
]
