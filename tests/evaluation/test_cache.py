"""What is kept is what was said, or nothing."""

import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import cache as module
from evaluation.cache import Cache, Entry

KEY = {"adapter": "a" * 64, "asked": "b" * 64, "version": "1", "within": 0.01}
SCORES = np.array([[-1.5, -2.25], [-0.1, float(np.nextafter(-7.0, 0))]])
WHOLE = Entry(SCORES, {"where is it": "refund", "¿?": "Dónde 我 \n", "": ""})


def same(one, other):
    return one is not None and one.answers == other.answers and np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize("entry", [WHOLE, Entry(scores=SCORES), Entry(answers={"x": "y"}), Entry(answers={})])
def test_an_entry_comes_back_to_the_last_bit(tmp_path, entry):
    kept = Cache(tmp_path / "kept")
    assert kept.get(KEY) is None
    kept.put(KEY, entry)
    found = Cache(tmp_path / "kept").get(dict(reversed(KEY.items())))
    assert found.answers == entry.answers
    assert (found.scores is None) == (entry.scores is None)
    assert entry.scores is None or (found.scores == entry.scores).all()


@pytest.mark.parametrize("part", KEY)
def test_anything_else_that_was_asked_is_another_entry(tmp_path, part):
    kept = Cache(tmp_path)
    kept.put(KEY, WHOLE)
    assert kept.get({**KEY, part: "other"}) is None


def test_only_the_owner_may_read_it(tmp_path):
    kept = Cache(tmp_path / "kept")
    kept.put(KEY, WHOLE)
    (file,) = (tmp_path / "kept").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@given(st.data())
def test_a_damaged_entry_is_never_believed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("kept")
    kept = Cache(folder)
    kept.put(KEY, WHOLE)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    found = kept.get(KEY)
    assert found is None or same(found, WHOLE), "a byte that says nothing, such as a date, may change"
    kept.put(KEY, WHOLE)
    assert same(kept.get(KEY), WHOLE)


def test_an_entry_under_a_false_name_is_not_believed(tmp_path):
    kept = Cache(tmp_path)
    kept.put(KEY, WHOLE)
    (file,) = tmp_path.iterdir()
    other = {**KEY, "adapter": "c" * 64}
    file.rename(kept._path(other))
    assert kept.get(other) is None


def test_the_oldest_entries_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES_MAX", 3)
    kept = Cache(tmp_path)
    for number in range(5):
        kept.put({**KEY, "asked": str(number)}, WHOLE)
    assert len(list(tmp_path.iterdir())) == 3
    assert kept.get({**KEY, "asked": "4"}) is not None


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    kept = Cache(tmp_path / "kept")
    kept.put(KEY, WHOLE)
    assert kept.get(KEY) is None
