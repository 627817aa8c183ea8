"""The record's path on Apache Kafka, by the commands a user types: topic to answer, back, and the proof of it.

The tests run in order and share one service, as its users do.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.tidegate.desk import STREAM, make_desk, stream_rows, write_jsonl

pytestmark = [
    # peft warns of what transformers 5 renamed.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny, apache_kafka):
    return make_desk(tmp_path_factory.mktemp("path") / "ws", tiny, apache_kafka.settings.bootstrap)


@pytest.fixture(scope="module", autouse=True)
def running(desk):
    from tidegate.up import start_all

    supervisor = start_all(desk.service(), lambda _line: None, learn=False)
    yield supervisor
    supervisor.stop()
    assert not [part.name for part in supervisor.parts if part.running]


@pytest.fixture(scope="module")
def openai_client(desk):
    from openai import OpenAI

    with OpenAI(base_url=f"{desk.service().api_uri}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, prompt="what is my balance", **options):
    reply = client.chat.completions.with_raw_response.create(
        model=STREAM, messages=[{"role": "user", "content": prompt}], max_tokens=4, temperature=0, **options
    )
    return reply.headers["x-tidegate-version"], reply.parse()


def offsets_of(desk):
    service = desk.service()
    repo = service.repository()
    pinned = repo.checkout(repo.pin(STREAM), desk.root / "run" / "look")
    seen = []
    for manifest in repo.manifests(STREAM):
        for split in ("train", "holdout", "set_aside"):
            seen += [record.event_id for record in pinned.records(manifest, split=split)]
    return seen


def test_records_end_up_in_exactly_one_block(desk):
    rows = stream_rows()
    bad = [{**rows[0], "domain": "astrology"}, {k: v for k, v in rows[1].items() if k != "prompt"}]
    file = write_jsonl(desk.root / "run" / "first.jsonl", rows + bad)
    assert desk.json("produce", STREAM, str(file))["records_sent"] == len(rows) + 2
    desk.wait(lambda: desk.sealed() == len(rows) + 2, what="sealing")
    seen = offsets_of(desk)
    assert sorted(seen) == sorted(row["event_id"] for row in rows)
    assert len(set(seen)) == len(seen)
    reasons = [" ".join(letter["reasons"]) for letter in desk.json("dlq", "list", STREAM)["letters"]]
    assert len(reasons) == 2
    assert any("domain" in reason for reason in reasons)
    assert any("prompt" in reason for reason in reasons)


def test_prometheus_sees_ingest(desk):
    import urllib.request

    port = desk.service().stream(STREAM).ingest.metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    for name in ("accepted", "rejected", "duplicates", "messages", "bytes", "blocks", "alarms", "seal_seconds", "lag"):
        assert f"tidegate_ingest_{name}" in text
    assert f'tidegate_ingest_messages_total{{stream="{STREAM}"}} {len(stream_rows()) + 2:.1f}' in text


def test_a_round_becomes_a_candidate_with_its_evidence(desk):
    end = desk.json("round", STREAM)
    assert (end["outcome"], end["state"], end["version"]) == ("passed", "candidate", 1), end
    folder = desk.root / "rounds" / end["round_id"]
    assert {p.name for p in folder.iterdir()} >= {"plan.json", "receipt.json", "ended.json"}
    version = desk.service().store.versions(STREAM)[0]
    assert version.stage == "Staging"
    assert "passed" in version.description
    assert "nothing to forget yet" in version.description
    (listed,) = desk.json("versions", STREAM)
    assert (listed["backward_transfer"], listed["forgetting"]) == (None, {})
    assert 0 < listed["average_accuracy"] <= 1
    audit = desk.json("audit")["streams"][STREAM]
    assert all(block["rounds"] == [end["round_id"]] for block in audit["blocks"])
    assert all(0 < block["share_used"] <= 1 for block in audit["blocks"])


def test_a_waiting_candidate_holds_the_schedule(desk):
    done = desk.run("round", STREAM)
    assert "version 1 waits for approval" in done.stdout


def test_the_adapter_is_pefts_own(desk, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = desk.service().store.fetch_adapter(STREAM, 1, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.path), folder)
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_approval_swaps_under_load_without_a_lost_or_mixed_answer(desk, openai_client):
    from tidegate.status import serving_state

    pid = serving_state(desk.service())["pid"]
    assert ask(openai_client)[0] == f"{STREAM}@base"
    failed, versions, stop = [], [], threading.Event()

    def client():
        while not stop.is_set():
            try:
                header, reply = ask(openai_client)
                body = reply.model_extra["tidegate"]["version"]
                versions.append(header if header == body else f"mixed: {header} {body}")
            except Exception as error:  # noqa: BLE001 - any failure is what the test looks for
                failed.append(repr(error))

    clients = [threading.Thread(target=client) for _ in range(3)]
    for one in clients:
        one.start()
    desk.run("approve", STREAM, "1", "--why", "reads well")
    desk.wait(lambda: desk.live() == f"{STREAM}@1", what="swap")
    time.sleep(1)
    stop.set()
    for one in clients:
        one.join()
    assert not failed
    assert set(versions) == {f"{STREAM}@base", f"{STREAM}@1"}
    assert serving_state(desk.service())["pid"] == pid
    desk.wait(lambda: desk.service().store.versions(STREAM)[0].aliases == ("live",), what="acknowledgement")


def test_openai_streaming_works_unchanged(openai_client):
    whole = ask(openai_client)[1].choices[0].message.content
    pieces = openai_client.chat.completions.create(
        model=STREAM,
        messages=[{"role": "user", "content": "what is my balance"}],
        max_tokens=4,
        temperature=0,
        stream=True,
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole
    assert [model.id for model in openai_client.models.list()] == [STREAM]


def test_an_answer_leads_back_to_offsets(desk, openai_client):
    answer = ask(openai_client)[1]
    found = desk.json("lineage", answer.id)
    assert (found["stream"], found["version"]) == (STREAM, 1)
    covered = [block["offsets"] for block in found["ancestry"][0]["blocks"]]
    assert covered[0].startswith(f"{STREAM}/0: 0-")
    forged = answer.id[:-3] + ("AAA" if answer.id[-3:] != "AAA" else "BBB")
    assert desk.run("lineage", forged, check=False).returncode == 1


def test_nothing_new_is_no_error(desk):
    assert "nothing new since version 1" in desk.run("round", STREAM).stdout


def test_a_killed_round_resumes_and_is_charged_once(desk):
    file = write_jsonl(desk.root / "run" / "second.jsonl", stream_rows(offset=500))
    before = desk.sealed()
    desk.run("produce", STREAM, str(file))
    desk.wait(lambda: desk.sealed() > before + 500, what="sealing")
    child = subprocess.Popen(
        [sys.executable, "-m", "tidegate", "-w", str(desk.root), "round", STREAM, "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = desk.root / "checkpoints"
    desk.wait(lambda: list(checkpoints.glob("*/steps/*")) or child.poll() is not None, what="a checkpoint")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    rows = [(r.round_id, r.state) for r in desk.service().ledger.rows(STREAM)]
    end = desk.json("round", STREAM)
    assert end["attempt"] == 1
    after = [(r.round_id, r.state) for r in desk.service().ledger.rows(STREAM)]
    assert after[: len(rows)] == rows
    assert [state for round_id, state in after if round_id == end["round_id"]] == ["reserved", "started", "committed"]
    assert not list(checkpoints.iterdir()), "the key and the checkpoints are gone"
    assert end["version"] == 2


def test_a_second_version_lives_and_is_rolled_back(desk, openai_client):
    assert desk.service().store.versions(STREAM)[0].stage == "Staging"
    desk.run("approve", STREAM, "2", "--why", "newer")
    desk.wait(lambda: desk.live() == f"{STREAM}@2", what="swap")
    desk.run("rollback", STREAM, "--why", "complaints")
    desk.wait(lambda: desk.live() == f"{STREAM}@1", what="rollback")
    assert ask(openai_client)[0] == f"{STREAM}@1"
    history = desk.json("history", STREAM)
    assert [(row["kind"], row["version"], row["why"]) for row in history] == [
        ("promote", 1, "reads well"),
        ("promote", 2, "newer"),
        ("rollback", 1, "complaints"),
    ]
    stages = {v.version: v.stage for v in desk.service().store.versions(STREAM)}
    assert stages == {1: "Production", 2: "Archived"}


def test_the_gates_can_be_read_and_run_on_any_version_and_nothing_changes(desk):
    told = desk.json("gates", "explain", STREAM)
    assert [gate["gate"] for gate in told["gates"]][-6:] == [
        "accuracy",
        "better_than_base",
        "forgetting",
        "better_than_live",
        "macro_f1",
        "format",
    ]
    before = desk.service().store.versions(STREAM)
    page = desk.root / "evaluated.html"
    again = desk.json("evaluate", STREAM, "2", "--out", str(page))
    for part in (f'"{again["outcome"]}"', "Examples", f"{STREAM}-r0002"):
        assert part in page.read_text(encoding="utf-8")
    assert desk.service().store.versions(STREAM) == before
    verdict = json.loads(next(v for v in before if v.version == 2).tag("verdict"))
    for name in ("gates", "outcome", "reasons", "not_measured", "policy_sha256"):
        assert again[name] == verdict[name], "judged again against the same live version it is the same to the digit"
    assert again["live"] == 1
    assert desk.run("evaluate", STREAM, "9", check=False).returncode == 1


def test_status_and_versions_tell_it(desk):
    told = desk.run("status", "--json", check=False)
    report = json.loads(told.stdout)
    row = report["streams"][0]
    # One attempt and a replay have all but used up these blocks: that is an alarm, and nothing else is.
    assert told.returncode == 1
    assert [alarm.partition(":")[0] for alarm in report["alarms"]] == [STREAM] * 2
    assert "of the median block's filter is used" in report["alarms"][0]
    assert "can be replayed in" in report["alarms"][1]
    assert (row["claim"], row["rounds"]) == ("epsilon 50, delta 1e-05 per record, for life", 2)
    assert (row["answers_with"], row["wanted"], row["waiting"]) == (f"{STREAM}@1", "1", "none")
    assert [v["verdict"] for v in desk.json("versions", STREAM)] == ["passed", "passed"]


def test_dvc_repro_verifies_the_private_round(desk, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(desk.root / "data"), str(clone)], check=True)
    environment = {
        **os.environ,
        "TIDEGATE_WORKSPACE": str(desk.root),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "DVC_NO_ANALYTICS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
    named = json.loads((clone / "round.json").read_text())
    from learner.adapter import adapter_sha256

    assert adapter_sha256(clone / "outputs" / "adapter") == named["adapter_sha256"]
    assert (clone / "outputs" / "accuracy.csv").read_text().startswith("domain,accuracy")
    stored = desk.root / "adapters" / named["adapter_sha256"] / "adapter_model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = desk.run("reproduce", "round.json", cwd=clone, check=False)
        assert done.returncode == 1
        assert "adapter_sha256=" in done.stderr
        assert "this is not what the round recorded" in done.stderr
    finally:
        stored.write_bytes(whole)


def test_test_noise_is_rebuilt_bit_for_bit_and_never_promoted(desk, tmp_path):
    # After the rollback the second round's blocks are new again, but their one attempt is spent.
    refused = desk.run("round", STREAM, check=False)
    assert refused.returncode == 1
    assert "(new in 1 rounds) cannot pay for being new again" in refused.stderr
    before = desk.sealed()
    file = write_jsonl(desk.root / "run" / "third.jsonl", stream_rows(offset=1000)[:300])
    desk.run("produce", STREAM, str(file))
    desk.wait(lambda: desk.sealed() >= before + 300, what="sealing")
    end = desk.json("round", STREAM, "--test-noise", "5")
    assert end["state"] == "failed"
    assert "test noise" in " ".join(end["reasons"])
    done = desk.run("approve", STREAM, str(end["version"]), "--why", "try", check=False)
    assert done.returncode == 1
    assert "cannot go to Production" in done.stderr
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(desk.root / "data"), str(clone)], check=True)
    done = desk.run("reproduce", "round.json", cwd=clone)
    assert "bit for bit the same" in done.stdout
    assert end["adapter_sha256"] in done.stdout
    assert desk.json("audit")["streams"][STREAM]["epsilon"] is None


def test_an_auditor_verifies_an_export_elsewhere(desk, tmp_path):
    head = desk.json("audit", "--export", str(tmp_path / "sent"))["ledger_head"]
    keys = [f"--key={p}={desk.root / 'keys' / p}.pub" for p in ("receipts", "verdicts", "approvals")]
    command = [sys.executable, "-m", "tidegate", "audit", "--verify", "sent", *keys, "--expect-head", head]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rounds: 3 committed, each with one signed receipt" in done.stdout
    assert "approvals: 3 signed and chained" in done.stdout
    assert "heads in 3 receipts and 3 commits, and 1 of --expect-head" in done.stdout
    rows = tmp_path / "sent" / "ledger" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_an_emergency_rollback_needs_no_registry(desk, running, openai_client):
    from tidegate.up import listens

    registry = next(part.process for part in running.parts if part.name == "mlflow")
    registry.kill()
    registry.wait()
    address = desk.service().mlflow_uri.removeprefix("http://")
    desk.wait(lambda: not listens(address), what="the registry's end")
    assert ask(openai_client)[0] == f"{STREAM}@1", "serving goes on without the registry"
    refused = desk.run("rollback", STREAM, "--to", "2", "--why", "complaints", check=False)
    assert refused.returncode == 1
    assert "cannot be reached" in refused.stderr
    done = desk.run("rollback", STREAM, "--to", "2", "--why", "registry is down", "--emergency")
    assert "emergency approval" in done.stdout
    desk.wait(lambda: desk.live() == f"{STREAM}@2", what="emergency rollback")
    assert ask(openai_client)[0] == f"{STREAM}@2"
    assert desk.json("history", STREAM)[-1]["kind"] == "emergency"
    told = desk.run("status", "--json", check=False)
    assert told.returncode == 1
    assert any("mlflow" in alarm for alarm in json.loads(told.stdout)["alarms"])
