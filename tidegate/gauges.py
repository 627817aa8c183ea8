"""What is left of the budgets, for Prometheus: looked up beside the rounds of `tidegate learn`, never in a scrape.

Everything told here follows from policies, plans and public sizes; no figure depends on a record.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from tidegate import budget
from tidegate.errors import expected_errors

if TYPE_CHECKING:
    import threading

    from tidegate.budget import Budget
    from tidegate.wiring import Service

log = structlog.get_logger()

# Between two looks: budgets change with rounds, which take minutes, and a look reads the account of every block.
LOOK_SECONDS = 60.0


class BudgetGauges:
    """Gauges by stream.

    Args:
        registry: of Prometheus; made once in each.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tidegate_budget_{name}", text, ("stream", *labels), registry=registry)

        self._share = gauge(
            "share_used", "share of a block's filter used: the median of what live knows, and the fullest", "of"
        )
        self._rounds = gauge("rounds_left", "rounds in which the median block can still be replayed at this pace")
        self._retired = gauge("blocks_retired", "blocks live knows that can pay for no further replay")
        self._holdout = gauge("holdout_evaluations_left", "private evaluations until no holdout can pay")
        self._alarms = gauge("alarms", "standing alarms; `tidegate status` has their words")
        self._looked = gauge("looked_seconds", "when these figures were last looked up, in seconds since 1970")

    def tell(self, found: Budget, now: float) -> None:
        """Set a stream's gauges; what is not known of it yet is not told.

        Args:
            found: its budget.
            now: POSIX seconds.
        """
        self._share.labels(found.stream, "median").set(found.share_used_median)
        self._share.labels(found.stream, "max").set(found.share_used_max)
        self._retired.labels(found.stream).set(len(found.blocks_retired))
        self._alarms.labels(found.stream).set(len(found.alarms))
        for gauge, value in ((self._rounds, found.rounds_left), (self._holdout, found.holdout_evaluations_left)):
            if value is not None:
                gauge.labels(found.stream).set(value)
        self._looked.labels(found.stream).set(now)


def watch(service: Service, gauges: BudgetGauges, stop: threading.Event) -> None:
    """Look at every stream's budget once a minute until `stop` is set.

    A look that fails leaves the figures of the one before: `looked_seconds` says how old they are.
    """
    while True:
        for stream in service.settings.streams:
            try:
                if service.repository().manifests(stream):
                    versions = service.store.versions(service.model(stream))
                    gauges.tell(budget.look(service, stream, versions), time.time())
            except expected_errors() as error:
                log.warning("budget not looked up", stream=stream, why=str(error))
        if stop.wait(LOOK_SECONDS):
            return
