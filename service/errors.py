"""Errors as clients see them: OpenAI's shape with vLLM's types, the right status, nothing internal.

    {"error": {"message": ..., "type": "BadRequestError", "param": "max_tokens", "code": 400}}

``ApiError`` is raised for what a client did or must wait for; it is answered and never logged as a failure.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    499: "ClientClosedRequest",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An answer other than success.

    param:   the request field at fault
    headers: e.g. Retry-After
    details: further fields of the error object
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error_type = ERROR_TYPES.get(self.status, "Error")
        error = {"message": self.message, "type": error_type, "param": self.param, "code": self.status}
        return {"error": {**error, **self.details}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, **details: Any) -> ApiError:
    """400."""
    return ApiError(400, message, param, details=details)


def deadline_exceeded() -> ApiError:
    """408, which OpenAI's clients would repeat by themselves if they were not told that it is of no use."""
    message = "The request took longer than it may; what it had got so far is lost. Ask for fewer tokens or more time."
    return ApiError(408, message, headers={"X-Should-Retry": "false"})


def internal_error(message: str) -> ApiError:
    """500."""
    return ApiError(500, message)


def quote(text: str, limit: int = 64) -> str:
    """A client's text in a message: shortened and escaped."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def install_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` in OpenAI's shape."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)


async def _answer_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)  # noqa: S101 registered for this class
    return error.response()


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 registered for this class
    messages = {
        404: f"There is no route {quote(request.url.path)}. See /docs for those there are.",
        405: f"{request.method} is not allowed on this route.",
    }
    message = messages.get(error.status_code, str(error.detail) or HTTPStatus(error.status_code).phrase)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 registered for this class
    return bad_request("; ".join(str(item["msg"]) for item in error.errors())).response()
