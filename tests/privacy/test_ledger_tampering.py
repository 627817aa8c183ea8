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


@pytest.mark.parametrize("table", ["ledger", "charges", "blocks"])
def test_any_changed_byte_of_any_row_is_found(spent, raw, table):
    columns = [name for _, name, *_ in raw.execute(f"PRAGMA table_info({table})")]
    changed = 0
    for rowid, *row in raw.execute(f"SELECT rowid, * FROM {table}").fetchall():
        for column, value in zip(columns, row, strict=True):
            for other in flips(value):
                if other == value:
                    continue  # minus zero, or the end of an empty text
                try:
                    raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (other, rowid))
                except sqlite3.IntegrityError:
                    continue  # two rows with one key: the file cannot even say it
                with pytest.raises(LedgerError):
                    spent.verify_chain()
                changed += 1
                back = rowid if column != "seq" or table == "charges" else other
                raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, back))
    assert changed > 20
    assert spent.verify_chain() == 4


@pytest.mark.parametrize("table", ["ledger", "charges", "blocks"])
def test_a_row_taken_out_is_found(spent, raw, table):
    raw.execute(f"DELETE FROM {table} WHERE rowid = (SELECT MIN(rowid) FROM {table})")
    with pytest.raises(LedgerBroken):
        spent.verify_chain()


def test_a_row_put_in_is_found(spent, raw):
    raw.execute("INSERT INTO charges VALUES (2, 0, 'b3', 0.1, 1.0, 1)")
    with pytest.raises(LedgerBroken, match="row 2"):
        spent.verify_chain()
    raw.execute("UPDATE charges SET seq = 99 WHERE block_id = 'b3'")
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
