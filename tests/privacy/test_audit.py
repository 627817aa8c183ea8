import pytest

from privacy.audit import audit
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
