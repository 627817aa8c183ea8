"""`tidegate plan`: a dry run that says what a reservation then confirms, and reserves nothing itself."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from learner.errors import PlanError
from registry.errors import RegistryError
from tests.tidegate.streams import STREAM, go_live, seal, workspace
from tidegate import budget, wiring
from tidegate.cli import cli
from tidegate.errors import RoundRefused, TidegateError
from tidegate.planning import plan_arguments, survey

ATTEMPTS = {"privacy": {"attempts": 2}}


@pytest.fixture
def made(tmp_path, monkeypatch):
    def make(**changes):
        service = workspace(tmp_path / "ws", **{**ATTEMPTS, **changes})
        monkeypatch.setattr(wiring, "open_service", lambda _given: service)
        return service

    return make


def ask(*options):
    done = CliRunner().invoke(cli, ["plan", STREAM, *options], catch_exceptions=True)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def told(*options):
    return json.loads(ask(*options, "--json").stdout)


def next_charges(service):
    found = survey(service, STREAM, service.versions(STREAM))
    return budget.next_plan(found, plan_arguments(service.stream(STREAM).learner)).charges()


def test_it_reserves_nothing_and_says_what_a_reservation_confirms(made):
    service = made()
    blocks = [seal(service, number) for number in (1, 2, 3)]
    report = told("--rounds", "2")
    assert service.ledger.rows() == []
    assert [row["block"] for row in report["blocks"]] == blocks
    assert {row["use"] for row in report["blocks"]} == {"new"}
    assert report["attempts_left"] == 2
    for number in range(1, report["attempts_left"] + 1):
        service.ledger.reserve(STREAM, f"{STREAM}-r{number:04d}", 1, "a" * 64, next_charges(service))
        if number == 1:
            assert service.ledger.share_used(blocks[0]) == pytest.approx(report["blocks"][0]["share_after"])
    with pytest.raises(RoundRefused, match=r"new in 2 rounds.*cannot pay.*privacy.attempts"):
        ask()


def test_with_something_live_it_tells_replay_from_new_and_how_often_each_can_be_replayed(made):
    service = made()
    old, new = seal(service, 1), seal(service, 2)
    go_live(service, old)
    report = told()
    assert [(row["block"], row["use"]) for row in report["blocks"]] == [(new, "new"), (old, "replay")]
    assert report["live_version"] == 1
    left = report["blocks"][1]["rounds_left"]
    charge = next(c for c in next_charges(service) if c.block_id == old)
    for number in range(left):
        service.ledger.reserve(STREAM, f"{STREAM}-r{number + 1:04d}", 1, "a" * 64, [charge])
    again = told()
    assert again["blocks"][1]["use"] == "left out"
    assert again["blocks"][1]["missing"] > 0
    assert again["budget"]["blocks_retired"] == [old]
    assert len(again["budget"]["alarms"]) == 2


def test_the_tables_say_the_same_as_the_json(made):
    service = made()
    go_live(service, seal(service, 1))
    seal(service, 2)
    text, report = ask().stdout, told()
    assert "a dry run; nothing is reserved" in text
    assert f"sigma {report['next']['sigma']:g}, q {report['next']['q_new']:.4g} new" in text
    assert f"promise  {report['promise']}" in text
    assert f"left     {report['attempts_left']} rounds" in text
    for row in report["blocks"]:
        assert row["block"] in text


def test_with_nothing_new_it_shows_a_block_to_come(made):
    service = made()
    go_live(service, seal(service, 1))
    report = told()
    assert report["note"] == "nothing new since version 1: shown as if a block of 500 offsets were sealed"
    assert (report["next"]["new"], report["next"]["replay"]) == (0, 1)
    assert report["attempts_left"] == 0


def test_a_round_that_cannot_be_paid_names_blocks_what_they_lack_and_the_choices(made):
    service = made(learner={"steps": 50_000})
    seal(service, 1)
    with pytest.raises(PlanError, match=rf"blocks {STREAM}-0-000000001 \(.*over by .*cannot pay.*fewer steps"):
        ask()


def test_targets_are_met_with_safe_rounding_and_can_be_put_into_the_settings(made):
    service = made()
    seal(service, 1)
    found = told("--target-sigma", "1.5")["next"]
    assert found["sigma"] <= 1.5
    batch = round(found["expected_batch"])
    assert found["expected_batch"] == pytest.approx(batch)
    wider = budget.replace_batch(plan_arguments(service.stream(STREAM).learner), batch + 1)
    assert budget.next_plan(survey(service, STREAM, ()), wider).sigma > 1.5
    assert ask("--target-sigma", "1", "--target-noise", "1").exit_code == 2


def test_noise_needs_the_base_only_if_it_is_there(made, tiny):
    service = made()
    seal(service, 1)
    assert told()["next"]["noise_to_signal_round"] is None
    assert "unknown until the base is prepared" in ask().stdout
    with pytest.raises(TidegateError, match="base is not prepared"):
        ask("--target-noise", "1")
    service.settings.streams[STREAM].__dict__["base"] = str(tiny.path)
    found = told()["next"]
    step = found["sigma"] * found["trained_weights"] ** 0.5 / found["expected_batch"]
    assert found["noise_to_signal_step"] == pytest.approx(step)
    assert found["noise_to_signal_round"] == pytest.approx(step / found["steps"] ** 0.5)


def test_without_a_registry_it_says_so_and_offers_to_plan_offline(made, monkeypatch):
    service = made()
    go_live(service, seal(service, 1))

    def down(_service, _model, **_options):
        raise RegistryError("mlflow=http://127.0.0.1:5000: does not answer")

    monkeypatch.setattr(type(service), "versions", down)
    with pytest.raises(TidegateError, match=r"does not answer; what is live is not known; .*--offline"):
        ask()
    report = told("--offline")
    assert report["assumed"] == "nothing is live (--offline)"
    assert report["blocks"][0]["use"] == "new"


def test_windows_are_promised_as_windows(made):
    service = made(privacy={"attempts": 2, "horizon": "30d"})
    seal(service, 1)
    assert told()["promise"] == "epsilon 8, delta 1e-05 per record, per window of 30 days"


def test_the_page_on_planning_shows_what_the_command_prints(made):
    service = made(privacy={"attempts": 1})
    blocks = [seal(service, number) for number in range(1, 7)]
    service.ledger.reserve(STREAM, f"{STREAM}-r0001", 1, "a" * 64, next_charges(service))
    go_live(service, *blocks)
    seal(service, 7)
    page = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    command, *lines = page.split("```")[1].strip().splitlines()
    printed = [" ".join(line.split()) for line in ask(*command.split()[4:]).stdout.splitlines()]
    assert len(lines) == 11
    for line in lines:
        assert " ".join(line.split()) in printed, line
