"""Frozen settings whose refusal of an assignment says what to write instead."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, TypeVar

T = TypeVar("T")

REMEDY = (
    "for another compute dtype pass dtype= to from_pretrained; for another model edit its config.json, or make a "
    "configuration with dataclasses.replace(config, {name}=...)"
)
"""What to do instead of an assignment to a model's configuration."""


def refuses_assignment(remedy: str) -> Callable[[type[T]], type[T]]:
    """A decorator of frozen dataclasses; in the remedy `{name}` stands for the field's name."""

    def refuse(self: Any, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"{name} cannot be assigned: {remedy.format(name=name)}")

    def decorate(cls: type[T]) -> type[T]:
        setattr(cls, "__setattr__", refuse)  # noqa: B010  (a frozen class may not define it itself)
        return cls

    return decorate
