"""The committed example data is what the generator writes, and is as its README says."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ingest.record import Record, RecordLimits, parse
from tidegate.config import load

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
STREAM = EXAMPLES / "support-desk.jsonl"
GATES = EXAMPLES / "support-desk-gates.jsonl"


@pytest.fixture(scope="module")
def limits():
    ingest = load(ROOT / "params.yaml", environ={}).settings.streams["support-desk"].ingest
    return RecordLimits(
        frozenset(ingest.domains), frozenset(ingest.labels), ingest.prompt_chars_max, ingest.completion_chars_max
    )


@pytest.fixture(scope="module")
def parsed(limits):
    return [parse(line, limits) for line in STREAM.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def gates(limits):
    records = [parse(line, limits) for line in GATES.read_bytes().splitlines()]
    assert all(isinstance(record, Record) for record in records)
    return records


def test_generator_reproduces_the_committed_files(tmp_path):
    subprocess.run([sys.executable, EXAMPLES / "make_support_desk.py", "--out", tmp_path], check=True, cwd=tmp_path)
    for file in (STREAM, GATES):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
        assert file.stat().st_size < 1_500_000


def test_stream_is_labelled_in_words_and_three_percent_is_bad(parsed):
    good = [record for record in parsed if isinstance(record, Record)]
    assert len(parsed) == 5000
    assert all(record.completion == record.label.replace("_", " ") for record in good)
    assert all(4 <= len(record.prompt.split()) <= 20 for record in good)
    ids = collections.Counter(record.event_id for record in good)
    bad = len(parsed) - len(ids)
    assert 0.025 < bad / len(parsed) < 0.035


def test_bad_lines_are_of_many_kinds_and_start_early(parsed):
    def codes(some):
        return {reason.code for record in some if not isinstance(record, Record) for reason in record}

    assert codes(parsed) == codes(parsed[:200])
    assert codes(parsed) >= {
        "missing",
        "wrong_type",
        "unknown_key",
        "undeclared_domain",
        "undeclared_label",
        "too_long",
        "not_json",
        "not_utf8",
        "empty",
        "bad_time",
        "schema_version",
    }
    early = [record for record in parsed[:200] if isinstance(record, Record)]
    contents = collections.defaultdict(list)
    for record in early:
        contents[record.event_id].append(record)
    twice = [records for records in contents.values() if len(records) == 2]
    assert sorted(first == second for first, second in twice) == [False, True]
    assert all(first.user_id == second.user_id for first, second in twice)


def test_account_domain_grows_after_the_first_three_thousand(parsed):
    def account_share(some):
        domains = [record.domain for record in some if isinstance(record, Record)]
        return domains.count("account") / len(domains)

    assert 0.09 < account_share(parsed[:3000]) < 0.15
    assert account_share(parsed[3000:]) > 0.4


def test_gates_are_balanced_and_share_no_prompt_with_the_stream(gates):
    labels = collections.Counter(record.label for record in gates)
    assert len(labels) == 12
    assert set(labels.values()) == {40}
    streamed = {json.loads(line)["prompt"] for line in STREAM.read_bytes().splitlines() if _has_text(line)}
    assert not {record.prompt.casefold() for record in gates} & {prompt.casefold() for prompt in streamed}


def _has_text(line):
    try:
        return isinstance(json.loads(line)["prompt"], str)
    except ValueError:
        return False


def test_readme_counts_are_true(parsed, gates):
    good = {record.event_id: record for record in parsed if isinstance(record, Record)}
    counts = collections.Counter(record.label for record in good.values())
    first = collections.Counter(
        record.label
        for record in {record.event_id: record for record in parsed[:3000] if isinstance(record, Record)}.values()
    )
    readme = (EXAMPLES / "README.md").read_text()
    for record in gates:
        before, label = first[record.label], record.label
        assert f"| {record.domain} | `{label}` | {before} | {counts[label] - before} | 40 |" in readme
