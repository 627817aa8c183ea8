"""Every state a version can be in, and every way to ask for another, in a dictionary and on a real guarded server.

`Desk` is the dictionary: what should become of an ask, by what `registry/states.py` and the guard say of themselves.
`Decisions` asks the server the same, over REST, and compares after every step.
"""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field

import requests
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from privacy.signing import TrustedKeys
from registry.approvals import Approvals
from tests.registry.race import Race

REFUSED, DONE = 403, 200
FINAL = ("rejected", "superseded", "failed", "undecided")


@dataclass
class Version:
    """One version as it should be."""

    sha: str
    parent: str
    outcome: str
    state: str
    stage: str
    once_live: bool = False


@dataclass
class Desk:
    """One model as it should be; each ask answers the code it should get."""

    versions: dict[int, Version] = field(default_factory=dict)
    stack: list[int] = field(default_factory=list)
    rows: list[tuple[int, str]] = field(default_factory=list)

    @property
    def live(self) -> int:
        return next((n for n, v in self.versions.items() if v.stage == "Production"), 0)

    def promote(self, number: int) -> int:
        chosen, live = self.versions[number], self.live
        if live == number:
            return DONE
        if not chosen.once_live:
            fits = chosen.parent == (self.versions[live].sha if live else "")
            if chosen.state in FINAL or chosen.outcome != "passed" or not fits:
                return REFUSED
        if live:
            self.versions[live].state, self.versions[live].stage = "retired", "Archived"
        self.rows.append((number, "rollback" if chosen.once_live else "promote"))
        chosen.state, chosen.stage, chosen.once_live = "live", "Production", True
        self.stack = [*(self.stack[: self.stack.index(number)] if number in self.stack else self.stack), number]
        self._make_stale(chosen.sha)
        return DONE

    def reject(self, number: int, stage: str = "Archived") -> int:
        chosen = self.versions[number]
        if chosen.state not in {"candidate", "stale"}:
            return REFUSED
        self.rows.append((number, "reject"))
        chosen.state, chosen.stage = "rejected", stage
        return DONE

    def move(self, number: int, stage: str, *, box: bool) -> int:
        """What the page does: a plain change of stage, whatever that means for the version."""
        chosen = self.versions[number]
        if chosen.stage == "Production":
            self.rows.append((number, "rollback"))
            chosen.state, chosen.stage = "retired", stage
            self._make_stale("")
            return DONE
        if chosen.state == "candidate" and stage in {"Archived", "None"} and chosen.stage != stage:
            return self.reject(number, stage)
        if box and stage == "Staging":
            for other, version in self.versions.items():
                if other != number and version.stage == "Staging":
                    if version.state == "candidate":
                        self.reject(other)
                    version.stage = "Archived"
        chosen.stage = stage
        return DONE

    def place(self, number: int, state: str, stage: str) -> int:
        """What the service itself does with versions nobody has decided on."""
        chosen = self.versions[number]
        if not chosen.once_live and chosen.state != "rejected":
            chosen.state, chosen.stage = state, stage
        return DONE

    def _make_stale(self, sha: str) -> None:
        for version in self.versions.values():
            if version.state == "candidate" and version.parent != sha:
                version.state, version.stage = "stale", "Archived"


class Decisions(RuleBasedStateMachine):
    """Both, side by side."""

    race: Race
    numbers: Iterator[int] = itertools.count()
    kind: type[Desk] = Desk

    @initialize()
    def begin(self):
        self.model = f"model-{next(self.numbers)}"
        self.desk = self.kind()
        self.session = requests.Session()
        self.session.trust_env = False
        self._post("registered-models/create", {"name": self.model}).raise_for_status()

    # -- asks ------------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 5), fits=st.sampled_from([True, True, True, False]), outcome=st.sampled_from(
        ["passed", "passed", "passed", "passed", "failed", "undecided"]))  # fmt: skip
    def a_round_ends(self, which, fits, outcome):
        sha, source, run = self.race.sources[which]
        live = self.desk.versions[self.desk.live].sha if self.desk.live else ""
        parent = live if fits else "e" * 64
        made_by = f"{self.model}-{next(self.numbers)}"
        tags = self.race.world.documents(sha, parent, outcome, round_id=made_by)
        body = {"name": self.model, "source": source, "run_id": run, "model_id": source.removeprefix("models:/")}
        body["tags"] = [{"key": key, "value": value} for key, value in tags.items()]
        made = self._post("model-versions/create", body)
        made.raise_for_status()
        number = int(made.json()["model_version"]["version"])
        state = "candidate" if outcome == "passed" else outcome
        self.desk.versions[number] = Version(sha, parent, outcome, state, "None")
        self._place(number, state, "Staging" if outcome == "passed" else "Archived")

    @precondition(lambda self: self.desk.versions)
    @rule(data=st.data(), box=st.booleans())
    def somebody_promotes(self, data, box):
        number = self._some(data)
        answer = self._move(number, "Production", archive_existing_versions=box)
        assert answer.status_code == self.desk.promote(number), answer.text
        self._agree()

    @precondition(lambda self: any(v.state in {"candidate", "stale"} for v in self.desk.versions.values()))
    @rule(data=st.data(), box=st.booleans())
    def somebody_promotes_what_waits(self, data, box):
        number = self._some(data, "candidate", "stale")
        answer = self._move(number, "Production", archive_existing_versions=box)
        assert answer.status_code == self.desk.promote(number), answer.text
        self._agree()

    @precondition(lambda self: any(v.state == "retired" for v in self.desk.versions.values()))
    @rule(data=st.data())
    def somebody_rolls_back(self, data):
        number = self._some(data, "retired")
        assert self._move(number, "Production").status_code == self.desk.promote(number) == DONE
        self._agree()

    @precondition(lambda self: self.desk.versions)
    @rule(data=st.data())
    def somebody_rejects_twice(self, data):
        number = self._some(data)
        expected, why = self.desk.reject(number), f"no {next(self.numbers)}"
        for _ in range(2):  # the second time as if the first answer had been lost
            answer = self._move(number, "Archived", why=why, tidegate_state="rejected")
            assert answer.status_code == expected, answer.text
        self._agree()

    @precondition(lambda self: self.desk.versions)
    @rule(data=st.data(), stage=st.sampled_from(["Archived", "None", "Staging"]), box=st.booleans())
    def somebody_sets_a_stage(self, data, stage, box):
        number = self._some(data)
        box = box and stage == "Staging"
        answer = self._move(number, stage, archive_existing_versions=box)
        assert answer.status_code == self.desk.move(number, stage, box=box), answer.text
        self._agree()

    @precondition(lambda self: self.desk.versions)
    @rule(data=st.data(), state=st.sampled_from(["superseded", "stale"]))
    def the_service_puts_one_away(self, data, state):
        self._place(self._some(data), state, "Archived")

    @precondition(lambda self: self.desk.versions)
    @rule(data=st.data())
    def an_answer_is_lost_and_asked_for_again(self, data):
        number = self._some(data)
        self.race.ask_and_go(number, "Production", self.model, done=True)
        answer = self._move(number, "Production")
        assert answer.status_code == self.desk.promote(number), answer.text
        self._agree()

    @precondition(lambda self: len(self.desk.versions) > 1)
    @rule(data=st.data())
    def two_promote_at_the_same_moment(self, data):
        one, two = self._some(data), self._some(data)
        with ThreadPoolExecutor(2) as crowd:
            codes = [a.status_code for a in crowd.map(lambda n: self._move(n, "Production"), (one, two))]
        shown = self._shown()
        for first, second, swap in ((one, two, False), (two, one, True)):
            desk = deepcopy(self.desk)
            expected = [desk.promote(first), desk.promote(second)]
            if shown == _wanted(desk) and codes == (expected[::-1] if swap else expected):
                self.desk = desk
                break
        else:
            raise AssertionError(f"{one} and {two} at once: {codes}, {shown}: in neither order")
        self._agree()

    # -- comparing -------------------------------------------------------------------------------------------------

    def _agree(self):
        assert self._shown() == _wanted(self.desk)
        rows = self._history()
        assert [(row["version"], row["kind"]) for row in rows] == self.desk.rows
        if self.desk.live:
            carried = json.loads(self._tags[self.desk.live]["tidegate.approval"])
            (live,) = [row for row in rows if row == carried]
            assert (live["version"], live["to"]) == (self.desk.live, "Production")

    def teardown(self):
        if not hasattr(self, "desk"):
            return
        approvals = Approvals(self.race.approvals_url)
        assert approvals.verify(TrustedKeys.from_dir(self.race.world.root / "keys", "approvals")) >= len(self.desk.rows)
        standing = approvals.standing(self.model)
        assert (standing.live or {}).get("version", 0) == self.desk.live
        below = [number for number in self.desk.stack if number != self.desk.live]
        assert (standing.previous or {}).get("version", 0) == (below[-1] if below else 0)
        approvals.close()
        self.session.close()

    def _shown(self) -> dict[int, tuple[str, str]]:
        found = self.race.world.store.versions(self.model, aliases=False)
        self._tags = {v.version: v.tags for v in found}
        return {v.version: (v.stage, str(v.state)) for v in found}

    def _history(self):
        url = f"{self.race.server.url}/tidegate/approvals"
        return self.session.get(url, params={"model": self.model}, timeout=30).json()["approvals"]

    # -- asking ----------------------------------------------------------------------------------------------------

    def _some(self, data, *states: str) -> int:
        return data.draw(st.sampled_from([n for n, v in self.desk.versions.items() if not states or v.state in states]))

    def _place(self, number: int, state: str, stage: str):
        answer = self._move(number, stage, tidegate_state=state)
        assert answer.status_code == self.desk.place(number, state, stage), answer.text
        self._agree()

    def _move(self, number: int, stage: str, *, why: str = "", **more):
        headers = {"X-Tidegate-User": "ada", "X-Tidegate-Why": why or "because"}
        body = {"name": self.model, "version": str(number), "stage": stage, **more}
        return self._post("model-versions/transition-stage", body, headers)

    def _post(self, path: str, body: dict, headers=None):
        url = f"{self.race.server.url}/api/2.0/mlflow/{path}"
        return self.session.post(url, json=body, headers=headers, timeout=60)


def _wanted(desk: Desk) -> dict[int, tuple[str, str]]:
    return {number: (version.stage, version.state) for number, version in desk.versions.items()}
