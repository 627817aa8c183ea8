"""Rényi differential privacy of the Poisson-subsampled Gaussian, caps of the filter, and calibration.

Only integer orders are used: there the divergence is a finite sum (Mironov, Talwar, Zhang 2019, section 3.3), so no
quadrature and no approximation stands between the mechanism and the ledger. The adjacency is add/remove one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PolicyError

Mechanism = tuple[float, float, int]  # q, sigma, steps
Vector = NDArray[np.float64]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Integer orders that cover epsilon 0.1 to 50 at delta 1e-9 to 1e-3. Each costs log(K) in delta (see `cap`), so the
# grid is coarse where neighbours convert to nearly the same epsilon.
ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
ORDERS_MAX = 16
# Below this noise the Gaussian's own Rényi divergence is beyond any budget this product accepts.
SIGMA_MIN = 0.05
SIGMA_MAX = 10_000.0
# Prices kept per grid: 200,000 of 16 orders are 50 MB, more rounds than a service sees in years.
PRICES_MAX = 200_000
# Mechanisms computed at a time: their 240 terms each stay in the cache.
_BATCH = 1_000


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


class _Grid:
    """What the sums at a grid of orders have in common: one column for every order a and k = 2..a, orders in turn."""

    def __init__(self, orders: tuple[int, ...]) -> None:
        pairs = [(order, k) for order in orders for k in range(2, order + 1)]
        self.k = np.array([float(k) for _, k in pairs])
        self.rest = np.array([float(order - k) for order, k in pairs])
        self.choices = np.array([math.log(math.comb(order, k)) for order, k in pairs])
        self.starts = np.cumsum([0, *(order - 1 for order in orders[:-1])])  # of each order's columns
        self.lengths = np.array([order - 1 for order in orders])
        self.orders = np.array([float(order) for order in orders])


_grid = lru_cache(maxsize=64)(_Grid)


def _rdp_steps(q: Vector, sigma: Vector, grid: _Grid) -> Vector:
    """(N, K) RDP of one step for N mechanisms at K integer orders: log A / (order - 1).

    A = sum_k C(order, k) (1-q)^(order-k) q^k exp(x_k) with x_k = k(k-1) / (2 sigma^2). The binomial weights sum to one,
    so A - 1 is the same sum over exp(x_k) - 1, which is zero for k < 2: taken like this nothing cancels, and a tiny q
    is not rounded down to a price of zero.
    """
    half = 0.5 / sigma / sigma  # (N,)
    plain = (q > 0.0) & (q < 1.0)
    p = np.where(plain, q, 0.5)  # the ends have closed forms, below
    x = (grid.k * (grid.k - 1.0)) * half[:, None]  # (N, T)
    weight = grid.choices + grid.k * np.log(p)[:, None] + grid.rest * np.log1p(-p)[:, None]
    terms = weight + x + np.log(-np.expm1(-x))  # minus infinity where sigma is so large that x is zero
    top = np.maximum.reduceat(terms, grid.starts, axis=1)  # (N, K)
    shift = np.where(np.isfinite(top), top, 0.0)
    spread = np.exp(terms - np.repeat(shift, grid.lengths, axis=1))
    log_excess = shift + np.log(np.add.reduceat(spread, grid.starts, axis=1))  # log(A - 1)
    found = (np.maximum(log_excess, 0.0) + np.log1p(np.exp(-np.abs(log_excess)))) / (grid.orders - 1.0)
    found = np.where(np.isinf(top), np.where(top > 0.0, np.inf, 0.0), found)
    found = np.where((q == 1.0)[:, None], grid.orders * half[:, None], found)
    answer: Vector = np.where((q == 0.0)[:, None], 0.0, found)
    return answer


class _Prices:
    """Prices computed so far at one grid: a row of `table` each."""

    def __init__(self, orders: tuple[int, ...]) -> None:
        self.orders = orders
        self.index: dict[Mechanism, int] = {}
        self.table: Vector = np.zeros((0, len(orders)))

    def learn(self, mechanisms: Sequence[Mechanism]) -> None:
        known = len(self.index)
        if known + len(mechanisms) > len(self.table):  # doubled, so that one at a time does not copy all each time
            grown = np.zeros((2 * (known + len(mechanisms)), len(self.orders)))
            grown[:known] = self.table[:known]
            self.table = grown
        for first in range(0, len(mechanisms), _BATCH):
            part = mechanisms[first : first + _BATCH]
            q, sigma, steps = (np.array(column, dtype=np.float64) for column in zip(*part, strict=True))
            with np.errstate(all="ignore"):  # infinities are meant
                prices = _rdp_steps(q, sigma, _grid(self.orders)) * steps[:, None]
            self.table[known + first : known + first + len(part)] = prices
        self.index.update((mechanism, known + at) for at, mechanism in enumerate(mechanisms))


_prices: dict[tuple[int, ...], _Prices] = {}
_prices_lock = Lock()


def vectors(mechanisms: Sequence[Mechanism], orders: Sequence[int]) -> Vector:
    """RDP of (q, sigma, steps) mechanisms, (N, K), nats; each is computed once and kept.

    The mechanisms must have passed `check_mechanism`, the orders `check_orders`.
    """
    if not mechanisms:
        return np.zeros((0, len(orders)))
    grid = tuple(orders)
    with _prices_lock:
        kept = _prices.get(grid)
        if kept is None or len(kept.index) > PRICES_MAX:
            kept = _prices[grid] = _Prices(grid)
        missing = [mechanism for mechanism in dict.fromkeys(mechanisms) if mechanism not in kept.index]
        if missing:
            kept.learn(missing)
        found: Vector = kept.table[[kept.index[mechanism] for mechanism in mechanisms]]
    return found


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
    return tuple(vectors([(float(q), float(sigma), steps)], orders)[0].tolist())


def totals(owner: Indices, mechanism: Indices, prices: Vector, count: int) -> Vector:
    """(count, K): the sum of prices[mechanism[i]] for each owner[i], in the order of i.

    Equal, bit for bit, to adding them one after another, so that a replay equals what was in memory.

    Args:
        owner: (N,) in [0, count).
        mechanism: (N,) rows of `prices`.
        prices: (M, K), nats.
        count: how many owners there are.
    """
    total = np.zeros((prices.shape[1], count))
    for order in range(prices.shape[1]):
        np.add.at(total[order], owner, prices[:, order][mechanism])
    return np.ascontiguousarray(total.T)


def _conversion(order: int, delta: float) -> float:
    """What an (order, rho)-RDP mechanism pays on top of rho for (epsilon, delta): epsilon = rho + this."""
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def epsilon_from_rdp(values: Sequence[float], orders: Sequence[int], delta: float) -> tuple[float, int]:
    """The smallest epsilon over the orders, and its order (Canonne, Kamath, Steinke 2020, proposition 12).

    Valid for a schedule fixed in advance: over adaptively chosen rounds only the filter's sealed epsilon is a claim.
    """
    paid = conversions(tuple(orders), delta)
    epsilon, order = min([(rho + more, a) for rho, more, a in zip(values, paid, orders, strict=True)])
    return max(0.0, epsilon), order


@lru_cache(maxsize=1024)
def conversions(orders: tuple[int, ...], delta: float) -> tuple[float, ...]:
    """What comes on top of the RDP at each order for (epsilon, delta), nats."""
    return tuple(_conversion(order, delta) for order in orders)


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
    found = _caps(tuple(orders), float(epsilon), float(delta))
    if max(found) <= 0.0:
        raise PolicyError(f"epsilon={epsilon}, delta={delta}: no Rényi order of {list(orders)} can afford any round")
    return found


@lru_cache(maxsize=1024)
def _caps(orders: tuple[int, ...], epsilon: float, delta: float) -> tuple[float, ...]:
    share = delta / len(orders)
    return tuple(epsilon - _conversion(order, share) for order in orders)


def fits(spent: Sequence[float], rho: Sequence[float], bounds: Sequence[float]) -> bool:
    """The filter: is there an order at which spent + rho stays within its bound?"""
    return any(c > 0.0 and s + r <= c for s, r, c in zip(spent, rho, bounds, strict=True))


def share_used(spent: Sequence[float], bounds: Sequence[float]) -> float:
    """Share of the filter used: at the order that has the most left, spent over cap. 0 is untouched, 1 is full."""
    return min((s / c for s, c in zip(spent, bounds, strict=True) if c > 0.0), default=0.0)


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
