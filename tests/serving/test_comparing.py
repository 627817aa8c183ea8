"""The tests of a canary: their false alarms are bounded, what they are for is found, and careless ones are caught."""

import math
import random
from itertools import count

import pytest

from serving.comparing import FAILED_RUN, Rules, Watch, p_at_least

SHARE = 0.2


def run(seed, *, requests, rules, canary=(0.02, 1.0), live=(0.02, 1.0), users=0, every=1):
    """Simulate a canary: (chance to fail, factor of the time) on each side. The request at which it stepped back."""
    draw = random.Random(seed)
    watch = Watch(SHARE, rules)
    # Users differ: each has a pace of its own, and all of its requests go one way.
    sides = [(draw.random() < SHARE, math.exp(draw.gauss(0, 1))) for _ in range(users)]
    for number in range(requests):
        if users:
            unit = draw.randrange(users)
            on_canary, pace = sides[unit]
        else:
            unit, on_canary, pace = number, draw.random() < SHARE, 1.0
        fails, factor = canary if on_canary else live
        seconds = pace * factor * math.exp(draw.gauss(0, 0.5))
        watch.saw(canary=on_canary, unit=unit, drawn=True, ok=draw.random() >= fails, seconds=seconds)
        if number % every == 0 and watch.look():
            return number
    return None


def alarms(runs, **how):
    return sum(run(seed, **how) is not None for seed in range(runs))


def at_most(found, runs, rate):
    """Whether so many alarms may be chance (one in 10,000) where each run has `rate`."""
    return sum(math.comb(runs, k) * rate**k * (1 - rate) ** (runs - k) for k in range(found, runs + 1)) > 1e-4


def test_p_values_are_fishers():
    from scipy.stats import hypergeom

    for of, marked, drawn in [(10, 3, 4), (200, 20, 21), (5000, 12, 500), (7, 7, 3), (9, 0, 4)]:
        for hit in range(min(marked, drawn) + 1):
            assert p_at_least(hit, of, marked, drawn) == pytest.approx(hypergeom.sf(hit - 1, of, marked, drawn))


@pytest.mark.parametrize("users", [0, 60])
@pytest.mark.parametrize("canary", [(0.02, 1.0), (0.0, 0.7), (0.02, 1.2)], ids=["equal", "better", "at the ratio"])
def test_a_canary_that_is_not_worse_is_stepped_back_from_no_more_often_than_said(users, canary):
    rules = Rules(false_alarm=0.1, requests_min=10)
    runs = 150
    assert at_most(alarms(runs, requests=600, rules=rules, canary=canary, users=users), runs, 0.1)


def test_without_spending_over_looks_it_would_be_far_more_often(monkeypatch):
    """The check above can fail: the same tests at their full level at every look alarm too often."""
    from serving import comparing

    exact = comparing.worse
    monkeypatch.setattr(comparing, "worse", lambda canary, live, _level, ratio: exact(canary, live, 0.3, ratio))
    runs = 60
    found = alarms(runs, requests=600, rules=Rules(false_alarm=0.1, requests_min=10), canary=(0.02, 1.2))
    assert not at_most(found, runs, 0.1)


def test_taking_a_user_s_requests_for_independent_would_be_far_more_often(monkeypatch):
    """It can fail in another way: users have paces of their own, and a request of theirs is no draw of its own."""
    numbers = count()
    honest = Watch.saw

    def careless(self, *, unit, **seen):
        honest(self, unit=next(numbers), **seen)

    monkeypatch.setattr(Watch, "saw", careless)
    how = {"requests": 600, "rules": Rules(false_alarm=0.1, requests_min=10, latency_ratio=1.0), "users": 24}
    runs = 150
    assert not at_most(alarms(runs, **how), runs, 0.1)
    monkeypatch.undo()
    assert at_most(alarms(runs, **how), runs, 0.1)


@pytest.mark.parametrize(
    ("canary", "within"),
    [((1.0, 1.0), 60), ((0.3, 1.0), 250), ((0.12, 1.0), 1500), ((0.02, 4.0), 250), ((0.02, 2.0), 600)],
    ids=["all fail", "a third fails", "an eighth fails", "four times slower", "twice slower"],
)
def test_a_canary_that_is_worse_is_found(canary, within):
    runs = 40
    found = [run(seed, requests=within, rules=Rules(), canary=canary) for seed in range(runs)]
    assert sum(at is not None for at in found) >= 0.9 * runs, found


def test_a_slow_tail_is_found_though_the_median_is_as_before():
    rules = Rules(false_alarm=0.05, requests_min=10)
    found = 0
    for seed in range(20):
        draw, watch = random.Random(seed), Watch(SHARE, rules)
        for number in range(1500):
            on_canary = draw.random() < SHARE
            seconds = draw.uniform(0.9, 1.1) * (10 if on_canary and draw.random() < 0.2 else 1)
            watch.saw(canary=on_canary, unit=number, drawn=True, ok=True, seconds=seconds)
            if watch.look():
                found += 1
                break
    assert found >= 18


def test_a_canary_that_turns_bad_after_a_long_good_time_is_found():
    draw, watch = random.Random(1), Watch(SHARE, Rules())
    sees = {"drawn": True, "seconds": 1.0}
    for number in range(20_000):
        watch.saw(canary=draw.random() < SHARE, unit=number, ok=True, **sees)
        assert watch.look() is None
    for number in range(20_000, 21_500):
        on_canary = draw.random() < SHARE
        watch.saw(canary=on_canary, unit=number, ok=not on_canary or draw.random() < 0.6, **sees)
        if why := watch.look():
            assert "fail" in why
            return
    pytest.fail("not found within 1,500 requests")


def test_failures_in_a_row_need_no_statistics_and_what_a_client_chose_is_not_compared():
    watch = Watch(0.01, Rules())
    for number in range(FAILED_RUN):
        assert watch.look() is None
        watch.saw(canary=True, unit=number, drawn=False, ok=False, seconds=0.1)
    assert "in a row" in watch.look()
    both = Watch(0.01, Rules())
    for number in range(10 * FAILED_RUN):
        both.saw(canary=number % 3 > 0, unit=number, drawn=False, ok=False, seconds=0.1)
    assert both.look() is None, "live fails as well: the canary is not to blame"
    chosen = Watch(0.5, Rules())
    for number in range(1000):
        on_canary = number % 2 == 0
        ok = not on_canary or number % 4 == 0
        chosen.saw(canary=on_canary, unit=number, drawn=False, ok=ok, seconds=1.0)
        assert chosen.look() is None
    assert chosen.counts == {"canary": [500, 250], "live": [500, 0]}
