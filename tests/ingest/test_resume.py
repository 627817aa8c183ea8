"""Where reading starts, for every state a topic and a lane can be in."""

from pathlib import Path

import pytest

from ingest.broker import TopicInfo
from ingest.lane import LaneHead
from ingest.manifest import FrozenPolicy, Manifest, OffsetRange
from ingest.repository import DataRepository
from ingest.resume import Start, plan_start
from tests.ingest.blocks import frozen, manifest_of

APACHE = TopicInfo("t", "id-1", (0, 1), 1000)
EMBEDDED = TopicInfo("t", None, (0, 1), 1000)


@pytest.fixture
def last(tmp_path: Path) -> Manifest:
    repo = DataRepository.init(tmp_path / "data", remote=str(tmp_path / "remote"))
    with repo.lane("s", "s-0") as lane:
        ranges = (OffsetRange(partition=0, start=0, end=10), OffsetRange(partition=1, start=0, end=5))
        policy = FrozenPolicy.model_validate(frozen(15))
        return manifest_of(lane, lane.head(), 0, 10, offsets=ranges, policy=policy, incarnation="id-1")


def test_the_first_start_is_at_what_the_topic_holds() -> None:
    bounds = {0: (3, 9), 1: (0, 0)}
    assert plan_start(APACHE, LaneHead(None, None), bounds) == Start("id-1", {0: 3, 1: 0}, frozenset(), renewed=False)
    assert plan_start(EMBEDDED, LaneHead(None, None), bounds).incarnation == "local.1"


def test_it_continues_and_takes_new_partitions(last: Manifest) -> None:
    start = plan_start(APACHE, LaneHead("c", last), {0: (0, 10), 1: (0, 9), 2: (0, 4)})
    assert start == Start("id-1", {0: 10, 1: 5, 2: 0}, frozenset(), renewed=False)


def test_retention_leaves_a_gap(last: Manifest) -> None:
    start = plan_start(APACHE, LaneHead("c", last), {0: (12, 20), 1: (5, 9)})
    assert start == Start("id-1", {0: 12, 1: 5}, frozenset({0}), renewed=False)


@pytest.mark.parametrize(
    ("info", "bounds", "agree", "incarnation"),
    [
        (TopicInfo("t", "id-2", (0, 1), 1000), {0: (0, 99), 1: (0, 99)}, True, "id-2"),
        (APACHE, {0: (0, 9), 1: (0, 99)}, True, "id-1.2"),
        (APACHE, {0: (0, 99)}, True, "id-1.2"),
        (EMBEDDED, {0: (0, 99), 1: (0, 99)}, False, "local.2"),
        (EMBEDDED, {0: (0, 99), 1: (0, 4)}, True, "local.2"),
        (TopicInfo("other", "id-3", (0, 1), 1000), {0: (0, 99), 1: (0, 99)}, True, "id-3"),
    ],
)
def test_another_topic_is_read_from_its_beginning(
    last: Manifest, info: TopicInfo, bounds: dict[int, tuple[int, int]], agree: bool, incarnation: str
) -> None:
    start = plan_start(info, LaneHead("c", last), bounds, marks_agree=agree)
    assert start == Start(incarnation, dict.fromkeys(bounds, 0), frozenset(), renewed=True)
