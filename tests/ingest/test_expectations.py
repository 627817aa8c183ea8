"""A suite decides about rows one at a time, or not at all."""

import os
from pathlib import Path

import pandas as pd
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


def test_the_default_suite_is_silent_about_redelivered_records(default: Suite) -> None:
    judged = default.validate([record(0), record(0), record(0, user="other")])
    assert (judged.rejected, judged.alarms) == ({}, ())


def test_no_fingerprint_is_taken_of_the_records(default: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object, **__: object) -> None:
        raise AssertionError("a hash of private content, and half of the time that judging takes")

    monkeypatch.setattr(pd.util, "hash_pandas_object", taken)
    assert default.validate([record(0), record(1, prompt=" ")]).rejected.keys() == {1}


def test_an_alarm_drops_no_row(tmp_path: Path) -> None:
    rules = [
        _rule("expect_column_values_to_be_unique", "alarm", column="event_id"),
        _rule("expect_column_unique_value_count_to_be_between", "alarm", column="user_id", min_value=5),
        _rule("expect_column_values_to_match_regex", column="prompt", regex="question"),
    ]
    judged = _suite(tmp_path / "s.yaml", *rules).validate([record(0), record(0, user="other"), record(2, prompt="x")])
    assert set(judged.rejected) == {2}
    assert judged.alarms == (
        "expect_column_values_to_be_unique(event_id)",
        "expect_column_unique_value_count_to_be_between(user_id)",
    )
    assert [(f.number, f.decides, f.passed, f.rows) for f in judged.findings] == [
        (1, False, False, (0, 1)),
        (2, False, False, None),
        (3, True, False, (2,)),
    ]


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
    with pytest.raises(ValidationStopped) as caught:
        suite.validate([record(0, prompt="a secret")])
    message = str(caught.value)
    assert f"{tmp_path}/s.yaml: expectation 1 (expect_column_values_to_match_regex)" in message
    assert "nothing was sealed" in message
    assert "mend the expectation" in message
    assert "secret" not in message


# One of each with arguments under which it can fail.
_ARGUMENTS: dict[str, dict[str, object]] = {
    "expect_column_value_lengths_to_be_between": {"min_value": 2, "max_value": 4},
    "expect_column_value_lengths_to_equal": {"value": 3},
    "expect_column_values_to_be_in_set": {"value_set": ["a"]},
    "expect_column_values_to_match_regex": {"regex": "a"},
    "expect_column_values_to_match_regex_list": {"regex_list": ["a", "b"]},
    "expect_column_values_to_match_strftime_format": {"strftime_format": "%Y"},
    "expect_column_values_to_not_be_in_set": {"value_set": ["a"]},
    "expect_column_values_to_not_match_regex": {"regex": "a"},
    "expect_column_values_to_not_match_regex_list": {"regex_list": ["a", "b"]},
}


def test_no_single_record_can_stop_the_stream(tmp_path: Path) -> None:
    odd = ["{", "[1]", "9" * 5000, "1e400", "\x00", "٣", " ", "[" * 3000, "NaT", "nan", "0001-01-01T00:00+24:00", "-"]
    rules = [_rule(kind, column="prompt", **_ARGUMENTS.get(kind, {})) for kind in sorted(PER_ROW)]
    judged = _suite(tmp_path / "s.yaml", *rules).validate([record(i, prompt=text) for i, text in enumerate(odd)])
    assert len(judged.findings) == len(PER_ROW)


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
        "expect_column_values_to_be_between",
        "expect_column_values_to_match_json_schema",
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
        (_rule("expect_column_values_to_be_in_set", column="label", value_set={"$PARAMETER": "x"}), "write the value"),
        (_rule("expect_column_values_to_be_in_set", column="label", value_set=[], result_format="BASIC"), "remove it"),
        (_rule("expect_column_values_to_match_regexp", column="prompt"), "type: expect_column_values_to_match_regex,"),
        (_rule("expect_column_values_to_match_json_schema", column="prompt"), "to_be_json_parseable"),
        (_rule("expect_column_values_to_not_be_null", "yes", column="prompt"), "decides: true or decides: alarm"),
        (_rule("expect_column_values_to_be_in_set", column="prompt", row_condition="x"), "row_condition"),
        (_rule("expect_column_values_to_be_in_set", column="prompt", value_sett=[]), "value_set"),
        (_rule("expect_nonsense", "alarm", column="prompt"), "expect_nonsense"),
        (_rule("expect_column_values_to_not_be_null", False, column="prompt"), "decides"),
        ({"type": "expect_column_values_to_not_be_null"}, "kwargs"),
    ],
)
def test_a_wrong_suite_is_one_clear_line(tmp_path: Path, rule: dict[str, object], match: str) -> None:
    with pytest.raises(SuiteError, match=match) as caught:
        _suite(tmp_path / "s.yaml", _rule("expect_column_values_to_not_be_null", column="prompt"), rule)
    assert "\n" not in str(caught.value)
    assert f"{tmp_path}/s.yaml: expectation 2" in str(caught.value)


def test_a_missing_or_broken_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="tidegate init"):
        Suite(tmp_path / "none.yaml")
    (tmp_path / "s.yaml").write_text("a: [")
    with pytest.raises(SuiteError, match="unreadable"):
        Suite(tmp_path / "s.yaml")


def _aged(path: Path) -> None:
    """As if the file had been written a minute ago: a fresh one is read at every look."""
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))


def test_a_suite_is_read_again_only_when_its_bytes_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.yaml"
    suite = _suite(path, _rule("expect_column_values_to_match_regex", column="prompt", regex="question"))
    assert suite.refreshed() is suite
    _aged(path)
    assert suite.refreshed() is suite
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _path: pytest.fail("read although a stat shows no change"))
        assert suite.refreshed() is suite
    # Same length, same moment: only the content differs.
    path.write_text(path.read_text().replace("question", "quibbles"))
    changed = suite.refreshed()
    assert changed is not suite
    assert changed.sha256 != suite.sha256
    assert (len(suite.validate([record(0)]).rejected), len(changed.validate([record(0)]).rejected)) == (0, 1)


def test_a_change_that_cannot_be_used_is_refused_until_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    rule = _rule("expect_column_values_to_not_be_null", column="prompt")
    suite = _suite(path, rule)
    good = path.read_bytes()
    path.write_text("schema_version: 2\nexpectations: []\n")
    for _ in range(2):
        with pytest.raises(SuiteError, match="schema_version=2"):
            suite.refreshed()
    path.unlink()
    with pytest.raises(SuiteError, match="tidegate init"):
        suite.refreshed()
    path.write_bytes(good)
    assert suite.refreshed() is suite


def test_columns_are_the_contract() -> None:
    assert COLUMNS == ("event_id", "user_id", "domain", "prompt", "completion", "label", "occurred_at")
