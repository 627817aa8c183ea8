"""A registry as serving sees one: three functions, with signed approvals and adapters in folders."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from learner.adapter import adapter_sha256
from privacy.signing import SigningKey, TrustedKeys
from serving.approval import Wanted

MODEL = "desk"


@dataclass
class Registry:
    """What a test does to it is what an MLflow server might do."""

    signer: SigningKey
    folders: dict[int, Path]
    production: Wanted | None = None
    down: bool = False
    failure: Exception | None = None
    seq: int = 0
    acknowledged: list[int] = field(default_factory=list)
    fetched: list[int] = field(default_factory=list)

    def approval(self, version: int, **changes) -> dict:
        self.seq += 1
        payload = {
            "seq": self.seq,
            "model": MODEL,
            "version": version,
            "adapter_sha256": adapter_sha256(self.folders[version]),
            "from": "Staging",
            "to": "Production",
            "who": "pat",
            "when": "2026-11-24T12:00:00Z",
            "why": "better",
            "kind": "promote",
            "prev_hash": "0" * 64,
        }
        return self.signer.sign({**payload, **changes})

    def promote(self, version: int, **changes) -> Wanted:
        approval = self.approval(version, **changes)
        self.production = Wanted(MODEL, version, "Production", str(approval["adapter_sha256"]), approval)
        return self.production

    def tamper(self, **changes) -> None:
        self.production = replace(self.production, **changes)

    def wanted(self) -> Wanted | None:
        self._answer()
        return self.production

    def fetch(self, version: int, dest: Path) -> Path:
        self._answer()
        self.fetched.append(version)
        shutil.copytree(self.folders[version], dest)
        return dest

    def acknowledge(self, version: int) -> None:
        self._answer()
        self.acknowledged.append(version)

    def _answer(self) -> None:
        if self.down:
            raise ConnectionError("connection refused")
        if self.failure:
            raise self.failure


def trusted(signer: SigningKey) -> TrustedKeys:
    return TrustedKeys([signer.public])
