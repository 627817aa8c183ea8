"""How often a canary that is not worse is stepped back from, and how soon one that is worse: in simulation.

`make bench-canary` prints a table and writes bench/results/canary.json. Requests come one after another; each is
answered by live or the canary by lot, as `serving.delivery` draws. A failure is a coin, a time is lognormal with a
spread of 0.5, as times of answers are; with users, each has a pace of its own and always the same side. The rules are
the defaults of `params.yaml` (false_alarm 0.01, requests_min 20, latency_ratio 1.2), the share is a tenth, and a
canary ends after 5,000 requests.

`false_alarms` are runs of a canary that is not worse. The two careless ones show what the figure would be otherwise:
`without_spending` tests at every look as if it were the only one, `users_as_requests` takes a user's requests for draws
of their own. `found` are runs of one that is worse: the share of them that was stepped back from, and after how many
requests, median and nine out of ten.

Nothing is timed: the figures depend on the seeds alone.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from serving.comparing import TESTS, Rules, Watch, worse  # noqa: E402

SHARE = 0.1
REQUESTS = 5000
NULL_RUNS, WORSE_RUNS = 2000, 400
USERS = 100
LIVE = (0.02, 1.0)  # the chance to fail, the factor of a time

Look = Callable[[Watch], str | None]


def run(
    seed: int, canary: tuple[float, float], *, users: int = 0, tail: float = 0.0, look: Look, as_requests: bool = False
) -> int | None:
    """The request at which it was stepped back from a canary, None when it was not."""
    draw = random.Random(seed)  # noqa: S311 - a simulation
    watch = Watch(SHARE, Rules())
    people = [(draw.random() < SHARE, math.exp(draw.gauss(0, 1))) for _ in range(users)]
    for number in range(REQUESTS):
        if users:
            unit = draw.randrange(users)
            on_canary, pace = people[unit]
        else:
            unit, on_canary, pace = number, draw.random() < SHARE, 1.0
        fails, factor = canary if on_canary else LIVE
        if on_canary and tail and draw.random() < tail:
            factor = 10.0
        watch.saw(
            canary=on_canary,
            unit=number if as_requests else unit,
            drawn=True,
            ok=draw.random() >= fails,
            seconds=pace * factor * math.exp(draw.gauss(0, 0.5)),
        )
        if look(watch):
            return number + 1
    return None


def careful(watch: Watch) -> str | None:
    """As the server looks."""
    return watch.look()


def false_alarms(runs: int, **how: Any) -> dict[str, Any]:
    """How many runs were stepped back from, with the 95% interval of Wilson (1927)."""
    found = sum(run(seed, **how) is not None for seed in range(runs))
    rate, z = found / runs, 1.96
    middle = (rate + z * z / (2 * runs)) / (1 + z * z / runs)
    half = z * math.sqrt(rate * (1 - rate) / runs + z * z / (4 * runs * runs)) / (1 + z * z / runs)
    return {"runs": runs, "stepped_back": found, "rate": round(rate, 4),
            "interval": [round(max(0.0, middle - half), 4), round(middle + half, 4)]}  # fmt: skip


def found(runs: int, **how: Any) -> dict[str, Any]:
    """How many runs were stepped back from, and after how many requests."""
    at = sorted(number for seed in range(runs) if (number := run(seed, **how)) is not None)
    enough = len(at) >= 0.9 * runs
    return {
        "runs": runs,
        "share_found": round(len(at) / runs, 3),
        "requests_median": int(statistics.median(at)) if at else None,
        "requests_nine_of_ten": at[math.ceil(0.9 * runs) - 1] if enough else None,
    }


def spend_all_at_every_look(yes: bool) -> None:
    """Let every look test at the whole rate, or not."""
    import serving.comparing as module

    whole = Rules().false_alarm * TESTS
    module.worse = (lambda canary, live, _level, ratio: worse(canary, live, whole, ratio)) if yes else worse


def main() -> None:
    """Print and write the figures."""
    equal, slower = (0.02, 1.0), (0.02, Rules().latency_ratio)
    null = {
        "equal": false_alarms(NULL_RUNS, canary=equal, look=careful),
        "slower_by_the_ratio": false_alarms(NULL_RUNS, canary=slower, look=careful),
        "equal_sticky_users": false_alarms(NULL_RUNS, canary=equal, users=USERS, look=careful),
        "users_as_requests": false_alarms(WORSE_RUNS, canary=equal, users=USERS, look=careful, as_requests=True),
    }
    spend_all_at_every_look(True)
    null["without_spending"] = false_alarms(WORSE_RUNS, canary=slower, look=careful)
    spend_all_at_every_look(False)
    cases: dict[str, dict[str, Any]] = {
        "all fail": {"canary": (1.0, 1.0)},
        "a third fails": {"canary": (0.33, 1.0)},
        "an eighth fails": {"canary": (0.125, 1.0)},
        "four times slower": {"canary": (0.02, 4.0)},
        "twice slower": {"canary": (0.02, 2.0)},
        "half as slow again": {"canary": (0.02, 1.5)},
        "a tenth ten times slower": {"canary": (0.02, 1.0), "tail": 0.1},
        "twice slower, sticky users": {"canary": (0.02, 2.0), "users": 1000},
    }
    worse_ones = {name: found(WORSE_RUNS, look=careful, **case) for name, case in cases.items()}
    result = {"share": SHARE, "requests": REQUESTS, "rules": vars(Rules()), "false_alarms": null, "found": worse_ones}
    (ROOT / "bench" / "results" / "canary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"share {SHARE:g}, {REQUESTS} requests, live fails {LIVE[0]:.0%}, false_alarm {Rules().false_alarm:g}\n")
    print(f"{'not worse':<28}{'runs':>6}{'stepped back from':>20}   95% interval")
    for name, row in null.items():
        low, high = row["interval"]
        print(f"{name:<28}{row['runs']:>6}{row['rate']:>19.1%}   {low:.1%} to {high:.1%}")
    print(f"\n{'worse':<28}{'runs':>6}{'found':>8}{'requests, median':>20}{'nine of ten':>14}")
    for name, row in worse_ones.items():
        nine = row["requests_nine_of_ten"] or "-"
        print(f"{name:<28}{row['runs']:>6}{row['share_found']:>8.0%}{row['requests_median'] or '-':>20}{nine:>14}")


if __name__ == "__main__":
    main()
