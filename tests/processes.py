"""Several Python processes that run together, as tests start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from xla_flags import quick_flags

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(*, devices: int = 1, **changed: str) -> dict[str, str]:
    """Of a process with so many fake devices of its own."""
    places = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(devices=devices), "PYTHONPATH": places}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    return {**cache, **os.environ, **own, **changed}


def start(*command: object, **changed: object) -> subprocess.Popen:
    """Python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(**changed),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: Sequence[subprocess.Popen], *, timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none of them is left running."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
