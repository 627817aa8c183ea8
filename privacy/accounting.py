"""Rényi differential privacy of the Poisson-subsampled Gaussian, caps of the filter, and calibration.

Only integer orders are used: there the divergence is a finite sum (Mironov, Talwar, Zhang 2019, section 3.3), so no
quadrature and no approximation stands between the mechanism and the ledger. The adjacency is add/remove one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from privacy.errors import PolicyError

# Integer orders that cover epsilon 0.1 to 50 at delta 1e-9 to 1e-3. Each costs log(K) in delta (see `cap`), so the
# grid is coarse where neighbours convert to nearly the same epsilon.
ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
ORDERS_MAX = 16
# Below this noise the Gaussian's own Rényi divergence is beyond any budget this product accepts.
SIGMA_MIN = 0.05
SIGMA_MAX = 10_000.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_mechanism(q: float, sigma: float, steps: int) -> None:
    """Raise PolicyError unless 0 <= q <= 1, sigma is positive and finite, steps is a whole number >= 1."""
    if not (_is_number(q) and 0.0 <= q <= 1.0):
        raise PolicyError(f"q={q}: must be in [0, 1]; it is the chance of one unit per step")
    if not (_is_number(sigma) and math.isfinite(sigma) and sigma > 0.0):
        raise PolicyError(f"sigma={sigma}: must be positive and finite; it is the noise multiplier")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PolicyError(f"steps={steps}: must be a whole number of at least 1")


def check_orders(orders: Sequence[int]) -> None:
    """Raise PolicyError unless the orders are 1 to 16 distinct ascending integers of at least 2."""
    whole = all(isinstance(a, int) and not isinstance(a, bool) and a >= 2 for a in orders)  # noqa: PLR2004 - alpha > 1
    if not whole or list(orders) != sorted(set(orders)) or not 1 <= len(orders) <= ORDERS_MAX:
        raise PolicyError(f"orders={list(orders)}: must be 1 to {ORDERS_MAX} distinct ascending integers >= 2")


@lru_cache(maxsize=100_000)
def _rdp_step(q: float, sigma: float, order: int) -> float:
    """RDP of one step at one integer order: log A / (order - 1).

    A = sum_k C(order, k) (1-q)^(order-k) q^k exp(x_k) with x_k = k(k-1) / (2 sigma^2). The binomial weights sum to one,
    so A - 1 is the same sum over exp(x_k) - 1, which is zero for k < 2: taken like this nothing cancels, and a tiny q
    is not rounded down to a price of zero.
    """
    half = 0.5 / sigma / sigma
    if q == 1.0:
        return order * half
    if q == 0.0:
        return 0.0
    terms = []
    for k in range(2, order + 1):
        x = k * (k - 1) * half
        if math.isinf(x):
            return math.inf
        if x > 0.0:  # else sigma is so large that the term is below the smallest double
            weight = math.log(math.comb(order, k)) + k * math.log(q) + (order - k) * math.log1p(-q)
            terms.append(weight + x + math.log(-math.expm1(-x)))
    if not terms:
        return 0.0
    top = max(terms)
    log_excess = top + math.log(math.fsum(math.exp(t - top) for t in terms))  # log(A - 1)
    return (max(log_excess, 0.0) + math.log1p(math.exp(-abs(log_excess)))) / (order - 1)


def rdp(q: float, sigma: float, steps: int, orders: Sequence[int]) -> tuple[float, ...]:
    """RDP of `steps` Poisson-subsampled Gaussian steps at each order, nats (Mironov, Talwar, Zhang 2019).

    Args:
        q: sampling rate of a unit in one step, in [0, 1].
        sigma: noise multiplier, the standard deviation of the noise over the clip norm.
        steps: how often the mechanism runs; RDP adds up.
        orders: integer Rényi orders.

    Raises:
        PolicyError: a parameter is out of its bounds.
    """
    check_mechanism(q, sigma, steps)
    check_orders(orders)
    return tuple(steps * _rdp_step(float(q), float(sigma), order) for order in orders)


def _conversion(order: int, delta: float) -> float:
    """What an (order, rho)-RDP mechanism pays on top of rho for (epsilon, delta): epsilon = rho + this."""
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def epsilon_from_rdp(values: Sequence[float], orders: Sequence[int], delta: float) -> tuple[float, int]:
    """The smallest epsilon over the orders, and its order (Canonne, Kamath, Steinke 2020, proposition 12).

    Valid for a schedule fixed in advance: over adaptively chosen rounds only the filter's sealed epsilon is a claim.
    """
    pairs = [(max(0.0, rho + _conversion(a, delta)), a) for rho, a in zip(values, orders, strict=True)]
    return min(pairs)


def caps(orders: Sequence[int], epsilon: float, delta: float) -> tuple[float, ...]:
    """For each order the RDP that converts to epsilon at delta / K, K orders; not positive: the order is unusable.

    Each order's filtered process is (epsilon, delta/K)-DP, and hockey-stick divergences add over the K orders
    (docs/privacy.md, 'The filter').

    Raises:
        PolicyError: orders, epsilon or delta are out of bounds, or no order has a positive cap.
    """
    check_orders(orders)
    if not (_is_number(epsilon) and math.isfinite(epsilon) and epsilon > 0.0):
        raise PolicyError(f"epsilon={epsilon}: must be positive and finite")
    if not (_is_number(delta) and 0.0 < delta < 1.0):
        raise PolicyError(f"delta={delta}: must be in (0, 1)")
    share = delta / len(orders)
    found = tuple(epsilon - _conversion(order, share) for order in orders)
    if max(found) <= 0.0:
        raise PolicyError(f"epsilon={epsilon}, delta={delta}: no Rényi order of {list(orders)} can afford any round")
    return found


def fits(spent: Sequence[float], rho: Sequence[float], bounds: Sequence[float]) -> bool:
    """The filter: is there an order at which spent + rho stays within its bound?"""
    return any(c > 0.0 and s + r <= c for s, r, c in zip(spent, rho, bounds, strict=True))


def share_used(spent: Sequence[float], bounds: Sequence[float]) -> float:
    """Share of the filter used: at the order that has the most left, spent over cap. 0 is untouched, 1 is full."""
    return min(s / c for s, c in zip(spent, bounds, strict=True) if c > 0.0)


def calibrate(
    demands: Sequence[tuple[float, Sequence[float], Sequence[float], Sequence[int]]], steps: int
) -> float | None:
    """The smallest noise multiplier, rounded up to 3 decimals, with which every demand fits its bounds.

    Args:
        demands: per block (q, spent, bounds, orders), all of one block's grid.
        steps: steps of the round.

    Returns:
        sigma, or None when not even SIGMA_MAX is enough for one of the blocks.
    """

    def enough(sigma: float) -> bool:
        return all(fits(spent, rdp(q, sigma, steps, orders), bounds) for q, spent, bounds, orders in demands)

    unit = 1000  # three decimals
    low, high = int(SIGMA_MIN * unit), int(SIGMA_MAX * unit)
    if not enough(high / unit):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle / unit) else (middle + 1, high)
    return low / unit
