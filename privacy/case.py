"""An auditor's case: the evidence, whom to believe, and where things stand in the chains.

Trust starts at the keys that the auditor got by another way, and goes on by the signed statements in which one key
introduces the next. What a retired key signed counts up to the places in both chains that its statement names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy import chain
from privacy.canonical import sha256_of
from privacy.chain import GENESIS
from privacy.errors import ExportBroken, LedgerBroken, SignatureError
from privacy.export import APPROVALS, BLOCKS, KEYS, ROTATIONS, ROWS, Evidence, Value
from privacy.rotation import PURPOSES
from privacy.signing import KEY_ID_HEX, PublicKey, Rotation, checked, read_rotations

ASK = "ask the operator for the export again, and why it differs"
_FINGERPRINT = re.compile(rf"[0-9a-f]{{{KEY_ID_HEX}}}|[0-9a-f]{{64}}")


@dataclass(frozen=True)
class GivenKey:
    """A public key that the auditor got by another way; with a purpose it counts for that one alone.

    Args:
        purpose: receipts, verdicts or approvals; empty: for what the export says.
        fingerprint: the SHA-256 of the raw key, or its first 16 digits (the key id), lower-case hex.
    """

    purpose: str
    fingerprint: str

    @classmethod
    def parse(cls, text: str) -> GivenKey:
        """From `[PURPOSE=]FILE`, a PEM file, or `[PURPOSE=]HEX`.

        Raises:
            SignatureError: it is neither.
        """
        purpose, equals, rest = text.partition("=")
        if not equals or purpose not in PURPOSES:
            purpose, rest = "", text
        found = rest if _FINGERPRINT.fullmatch(rest) else PublicKey.load(Path(rest)).fingerprint
        return cls(purpose, found)

    def is_for(self, purpose: str, public: PublicKey) -> bool:
        """Whether this names that key, for that purpose."""
        return self.purpose in {"", purpose} and public.fingerprint.startswith(self.fingerprint)


@dataclass
class Case:
    """The evidence and what was found out about it so far.

    Attributes:
        trusted: by purpose, public keys by id.
        retired: by purpose and key id, the statement that retired it.
        ledger: position of each hash in the rounds' chain, 0 for the beginning.
        approvals: position of each hash in the approvals' chain.
        verified: a line for each kind of thing that holds.
        not_checked: a line each, with the reason.
    """

    evidence: Evidence
    trusted: dict[str, dict[str, PublicKey]] = field(default_factory=dict)
    retired: dict[tuple[str, str], Rotation] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)
    approvals: dict[str, int] = field(default_factory=dict)
    verified: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def signed(self, purpose: str, value: Any, where: str, made_at_row: int | None = None) -> Value:
        """The payload of a signed value.

        `made_at_row`: the ledger's row before which nobody can have made it, for keys that are retired.
        """
        try:
            body = checked(value, self.trusted.get(purpose, {}))
        except SignatureError as error:
            raise ExportBroken(
                f"{where}: {error}; give the key of {purpose} by --key if you have it by another way, else {ASK}"
            ) from None
        limit = self.retired.get((purpose, value["key_id"]))
        if limit and made_at_row is not None and made_at_row > self.ledger[limit.ledger_head]:
            raise ExportBroken(
                f"{where}: signed by {value['key_id']} about ledger row {made_at_row}, but that key was retired at row "
                f"{self.ledger[limit.ledger_head]}; must be signed by {limit.new_public.key_id}: {ASK}"
            )
        return body


def open_case(evidence: Evidence, keys: Sequence[GivenKey]) -> Case:
    """Decide whom to believe and verify both chains.

    Raises:
        ExportBroken: the first thing that does not match.
    """
    case = Case(evidence)
    _keys(case, keys)
    _chains(case)
    _limits(case)
    return case


def _keys(case: Case, given: Sequence[GivenKey]) -> None:
    """Trust what was given, and what those keys introduced."""
    entries = case.evidence.keys
    untyped = set()
    for at, entry in enumerate(entries, start=1):
        public, purpose = PublicKey.from_hex(entry["public"]), str(entry["purpose"])
        if (entry["key_id"], entry["fingerprint"]) != (public.key_id, public.fingerprint) or purpose not in PURPOSES:
            raise ExportBroken(f"{KEYS} line {at}: its id or purpose is not that of the key beside it; {ASK}")
        for key in given:
            if key.is_for(purpose, public):
                case.trusted.setdefault(purpose, {})[public.key_id] = public
                untyped |= set() if key.purpose else {public.key_id}
    for purpose in PURPOSES:
        _introduced(case, purpose)
    _validity(case)
    ids = {name for trusted in case.trusted.values() for name in trusted}
    listed = {PublicKey.from_hex(entry["public"]).fingerprint for entry in entries}
    case.verified.append(f"keys: {len(ids)} trusted, by --key or by the signed statement of one that is")
    for key in given:
        if not any(fingerprint.startswith(key.fingerprint) for fingerprint in listed):
            case.not_checked.append(f"--key {key.fingerprint[:KEY_ID_HEX]}: nothing in the export is said to be its")
    if untyped:
        case.not_checked.append(
            f"what for: that {', '.join(sorted(untyped))} may sign for the purpose the export says; "
            f"--key PURPOSE=KEY binds it"
        )


def _introduced(case: Case, purpose: str) -> None:
    trusted = case.trusted.get(purpose, {})
    lines = [(at, s) for at, s in enumerate(case.evidence.rotations, start=1) if s["purpose"] == purpose]
    known = [n for n, (_, statement_) in enumerate(lines) if statement_.get("key_id") in trusted]
    if not known:
        return
    first = known[0]
    try:
        found = read_rotations([signed for _, signed in lines[first:]], trusted, first=first + 1)
    except SignatureError as error:
        raise ExportBroken(f"{ROTATIONS} line {lines[first][0]} or after, of {purpose}: {error}; {ASK}") from None
    for rotation in found:
        trusted[rotation.new_public.key_id] = rotation.new_public
        case.retired[purpose, rotation.old_key_id] = rotation


def _validity(case: Case) -> None:
    """Times in the list of keys are those of the statements."""
    since, until = {}, {}
    for signed in case.evidence.rotations:
        since[signed["purpose"], signed["new_key_id"]] = signed["at"]
        until[signed["purpose"], signed["key_id"]] = signed["at"]
    for at, entry in enumerate(case.evidence.keys, start=1):
        name = (entry["purpose"], entry["key_id"])
        expected = (since.pop(name, ""), until.pop(name, ""))
        if (entry["valid_from"], entry["valid_until"]) != expected:
            raise ExportBroken(f"{KEYS} line {at}: its validity must be {expected}, as {ROTATIONS} says; {ASK}")
    if lost := since.keys() | until.keys():
        raise ExportBroken(f"{KEYS}: key {min(lost)[1]} is missing, {ROTATIONS} names it; {ASK}")


def _chains(case: Case) -> None:
    evidence = case.evidence
    try:
        chain.verify(evidence.blocks, evidence.rows)
    except LedgerBroken as error:
        raise ExportBroken(f"{ROWS}, {BLOCKS}: a line is a row: {error}") from None
    case.ledger = {GENESIS: 0} | {row.hash: row.seq for row in evidence.rows}
    before, case.approvals = GENESIS, {GENESIS: 0}
    for at, signed in enumerate(evidence.approvals, start=1):
        if signed.get("seq") != at or signed.get("prev_hash") != before:
            raise ExportBroken(
                f"{APPROVALS} line {at}: seq={signed.get('seq')}, must be {at} and follow {before[:16]}; a line was "
                f"dropped, moved or changed: {ASK}"
            )
        before = sha256_of(signed)
        case.approvals[before] = at
    case.verified.append(
        f"ledger: hash chains of {len(evidence.rows)} rows and {len(evidence.blocks)} blocks, head "
        f"{evidence.rows[-1].hash if evidence.rows else GENESIS}"
    )


def _limits(case: Case) -> None:
    """Where keys were retired must be places in both chains."""
    for rotation in case.retired.values():
        if rotation.ledger_head not in case.ledger or rotation.approvals_head not in case.approvals:
            raise ExportBroken(
                f"{ROTATIONS}: rotation {rotation.seq} of {rotation.purpose} names heads that are in no chain; rows "
                f"were dropped, or an older backup was restored: {ASK}"
            )


def require_same(where: str, name: str, seen: object, expected: object, source: str) -> None:
    """Insist that two things are equal; the message names file, value, and where it was expected from."""
    if seen != expected:
        raise ExportBroken(f"{where}: {name} is {seen}, must be {expected} as in {source}; {ASK}")


def require_head(where: str, head: str, positions: Mapping[str, int], which: str) -> None:
    """Insist that a hash is in a chain."""
    if head not in positions:
        raise ExportBroken(
            f"{where}: head {head[:16]} is not in the {which} chain, which has {len(positions) - 1} hashes; rows were "
            f"dropped, or an older backup was restored: {ASK}"
        )
