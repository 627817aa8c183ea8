"""The bytes that are hashed, and a full audit's way of reading them, against the plain way."""

import hashlib
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy import tables
from privacy.audit import audit, recompute
from privacy.canonical import canonical
from privacy.chain import BlockRow, Charge, LedgerRow, hash_of, read_history
from privacy.errors import LedgerError, PrivacyError
from privacy.ledger import Ledger
from privacy.policy import Policy
from tests.privacy.rounds import ADAPTER, PLAN

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["", '"', "\\", "\x7f", "\x00"])
WHOLE = st.integers(-(2**53) + 1, 2**53 - 1)
CHARGE = st.builds(Charge, TEXT, st.floats(0, 1), st.floats(1e-300, 1e300), st.integers(1, 10**6))
ROW = st.builds(
    LedgerRow,
    seq=WHOLE,
    stream=TEXT,
    round_id=TEXT,
    attempt=WHOLE,
    state=TEXT,
    plan_hash=TEXT,
    noise_source=TEXT,
    adapter_sha256=TEXT,
    at=TEXT,
    charges=st.lists(CHARGE | st.just(Charge("b", 0.25, 2.0, 3)), max_size=5).map(tuple),
    blocks_head=TEXT,
    prev_hash=TEXT,
    account=st.sampled_from(["train", "holdout"]) | TEXT,
    window=st.integers(0, 3),
)


@settings(max_examples=300, deadline=None)
@given(row=ROW | st.builds(BlockRow, seq=WHOLE, block_id=TEXT, stream=TEXT, policy=TEXT, prev_hash=TEXT))
def test_a_hash_is_over_canonical_json(row):
    body = asdict(row)
    del body["hash"]
    for name, default in (("account", "train"), ("window", 0)):
        if body.get(name) == default:
            del body[name]
    assert hash_of(row) == hashlib.sha256(canonical(body)).hexdigest()


@pytest.mark.parametrize("change", [{"seq": 2**53}, {"seq": 1.0}, {"at": 5}, {"at": "\ud800"}, {"round_id": b"r"}])
def test_what_is_no_json_has_no_hash(change):
    row = LedgerRow(1, "s", "r", 1, "reserved", PLAN, "system", "", "now", (), "", "")
    with pytest.raises(PrivacyError):
        hash_of(replace(row, **change))


NAMES = [["b1", "b2", "b3"], ["b1", "b22", "b3"], ["b\n1", "b\n2", "b\n3"], ["ä", "ö", "ü"]]


@pytest.mark.parametrize("names", NAMES, ids=["one length", "lengths", "escapes", "letters"])
def test_a_history_is_the_rows_and_their_hashes(url, names):
    ledger = Ledger(url)
    for name in names:
        ledger.register_block("s", name, Policy("record", 8.0, 1e-5).frozen(500))
    mixed = [Charge(names[0], 0.1, 9.0, 1), Charge(names[1], 0.2, 9.0, 1), Charge(names[2], 0.1, 9.0, 1)]
    ledger.reserve("s", "r1", 1, PLAN, mixed)
    ledger.reserve("s", "r2", 1, PLAN, mixed[::-1])
    ledger.reserve("s", "r3", 1, PLAN, [replace(charge, q=0.5) for charge in mixed])
    ledger.cancel("r3", 1, PLAN)
    with tables.reading(ledger._engine) as db:
        history = read_history(db)
    assert list(history.of_stream("s")) == ledger.rows("s")
    assert [row.charges for row in ledger.rows()] == [
        tuple(mixed),
        tuple(mixed[::-1]),
        tuple(replace(charge, q=0.5) for charge in mixed),
        (),
    ]
    assert len(history.of_stream("s", charging={names[0]})) == 3
    ledger.close()


STEP = st.tuples(
    st.sampled_from(["train", "train", "holdout"]),
    st.sampled_from(["record", "user"]),
    st.sets(st.integers(0, 2), min_size=1),
    st.sampled_from([0.1, 0.5]),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(["system", "test"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, max_size=8), horizon=st.sampled_from(["life", "1d"]), other=st.booleans())
def test_the_quick_sum_is_the_sum_written_out(quick, steps, horizon, other):
    """`audit` walks columns, `recompute` rows: every field of their reports is equal, and the filter agrees."""
    for file in quick.glob("*.db*"):
        file.unlink()
    ledger = Ledger(f"sqlite:///{quick / 'quick.db'}")
    grids = [(2, 4, 8, 16), (3, 5, 9) if other else (2, 4, 8, 16)]
    for unit in ("record", "user"):
        for number in range(3):
            policy = Policy(
                unit, 8.0, 1e-5, horizon=horizon, orders=grids[number % 2], holdout_epsilon=4.0, holdout_evaluations=5
            )
            ledger.register_block("s", f"{unit}{number}", policy.frozen(500))
    from privacy import ledger as ledger_module

    day, now = 20_000, ledger_module._now
    try:
        for number, (account, unit, blocks, q, cancelled, days, noise) in enumerate(steps):
            day += days
            ledger_module._now = lambda day=day: now().fromtimestamp(86_400 * day, now().tzinfo)
            charges = [Charge(f"{unit}{b}", q, 4.0, 3) for b in sorted(blocks)]
            try:
                ledger.reserve("s", f"r{number}", 1, PLAN, charges, noise, account=account)
            except LedgerError:
                continue
            if cancelled:
                ledger.cancel(f"r{number}", 1, PLAN)
            else:
                ledger.start(f"r{number}", 1, PLAN)
                ledger.commit(f"r{number}", 1, PLAN, ADAPTER)
        policies = {name: ledger.policy(name) for name in ledger.blocks("s")}
        assert audit(ledger, "s") == recompute("s", ledger.rows("s"), policies)
    finally:
        ledger_module._now = now
        ledger.close()


def test_of_many_blocks_some_are_compared_with_the_filter(sqlite_ledger, monkeypatch):
    from privacy import audit as audit_module
    from privacy.errors import LedgerBroken

    monkeypatch.setattr(audit_module, "COMPARED_MAX", 2)
    sqlite_ledger.reserve("s", "r1", 1, PLAN, [Charge("b2", 0.25, 2.2, 30)])
    assert len(audit(sqlite_ledger, "s").blocks) == 3
    honest = sqlite_ledger._facts.charges
    monkeypatch.setattr(sqlite_ledger._facts, "charges", lambda db, _, grids: honest(db, np.zeros(0, np.int64), grids))
    with pytest.raises(LedgerBroken, match="b2: recomputed spending of train differs"):
        audit(sqlite_ledger, "s")
