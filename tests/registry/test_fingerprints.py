import os
import time

import pytest

from learner.adapter import WEIGHTS_FILE, adapter_sha256
from learner.errors import AdapterError
from registry import fingerprints
from registry.fingerprints import Fingerprints
from tests.registry.conftest import write_adapter


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """An adapter, and how often its files were really read."""
    monkeypatch.setattr(fingerprints, "SETTLED_S", 0.2)
    write_adapter(tmp_path / "a", 1)
    time.sleep(0.3)
    read = []

    def counted(folder):
        read.append(folder)
        return adapter_sha256(folder)

    monkeypatch.setattr(fingerprints, "adapter_sha256", counted)
    return tmp_path / "a", read


def test_files_that_are_the_same_are_read_once(adapter):
    folder, read = adapter
    hashes = Fingerprints()
    assert {hashes.sha256(folder) for _ in range(5)} == {adapter_sha256(folder)}
    assert len(read) == 1


def overwrite(file):
    file.write_bytes(b"x" + file.read_bytes()[1:])


def overwrite_and_set_the_time_back(file):
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_a_file_of_the_same_size_and_time(file):
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"x" + file.read_bytes()[1:])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


def append(file):
    with file.open("ab") as out:
        out.write(b"x")


@pytest.mark.parametrize(
    "change", [overwrite, overwrite_and_set_the_time_back, replace_by_a_file_of_the_same_size_and_time, append]
)
def test_a_changed_file_is_noticed_whatever_its_time_says(adapter, change):
    folder, _ = adapter
    hashes = Fingerprints()
    before = hashes.sha256(folder)
    change(folder / WEIGHTS_FILE)
    assert hashes.sha256(folder) == adapter_sha256(folder) != before


def test_two_writes_within_a_tick_of_the_clock_are_noticed(tmp_path):
    hashes = Fingerprints()
    for seed in range(200):
        write_adapter(tmp_path / "a", seed)
        assert hashes.sha256(tmp_path / "a") == adapter_sha256(tmp_path / "a")


def test_a_missing_file_is_named(adapter):
    folder, _ = adapter
    hashes = Fingerprints()
    hashes.sha256(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=WEIGHTS_FILE):
        hashes.sha256(folder)
