"""What privacy costs: the ledger at 100,000 blocks and 10,000 rounds, the accountant against dp-accounting, the price
of choosing rounds as one goes, and the noise as a share of a step.

`make bench-privacy` prints tables and writes bench/results/privacy.json, in about four minutes. Times are wall time
unless they say CPU, which is of one thread. A shared machine moves all of them: ratios are of CPU time, from turns that
alternate.
"""

from __future__ import annotations

import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where this very file would stand in for the package `privacy`.
sys.path[0] = str(ROOT)

from privacy import accounting  # noqa: E402
from privacy.accounting import ORDERS, epsilon_from_rdp, rdp  # noqa: E402
from privacy.audit import audit  # noqa: E402
from privacy.chain import GENESIS, Charge, LedgerRow, hash_of  # noqa: E402
from privacy.ledger import Ledger  # noqa: E402
from privacy.policy import Policy  # noqa: E402

STREAM, POLICY = "support-desk", Policy("record", 8.0, 1e-5)
# Rounds. A reservation reads and writes the places of its 220 blocks in an index: in a short history many share a page,
# from about a thousand rounds on hardly any do. Growth is told for ten times the history from there on, and from 100.
TINY, SMALL, LARGE = 100, 1_000, 10_000
BLOCKS_A_ROUND, NEW, REPLAY = 10, 20, 200  # every block is new in two rounds
WARM_UP, MEASURED, AUDITS = 20, 100, 3
PLAN, ADAPTER = "a" * 64, "b" * 64
DELTA = 1e-5
Figures = dict[str, float]


# -- the ledger --------------------------------------------------------------------------------------------------------


def charges_of(names: Sequence[str], number: int, rng: random.Random, sigma: float) -> tuple[Charge, ...]:
    """New blocks of a round and a replay of older ones."""
    first = max(0, BLOCKS_A_ROUND * (number + 1) - NEW)
    new = [Charge(name, 0.25, sigma, 10) for name in names[first : BLOCKS_A_ROUND * (number + 1)]]
    old = rng.sample(range(first), min(REPLAY, first))
    return tuple(new + [Charge(names[at], 0.01, sigma, 10) for at in old])


def build(file: Path, rounds: int) -> str:
    """A ledger of so many whole rounds, written row by row past the filter, with the hashes it would have given."""
    url, rng = f"sqlite:///{file}", random.Random(7)  # noqa: S311
    ledger = Ledger(url)
    names = [f"{STREAM}/lane0-{number:07d}" for number in range(BLOCKS_A_ROUND * rounds)]
    sizes = [500 if at % 10 else rng.randint(1, 500) for at in range(len(names))]  # some were sealed by the clock
    ledger.register_blocks(STREAM, {n: POLICY.frozen(size) for n, size in zip(names, sizes, strict=True)})
    ledger.close()
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")
    db.execute("BEGIN")
    (blocks_head,) = db.execute("SELECT hash FROM blocks ORDER BY seq DESC LIMIT 1").fetchone()
    place = {name: at for at, name in enumerate(names, start=1)}
    fields = [name for name in LedgerRow.__dataclass_fields__ if name != "charges"]
    columns = ", ".join(f'"{name}"' for name in fields)
    head = GENESIS
    for seq in range(1, 3 * rounds + 1):
        number, step = divmod(seq - 1, 3)
        row = LedgerRow(
            seq=seq,
            stream=STREAM,
            round_id=f"{STREAM}-r{number:05d}",
            attempt=1,
            state=("reserved", "started", "committed")[step],
            plan_hash=PLAN,
            noise_source="system",
            adapter_sha256=ADAPTER if step == 2 else "",
            at="2026-01-01T00:00:00Z",
            # Calibrated noise has three decimals, so it repeats.
            charges=charges_of(names, number, rng, 6.0 + (number % 500) / 1000) if step == 0 else (),
            blocks_head=blocks_head,
            prev_hash=head,
        )
        head = hash_of(row)
        row = replace(row, hash=head)
        marks = ", ".join("?" * len(fields))
        db.execute(f"INSERT INTO ledger ({columns}) VALUES ({marks})", [getattr(row, name) for name in fields])  # noqa: S608
        numbers: dict[tuple[float, float, int], int] = {}
        beside = [
            (seq, at, place[charge.block_id], numbers.setdefault(charge.mechanism, at))
            for at, charge in enumerate(row.charges)
        ]
        db.executemany("INSERT INTO mechanisms VALUES (?, ?, ?, ?, ?)", [(seq, at, *m) for m, at in numbers.items()])
        db.executemany("INSERT INTO charges VALUES (?, ?, ?, ?)", beside)
    db.execute("COMMIT")
    db.close()
    return url


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def high(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20)[-1]


def measure_ledger(folder: Path) -> Figures:
    urls = {rounds: build(folder / f"{rounds}.db", rounds) for rounds in (TINY, SMALL, LARGE)}
    figures: Figures = {"blocks": BLOCKS_A_ROUND * LARGE, "rounds": LARGE, "file_mb": 0.0}
    figures["file_mb"] = round((folder / f"{LARGE}.db").stat().st_size / 1e6, 1)
    verified, audited = [], []
    for _ in range(AUDITS):
        accounting._prices.clear()  # noqa: SLF001 - as in a process that has just begun
        ledger = Ledger(urls[LARGE])
        audited.append(timed(lambda ledger=ledger: require_sound(ledger)))  # type: ignore[misc]
        verified.append(timed(ledger.verify_chain))
        ledger.close()
    for name, times in (("audit", audited), ("verify_chain", verified)):
        figures[f"{name}_s"] = round(statistics.median(wall for wall, _ in times), 2)
        figures[f"{name}_s_spread"] = round((max(w for w, _ in times) - min(w for w, _ in times)) / 2, 2)
        figures[f"{name}_cpu_s"] = round(statistics.median(cpu for _, cpu in times), 2)
    ledgers = {rounds: Ledger(url) for rounds, url in urls.items()}
    names = {rounds: ledger.blocks(STREAM) for rounds, ledger in ledgers.items()}
    rng = random.Random(1)  # noqa: S311
    spent: dict[int, list[tuple[float, float]]] = {rounds: [] for rounds in urls}
    whole: dict[int, list[float]] = {rounds: [] for rounds in urls}
    accounting._prices.clear()  # noqa: SLF001
    for turn in range(WARM_UP + MEASURED):
        for rounds, ledger in ledgers.items():
            # So much noise that the same new blocks can pay in every turn.
            charges = charges_of(names[rounds], rounds - 1, rng, 40.0 + turn / 1000)
            assert len(charges) == NEW + REPLAY
            reserved = timed(lambda: ledger.reserve(STREAM, f"x{turn}", 1, PLAN, charges))  # noqa: B023
            started = timed(lambda: ledger.start(f"x{turn}", 1, PLAN))  # noqa: B023
            committed = timed(lambda: ledger.commit(f"x{turn}", 1, PLAN, ADAPTER))  # noqa: B023
            spent[rounds].append(reserved)
            whole[rounds].append(reserved[1] + started[1] + committed[1])
    for rounds, times in spent.items():
        wall, cpu = ([1000 * t[at] for t in times[WARM_UP:]] for at in (0, 1))
        name = "reserve" if rounds == LARGE else f"reserve_at_{rounds}"
        figures[f"{name}_ms_p95"] = round(high(wall), 1)
        figures[f"{name}_ms_median"] = round(statistics.median(wall), 1)
        figures[f"{name}_cpu_ms_p95"] = round(high(cpu), 1)
        figures[f"{name}_cpu_ms_median"] = round(statistics.median(cpu), 1)
        figures[f"{name}_first_cpu_ms"] = round(1000 * times[0][1], 1)
        figures[f"{name.replace('reserve', 'round')}_cpu_ms_median"] = round(
            1000 * statistics.median(whole[rounds][WARM_UP:]), 1
        )
    for name, rounds in (("round_cost_growth", SMALL), ("round_cost_growth_from_100", TINY)):
        ratios = [b / a for a, b in zip(whole[rounds][WARM_UP:], whole[LARGE][WARM_UP:], strict=True)]
        figures[name] = round(statistics.median(ratios), 2)
    for ledger in ledgers.values():
        ledger.close()
    return figures


def require_sound(ledger: Ledger) -> None:
    report = audit(ledger, STREAM)
    assert len(report.blocks) == BLOCKS_A_ROUND * LARGE
    assert 0.0 < report.share_used_max <= 1.0


# -- the accountant ----------------------------------------------------------------------------------------------------

GRID = [
    (q, sigma, steps)
    for q in (0.001, 0.01, 0.05, 0.25, 0.5, 1.0)
    for sigma in (0.7, 1.0, 2.2, 6.0)
    for steps in (1, 30, 1000)
]
# Beyond this nobody trains, and the references' grids are not made for it.
EPSILON_MAX = 50.0


def references(rounds: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Epsilon by dp-accounting: RDP at our orders, and the privacy loss distribution."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    accountants = RdpAccountant(list(ORDERS)), PLDAccountant(value_discretization_interval=1e-3)
    for q, sigma, steps in rounds:
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        for accountant in accountants:
            accountant.compose(event, steps)
    by_rdp, by_pld = (float(accountant.get_epsilon(DELTA)) for accountant in accountants)
    return by_rdp, by_pld


def compare_accountants() -> Figures:
    print(f"\nepsilon at delta {DELTA:g}, schedule fixed in advance (epsilon up to {EPSILON_MAX:g})")
    titles = ("ours", "dp RDP", "ours/RDP", "dp PLD", "ours/PLD")
    print("".join(f"{title:>8s}" for title in ("q", "sigma", "steps")) + "".join(f"{title:>10s}" for title in titles))
    over_rdp, over_pld = [], []
    for q, sigma, steps in GRID:
        ours = epsilon_from_rdp(rdp(q, sigma, steps, ORDERS), ORDERS, DELTA)[0]
        if ours > EPSILON_MAX:
            continue
        by_rdp, by_pld = references([(q, sigma, steps)])
        over_rdp.append(ours / by_rdp)
        over_pld.append(ours / by_pld if by_pld > 0.05 else 1.0)
        shown = f"{ours / by_pld:>10.3f}" if by_pld > 0.05 else f"{'-':>10s}"
        print(f"{q:>8g}{sigma:>8g}{steps:>8d}{ours:>10.4f}{by_rdp:>10.4f}{ours / by_rdp:>10.6f}{by_pld:>10.4f}{shown}")
        assert by_pld <= ours
    return {
        "epsilon_over_reference": round(max(over_rdp), 9),
        "epsilon_over_reference_min": round(min(over_rdp), 9),
        "epsilon_over_pld_median": round(statistics.median(over_pld), 3),
        "grid_points": len(over_rdp),
    }


SCHEDULES = {
    "one round, q .25, sigma 2.2, 30 steps": [(0.25, 2.2, 30)],
    "and 8 replays at q .0625": [(0.25, 2.2, 30), *[(0.0625, 2.2, 30)] * 8],
    "1500 steps, q .02, sigma 1": [(0.02, 1.0, 1500)],
    "20 readings of a holdout, sigma 12": [(1.0, 12.0, 1)] * 20,
}
FIXED_ORDER = 8


def price_adaptivity() -> Figures:
    """The same rounds, by what may be chosen when. Only the first two columns are claims over adaptive rounds."""
    print(f"\nthe price of adaptivity: epsilon at delta {DELTA:g} of the same mechanisms")
    titles = (f"order {FIXED_ORDER} alone", f"filter of {len(ORDERS)}", "best order, full delta", "PLD")
    print(f"{'':40s}" + "".join(f"{title:>24s}" for title in titles))
    ratios = []
    for name, rounds in SCHEDULES.items():
        total = [sum(values) for values in zip(*(rdp(*one, ORDERS) for one in rounds), strict=True)]
        at = ORDERS.index(FIXED_ORDER)
        alone = epsilon_from_rdp(total[at : at + 1], ORDERS[at : at + 1], DELTA)[0]
        by_filter = epsilon_from_rdp(total, ORDERS, DELTA / len(ORDERS))[0]
        best = epsilon_from_rdp(total, ORDERS, DELTA)[0]
        found = (alone, by_filter, best, references(rounds)[1])
        ratios.append(by_filter / best)
        print(f"{name:40s}" + "".join(f"{value:>24.3f}" for value in found))
    return {"filter_over_fixed_in_advance": round(statistics.median(ratios), 3)}


# -- noise -------------------------------------------------------------------------------------------------------------

BATCHES = {"": 320, "_of_32_records": 32}  # params.yaml's expected batch, and a tenth of it
NOISE_TURNS = 3


def measure_noise() -> Figures:
    """CPU time of a step's draw and noise over the whole private step, 135M base, its prefix cached: the quickest."""
    import torch

    from learner.base import EMBEDDED, load_model, load_tokenizer, prepare_base
    from learner.lora import LoraModel
    from learner.plan import LoraSettings
    from learner.prefix import PrefixCache, SplitModel
    from learner.prompt import Renderer
    from learner.sampling import Unit, draw
    from learner.step import Example, Limits, Mechanism, PrivateStep
    from privacy.randomness import KeyedStream, RoundKey

    torch.set_num_threads(1)
    base = prepare_base(EMBEDDED, ROOT / "workspace" / "bases")
    limits = Limits(tokens_max=1024, rows_max=16)
    lora = LoraModel(load_model(base), LoraSettings(layers=6), limits.rows_max)
    lora.start_fresh(1)
    halves = SplitModel(lora.model, lora.layers[0])
    renderer = Renderer(load_tokenizer(base), "")
    sentences = ("where is my new card", "i was charged twice for one order, please refund one of them", "freeze it")
    figures: Figures = {"noise_parameters": len(lora.theta)}
    for name, rows in BATCHES.items():
        made = [
            Example(tuple(ids), start)
            for ids, start in (renderer.example(sentences[at % 3], "order question") for at in range(rows))
        ]
        cache = PrefixCache(halves, [example.ids for example in made], 1 << 30)
        cache.fill(range(rows), limits.tokens_max)
        units = [Unit(1.0, (at,)) for at in range(rows)]
        step = PrivateStep(lora, halves, cache, made, units, Mechanism(1.0, 1.0, rows), limits)
        shares, noises = [], []
        for turn in range(NOISE_TURNS + 1):
            stream = KeyedStream(RoundKey(bytes([turn + 1]) * 32), {"plan": "bench"}, turn)
            noise = timed(lambda: (draw(units, stream), stream.gaussians(len(lora.theta))))[1]  # noqa: B023
            whole = timed(lambda: step.gradient(stream))[1]  # noqa: B023
            if turn:  # the first warms up
                shares.append(noise / whole)
                noises.append(noise)
        figures[f"secure_noise_share_of_step{name}"] = round(statistics.median(shares), 4)
        figures[f"secure_noise_share_of_step{name}_spread"] = round((max(shares) - min(shares)) / 2, 4)
        figures["secure_noise_cpu_ms"] = round(1000 * statistics.median(noises), 1)
    return figures


def show(title: str, figures: Figures) -> None:
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:44s}{value:>14g}")


def main() -> None:
    # dp-accounting and torch's parts talk about their own deprecations.
    warnings.filterwarnings("ignore")
    begun = time.perf_counter()
    results: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        found = measure_ledger(Path(folder))
    show(f"the ledger, {NEW} new and {REPLAY} replay blocks a round", found)
    results |= found
    found = compare_accountants()
    show("the accountant against dp-accounting", found)
    results |= found
    results |= price_adaptivity()
    found = measure_noise()
    show("draw and noise of a private step, 135M base", found)
    results |= found
    results["took_s"] = round(time.perf_counter() - begun)
    out = ROOT / "bench" / "results" / "privacy.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
