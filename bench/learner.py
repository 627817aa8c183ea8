"""One training step of a LoRA adapter, eight ways, on the same records and LoRA targets: CPU time and peak memory.

`make bench-learner` prints a table and writes bench/results/learner.json. The ways (bench/peers/steps.py):

    private           the product's step: Poisson draw, per-sample gradients, clip, noise, AdamW
    own_plain         the same buckets, fused LoRA, completion-only logits, short last layer and flat AdamW, no privacy
    prefix            private, with the inputs of the lowest adapted layer computed once a round and kept
    trainer           peft with transformers' Trainer, records in random order (its default)
    grouped_trainer   the same with train_sampling_strategy="group_by_length"
    trl               peft with TRL's SFTTrainer
    opacus_hooks      peft under Opacus' GradSampleModule and DPOptimizer
    opacus_ghost      peft under Opacus' ghost clipping

All have the same base in fp32 with sdpa attention, r 16 on every linear layer of the upper third of the layers (10 of
30), the same 256 training records of CLINC150 (without them: of the example stream), none cut, the loss on the
completion alone, 64 records a step and one thread. The trainers neither evaluate, log nor save, and are timed from step
to step, so that their start is not counted; TRL's gradient checkpointing is off. The peers' physical batches have 16
rows; ours are the product's defaults.

Each way is a process of its own. They take their steps in turn, so that a busy machine slows all of them; a ratio is
that of the CPU seconds spent on one pass over the records, its spread is half the range of the ratios of single steps.
Memory is what a process adds at its peak to the imported libraries and the loaded base. `prefix_round_over_trainer` is
a round of 50 steps at a rate of a quarter, as `fill + 50 steps` over `50 steps` of the Trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where this very file would stand in for the package `learner`.
sys.path[0] = str(ROOT)

from learner.base import EMBEDDED, Base, load_tokenizer, prepare_base  # noqa: E402
from learner.prompt import Renderer  # noqa: E402
from tests.tiny import tiny_base  # noqa: E402

RECORDS = 256
BATCH = 64
ROUND_STEPS = 50
# Where a percent matters more than elsewhere, a way takes more steps a turn.
OURS = ("private", "own_plain")
TURN = (
    *(*OURS, "trainer", "prefix"),
    *(*OURS, "grouped_trainer", "trl"),
    *(*OURS, "opacus_hooks", "opacus_ghost"),
)
RATIOS = {
    "private_over_own_plain": "own_plain",
    "private_over_trainer": "trainer",
    "private_over_grouped_trainer": "grouped_trainer",
    "private_over_trl": "trl",
    "private_over_opacus_hooks": "opacus_hooks",
    "private_over_opacus_ghost": "opacus_ghost",
}
TARGETS = {
    "private_over_own_plain": 1.03,
    "private_over_trainer": 0.6,
    "private_over_grouped_trainer": 0.8,
    "private_over_opacus_hooks": 0.6,
    "memory_over_trainer": 1.0,
    "prefix_round_over_trainer": 0.35,
}


class Process:
    """One way in its own process."""

    def __init__(self, way: str, base: Base, layers: int, examples: Sequence[tuple[Sequence[int], int]]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.steps"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(
            json.dumps(
                {"way": way, "base": str(base.path), "layers": layers, "examples": list(examples), "batch": BATCH}
            )
        )
        self.spent: list[float] = []

    def ready(self) -> float:
        """CPU seconds of filling the prefix cache."""
        return self._heard("fill_s")

    def step(self) -> None:
        self._say("step")
        self.spent.append(self._heard("cpu_s"))

    def end(self) -> float:
        """Peak memory in bytes."""
        self._say("end")
        heard = self._heard("memory_bytes")
        self._process.communicate(timeout=60)
        return heard

    def _say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _heard(self, fact: str) -> float:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a way ended with {self._process.wait()}; what it said stands above")
        return float(json.loads(line)[fact])


def examples(base: Base) -> list[tuple[list[int], int]]:
    """Token ids and completion start of every so-many-th training record, so that all domains are among them."""
    path = ROOT.parent / "shared" / "data" / "clinc150" / "train.jsonl"
    if not path.exists():
        path = ROOT / "examples" / "support-desk.jsonl"
    lines = path.read_text().splitlines()
    records = [json.loads(lines[i * len(lines) // RECORDS]) for i in range(RECORDS)]
    # Every step of 64 then is a sample of all domains, too.
    steps = RECORDS // BATCH
    records = [record for first in range(steps) for record in records[first::steps]]
    renderer = Renderer(load_tokenizer(base), "")
    return [renderer.example(record["prompt"], record["completion"]) for record in records]


def measure(base: Base, layers: int, turn: Sequence[str], turns: int) -> dict[str, float]:
    """All figures of one base."""
    made = examples(base)
    names = list(dict.fromkeys(turn))
    ways: dict[str, Process] = {}
    fill_s = 0.0
    for name in names:
        ways[name] = Process(name, base, layers, made)
        fill_s = max(fill_s, ways[name].ready())
    for _ in range(turns):
        for name in turn:
            ways[name].step()
    memory = {name: way.end() for name, way in ways.items()}
    return figures({name: way.spent for name, way in ways.items()}, memory, fill_s)


def figures(spent: Mapping[str, Sequence[float]], memory: Mapping[str, float], fill_s: float) -> dict[str, float]:
    """Figures by name; a spread is half the range over steps (where one way took more of them: over turns)."""
    out: dict[str, float] = {}
    for name, other in RATIOS.items():
        if other in spent:
            out |= compared(name, spent["private"], spent[other], 0.0)
    out["memory_over_trainer"] = round(memory["private"] / memory["trainer"], 3)
    out |= compared("prefix_round_over_trainer", spent["prefix"], spent["trainer"], fill_s / ROUND_STEPS)
    out["prefix_fill_cpu_s"] = round(fill_s, 3)
    for name, seconds in spent.items():
        out[f"{name}_step_cpu_s"] = round(statistics.mean(seconds), 4)
    for name, size in memory.items():
        out[f"{name}_memory_mb"] = round(size / 1e6)
    return out


def compared(name: str, upper: Sequence[float], lower: Sequence[float], extra_s: float) -> dict[str, float]:
    """Ratio of the means, and its spread; `extra_s` is added to each upper step."""
    rate = len(upper) // len(lower)
    grouped = [statistics.mean(upper[i * rate : (i + 1) * rate]) for i in range(len(lower))]
    each = [(a + extra_s) / b for a, b in zip(grouped, lower, strict=True)]
    ratio = (statistics.mean(upper) + extra_s) / statistics.mean(lower)
    return {name: round(ratio, 3), f"{name}_spread": round((max(each) - min(each)) / 2, 3)}


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    first = next(iter(results.values()))
    lines = [f"{f'one step of {BATCH} records, one thread':38s}" + "".join(f"{name:>18s}" for name in results)]
    for figure in (f for f in first if not f.endswith("_spread")):
        cells = []
        for result in results.values():
            spread = f" ± {result[f'{figure}_spread']:.3f}" if f"{figure}_spread" in result else " " * 8
            cells.append(f"{result[figure]:>10.3f}{spread}" if figure in result else " " * 18)
        target = f"   to reach on 135M: {TARGETS[figure]}" if figure in TARGETS else ""
        lines.append(f"{figure:38s}" + "".join(cells) + target)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=["tiny", "135M"], action="append", help="only this base; nothing is written")
    parser.add_argument("--layers", type=int, help="adapted layers of the 135M base; nothing is written")
    parser.add_argument("--ways", nargs="+", choices=sorted(set(TURN)), help="only these; nothing is written")
    parser.add_argument("--turns", type=int, default=RECORDS // BATCH, help="4 are one pass; other: nothing is written")
    chosen = parser.parse_args()
    partial = chosen.base or chosen.layers or chosen.ways or chosen.turns != RECORDS // BATCH
    turn = tuple(way for way in TURN if not chosen.ways or way in chosen.ways)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if "tiny" in (chosen.base or ["tiny"]):
            results["tiny"] = measure(tiny_base(Path(folder)), 1, turn, chosen.turns)
        if "135M" in (chosen.base or ["135M"]):
            base = prepare_base(EMBEDDED, ROOT / "workspace" / "bases")
            results["135M"] = measure(base, chosen.layers or 10, turn, chosen.turns)
    print(table(results))
    if not partial:
        out = ROOT / "bench" / "results" / "learner.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
