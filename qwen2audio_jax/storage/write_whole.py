"""Files that appear whole or not at all: written beside their place, flushed to the disk, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(path: Path, *, writer: str = "") -> Iterator[Path]:
    """A temporary path; when the block ends, the file written there is flushed and takes its place at `path`.

    If the block raises, or the file cannot be flushed or renamed, it is removed and an earlier file at `path` stays.

    Args:
        path: where the file belongs.
        writer: a name of its own for each of several processes that may write the same file at a time.
    """
    draft = path.with_name(f".{path.name}{writer}.incomplete")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, *, writer: str = "") -> None:
    """Write a file whole or not at all; an earlier one is replaced. `writer` is that of `draft_of`.

    Raises:
        OSError: the disk fails or is full; an earlier file stays as it was.
    """
    with draft_of(path, writer=writer) as draft:
        draft.write_bytes(content)
