"""Our metrics under vLLM's names, so that dashboards and autoscalers made for it work.

Invariant: an alias never holds a number of its own; it is a row that says which of our metrics it renames, and which
labels stay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

Families = Mapping[str, Metric]


@dataclass(frozen=True, slots=True)
class Alias:
    """vLLM's name, ours, and our labels with vLLM's name for each. Samples that differ in other labels are added up."""

    name: str
    source: str
    labels: Mapping[str, str] = field(default_factory=dict)


ALIASES = (
    Alias("vllm:num_requests_running", "tenfold_requests_running"),
    Alias("vllm:num_requests_waiting", "tenfold_requests_waiting"),
    Alias("vllm:prefix_cache_queries", "tenfold_engine_prompt_tokens"),
    Alias("vllm:prefix_cache_hits", "tenfold_prefix_hit_tokens"),
    Alias("vllm:prompt_tokens", "tenfold_prompt_tokens"),
    Alias("vllm:generation_tokens", "tenfold_generated_tokens"),
    Alias("vllm:request_success", "tenfold_answers", {"finish_reason": "finished_reason"}),
    Alias("vllm:num_preemptions", "tenfold_preemptions"),
    Alias("vllm:time_to_first_token_seconds", "tenfold_time_to_first_token_seconds"),
    Alias("vllm:inter_token_latency_seconds", "tenfold_inter_token_latency_seconds"),
    Alias("vllm:request_time_per_output_token_seconds", "tenfold_time_per_output_token_seconds"),
    Alias("vllm:e2e_request_latency_seconds", "tenfold_request_seconds"),
    Alias("vllm:request_queue_time_seconds", "tenfold_queue_seconds"),
    Alias("vllm:request_prefill_time_seconds", "tenfold_prefill_seconds"),
    Alias("vllm:request_decode_time_seconds", "tenfold_decode_seconds"),
    Alias("vllm:admission_rejections", "tenfold_rejections", {"reason": "reason"}),
)


def aliases(families: Families) -> Iterator[Metric]:
    """ALIASES, and what is no mere renaming. families: ours, by name."""
    for alias in ALIASES:
        yield renamed(families[alias.source], alias)
    yield _usage(families)
    yield _cache(families)
    yield _adapters(families)


def renamed(source: Metric, alias: Alias) -> Metric:
    kept = {"model": "model_name", **alias.labels, "le": "le"}
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in source.samples:
        labels = tuple((theirs, sample.labels[ours]) for ours, theirs in kept.items() if ours in sample.labels)
        key = (alias.name + sample.name.removeprefix(source.name), labels)
        sums[key] = sums.get(key, 0.0) + sample.value
    metric = Metric(alias.name, source.documentation, source.type)
    metric.samples = [Sample(name, dict(labels), value) for (name, labels), value in sums.items()]
    return metric


def _usage(families: Families) -> Metric:
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", labels=("model_name",))
    used = {s.labels["model"]: s.value for s in families["tenfold_kv_pages"].samples if s.labels["state"] == "used"}
    for model, capacity in _capacities(families).items():
        usage.add_metric((model,), used[model] / max(1.0, capacity))
    return usage


def _cache(families: Families) -> Metric:
    labels = ("model_name", "block_size", "num_gpu_blocks")
    cache = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the KV cache.", labels=labels)
    sizes = {s.labels["model"]: s.labels["page_size"] for s in families["tenfold_model_info"].samples}
    for model, capacity in _capacities(families).items():
        cache.add_metric((model, sizes[model], str(int(capacity))), 1)
    return cache


def _adapters(families: Families) -> Metric:
    """There are no LoRA adapters here, which is what it says."""
    labels = ("model_name", "max_lora", "waiting_lora_adapters", "running_lora_adapters")
    info = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters in use: none.", labels=labels)
    for sample in families["tenfold_model_info"].samples:
        info.add_metric((sample.labels["model"], "0", "", ""), 0)
    return info


def _capacities(families: Families) -> dict[str, float]:
    return {s.labels["model"]: s.value for s in families["tenfold_kv_pages_capacity"].samples}
