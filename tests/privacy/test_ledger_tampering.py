import sqlite3

import pytest

from privacy.errors import LedgerBroken, LedgerError
from privacy.ledger import Ledger
from tests.privacy.rounds import PLAN, charge, run_round


@pytest.fixture
def spent(sqlite_ledger):
    run_round(sqlite_ledger, "r1", [charge("b1"), charge("b2")])
    sqlite_ledger.reserve("s", "r2", 1, PLAN, [charge("b2", sigma=9.0)])
    return sqlite_ledger


@pytest.fixture
def raw(quick, spent):
    """The file behind the ledger, without its constraints."""
    connection = sqlite3.connect(quick / "ledger.db", isolation_level=None)
    connection.execute("PRAGMA foreign_keys=OFF")
    yield connection
    connection.close()


def flips(value):
    """The value with each byte changed in turn; a number changed in its last bit, its sign and its size."""
    if isinstance(value, str):
        data = value.encode()
        for at in range(len(data)):
            yield (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]).decode(errors="replace")
        yield value[:-1]
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -value, value * 10)
    else:
        yield from (value * (1 + 2**-52), -value, value / 2, 0.0, 9e99)


KEYS = {"ledger": "seq", "blocks": "seq", "mechanisms": "seq, number", "charges": "seq, position"}


@pytest.mark.parametrize("table", KEYS)
def test_any_changed_byte_of_any_row_is_found(spent, raw, table):
    columns = [name for _, name, *_ in raw.execute(f"PRAGMA table_info({table})")]
    keys = KEYS[table].split(", ")
    changed = 0
    for row in raw.execute(f"SELECT * FROM {table}").fetchall():
        values = dict(zip(columns, row, strict=True))
        for column, value in values.items():
            for other in flips(value):
                if other == value:
                    continue  # minus zero, or the end of an empty text
                there, back = values | {column: other}, values
                try:
                    raw.execute(*update(table, keys, values, there))
                except sqlite3.IntegrityError:
                    continue  # two rows with one key: the file cannot even say it
                with pytest.raises(LedgerError):
                    spent.verify_chain()
                changed += 1
                raw.execute(*update(table, keys, there, back))
    assert changed > 20
    assert spent.verify_chain() == 4


def update(table, keys, before, after):
    """Statement and values that turn one row into another."""
    assigned = ", ".join(f"{name} = ?" for name in after)
    where = " AND ".join(f"{key} = ?" for key in keys)
    return f"UPDATE {table} SET {assigned} WHERE {where}", (*after.values(), *(before[key] for key in keys))


@pytest.mark.parametrize("block", ["'1,2'", "2.5", "'x'", "x'31'"])
def test_what_is_no_number_is_no_block(spent, raw, block):
    raw.execute(f"UPDATE charges SET block = {block} WHERE seq = 1 AND position = 1")
    with pytest.raises(LedgerError):
        spent.verify_chain()


@pytest.mark.parametrize("table", KEYS)
def test_a_row_taken_out_is_found(spent, raw, table):
    raw.execute(f"DELETE FROM {table} WHERE ({KEYS[table]}) IN (SELECT {KEYS[table]} FROM {table} LIMIT 1)")
    with pytest.raises(LedgerBroken):
        spent.verify_chain()


def test_a_row_put_in_is_found(spent, raw):
    raw.execute("INSERT INTO mechanisms VALUES (2, 0, 0.1, 1.0, 1)")
    with pytest.raises(LedgerBroken, match="row 2"):
        spent.verify_chain()
    raw.execute("INSERT INTO charges VALUES (2, 0, 3, 0)")
    with pytest.raises(LedgerBroken, match="row 2"):
        spent.verify_chain()
    raw.execute("UPDATE charges SET seq = 99 WHERE block = 3")
    raw.execute("UPDATE mechanisms SET seq = 99 WHERE seq = 2")
    with pytest.raises(LedgerBroken, match="row 99"):
        spent.verify_chain()


def test_a_larger_epsilon_for_a_sealed_block_is_found(spent, raw):
    from privacy.canonical import canonical
    from privacy.policy import Policy

    generous = canonical(Policy("record", 80.0, 1e-5).frozen(500)).decode()
    raw.execute("UPDATE blocks SET policy = ? WHERE block_id = 'b1'", (generous,))
    with pytest.raises(LedgerBroken, match="b1"):
        spent.verify_chain()


def test_rewriting_the_blocks_chain_does_not_help(spent, raw):
    from dataclasses import replace

    from privacy.canonical import canonical
    from privacy.chain import GENESIS, BlockRow, hash_of
    from privacy.policy import Policy

    generous = canonical(Policy("record", 80.0, 1e-5).frozen(500)).decode()
    before = GENESIS
    for seq, name in enumerate(("b1", "b2", "b3"), start=1):
        row = BlockRow(seq, name, "s", generous, before)
        row = replace(row, hash=hash_of(row))
        raw.execute("UPDATE blocks SET policy=?, prev_hash=?, hash=? WHERE seq=?", (generous, before, row.hash, seq))
        before = row.hash
    with pytest.raises(LedgerBroken, match="not known at its time"):
        spent.verify_chain()


def test_what_is_no_text_is_a_ledger_error(spent, raw):
    raw.execute("UPDATE ledger SET stream = CAST(x'ff' AS TEXT) WHERE seq = 2")
    with pytest.raises(LedgerError):
        spent.verify_chain()


def test_bytes_of_the_file_are_never_read_as_another_ledger(spent, quick):
    """Any byte of the file itself: the chain breaks, the file does not open, or nothing that counts has changed."""
    spent.close()
    whole = (quick / "ledger.db").read_bytes()
    names = ("b1", "b2", "b3")
    opened = Ledger(f"sqlite:///{quick / 'ledger.db'}")
    truth = [opened.rows(), *(opened.spent(name) for name in names)]
    opened.close()
    for at in range(7, len(whole), 397):
        (quick / "flipped.db").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            flipped = Ledger(f"sqlite:///{quick / 'flipped.db'}")
        except LedgerError:
            continue
        try:
            flipped.verify_chain()
            assert [flipped.rows(), *(flipped.spent(name) for name in names)] == truth
        except LedgerError:
            pass
        finally:
            flipped.close()
