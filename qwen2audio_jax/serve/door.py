"""The door: who may ask, how large and how slow a body may be, and what is said to those whom it keeps out."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from qwen2audio_jax.serve.errors import ApiError, bad
from qwen2audio_jax.serve.metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
BODIES = 16
"""Bodies of the largest size that are held at a time, or as many bytes of others."""
MOST_FIELDS = 20
RETRY_SECONDS = 1

Route = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    Attributes:
        model: the name that it goes by.
        keys: of which a client must have one; empty: none is needed.
        hosts: names under which the server is addressed, without port; empty: any.
        origins: other sites whose pages may ask, such as "https://chat.example".
        body_bytes: the largest body.
        body_seconds: time for a body to arrive.
        answer_seconds: time for an answer, from the end of its request's body on.
        kind: of the model, as tasks have them; None: told by its name and its files.
    """

    model: str
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()
    body_bytes: int = 64 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    kind: str | None = None


class Door:
    """What stands around every route of one server."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self._settings, self._metrics = settings, metrics
        self._held = 0

    def guarded(self, name: str, route: Route) -> Route:
        """A route whose errors are OpenAI's, for those who may use it; `name` is what its answers are counted as."""

        async def run(request: Request) -> Response:
            try:
                self._check_site(request)
                self._check_key(request)
                response = await route(request)
            except ApiError as error:
                response = self.refusal(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            self._metrics.count(name, response.status_code)
            return response

        return run

    def open(self, name: str, route: Route) -> Route:
        """A route for those who have no key too, but not for other sites."""

        async def run(request: Request) -> Response:
            try:
                self._check_site(request)
                response = await route(request)
            except ApiError as error:
                response = self.refusal(error)
            self._metrics.count(name, response.status_code)
            return response

        return run

    def refusal(self, error: ApiError) -> Response:
        """An error as the client is told."""
        self._metrics.error(error)
        headers = {}
        if error.status in (429, 503):
            headers["Retry-After"] = str(RETRY_SECONDS)
        if error.status in (408, 413):
            headers["Connection"] = "close"
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers=headers)

    def _check_site(self, request: Request) -> None:
        """Keep out other sites' pages in a browser."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._settings.hosts and name.lower() not in self._settings.hosts:
            raise ApiError(403, "the server is not known under this Host; start it with --host")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and origin not in self._settings.origins:
            raise ApiError(403, "requests of other sites' pages are not answered, unless --allow-origin names them")

    def _check_key(self, request: Request) -> None:
        """Keep out clients without a key."""
        if not self._settings.keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        good = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self._settings.keys]
        if scheme.lower() != "bearer" or not any(good):
            raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

    async def body(self, request: Request) -> bytes:
        """The body, within its limits of size and time.

        Raises:
            ApiError: it is beyond one, or too many others are being read.
        """
        most = self._settings.body_bytes
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > most:
            raise ApiError(413, f"the body has {stated} bytes; the limit is {most}")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                async for part in request.stream():
                    size, self._held = size + len(part), self._held + len(part)
                    if size > most:
                        raise ApiError(413, f"the body has more than {most} bytes")
                    if self._held > BODIES * most:
                        raise ApiError(429, "too many large requests are arriving: try again later")
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._settings.body_seconds:g} s") from None
        finally:
            self._held -= size
        return b"".join(parts)

    async def upload(self, request: Request) -> tuple[dict[str, str], bytes]:
        """The fields of a form, and its file.

        Raises:
            ApiError: it cannot be read, or has another file or none.
        """
        check_type(request, "multipart/form-data")
        body = await self.body(request)

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        fields: dict[str, str] = {}
        sound = None
        try:
            async with Request(request.scope, replay).form(max_files=1, max_fields=MOST_FIELDS) as form:
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        if name != "file":
                            raise bad(f"the sound belongs into the field 'file', not {name[:40]!r}", param="file")
                        sound = await value.read()
                    elif name in fields:
                        raise bad(f"the form has the field {name[:40]!r} twice", param=name[:40])
                    else:
                        fields[name] = value
        except ApiError:
            raise
        except Exception as error:  # of the parser
            raise bad(f"the form cannot be read ({type(error).__name__})") from None
        if sound is None:
            raise bad("the field 'file' with the sound is missing", param="file")
        return fields, sound


def check_type(request: Request, wanted: str) -> None:
    """Raise unless a request's body is of the wanted content type."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != wanted:
        raise ApiError(415, f"the content type is {found[:60]!r}; send {wanted}")
