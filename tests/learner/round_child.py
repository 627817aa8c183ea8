"""A round in a process of its own, to be killed: `python -m tests.learner.round_child FOLDER THREADS`."""

import json
import sys
from pathlib import Path

from learner.base import prepare_base
from learner.plan import RoundPlan
from learner.round import Speed, run_round
from privacy.randomness import RoundKey
from tests.learner.rounds import records


def main(folder, threads):
    base = prepare_base(str(folder / "model"), folder / "cache")
    plan = RoundPlan.model_validate(json.loads((folder / "plan.json").read_text()))

    def progress(done, steps):
        sys.stdout.write(f"{done}/{steps}\n")
        sys.stdout.flush()

    output = run_round(
        plan,
        base=base,
        parent_dir=None,
        records={"b1": records(40), "b2": records(30, block="b2", seed=1)},
        key=RoundKey.load(folder / "round.key"),
        system="",
        checkpoint_dir=folder / "checkpoint",
        out_dir=folder / "adapter",
        max_tokens=64,
        progress=progress,
        speed=Speed(threads=threads, checkpoint_steps=2),
    )
    sys.stdout.write(json.dumps({"sha256": output.adapter_sha256, "resumed": output.resumed}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
