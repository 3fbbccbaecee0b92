"""Clients of a server of OpenAI's protocol, and the server's process, for the benchmarks beside this file."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RATE = 16_000


@dataclass(frozen=True)
class Heard:
    """What a client got: text, seconds to the first piece and to the end."""

    text: str
    first: float
    total: float


@contextmanager
def serving(command: Sequence[str], *, health: str = "/health", seconds: float = 600) -> Iterator[tuple[str, int]]:
    """A server's address and process id; `command` is a Python program's, and gets `--port N`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)], env=environment)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not begin: {' '.join(command)}")
            try:
                if httpx.get(url + health).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def part_of(sound: bytes) -> dict[str, Any]:
    """A part of a message that holds a WAV file."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}


def noise(seed: int, seconds: float) -> bytes:
    """A WAV file of noise, another for every seed."""
    samples = np.random.default_rng(seed).normal(0, 3000, int(seconds * RATE)).clip(-32768, 32767).astype("<i2")
    with io.BytesIO() as file:
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(RATE)
            writer.writeframes(samples.tobytes())
        return file.getvalue()


def ask(client: httpx.Client, url: str, content: list[dict[str, Any]], **options: Any) -> Heard:
    """One streamed greedy answer.

    Raises:
        httpx.HTTPError, ValueError: there is none, or it is not whole.
    """
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True, **options}
    began, first, text, whole = time.perf_counter(), 0.0, "", False
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                whole = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    text += piece
    if not whole:
        raise ValueError("the stream ended before the answer did")
    return Heard(text, first, time.perf_counter() - began)


def whole(url: str, content: list[dict[str, Any]], **options: Any) -> str:
    """The text of one greedy answer that comes as a whole.

    Raises:
        httpx.HTTPError: there is none.
    """
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=3600)
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]
