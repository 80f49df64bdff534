"""An application that answers from the process's first moment on, while the real one is still being loaded."""

import asyncio
import contextlib
import threading
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import State
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from .access import PUBLIC_PATHS
from .access_log import UNMATCHED, log_access
from .errors import ApiError
from .middleware import RequestIdMiddleware
from .page.files import Page
from .request_record import record_of

RETRY_SECONDS = 5


class LoadingApp:
    """Runs ``load`` in a thread once the server is up, then hands everything to the application that it made.

    Until then /health/live says that the process lives, the page says that the model loads, and everything else is a
    503.

    page:  None: it is turned off
    state: of the loaded application; empty until then
    error: why loading failed
    """

    def __init__(
        self,
        load: Callable[[], FastAPI],
        on_loaded: Callable[[], None],
        on_failed: Callable[[], None],
        page: Page | None = None,
    ) -> None:
        self.state = State()
        self.error: BaseException | None = None
        self.num_rejected = 0
        self._load = load
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._page = page
        self._app: FastAPI | None = None
        self._waiting = RequestIdMiddleware(self._answer)
        self._thread: threading.Thread | None = None
        self._stack = contextlib.AsyncExitStack()

    @property
    def is_loading(self) -> bool:
        """The thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, or the life of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await (self._app or self._waiting)(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        loading = asyncio.create_task(self._start())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        loading.cancel()
        await self._stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        try:
            app = await self._load_in_thread()
            await self._stack.enter_async_context(app.router.lifespan_context(app))
        except Exception as error:
            self.error = error
            self._on_failed()
            return
        self._app, self.state = app, app.state
        self._on_loaded()

    async def _load_in_thread(self) -> FastAPI:
        """``load`` in a thread that nobody has to wait for when the process is told to stop."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[FastAPI] = loop.create_future()

        def settle(app: FastAPI | None, error: Exception | None) -> None:
            if loaded.cancelled():
                return
            if app is not None:
                loaded.set_result(app)
            else:
                loaded.set_exception(error or RuntimeError("nothing was loaded"))

        def work() -> None:
            app, problem = None, None
            try:
                app = self._load()
            except Exception as error:
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, app, problem)

        self._thread = threading.Thread(target=work, name="qerve-load", daemon=True)
        self._thread.start()
        return await loaded

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        page_file = None if self._page is None else self._page.answer(Request(scope))
        response = page_file or self._answer_of_api(path)
        await response(scope, receive, send)
        # Routes are not known yet, and a path may be anything; somebody waits for readiness, which is no news.
        if path not in PUBLIC_PATHS:
            log_access(record_of(scope), scope["method"], UNMATCHED, response.status_code)

    def _answer_of_api(self, path: str) -> Response:
        if path == "/health/live":
            return JSONResponse({"status": "ok"})
        self.num_rejected += path != "/health/ready"
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return ApiError(503, "The model is being loaded.", headers=headers).response()
