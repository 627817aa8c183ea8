"""Claims of lanes that live, sleep and die, against a plain model: each record lands in one block, none in none."""

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingest.errors import LaneConflict, RepositoryError
from ingest.frontier import Frontier
from ingest.layout import block_id
from ingest.manifest import OffsetRange
from ingest.record import Record
from ingest.seen import Mark, SeenIndex, digest_of, identity_of
from tests.ingest.blocks import record

LANES = ("s-0", "s-1")
PARTITIONS = (0, 1)
# What each partition holds: record number and content, few enough to meet again and again.
Content = tuple[int, str]
CONTENT = st.tuples(st.integers(0, 5), st.sampled_from(["a", "a", "a", "b"]))


def _record(content: Content) -> Record:
    return record(content[0], completion=content[1])


def _found(content: Content, partition: int, offset: int) -> tuple[bytes, bytes, int, int]:
    one = _record(content)
    return identity_of(one), digest_of(one), partition, offset


@dataclass
class _Block:
    """As much of a manifest as the index asks for, with its rows."""

    lane: str
    seq: int
    incarnation: str
    offsets: tuple[OffsetRange, ...]
    rows: tuple[tuple[int, int, Content], ...]

    @property
    def nonce(self) -> str:
        return f"{self.lane}/{self.seq}"


@dataclass
class _Head:
    last: _Block | None


@dataclass
class _Repo:
    """As much of a data repository as the index asks for; `fences` counts the moves of a lane's ref by others."""

    blocks: dict[str, list[_Block]] = field(default_factory=lambda: {lane: [] for lane in LANES})
    fences: Counter[str] = field(default_factory=Counter)

    def lane_heads(self, _: str) -> dict[str, str]:
        return {lane: "commit" for lane, blocks in self.blocks.items() if blocks}

    def lane_head(self, lane: str) -> _Head:
        return _Head(self.blocks[lane][-1] if self.blocks[lane] else None)

    def frontier(self, _: str) -> Frontier:
        reached: Frontier = {}
        for block in (block for blocks in self.blocks.values() for block in blocks):
            nexts = reached.setdefault(block.incarnation, {})
            for part in block.offsets:
                nexts[part.partition] = max(part.end, nexts.get(part.partition, 0))
        return reached

    def manifest(self, name: str) -> _Block | None:
        return next((b for blocks in self.blocks.values() for b in blocks if block_id(b.lane, b.seq) == name), None)

    def rows(self, block: _Block) -> list[tuple[int, int, Record]]:
        return [(partition, offset, _record(content)) for partition, offset, content in block.rows]


@dataclass
class _Lane:
    """A process: its own handle on the file, and the block it has under way."""

    index: SeenIndex
    fences: int
    nexts: dict[int, int] = field(default_factory=dict)
    spans: tuple[OffsetRange, ...] = ()
    rows: tuple[tuple[int, int, Content], ...] | None = None


class Claims(RuleBasedStateMachine):
    """The order of events is the ingester's: fence, then read the frontier, claim, commit unless fenced, settle."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "seen.sqlite3"
        self.repo: Any = _Repo()
        self.topic: dict[int, list[Content]] = {p: [] for p in PARTITIONS}
        self.name = "i1"
        self.dropped = dict.fromkeys(PARTITIONS, 0)
        self.lost: set[int] = set()
        self.lanes: dict[str, _Lane] = {}
        self.sent: set[int] = set()

    def teardown(self) -> None:
        for name in LANES:
            self.restart(name)
        # Undisturbed, one lane reads all there is.
        for partition in PARTITIONS:
            self.take("s-0", partition)
        self.claim("s-0", 1000)
        self.commit("s-0", settles=True)
        landed = {content[0] for content in self._landed()}
        assert landed | self.lost >= self.sent, "a record is in no block"
        self.each_record_is_in_one_block()
        for lane in self.lanes.values():
            lane.index.close()
        self.folder.cleanup()

    def _landed(self) -> list[Content]:
        blocks = [block for blocks in self.repo.blocks.values() for block in blocks]
        return [content for block in blocks for _, _, content in block.rows]

    def _fence_all_but(self, name: str) -> None:
        for other in LANES:
            self.repo.fences[other] += other != name

    @rule(partition=st.sampled_from(PARTITIONS), contents=st.lists(CONTENT, min_size=1, max_size=4))
    def send(self, partition: int, contents: list[Content]) -> None:
        self.topic[partition] += contents
        self.sent |= {number for number, _ in contents}

    @rule(name=st.sampled_from(LANES))
    def restart(self, name: str) -> None:
        """After SIGKILL, or after a conflict: the head first, then the index."""
        if name in self.lanes:
            self.lanes[name].index.close()
        lane = self.lanes[name] = _Lane(SeenIndex(self.path), self.repo.fences[name])
        lane.index.reconcile(self.repo, "s", lambda: self._fence_all_but(name))
        if lane.index.has_others(self.name):
            self._fence_all_but(name)
            lane.index.reconcile(self.repo, "s", lambda: None)
            lane.index.forget_others(self.name)

    @rule(name=st.sampled_from(LANES), partition=st.sampled_from(PARTITIONS))
    def take(self, name: str, partition: int) -> None:
        assume(name in self.lanes)
        lane = self.lanes[name]
        for other in LANES:
            if other != name and other in self.lanes and partition in self.lanes[other].nexts:
                # It sleeps, and does not know.
                self.repo.fences[other] += 1
        reached = self.repo.frontier("s").get(self.name, {}).get(partition, 0)
        first = max(reached, self.dropped[partition])
        if first > reached:
            lane.index.forget_dropped(self.name, partition, reached, first)
        lane.nexts[partition] = first
        lane.rows = None

    @rule(name=st.sampled_from(LANES), count=st.integers(1, 3))
    def claim(self, name: str, count: int) -> None:
        lane = self.lanes.get(name)
        assume(lane is not None and lane.nexts)
        assert lane is not None
        spans, found, contents = [], [], []
        for partition, start in sorted(lane.nexts.items()):
            end = min(start + count, len(self.topic[partition]))
            if end < start:
                continue
            spans.append(OffsetRange(partition=partition, start=start, end=end))
            for offset in range(start, end):
                content = self.topic[partition][offset]
                found.append(_found(content, partition, offset))
                contents.append((partition, offset, content))

        def check() -> None:
            if self.repo.fences[name] != lane.fences:
                raise LaneConflict("fenced")

        try:
            taken = lane.index.claim(self.name, spans, found, check)
        except LaneConflict:
            self.restart(name)
            return
        lane.spans = tuple(spans)
        lane.rows = tuple(entry for place, entry in enumerate(contents) if place not in taken)

    @rule(name=st.sampled_from(LANES), settles=st.booleans())
    def commit(self, name: str, settles: bool) -> None:
        """With `settles` false the process dies between its commit and the index."""
        lane = self.lanes.get(name)
        assume(lane is not None and lane.rows is not None)
        assert lane is not None and lane.rows is not None
        if self.repo.fences[name] != lane.fences:
            self.restart(name)
            return
        block = _Block(name, len(self.repo.blocks[name]) + 1, self.name, lane.spans, lane.rows)
        self.repo.blocks[name].append(block)
        if settles:
            manifest: Any = block
            lane.index.settle(manifest, {})
            lane.nexts |= {part.partition: part.end for part in lane.spans}
            lane.rows = None
        else:
            lane.index.close()
            del self.lanes[name]

    @rule(partition=st.sampled_from(PARTITIONS), count=st.integers(1, 3))
    def retention(self, partition: int, count: int) -> None:
        """The topic drops messages, read or not; whoever reads there starts over."""
        end = min(self.dropped[partition] + count, len(self.topic[partition]))
        reached = self.repo.frontier("s").get(self.name, {}).get(partition, 0)
        self.lost |= {number for number, _ in self.topic[partition][reached:end]}
        self.dropped[partition] = max(end, self.dropped[partition])
        for name in list(self.lanes):
            self.repo.fences[name] += 1

    @rule()
    def lose_the_index(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    @precondition(lambda self: any(self.topic.values()))
    @rule()
    def make_the_topic_anew(self) -> None:
        """What was not read is gone; every lane is fenced before the new name stands."""
        reached = self.repo.frontier("s").get(self.name, {})
        self.lost |= {n for p in PARTITIONS for n, _ in self.topic[p][reached.get(p, 0) :]}
        self.name = f"i{int(self.name[1:]) + 1}"
        self.topic = {p: [] for p in PARTITIONS}
        self.dropped = dict.fromkeys(PARTITIONS, 0)
        self._fence_all_but("")
        for name in list(self.lanes):
            self.restart(name)

    @invariant()
    def each_record_is_in_one_block(self) -> None:
        counts = Counter(number for number, _ in self._landed())
        assert set(counts.values()) <= {1}, "a record is in two blocks"


TestClaims = Claims.TestCase
TestClaims.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "seen.sqlite3"


def _spans(*ranges: tuple[int, int, int]) -> list[OffsetRange]:
    return [OffsetRange(partition=p, start=start, end=end) for p, start, end in ranges]


def _settle(index: SeenIndex, spans: Sequence[OffsetRange], seq: int = 1, lane: str = "s-0") -> None:
    manifest: Any = _Block(lane, seq, "i1", tuple(spans), ())
    index.settle(manifest, {0: Mark(spans[0].end - 1, b"m")})


A, B = (1, "a"), (2, "a")


def test_a_claim_is_another_messages_until_it_is_ones_own_again(path: Path) -> None:
    with SeenIndex(path) as one, SeenIndex(path) as two:
        assert one.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3)]) == {}
        # The copy on the other partition, and once more in the same batch.
        digest = digest_of(_record(A))
        assert two.claim("i1", _spans((1, 0, 9)), [_found(B, 1, 0), _found(A, 1, 4), _found(B, 1, 5)]) == {
            1: digest,
            2: digest_of(_record(B)),
        }
    with SeenIndex(path) as successor:
        assert successor.claim("i1", _spans((0, 0, 5)), [_found(A, 0, 3)]) == {}
        # The same offset of another incarnation is another message.
        assert successor.claim("i2", _spans((0, 0, 5)), [_found(A, 0, 3)]) == {0: digest}


def test_what_is_settled_is_everybodys_duplicate_its_own_message_too(path: Path) -> None:
    spans = _spans((0, 0, 9))
    with SeenIndex(path) as index:
        index.claim("i1", spans, [_found(A, 0, 3)])
        _settle(index, spans)
        assert index.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3)]) == {0: digest_of(_record(A))}
        assert index.marks("i1") == {0: Mark(8, b"m")}
        assert index.marks("i2") == {}


def test_the_claim_of_a_message_that_is_rejected_at_last_is_void(path: Path) -> None:
    with SeenIndex(path) as index:
        index.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3), _found(B, 0, 4)])
        # The suite was changed: the message is read again, and no longer accepted.
        index.claim("i1", _spans((0, 0, 9)), [_found(B, 0, 4)])
        assert index.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 0), _found(B, 1, 1)]) == {1: digest_of(_record(B))}


def test_a_claim_that_a_killed_process_made_stands_whatever_comes_before_it_in_the_next_batch(path: Path) -> None:
    other = (1, "b")
    with SeenIndex(path) as index:
        index.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 0)])
        # Partition 0 was rejected as a conflict before; its dead letter is out.
        batch = [_found(other, 0, 0), _found(A, 1, 0)]
        assert index.claim("i1", _spans((0, 0, 9), (1, 0, 9)), batch) == {0: digest_of(_record(A))}


def test_a_lane_that_was_fenced_claims_nothing_and_voids_nothing(path: Path) -> None:
    def fenced() -> None:
        raise LaneConflict("fenced")

    with SeenIndex(path) as zombie, SeenIndex(path) as successor:
        successor.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3)])
        with pytest.raises(LaneConflict):
            zombie.claim("i1", _spans((0, 0, 9)), [], fenced)
        assert zombie.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 3)]) == {0: digest_of(_record(A))}


def test_claims_on_an_index_that_was_made_anew_are_refused(path: Path) -> None:
    repo: Any = _Repo()
    fences: list[str] = []
    with SeenIndex(path) as one, SeenIndex(path) as two:
        one.reconcile(repo, "s", lambda: fences.append("one"))
        two.reconcile(repo, "s", lambda: fences.append("two"))
        # The first makes the index, and fences; the second finds it.
        assert fences == ["one"]
        spans = _spans((0, 0, 9))
        one.claim("i1", spans, [_found(A, 0, 3)])
        _block_of(repo, "s-1", 1, "i1", _spans((1, 0, 1)), ((1, 0, A),))
        with sqlite3.connect(path) as db:
            db.execute("INSERT INTO block VALUES ('s-9', 3, 'of another history')")
        db.close()
        two.reconcile(repo, "s", lambda: fences.append("two"))
        assert fences == ["one", "two"]
        # Its settling is of claims that are gone: nothing is said to be known that is not.
        _block_of(repo, "s-0", 1, "i1", spans, ((0, 3, B),))
        _settle(one, spans)
        with pytest.raises(LaneConflict, match="made anew"):
            one.claim("i1", spans, [])
        assert two.reconcile(repo, "s", lambda: fences.append("two")) == 1
        assert set(two.claim("i1", _spans((1, 1, 9)), [_found(A, 1, 3), _found(B, 1, 4)])) == {0, 1}
        assert fences == ["one", "two"]


def _block_of(
    repo: Any, lane: str, seq: int, name: str, spans: Sequence[OffsetRange], rows: tuple[tuple[int, int, Content], ...]
) -> None:
    repo.blocks.setdefault(lane, []).append(_Block(lane, seq, name, tuple(spans), rows))


def test_a_block_behind_one_that_is_not_in_is_not_said_to_be_known(path: Path) -> None:
    repo: Any = _Repo()
    with SeenIndex(path) as index:
        index.reconcile(repo, "s", lambda: None)
        _block_of(repo, "s-0", 1, "i1", _spans((0, 0, 1)), ((0, 0, A),))
        _block_of(repo, "s-0", 2, "i1", _spans((0, 1, 2)), ((0, 1, B),))
        _settle(index, _spans((0, 1, 2)), seq=2)
        assert index.reconcile(repo, "s", lambda: None) == 2
        assert index.reconcile(repo, "s", lambda: None) == 0
        assert set(index.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 0), _found(B, 1, 1)])) == {0, 1}


def test_what_the_topic_dropped_unread_is_free_but_not_what_is_in_a_block(path: Path) -> None:
    with SeenIndex(path) as index:
        index.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3), _found(B, 0, 6)])
        # Offsets below 5 were committed by a process that died before it could say so here; 5 to 9 are gone.
        index.forget_dropped("i1", 0, 5, 9)
        assert set(index.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 0), _found(B, 1, 1)])) == {0}


def test_claims_of_a_topic_that_is_no_more_are_forgotten(path: Path) -> None:
    with SeenIndex(path) as index:
        index.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3)])
        assert index.has_others("i2")
        assert not index.has_others("i1")
        index.forget_others("i2")
        assert index.claim("i2", _spans((0, 0, 9)), [_found(A, 0, 3)]) == {}


@pytest.mark.parametrize("damage", ["torn", "foreign", "empty"])
def test_a_file_that_is_no_index_is_made_anew(path: Path, damage: str) -> None:
    repo: Any = _Repo()
    _block_of(repo, "s-0", 1, "i1", _spans((0, 0, 1)), ((0, 0, A),))
    with SeenIndex(path) as index:
        index.reconcile(repo, "s", lambda: None)
    whole = path.read_bytes()
    path.write_bytes({"torn": whole[: len(whole) // 2], "foreign": b"no database" * 1000, "empty": b""}[damage])
    fences: list[str] = []
    for _ in range(2):
        try:
            with SeenIndex(path) as index:
                index.reconcile(repo, "s", lambda: fences.append("all"))
                assert set(index.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 0)])) == {0}
            break
        except LaneConflict:
            # Found out while it was read: the caller starts over.
            assert not path.exists()
    assert fences == ["all"]


def test_a_file_that_somebody_holds_is_not_taken_for_a_broken_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.seen._BUSY_SECONDS", 0.1)
    with SeenIndex(path) as index:
        index.claim("i1", _spans((0, 0, 9)), [_found(A, 0, 3)])
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with SeenIndex(path) as other, pytest.raises(RepositoryError, match="does a stopped process hold it"):
            other.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 3)])
        holder.close()
        with SeenIndex(path) as other:
            assert set(other.claim("i1", _spans((1, 0, 9)), [_found(A, 1, 3)])) == {0}


def test_two_users_events_of_one_id_have_nothing_in_common(path: Path) -> None:
    ones = [record(1, user="ab"), record(1, user="a"), record(11, user="a")]
    assert len({identity_of(one) for one in ones}) == 3
    # Where one ends and the other begins is part of it.
    assert identity_of(record(1, user="1", event_id="2x")) != identity_of(record(1, user="12", event_id="x"))
