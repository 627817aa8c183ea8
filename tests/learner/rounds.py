"""What the learner's tests share: records, a tiny private step, and the plain one-at-a-time oracle."""

from functools import cache

import numpy as np
import torch

from ingest.record import Record
from learner.base import load_model, load_tokenizer
from learner.layout import BLOCK_PART, HEAD, PLACES, module_name
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


def random_model(vocabulary, *, hidden, layers):
    """The same random Qwen2 each time, its biases not zero; without a tokenizer its vocabulary can be small."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden + hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa")
        for name, parameter in made.named_parameters():
            if name.endswith("_proj.bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(requires_grad=False)


def awake(lora, seed):
    """Weights as after some training: with what starts at zero left at zero, most gradients would be zero too."""
    lora.start_fresh(seed)
    generator = torch.Generator().manual_seed(seed)
    for slot in lora.slots:
        if slot.zero_at_first:
            lora.theta[slot.start : slot.stop] = torch.randn(slot.stop - slot.start, generator=generator) * 0.05
    return lora


def private_step(
    base, made, *, settings, units=None, clip=1.0, sigma=1.0, limits=ROOMY, cached=True, seed=3, recompute="none"
):
    """A step on real weights."""
    lora = awake(LoraModel(load_model(base), settings, limits.rows_max), seed)
    return lora, step_of(lora, made, units, clip, sigma, limits, cached=cached, recompute=recompute)


def step_of(lora, made, units=None, clip=1.0, sigma=1.0, limits=ROOMY, *, cached=True, recompute="none"):
    halves = SplitModel(lora.model, lora.lowest, recompute)
    cache = PrefixCache(halves, [e.ids for e in made], (1 << 30) if cached else 0)
    cache.fill(range(len(made)), 4096)
    units = units or [Unit(0.5, (i,)) for i in range(len(made))]
    return PrivateStep(lora, halves, cache, made, units, Mechanism(clip, sigma, 8.0), limits)


class PlainLora(torch.nn.Module):
    """LoRA by plain autograd, nothing shared with the code under test."""

    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T


class PlainBottleneck(torch.nn.Module):
    """A bottleneck adapter behind a layer by plain autograd."""

    def __init__(self, inner, down, down_bias, up, up_bias, nonlinearity):
        super().__init__()
        self.inner = inner
        self.down, self.down_bias = torch.nn.Parameter(down), torch.nn.Parameter(down_bias)
        self.up, self.up_bias = torch.nn.Parameter(up), torch.nn.Parameter(up_bias)
        self.act = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}[nonlinearity]

    def forward(self, x):
        z = self.inner(x)
        return z + self.act(z @ self.down.T + self.down_bias) @ self.up.T + self.up_bias


def plain_model(base, lora):
    """The base with the same weights under autograd; answers it and its parameters in `theta`'s order."""
    return plain_copy(load_model(base), lora)


def plain_copy(model, lora):
    """The same into a model that is at hand."""
    places = {}
    for slot in lora.slots:
        value = lora.theta[slot.start : slot.stop].view(slot.shape).clone()
        places.setdefault((slot.layer, slot.target), []).append(value)
    parameters = []
    for (layer, target), values in places.items():
        if target == HEAD:
            owner, name = model, HEAD
        else:
            name = PLACES.get(target, target)
            owner = getattr(model.model.layers[layer], BLOCK_PART[name])
        if target in PLACES:
            plain = PlainBottleneck(getattr(owner, name), *values, lora.settings.nonlinearity)
            parameters += [plain.down, plain.down_bias, plain.up, plain.up_bias]
        else:
            plain = PlainLora(getattr(owner, name), *values, lora.settings.scale_of(module_name(layer, target)))
            parameters += [plain.a, plain.b]
        setattr(owner, name, plain)
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
