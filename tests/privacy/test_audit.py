from dataclasses import replace
from datetime import UTC, datetime

import pytest

from privacy import ledger as ledger_module
from privacy.audit import audit, recompute
from privacy.errors import LedgerBroken
from privacy.ledger import Charge
from privacy.policy import Policy
from tests.privacy.rounds import PLAN, charge, run_round


def test_the_audit_recomputes_what_the_filter_works_with(ledger):
    run_round(ledger, "r1", [charge("b1"), charge("b2")])
    run_round(ledger, "r2", [charge("b1", q=0.05), charge("b3")], attempt=2)
    report = audit(ledger, "s")
    assert report.claim == "(8, 1e-05)-DP per record, for life (the maximum over 3 blocks)"
    assert {b.block: b.rounds for b in report.blocks} == {"b1": ("r1", "r2.2"), "b2": ("r1",), "b3": ("r2.2",)}
    for block in report.blocks:
        assert block.share_used == ledger.share_used(block.block)
        assert 0 < block.epsilon_if_fixed_in_advance < 8
    assert report.share_used_max == ledger.share_used("b1")
    assert report.as_json()["blocks"][0]["block"] == "b1"


def test_the_claim_is_the_maximum_over_blocks(ledger):
    ledger.register_block("s", "b4", Policy("record", 2.0, 1e-3).frozen(500))
    report = audit(ledger, "s")
    assert (report.epsilon, report.delta) == (8.0, 1e-3)
    assert report.claim.startswith("(8, 0.001)-DP")
    assert report.share_used_max == 0.0


def test_a_stream_without_blocks_has_spent_nothing(ledger):
    assert audit(ledger, "elsewhere").epsilon == 0.0


@pytest.mark.parametrize("state", ["reserved", "started", "committed"])
def test_test_noise_says_infinity(ledger, state):
    ledger.reserve("s", "r1", 1, PLAN, [charge("b2")], noise_source="test")
    if state != "reserved":
        ledger.start("r1", 1, PLAN)
    if state == "committed":
        ledger.commit("r1", 1, PLAN, "b" * 64)
    report = audit(ledger, "s")
    assert report.epsilon is None
    assert "epsilon infinity" in report.claim
    by_name = {block.block: block for block in report.blocks}
    assert by_name["b2"].epsilon_if_fixed_in_advance is None
    assert by_name["b1"].epsilon == 8.0


def test_a_cancelled_attempt_is_in_no_account(ledger):
    ledger.reserve("s", "r1", 1, PLAN, [charge("b2")], noise_source="test")
    ledger.cancel("r1", 1, PLAN)
    assert audit(ledger, "s").epsilon == 8.0


def test_the_holdout_has_an_account_of_its_own(ledger):
    policy = Policy("record", 8.0, 1e-5, holdout_evaluations=4)
    ledger.register_block("s", "b4", policy.frozen(500))
    run_round(ledger, "r1", [charge("b4")])
    ledger.reserve("s", "e1", 1, PLAN, [Charge("b4", 1.0, 20.0, 1)], account="holdout")
    found = {block.block: block for block in audit(ledger, "s").blocks}["b4"]
    assert (found.rounds, found.holdout_reads) == (("r1",), ("e1",))
    assert found.share_used == ledger.share_used("b4")
    assert found.holdout_share_used == ledger.share_used("b4", "holdout") > 0
    assert found.holdout == "epsilon 2, delta 1e-05 per record, for life"
    assert {b.holdout for b in audit(ledger, "s").blocks if b.block != "b4"} == {"no holdout account: never read"}


def test_windows_add_up_apart_and_the_fullest_counts(ledger, monkeypatch):
    policy = Policy("record", 8.0, 1e-5, horizon="1d")
    ledger.register_block("w", "b4", policy.frozen(500))
    days = []
    for day, rounds in ((1, 1), (2, 2), (3, 1)):
        monkeypatch.setattr(ledger_module, "_now", lambda day=day: datetime(2026, 1, day, 12, tzinfo=UTC))
        for number in range(rounds):
            ledger.reserve("w", f"r{day}{number}", 1, PLAN, [charge("b4")])
        days.append(ledger.share_used("b4"))
    (found,) = audit(ledger, "w").blocks
    assert days[0] == days[2] == days[1] / 2
    assert found.share_used == days[1]
    assert found.span == "per window of 1 day"
    assert audit(ledger, "w").claim == "(8, 1e-05)-DP per record, per window of 1 day (the maximum over 1 blocks)"
    monkeypatch.setattr(ledger_module, "_now", lambda: datetime(2026, 1, 9, tzinfo=UTC))
    assert audit(ledger, "w").blocks[0].share_used == days[1], "a new window, in which nothing is spent yet"


def test_users_pay_once_a_round_in_every_block_they_may_be_in(ledger):
    policy = Policy("user", 8.0, 1e-5, holdout_evaluations=4)
    for name in ("u1", "u2", "u3"):
        ledger.register_block("u", name, policy.frozen(500))
    ledger.reserve("u", "r1", 1, PLAN, [charge("u1"), charge("u2")])
    ledger.reserve("u", "e1", 1, PLAN, [Charge("u1", 1.0, 20.0, 1)], account="holdout")
    blocks = audit(ledger, "u").blocks
    assert {block.rounds for block in blocks} == {("r1",)}
    assert {block.holdout_reads for block in blocks} == {("e1",)}
    assert {block.share_used for block in blocks} == {ledger.share_used("u3")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"account": "petty cash"}, "account=petty cash"),
        ({"account": "holdout"}, "reads the holdout of b1, which has no account"),
        ({"charges": (charge("b9"),)}, "charges b9, not of stream s"),
        ({"charges": (charge("u1"), charge("u2", q=0.5))}, "users pay 2 prices"),
    ],
)
def test_rows_that_nobody_could_have_paid_are_named(sqlite_ledger, change, says):
    row = replace(sqlite_ledger.reserve("s", "r1", 1, PLAN, [charge("b1")]), **change)
    users = Policy("user", 8.0, 1e-5)
    policies = {"b1": Policy("record", 8.0, 1e-5), "u1": users, "u2": users}
    with pytest.raises(LedgerBroken, match=f"ledger row 1: {says}"):
        recompute("s", [row], policies)
