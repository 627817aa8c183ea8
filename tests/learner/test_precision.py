"""Lower precision of the frozen layers: near in value, equal in privacy; and layers run again: less memory."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.base import load_model
from learner.lora import LoraModel
from learner.plan import ALL_TARGETS, LoraSettings
from learner.precision import DTYPES, fastest, probe
from learner.prefix import PrefixCache, Spill, SplitModel
from learner.step import Example, Limits
from tests.learner.rounds import awake, examples, random_model, step_of, stream

EVERYTHING = LoraSettings(
    r=4, layers=2, targets=(*ALL_TARGETS, "lm_head"), bottleneck=4, bottleneck_places=("attention", "mlp")
)
HALF = ("bf16", "fp16")


def half(base, made, precision, *, settings=EVERYTHING, clip=1e9, **more):
    lora = awake(LoraModel(load_model(base, DTYPES[precision]), settings, 64), seed=3)
    return lora, step_of(lora, made, clip=clip, **more)


def distance(ours, reference):
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize(("precision", "near"), [("bf16", 0.1), ("fp16", 0.01)])
def test_half_precision_is_near_and_what_is_clipped_is_fp32(tiny, precision, near):
    made = examples(tiny, 6)
    reference = half(tiny, made, "fp32")[1].clipped_sum(range(6), stream())
    lora, step = half(tiny, made, precision)
    found = step.clipped_sum(range(6), stream())
    assert 1e-5 < distance(found, reference) < near
    assert lora.theta.dtype == lora.gradients.rows.dtype == torch.float32
    assert found.dtype == torch.float64
    assert step._halves.lower(torch.tensor([[1, 2]])).dtype == DTYPES[precision]


@pytest.mark.parametrize("precision", HALF)
def test_the_clip_holds_in_half_precision(tiny, precision):
    made = examples(tiny, 5)
    _, step = half(tiny, made, precision, clip=0.3)
    for index in range(5):
        assert float(step.clipped_sum([index], stream()).norm()) <= 0.3


@pytest.mark.parametrize("precision", HALF)
def test_a_record_in_half_precision_that_is_not_finite_counts_as_zero_and_spoils_no_other(tiny, precision):
    made = examples(tiny, 4)
    _, step = half(tiny, made, precision, clip=0.5)
    others = step.clipped_sum([0, 1, 3], stream())
    step._cache._kept[2][0, 0] = float("nan")
    assert distance(step.clipped_sum([0, 1, 2, 3], stream()), others) < 1e-2


def test_a_tiny_gradient_survives_fp16_and_a_large_one_beside_it_changes_nothing(tiny, monkeypatch):
    """Without a scale the small one would vanish; with one scale for the batch it would follow from its neighbours."""
    made = examples(tiny, 4)
    settings = LoraSettings(r=4, layers=2)

    def rows(precision, indices):
        """Gradients (B, P) of these examples in one pass, that of example 2 shrunk on its way into the layers."""
        _, step = half(tiny, made, precision, settings=settings)
        lowered = step._lowered
        factors = torch.tensor([1e-9 if i == 2 else 1.0 for i in indices])[:, None, None]
        step._lowered = lambda slope, kind: lowered(slope * factors, kind)
        return step._example_gradients(indices, None).double()

    exact = rows("fp32", [2])[0]
    assert 0 < float(exact.norm()) < 1e-6
    assert distance(rows("fp16", [2])[0], exact) < 0.01
    assert distance(rows("fp16", [0, 1, 2, 3])[2], exact) < 0.01
    monkeypatch.setattr("learner.step.FP16_SLOPE", 1e-12)
    assert float(rows("fp16", [2]).norm()) == 0.0


@pytest.mark.parametrize("precision", HALF)
def test_prefixes_that_spill_to_disk_keep_their_precision(tiny, tmp_path, precision):
    made = examples(tiny, 6)
    lora, _ = half(tiny, made, precision)
    halves = SplitModel(lora.model, lora.lowest)
    cache = PrefixCache(halves, [e.ids for e in made], 2000, spill=Spill(tmp_path, 1 << 20))
    cache.fill(range(6), 64)
    for index in range(6):
        kept = cache.hidden([index])
        assert kept.dtype == DTYPES[precision]
        assert distance(kept.float(), halves.lower(torch.tensor([made[index].ids])).float()) < 0.02
    assert cache.hidden(range(6)).dtype == DTYPES[precision]


def test_the_probe_times_each_precision_and_half_must_be_worth_it():
    seconds = probe()
    assert set(seconds) == set(DTYPES)
    assert all(value > 0 for value in seconds.values())
    assert fastest({"fp32": 1.0, "bf16": 25.0, "fp16": 25.0}) == "fp32"  # a CPU without such units
    assert fastest({"fp32": 1.0, "bf16": 0.9, "fp16": 0.8}) == "fp32"
    assert fastest({"fp32": 1.0, "bf16": 0.3, "fp16": 0.1}) == "bf16"  # more range
    assert fastest({"fp32": 1.0, "bf16": 1.0, "fp16": 0.1}) == "fp16"


class Living(TorchDispatchMode):
    """Bytes of all tensors made inside that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage):
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._lose, size)

    def _lose(self, size):
        self.now -= size


def peak(step, count):
    gc.collect()
    with Living() as living:
        step.clipped_sum(range(count), stream())
    return living.peak


def test_running_layers_again_takes_less_memory():
    """Peak of all that a step allocates, over a model deep enough that activations are most of it."""
    settings = LoraSettings(r=1, layers=8, targets=("q_proj", "v_proj"))
    made = [Example(tuple(range(1, 41)), 35)] * 8
    peaks = {}
    for kind in ("none", "reentrant", "non-reentrant"):
        lora = awake(LoraModel(random_model(61, hidden=32, layers=8), settings, 8), seed=3)
        peaks[kind] = peak(step_of(lora, made, limits=Limits(1 << 20, 8), recompute=kind), 8)
    assert peaks["reentrant"] < 0.6 * peaks["none"]
    assert peaks["non-reentrant"] < 0.6 * peaks["none"]
