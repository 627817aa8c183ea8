"""What serving trusts: a signed approval, never a stage or a tag alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from privacy.errors import PrivacyError
from privacy.policy import NONE, WITHOUT_PRIVACY
from privacy.signing import TrustedKeys
from registry.canary import CANARY, Terms, parse
from registry.errors import PromotionRefused
from registry.states import PRODUCTION
from serving.errors import ApprovalRefused

# Decisions by which a version may answer; a signed rejection is none of them.
KINDS = ("promote", "rollback", "emergency")


@dataclass(frozen=True)
class Wanted:
    """What the registry says should answer. Everything but the approval is hearsay.

    Attributes:
        model: the registered model.
        version: its version in stage `stage`.
        adapter_sha256: what the registry says the adapter is.
        approval: the signed approval, as a mapping or as JSON text; empty or None when there is none.
    """

    model: str
    version: int
    stage: str
    adapter_sha256: str
    approval: Mapping[str, Any] | str | None


@dataclass(frozen=True)
class Approval:
    """A signed decision that a version may answer, with its signature checked.

    Attributes:
        seq: its place in the history of approvals: a later decision has a higher one.
        signed: the whole signed value, to be kept and checked again.
        guarantee: `none` for a version without privacy; empty: its receipt was found to have a finite epsilon.
    """

    seq: int
    model: str
    version: int
    adapter_sha256: str
    kind: str
    signed: Mapping[str, Any]
    guarantee: str = ""


@dataclass(frozen=True)
class Canary:
    """A signed decision on a share of the requests for a candidate, with its signature checked.

    Attributes:
        terms: None: the canary is over.
        automatic: whether a server ended it by itself.
    """

    seq: int
    version: int
    adapter_sha256: str
    terms: Terms | None
    automatic: bool
    why: str


def read_canary(
    signed: Mapping[str, Any] | str, trusted: TrustedKeys, model: str, *, open_stream: bool = False
) -> Canary:
    """Check a signed decision on a canary; the arguments are those of `read_approval`.

    Raises:
        ApprovalRefused: it is not signed by a trusted key, or for something else.
    """
    try:
        value = json.loads(signed) if isinstance(signed, str) else signed
        payload = trusted.verify(value)
        told = payload["canary"]
        canary = Canary(
            seq=_whole(payload, "seq"),
            version=_whole(payload, "version"),
            adapter_sha256=str(payload["adapter_sha256"]),
            terms=parse(told) if told["share"] else None,
            automatic=told.get("automatic") is True,
            why=str(payload["why"]),
        )
        kind, of, guarantee = str(payload["kind"]), str(payload["model"]), str(payload.get("guarantee", ""))
    except (PrivacyError, PromotionRefused, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ApprovalRefused(f"model={model}: its canary is not valid ({error}); decide it again") from error
    if kind != CANARY or of != model:
        raise ApprovalRefused(f"model={model}: seq={canary.seq} is a {kind} of model {of!r}, no canary of this one")
    if guarantee not in {"", NONE} or (guarantee and not open_stream):
        raise ApprovalRefused(f"model={model}: version {canary.version} {WITHOUT_PRIVACY}")
    return canary


def read_approval(
    signed: Mapping[str, Any] | str | None, trusted: TrustedKeys, model: str, *, open_stream: bool = False
) -> Approval:
    """Check a signed approval.

    Args:
        signed: the approval.
        trusted: keys it may be signed with.
        model: it must be for this one.
        open_stream: whether nothing was ever promised to anybody in the stream: else no version without privacy.

    Raises:
        ApprovalRefused: there is none, it is not signed by a trusted key, or it is for something else.
    """
    if not signed:
        raise ApprovalRefused(
            f"model={model}: no signed approval; run `tidegate approve`, or set the stage through the guard"
        )
    try:
        value = json.loads(signed) if isinstance(signed, str) else signed
        payload = trusted.verify(value)
        approval = Approval(
            seq=_whole(payload, "seq"),
            model=str(payload["model"]),
            version=_whole(payload, "version"),
            adapter_sha256=str(payload["adapter_sha256"]),
            kind=str(payload["kind"]),
            signed=value,
            guarantee=str(payload.get("guarantee", "")),
        )
        stage = payload["to"]
    except (PrivacyError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ApprovalRefused(
            f"model={model}: its approval is not valid ({error}); approve the version again"
        ) from error
    if approval.model != model:
        raise ApprovalRefused(f"model={model}: its approval is for model {approval.model!r}; approve the version again")
    if stage != PRODUCTION or approval.kind not in KINDS:
        raise ApprovalRefused(
            f"model={model}: seq={approval.seq} is a decision of kind {approval.kind!r} for stage {stage!r}, "
            f"must be for {PRODUCTION!r}; approve the version"
        )
    if approval.guarantee not in {"", NONE}:
        raise ApprovalRefused(f"model={model}: guarantee={approval.guarantee!r} is not known; approve it again")
    if approval.guarantee and not open_stream:
        raise ApprovalRefused(f"model={model}: version {approval.version} {WITHOUT_PRIVACY}")
    return approval


def check_wanted(wanted: Wanted, trusted: TrustedKeys, model: str, *, open_stream: bool = False) -> Approval:
    """The approval of what the registry wants, if it is for exactly that.

    Raises:
        ApprovalRefused: as `read_approval`; or version, adapter or stage differ.
    """
    approval = read_approval(wanted.approval, trusted, model, open_stream=open_stream)
    if wanted.model != model or wanted.stage != PRODUCTION:
        raise ApprovalRefused(
            f"model={wanted.model}, stage={wanted.stage}: must be {model} in {PRODUCTION}; "
            "check the registered model's name"
        )
    if (approval.version, approval.adapter_sha256) != (wanted.version, wanted.adapter_sha256):
        raise ApprovalRefused(
            f"model={model}: version {wanted.version} with adapter {wanted.adapter_sha256[:12]} is wanted, but its "
            f"approval is for version {approval.version} with adapter {approval.adapter_sha256[:12]}; approve it again"
        )
    return approval


def _whole(payload: Mapping[str, Any], name: str) -> int:
    value = payload[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be an integer > 0")
    return value
