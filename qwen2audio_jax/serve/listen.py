"""The listener: uvicorn with limits of its own for what it has none."""

import uvicorn
from starlette.applications import Starlette

from qwen2audio_jax.serve.slow_headers import TimedProtocol

GRACE_SECONDS = 30
"""Time that running requests have after a signal to stop."""
KEEP_ALIVE_SECONDS = 30
HEADER_BYTES = 64 << 10


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
