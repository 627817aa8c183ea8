"""What the learner's tests share: records, a tiny private step, and the plain one-at-a-time oracle."""

from functools import cache

import numpy as np
import torch

from ingest.record import Record
from learner.adapter import BLOCK_PART
from learner.base import load_model, load_tokenizer
from learner.lora import LoraModel
from learner.plan import BlockAccount, BlockRate, LoraSettings, OptimiserSettings, RoundPlan, code_sha256
from learner.prefix import PrefixCache, SplitModel
from learner.prompt import Renderer
from learner.sampling import Unit
from learner.step import Example, Limits, Mechanism, PrivateStep
from privacy.policy import Policy
from privacy.randomness import KeyedStream, TestKey

WORDS = [
    "card",
    "account",
    "pin",
    "transfer",
    "balance",
    "lost",
    "frozen",
    "bill",
    "limit",
    "rate",
    "travel",
    "open",
    "close",
    "report",
    "order",
]
ROOMY = Limits(tokens_max=1 << 20, rows_max=64)


def records(count, *, seed=0, block="b1"):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 12))))
        completion = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 4))))
        made.append(
            Record(
                schema_version=1,
                event_id=f"{block}-{i}",
                user_id=f"u{i % 7}",
                domain="banking",
                prompt=prompt,
                completion=completion,
            )
        )
    return made


@cache
def renderer_of(base, system):
    return Renderer(load_tokenizer(base), system)


def examples(base, count, *, seed=0, system=""):
    renderer = renderer_of(base, system)
    made = []
    for record in records(count, seed=seed):
        ids, start = renderer.example(record.prompt, record.completion)
        made.append(Example(tuple(ids), start))
    return made


def stream(step=0, seed=1):
    return KeyedStream(TestKey(seed), {"plan": "p", "data": "d", "base": "b", "code": "c"}, step)


def private_step(base, made, *, settings, units=None, clip=1.0, sigma=1.0, limits=ROOMY, cached=True, seed=3):
    """A step on real LoRA weights: A as drawn, B random too, else A's gradient would be zero."""
    lora = LoraModel(load_model(base), settings, limits.rows_max)
    lora.start_fresh(seed)
    generator = torch.Generator().manual_seed(seed)
    for slot in lora.slots:
        if slot.matrix == "B":
            lora.theta[slot.start : slot.stop] = torch.randn(slot.stop - slot.start, generator=generator) * 0.05
    halves = SplitModel(lora.model, lora.layers[0])
    cache = PrefixCache(halves, [e.ids for e in made], (1 << 30) if cached else 0)
    cache.fill(range(len(made)), 4096)
    units = units or [Unit(0.5, (i,)) for i in range(len(made))]
    return lora, PrivateStep(lora, halves, cache, made, units, Mechanism(clip, sigma, 8.0), limits)


class PlainLora(torch.nn.Module):
    """LoRA by plain autograd, nothing shared with the code under test."""

    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = torch.nn.Parameter(a.clone())
        self.b = torch.nn.Parameter(b.clone())

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T


def plain_model(base, lora):
    """The base with the same LoRA weights under autograd; answers it and its parameters in `theta`'s order."""
    model = load_model(base)
    parameters = []
    for slot_a, slot_b in zip(lora.slots[::2], lora.slots[1::2], strict=True):
        part = getattr(model.model.layers[slot_a.layer], BLOCK_PART[slot_a.target])
        a = lora.theta[slot_a.start : slot_a.stop].view(slot_a.shape)
        b = lora.theta[slot_b.start : slot_b.stop].view(slot_b.shape)
        plain = PlainLora(getattr(part, slot_a.target), a, b, lora.settings.scale)
        setattr(part, slot_a.target, plain)
        parameters += [plain.a, plain.b]
    return model, parameters


def one_at_a_time(model, parameters, example):
    """(P,) gradient of one example's mean completion loss, through transformers' own forward."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, example.completion_start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, example.completion_start :])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def clipped(gradient, clip):
    return gradient * min(1.0, clip / float(gradient.double().norm()))


def account(name="b1", *, units=100, spent=None, unit="record", epsilon=8.0, **policy):
    frozen = Policy(unit=unit, epsilon=epsilon, delta=1e-5, **policy).frozen(nominal_units=units)
    return BlockAccount(name, frozen, spent or (0.0,) * len(frozen["orders"]))


def plan(base, **changes):
    values = {
        "round_id": "r1",
        "attempt": 1,
        "stream": "desk",
        "parent_sha256": None,
        "base_sha256": base.sha256,
        "data_revision": "0" * 40,
        "unit": "record",
        "blocks": (BlockRate(id="b1", q=0.3), BlockRate(id="b2", q=0.1)),
        "orders": (2, 4, 8, 16),
        "sigma": 1.0,
        "clip_norm": 1.0,
        "steps": 6,
        "expected_batch": 12.0,
        "lora": LoraSettings(r=4, layers=2),
        "optimiser": OptimiserSettings(),
        "noise_source": "test",
        "code_sha256": code_sha256(),
    }
    return RoundPlan(**{**values, **changes})
