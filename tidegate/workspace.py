"""The workspace: the folder that holds everything but the code. A backup of it is a backup of the service."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.errors import WorkspaceError

# The checkout's own params.yaml and dvc.yaml are the templates of a workspace's.
CHECKOUT = Path(__file__).resolve().parent.parent
# What the gates of the template read, and where a workspace has it.
_GATE_FILES = {
    "support-desk-gates.jsonl": "support-desk.jsonl",
    "toxicity-prompts.jsonl": "toxicity-prompts.jsonl",
}
ENV_WORKSPACE = "TIDEGATE_WORKSPACE"


@dataclass(frozen=True)
class Workspace:
    """Paths below one root. Making one touches nothing on disk."""

    root: Path

    @property
    def params(self) -> Path:
        """The settings file."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The git + DVC data repository."""
        return self.root / "data"

    @property
    def remote(self) -> Path:
        """The embedded DVC remote."""
        return self.root / "data-remote"

    @property
    def mlflow(self) -> Path:
        """The embedded MLflow's backend and artifacts."""
        return self.root / "mlflow"

    @property
    def broker(self) -> Path:
        """The embedded broker's log."""
        return self.root / "broker"

    @property
    def adapters(self) -> Path:
        """Trained adapters, each in a folder named by its sha256."""
        return self.root / "adapters"

    @property
    def bases(self) -> Path:
        """Prepared base models; shared between workspaces by TIDEGATE_BASES."""
        return Path(os.environ.get("TIDEGATE_BASES", self.root / "base"))

    @property
    def asked(self) -> Path:
        """What models said to public gate sets, so that nobody is asked twice; may be deleted at any time."""
        return self.root / "asked"

    @property
    def serving(self) -> Path:
        """The server's cache: what it needs to start with the registry down."""
        return self.root / "serving"

    def transcript(self, stream: str) -> Path:
        """What was asked and answered on a stream that keeps it (`serving.log_prompts`): people's texts."""
        return self.root / "transcripts" / f"{stream}.jsonl"

    @property
    def run(self) -> Path:
        """Logs, locks and addresses of the running service."""
        return self.root / "run"

    def rounds(self, round_id: str) -> Path:
        """The folder of one round: plan, receipt, verdict, report."""
        return self.root / "rounds" / round_id

    def checkpoints(self, round_id: str, attempt: int) -> Path:
        """Checkpoints and the round key of one attempt; gone when the round ends."""
        return self.root / "checkpoints" / f"{round_id}.{attempt}"

    def expectations(self, stream: str) -> Path:
        """The Great Expectations suite of a stream."""
        return self.root / "expectations" / f"{stream}.yaml"

    def docs(self, stream: str) -> Path:
        """The Data Docs of a stream: they show people's records, so never outside the workspace."""
        return self.root / "docs" / stream

    def keys(self, directory: str = "keys") -> Path:
        """The folder of signing and split keys."""
        return self.root / directory

    def sqlite(self, name: str) -> str:
        """The SQLAlchemy URL of an embedded database."""
        return f"sqlite:///{self.root / name}"


def find(given: str | None) -> Workspace:
    """The workspace named by `--workspace`, else by TIDEGATE_WORKSPACE, else the current folder.

    Raises:
        WorkspaceError: no params.yaml is there.
    """
    root = Path(given or os.environ.get(ENV_WORKSPACE) or ".").resolve()
    workspace = Workspace(root)
    if not workspace.params.is_file():
        raise WorkspaceError(
            f"workspace={root}: no params.yaml there; make one with `tidegate init DIR`, "
            f"then name it by --workspace or {ENV_WORKSPACE}"
        )
    return workspace


def _copy_once(source: Path, target: Path) -> bool:
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return True


def lay_out(root: Path) -> list[str]:
    """Make folders and template files that are missing; returns what was made, relative to the root.

    Raises:
        WorkspaceError: the folder holds other things, or cannot be written.
    """
    root = root.resolve()
    workspace = Workspace(root)
    if root.exists() and not workspace.params.exists() and any(root.iterdir()):
        raise WorkspaceError(f"init {root}: folder is not empty and is no workspace; choose a new one")
    made = []
    try:
        for folder in ("adapters", "rounds", "checkpoints", "lanes", "serving", "run", "mlflow"):
            path = root / folder
            if not path.is_dir():
                path.mkdir(parents=True)
                made.append(f"{folder}/")
        for private in ("keys", "checkpoints"):
            (root / private).mkdir(exist_ok=True)
            (root / private).chmod(0o700)
        if _copy_once(CHECKOUT / "params.yaml", workspace.params):
            made.append("params.yaml")
        for source, name in _GATE_FILES.items():
            if _copy_once(CHECKOUT / "examples" / source, root / "gates" / name):
                made.append(f"gates/{name}")
    except OSError as error:
        raise WorkspaceError(f"init {root}: {error.strerror}: {error.filename}") from None
    return made


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=2, ensure_ascii=False, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
