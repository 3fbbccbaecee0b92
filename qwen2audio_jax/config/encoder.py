"""The audio tower's configuration: the `audio_config` section of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qwen2audio_jax.config import strict_json
from qwen2audio_jax.config.frozen import REMEDY, refuses_assignment
from qwen2audio_jax.config.strict_json import Inert

_FIELDS = (
    "num_mel_bins",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "d_model",
    "max_source_positions",
)
# The reference's attribute_map; some releases wrote these names beside the others.
_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
}


@refuses_assignment(REMEDY)
@dataclass(frozen=True, kw_only=True)
class Qwen2AudioEncoderConfig:
    """The audio tower (reference: transformers.Qwen2AudioEncoderConfig).

    Its activation is the exact GELU and its embeddings are not scaled: other values are refused on reading. The
    reference computes a scale for `scale_embedding: true` but never applies it, so such a file is ambiguous.

    Raises:
        ValueError: a size is not a positive integer, or d_model is not divisible by the number of heads.
    """

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    max_source_positions: int = 1500
    """Positions after the stride-2 convolution: 20 ms each."""
    inert: Inert = field(default=(), compare=False, repr=False)
    """Keys of the file that change no output, written back by `to_dict`."""

    activation_function: ClassVar[str] = "gelu"
    scale_embedding: ClassVar[bool] = False
    layer_norm_eps: ClassVar[float] = 1e-5
    """torch.nn.LayerNorm's default, which the reference uses and its configuration cannot change."""

    def __post_init__(self) -> None:
        for name in _FIELDS:
            strict_json.check_positive_int(getattr(self, name), where=f"audio_config.{name}")
        if self.d_model % self.encoder_attention_heads:
            raise ValueError(
                f"audio_config.d_model {self.d_model} is not divisible by audio_config.encoder_attention_heads "
                f"{self.encoder_attention_heads}; each head takes an equal share of the width"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.encoder_attention_heads

    @property
    def max_frames(self) -> int:
        """Log-mel frames (10 ms each) of the longest clip: the second convolution halves them."""
        return 2 * self.max_source_positions

    @property
    def max_tokens(self) -> int:
        """Audio tokens (40 ms each) of the longest clip: pooling halves the positions."""
        return self.max_source_positions // 2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Qwen2AudioEncoderConfig":
        """Read the `audio_config` section of a config.json; absent keys take the published model's values.

        Raises:
            ValueError: a key is unknown, or a value unsupported, of the wrong type or out of range.
        """
        data = dict(data)
        for alias, key in _ALIASES.items():
            strict_json.pop_alias(data, where="audio_config.", alias=alias, key=key)
        values, inert = strict_json.split_inert(
            data,
            where="audio_config.",
            fixed={
                "model_type": ("qwen2_audio_encoder",),
                "activation_function": (cls.activation_function,),
                "scale_embedding": (cls.scale_embedding,),
            },
            inert=("activation_dropout", "attention_dropout", "dropout", "encoder_layerdrop"),
            fields=set(_FIELDS),
        )
        return cls(**values, inert=inert)

    def to_dict(self) -> dict[str, Any]:
        """The `audio_config` section, complete."""
        return {
            "model_type": "qwen2_audio_encoder",
            "activation_function": self.activation_function,
            "scale_embedding": self.scale_embedding,
            **strict_json.inert_values(self.inert),
            **{name: getattr(self, name) for name in _FIELDS},
        }
