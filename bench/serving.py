"""Serving on the tiny and the 135M base: throughput in a batch, and what a swap costs those who ask meanwhile.

`make bench-serving` prints a table and writes bench/results/serving.json. Throughput is in CPU time, interleaved,
medians with their spread; latencies are wall time of whole answers over HTTP, on whatever else the machine does.
One thread, because a waiting OpenMP thread burns CPU time that no answer asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where this very file would stand in for the package `serving`.
sys.path[0] = str(ROOT)

import httpx  # noqa: E402
import structlog  # noqa: E402
import torch  # noqa: E402

from learner.base import EMBEDDED, Base, load_model, load_tokenizer, prepare_base  # noqa: E402
from learner.prompt import Renderer  # noqa: E402
from privacy.signing import SigningKey  # noqa: E402
from serving.inprocess import InProcessEngine  # noqa: E402
from serving.server import running  # noqa: E402
from serving.swap import HotSwap  # noqa: E402
from tests.serving.adapters import random_adapter  # noqa: E402
from tests.serving.registry import MODEL, Registry, trusted  # noqa: E402
from tests.tiny import tiny_base  # noqa: E402

BATCH = 8
TOKENS = 12
CLIENTS = 4
POLL_S = 0.1
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
    """How long to measure one base."""

    repeats: int
    windows: int
    window_s: float


SIZES = {"tiny": Size(5, 3, 4.0), "135M": Size(3, 3, 9.0)}


def cpu_s(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def throughput(base: Base, adapter: Path, size: Size) -> dict[str, list[float]]:
    """CPU seconds for BATCH greedy answers of at most TOKENS tokens, three ways, and for scoring labels."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), str(adapter)).eval()
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer)
    rows = [renderer.prompt_ids(prompt) for prompt in PROMPTS]
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

    spent: dict[str, list[float]] = {}
    with InProcessEngine(base, threads=1, batch_max=BATCH) as engine:
        engine.load("a", adapter)
        ways: dict[str, Callable[[], object]] = {
            "single": lambda: [engine.generate("a", [prompt], TOKENS) for prompt in PROMPTS],
            "batch": lambda: engine.generate("a", PROMPTS, TOKENS),
            "generate_loop": generate_loop,
            "score_one": lambda: engine.score_labels("a", [f"{p} {time.monotonic_ns()}" for p in PROMPTS], LABELS),
            "score_two": lambda: engine.ask(["a", None], PROMPTS, LABELS),
        }
        engine.score_labels("a", PROMPTS, LABELS)
        for repeat in range(-1, size.repeats):
            for name, way in ways.items():
                took = cpu_s(way)
                if repeat >= 0:  # the first round warms up
                    spent.setdefault(name, []).append(took)
    return spent


@dataclass
class Load:
    """Clients that ask without a pause, and what they saw."""

    url: str
    expected: dict[str, str]
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    first_seen: dict[str, float] = field(default_factory=dict)
    failed: int = 0
    mixed: int = 0
    swapping: bool = False
    ended: bool = False

    def ask(self) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPTS[0]}],
            "max_tokens": TOKENS,
            "temperature": 0,
        }
        with httpx.Client(timeout=120) as client:
            while not self.ended:
                swapping, begin = self.swapping, time.monotonic()
                reply = client.post(f"{self.url}/v1/chat/completions", json=body)
                if reply.status_code != 200:
                    self.failed += 1
                    continue
                self.seconds[swapping].append(time.monotonic() - begin)
                version = reply.headers["x-tidegate-version"]
                self.first_seen.setdefault(version, time.monotonic())
                answer = reply.json()
                said = answer["choices"][0]["message"]["content"]
                self.mixed += answer["tidegate"]["version"] != version or said != self.expected[version]


def swaps(base: Base, adapters: dict[int, Path], size: Size, folder: Path) -> dict[str, float]:
    """Answers over HTTP while versions change, and while they do not, in turns."""
    registry = Registry(SigningKey.load_or_create(folder / "approvals.pem"), dict(adapters))
    source = {"wanted": registry.wanted, "fetch": registry.fetch, "acknowledge": registry.acknowledge}
    with ExitStack() as open_parts:
        engine = open_parts.enter_context(InProcessEngine(base, threads=1, batch_max=BATCH))
        cache = folder / "cache"
        swap = HotSwap(MODEL, engine, cache=cache, trusted=trusted(registry.signer), poll_seconds=POLL_S, **source)
        expected = {}
        load_s = []
        for version, adapter in adapters.items():
            begin = time.monotonic()
            engine.load("check", adapter)
            engine.probe("check")
            load_s.append(time.monotonic() - begin)
            expected[f"{MODEL}@{version}"] = engine.generate("check", PROMPTS[:1], TOKENS)[0]
        engine.unload("check")
        registry.promote(1)
        url = open_parts.enter_context(running([swap], answer_key=os.urandom(32)))
        while swap.current is None:
            time.sleep(0.01)
        load = Load(url, expected)
        clients = [threading.Thread(target=load.ask) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        clicks, version = [], 1
        for window in range(2 * size.windows):
            load.swapping = window % 2 == 1
            end = time.monotonic() + size.window_s
            while load.swapping and time.monotonic() < end:
                version = version % len(adapters) + 1
                clicks.append(click_to_answer_s(load, registry, version))
            time.sleep(max(0.0, end - time.monotonic()))
        load.ended = True
        for client in clients:
            client.join()
    p99 = {swapping: percentile(seconds, 99) for swapping, seconds in load.seconds.items()}
    return {
        "answers": sum(map(len, load.seconds.values())),
        "swaps": len(clicks),
        "failed": load.failed,
        "mixed": load.mixed,
        "p99_quiet_s": p99[False],
        "p99_swapping_s": p99[True],
        "p99_ratio": p99[True] / p99[False],
        "click_to_answer_s": statistics.median(clicks),
        "load_s": statistics.median(load_s),
    }


def click_to_answer_s(load: Load, registry: Registry, version: int) -> float:
    """From the stage Production to the first answer of that version."""
    name = f"{MODEL}@{version}"
    load.first_seen.pop(name, None)
    begin = time.monotonic()
    registry.promote(version)
    while name not in load.first_seen:
        time.sleep(0.002)
    return load.first_seen[name] - begin


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def measure(name: str, base: Base, folder: Path) -> dict[str, object]:
    adapters = {}
    for version in range(1, 5):
        adapters[version] = folder / name / str(version)
        depth = json.loads((base.path / "config.json").read_text())["num_hidden_layers"]
        layers = tuple(range(max(0, depth - 6), depth))
        random_adapter(base, adapters[version], version, layers=layers)
    spent = throughput(base, adapters[1], SIZES[name])
    median = {way: statistics.median(times) for way, times in spent.items()}
    figures: dict[str, object] = {
        "batch_over_single": median["single"] / median["batch"],
        "batch_over_generate_loop": median["generate_loop"] / median["batch"],
        "answers_per_cpu_s": BATCH / median["batch"],
        "score_ms_per_prompt": 1000 * median["score_one"] / len(PROMPTS),
        "score_two_over_one": median["score_two"] / median["score_one"],
        "cpu_s": {way: {"median": median[way], "min": min(t), "max": max(t)} for way, t in spent.items()},
    }
    return figures | swaps(base, adapters, SIZES[name], folder / name)


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(1)
    results = {}
    folder = Path(tempfile.mkdtemp(prefix="bench-serving-"))
    try:
        bases = Path(os.environ.get("TIDEGATE_BASES", folder / "bases"))
        results["tiny"] = measure("tiny", tiny_base(folder / "tiny-base"), folder)
        results["135M"] = measure("135M", prepare_base(EMBEDDED, bases), folder)
    finally:
        shutil.rmtree(folder)
    print(f"{'':28}" + "".join(f"{name:>12}" for name in results))
    for key in next(iter(results.values())):
        if key != "cpu_s":
            print(f"{key:28}" + "".join(f"{result[key]:12.3f}" for result in results.values()))
    for name, result in results.items():
        for way, t in result["cpu_s"].items():
            print(f"{name} {way}: {t['median']:.3f} CPU s ({t['min']:.3f} to {t['max']:.3f})")
    out = ROOT / "bench" / "results" / "serving.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
