"""An MLflow that takes no plugin: each sentence of docs/managed.md, on a real one."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from privacy.signing import TrustedKeys
from registry.approvals import Approvals
from registry.errors import PromotionRefused, RegistryError
from registry.promotion import Trust
from serving.approval import check_wanted
from serving.errors import Ambiguous, ApprovalRefused
from tests.registry.test_guard import REFUSED
from tidegate.serve import wanted_of

pytestmark = pytest.mark.slow  # a server of its own; CI has canaries on one (test_canary.py)


@pytest.fixture
def signed(unguarded):
    """What a command of the workspace hands to the store."""
    approvals = Approvals(f"sqlite:///{unguarded.root / 'approvals.db'}", unguarded.key("approvals"))
    for purpose in ("verdicts", "receipts"):
        unguarded.key(purpose)
    yield {"approvals": approvals, "trust": Trust.from_dir(unguarded.root / "keys")}
    approvals.close()


def wanted(world, model):
    """What serving asks for, checked as serving checks it."""
    found = wanted_of(SimpleNamespace(model=lambda _stream: model, store=world.store), "stream")()
    return check_wanted(found, TrustedKeys.from_dir(world.root / "keys", "approvals"), model)


def by_hand(world, model, version, stage="Production"):
    """A click on MLflow's own page."""
    world.store.move(model, version, stage)


def test_what_is_set_to_production_by_hand_does_not_answer(unguarded):
    version, _ = unguarded.candidate("by-hand")
    by_hand(unguarded, "by-hand", version)
    assert unguarded.stages("by-hand") == {version: "Production"}
    with pytest.raises(ApprovalRefused, match="no signed approval; run `tidegate approve`"):
        wanted(unguarded, "by-hand")


@pytest.mark.parametrize("case", ["failed", "stranger", "other-adapter"])
def test_the_command_refuses_what_the_guard_refuses_with_the_same_sentence(unguarded, signed, case):
    tags, sentence = REFUSED[case]
    model = f"refused-{case}"
    version, _ = unguarded.candidate(model, tags=lambda sha: tags(unguarded, sha))
    before = unguarded.stages(model)
    with pytest.raises(PromotionRefused, match=sentence):
        unguarded.store.promote(model, version, why="please", who="mallory", **signed)
    assert (unguarded.stages(model), signed["approvals"].history(model)) == (before, [])
    assert signed["approvals"].refusals(model)[0]["who"] == "mallory"


def test_the_command_signs_and_leaves_one_version_in_production(unguarded, signed):
    one, sha = unguarded.candidate("one")
    unguarded.store.promote("one", one, why="first", who="ada", **signed)
    two, _ = unguarded.candidate("one", parent=sha)
    three, _ = unguarded.candidate("one", parent=sha)
    by_hand(unguarded, "one", three)
    row = unguarded.store.promote("one", two, why="better", who="ada", **signed)
    assert [n for n, stage in unguarded.stages("one").items() if stage == "Production"] == [two]
    assert wanted(unguarded, "one").seq == row["seq"]
    assert signed["approvals"].verify(TrustedKeys.from_dir(unguarded.root / "keys", "approvals")) >= 2


def test_a_rejection_is_final(unguarded, signed):
    version, _ = unguarded.candidate("no")
    unguarded.store.reject("no", version, why="rude", who="ada", **signed)
    with pytest.raises(PromotionRefused, match="was rejected by ada"):
        unguarded.store.promote("no", version, why="", who="bob", **signed)


def test_two_commands_on_one_history_see_each_other(unguarded, signed):
    versions = [unguarded.candidate("both")[0] for _ in range(2)]

    def approve(version):
        try:
            return unguarded.store.promote("both", version, why="mine", who="ada", **signed)["version"]
        except PromotionRefused as refusal:
            return str(refusal)

    with ThreadPoolExecutor(2) as crowd:
        said = list(crowd.map(approve, versions))
    (won,) = [answer for answer in said if isinstance(answer, int)]
    (lost,) = [answer for answer in said if isinstance(answer, str)]
    assert f"version {won} is live now" in lost
    assert [n for n, stage in unguarded.stages("both").items() if stage == "Production"] == [won]


def test_without_the_workspace_s_keys_nothing_is_approved(unguarded):
    version, _ = unguarded.candidate("keyless")
    with pytest.raises(RegistryError, match="no guard runs there, so the decision must be signed here"):
        unguarded.store.promote("keyless", version, why="", who="ada")


def test_two_in_production_by_hand_change_nothing_and_serving_says_so(unguarded, signed):
    one, sha = unguarded.candidate("two")
    unguarded.store.promote("two", one, why="first", who="ada", **signed)
    two, _ = unguarded.candidate("two", parent=sha)
    by_hand(unguarded, "two", two)
    assert sorted(unguarded.stages("two").values()) == ["Production", "Production"]
    with pytest.raises(Ambiguous, match=f"versions .*{two}.* stand in Production at once, 1 is allowed"):
        wanted(unguarded, "two")


def test_clicks_are_in_no_history_until_the_next_command_finds_what_they_did(unguarded, signed):
    one, sha = unguarded.candidate("clicks")
    unguarded.store.promote("clicks", one, why="first", who="ada", **signed)
    by_hand(unguarded, "clicks", one, "Archived")
    assert len(signed["approvals"].history("clicks")) == 1
    two, _ = unguarded.candidate("clicks")
    unguarded.store.promote("clicks", two, why="second", who="bob", **signed)
    first, found, second = signed["approvals"].history("clicks")
    assert (found["who"], found["why"]) == ("tidegate", "found outside Production: moved past the guard")
    assert (first["adapter_sha256"], second["version"]) == (sha, two)


def test_a_click_back_to_what_was_live_before_brings_its_old_approval_which_is_older_than_what_serving_follows(
    unguarded, signed
):
    one, sha = unguarded.candidate("back")
    old = unguarded.store.promote("back", one, why="first", who="ada", **signed)
    two, _ = unguarded.candidate("back", parent=sha)
    new = unguarded.store.promote("back", two, why="second", who="ada", **signed)
    by_hand(unguarded, "back", two, "Archived")
    by_hand(unguarded, "back", one)
    assert wanted(unguarded, "back").seq == old["seq"] < new["seq"]
    again = unguarded.store.promote("back", one, why="really", who="ada", **signed)
    assert (again["kind"], wanted(unguarded, "back").seq) == ("rollback", again["seq"])
