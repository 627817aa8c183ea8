"""Several lanes take partitions from each other, die in the middle, sleep and wake: no offset is committed twice."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ingest.errors import LaneConflict, RepositoryError
from ingest.frontier import Frontier, advanced, from_json, furthest, to_json
from ingest.gitstore import GitStore
from ingest.layout import LANE_REFS
from ingest.ownership import OWNER_REFS, Owners, Ownership

LANES = ("s-0", "s-1", "s-2")
PARTITIONS = (0, 1, 2)


class _Killed(BaseException):
    """SIGKILL, as far as one function can tell."""


@contextmanager
def _dying(git: GitStore, *, at: int, after: bool) -> Iterator[None]:
    """Die at the nth commit of this process, before it or just after it."""
    done, real = 0, git.commit

    def commit(*arguments: Any, **options: Any) -> str:
        nonlocal done
        done += 1
        if done == at and not after:
            raise _Killed
        new = real(*arguments, **options)
        if done == at:
            raise _Killed
        return new

    git.commit = commit  # type: ignore[method-assign]
    try:
        yield
    finally:
        del git.commit


class Lanes(RuleBasedStateMachine):
    """A lane as the ingester drives it: head first, then take, then the frontier, then commits on top of that head."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.git = GitStore.init(Path(self.folder.name))
        self.ownership = Ownership(self.git, "s", LANE_REFS)
        self.heads: dict[str, str | None] = dict.fromkeys(LANES)
        self.batch: dict[str, dict[int, int]] = {lane: {} for lane in LANES}
        self.spans: list[tuple[int, int, int]] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    def _frontier(self) -> Frontier:
        heads = self.git.refs(LANE_REFS).values()
        return furthest(from_json(self.git.read(commit, "frontier.json")) for commit in heads)

    def _reached(self, partition: int) -> int:
        return self._frontier().get("i", {}).get(partition, 0)

    @rule(lane=st.sampled_from(LANES))
    def start_over(self, lane: str) -> None:
        self.heads[lane] = self.git.head(LANE_REFS + lane)
        self.batch[lane] = {}

    @rule(lane=st.sampled_from(LANES), partitions=st.sets(st.sampled_from(PARTITIONS), min_size=1))
    def take(self, lane: str, partitions: set[int]) -> None:
        # Nobody tells the last holder: it goes on with what it has, as one does that slept through the rebalance.
        self.ownership.take(lane, partitions)
        self.batch[lane] |= {p: self._reached(p) for p in partitions}

    @rule(
        lane=st.sampled_from(LANES),
        partitions=st.sets(st.sampled_from(PARTITIONS), min_size=1),
        at=st.integers(1, 4),
        after=st.booleans(),
    )
    def die_while_taking(self, lane: str, partitions: set[int], at: int, after: bool) -> None:
        with suppress(_Killed), _dying(self.git, at=at, after=after):
            self.ownership.take(lane, partitions)
        self.start_over(lane)

    @rule(lane=st.sampled_from(LANES), partition=st.sampled_from(PARTITIONS))
    def give_up(self, lane: str, partition: int) -> None:
        self.batch[lane].pop(partition, None)
        self.ownership.release(lane, {partition})

    @rule(
        lane=st.sampled_from(LANES),
        count=st.integers(1, 3),
        other=st.sampled_from(LANES),
        taken=st.sets(st.sampled_from(PARTITIONS)),
    )
    def commit(self, lane: str, count: int, other: str, taken: set[int]) -> None:
        """As `Lane.commit`: compare with the frontier, then swap; between the two `other` may take partitions."""
        span = {p: (start, start + count) for p, start in self.batch[lane].items()}
        ref = LANE_REFS + lane
        if not span:
            return
        if self.git.head(ref) != self.heads[lane] or any(self._reached(p) != start for p, (start, _) in span.items()):
            self.start_over(lane)
            return
        if other != lane and taken:
            self.take(other, taken)
        head = self.heads[lane]
        mine = from_json(None if head is None else self.git.read(head, "frontier.json"))
        files = {"frontier.json": to_json(advanced(mine, "i", {p: end for p, (_, end) in span.items()}))}
        try:
            self.heads[lane] = self.git.commit(ref, head, "block", files=files)
        except LaneConflict:
            self.start_over(lane)
            return
        self.spans += [(p, start, end) for p, (start, end) in span.items()]
        self.batch[lane] = {p: end for p, (_, end) in span.items()}

    @rule(lane=st.sampled_from(LANES))
    def make_the_index_anew(self, lane: str) -> None:
        before = {other: self.git.head(LANE_REFS + other) for other in LANES if self.batch[other]}
        self.ownership.fence_others(lane, [name.removeprefix(LANE_REFS) for name in self.git.refs(LANE_REFS)])
        assert all(self.git.head(LANE_REFS + other) != old for other, old in before.items() if other != lane)

    @invariant()
    def every_offset_is_committed_once(self) -> None:
        for partition in PARTITIONS:
            reached = 0
            for start, end in sorted((start, end) for p, start, end in self.spans if p == partition):
                assert start == reached, f"partition {partition}: {self.spans}"
                reached = end

    @invariant()
    def whoever_reads_a_partition_is_named(self) -> None:
        holders = self.ownership.read().holders
        for lane in LANES:
            # Unless it was fenced, and so cannot commit.
            if self.git.head(LANE_REFS + lane) == self.heads[lane]:
                assert all(lane in holders.get(p, ()) for p in self.batch[lane])


TestLanes = Lanes.TestCase
TestLanes.settings = settings(max_examples=15, stateful_step_count=20)


@pytest.fixture
def git(tmp_path: Path) -> GitStore:
    return GitStore.init(tmp_path)


@pytest.fixture
def ownership(git: GitStore) -> Ownership:
    return Ownership(git, "s", LANE_REFS)


def _block(git: GitStore, lane: str, head: str | None) -> str:
    return git.commit(LANE_REFS + lane, head, "block", files={"a": b"a"})


def test_a_partition_taken_fences_its_holder_but_not_one_that_gave_it_up(git: GitStore, ownership: Ownership) -> None:
    ownership.take("s-0", {0, 1})
    head = _block(git, "s-0", None)
    ownership.release("s-0", {0})
    ownership.take("s-1", {0})
    head = _block(git, "s-0", head)
    ownership.take("s-1", {1})
    with pytest.raises(LaneConflict, match="moved from"):
        _block(git, "s-0", head)
    assert ownership.read().holders == {0: ("s-1",), 1: ("s-1",)}
    assert ownership.read().held_by("s-1") == {0, 1}
    assert ownership.read().held_by("s-0") == set()


def test_a_lane_that_never_committed_is_fenced_too(git: GitStore, ownership: Ownership) -> None:
    ownership.take("s-0", {0})
    ownership.take("s-1", {0})
    with pytest.raises(LaneConflict):
        _block(git, "s-0", None)
    ownership.take("s-2", {1})
    ownership.fence_others("s-0", [])
    with pytest.raises(LaneConflict):
        _block(git, "s-2", None)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("after", [False, True])
def test_whoever_dies_while_taking_leaves_the_next_enough_to_know(
    git: GitStore, ownership: Ownership, at: int, after: bool
) -> None:
    ownership.take("s-0", {0})
    with pytest.raises(_Killed), _dying(git, at=at, after=after):
        ownership.take("s-1", {0})
    head = git.head(LANE_REFS + "s-1")
    ownership.take("s-2", {0})
    assert ownership.read().holders == {0: ("s-2",)}
    with pytest.raises(LaneConflict):
        _block(git, "s-0", None)
    if at > 1 or after:
        with pytest.raises(LaneConflict):
            _block(git, "s-1", head)


def test_taking_again_what_one_has_costs_nothing(git: GitStore, ownership: Ownership) -> None:
    ownership.take("s-0", {0})
    before = git.head(OWNER_REFS + "s")
    assert ownership.take("s-0", {0}).commit == before
    assert git.head(OWNER_REFS + "s") == before


def test_of_two_names_for_a_topic_one_wins(ownership: Ownership) -> None:
    seen = ownership.read()
    ownership.renew(seen, "t", "one")
    ownership.renew(seen, "t", "two")
    assert (ownership.read().incarnation, ownership.read().renewals) == ("one", 1)


def test_a_map_that_always_moves_is_given_up_with_a_reason(
    git: GitStore, ownership: Ownership, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> str:
        raise LaneConflict("moved")

    monkeypatch.setattr(git, "commit", lose)
    with pytest.raises(LaneConflict, match="restarted in a loop"):
        ownership.take("s-0", {0})
    with pytest.raises(LaneConflict, match="restarted in a loop"):
        ownership.fence_others("s-0", ["s-1"])


def test_a_map_round_trips() -> None:
    owners = Owners(None, "t", "i", 2, {1: ("s-1", "s-0"), 0: ()})
    assert json.loads(owners.to_json())["holders"] == {"0": [], "1": ["s-1", "s-0"]}


def test_a_map_that_is_torn_is_a_clear_error(git: GitStore, ownership: Ownership) -> None:
    git.commit(OWNER_REFS + "s", None, "torn", files={"owners.json": b'{"topic": "t", "holders": {"0'})
    with pytest.raises(RepositoryError, match="owners/s") as caught:
        ownership.read()
    assert "\n" not in str(caught.value)
