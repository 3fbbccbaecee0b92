"""Device order in a mesh: the slow network between slices along `data`, neighbours within a `model` group.

A slice is a set of devices on a fast network: a TPU slice, or the GPUs of one host. Within a slice a group stays in one
process where it fits, so that every process has rows of its own; on TPUs groups follow the chip interconnect.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def slices(devices: Sequence[Any], num_slices: int | None) -> list[list[Any]]:
    """Devices by slice, in order.

    Args:
        devices: jax.Devices, or objects with their `platform`, `process_index` and optionally `slice_index`.
        num_slices: the number of slices; None: as the devices report.

    Raises:
        ValueError: they do not form that many slices of equal size.
    """
    if num_slices is not None and num_slices < 1:
        raise ValueError(f"num_slices={num_slices}: there is at least 1")
    by_slice = _by(devices, lambda device: getattr(device, "slice_index", None) or 0)
    by_process = _by(devices, lambda device: device.process_index)
    count = len(by_slice) if num_slices is None else num_slices
    if count == len(by_slice):
        parts = by_slice
    elif len(by_process) > 1 and len(by_process) % count == 0:
        share = len(by_process) // count
        parts = [list(chain.from_iterable(by_process[i : i + share])) for i in range(0, len(by_process), share)]
    elif len(devices) % count == 0 and len(by_process) == 1:
        share = len(devices) // count
        parts = [list(devices[i : i + share]) for i in range(0, len(devices), share)]
    else:
        raise ValueError(
            f"num_slices={count}: {len(devices)} devices of {len(by_process)} processes and {len(by_slice)} slices do "
            "not fall into so many equal parts; leave it out to take the slices that the devices name"
        )
    if len({len(part) for part in parts}) > 1:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ValueError(f"the slices have {sizes} devices: a mesh takes the same number of each; choose by devices=")
    return parts


def arrange(parts: Sequence[Sequence[Any]], *, model: int) -> np.ndarray:
    """Devices as [data, model]: slices one after the other along `data`; `model` divides the size of a slice."""
    return np.concatenate([_within_slice(part, model) for part in parts])


def _within_slice(devices: Sequence[Any], model: int) -> np.ndarray:
    by_process = _by(devices, lambda device: device.process_index)
    if all(len(own) % model == 0 for own in by_process):
        return np.concatenate([_wired(own, model) for own in by_process])
    return _wired(devices, model)


def _wired(devices: Sequence[Any], model: int) -> np.ndarray:
    shape = (len(devices) // model, model)
    if devices[0].platform == "tpu":
        try:
            return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
        except (ValueError, NotImplementedError, AssertionError):
            pass  # a subset of a larger block, whose interconnect forms no such mesh: any order will do
    order = np.empty(len(devices), object)
    order[:] = list(devices)
    return order.reshape(shape)


def _by(devices: Sequence[Any], key: Callable[[Any], int]) -> list[list[Any]]:
    """Devices grouped by key, groups sorted by key, the original order within each."""
    return [[d for d in devices if key(d) == value] for value in sorted({key(d) for d in devices})]
