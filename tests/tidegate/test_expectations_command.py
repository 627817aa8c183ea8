"""`tidegate expectations`: what a data owner sees of a suite, without a broker."""

import json
import stat

import pytest

from tests.ingest.blocks import record, seal
from tests.tidegate.desk import write_jsonl
from tidegate.cli import main
from tidegate.wiring import open_service

STREAM = "support-desk"


def row(number, **changes):
    return {
        "event_id": f"e{number}",
        "user_id": "u",
        "domain": "billing",
        "prompt": f"where is invoice {number}",
        "completion": "invoice copy",
        "label": "invoice_copy",
        **changes,
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("expectations") / "ws"
    main(["init", str(root)])
    return root


@pytest.fixture
def call(workspace, capsys):
    def run(*arguments):
        capsys.readouterr()
        code = 0
        try:
            main(["-w", str(workspace), "expectations", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_good_records_pass(call, tmp_path):
    file = write_jsonl(tmp_path / "r.jsonl", [row(i) for i in range(5)] * 2)
    code, out, _ = call("check", STREAM, file)
    assert code == 0
    assert "rows 10, would be rejected 0, alarms 0" in out
    assert "failing" not in out


def test_each_failing_row_is_named_by_line_with_its_reason(call, tmp_path):
    secret = "zanzibar"
    rows = [
        row(0),
        {"event_id": secret},
        row(2, prompt=f"{secret} kitchen"),
        row(3, completion=" "),
        row(4, label=None),
    ]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    file.write_text(f"\n{file.read_text()}{secret}\n")
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "schema_version: 1\nexpectations:\n"
        "- {type: expect_column_values_to_match_regex, kwargs: {column: completion, regex: '\\S'}, decides: true}\n"
        "- {type: expect_column_values_to_not_match_regex, kwargs: {column: prompt, regex: kitchen}, decides: true}\n"
        "- {type: expect_column_values_to_be_unique, kwargs: {column: user_id}, decides: alarm}\n"
        "- type: expect_column_unique_value_count_to_be_between\n"
        "  kwargs: {column: user_id, min_value: 2}\n"
        "  decides: alarm\n"
    )
    code, out, _ = call("check", STREAM, file, "--suite", suite, "--json")
    assert code == 1
    assert secret not in out
    report = json.loads(out)
    assert (report["rows"], report["rejected"], report["passed"]) == (6, 4, False)
    lines = {}
    for failure in report["failing"]:
        lines.setdefault(failure["line"], set()).add((failure["by"], failure["field"]))
    assert set(lines) == {3, 4, 5, 7}
    assert lines[4] == {("suite", "prompt")}
    assert lines[5] == {("suite", "completion")}
    assert lines[7] == {("contract", "")}
    assert ("contract", "prompt") in lines[3]
    found = [(e["number"], e["decides"], e["passed"], e["rows_failed"]) for e in report["expectations"]]
    assert found == [(1, True, False, 1), (2, True, False, 1), (3, "alarm", False, 4), (4, "alarm", False, None)]
    assert report["expectations"][1]["lines_failed"] == [4]

    code, out, _ = call("check", STREAM, file, "--suite", suite, "--limit", 2)
    assert code == 1
    assert secret not in out
    assert "rows 6, would be rejected 4, alarms 2" in out
    assert "failing rows, 2 of" in out
    _, out, _ = call("check", STREAM, file, "--suite", suite, "--content")
    assert f"{secret} kitchen" in out


def test_an_alarm_alone_is_a_failure_too(call, tmp_path):
    file = write_jsonl(tmp_path / "r.jsonl", [row(0), row(1)])
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "schema_version: 1\nexpectations:\n"
        "- {type: expect_column_values_to_be_unique, kwargs: {column: user_id}, decides: alarm}\n"
    )
    code, out, _ = call("check", STREAM, file, "--suite", suite)
    assert code == 1
    assert "rows 2, would be rejected 0, alarms 1" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["check", "nosuch", "r.jsonl"], 2, "stream=nosuch"),
        (["check", STREAM, "missing.jsonl"], 1, "missing.jsonl: No such file"),
        (["check", STREAM, "{ws}/params.yaml", "--suite", "{ws}/params.yaml"], 1, "params.yaml"),
        (["docs", "nosuch"], 2, "stream=nosuch"),
        (["docs", STREAM], 2, "no block with records yet"),
    ],
)
def test_wrong_input_gets_one_clear_line_and_a_code(call, workspace, arguments, code, says):
    found, out, err = call(*(text.replace("{ws}", str(workspace)) for text in arguments))
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1


def test_docs_are_built_of_the_newest_block(call, workspace):
    service = open_service(str(workspace))
    with service.repository().lane(STREAM, f"{STREAM}-0") as lane:
        head = seal(lane, lane.head(), [record(0)], 0)
        seal(lane, head, [record(1, prompt="x"), record(2, domain="kitchen")], 1)
        newest = lane.head().last.block_id
    code, out, _ = call("docs", STREAM, "--json")
    assert code == 0
    built = json.loads(out)
    assert (built["block"], built["records"]) == (newest, 2)
    index = workspace / "docs" / STREAM / "index.html"
    assert built["index"] == str(index)
    assert f"block {newest}, 2 records: 1 of 6 expectations failed" in index.read_text()
    assert stat.S_IMODE(index.parent.stat().st_mode) == 0o700
    assert not list((workspace / "run").glob("docs-*"))
    # A block in which nothing was accepted has nothing to show: the one before it stays the newest.
    with service.repository().lane(STREAM, f"{STREAM}-0") as lane:
        seal(lane, lane.head(), [], 3)
    assert json.loads(call("docs", STREAM, "--json")[1])["block"] == newest
