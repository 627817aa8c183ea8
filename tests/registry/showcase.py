"""A registry as a service of some weeks shows it: real evidence of planted candidates, people with roles, MLflow's own
basic authentication. Run by itself it makes pictures: `python -m tests.registry.showcase docs/images`.
"""

import itertools
import json
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import requests
from playwright.sync_api import TimeoutError as PageTimeout
from playwright.sync_api import expect, sync_playwright

from evaluation.private import PrivateScores
from learner.plan import BlockRate
from registry.mlflow_store import Candidate, MlflowStore
from registry.roles import SERVICES
from registry.server import Logins, MlflowServer
from registry.states import TAG
from tests.evaluation.pages import BASE, COUNTS, chromium, cut, judged
from tests.evaluation.planted import FACTS, write_gate_set
from tests.learner.rounds import plan
from tests.registry.conftest import PASSWORD, World, write_adapter
from tidegate.memory import line_of
from tidegate.reports import datasets, reports

MODEL = "support-desk"
PEOPLE = {"ada": "approver", "tom": "trainer", "vera": "viewer"}
PROMISE = "(8, 1e-05)-DP per record, for life, over every round that uses a block"
# Others than those of `World.candidate`: what was judged once is not registered again.
_seeds = itertools.count(1001)


@dataclass
class Showcase(World):
    """A workspace and its MLflow, with the people who work there."""

    server: MlflowServer | None = None
    stores: dict[str, MlflowStore] = field(default_factory=dict)

    def round(self, outcome="passed", parent=None, **facts):
        """Register what a round made, with evidence as a round writes it; returns its version number."""
        number = next(self.rounds)
        folder = self.root / "made" / str(number)
        sha = write_adapter(folder, next(_seeds))
        versions = self.store.versions(MODEL)
        before = next((v for v in versions if v.version == parent), None)
        parent_sha = before.adapter_sha256 if before else ""
        share = round(0.08 + 0.07 * number, 2)
        known = replace(
            FACTS, adapter_sha256=sha, parent_sha256=parent_sha or None, share_used=share, promise=PROMISE, **facts
        )
        gate_set = write_gate_set(folder / f"{MODEL}.jsonl", per_domain=100)
        private = PrivateScores(COUNTS, charge_id=f"{MODEL}-r{number:04}.h1", evaluations_left=11)
        found = judged(gate_set, outcome, facts=known, live="live" if before else None, private=private)
        verdict = found.verdict(self.key("verdicts"), f"2026-11-{19 + number:02}T09:30:00Z")
        line = line_of(versions, before, found)
        made = plan(
            BASE,
            round_id=f"{MODEL}-r{number:04}",
            stream=MODEL,
            data_revision="4be1d0c2" * 5,
            parent_sha256=parent_sha or None,
            noise_source="system",
            blocks=tuple(BlockRate(id=f"{MODEL}-0-{at:09}", q=0.2) for at in range(1, 3 * number + 1)),
        )
        tags = self.documents(sha, parent_sha, outcome) | {
            f"{TAG}{name}": told
            for name, told in {
                "stream": MODEL,
                "round_id": made.round_id,
                "attempt": "1",
                "parent_version": str(parent or ""),
                "base_name": BASE.name,
                "base_licence": BASE.licence,
                "data_revision": made.data_revision,
                "continual": line.tag() if line else "",
            }.items()
        }
        tags[f"{TAG}verdict"] = json.dumps(verdict)
        files = reports(made, BASE, found, verdict, parent=before, line=line)
        version = self.store.register(
            Candidate(
                model=MODEL,
                round_id=made.round_id,
                attempt=1,
                adapter_dir=folder,
                tags=tags,
                description_md=files["report.md"].decode(),
                artifacts=files,
                metrics=found.metrics(),
                datasets=datasets(made, found),
            )
        )
        if outcome == "passed":
            self.store.to_staging(MODEL, version)
        else:
            self.store.archive(MODEL, version, state=outcome)
        return version

    def decisions(self, model):
        """What the history holds of a model, oldest first."""
        login = ("admin", PASSWORD)
        found = requests.get(f"{self.server.url}/tidegate/approvals", params={"model": model}, auth=login, timeout=30)
        return found.json()["approvals"]


@contextmanager
def opened(root: Path, others=()):
    """A guarded MLflow with logins on an empty workspace; `stores` by name. Everybody has their role on every model."""
    (root / "keys").mkdir(exist_ok=True)
    for role in SERVICES:
        (root / "keys" / f"mlflow_{role}").write_text(PASSWORD)
    with MlflowServer(root, port=0, logins=Logins(PASSWORD, "not a secret here", [MODEL, *others])) as server:
        users = {"admin": "admin", "learner": SERVICES["learner"], **{name: name for name in PEOPLE}}
        stores = {name: MlflowStore(server.url, (user, PASSWORD)) for name, user in users.items()}
        for name, role in PEOPLE.items():
            stores["admin"].add_user(name, PASSWORD)
            for model in (MODEL, *others):
                stores["admin"].grant(name, role, model)
        try:
            yield Showcase(root, stores["learner"], server=server, stores=stores)
        finally:
            for store in stores.values():
                store.close()


class Clicks:
    """Somebody at a browser of their own, logged in.

    Args:
        browser: playwright's.
        url: of the server.
        name: who.
        look: more of playwright's settings for a browser's context.
    """

    def __init__(self, browser, url, name, **look):
        self.url = url
        look = {"viewport": {"width": 1280, "height": 1000}} | look
        self._context = browser.new_context(http_credentials={"username": name, "password": PASSWORD}, **look)
        self.page = self._context.new_page()
        self.page.set_default_timeout(30_000)
        self.says = self.page.locator("#tidegate-says")
        self.history = self.page.locator("#tidegate-history")
        self.evidence = self.page.get_by_test_id("note-view-outer-container").first
        self.toast = self.page.get_by_role("alert").last
        self.stage = self.page.get_by_test_id("descriptions-item").filter(has_text="Stage:").get_by_role("status")

    def open(self, model, version):
        """The page of a version, by its address."""
        self.page.goto(f"{self.url}/#/models/{model}/versions/{version}")
        self.says.wait_for()

    def move(self, stage, why):
        """Set a stage by MLflow's own menu and dialog."""
        self.ask(stage, why)
        self.page.get_by_role("button", name="OK", exact=True).click()
        # A dialog that still fades out takes the next one with it.
        expect(self.page.get_by_role("dialog")).to_have_count(0)

    def ask(self, stage, why):
        """The same up to the last click. MLflow fetches a version anew after each move, and may forget a click then."""
        comment = self.page.get_by_label("Comment").filter(visible=True)
        for patience_ms in (5_000, 5_000, 30_000):
            self.stage.click()
            self.page.get_by_role("menuitem").filter(has_text=stage).click()
            with suppress(PageTimeout):
                comment.wait_for(timeout=patience_ms)
                break
        comment.fill(why)

    def close(self):
        """Leave."""
        self._context.close()


def weeks(world):
    """Some weeks of decisions: two versions approved, one failed and asked for all the same, one that waits."""
    ada = world.stores["ada"]
    first = world.round()
    ada.promote(MODEL, first, why="clearly better than the base, and polite", who="")
    second = world.round(parent=first)
    ada.promote(MODEL, second, why="billing is better; I read twenty examples", who="")
    failed = world.round("failed", parent=second)
    return failed, world.round(parent=second)


def pictures(folder, world, browser):
    """What an approver sees, in the order of docs/approving.md."""
    failed, waiting = weeks(world)

    def keep(name, clicks, height):
        clicks.page.mouse.move(0, 0)
        clicks.page.wait_for_timeout(700)  # dialogs fade in
        clicks.page.screenshot(path=folder / name)
        cut(folder / name, 1180, height)

    ada = Clicks(browser, world.server.url, "ada", viewport={"width": 1180, "height": 1240})
    ada.open(MODEL, failed)
    ada.move("Production", "I would like the delivery part")
    expect(ada.toast).to_contain_text("cannot go to Production")
    keep("version-refused.png", ada, 560)
    expect(ada.toast).to_have_count(0)
    ada.open(MODEL, waiting)
    expect(ada.evidence.locator("img")).to_be_visible()
    keep("version-candidate.png", ada, 1240)
    ada.ask("Production", "better on every domain; the examples read well")
    keep("version-dialog.png", ada, 775)
    ada.page.get_by_role("button", name="OK", exact=True).click()
    expect(ada.says).to_contain_text("It is live")
    ada.open(MODEL, second := failed - 1)
    ada.move("Production", "complaints about version 4 since noon: back to 2")
    expect(ada.says).to_contain_text("It is live")
    expect(ada.stage).to_have_text("Production")
    keep("version-live.png", ada, 560)
    ada.history.screenshot(path=folder / "version-decisions.png")
    cut(folder / "version-decisions.png", *(int(ada.history.bounding_box()[side]) for side in ("width", "height")))
    ada.close()
    assert world.stages(MODEL)[second] == "Production"
    dark = Clicks(browser, world.server.url, "vera", viewport={"width": 1180, "height": 760}, color_scheme="dark")
    dark.page.goto(f"{world.server.url}/tidegate/history?model={MODEL}")
    keep("version-history.png", dark, 760)
    dark.close()


def main(folder):
    """Make them all, and say how large they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, opened(Path(scratch)) as world, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        pictures(folder, world, browser)
        browser.close()
    for picture in sorted(folder.glob("version-*.png")):
        print(picture, picture.stat().st_size, "bytes")  # noqa: T201 - a command's own output


if __name__ == "__main__":
    main(Path(sys.argv[1]))
