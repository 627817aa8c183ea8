"""A key is changed: what it signed before counts, what it signs later does not, and no crash leaves two or none."""

import json
import os
from pathlib import Path

import pytest

from privacy import rotation
from privacy.errors import SignatureError
from privacy.rotation import known_keys, rotate, rotations
from privacy.signing import KeyFile, PublicKey, SigningKey, TrustedKeys

HEADS = {"ledger_head": "1" * 64, "approvals_head": "2" * 64}


@pytest.fixture
def keys(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir()
    SigningKey.load_or_create(folder / "verdicts.pem")
    return folder


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_new_key_is_introduced_by_the_old_one(keys):
    old = SigningKey.load_or_create(keys / "verdicts.pem")
    before = old.sign({"made_at": "2026-01-01T00:00:00Z"})
    made = rotate(keys, "verdicts", at="2026-01-02T00:00:00Z", **HEADS)
    new = SigningKey.load_or_create(keys / "verdicts.pem")
    assert made.old_key_id == old.key_id
    assert made.new_public == new.public != old.public
    trusted = TrustedKeys.from_dir(keys, "verdicts")
    assert trusted.verify(before)
    assert trusted.verify(new.sign({"made_at": "2026-01-03T00:00:00Z"}))
    with pytest.raises(SignatureError, match="was retired at 2026-01-02"):
        trusted.verify(old.sign({"made_at": "2026-01-02T00:00:01Z"}))
    first, second = known_keys(keys, "verdicts")
    assert (first.public, first.valid_from, first.valid_until) == (old.public, "", "2026-01-02T00:00:00Z")
    assert (second.public, second.valid_from, second.valid_until) == (new.public, "2026-01-02T00:00:00Z", "")


def test_the_old_private_key_is_gone_and_the_new_one_private(keys):
    old = (keys / "verdicts.pem").read_bytes()
    again = keys.parent / "copy-of-the-inode"
    os.link(keys / "verdicts.pem", again)
    rotate(keys, "verdicts", **HEADS)
    assert files(keys) == {"verdicts.pem", "verdicts.pub", "verdicts.rotations.jsonl"} | {
        f"verdicts-{known_keys(keys, 'verdicts')[0].public.key_id}.pub"
    }
    assert (keys / "verdicts.pem").stat().st_mode & 0o777 == 0o600
    assert again.read_bytes() == b"\0" * len(old), "overwritten, not only unlinked"


def test_keys_change_more_than_once_and_purposes_stay_apart(keys):
    SigningKey.load_or_create(keys / "receipts.pem")
    first = SigningKey.load_or_create(keys / "verdicts.pem").key_id
    ids = [first, *(rotate(keys, "verdicts", **HEADS).new_public.key_id for _ in range(3))]
    assert known_keys(keys, "verdicts")[0].public.key_id == ids[0]
    assert [r.old_key_id for r in rotations(keys, "verdicts")] == ids[:-1]
    assert len(known_keys(keys, "receipts")) == 1
    with pytest.raises(SignatureError, match="not trusted"):
        TrustedKeys.from_dir(keys, "receipts").verify(SigningKey.load_or_create(keys / "verdicts.pem").sign({"x": 1}))


def test_a_process_that_lives_on_signs_with_the_new_key(keys):
    signer = KeyFile(keys / "verdicts.pem")
    before = signer.sign({"x": 1})["key_id"]
    made = rotate(keys, "verdicts", **HEADS)
    assert before == made.old_key_id
    assert signer.sign({"x": 1})["key_id"] == made.new_public.key_id


def test_a_server_that_runs_on_knows_of_a_rotation(keys):
    trusted = TrustedKeys.from_dir(keys, "verdicts")
    old = SigningKey.load_or_create(keys / "verdicts.pem")
    rotate(keys, "verdicts", at="2026-01-02T00:00:00Z", **HEADS)
    assert trusted.verify(SigningKey.load_or_create(keys / "verdicts.pem").sign({"x": 1})) == {"x": 1}
    with pytest.raises(SignatureError, match="was retired"):
        trusted.verify(old.sign({"made_at": "2026-01-03T00:00:00Z"}))
    keys.rename(keys.parent / "unmounted")
    assert trusted.verify(old.sign({"made_at": "2026-01-01T00:00:00Z"})), "what is known stays known"


def test_a_key_that_is_kept_elsewhere_is_not_made_anew(keys):
    (keys / "verdicts.pem").rename(keys.parent / "elsewhere.pem")
    with pytest.raises(SignatureError, match="only its public half"):
        KeyFile(keys / "verdicts.pem").sign({"x": 1})
    assert files(keys) == {"verdicts.pub"}
    assert len(known_keys(keys, "verdicts")) == 1


@pytest.mark.parametrize("change", ["drop", "swap", "forge", "torn", "stranger"])
def test_statements_that_do_not_hold_are_refused(keys, tmp_path, change):
    for _ in range(2):
        rotate(keys, "verdicts", **HEADS)
    file = keys / "verdicts.rotations.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    stranger = SigningKey.load_or_create(tmp_path / "stranger.pem")
    body = {k: v for k, v in second.items() if k not in {"key_id", "signature"}}
    lines = {
        "drop": [second],
        "swap": [second, first],
        "forge": [first, {**second, "at": "2020-01-01T00:00:00Z"}],
        "torn": [first, "{"],
        "stranger": [first, stranger.sign(body)],
    }[change]
    file.write_text("".join((line if line == "{" else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(SignatureError, match=r"verdicts\.rotations\.jsonl"):
        TrustedKeys.from_dir(keys, "verdicts")


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("step", ["create", "old public", "statement", "link", "rename", "new public", "erase"])
def test_a_stopped_rotation_is_finished_by_the_next(keys, monkeypatch, step):
    old = SigningKey.load_or_create(keys / "verdicts.pem").key_id
    whole, calls = SigningKey.write_public, []

    def die(*_arguments, **_options):
        raise Killed

    def die_at(number):
        def write(self, path):
            calls.append(path)
            if len(calls) == number:
                raise Killed
            whole(self, path)

        return write

    where = {
        "create": (SigningKey, "create", die),
        "old public": (SigningKey, "write_public", die_at(1)),
        "statement": (rotation, "write_whole", die),
        "link": (rotation.os, "link", die),
        "rename": (Path, "replace", None),
        "new public": (SigningKey, "write_public", die_at(2)),
        "erase": (rotation, "_erase", die),
    }
    target, name, fault = where[step]
    if step == "rename":
        real = Path.replace

        def fault(self, target):
            if self.name == "verdicts.next.pem":
                raise Killed
            return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fault)
        with pytest.raises(Killed):
            rotate(keys, "verdicts", **HEADS)
    # Whatever was signed in between counts.
    signed = SigningKey.load_or_create(keys / "verdicts.pem").sign({"x": 1})
    assert TrustedKeys.from_dir(keys, "verdicts").verify(signed) == {"x": 1}
    made = rotate(keys, "verdicts", **HEADS)
    assert (made.seq, made.old_key_id) == (1, old)
    assert SigningKey.load_or_create(keys / "verdicts.pem").public == made.new_public
    assert files(keys) == {"verdicts.pem", "verdicts.pub", "verdicts.rotations.jsonl", f"verdicts-{old}.pub"}
    assert rotate(keys, "verdicts", **HEADS).seq == 2


def test_files_of_two_backups_are_refused(keys):
    old = (keys / "verdicts.pem").read_bytes()
    rotate(keys, "verdicts", **HEADS)
    (keys / "verdicts.pem").write_bytes(old)
    with pytest.raises(SignatureError, match="must be"):
        rotate(keys, "verdicts", **HEADS)


def test_wrong_input_is_named(keys, tmp_path):
    with pytest.raises(SignatureError, match="purpose=answers: must be one of receipts, verdicts, approvals"):
        rotate(keys, "answers", **HEADS)
    with pytest.raises(SignatureError, match=r"receipts\.pem: no such key"):
        rotate(keys, "receipts", **HEADS)
    with pytest.raises(SignatureError, match=r"service\.keys\.directory"):
        rotate(tmp_path / "nowhere", "receipts", **HEADS)
    for text in ("zz", "ab" * 31, None, "AB" * 32, " " + "ab" * 32):
        with pytest.raises(SignatureError, match="public key="):
            PublicKey.from_hex(text)


def test_a_fingerprint_names_one_key_and_pem_reads_back(keys, tmp_path):
    key = SigningKey.load_or_create(keys / "verdicts.pem").public
    (tmp_path / "sent.pem").write_text(key.pem)
    assert PublicKey.load(tmp_path / "sent.pem") == key == PublicKey.from_hex(key.raw.hex())
    assert key.fingerprint.startswith(key.key_id)
    assert len(key.fingerprint) == 64
