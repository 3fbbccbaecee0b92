"""The decoder's configuration: the `text_config` section of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qwen2audio_jax.config import strict_json
from qwen2audio_jax.config.frozen import REMEDY, refuses_assignment
from qwen2audio_jax.config.strict_json import Inert, describe

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# The reference's class defaults for a text section, which the published files rely on for hidden_size, layers and
# heads, and override elsewhere. The rotary base applies to files that omit it.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": None,
}
_ROPE_THETA = 10000.0


@refuses_assignment(REMEDY)
@dataclass(frozen=True, kw_only=True)
class Qwen2AudioTextConfig:
    """The decoder (reference: transformers.Qwen2Config with full attention and default rotary positions).

    Query, key and value projections have biases, the others have none; the activation is SiLU.

    Raises:
        ValueError: a size is not a positive integer, the heads are not divisible by the KV heads, head_dim is odd, or a
            token id is outside the vocabulary.
    """

    vocab_size: int = 156032
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 151645
    inert: Inert = field(default=(), compare=False, repr=False)
    """Keys of the file that change no output, written back by `to_dict`."""
    omitted: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Optional keys that the file left out; `to_dict` leaves them out too while their value is the implied one."""

    hidden_act: ClassVar[str] = "silu"

    def __post_init__(self) -> None:
        for name in _SIZES:
            strict_json.check_positive_int(getattr(self, name), where=f"text_config.{name}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config.num_attention_heads {self.num_attention_heads} is not divisible by "
                f"text_config.num_key_value_heads {self.num_key_value_heads} (32 where a file leaves it out); each KV "
                f"head serves an equal group of heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"text_config.head_dim is {self.head_dim}; rotary positions need an even one")
        for name in ("rms_norm_eps", "rope_theta"):
            number = strict_json.positive_float(getattr(self, name), where=f"text_config.{name}")
            object.__setattr__(self, name, number)
        strict_json.check_bool(self.tie_word_embeddings, where="text_config.tie_word_embeddings")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        stops = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, token in (("pad_token_id", self.pad_token_id), *(("eos_token_id", stop) for stop in stops)):
            if token is not None:
                strict_json.check_token_id(token, where=f"text_config.{name}", vocab_size=self.vocab_size)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Qwen2AudioTextConfig":
        """Read the `text_config` section of a config.json; absent keys take transformers.Qwen2Config's defaults.

        Raises:
            ValueError: a key is unknown, or a value unsupported, of the wrong type or out of range.
        """
        where = "text_config."
        data = {**_DEFAULTS, **data}
        if data["num_key_value_heads"] is None:
            data["num_key_value_heads"] = data["num_attention_heads"]
        rope_theta, rope = _read_rope_theta(data, where=where)
        _check_layer_types(data, where=where, layers=data["num_hidden_layers"])
        omitted: tuple[str, ...] = ()
        if data.get("head_dim") is None:
            omitted = ("head_dim",)
            data["head_dim"] = _even_share(data["hidden_size"], data["num_attention_heads"])
        values, inert = strict_json.split_inert(
            data,
            where=where,
            fixed={
                "model_type": ("qwen2",),
                "hidden_act": (cls.hidden_act,),
                "use_sliding_window": (False, None),
                "use_mrope": (False, None),
            },
            inert=("attention_dropout", "max_window_layers", "sliding_window"),
            fields={*_DEFAULTS, "head_dim"},
        )
        return cls(**values, rope_theta=rope_theta, inert=inert + rope, omitted=omitted)

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` section, complete.

        The rotary base is written both in `rope_parameters` and flat: some releases read only one of the two.
        """
        result = {
            "model_type": "qwen2",
            "hidden_act": self.hidden_act,
            **strict_json.inert_values(self.inert),
            **{name: getattr(self, name) for name in _DEFAULTS},
            "rope_theta": self.rope_theta,
        }
        rope = {**(result.get("rope_parameters") or {}), "rope_theta": self.rope_theta, "rope_type": "default"}
        result["rope_parameters"] = rope
        if isinstance(self.eos_token_id, tuple):
            result["eos_token_id"] = list(self.eos_token_id)
        if "head_dim" not in self.omitted or self.head_dim != self.hidden_size // self.num_attention_heads:
            result["head_dim"] = self.head_dim
        return result


def _even_share(hidden_size: object, heads: object) -> int:
    strict_json.check_positive_int(hidden_size, where="text_config.hidden_size")
    strict_json.check_positive_int(heads, where="text_config.num_attention_heads")
    assert isinstance(hidden_size, int)
    assert isinstance(heads, int)
    if hidden_size % heads:
        raise ValueError(
            f"text_config.hidden_size {hidden_size} is not divisible by text_config.num_attention_heads {heads}; "
            f"state text_config.head_dim"
        )
    return hidden_size // heads


def _read_rope_theta(data: dict[str, Any], *, where: str) -> tuple[float, Inert]:
    """Pop every form of the rotary base from a text section.

    Forms: flat `rope_theta`, `rope_parameters` {rope_theta, rope_type}, and a `rope_scaling` that scales nothing.

    Returns:
        The base, and the inert values to be written back beside it.

    Raises:
        ValueError: a rope type other than "default", a parameter of one, or two bases that differ.
    """
    kept = []
    places = {}
    if data.get("rope_theta") is not None:
        places["rope_theta"] = data["rope_theta"]
    data.pop("rope_theta", None)
    for key in ("rope_parameters", "rope_scaling"):
        if key not in data:
            continue
        value = data.pop(key)
        kept.append((key, strict_json.json_text(where + key, value)))
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}{key} is {describe(value)}; it must be a JSON object or null")
        for name, part in value.items():
            if name == "rope_theta":
                places[f"{key}.rope_theta"] = part
            elif name in ("rope_type", "type"):
                if part != "default":
                    raise ValueError(
                        f'{where}{key}.{name} is {describe(part)}; supported: "default". Scaled rotary '
                        f"positions are not implemented; use a checkpoint without them"
                    )
            elif not (name == "partial_rotary_factor" and strict_json.same(part, 1.0)):
                raise ValueError(
                    f"{where}{key}.{name} is {describe(part)}; supported there: rope_theta and a "
                    f'rope_type of "default", which has no other parameter'
                )
    if not places:
        return _ROPE_THETA, tuple(kept)
    (first, theta), *others = places.items()
    for name, other in others:
        if not strict_json.same(theta, other):
            raise ValueError(
                f"{where}{first} is {describe(theta)} but {where}{name} is {describe(other)}; make them the same"
            )
    return theta, tuple(kept)


def _check_layer_types(data: dict[str, Any], *, where: str, layers: object) -> None:
    """Pop `layer_types` from a text section: it must list every layer, each as "full_attention"."""
    value = data.pop("layer_types", None)
    if value is None:
        return
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}layer_types is {describe(value)}; it must be a list of strings or null")
    for index, kind in enumerate(value):
        if kind != "full_attention":
            raise ValueError(f'{where}layer_types[{index}] is {describe(kind)}; supported: "full_attention"')
    if len(value) != layers:
        raise ValueError(
            f"{where}layer_types names {len(value)} layers but {where}num_hidden_layers is "
            f"{describe(layers)}; make them agree, or delete layer_types"
        )
