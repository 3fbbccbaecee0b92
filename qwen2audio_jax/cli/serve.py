"""`qwen2audio serve`: OpenAI's protocol over HTTP, on an engine."""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from qwen2audio_jax.cli.from_options import join, load_model, tell_model
from qwen2audio_jax.cli.options import DEFAULT_MODEL
from qwen2audio_jax.cli.output import say
from qwen2audio_jax.engine import Engine
from qwen2audio_jax.installed import pip_install
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import resolve_processor_files

TOKENS = 1024
"""Of the prompts that are compiled for, unless it is said: a clip of 30 s, and words."""
DEMONSTRATION_TOKENS = 384
"""The same for the model that comes with the package: its clips have 12 s."""


def serve(options: argparse.Namespace) -> None:
    """Serve until a signal comes.

    Raises:
        ValueError: an option cannot be used, or the extra is missing.
    """
    try:
        from qwen2audio_jax.serve.app import LOOPBACK, Readiness, Settings, make_app
        from qwen2audio_jax.serve.listen import check_free, make_listener
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: {pip_install('serve')}") from None
    local = options.host in ("127.0.0.1", "::1", "localhost")
    keys = _keys(options.api_key_file)
    if not local and not keys and not options.no_auth:
        raise ValueError(
            f"--host {options.host} is reached from other machines: give --api-key-file FILE, or say --no-auth"
        )
    check_free(options.host, options.port)
    processor = Qwen2AudioProcessor.from_pretrained(resolve_processor_files(options.model, revision=options.revision))
    name = options.name or ("qwen2audio-embedded" if options.model == DEFAULT_MODEL else Path(options.model).name)
    join(options)
    model = load_model(options)
    tell_model(options)
    engine = Engine(
        model,
        processor,
        slots=options.slots,
        positions=options.positions,
        queue=options.queue,
        workers=options.workers,
        truncation=options.truncation,
        allow_private_urls=options.allow_private_urls,
    )
    readiness = Readiness()
    settings = Settings(
        name,
        keys=keys,
        hosts=LOOPBACK if local else (),
        origins=tuple(options.allow_origin),
        body_bytes=options.max_body << 20,
        kind=options.kind,
    )
    app = make_app(engine, processor, settings, readiness)

    default = DEMONSTRATION_TOKENS if options.model == DEFAULT_MODEL else TOKENS
    tokens = min(default, engine.positions) if options.warmup is None else options.warmup

    def warm() -> None:
        try:
            if tokens:
                engine.warmup(tokens=tokens, on_progress=readiness.progress)
            readiness.ready = True
            if not options.quiet:
                address = f"http://{options.host}:{options.port}"
                say(f"ready: {name}; a page to talk to it at {address}/, OpenAI's protocol at {address}/v1")
        except Exception as error:  # said by /health too
            readiness.error = error
            say(f"warm-up failed: {error}")

    warming = threading.Thread(target=warm, daemon=True)
    warming.start()
    server = make_listener(app, host=options.host, port=options.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises the one that ended it again, and the engine is to close
    try:
        server.run()
    finally:
        engine.close()
    leave(warming, code=0 if server.started else 1)


def leave(warming: threading.Thread, *, code: int) -> None:
    """End the command; at once while programs are compiled, which an interpreter that is torn down would crash in."""
    if warming.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _keys(path: str | None) -> tuple[str, ...]:
    """The API keys in a file, one a line."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path}: cannot be read ({error})") from None
    if not keys:
        raise ValueError(f"--api-key-file {path}: holds no key; write one a line")
    return keys
