"""Prometheus metrics; vLLM's names where the meaning is the same, so its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from winnow.serve.job import Job
from winnow.serve.worker import Worker

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class _Live(Collector):
    """Read from the worker when a scrape comes."""

    def __init__(self, worker: Worker, model: str) -> None:
        self._worker = worker
        self._model = model

    def collect(self) -> Iterator[Metric]:
        snapshot, counters = self._worker.snapshot, self._worker.counters
        waiting, running = self._worker.waiting(), self._worker.running()
        held = sum(snapshot["kv_bytes"].values())
        yield self._gauge("vllm:num_requests_running", "Requests that run.", len(running))
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", len(waiting))
        space = self._worker.swap.space
        swapped = snapshot["kv_elsewhere"].get("swap/packed", 0)
        waits = "Preempted requests whose entries wait in host memory."
        yield self._gauge("vllm:num_requests_swapped", waits, snapshot["swapped"])
        part = swapped / space if space else 0.0
        yield self._gauge("vllm:cpu_cache_usage_perc", "Part of the swap space in use; 1 is all.", part)
        usage = held / self._worker.memory.limit
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV memory in use; 1 is all.", usage)
        yield self._gauge("winnow:kv_limit_bytes", "KV memory that may be used.", self._worker.memory.limit)
        peak = self._worker.memory.peak
        yield self._gauge("winnow:kv_peak_bytes", "Most KV bytes held at a time.", peak)
        kinds = GaugeMetricFamily(
            "winnow:kv_bytes", "KV bytes held, by tier and codec.", labels=["model_name", "tier", "codec"]
        )
        for kind, count in {**snapshot["kv_bytes"], **snapshot["kv_elsewhere"]}.items():
            tier, _, codec = kind.partition("/")
            kinds.add_metric([self._model, tier, codec], count)
        yield kinds
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens of requests that started.", counters.prompt_tokens),
            ("vllm:generation_tokens", "Tokens drawn.", counters.generated_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the pool.", counters.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the pool.", counters.reused_tokens),
            ("vllm:num_preemptions", "Requests sent to swap or disk to make room.", counters.preemptions),
            ("winnow:steps", "Engine steps.", counters.steps),
        ):
            yield self._counter(name, text, value)
        ends = CounterMetricFamily(
            "winnow:requests", "Requests that ended.", labels=["model_name", "outcome"]
        )
        for outcome, count in list(counters.ended.items()):
            ends.add_metric([self._model, outcome], count)
        yield ends

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)

        self._first = histogram("vllm:time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self._between = histogram(
            "vllm:inter_token_latency_seconds", "Mean time between tokens of a request.", _TOKEN_SECONDS
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Until the last token.", _SECONDS)
        self._queued = histogram("vllm:request_queue_time_seconds", "Until a request starts.", _SECONDS)

    def attach(self, worker: Worker) -> None:
        """Also show what ``worker`` does at the time of a scrape."""
        self._registry.register(_Live(worker, self._model))

    def ended(self, job: Job) -> None:
        """Count a job that has ended."""
        if job.outcome != "finished":
            return
        label = self._model
        self._queued.labels(label).observe(job.started - job.created)
        if job.first_token:  # a text that was only read has none
            self._first.labels(label).observe(job.first_token - job.created)
        self._whole.labels(label).observe(job.ended_at - job.created)
        steps = job.generated / job.params.n - 1
        if steps > 0:
            self._between.labels(label).observe((job.last_token - job.first_token) / steps)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
