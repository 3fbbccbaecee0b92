"""Checkpoint writer: saves parameters group by group, so that an interrupted writer can resume.

While it is written a folder holds a locked marker, the journal, and Orbax's partial saves, one folder per group. All
groups are joined in a copy made of links, which can be made again after an interruption, and the manifest is written
last: see `checkpoint`. The converter and training write through `new_checkpoint`.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from qwen2audio_jax.checkpoint import journal
from qwen2audio_jax.checkpoint.journal import Journal
from qwen2audio_jax.checkpoint.manifest import describe, totals
from qwen2audio_jax.checkpoint.reader import FORMAT, MANIFEST, MARKER, PARAMS, VERSION
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.storage.write_whole import draft_of

GROUP_BYTES = 256 << 20
"""Bytes of parameters passed to Orbax at once, unless one alone is larger."""
CHUNK_BYTES = 32 << 20
"""Largest stored chunk: a device of another mesh reads whole chunks for its shard of a parameter."""
CHUNKS = 8
"""Target number of chunks of smaller parameters, each of at least a MiB. Halving the largest axis each time makes
[1024, 2048] of [4096, 4096], which two hosts can share along either axis."""

Path_ = str | os.PathLike[str]

_PARTIAL = ".partial_save"  # what Orbax appends to the name of a folder that it saves in parts
_JOINED = "joined"

Work = Mapping[str, Any]
Finished = Mapping[str, Mapping[str, Any]]


class CheckpointWriter:
    """Takes a new checkpoint's parameters; see `new_checkpoint`."""

    def __init__(self, folder: Path, journal: Journal, *, group_bytes: int):
        self.folder = folder
        """The folder for settings files, directly beside `params/`."""
        self.source: dict[str, Any] = {}
        """The source of the parameters: recorded in the manifest."""
        self.finished: Finished = dict(journal.parameters)
        """Manifest entries of parameters that an earlier attempt stored; they are not added again."""
        self._journal = journal
        self._group_bytes = group_bytes
        self._group: dict[str, Any] = {}
        self._saving: tuple[Any, dict[str, Any]] | None = None
        self._parameters: dict[str, dict[str, Any]] = dict(journal.parameters)
        self._context = ocp.Context()
        # Weights hardly compress. A copy of the written arrays would double the memory: `add` takes ownership instead.
        self._context.array_options.saving.use_compression = False
        self._context.array_options.saving.scoped_storage_options_creator = _storage
        self._context.memory_options.deepcopy_host_arrays = False

    @property
    def held_bytes(self) -> int:
        """Bytes of arrays that were added and are not on disk yet."""
        groups = (self._group, self._saving[1] if self._saving else {})
        return sum(array.nbytes for group in groups for array in group.values())

    def add(
        self,
        name: str,
        array: np.ndarray | jax.Array,
        *,
        origin: Mapping[str, Any] | None = None,
        sha256: str | None = None,
        note: object = None,
    ) -> None:
        """Store the parameter at path `name` ("encoder/conv1/bias"). The array must not change afterwards.

        Args:
            name: its path.
            array: its values.
            origin: the manifest's record of its source tensor.
            sha256: of its bytes in C order, if the caller knows it.
            note: a JSON value that is kept as "note" in `finished` when the work is resumed, and dropped at the end.
        """
        if name in self._parameters:
            raise ValueError(f"parameter {name} was added twice")
        self._parameters[name] = describe(array, sha256=sha256)
        if origin is not None:
            self._parameters[name]["origin"] = dict(origin)
        if note is not None:
            self._parameters[name]["note"] = note
        if self._group and array.nbytes + sum(each.nbytes for each in self._group.values()) > self._group_bytes:
            self._begin_saving()
        self._group[name] = array

    def wait(self) -> None:
        """Wait until less memory is held: save the group in flight, else the one being collected."""
        if self._saving is None:
            self._begin_saving()
        self._end_saving()

    def _begin_saving(self) -> None:
        self._end_saving()
        if self._group:
            self._before = self._journal.groups()
            tree = unflatten_dict(self._group, sep="/")
            with self._context, quiet(), self._orbax():
                self._saving = (ocp.partial.save_async(self.folder / PARAMS, tree), self._group)
            self._group = {}

    def _end_saving(self) -> None:
        if self._saving is not None:
            response, group = self._saving
            with quiet(), self._orbax():
                response.result()
            self._saving = None
            new = self._journal.groups() - self._before
            self._journal.add({name: self._parameters[name] for name in group}, groups=new)

    def abandon(self) -> None:
        """Wait for a save in flight, successful or not, so that nothing writes to the folder any more."""
        if self._saving is not None:
            try:
                self._end_saving()
            except Exception:
                self._saving = None

    @contextmanager
    def _orbax(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # A full disk surfaces as one of several tensorstore errors.
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise OSError(f"{self.folder}: cannot be written: {reason}") from error

    def finish(self) -> None:
        """Write pending parameters, then the manifest: from then on the folder is a checkpoint."""
        if not self._parameters:
            raise ValueError(f"{self.folder}: a checkpoint needs at least one parameter")
        from qwen2audio_jax._version import __version__  # the package's own module imports this one

        if not self._journal.joined:
            self._begin_saving()
            self._end_saving()
            self._join()
        stored = sorted(path for path in (self.folder / PARAMS).rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"qwen2audio_jax {__version__}",
            "source": self.source,
            "totals": totals(self._parameters),
            "parameters": {
                name: {key: value for key, value in record.items() if key != "note"}
                for name, record in self._parameters.items()
            },
            "files": {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in stored},
        }
        with draft_of(self.folder / MANIFEST) as draft:
            with open(draft, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
            # Files that only an unfinished checkpoint needs are removed first: a finished one never holds them.
            _remove(self.folder / f"{PARAMS}{_PARTIAL}")

    def _join(self) -> None:
        """Make one checkpoint of the groups.

        Orbax moves and merges their files, and cannot resume after an interruption: it works on a copy made of links.
        """
        groups = self.folder / f"{PARAMS}{_PARTIAL}"
        if _has_links(self.folder):
            shutil.copytree(groups, self.folder / f"{_JOINED}{_PARTIAL}", copy_function=_link)
        else:  # an interruption within the next second costs the work
            self._journal.path.unlink()
            os.replace(groups, self.folder / f"{_JOINED}{_PARTIAL}")
        with self._context, quiet(), self._orbax():
            ocp.partial.finalize(self.folder / _JOINED)
        os.replace(self.folder / _JOINED, self.folder / PARAMS)
        if self._journal.path.exists():
            self._journal.join(self.folder / PARAMS)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Orbax's warnings on stderr: what goes wrong is reported as one error of this package."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _storage(_: Any, array: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    chunk = min(max(array.nbytes // CHUNKS, 1 << 20), CHUNK_BYTES)
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=chunk)


def _has_links(folder: Path) -> bool:
    probe = folder / f"{_JOINED}.link"
    try:
        os.link(folder / journal.NAME, probe)
    except OSError:
        return False
    probe.unlink()
    return True


def _link(source: str, target: str) -> None:
    if Path(source).parent.name == "d":  # the values; files that are merged into one must not be shared
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@contextmanager
def new_checkpoint(
    path: Path_,
    *,
    work: Work | None = None,
    accept: Callable[[Finished], None] | None = None,
    group_bytes: int | None = None,
) -> Iterator[CheckpointWriter]:
    """Write a checkpoint folder: it is complete when the block ends.

    When the block raises a `ValueError`, or any error while `work` is None, the folder is removed. Other errors (a full
    disk, an interruption) leave the finished groups, as a kill does, and the same `work` resumes from there.

    Args:
        path: a folder that does not exist, is empty, or holds an unfinished checkpoint.
        work: a description of the work, as JSON values: an unfinished checkpoint of the same work is resumed. None: it
            cannot be resumed, and an unfinished checkpoint of any work is cleared.
        accept: called with the finished entries; may raise a `ValueError` to refuse to resume, which changes nothing.
        group_bytes: parameters stored at once; default: `GROUP_BYTES`.

    Raises:
        ValueError: the folder holds something else, or other work, or another process is writing it.
        OSError: the disk is full or fails.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"{os.fspath(path)}: only local folders can be written; write to one and copy it there")
    folder = Path(path).absolute()
    check_destination(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / MARKER)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another process is writing this checkpoint; wait for it to end") from None
    try:
        try:
            check_destination(folder)  # Another process may have finished between the first check and the lock.
        except ValueError:
            (folder / MARKER).unlink()
            raise
        records = _open_journal(folder, work=work, accept=accept)
        try:
            writer = CheckpointWriter(folder, records, group_bytes=GROUP_BYTES if group_bytes is None else group_bytes)
            try:
                yield writer
                writer.finish()
            except BaseException:
                writer.abandon()
                raise
        except BaseException as error:
            if isinstance(error, ValueError) or work is None or not records.parameters:
                _clear(folder)
                (folder / MARKER).unlink(missing_ok=True)
                if created:
                    folder.rmdir()
            raise
        (folder / MARKER).unlink()
        records.path.unlink(missing_ok=True)  # last: with it, the same command still recognises its own work
    finally:
        lock.release()


def _open_journal(folder: Path, *, work: Work | None, accept: Callable[[Finished], None] | None) -> Journal:
    """The journal of an unfinished checkpoint of the same work, cleaned up, or a new one in a cleared folder."""
    groups = folder / f"{PARAMS}{_PARTIAL}"
    records = Journal(folder, groups=groups)
    if work is None or not records.parameters:
        _clear(folder)
        records.begin({} if work is None else work)
        return records
    theirs = records.work or {}
    differing = [key for key in {**theirs, **work} if theirs.get(key) != work.get(key)]
    if differing:
        what = ", ".join(f"{key} {theirs.get(key)!r} instead of {work.get(key)!r}" for key in differing)
        raise ValueError(
            f"{folder}: holds an unfinished checkpoint with {what}; finish it as it was begun, remove the folder, or "
            "choose another"
        )
    if accept is not None:
        accept(records.parameters)
    _clear(folder, keep={journal.NAME, PARAMS if records.joined else groups.name})
    records.resume()
    return records


def was_just_finished(path: Path_, *, work: Work) -> bool:
    """Return True, after clearing its leftovers, if a writer of the same work was killed after its manifest."""
    folder = Path(path).absolute()
    if not (folder / MANIFEST).exists() or not (folder / journal.NAME).exists():
        return False
    with suppress(Timeout), FileLock(folder / MARKER).acquire(timeout=0):
        same = Journal(folder, groups=folder / f"{PARAMS}{_PARTIAL}").work == work
        (folder / MARKER).unlink()
        (folder / journal.NAME).unlink()
        return same
    return False


def unfinished_bytes(path: Path_) -> int:
    """Disk usage in bytes of an unfinished checkpoint at `path`; 0 if there is none."""
    folder = Path(path)
    if not (folder / MARKER).exists():
        return 0
    return sum(file.stat().st_size for file in (folder / f"{PARAMS}{_PARTIAL}").rglob("*") if file.is_file())


def check_destination(path: Path_) -> None:
    """Raise a `ValueError` unless a new checkpoint may be written to `path`."""
    folder = Path(path)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder that does not exist yet")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder}: already holds a checkpoint; remove it or choose another folder")
    if not (folder / MARKER).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and not an unfinished checkpoint; choose another folder")


def _clear(folder: Path, *, keep: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for entry in folder.iterdir():
        if entry.name != MARKER and entry.name not in keep:
            _remove(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def save_params(path: Path_, params: Mapping[str, Any], *, config: Qwen2AudioConfig | None = None) -> None:
    """Write an in-memory tree as a checkpoint, with `config.json` beside it when `config` is given.

    Args:
        path: see `new_checkpoint`.
        params: nested dict of arrays with the model's own (unpadded) shapes.
        config: the configuration of the parameters.

    Raises:
        ValueError: see `new_checkpoint`.
    """
    with new_checkpoint(path) as writer:
        for name, array in flatten_dict(dict(params), sep="/").items():
            writer.add(name, array)
        if config is not None:
            config.save_pretrained(writer.folder)
