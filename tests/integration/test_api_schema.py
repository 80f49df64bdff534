"""The OpenAPI document is true: whatever is made of it, answers have a documented status, content type and shape."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from service.app import create_app
from service.settings import Settings
from tests.support.api_server import PATIENCE_SECONDS, live_server
from tests.support.fake_model import FakeParts

NUM_EXAMPLES = 25
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, unsupported_method, allow_header_conformance,
]  # fmt: skip

MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = [
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "n": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "n": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "stream": True}),
    ("/v1/perplexity", {"text": "hello there", "return_token_nlls": True, "return_tokens": True}),
    ("/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [65, 66]}),
]


@pytest.fixture(scope="module")
def server():
    with live_server(max_num_seqs=32, request_timeout_seconds=10.0) as live:
        yield live


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def operations():
    app = create_app(FakeParts().loaded(), Settings(model_name="fake", kv_cache_memory="16KiB"))
    paths = app.openapi()["paths"]
    return [(path, method) for path, methods in paths.items() for method in methods]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize(("path", "method"), operations())
def test_answers_are_as_documented_whatever_is_asked(server, schema, path, method, mode):
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing can be wrong about a request without a body")

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and case.body.get("model"):
            case.body["model"] = "fake"
        case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=PATIENCE_SECONDS)

    check()


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_what_is_asked_well_is_answered_as_documented(server, schema, path, body):
    """The fuzzer seldom gets past the door; these do."""
    case = schema[path]["post"].Case(body=body, media_type="application/json")
    assert case.call_and_validate(base_url=server.url, checks=CHECKS).status_code == 200


def test_a_document_of_a_server_with_keys_says_which_routes_ask_for_them():
    with live_server(api_key="one") as server:
        document = server.get("/openapi.json", headers={"authorization": "Bearer one"}).json()
    assert document["security"] == [{"key": []}]
    public = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("security") == []}
    assert public == {"/health/live", "/health/ready"}
