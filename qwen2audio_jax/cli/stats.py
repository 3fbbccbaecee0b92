"""Figures of one answer for --stats: seconds of loading and compiling, to the first token, and speed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COMPILE = "/jax/core/compile/backend_compile_duration"
"""JAX's event at the end of each compilation, or of its retrieval from the compilation cache."""


class Stats:
    """Times as a command goes along.

    Attributes:
        seconds: stage ("load", "answer") -> its seconds.
        first_token: seconds from the start of the answer to its first token; None before.
        programs: programs compiled, or taken from the compilation cache.
        compile_seconds: what that took, as part of the stages.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.first_token: float | None = None
        self.programs, self.compile_seconds = 0, 0.0
        self._began, self._prompts_are_known = 0.0, False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, and what is compiled in it."""
        import jax.monitoring

        self._began = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._count)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(self._count)
            self.seconds[name] = time.perf_counter() - self._began

    def _count(self, event: str, duration_secs: float, **more: Any) -> None:
        if event == COMPILE:
            self.programs += 1
            self.compile_seconds += duration_secs

    def put(self, ids: Any) -> None:
        """Note what `generate(streamer=...)` hands over: the prompts, and then the tokens of each step."""
        if self._prompts_are_known:
            self.token()
        self._prompts_are_known = True

    def end(self) -> None:
        """Take the end of the answer, as a streamer does."""

    def token(self) -> None:
        """Note that a token is there."""
        if self.first_token is None:
            self.first_token = time.perf_counter() - self._began

    def figures(self, *, tokens: int, audio_seconds: float) -> dict[str, Any]:
        """All figures by name, for JSON.

        Args:
            tokens: new tokens of all answers together.
            audio_seconds: of the clips together.
        """
        answer = self.seconds["answer"]
        first = answer if self.first_token is None else self.first_token
        after = answer - first
        return {
            **({"load_seconds": round(self.seconds["load"], 3)} if "load" in self.seconds else {}),
            "programs": self.programs,
            "compile_seconds": round(self.compile_seconds, 3),
            "first_token_seconds": None if self.first_token is None else round(first, 3),
            "tokens_per_second": round((tokens - 1) / after, 2) if tokens > 1 and after > 0 else None,
            "answer_seconds": round(answer, 3),
            "audio_seconds": round(audio_seconds, 3),
            "times_real_time": round(audio_seconds / answer, 2) if audio_seconds else None,
        }


def in_words(figures: dict[str, Any]) -> str:
    """The figures in a line."""
    parts = [f"loaded in {figures['load_seconds']:g} s"] if "load_seconds" in figures else []
    if figures["programs"]:
        parts.append(
            f"{figures['programs']} programs compiled or fetched in {figures['compile_seconds']:g} s of it all"
        )
    if figures["first_token_seconds"] is not None:
        parts.append(f"first token after {figures['first_token_seconds']:g} s")
    if figures["tokens_per_second"] is not None:
        parts.append(f"then {figures['tokens_per_second']:g} tokens/s")
    if figures["times_real_time"] is not None:
        parts.append(
            f"{figures['audio_seconds']:g} s of sound in {figures['answer_seconds']:g} s: "
            f"{figures['times_real_time']:g} times real time"
        )
    return "; ".join(parts)
