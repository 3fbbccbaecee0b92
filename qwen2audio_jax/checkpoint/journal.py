"""The journal of an unfinished checkpoint: its work, and the groups of parameters that are on disk.

It is an append-only file beside the groups while a checkpoint is written, one line of JSON per group. A line is written
after its group, so a killed writer leaves at most one group without a line, which is written again.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = ".qwen2audio_jax_journal"

_VERSION = 1


class Journal:
    """The journal of `folder`, whose groups are the folders in `groups`; read if it exists."""

    def __init__(self, folder: Path, *, groups: Path):
        self.path = folder / NAME
        self._groups = groups
        self._kept = 0
        self.work: dict[str, Any] | None = None
        """The description of the work; None if there is no journal to resume."""
        self.parameters: dict[str, dict[str, Any]] = {}
        """The manifest entry of every parameter on disk."""
        self.joined = False
        """True once all parameters are in one folder."""
        self._names: set[str] = set()
        if self.path.is_file():
            self._read()

    def begin(self, work: Mapping[str, Any]) -> None:
        """Start a new journal without groups."""
        self.work, self.parameters, self._names = dict(work), {}, set()
        self._kept, self.joined = 0, False
        self._append({"version": _VERSION, "work": self.work})

    def resume(self) -> None:
        """Remove a killed writer's leftovers: groups without a line, and a torn line."""
        os.truncate(self.path, self._kept)
        for entry in self._groups.iterdir() if self._groups.is_dir() else ():
            if entry.name not in self._names:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def groups(self) -> set[str]:
        """The names of the entries currently in the folder of groups."""
        return {entry.name for entry in self._groups.iterdir()} if self._groups.is_dir() else set()

    def add(self, parameters: Mapping[str, dict[str, Any]], *, groups: set[str]) -> None:
        """Record that the folders `groups` hold `parameters`."""
        files = {name: _files(self._groups / name) for name in sorted(groups)}
        self._append({"groups": files, "parameters": dict(parameters)})
        self.parameters |= parameters
        self._names |= groups

    def join(self, folder: Path) -> None:
        """Record that `folder` holds all parameters, and that the groups are no longer needed."""
        self._append({"joined": {folder.name: _files(folder)}})
        self.joined = True

    def _read(self) -> None:
        """Read every line up to the first that is torn or whose files have changed."""
        lines = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                lines.append((json.loads(line), len(line)))
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(lines[-1][0], dict):
                lines.pop()
                break
        if not lines or lines[0][0].get("version") != _VERSION:
            return
        last = lines[-1][0].get("joined", {})
        self.joined = bool(last) and all(_files(self.path.parent / name) == files for name, files in last.items())
        if last and not self.joined:
            lines.pop()
        self.work, self._kept = lines[0][0]["work"], lines[0][1]
        for entry, length in lines[1:]:
            groups = entry.get("groups", {})
            if not self.joined and any(_files(self._groups / name) != files for name, files in groups.items()):
                return
            self.parameters |= entry.get("parameters", {})
            self._names |= groups.keys()
            self._kept += length

    def _append(self, entry: Mapping[str, Any]) -> None:
        with open(self.path, "wb" if self._kept == 0 else "ab") as file:
            line = json.dumps(entry).encode() + b"\n"
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._kept += len(line)


def _files(group: Path) -> dict[str, int]:
    return {
        path.relative_to(group).as_posix(): path.stat().st_size for path in sorted(group.rglob("*")) if path.is_file()
    }
