"""What goes wrong, as the protocol says it: a status, and one object with the message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import FileError, LorafoldError, UnknownNameError
from ..engine import BusyError, DownError, TooLongError

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
RETRY_AFTER = "1"  # seconds


class ApiError(LorafoldError):
    """An error with its status.

    Args:
        message: one line. status: of HTTP. param: the field that it is about.
        code: what a program asks for; the status when None.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.code: str | int = status if code is None else code

    @property
    def headers(self) -> dict[str, str]:
        """What is sent with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": RETRY_AFTER} if self.status in (429, 503) else {}

    @property
    def body(self) -> dict[str, Mapping[str, Any]]:
        """What it says."""
        kind = _TYPES.get(self.status, "Error")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def api_error(error: BaseException) -> ApiError:
    """Any error as one of these; what nobody expected says no more than its kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(str(error), 429)
    if isinstance(error, DownError | FileError):  # its own files: the request may be fine
        return ApiError(str(error), 503)
    if isinstance(error, TooLongError):
        return ApiError(str(error), 400, code="context_length_exceeded")
    if isinstance(error, UnknownNameError):
        return ApiError(str(error), 404, "model", "model_not_found")
    if isinstance(error, LorafoldError):
        return ApiError(str(error), 400)
    return ApiError(f"the server has failed at this request ({type(error).__name__})", 500)
