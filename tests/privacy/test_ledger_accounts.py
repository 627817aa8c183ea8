"""The holdout's account, and windows: what counts where, and what is refused."""

from datetime import UTC, datetime, timedelta

import pytest

from privacy import accounting
from privacy import ledger as ledger_module
from privacy.audit import audit
from privacy.counts import calibrate_releases
from privacy.errors import BudgetExceeded, LedgerBroken, LedgerConflict, LedgerError, PolicyError
from privacy.ledger import Charge, Ledger
from privacy.policy import Policy, window_days
from tests.privacy.rounds import ADAPTER, PLAN, POLICY, charge, run_round

HELD = Policy("record", 8.0, 1e-5, holdout_evaluations=4)
MONTHLY = Policy("record", 8.0, 1e-5, horizon="30d", holdout_evaluations=4)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def counts(block="h1", sigma=20.0):
    """A vector of counts released once over the whole holdout."""
    return Charge(block, 1.0, sigma, 1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets by days from a fixed noon."""

    def set_to(days):
        monkeypatch.setattr(ledger_module, "_now", lambda: NOON + timedelta(days=days))

    set_to(0)
    return set_to


@pytest.fixture
def held(ledger):
    for name in ("h1", "h2"):
        ledger.register_block("s", name, HELD.frozen(500))
    return ledger


@pytest.fixture
def monthly(ledger, clock):
    for name in ("m1", "m2"):
        ledger.register_block("s", name, MONTHLY.frozen(500))
    return ledger


# -- the holdout -------------------------------------------------------------------------------------------------------


def test_each_account_pays_for_itself(held, url):
    run_round(held, "r1", [charge("h1")])
    row = held.reserve("s", "e1", 1, PLAN, [counts("h1"), counts("h2")], account="holdout")
    assert (row.account, held.start("e1", 1, PLAN).account, held.commit("e1", 1, PLAN, ADAPTER).account) == (
        ("holdout",) * 3
    )
    assert held.spent("h1") == accounting.rdp(0.25, 2.2, 30, HELD.orders)
    assert held.spent("h1", "holdout") == held.spent("h2", "holdout") == accounting.rdp(1.0, 20.0, 1, HELD.orders)
    assert held.spent("h2") == (0.0,) * len(HELD.orders)
    account = held.accounts(["h1"])["h1"]
    assert (account.spent, account.holdout_spent) == (held.spent("h1"), held.spent("h1", "holdout"))
    assert (account.share_used, account.holdout_share_used) == (
        held.share_used("h1"),
        held.share_used("h1", "holdout"),
    )
    again = Ledger(url)
    assert (again.rows(), again.verify_chain()) == (held.rows(), 6)
    again.close()


def test_a_full_holdout_refuses_and_training_goes_on(held):
    with pytest.raises(BudgetExceeded, match=r"h1 .*from their holdout account.*raise sigma"):
        for number in range(99):
            held.reserve("s", f"e{number}", 1, PLAN, [counts(sigma=6.0)], account="holdout")
    assert 0.9 < held.share_used("h1", "holdout") <= 1.0
    (short,) = held.shortfalls([counts(sigma=6.0)], account="holdout")
    assert (short.block_id, short.share_used) == ("h1", held.share_used("h1", "holdout"))
    assert held.shortfalls([counts(sigma=6.0)]) == []
    run_round(held, "r1", [charge("h1")])


def test_the_stated_number_of_evaluations_fits(held):
    sigma = calibrate_releases([(HELD.orders, HELD.holdout_caps)], HELD.holdout_evaluations)
    for number in range(HELD.holdout_evaluations):
        held.reserve("s", f"e{number}", 1, PLAN, [counts(sigma=sigma)], account="holdout")
    assert held.share_used("h1", "holdout") == pytest.approx(1.0, abs=1e-2)
    with pytest.raises(BudgetExceeded):
        held.reserve("s", "e9", 1, PLAN, [counts(sigma=sigma)], account="holdout")


def test_a_lost_response_of_an_evaluation_is_charged_once(held):
    for _ in range(3):
        held.reserve("s", "e1", 1, PLAN, [counts()], account="holdout")
        held.start("e1", 1, PLAN)
    assert len(held.rows()) == 2
    assert held.spent("h1", "holdout") == accounting.rdp(1.0, 20.0, 1, HELD.orders)
    with pytest.raises(LedgerConflict, match="other charges"):
        held.reserve("s", "e1", 1, PLAN, [counts()])


def test_a_cancelled_evaluation_gives_back(held):
    held.reserve("s", "e1", 1, PLAN, [counts()], account="holdout")
    assert held.share_used("h1", "holdout") > 0.0
    held.cancel("e1", 1, PLAN)
    assert held.share_used("h1", "holdout") == 0.0


def test_who_has_no_holdout_account_is_never_read(held):
    with pytest.raises(LedgerError, match="b1: sealed without a holdout account"):
        held.reserve("s", "e1", 1, PLAN, [counts("h1"), counts("b1")], account="holdout")
    with pytest.raises(LedgerError, match="account=petty cash: must be train or holdout"):
        held.reserve("s", "e1", 1, PLAN, [counts()], account="petty cash")
    with pytest.raises(PolicyError, match="account=petty cash"):
        held.spent("h1", "petty cash")
    assert held.rows() == []
    assert held.share_used("b1", "holdout") == 0.0


def test_a_users_side_must_not_change_once_a_holdout_can_be_read(ledger):
    ledger.register_block("u", "u1", Policy("user", 8.0, 1e-5, holdout_share=0.1, holdout_evaluations=4).frozen(500))
    ledger.reserve("u", "e1", 1, PLAN, [counts("u1")], account="holdout")
    ledger.register_block("u", "u2", Policy("user", 8.0, 1e-5, holdout_share=0.2).frozen(500))
    for account in ("train", "holdout"):
        with pytest.raises(LedgerError, match=r"holdout_share=0\.1, 0\.2: must be one"):
            ledger.reserve("u", f"x-{account}", 1, PLAN, [counts("u1")], account=account)


def test_users_pay_for_every_evaluation_in_every_block_with_an_account(ledger):
    for name, evaluations in (("u1", 4), ("u2", 4), ("u3", 0)):
        policy = Policy("user", 8.0, 1e-5, holdout_evaluations=evaluations)
        ledger.register_block("u", name, policy.frozen(500))
    ledger.reserve("u", "e1", 1, PLAN, [counts("u1")], account="holdout")
    paid = accounting.rdp(1.0, 20.0, 1, POLICY.orders)
    found = ledger.accounts(["u3", "u2", "u1"])
    assert found["u1"].holdout_spent == found["u2"].holdout_spent == paid
    assert found["u3"].holdout_spent == (0.0,) * len(POLICY.orders)
    assert found["u1"].spent == (0.0,) * len(POLICY.orders)


@pytest.mark.parametrize(
    "change",
    [
        {"holdout_evaluations": -1},
        {"holdout_evaluations": 1.0},
        {"holdout_evaluations": True},
        {"holdout_evaluations": 3, "holdout_epsilon": 0.0},
        {"holdout_evaluations": 3, "holdout_share": 0.0},
        {"horizon": "0d"},
        {"horizon": "30"},
        {"horizon": "30d\n"},
        {"horizon": "99999d"},
        {"horizon": 30},
    ],
)
def test_impossible_accounts_and_windows_are_refused(change):
    with pytest.raises(PolicyError):
        Policy(**{"unit": "record", "epsilon": 8.0, "delta": 1e-5} | change)


def test_a_promise_names_unit_and_span():
    assert HELD.promise() == "epsilon 8, delta 1e-05 per record, for life"
    assert HELD.promise("holdout") == "epsilon 2, delta 1e-05 per record, for life"
    assert MONTHLY.promise() == "epsilon 8, delta 1e-05 per record, per window of 30 days"
    assert POLICY.promise("holdout") == "no holdout account: never read"
    assert Policy("user", 1.0, 1e-6, horizon="1d").promise().endswith("per user, per window of 1 day")
    assert (window_days("life"), window_days("30d")) == (0, 30)


@pytest.mark.parametrize("policy", [POLICY, HELD, MONTHLY])
def test_a_frozen_policy_comes_back_with_its_accounts_and_horizon(policy):
    assert Policy.from_frozen(policy.frozen(500)) == policy
    assert all(cap == 0.0 for cap in POLICY.holdout_caps)
    assert HELD.holdout_caps == accounting.caps(HELD.orders, 2.0, 1e-5)


# -- windows -----------------------------------------------------------------------------------------------------------


def test_only_charges_of_the_same_window_count(monthly, clock):
    row = monthly.reserve("s", "r1", 1, PLAN, [charge("m1")])
    assert row.window == int(NOON.timestamp()) // (30 * 86_400) > 0
    once = monthly.share_used("m1")
    clock(30)
    assert monthly.share_used("m1") == 0.0
    assert monthly.reserve("s", "r2", 1, PLAN, [charge("m1")]).window == row.window + 1
    assert monthly.share_used("m1") == once
    assert monthly.verify_chain() == 2
    assert audit(monthly, "s").claim.count("per window of 30 days") == 1


def test_a_window_can_be_filled_again_and_again(monthly, clock):
    for month in range(3):
        clock(30 * month)
        with pytest.raises(BudgetExceeded, match="m1"):
            for number in range(20):
                monthly.reserve("s", f"r{month}-{number}", 1, PLAN, [charge("m1")])
        assert 0.5 < monthly.share_used("m1") <= 1.0
    assert max(block.share_used for block in audit(monthly, "s").blocks) <= 1.0


def test_a_clock_that_goes_back_opens_no_window_again(monthly, clock):
    clock(60)
    late = monthly.reserve("s", "r1", 1, PLAN, [charge("m1")])
    used = monthly.share_used("m1")
    clock(0)
    assert monthly.share_used("m1") == used
    again = monthly.reserve("s", "r2", 1, PLAN, [charge("m1")])
    assert again.window == late.window
    assert again.at < late.at, "the auditor sees that the clock went back"
    assert monthly.share_used("m1") == pytest.approx(2 * used)
    # Another block of the stream, never charged before, is in no earlier window either.
    assert monthly.reserve("s", "r3", 1, PLAN, [charge("m2")]).window == late.window


def test_both_accounts_have_the_same_windows(monthly, clock):
    clock(30)
    evaluation = monthly.reserve("s", "e1", 1, PLAN, [counts("m1")], account="holdout")
    clock(0)
    assert monthly.reserve("s", "r1", 1, PLAN, [charge("m1")]).window == evaluation.window
    clock(60)
    assert monthly.share_used("m1", "holdout") == monthly.share_used("m1") == 0.0


def test_later_steps_say_the_window_of_their_reservation(monthly, clock):
    reserved = monthly.reserve("s", "r1", 1, PLAN, [charge("m1")])
    clock(90)
    assert monthly.start("r1", 1, PLAN).window == reserved.window
    assert monthly.reserve("s", "r1", 1, PLAN, [charge("m1")]).window == reserved.window, "a lost response"
    assert monthly.share_used("m1") == 0.0


def test_horizons_are_not_mixed_in_one_round(monthly):
    with pytest.raises(LedgerError, match="horizon=30d, life: must be one for all blocks of a round"):
        monthly.reserve("s", "r1", 1, PLAN, [charge("m1"), charge("b1")])
    assert monthly.reserve("s", "r1", 1, PLAN, [charge("b1")]).window == 0


def test_windows_of_another_length_have_their_own_numbers(monthly, clock):
    monthly.register_block("s", "d1", Policy("record", 8.0, 1e-5, horizon="1d").frozen(500))
    month = monthly.reserve("s", "r1", 1, PLAN, [charge("m1")]).window
    day = monthly.reserve("s", "r2", 1, PLAN, [charge("d1")]).window
    assert day > month
    assert monthly.reserve("s", "r3", 1, PLAN, [charge("m1")]).window == month, "not carried on by days"


def test_a_users_rounds_under_another_horizon_always_count(ledger, clock):
    ledger.register_block("u", "u1", Policy("user", 8.0, 1e-5).frozen(500))
    ledger.register_block("u", "u2", Policy("user", 8.0, 1e-5, horizon="30d").frozen(500))
    ledger.reserve("u", "r1", 1, PLAN, [charge("u1", sigma=4.0)])
    ledger.reserve("u", "r2", 1, PLAN, [charge("u2", sigma=4.0)])
    one, two = (tuple(n * rho for rho in accounting.rdp(0.25, 4.0, 30, POLICY.orders)) for n in (1, 2))
    assert ledger.spent("u1") == ledger.spent("u2") == pytest.approx(two)
    clock(30)
    assert ledger.spent("u1") == pytest.approx(two), "for life"
    assert ledger.spent("u2") == pytest.approx(one), "the round for life may fall into any window"
    audit(ledger, "u")


@pytest.mark.parametrize(("field", "value"), [("account", "'train'"), ("window", "0"), ("window", '"window" + 1')])
def test_account_and_window_are_chained(monthly, field, value):
    import sqlalchemy as sa

    monthly.reserve("s", "e1", 1, PLAN, [counts("m1")], account="holdout")
    with monthly._engine.begin() as db:
        db.execute(sa.text(f'UPDATE ledger SET "{field}" = {value}'))
    with pytest.raises(LedgerBroken, match="row 1"):
        monthly.verify_chain()


# -- what one handle remembers -----------------------------------------------------------------------------------------


def test_a_handle_sees_what_another_one_cancelled(ledger, url):
    other = Ledger(url)
    ledger.reserve("s", "r1", 1, PLAN, [charge("b1")])
    assert other.share_used("b1") == ledger.share_used("b1") > 0.0
    ledger.cancel("r1", 1, PLAN)
    assert other.share_used("b1") == ledger.share_used("b1") == 0.0
    other.close()


def test_a_handle_forgets_when_an_older_ledger_is_put_in_its_place(sqlite_ledger, quick):
    file = quick / "ledger.db"
    empty = file.read_bytes()
    sqlite_ledger.reserve("s", "r1", 1, PLAN, [charge("b1", sigma=4.0)])
    assert sqlite_ledger.share_used("b1") > 0.0
    sqlite_ledger._engine.dispose()
    file.write_bytes(empty)
    assert sqlite_ledger.share_used("b1") == 0.0
    sqlite_ledger.reserve("s", "r2", 1, PLAN, [charge("b1", sigma=9.0)])
    assert sqlite_ledger.spent("b1") == accounting.rdp(0.25, 9.0, 30, POLICY.orders)


def test_of_users_a_handle_remembers_no_more_than_holds(sqlite_ledger, quick):
    users, file = Policy("user", 8.0, 1e-5), quick / "ledger.db"
    sqlite_ledger.register_block("u", "u1", users.frozen(500))
    other = Ledger(f"sqlite:///{file}")
    sqlite_ledger.reserve("u", "r1", 1, PLAN, [charge("u1")])
    assert other.share_used("u1") == sqlite_ledger.share_used("u1") > 0.0
    older = file.read_bytes()
    sqlite_ledger.register_block("u", "u2", users.frozen(7))
    assert [short.block_id for short in other.shortfalls([charge("u1", sigma=0.5)])] == ["u1", "u2"]
    sqlite_ledger.cancel("r1", 1, PLAN)
    assert other.spent("u2") == sqlite_ledger.spent("u2") == (0.0,) * len(users.orders)
    for handle in (sqlite_ledger, other):
        handle._engine.dispose()
    file.write_bytes(older)
    assert other.share_used("u1") == sqlite_ledger.share_used("u1") > 0.0
    assert [short.block_id for short in other.shortfalls([charge("u1", sigma=0.5)])] == ["u1"]
    other.close()


def test_many_blocks_are_made_known_at_once_or_none_is(ledger):
    with pytest.raises(LedgerConflict, match="b1"):
        ledger.register_blocks("s", {"n1": POLICY.frozen(7), "b1": HELD.frozen(500)})
    assert not ledger.knows("n1")
    ledger.register_blocks("s", {"n2": POLICY.frozen(7), "n1": POLICY.frozen(7), "b1": POLICY.frozen(500)})
    ledger.register_blocks("s", {})
    assert ledger.blocks("s") == ["b1", "b2", "b3", "n1", "n2"]
    assert list(ledger.snapshot("s").accounts) == ["b1", "b2", "b3", "n2", "n1"]
    with pytest.raises(LedgerError, match="n9: unknown"):
        ledger.accounts(["n1", "n9"])


def test_users_are_trained_with_privacy_or_without_in_a_stream_but_never_both(tmp_path):
    """Somebody may be in any block of the stream: one round without privacy would end the promise to them."""
    for number, order in enumerate(("open first", "private first")):
        ledger = Ledger(f"sqlite:///{tmp_path / f'{number}.db'}")
        ledger.register_block("s", "bare", Policy("user", 8.0, 1e-5, enabled=False).frozen(500))

        def bare(ledger=ledger):
            ledger.reserve("s", "r1", 1, "a" * 64, [], noise_source="none", uncharged=["bare"])

        if order == "private first":
            ledger.register_block("s", "promised", Policy("user", 8.0, 1e-5).frozen(500))
            with pytest.raises(LedgerError, match="somebody may be in both"):
                bare()
            ledger.reserve("s", "r2", 1, "b" * 64, [Charge("promised", 0.1, 2.0, 10)])
            told = {block.block: (block.rounds, block.claim) for block in audit(ledger, "s").blocks}
            assert told["bare"] == ((), "no privacy: enabled=false"), "what users paid, they paid for the other block"
            assert told["promised"] == (("r2",), "(8, 1e-05)-DP per user, for life")
        else:
            bare()
            ledger.register_block("s", "promised", Policy("user", 8.0, 1e-5).frozen(500))
            with pytest.raises(LedgerError, match="somebody may be in both"):
                ledger.reserve("s", "r2", 1, "b" * 64, [Charge("promised", 0.1, 2.0, 10)])
        ledger.close()
