"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from linstate.errors import (
    ArgumentError,
    BusyError,
    CompositionError,
    InputError,
    LinstateError,
    QuotaError,
    StateError,
    StateFileError,
    StateMismatchError,
    StateNotFoundError,
)
from linstate.serve.room import no_room

_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (BusyError, 429, "rate_limit_exceeded"),
    (StateNotFoundError, 404, "not_found"),
    (QuotaError, 403, "quota_exceeded"),
    (StateFileError, 422, "bad_state_file"),
    (StateMismatchError, 409, "state_of_another_model"),
    (CompositionError, 409, "not_composable"),
    (StateError, 409, "state_error"),
    (InputError, 400, "bad_input"),
    (ArgumentError, 400, "bad_input"),
)


HALF = "the request holds half of a surrogate pair, which is no character; send whole characters"
NO_ROOM = (
    "the server's disk is full, so nothing more can be kept: delete states (DELETE /v1/states/{id}), responses or conversations, "
    "or ask its operator for more room"
)


class Refused(HTTPException):
    """A request that is refused: ``message`` says what was expected and found, ``param`` where."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


def body(message: str, status: int, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {
        "error": {
            "message": message,
            "type": "rate_limit_error" if status == 429 else kind,
            "param": param,
            "code": code,
        }
    }


def of_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers for an error. What was not foreseen is a 500 that says nothing of its inside."""
    if isinstance(error, Refused):
        return (
            error.status_code,
            body(str(error.detail), error.status_code, code=error.code, param=error.param),
            {},
        )
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            headers = {"retry-after": str(error.retry_after)} if isinstance(error, BusyError) else {}
            return status, body(str(error), status, code=code), headers
    if no_room(error):
        return 507, body(NO_ROOM, 507, code="insufficient_storage"), {}
    if isinstance(error, UnicodeError):
        return 400, body(HALF, 400, code="bad_input"), {}
    if isinstance(error, LinstateError):
        return 400, body(str(error), 400, code="bad_input"), {}
    return 500, body("the server failed on this request; its log says more", 500, code="internal_error"), {}


def install(app: FastAPI) -> None:
    """Have ``app`` answer with these."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        status, content, headers = of_error(error)
        return JSONResponse(content, status, headers=headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(
            body(f"{where}: {first['msg']}" if where else first["msg"], 400, param=where or None), 400
        )

    async def plain(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return JSONResponse(
            body(str(error.detail), error.status_code), error.status_code, headers=error.headers
        )

    app.add_exception_handler(LinstateError, known)
    app.add_exception_handler(Refused, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, plain)
