"""A long history made in bulk: what a lane looks like after thousands of blocks, without having sealed them one by one.

Commits, shelves, manifests, frontier and index are as ingest leaves them; the blocks' data files are not made.
"""

import sqlite3
from collections.abc import Iterator

import pygit2

from ingest import frontier, layout
from ingest.manifest import Counts, DataFile, FrozenPolicy, Manifest, OffsetRange
from ingest.repository import DataRepository
from ingest.seen import SeenIndex
from tests.ingest.blocks import SHA, frozen

INCARNATION = "before"


def build_history(repo: DataRepository, stream: str, blocks: int, records: int) -> None:
    """Give lane 0 of a stream `blocks` blocks of so many records each, of an earlier incarnation of its topic.

    Full shelves only: DVC would look for the data of a shelf that is added to.
    """
    assert blocks % layout.SHELF_BLOCKS == 0
    lane = f"{stream}-0"
    git = repo.git
    pygit2.settings.enable_fsync_gitdir(False)
    try:
        head = None
        for seq in range(1, blocks + 1):
            manifest = _manifest(stream, lane, seq, records)
            shelf = layout.shelf_path(lane, seq)
            pointer = f"outs:\n- md5: {seq:032x}.dir\n  size: 1\n  nfiles: 2\n  hash: md5\n  path: blocks\n"
            files = {
                layout.manifest_path(lane, seq): manifest.to_json(),
                layout.frontier_path(lane): frontier.to_json({INCARNATION: {0: seq * records}}),
                f"{shelf}/{layout.POINTER}": pointer.encode(),
                f"{shelf}/.gitignore": f"/{layout.TRACKED}\n".encode(),
            }
            head = git.write_commit(head, f"Seal {manifest.block_id}", files=files)
        if head is not None:
            git.move(layout.lane_ref(lane), None, head)
    finally:
        pygit2.settings.enable_fsync_gitdir(True)
    _index(repo, stream, lane, blocks, records)


def _manifest(stream: str, lane: str, seq: int, records: int) -> Manifest:
    start = (seq - 1) * records
    files = tuple(
        DataFile.model_validate({"path": layout.data_path(lane, seq, split), "sha256": SHA, "split": split})
        for split in ("train", "holdout")
    )
    return Manifest(
        block_id=layout.block_id(lane, seq),
        stream=stream,
        lane=lane,
        seq=seq,
        topic="t",
        incarnation=INCARNATION,
        offsets=(OffsetRange(partition=0, start=start, end=start + records),),
        schema_version=1,
        suite_sha256=SHA,
        counts=Counts(sealed=records, rejected=0, duplicate=0, set_aside=0),
        files=files,
        nonce=f"{seq:032x}",
        policy=FrozenPolicy.model_validate({**frozen(records), "unit": "record"}),
        sealed_at="2026-01-01T00:00:00Z",
    )


def _index(repo: DataRepository, stream: str, lane: str, blocks: int, records: int) -> None:
    path = repo.lanes / f"{stream}.seen.sqlite3"
    path.parent.mkdir(parents=True, exist_ok=True)
    SeenIndex(path).close()
    db = sqlite3.connect(path)

    def identities() -> Iterator[tuple[bytes, bytes]]:
        # In the order of the tree, so that it is built in one pass; evenly over all hashes, as identities are.
        total = blocks * records
        step = (1 << 128) // max(total, 1)
        for number in range(total):
            yield (number * step).to_bytes(16, "big"), b"0" * 16

    with db:
        db.executemany("INSERT INTO seen VALUES (?, ?)", identities())
        db.execute("INSERT INTO made VALUES ('in bulk')")
        db.execute("INSERT INTO block VALUES (?, ?, ?)", (lane, blocks, f"{blocks:032x}"))
    db.close()
