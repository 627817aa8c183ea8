"""Blocks in git and DVC: one commit makes a block, losers leave nothing, clones see what was pinned."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ingest.errors import DataCorrupt, LaneBusy, LaneConflict, RepositoryError
from ingest.manifest import Manifest
from ingest.repository import MAIN, DataRepository
from tests.ingest.blocks import manifest_of, record, seal

# DVC's own trie library announces a change of its own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")


@pytest.fixture
def repo(tmp_path: Path) -> DataRepository:
    return DataRepository.init(tmp_path / "data", remote=str(tmp_path / "remote"))


def test_init_is_idempotent_and_a_new_remote_is_taken(repo: DataRepository, tmp_path: Path) -> None:
    head = repo.git.head(MAIN)
    again = DataRepository.init(repo.root, remote=str(tmp_path / "remote"))
    assert again.git.head(MAIN) == head
    assert again.remote == str(tmp_path / "remote")
    DataRepository.init(repo.root, remote=str(tmp_path / "elsewhere"))
    assert again.remote == str(tmp_path / "elsewhere")


def test_no_repository_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="tidegate init"):
        DataRepository(tmp_path)


def test_blocks_round_trip_through_pin_and_clone(repo: DataRepository, tmp_path: Path) -> None:
    records = [record(i, label="visa", attributes={"a": "ü"}, occurred_at="2026-01-01T00:00:00Z") for i in range(3)]
    with repo.lane("s", "s-0") as lane:
        head = seal(lane, lane.head(), records, 0)
        head = seal(lane, head, [record(3)], 3)
        assert lane.head() == head
    assert [m.seq for m in repo.manifests("s")] == [1, 2]
    assert [r for _, _, r in repo.rows(repo.manifests("s")[0])] == records
    assert repo.manifest("s-0-000000002") == repo.manifests("s")[1]
    assert [repo.manifest(name) for name in ("s-0-000000003", "s-0-0", "t-0-000000001", "s", "")] == [None] * 5
    revision = repo.pin("s")
    assert repo.pin("s") == revision
    manifests = repo.manifests("s", revision)
    assert manifests == repo.manifests("s")
    pinned = repo.checkout(revision, tmp_path / "clone")
    assert pinned.records(manifests[0]) == records
    assert pinned.records(manifests[0], split="holdout") == []
    assert pinned.records(manifests[1]) == [record(3)]
    pinned.close()


def test_a_pinned_revision_does_not_grow_and_a_clone_can_move_on(repo: DataRepository, tmp_path: Path) -> None:
    with repo.lane("s", "s-0") as lane:
        seal(lane, lane.head(), [record(0)], 0)
        first = repo.pin("s")
        seal(lane, lane.head(), [record(1)], 1)
    assert len(repo.manifests("s", first)) == 1
    second = repo.pin("s")
    for revision in (first, second):
        pinned = repo.checkout(revision, tmp_path / "clone")
        for manifest in repo.manifests("s", revision):
            assert len(pinned.records(manifest)) == 1
        pinned.close()


def test_streams_and_lanes_do_not_mix(repo: DataRepository) -> None:
    for stream, name, start in (("s", "s-0", 0), ("s", "s-1", 1), ("s-0", "s-0-0", 0), ("t", "t-0", 0)):
        with repo.lane(stream, name) as lane:
            lane.commit(manifest_of(lane, lane.head(), start, start + 1), lane.head())
    assert [m.lane for m in repo.manifests("s")] == ["s-0", "s-1"]
    assert [m.lane for m in repo.manifests("s-0")] == ["s-0-0"]
    revision = repo.pin("s")
    assert [m.lane for m in repo.manifests("s", revision)] == ["s-0", "s-1"]
    assert repo.manifests("t", revision) == []


def test_the_loser_of_a_compare_and_swap_leaves_nothing(repo: DataRepository) -> None:
    with repo.lane("s", "s-0") as lane:
        stale = lane.head()
        seal(lane, stale, [record(0)], 0)
        with pytest.raises(LaneConflict, match="another writer"):
            lane.commit(manifest_of(lane, stale, 0, 1), stale)
        # The swap itself, past the check before it: what a zombie meets that was stopped in between.
        with pytest.raises(LaneConflict, match="another writer"):
            repo.git.commit("refs/heads/lanes/s-0", stale.commit, "zombie", files={"x": b""})
        assert len(repo.manifests("s")) == 1


@pytest.mark.parametrize(("start", "end"), [(0, 2), (2, 3), (5, 6)])
def test_offsets_must_continue(repo: DataRepository, start: int, end: int) -> None:
    with repo.lane("s", "s-0") as lane:
        head = seal(lane, lane.head(), [record(0)], 0)
        with pytest.raises(LaneConflict, match="next offset is 1"):
            lane.commit(manifest_of(lane, head, start, end), head)
        head = lane.commit(manifest_of(lane, head, 4, 6), head, gaps={0})
        # A topic made anew starts where it likes.
        lane.commit(manifest_of(lane, head, 0, 1, incarnation="i2"), head)


def test_one_writer_a_lane(repo: DataRepository) -> None:
    with repo.lane("s", "s-0"):
        with pytest.raises(LaneBusy, match=str(os.getpid())):
            repo.lane("s", "s-0")
        repo.lane("s", "s-1").close()
    repo.lane("s", "s-0").close()


def test_what_a_crash_left_is_cleared(repo: DataRepository) -> None:
    with repo.lane("s", "s-0") as lane:
        head = seal(lane, lane.head(), [record(0)], 0)
        folder = lane.folder(2)
        folder.mkdir()
        (folder / "train.parquet").write_bytes(b"half")
        lane._shelf(2).add(folder)  # and killed before the commit
    with repo.lane("s", "s-0") as lane:
        assert not folder.exists()
        assert lane.head() == head
        seal(lane, head, [record(1)], 1)
        pointer = repo.git.read(str(lane.head().commit), "lanes/s-0/000001/blocks.dvc")
        assert b"nfiles: 2" in (pointer or b"")


def _add_files(root: Path, name: str) -> None:
    repo = DataRepository(root)
    for i in range(10):
        repo.commit_files({f"notes/{name}-{i}": b"x"}, "note")


def test_main_takes_writers_at_once(repo: DataRepository) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add_files, args=(repo.root, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(repo.git.read_folder(str(repo.git.head(MAIN)), "notes")) == 30


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a//b", "lanes/s-0/x", ".git/config", ""])
def test_main_refuses_odd_paths(repo: DataRepository, path: str) -> None:
    with pytest.raises(RepositoryError, match="path="):
        repo.commit_files({path: b""}, "odd")


def test_an_unknown_revision_is_named(repo: DataRepository, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="f" * 40):
        repo.manifests("s", "f" * 40)
    with pytest.raises(RepositoryError, match="f" * 40):
        repo.checkout("f" * 40, tmp_path / "clone")


def test_data_comes_back_from_the_remote(repo: DataRepository, tmp_path: Path) -> None:
    with repo.lane("s", "s-0") as lane:
        seal(lane, lane.head(), [record(0)], 0)
        lane.push()
        shutil.rmtree(repo.cache / "files")
        shutil.rmtree(lane.folder(1))
        assert len(repo.rows(repo.manifests("s")[0])) == 1
    shutil.rmtree(repo.cache / "files")
    pinned = repo.checkout(repo.pin("s"), tmp_path / "clone")
    assert pinned.records(repo.manifests("s")[0]) == [record(0)]
    pinned.close()


def test_lost_or_altered_data_is_found(repo: DataRepository, tmp_path: Path) -> None:
    with repo.lane("s", "s-0") as lane:
        seal(lane, lane.head(), [record(0)], 0)
    pinned = repo.checkout(repo.pin("s"), tmp_path / "clone")
    manifest = repo.manifests("s")[0]
    path = pinned.file(manifest, "train")
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"other")
    with pytest.raises(DataCorrupt, match="sha256"):
        pinned.records(manifest)
    pinned.close()
    shutil.rmtree(repo.cache / "files")
    bare = repo.checkout(repo.pin("s"), tmp_path / "other")
    with pytest.raises(DataCorrupt, match="neither in the cache nor in the remote"):
        bare.records(manifest)
    bare.close()


def test_a_remote_that_is_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    repo = DataRepository.init(tmp_path / "data", remote=str(tmp_path / "file" / "remote"))
    with repo.lane("s", "s-0") as lane:
        lane.push()  # nothing to push yet
        seal(lane, lane.head(), [record(0)], 0)
        with pytest.raises(RepositoryError, match=r"dvc push: .*service\.data\.remote") as caught:
            lane.push()
    assert "\n" not in str(caught.value)


def test_dvc_itself_pulls_in_a_plain_clone(repo: DataRepository, tmp_path: Path) -> None:
    with repo.lane("s", "s-0") as lane:
        seal(lane, lane.head(), [record(0)], 0)
        lane.push()
    repo.pin("s")
    clone = tmp_path / "plain"
    subprocess.run(["git", "clone", "--quiet", str(repo.root), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "pull", "--quiet"], check=True, cwd=clone)
    manifest = Manifest.from_json((clone / "lanes/s-0/000001/manifests/s-0-000000001.json").read_bytes())
    assert (clone / manifest.files[0].path).is_file()
    status = subprocess.run(["git", "status", "--porcelain"], check=True, cwd=clone, capture_output=True, text=True)
    assert status.stdout == ""


def test_a_broken_manifest_is_one_line() -> None:
    with pytest.raises(RepositoryError, match="backup"):
        Manifest.from_json(b"{}")
