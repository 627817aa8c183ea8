"""What people do in MLflow's own pages, by real clicks in a real browser, on a server with logins and roles."""

import os
import re

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.evaluation.pages import chromium
from tests.registry.showcase import MODEL, Clicks, opened

# For what moves nothing into Production, and for what does.
CALM, ROLLED_BACK = "calm-desk", "rolled-back"
# Two busy cores may take seconds for what takes a tenth of one.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry with a live version and a candidate, both with evidence; the other models are empty."""
    with opened(tmp_path_factory.mktemp("browsed"), (CALM, ROLLED_BACK)) as world:
        first = world.round()
        world.stores["ada"].promote(MODEL, first, why="first version", who="")
        world.round(parent=first)
        yield world


@pytest.fixture(scope="module")
def browser():
    try:
        found = chromium()
    except FileNotFoundError as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    with sync_playwright() as playwright:
        opened_browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened_browser
        opened_browser.close()


@pytest.fixture(scope="module")
def sit_down(registry, browser):
    """Somebody at a browser of their own, logged in; who comes back finds it as they left it."""
    seats = {}

    def sit(name):
        if name not in seats:
            seats[name] = Clicks(browser, registry.server.url, name)
        return seats[name]

    yield sit
    for seat in seats.values():
        seat.close()


def test_an_approver_reads_the_evidence_and_approves_with_a_reason(registry, sit_down):
    ada = sit_down("ada")
    ada.page.goto(registry.server.url)
    ada.page.get_by_role("link", name="Model registry").click()
    ada.page.get_by_role("link", name=MODEL, exact=True).click()
    expect(ada.page.get_by_text("Staging", exact=True)).to_be_visible()  # stages are there without a switch
    ada.page.get_by_role("link", name="Version 2").click()
    expect(ada.says).to_contain_text("It passed its gates and waits for a decision")
    expect(ada.says).to_contain_text("Trained from: version 1, which is still live")
    expect(ada.says).to_contain_text("Registered by: tidegate-learner")
    evidence = ada.evidence.inner_text()
    assert evidence.startswith("✓ Passed: a person may approve it")
    order = ("In short: of 300 public questions", "Against live", "Gates", "What was spent", "gives nothing back")
    places = [evidence.index(part) for part in (*order, "Where it comes from", "licence Apache-2.0")]
    assert places == sorted(places)
    plot = ada.evidence.locator("img")
    expect(plot).to_be_visible()
    assert plot.evaluate("image => image.complete && image.naturalWidth") > 600
    ada.move("Production", "billing is better; I read twenty examples")
    expect(ada.says).to_contain_text("It is live: it answers now")
    expect(ada.stage).to_have_text("Production")
    row = ada.history.get_by_role("row").nth(1)
    for told in ("ada", "2", "approved", "Staging → Production", "billing is better; I read twenty examples"):
        expect(row).to_contain_text(told)
    expect(ada.history).to_contain_text(re.compile(r"✓ All \d+ decisions in this registry are signed"))
    signed = registry.decisions(MODEL)[-1]
    assert (signed["who"], signed["why"]) == ("ada", "billing is better; I read twenty examples")
    ada.history.get_by_role("link", name="The whole history").click()
    expect(ada.page.get_by_role("heading", name="Who decided what")).to_be_visible()
    expect(ada.page.get_by_role("row")).to_have_count(3)


def test_a_trainer_s_same_click_is_refused_with_the_sentence(registry, sit_down):
    version, _ = registry.candidate(CALM)
    tom = sit_down("tom")
    tom.open(CALM, version)
    sentence = f"tom may not decide on {CALM} version {version}: that takes the role approver"
    expect(tom.says).to_contain_text(f"Not yours to approve: {sentence}")
    tom.move("Production", "let me")
    expect(tom.toast).to_contain_text(sentence)
    expect(tom.stage).to_have_text("Staging")
    row = tom.history.get_by_role("row").nth(1)
    for told in ("tom", "refused", "let me", sentence):
        expect(row).to_contain_text(told)
    assert all(row["version"] != version for row in registry.decisions(CALM))


def test_a_candidate_that_failed_is_refused_with_the_sentence(registry, sit_down):
    version, _ = registry.candidate(CALM, outcome="failed")
    ada = sit_down("ada")
    ada.open(CALM, version)
    expect(ada.says).to_contain_text("It failed its gates")
    sentence = f"{CALM} version {version} cannot go to Production: its signed verdict says failed"
    expect(ada.says).to_contain_text(sentence)
    ada.move("Production", "but I want it")
    expect(ada.toast).to_contain_text(sentence)
    expect(ada.history.get_by_role("row").nth(1)).to_contain_text("but I want it")
    assert registry.stages(CALM)[version] == "None"


def test_a_candidate_is_rejected_with_a_reason_and_stays_so(registry, sit_down):
    version, _ = registry.candidate(CALM)
    ada = sit_down("ada")
    ada.open(CALM, version)
    ada.move("Archived", "rude in German")
    expect(ada.says).to_contain_text("It was rejected")
    expect(ada.stage).to_have_text("Archived")
    expect(ada.history.get_by_role("row").nth(1)).to_contain_text(re.compile("rejected.*Staging → Archived"))
    ada.move("Production", "changed my mind")
    expect(ada.toast).to_contain_text(re.compile("was rejected by ada.*rude in German"))


def test_going_back_takes_a_few_clicks_and_a_reason(registry, sit_down):
    model = ROLLED_BACK
    first, sha = registry.candidate(model)
    registry.stores["ada"].promote(model, first, why="first", who="")
    second, _ = registry.candidate(model, parent=sha)
    registry.stores["ada"].promote(model, second, why="second", who="")
    ada = sit_down("ada")
    ada.open(model, first)
    expect(ada.says).to_contain_text("It was live before")
    ada.move("Production", "version 2 talks nonsense")
    expect(ada.says).to_contain_text("It is live: it answers now")
    expect(ada.says).to_contain_text("“version 2 talks nonsense”")
    expect(ada.history.get_by_role("row").nth(1)).to_contain_text(re.compile("rolled back to.*Archived → Production"))
    assert registry.stages(model) == {first: "Production", second: "Archived"}
    assert registry.states(model) == {first: "live", second: "retired"}


def test_a_page_left_for_another_shows_the_other_one_s_history(registry, sit_down):
    """MLflow changes pages without loading one."""
    ada = sit_down("ada")
    ada.open(MODEL, 1)
    expect(ada.says).to_be_visible()
    ada.page.get_by_role("link", name=MODEL, exact=True).click()
    expect(ada.says).to_have_count(0)
    ada.page.get_by_role("link", name="Version 2").click()
    expect(ada.says).to_have_count(1)
    expect(ada.history).to_have_count(1)
