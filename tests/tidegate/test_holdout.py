"""A private evaluation is charged for what it read, resumes exactly or is charged again, and has a stated end."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from evaluation.gateset import GateSet
from evaluation.private import slices_of
from ingest.record import Record
from learner.plan import BlockAccount, plan_round
from privacy.audit import audit
from privacy.errors import LedgerError
from privacy.ledger import Charge, Ledger
from privacy.randomness import RoundKey
from tests.tidegate.streams import STREAM, seal, workspace
from tidegate import holdout
from tidegate.budget import evaluation_sigma
from tidegate.planning import next_round_id, register_blocks

EVALUATIONS = 3
DOMAIN = "billing"
LABELS = ("refund_status", "double_charge")
CANDIDATE, LIVE = "c" * 64, "d" * 64
NAME = f"{STREAM}-r0001-holdout"


@dataclass
class Trained:
    """What scoring needs of a committed round."""

    plan: object
    adapter_sha256: str = CANDIDATE


class Scores:
    """Knows the truth, which stands in the prompt; `live` is wrong about every fifth record."""

    def __init__(self, before=None):
        self.calls, self.before = [], before or (lambda: None)

    def score_labels(self, adapter, prompts, labels):
        self.calls.append((adapter, len(prompts)))
        if len(prompts) > 1:
            self.before()
        scores = np.zeros((len(prompts), len(labels)))
        for row, prompt in enumerate(prompts):
            if prompt == "unreadable":
                raise ValueError("too long: my secret is 1234")
            number, truth = prompt.split(" ", 1)
            wrong = adapter == "live" and int(number) % 5 == 0
            scores[row, labels.index(truth)] = -1.0 if wrong else 1.0
        return scores


def records(count, start=0, users=None):
    return [
        Record(
            schema_version=1,
            event_id=f"e{number}",
            user_id=f"u{number % users if users else number}",
            domain=DOMAIN,
            prompt=f"{number} {LABELS[number % 2].replace('_', ' ')}",
            completion=LABELS[number % 2].replace("_", " "),
            label=LABELS[number % 2],
        )
        for number in range(start, start + count)
    ]


@pytest.fixture
def gate_set(tmp_path):
    lines = [
        {"event_id": f"g{i}", "domain": DOMAIN, "prompt": f"{i} {label.replace('_', ' ')}", "label": label}
        | {"completion": label.replace("_", " ")}
        for i, label in enumerate(LABELS)
    ]
    file = tmp_path / "gates.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return GateSet.load(file)


@pytest.fixture
def made(tmp_path):
    def make(blocks=2, held=400, **privacy):
        settings = {"holdout_evaluations": EVALUATIONS, "holdout_epsilon": 8.0, **privacy}
        service = workspace(tmp_path / "ws", privacy=settings, ingest={"domains": [DOMAIN]})
        for number in range(1, blocks + 1):
            add(service, number, held)
        return service

    return make


def add(service, number, held=400):
    block = seal(service, number)
    service.made["records"][block, "holdout"] = records(held, start=number * 100_000)
    register_blocks(service, STREAM, "0" * 40)
    return block


def trained(service, round_id=f"{STREAM}-r0001", sha=CANDIDATE):
    policy = service.policy(STREAM)
    block = BlockAccount("b", policy.frozen(500), (0.0,) * len(policy.orders))
    plan = plan_round(
        round_id=round_id,
        attempt=1,
        stream=STREAM,
        parent_sha256=LIVE,
        base_sha256="b" * 64,
        data_revision="0" * 40,
        new=[block],
    )
    return Trained(plan, sha)


def score(service, gate_set, scorer=None, of=None, **options):
    return holdout.score(service, of or trained(service), scorer or Scores(), gate_set, lambda *_: None, **options)


def states(service):
    return [(row.round_id, row.attempt, row.state, row.account) for row in service.ledger.rows(STREAM)]


def test_what_was_charged_is_what_ran(made, gate_set):
    service = made()
    scores = score(service, gate_set)
    assert states(service) == [(NAME, 1, state, "holdout") for state in ("reserved", "started", "committed")]
    reserved, _, committed = service.ledger.rows(STREAM)
    sigma = evaluation_sigma(service.policy(STREAM))
    assert [(c.block_id, c.q, c.sigma, c.steps) for c in reserved.charges] == [
        (b, 1.0, sigma, 1) for b in scores.blocks
    ]
    assert scores.counts.sigma == sigma
    assert len(scores.blocks) == 2
    assert committed.adapter_sha256 == CANDIDATE
    assert scores.charge_id == reserved.round_id == NAME
    assert scores.evaluations_left == EVALUATIONS - 1
    assert all(service.ledger.share_used(block) == 0 for block in scores.blocks), "nobody who was trained on pays"


def test_the_figures_are_right_within_their_errors(made, gate_set):
    part = slices_of(score(made(blocks=3), gate_set).counts, 1, 1)[1]
    assert part.candidate.value == pytest.approx(1.0, abs=4 * part.candidate.se)
    assert part.gain.value == pytest.approx(0.2, abs=4 * part.gain.se)
    assert part.n == pytest.approx(1200, abs=4 * part.noise)


def test_nothing_private_is_read_before_it_is_charged_and_no_key_stays(made, gate_set):
    service, seen = made(), []
    scorer = Scores(before=lambda: seen.append(states(service)[-1][2]))
    score(service, gate_set, scorer)
    assert seen == ["started", "started"]
    assert not list((service.workspace.root / "checkpoints").rglob("*.key"))


def test_after_its_lifetime_the_next_evaluation_is_refused_and_new_blocks_bring_a_new_one(made, gate_set):
    service = made()
    for number in range(1, EVALUATIONS + 1):
        scores = score(service, gate_set, of=trained(service, f"{STREAM}-r{number:04d}"))
        assert scores.evaluations_left == EVALUATIONS - number
    before = states(service)
    refused = score(service, gate_set, of=trained(service, f"{STREAM}-r0009"))
    assert refused.counts is None
    assert refused.charge_id is None
    for part in (f"{STREAM}-0-000000001", "cannot pay", "3 evaluations were paid for, none is left", "new blocks"):
        assert part in refused.refusal
    assert states(service) == before
    fresh = add(service, 3)
    assert score(service, gate_set, of=trained(service, f"{STREAM}-r0010")).blocks == (fresh,)


def test_asked_again_it_gives_the_same_counts_and_charges_nothing(made, gate_set):
    service = made()
    first = score(service, gate_set)
    again = score(service, gate_set)
    assert again.counts == first.counts
    assert again.evaluations_left == first.evaluations_left
    assert len(states(service)) == 3


class Crash(BaseException):
    """The process dies here."""


def crash(*_arguments, **_options):
    raise Crash


def crashed(service, gate_set, monkeypatch, where):
    target, name = where
    with monkeypatch.context() as patched:
        patched.setattr(target, name, crash)
        with pytest.raises(Crash):
            score(service, gate_set)


@pytest.mark.parametrize(
    "where",
    [
        (Ledger, "reserve"),
        (Ledger, "start"),
        (holdout, "_marked"),
        (Ledger, "commit"),
        (holdout, "_discard"),
    ],
    ids=["before reserving", "before starting", "while reading", "before committing", "before the key is gone"],
)
def test_a_crash_anywhere_is_charged_once(made, gate_set, monkeypatch, where):
    service = made()
    crashed(service, gate_set, monkeypatch, where)
    kept = service.workspace.rounds(f"{STREAM}-r0001") / holdout.RESULT_FILE
    released = json.loads(kept.read_text())["counts"]["values"] if kept.exists() else None
    scores = score(service, gate_set)
    assert [state for _, _, state, _ in states(service)] == ["reserved", "started", "committed"]
    if released:
        assert list(scores.counts.values) == released, "what may have been seen is not drawn again"
    assert not list((service.workspace.root / "checkpoints").rglob("*.key"))


def test_a_resume_draws_the_very_same_noise(made, gate_set, monkeypatch):
    service, seen = made(), []
    original = RoundKey.load
    crashed(service, gate_set, monkeypatch, (holdout, "_marked"))
    file = next((service.workspace.root / "checkpoints").rglob("*.key"))
    secret = file.read_bytes()
    monkeypatch.setattr(RoundKey, "load", classmethod(lambda _, path: seen.append(original(path)) or seen[-1]))
    score(service, gate_set)
    assert {key.secret for key in seen} == {secret}


@pytest.mark.parametrize("lost", ["key", "code", "answers", "candidate"])
def test_what_cannot_be_resumed_exactly_is_charged_again(made, gate_set, monkeypatch, lost):
    service = made()
    crashed(service, gate_set, monkeypatch, (holdout, "_marked"))
    of = trained(service)
    if lost == "key":
        RoundKey.destroy(next((service.workspace.root / "checkpoints").rglob("*.key")))
    elif lost == "code":
        monkeypatch.setattr("learner.plan.code_sha256", lambda: "9" * 64)
    elif lost == "answers":
        answers = {**gate_set.answers, "other": "other"}
        gate_set = GateSet(gate_set.name, gate_set.sha256, gate_set.records, answers)
    else:
        of = trained(service, sha="e" * 64)
    scores = score(service, gate_set, of=of)
    assert [(attempt, state) for _, attempt, state, _ in states(service)] == [
        (1, "reserved"),
        (1, "started"),
        (2, "reserved"),
        (2, "started"),
        (2, "committed"),
    ]
    assert scores.evaluations_left == EVALUATIONS - 2
    assert not list((service.workspace.root / "checkpoints").rglob("*.key"))


def test_a_reservation_from_which_nothing_was_read_is_given_back(made, gate_set, monkeypatch):
    service = made()
    crashed(service, gate_set, monkeypatch, (type(service.ledger), "start"))
    score(service, gate_set, of=trained(service, sha="e" * 64))
    assert [(attempt, state) for _, attempt, state, _ in states(service)][:2] == [(1, "reserved"), (1, "cancelled")]
    assert service.ledger.share_used(f"{STREAM}-0-000000001", account="holdout") < 0.5


def test_users_of_all_blocks_pay_together_and_have_one_vote(made, gate_set):
    service = made(unit="user", blocks=2)
    for (block, split), rows in list(service.made["records"].items()):
        service.made["records"][block, split] = [
            row.model_copy(update={"user_id": f"u{i % 300}"}) for i, row in enumerate(rows)
        ]
    for number in range(1, EVALUATIONS + 1):
        scores = score(service, gate_set, of=trained(service, f"{STREAM}-r{number:04d}"))
        assert slices_of(scores.counts, 1, 1)[1].n == pytest.approx(300, abs=30)
    add(service, 3)
    assert score(service, gate_set, of=trained(service, f"{STREAM}-r0009")).counts is None, "a new block has old users"


def test_a_record_the_engine_cannot_read_is_wrong_and_decides_about_no_other(made, gate_set, caplog, capsys):
    service = made(blocks=1)
    rows = service.made["records"][f"{STREAM}-0-000000001", "holdout"]
    rows[7] = rows[7].model_copy(update={"prompt": "unreadable"})
    scores = score(service, gate_set)
    assert slices_of(scores.counts, 1, 1)[1].candidate.value > 0.9
    assert "1234" not in caplog.text + "".join(capsys.readouterr()) + str(scores)


def test_an_engine_that_is_broken_reads_and_charges_nothing(made, gate_set):
    class Broken:
        def score_labels(self, *_):
            raise RuntimeError("no model")

    service = made()
    refused = score(service, gate_set, Broken())
    assert "RuntimeError" in refused.refusal
    assert states(service) == []


def test_without_holdout_accounts_nothing_is_read(made, gate_set):
    service = made(holdout_evaluations=0)
    scorer = Scores()
    assert "no block has a holdout account" in score(service, gate_set, scorer).refusal
    assert [count for _, count in scorer.calls] == [1], "the public record alone"


def test_test_noise_is_epsilon_infinity_for_the_holdout_too(made, gate_set):
    service = made()
    first = score(service, gate_set, test_seed=5)
    assert {row.noise_source for row in service.ledger.rows(STREAM)} == {"test"}
    report = audit(service.ledger, STREAM).as_json()
    assert "infinity" in json.dumps(report).lower()
    assert first.counts is not None


def test_an_evaluation_does_not_disturb_the_numbering_of_rounds(made, gate_set):
    service = made()
    score(service, gate_set)
    assert next_round_id(service, STREAM) == f"{STREAM}-r0002"


def test_a_block_without_a_holdout_account_cannot_pay_from_it(made):
    service = made(holdout_evaluations=0)
    charges = [Charge(manifest.block_id, 1.0, 5.0, 1) for manifest in service.made["manifests"]]
    with pytest.raises(LedgerError, match="holdout account"):
        service.ledger.shortfalls(charges, account="holdout")
