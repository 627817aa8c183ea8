"""A database of the first schema, with rows written by the rules of that time, opened by this code."""

import hashlib
from pathlib import Path

import pytest
import sqlalchemy as sa

from privacy import accounting
from privacy.audit import audit
from privacy.canonical import canonical
from privacy.chain import GENESIS
from privacy.errors import LedgerConflict
from privacy.ledger import Charge, Ledger
from privacy.policy import Policy
from tests.privacy.rounds import ADAPTER, PLAN, charge, run_round

MIGRATIONS = Path(__file__).resolve().parents[2] / "privacy" / "migrations"
# A policy as the first schema knew it: nothing of a holdout account in it.
OLD_POLICY = {
    name: value for name, value in Policy("record", 8.0, 1e-5).frozen(500).items() if not name.startswith("holdout_e")
}
CHARGES = (Charge("b2", 0.25, 2.2, 30), Charge("b1", 1 / 3, 10 / 3, 7), Charge("b3", 0.25, 2.2, 30))


def first_schema(url):
    from alembic import command
    from alembic.config import Config

    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001_chained")
    return engine


def insert(db, table, row):
    names = ", ".join(row)
    db.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in row)})"), row)


def chained(body, before):
    """The row with its hash, by the rule of the first schema: canonical JSON of all its fields."""
    body = body | {"prev_hash": before}
    return body | {"hash": hashlib.sha256(canonical(body)).hexdigest()}


def step(seq, state, before, blocks_head, charges=(), round_id="r1"):
    body = {
        "seq": seq,
        "stream": "s",
        "round_id": round_id,
        "attempt": 1,
        "state": state,
        "plan_hash": PLAN,
        "noise_source": "system",
        "adapter_sha256": ADAPTER if state == "committed" else "",
        "at": "2026-01-02T03:04:05Z",
        "blocks_head": blocks_head,
        "charges": [{"block_id": c.block_id, "q": c.q, "sigma": c.sigma, "steps": c.steps} for c in charges],
    }
    return chained(body, before)


@pytest.fixture
def old(url):
    """Three blocks, one whole round, one that was cancelled."""
    engine = first_schema(url)
    with engine.begin() as db:
        head = GENESIS
        for seq, name in enumerate(("b1", "b2", "b3"), start=1):
            policy = canonical(OLD_POLICY).decode()
            row = chained({"seq": seq, "block_id": name, "stream": "s", "policy": policy}, head)
            insert(db, "blocks", row)
            head = row["hash"]
        before = GENESIS
        steps = [("r1", "reserved"), ("r1", "started"), ("r1", "committed"), ("r2", "reserved"), ("r2", "cancelled")]
        for seq, (name, state) in enumerate(steps, start=1):
            row = step(seq, state, before, head, CHARGES if state == "reserved" else (), name)
            insert(db, "ledger", {name: value for name, value in row.items() if name != "charges"})
            for position, entry in enumerate(row["charges"]):
                insert(db, "charges", {"seq": seq, "position": position} | entry)
            before = row["hash"]
    engine.dispose()
    return before


def test_rows_of_the_first_schema_keep_hashes_charges_and_spending(old, url):
    ledger = Ledger(url)
    assert ledger.head() == old
    assert ledger.verify_chain() == 5
    first = ledger.rows("s")[0]
    assert (first.charges, first.account, first.window) == (CHARGES, "train", 0)
    policy = ledger.policy("b1")
    assert (policy.holdout_evaluations, policy.horizon) == (0, "life")
    for paid in CHARGES:
        assert ledger.spent(paid.block_id) == accounting.rdp(paid.q, paid.sigma, paid.steps, policy.orders)
        assert ledger.share_used(paid.block_id, "holdout") == 0.0
    assert {b.block: b.rounds for b in audit(ledger, "s").blocks} == dict.fromkeys(("b1", "b2", "b3"), ("r1",))
    ledger.close()


def test_the_chain_goes_on_and_the_old_manifests_still_agree(old, url):
    ledger = Ledger(url)
    ledger.register_block("s", "b1", OLD_POLICY)
    with pytest.raises(LedgerConflict):
        ledger.register_block("s", "b1", Policy("record", 8.0, 1e-5).frozen(500))
    ledger.register_block("s", "b4", Policy("record", 8.0, 1e-5, holdout_evaluations=5).frozen(500))
    run_round(ledger, "r3", [charge("b1"), charge("b4")])
    ledger.reserve("s", "e1", 1, PLAN, [Charge("b4", 1.0, 20.0, 1)], account="holdout")
    assert ledger.verify_chain() == 9
    again = Ledger(url)
    assert (again.head(), again.rows()) == (ledger.head(), ledger.rows())
    assert ledger.rows()[5].prev_hash == old
    for opened in (ledger, again):
        opened.close()


def test_a_changed_old_row_is_found_after_the_migration(old, url):
    from privacy.errors import LedgerBroken

    Ledger(url).close()
    engine = sa.create_engine(url)
    with engine.begin() as db:
        db.execute(sa.text("UPDATE mechanisms SET sigma = 2.3 WHERE seq = 1 AND sigma = 2.2"))
    engine.dispose()
    ledger = Ledger(url)
    with pytest.raises(LedgerBroken, match="row 1"):
        ledger.verify_chain()
    ledger.close()


def test_what_follows_from_the_schema_is_declared_in_one_place(sqlite_url, postgres_url):
    from privacy import tables

    for url in (sqlite_url, postgres_url):
        ledger = Ledger(url)
        found = sa.inspect(ledger._engine)
        for table in tables.metadata.tables.values():
            assert {column["name"] for column in found.get_columns(table.name)} == set(table.columns.keys())
        ledger.close()
