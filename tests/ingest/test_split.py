"""A user is on one side, for ever, and the share is about right."""

import pytest

from ingest.errors import SettingError
from ingest.split import check_split, split_of

KEY = b"k" * 32


def test_a_user_stays_where_it_is() -> None:
    sides = {f"u{i}": split_of(f"u{i}", KEY, 0.1) for i in range(500)}
    assert all(split_of(user, KEY, 0.1) == side for user, side in sides.items())
    assert set(sides.values()) == {"train", "holdout"}


def test_share_is_met_and_can_miss() -> None:
    held = sum(split_of(f"u{i}", KEY, 0.1) == "holdout" for i in range(20_000))
    # Six standard deviations of Binomial(20000, 0.1) are 255; a share of 0.2 would miss by 2000.
    assert abs(held - 2000) < 255


def test_another_key_splits_otherwise() -> None:
    users = [f"u{i}" for i in range(500)]
    assert [split_of(u, KEY, 0.5) for u in users] != [split_of(u, b"j" * 32, 0.5) for u in users]


def test_no_holdout() -> None:
    assert {split_of(f"u{i}", KEY, 0.0) for i in range(500)} == {"train"}


@pytest.mark.parametrize(("key", "share"), [(b"short", 0.1), (KEY, 1.0), (KEY, -0.1)])
def test_impossible_settings_are_named(key: bytes, share: float) -> None:
    with pytest.raises(SettingError, match="must be"):
        check_split(key, share)
