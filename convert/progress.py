"""A progress bar on stderr for `convert`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .to_orbax import Progress


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """What `convert` takes as `progress`: draws a bar of bytes on stderr."""
    with tqdm(desc=label, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
