"""Answers with the page's files: public, the same for everybody, and told to load nothing from anywhere else.

The page holds no secrets; what it shows it asks the API for, with the key that its user types in where there are keys.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

ROOT = "/"
PREFIX = "/page/"
INDEX = "index.html"
CONTENT_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text can become markup or code, whatever a script does with it
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept by browsers, but asked about every time: after an upgrade no file of the former version is used.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file: its bytes, and the headers that go with them."""

    content: bytes
    headers: dict[str, str]

    @classmethod
    def of(cls, name: str, content: bytes) -> "PageFile":
        """The file ``name`` with ``content``."""
        content_type = CONTENT_TYPES[name.rpartition(".")[2]]
        digest = hashlib.sha256(content).hexdigest()
        return cls(content, {**HEADERS, "Content-Type": f"{content_type}; charset=utf-8", "ETag": f'"{digest[:32]}"'})

    def is_known_to(self, request: Request) -> bool:
        """The client has it already, by its ``If-None-Match``."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        return "*" in known or self.headers["ETag"] in known


class Page:
    """The files by the paths that they are served at: ``/``, and ``/page/NAME`` for what it loads."""

    def __init__(self) -> None:
        folder = files(__package__) / "static"
        contents = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
        self._files = {
            ROOT if name == INDEX else PREFIX + name: PageFile.of(name, content) for name, content in contents.items()
        }

    @property
    def paths(self) -> frozenset[str]:
        """Every path that has a file: nothing else of the server is public because of the page."""
        return frozenset(self._files)

    def answer(self, request: Request) -> Response | None:
        """The file at the request's path, or that it has not changed; None: there is none, or not for this method."""
        file = self._files.get(request.scope["path"])
        if file is None or request.method not in ("GET", "HEAD"):
            return None
        if file.is_known_to(request):
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)
