"""An export is verified by its files and the auditor's keys alone, and nothing in it can be changed unseen.

Two adversaries. A stranger changes bytes, and has no key. The operator holds every private key, changes what he likes,
words the statement anew and signs the manifest again: what he can then still change is listed in `OPEN`.
"""

import itertools
import json
import os
import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from privacy import chain, export
from privacy.canonical import canonical, sha256_of
from privacy.case import GivenKey
from privacy.chain import hash_of
from privacy.errors import ExportBroken, SignatureError
from privacy.export import ANCHORS, APPROVALS, BLOCKS, MANIFEST, ROWS, STATEMENT, VERSIONS, Papers, read
from privacy.policy import Policy
from privacy.receipts import make_receipt
from privacy.signing import SigningKey
from privacy.verify import make, verify, verify_folder
from tests.privacy.exports import CODE, MODEL, World, adapter, make_plan, whole_world

# What the holder of every key can change unseen: nobody signed it, and nothing follows from it. docs/audit.md says so.
OPEN = {
    VERSIONS: {"created_at", "aliases", "stage"},
    ANCHORS: {"commit"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        made = whole_world(Path(folder) / "world")
        yield made
        made.close()


@pytest.fixture(scope="module")
def files(world):
    return world.files()


@pytest.fixture(scope="module")
def heads(world):
    return [world.ledger.head(), world.approvals.head()]


def again(world, files):
    """What the operator makes of changed files: the statement worded anew where it can be, the manifest signed."""
    try:
        return make(read(files), world.key("receipts"))
    except (ExportBroken, ValueError, KeyError, TypeError, AttributeError):
        return export.seal(files, world.key("receipts"))


# Tags that are compared with something signed; any other anybody may set who may write to the registry.
SIGNED_TAGS = {"adapter_sha256", "parent_sha256", "base_sha256", "data_revision", "attempt", "stream", "plan_hash",
               "plan", "receipt", "verdict", "approval", "round_id"}  # fmt: skip


def is_open(path, where):
    free_tag = (
        path == VERSIONS and where.startswith("tags.") and where.removeprefix("tags.tidegate.") not in SIGNED_TAGS
    )
    return where in OPEN.get(path, ()) or free_tag


def paths_of_difference(one, other, prefix=""):
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            inner = f"{prefix}.{name}" if prefix else name
            yield from paths_of_difference(one.get(name), other.get(name), inner)
    elif one != other:
        yield prefix


def test_a_whole_export_verifies_without_a_workspace(world, files, heads, tmp_path):
    assert export.write(tmp_path / "sent", files)
    report = verify_folder(tmp_path / "sent", world.given(), expect_heads=heads, installed_code=CODE)
    assert [line.partition(":")[0] for line in report.verified] == [
        "manifest", "keys", "ledger", "spending", "rounds", "approvals", "versions", "anchors", "code", "statement"
    ]  # fmt: skip
    assert (report.ledger_head, report.approvals_head) == tuple(heads)
    assert any(line.startswith("plans of attempts that did not end (s-r2.1, s-r3.1)") for line in report.not_checked)
    blocks = {block.block: block for block in report.streams["s"].blocks}
    assert blocks["b1"].share_used == world.ledger.share_used("b1")
    assert blocks["b3"].epsilon is None
    assert "code: 3 of 3" in " ".join(report.verified)


def test_the_statement_can_be_quoted(files):
    text = files[STATEMENT].decode()
    assert "is (8, 1e-05)-differentially private with respect to each single unit of any of 2 blocks, for life" in text
    assert "70.5% of the most used bound is used up" in text
    assert "nothing is promised** (b3)" in text
    assert "desk version 1, desk version 2." in text
    assert "docs/privacy.md, 'What is not protected'" in text


def test_nothing_private_is_in_it(world, files):
    whole = b"".join(files.values())
    for secret in world.root.rglob("*.pem"):
        lines = secret.read_bytes().splitlines()[1:-1]
        assert lines
        assert not any(line in whole for line in lines)
    for word in (b"PRIVATE", b'sealed":', b"counts", b"nonce", b"parquet", b"accepted"):
        assert word not in whole


def test_every_byte_that_a_stranger_flips_is_found(world, files):
    given, found = world.given(), 0
    for path, content in files.items():
        for at in range(len(content)):
            changed = {**files, path: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]}
            with pytest.raises(ExportBroken):
                verify(changed, given)
            found += 1
    assert found == sum(map(len, files.values()))


def test_bytes_that_the_operator_flips_are_found(world, files, heads):
    """A sample of every file, a byte in 13 of each, and every byte of the short ones that others rest on."""
    given, opened, tried = world.given(), Counter(), 0
    dense = {"rounds/s-r1/receipt.json", "rounds/s-r1/plan.json"}
    for path, content in files.items():
        if path == MANIFEST:
            continue
        for at in range(0, len(content), 1 if path in dense else 13):
            # Digits become other digits and letters other letters: what parses must be found out by its meaning.
            changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            tried += 1
            try:
                verify(export.seal({**files, path: changed}, world.key("receipts")), given, expect_heads=heads)
            except ExportBroken:
                continue
            lines = zip(content.splitlines(), changed.splitlines(), strict=True)
            where = [p for a, b in lines if a != b for p in paths_of_difference(json.loads(a), json.loads(b))]
            if len(where) == 2 and "tags.tidegate.approval" in where:
                where.remove("tags.tidegate.approval")  # its copy on a version that stands in Production no more
            assert all(is_open(path, p) for p in where), (path, at, where)
            opened.update((path, p) for p in where)
    assert tried > 3000
    assert {path for path, _ in opened} == set(OPEN)


def test_every_line_that_the_operator_drops_is_found(world, files, heads):
    free = []
    for path, content in files.items():
        if not path.endswith(".jsonl"):
            continue
        lines = content.splitlines(keepends=True)
        for at in range(len(lines)):
            changed = {**files, path: b"".join(lines[:at] + lines[at + 1 :])}
            with pytest.raises(ExportBroken):
                verify(changed, world.given())
            try:
                verify(again(world, changed), world.given(), expect_heads=heads)
            except ExportBroken:
                continue
            free.append((path, at))
    # A version nobody approved is not in the chain of approvals, and a commit is not in any: both are told as missing.
    assert set(free) == {(VERSIONS, 2), (ANCHORS, 0), (ANCHORS, 1), (ANCHORS, 2)}
    without = {**files, VERSIONS: b"".join(files[VERSIONS].splitlines(keepends=True)[:2])}
    report = verify(again(world, without), world.given())
    assert any("versions of rounds s-r4: not in the registry" in line for line in report.not_checked)


@pytest.mark.parametrize(
    "path", ["rounds/s-r1/plan.json", "rounds/s-r2/receipt.json", "rounds/s-r1/verdict.json", STATEMENT]
)
def test_every_file_that_the_operator_drops_is_found(world, files, path):
    changed = {name: content for name, content in files.items() if name != path}
    with pytest.raises(ExportBroken, match=rf"{path}: is missing|must say passed"):
        verify(export.seal(changed, world.key("receipts")), world.given())


def test_rows_dropped_from_the_end_are_found_by_what_the_auditor_noted(tmp_path):
    world = World(tmp_path / "w")
    world.round(1, ["b1"])
    world.decide(1)
    world.decide(1, kind="rollback", to="Archived", source="Production")
    world.ledger.start(*world.reserve(make_plan("s-r2", 1, ["b2"], adapter(1))))
    whole = world.evidence()
    world.versions[0]["stage"] = "Archived"
    cut = {"rows": whole.rows[:-1], "approvals": whole.approvals[:-1]}
    verify(world.files(**cut), world.given())
    for head, name in ((whole.rows[-1].hash, "rows"), (world.approvals.head(), "approvals")):
        with pytest.raises(ExportBroken, match=rf"--expect-head: head {head[:16]} is not in"):
            verify(world.files(**{name: cut[name]}), world.given(), expect_heads=[head])
    # A receipt anchors all before it, a commit too.
    with pytest.raises(ExportBroken, match="committed row"):
        verify(export.seal({**world.files(), ROWS: b""}, world.key("receipts")), world.given())
    anchors = [{**world.anchors[0], "ledger_head": whole.rows[-1].hash}]
    with pytest.raises(ExportBroken, match=r"anchors\.jsonl line 1: commit 1111"):
        verify(world.files(rows=whole.rows[:-1], anchors=anchors), world.given())
    world.close()


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_in_the_export_is_not_trusted_by_itself(world, files):
    for purpose, path in (("receipts", ""), ("verdicts", "rounds/s-r1/verdict.json"), ("approvals", APPROVALS)):
        with pytest.raises(ExportBroken, match=f"{path}.*give the key of {purpose} by --key"):
            verify(files, world.given(**{purpose: None}))
    with pytest.raises(ExportBroken):
        verify(files, [])


def test_a_key_counts_for_its_purpose_alone(world, files):
    keys = {key.purpose: key.fingerprint for key in world.given()}
    swapped = [GivenKey("receipts", keys["receipts"]), GivenKey("approvals", keys["verdicts"]),
               GivenKey("verdicts", keys["verdicts"]), GivenKey("verdicts", keys["approvals"])]  # fmt: skip
    with pytest.raises(ExportBroken, match="give the key of approvals"):
        verify(files, swapped)
    untyped = verify(files, [GivenKey("", found) for found in keys.values()])
    assert any(line.startswith("what for:") for line in untyped.not_checked)
    assert not any(line.startswith("what for:") for line in verify(files, world.given()).not_checked)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key_id": "7" * 16}, "line 1: its id or purpose"),
        ({"fingerprint": "7" * 64}, "line 1: its id or purpose"),
        ({"purpose": "answers"}, "line 1: its id or purpose"),
        ({"valid_from": "2020-01-01T00:00:00Z"}, "line 1: its validity must be"),
        ({"valid_until": ""}, "line 1: its validity must be"),
    ],
)
def test_a_list_of_keys_that_says_otherwise_is_found(world, change, says):
    keys = world.evidence().keys
    refused(world, rf"keys/keys\.jsonl {says}", keys=({**keys[0], **change}, *keys[1:]))
    refused(world, r"keys/keys\.jsonl: key \w+ is missing", keys=keys[1:])


def test_a_rotation_anchors_the_rows_before_it(tmp_path):
    world = World(tmp_path / "w")
    world.reserve(make_plan("s-r1", 1, ["b1"], None))
    world.rotate("verdicts")
    refused(world, r"rotations\.jsonl: rotation 1 of verdicts names heads that are in no chain", rows=())
    world.close()


def test_only_the_newest_key_vouches_for_nothing_older(world, files):
    newest = world.key("verdicts").public.fingerprint
    with pytest.raises(ExportBroken, match=r"rounds/s-r1/verdict\.json.*not trusted"):
        verify(files, world.given(verdicts=newest))


def test_keys_are_given_as_files_or_fingerprints(world, files, tmp_path):
    public = world.key("receipts").public
    (tmp_path / "sent=receipts.pem").write_text(public.pem)
    whole = GivenKey.parse(public.fingerprint)
    assert whole == GivenKey("", public.fingerprint) == GivenKey.parse(str(tmp_path / "sent=receipts.pem"))
    assert GivenKey.parse(f"receipts={public.key_id}") == GivenKey("receipts", public.key_id)
    assert GivenKey.parse(public.key_id).is_for("receipts", public)
    for text in ("", public.fingerprint[:20], "receipts=", "nowhere.pem"):
        with pytest.raises(SignatureError):
            GivenKey.parse(text)
    stranger = [*world.given(), GivenKey("", "ab" * 32)]
    assert any("--key abab" in line for line in verify(files, stranger).not_checked)


@pytest.mark.parametrize("purpose", ["receipts", "verdicts", "approvals"])
def test_a_stolen_retired_key_signs_nothing_new(tmp_path, purpose):
    """Also not with a date from before: places in the chains cannot be dated back."""
    world = World(tmp_path / "w")
    world.round(1, ["b1"])
    world.decide(1)
    stolen = tmp_path / "stolen.pem"
    stolen.write_bytes((world.root / "keys" / f"{purpose}.pem").read_bytes())
    stolen.chmod(0o600)
    world.rotate(purpose)
    assert verify(world.files(), world.given())
    current = world.key
    thief = SigningKey.load_or_create(stolen)
    world.key = lambda asked: thief if asked == purpose else current(asked)
    world.round(2, ["b2"], parent=adapter(1))
    world.decide(2)
    papers = dict(world.papers)
    if purpose == "verdicts":
        body = {k: v for k, v in papers["s-r2"].verdict.items() if k not in {"key_id", "signature"}}
        papers["s-r2"] = replace(papers["s-r2"], verdict=thief.sign(body))
    world.key = current
    with pytest.raises(ExportBroken, match="retired before it was" if purpose == "approvals" else "retired at row 3"):
        verify(world.files(rounds=papers), world.given())
    world.close()


# -- what an operator with every key might forge -----------------------------------------------------------------------


def signed_anew(world, purpose, value, **changes):
    body = {name: inner for name, inner in value.items() if name not in {"key_id", "signature"}}
    return world.key(purpose).sign(body | changes)


def with_papers(world, round_id, **changes):
    """The papers of a round changed and signed again, and the version's tags with them."""
    papers = replace(world.papers[round_id], **changes)
    versions = []
    for entry in world.versions:
        tags = dict(entry["tags"])
        if tags["tidegate.round_id"] == round_id:
            tags |= {f"tidegate.{name}": json.dumps(getattr(papers, name)) for name in ("plan", "receipt", "verdict")}
        versions.append({**entry, "tags": tags})
    return {"rounds": {**world.papers, round_id: papers}, "versions": tuple(versions)}


def rechained(rows):
    """The rows with their hashes made new, as whoever can write the database can."""
    before, made = chain.GENESIS, []
    for seq, row in enumerate(rows, start=1):
        row = replace(row, seq=seq, prev_hash=before)  # noqa: PLW2901
        made.append(replace(row, hash=hash_of(row)))
        before = made[-1].hash
    return tuple(made)


@pytest.fixture
def small(tmp_path):
    """One approved round, one failed, keys never changed."""
    made = World(tmp_path / "small")
    made.round(1, ["b1"])
    made.decide(1)
    made.round(2, ["b2"], parent=adapter(1), outcome="failed")
    yield made
    made.close()


def refused(world, match, **changes):
    assert verify(world.files(), world.given())
    with pytest.raises(ExportBroken, match=match) as told:
        verify(world.files(**changes), world.given())
    return str(told.value)


@pytest.mark.parametrize("head", [0, 1, None])
def test_a_receipt_whose_head_is_not_after_its_round_is_found(small, head):
    """It would anchor nothing: neither its round's charge nor what came before."""
    hashes = [chain.GENESIS, small.evidence().rows[1].hash]
    forged = "e" * 64 if head is None else hashes[head]
    receipt = signed_anew(small, "receipts", small.papers["s-r1"].receipt, ledger_head=forged)
    anchors = tuple({**a, "ledger_head": forged} if a["round_id"] == "s-r1" else a for a in small.anchors)
    changes = with_papers(small, "s-r1", receipt=receipt)
    refused(small, "not before line 3 of ledger/rows", anchors=anchors if head == 1 else small.anchors, **changes)


def test_a_better_epsilon_in_a_receipt_is_found(small):
    receipt = small.papers["s-r1"].receipt
    better = signed_anew(small, "receipts", receipt, guarantee={**receipt["guarantee"], "epsilon": 1.0})
    refused(small, r"rounds/s-r1/receipt\.json: guarantee is", **with_papers(small, "s-r1", receipt=better))


def test_a_receipt_that_hides_test_noise_is_found(world):
    receipt = world.papers["s-r4"].receipt
    assert receipt["guarantee"]["epsilon"] is None
    better = signed_anew(world, "receipts", receipt, guarantee={**receipt["guarantee"], "epsilon": 8.0})
    refused(world, r"rounds/s-r4/receipt\.json: guarantee", **with_papers(world, "s-r4", receipt=better))


def test_a_verdict_about_another_adapter_is_found(small):
    other = signed_anew(small, "verdicts", small.papers["s-r1"].verdict, adapter_sha256=adapter(9))
    refused(small, r"rounds/s-r1/verdict\.json: adapter_sha256", **with_papers(small, "s-r1", verdict=other))


def test_a_charge_of_the_holdout_that_was_not_paid_is_found(small):
    gates = [{"name": "private", "data": "private", "charge_id": "s-e0001"}]
    other = signed_anew(small, "verdicts", small.papers["s-r1"].verdict, gates=gates)
    refused(small, "read the holdout as s-e0001", **with_papers(small, "s-r1", verdict=other))


@pytest.mark.parametrize("change", [{"steps": 1}, {"sigma": 9.0}, {"code_sha256": "f" * 64}, {"blocks": []}])
def test_another_plan_than_was_charged_is_found(small, change):
    plan = {**small.papers["s-r1"].plan, **change}
    refused(small, r"rounds/s-r1/plan\.json: its hash", **with_papers(small, "s-r1", plan=plan))


@pytest.mark.parametrize(
    ("planned", "charged", "says"),
    [
        ({}, {"sigma": 20.0}, "charges"),
        ({"blocks": [{"id": "b1", "q": 0.25}, {"id": "b2", "q": 0.25}]}, {}, "charges"),
        ({"stream": "t"}, {}, "stream is t"),
        ({}, {"noise_source": "test"}, "noise_source is system"),
    ],
)
def test_a_plan_that_says_other_than_was_charged_is_found(tmp_path, planned, charged, says):
    """The hash in the row is that of the plan: the row itself was wrong from the start."""
    world = World(tmp_path / "w")
    plan = make_plan("s-r1", 1, ["b1"], None) | planned
    name = ("s-r1", 1, sha256_of(plan))
    charges = [chain.Charge("b1", 0.25, charged.get("sigma", plan["sigma"]), 30)]
    world.ledger.reserve("s", *name, charges, noise_source=charged.get("noise_source", "system"))
    world.ledger.start(*name)
    world.ledger.commit(*name, adapter(1))
    receipt = make_receipt(plan_hash=name[2], adapter_sha256=adapter(1), ledger_head=world.ledger.head(),
                           unit="record", epsilon=8.0, delta=1e-5, signer=world.key("receipts"))  # fmt: skip
    with pytest.raises(ExportBroken, match=rf"rounds/s-r1/plan\.json: {says}"):
        verify(world.files(rounds={"s-r1": Papers(plan, receipt)}), world.given())
    world.close()


@pytest.mark.parametrize(
    ("paper", "change"),
    [
        ("receipt", {"plan_hash": "7" * 64}),
        ("receipt", {"adapter_sha256": "7" * 64}),
        ("verdict", {"parent_sha256": "7" * 64}),
        ("verdict", {"base_sha256": "7" * 64}),
        ("verdict", {"made_at": "2020-01-01T00:00:00Z"}),
    ],
)
def test_papers_about_something_else_are_found(small, paper, change):
    signed = signed_anew(small, f"{paper}s", getattr(small.papers["s-r1"], paper), **change)
    says = rf"rounds/s-r1/{paper}\.json: {next(iter(change))} is (7777|2020)"
    refused(small, says, **with_papers(small, "s-r1", **{paper: signed}))


def test_an_approval_of_what_failed_is_found(small):
    small.decide(2)
    with pytest.raises(ExportBroken, match=r"approvals\.jsonl line 2: the verdict on version 2 says failed"):
        verify(small.files(), small.given())


def test_an_approval_of_test_noise_is_found(tmp_path):
    world = World(tmp_path / "w")
    world.round(1, ["b1"], noise="test")
    verify(world.files(), world.given())
    world.decide(1)
    with pytest.raises(ExportBroken, match=r"approvals\.jsonl line 1: version 1 was trained with test noise"):
        verify(world.files(), world.given())
    world.close()


def test_an_approval_without_a_verdict_or_a_version_is_found(small):
    papers = replace(small.papers["s-r1"], verdict=None)
    versions = with_papers(small, "s-r1", verdict=None)["versions"]
    refused(small, "says nothing, must say passed", rounds={**small.papers, "s-r1": papers}, versions=versions)
    refused(small, "desk version 1 is not in versions", versions=tuple(small.versions[1:]))


def test_an_approval_of_an_adapter_without_a_receipt_is_found(small):
    small.decide(1, adapter_sha256=adapter(9))
    with pytest.raises(
        ExportBroken, match=r"approvals\.jsonl line 2: adapter 9999999999999999 of version 1 has no receipt"
    ):
        verify(small.files(), small.given())


def test_an_approval_before_the_verdict_is_found(tmp_path):
    world = World(tmp_path / "w")
    world.round(1, ["b1"])
    world.decide(1, when="2026-01-01T00:00:00Z")
    with pytest.raises(ExportBroken, match=r"approvals\.jsonl line 1: when is 2026-01-01.*rounds/s-r1/verdict\.json"):
        verify(world.files(), world.given())
    world.close()


def test_an_approval_of_what_was_judged_against_another_is_found(small):
    small.round(3, ["b3"])  # from the bare base, while version 1 is live
    small.decide(3)
    with pytest.raises(ExportBroken, match=r"line 2: version 3 was judged against .* was live at that place"):
        verify(small.files(), small.given())


def test_a_rollback_to_what_was_never_live_is_found(small):
    small.round(3, ["b3"], parent=adapter(1))
    small.decide(3, kind="rollback")
    with pytest.raises(ExportBroken, match="never approved before it"):
        verify(small.files(), small.given())


def test_a_rejection_that_was_dropped_is_found(small):
    small.decide(2, kind="reject", to="Archived")
    small.decide(1, kind="rollback", source="Archived")
    first, _, third = small.evidence().approvals
    refused(small, r"approvals\.jsonl line 2: seq=3, must be 2", approvals=(first, third))
    renumbered = signed_anew(small, "approvals", third, seq=2)
    refused(small, r"approvals\.jsonl line 2: seq=2, must be 2 and follow", approvals=(first, renumbered))


def test_a_withdrawal_and_a_move_that_never_happened_are_followed(tmp_path):
    world = World(tmp_path / "w")
    world.round(1, ["b1"])
    world.decide(1)
    world.round(2, ["b2"], parent=adapter(1))
    world.decide(2)
    world.decide(2, kind="reject", to="Staging", source="Production")
    world.round(3, ["b3"], parent=adapter(1))  # version 1 is live again
    world.decide(3)
    world.decide(3, kind="rollback", to="Archived", source="Production")
    world.decide(1, kind="emergency", source="Archived")
    assert verify(world.files(), world.given())
    world.close()


CANARY = {"kind": "canary", "to": "Staging"}


def test_a_canary_is_held_to_what_a_promotion_is_and_is_none(tmp_path):
    world = World(tmp_path / "w")
    world.round(1, ["b1"])
    world.decide(1)
    world.round(2, ["b2"], parent=adapter(1))
    world.decide(2, **CANARY, canary={"share": 0.1, "header": True, "sticky": True})
    world.decide(2, **CANARY, canary={"share": 0, "automatic": True})
    assert verify(world.files(), world.given())
    world.decide(2)
    world.round(3, ["b3"], parent=adapter(1))  # from a version that is live no more
    world.decide(3, **CANARY, canary={"share": 0})
    assert verify(world.files(), world.given()), "an end needs nothing"
    world.decide(3, **CANARY, canary={"share": 0.1})
    with pytest.raises(ExportBroken, match=r"line 6: version 3 was judged against .* was live at that place"):
        verify(world.files(), world.given())
    world.close()


def test_a_canary_is_no_approval_to_roll_back_to(small):
    small.round(3, ["b3"], parent=adapter(1))
    small.decide(3, **CANARY, canary={"share": 0.1})
    small.decide(3, kind="rollback")
    with pytest.raises(ExportBroken, match="never approved before it"):
        verify(small.files(), small.given())


def test_a_statement_that_was_worded_otherwise_is_found(small):
    files = small.files()
    files[STATEMENT] = files[STATEMENT].replace(b"is (8, 1e-05)-diff", b"is (1, 1e-05)-diff")
    with pytest.raises(ExportBroken, match=r"STATEMENT\.md line 9: is not what follows"):
        verify(export.seal(files, small.key("receipts")), small.given())


def test_a_commit_of_a_round_that_is_not_there_is_found(small):
    anchors = (*small.anchors, {**small.anchors[1], "round_id": "s-r9"})
    refused(small, r"anchors\.jsonl line 3: commit 2222.* names round s-r9", anchors=anchors)
    for name, which in (("ledger_head", "ledger"), ("approvals_head", "approvals")):
        ahead = ({**small.anchors[0], name: "7" * 64}, small.anchors[1])
        refused(small, f"line 1: commit 1111.*: head 7777777777777777 is not in the {which} chain", anchors=ahead)
    other = ({**small.anchors[0], "adapter_sha256": adapter(9)}, small.anchors[1])
    refused(small, r"anchors\.jsonl line 1: .*adapter_sha256 is 9999", anchors=other)


def test_a_version_that_hides_its_round_or_stands_there_twice_is_found(small):
    entry = small.versions[1]
    tags = {name: value for name, value in entry["tags"].items() if name != "tidegate.round_id"}
    hidden = (small.versions[0], {**entry, "tags": tags})
    refused(small, r"versions\.jsonl line 2: its tag tidegate\.round_id must name the round", versions=hidden)
    refused(small, "line 3: desk version 2 stands there twice", versions=(*small.versions, entry))
    stranger = {**entry, "version": 3, "tags": {"tidegate.adapter_sha256": adapter(9)}, "stored_sha256": adapter(9)}
    report = verify(small.files(versions=(*small.versions, stranger)), small.given())
    assert "desk version 3: came out of no round of this ledger; not approved" in report.not_checked


def test_the_newest_approval_dropped_is_found_by_its_copy_on_the_version(world):
    assert world.evidence().approvals[-1]["kind"] == "rollback"
    refused(
        world, r"versions\.jsonl line 1: carries an approval that is not in", approvals=world.evidence().approvals[:-1]
    )


def test_a_version_in_production_that_nobody_signed_for_is_found(small):
    versions = (small.versions[0], {**small.versions[1], "stage": "Production"})
    assert "versions.jsonl line 2" in refused(small, "nobody signed for it", versions=versions)


@pytest.mark.parametrize(
    "name", ["adapter_sha256", "parent_sha256", "plan_hash", "data_revision", "attempt", "stream", "base_sha256"]
)
def test_a_tag_that_differs_from_what_was_signed_is_found(small, name):
    entry = small.versions[0]
    versions = ({**entry, "tags": {**entry["tags"], f"tidegate.{name}": "7"}}, small.versions[1])
    # An approved version without the right adapter is nobody's; else the tag is named.
    refused(small, f"tag tidegate.{name} is 7|nobody signed", versions=versions)


@pytest.mark.parametrize("name", ["plan", "receipt", "verdict"])
def test_a_tag_with_another_paper_than_the_rounds_is_found(small, name):
    entry = small.versions[0]
    tags = {**entry["tags"], f"tidegate.{name}": small.versions[1]["tags"][f"tidegate.{name}"]}
    versions = ({**entry, "tags": tags}, small.versions[1])
    refused(small, f"tag tidegate.{name} is that of the round is False", versions=versions)


def test_a_stored_adapter_that_was_exchanged_is_found(small):
    versions = ({**small.versions[0], "stored_sha256": adapter(9)}, small.versions[1])
    refused(small, "stored_sha256 is 9999", versions=versions)
    lost = ({**small.versions[0], "stored_sha256": None}, small.versions[1])
    report = verify(small.files(versions=lost), small.given())
    assert any(line.startswith("stored adapters of desk version 1") for line in report.not_checked)
    gone = {**lost[0], "tags": {**lost[0]["tags"], "tidegate.pruned": "{}"}}
    report = verify(small.files(versions=(gone, small.versions[1])), small.given())
    assert "stored adapters of desk version 1: pruned, only their papers are left" in report.not_checked


def test_a_round_without_a_receipt_is_found(small):
    refused(small, r"rows\.jsonl line 6: s-r2 attempt 1 is committed, but", rounds={"s-r1": small.papers["s-r1"]})


def test_a_ledger_written_anew_misses_the_heads_in_the_receipts(small):
    rows = list(small.evidence().rows)
    rows[0] = replace(rows[0], charges=(replace(rows[0].charges[0], sigma=9.0),))
    refused(small, "in no chain|not in the|must be in the chain|charges", rows=rechained(rows))
    dropped = [row for row in small.evidence().rows if row.round_id != "s-r1"]
    refused(small, "must be a committed row", rows=rechained(dropped))


def test_spending_beyond_the_filter_is_found_though_every_hash_is_right(tmp_path):
    world = World(tmp_path / "w")
    world.round(1, ["b1"])
    first = world.evidence().rows[0]
    extra = [replace(first, round_id=f"s-x{n}", plan_hash="a" * 64) for n in range(4)]
    rows = rechained([*world.evidence().rows, *extra])
    with pytest.raises(ExportBroken, match=r"blocks\.jsonl line 1: block b1: train has used 117"):
        verify(world.files(), world.given()) and verify(
            export.seal({**world.files(), ROWS: b"".join(map(line_of, rows))}, world.key("receipts")), world.given()
        )
    world.close()


def line_of(row):
    return canonical(json.loads(json.dumps(row.__dict__ | {"charges": [c.__dict__ for c in row.charges]}))) + b"\n"


def test_windows_that_were_invented_are_found(tmp_path):
    """Who may write rows could spread a budget over windows that never came."""
    world = World(tmp_path / "w")
    world.ledger.register_block("s", "b4", Policy("record", 8.0, 1e-5, horizon="1d").frozen(500))
    world.reserve(make_plan("s-r1", 1, ["b4"], None))
    rows = world.evidence().rows
    verify(world.files(), world.given())
    ahead = replace(rows[0], window=rows[0].window + 1)
    with pytest.raises(
        ExportBroken, match=rf"rows\.jsonl line 1: charged at .* must be {rows[0].window} for the horizon"
    ):
        world.files(rows=rechained([ahead]))
    # A clock that goes back opens no window again.
    late = replace(rows[0], at="2020-01-01T00:00:00Z", round_id="s-r2")
    verify(world.files(rows=rechained([rows[0], late])), world.given())
    with pytest.raises(ExportBroken, match="line 2: charged at 2020"):
        world.files(rows=rechained([rows[0], replace(late, window=18262)]))
    world.close()


def test_private_evaluations_are_charged_to_the_holdout_and_told(tmp_path):
    world = World(tmp_path / "w")
    world.ledger.register_block("s", "b4", Policy("record", 8.0, 1e-5, holdout_evaluations=4).frozen(500))
    world.ledger.reserve("s", "s-e1", 1, "a" * 64, [chain.Charge("b4", 1.0, 20.0, 1)], account="holdout")
    world.gates = [{"name": "private", "data": "private", "charge_id": "s-e1"}]
    world.round(1, ["b4"])
    world.decide(1)
    report = verify(world.files(), world.given())
    assert report.streams["s"].blocks[3].holdout_reads == ("s-e1",)
    assert b"epsilon 2, delta 1e-05 per record, for life; 1 paid evaluations" in world.files()[STATEMENT]
    world.close()


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (("reserved", "committed"), "must be what follows reserved"),
        (("started",), "must be reserved"),
        (("reserved", "started", "cancelled"), "must be what follows started"),
        (("reserved", "reserved"), "must be what follows reserved"),
        (("forgotten",), "must be reserved"),
    ],
)
def test_steps_out_of_order_are_found(small, states, says):
    rows = small.evidence().rows
    of = {row.state: row for row in rows[:3]}
    new = [
        replace(
            of.get(s, rows[1]),
            state=s,
            round_id="s-x1",
            plan_hash="a" * 64,
            charges=rows[0].charges if s == "reserved" else (),
        )
        for s in states
    ]
    with pytest.raises(ExportBroken, match=says):
        verify(small.files(rows=rechained([*rows, *new])), small.given())


@pytest.mark.parametrize(
    ("state", "change", "says"),
    [
        ("started", {"plan_hash": "b" * 64}, "not of the plan it began with"),
        ("started", {"noise_source": "test"}, "not of the plan it began with"),
        ("started", {"stream": "t"}, "not of the plan it began with"),
        ("started", {"charges": (chain.Charge("b2", 0.1, 2.0, 1),)}, "charges stand in reserved rows"),
        ("reserved", {"charges": ()}, "charges stand in reserved rows"),
        ("reserved", {"noise_source": "none"}, "of system or test noise"),
    ],
)
def test_an_attempt_that_changes_under_way_is_found(small, state, change, says):
    rows = small.evidence().rows
    first = replace(rows[0], round_id="s-x1", plan_hash="a" * 64)
    new = replace(rows[1], **{"round_id": "s-x1", "plan_hash": "a" * 64, **change})
    added = [first, new] if state == "started" else [replace(first, **change)]
    files = {**small.files(), ROWS: b"".join(map(line_of, rechained([*rows, *added])))}
    with pytest.raises(ExportBroken, match=says):
        verify(export.seal(files, small.key("receipts")), small.given())


def test_caps_that_are_not_those_of_the_policy_are_found(small):
    blocks = list(small.evidence().blocks)
    policy = json.loads(blocks[2].policy)
    blocks[2] = replace(blocks[2], policy=canonical({**policy, "epsilon": 80.0}).decode())
    files = {**small.files(), BLOCKS: b"".join(canonical(b.__dict__) + b"\n" for b in rechained(blocks))}
    with pytest.raises(ExportBroken, match=r"ledger/rows\.jsonl, ledger/blocks\.jsonl|blocks\.jsonl line 3"):
        verify(export.seal(files, small.key("receipts")), small.given())


def test_rounds_of_other_code_are_named(small):
    report = verify(small.files(), small.given(), installed_code="f" * 64)
    assert "code: 0 of 2 rounds were made by the code installed here" in report.verified
    assert any(line.startswith("code of s-r1 (c0dec0dec0de)") for line in report.not_checked)
    assert any(line.startswith("code:") for line in verify(small.files(), small.given()).not_checked)


def test_an_empty_ledger_has_a_statement_too(tmp_path):
    world = World(tmp_path / "w")
    report = verify(world.files(), world.given())
    assert report.ledger_head == chain.GENESIS
    assert "0.0% of the most used bound" in world.files()[STATEMENT].decode()
    world.close()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_an_export_is_written_whole_and_again_changes_nothing(world, files, tmp_path):
    folder = tmp_path / "deep" / "sent"
    assert export.write(folder, files) is True
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert export.write(folder, world.files()) is False
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert export.load(folder) == files
    small = World(tmp_path / "w2")
    assert export.write(folder, small.files()) is True
    assert export.load(folder) == small.files()
    assert [path.name for path in folder.parent.iterdir()] == ["sent"], "nothing is left beside it"
    small.close()


def test_other_peoples_folders_are_left_alone(files, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").write_text("do not touch")
    export.write(tmp_path / "sent", files)
    (tmp_path / "sent" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "sent")
    for name in ("thesis", "sent", "file", "link"):
        with pytest.raises(ExportBroken, match="choose a new"):
            export.write(tmp_path / name, files)
    assert (thesis / "chapter1.txt").read_text() == "do not touch"
    assert (tmp_path / "sent" / "notes.txt").exists()
    (tmp_path / "empty").mkdir()
    assert export.write(tmp_path / "empty", files)


def test_a_failed_write_leaves_nothing(files, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_synced", full)
    with pytest.raises(ExportBroken, match="No space left"):
        export.write(tmp_path / "sent", files)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_export_is_named(world, files, tmp_path):
    with pytest.raises(ExportBroken, match="no such folder"):
        verify_folder(tmp_path / "nowhere", world.given())
    export.write(tmp_path / "sent", files)
    (tmp_path / "sent" / "extra").write_text("x")
    with pytest.raises(ExportBroken, match="extra: is not in the manifest"):
        verify_folder(tmp_path / "sent", world.given())
    (tmp_path / "sent" / "extra").unlink()
    (tmp_path / "sent" / STATEMENT).unlink()
    (tmp_path / "sent" / STATEMENT).symlink_to("/etc/hostname")
    with pytest.raises(ExportBroken, match="must be a plain file"):
        verify_folder(tmp_path / "sent", world.given())


@pytest.mark.parametrize("change", [{"kind": "receipt"}, {"format": 2}, {"files": []}, {"files": None}])
def test_a_signed_value_that_is_no_manifest_is_refused(small, change):
    signed = signed_anew(small, "receipts", json.loads(small.files()[MANIFEST]), **change)
    with pytest.raises(ExportBroken, match=r"MANIFEST\.json line 1: (kind=|names no files)"):
        verify({**small.files(), MANIFEST: canonical(signed) + b"\n"}, small.given())
    spaced = json.dumps(json.loads(small.files()[MANIFEST])).encode() + b"\n"
    with pytest.raises(ExportBroken, match=r"MANIFEST\.json line 1: must be one JSON object in canonical form"):
        verify({**small.files(), MANIFEST: spaced}, small.given())


def test_files_that_are_missing_or_belong_to_nothing_are_named(small):
    files = small.files()
    with pytest.raises(ExportBroken, match=r"approvals\.jsonl: is missing, the manifest names it"):
        verify({name: content for name, content in files.items() if name != APPROVALS}, small.given())
    for name in ("notes.txt", "rounds/s-r1/seed.json", "rounds/ /plan.json", "rounds/s-r1/deep/plan.json"):
        with pytest.raises(ExportBroken, match=f"{name}: no such file belongs to an export"):
            verify(export.seal({**files, name: b"{}\n"}, small.key("receipts")), small.given())
    with pytest.raises(ExportBroken, match="is no export"):
        verify({}, small.given())


def test_lines_have_one_spelling(small):
    files, plan = small.files(), "rounds/s-r1/plan.json"
    version = json.loads(files[VERSIONS].splitlines()[1])
    first = files[VERSIONS].splitlines(keepends=True)[0]

    def versions(**change):
        return first + canonical({**version, **change}) + b"\n"

    for path, content, says in (
        (ROWS, files[ROWS][:-1], "its last line has no end"),
        (ROWS, files[ROWS].replace(b'"attempt":1', b'"attempt": 1', 1), "line 1: must be one JSON object in canonical"),
        (ROWS, b"[]\n" + files[ROWS], "line 1: must be one JSON object"),
        (ROWS, files[ROWS].replace(b'"q":0.25', b'"q":2.25', 1), "line 1: is no row of a ledger"),
        (plan, files[plan] * 2, "holds 2 lines, must be one"),
        (VERSIONS, versions(tags={**version["tags"], "note": "x"}), "line 2: must have tags that begin with tidegate"),
        (VERSIONS, versions(tags={"tidegate.state": 1}), "line 2: must have model, version"),
        (VERSIONS, versions(more=1), "line 2: must have model, version"),
        (VERSIONS, versions(version="2"), "line 2: must have model, version"),
    ):
        with pytest.raises(ExportBroken, match=f"{path}:? {says}"):
            verify(export.seal({**files, path: content}, small.key("receipts")), small.given())


def test_values_of_other_shapes_are_refused_and_not_crashed_on(world, files):
    """The operator may write any JSON: whatever it is, it is named in one line."""
    numbers, given = random.Random(5), world.given()
    odd = [None, 7, "x", [], {}, -1, 1.5, True, "0" * 64, [[]]]
    for path, value in itertools.product([p for p in files if p not in {MANIFEST, STATEMENT}], odd):
        lines = files[path].splitlines()
        at = numbers.randrange(len(lines))
        whole = json.loads(lines[at])
        name = numbers.choice(sorted(whole))
        if whole[name] == value:
            continue
        lines[at] = canonical({**whole, name: value})
        changed = export.seal({**files, path: b"".join(line + b"\n" for line in lines)}, world.key("receipts"))
        if name in OPEN.get(path, ()):
            continue
        with pytest.raises(ExportBroken) as told:
            verify(changed, given)
        assert "\n" not in str(told.value)


def test_round_ids_that_are_no_folder_names_are_refused(small):
    for name in ("../up", "a/b", "..", ""):
        with pytest.raises(ExportBroken, match="names a folder"):
            small.files(rounds={name: small.papers["s-r1"]})
    assert MODEL in small.files()[VERSIONS].decode()


@pytest.fixture
def bare(tmp_path):
    """A world in which one block, the first that was sealed, was sealed without privacy."""
    world = World(tmp_path / "w")
    world.ledger.register_block("s", "bare", Policy("record", 8.0, 1e-5, enabled=False).frozen(500))
    yield world
    world.close()


def broken(world, match):
    with pytest.raises(ExportBroken, match=match):
        verify(world.files(), world.given())


def test_a_round_without_privacy_that_read_a_block_with_a_promise_is_found(bare):
    bare.round(1, ["b1"], noise="none")
    broken(bare, r"rounds/s-r1/plan\.json: a round without privacy read block b1, to whose people something")


def test_a_private_round_from_weights_without_privacy_is_found(bare):
    bare.round(1, ["bare"], noise="none")
    verify(bare.files(), bare.given())
    bare.round(2, ["b1"], parent=adapter(1))
    broken(bare, r"rounds/s-r2/plan\.json: was trained from an adapter without privacy")


def test_an_approval_without_privacy_in_a_stream_that_promised_some_is_found(bare):
    bare.round(1, ["bare"], noise="none")
    bare.decide(1, guarantee="none")
    broken(bare, r"approvals\.jsonl line 1: .* though block b1 of the stream was sealed with a promise before")


def test_an_approval_that_says_other_than_its_round_was_is_found(bare):
    bare.round(1, ["b1"])
    bare.decide(1, guarantee="none")
    broken(bare, r"approvals\.jsonl line 1: guarantee")
