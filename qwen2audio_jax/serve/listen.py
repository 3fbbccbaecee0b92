"""The listener: uvicorn with limits of its own for what it has none."""

import errno
import os
import socket

import uvicorn
from starlette.applications import Starlette

from qwen2audio_jax.serve.slow_headers import TimedProtocol

GRACE_SECONDS = 30
"""Time that running requests have after a signal to stop."""
KEEP_ALIVE_SECONDS = 30
HEADER_BYTES = 64 << 10


def check_free(host: str, port: int) -> None:
    """Raise a ValueError if nothing can listen at an address, which is known before a model is loaded for it."""
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port {port}: ports go from 1 to 65535: name one of those")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except socket.gaierror:
        raise ValueError(f"--host {host}: no such name or address; 0.0.0.0 is every one of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port {port} of {host} is taken by another program: end that one, or name another port, as in "
                f"--port {port + 1 if port < 65_535 else 8000}"
            ) from None
        if error.errno == errno.EACCES:
            raise ValueError(f"--port {port}: ports below 1024 are the administrator's; as in --port 8000") from None
        if error.errno != errno.EAFNOSUPPORT:  # a machine without IPv6, of which localhost has an address too
            reason = os.strerror(error.errno or 0)
            raise ValueError(
                f"--host {host} is no address of this machine ({reason}); 0.0.0.0 is all of them"
            ) from None


def make_listener(app: Starlette, *, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Server:
    """The server of an application; `run()` returns when a signal has come and running requests are answered."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
    )
