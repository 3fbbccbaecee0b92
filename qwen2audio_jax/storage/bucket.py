"""Bucket folders, named by their URL (`gs://`, `s3://` and other fsspec schemes): range reads, write-once objects.

A `BucketPath` has the methods of `pathlib.Path` that readers of checkpoints use, so that they read either. A folder is
listed once, one request instead of one per file. Transient failures are retried a few times, and errors are raised with
messages of this package. Object stores can neither rename nor append, and nothing here needs it.
"""

import base64
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from qwen2audio_jax.installed import pip_install
from qwen2audio_jax.storage.local_path import check_path

RETRY_SECONDS = (1.0, 4.0, 16.0)
"""Seconds between the attempts of one request."""

PIECE_BYTES = 16 << 20
"""Bytes of one request of `BucketPath.pieces`."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/:]")
_GLUED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_NO_BUCKETS = {
    **dict.fromkeys(("file", "local"), "is a local folder: give its path"),
    **dict.fromkeys(("http", "https"), "is a web address, which has no listing: give a bucket's URL, or a hub id"),
}
_IDENTIFYING = (
    "generation",
    "etag",
    "ETag",
    "md5Hash",
    "content_md5",
    "mtime",
    "last_modified",
    "LastModified",
    "created",
)
"""Fields of file systems' object info that change when the object is rewritten."""

_ONE_AT_A_TIME = RLock()
"""Lock for file systems without an asynchronous core, which are not guaranteed to be thread-safe."""

R = TypeVar("R")


@dataclass(frozen=True)
class Status:
    """The result of `BucketPath.stat`."""

    st_size: int


class BucketPath:
    """A folder or an object at a URL; `/` joins a name to it.

    Raises:
        ValueError: (this and every method) the URL cannot be opened: its scheme is unknown or needs a missing package,
            or the credentials are missing or insufficient.
        FileNotFoundError: (every method that reads) there is no such object.
        OSError: every attempt of a request failed.
    """

    def __init__(self, url: str, *, fs: Any = None, path: str = "", parent: "BucketPath | None" = None):
        self._url = url.rstrip("/")
        self._fs, self._path = _opened(self._url) if fs is None else (fs, path)
        self._parent = parent
        self._listing: dict[str, dict[str, Any]] | None = None

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"BucketPath({self._url!r})"

    def __lt__(self, other: "BucketPath") -> bool:
        return self._url < other._url

    def __truediv__(self, name: str) -> "BucketPath":
        place = self
        for part in name.split("/"):
            place = BucketPath(f"{place._url}/{part}", fs=self._fs, path=f"{place._path}/{part}", parent=place)
        return place

    @property
    def name(self) -> str:
        """The last part."""
        return self._url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's suffix with its dot, as in `pathlib`."""
        return os.path.splitext(self.name)[1]

    def again(self) -> "BucketPath":
        """The same folder without its cached listing."""
        return BucketPath(self._url, fs=self._fs, path=self._path)

    def exists(self) -> bool:
        """Return True if there is an object of this name, or one within it."""
        return self._info() is not None or bool(self._entries())

    def is_file(self) -> bool:
        """Return True if it is an object."""
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        """Return True if there are objects within it."""
        return not self.is_file() and bool(self._entries())

    def iterdir(self) -> Iterator["BucketPath"]:
        """Its direct entries."""
        return (self / name for name in self._entries())

    def stat(self) -> Status:
        """Its length."""
        return Status(self._object()["size"])

    @property
    def stamp(self) -> list[Any] | None:
        """Length and fields that change when the object is rewritten; None if the file system reports no such field."""
        info = self._object()
        told = [f"{key}={info[key]}" for key in _IDENTIFYING if info.get(key) is not None]
        return [info["size"], *told] if told else None

    def read_bytes(self) -> bytes:
        """The whole content; its length is that of `stat`."""
        self._object()
        return self._try("cannot be read", lambda: self._fs.cat_file(self._path))

    def pieces(self, *, most: int) -> Iterator[bytes]:
        """The whole content in pieces, found by its name alone: its folder, which may be vast, is not listed.

        Raises:
            ValueError: it has more than `most` bytes, or changed while it was read.
        """
        info = self._try("cannot be asked for", self._fresh_info)
        if info is None or info.get("type") != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        if info["size"] > most:
            raise ValueError(f"{self}: has {info['size']} bytes, and {most} are read at most: split it")
        for start in range(0, info["size"], PIECE_BYTES):
            piece = memoryview(bytearray(min(PIECE_BYTES, info["size"] - start)))
            self.read_into(piece, start)
            yield bytes(piece)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole content as text."""
        return self.read_bytes().decode(encoding)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on, by one request.

        Raises:
            ValueError: the object is too short.
        """
        end = offset + len(view)
        data = self._try("cannot be read", lambda: self._fs.cat_file(self._path, start=offset, end=end))
        if len(data) != len(view):
            raise ValueError(f"{self}: {len(data)} bytes came for {offset} to {end}; it has changed: copy it again")
        view[:] = data

    def write_once(self, local: Path) -> None:
        """Upload a local file as the object and verify that it arrived.

        Raises:
            ValueError: the object exists already.
            OSError: it did not arrive in any attempt.
        """
        if self._try("cannot be asked for", self._fresh_info) is not None:
            raise ValueError(f"{self}: is there already; choose another folder")
        self._try("cannot be written", lambda: self._put(local))

    def holds(self, local: Path) -> bool:
        """Return True if the object has a local file's length, and its MD5 if the file system reports one."""
        info = self._try("cannot be asked for", self._fresh_info)
        if info is None or info.get("type") != "file" or info["size"] != local.stat().st_size:
            return False
        told = info.get("md5Hash")  # Google's field; other stores' etags are not always an MD5
        if told is None:
            return True
        with open(local, "rb") as file:
            return told == base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()

    def remove(self) -> None:
        """Remove the object."""
        self._try("cannot be removed", lambda: self._fs.rm_file(self._path))

    def objects(self) -> dict[str, int]:
        """All objects within it, listed afresh: relative name -> length."""

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path, detail=True)
            sizes = {self._within(each): info["size"] for each, info in found.items() if info["type"] == "file"}
            return {name: size for name, size in sizes.items() if name and not name.endswith("/")}

        try:
            return self._try("cannot be listed", find)
        except FileNotFoundError:
            return {}

    def check_bucket(self) -> None:
        """Raise a `ValueError` if the bucket does not exist; the folder within it need not exist."""
        bucket = self._path.split("/")[0]
        if bucket and not self._fs.root_marker:
            try:
                self._try("cannot be listed", lambda: self._fs.ls(bucket))
            except FileNotFoundError:
                raise ValueError(f"{self}: there is no bucket {bucket!r}; check its name, or make it") from None

    def _put(self, local: Path) -> None:
        if self._fresh_info() is not None:  # left by the previous attempt: an object is never overwritten
            self._fs.rm_file(self._path)
        self._fs.put_file(str(local), self._path)
        if not self.holds(local):
            raise OSError("it did not arrive as it was sent")

    def _fresh_info(self) -> dict[str, Any] | None:
        self._fs.invalidate_cache()
        try:
            return self._fs.info(self._path)
        except FileNotFoundError:
            return None

    def _object(self) -> dict[str, Any]:
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return info

    def _info(self) -> dict[str, Any] | None:
        return None if self._parent is None else self._parent._entries().get(self.name)

    def _entries(self) -> dict[str, dict[str, Any]]:
        if self._listing is None:

            def ls() -> list[dict[str, Any]]:
                self._fs.invalidate_cache()
                return self._fs.ls(self._path, detail=True)

            try:
                listed = self._try("cannot be listed", ls)
            except FileNotFoundError:
                listed = []
            named = {self._within(info["name"]).rstrip("/"): info for info in listed}
            named.pop("", None)  # the entry itself: an object, or the marker of an empty folder
            self._listing = named
        return self._listing

    def _within(self, path: str) -> str:
        return path.removeprefix(self._path).lstrip("/")

    def _try(self, what: str, request: Callable[[], R]) -> R:
        guard: AbstractContextManager[Any] = nullcontext() if self._fs.async_impl else _ONE_AT_A_TIME
        for wait in (*RETRY_SECONDS, None):
            try:
                with guard:
                    return request()
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", str(self)) from None
            except Exception as error:  # Every file system's library raises its own exceptions.
                reason = _reason(error)
                if _is_refusal(error):
                    raise ValueError(
                        f"{self}: {what}: {reason}; check the URL, and that your credentials are found and allowed to"
                    ) from error
                if wait is None:
                    tries = len(RETRY_SECONDS) + 1
                    raise OSError(f"{self}: {what}, tried {tries} times: {reason}; the same command goes on") from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


Folder = Path | BucketPath
PathOrUrl = str | os.PathLike[str] | BucketPath


def is_url(place: PathOrUrl) -> bool:
    """Return True for a URL, False for a local path or a hub id.

    Raises:
        ValueError: it is a `Path` made from a URL, which has lost one of its slashes.
    """
    if isinstance(place, BucketPath):
        return True
    if not isinstance(place, str):
        if _GLUED.match(os.fspath(place)):
            raise ValueError(f"{os.fspath(place)}: a path, made from a URL it seems; give the URL itself, as a str")
        return False
    return "://" in place


def folder_at(place: PathOrUrl) -> Folder:
    """The folder at a local path, in which ~ is the home folder, or a URL; it need not exist.

    Raises:
        ValueError: see `BucketPath`; a local path that no system takes.
    """
    if isinstance(place, BucketPath):
        return place
    if is_url(place):
        return BucketPath(os.fspath(place))
    check_path(place)
    # A folder of this very name comes first.
    return Path(place if os.path.lexists(place) else os.path.expanduser(place))


def is_there(path: Folder) -> bool:
    """Return True if the path exists, even if only as a dangling link."""
    return path.exists() if isinstance(path, BucketPath) else os.path.lexists(path)


def _opened(url: str) -> tuple[Any, str]:
    scheme = url.partition("://")[0].lower()
    if scheme in _NO_BUCKETS:
        raise ValueError(f"{url}: {_NO_BUCKETS[scheme]}")
    if not _SCHEME.match(url) or "::" in url:
        raise ValueError(f"{url}: is no URL of a bucket; give one such as gs://bucket/folder")
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"{url}: buckets need fsspec: {pip_install('buckets')}") from None
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise ValueError(f"{url}: fsspec knows no scheme {scheme!r}; give a URL such as gs://bucket/folder") from None
    except ImportError as error:
        raise ValueError(f"{url}: {scheme}:// needs a package ({_reason(error)}): {pip_install('buckets')}") from None
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except Exception as error:
        raise ValueError(f"{url}: cannot be opened: {_reason(error)}; check the URL and your credentials") from error
    return fs, path


def _is_refusal(error: Exception) -> bool:
    """Return True for a permanent error, which retrying cannot fix."""
    if isinstance(error, (PermissionError, NotImplementedError, ValueError, TypeError)):
        return True
    code = getattr(error, "code", None) or getattr(error, "status", None)
    words = ("Credential", "Forbidden", "Anonymous caller")
    return code in (401, 403) or any(word in f"{type(error).__name__} {error}" for word in words)


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
