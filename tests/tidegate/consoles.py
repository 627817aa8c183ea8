"""A console on a real server with a tiny engine, and a browser to look at it; run by itself it makes the pictures of
the documents: `python -m tests.tidegate.consoles docs/images`.
"""

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from privacy.signing import SigningKey, TrustedKeys
from registry.errors import RegistryUnavailable
from serving.candidates import Candidates
from serving.delivery import Delivery
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from tests.evaluation.pages import chromium
from tests.serving.adapters import random_adapter
from tests.serving.registry import MODEL, Registry
from tests.serving.waiting import Waiting
from tests.tidegate.streams import STREAM, go_live, seal, workspace
from tidegate import budget
from tidegate.console_routes import console_of, routes_of
from tidegate.planning import plan_arguments, survey
from tidegate.workspace import write_json

GATES = (
    ("gain over base", "passed", True, "+34.2 points against the base on 480 records (p < 1e-35)"),
    ("forgetting", "passed", True, "nothing is forgotten against live (lowest: billing -1.7 points)"),
    ("latency_p95", "passed", False, "0.21 s, live 0.19 s"),
)
VERSIONS = (1, 2, 4)
FORGOT = ("forgetting", "failed", True, "billing is 6.1 points worse than live (p = 0.003), at most 0 may be")


@dataclass
class Seat:
    """What a test holds of a running console."""

    url: str
    service: object
    registry: Registry
    swap: HotSwap
    old: str  # the block that live knows

    def promote(self, number, who="ada", why="clearly better"):
        """As a person does it: a row in the history, and the stage that serving follows."""
        signed = self.service.approvals(signing=True)
        sha = self.registry.promote(number).adapter_sha256
        signed.append(model=MODEL, version=number, adapter_sha256=sha, from_stage="Staging", to_stage="Production",
                      who=who, why=why, kind="promote")  # fmt: skip
        versions = self.service.made["versions"]
        versions[:] = [v for v in versions if v.stage != "Production" and v.version != number]
        go_live(self.service, self.old, sha=sha)
        versions[-1] = replace(versions[-1], version=number)

    def candidate(self, number, round_id=f"{STREAM}-r0007"):
        """A version that waits, with its signed documents."""
        waiting = Waiting(self.service.keys_dir, self.registry.folders)
        self.service.made["versions"].append(waiting.candidate(number, round_id=round_id))


def ended_round(service, number, outcome="passed", gates=GATES, version=1):
    """What a round leaves in its folder."""
    folder = service.workspace.rounds(f"{STREAM}-r{number:04d}")
    state = "candidate" if outcome == "passed" else outcome
    write_json(folder / "ended.json", {"round_id": folder.name, "outcome": outcome, "state": state, "version": version})
    told = [{"name": n, "outcome": o, "hard": h, "sentence": s} for n, o, h, s in gates]
    write_json(folder / "verdict.json", {"gates": told, "made_at": "2026-11-27T09:30:00Z"})


@contextmanager
def console(base, folder, *, scale=0.3, **more):
    """A server of one stream, whose registry and versions a test changes; versions 1, 2 and 4 can be promoted."""
    service = workspace(folder / "ws", registry={"model": MODEL})
    old, _ = seal(service, 1), seal(service, 2)
    for number in VERSIONS:
        random_adapter(base, folder / f"adapter-{number}", number, scale=scale)
    signer = SigningKey.load_or_create(service.keys_dir / "approvals.pem")
    registry = Registry(signer, {number: folder / f"adapter-{number}" for number in VERSIONS})
    with InProcessEngine(base, threads=1, batch_max=4, queue_max=16, context_max=256) as engine:
        swap = HotSwap(
            STREAM,
            engine,
            wanted=registry.wanted,
            fetch=registry.fetch,
            acknowledge=registry.acknowledge,
            trusted=TrustedKeys([signer.public]),
            cache=folder / "cache",
            model=MODEL,
            poll_seconds=0.1,
        )
        prove = Waiting(service.keys_dir, registry.folders).prove
        seen = {"seen": lambda: service.made["versions"], "prove": prove, "fetch": registry.fetch}
        swap.delivery = Delivery(
            swap,
            Candidates(STREAM, engine, **seen, cache=folder / "cache"),
            trusted=TrustedKeys([signer.public]),
            cache=folder / "cache",
            key=b"k" * 32,
            step_back=lambda *_: None,
            model=MODEL,
            poll_seconds=0.1,
        )
        desk = console_of(service, [swap])
        with running(
            [swap],
            answer_key=b"k" * 32,
            routes=routes_of(desk, [STREAM]),
            on_end=desk.end,
            max_tokens={STREAM: 24},
            **more,
        ) as url:
            end = time.monotonic() + 60
            while httpx.get(f"{url}/readyz").status_code != 200:
                assert time.monotonic() < end
                time.sleep(0.05)
            yield Seat(url, service, registry, swap, old)


def spend(service, rounds):
    """Charge the block that live knows for so many rounds of replay."""
    found = survey(service, STREAM, service.versions(MODEL))
    plan = budget.next_plan(found, plan_arguments(service.stream(STREAM).learner))
    replayed = [charge for charge in plan.charges() if charge.block_id.endswith("1")]
    for number in range(rounds):
        service.ledger.reserve(STREAM, f"{STREAM}-r{number:04d}", 1, "a" * 64, replayed)


def down(_model, **_options):
    """A registry that does not answer."""
    raise RegistryUnavailable("http://127.0.0.1:5000: nothing answers; start it")


@contextmanager
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()


def main(folder):
    """The pictures of the documents: light, dark, and a phone."""
    from unittest.mock import patch

    from learner.base import prepare_base
    from tests.evaluation.pages import small
    from tidegate.lag import Lag

    base = prepare_base("smollm2-135m", Path(__file__).parents[2] / "workspace" / "bases")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory() as scratch,
        # No broker runs for a picture.
        patch("tidegate.lag.look", lambda _service, _stream: Lag(((0, 118),))),
        # Adapters that change next to nothing: for a picture nothing is trained.
        console(base, Path(scratch), scale=1e-3) as seat,
        browser() as opened,
    ):
        for number, outcome in ((1, "passed"), (2, "passed"), (3, "failed"), (4, "passed")):
            gates = (*GATES[:1], FORGOT, *GATES[2:]) if outcome == "failed" else GATES
            ended_round(seat.service, number, outcome, gates, version=number)
        seat.promote(1, why="clearly better than the base on the public gate set")
        seat.promote(2, who="grace", why="better on billing, nothing is forgotten")
        seat.candidate(4, round_id=f"{STREAM}-r0004")
        spend(seat.service, 9)
        looks = {"light": (900, 1250, "light"), "dark": (900, 1250, "dark"), "phone": (390, 1500, "light")}
        for name, (width, height, scheme) in looks.items():
            page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(seat.url)
            page.get_by_text(f"{STREAM}@2").first.wait_for()
            page.get_by_text("grace").first.wait_for()
            page.get_by_label("Prompt", exact=True).fill("Write one short sentence: where is my parcel?")
            page.get_by_role("button", name="Ask live and the candidate").click()
            page.locator("#answers figure[aria-busy=false]").first.wait_for()
            picture = folder / f"console-{name}.png"
            page.screenshot(path=picture, full_page=True)
            small(picture)
            print(picture, picture.stat().st_size, "bytes")  # noqa: T201 - a command's own output
            page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
