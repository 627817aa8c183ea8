"""Changing a signing key: the old one introduces the new one, is retired, and its private half is removed.

    1. PURPOSE.next.pem                    the new key; nobody looks at it yet
    2. PURPOSE-OLDID.pub, the statement    from here on both keys are trusted
    3. PURPOSE.retired.pem, PURPOSE.pem    the old private key steps aside, the new one takes its place, in one rename
    4. PURPOSE.pub; the old private key is overwritten and removed

Stopped anywhere, the next `rotate` finishes that same rotation instead of beginning another.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from privacy.canonical import canonical
from privacy.errors import SignatureError
from privacy.signing import (
    KEY_ID_HEX,
    ROTATIONS,
    PublicKey,
    Rotation,
    SigningKey,
    load_statements,
    read_rotations,
    write_whole,
)

PURPOSES = ("receipts", "verdicts", "approvals")


@dataclass(frozen=True)
class KnownKey:
    """A public key of one purpose, and for what time it counts.

    Attributes:
        valid_from: UTC, RFC 3339; empty for the first key of a purpose.
        valid_until: when it was retired; empty for the key in use.
    """

    purpose: str
    public: PublicKey
    valid_from: str
    valid_until: str


def known_keys(folder: Path, purpose: str) -> list[KnownKey]:
    """Every public key of a purpose, oldest first.

    Raises:
        SignatureError: a file holds no Ed25519 public key, or a statement of a rotation does not hold.
    """
    found = {key.key_id: key for key in map(PublicKey.load, sorted(folder.glob(f"{purpose}*.pub")))}
    since, until = dict[str, str](), dict[str, str]()
    for rotation in rotations(folder, purpose):
        new = rotation.new_public
        found.pop(new.key_id, None)
        found[new.key_id] = new  # after the keys that came before it
        since[new.key_id] = until[rotation.old_key_id] = rotation.at
    return [KnownKey(purpose, key, since.get(name, ""), until.get(name, "")) for name, key in found.items()]


def rotations(folder: Path, purpose: str) -> list[Rotation]:
    """The statements of a purpose, oldest first, each checked against the key before it.

    Raises:
        SignatureError: one does not hold.
    """
    keys = {key.key_id: key for key in map(PublicKey.load, sorted(folder.glob(f"{purpose}*.pub")))}
    return read_rotations(load_statements(folder / f"{purpose}{ROTATIONS}"), keys)


def rotate(folder: Path, purpose: str, *, ledger_head: str, approvals_head: str, at: str | None = None) -> Rotation:
    """Give a purpose a new key, or finish a rotation that was stopped; durable when it returns.

    Args:
        folder: the folder of the keys.
        purpose: one of `PURPOSES`.
        ledger_head: where the rounds' chain stands; nobody may sign for this purpose meanwhile.
        approvals_head: where the approvals' chain stands.
        at: now when not given; UTC, RFC 3339.

    Raises:
        SignatureError: there is no key yet, or the files do not belong together.
    """
    if purpose not in PURPOSES:
        raise SignatureError(f"purpose={purpose}: must be one of {', '.join(PURPOSES)}")
    with _alone(folder):
        path, following, retired = (folder / f"{purpose}{end}" for end in (".pem", ".next.pem", ".retired.pem"))
        if not path.exists():
            raise SignatureError(f"{path}: no such key; it is made when it is first used, or by `tidegate init`")
        old = SigningKey.load_or_create(path)
        made = rotations(folder, purpose)
        newest = made[-1].new_public.key_id if made else old.key_id
        if not following.exists() and retired.exists() and newest == old.key_id and made:
            _erase(retired)
            return made[-1]
        if newest == old.key_id:
            made.append(_introduce(folder, purpose, old, following, len(made) + 1, ledger_head, approvals_head, at))
        elif not following.exists() or SigningKey.load_existing(following).key_id != newest:
            raise SignatureError(
                f"{path}: key_id={old.key_id}, but its rotations end with {newest}; restore both from one backup"
            )
        retired.unlink(missing_ok=True)
        os.link(path, retired)
        following.replace(path)
        SigningKey.load_or_create(path)  # puts the public half right
        _erase(retired)
        return made[-1]


def _introduce(
    folder: Path,
    purpose: str,
    old: SigningKey,
    following: Path,
    seq: int,
    ledger_head: str,
    approvals_head: str,
    at: str | None,
) -> Rotation:
    following.unlink(missing_ok=True)  # of a rotation that was stopped before its statement: nothing names it
    new = SigningKey.create(following)
    old.write_public(folder / f"{purpose}-{old.key_id[:KEY_ID_HEX]}.pub")
    signed = old.sign(
        {
            "kind": "rotation",
            "purpose": purpose,
            "seq": seq,
            "new_key_id": new.key_id,
            "new_public": new.public.raw.hex(),
            "at": at or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "ledger_head": ledger_head,
            "approvals_head": approvals_head,
        }
    )
    file = folder / f"{purpose}{ROTATIONS}"
    lines = [*load_statements(file), signed]
    write_whole(file, b"".join(canonical(line) + b"\n" for line in lines), mode=0o644)
    return rotations(folder, purpose)[-1]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise SignatureError(f"{folder}: cannot be opened: {error.strerror}; see service.keys.directory") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise SignatureError(f"{folder}: the key cannot be changed: {error.strerror}; is it read-only?") from None
    finally:
        os.close(handle)


def _erase(path: Path) -> None:
    """Overwrite and remove; on copy-on-write or journaling storage remains may stay (docs/privacy.md)."""
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
