"""Programs that compile for TPUs, each in a process of its own: libtpu allows one at a time."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600
"""Seconds that a test waits for a libtpu which another process holds."""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed (x86 Linux)"
)


def report(*arguments: str, timeout: float = 900) -> Any:
    """The last line that Python with these arguments prints, as JSON; waits for another process that holds libtpu."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    waited_until = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        held = "libtpu is held by another process" in done.stderr
        assert held, done.stderr[-3000:]
        assert time.monotonic() < waited_until, done.stderr[-3000:]
        time.sleep(5)
