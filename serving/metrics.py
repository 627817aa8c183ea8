"""What Prometheus is told: numbers by stream and version, never content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.delivery import Delivery
from serving.swap import HotSwap

# From a cached label on a fast machine to a long answer on a slow one.
_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of one server."""

    def __init__(self, swaps: Mapping[str, HotSwap]) -> None:
        self._registry = CollectorRegistry()
        by = ("stream", "version", "route")
        self.requests = Counter("tidegate_requests", "Requests by outcome.", (*by, "status"), registry=self._registry)
        self.seconds = Histogram(
            "tidegate_request_seconds", "From request to last byte.", by, buckets=_SECONDS, registry=self._registry
        )
        self.first_seconds = Histogram(
            "tidegate_first_text_seconds", "From request to first text.", by, buckets=_SECONDS, registry=self._registry
        )
        self.tokens = Counter(
            "tidegate_tokens", "Tokens read and written.", ("stream", "version", "kind"), registry=self._registry
        )
        self._registry.register(_States(swaps))

    def page(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self._registry)


class _States(Collector):
    """Read from the swaps when somebody asks, so that it cannot be out of date."""

    def __init__(self, swaps: Mapping[str, HotSwap]) -> None:
        self._swaps = swaps

    def collect(self) -> Iterator[Metric]:
        live = GaugeMetricFamily(
            "tidegate_live_version", "The version that answers; 0 is the bare base.", labels=["stream"]
        )
        ready = GaugeMetricFamily("tidegate_ready", "Whether a stream can answer.", labels=["stream"])
        waiting = GaugeMetricFamily("tidegate_waiting", "Answers queued and not begun.", labels=["stream"])
        alarms = GaugeMetricFamily("tidegate_alarm", "Standing alarms.", labels=["stream", "kind"])
        swapped = CounterMetricFamily("tidegate_swaps", "Swaps by outcome.", labels=["stream", "outcome"])
        for stream, swap in self._swaps.items():
            current = swap.current
            ready.add_metric([stream], float(current is not None and swap.engine.healthy))
            if current is not None:
                live.add_metric([stream], current.version)
            waiting.add_metric([stream], swap.engine.waiting)
            for kind in _kinds(swap):
                alarms.add_metric([stream, kind], 1)
            for outcome in ("done", "failed"):
                swapped.add_metric([stream, outcome], swap.counts[outcome])
        yield from (live, ready, waiting, alarms, swapped)
        yield from _beside({stream: swap.delivery for stream, swap in self._swaps.items() if swap.delivery})


def _beside(deliveries: Mapping[str, Delivery]) -> Iterator[Metric]:
    """Canaries and shadow. What people were answered by a canary counts among the requests, by its version."""
    share = GaugeMetricFamily("tidegate_canary_share", "Of requests.", labels=["stream", "version"])
    back = CounterMetricFamily("tidegate_canaries_stepped_back", "Canaries this server ended.", labels=["stream"])
    shadow = CounterMetricFamily(
        "tidegate_shadow_answers",
        "What became of questions put to the candidate in the shadow: same or other text than that of live, drawn by "
        "chance, failed, or dropped for somebody who asked.",
        labels=["stream", "version", "outcome"],
    )
    seconds = CounterMetricFamily(
        "tidegate_shadow_seconds",
        "Of those that are same or other, on both sides.",
        labels=["stream", "version", "side"],
    )
    for stream, delivery in deliveries.items():
        if delivery.share:
            share.add_metric([stream, delivery.share[0]], delivery.share[1])
        back.add_metric([stream], delivery.counts["stepped_back"])
        if delivery.shadow:
            for (version, outcome), count in sorted(delivery.shadow.counts.items()):
                shadow.add_metric([stream, version, outcome], count)
            for (version, side), spent in sorted(delivery.shadow.seconds.items()):
                seconds.add_metric([stream, version, side], spent)
    yield from (share, back, shadow, seconds)


def _kinds(swap: HotSwap) -> Iterable[str]:
    return sorted({alarm.kind for alarm in swap.alarms})
