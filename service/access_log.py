"""One line per request: what it asked for and how it went, never what was in it."""

import logging
import time
from typing import Any

from .request_record import RequestRecord

logger = logging.getLogger("qerve.access")

UNMATCHED = "unmatched"
"""In the place of a route's template where there is no such route."""


def log_access(record: RequestRecord, method: str, route: str, status: int) -> None:
    """Log a finished request; ``route`` is a template, never the path a client made up."""
    # Health checks come every few seconds and say nothing that the metrics do not.
    level = logging.DEBUG if route.startswith("/health/") and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": method,
        "route": route,
        "status": status,
        "duration_seconds": round(time.monotonic() - record.started_seconds, 6),
        "key_id": record.key_id,
    }
    generation = record.generation
    if generation is not None:
        fields["prompt_tokens"] = generation.num_prompt_tokens
        fields["output_tokens"] = generation.num_output_tokens
        if generation.first_output_seconds is not None:
            fields["ttft_seconds"] = round(generation.first_output_seconds - generation.arrival_seconds, 6)
        if generation.finish_reasons:
            fields["finish_reasons"] = ",".join(generation.finish_reasons)
    text = " ".join(f"{name}={value}" for name, value in fields.items() if name not in {"method", "route", "status"})
    logger.log(level, "%s %s %s %s", method, route, status, text, extra={"fields": fields})
