"""Frozen settings whose refusal of an assignment says what to write instead."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any, TypeVar

T = TypeVar("T")

REMEDY = (
    "for another compute dtype pass dtype= to from_pretrained; for another model edit its config.json, or make a "
    "configuration with dataclasses.replace(config, {name}=...)"
)
"""What to do instead of an assignment to a model's configuration."""


_DEFAULT = "make it a default with model.generation_config = model.generation_config.updated({name}=...)"
OTHERS = {
    "_attn_implementation": "pass attention= to from_pretrained",
    "attn_implementation": "pass attention= to from_pretrained",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _DEFAULT),
    "torch_dtype": "pass dtype= to from_pretrained",
    "use_cache": "there is always one, and nothing has to be turned off for training",
    "output_attentions": "they are not computed",
    "output_hidden_states": "they are not computed",
}
"""What to do instead of assignments that users of transformers write to a configuration."""


def refuses_assignment(remedy: str) -> Callable[[type[T]], type[T]]:
    """A decorator of frozen dataclasses; in the remedy `{name}` stands for the field's name."""

    def refuse(self: Any, name: str, value: Any) -> None:
        said = remedy
        if remedy == REMEDY and (name in OTHERS or name not in {field.name for field in fields(self)}):
            said = OTHERS.get(name, "this configuration has no such field")
        raise FrozenInstanceError(f"{name} cannot be assigned: {said.format(name=name)}")

    def decorate(cls: type[T]) -> type[T]:
        setattr(cls, "__setattr__", refuse)  # noqa: B010  (a frozen class may not define it itself)
        return cls

    return decorate
