"""What Prometheus is told by a router: numbers by replica and stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from serving.router import Router


class RouterMetrics:
    """The metrics of one router."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, router: Router) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "tidegate_router_requests", "Answers by replica.", ("replica", "status"), registry=self._registry
        )
        self.retries = Counter(
            "tidegate_router_retries",
            "Requests that went on to another replica, by the one that did not answer.",
            ("replica", "reason"),
            registry=self._registry,
        )
        self.broken = Counter(
            "tidegate_router_broken", "Streams that broke off at a replica.", ("replica",), registry=self._registry
        )
        self._registry.register(_States(router))

    def page(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self._registry)


class _States(Collector):
    """Read from the router when somebody asks."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("tidegate_router_replica_up", "Whether a replica counts.", labels=["replica"])
        busy = GaugeMetricFamily("tidegate_router_in_flight", "Unfinished requests.", labels=["replica"])
        runs = GaugeMetricFamily("tidegate_router_replica_version", "What it runs.", labels=["replica", "stream"])
        traffic = GaugeMetricFamily("tidegate_router_version", "What gets the traffic.", labels=["stream"])
        now_s = time.monotonic()
        for replica in self._router.replicas:
            up.add_metric([replica.url], float(replica.healthy(now_s)))
            busy.add_metric([replica.url], replica.in_flight)
            for stream, said in replica.said.items():
                runs.add_metric([replica.url, stream], said.version)
        for stream, agreement in self._router.agreements.items():
            if agreement.traffic:
                traffic.add_metric([stream], agreement.traffic.version)
        yield from (up, busy, runs, traffic)
