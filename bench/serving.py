"""Serving, by engine and base: throughput in a batch, and what a swap costs those who ask meanwhile.

`make bench-serving` prints a table and adds to bench/results/serving.json; for a part of it: `bench/serving.py
--base tiny --part swaps`. Throughput is in CPU time of one thread, interleaved, medians with their spread: a waiting
OpenMP thread burns CPU time that no answer asked for. Latencies are wall time over HTTP from a process of its own, at
70% of the rate at which the server saturates, by a plan of Poisson arrivals. Windows with a swap and without take
turns; the two of a pair have the same arrivals and questions. Each version is new to the server: it is fetched,
checked, loaded and probed. In the same way windows beside a round take turns with windows without one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where this very file would stand in for the package `serving`.
sys.path[0] = str(ROOT)

import httpx  # noqa: E402
import psutil  # noqa: E402
import structlog  # noqa: E402
import torch  # noqa: E402

from learner.base import EMBEDDED, Base, load_model, load_tokenizer, prepare_base  # noqa: E402
from learner.plan import LoraSettings  # noqa: E402
from learner.prompt import Renderer  # noqa: E402
from privacy.signing import SigningKey  # noqa: E402
from serving.engine import Engine, Piece, Sampling  # noqa: E402
from serving.inprocess import InProcessEngine  # noqa: E402
from serving.router import POLL_S  # noqa: E402
from serving.server import running  # noqa: E402
from serving.swap import HotSwap  # noqa: E402
from serving.vllm import VllmEngine  # noqa: E402
from tests.serving.adapters import ALL_TARGETS, random_adapter  # noqa: E402
from tests.serving.fleet import KEY, free_port  # noqa: E402
from tests.serving.registry import MODEL, Registry, trusted  # noqa: E402
from tests.serving.vllm_server import KEY as VLLM_KEY  # noqa: E402
from tests.serving.vllm_server import python, vllm_server  # noqa: E402
from tests.tiny import tiny_base  # noqa: E402
from tidegate.serve import engine_threads  # noqa: E402

DRIVER = ROOT / "bench" / "drivers" / "openloop.py"
ROUNDS = ROOT / "bench" / "drivers" / "rounds.py"
RESULTS = ROOT / "bench" / "results" / "serving.json"
BATCH = 16
OK = 200
# Long enough that writing counts, not only reading the question.
TOKENS = 32
SHARE_OF_SATURATION = 0.7
# Of a run that is done in parts: `--swaps 10`, and once more with `--add`.
SAMPLES = ROOT / "workspace" / "bench-serving.json"
SWAPS = 20
ROUTER_PAIRS = 3
WARM_S = 2.0
PARTS = ("throughput", "swaps", "round", "router")
THREADS = engine_threads(2)  # as the server, by the default of `service.threads`
PROMPTS = (
    "where is my new card",
    "i was charged twice for the same order, can you check what happened and refund one",
    "freeze my account",
    "what is the exchange rate for euros at the moment",
    "my transfer has not arrived after three days",
    "change the pin",
    "how do i close the joint account that i opened with my brother",
    "is there a limit on how much cash i can take out in a day",
)
LABELS = ("card_arrival", "charged_twice", "freeze", "exchange_rate", "transfer_late", "change_pin", "close", "limit")


@dataclass(frozen=True)
class Size:
    """How much to ask of one base.

    Attributes:
        repeats: of each way to compute a batch.
        saturating_s: how long clients ask without a pause.
        requests: at 70% of saturation, half of them in windows with a swap.
        answer_tokens: most of an answer there; a label has so many.
        stream: whether answers are streamed: where one takes seconds, its beginning is what is waited for.
        window_s_min: a window holds a whole swap.
    """

    repeats: int
    saturating_s: float
    requests: int
    answer_tokens: int
    stream: bool
    window_s_min: float = 2.0
    swaps: int = SWAPS


# Poisson arrivals: a plan for 2,100 has at least 2,000 but once in a hundred.
SIZES = {"tiny": Size(5, 8.0, 2100, 6, stream=False), "135M": Size(3, 24.0, 2100, 6, stream=True)}


# Engines. Each gives an engine on a base for as long as a `with` lasts; `folder` is for whatever it keeps.


@contextmanager
def in_process(base: Base, folder: Path, threads: int) -> Iterator[Engine]:  # noqa: ARG001 - others keep things there
    with InProcessEngine(base, threads=threads, batch_max=BATCH) as engine:
        yield engine


@contextmanager
def on_vllm(base: Base, folder: Path, threads: int) -> Iterator[Engine]:  # noqa: ARG001 - vLLM takes all cores
    folder.mkdir(parents=True, exist_ok=True)
    with (
        vllm_server(base, folder) as server,
        VllmEngine(base, server.url, folder, key=VLLM_KEY, batch_max=BATCH) as engine,
    ):
        while not engine.healthy:
            time.sleep(0.05)
        yield engine


ENGINES = {"inprocess": in_process, "vllm": on_vllm}
SLOWER = {("vllm", "135M"): 8.0}


# Throughput of a batch


def throughput(base: Base, adapter: Path, size: Size) -> dict[str, Any]:
    """CPU time for BATCH greedy answers of at most TOKENS tokens, three ways, and for scoring labels."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), str(adapter)).eval()
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer)
    prompts = [*PROMPTS, *(f"please, {prompt}" for prompt in PROMPTS)][:BATCH]
    rows = [renderer.prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def generate_loop() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=[renderer.end_id],
            pad_token_id=pad,
        )

    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {}
    with InProcessEngine(base, threads=1, batch_max=BATCH) as engine:
        engine.load("a", adapter)
        ways: dict[str, Callable[[], object]] = {
            "single": lambda: [engine.generate("a", [prompt], TOKENS) for prompt in prompts],
            "batch": lambda: engine.generate("a", prompts, TOKENS),
            "generate_loop": generate_loop,
            "score_one": lambda: engine.score_labels("a", [f"{p} {time.monotonic_ns()}" for p in PROMPTS], LABELS),
            "score_two": lambda: engine.ask(["a", None], PROMPTS, LABELS),
        }
        engine.score_labels("a", PROMPTS, LABELS)
        for way in ("batch", "generate_loop"):
            ways[way]()  # warms up
        for _ in range(size.repeats):
            for name, way in ways.items():
                spent.setdefault(name, []).append(cpu_s(way))
    median = {way: statistics.median(times) for way, times in spent.items()}
    return {
        "batch_over_generate_loop": median["generate_loop"] / median["batch"],
        "batch_over_single": median["single"] / median["batch"],
        "answers_per_cpu_s": BATCH / median["batch"],
        "score_ms_per_prompt": 1000 * median["score_one"] / len(PROMPTS),
        "score_two_over_one": median["score_two"] / median["score_one"],
        "cpu_s": {way: {"median": median[way], "min": min(t), "max": max(t)} for way, t in spent.items()},
    }


def cpu_s(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


# Swaps under load


@dataclass(frozen=True)
class Window:
    """A stretch of the plan; `click_s` is when a new version gets into Production, None in a window without a swap."""

    begin_s: float
    end_s: float
    click_s: float | None


def bodies(size: Size) -> list[dict[str, Any]]:
    plain = {"model": MODEL, "max_tokens": size.answer_tokens, "temperature": 0, "stream": size.stream}
    return [{**plain, "messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]


@contextmanager
def driven(plan: dict[str, Any], folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Answers to a plan of the driver's; the list is filled when the block is over."""
    rows: list[dict[str, Any]] = []
    asked, answers = folder / "plan.json", folder / "answers.jsonl"
    asked.write_text(json.dumps(plan))
    driver = subprocess.Popen([sys.executable, str(DRIVER), str(asked), str(answers)])
    try:
        yield rows
        if driver.wait() != 0:
            raise RuntimeError(f"{DRIVER.name}: exit code {driver.returncode}, must be 0")
    finally:
        driver.kill()
    rows += [json.loads(line) for line in answers.read_text().splitlines()]


def saturation(url: str, size: Size, folder: Path) -> float:
    """Answers a second when more ask than a batch holds."""
    begin = time.monotonic() + WARM_S
    plan = {"url": url, "bodies": bodies(size), "clients": 2 * BATCH, "until_s": begin + size.saturating_s}
    with driven(plan, folder) as rows:
        pass
    counted = [row for row in rows if begin <= row["done_s"] <= begin + size.saturating_s]
    if any(row["status"] != OK for row in rows):
        raise RuntimeError("saturation: an answer failed; raise queue_max")
    return len(counted) / size.saturating_s


def planned(rate: float, size: Size, seed: int) -> tuple[list[tuple[float, int]], list[Window]]:
    """Poisson arrivals in pairs of windows: without a swap and with one, in random order, with the same arrivals."""
    chance = random.Random(seed)  # noqa: S311 - nobody is kept from guessing arrivals
    window_s = max(size.window_s_min, size.requests / rate / (2 * size.swaps))
    begin_s = time.monotonic() + 3  # the driver starts meanwhile
    due: list[tuple[float, int]] = []
    windows = []
    for _ in range(size.swaps):
        arrivals, at = [], chance.expovariate(rate)
        while at < window_s:
            arrivals.append((at, chance.randrange(len(PROMPTS))))
            at += chance.expovariate(rate)
        for swapping in chance.sample([True, False], 2):
            windows.append(Window(begin_s, begin_s + window_s, begin_s + window_s / 5 if swapping else None))
            due += [(begin_s + at, number) for at, number in arrivals]
            begin_s += window_s
    return due, windows


def swaps(
    name: str, base: Base, adapters: dict[int, Path], size: Size, threads: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Answers over HTTP while versions change, and while they do not, in turns."""
    with served(name, base, adapters, threads, folder) as (server, engine, swap, registry):
        rate = SHARE_OF_SATURATION * (most := saturation(server, size, folder))
        due, windows = planned(rate, size, seed)
        load_s, flipped_s = [], []
        with driven({"url": server, "bodies": bodies(size), "due_s": due}, folder) as rows:
            version = 1
            for window in windows:
                if window.click_s is not None:
                    time.sleep(max(0.0, window.click_s - time.monotonic()))
                    version += 1
                    registry.promote(version)
                    while swap.current.version != version:
                        time.sleep(0.002)
                    flipped_s.append(time.monotonic())
                    load_s.append(swap.state()["swap_s"])
        if swap.alarms:
            raise RuntimeError(f"swaps: alarms {swap.alarms}, must be none")
        said = expected(engine, adapters, size)
    return sampled(rows, windows, said, flipped_s) | {
        "load_s": load_s,
        "saturation_per_s": [most],
        "asked_per_s": [rate],
    }


def beside_round(
    name: str, base: Base, adapters: dict[int, Path], size: Size, threads: int, folder: Path
) -> dict[str, float]:
    """Answers over HTTP while a round takes private steps on the same machine, and while none does, in turns."""
    with ExitStack() as open_parts:
        server, *_ = open_parts.enter_context(served(name, base, adapters, threads, folder))
        rate = SHARE_OF_SATURATION * saturation(server, size, folder)
        command = [sys.executable, str(ROUNDS), str(base.path)]
        rounds = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        open_parts.callback(rounds.wait)
        open_parts.callback(rounds.kill)
        assert rounds.stdout
        for _ in range(2):
            if not rounds.stdout.readline():
                raise RuntimeError(f"{ROUNDS.name}: exit code {rounds.wait()}, must run on")
        rounds.send_signal(signal.SIGSTOP)
        cpu = psutil.Process(rounds.pid)
        begun_s = sum(cpu.cpu_times()[:2])
        due, windows = planned(rate, size, 0)
        with driven({"url": server, "bodies": bodies(size), "due_s": due}, folder) as rows:
            for window in windows:
                time.sleep(max(0.0, window.begin_s - time.monotonic()))
                if window.click_s is not None:
                    rounds.send_signal(signal.SIGCONT)
                    time.sleep(max(0.0, window.end_s - time.monotonic()))
                    rounds.send_signal(signal.SIGSTOP)
        spent_s = sum(cpu.cpu_times()[:2]) - begun_s
    if any(row["status"] != OK for row in rows):
        raise RuntimeError("beside a round: an answer failed, none may")
    took = pairs_of(rows, windows)
    return {
        "round_p99_ratio": p99_ratio(took),
        "round_p99_ratio_se": p99_ratio_se(took),
        "round_cores": spent_s / sum(window.end_s - window.begin_s for window in windows if window.click_s is not None),
    }


@contextmanager
def served(
    name: str, base: Base, adapters: dict[int, Path], threads: int, folder: Path
) -> Iterator[tuple[str, Engine, HotSwap, Registry]]:
    """A server whose version 1 answers: its address, and what is behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(SigningKey.load_or_create(folder / "approvals.pem"), dict(adapters))
    source = {"wanted": registry.wanted, "fetch": registry.fetch, "acknowledge": registry.acknowledge}
    with ENGINES[name](base, folder / name, threads) as engine:
        swap = HotSwap(MODEL, engine, cache=folder / "cache", trusted=trusted(registry.signer), **source)
        registry.promote(1)
        with running([swap], answer_key=KEY) as url:
            while not (swap.current and swap.current.version == 1):
                time.sleep(0.01)
            yield url, engine, swap, registry


def through_router(
    name: str, base: Base, adapters: dict[int, Path], size: Size, threads: int, folder: Path
) -> dict[str, Any]:
    """Throughput of one saturated server, asked by itself and through a router before it, in turns."""
    with ExitStack() as open_parts:
        url, *_ = open_parts.enter_context(served(name, base, adapters, threads, folder))
        port = free_port()
        command = [sys.executable, "-m", "tests.serving.fleet", "route", str(folder), str(port), url]
        router = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "POLL_S": str(POLL_S)})
        open_parts.callback(router.kill)
        before = f"http://127.0.0.1:{port}"
        while not is_ready(before):
            time.sleep(0.05)
        size = replace(size, saturating_s=size.saturating_s * 2 / 3)
        saturation(before, replace(size, saturating_s=size.saturating_s / 2), folder)  # warms up
        cpu = psutil.Process(router.pid)
        rates: dict[str, list[float]] = {url: [], before: []}
        spent_s = 0.0
        for pair in range(ROUTER_PAIRS):
            for where in (url, before) if pair % 2 else (before, url):
                begun_s = sum(cpu.cpu_times()[:2])
                rates[where].append(saturation(where, size, folder))
                spent_s += sum(cpu.cpu_times()[:2]) - begun_s if where == before else 0.0
    lost = [1 - routed / direct for direct, routed in zip(rates[url], rates[before], strict=True)]
    return {
        "router_overhead": statistics.mean(lost),
        "router_overhead_se": statistics.stdev(lost) / len(lost) ** 0.5,
        "router_cpu_ms": 1000 * spent_s / (sum(rates[before]) * (size.saturating_s + WARM_S)),
        "direct_per_s": statistics.mean(rates[url]),
        "routed_per_s": statistics.mean(rates[before]),
    }


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def expected(engine: Engine, adapters: dict[int, Path], size: Size) -> dict[tuple[str, int], str]:
    """What each version says to each question, asked when nothing else is."""

    async def say(adapter: str, prompt: str) -> str:
        ids = engine.render([{"role": "user", "content": prompt}])
        answer = await engine.submit(adapter, ids, Sampling(size.answer_tokens))
        return "".join([event.text async for event in answer if isinstance(event, Piece)])

    async def all_of(adapter: str) -> list[str]:
        return await asyncio.gather(*(say(adapter, prompt) for prompt in PROMPTS))

    said = {}
    for version, folder in adapters.items():
        engine.load(f"expected@{version}", folder)
        answers = asyncio.run(all_of(f"expected@{version}"))
        engine.unload(f"expected@{version}")
        said |= {(f"{MODEL}@{version}", number): text for number, text in enumerate(answers)}
    if len({said[f"{MODEL}@{version}", 0] for version in adapters}) < len(adapters):
        raise RuntimeError("adapters: two say the same, all must differ; a mixed answer would not be seen")
    return said


def sampled(
    rows: list[dict[str, Any]], windows: list[Window], said: dict[tuple[str, int], str], flipped_s: list[float]
) -> dict[str, Any]:
    """What is kept of answers: lists, to which another part of the run may be added.

    Args:
        rows: the driver's.
        windows: when they were asked.
        said: what each version says to each question.
        flipped_s: when each version began to take new requests.
    """
    good = [row for row in rows if row["status"] == OK]
    clicks = [window.click_s for window in windows if window.click_s is not None]
    first = {row["version"]: row for row in sorted(good, key=lambda row: -row["first_s"])}
    answers = [first[f"{MODEL}@{number}"] for number in range(2, len(clicks) + 2)]
    return {
        "requests": [len(rows)],
        "failed": [len(rows) - len(good)],
        "mixed": [sum(said.get((row["version"], row["body"])) != row["said"] for row in good)],
        "took": pairs_of(good, windows),
        "click_to_answer_s": [row["first_s"] - click for row, click in zip(answers, clicks, strict=True)],
        "nobody_asked_s": [max(0.0, row["due_s"] - at) for row, at in zip(answers, flipped_s, strict=True)],
    }


def pairs_of(rows: list[dict[str, Any]], windows: list[Window]) -> list[tuple[list[float], list[float]]]:
    """Seconds of the answers, by pair of windows: without and with what is compared."""
    took: list[tuple[list[float], list[float]]] = [([], []) for _ in range(len(windows) // 2)]
    for row in rows:
        at = next(number for number, window in enumerate(windows) if row["due_s"] < window.end_s)
        took[at // 2][windows[at].click_s is not None].append(row["done_s"] - row["due_s"])
    return took


def judged(samples: dict[str, list[Any]]) -> dict[str, float | int]:
    """Figures of the samples."""
    took, clicks, loads = samples["took"], samples["click_to_answer_s"], samples["load_s"]
    idle = samples["nobody_asked_s"]
    n = len(idle)
    quiet, swapping = ([s for pair in took for s in pair[kind]] for kind in (0, 1))
    return {name: sum(samples[name]) for name in ("requests", "failed", "mixed")} | {
        "swaps": len(clicks),
        "p99_ratio": p99_ratio(took),
        "p99_ratio_se": p99_ratio_se(took),
        "p50_quiet_s": percentile(quiet, 50),
        "p50_swapping_s": percentile(swapping, 50),
        "p99_quiet_s": percentile(quiet, 99),
        "p99_swapping_s": percentile(swapping, 99),
        "click_to_answer_s": statistics.median(clicks),
        "click_to_answer_s_max": max(clicks),
        "nobody_asked_s": statistics.median(idle),
        "click_over_load_s": statistics.median(
            c - s - i for c, s, i in zip(clicks[-n:], loads[-n:], idle, strict=True)
        ),
        "load_s": statistics.median(loads),
        "load_s_max": max(loads),
        "saturation_per_s": statistics.mean(samples["saturation_per_s"]),
        "asked_per_s": statistics.mean(samples["asked_per_s"]),
    }


def p99_ratio(took: list[tuple[list[float], list[float]]]) -> float:
    quiet, swapping = ([s for pair in took for s in pair[kind]] for kind in (0, 1))
    return percentile(swapping, 99) / percentile(quiet, 99)


def p99_ratio_se(took: list[tuple[list[float], list[float]]]) -> float:
    """Its standard error, by drawing pairs of windows anew (Efron 1979)."""
    chance = random.Random(1)  # noqa: S311 - nobody is kept from guessing
    return statistics.stdev(p99_ratio(chance.choices(took, k=len(took))) for _ in range(300))


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


# All of it


def versions(base: Base, count: int, folder: Path) -> dict[int, Path]:
    """Adapters in the shape of a round's."""
    depth = json.loads((base.path / "config.json").read_text())["num_hidden_layers"]
    layers = tuple(range(max(0, depth - 6), depth))
    shape = LoraSettings(r=16, alpha=16.0)
    made = {version: folder / str(version) for version in range(1, count + 1)}
    for version, path in made.items():
        random_adapter(base, path, version, layers=layers, targets=ALL_TARGETS, shape=shape, scale=0.15)
    return made


def measure(engine: str, name: str, base: Base, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of one engine on one base."""
    size = SIZES[name]
    size = replace(size, swaps=options.swaps, requests=options.requests or size.requests * options.swaps // SWAPS)
    adapters = versions(base, size.swaps + 1, folder / name)
    # vLLM on a CPU needs tens of seconds for a batch of this base with adapters.
    size = replace(size, saturating_s=size.saturating_s * SLOWER.get((engine, name), 1.0))
    figures: dict[str, Any] = {}
    parts = options.part or PARTS
    if "throughput" in parts and engine == "inprocess":
        figures |= throughput(base, adapters[1], size)
    if "swaps" in parts:
        known = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
        before = known.get(f"{engine} {name}", {}) if options.add else {}
        found = swaps(engine, base, adapters, size, options.threads, len(before.get("took", [])), folder / name)
        samples = {key: [*before.get(key, []), *values] for key, values in found.items()}
        SAMPLES.parent.mkdir(exist_ok=True)
        SAMPLES.write_text(json.dumps(known | {f"{engine} {name}": samples}))
        figures |= judged(samples)
    if "round" in parts and engine == "inprocess":
        figures |= beside_round(engine, base, adapters, size, options.threads, folder / name / "round")
    if "router" in parts and engine == "vllm":
        figures |= through_router(engine, base, adapters, size, options.threads, folder / name / "router")
    return figures


def show(results: dict[str, dict[str, Any]]) -> None:
    """A line a figure, a column an engine and base."""
    columns = list(results)
    print(f"{'':26}" + "".join(f"{column:>18}" for column in columns))
    for key in dict.fromkeys(key for column in columns for key in results[column]):
        if key != "cpu_s":
            cells = [results[column].get(key) for column in columns]
            print(f"{key:26}" + "".join(f"{'':>18}" if cell is None else f"{cell:18.3f}" for cell in cells))
    for column in columns:
        for way, t in results[column].get("cpu_s", {}).items():
            print(f"{column} {way}: {t['median']:.3f} CPU s ({t['min']:.3f} to {t['max']:.3f})")


def main() -> None:
    """Measure what is asked for, add it to what is known, print all."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--engine", choices=ENGINES, action="append", help="default: all")
    asked.add_argument("--base", choices=SIZES, action="append", help="default: all")
    asked.add_argument("--part", choices=PARTS, action="append", help="default: all")
    asked.add_argument("--swaps", type=int, default=SWAPS, help="default: 20, and 2100 requests")
    asked.add_argument("--requests", type=int, help="at 70%% of saturation; default: 105 a swap")
    asked.add_argument("--add", action="store_true", help="to the samples of a run before")
    asked.add_argument("--threads", type=int, default=THREADS, help="of the in-process engine")
    options = asked.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="bench-serving-"))
    wanted = options.engine or list(ENGINES)
    if python() is None and "vllm" in wanted:
        print("vllm is left out: `make vllm` builds its environment")
        wanted.remove("vllm")
    bases = {
        # vLLM's attention on a CPU has no heads of 16.
        "tiny": lambda engine: tiny_base(folder / f"tiny-{engine}", hidden=64 if engine == "vllm" else 32),
        "135M": lambda _engine: prepare_base(
            EMBEDDED, Path(os.environ.get("TIDEGATE_BASES", ROOT / "workspace" / "bases"))
        ),
    }
    try:
        for name in options.base or SIZES:
            for engine in wanted:
                found = measure(engine, name, bases[name](engine), options, folder / engine)
                column = f"{engine} {name}"
                results[column] = results.get(column, {}) | found
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    finally:
        shutil.rmtree(folder)
    show(results)
    print(f"written: {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
