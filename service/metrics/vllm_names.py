"""The metrics that tools made for vLLM read, under its names: its Grafana dashboards, llm-d's endpoint picker, KEDA.

Only names that mean the same here. What vLLM has and this server does not (LoRA, sleep, caches that move) is left out.
"""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .catalogue import PREFIX

VLLM_PREFIX = "vllm:"
VLLM_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "prompt_tokens_by_source",
    "generation_tokens",
    "request_success",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_prefill_kv_computed_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_params_n",
    "iteration_tokens_total",
)


class VllmNames(Collector):
    """What ``collectors`` (by name, without the prefix) give, once more under vLLM's names."""

    def __init__(self, collectors: Mapping[str, Collector]) -> None:
        self._collectors = collectors

    def describe(self) -> Iterator[Metric]:
        """Nothing: no name here can be taken twice, and asking for them would read every gauge."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        for name in VLLM_NAMES:
            collector = self._collectors.get(name)
            for family in () if collector is None else collector.collect():
                yield _renamed(family)


def _renamed(family: Metric) -> Metric:
    renamed = Metric(_vllm_name(family.name), family.documentation, family.type)
    renamed.samples = [sample._replace(name=_vllm_name(sample.name)) for sample in family.samples]
    return renamed


def _vllm_name(name: str) -> str:
    return VLLM_PREFIX + name.removeprefix(PREFIX)
