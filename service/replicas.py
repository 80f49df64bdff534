"""Replicas of the service on a Ray cluster: the same application, one engine in each, behind Ray Serve's proxy.

    serve run service.replicas:app artifact=artifacts/NAME num_replicas=2 num_cpus=1
    serve deploy deploy/ray/qerve.yaml

Of two replicas that it draws, Ray sends a request to the one with fewer in flight (power of two choices). It starts and
stops replicas by the number of requests in flight, and starts one anew that has died or whose engine has failed.
``/metrics`` gives the samples of all replicas, told apart by the label ``replica``. Needs the extra ``ray``.
"""

import contextlib
from pathlib import Path
from typing import Any, Self

from fastapi import FastAPI
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from models.errors import QerveError
from models.memory import share_one_heap

from .app import key_ring
from .configuration import read_settings
from .deps import Context
from .logs import logging_to_stderr
from .process import load_app
from .replica_metrics import MergedRegistry
from .settings import Settings

DEPLOYMENT = "qerve"
SPARE_REQUESTS = 32
"""Requests that a replica gets beyond those which it runs or lets wait: it refuses them itself, with a 429 that says
when to come back, and answers what asks for its health or metrics."""
GATHER_SECONDS = 5.0


class ReplicaOptions(BaseModel):
    """Arguments of the application.

    artifact:     directory, at the same place on every machine of the cluster
    num_replicas: fixed number; None: between ``min_replicas`` and ``max_replicas``
    target_ongoing_requests: requests in flight per replica that Ray aims for; None: as many as one runs at once
    num_cpus:     processors of a replica, and threads of its kernels
    num_gpus:     GPUs of a replica
    settings:     of the service, as ``qerve serve`` takes them; they go over ``QERVE_*`` variables of the replicas
    """

    model_config = ConfigDict(extra="forbid")

    artifact: Path
    num_replicas: int | None = Field(default=None, ge=1, le=1000)
    min_replicas: int = Field(default=1, ge=1, le=1000)
    max_replicas: int = Field(default=4, ge=1, le=1000)
    target_ongoing_requests: float | None = Field(default=None, gt=0)
    num_cpus: int = Field(default=1, ge=1, le=1024)
    num_gpus: float = Field(default=0, ge=0, le=8)
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    def read_settings(self) -> Settings:
        """Settings of one replica.

        Raises:
            QerveError: a value that is not allowed, with its name and where it was found.
        """
        return read_settings({**self.settings, "artifact": str(self.artifact)})


def app(options: ReplicaOptions) -> serve.Application:
    """The application for ``serve run`` and ``serve deploy``.

    Raises:
        QerveError: a setting that is not allowed.
    """
    settings = options.read_settings()
    target = options.target_ongoing_requests or settings.max_num_seqs
    scaling = {
        "min_replicas": options.min_replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": target,
    }
    deployment = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=options.num_replicas,
        autoscaling_config=None if options.num_replicas else scaling,
        max_ongoing_requests=settings.max_num_seqs + settings.max_queue + SPARE_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_seconds,
        ray_actor_options={
            "num_cpus": options.num_cpus,
            "num_gpus": options.num_gpus,
            "runtime_env": {"env_vars": {"QERVE_NUM_THREADS": str(options.num_cpus), "OMP_WAIT_POLICY": "passive"}},
        },
    )
    return deployment.bind(options.model_dump(mode="json"))


@serve.ingress()
class Replica:
    """One process with one engine. Ray calls what is public here, and sends requests to the application.

    Args:
        options: of the application, in JSON's types.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        share_one_heap()
        self._settings = ReplicaOptions.model_validate(options).read_settings()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(logging_to_stderr(self._settings.log_level, self._settings.log_format))
        self._app = load_app(self._settings, key_ring(self._settings))
        self._context.metrics.exposed = MergedRegistry(self._gather)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What answers requests; Ray runs its lifespan, which starts and stops the engine."""
        return self._app

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica whose engine has failed.

        Raises:
            QerveError: it has.
        """
        if self._context.engine.failure is not None:
            raise QerveError(f"the engine has failed: {self._context.engine.failure}")

    def own_metrics(self) -> tuple[str, str]:
        """This replica's name, and its metrics in Prometheus's text format."""
        replica = serve.get_replica_context().replica_id.unique_id
        return replica, generate_latest(self._context.metrics.registry).decode()

    def _gather(self) -> dict[str, str]:
        """The metrics of all replicas by name; of this one alone where the others do not answer in time.

        Called in a thread: one scrape reaches one replica, which asks all of them.
        """
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            answers = handle.broadcast("own_metrics").results(timeout_s=GATHER_SECONDS, return_exceptions=True)
        except TimeoutError:
            answers = [self.own_metrics()]
        return dict(answer for answer in answers if not isinstance(answer, BaseException))

    @property
    def _context(self) -> Context:
        context: Context = self._app.state.context
        return context
