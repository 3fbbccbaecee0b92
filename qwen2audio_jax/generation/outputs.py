"""Return values of the model's calls."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import jax
import numpy as np

from qwen2audio_jax.generation.call import Call
from qwen2audio_jax.generation.decoding import Progress, Step
from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.torch_style.tensors import tensor_like

Steps = Generator[Step, None, None]
"""The running steps of a call; closing it ends them."""


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
        finish_reasons: for each row "eos", "stop_string", "stopping_criteria", "time" (`max_time`) or "length".
    """

    sequences: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    finish_reasons: tuple[str, ...]


def collect(steps: Steps, call: Call, progress: Progress) -> GenerateOutput:
    """The output of a call whose steps are run to the end.

    Args:
        steps: of the call, not yet started.
        call: says how many rows come out, and what ends them.
        progress: of the steps; rows are stopped in it.
    """
    tokens, log_probs = [], []
    running = np.ones(call.rows, bool)
    lengths, reasons = np.zeros(call.rows, np.int32), ["length"] * call.rows
    with closing(steps):
        for step in steps:
            tokens.append(step.tokens)
            log_probs.append(step.log_probs)
            lengths += running
            ends = call.ends.after(step.tokens, running=running & ~step.finished)
            for row in np.flatnonzero(running):
                if step.finished[row]:
                    reasons[row], running[row] = "eos", False
                elif (end := ends[row]) is not None:
                    reasons[row], running[row] = end, False
                    progress.stop(int(row))
    sequences = np.concatenate([call.ends.prompts.astype(np.int32), np.stack(tokens, axis=1)], axis=1)
    return GenerateOutput(tensor_like(sequences), lengths, np.stack(log_probs, axis=1), tuple(reasons))


class Ending(str):
    """The finish reason of a stream, with the number of its new tokens, a stop token included, as `tokens`."""

    tokens: int

    def __new__(cls, reason: str, *, tokens: int) -> "Ending":
        """Make one; it equals the plain reason."""
        ending = super().__new__(cls, reason)
        ending.tokens = tokens
        return ending


def pieces(steps: Steps, call: Call, progress: Progress, *, text: TextStream) -> Generator[str, None, Ending]:
    """The text of a call's one row as it becomes certain; the generator returns the finish reason."""
    reason, tokens = "length", 0
    with closing(steps):
        for step in steps:
            tokens += 1
            token = int(step.tokens[0])
            if piece := text.push(token):
                yield piece
            [end] = call.ends.after(step.tokens, running=~step.finished)
            if step.finished[0]:
                reason = "eos"
            elif end is not None:
                reason = end
                progress.stop(0)
    if rest := text.finish():
        yield rest
    return Ending(reason, tokens=tokens)
