"""The application: the addresses of OpenAI's protocol and of the page, on one engine."""

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from qwen2audio_jax.engine import Answer, Engine, EngineFull
from qwen2audio_jax.engine import Request as EngineRequest
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.serve.answers import completion
from qwen2audio_jax.serve.door import LOOPBACK, Door, Settings, check_type
from qwen2audio_jax.serve.errors import ApiError
from qwen2audio_jax.serve.events import Events, chat_events
from qwen2audio_jax.serve.long_sound import formatted, transcribe_upload, windows_of
from qwen2audio_jax.serve.metrics import Metrics
from qwen2audio_jax.serve.page import page_routes
from qwen2audio_jax.serve.protocol import check_model, read_chat, read_json
from qwen2audio_jax.serve.transcription import Transcription, read_transcription, transcript
from qwen2audio_jax.serve.waiting import Waiting, unless_gone
from qwen2audio_jax.tasks.kind import kind_by

__all__ = ["LOOPBACK", "Readiness", "Settings", "make_app"]


class Readiness:
    """Whether the engine has been warmed up, and how far it is."""

    def __init__(self) -> None:
        self.done, self.total, self.ready = 0, 0, False
        self.error: Exception | None = None

    def progress(self, done: int, total: int, seconds: float, name: str) -> None:
        """Take what `Engine.warmup` tells."""
        self.done, self.total = done, total

    @property
    def status(self) -> str:
        """State of the warm-up: "compiling", "rehearsing" (each program runs once) or "ready"."""
        if self.ready:
            return "ready"
        return "rehearsing" if 0 < self.total == self.done else "compiling"


def make_app(engine: Engine, processor: Qwen2AudioProcessor, settings: Settings, readiness: Readiness) -> Starlette:
    """The application of one engine."""
    server = _Server(engine, processor, settings, readiness)
    routes = [
        *(
            Route(path, server.door.guarded(path, route), methods=[method])
            for method, path, route in (
                ("POST", "/v1/chat/completions", server.chat),
                ("POST", "/v1/audio/transcriptions", server.transcriptions),
                ("POST", "/v1/audio/translations", server.translations),
                ("GET", "/v1/models", server.models),
                ("GET", "/v1/models/{name:path}", server.models),
                ("GET", "/metrics", server.metrics_page),
            )
        ),
        Route("/health", server.health, methods=["GET"]),
        Route("/health/live", server.live, methods=["GET"]),
        Route("/health/ready", server.health, methods=["GET"]),
        *page_routes(server.door),
    ]
    handlers: Any = {404: server.no_route, 405: server.no_route, Exception: server.failure}
    opened = [
        Middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    ]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=opened if settings.origins else [])


class _Server:
    def __init__(self, engine: Engine, processor: Qwen2AudioProcessor, settings: Settings, readiness: Readiness):
        self.engine, self.processor, self.settings, self.readiness = engine, processor, settings, readiness
        self.metrics = Metrics(engine)
        stops = engine.model.generation_config.eos_token_id
        self.kind = settings.kind or kind_by(processor, engine.model.config, stops, source=settings.model)
        self.door = Door(settings, self.metrics)

    async def no_route(self, request: Request, error: Any) -> Response:
        """Unknown addresses and methods."""
        status = error.status_code
        said = "there is no such address here" if status == 404 else "this address takes another method"
        return self.door.refusal(ApiError(status, said))

    async def failure(self, request: Request, error: Exception) -> Response:
        """What nobody foresaw: its traceback goes to the log, and nothing of it to the client."""
        return self.door.refusal(ApiError(500, "the server failed; its log says more"))

    # OpenAI's protocol

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        check_type(request, "application/json")
        model = self.settings.model
        asked = read_chat(read_json(await self.door.body(request)), model=model, kind=self.kind)
        deadline = self._deadline()
        waiting = self._submit(asked.requests, deadline=deadline)
        if not asked.stream:
            answers = await self._answers(request, waiting)
            return JSONResponse(completion(answers, asked, model=model, processor=self.processor))
        try:  # what cannot be answered gets a status of its own
            await unless_gone(request, waiting[0].started())
        except BaseException:
            for each in waiting:
                each.cancel()
            raise
        events = chat_events(asked, waiting, model=model, processor=self.processor, metrics=self.metrics)
        return Events(events, deadline=deadline)

    async def transcriptions(self, request: Request) -> Response:
        """POST /v1/audio/transcriptions."""
        return await self._transcribe(request, translate=False)

    async def translations(self, request: Request) -> Response:
        """POST /v1/audio/translations, into English."""
        return await self._transcribe(request, translate=True)

    async def _transcribe(self, request: Request, *, translate: bool) -> Response:
        fields, sound = await self.door.upload(request)
        asked = read_transcription(fields, sound, model=self.settings.model, kind=self.kind, translate=translate)
        deadline = self._deadline()
        whole = None if asked.retry else await self._whole(request, asked, deadline=deadline)
        if whole is None:
            self._check_ready()
            work = transcribe_upload(self.engine, sound, windows_of(asked), deadline=deadline)
            content, media = formatted(await unless_gone(request, work), asked.form)
        else:
            content, media = transcript(whole, asked)
        if isinstance(content, str):
            return PlainTextResponse(content, media_type=media)
        return JSONResponse(content)

    async def _whole(self, request: Request, asked: Transcription, *, deadline: float) -> Answer | None:
        """The answer to a clip; None for sound that is longer than one."""
        try:
            [answer] = await self._answers(request, self._submit([asked.request], deadline=deadline))
        except ApiError as error:
            if error.code != "too_long":
                raise
            return None
        return answer

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        name = request.path_params.get("name")
        if name is not None:
            check_model(name, model=self.settings.model)
        model = {
            "id": self.settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "qwen2audio_jax",
            "max_model_len": self.engine.positions,
            "max_audio_seconds": LIMITS.clip_seconds,
        }
        return JSONResponse(model if name is not None else {"object": "list", "data": [model]})

    # For those who watch it

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def live(self, request: Request) -> Response:
        """GET /health/live: the process answers."""
        return JSONResponse({"status": "live"})

    async def health(self, request: Request) -> Response:
        """GET /health: whether requests are answered without a wait for the compiler."""
        known = self.readiness
        facts: dict[str, Any] = {"shapes_compiled": known.done, "shapes": known.total}
        if self.engine.failure is not None or known.error is not None:
            return JSONResponse({"status": "failed", **facts}, 500)
        return JSONResponse({"status": known.status, **facts}, 200 if known.ready else 503)

    # The engine

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.settings.answer_seconds

    def _check_ready(self) -> None:
        known = self.readiness
        if not known.ready:
            raise ApiError(503, f"not ready, {known.status}: {known.done} of {known.total} shapes are compiled")

    def _submit(self, requests: list[EngineRequest], *, deadline: float) -> list[Waiting]:
        self._check_ready()
        submitted: list[Waiting] = []
        try:
            for request in requests:
                waiting = Waiting(deadline=deadline, metrics=self.metrics)
                waiting.handle = self.engine.submit(request, block=False, on_change=waiting.changed)
                submitted.append(waiting)
        except EngineFull as error:
            for waiting in submitted:
                waiting.cancel()
            raise ApiError(429, str(error)) from None
        except RuntimeError:
            raise ApiError(503, "the server is closing, or its device has failed") from None
        return submitted

    @staticmethod
    async def _answers(request: Request, waiting: list[Waiting]) -> list[Answer]:
        """The answers; a client that leaves, or a time that is over, ends them."""

        async def every() -> list[Answer]:
            return [await each.answer() for each in waiting]

        try:
            return await unless_gone(request, every())
        finally:
            for each in waiting:
                each.cancel()
