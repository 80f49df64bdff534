"""The page's files as routes of an application."""

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from .files import PREFIX, ROOT, Page


def add_page(app: FastAPI, page: Page) -> None:
    """Serve ``page``."""

    async def page_file(request: Request) -> Response:
        answer = page.answer(request)
        if answer is None:
            raise HTTPException(404)
        return answer

    for path in (ROOT, PREFIX + "{name}"):
        app.add_api_route(path, page_file, methods=["GET", "HEAD"], include_in_schema=False)
