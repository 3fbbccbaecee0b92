"""An fsspec file system with an object store's rules and injected failures; helpers around it."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qwen2audio_jax.checkpoint.reader import is_checkpoint
from qwen2audio_jax.convert import inspect
from qwen2audio_jax.source import resolve_checkpoint
from qwen2audio_jax.storage import bucket

BUCKET = "store://bucket"
PARTIAL = r"an unfinished upload|holds neither|no such folder|holds no manifest.json|manifest cannot be read"


class Store(MemoryFileSystem):
    """An object store: objects are written whole or, when told so, not; never again, and never by another's name."""

    protocol = "store"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    fails: dict[int, str] = {}  # noqa: RUF012 the n-th upload -> how
    error: Exception = OSError("connection lost")
    sent: list[str] = []  # noqa: RUF012
    broken: list[str] = []  # noqa: RUF012 rules that were broken
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("store://"))

    def put_file(self, lpath, rpath, **options):
        path = self._strip_protocol(rpath)
        if path in self.store:
            self.broken.append(f"wrote over {path}")
        self.sent.append(path)
        how = self.fails.get(len(self.sent))
        content = Path(lpath).read_bytes()
        if how == "before" or (how in ("half", "short") and not content):  # half of nothing would be all of it
            raise self.error
        self.pipe_file(path, content[: len(content) // 2] if how in ("half", "short") else content)
        if how in ("half", "after"):
            raise self.error

    def cat_file(self, path, start=None, end=None, **options):
        content = self.store[self._strip_protocol(path)].getvalue()[start:end]
        self.asked.append((path, start or 0, len(content)))
        return content

    def mv(self, *args, **options):
        self.broken.append("moved")

    rename = move = cp_file = copy = mv


def cleared(monkeypatch, tmp_path: Path) -> Iterator[type[Store]]:
    """The store, empty and faultless, with a cache folder of the test's own; that no rule was broken is seen after."""
    fsspec.register_implementation("store", Store, clobber=True)
    for kind in (Store, MemoryFileSystem):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    for counted in (Store.fails, Store.sent, Store.broken, Store.asked):
        counted.clear()
    Store.error = OSError("connection lost")
    monkeypatch.setattr(bucket, "RETRY_SECONDS", ())
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    yield Store
    assert Store.broken == []


def put(folder: Path, url: str) -> str:
    fs, path = fsspec.core.url_to_fs(url)
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return url


def objects(url: str = BUCKET) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{path}/"): fs.store[name].getvalue() for name in fs.find(path)}


def staged(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "uploads").iterdir())


def assert_loads_nowhere(url: str) -> None:
    assert not is_checkpoint(url)
    with pytest.raises(ValueError, match=PARTIAL):
        resolve_checkpoint(url)
    with pytest.raises(ValueError, match=PARTIAL):
        inspect(url)
