"""A round without privacy, by the real cycle, ledger, gates and signatures: possible, marked, and never for a private
stream. Blocks and registry are made by hand, the base is tiny."""

import json
import shutil
from dataclasses import replace

import pytest

from evaluation.gates import _private_noise
from learner.errors import PlanError
from learner.plan import RoundPlan, plan_round
from privacy.audit import audit
from privacy.case import GivenKey
from privacy.errors import ExportBroken, LedgerError
from privacy.ledger import Ledger
from privacy.policy import NO_PRIVACY
from privacy.rotation import PURPOSES, known_keys
from privacy.verify import make, verify
from registry.errors import PromotionRefused
from registry.promotion import Promotions, Trust
from registry.states import ModelVersion
from serving.approval import read_approval
from serving.errors import ApprovalRefused
from tests.evaluation.planted import write_gate_set
from tests.learner.rounds import records
from tests.tidegate.streams import STREAM, HandMade, seal, workspace
from tidegate import ancestry, cycle
from tidegate.audit import gather
from tidegate.budget import look
from tidegate.config import load
from tidegate.errors import RoundRefused
from tidegate.evidence import facts_about
from tidegate.planning import make_plan, survey
from tidegate.rollback import roll_back
from tidegate.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

UNITS = 30
GATE = {"metric": "accuracy", "against": "absolute", "bound": 0.0}
OFF = {"enabled": False, "holdout_share": 0.0}


class Desk(HandMade):
    """A service with a registry in memory, and a repository that keeps what is committed."""

    def _kept(self):
        return self.made.setdefault("kept", {})

    def commit_files(self, paths, _message):
        self._kept().update(paths)

    def committed_files(self, name):
        return [("c" * 40, self._kept()[name])] if name in self._kept() else []

    def committed_file(self, name, _commit=None):
        return self._kept().get(name)

    def register(self, candidate):
        number = len(self.made["versions"]) + 1
        made = ModelVersion(
            number, "None", dict(candidate.tags), "2026-01-01T00:00:00Z", "run", (), candidate.description_md
        )
        self.made["versions"].append(made)
        self.made[number] = candidate
        return number

    def _change(self, number, **changes):
        rows = self.made["versions"]
        rows[number - 1] = replace(rows[number - 1], **changes)

    def to_staging(self, model, number):
        self.move(model, number, "Staging")

    def archive(self, model, number, *, state):
        self.set_tag(model, number, "tidegate.state", state)

    def move(self, _model, number, stage, *, archive_existing=False):  # noqa: ARG002 - as the registry's
        self._change(number, stage=stage)

    def set_tag(self, _model, number, key, value):
        self._change(number, tags={**self.made["versions"][number - 1].tags, key: value})

    def fetch_adapter(self, _model, number, dest):
        return shutil.copytree(self.made[number].adapter_dir, dest, dirs_exist_ok=True)

    def sealed(self, number):
        block = seal(self, number, units=UNITS)
        self.made["records"][block, "train"] = records(UNITS, seed=number, block=block)
        return block

    def promotions(self, trust):
        return Promotions(self, self.approvals(signing=True), trust)

    def switched_on(self):
        """The same workspace once privacy is on."""
        file = self.workspace.root / "params.yaml"
        file.write_text(file.read_text().replace("enabled: false", "enabled: true"))
        made = Desk(Workspace(self.workspace.root), load(file, {}))
        made.made.update(self.made)
        return made

    def given(self):
        return [GivenKey(p, k.public.fingerprint) for p in PURPOSES for k in known_keys(self.keys_dir, p)]


def desk(root, base, **privacy):
    learner = {"steps": 2, "expected_batch": 8, "checkpoint_steps": 1, "system": "", "max_tokens": 64}
    learner["lora"] = {"r": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"], "layers": 1}
    judged = {"gates": [GATE], "samples_min": 1, "samples_per_domain_min": 1}
    workspace(root, privacy=privacy, learner=learner, evaluation=judged)
    file = root / "params.yaml"
    file.write_text(file.read_text().replace("base: smollm2-135m", f"base: {base.path}"))
    write_gate_set(root / "gates" / f"{STREAM}.jsonl", per_domain=2)
    return Desk(Workspace(root), load(file, {}))


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory):
    """One round without privacy, from sealed block to candidate, interrupted once after its last step."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("open")
        patch.setenv("TIDEGATE_BASES", str(root / "bases"))
        service = desk(root / "ws", tiny, **OFF)
        service.sealed(1)
        with pytest.MonkeyPatch.context() as crash:
            crash.setattr(Ledger, "commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cycle.run(service, STREAM)
        yield service, cycle.run(service, STREAM)


@pytest.fixture
def service(ended, tmp_path):
    """A copy of the workspace after that round, for a test to change."""
    old, _ = ended
    shutil.copytree(old.workspace.root, tmp_path / "ws", symlinks=True)
    made = Desk(Workspace(tmp_path / "ws"), load(tmp_path / "ws" / "params.yaml", {}))
    made.made.update({key: list(value) if isinstance(value, list) else value for key, value in old.made.items()})
    return made


def approved(service):
    return service.promotions(service.trust).promote(STREAM, 1, who="ada", why="public records")


def test_it_ends_as_a_candidate_and_every_paper_says_that_there_is_no_privacy(ended):
    service, end = ended
    assert (end.outcome, end.state, end.epsilon, end.delta, end.promise) == (
        "passed",
        "candidate",
        None,
        None,
        NO_PRIVACY,
    )
    assert "trained WITHOUT PRIVACY" in end.reasons[0]
    rows = service.ledger.rows(STREAM)
    assert [(row.attempt, row.state, row.noise_source, row.charges) for row in rows] == [
        (1, state, "none", ()) for state in ("reserved", "started", "committed")
    ], "it went on where it was interrupted"
    (version,) = service.versions(STREAM)
    receipt = ancestry.signed_tag(version, "receipt", service.trusted("receipts"))
    assert receipt["guarantee"] | {"horizon": ""} == {
        "unit": "record",
        "adjacency": "add-remove one unit",
        "epsilon": None,
        "delta": None,
        "horizon": "",
        "claim": "none",
    }
    assert version.tag("guarantee") == "none"
    assert "trained WITHOUT PRIVACY" in version.description.splitlines()[0]
    assert "nothing is promised to anybody" in version.description
    assert "no noise was added" in service.made[1].artifacts["report.html"].decode()
    assert not {"epsilon", "delta"} & service.made[1].metrics.keys()
    assert ancestry.guarantee(version, service.trusted("receipts")) == NO_PRIVACY
    assert not list((service.workspace.root / "checkpoints").rglob("round.key"))


def test_an_auditor_verifies_it_and_reads_that_nobody_was_promised_anything(service):
    approved(service)
    files = make(gather(service), service.signer("receipts"))
    report = verify(files, service.given())
    said = files["STATEMENT.md"].decode()
    assert f"there is no privacy** ({STREAM}-0-000000001)" in said
    assert f"Rounds WITHOUT PRIVACY, on blocks without a promise: {STREAM}-r0001." in said
    assert f"{STREAM} version 1 (without privacy)" in said
    assert "differentially private with respect to" not in said
    assert any("1 of versions WITHOUT PRIVACY" in line for line in report.verified)
    found = audit(service.ledger, STREAM)
    assert (found.claim, found.epsilon) == (f"{NO_PRIVACY} (1 blocks)", None)
    assert found.rounds_without_privacy == (f"{STREAM}-r0001",)
    assert found.as_json() == report.streams[STREAM].as_json()


def test_an_approval_that_hides_it_does_not_verify(service):
    row = approved(service)
    bare = {name: value for name, value in row.items() if name not in {"guarantee", "key_id", "signature"}}
    evidence = replace(gather(service), approvals=(service.signer("approvals").sign(bare),))
    with pytest.raises(ExportBroken, match="guarantee"):
        verify(make(evidence, service.signer("receipts")), service.given())


def test_on_an_open_stream_a_person_may_approve_it_and_the_approval_says_so(service):
    row = approved(service)
    assert (row["kind"], row["guarantee"]) == ("promote", "none")
    trusted = service.trusted("approvals")
    assert read_approval(row, trusted, STREAM, open_stream=True).guarantee == "none"
    withdrawn = service.promotions(service.trust).withdraw(STREAM, 1, to_stage="Archived", who="ada", why="off")
    assert withdrawn["guarantee"] == "none"


def test_no_private_stream_approves_or_serves_it(service):
    guard = service.promotions(Trust.from_dir(service.keys_dir))
    with pytest.raises(PromotionRefused, match=r"trained without privacy.*a stream of its own"):
        guard.promote(STREAM, 1, who="ada", why="anyway")
    assert service.approvals().history(STREAM) == []
    row = approved(service)
    with pytest.raises(PromotionRefused, match="trained without privacy"):
        roll_back(service.switched_on(), STREAM, to=1, why="down", who="ada", emergency=True)
    with pytest.raises(ApprovalRefused, match=r"version 1 was trained without privacy.*a stream of its own"):
        read_approval(row, service.trusted("approvals"), STREAM)


def test_a_stream_is_private_once_it_says_so_or_anybody_was_promised_anything(service):
    assert service.is_open(STREAM)
    on = service.switched_on()
    assert not on.is_open(STREAM)
    on.sealed(2)
    service.made["manifests"] = on.made["manifests"]
    assert not service.is_open(STREAM), "it is off again, but one block was sealed with a promise"
    assert service.trust.open_models == frozenset()


def test_its_gate_fails_on_a_private_stream_with_the_way_out(service, tiny):
    (version,) = service.versions(STREAM)
    plan = RoundPlan.model_validate(json.loads(version.tag("plan")))
    facts = facts_about(service, plan, service.made[1].adapter_dir, version.adapter_sha256, tiny)
    assert _private_noise(facts).outcome == "passed"
    gate = _private_noise(replace(facts, open_stream=False))
    assert (gate.outcome, gate.hard) == ("failed", True)
    assert "a stream of its own" in gate.sentence


def test_a_private_round_neither_uses_its_blocks_nor_starts_from_its_weights(service):
    approved(service)
    on = service.switched_on()
    first = survey(on, STREAM, on.versions(STREAM))
    assert "no block is sealed with privacy yet; 1 were sealed without" in first.idle
    new = on.sealed(2)
    found = survey(on, STREAM, on.versions(STREAM))
    assert ([block.block_id for block in found.new], len(found.apart)) == ([new], 1)
    with pytest.raises(RoundRefused, match=r"version 1 is live and was trained without privacy.*Archived"):
        make_plan(on, STREAM, lambda *_: None, test_noise=False)
    service.promotions(service.trust).withdraw(STREAM, 1, to_stage="Archived", who="ada", why="privacy is on")
    on.made["versions"] = service.made["versions"]
    plan = make_plan(on, STREAM, lambda *_: None, test_noise=False)
    assert (plan.parent_sha256, plan.noise_source, [block.id for block in plan.blocks]) == (None, "system", [new])


def test_the_two_kinds_of_blocks_are_never_in_one_round(service):
    on = service.switched_on()
    on.sealed(2)
    bare, promised = survey(service, STREAM, ()).new[0], survey(on, STREAM, ()).new[0]
    arguments = {"round_id": "r", "attempt": 1, "stream": STREAM, "parent_sha256": None, "base_sha256": "b" * 64}
    arguments |= {"data_revision": "d", "expected_batch": 8, "steps": 2}
    for noise, new in (("system", [bare]), ("none", [promised]), ("none", [bare, promised]), ("test", [bare])):
        with pytest.raises(PlanError, match=r"sealed (with|without) privacy"):
            plan_round(**arguments, new=new, noise_source=noise)
    charges = plan_round(**arguments, new=[promised]).charges()
    with pytest.raises(LedgerError, match="sealed with a promise"):
        service.ledger.reserve(STREAM, "r", 1, "p", (), noise_source="none", uncharged=[promised.block_id])
    with pytest.raises(LedgerError, match="sealed without privacy"):
        forged = [replace(charge, block_id=bare.block_id) for charge in charges]
        service.ledger.reserve(STREAM, "r", 1, "p", forged)
    with pytest.raises(LedgerError, match="must charge no block"):
        service.ledger.reserve(STREAM, "r", 1, "p", charges, noise_source="none", uncharged=[bare.block_id])


def test_nothing_is_left_to_run_out_of(service):
    found = look(service, STREAM, service.versions(STREAM))
    assert (found.promise, found.share_used_max, found.alarms) == (NO_PRIVACY, 0.0, ())
