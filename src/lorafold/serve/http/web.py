"""What serving takes of fastapi and starlette, imported when it begins."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ...errors import MissingExtraError


@dataclass(frozen=True)
class Web:
    """An application's class, responses, and the error for what has no route."""

    FastAPI: Any
    HTTPException: Any
    JSONResponse: Any
    PlainTextResponse: Any
    Response: Any
    StreamingResponse: Any


@functools.cache
def web() -> Web:
    """All of them.

    Raises:
        MissingExtraError: fastapi is not there.
    """
    try:
        import fastapi
        from starlette import exceptions, responses
    except ImportError as e:
        raise MissingExtraError("serving takes fastapi: pip install 'lorafold[serve]'") from e
    return Web(
        fastapi.FastAPI,
        exceptions.HTTPException,
        responses.JSONResponse,
        responses.PlainTextResponse,
        responses.Response,
        responses.StreamingResponse,
    )
