"""The soak's own small run, and that its verdict can be bad."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ingest.broker import Message
from ingest.manifest import Counts, OffsetRange
from ingest.parquet import Row
from ingest.record import Record
from tests.ingest.soak import Figures, Size, account, run, shortfall
from tests.ingest.world import line
from tests.kafka_servers import ApacheKafka

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

SMALL = Size(records=6000, kills=6, stops=1, broker_kills=0, partitions=4, block_offsets=300, seconds_max=300)


def _soak(folder: Path, kafka: ApacheKafka, size: Size, topic: str) -> None:
    said: list[str] = []
    figures = run(folder, kafka, size, said.append, topic)
    assert (figures.wrong, shortfall(figures, size)) == (0, []), (figures, [text for text in said if "\n" in text])


def test_a_small_soak(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> None:
    _soak(tmp_path, apache_kafka, SMALL, topic)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_full_soak(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> None:
    _soak(tmp_path, apache_kafka, Size(), topic)


@dataclass
class _Letter:
    source: tuple[int, int]


@dataclass
class _Manifest:
    counts: Counts
    offsets: tuple[OffsetRange, ...]
    incarnation: str = "i"
    lane: str = "desk-0"

    @property
    def nominal_units(self) -> int:
        return sum(part.span for part in self.offsets)


@dataclass
class _History:
    """What `account` asks of a world: two good records, one again, one in conflict, one broken, in two blocks."""

    values: list[bytes | None] = field(
        default_factory=lambda: [line(1), line(2), line(1), b"broken", line(2, prompt="other")]
    )
    at: list[int] = field(default_factory=lambda: [0, 1])
    dead: list[int] = field(default_factory=lambda: [3, 4])
    spans: list[tuple[int, int]] = field(default_factory=lambda: [(0, 3), (3, 5)])
    counts: list[tuple[int, int, int]] = field(default_factory=lambda: [(2, 0, 1), (0, 2, 0)])

    @property
    def repo(self) -> "_History":
        return self

    def rows(self) -> dict[str, list[tuple[str, Row]]]:
        return {"b": [("train", (0, o, Record.model_validate_json(self.values[o] or b""))) for o in self.at]}

    def letters(self) -> list[_Letter]:
        return [_Letter((0, offset)) for offset in self.dead]

    def messages(self) -> list[Message]:
        return [Message(0, offset, None, value, (), 0) for offset, value in enumerate(self.values)]

    def manifests(self, _: str) -> list[_Manifest]:
        return [
            _Manifest(
                Counts(sealed=sealed, rejected=rejected, duplicate=duplicate, set_aside=0),
                (OffsetRange(partition=0, start=start, end=end),),
            )
            for (start, end), (sealed, rejected, duplicate) in zip(self.spans, self.counts, strict=True)
        ]


def _figures(history: _History) -> Figures:
    world: Any = history
    return account(world, Figures())


def test_a_sound_history_is_found_sound() -> None:
    found = _figures(_History())
    assert (found.wrong, found.in_blocks, found.duplicates, found.rejected) == (0, 2, 1, 2)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda h: h.at.remove(1), "lost"),
        (lambda h: h.at.append(2), "twice"),
        (lambda h: h.at.append(1), "twice"),
        (lambda h: h.dead.remove(3), "rejected_unaccounted"),
        (lambda h: h.dead.remove(4), "rejected_unaccounted"),
        (lambda h: h.dead.append(1), "wrongly_rejected"),
        (lambda h: h.dead.append(2), "wrongly_rejected"),
        (lambda h: h.spans.__setitem__(1, (2, 5)), "offsets_wrong"),
        (lambda h: h.spans.__setitem__(1, (4, 5)), "offsets_wrong"),
        (lambda h: h.spans.__setitem__(1, (3, 4)), "offsets_wrong"),
        (lambda h: h.counts.__setitem__(1, (0, 1, 1)), "counts_wrong"),
    ],
)
def test_what_is_wrong_is_found(spoil: Callable[[_History], None], name: str) -> None:
    history = _History()
    spoil(history)
    assert getattr(_figures(history), name) > 0
