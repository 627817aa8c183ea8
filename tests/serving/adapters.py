"""Random adapters that visibly change what the tiny base says."""

from dataclasses import dataclass
from pathlib import Path

import torch

from learner.adapter import weight_name, write_adapter
from learner.base import Base, load_model


@dataclass(frozen=True)
class Shape:
    r: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False


def random_adapter(
    base: Base, folder: Path, seed: int, *, layers=(1, 2), targets=("q_proj", "v_proj", "down_proj"), shape=None
) -> str:
    """Write an adapter of random weights; its sha256."""
    shape = shape or Shape()
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
            weights[weight_name(layer, target, "A")] = 0.3 * torch.randn(shape.r, inside, generator=generator)
            weights[weight_name(layer, target, "B")] = 0.3 * torch.randn(out, shape.r, generator=generator)
    return write_adapter(folder, shape, weights, base)
