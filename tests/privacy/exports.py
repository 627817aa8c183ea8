"""A small service's papers, made by hand: approved rounds, one of test noise, one cancelled, every key changed once."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from privacy import chain, tables
from privacy.canonical import sha256_of
from privacy.case import GivenKey
from privacy.export import Evidence, Papers, key_entry
from privacy.ledger import Charge, Ledger
from privacy.policy import Policy
from privacy.receipts import make_receipt
from privacy.rotation import PURPOSES, known_keys, rotate, rotations
from privacy.signing import SigningKey
from privacy.verify import PRODUCTION, make
from registry.approvals import Approvals, now

CODE = "c0de" * 16
BASE = "ba5e" * 16
MODEL = "desk"


def adapter(number):
    return f"{number}" * 64


def make_plan(round_id, attempt, blocks, parent, noise="system", sigma=2.2):
    return {
        "round_id": round_id,
        "attempt": attempt,
        "stream": "s",
        "parent_sha256": parent,
        "base_sha256": BASE,
        "data_revision": "d" * 40,
        "unit": "record",
        "blocks": [{"id": name, "q": 0.25} for name in blocks],
        "sigma": sigma,
        "steps": 30,
        "noise_source": noise,
        "code_sha256": CODE,
    }


@dataclass
class World:
    """A workspace's proofs without its data."""

    root: Path
    papers: dict = field(default_factory=dict)
    versions: list = field(default_factory=list)
    anchors: list = field(default_factory=list)
    gates: list = field(default_factory=lambda: [{"name": "better", "value": 0.25, "data": "public"}])

    def __post_init__(self):
        (self.root / "keys").mkdir(parents=True)
        self.ledger = Ledger(f"sqlite:///{self.root / 'ledger.db'}")
        self.approvals = Approvals(f"sqlite:///{self.root / 'approvals.db'}")
        for purpose in PURPOSES:
            self.key(purpose)
        for name in ("b1", "b2", "b3"):
            self.ledger.register_block("s", name, Policy("record", 8.0, 1e-5).frozen(500))

    def key(self, purpose):
        return SigningKey.load_or_create(self.root / "keys" / f"{purpose}.pem")

    def given(self, **changes):
        """The first keys, as an auditor got them before anything was changed."""
        keys = {p: known_keys(self.root / "keys", p)[0].public.fingerprint for p in PURPOSES} | changes
        return [GivenKey(purpose, found) for purpose, found in keys.items() if found]

    def rotate(self, *purposes):
        for purpose in purposes:
            rotate(
                self.root / "keys",
                purpose,
                ledger_head=self.ledger.head(),
                approvals_head=self.approvals.head(),
            )

    def reserve(self, plan):
        bare = plan["noise_source"] == "none"
        blocks = [] if bare else plan["blocks"]
        charges = [Charge(b["id"], b["q"], plan["sigma"], plan["steps"]) for b in blocks]
        name = (plan["round_id"], plan["attempt"], sha256_of(plan))
        uncharged = ["bare"] if bare else []
        self.ledger.reserve("s", *name, charges, noise_source=plan["noise_source"], uncharged=uncharged)
        return name

    def round(self, number, blocks, *, parent=None, attempt=1, noise="system", outcome="passed", register=True):
        """Run a round to its end, as far as papers go."""
        plan = make_plan(f"s-r{number}", attempt, blocks, parent, noise)
        name, sha = self.reserve(plan), adapter(number)
        self.ledger.start(*name)
        self.ledger.commit(*name, sha)
        receipt = make_receipt(
            plan_hash=name[2],
            adapter_sha256=sha,
            ledger_head=self.ledger.head(),
            unit="record",
            epsilon=8.0 if noise == "system" else None,
            delta=None if noise == "none" else 1e-5,
            claim="none" if noise == "none" else "",
            signer=self.key("receipts"),
        )
        verdict = {
            "adapter_sha256": sha,
            "parent_sha256": parent,
            "base_sha256": BASE,
            "outcome": outcome,
            "reasons": [],
            "gates": self.gates,
            "gate_set": {"name": "g", "sha256": "e" * 64, "n": 100, "data": "public"},
            "made_at": now(),
        }
        self.papers[plan["round_id"]] = Papers(plan, receipt, self.key("verdicts").sign(verdict))
        if register:
            self.register(plan["round_id"], outcome)

    def register(self, round_id, outcome):
        papers, number = self.papers[round_id], len(self.versions) + 1
        plan, sha = papers.plan, papers.receipt["adapter_sha256"]
        tags = {
            "state": outcome,
            "stream": "s",
            "round_id": round_id,
            "attempt": str(plan["attempt"]),
            "adapter_sha256": sha,
            "parent_sha256": plan["parent_sha256"] or "",
            "base_sha256": BASE,
            "base_licence": "Apache-2.0",
            "data_revision": plan["data_revision"],
            "plan_hash": sha256_of(plan),
            "plan": json.dumps(plan, sort_keys=True),
            "receipt": json.dumps(papers.receipt, sort_keys=True),
            "verdict": json.dumps(papers.verdict, sort_keys=True),
        }
        self.versions.append(
            {
                "model": MODEL,
                "version": number,
                "stage": "Staging",
                "created_at": now(),
                "aliases": [],
                "tags": {f"tidegate.{name}": value for name, value in tags.items()},
                "stored_sha256": sha,
            }
        )
        self.anchors.append(
            {
                "commit": f"{number}" * 40,
                "round_id": round_id,
                "adapter_sha256": sha,
                "ledger_head": papers.receipt["ledger_head"],
                "approvals_head": self.approvals.head(),
            }
        )

    def decide(self, version, kind="promote", to=PRODUCTION, source="Staging", **changes):
        entry = self.versions[version - 1]
        signing = Approvals(f"sqlite:///{self.root / 'approvals.db'}", self.key("approvals"))
        fields = {
            "model": MODEL,
            "version": version,
            "adapter_sha256": entry["stored_sha256"],
            "from_stage": source,
            "to_stage": to,
            "who": "ada",
            "why": "reads well",
            "kind": kind,
        } | changes
        signed = signing.append(**fields)
        signing.close()
        entry["stage"] = to
        if to == PRODUCTION:
            entry["tags"]["tidegate.approval"] = json.dumps(signed)
            for other in self.versions:
                if other is not entry and other["stage"] == PRODUCTION:
                    other["stage"] = "Archived"

    def evidence(self):
        with tables.reading(self.ledger._engine) as db:
            blocks, rows = chain.read_blocks(db), chain.read_rows(db)
        folder = self.root / "keys"
        return Evidence(
            blocks=tuple(blocks),
            rows=tuple(rows),
            rounds=dict(self.papers),
            approvals=tuple(self.approvals.history()),
            versions=tuple(self.versions),
            anchors=tuple(self.anchors),
            keys=tuple(key_entry(key) for purpose in PURPOSES for key in known_keys(folder, purpose)),
            rotations=tuple(dict(r.signed) for purpose in PURPOSES for r in rotations(folder, purpose)),
        )

    def files(self, evidence=None, **changes):
        """A sealed export; `changes` replace parts of the evidence, as an operator could who holds every key."""
        found = replace(evidence or self.evidence(), **changes)
        return make(found, self.key("receipts"))

    def close(self):
        self.ledger.close()
        self.approvals.close()


def whole_world(root):
    """Everything that an export can hold, in a few rows."""
    world = World(root)
    world.round(1, ["b1"])
    world.decide(1)
    world.rotate("receipts", "verdicts", "approvals")
    lost = make_plan("s-r2", 1, ["b1", "b2"], adapter(1))
    name = world.reserve(lost)
    world.ledger.start(*name)
    world.round(2, ["b1", "b2"], parent=adapter(1), attempt=2)
    world.decide(2)
    cancelled = make_plan("s-r3", 1, ["b3"], adapter(2))
    world.ledger.cancel(*world.reserve(cancelled))
    world.round(4, ["b3"], parent=adapter(2), noise="test", outcome="failed")
    world.decide(1, kind="rollback", source="Archived")
    return world
