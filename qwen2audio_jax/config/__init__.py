"""Configuration: which model it is, read strictly from config.json."""

from qwen2audio_jax.config.encoder import Qwen2AudioEncoderConfig
from qwen2audio_jax.config.qwen2_audio import Qwen2AudioConfig
from qwen2audio_jax.config.text import Qwen2AudioTextConfig

__all__ = ["Qwen2AudioConfig", "Qwen2AudioEncoderConfig", "Qwen2AudioTextConfig"]
