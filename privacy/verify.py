"""What must hold between the files of an export: checked from the files and the auditor's own keys, and nothing else.

    keys        --key, and what those keys introduced          manifest   every file's sha256, signed
    ledger      both chains, steps in order                    spending   added up again, against caps from the policy
    rounds      plan = charges = receipt, once a round         verdicts   signed, about that adapter
    approvals   signed, chained, passed before, of what was    versions   the registry says what was signed
                live then, never of test noise; without privacy only where
                nobody of the stream had been promised any, and marked
    anchors     heads in git and the auditor's own are in the chains
    statement   says what follows from the rest

Signatures are Ed25519 (RFC 8032) over canonical JSON (RFC 8785). The first thing that does not match ends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from privacy.audit import AuditReport, recompute
from privacy.canonical import sha256_of
from privacy.case import ASK, Case, GivenKey, open_case, require_head, require_same
from privacy.chain import GENESIS, Charge, LedgerRow
from privacy.errors import ExportBroken, LedgerBroken, PolicyError, PrivacyError
from privacy.export import (
    ANCHORS,
    APPROVALS,
    BLOCKS,
    MANIFEST,
    ROWS,
    STATEMENT,
    VERSIONS,
    Evidence,
    Papers,
    Value,
    files_of,
    load,
    read,
    seal,
    unseal,
)
from privacy.policy import HOLDOUT, NONE, TRAIN, Policy
from privacy.receipts import guarantee_of
from privacy.signing import SigningKey
from privacy.statement import statement

PRODUCTION = "Production"
# Ledger, gates and registry may run on machines whose clocks differ; orders that matter stand in chains.
CLOCKS_APART_SECONDS_MAX = 60
# What may follow what; nothing comes before a reservation.
_FOLLOWS = {"reserved": None, "started": "reserved", "committed": "started", "cancelled": "reserved"}


@dataclass(frozen=True)
class Report:
    """What was found to hold, what could not be looked at, and what was spent.

    Attributes:
        verified: a line for each kind of thing.
        not_checked: a line each, with the reason.
        streams: by stream, recomputed from the rows.
        ledger_head: newest hash of the rounds' chain.
        approvals_head: newest hash of the approvals' chain.
    """

    verified: tuple[str, ...]
    not_checked: tuple[str, ...]
    streams: Mapping[str, AuditReport]
    ledger_head: str
    approvals_head: str


def make(evidence: Evidence, signer: SigningKey) -> dict[str, bytes]:
    """The files of an export: a statement of what the rows add up to, and the manifest, signed. Verify before use.

    Args:
        evidence: what goes into it.
        signer: the key of receipts in use.

    Raises:
        ExportBroken: a block has spent more than its filter, or a round's id cannot name a folder.
    """
    said = statement(evidence, _spending(Case(evidence)))
    return seal(files_of(evidence) | {STATEMENT: said.encode()}, signer)


def verify_folder(
    folder: Path, keys: Sequence[GivenKey], *, expect_heads: Sequence[str] = (), installed_code: str = ""
) -> Report:
    """Verify an export on disk; as `verify`."""
    return verify(load(folder), keys, expect_heads=expect_heads, installed_code=installed_code)


def verify(
    files: Mapping[str, bytes], keys: Sequence[GivenKey], *, expect_heads: Sequence[str] = (), installed_code: str = ""
) -> Report:
    """Verify an export, by its files.

    Args:
        files: path to content.
        keys: the auditor's own; a key inside the export is not trusted by itself.
        expect_heads: heads noted earlier; each must be in the ledger's chain or the approvals'.
        installed_code: hash of the code installed here, to compare with the plans'; empty: not compared.

    Raises:
        ExportBroken: the first thing that does not match: file, line, what was expected, what to do.
    """
    try:
        return _verify(files, keys, expect_heads, installed_code)
    except ExportBroken:
        raise
    except (PrivacyError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ExportBroken(
            f"export: a value has another shape than it must ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); {ASK}"
        ) from error


def _verify(
    files: Mapping[str, bytes], keys: Sequence[GivenKey], expect_heads: Sequence[str], installed_code: str
) -> Report:
    manifest = unseal(files)
    evidence = read(files)
    case = open_case(evidence, keys)
    case.signed("receipts", manifest, f"{MANIFEST} line 1", len(evidence.rows))
    case.verified.insert(0, f"manifest: {len(files) - 1} files are what it says, signed by {manifest['key_id']}")
    _steps(case)
    streams = _spending(case)
    _rounds(case)
    _approvals(case)
    _versions(case)
    _anchors(case, expect_heads)
    _code(case, installed_code)
    if STATEMENT not in files:
        raise ExportBroken(f"{STATEMENT}: is missing; {ASK}")
    _same_text(files[STATEMENT], statement(evidence, streams).encode())
    case.verified.append("statement: says what follows from the other files, word by word")
    case.not_checked += _never_checked(expect_heads)
    return Report(
        tuple(case.verified),
        tuple(case.not_checked),
        streams,
        evidence.rows[-1].hash if evidence.rows else GENESIS,
        sha256_of(evidence.approvals[-1]) if evidence.approvals else GENESIS,
    )


# -- ledger ----------------------------------------------------------------------------------------------------------


def _steps(case: Case) -> None:
    """Every attempt goes reserved, started, committed, or reserved, cancelled: of one plan, charged once."""
    last: dict[tuple[str, int], LedgerRow] = {}
    for row in case.evidence.rows:
        where, name = f"{ROWS} line {row.seq}", (row.round_id, row.attempt)
        before = last.get(name)
        expected = "reserved" if before is None else f"what follows {before.state}"
        if row.state not in _FOLLOWS or _FOLLOWS[row.state] != (before.state if before else None):
            raise ExportBroken(f"{where}: {row.round_id} attempt {row.attempt} is {row.state}, must be {expected}")
        kept = ("stream", "plan_hash", "noise_source", "account", "window")
        if before and any(getattr(row, name) != getattr(before, name) for name in kept):
            raise ExportBroken(f"{where}: {row.round_id} attempt {row.attempt} is not of the plan it began with; {ASK}")
        pays = row.noise_source in {"system", "test"}
        if bool(row.charges) != (row.state == "reserved" and pays) or not (pays or row.noise_source == NONE):
            raise ExportBroken(f"{where}: charges stand in reserved rows, of system or test noise; {ASK}")
        last[name] = row


def _spending(case: Case) -> dict[str, AuditReport]:
    """Add up every block's spending; each must keep an order that survives."""
    policies: dict[str, dict[str, Policy]] = {}
    for block in case.evidence.blocks:
        try:
            policy = Policy.from_frozen(json.loads(block.policy))
        except PolicyError as error:
            raise ExportBroken(f"{BLOCKS} line {block.seq}: {error}; {ASK}") from None
        policies.setdefault(block.stream, {})[block.block_id] = policy
    lines = {block.block_id: block.seq for block in case.evidence.blocks}
    streams = {}
    for name in sorted(policies.keys() | {row.stream for row in case.evidence.rows}):
        rows = [row for row in case.evidence.rows if row.stream == name]
        try:
            streams[name] = recompute(name, rows, policies.get(name, {}))
        except LedgerBroken as error:
            raise ExportBroken(f"{ROWS}: a line is a row: {error}") from None
        _windows(rows, policies.get(name, {}))
        for found in streams[name].blocks:
            for share, whose in ((found.share_used, TRAIN), (found.holdout_share_used, HOLDOUT)):
                if not share <= 1.0:
                    raise ExportBroken(
                        f"{BLOCKS} line {lines[found.block]}: block {found.block}: {whose} has used {share:.1%} of its "
                        f"filter at its best order, must be <= 100%; the promise does not hold for it"
                    )
    used = max((found.share_used_max for found in streams.values()), default=0.0)
    case.verified.append(
        f"spending: recomputed for {len(lines)} blocks from the rows, caps from each sealed policy; {used:.1%} of the "
        f"fullest filter is used"
    )
    return streams


def _windows(rows: Iterable[LedgerRow], policies: Mapping[str, Policy]) -> None:
    """Charges fall into the window of their time, and never into an earlier one than a charge before them."""
    newest: dict[str, int] = {}
    for row in rows:
        if not row.charges:
            continue
        policy = policies[row.charges[0].block_id]
        at = datetime.fromisoformat(row.at).timestamp()
        expected = max(newest.get(policy.horizon, 0), policy.window_at(at)) if policy.days else 0
        if row.window != expected or any(policies[c.block_id].horizon != policy.horizon for c in row.charges):
            raise ExportBroken(
                f"{ROWS} line {row.seq}: charged at {row.at} in window {row.window}, must be {expected} for the "
                f"horizon {policy.horizon} of all its blocks; {ASK}"
            )
        newest[policy.horizon] = expected


# -- rounds ------------------------------------------------------------------------------------------------------------


def _rounds(case: Case) -> None:
    committed = {(r.round_id, r.attempt): r for r in _of(case, TRAIN) if r.state == "committed"}
    reserved = {(r.round_id, r.attempt): r for r in _of(case, TRAIN) if r.state == "reserved"}
    policies = {block.block_id: Policy.from_frozen(json.loads(block.policy)) for block in case.evidence.blocks}
    _unprotected(case, policies, committed)
    seen = set()
    for round_id, papers in sorted(case.evidence.rounds.items()):
        name = (round_id, int(papers.plan["attempt"]))
        row = committed.get(name)
        if papers.plan.get("round_id") != round_id or row is None:
            raise ExportBroken(
                f"rounds/{round_id}/plan.json: {papers.plan.get('round_id')} attempt {name[1]} must be a committed row "
                f"of {ROWS}; rows were dropped, or the plan was changed: {ASK}"
            )
        _plan(round_id, papers.plan, row, reserved[name])
        # The plan's blocks are those of the charges, which `_plan` has compared; without privacy there are none.
        _receipt(case, round_id, papers, row, [policies[block["id"]] for block in papers.plan["blocks"]])
        if papers.verdict is None:
            case.not_checked.append(f"round {round_id}: it has no verdict yet; nothing of it may be approved")
        else:
            _verdict(case, round_id, papers, row)
        seen.add(name)
    if missing := sorted(committed.keys() - seen):
        row = committed[missing[0]]
        raise ExportBroken(
            f"{ROWS} line {row.seq}: {row.round_id} attempt {row.attempt} is committed, but rounds/{row.round_id}/ has "
            f"no plan and receipt of it; must have exactly one: wait until the round has ended, or restore rounds/"
        )
    others = sorted(reserved.keys() - seen)
    case.verified.append(
        f"rounds: {len(seen)} committed, each with one signed receipt, and a plan of that hash and those charges"
    )
    if others:
        names = ", ".join(f"{name}.{attempt}" for name, attempt in others)
        case.not_checked.append(f"plans of attempts that did not end ({names}): charged all the same, nothing released")


def _unprotected(case: Case, policies: Mapping[str, Policy], committed: Mapping[tuple[str, int], LedgerRow]) -> None:
    """Rounds without privacy touch nobody to whom something was promised: not in their blocks, not by their weights."""
    streams = {block.block_id: block.stream for block in case.evidence.blocks}
    bare = {name: row for name, row in committed.items() if row.noise_source == NONE}
    weights = {row.adapter_sha256 for row in bare.values()}
    for round_id, papers in case.evidence.rounds.items():
        where, name = f"rounds/{round_id}/plan.json", (round_id, int(papers.plan["attempt"]))
        if name not in bare and papers.plan["parent_sha256"] in weights:
            raise ExportBroken(f"{where}: was trained from an adapter without privacy, must not be; {ASK}")
        if name in bare:
            for block in papers.plan["blocks"]:
                if streams.get(block["id"]) != bare[name].stream or policies[block["id"]].enabled:
                    raise ExportBroken(
                        f"{where}: a round without privacy read block {block['id']}, to whose people something was "
                        f"promised, or which is of another stream; {ASK}"
                    )
    charged = {r.stream for r in case.evidence.rows if any(policies[c.block_id].unit == "user" for c in r.charges)}
    if both := charged & {row.stream for row in case.evidence.rows if row.noise_source == NONE}:
        raise ExportBroken(f"{ROWS}: stream {min(both)} trained users with and without privacy, must be one; {ASK}")
    if bare:
        case.verified.append(
            f"without privacy: {len(bare)} rounds charged nobody, and read only blocks whose people were promised none"
        )


def _of(case: Case, account: str) -> Iterable[LedgerRow]:
    return (row for row in case.evidence.rows if row.account == account)


def _plan(round_id: str, plan: Value, row: LedgerRow, reserved: LedgerRow) -> None:
    where = f"rounds/{round_id}/plan.json"
    require_same(where, "its hash", sha256_of(plan), row.plan_hash, f"{ROWS} line {row.seq}")
    paying = plan["blocks"] if plan["noise_source"] != NONE else ()
    charges = tuple(Charge(block["id"], block["q"], plan["sigma"], plan["steps"]) for block in paying)
    require_same(where, "charges", charges, reserved.charges, f"{ROWS} line {reserved.seq}")
    require_same(where, "stream", plan["stream"], row.stream, f"{ROWS} line {row.seq}")
    require_same(where, "noise_source", plan["noise_source"], row.noise_source, f"{ROWS} line {row.seq}")


def _receipt(case: Case, round_id: str, papers: Papers, row: LedgerRow, policies: Sequence[Policy]) -> None:
    where = f"rounds/{round_id}/receipt.json"
    body = case.signed("receipts", papers.receipt, where, row.seq)
    line = f"{ROWS} line {row.seq}"
    require_same(where, "plan_hash", body["plan_hash"], row.plan_hash, line)
    require_same(where, "adapter_sha256", body["adapter_sha256"], row.adapter_sha256, line)
    if case.ledger.get(body["ledger_head"], -1) < row.seq:
        raise ExportBroken(
            f"{where}: ledger_head={body['ledger_head'][:16]}: must be in the chain, not before line {row.seq} of "
            f"{ROWS}; rows were dropped, or an older backup was restored: {ASK}"
        )
    expected = guarantee_of(row.noise_source, policies).as_json()
    # A receipt from before there were windows has no horizon: then it was for life.
    found = {"horizon": "life", **body["guarantee"]}
    require_same(where, "guarantee", found, expected, f"the policies of its blocks in {BLOCKS}")


def _verdict(case: Case, round_id: str, papers: Papers, row: LedgerRow) -> None:
    where = f"rounds/{round_id}/verdict.json"
    body = case.signed("verdicts", papers.verdict, where, row.seq)
    require_same(where, "adapter_sha256", body["adapter_sha256"], row.adapter_sha256, f"{ROWS} line {row.seq}")
    require_same(where, "parent_sha256", body["parent_sha256"], papers.plan["parent_sha256"], "the plan")
    require_same(where, "base_sha256", body["base_sha256"], papers.plan["base_sha256"], "the plan")
    _ordered(where, "made_at", row.at, body["made_at"], f"{ROWS} line {row.seq}")
    paid = {r.round_id for r in _of(case, HOLDOUT)} - {r.round_id for r in _of(case, HOLDOUT) if r.state == "cancelled"}
    for gate in body["gates"]:
        charge = gate.get("charge_id")
        if charge is not None and charge not in paid:
            raise ExportBroken(
                f"{where}: gate {gate['name']} read the holdout as {charge}, which no row of {ROWS} paid for"
            )


# -- versions ----------------------------------------------------------------------------------------------------------


def _approvals(case: Case) -> None:
    """Signed, and at its turn: what goes live has passed against what was live then, or was live before."""
    standing: dict[str, tuple[_Live, _Live]] = {}  # by model: what is live, and what was before the newest decision
    approved: set[tuple[str, int, str]] = set()
    entries = {(v["model"], v["version"]): v for v in case.evidence.versions}
    for at, signed in enumerate(case.evidence.approvals, start=1):
        where = f"{APPROVALS} line {at}"
        body = case.signed("approvals", signed, where)
        limit = case.retired.get(("approvals", signed["key_id"]))
        if limit and at > case.approvals[limit.approvals_head]:
            raise ExportBroken(f"{where}: its key {signed['key_id']} was retired before it was signed; {ASK}")
        model, sha = body["model"], body["adapter_sha256"]
        live, before = standing.get(model, (_BASE, _BASE))
        if body["to"] == PRODUCTION or _begins_canary(body):
            entry = entries.get((model, body["version"]))
            if entry is None:
                raise ExportBroken(f"{where}: {model} version {body['version']} is not in {VERSIONS}; {ASK}")
            papers = _papers_of(case, where, entry, body)
            name = (model, body["version"], sha)
            if body["kind"] in {"promote", _CANARY}:
                _judged(where, body, papers, live[1])
            elif name not in approved:
                raise ExportBroken(f"{where}: {body['kind']} to version {name[1]}, which was never approved before it")
            if body["kind"] != _CANARY:
                approved.add(name)
        standing[model] = _after(body, live, before)
    bare = sum(body.get("guarantee") == NONE and body["to"] == PRODUCTION for body in case.evidence.approvals)
    case.verified.append(
        f"approvals: {len(case.evidence.approvals)} signed and chained; each version was judged as passed before, had "
        f"a receipt with a finite epsilon, and was trained from what was live"
        + (f"; {bare} of versions WITHOUT PRIVACY, which have no epsilon and say so" if bare else "")
    )


_CANARY = "canary"


def _begins_canary(body: Value) -> bool:
    """Whether a decision lets a candidate answer some of the requests: then it must hold as a promotion does."""
    try:
        return body["kind"] == _CANARY and bool(body["canary"]["share"])
    except (KeyError, TypeError):
        raise ExportBroken(f"{APPROVALS}: seq={body['seq']} is a canary without a share; {ASK}") from None


_Live = tuple[int, str]  # version and adapter; 0 and nothing: the bare base
_BASE: _Live = (0, "")


def _after(body: Value, live: _Live, before: _Live) -> tuple[_Live, _Live]:
    """What is live after a decision, and what was before it."""
    if body["to"] == PRODUCTION:
        return (body["version"], body["adapter_sha256"]), live
    if body["from"] == PRODUCTION and body["kind"] == "reject":
        return before, before  # it says that the promotion before it never happened
    return (_BASE if body["from"] == PRODUCTION and body["version"] == live[0] else live), live


def _papers_of(case: Case, where: str, entry: Value, approval: Value) -> Papers:
    """The papers of the round that an approved version came out of: of that adapter, and with a promise, or marked."""
    sha = approval["adapter_sha256"]
    round_id = entry["tags"].get("tidegate.round_id", "")
    papers = case.evidence.rounds.get(round_id)
    if papers is None or papers.receipt["adapter_sha256"] != sha:
        raise ExportBroken(
            f"{where}: adapter {sha[:16]} of version {entry['version']} has no receipt in rounds/{round_id or '?'}/; "
            f"{ASK}"
        )
    bare = papers.plan["noise_source"] == NONE
    require_same(where, "guarantee", approval.get("guarantee"), NONE if bare else None, f"rounds/{round_id}/plan.json")
    if bare:
        _never_promised(case, where, papers)
    elif papers.plan["noise_source"] != "system" or papers.receipt["guarantee"]["epsilon"] is None:
        raise ExportBroken(
            f"{where}: version {entry['version']} was trained with test noise: epsilon is infinite; {ASK}"
        )
    if papers.verdict is None or papers.verdict["outcome"] != "passed":
        said = papers.verdict["outcome"] if papers.verdict else "nothing"
        raise ExportBroken(f"{where}: the verdict on version {entry['version']} says {said}, must say passed; {ASK}")
    return papers


def _never_promised(case: Case, where: str, papers: Papers) -> None:
    """No block with a promise was known of the stream when the round was committed."""
    heads = [row.blocks_head for row in case.evidence.rows if row.round_id == papers.plan["round_id"]]
    for block in case.evidence.blocks:
        if block.prev_hash == heads[-1]:
            return  # sealed later
        if block.stream == papers.plan["stream"] and Policy.from_frozen(json.loads(block.policy)).enabled:
            raise ExportBroken(
                f"{where}: a version without privacy was approved, though block {block.block_id} of the stream was "
                f"sealed with a promise before; {ASK}"
            )


def _judged(where: str, body: Value, papers: Papers, live: str) -> None:
    verdict = papers.verdict or {}
    if (verdict["parent_sha256"] or "") != live:
        raise ExportBroken(
            f"{where}: version {body['version']} was judged against {str(verdict['parent_sha256'])[:16]}, but "
            f"{live[:16] or 'the bare base'} was live at that place of the chain; {ASK}"
        )
    _ordered(where, "when", str(verdict["made_at"]), body["when"], f"rounds/{papers.plan['round_id']}/verdict.json")


def _versions(case: Case) -> None:
    known = [sha256_of(signed) for signed in case.evidence.approvals]
    live = {(a["model"], a["version"], a["adapter_sha256"]) for a in case.evidence.approvals if a["to"] == PRODUCTION}
    made = {papers.receipt["adapter_sha256"] for papers in case.evidence.rounds.values()}
    seen: set[tuple[str, int]] = set()
    model_of: dict[str, str] = {}
    unread: list[tuple[str, bool]] = []
    registered = set()
    for at, entry in enumerate(case.evidence.versions, start=1):
        where, name = f"{VERSIONS} line {at}", (entry["model"], entry["version"])
        tags = {key.removeprefix("tidegate."): value for key, value in entry["tags"].items()}
        papers = case.evidence.rounds.get(tags.get("round_id", ""))
        if name in seen:
            raise ExportBroken(f"{where}: {name[0]} version {name[1]} stands there twice; {ASK}")
        seen.add(name)
        if entry["stage"] == PRODUCTION and ((*name, tags.get("adapter_sha256")) not in live or "approval" not in tags):
            raise ExportBroken(
                f"{where}: {name[0]} version {name[1]} is in {PRODUCTION}, but nobody signed for it; {ASK}"
            )
        if tags.get("approval") and sha256_of(json.loads(tags["approval"])) not in known:
            raise ExportBroken(f"{where}: carries an approval that is not in {APPROVALS}; rows were dropped: {ASK}")
        if papers is None:
            if {tags.get("adapter_sha256"), entry["stored_sha256"]} & made:
                raise ExportBroken(f"{where}: its tag tidegate.round_id must name the round of its adapter; {ASK}")
            case.not_checked.append(f"{name[0]} version {name[1]}: came out of no round of this ledger; not approved")
            continue
        _tags(where, tags, papers)
        stream = papers.plan["stream"]
        require_same(
            where, "model", name[0], model_of.setdefault(stream, name[0]), f"other versions of stream {stream}"
        )
        registered.add(papers.plan["round_id"])
        if entry["stored_sha256"] is None:
            unread.append((f"{name[0]} version {name[1]}", "pruned" in tags))
        else:
            require_same(
                where, "stored_sha256", entry["stored_sha256"], papers.receipt["adapter_sha256"], "its receipt"
            )
    case.verified.append(f"versions: {len(seen)} in the registry; tags, stored adapters and signed papers agree")
    _tell_unread(case, unread)
    if lost := sorted(case.evidence.rounds.keys() - registered):
        case.not_checked.append(
            f"versions of rounds {', '.join(lost)}: not in the registry (not yet, or deleted there)"
        )


def _tell_unread(case: Case, unread: Sequence[tuple[str, bool]]) -> None:
    """Say which stored adapters were not read, apart by whether their versions say that they were pruned."""
    for pruned, why in ((False, "the registry could not hand them out"), (True, "pruned, only their papers are left")):
        if named := [name for name, gone in unread if gone is pruned]:
            case.not_checked.append(f"stored adapters of {', '.join(named)}: {why}")


def _tags(where: str, tags: Mapping[str, str], papers: Papers) -> None:
    plan = papers.plan
    expected = {
        "adapter_sha256": papers.receipt["adapter_sha256"],
        "parent_sha256": plan["parent_sha256"] or "",
        "base_sha256": plan["base_sha256"],
        "data_revision": plan["data_revision"],
        "attempt": str(plan["attempt"]),
        "stream": plan["stream"],
        "plan_hash": sha256_of(plan),
    }
    for name, value in expected.items():
        require_same(where, f"tag tidegate.{name}", tags.get(name), value, f"rounds/{plan['round_id']}/")
    for name in ("plan", "receipt", "verdict"):
        signed = json.loads(tags.get(name) or "null")
        same = sha256_of(signed) == sha256_of(getattr(papers, name))
        require_same(
            where, f"tag tidegate.{name} is that of the round", same, True, f"rounds/{plan['round_id']}/{name}.json"
        )


def _anchors(case: Case, expect_heads: Sequence[str]) -> None:
    anchored = set()
    for at, anchor in enumerate(case.evidence.anchors, start=1):
        where = f"{ANCHORS} line {at}: commit {str(anchor['commit'])[:12]}"
        require_head(where, anchor["ledger_head"], case.ledger, "ledger")
        require_head(where, anchor["approvals_head"], case.approvals, "approvals")
        papers = case.evidence.rounds.get(anchor["round_id"])
        if papers is None:
            raise ExportBroken(f"{where}: names round {anchor['round_id']}, which is not in rounds/; {ASK}")
        for name in ("adapter_sha256", "ledger_head"):
            require_same(where, name, anchor[name], papers.receipt[name], f"rounds/{anchor['round_id']}/receipt.json")
        anchored.add(anchor["round_id"])
    heads = {**case.approvals, **case.ledger}
    for head in expect_heads:
        require_head("--expect-head", head, heads, "ledger's or the approvals'")
    case.verified.append(
        f"anchors: heads in {len(case.evidence.rounds)} receipts and {len(case.evidence.anchors)} commits"
        + (f", and {len(expect_heads)} of --expect-head, are in the chains" if expect_heads else " are in the chains")
    )
    if left := sorted(case.evidence.rounds.keys() - anchored):
        case.not_checked.append(f"commits of rounds {', '.join(left)}: the data repository has none (yet)")


def _code(case: Case, installed: str) -> None:
    made = {round_id: str(papers.plan["code_sha256"]) for round_id, papers in case.evidence.rounds.items()}
    if not installed:
        case.not_checked.append("code: the learner is not installed here, so its hash was not compared with the plans'")
        return
    same = [round_id for round_id, code in made.items() if code == installed]
    case.verified.append(f"code: {len(same)} of {len(made)} rounds were made by the code installed here")
    if others := sorted(made.keys() - set(same)):
        names = ", ".join(f"{name} ({made[name][:12]})" for name in others)
        case.not_checked.append(f"code of {names}: another than is installed here ({installed[:12]}); get that release")


# -- what is said ------------------------------------------------------------------------------------------------------


def _never_checked(expect_heads: Sequence[str]) -> list[str]:
    found = [
        "that the code did what its plan says: an export cannot show it; read the code that the plans' hashes name",
        "scores in verdicts: the gates were not run again; the verdicts' signer answers for them",
        "commit ids: compare them with a clone of the data repository",
        "times: each is what its signer's clock said; orders rest on the chains",
        "tags without a signature (state, names, licence): anybody who may write to the registry may set them",
    ]
    if not expect_heads:
        found.append("rows after the last receipt or commit could have been dropped: note the head, use --expect-head")
    return found


def _same_text(seen: bytes, expected: bytes) -> None:
    if seen == expected:
        return
    lines = zip(seen.split(b"\n"), expected.split(b"\n"), strict=False)
    at = next((at for at, (one, other) in enumerate(lines, start=1) if one != other), 1)
    raise ExportBroken(f"{STATEMENT} line {at}: is not what follows from the other files; {ASK}")


def _ordered(where: str, name: str, earlier: str, later: str, source: str) -> None:
    seconds = (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
    if seconds < -CLOCKS_APART_SECONDS_MAX:
        raise ExportBroken(
            f"{where}: {name} is {later}, must not be before {earlier} in {source}; a clock was wrong, or it was "
            f"signed for later: {ASK}"
        )
