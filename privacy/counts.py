"""Noisy counts: a vector of counts released once, with Gaussian noise, under a bound on what one unit adds to it.

Every unit hands in one vector. It is clipped to L2 norm one, so that adding or removing a unit moves the sum by at most
one, and the sum gets one draw of N(0, sigma^2 I). That is the Gaussian mechanism at sampling rate one, and it is
charged as such: q=1, sigma, one step (Mironov 2017, proposition 7: order a costs a / (2 sigma^2)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy import accounting
from privacy.chain import Charge
from privacy.errors import PolicyError
from privacy.randomness import KeyedStream

# A number that a unit's vector rounds to may exceed one by its last bits; this much room is taken off the sum's scale.
_ROOM = 1.0 - 1e-12
# Noise is calibrated in steps of this: three decimals, as the rounds' own.
_SIGMA_STEP = 1e-3
# The purpose under which the noise is drawn: never that of a round's step.
_PURPOSE = "counts"

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class CountsMechanism:
    """One release of `size` counts.

    Attributes:
        size: entries of the vector, public.
        sigma: standard deviation of the noise on each entry, in votes of one unit.

    Raises:
        PolicyError: size is not a whole number of at least 1, or sigma is not positive and finite.
    """

    size: int
    sigma: float

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise PolicyError(f"size={self.size}: must be a whole number of at least 1")
        accounting.check_mechanism(1.0, self.sigma, 1)

    def clipped(self, votes: Mapping[int, float]) -> Vector:
        """`(size,)`, of L2 norm at most one: a unit's vector as it enters the sum; not a finite number counts as zero.

        Args:
            votes: the unit's entries that are not zero, by position. The unit decides them all, and nobody else.

        Raises:
            IndexError: a position outside the vector.
        """
        vector = np.zeros(self.size)
        for position, value in votes.items():
            if not 0 <= position < self.size:
                raise IndexError(f"position={position}: must be in [0, {self.size})")
            vector[position] = value
        # Scaled by the largest entry first: a square must not overflow into an infinite norm.
        largest = float(np.abs(vector).max(initial=0.0))
        if not math.isfinite(largest) or largest == 0.0:
            return np.zeros(self.size)
        norm = largest * float(np.linalg.norm(vector / largest))
        return vector if norm <= 1.0 else vector / norm * _ROOM

    def release(self, units: Iterable[Mapping[int, float]], noise: KeyedStream) -> Vector:
        """`(size,)` noisy counts: the sum of the clipped vectors and one draw of N(0, sigma^2 I).

        Args:
            units: one mapping a privacy unit, each unit once.
            noise: keyed to this release alone; its key is destroyed afterwards.
        """
        # fsum over whole votes would do; over shares of a vote the order of units must not show in the last bits.
        columns: list[list[float]] = [[] for _ in range(self.size)]
        for votes in units:
            vector = self.clipped(votes)
            for position in np.flatnonzero(vector):
                columns[position].append(float(vector[position]))
        exact = np.array([math.fsum(column) for column in columns])
        released: Vector = exact + self.sigma * noise.gaussians(self.size, _PURPOSE)
        return released

    def charges(self, block_ids: Sequence[str]) -> tuple[Charge, ...]:
        """What each block pays whose units were handed in: one Gaussian at rate one."""
        return tuple(Charge(block_id, 1.0, self.sigma, 1) for block_id in block_ids)


def calibrate_releases(grids: Sequence[tuple[Sequence[int], Sequence[float]]], releases: int) -> float:
    """The smallest sigma, rounded up to 3 decimals, with which every block can pay for `releases` equal releases.

    Args:
        grids: per block (orders, caps) of the account that pays, from the frozen policy.
        releases: how many, at least 1.

    Raises:
        PolicyError: releases is not a whole number of at least 1, no blocks, or no noise is enough.
    """
    if isinstance(releases, bool) or not isinstance(releases, int) or releases < 1:
        raise PolicyError(f"releases={releases}: must be a whole number of at least 1")
    if not grids:
        raise PolicyError("blocks=0: must be >= 1 to calibrate noisy counts")
    demands = [(1.0, (0.0,) * len(orders), tuple(caps), tuple(orders)) for orders, caps in grids]
    sigma = accounting.calibrate(demands, releases)
    if sigma is None:
        raise PolicyError(
            f"releases={releases}: no sigma up to {accounting.SIGMA_MAX:g} is enough; ask fewer, or raise epsilon"
        )
    # The ledger adds charge by charge; a product may be smaller than that sum by its last bits.
    while not all(affordable(sigma, orders, caps, releases) >= releases for orders, caps in grids):
        sigma = round(sigma + _SIGMA_STEP, 3)
    return sigma


def affordable(
    sigma: float, orders: Sequence[int], caps: Sequence[float], most: int, spent: Sequence[float] | None = None
) -> int:
    """How many more releases at sigma an account can pay, `most` at most, added up as the ledger does."""
    rho = accounting.rdp(1.0, sigma, 1, orders)
    paid = tuple(spent) if spent is not None else (0.0,) * len(orders)
    for count in range(most):
        if not accounting.fits(paid, rho, caps):
            return count
        paid = tuple(p + r for p, r in zip(paid, rho, strict=True))
    return most
