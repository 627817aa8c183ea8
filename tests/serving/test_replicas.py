"""Which version all replicas are sent requests for: examples, and any order of what they may say."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.replicas import Agreement, Said, said_of

PATIENCE_S = 10.0


def at(seq, version=None, held=()):
    """A replica that followed decision `seq` and still holds what the decisions `held` had made current."""
    version = seq if version is None else version
    return Said(f"{version}:", f"desk@{version}", version, seq, frozenset({f"{version}:", *(f"{v}:" for v in held)}))


def settled(*said, now_s=0.0, agreement=None):
    agreement = agreement or Agreement("desk", settle_s=PATIENCE_S)
    named = {str(number): one for number, one in enumerate(said) if one}
    if to := agreement.next(named, now_s):
        agreement.move(to)
    agreement.confirm(named)
    return agreement


def test_traffic_moves_when_every_replica_holds_the_later_version():
    desk = settled(at(1), at(1))
    assert desk.traffic.version == 1
    settled(at(2, held=[1]), at(1), agreement=desk)
    assert desk.traffic.version == 1
    settled(at(2, held=[1]), at(2, held=[1]), agreement=desk)
    assert desk.traffic.version == 2
    assert desk.complete({"0": at(2), "1": at(2)})


def test_patience_with_a_replica_ends():
    desk = settled(at(1), at(1))
    ahead, late = at(2, held=[1]), at(1)
    settled(ahead, late, now_s=5.0, agreement=desk)
    settled(ahead, late, now_s=14.9, agreement=desk)
    assert desk.traffic.version == 1
    settled(ahead, late, now_s=15.0, agreement=desk)
    assert desk.traffic.version == 2
    assert desk.behind({"0": ahead, "1": late}) == ["1"]
    assert not desk.complete({"0": ahead, "1": late})


def test_a_rollback_is_a_later_decision():
    desk = settled(at(7, 3), at(7, 3))
    settled(at(8, 2, held=[3]), at(8, 2, held=[3]), agreement=desk)
    assert desk.traffic.version == 2


def test_a_replica_that_is_out_is_not_waited_for():
    desk = settled(at(1), at(1))
    settled(at(2, held=[1]), None, agreement=desk)
    assert desk.traffic.version == 2


def test_a_version_that_nobody_holds_is_left_at_once():
    desk = settled(at(1), at(1))
    settled(at(2), at(3, held=[2]), agreement=desk)
    assert desk.traffic.version in {2, 3}


def test_the_bare_base_by_hand_is_followed_at_once_and_left_when_all_have_left_it():
    desk = settled(at(4), at(4))
    bare, live = at(4, 0), at(4)
    settled(bare, live, agreement=desk)
    assert desk.traffic.version == 0
    assert desk.behind({"0": bare, "1": live}) == ["1"]
    settled(live, bare, agreement=desk)
    assert desk.traffic.version == 0
    settled(live, live, agreement=desk)
    assert desk.traffic.version == 4


def test_a_router_that_starts_goes_below_no_decision_it_has_kept():
    assert settled(at(4), agreement=Agreement("desk", floor=5)).traffic is None
    assert settled(at(4), at(5, held=[4]), agreement=Agreement("desk", floor=5)).traffic.version == 5


def test_an_approval_of_what_answers_already_counts_as_a_decision():
    desk = settled(at(1), at(1))
    settled(at(5, 1), at(5, 1), agreement=desk)
    assert (desk.traffic.version, desk.floor) == (1, 5)


@pytest.mark.parametrize("change", [{"healthy": False}, {"pin": ""}])
def test_a_stream_that_cannot_answer_is_left_out(change):
    told = {"pin": "1:", "version": "desk@1", "number": 1, "approval_seq": 3, "held": ["1:", "0:"], "healthy": True}
    (one,) = said_of({"streams": {"desk": told}}).values()
    assert dataclasses.replace(one, state={}) == at(3, 1, held=[0])
    assert said_of({"streams": {"desk": told | change}}) == {}


@st.composite
def histories(draw):
    """Turns in which some of three replicas follow up to the latest decision, fall out, or start again."""
    decided = draw(st.lists(st.integers(1, 4), min_size=3, max_size=8))  # decision n makes decided[n - 1] current
    turns, where = [], [1, 1, 1]
    for last in range(1, len(decided) + 1):
        for _ in range(draw(st.integers(1, 3))):
            said = []
            for number in range(3):
                old = where[number]
                where[number] = draw(st.integers(old, last))
                fate = draw(st.sampled_from(["well", "well", "out", "started again"]))
                held = decided[max(0, where[number] - 3) : where[number]] if fate == "well" else []
                said.append(None if fate == "out" else at(where[number], decided[where[number] - 1], held))
            turns.append((draw(st.floats(0, 8)), said))
    return turns


@given(histories())
def test_traffic_never_goes_back_whatever_replicas_say(turns):
    desk, now_s, before = Agreement("desk", settle_s=PATIENCE_S), 0.0, 0
    for pause_s, said in turns:
        now_s += pause_s
        settled(*said, now_s=now_s, agreement=desk)
        assert desk.floor >= before
        before = desk.floor
        present = [one for one in said if one]
        if desk.traffic and present:
            assert any(desk.traffic.pin in one.held for one in present) or all(one.seq < desk.floor for one in present)
