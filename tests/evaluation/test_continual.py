import pytest

from evaluation.continual import memory


def test_the_figures_of_a_line_are_those_of_the_papers_formulas():
    rounds = [{"a": 0.8, "b": 0.1}, {"a": 0.5, "b": 0.9}, {"a": 0.6, "b": 0.7, "c": 0.4}]
    kept = memory(rounds, {"a": 0, "b": 1, "c": 2})
    assert kept.average_accuracy == pytest.approx((0.6 + 0.7 + 0.4) / 3)
    assert kept.backward_transfer == pytest.approx(((0.6 - 0.8) + (0.7 - 0.9)) / 2)
    assert kept.forgetting == pytest.approx({"a": 0.2, "b": 0.2})
    assert kept.forgetting_mean == pytest.approx(0.2)


def test_forgetting_is_against_the_best_earlier_round_and_transfer_against_the_round_that_learnt():
    kept = memory([{"a": 0.5}, {"a": 0.9}, {"a": 0.7}], {"a": 0})
    assert kept.forgetting == pytest.approx({"a": 0.2})
    assert kept.backward_transfer == pytest.approx(0.2)


def test_a_domain_that_got_better_has_negative_forgetting():
    assert memory([{"a": 0.5}, {"a": 0.9}], {"a": 0}).forgetting == pytest.approx({"a": -0.4})


def test_without_saying_so_a_domain_is_learnt_in_the_first_round_that_was_measured_on_it():
    kept = memory([{"a": 0.5}, {"a": 0.4, "b": 0.6}, {"a": 0.3, "b": 0.6}])
    assert kept.forgetting == pytest.approx({"a": 0.2, "b": 0.0})
    assert kept.average_accuracy == pytest.approx(0.45)


def test_one_round_has_an_accuracy_and_nothing_to_forget():
    kept = memory([{"a": 0.5, "b": 0.7}])
    assert (kept.average_accuracy, kept.backward_transfer, kept.forgetting_mean) == (pytest.approx(0.6), None, None)
    assert kept.forgetting == {}


def test_a_domain_learnt_later_counts_for_nothing_yet():
    kept = memory([{"a": 0.5, "b": 0.0}], {"a": 0, "b": 1})
    assert kept.average_accuracy == 0.5


@pytest.mark.parametrize(
    ("rounds", "learnt", "what"),
    [([], None, "rounds=0"), ([{"a": 1.0}, {}], {"a": 0}, "domain=a.*round 1"), ([{}], {"b": 0}, "domain=b.*round 0")],
)
def test_what_was_not_measured_is_named(rounds, learnt, what):
    with pytest.raises(ValueError, match=what):
        memory(rounds, learnt)
