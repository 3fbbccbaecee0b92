"""What the tokenizers library finds wrong with a file, as a ValueError."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tokenizer_faults(what: str) -> Iterator[None]:
    """Errors of the library, raised as ValueErrors that begin with `what`.

    It raises nothing more specific than Exception, and where its Rust code panics (as on a merge that the vocabulary
    lacks) not even that: pyo3's PanicException, which cannot be imported, is a BaseException.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from None
