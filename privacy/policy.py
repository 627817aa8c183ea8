"""The privacy policy of a stream, frozen into every block when it is sealed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from privacy.accounting import ORDERS, caps
from privacy.errors import PolicyError


@dataclass(frozen=True)
class Policy:
    """What is promised to the people in a block, and how a block's budget may be divided.

    Args:
        unit: `record` (all deliveries of one user_id and event_id) or `user` (all messages of one user_id).
        epsilon: the sealed bound, positive.
        delta: the sealed bound, in (0, 1).
        horizon: `life`: the bound holds over all rounds ever.
        attempts: over how many rounds a block may be new; each may pay 1/attempts of the new share.
        replay_share: share of the cap kept for replay in later rounds.
        holdout_share: share of units never trained on.
        orders: the grid of integer Rényi orders.

    Raises:
        PolicyError: a value is out of its bounds, or no order can afford any round.
    """

    unit: Literal["record", "user"]
    epsilon: float
    delta: float
    horizon: Literal["life"] = "life"
    attempts: int = 3
    replay_share: float = 0.25
    holdout_share: float = 0.1
    orders: tuple[int, ...] = ORDERS

    def __post_init__(self) -> None:
        if self.unit not in {"record", "user"}:
            raise PolicyError(f"unit={self.unit}: must be record or user")
        if self.horizon != "life":
            raise PolicyError(f"horizon={self.horizon}: must be life")
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise PolicyError(f"attempts={self.attempts}: must be a whole number of at least 1")
        for name in ("replay_share", "holdout_share"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share < 1.0:
                raise PolicyError(f"{name}={share}: must be in [0, 1)")
        object.__setattr__(self, "orders", tuple(self.orders))
        caps(self.orders, self.epsilon, self.delta)

    @property
    def caps(self) -> tuple[float, ...]:
        """The filter's bound at each order, nats."""
        return caps(self.orders, self.epsilon, self.delta)

    @property
    def new_bounds(self) -> tuple[float, ...]:
        """What one round may charge a block for being new, at each order: the new share over the attempts."""
        factor = (1.0 - self.replay_share) / self.attempts
        return tuple(cap * factor for cap in self.caps)

    def frozen(self, nominal_units: int) -> dict[str, Any]:
        """The policy as a manifest keeps it.

        Args:
            nominal_units: offsets the block spans, a public number.

        Raises:
            PolicyError: nominal_units is not a whole number of at least 1.
        """
        if isinstance(nominal_units, bool) or not isinstance(nominal_units, int) or nominal_units < 1:
            raise PolicyError(f"nominal_units={nominal_units}: must be a whole number of at least 1")
        return {
            "unit": self.unit,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "orders": list(self.orders),
            "caps": list(self.caps),
            "horizon": self.horizon,
            "attempts": self.attempts,
            "replay_share": self.replay_share,
            "holdout_share": self.holdout_share,
            "nominal_units": nominal_units,
        }

    @classmethod
    def from_frozen(cls, kept: Mapping[str, Any]) -> Policy:
        """The policy of a manifest.

        Raises:
            PolicyError: a field is missing, or the caps are not those of epsilon, delta and orders.
        """
        names = ("unit", "epsilon", "delta", "horizon", "attempts", "replay_share", "holdout_share", "orders")
        missing = [name for name in (*names, "caps") if name not in kept]
        if missing:
            raise PolicyError(f"frozen policy: fields {', '.join(missing)} are missing")
        policy = cls(**{name: kept[name] for name in names})
        bounds = list(kept["caps"])
        same = len(bounds) == len(policy.caps) and all(
            # A last-bit difference between two mathematics libraries is not a forged cap.
            math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)
            for a, b in zip(bounds, policy.caps, strict=True)
        )
        if not same:
            raise PolicyError(
                f"frozen policy: caps {bounds} are not those of epsilon={policy.epsilon}, delta={policy.delta}"
            )
        return policy
