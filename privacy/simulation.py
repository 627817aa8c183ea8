"""An adaptive adversary played against the filter, and the delta it reaches: evidence, never part of a round.

One unit is present or absent. A Poisson-subsampled Gaussian is simulated exactly in the one dimension that is worst for
it, where its output is (1-q) N(0, s^2) + q N(1, s^2) with the unit and N(0, s^2) without: that pair and its reverse
dominate every other for add/remove neighbours, also under adaptive composition (Zhu, Dong, Wang 2022). The adversary
sees all privacy losses so far and picks the next round, or stops; a filter admits the round or does not (Whitehouse,
Ramdas, Rogers, Wu 2023). Measured is the hockey-stick divergence E[max(0, 1 - exp(epsilon - loss))], which is at most
delta exactly when (epsilon, delta) holds (Dwork, Roth 2014, section 3.5; Balle, Wang 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy import accounting
from privacy.errors import PolicyError

Array = NDArray[np.float64]
Spent = tuple[float, ...]
Admits = Callable[[Spent, Spent], bool]
"""A filter: (spent, price), both per order in nats, to whether the round may run."""

STOP = -1
# Losses at which a planned adversary tells states apart, nats around zero and epsilon. Only its choices depend on them:
# what a choice leads to is sampled without a grid.
_GRID_POINTS = 420
_GRID_MARGIN = 8.0
# Gauss-Hermite points for the planner's expectations, enough for kinks that the grid itself smooths.
_QUADRATURE = 48
# A planner looks at every history of the menu; more than this takes minutes and means that the menu is too fine.
_HISTORIES_MAX = 20_000


@dataclass(frozen=True)
class Round:
    """What one round does: sampling rate q, noise multiplier sigma, and steps."""

    q: float
    sigma: float
    steps: int = 1

    def __post_init__(self) -> None:
        accounting.check_mechanism(self.q, self.sigma, self.steps)

    def price(self, orders: Sequence[int]) -> Spent:
        """What the accountant charges for it, RDP per order, nats."""
        return accounting.rdp(self.q, self.sigma, self.steps, orders)


def losses(of: Round, runs: int, rng: np.random.Generator, *, present: bool) -> Array:
    """`(runs,)` privacy losses of one round, nats, drawn from their exact distribution.

    Args:
        of: the round.
        runs: how many independent ones.
        rng: where randomness comes from.
        present: True: the output is drawn with the unit and the loss is log P/Q. False: drawn without it, log Q/P.
    """
    total = np.zeros(runs)
    for _ in range(of.steps):
        outputs = rng.standard_normal(runs) * of.sigma
        if present:
            outputs += rng.random(runs) < of.q
        total += _log_ratio(of, outputs)
    return total if present else -total


def _log_ratio(of: Round, outputs: Array) -> Array:
    """Log of the density with the unit over that without, at the outputs of one step."""
    shifted = (outputs - 0.5) / of.sigma**2
    if of.q == 1.0:
        return shifted
    if of.q == 0.0:
        return np.zeros_like(outputs)
    return np.logaddexp(math.log1p(-of.q), math.log(of.q) + shifted)


@dataclass(frozen=True)
class Interval:
    """A mean of values in [0, 1]; each bound is passed with a chance of at most `error`."""

    mean: float
    lower: float
    upper: float


def measure(values: Array, error: float = 1e-4) -> Interval:
    """Mean and empirical Bernstein bounds of independent values in [0, 1] (Maurer, Pontil 2009, theorem 4).

    Args:
        values: `(runs,)`, two or more.
        error: chance that one bound is wrong.
    """
    n, mean = len(values), float(values.mean())
    surprise = math.log(2.0 / error)
    width = math.sqrt(2.0 * float(values.var(ddof=1)) * surprise / n) + 7.0 * surprise / (3.0 * (n - 1))
    return Interval(mean, max(0.0, mean - width), min(1.0, mean + width))


@dataclass(frozen=True)
class Game:
    """Rules of one simulation: what may be asked for, what it costs, when it is admitted, and what is claimed.

    Attributes:
        menu: rounds the adversary may ask for.
        prices: what each is charged, per order; of a right accountant `Round.price`.
        admits: the filter.
        epsilon: the claim for a run that ends with this spending, nats. A sealed claim does not look at it.
        rounds_max: rounds after which a run ends. A filter that never refuses needs it.
    """

    menu: tuple[Round, ...]
    prices: tuple[Spent, ...]
    admits: Admits
    epsilon: Callable[[Spent], float]
    rounds_max: int = 200


def sealed_game(menu: Sequence[Round], orders: Sequence[int], epsilon: float, delta: float) -> Game:
    """The game as Tidegate plays it: `Round.price`, `accounting.caps`, `accounting.fits`, the sealed epsilon.

    Raises:
        PolicyError: orders, epsilon or delta are out of bounds, or no order can afford any round.
    """
    bounds = accounting.caps(orders, epsilon, delta)
    return Game(
        menu=tuple(menu),
        prices=tuple(of.price(orders) for of in menu),
        admits=lambda spent, price: accounting.fits(spent, price, bounds),
        epsilon=lambda _spent: epsilon,
    )


class Histories:
    """Which rounds ran in a simulated past, as numbers: runs with the same rounds share one, whatever their order.

    The filter is asked once per history and round, so that the code under test decides for 200,000 runs at a time.
    """

    def __init__(self, game: Game) -> None:
        self._game = game
        self._numbers: dict[tuple[int, ...], int] = {}
        self._counts: list[tuple[int, ...]] = []
        self.spent: list[Spent] = []
        self.epsilon: list[float] = []
        self._children: list[tuple[int, ...] | None] = []
        self._number((0,) * len(game.menu), (0.0,) * len(game.prices[0]))

    def children(self, number: int) -> tuple[int, ...]:
        """For each round of the menu the history it leads to, STOP where the filter refuses it."""
        known = self._children[number]
        if known is None:
            known = tuple(self._next(number, at) for at in range(len(self._game.menu)))
            self._children[number] = known
        return known

    def _next(self, number: int, at: int) -> int:
        spent, price, counts = self.spent[number], self._game.prices[at], self._counts[number]
        if sum(counts) >= self._game.rounds_max or not self._game.admits(spent, price):
            return STOP
        after = (*counts[:at], counts[at] + 1, *counts[at + 1 :])
        return self._number(after, tuple(s + p for s, p in zip(spent, price, strict=True)))

    def _number(self, counts: tuple[int, ...], spent: Spent) -> int:
        if counts not in self._numbers:
            self._numbers[counts] = len(self._counts)
            self._counts.append(counts)
            self.spent.append(spent)
            self.epsilon.append(self._game.epsilon(spent))
            self._children.append(None)
        return self._numbers[counts]


@dataclass(frozen=True)
class View:
    """What an adversary sees of the runs that still go on: everything, also the losses."""

    round: int  # how many rounds each has had
    loss: Array  # (runs,) nats
    history: NDArray[np.int64]  # (runs,)
    admitted: NDArray[np.bool_]  # (runs, menu)
    spent: Array  # (runs, orders) nats
    epsilon: Array  # (runs,) what would be claimed now


class Strategy(Protocol):
    """An adversary: for each run the number of a round of the menu, or STOP. One that is not admitted stops the run."""

    def __call__(self, view: View) -> NDArray[np.int64]:
        """`(runs,)` choices."""
        ...


@dataclass(frozen=True)
class Played:
    """How the runs ended."""

    loss: Array  # (runs,) nats
    epsilon: Array  # (runs,) what is claimed for each
    choices: NDArray[np.int64]  # (rounds, runs): what was asked for, STOP once a run has ended
    refused: NDArray[np.bool_]  # (runs,): ended because the filter refused what was asked for

    @property
    def harm(self) -> Array:
        """`(runs,)` values whose mean is the hockey-stick divergence."""
        return np.maximum(0.0, -np.expm1(np.minimum(self.epsilon - self.loss, 0.0)))


def play(
    game: Game, strategy: Strategy, *, runs: int, seed: int, present: bool, seen: Histories | None = None
) -> Played:
    """Let an adversary play `runs` independent games.

    Args:
        game: the rules.
        strategy: the adversary.
        runs: how many.
        seed: of everything random; the same seed gives the same runs.
        present: see `losses`.
        seen: histories that the strategy was planned on.
    """
    rng, known = np.random.default_rng(seed), seen or Histories(game)
    loss, history = np.zeros(runs), np.zeros(runs, dtype=np.int64)
    refused, going, asked = np.zeros(runs, dtype=bool), np.arange(runs), []
    for number in range(game.rounds_max):
        if not len(going):
            break
        places, at = np.unique(history[going], return_inverse=True)
        following = np.array([known.children(int(place)) for place in places])[at]  # (going, menu)
        view = View(
            round=number,
            loss=loss[going],
            history=history[going],
            admitted=following >= 0,
            spent=np.array([known.spent[int(place)] for place in places])[at],
            epsilon=np.array([known.epsilon[int(place)] for place in places])[at],
        )
        choice = strategy(view)
        row = np.full(runs, STOP)
        row[going] = choice
        asked.append(row)
        reached = np.where(choice >= 0, following[np.arange(len(going)), choice], STOP)
        refused[going[(choice >= 0) & (reached < 0)]] = True
        for which in np.unique(choice[reached >= 0]):
            who = going[(choice == which) & (reached >= 0)]
            loss[who] += losses(game.menu[which], len(who), rng, present=present)
        history[going[reached >= 0]] = reached[reached >= 0]
        going = going[reached >= 0]
    claimed = np.array([known.epsilon[int(place)] for place in history])
    return Played(loss, claimed, np.array(asked), refused)


# -- adversaries ------------------------------------------------------------------------------------------------------


def _ahead(view: View, margin: float) -> NDArray[np.bool_]:
    """Runs whose loss is past what is claimed by `margin`: at order a, log(a/(a-1)) makes the conversion tight."""
    ahead: NDArray[np.bool_] = view.loss >= view.epsilon + margin
    return ahead


def in_advance(view: View) -> NDArray[np.int64]:
    """No adversary: the first round of the menu until it is refused. What every other must be compared with."""
    return np.zeros(len(view.loss), dtype=np.int64)


def in_turn(view: View) -> NDArray[np.int64]:
    """The menu in its order, each round once; stops while ahead of the claim of that moment."""
    if view.round >= view.admitted.shape[1]:
        return np.full(len(view.loss), STOP)
    return np.where(_ahead(view, 0.3), STOP, view.round)


@dataclass(frozen=True)
class StopAhead:
    """Repeats one round of the menu, and stops while it is ahead: waits for luck, then keeps it."""

    at: int = 0
    margin: float = 0.3

    def __call__(self, view: View) -> NDArray[np.int64]:
        """`(runs,)` choices."""
        return np.where(_ahead(view, self.margin), STOP, self.at)


@dataclass(frozen=True)
class PushHigh:
    """Small rounds while losses are low; with a high one the costliest round that some order still admits."""

    prices: tuple[Spent, ...]
    high: float = 0.5  # share of the claimed epsilon
    margin: float = 0.3

    def __call__(self, view: View) -> NDArray[np.int64]:
        """`(runs,)` choices."""
        cost = np.array(self.prices).sum(axis=1)  # (menu,)
        dearest = np.where(view.admitted, cost, -1.0).argmax(axis=1)
        cheapest = np.where(view.admitted, cost, np.inf).argmin(axis=1)
        pushed = np.where(view.loss >= self.high * view.epsilon, dearest, cheapest)
        return np.where(_ahead(view, self.margin), STOP, pushed)


@dataclass(frozen=True)
class MostLeft:
    """Looks for the order that has most left, and asks for what is dearest elsewhere for its price there."""

    prices: tuple[Spent, ...]
    bounds: tuple[float, ...]
    margin: float = 0.3

    def __call__(self, view: View) -> NDArray[np.int64]:
        """`(runs,)` choices."""
        price, bound = np.array(self.prices), np.array(self.bounds)
        left = np.where(bound > 0, 1.0 - view.spent / np.where(bound > 0, bound, 1.0), -np.inf)
        there = price[:, left.argmax(axis=1)].T  # (runs, menu)
        bargain = np.where(view.admitted, price.sum(axis=1) / there, -1.0)
        return np.where(_ahead(view, self.margin), STOP, bargain.argmax(axis=1))


@dataclass(frozen=True)
class Switch:
    """Rounds that are dear at one end of the grid first, those dear at the other end afterwards.

    The order that is best in the end then depends on how the losses fell: the runs that lost go on with the second
    kind, the runs that won with the first.
    """

    first: int
    second: int
    rounds: int = 3
    margin: float = 0.3

    def __call__(self, view: View) -> NDArray[np.int64]:
        """`(runs,)` choices."""
        every = np.arange(len(view.loss))
        early = (view.round < self.rounds) | (view.loss > 0)
        wanted = np.where(early, self.first, self.second)
        other = np.where(early, self.second, self.first)
        chosen = np.where(view.admitted[every, wanted], wanted, other)
        return np.where(_ahead(view, self.margin), STOP, chosen)


class BestResponse:
    """The adversary that does most harm with this menu, found by backward induction over histories and losses.

    Its plan lives on a grid of losses, so that it is the best one but for rounding; what it reaches is measured by
    `play`, without a grid.

    Args:
        game: the rules; the claim must be sealed, and the menu coarse.
        present: see `losses`.

    Raises:
        PolicyError: the menu has too many histories.
    """

    def __init__(self, game: Game, *, present: bool) -> None:
        self.histories = Histories(game)
        epsilon = self.histories.epsilon[0]
        self._grid = np.linspace(-_GRID_MARGIN, epsilon + _GRID_MARGIN, _GRID_POINTS)
        moves = [_transition(of, self._grid, present=present) for of in game.menu]
        layers = self._layers()
        stop = np.maximum(0.0, -np.expm1(np.minimum(epsilon - self._grid, 0.0)))
        worth = np.zeros((len(self.histories.spent), _GRID_POINTS))
        self._plan = np.full(worth.shape, STOP)
        for layer in reversed(layers):
            for place in layer:
                worth[place] = stop
                for at, child in enumerate(self.histories.children(place)):
                    if child >= 0:
                        # A gain below 1e-12 is rounding, and would make runs go on for nothing.
                        value = moves[at] @ worth[child]
                        better = value > worth[place] + 1e-12
                        worth[place][better], self._plan[place][better] = value[better], at

    def __call__(self, view: View) -> NDArray[np.int64]:
        """`(runs,)` choices."""
        step = self._grid[1] - self._grid[0]
        nearest = np.rint((view.loss - self._grid[0]) / step).astype(np.int64)
        choices: NDArray[np.int64] = self._plan[view.history, np.clip(nearest, 0, _GRID_POINTS - 1)]
        return choices

    def _layers(self) -> list[list[int]]:
        """Histories by their number of rounds."""
        layers = [[0]]
        while layers[-1]:
            reached = {child for place in layers[-1] for child in self.histories.children(place) if child >= 0}
            layers.append(sorted(reached))
            if len(self.histories.spent) > _HISTORIES_MAX:
                raise PolicyError(f"histories={len(self.histories.spent)}: must be <= {_HISTORIES_MAX}; coarser menu")
        return layers


def _transition(of: Round, grid: Array, *, present: bool) -> Array:
    """`(G, G)`: row i has the weights with which one round takes a loss of grid[i] to the grid's points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
    weights = weights / weights.sum()
    outputs, chances = of.sigma * nodes, weights
    if present:
        outputs = np.concatenate((outputs, outputs + 1.0))
        chances = np.concatenate(((1.0 - of.q) * weights, of.q * weights))
    moved = _log_ratio(of, outputs) if present else -_log_ratio(of, outputs)
    rows, matrix = np.arange(len(grid)), np.zeros((len(grid), len(grid)))
    for by, chance in zip(moved, chances, strict=True):
        place = np.clip((grid + by - grid[0]) / (grid[1] - grid[0]), 0.0, len(grid) - 1.001)
        lower = place.astype(np.int64)
        matrix[rows, lower] += chance * (1.0 - (place - lower))
        matrix[rows, lower + 1] += chance * (place - lower)
    return np.linalg.matrix_power(matrix, of.steps)
