"""Row output of a running decoding: stop strings, collected ids, and streamed text."""

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np

from qwen2audio_jax.generate import Decoding
from qwen2audio_jax.outputs import GenerateOutput
from qwen2audio_jax.stopping import StopMatcher
from qwen2audio_jax.text_stream import TextStream


class Tokenizer(Protocol):
    """The tokenizer interface for stop strings and streaming: a processor, or its tokenizer."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decode ids to text."""
        ...


def stop_matchers(stop_strings: Sequence[str], tokenizer: Tokenizer | None, *, rows: int) -> list[StopMatcher]:
    """One stop string matcher per row; none if there are no stop strings.

    Raises:
        ValueError: stop strings without a tokenizer.
    """
    if not stop_strings:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings needs tokenizer=: pass the processor")
    return [StopMatcher(stop_strings, tokenizer.decode) for _ in range(rows)]


def collect(decoding: Decoding, prompts: np.ndarray, *, matchers: list[StopMatcher]) -> GenerateOutput:
    """Run a decoding to its end.

    Args:
        decoding: not yet started.
        prompts: [B, T] ids as given; each gives as many rows as it has continuations.
        matchers: one per row, or none.
    """
    prompts = np.repeat(prompts, decoding.rows // len(prompts), axis=0)
    tokens, log_probs = [], []
    running = np.ones(len(prompts), bool)
    lengths, reasons = np.zeros(len(prompts), np.int32), ["length"] * len(prompts)
    for step in decoding:
        tokens.append(step.tokens)
        log_probs.append(step.log_probs)
        lengths += running
        for row in np.flatnonzero(running):
            if step.finished[row]:
                reasons[row], running[row] = "eos", False
            elif matchers and matchers[row].push(int(step.tokens[row])):
                reasons[row], running[row] = "stop_string", False
                decoding.stop(int(row))
    sequences = np.concatenate([prompts.astype(np.int32), np.stack(tokens, axis=1)], axis=1)
    return GenerateOutput(sequences, lengths, np.stack(log_probs, axis=1), tuple(reasons))


def pieces(decoding: Decoding, text: TextStream, *, matchers: list[StopMatcher]) -> Generator[str, None, str]:
    """Run a decoding of one row, yielding its text as soon as it is final; returns the finish reason."""
    reason = "length"
    for step in decoding:
        token = int(step.tokens[0])
        if piece := text.push(token):
            yield piece
        if step.finished[0]:
            reason = "eos"
        elif matchers and matchers[0].push(token):
            reason = "stop_string"
            decoding.stop(0)
    if rest := text.finish():
        yield rest
    return reason
