"""The page's files over HTTP: public, cached with care, under a strict policy, and gone when they are turned off."""

import re
from pathlib import Path

import httpx
import pytest

from service.loading import LoadingApp
from service.page.files import Page
from tests.support.api_server import live_server, wait_until
from tests.support.fake_process import fake_process

STATIC = Path(__file__).resolve().parents[2] / "service" / "page" / "static"
FILES = {"/" if file.name == "index.html" else f"/page/{file.name}": file for file in STATIC.iterdir()}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def server():
    with live_server(api_key="secret", requests_per_minute_per_key=1) as live:
        yield live


def directives(response):
    return dict(item.strip().partition(" ")[::2] for item in response.headers["content-security-policy"].split(";"))


def test_every_file_is_served_as_it_is_to_everybody(server):
    assert Page().paths == set(FILES)
    for path, file in FILES.items():
        response = server.get(path)
        assert (response.status_code, response.content) == (200, file.read_bytes()), path
        assert response.headers["content-type"] == f"{TYPES[file.suffix]}; charset=utf-8"


def test_every_file_comes_with_a_policy_that_allows_nothing_but_this_server(server):
    for path in FILES:
        response = server.get(path)
        policy = directives(response)
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' data:"
        assert policy["require-trusted-types-for"] == "'script'"
        assert not re.search(r"unsafe|\*|http", response.headers["content-security-policy"])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_a_file_that_a_browser_has_is_not_sent_again(server):
    tags = {path: server.get(path).headers["etag"] for path in FILES}
    assert len(set(tags.values())) == len(FILES)
    tag = tags["/"]
    for known in (tag, f'W/{tag}, "other"', f'"other", {tag}', "*"):
        response = server.get("/", headers={"if-none-match": known})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
        assert response.headers["cache-control"] == "no-cache"
    for known in ('"other"', tags["/page/main.js"], tag.strip('"')):
        assert server.get("/", headers={"if-none-match": known}).status_code == 200


def test_files_are_read_and_nothing_else(server):
    for path, file in FILES.items():
        head = server.client.head(path)
        assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", file.stat().st_size)
        assert server.post(path, json={}).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/nothing.js",
        "/page/index.html",
        "/page/../main.js",
        "/page/%2e%2e/files.py",
        "/index.html",
    ],
)
def test_nothing_else_becomes_public_with_the_page(path, server):
    url = httpx.URL(server.url).copy_with(raw_path=path.encode())
    assert server.client.get(url).status_code == 401
    assert server.client.get(url, headers={"authorization": "Bearer secret"}).status_code == 404


def test_files_are_counted_under_few_names(server):
    for path in FILES:
        server.get(path)
    counted = {
        sample.labels["path"]
        for family in server.context.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "qerve_http_requests_total"
    }
    assert counted <= {"/", "/page/{name}", "unmatched"}
    assert server.metric("qerve_http_requests_total", path="/page/{name}", status="200") >= len(FILES) - 1


def test_the_page_can_be_turned_off():
    with live_server(page=False) as open_server:
        assert {open_server.get(path).status_code for path in FILES} == {404}
    with live_server(page=False, api_key="secret") as locked_server:
        assert {locked_server.get(path).status_code for path in FILES} == {401}


def client_of_loading_server(page):
    """Of a server whose model is not there yet."""

    def load():
        raise AssertionError("nothing is loaded here")

    app = LoadingApp(load, lambda: None, lambda: None, page)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://loading")


async def test_the_page_is_there_while_the_model_loads():
    async with client_of_loading_server(Page()) as client:
        for path, file in FILES.items():
            assert (await client.get(path)).content == file.read_bytes()
        for path in ("/health/ready", "/v1/models", "/metrics", "/page/nothing.js"):
            assert (await client.get(path)).status_code == 503
        assert (await client.post("/", json={})).status_code == 503


async def test_without_the_page_nothing_is_there_while_the_model_loads():
    async with client_of_loading_server(None) as client:
        assert {(await client.get(path)).status_code for path in FILES} == {503}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "status"), [((), 200), (("--no-page",), 503)])
def test_a_process_that_loads_has_the_page_as_the_option_says(options, status, tmp_path):
    with fake_process(tmp_path, *options, load_seconds=600.0) as server:
        wait_until(lambda: server.status("/health/live") == 200)
        assert server.status("/") == status
