"""The ledger against a dictionary: two accounts, windows, crashes between statements, races, backups, a bad clock."""

import itertools
import sqlite3
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from privacy import accounting
from privacy import ledger as ledger_module
from privacy.audit import audit
from privacy.errors import BudgetExceeded, LedgerBehindReceipt, LedgerBroken, LedgerConflict, LedgerError
from privacy.ledger import Charge, Ledger
from privacy.policy import Policy
from tests.privacy.rounds import ADAPTER, PLAN

BEFORE = {"started": "reserved", "committed": "started", "cancelled": "reserved"}
SIDES = st.integers(0, 1)
FIRST_DAY = datetime(2026, 1, 1, 12, tzinfo=UTC)
# b: for life; w: in windows of two days. A small holdout, so that it fills up too.
POLICIES = {
    "b": Policy("record", 8.0, 1e-5, holdout_evaluations=5),
    "w": Policy("record", 8.0, 1e-5, holdout_evaluations=5, horizon="2d"),
}
ORDERS = POLICIES["b"].orders
BLOCKS = ("b1", "b2", "w1", "w2")
ACCOUNTS = ("train", "holdout")
# A process dies after so many written statements; at the commit; or after it, and only its answer is lost.
AT_COMMIT, AFTER_COMMIT = 3, 4
KILLS = st.sampled_from([None, None, None, None, 0, 1, 2, AT_COMMIT, AFTER_COMMIT])


class Killed(Exception):
    """The process is gone: nobody closes what it had open."""


class LedgerModel(RuleBasedStateMachine):
    rounds = Bundle("rounds")
    folder = None
    numbers = itertools.count()

    def __init__(self):
        super().__init__()
        self.file = self.folder / f"model-{next(self.numbers)}.db"
        self.url = f"sqlite:///{self.file}"
        self.sides = [Ledger(self.url), Ledger(self.url)]
        self.day = 0
        self.window = 0  # the newest of the stream
        self.state: dict[str, str] = {}
        # In the order of the reservations: account, window, charges.
        self.paid: dict[str, tuple[str, int, tuple[Charge, ...]]] = {}
        self.share: dict[tuple[str, str, int], float] = {}
        self.heads: list[str] = []
        self.backup: tuple[bytes, int] | None = None
        self.clock()
        for name in BLOCKS:
            self.sides[0].register_block("s", name, POLICIES[name[0]].frozen(100))

    # -- time ------------------------------------------------------------------------------------------------------

    def clock(self):
        now = FIRST_DAY + timedelta(days=self.day)
        ledger_module._now = lambda: now

    @rule(days=st.sampled_from([-3, -1, 1, 2]))
    def the_clock_moves(self, days):
        self.day += days
        self.clock()

    def window_now(self, block):
        if block.startswith("b"):
            return 0
        return max(self.window, int((FIRST_DAY + timedelta(days=self.day)).timestamp()) // (2 * 86_400))

    # -- rounds ----------------------------------------------------------------------------------------------------

    def asked(self, kind, both, q, sigma):
        return tuple(Charge(f"{kind}{n}", q, sigma, 20) for n in ((1, 2) if both else (1,)))

    def can_pay(self, charges, account):
        return all(
            accounting.fits(
                self.spent(c.block_id, account, self.window_now(c.block_id)),
                accounting.rdp(c.q, c.sigma, c.steps, ORDERS),
                POLICIES[c.block_id[0]].caps_of(account),
            )
            for c in charges
        )

    def reserved(self, name, charges, account):
        window = self.window_now(charges[0].block_id)
        self.window = max(self.window, window)
        self.state[name], self.paid[name] = "reserved", (account, window, charges)

    @rule(
        target=rounds,
        side=SIDES,
        number=st.integers(0, 11),
        account=st.sampled_from(ACCOUNTS),
        kind=st.sampled_from("bw"),
        both=st.booleans(),
        q=st.sampled_from([0.02, 0.25, 0.5]),
        sigma=st.sampled_from([0.8, 2.2, 6.0]),
        kill=KILLS,
    )
    def reserve(self, side, number, account, kind, both, q, sigma, kill):
        name, charges = f"r{number}", self.asked(kind, both, q, sigma)
        can_pay, ledger = self.can_pay(charges, account), self.sides[side]
        assert can_pay == (ledger.shortfalls(charges, account) == [])
        if kill is not None:
            self.killed_in(kill, lambda dying: dying.reserve("s", name, 1, PLAN, charges, account=account))
        try:
            row = ledger.reserve("s", name, 1, PLAN, charges, account=account)
        except BudgetExceeded:
            assert name not in self.state
            assert not can_pay
        except LedgerConflict:
            assert self.state[name] == "cancelled" or (self.paid[name][0], self.paid[name][2]) != (account, charges)
        else:
            if name not in self.state:
                assert can_pay
                self.reserved(name, charges, account)
            assert (row.state, (row.account, row.window, self.paid[name][2])) == (self.state[name], self.paid[name])
        return name

    @rule(side=SIDES, name=rounds, to=st.sampled_from(["started", "committed", "cancelled"]), kill=KILLS)
    def move(self, side, name, to, kill):
        def call(ledger):
            if to == "committed":
                return ledger.commit(name, 1, PLAN, ADAPTER)
            return (ledger.start if to == "started" else ledger.cancel)(name, 1, PLAN)

        if kill is not None:
            self.killed_in(kill, call)
        if self.state.get(name) in {BEFORE[to], to}:
            row = call(self.sides[side])
            assert (row.state, row.account, row.window) == (to, *self.paid[name][:2])
            if to == "cancelled" and self.state[name] == "reserved":
                self.share = {}  # only a release may lower what is used
            self.state[name] = to
        else:
            with pytest.raises(LedgerConflict):
                call(self.sides[side])

    @rule(account=st.sampled_from(ACCOUNTS), kind=st.sampled_from("bw"), sigma=st.sampled_from([1.2, 3.0]))
    def race(self, account, kind, sigma):
        """Both handles ask for what may be the last of a budget, at once."""
        charges = self.asked(kind, both=False, q=0.5, sigma=sigma)
        names = [f"race{len(self.paid)}-{side}" for side in (0, 1)]
        won, barrier = [], threading.Barrier(2)

        def ask(side):
            barrier.wait()
            with suppress(BudgetExceeded):
                won.append(self.sides[side].reserve("s", names[side], 1, PLAN, charges, account=account))

        threads = [threading.Thread(target=ask, args=(side,)) for side in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for row in sorted(won, key=lambda row: row.seq):
            assert self.can_pay(charges, account)
            self.reserved(row.round_id, charges, account)
        assert len(won) == 2 or not self.can_pay(charges, account)

    # -- crashes and restorations ----------------------------------------------------------------------------------

    def killed_in(self, statements, call):
        """A process makes the call and dies: its transaction never ends, or nobody hears that it did."""
        dying = Ledger(self.url)
        raw = []

        @sa.event.listens_for(dying._engine, "after_cursor_execute")
        def _(connection, cursor, statement, *rest):
            if statement.startswith("INSERT"):
                raw.append(cursor.connection)
                if len(raw) > statements:
                    raise Killed

        @sa.event.listens_for(dying._engine, "commit")
        def _(connection):
            raw.append(connection.connection.driver_connection)
            if statements <= AT_COMMIT:
                raise Killed

        try:
            with suppress(LedgerError):
                call(dying)
        except Killed:
            with suppress(sqlite3.Error):
                raw[-1].close()  # what the system does to a dead process's files: no commit, no rollback
        dying._engine.dispose(close=False)

    @rule(side=SIDES)
    def reopen(self, side):
        self.sides[side].close()
        self.sides[side] = Ledger(self.url)

    @rule(side=SIDES)
    def keep_a_receipt(self, side):
        self.heads.append(self.sides[side].head())

    @rule()
    def back_up(self):
        self.backup = (self.file.read_bytes(), len(self.heads))

    @precondition(lambda self: self.backup is not None)
    @rule()
    def a_backup_misses_what_came_after_it(self):
        content, receipts = self.backup
        old = self.folder / "old.db"
        old.write_bytes(content)
        restored = Ledger(f"sqlite:///{old}")
        restored.verify_chain()
        known = {row.hash for row in restored.rows()} | {ledger_module.GENESIS}
        for head in self.heads[:receipts]:
            restored.require_head(head)
        for head in self.heads[receipts:]:
            if head not in known:
                with pytest.raises(LedgerBehindReceipt):
                    restored.require_head(head)
        restored.close()

    # -- what always holds -----------------------------------------------------------------------------------------

    def spent(self, block, account, window):
        total = (0.0,) * len(ORDERS)
        for name, (whose, when, charges) in self.paid.items():
            if self.state[name] == "cancelled" or (whose, when) != (account, window):
                continue
            for c in charges:
                if c.block_id == block:
                    rho = accounting.rdp(c.q, c.sigma, c.steps, ORDERS)
                    total = tuple(t + r for t, r in zip(total, rho, strict=True))
        return total

    @invariant()
    def spending_is_the_rows_never_falls_and_never_passes(self):
        for block, account in itertools.product(BLOCKS, ACCOUNTS):
            window = self.window_now(block)
            spent = self.spent(block, account, window)
            assert self.sides[0].spent(block, account) == self.sides[1].spent(block, account) == spent
            share = self.sides[0].share_used(block, account)
            assert self.share.get((block, account, window), 0.0) <= share <= 1.0
            self.share[block, account, window] = share

    def teardown(self):
        try:
            assert self.sides[1].verify_chain() == sum(
                {"reserved": 1, "started": 2, "committed": 3, "cancelled": 2}[state] for state in self.state.values()
            )
            windows = [row.window for row in self.sides[0].rows() if row.charges and row.window]
            assert windows == sorted(windows)
            for head in self.heads:
                self.sides[1].require_head(head)
            assert audit(self.sides[0], "s").share_used_max <= 1.0
        finally:
            for side in self.sides:
                side.close()
            self.file.unlink()


def test_the_ledger_behaves_like_its_model(quick, monkeypatch):
    monkeypatch.setattr(ledger_module, "_now", ledger_module._now)  # put back afterwards
    LedgerModel.folder = quick
    run_state_machine_as_test(
        LedgerModel,
        settings=settings(
            max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.slow  # chance finds them, sooner or later
@pytest.mark.parametrize(
    "broken",
    ["forgets the account", "forgets the window", "follows the clock back", "counts what was cancelled"],
)
def test_the_model_finds_a_ledger_that_is_wrong(quick, monkeypatch, broken):
    from privacy import accounts, facts

    monkeypatch.setattr(ledger_module, "_now", ledger_module._now)
    counted = accounts._counted
    if broken == "forgets the account":
        monkeypatch.setattr(accounts, "_counted", lambda charges, _, *rest: counted(charges, 0, *rest))
    elif broken == "forgets the window":
        monkeypatch.setattr(accounts, "_counted", lambda charges, account, _: charges.account == account)
    elif broken == "follows the clock back":
        monkeypatch.setattr(accounts, "present_window", lambda *args: args[2].window_at(args[3]))
    else:
        monkeypatch.setattr(facts, "_released", lambda: sa.literal(value=False) == sa.literal(value=True))
        monkeypatch.setattr(facts.Facts, "_catch_up", lambda *_: None)
    LedgerModel.folder = quick
    with pytest.raises((AssertionError, LedgerBroken)):
        run_state_machine_as_test(
            LedgerModel,
            settings=settings(
                max_examples=300,
                stateful_step_count=20,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[p for p in settings().phases if p.name == "generate"],
                suppress_health_check=list(HealthCheck),
            ),
        )
