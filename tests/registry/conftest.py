"""Real MLflow servers, real keys, tiny real adapters; documents signed as a round would sign them."""

import itertools
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from learner.adapter import adapter_sha256
from privacy.signing import SigningKey
from registry.mlflow_store import Candidate, Dataset, MlflowStore
from registry.roles import SERVICES
from registry.server import Logins, MlflowServer

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8cfc0f01f00"
    "050001ff89993d1d0000000049454e44ae426082"
)
DATASETS = (
    Dataset("desk blocks", "training", "d" * 39 + "e", "dvc", {"revision": "d" * 39 + "e"}, {"blocks": "3"}),
    Dataset("desk gate set", "gates", "9" * 63 + "8", "gate-set", {"name": "desk"}),
)
_seeds = itertools.count(1)
PASSWORD = "a-long-enough-secret"
# People of the server with logins, and their roles by model.
PEOPLE = {
    "viewer": {"desk": ["viewer"], "other": ["viewer"], "counter": ["viewer"]},
    "trainer": {"desk": ["trainer"], "other": ["trainer"], "counter": ["trainer"]},
    "approver": {"desk": ["approver"], "other": ["approver"], "counter": ["approver"]},
    "both": {"counter": ["trainer", "approver"], "solo": ["trainer", "approver"]},
    "elsewhere": {"other": ["approver"]},
}
SECURED = ["desk", "other", "counter", "solo"]


def write_adapter(folder: Path, seed: int, numbers: int = 2) -> str:
    """A safetensors file with one tensor of so many numbers, and peft's config; its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({"lora_A.weight": told}).encode()
    weights = struct.pack("<Q", len(header)) + header + struct.pack("<ff", seed, -seed) * (numbers // 2)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    return adapter_sha256(folder)


@dataclass
class World:
    """A workspace, and a store that speaks to an MLflow started on it; its adapters hold so many numbers."""

    root: Path
    store: MlflowStore
    rounds: itertools.count = field(default_factory=lambda: itertools.count(1))
    numbers: int = 2

    def key(self, purpose: str) -> SigningKey:
        (self.root / "keys").mkdir(exist_ok=True)
        return SigningKey.load_or_create(self.root / "keys" / f"{purpose}.pem")

    def documents(
        self, sha: str, parent: str = "", outcome: str = "passed", round_id: str = "", **changes
    ) -> dict[str, str]:
        """The tags of a version that came out of a round; of several rounds' versions of one adapter, say which."""
        verdict = {"adapter_sha256": sha, "parent_sha256": parent or None, "outcome": outcome, "gates": [round_id]}
        guarantee = {"unit": "record", "adjacency": "null", "epsilon": 8.0, "delta": 1e-5}
        plan = round_id or "0" * 64
        receipt = {"plan_hash": plan, "adapter_sha256": sha, "ledger_head": "0" * 64, "guarantee": guarantee}
        state = "candidate" if outcome == "passed" else outcome
        return {
            "tidegate.state": state,
            "tidegate.adapter_sha256": sha,
            "tidegate.parent_sha256": parent,
            "tidegate.verdict": json.dumps(self.key("verdicts").sign(verdict)),
            "tidegate.receipt": json.dumps(self.key("receipts").sign(receipt)),
        } | changes

    def candidate(self, model: str, parent: str = "", outcome: str = "passed", tags=None) -> tuple[int, str]:
        """Register what a round made; passed ones go to Staging. Returns (version, adapter sha256)."""
        round_id = f"{model}-{next(self.rounds)}"
        folder = self.root / "made" / round_id
        sha = write_adapter(folder, next(_seeds), self.numbers)
        given = self.documents(sha, parent, outcome) if tags is None else tags(sha)
        version = self.store.register(
            Candidate(
                model=model,
                round_id=round_id,
                attempt=1,
                adapter_dir=folder,
                tags=given | {"tidegate.round_id": round_id, "tidegate.attempt": "1"},
                description_md="## Verdict: passed\n\n| gate | value |\n|---|---|\n| accuracy | 0.83 |\n\n"
                "![accuracy per domain](accuracy.png)\n\n[The whole report](report.html)\n",
                artifacts={"accuracy.png": PNG, "report.html": b"<!DOCTYPE html><title>passed</title>"},
                metrics={"accuracy": 0.83},
                params={"sigma": "0.98"},
                datasets=DATASETS,
            )
        )
        if given.get("tidegate.state") == "candidate":
            self.store.to_staging(model, version)
        return version, sha

    def stages(self, model: str) -> dict[int, str]:
        return {v.version: v.stage for v in self.store.versions(model)}

    def states(self, model: str) -> dict[int, str]:
        return {v.version: v.tag("state") for v in self.store.versions(model)}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A workspace whose MLflow runs with the guard."""
    root = tmp_path_factory.mktemp("ws")
    (root / "keys").mkdir()
    with MlflowServer(root, port=0, open_models=["open, to all"]) as server:
        store = MlflowStore(server.url)
        world = World(root, store)
        world.server = server
        yield world
        store.close()


@pytest.fixture(scope="session")
def secured(tmp_path_factory):
    """The same with logins: `store` is the learner's, `stores` everybody's by name."""
    root = tmp_path_factory.mktemp("secured")
    (root / "keys").mkdir()
    for role in SERVICES:
        (root / "keys" / f"mlflow_{role}").write_text(PASSWORD)
    logins = Logins(PASSWORD, "not a secret here", SECURED, ["solo"])
    with MlflowServer(root, port=0, logins=logins) as server:
        admin = MlflowStore(server.url, ("admin", PASSWORD))
        for name, roles in PEOPLE.items():
            admin.add_user(name, PASSWORD)
            for model, given in roles.items():
                for role in given:
                    admin.grant(name, role, model)
        users = {"admin": "admin", **{name: name for name in PEOPLE}, **{str(r): n for r, n in SERVICES.items()}}
        stores = {name: MlflowStore(server.url, (user, PASSWORD)) for name, user in users.items()}
        world = World(root, stores["learner"])
        world.server, world.stores, world.users = server, stores, users
        yield world
        for store in (admin, *stores.values()):
            store.close()


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    """A workspace and an MLflow that takes no plugin, as a managed one."""
    root = tmp_path_factory.mktemp("managed")
    (root / "keys").mkdir()
    with PlainMlflow(root, port=0) as server:
        store = MlflowStore(server.url)
        yield World(root, store)
        store.close()


class PlainMlflow(MlflowServer):
    """The same server without `--app-name tidegate`."""

    _HEALTH = "/health"

    def _command(self) -> list[str]:
        command = super()._command()
        at = command.index("--app-name")
        return command[:at] + command[at + 2 :]
