"""The auditor's question: what was spent on whose data, under which guarantee, and how is it proved?

Three answers: verify what is here, export it for somebody else, verify what somebody else exported.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cycle import require_whole_ledger
from tidegate.planning import register_blocks

if TYPE_CHECKING:
    from privacy.export import Evidence, Papers, Value
    from privacy.ledger import LedgerRow
    from privacy.verify import Report
    from registry.states import ModelVersion
    from tidegate.wiring import Service

ROUND_FILE = "round.json"


def examine(service: Service, stream: str | None) -> dict[str, Any]:
    """Verify ledger, receipts, anchors and approvals, then recompute every block's spending.

    Returns:
        `verified` (lines), `rounds` (which were made by the code installed here), `streams` (by name).

    Raises:
        UnknownName: no such stream.
        PrivacyError, RegistryError: the first thing whose hash or signature does not match.
    """
    from privacy.audit import audit

    names = [stream] if stream else list(service.settings.streams)
    for name in names:
        service.stream(name)
        repo = service.repository()
        register_blocks(service, name, repo.pin(name))
    found = anchors(service)  # before the ledger: what they name must be there by then
    verified = [f"ledger: hash chain of {service.ledger.verify_chain()} rows, head {service.ledger.head()[:16]}"]
    receipts = require_whole_ledger(service)
    verified.append(f"receipts: {receipts} signatures, each anchored in the ledger's chain")
    approvals = service.approvals()
    verified.append(f"approvals: {approvals.verify(service.trusted('approvals'))} signatures and their hash chain")
    _require_anchors(service, found)
    verified.append(f"anchors: the heads that {len(found)} commits of the data repository name are in the chains")
    rounds = _made_by(service, names)
    same = sum(row["installed_code"] for row in rounds)
    verified.append(f"code: {same} of {len(rounds)} rounds were made by the code installed here")
    return {
        "verified": verified,
        "rounds": rounds,
        "streams": {name: audit(service.ledger, name).as_json() for name in names},
    }


def export(service: Service, folder: Path) -> tuple[Report, bool]:
    """Write an export that has verified; returns what was found, and whether anything was written.

    Raises:
        ExportBroken: something does not match, or the folder holds other things.
        SignatureError: the receipts' private key is not here; it signs the manifest.
        RegistryUnavailable: MLflow does not answer: its versions are part of an export.
    """
    from privacy.case import GivenKey
    from privacy.export import may_replace, write
    from privacy.rotation import PURPOSES, known_keys
    from privacy.signing import SigningKey
    from privacy.verify import make, verify

    target = folder.absolute()
    may_replace(target)
    signer = SigningKey.load_existing(service.keys_dir / "receipts.pem")
    keys = [GivenKey(p, key.public.fingerprint) for p in PURPOSES for key in known_keys(service.keys_dir, p)]
    files = make(gather(service), signer)
    report = verify(files, keys, installed_code=installed_code())
    return report, write(target, files)


def check(folder: Path, keys: Sequence[str], expect_heads: Sequence[str]) -> Report:
    """Verify an export with nothing but the folder and these keys.

    Raises:
        ExportBroken: the first thing that does not match.
        SignatureError: a key is neither a PEM file nor a fingerprint.
    """
    from privacy.case import GivenKey
    from privacy.verify import verify_folder

    given = [GivenKey.parse(key) for key in keys]
    return verify_folder(folder, given, expect_heads=expect_heads, installed_code=installed_code())


def installed_code() -> str:
    """Hash of the code installed here, as a plan records it; empty where the learner is not installed."""
    try:
        from learner.plan import code_sha256
    except ImportError:
        return ""
    return code_sha256()


def anchors(service: Service) -> list[Value]:
    """Heads that commits of the data repository name, oldest first.

    A round recorded before heads stood in `round.json` has the ledger's in its receipt, which is in the same commit.
    """
    from privacy.ledger import GENESIS

    repo, found = service.repository(), []
    for commit, content in repo.committed_files(ROUND_FILE):
        named = json.loads(content)
        if "ledger_head" not in named:
            receipt = repo.committed_file(f"rounds/{named['round_id']}/receipt.json", commit)
            named["ledger_head"] = json.loads(receipt or b"{}").get("ledger_head", GENESIS)
        found.append(
            {
                "commit": commit,
                "round_id": named["round_id"],
                "adapter_sha256": named["adapter_sha256"],
                "ledger_head": named["ledger_head"],
                "approvals_head": named.get("approvals_head", GENESIS),
            }
        )
    return found


def _require_anchors(service: Service, found: Sequence[Value]) -> None:
    from privacy.canonical import sha256_of
    from privacy.errors import LedgerBehindReceipt
    from privacy.ledger import GENESIS

    chains = {
        "ledger_head": {GENESIS, *(row.hash for row in service.ledger.rows())},
        "approvals_head": {GENESIS, *(sha256_of(signed) for signed in service.approvals().history())},
    }
    for anchor in found:
        for name, known in chains.items():
            if anchor[name] not in known:
                raise LedgerBehindReceipt(
                    f"commit {anchor['commit'][:12]} of the data repository: {name}={anchor[name][:16]} is not in the "
                    f"chain: an older backup was restored; restore the newest one before any round"
                )


def gather(service: Service) -> Evidence:
    """Everything an export holds. What names a place in a chain is read before that chain, which only grows.

    Raises:
        RegistryUnavailable: MLflow does not answer.
        LedgerBroken: a chain does not verify.
    """
    from privacy.export import Evidence, key_entry
    from privacy.rotation import PURPOSES, known_keys, rotations

    keys = tuple(key_entry(key) for purpose in PURPOSES for key in known_keys(service.keys_dir, purpose))
    statements = tuple(dict(r.signed) for purpose in PURPOSES for r in rotations(service.keys_dir, purpose))
    commits = tuple(anchors(service))
    models = [service.model(stream) for stream in service.settings.streams]
    versions = tuple(_version(service, model, v) for model in models for v in _oldest_first(service, model))
    approvals = tuple(service.approvals().history())
    rows = tuple(service.ledger.rows())
    return Evidence(
        blocks=service.ledger.snapshot(next(iter(service.settings.streams))).history.blocks,
        rows=rows,
        rounds=_rounds(service, rows),
        approvals=approvals,
        versions=versions,
        anchors=commits,
        keys=keys,
        rotations=statements,
    )


def _oldest_first(service: Service, model: str) -> list[ModelVersion]:
    return sorted(service.store.versions(model), key=lambda version: version.version)


def _version(service: Service, model: str, version: ModelVersion) -> Value:
    """A version as the registry has it. Tags that are not Tidegate's own may hold anything, so they stay here."""
    from registry.states import TAG

    return {
        "model": model,
        "version": version.version,
        "stage": version.stage,
        "created_at": version.created_at,
        "aliases": sorted(version.aliases),
        "tags": {name: value for name, value in version.tags.items() if name.startswith(TAG)},
        "stored_sha256": stored_sha256(service, model, version.version),
    }


def stored_sha256(service: Service, model: str, version: int) -> str | None:
    """What the artifact store really holds; None where it cannot be read."""
    from learner.adapter import adapter_sha256
    from learner.errors import AdapterError
    from registry.errors import RegistryError, RegistryUnavailable

    with tempfile.TemporaryDirectory() as folder:
        try:
            return adapter_sha256(service.store.fetch_adapter(model, version, Path(folder) / "adapter"))
        except RegistryUnavailable:
            raise
        except (RegistryError, AdapterError):
            return None


def _rounds(service: Service, rows: Sequence[LedgerRow]) -> dict[str, Papers]:
    """Papers of the committed rounds: from the workspace, else from the data repository, which has them too."""
    from privacy.export import Papers
    from privacy.policy import TRAIN

    found = {}
    for row in rows:
        if row.state == "committed" and row.account == TRAIN:
            plan, receipt, verdict = (_paper(service, row.round_id, name) for name in ("plan", "receipt", "verdict"))
            # One without a receipt is a round that has just ended or was lost: verification says what to do.
            if plan is not None and receipt is not None:
                found[row.round_id] = Papers(plan, receipt, verdict)
    return found


def _paper(service: Service, round_id: str, name: str) -> Value | None:
    file = service.workspace.rounds(round_id) / f"{name}.json"
    content: bytes | None
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        content = service.repository().committed_file(f"rounds/{round_id}/{name}.json")
    return None if content is None else dict(json.loads(content))


def _made_by(service: Service, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per committed round, whether its plan names the code that is installed now, and when its weights were pruned."""
    from tidegate.pruning import note

    installed, found = installed_code(), []
    rows = [row for name in names for row in service.ledger.rows(name)]
    for round_id, papers in _rounds(service, rows).items():
        code = str(papers.plan["code_sha256"])
        gone = note(service.workspace.root, str(papers.receipt["adapter_sha256"]))
        found.append(
            {
                "stream": papers.plan["stream"],
                "round_id": round_id,
                "attempt": papers.plan["attempt"],
                "code_sha256": code,
                "installed_code": code == installed,
                "pruned": gone["at"] if gone else "",
            }
        )
    return found
