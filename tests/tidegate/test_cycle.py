"""What becomes of a round whose plan can no longer be carried out: closed, with its key gone, spent staying spent."""

import json
import os

import pytest

from ingest.record import Record, parse
from learner.plan import BlockAccount, plan_round
from privacy.errors import LedgerBehindReceipt
from tests.tidegate.desk import STREAM, make_desk
from tidegate import cycle
from tidegate.errors import RoundRefused


@pytest.fixture
def desk(tmp_path, tiny):
    return make_desk(tmp_path / "ws", tiny)


def planned(service, tiny):
    """A plan on disk, as a crash right after planning leaves it, for one registered block."""
    policy = service.policy(STREAM)
    frozen = policy.frozen(300)
    service.ledger.register_block(STREAM, f"{STREAM}-0-000000001", frozen)
    account = BlockAccount(f"{STREAM}-0-000000001", frozen, (0.0,) * len(policy.orders))
    plan = plan_round(
        round_id=f"{STREAM}-r0001",
        attempt=1,
        stream=STREAM,
        parent_sha256=None,
        base_sha256=tiny.sha256,
        data_revision=service.repository().pin(STREAM),
        new=[account],
        expected_batch=64,
        steps=4,
    )
    cycle._write(service.workspace.rounds(plan.round_id) / "plan.json", plan.as_json())
    return plan


def test_a_round_that_started_and_lost_its_key_is_charged_again_or_closed(desk, tiny):
    service = desk.service()
    plan = planned(service, tiny)
    service.ledger.reserve(STREAM, plan.round_id, 1, plan.plan_hash, plan.charges())
    service.ledger.start(plan.round_id, 1, plan.plan_hash)
    done = desk.run("round", STREAM, check=False)
    assert done.returncode == 1
    assert "cannot pay" in done.stderr, "one attempt is all that this policy lets a block pay for"
    ended = json.loads((service.workspace.rounds(plan.round_id) / "ended.json").read_text())
    assert ended["state"] == "abandoned"
    assert not list((service.workspace.root / "checkpoints").iterdir())
    assert [row.state for row in service.ledger.rows(STREAM)] == ["reserved", "started"]


def test_a_seed_is_refused_where_the_settings_do_not_allow_it(desk):
    service = desk.service()
    object.__setattr__(service.stream(STREAM).learner, "test_noise", False)
    with pytest.raises(RoundRefused, match=r"--test-noise=5: .*infinity for good; set .*learner.test_noise: true"):
        cycle.run(service, STREAM, test_seed=5)
    assert service.ledger.rows() == []
    assert not (service.workspace.root / "rounds" / f"{STREAM}-r0001").exists()


def test_an_older_ledger_refuses_a_round(desk, tiny):
    service = desk.service()
    receipt = service.signer("receipts").sign(
        {
            "plan_hash": "a" * 64,
            "adapter_sha256": "b" * 64,
            "ledger_head": "c" * 64,
            "guarantee": {"unit": "record", "adjacency": "add-remove one unit", "epsilon": 8.0, "delta": 1e-5},
        }
    )
    cycle._write(service.workspace.rounds("intents-r0009") / "receipt.json", receipt)
    with pytest.raises(LedgerBehindReceipt, match="older backup"):
        cycle.run(service, STREAM)


def test_what_would_keep_a_candidate_from_being_judged_is_found_before_anything_is_spent(desk):
    policy = {f"TIDEGATE__STREAMS__{STREAM.upper()}__EVALUATION__GATES": '[{metric: "my_team:nowhere", bound: 0.5}]'}
    no_metric = desk.run("round", STREAM, check=False, env={**os.environ, **policy})
    (desk.root / "gates" / f"{STREAM}.jsonl").unlink()
    no_gate_set = desk.run("round", STREAM, check=False)
    for done, says in ((no_metric, "metric=my_team:nowhere: cannot be imported"), (no_gate_set, "cannot be read")):
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert desk.service().ledger.rows(STREAM) == []
    assert not list((desk.root / "rounds").glob("*/plan.json"))


def test_two_rounds_of_a_stream_never_run_at_once(desk):
    service = desk.service()
    with cycle.only_round(service, STREAM):
        done = desk.run("round", STREAM, check=False)
    assert done.returncode == 1
    assert "a round runs already (pid" in done.stderr


def test_the_streams_limits_reject_what_was_not_declared(desk):
    limits = desk.service().limits(STREAM)
    good = {"schema_version": 1, "event_id": "e", "user_id": "u", "domain": "work", "prompt": "p", "completion": "c"}
    assert isinstance(parse(json.dumps(good).encode(), limits), Record)
    assert not isinstance(parse(json.dumps({**good, "domain": "astrology"}).encode(), limits), Record)
