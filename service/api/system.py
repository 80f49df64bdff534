"""Models, health and metrics."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder

from ..deps import ContextDep
from ..errors import ApiError
from .admission import RETRY_SECONDS

router = APIRouter()
metrics_router = APIRouter()


@router.get("/v1/models", summary="List models")
async def list_models(context: ContextDep) -> dict[str, Any]:
    """The one model that is served here."""
    return {"object": "list", "data": [context.info.listing()]}


@router.get("/v1/models/{model_id:path}", summary="Describe a model")
async def get_model(context: ContextDep, model_id: str) -> dict[str, Any]:
    """How the model was made, and which backends run it."""
    context.check_model(model_id)
    return context.info.card()


@router.get("/health/live", summary="Is the process alive?")
async def live() -> dict[str, str]:
    """200 as long as the process answers at all."""
    return {"status": "ok"}


@router.get("/health/ready", summary="May requests be sent here?")
async def ready(context: ContextDep) -> JSONResponse:
    """200 while requests are taken; 503 while the model loads, the server shuts down, the engine has failed, or the
    model does not predict the artifact's probe as it did when it was built."""
    problem = context.problem
    if problem is not None:
        raise ApiError(503, problem, headers=RETRY_SECONDS)
    return JSONResponse({"status": "ok"})


@metrics_router.get("/metrics", summary="Prometheus metrics")
def metrics(request: Request, context: ContextDep) -> Response:
    """All metrics, in the format that the scraper asks for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(context.metrics.registry), headers={"Content-Type": content_type})
