"""Who may ask, and how much: every route but those listed here wants an API key, also those that do not exist."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .key_limits import KeyLimitError, KeyLimits
from .keys import KeyRing
from .metrics import Metrics
from .request_record import record_of

PUBLIC_PATHS = frozenset(("/health/live", "/health/ready"))


class AccessMiddleware:
    """Asks for ``Authorization: Bearer KEY`` where there are keys, and holds each key to its limits.

    The limits count what makes work, which is every POST; without keys, everybody together is one client.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, limits: KeyLimits, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            key_id = self._identify(scope)
            if scope["method"] == "POST":
                self._limits.acquire(key_id)
        except KeyLimitError as error:
            self._metrics.rejected("rate_limit")
            headers = {"Retry-After": str(error.retry_seconds)}
            await ApiError(429, str(error), headers=headers).response()(scope, receive, send)
            return
        except ApiError as error:
            self._metrics.rejected("unauthorized")
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["method"] == "POST":
                self._limits.release(key_id)

    def _identify(self, scope: Scope) -> str:
        """The id of the key that the request came with.

        Raises:
            ApiError: 401.
        """
        record = record_of(scope)
        if self._keys.is_open:
            return record.key_id
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        found = self._keys.find(key.strip())
        if found is None or scheme.lower() != "bearer":
            message = "Give a valid API key: Authorization: Bearer KEY."
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        record.key_id = found
        return found
