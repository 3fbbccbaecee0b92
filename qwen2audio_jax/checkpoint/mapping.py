"""Name mapping between stored tensors and parameters, with the order of axes.

Names are written in one canonical form; `canonical_name` converts those of every known release to it. The table has no
sizes: the shape of a stored tensor follows from the parameter's own shape and the transform.
"""

import re
from dataclasses import dataclass

Shape = tuple[int, ...]


# Canonical tensor name, parameter, transform; {n} is a layer's index.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("audio_tower.conv1.weight", "encoder/conv1/kernel", "reversed"),
    ("audio_tower.conv1.bias", "encoder/conv1/bias", "same"),
    ("audio_tower.conv2.weight", "encoder/conv2/kernel", "reversed"),
    ("audio_tower.conv2.bias", "encoder/conv2/bias", "same"),
    ("audio_tower.embed_positions.weight", "encoder/embed_positions/embedding", "same"),
    *(
        (f"audio_tower.layers.{{n}}.{tensor}", f"encoder/layers/{{n}}/{parameter}", transform)
        for tensor, parameter, transform in (
            ("self_attn_layer_norm.weight", "self_attn_layer_norm/scale", "same"),
            ("self_attn_layer_norm.bias", "self_attn_layer_norm/bias", "same"),
            ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "reversed"),
            ("self_attn.q_proj.bias", "self_attn/q_proj/bias", "same"),
            ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "reversed"),
            ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "reversed"),
            ("self_attn.v_proj.bias", "self_attn/v_proj/bias", "same"),
            ("self_attn.out_proj.weight", "self_attn/out_proj/kernel", "reversed"),
            ("self_attn.out_proj.bias", "self_attn/out_proj/bias", "same"),
            ("final_layer_norm.weight", "final_layer_norm/scale", "same"),
            ("final_layer_norm.bias", "final_layer_norm/bias", "same"),
            ("fc1.weight", "fc1/kernel", "reversed"),
            ("fc1.bias", "fc1/bias", "same"),
            ("fc2.weight", "fc2/kernel", "reversed"),
            ("fc2.bias", "fc2/bias", "same"),
        )
    ),
    ("audio_tower.layer_norm.weight", "encoder/layer_norm/scale", "same"),
    ("audio_tower.layer_norm.bias", "encoder/layer_norm/bias", "same"),
    ("multi_modal_projector.linear.weight", "projector/kernel", "reversed"),
    ("multi_modal_projector.linear.bias", "projector/bias", "same"),
    ("language_model.embed_tokens.weight", "decoder/embed_tokens/embedding", "same"),
    *(
        (f"language_model.layers.{{n}}.{tensor}", f"decoder/layers/{{n}}/{parameter}", transform)
        for tensor, parameter, transform in (
            ("input_layernorm.weight", "input_layernorm/scale", "same"),
            ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "reversed"),
            ("self_attn.q_proj.bias", "self_attn/q_proj/bias", "same"),
            ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "reversed"),
            ("self_attn.k_proj.bias", "self_attn/k_proj/bias", "same"),
            ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "reversed"),
            ("self_attn.v_proj.bias", "self_attn/v_proj/bias", "same"),
            ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "reversed"),
            ("post_attention_layernorm.weight", "post_attention_layernorm/scale", "same"),
            ("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "reversed"),
            ("mlp.up_proj.weight", "mlp/up_proj/kernel", "reversed"),
            ("mlp.down_proj.weight", "mlp/down_proj/kernel", "reversed"),
        )
    ),
    ("language_model.norm.weight", "decoder/norm/scale", "same"),
    ("lm_head.weight", "decoder/lm_head/kernel", "reversed"),
)

HEAD = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
"""The tensor that the head repeats if the configuration ties the two."""

IGNORED = (re.compile(r"language_model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),)
"""Buffers that some releases stored and all of them recompute."""

# In this order: wrappers' prefixes and the module tree of transformers >= 5.10, then the module tree before it.
_SPELLINGS = (
    (re.compile(r"^(base_model\.|model\.)+"), ""),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


def canonical_name(name: str) -> str:
    """The canonical name of a stored tensor, whichever release wrote it."""
    for spelling, replacement in _SPELLINGS:
        name = spelling.sub(replacement, name)
    return name


@dataclass(frozen=True)
class Target:
    """The parameter that a stored tensor fills."""

    parameter: str
    shape: Shape
    transform: str

    @property
    def stored_shape(self) -> Shape:
        """The required shape of the tensor."""
        return self.shape[::-1] if self.transform == "reversed" else self.shape


def expected_tensors(shapes: dict[str, Shape]) -> dict[str, Target]:
    """The tensors that fill a model's parameters: canonical name -> target.

    Args:
        shapes: every parameter of the model, by its path ("encoder/conv1/bias").

    Raises:
        LookupError: the table has no row for a parameter: it is out of step with the model's declarations.
    """
    rows = {parameter: (tensor, transform) for tensor, parameter, transform in TABLE}
    targets = {}
    for parameter, shape in shapes.items():
        number = re.search(r"/layers/(\d+)/", parameter)
        row = rows.get(re.sub(r"/layers/\d+/", "/layers/{n}/", parameter))
        if row is None:
            raise LookupError(f"convert.mapping.TABLE has no row for the parameter {parameter}")
        tensor, transform = row
        name = tensor if number is None else tensor.replace("{n}", number[1])
        targets[name] = Target(parameter, shape, transform)
    return targets


NAMINGS = ("hub", "current")
"""Naming schemes for export: the published weights', or that of the modules in transformers >= 5.10."""


def released_name(canonical: str, *, naming: str) -> str:
    """A release's name for a tensor of the table: the inverse of `canonical_name`."""
    if naming == "current":
        return canonical if canonical == HEAD else f"model.{canonical}"
    if canonical == HEAD:
        return f"language_model.{canonical}"
    return re.sub(r"^language_model\.", "language_model.model.", canonical)
