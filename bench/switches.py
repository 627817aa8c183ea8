"""What the switches of one private step cost and save on this machine, on the 135M base.

`make bench-switches` prints a table and writes bench/results/switches.json. Each setting runs in a process of its own,
one thread, over the same records; time is CPU time of one clipped sum, the median of a few; memory is how far the
process grows during one. `compile` is about torch.compile and `assembling` about prefetch, which the product does
not have: docs/tuning.md says why.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where bench/learner.py would stand in for the package `learner`.
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from learner.base import EMBEDDED, Base, load_model, load_tokenizer, prepare_base  # noqa: E402
from learner.lora import LoraModel  # noqa: E402
from learner.plan import LoraSettings  # noqa: E402
from learner.precision import DTYPES, fastest, probe  # noqa: E402
from learner.prefix import PrefixCache, SplitModel  # noqa: E402
from learner.prompt import Renderer  # noqa: E402
from learner.sampling import Unit  # noqa: E402
from learner.step import Example, Limits, Mechanism, PrivateStep  # noqa: E402
from privacy.randomness import KeyedStream, TestKey  # noqa: E402

RECORDS = 32
TURNS = 3
SENTENCES = (
    "where is my new card",
    "i was charged twice for the same order, can you check what happened and refund one of them please",
    "freeze my account",
    "what is the exchange rate for euros at the moment and is there a fee for paying abroad",
)
UPPER = LoraSettings(layers=6)
# Every layer: where keeping activations costs most. A small rank, so that they and not the gradients fill the memory.
DEEP = LoraSettings(r=2, layers=0)
# What each child process measures: name, and what of the settings differs.
SETTINGS: dict[str, tuple[str, str, LoraSettings]] = {
    "kept": ("fp32", "none", DEEP),
    "reentrant": ("fp32", "reentrant", DEEP),
    "non-reentrant": ("fp32", "non-reentrant", DEEP),
    "fp32": ("fp32", "none", UPPER),
    "bf16": ("bf16", "none", UPPER),
}


def examples() -> list[Example]:
    renderer = Renderer(load_tokenizer(base()), "")
    made = []
    for i in range(RECORDS):
        ids, start = renderer.example(SENTENCES[i % len(SENTENCES)], SENTENCES[(3 * i) % len(SENTENCES)][:14])
        made.append(Example(tuple(ids), start))
    return made


def base() -> Base:
    return prepare_base(EMBEDDED, ROOT / "workspace" / "bases")


def private_step(precision: str, recompute: str, settings: LoraSettings) -> tuple[PrivateStep, PrefixCache]:
    lora = LoraModel(load_model(base(), DTYPES[precision]), settings, RECORDS)
    lora.start_fresh(1)
    generator = torch.Generator().manual_seed(1)
    for slot in lora.slots:
        if slot.zero_at_first:
            lora.theta[slot.start : slot.stop] = torch.randn(slot.stop - slot.start, generator=generator) * 0.01
    made = examples()
    halves = SplitModel(lora.model, lora.lowest, recompute)
    cache = PrefixCache(halves, [e.ids for e in made], 1 << 30)
    cache.fill(range(len(made)), 1024)
    units = [Unit(1.0, (i,)) for i in range(len(made))]
    limits = Limits(tokens_max=1024, rows_max=RECORDS)
    return PrivateStep(lora, halves, cache, made, units, Mechanism(1e9, 1.0, RECORDS), limits), cache


def grown(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at its peak while it works."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def one(name: str) -> dict[str, float]:
    """In a child: seconds, bytes, and how far the clipped sum is from fp32's."""
    precision, recompute, settings = SETTINGS[name]
    step, cache = private_step(precision, recompute, settings)
    stream = KeyedStream(TestKey(1), {"plan": "bench"}, 0)
    bytes_grown = grown(lambda: step.clipped_sum(range(RECORDS), stream))
    seconds = []
    for _ in range(TURNS):
        begin = time.process_time()
        total = step.clipped_sum(range(RECORDS), stream)
        seconds.append(time.process_time() - begin)
    figures = {"cpu_s": statistics.median(seconds), "mb": bytes_grown / 1e6}
    begin = time.process_time()
    for _ in range(TURNS):
        cache.hidden(range(RECORDS))
    figures["assembling_s"] = (time.process_time() - begin) / TURNS
    if precision != "fp32":
        exact = private_step("fp32", recompute, settings)[0].clipped_sum(range(RECORDS), stream)
        figures["distance"] = float((total - exact).norm() / exact.norm())
    return figures


def compiled() -> dict[str, float]:
    """In a child: plain layers of the upper half, forward and backward, as they are and through torch.compile.

    The best case for it: no per-sample gradients, whose side effects a graph cannot hold. Lengths vary, as buckets do.
    """
    model = load_model(base())
    layers = model.model.layers[-6:]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, tokens, 576, generator=generator) for tokens in (24, 40, 56, 31, 47, 63)]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
        return hidden

    def turn(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        begin = time.perf_counter()
        for hidden in inputs:
            leaf = hidden.clone().requires_grad_()
            function(leaf).sum().backward()
        return time.perf_counter() - begin

    faster = torch.compile(run, dynamic=True)
    first = turn(faster)
    plain = [turn(run) for _ in range(TURNS + 1)][1:]
    warm = [turn(faster) for _ in range(TURNS + 1)][1:]
    gain = statistics.median(plain) - statistics.median(warm)
    return {
        "plain_s": statistics.median(plain),
        "compiled_s": statistics.median(warm),
        "compiling_s": first - statistics.median(warm),
        "turns_to_pay": (first - statistics.median(warm)) / gain if gain > 0 else float("inf"),
    }


def child(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(compiled() if sys.argv[1] == "compile" else one(sys.argv[1])))
        return
    found = {name: child(name) for name in SETTINGS}
    seconds = probe()
    figures: dict[str, object] = {"settings": found, "probe_s": seconds, "auto": fastest(seconds)}
    print(f"{'one clipped sum of ' + str(RECORDS) + ' records':34s}{'CPU s':>9s}{'MB':>9s}{'off by':>9s}")
    for name, row in found.items():
        off = f"{row['distance']:9.4f}" if "distance" in row else ""
        print(f"{name:34s}{row['cpu_s']:9.2f}{row['mb']:9.0f}{off}")
    for name in ("reentrant", "non-reentrant"):
        time_ratio, memory_ratio = (found[name][key] / found["kept"][key] for key in ("cpu_s", "mb"))
        print(f"{name + ' over kept':34s}{time_ratio:9.2f}{memory_ratio:9.2f}")
    share = found["fp32"]["assembling_s"] / found["fp32"]["cpu_s"]
    print(f"assembling batches, all that a prefetch could hide: {100 * share:.2f} % of a step")
    print(f"probe of a matrix product: {', '.join(f'{k} {v * 1e3:.1f} ms' for k, v in seconds.items())}")
    print(f"auto takes {figures['auto']}; bf16 over fp32 {found['bf16']['cpu_s'] / found['fp32']['cpu_s']:.2f}")
    figures["compile"] = child("compile")
    print("torch.compile of six plain layers: " + ", ".join(f"{k} {v:.2f}" for k, v in figures["compile"].items()))
    out = ROOT / "bench" / "results" / "switches.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
