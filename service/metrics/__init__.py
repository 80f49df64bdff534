"""Prometheus metrics of the service: ``Metrics`` counts and reads, ``CATALOGUE`` says what there is."""

from .catalogue import (
    CATALOGUE,
    REQUEST_BUCKETS,
    TOKEN_BUCKETS,
    TTFT_BUCKETS,
    length_buckets,
)
from .metrics import Metrics

__all__ = ["CATALOGUE", "REQUEST_BUCKETS", "TOKEN_BUCKETS", "TTFT_BUCKETS", "Metrics", "length_buckets"]
