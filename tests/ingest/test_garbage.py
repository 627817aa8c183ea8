"""Garbage collection of the cache: what kept revisions name stays, what a crash or a later block left goes."""

from pathlib import Path

import pytest

from ingest import garbage
from ingest.errors import DataCorrupt, RepositoryError
from ingest.repository import DataRepository
from tests.ingest.blocks import record, seal

# DVC's own trie library announces a change of its own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")


@pytest.fixture
def repo(tmp_path: Path) -> DataRepository:
    """Four blocks, pinned after the first and after the third."""
    repo = DataRepository.init(tmp_path / "data", remote=str(tmp_path / "remote"))
    with repo.lane("s", "s-0") as lane:
        for number in range(4):
            seal(lane, lane.head(), [record(number)], number)
            if number in {0, 2}:
                repo.pin("s")
        # A block that a crash kept from being committed.
        folder = lane.folder(5)
        folder.mkdir(parents=True)
        (folder / "train.parquet").write_bytes(b"never committed")
        lane._shelf(5).add(folder)
        lane.recover()
    return repo


def _pins(repo: DataRepository) -> list[str]:
    """Main's commits that pinned something, oldest first."""
    walk = repo.git._repo.walk(repo.git.head("refs/heads/main"))
    return [str(c.id) for c in walk if c.message.startswith("Pin")][::-1]


def _readable(repo: DataRepository, revision: str, dest: Path) -> int:
    pinned = repo.checkout(revision, dest)
    try:
        return sum(len(pinned.records(manifest)) for manifest in repo.manifests("s", revision))
    finally:
        pinned.close()


def test_what_a_kept_revision_names_stays(repo: DataRepository, tmp_path: Path) -> None:
    first, second = _pins(repo)
    found = garbage.find(repo, [first], older_seconds=0)
    # The shelf as the second block and the crash left it (main keeps the third, the lane the fourth), the listing that
    # DVC makes of each folder put on a shelf, and the crash's file.
    shelves = [path for path in found.files if b"s-0-000000002/" in path.read_bytes()]
    assert len(shelves) == 2
    assert sorted(path.suffix for path in found.files) == ["", *[".dir"] * 6]
    assert (found.kept_revisions, found.kept_files) == (3, 4 + 3)
    garbage.remove(repo, found)
    assert garbage.find(repo, [first], older_seconds=0).files == ()
    for number, revision in enumerate((first, second, repo.pin("s"))):
        assert _readable(repo, revision, tmp_path / f"clone-{number}") == len(repo.manifests("s", revision))
    with repo.lane("s", "s-0") as lane:
        seal(lane, lane.head(), [record(9)], 4)
    assert len(repo.manifests("s")) == 5


def test_a_revision_that_nobody_names_loses_its_listing_but_no_block(repo: DataRepository, tmp_path: Path) -> None:
    first, _ = _pins(repo)
    garbage.remove(repo, garbage.find(repo, [], older_seconds=0))
    with pytest.raises(DataCorrupt):
        _readable(repo, first, tmp_path / "old")
    assert _readable(repo, repo.pin("s"), tmp_path / "new") == 4


def test_what_is_young_is_left_alone(repo: DataRepository) -> None:
    assert garbage.find(repo, []).files == ()


def test_nothing_is_removed_on_a_guess(repo: DataRepository) -> None:
    with pytest.raises(RepositoryError, match="f" * 40):
        garbage.find(repo, ["f" * 40], older_seconds=0)
    for listing in repo.cache.rglob("*.dir"):
        listing.chmod(0o600)
        listing.write_bytes(b"torn")
    with pytest.raises(DataCorrupt, match="dvc fetch"):
        garbage.find(repo, [], older_seconds=0)
