import json
import multiprocessing
import sqlite3

import pytest

from privacy.signing import SigningKey, TrustedKeys
from registry.approvals import GENESIS, Approvals, standing
from registry.errors import ApprovalsError, ApprovalsTampered


@pytest.fixture
def signer(tmp_path):
    return SigningKey.load_or_create(tmp_path / "approvals.pem")


@pytest.fixture
def history(tmp_path, signer):
    return Approvals(f"sqlite:///{tmp_path / 'approvals.db'}", signer)


def decide(approvals, version, kind="promote", *, model="desk", start="Staging", end="Production", who="ada"):
    return approvals.append(
        model=model,
        version=version,
        adapter_sha256=f"{version:064d}",
        from_stage=start,
        to_stage=end,
        who=who,
        why=f"because of {version}",
        kind=kind,
    )


def test_rows_are_signed_chained_and_read_back_as_they_were_signed(history, signer):
    first = decide(history, 1)
    second = decide(history, 2, model="other")
    third = decide(history, 3)
    assert [row["seq"] for row in (first, second, third)] == [1, 2, 3]
    assert first["prev_hash"] == GENESIS
    assert history.history("desk") == [first, third]
    assert history.history() == [first, second, third]
    assert history.latest("desk") == third
    assert history.latest("nobody") is None
    assert history.verify(TrustedKeys([signer.public])) == 3
    assert {"who": "ada", "why": "because of 3", "kind": "promote", "from": "Staging"}.items() <= third.items()


def test_an_empty_history_verifies(history, signer):
    assert history.verify(TrustedKeys([signer.public])) == 0
    assert history.head() == GENESIS
    assert history.standing("desk").live is None


def rewrite(file, seq, **changes):
    with sqlite3.connect(file) as db:
        (text,) = db.execute("SELECT signed FROM approvals WHERE seq=?", (seq,)).fetchone()
        db.execute("UPDATE approvals SET signed=? WHERE seq=?", (json.dumps(json.loads(text) | changes), seq))
    db.close()


def run_sql(file, sql):
    with sqlite3.connect(file) as db:
        db.execute(sql)
    db.close()


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (lambda f: rewrite(f, 2, why="something else"), "row seq=2: its content does not match its hash"),
        (lambda f: run_sql(f, "DELETE FROM approvals WHERE seq=2"), "row seq=3: row 2 is missing"),
        (lambda f: run_sql(f, "UPDATE approvals SET model='b' WHERE seq=1"), "row seq=1: its columns do not match"),
        (lambda f: run_sql(f, "UPDATE approvals SET signed='nonsense' WHERE seq=3"), "row seq=3: it does not verify"),
        (
            lambda f: run_sql(f, "UPDATE approvals SET seq = CASE seq WHEN 2 THEN 30 ELSE seq END WHERE seq IN (2)"),
            "row 2 is missing",
        ),
    ],
)
def test_tampering_is_named_by_row(history, signer, tmp_path, tamper, named):
    for version in (1, 2, 3):
        decide(history, version)
    tamper(tmp_path / "approvals.db")
    with pytest.raises(ApprovalsTampered, match=named):
        history.verify(TrustedKeys([signer.public]))


def test_a_row_signed_by_another_key_is_named(history, signer, tmp_path):
    decide(history, 1)
    stranger = SigningKey.load_or_create(tmp_path / "stranger.pem")
    decide(Approvals(f"sqlite:///{tmp_path / 'approvals.db'}", stranger), 2)
    with pytest.raises(ApprovalsTampered, match=r"row seq=2: it does not verify .*not trusted here"):
        history.verify(TrustedKeys([signer.public]))


def test_without_a_key_it_can_only_be_read(history, tmp_path):
    decide(history, 1)
    reader = Approvals(f"sqlite:///{tmp_path / 'approvals.db'}")
    assert len(reader.history()) == 1
    with pytest.raises(ApprovalsError, match="opened without a signing key"):
        decide(reader, 2)


def test_an_unknown_kind_is_refused(history):
    with pytest.raises(ApprovalsError, match="kind=bless: must be one of promote, reject, rollback, emergency"):
        decide(history, 1, "bless")


def test_a_database_that_cannot_be_opened_says_so_without_its_password(tmp_path):
    with pytest.raises(ApprovalsError, match="cannot be opened"):
        Approvals(f"sqlite:///{tmp_path / 'no' / 'such' / 'approvals.db'}")


def _append_many(url, pem, start):
    approvals = Approvals(url, SigningKey.load_or_create(pem))
    for version in range(start, start + 15):
        with approvals.deciding():
            decide(approvals, version)


def test_processes_take_turns(history, signer, tmp_path):
    url = f"sqlite:///{tmp_path / 'approvals.db'}"
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_append_many, args=(url, tmp_path / "approvals.pem", start)) for start in (100, 200, 300)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert history.verify(TrustedKeys([signer.public])) == 45
    assert len({row["version"] for row in history.history("desk")}) == 45


def rows(*steps):
    return [dict(zip(("version", "kind", "from", "to"), step, strict=True)) for step in steps]


def live_and_previous(*steps):
    now = standing(rows(*steps))
    return (now.live["version"] if now.live else None, now.previous["version"] if now.previous else None)


UP = ("promote", "Staging", "Production")
BACK = ("rollback", "Archived", "Production")


@pytest.mark.parametrize(
    ("steps", "live", "previous"),
    [
        ([], None, None),
        ([(1, *UP)], 1, None),
        ([(1, *UP), (2, *UP), (3, *UP)], 3, 2),
        ([(1, *UP), (2, *UP), (3, *UP), (2, *BACK)], 2, 1),
        ([(1, *UP), (2, *UP), (3, *UP), (2, *BACK), (1, *BACK)], 1, None),
        ([(1, *UP), (2, *UP), (1, *BACK), (2, *BACK)], 2, 1),
        ([(1, *UP), (2, "reject", "Staging", "Archived")], 1, None),
        ([(1, *UP), (2, *UP), (2, "rollback", "Production", "Archived")], None, 2),
        # A promotion that never reached MLflow leaves everything as it was, whatever it had taken off the stack.
        ([(1, *UP), (2, *UP), (3, *UP), (1, *BACK), (1, "reject", "Production", "Archived")], 3, 2),
    ],
)
def test_what_the_decisions_add_up_to(steps, live, previous):
    assert live_and_previous(*steps) == (live, previous)


def test_a_version_that_was_live_once_stays_known_as_approved():
    now = standing(rows((1, *UP), (2, *UP), (1, *BACK)))
    assert set(now.approved) == {1, 2}
