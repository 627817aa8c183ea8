"""A round killed by SIGKILL at every moment, and resumed: one draw, one noise, one set of bytes, one charge."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from learner.plan import BlockRate
from privacy.accounting import rdp
from privacy.randomness import RoundKey
from tests.learner.resume_child import REFUSED, private_records
from tests.learner.rounds import plan
from tests.tidegate.desk import STREAM, make_desk
from tidegate import cycle

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


class Rounds:
    """Runs one after the other in forks of one process."""

    def __init__(self, folder, process):
        self.folder, self.process = folder, process

    def run(self, name, *, every, kill_at=None, flip=False):
        order = {"run": name, "every": every, "kill_at": kill_at, "flip": flip}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self, name):
        return json.loads((self.folder / name / "end.json").read_text())

    def asked(self, name):
        return [json.loads(line) for line in (self.folder / name / "asked.jsonl").read_text().splitlines()]

    def adapter(self, name):
        return (self.folder / name / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def rounds(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(tiny.path, folder / "model")
    (folder / "plan.json").write_text(json.dumps(plan(tiny, noise_source="system", steps=STEPS).as_json()))
    RoundKey.create(folder / "round.key")
    with forks(folder) as process:
        made = Rounds(folder, process)
        for every in (1, 2):
            assert made.run(f"whole-{every}", every=every) == 0
        yield made


@contextmanager
def forks(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.learner.resume_child", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


def known(rounds, every):
    """What the undisturbed round asked of the keyed stream: by context, purpose and length, the values it got."""
    return {
        (call["context"], call["what"], *call["purpose"], call["n"]): call["values"]
        for call in rounds.asked(f"whole-{every}")
        if call["what"] in {"uniforms", "gaussians"}
    }


def require_the_same_round(rounds, name, every):
    """Same bytes in the end; and on the way no randomness but that of the undisturbed round."""
    assert rounds.adapter(name) == rounds.adapter(f"whole-{every}")
    asked, expected = rounds.asked(name), known(rounds, every)
    for call in asked:
        if call["what"] in {"uniforms", "gaussians"}:
            assert expected[call["context"], call["what"], *call["purpose"], call["n"]] == call["values"]
    drawn = {call["context"] for call in asked if call["what"] == "gaussians"}
    assert len(drawn) == STEPS == len({context for context, what, *_ in expected if what == "gaussians"})


def moments(rounds, every):
    """Moments of a whole round after the checkpoint that binds it: numbers from 1, with their names."""
    return [(at, call["what"]) for at, call in enumerate(rounds.asked(f"whole-{every}"), start=1)]


@pytest.mark.parametrize("every", [1, 2])
def test_a_round_killed_at_every_moment_of_every_step_ends_in_the_same_bytes(rounds, every):
    """Killed, resumed, killed at the next moment, until none is left: after each draw, each noise, before each fsync
    and rename of each checkpoint."""
    name = f"chain-{every}"
    one = [what for _, what in moments(rounds, every)]
    # The checkpoint that binds the round, the draws of all steps for the prefix cache, then the steps, in periods.
    preamble = 3 + STEPS
    assert one[:preamble] == ["fsync", "rename", "fsync"] + ["uniforms"] * STEPS
    period = (len(one) - preamble) * every // STEPS
    assert one[preamble : preamble + period] == ["uniforms", "gaussians"] * every + ["fsync", "rename", "fsync"]
    kills = 0
    for start in range(0, STEPS, every):
        # After the kill at a period's last moment its checkpoint is in place: the next run begins with the next step.
        for at in range(1, period + 1):
            assert rounds.run(name, every=every, kill_at=preamble + at) == -signal.SIGKILL, (start, at)
            kills += 1
    assert kills == len(one) - preamble
    assert rounds.run(name, every=every) == 0
    assert rounds.end(name)["resumed"]
    require_the_same_round(rounds, name, every)


def test_a_round_killed_before_its_first_step_ends_in_the_same_bytes(rounds):
    for at in (1, 2, 3, 4, 3 + STEPS):
        assert rounds.run("early", every=2, kill_at=at) == -signal.SIGKILL
    assert rounds.run("early", every=2) == 0
    assert not rounds.end("early")["resumed"]
    require_the_same_round(rounds, "early", 2)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_one_kill_at_any_moment_and_a_resume_end_in_the_same_bytes(rounds, every):
    for at, what in moments(rounds, every):
        name = f"once-{every}-{at}"
        assert rounds.run(name, every=every, kill_at=at) == -signal.SIGKILL, what
        assert rounds.run(name, every=every) == 0, what
        require_the_same_round(rounds, name, every)


def test_one_bit_of_the_data_changed_in_between_is_no_resume_whenever_the_round_was_killed(rounds):
    # With checkpoints every 6 steps nothing but the first one is there until the end.
    for every, at in ((6, 3 + 1), (6, 3 + STEPS + 2), (1, 3 + STEPS + 2), (1, 3 + STEPS + 12)):
        name = f"flip-{every}-{at}"
        assert rounds.run(name, every=every, kill_at=at) == -signal.SIGKILL
        before = rounds.asked(name)
        assert rounds.run(name, every=every, flip=True) == REFUSED
        assert "data_sha256" in (rounds.folder / name / "refused.txt").read_text()
        assert rounds.asked(name) == before, "the key was not used on other data"
        assert rounds.run(name, every=every) == 0, "nothing is lost: the right data resumes"
        assert rounds.adapter(name) == rounds.adapter("whole-1")


def test_other_data_in_a_round_of_its_own_gets_unrelated_randomness(rounds):
    """Were draw and noise the same, the difference of the two adapters would be that of the data alone."""
    assert rounds.run("other", every=1, flip=True) == 0
    contexts = {call["context"] for call in rounds.asked("other") if "context" in call}
    assert not contexts & {context for context, *_ in known(rounds, 1)}
    assert rounds.adapter("other") != rounds.adapter("whole-1")


# -- what the ledger is told of it ------------------------------------------------------------------------------------


class Crash(BaseException):
    """Ends a round where no handler of errors stands in the way."""


def crash_at(step):
    def tell(what, done, of):
        if (what, done) == ("train", step):
            raise Crash

    return tell


@pytest.fixture
def service(tmp_path, tiny):
    desk = make_desk(tmp_path / "ws", tiny)
    file = desk.root / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params["streams"][STREAM]["privacy"]["attempts"] = 3
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    return desk.service()


@pytest.mark.parametrize("flip", [False, True])
def test_an_interrupted_round_is_charged_once_and_other_data_is_a_new_attempt(service, tiny, monkeypatch, flip):
    for name in ("b1", "b2"):
        service.ledger.register_block(STREAM, name, service.policy(STREAM).frozen(100))
    rates = (BlockRate(id="b1", q=0.3), BlockRate(id="b2", q=0.3))
    made = plan(tiny, stream=STREAM, blocks=rates, sigma=2.0, noise_source="system", steps=4)
    cycle._write(service.workspace.rounds(made.round_id) / "plan.json", made.as_json())
    monkeypatch.setattr(cycle, "_records", lambda *_: private_records(flip=False))
    with pytest.raises(Crash):
        cycle._train(service, made, tiny, crash_at(1))  # one step, less than between two checkpoints
    first = service.workspace.checkpoints(made.round_id, 1)
    key = (first / cycle.KEY_FILE).read_bytes()
    monkeypatch.setattr(cycle, "_records", lambda *_: private_records(flip=flip))
    trained = cycle._train(service, made, tiny, lambda *_: None)
    attempts = [(row.attempt, row.state) for row in service.ledger.rows(STREAM)]
    once = rdp(0.3, 2.0, 4, service.policy(STREAM).orders)
    if flip:
        assert attempts == [(1, "reserved"), (1, "started"), (2, "reserved"), (2, "started"), (2, "committed")]
    else:
        assert attempts == [(1, "reserved"), (1, "started"), (1, "committed")]
    assert trained.plan.attempt == (2 if flip else 1)
    assert service.ledger.spent("b1") == pytest.approx([(2 if flip else 1) * r for r in once])
    assert any(key)
    assert not list(service.workspace.root.glob("checkpoints/**/*.key")), "no key outlives its attempt"
