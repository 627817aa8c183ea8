"""How far a topic has been read: round trips, merging, and what is no frontier."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import RepositoryError
from ingest.frontier import Frontier, advanced, from_json, furthest, to_json

FRONTIERS = st.dictionaries(st.text(max_size=5), st.dictionaries(st.integers(0, 9), st.integers(0, 2**62)), max_size=3)


@given(FRONTIERS)
def test_it_round_trips(frontier: Frontier) -> None:
    assert from_json(to_json(frontier)) == frontier


@given(st.lists(FRONTIERS, max_size=4))
def test_the_furthest_of_all_lanes(frontiers: list[Frontier]) -> None:
    merged = furthest(frontiers)
    for name, nexts in merged.items():
        for partition, end in nexts.items():
            assert end == max(f[name][partition] for f in frontiers if partition in f.get(name, {}))
    assert all(p in merged[name] for f in frontiers for name, nexts in f.items() for p in nexts)
    assert furthest(reversed(frontiers)) == merged


def test_a_block_moves_its_own_partitions_only() -> None:
    before = {"i": {0: 5, 1: 7}, "h": {0: 9}}
    assert advanced(before, "i", {1: 8}) == {"i": {0: 5, 1: 8}, "h": {0: 9}}
    assert advanced(before, "j", {0: 1}) == {**before, "j": {0: 1}}
    assert before == {"i": {0: 5, 1: 7}, "h": {0: 9}}


def test_nothing_is_read_where_there_is_no_file() -> None:
    assert from_json(None) == {}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"i": 3}', b'{"i": {"0": "x"}}', b'{"i": {"x": 1}}', b"\xff"])
def test_what_is_no_frontier_is_one_line(data: bytes) -> None:
    with pytest.raises(RepositoryError, match=r"frontier\.json.*backup") as caught:
        from_json(data)
    assert "\n" not in str(caught.value)
