"""Takes private steps until it is killed, with a round's threads and priority: what a round costs those it runs beside.

    python bench/drivers/rounds.py FOLDER_OF_THE_BASE

Standard output has a line a step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Python puts this folder first, not the checkout.
sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from bench.learner import BATCH, examples  # noqa: E402
from bench.peers.steps import Ours, Task  # noqa: E402
from learner.base import Base, load_model  # noqa: E402
from learner.plan import LoraSettings  # noqa: E402
from learner.step import Example  # noqa: E402
from tidegate.scheduler import ROUND_NICE  # noqa: E402


def main() -> None:
    """Step, and tell."""
    os.nice(ROUND_NICE)
    base = Base(Path(sys.argv[1]), "", sys.argv[1], "", {})
    model = load_model(base)
    records = tuple(Example(tuple(ids), start) for ids, start in examples(base))
    # A third of the layers, as `bench-learner` measures it.
    way = Ours(Task(base, LoraSettings(layers=-(-len(model.model.layers) // 3)), records, BATCH), model)

    def wait() -> bool:
        print("step", flush=True)
        return True

    way.run(wait)


if __name__ == "__main__":
    main()
