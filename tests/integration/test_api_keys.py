"""Keys, their limits, and origins, over HTTP: nothing but the health routes answers without a key."""

import concurrent.futures

import pytest

from service.access import PUBLIC_PATHS
from service.page.files import Page
from tests.support.api_server import live_server, wait_until
from tests.support.fake_model import FakeModel, FakeParts, Faults

BODY = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")
UNKNOWN = (
    "/",
    "/nothing",
    "/v1",
    "/v1/",
    "//v1/models",
    "/health",
    "/health/live/",
    "/HEALTH/LIVE",
    "/docs/x",
    "/%2e/",
)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("alice:one\nbob:two\n")
    path.chmod(0o600)
    return path


def bearer(key):
    return {"authorization": f"Bearer {key}".encode()}


def slow_parts():
    return FakeParts(model=FakeModel(faults=Faults(step_seconds=0.01)))


def registered_routes(routes):
    """All of them, those of routers that were included too."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is None:
            yield route
        else:
            yield from registered_routes(included.routes)


@pytest.mark.parametrize("page", [True, False])
def test_every_registered_route_and_every_other_path_asks_for_a_key(key_file, page):
    public = {"/health/live", "/health/ready", *(Page().paths if page else ())}
    with live_server(api_keys_file=key_file, page=page) as server:
        registered = {route.path for route in registered_routes(server.app.routes)}
        assert {"/docs", "/openapi.json", "/metrics", "/tokenize", "/v1/completions"} <= registered
        assert registered >= PUBLIC_PATHS
        paths = [path.replace("{model_id:path}", "fake") for path in registered] + list(UNKNOWN)
        for path in {*paths, *sorted(public)[:3]}:
            for method in METHODS:
                response = server.client.request(method, path, headers={"origin": "http://x"})
                if path in public:
                    assert response.status_code in (200, 405), (method, path)
                else:
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"] == "Bearer"
        assert server.get("/v1/models", headers=bearer("one")).status_code == 200
        assert server.get("/docs", headers=bearer("two")).status_code == 200


def test_one_key_beside_a_file_of_them(key_file):
    with live_server(api_keys_file=key_file, api_key="three-ü") as server:
        for key in ("one", "two", "three-ü"):
            assert server.get("/v1/models", headers=bearer(key)).status_code == 200
        for key in ("alice", "alice:one", "One", "three"):
            assert server.get("/v1/models", headers=bearer(key)).status_code == 401


def test_a_key_has_only_so_many_requests_at_a_time_and_the_others_have_theirs(key_file):
    with (
        live_server(slow_parts(), api_keys_file=key_file, max_concurrent_per_key=2) as server,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        long = {**BODY, "max_tokens": 100}
        running = [pool.submit(server.post, "/v1/completions", json=long, headers=bearer("one")) for _ in range(2)]
        wait_until(lambda: server.metric("qerve_num_requests_running") == 2)
        refused = server.post("/v1/completions", json=BODY, headers=bearer("one"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "RateLimitError"
        assert server.get("/v1/models", headers=bearer("one")).status_code == 200
        assert server.post("/v1/completions", json=BODY, headers=bearer("two")).status_code == 200
        assert [request.result().status_code for request in running] == [200, 200]
        assert server.post("/v1/completions", json=BODY, headers=bearer("one")).status_code == 200
        assert server.metric("qerve_requests_rejected_total", reason="rate_limit") == 1


def test_requests_per_minute_are_counted_per_key_whatever_becomes_of_them(key_file):
    with live_server(api_keys_file=key_file, requests_per_minute_per_key=3) as server:
        for body in (BODY, {"prompt": ""}, {"nonsense": 1}):
            assert server.post("/v1/completions", json=body, headers=bearer("one")).status_code in (200, 400)
        refused = server.post("/tokenize", json={"prompt": "a"}, headers=bearer("one"))
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert server.post("/v1/completions", json=BODY, headers=bearer("two")).status_code == 200
        assert server.post("/v1/completions", json=BODY).status_code == 401


def test_without_keys_everybody_together_has_the_limit_of_one():
    with live_server(requests_per_minute_per_key=1) as server:
        assert server.post("/v1/completions", json=BODY).status_code == 200
        assert server.post("/v1/completions", json=BODY).status_code == 429


def preflight(server, origin):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    headers["access-control-request-headers"] = "authorization, content-type"
    return server.client.options("/v1/completions", headers=headers)


def test_pages_of_the_origins_that_are_listed_may_call_with_a_key():
    with live_server(api_key="one", cors_allow_origins="http://a, http://b") as server:
        for origin in ("http://a", "http://b"):
            assert preflight(server, origin).headers["access-control-allow-origin"] == origin
            for key, status in (("one", 200), ("wrong", 401)):
                response = server.get("/v1/models", headers={"origin": origin, **bearer(key)})
                assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, origin)
        assert "access-control-allow-origin" not in preflight(server, "http://evil").headers
        response = server.get("/v1/models", headers={"origin": "http://evil", **bearer("one")})
        assert "access-control-allow-origin" not in response.headers


def test_without_listed_origins_no_page_may_call():
    with live_server() as server:
        response = preflight(server, "http://a")
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_keys_do_not_share_cached_prompts_and_a_name_does(tmp_path):
    """What was cached shows in the usage as it does in the time to the first token."""
    path = tmp_path / "keys"
    path.write_text("alice:one\nalice:new\nbob:two\n")
    path.chmod(0o600)
    with live_server(api_keys_file=path) as server:

        def num_cached(key):
            body = {**BODY, "prompt": "a prompt of more than two blocks of the cache, sixteen tokens each"}
            usage = server.post("/v1/completions", json=body, headers=bearer(key)).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        assert num_cached("one") == 0
        assert num_cached("one") >= 32
        assert num_cached("two") == 0
        assert num_cached("new") >= 32
