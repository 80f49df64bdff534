"""The quality canary: a text of the build's holdout, scored as it is served, against what the build measured on it.

Wrong kernels, flipped bits and the wrong settings show in no latency and raise no exception; they show here. The probe
is scored before the server is ready, and again from time to time while no request runs or waits. It holds no seat, runs
in steps of at most 64 tokens, and gives way as soon as a request is admitted, which waits for one such step at most.

While its perplexity is out of tolerance, /health/ready is 503 and says why. Requests that come all the same are
answered: who has no other server is better off with a doubtful answer than with none, and it is for them to decide.
"""

import asyncio
import logging
import math
import time
import uuid
from typing import Literal

from models.artifact.format import Probe

from .engine.async_engine import AsyncEngine
from .engine.generation import GaveWayError, Generation
from .engine.request import FinishReason, Request, SamplingParams
from .metrics import Metrics
from .model_info import ModelInfo
from .settings import Settings

logger = logging.getLogger("qerve.canary")

RETRY_SECONDS = 5.0
"""After an attempt that found the engine at work, or gave way."""
Result = Literal["ok", "out_of_tolerance", "failed", "aborted"]


def make_canary(engine: AsyncEngine, info: ModelInfo, metrics: Metrics, settings: Settings) -> "Canary | None":
    """The canary of the model that ``engine`` runs; None, and the log says why: it is off, or there is no probe."""
    probe = info.manifest.probe
    if not settings.canary:
        logger.info("no canary: it is turned off")
    elif probe is None:
        logger.info("no canary: the artifact holds no probe, as its build had no holdout")
    elif len(probe.token_ids) > info.max_model_len:
        logger.warning(
            "no canary: the artifact's probe of %d tokens does not fit max_model_len %d",
            len(probe.token_ids),
            info.max_model_len,
        )
    else:
        return Canary(
            engine,
            probe,
            metrics,
            interval_seconds=settings.canary_interval_seconds,
            tolerance=settings.canary_tolerance,
            patience_seconds=settings.step_timeout_seconds,
        )
    return None


class Canary:
    """Scores ``probe`` with ``engine``; used on the event loop only.

    interval_seconds: between two scores; 0: the first one is all
    tolerance:        how far the perplexity may be from the expected one, as a share of that
    patience_seconds: after which a score that does not come counts as failed
    perplexity:       as served, when it was last scored; NaN: the engine could not; None: not scored yet
    checked_seconds:  when that was, in Unix time
    duration_seconds: how long it took
    """

    def __init__(
        self,
        engine: AsyncEngine,
        probe: Probe,
        metrics: Metrics,
        *,
        interval_seconds: float,
        tolerance: float,
        patience_seconds: float,
    ) -> None:
        self.expected_perplexity = math.exp(probe.quantized_nll)
        self.tolerance = tolerance
        self.perplexity: float | None = None
        self.checked_seconds = 0.0
        self.duration_seconds = 0.0
        self._engine = engine
        self._token_ids = list(probe.token_ids)
        self._metrics = metrics
        self._interval_seconds = interval_seconds
        self._patience_seconds = patience_seconds
        self._add_readings()

    @property
    def is_ok(self) -> bool:
        """The last score was within its tolerance, or there is none yet."""
        if self.perplexity is None:
            return True
        return abs(self.perplexity / self.expected_perplexity - 1.0) <= self.tolerance

    @property
    def problem(self) -> str | None:
        """Why no requests should be sent here; None: nothing is wrong."""
        if self.is_ok or self.perplexity is None:
            return None
        return (
            f"The perplexity of the artifact's probe is {self.perplexity:.4g}; the build measured "
            f"{self.expected_perplexity:.4g}, from which it may differ by {self.tolerance:.0%}."
        )

    async def check(self) -> Result:
        """Score the probe now, if the engine has nothing else to do."""
        result = await self._check()
        self._metrics.canary_checked(result)
        return result

    async def watch(self) -> None:
        """Score it again and again, until cancelled."""
        while self._interval_seconds:
            await asyncio.sleep(self._interval_seconds)
            try:
                while await self.check() == "aborted":
                    await asyncio.sleep(RETRY_SECONDS)
            except Exception:  # the next one may go better
                logger.exception("the probe could not be scored")

    async def _check(self) -> Result:
        was_ok, started = self.is_ok, time.perf_counter()
        with self._engine.background() as call:
            if call is None:
                return "aborted"
            try:
                async with asyncio.timeout(self._patience_seconds):
                    self.perplexity = await self._score(call)
            except GaveWayError:
                return "aborted"
            except TimeoutError:
                logger.error("the probe is not scored after %g seconds", self._patience_seconds)
                self.perplexity = math.nan
        self.checked_seconds, self.duration_seconds = time.time(), time.perf_counter() - started
        self._report(was_ok)
        if math.isnan(self.perplexity):
            return "failed"
        return "ok" if self.is_ok else "out_of_tolerance"

    async def _score(self, call: Generation) -> float:
        """Perplexity of the probe at full rank; NaN where the engine cannot tell.

        Raises:
            GaveWayError: another call came.
        """
        params = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
        call.start([Request(uuid.uuid4().hex, self._token_ids, params, call.arrival_seconds, is_background=True)])
        nlls: list[float] = []
        async for output in call.outputs():
            if output.finish_reason is FinishReason.ERROR:
                logger.error("the probe cannot be scored: %s", output.error)
                return math.nan
            nlls += [-score.logprob for score in output.prompt_logprobs]
        return math.exp(min(math.fsum(nlls) / len(nlls), 700.0))

    def _report(self, was_ok: bool) -> None:
        if not self.is_ok:
            logger.error("the server is not ready: %s", self.problem)
        elif not was_ok:
            logger.warning("the server is ready again: the perplexity of its probe is %.4g", self.perplexity)
        else:
            logger.debug("the perplexity of the probe is %.4g", self.perplexity)

    def _add_readings(self) -> None:
        read = self._metrics.read
        read("canary_ok", lambda: [({}, self.is_ok)])
        read("canary_perplexity", lambda: [] if self.perplexity is None else [({}, self.perplexity)])
        read("canary_expected_perplexity", lambda: [({}, self.expected_perplexity)])
        read("canary_tolerance", lambda: [({}, self.tolerance)])
        read("canary_timestamp_seconds", lambda: [({}, self.checked_seconds)] if self.checked_seconds else [])
        read("canary_duration_seconds", lambda: [({}, self.duration_seconds)] if self.checked_seconds else [])
