"""A canary on a real guarded MLflow, and on one that takes no plugin: checked, signed, shown, ended."""

import json

import pytest

from privacy.signing import TrustedKeys
from registry.approvals import Approvals
from registry.canary import Terms, parse
from registry.errors import PromotionRefused
from registry.promotion import Promotions, Trust
from tests.registry.test_guard import history, transition

TENTH = Terms(0.1)
STARTED = {"share": 0.1, "header": True, "sticky": True}


def canary_of(world, model, version):
    found = next(v for v in world.store.versions(model) if v.version == version)
    return found.stage, json.loads(found.tag("canary") or "null")


def live(world, model):
    """A live version; its number and adapter."""
    version, sha = world.candidate(model)
    world.store.promote(model, version, why="first", who="ada")
    return version, sha


def test_a_canary_is_signed_and_shown_and_moves_no_stage(guarded):
    one, sha = live(guarded, "birds")
    two, _ = guarded.candidate("birds", parent=sha)
    row = guarded.store.canary("birds", two, TENTH, why="try it", who="ada")
    assert (row["kind"], row["from"], row["to"], row["canary"]) == ("canary", "Staging", "Staging", STARTED)
    assert guarded.stages("birds") == {one: "Production", two: "Staging"}
    assert canary_of(guarded, "birds", two) == ("Staging", row)
    keys = TrustedKeys([guarded.key("approvals").public])
    assert keys.verify(row)["version"] == two
    more = guarded.store.canary("birds", two, Terms(0.5, header=False), why="more", who="ada")
    assert more["seq"] == row["seq"] + 1
    approvals = Approvals(f"sqlite:///{guarded.root / 'approvals.db'}")
    standing = approvals.standing("birds")
    assert (standing.canary, standing.live["version"]) == (more, one)
    end = guarded.store.end_canary("birds", two, why="enough", who="ada")
    assert (end["canary"], canary_of(guarded, "birds", two)[1]) == ({"share": 0}, end)
    assert approvals.standing("birds").canary is None
    guarded.store.canary("birds", two, TENTH, why="again", who="ada")
    guarded.store.promote("birds", two, why="good", who="ada")
    standing = approvals.standing("birds")
    assert (standing.canary, standing.live["version"], standing.previous["version"]) == (None, two, one)
    assert guarded.stages("birds") == {one: "Archived", two: "Production"}
    assert approvals.verify(keys) >= 6


def test_the_checks_are_those_of_a_promotion(guarded):
    one, sha = live(guarded, "checked")
    bad, _ = guarded.candidate("checked", parent=sha, outcome="failed")
    stale, _ = guarded.candidate("checked", parent="e" * 64)
    first, _ = guarded.candidate("checked", parent=sha)
    second, _ = guarded.candidate("checked", parent=sha)
    before = len(history(guarded, "checked"))
    for version, sentence in [
        (bad, "stands in None"),
        (one, "stands in Production"),
        (stale, "is stale"),
    ]:
        with pytest.raises(PromotionRefused, match=sentence):
            guarded.store.canary("checked", version, TENTH, why="", who="mallory")
    guarded.store.move("checked", bad, "Staging")
    with pytest.raises(PromotionRefused, match="its signed verdict says failed"):
        guarded.store.canary("checked", bad, TENTH, why="", who="mallory")
    assert len(history(guarded, "checked")) == before
    guarded.store.canary("checked", first, TENTH, why="", who="ada")
    with pytest.raises(PromotionRefused, match=f"version {first} is the canary now"):
        guarded.store.canary("checked", second, TENTH, why="", who="ada")
    guarded.store.reject("checked", first, why="rude", who="ada")
    guarded.store.canary("checked", second, TENTH, why="", who="ada")
    with pytest.raises(PromotionRefused, match="is no canary"):
        guarded.store.end_canary("checked", first, why="", who="ada")


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"share": 1}, "below 1"),
        ({"share": -0.1}, "above 0"),
        ({"share": True}, "above 0"),
        ({"share": "0.1"}, "above 0"),
        ({}, "above 0"),
        ([], "must be an object"),
        ({"share": 0.1, "sticky": "yes"}, "sticky=yes: must be true or false"),
        ({"share": 0.1, "versions": 3}, "has no versions"),
    ],
)
def test_terms_that_are_none_are_refused(guarded, told, sentence):
    with pytest.raises(PromotionRefused, match=sentence):
        parse(told)
    model = "terms"
    version = next(iter(guarded.stages(model)), None) or guarded.candidate(model)[0]
    answer = transition(guarded, model, version, "Staging", tidegate_canary=told)
    assert answer.status_code == 403
    assert sentence in answer.json()["message"]
    assert history(guarded, model) == []


def test_serving_steps_back_by_the_guard_s_signature_and_only_from_what_it_saw(guarded):
    _, sha = live(guarded, "steps")
    two, _ = guarded.candidate("steps", parent=sha)
    row = guarded.store.canary("steps", two, TENTH, why="try it", who="ada")
    newer = guarded.store.canary("steps", two, Terms(0.2), why="more", who="ada")
    with pytest.raises(PromotionRefused, match="is no canary"):
        guarded.store.step_back("steps", two, row["seq"], why="errors", who="tidegate serve")
    guarded.store.step_back("steps", two, newer["seq"], why="errors: 9 of 10", who="tidegate serve")
    end = history(guarded, "steps")[-1]
    assert (end["canary"], end["who"], end["why"]) == (
        {"share": 0, "automatic": True},
        "tidegate serve",
        "errors: 9 of 10",
    )
    assert canary_of(guarded, "steps", two) == ("Staging", end)
    with pytest.raises(PromotionRefused, match="is no canary"):
        guarded.store.step_back("steps", two, newer["seq"], why="errors", who="tidegate serve")


def test_a_canary_that_is_superseded_is_over_in_the_history_too(guarded):
    _, sha = live(guarded, "newer")
    two, _ = guarded.candidate("newer", parent=sha)
    guarded.store.canary("newer", two, TENTH, why="try it", who="ada")
    guarded.store.archive("newer", two, state="superseded")
    end = history(guarded, "newer")[-1]
    assert (end["kind"], end["canary"], end["why"]) == ("canary", {"share": 0}, "it left Staging")
    assert guarded.stages("newer")[two] == "Archived"


def test_without_a_guard_the_command_signs_and_a_step_back_is_signed_by_the_next_decision(unguarded):
    keys = unguarded.root / "keys"
    approvals = Approvals(f"sqlite:///{unguarded.root / 'approvals.db'}", unguarded.key("approvals"))
    one, sha = unguarded.candidate("managed")
    trust = Trust.from_dir(keys)
    signed = {"approvals": approvals, "trust": trust}
    unguarded.store.promote("managed", one, why="", who="ada", **signed)
    two, _ = unguarded.candidate("managed", parent=sha)
    row = unguarded.store.canary("managed", two, TENTH, why="try it", who="ada", **signed)
    assert canary_of(unguarded, "managed", two) == ("Staging", row)
    unguarded.store.step_back("managed", two, row["seq"], why="slow", who="tidegate serve")
    assert approvals.standing("managed").canary == row
    Promotions(unguarded.store, approvals, trust).settle("managed")
    end = approvals.history("managed")[-1]
    assert (end["canary"], end["who"], end["why"]) == ({"share": 0, "automatic": True}, "tidegate", "slow")
    assert approvals.standing("managed").canary is None
    assert canary_of(unguarded, "managed", two)[1] == end
    Promotions(unguarded.store, approvals, trust).settle("managed")
    assert approvals.history("managed")[-1] == end, "once"


def test_a_canary_that_a_crash_kept_from_the_version_is_shown_by_the_next_decision(unguarded):
    approvals = Approvals(f"sqlite:///{unguarded.root / 'approvals.db'}", unguarded.key("approvals"))
    trust = Trust.from_dir(unguarded.root / "keys")
    two, _ = unguarded.candidate("crashed")
    row = unguarded.store.canary("crashed", two, TENTH, why="", who="ada", approvals=approvals, trust=trust)
    unguarded.store.set_tag("crashed", two, "tidegate.canary", "")
    Promotions(unguarded.store, approvals, trust).settle("crashed")
    assert canary_of(unguarded, "crashed", two)[1] == row
