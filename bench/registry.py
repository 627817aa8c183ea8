"""What the guard costs: transitions and reads on a guarded MLflow against a plain one, on SQLite and on PostgreSQL.

`make bench-registry` prints a table and writes bench/results/registry.json. Both servers run side by side and hold the
same: a model with two versions whose adapters are as large as those of `params.yaml` on the embedded base (4 MB), and
20 candidates. Requests go out in turns, one to each, over connections that stay open.

- `transition_added_ms`: what a guarded transition takes more than a plain one at the median, back and forth between the
  two versions, archiving the other. The guarded one checks documents, hashes the stored adapter unless its files
  are still the same files, signs, writes the history durably, tags, and shows everybody's state; the plain one moves.
- `promotion_added_ms`: the same for the first promotion of each candidate.
- `read_over_plain`: get, search and list together, guarded over plain, the median over turns; and each alone.

The figures at the top are those of the database on which they are worse.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where bench/registry.py would stand in for the package `registry`.
sys.path[0] = str(ROOT)

import requests  # noqa: E402
import structlog  # noqa: E402

from registry.mlflow_store import MlflowStore  # noqa: E402
from registry.server import MlflowServer  # noqa: E402
from tests.privacy import postgres  # noqa: E402
from tests.registry.conftest import PlainMlflow, World  # noqa: E402

MODEL = "desk"
# 16 ranks on all linear layers of the upper six: what params.yaml trains on the embedded base.
ADAPTER_NUMBERS = 976_896
TRANSITIONS = 60
CANDIDATES = 20
READS = 150
# The first ones fill caches and connection pools.
WARM_UP = 6
NAMES = ("guarded", "plain")
READ = ("get", "search", "list")


class Registry:
    """One server, with a model in it."""

    def __init__(self, world: World, url: str) -> None:
        self.world, self.url = world, url
        self.session = requests.Session()
        self.session.trust_env = False
        self.one, self.sha_one = world.candidate(MODEL)
        self.move(self.one)
        self.two, _ = world.candidate(MODEL, parent=self.sha_one)
        self.move(self.two)
        self.move(self.one)
        self.candidates = [world.candidate(MODEL, parent=self.sha_one)[0] for _ in range(CANDIDATES)]

    def call(self, method: str, path: str, **options: object) -> float:
        """Seconds one request takes."""
        begin = time.perf_counter()
        answer = self.session.request(method, f"{self.url}/api/2.0/mlflow/{path}", timeout=60, **options)
        took = time.perf_counter() - begin
        answer.raise_for_status()
        return took

    def move(self, version: int) -> float:
        """Into Production, the other one out."""
        body = {"name": MODEL, "version": str(version), "stage": "Production", "archive_existing_versions": True}
        return self.call("POST", "model-versions/transition-stage", json=body)

    def reads(self) -> dict[str, float]:
        """Seconds of each kind of read."""
        search = {"filter": f"name='{MODEL}'", "max_results": 1000, "order_by": "version_number DESC"}
        return {
            "get": self.call("GET", "model-versions/get", params={"name": MODEL, "version": self.one}),
            "search": self.call("GET", "model-versions/search", params=search),
            "list": self.call("GET", "registered-models/search", params={"max_results": 100}),
        }


@contextmanager
def registries(database: str, socket: Path) -> Iterator[dict[str, Registry]]:
    """A guarded and a plain server."""
    with ExitStack() as stack:
        made = {}
        for name, kind in zip(NAMES, (MlflowServer, PlainMlflow), strict=True):
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"bench-{name}-")))
            (root / "keys").mkdir()
            url = postgres.new_database(socket, root.name) if database == "postgresql" else None
            server = stack.enter_context(kind(root, port=0, backend_url=url, approvals_url=url))
            store = MlflowStore(server.url)
            stack.callback(store.close)
            made[name] = Registry(World(root, store, numbers=ADAPTER_NUMBERS), server.url)
            stack.callback(made[name].session.close)
        yield made


def in_turns(made: dict[str, Registry], count: int, one: Callable[[Registry, int], float]) -> dict[str, list[float]]:
    """Milliseconds of each, the order changing from turn to turn, without the first few."""
    took: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(count + WARM_UP):
        for name in NAMES if turn % 2 else NAMES[::-1]:
            took[name].append(1e3 * one(made[name], turn))
    return {name: values[WARM_UP:] for name, values in took.items()}


def added(took: dict[str, list[float]]) -> float:
    """Milliseconds at the median, guarded less plain."""
    return statistics.median(took["guarded"]) - statistics.median(took["plain"])


def measured(database: str, socket: Path) -> dict[str, object]:
    """All figures of one database."""
    with registries(database, socket) as made:
        turns = in_turns(made, TRANSITIONS, lambda one, turn: one.move(one.two if turn % 2 == 0 else one.one))

        def first(one: Registry, turn: int) -> float:
            one.move(one.one)
            return one.move(one.candidates[turn])

        firsts = in_turns(made, CANDIDATES - WARM_UP, first)
        reads: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
        for turn in range(READS + WARM_UP):
            for name in NAMES if turn % 2 else NAMES[::-1]:
                reads[name].append(made[name].reads())
    kept = {name: rows[WARM_UP:] for name, rows in reads.items()}
    medians = {name: {kind: statistics.median(row[kind] for row in kept[name]) for kind in READ} for name in NAMES}
    whole = {name: statistics.median(sum(row.values()) for row in kept[name]) for name in NAMES}
    return {
        "transition_added_ms": added(turns),
        "transition_ms": {name: statistics.median(turns[name]) for name in NAMES},
        "promotion_added_ms": added(firsts),
        "promotion_ms": {name: statistics.median(firsts[name]) for name in NAMES},
        "read_over_plain": whole["guarded"] / whole["plain"],
        "reads_over_plain": {kind: medians["guarded"][kind] / medians["plain"][kind] for kind in medians["plain"]},
        "read_ms": {name: {kind: 1e3 * value for kind, value in medians[name].items()} for name in NAMES},
    }


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with postgres.server() as socket:
        found = {database: measured(database, socket) for database in ("sqlite", "postgresql")}
    worst = {key: max(row[key] for row in found.values()) for key in ("transition_added_ms", "read_over_plain")}
    print(f"{'at the median':34s}{'SQLite':>12s}{'PostgreSQL':>12s}")
    for key, unit in (("transition_added_ms", "ms"), ("promotion_added_ms", "ms"), ("read_over_plain", "")):
        print(f"{key:34s}" + "".join(f"{row[key]:>9.3g} {unit:2s}" for row in found.values()))
    for name in NAMES:
        cells = "".join(f"{row['transition_ms'][name]:>9.3g} ms" for row in found.values())
        print(f"{'transition, ' + name:34s}{cells}")
        for kind in READ:
            cells = "".join(f"{row['read_ms'][name][kind]:>9.3g} ms" for row in found.values())
            print(f"{kind + ', ' + name:34s}{cells}")
    out = ROOT / "bench" / "results" / "registry.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({**worst, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
