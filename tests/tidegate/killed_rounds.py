"""`make soak-learner`: kill rounds again and again with SIGKILL, then account for every one of them.

The real cycle (plan, ledger on SQLite, key, training, checkpoints, commit, receipt) in forks of one process that has
loaded the libraries; hand-made are the blocks and what comes after the receipt: gates and registry. A round is killed
at named moments (each draw, noise, fsync, rename, step in the ledger, the making and the end of its key) and at random
times from outside. Each round's key is copied when it is made, and the round is run once more with it, undisturbed:
the adapter must be the same bytes, the ledger must have one reserved, one started and one committed row.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import learner.round
import privacy.ledger
import tidegate.cycle
from learner.base import load_model, load_tokenizer
from learner.plan import RoundPlan
from learner.round import Speed, run_round
from privacy.randomness import RoundKey
from privacy.receipts import read_receipt
from tests.learner.resume_child import Moments
from tests.learner.rounds import records
from tests.tidegate.streams import STREAM, HandMade, seal, workspace
from tidegate import cycle
from tidegate.config import load
from tidegate.workspace import Workspace

UNITS = 30
STEPS = 4
SETTINGS = {
    "privacy": {"epsilon": 50.0, "attempts": 20, "holdout_share": 0.0},
    "learner": {
        "steps": STEPS,
        "expected_batch": 12,
        "checkpoint_steps": 2,
        "lora": {"r": 4, "alpha": 32.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "layers": 2},
        "system": "",
        "max_tokens": 64,
    },
}
# Longer than a whole round of the tiny base takes on a busy machine: some of these kills come too late.
KILL_SECONDS_MAX = 2.0


@dataclass
class Figures:
    """What a soak came to."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    wrong: list[str] = field(default_factory=list)


class World:
    """A workspace with two sealed blocks, and its service as each process opens it anew."""

    def __init__(self, folder: Path, base) -> None:
        self.root, self.keys = folder / "ws", folder / "keys"
        os.environ["TIDEGATE_BASES"] = str(folder / "bases")
        self.keys.mkdir()
        workspace(self.root, **SETTINGS)
        file = self.root / "params.yaml"
        # A fork must not use the threads its parent had: torch would wait for them forever.
        text = file.read_text().replace("base: smollm2-135m", f"base: {base.path}").replace("threads: 2", "threads: 1")
        file.write_text(text)

    def service(self):
        made = HandMade(Workspace(self.root), load(self.root / "params.yaml", {}))
        for number in (1, 2):
            block = seal(made, number, units=UNITS)
            made.made["records"][block, "train"] = records(UNITS, seed=number, block=block)
        return made


def watch(moments: Moments, keys: Path) -> None:
    """Every moment of the cycle at which something begins to be true."""
    moments.watch()

    def around(owner, name):
        real = getattr(owner, name)

        def watched(*args, **options):
            moments.reach(f"before {name}")
            answer = real(*args, **options)
            moments.reach(f"after {name}")
            return answer

        setattr(owner, name, watched)

    for name in ("reserve", "start", "commit"):
        around(privacy.ledger.Ledger, name)
    around(tidegate.cycle, "_receipt")
    around(tidegate.cycle, "_discard")
    around(tidegate.cycle.shutil, "copytree")
    real = RoundKey.create.__func__

    def create(cls, file):
        key = real(cls, file)
        shutil.copy(file, keys / file.parent.name)  # with its mode, without which it is refused
        moments.reach("key made")
        return key

    RoundKey.create = classmethod(create)


def one_run(world: World, order: dict[str, object], log: Path) -> None:
    """A round in a fork: to its end, or to the moment it is killed at."""
    moments = Moments(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), order["kill_at"])
    watch(moments, world.keys)
    cycle.judge = lambda *_: (None, {})
    cycle.register = lambda _service, trained, *_: _end(trained)
    cycle.run(world.service(), STREAM)


def _end(trained):
    return {
        "stream": STREAM,
        "round_id": trained.plan.round_id,
        "attempt": trained.plan.attempt,
        "version": int(trained.plan.round_id[-4:]),
        "outcome": "passed",
        "state": "candidate",
        "reasons": [],
        "adapter_sha256": trained.adapter_sha256,
        "epsilon": 50.0,
        "delta": 1e-5,
        "unit": "record",
        "share_used": 0.0,
    }


def forked(world: World, order: dict[str, object], log: Path) -> int:
    """Run an order in a fork; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Path(f"{log}.out").open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                one_run(world, order, log)
                code = 0
        finally:
            os._exit(code)
    if order["after"] is not None:
        time.sleep(float(order["after"]))
        os.kill(child, signal.SIGKILL)  # not reaped yet, so it is still its number
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moments_of(log: Path) -> list[str]:
    return [json.loads(line)["what"] for line in log.read_text().splitlines()]


def twin(world: World, plan: RoundPlan, base, folder: Path) -> str:
    """The same round with the same key, undisturbed."""
    service = world.service()
    return run_round(
        plan,
        base=base,
        parent_dir=None,
        records={block.id: service.made["records"][block.id, "train"] for block in plan.blocks},
        key=RoundKey.load(world.keys / f"{plan.round_id}.{plan.attempt}"),
        system="",
        checkpoint_dir=folder / "steps",
        out_dir=folder / "adapter",
        max_tokens=64,
        speed=Speed(threads=1, checkpoint_steps=2),
    ).adapter_sha256


def ended_rounds(world: World) -> list[str]:
    """Ids of the rounds that have ended: also of one that was killed after its last file was written."""
    return sorted(file.parent.name for file in world.root.glob("rounds/*/ended.json"))


def account(world: World, base, folder: Path) -> list[str]:
    """What is wrong with the rounds of a workspace; nothing, if each ended once, was charged once, and is its twin."""
    service, wrong = world.service(), []
    rows = service.ledger.rows(STREAM)
    # A number may be missing: a folder that a crash left before its plan was written is not used again.
    names = ended_rounds(world)
    begun = sorted(file.parent.name for file in world.root.glob("rounds/*/plan.json"))
    if begun != names:
        wrong.append(f"rounds: {begun} were begun, {names} ended")
    found = [(row.round_id, row.attempt, row.state) for row in rows]
    expected = [(name, 1, state) for name in names for state in ("reserved", "started", "committed")]
    if found != expected:
        wrong.append(f"ledger: {found}, must be {expected}")
    service.ledger.verify_chain()
    if any(world.root.glob("checkpoints/**/*.key")):
        wrong.append("a key outlived its round")
    for name in names:
        place = service.workspace.rounds(name)
        plan = RoundPlan.model_validate(json.loads((place / "plan.json").read_text()))
        ended = json.loads((place / "ended.json").read_text())
        receipt = read_receipt(json.loads((place / "receipt.json").read_text()), service.trusted("receipts"))
        service.ledger.require_head(receipt.ledger_head)
        committed = [row.adapter_sha256 for row in rows if (row.round_id, row.state) == (name, "committed")]
        undisturbed = twin(world, plan, base, folder / name)
        if [ended["adapter_sha256"], receipt.adapter_sha256, *committed] != [undisturbed] * 3:
            wrong.append(f"{name}: adapter {committed} ended {ended}, its undisturbed twin is {undisturbed}")
    return wrong


def run(folder: Path, base, kills: int, seed: int, say=lambda _text: None) -> Figures:
    """Kill rounds so many times, then account for them."""
    chance, figures, world = random.Random(seed), Figures(), World(folder, base)
    tokenizer = load_tokenizer(base)
    learner.round.load_tokenizer = lambda _base: tokenizer  # reading it takes longer than the round
    load_model(base)
    torch.set_num_threads(1)
    log = folder / "moments.jsonl"
    if forked(world, {"kill_at": None, "after": None}, log) != 0:
        raise RuntimeError(Path(f"{log}.out").read_text())
    whole = len(moments_of(log))
    while True:
        left = kills - sum(figures.kills.values())
        order = {"kill_at": None, "after": None}
        if left and chance.random() < 1 / 4:
            order["after"] = chance.uniform(0.02, KILL_SECONDS_MAX)
        elif left:
            order["kill_at"] = chance.randint(1, whole)
        code = forked(world, order, log)
        if code == -signal.SIGKILL:
            seen = moments_of(log)
            where = seen[-1] if seen else "start"
            figures.kills[where if order["kill_at"] else "from outside"] += 1
            count = sum(figures.kills.values())
            say(f"kill {count} of {kills}, round {len(ended_rounds(world)) + 1}, at moment {len(seen)}: {where}")
        elif code == 0:
            if not left:
                break
        else:
            figures.wrong.append(f"a round ended with code {code}: {Path(f'{log}.out').read_text()[-2000:]}")
            break
    figures.rounds = len(ended_rounds(world))
    figures.wrong += account(world, base, folder / "twins")
    return figures


def main() -> int:
    from tests.tiny import tiny_base

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_base(Path(folder) / "tiny")
        figures = run(Path(folder), base, asked.kills, asked.seed, lambda text: sys.stdout.write(f"{text}\n"))
    sys.stdout.write(f"{sum(figures.kills.values())} kills in {figures.rounds} rounds: {dict(figures.kills)}\n")
    said = (
        "\n".join(figures.wrong)
        or "every round ended once, was charged once, and is its undisturbed twin byte for byte"
    )
    sys.stdout.write(f"{said}\n")
    return bool(figures.wrong)


if __name__ == "__main__":
    sys.exit(main())
