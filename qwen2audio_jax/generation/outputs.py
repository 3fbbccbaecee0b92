"""Return values of the model's calls."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from qwen2audio_jax.generation.decoding import Decoding
from qwen2audio_jax.generation.stopping import StopMatcher
from qwen2audio_jax.generation.text_stream import TextStream


@dataclass(frozen=True)
class ModelOutput:
    """The return value of a forward call of the model.

    Attributes:
        logits: [B, T, V] float32, at the input's own positions; 0 where the input is padding.
        loss: [] float32, or None when no labels were given.
    """

    logits: jax.Array
    loss: jax.Array | None


@dataclass(frozen=True)
class GenerateOutput:
    """The return value of `generate(..., return_dict_in_generate=True)`.

    Attributes:
        sequences: [B', T + new] int32: each prompt as given, its new tokens, then padding.
        lengths: [B'] int32, new tokens of each row, its stop token included.
        log_probs: [B', new] float32, of each new token under the model's own distribution (before penalty, temperature
            and filters); 0 after a row's end.
        finish_reasons: for each row "eos", "stop_string" or "length".
    """

    sequences: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    finish_reasons: tuple[str, ...]


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
