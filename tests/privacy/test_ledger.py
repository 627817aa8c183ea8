import datetime as dt

import pytest

from privacy import accounting
from privacy import ledger as ledger_module
from privacy.audit import audit
from privacy.errors import BudgetExceeded, LedgerBehindReceipt, LedgerConflict, LedgerError
from privacy.ledger import GENESIS, Charge, Ledger
from privacy.policy import Policy
from tests.privacy.rounds import ADAPTER, PLAN, POLICY, charge, run_round


def test_a_round_leaves_three_chained_rows(ledger):
    run_round(ledger, "r1", [charge("b1"), charge("b2", q=0.05)])
    assert [row.state for row in ledger.rows("s")] == ["reserved", "started", "committed"]
    assert ledger.rows("s")[0].prev_hash == GENESIS
    assert ledger.verify_chain() == 3
    assert 0 < ledger.share_used("b2") < ledger.share_used("b1") < 1
    assert ledger.share_used("b3") == 0


def test_a_lost_response_is_charged_once(ledger):
    for _ in range(3):
        ledger.reserve("s", "r1", 1, PLAN, [charge()])
    for _ in range(3):
        ledger.start("r1", 1, PLAN)
    for _ in range(3):
        ledger.commit("r1", 1, PLAN, ADAPTER)
    assert len(ledger.rows()) == 3
    assert ledger.spent("b1") == accounting.rdp(0.25, 2.2, 30, POLICY.orders)


def test_another_attempt_is_charged_again(ledger):
    run_round(ledger, "r1", [charge()])
    run_round(ledger, "r1", [charge()], attempt=2)
    once = accounting.rdp(0.25, 2.2, 30, POLICY.orders)
    assert ledger.spent("b1") == tuple(rho + rho for rho in once)


def test_what_is_reopened_is_what_was_kept(ledger, url):
    run_round(ledger, "r1", [charge("b1", q=0.1), charge("b2", q=1 / 3, sigma=10 / 3)])
    before = ledger.rows(), ledger.spent("b2"), ledger.head()
    again = Ledger(url)
    assert (again.rows(), again.spent("b2"), again.head()) == before
    again.close()


def test_a_full_block_refuses_with_block_amount_and_way_out(ledger):
    with pytest.raises(BudgetExceeded, match=r"b1 \(used .*, asked .*over by .*raise sigma"):
        for number in range(20):
            run_round(ledger, f"r{number}", [charge("b1"), charge("b2", q=0.01)])
    assert ledger.share_used("b1") <= 1.0
    refused = ledger.rows()[-1].round_id
    assert len([r for r in ledger.rows() if r.round_id == refused]) == 3, "a refused round leaves no row"


def test_a_refusal_charges_none_of_its_blocks(ledger):
    before = ledger.spent("b2")
    with pytest.raises(BudgetExceeded):
        ledger.reserve("s", "r1", 1, PLAN, [charge("b2"), charge("b1", sigma=0.2)])
    assert ledger.spent("b2") == before


def test_a_dry_run_says_what_a_reservation_would_and_writes_nothing(ledger):
    assert ledger.shortfalls([charge("b1"), charge("b2")]) == []
    (short,) = ledger.shortfalls([charge("b2"), charge("b1", sigma=0.4)])
    assert (short.block_id, short.share_used) == ("b1", 0.0)
    assert short.share_asked > 1
    assert ledger.rows() == []


def test_only_a_reservation_can_be_cancelled(ledger):
    ledger.reserve("s", "r1", 1, PLAN, [charge()])
    ledger.cancel("r1", 1, PLAN)
    ledger.cancel("r1", 1, PLAN)
    assert ledger.share_used("b1") == 0.0
    with pytest.raises(LedgerConflict, match="is cancelled"):
        ledger.start("r1", 1, PLAN)
    ledger.reserve("s", "r2", 1, PLAN, [charge()])
    ledger.start("r2", 1, PLAN)
    with pytest.raises(LedgerConflict, match="is started"):
        ledger.cancel("r2", 1, PLAN)
    assert ledger.share_used("b1") > 0


def test_conflicts_are_refused(ledger):
    ledger.reserve("s", "r1", 1, PLAN, [charge()])
    with pytest.raises(LedgerConflict, match="plan_hash"):
        ledger.reserve("s", "r1", 1, "c" * 64, [charge()])
    with pytest.raises(LedgerConflict, match="other charges"):
        ledger.reserve("s", "r1", 1, PLAN, [charge(q=0.001)])
    with pytest.raises(LedgerConflict, match="other charges"):
        ledger.reserve("s", "r1", 1, PLAN, [charge()], noise_source="test")
    with pytest.raises(LedgerConflict, match="must be started"):
        ledger.commit("r1", 1, PLAN, ADAPTER)
    ledger.start("r1", 1, PLAN)
    ledger.commit("r1", 1, PLAN, ADAPTER)
    with pytest.raises(LedgerConflict, match="another adapter"):
        ledger.commit("r1", 1, PLAN, "d" * 64)
    with pytest.raises(LedgerConflict, match="never reserved"):
        ledger.start("r9", 1, PLAN)
    with pytest.raises(LedgerConflict, match="another policy"):
        ledger.register_block("s", "b1", Policy("record", 9.0, 1e-5).frozen(500))
    with pytest.raises(LedgerConflict, match="another policy or stream"):
        ledger.register_block("t", "b1", POLICY.frozen(500))


def test_impossible_reservations_are_refused(ledger):
    ledger.register_block("t", "t1", POLICY.frozen(500))
    ledger.register_block("s", "u1", Policy("user", 8.0, 1e-5).frozen(500))
    with pytest.raises(LedgerError, match="b77: unknown"):
        ledger.reserve("s", "r3", 1, PLAN, [charge("b77")])
    with pytest.raises(LedgerError, match="each once"):
        ledger.reserve("s", "r3", 1, PLAN, [charge(), charge()])
    with pytest.raises(LedgerError, match="each once"):
        ledger.reserve("s", "r3", 1, PLAN, [])
    with pytest.raises(LedgerError, match="stream=s, t"):
        ledger.reserve("s", "r3", 1, PLAN, [charge("t1")])
    with pytest.raises(LedgerError, match="unit=record, user"):
        ledger.reserve("s", "r3", 1, PLAN, [charge("b1"), charge("u1")])
    with pytest.raises(LedgerError, match="noise_source=none"):
        ledger.reserve("s", "r3", 1, PLAN, [charge()], noise_source="none")
    assert ledger.rows() == []


def test_a_clock_that_goes_back_does_not_break_the_chain(ledger, monkeypatch):
    run_round(ledger, "r1", [charge()])

    class Yesterday(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return dt.datetime.now(tz) - dt.timedelta(days=1)

    monkeypatch.setattr(ledger_module, "datetime", Yesterday)
    run_round(ledger, "r2", [charge("b2")])
    assert ledger.verify_chain() == 6
    assert [row.round_id for row in ledger.rows()] == ["r1"] * 3 + ["r2"] * 3
    assert ledger.rows()[-1].at < ledger.rows()[0].at


def test_a_restored_backup_is_behind_its_receipts(sqlite_ledger, quick):
    run_round(sqlite_ledger, "r1", [charge()])
    backup = (quick / "ledger.db").read_bytes()
    run_round(sqlite_ledger, "r2", [charge()])
    sqlite_ledger.require_head(sqlite_ledger.head())
    (quick / "old.db").write_bytes(backup)
    restored = Ledger(f"sqlite:///{quick / 'old.db'}")
    restored.verify_chain()
    with pytest.raises(LedgerBehindReceipt, match="older backup"):
        restored.require_head(sqlite_ledger.head())
    restored.close()


def test_two_hundred_different_rounds_are_summed_within_a_second(sqlite_ledger):
    import time

    for number in range(200):
        sqlite_ledger.reserve("s", f"r{number}", 1, PLAN, [Charge("b1", 0.01 + number * 1e-5, 8.0, 10)])
    begun = time.process_time()
    spent = sqlite_ledger.spent("b1")
    assert time.process_time() - begun < 0.5
    assert audit(sqlite_ledger, "s").blocks[0].share_used == accounting.share_used(spent, POLICY.caps)


# -- unit user ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def users(ledger):
    for name, epsilon in (("u1", 8.0), ("u2", 8.0), ("u3", 4.0)):
        ledger.register_block("s", name, Policy("user", epsilon, 1e-5).frozen(500))
    return ledger


def test_a_user_pays_for_every_round_that_may_hold_them_and_once_a_round(users):
    run_round(users, "r1", [charge("u1", sigma=4.0), charge("u2", sigma=4.0)])
    run_round(users, "r2", [charge("u2", sigma=6.0)])
    first = accounting.rdp(0.25, 4.0, 30, POLICY.orders)
    second = accounting.rdp(0.25, 6.0, 30, POLICY.orders)
    both = tuple(a + b for a, b in zip(first, second, strict=True))
    assert users.spent("u1") == users.spent("u2") == both
    users.register_block("s", "u9", Policy("user", 8.0, 1e-5).frozen(500))
    assert users.spent("u9") == both, "somebody in a later block was in the earlier ones too"
    assert users.spent("b1") == (0.0,) * len(POLICY.orders)
    report = audit(users, "s")
    assert {b.block: b.rounds for b in report.blocks if b.unit == "user"} == dict.fromkeys(
        ("u1", "u2", "u3", "u9"), ("r1", "r2")
    )
    assert "per record" in report.claim
    assert "per user" in report.claim


def test_a_user_block_that_is_not_even_used_must_be_able_to_pay(users):
    # u3's users were promised 4: a round on the others alone may hold them.
    with pytest.raises(BudgetExceeded, match="u3"):
        for number in range(20):
            run_round(users, f"r{number}", [charge("u1")])
    assert users.share_used("u3") <= 1.0
    assert users.share_used("u1") < 1.0


def test_users_are_drawn_at_one_rate(users):
    with pytest.raises(LedgerError, match="at one rate"):
        users.reserve("s", "r1", 1, PLAN, [charge("u1"), charge("u2", q=0.1)])
