import multiprocessing
import sqlite3

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from privacy import accounting
from privacy.audit import audit
from privacy.errors import BudgetExceeded, LedgerBehindReceipt, LedgerBroken, LedgerConflict, LedgerError
from privacy.ledger import GENESIS, Charge, Ledger
from privacy.policy import Policy

POLICY = Policy("record", 8.0, 1e-5)
PLAN = "a" * 64
ADAPTER = "b" * 64


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def ledger(url):
    made = Ledger(url)
    for name in ("b1", "b2", "b3"):
        made.register_block("s", name, POLICY.frozen(500))
    yield made
    made.close()


def charge(block="b1", q=0.25, sigma=2.2, steps=30):
    return Charge(block, q, sigma, steps)


def run_round(ledger, name, charges, attempt=1):
    ledger.reserve("s", name, attempt, PLAN, charges)
    ledger.start(name, attempt, PLAN)
    return ledger.commit(name, attempt, PLAN, ADAPTER)


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


def test_only_a_reservation_can_be_cancelled(ledger):
    ledger.reserve("s", "r1", 1, PLAN, [charge()])
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
    with pytest.raises(LedgerError, match="unknown"):
        ledger.reserve("s", "r3", 1, PLAN, [charge("b77")])
    with pytest.raises(LedgerError, match="each once"):
        ledger.reserve("s", "r3", 1, PLAN, [charge(), charge()])


COLUMNS = ("stream", "round_id", "attempt", "state", "plan_hash", "noise_source", "adapter_sha256", "at", "prev_hash")


@pytest.mark.parametrize("column", COLUMNS)
def test_any_changed_column_is_found(ledger, tmp_path, column):
    run_round(ledger, "r1", [charge()])
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute(f"UPDATE ledger SET {column} = '7' WHERE seq = 2")
    db.close()
    with pytest.raises(LedgerBroken, match="row 2"):
        ledger.verify_chain()


@pytest.mark.parametrize("column", ["block_id", "q", "sigma", "steps"])
def test_any_changed_charge_is_found(ledger, tmp_path, column):
    run_round(ledger, "r1", [charge()])
    value = "'b2'" if column == "block_id" else f"{column} + 1" if column != "q" else "q / 2"
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute(f"UPDATE charges SET {column} = {value}")
    db.close()
    with pytest.raises(LedgerBroken, match="row 1"):
        ledger.verify_chain()


def test_a_dropped_row_is_found(ledger, tmp_path):
    run_round(ledger, "r1", [charge()])
    head = ledger.head()
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("DELETE FROM ledger WHERE seq = 3")
    db.close()
    ledger.verify_chain()
    with pytest.raises(LedgerBehindReceipt, match="older backup"):
        ledger.require_head(head)


def test_the_audit_recomputes_what_the_filter_works_with(ledger):
    run_round(ledger, "r1", [charge("b1"), charge("b2")])
    run_round(ledger, "r2", [charge("b1", q=0.05), charge("b3")])
    report = audit(ledger, "s")
    assert report.claim.startswith("(8, 1e-05)-DP per record")
    assert {b.block: b.rounds for b in report.blocks} == {"b1": ("r1", "r2"), "b2": ("r1",), "b3": ("r2",)}
    for block in report.blocks:
        assert block.share_used == ledger.share_used(block.block)


def test_test_noise_says_infinity(ledger):
    ledger.reserve("s", "r1", 1, PLAN, [charge("b2")], noise_source="test")
    report = audit(ledger, "s")
    assert report.epsilon is None
    assert "epsilon infinity" in report.claim


def _race(url, name, queue):
    ledger = Ledger(url)
    won = 0
    for number in range(6):
        try:
            ledger.reserve("s", f"{name}-{number}", 1, PLAN, [charge("b1")])
            won += 1
        except BudgetExceeded:
            pass
    ledger.close()
    queue.put(won)


def test_racing_processes_never_overspend(ledger, url):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=_race, args=(url, f"p{i}", queue)) for i in range(3)]
    for racer in racers:
        racer.start()
    won = sum(queue.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    one = accounting.share_used(accounting.rdp(0.25, 2.2, 30, POLICY.orders), POLICY.caps)
    assert won == int(1 / one)
    assert ledger.share_used("b1") <= 1.0
    assert ledger.verify_chain() == won


def test_two_hundred_different_rounds_are_summed_within_a_second(ledger):
    import time

    for number in range(200):
        ledger.reserve("s", f"r{number}", 1, PLAN, [Charge("b1", 0.01 + number * 1e-5, 8.0, 10)])
    begun = time.process_time()
    ledger.spent("b1")
    assert time.process_time() - begun < 1.0


class LedgerModel(RuleBasedStateMachine):
    """The ledger against a dictionary; reopened at any moment, as after a crash."""

    rounds = Bundle("rounds")
    path = ""

    def __init__(self):
        super().__init__()
        type(self).count += 1
        self.url = f"sqlite:///{self.path}/model-{type(self).count}.db"
        self.ledger = Ledger(self.url)
        self.state: dict[str, str] = {}
        self.charges: dict[str, tuple[Charge, ...]] = {}
        self.order: list[str] = []
        self.share = {"b1": 0.0, "b2": 0.0}
        for name in self.share:
            self.ledger.register_block("s", name, POLICY.frozen(100))

    count = 0

    @rule(
        target=rounds,
        number=st.integers(0, 9),
        blocks=st.sets(st.sampled_from(["b1", "b2"]), min_size=1),
        q=st.sampled_from([0.02, 0.25, 0.5]),
        sigma=st.sampled_from([0.8, 2.2, 6.0]),
    )
    def reserve(self, number, blocks, q, sigma):
        name = f"r{number}"
        charges = tuple(Charge(b, q, sigma, 20) for b in sorted(blocks))
        try:
            self.ledger.reserve("s", name, 1, PLAN, charges)
        except BudgetExceeded:
            assert name not in self.state
        except LedgerConflict:
            assert self.state[name] == "cancelled"
        else:
            if name not in self.state:
                self.state[name], self.charges[name] = "reserved", charges
                self.order.append(name)
        return name

    @rule(name=rounds, to=st.sampled_from(["started", "committed", "cancelled"]))
    def move(self, name, to):
        before = {"started": "reserved", "committed": "started", "cancelled": "reserved"}[to]
        call = {
            "started": lambda: self.ledger.start(name, 1, PLAN),
            "committed": lambda: self.ledger.commit(name, 1, PLAN, ADAPTER),
            "cancelled": lambda: self.ledger.cancel(name, 1, PLAN),
        }[to]
        if self.state.get(name) in {before, to}:
            call()
            if to == "cancelled" and self.state[name] == "reserved":
                self.share = dict.fromkeys(self.share, 0.0)  # a release may lower what is used
            self.state[name] = to
        else:
            with pytest.raises(LedgerConflict):
                call()

    @rule()
    def reopen(self):
        self.ledger.close()
        self.ledger = Ledger(self.url)

    @invariant()
    def spending_is_the_rows_and_never_passes(self):
        for block in self.share:
            total = (0.0,) * len(POLICY.orders)
            for name in self.order:
                if self.state[name] != "cancelled":
                    for c in self.charges[name]:
                        if c.block_id == block:
                            rho = accounting.rdp(c.q, c.sigma, c.steps, POLICY.orders)
                            total = tuple(t + r for t, r in zip(total, rho, strict=True))
            assert self.ledger.spent(block) == total
            share = self.ledger.share_used(block)
            assert self.share[block] <= share <= 1.0
            self.share[block] = share

    def teardown(self):
        self.ledger.verify_chain()
        self.ledger.close()


def test_the_ledger_behaves_like_its_model(tmp_path):
    LedgerModel.path = str(tmp_path)
    run_state_machine_as_test(
        LedgerModel,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
