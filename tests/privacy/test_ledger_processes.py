"""Several processes on one ledger, and processes that die in the middle."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from privacy import accounting, accounts
from privacy.errors import BudgetExceeded, LedgerError
from privacy.ledger import Charge, Ledger
from privacy.policy import Policy
from tests.privacy.rounds import ADAPTER, PLAN, POLICY, charge, run_round

HELD = Policy("record", 8.0, 1e-5, holdout_evaluations=4)
HOLDOUT_CHARGE = Charge("h1", 1.0, 7.0, 1)
SPAWN = multiprocessing.get_context("spawn")


def _race(url, name, queue):
    ledger = Ledger(url)
    won = 0
    for number in range(6):
        try:
            ledger.reserve("s", f"{name}-{number}", 1, PLAN, [charge("b1")])
            won += 1
        except BudgetExceeded:
            pass
        ledger.register_block("s", f"{name}-{number}", POLICY.frozen(7))
    ledger.close()
    queue.put(won)


def test_racing_processes_never_overspend(ledger, url):
    queue = SPAWN.Queue()
    racers = [SPAWN.Process(target=_race, args=(url, f"p{i}", queue)) for i in range(3)]
    for racer in racers:
        racer.start()
    won = sum(queue.get(timeout=120) for _ in racers)
    for racer in racers:
        racer.join()
    one = accounting.share_used(accounting.rdp(0.25, 2.2, 30, POLICY.orders), POLICY.caps)
    assert won == int(1 / one)
    assert ledger.share_used("b1") <= 1.0
    assert ledger.verify_chain() == won
    assert len(ledger.blocks("s")) == 3 + 18


LAST = [f"last{number}" for number in range(4)]


def _race_for_the_last(url, name, barrier, queue, *, early):
    """Ask for each block's last round at the same moment; `early`: a learner that looks before it has the lock."""
    ledger, won, honest = Ledger(url), [], accounts.shortfalls
    for block in LAST:
        seen = ledger.shortfalls([charge(block)]), 0
        barrier.wait()
        accounts.shortfalls = (lambda *_, seen=seen, **__: seen) if early else honest
        try:
            ledger.reserve("s", f"{name}-{block}", 1, PLAN, [charge(block)])
            won.append(block)
        except BudgetExceeded:
            pass
        accounts.shortfalls = honest
    ledger.close()
    queue.put(won)


@pytest.mark.parametrize("early", [False, True], ids=["as it is", "looking before the lock"])
def test_of_two_learners_racing_for_the_last_of_a_budget_exactly_one_wins(ledger, url, early):
    one = accounting.share_used(accounting.rdp(0.25, 2.2, 30, POLICY.orders), POLICY.caps)
    for block in LAST:
        ledger.register_block("s", block, POLICY.frozen(500))
    for number in range(int(1 / one) - 1):
        ledger.reserve("s", f"before-{number}", 1, PLAN, [charge(block) for block in LAST])
    barrier, queue = SPAWN.Barrier(2), SPAWN.Queue()
    racers = [
        SPAWN.Process(target=_race_for_the_last, args=(url, f"p{i}", barrier, queue), kwargs={"early": early})
        for i in range(2)
    ]
    for racer in racers:
        racer.start()
    winners = sorted(block for _ in racers for block in queue.get(timeout=120))
    for racer in racers:
        racer.join()
    shares = [ledger.share_used(block) for block in LAST]
    if early:
        assert winners == sorted(2 * LAST), "the race is a real one: both saw room"
        assert min(shares) > 1.0
    else:
        assert winners == LAST
        assert max(shares) <= 1.0


def _race_for_the_holdout(url, name, queue):
    ledger = Ledger(url)
    won = 0
    for number in range(6):
        try:
            ledger.reserve("s", f"{name}-{number}", 1, PLAN, [HOLDOUT_CHARGE], account="holdout")
            won += 1
        except BudgetExceeded:
            pass
    ledger.close()
    queue.put(won)


def test_racing_processes_never_overspend_a_holdout(ledger, url):
    ledger.register_block("s", "h1", HELD.frozen(500))
    queue = SPAWN.Queue()
    racers = [SPAWN.Process(target=_race_for_the_holdout, args=(url, f"p{i}", queue)) for i in range(2)]
    for racer in racers:
        racer.start()
    won = sum(queue.get(timeout=120) for _ in racers)
    for racer in racers:
        racer.join()
    one = accounting.share_used(accounting.rdp(*HOLDOUT_CHARGE.mechanism, HELD.orders), HELD.holdout_caps)
    assert 2 <= won == int(1 / one) < 12
    assert ledger.share_used("h1", "holdout") <= 1.0
    assert ledger.share_used("h1") == 0.0
    assert ledger.verify_chain() == won


def test_racing_threads_charge_one_attempt_once(ledger):
    rows = []
    barrier = threading.Barrier(6)

    def reserve():
        barrier.wait()
        rows.append(ledger.reserve("s", "r1", 1, PLAN, [charge("b1")]))

    threads = [threading.Thread(target=reserve) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({row.hash for row in rows}) == 1
    assert len(rows) == 6
    assert ledger.verify_chain() == 1


def _open(url, queue):
    ledger = Ledger(url)
    ledger.register_block("s", "b1", POLICY.frozen(7))
    queue.put(ledger.blocks("s"))
    ledger.close()


def test_first_starts_at_once_make_one_schema(url):
    queue = SPAWN.Queue()
    starts = [SPAWN.Process(target=_open, args=(url, queue)) for _ in range(3)]
    for start in starts:
        start.start()
    assert [queue.get(timeout=120) for _ in starts] == [["b1"]] * 3
    for start in starts:
        start.join()


def test_an_audit_is_not_confused_by_rounds_that_go_on(ledger, url):
    from privacy.audit import audit

    stop = threading.Event()

    def work():
        number = 0
        while not stop.is_set():
            number += 1
            run_round(ledger, f"r{number}", [charge("b1", sigma=400.0), charge("b2", sigma=400.0)])

    worker = threading.Thread(target=work)
    reader = Ledger(url)
    worker.start()
    try:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            audit(reader, "s")
    finally:
        stop.set()
        worker.join()
        reader.close()


WRITER = """
import sys
from privacy.ledger import Ledger
from tests.privacy.rounds import charge, run_round
ledger = Ledger(sys.argv[1])
for number in range(int(sys.argv[2]), 10_000):
    run_round(ledger, f"k{number}", [charge("b1", sigma=400.0), charge("b2", sigma=400.0)])
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_whole_rows_and_what_it_reported(ledger, url):
    done = -1
    for kill in range(4):
        child = subprocess.Popen([sys.executable, "-c", WRITER, url, str(done + 1)], stdout=subprocess.PIPE, text=True)
        for _ in range(2 + kill):
            done = int(child.stdout.readline())
        time.sleep(0.003 * kill)
        os.kill(child.pid, signal.SIGKILL)
        done = max([done, *(int(line) for line in child.stdout if line.strip())])
        child.wait()
        child.stdout.close()
        ledger.verify_chain()
        committed = {row.round_id for row in ledger.rows() if row.state == "committed"}
        assert {f"k{number}" for number in range(done + 1)} <= committed
    started = [row for row in ledger.rows() if row.charges]
    rho = accounting.rdp(0.25, 400.0, 30, POLICY.orders)
    total = (0.0,) * len(rho)
    for _ in started:
        total = tuple(t + r for t, r in zip(total, rho, strict=True))
    assert ledger.spent("b1") == ledger.spent("b2") == total


def test_sqlite_syncs_the_folder_too(sqlite_ledger):
    from privacy import tables

    with tables.reading(sqlite_ledger._engine) as db:
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 3, "EXTRA"
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"


def test_an_auditor_may_read_a_file_nobody_can_write(sqlite_ledger, quick):
    run_round(sqlite_ledger, "r1", [charge()])
    uri = f"sqlite:///file:{quick / 'ledger.db'}?mode=ro&uri=true"
    reader = Ledger(uri)
    assert reader.verify_chain() == 3
    with pytest.raises(LedgerError, match="readonly"):
        reader.reserve("s", "r2", 1, PLAN, [charge()])
    reader.close()


def test_a_database_that_is_busy_or_gone_is_a_ledger_error(sqlite_ledger, quick, monkeypatch):
    from privacy import tables

    monkeypatch.setattr(tables, "BUSY_SECONDS", 0.05)
    impatient = Ledger(f"sqlite:///{quick / 'ledger.db'}")
    holder = sqlite3.connect(quick / "ledger.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked"):
        impatient.reserve("s", "r1", 1, PLAN, [charge()])
    holder.close()
    assert impatient.reserve("s", "r1", 1, PLAN, [charge()]).seq == 1
    impatient.close()


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////no/such/folder/ledger.db", "postgresql+psycopg://u:secret@127.0.0.1:9/x", "odd://x"]
)
def test_a_ledger_that_cannot_be_opened_says_so_without_its_password(url):
    with pytest.raises(LedgerError, match=r"service\.ledger\.url") as refused:
        Ledger(url)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_database_and_an_unknown_schema_are_refused(tmp_path):
    (tmp_path / "text.db").write_text("hello " * 1000)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(f"sqlite:///{tmp_path / 'text.db'}")
    file = tmp_path / "later.db"
    Ledger(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999_later'")
    db.close()
    with pytest.raises(LedgerError, match="schema=9999_later"):
        Ledger(f"sqlite:///{file}")


def test_connections_that_were_cut_cost_nothing(postgres_url):
    import psycopg

    ledger = Ledger(postgres_url)
    ledger.register_block("s", "b1", POLICY.frozen(7))
    run_round(ledger, "r1", [charge()])
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    assert ledger.commit("r1", 1, PLAN, ADAPTER).seq == 3
    assert ledger.verify_chain() == 3
    ledger.close()
