import stat
from dataclasses import replace

import pytest
import torch

from learner.checkpoint import FILE, Checkpoint, discard, load, save
from learner.errors import ResumeRefused

CONTEXT = {"plan": "1", "data": "2", "base": "3", "code": "4"}


def checkpoint(step=5):
    return Checkpoint(step, 2, "bf16", torch.arange(4.0), torch.ones(4), torch.zeros(4))


def test_a_checkpoint_comes_back_as_it_was_and_is_private(tmp_path):
    save(tmp_path / "c", checkpoint(), CONTEXT)
    found = load(tmp_path / "c", CONTEXT)
    assert (found.step, found.threads, found.precision) == (5, 2, "bf16")
    assert torch.equal(found.theta, torch.arange(4.0))
    assert stat.S_IMODE((tmp_path / "c" / FILE).stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "c").iterdir()] == [FILE]


def test_what_early_stopping_has_seen_comes_back_too(tmp_path):
    assert checkpoint().best is None
    save(tmp_path, replace(checkpoint(), best=torch.full((4,), 7.0), stopping='{"waited": 1}'), CONTEXT)
    found = load(tmp_path, CONTEXT)
    assert torch.equal(found.best, torch.full((4,), 7.0))
    assert found.stopping == '{"waited": 1}'


def test_no_checkpoint_is_no_error(tmp_path):
    assert load(tmp_path, CONTEXT) is None


@pytest.mark.parametrize("name", sorted(CONTEXT))
def test_another_hash_refuses_to_resume(tmp_path, name):
    save(tmp_path, checkpoint(), CONTEXT)
    with pytest.raises(ResumeRefused, match=rf"{name}_sha256=.*new attempt"):
        load(tmp_path, {**CONTEXT, name: "other"})


def test_a_torn_new_file_leaves_the_old_one_in_force(tmp_path):
    save(tmp_path, checkpoint(5), CONTEXT)
    (tmp_path / f"{FILE}.new").write_bytes(b"torn")
    assert load(tmp_path, CONTEXT).step == 5


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    (tmp_path / FILE).write_bytes(b"not safetensors")
    with pytest.raises(ResumeRefused, match="remove it"):
        load(tmp_path, CONTEXT)


def test_discard_leaves_nothing(tmp_path):
    save(tmp_path, checkpoint(), CONTEXT)
    discard(tmp_path)
    discard(tmp_path)
    assert list(tmp_path.iterdir()) == []
