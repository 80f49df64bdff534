"""Puts one application together: a loaded model, its engine, its metrics and the routes. Nothing at import time."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from models.artifact.format import qerve_version
from models.artifact.load import LoadedModel
from models.errors import QerveError
from models.llama.kv_cache import PagedKVCache
from models.llama.network import KVCache
from models.memory import return_freed_memory

from .access import PUBLIC_PATHS, AccessMiddleware
from .api import chat, completions, perplexity, system, tokenize
from .api.admission import install_engine_handlers
from .api.document import make_document
from .api.rank import RANK_HEADER, rank_policy
from .canary import make_canary
from .deps import TIMEOUT_HEADER, Context
from .engine.async_engine import AsyncEngine
from .engine.block_manager import BlockManager
from .engine.capacity import CacheLimits, CachePlan, plan_cache, step_tokens
from .engine.engine import Engine
from .engine.ngram import Drafter
from .engine.runner import Runner
from .engine.scheduler import Scheduler
from .errors import install_handlers
from .gpu import gpu_serving, read_device_memory
from .grammar import GrammarCompiler
from .key_limits import KeyLimits
from .keys import KeyRing
from .memory import available_bytes
from .memory_account import MemoryAccount
from .metrics import Metrics
from .metrics.readings import read_account, read_cache, read_context, read_engine
from .middleware import ErrorBoundaryMiddleware, HttpMetricsMiddleware, RequestIdMiddleware
from .model_info import ModelInfo
from .page.files import Page
from .page.routes import add_page
from .settings import Settings
from .token_speller import TokenSpeller

if TYPE_CHECKING:
    from .otlp import OtlpTelemetry

logger = logging.getLogger("qerve.server")

MIB = 1 << 20


def create_app(
    loaded: LoadedModel,
    settings: Settings,
    keys: KeyRing | None = None,
    *,
    new_metrics: Callable[[str, int], Metrics] = Metrics,
    interpreter_bytes: int | None = None,
) -> FastAPI:
    """The application that serves ``loaded``; its engine runs from the application's start to its shutdown.

    keys:              None: those of the settings
    new_metrics:       makes the metrics of the model's name and longest sequence
    interpreter_bytes: see ``MemoryAccount``

    Raises:
        QerveError: the cache or the steps that the settings ask for cannot be had, or the keys, or telemetry's extra.
    """
    started = time.perf_counter()
    model, tokenizer = loaded.model, loaded.tokenizer
    limits = CacheLimits(settings.max_num_seqs, settings.max_model_len, settings.kv_cache_memory)
    gpu = gpu_serving(model, settings, max((it.rank for it in loaded.manifest.linears.values()), default=0))
    limits = limits if gpu is None else gpu.limits(settings)
    plan = plan_cache(model.config, model.cache_block_bytes, model.device.type, available_bytes(model.device), limits)
    kv_cache = model.new_cache(plan.num_blocks)
    if gpu is not None and isinstance(kv_cache, PagedKVCache):
        gpu.record(kv_cache, plan.max_model_len)
    execution = loaded.execution.rows() | ({} if gpu is None else gpu.rows)
    info = ModelInfo(_model_name(settings), plan.max_model_len, loaded.manifest, loaded.selections, execution)
    metrics = new_metrics(info.name, plan.max_model_len)
    if gpu is not None:
        read_device_memory(metrics.read, gpu.memory)
    engine = _engine(loaded, settings, plan, kv_cache, metrics, interpreter_bytes=interpreter_bytes)
    keys = key_ring(settings) if keys is None else keys
    context = Context(
        settings,
        loaded,
        info,
        engine,
        metrics,
        max_prompt_chars=plan.max_model_len * tokenizer.max_token_chars,
        grammars=GrammarCompiler(tokenizer.to_json, tokenizer.eos_token_ids, model.config.vocab_size),
        speller=TokenSpeller(tokenizer),
        keys=keys,
        ranks=rank_policy(info, settings),
        canary=make_canary(engine, info, metrics, settings),
    )
    telemetry = _telemetry(settings, info)
    app = FastAPI(title="qerve", version=qerve_version(), lifespan=lambda _: _life(context, telemetry))
    app.state.context = context
    page = Page() if settings.page else None
    _add_routes(app, settings, page)
    # The last one added is the outermost: every response is counted and has its id, refused ones too.
    _add_access(app, settings, metrics, keys, PUBLIC_PATHS if page is None else PUBLIC_PATHS | page.paths)
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics, telemetry=telemetry)
    app.add_middleware(RequestIdMiddleware)
    read_context(metrics.read, context)
    if settings.metrics_compat == "vllm":
        metrics.export_vllm_names()
    metrics.phases |= {"load": loaded.load_seconds, "prepare": time.perf_counter() - started}
    return app


@asynccontextmanager
async def _life(context: Context, telemetry: "OtlpTelemetry | None") -> AsyncIterator[None]:
    """From the engine's start to its end; the first score of the probe comes before any request."""
    context.engine.start()
    watch: asyncio.Task[None] | None = None
    try:
        if context.canary is not None:
            await context.canary.check()
            return_freed_memory()
            context.metrics.phases["canary"] = context.canary.duration_seconds
            watch = asyncio.create_task(context.canary.watch())
        yield
    finally:
        if watch is not None:
            watch.cancel()
        await context.engine.stop()
        if telemetry is not None:
            await asyncio.to_thread(telemetry.close)


def _telemetry(settings: Settings, info: ModelInfo) -> "OtlpTelemetry | None":
    """Where the settings ask for it.

    Raises:
        QerveError: the extra is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from .otlp import open_otlp
    except ModuleNotFoundError as error:
        raise QerveError(f"otlp_endpoint needs {error.name}: pip install 'qerve[otlp]'") from error
    return open_otlp(settings.otlp_endpoint, info.name, (settings.host, settings.port))


def _add_routes(app: FastAPI, settings: Settings, page: Page | None) -> None:
    for module in (completions, chat, perplexity, tokenize, system):
        app.include_router(module.router)
    if settings.metrics_port is None:
        app.include_router(system.metrics_router)
    install_handlers(app)
    install_engine_handlers(app)
    if page is not None:
        add_page(app, page)
    app.openapi = lambda: make_document(app)  # type: ignore[method-assign]


def key_ring(settings: Settings) -> KeyRing:
    """The keys that ``settings`` name.

    Raises:
        QerveError: their file cannot be used.
    """
    key = settings.api_key
    return KeyRing(None if key is None else key.get_secret_value(), settings.api_keys_file)


def _model_name(settings: Settings) -> str:
    if settings.model_name is not None:
        return settings.model_name
    return "qerve" if settings.artifact is None else settings.artifact.resolve().name


def _engine(
    loaded: LoadedModel,
    settings: Settings,
    plan: CachePlan,
    kv_cache: KVCache,
    metrics: Metrics,
    *,
    interpreter_bytes: int | None,
) -> AsyncEngine:
    model = loaded.model
    blocks = BlockManager(plan.num_blocks, has_prefix_cache=settings.prefix_caching)
    budget = step_tokens(model.device.type, settings.max_num_seqs, settings.max_num_batched_tokens)
    num_drafted = settings.speculative_tokens
    drafter = Drafter(num_drafted, settings.ngram_max) if num_drafted else None
    scheduler = Scheduler(blocks, settings.max_num_seqs, budget, drafter)
    engine = Engine(Runner(model, kv_cache), scheduler, loaded.tokenizer, metrics)
    logger.info(
        "key-value cache: %d tokens in %.1f MiB; %d sequences at once, of up to %d tokens; %d tokens a step",
        kv_cache.num_slots,
        kv_cache.nbytes / MIB,
        settings.max_num_seqs,
        plan.max_model_len,
        budget,
    )
    capacity = settings.max_num_seqs + settings.max_queue
    async_engine = AsyncEngine(
        engine, capacity, settings.max_queued_tokens, settings.max_failed_steps, settings.step_timeout_seconds
    )
    read_engine(metrics.read, async_engine, scheduler)
    read_cache(metrics.read, kv_cache, scheduler, settings.kv_cache_dtype)
    read_account(metrics.read, MemoryAccount(loaded, kv_cache, interpreter_bytes))
    return async_engine


def _add_access(
    app: FastAPI, settings: Settings, metrics: Metrics, keys: KeyRing, public_paths: frozenset[str]
) -> None:
    """Keys with their limits everywhere but at ``public_paths``; around them errors, then CORS."""
    limits = KeyLimits(settings.max_concurrent_per_key, settings.requests_per_minute_per_key)
    app.add_middleware(AccessMiddleware, keys=keys, limits=limits, metrics=metrics, public_paths=public_paths)
    app.add_middleware(ErrorBoundaryMiddleware)
    if settings.cors_allow_origins:
        # Outside of the keys: a browser asks whether it may send one before it does.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", TIMEOUT_HEADER],
            expose_headers=["x-request-id", "retry-after", RANK_HEADER],
        )
