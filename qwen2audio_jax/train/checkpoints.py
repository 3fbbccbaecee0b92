"""Checkpoints of a training run: written in the background, complete or invisible, and read back onto any mesh.

Orbax's `CheckpointManager` writes `<folder>/<step>/` under a temporary name, renames it when it is complete, and
synchronises the processes. This module adds that a run which differs from the one that saved is refused, and that old
checkpoints are removed atomically, so that a process killed while deleting leaves nothing that looks like a checkpoint.
"""

import json
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from filelock import FileLock, Timeout
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_managers import (
    AnySavePolicy,
    FixedIntervalPolicy,
    LatestN,
    PreemptionCheckpointingPolicy,
)

from qwen2audio_jax.checkpoint.writer import quiet

State = TypeVar("State")

STATE = "state"
IDENTITY = "identity"
DISCARDED = "discarded"
"""Subfolder that Orbax renames old checkpoints into; emptied here."""
LOCK = ".lock"
LOCK_SECONDS = 5
"""Seconds that a run that was just killed may take to release the folder."""


class Checkpoints:
    """The checkpoints in one folder; all processes of a run make the same calls.

    Args:
        folder: an exclusive folder; created if missing. Unfinished checkpoints of a killed writer are removed.
        keep: number of newest checkpoints that are kept.
        every: steps between checkpoints; see `due`.

    Raises:
        ValueError: `keep` or `every` is not positive, or another process is training into the folder.
    """

    def __init__(self, folder: str | PathLike[str], *, keep: int, every: int):
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ValueError(f"{name} = {value}, but it must be at least 1")
        self.folder = Path(folder).absolute()
        # Two runs in one folder would remove each other's unfinished checkpoints.
        self._lock = FileLock(self.folder / LOCK)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=LOCK_SECONDS)
            except Timeout:
                raise ValueError(
                    f"{self.folder}: another process is training into it; wait for it to end or choose another output"
                ) from None
        self._clear_discarded()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(n=keep),
            save_decision_policy=AnySavePolicy([FixedIntervalPolicy(every), PreemptionCheckpointingPolicy()]),
            cleanup_tmp_directories=True,
            # Renaming is atomic, deleting is not.
            todelete_subdir=DISCARDED,
            enable_async_checkpointing=True,
        )
        # Registered beforehand, because a new manager cannot describe items that it has not written itself.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        arrays, text = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        handlers.add(STATE, ocp.args.StandardSave, arrays)
        handlers.add(STATE, ocp.args.StandardRestore, arrays)
        handlers.add(IDENTITY, ocp.args.JsonSave, text)
        handlers.add(IDENTITY, ocp.args.JsonRestore, text)
        with quiet():
            self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)

    def due(self, step: int) -> bool:
        """Return True if `step` is to be saved: a multiple of `every`, or the last one before a preemption.

        All processes get the same answer.
        """
        return self._manager.should_save(step)

    def save(self, step: int, state: Any, *, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint in the background.

        The arrays may be donated as soon as this returns. A save in progress is waited for first, and its failure
        raised here.

        Args:
            step: steps done; greater than that of any checkpoint in the folder.
            state: pytree of `jax.Array`s.
            identity: values that must be equal in a run that continues from here; JSON values.

        Raises:
            ValueError: there is a checkpoint of this step.
        """
        self._manager.wait_until_finished()
        self._clear_discarded()
        arguments = ocp.args.Composite(
            **{
                STATE: ocp.args.StandardSave(unflatten_dict(_named(state), sep="/")),
                IDENTITY: ocp.args.JsonSave(_as_json(identity)),
            }
        )
        with quiet():
            self._manager.save(step, args=arguments, force=True)

    def restore(self, state_like: State, *, identity: Mapping[str, Any]) -> tuple[State, int] | None:
        """The state of the newest complete checkpoint, and its step; None if there is none.

        Args:
            state_like: the pytree to fill: `jax.ShapeDtypeStruct`s with the `sharding` to restore into, or arrays,
                whose sharding is taken. The mesh need not be the one that saved.
            identity: as given to `save`.

        Raises:
            ValueError: the checkpoint was saved with another identity or another tree of arrays, or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = self.folder / str(step)
        with quiet():
            try:
                read = self._manager.restore(step, args=ocp.args.Composite(**{IDENTITY: ocp.args.JsonRestore()}))
                stored = self._manager.item_metadata(step)[STATE]
            except (OSError, ValueError, KeyError) as error:
                raise _damaged(where) from error
            _check_identity(where, saved=read[IDENTITY], now=_as_json(identity))
            wanted = {name: _abstract(leaf) for name, leaf in _named(state_like).items()}
            _check_arrays(where, wanted=wanted, stored=_stored(where, stored))
            tree = ocp.args.StandardRestore(unflatten_dict(wanted, sep="/"))
            try:
                read = self._manager.restore(step, args=ocp.args.Composite(**{STATE: tree}))
            except (OSError, ValueError, KeyError) as error:
                raise _damaged(where) from error
        arrays = flatten_dict(read[STATE], sep="/")
        return jax.tree.unflatten(jax.tree.structure(state_like), [arrays[name] for name in wanted]), step

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raise the error of a failed save."""
        self._manager.wait_until_finished()
        self._clear_discarded()

    def close(self) -> None:
        """Wait, and release the folder."""
        try:
            self._manager.close()
            self._clear_discarded()
        finally:
            self._lock.release()

    def _clear_discarded(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DISCARDED, ignore_errors=True)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: names independent of the classes that hold the leaves."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity after a round trip through JSON, in which tuples become lists."""
    return json.loads(json.dumps(dict(identity)))


def _damaged(where: Path) -> ValueError:
    return ValueError(f"{where}: this checkpoint cannot be read; delete it to continue from the one before")


def _check_identity(where: Path, *, saved: dict[str, Any], now: dict[str, Any]) -> None:
    before, after = (flatten_dict(each, keep_empty_nodes=True, sep=".") for each in (saved, now))
    changed = [
        f"{name} was {_show(before, name)} and is now {_show(after, name)}"
        for name in [*before, *(name for name in after if name not in before)]
        if _show(before, name) != _show(after, name)
    ]
    if changed:
        raise ValueError(
            f"{where} was saved by another run: {'; '.join(changed)}; choose another output folder or the same settings"
        )


def _show(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "not set"
    # A flattened dict represents an empty dict by a marker object.
    return json.dumps(values[name], default=lambda _: {})


def _stored(where: Path, metadata: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each stored array, by path."""
    tree = getattr(metadata, "tree", metadata)
    if not isinstance(tree, Mapping):
        raise _damaged(where)
    return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in flatten_dict(dict(tree), sep="/").items()}


def _check_arrays(
    where: Path, *, wanted: dict[str, jax.ShapeDtypeStruct], stored: dict[str, tuple[tuple[int, ...], Any]]
) -> None:
    problems = []
    for name in sorted({*wanted, *stored}):
        if name not in stored:
            problems.append(f"missing {name} {wanted[name].shape}")
        elif name not in wanted:
            problems.append(f"unexpected {name} {stored[name][0]}")
        elif stored[name] != (tuple(wanted[name].shape), wanted[name].dtype):
            shape, dtype = stored[name]
            problems.append(f"{name} is {dtype} {shape} instead of {wanted[name].dtype} {wanted[name].shape}")
    if problems:
        raise ValueError(
            f"{where} holds another state than this run's; choose another output folder:\n  " + "\n  ".join(problems)
        )
