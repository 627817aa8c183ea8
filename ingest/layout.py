"""Where things stand in the data repository: the only file that puts its paths together.

    lanes/<lane>/frontier.json                       how far this lane has read each partition
    lanes/<lane>/<shelf>/manifests/<block>.json      a hundred blocks to a shelf
    lanes/<lane>/<shelf>/blocks.dvc                  DVC's pointer to the shelf's data
    lanes/<lane>/<shelf>/blocks/<block>/<split>.parquet

Git writes a whole folder anew for each file put into it, and DVC lists a tracked folder whole: a shelf bounds both,
so that sealing the ten-thousandth block costs what sealing the tenth did.
"""

from __future__ import annotations

from typing import Final

MAIN: Final = "refs/heads/main"
LANE_REFS: Final = "refs/heads/lanes/"
TRACKED: Final = "blocks"
"""The one folder DVC tracks on a shelf."""
POINTER: Final = f"{TRACKED}.dvc"
SHELF_BLOCKS: Final = 100


def lane_ref(lane: str) -> str:
    """The lane's branch."""
    return LANE_REFS + lane


def block_id(lane: str, seq: int) -> str:
    """Name of a block; sorts like its number."""
    return f"{lane}-{seq:09d}"


def shelf(seq: int) -> str:
    """The shelf of a lane's block: 1 to 100 are on the first."""
    return f"{(seq - 1) // SHELF_BLOCKS + 1:06d}"


def shelf_path(lane: str, seq: int) -> str:
    """Folder of a shelf, from the repository's root."""
    return f"lanes/{lane}/{shelf(seq)}"


def manifest_path(lane: str, seq: int) -> str:
    """File of a manifest."""
    return f"{shelf_path(lane, seq)}/manifests/{block_id(lane, seq)}.json"


def data_path(lane: str, seq: int, split: str) -> str:
    """File of a block's split, as its manifest names it."""
    return f"{shelf_path(lane, seq)}/{TRACKED}/{block_id(lane, seq)}/{split}.parquet"


def frontier_path(lane: str) -> str:
    """File of the offsets a lane has reached."""
    return f"lanes/{lane}/frontier.json"


def stream_of(lane: str) -> str:
    """The stream a lane belongs to: `support-desk-0` is lane 0 of `support-desk`."""
    return lane.rpartition("-")[0]


def lane_order(lane: str) -> tuple[str, int]:
    """Sorts lane 10 after lane 9."""
    stream, _, number = lane.rpartition("-")
    return (stream, int(number)) if number.isdigit() else (lane, -1)
