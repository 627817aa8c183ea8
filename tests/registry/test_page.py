"""What people read of decisions: in words, escaped, and with its seal."""

import re

import pytest
from sqlalchemy import create_engine, text

from privacy.signing import SigningKey, TrustedKeys
from registry.approvals import Approvals
from registry.errors import UnknownVersion
from registry.page import events_of, history_page, seal_of, standing, with_script
from registry.states import ModelVersion

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def desk(tmp_path):
    """A history with its keys."""
    key = SigningKey.load_or_create(tmp_path / "approvals.pem")
    approvals = Approvals(f"sqlite:///{tmp_path / 'approvals.db'}", key)
    return approvals, TrustedKeys.from_dir(tmp_path, "approvals"), tmp_path


def decide(approvals, version, kind="promote", from_stage="Staging", to_stage="Production", **more):
    told = {"who": "ada", "why": "reads well", "when": f"2026-11-27T10:00:{version:02}Z"} | more
    sha = chr(96 + version) * 64
    stages = {"from_stage": from_stage, "to_stage": to_stage}
    return approvals.append(model="desk", version=version, adapter_sha256=sha, kind=kind, **stages, **told)


def version(number, state="candidate", parent=""):
    tags = {"tidegate.state": state, "tidegate.adapter_sha256": chr(96 + number) * 64, "tidegate.parent_sha256": parent}
    return ModelVersion(number, "Staging", tags, "2026-11-27T09:00:00Z", "r", (), "")


def shown(desk, number, versions, objection=""):
    approvals, keys, _ = desk
    seal = seal_of(approvals, keys)
    return standing("desk", number, versions=versions, approvals=approvals, seal=seal, objection=lambda _: objection)


def test_the_history_says_what_was_done_newest_first_and_what_was_refused(desk):
    approvals, _, _ = desk
    decide(approvals, 1)
    decide(approvals, 2, why="")
    decide(approvals, 3, "reject", to_stage="Archived")
    decide(approvals, 1, "rollback", "Archived", when="2026-11-27T10:00:04Z")
    decide(approvals, 1, "rollback", "Production", "Archived", when="2026-11-27T10:00:05Z")
    approvals.note_refusal(model="desk", version=4, who="tom", why="please", sentence="tom is a trainer")
    events = events_of(approvals.history("desk"), approvals.refusals("desk"))
    assert [event.what for event in events] == [
        "refused",
        "taken out",
        "rolled back to",
        "rejected",
        "approved",
        "approved",
    ]
    assert events[0].sentence == "tom is a trainer"
    assert (events[-1].from_stage, events[-1].to_stage, events[-1].who) == ("Staging", "Production", "ada")


def test_a_trial_is_told_in_the_history_and_on_the_page_of_its_version(desk):
    approvals, _, _ = desk
    decide(approvals, 1)
    told = {"share": 0.05, "header": True, "sticky": True}
    decide(approvals, 2, "canary", to_stage="Staging", canary=told)
    on_trial = shown(desk, 2, [version(1, "live"), version(2, parent="a" * 64)])
    assert on_trial["facts"][1] == ["On trial", "given 5% of the requests by ada at 2026-11-27 10:00:02 UTC"]
    decide(approvals, 2, "canary", to_stage="Staging", canary={"share": 0, "automatic": True})
    events = events_of(approvals.history("desk"), [])
    assert [event.what for event in events][:2] == ["trial ended by the server", "given 5% of the requests"]
    assert events[0].from_stage == ""


def test_a_history_that_was_changed_says_so_wherever_it_is_shown(desk):
    approvals, keys, folder = desk
    assert seal_of(approvals, keys).sentence == "No decision has been made yet."
    decide(approvals, 1)
    decide(approvals, 2)
    seal = seal_of(approvals, keys)
    assert seal.holds and "All 2 decisions" in seal.sentence
    with create_engine(f"sqlite:///{folder / 'approvals.db'}").begin() as connection:
        connection.execute(
            text("update approvals set signed = replace(signed, 'reads well', 'reads hell') where seq = 1")
        )
    seal = seal_of(approvals, keys)
    assert not seal.holds and "row seq=1" in seal.sentence
    page = history_page("desk", events_of(approvals.history("desk"), []), seal)
    assert '<header class="failed">' in page and "was changed after it was written" in page
    assert not shown(desk, 2, [version(2)])["seal"]["holds"]


def test_a_history_without_its_newest_row_is_seen_by_what_a_version_carries(desk):
    approvals, keys, folder = desk
    decide(approvals, 1)
    newest = decide(approvals, 2)
    with create_engine(f"sqlite:///{folder / 'approvals.db'}").begin() as connection:
        connection.execute(text("delete from approvals where seq = 2"))
    assert seal_of(approvals, keys).holds
    cut = seal_of(approvals, keys, [newest])
    assert not cut.holds and "decision 2" in cut.sentence
    assert seal_of(approvals, keys, [newest | {"seq": 9}]).holds  # not signed: anybody may write a tag


def test_nothing_that_people_wrote_becomes_markup(desk):
    approvals, keys, _ = desk
    decide(approvals, 1, who=EVIL, why=EVIL)
    approvals.note_refusal(model="desk", version=2, who=EVIL, why=EVIL, sentence=EVIL)
    page = history_page(
        EVIL, events_of(approvals.history("desk"), approvals.refusals("desk")), seal_of(approvals, keys)
    )
    assert EVIL not in page and page.count("&lt;img src=x") >= 6
    assert "<script" not in page and "default-src &#39;none&#39;" in page


def test_the_page_of_a_version_says_where_it_stands(desk):
    approvals, _, _ = desk
    one, two, three = version(1, "live"), version(2, parent="a" * 64), version(3, parent="f" * 64)
    assert shown(desk, 2, [one, two])["facts"] == [
        ["Trained from", "version 1, which is not live: no version is live now"]
    ]
    decide(approvals, 1)
    live = shown(desk, 1, [one, two], objection="never asked of what is live")
    assert live["says"]["kind"] == "live" and "“reads well”" in live["says"]["sentence"]
    waits = shown(desk, 2, [one, two])
    assert waits["says"]["head"] == "It passed its gates and waits for a decision"
    assert waits["facts"] == [["Trained from", "version 1, which is still live"]]
    no = shown(desk, 3, [one, two, three], objection="desk version 3 is stale")
    assert no["says"] == {"kind": "no", "head": "It cannot go to Production", "sentence": "desk version 3 is stale."}
    assert "does not know (ffffffffffff)" in no["facts"][0][1]
    assert shown(desk, 3, [version(3, "retired")])["says"]["head"] == "It was live before"
    assert shown(desk, 3, [version(3, "failed")], objection="no")["says"]["head"] == "It failed its gates"
    with pytest.raises(UnknownVersion):
        shown(desk, 9, [one])


def test_the_script_stands_first_in_the_head_and_is_whole():
    page = with_script("<html><head><script src=theirs.js></script></head><body></body></html>")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    assert page.index("<script>") < page.index("theirs.js")
    assert script.rstrip().endswith("})();") and "_mlflow_user_setting_dismiss_next_model_registry_ui" in script
    assert with_script("no head here") == "no head here"
