"""What Prometheus may scrape of an ingest process. For the operator, inside the trust boundary: counts are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from ingest.manifest import Manifest
    from ingest.sorting import Outcome

# Seconds: a small block on a quiet machine, to a large one on a busy disk.
_SEAL_BUCKETS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

ALARMS: Final = (
    *("broker", "gap", "incarnation", "start_over", "lag_monitor"),
    *("push", "expectation", "drift", "report"),
)
"""Every kind of alarm."""


@dataclass(frozen=True)
class IngestMetrics:
    """Counters by stream; reasons by their code, never by content."""

    accepted: Counter
    rejected: Counter
    duplicates: Counter
    set_aside: Counter
    messages: Counter
    bytes: Counter
    blocks: Counter
    alarms: Counter
    lag: Gauge
    seal: Histogram

    @classmethod
    def make(cls, registry: CollectorRegistry = REGISTRY) -> IngestMetrics:
        """Register the metrics; once per registry."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tidegate_ingest_{name}", text, ("stream", *labels), registry=registry)

        return cls(
            accepted=counter("accepted", "records sealed into blocks, to train or to hold out"),
            rejected=counter("rejected", "messages sent to the dead letters, by the first reason's code", "reason"),
            duplicates=counter("duplicates", "messages whose record was in a block already"),
            set_aside=counter("set_aside", "records beyond what a user may have in one block"),
            messages=counter("messages", "messages that committed blocks account for"),
            bytes=counter("bytes", "bytes of the values of those messages"),
            blocks=counter("blocks", "blocks committed"),
            alarms=counter("alarms", "conditions an operator should look at", "kind"),
            lag=Gauge("tidegate_ingest_lag_offsets", "offsets not yet read", ("stream",), registry=registry),
            seal=Histogram(
                "tidegate_ingest_seal_seconds",
                "from the last message of a block to its commit",
                ("stream",),
                buckets=_SEAL_BUCKETS,
                registry=registry,
            ),
        )

    def begin(self, stream: str) -> None:
        """From nought: what Prometheus sees for the first time at 1 has not grown, so that no rule would fire."""
        self.blocks.labels(stream)
        self.messages.labels(stream)
        for kind in ALARMS:
            self.alarms.labels(stream, kind)

    def count(self, stream: str, manifest: Manifest, outcome: Outcome, value_bytes: int, seconds: float) -> None:
        """A committed block."""
        counts = manifest.counts
        self.blocks.labels(stream).inc()
        self.messages.labels(stream).inc(counts.total)
        self.bytes.labels(stream).inc(value_bytes)
        self.accepted.labels(stream).inc(counts.sealed)
        self.set_aside.labels(stream).inc(counts.set_aside)
        self.duplicates.labels(stream).inc(counts.duplicate)
        for _, reasons in outcome.rejected:
            self.rejected.labels(stream, reasons[0].code).inc()
        self.seal.labels(stream).observe(seconds)


DEFAULT = IngestMetrics.make()
"""The process's own, in the default registry."""
