"""The one table of checkpoint names: which stored tensor fills which parameter, and how its axes are laid out.

Names are written in one canonical form; `canonical_name` brings those of every known release to it. The table holds no
sizes: the shape that a stored tensor must have follows from the parameter's own shape and the layout.
"""

import math
import re
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a stored tensor's axes become a parameter's.

    The parameter is the tensor with all axes reversed (`reverse`) or in order, then with `split` (an axis of the
    parameter) and the one after it, heads and head_dim, split apart from the one axis that the reference stores.
    """

    reverse: bool = False
    split: int | None = None

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape of the tensor that fills a parameter of `shape`."""
        if self.split is not None:
            heads = slice(self.split, self.split + 2)
            shape = (*shape[: self.split], math.prod(shape[heads]), *shape[self.split + 2 :])
        return shape[::-1] if self.reverse else shape


LAYOUTS = {
    "same": Layout(),  # vectors, embedding tables
    "linear": Layout(reverse=True),  # [out, in] -> [in, out]
    "conv": Layout(reverse=True),  # [out, in, k] -> [k, in, out]
    "to_heads": Layout(reverse=True, split=1),  # [N * H, D] -> [D, N, H]
    "from_heads": Layout(reverse=True, split=0),  # [D, N * H] -> [N, H, D]
    "heads": Layout(split=0),  # [N * H] -> [N, H]
}

# Canonical tensor name, parameter, layout; {n} is a layer's number.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("audio_tower.conv1.weight", "encoder/conv1/kernel", "conv"),
    ("audio_tower.conv1.bias", "encoder/conv1/bias", "same"),
    ("audio_tower.conv2.weight", "encoder/conv2/kernel", "conv"),
    ("audio_tower.conv2.bias", "encoder/conv2/bias", "same"),
    ("audio_tower.embed_positions.weight", "encoder/embed_positions/embedding", "same"),
    *(
        (f"audio_tower.layers.{{n}}.{tensor}", f"encoder/layers/{{n}}/{parameter}", layout)
        for tensor, parameter, layout in (
            ("self_attn_layer_norm.weight", "self_attn_layer_norm/scale", "same"),
            ("self_attn_layer_norm.bias", "self_attn_layer_norm/bias", "same"),
            ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "to_heads"),
            ("self_attn.q_proj.bias", "self_attn/q_proj/bias", "heads"),
            ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "to_heads"),
            ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "to_heads"),
            ("self_attn.v_proj.bias", "self_attn/v_proj/bias", "heads"),
            ("self_attn.out_proj.weight", "self_attn/out_proj/kernel", "from_heads"),
            ("self_attn.out_proj.bias", "self_attn/out_proj/bias", "same"),
            ("final_layer_norm.weight", "final_layer_norm/scale", "same"),
            ("final_layer_norm.bias", "final_layer_norm/bias", "same"),
            ("fc1.weight", "fc1/kernel", "linear"),
            ("fc1.bias", "fc1/bias", "same"),
            ("fc2.weight", "fc2/kernel", "linear"),
            ("fc2.bias", "fc2/bias", "same"),
        )
    ),
    ("audio_tower.layer_norm.weight", "encoder/layer_norm/scale", "same"),
    ("audio_tower.layer_norm.bias", "encoder/layer_norm/bias", "same"),
    ("multi_modal_projector.linear.weight", "projector/kernel", "linear"),
    ("multi_modal_projector.linear.bias", "projector/bias", "same"),
    ("language_model.embed_tokens.weight", "decoder/embed_tokens/embedding", "same"),
    *(
        (f"language_model.layers.{{n}}.{tensor}", f"decoder/layers/{{n}}/{parameter}", layout)
        for tensor, parameter, layout in (
            ("input_layernorm.weight", "input_layernorm/scale", "same"),
            ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "to_heads"),
            ("self_attn.q_proj.bias", "self_attn/q_proj/bias", "heads"),
            ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "to_heads"),
            ("self_attn.k_proj.bias", "self_attn/k_proj/bias", "heads"),
            ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "to_heads"),
            ("self_attn.v_proj.bias", "self_attn/v_proj/bias", "heads"),
            ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "from_heads"),
            ("post_attention_layernorm.weight", "post_attention_layernorm/scale", "same"),
            ("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "linear"),
            ("mlp.up_proj.weight", "mlp/up_proj/kernel", "linear"),
            ("mlp.down_proj.weight", "mlp/down_proj/kernel", "linear"),
        )
    ),
    ("language_model.norm.weight", "decoder/norm/scale", "same"),
    ("lm_head.weight", "decoder/lm_head/kernel", "linear"),
)

HEAD = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
"""What the head repeats when the configuration ties the two."""

IGNORED = (re.compile(r"language_model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),)
"""Buffers that some releases stored and all of them compute anew."""

# In this order: wrappers' prefixes and the module tree of transformers >= 5.10, then the module tree before it.
_SPELLINGS = (
    (re.compile(r"^(base_model\.|model\.)+"), ""),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


def canonical_name(name: str) -> str:
    """The table's name for a stored tensor's, whichever release wrote it."""
    for spelling, replacement in _SPELLINGS:
        name = spelling.sub(replacement, name)
    return name


@dataclass(frozen=True)
class Target:
    """The parameter that a stored tensor fills."""

    parameter: str
    shape: Shape
    layout: Layout

    @property
    def stored_shape(self) -> Shape:
        """The shape that the tensor must have."""
        return self.layout.stored_shape(self.shape)


def expected_tensors(shapes: dict[str, Shape]) -> dict[str, Target]:
    """The tensors that fill a model's parameters: canonical name -> target.

    Args:
        shapes: every parameter of the model, by its path ("encoder/conv1/bias").

    Raises:
        LookupError: the table has no row for a parameter: it and the model's declarations have come apart.
    """
    rows = {parameter: (tensor, LAYOUTS[layout]) for tensor, parameter, layout in TABLE}
    targets = {}
    for parameter, shape in shapes.items():
        number = re.search(r"/layers/(\d+)/", parameter)
        row = rows.get(re.sub(r"/layers/\d+/", "/layers/{n}/", parameter))
        if row is None:
            raise LookupError(f"convert.mapping.TABLE has no row for the parameter {parameter}")
        tensor, layout = row
        name = tensor if number is None else tensor.replace("{n}", number[1])
        targets[name] = Target(parameter, shape, layout)
    return targets
