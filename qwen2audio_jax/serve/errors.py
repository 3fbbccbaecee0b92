"""Errors of the server, as OpenAI's clients read them: a status, and an object with a message and a kind."""

from typing import Any

STATUS = {"time": 408, "too_large": 413, "device": 503, "closed": 503, "failed": 500, "logits": 500}
"""HTTP status of a request error, by its kind; 400 for all others."""


class ApiError(Exception):
    """Error that a client is told: its status, a message, and the parameter that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 401:
            kind = "authentication_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, *, param: str | None = None) -> ApiError:
    """A request that cannot be used."""
    return ApiError(400, message, param=param)
