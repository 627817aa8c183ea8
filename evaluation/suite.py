"""Suites: sets of prompts of their own, asked of several models in one pass, within a budget of seconds.

When the whole does not fit, a part is asked. Which part depends on the items' names alone, and a smaller part lies
within a larger one: candidate and live always answer the same items, and two versions share what both were asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

from evaluation.errors import NotMeasured
from evaluation.measurement import Measurement

T = TypeVar("T")
Names = Sequence[str | None]
"""The engine's names of adapters; None is the bare base."""

# Enough to learn how long an item takes.
_FIRST = 16
# What is left of the budget is spent in ever smaller parts, because the next items may take longer than the last.
_SHARE = 0.6
# No part is so many times what was asked before it: the first items may have been quick ones.
_GROWTH = 4


@dataclass(frozen=True)
class Asked:
    """What came of asking some models a suite.

    Attributes:
        found: by metric, then by adapter: one row an item, the same items in the same order for all of them.
        names: of the items asked, in the order of the rows.
        of: items the suite has.
        seconds: all of it took, all models together.
        not_measured: why there is nothing; empty when there is.
        reported: by adapter, the figures as the suite's own tool prints them; empty where it has none.
    """

    found: Mapping[str, Mapping[str | None, Measurement]] = field(default_factory=dict)
    names: Sequence[str] = ()
    of: int = 0
    seconds: float = 0.0
    not_measured: str = ""
    reported: Mapping[str | None, Mapping[str, float]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Items asked."""
        return len(self.names)

    def measurement(self, metric: str, adapter: str | None) -> Measurement:
        """One model's rows.

        Raises:
            NotMeasured: there are none, for the reason it says.
        """
        if self.not_measured:
            raise NotMeasured(self.not_measured)
        if metric not in self.found:
            raise NotMeasured(f"this suite has no {metric}; it has {', '.join(sorted(self.found))}")
        return self.found[metric][adapter]


def nested(names: Sequence[T], seed: int, key: Callable[[T], str] = str) -> list[T]:
    """The items in an order that looks random and depends on each name and the seed alone."""
    return sorted(names, key=lambda name: sha256(f"{seed}\x00{key(name)}".encode()).digest())


def within(
    items: Sequence[T],
    seconds: float,
    ask: Callable[[Sequence[T]], None],
    clock: Callable[[], float] = time.monotonic,
    first: int = _FIRST,
) -> int:
    """Ask items from the front, in parts, until the next part would not fit.

    Args:
        items: in the order they are to be asked.
        seconds: the budget.
        ask: asks some of them.
        clock: seconds.
        first: so many are asked to learn how long an item takes, even when they exceed the budget.

    Returns:
        how many were asked.
    """
    begin, done, part = clock(), 0, first
    while done < len(items):
        started = clock()
        ask(items[done : done + part])
        asked = min(part, len(items) - done)
        done += asked
        took, left = clock() - started, seconds - (clock() - begin)
        fits = len(items) if took <= 0 else int(min(len(items), asked * left / took))
        if fits < min(first, len(items) - done):
            break
        rest = len(items) - done
        part = min(_GROWTH * done, rest if rest <= _SHARE * fits else max(first, int(_SHARE * fits)))
    return done


def left_out(n: int, of: int, seconds: float) -> str:
    """What a reader must know of a suite that was not asked as a whole; empty when it was."""
    return "" if n == of else f"{n} of {of} items were asked, {seconds:g} s did not allow for more"


@dataclass
class Shared:
    """One suite, asked once for all models of an evaluation.

    Whoever is asked first decides how many items there are; models asked later get the same.
    """

    ask: Callable[[Names, int | None], Asked]
    asked: list[tuple[tuple[str | None, ...], Asked]] = field(default_factory=list)

    def of(self, adapter: str | None, beside: Names) -> Asked:
        """What came of asking one model; the models `beside` it are asked in the same pass, when it is the first."""
        for names, found in self.asked:
            if adapter in names:
                return found
        names = (adapter,) if self.asked else tuple(dict.fromkeys((adapter, *beside)))
        found = self.ask(names, self.asked[0][1].n if self.asked else None)
        self.asked.append((names, found))
        return found
