"""Where reading starts, for every state a topic and its lanes can be in."""

import pytest

from ingest.broker import TopicInfo
from ingest.ownership import Owners
from ingest.resume import Start, incarnation_of, plan_start

APACHE = TopicInfo("t", "id-1", (0, 1), 1000)
EMBEDDED = TopicInfo("t", None, (0, 1), 1000)
KNOWN = Owners("c", "t", "id-1", 1, {0: ("s-0",)})
REACHED = {0: 10, 1: 5}


def test_the_first_name_is_the_topics_id_where_it_has_one() -> None:
    assert incarnation_of(APACHE, Owners(), {}, {0: (3, 9)}) == "id-1"
    assert incarnation_of(EMBEDDED, Owners(), {}, {0: (3, 9)}) == "local.1"


def test_it_continues_and_takes_new_partitions() -> None:
    bounds = {0: (0, 10), 1: (0, 9), 2: (0, 4)}
    assert incarnation_of(APACHE, KNOWN, REACHED, bounds) == "id-1"
    assert plan_start("id-1", REACHED, bounds) == Start("id-1", {0: 10, 1: 5, 2: 0}, {})


def test_retention_leaves_a_gap_of_known_size() -> None:
    assert plan_start("id-1", REACHED, {0: (12, 20), 1: (5, 9)}) == Start("id-1", {0: 12, 1: 5}, {0: 2})


def test_a_partition_never_read_has_no_gap() -> None:
    assert plan_start("id-1", {}, {0: (12, 20)}) == Start("id-1", {0: 12}, {})


@pytest.mark.parametrize(
    ("info", "bounds", "agree", "incarnation"),
    [
        (TopicInfo("t", "id-2", (0, 1), 1000), {0: (0, 99), 1: (0, 99)}, True, "id-2"),
        (APACHE, {0: (0, 9), 1: (0, 99)}, True, "id-1.2"),
        (APACHE, {0: (0, 99)}, True, "id-1.2"),
        (EMBEDDED, {0: (0, 99), 1: (0, 99)}, False, "local.2"),
        (TopicInfo("other", "id-3", (0, 1), 1000), {0: (0, 99), 1: (0, 99)}, True, "id-3"),
    ],
)
def test_another_topic_has_another_name(
    info: TopicInfo, bounds: dict[int, tuple[int, int]], agree: bool, incarnation: str
) -> None:
    assert incarnation_of(info, KNOWN, REACHED, bounds, marks_agree=agree) == incarnation
