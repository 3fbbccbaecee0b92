"""Sharding table: the mesh axis of every logical axis of weights, activations and the cache.

A mesh has two axes: `data` splits rows and clips, `model` splits the decoder's heads, ffn and vocabulary. The encoder's
weights are replicated, because its head count (20 in the published model) rarely divides; its clips are split over all
devices instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.parallel.device_order import arrange, slices
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class ShardingRules:
    """Mapping of logical axes to mesh axes; None is replicated."""

    # Activations and cache
    batch: MeshAxes = "data"
    clip: MeshAxes = ("data", "model")
    token: MeshAxes = None
    capacity: MeshAxes = None
    # Decoder, shared by weights, activations and cache
    width: MeshAxes = None
    heads: MeshAxes = "model"
    kv_heads: MeshAxes = "model"
    head_dim: MeshAxes = None
    ffn: MeshAxes = "model"
    vocab: MeshAxes = "model"
    # Encoder and projector
    mels: MeshAxes = None
    window: MeshAxes = None
    position: MeshAxes = None
    audio_width: MeshAxes = None
    audio_heads: MeshAxes = None
    audio_ffn: MeshAxes = None


RULES = ShardingRules()
_NAMES = frozenset(field.name for field in fields(ShardingRules))


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The partition spec of an array whose dimensions are the logical `axes` (None: not split).

    Raises `ValueError` for an unknown logical axis, or when two of them would split over the same mesh axis.
    """
    entries: list[MeshAxes] = []
    taken: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in _NAMES:
            raise ValueError(f"no logical axis {axis!r}; the table has {', '.join(sorted(_NAMES))}")
        entry: MeshAxes = None if axis is None else getattr(RULES, axis)
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            if mesh_axis in taken:
                raise ValueError(f"axes {taken[mesh_axis]!r} and {axis!r} both split over mesh axis {mesh_axis!r}")
            taken[mesh_axis] = str(axis)
        entries.append(entry)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The `NamedSharding` of `partition_spec` on a mesh."""
    return NamedSharding(mesh, partition_spec(*axes))


def fully_sharded(mesh: Mesh, *axes: str | None, shape: tuple[int, ...]) -> NamedSharding:
    """A weight's sharding with its largest unsplit dimension split over `data` too, if one divides.

    Training shards weights, gradients and optimiser state this way (ZeRO-3, arXiv 1910.02054; FSDP): each is gathered
    over `data` where it is used.
    """
    entries = [*partition_spec(*axes)]
    free = [i for i, entry in enumerate(entries) if entry is None and shape[i] % mesh.shape["data"] == 0]
    if free:
        entries[max(free, key=lambda i: shape[i])] = "data"
    return NamedSharding(mesh, PartitionSpec(*entries))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of a traced activation, by its logical axes, on the surrounding `jax.set_mesh`'s mesh.

    Without a mesh this does nothing, so that functions of this package can be traced on their own.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*axes))


def make_mesh(
    *,
    data: int = -1,
    model: int = 1,
    num_slices: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    preset: str | None = None,
) -> Mesh:
    """A mesh with axes `data` and `model` over `devices` (default: all, of all processes).

    Slices are consecutive along `data`, so that a `model` group never communicates over the slow network between them;
    within a slice a group stays in one process where it fits. On TPUs the order follows the chip interconnect,
    elsewhere neighbours in `devices` share a group.

    Args:
        data: replicas of the decoder; -1 takes all devices that `model` leaves.
        model: devices that share one copy of the decoder.
        num_slices: parts connected only by a slow network; default: as the devices report (TPU slices, GPU hosts).
        devices: the devices of the mesh.
        preset: a machine's mesh by name instead of the three sizes; see `load_mesh_preset`.

    Raises:
        ValueError: the two sizes do not multiply to the number of devices, a `model` group does not fit in a slice, or
            there is no such preset; the message names the nearest mesh that works.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    count = len(devices)
    if preset is not None:
        if (data, model, num_slices) != (-1, 1, None):
            raise ValueError(f"preset={preset!r} says data, model and num_slices: leave them out, or the preset")
        known = load_mesh_preset(preset)
        if known.devices != count:
            raise ValueError(
                f"the mesh preset {preset!r} is for {known.devices} devices, but there are {count}: choose data and "
                "model yourself, or pass devices="
            )
        data, model, num_slices = known.data, known.model, known.num_slices
    if model < 1 or (data < 1 and data != -1):
        raise ValueError(f"data={data}, model={model}: mesh sizes are at least 1 (or data=-1 for what is left)")
    if data == -1:
        data = max(count // model, 1)
    parts = slices(devices, num_slices)
    within = len(parts[0])
    if data * model != count:
        raise ValueError(
            f"a mesh of data={data} x model={model} takes {data * model} devices, but there are {count}: the nearest "
            f"that works is {_nearest(model, divides=within, count=count)}, or choose among them with devices="
        )
    if within % model:
        raise ValueError(
            f"model={model}: each of the {len(parts)} slices has {within} devices, and a model group does not cross "
            "the slow network between slices: the nearest mesh that works is "
            f"{_nearest(model, divides=within, count=count)}"
        )
    return Mesh(arrange(parts, model=model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def _nearest(model: int, *, divides: int, count: int) -> str:
    """The mesh of `count` devices whose `model` divides `divides` and is nearest to the requested one."""
    best = min((n for n in range(1, divides + 1) if divides % n == 0), key=lambda n: (abs(n - model), n))
    return f"data={count // best} x model={best}"


def single_device_mesh() -> Mesh:
    """The 1 x 1 mesh on the first local device, the default of models."""
    return make_mesh(data=1, model=1, devices=jax.local_devices()[:1])


def check_mesh(mesh: Mesh, *, config: Qwen2AudioConfig) -> None:
    """Raise a `ValueError` unless the decoder's heads, KV heads and ffn divide by the mesh's `model` axis.

    Vocabulary, rows and clips are padded instead, so they need not divide.
    """
    missing = {"data", "model"} - set(mesh.axis_names)
    if missing:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, but 'data' and 'model' are needed: use make_mesh()")
    text, model = config.text_config, mesh.shape["model"]
    sizes = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
    }
    common = math.gcd(*sizes.values())
    for name, size in sizes.items():
        if size % model:
            works = [n for n in range(1, common + 1) if common % n == 0]
            within = math.gcd(common, mesh.size)
            raise ValueError(
                f"{name}={size} does not divide by the mesh's model={model}; the nearest mesh that works on "
                f"{mesh.size} devices is {_nearest(model, divides=within, count=mesh.size)} (sizes of model "
                f"that divide this one: {', '.join(map(str, works))})"
            )


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
