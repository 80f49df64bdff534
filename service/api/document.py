"""The OpenAPI document: FastAPI's, with the bodies and answers that our own code reads and writes."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..access import PUBLIC_PATHS
from ..deps import TIMEOUT_HEADER
from . import answers
from .schemas import ChatBody, CompletionBody, PerplexityBody
from .tokenize import DetokenizeBody, TokenizeBody

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/perplexity": PerplexityBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/completions": answers.CompletionAnswer,
    "/v1/chat/completions": answers.ChatAnswer,
    "/v1/perplexity": answers.PerplexityAnswer,
    "/tokenize": answers.TokenizeAnswer,
    "/detokenize": answers.DetokenizeAnswer,
    "/v1/models": answers.ModelsAnswer,
    "/v1/models/{model_id}": answers.ModelAnswer,
    "/health/live": answers.HealthAnswer,
    "/health/ready": answers.HealthAnswer,
}
STREAMING = frozenset(("/v1/completions", "/v1/chat/completions"))
_ERRORS = {
    "400": "The request is malformed, or asks for what this server or model cannot do",
    "401": "An API key is asked for, and none that is valid was sent",
    "404": "There is no such model",
    "408": "The request took longer than it may",
    "413": "The body is too long",
    "415": "The body is not JSON",
    "429": "The queue is full, or the key has used up its share: see Retry-After",
    "500": "The server failed on this request",
    "503": "The model is being loaded, or the server is shutting down: see Retry-After",
}
_ERRORS_OF_GET = ("401", "404", "500", "503")
_EVENT = {
    "type": "object",
    "description": "Each event",
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON, at the end [DONE]"}},
    "required": ["data"],
}
_JSON = "application/json"
_READ: Literal["validation"] = "validation"
_WRITTEN: Literal["serialization"] = "serialization"


def make_document(app: FastAPI) -> dict[str, Any]:
    """The document of ``app``, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
            (answers.ErrorAnswer, _WRITTEN),
            *((answer, _WRITTEN) for answer in set(ANSWERS.values())),
        ]
        models += [(body, _READ) for body in BODIES.values()]
        references, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
        document["components"] = {"schemas": definitions["$defs"]}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                operation["responses"] = _responses(path, method, operation["responses"], references)
                if path in BODIES:
                    _add_body(operation, references[BODIES[path], _READ])
        _add_security(app, document)
        app.openapi_schema = document
    return app.openapi_schema


def _responses(path: str, method: str, given: dict[str, Any], references: Any) -> dict[str, Any]:
    success = dict(given["200"])
    if path in ANSWERS:
        success["content"] = {_JSON: {"schema": references[ANSWERS[path], _WRITTEN]}}
    else:
        success["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in STREAMING:
        success["content"]["text/event-stream"] = {"schema": _EVENT}
    error = {_JSON: {"schema": references[answers.ErrorAnswer, _WRITTEN]}}
    statuses = _ERRORS if method == "post" else _ERRORS_OF_GET
    return {"200": success, **{status: {"description": _ERRORS[status], "content": error} for status in statuses}}


def _add_body(operation: dict[str, Any], schema: dict[str, Any]) -> None:
    operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    timeout = {"type": "number", "exclusiveMinimum": 0}
    description = "Seconds after which the request shall end; the server has a limit of its own"
    operation.setdefault("parameters", []).append(
        {"name": TIMEOUT_HEADER, "in": "header", "required": False, "schema": timeout, "description": description}
    )


def _add_security(app: FastAPI, document: dict[str, Any]) -> None:
    """Where there are keys, all but the public routes ask for one."""
    if app.state.context.keys.is_open:
        return
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path in PUBLIC_PATHS:
        for operation in document["paths"][path].values():
            operation["security"] = []
