"""Memory-bounded parallel processing of tensors, so that reading, computing and writing overlap."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from qwen2audio_jax.checkpoint.ranges import REQUEST_BYTES

MEMORY_GB = 2.0
"""Default bound."""

_BASE_BYTES = 400_000_000
"""Memory of the interpreter with its libraries, before any tensor is read."""

THREADS = max(1, min(4, os.cpu_count() or 1))
"""Number of tensors processed at once."""


class Sized(Protocol):
    """Something whose result takes `nbytes` of memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""


T = TypeVar("T", bound=Sized)
R = TypeVar("R")


def tensor_bytes(memory_gb: float) -> int:
    """The share of a memory bound for tensors in flight; Orbax's copies take the rest.

    Raises:
        ValueError: the bound is not a positive number.
    """
    if isinstance(memory_gb, bool) or not isinstance(memory_gb, (int, float)) or not 0 < memory_gb < math.inf:
        raise ValueError(f"memory_gb is {memory_gb!r}; it must be a number above 0, such as {MEMORY_GB:g}")
    return max(1, (int(memory_gb * 1e9) - _BASE_BYTES) // 2)


def group_bytes(memory_gb: float) -> int:
    """The bytes of one group: one group is filled while another is written.

    Few large groups are best: with each, Orbax merges its metadata of all earlier ones, in time quadratic in their
    number.
    """
    return max(1, tensor_bytes(memory_gb) // 2)


def request_bytes(memory_gb: float) -> int:
    """The bytes of one range request to a bucket: every thread holds as much, besides its results."""
    return max(1 << 18, min(REQUEST_BYTES, tensor_bytes(memory_gb) // (4 * THREADS)))


def stream(
    tasks: Iterable[T],
    make: Callable[[T], R],
    *,
    memory_gb: float,
    held: Callable[[], int] = lambda: 0,
    wait: Callable[[], None] = lambda: None,
    threads: int = THREADS,
) -> Iterator[tuple[T, R]]:
    """Yield every task with its result, in order; several run at once, in threads.

    Args:
        tasks: the tasks.
        make: computes a task's result, in a thread.
        memory_gb: bound on results in progress, or finished and held; one alone may be larger.
        held: bytes of earlier results that the consumer still holds.
        wait: reduces the bytes held.
        threads: number of threads; with one, tasks run in order.
    """
    limit = tensor_bytes(memory_gb)
    pending: deque[tuple[T, Future[R]]] = deque()
    making = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                while making + held() and making + held() + task.nbytes > limit:
                    if pending:
                        done, future = pending.popleft()
                        making -= done.nbytes
                        yield done, _taken(future)
                        del future
                    else:
                        wait()
                making += task.nbytes
                pending.append((task, pool.submit(make, task)))
            while pending:
                done, future = pending.popleft()
                yield done, _taken(future)
                del future
        finally:
            for _, future in pending:
                future.cancel()


def _taken(future: "Future[R]") -> R:
    """Take the result out of a future, which would otherwise keep it alive."""
    result = future.result()
    future._result = None
    return result
