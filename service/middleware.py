"""ASGI middleware: request ids, HTTP metrics and the log, the last line of defence. Pure ASGI, so streams stream."""

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access_log import UNMATCHED, log_access
from .errors import internal_error, quote
from .metrics import Metrics
from .request_record import RequestRecord, record_of

if TYPE_CHECKING:
    from .otlp import OtlpTelemetry

logger = logging.getLogger("qerve.http")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class RequestIdMiddleware:
    """Every response carries X-Request-Id: the client's own when it is short and plain, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["record"] = RequestRecord(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HttpMetricsMiddleware:
    """Counts, times and logs every response by route template, never by the path a client made up."""

    def __init__(self, app: ASGIApp, metrics: Metrics, telemetry: "OtlpTelemetry | None" = None) -> None:
        self._app = app
        self._metrics = metrics
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 499, time.monotonic()  # what stays when the client leaves before there is a response

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        finally:
            self._finish(scope, status, time.monotonic() - started)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        path = getattr(scope.get("route"), "path_format", UNMATCHED)
        record = record_of(scope)
        call = record.generation
        if call is not None and call.is_expired:
            self._metrics.deadline_exceeded()
        if call is not None and call.sampling is not None:
            self._metrics.call_finished(call.longest_output)
        if self._telemetry is not None:
            self._telemetry.request_finished(record, Headers(scope=scope), method, path, status)
        log_access(record, method, path, status)
        self._metrics.http_finished(method, path, status, seconds)


class ErrorBoundaryMiddleware:
    """Turns an exception that nobody expected into a 500 in OpenAI's shape, logged once with the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            request_id = record_of(scope).request_id
            logger.exception("request %s: %s %s failed", request_id, scope["method"], quote(scope["path"]))
            if is_started:  # too late for an answer; the server closes the connection, which the client notices
                return
            message = f"The server failed on this request. Its log has the details under request id {request_id}."
            await internal_error(message).response()(scope, receive, send)
