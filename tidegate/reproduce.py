"""What `dvc repro` runs in a clone of the data repository: verify a finished round, or rebuild one with test noise."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.errors import TidegateError, UnknownName
from tidegate.pruning import note

if TYPE_CHECKING:
    from learner.plan import RoundPlan
    from tidegate.wiring import Service


@dataclass(frozen=True)
class Rebuilt:
    """What was done and which adapter came out."""

    round_id: str
    adapter_sha256: str
    how: str


def rebuild(service: Service, round_file: Path, out: Path) -> Rebuilt:
    """Verify every hash and signature of the round named in `round_file`, then write its outputs to `out`.

    Raises:
        TidegateError: something does not match; the message names the first thing that does not.
    """
    from learner.adapter import adapter_sha256
    from learner.plan import RoundPlan

    folder = round_file.parent / "rounds" / _read(round_file)["round_id"]
    plan = RoundPlan.model_validate(_read(folder / "plan.json"))
    receipt = service.trusted("receipts").verify(_read(folder / "receipt.json"))
    verdict = service.trusted("verdicts").verify(_read(folder / "verdict.json"))
    _same("receipt.plan_hash", receipt["plan_hash"], plan.plan_hash)
    _same("verdict.adapter_sha256", verdict["adapter_sha256"], receipt["adapter_sha256"])
    service.ledger.require_head(receipt["ledger_head"])
    base = service.base(plan.stream)
    _same("plan.base_sha256", base.sha256, plan.base_sha256)
    _verify_data(service, plan)
    if plan.noise_source == "test":
        made, how = _train_again(service, plan), "trained again with its test noise, bit for bit the same"
    else:
        made = service.workspace.adapters / receipt["adapter_sha256"]
        how = "verified (plan, data, base, ledger, receipt, verdict); its stored adapter is returned"
    if not made.is_dir():
        if gone := note(service.workspace.root, receipt["adapter_sha256"]):
            raise TidegateError(
                f"adapters/{receipt['adapter_sha256']}: pruned {gone['at']} by {gone['who']}; it is gone"
            )
        raise TidegateError(
            f"adapters/{receipt['adapter_sha256']}: not in the workspace; fetch it from MLflow's version"
        )
    _same("adapter_sha256", adapter_sha256(made), receipt["adapter_sha256"])
    _write_outputs(out, made, _read(folder / "metrics.json"))
    return Rebuilt(plan.round_id, receipt["adapter_sha256"], how)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UnknownName(f"{file}: no such file; run this in a clone of the data repository with a round") from None


def _same(name: str, seen: object, expected: object) -> None:
    if seen != expected:
        raise TidegateError(f"{name}={seen}: must be {expected}; this is not what the round recorded")


def _verify_data(service: Service, plan: RoundPlan) -> None:
    """Read every block of the plan: the repository checks each file's sha256 against its manifest."""
    repo = service.repository()
    with tempfile.TemporaryDirectory(dir=service.workspace.run) as scratch:
        pinned = repo.checkout(plan.data_revision, Path(scratch) / "data")
        manifests = {m.block_id: m for m in repo.manifests(plan.stream, revision=plan.data_revision)}
        for block in plan.blocks:
            pinned.records(manifests[block.id], split="train")


def _train_again(service: Service, plan: RoundPlan) -> Path:
    from tidegate.cycle import train_with_test_noise

    folder = service.workspace.run / f"reproduce-{plan.round_id}"
    shutil.rmtree(folder, ignore_errors=True)
    return train_with_test_noise(service, plan, folder)


def _write_outputs(out: Path, adapter: Path, metrics: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "adapter", ignore_errors=True)
    shutil.copytree(adapter, out / "adapter")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with (out / "accuracy.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("domain", "accuracy"))
        prefix = "accuracy."
        writer.writerows((k.removeprefix(prefix), v) for k, v in sorted(metrics.items()) if k.startswith(prefix))
