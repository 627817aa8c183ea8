import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from evaluation.metrics import Score
from evaluation.verdict import ModelScores, Slice
from registry.states import ModelVersion
from tidegate.memory import TAG, line_of, read


@dataclass
class Found:
    """What of an evaluation a line is made of."""

    accuracy: dict
    gate_set: dict = field(default_factory=lambda: {"sha256": "s1"})

    @property
    def slices(self):
        whole = Slice("", 100, 0.1, candidate=scores(0.5))
        return (whole, *(Slice(d, 50, 0.1, candidate=scores(a)) for d, a in self.accuracy.items()))


def scores(value):
    return ModelScores(Score(value, 0.01, 50), Score(value, 0.01, 50))


def version(number, line=None, *, parent=0, tag=None):
    tags = {
        "tidegate.adapter_sha256": f"adapter {number}",
        "tidegate.parent_sha256": f"adapter {parent}" if parent else "",
        f"tidegate.{TAG}": tag if tag is not None else line.tag() if line else "",
    }
    return ModelVersion(number, "None", tags, "2026-01-01T00:00:00Z", "run", (), "")


def test_a_line_remembers_what_each_ancestor_was_judged_with():
    one = version(1, line_of([], None, Found({"a": 0.5, "b": 0.1})))
    two = version(2, line_of([one], one, Found({"a": 0.8, "b": 0.6})), parent=1)
    aside = version(3, line_of([one, two], one, Found({"a": 1.0, "b": 1.0})), parent=1)
    line = line_of([one, two, aside], two, Found({"a": 0.6, "b": 0.7}))
    assert line.versions == (1, 2)
    assert line.kept.average_accuracy == pytest.approx(0.65)
    assert line.kept.backward_transfer == pytest.approx((0.1 + 0.6) / 2)
    assert line.kept.forgetting == pytest.approx({"a": 0.2, "b": -0.1})
    assert line.metrics() == pytest.approx(
        {
            "average_accuracy": 0.65,
            "backward_transfer": 0.35,
            "forgetting": 0.05,
            "forgetting.a": 0.2,
            "forgetting.b": -0.1,
        }
    )


def test_the_first_version_has_nothing_to_forget():
    line = line_of([], None, Found({"a": 0.5}))
    assert (line.versions, line.kept.forgetting, line.metrics()) == ((), {}, {"average_accuracy": 0.5})
    assert json.loads(line.tag())["backward_transfer"] is None


def test_ancestors_that_were_judged_on_another_gate_set_do_not_count():
    one = version(1, line_of([], None, Found({"a": 0.9}, {"sha256": "another"})))
    two = version(2, line_of([one], one, Found({"a": 0.5})), parent=1)
    line = line_of([one, two], two, Found({"a": 0.4}))
    assert line.versions == (2,)
    assert line.kept.forgetting == pytest.approx({"a": 0.1})


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "no json",
        "[]",
        '{"version": "continual/0"}',
        '{"version": "continual/1 summed-loglik", "gate_set": "s1", "accuracy": {"a": "much"}, "forgetting": {}}',
        '{"version": "continual/1 summed-loglik", "gate_set": "s1", "accuracy": {"a": NaN}, "forgetting": {}}',
    ],
)
def test_a_tag_in_another_form_counts_as_none(tag):
    one = version(1, tag=tag)
    assert read(one) is None
    assert line_of([one], one, Found({"a": 0.4})).versions == ()


def test_a_candidate_that_could_not_be_scored_has_no_line():
    broken = SimpleNamespace(slices=(Slice("a", 50, 0.1),), gate_set={"sha256": "s1"})
    assert line_of([], None, broken) is None
