"""An export for an auditor: what the proof rests on, as plain files of canonical JSON (RFC 8785), a value a line.

    MANIFEST.json               sha256 of every other file, signed by the receipts' key
    STATEMENT.md                the guarantee in words, generated from what was verified
    ledger/blocks.jsonl         sealed blocks with their frozen policies, chained
    ledger/rows.jsonl           steps of rounds with their charges, chained
    rounds/ID/plan.json         what a committed round was to do; receipt.json, verdict.json: signed
    approvals.jsonl             who moved which version: signed, chained
    versions.jsonl              versions as the registry has them
    anchors.jsonl               commits of the data repository that name a ledger head
    keys/keys.jsonl             public keys; keys/rotations.jsonl: statements by which one introduced the next

Nothing in it was counted on private records: no accepted counts, no content, no hash of a private file.
This file knows the layout; what must hold between the files is in `privacy/verify.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from privacy.canonical import canonical
from privacy.chain import BlockRow, Charge, LedgerRow
from privacy.errors import ExportBroken, PrivacyError
from privacy.rotation import KnownKey
from privacy.signing import SigningKey

FORMAT = 1
KIND = "tidegate export"
MANIFEST = "MANIFEST.json"
STATEMENT = "STATEMENT.md"
BLOCKS = "ledger/blocks.jsonl"
ROWS = "ledger/rows.jsonl"
APPROVALS = "approvals.jsonl"
VERSIONS = "versions.jsonl"
ANCHORS = "anchors.jsonl"
KEYS = "keys/keys.jsonl"
ROTATIONS = "keys/rotations.jsonl"
PAPERS = ("plan", "receipt", "verdict")
_TABLES = (BLOCKS, ROWS, APPROVALS, VERSIONS, ANCHORS, KEYS, ROTATIONS)
_PAPER = re.compile(r"rounds/(?P<round>[^/]+)/(?P<paper>plan|receipt|verdict)\.json")
_SAFE = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")

Value = dict[str, Any]
# What a line of a table without a signature must have, and nothing else: name to type.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    VERSIONS: {
        "model": str,
        "version": int,
        "stage": str,
        "created_at": str,
        "aliases": list,
        "tags": dict,
        "stored_sha256": (str, type(None)),
    },
    ANCHORS: dict.fromkeys(("commit", "round_id", "adapter_sha256", "ledger_head", "approvals_head"), str),
    KEYS: dict.fromkeys(("purpose", "key_id", "fingerprint", "public", "valid_from", "valid_until"), str),
}
TAG = "tidegate."


@dataclass(frozen=True)
class Papers:
    """What a committed round left: its plan, its signed receipt, its signed verdict (None: not judged yet)."""

    plan: Value
    receipt: Value
    verdict: Value | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything an export holds.

    Attributes:
        blocks: the blocks' chain, oldest first.
        rows: the rounds' chain, oldest first.
        rounds: papers of each committed round, by its id.
        approvals: signed decisions, oldest first.
        versions: {model, version, stage, created_at, aliases, tags, stored_sha256}; the last is None where the adapter
            could not be read from the registry.
        anchors: {commit, round_id, adapter_sha256, ledger_head, approvals_head}, oldest first.
        keys: {purpose, key_id, fingerprint, public, valid_from, valid_until}.
        rotations: signed statements, by purpose, oldest first.
    """

    blocks: tuple[BlockRow, ...]
    rows: tuple[LedgerRow, ...]
    rounds: Mapping[str, Papers]
    approvals: tuple[Value, ...]
    versions: tuple[Value, ...]
    anchors: tuple[Value, ...]
    keys: tuple[Value, ...]
    rotations: tuple[Value, ...]


def key_entry(key: KnownKey) -> Value:
    """A line of `keys/keys.jsonl`."""
    return {
        "purpose": key.purpose,
        "key_id": key.public.key_id,
        "fingerprint": key.public.fingerprint,
        "public": key.public.raw.hex(),
        "valid_from": key.valid_from,
        "valid_until": key.valid_until,
    }


def files_of(evidence: Evidence) -> dict[str, bytes]:
    """The files without statement and manifest, by path.

    Raises:
        ExportBroken: a round's id cannot be the name of a folder.
    """
    files = {
        BLOCKS: _lines(map(asdict, evidence.blocks)),
        ROWS: _lines(map(asdict, evidence.rows)),
        APPROVALS: _lines(evidence.approvals),
        VERSIONS: _lines(evidence.versions),
        ANCHORS: _lines(evidence.anchors),
        KEYS: _lines(evidence.keys),
        ROTATIONS: _lines(evidence.rotations),
    }
    for round_id, papers in evidence.rounds.items():
        if not _SAFE.match(round_id) or round_id in {".", ".."}:
            raise ExportBroken(f"round={round_id}: must be letters, digits, dots, dashes; it names a folder")
        for name in PAPERS:
            value = getattr(papers, name)
            if value is not None:
                files[f"rounds/{round_id}/{name}.json"] = canonical(value) + b"\n"
    return files


def seal(files: Mapping[str, bytes], signer: SigningKey) -> dict[str, bytes]:
    """The files with their manifest: whoever changes one without the receipts' key is found out."""
    sums = {path: sha256(content).hexdigest() for path, content in files.items() if path != MANIFEST}
    signed = signer.sign({"kind": KIND, "format": FORMAT, "files": sums})
    return {**files, MANIFEST: canonical(signed) + b"\n"}


def unseal(files: Mapping[str, bytes]) -> Value:
    """The signed manifest of files that are what it says; its signature is not looked at here.

    Raises:
        ExportBroken: a file is missing, is not named, or differs.
    """
    if MANIFEST not in files:
        raise ExportBroken(f"{MANIFEST}: is missing; this is no export, or not the whole of one")
    signed = _value(MANIFEST, 1, files[MANIFEST].removesuffix(b"\n"))
    if files[MANIFEST] != canonical(signed) + b"\n" or signed.get("kind") != KIND or signed.get("format") != FORMAT:
        raise ExportBroken(
            f"{MANIFEST} line 1: kind={signed.get('kind')}, format={signed.get('format')}: must be {KIND}, {FORMAT}, "
            f"as it was written; verify it with the Tidegate that wrote it"
        )
    sums = signed.get("files")
    if not isinstance(sums, dict):
        raise ExportBroken(f"{MANIFEST} line 1: names no files; ask for the export again")
    for path in sorted(sums.keys() | (files.keys() - {MANIFEST})):
        if path not in files:
            raise ExportBroken(f"{path}: is missing, the manifest names it; ask for the whole export")
        if path not in sums:
            raise ExportBroken(f"{path}: is not in the manifest; remove it if you put it there, else ask for another")
        found = sha256(files[path]).hexdigest()
        if found != sums[path]:
            raise ExportBroken(f"{path}: sha256 is {found}, the manifest says {sums[path]}; it was changed: ask again")
    return signed


def read(files: Mapping[str, bytes]) -> Evidence:
    """What the files hold, each line in its canonical form.

    Raises:
        ExportBroken: names the first file and line that is not what an export has there.
    """
    tables = {path: _table(path, files) for path in _TABLES}
    for path, fields in _FIELDS.items():
        for at, value in enumerate(tables[path], start=1):
            _shaped(path, at, value, fields)
    papers: dict[str, Value] = {}
    for path in sorted(set(files) - set(_TABLES) - {MANIFEST, STATEMENT}):
        found = _PAPER.fullmatch(path)
        if found is None or not _SAFE.match(found["round"]):
            raise ExportBroken(f"{path}: no such file belongs to an export; remove it")
        only = _table(path, files)
        if len(only) != 1:
            raise ExportBroken(f"{path}: holds {len(only)} lines, must be one")
        papers.setdefault(found["round"], {})[found["paper"]] = only[0]
    rounds = {}
    for round_id, named in papers.items():
        if missing := {"plan", "receipt"} - named.keys():
            raise ExportBroken(f"rounds/{round_id}/{min(missing)}.json: is missing; ask for the whole export")
        rounds[round_id] = Papers(**named)
    return Evidence(
        blocks=tuple(_row(BLOCKS, at, BlockRow, value) for at, value in enumerate(tables[BLOCKS], start=1)),
        rows=tuple(_row(ROWS, at, _ledger_row, value) for at, value in enumerate(tables[ROWS], start=1)),
        rounds=rounds,
        approvals=tuple(tables[APPROVALS]),
        versions=tuple(tables[VERSIONS]),
        anchors=tuple(tables[ANCHORS]),
        keys=tuple(tables[KEYS]),
        rotations=tuple(tables[ROTATIONS]),
    )


def load(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there.

    Raises:
        ExportBroken: no such folder, or something in it is no plain file.
    """
    if not folder.is_dir():
        raise ExportBroken(f"{folder}: no such folder; name the one that `tidegate audit --export` wrote")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ExportBroken(f"{name}: must be a plain file; remove it")
        if path.is_file():
            try:
                files[name] = path.read_bytes()
            except OSError as error:
                raise ExportBroken(f"{name}: cannot be read: {error.strerror}") from None
    return files


def may_replace(folder: Path) -> None:
    """Insist that nothing else is lost when an export takes the place of `folder`.

    Raises:
        ExportBroken: it is a file, or holds what no export wrote.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ExportBroken(f"{folder}: must be a folder; choose a new one")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        unseal(load(folder))
    except ExportBroken as error:
        raise ExportBroken(f"{folder}: is not empty and holds no whole export ({error}); choose a new folder") from None


def write(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Put an export into place whole; False when it was there already, byte for byte.

    It is written beside and renamed. Between the two renames that replace an older export, a power cut may leave the
    older one under a name that ends with `.old`, and none in its place.

    Raises:
        ExportBroken: the folder holds other things, or cannot be written.
    """
    may_replace(folder)
    if folder.exists() and load(folder) == dict(files):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
        try:
            beside.chmod(0o755)
            for path, content in files.items():
                _write_synced(beside / path, content)
            _put(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise ExportBroken(f"{folder}: cannot be written: {error.strerror}; choose another folder") from None
    return True


def _put(beside: Path, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        old = beside.with_suffix(".old")
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        beside.rename(folder)  # an empty folder gives way


def _write_synced(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _lines(values: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(canonical(_plain(value)) + b"\n" for value in values)


def _plain(value: Any) -> Any:
    """Tuples as lists, for the encoder."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _table(path: str, files: Mapping[str, bytes]) -> list[Value]:
    if path not in files:
        raise ExportBroken(f"{path}: is missing; ask for the whole export")
    content = files[path]
    if content and not content.endswith(b"\n"):
        raise ExportBroken(f"{path}: its last line has no end; it was cut off: ask for the whole export")
    return [_value(path, at, line) for at, line in enumerate(content.split(b"\n")[:-1], start=1)]


def _value(path: str, at: int, line: bytes) -> Value:
    try:
        value = json.loads(line)
        same = isinstance(value, dict) and canonical(value) == line
    except (ValueError, RecursionError, PrivacyError):
        same = False
    if not same:
        raise ExportBroken(f"{path} line {at}: must be one JSON object in canonical form; it was changed: ask again")
    return dict(value)


def _shaped(path: str, at: int, value: Value, fields: Mapping[str, Any]) -> None:
    whole = value.keys() == fields.keys() and all(isinstance(value[name], kind) for name, kind in fields.items())
    texts = [*value.get("tags", {}), *value.get("tags", {}).values(), *value.get("aliases", ())] if whole else []
    if not whole or not all(isinstance(text, str) for text in texts):
        raise ExportBroken(
            f"{path} line {at}: must have {', '.join(fields)}, each of its type; it was changed: ask again"
        )
    if any(not name.startswith(TAG) for name in value.get("tags", ())):
        raise ExportBroken(f"{path} line {at}: must have tags that begin with {TAG} alone; it was changed: ask again")


def _row(path: str, at: int, make: Any, value: Value) -> Any:
    try:
        return make(**value)
    except (TypeError, PrivacyError) as error:
        raise ExportBroken(f"{path} line {at}: is no row of a ledger ({error}); it was changed: ask again") from None


def _ledger_row(*, charges: Sequence[Mapping[str, Any]], **fields: Any) -> LedgerRow:
    return LedgerRow(charges=tuple(Charge(**charge) for charge in charges), **fields)
