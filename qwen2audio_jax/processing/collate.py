"""Outputs of several calls put together into one batch, as collate functions of training loops ask for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROWS = ("input_ids", "attention_mask")
CLIPS = ("input_features", "feature_attention_mask")
MASKS = {"attention_mask": "feature_attention_mask"}
"""The reference's extractor has another name of the mask than its processor."""


def gathered(given: Any, *, known: Sequence[str], needed: str) -> dict[str, list[Any]]:
    """What several outputs hold, by name: one value of each output.

    Args:
        given: a sequence of mappings, or one mapping of sequences.
        known: names that there may be.
        needed: the name that must be among them.

    Raises:
        ValueError: none of these, another name, or outputs of different names.
    """
    parts = [given] if isinstance(given, Mapping) else list(given)
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        found = type(parts[0]).__name__ if parts else "nothing"
        raise ValueError(f"outputs of earlier calls are put together, mappings with {needed}; found {found}")
    names = list(parts[0])
    for part in parts:
        if set(part) != set(names):
            raise ValueError(f"some have {', '.join(names)} and some {', '.join(part)}: give the same names in each")
    if needed not in names:
        raise ValueError(f"{needed} is missing; found {', '.join(names) or 'nothing'}")
    if other := next((name for name in names if name not in known), None):
        raise ValueError(f"{other} is not padded here, only {', '.join(known)}: take it out, and pad it yourself")
    if isinstance(given, Mapping):
        return {name: list(values) for name, values in given.items()}
    return {name: [part[name] for part in parts] for name in names}


def rows_of(columns: Mapping[str, list[Any]]) -> list[np.ndarray]:
    """Token ids [T_i] of every row, without what pads them.

    Args:
        columns: input_ids and perhaps attention_mask, each a list of [T] or [B, T]; or the ids of one row.

    Raises:
        ValueError: ids that are none, or masks of another shape.
    """
    ids = [np.asarray(value) for value in columns["input_ids"]]
    if ids and all(each.ndim == 0 for each in ids):
        ids = [np.stack(ids)]
        columns = {name: [values] for name, values in columns.items()}
    if not ids or any(each.ndim not in (1, 2) or each.dtype.kind not in "iu" for each in ids):
        raise ValueError("input_ids must be whole numbers [T] or [B, T], of at least one row")
    masks = [np.asarray(value) for value in columns.get("attention_mask", [])] or [np.ones_like(each) for each in ids]
    rows = []
    for each, mask in zip(ids, masks, strict=True):
        if mask.shape != each.shape:
            raise ValueError(f"attention_mask {list(mask.shape)} does not fit input_ids {list(each.shape)}")
        kept = zip(np.atleast_2d(each), np.atleast_2d(mask), strict=True)
        rows += [row[valid.astype(bool)].astype(np.int32) for row, valid in kept]
    return rows


def clips_of(columns: Mapping[str, list[Any]], *, mels: int, frames: int) -> dict[str, np.ndarray]:
    """Features [A, M, L] float32, and their masks [A, L] int32 where there are any, of all clips.

    Args:
        columns: input_features, a list of [M, L] or [A, M, L], and perhaps a mask of each.
        mels: M.
        frames: L.

    Raises:
        ValueError: another shape, such as that of samples.
    """
    found = {}
    shapes = {"input_features": (mels, frames), "feature_attention_mask": (frames,)}
    for name, values in columns.items():
        shape = shapes[MASKS.get(name, name)]
        arrays = [np.asarray(value) for value in values]
        for array in arrays:
            if array.shape not in (shape, (len(array), *shape)):
                raise ValueError(
                    f"{name} {list(array.shape)} is not {list(shape)}, as a call of the extractor gives it: pass "
                    "samples to the call itself, which pads every clip to the longest there may be"
                )
        whole = np.concatenate([array.reshape(-1, *shape) for array in arrays])
        found[MASKS.get(name, name)] = whole.astype(np.float32 if name == "input_features" else np.int32)
    counts = {len(array) for array in found.values()}
    if len(counts) > 1:
        raise ValueError(f"there are {' and '.join(map(str, sorted(counts)))} clips and masks: give one of each")
    return found
