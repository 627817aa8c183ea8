"""A signed receipt for a committed round: what was run, what came out, what is guaranteed, where the ledger stood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privacy.errors import SignatureError
from privacy.policy import NONE, Policy
from privacy.signing import SigningKey, TrustedKeys

ADJACENCY = "add-remove one unit"


@dataclass(frozen=True)
class Guarantee:
    """The claim of a round's stream; epsilon None means infinity: nothing is promised (test noise).

    With windows as its horizon (`30d`) the claim is per window, and says so. A round that was trained without privacy
    claims `none`, and has neither epsilon nor delta; else `claim` is empty, and is not written.
    """

    unit: Literal["record", "user"]
    adjacency: str
    epsilon: float | None
    delta: float | None
    horizon: str = "life"
    claim: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields as they are signed."""
        return {name: value for name, value in asdict(self).items() if name != "claim" or value}


def guarantee_of(noise_source: str, policies: Sequence[Policy]) -> Guarantee:
    """What a round may claim: by its noise, and by the sealed policies of the blocks it used.

    A unit is in one block (unit record) or may be in all (unit user): the claim is the largest sealed one.
    """
    unit, horizon = policies[0].unit, policies[0].horizon
    if noise_source == NONE:
        return Guarantee(unit, ADJACENCY, None, None, horizon, NONE)
    epsilon = None if noise_source == "test" else max(policy.epsilon for policy in policies)
    return Guarantee(unit, ADJACENCY, epsilon, max(policy.delta for policy in policies), horizon)


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
    delta: float | None,
    horizon: str = "life",
    claim: str = "",
    signer: SigningKey,
) -> dict[str, Any]:
    """A signed receipt as a JSON value; `epsilon=None` says infinity, `claim=NONE` that no privacy was meant."""
    guarantee = Guarantee(unit, ADJACENCY, epsilon, delta, horizon, claim)
    receipt = asdict(Receipt(plan_hash, adapter_sha256, ledger_head, guarantee))
    return signer.sign(receipt | {"guarantee": guarantee.as_json()})


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
