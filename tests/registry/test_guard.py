import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import requests

from privacy.signing import SigningKey, TrustedKeys
from registry.approvals import Approvals
from registry.canary import Terms, parse
from registry.errors import PromotionRefused, RegistryError, UnknownVersion
from registry.routes import bare
from tests.registry.test_routes import answers_now, ask, prepare, probes_of, send


def transition(world, model, version, stage="Production", *, path="ajax-api/2.0", headers=None, **more):
    """The request MLflow's own page sends, its archive box unticked."""
    return requests.post(
        f"{world.server.url}/{path}/mlflow/model-versions/transition-stage",
        json={"name": model, "version": str(version), "stage": stage, "archive_existing_versions": False, **more},
        headers=headers,
        timeout=30,
    )


def history(world, model):
    answer = requests.get(f"{world.server.url}/tidegate/approvals", params={"model": model}, timeout=10)
    return answer.json()["approvals"]


def test_a_passed_candidate_is_approved_signed_and_remembered(guarded):
    version, sha = guarded.candidate("passes")
    assert guarded.stages("passes") == {version: "Staging"}
    signed = guarded.store.promote("passes", version, why="reads well: très bien", who="Ada Ünal")
    assert (signed["who"], signed["why"]) == ("Ada Ünal", "reads well: très bien")
    assert (signed["kind"], signed["from"], signed["to"]) == ("promote", "Staging", "Production")
    assert signed["adapter_sha256"] == sha
    (found,) = guarded.store.versions("passes")
    assert (found.stage, found.tag("state")) == ("Production", "live")
    assert json.loads(found.tag("approval")) == signed
    assert history(guarded, "passes") == [signed]
    keys = TrustedKeys([guarded.key("approvals").public])
    assert keys.verify(signed)["version"] == version
    assert Approvals(f"sqlite:///{guarded.root / 'approvals.db'}").verify(keys) >= 1


def test_the_page_s_own_click_is_recorded_with_the_address_and_its_comment(guarded):
    version, _ = guarded.candidate("clicked")
    answer = transition(guarded, "clicked", version, comment="looks right")
    assert answer.status_code == 200
    assert answer.json()["model_version"]["current_stage"] == "Production"
    (row,) = history(guarded, "clicked")
    assert (row["who"], row["why"]) == ("local:127.0.0.1", "looks right")


@pytest.mark.parametrize("path", ["api/2.0", "ajax-api/2.0"])
@pytest.mark.parametrize("stage", ["Production", "production", "PRODUCTION"])
def test_no_spelling_or_path_goes_round_the_guard(guarded, path, stage):
    model = f"round-{path.partition('/')[0]}-{stage}"
    version, _ = guarded.candidate(model, outcome="failed")
    answer = transition(guarded, model, version, stage, path=path)
    assert answer.status_code == 403
    assert guarded.stages(model) == {version: "None"}


@pytest.mark.parametrize("spelt", [" {}", "+{}", "{}.0", "{}e0", "0x{}", "{} "])
def test_no_spelling_of_the_number_goes_round_the_guard(guarded, spelt):
    model = f"spelt-{spelt}".replace("{}", "n").replace("+", "plus")
    version, _ = guarded.candidate(model, outcome="failed")
    answer = transition(guarded, model, spelt.format(version))
    assert answer.status_code == 400
    assert "must be a whole number" in answer.json()["message"]
    assert guarded.stages(model) == {version: "None"}


def test_a_double_encoded_body_does_not_go_round_the_guard(guarded):
    version, _ = guarded.candidate("encoded", outcome="failed")
    body = json.dumps(json.dumps({"name": "encoded", "version": str(version), "stage": "Production"}))
    url = f"{guarded.server.url}/api/2.0/mlflow/model-versions/transition-stage"
    answer = requests.post(url, data=body, headers={"Content-Type": "application/json"}, timeout=10)
    assert answer.status_code >= 400
    assert guarded.stages("encoded") == {version: "None"}


def without(tags, name):
    return {key: value for key, value in tags.items() if key != name}


def forged(tags, name, **changes):
    return tags | {name: json.dumps(json.loads(tags[name]) | changes)}


def stranger(world, sha):
    key = SigningKey.load_or_create(world.root / "stranger.pem")
    return json.dumps(key.sign({"adapter_sha256": sha, "parent_sha256": None, "outcome": "passed"}))


OTHER = "e" * 64


def test_noise(world, sha):
    guarantee = {"unit": "record", "adjacency": "null", "epsilon": "infinity", "delta": 1e-5}
    return json.dumps(world.key("receipts").sign({"adapter_sha256": sha, "guarantee": guarantee}))


test_noise.__test__ = False


def without_privacy(world, sha):
    guarantee = {"unit": "record", "adjacency": "null", "epsilon": None, "delta": None, "claim": "none"}
    return json.dumps(world.key("receipts").sign({"adapter_sha256": sha, "guarantee": guarantee}))


REFUSED = {
    "failed": (lambda w, s: w.documents(s, outcome="failed"), "its signed verdict says failed"),
    "undecided": (lambda w, s: w.documents(s, outcome="undecided"), "its signed verdict says undecided"),
    "no-verdict": (lambda w, s: without(w.documents(s), "tidegate.verdict"), "has no signed verdict"),
    "no-receipt": (lambda w, s: without(w.documents(s), "tidegate.receipt"), "has no signed receipt"),
    "nothing": (lambda _, __: {}, "has no signed verdict"),
    "forged": (
        lambda w, s: forged(w.documents(s, outcome="failed"), "tidegate.verdict", outcome="passed"),
        "its verdict does not verify .*signature does not match",
    ),
    "not-json": (lambda w, s: w.documents(s, **{"tidegate.verdict": "passed"}), "its verdict does not verify"),
    "stranger": (
        lambda w, s: w.documents(s, **{"tidegate.verdict": stranger(w, s)}),
        "its verdict does not verify .*not trusted here",
    ),
    "receipt-as-verdict": (
        lambda w, s: w.documents(s, **{"tidegate.verdict": w.documents(s)["tidegate.receipt"]}),
        "its verdict does not verify .*not trusted here",
    ),
    "other-tag": (lambda w, s: w.documents(s, **{"tidegate.adapter_sha256": OTHER}), "the tag was changed"),
    "other-adapter": (lambda w, _: w.documents(OTHER), "the artifact was changed"),
    "other-receipt": (
        lambda w, s: w.documents(s, **{"tidegate.receipt": w.documents(OTHER)["tidegate.receipt"]}),
        "its privacy receipt is about adapter eeeeeeeeeeee",
    ),
    "test-noise": (
        lambda w, s: w.documents(s, **{"tidegate.receipt": test_noise(w, s)}),
        "has no privacy guarantee .*test noise",
    ),
    "without-privacy": (
        lambda w, s: w.documents(s, **{"tidegate.receipt": without_privacy(w, s)}),
        "was trained without privacy .*its stream is private.* a stream of its own",
    ),
    "stale": (lambda w, s: w.documents(s, parent=OTHER), "is stale: .* no version is live now"),
    "superseded": (lambda w, s: w.documents(s, **{"tidegate.state": "superseded"}), "is superseded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_version_that_cannot_prove_itself_is_refused_with_a_sentence(guarded, case):
    tags, sentence = REFUSED[case]
    model = f"refused-{case}"
    version, _ = guarded.candidate(model, tags=lambda sha: tags(guarded, sha))
    before = guarded.stages(model)
    with pytest.raises(PromotionRefused, match=sentence) as refusal:
        guarded.store.promote(model, version, why="please", who="mallory")
    assert f"{model} version {version}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert guarded.stages(model) == before
    assert history(guarded, model) == []
    answer = transition(guarded, model, version)
    assert answer.status_code == 403
    shown = answer.json()
    assert (shown["error_code"], shown["message"]) == ("PERMISSION_DENIED", str(refusal.value))


def test_without_privacy_only_a_model_named_as_open_is_approved_and_the_approval_says_so(guarded):
    def tags(sha):
        return guarded.documents(sha, **{"tidegate.receipt": without_privacy(guarded, sha)})

    version, _ = guarded.candidate("open, to all", tags=tags)
    signed = guarded.store.promote("open, to all", version, why="public records", who="ada")
    assert (signed["kind"], signed["guarantee"]) == ("promote", "none")


def test_an_artifact_changed_after_registration_is_refused(guarded):
    version, _ = guarded.candidate("swapped")
    (weights,) = [
        file
        for file in (guarded.root / "mlflow" / "artifacts").rglob("adapter_model.safetensors")
        if guarded.store.versions("swapped")[0].run_id and file.stat().st_mtime_ns == newest(guarded)
    ]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(PromotionRefused, match="the artifact was changed"):
        guarded.store.promote("swapped", version, why="", who="ada")


def newest(world):
    return max(
        file.stat().st_mtime_ns for file in (world.root / "mlflow" / "artifacts").rglob("adapter_model.safetensors")
    )


def test_exactly_one_is_in_production_after_promotions_and_a_rollback(guarded):
    one, sha1 = guarded.candidate("chain")
    guarded.store.promote("chain", one, why="first", who="ada")
    two, sha2 = guarded.candidate("chain", parent=sha1)
    also, _ = guarded.candidate("chain", parent=sha1)
    assert transition(guarded, "chain", two).status_code == 200
    assert guarded.stages("chain") == {one: "Archived", two: "Production", also: "Archived"}
    assert guarded.states("chain") == {one: "retired", two: "live", also: "stale"}
    with pytest.raises(PromotionRefused, match=f"is stale: it was trained from {sha1[:12]}, but version {two} is live"):
        guarded.store.promote("chain", also, why="", who="ada")
    waiting, _ = guarded.candidate("chain", parent=sha2)
    back = guarded.store.promote("chain", one, why="two talks nonsense", who="oncall")
    assert (back["kind"], back["from"], back["adapter_sha256"]) == ("rollback", "Archived", sha1)
    assert [n for n, stage in guarded.stages("chain").items() if stage == "Production"] == [one]
    assert guarded.states("chain") == {one: "live", two: "retired", also: "stale", waiting: "stale"}
    # Back at its parent, a stale candidate is none any more: what counts is what it was trained from.
    guarded.store.promote("chain", also, why="after all", who="ada")
    assert [n for n, stage in guarded.stages("chain").items() if stage == "Production"] == [also]
    assert [row["kind"] for row in history(guarded, "chain")] == ["promote", "promote", "rollback", "promote"]


def test_of_approvers_at_the_same_moment_one_wins_and_the_others_hear_why(guarded):
    siblings = [guarded.candidate("race")[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as approvers:
        answers = list(approvers.map(lambda version: transition(guarded, "race", version), siblings))
    assert sorted(answer.status_code for answer in answers) == [200, 403, 403, 403]
    assert all("is stale" in answer.json()["message"] for answer in answers if answer.status_code == 403)
    assert sorted(guarded.stages("race").values()) == ["Archived", "Archived", "Archived", "Production"]
    assert len(history(guarded, "race")) == 1


def test_asking_twice_changes_nothing(guarded):
    version, _ = guarded.candidate("twice")
    first = guarded.store.promote("twice", version, why="once", who="ada")
    assert guarded.store.promote("twice", version, why="again", who="ada") == first
    assert len(history(guarded, "twice")) == 1


def past_the_guard(world, model, version, key, value):
    """A tag changed in MLflow's database itself."""
    with closing(sqlite3.connect(world.root / "mlflow" / "mlflow.db")) as database, database:
        changed = database.execute(
            "UPDATE model_version_tags SET value = ? WHERE name = ? AND version = ? AND key = ?",
            (value, model, version, key),
        )
        assert changed.rowcount == 1


def test_a_rollback_to_a_version_whose_receipt_is_gone_is_refused(guarded):
    one, sha1 = guarded.candidate("broken")
    guarded.store.promote("broken", one, why="", who="ada")
    two, _ = guarded.candidate("broken", parent=sha1)
    guarded.store.promote("broken", two, why="", who="ada")
    with pytest.raises(PromotionRefused, match="is part of its proof and stays"):
        guarded.store.set_tag("broken", one, "tidegate.receipt", "{}")
    past_the_guard(guarded, "broken", one, "tidegate.receipt", "{}")
    with pytest.raises(PromotionRefused, match="its receipt does not verify"):
        guarded.store.promote("broken", one, why="", who="oncall")
    assert guarded.stages("broken")[two] == "Production"


def test_a_rollback_to_pruned_weights_is_refused_says_so_and_the_refusal_is_kept(guarded, tmp_path):
    first, sha = guarded.candidate("pruned")
    guarded.store.promote("pruned", first, why="a", who="ada")
    second, _ = guarded.candidate("pruned", parent=sha)
    guarded.store.promote("pruned", second, why="b", who="ada")
    guarded.store.set_tag("pruned", first, "tidegate.pruned", json.dumps({"at": "2026-01-01T00:00:00Z", "who": "op"}))
    guarded.store.remove_weights("pruned", first)
    guarded.store.remove_weights("pruned", first)  # what a crash left is repeated
    with pytest.raises(RegistryError):
        guarded.store.fetch_adapter("pruned", first, tmp_path / "gone")
    assert guarded.store.fetch_adapter("pruned", second, tmp_path / "kept").is_dir()
    with pytest.raises(PromotionRefused, match=r"pruned \(2026-01-01T00:00:00Z by op\)") as refused:
        guarded.store.promote("pruned", first, why="back", who="eve")
    (row,) = Approvals(f"sqlite:///{guarded.root / 'approvals.db'}").refusals("pruned")
    assert (row["version"], row["who"], row["why"], row["sentence"]) == (first, "eve", "back", str(refused.value))
    assert guarded.stages("pruned") == {first: "Archived", second: "Production"}


def test_taking_the_live_version_out_is_allowed_and_recorded(guarded):
    version, _ = guarded.candidate("withdrawn")
    guarded.store.promote("withdrawn", version, why="", who="ada")
    answer = transition(guarded, "withdrawn", version, "Archived", headers={"X-Tidegate-Why": "off%2C now"})
    assert answer.status_code == 200
    assert guarded.states("withdrawn") == {version: "retired"}
    last = history(guarded, "withdrawn")[-1]
    assert (last["kind"], last["from"], last["to"], last["why"]) == ("rollback", "Production", "Archived", "off, now")
    again = guarded.store.promote("withdrawn", version, why="on again", who="ada")
    assert again["kind"] == "rollback"


def test_a_rejection_has_a_reason_and_is_final(guarded):
    version, _ = guarded.candidate("rejected")
    row = guarded.store.reject("rejected", version, why="rude in German", who="ada")
    assert (row["kind"], row["why"], row["from"], row["to"]) == ("reject", "rude in German", "Staging", "Archived")
    assert guarded.states("rejected") == {version: "rejected"}
    with pytest.raises(PromotionRefused, match=r"was rejected by ada at .*rude in German"):
        guarded.store.promote("rejected", version, why="", who="bob")
    with pytest.raises(PromotionRefused, match="only a candidate can be rejected"):
        guarded.store.reject("rejected", version, why="", who="bob")


def test_archiving_a_candidate_on_the_page_is_a_rejection(guarded):
    version, _ = guarded.candidate("archived")
    assert transition(guarded, "archived", version, "Archived").status_code == 200
    assert history(guarded, "archived")[0]["kind"] == "reject"
    assert guarded.states("archived") == {version: "rejected"}


@pytest.mark.parametrize("state", ["superseded", "stale"])
def test_tidying_up_is_no_decision_of_a_person(guarded, state):
    version, _ = guarded.candidate(f"tidy-{state}")
    guarded.store.archive(f"tidy-{state}", version, state=state)
    assert guarded.stages(f"tidy-{state}") == {version: "Archived"}
    assert guarded.states(f"tidy-{state}") == {version: state}
    assert history(guarded, f"tidy-{state}") == []


def test_what_does_not_exist_is_named(guarded):
    guarded.candidate("exists")
    with pytest.raises(UnknownVersion, match="exists version 99: there is none; it has \\[1\\]"):
        guarded.store.promote("exists", 99, why="", who="ada")
    with pytest.raises(UnknownVersion, match="nowhere version 1: there is none"):
        guarded.store.promote("nowhere", 1, why="", who="ada")


def test_stages_show_by_default(guarded):
    page = requests.get(guarded.server.url + "/", timeout=10)
    assert "_mlflow_user_setting_dismiss_next_model_registry_ui" in page.text
    assert page.headers["Cache-Control"] == "no-store"


def test_the_client_of_mlflow_meets_the_guard_too(guarded):
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    version, _ = guarded.candidate("pyclient", outcome="failed")
    client = MlflowClient(guarded.server.url)
    with (
        pytest.warns(FutureWarning),
        pytest.raises(RestException, match="its signed verdict says failed"),
    ):
        client.transition_model_version_stage("pyclient", str(version), "Production")


def test_without_logins_too_nobody_can_damage_what_is_live(guarded):
    guarded.users = {"learner": ""}
    stage = prepare(guarded, "unlocked", guarded.store)
    probes = probes_of(stage)
    for route in ask(guarded, "anonymous", "GET", "/tidegate/routes").json()["routes"]:
        key = (route["method"], bare(route["path"]).removeprefix("/mlflow"))
        for probe in probes.get(key, probes.get((route["method"], bare(route["path"])), ())):
            if not probe.allowed:
                told = send(guarded, "anonymous", route, probe)
                assert told.status_code in {400, 403}, (route, probe, told.text)
    assert answers_now(guarded, "unlocked") == stage.live
    assert guarded.store.fetch_adapter("unlocked", stage.live, guarded.root / "intact").is_dir()


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
