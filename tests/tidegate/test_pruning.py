"""Pruning with a real history of approvals and real adapter files; the registry stands in memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from learner.adapter import adapter_sha256
from registry.errors import PromotionRefused, RegistryError
from registry.promotion import Promotions
from registry.states import ModelVersion
from tests.registry.conftest import World, write_adapter
from tests.tidegate.streams import STREAM, HandMade, workspace
from tidegate import audit, pruning, wiring
from tidegate.cli import cli
from tidegate.errors import TidegateError, UnknownName
from tidegate.evidence import stored_adapter
from tidegate.rollback import roll_back


class Desk(HandMade):
    """Versions in memory with real adapter files in a folder each, where MLflow's artifact store would have them."""

    def version(self, number, state, stage="Archived", *, seed=None, made=None):
        folder = made or self.stored(number)
        sha = adapter_sha256(folder) if made else write_adapter(folder, seed or number)
        tags = World(self.workspace.root, None).documents(sha) | {"tidegate.state": state}
        tags |= {"tidegate.plan": json.dumps({"blocks": []}), "tidegate.round_id": f"r{number}"}
        row = ModelVersion(number, stage, tags, "2026-01-01T00:00:00Z", "run", (), "")
        self.made["versions"].append(row)
        kept = self.workspace.adapters / sha
        if not kept.exists():
            shutil.copytree(folder, kept)
        return sha

    def lived(self, number, why="good"):
        row = next(v for v in self.made["versions"] if v.version == number)
        self.approvals(signing=True).append(
            model=STREAM, version=number, adapter_sha256=row.adapter_sha256, from_stage="Staging",
            to_stage="Production", who="ada", why=why, kind="promote",
        )  # fmt: skip

    def stored(self, number):
        return self.made.setdefault("where", {}).get(number) or self.workspace.root / "store" / str(number)

    def fetch_adapter(self, _model, number, dest):
        if not self.stored(number).is_dir():
            raise RegistryError("no such artifact")
        return Path(shutil.copytree(self.stored(number), dest, dirs_exist_ok=True))

    def set_tag(self, _model, number, key, value):
        rows = self.made["versions"]
        at = next(i for i, v in enumerate(rows) if v.version == number)
        rows[at] = replace(rows[at], tags={**rows[at].tags, key: value})

    def move(self, _model, number, stage, *, archive_existing=False):
        assert archive_existing or stage != "Production"
        rows = self.made["versions"]
        rows[:] = [replace(v, stage="Archived") if v.stage == stage == "Production" else v for v in rows]
        rows[:] = [replace(v, stage=stage) if v.version == number else v for v in rows]

    def remove_weights(self, _model, number):
        (self.stored(number) / "adapter_model.safetensors").unlink(missing_ok=True)

    def weights(self):
        """Versions whose weights are in the store, and in the workspace."""
        rows = self.made["versions"]
        stored = {v.version for v in rows if (self.stored(v.version) / "adapter_model.safetensors").exists()}
        return stored, {v.version for v in rows if (self.workspace.adapters / v.adapter_sha256).is_dir()}


@pytest.fixture
def desk(tmp_path):
    """1, 2 and 3 were live one after another and 3 is; 4 to 8 are over; 9 waits. One previous version is kept."""
    made = workspace(tmp_path / "ws", registry={"keep_previous": 1})
    made = Desk(made.workspace, made.resolved)
    for number, state in enumerate(("retired", "retired", "live"), start=1):
        made.version(number, state, "Production" if state == "live" else "Archived")
        made.lived(number)
    for number, state in enumerate(("failed", "undecided", "rejected", "superseded", "stale"), start=4):
        made.version(number, state)
    made.version(9, "candidate", "Staging")
    return made


def prune(desk):
    return {fate.version: fate.fate for fate in pruning.prune(desk, None, who="ada")}


def test_what_nobody_needs_goes_and_what_is_live_waits_or_can_be_returned_to_stays(desk):
    fates = {fate.version: fate.fate for fate in pruning.look(desk)}
    assert fates == dict.fromkeys((2, 3, 9), "keep") | dict.fromkeys((1, 4, 5, 6, 7, 8), "prune")
    assert desk.weights() == ({*range(1, 10)}, {*range(1, 10)}), "a look changes nothing"
    before = [(v.version, {k: t for k, t in v.tags.items() if k != "tidegate.pruned"}) for v in desk.versions(STREAM)]
    assert set(prune(desk)) == {1, 4, 5, 6, 7, 8}
    assert desk.weights() == ({2, 3, 9}, {2, 3, 9})
    after = [(v.version, {k: t for k, t in v.tags.items() if k != "tidegate.pruned"}) for v in desk.versions(STREAM)]
    assert before == after, "receipts, verdicts and plans stay"
    assert {f.version: f.fate for f in pruning.look(desk)} == {n: "keep" if n in {2, 3, 9} else "pruned" for n in fates}
    assert prune(desk) == {}


def test_an_adapter_stays_while_one_of_its_versions_needs_it_and_goes_with_the_last(desk):
    shared = desk.version(10, "rejected", seed=3)  # the very adapter of version 3, which is live
    twins = [desk.version(number, "failed", seed=99) for number in (11, 12)]
    assert twins[0] == twins[1]
    done = prune(desk)
    assert 10 not in done and (desk.workspace.adapters / shared).is_dir() and {11, 12} <= set(done)
    assert not (desk.workspace.adapters / twins[0]).exists()
    assert {11, 12}.isdisjoint(desk.weights()[0])


@pytest.mark.parametrize("step", ["set_tag", "remove_weights", "rename", "second note"])
def test_stopped_anywhere_the_next_run_ends_it(desk, monkeypatch, step):
    def stop(*_arguments):
        raise KeyboardInterrupt

    notes = iter((pruning.write_json, stop))
    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(pruning, "_remove_folder", stop)
        elif step == "second note":
            patch.setattr(pruning, "write_json", lambda *given: next(notes)(*given))  # noqa: PLW0108 - one a call
        else:
            patch.setattr(desk.__class__, step, stop)
        with pytest.raises(KeyboardInterrupt):
            prune(desk)
    assert {2, 3, 9} <= desk.weights()[0] & desk.weights()[1]
    assert set(prune(desk)) == {1, 4, 5, 6, 7, 8}
    assert desk.weights() == ({2, 3, 9}, {2, 3, 9})


def test_what_an_unfinished_round_starts_from_stays(desk):
    sha = desk.made["versions"][0].adapter_sha256
    folder = desk.workspace.rounds("r77")
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"round_id": "r77", "parent_sha256": sha}))
    assert 1 not in prune(desk)
    (folder / "ended.json").write_text("{}")
    assert set(prune(desk)) == {1}


def test_forged_tags_remove_nothing_that_is_needed(desk):
    key = desk.keys_dir / "receipts.pem"
    assert key.exists()
    desk.set_tag(STREAM, 3, "tidegate.state", "failed")  # live by the history
    desk.set_tag(STREAM, 9, "tidegate.state", "failed")  # waits in Staging
    desk.set_tag(STREAM, 4, "tidegate.adapter_sha256", "../keys")
    desk.made["where"] = {5: desk.stored(3)}  # its source is the live version's
    assert prune(desk) == {1: "pruned", 5: "keep", 6: "pruned", 7: "pruned", 8: "pruned"}
    assert {2, 3, 4, 9} <= desk.weights()[0] and key.exists()


def test_a_rollback_to_a_pruned_version_is_refused_with_the_reason(desk):
    prune(desk)
    promotions = Promotions(desk, desk.approvals(signing=True), desk.trust)
    with pytest.raises(PromotionRefused, match=r"version 1: its weights were pruned \(.* by ada\).*keep_previous"):
        promotions.promote(STREAM, 1, who="ada", why="back")
    assert desk.approvals().standing(STREAM).live["version"] == 3
    with pytest.raises(PromotionRefused, match="pruned"):
        roll_back(desk, STREAM, to=1, why="back", who="ada", emergency=True)
    sha = desk.made["versions"][0].adapter_sha256
    with pytest.raises(TidegateError, match="version 1 was pruned"):
        stored_adapter(desk, STREAM, sha, desk.versions(STREAM))
    assert promotions.promote(STREAM, 2, who="ada", why="back")["kind"] == "rollback"


def test_an_emergency_is_signed_for_what_is_whole_in_the_cache_and_refused_for_what_is_not(desk):
    lives = desk.approvals().standing(STREAM).approved
    sha = lives[2]["adapter_sha256"]
    with pytest.raises(PromotionRefused, match=r"is not whole in the server's cache .* that ran here lately"):
        roll_back(desk, STREAM, to=2, why="down", who="oncall", emergency=True)
    cached = desk.workspace.serving / STREAM / "adapters" / sha
    shutil.copytree(desk.stored(2), cached)
    told = roll_back(desk, STREAM, to=2, why="MLflow is down", who="oncall", emergency=True)
    row = desk.approvals().latest(STREAM)
    assert (row["kind"], row["who"], row["why"], row["from"]) == ("emergency", "oncall", "MLflow is down", "unknown")
    assert f"emergency approval {row['seq']} is signed" in told
    assert json.loads((desk.workspace.serving / STREAM / f"emergency-{STREAM}.json").read_text()) == row
    weights = next(cached.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(PromotionRefused, match=f"has sha256 .* its approval is about {sha[:12]}; it was changed"):
        roll_back(desk, STREAM, to=2, why="down", who="oncall", emergency=True)
    for emergency in (True, False):
        with pytest.raises(UnknownName, match=r"was never live .*`tidegate approve"):
            roll_back(desk, STREAM, to=4, why="down", who="oncall", emergency=emergency)


def test_a_tag_that_says_pruned_does_not_keep_an_intact_version_from_going_live(desk):
    desk.set_tag(STREAM, 2, "tidegate.pruned", "{}")
    assert Promotions(desk, desk.approvals(signing=True), desk.trust).promote(STREAM, 2, who="ada", why="back")


def test_commands_say_pruned_where_weights_are_gone(desk, monkeypatch):
    monkeypatch.setattr(wiring, "open_service", lambda _given: desk)
    run = lambda *words: CliRunner().invoke(cli, [*words], catch_exceptions=False).output  # noqa: E731
    assert "would remove: weights of 6 versions" in run("prune")
    assert len(desk.weights()[0]) == 9
    told = json.loads(run("prune", STREAM, "--apply", "--who", "ada", "--json"))
    assert told["applied"] and told["workspace_bytes"] > 0
    assert [v["version"] for v in told["versions"] if v["fate"] == "pruned"] == [1, 4, 5, 6, 7, 8]
    assert "removed: weights of 0 versions" in run("prune", "--apply")
    versions = {row["version"]: bool(row["pruned"]) for row in json.loads(run("versions", STREAM, "--json"))}
    assert versions == {number: number in {1, 4, 5, 6, 7, 8} for number in range(1, 10)}
    assert "pruned" in run("versions", STREAM)
    assert ", pruned 20" in run("lineage", "4")
    assert desk.approvals().verify(desk.trusted("approvals")) == 3
    assert audit.stored_sha256(desk, STREAM, 4) is None
