"""Arrays over several processes: each process passes and gets its own rows, and all agree on shapes and options.

On a mesh across processes, `data` is divided into groups: the processes that hold the same positions on it. A group
passes rows of its own, the same ones in each of its processes if a `model` group spans several. A global array has one
group's length times the number of groups; each group's rows are on that group's devices.

With one process all functions are the identity.
"""

import functools
import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.parallel.sharding import named_sharding

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The share of the mesh's `data` axis that belongs to this process.

    Attributes:
        groups: number of groups of processes, each with rows of its own.
        group: index of this process's group, from 0.
        own: this group's positions on the axis, in order; all groups have equally many.
        alone: whether this process has the whole mesh.
    """

    groups: int
    group: int
    own: tuple[int, ...]
    alone: bool


@functools.cache
def share_of(mesh: Mesh) -> Share:
    """The share of this process in a mesh.

    Raises:
        ValueError: it has no device in the mesh, or processes hold overlapping parts of the `data` axis.
    """
    places = tuple(range(mesh.shape["data"]))
    if jax.process_count() == 1:  # also for meshes of topology devices, used only for compilation
        return Share(1, 0, places, True)
    held: dict[int, list[int]] = {}
    for place in places:
        for process in {device.process_index for device in mesh.devices[place]}:
            held.setdefault(process, []).append(place)
    own = held.get(jax.process_index())
    if own is None:
        raise ValueError(
            f"none of the mesh's devices belongs to this process ({jax.process_index()} of {jax.process_count()}): "
            "make the mesh of devices of all processes that use it"
        )
    groups = {tuple(part) for part in held.values()}
    if sum(map(len, groups)) != len(places) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            "the mesh's processes hold unequal or overlapping parts of its data axis: let make_mesh choose the order, "
            "and a size of model that divides the devices of a process, or is a multiple of their number"
        )
    return Share(len(groups), sorted(groups).index(tuple(own)), tuple(own), len(held) == 1)


def data_indices_per_group(mesh: Mesh) -> int:
    """Number of positions on `data` that the rows of one process (or group) are split over."""
    return len(share_of(mesh).own)


def global_rows(mesh: Mesh, index: np.ndarray, *, size: int) -> np.ndarray:
    """Indices of this process's rows in the global array, to which every group contributes `size` rows."""
    own = np.asarray(share_of(mesh).own)
    part = max(size // len(own), 1)
    return own[index // part] * part + index % part


def to_mesh(mesh: Mesh, array: np.ndarray, *axes: str | None) -> jax.Array:
    """Place a host array on the mesh, split by its logical axes; each process passes its own rows.

    The processes' arrays have the same shape, and the first axis is split over `data`.
    """
    sharding, share = named_sharding(mesh, *axes), share_of(mesh)
    if share.alone:
        return jax.device_put(array, sharding)
    size, part = len(array) * share.groups, len(array) // len(share.own)

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(size)
        first = share.own.index(start // part) * part + start % part
        return array[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback((size, *array.shape[1:]), sharding, piece)


def all_to_mesh(mesh: Mesh, arrays: Sequence[tuple[np.ndarray, Sequence[str | None]]]) -> list[jax.Array]:
    """Place host arrays, each with its logical axes, as `to_mesh` does; in one go, which takes less of the host."""
    if share_of(mesh).alone:
        shardings = [named_sharding(mesh, *axes) for _, axes in arrays]
        return list(jax.device_put([array for array, _ in arrays], shardings))
    return [to_mesh(mesh, array, *axes) for array, axes in arrays]


def own_rows(mesh: Mesh, tree: Any) -> Any:
    """The rows of this process, on the host, of arrays split over `data` along their first axis only."""
    if not share_of(mesh).alone:
        return jax.tree.map(_own, tree)
    # As `jax.device_get`, in a third of the host's time.
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        leaf.copy_to_host_async()
    return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])


def _own(array: jax.Array) -> np.ndarray:
    shards = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def own_arrays(mesh: Mesh, tree: T) -> T:
    """The rows of this process of arrays with any sharding, on its first device; the identity for one process."""
    if share_of(mesh).alone:
        return tree
    return jax.tree.map(jnp.asarray, own_rows(mesh, _laid(mesh, "data")(tree)))


def everywhere(mesh: Mesh, flags: jax.Array) -> bool:
    """Reduce a sharded array of bools by logical and; every process gets the same answer."""
    return bool(np.asarray(_laid(mesh, None, jnp.all)(flags).addressable_data(0)))


def _identity(tree: T) -> T:
    return tree


@functools.cache
def _laid(mesh: Mesh, axis: str | None, function: Callable[[Any], Any] = _identity) -> Callable[[Any], Any]:
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(axis) if axis else PartitionSpec()))


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine the shapes of a call's arrays: the maxima over all processes.

    Attributes:
        rows: prompts.
        clips: of all prompts.
        frames: mel frames of the longest clip.
        tokens: of the longest prompt.
        width: of the input, padding included.
        budget: maximum of new tokens.
        draw: a random number, the same in all processes of a group.
    """

    rows: int = 0
    clips: int = 0
    frames: int = 0
    tokens: int = 0
    width: int = 0
    budget: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Prepared:
    """A process's checked inputs, as the other processes need to know them.

    Attributes:
        sizes: its own sizes.
        common: options that must be equal in all processes, as text.
        inputs: arrays that must be equal in all processes of a group.
    """

    sizes: Sizes
    common: str = ""
    inputs: tuple[np.ndarray, ...] = ()


def agree(mesh: Mesh, prepare: Callable[[], tuple[T, Prepared]]) -> tuple[T, Sizes]:
    """Check this process's inputs, and agree with the others on shapes.

    Args:
        mesh: of all participating processes; each of them calls this.
        prepare: does the checks. If it raises in one process, that error is raised there and a ValueError in all
            others, so that none is left waiting.

    Raises:
        ValueError: another process refused its inputs; or the options differ; or processes that share a `model` group
            were given different inputs.
    """
    if share_of(mesh).alone:
        value, prepared = prepare()
        return value, prepared.sizes
    try:
        value, prepared = prepare()
    except BaseException:
        _exchange(mesh, [1] + [0] * (len(fields(Sizes)) + 4))
        raise
    own = replace(prepared.sizes, draw=secrets.randbelow(1 << 31))
    common, inputs = _digest([prepared.common.encode()]), _digest(_bytes(prepared.inputs))
    said = _exchange(mesh, [0, *astuple(own), *common, *inputs])
    refused = sorted(process for process, facts in said.items() if facts[0])
    if refused:
        raise ValueError(f"process {refused[0]} refused its inputs, so none goes on: its own error says why")
    if any(facts[-4:-2] != tuple(common) for facts in said.values()):
        raise ValueError("the processes were given different options: they must be the same in all of them")
    group = [facts for process, facts in said.items() if process in _group(mesh)]
    if any(facts[-2:] != tuple(inputs) for facts in group):
        raise ValueError(
            f"processes {', '.join(map(str, _group(mesh)))} share a model group of the mesh, but were given different "
            "inputs: pass the same rows (and seed) in all of them, or make the mesh with a smaller model"
        )
    largest = [max(facts[1 + i] for facts in said.values()) for i in range(len(fields(Sizes)) - 1)]
    return value, Sizes(*(*largest, group[0][len(fields(Sizes))]))


def hear_all(mesh: Mesh, text: str) -> list[str]:
    """All-gather of a text: those of all processes of the mesh, in order of process id; all of them call this."""
    if share_of(mesh).alone:
        return [text]
    own = text.encode()
    lengths = [facts[0] for facts in _exchange(mesh, [len(own)]).values()]
    said = _exchange(mesh, [*own, *[0] * (_padded_bytes(max(lengths)) - len(own))]).values()
    return [bytes(facts[:length]).decode() for facts, length in zip(said, lengths, strict=True)]


def from_first(data: bytes) -> bytes:
    """Broadcast: the bytes that process 0 gives, in all processes of the run; all of them call this.

    What the others give is not looked at.
    """
    if jax.process_count() == 1:
        return data
    length = int(broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(_padded_bytes(length), np.uint8)
    if jax.process_index() == 0:
        padded[:length] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(padded))[:length].tobytes()


def _padded_bytes(length: int) -> int:
    """The next power of two, from 256 on: every length is another program to compile."""
    return 1 << max(length - 1, 255).bit_length()


def _group(mesh: Mesh) -> list[int]:
    own = share_of(mesh).own
    return sorted({device.process_index for device in mesh.devices[own[0]]})


def _exchange(mesh: Mesh, facts: list[int]) -> dict[int, tuple[int, ...]]:
    """All-gather of integers (uint32): those of every process of the mesh, by process id."""
    row = np.asarray(facts, np.uint32)[None]
    split = NamedSharding(mesh, PartitionSpec(("data", "model")))
    given = jax.make_array_from_callback((mesh.size, len(facts)), split, lambda index: row)
    table = np.asarray(_laid(mesh, None)(given).addressable_data(0)).tolist()
    by_process = {d.process_index: tuple(line) for d, line in zip(mesh.devices.flat, table, strict=True)}
    return dict(sorted(by_process.items()))


def _bytes(arrays: Iterable[np.ndarray]) -> Iterable[bytes]:
    for array in arrays:
        yield f"{array.shape} {array.dtype} ".encode()
        yield np.ascontiguousarray(array).tobytes()


def _digest(parts: Iterable[bytes]) -> list[int]:
    """A 64-bit hash of the contents, as two 32-bit numbers."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return [int(number) for number in np.frombuffer(digest.digest(), np.uint32)]
