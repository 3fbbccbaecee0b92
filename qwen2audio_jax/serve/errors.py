"""Errors of the server, as OpenAI's clients read them: a status, and an object with a message and a kind."""

from typing import Any

from qwen2audio_jax.engine import RequestError

STATUS = {"time": 408, "too_large": 413, "device": 503, "closed": 503, "failed": 500, "logits": 500}
"""HTTP status of a request error, by its kind; 400 for all others."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
KINDS = {
    **{401: "key", 403: "stranger", 404: "not_found", 405: "method", 408: "time", 413: "too_large", 415: "media_type"},
    **{429: "full", 500: "failed", 503: "not_ready"},
}
"""What errors are counted as, by their status, unless they have a code."""


class ApiError(Exception):
    """Error that a client is told: its status, a message, and the parameter that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def kind(self) -> str:
        """One word of a small set, for those who count errors."""
        return self.code or KINDS.get(self.status, "request")

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": _sendable(str(self)), "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, *, param: str | None = None) -> ApiError:
    """A request that cannot be used."""
    return ApiError(400, message, param=None if param is None else _sendable(param))


def told(error: RequestError) -> ApiError:
    """A request's error as its client may know it: not where a name leads within the server's network."""
    said = str(error)
    if error.kind == "url" and "not a public address" in said:
        said = "the URL leads to what is not a public address: send the sound itself"
    return ApiError(STATUS.get(error.kind, 400), said, code=error.kind)


def _sendable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
