"""Ends of rows that only the host can see: stop strings, the caller's own criteria, and time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen2audio_jax.generation.stopping import StopMatcher


@dataclass
class RowEnds:
    """What ends the rows of one call besides stop ids and the limit of tokens; for one run.

    Attributes:
        matchers: of stop strings, one a row, or none.
        criteria: functions (ids [B, T + n] int32, None) -> bool, or [B] bool: as given and generated so far. They are
            the reference's `StoppingCriteria`, which are called with scores as well.
        prompts: [B, T] ids as given, a row for every answer.
        seconds: after which every row ends, counted from now; None for no such end.
    """

    matchers: list[StopMatcher]
    criteria: Sequence[Callable[..., Any]]
    prompts: np.ndarray
    seconds: float | None
    began: float = field(default_factory=time.monotonic)
    _tokens: list[np.ndarray] = field(default_factory=list)

    def after(self, tokens: np.ndarray, *, running: np.ndarray) -> list[str | None]:
        """Why each row ends with these tokens [B]: "stop_string", "stopping_criteria", "time", or None.

        Raises:
            ValueError: a criterion gives something else than a bool for each row.
        """
        late = self.seconds is not None and time.monotonic() - self.began > self.seconds
        ends: list[str | None] = ["time" if late else None] * len(tokens)
        for row in np.flatnonzero(self._judged(tokens)):
            ends[row] = "stopping_criteria"
        for row in np.flatnonzero(running) if self.matchers else ():
            if self.matchers[row].push(int(tokens[row])):
                ends[row] = "stop_string"
        return ends

    def _judged(self, tokens: np.ndarray) -> np.ndarray:
        """[B] bool: rows that a criterion ends."""
        ended = np.zeros(len(tokens), bool)
        if not self.criteria:
            return ended
        self._tokens.append(tokens)
        ids = np.concatenate([self.prompts, np.stack(self._tokens, axis=1)], axis=1)
        for criterion in self.criteria:
            found = np.asarray(criterion(ids, None))
            if found.dtype != np.bool_ or found.shape not in ((), ended.shape):
                name = getattr(criterion, "__name__", type(criterion).__name__)
                raise ValueError(
                    f"stopping_criteria {name} gives {found.dtype} of shape {list(found.shape)}: return a bool, or one "
                    f"for each of {len(tokens)} rows"
                )
            ended |= found
        return ended
