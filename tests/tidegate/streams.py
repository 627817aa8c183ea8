"""A workspace whose blocks and versions are made by hand: no broker, no registry, no training."""

import json
from functools import cached_property

import yaml

from ingest.manifest import Manifest
from registry.states import ModelVersion
from tidegate import wiring
from tidegate.config import load
from tidegate.workspace import Workspace, lay_out

STREAM = "support-desk"


class HandMade(wiring.Service):
    """A service that has the manifests and versions it is given, and a real ledger."""

    @cached_property
    def made(self):
        return {"manifests": [], "versions": [], "records": {}}

    def repository(self):
        return self

    def pin(self, _stream):
        return "0" * 40

    def manifests(self, _stream, revision=None):  # noqa: ARG002 - as the repository's
        return list(self.made["manifests"])

    def checkout(self, _revision, _dest):
        return self

    def records(self, manifest, split="train"):
        return self.made["records"].get((manifest.block_id, split), [])

    @property
    def store(self):
        return self

    def versions(self, _model, **_options):
        return list(self.made["versions"])


def workspace(root, **changes):
    """A laid-out workspace; `changes` are sections of the stream's settings."""
    lay_out(root)
    file = root / "params.yaml"
    params = yaml.safe_load(file.read_text())
    for section, values in changes.items():
        params["streams"][STREAM][section].update(values)
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    return HandMade(Workspace(root), load(file, {}))


def seal(service, number, units=500):
    """A sealed block as the data repository would tell it."""
    block = f"{STREAM}-0-{number:09d}"
    manifest = Manifest.model_validate(
        {
            "block_id": block,
            "stream": STREAM,
            "lane": f"{STREAM}-0",
            "seq": number,
            "topic": STREAM,
            "incarnation": "x",
            "offsets": [{"partition": 0, "start": (number - 1) * units, "end": number * units}],
            "schema_version": 1,
            "suite_sha256": "0" * 64,
            "counts": {"sealed": units, "rejected": 0, "duplicate": 0, "set_aside": 0},
            "files": [],
            "nonce": "0" * 32,
            "policy": service.policy(STREAM).frozen(units),
        }
    )
    service.made["manifests"].append(manifest)
    return block


def go_live(service, *blocks, sha="d" * 64):
    """A version in Production, approved, that was trained on these blocks."""
    approval = service.signer("approvals").sign({"adapter_sha256": sha})
    plan = {"blocks": [{"id": block, "q": 0.1} for block in blocks]}
    tags = {"adapter_sha256": sha, "approval": json.dumps(approval), "plan": json.dumps(plan)}
    service.made["versions"].append(
        ModelVersion(
            version=1,
            stage="Production",
            tags={f"tidegate.{name}": value for name, value in tags.items()},
            created_at="2026-01-01T00:00:00Z",
            run_id="r",
            aliases=(),
            description="",
        )
    )
    return sha
