"""Candidates as a registry lists them, with documents signed as a round signs them."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from learner.adapter import adapter_sha256
from privacy.signing import SigningKey
from registry.promotion import Trust, proven
from registry.states import STAGING, ModelVersion
from tests.serving.registry import MODEL


@dataclass
class Waiting:
    """The versions of one model, and the keys their documents are signed with."""

    keys: Path
    folders: dict[int, Path]
    versions: list[ModelVersion] | None = None
    open_models: frozenset[str] = frozenset()
    fetched: list[int] = field(default_factory=list)

    def key(self, purpose: str) -> SigningKey:
        return SigningKey.load_or_create(self.keys / f"{purpose}.pem")

    def candidate(self, number: int, *, outcome: str = "passed", epsilon=8.0, sha: str = "", **tags) -> ModelVersion:
        """Add a version in Staging."""
        sha = sha or adapter_sha256(self.folders[number])
        verdict = {"adapter_sha256": sha, "parent_sha256": None, "outcome": outcome, "gates": []}
        guarantee = {"unit": "record", "adjacency": "null", "epsilon": epsilon, "delta": 1e-5}
        receipt = {"plan_hash": "0" * 64, "adapter_sha256": sha, "ledger_head": "0" * 64, "guarantee": guarantee}
        told = {
            "state": "candidate",
            "adapter_sha256": sha,
            "verdict": json.dumps(self.key("verdicts").sign(verdict)),
            "receipt": json.dumps(self.key("receipts").sign(receipt)),
        }
        made = ModelVersion(
            number,
            STAGING,
            {f"tidegate.{k}": v for k, v in (told | tags).items()},
            "2026-11-24T12:00:00Z",
            "run",
            (),
            "",
        )
        self.versions = [*(self.versions or ()), made]
        return made

    def change(self, number: int, *, stage: str = STAGING, **tags) -> None:
        """What somebody with rights in the registry may do to a version."""
        changed = {f"tidegate.{name}": value for name, value in tags.items()}
        self.versions = [
            replace(v, stage=stage, tags={**v.tags, **changed}) if v.version == number else v for v in self.versions
        ]

    def seen(self):
        return self.versions

    def prove(self, version: ModelVersion) -> str:
        return proven(MODEL, version, Trust.from_dir(self.keys, self.open_models))

    def fetch(self, version: int, dest: Path) -> Path:
        self.fetched.append(version)
        shutil.copytree(self.folders[version], dest)
        return dest
