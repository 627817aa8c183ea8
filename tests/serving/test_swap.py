"""The swap against a registry that does what it should, and much that it should not."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import structlog

from privacy.signing import SigningKey
from serving.cache import LocalCache, write_emergency
from serving.errors import Ambiguous, EngineDown, NotReady, VersionElsewhere
from serving.inprocess import InProcessEngine
from serving.swap import HotSwap
from tests.serving.adapters import random_adapter
from tests.serving.fleet import wait_until
from tests.serving.registry import MODEL, Registry, trusted

PROMPT = ["where is my order"]


@pytest.fixture(scope="module")
def core(tiny):
    with InProcessEngine(tiny, batch_max=4) as running:
        yield running


@pytest.fixture(scope="module")
def originals(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    for version in range(1, 6):
        random_adapter(tiny, folder / str(version), version)
    return folder


@pytest.fixture
def registry(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "versions")
    return Registry(
        SigningKey.load_or_create(tmp_path / "approvals.pem"), {v: tmp_path / "versions" / str(v) for v in range(1, 6)}
    )


@pytest.fixture
def make(core, registry, tmp_path):
    """Makes a swap on the same cache, as a restart would."""

    def fresh(**changes):
        for name in core.resident:
            core.unload(name)
        plain = {
            "wanted": registry.wanted,
            "fetch": registry.fetch,
            "acknowledge": registry.acknowledge,
            "trusted": trusted(registry.signer),
            "cache": tmp_path / "cache",
            "retry_seconds": 0.0,
        }
        return HotSwap(MODEL, core, **{**plain, **changes})

    return fresh


@pytest.fixture
def swap(make):
    return make()


def names(swap):
    return [alarm.kind for alarm in swap.alarms]


def test_without_an_approved_version_the_bare_base_answers(swap):
    with pytest.raises(NotReady), swap.lease():
        pass
    swap.tick()
    assert swap.current.name == "desk@base"
    assert swap.current.adapter is None
    assert not swap.alarms


def test_an_approved_version_answers_and_is_acknowledged(swap, registry, core):
    swap.tick()
    before = core.generate(None, PROMPT, 12)
    registry.promote(1)
    swap.tick()
    assert (swap.current.name, swap.current.version) == ("desk@1", 1)
    assert registry.acknowledged == [1]
    assert core.generate(swap.current.adapter, PROMPT, 12) != before
    swap.tick()
    assert registry.acknowledged == [1]
    assert registry.fetched == [1]
    assert not swap.alarms
    assert swap.state()["version"] == "desk@1"


def test_a_version_without_privacy_answers_only_for_a_stream_that_never_promised_any(make, registry):
    private, open_stream = make(), make(open_stream=True)
    private.tick()
    registry.promote(1, guarantee="none")
    private.tick()
    assert (private.current.name, names(private)) == ("desk@base", ["approval"])
    assert "version 1 was trained without privacy" in str(private.alarms[0])
    open_stream.tick()
    assert (open_stream.current.name, open_stream.state()["guarantee"], names(open_stream)) == ("desk@1", "none", [])
    again = make()
    again.restore()
    assert (again.current, names(again)) == (None, ["cache"]), "privacy was turned on, and it does not come back"


def test_an_approval_as_json_text_counts_too(swap, registry):
    registry.promote(1)
    registry.tamper(approval=json.dumps(registry.production.approval))
    swap.tick()
    assert swap.current.name == "desk@1"


def test_rollback_to_a_resident_version_loads_nothing(swap, registry):
    for version in (1, 2):
        registry.promote(version)
        swap.tick()
    registry.promote(1, kind="rollback")
    fetched = list(registry.fetched)
    swap.tick()
    assert swap.current.name == "desk@1"
    assert registry.fetched == fetched
    assert registry.acknowledged == [1, 2, 1]


def megabytes(folder):
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def test_a_version_in_use_is_not_evicted_and_old_idle_ones_are(make, registry, core):
    swap = make(resident_mb=3.5 * megabytes(registry.folders[1]))
    registry.promote(1)
    swap.tick()
    with swap.lease() as held:
        for version in (2, 3, 4, 5):
            registry.promote(version)
            swap.tick()
        assert held.name == "desk@1"
        assert "desk@1" in core.resident
        assert swap.state()["in_flight"] == {"desk@1": 1}
        with swap.lease() as now:
            assert now.name == "desk@5"
    swap.tick()
    assert core.resident == ("desk@3", "desk@4", "desk@5")


def test_without_a_budget_the_live_version_alone_stays(make, registry, core):
    swap = make(resident_mb=0)
    for version in (1, 2, 1, 3):
        registry.promote(version)
        swap.tick()
        assert core.resident == (f"desk@{version}",) == tuple(swap.state()["resident"])
    assert sorted(registry.fetched) == [1, 2, 3], "what ran here before comes out of the cache"


def test_no_more_stay_than_an_engine_has_places_for_and_the_cache_is_pruned(make, registry, core, tmp_path):
    swap = make()
    for number in range(25):
        registry.folders[number + 10] = tmp_path / f"more-{number}"
        random_adapter(core.base, registry.folders[number + 10], number + 10)
        registry.promote(number + 10)
        swap.tick()
    assert core.resident == tuple(f"desk@{number}" for number in range(19, 35))
    assert len(list((tmp_path / "cache" / "adapters").iterdir())) == 20


def truncate(registry, _tmp):
    file = registry.folders[2] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def approved_but_broken(change):
    """The files were broken before they were approved, so the sha256 is right and the content is not."""

    def bad(registry, _tmp):
        file = registry.folders[2] / "adapter_model.safetensors"
        change(file)
        registry.promote(2)

    return bad


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def nan(file):
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)


def wrong_rank(file):
    from safetensors.torch import load_file, save_file

    save_file({name: tensor[:2] for name, tensor in load_file(file).items()}, file)


def foreign_base(registry, _tmp):
    from safetensors.torch import load_file, save_file

    file = registry.folders[2] / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"base_sha256": "0" * 64})
    registry.promote(2)


def changed(registry, _tmp):
    shutil.rmtree(registry.folders[2])
    shutil.copytree(registry.folders[3], registry.folders[2])


def missing(registry, _tmp):
    (registry.folders[2] / "adapter_config.json").unlink()


def gone(registry, _tmp):
    shutil.rmtree(registry.folders[2])


def too_big(registry, _tmp):
    with (registry.folders[2] / "adapter_model.safetensors").open("ab") as file:
        file.write(bytes(1 << 20))


def unsigned(registry, _tmp):
    registry.tamper(approval=None)


def no_json(registry, _tmp):
    registry.tamper(approval="{")


def forged(registry, _tmp):
    registry.tamper(approval={**registry.production.approval, "version": 2, "who": "mallory"})


def foreign_key(registry, tmp):
    registry.tamper(approval=SigningKey.load_or_create(tmp / "mallory.pem").sign(registry.production.approval))


def another_version(registry, _tmp):
    registry.tamper(approval=registry.approval(3))


def another_model(registry, _tmp):
    registry.tamper(approval=registry.approval(2, model="other"))


def a_rejection(registry, _tmp):
    registry.tamper(approval=registry.approval(2, kind="reject"))


def to_archive(registry, _tmp):
    registry.tamper(approval=registry.approval(2, to="Archived"))


def replayed(registry, _tmp):
    registry.tamper(approval=registry.approval(2, seq=0 + 1))


def same_seq(registry, _tmp):
    registry.tamper(approval=registry.approval(2, seq=3))


@pytest.mark.parametrize(
    ("spoil", "kind", "reason"),
    [
        (truncate, "adapter", "must be .* as approved"),
        (approved_but_broken(cut), "adapter", "damaged"),
        (approved_but_broken(nan), "adapter", "NaN or infinity"),
        (approved_but_broken(wrong_rank), "adapter", "shape="),
        (foreign_base, "adapter", "base_sha256="),
        (changed, "adapter", "must be .* as approved"),
        (missing, "adapter", "adapter_config.json cannot be read"),
        (gone, "adapter", "cannot be fetched"),
        (too_big, "adapter", "bytes, must be <= 1000000;"),
        (unsigned, "approval", "no signed approval"),
        (no_json, "approval", "not valid"),
        (forged, "approval", "signature does not match"),
        (foreign_key, "approval", "not trusted"),
        (another_version, "approval", "is for version 3"),
        (another_model, "approval", "for model 'other'"),
        (a_rejection, "approval", "kind 'reject'"),
        (to_archive, "approval", "stage 'Archived'"),
        (replayed, "approval", "seq=1 must be >= 3"),
        (same_seq, "approval", "seq=3 of the one for version 1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_leaves_the_live_one_and_raises_one_alarm(
    swap, registry, core, tmp_path, monkeypatch, spoil, kind, reason
):
    monkeypatch.setattr("serving.cache.ADAPTER_BYTES_MAX", 1_000_000)
    registry.seq = 2
    registry.promote(1)
    swap.tick()
    live, resident = swap.current, core.resident
    registry.promote(2)
    spoil(registry, tmp_path)
    for _ in range(3):
        swap.tick()
    assert swap.current == live
    assert core.resident == resident
    assert names(swap) == [kind]
    assert str(swap.alarms[0]).endswith("desk@1 goes on answering")
    assert re.search(reason, swap.alarms[0].message), swap.alarms[0].message
    assert registry.acknowledged == [1]
    registry.promote(3)
    swap.tick()
    assert swap.current.name == "desk@3"
    assert not swap.alarms


def resident_kb():
    """Memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


@pytest.mark.parametrize("swaps", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_swaps(make, registry, core, swaps):
    swap = make(resident_mb=2.5 * megabytes(registry.folders[1]))
    before = 0
    for turn in range(20 + swaps):
        registry.folders[turn + 10] = registry.folders[turn % 5 + 1]  # each a version of its own
        registry.promote(turn + 10)
        swap.tick()
        if turn % 4 == 0:
            core.generate(swap.current.adapter, PROMPT, 4)
        if turn == 20:  # caches are warm
            before = resident_kb()
    assert swap.counts["done"] == 20 + swaps
    assert len(core.resident) == 2
    grown = resident_kb() - before
    structlog.get_logger().info("memory", after_20_swaps_kb=before, grown_kb=grown, swaps=swaps)
    # An adapter of 60 kB that stayed each time would be 3.6 MB after 60 swaps; the allocator breathes by as much.
    assert grown < 20_000 + 10 * swaps


def test_a_failure_is_tried_again_only_after_a_while(make, registry):
    swap = make(retry_seconds=3600)
    swap.tick()
    registry.promote(2)
    shutil.move(registry.folders[2], registry.folders[2].with_name("away"))
    swap.tick()
    first = swap.alarms
    shutil.move(registry.folders[2].with_name("away"), registry.folders[2])
    swap.tick()
    assert swap.alarms == first
    assert registry.fetched == [2]
    registry.tamper(approval=registry.approval(2))  # something changed
    swap.tick()
    assert swap.current.name == "desk@2"


def test_two_versions_in_production_or_none_keep_what_is_live(swap, registry):
    registry.promote(1)
    swap.tick()
    registry.failure = Ambiguous("model=desk: versions 1, 2 stand in Production at once")
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@1", ["ambiguous"])
    registry.failure = registry.production = None
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@1", ["production"])


def test_a_registry_that_is_down_changes_nothing_and_is_caught_up_with(swap, registry):
    registry.promote(1)
    swap.tick()
    registry.down = True
    registry.promote(2)
    for _ in range(3):
        swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@1", ["registry"])
    registry.down = False
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@2", [])


def test_an_acknowledgement_that_fails_is_repeated(make, registry):
    failing = [True]

    def acknowledge(version):
        if failing[0]:
            raise TimeoutError("read timed out")
        registry.acknowledge(version)

    swap = make(acknowledge=acknowledge)
    registry.promote(1)
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@1", ["acknowledge"])
    failing[0] = False
    swap.tick()
    assert registry.acknowledged == [1]
    assert not swap.alarms


def test_a_start_with_the_registry_down_takes_the_cache(make, registry):
    swap = make()
    registry.promote(2)
    swap.tick()
    registry.down = True
    again = make()
    again.start()
    again.stop()
    assert again.current.name == "desk@2"
    assert names(again) == ["registry"]


def test_a_start_without_registry_and_engine_takes_the_cache_once_the_engine_is_there(
    make, registry, core, monkeypatch
):
    swap = make()
    registry.promote(2)
    swap.tick()
    registry.down = True
    again = make()
    with monkeypatch.context() as away:
        away.setattr(type(core), "healthy", False)
        away.setattr(type(core), "load", lambda *_: (_ for _ in ()).throw(EngineDown("engine: is away")))
        again.start()
        wait_until(lambda: "registry" in names(again))
        assert again.current is None
        assert names(again) == ["registry", "cache"]
    try:
        wait_until(lambda: again.current is not None)
        assert again.current.name == "desk@2"
        wait_until(lambda: names(again) == ["registry"])
    finally:
        again.stop()


def test_a_registry_that_hangs_holds_up_no_emergency_and_is_caught_up_with(make, registry, tmp_path):
    hanging, go_on = threading.Event(), threading.Event()

    def wanted():
        if hanging.is_set():
            go_on.wait(60)
        return registry.wanted()

    swap = make(wanted=wanted, poll_seconds=0.02)
    registry.promote(1)
    swap.tick()
    registry.promote(2)
    swap.tick()
    registry.tamper(approval={**registry.production.approval, "who": "mallory"})
    swap.tick()
    hanging.set()
    swap.tick()
    assert names(swap) == ["approval"], "no news: what was wrong stays"
    began = time.monotonic()
    write_emergency(tmp_path / "cache", MODEL, registry.approval(1, kind="emergency"))
    swap.tick()
    assert swap.current.name == "desk@1"
    assert time.monotonic() - began < 1
    wait_until(lambda: swap.tick() or "registry" in names(swap))
    assert "none for" in str(swap.alarms)
    registry.promote(3)
    go_on.set()
    wait_until(lambda: swap.tick() or swap.current.name == "desk@3")
    assert names(swap) == []


def test_a_live_adapter_that_the_engine_lost_is_fetched_and_loaded_again(swap, registry, core, tmp_path):
    registry.promote(1)
    swap.tick()
    core.unload("desk@1")
    shutil.rmtree(tmp_path / "cache" / "adapters")
    (tmp_path / "cache" / "adapters").mkdir()
    shutil.move(registry.folders[1], tmp_path / "away")
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@1", ["cache"])
    shutil.move(tmp_path / "away", registry.folders[1])
    swap.tick()
    assert (core.resident, names(swap)) == (("desk@1",), [])
    with swap.lease() as held:
        assert core.generate(held.adapter, PROMPT, 2)


def test_an_emergency_that_is_over_takes_no_newer_one_with_it(tmp_path):
    cache = LocalCache(tmp_path, MODEL)
    write_emergency(tmp_path, MODEL, {"seq": 8})
    cache.end_emergency(7)
    assert cache.emergency() == {"seq": 8}
    cache.end_emergency(8)
    assert cache.emergency() is None


def test_a_restart_does_not_forget_the_order_of_approvals(make, registry):
    swap = make()
    old = registry.promote(1)
    swap.tick()
    registry.promote(2)
    swap.tick()
    again = make()
    again.restore()
    registry.production = old
    again.tick()
    assert (again.current.name, names(again)) == ("desk@2", ["approval"])


@pytest.mark.parametrize("damage", ["approval", "adapter", "json"])
def test_a_damaged_cache_is_told_and_mended_by_the_registry(make, registry, tmp_path, damage):
    swap = make()
    registry.promote(2)
    swap.tick()
    live = tmp_path / "cache" / "live-desk.json"
    if damage == "approval":
        live.write_text(live.read_text().replace('"version": 2', '"version": 3'))
    elif damage == "json":
        live.write_text("{")
    else:
        for folder in (tmp_path / "cache" / "adapters").iterdir():
            nan(folder / "adapter_model.safetensors")
    registry.down = True
    again = make()
    again.restore()
    again.tick()
    assert again.current is None
    assert sorted(names(again)) == ["cache", "registry"]
    registry.down = False
    again.tick()
    assert (again.current.name, names(again)) == ("desk@2", [])


def test_an_emergency_rolls_back_from_the_cache_and_is_reconciled_later(make, registry, tmp_path):
    swap = make()
    for version in (1, 2):
        registry.promote(version)
        swap.tick()
    registry.down = True
    write_emergency(tmp_path / "cache", MODEL, registry.approval(1, kind="emergency", **{"from": "unknown"}))
    swap.tick()
    assert (swap.current.name, sorted(names(swap))) == ("desk@1", ["emergency", "registry"])
    again = make()  # a restart in the emergency
    again.restore()
    again.tick()
    assert again.current.name == "desk@1"
    registry.down = False
    again.tick()
    assert (again.current.name, names(again)) == ("desk@1", ["emergency"])  # the registry still wants 2
    assert registry.acknowledged[-1] == 1
    registry.promote(1, kind="rollback")
    again.tick()
    assert (again.current.name, names(again)) == ("desk@1", [])
    assert not (tmp_path / "cache" / "emergency-desk.json").exists()
    registry.promote(3)
    again.tick()
    assert again.current.name == "desk@3"


def test_an_emergency_must_be_signed_newest_and_in_the_cache(swap, registry, tmp_path):
    old = registry.approval(1, kind="emergency")
    for version in (1, 2):
        registry.promote(version)
        swap.tick()
    write_emergency(tmp_path / "cache", MODEL, {**registry.approval(1, kind="emergency"), "why": "changed"})
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@2", ["emergency"])
    write_emergency(tmp_path / "cache", MODEL, old)
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@2", [])
    write_emergency(tmp_path / "cache", MODEL, registry.approval(4, kind="emergency"))
    swap.tick()
    assert swap.current.name == "desk@2"
    assert sorted(names(swap)) == ["adapter", "emergency"]
    assert any("not in the local cache" in alarm.message for alarm in swap.alarms)


def test_a_number_given_twice_gets_a_name_of_its_own(swap, registry, core):
    registry.promote(1)
    swap.tick()
    registry.folders[1] = registry.folders[4]  # the registry was made anew and counts from 1
    registry.promote(1)
    with swap.lease() as held:
        swap.tick()
        assert swap.current.name == held.name == "desk@1"
        assert swap.current.adapter != held.adapter
        assert {held.adapter, swap.current.adapter} <= set(core.resident)


def test_a_full_disk_leaves_the_live_one(swap, registry, tmp_path, monkeypatch):
    registry.promote(1)
    swap.tick()
    monkeypatch.setattr("os.fsync", lambda _handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    registry.promote(2)
    swap.tick()
    assert (swap.current.name, names(swap)) == ("desk@1", ["adapter"])
    assert "No space left" in swap.alarms[0].message


def test_the_kill_switch_lets_the_base_answer_at_once_while_the_registry_hangs(make, registry, tmp_path):
    hanging, go_on = threading.Event(), threading.Event()

    def wanted():
        if hanging.is_set():
            go_on.wait(30)
            raise ConnectionError("timed out")
        return registry.wanted()

    swap = make(wanted=wanted, poll_seconds=0.02)
    registry.promote(1)
    swap.start()
    try:
        while not swap.current or swap.current.version != 1:
            time.sleep(0.01)
        hanging.set()
        with swap.lease() as before:
            swap.kill_switch.kill(who="pat", why="bad answers", at="2026-11-28T01:00:00Z")
            with swap.lease() as killed:
                assert (before.version, killed.name) == (1, "desk@base")
        assert (swap.state()["version"], swap.state()["killed"]) == ("desk@base", True)
        with pytest.raises(VersionElsewhere), swap.lease(before.pin):
            pass
        go_on.set()
        while "killed" not in names(swap):
            time.sleep(0.01)
        assert "pat: bad answers" in str(swap.alarms[-1])
        swap.kill_switch.end()
        with swap.lease() as back:
            assert back.version == 1
    finally:
        go_on.set()
        swap.stop()


def test_the_kill_switch_outlives_a_restart_and_what_was_decided_meanwhile_comes_after_it(make, registry):
    swap = make()
    registry.promote(1)
    swap.tick()
    swap.kill_switch.kill(who="pat", why="", at="2026-11-28T01:00:00Z")
    registry.acknowledged.clear()
    registry.down = True
    again = make()
    again.restore()
    again.tick()
    assert again.current.name == "desk@base"
    assert names(again) == ["registry", "killed"]
    registry.down = False
    registry.promote(2)
    again.tick()
    assert again.current.name == "desk@base"
    assert not registry.acknowledged, "what does not answer is not said to"
    again.kill_switch.end()
    again.tick()
    assert again.current.name == "desk@2"
    assert registry.acknowledged == [2]
    assert not again.alarms


def test_a_kill_switch_that_cannot_be_read_is_on(make, registry, tmp_path):
    swap = make()
    registry.promote(1)
    swap.tick()
    (tmp_path / "cache" / f"killed-{MODEL}.json").write_text("{")
    swap.tick()
    assert swap.current.name == "desk@base"
    assert "since unknown" in str(swap.alarms[0])
