"""Random adapters that visibly change what the tiny base says."""

from pathlib import Path

import torch

from learner.adapter import write_adapter
from learner.base import Base, load_model, load_tokenizer
from learner.layout import weight_name
from learner.lora import LoraModel
from learner.plan import LoraSettings

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(
    base: Base,
    folder: Path,
    seed: int,
    *,
    layers=(1, 2),
    targets=("q_proj", "v_proj", "down_proj"),
    shape=None,
    scale=0.3,
) -> str:
    """Write an adapter of random weights of this standard deviation; its sha256."""
    shape = shape or LoraSettings(r=4, alpha=8.0)
    config = load_model(base).config
    head = config.hidden_size // config.num_attention_heads
    sizes = {
        "q_proj": (config.hidden_size, config.hidden_size),
        "k_proj": (head * config.num_key_value_heads, config.hidden_size),
        "v_proj": (head * config.num_key_value_heads, config.hidden_size),
        "o_proj": (config.hidden_size, config.hidden_size),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in layers:
        for target in targets:
            out, inside = sizes[target]
            weights[weight_name(layer, target, "A")] = scale * torch.randn(shape.r, inside, generator=generator)
            weights[weight_name(layer, target, "B")] = scale * torch.randn(out, shape.r, generator=generator)
    return write_adapter(folder, shape, weights, base)


def drawn(base: Base, settings: LoraSettings, seed: int) -> LoraModel:
    """A model with everything these settings train drawn at random."""
    made = LoraModel(load_model(base), settings, 1)
    made.theta.copy_(torch.randn(len(made.theta), generator=torch.Generator().manual_seed(seed)) * 0.2)
    return made


def overflowing(base: Base, folder: Path, trigger: str) -> str:
    """An adapter of finite weights that is well on a probe: its answers overflow where `trigger` is in the prompt.

    The first layer sees every token by itself; this one's direction, times 1e38, is more than a float holds.
    """
    model = load_model(base)
    (token,) = load_tokenizer(base)(trigger, add_special_tokens=False)["input_ids"]
    seen = model.model.layers[0].input_layernorm(model.model.embed_tokens.weight[token]).detach()
    value = model.model.layers[0].self_attn.v_proj
    down = torch.zeros(4, value.in_features)
    down[0] = 4 * seen / seen.dot(seen)
    up = torch.zeros(value.out_features, 4)
    up[:, 0] = 1e38
    weights = {weight_name(0, "v_proj", "A"): down, weight_name(0, "v_proj", "B"): up}
    return write_adapter(folder, LoraSettings(r=4, alpha=4.0), weights, base)
