"""What decisions become, on a real server on both databases: one ask at a time against a dictionary, then all at once.

`make race-registry` has the minute. That the verdict of the race can be guilty is shown here too.
"""

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from registry.approvals import Approvals
from tests.privacy import postgres
from tests.registry.decisions import Decisions, Desk
from tests.registry.race import on
from tests.registry.race_verdict import Answer, Sightings, faults


@pytest.fixture(scope="module")
def folder():
    if postgres.binary("initdb") is None:
        reason = "PostgreSQL is missing: install the server's programs (initdb, pg_ctl)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with postgres.server() as socket:
        yield socket


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def race(request, folder):
    """One guarded server for each database."""
    with on(request.param, folder) as begun:
        yield begun


def decide(race, examples, steps, kind=Desk):
    machine = type("DecisionsHere", (Decisions,), {"race": race, "kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],  # a real server: no two runs are the same, so none is shrunk
        ),
    )


def test_every_ask_ends_in_the_state_it_should_whatever_came_before(race):
    decide(race, examples=8, steps=16)


class Credulous(Desk):
    """Lets a version go live again that a person rejected."""

    def promote(self, number):
        chosen = self.versions[number]
        chosen.state = "stale" if chosen.state == "rejected" else chosen.state
        return super().promote(number)


class Forgetful(Desk):
    """Lets candidates wait whose parent is no longer live."""

    def _make_stale(self, sha):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Credulous, Forgetful])
def test_a_dictionary_that_is_wrong_is_contradicted(race, kind):
    with pytest.raises(AssertionError):
        decide(race, examples=40, steps=16, kind=kind)


@pytest.mark.slow
def test_every_ask_ends_in_the_state_it_should_many_times_over(race):
    decide(race, examples=60, steps=30)


def test_one_version_stands_in_production_and_all_is_written_down_whoever_races_and_whatever_dies(race):
    taken = emergency(race)
    evidence = race.run(seconds=5, clients=16, kills=1)
    assert faults(evidence) == []
    made_lasting(race, taken)
    for spoilt, named in spoilings(evidence):
        assert any(named in sentence for sentence in faults(spoilt)), named


def emergency(race):
    """What `tidegate rollback --emergency` leaves, of another model: MLflow is killed before anybody decides again."""
    model, world = "down", race.world
    one, sha = world.candidate(model)
    world.store.promote(model, one, why="first", who="ada")
    two, _ = world.candidate(model, parent=sha)
    world.store.promote(model, two, why="second", who="ada")
    approvals = Approvals(race.approvals_url, world.key("approvals"))
    row = approvals.append(
        model=model,
        version=one,
        adapter_sha256=sha,
        from_stage="unknown",
        to_stage="Production",
        who="oncall",
        why="two talks nonsense",
        kind="emergency",
    )
    approvals.close()
    return row


def made_lasting(race, taken):
    """After the start, without anybody's doing: MLflow shows it, and the history says by what."""
    approvals = Approvals(race.approvals_url)
    row = approvals.latest("down")
    approvals.close()
    assert (row["kind"], row["who"], row["version"]) == ("rollback", "tidegate", taken["version"])
    assert f"emergency approval {taken['seq']} by oncall" in row["why"]
    assert race.world.stages("down") == {taken["version"]: "Production", taken["version"] + 1: "Archived"}


def spoilings(evidence):
    """The same evidence with one thing wrong in each, and what must be said of it."""
    heard = next(a for a in evidence.answers if a.code == 200 and a.what == "promote")
    row = next(r for r in evidence.history if r["seq"] == heard.seq)
    without = [r for r in evidence.history if r is not row]
    twice = [*evidence.history, {**row, "seq": 10**6}]
    strange = [*evidence.history, {**row, "seq": 10**6, "why": "nobody's"}]
    past = [*evidence.history, {**row, "seq": 10**6, "who": "tidegate", "why": "found outside Production"}]
    seen = replace(evidence.database, sequence=[*evidence.database.sequence, 10**6])
    yield replace(evidence, database=replace(evidence.database, most=2)), "2 versions in Production at once"
    yield replace(evidence, api=Sightings()), "nobody looked"
    yield replace(evidence, database=seen), "which no row explains"
    yield replace(evidence, history=without), "acknowledged, but"
    yield replace(evidence, history=twice), "stands there 2 times"
    yield replace(evidence, history=strange), "nobody asked for"
    yield replace(evidence, history=past), "says: found outside"
    yield replace(evidence, versions=[replace(v, stage="Archived") for v in evidence.versions]), "Production is []"
    yield replace(evidence, answers=[replace(a, code=0) for a in evidence.answers]), "nothing was decided"
    yield replace(evidence, broken="row seq=3"), "history: row seq=3"
    other = Answer("x", "reject", heard.version, 200, heard.seq)
    yield replace(evidence, answers=[*evidence.answers, other]), "somebody else's decision"


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_same_race_on_a_plain_mlflow_finds_two_in_production(database, folder):
    with on(database, folder, guarded=False) as race:
        evidence = race.run(seconds=6, clients=16, kills=0)
    assert any("versions in Production at once" in sentence for sentence in faults(evidence))
