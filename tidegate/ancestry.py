"""What the registry's versions say about a stream: which is live, what it descends from, which candidate waits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from privacy.errors import PrivacyError
from privacy.policy import NO_PRIVACY
from privacy.signing import TrustedKeys
from registry.states import PRODUCTION, ModelVersion
from tidegate.errors import TidegateError


@dataclass(frozen=True)
class Live:
    """The approved version in Production, and every block its ancestry was trained on."""

    version: int
    adapter_sha256: str
    block_ids: frozenset[str]


def signed_tag(version: ModelVersion, name: str, trusted: TrustedKeys) -> dict[str, Any] | None:
    """The payload of a signed tag, or None when it is missing or its signature does not hold."""
    try:
        return trusted.verify(json.loads(version.tag(name) or "null"))
    except (PrivacyError, ValueError, TypeError):
        return None


def guarantee(version: ModelVersion, trusted: TrustedKeys) -> str:
    """What a version's signed receipt guarantees, in words."""
    receipt = signed_tag(version, "receipt", trusted)
    if receipt is None:
        return "no valid signature"
    said = receipt.get("guarantee", {})
    if said.get("claim") == "none":
        return NO_PRIVACY
    if said.get("epsilon") is None:
        return "epsilon infinity: test noise"
    return f"({said['epsilon']:g}, {said['delta']:g})-DP per {said['unit']}"


def block_ids(version: ModelVersion) -> frozenset[str]:
    """Blocks that one version's own round trained on, replay included."""
    plan = json.loads(version.tag("plan") or "{}")
    return frozenset(block["id"] for block in plan.get("blocks", ()))


def ancestors(versions: Sequence[ModelVersion], version: ModelVersion) -> list[ModelVersion]:
    """The version and what it was trained from, newest first. A cycle of forged tags ends the chain."""
    by_sha = {v.tag("adapter_sha256"): v for v in versions}
    chain: list[ModelVersion] = []
    node: ModelVersion | None = version
    while node is not None and node not in chain:
        chain.append(node)
        node = by_sha.get(node.tag("parent_sha256"))
    return chain


def find_live(versions: Sequence[ModelVersion], trusted: TrustedKeys) -> Live | None:
    """The Production version with a valid approval of its own adapter; None when none was ever approved.

    Raises:
        TidegateError: Production holds a version whose approval does not verify.
    """
    wanted = [v for v in versions if v.stage == PRODUCTION]
    if not wanted:
        return None
    for version in wanted:
        approval = signed_tag(version, "approval", trusted)
        if approval and approval["adapter_sha256"] == version.tag("adapter_sha256"):
            blocks = [block_ids(v) for v in ancestors(versions, version)]
            return Live(version.version, approval["adapter_sha256"], frozenset().union(*blocks))
    names = ", ".join(str(v.version) for v in wanted)
    raise TidegateError(
        f"version {names} stands in Production without a valid approval: nothing is trained from it; "
        f"approve it by `tidegate approve` or return to another by `tidegate rollback`"
    )
