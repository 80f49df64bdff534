"""Puts one application together: a loaded model, its engine, its metrics and the routes. Nothing at import time."""

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from models.artifact.format import qerve_version
from models.artifact.load import LoadedModel

from .access import PUBLIC_PATHS, AccessMiddleware
from .api import chat, completions, perplexity, system, tokenize
from .api.admission import install_engine_handlers
from .api.document import make_document
from .api.rank import RANK_HEADER, rank_policy
from .deps import TIMEOUT_HEADER, Context
from .engine.async_engine import AsyncEngine
from .engine.block_manager import BlockManager
from .engine.capacity import CacheLimits, CachePlan, plan_cache, step_tokens
from .engine.engine import Engine
from .engine.ngram import Drafter
from .engine.runner import Runner
from .engine.scheduler import Scheduler
from .errors import install_handlers
from .grammar import GrammarCompiler
from .key_limits import KeyLimits
from .keys import KeyRing
from .memory import available_bytes
from .metrics import WEIGHT_COMPONENTS, Metrics
from .middleware import ErrorBoundaryMiddleware, HttpMetricsMiddleware, RequestIdMiddleware
from .model_info import ModelInfo
from .page.files import Page
from .page.routes import add_page
from .settings import Settings
from .token_speller import TokenSpeller

logger = logging.getLogger("qerve.server")

MIB = 1 << 20


def create_app(loaded: LoadedModel, settings: Settings, keys: KeyRing | None = None) -> FastAPI:
    """The application that serves ``loaded``; its engine runs from the application's start to its shutdown.

    keys: None: those of the settings

    Raises:
        QerveError: the cache or the steps that the settings ask for cannot be had, or the keys.
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
    keys = key_ring(settings) if keys is None else keys
    ranks = rank_policy(info, settings)
    metrics.add_value("elastic_rank", "Rank that new requests get", lambda: ranks.rank_at(engine.num_waiting))
    app.state.context = Context(
        settings, loaded, info, engine, metrics, max_prompt_chars, grammars, speller, keys, ranks
    )
    for module in (completions, chat, perplexity, tokenize, system):
        app.include_router(module.router)
    install_handlers(app)
    install_engine_handlers(app)
    if settings.page:
        add_page(app)
    _add_middleware(app, settings, metrics, keys)
    app.openapi = lambda: make_document(app)  # type: ignore[method-assign]
    seconds = {"load": loaded.load_seconds, "prepare": time.perf_counter() - started}
    _describe_model(metrics, loaded, info, seconds)
    return app


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


def _engine(loaded: LoadedModel, settings: Settings, plan: CachePlan, metrics: Metrics) -> AsyncEngine:
    model = loaded.model
    kv_cache = model.new_cache(plan.num_blocks)
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
    metrics.add_value("throughput_tokens_per_second", "Recent speed", lambda: engine.throughput.tokens_per_second)
    capacity = settings.max_num_seqs + settings.max_queue
    async_engine = AsyncEngine(
        engine, capacity, settings.max_queued_tokens, settings.max_failed_steps, settings.step_timeout_seconds
    )
    admission = async_engine.admission
    metrics.add_value("num_queued_tokens", "Prompt tokens that wait", lambda: admission.num_queued_tokens)
    return async_engine


def _add_middleware(app: FastAPI, settings: Settings, metrics: Metrics, keys: KeyRing) -> None:
    """The last one added is the outermost: every response is counted and has its id, refused ones too."""
    public_paths = PUBLIC_PATHS | (Page().paths if settings.page else frozenset())
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
