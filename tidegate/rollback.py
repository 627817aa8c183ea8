"""Back to a version that was approved before, with the registry or, in an emergency, without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.adapter import adapter_sha256
from learner.errors import AdapterError
from privacy.policy import WITHOUT_PRIVACY
from registry.errors import PromotionRefused
from registry.states import PRODUCTION
from tidegate.errors import UnknownName
from tidegate.pruning import note

if TYPE_CHECKING:
    from pathlib import Path

    from registry.approvals import Standing
    from tidegate.wiring import Service


def roll_back(service: Service, stream: str, *, to: int | None, why: str, who: str, emergency: bool) -> str:
    """Make an earlier approved version Production again; returns a sentence on what happened.

    Raises:
        UnknownName: there is no earlier version, or the one of that number was never live.
        PromotionRefused: its adapter, receipt or verdict is no longer intact.
        RegistryUnavailable: MLflow does not answer and `emergency` was not asked for.
    """
    model = service.model(stream)
    standing = service.approvals().standing(model)
    target = to if to is not None else _previous(standing, model)
    if target not in standing.approved:
        raise UnknownName(
            f"version={target}: was never live for {model}, so there is no way back to it; see `tidegate history "
            f"{stream}`. A candidate is approved by `tidegate approve {stream} {target} --why ...`"
        )
    if emergency:
        return _without_registry(service, stream, target, why=why, who=who)
    approval = service.desk.promote(
        model, target, why=why, who=who, approvals=service.approvals(signing=True), trust=service.trust
    )
    return f"version {target} of {model} is Production again; approval {approval['seq']} signed by {approval['key_id']}"


def _previous(standing: Standing, model: str) -> int:
    """The version that was live before the one that is."""
    previous = standing.previous
    if previous is None:
        raise UnknownName(f"model={model}: no version was live before; name one by --to, see `tidegate versions`")
    return int(previous["version"])


def _without_registry(service: Service, stream: str, target: int, *, why: str, who: str) -> str:
    """Sign an approval of kind `emergency` and leave it where the server looks when the registry is down."""
    from serving.swap import write_emergency

    model = service.model(stream)
    approvals = service.approvals(signing=True)
    approved = approvals.standing(model).approved[target]
    sha = str(approved["adapter_sha256"])
    cached = service.workspace.serving / stream / "adapters" / sha
    if (gone := note(service.workspace.root, sha)) and not cached.is_dir():
        raise PromotionRefused(
            f"version {target} of {model}: its weights were pruned ({gone['at']} by {gone['who']}); name another"
        )
    guarantee = str(approved.get("guarantee", ""))
    if guarantee and not service.is_open(stream):
        raise PromotionRefused(f"version {target} of {model} {WITHOUT_PRIVACY}")
    _refuse_damaged(cached, sha, f"version {target} of {model}")
    # Not under the lock of decisions: an MLflow that hangs may hold it.
    row = approvals.append(
        model=model,
        version=target,
        adapter_sha256=sha,
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
        f"when MLflow starts again it becomes lasting; if MLflow was only out of reach, or has no guard, make it so by "
        f"`tidegate rollback {stream} --to {target} --why ...`"
    )


def _refuse_damaged(cached: Path, sha: str, name: str) -> None:
    """Without the registry the server's own cache is all there is: what is not intact there cannot answer."""
    try:
        found = adapter_sha256(cached)
    except AdapterError as error:
        raise PromotionRefused(
            f"{name}: is not whole in the server's cache ({error}), which is all there is without MLflow; "
            f"name a version that ran here lately"
        ) from None
    if found != sha:
        raise PromotionRefused(
            f"{name}: the adapter in the server's cache has sha256 {found[:12]}, its approval is about {sha[:12]}; "
            f"it was changed: remove {cached}, and name another version"
        )
