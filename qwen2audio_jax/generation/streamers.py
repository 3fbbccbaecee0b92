"""Streamers: objects that `generate(streamer=...)` hands prompts and tokens to, under transformers' names.

`model.stream(...)` is the direct way to the same text.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any

import numpy as np

from qwen2audio_jax.generation.decoding import Step
from qwen2audio_jax.generation.stopping import Tokenizer
from qwen2audio_jax.generation.text_stream import TextStream


class TextStreamer:
    """A streamer that prints the text of one row as it becomes certain.

    Source: `transformers.TextStreamer`, which holds words back until they end; this one holds half characters only.
    """

    def __init__(self, tokenizer: Tokenizer, skip_prompt: bool = False, **decode_options: Any):
        """Start with an empty text.

        Args:
            tokenizer: the processor or its tokenizer.
            skip_prompt: leave the prompt out.
            **decode_options: of `decode`, such as skip_special_tokens.
        """
        self._skip_prompt, self._prompt_is_next = skip_prompt, True
        self._text = TextStream(partial(tokenizer.decode, **decode_options))

    def put(self, value: Any) -> None:
        """Take the prompt [1, T], and then each token [1].

        Raises:
            ValueError: several rows.
        """
        ids = np.asarray(value)
        if ids.ndim > 1 and len(ids) > 1:
            raise ValueError(f"a streamer takes one row, and there are {len(ids)}: call generate once for each prompt")
        prompt, self._prompt_is_next = self._prompt_is_next, False
        if prompt and self._skip_prompt:
            return
        if text := "".join(self._text.push(int(token)) for token in ids.reshape(-1)):
            self.on_finalized_text(text)

    def end(self) -> None:
        """Give out what is still held."""
        self._prompt_is_next = True
        self.on_finalized_text(self._text.finish(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece; subclasses do something else with it."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """A streamer that is iterated over, for its pieces of text, while `generate` runs in another thread.

    Source: `transformers.TextIteratorStreamer`. It also ends where `generate` fails: the error is that thread's.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_prompt: bool = False, timeout: float | None = None, **decode_options: Any
    ):
        """Start with an empty text; `timeout`: seconds to wait for a piece before `queue.Empty` is raised."""
        super().__init__(tokenizer, skip_prompt, **decode_options)
        self._timeout = timeout
        self._pieces: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue a piece."""
        if text:
            self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self._timeout)
        if piece is None:
            raise StopIteration
        return piece


@contextmanager
def ended(streamer: Any) -> Iterator[None]:
    """End a streamer, if there is one, with the block, however that ends: somebody may wait for it."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def fed(steps: Generator[Step, None, None], streamer: Any, *, prompts: np.ndarray) -> Generator[Step, None, None]:
    """The same steps; a streamer, if there is one, is given the prompts [B, T] first, then each step's tokens [B]."""
    if streamer is not None:
        streamer.put(prompts)
    for step in steps:
        if streamer is not None:
            streamer.put(step.tokens)
        yield step
