import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.states import (
    MAY_BECOME,
    STAGE_OF,
    Change,
    ModelVersion,
    State,
    in_production,
    promote,
    reject,
    stale,
    supersede,
    withdraw,
)


def version(number, state, stage=None, sha=None, parent=""):
    tags = {"tidegate.state": state, "tidegate.adapter_sha256": sha or f"sha{number}", "tidegate.parent_sha256": parent}
    return ModelVersion(number, stage or STAGE_OF[State(state)], tags, "2026-01-01T00:00:00Z", "run", (), "")


def test_promotion_retires_what_was_live_and_makes_other_candidates_stale():
    versions = [
        version(1, "live"),
        version(2, "candidate", parent="sha1"),
        version(3, "candidate", parent="sha1"),
        version(4, "failed", parent="sha1"),
    ]
    assert set(promote(versions, 2)) == {
        Change(2, State.LIVE),
        Change(1, State.RETIRED),
        Change(3, State.STALE),
    }


def test_rollback_keeps_a_candidate_trained_from_the_version_it_returns_to():
    versions = [
        version(1, "retired"),
        version(2, "live", parent="sha1"),
        version(3, "candidate", parent="sha2"),
        version(4, "candidate", parent="sha1"),
    ]
    assert set(promote(versions, 1)) == {Change(1, State.LIVE), Change(2, State.RETIRED), Change(3, State.STALE)}


def test_withdrawal_leaves_only_candidates_of_the_bare_base():
    versions = [version(1, "live"), version(2, "candidate", parent="sha1"), version(3, "candidate")]
    assert set(withdraw(versions, 1)) == {Change(1, State.RETIRED), Change(2, State.STALE)}


def test_one_candidate_waits_at_a_time():
    versions = [version(1, "candidate"), version(2, "candidate"), version(3, "candidate"), version(4, "rejected")]
    assert supersede(versions, 3) == (Change(1, State.SUPERSEDED), Change(2, State.SUPERSEDED))


@pytest.mark.parametrize("state", list(State))
def test_only_what_waits_can_be_rejected(state):
    versions = [version(1, state)]
    if state in {State.CANDIDATE, State.STALE}:
        assert reject(versions, 1) == (Change(1, State.REJECTED),)
    else:
        with pytest.raises(ValueError, match=f"version 1 is {state}: only a candidate can be rejected"):
            reject(versions, 1)


@pytest.mark.parametrize("state", list(State))
def test_every_state_has_its_stage_and_its_way_on(state):
    assert state in MAY_BECOME
    stage = {State.CANDIDATE: "Staging", State.LIVE: "Production"}.get(state, "Archived")
    assert STAGE_OF[state] == stage == Change(1, state).stage


def test_a_state_nobody_knows_is_none():
    assert version(1, "live").state is State.LIVE
    forged = ModelVersion(1, "None", {"tidegate.state": "blessed"}, "", "", (), "")
    assert forged.state is None


@given(
    st.lists(
        st.tuples(st.sampled_from(list(State)), st.sampled_from(["", "sha1", "sha2", "sha3"])), min_size=1, max_size=6
    ),
    st.data(),
)
def test_after_any_change_one_version_is_live_at_most_and_every_step_is_allowed(drawn, data):
    versions = [version(n, state, parent=parent) for n, (state, parent) in enumerate(drawn, 1)]
    promotable = [v.version for v in versions if v.state and State.LIVE in MAY_BECOME[v.state]]
    if not promotable:
        return
    number = data.draw(st.sampled_from(promotable))
    before = {v.version: v.state for v in versions}
    changes = promote(versions, number)
    for change in changes:
        assert change.state in MAY_BECOME[before[change.version]]
    after = before | {c.version: c.state for c in changes}
    assert [n for n, state in after.items() if state is State.LIVE] == [number]
    assert len(changes) == len({c.version for c in changes})
    assert stale([v for v in versions if after[v.version] is State.CANDIDATE], f"sha{number}") == ()
    assert {v.version for v in in_production(versions)} <= {c.version for c in changes}
