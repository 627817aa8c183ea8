"""Back to a version that was approved before, with the registry or, in an emergency, without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from privacy.policy import WITHOUT_PRIVACY
from registry.errors import PromotionRefused
from registry.states import PRODUCTION
from tidegate.errors import UnknownName
from tidegate.pruning import note

if TYPE_CHECKING:
    from registry.approvals import Approvals
    from tidegate.wiring import Service


def roll_back(service: Service, stream: str, *, to: int | None, why: str, who: str, emergency: bool) -> str:
    """Make an earlier approved version Production again; returns a sentence on what happened.

    Raises:
        UnknownName: there is no earlier version, or none of that number.
        PromotionRefused: its adapter, receipt or verdict is no longer intact.
        RegistryUnavailable: MLflow does not answer and `emergency` was not asked for.
    """
    model = service.model(stream)
    target = to if to is not None else _previous(service.approvals(), model)
    if emergency:
        return _without_registry(service, stream, target, why=why, who=who)
    approval = service.desk.promote(
        model, target, why=why, who=who, approvals=service.approvals(signing=True), trust=service.trust
    )
    return f"version {target} of {model} is Production again; approval {approval['seq']} signed by {approval['key_id']}"


def _previous(approvals: Approvals, model: str) -> int:
    """The version that was live before the one that is."""
    previous = approvals.standing(model).previous
    if previous is None:
        raise UnknownName(f"model={model}: no version was live before; name one by --to, see `tidegate versions`")
    return int(previous["version"])


def _without_registry(service: Service, stream: str, target: int, *, why: str, who: str) -> str:
    """Sign an approval of kind `emergency` and leave it where the server looks when the registry is down."""
    from serving.swap import write_emergency

    model = service.model(stream)
    approvals = service.approvals(signing=True)
    approved = [r for r in approvals.history(model) if r["version"] == target and r["to"] == PRODUCTION]
    if not approved:
        raise UnknownName(f"version={target}: was never approved for {model}; see `tidegate history {stream}`")
    sha = str(approved[-1]["adapter_sha256"])
    cached = service.workspace.serving / stream / "adapters" / sha
    if (gone := note(service.workspace.root, sha)) and not cached.is_dir():
        raise PromotionRefused(
            f"version {target} of {model}: its weights were pruned ({gone['at']} by {gone['who']}); name another"
        )
    guarantee = str(approved[-1].get("guarantee", ""))
    if guarantee and not service.is_open(stream):
        raise PromotionRefused(f"version {target} of {model} {WITHOUT_PRIVACY}")
    row = approvals.append(
        model=model,
        version=target,
        adapter_sha256=approved[-1]["adapter_sha256"],
        from_stage="unknown",
        to_stage=PRODUCTION,
        who=who,
        why=why,
        kind="emergency",
        guarantee=guarantee,
    )
    write_emergency(service.workspace.serving / stream, stream, row)
    return (
        f"version {target} of {model}: emergency approval {row['seq']} is signed; the server takes it within a second; "
        f"when MLflow is back, make it lasting by `tidegate rollback {stream} --to {target} --why ...`"
    )
