"""Progress display of a training run: a bar on a terminal, a line per minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

import jax
from tqdm import tqdm

LINE_SECONDS = 60.0

Progress = Callable[[int, Mapping[str, float]], None]
"""Called with the steps done and the newest metrics, or none."""


@contextmanager
def training_progress(
    steps: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """A `progress` callback for `train`; on all processes but the first it shows nothing.

    Metrics shown, if available: `loss`, `tokens_per_second`.

    Args:
        steps: of the whole run.
        stream: the output; default: stderr. A terminal gets a bar, anything else a line per minute and one at the end.
        clock: the time in seconds.
    """
    if jax.process_index() != 0:
        yield lambda step, metrics: None
        return
    stream = sys.stderr if stream is None else stream
    shown = _Bar(steps, stream=stream) if stream.isatty() else _Lines(steps, stream=stream, clock=clock)
    try:
        yield shown.show
    finally:
        shown.close()


def _describe(metrics: Mapping[str, float]) -> dict[str, str]:
    words = {}
    if "loss" in metrics:
        words["loss"] = f"{metrics['loss']:.4g}"
    if "tokens_per_second" in metrics:
        words["tokens/s"] = f"{metrics['tokens_per_second']:,.0f}"
    return words


class _Bar:
    def __init__(self, steps: int, *, stream: TextIO):
        self._steps = steps
        self._stream = stream
        self._bar: tqdm | None = None

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._bar is None:
            # The bar starts after the first step, whose compilation would distort the estimate of the time left.
            self._bar = tqdm(total=self._steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True)
        if metrics:
            self._bar.set_postfix(_describe(metrics), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines:
    def __init__(self, steps: int, *, stream: TextIO, clock: Callable[[], float]):
        self._steps = steps
        self._stream = stream
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._written = 0.0
        self._words: dict[str, str] = {}

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        self._words = _describe(metrics) or self._words
        if self._first is None:
            self._first = (step, now)
        elif now - self._written < LINE_SECONDS and step < self._steps:
            return
        self._written = now
        words = [f"step {step}/{self._steps}", *(f"{name} {text}" for name, text in self._words.items())]
        done, seconds = step - self._first[0], now - self._first[1]
        if done and seconds > 0:
            left = timedelta(seconds=round((self._steps - step) * seconds / done))
            words += [f"{done / seconds:.3g} steps/s", f"{left} left"]
        print(", ".join(words), file=self._stream, flush=True)

    def close(self) -> None:
        pass
