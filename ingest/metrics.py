"""What Prometheus may scrape of an ingest process. For the operator, inside the trust boundary: counts are exact."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


@dataclass(frozen=True)
class IngestMetrics:
    """Counters by stream; reasons by their code, never by content."""

    accepted: Counter
    rejected: Counter
    duplicates: Counter
    blocks: Counter
    alarms: Counter
    lag: Gauge

    @classmethod
    def make(cls, registry: CollectorRegistry = REGISTRY) -> IngestMetrics:
        """Register the metrics; once per registry."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tidegate_ingest_{name}", text, ("stream", *labels), registry=registry)

        return cls(
            accepted=counter("accepted", "records sealed into blocks"),
            rejected=counter("rejected", "messages sent to the dead letters, by the first reason's code", "reason"),
            duplicates=counter("duplicates", "messages whose record was in a block already"),
            blocks=counter("blocks", "blocks committed"),
            alarms=counter("alarms", "conditions an operator should look at", "kind"),
            lag=Gauge("tidegate_ingest_lag_offsets", "offsets not yet read", ("stream",), registry=registry),
        )


DEFAULT = IngestMetrics.make()
"""The process's own, in the default registry."""
