"""The ledger against a dictionary, through two openings of one file, reopened at any moment as after a crash."""

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from privacy import accounting
from privacy.audit import audit
from privacy.errors import BudgetExceeded, LedgerConflict
from privacy.ledger import Charge, Ledger
from tests.privacy.rounds import ADAPTER, PLAN, POLICY

BEFORE = {"started": "reserved", "committed": "started", "cancelled": "reserved"}
SIDES = st.integers(0, 1)


class LedgerModel(RuleBasedStateMachine):
    rounds = Bundle("rounds")
    folder = None
    numbers = itertools.count()

    def __init__(self):
        super().__init__()
        self.url = f"sqlite:///{self.folder}/model-{next(self.numbers)}.db"
        self.sides = [Ledger(self.url), Ledger(self.url)]
        self.state: dict[str, str] = {}
        self.charges: dict[str, tuple[Charge, ...]] = {}  # in the order of the reservations
        self.share = {"b1": 0.0, "b2": 0.0}
        self.heads: list[str] = []
        for name in self.share:
            self.sides[0].register_block("s", name, POLICY.frozen(100))

    @rule(
        target=rounds,
        side=SIDES,
        number=st.integers(0, 9),
        blocks=st.sets(st.sampled_from(["b1", "b2"]), min_size=1),
        q=st.sampled_from([0.02, 0.25, 0.5]),
        sigma=st.sampled_from([0.8, 2.2, 6.0]),
    )
    def reserve(self, side, number, blocks, q, sigma):
        name = f"r{number}"
        charges = tuple(Charge(b, q, sigma, 20) for b in sorted(blocks))
        can_pay = all(
            accounting.fits(self.spent(c.block_id), accounting.rdp(c.q, c.sigma, c.steps, POLICY.orders), POLICY.caps)
            for c in charges
        )
        assert can_pay == (self.sides[side].shortfalls(charges) == [])
        try:
            row = self.sides[side].reserve("s", name, 1, PLAN, charges)
        except BudgetExceeded:
            assert name not in self.state
            assert not can_pay
        except LedgerConflict:
            assert self.state[name] == "cancelled" or self.charges[name] != charges
        else:
            if name in self.state:
                assert (row.state, self.charges[name]) == (self.state[name], charges)
            else:
                assert can_pay
                self.state[name], self.charges[name] = "reserved", charges
        return name

    @rule(side=SIDES, name=rounds, to=st.sampled_from(["started", "committed", "cancelled"]))
    def move(self, side, name, to):
        ledger = self.sides[side]
        call = {
            "started": lambda: ledger.start(name, 1, PLAN),
            "committed": lambda: ledger.commit(name, 1, PLAN, ADAPTER),
            "cancelled": lambda: ledger.cancel(name, 1, PLAN),
        }[to]
        if self.state.get(name) in {BEFORE[to], to}:
            assert call().state == to
            if to == "cancelled" and self.state[name] == "reserved":
                self.share = dict.fromkeys(self.share, 0.0)  # only a release may lower what is used
            self.state[name] = to
        else:
            with pytest.raises(LedgerConflict):
                call()

    @rule(side=SIDES)
    def reopen(self, side):
        self.sides[side].close()
        self.sides[side] = Ledger(self.url)

    @rule(side=SIDES)
    def keep_a_receipt(self, side):
        self.heads.append(self.sides[side].head())

    def spent(self, block):
        total = (0.0,) * len(POLICY.orders)
        for name, charges in self.charges.items():
            for c in charges if self.state[name] != "cancelled" else ():
                if c.block_id == block:
                    rho = accounting.rdp(c.q, c.sigma, c.steps, POLICY.orders)
                    total = tuple(t + r for t, r in zip(total, rho, strict=True))
        return total

    @invariant()
    def spending_is_the_rows_never_falls_and_never_passes(self):
        for block in self.share:
            assert self.sides[0].spent(block) == self.sides[1].spent(block) == self.spent(block)
            share = self.sides[0].share_used(block)
            assert self.share[block] <= share <= 1.0
            self.share[block] = share

    def teardown(self):
        self.sides[1].verify_chain()
        for head in self.heads:
            self.sides[1].require_head(head)
        audit(self.sides[0], "s")
        for side in self.sides:
            side.close()


def test_the_ledger_behaves_like_its_model(quick):
    LedgerModel.folder = quick
    run_state_machine_as_test(
        LedgerModel,
        settings=settings(
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
