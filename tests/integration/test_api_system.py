"""Models, health, metrics, request ids, the API key, the documentation."""

import re
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.errors import QerveError
from service.listener import bind
from service.page.files import Page
from tests.support.api_server import live_server

BODY = {"model": "fake", "prompt": "hello", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


def test_the_model_is_listed_and_described(server):
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 256)
    card = server.get("/v1/models/fake").json()
    manifest = server.context.info.manifest
    assert card["artifact"]["sha256"] == manifest.manifest_sha256
    assert (card["artifact"]["method"], card["artifact"]["effective_bits"]) == ("qera-exact", 4.75)
    assert card["artifact"]["embedding"] == {"format": "BF16", "bits_per_weight": 16.0, "num_bytes": 16}
    assert card["artifact"]["head"] == {"format": "BF16", "bits_per_weight": 16.0, "num_bytes": 0}
    assert {"backends", "passed_over"} <= set(card)
    assert card["execution"] == {"network": "layer by layer: a fake network"}
    assert manifest.manifest_sha256[:16] in server.context.info.fingerprint


def test_health_says_alive_and_ready(server):
    assert server.get("/health/live").json() == {"status": "ok"}
    assert server.get("/health/ready").status_code == 200


def test_a_server_whose_engine_has_ended_is_alive_but_not_ready():
    with live_server() as server:
        server.context.engine.abandon()
        assert server.get("/health/live").status_code == 200
        response = server.get("/health/ready")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["type"] == "ServiceUnavailableError"


def test_metrics_are_what_prometheus_reads_and_count_what_was_done(server):
    before = server.metric("qerve_generation_tokens_total")
    assert server.post("/v1/completions", json=BODY).status_code == 200
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["qerve_generation_tokens"].samples[0].value == before + 3
    for name in (
        "qerve_num_requests_running", "qerve_num_requests_waiting", "qerve_kv_cache_usage_perc", "qerve_kv_cache_bytes",
        "qerve_model_weight_bytes", "qerve_model_effective_bits_per_weight", "qerve_model_load_seconds",
        "qerve_startup_seconds", "qerve_build_info", "qerve_http_requests", "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in families, name
    components = {sample.labels["component"]: sample.value for sample in families["qerve_model_weight_bytes"].samples}
    assert components == {"packed": 1000, "scale": 100, "lowrank_a": 32, "lowrank_b": 64, "unquantized": 7}
    assert families["qerve_build_info"].samples[0].value == 1


def test_metrics_are_offered_as_openmetrics_too(server):
    response = server.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_http_requests_are_counted_by_route_template_and_never_by_path(server):
    server.get("/v1/models/some-made-up-name")
    server.get("/made/up/path")
    server.client.request("PROPFIND", "/made/up/path")
    server.post("/v1/completions", json={"prompt": ""})
    count = server.metric
    assert count("qerve_http_requests_total", path="/v1/models/{model_id}", status="404", method="GET") == 1
    assert count("qerve_http_requests_total", path="unmatched", status="404", method="GET") == 1
    assert count("qerve_http_requests_total", path="unmatched", status="404", method="other") == 1
    assert count("qerve_http_requests_total", path="/v1/completions", status="400", method="POST") == 1
    assert "made" not in server.get("/metrics").text


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "A.b_c:d"])
def test_a_plain_request_id_comes_back(server, given):
    assert server.get("/health/live", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a\tb", "<script>", "{}"])
def test_any_other_request_id_is_replaced(server, given):
    got = server.get("/nothing", headers={"x-request-id": given}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", got)


def test_the_documentation_describes_the_bodies(server):
    assert server.get("/docs").status_code == 200
    document = server.get("/openapi.json").json()
    content = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/CompletionBody"}
    schema = document["components"]["schemas"]["CompletionBody"]
    assert schema["required"] == ["prompt"]
    assert "temperature" in schema["properties"]
    references = re.findall(r'"\$ref":\s*"#/components/schemas/(\w+)"', server.get("/openapi.json").text)
    assert set(references) <= set(document["components"]["schemas"])


def test_no_cross_origin_access_is_granted(server):
    response = server.get("/v1/models", headers={"origin": "http://elsewhere"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_with_an_api_key_every_route_but_health_asks_for_it():
    with live_server(api_key="secret-ü") as server:
        key = {"authorization": "Bearer secret-ü".encode()}
        routes = [(route.path, method) for route in server.app.routes for method in getattr(route, "methods", ())]
        documented = server.get("/openapi.json", headers=key).json()["paths"]
        routes += [(path, method.upper()) for path, methods in documented.items() for method in methods]
        assert len(set(routes)) >= 12
        for path, method in [*routes, ("/nothing", "GET")]:
            response = server.client.request(method, path)
            if path.startswith("/health/") or path in Page().paths:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.json()["error"]["type"] == "AuthenticationError"
        assert server.post("/v1/completions", json=BODY, headers=key).status_code == 200
        assert server.get("/metrics", headers=key).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer secretsecret", "bearer: secret"]
)
def test_a_wrong_key_in_any_form_is_refused(header):
    with live_server(api_key="secret") as server:
        assert server.get("/v1/models", headers={"authorization": header}).status_code == 401
        assert server.get("/v1/models", headers={"authorization": "bearer secret"}).status_code == 200


def test_a_port_in_use_is_an_error_that_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(QerveError, match=f"port {port} on 127.0.0.1 is in use"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_an_error():
    with pytest.raises(QerveError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_a_connection_whose_peer_takes_nothing_is_not_kept_for_ever():
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_connections_send_small_answers_at_once():
    """asyncio looks at this field to decide; without it, answers wait for the client's delayed acknowledgement."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
