"""A short race on both databases; `make race-registry` has the minute. And that the verdict can be guilty."""

import os
from dataclasses import replace

import pytest

from tests.privacy import postgres
from tests.registry.race import on
from tests.registry.race_verdict import Answer, Sightings, faults


@pytest.fixture(scope="module")
def folder():
    if postgres.binary("initdb") is None:
        reason = "PostgreSQL is missing: install the server's programs (initdb, pg_ctl)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with postgres.server() as socket:
        yield socket


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_one_version_stands_in_production_and_all_is_written_down_whoever_races_and_whatever_dies(database, folder):
    with on(database, folder) as race:
        evidence = race.run(seconds=6, clients=16, kills=1)
    assert faults(evidence) == []
    for spoilt, named in spoilings(evidence):
        assert any(named in sentence for sentence in faults(spoilt)), named


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
