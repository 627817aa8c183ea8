r"""Great Expectations on the records of a block: the only file importing great_expectations.

A suite is a file people read and change:

    schema_version: 1
    expectations:
      - type: expect_column_values_to_match_regex
        kwargs: {column: prompt, regex: '\S'}
        decides: true            # true: a row that fails goes to the dead letters; alarm: an operator is told

Only expectations that look at one row at a time may decide. What compares rows (uniqueness, order, outliers, counts)
would let one person's record decide about another's; such may only alarm. A change of the file takes effect with the
next block, see :meth:`Suite.refreshed`. Expectations are counted from 1, as a reader of the file counts them.
"""

from __future__ import annotations

import difflib
import hashlib
import html
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ingest.errors import SuiteError, ValidationStopped
from ingest.record import REASONS_MAX, SCHEMA_VERSION, Reason, Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from ingest.record import RecordLimits

COLUMNS: Final = tuple(name for name in Record.model_fields if name not in {"schema_version", "attributes"})
"""What a suite may speak of."""

PER_ROW: Final = frozenset(
    {
        "expect_column_value_lengths_to_be_between",
        "expect_column_value_lengths_to_equal",
        "expect_column_values_to_be_dateutil_parseable",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_be_json_parseable",
        "expect_column_values_to_be_null",
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

# They look at one row, but raise instead of judging: a single record could then stop the stream for everybody.
_BREAKS: Final = {
    "expect_column_values_to_be_between": (
        "cannot compare text with numbers; write expect_column_value_lengths_to_be_between"
    ),
    "expect_column_values_to_match_json_schema": (
        "breaks off at a value that is no JSON; write expect_column_values_to_be_json_parseable"
    ),
}
# `mostly` looks at the whole batch; a condition selects rows by code.
_FORBIDDEN_KWARGS: Final = frozenset({"mostly", "row_condition", "condition_parser"})
# How results are reported is asked for here; a suite that changes it would hide which rows failed.
_RESERVED_KWARGS: Final = frozenset({"batch_id", "catch_exceptions", "meta", "result_format", "windows"})
# A file changed so shortly before it was read may change again within one tick of the file system's clock.
_FRESH_NS: Final = 2_000_000_000
_ROW: Final = "_row"
_VERDICT_FORMAT: Final = {"result_format": "BOOLEAN_ONLY"}
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
class Finding:
    """What one expectation said of a batch. `number` counts from 1; `rows` is None where no single row is to blame."""

    number: int
    type: str
    column: str
    decides: bool
    passed: bool
    rows: tuple[int, ...] | None


@dataclass(frozen=True)
class Judged:
    """What a suite said: reasons by row number, the alarms, and each expectation's finding in the file's order."""

    rejected: Mapping[int, tuple[Reason, ...]]
    alarms: tuple[str, ...]
    findings: tuple[Finding, ...] = ()


def default_suite(limits: RecordLimits) -> dict[str, Any]:
    """A suite from what a stream declares; plain values, ready for YAML.

    It asks nothing of a batch as a whole. In particular it does not ask for unique event ids: Kafka delivers at least
    once, so every redelivered record would raise an alarm that calls for nothing; duplicates are dropped and counted.
    """

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
    return {"schema_version": SCHEMA_VERSION, "expectations": rules}


_HEADER: Final = """\
# What Great Expectations asks of each record, after the contract of params.yaml has been met.
# decides: true   a record that fails goes to the dead letters, with the expectation as its reason
# decides: alarm  an operator is told; no record is dropped
# Only expectations on one row at a time may decide. A change takes effect with the next block, without a restart;
# a file that cannot be used stops the stream with an alarm, and nothing is lost. Try a change on records first:
# tidegate expectations check STREAM RECORDS.jsonl --suite FILE
"""


def write_default_suite(path: Path, limits: RecordLimits) -> None:
    """Write the default suite as a readable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(
        default_suite(limits), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
    path.write_text(_HEADER + text, encoding="utf-8")


def _at(path: Path, number: int, rule: _Expectation) -> str:
    return f"{path}: expectation {number} ({rule.type})"


def _one_line(value: object, chars_max: int) -> str:
    return " ".join(str(value).split())[:chars_max]


def _read(path: Path) -> tuple[_SuiteFile, str]:
    try:
        data = path.read_bytes()
        raw = yaml.safe_load(data)
        return _SuiteFile.model_validate(raw), hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such file; `tidegate init` writes a default suite") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            raise SuiteError(f"{path}: {_explain(error)}") from None
        raise SuiteError(f"{path}: unreadable: {_one_line(error, 300)}; must be YAML in UTF-8") from None


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong with the file's form, and what to write."""
    first = error.errors(include_url=False)[0]
    loc = [str(part) for part in first["loc"] if part != "function-plain"]
    if len(loc) > 1 and loc[0] == "expectations":
        loc[:2] = [f"expectation {int(loc[1]) + 1}"]
    where = ": ".join(loc) or "suite"
    value = "" if first["type"] == "missing" else f"={_one_line(first['input'], 80)}"
    way_out = "; write decides: true or decides: alarm" if loc[-1:] == ["decides"] else ""
    return f"{where}{value}: {first['msg']}{way_out}"


def _check(path: Path, number: int, rule: _Expectation) -> None:
    where = _at(path, number, rule)
    columns = [rule.kwargs.get("column"), *(rule.kwargs.get("column_list") or [])]
    columns += [rule.kwargs.get(name) for name in ("column_A", "column_B")]
    for column in columns:
        if column is not None and column not in COLUMNS:
            raise SuiteError(f"{where}: column={_one_line(column, 80)}: must be one of {', '.join(COLUMNS)}")
    if odd := _RESERVED_KWARGS & rule.kwargs.keys():
        raise SuiteError(f"{where}: {', '.join(sorted(odd))}: set by Tidegate itself; remove it from kwargs")
    if "$PARAMETER" in str(rule.kwargs):
        raise SuiteError(f"{where}: $PARAMETER: there are no run-time parameters; write the value itself")
    if rule.decides is not True:
        return
    if rule.type in _BREAKS:
        raise SuiteError(f"{where}: may not decide: {_BREAKS[rule.type]}, or set decides: alarm")
    if rule.type not in PER_ROW:
        raise SuiteError(
            f"{where}: compares rows, or is unknown; only one-row expectations may decide; {_instead(rule.type)}"
        )
    if odd := _FORBIDDEN_KWARGS & rule.kwargs.keys():
        raise SuiteError(f"{where}: {', '.join(sorted(odd))}: looks beyond one row; remove it or set decides: alarm")


def _instead(kind: str) -> str:
    near = difflib.get_close_matches(kind, PER_ROW, n=1, cutoff=0.9)
    return f"write type: {near[0]}, or set decides: alarm" if near else "set decides: alarm"


_Stamp = tuple[int, int, int]


def _stamp(path: Path) -> _Stamp | None:
    """What changes when the file changes; None when it is gone, or too fresh for its clock to tell."""
    try:
        seen = path.stat()
    except OSError:
        return None
    if abs(time.time_ns() - seen.st_mtime_ns) < _FRESH_NS:
        return None
    return seen.st_mtime_ns, seen.st_size, seen.st_ino


class Suite:
    """A loaded suite. Loading the first one imports Great Expectations, some four seconds."""

    def __init__(self, path: Path) -> None:
        """Load and check the file.

        Raises:
            SuiteError: it is missing, malformed, names an unknown column or expectation,
                or lets an expectation decide that looks at more than one row.
        """
        self.path = path
        # Before the file is read: a change in between is then seen by the next look.
        self._stamp = _stamp(path)
        suite, self.sha256 = _read(path)
        self._rules = suite.expectations
        for number, rule in enumerate(self._rules, 1):
            _check(path, number, rule)
        gx = _great_expectations()
        built = []
        for number, rule in enumerate(self._rules, 1):
            try:
                kind = gx.expectations.registry.get_expectation_impl(rule.type)
                built.append(kind(**rule.kwargs, meta={"number": number}))
            except gx.exceptions.ExpectationNotFoundError:
                raise SuiteError(f"{_at(path, number, rule)}: no such expectation in Great Expectations") from None
            except (ValueError, TypeError) as error:
                raise SuiteError(f"{_at(path, number, rule)}: kwargs: {_one_line(error, 200)}; mend them") from None
        context = _context(gx)
        self._suite = gx.ExpectationSuite(name="records", expectations=built)
        self._definition = _definition(context)

    @property
    def size(self) -> int:
        """Number of expectations."""
        return len(self._rules)

    def refreshed(self) -> Self:
        """This suite while the file is unchanged, else the file as it is now. Looks at the content only after a stat.

        Raises:
            SuiteError: the file changed into something that cannot be used; nothing may be judged until it is mended.
        """
        stamp = _stamp(self.path)
        if stamp is not None and stamp == self._stamp:
            return self
        try:
            sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError:
            sha256 = ""
        if sha256 != self.sha256:
            return type(self)(self.path)
        self._stamp = stamp
        return self

    def validate(self, records: Sequence[Record]) -> Judged:
        """Judge records; a row is numbered by its place in `records`.

        Raises:
            ValidationStopped: an expectation could not be evaluated; nothing may be sealed of this batch.
        """
        if not records or not self._rules:
            return Judged({}, (), tuple(self._finding(number, (), passed=True) for number in self._numbers()))
        findings = []
        for result in self._results(records):
            number = result.expectation_config.meta["number"]
            self._stop_on_exception(result, number)
            rows = () if result.success else self._failed_rows(result, number)
            findings.append(self._finding(number, rows, passed=bool(result.success)))
        findings.sort(key=lambda finding: finding.number)
        rejected: dict[int, list[Reason]] = {}
        for finding in findings:
            if finding.decides:
                for row in finding.rows or ():
                    reason = Reason("expectation", finding.column, f"failed {finding.type}")
                    rejected.setdefault(row, []).append(reason)
        alarms = tuple(f"{f.type}({f.column})" for f in findings if not f.decides and not f.passed)
        bounded = {row: tuple(reasons[:REASONS_MAX]) for row, reasons in rejected.items()}
        return Judged(bounded, alarms, tuple(findings))

    def write_docs(self, records: Sequence[Record], folder: Path, run_name: str) -> int:
        """Write Great Expectations' static site on these records into `folder`; it shows values of rows that failed.

        Returns how many expectations failed.

        The pages are as the library makes them and refer to stylesheets and scripts elsewhere: `ingest.datadocs`
        takes these away before anybody may open them.

        Raises:
            ValidationStopped: the suite could not be evaluated at all.
        """
        gx = _great_expectations()
        context = _context(gx)
        # The default site would leave people's values in the machine's folder for temporary files.
        context.delete_data_docs_site("local_site")
        backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())}
        index = {"class_name": "DefaultSiteIndexBuilder"}
        site = {"class_name": "SiteBuilder", "store_backend": backend, "site_index_builder": index}
        context.add_data_docs_site("records", {**site, "show_how_to_buttons": False})
        suite = context.suites.add(gx.ExpectationSuite(name="records", expectations=self._fresh(gx)))
        judge = gx.ValidationDefinition(name="records", data=_definition(context), suite=suite)
        context.validation_definitions.add(judge)
        result = judge.run(
            batch_parameters={"dataframe": _frame(records)},
            run_id=gx.RunIdentifier(run_name=run_name),
            result_format={"result_format": "SUMMARY", "partial_unexpected_count": 20},
        )
        store = context.validation_results_store
        for key in store.list_keys():
            judged = store.get(key)
            for one in judged.results:
                one.result = _escaped(one.result)
            store.set(key, judged)
        context.build_data_docs(site_names=["records"])
        return sum(not one.success for one in result.results)

    def _fresh(self, gx: Any) -> list[Any]:
        """The expectations anew: one that was saved in a context belongs to it."""
        registry = gx.expectations.registry
        return [registry.get_expectation_impl(rule.type)(**rule.kwargs) for rule in self._rules]

    def _numbers(self) -> range:
        return range(1, len(self._rules) + 1)

    def _finding(self, number: int, rows: tuple[int, ...] | None, *, passed: bool) -> Finding:
        rule = self._rules[number - 1]
        column = rule.kwargs.get("column") or ", ".join(map(str, rule.kwargs.get("column_list") or ()))
        return Finding(number, rule.type, column, rule.decides is True, passed, rows)

    def _results(self, records: Sequence[Record]) -> Sequence[Any]:
        """Great Expectations' answers, one an expectation."""
        frame = _frame(records)
        if missing := set(COLUMNS) - set(frame.columns):
            raise ValidationStopped(f"expectations: columns {', '.join(sorted(missing))} missing; this is a defect")
        batch = self._definition.get_batch(batch_parameters={"dataframe": frame})
        # Rows are looked for only when there are any: most blocks hold none, and naming them costs as much again.
        judged = batch.validate(self._suite, result_format=_VERDICT_FORMAT)
        if not judged.success:
            judged = batch.validate(self._suite, result_format=_RESULT_FORMAT)
        results: Sequence[Any] = judged.results
        if len(results) != len(self._rules):
            raise ValidationStopped(
                f"{self.path}: {len(results)} answers to {len(self._rules)} expectations; "
                "does one stand twice? Nothing was sealed of this block"
            )
        return results

    def _stop_on_exception(self, result: Any, number: int) -> None:
        info = result.exception_info or {}
        # One flat record, or one a metric; a missing column shows only here, with no row named.
        entries = [info] if "raised_exception" in info else list(info.values())
        if any(entry.get("raised_exception") for entry in entries if isinstance(entry, dict)):
            # What the library says may hold content of a record, so it is not repeated.
            raise ValidationStopped(
                f"{_at(self.path, number, self._rules[number - 1])}: could not be evaluated; nothing was sealed of "
                "this block: mend the expectation or remove it, then `tidegate ingest` goes on where it stopped"
            )

    def _failed_rows(self, result: Any, number: int) -> tuple[int, ...] | None:
        rule = self._rules[number - 1]
        found = result.result.get("unexpected_index_list") or []
        rows = tuple(int(entry[_ROW]) for entry in found if isinstance(entry, dict) and _ROW in entry)
        if rule.decides is not True:
            return rows or None
        if not rows or len(rows) != result.result["unexpected_count"]:
            raise ValidationStopped(
                f"{_at(self.path, number, rule)}: failed without naming its rows; nothing was sealed of this block: "
                "set decides: alarm"
            )
        return rows


def _escaped(value: Any) -> Any:
    """The library puts values of records into its pages as they are; a record must not write the page."""
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list | tuple) else value


def _context(gx: Any) -> Any:
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    return context


def _definition(context: Any) -> Any:
    asset = context.data_sources.add_pandas("records").add_dataframe_asset("block")
    return asset.add_batch_definition_whole_dataframe("block")


def _great_expectations() -> Any:
    # It reports its use to its makers unless told not to before it is imported.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.CRITICAL)
    import great_expectations as gx
    import great_expectations.expectations.registry
    from great_expectations.execution_engine import pandas_execution_engine

    # Above this size of a frame it takes no fingerprint of the data, twice a batch: half of what judging records cost,
    # for a hash of private content that nobody asked for.
    pandas_execution_engine.HASH_THRESHOLD = 0
    return gx


def _frame(records: Sequence[Record]) -> Any:
    import pandas as pd

    # Objects, not Arrow strings: patterns then mean what Python's `re` says, and lengths are characters.
    columns: dict[str, Any] = {
        name: pd.Series([getattr(record, name) for record in records], dtype=object) for name in COLUMNS
    }
    return pd.DataFrame({_ROW: range(len(records)), **columns})
