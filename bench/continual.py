"""Domains one after another: what each way of continual learning keeps, with and without privacy.

CLINC150, five domains, a round each, every round from the adapter of the one before, through the product's own plan,
`run_round` and label scorer. Noise comes from test keys, so that the same code makes the same figures again; what it
would cost from the operating system is planned and accounted for as in the product. After each round, accuracy on test
records of every domain seen so far. The label space is all labels of all five domains, from the first round on, as a
gate set's.

Every finished round is a line of `bench/results/continual.jsonl`: when the run is stopped, however, the next one goes
on behind the last line. Adapters and prefixes stay under `build/`. At the end, and with `--table` at once, the lines
become `bench/results/continual.md`, with some first rounds in which one setting is changed (TRIED). `--reduced` is the
same without those, with two small domains, in some minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where bench/learner.py would stand in for the package `learner`.
sys.path[0] = str(ROOT)

from evaluation.continual import memory  # noqa: E402
from ingest.child import die_with_parent  # noqa: E402
from ingest.record import Record  # noqa: E402
from learner.base import EMBEDDED, Base, load_tokenizer, prepare_base  # noqa: E402
from learner.plan import (  # noqa: E402
    BlockAccount,
    ContinualSettings,
    LoraSettings,
    OptimiserSettings,
    RoundPlan,
    plan_round,
)
from privacy.accounting import rdp  # noqa: E402
from privacy.policy import Policy  # noqa: E402

if TYPE_CHECKING:
    import torch

STREAM = "clinc"
BUILD = ROOT / "build" / "continual"
# Without privacy the same code runs with a clip that no gradient reaches and noise that no weight feels.
NO_CLIP, NO_NOISE = 1e4, 1e-9
# Draws of an interval. 1,000 give its ends to about a tenth of its width.
DRAWS = 1000
FIRST = "first"
"""The first round of a line, which is the same for every method that does nothing before there is a parent."""


@dataclass(frozen=True)
class Training:
    """Of a round, with or without privacy."""

    expected_batch: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Setup:
    """Everything a figure depends on; its hash stands in every line."""

    domains: tuple[str, ...] = ("banking", "travel", "home", "work", "meta")
    train_records: int = 1500
    test_records: int = 30
    methods: tuple[str, ...] = ("sequential", "replay", "orthogonal", "average")
    seeds: tuple[int, ...] = (1, 2)
    layers: int = 3
    r: int = 10
    alpha: float = 20.0
    private: Training = Training(256, 15, 1e-2)
    plain: Training = Training(64, 24, 3e-3)
    epsilon: float = 8.0
    delta: float = 1e-5
    replay_rate: float = 0.25
    replay_share: float = 0.25
    rank_groups: int = 5
    weight: float = 0.5
    noise: bool = True  # without it a private round only clips, which shows what the clip alone costs

    @property
    def digest(self) -> str:
        """The first 12 digits of a sha256 over all of it but which lines are run."""
        told = {name: value for name, value in asdict(self).items() if name not in {"methods", "seeds"}}
        if self.noise:
            del told["noise"]
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


REDUCED = Setup(
    domains=("banking", "travel"),
    train_records=300,
    test_records=30,
    methods=("sequential", "replay"),
    seeds=(1,),
    layers=2,
    private=Training(96, 8, 1e-2),
    plain=Training(32, 20, 2e-3),
)

# What was tried to close the gap between epsilon 8 and none, each with the first domain's round alone.
TRIED: dict[str, dict[str, Any]] = {
    "as above": {},
    "clipped, but no noise": {"noise": False},
    "twice the steps": {"private": Training(256, 30, 1e-2)},
    "twice the batch": {"private": Training(512, 15, 1e-2)},
    "twice the learning rate": {"private": Training(256, 15, 2e-2)},
    "half the learning rate": {"private": Training(256, 15, 5e-3)},
    "rank 4 for 10": {"r": 4, "alpha": 8.0},
}


@dataclass(frozen=True)
class Job:
    """One round of one line."""

    private: bool
    seed: int
    method: str  # FIRST, or one of the setup's methods
    number: int  # from 0

    @property
    def name(self) -> str:
        """Also its folder."""
        return f"{'private' if self.private else 'plain'}/{self.method}/seed{self.seed}/round{self.number + 1}"


def line_of(setup: Setup, private: bool, seed: int, method: str) -> list[Job]:
    """The rounds of one line, the first one shared where the method cannot matter in it.

    Orthogonal trains fewer ranks from the first round on; replay under privacy keeps a share of the budget for later.
    """
    own = method == "orthogonal" or (private and method == "replay")
    return [Job(private, seed, method if own or number else FIRST, number) for number in range(len(setup.domains))]


def jobs_of(setup: Setup) -> list[Job]:
    """Every round of every line, each once, in the order they are wanted."""
    # Averaging last: a run that is stopped early has the three others.
    ranked = sorted(((m == "average", seed, i, m) for seed in setup.seeds for i, m in enumerate(setup.methods)))
    lines = [line_of(setup, private, seed, method) for _, seed, _, method in ranked for private in (False, True)]
    return list(dict.fromkeys(job for line in lines for job in line))


def tried_jobs(setup: Setup) -> list[Job]:
    """The rounds of a setting of TRIED."""
    return [Job(True, seed, FIRST, 0) for seed in setup.seeds]


def parent_of(setup: Setup, job: Job) -> Job | None:
    """The round it goes on from."""
    if job.number == 0:
        return None
    return line_of(setup, job.private, job.seed, job.method)[job.number - 1]


# Data


def records_of(file: Path, domain: str, count: int, *, per_label: bool) -> list[Record]:
    """Some records of a domain, chosen by the hash of their id; the same number of each label where that is asked."""
    found: dict[str, list[dict[str, Any]]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row["domain"] == domain:
            found.setdefault(row["label"] if per_label else "", []).append(row)
    share = -(-count // max(len(found), 1))
    rows = [row for _, group in sorted(found.items()) for row in sorted(group, key=_spread)[:share]]
    return [Record(schema_version=1, **row) for row in rows[:count]]


def _spread(row: Mapping[str, Any]) -> str:
    return sha256(row["event_id"].encode()).hexdigest()


def data_of(setup: Setup, folder: Path) -> tuple[dict[str, list[Record]], dict[str, list[Record]], list[str]]:
    """Training records and test records by domain, and what answers exist in all domains together."""
    train = {d: records_of(folder / "train.jsonl", d, setup.train_records, per_label=False) for d in setup.domains}
    test = {d: records_of(folder / "test.jsonl", d, setup.test_records, per_label=True) for d in setup.domains}
    answers = sorted({record.completion for records in train.values() for record in records})
    return train, test, answers


# One round


def plan_of(setup: Setup, base: Base, job: Job, parent_sha256: str | None) -> RoundPlan:
    """The plan the product would make: one block a domain, what it spent in earlier rounds on its account.

    Without privacy rates and steps are planned in the same way, and clip and noise are replaced.
    """
    replays = job.method == "replay" and job.number > 0
    policy = Policy(
        unit="record",
        epsilon=setup.epsilon,
        delta=setup.delta,
        attempts=1,
        replay_share=setup.replay_share if job.method == "replay" else 0.0,
        holdout_share=0.0,
    )
    frozen = policy.frozen(setup.train_records)
    training = setup.private if job.private else setup.plain
    spent = _spent(setup, base, job) if replays and job.private else {}
    nothing = (0.0,) * len(policy.orders)
    plan = plan_round(
        round_id=f"{STREAM}-{job.method}-r{job.number + 1}",
        attempt=1,
        stream=STREAM,
        parent_sha256=parent_sha256,
        base_sha256=base.sha256,
        data_revision="0" * 40,
        new=[BlockAccount(setup.domains[job.number], frozen, nothing)],
        replay=[BlockAccount(d, frozen, spent.get(d, nothing)) for d in setup.domains[: job.number]] if replays else [],
        expected_batch=training.expected_batch,
        steps=training.steps,
        replay_rate=setup.replay_rate,
        lora=LoraSettings(r=setup.r, alpha=setup.alpha, layers=setup.layers),
        optimiser=OptimiserSettings(learning_rate=training.learning_rate),
        continual=ContinualSettings(
            method="sequential" if job.method == FIRST else job.method,
            rank_groups=setup.rank_groups,
            weight=setup.weight,
        ),
        noise_source="test",
    )
    if not job.private:
        return plan.model_copy(update={"clip_norm": NO_CLIP, "sigma": NO_NOISE})
    return plan if setup.noise else plan.model_copy(update={"sigma": NO_NOISE})


def _spent(setup: Setup, base: Base, job: Job) -> dict[str, tuple[float, ...]]:
    """What each domain's block has spent in the line's earlier rounds, which follows from their plans."""
    spent: dict[str, tuple[float, ...]] = {}
    for earlier in line_of(setup, job.private, job.seed, job.method)[: job.number]:
        plan = plan_of(setup, base, earlier, None)
        for block in plan.blocks:
            paid = rdp(block.q, plan.sigma, plan.steps, plan.orders)
            before = spent.get(block.id, (0.0,) * len(paid))
            spent[block.id] = tuple(a + b for a, b in zip(before, paid, strict=True))
    return spent


class Prefixes(MutableMapping[tuple[int, ...], "torch.Tensor"]):
    """Prefixes on disk, a file each: computed once for all rounds, methods and seeds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, ids: tuple[int, ...]) -> Path:
        return self._folder / sha256(",".join(map(str, ids)).encode()).hexdigest()

    def __contains__(self, ids: object) -> bool:
        return isinstance(ids, tuple) and self._file(ids).exists()

    def __getitem__(self, ids: tuple[int, ...]) -> torch.Tensor:
        import torch

        try:
            flat = torch.frombuffer(bytearray(self._file(ids).read_bytes()), dtype=torch.float32)
        except FileNotFoundError:
            raise KeyError(ids) from None
        return flat.view(len(ids), -1)

    def __setitem__(self, ids: tuple[int, ...], prefix: torch.Tensor) -> None:
        file = self._file(ids)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_bytes(prefix.contiguous().numpy().tobytes())
        new.replace(file)

    def __delitem__(self, ids: tuple[int, ...]) -> None:
        self._file(ids).unlink()

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        raise TypeError("prefixes are found by their ids, not listed")

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.iterdir())


class Lines:
    """Trains and measures rounds; keeps the loaded model and what scoring may share between rounds.

    Args:
        setup: what to run.
        base: on which base.
        data: folder of CLINC150.
        build: where adapters and prefixes are kept.
    """

    def __init__(self, setup: Setup, base: Base, data: Path, build: Path) -> None:
        self.setup = setup
        self.base = base
        self.train, self.test, self.answers = data_of(setup, data)
        self._adapters = build / setup.digest
        self._prefixes = Prefixes(build / f"prefixes-{base.sha256[:12]}-{setup.layers}")
        self._scorer: Any = None

    def run(self, job: Job) -> dict[str, Any]:
        """One line of the results."""
        started, cpu = time.monotonic(), time.process_time()
        plan, _ = self.trained(job)
        trained = time.process_time()
        seen = self.setup.domains[: job.number + 1]
        right = {domain: self.right(job, domain) for domain in seen}
        return {
            "setup": self.setup.digest,
            "job": job.name,
            **asdict(job),
            "domain": self.setup.domains[job.number],
            "correct": {domain: all_labels for domain, (all_labels, _) in right.items()},
            "correct_among_own": {domain: own for domain, (_, own) in right.items()},
            "sigma": plan.sigma if job.private else 0.0,
            "expected_batch": plan.expected_batch,
            "q": {block.id: round(block.q, 5) for block in plan.blocks},
            "left_out": list(plan.left_out),
            "train_cpu_s": round(trained - cpu, 1),
            "score_cpu_s": round(time.process_time() - trained, 1),
            "wall_s": round(time.monotonic() - started, 1),
        }

    def trained(self, job: Job) -> tuple[RoundPlan, Path]:
        """The round's plan and its adapter; trained now if it is not there, its parent before it."""
        from learner.adapter import read_adapter
        from learner.round import Speed, run_round
        from privacy.randomness import TestKey

        before = parent_of(self.setup, job)
        parent = self.trained(before)[1] if before else None
        plan = plan_of(self.setup, self.base, job, read_adapter(parent, base=self.base).sha256 if parent else None)
        folder = self._adapters / job.name
        if not (folder / "adapter").is_dir():
            run_round(
                plan,
                base=self.base,
                parent_dir=parent,
                records={block.id: self.train[block.id] for block in plan.blocks},
                key=TestKey(job.seed),
                system="",
                checkpoint_dir=folder / f"steps-{plan.plan_hash[:12]}",
                out_dir=folder / "adapter",
                max_tokens=256,
                speed=Speed(threads=1, prefixes=self._prefixes),
            )
        return plan, folder / "adapter"

    def right(self, job: Job | None, domain: str) -> tuple[str, str]:
        """For each test record of a domain 1 or 0: is its label likeliest of all labels, and of its domain's own?"""
        import numpy as np

        from serving.forward import resident_from
        from serving.scoring import Scorer

        if self._scorer is None:
            from learner.prompt import Renderer
            from serving.forward import Decoder

            self._renderer = Renderer(load_tokenizer(self.base), "")
            self._decoder = Decoder(self.base)
            self._scorer = Scorer(self._decoder, frozenset())
        place = self._adapters / job.name / "adapter" if job else None
        adapter = resident_from(place, job.name, self.base, self._decoder.depth) if job and place else None
        records = self.test[domain]
        scores = np.empty((len(records), len(self.answers)))
        prompts = [self._renderer.prompt_ids(record.prompt) for record in records]
        labels = [self._renderer.completion_ids(answer) for answer in self.answers]
        # Every label to its end: the likeliest of a domain's own need not be near the likeliest of all.
        for some in self._scorer.ask([adapter], prompts, labels, within=math.inf, max_tokens=[0]):
            for found in some:
                scores[list(found.rows)] = found.values
        own = np.isin(self.answers, [record.completion for record in self.train[domain]])
        truth = np.array([self.answers.index(record.completion) for record in records])
        among_own = np.where(own, scores, -np.inf)
        return _bits(scores.argmax(axis=1) == truth), _bits(among_own.argmax(axis=1) == truth)


def _bits(flags: Iterable[Any]) -> str:
    return "".join("1" if flag else "0" for flag in flags)


# The run


def work(setup: Setup, base: Base, data: Path, build: Path, pipe: Connection) -> None:
    """A worker: does jobs until there is none left."""
    import torch

    die_with_parent()
    torch.set_num_threads(1)
    lines = Lines(setup, base, data, build)
    while (job := pipe.recv()) is not None:
        if job == "base":
            pipe.send(base_line(lines))
        else:
            pipe.send(lines.run(job))


def base_line(lines: Lines) -> dict[str, Any]:
    """How the bare base does on every domain."""
    right = {domain: lines.right(None, domain) for domain in lines.setup.domains}
    return {
        "setup": lines.setup.digest,
        "job": "base",
        "correct": {domain: all_labels for domain, (all_labels, _) in right.items()},
        "correct_among_own": {domain: own for domain, (_, own) in right.items()},
    }


def finished(file: Path, setup: Setup) -> dict[str, dict[str, Any]]:
    """Lines of this setup by job. A line that a crash cut short is dropped from the file."""
    if not file.exists():
        return {}
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        with file.open("r+b") as out:
            out.truncate(len(kept))
    rows = [json.loads(text) for text in kept.decode().splitlines()]
    return {row["job"]: row for row in rows if row["setup"] == setup.digest}


def append(file: Path, row: Mapping[str, Any]) -> None:
    """A line, on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as out:
        out.write(json.dumps(row, sort_keys=True).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def run(
    setup: Setup, base: Base, data: Path, build: Path, out: Path, workers: int, wanted: Sequence[Job | Literal["base"]]
) -> None:
    """Do what has no line yet. A job waits for its parent's line; otherwise the order is as wanted."""
    done = finished(out, setup)
    todo = [job for job in wanted if (job if job == "base" else job.name) not in done]
    left = [job for job in todo if job != "base"]
    context = multiprocessing.get_context("spawn")
    idle, busy = [], {}
    for _ in range(min(workers, len(todo))):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(setup, base, data, build, theirs), daemon=True).start()
        theirs.close()
        idle.append(ours)
    clock = Clock(len(wanted), [row for row in done.values() if "wall_s" in row], workers)
    clock.tell(len(wanted) - len(todo), left)
    while todo or busy:
        while idle and (job := next((j for j in todo if _ready(setup, j, done)), None)):
            todo.remove(job)
            pipe = idle.pop()
            pipe.send(job)
            busy[pipe] = job
        for pipe in wait(list(busy)):
            row = pipe.recv()
            append(out, row)
            done[row["job"]] = row
            clock.rows.append(row)
            idle.append(pipe)
            del busy[pipe]
        clock.tell(len(wanted) - len(todo) - len(busy), [job for job in [*todo, *busy.values()] if job != "base"])
    for pipe in idle:
        pipe.send(None)


def _ready(setup: Setup, job: Any, done: Mapping[str, Any]) -> bool:
    if job == "base":
        return True
    before = parent_of(setup, job)
    return before is None or before.name in done


class Clock:
    """A line of progress with an estimate, from what rounds of each kind took so far."""

    def __init__(self, total: int, rows: Sequence[Mapping[str, Any]], workers: int) -> None:
        self.rows = list(rows)
        self._total = total
        self._workers = workers

    def tell(self, done: int, left: Sequence[Job]) -> None:
        """Write it to standard error, over the last one on a terminal."""
        taken = {kind: [r["wall_s"] for r in self.rows if r.get("private") is kind] for kind in (False, True)}
        if all(taken.values()):
            seconds = sum(sum(taken[job.private]) / len(taken[job.private]) for job in left) / self._workers
            estimate = f"about {seconds / 60:.0f} min left"
        else:
            estimate = "no estimate yet"
        width = 30 * done // self._total
        terminal = sys.stderr.isatty()
        text = f"[{'#' * width:<30}] {done} of {self._total} rounds, {estimate}"
        sys.stderr.write(f"\r{text:<79}" if terminal else f"{time.strftime('%H:%M:%S')} {text}\n")
        if terminal and not left:
            sys.stderr.write("\n")
        sys.stderr.flush()


# The table

Bits = Mapping[tuple[int, str], Any]
"""(N,) bools by (round, domain): which test records were right."""


def lines_in(
    setup: Setup, rows: Mapping[str, Mapping[str, Any]], field: str, *, whole: bool = True
) -> dict[tuple[bool, str, int], Bits]:
    """What was right, by (private, method, seed), of the lines that are whole, or also of those that are begun."""
    import numpy as np

    found = {}
    for private in (False, True):
        for method in setup.methods:
            for seed in setup.seeds:
                jobs = line_of(setup, private, seed, method)
                done = [job for job in jobs if job.name in rows]
                if len(done) == len(jobs) or (done and not whole):
                    found[private, method, seed] = {
                        (job.number, domain): np.array(list(bits)) == "1"
                        for job in done
                        for domain, bits in rows[job.name][field].items()
                    }
    return found


def figures(setup: Setup, right: Bits, drawn: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Average accuracy, backward transfer and forgetting of one line, on all test records or on some drawn ones."""
    rounds: list[dict[str, float]] = [{} for _ in setup.domains]
    for (number, domain), bits in right.items():
        rounds[number][domain] = float((bits if drawn is None else bits[drawn[domain]]).mean())
    kept = memory(rounds, {domain: number for number, domain in enumerate(setup.domains)})
    return {
        "average accuracy": kept.average_accuracy or 0.0,
        "backward transfer": kept.backward_transfer or 0.0,
        "forgetting": kept.forgetting_mean or 0.0,
        "accuracy when learnt": sum(rounds[n][d] for n, d in enumerate(setup.domains)) / len(rounds),
        **{f"forgetting of {domain}": value for domain, value in kept.forgetting.items()},
    }


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; its 95% interval from drawing seeds and test records anew; each seed's own value."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        each = " ".join(f"{100 * value:.1f}" for value in self.seeds)
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}] ({each})"


def estimates(setup: Setup, lines: Mapping[tuple[bool, str, int], Bits]) -> dict[tuple[bool, str], dict[str, Estimate]]:
    """Every figure of every method. All methods see the same draws, so that their ratios are paired."""
    import numpy as np

    rng = np.random.default_rng(0)
    size = {domain: len(bits) for right in lines.values() for (_, domain), bits in right.items()}
    draws = [{domain: rng.integers(n, size=n) for domain, n in size.items()} for _ in range(DRAWS)]
    picks = rng.random((DRAWS, len(setup.seeds)))
    samples: dict[tuple[bool, str], list[dict[str, float]]] = {}
    found: dict[tuple[bool, str], dict[str, Estimate]] = {}
    for private, method in dict.fromkeys((p, m) for p, m, _ in lines):
        own = [right for (p, m, _), right in sorted(lines.items()) if (p, m) == (private, method)]
        each = [figures(setup, right) for right in own]
        samples[private, method] = drawn = []
        for draw, pick in zip(draws, picks, strict=True):
            some = [figures(setup, own[int(len(own) * share)], draw) for share in pick[: len(own)]]
            drawn.append({name: sum(one[name] for one in some) / len(some) for name in some[0]})
        found[private, method] = {name: _estimate(each, drawn, name) for name in each[0]}
    for (private, method), drawn in samples.items():
        against = samples.get((private, "sequential"))
        if method != "sequential" and against:
            ours, theirs = found[private, method]["forgetting"], found[private, "sequential"]["forgetting"]
            cuts = [
                1 - a["forgetting"] / b["forgetting"]
                for a, b in zip(drawn, against, strict=True)
                if b["forgetting"] > 0
            ]
            low, high = np.percentile(cuts, (2.5, 97.5)) if cuts else (float("nan"), float("nan"))
            cut = 1 - ours.value / theirs.value if theirs.value > 0 else float("nan")
            seeds = tuple(1 - a / b if b > 0 else float("nan") for a, b in zip(ours.seeds, theirs.seeds, strict=False))
            found[private, method]["cut"] = Estimate(cut, float(low), float(high), seeds)
    return found


def _estimate(each: Sequence[Mapping[str, float]], drawn: Sequence[Mapping[str, float]], name: str) -> Estimate:
    import numpy as np

    low, high = np.percentile([one[name] for one in drawn], (2.5, 97.5))
    values = tuple(one[name] for one in each)
    return Estimate(sum(values) / len(values), float(low), float(high), values)


def table(setup: Setup, rows: Mapping[str, Mapping[str, Any]], command: str) -> str:
    """The results as markdown."""
    wanted, cpu = jobs_of(setup), sum(r.get("train_cpu_s", 0) + r.get("score_cpu_s", 0) for r in rows.values())
    missing = [job for job in wanted if job.name not in rows]
    parts = [
        "# Domains one after another",
        (
            f"Made by `{command}`, which goes on where it was stopped; with `--table` it makes this page again from "
            f"`continual.jsonl`. {len(wanted) - len(missing)} of {len(wanted)} rounds, {cpu / 60:.0f} minutes of CPU."
        ),
        (
            f"Each figure in %: mean over seeds [95% interval: seeds and test records drawn anew, {DRAWS:,} times] "
            f"(each seed). CLINC150, {setup.test_records} test records a domain. 'When learnt': mean accuracy on each "
            "domain right after its own round. The cut is 1 - forgetting / forgetting of sequential."
        ),
        "Settings:\n\n" + "\n".join(f"- {name}: {_shown(value)}" for name, value in asdict(setup).items()),
    ]
    for field, head in (
        ("correct", "The likeliest of all labels of all domains, as a gate set asks"),
        ("correct_among_own", "The likeliest of its own domain's labels"),
    ):
        found = estimates(setup, lines_in(setup, rows, field))
        parts += [f"## {head}", *_tables(setup, found)]
    parts += ["## Accuracy after every round, all labels, mean over seeds in %", *_matrices(setup, rows)]
    if missing:
        parts += ["## Not run", "\n".join(_missing(missing))]
    return "\n\n".join(parts) + "\n"


def tried_table(setup: Setup, file: Path) -> str:
    """What each setting of TRIED reached on its own domain's test records, as markdown."""
    domain = setup.domains[0]
    lines = [
        f"## What was tried to close the gap at epsilon {setup.epsilon:g}",
        "",
        f"The first round alone, on {domain}: its accuracy in % (each seed). One thing is changed at a time.",
        "",
        "| changed | noise multiplier | records a step | among all labels | among its own |",
        "|---|---|---|---|---|",
    ]
    plain = [Job(False, seed, FIRST, 0) for seed in setup.seeds]
    for name, changes in {**TRIED, "without privacy": {}}.items():
        done = finished(file, replace(setup, **changes))
        jobs = plain if name == "without privacy" else tried_jobs(setup)
        rows = [done[job.name] for job in jobs if job.name in done]
        if rows:
            shares = [_shares([row[field][domain] for row in rows]) for field in ("correct", "correct_among_own")]
            lines.append(_row(name, [f"{rows[0]['sigma']:.2f}", rows[0]["expected_batch"], *shares]))
        else:
            lines.append(_row(name, ["not run", "", "", ""]))
    return "\n".join(lines) + "\n"


def _shares(flags: Sequence[str]) -> str:
    each = [100 * bits.count("1") / len(bits) for bits in flags]
    return f"{sum(each) / len(each):.1f} ({' '.join(f'{share:.1f}' for share in each)})"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part:g}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _tables(setup: Setup, found: Mapping[tuple[bool, str], Mapping[str, Estimate]]) -> Iterator[str]:
    for private in (False, True):
        yield f"### {f'Epsilon {setup.epsilon:g}, delta {setup.delta:g}' if private else 'Without privacy'}"
        columns = ("accuracy when learnt", "average accuracy", "backward transfer", "forgetting", "cut")
        lines = [
            "| method | when learnt | average at the end | backward transfer | forgetting | cut against sequential |",
            "|---|---|---|---|---|---|",
        ]
        rows = {method: row for method in setup.methods if (row := found.get((private, method)))}
        if not rows:
            yield "No line is whole yet."
            continue
        lines += [_row(method, [row.get(name, "-") for name in columns]) for method, row in rows.items()]
        domains = setup.domains[:-1]
        lines += ["", _row("forgetting of", domains), "|---" * (len(domains) + 1) + "|"]
        lines += [_row(method, [row[f"forgetting of {d}"] for d in domains]) for method, row in rows.items()]
        yield "\n".join(lines)


def _missing(jobs: Sequence[Job]) -> Iterator[str]:
    lines: dict[str, list[str]] = {}
    for job in jobs:
        lines.setdefault(job.name.rpartition("/")[0], []).append(str(job.number + 1))
    for name, numbers in lines.items():
        yield f"- {name}: rounds {', '.join(numbers)}"


def _row(head: str, cells: Sequence[Any]) -> str:
    return "| " + " | ".join((head, *map(str, cells))) + " |"


def _matrices(setup: Setup, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    lines = lines_in(setup, rows, "correct", whole=False)
    if base := rows.get("base"):
        shares = (f"{d} {100 * bits.count('1') / len(bits):.0f}" for d, bits in base["correct"].items())
        yield f"Base: {', '.join(shares)}."
    for private, method in dict.fromkeys((p, m) for p, m, _ in lines):
        own = [right for (p, m, _), right in sorted(lines.items()) if (p, m) == (private, method)]
        text = [
            f"{method}, {f'epsilon {setup.epsilon:g}' if private else 'without privacy'}:",
            "",
            "| after | " + " | ".join(setup.domains) + " |",
            "|---" * (len(setup.domains) + 1) + "|",
        ]
        for number, learnt in enumerate(setup.domains):
            found = [[float(right[number, d].mean()) for right in own if (number, d) in right] for d in setup.domains]
            if any(found):
                text.append(_row(learnt, [f"{100 * sum(each) / len(each):.0f}" if each else "" for each in found]))
        yield "\n".join(text)


def main() -> None:
    """Run what is missing, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only make the table from the lines there are")
    parser.add_argument("--reduced", action="store_true", help="two small domains, one seed; results under build/")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "clinc150")
    parser.add_argument("--bases", type=Path, default=ROOT / "workspace" / "bases", help="prepared base models")
    flags = parser.parse_args()
    setup = REDUCED if flags.reduced else Setup()
    folder = BUILD if flags.reduced else ROOT / "bench" / "results"
    out = folder / "continual.jsonl"
    if not flags.table:
        base = prepare_base(EMBEDDED, flags.bases)
        run(setup, base, flags.data, BUILD, out, flags.workers, ["base", *jobs_of(setup)])
        for changes in [] if flags.reduced else TRIED.values():
            run(replace(setup, **changes), base, flags.data, BUILD, out, flags.workers, tried_jobs(setup))
    command = ".venv/bin/python bench/continual.py --reduced" if flags.reduced else "make bench-continual"
    page = table(setup, finished(out, setup), command)
    if not flags.reduced:
        page += f"\n{tried_table(setup, out)}"
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
