"""The privacy policy of a stream, frozen into every block when it is sealed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from privacy.accounting import ORDERS, caps
from privacy.errors import PolicyError

TRAIN, HOLDOUT = "train", "holdout"
# Whose budget a charge is taken from: people trained on, or people split off and only ever evaluated on.
ACCOUNTS = (TRAIN, HOLDOUT)
LIFE = "life"
# What every text says of a block that was sealed with `privacy.enabled: false`: nobody in it got a promise.
NO_PRIVACY = "no privacy: enabled=false"
# The noise of a round without privacy, and what it claims: the word in plan, ledger, receipt and approval.
NONE = "none"
# Why a version without privacy fails its gate, neither goes live nor answers, on a private stream; after its name.
WITHOUT_PRIVACY = (
    "was trained without privacy (privacy.enabled=false), and its stream is private: it says enabled=true, or a block "
    "of it was sealed with a promise; promote a version of a private round, or train in a stream of its own that is "
    "enabled=false from its first block on"
)
# More than a century is no window but a life; it also keeps the arithmetic far from any limit.
WINDOW_DAYS_MAX = 36_500
_WINDOW = re.compile(r"([1-9][0-9]{0,4})d\Z")
_SECONDS_PER_DAY = 86_400


def window_days(horizon: str) -> int:
    """Length of a window in days; 0 for `life`.

    Raises:
        PolicyError: the horizon is neither `life` nor a number of days like `30d`.
    """
    if horizon == LIFE:
        return 0
    found = _WINDOW.match(horizon) if isinstance(horizon, str) else None
    if found is None or int(found[1]) > WINDOW_DAYS_MAX:
        raise PolicyError(f"horizon={horizon}: must be life, or days from 1d to {WINDOW_DAYS_MAX}d, like 30d")
    return int(found[1])


@dataclass(frozen=True)
class Policy:
    """What is promised to the people in a block, and how a block's budget may be divided.

    Args:
        unit: `record` (all deliveries of one user_id and event_id) or `user` (all messages of one user_id).
        epsilon: the sealed bound, positive.
        delta: the sealed bound, in (0, 1).
        horizon: `life`: the bound holds over all rounds ever; `30d`: over all rounds in one window of 30 days.
        attempts: over how many rounds a block may be new; each may pay 1/attempts of the new share.
        replay_share: share of the cap kept for replay in later rounds.
        holdout_share: share of units never trained on.
        orders: the grid of integer Rényi orders.
        holdout_epsilon: the sealed bound of the people in the holdout, at the same delta and orders.
        holdout_evaluations: how many paid evaluations the holdout's account is made for; 0: it has none.
        enabled: False: nothing is promised, whatever stands above. Such a block has no account: its caps are zero, so
            that no charge ever fits, and only rounds without privacy may use it.

    Raises:
        PolicyError: a value is out of its bounds, or no order can afford any round.
    """

    unit: Literal["record", "user"]
    epsilon: float
    delta: float
    horizon: str = LIFE
    attempts: int = 3
    replay_share: float = 0.25
    holdout_share: float = 0.1
    orders: tuple[int, ...] = ORDERS
    holdout_epsilon: float = 2.0
    holdout_evaluations: int = 0
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.unit not in {"record", "user"}:
            raise PolicyError(f"unit={self.unit}: must be record or user")
        window_days(self.horizon)
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise PolicyError(f"attempts={self.attempts}: must be a whole number of at least 1")
        for name in ("replay_share", "holdout_share"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share < 1.0:
                raise PolicyError(f"{name}={share}: must be in [0, 1)")
        object.__setattr__(self, "orders", tuple(self.orders))
        caps(self.orders, self.epsilon, self.delta)
        self._check_holdout()

    def _check_holdout(self) -> None:
        count = self.holdout_evaluations
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise PolicyError(f"holdout_evaluations={count}: must be a whole number of at least 0")
        if count and not self.enabled:
            raise PolicyError(f"holdout_evaluations={count}: must be 0 where enabled is false: there is no account")
        if count and self.holdout_share == 0.0:
            raise PolicyError(f"holdout_evaluations={count}: needs somebody in the holdout; holdout_share must be > 0")
        if count:  # a policy without the account need not be able to afford one
            caps(self.orders, self.holdout_epsilon, self.delta)

    @cached_property
    def caps(self) -> tuple[float, ...]:
        """The filter's bound at each order, nats; all zero where nothing is promised: nothing fits."""
        if not self.enabled:
            return (0.0,) * len(self.orders)
        return caps(self.orders, self.epsilon, self.delta)

    @cached_property
    def holdout_caps(self) -> tuple[float, ...]:
        """The holdout's filter at each order, nats; all zero where there is no holdout account: nothing fits."""
        if not self.holdout_evaluations:
            return (0.0,) * len(self.orders)
        return caps(self.orders, self.holdout_epsilon, self.delta)

    def caps_of(self, account: str) -> tuple[float, ...]:
        """The filter of `train` or `holdout`, nats.

        Raises:
            PolicyError: there is no such account.
        """
        if account not in ACCOUNTS:
            raise PolicyError(f"account={account}: must be {' or '.join(ACCOUNTS)}")
        return self.caps if account == TRAIN else self.holdout_caps

    @property
    def days(self) -> int:
        """Length of a window in days; 0 for life."""
        return window_days(self.horizon)

    def window_at(self, seconds: float) -> int:
        """Number of the window in which a moment falls (POSIX seconds); 0 for life."""
        return int(seconds // (self.days * _SECONDS_PER_DAY)) if self.days else 0

    @property
    def span(self) -> str:
        """Over which rounds the bound holds: 'for life' or 'per window of 30 days'."""
        if not self.enabled:
            return "never"
        if not self.days:
            return "for life"
        return f"per window of {self.days} day{'s' if self.days > 1 else ''}"

    def promise(self, account: str = "train") -> str:
        """What is promised, in words: 'epsilon 8, delta 1e-05 per record, for life'.

        Raises:
            PolicyError: there is no such account.
        """
        if account == HOLDOUT and not self.holdout_evaluations:
            return "no holdout account: never read"
        self.caps_of(account)
        if not self.enabled:
            return NO_PRIVACY
        epsilon = self.epsilon if account == TRAIN else self.holdout_epsilon
        return f"epsilon {epsilon:g}, delta {self.delta:g} per {self.unit}, {self.span}"

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
            "holdout_epsilon": self.holdout_epsilon,
            "holdout_evaluations": self.holdout_evaluations,
            "nominal_units": nominal_units,
            # Only where it is off: a policy with a promise is written as it always was, byte for byte.
            **({} if self.enabled else {"enabled": False}),
        }

    @classmethod
    def from_frozen(cls, kept: Mapping[str, Any]) -> Policy:
        """The policy of a manifest; one sealed before there were holdout accounts has none.

        Raises:
            PolicyError: a field is missing, or the caps are not those of epsilon, delta and orders.
        """
        names = ("unit", "epsilon", "delta", "horizon", "attempts", "replay_share", "holdout_share", "orders")
        missing = [name for name in (*names, "caps") if name not in kept]
        if missing:
            raise PolicyError(f"frozen policy: fields {', '.join(missing)} are missing")
        if kept.get("enabled", False) is not False:
            raise PolicyError(f"frozen policy: enabled={kept['enabled']}: must be false where it stands at all")
        later = [name for name in ("holdout_epsilon", "holdout_evaluations", "enabled") if name in kept]
        policy = cls(**{name: kept[name] for name in (*names, *later)})
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
