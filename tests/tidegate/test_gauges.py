"""Gauges of the budgets, from a real ledger, looked up beside the schedule."""

import re
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from registry.errors import RegistryError
from tests.tidegate.streams import STREAM, go_live, seal, workspace
from tidegate import budget
from tidegate.gauges import BudgetGauges, watch
from tidegate.planning import plan_arguments, survey

ROOT = Path(__file__).resolve().parents[2]
HELD = {"privacy": {"holdout_evaluations": 4}}


@pytest.fixture
def service(tmp_path):
    made = workspace(tmp_path / "ws", **HELD)
    old, _ = seal(made, 1), seal(made, 2)
    go_live(made, old)
    return made


def look(service, gauges):
    """One look, as the schedule makes it once a minute."""
    over = threading.Event()
    over.set()
    watch(service, gauges, over)


def told(registry, name, **labels):
    return registry.get_sample_value(f"tidegate_budget_{name}", {"stream": STREAM, **labels})


def test_gauges_say_what_status_says_and_follow_the_ledger(service):
    registry = CollectorRegistry()
    gauges = BudgetGauges(registry)
    look(service, gauges)
    fresh = budget.look(service, STREAM, service.versions(STREAM))
    assert told(registry, "share_used", of="max") == 0.0
    assert told(registry, "rounds_left") == fresh.rounds_left > 1
    assert told(registry, "holdout_evaluations_left") == 4
    assert told(registry, "blocks_retired") == told(registry, "alarms") == 0
    found = survey(service, STREAM, service.versions(STREAM))
    plan = budget.next_plan(found, plan_arguments(service.stream(STREAM).learner))
    replayed = [charge for charge in plan.charges() if charge.block_id.endswith("1")]
    for number in range(fresh.rounds_left):
        service.ledger.reserve(STREAM, f"r{number}", 1, "a" * 64, replayed)
    look(service, gauges)
    spent = budget.look(service, STREAM, service.versions(STREAM))
    assert told(registry, "share_used", of="median") == spent.share_used_median > 0.8
    assert (told(registry, "rounds_left"), told(registry, "blocks_retired")) == (0, 1)
    assert told(registry, "alarms") == len(spent.alarms) == 2


def test_a_look_that_fails_leaves_the_figures_and_their_age(service, monkeypatch):
    registry = CollectorRegistry()
    gauges = BudgetGauges(registry)
    look(service, gauges)
    looked = told(registry, "looked_seconds")

    def down(_model):
        raise RegistryError("nothing answers")

    monkeypatch.setattr(service, "versions", down, raising=False)
    look(service, gauges)
    assert told(registry, "looked_seconds") == looked
    assert told(registry, "rounds_left") > 0


def test_a_scrape_is_the_page_of_the_last_look_and_names_no_block(service):
    registry = CollectorRegistry()
    look(service, BudgetGauges(registry))
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as reply:
        page = reply.read().decode()
    server.shutdown()
    server.server_close()
    thread.join()
    assert f'tidegate_budget_share_used{{of="median",stream="{STREAM}"}} 0.0' in page
    assert f"{STREAM}-0" not in page
    described = re.findall(r"`(tidegate_budget_\w+)`", (ROOT / "docs" / "planning.md").read_text())
    assert set(described) == set(re.findall(r"^# TYPE (\S+)", page, flags=re.MULTILINE))
