"""`tidegate audit` and `tidegate keys` on a workspace whose rounds were made by hand; the registry stands in memory."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from learner.adapter import adapter_sha256
from learner.plan import BlockAccount, plan_round
from privacy.errors import ExportBroken, LedgerBehindReceipt, LedgerError, SignatureError
from privacy.receipts import make_receipt
from privacy.signing import SigningKey
from registry.approvals import now
from registry.errors import RegistryUnavailable
from registry.states import ModelVersion
from tests.registry.conftest import write_adapter
from tidegate import audit
from tidegate.cli import cli
from tidegate.wiring import open_service
from tidegate.workspace import write_json

STREAM = "support-desk"
BLOCK = f"{STREAM}-0-000000001"
FOREIGN = ("mlflow", "torch", "transformers", "kafka", "dvc", "pygit2", "great_expectations", "flask", "requests")


class Store:
    """What an export asks of the registry."""

    def __init__(self):
        self.rows, self.adapters = [], {}

    def versions(self, model):
        return list(self.rows) if model == STREAM else []

    def fetch_adapter(self, _model, version, dest):
        return Path(shutil.copytree(self.adapters[version], dest))


class Down(Store):
    def versions(self, _model):
        raise RegistryUnavailable("mlflow=http://127.0.0.1:1: cannot be reached; start it")


@dataclass(frozen=True)
class Desk:
    root: Path
    store: Store

    def service(self):
        service = open_service(str(self.root))
        service.__dict__["store"] = self.store
        return service

    def round(self, number, steps=4):
        """One round, from plan to commit in git, as `cycle` and `evidence` leave it."""
        service = self.service()
        policy = service.policy(STREAM)
        frozen = policy.frozen(500)
        service.ledger.register_block(STREAM, BLOCK, frozen)
        account = BlockAccount(BLOCK, frozen, service.ledger.spent(BLOCK))
        round_id = f"{STREAM}-r{number:04d}"
        plan = plan_round(round_id=round_id, attempt=1, stream=STREAM, parent_sha256=None, base_sha256="b" * 64,
                          data_revision="d" * 40, new=[account], expected_batch=64, steps=steps)  # fmt: skip
        made = self.root / "made" / str(number)
        sha = write_adapter(made, number)
        service.ledger.reserve(STREAM, round_id, 1, plan.plan_hash, plan.charges())
        service.ledger.start(round_id, 1, plan.plan_hash)
        service.ledger.commit(round_id, 1, plan.plan_hash, sha)
        receipt = make_receipt(plan_hash=plan.plan_hash, adapter_sha256=sha, ledger_head=service.ledger.head(),
                               unit=plan.unit, epsilon=policy.epsilon, delta=policy.delta,
                               signer=service.signer("receipts"))  # fmt: skip
        verdict = service.signer("verdicts").sign(
            {"adapter_sha256": sha, "parent_sha256": None, "base_sha256": "b" * 64, "outcome": "passed",
             "gates": [], "made_at": now()}
        )  # fmt: skip
        papers = {"plan": plan.as_json(), "receipt": receipt, "verdict": verdict}
        folder = service.workspace.rounds(round_id)
        folder.mkdir(parents=True)
        for name, value in papers.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        heads = {"ledger_head": receipt["ledger_head"], "approvals_head": service.approvals().head()}
        named = {"round_id": round_id, "adapter_sha256": sha, **(heads if number > 1 else {})}
        paths = {"round.json": named} | {f"rounds/{round_id}/{name}.json": value for name, value in papers.items()}
        encoded = {path: json.dumps(value).encode() for path, value in paths.items()}
        service.repository().commit_files(encoded, f"Record round {round_id}")
        tags = {"state": "candidate", "stream": STREAM, "round_id": round_id, "attempt": "1", "adapter_sha256": sha,
                "parent_sha256": "", "base_sha256": "b" * 64, "data_revision": "d" * 40,
                "plan_hash": plan.plan_hash} | {name: json.dumps(value) for name, value in papers.items()}  # fmt: skip
        tags = {f"tidegate.{name}": value for name, value in tags.items()} | {"note": "a person's own, maybe private"}
        self.store.rows.append(ModelVersion(number, "Staging", tags, now(), "run", (), ""))
        self.store.adapters[number] = made

    def approve(self, number):
        row = self.store.rows[number - 1]
        signed = self.service().approvals(signing=True).append(
            model=STREAM, version=number, adapter_sha256=row.adapter_sha256, from_stage="Staging",
            to_stage="Production", who="ada", why="reads well", kind="promote",
        )  # fmt: skip
        tags = {**row.tags, "tidegate.approval": json.dumps(signed)}
        self.store.rows[number - 1] = ModelVersion(number, "Production", tags, row.created_at, "run", (), "")

    def public_keys(self):
        return [f"{p}={self.root / 'keys' / p}.pub" for p in ("receipts", "verdicts", "approvals")]

    def run(self, *arguments):
        return CliRunner().invoke(cli, ["-w", str(self.root), *arguments])


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit") / "ws"
    subprocess.run([sys.executable, "-m", "tidegate", "init", str(root)], check=True, capture_output=True)
    return root


@pytest.fixture
def desk(laid_out, tmp_path):
    made = Desk(tmp_path / "ws", Store())
    shutil.copytree(laid_out, made.root, symlinks=True)
    made.round(1)
    made.approve(1)
    return made


def test_an_export_of_a_workspace_verifies_by_its_folder_alone(desk, tmp_path):
    desk.round(2)
    report, written = audit.export(desk.service(), tmp_path / "sent")
    assert written
    assert audit.export(desk.service(), tmp_path / "sent")[1] is False, "nothing changed since"
    head = desk.service().ledger.head()
    assert report.ledger_head == head
    assert any("2 of 2 rounds were made by the code installed here" in line for line in report.verified)
    assert len((tmp_path / "sent" / "anchors.jsonl").read_text().splitlines()) == 2
    whole = b"".join(p.read_bytes() for p in (tmp_path / "sent").rglob("*") if p.is_file())
    assert b"a person's own" not in whole
    # Elsewhere: no workspace, none of the services' libraries, no network.
    code = (
        "import sys, socket\n"
        f"for name in {FOREIGN!r}: sys.modules[name] = None\n"
        "def refuse(*a, **k): raise RuntimeError('network')\n"
        "socket.socket.connect = refuse\n"
        "from tidegate.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    keys = [part for key in desk.public_keys() for part in ("--key", key)]
    environment = {**os.environ, "TIDEGATE_WORKSPACE": str(tmp_path / "nowhere"), "PYTHONPATH": str(Path.cwd())}

    def verify(*more):
        command = [sys.executable, "-c", code, "audit", "--verify", str(tmp_path / "sent"), *keys, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    done = verify("--expect-head", head, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["holds"] is True
    assert told["ledger_head"] == head
    assert told["streams"][STREAM]["blocks"][0]["rounds"] == [f"{STREAM}-r0001", f"{STREAM}-r0002"]
    plan = tmp_path / "sent" / "rounds" / f"{STREAM}-r0001" / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b'"steps":4', b'"steps":1'))
    done = verify()
    assert done.returncode == 1
    assert f"rounds/{STREAM}-r0001/plan.json: sha256 is" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(verify("--json").stdout)["holds"] is False


def test_audit_checks_the_heads_that_commits_name(desk):
    desk.round(2)
    found = audit.examine(desk.service(), STREAM)
    assert any(line.startswith("anchors: the heads that 2 commits") for line in found["verified"])
    assert [row["installed_code"] for row in found["rounds"]] == [True, True]
    assert audit.anchors(desk.service())[0]["approvals_head"] == "0" * 64, "a commit from before heads stood there"
    named = {"round_id": f"{STREAM}-r0002", "adapter_sha256": "a" * 64, "ledger_head": "e" * 64}
    commit = desk.service().repository().commit_files({"round.json": json.dumps(named).encode()}, "Record a round")
    with pytest.raises(LedgerBehindReceipt, match=f"commit {commit[:12]} .*ledger_head=eeeeeeeeeeeeeeee"):
        audit.examine(desk.service(), STREAM)
    done = desk.run("audit")
    assert isinstance(done.exception, LedgerError)


def test_audit_says_which_rounds_other_code_made(desk, monkeypatch):
    monkeypatch.setattr("tidegate.audit.installed_code", lambda: "f" * 64)
    done = desk.run("audit")
    assert done.exit_code == 0, done.output
    assert "code: 0 of 1 rounds were made by the code installed here" in done.output
    assert f"{STREAM}-r0001: made by other code than is installed" in done.output


def test_an_export_refuses_what_does_not_match_and_writes_nothing(desk, tmp_path):
    service = desk.service()
    receipt = service.workspace.rounds(f"{STREAM}-r0001") / "receipt.json"
    whole = receipt.read_text()
    receipt.write_text(whole.replace('"epsilon": 8', '"epsilon": 1'))
    with pytest.raises(ExportBroken, match=r"receipt\.json: key_id=.*signature does not match"):
        audit.export(desk.service(), tmp_path / "sent")
    receipt.unlink()
    assert audit.export(desk.service(), tmp_path / "sent")[1], "git has it too"
    shutil.rmtree(tmp_path / "sent")
    write_adapter(desk.store.adapters[1], 77)
    assert adapter_sha256(desk.store.adapters[1]) != desk.store.rows[0].adapter_sha256
    with pytest.raises(ExportBroken, match="stored_sha256"):
        audit.export(desk.service(), tmp_path / "sent")
    assert not (tmp_path / "sent").exists()


def test_an_export_needs_the_registry_and_the_receipts_key(desk, tmp_path):
    with pytest.raises(RegistryUnavailable):
        audit.export(Desk(desk.root, Down()).service(), tmp_path / "sent")
    (desk.root / "keys" / "receipts.pem").unlink()
    with pytest.raises(SignatureError, match=r"receipts\.pem"):
        audit.export(desk.service(), tmp_path / "sent")
    assert not (desk.root / "keys" / "receipts.pem").exists(), "an audit makes no key"
    assert not (tmp_path / "sent").exists()


def test_options_that_do_not_go_together_are_refused(desk, tmp_path):
    for arguments, says in (
        (("--verify", "x"), "--verify needs --key"),
        (("--key", "ab" * 32), "go with --verify"),
        (("--expect-head", "ab" * 32), "go with --verify"),
        (("--verify", "x", "--export", "y"), "at a time"),
        ((STREAM, "--export", "y"), "at a time"),
    ):
        done = desk.run("audit", *arguments)
        assert done.exit_code == 2
        assert says in done.output


def test_keys_are_listed_sent_and_changed(desk, tmp_path):
    first = SigningKey.load_existing(desk.root / "keys" / "receipts.pem").public
    done = desk.run("keys", "rotate", "receipts")
    assert done.exit_code == 0, done.output
    assert f"receipts: {first.key_id} is retired since" in done.output
    desk.round(2)
    rows = json.loads(desk.run("keys", "list", "--json").output)
    mine = [row for row in rows if row["purpose"] == "receipts"]
    assert [row["private_key_here"] for row in mine] == [False, True]
    assert mine[0]["valid_until"] == mine[1]["valid_from"] != ""
    assert len(rows) == 4
    assert first.fingerprint in desk.run("keys", "list").output
    assert first.pem in desk.run("keys", "export", "receipts").output
    assert desk.run("keys", "export", "receipts", "--out", str(tmp_path / "sent.pem")).exit_code == 0
    assert audit.export(desk.service(), tmp_path / "sent")[1]
    keys = [f"receipts={tmp_path / 'sent.pem'}", *desk.public_keys()[1:]]
    assert audit.check(tmp_path / "sent", keys, []).ledger_head == desk.service().ledger.head()
    # What waits for a round to end is refused, not queued.
    from tidegate.cycle import only_round

    with only_round(desk.service(), STREAM):
        refused = desk.run("keys", "rotate", "receipts")
    assert "a round runs already" in str(refused.exception)


def test_keys_on_another_mount_sign_and_are_trusted(desk, tmp_path):
    away = tmp_path / "mount"
    (desk.root / "keys").rename(away)
    text = (desk.root / "params.yaml").read_text()
    (desk.root / "params.yaml").write_text(text.replace("directory: keys ", f"directory: {away} "))
    desk.round(2)
    assert not (desk.root / "keys").exists()
    assert audit.export(desk.service(), tmp_path / "sent")[1]
    assert desk.run("audit").exit_code == 0


def test_the_key_of_approvals_may_be_kept_on_another_machine(desk, tmp_path):
    away = tmp_path / "approvals.pem"
    (desk.root / "keys" / "approvals.pem").rename(away)
    again = desk.run("init", str(desk.root))
    assert again.exit_code == 0, again.output
    assert not (desk.root / "keys" / "approvals.pem").exists()
    assert desk.run("audit").exit_code == 0
    approvals = desk.service().approvals(signing=True)
    with pytest.raises(SignatureError, match="only its public half"):
        desk.approve(1)
    approvals.close()


def test_an_audit_says_where_weights_were_pruned_and_verifies_all_the_same(desk):
    row = desk.store.rows[0]
    told = {"at": now(), "who": "ada", "why": "over", "adapter_sha256": row.adapter_sha256, "versions": {}}
    write_json(desk.root / "pruned" / f"{row.adapter_sha256}.json", told)
    done = desk.run("audit")
    assert done.exit_code == 0, done.output
    assert f"{STREAM}-r0001: weights pruned {told['at']}; its papers are all here" in done.output
