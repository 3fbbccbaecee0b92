"""What PEFT's adapters hold besides pairs for linear maps: whole weights, pairs for embeddings, vectors of tokens.

`modules_to_save` and saved base layers are weights in the place of the model's own; an embedding that LoRA targets has
a pair [V, r], [r, D]; `trainable_token_indices` are other vectors of single tokens. Source: PEFT's
`get_peft_model_state_dict`, `lora.Embedding` and `TrainableTokensLayer`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_jax.checkpoint.mapping import EMBEDDING, HEAD, Target, canonical_name
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from qwen2audio_jax.config.strict_json import describe

PREFIX = "base_model.model."
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")


@dataclass
class Extras:
    """Tensors of an adapter by the canonical name of the tensor that each changes: their names in the file.

    Attributes:
        whole: weights in the place of the model's own.
        pairs: side -> name, of embeddings.
        tokens: vectors of single tokens.
        full: module names in the model that PEFT adapted.
        problems: what does not fit.
    """

    whole: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def find_extras(names: list[str], targets: Mapping[str, Target], *, tied: bool) -> Extras:
    """The extras among the names of an adapter's tensors.

    Args:
        names: those that are no lora_A or lora_B of a linear map.
        targets: the model's tensors by their canonical names.
        tied: whether the embeddings are the head, too.
    """
    found = Extras()
    for name in names:
        pair, tokens = _EMBEDDING.fullmatch(name), _TOKENS.fullmatch(name)
        match = pair or tokens
        module = match["module"] if match else _WRAPPERS.sub("", name).rpartition(".")[0]
        tensor = canonical_name(f"{module}.weight" if match else _WRAPPERS.sub("", name))
        if tensor not in targets:
            found.problems.append(f"unexpected {name}: the model has no such weight")
        elif match and tensor not in (EMBEDDING, HEAD):
            found.problems.append(f"unexpected {name}: only embeddings and the head have vectors of tokens")
        elif tied and not tokens and tensor == EMBEDDING:
            found.problems.append(
                f"unexpected {name}: this model's head is its embeddings, which the adapter would part: merge it with "
                "PEFT, and load the result"
            )
        else:
            group: dict[str, Any] = found.tokens if tokens else found.whole
            if pair:
                group = found.pairs.setdefault(tensor, {})
            key = pair["side"] if pair else tensor
            if key in group:
                found.problems.append(f"duplicate {name}: the same as {group[key]}")
            group[key] = name
            found.full[tensor] = module.removeprefix(PREFIX)
    return found


def missing_extras(data: Mapping[str, Any], found: Extras) -> Iterator[str]:
    """What adapter_config.json says is there and no tensor is."""
    names = data.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield f"modules_to_save in adapter_config.json is {describe(names)}; it must be a list of modules' names"
        names = []
    for name in names:
        if not any(_names(name, found.full[tensor]) for tensor in found.whole):
            yield f"missing {name}: adapter_config.json has it in modules_to_save"
    if data.get("trainable_token_indices") and not found.tokens:
        yield "missing trainable_tokens_delta: adapter_config.json has trainable_token_indices"
    for tensor, sides in found.pairs.items():
        yield from (f"missing lora_embedding_{side} of {found.full[tensor]}" for side in "AB" if side not in sides)


def token_indices(data: Mapping[str, Any], module: str) -> list[int]:
    """The tokens whose vectors a module's tensor holds; none if the settings name none for it."""
    stated = data.get("trainable_token_indices")
    if isinstance(stated, Mapping):
        stated = next((indices for name, indices in stated.items() if _names(name, module)), None)
    whole = isinstance(stated, list) and all(isinstance(index, int) and index >= 0 for index in stated)
    return list(stated) if whole and stated is not None else []


def misshapen(file: SafetensorsFile, name: str, wanted: tuple[int, ...]) -> Iterator[str]:
    """Problems with a tensor's shape and dtype."""
    entry = file.entries[name]
    if entry.shape != wanted:
        yield f"misshapen {name}: stored {entry.shape}, the model and adapter_config.json need {wanted}"
    if entry.dtype not in DTYPES:
        yield f"{name} is stored as {entry.dtype}; one of {', '.join(DTYPES)} is needed"


def _names(name: str, module: str) -> bool:
    """Whether PEFT's name of a module means this one or one that holds it."""
    return re.search(rf"(^|\.){re.escape(name)}(\.|$)", module) is not None
