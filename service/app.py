"""Puts one application together: a loaded model, its engine, its metrics and the routes. Nothing at import time."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from models.artifact.format import qerve_version
from models.artifact.load import LoadedModel

from .api import chat, completions, perplexity, system
from .api.schemas import ChatBody, CompletionBody, PerplexityBody
from .deps import Context
from .engine.async_engine import AsyncEngine
from .engine.block_manager import BlockManager
from .engine.capacity import CacheLimits, CachePlan, plan_cache, step_tokens
from .engine.engine import Engine
from .engine.ngram import Drafter
from .engine.runner import Runner
from .engine.scheduler import Scheduler
from .errors import install_handlers
from .grammar import GrammarCompiler
from .memory import available_bytes
from .metrics import WEIGHT_COMPONENTS, Metrics
from .middleware import ApiKeyMiddleware, ErrorBoundaryMiddleware, HttpMetricsMiddleware, RequestIdMiddleware
from .model_info import ModelInfo
from .settings import Settings
from .token_speller import TokenSpeller

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/perplexity": PerplexityBody,
}


def create_app(loaded: LoadedModel, settings: Settings) -> FastAPI:
    """The application that serves ``loaded``; its engine runs from the application's start to its shutdown.

    Raises:
        QerveError: the cache or the steps that the settings ask for cannot be had.
    """
    started = time.perf_counter()
    model = loaded.model
    limits = CacheLimits(settings.max_num_seqs, settings.max_model_len, settings.kv_cache_memory)
    plan = plan_cache(model.config, model.cache_block_bytes, model.device.type, available_bytes(model.device), limits)
    info = ModelInfo(
        _model_name(settings), plan.max_model_len, loaded.manifest, loaded.selections, loaded.execution.rows()
    )
    metrics = Metrics(info.name, plan.max_model_len)
    engine = _engine(loaded, settings, plan, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(title="qerve", version=qerve_version(), lifespan=lifespan)
    max_prompt_chars = plan.max_model_len * loaded.tokenizer.max_token_chars
    tokenizer = loaded.tokenizer
    grammars = GrammarCompiler(tokenizer.to_json, tokenizer.eos_token_ids, model.config.vocab_size)
    speller = TokenSpeller(tokenizer)
    app.state.context = Context(settings, loaded, info, engine, metrics, max_prompt_chars, grammars, speller)
    for module in (completions, chat, perplexity, system):
        app.include_router(module.router)
    install_handlers(app)
    _add_middleware(app, settings, metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    seconds = {"load": loaded.load_seconds, "prepare": time.perf_counter() - started}
    _describe_model(metrics, loaded, info, seconds)
    return app


def _model_name(settings: Settings) -> str:
    if settings.model_name is not None:
        return settings.model_name
    return "qerve" if settings.artifact is None else settings.artifact.resolve().name


def _engine(loaded: LoadedModel, settings: Settings, plan: CachePlan, metrics: Metrics) -> AsyncEngine:
    model = loaded.model
    kv_cache = model.new_cache(plan.num_blocks)
    blocks = BlockManager(plan.num_blocks, has_prefix_cache=settings.prefix_caching)
    budget = step_tokens(model.device.type, settings.max_num_seqs, settings.max_num_batched_tokens)
    num_drafted = settings.speculative_tokens
    drafter = Drafter(num_drafted, settings.ngram_max) if num_drafted else None
    scheduler = Scheduler(blocks, settings.max_num_seqs, budget, drafter)
    engine = Engine(Runner(model, kv_cache), scheduler, loaded.tokenizer, metrics)
    block_bytes = kv_cache.nbytes / plan.num_blocks
    numbers_of_blocks: dict[str, Callable[[], int]] = {
        "capacity": lambda: blocks.num_blocks,
        "used": lambda: blocks.num_used_blocks,
        "cached": lambda: blocks.num_cached_blocks,
    }
    metrics.add_value("num_requests_running", "Sequences being generated", lambda: len(scheduler.running))
    metrics.add_value("num_requests_waiting", "Sequences that wait for a seat", lambda: len(scheduler.waiting))
    metrics.add_value("kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1", lambda: blocks.usage)
    metrics.add_group(
        "kv_cache_bytes",
        "Key-value cache: all of it, what requests hold, and what is kept of former ones until that is wanted",
        lambda: [({"kind": kind}, block_bytes * number()) for kind, number in numbers_of_blocks.items()],
    )
    return AsyncEngine(engine, settings.max_num_seqs + settings.max_queue)


def _add_middleware(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """The last one added is the outermost: every response is counted and has its id, refused ones too."""
    if settings.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key.get_secret_value())
    app.add_middleware(ErrorBoundaryMiddleware)
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics)
    app.add_middleware(RequestIdMiddleware)


def _describe_model(metrics: Metrics, loaded: LoadedModel, info: ModelInfo, startup_seconds: dict[str, float]) -> None:
    manifest = loaded.manifest
    scheme = info.schemes[0] if info.schemes else {}
    labels = {
        "version": qerve_version(),
        "kernel": ",".join(sorted(info.backends)),
        "artifact_sha256": manifest.manifest_sha256,
        "method": manifest.build.reconstruct.method,
        "scheme": f"w{scheme.get('num_bits', 16)}g{scheme.get('group_size', -1)}",
        "rank": str(info.rank),
    }
    weights = [({"component": WEIGHT_COMPONENTS.get(name, name)}, size) for name, size in loaded.weight_bytes.items()]
    resident = [({"backend": name}, size) for name, size in loaded.resident_bytes.items()]
    phases = [({"phase": phase}, seconds) for phase, seconds in startup_seconds.items()]
    add = metrics.add_constants
    add("build_info", "What is served and how, in labels; always 1", [(labels, 1)])
    add("model_weight_bytes", "Weights as stored in the artifact, by component", weights)
    add("model_resident_bytes", "Weights as kept in memory, by the kernel backend that keeps them", resident)
    add(
        "model_effective_bits_per_weight",
        "Stored bits per weight of the linear layers",
        [({}, manifest.effective_bits)],
    )
    add("model_load_seconds", "From opening the artifact to the network built", [({}, loaded.load_seconds)])
    add("startup_seconds", "Time from start to ready, by phase", phases)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the request bodies, which are read by our own code and so unknown to it."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        references, definitions = models_json_schema(
            [(body, "validation") for body in BODIES.values()], ref_template="#/components/schemas/{model}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        for path, body in BODIES.items():
            content = {"application/json": {"schema": references[body, "validation"]}}
            document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = document
    return app.openapi_schema
