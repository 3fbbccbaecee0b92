"""A server on a free port of this machine, in a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen2audio_jax.serve.listen import make_listener


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an application that is served meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_listener(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
