"""Blocks without a broker, for tests of what lies behind the ingester. Others may import it."""

from collections.abc import Sequence

from ingest.lane import Lane
from ingest.layout import data_path
from ingest.manifest import Counts, DataFile, FrozenPolicy, Manifest, OffsetRange
from ingest.parquet import write_rows
from ingest.record import Record
from ingest.repository import LaneHead

SHA = "0" * 64


def frozen(nominal_units: int) -> dict[str, object]:
    """A policy as `privacy.policy.Policy.frozen` makes it."""
    return {
        "unit": "user",
        "epsilon": 8.0,
        "delta": 1e-5,
        "orders": (2, 3, 8),
        "caps": (0.1, 0.25, 3.5),
        "horizon": "life",
        "attempts": 3,
        "replay_share": 0.25,
        "holdout_share": 0.1,
        "nominal_units": nominal_units,
    }


def record(number: int, user: str = "u", **changes: object) -> Record:
    fields = {
        "event_id": f"e{number}",
        "user_id": user,
        "domain": "billing",
        "prompt": f"question {number}",
        "completion": "answer",
        **changes,
    }
    return Record.model_validate(fields)


def manifest_of(lane: Lane, head: LaneHead, start: int, end: int, **changes: object) -> Manifest:
    fields = {
        "block_id": lane.block_id(head.seq_next),
        "stream": lane.stream,
        "lane": lane.name,
        "seq": head.seq_next,
        "topic": "t",
        "incarnation": "i1",
        "offsets": (OffsetRange(partition=0, start=start, end=end),),
        "schema_version": 1,
        "suite_sha256": SHA,
        "counts": Counts(sealed=0, rejected=end - start, duplicate=0, set_aside=0),
        "files": (),
        "nonce": "ab" * 16,
        "policy": FrozenPolicy.model_validate(frozen(end - start)),
        "sealed_at": "2026-01-01T00:00:00Z",
        **changes,
    }
    return Manifest.model_validate(fields)


def seal(lane: Lane, head: LaneHead, records: Sequence[Record], start: int) -> LaneHead:
    """Commit records as the train split of the lane's next block."""
    rows = [(0, start + i, record) for i, record in enumerate(records)]
    sha = write_rows(lane.folder(head.seq_next) / "train.parquet", rows)
    file = DataFile(path=data_path(lane.name, head.seq_next, "train"), sha256=sha, split="train")
    counts = Counts(sealed=len(rows), rejected=0, duplicate=0, set_aside=0)
    manifest = manifest_of(lane, head, start, start + len(rows), files=(file,), counts=counts)
    return lane.commit(manifest, head)
