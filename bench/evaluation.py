"""The gate suite on 500 public records, candidate and live, against two plain `generate` runs.

`make bench-evaluation` prints a table and writes bench/results/evaluation.json. Two adapters are trained on the example
stream first, with next to no noise and in few steps, so that they answer as adapters do: mostly with a label, not
always with the right one.

What is compared is like with like: the suite is `params.yaml`'s gates and an exact match of every free answer against
live, so that it too comes out with the greedy answer of candidate and live to each of the 500 prompts, and with their
likeliest labels, the tests and the standard errors besides. `two_generates` is transformers' `generate` on a peft
model, once for each: prompts sorted by length, 32 in a batch, padded on the left, greedy, as many tokens as the suite
allows, as many threads. What it says is compared with what the suite said, word for word; where they differ, the gap
between the two tokens tells whether it is a tie (closer than 1e-4).

Live and the base were asked in an earlier round, as in a workspace; here live is asked anew each time, and the base is
found in the cache. `with_the_base_over_two_generates` is a suite that finds nothing there.

Times are CPU seconds of the whole process, in turns, medians with their spread; `wall_over_two_generates` is the same
by the clock, which means something on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# A thread that waits must not burn the time that is measured. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Python puts this folder first, where bench/learner.py would stand in for the package `learner`.
sys.path[0] = str(ROOT)

import structlog  # noqa: E402
import torch  # noqa: E402

from evaluation.cache import Cache  # noqa: E402
from evaluation.gates import CandidateFacts, evaluate  # noqa: E402
from evaluation.gateset import GateSet  # noqa: E402
from evaluation.policy import GatePolicy, Rule  # noqa: E402
from evaluation.scorer import Role, answer_tokens  # noqa: E402
from evaluation.together import Together, for_policy  # noqa: E402
from ingest.record import Record, RecordLimits, parse  # noqa: E402
from learner.adapter import adapter_sha256  # noqa: E402
from learner.base import EMBEDDED, Base, load_model, load_tokenizer, prepare_base  # noqa: E402
from learner.plan import BlockRate, LoraSettings, OptimiserSettings, RoundPlan, code_sha256  # noqa: E402
from learner.prompt import Renderer  # noqa: E402
from learner.round import Speed, run_round  # noqa: E402
from privacy.canonical import sha256_of  # noqa: E402
from privacy.randomness import TestKey  # noqa: E402
from serving.inprocess import InProcessEngine  # noqa: E402
from tidegate.config import load  # noqa: E402

STREAM = "support-desk"
RECORDS = 500
# Of the stream an adapter is trained on, and how much of that a step draws.
TAUGHT = 240
RATE = 1 / 3
BATCH = 32
# As many as fit into the time of the whole run, two at least.
TURNS_MAX = 3
SECONDS = 480
BEGUN_S = time.monotonic()
THREADS = 2
TIE = 1e-4
NAMES = ("candidate", "live")
SETTINGS = load(ROOT / "params.yaml", environ={}).settings.streams[STREAM]
EXACT = Rule(metric="exact_match", against="live", hard=False, options={"samples": 0})


def stream_records() -> list[Record]:
    """The example stream's good records, in order."""
    limits = RecordLimits(
        frozenset(SETTINGS.ingest.domains),
        frozenset(SETTINGS.ingest.labels),
        SETTINGS.ingest.prompt_chars_max,
        SETTINGS.ingest.completion_chars_max,
    )
    lines = (ROOT / "examples" / f"{STREAM}.jsonl").read_bytes().splitlines()
    return [record for record in (parse(line, limits) for line in lines) if isinstance(record, Record)]


def gate_set_of(records: Sequence[Record], folder: Path) -> GateSet:
    """The example's public gate set, filled up to 500 with records that nobody trains on."""
    lines = (ROOT / "examples" / f"{STREAM}-gates.jsonl").read_text(encoding="utf-8").splitlines()
    for record in records[-(RECORDS - len(lines)) :]:
        fields = ("event_id", "domain", "prompt", "completion", "label")
        lines.append(json.dumps({name: getattr(record, name) for name in fields}))
    path = folder / f"{STREAM}-{RECORDS}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = GateSet.load(path)
    assert len(found.records) == RECORDS
    return found


def train(base: Base, name: str, records: Sequence[Record], parent: Path | None, steps: int, folder: Path) -> Path:
    """An adapter of the stream's own shape, with next to no noise."""
    plan = RoundPlan(
        round_id=name,
        attempt=1,
        stream=STREAM,
        parent_sha256=adapter_sha256(parent) if parent else None,
        base_sha256=base.sha256,
        data_revision="0" * 40,
        unit="record",
        blocks=(BlockRate(id="b", q=RATE),),
        orders=(2, 4, 8, 16),
        sigma=1e-6,
        clip_norm=1.0,
        steps=steps,
        expected_batch=RATE * len(records),
        lora=LoraSettings(**SETTINGS.learner.lora.model_dump()),
        optimiser=OptimiserSettings(learning_rate=3e-3),
        noise_source="test",
        code_sha256=code_sha256(),
    )
    out = run_round(
        plan,
        base=base,
        parent_dir=parent,
        records={"b": records},
        key=TestKey(1),
        system=SETTINGS.learner.system,
        checkpoint_dir=folder / f"{name}-checkpoint",
        out_dir=folder / name,
        max_tokens=SETTINGS.learner.max_tokens,
        speed=Speed(threads=THREADS, checkpoint_steps=1000),
    )
    return out.adapter_dir


class Plain:
    """Candidate and live as plain transformers and peft have them."""

    def __init__(self, base: Base, adapters: dict[str, Path]) -> None:
        from peft import PeftModel

        self.models = {
            name: PeftModel.from_pretrained(load_model(base), str(folder)).eval() for name, folder in adapters.items()
        }
        tokenizer = load_tokenizer(base)
        self.renderer = Renderer(tokenizer, SETTINGS.learner.system)
        self.pad = tokenizer.pad_token_id or 0
        self.ends = sorted({self.renderer.end_id, tokenizer.eos_token_id} - {None})

    def generate(self, name: str, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy answers: one run."""
        rows = [self.renderer.prompt_ids(prompt) for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        said = [""] * len(rows)
        for first in range(0, len(order), BATCH):
            some = order[first : first + BATCH]
            width = max(len(rows[row]) for row in some)
            ids = torch.tensor([[self.pad] * (width - len(rows[row])) + rows[row] for row in some])
            mask = torch.tensor([[0] * (width - len(rows[row])) + [1] * len(rows[row]) for row in some])
            with torch.inference_mode():
                out = self.models[name].generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    do_sample=False,
                    eos_token_id=self.ends,
                    pad_token_id=self.pad,
                )
            for row, written in zip(some, out, strict=True):
                said[row] = self.renderer.tokenizer.decode(written[width:], skip_special_tokens=True)
        return said

    def gap(self, name: str, prompt: str, one: str, other: str) -> float:
        """Logits between what two answers say at the first token in which they differ."""
        ids = [self.renderer.completion_ids(text) for text in (one, other)]
        at = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        with torch.inference_mode():
            before = torch.tensor([self.renderer.prompt_ids(prompt) + ids[0][:at]])
            logits = self.models[name](input_ids=before).logits[0, -1]
        return abs(float(logits[ids[0][at]] - logits[ids[1][at]]))


class Suite:
    """The gates on both, as a round runs them."""

    def __init__(self, engine: InProcessEngine, adapters: dict[str, Path], gate_set: GateSet, kept: Path) -> None:
        self.engine, self.gate_set, self.cache = engine, gate_set, Cache(kept)
        self.policy = GatePolicy((*SETTINGS.evaluation.gates, EXACT))
        self.sha256: dict[str | None, str] = {name: adapter_sha256(path) for name, path in adapters.items()}
        self.sha256[None] = ""
        self.scorer: Together | None = None

    def anew(self) -> None:
        """Judge the candidate; of it and of live nothing is known."""
        self.sha256 |= {name: sha256_of([self.sha256[name]]) for name in NAMES}
        self.run()

    def run(self) -> None:
        """Judge the candidate; what anybody said before is looked for in the cache, and kept there."""
        names: dict[Role, str | None] = {"candidate": "candidate", "live": "live", "base": None}
        about = {"base": self.engine.base.sha256, "system": SETTINGS.learner.system}
        self.scorer = for_policy(
            self.policy, self.gate_set, self.engine, names, self.sha256, about=about, cache=self.cache
        )
        facts = CandidateFacts(
            adapter_sha256=self.sha256["candidate"],
            parent_sha256=self.sha256["live"],
            base_sha256=self.engine.base.sha256,
            max_abs_delta=1.0,
            budget_kept=True,
            share_used=0.0,
            epsilon=8.0,
            delta=1e-5,
            unit="record",
            private=False,  # its noise came from a test key
        )
        self.evaluation = evaluate(
            self.gate_set, self.policy, self.scorer, candidate="candidate", live="live", facts=facts, everything=True
        )


def measured(ways: dict[str, Callable[[], object]], turns_max: int = 1) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of each way, in turns; every other turn the other way round."""
    began = time.monotonic()
    spent: dict[str, dict[str, list[float]]] = {name: {"cpu_s": [], "wall_s": []} for name in ways}
    for turn in range(turns_max):
        now = time.monotonic()
        if turn > 1 and now - BEGUN_S + (now - began) / turn > SECONDS:
            break
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            cpu, wall = time.process_time(), time.monotonic()
            ways[name]()
            spent[name]["cpu_s"].append(time.process_time() - cpu)
            spent[name]["wall_s"].append(time.monotonic() - wall)
            last = {kind: times[-1] for kind, times in spent[name].items()}
            print(f"{turn + 1}/{turns_max} {name}: {last['cpu_s']:.1f} CPU s, {last['wall_s']:.1f} s", flush=True)
    return spent


def compared(plain: Plain, said: dict[str, list[str]], suite: Suite, tokens: int) -> dict[str, Any]:
    """Whether the suite said what `generate` said."""
    assert suite.scorer is not None
    prompts = [record.prompt for record in suite.gate_set.records]
    pairs = [
        (name, prompt, one, other)
        for name in NAMES
        for prompt, one, other in zip(prompts, said[name], suite.scorer.generate(name, prompts, tokens), strict=True)
    ]
    gaps = [plain.gap(*pair) for pair in pairs if pair[2] != pair[3]]
    ties = sum(gap < TIE for gap in gaps)
    return {
        "answers": len(pairs),
        "same_answers": (len(pairs) - len(gaps) + ties) / len(pairs),
        "word_for_word": len(pairs) - len(gaps),
        "ties": ties,
        "largest_gap_of_a_difference": max(gaps, default=0.0),
    }


def run(folder: Path, bases: Path) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(THREADS)
    base = prepare_base(EMBEDDED, bases)
    records = stream_records()
    gate_set = gate_set_of(records, folder)
    live = train(base, "live", records[:TAUGHT], None, 10, folder)
    adapters = {"candidate": train(base, "candidate", records[-2 * TAUGHT : -TAUGHT], live, 10, folder), "live": live}
    print("two adapters are trained", flush=True)
    prompts = [record.prompt for record in gate_set.records]
    tokens = answer_tokens(gate_set)
    plain, said = Plain(base, adapters), {}

    def two_generates() -> None:
        for name in NAMES:
            said[name] = plain.generate(name, prompts, tokens)

    with InProcessEngine(base, system=SETTINGS.learner.system, threads=THREADS) as engine:
        for name, path in adapters.items():
            engine.load(name, path)
        suite = Suite(engine, adapters, gate_set, folder / "kept")
        for name in NAMES:  # warm up
            plain.generate(name, prompts[:BATCH], tokens)
        spent = measured({"suite_with_the_base": suite.run})
        spent |= measured({"two_generates": two_generates, "suite": suite.anew}, TURNS_MAX)
        spent |= measured({"suite_from_the_cache": suite.run})
        same = compared(plain, said, suite, tokens)
    return figures(spent) | {
        **same,
        "records": RECORDS,
        "answer_tokens_max": tokens,
        "batch": BATCH,
        "threads": THREADS,
        # What was measured; other gates are about a round, and there was none.
        "gates": {gate.name: gate.sentence for gate in suite.evaluation.gates if gate.n is not None},
    }


def figures(spent: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Ratios of medians, and the range of those of single turns."""
    median = {name: {kind: statistics.median(t) for kind, t in times.items()} for name, times in spent.items()}

    def ratio(name: str, kind: str = "cpu_s") -> float:
        return median[name][kind] / median["two_generates"][kind]

    turns = [a / b for a, b in zip(spent["suite"]["cpu_s"], spent["two_generates"]["cpu_s"], strict=True)]
    return {
        "time_over_two_generates": ratio("suite"),
        "time_over_two_generates_min": min(turns),
        "time_over_two_generates_max": max(turns),
        "wall_over_two_generates": ratio("suite", "wall_s"),
        "with_the_base_over_two_generates": ratio("suite_with_the_base"),
        "from_the_cache_over_two_generates": ratio("suite_from_the_cache"),
        "spent": {
            name: {kind: {"median": statistics.median(t), "min": min(t), "max": max(t)} for kind, t in times.items()}
            for name, times in spent.items()
        },
    }


def main() -> None:
    """Measure, print, and keep the figures."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as name:
        found = run(Path(name), Path(os.environ.get("TIDEGATE_BASES", ROOT / "workspace" / "bases")))
    for key, value in found.items():
        if isinstance(value, int | float):
            print(f"{key:38}{value:12.3f}")
    for way, times in found["spent"].items():
        cpu, wall = times["cpu_s"], times["wall_s"]
        print(
            f"{way}: {cpu['median']:.1f} CPU s ({cpu['min']:.1f} to {cpu['max']:.1f}), {wall['median']:.1f} s of wall"
        )
    out = ROOT / "bench" / "results" / "evaluation.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
