"""Sound of any length decoded in a process of its own, block by block: a decoder that fails there costs one sound.

The process sends bytes and nothing that is unpickled here: samples, or an error's kind and message.
"""

import json
import multiprocessing
import os
import resource
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.stream import stream_audio
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.engine.request import RequestError, as_request_error
from qwen2audio_jax.limits import LIMITS

_SAMPLES, _ERROR, _END = b"s", b"e", b"."


def stream_apart(
    source: Any,
    *,
    seconds: float = LIMITS.prepare_seconds,
    memory: int = LIMITS.worker_bytes,
    **options: Any,
) -> Iterator[np.ndarray]:
    """`stream_audio` in a process of its own, with limits on its time and memory.

    The program's main module must be guarded (`if __name__ == "__main__":`), as the process imports it.

    Args:
        source: as for `stream_audio`; also bucket URLs and pieces of files. It is sent to the process.
        seconds: that a block may take.
        memory: address space of the process in bytes.
        **options: of `stream_audio`.

    Yields:
        As `stream_audio`.

    Raises:
        AudioError: as `stream_audio`.
        RequestError: the process took too long ("time"), or ended ("crash").
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, source, options, memory), daemon=True)
    process.start()
    there.close()
    try:
        yield from _received(here, seconds=seconds, memory=memory)
    finally:
        process.kill()
        process.join()
        here.close()


def _received(pipe: Connection, *, seconds: float, memory: int) -> Iterator[np.ndarray]:
    while True:
        try:
            if not pipe.poll(seconds):
                raise RequestError(
                    f"decoding took longer than {seconds:g} s for a block: the sound is damaged; convert it to WAV",
                    kind="time",
                )
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            raise RequestError(
                f"a decoder ended its process: the sound is damaged, or takes more than {memory / 2**30:g} GiB of "
                "memory; convert it to WAV",
                kind="crash",
            ) from None
        if message[:1] == _END:
            return
        if message[:1] == _ERROR:
            kind, said = json.loads(message[1:])
            raise AudioError(said, kind=kind)
        yield np.frombuffer(message, np.float32, offset=1).copy()


def _send(pipe: Connection, source: Any, options: dict[str, Any], memory: int) -> None:
    """Decode a sound and send it; runs in the process."""
    # What decoders written in C say of damaged files is in no answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for block in stream_audio(open_clip(source), **options):
            pipe.send_bytes(_SAMPLES + np.ascontiguousarray(block, np.float32).tobytes())
        pipe.send_bytes(_END)
    except BrokenPipeError:
        pass  # nobody listens any more
    except Exception as error:  # one sound's fault is its own, whichever library noticed it
        found = as_request_error(error)
        pipe.send_bytes(_ERROR + json.dumps([found.kind, str(found)]).encode())
