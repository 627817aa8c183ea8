r"""Great Expectations on the records of a block: the only file importing great_expectations.

A suite is a file people read and change:

    schema_version: 1
    expectations:
      - type: expect_column_values_to_match_regex
        kwargs: {column: prompt, regex: '\S'}
        decides: true            # true: a row that fails goes to the dead letters; alarm: an operator is told

Only expectations that look at one row at a time may decide. What compares rows (uniqueness, order, outliers, counts)
would let one person's record decide about another's; such may only alarm. Changes take effect at the next start.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ingest.errors import SuiteError, ValidationStopped
from ingest.record import REASONS_MAX, SCHEMA_VERSION, Reason, Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ingest.record import RecordLimits

COLUMNS: Final = tuple(name for name in Record.model_fields if name not in {"schema_version", "attributes"})
"""What a suite may speak of."""

PER_ROW: Final = frozenset(
    {
        "expect_column_value_lengths_to_be_between",
        "expect_column_value_lengths_to_equal",
        "expect_column_values_to_be_between",
        "expect_column_values_to_be_dateutil_parseable",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_be_json_parseable",
        "expect_column_values_to_be_null",
        "expect_column_values_to_match_json_schema",
        "expect_column_values_to_match_regex",
        "expect_column_values_to_match_regex_list",
        "expect_column_values_to_match_strftime_format",
        "expect_column_values_to_not_be_in_set",
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_not_match_regex",
        "expect_column_values_to_not_match_regex_list",
    }
)
"""Of the ColumnMapExpectation family, those whose verdict on a row depends on that row alone."""

# `mostly` looks at the whole batch; a condition selects rows by code.
_FORBIDDEN_KWARGS: Final = frozenset({"mostly", "row_condition", "condition_parser"})
_ROW: Final = "_row"
_RESULT_FORMAT: Final = {
    "result_format": "COMPLETE",
    "unexpected_index_column_names": [_ROW],
    "return_unexpected_index_query": False,
}


class _Expectation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    kwargs: dict[str, Any]
    decides: Literal[True, "alarm"]


class _SuiteFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    expectations: tuple[_Expectation, ...]


@dataclass(frozen=True)
class Judged:
    """What a suite said: reasons by row number, and the alarms, which concern no single row."""

    rejected: Mapping[int, tuple[Reason, ...]]
    alarms: tuple[str, ...]


def default_suite(limits: RecordLimits) -> dict[str, Any]:
    """A suite from what a stream declares; plain values, ready for YAML."""

    def rule(kind: str, decides: bool | str = True, **kwargs: Any) -> dict[str, Any]:
        return {"type": kind, "kwargs": kwargs, "decides": decides}

    length = "expect_column_value_lengths_to_be_between"
    rules = [
        rule("expect_column_values_to_be_in_set", column="domain", value_set=sorted(limits.domains)),
        rule(length, column="prompt", min_value=1, max_value=limits.prompt_chars_max),
        rule(length, column="completion", min_value=1, max_value=limits.completion_chars_max),
        rule("expect_column_values_to_match_regex", column="prompt", regex=r"\S"),
        rule("expect_column_values_to_match_regex", column="completion", regex=r"\S"),
    ]
    if limits.labels is not None:
        rules.append(rule("expect_column_values_to_be_in_set", column="label", value_set=sorted(limits.labels)))
    rules.append(rule("expect_column_values_to_be_unique", "alarm", column="event_id"))
    return {"schema_version": SCHEMA_VERSION, "expectations": rules}


_HEADER: Final = """\
# What Great Expectations asks of each record, after the contract of params.yaml has been met.
# decides: true   a record that fails goes to the dead letters, with the expectation as its reason
# decides: alarm  an operator is told; no record is dropped
# Only expectations on one row at a time may decide. Restart `tidegate ingest` after a change.
"""


def write_default_suite(path: Path, limits: RecordLimits) -> None:
    """Write the default suite as a readable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(
        default_suite(limits), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
    path.write_text(_HEADER + text, encoding="utf-8")


def _read(path: Path) -> tuple[_SuiteFile, str]:
    try:
        data = path.read_bytes()
        raw = yaml.safe_load(data)
        return _SuiteFile.model_validate(raw), hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file; `tidegate init` writes a default suite") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SuiteError(f"{path}: unreadable: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "suite"
        raise SuiteError(f"{path}: {where}={str(first['input'])[:80]}: {first['msg']}") from None


def _check(path: Path, number: int, rule: _Expectation) -> None:
    where = f"{path}: expectations.{number}: type={rule.type}"
    columns = [rule.kwargs.get("column"), *(rule.kwargs.get("column_list") or [])]
    columns += [rule.kwargs.get(name) for name in ("column_A", "column_B")]
    for column in columns:
        if column is not None and column not in COLUMNS:
            raise SuiteError(f"{where}: column={column}: must be one of {', '.join(COLUMNS)}")
    if rule.decides is not True:
        return
    if rule.type not in PER_ROW:
        raise SuiteError(
            f"{where}: compares rows, or is unknown; only one-row expectations may decide; set decides: alarm"
        )
    if odd := _FORBIDDEN_KWARGS & rule.kwargs.keys():
        raise SuiteError(f"{where}: {', '.join(sorted(odd))}: looks beyond one row; remove it or set decides: alarm")


class Suite:
    """A loaded suite. Loading imports Great Expectations, some four seconds."""

    def __init__(self, path: Path) -> None:
        """Load and check the file.

        Raises:
            SuiteError: it is missing, malformed, names an unknown column or expectation,
                or lets an expectation decide that looks at more than one row.
        """
        suite, self.sha256 = _read(path)
        for number, rule in enumerate(suite.expectations):
            _check(path, number, rule)
        self._decides = [rule.decides is True for rule in suite.expectations]
        gx = _great_expectations()
        built = []
        for number, rule in enumerate(suite.expectations):
            try:
                kind = gx.expectations.registry.get_expectation_impl(rule.type)
                built.append(kind(**rule.kwargs, meta={"number": number}))
            except (gx.exceptions.ExpectationNotFoundError, ValueError, TypeError) as error:
                text = " ".join(str(error).split())[:200]
                raise SuiteError(f"{path}: expectations.{number}: type={rule.type}: {text}") from None
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        self._suite = gx.ExpectationSuite(name="records", expectations=built)
        asset = context.data_sources.add_pandas("records").add_dataframe_asset("block")
        self._definition = asset.add_batch_definition_whole_dataframe("block")

    def validate(self, records: Sequence[Record]) -> Judged:
        """Judge records; a row is numbered by its place in `records`.

        Raises:
            ValidationStopped: an expectation could not be evaluated; nothing may be sealed of this batch.
        """
        if not records or not self._decides:
            return Judged({}, ())
        frame = _frame(records)
        if missing := set(COLUMNS) - set(frame.columns):
            raise ValidationStopped(f"expectations: columns {', '.join(sorted(missing))} missing; this is a defect")
        batch = self._definition.get_batch(batch_parameters={"dataframe": frame})
        results = batch.validate(self._suite, result_format=_RESULT_FORMAT).results
        if len(results) != len(self._decides):
            raise ValidationStopped(f"expectations: {len(results)} answers to {len(self._decides)} questions")
        rejected: dict[int, list[Reason]] = {}
        alarms = []
        for result in results:
            kind = result.expectation_config.type
            column = result.expectation_config.kwargs.get("column", "")
            _stop_on_exception(result, kind, column)
            if result.success:
                continue
            if not self._decides[result.expectation_config.meta["number"]]:
                alarms.append(f"{kind}({column})")
                continue
            for row in _failed_rows(result, kind, column):
                rejected.setdefault(row, []).append(Reason("expectation", column, f"failed {kind}"))
        return Judged({row: tuple(reasons[:REASONS_MAX]) for row, reasons in rejected.items()}, tuple(alarms))


def _great_expectations() -> Any:
    # It reports its use to its makers unless told not to before it is imported.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.CRITICAL)
    import great_expectations as gx
    import great_expectations.expectations.registry

    return gx


def _frame(records: Sequence[Record]) -> Any:
    import pandas as pd

    # Objects, not Arrow strings: patterns then mean what Python's `re` says, and lengths are characters.
    columns: dict[str, Any] = {
        name: pd.Series([getattr(record, name) for record in records], dtype=object) for name in COLUMNS
    }
    return pd.DataFrame({_ROW: range(len(records)), **columns})


def _stop_on_exception(result: Any, kind: str, column: str) -> None:
    info = result.exception_info or {}
    # One flat record, or one a metric; a missing column shows only here, with no row named.
    entries = [info] if "raised_exception" in info else list(info.values())
    if any(entry.get("raised_exception") for entry in entries if isinstance(entry, dict)):
        raise ValidationStopped(f"expectations: {kind}({column}) could not be evaluated; mend it in the suite")


def _failed_rows(result: Any, kind: str, column: str) -> list[int]:
    rows = [int(entry[_ROW]) for entry in result.result.get("unexpected_index_list") or []]
    if not rows or len(rows) != result.result["unexpected_count"]:
        raise ValidationStopped(f"expectations: {kind}({column}) failed without naming its rows; set decides: alarm")
    return rows
