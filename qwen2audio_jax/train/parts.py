"""Trainable parts: the parameter tree split into trained and frozen weights, and joined again."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from qwen2audio_jax.train.settings import PARTS

Path = tuple[str, ...]


def part_of(path: Path) -> str | None:
    """The trainable part a weight belongs to; None for the encoder's positions, which the reference freezes."""
    if path[:2] == ("encoder", "embed_positions"):
        return None
    return "head" if path[:2] == ("decoder", "lm_head") else path[0]


def split(tree: Mapping[str, Any], *, parts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) of a tree that is keyed like the parameter tree.

    Raises:
        ValueError: an unknown part, no part, or one that this model has no weights for.
    """
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"train={list(parts)}: name at least one of {', '.join(PARTS)}")
    flat = flatten_dict(dict(tree))
    if missing := set(parts) - {part_of(path) for path in flat}:
        raise ValueError(
            f"train names {', '.join(sorted(missing))}, for which this model has no weights of its own"
            + ("; its head is its embedding table (tie_word_embeddings), part of decoder" if "head" in missing else "")
        )
    trained = {path: leaf for path, leaf in flat.items() if part_of(path) in parts}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Join the two trees that `split` returned."""
    return unflatten_dict({**flatten_dict(dict(frozen)), **flatten_dict(dict(trained))})
