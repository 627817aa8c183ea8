"""What is written about a round names its data by revision, and nothing of it that is private."""

import json
from dataclasses import replace

import pytest

from evaluation.private import PrivateScores
from registry.states import ModelVersion
from tests.evaluation.pages import BASE, COUNTS, judged
from tests.evaluation.planted import write_gate_set
from tests.learner.rounds import plan
from tidegate.memory import line_of, share_used
from tidegate.reports import datasets, reports


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "desk.jsonl")


def version(number, tags):
    return ModelVersion(
        number, "None", {f"tidegate.{k}": v for k, v in tags.items()}, "2026-01-01T00:00:00Z", "r", (), ""
    )


def told(gates):
    return version(1, {"verdict": json.dumps({"gates": gates})})


def test_the_page_tells_the_line_and_the_summary_points_to_it(gate_set):
    found = judged(gate_set)
    first = line_of([], None, judged(gate_set, "failed"))
    verdict = {"gates": [{"name": "budget_kept", "value": 0.125}], "made_at": "2026-11-27T09:30:00Z"}
    parent = version(4, {"adapter_sha256": "b" * 64, "continual": first.tag(), "verdict": json.dumps(verdict)})
    made = plan(BASE)
    files = reports(made, BASE, found, verdict, parent=parent, line=line_of([parent], parent, found))
    assert files.keys() == {"report.html", "report.md", "accuracy.png"}
    page, summary = files["report.html"].decode(), files["report.md"].decode()
    assert "](report.html)" in summary and "](accuracy.png)" in summary
    for text in (
        "version 4: 12.5 percent; this one: 30.0 percent",
        "billing: 51.0, 89.0",
        made.data_revision,
        "2026-11-27",
    ):
        assert text in page


def test_a_message_that_is_no_utf_8_is_written_all_the_same(gate_set):
    found = replace(judged(gate_set), reasons=("it broke: \ud800",))
    files = reports(plan(BASE), BASE, found, {"made_at": ""}, parent=None, line=None)
    assert b"It broke: ?" in files["report.html"] and b"It broke: ?" in files["report.md"]


def test_a_holdout_is_listed_when_it_was_asked_and_its_counts_never(gate_set):
    made, found = plan(BASE), judged(gate_set)
    train, gates = datasets(made, found)
    assert (train.context, train.revision) == ("training", made.data_revision)
    assert (gates.context, gates.revision, gates.tags["records"]) == ("gates", gate_set.sha256, "300")
    assert len(datasets(made, replace(found, private=PrivateScores(None, refusal="empty")))) == 2
    asked = datasets(made, replace(found, private=PrivateScores(COUNTS, charge_id="r1.h1", evaluations_left=3)))
    assert asked[2].tags == {"data_revision": made.data_revision, "charge_id": "r1.h1", "data": "private"}
    assert not {str(value) for value in COUNTS.values} & {*asked[2].tags.values(), *asked[2].source.values()}


@pytest.mark.parametrize(
    ("gates", "share"),
    [
        ([{"name": "budget_kept", "value": 0.5}], 0.5),
        ([{"name": "budget_kept", "value": None}], None),
        ([{"name": "budget_kept", "value": float("nan")}], None),
        ([{"name": "other"}], None),
        ("none", None),
        (None, None),
    ],
)
def test_the_share_used_is_what_the_verdict_says_or_unknown(gates, share):
    assert share_used(told(gates)) == share
    assert share_used(version(1, {"verdict": "{"})) is None
    assert share_used(version(1, {})) is None
