"""Counters and histograms in Prometheus' format, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from passlm.serve.protocol import Event, Failed, Job, WorkerState

_LATENCY_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)
_INTERVAL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_TOKEN_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 10, 13)


class WorkerCollector(Collector):
    """Collects the worker's state at each scrape.

    Args:
        state: returns the state.
    """

    def __init__(self, state: Callable[[], WorkerState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        state = self._state()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("ready", "1 if passes can be run", state.ready),
            ("running_texts", "sequences in the batch", state.running),
            (
                "waiting_texts",
                "sequences that wait or whose prompt is being prefilled",
                state.waiting,
            ),
            ("cached_tokens", "tokens in the KV cache", state.cached_tokens),
            ("cache_capacity_tokens", "maximum number of tokens in the KV cache", state.max_cache),
        )
        counters: tuple[tuple[str, str, float], ...] = (
            ("passes", "forward passes of the batch", state.passes),
            ("pass_seconds", "seconds spent in forward passes", state.pass_seconds),
            ("faults", "internal errors in steps and sequences", state.faults),
        )
        for name, help_text, value in gauges:
            yield GaugeMetricFamily(f"passlm_{name}", help_text, value)
        for name, help_text, value in counters:
            yield CounterMetricFamily(f"passlm_{name}", help_text, value)


class Metrics:
    """All metrics of one server.

    Args:
        state: returns the state of the worker.
    """

    def __init__(self, state: Callable[[], WorkerState]) -> None:
        registry = self.registry = CollectorRegistry()
        registry.register(WorkerCollector(state))
        self.requests = Counter(
            "passlm_requests", "requests answered", ("path", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "passlm_request_seconds",
            "seconds until the last byte of the response",
            ("path",),
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.first_token = Histogram(
            "passlm_time_to_first_token_seconds",
            "seconds from the request to the first token of a sequence",
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.between_tokens = Histogram(
            "passlm_time_between_tokens_seconds",
            "seconds from token to token of a sequence; the time of a pass is divided equally "
            "between its tokens",
            registry=registry,
            buckets=_INTERVAL_BUCKETS,
        )
        self.tokens_per_pass = Histogram(
            "passlm_tokens_per_pass",
            "tokens per pass and sequence",
            registry=registry,
            buckets=_TOKEN_BUCKETS,
        )
        self.texts = Counter(
            "passlm_texts", "finished sequences, by reason", ("reason",), registry=registry
        )
        self.prompt_tokens = Counter("passlm_prompt_tokens", "prompt tokens", registry=registry)
        self.reused_tokens = Counter(
            "passlm_reused_prompt_tokens", "prompt tokens found in the KV cache", registry=registry
        )
        self.tokens = Counter("passlm_tokens", "generated tokens", registry=registry)
        self.judged = Counter(
            "passlm_judged", "candidates verified, by position", ("position",), registry=registry
        )
        self.accepted = Counter(
            "passlm_accepted", "candidates accepted, by position", ("position",), registry=registry
        )

    def exposition(self) -> tuple[bytes, str]:
        """Return the metrics in the text format of Prometheus, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a completed request and its duration."""
        self.requests.labels(path, str(status)).inc()
        self.request_seconds.labels(path).observe(seconds)


class RequestMetrics:
    """Counts the events of one request, also after its client has disconnected.

    Args:
        metrics: the metrics to update.
        started: time of arrival of the request, by `time.perf_counter`.
    """

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics = metrics
        self._started = started
        self._last: dict[int, float] = {}  # time of each sequence's latest token

    def count_event(self, job: Job, event: Event, at: float) -> None:
        """Count an event.

        Args:
            job: the sequence that it belongs to.
            event: the event.
            at: its time, by `time.perf_counter`.
        """
        if isinstance(event, Failed):
            self._count_end(job, "failed")
            return
        if event.tokens:
            self._count_tokens(job.index, len(event.tokens), at)
        if event.finish_reason is not None:
            self._count_end(job, event.finish_reason)

    def _count_tokens(self, index: int, tokens: int, at: float) -> None:
        metrics, last = self._metrics, self._last.get(index)
        if last is None:
            metrics.first_token.observe(at - self._started)
        else:
            for _ in range(tokens):
                metrics.between_tokens.observe((at - last) / tokens)
        self._last[index] = at
        metrics.tokens.inc(tokens)
        metrics.tokens_per_pass.observe(tokens)

    def _count_end(self, job: Job, reason: str) -> None:
        metrics, stats = self._metrics, job.stats
        metrics.texts.labels(reason).inc()
        metrics.prompt_tokens.inc(stats.prompt_tokens)
        metrics.reused_tokens.inc(job.reused)
        for position, judged in enumerate(stats.judged_by_position):
            metrics.judged.labels(str(position + 1)).inc(judged)
            metrics.accepted.labels(str(position + 1)).inc(stats.accepted_by_position[position])
