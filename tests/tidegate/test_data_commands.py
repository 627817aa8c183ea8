"""`produce`, `dlq` and `block` as a user types them, on Apache Kafka: nothing is lost, and who looked is recorded."""

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from tidegate.cli import cli
from tidegate.wiring import open_service

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

STREAM = "support-desk"


@dataclass(frozen=True)
class Shop:
    """A workspace on a topic of its own."""

    root: Path

    def call(self, *arguments):
        return CliRunner().invoke(cli, ["-w", str(self.root), *map(str, arguments)])

    def says(self, *arguments):
        done = self.call(*arguments)
        assert done.exit_code == 0, f"{done.output} {done.exception!r}"
        return done.stdout

    def json(self, *arguments):
        return json.loads(self.says(*arguments, "--json"))

    def fails(self, *arguments):
        done = self.call(*arguments)
        assert done.exit_code != 0, done.output
        return f"{done.exception} {done.output}"

    def ingest(self):
        return open_service(str(self.root)).ingester(STREAM).run(threading.Event(), until_idle_s=0.3)

    def access(self):
        file = self.root / "access.log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def sealed(self):
        """Event ids in all blocks."""
        service = open_service(str(self.root))
        repo = service.repository()
        pinned = repo.checkout(repo.pin(STREAM), self.root / "run" / uuid.uuid4().hex)
        try:
            return sorted(
                record.event_id
                for manifest in repo.manifests(STREAM)
                for split in ("train", "holdout", "set_aside")
                for record in pinned.records(manifest, split=split)
            )
        finally:
            pinned.close()

    def jsonl(self, name, *rows):
        file = self.root / "run" / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file


def good(number, **changes):
    fields = {"event_id": f"e{number}", "user_id": f"u{number}", "domain": "billing", "prompt": f"question {number}"}
    return {"schema_version": 1, **fields, "completion": "invoice copy", "label": "invoice_copy", **changes}


@pytest.fixture
def shop(tmp_path, apache_kafka):
    root = tmp_path / "ws"
    assert CliRunner().invoke(cli, ["init", str(root)]).exit_code == 0
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["service"]["broker"]["bootstrap"] = apache_kafka.settings.bootstrap
    params["streams"][STREAM]["topic"] = f"t-{uuid.uuid4().hex[:12]}"
    params["streams"][STREAM]["ingest"]["block_seconds"] = 60
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return Shop(root)


@pytest.fixture
def rejected(shop):
    """Two good records and four bad ones, ingested; two of them with an undeclared domain."""
    rows = [good(1), good(2), good(3, domain="astrology"), good(4, domain="astrology", prompt=""), good(5, secret="x")]
    shop.says("produce", STREAM, shop.jsonl("first.jsonl", *rows, {"text": "p", **good(6, prompt=None)}))
    shop.ingest()
    return shop


def keys_of(shop, *codes):
    letters = shop.json("dlq", "list", STREAM)["letters"]
    return [letter["key"] for letter in letters if set(codes) & set(letter["codes"])]


def test_letters_are_listed_with_a_count_by_reason(rejected):
    found = rejected.json("dlq", "list", STREAM, "--limit", "3")
    assert found["total"] == 4
    assert found["by_code"] == {"undeclared_domain": 1, "unknown_key": 2, "empty": 1, "wrong_type": 1}
    assert len(found["letters"]) == 3
    only = rejected.json("dlq", "list", STREAM, "--reason", "unknown_key")
    assert (only["total"], len(only["letters"])) == (2, 2)
    assert all(letter["replayed"] is None and letter["rejected_at"].endswith("Z") for letter in only["letters"])
    assert "4 of 4 shown; by reason: " in rejected.says("dlq", "list", STREAM)


def test_content_is_shown_when_asked_and_that_is_recorded(rejected):
    (key,) = keys_of(rejected, "undeclared_domain")
    shown = rejected.says("dlq", "show", STREAM, key)
    assert "undeclared" not in shown.splitlines()[0]
    assert "astrology" not in shown
    assert rejected.access() == []
    facts = json.loads(rejected.says("dlq", "show", STREAM, key, "--content", "--json"))
    assert facts["value"] == good(3, domain="astrology")
    assert "astrology" in rejected.says("dlq", "show", STREAM, key, "--content")
    one, two = rejected.access()
    assert one["what"] == two["what"] == "dead letter content"
    assert one["keys"] == [key]
    assert one["who"]
    assert one["when"].endswith("Z")
    assert (rejected.root / "access.log").stat().st_mode & 0o077 == 0
    assert "astrology" not in (rejected.root / "access.log").read_text()
    said = rejected.fails("dlq", "show", STREAM, "t/x/0/99", "--content")
    assert "dead letter=t/x/0/99: not on topic" in said
    assert len(rejected.access()) == 2


def test_nothing_is_shown_that_cannot_be_recorded(rejected):
    (key,) = keys_of(rejected, "undeclared_domain")
    (rejected.root / "access.log").mkdir()
    said = rejected.fails("dlq", "show", STREAM, key, "--content")
    assert "access.log" in said
    assert "astrology" not in said


def test_mended_records_land_once_however_often_they_are_sent(rejected):
    trial = rejected.json(
        "dlq", "replay", STREAM, "--reason", "undeclared_domain", "--set", "domain=billing", "--dry-run"
    )
    assert len(trial["sent"]) == 1
    assert keys_of(rejected, "undeclared_domain") == trial["sent"]
    assert rejected.sealed() == ["e1", "e2"]
    done = rejected.json("dlq", "replay", STREAM, "--reason", "undeclared_domain", "--set", "domain=billing")
    assert (done["sent"], done["refused"]) == (trial["sent"], [])
    done = rejected.json("dlq", "replay", STREAM, "--reason", "undeclared_domain", "--set", "domain=billing")
    assert (done["sent"], done["replayed_before"]) == ([], trial["sent"]), "by reason it is left out"
    key = trial["sent"][0]
    done = rejected.json("dlq", "replay", STREAM, "--key", key, "--set", "domain=billing")
    assert done["sent"] == [key], "named, it is sent again"
    (block,) = rejected.ingest()
    assert (block.counts.sealed + block.counts.set_aside, block.counts.duplicate, block.counts.rejected) == (1, 1, 0)
    assert rejected.sealed() == ["e1", "e2", "e3"]
    letters = {letter["key"]: letter for letter in rejected.json("dlq", "list", STREAM)["letters"]}
    assert len(letters) == 4, "the letters stay"
    assert [k for k, letter in letters.items() if letter["replayed"]] == [key]


def test_what_the_contract_still_refuses_is_not_sent(rejected):
    done = rejected.json(
        "dlq", "replay", STREAM, "--reason", "unknown_key", "--drop", "secret", "--field", "text=prompt"
    )
    assert len(done["sent"]) == 1
    (refused,) = done["refused"]
    assert refused["reasons"] == ["renaming: two fields become prompt; mend the field map"]
    again = ["dlq", "replay", STREAM, "--key", refused["key"]]
    assert "still refuses" in rejected.says(*again, "--drop", "text")
    assert json.loads(rejected.says(*again, "--drop", "text", "--set", "prompt=p", "--json"))["sent"] == [
        refused["key"]
    ]
    rejected.ingest()
    assert rejected.sealed() == ["e1", "e2", "e5", "e6"]
    assert "choose records" in rejected.fails("dlq", "replay", STREAM)
    assert "not in the contract" in rejected.fails("dlq", "replay", STREAM, "--reason", "x", "--set", "color=red")
    assert "not on topic" in rejected.fails("dlq", "replay", STREAM, "--key", "nosuch")


def test_an_edited_export_is_sent(rejected):
    keys = keys_of(rejected, "empty", "undeclared_domain")
    exported = rejected.says("dlq", "show", STREAM, *keys, "--content", "--json").splitlines()
    rows = [json.loads(line) for line in exported]
    assert len(rows) == 2
    for row in rows:
        row["value"] = {**row["value"], "domain": "account", "prompt": row["value"]["prompt"] or "mended"}
    edited = rejected.jsonl("edited.jsonl", *rows)
    assert sorted(rejected.json("dlq", "replay", STREAM, "--edit", edited)["sent"]) == sorted(keys)
    rejected.ingest()
    assert rejected.sealed() == ["e1", "e2", "e3", "e4"]
    for wrong in ({"key": 1, "value": {}}, {"key": "k"}, [1]):
        said = rejected.fails("dlq", "replay", STREAM, "--edit", rejected.jsonl("bad.jsonl", wrong))
        assert "bad.jsonl: line 1: must be" in said
    said = rejected.fails("dlq", "replay", STREAM, "--edit", rejected.jsonl("bad.jsonl", rows[0], rows[0]))
    assert "line 2" in said
    assert "stands twice" in said


def test_bytes_too_large_for_the_topic_come_from_the_data_repository(shop):
    huge = good(1, prompt="x" * 1_044_000)
    shop.says("produce", STREAM, shop.jsonl("huge.jsonl", huge, good(2)))
    (manifest,) = shop.ingest()
    (key,) = keys_of(shop, "too_long")
    facts = json.loads(shop.says("dlq", "show", STREAM, key, "--json"))
    assert facts["reference"].endswith("rejects.parquet")
    assert facts["bytes"] is None
    facts = json.loads(shop.says("dlq", "show", STREAM, key, "--content", "--json"))
    assert facts["value"] == huge
    done = shop.json("dlq", "replay", STREAM, "--key", key, "--set", "prompt=short")
    assert done["sent"] == [key]
    found = shop.json("block", manifest.block_id, "--content", "--split", "rejects")
    assert json.loads(found["rows"][0]["value"]) == huge
    assert shop.json("dlq", "expire", STREAM, "--older-than", "0m")["kept_in_data_repository"] == 1
    shop.ingest()
    assert shop.sealed() == ["e1", "e2"]


def test_old_letters_are_counted_first_and_deleted_on_demand(rejected):
    assert rejected.json("dlq", "expire", STREAM, "--before", "2020-01-01")["letters"] == 0
    assert rejected.json("dlq", "expire", STREAM, "--older-than", "30d", "--yes")["letters"] == 0
    said = rejected.says("dlq", "expire", STREAM, "--older-than", "0m")
    assert "would delete 4 letters" in said
    assert "give --yes" in said
    assert rejected.json("dlq", "list", STREAM)["total"] == 4
    assert "deleted 4 letters" in rejected.says("dlq", "expire", STREAM, "--older-than", "0m", "--yes")
    assert rejected.json("dlq", "list", STREAM) == {"stream": STREAM, "total": 0, "by_code": {}, "letters": []}
    assert rejected.access()[-1]["what"] == "dead letters deleted"
    for wrong in (
        [],
        ["--older-than", "3 weeks"],
        ["--before", "soon"],
        ["--before", "2020-01-01", "--older-than", "1d"],
    ):
        assert "Usage" in rejected.fails("dlq", "expire", STREAM, *wrong)


def test_a_block_tells_its_facts_and_shows_rows_on_the_record(rejected):
    (manifest,) = open_service(str(rejected.root)).repository().manifests(STREAM)
    facts = rejected.json("block", manifest.block_id)
    assert facts["counts"] == {"in": 6, "sealed": 2, "rejected": 4, "duplicate": 0, "set_aside": 0}
    assert facts["offsets"] == [{"partition": 0, "start": 0, "end": 6}]
    assert facts["policy"]["unit"] == "record"
    assert all(file["verified"] for file in facts["files"])
    git = ["git", "--git-dir", str(rejected.root / "data" / ".git"), "show", "-s", "--format=%s"]
    subject = subprocess.run([*git, facts["sealed_by_commit"]], capture_output=True, text=True, check=True).stdout
    assert manifest.block_id in subject
    assert "rows" not in facts
    assert rejected.access() == []
    shown = rejected.says("block", manifest.block_id)
    assert "6 in = 2 sealed + 4 rejected" in shown
    rows = rejected.json("block", manifest.block_id, "--content", "--limit", "1")["rows"]
    assert [row["record"]["event_id"] for row in rows] in (["e1"], ["e2"])
    assert rejected.access()[0]["what"] == "block content"
    near = f"{manifest.block_id[:-1]}7"
    assert f"block={near}: no such block among 1; near it: {manifest.block_id}" in rejected.fails("block", near)
    assert "list them by `tidegate blocks STREAM`" in rejected.fails("block", "x")
    assert "--content" in rejected.fails("block", manifest.block_id, "--split", "train")


def test_a_block_whose_file_changed_says_so(rejected):
    (manifest,) = open_service(str(rejected.root)).repository().manifests(STREAM)
    digest = manifest.files[0].sha256
    for file in [path for path in rejected.root.rglob("*") if path.is_file()]:
        if hashlib.sha256(file.read_bytes()).hexdigest() == digest:
            file.chmod(0o644)
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = rejected.call("block", manifest.block_id, "--json")
    assert done.exit_code == 1
    (wrong,) = [file for file in json.loads(done.stdout)["files"] if file["sha256"] == digest]
    assert not wrong["verified"]
    assert wrong["wrong"]


def _child(shop, *arguments):
    command = [sys.executable, "-m", "tidegate", "-w", str(shop.root), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_says_how_to_go_on_and_going_on_sends_the_rest(shop):
    table = pa.table({"n": [good(i)["event_id"] for i in range(400)], "domain": ["billing"] * 400})
    table = table.append_column("user_id", pa.array(["u"] * 400)).append_column("prompt", pa.array(["p"] * 400))
    file = shop.root / "run" / "it's large.parquet"
    pq.write_table(table.append_column("completion", pa.array(["invoice copy"] * 400)), file)
    child = _child(shop, "produce", STREAM, file, "--field", "n=event_id", "--rate", "100")
    progress = shop.root / "run" / "produce"
    end = time.monotonic() + 30
    while not (progress.exists() and list(progress.glob("*.json"))):
        assert time.monotonic() < end
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert "stopped; " in errors
    assert "Traceback" not in errors
    command = shlex.split(errors.splitlines()[-1].split("go on with: ")[1])
    assert command[0] == "tidegate"
    assert command[-1] == "--resume"
    done = CliRunner().invoke(cli, [word for word in command[1:] if word not in {"--rate", "100"}])
    assert done.exit_code == 0, done.output
    sent_before = int(done.output.split("behind ")[1].split()[0])
    assert 0 < sent_before < 400
    assert f"sent {400 - sent_before} records" in done.output
    (block,) = shop.ingest()
    assert block.counts.duplicate == 0, "nothing was sent twice"
    assert len(shop.sealed()) == 400
    assert "nothing to send: all 400" in CliRunner().invoke(cli, command[1:]).output


def test_refused_formats_and_large_records_on_the_command_line(shop):
    for name in ("a.avro", "a.proto"):
        file = shop.root / "run" / name
        file.write_bytes(b"Obj\x01")
        assert "which Tidegate does not read" in shop.fails("produce", STREAM, file)
    file = shop.jsonl("large.jsonl", good(1), good(2, prompt="x" * 2_000_000), good(3))
    said = shop.fails("produce", STREAM, file)
    assert "to leave it out: tidegate -w" in said
    assert "--resume --skip-large" in said
    found = shop.json("produce", STREAM, file, "--resume", "--skip-large")
    assert (found["records_sent"], found["records_sent_before"], found["too_large"]) == (1, 1, [f"{file}:2"])
