"""The application: routes of OpenAI's protocol, their limits, and what keeps strangers out."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from qwen2audio_jax.engine import Answer, Engine, EngineFull, Handle, RequestError
from qwen2audio_jax.engine import Request as EngineRequest
from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.serve.answers import REASONS, Trimmer, completion, new_id, token_logprobs, transcript, usage
from qwen2audio_jax.serve.errors import STATUS, ApiError, bad
from qwen2audio_jax.serve.metrics import Metrics
from qwen2audio_jax.serve.protocol import Chat, check_model, read_chat, read_json, read_transcription

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    Attributes:
        model: the name that it goes by.
        keys: of which a client must have one; empty: none is needed.
        hosts: names under which the server is addressed, without port; empty: any.
        body_bytes: the largest body.
        body_seconds: time for a body to arrive.
        answer_seconds: time for an answer, from its arrival on.
    """

    model: str
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK
    body_bytes: int = 64 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 600.0


class Readiness:
    """Whether the engine has been warmed up, and how far it is."""

    def __init__(self) -> None:
        self.done, self.total, self.ready = 0, 0, False
        self.error: Exception | None = None

    def progress(self, done: int, total: int, seconds: float, name: str) -> None:
        """Take what `Engine.warmup` tells."""
        self.done, self.total = done, total


def make_app(engine: Engine, processor: Qwen2AudioProcessor, settings: Settings, readiness: Readiness) -> Starlette:
    """The application of one engine."""
    server = _Server(engine, processor, settings, readiness)
    routes = [
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
        Route("/v1/audio/transcriptions", server.guarded(server.transcriptions), methods=["POST"]),
        Route("/v1/audio/translations", server.guarded(server.translations), methods=["POST"]),
        Route("/v1/models", server.guarded(server.models), methods=["GET"]),
        Route("/v1/models/{name:path}", server.guarded(server.models), methods=["GET"]),
        Route("/metrics", server.guarded(server.metrics_page), methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/health/live", server.live, methods=["GET"]),
        Route("/health/ready", server.health, methods=["GET"]),
    ]
    handlers: Any = {404: server.no_route, 405: server.no_route, Exception: server.failure}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Server:
    def __init__(self, engine: Engine, processor: Qwen2AudioProcessor, settings: Settings, readiness: Readiness):
        self.engine, self.processor, self.settings, self.readiness = engine, processor, settings, readiness
        self.metrics = Metrics(engine)

    # Around every route

    def guarded(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A route whose errors are OpenAI's, for those who may use it."""

        async def run(request: Request) -> Response:
            name = request.url.path
            try:
                self._admit(request)
                response = await route(request)
            except ApiError as error:
                self.metrics.count(name, error.status)
                headers = {"Retry-After": "1"} if error.status in (429, 503) else None
                if error.status in (408, 413):
                    headers = {"Connection": "close"}
                return JSONResponse(error.body(), error.status, headers=headers)
            except ClientDisconnect:
                self.metrics.count(name, 499)
                return Response(status_code=499)
            self.metrics.count(name, response.status_code)
            return response

        return run

    def _admit(self, request: Request) -> None:
        """Keep out strangers: other sites' pages in a browser, and clients without a key."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.settings.hosts and name.lower() not in self.settings.hosts:
            raise ApiError(403, "the server is not known under this Host; start it with --host")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests of other sites' pages are not answered")
        if self.settings.keys:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            good = [hmac.compare_digest(given.encode(), key.encode()) for key in self.settings.keys]
            if scheme.lower() != "bearer" or not any(good):
                raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits of size and time."""
        most = self.settings.body_bytes
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > most:
            raise ApiError(413, f"the body has {stated} bytes; the limit is {most}")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise ApiError(413, f"the body has more than {most} bytes")
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.settings.body_seconds:g} s") from None
        return b"".join(parts)

    async def no_route(self, request: Request, error: Any) -> Response:
        """Unknown addresses and methods."""
        status = error.status_code
        said = "there is no such address here" if status == 404 else "this address takes another method"
        return JSONResponse(ApiError(status, said).body(), status)

    async def failure(self, request: Request, error: Exception) -> Response:
        """What nobody foresaw: its kind goes to the log, and nothing of it to the client."""
        return JSONResponse(ApiError(500, "the server failed; its log says more").body(), 500)

    # Routes

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check_type(request, "application/json")
        asked = read_chat(read_json(await self._body(request)), model=self.settings.model)
        handles = await self._submit(asked.requests)
        if asked.stream:
            error = await handles[0].started()  # what cannot be answered gets a status of its own
            if error is not None:
                for handle in handles:
                    handle.cancel()
                raise error
            return StreamingResponse(self._events(asked, handles), media_type="text/event-stream")
        answers = await self._await(request, handles)
        return JSONResponse(
            completion(
                answers,
                model=self.settings.model,
                stops=asked.stops,
                logprobs=asked.logprobs,
                processor=self.processor,
            )
        )

    async def transcriptions(self, request: Request) -> Response:
        """POST /v1/audio/transcriptions."""
        return await self._transcribe(request, translate=False)

    async def translations(self, request: Request) -> Response:
        """POST /v1/audio/translations, into English."""
        return await self._transcribe(request, translate=True)

    async def _transcribe(self, request: Request, *, translate: bool) -> Response:
        self._check_type(request, "multipart/form-data")
        body = await self._body(request)

        async def replay() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        fields, sound = {}, None
        try:
            async with Request(request.scope, replay).form(max_files=1, max_fields=20) as form:
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        if name != "file":
                            raise bad(f"the sound belongs into the field 'file', not {name[:40]!r}", param="file")
                        sound = await value.read()
                    else:
                        fields[name] = value
        except ApiError:
            raise
        except Exception as error:  # of the parser
            raise bad(f"the form cannot be read ({type(error).__name__})") from None
        if sound is None:
            raise bad("the field 'file' with the sound is missing", param="file")
        asked, form_of_answer = read_transcription(fields, sound, model=self.settings.model, translate=translate)
        [answer] = await self._await(request, await self._submit([asked]))
        task, language = ("translate", "en") if translate else ("transcribe", fields.get("language", "en"))
        content, media = transcript(answer, form=form_of_answer, task=task, language=language)
        if isinstance(content, str):
            return PlainTextResponse(content, media_type=media)
        return JSONResponse(content)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        name = request.path_params.get("name")
        if name is not None:
            check_model(name, model=self.settings.model)
        model = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "qwen2audio_jax"}
        return JSONResponse(model if name is not None else {"object": "list", "data": [model]})

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
        return JSONResponse({"status": "ready" if known.ready else "compiling", **facts}, 200 if known.ready else 503)

    # The engine

    @staticmethod
    def _check_type(request: Request, wanted: str) -> None:
        found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != wanted:
            raise ApiError(415, f"the content type is {found[:60]!r}; send {wanted}")

    async def _submit(self, requests: list[EngineRequest]) -> "list[_Waiting]":
        if not self.readiness.ready:
            raise ApiError(503, f"not ready: {self.readiness.done} of {self.readiness.total} shapes are compiled")
        handles: list[_Waiting] = []
        try:
            for request in requests:
                waiting = _Waiting(asyncio.get_running_loop())
                waiting.handle = self.engine.submit(request, block=False, on_change=waiting.changed)
                handles.append(waiting)
        except EngineFull as error:
            for waiting in handles:
                waiting.cancel()
            raise ApiError(429, str(error)) from None
        except RuntimeError:
            raise ApiError(503, "the server is closing, or its device has failed") from None
        return handles

    async def _await(self, request: Request, handles: "list[_Waiting]") -> list[Answer]:
        """The answers; a client that leaves, or a time that is over, ends them."""
        gone = asyncio.create_task(self._gone(request))
        answered = asyncio.create_task(self._all(handles))
        try:
            done, _ = await asyncio.wait(
                {gone, answered}, timeout=self.settings.answer_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if answered in done:
                return answered.result()
            if gone in done:
                raise ClientDisconnect
            raise ApiError(408, f"there was no answer within {self.settings.answer_seconds:g} s")
        finally:
            for task in (gone, answered):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            for handle in handles:
                handle.cancel()

    @staticmethod
    async def _gone(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    @staticmethod
    async def _all(handles: "list[_Waiting]") -> list[Answer]:
        return [await handle.answer() for handle in handles]

    async def _events(self, asked: Chat, handles: "list[_Waiting]") -> AsyncIterator[str]:
        """Server-sent events of a streamed chat; leaving it ends the requests."""
        head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.settings.model,
        }

        def event(index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            extra = {"usage": None} if asked.usage else {}
            return f"data: {json.dumps({**head, 'choices': [choice], **extra})}\n\n"

        answers: list[Answer] = []
        try:
            async with asyncio.timeout(self.settings.answer_seconds):
                for index, waiting in enumerate(handles):
                    yield event(index, {"role": "assistant", "content": ""})
                    text, trimmer = TextStream(self._decode), Trimmer(asked.stops)
                    async for tokens, log_probs in waiting.tokens():
                        piece = trimmer.push("".join(map(text.push, tokens)))
                        shown = None
                        if asked.logprobs:
                            shown = {"content": token_logprobs(tokens, log_probs, processor=self.processor)}
                        if piece or shown:
                            yield event(index, {"content": piece}, logprobs=shown)
                    answers.append(await waiting.answer())
                    if rest := trimmer.push(text.finish()) + trimmer.finish():
                        yield event(index, {"content": rest})
                    yield event(index, {}, REASONS[answers[-1].finish_reason])
            if asked.usage:
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(answers)})}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        except TimeoutError:
            said = ApiError(408, f"the answer was not whole within {self.settings.answer_seconds:g} s")
            yield f"data: {json.dumps(said.body())}\n\n"
        finally:
            for waiting in handles:
                waiting.cancel()

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)


class _Waiting:
    """A handle of the engine, awaited in the server's loop."""

    handle: Handle

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._changed = loop, asyncio.Event()

    def changed(self, handle: Handle) -> None:
        """Called by the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._changed.set)

    def cancel(self) -> None:
        """End it, if it has not ended."""
        if not self.handle.done:
            self.handle.cancel()

    async def tokens(self) -> AsyncIterator[tuple[list[int], list[float]]]:
        """New tokens and their log-probabilities, as many at a time as have come."""
        given = 0
        while True:
            self._changed.clear()
            new, log_probs, over = self.handle.known(given)
            if new:
                given += len(new)
                yield new, log_probs
            if over:
                return
            if not new:
                await self._changed.wait()

    async def started(self) -> ApiError | None:
        """Wait for the first token; the error, if there is one before it."""
        while True:
            self._changed.clear()
            new, _, over = self.handle.known(0)
            if new:
                return None
            if over:
                return self._error()
            await self._changed.wait()

    async def answer(self) -> Answer:
        """The whole answer."""
        while not self.handle.done:
            self._changed.clear()
            if self.handle.done:
                break
            await self._changed.wait()
        if (error := self._error()) is not None:
            raise error
        return self.handle.result(timeout=0)

    def _error(self) -> ApiError | None:
        try:
            self.handle.result(timeout=0)
        except RequestError as error:
            return ApiError(STATUS.get(error.kind, 400), str(error), code=error.kind)
        return None
