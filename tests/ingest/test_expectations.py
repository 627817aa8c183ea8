"""A suite decides about rows one at a time, or not at all."""

from pathlib import Path

import pytest
import yaml

from ingest.errors import SuiteError, ValidationStopped
from ingest.expectations import COLUMNS, PER_ROW, Suite, default_suite, write_default_suite
from ingest.record import RecordLimits
from tests.ingest.blocks import record

LIMITS = RecordLimits(frozenset({"billing", "travel"}), frozenset({"refund", "visa"}), 100, 20)


def _suite(path: Path, *rules: dict[str, object]) -> Suite:
    path.write_text(yaml.safe_dump({"schema_version": 1, "expectations": list(rules)}))
    return Suite(path)


def _rule(kind: str, decides: object = True, **kwargs: object) -> dict[str, object]:
    return {"type": kind, "kwargs": kwargs, "decides": decides}


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    path = tmp_path_factory.mktemp("suite") / "s.yaml"
    write_default_suite(path, LIMITS)
    assert yaml.safe_load(path.read_text()) == default_suite(LIMITS)
    return Suite(path)


def test_the_default_suite_accepts_good_and_names_bad_rows(default: Suite) -> None:
    records = [
        record(0, label="visa"),
        record(1, prompt=" \n\t"),
        record(2),
        record(3, domain="health", completion=" "),
        record(4, label="other"),
        record(5, prompt="x" * 101),
        record(6, prompt="  ü  ", label=None),
    ]
    judged = default.validate(records)
    fields = {row: {reason.field for reason in reasons} for row, reasons in judged.rejected.items()}
    assert fields == {1: {"prompt"}, 3: {"domain", "completion"}, 4: {"label"}, 5: {"prompt"}}
    assert {reason.code for reasons in judged.rejected.values() for reason in reasons} == {"expectation"}
    assert judged.alarms == ()


def test_an_alarm_drops_no_row(default: Suite) -> None:
    judged = default.validate([record(0), record(0, user="other")])
    assert judged.rejected == {}
    assert judged.alarms == ("expect_column_values_to_be_unique(event_id)",)


def test_an_empty_batch_needs_no_run(default: Suite) -> None:
    assert default.validate([]).rejected == {}


def test_verdicts_do_not_depend_on_neighbours(default: Suite) -> None:
    records = [record(i, prompt=" " if i % 3 == 0 else f"p{i}") for i in range(12)]
    together = default.validate(records).rejected
    alone = {i for i, one in enumerate(records) if default.validate([one]).rejected}
    assert set(together) == alone


def test_a_column_of_nulls_passes_and_can_be_forbidden(tmp_path: Path) -> None:
    suite = _suite(tmp_path / "s.yaml", _rule("expect_column_values_to_not_be_null", column="label"))
    assert set(suite.validate([record(0), record(1, label="visa"), record(2)]).rejected) == {0, 2}


def test_an_expectation_that_breaks_stops_the_batch(tmp_path: Path) -> None:
    suite = _suite(tmp_path / "s.yaml", _rule("expect_column_values_to_match_regex", column="prompt", regex="("))
    with pytest.raises(ValidationStopped, match="expect_column_values_to_match_regex"):
        suite.validate([record(0)])


@pytest.mark.parametrize(
    "kind",
    [
        "expect_column_values_to_be_unique",
        "expect_column_values_to_be_increasing",
        "expect_column_value_z_scores_to_be_less_than",
        "expect_column_values_to_not_be_outliers",
        "expect_table_row_count_to_be_between",
        "expect_column_mean_to_be_between",
        "expect_multicolumn_values_to_be_unique",
        "expect_nonsense",
    ],
)
def test_what_compares_rows_may_not_decide(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SuiteError, match="decides: alarm"):
        _suite(tmp_path / "s.yaml", _rule(kind, column="prompt"))


def test_all_that_may_decide_is_a_map_expectation() -> None:
    from great_expectations.expectations.expectation import ColumnMapExpectation
    from great_expectations.expectations.registry import get_expectation_impl

    assert all(issubclass(get_expectation_impl(kind), ColumnMapExpectation) for kind in PER_ROW)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (_rule("expect_column_values_to_not_be_null", column="secret"), "column=secret: must be one of event_id"),
        (_rule("expect_column_values_to_not_be_null", column="prompt", mostly=0.9), "mostly"),
        (_rule("expect_column_values_to_be_in_set", column="prompt", row_condition="x"), "row_condition"),
        (_rule("expect_column_values_to_be_in_set", column="prompt", value_sett=[]), "value_set"),
        (_rule("expect_nonsense", "alarm", column="prompt"), "expect_nonsense"),
        (_rule("expect_column_values_to_not_be_null", False, column="prompt"), "decides"),
        ({"type": "expect_column_values_to_not_be_null"}, "kwargs"),
    ],
)
def test_a_wrong_suite_is_one_clear_line(tmp_path: Path, rule: dict[str, object], match: str) -> None:
    with pytest.raises(SuiteError, match=match) as caught:
        _suite(tmp_path / "s.yaml", rule)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="tidegate init"):
        Suite(tmp_path / "none.yaml")
    (tmp_path / "s.yaml").write_text("a: [")
    with pytest.raises(SuiteError, match="unreadable"):
        Suite(tmp_path / "s.yaml")


def test_columns_are_the_contract() -> None:
    assert COLUMNS == ("event_id", "user_id", "domain", "prompt", "completion", "label", "occurred_at")
