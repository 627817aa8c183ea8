"""A signed receipt for a committed round: what was run, what came out, what is guaranteed, where the ledger stood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privacy.errors import SignatureError
from privacy.signing import SigningKey, TrustedKeys

ADJACENCY = "add-remove one unit"


@dataclass(frozen=True)
class Guarantee:
    """The claim of a round's stream; epsilon None means infinity: nothing is promised (test noise).

    With windows as its horizon (`30d`) the claim is per window, and says so.
    """

    unit: str
    adjacency: str
    epsilon: float | None
    delta: float
    horizon: str = "life"


@dataclass(frozen=True)
class Receipt:
    """Joined to a model version by `adapter_sha256`, to the ledger by `ledger_head`."""

    plan_hash: str
    adapter_sha256: str
    ledger_head: str
    guarantee: Guarantee


def make_receipt(
    *,
    plan_hash: str,
    adapter_sha256: str,
    ledger_head: str,
    unit: Literal["record", "user"],
    epsilon: float | None,
    delta: float,
    horizon: str = "life",
    signer: SigningKey,
) -> dict[str, Any]:
    """A signed receipt as a JSON value; `epsilon=None` says infinity."""
    guarantee = Guarantee(unit, ADJACENCY, epsilon, delta, horizon)
    return signer.sign(asdict(Receipt(plan_hash, adapter_sha256, ledger_head, guarantee)))


def read_receipt(signed: Mapping[str, Any], trusted: TrustedKeys) -> Receipt:
    """The receipt, if its signature holds.

    Raises:
        SignatureError: a signature that does not hold, or a signed value that is no receipt.
    """
    body = trusted.verify(signed)
    try:
        return Receipt(**{**body, "guarantee": Guarantee(**body["guarantee"])})
    except (KeyError, TypeError):
        raise SignatureError("value is signed but is no receipt: its fields differ") from None
