"""Suites: the part that is asked, the budget, and one pass for all models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.errors import NotMeasured
from evaluation.measurement import Measurement
from evaluation.suite import Asked, Shared, left_out, nested, within


class Clock:
    """Time that passes when items are asked, and only then."""

    def __init__(self, seconds_per_item):
        self.now, self.seconds, self.asked = 0.0, seconds_per_item, []

    def __call__(self):
        return self.now

    def ask(self, items):
        self.asked += items
        self.now += sum(self.seconds(item) for item in items)


@given(st.integers(0, 300), st.floats(0.001, 5), st.floats(0, 200), st.integers(1, 20))
def test_a_budget_is_kept_whatever_an_item_costs(count, each, seconds, first):
    clock = Clock(lambda _: each)
    n = within(range(count), seconds, clock.ask, clock, first)
    assert clock.asked == list(range(n))
    assert n >= min(first, count)
    assert clock.now <= max(seconds, first * each) + 1e-6
    # What is left would not have held as many again as were needed to learn the time.
    assert n == count or seconds - clock.now < (min(first, count - n) + 1) * each


def test_items_that_grow_slower_do_not_run_away_with_the_budget():
    clock = Clock(lambda item: 0.1 + item / 100)
    n = within(range(1000), 60.0, clock.ask, clock)
    assert clock.now <= 1.1 * 60.0
    assert 80 <= n < 1000


def test_a_budget_without_end_asks_everything():
    clock = Clock(lambda _: 1e-9)
    assert within(range(100), float("inf"), clock.ask, clock) == 100


def test_the_order_depends_on_names_and_seed_alone_so_parts_lie_within_each_other():
    names = [f"item {i}" for i in range(200)]
    order = nested(names, 3)
    assert order == nested(list(reversed(names)), 3)
    assert order != nested(names, 4)
    assert [name for name in order if name != "item 7"] == nested([n for n in names if n != "item 7"], 3)
    # As good as drawn: the first quarter has members from all over the file.
    places = [names.index(name) for name in order[:50]]
    assert 70 < sum(places) / 50 < 130


def test_all_models_are_asked_in_one_pass_and_a_late_one_gets_the_same_items():
    calls = []

    def ask(names, items):
        calls.append((tuple(names), items))
        n = 5 if items is None else items
        rows = {name: Measurement.of([1.0] * n) for name in names}
        return Asked({"m": rows}, tuple(map(str, range(n))), 9)

    shared = Shared(ask)
    assert shared.of("candidate", ("candidate", "live")).n == 5
    assert shared.of("live", ("candidate", "live")).measurement("m", "live").n == 5
    assert shared.of(None, ("candidate", "live")).measurement("m", None).n == 5
    assert calls == [(("candidate", "live"), None), ((None,), 5)]


def test_what_was_not_measured_says_why():
    with pytest.raises(NotMeasured, match="no such file"):
        Asked(not_measured="no such file").measurement("m", None)
    with pytest.raises(NotMeasured, match="has no acc; it has m"):
        Asked({"m": {}}).measurement("acc", None)
    assert left_out(10, 10, 5) == ""
    assert left_out(3, 10, 5) == "3 of 10 items were asked, 5 s did not allow for more"
