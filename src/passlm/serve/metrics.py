"""What the operator can read: counts and times in Prometheus' format, in an own registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from passlm.serve.protocol import Event, Failed, Job, WorkerState

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 13)


class WorkerCollector(Collector):
    """The worker's own figures, asked for when somebody looks.

    Args:
        state: gives them.
    """

    def __init__(self, state: Callable[[], WorkerState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        state = self._state()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("ready", "1 if passes can be run", state.ready),
            ("running_texts", "texts in the batch", state.running),
            ("waiting_texts", "texts that wait, or whose prompt is being read", state.waiting),
            ("cached_tokens", "tokens whose keys and values are held", state.cached_tokens),
            ("cache_capacity_tokens", "the most there may be of them", state.max_cache),
        )
        counters: tuple[tuple[str, str, float], ...] = (
            ("passes", "forward passes of the batch", state.passes),
            ("pass_seconds", "spent in them", state.pass_seconds),
            ("faults", "steps and texts that failed", state.faults),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"passlm_{name}", text, value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"passlm_{name}", text, value)


class Metrics:
    """All figures of one server.

    Args:
        state: of its worker.
    """

    def __init__(self, state: Callable[[], WorkerState]) -> None:
        own = self.registry = CollectorRegistry()
        own.register(WorkerCollector(state))
        self.requests = Counter(
            "passlm_requests", "requests answered", ("path", "status"), registry=own
        )
        self.request_seconds = Histogram(
            "passlm_request_seconds", "until the last byte", ("path",), registry=own, buckets=_WAITS
        )
        self.first_token = Histogram(
            "passlm_time_to_first_token_seconds",
            "from a request to its text's first token",
            registry=own,
            buckets=_WAITS,
        )
        self.between_tokens = Histogram(
            "passlm_time_between_tokens_seconds",
            "from token to token of a text; those of one pass share its time",
            registry=own,
            buckets=_BETWEEN,
        )
        self.tokens_per_pass = Histogram(
            "passlm_tokens_per_pass", "tokens a pass gave a text", registry=own, buckets=_BLOCKS
        )
        self.texts = Counter("passlm_texts", "texts, by why they ended", ("reason",), registry=own)
        self.prompt_tokens = Counter("passlm_prompt_tokens", "tokens of prompts", registry=own)
        self.reused_tokens = Counter(
            "passlm_reused_prompt_tokens", "of these, found in the cache", registry=own
        )
        self.tokens = Counter("passlm_tokens", "tokens written", registry=own)
        self.judged = Counter(
            "passlm_judged", "candidates reached, by position", ("position",), registry=own
        )
        self.accepted = Counter(
            "passlm_accepted", "candidates accepted, by position", ("position",), registry=own
        )

    def exposition(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(path, str(status)).inc()
        self.request_seconds.labels(path).observe(seconds)


class RequestMetrics:
    """Counts what comes of one request, whether or not anybody still listens.

    Args:
        metrics: where to.
        begun: when the request came, by `time.perf_counter`.
    """

    def __init__(self, metrics: Metrics, begun: float) -> None:
        self._metrics = metrics
        self._begun = begun
        self._last: dict[int, float] = {}  # when each text's latest token came

    def event(self, job: Job, event: Event, at: float) -> None:
        """Something came.

        Args:
            job: the text that it belongs to.
            event: what.
            at: when, by `time.perf_counter`.
        """
        if isinstance(event, Failed):
            self._ended(job, "failed")
            return
        if event.tokens:
            self._tokens(job.index, len(event.tokens), at)
        if event.finish_reason is not None:
            self._ended(job, event.finish_reason)

    def _tokens(self, index: int, tokens: int, at: float) -> None:
        own, last = self._metrics, self._last.get(index)
        if last is None:
            own.first_token.observe(at - self._begun)
        else:
            for _ in range(tokens):
                own.between_tokens.observe((at - last) / tokens)
        self._last[index] = at
        own.tokens.inc(tokens)
        own.tokens_per_pass.observe(tokens)

    def _ended(self, job: Job, reason: str) -> None:
        own, stats = self._metrics, job.stats
        own.texts.labels(reason).inc()
        own.prompt_tokens.inc(stats.prompt_tokens)
        own.reused_tokens.inc(job.reused)
        for position, judged in enumerate(stats.judged_by_position):
            own.judged.labels(str(position + 1)).inc(judged)
            own.accepted.labels(str(position + 1)).inc(stats.accepted_by_position[position])
