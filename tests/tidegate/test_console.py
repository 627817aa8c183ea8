"""The console in a headless Chromium, on a real server."""

import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from serving.access import Access, add_key, revoke_key
from tests.tidegate.consoles import browser, console, down, ended_round
from tests.tidegate.streams import STREAM
from tidegate import switches
from tidegate.console import Source, Told

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<img src=x onerror=\"document.title='broken'\"></td><script>document.title='broken'</script>&amp;"


@pytest.fixture(scope="module")
def seat(tiny, tmp_path_factory):
    with console(tiny, tmp_path_factory.mktemp("console")) as made:
        ended_round(made.service, 1, gates=(("forgetting", "passed", True, f"kept {HOSTILE}"),))
        made.candidate(2, round_id=HOSTILE)
        made.promote(1, who=HOSTILE, why=f"why {HOSTILE}")
        yield made


@pytest.fixture(scope="module")
def opened():
    with browser() as one:
        yield one


@pytest.fixture
def page(opened, seat):
    """The page, and what must not happen while a test looks at it: errors, and requests to anywhere else."""
    made = opened.new_page()
    wrong = []
    made.on("console", lambda message: wrong.append(message.text) if message.type in {"error", "warning"} else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1:", "data:")) else wrong.append(r.url))
    made.on("requestfailed", lambda r: None if "/events" in r.url else wrong.append(f"failed: {r.url}"))
    assert made.goto(seat.url).ok
    yield made
    made.close()
    assert wrong == []


def test_the_page_shows_what_runs_and_what_waits(page, seat):
    stream = page.get_by_role("region", name=f"Stream {STREAM}")
    stream.get_by_text(f"{STREAM}@1", exact=True).wait_for()
    link = stream.get_by_role("link", name="version 2 in MLflow")
    assert link.get_attribute("href") == f"{seat.service.mlflow_uri}/#/models/desk/versions/2"
    assert "(8, 1e-05)-DP per record" in stream.inner_text()
    stream.get_by_text("1 of 1 hard gates passed").click()
    assert stream.get_by_text("kept").is_visible()
    meter = stream.get_by_role("meter")
    meter.wait_for()
    assert meter.get_attribute("value") == "0.0000"
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1


def test_an_alarm_leads_to_what_to_do(page, seat):
    alarms = page.get_by_role("region", name="Alarms")
    alarms.get_by_role("link", name="what to do: broker").click()
    page.get_by_role("heading", name="Runbook: broker").wait_for()
    assert "Kafka does not answer" in page.get_by_role("main").inner_text()
    assert httpx.get(f"{seat.url}/tidegate/runbook/nothing").status_code == 404


def test_a_part_that_is_down_is_an_alarm_and_hides_nothing(page, seat):
    page.get_by_role("region", name="Alarms").get_by_text("lag: bootstrap=127.0.0.1").wait_for()
    seat.service.versions, before = down, seat.service.versions
    try:
        page.get_by_text("nothing answers; start it").first.wait_for()
        assert page.get_by_role("link", name="version 2 in MLflow").is_visible()
        assert "As of" in page.get_by_role("region", name=f"Stream {STREAM}").inner_text()
    finally:
        seat.service.versions = before


def test_hostile_values_are_text(page):
    page.get_by_text(HOSTILE).first.wait_for()
    assert page.title() == "Tidegate"
    assert page.locator("main img, main script").count() == 0


def test_the_prompt_box_answers_with_live(page):
    page.get_by_label("Prompt", exact=True).fill("where is my order")
    page.get_by_role("button", name="Ask live", exact=True).click()
    answer = page.locator("#answers figure[aria-busy=false]")
    answer.wait_for()
    assert f"{STREAM}@1 (live), answer chatcmpl-" in answer.inner_text()
    asked = {"model": STREAM, "messages": [{"role": "user", "content": "where is my order"}], "temperature": 0}
    reply = httpx.post(f"{page.url}v1/chat/completions", json=asked, timeout=60).json()
    assert answer.locator(".text").text_content() == reply["choices"][0]["message"]["content"]


def test_who_decides_asks_live_and_the_candidate_side_by_side(page):
    page.get_by_label("Prompt", exact=True).fill("where is my order")
    page.get_by_role("button", name="Ask live and the candidate").click()
    answers = page.locator("#answers figure[aria-busy=false]")
    answers.nth(1).wait_for()
    assert [f"{STREAM}@1 (live)", f"{STREAM}@2 (candidate)"] == answers.locator("figcaption").all_text_contents()
    live, candidate = answers.locator(".text").all_text_contents()
    assert live
    assert candidate
    assert live != candidate


def test_a_question_that_is_refused_says_why(opened, seat):
    page = opened.new_page()
    page.goto(seat.url)
    page.get_by_label("Prompt", exact=True).fill("x " * 3000)
    page.keyboard.press("Control+Enter")
    page.locator("#answers .bad").wait_for()
    assert "tokens" in page.locator("#answers .bad").text_content()
    page.close()


def listen(page):
    """Keep all that is read out from now on: the next sentence takes the place of the one before."""
    page.evaluate(
        "window.heard = [];"
        "new MutationObserver(() => heard.push(said.textContent)).observe(said, {childList: true, characterData: true})"
    )


def was_read_out(page, sentence):
    return any(sentence in text.split("; ") for text in page.evaluate("heard"))


def test_what_comes_in_one_event_is_read_out_together(page):
    changed = """() => {
        const parts = {};
        for (const [name, value] of [["live", "desk@9"], ["count", "77"]]) {
            const part = document.querySelector(`[data-${name}]`).cloneNode(true);
            part.dataset[name] = value;
            parts[part.id] = part.outerHTML;
        }
        take(parts);
        return said.textContent;
    }"""
    assert page.evaluate(changed) == "desk@9 answers now; 77 alarms stand"
    page.reload()


def test_the_kill_switch_and_a_pause_show_and_are_read_out(page, seat):
    listen(page)
    switches.pause(seat.service, STREAM, who="ada", why=f"audit {HOSTILE}")
    seat.swap.kill_switch.kill(who="pat", why=f"it swears {HOSTILE}", at="2026-11-28T01:00:00Z")
    page.get_by_text("on: the bare base answers").wait_for()
    page.get_by_text(f"by ada: audit {HOSTILE}").wait_for()
    page.get_by_role("link", name="what to do: killed").wait_for()
    assert was_read_out(page, f"{STREAM}@base answers now")
    switches.resume(seat.service, STREAM, who="ada", why="over")
    seat.swap.kill_switch.end()
    page.get_by_text(f"{STREAM}@1", exact=True).wait_for()


def test_a_promotion_shows_without_a_reload_and_is_read_out(page, seat):
    page.evaluate("window.untouched = true")
    listen(page)
    page.locator("#connection", has_text="live").wait_for()
    page.get_by_role("region", name=f"Stream {STREAM}").get_by_text("1 of 1 hard gates passed").click()
    seat.promote(2, who="grace", why="better on billing")
    page.get_by_text(f"{STREAM}@2", exact=True).wait_for()
    page.get_by_text("better on billing").wait_for()
    page.get_by_text("No candidate waits.").wait_for()
    assert was_read_out(page, f"{STREAM}@2 answers now")
    assert page.get_by_text("kept").is_visible(), "what was open stays open"
    assert page.evaluate("window.untouched") is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_works_by_keyboard(opened, seat, scheme):
    phone = opened.new_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    phone.goto(seat.url)
    phone.get_by_text(f"{STREAM}@").first.wait_for()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    phone.keyboard.press("Tab")
    assert phone.evaluate("document.activeElement.className") == "skip"
    names = phone.evaluate(
        "[...document.querySelectorAll('a,button,select,textarea,meter')].filter("
        "one => !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).length"
    )
    assert names == 0
    dark = phone.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    phone.close()


def test_nothing_but_its_own_files_may_run(seat):
    page = httpx.get(seat.url)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script>|<style|\son\w+=|style=", re.sub(r"&lt;.*?&gt;", "", page.text))
    for file in ("console.js", "console.css", "console.svg"):
        assert httpx.get(f"{seat.url}/tidegate/{file}").status_code == 200


def test_all_viewers_share_one_look_a_second(seat, monkeypatch):
    asked = []
    before = seat.service.versions

    def counted(*arguments, **options):
        asked.append(time.monotonic())
        return before(*arguments, **options)

    monkeypatch.setattr(seat.service, "versions", counted, raising=False)
    stop = threading.Event()

    def view():
        # Where nothing changes nothing comes: then the wait for it ends the view.
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("GET", f"{seat.url}/tidegate/console/events", timeout=4) as events,
        ):
            for _ in events.iter_text():
                if stop.is_set():
                    return

    viewers = [threading.Thread(target=view, daemon=True) for _ in range(8)]
    for one in viewers:
        one.start()
    began = time.monotonic()
    while time.monotonic() < began + 3:
        httpx.get(seat.url)
    # One look a second for the registry and one in ten for the budgets, however many look.
    count = len(asked)
    stop.set()
    for one in viewers:
        one.join()
    assert 1 <= count <= 3 + 2


def test_the_events_bring_every_part_first(seat):
    with httpx.stream("GET", f"{seat.url}/tidegate/console/events", timeout=10) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        for line in events.iter_lines():
            if line.startswith("data: "):
                assert set(json.loads(line.removeprefix("data: "))) == {"alarms", f"stream-{STREAM}"}
                return


def test_a_source_that_hangs_is_asked_once_and_said_to_be_late(monkeypatch):
    monkeypatch.setattr("tidegate.console.LATE_SECONDS", 0.05)
    go_on, asked = threading.Event(), []

    def slow():
        asked.append(1)
        go_on.wait(10)
        return "there"

    source = Source("slow", slow, seconds=0.0)
    for _ in range(20):
        source.poke()
        time.sleep(0.01)
    assert source.told == Told(late=True)
    assert len(asked) == 1
    go_on.set()
    source.wait(5)
    while source.told.value is None:
        time.sleep(0.01)
    assert source.told.value == "there"
    assert not source.told.late


def test_a_person_logs_in_with_a_key_that_no_script_can_read(opened, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tidegate.console_routes.STREAM_SECONDS", 2.0)
    file = tmp_path / "api_keys.json"
    reader, _ = add_key(file, "reader", scopes=["read"])
    approver, _ = add_key(file, "approver", scopes=["read", "answer", "candidate"])
    with console(tiny, tmp_path, access=Access(file)) as seat:
        seat.candidate(2)
        seat.promote(1)
        assert httpx.get(seat.url).status_code == 303
        for path in ("console/events", "console.js", "logout"):
            answer = httpx.request("POST" if path == "logout" else "GET", f"{seat.url}/tidegate/{path}")
            assert answer.status_code == 401, path
        person = opened.new_context()
        page = person.new_page()
        page.goto(seat.url)
        page.get_by_label("API key").fill("tg-00000000-wrong")
        page.get_by_role("button", name="Log in").click()
        page.get_by_text("That key is not known, or was revoked.").wait_for()
        page.get_by_label("API key").fill(reader)
        page.get_by_role("button", name="Log in").click()
        page.locator("#connection", has_text="live").wait_for()
        (cookie,) = person.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert page.evaluate("document.cookie") == ""
        assert page.get_by_role("button", name="Ask live and the candidate").count() == 0
        page.get_by_label("Prompt", exact=True).fill("where is my order")
        page.get_by_role("button", name="Ask live").click()
        page.get_by_text("must have the scope answer").wait_for()
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("API key").fill(approver)
        page.get_by_role("button", name="Log in").click()
        page.get_by_text(f"{STREAM}@1", exact=True).wait_for()
        page.get_by_label("Prompt", exact=True).fill("where is my order")
        page.get_by_role("button", name="Ask live and the candidate").click()
        page.get_by_text(f"{STREAM}@2 (candidate)").wait_for()
        revoke_key(file, "approver")
        page.get_by_text("the server refuses: reload the page, or log in again").wait_for()
        elsewhere = httpx.post(
            f"{seat.url}/tidegate/login", data={"key": approver}, headers={"origin": "http://evil.example"}
        )
        assert elsewhere.status_code == 403
        person.close()
