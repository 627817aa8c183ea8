"""Crashes at every point of a decision. A registry in memory stands in, because it must fail where it is told to."""

# ruff: noqa: ARG002 - the stand-in has the arguments of its protocol

import json
from dataclasses import replace

import pytest

from privacy.signing import SigningKey, TrustedKeys
from registry.approvals import Approvals
from registry.errors import PromotionRefused, RegistryError
from registry.promotion import Promotions, Trust
from registry.states import ModelVersion
from tests.registry.conftest import World, write_adapter


class Killed(BaseException):
    """The process dies here."""


class Memory:
    """`promotion.Registry` in a dictionary, which dies or fails when asked to."""

    def __init__(self):
        self.rows, self.adapters, self.fault = {}, {}, lambda _step: None

    def versions(self, model):
        return list(self.rows.values())

    def move(self, model, version, stage, *, archive_existing=False):
        self.fault(f"before move to {stage}")
        if archive_existing:
            for number, row in self.rows.items():
                if row.stage == stage and number != version:
                    self.rows[number] = replace(row, stage="Archived")
        self.rows[version] = replace(self.rows[version], stage=stage)
        self.fault(f"after move to {stage}")

    def set_tag(self, model, version, key, value):
        self.fault(f"before {key}")
        self.rows[version] = replace(self.rows[version], tags={**self.rows[version].tags, key: value})

    def fetch_adapter(self, model, version, dest):
        return self.adapters[version]


@pytest.fixture
def desk(tmp_path):
    """Version 1 is live, version 2 is a candidate trained from it."""
    world, registry = World(tmp_path, None), Memory()
    parent = ""
    for number in (1, 2):
        registry.adapters[number] = tmp_path / f"adapter{number}"
        sha = write_adapter(registry.adapters[number], number)
        tags = world.documents(sha, parent)
        registry.rows[number] = ModelVersion(number, "Staging", tags, "2026-01-01T00:00:00Z", "run", (), "")
        parent = sha if number == 1 else parent
    approvals = Approvals(f"sqlite:///{tmp_path / 'approvals.db'}", world.key("approvals"))
    desk = Promotions(registry, approvals, Trust.from_dir(tmp_path / "keys"))
    desk.promote("desk", 1, who="ada", why="first")
    return desk


def at(step, error):
    def fault(here):
        if here == step:
            raise error

    return fault


def stages(desk):
    return {row.version: row.stage for row in desk.registry.versions("desk")}


STEPS = ["before tidegate.approval", "before move to Production"]


@pytest.mark.parametrize("step", STEPS)
def test_killed_before_the_move_the_old_version_stands_and_the_next_decision_says_so(desk, tmp_path, step):
    desk.registry.fault = at(step, Killed())
    with pytest.raises(Killed):
        desk.promote("desk", 2, who="ada", why="second")
    assert stages(desk) == {1: "Production", 2: "Staging"}
    assert desk.approvals.latest("desk")["version"] == 2  # the decision is signed, and was not carried out
    desk.registry.fault = lambda _step: None
    desk.settle("desk")
    undone = desk.approvals.latest("desk")
    assert (undone["version"], undone["kind"], undone["from"], undone["to"], undone["who"]) == (
        2,
        "reject",
        "Production",
        "Staging",
        "tidegate",
    )
    assert desk.approvals.standing("desk").live["version"] == 1
    again = desk.promote("desk", 2, who="ada", why="again")
    assert again["kind"] == "promote"
    assert stages(desk) == {1: "Archived", 2: "Production"}
    assert desk.approvals.verify(TrustedKeys.from_dir(tmp_path / "keys")) == 4


def test_killed_after_the_move_it_is_approved_signed_and_live(desk):
    desk.registry.fault = at("after move to Production", Killed())
    with pytest.raises(Killed):
        desk.promote("desk", 2, who="ada", why="second")
    desk.registry.fault = lambda _step: None
    desk.settle("desk")
    assert stages(desk) == {1: "Archived", 2: "Production"}
    assert desk.approvals.standing("desk").live["version"] == 2
    assert json.loads(desk.registry.rows[2].tag("approval")) == desk.approvals.latest("desk")
    assert len(desk.approvals.history("desk")) == 2


def test_a_move_that_fails_is_taken_back_at_once(desk):
    desk.registry.fault = at("before move to Production", RegistryError("disk full"))
    with pytest.raises(RegistryError, match="disk full"):
        desk.promote("desk", 2, who="ada", why="second")
    assert desk.approvals.standing("desk").live["version"] == 1
    assert desk.approvals.latest("desk")["why"] == "approved, but MLflow never moved it"


def test_a_lost_response_of_a_move_that_happened_is_no_failure(desk):
    desk.registry.fault = at("after move to Production", RegistryError("no answer"))
    assert desk.promote("desk", 2, who="ada", why="second")["version"] == 2
    assert stages(desk) == {1: "Archived", 2: "Production"}
    assert desk.approvals.latest("desk")["kind"] == "promote"


def test_a_state_that_cannot_be_shown_does_not_undo_the_decision(desk):
    desk.registry.fault = at("before tidegate.state", RegistryError("no answer"))
    assert desk.promote("desk", 2, who="ada", why="second")["version"] == 2
    assert stages(desk) == {1: "Archived", 2: "Production"}


def test_a_withdrawal_that_fails_is_taken_back(desk):
    desk.registry.fault = at("before move to Archived", RegistryError("disk full"))
    with pytest.raises(RegistryError, match="disk full"):
        desk.withdraw("desk", 1, to_stage="Archived", who="ada", why="off")
    assert desk.approvals.standing("desk").live["version"] == 1
    assert stages(desk)[1] == "Production"


def test_a_live_version_moved_past_the_guard_is_written_down(desk):
    desk.registry.move("desk", 1, "None")
    desk.settle("desk")
    found = desk.approvals.latest("desk")
    assert (found["kind"], found["who"], found["to"]) == ("rollback", "tidegate", "None")
    assert desk.approvals.standing("desk").live is None


def test_a_version_put_into_production_past_the_guard_counts_for_nothing(desk):
    desk.registry.move("desk", 2, "Production")
    assert stages(desk) == {1: "Production", 2: "Production"}
    desk.settle("desk")
    assert desk.approvals.standing("desk").live["version"] == 1
    signed = desk.promote("desk", 2, who="ada", why="properly now")
    assert (signed["kind"], signed["from"]) == ("promote", "Production")
    assert stages(desk) == {1: "Archived", 2: "Production"}


def test_an_emergency_stands_until_a_decision_makes_it_lasting(desk):
    first = desk.approvals.latest("desk")
    desk.promote("desk", 2, who="ada", why="second")
    desk.approvals.append(
        model="desk",
        version=1,
        adapter_sha256=first["adapter_sha256"],
        from_stage="unknown",
        to_stage="Production",
        who="oncall",
        why="MLflow is down and two talks nonsense",
        kind="emergency",
    )
    desk.settle("desk")
    assert desk.approvals.latest("desk")["kind"] == "emergency"
    lasting = desk.promote("desk", 1, who="oncall", why="made lasting")
    assert (lasting["kind"], lasting["from"]) == ("rollback", "Archived")
    assert stages(desk) == {1: "Production", 2: "Archived"}


def test_what_was_decided_after_a_crash_does_not_hide_it(desk, tmp_path):
    # A third version, rejected while a promotion of the second hangs between the history and MLflow.
    desk.registry.rows[3] = replace(desk.registry.rows[2], version=3)
    desk.registry.fault = at("before move to Production", Killed())
    with pytest.raises(Killed):
        desk.promote("desk", 2, who="ada", why="second")
    desk.registry.fault = lambda _step: None
    desk.reject("desk", 3, to_stage="Archived", who="bob", why="no")
    assert [(r["version"], r["kind"], r["from"]) for r in desk.approvals.history("desk")[1:]] == [
        (2, "promote", "Staging"),
        (2, "reject", "Production"),
        (3, "reject", "Staging"),
    ]
    assert desk.approvals.standing("desk").live["version"] == 1


def test_histories_that_were_settled_late_are_read_right(desk):
    # As written before a rejection settled first: the row that takes back does not follow what it takes back.
    desk.registry.fault = at("before move to Production", Killed())
    with pytest.raises(Killed):
        desk.promote("desk", 2, who="ada", why="second")
    lost = desk.approvals.latest("desk")
    rest = {"model": "desk", "adapter_sha256": lost["adapter_sha256"], "who": "x", "why": ""}
    desk.approvals.append(version=3, from_stage="Staging", to_stage="Archived", kind="reject", **rest)
    desk.approvals.append(version=2, from_stage="Production", to_stage="Staging", kind="reject", **rest)
    assert desk.approvals.standing("desk").live["version"] == 1


@pytest.mark.parametrize("step", ["before move to Archived", "after move to Archived", "before tidegate.state"])
def test_a_rejection_that_was_signed_is_carried_out_and_is_there_once(desk, step):
    desk.registry.fault = at(step, Killed())
    with pytest.raises(Killed):
        desk.reject("desk", 2, to_stage="Archived", who="ada", why="rude")
    desk.registry.fault = lambda _step: None
    again = desk.reject("desk", 2, to_stage="Archived", who="ada", why="rude")
    assert again == desk.approvals.latest("desk")
    assert len(desk.approvals.history("desk")) == 2
    assert (stages(desk)[2], desk.registry.rows[2].tag("state")) == ("Archived", "rejected")
    with pytest.raises(PromotionRefused, match="is rejected: only a candidate"):
        desk.reject("desk", 2, to_stage="Archived", who="bob", why="rude")


@pytest.mark.parametrize("step", ["after move to Production", "before tidegate.state"])
def test_a_withdrawal_after_a_crash_is_known_for_what_it_was(desk, step):
    desk.registry.fault = at(step, Killed())
    with pytest.raises(Killed):
        desk.promote("desk", 2, who="ada", why="second")
    desk.registry.fault = at("before move to Archived", Killed())
    with pytest.raises(Killed):
        desk.withdraw("desk", 2, to_stage="Archived", who="ada", why="off")
    desk.registry.fault = lambda _step: None
    desk.settle("desk")
    assert desk.approvals.latest("desk")["why"] == "withdrawn, but MLflow never moved it"
    assert desk.approvals.standing("desk").live["version"] == 2
    assert (stages(desk), desk.registry.rows[1].tag("state")) == ({1: "Archived", 2: "Production"}, "retired")


def test_tidying_up_takes_nothing_away_that_was_decided_on_meanwhile(desk):
    assert desk.transition("desk", 1, "Archived", who="learn", why="", told="superseded") is None
    assert desk.transition("desk", 1, "Staging", who="learn", why="", told="candidate") is None
    assert stages(desk) == {1: "Production", 2: "Staging"}
    assert desk.registry.rows[1].tag("state") == "live"
    desk.reject("desk", 2, to_stage="Archived", who="ada", why="rude")
    desk.transition("desk", 2, "Archived", who="learn", why="", told="superseded")
    assert desk.registry.rows[2].tag("state") == "rejected"
    with pytest.raises(PromotionRefused, match="is in Production: only a candidate can be rejected"):
        desk.transition("desk", 1, "Archived", who="ada", why="no", told="rejected")


def test_the_box_to_archive_others_rejects_the_candidates_it_takes_out_of_staging(desk):
    desk.registry.rows[3] = replace(desk.registry.rows[2], version=3, stage="None")
    desk.transition("desk", 3, "Staging", who="ada", why="three is better", archive_existing=True)
    assert stages(desk) == {1: "Production", 2: "Archived", 3: "Staging"}
    row = desk.approvals.latest("desk")
    assert (row["version"], row["kind"], row["who"], row["why"]) == (2, "reject", "ada", "three is better")


def emergency(desk, version, why="MLflow is down and two talks nonsense"):
    sha = next(r["adapter_sha256"] for r in desk.approvals.history("desk") if r["version"] == version)
    rest = {"from_stage": "unknown", "to_stage": "Production", "who": "oncall", "kind": "emergency", "why": why}
    return desk.approvals.append(model="desk", version=version, adapter_sha256=sha, **rest)


def test_when_mlflow_is_back_an_emergency_is_made_lasting(desk):
    desk.promote("desk", 2, who="ada", why="second")
    taken = emergency(desk, 1)
    desk.reconcile("desk")
    row = desk.approvals.latest("desk")
    assert (row["version"], row["kind"], row["who"], row["from"]) == (1, "rollback", "tidegate", "Archived")
    assert row["why"] == f"emergency approval {taken['seq']} by oncall made lasting: {taken['why']}"
    assert stages(desk) == {1: "Production", 2: "Archived"}
    desk.reconcile("desk")
    assert desk.approvals.latest("desk") == row


def test_an_emergency_that_can_no_longer_be_proven_is_left_to_people(desk):
    desk.promote("desk", 2, who="ada", why="second")
    taken = emergency(desk, 1)
    desk.registry.set_tag("desk", 1, "tidegate.receipt", "{}")
    desk.reconcile("desk")
    assert desk.approvals.latest("desk") == taken
    assert stages(desk) == {1: "Archived", 2: "Production"}


def test_an_emergency_after_a_promotion_that_never_happened_leaves_both_explained(desk):
    desk.registry.fault = at("before move to Production", Killed())
    with pytest.raises(Killed):
        desk.promote("desk", 2, who="ada", why="second")
    desk.registry.fault = lambda _step: None
    emergency(desk, 1)
    assert desk.approvals.standing("desk").live["kind"] == "emergency"
    desk.reconcile("desk")
    kinds = [(r["version"], r["kind"], r["to"]) for r in desk.approvals.history("desk")[1:]]
    assert kinds == [
        (2, "promote", "Production"),
        (1, "emergency", "Production"),
        (2, "reject", "Staging"),
        (1, "rollback", "Production"),
    ]
    assert json.loads(desk.registry.rows[1].tag("approval")) == desk.approvals.latest("desk")
    assert desk.promote("desk", 2, who="ada", why="again")["kind"] == "promote"


def test_only_keys_named_for_verdicts_sign_verdicts(tmp_path):
    verdicts = SigningKey.load_or_create(tmp_path / "verdicts.pem")
    receipts = SigningKey.load_or_create(tmp_path / "receipts.pem")
    older = SigningKey.load_or_create(tmp_path / "verdicts-2025.pem")
    trust = Trust.from_dir(tmp_path)
    assert trust.verdicts.verify(verdicts.sign({"a": 1})) == {"a": 1}
    assert trust.verdicts.verify(older.sign({"a": 1})) == {"a": 1}
    with pytest.raises(Exception, match="not trusted here"):
        trust.verdicts.verify(receipts.sign({"a": 1}))
