"""The service's metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.batcher import BatcherStatistics
from engine.prediction import Prediction

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MODEL = ("name", "size", "precision", "backend", "device", "weights")
_VERDICTS = {True: "manipulated", False: "not_manipulated", None: "none"}


class Metrics:
    """Counters and histograms of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry, buckets=_SECONDS)
        gauge = partial(Gauge, registry=registry)
        self._requests = counter("dgm4_requests", "Requests", ["method", "route", "status"])
        self._errors = counter("dgm4_errors", "Requests and pairs that failed, by code", ["code"])
        self._seconds = histogram("dgm4_request_seconds", "From headers to answer", ["route"])
        self._stages = histogram("dgm4_stage_seconds", "A pair's stages, of Prediction.timing", ["stage"])
        self._pairs = counter("dgm4_pairs", "Answered pairs by verdict", ["verdict"])
        self._model = gauge("dgm4_model_info", "The model that answers", _MODEL)
        # Looking a child up costs more than counting.
        self._stage, self._verdict = cache(self._stages.labels), cache(self._pairs.labels)
        self._route, self._request = cache(self._seconds.labels), cache(self._requests.labels)
        self.buffered = gauge("dgm4_buffered_bytes", "Bytes of request bodies held")
        self.ready = gauge("dgm4_ready", "1 once the warm-up is done, until shutdown")
        ProcessCollector(registry=registry)

    def watch(self, statistics: Callable[[], BatcherStatistics], model: Mapping[str, str]) -> None:
        """Show the batcher's own counts, and what the model is."""
        self.registry.register(_BatcherCollector(statistics))
        self._model.labels(*(model[name] for name in _MODEL)).set(1)

    def record(self, method: str, route: str, status: int, code: str | None, seconds: float) -> None:
        """Count one request."""
        method = method if method in _METHODS else "other"
        self._request(method, route, str(status)).inc()
        self._route(route).observe(seconds)
        if code is not None:
            self.failed(code)

    def answered(self, prediction: Prediction) -> None:
        """Count one answered pair and the time of its stages."""
        self._verdict(_VERDICTS[prediction.manipulated]).inc()
        for stage, milliseconds in prediction.timing.items():
            self._stage(stage).observe(milliseconds / 1e3)

    def failed(self, code: str) -> None:
        """Count a failed request, or a failed pair among others."""
        self._errors.labels(code).inc()

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)


class _BatcherCollector(Collector):
    """The counts that the batcher keeps itself."""

    def __init__(self, statistics: Callable[[], BatcherStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        counts = self._statistics()
        yield GaugeMetricFamily("dgm4_pending_pairs", "Pairs taken and not yet answered", counts.pending)
        sizes = counts.batch_sizes
        buckets = [
            (str(most), float(sum(sizes[size] for size in sizes if size <= most))) for most in _BATCHES
        ]
        buckets.append(("+Inf", float(counts.batches)))
        yield HistogramMetricFamily(
            "dgm4_batch_pairs", "Pairs that ran as one batch", buckets, float(counts.pairs)
        )
