"""A private gate on the real engine: two rounds judged on the stream's own holdout, charged, and what leaves of it."""

import json
import re

import pytest
import yaml

from tests.tidegate.desk import STREAM, make_desk, stream_rows, write_jsonl

pytestmark = [
    pytest.mark.slow,  # a whole service and two rounds
    # peft warns of what transformers 5 renamed.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EVALUATIONS = 2
GATES = [
    {"metric": "accuracy", "data": "private", "bound": 0.2},
    {"metric": "accuracy", "against": "live", "must": "beat", "data": "private", "hard": False},
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny):
    made = make_desk(tmp_path_factory.mktemp("private") / "ws", tiny)
    params = yaml.safe_load((made.root / "params.yaml").read_text())
    stream = params["streams"][STREAM]
    stream["privacy"] |= {"holdout_share": 0.3, "holdout_epsilon": 20.0, "holdout_evaluations": EVALUATIONS}
    stream["evaluation"]["gates"] += GATES
    (made.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return made


@pytest.fixture(scope="module", autouse=True)
def running(desk):
    from tidegate.up import start_all

    supervisor = start_all(desk.service(), lambda _line: None, learn=False)
    yield supervisor
    supervisor.stop()


def stream_in(desk, name, rows):
    before = desk.sealed()
    desk.run("produce", STREAM, str(write_jsonl(desk.root / "run" / f"{name}.jsonl", rows)))
    desk.wait(lambda: desk.sealed() >= before + len(rows), what="sealing")


def judged(desk, end):
    """The version's private gates by name, and everything that left of it, as text."""
    version = next(v for v in desk.service().store.versions(STREAM) if v.version == end["version"])
    verdict = json.loads(version.tag("verdict"))
    told = json.dumps(version.tags) + version.description
    return {gate["name"]: gate for gate in verdict["gates"] if gate["data"] == "private"}, told


def held_out(desk):
    """How many records every holdout has: a number that must not leave."""
    service = desk.service()
    repo = service.repository()
    pinned = repo.checkout(repo.pin(STREAM), desk.root / "run" / "look")
    return sum(len(pinned.records(m, split="holdout")) for m in repo.manifests(STREAM))


def states(desk):
    return [(r.round_id, r.state) for r in desk.service().ledger.rows(STREAM) if r.account == "holdout"]


def test_the_first_candidate_is_judged_on_holdouts_that_paid(desk):
    stream_in(desk, "first", stream_rows())
    end = desk.json("round", STREAM)
    assert (end["outcome"], end["state"], end["version"]) == ("passed", "candidate", 1), end
    gates, told = judged(desk, end)
    (gate,) = gates.values()
    assert (gate["name"], gate["outcome"], gate["charge_id"]) == (
        "private_accuracy",
        "passed",
        f"{end['round_id']}-holdout",
    )
    assert 0.2 < gate["value"] <= 1.1
    assert gate["se"] > 0
    assert states(desk) == [(gate["charge_id"], state) for state in ("reserved", "started", "committed")]
    assert f"{EVALUATIONS - 1} more such evaluations can be paid" in told
    assert not list((desk.root / "checkpoints").rglob("*.key"))
    assert gate["n"] == pytest.approx(held_out(desk), abs=60)


def test_against_live_the_next_one_is_judged_in_pairs_and_charged_again(desk):
    desk.run("approve", STREAM, "1", "--why", "reads well")
    stream_in(desk, "second", stream_rows(offset=500))
    end = desk.json("round", STREAM)
    gates, told = judged(desk, end)
    assert set(gates) == {"private_accuracy", "private_accuracy_beats_live"}, end
    assert {gate["charge_id"] for gate in gates.values()} == {f"{end['round_id']}-holdout"}
    assert gates["private_accuracy_beats_live"]["hard"] is False
    votes = re.search(r"\*\*all together\*\* \| (\d+) ± (\d+) \|", told)
    assert int(votes[1]) == pytest.approx(held_out(desk), abs=5 * int(votes[2]))
    report = {b["block"]: b for b in desk.json("audit")["streams"][STREAM]["blocks"]}
    reads = [block["holdout_reads"] for block in report.values()]
    assert [end["round_id"] + "-holdout"] in reads, "blocks of the second part paid once"
    assert max(len(read) for read in reads) == EVALUATIONS
    assert all(0 < block["holdout_share_used"] <= 1 for block in report.values())
    assert desk.service().ledger.verify_chain() == 12


def test_an_export_with_private_evaluations_verifies(desk, tmp_path):
    head = desk.json("audit", "--export", str(tmp_path / "sent"))["ledger_head"]
    keys = [f"--key={p}={desk.root / 'keys' / p}.pub" for p in ("receipts", "verdicts", "approvals")]
    done = desk.run("audit", "--verify", str(tmp_path / "sent"), *keys, "--expect-head", head)
    assert "rounds: 2 committed, each with one signed receipt" in done.stdout
