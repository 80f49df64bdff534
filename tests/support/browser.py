"""A headless Chromium that notices what a user would not see: errors in its console, requests to other servers."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE_MS = 30_000
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> Path:
    """``QERVE_CHROMIUM``, or the one that is installed; without one, or without Playwright, the test is skipped."""
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")
    found = os.environ.get("QERVE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed: install one, or set QERVE_CHROMIUM to its path")
    return Path(found)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser of its own; nothing is downloaded. Its loop runs in this thread, so it must not outlive its tests."""
    executable = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In containers there is often neither a sandbox nor room in /dev/shm; the pages are this repository's own.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(
    browser: "Browser", url: str, expected_errors: tuple[str, ...] = (), **options: Any
) -> Iterator["Page"]:
    """The page of the server at ``url``, opened; at the end, nothing must have gone wrong behind the scenes.

    expected_errors: words of the console's errors that the test provokes (Chromium logs every failed request)
    """
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else problems.append(request.url))
    try:
        page.goto(url)
        yield page
        unexpected = [text for text in problems if not any(words in text for words in expected_errors)]
        assert not unexpected, unexpected
    finally:
        context.close()
