"""What only changes speed: each lever, on and off, gives the same update."""

import gc
from pathlib import Path

import pytest
import torch

from learner.plan import LoraSettings
from learner.prefix import PrefixCache, Spill, SplitModel
from learner.round import Speed, run_round
from privacy.randomness import TestKey
from tests.learner.rounds import examples, plan, private_step, records, stream

KIND = LoraSettings(r=4, layers=1)
RECORD_BYTES = 60 * 32 * 4  # longer than any record of these


def caches(base, made, folder):
    lora, step = private_step(base, made, settings=KIND, cached=False)
    halves = SplitModel(lora.model, lora.layers[0])
    ids = [e.ids for e in made]
    bounds = {
        "memory": PrefixCache(halves, ids, 1 << 30),
        "disk": PrefixCache(halves, ids, 0, spill=Spill(folder, 1 << 20)),
        "memory, then disk": PrefixCache(halves, ids, 4 * RECORD_BYTES, spill=Spill(folder, 1 << 20)),
        "disk too small": PrefixCache(halves, ids, 0, spill=Spill(folder, 8192)),
    }
    for cache in bounds.values():
        cache.fill(range(len(made)), 256)
    return step, bounds


def test_prefixes_in_memory_on_disk_or_recomputed_give_the_same_update(tiny, tmp_path):
    made = examples(tiny, 12)
    step, bounds = caches(tiny, made, tmp_path)
    assert {name: len(cache._kept) for name, cache in bounds.items() if "small" not in name} == {
        "memory": 12,
        "disk": 12,
        "memory, then disk": 12,
    }
    assert 0 < len(bounds["disk too small"]._kept) < 12
    recomputed = step.clipped_sum(range(12), stream())
    for cache in bounds.values():
        step._cache = cache
        torch.testing.assert_close(step.clipped_sum(range(12), stream()), recomputed, rtol=1e-4, atol=1e-7)
    bounds["disk"]._kept[3].zero_()  # the comparison can fail: the file is what is read
    step._cache = bounds["disk"]
    assert float((step.clipped_sum(range(12), stream()) - recomputed).norm()) > 1e-2 * float(recomputed.norm())


def test_prefixes_on_disk_have_no_name_and_are_gone_with_the_cache(tiny, tmp_path):
    def mapped():
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    _, bounds = caches(tiny, examples(tiny, 6), tmp_path)
    assert len(bounds["disk"]._kept) == 6
    assert list(tmp_path.iterdir()) == []  # so that a killed process leaves nothing
    assert mapped()
    assert all(line.endswith("(deleted)") for line in mapped())
    del bounds
    gc.collect()
    assert not mapped()


def test_a_disk_without_room_is_no_error(tiny, tmp_path):
    made = examples(tiny, 4)
    lora, _ = private_step(tiny, made, settings=KIND, cached=False)
    halves = SplitModel(lora.model, lora.layers[0])
    cache = PrefixCache(halves, [e.ids for e in made], 0, spill=Spill(tmp_path, 1 << 60))
    cache.fill(range(4), 256)
    assert not cache._kept
    assert cache.hidden([0, 1]).shape[0] == 2


@pytest.mark.parametrize(
    ("speed", "same_bytes"),
    [
        (Speed(prefix_bytes_max=0, prefix_disk_bytes_max=1 << 22), True),
        (Speed(prefix_bytes_max=0), False),
        (Speed(tokens_max=64, rows_max=3), False),
    ],
    ids=["prefixes on disk", "no prefixes", "small batches"],
)
def test_a_round_ends_in_the_same_adapter(tiny, tmp_path, speed, same_bytes):
    from learner.adapter import read_adapter

    outputs = []
    for folder, chosen in ((tmp_path / "1", Speed()), (tmp_path / "2", speed)):
        outputs.append(
            run_round(
                plan(tiny, lora=KIND, steps=2),
                base=tiny,
                parent_dir=None,
                records={"b1": records(40), "b2": records(30, block="b2", seed=1)},
                key=TestKey(5),
                system="",
                checkpoint_dir=folder / "checkpoint",
                out_dir=folder / "adapter",
                max_tokens=64,
                speed=chosen,
            )
        )
    one, other = (read_adapter(output.adapter_dir).weights for output in outputs)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    if same_bytes:
        assert outputs[0].adapter_sha256 == outputs[1].adapter_sha256
