"""Ingest on Apache Kafka, 300-byte records, the default suite: throughput, its share of a bare poll loop, flat cost.

`make bench-ingest` prints tables and writes bench/results/ingest.json. Throughput is records per second of CPU time,
all threads of the process counted, so it is what one core does. Every figure comes from child processes that ran in
turn on the same topic. `--quick` takes a third of the records: for a look, not for a figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where this very file would stand in for the package `ingest`.
sys.path[0] = str(ROOT)

from ingest.broker import KafkaSettings, TopicWriter, ensure_topic  # noqa: E402
from tests.ingest.history import build_history  # noqa: E402
from tests.ingest.world import STREAM, World  # noqa: E402
from tests.kafka_servers import KAFKA_HOME, ApacheKafka  # noqa: E402

RECORD_BYTES = 300
# A busy topic's: what a block costs at least (the suite, DVC, git: a quarter of a second) is shared by its records.
BLOCK_OFFSETS = 50_000
# Blocks made in bulk, and blocks sealed after them before any is measured: the worst is a shelf that is nearly full.
HISTORIES = {10: (0, 10), 1_000: (1_000, 80), 10_000: (10_000, 80)}
# Of the blocks that are sealed on top of each history, and of those the history is made of.
GROWTH_OFFSETS = 1_000
STEPS = ("polled", "validated", "claimed", "written", "dead_lettered", "synced", "added", "committed", "indexed")
SPENT_ON = {
    "polled": "poll: fetch, decompress, decode",
    "validated": "contract (JSON, types, limits), Great Expectations",
    "claimed": "identities, duplicates, split",
    "written": "Parquet",
    "dead_lettered": "dead letters",
    "synced": "fsync",
    "added": "DVC add",
    "committed": "git commit",
    "indexed": "index",
    "sealed": "offsets to Kafka, drift, metrics, log",
}


def record(number: int) -> bytes:
    """One good record of RECORD_BYTES."""
    fields = {
        "schema_version": 1,
        "event_id": f"e{number:09d}",
        "user_id": f"user-{number * 7919 % 50_000:05d}",
        "domain": "billing",
        "prompt": f"order {number:09d}: ",
        "completion": "refund",
        "label": "refund",
    }
    words = "why was my card charged twice, and when will the second charge be returned to it? I asked last week too; "
    missing = RECORD_BYTES - len(json.dumps(fields))
    fields["prompt"] += (words * 9)[:missing]
    return json.dumps(fields).encode()


def fill(settings: KafkaSettings, topic: str, count: int) -> None:
    """Put records on a topic of one partition."""
    ensure_topic(settings, topic)
    with TopicWriter(settings) as writer:
        for number in range(count):
            writer.send(topic, f"user-{number * 7919 % 50_000:05d}".encode(), record(number))
            if number % 20_000 == 0:
                writer.flush()
        writer.flush()


def child(verb: str, **options: Any) -> dict[str, Any]:
    """Run this file again for one measurement."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", json.dumps([verb, options])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        sys.exit(f"{verb}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def bare(bootstrap: str, topic: str, count: int) -> dict[str, Any]:
    """A kafka-python poll loop with the settings ingest uses, doing nothing with what it polls."""
    from kafka import KafkaConsumer, TopicPartition

    part = TopicPartition(topic, 0)
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        isolation_level="read_committed",
        max_partition_fetch_bytes=8 << 20,
        metrics_enabled=False,
    )
    consumer.assign([part])
    consumer.seek(part, 0)
    began, seen = time.process_time(), 0
    while seen < count:
        seen += sum(len(batch) for batch in consumer.poll(timeout_ms=200, max_records=5000).values())
    spent = time.process_time() - began
    consumer.close()
    return {"cpu_us": 1e6 * spent / count}


def whole(root: str, bootstrap: str, topic: str, count: int) -> dict[str, Any]:
    """Ingest the topic; CPU time by step and memory. The first block pays for opening things and is left out."""
    from ingest.ingester import spare_collector

    world = World(Path(root), KafkaSettings(bootstrap), topic, block_offsets=BLOCK_OFFSETS).make()
    spent: dict[str, float] = defaultdict(float)
    last = time.process_time()
    blocks, rss = 0, []

    def heard(name: str, _: Mapping[str, Any]) -> None:
        nonlocal last, blocks
        if name == "sealed" and not blocks:
            # As `tidegate ingest` does.
            spare_collector()
        if name not in SPENT_ON:
            return
        now = time.process_time()
        if blocks:
            spent[name] += now - last
        last = now
        if name == "sealed":
            blocks += 1
            rss.append(rss_mb())

    began = time.monotonic()
    world.ingester(heard).run(threading.Event(), max_blocks=count // BLOCK_OFFSETS)
    counted = (blocks - 1) * BLOCK_OFFSETS
    return {
        "cpu_us": {name: 1e6 * seconds / counted for name, seconds in spent.items()},
        "wall_records_per_s": count / (time.monotonic() - began),
        "rss_mb": rss,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def rss_mb() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def seal(root: str, bootstrap: str, topic: str, blocks: int) -> dict[str, Any]:
    """Seal some blocks on top of whatever history `root` has; seconds of each, but for the first."""
    from ingest.ingester import spare_collector

    world = World(Path(root), KafkaSettings(bootstrap), topic, block_offsets=GROWTH_OFFSETS)
    walls: list[float] = []
    cpus: list[float] = []
    start = (0.0, 0.0)

    def heard(name: str, _: Mapping[str, Any]) -> None:
        nonlocal start
        if name == "sealed" and len(walls) == 1:
            spare_collector()
        elif name == "polled":
            start = time.monotonic(), time.process_time()
        elif name == "indexed":
            walls.append(time.monotonic() - start[0])
            cpus.append(time.process_time() - start[1])

    world.ingester(heard).run(threading.Event(), max_blocks=blocks)
    return {"wall_s": walls[1:], "cpu_s": cpus[1:], "peak_rss_mb": rss_mb()}


def throughput(settings: KafkaSettings, scratch: Path, count: int, repeats: int) -> dict[str, Any]:
    """Bare loop and whole path in turn, on one topic."""
    topic = f"bench-{secrets.token_hex(4)}"
    fill(settings, topic, count)
    loops, paths, shares = [], [], []
    for repeat in range(repeats):
        loop = child("bare", bootstrap=settings.bootstrap, topic=topic, count=count)["cpu_us"]
        root = scratch / f"whole-{repeat}"
        path = child("whole", root=str(root), bootstrap=settings.bootstrap, topic=topic, count=count)
        shutil.rmtree(root)
        loops.append(loop)
        paths.append(path)
        shares.append(loop / sum(path["cpu_us"].values()))
        say(f"  bare {1e6 / loop:,.0f} records/s, whole {1e6 / sum(path['cpu_us'].values()):,.0f}: {shares[-1]:.3f}")
    rates = [1e6 / sum(path["cpu_us"].values()) for path in paths]
    say("\nCPU time of a record, by what it is spent on (median, microseconds)")
    for name, what in SPENT_ON.items():
        say(f"  {statistics.median(path['cpu_us'].get(name, 0.0) for path in paths):6.2f}  {what}")
    return {
        "records_per_s_core": round(statistics.median(rates)),
        "records_per_s_core_spread": [round(min(rates)), round(max(rates))],
        "share_of_bare_loop": round(statistics.median(shares), 3),
        "share_of_bare_loop_spread": [round(min(shares), 3), round(max(shares), 3)],
        "bare_records_per_s_core": round(1e6 / statistics.median(loops)),
        "wall_records_per_s": round(statistics.median(path["wall_records_per_s"] for path in paths)),
    }


def growth(settings: KafkaSettings, scratch: Path, rounds: int) -> dict[str, Any]:
    """Seal blocks on top of histories of different lengths, in turn."""
    blocks = 5
    roots, topics = {}, {}
    for length, (bulk, sealed) in HISTORIES.items():
        roots[length] = scratch / f"history-{length}"
        topics[length] = f"bench-{secrets.token_hex(4)}"
        fill(settings, topics[length], (rounds * blocks + sealed) * GROWTH_OFFSETS)
        began = time.monotonic()
        world = World(roots[length], settings, topics[length]).make()
        if bulk:
            build_history(world.repo, STREAM, bulk, GROWTH_OFFSETS)
        place = {"root": str(roots[length]), "bootstrap": settings.bootstrap, "topic": topics[length]}
        child("seal", **place, blocks=sealed)
        seconds = time.monotonic() - began
        say(f"  a history of {bulk + sealed:,} blocks, {(bulk + sealed) * GROWTH_OFFSETS:,} records: {seconds:.0f} s")
    walls: dict[int, list[float]] = {length: [] for length in HISTORIES}
    cpus: dict[int, list[float]] = {length: [] for length in HISTORIES}
    peaks: dict[int, float] = {}
    for _ in range(rounds):
        for length in HISTORIES:
            found = child(
                "seal", root=str(roots[length]), bootstrap=settings.bootstrap, topic=topics[length], blocks=blocks
            )
            walls[length] += found["wall_s"]
            cpus[length] += found["cpu_s"]
            peaks[length] = found["peak_rss_mb"]
    say("\nsealing a block of 1,000 records on top of so many (median; lowest and highest)")
    for length in HISTORIES:
        wall, cpu = walls[length], cpus[length]
        say(
            f"  {length:>6,}  {statistics.median(wall):.3f} s  ({min(wall):.3f} to {max(wall):.3f}), "
            f"CPU {statistics.median(cpu):.3f} s, {peaks[length]:.0f} MB"
        )
    least, most = min(HISTORIES), max(HISTORIES)
    return {
        "seal_s": {str(length): round(statistics.median(walls[length]), 4) for length in HISTORIES},
        "seal_cpu_s": {str(length): round(statistics.median(cpus[length]), 4) for length in HISTORIES},
        "seal_growth_10_to_10000": round(statistics.median(walls[most]) / statistics.median(walls[least]), 3),
        "seal_cpu_growth_10_to_10000": round(statistics.median(cpus[most]) / statistics.median(cpus[least]), 3),
        "rss_growth_10_to_10000": round(peaks[most] / peaks[least], 3),
    }


def memory(settings: KafkaSettings, scratch: Path, count: int) -> dict[str, Any]:
    """Ingest a long topic and watch memory."""
    topic = f"bench-{secrets.token_hex(4)}"
    fill(settings, topic, count)
    found = child("whole", root=str(scratch / "long"), bootstrap=settings.bootstrap, topic=topic, count=count)
    # The first blocks fill the allocator's pools and DVC's caches.
    early = max(found["rss_mb"][: max(1, len(found["rss_mb"]) // 5)])
    late = max(found["rss_mb"][-max(1, len(found["rss_mb"]) // 5) :])
    peak = found["peak_rss_mb"]
    say(f"  {count:,} records: {early:.0f} MB after a fifth, {late:.0f} MB at the end, peak {peak:.0f} MB")
    return {"peak_rss_mb": round(peak), "rss_growth_1m": round(late / early, 3), "records": count}


def say(text: str) -> None:
    """A line at once."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> None:
    """All measurements on one broker of our own."""
    if arguments[:1] == ["--child"]:
        verb, options = json.loads(arguments[1])
        print(json.dumps({"bare": bare, "whole": whole, "seal": seal}[verb](**options)))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the records")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ingest.json")
    flags = parser.parse_args(arguments)
    if not (KAFKA_HOME / "kafka").exists():
        sys.exit(f"Apache Kafka is not in {KAFKA_HOME}; say where it is by TIDEGATE_TEST_KAFKA")
    scale = 3 if flags.quick else 1
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        kafka = ApacheKafka(scratch / "kafka")
        kafka.start()
        try:
            say(f"the whole path, {RECORD_BYTES}-byte records, blocks of {BLOCK_OFFSETS:,} offsets, one process")
            figures = throughput(kafka.settings, scratch, 300_000 // scale, repeats=1 if flags.quick else 3)
            say("\nthe cost of a block as history grows")
            figures |= growth(kafka.settings, scratch, rounds=1 if flags.quick else 2)
            say("\nmemory")
            figures |= memory(kafka.settings, scratch, 1_000_000 // scale)
        finally:
            kafka.kill()
    figures["record_bytes"], figures["block_offsets"] = RECORD_BYTES, BLOCK_OFFSETS
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    say("\n" + "\n".join(f"{name:<32} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
